//! `crossfade sweep` on real servers: what goes around the proxy is found and repaired, taints are spent without a walk, slots do not fill disks.

mod common;

use common::copy::copy;
use common::link::{Flow, Link, Trip, Way};
use common::pair::{APP, CONTROL, DATABASE, Pair};
use common::pgbench::try_pgbench;
use common::{Databases, Proxy, until};

const LOGICAL: &[(&str, &str)] = &[("wal_level", "logical")];
const FOLLOW: &str = "sweep: { follow: true }";

/// Two servers whose logs can be decoded, in `dual-write`, nothing owed.
async fn dual_write(schema: &str, more: &str) -> Pair {
    let databases = Databases::start(LOGICAL).await;
    databases.run_on_both(schema).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", more)).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let pair = Pair { proxy, databases };
    if more.contains("follow: true") {
        until("the sweep follows", async || pair.proxy.log().contains("written there side=old phase=dual-write")).await;
        // What it has found when it began is paid.
        pair.proxy.settle().await;
    }
    pair
}

/// The sweep reads a slot of old.
async fn slot(pair: &Pair) -> bool {
    let text = "SELECT count(*) FROM pg_replication_slots WHERE confirmed_flush_lsn IS NOT NULL";
    pair.databases.old.run(DATABASE, text).await.expect("reads").trim() == "1"
}

/// Writes around the proxy, as the application's role.
async fn around(pair: &Pair, script: &str) {
    let script = format!("SET ROLE app;\n{script}");
    pair.databases.old.run(DATABASE, &script).await.unwrap_or_else(|error| panic!("{script}: {error}"));
}

/// All that was written by now is swept: what the command said, and its status.
async fn sweep(proxy: &Proxy) -> (String, Option<i32>) {
    let output = proxy.crossfade(&["sweep"]).await;
    let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).join("");
    (said, output.status.code())
}

async fn swept(pair: &Pair) -> String {
    let (said, status) = sweep(&pair.proxy).await;
    assert_eq!(status, Some(0), "{said}");
    said
}

async fn on_new(pair: &Pair, sql: &str) -> String {
    pair.databases.new.run(DATABASE, sql).await.expect(sql).trim().to_owned()
}

