//! `crossfade backfill`, a process of its own beside the proxy: interleavings that are forced, and kills at each step.

mod backfill_support;
mod common;

use std::time::Duration;

use backfill_support::{Stage, signal};
use common::link::{Flow, Trip, Way};
use common::pair::DATABASE;
use common::until;

const T: &str = "CREATE TABLE t (k int PRIMARY KEY, v text)";
const TEN: &str = "INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 10) n";
/// What the backfill sends to new before it copies and to commit, and what it asks old when it looks again.
const COPY: &[u8] = b"COPY \"public\".\"t\"";
const COMMIT: &[u8] = b"SELECT 1; COMMIT\0";
const LOOK: &[u8] = b"FILTER (WHERE t.xmax";
/// ... when it asks whether those that held rows then have ended, and what it asks new about single keys.
const ENDED: &[u8] = b"SELECT pg_snapshot_xmin(pg_current_snapshot()) >";
const KEYS: &[u8] = b"SELECT q.i";

/// Interleaving 3: a client deletes a key of the chunk before it is copied, so that its delete finds nothing on new; the worker dies between its
/// COPY and its second look. The key is on new only, and whoever comes next looks at both sides' keys: once the next backfill, once the proxy's repair.
#[tokio::test(flavor = "multi_thread")]
async fn i03_a_worker_dies_between_its_copy_and_its_second_look() {
    for by_repair in [false, true] {
        let stage = Stage::new(T, TEN, 1).await;
        let client = stage.client().await;
        let copying = stage.mirror.trip(Way::ToServer, COPY, Trip::StallBefore);
        let looking = stage.authority.trip(Way::ToServer, LOOK, Trip::StallBefore);
        let first = stage.backfill(&[]);
        stage.let_begin(1).await;
        copying.await.expect("the chunk is read");
        client.batch_execute("DELETE FROM t WHERE k = 5").await.expect("deletes");
        stage.mirror.set(Way::ToServer, Flow::Pass);
        looking.await.expect("the chunk is committed");
        first.kill();
        assert_eq!(stage.on_new("SELECT count(*) FROM t WHERE k = 5").await, "1", "nobody but the range debt knows");
        stage.authority.set(Way::ToServer, Flow::Pass);
        if by_repair {
            stage.free_keys(1).await;
            until("the range is paid", async || stage.on_new("SELECT count(*) FROM t").await == "9").await;
        }
        assert_eq!(stage.finish().await, 9);
    }
}

/// Interleaving 5: the same delete; then the worker's COMMIT lies in the socket of a backend that is frozen, and the worker is killed. Neither side
/// shows the key: the successor must wait until that backend is gone.
#[tokio::test(flavor = "multi_thread")]
async fn i05_a_dead_workers_insert_does_not_land_behind_its_successor() {
    // The only row: no other one is under way on new with it, whose lock would hold up whoever reconciles the range.
    let stage = Stage::new(T, "INSERT INTO t VALUES (5, 'row 5')", 1).await;
    let client = stage.client().await;
    let copying = stage.mirror.trip(Way::ToServer, COPY, Trip::StallBefore);
    let first = stage.backfill(&[]);
    stage.let_begin(1).await;
    copying.await.expect("the chunk is read");
    client.batch_execute("DELETE FROM t WHERE k = 5").await.expect("deletes");
    let committing = stage.mirror.trip(Way::ToServer, COMMIT, Trip::StallBefore);
    stage.mirror.set(Way::ToServer, Flow::Pass);
    committing.await.expect("the chunk was copied");
    let frozen = stage.copying_backend().await;
    signal(frozen, "STOP");
    stage.mirror.set(Way::ToServer, Flow::Pass);
    tokio::time::sleep(Duration::from_millis(200)).await;
    first.kill();
    // Keys and ranges may be paid by the proxy as well: it waits, too.
    stage.free_keys(1).await;
    let mut second = stage.backfill(&[]);
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!second.has_ended() && stage.debts().await >= 2, "the chunk may still come");
    }
    signal(frozen, "CONT");
    let (status, said) = second.end().await;
    assert!(status.success() && said.contains("waits for"), "{said}");
    assert_eq!(stage.settle().await, 0);
}

