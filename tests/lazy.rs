//! Tables with `backfill: lazy`: new is the authority before it has all their rows (R5, D3, interleaving 18).

mod common;

use common::lazily::{FILE, SCHEMA, TEN, lazily, lazily_on, new_primary, on_new, on_old, rows, until_one_waits};
use common::pair::{APP, DATABASE};
use common::{Databases, Pair, Proxy, until};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};

#[tokio::test]
async fn a_client_sees_all_rows_and_writes_any() {
    let mut pair = lazily(TEN).await;
    let client = pair.client().await;
    // One row comes over in dual-write, by image.
    client.batch_execute("UPDATE photo SET size = 1 WHERE id = 3").await.expect("writes");
    pair.proxy.settle().await;
    assert_eq!(on_new(&pair, "SELECT count(*) FROM photo").await, "1");
    new_primary(&mut pair).await;
    // Both protocols, all rows.
    assert_eq!(rows(&client, "SELECT count(*), sum(size) FROM photo").await, ["10|521"]);
    assert_eq!(
        rows(&client, "SELECT p.id FROM photo p JOIN note USING (id) ORDER BY p.id DESC LIMIT 2").await,
        ["5", "4"]
    );
    let one = client.query_one("SELECT size, owner FROM photo WHERE id = $1", &[&7_i64]).await.expect("reads");
    assert_eq!((one.get::<_, i32>(0), one.get::<_, String>(1)), (70, "o1".to_owned()));
    assert_eq!(on_new(&pair, "SELECT count(*) FROM photo").await, "1", "reading brings nothing");
    // Writes bring what they address, and no more.
    assert_eq!(
        client.execute("UPDATE photo SET size = size + $2 WHERE id = $1", &[&7_i64, &5_i32]).await.expect("updates"),
        1
    );
    assert_eq!(rows(&client, "UPDATE photo SET size = size + 1 WHERE owner = 'o2' RETURNING id, size").await.len(), 3);
    assert_eq!(client.execute("DELETE FROM photo WHERE id = $1", &[&4_i64]).await.expect("deletes"), 1);
    assert_eq!(client.execute("DELETE FROM photo WHERE id = $1", &[&4_i64]).await.expect("deletes"), 0);
    assert_eq!(on_new(&pair, "SELECT string_agg(id::text, ',' ORDER BY id) FROM photo").await, "2,3,5,7,8");
    assert_eq!(rows(&client, "SELECT count(*) FROM photo").await, ["9"]);
    // Conflicts are those with all rows.
    let error = client.batch_execute("INSERT INTO photo (id, size) VALUES (9, 0)").await.expect_err("conflicts");
    assert_eq!(error.code(), Some(&SqlState::UNIQUE_VIOLATION));
    let sql = "INSERT INTO photo (id, size) VALUES (1, 5), (4, 6) ON CONFLICT (id) DO UPDATE SET size = photo.size + EXCLUDED.size RETURNING id, size, owner";
    assert_eq!(rows(&client, sql).await, ["1|15|o1", "4|6|NULL"]);
    assert_eq!(
        client.execute("INSERT INTO photo (id, size) VALUES (10, 0) ON CONFLICT DO NOTHING", &[]).await.expect("runs"),
        0
    );
    // A row that is locked first.
    client.batch_execute("BEGIN").await.expect("begins");
    assert_eq!(rows(&client, "SELECT size FROM photo WHERE id = 6 FOR UPDATE").await, ["60"]);
    client.batch_execute("UPDATE photo SET id = 60 WHERE id = 6; ROLLBACK").await.expect("rolls back");
    assert_eq!(rows(&client, "SELECT id FROM photo WHERE size = 60").await, ["6"]);
    client.batch_execute("UPDATE photo SET id = 60 WHERE id = 6").await.expect("changes the key");
    assert_eq!(rows(&client, "SELECT id, owner FROM photo WHERE size = 60").await, ["60|o0"]);
    assert_eq!(rows(&client, "SELECT count(*) FROM photo").await, ["10"]);
    // Old is still exact, and nobody has deleted there what only old has.
    pair.proxy.settle().await;
    let truth = "SELECT string_agg(format('%s %s %s', id, size, owner), ',' ORDER BY id) FROM photo";
    let told = rows(&client, truth).await;
    assert_eq!(on_old(&pair, truth).await, told[0]);
    let filled = pair.proxy.crossfade(&["backfill"]).await;
    assert!(filled.status.success(), "{filled:?}");
    assert_eq!(on_new(&pair, truth).await, told[0]);
    until("merging ends", async || {
        rows(&client, "EXPLAIN SELECT * FROM photo").await.iter().all(|line| !line.contains("Foreign"))
    })
    .await;
    pair.proxy.settle().await;
    pair.databases.assert_equal().await;
}