const EVERYTHING: &str = "
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TABLE t (k int PRIMARY KEY, v text);
CREATE TABLE words (w text, n numeric, m mood, d date, PRIMARY KEY (w, n, m, d), v text);
CREATE TABLE lists (k int[] PRIMARY KEY, v text);
CREATE TABLE parent (id bigint PRIMARY KEY);
CREATE TABLE child (id bigint PRIMARY KEY, parent bigint REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE parts (k int, v text, PRIMARY KEY (k)) PARTITION BY RANGE (k);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
CREATE TABLE \"Parts 2\" PARTITION OF parts FOR VALUES FROM (100) TO (200);
CREATE TABLE audited (k int PRIMARY KEY, v text);
CREATE TABLE audit (id uuid DEFAULT gen_random_uuid() PRIMARY KEY, k int);
CREATE TABLE emptied (k int PRIMARY KEY);
CREATE TABLE rewritten (k int PRIMARY KEY, n int);
CREATE TABLE bare (k text COLLATE \"C\" NOT NULL UNIQUE, v text);
CREATE TABLE renamed (k text NOT NULL UNIQUE);
CREATE TABLE \"Odd 'name'\" (\"a \"\"b\" text PRIMARY KEY, v text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO audit (k) VALUES (NEW.k); RETURN NULL; END';
CREATE TRIGGER noted AFTER INSERT OR UPDATE ON audited FOR EACH ROW EXECUTE FUNCTION note();
CREATE FUNCTION add(at int) RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (at, ''by a function'') RETURNING k';
CREATE FUNCTION empty_it() RETURNS void LANGUAGE sql AS 'TRUNCATE emptied; INSERT INTO emptied VALUES (55)';
CREATE PROCEDURE twice(at int) LANGUAGE plpgsql AS 'BEGIN INSERT INTO t VALUES (at, ''one''); COMMIT; INSERT INTO t VALUES (at + 1, ''two''); END';
INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 200) n;
INSERT INTO words SELECT 'w' || n, n, 'ok', '2026-01-01', 'x' FROM generate_series(1, 20) n;
INSERT INTO lists VALUES ('{1,2}', 'a'), ('{3}', 'b');
INSERT INTO parent SELECT generate_series(1, 20);
INSERT INTO child SELECT n, n FROM generate_series(1, 20) n;
INSERT INTO parts SELECT n, 'x' FROM generate_series(1, 150) n;
INSERT INTO emptied SELECT generate_series(1, 10);
INSERT INTO rewritten SELECT n, n FROM generate_series(1, 10) n;
INSERT INTO bare SELECT 'b' || n, 'x' FROM generate_series(1, 10) n;
INSERT INTO renamed VALUES ('before');
INSERT INTO \"Odd 'name'\" VALUES ('it''s', 'x'), ('\\', 'y');
";

/// Every kind of write that the proxy does not see, in types of keys that are written in every way.
#[tokio::test(flavor = "multi_thread")]
async fn writes_around_the_proxy_are_repaired() {
    let pair = dual_write(EVERYTHING, FOLLOW).await;
    for script in [
        "INSERT INTO t VALUES (1001, 'it''s \\ new'); UPDATE t SET v = NULL WHERE k = 1; DELETE FROM t WHERE k = 2; UPDATE t SET k = 2002 WHERE k = 3;",
        "BEGIN; UPDATE t SET k = -k WHERE k BETWEEN 10 AND 20; SAVEPOINT a; DELETE FROM t; ROLLBACK TO a; INSERT INTO t VALUES (10, 'back'); COMMIT;",
        "UPDATE words SET v = 'around', n = n + 0.50 WHERE n < 5; DELETE FROM words WHERE n = 6; INSERT INTO words VALUES ('q''\"\\ {,}', -1.50, 'sad', '1999-12-31', ''), ('NULL', 'NaN', 'ok', 'infinity', NULL);",
        "UPDATE lists SET v = 'c' WHERE k = '{3}'; INSERT INTO lists VALUES ('{7,NULL}', 'd'); DELETE FROM lists WHERE k = '{1,2}';",
        "DELETE FROM parent WHERE id = 1; UPDATE parent SET id = 100 WHERE id = 2;",
        "UPDATE parts SET v = 'y' WHERE k % 10 = 0; UPDATE parts SET k = k + 180 WHERE k < 5; DELETE FROM parts WHERE k = 9; INSERT INTO parts VALUES (0, 'new');",
        "INSERT INTO audited VALUES (1, 'a'), (2, 'b'); UPDATE audited SET v = 'c';",
        "DO $$ BEGIN FOR n IN 300..309 LOOP INSERT INTO t VALUES (n, 'do'); END LOOP; END $$; SELECT add(400); CALL twice(500);",
        "MERGE INTO t USING (VALUES (600), (5)) AS s (k) ON t.k = s.k WHEN MATCHED THEN UPDATE SET v = 'merged' WHEN NOT MATCHED THEN INSERT VALUES (s.k, 'merged');",
        "WITH gone AS (DELETE FROM t WHERE k = 6 RETURNING k) INSERT INTO t SELECT k + 700, 'moved' FROM gone",
        "TRUNCATE emptied; INSERT INTO emptied VALUES (77);",
        "ALTER TABLE rewritten ALTER n TYPE int USING n * 10;",
        "UPDATE bare SET k = 'other' WHERE k = 'b1'; DELETE FROM bare WHERE k = 'b2'; INSERT INTO bare VALUES ('b11', 'new');",
        "UPDATE renamed SET k = 'after';",
        "UPDATE \"Odd 'name'\" SET v = 'z'; DELETE FROM \"Odd 'name'\" WHERE v = 'q'; INSERT INTO \"Odd 'name'\" VALUES ('''''', 'q'), ('\"', 'r');",
    ] {
        // MERGE came with 15.
        if !script.starts_with("MERGE") || pair.databases.old.version() >= 15 {
            around(&pair, script).await;
        }
    }
    let client = pair.databases.old.client(DATABASE).await.expect("connects");
    copy(&client, "COPY t FROM STDIN", &[b"801\tcopied\n802\t\\N\n"]).await.expect("copies");
    // By the proxy, or by the command where the proxy reads definitions again at that moment.
    let said = swept(&pair).await;
    assert!(pair.settle_and_assert_equal().await > 300);
    assert_eq!(on_new(&pair, "SELECT n FROM rewritten WHERE k = 7").await, "70");
    let lacking = "public.bare: its replica identity on old does not hold its key";
    assert!(pair.proxy.log().contains(lacking), "it is said what sweep lacks");
    for table in ["emptied", "bare", "renamed"] {
        let told = format!("no key says where: the whole table is owed table=public.{table}");
        let shown = format!("public.{table}: it was written around the proxy");
        until(&told, async || said.contains(&shown) || pair.proxy.log().contains(&told)).await;
    }
    // What goes through the proxy is not owed again, also where no key can be read.
    let before = format!("{}{said}", pair.proxy.log()).matches("no key says where").count();
    let client = pair.client().await;
    client
        .batch_execute(
            "TRUNCATE emptied; UPDATE bare SET v = 'through', k = k || 'x'; DELETE FROM bare WHERE k = 'b3x'",
        )
        .await
        .expect("writes");
    let more = swept(&pair).await;
    pair.settle_and_assert_equal().await;
    let after = format!("{}{said}{more}", pair.proxy.log()).matches("no key says where").count();
    assert_eq!(after, before, "proxied writes are known");
}

/// A partition that nobody has told of, rows in it, and one that is taken away.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_come_and_go_around_the_proxy_are_followed() {
    let schema = "CREATE TABLE parts (k int PRIMARY KEY, v text) PARTITION BY RANGE (k); CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100); \
        INSERT INTO parts SELECT n, 'x' FROM generate_series(1, 90) n";
    let pair = dual_write(schema, FOLLOW).await;
    let more = "CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (100) TO (200)";
    around(&pair, &format!("{more}; INSERT INTO parts SELECT n, 'y' FROM generate_series(100, 150) n")).await;
    pair.databases.new.run(DATABASE, &format!("SET ROLE app; {more}")).await.expect("on new, too");
    around(&pair, "UPDATE parts SET v = 'z' WHERE k > 140; DELETE FROM parts WHERE k = 101; UPDATE parts SET k = k + 180 WHERE k < 5").await;
    swept(&pair).await;
    pair.settle_and_assert_equal().await;
}

