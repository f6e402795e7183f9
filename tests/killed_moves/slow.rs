//! A proxy that is slow for a moment is not taken for a frozen one; and whoever is sent away hears why.

use std::time::Duration;

use crossfade::cluster::processes::{Signal, signal};

use super::common::pair::DATABASE;
use super::common::{Pair, Proxy, proof, until};
use super::{
    TIMEOUT, Writers, assert_none_lost, assert_one_authority, assert_told, connect, connect_and_hear, fleet, moves_to,
    told,
};

/// Freezes a proxy for so long, while another moves.
async fn moves_without(frozen: &Proxy, long: Duration, mover: &Proxy, phase: &str) {
    signal(Signal::Freeze, &[frozen.pid()]);
    let thawed = async {
        tokio::time::sleep(long).await;
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
    let idle = connect(&proxies[1].url_as("app", "app-secret", DATABASE)).await.expect("connects");
    idle.batch_execute("SELECT 1").await.expect("is known");
    // Phases that are held by the epoch's lock, and one that is held by nothing but the list of proxies.
    for phase in ["new-primary", "dual-write", "old", "dual-write"] {
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
    let writers = Writers::start(&proxies.iter().collect::<Vec<_>>(), 8);
    writers.go_on().await;
    let url = proxies[1].url_as("app", "app-secret", DATABASE);
    let (inside, ended) = connect_and_hear(&url).await.expect("connects");
    inside.batch_execute("BEGIN; INSERT INTO notes (id) VALUES (-1)").await.expect("begins");
    moves_without(&proxies[1], long, &proxies[0], "new-primary").await;
    let error = inside.batch_execute("COMMIT").await.expect_err("its epoch is over");
    assert_told(&[told(error, ended).await]);
    writers.go_on().await;
    moves_to(&proxies[0], "dual-write").await;
    let (acknowledged, errors) = writers.end().await;
    assert_told(&errors);
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &acknowledged).await;
    let ghost = databases.old.psql(DATABASE, "SELECT count(*) FROM notes WHERE id = -1").await.expect("reads");
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
        pair.databases.old.psql(DATABASE, end).await.expect("asks").trim() == "1"
    })
    .await;
    let error = waiting.await.expect("joins").expect_err("it was ended");
    assert_eq!(error.code().map(|code| code.code()), Some("57P01"), "{error:?}");
}
