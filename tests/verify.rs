//! `crossfade verify` on real servers: planted differences of every kind are named, no other is, while clients write; what is mended is equal.

mod common;

use std::time::Duration;

use common::link::{Flow, Link, Trip, Way};
use common::pair::{CONTROL, DATABASE, Pair};
use common::pgbench::try_pgbench;
use common::{Databases, Proxy};
use serde_json::Value;

/// Runs verify: its document, and its status.
async fn verify(proxy: &Proxy, arguments: &[&str]) -> (Value, Option<i32>) {
    let output = proxy.crossfade(&[&["verify", "--json"], arguments].concat()).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let document =
        serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
    (document, output.status.code())
}

/// `key how columns` of every row that differs of a table, sorted.
fn differences(document: &Value, table: &str) -> Vec<String> {
    let tables = document["tables"].as_array().expect("a list");
    let found = tables.iter().find(|found| found["table"] == table).unwrap_or_else(|| panic!("{table}: {document:#}"));
    let join = |value: &Value| -> String {
        let values: Vec<&str> = match value {
            Value::Object(map) => map.values().filter_map(Value::as_str).collect(),
            other => other.as_array().into_iter().flatten().filter_map(Value::as_str).collect(),
        };
        values.join(",")
    };
    let line = |difference: &Value| {
        format!(
            "{} {} {}",
            join(&difference["key"]),
            difference["how"].as_str().unwrap_or_default(),
            join(&difference["columns"])
        )
    };
    let mut lines: Vec<String> =
        found["different"].as_array().into_iter().flatten().map(|found| line(found).trim().to_owned()).collect();
    lines.sort();
    lines
}

const TYPES: &str = "
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TYPE pair AS (m mood, n numeric);
";
const COLUMNS: &str = "f float8, n numeric, j jsonb, js json, a int[], m mood, ms mood[], p pair, ts timestamptz, c char(5), b bytea, x xml, r int4range, i interval, t text";