/// Interleaving: a statement out of sight taints; the sweep passes its transaction; the taint is spent. A row that differs and that no write
/// has touched stays different: no walk has cleared the taint.
#[tokio::test(flavor = "multi_thread")]
async fn a_taint_is_spent_without_a_walk() {
    let pair = dual_write(EVERYTHING, FOLLOW).await;
    on_new(&pair, "UPDATE t SET v = 'planted' WHERE k = 99").await;
    let client = pair.client().await;
    let before = pair.proxy.metrics("crossfade_taints_total").await;
    client.batch_execute("SELECT add(900)").await.expect("a function writes");
    client.batch_execute("DO $$ BEGIN UPDATE t SET v = 'by do' WHERE k = 50; END $$").await.expect("a block writes");
    client.batch_execute("CALL twice(910)").await.expect("a procedure writes");
    client
        .batch_execute("BEGIN; INSERT INTO audited VALUES (5, 'x'); SELECT add(901); COMMIT")
        .await
        .expect("a trigger writes");
    // What no key names is not spent.
    client.batch_execute("SELECT empty_it()").await.expect("a function empties a table");
    client.batch_execute("DO $$ BEGIN DELETE FROM bare; END $$").await.expect("a block writes");
    assert!(pair.proxy.metrics("crossfade_taints_total").await > before, "they taint");
    until("no table is tainted", async || {
        pair.proxy.metrics("crossfade_tainted_tables").await == 0.0
            && pair.proxy.metrics("crossfade_sweep_taints_cleared_total").await > 0.0
            && ledger(&pair).await == "0"
    })
    .await;
    let (_, differences) = common::compare::compare(&pair.databases.old, &pair.databases.new, DATABASE, &[]).await;
    assert_eq!(differences.len(), 2, "only what was planted differs: {differences:?}");
    assert_eq!(on_new(&pair, "SELECT count(*) FROM t WHERE v = 'planted'").await, "1");
}