#[tokio::test]
async fn what_was_brought_and_deleted_is_not_brought_again() {
    let mut pair = lazily(TEN).await;
    new_primary(&mut pair).await;
    let (one, other) = (pair.client().await, pair.client().await);
    // T1 brings the row, deletes it and commits, while T2 waits with an older snapshot, in which only old has it.
    one.batch_execute("BEGIN; DELETE FROM photo WHERE id = 1").await.expect("deletes");
    let update = async { other.execute("UPDATE photo SET size = 0 WHERE id = 1", &[]).await.expect("runs") };
    let commit = async {
        until_one_waits(&pair).await;
        one.batch_execute("COMMIT").await.expect("commits");
    };
    let (updated, ()) = tokio::join!(update, commit);
    assert_eq!(updated, 0);
    // The same with an INSERT, which then finds nothing in its way.
    one.batch_execute("BEGIN; DELETE FROM photo WHERE id = 2").await.expect("deletes");
    let insert = async { other.execute("INSERT INTO photo (id, size) VALUES (2, 7)", &[]).await.expect("runs") };
    let commit = async {
        until_one_waits(&pair).await;
        one.batch_execute("COMMIT").await.expect("commits");
    };
    let (inserted, ()) = tokio::join!(insert, commit);
    assert_eq!(inserted, 1);
    // And where T1 is rolled back.
    one.batch_execute("BEGIN; DELETE FROM photo WHERE id = 3").await.expect("deletes");
    let update = async { other.execute("UPDATE photo SET size = 33 WHERE id = 3", &[]).await.expect("runs") };
    let roll_back = async {
        until_one_waits(&pair).await;
        one.batch_execute("ROLLBACK").await.expect("rolls back");
    };
    let (updated, ()) = tokio::join!(update, roll_back);
    assert_eq!(updated, 1);
    assert_eq!(rows(&one, "SELECT id, size, owner FROM photo WHERE id < 4 ORDER BY id").await, ["2|7|NULL", "3|33|o0"]);
    pair.proxy.settle().await;
    assert_eq!(on_old(&pair, "SELECT count(*), sum(size) FROM photo").await, "9|530");
}

#[tokio::test]
async fn a_row_that_new_has_deleted_is_gone_while_old_still_has_it() {
    let mut pair = lazily(TEN).await;
    let client = pair.client().await;
    // Both have it, by image.
    client.batch_execute("UPDATE photo SET size = 1 WHERE id = 3").await.expect("writes");
    pair.proxy.settle().await;
    new_primary(&mut pair).await;
    let (old, connection) =
        tokio_postgres::connect(&pair.databases.old.url(DATABASE), tokio_postgres::NoTls).await.expect("connects");
    tokio::spawn(connection);
    // The mirror cannot delete it.
    old.batch_execute("BEGIN; SELECT FROM photo WHERE id IN (3, 4) FOR UPDATE").await.expect("locks");
    client.batch_execute("DELETE FROM photo WHERE id = 3; DELETE FROM photo WHERE id = 4").await.expect("deletes");
    assert_eq!(on_old(&pair, "SELECT count(*) FROM photo WHERE id IN (3, 4)").await, "2");
    assert_eq!(rows(&client, "SELECT count(*) FROM photo").await, ["8"]);
    assert_eq!(client.execute("UPDATE photo SET size = 5 WHERE id IN (3, 4)", &[]).await.expect("runs"), 0);
    let filled = pair.proxy.crossfade(&["backfill"]).await;
    assert!(filled.status.success(), "{filled:?}");
    assert_eq!(on_new(&pair, "SELECT count(*) FROM photo").await, "8");
    old.batch_execute("ROLLBACK").await.expect("lets go");
    pair.proxy.settle().await;
    pair.databases.assert_equal().await;
}

