//! A service is split off: `attachments` goes to new, all else of the monolith stays on old for ever. What its sessions see from `new-primary` on.

mod both;
mod routes;
mod steps;
mod twin;

#[path = "../common/mod.rs"]
mod common;

use common::link::Link;
use common::pair::{APP, DATABASE};
use common::{Databases, Pair, Proxy};
use tokio_postgres::{Client, SimpleQueryMessage};

/// Of the file: what migrates.
pub(crate) const SERVICE: &str = "tables: [public.attachments]";

pub(crate) const ATTACHMENTS: &str = "CREATE TABLE attachments (id int PRIMARY KEY, order_id int, name text, amount bigint NOT NULL DEFAULT 0); \
    INSERT INTO attachments SELECT n, n, 'a' || n, 100 FROM generate_series(1, 10) n;";
pub(crate) const MONOLITH: &str = "CREATE TABLE orders (id serial PRIMARY KEY, note text, amount bigint NOT NULL DEFAULT 0); \
    INSERT INTO orders (note, amount) SELECT 'o' || n, 100 FROM generate_series(1, 10) n; \
    CREATE TABLE audit (what text); CREATE VIEW rich AS SELECT * FROM orders WHERE amount > 150; \
    CREATE VIEW joined AS SELECT o.note, a.name FROM orders o JOIN attachments a ON a.order_id = o.id;";

/// Both databases. New can prepare transactions; old cannot, as a production server as it stands.
pub(crate) async fn databases(new: &[(&str, &str)]) -> Databases {
    let databases = Databases::start_trusting_with(&[("wal_writer_delay", "10s")], new).await;
    for (side, script) in [(&databases.old, format!("{ATTACHMENTS} {MONOLITH}")), (&databases.new, ATTACHMENTS.into())]
    {
        side.run(DATABASE, &format!("SET ROLE {};\n{script}", APP.0)).await.expect("makes the tables");
    }
    databases
}

/// The service is on new: in this phase.
pub(crate) async fn split(phase: &str, more: &str) -> Pair {
    let databases = databases(&[("max_prepared_transactions", "20")]).await;
    let config = databases.proxy_config("old", &lines(more));
    let proxy = Proxy::start(config).await;
    let mut pair = Pair { proxy, databases };
    moved(&mut pair, phase).await;
    pair
}

fn lines(more: &str) -> String {
    format!("{SERVICE}\n{}\n{more}", common::pair::TRUST)
}

async fn moved(pair: &mut Pair, phase: &str) {
    for next in ["dual-write", "new-primary", phase] {
        pair.proxy.set_phase(next).await;
        if matches!(next, "dual-write") {
            pair.proxy.settle().await;
        }
    }
}

/// The same in `new-primary`, with a line to each side.
pub(crate) struct Stage {
    pub(crate) pair: Pair,
    pub(crate) old: Link,
    pub(crate) new: Link,
}

impl Stage {
    pub(crate) async fn start(more: &str) -> Stage {
        let databases = databases(&[("max_prepared_transactions", "20")]).await;
        let (old, new) = (Link::to(databases.old.port()).await, Link::to(databases.new.port()).await);
        let url = |link: &Link| {
            let (role, password) = common::pair::CONTROL;
            format!("postgres://{role}:{password}@127.0.0.1:{}/{DATABASE}", link.port())
        };
        let config =
            common::ProxyConfig { old: url(&old), new: url(&new), ..databases.proxy_config("old", &lines(more)) };
        let mut pair = Pair { proxy: Proxy::start(config).await, databases };
        moved(&mut pair, "new-primary").await;
        Stage { pair, old, new }
    }

    /// What both sides hold together.
    pub(crate) async fn sum(&self) -> i64 {
        let sum = async |side, table: &str| {
            on(side, &format!("SELECT sum(amount) FROM {table}")).await.parse::<i64>().unwrap()
        };
        sum(&self.pair.databases.old, "orders").await + sum(&self.pair.databases.new, "attachments").await
    }

    /// Waits until nothing is prepared.
    pub(crate) async fn decided(&self) {
        common::until("nothing is prepared", async || {
            on(&self.pair.databases.new, "SELECT count(*) FROM pg_prepared_xacts").await == "0"
        })
        .await;
    }

    /// The migrating table is the same on both sides, when nothing is owed.
    pub(crate) async fn assert_mirrored(&self) {
        self.pair.proxy.settle().await;
        let all = "SELECT string_agg(a::text, ' ' ORDER BY id) FROM attachments a";
        assert_eq!(on(&self.pair.databases.old, all).await, on(&self.pair.databases.new, all).await);
    }
}

/// The one value of a simple Query.
pub(crate) async fn value(client: &Client, sql: &str) -> String {
    let found = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let row = found.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
        _ => None,
    });
    row.unwrap_or_else(|| panic!("{sql}: no value"))
}

/// SQLSTATE of what a statement fails with.
pub(crate) async fn refusal(client: &Client, sql: &str) -> String {
    let error = client.simple_query(sql).await.expect_err(sql);
    error.code().unwrap_or_else(|| panic!("{sql}: {error:?}")).code().to_owned()
}

pub(crate) async fn on(side: &crossfade::cluster::Cluster, sql: &str) -> String {
    side.run(DATABASE, sql).await.expect(sql).trim().to_owned()
}
