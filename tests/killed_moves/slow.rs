//! A proxy that is slow for a moment is not taken for a frozen one; and whoever is sent away hears why.

use std::time::Duration;

use crossfade::cluster::processes::{Signal, signal};

use super::common::link::{Link, Trip, Way};
use super::common::pair::{APP, CONTROL, DATABASE};
use super::common::{Pair, Proxy, ProxyConfig, proof, until};
use super::{
    TIMEOUT, Writers, assert_none_lost, assert_one_authority, assert_told, connect, connect_and_hear, fleet, moves_to,
    told,
};

/// Freezes a proxy for a moment, while another moves.
async fn moves_without(frozen: &Proxy, moment: Duration, mover: &Proxy, phase: &str) {
    signal(Signal::Freeze, &[frozen.pid()]);
    let thawed = async {
        tokio::time::sleep(moment).await;
        signal(Signal::Continue, &[frozen.pid()]);
    };
    tokio::join!(thawed, moves_to(mover, phase));
    until("it follows", async || frozen.holds(phase).await).await;
}

#[tokio::test]
async fn a_proxy_that_is_slow_for_a_moment_loses_no_client() {
    let (databases, proxies) = fleet(1, TIMEOUT).await;
    let writers = Writers::start(&proxies.iter().collect::<Vec<_>>(), 4);
    writers.go_on().await;
    let idle = connect(&proxies[1].url_as(APP.0, APP.1, DATABASE)).await.expect("connects");
    idle.batch_execute("SELECT 1").await.expect("is known");
    // Phases that are held by the epoch's lock, and one that is held by nothing but the list of proxies.
    let phases: &[&str] =
        if proof() { &["new-primary", "dual-write", "old", "dual-write"] } else { &["new-primary", "dual-write"] };
    for &phase in phases {
        moves_without(&proxies[1], Duration::from_millis(2300), &proxies[0], phase).await;
        writers.go_on().await;
    }
    idle.batch_execute("SELECT 1").await.expect("is still there");
    let (acknowledged, errors) = writers.end().await;
    assert_eq!(errors, Vec::<String>::new(), "clients have only waited");
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &acknowledged).await;
}

/// One that is frozen for long loses the transactions that it was in the middle of, and in a phase without a mirror its sessions: each client is told.
#[tokio::test]
async fn a_proxy_that_was_frozen_for_long_has_written_nothing_and_its_clients_are_told() {
    let long = Duration::from_secs(if proof() { 30 } else { 10 });
    let (databases, proxies) = fleet(1, TIMEOUT).await;
    let writers = Writers::start(&proxies.iter().collect::<Vec<_>>(), 3);
    writers.go_on().await;
    let url = proxies[1].url_as(APP.0, APP.1, DATABASE);
    let (inside, ended) = connect_and_hear(&url).await.expect("connects");
    inside.batch_execute("BEGIN; INSERT INTO notes (id) VALUES (-1)").await.expect("begins");
    // Until the move is made, however long that takes: once it is awake, the transaction that stays open would stand in its way.
    signal(Signal::Freeze, &[proxies[1].pid()]);
    tokio::join!(tokio::time::sleep(long), moves_to(&proxies[0], "new-primary"));
    signal(Signal::Continue, &[proxies[1].pid()]);
    until("it follows", async || proxies[1].holds("new-primary").await).await;
    let error = inside.batch_execute("COMMIT").await.expect_err("its epoch is over");
    assert_told(&[told(error, ended).await]);
    writers.go_on().await;
    moves_to(&proxies[0], "dual-write").await;
    let (acknowledged, errors) = writers.end().await;
    assert_told(&errors);
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &acknowledged).await;
    let ghost = databases.old.run(DATABASE, "SELECT count(*) FROM notes WHERE id = -1").await.expect("reads");
    assert_eq!(ghost.trim(), "0", "it was rolled back");
}

/// The server says FATAL while it works for us, in a statement that the client knows nothing of.
#[tokio::test]
async fn a_session_that_is_ended_in_a_hidden_statement_is_told() {
    let pair = Pair::dual_write("CREATE TABLE notes (id int PRIMARY KEY)", "mirror: { timeout: 15s }").await;
    let (client, blocker) = (pair.client().await, pair.databases.old.client(DATABASE).await.expect("connects"));
    blocker.batch_execute("BEGIN; LOCK TABLE crossfade.ledger IN EXCLUSIVE MODE").await.expect("locks");
    let waiting = tokio::spawn(async move { client.batch_execute("INSERT INTO notes VALUES (1)").await });
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app' AND wait_event_type = 'Lock'";
    until("its debt waits for the ledger", async || {
        pair.databases.old.run(DATABASE, end).await.expect("asks").trim() == "1"
    })
    .await;
    let error = waiting.await.expect("joins").expect_err("it was ended");
    assert_eq!(error.code().map(|code| code.code()), Some("57P01"), "{error:?}");
}

/// A proxy that starves does not come to look at the phase row, and still moves its clients' transactions on: these are waited for, not ended.
#[tokio::test]
async fn a_proxy_whose_look_is_late_keeps_the_transactions_that_it_serves() {
    let (databases, proxies) = fleet(0, TIMEOUT).await;
    let link = Link::to(databases.old.port()).await;
    let old = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
    let more = format!("fleet: true\n{TIMEOUT}");
    let late = Proxy::start(ProxyConfig { old, ..databases.proxy_config("dual-write", &more) }).await;
    let client = connect(&late.url_as(APP.0, APP.1, DATABASE)).await.expect("connects");
    client.batch_execute("SELECT 1").await.expect("is known");
    let mut held = link.trip(Way::ToServer, b"FROM crossfade.announced", Trip::HoldBefore);
    until("its next look is held", async || held.try_recv().is_ok()).await;
    // By now it is silent.
    tokio::time::sleep(Duration::from_millis(3200)).await;
    client.batch_execute("BEGIN").await.expect("begins");
    let transaction = async {
        for id in 1..=6 {
            client.batch_execute(&format!("INSERT INTO notes (id) VALUES ({id})")).await.expect("is not ended");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        client.batch_execute("COMMIT").await.expect("commits in its epoch");
    };
    tokio::join!(transaction, moves_to(&proxies[0], "new-primary"));
    link.release();
    until("it follows", async || late.holds("new-primary").await).await;
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &[1, 2, 3, 4, 5, 6]).await;
}