#[tokio::test]
async fn no_job_deletes_what_only_old_has() {
    let mut pair = lazily_on(Databases::start(&[("wal_level", "logical")]).await, TEN).await;
    new_primary(&mut pair).await;
    let client = pair.client().await;
    client.batch_execute("DELETE FROM photo WHERE id = 10").await.expect("deletes");
    // Whole-table debts of all tables: it may have written any.
    client.batch_execute("CALL change_note()").await.expect("runs");
    pair.proxy.settle().await;
    assert_eq!(on_old(&pair, "SELECT count(*), (SELECT body FROM note WHERE id = 1) FROM photo").await, "9|by CALL");
    let verified = pair.proxy.crossfade(&["verify", "--repair"]).await;
    assert!(verified.status.success(), "{verified:?}");
    let swept = pair.proxy.crossfade(&["sweep"]).await;
    assert!(swept.status.success(), "{swept:?}");
    client.batch_execute("DELETE FROM photo WHERE id = 9").await.expect("deletes");
    pair.proxy.settle().await;
    assert_eq!(on_old(&pair, "SELECT string_agg(id::text, ',' ORDER BY id) FROM photo").await, "1,2,3,4,5,6,7,8");
    assert_eq!(rows(&client, "SELECT count(*) FROM photo").await, ["8"]);
    // What differs is found all the same: something has put a row back on old that new has deleted.
    pair.databases.old.run(DATABASE, "INSERT INTO photo (id, size) VALUES (9, 1)").await.expect("writes");
    let verified = pair.proxy.crossfade(&["verify", "public.photo"]).await;
    assert_eq!(verified.status.code(), Some(1), "{verified:?}");
    assert_eq!(rows(&client, "SELECT count(*) FROM photo").await, ["8"]);
    // Leaving for a phase in which nobody looks at statements is closed.
    let moved = pair.proxy.crossfade(&["phase", "old-read-only", "--dry-run"]).await;
    assert!(String::from_utf8_lossy(&moved.stdout).contains("on old alone"), "{moved:?}");
}

#[tokio::test]
async fn there_and_back_and_there_again() {
    let mut pair = lazily(TEN).await;
    new_primary(&mut pair).await;
    let client = pair.client().await;
    client
        .batch_execute("DELETE FROM photo WHERE id <= 3; UPDATE photo SET size = 0 WHERE id = 4")
        .await
        .expect("writes");
    pair.proxy.set_phase("dual-read").await;
    assert_eq!(rows(&client, "SELECT count(*), sum(size) FROM photo").await, ["7|450"]);
    // Written while old is the authority; what new says of keys then must not hide it.
    pair.proxy.set_phase("old").await;
    client.batch_execute("INSERT INTO photo (id, size) VALUES (1, 100), (2, 100); UPDATE photo SET size = 1 WHERE id = 4; DELETE FROM photo WHERE id = 5").await.expect("writes");
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.settle().await;
    new_primary(&mut pair).await;
    assert_eq!(rows(&client, "SELECT count(*), sum(size) FROM photo").await, ["8|601"]);
    assert_eq!(
        rows(&client, "UPDATE photo SET size = size + 1 WHERE id < 6 RETURNING id, size").await,
        ["4|2", "1|101", "2|101"]
    );
    // A proxy that dies in the middle of it leaves nothing behind.
    client.batch_execute("BEGIN; DELETE FROM photo WHERE id = 6").await.expect("deletes");
    pair.proxy.restart().await;
    let client = pair.client().await;
    assert_eq!(rows(&client, "SELECT count(*), sum(size) FROM photo").await, ["8|604"]);
    // With another file, too: the database says which tables are lazy.
    pair.proxy.set_more("tables: [public.photo, public.note]");
    pair.proxy.restart().await;
    let client = pair.client().await;
    assert_eq!(rows(&client, "SELECT count(*), sum(size) FROM photo").await, ["8|604"]);
}

