//! Reconcile and repair on two real servers; two or three sessions play the proxy's part by hand.

mod migrate_support;

use std::time::Duration;

use bytes::Bytes;
use crossfade::ledger::debts::Debt;
use crossfade::migrate::repair;
use crossfade::migrate::{self, reconcile};
use crossfade::phase::Side;
use migrate_support::*;

const T: &str = "CREATE TABLE t (k int PRIMARY KEY, u text UNIQUE, v int)";

#[tokio::test(flavor = "multi_thread")]
async fn keys_become_equal_whether_missing_stale_extra_or_equal() {
    let world = World::new(T).await;
    world.on_old("INSERT INTO t VALUES (1, 'a', 1), (2, 'b', 2), (3, 'c', 3)").await;
    world.on_new("INSERT INTO t VALUES (2, 'b', 2), (3, 'c', 99), (4, 'd', 4), (9, 'x', 9)").await;
    let table = world.table("t").await;
    let mut pair = world.pair().await;
    let keys = (1..=5).map(|k: i32| vec![Some(Bytes::copy_from_slice(&k.to_be_bytes()))]).collect();
    let before: String =
        world.client(Side::New).await.query_one("SELECT xmin::text FROM t WHERE k = 2", &[]).await.unwrap().get(0);
    let outcome = reconcile::keys(&mut pair, &table, keys).await.expect("reconciles");
    assert_eq!((outcome.written, outcome.removed), (2, 1));
    assert!(outcome.locked.is_empty() && outcome.refused.is_empty());
    let other =
        reconcile::keys(&mut pair, &table, vec![vec![None, None], vec![]]).await.expect("is no failure of a server");
    assert_eq!(other.refused.len(), 2, "keys of another definition");
    let after: String =
        world.client(Side::New).await.query_one("SELECT xmin::text FROM t WHERE k = 2", &[]).await.unwrap().get(0);
    assert_eq!(before, after, "a row that is equal is not written again");
    assert_eq!(
        world.rows(Side::New, "t").await,
        ["(1,a,1)", "(2,b,2)", "(3,c,3)", "(9,x,9)"],
        "only the keys that were asked"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn owed_debts_are_paid_and_exactly_those_rows_cleared() {
    let world = World::new(T).await;
    world.on_old("INSERT INTO t SELECT n, 'u' || n, n FROM generate_series(1, 50) n").await;
    let table = world.table("t").await;
    for k in 1..=50 {
        world.owe(&[key(&table, k), key(&table, k / 2 + 1)]).await;
    }
    let mut repair = world.repair().await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.repaired_rows, summary.owed, summary.in_flight), (50, 50, 0, 0));
    world.assert_equal("t").await;
    assert_eq!(world.debts_left().await, 0);
}

/// Interleaving 1: the delete of T2 is mirrored by W7's second step; here T2's proxy is given up instead, and T1's COMMIT on the mirror comes last.
#[tokio::test(flavor = "multi_thread")]
async fn i01_a_delete_is_not_undone_by_the_late_commit_of_the_insert() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    for _ in 0..5 {
        let (t1, m1) = (world.old().await, world.new_replica().await);
        // T1: images executed, then committed on the authority with its debt; the mirror's COMMIT is late.
        exec(&t1, "BEGIN; INSERT INTO t VALUES (1, 'a', 1)").await;
        exec(&m1, "BEGIN; INSERT INTO t VALUES (1, 'a', 1)").await;
        owe(&t1, Some(&carrier(&m1).await), &[key(&table, 1)]).await;
        exec(&t1, "COMMIT").await;
        // T2: deletes on the authority, degraded.
        let t2 = world.old().await;
        exec(&t2, "BEGIN; DELETE FROM t WHERE k = 1").await;
        owe(&t2, None, &[key(&table, 1)]).await;
        exec(&t2, "COMMIT").await;
        let mut repair = world.repair().await;
        let paying = tokio::spawn(async move {
            let summary = repair.pass().await.expect("passes");
            (repair, summary)
        });
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(world.debts_left().await, 2, "nothing is cleared while the insert is open on the mirror");
        exec(&m1, "COMMIT").await;
        let (mut repair, summary) = paying.await.expect("ends");
        assert_eq!(summary.repaired_rows, 1, "the row was there once T1's transaction had ended");
        repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
        world.assert_equal("t").await;
        assert_eq!(world.debts_left().await, 0);
    }
}

