//! `crossfade backfill` of a database with years of data, while clients write through the proxy, with kills; every type of key; several at once; both ways.

mod backfill_support;
mod common;

use std::time::{Duration, Instant};

use backfill_support::Stage;
use backfill_support::shop::{Load, SHOP, years};
use common::link::{Flow, Trip, Way};
use common::pair::DATABASE;
use common::{Databases, Proxy, proof, until};

/// Of accounts.
fn rows() -> u64 {
    if proof() { 5_000_000 } else { 60_000 }
}

#[tokio::test(flavor = "multi_thread")]
async fn years_of_data_come_over_while_clients_write_and_the_worker_is_killed() {
    let stage = Stage::new(SHOP, &years(rows()), 3).await;
    let rows = rows();
    let load = Load::start(&stage.proxy, if proof() { 16 } else { 4 }, rows);
    let done = async || -> i64 {
        stage.on_old("SELECT coalesce(sum(rows), 0) FROM crossfade.backfill").await.parse().expect("a number")
    };
    let mut killed = stage.backfill(&["--jobs", "2", "--rate", "20000"]);
    for number in 1..=3 {
        stage.let_begin(number).await;
        // Key debts are paid by the proxy all the while.
        stage.free_keys(number).await;
    }
    let kills = if proof() { 20 } else { 4 };
    for kill in 1..=kills {
        // In the middle.
        let before = done().await;
        until("rows are copied", async || done().await > before || killed.has_ended()).await;
        tokio::time::sleep(Duration::from_millis(kill * 37 % 200)).await;
        killed.kill();
        // The last one as fast as it can.
        let slowly: &[&str] = if kill < kills { &["--jobs", "2", "--rate", "20000"] } else { &["--jobs", "2"] };
        killed = stage.backfill(slowly);
    }
    let copied = done().await;
    let (status, said) = killed.end().await;
    assert!(status.success(), "{said}");
    let transactions = load.end().await;
    eprintln!("{copied} rows by those that were killed, then: {said}{transactions} transactions beside it");
    assert!(copied > 0 && transactions > 50, "{transactions} transactions");
    assert!(stage.settle().await > rows);
    let analysed = "SELECT count(*) FROM pg_stat_user_tables WHERE relname IN ('accounts', 'entries', 'serials') AND last_analyze IS NOT NULL";
    until("new's planner has seen the tables", async || stage.on_new(analysed).await == "3").await;
    let next = "SELECT last_value FROM serials_n_seq";
    let (old, new): (i64, i64) =
        (stage.on_old(next).await.parse().expect("a number"), stage.on_new(next).await.parse().expect("a number"));
    assert!(new > 1 && new <= old + 1, "the sequence of new was set to where old's was: {new} after {old}");
}