/// One row that differs in one column for each thing that a client can tell; other order of columns, other OIDs, another collation on new.
#[tokio::test(flavor = "multi_thread")]
async fn differences_of_every_type_are_named() {
    let databases = Databases::start(&[]).await;
    let mut other_order: Vec<&str> = COLUMNS.split(", ").collect();
    other_order.reverse();
    let table = |columns: &str, collation: &str| {
        format!(
            "{TYPES} CREATE TABLE v (id int PRIMARY KEY, {columns}); CREATE TABLE words (w text COLLATE {collation} PRIMARY KEY, n int)"
        )
    };
    let run = async |side: &crossfade::cluster::Cluster, script: &str| {
        side.run(DATABASE, &format!("SET ROLE app; {script}")).await.expect(script)
    };
    run(&databases.old, &table(COLUMNS, "\"C\"")).await;
    run(&databases.new, &format!("CREATE TABLE spent (k int); {}", table(&other_order.join(", "), "\"und-x-icu\"")))
        .await;
    run(&databases.new, "DROP TABLE spent").await;
    let rows = r#"INSERT INTO v (id, f, n, j, js, a, m, ms, p, ts, c, b, x, r, i, t) SELECT n, 0, 1.0, '{"a": 1}', '{"a": 1}', '{1,2}', 'ok', '{sad,ok}', ROW('sad', 1.50)::pair,
        '2026-01-02 03:04:05+00', 'ab', '\x0102', '<a>1</a>', '[1,5)', '1 day', 'text' FROM generate_series(1, 40) n;
        INSERT INTO words SELECT chr(64 + n) || 'x', n FROM generate_series(1, 26) n; INSERT INTO words SELECT chr(96 + n), n FROM generate_series(1, 26) n"#;
    run(&databases.old, rows).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let (document, status) = verify(&proxy, &[]).await;
    assert_eq!((status, differences(&document, "public.v")), (Some(0), Vec::new()), "{document:#}");
    assert_eq!(document["tables"][1]["rows"], 52);
    run(
        &databases.new,
        r#"UPDATE v SET f = '-0' WHERE id = 1; UPDATE v SET f = 'NaN' WHERE id = 2; UPDATE v SET n = 1.00 WHERE id = 3; UPDATE v SET j = '{"a": 2}' WHERE id = 4;
        UPDATE v SET js = '{"a":1}' WHERE id = 5; UPDATE v SET a = '[0:1]={1,2}' WHERE id = 6; UPDATE v SET m = 'sad' WHERE id = 7; UPDATE v SET ms = '{sad,NULL}' WHERE id = 8;
        UPDATE v SET p = ROW('sad', 1.5) WHERE id = 9; UPDATE v SET ts = ts + interval '1 microsecond' WHERE id = 10; UPDATE v SET c = 'ab x' WHERE id = 11;
        UPDATE v SET b = '\x01' WHERE id = 12; UPDATE v SET x = '<a>2</a>' WHERE id = 13; UPDATE v SET r = '[1,6)' WHERE id = 14; UPDATE v SET i = '24 hours' WHERE id = 15;
        UPDATE v SET t = '' WHERE id = 16; UPDATE v SET t = NULL WHERE id = 17; DELETE FROM v WHERE id IN (18, 40); INSERT INTO v (id) VALUES (0), (99); UPDATE v SET t = 'a', n = 2 WHERE id = 19;
        UPDATE v SET ts = '2026-01-02 05:04:05+02', j = '{"a" : 1}' WHERE id = 20;
        DELETE FROM words WHERE w = 'b'; UPDATE words SET n = -1 WHERE w = 'Zx'; INSERT INTO words VALUES ('Äx', 1), ('zz', 2)"#,
    )
    .await;
    let (document, status) = verify(&proxy, &[]).await;
    assert_eq!(status, Some(1), "{document:#}");
    let mut expected = vec![
        "0 extra",
        "99 extra",
        "18 missing",
        "40 missing",
        "1 changed f",
        "2 changed f",
        "3 changed n",
        "4 changed j",
        "5 changed js",
        "6 changed a",
        "7 changed m",
        "8 changed ms",
        "9 changed p",
        "10 changed ts",
        "11 changed c",
        "12 changed b",
        "13 changed x",
        "14 changed r",
        "15 changed i",
        "16 changed t",
        "17 changed t",
        "19 changed n,t",
    ];
    expected.sort_unstable();
    assert_eq!(differences(&document, "public.v"), expected);
    assert_eq!(differences(&document, "public.words"), ["Zx changed n", "b missing", "zz extra", "Äx extra"]);
    let people = proxy.crossfade(&["verify", "--table", "words"]).await;
    let people = String::from_utf8_lossy(&people.stdout).into_owned();
    assert!(people.contains("52 rows") || people.contains("52 rows,"), "{people}");
    assert!(people.contains("  w b: missing on new") && people.contains("  w Zx: n differ"), "{people}");
    // What was found is mended, and nothing else is touched.
    let (document, status) = verify(&proxy, &["--repair"]).await;
    assert_eq!(status, Some(0), "{document:#}");
    assert_eq!(
        document["tables"][0]["repaired"].as_u64().unwrap() + document["tables"][1]["repaired"].as_u64().unwrap(),
        26
    );
    assert_eq!(databases.assert_equal().await, 92);
    let history = "SELECT string_agg(concat(detail->>'table', ' ', detail->>'repaired'), ', ' ORDER BY id) FROM crossfade.history WHERE event = 'verify'";
    let history = databases.old.run(DATABASE, history).await.expect("reads");
    assert!(history.contains("public.v 22") && history.contains("public.words 4"), "{history}");
    let verified = "SELECT string_agg(concat(rows, ' ', different, ' ', equal_epoch = epoch), ', ' ORDER BY number) FROM crossfade.verified";
    assert_eq!(databases.old.run(DATABASE, verified).await.expect("reads").trim(), "40 0 t, 52 0 t");
}