/// Interleaving 2: the same where the insert's transaction is still open on the mirror when patience ends: the debt must stay.
#[tokio::test(flavor = "multi_thread")]
async fn i02_the_debt_of_a_delete_stays_while_the_insert_is_open_on_the_mirror() {
    for prepared in [false, true] {
        let world = World::new(T).await;
        let table = world.table("t").await;
        let m1 = world.new_replica().await;
        exec(&m1, "BEGIN; INSERT INTO t VALUES (1, 'a', 1)").await;
        if prepared {
            exec(&m1, &format!("PREPARE TRANSACTION '{}'", world.database)).await;
        }
        world.owe(&[key(&table, 1)]).await;
        let settings = migrate::Settings { settle: Duration::from_millis(200), rounds: 1, ..Default::default() };
        let mut repair = migrate::repair::Repair::new(world.pair_with(settings).await, world.catalog().await);
        let summary = repair.pass().await.expect("passes");
        assert_eq!((summary.cleared, summary.owed), (0, 1));
        exec(&m1, &if prepared { format!("COMMIT PREPARED '{}'", world.database) } else { "COMMIT".to_owned() }).await;
        repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
        assert_eq!(world.rows(Side::New, "t").await, [""; 0]);
    }
}

/// The same for a whole-table debt: the walk over the mirror must wait for inserts that it cannot see.
#[tokio::test(flavor = "multi_thread")]
async fn i02_a_whole_table_debt_waits_for_inserts_that_it_cannot_see() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    let m1 = world.new_replica().await;
    exec(&m1, "BEGIN; INSERT INTO t VALUES (1, 'a', 1)").await;
    world.owe(&[Debt::Taint { table: table.number }]).await;
    let mut repair = world.repair().await;
    let paying = tokio::spawn(async move { repair.pass().await.expect("passes") });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(world.debts_left().await, 1);
    exec(&m1, "COMMIT").await;
    let summary = paying.await.expect("ends");
    assert_eq!((summary.cleared, summary.repaired_rows), (1, 1));
    assert_eq!(world.rows(Side::New, "t").await, [""; 0]);
}

/// A, B, A: the mirror shows by chance what the authority has, under a change that is still to be committed there.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_looks_equal_under_an_open_change_is_not_believed() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.both("INSERT INTO t VALUES (1, 'a', 1)").await;
    let m1 = world.new_replica().await;
    // T1 wrote 2 (committed on the authority, not yet on the mirror), T2 wrote 1 again, degraded.
    exec(&m1, "BEGIN; UPDATE t SET v = 2 WHERE k = 1").await;
    world.owe(&[key(&table, 1)]).await;
    let mut repair = world.repair().await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!(
        (summary.cleared, summary.owed),
        (0, 1),
        "the row's lock on the mirror says that something is under way"
    );
    exec(&m1, "COMMIT").await;
    let summary = repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    assert_eq!((summary.cleared, summary.repaired_rows), (1, 1));
    world.assert_equal("t").await;
}