async fn ledger(pair: &Pair) -> String {
    pair.databases.old.run(DATABASE, "SELECT count(*) FROM crossfade.ledger").await.expect("reads").trim().to_owned()
}

/// A slot that nobody reads is dropped past its limit, and the next sweep compares everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_keeps_too_much_log_is_dropped_loudly() {
    let schema =
        "CREATE TABLE t (k int PRIMARY KEY, v text); INSERT INTO t SELECT n, 'x' FROM generate_series(1, 1000) n";
    let pair = dual_write(schema, "sweep: { retain: 20MiB }").await;
    let said = swept(&pair).await;
    assert!(said.contains("0 changes swept") && slot(&pair).await, "{said}");
    around(&pair, "UPDATE t SET v = 'seen' WHERE k = 1").await;
    assert!(swept(&pair).await.contains("1 changes swept, 1 keys differed"));
    // Nobody sweeps any more.
    around(&pair, "UPDATE t SET v = repeat('y', 1500) WHERE k <= 500").await;
    for _ in 0..40 {
        around(&pair, "CREATE TEMP TABLE spill (v text); UPDATE t SET v = repeat('z', 1500) WHERE k <= 500").await;
    }
    until("the slot is dropped", async || pair.proxy.metrics("crossfade_sweep_lost_total").await == 1.0).await;
    assert!(!slot(&pair).await);
    let log = pair.proxy.log();
    assert!(
        log.contains("ERROR") && log.contains("the sweep's slot was dropped") && log.contains("sweep.retain"),
        "{log}"
    );
    around(&pair, "DELETE FROM t WHERE k = 7").await;
    let status = pair.proxy.crossfade(&["status"]).await;
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("sweep: its slot was given up: old kept"), "{status}");
    let said = swept(&pair).await;
    assert!(said.contains("0 changes swept"), "a slot of its own: {said}");
    pair.settle_and_assert_equal().await;
}

/// A sweep of its own, over a line.
fn consumer(pair: &Pair, link: &Link, dir: &std::path::Path) -> tokio::process::Child {
    let file = dir.join("crossfade.yaml");
    let old = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
    let new = pair.databases.new.url_as(CONTROL.0, CONTROL.1, DATABASE);
    std::fs::write(&file, format!("listen: 127.0.0.1:1\nold: {old}\nnew: {new}\nphase: dual-write\n")).expect("writes");
    tokio::process::Command::new(env!("CARGO_BIN_EXE_crossfade"))
        .args(["sweep", "--follow", "--config"])
        .arg(&file)
        .stdout(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("runs")
}

/// The consumer is killed before its debts are entered, and between that and the move of the slot: the next one finds what it has read.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_is_killed_loses_nothing() {
    let schema =
        "CREATE TABLE t (k int PRIMARY KEY, v text); INSERT INTO t SELECT n, 'x' FROM generate_series(1, 1000) n";
    let pair = dual_write(schema, "").await;
    swept(&pair).await;
    let dir = tempfile::tempdir().expect("a directory");
    for (round, message) in ["INSERT INTO crossfade.ledger", "pg_replication_slot_advance"].into_iter().enumerate() {
        let link = Link::to(pair.databases.old.port()).await;
        let about_to = link.trip(Way::ToServer, message.as_bytes(), Trip::HoldBefore);
        around(
            &pair,
            &format!("UPDATE t SET v = 'round {round}' WHERE k % 10 = {round}; DELETE FROM t WHERE k = 500 + {round}"),
        )
        .await;
        let mut killed = consumer(&pair, &link, dir.path());
        tokio::time::timeout(common::PATIENCE, about_to).await.expect("in time").expect("it is about to");
        killed.start_kill().expect("kills");
        killed.wait().await.expect("ends");
        drop(link);
        until("the killed one's sessions have ended", async || {
            let text = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'crossfade sweep'";
            pair.databases.old.run(DATABASE, text).await.expect("reads").trim() == "0"
        })
        .await;
        let said = swept(&pair).await;
        assert!(said.contains("101 changes swept") || said.contains("100 changes swept"), "read again: {said}");
        pair.settle_and_assert_equal().await;
    }
}