#[tokio::test]
async fn what_cannot_be_done_right_is_refused() {
    let mut pair = lazily(TEN).await;
    let views = "CREATE VIEW seen AS SELECT id FROM photo; CREATE VIEW seen_again AS SELECT * FROM seen;
        CREATE FUNCTION total() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT sum(size) FROM photo';
        CREATE FUNCTION outer_total() RETURNS bigint LANGUAGE plpgsql AS 'BEGIN RETURN total(); END';
        CREATE FUNCTION shout(text) RETURNS text LANGUAGE sql STABLE AS 'SELECT upper($1)';
        CREATE ROLE clerk LOGIN; GRANT SELECT (id) ON photo TO clerk;";
    for side in [&pair.databases.old, &pair.databases.new] {
        side.run(DATABASE, views).await.expect("makes views");
    }
    new_primary(&mut pair).await;
    let client = pair.client().await;
    for sql in [
        "SELECT ctid FROM photo",
        "SELECT photo FROM photo",
        "SELECT row_to_json(p) FROM photo p",
        "SELECT public.photo.id FROM public.photo",
        "TABLE photo",
        "SELECT * FROM photo TABLESAMPLE system (10)",
        "SELECT * FROM seen",
        "SELECT count(*) FROM seen_again",
        "SELECT total()",
        "SELECT outer_total() FROM note",
        "SELECT p.id FROM photo p JOIN note USING (id) FOR UPDATE OF p",
        "UPDATE photo SET size = 1 WHERE id IN (SELECT id FROM note)",
        "UPDATE photo SET size = 1 WHERE random() < 0.5",
        "DELETE FROM photo USING note WHERE note.id = photo.id",
        "INSERT INTO photo (id, size) SELECT id, 1 FROM note ON CONFLICT (id) DO UPDATE SET size = 2",
        "WITH d AS (DELETE FROM photo RETURNING id) SELECT count(*) FROM d",
        "TRUNCATE photo",
        "COPY photo TO STDOUT",
        "DO $$ BEGIN DELETE FROM photo; END $$",
        "DO $$ BEGIN EXECUTE 'DELETE FROM ' || 'pho' || 'to'; END $$",
        "PREPARE q AS SELECT * FROM photo",
        "ALTER TABLE photo ADD COLUMN more int",
        "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM photo",
        "CREATE TEMPORARY TABLE photo (id int); SELECT * FROM photo",
    ] {
        let error = client.simple_query(sql).await.expect_err(sql);
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{sql}: {error:?}");
        client.batch_execute("ROLLBACK").await.expect("the session goes on");
        assert_eq!(rows(&client, "SELECT count(*) FROM public.photo").await, ["10"], "behind {sql}");
    }
    assert_eq!(on_new(&pair, "SELECT count(*) FROM photo").await, "0");
    // What has nothing to do with it goes on, and errors are as they were.
    assert_eq!(rows(&client, "SELECT shout(body) FROM note WHERE id = 1").await, ["NOTE 1"]);
    let error = client.simple_query("SELECT p.id, nonsense FROM photo p").await.expect_err("fails");
    let position = format!("{:?}", error.as_db_error().and_then(|error| error.position()));
    assert_eq!((error.code(), position.as_str()), (Some(&SqlState::UNDEFINED_COLUMN), "Some(Original(14))"));
    let error = client.prepare("SELECT p.id, nonsense FROM photo p").await.expect_err("fails");
    let position = format!("{:?}", error.as_db_error().and_then(|error| error.position()));
    assert_eq!(position.as_str(), "Some(Original(14))");
    // Who may not read the table may not read it here.
    let granted = "SELECT string_agg(DISTINCT grantee || ' ' || column_name, ', ' ORDER BY grantee || ' ' || column_name) \
        FROM information_schema.column_privileges WHERE table_name LIKE 'missing_%' AND grantee = 'clerk'";
    assert_eq!(on_new(&pair, granted).await, "clerk id");
}

