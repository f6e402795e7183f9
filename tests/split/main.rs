//! A service is split off: `attachments` goes to new, all else of the monolith stays on old for ever. What its sessions see from `new-primary` on.

mod routes;

#[path = "../common/mod.rs"]
mod common;

use common::pair::{APP, DATABASE};
use common::{Databases, Pair, Proxy};
use tokio_postgres::{Client, SimpleQueryMessage};

/// Of the file: what migrates.
pub(crate) const SERVICE: &str = "tables: [public.attachments]";

const ATTACHMENTS: &str = "CREATE TABLE attachments (id int PRIMARY KEY, order_id int, name text, amount bigint NOT NULL DEFAULT 0); \
    INSERT INTO attachments SELECT n, n, 'a' || n, 100 FROM generate_series(1, 10) n;";
const MONOLITH: &str = "CREATE TABLE orders (id serial PRIMARY KEY, note text, amount bigint NOT NULL DEFAULT 0); \
    INSERT INTO orders (note, amount) SELECT 'o' || n, 100 FROM generate_series(1, 10) n; \
    CREATE TABLE audit (what text); CREATE VIEW rich AS SELECT * FROM orders WHERE amount > 150; \
    CREATE VIEW joined AS SELECT o.note, a.name FROM orders o JOIN attachments a ON a.order_id = o.id;";

/// Both databases, with these lines of postgresql.conf on each side.
pub(crate) async fn databases() -> Databases {
    let databases = Databases::start_trusting().await;
    for (side, script) in [(&databases.old, format!("{ATTACHMENTS} {MONOLITH}")), (&databases.new, ATTACHMENTS.into())]
    {
        side.psql(DATABASE, &format!("SET ROLE {};\n{script}", APP.0)).await.expect("makes the tables");
    }
    databases
}

/// The service is on new: in this phase.
pub(crate) async fn split(phase: &str, more: &str) -> Pair {
    let databases = databases().await;
    let more = format!("{SERVICE}\n{}\n{more}", common::pair::TRUST);
    let proxy = Proxy::start(databases.proxy_config("old", &more)).await;
    let mut pair = Pair { proxy, databases };
    for next in ["dual-write", "new-primary", phase] {
        pair.proxy.set_phase(next).await;
        if matches!(next, "dual-write") {
            pair.proxy.settle().await;
        }
    }
    pair
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
    side.psql(DATABASE, sql).await.expect(sql).trim().to_owned()
}
