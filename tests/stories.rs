//! Stories of a migration: load, outages and kills in `dual-write`, and what both databases hold at the end.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::link::{Flow, Link};
use common::pair::{APP, CONTROL, DATABASE};
use common::pgbench::{pgbench, try_pgbench};
use common::{Databases, Proxy, ProxyConfig, until};
use crossfade::cluster::Stop;
use tokio_postgres::NoTls;

/// What the clients of [`Load`] write: rows that are inserted, updated and deleted, and one row that all fight for.
const SCHEMA: &str =
    "CREATE TABLE notes (id bigint PRIMARY KEY, writer int NOT NULL, version int NOT NULL, body text, \
        made timestamptz NOT NULL DEFAULT clock_timestamp());
    CREATE TABLE counters (name text PRIMARY KEY, n bigint NOT NULL);
    CREATE TABLE history (at timestamptz NOT NULL DEFAULT clock_timestamp(), note bigint, what text);
    INSERT INTO counters VALUES ('all', 0);";

/// True before a release: everything longer.
fn proof() -> bool {
    std::env::var_os("CROSSFADE_PROOF").is_some()
}

/// In `dual-write`, with nothing owed.
async fn dual_write(schema: &str) -> (Proxy, Databases) {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(schema).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "mirror: { timeout: 500ms }")).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    (proxy, databases)
}

/// The same, with a link between the proxy and new.
async fn dual_write_over_a_link() -> (Proxy, Databases, Link) {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let link = Link::to(databases.new.port()).await;
    let new = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
    let config = databases.proxy_config("old", "mirror: { timeout: 500ms }");
    let mut proxy = Proxy::start(ProxyConfig { new, ..config }).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    (proxy, databases, link)
}

/// Writers that go on until they are stopped, and remember what was acknowledged to them.
struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    writers: Vec<tokio::task::JoinHandle<Written>>,
}

/// What one writer knows.
#[derive(Default)]
struct Written {
    /// Notes whose insert was acknowledged, and that were not touched by a transaction of unknown outcome since.
    kept: Vec<i64>,
    /// Notes whose delete was acknowledged.
    deleted: Vec<i64>,
    /// Acknowledged additions to the counter.
    counted: u64,
    /// Transactions of which the writer was not told how they ended.
    unknown: u64,
    /// Errors that a server or the proxy reported.
    errors: Vec<String>,
}

impl Load {
    fn start(url: &str, writers: i64) -> Load {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let writers = (0..writers)
            .map(|writer| tokio::spawn(write(url.to_owned(), writer, stop.clone(), acknowledged.clone())))
            .collect();
        Load { stop, acknowledged, writers }
    }

    /// Waits until this many more transactions have been acknowledged.
    async fn goes_on(&self, transactions: u64) {
        let enough = self.acknowledged.load(Ordering::Relaxed) + transactions;
        until("transactions are acknowledged", async || self.acknowledged.load(Ordering::Relaxed) >= enough).await;
    }

    async fn end(self) -> Written {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Written::default();
        for writer in self.writers {
            let one = writer.await.expect("a writer does not panic");
            all.kept.extend(one.kept);
            all.deleted.extend(one.deleted);
            all.counted += one.counted;
            all.unknown += one.unknown;
            all.errors.extend(one.errors);
        }
        all
    }
}

async fn write(url: String, writer: i64, stop: Arc<AtomicBool>, acknowledged: Arc<AtomicU64>) -> Written {
    let mut written = Written::default();
    let mut next = writer * 1_000_000_000;
    while !stop.load(Ordering::Relaxed) {
        // The proxy may be dead for the moment.
        let Ok((mut client, connection)) = tokio_postgres::connect(&url, NoTls).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        tokio::spawn(async move { drop(connection.await) });
        while !stop.load(Ordering::Relaxed) {
            next += 1;
            let victim = (next % 3 == 0).then(|| written.kept.pop()).flatten();
            match one_transaction(&mut client, next, writer, victim).await {
                Ok(()) => {
                    acknowledged.fetch_add(1, Ordering::Relaxed);
                    written.counted += 1;
                    written.kept.push(next);
                    written.deleted.extend(victim);
                }
                Err(error) => {
                    if let Some(reported) = error.as_db_error() {
                        written.errors.push(reported.to_string());
                    }
                    // The note, and the victim, may be there or not: nobody knows, and nothing is claimed of them.
                    written.unknown += 1;
                    break;
                }
            }
        }
    }
    written
}