/// Interleaving 8: while reconcile works on a key, another transaction enters the same key. Only what was read is cleared.
#[tokio::test(flavor = "multi_thread")]
async fn i08_a_debt_that_is_entered_meanwhile_is_not_cleared() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.on_old("INSERT INTO t VALUES (1, 'a', 1)").await;
    // T2, degraded, has its ledger id already, a lower one, and will commit it late.
    let t2 = world.old().await;
    exec(&t2, "BEGIN").await;
    let second = owe(&t2, None, &[key(&table, 1)]).await;
    let first = world.owe(&[key(&table, 1)]).await;
    assert!(second < first);
    // Reconcile is held in the middle of its work: it waits for this insert, having read the ledger.
    let m1 = world.new_replica().await;
    exec(&m1, "BEGIN; INSERT INTO t VALUES (1, 'stale', 0)").await;
    let mut repair = world.repair().await;
    let paying = tokio::spawn(async move {
        let summary = repair.pass().await.expect("passes");
        (repair, summary)
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    // This waits for reconcile's row lock, or reconcile skips the row.
    exec(&t2, "UPDATE t SET v = 2 WHERE k = 1; COMMIT").await;
    exec(&m1, "ROLLBACK").await;
    let (mut repair, _) = paying.await.expect("ends");
    let left: Vec<i64> = world
        .old()
        .await
        .query("SELECT id FROM crossfade.ledger", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(left, [second], "it was not there when the ledger was read");
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    world.assert_equal("t").await;
}

/// Interleaving 12: unique values that changed places, as debts of their own.
#[tokio::test(flavor = "multi_thread")]
async fn i12_unique_values_that_changed_places_are_repaired() {
    let world = World::new(
        "CREATE TABLE t (k int PRIMARY KEY, u text UNIQUE, v int); CREATE TABLE d (k int PRIMARY KEY DEFERRABLE INITIALLY IMMEDIATE, u int UNIQUE DEFERRABLE);
         CREATE TABLE e (k int PRIMARY KEY, u text, live bool); CREATE UNIQUE INDEX ON e (lower(u)) WHERE live",
    )
    .await;
    let (t, d, e) = (world.table("t").await, world.table("d").await, world.table("e").await);
    world.both("INSERT INTO t VALUES (1, 'a', 1), (2, 'b', 2), (3, 'c', 3), (4, 'd', 4); INSERT INTO d VALUES (1, 10), (2, 20); INSERT INTO e VALUES (1, 'A', true), (2, 'B', true)").await;
    world.on_old("UPDATE t SET u = u || 'x'; UPDATE t SET u = CASE k WHEN 1 THEN 'b' WHEN 2 THEN 'c' WHEN 3 THEN 'a' ELSE 'd' END").await;
    world.on_old("BEGIN; SET CONSTRAINTS ALL DEFERRED; UPDATE d SET u = 30 - u; UPDATE d SET k = 3 - k; COMMIT").await;
    world.on_old("UPDATE e SET live = false; UPDATE e SET u = CASE k WHEN 1 THEN 'b' ELSE 'a' END, live = true").await;
    // One debt alone: the rows that stand in its way join.
    world.owe(&[key(&t, 1)]).await;
    world.owe(&[key(&d, 1)]).await;
    world.owe(&[key(&d, 2)]).await;
    world.owe(&[key(&e, 2)]).await;
    let mut repair = world.repair().await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.refused.as_slice()), (4, &[][..]));
    for table in ["t", "d", "e"] {
        world.assert_equal(table).await;
    }
}

/// The same for values that exclude each other without being equal, and for NULLs that are (PostgreSQL 15): the row in the way joins, though nothing is owed of it.
#[tokio::test(flavor = "multi_thread")]
async fn i12_values_that_exclude_each_other_are_repaired() {
    let world = World::new("CREATE TABLE x (k int PRIMARY KEY, r int4range, EXCLUDE USING gist (r WITH &&))").await;
    let x = world.table("x").await;
    world.both("INSERT INTO x VALUES (1, '[1,5)'), (2, '[5,9)')").await;
    world.on_old("UPDATE x SET r = '[90,91)' WHERE k = 1; UPDATE x SET r = '[2,4)' WHERE k = 2; UPDATE x SET r = '[6,8)' WHERE k = 1").await;
    world.owe(&[key(&x, 1)]).await;
    let summary = world.repair().await.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.refused.as_slice()), (1, &[][..]));
    world.assert_equal("x").await;

    let version = "SELECT current_setting('server_version_num')::int";
    if world.old().await.query_one(version, &[]).await.expect("tells").get::<_, i32>(0) < 150_000 {
        return;
    }
    let world = World::new("CREATE TABLE n (k int PRIMARY KEY, u int UNIQUE NULLS NOT DISTINCT)").await;
    let n = world.table("n").await;
    world.both("INSERT INTO n VALUES (1, NULL), (2, 5)").await;
    world
        .on_old("UPDATE n SET u = 7 WHERE k = 1; UPDATE n SET u = NULL WHERE k = 2; UPDATE n SET u = 5 WHERE k = 1")
        .await;
    world.owe(&[key(&n, 2)]).await;
    let summary = world.repair().await.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.refused.as_slice()), (1, &[][..]));
    world.assert_equal("n").await;
}

/// A unique value whose holder is gone on the authority: it goes first.
#[tokio::test(flavor = "multi_thread")]
async fn a_unique_value_whose_holder_is_gone_is_freed() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.both("INSERT INTO t VALUES (1, 'a', 1)").await;
    world.on_old("DELETE FROM t; INSERT INTO t VALUES (2, 'a', 2)").await;
    world.owe(&[key(&table, 2)]).await;
    let summary = world.repair().await.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.repaired_rows), (1, 2));
    world.assert_equal("t").await;
}

