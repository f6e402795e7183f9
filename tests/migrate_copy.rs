//! Whole tables: keys of many types, the plain copy, tables without a key, sequences, and servers that die on the way.

mod migrate_support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use crossfade::ledger::clear::{ClearError, Clearing, flush_and_clear};
use crossfade::ledger::debts::Debt;
use crossfade::migrate::{self, Settings, copy, reconcile, repair, tokens};
use crossfade::phase::Side;
use migrate_support::{carrier as carrier_of, *};

#[tokio::test(flavor = "multi_thread")]
async fn tables_with_keys_of_many_types_become_equal() {
    let schema = "CREATE EXTENSION citext; CREATE SCHEMA s; CREATE TYPE s.mood AS ENUM ('sad', 'ok', 'happy'); CREATE TYPE s.point3 AS (x int, y s.mood, z text);
        CREATE DOMAIN s.code AS text CHECK (value <> '');
        CREATE TABLE k_uuid (k uuid PRIMARY KEY, m s.mood, ms s.mood[], p s.point3, ps s.point3[], j jsonb, n numeric);
        CREATE TABLE k_two (a text, b timestamptz, c int, PRIMARY KEY (b, a));
        CREATE TABLE k_citext (k citext PRIMARY KEY, v int);
        CREATE TABLE k_numeric (k numeric PRIMARY KEY, v int);
        CREATE TABLE k_enum (k s.mood PRIMARY KEY, v int);
        CREATE TABLE k_array (k s.mood[] PRIMARY KEY, v int);
        CREATE TABLE k_point (k s.point3 PRIMARY KEY, v int);
        CREATE TABLE k_class (k regclass PRIMARY KEY, v regclass);
        CREATE TABLE k_domain (k s.code PRIMARY KEY, v s.code);
        CREATE TABLE k_unique (a int NOT NULL, b varchar(10) NOT NULL, c text, UNIQUE (a, b));
        CREATE TABLE k_only (k int GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
        CREATE TABLE k_identity (k int PRIMARY KEY, i int GENERATED ALWAYS AS IDENTITY, g int GENERATED ALWAYS AS (k * 2) STORED, v int);
        CREATE TABLE k_parts (k int, r text, v int, PRIMARY KEY (k, r)) PARTITION BY LIST (r);
        CREATE TABLE k_parts_a PARTITION OF k_parts FOR VALUES IN ('a'); CREATE TABLE k_parts_b PARTITION OF k_parts DEFAULT;
        CREATE TABLE \"K \"\"quoted\"\"\" (\"a b\" bytea PRIMARY KEY, \"select\" text)";
    let world = World::new(schema).await;
    let fill = "INSERT INTO k_uuid SELECT md5(n::text)::uuid, 'ok', '{sad,happy}', (n, 'happy', 'é' || n)::s.point3, ARRAY[(n, 'sad', NULL)::s.point3], '{\"a\": 1}', (n || '.10')::numeric FROM generate_series(1, 300) n;
        INSERT INTO k_two SELECT 'ä' || n, '2024-01-01'::timestamptz + n * interval '1 hour', n FROM generate_series(1, 300) n;
        INSERT INTO k_citext SELECT 'Key' || n, n FROM generate_series(1, 300) n;
        INSERT INTO k_numeric SELECT (n || '.50')::numeric, n FROM generate_series(1, 300) n; INSERT INTO k_numeric VALUES ('NaN', 0);
        INSERT INTO k_enum VALUES ('sad', 1), ('ok', 2), ('happy', 3);
        INSERT INTO k_array VALUES ('{sad}', 1), ('{sad,ok}', 2), ('{}', 3);
        INSERT INTO k_point VALUES ((1, 'ok', 'x'), 1), ((2, NULL, 'y'), 2);
        INSERT INTO k_class VALUES ('k_two', 'k_domain'), ('12345678'::oid, '12345679'::oid);
        INSERT INTO k_domain SELECT 'd' || n, 'v' || n FROM generate_series(1, 300) n;
        INSERT INTO k_unique SELECT n, 'b' || n, NULL FROM generate_series(1, 300) n;
        INSERT INTO k_only OVERRIDING SYSTEM VALUE SELECT n FROM generate_series(1, 300) n;
        INSERT INTO k_identity (k, v) SELECT n, n FROM generate_series(1, 300) n;
        INSERT INTO k_parts SELECT n, CASE WHEN n % 2 = 0 THEN 'a' ELSE 'z' END, n FROM generate_series(1, 300) n;
        INSERT INTO \"K \"\"quoted\"\"\" SELECT decode(md5(n::text), 'hex'), n::text FROM generate_series(1, 300) n;";
    world.on_old(fill).await;
    let tables: Vec<String> = world
        .catalog()
        .await
        .tables
        .values()
        .filter(|table| table.opaque.is_none())
        .map(|table| table.qualified(Side::Old))
        .collect();
    // regclass travels as text, if at all.
    let class = tables.iter().any(|table| table.contains("k_class"));
    println!("regclass mirrored: {class}");
    assert_eq!(tables.len(), 13 + usize::from(class), "{tables:?}");
    let mut pair = world.pair_with(Settings { chunk_rows: 50, ..Settings::default() }).await;
    for round in 0..3 {
        for table in world.catalog().await.tables.values().filter(|table| table.opaque.is_none()) {
            let outcome = reconcile::table(&mut pair, table, &mut |_| {})
                .await
                .unwrap_or_else(|error| panic!("{}: {error}", table.label()));
            assert!(outcome.locked.is_empty() && outcome.refused.is_empty(), "{}: {outcome:?}", table.label());
            assert!(round < 2 || outcome.written + outcome.removed == 0, "{} is equal: {outcome:?}", table.label());
        }
        for table in &tables {
            world.assert_equal(table).await;
        }
        if round == 0 {
            // Differences of every kind.
            world.on_new("UPDATE k_uuid SET ps = NULL, n = n::numeric(10, 1) WHERE n < 100; DELETE FROM k_two WHERE c % 3 = 0; UPDATE k_citext SET k = upper(k::text) WHERE v < 50;
                UPDATE k_numeric SET k = k::numeric(10, 1) WHERE v < 10; UPDATE k_enum SET v = 9; UPDATE k_array SET v = 9; UPDATE k_point SET v = 9; UPDATE k_domain SET v = 'x' WHERE k < 'd2';
                UPDATE k_unique SET c = 'c'; DELETE FROM k_only WHERE k < 20; UPDATE k_identity SET v = 0 WHERE k < 20; UPDATE k_parts SET v = 0 WHERE r = 'a';
                INSERT INTO k_parts VALUES (1000, 'q', 1); INSERT INTO k_enum SELECT 'sad', 1 WHERE false; INSERT INTO k_array VALUES ('{happy}', 1)").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_table_is_copied_fast_while_clients_write() {
    let world = World::new("CREATE TABLE big (k bigint PRIMARY KEY, a text, b int, c timestamptz DEFAULT now())").await;
    world.on_old("INSERT INTO big SELECT n, 'some text ' || n, n FROM generate_series(1, 100000) n; ANALYZE big").await;
    let table = world.table("big").await;
    world.owe(&[Debt::Table { table: table.number }]).await;
    // A client whose writes are owed, one by one.
    let client = world.old().await;
    let number = table.number;
    let writing = tokio::spawn(async move {
        for n in 0..100i64 {
            let k = n * 997 + 1;
            exec(&client, &format!("BEGIN; UPDATE big SET b = -1 WHERE k = {k}; DELETE FROM big WHERE k = {k} + 1; INSERT INTO big VALUES (-{k}, 'new', 0)")).await;
            let key = |k: i64| Debt::Key { table: number, key: vec![Some(Bytes::copy_from_slice(&k.to_be_bytes()))] };
            owe(&client, None, &[key(k), key(k + 1), key(-k)]).await;
            exec(&client, "COMMIT").await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let mut repair = world.repair().await;
    let begun = Instant::now();
    let summary = repair.pass().await.expect("passes");
    println!("{} rows in {:?}", summary.repaired_rows, begun.elapsed());
    assert!(summary.repaired_rows >= 99_900);
    writing.await.expect("clients see no error");
    repair::wait(&mut repair, Duration::from_secs(20)).await.expect("drains");
    assert_eq!(world.debts_left().await, 0);
    world.assert_equal("big").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_go_over_in_bounded_chunks() {
    let world = World::new("CREATE TABLE wide (k int PRIMARY KEY, a text, b bytea)").await;
    world.on_old("INSERT INTO wide SELECT n, repeat('x', 300000), CASE WHEN n = 7 THEN decode(repeat('ab', 3000000), 'hex') END FROM generate_series(1, 30) n").await;
    let table = world.table("wide").await;
    let mut pair = world.pair_with(Settings { chunk_bytes: 1 << 20, ..Settings::default() }).await;
    let mut steps = Vec::new();
    let outcome = reconcile::table(&mut pair, &table, &mut |done| steps.push(done)).await.expect("copies");
    assert_eq!(outcome.written, 30);
    assert!(steps.len() >= 10, "about three rows in a chunk: {steps:?}");
    world.assert_equal("wide").await;
}

const H: &str = "CREATE TABLE h (tid int, delta numeric, note text); CREATE TABLE h2 (a int); CREATE TABLE t (k int PRIMARY KEY, v int)";

#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key_is_copied_in_the_snapshot_of_a_move() {
    let world = World::new(H).await;
    world.on_old("INSERT INTO h SELECT n % 10, n, 'é' FROM generate_series(1, 5000) n").await;
    world.on_new("INSERT INTO h SELECT n, n FROM generate_series(1, 10) n").await;
    let (table, catalog, h2) = (world.table("h").await, world.catalog().await, world.table("h2").await);
    // Owed from before: the row of h is in the snapshot, the one of h2 is not copied.
    let five: &[u8] = &5i32.to_be_bytes();
    world.on_old("INSERT INTO h VALUES (5, NULL, 'x'); INSERT INTO h2 VALUES (5)").await;
    world.owe(&[row(table.number, 1, &[Some(five), None, Some(b"x")]), row(h2.number, 1, &[Some(five)])]).await;
    let debt = world.owe(&[Debt::Table { table: table.number }]).await;
    let mover = world.old().await;
    exec(&mover, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    let snapshot: String = mover.query_one("SELECT pg_export_snapshot()", &[]).await.unwrap().get(0);
    let mut pair = world.pair().await;
    copy::prepare(&mut pair, &catalog, &[&table]).await.expect("empties");
    // Clients go on: their rows come by image.
    world.both("INSERT INTO h VALUES (-1, -1, 'later')").await;
    assert_eq!(copy::keyless(&mut pair, &table, &snapshot, &[debt]).await.expect("copies"), 5001);
    let mut repair = repair::Repair::new(pair, catalog);
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    world.assert_equal("h").await;
    world.assert_equal("h2").await;
    assert_eq!(world.debts_left().await, 0);
    assert!(world.rows(Side::New, "crossfade.applied").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_whose_clearing_failed_is_not_done_twice() {
    let world = World::new(H).await;
    world.on_old("INSERT INTO h SELECT n % 10, n, 'é' FROM generate_series(1, 50) n").await;
    let table = world.table("h").await;
    let debt = world.owe(&[Debt::Table { table: table.number }]).await;
    let mover = world.old().await;
    exec(&mover, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    let snapshot: String = mover.query_one("SELECT pg_export_snapshot()", &[]).await.unwrap().get(0);
    let mut pair = world.pair().await;
    let blocker = world.old().await;
    exec(&blocker, "BEGIN; LOCK TABLE crossfade.ledger").await;
    copy::keyless(&mut pair, &table, &snapshot, &[debt]).await.expect_err("the ledger is locked");
    exec(&blocker, "COMMIT").await;
    assert_eq!(world.debts_left().await, 1);
    assert_eq!(copy::keyless(&mut pair, &table, &snapshot, &[debt]).await.expect("clears"), 0);
    world.assert_equal("h").await;
    assert_eq!(world.debts_left().await, 0);
}

/// A row for `h`, `h2` as an image has it.
fn row(table: u32, token: u8, values: &[Option<&[u8]>]) -> Debt {
    Debt::Row {
        table,
        token: [token; 16],
        values: values.iter().map(|value| value.map(Bytes::copy_from_slice)).collect(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_a_key_are_paid_exactly_once() {
    let world = World::new(H).await;
    let (h, h2) = (world.table("h").await, world.table("h2").await);
    let five: &[u8] = &5i32.to_be_bytes();
    world.on_old("INSERT INTO h VALUES (5, NULL, 'x'), (5, NULL, 'x'); INSERT INTO h2 VALUES (5)").await;
    let debts = [
        row(h.number, 1, &[Some(five), None, Some(b"x")]),
        row(h2.number, 1, &[Some(five)]),
        row(h.number, 1, &[Some(five), None, Some(b"x")]),
    ];
    world.owe(&debts).await;
    let mut repair = world.repair().await;
    // The clearing fails: the rows are there, the debt stays.
    let blocker = world.old().await;
    exec(&blocker, "BEGIN; LOCK TABLE crossfade.ledger IN SHARE MODE").await;
    repair.pass().await.expect_err("the ledger is locked");
    world.assert_equal("h").await;
    exec(&blocker, "COMMIT").await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!((summary.cleared, summary.repaired_rows), (1, 0));
    for table in ["h", "h2"] {
        world.assert_equal(table).await;
    }
    assert!(
        world.rows(Side::New, "crossfade.applied").await.is_empty(),
        "the token goes when the ledger row is gone for good"
    );
    // The carrier brought the rows and the token, and its xid cannot be asked any more.
    world.both("INSERT INTO h2 VALUES (5)").await;
    world.on_new("INSERT INTO crossfade.applied VALUES (encode(decode(repeat('02', 16), 'hex'), 'hex')::uuid), (gen_random_uuid())").await;
    world.owe(&[row(h2.number, 2, &[Some(five)])]).await;
    assert_eq!(tokens::sweep(&mut repair.pair).await.expect("sweeps"), 1, "only the token that no ledger row needs");
    // More than are looked at at once: a busy application would leave more and more of them.
    world.on_new("INSERT INTO crossfade.applied SELECT gen_random_uuid() FROM generate_series(1, 100001)").await;
    assert_eq!(tokens::sweep(&mut repair.pair).await.expect("sweeps"), 100_001);
    assert_eq!(repair.pass().await.expect("passes").repaired_rows, 0);
    world.assert_equal("h2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_another_removes_holds_nobody_up() {
    let world = World::new(H).await;
    let h2 = world.table("h2").await;
    let five: &[u8] = &5i32.to_be_bytes();
    world.on_old("INSERT INTO h2 VALUES (5)").await;
    world.owe(&[row(h2.number, 1, &[Some(five)])]).await;
    let mut repair = world.repair().await;
    // What its pass of before has left: rows and token are there, and the debt.
    let blocker = world.old().await;
    exec(&blocker, "BEGIN; LOCK TABLE crossfade.ledger IN SHARE MODE").await;
    let held_up = repair.try_pass().await.expect("no server has failed").expect_err("the ledger is locked");
    assert!(held_up.to_string().contains("lock timeout"), "{held_up}");
    let waited = repair::wait(&mut repair, Duration::ZERO).await.expect_err("the ledger is locked").to_string();
    assert!(waited.contains("lock timeout") && waited.contains("stays in crossfade.ledger"), "{waited}");
    exec(&blocker, "COMMIT").await;
    let other = world.client(Side::New).await;
    exec(&other, "BEGIN; SELECT FROM crossfade.applied FOR UPDATE").await;
    let summary = repair.pass().await.expect("does not wait");
    assert_eq!((summary.cleared, summary.owed), (1, 0));
    assert_eq!(tokens::sweep(&mut repair.pair).await.expect("does not wait"), 0, "the other has it");
    // He comes to nothing: nobody else forgets it.
    exec(&other, "ROLLBACK").await;
    assert_eq!(tokens::sweep(&mut repair.pair).await.expect("sweeps"), 1);
    world.assert_equal("h2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key_is_copied_by_name_while_clients_insert() {
    let world = World::new(H).await;
    let (h, h2, t) = (world.table("h").await, world.table("h2").await, world.table("t").await);
    world.on_old("INSERT INTO h SELECT n % 10, n, 'é' FROM generate_series(1, 2000) n; INSERT INTO h VALUES (5, NULL, 'x'); INSERT INTO h2 VALUES (5); INSERT INTO t VALUES (5, 5)").await;
    world.on_new("INSERT INTO h VALUES (1, 1, 'stale')").await;
    let five: &[u8] = &5i32.to_be_bytes();
    world.owe(&[row(h.number, 1, &[Some(five), None, Some(b"x")]), row(h2.number, 1, &[Some(five)])]).await;
    world.owe(&[Debt::Taint { table: h.number }, key(&t, 5)]).await;
    world.owe(&[Debt::Taint { table: h.number }]).await;
    let mut repair = world.repair().await;
    let summary = repair.pass().await.expect("passes");
    assert_eq!(summary.owed, 2, "no pass can pay the taint");
    assert!(summary.refused[0].1.contains("repair --table"), "{summary:?}");
    // Transactions as the proxy runs them, while the copy is made.
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut clients = Vec::new();
    for client in 0..3 {
        let (a, m, stop) = (world.old().await, world.new_replica().await, stop.clone());
        clients.push(tokio::spawn(async move {
            let mut n = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                n += 1;
                let insert = format!("BEGIN; INSERT INTO h VALUES ({client}, {n}, 'live')");
                exec(&a, &insert).await;
                exec(&m, &insert).await;
                exec(&a, "COMMIT").await;
                exec(&m, "COMMIT").await;
            }
        }));
    }
    let catalog = world.catalog().await;
    let copied = copy::locked(&mut repair.pair, &catalog, &h).await.expect("copies");
    assert!(copied >= 2001);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in clients {
        client.await.expect("no client failed");
    }
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    for table in ["h", "h2", "t"] {
        world.assert_equal(table).await;
    }
    assert_eq!(world.debts_left().await, 0);
}

/// Whoever has the table's lock for a moment (repair, which looks at each debt) does not make the copy of a move give up: nobody would make it again.
#[tokio::test(flavor = "multi_thread")]
async fn the_copy_of_a_move_waits_for_another_job() {
    let world = World::new(H).await;
    world.on_old("INSERT INTO h SELECT n % 10, n, 'é' FROM generate_series(1, 100) n").await;
    let (table, catalog) = (world.table("h").await, world.catalog().await);
    let debt = world.owe(&[Debt::Table { table: table.number }]).await;
    let (mover, other) = (world.old().await, world.new_replica().await);
    exec(&mover, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    let snapshot: String = mover.query_one("SELECT pg_export_snapshot()", &[]).await.unwrap().get(0);
    let mut pair = world.pair().await;
    // Kind::Table.
    let lock = format!("({}, {})", 0x4346_5442, table.number);
    exec(&other, &format!("SELECT pg_advisory_lock{lock}")).await;
    let tables = [&*table];
    let mut emptying = Box::pin(copy::prepare(&mut pair, &catalog, &tables));
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut emptying).await.is_err(), "has not waited");
    exec(&other, &format!("SELECT pg_advisory_unlock{lock}")).await;
    emptying.await.expect("empties");
    exec(&other, &format!("SELECT pg_advisory_lock{lock}")).await;
    let debts = [debt];
    let mut copying = Box::pin(copy::keyless(&mut pair, &table, &snapshot, &debts));
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut copying).await.is_err(), "has not waited");
    // What it cannot pay, repair does not lock.
    let mut repair = world.repair().await;
    let summary = repair.pass().await.expect("passes");
    assert!(summary.refused[0].1.contains("repair --table"), "{summary:?}");
    exec(&other, &format!("SELECT pg_advisory_unlock{lock}")).await;
    assert_eq!(copying.await.expect("copies"), 100);
    assert_eq!(world.debts_left().await, 0);
    world.assert_equal("h").await;
}

/// A taint goes with the images of its transaction. While the mirror's COMMIT is under way the copy waits for it, or the taint would stay behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_by_name_waits_for_debts_in_flight() {
    let world = World::new(H).await;
    let (h, t) = (world.table("h").await, world.table("t").await);
    let mirror = world.new_replica().await;
    exec(&mirror, "BEGIN; INSERT INTO t VALUES (5, 5)").await;
    let carrier = carrier_of(&mirror).await;
    let authority = world.old().await;
    exec(&authority, "BEGIN; INSERT INTO h VALUES (1, 1, 'by a trigger'); INSERT INTO t VALUES (5, 5)").await;
    owe(&authority, Some(&carrier), &[Debt::Taint { table: h.number }, key(&t, 5)]).await;
    exec(&authority, "COMMIT").await;
    let mut repair = world.repair().await;
    let catalog = world.catalog().await;
    let mut copying = Box::pin(copy::locked(&mut repair.pair, &catalog, &h));
    let early = tokio::time::timeout(Duration::from_millis(500), &mut copying).await;
    assert!(early.is_err(), "copied, and the taint stays: {early:?}");
    exec(&mirror, "COMMIT").await;
    assert_eq!(copying.await.expect("copies"), 1);
    repair::wait(&mut repair, Duration::from_secs(10)).await.expect("drains");
    assert_eq!(world.debts_left().await, 0);
    for table in ["h", "t"] {
        world.assert_equal(table).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_whose_session_dies_on_the_way_loses_nothing() {
    let world = World::new("CREATE TABLE big (k int PRIMARY KEY, v text)").await;
    world.on_old("INSERT INTO big SELECT n, repeat('v', 100) FROM generate_series(1, 20000) n").await;
    let table = world.table("big").await;
    world.owe(&[Debt::Table { table: table.number }]).await;
    let mut failures = 0;
    for side in [Side::New, Side::Old, Side::New] {
        let mut repair = world.repair().await;
        let pid: i32 = {
            let pair = &repair.pair;
            if side == Side::New { &pair.mirror } else { &pair.authority }
        }
        .client
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap()
        .get(0);
        let killer = world.client(side).await;
        let killing = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(30)).await;
            killer.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.expect("kills");
        });
        if repair.pass().await.is_err() {
            failures += 1;
            assert!(repair.pair.is_broken());
            assert_eq!(world.debts_left().await, 1, "nothing is cleared that was not paid");
        }
        killing.await.expect("killed");
    }
    assert!(failures > 0, "the sessions were killed in time");
    world.repair().await.pass().await.expect("passes");
    world.assert_equal("big").await;
    assert_eq!(world.debts_left().await, 0);
}

/// C3, C7: a mirror that crashes between its answer and the flush.
#[tokio::test(flavor = "multi_thread")]
async fn a_flush_in_another_incarnation_clears_nothing() {
    let world = World::alone("CREATE TABLE t (k int PRIMARY KEY, v int)").await;
    let table = world.table("t").await;
    let (t1, m1) = (world.old().await, world.new_replica().await);
    exec(&t1, "BEGIN; INSERT INTO t VALUES (1, 1)").await;
    exec(&m1, "SET synchronous_commit = off; BEGIN; INSERT INTO t VALUES (1, 1)").await;
    let carrier = carrier_of(&m1).await;
    let id = owe(&t1, Some(&carrier), &[key(&table, 1)]).await;
    exec(&t1, "COMMIT").await;
    exec(&m1, "COMMIT").await;
    world.cluster(Side::New).crash();
    world.cluster(Side::New).up();
    let mirror = world.client(Side::New).await;
    let told = flush_and_clear(&mirror, &t1, &[id], &carrier.incarnation, Clearing::Lazy).await;
    assert!(matches!(told, Err(ClearError::Reincarnated)), "{told:?}");
    assert_eq!(world.debts_left().await, 1);
    world.on_new("DELETE FROM crossfade.flush").await;
    let now = carrier_of(&mirror).await.incarnation;
    let told = flush_and_clear(&mirror, &t1, &[id], &now, Clearing::Lazy).await;
    assert!(matches!(told, Err(ClearError::NothingWritten)), "a commit that wrote nothing flushes nothing: {told:?}");
    migrate::install(&mirror, Side::New).await.expect("mends");
    let summary = repair::wait(&mut world.repair().await, Duration::from_secs(10)).await.expect("drains");
    assert_eq!(summary.cleared, 1);
    world.assert_equal("t").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_repairers_do_not_disturb_each_other() {
    let world = World::new("CREATE TABLE t (k int PRIMARY KEY, v int)").await;
    world.on_old("INSERT INTO t SELECT n, n FROM generate_series(1, 3000) n").await;
    let table = world.table("t").await;
    for k in 1..=200 {
        world.owe(&[key(&table, k)]).await;
    }
    world.owe(&[Debt::Table { table: table.number }]).await;
    let mut workers = Vec::new();
    for _ in 0..3 {
        let mut repair = world.repair().await;
        workers.push(tokio::spawn(
            async move { repair::wait(&mut repair, Duration::from_secs(30)).await.expect("drains") },
        ));
    }
    let mut written = 0;
    for worker in workers {
        written += worker.await.expect("ends").repaired_rows;
    }
    assert_eq!(written, 3000);
    world.assert_equal("t").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_of_the_gaining_side_go_beyond_the_losing_ones() {
    let world = World::new(
        "CREATE TABLE t (k bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, s serial); CREATE SEQUENCE down INCREMENT -5; CREATE SCHEMA \"o'dd\"; CREATE SEQUENCE \"o'dd\".\"S x\"; CREATE SEQUENCE ahead; CREATE SEQUENCE fresh",
    )
    .await;
    world.on_old("INSERT INTO t SELECT FROM generate_series(1, 10); SELECT nextval('down'), nextval('down'); SELECT setval('\"o''dd\".\"S x\"', 77); SELECT nextval('ahead')").await;
    world.on_new("SELECT setval('ahead', 500)").await;
    let (old, new) = (world.old().await, world.client(Side::New).await);
    let catalog = world.catalog().await;
    let moved = migrate::sequences((Side::Old, &old), (Side::New, &new), &catalog, 3).await.expect("sets");
    assert!(moved.iter().all(|moved| moved.name != "public.ahead"), "{moved:?}");
    let next = async |name: &str| -> i64 {
        new.query_one("SELECT nextval($1::text::regclass)", &[&name]).await.expect("is there").get(0)
    };
    assert_eq!(next("t_k_seq").await, 14);
    assert_eq!(next("t_s_seq").await, 14);
    assert_eq!(next("down").await, -26);
    assert_eq!(next("\"o'dd\".\"S x\"").await, 81);
    assert_eq!(next("ahead").await, 501);
    assert_eq!(next("fresh").await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn install_may_be_run_again_and_by_several_at_once() {
    let world = World::new("").await;
    let mut running = Vec::new();
    for _ in 0..4 {
        let client = world.old().await;
        running.push(tokio::spawn(async move { migrate::install(&client, Side::Old).await }));
    }
    for install in running {
        install.await.expect("ends").expect("installs");
    }
    world.on_old("CREATE ROLE small LOGIN; GRANT CONNECT ON DATABASE postgres TO small").await;
    let client = world.old().await;
    exec(&client, "DROP SCHEMA crossfade CASCADE; SET ROLE small").await;
    let told = migrate::install(&client, Side::Old).await.expect_err("it may not");
    assert!(told.to_string().contains("--print-sql"), "{told}");
}
