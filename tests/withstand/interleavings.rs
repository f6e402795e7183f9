//! Interleavings through the running proxy: messages held on their way to the mirror stand for a mirror that is late. What only reconcile decides is
//! forced in tests/migrate.rs, by hand and statement by statement.

use std::time::Duration;

use crossfade::cluster::processes::{self, Signal};

use crate::common::link::{Trip, Way};
use crate::common::until;
use crate::{SCHEMA, Stage};

/// So long something that must wait is watched.
const WATCHED: Duration = Duration::from_millis(400);

/// Interleaving 1: T1's insert is committed on the authority and not yet on the mirror; T2's delete goes there, finds nothing, and must not be
/// done with that (W7).
#[tokio::test]
async fn i01_a_delete_waits_for_the_insert_that_it_cannot_see() {
    let stage = Stage::start(SCHEMA, "mirror: { timeout: 30s }").await;
    let (t1, t2) = (stage.pair.client().await, stage.pair.client().await);
    for id in 0..3 {
        let marker = format!("insert-{id}-end");
        let held = stage.hold_mirror_commit(&marker);
        t1.execute("INSERT INTO notes VALUES ($1, $2)", &[&id, &marker]).await.expect("is acknowledged");
        held.await.expect("is held");
        let delete = async || t2.execute("DELETE FROM notes WHERE id = $1", &[&id]).await.expect("deletes");
        let mut delete = Box::pin(delete());
        let early = tokio::time::timeout(WATCHED, &mut delete).await;
        assert!(early.is_err(), "the delete was over while the insert was open on the mirror");
        stage.new.release();
        assert_eq!(delete.await, 1);
    }
    until("all debts are cleared", async || stage.debts().await == 0).await;
    assert_eq!(stage.pair.proxy.metrics("crossfade_mirror_failures_total").await, 0.0, "nothing was left to repair");
    assert_eq!(stage.pair.settle_and_assert_equal().await, 0);
}

/// Interleaving 2: the same, and the delete's time is over: its debt must stay for as long as the insert is open on the mirror (D2).
#[tokio::test]
async fn i02_the_debt_of_a_delete_stays_while_the_insert_is_under_way() {
    let stage = Stage::start(SCHEMA, "mirror: { timeout: 300ms }").await;
    let (t1, t2) = (stage.pair.client().await, stage.pair.client().await);
    let held = stage.hold_mirror_commit("the insert");
    t1.execute("INSERT INTO notes VALUES (1, 'the insert')", &[]).await.expect("is acknowledged");
    held.await.expect("is held");
    assert_eq!(t2.execute("DELETE FROM notes WHERE id = 1", &[]).await.expect("nobody hears of the mirror"), 1);
    until("repair is at it", async || stage.pair.proxy.metrics("crossfade_mirror_up").await == 1.0).await;
    assert_none_paid_under_a_carrier(&stage).await;
    stage.new.release();
    assert_eq!(stage.pair.settle_and_assert_equal().await, 0);
}

/// Both debts stay for as long as a transaction is open on the mirror; one whose COMMIT does not come for three seconds is ended.
async fn assert_none_paid_under_a_carrier(stage: &Stage) {
    let open =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'crossfade mirror' AND backend_xid IS NOT NULL";
    until("its COMMIT is taken for lost", async || {
        tokio::time::sleep(WATCHED / 4).await;
        let debts = stage.debts().await;
        let open = stage.on_new(open).await != "0";
        assert!(debts == 2 || !open, "a debt was paid under a transaction that is open on the mirror");
        !open
    })
    .await;
}

/// Backends of the proxy's sessions on new that carry images.
async fn carriers(stage: &Stage) -> Vec<u32> {
    let list = "SELECT coalesce(string_agg(pid::text, ' '), '') FROM pg_stat_activity WHERE application_name = 'crossfade mirror'";
    stage.on_new(list).await.split_whitespace().map(|pid| pid.parse().expect("a number")).collect()
}