/// 8 clients insert, update, delete and bring back the same keys all the time: verify names what was planted among the rows that they leave
/// alone, and nothing else, however often it looks.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_invented_while_clients_write() {
    let rows = if std::env::var("CROSSFADE_PROOF").is_ok() { 1_000_000 } else { 100_000 };
    let schema = format!(
        "CREATE TABLE t (k int PRIMARY KEY, v text, n int); INSERT INTO t SELECT n, 'row ' || n, 0 FROM generate_series(1, {rows}) n"
    );
    let pair = Pair::dual_write(&schema, "").await;
    let planted = "UPDATE t SET v = 'planted' WHERE k = 50001; DELETE FROM t WHERE k = 60001; INSERT INTO t VALUES (-1, 'planted', 0), (999999999, 'planted', 0)";
    pair.databases.new.run(DATABASE, planted).await.expect("plants");
    let dir = tempfile::tempdir().expect("a directory");
    let script = dir.path().join("script");
    std::fs::write(
        &script,
        "\\set k random(1, 40)\n\\set l random(1, 3000)\nBEGIN;\nINSERT INTO t VALUES (:k, 'in', 1) ON CONFLICT (k) DO UPDATE SET n = t.n + 1, v = 'again';\nDELETE FROM t WHERE k = :l;\nCOMMIT;\n\
         INSERT INTO t VALUES (:l, 'back', 0) ON CONFLICT DO NOTHING;\nUPDATE t SET n = n + 1 WHERE k = :k;\n",
    )
    .expect("writes");
    let program = pair.databases.old.program("pgbench");
    let least = Duration::from_secs(if rows > 100_000 { 60 } else { 4 });
    let script = script.to_string_lossy().into_owned();
    let (url, arguments) = (pair.url(), ["-n", "-c", "8", "-j", "2", "-T", "3600", "-f", &script]);
    let mut load = Box::pin(try_pgbench(&program, &url, &arguments));
    let mut looks = 0;
    let looking = async {
        let begun = std::time::Instant::now();
        while looks < 2 || begun.elapsed() < least {
            let (document, status) = verify(&pair.proxy, &[]).await;
            let found = differences(&document, "public.t");
            assert_eq!(found, ["-1 extra", "50001 changed v", "60001 missing", "999999999 extra"], "{document:#}");
            assert_eq!(status, Some(1));
            println!(
                "{} rows/s, owed {}, locked {}",
                document["tables"][0]["rows_per_second"],
                document["tables"][0]["owed"],
                document["tables"][0]["locked"]
            );
            looks += 1;
        }
        let (document, status) = verify(&pair.proxy, &["--repair"]).await;
        assert!(document["tables"][0]["repaired"] == 4 && status == Some(0), "{document:#}");
    };
    tokio::select! {
        ended = &mut load => panic!("the load goes on: {ended:?}"),
        () = looking => {}
    }
    drop(load);
    let written = "SELECT sum(n) FROM t";
    let written: u64 =
        pair.databases.old.run(DATABASE, written).await.expect("reads").trim().parse().expect("a number");
    assert!(written > 100, "clients wrote meanwhile: {written}");
    pair.settle_and_assert_equal().await;
    let (document, status) = verify(&pair.proxy, &[]).await;
    assert_eq!((status, differences(&document, "public.t")), (Some(0), Vec::new()), "{document:#}");
}

/// The stage of the forced ones: k = 1 was changed and k = 2 deleted, and new cannot take either, since `holder` has its rows locked there.
async fn owed() -> (Pair, tokio_postgres::Client) {
    let schema =
        "CREATE TABLE t (k int PRIMARY KEY, v text); INSERT INTO t SELECT n, 'row' FROM generate_series(1, 10) n";
    let pair = Pair::dual_write(schema, "mirror: { timeout: 300ms }").await;
    let holder = pair.databases.new.client(DATABASE).await.expect("connects");
    holder.batch_execute("BEGIN; SELECT FROM t WHERE k IN (1, 2) FOR UPDATE").await.expect("locks");
    let client = pair.client().await;
    client.batch_execute("UPDATE t SET v = 'changed' WHERE k = 1").await.expect("changes");
    client.batch_execute("DELETE FROM t WHERE k = 2").await.expect("deletes");
    (pair, holder)
}