async fn one_transaction(
    client: &mut tokio_postgres::Client,
    note: i64,
    writer: i64,
    victim: Option<i64>,
) -> Result<(), tokio_postgres::Error> {
    let tx = client.transaction().await?;
    let writer = i32::try_from(writer).expect("few writers");
    tx.execute("INSERT INTO notes (id, writer, version, body) VALUES ($1, $2, 1, 'new')", &[&note, &writer]).await?;
    tx.execute("UPDATE notes SET version = version + 1, body = repeat('x', 20) WHERE id = $1", &[&note]).await?;
    if let Some(victim) = victim {
        tx.execute("DELETE FROM notes WHERE id = $1", &[&victim]).await?;
    }
    tx.execute("INSERT INTO history (note, what) VALUES ($1, 'written')", &[&note]).await?;
    tx.execute("UPDATE counters SET n = n + 1 WHERE name = 'all'", &[]).await?;
    tx.commit().await
}

/// What was acknowledged is there, what was deleted is not, on both sides; and both sides are equal in every row.
async fn assert_nothing_lost(databases: &Databases, written: &Written) {
    databases.assert_equal().await;
    for side in [&databases.old, &databases.new] {
        let client = side.client(DATABASE).await.expect("connects");
        let there = |ids: Vec<i64>| {
            let client = &client;
            async move { client.query("SELECT id FROM notes WHERE id = ANY ($1)", &[&ids]).await.expect("reads").len() }
        };
        assert_eq!(there(written.kept.clone()).await, written.kept.len(), "an acknowledged note is missing");
        assert_eq!(there(written.deleted.clone()).await, 0, "a deleted note is back");
        let counted: i64 = client.query_one("SELECT n FROM counters", &[]).await.expect("reads").get(0);
        let counted = u64::try_from(counted).expect("it only grows");
        let possible = written.counted..=written.counted + written.unknown;
        assert!(possible.contains(&counted), "{counted} counted, {possible:?} acknowledged");
    }
}

#[tokio::test]
async fn tpcb_with_32_clients_leaves_both_sides_equal() {
    let databases = Databases::start(&[]).await;
    let program = databases.old.program("pgbench");
    for side in [&databases.old, &databases.new] {
        pgbench(&program, &side.url_as(APP.0, APP.1, DATABASE), &["-i", "-q", "-s", "4"]).await;
    }
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    proxy.set_phase("dual-write").await;
    let url = proxy.url_as(APP.0, APP.1, DATABASE);
    let count = if proof() { "2000" } else { "60" };
    for protocol in ["simple", "extended", "prepared"] {
        let report = pgbench(&program, &url, &["-n", "-M", protocol, "-c", "32", "-j", "2", "-t", count]).await;
        assert_eq!(report.failed, 0, "{}", report.text);
        proxy.settle().await;
        databases.assert_equal().await;
    }
    for level in ["repeatable read", "serializable"] {
        let script = format!("ALTER ROLE {} SET default_transaction_isolation = '{level}'", APP.0);
        databases.old.psql("postgres", &script).await.expect("sets");
        let arguments =
            ["-n", "-M", "prepared", "-c", "32", "-j", "2", "-t", count, "--max-tries=0", "--latency-limit=60000"];
        let report = pgbench(&program, &url, &arguments).await;
        assert!(report.transactions > 0, "{}", report.text);
        proxy.settle().await;
        databases.assert_equal().await;
    }
}

/// An outage of new, seen from the outside: no client hears of it, and afterwards nothing is owed and both sides are equal.
async fn outage_of_new(
    proxy: &Proxy,
    databases: &mut Databases,
    begin: impl AsyncFnOnce(&mut Databases),
    end: impl AsyncFnOnce(&mut Databases),
) {
    let load = Load::start(&proxy.url_as(APP.0, APP.1, DATABASE), 8);
    load.goes_on(50).await;
    begin(databases).await;
    load.goes_on(50).await;
    until("what new has missed is shown as owed", async || proxy.metrics("crossfade_debt_keys").await > 0.0).await;
    end(databases).await;
    load.goes_on(50).await;
    let written = load.end().await;
    assert_eq!((written.errors.len(), written.unknown), (0, 0), "clients heard of it: {:?}", written.errors);
    proxy.settle().await;
    until("nothing is shown as owed", async || proxy.metrics("crossfade_debt_keys").await == 0.0).await;
    assert_nothing_lost(databases, &written).await;
}