/// Interleaving 4: the mirror's backends are frozen with images in flight; the proxy degrades; the key is written again, by others; the backends
/// wake up (C4).
#[tokio::test]
async fn i04_a_backend_that_wakes_up_late_brings_nothing_back() {
    let stage = Stage::start(SCHEMA, "mirror: { timeout: 1s }").await;
    let client = stage.pair.client().await;
    for round in 0..3 {
        let mut frozen = Vec::new();
        let before = "INSERT INTO notes VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET body = 'before'";
        until("its session on new is there and at rest", async || {
            client.batch_execute(before).await.expect("writes");
            until("what came before is cleared", async || stage.debts().await == 0).await;
            frozen = carriers(&stage).await;
            !frozen.is_empty() && stage.pair.proxy.metrics("crossfade_mirror_up").await == 1.0
        })
        .await;
        processes::signal(Signal::Freeze, &frozen);
        client.execute("UPDATE notes SET body = 'first' WHERE id = 1", &[]).await.expect("is acknowledged");
        assert!(stage.debts().await > 0, "round {round}: the frozen backend has answered");
        until("the mirror is believed in again", async || stage.pair.proxy.metrics("crossfade_mirror_up").await == 1.0)
            .await;
        client.execute("UPDATE notes SET body = 'second' WHERE id = 1", &[]).await.expect("is acknowledged");
        until("the second is there", async || stage.on_new("SELECT body FROM notes").await == "second").await;
        tokio::time::sleep(WATCHED * 3).await;
        assert!(stage.debts().await > 0, "paid while its backend may still be at work");
        processes::signal(Signal::Continue, &frozen);
        until("those backends are gone", async || carriers(&stage).await.iter().all(|pid| !frozen.contains(pid))).await;
        stage.pair.settle_and_assert_equal().await;
        assert_eq!(stage.on_new("SELECT body FROM notes").await, "second");
    }
}

/// Interleaving 4, with COMMIT in flight: what comes behind it is not paid before it has ended.
#[tokio::test]
async fn i04_a_commit_that_comes_late_is_under_what_was_written_since() {
    let stage = Stage::start(SCHEMA, "mirror: { timeout: 300ms }").await;
    let client = stage.pair.client().await;
    client.batch_execute("INSERT INTO notes VALUES (1, 'before')").await.expect("writes");
    until("what came before is cleared", async || stage.debts().await == 0).await;
    let held = stage.hold_mirror_commit("the first");
    client.execute("UPDATE notes SET body = 'the first' WHERE id = 1", &[]).await.expect("is acknowledged");
    held.await.expect("is held");
    client.execute("UPDATE notes SET body = 'the second' WHERE id = 1", &[]).await.expect("is acknowledged");
    assert_none_paid_under_a_carrier(&stage).await;
    stage.new.release();
    stage.pair.settle_and_assert_equal().await;
    assert_eq!(stage.on_new("SELECT body FROM notes").await, "the second");
}

/// Interleaving 17: the mirror fails after most of a large statement. Its images have gone ahead; its debts must not grow with it (C5).
#[tokio::test]
async fn i17_a_mirror_that_fails_late_in_a_large_statement_costs_one_debt() {
    let rows = if crate::common::proof() { 1_000_000 } else { 40_000 };
    let more = "mirror: { timeout: 2s }\nlimits: { mirror_buffer: 256KiB }";
    let stage = Stage::start(SCHEMA, more).await;
    let client = stage.pair.client().await;
    let insert = format!("INSERT INTO notes SELECT n, 'before ' || n FROM generate_series(1, {rows}) n");
    client.batch_execute(&insert).await.expect("inserts");
    until("all of it is cleared", async || stage.debts().await == 0).await;
    let late = format!("after {} end", rows * 9 / 10);
    let cut = stage.new.trip(Way::ToServer, late.as_bytes(), Trip::CutBefore);
    let update = "UPDATE notes SET body = 'after ' || id || ' end'";
    let done = client.execute(update, &[]).await.expect("the application does not hear of it");
    assert_eq!(done, rows);
    cut.await.expect("the mirror has failed");
    let bytes: u64 = stage
        .on_old("SELECT coalesce(sum(octet_length(debts)), 0) FROM crossfade.ledger")
        .await
        .parse()
        .expect("a number");
    assert!(bytes > 0, "it is owed");
    assert!(bytes < 300_000, "{bytes} bytes of debts");
    assert_eq!(stage.pair.settle_and_assert_equal().await, rows);
    assert!(stage.pair.proxy.peak_memory_bytes() < 200_000_000);
}