/// Begins verify under a file of its own, with this port for old; the file goes with what is returned.
fn verify_beside(pair: &Pair, old: u16, arguments: &[&str]) -> (tokio::process::Child, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("crossfade.yaml");
    let old = format!("postgres://{}:{}@127.0.0.1:{old}/{DATABASE}", CONTROL.0, CONTROL.1);
    let new = pair.databases.new.url_as(CONTROL.0, CONTROL.1, DATABASE);
    std::fs::write(&file, format!("listen: 127.0.0.1:1\nold: {old}\nnew: {new}\nphase: dual-write\n")).expect("writes");
    let running = tokio::process::Command::new(env!("CARGO_BIN_EXE_crossfade"))
        .args([&["verify", "--json"], arguments, &["--config"]].concat())
        .arg(&file)
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("runs");
    (running, dir)
}

/// What the mirror lacks and the ledger knows of is no difference.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_on_its_way_is_no_difference() {
    let (pair, holder) = owed().await;
    let (document, _) = verify(&pair.proxy, &[]).await;
    assert_eq!(differences(&document, "public.t"), Vec::<String>::new(), "{document:#}");
    let count = |name: &str| document["tables"][0][name].as_u64().expect("a number");
    assert!(count("owed") + count("locked") == 2 && count("owed") > 0, "{document:#}");
    holder.batch_execute("ROLLBACK").await.expect("releases");
    pair.settle_and_assert_equal().await;
    let (document, status) = verify(&pair.proxy, &[]).await;
    assert_eq!((status, document["tables"][0]["owed"].as_u64()), (Some(0), Some(0)), "{document:#}");
}

/// A deleted row is there in the first reading of the mirror; then its debt is paid and cleared; then the authority and the ledger are
/// read, which say nothing any more. The second reading of the mirror shows that it was on its way.
#[tokio::test(flavor = "multi_thread")]
async fn a_delete_that_is_paid_between_the_looks_is_no_difference() {
    let (pair, holder) = owed().await;
    let link = Link::to(pair.databases.old.port()).await;
    let looking = link.trip(Way::ToServer, b"SELECT q.i FROM unnest", Trip::StallBefore);
    let (running, _file) = verify_beside(&pair, link.port(), &["--patience", "60"]);
    looking.await.expect("the authority is about to be asked");
    holder.batch_execute("ROLLBACK").await.expect("releases");
    pair.proxy.settle().await;
    link.set(Way::ToServer, Flow::Pass);
    let output = running.wait_with_output().await.expect("ends");
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(differences(&document, "public.t"), Vec::<String>::new(), "{document:#}");
    assert_eq!(output.status.code(), Some(0), "{document:#}");
}

/// Of a table without a key: `row: so many on old, so many on new` of each that differs, sorted.
fn counts(document: &Value, table: &str) -> Vec<String> {
    let tables = document["tables"].as_array().expect("a list");
    let found = tables.iter().find(|found| found["table"] == table).unwrap_or_else(|| panic!("{table}: {document:#}"));
    let line =
        |found: &Value| format!("{} {} {}", found["row"].as_str().unwrap_or_default(), found["old"], found["new"]);
    found["different"].as_array().expect("a list").iter().map(line).collect()
}