/// The snapshot of old is older than new's: what a transaction has done on both sides between the two is seen on none.
#[tokio::test]
async fn a_read_is_not_torn_between_two_snapshots() {
    let mut pair = lazily(TEN).await;
    let (reader, writer) = (pair.client().await, pair.client().await);
    writer.batch_execute("UPDATE photo SET size = 20 WHERE id = 2").await.expect("writes");
    pair.proxy.settle().await;
    new_primary(&mut pair).await;
    // The condition is asked first, with new's snapshot taken, and nothing of old read yet. It waits for a lock.
    let (holder, connection) =
        tokio_postgres::connect(&pair.databases.new.url(DATABASE), tokio_postgres::NoTls).await.expect("connects");
    tokio::spawn(connection);
    holder.batch_execute("SELECT pg_advisory_lock(42)").await.expect("locks");
    let held = "WITH s AS MATERIALIZED (SELECT pg_advisory_xact_lock_shared(42)) \
        SELECT sum(size) FROM photo WHERE id < 3 AND (SELECT count(*) FROM s) = 1";
    let read = async { rows(&reader, held).await };
    let write = async {
        until_one_waits(&pair).await;
        let moved = "BEGIN; UPDATE photo SET size = size - 5 WHERE id = 1; UPDATE photo SET size = size + 5 WHERE id = 2; COMMIT";
        writer.batch_execute(moved).await.expect("moves a size");
        until("old has it", async || on_old(&pair, "SELECT size FROM photo WHERE id = 1").await == "5").await;
        holder.batch_execute("SELECT pg_advisory_unlock(42)").await.expect("lets go");
    };
    let (read, ()) = tokio::join!(read, write);
    assert_eq!(read, ["30"]);
    assert_eq!(rows(&reader, "SELECT size FROM photo WHERE id < 3 ORDER BY id").await, ["5", "25"]);
}

#[tokio::test]
async fn install_makes_it_and_uninstall_takes_it_away() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let mut pair = Pair { proxy: Proxy::start(databases.proxy_config("old", FILE)).await, databases };
    let installed = pair.proxy.crossfade(&["install"]).await;
    assert!(installed.status.success(), "{installed:?}");
    let there = "SELECT (SELECT count(*) FROM pg_trigger WHERE tgname ~ 'crossfade_lazy'), (SELECT count(*) FROM pg_foreign_server), \
        (SELECT count(*) FROM pg_class WHERE relname ~ '^(merged|missing|gone|old)_[0-9]+$')";
    assert_eq!(on_new(&pair, there).await, "4|1|4");
    assert!(pair.proxy.terminate().await.success());
    let removed = pair.proxy.crossfade(&["uninstall"]).await;
    assert!(removed.status.success(), "{removed:?}");
    assert_eq!(on_new(&pair, there).await, "0|0|0");
}

/// Statements at random about one table, by one client, give what one database with all rows gives.
#[tokio::test]
async fn statements_at_random_give_what_all_rows_give() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let fill = "INSERT INTO photo SELECT n, CASE WHEN n % 7 > 0 THEN 'Ö' || n % 5 END, n % 50, CASE WHEN n % 3 > 0 THEN '2026-01-01'::timestamptz + n * interval '1 hour' END FROM generate_series(1, 400) n;
        INSERT INTO note SELECT n, 'note ' || n FROM generate_series(1, 60) n";
    let mut pair = lazily(fill).await;
    let client = pair.client().await;
    // Of what new has before the move some comes by image.
    for _ in 0..60 {
        let sql = write(&mut random);
        let _ = client.simple_query(&sql).await;
    }
    pair.proxy.settle().await;
    let truth = truth(&pair).await;
    new_primary(&mut pair).await;
    let steps = if common::proof() { 10_000 } else { 220 };
    for step in 0..steps {
        let sql = if random.random_bool(0.45) { write(&mut random) } else { read(&mut random) };
        let (here, there) = (answer(&client, &sql).await, answer(&truth, &sql).await);
        assert_eq!(here, there, "seed {seed}, step {step}: {sql}");
        if step == steps * 3 / 4 {
            let filled = pair.proxy.crossfade(&["backfill"]).await;
            assert!(filled.status.success(), "{filled:?}");
        }
    }
    pair.proxy.settle().await;
    pair.databases.assert_equal().await;
}

/// A database of its own with what old has now.
async fn truth(pair: &Pair) -> Client {
    let old = &pair.databases.old;
    old.run("postgres", &format!("CREATE DATABASE truth TEMPLATE template0 OWNER {}", APP.0)).await.expect("makes it");
    old.run("truth", SCHEMA).await.expect("makes tables");
    for table in ["photo", "note"] {
        let text = format!(
            "SELECT coalesce(string_agg(format('INSERT INTO {table} SELECT (%L::{table}).*;', t), ' '), '') FROM {table} t"
        );
        let rows = old.run(DATABASE, &text).await.expect("reads");
        old.run("truth", &rows).await.expect("writes");
    }
    let (client, connection) =
        tokio_postgres::connect(&old.url("truth"), tokio_postgres::NoTls).await.expect("connects");
    tokio::spawn(connection);
    client
}