/// 100,000 rows in one transaction around the proxy.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_changes_are_swept_in_bounded_memory() {
    let schema = "CREATE TABLE t (k int PRIMARY KEY, v text); INSERT INTO t SELECT n, repeat('x', 1000) FROM generate_series(1, 100000) n";
    let pair = dual_write(schema, FOLLOW).await;
    let before = pair.proxy.peak_memory_bytes();
    around(&pair, "UPDATE t SET v = repeat('y', 1000)").await;
    swept(&pair).await;
    pair.settle_and_assert_equal().await;
    let grown = pair.proxy.peak_memory_bytes() - before;
    println!("peak before {} MiB, grown by {} MiB", before >> 20, grown >> 20);
    assert!(grown < 64 << 20, "grown by {grown} bytes");
    assert!(pair.proxy.metrics("crossfade_sweep_changes_total").await >= 100_000.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_logical_decoding_it_is_said_what_is_needed() {
    let pair = Pair::dual_write("CREATE TABLE t (k int PRIMARY KEY)", "").await;
    let (said, status) = sweep(&pair.proxy).await;
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("wal_level = replica") && said.contains("ALTER SYSTEM SET wal_level = 'logical'"), "{said}");
    let mut proxy = pair.proxy;
    proxy.set_more(FOLLOW);
    let checked = proxy.crossfade(&["check"]).await;
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.code() == Some(1) && said.contains("wal_level"), "{said}");
    until("the proxy says it, too", async || proxy.log().contains("ALTER SYSTEM SET wal_level")).await;
}

/// Two servers, dual-write, the proxy's way to new over a line.
async fn over_a_link(schema: &str, more: &str) -> (Pair, Link) {
    let databases = Databases::start(LOGICAL).await;
    databases.run_on_both(schema).await;
    let link = Link::to(databases.new.port()).await;
    let new = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
    let config = databases.proxy_config("old", more);
    let mut proxy = Proxy::start(common::ProxyConfig { new, ..config }).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    (Pair { proxy, databases }, link)
}

const SYNC: &[u8] = b"S\0\0\0\x04";
const TABLE: &str =
    "CREATE TABLE t (k int PRIMARY KEY, v text); INSERT INTO t SELECT n, 'x' FROM generate_series(1, 10) n";

/// Interleaving: T1 writes B over A through the proxy, and its COMMIT is late on the mirror; T2 writes A again around it; the sweep finds A on both
/// sides; then B arrives.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_equal_by_chance_is_not_passed_over() {
    let (pair, link) = over_a_link(TABLE, "mirror: { timeout: 30s }").await;
    swept(&pair).await;
    let held = link.trip_behind(b"the B of T1", Way::ToServer, SYNC, Trip::HoldBefore);
    let client = pair.client().await;
    client.batch_execute("UPDATE t SET v = 'the B of T1' WHERE k = 1").await.expect("is acknowledged");
    held.await.expect("is held");
    around(&pair, "UPDATE t SET v = 'x' WHERE k = 1").await;
    assert_eq!(on_new(&pair, "SELECT v FROM t WHERE k = 1").await, "x");
    let said = swept(&pair).await;
    assert!(said.contains("1 keys differed"), "{said}");
    link.release();
    until("B has arrived, and is repaired", async || ledger(&pair).await == "0").await;
    pair.settle_and_assert_equal().await;
    assert_eq!(on_new(&pair, "SELECT v FROM t WHERE k = 1").await, "x");
}