/// Interleaving 16: reconcile and an application take the same rows in opposite order. The application never fails.
#[tokio::test(flavor = "multi_thread")]
async fn i16_the_application_is_never_the_victim() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.both("INSERT INTO t SELECT n, 'u' || n, 0 FROM generate_series(1, 20) n").await;
    let mut sessions = Vec::new();
    for session in 0..4 {
        let (authority, mirror, table) = (world.old().await, world.new_replica().await, table.clone());
        sessions.push(tokio::spawn(async move {
            for round in 0..25 {
                let (a, b) = if session % 2 == 0 { (20, 1) } else { (20 - round % 10, 2 + round % 3) };
                // One application row order for the authority; the mirror's part runs as the proxy's would.
                exec(&authority, &format!("BEGIN; UPDATE t SET v = v + 1 WHERE k = {a}")).await;
                tokio::time::sleep(Duration::from_millis(2)).await;
                exec(&authority, &format!("UPDATE t SET v = v + 1 WHERE k = {b}")).await;
                owe(&authority, None, &[key(&table, a), key(&table, b)]).await;
                exec(&mirror, "BEGIN").await;
                for k in [a, b] {
                    let v: i32 =
                        authority.query_one("SELECT v FROM t WHERE k = $1", &[&k]).await.expect("reads").get(0);
                    exec(&mirror, &format!("UPDATE t SET v = {v} WHERE k = {k}")).await;
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                exec(&authority, "COMMIT").await;
                exec(&mirror, "COMMIT").await;
            }
        }));
    }
    let mut repair = world.repair().await;
    while sessions.iter().any(|session| !session.is_finished()) {
        repair.pass().await.expect("passes");
    }
    for session in sessions {
        session.await.expect("no statement of the application failed");
    }
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    world.assert_equal("t").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn locked_keys_are_skipped_and_tried_again() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.on_old("INSERT INTO t VALUES (1, 'a', 1), (2, 'b', 2)").await;
    let application = world.old().await;
    exec(&application, "BEGIN; UPDATE t SET v = 7 WHERE k = 1").await;
    world.owe(&[key(&table, 1)]).await;
    world.owe(&[key(&table, 2)]).await;
    let mut repair = world.repair().await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.owed), (1, 1));
    assert_eq!(world.rows(Side::New, "t").await, ["(2,b,2)"], "a row is never written without its lock");
    exec(&application, "COMMIT").await;
    assert_eq!(repair.pass().await.expect("passes").cleared, 1);
    world.assert_equal("t").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_the_mirror_refuses_is_kept_and_blocks_no_other() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.on_new("ALTER TABLE t ADD CHECK (v < 100)").await;
    world.on_old("INSERT INTO t SELECT n, 'u' || n, n FROM generate_series(1, 200) n WHERE n <> 150").await;
    world.on_old("UPDATE t SET v = 1 WHERE v >= 100; UPDATE t SET v = 100 WHERE k = 77").await;
    let refused = world.owe(&[key(&table, 77)]).await;
    world.owe(&[key(&table, 78), key(&table, 10)]).await;
    world.owe(&[Debt::Table { table: table.number }]).await;
    let mut repair = world.repair().await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.owed, summary.repaired_rows), (1, 2, 198));
    assert_eq!(summary.refused.len(), 1);
    let error: String = world
        .old()
        .await
        .query_one("SELECT error FROM crossfade.ledger WHERE id = $1", &[&refused])
        .await
        .unwrap()
        .get(0);
    assert!(error.contains("check constraint") && !error.contains("77"), "{error}");
    let told = repair::wait(&mut repair, Duration::from_millis(100)).await.expect_err("it cannot");
    assert!(told.to_string().contains("check constraint"), "{told}");
    world.on_new("ALTER TABLE t DROP CONSTRAINT t_v_check").await;
    // Nothing is paid by definitions of before.
    let mut repair = world.repair().await;
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    world.assert_equal("t").await;
}