/// Rows or the error's SQLSTATE, and the number of rows written.
async fn answer(client: &Client, sql: &str) -> Result<(Vec<String>, u64), String> {
    let answer = match client.simple_query(sql).await {
        Ok(answer) => answer,
        Err(error) => return Err(error.code().map_or_else(|| format!("{error:?}"), |code| code.code().to_owned())),
    };
    let (mut found, mut count) = (Vec::new(), 0);
    for message in answer {
        match message {
            SimpleQueryMessage::Row(row) => {
                let values: Vec<&str> = (0..row.len()).map(|at| row.get(at).unwrap_or("NULL")).collect();
                found.push(values.join("|"));
            }
            SimpleQueryMessage::CommandComplete(rows) => count = rows,
            _ => {}
        }
    }
    if !sql.contains("ORDER BY") || sql.contains(" OVER ") {
        found.sort();
    }
    Ok((found, count))
}

fn condition(random: &mut StdRng, of: &str) -> String {
    let id = random.random_range(1..430);
    match random.random_range(0..9) {
        0..4 => format!("{of}id = {id}"),
        4 => format!("{of}id BETWEEN {id} AND {}", id + random.random_range(0..6)),
        5 => format!("{of}owner = 'Ö{}' AND {of}size < {}", random.random_range(0..5), random.random_range(0..6)),
        6 => format!("{of}owner IS NULL AND {of}id % 17 = {}", random.random_range(0..17)),
        7 => format!("{of}id IN ({id}, {}, {})", id / 2 + 1, id / 3 + 1),
        _ => format!(
            "coalesce({of}taken, '2026-01-05') < timestamptz '2026-01-02' AND upper({of}owner) LIKE 'Ö{}%' AND {of}id < 90",
            random.random_range(0..5)
        ),
    }
}

fn write(random: &mut StdRng) -> String {
    let (id, size) = (random.random_range(1..430), random.random_range(0..60));
    match random.random_range(0..10) {
        0..3 => {
            format!("UPDATE photo SET size = size + {size} WHERE {} RETURNING id, size, owner", condition(random, ""))
        }
        3 => format!("UPDATE photo AS p SET owner = p.owner || 'x', taken = NULL WHERE {}", condition(random, "p.")),
        4 | 5 => format!("DELETE FROM photo WHERE {} RETURNING *", condition(random, "photo.")),
        6 => format!("INSERT INTO photo (id, size) VALUES ({id}, {size}), ({}, 1)", id + 1),
        7 => format!(
            "INSERT INTO photo (id, size, owner) VALUES ({id}, {size}, 'n'), ({}, 1, 'm') ON CONFLICT DO NOTHING RETURNING id",
            id + 2
        ),
        8 => format!(
            "INSERT INTO photo (size, id) VALUES ({size}, {id}), (3, {}) ON CONFLICT (id) DO UPDATE SET size = photo.size + EXCLUDED.size, owner = 'up' RETURNING id, size, taken",
            id + 3
        ),
        _ => format!("UPDATE photo SET id = {} WHERE id = {id}", random.random_range(1..430)),
    }
}

fn read(random: &mut StdRng) -> String {
    let condition = condition(random, "p.");
    let limit = random.random_range(1..30);
    match random.random_range(0..9) {
        0 | 1 => format!("SELECT * FROM photo p WHERE {condition}"),
        2 => format!(
            "SELECT id, owner COLLATE \"C\" FROM photo AS p ORDER BY owner COLLATE \"C\" DESC NULLS LAST, id LIMIT {limit} OFFSET {limit}"
        ),
        3 => "SELECT owner, count(*), sum(size), min(taken) FROM photo GROUP BY owner ORDER BY owner NULLS FIRST"
            .to_owned(),
        4 => format!("SELECT p.id, n.body FROM note n LEFT JOIN photo p ON p.id = n.id AND {condition}"),
        5 => format!(
            "SELECT n.id FROM note n WHERE NOT EXISTS (SELECT 1 FROM public.photo AS p WHERE p.id = n.id AND p.size > {limit})"
        ),
        6 => format!(
            "WITH big AS (SELECT * FROM photo WHERE size > 40) SELECT count(*), count(DISTINCT big.owner) FROM big JOIN photo p ON p.id = big.id + 1 WHERE p.size > {limit}"
        ),
        7 => format!(
            "SELECT id, rank() OVER (PARTITION BY owner ORDER BY size, id) FROM photo p WHERE {condition} UNION SELECT id, 0 FROM note WHERE id < {limit}"
        ),
        _ => format!("SELECT DISTINCT size FROM photo WHERE taken > '2026-01-03' ORDER BY size DESC LIMIT {limit}"),
    }
}