/// A delete between reading and COPY: the second look finds that the key is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_deleted_between_reading_and_copy_does_not_come_back() {
    let stage = Stage::new(T, TEN, 1).await;
    let client = stage.client().await;
    let copying = stage.mirror.trip(Way::ToServer, COPY, Trip::StallBefore);
    let running = stage.backfill(&[]);
    stage.let_begin(1).await;
    copying.await.expect("the chunk is read");
    // One of them comes again with another value.
    let changes = "DELETE FROM t WHERE k IN (5, 7); INSERT INTO t VALUES (7, 'again')";
    client.batch_execute(changes).await.expect("changes");
    stage.mirror.set(Way::ToServer, Flow::Pass);
    let (status, said) = running.end().await;
    assert!(status.success(), "{said}");
    assert_eq!(stage.on_new("SELECT string_agg(v, ',' ORDER BY k) FROM t WHERE k IN (5, 7, 8)").await, "again,row 8");
    assert_eq!(stage.settle().await, 9);
}

/// An update between reading and COPY: the writer's row is on new before the copy, and stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_newer_row_is_not_overwritten() {
    let stage = Stage::new(T, TEN, 1).await;
    let client = stage.client().await;
    let copying = stage.mirror.trip(Way::ToServer, COPY, Trip::StallBefore);
    let looking = stage.authority.trip(Way::ToServer, LOOK, Trip::StallBefore);
    let running = stage.backfill(&[]);
    stage.let_begin(1).await;
    copying.await.expect("the chunk is read");
    // Again where new was slow for a moment, so that the update is owed: nobody pays it here.
    until("the update is mirrored", async || {
        client.batch_execute("UPDATE t SET v = 'newer' WHERE k = 3").await.expect("updates");
        stage.on_new("SELECT v FROM t").await == "newer"
    })
    .await;
    stage.mirror.set(Way::ToServer, Flow::Pass);
    looking.await.expect("the chunk is committed");
    assert_eq!(stage.on_new("SELECT v FROM t WHERE k = 3").await, "newer", "before anything was repaired");
    assert_eq!(stage.on_new("SELECT count(*) FROM t").await, "10");
    stage.authority.set(Way::ToServer, Flow::Pass);
    let (status, said) = running.end().await;
    assert!(status.success(), "{said}");
    assert_eq!(stage.settle().await, 10);
}

/// What new had before: rows that old lacks go, rows that differ are made equal, rows that are right stay as they are.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_new_had_before_are_made_right() {
    let before = "INSERT INTO t VALUES (3, 'older'), (4, 'row 4'), (-1, 'gone'), (99, 'gone')";
    let stage = Stage::with(T, TEN, before, 1).await;
    let kept = stage.on_new("SELECT xmin FROM t WHERE k = 4").await;
    let running = stage.backfill(&[]);
    stage.let_begin(1).await;
    let (status, said) = running.end().await;
    assert!(status.success(), "{said}");
    assert_eq!(stage.on_new("SELECT xmin FROM t WHERE k = 4").await, kept, "a row that is equal is not written");
    assert_eq!(stage.settle().await, 10);
}

/// A delete that is under way when the worker looks again, and is committed when it has gone on.
#[tokio::test(flavor = "multi_thread")]
async fn a_delete_under_way_at_the_second_look() {
    let stage = Stage::new(T, TEN, 1).await;
    let client = stage.client().await;
    let looking = stage.authority.trip(Way::ToServer, LOOK, Trip::StallBefore);
    let running = stage.backfill(&[]);
    stage.let_begin(1).await;
    looking.await.expect("the chunk is committed");
    client.batch_execute("BEGIN; DELETE FROM t WHERE k = 5").await.expect("deletes");
    stage.authority.set(Way::ToServer, Flow::Pass);
    let (status, said) = running.end().await;
    assert!(status.success(), "{said}");
    assert!(stage.debts().await >= 1, "a key that somebody holds is owed");
    client.batch_execute("COMMIT").await.expect("commits");
    assert_eq!(stage.settle().await, 9);
}