/// Interleaving: a repairer that walks a table has deleted a row on the mirror, not committed, because the authority had none; the row comes back
/// around the proxy, as it was; the sweep finds both equal; then the repairer commits.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_a_walk_is_about_to_delete_is_not_passed_over() {
    let pair = dual_write(TABLE, "").await;
    swept(&pair).await;
    let number = pair.databases.old.run(DATABASE, "SELECT number FROM crossfade.tables").await.expect("reads");
    let number: i32 = number.trim().parse().expect("a number");
    let walker = pair.databases.new.client(DATABASE).await.expect("connects");
    // As `locks::Kind::Table`: nobody else walks meanwhile.
    let lock = format!("SELECT pg_advisory_lock({}, {number}); BEGIN; DELETE FROM t WHERE k = 5", 0x4346_5442);
    walker.batch_execute(&lock).await.expect("deletes");
    let debt =
        format!("INSERT INTO crossfade.ledger (id, debts, reason) VALUES (1, int4send({number}) || 'T', 'test')");
    pair.databases.old.run(DATABASE, &debt).await.expect("owes");
    around(&pair, "DELETE FROM t WHERE k = 5; INSERT INTO t VALUES (5, 'x')").await;
    let said = swept(&pair).await;
    assert!(said.contains("1 keys differed"), "{said}");
    pair.databases
        .old
        .run(DATABASE, "DELETE FROM crossfade.ledger WHERE id = 1")
        .await
        .expect("as if the walk were done");
    walker.batch_execute("COMMIT").await.expect("commits");
    assert_eq!(pair.settle_and_assert_equal().await, 10);
}

/// Interleaving: T's commit is in the log, and its backend waits for a synchronous standby: nobody sees T yet. The sweep reads it there.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_nobody_sees_yet_is_waited_for() {
    let pair = dual_write(TABLE, FOLLOW).await;
    let old = &pair.databases.old;
    old.run(DATABASE, "ALTER DATABASE shop SET synchronous_commit = local").await.expect("sets");
    let standby = async |name: &str| {
        old.run(DATABASE, &format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'")).await.expect("sets");
        old.run(DATABASE, "SELECT pg_reload_conf()").await.expect("reloads");
        until("the setting holds", async || {
            old.run(DATABASE, "SHOW synchronous_standby_names").await.expect("shows").trim() == name
        })
        .await;
    };
    standby("nobody").await;
    let writer = old.client(DATABASE).await.expect("connects");
    let committing = tokio::spawn(async move {
        writer.batch_execute("SET synchronous_commit = on; INSERT INTO t VALUES (77, 'unseen')").await
    });
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%unseen%' AND pid <> pg_backend_pid()";
    until("it waits for the standby", async || old.run(DATABASE, waiting).await.expect("reads").trim() == "1").await;
    assert_eq!(old.run(DATABASE, "SELECT count(*) FROM t WHERE k = 77").await.expect("reads").trim(), "0");
    let end = old.run(DATABASE, "SELECT pg_current_wal_flush_lsn()").await.expect("reads");
    let passed = format!("SELECT confirmed_flush_lsn >= '{}' FROM pg_replication_slots", end.trim());
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(150)).await;
        assert_eq!(old.run(DATABASE, &passed).await.expect("reads").trim(), "f", "it was passed over");
    }
    standby("").await;
    committing.await.expect("ends").expect("commits");
    swept(&pair).await;
    assert_eq!(pair.settle_and_assert_equal().await, 11);
}

/// Import and capture before any dual write: new is there when the phase moves.
#[tokio::test(flavor = "multi_thread")]
async fn in_phase_old_a_sweep_follows_a_backfill() {
    let databases = Databases::start(LOGICAL).await;
    databases
        .run_on_both("CREATE TABLE t (k int PRIMARY KEY, v text, n int DEFAULT 0); CREATE TABLE u (w text PRIMARY KEY)")
        .await;
    databases
        .old
        .run(DATABASE, "INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 20000) n")
        .await
        .expect("fills");
    let proxy = Proxy::start(databases.proxy_config("old", "")).await;
    let refused = proxy.crossfade(&["backfill"]).await;
    assert_eq!(refused.status.code(), Some(2), "nothing would carry over what is written meanwhile");
    let mut pair = Pair { proxy, databases };
    pair.proxy.set_more(FOLLOW);
    until("it follows", async || pair.proxy.log().contains("written there side=old phase=old")).await;
    let client = pair.client().await;
    let writing = async {
        for n in 0..300 {
            let k = (n * 7919) % 20_000;
            let through = format!(
                "UPDATE t SET n = {n} WHERE k = {k}; DELETE FROM t WHERE k = {k} + 1; UPDATE t SET k = k + 100000 WHERE k = {k} + 2; INSERT INTO u VALUES ('{n}')"
            );
            client.batch_execute(&through).await.expect("writes");
        }
    };
    let (filled, ()) = tokio::join!(pair.proxy.crossfade(&["backfill", "--rate", "20000"]), writing);
    assert_eq!(filled.status.code(), Some(0), "{}", String::from_utf8_lossy(&filled.stderr));
    swept(&pair).await;
    until("new is up to date", async || ledger(&pair).await == "0").await;
    let rows = pair.databases.assert_equal().await;
    assert!(rows > 19_000, "{rows}");
    client.batch_execute("UPDATE t SET v = 'the last of phase old' WHERE k = 1000").await.expect("writes");
    pair.proxy.set_phase("dual-write").await;
    client.batch_execute("UPDATE t SET v = 'the first of dual-write' WHERE k = 1001").await.expect("writes");
    assert_eq!(pair.settle_and_assert_equal().await, rows);
}