/// Rows that are equal are counted; what differs by its text differs. What is owed is no difference, and `--repair` copies the table.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key_is_compared_as_a_whole() {
    let schema = "CREATE TABLE bag (a int, f float8, t text); CREATE TABLE parts (n int, t text) PARTITION BY RANGE (n); \
        CREATE TABLE parts1 PARTITION OF parts FOR VALUES FROM (0) TO (10); CREATE TABLE parts2 PARTITION OF parts DEFAULT; CREATE TABLE empty (t text);";
    let databases = Databases::start(&[]).await;
    databases.run_on_both(schema).await;
    databases
        .new
        .run(DATABASE, "SET ROLE app; DROP TABLE bag; CREATE TABLE bag (t text, a int, f float8)")
        .await
        .expect("makes");
    let rows = "INSERT INTO bag SELECT n % 100, 1.5, 'row' FROM generate_series(1, 5000) n; INSERT INTO bag VALUES (NULL, 0, ''), (NULL, 0, NULL), \
        (1, '-0', ''), (1, 0, ''), (2, 'NaN', 'x'), (2, 'NaN', 'x'), (2, 'NaN', 'x'); INSERT INTO parts SELECT n % 20, 'p' FROM generate_series(1, 100) n";
    databases.old.run(DATABASE, rows).await.expect("fills");
    let mut proxy = Proxy::start(databases.proxy_config("old", "mirror: { timeout: 1s }")).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let pair = Pair { proxy, databases };
    let (proxy, databases) = (&pair.proxy, &pair.databases);
    let client = databases.old.client(DATABASE).await.expect("connects");
    let proxied = pair.client().await;
    proxied.batch_execute("INSERT INTO bag VALUES (3, 0, 'new'), (3, 0, 'new')").await.expect("inserts");
    proxy.settle().await;
    let (document, status) = verify(proxy, &[]).await;
    assert_eq!((status, document["tables"][0]["rows"].as_u64()), (Some(0), Some(5009)), "{document:#}");
    let planted = "DELETE FROM bag WHERE ctid IN (SELECT ctid FROM bag WHERE a = 7 LIMIT 1); INSERT INTO bag (a, f, t) VALUES (3, 0, 'new'); UPDATE bag SET f = 0 WHERE f::text = '-0'; \
        UPDATE bag SET t = NULL WHERE t = '' AND a IS NULL; UPDATE parts SET n = 30 WHERE n = 3 AND ctid IN (SELECT ctid FROM parts1 WHERE n = 3 LIMIT 1)";
    databases.new.run(DATABASE, planted).await.expect("plants");
    // A row that the mirror could not take is owed, and no difference.
    let holder = databases.new.client(DATABASE).await.expect("connects");
    holder.batch_execute("BEGIN; LOCK TABLE empty IN SHARE MODE").await.expect("locks");
    proxied.batch_execute("INSERT INTO empty VALUES ('owed')").await.expect("is acknowledged");
    let (document, status) = verify(proxy, &[]).await;
    assert_eq!(status, Some(1), "{document:#}");
    let bag = ["(,0,\"\") 1 0", "(,0,) 1 2", "(1,-0,\"\") 1 0", "(1,0,\"\") 1 2", "(3,0,new) 2 3", "(7,1.5,row) 50 49"];
    assert_eq!(counts(&document, "public.bag"), bag);
    assert_eq!(counts(&document, "public.parts"), ["(3,p) 5 4", "(30,p) 0 1"]);
    assert_eq!(counts(&document, "public.empty"), Vec::<String>::new(), "{document:#}");
    assert_eq!(document["tables"][1]["owed_as_a_whole"], 1, "{document:#}");
    let people = proxy.crossfade(&["verify", "bag"]).await;
    let people = String::from_utf8_lossy(&people.stdout).into_owned();
    assert!(
        people.contains("5009 rows")
            && people.contains("6 differ")
            && people.contains("  (7,1.5,row): 50 on old, 49 on new"),
        "{people}"
    );
    holder.batch_execute("ROLLBACK").await.expect("releases");
    proxy.settle().await;
    let (document, status) = verify(proxy, &["--repair"]).await;
    assert_eq!(status, Some(0), "{document:#}");
    assert_eq!(
        (&document["tables"][0]["repaired"], &document["tables"][2]["repaired"]),
        (&6.into(), &2.into()),
        "{document:#}"
    );
    assert_eq!(databases.assert_equal().await, 5110);
    let still = "SELECT bool_and(equal_owings = coalesce(times, 0)) FROM crossfade.verified LEFT JOIN crossfade.owings USING (number)";
    assert_eq!(
        client.query_one(still, &[]).await.expect("reads").get::<_, Option<bool>>(0),
        Some(true),
        "the gate reads this"
    );
    // A transaction that has written it keeps it from being seen; nothing is said of it, and others write on.
    let late = pair.client().await;
    late.batch_execute("BEGIN; INSERT INTO empty VALUES ('late')").await.expect("inserts");
    let (looked, inserted) = tokio::join!(
        verify(proxy, &["--patience", "2", "empty"]),
        proxied.batch_execute("INSERT INTO empty VALUES ('meanwhile')")
    );
    inserted.expect("is not held up for long");
    let (document, status) = looked;
    let why = document["tables"][0]["unseen"].as_str().unwrap_or_default();
    assert!(status == Some(1) && why.starts_with("it was in use all the time"), "{document:#}");
    late.batch_execute("COMMIT").await.expect("commits");
    // Written out of sight: owed as a whole until it is copied; the look of before counts no more.
    proxied.batch_execute("UPDATE bag SET f = 9 WHERE a = 3").await.expect("updates");
    let (document, _) = verify(proxy, &[]).await;
    assert_eq!(
        (counts(&document, "public.bag"), document["tables"][0]["owed_as_a_whole"].as_u64()),
        (Vec::new(), Some(104)),
        "{document:#}"
    );
    let copied = proxy.crossfade(&["repair", "--table", "bag"]).await;
    assert!(copied.status.success(), "{copied:?}");
    assert_eq!(client.query_one(still, &[]).await.expect("reads").get::<_, Option<bool>>(0), Some(false));
}