#[tokio::test]
async fn new_is_stopped_and_started() {
    let (proxy, mut databases) = dual_write(SCHEMA).await;
    let begin = async |databases: &mut Databases| databases.new.stop(Stop::Fast).await.expect("stops");
    let end = async |databases: &mut Databases| databases.new.start().await.expect("starts");
    outage_of_new(&proxy, &mut databases, begin, end).await;
}

#[tokio::test]
async fn new_crashes_and_recovers() {
    let (proxy, mut databases) = dual_write(SCHEMA).await;
    let begin = async |databases: &mut Databases| databases.new.kill9();
    let end = async |databases: &mut Databases| databases.new.start().await.expect("starts");
    outage_of_new(&proxy, &mut databases, begin, end).await;
}

#[tokio::test]
async fn new_is_frozen_and_thawed() {
    let (proxy, mut databases) = dual_write(SCHEMA).await;
    let begin = async |databases: &mut Databases| databases.new.freeze();
    let end = async |databases: &mut Databases| databases.new.thaw();
    outage_of_new(&proxy, &mut databases, begin, end).await;
}

#[tokio::test]
async fn new_refuses_connections_and_accepts_them_again() {
    let (proxy, mut databases, link) = dual_write_over_a_link().await;
    let link = tokio::sync::Mutex::new(link);
    let begin = async |_: &mut Databases| {
        let mut link = link.lock().await;
        link.refuse().await;
        link.cut();
    };
    let end = async |_: &mut Databases| link.lock().await.accept().await;
    outage_of_new(&proxy, &mut databases, begin, end).await;
}

#[tokio::test]
async fn the_network_to_new_loses_answers() {
    let (proxy, mut databases, link) = dual_write_over_a_link().await;
    let begin = async |_: &mut Databases| link.set(common::link::Way::ToClient, Flow::Discard);
    let end = async |_: &mut Databases| {
        link.set_both(Flow::Pass);
        link.cut();
    };
    outage_of_new(&proxy, &mut databases, begin, end).await;
}

#[tokio::test]
async fn new_rejects_rows_until_its_constraint_is_dropped() {
    let (proxy, mut databases) = dual_write(SCHEMA).await;
    let begin = async |databases: &mut Databases| {
        let script = "ALTER TABLE notes ADD CONSTRAINT refuse CHECK (version < 2) NOT VALID";
        databases.new.psql(DATABASE, script).await.expect("adds");
    };
    let end = async |databases: &mut Databases| {
        let script = "ALTER TABLE notes DROP CONSTRAINT refuse";
        databases.new.psql(DATABASE, script).await.expect("drops");
    };
    outage_of_new(&proxy, &mut databases, begin, end).await;
}

#[tokio::test]
async fn the_proxy_is_killed_under_load_and_nothing_acknowledged_is_lost() {
    let (mut proxy, databases) = dual_write(SCHEMA).await;
    let load = Load::start(&proxy.url_as(APP.0, APP.1, DATABASE), 8);
    for _ in 0..if proof() { 50 } else { 5 } {
        load.goes_on(50).await;
        proxy.restart().await;
    }
    load.goes_on(50).await;
    let written = load.end().await;
    assert!(written.unknown > 0, "no kill met a transaction");
    proxy.settle().await;
    assert_nothing_lost(&databases, &written).await;
}

/// The load and the audit themselves, without a proxy: two servers of which only one is written differ.
#[tokio::test]
async fn the_audit_sees_what_one_side_lacks() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let load = Load::start(&databases.old.url_as(APP.0, APP.1, DATABASE), 4);
    load.goes_on(50).await;
    let written = load.end().await;
    assert_eq!((written.errors.len(), written.unknown), (0, 0), "{:?}", written.errors);
    assert!(written.kept.len() > 20 && !written.deleted.is_empty());
    assert!(tokio::spawn(async move { assert_nothing_lost(&databases, &written).await }).await.is_err());
    let wrong = try_pgbench("pgbench".as_ref(), "postgres://nobody@127.0.0.1:1/none", &["-n"]).await;
    assert!(wrong.is_err());
}