/// With the migration the slot goes.
#[tokio::test(flavor = "multi_thread")]
async fn uninstall_drops_the_slot() {
    let mut pair = dual_write(TABLE, FOLLOW).await;
    assert!(slot(&pair).await);
    pair.proxy.set_phase("old").await;
    pair.proxy.terminate().await;
    let output = pair.proxy.crossfade(&["uninstall"]).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("old: the sweep's slot is dropped"), "{said}");
    assert!(!slot(&pair).await);
}

/// Of a table without a key nothing can be compared: a write around the proxy is said, and owed until it is copied by name.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key_is_owed_when_it_is_written_around_the_proxy() {
    let pair = dual_write("CREATE TABLE log (v text); INSERT INTO log VALUES ('a'), ('a')", FOLLOW).await;
    let client = pair.client().await;
    client.batch_execute("INSERT INTO log VALUES ('through')").await.expect("writes");
    swept(&pair).await;
    pair.settle_and_assert_equal().await;
    around(&pair, "UPDATE log SET v = 'b'; INSERT INTO log VALUES ('around')").await;
    swept(&pair).await;
    assert_eq!(ledger(&pair).await, "1");
    let copied = pair.proxy.crossfade(&["repair", "--table", "log"]).await;
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    assert_eq!(pair.settle_and_assert_equal().await, 4);
}

/// Clients through the proxy and around it write the same rows, at full speed and at 500 in a second; the proxy is killed in between. New is equal within
/// seconds of the end.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_rows_written_through_and_around_the_proxy_end_equal() {
    let schema = "CREATE TABLE t (k int PRIMARY KEY, v text, n int DEFAULT 0); INSERT INTO t SELECT n, 'x' FROM generate_series(1, 2000) n; \
        CREATE TABLE u (a int, b text, PRIMARY KEY (a, b))";
    let mut pair = dual_write(schema, FOLLOW).await;
    let dir = tempfile::tempdir().expect("a directory");
    let script = dir.path().join("script");
    let text = "\\set k random(1, 60)\n\\set l random(1, 2000)\nUPDATE t SET n = n + 1, v = 'a' WHERE k = :k;\nDELETE FROM t WHERE k = :l;\n\
        INSERT INTO t VALUES (:l, 'back') ON CONFLICT (k) DO UPDATE SET v = t.v || 'z', n = 0;\nUPDATE t SET v = 'a' WHERE k = :l;\n\
        INSERT INTO u VALUES (:k, :l % 7) ON CONFLICT DO NOTHING;\nDELETE FROM u WHERE a = :k AND b = (:l % 5)::text;\n";
    std::fs::write(&script, text).expect("writes");
    let script = script.to_string_lossy().into_owned();
    let program = pair.databases.old.program("pgbench");
    let around = pair.databases.old.url_as(APP.0, APP.1, DATABASE);
    let seconds = if common::proof() { "60" } else { "5" };
    for round in 0..2 {
        let (through, aside) = (pair.url(), around.clone());
        let one = ["-n", "-c", "4", "-T", seconds, "-f", &script];
        let two = ["-n", "-c", "2", "-T", seconds, "-R", "100", "-f", &script];
        let (through, aside) = tokio::join!(try_pgbench(&program, &through, &one), async {
            let load = try_pgbench(&program, &aside, &two);
            if round == 0 {
                return load.await;
            }
            let kill = async {
                tokio::time::sleep(std::time::Duration::from_secs(2)).await;
                pair.proxy.restart().await;
            };
            tokio::join!(load, kill).0
        });
        assert!(aside.expect("the load around runs").transactions > 100);
        assert!(round == 1 || through.expect("the load through runs").transactions > 100);
        let ended = std::time::Instant::now();
        swept(&pair).await;
        pair.settle_and_assert_equal().await;
        println!("equal {:?} after the end", ended.elapsed());
    }
    let owed = pair.proxy.metrics("crossfade_sweep_owed_keys_total").await;
    println!("keys owed by the sweep: {owed}; changes {}", pair.proxy.metrics("crossfade_sweep_changes_total").await);
}