/// Rows that were locked, as foreign keys' checks do it, keep an xmax: they are not compared, since all that had touched them has ended. A delete that was under
/// way and is committed while it is waited for is seen.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_were_only_locked_are_not_compared() {
    for deleted in [false, true] {
        let stage = Stage::new(T, TEN, 1).await;
        stage.on_old("SELECT count(*) FROM (SELECT FROM t FOR KEY SHARE) AS locked").await;
        assert_eq!(stage.on_old("SELECT count(*) FROM t WHERE xmax <> 0").await, "10", "they keep an xmax");
        let client = stage.client().await;
        let looking = stage.authority.trip(Way::ToServer, LOOK, Trip::StallBefore);
        let running = stage.backfill(&[]);
        stage.let_begin(1).await;
        looking.await.expect("the chunk is committed");
        let mut comparing = stage.mirror.trip(Way::ToServer, KEYS, Trip::CutBefore);
        let waiting = stage.authority.trip(Way::ToServer, ENDED, Trip::StallBefore);
        if deleted {
            client.batch_execute("BEGIN; DELETE FROM t WHERE k = 5").await.expect("deletes");
        }
        stage.authority.set(Way::ToServer, Flow::Pass);
        waiting.await.expect("it asks whether they have ended");
        if deleted {
            client.batch_execute("COMMIT").await.expect("commits");
        }
        stage.authority.set(Way::ToServer, Flow::Pass);
        let (status, said) = running.end().await;
        assert!(status.success(), "{said}");
        assert!(comparing.try_recv().is_err(), "rows of new are read, to be compared");
        assert_eq!(stage.on_new("SELECT count(*) FROM t WHERE k = 5").await, if deleted { "0" } else { "1" });
        assert_eq!(stage.settle().await, if deleted { 9 } else { 10 });
    }
}

/// kill -9 at each step, while clients write what the chunk holds: the next run goes on, and does not copy again what is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_killed_at_each_step() {
    let steps: [(&str, &str, &[u8], Trip); 7] = [
        ("before the chunk is owed", "old", b"'backfill' WHERE EXISTS", Trip::StallBefore),
        ("when the chunk is owed", "old", b"work_key = pg_catalog.decode", Trip::CutAfter),
        ("before the chunk is copied", "new", COPY, Trip::StallBefore),
        ("before the chunk is committed", "new", COMMIT, Trip::StallBefore),
        ("when the chunk is committed", "new", COMMIT, Trip::CutAfter),
        ("before the second look", "old", LOOK, Trip::StallBefore),
        ("before the table's debt is cleared", "old", b"off; DELETE FROM crossfade.ledger", Trip::StallBefore),
    ];
    let rows = "INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 3000) n";
    let every = if common::proof() { 1 } else { 3 };
    for (step, side, pattern, trip) in steps.into_iter().step_by(every) {
        let stage = Stage::new(T, rows, 1).await;
        let client = stage.client().await;
        let running = stage.backfill(&["--jobs", "1"]);
        let line = if side == "old" { &stage.authority } else { &stage.mirror };
        let struck = line.trip(Way::ToServer, pattern, trip);
        stage.let_begin(1).await;
        struck.await.unwrap_or_else(|_| panic!("{step}"));
        running.kill();
        let changes = "DELETE FROM t WHERE k % 100 = 7; UPDATE t SET v = 'changed' WHERE k % 100 = 8;
            INSERT INTO t SELECT n, 'new' FROM generate_series(-50, -1) n";
        client.batch_execute(changes).await.unwrap_or_else(|error| panic!("{step}: {error}"));
        line.set_both(Flow::Pass);
        let untouched = "SELECT count(*), coalesce(sum(hashtext(k || ':' || xmin::text)), 0) FROM t WHERE k % 100 NOT IN (7, 8) AND k > 0 AND xmin::text::bigint < ";
        until("sessions of the killed one are gone", async || {
            stage.on_new("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'crossfade backfill'").await
                == "0"
        })
        .await;
        let now = stage.on_new("SELECT pg_snapshot_xmax(pg_current_snapshot())").await;
        let there = stage.on_new(&format!("{untouched}{now}")).await;
        assert_eq!(stage.finish().await, 3000 - 30 + 50, "{step}");
        assert_eq!(stage.on_new(&format!("{untouched}{now}")).await, there, "{step}: rows were written again");
    }
}