/// Every type of key, and tables that COPY or ON CONFLICT cannot take.
const KINDS: &str = "CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
    CREATE COLLATION german (provider = icu, locale = 'de-u-ks-level2', deterministic = false);
    CREATE TABLE by_uuid (k uuid PRIMARY KEY, v text);
    CREATE TABLE by_text (k text COLLATE \"und-x-icu\" PRIMARY KEY, v int);
    CREATE TABLE by_german (k text COLLATE german PRIMARY KEY, v int);
    CREATE TABLE by_many (a int, b text COLLATE \"C\", c timestamptz, d date, v mood, PRIMARY KEY (b, a, c, d));
    CREATE TABLE by_mood (k mood PRIMARY KEY, v int);
    CREATE TABLE by_array (k int[] PRIMARY KEY, v mood[]);
    CREATE TABLE by_numeric (k numeric PRIMARY KEY, v bytea);
    CREATE TABLE by_unique (k int NOT NULL UNIQUE, u text UNIQUE, v int GENERATED ALWAYS AS (k * 2) STORED, i int GENERATED ALWAYS AS IDENTITY);
    CREATE TABLE later (k int PRIMARY KEY DEFERRABLE INITIALLY IMMEDIATE, v int);
    CREATE TABLE parted (k int, day date, v text, PRIMARY KEY (k, day)) PARTITION BY RANGE (day);
    CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
    CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM ('2021-01-01') TO ('2022-01-01');
    CREATE TABLE wide (k int PRIMARY KEY, v text); CREATE TABLE empty (k int PRIMARY KEY);
    CREATE TABLE one_column (k bigint PRIMARY KEY);";
const KINDS_ROWS: &str = "INSERT INTO by_uuid SELECT md5(n::text)::uuid, n FROM generate_series(1, 1500) n;
    INSERT INTO by_text SELECT chr(65 + n % 58) || chr(192 + n % 60) || n, n FROM generate_series(1, 1500) n;
    INSERT INTO by_german SELECT 'Straße ' || n, n FROM generate_series(1, 600) n;
    INSERT INTO by_many SELECT n % 7, 'b' || n, timestamptz '2020-01-01' + n * interval '1 hour', '2020-01-01', 'ok' FROM generate_series(1, 1500) n;
    INSERT INTO by_mood VALUES ('sad', 1), ('happy', 2), ('ok', 3);
    INSERT INTO by_array SELECT ARRAY[n % 9, n], ARRAY['ok', 'sad']::mood[] FROM generate_series(1, 200) n;
    INSERT INTO by_numeric SELECT n / 3.0, decode(md5(n::text), 'hex') FROM generate_series(1, 1500) n;
    INSERT INTO by_unique (k, u) SELECT n, 'u' || n FROM generate_series(1, 1500) n;
    INSERT INTO later SELECT n, n FROM generate_series(1, 1500) n;
    INSERT INTO parted SELECT n, date '2020-01-01' + n % 700, n FROM generate_series(1, 1500) n;
    INSERT INTO wide SELECT n, repeat('x' || n, 300000) FROM generate_series(1, 12) n;
    INSERT INTO one_column SELECT n FROM generate_series(1, 1500) n;";
const KINDS_TABLES: i32 = 13;

#[tokio::test(flavor = "multi_thread")]
async fn every_type_of_key_comes_over() {
    // Some rows are on new already, one of them with a unique value that belongs to another row.
    let before =
        "INSERT INTO by_unique (k, u) VALUES (3, 'u4'), (5000, 'u5'); INSERT INTO later VALUES (2, 99), (-2, 0);
        INSERT INTO by_text VALUES ('zzz', 1); INSERT INTO by_mood VALUES ('ok', 0)";
    let stage = Stage::with(KINDS, KINDS_ROWS, before, KINDS_TABLES).await;
    stage.free_all().await;
    let rows = stage.finish().await;
    assert!(rows > 12_000, "{rows}");
}

/// As interleaving 3, where the two sides cannot be trusted to order keys alike.
#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_found_in_work_is_recovered_whatever_the_order_of_keys() {
    let schema = "CREATE TABLE t (k text COLLATE \"und-x-icu\" PRIMARY KEY, v int)";
    let stage = Stage::new(schema, "INSERT INTO t SELECT 'k' || n, n FROM generate_series(1, 50) n", 1).await;
    let client = stage.client().await;
    let copying = stage.mirror.trip(Way::ToServer, b"COPY \"public\".\"t\"", Trip::StallBefore);
    let looking = stage.authority.trip(Way::ToServer, b"FILTER (WHERE t.xmax", Trip::StallBefore);
    let first = stage.backfill(&[]);
    stage.let_begin(1).await;
    copying.await.expect("the chunk is read");
    client.batch_execute("DELETE FROM t WHERE v = 5").await.expect("deletes");
    stage.mirror.set(Way::ToServer, Flow::Pass);
    looking.await.expect("the chunk is committed");
    first.kill();
    stage.authority.set(Way::ToServer, Flow::Pass);
    assert_eq!(stage.finish().await, 49);
}

/// Two backfills and the proxy's repair at once: nobody fails, and no row is copied twice.
#[tokio::test(flavor = "multi_thread")]
async fn several_backfills_share_the_work() {
    let schema = "CREATE TABLE t (k int PRIMARY KEY, v char(200)); CREATE TABLE u (k int PRIMARY KEY)";
    let rows =
        "INSERT INTO t SELECT n, 'x' FROM generate_series(1, 30000) n; INSERT INTO u SELECT generate_series(1, 3000)";
    let stage = Stage::new(schema, rows, 2).await;
    let running = [stage.backfill(&["--jobs", "2"]), stage.backfill(&["--jobs", "2"])];
    for number in [1, 2] {
        stage.let_begin(number).await;
    }
    stage.free_all().await;
    for running in running {
        let (status, said) = running.end().await;
        assert!(status.success(), "{status}: {said}");
    }
    let parts = stage.on_old("SELECT count(*) || ' ' || bool_and(done) FROM crossfade.backfill WHERE number = 1").await;
    assert!(parts.ends_with("true") && !parts.starts_with("1 "), "{parts}");
    assert_eq!(stage.on_old("SELECT sum(rows) FROM crossfade.backfill").await, "33000", "each part was done once");
    assert_eq!(stage.settle().await, 33_000);
}

/// The phase goes back while a chunk of some part is under way, and forward again, with another cut: the next backfill waits for the first one, which
/// ends and says so.
#[tokio::test(flavor = "multi_thread")]
async fn the_phase_goes_back_and_forth_under_a_backfill() {
    let schema = "CREATE TABLE t (k int PRIMARY KEY, v char(200))";
    let mut stage = Stage::new(schema, "INSERT INTO t SELECT n, 'row' FROM generate_series(1, 20000) n", 1).await;
    let running = stage.backfill(&["--jobs", "1", "--rate", "5000"]);
    stage.let_begin(1).await;
    until("a part is done", async || stage.on_old("SELECT bool_or(done) FROM crossfade.backfill").await == "t").await;
    // Before its transaction on new has begun: nobody can see that it is about to write.
    let beginning = b"BEGIN; SET LOCAL synchronous_commit = on; SET LOCAL statement_timeout";
    let copying = stage.mirror.trip(Way::ToServer, beginning, Trip::StallBefore);
    copying.await.expect("a chunk of another part is under way");
    stage.proxy.set_phase("old").await;
    let client = stage.client().await;
    client.batch_execute("DELETE FROM t WHERE k > 5").await.expect("deletes, unmirrored");
    stage.databases.old.run(DATABASE, "VACUUM FULL t").await.expect("shrinks");
    stage.proxy.set_phase("dual-write").await;
    stage.free_all().await;
    let mut second = stage.backfill_straight();
    // The first one's rows may still come.
    stage.asks(1).await;
    assert!(!second.has_ended() && stage.debts().await > 0);
    stage.mirror.set(Way::ToServer, Flow::Pass);
    let (status, said) = running.end().await;
    assert!(status.code() == Some(1) && said.contains("the phase has moved to"), "{said}");
    let (status, said) = second.end().await;
    assert!(status.success(), "{said}");
    assert_eq!(stage.settle().await, 5);
}

/// New crashes in the middle: the backfill goes on when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn new_crashes_under_a_backfill() {
    let schema = "CREATE TABLE t (k int PRIMARY KEY, v char(200))";
    let mut stage = Stage::new(schema, "INSERT INTO t SELECT n, 'row' FROM generate_series(1, 20000) n", 1).await;
    let running = stage.backfill(&["--rate", "5000"]);
    stage.let_begin(1).await;
    for _ in 0..2 {
        let rows = stage.on_old("SELECT sum(rows) FROM crossfade.backfill").await;
        until("rows are copied", async || stage.on_old("SELECT sum(rows) FROM crossfade.backfill").await != rows).await;
        stage.databases.new.kill9();
        stage.databases.new.start().await.expect("new is back");
    }
    let (status, said) = running.end().await;
    assert!(status.success() && said.contains("trying again"), "{said}");
    stage.proxy.settle().await;
    assert_eq!(stage.databases.assert_equal().await, 20_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_goes_the_other_way_keeps_its_rate_and_takes_one_table() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both("CREATE TABLE t (k int PRIMARY KEY, v text); CREATE TABLE u (k int PRIMARY KEY)").await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    let said = proxy.crossfade(&["backfill"]).await;
    assert!(
        said.status.code() == Some(2) && String::from_utf8_lossy(&said.stderr).contains("phase: dual-write"),
        "{said:?}"
    );
    for phase in ["dual-write", "new-primary", "new"] {
        proxy.set_phase(phase).await;
    }
    databases
        .new
        .run(DATABASE, "INSERT INTO t SELECT n, 'new' FROM generate_series(1, 6000) n; INSERT INTO u VALUES (1)")
        .await
        .expect("fills new");
    proxy.set_phase("new-primary").await;
    let said = proxy.crossfade(&["backfill"]).await;
    assert!(said.status.code() == Some(2) && String::from_utf8_lossy(&said.stderr).contains("--reverse"), "{said:?}");
    proxy.settle().await;
    // By name, though nothing is owed any more; slowly.
    databases.old.run(DATABASE, "DELETE FROM t").await.expect("spoils old");
    let begun = Instant::now();
    let said = proxy.crossfade(&["backfill", "--reverse", "--rate", "2000", "public.t"]).await;
    assert!(said.status.success(), "{said:?}");
    assert!(
        begun.elapsed() > Duration::from_millis(1500),
        "6000 rows at 2000 a second, with a second's worth at once: {:?}",
        begun.elapsed()
    );
    proxy.settle().await;
    assert_eq!(databases.assert_equal().await, 6001);
    let said = proxy.crossfade(&["backfill", "--reverse", "nothing"]).await;
    assert!(
        said.status.code() == Some(2) && String::from_utf8_lossy(&said.stderr).contains("no migrating table"),
        "{said:?}"
    );
}