/// Interleaving: a row was written around the proxy on old, and the sweep has not read it when the authority moves. The move waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn the_authority_does_not_move_before_the_sweep_has_passed() {
    let mut pair = dual_write(TABLE, "").await;
    let (link, dir) = (Link::to(pair.databases.old.port()).await, tempfile::tempdir().expect("a directory"));
    let follower = consumer(&pair, &link, dir.path());
    until("it follows", async || slot(&pair).await).await;
    let client = pair.client().await;
    pair.proxy.verify().await;
    client.batch_execute("BEGIN; UPDATE t SET v = 'open' WHERE k = 1").await.expect("holds the gate open");
    pair.proxy.request_phase("new-primary");
    // The gate is closed, and waits for the transaction.
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    link.set_both(Flow::Stall);
    around(&pair, "INSERT INTO t VALUES (500, 'late')").await;
    client.batch_execute("COMMIT").await.expect("commits");
    until("the move has waited in vain", async || pair.proxy.log().contains("the sweep has not passed")).await;
    assert!(pair.proxy.holds("dual-write").await);
    link.set_both(Flow::Pass);
    // A move that has held clients in vain waits before it tries again, unless somebody asks.
    pair.proxy.hang_up();
    pair.proxy.set_phase("new-primary").await;
    assert_eq!(on_new(&pair, "SELECT v FROM t WHERE k = 500").await, "late");
    drop(follower);
}

/// What is written around the proxy on either side of a change of authority, and of the way back.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_follows_the_authority() {
    let mut pair = dual_write(TABLE, FOLLOW).await;
    let kept = "SELECT count(*) FROM pg_replication_slots";
    until("new has a slot as well", async || on_new(&pair, kept).await == "1").await;
    around(&pair, "UPDATE t SET v = 'on old' WHERE k = 1").await;
    pair.proxy.set_phase("new-primary").await;
    on_new(&pair, "SET ROLE app; UPDATE t SET v = 'on new' WHERE k = 2; DELETE FROM t WHERE k = 3").await;
    swept(&pair).await;
    assert_eq!(pair.settle_and_assert_equal().await, 9);
    pair.proxy.set_phase("dual-write").await;
    around(&pair, "UPDATE t SET v = 'on old again' WHERE k = 4").await;
    swept(&pair).await;
    pair.settle_and_assert_equal().await;
    assert_eq!(
        on_new(&pair, "SELECT string_agg(v, ', ' ORDER BY k) FROM t WHERE k < 5").await,
        "on old, on new, on old again"
    );
    // Nobody writes to old any more.
    pair.proxy.set_phase("new").await;
    until("no slot is left", async || !slot(&pair).await && on_new(&pair, kept).await == "0").await;
}

/// A sweep that nobody goes on with says nothing of what was written since.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_that_nobody_follows_closes_the_way() {
    let mut pair = dual_write(TABLE, "").await;
    swept(&pair).await;
    pair.proxy.verify().await;
    pair.proxy.request_phase("new-primary");
    until("the move waits", async || pair.proxy.log().contains("nobody follows it")).await;
    assert!(pair.proxy.holds("dual-write").await);
    let ended = pair.proxy.crossfade(&["sweep", "--end"]).await;
    assert!(ended.status.success() && !slot(&pair).await);
    pair.proxy.set_phase("new-primary").await;
}