/// One ledger row that cannot be read, and one table of which the mirror fails, keep nobody else from being paid; the ledger says why they stay.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_paid_blocks_no_other_table() {
    let broken = "CREATE FUNCTION fail(int) RETURNS bool LANGUAGE plpgsql AS
        'BEGIN RAISE EXCEPTION ''the index is broken'' USING ERRCODE = ''XX002''; END'";
    let world = World::new("CREATE TABLE a (k int PRIMARY KEY); CREATE TABLE b (k int PRIMARY KEY)").await;
    world.on_new(&format!("{broken}; ALTER TABLE a ADD CHECK (fail(k))")).await;
    world.on_old("INSERT INTO a VALUES (1); INSERT INTO b VALUES (1)").await;
    let (a, b) = (world.table("a").await, world.table("b").await);
    let unreadable =
        "INSERT INTO crossfade.ledger (id, debts) VALUES (nextval('crossfade.ledger_id'), '\\xff') RETURNING id";
    let unreadable: i64 = world.old().await.query_one(unreadable, &[]).await.expect("enters").get(0);
    for table in [&a, &b] {
        world.owe(&[key(table, 1)]).await;
        world.owe(&[Debt::Table { table: table.number }]).await;
    }
    let mut repair = world.repair().await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.owed), (2, 3), "{summary:?}");
    world.assert_equal("b").await;
    let errors = "SELECT coalesce(error, '') FROM crossfade.ledger ORDER BY id = $1 DESC, id";
    let errors: Vec<String> =
        world.old().await.query(errors, &[&unreadable]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert!(errors[0].contains("cannot be read") && errors[1].contains("the index is broken"), "{errors:?}");
    assert!(errors[2].contains("the index is broken"), "{errors:?}");
    // Not tried again at once.
    assert_eq!(repair.pass().await.expect("passes").refused.len(), 0, "refused debts are left alone for a while");
    world.on_new("ALTER TABLE a DROP CONSTRAINT a_k_check").await;
    world.on_old(&format!("DELETE FROM crossfade.ledger WHERE id = {unreadable}")).await;
    let mut repair = world.repair().await;
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    world.assert_equal("a").await;
}

/// Repairers of several proxies at once: each debt is paid, nobody fails, nothing is owed for ever.
#[tokio::test(flavor = "multi_thread")]
async fn several_repairers_do_not_disturb_each_other() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.on_old("INSERT INTO t SELECT n, 'u' || n, n FROM generate_series(1, 3000) n").await;
    for k in 1..=60 {
        world.owe(&[key(&table, k * 50), key(&table, k)]).await;
    }
    world
        .owe(&[Debt::Range {
            table: table.number,
            after: Some(vec![Some(Bytes::from_static(&[0, 0, 2, 0]))]),
            upto: None,
        }])
        .await;
    world.owe(&[Debt::Taint { table: table.number }]).await;
    let mut workers = Vec::new();
    for _ in 0..3 {
        let mut repair = world.repair().await;
        workers.push(tokio::spawn(async move { repair::wait(&mut repair, Duration::from_secs(60)).await }));
    }
    for worker in workers {
        worker.await.expect("ends").expect("drains");
    }
    assert_eq!(world.debts_left().await, 0);
    world.assert_equal("t").await;
}

/// Keys are paid while another job has the table as a whole, and a walk makes room for a job that asks for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_job_on_a_table_does_not_hold_up_its_keys() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.on_old("INSERT INTO t SELECT n, 'u' || n, n FROM generate_series(1, 10) n").await;
    let other = world.client(Side::New).await;
    exec(&other, &format!("SELECT pg_advisory_lock({}, {})", 0x4346_5442, table.number)).await;
    world.owe(&[key(&table, 5)]).await;
    let whole = world.owe(&[Debt::Table { table: table.number }]).await;
    let summary = world.repair().await.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.owed, summary.repaired_rows), (1, 1, 1));
    let left: i64 = world.old().await.query_one("SELECT id FROM crossfade.ledger", &[]).await.unwrap().get(0);
    assert_eq!(left, whole);
}

