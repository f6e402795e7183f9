//! Keys that the authority lacks (D2), many at once, on two real servers; sessions play the proxy's part by hand.

mod migrate_support;

use std::time::Duration;

use crossfade::catalog::Table;
use crossfade::ledger::debts::{Debt, Values};
use crossfade::migrate::{Settings, reconcile, repair};
use crossfade::phase::Side;
use migrate_support::*;
use tokio_postgres::Client;

/// On new a trigger writes down which transaction has deleted how often; mirror sessions fire it too.
const T: &str = "CREATE TABLE t (k int PRIMARY KEY, v int); CREATE TABLE deletes (xid text); \
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO public.deletes VALUES (pg_current_xact_id()::text); RETURN NULL; END'; \
    CREATE TRIGGER note AFTER DELETE ON t FOR EACH STATEMENT EXECUTE FUNCTION note(); ALTER TABLE t ENABLE ALWAYS TRIGGER note";

fn keys(table: &Table, all: std::ops::RangeInclusive<i32>) -> Vec<Values> {
    let value = |k| match key(table, k) {
        Debt::Key { key, .. } => key,
        other => panic!("{other:?} is no key's debt"),
    };
    all.map(value).collect()
}

/// As long as a lock of this kind is waited for.
async fn until_waiting(watch: &Client, kind: &str) {
    let waits = format!(
        "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted AND a.datname = current_database() AND l.locktype = '{kind}'"
    );
    let begun = std::time::Instant::now();
    while watch.query_one(&waits, &[]).await.expect("reads").get::<_, i64>(0) == 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "nobody waits for a {kind}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits of a job are long, so that what it holds meanwhile can be looked at.
async fn patient(world: &World) -> crossfade::migrate::Pair {
    world.both(&format!("ALTER DATABASE {} SET deadlock_timeout = '60s'", world.database)).await;
    world.pair_with(Settings { patience: Duration::from_secs(30), rounds: 2, ..Settings::default() }).await
}

/// One test, since each starts servers.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_the_authority_lacks_go_together() {
    tokio::join!(
        many_keys_go_in_few_transactions(),
        a_batch_holds_no_row_while_it_waits_for_another(),
        a_key_of_a_batch_that_has_appeared_stays()
    );
}

/// 5,000 rows that only new has go in a few transactions; one whose insert is still open there goes when that has ended.
async fn many_keys_go_in_few_transactions() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.on_new("INSERT INTO t SELECT n, n FROM generate_series(1, 5000) n WHERE n <> 77").await;
    world.on_old("INSERT INTO t VALUES (4000, 4000)").await;
    let late = world.new_replica().await;
    exec(&late, "BEGIN; INSERT INTO t VALUES (77, 77)").await;
    world.owe(&[Debt::Taint { table: table.number }]).await;
    for k in [1, 2, 77, 78] {
        world.owe(&[key(&table, k)]).await;
    }
    let mut repair = world.repair().await;
    let paying = tokio::spawn(async move {
        let begun = std::time::Instant::now();
        let summary = repair.pass().await.expect("passes");
        (summary, begun.elapsed())
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    exec(&late, "COMMIT").await;
    let (summary, took) = paying.await.expect("ends");
    println!("{summary:?} in {took:?}");
    repair::wait(&mut world.repair().await, Duration::from_secs(10)).await.expect("drains");
    assert_eq!(world.rows(Side::New, "t").await, ["(4000,4000)"]);
    let deletes = "SELECT count(DISTINCT xid)::int, count(*)::int FROM deletes";
    let row = world.client(Side::New).await.query_one(deletes, &[]).await.expect("reads");
    let (transactions, statements): (i32, i32) = (row.get(0), row.get(1));
    assert!((5..40).contains(&transactions) && statements >= transactions, "{transactions}, {statements}");
}

/// M holds one row of a batch and comes for another: it waits for nobody, since whoever waits for M holds no row. (Were the batch to wait for M's row with all
/// others in hand, M would wait for the batch.)
async fn a_batch_holds_no_row_while_it_waits_for_another() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.on_new("INSERT INTO t SELECT n, n FROM generate_series(1, 10) n").await;
    let mut pair = patient(&world).await;
    let m = world.new_replica().await;
    exec(&m, "BEGIN; UPDATE t SET v = 0 WHERE k = 5").await;
    let all = keys(&table, 1..=10);
    let removing = tokio::spawn(async move { reconcile::keys(&mut pair, &table, all).await.expect("reconciles") });
    let watch = world.client(Side::New).await;
    until_waiting(&watch, "transactionid").await;
    assert_eq!(world.rows(Side::New, "t").await, ["(5,5)"], "all others are gone");
    exec(
        &m,
        "SET LOCAL lock_timeout = '1s'; INSERT INTO t VALUES (1, 1), (10, 10) ON CONFLICT (k) DO UPDATE SET v = 0",
    )
    .await;
    exec(&m, "ROLLBACK").await;
    let outcome = removing.await.expect("ends");
    assert_eq!((outcome.removed, outcome.locked.len(), outcome.refused.len()), (10, 0, 0));
    assert_eq!(world.rows(Side::New, "t").await, [""; 0]);
}

/// A key that the authority lacked when it was read is back, on both sides, before the batch deletes it: the look behind the deletes sees it, and nothing of
/// the batch is committed; the others go without it.
async fn a_key_of_a_batch_that_has_appeared_stays() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.on_new("INSERT INTO t SELECT n, n FROM generate_series(1, 10) n").await;
    let mut pair = patient(&world).await;
    let m = world.new_replica().await;
    exec(&m, "BEGIN; LOCK TABLE t IN SHARE MODE").await;
    let all = keys(&table, 1..=10);
    let removing = tokio::spawn(async move { reconcile::keys(&mut pair, &table, all).await.expect("reconciles") });
    until_waiting(&world.client(Side::New).await, "relation").await;
    world.on_old("INSERT INTO t VALUES (3, 33)").await;
    exec(&m, "INSERT INTO t VALUES (3, 33) ON CONFLICT (k) DO UPDATE SET v = excluded.v; COMMIT").await;
    let outcome = removing.await.expect("ends");
    assert_eq!((outcome.removed, outcome.written), (9, 0), "{outcome:?}");
    assert!(outcome.locked.is_empty() && outcome.refused.is_empty(), "{outcome:?}");
    assert_eq!(world.rows(Side::New, "t").await, ["(3,33)"]);
}
