//! Reconcile and repair on two real servers; two or three sessions play the proxy's part by hand.

mod migrate_support;

use std::time::Duration;

use bytes::Bytes;
use crossfade::ledger::debts::Debt;
use crossfade::migrate::reconcile;
use crossfade::migrate::repair;
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