/// C2, C4: what the carrier's state means.
#[tokio::test(flavor = "multi_thread")]
async fn debts_in_flight_are_left_alone_and_carried_ones_cleared_without_repair() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    let (t1, m1) = (world.old().await, world.new_replica().await);
    exec(&t1, "BEGIN; INSERT INTO t VALUES (1, 'a', 1)").await;
    exec(&m1, "BEGIN; INSERT INTO t VALUES (1, 'a', 1)").await;
    owe(&t1, Some(&carrier(&m1).await), &[key(&table, 1)]).await;
    exec(&t1, "COMMIT").await;
    let mut repair = world.repair().await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.in_flight, summary.owed), (0, 1, 0));
    let counts = migrate::debt::counts(Side::Old, &world.old().await, Some(&world.client(Side::New).await))
        .await
        .expect("counts");
    assert_eq!((counts.in_flight, counts.owed), (1, 0));
    exec(&m1, "COMMIT").await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.repaired_rows), (1, 0));
    // ... aborted: owed.
    exec(&t1, "BEGIN; UPDATE t SET v = 2").await;
    exec(&m1, "BEGIN; UPDATE t SET v = 2").await;
    owe(&t1, Some(&carrier(&m1).await), &[key(&table, 1)]).await;
    exec(&t1, "COMMIT").await;
    exec(&m1, "ROLLBACK").await;
    let counts = migrate::debt::counts(Side::Old, &world.old().await, Some(&world.client(Side::New).await))
        .await
        .expect("counts");
    assert_eq!((counts.owed, counts.tables[&table.number].keys), (1, 1));
    assert!(counts.ledger_bytes > 0 && counts.oldest.is_some() && !counts.partial);
    assert_eq!(repair.pass().await.expect("passes").repaired_rows, 1);
    // ... given up: payable when its backend is gone, which is helped along.
    exec(&t1, "BEGIN; UPDATE t SET v = 3").await;
    exec(&m1, "BEGIN; UPDATE t SET v = 4").await;
    let mut given_up = carrier(&m1).await;
    given_up.xid = None;
    owe(&t1, Some(&given_up), &[key(&table, 1)]).await;
    exec(&t1, "COMMIT").await;
    assert_eq!(repair.pass().await.expect("passes").in_flight, 1);
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    assert!(m1.batch_execute("COMMIT").await.is_err(), "the backend was ended");
    world.assert_equal("t").await;
}

/// C4: T has committed, and M's COMMIT does not come: its proxy has lost the answer, or is frozen. M is ended after a while, and what it brought is repaired;
/// one whose backend is at work is not, nor is a session that is no proxy's, whatever the ledger says of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_carrier_whose_commit_does_not_come_is_ended() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    let (pair, mut watch) = (world.pair().await, migrate::late::Watch::default());
    let mut look = async || {
        let looked = watch.look(pair.authority.at(), pair.mirror.at(), Duration::from_millis(600)).await;
        looked.expect("looks")
    };
    let (left, at_work, stranger) = (world.new_replica().await, world.new_replica().await, world.new_replica().await);
    exec(&stranger, "SET application_name = 'somebody'").await;
    for (id, mirror) in [(1, &left), (2, &at_work), (3, &stranger)] {
        let t1 = world.old().await;
        exec(&t1, &format!("BEGIN; INSERT INTO t VALUES ({id}, NULL, 1)")).await;
        exec(mirror, &format!("BEGIN; INSERT INTO t VALUES ({id}, NULL, 1)")).await;
        owe(&t1, Some(&carrier(mirror).await), &[key(&table, id)]).await;
        exec(&t1, "COMMIT").await;
    }
    let work = tokio::spawn(async move {
        at_work.batch_execute("SELECT pg_sleep(2)").await.expect("is not ended");
        at_work.batch_execute("COMMIT").await.expect("commits late");
    });
    tokio::time::sleep(Duration::from_millis(550)).await;
    assert_eq!(look().await, 0, "it may still commit");
    tokio::time::sleep(Duration::from_millis(650)).await;
    assert_eq!(look().await, 1);
    assert!(left.batch_execute("COMMIT").await.is_err(), "it was ended");
    exec(&stranger, "COMMIT").await;
    work.await.expect("joins");
    let mut repair = world.repair().await;
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    world.assert_equal("t").await;
    assert_eq!(world.rows(Side::New, "t").await.len(), 3);
}

