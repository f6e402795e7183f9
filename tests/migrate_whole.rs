//! Debts of whole tables: what a walk over one pays, and what it leaves. Two real servers; sessions play the proxy's part by hand.

mod migrate_support;

use std::time::Duration;

use crossfade::ledger::debts::Debt;
use crossfade::migrate::repair;
use crossfade::phase::Side;
use migrate_support::*;

const T: &str = "CREATE TABLE t (k int PRIMARY KEY, u text UNIQUE, v int)";

/// A trigger of the mirror's that fires in every session leaves a row out and says nothing: it stays owed, and the ledger says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_a_trigger_leaves_out_is_refused() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world
        .on_new(
            "CREATE FUNCTION pass() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN IF NEW.k = 5 THEN RETURN NULL; END IF; RETURN NEW; END';
             CREATE TRIGGER pass BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION pass(); ALTER TABLE t ENABLE ALWAYS TRIGGER pass",
        )
        .await;
    world.on_old("INSERT INTO t SELECT n, 'u' || n, n FROM generate_series(1, 40) n").await;
    world.owe(&[Debt::Table { table: table.number }]).await;
    let summary = world.repair().await.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.owed, world.rows(Side::New, "t").await.len()), (0, 1, 39), "{summary:?}");
    let why: String = world.old().await.query_one("SELECT error FROM crossfade.ledger", &[]).await.unwrap().get(0);
    assert!(why.contains("took 0 of 1 rows"), "{why}");
    world.on_new("ALTER TABLE t DISABLE TRIGGER pass").await;
    repair::wait(&mut world.repair().await, Duration::from_secs(10)).await.expect("drains");
    world.assert_equal("t").await;
}

/// A walk that meets so many refused rows that it ends has not passed the keys behind them: their debts stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_walk_that_ends_early_pays_no_keys_behind_its_end() {
    let world = World::new(T).await;
    let table = world.table("t").await;
    world.on_new("ALTER TABLE t ADD CHECK (v < 100)").await;
    world.on_old("INSERT INTO t SELECT n, 'u' || n, 100 FROM generate_series(1, 2500) n").await;
    world.on_old("INSERT INTO t VALUES (9000, 'u9000', 1)").await;
    world.owe(&[Debt::Table { table: table.number }]).await;
    let behind = world.owe(&[key(&table, 9000)]).await;
    let mut repair = world.repair().await;
    repair.pass().await.expect("passes");
    let there = "SELECT count(*) FROM t WHERE k = 9000";
    let come: i64 = world.new_replica().await.query_one(there, &[]).await.unwrap().get(0);
    let held = "SELECT count(*) FROM crossfade.ledger WHERE id = $1";
    let held: i64 = world.old().await.query_one(held, &[&behind]).await.unwrap().get(0);
    assert_eq!((come, held), (0, 1), "it is there, or it is owed by itself");
}

/// A whole-table debt that another job pays between the reading of the ledger and the walk is not walked once more: for a large table that would be
/// hours of reading for nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_paid_meanwhile_is_not_walked() {
    let world =
        World::new("CREATE TABLE a (k int PRIMARY KEY, v int); CREATE TABLE b (k int PRIMARY KEY, v int)").await;
    let (a, b) = (world.table("a").await, world.table("b").await);
    let (first, second, last) = if a.number < b.number { ("a", "b", b) } else { ("b", "a", a) };
    let m1 = world.new_replica().await;
    exec(&m1, &format!("BEGIN; INSERT INTO {first} VALUES (1, 1)")).await;
    world.owe(&[Debt::Table { table: world.table(first).await.number }]).await;
    let (whole, cut) = (Debt::Table { table: last.number }, key(&last, 7));
    let (cleared, cut_down) = (world.owe(std::slice::from_ref(&whole)).await, world.owe(&[whole, cut.clone()]).await);
    let mut repair = world.repair().await;
    let paying = tokio::spawn(async move { repair.pass().await.expect("passes") });
    // The walk over the first waits for the insert.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut left = bytes::BytesMut::new();
    crossfade::ledger::debts::encode(&cut, &mut left);
    let old = world.old().await;
    exec(&old, &format!("DELETE FROM crossfade.ledger WHERE id = {cleared}")).await;
    let text = "UPDATE crossfade.ledger SET debts = $2 WHERE id = $1";
    old.execute(text, &[&cut_down, &&left[..]]).await.expect("cuts the other down");
    world.on_new(&format!("INSERT INTO {second} VALUES (5, 5)")).await;
    exec(&m1, "COMMIT").await;
    let summary = paying.await.expect("ends");
    assert_eq!((summary.repaired_rows, summary.owed), (1, 0), "{summary:?}");
    assert_eq!(world.rows(Side::New, first).await, [""; 0]);
    assert_eq!(world.rows(Side::New, second).await, ["(5,5)"], "nobody walked over it");
    assert_eq!(world.debts_left().await, 0);
}

/// A transaction that owed whole tables, until it had seen what its writes were, owes two keys instead: after the ledger was read, before the table's turn
/// has come. Nobody has brought them; the ledger row stays.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_have_taken_a_whole_debts_place_are_not_cleared() {
    let world =
        World::new("CREATE TABLE a (k int PRIMARY KEY, v int); CREATE TABLE b (k int PRIMARY KEY, v int)").await;
    let (a, b) = (world.table("a").await, world.table("b").await);
    let ((first, one), (second, two)) = if a.number < b.number { (("a", a), ("b", b)) } else { (("b", b), ("a", a)) };
    let m1 = world.new_replica().await;
    exec(&m1, &format!("BEGIN; INSERT INTO {first} VALUES (1, 1)")).await;
    let all = world.owe(&[Debt::Taint { table: one.number }, Debt::Taint { table: two.number }]).await;
    let mut repair = world.repair().await;
    let paying = tokio::spawn(async move {
        let summary = repair.pass().await.expect("passes");
        (repair, summary)
    });
    // The walk over the first waits for the insert.
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.on_old(&format!("INSERT INTO {second} VALUES (7, 7)")).await;
    let mut keys = bytes::BytesMut::new();
    crossfade::ledger::debts::encode(&key(&one, 7), &mut keys);
    crossfade::ledger::debts::encode(&key(&two, 7), &mut keys);
    let text = "UPDATE crossfade.ledger SET debts = $2 WHERE id = $1";
    world.old().await.execute(text, &[&all, &&keys[..]]).await.expect("narrows");
    exec(&m1, "COMMIT").await;
    let (mut repair, summary) = paying.await.expect("ends");
    assert_eq!((summary.cleared, summary.owed), (0, 1), "{summary:?}");
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    assert_eq!(world.rows(Side::New, second).await, ["(7,7)"]);
}