/// What a worker sent to the authority is carried out when it is long dead, and another has cut the table anew: a step that keeps a position, and the
/// beginning itself. Both are about another cut, whose parts have other keys.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_worker_has_sent_does_not_touch_another_cut() {
    for late in ["UPDATE crossfade.backfill SET position", "DELETE FROM crossfade.backfill b WHERE"] {
        let schema = "CREATE TABLE t (k int PRIMARY KEY, v char(200))";
        let mut stage = Stage::new(schema, "INSERT INTO t SELECT n, 'row' FROM generate_series(1, 20000) n", 1).await;
        let held = stage.authority.trip(Way::ToServer, late.as_bytes(), Trip::HoldBefore);
        let first = stage.backfill(&["--jobs", "1"]);
        stage.asks(1).await;
        stage.free_all().await;
        held.await.expect("it is sent");
        first.kill();
        let sessions = "SELECT string_agg(pid::text, ',') FROM pg_stat_activity WHERE application_name = 'crossfade backfill' AND backend_type = 'client backend'";
        until("one session is left", async || !stage.on_old(sessions).await.contains(',')).await;
        let dead = stage.on_old(sessions).await;
        assert!(!dead.is_empty(), "the line holds it");
        stage.proxy.set_phase("old").await;
        let client = stage.client().await;
        let more = "INSERT INTO t SELECT -n, 'more' FROM generate_series(1, 40000) n; DELETE FROM t WHERE k > 10000";
        client.batch_execute(more).await.expect("writes, unmirrored");
        stage.keep_table(1).await;
        stage.proxy.set_phase("dual-write").await;
        let parts = stage.keep_parts(1).await;
        let second = stage.backfill_straight();
        stage.asks(1).await;
        stage.free_all().await;
        let cut = "SELECT string_agg(format('%s %s %s %s %s %s', part, debts, after_key, upto_key, position, done), ';' ORDER BY part) FROM crossfade.backfill \
            WHERE debts <@ (SELECT array_agg(id) FROM crossfade.ledger)";
        until("it has cut the table", async || !stage.on_old(cut).await.is_empty()).await;
        let before = stage.on_old(cut).await;
        assert!(before.contains(';'), "{before}");
        stage.authority.release();
        let gone = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {dead}");
        until("the dead worker's session is gone", async || stage.on_old(&gone).await == "0").await;
        assert_eq!(stage.on_old(cut).await, before, "{late}");
        drop(parts);
        let (status, said) = second.end().await;
        assert!(status.success(), "{said}");
        assert_eq!(stage.settle().await, 50_000);
    }
}

/// Somebody has the table locked on new: the backfill waits, says so, and neither loses its line to new nor fills the ledger with keys.
#[tokio::test(flavor = "multi_thread")]
async fn a_locked_table_is_waited_for() {
    let stage = Stage::new(T, TEN, 1).await;
    let locker = stage.databases.new.client(DATABASE).await.expect("connects");
    locker.batch_execute("BEGIN; LOCK TABLE t IN SHARE MODE").await.expect("locks");
    let mut running = stage.backfill(&[]);
    stage.let_begin(1).await;
    until("the chunk is in work", async || stage.on_old("SELECT count(work) FROM crossfade.backfill").await == "1")
        .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!running.has_ended());
    assert_eq!(stage.on_old("SELECT count(*) FROM crossfade.ledger WHERE reason = 'backfill'").await, "1", "its range");
    locker.batch_execute("COMMIT").await.expect("unlocks");
    let (status, said) = running.end().await;
    assert!(status.success() && said.contains("has it locked") && !said.contains("trying again"), "{said}");
    assert_eq!(stage.debts().await, 0);
    assert_eq!(stage.settle().await, 10);
}

