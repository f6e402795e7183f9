//! Stories of a migration: load, outages and kills in `dual-write`, and what both databases hold at the end.

mod common;

use common::link::{Flow, Link};
use common::load::{Load, SCHEMA, assert_nothing_lost};
use common::pair::{APP, CONTROL, DATABASE};
use common::pgbench::{pgbench, try_pgbench};
use common::{Databases, Proxy, ProxyConfig, proof, until};
use crossfade::cluster::Stop;

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

#[tokio::test]
async fn tpcb_with_32_clients_leaves_both_sides_equal() {
    let databases = Databases::start(&[]).await;
    let program = databases.old.program("pgbench");
    for side in [&databases.old, &databases.new] {
        pgbench(&program, &side.url_as(APP.0, APP.1, DATABASE), &["-i", "-q", "-s", "4"]).await;
    }
    if !proof() {
        // Most of what would be copied and compared five times is never written.
        for side in [&databases.old, &databases.new] {
            side.run(DATABASE, "DELETE FROM pgbench_accounts WHERE aid > 100000").await.expect("makes it small");
        }
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
        databases.old.run("postgres", &script).await.expect("sets");
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
        databases.new.run(DATABASE, script).await.expect("adds");
    };
    let end = async |databases: &mut Databases| {
        let script = "ALTER TABLE notes DROP CONSTRAINT refuse";
        databases.new.run(DATABASE, script).await.expect("drops");
    };
    outage_of_new(&proxy, &mut databases, begin, end).await;
}

#[tokio::test]
async fn the_proxy_is_killed_under_load_and_nothing_acknowledged_is_lost() {
    let (mut proxy, databases) = dual_write(SCHEMA).await;
    let load = Load::start(&proxy.url_as(APP.0, APP.1, DATABASE), 8);
    for _ in 0..if proof() { 100 } else { 5 } {
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