/// Clients insert rows that all look alike, and one of those is missing on new: each look says so, and nothing else. Sums that were taken one after the
/// other would find it made up for by one that came in between.
#[tokio::test(flavor = "multi_thread")]
async fn equal_rows_that_come_in_meanwhile_make_up_for_none() {
    let schema = "CREATE TABLE clicks (what text); INSERT INTO clicks SELECT 'click' FROM generate_series(1, 30000)";
    let pair = Pair::dual_write(schema, "").await;
    let planted = "DELETE FROM clicks WHERE ctid = '(0,1)'; INSERT INTO clicks VALUES ('planted')";
    pair.databases.new.run(DATABASE, planted).await.expect("plants");
    let dir = tempfile::tempdir().expect("a directory");
    let script = dir.path().join("script");
    std::fs::write(
        &script,
        "INSERT INTO clicks VALUES ('click');\nBEGIN;\nINSERT INTO clicks VALUES ('click');\nEND;\n",
    )
    .expect("writes");
    let program = pair.databases.old.program("pgbench");
    let script = script.to_string_lossy().into_owned();
    let (url, arguments) = (pair.url(), ["-n", "-c", "4", "-j", "1", "-T", "3", "-f", &script]);
    let load = try_pgbench(&program, &url, &arguments);
    let looking = async {
        for _ in 0..3 {
            let (document, status) = verify(&pair.proxy, &[]).await;
            let found = &document["tables"][0];
            assert_eq!((status, found["rows_different"].as_u64()), (Some(1), Some(2)), "{document:#}");
            let count = |side: &str| found["different"][0][side].as_u64().expect("a number");
            assert!(count("old") == count("new") + 1 && found["different"][1]["row"] == "(planted)", "{document:#}");
        }
    };
    let (load, ()) = tokio::join!(load, looking);
    assert!(load.expect("the load runs").transactions > 100);
}

/// T is committed and its carrier M about to commit: V, which finds T's row on the authority, waits for M. (In `best-effort` the ledger says nothing of it.)
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_ends_on_the_mirror_is_waited_for() {
    let more = "mirror: { timeout: 30s, commit: best-effort }";
    let (pair, link) = Pair::dual_write_over_a_link("CREATE TABLE bag (t text)", more).await;
    let held = link.trip_behind(b"the-row", Way::ToServer, b"S\0\0\0\x04", Trip::HoldBefore);
    pair.client().await.batch_execute("INSERT INTO bag VALUES ('the-row')").await.expect("is acknowledged");
    held.await.expect("is held");
    let (mut running, _file) = verify_beside(&pair, pair.databases.old.port(), &[]);
    let waits =
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'crossfade verify' AND query ~ 'pg_locks'";
    common::until("it asks who writes the table", async || {
        pair.databases.new.run(DATABASE, waits).await.expect("reads").trim() == "t"
    })
    .await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(running.try_wait().expect("can be asked").is_none(), "it is not over while the row is on its way");
    link.release();
    let output = running.wait_with_output().await.expect("ends");
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((output.status.code(), counts(&document, "public.bag")), (Some(0), Vec::new()), "{document:#}");
}