/// Of the debts that a backfill is to pay, one was another's: a transaction owed the table until it had seen that it need not. What was begun goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_debt_that_goes_away_ends_no_backfill() {
    let rows = "INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 3000) n";
    let stage = Stage::new(T, rows, 1).await;
    let taint = "INSERT INTO crossfade.ledger (id, debts, reason) SELECT id + 1, debts, 'another' FROM crossfade.ledger RETURNING id";
    let taint = stage.on_old(taint).await;
    let copying = stage.mirror.trip(Way::ToServer, COPY, Trip::StallBefore);
    let first = stage.backfill(&[]);
    stage.let_begin(1).await;
    copying.await.expect("the chunk is read");
    let debts = "SELECT cardinality(debts) FROM crossfade.backfill";
    assert_eq!(stage.on_old(debts).await, "2");
    stage.on_old(&format!("DELETE FROM crossfade.ledger WHERE id = {taint}")).await;
    stage.mirror.set(Way::ToServer, Flow::Pass);
    let (status, said) = first.end().await;
    assert!(status.success() && said.contains("done"), "{said}");
    assert_eq!(stage.on_old("SELECT count(*) FROM crossfade.ledger").await, "0", "the other one is paid");
    assert_eq!(stage.on_old(debts).await, "2", "the table was not cut anew");
    assert_eq!(stage.settle().await, 3000);
}

/// A trigger of new's that fires in every session leaves a row out and says nothing: it is owed, and the ledger says why. The first wait for the table ends by
/// its time-out.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_a_trigger_leaves_out_is_owed() {
    let new = "CREATE FUNCTION pass() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN IF NEW.k = 5 THEN RETURN NULL; END IF; RETURN NEW; END';
        CREATE TRIGGER pass BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION pass(); ALTER TABLE t ENABLE ALWAYS TRIGGER pass";
    let stage = Stage::with(T, TEN, new, 1).await;
    let running = stage.backfill(&[]);
    stage.asks(1).await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    stage.let_begin(1).await;
    let (_, said) = running.end().await;
    let owed = "SELECT count(*) FROM crossfade.ledger WHERE error LIKE '%took 0 of 1 rows%'";
    assert_eq!(stage.on_old(owed).await, "1", "{said}");
    assert_eq!(stage.on_new("SELECT count(*) FROM t").await, "9");
    stage.on_new("ALTER TABLE t DISABLE TRIGGER pass").await;
    assert_eq!(stage.settle().await, 10);
}

/// A time-out fires when the rows of a COPY are in, and is noticed behind its end: the driver has its answer by then, and the server answers ROLLBACK to
/// COMMIT. An index of new's whose value takes long, with no place in it where a backend looks for interrupts, makes that certain.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_fails_behind_its_end_is_not_taken_for_done() {
    let new = "CREATE INDEX ON t ((length(power(3::numeric, 100000 + k)::text)));
        ALTER SYSTEM SET deadlock_timeout = '80ms'; SELECT pg_reload_conf()";
    let stage = Stage::with(T, "INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 20) n", new, 1).await;
    let running = stage.backfill(&[]);
    stage.let_begin(1).await;
    let (status, said) = running.end().await;
    assert!(status.success(), "{said}");
    assert_eq!(stage.on_new("SELECT count(*) FROM t").await, "20", "before anything was repaired");
    let log = std::fs::read_to_string(stage.databases.new.log()).expect("reads");
    assert!(log.contains("canceling statement due to statement timeout"), "it was not forced");
    assert_eq!(stage.settle().await, 20);
}