/// A backend of the authority that may still be adding to its debt.
#[tokio::test(flavor = "multi_thread")]
async fn a_debt_with_a_holder_is_payable_when_it_is_released_or_gone() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    let mut bytes = bytes::BytesMut::new();
    crossfade::ledger::debts::encode(&Debt::Taint { table: table.number }, &mut bytes);
    let mut repair = world.repair().await;
    for released in [true, false] {
        let t1 = world.old().await;
        let debt: i64 = t1.query_one("SELECT nextval('crossfade.ledger_id')", &[]).await.unwrap().get(0);
        t1.execute("SELECT crossfade.owe_unwrapped($1, $2, 'call')", &[&debt, &&bytes[..]]).await.expect("owes");
        exec(&t1, &format!("INSERT INTO t VALUES ({}, NULL, 1)", i32::from(released))).await;
        assert_eq!(repair.pass().await.expect("passes").in_flight, 1);
        if released {
            t1.execute("SELECT crossfade.release_unwrapped($1)", &[&debt]).await.expect("releases");
        } else {
            drop(t1);
        }
        repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
        world.assert_equal("t").await;
    }
}

/// Interleaving 4: the mirror's backend is frozen with images in flight; the proxy degrades. Until that backend is gone nobody pays.
#[tokio::test(flavor = "multi_thread")]
async fn i04_a_frozen_carrier_that_wakes_up_changes_nothing() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.both("INSERT INTO t VALUES (1, 'a', 1)").await;
    for commit_in_flight in [false, true] {
        let (t1, m1) = (world.old().await, world.new_replica().await);
        exec(&t1, "BEGIN; UPDATE t SET v = v + 1").await;
        exec(&m1, "BEGIN; SELECT pg_current_xact_id()").await;
        let mut named = carrier(&m1).await;
        if commit_in_flight {
            // Its images were executed before, and only its COMMIT is late.
            exec(&m1, "UPDATE t SET v = v + 1").await;
        } else {
            named.xid = None;
        }
        signal(named.pid, "STOP");
        let late = if commit_in_flight { "COMMIT" } else { "UPDATE t SET v = 100" };
        let late = tokio::spawn(async move { m1.batch_execute(late).await });
        owe(&t1, Some(&named), &[key(&table, 1)]).await;
        exec(&t1, "COMMIT").await;
        // The row is written again, and that is owed too.
        exec(&t1, "UPDATE t SET v = v + 10").await;
        owe(&t1, None, &[key(&table, 1)]).await;
        let mut repair = world.repair().await;
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(400)).await;
            let summary = repair.pass().await.expect("passes");
            assert_eq!(summary.in_flight, 1, "{summary:?}");
        }
        signal(named.pid, "CONT");
        assert_eq!(late.await.expect("ends").is_ok(), commit_in_flight);
        repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
        world.assert_equal("t").await;
        assert_eq!(world.debts_left().await, 0);
    }
}

fn signal(pid: i32, name: &str) {
    let sent = std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

/// The round trip before the mirror's COMMIT: R's session on the authority dies, and with it its row locks, while it waits on the mirror.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_committed_when_the_row_locks_are_lost_on_the_way() {
    let world = World::new(T).await;
    world.both(&format!("ALTER DATABASE {} SET deadlock_timeout = '60s'", world.database)).await;
    let table = world.table("t").await;
    world.on_old("INSERT INTO t VALUES (1, 'a', 1)").await;
    world.owe(&[key(&table, 1)]).await;
    let m1 = world.new_replica().await;
    exec(&m1, "BEGIN; INSERT INTO t VALUES (1, 'stale', 0)").await;
    let settings = migrate::Settings { patience: Duration::from_secs(30), ..Default::default() };
    let mut repair = migrate::repair::Repair::new(world.pair_with(settings).await, world.catalog().await);
    let pid: i32 = repair.pair.authority.client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let paying = tokio::spawn(async move {
        let told = repair.pass().await;
        (repair, told)
    });
    let watch = world.client(Side::New).await;
    let waits = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted AND a.datname = current_database()";
    while watch.query_one(waits, &[]).await.expect("reads").get::<_, i64>(0) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let application = world.old().await;
    application.execute("SELECT pg_terminate_backend($1, 10000)", &[&pid]).await.expect("kills");
    // Its change is mirrored before R's write lands, say: R's value is older.
    exec(&application, "UPDATE t SET v = 2 WHERE k = 1").await;
    exec(&m1, "ROLLBACK").await;
    let (repair, told) = paying.await.expect("ends");
    assert!(told.is_err() && repair.pair.is_broken(), "{told:?}");
    drop(repair);
    assert_eq!(world.rows(Side::New, "t").await, [""; 0], "the older value was not committed");
    assert_eq!(world.debts_left().await, 1);
    repair::wait(&mut world.repair().await, Duration::from_secs(10)).await.expect("drains");
    world.assert_equal("t").await;
}