/// A run that was killed goes on where it was, and not where it was if something of the table has been owed since.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_killed_goes_on_where_it_was() {
    let schema = "CREATE TABLE a (k int PRIMARY KEY); INSERT INTO a SELECT generate_series(1, 10); \
        CREATE TABLE b (k int PRIMARY KEY, v text); INSERT INTO b SELECT n, repeat('row ', 100) FROM generate_series(1, 6000) n";
    let pair = Pair::dual_write(schema, "").await;
    let on_old = async |sql: &str| pair.databases.old.run(DATABASE, sql).await.expect(sql).trim().to_owned();
    // Two jobs: b is large enough to be cut into two parts.
    let (mut running, _file) = verify_beside(&pair, pair.databases.old.port(), &["--jobs", "2", "--rate", "1000"]);
    let kept = "SELECT string_agg(concat(number, ' ', part, ' ', done), ', ' ORDER BY number, part) FROM crossfade.verifying \
        WHERE done OR rows BETWEEN 1 AND 3500 AND position IS NOT NULL";
    common::until("a is done, both parts of b begun", async || on_old(kept).await == "1 -1 t, 2 0 f, 2 1 f").await;
    running.kill().await.expect("is killed");
    let planted = "UPDATE b SET v = 'planted' WHERE k IN (1, 6000); INSERT INTO a VALUES (11)";
    pair.databases.new.run(DATABASE, planted).await.expect("plants");
    on_old("CREATE TABLE crossfade.kept AS SELECT * FROM crossfade.verifying").await;
    // What was seen before is not looked at again.
    let (document, status) = verify(&pair.proxy, &["--resume"]).await;
    assert_eq!(
        (status, differences(&document, "public.b")),
        (Some(1), vec!["6000 changed v".to_owned()]),
        "{document:#}"
    );
    let a = &document["tables"][0];
    assert!(a["compared_before"] == true && a["rows"] == 10 && a["equal"] == true, "{document:#}");
    assert_eq!(document["tables"][1]["rows"], 6000, "{document:#}");
    // A run that has ended leaves nothing to go on with.
    assert_eq!(on_old("SELECT count(*) FROM crossfade.verifying").await, "0");
    on_old("INSERT INTO crossfade.verifying SELECT * FROM crossfade.kept").await;
    on_old("INSERT INTO crossfade.owings SELECT DISTINCT number, 1 FROM crossfade.kept ON CONFLICT (number) DO UPDATE SET times = owings.times + 1").await;
    let (document, _) = verify(&pair.proxy, &["--resume"]).await;
    assert_eq!(differences(&document, "public.b"), ["1 changed v", "6000 changed v"], "{document:#}");
    assert_eq!(differences(&document, "public.a"), ["11 extra"], "{document:#}");
}