/// What is done to keys above `STEADY`: each is inserted and deleted as often as the answers say.
const STEADY: i64 = 40;
const KEYS: i64 = 120;

/// Writers at random while the table is completed and who completes it is killed: no row comes back, no write is lost, and no read is torn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_readers_and_a_backfill_that_is_killed() {
    let fill = format!("INSERT INTO photo SELECT n, 'old', 100 FROM generate_series(1, {KEYS}) n");
    let mut pair = lazily(&fill).await;
    let client = pair.client().await;
    client.batch_execute("UPDATE photo SET owner = 'both' WHERE id % 4 = 0").await.expect("writes");
    pair.proxy.settle().await;
    new_primary(&mut pair).await;
    let (writers, rounds) = if common::proof() { (16, 1500) } else { (8, 40) };
    let mut at_work = Vec::new();
    for seed in 0..writers {
        at_work.push(tokio::spawn(keep_writing(pair.client().await, seed, rounds)));
    }
    let sum = format!("SELECT sum(size), count(*) FROM photo WHERE id <= {STEADY}");
    let all = format!("{}|{STEADY}", 100 * STEADY);
    let mut killed = 0;
    while !at_work.iter().all(tokio::task::JoinHandle::is_finished) {
        assert_eq!(rows(&client, &sum).await, std::slice::from_ref(&all));
        if killed < 3 {
            // It is killed when the output is dropped.
            let fill = tokio::time::timeout(
                std::time::Duration::from_millis(40 << killed),
                pair.proxy.crossfade(&["backfill"]),
            )
            .await;
            killed += u32::from(fill.is_err());
        }
    }
    let mut balance = std::collections::BTreeMap::<i64, i64>::new();
    for writer in at_work {
        writer.await.expect("writes").into_iter().for_each(|(key, change)| *balance.entry(key).or_default() += change);
    }
    let there = rows(&client, "SELECT id FROM photo").await;
    for key in STEADY + 1..=KEYS {
        let expected = 1 + balance.get(&key).copied().unwrap_or(0);
        assert_eq!(i64::from(there.contains(&key.to_string())), expected, "key {key}");
    }
    let filled = pair.proxy.crossfade(&["backfill"]).await;
    assert!(filled.status.success(), "{filled:?}");
    assert_eq!(rows(&client, "SELECT count(*) FROM photo").await, [there.len().to_string()]);
    pair.proxy.settle().await;
    pair.databases.assert_equal().await;
}

/// Moves sizes between keys up to `STEADY`, deletes and inserts those above. Returns what that did to the number of rows of each key.
async fn keep_writing(client: Client, seed: u64, rounds: u32) -> Vec<(i64, i64)> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut done = Vec::new();
    for _ in 0..rounds {
        let key = random.random_range(STEADY + 1..=KEYS);
        match random.random_range(0..4) {
            0 => {
                let (a, b) = (random.random_range(1..STEADY), random.random_range(1..STEADY));
                let (a, b) = (a.min(b), a.max(b) + 1);
                let text = format!(
                    "BEGIN; UPDATE photo SET size = size - 7 WHERE id = {a}; UPDATE photo SET size = size + 7 WHERE id = {b}; COMMIT"
                );
                client.batch_execute(&text).await.expect("moves a size");
            }
            1 => {
                let deleted = client.execute("DELETE FROM photo WHERE id = $1", &[&key]).await.expect("deletes");
                done.push((key, -(deleted as i64)));
            }
            2 => {
                let sql = "INSERT INTO photo (id, size) VALUES ($1, 1) ON CONFLICT DO NOTHING";
                done.push((key, client.execute(sql, &[&key]).await.expect("inserts") as i64));
            }
            _ => match client.execute("INSERT INTO photo (id, size) VALUES ($1, 2)", &[&key]).await {
                Ok(inserted) => done.push((key, inserted as i64)),
                Err(error) => assert_eq!(error.code(), Some(&SqlState::UNIQUE_VIOLATION), "{error:?}"),
            },
        }
    }
    done
}