/// The proxy verifies for a share of the time, one of a fleet; what differs is said once, shown and written down, and not changed.
#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_verifies_in_the_background() {
    let schema = "CREATE TABLE t (k int PRIMARY KEY, v text); INSERT INTO t SELECT n, 'row' FROM generate_series(1, 2000) n; \
        CREATE TABLE log (v text); INSERT INTO log VALUES ('a'), ('a')";
    let pair = Pair::dual_write(schema, "verify: { continuous: 50% }").await;
    let on_old = async |sql: &str| pair.databases.old.run(DATABASE, sql).await.expect(sql).trim().to_owned();
    common::until("both are verified", async || {
        on_old("SELECT count(*) FROM crossfade.verified WHERE equal_epoch = epoch").await == "2"
    })
    .await;
    assert!(pair.proxy.metrics("crossfade_verify_rows_total{table=\"public.t\"}").await >= 2000.0);
    let other = pair.databases.new.client(DATABASE).await.expect("connects");
    // Another proxy is at it: no pass begins.
    let one = format!("SELECT pg_advisory_lock({}, 0)", 0x4346_5652);
    other.batch_execute(&one).await.expect("locks");
    other
        .batch_execute("UPDATE t SET v = 'planted' WHERE k IN (5, 1999); INSERT INTO log VALUES ('a')")
        .await
        .expect("plants");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(on_old("SELECT sum(different) FROM crossfade.verified").await, "0");
    other.batch_execute("SELECT pg_advisory_unlock_all()").await.expect("unlocks");
    let shown = async |table: &str| {
        pair.proxy.metrics(&format!("crossfade_verify_different_rows{{table=\"public.{table}\"}}")).await
    };
    common::until("both are shown", async || shown("t").await == 2.0 && shown("log").await == 1.0).await;
    let passes = on_old("SELECT max(at) FROM crossfade.verified").await;
    common::until("it looks again", async || {
        on_old(&format!("SELECT bool_and(at > '{passes}') FROM crossfade.verified")).await == "t"
    })
    .await;
    let log = pair.proxy.log();
    for said in ["table=public.t rows=2", "table=public.log rows=1"] {
        let lines = log.lines().filter(|line| line.contains("rows differ between old and new") && line.contains(said));
        assert_eq!(lines.count(), 1, "{log}");
    }
    let history = "SELECT string_agg(concat(detail->>'table', ' ', detail->>'different'), ', ' ORDER BY detail->>'table') FROM crossfade.history WHERE event = 'verify'";
    assert_eq!(on_old(history).await, "public.log 1, public.t 2");
    assert_eq!(on_old("SELECT count(*) FROM crossfade.ledger").await, "0");
    let planted = "SELECT count(*) FROM t WHERE v = 'planted'";
    assert_eq!(other.query_one(planted, &[]).await.expect("reads").get::<_, i64>(0), 2, "nothing is changed");
    let (document, status) = verify(&pair.proxy, &["--repair"]).await;
    assert_eq!(status, Some(0), "{document:#}");
    common::until("it is shown that it is mended", async || shown("t").await + shown("log").await == 0.0).await;
    pair.settle_and_assert_equal().await;
}

/// A look that began before the phase has moved to old and back says nothing of the mirror that is filled anew, also if it ends then.
#[tokio::test(flavor = "multi_thread")]
async fn what_moves_made_void_is_not_written_down_again() {
    let schema = "CREATE TABLE t (k int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 10)";
    let mut pair = Pair::dual_write(schema, "").await;
    let link = Link::to(pair.databases.old.port()).await;
    let ending = link.trip(Way::ToServer, b"LOCK TABLE crossfade.epoch_1", Trip::StallBefore);
    let (running, _file) = verify_beside(&pair, link.port(), &["--patience", "60"]);
    ending.await.expect("it is about to write down what it found");
    pair.proxy.set_phase("old").await;
    pair.proxy.set_phase("dual-write").await;
    link.set(Way::ToServer, Flow::Pass);
    let output = running.wait_with_output().await.expect("ends");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let verified = pair.databases.old.run(DATABASE, "SELECT count(*) FROM crossfade.verified").await.expect("reads");
    assert_eq!(verified.trim(), "0");
}

/// Whoever wants a table for himself, and all who wait behind him, do not wait until verify has read it.
#[tokio::test(flavor = "multi_thread")]
async fn who_truncates_a_table_that_is_read_does_not_wait_for_that() {
    let schema = "CREATE TABLE bag (t text); INSERT INTO bag SELECT 'row' FROM generate_series(1, 10000)";
    let pair = Pair::dual_write(schema, "mirror: { timeout: 30s }").await;
    let (running, _file) = verify_beside(&pair, pair.databases.old.port(), &["--rate", "500"]);
    let reads = "SELECT count(*) > 0 FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE a.application_name = 'crossfade verify' AND a.query ~ 'FETCH'";
    common::until("it reads", async || pair.databases.old.run(DATABASE, reads).await.expect("reads").trim() == "t")
        .await;
    let begun = std::time::Instant::now();
    pair.client().await.batch_execute("TRUNCATE bag").await.expect("truncates");
    let waited = begun.elapsed();
    // It reads for twenty seconds.
    assert!(waited < Duration::from_secs(8), "{waited:?}");
    let output = running.wait_with_output().await.expect("ends");
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((output.status.code(), &document["tables"][0]["rows"]), (Some(0), &0.into()), "{document:#}");
    assert!(begun.elapsed() < Duration::from_secs(18), "it began anew");
}
