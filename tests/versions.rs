//! What newer versions of PostgreSQL brought, in stories of their own. Each asks its servers for their version and says so where they are too old: `make versions` runs
//! them on all that it has.

mod common;

use std::time::Duration;

use common::copy::{copy, images};
use common::link::{Flow, Way};
use common::pair::{APP, CONTROL, DATABASE, TRUST};
use common::raw::{self, RawClient};
use common::{Databases, Pair, Proxy, ProxyConfig};

/// Whether old and new are at least of these versions; says what is skipped where they are not.
fn are(databases: &Databases, old: u32, new: u32) -> bool {
    let (found_old, found_new) = (databases.old.version(), databases.new.version());
    let enough = found_old >= old && found_new >= new;
    if !enough {
        println!("skipped: needs {old} -> {new}, and this is {found_old} -> {found_new} (make versions)");
    }
    enough
}

/// Both servers in `dual-write`, with a schema for each.
async fn mirrored(databases: Databases, on_old: &str, on_new: &str) -> Pair {
    for (side, schema) in [(&databases.old, on_old), (&databases.new, on_new)] {
        side.run(DATABASE, &format!("SET ROLE {};\n{schema}", APP.0)).await.expect("makes the tables");
    }
    let proxy = Proxy::start(databases.proxy_config("old", TRUST)).await;
    let mut pair = Pair { proxy, databases };
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.settle().await;
    pair
}

async fn failures(pair: &Pair) -> (f64, f64) {
    (
        pair.proxy.metrics("crossfade_opaque_writes_total").await,
        pair.proxy.metrics("crossfade_mirror_failures_total").await,
    )
}

/// PostgreSQL 18 makes generated columns virtual where nothing is said: computed by who reads them, never written. There and back, also where the other side stores them.
#[tokio::test(flavor = "multi_thread")]
async fn virtual_generated_columns_are_left_out() {
    let databases = Databases::start(&[]).await;
    if !are(&databases, 13, 18) {
        return;
    }
    let table = |kind: &str| {
        format!(
            "CREATE TABLE sums (id int PRIMARY KEY, n int NOT NULL, twice int GENERATED ALWAYS AS (n * 2) {kind}, t text);
             CREATE TABLE bare (n int, twice int GENERATED ALWAYS AS (n * 2) {kind});
             INSERT INTO sums (id, n) SELECT i, i FROM generate_series(1, 50) i; INSERT INTO bare VALUES (1);"
        )
    };
    let on_old = if databases.old.version() >= 18 { table("") } else { table("STORED") };
    let mut pair = mirrored(databases, &on_old, &table("").replace("INSERT", "--")).await;
    for phase in ["dual-write", "new-primary"] {
        if phase == "new-primary" {
            pair.proxy.set_phase(phase).await;
            pair.proxy.settle().await;
        }
        let before = failures(&pair).await;
        let client = pair.client().await;
        for script in [
            "DELETE FROM sums WHERE id > 100; INSERT INTO sums (id, n, t) VALUES (101, 7, 'a') RETURNING twice",
            "INSERT INTO sums (id, n) VALUES (101, 8) ON CONFLICT (id) DO UPDATE SET n = EXCLUDED.n; UPDATE sums SET n = n + 1, twice = DEFAULT WHERE id < 10",
            "UPDATE sums SET id = id + 1000 WHERE id = 11; DELETE FROM sums WHERE id = 12; UPDATE sums SET id = 11 WHERE id = 1011; INSERT INTO bare VALUES (2)",
        ] {
            client.batch_execute(script).await.unwrap_or_else(|error| panic!("{script}: {error:?}"));
        }
        client.query("SELECT * FROM sums WHERE twice = $1", &[&14]).await.expect("reads");
        client.execute("UPDATE sums SET t = $1 WHERE twice > $2", &[&"by its value", &90]).await.expect("updates");
        let rows = copy(&client, "COPY sums (id, n) FROM STDIN", &[b"201\t1\n202\t2\n"]).await.expect("copies");
        assert_eq!(rows, 2);
        client.batch_execute("DELETE FROM sums WHERE id > 200").await.expect("deletes");
        assert_eq!(failures(&pair).await, before, "{phase}: all of it is captured");
        assert!(pair.settle_and_assert_equal().await > 50, "{phase}");
    }
    let checked = pair.proxy.crossfade(&["check"]).await;
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(!said.contains("twice"), "{said}");
    let verified = pair.proxy.crossfade(&["verify"]).await;
    assert!(verified.status.success(), "{verified:?}");
}

/// Since PostgreSQL 18 a column that is NOT NULL NOT VALID may hold NULLs: a unique index over it is no key.
#[tokio::test(flavor = "multi_thread")]
async fn not_null_that_is_not_valid_makes_no_key() {
    let databases = Databases::start(&[]).await;
    if !are(&databases, 18, 18) {
        return;
    }
    let schema =
        "CREATE TABLE loose (u int UNIQUE, v text); ALTER TABLE loose ADD CONSTRAINT u_there NOT NULL u NOT VALID;
        CREATE TABLE strict (u int UNIQUE, v text); ALTER TABLE strict ADD CONSTRAINT u_there NOT NULL u;";
    let pair = mirrored(databases, schema, schema).await;
    for (table, keyless) in [("loose", true), ("strict", false)] {
        let output = pair.proxy.crossfade(&["explain", &format!("UPDATE {table} SET v = 'x'")]).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(said.contains("the table has no key"), keyless, "{said}");
    }
}

/// PostgreSQL 18's temporal keys are exclusion constraints, though pg_index calls them unique: ON CONFLICT knows nothing of them.
#[tokio::test(flavor = "multi_thread")]
async fn keys_without_overlaps_are_not_taken_for_keys() {
    let databases = Databases::start(&[]).await;
    if !are(&databases, 18, 18) {
        return;
    }
    let schema =
        "CREATE TABLE rates (what int4range, valid daterange, price int, PRIMARY KEY (what, valid WITHOUT OVERLAPS));
        CREATE TABLE paired (id int PRIMARY KEY, what int4range, valid daterange, UNIQUE (what, valid WITHOUT OVERLAPS));
        INSERT INTO rates VALUES ('[1,1]', '[2025-01-01,2026-01-01)', 1), ('[2,2]', '[2025-01-01,2026-01-01)', 2);";
    let pair = mirrored(databases, schema, &schema.replace("INSERT", "--")).await;
    let client = pair.client().await;
    let before = failures(&pair).await;
    for script in [
        "INSERT INTO rates VALUES ('[1,1]', '[2026-01-01,2027-01-01)', 3)",
        "INSERT INTO paired VALUES (1, '[1,1]', '[2025-01-01,2026-01-01)'), (2, '[1,1]', '[2026-01-01,2027-01-01)')",
        // They change places, by way of a row that overlaps neither.
        "BEGIN; UPDATE paired SET valid = '[2030-01-01,2031-01-01)' WHERE id = 1; UPDATE paired SET valid = '[2025-01-01,2026-01-01)' WHERE id = 2;
         UPDATE paired SET valid = '[2026-01-01,2027-01-01)' WHERE id = 1; COMMIT",
    ] {
        client.batch_execute(script).await.unwrap_or_else(|error| panic!("{script}: {error:?}"));
    }
    assert_eq!(failures(&pair).await, before, "rows that are added, and those with a key of their own, are captured");
    let tainted = pair
        .tainted_by(&["rates", "paired"], async || {
            let script = "UPDATE rates SET price = price + 1; DELETE FROM rates WHERE what @> 2";
            client.batch_execute(script).await.expect("writes");
        })
        .await;
    assert_eq!(tainted, ["rates"]);
    let copied = pair.proxy.crossfade(&["repair", "--table", "public.rates"]).await;
    assert!(copied.status.success(), "{copied:?}");
    assert_eq!(pair.settle_and_assert_equal().await, 4);
}

/// PostgreSQL 17's ON_ERROR ignore: rows that are passed over are not mirrored, the others are.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_copy_passes_over_are_not_mirrored() {
    let databases = Databases::start(&[]).await;
    if !are(&databases, 17, 13) {
        return;
    }
    let schema = "CREATE TABLE items (id int PRIMARY KEY, n int); CREATE TABLE notes (n int, what text);";
    let pair = mirrored(databases, schema, schema).await;
    let client = pair.client().await;
    for (table, sql, data, rows) in [
        ("items", "COPY items FROM STDIN (ON_ERROR ignore)", &b"1\t10\nnone\t20\n3\tmany\n4\t40\n"[..], 2),
        (
            "items",
            "COPY items FROM STDIN (ON_ERROR ignore, LOG_VERBOSITY verbose, FORMAT csv)",
            b"5,50\n6,x\n7,70\n",
            2,
        ),
        ("notes", "COPY notes FROM STDIN (ON_ERROR ignore)", b"1\ta\nx\tb\n3\tc\n", 2),
        ("notes", "COPY notes FROM STDIN (FORMAT csv, FORCE_NULL *)", b"4,\"\"\n", 1),
    ] {
        let before = images(&pair, table).await;
        let mut count = 0;
        let tainted = pair
            .tainted_by(&["items", "notes"], async || {
                count = copy(&client, sql, &[data]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            })
            .await;
        assert_eq!((count, tainted), (rows, vec![]), "{sql}");
        assert_eq!(images(&pair, table).await - before, rows as f64, "{sql}");
    }
    // In CSV `\.` was the end of the data before 18, and is data since.
    let end =
        copy(&client, "COPY notes (what) FROM STDIN (FORMAT csv)", &[b"first\n\\.\nlast\n"]).await.expect("copies");
    assert_eq!(end, if pair.databases.old.version() < 18 { 1 } else { 3 });
    let rows = 4 + 3 + end;
    assert_eq!(pair.settle_and_assert_equal().await, rows);
}

/// PostgreSQL 18's RETURNING shows rows as they were and as they are; ours stands behind it and disturbs neither.
#[tokio::test(flavor = "multi_thread")]
async fn returning_old_and_new_is_captured() {
    let databases = Databases::start(&[]).await;
    if !are(&databases, 18, 13) {
        return;
    }
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE \"old\" (id int PRIMARY KEY, v text); CREATE TABLE \"new\" (id int PRIMARY KEY, v text);";
    let pair = mirrored(databases, schema, schema).await;
    let client = pair.client().await;
    let before = failures(&pair).await;
    for (sql, expected) in [
        ("INSERT INTO t VALUES (1, 'a') RETURNING old.v, new.v", "~|a"),
        ("UPDATE t SET v = 'b' RETURNING old.v, new.v, v", "a|b|b"),
        ("INSERT INTO t VALUES (1, 'c') ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v RETURNING old.v, new.v", "b|c"),
        ("UPDATE t SET v = 'd' RETURNING WITH (OLD AS before, NEW AS behind) before.v, behind.v", "c|d"),
        ("UPDATE t SET id = 2 RETURNING old.id, new.id", "1|2"),
        ("DELETE FROM t RETURNING old.*, new.*", "2|d|~|~"),
        // Tables of these names: then the words mean them.
        ("INSERT INTO \"old\" VALUES (1, 'a') RETURNING \"old\".v", "a"),
        ("UPDATE \"new\" SET v = 'b' FROM \"old\" WHERE \"new\".id = \"old\".id RETURNING \"old\".v", ""),
        ("INSERT INTO \"new\" AS old VALUES (1, 'n') RETURNING old.*", "1|n"),
        ("UPDATE \"new\" SET v = 'm' FROM \"old\" WHERE \"new\".id = \"old\".id RETURNING \"old\".v, \"new\".v", "a|m"),
        ("DELETE FROM \"old\" AS new RETURNING new.v", "a"),
    ] {
        assert_eq!(said(&client, sql).await, expected, "{sql}");
    }
    assert_eq!(failures(&pair).await, before, "all of it is captured");
    assert_eq!(pair.settle_and_assert_equal().await, 1);
}

/// The values of the one row that comes back, or nothing.
async fn said(client: &tokio_postgres::Client, sql: &str) -> String {
    let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let row = messages.into_iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.map_or_else(String::new, |row| {
        (0..row.len()).map(|at| row.get(at).unwrap_or("~")).collect::<Vec<_>>().join("|")
    })
}

/// Limits that PostgreSQL 14 and 17 have for sessions and transactions as a whole, given to the control role: none of ours is ended by them.
#[tokio::test(flavor = "multi_thread")]
async fn limits_of_the_control_role_end_no_session_of_ours() {
    let databases = Databases::start(&[]).await;
    if !are(&databases, 13, 17) {
        return;
    }
    for side in [&databases.old, &databases.new] {
        for (since, setting) in [(14, "idle_session_timeout"), (17, "transaction_timeout")] {
            if side.version() >= since {
                let sql = format!("ALTER ROLE {} SET {setting} = '400ms'", CONTROL.0);
                side.run("postgres", &sql).await.expect("limits");
            }
        }
    }
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, repeat('x', 200) FROM generate_series(1, 60000) i;";
    let pair = mirrored(databases, schema, "CREATE TABLE t (id int PRIMARY KEY, v text);").await;
    let client = pair.client().await;
    let before = failures(&pair).await;
    for id in 1..4 {
        client.execute("UPDATE t SET v = 'y' WHERE id = $1", &[&id]).await.expect("updates");
        // The mirror's session waits in the pool meanwhile, for longer than it may.
        tokio::time::sleep(Duration::from_millis(900)).await;
    }
    assert_eq!(failures(&pair).await, before, "no image was owed");
    for command in [&["verify"][..], &["repair", "--wait"], &["verify"]] {
        let output = pair.proxy.crossfade(command).await;
        assert!(output.status.success(), "{output:?}");
    }
    for side in [&pair.databases.old, &pair.databases.new] {
        let log = std::fs::read_to_string(side.log()).expect("reads the log");
        for said in ["due to transaction timeout", "due to idle-session timeout"] {
            assert!(!log.contains(said), "{said}");
        }
    }
    assert_eq!(pair.settle_and_assert_equal().await, 60_000);
}

/// PostgreSQL 18 speaks protocol 3.2, whose keys for cancelling are longer. They pass, and they work.
#[tokio::test(flavor = "multi_thread")]
async fn protocol_3_2_goes_through_to_18() {
    let databases = Databases::start_trusting().await;
    if !are(&databases, 18, 13) {
        return;
    }
    databases.run_on_both("CREATE TABLE t (id int PRIMARY KEY, v text);").await;
    let mut proxy = Proxy::start(databases.proxy_config("old", TRUST)).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let startup = raw::startup(raw::V3_2, &[("user", APP.0), ("database", DATABASE)]);
    let (mut client, frames) = RawClient::connect(proxy.port(), None, &startup).await;
    assert!(!raw::tags(&frames).contains('v'), "no other version is negotiated: {}", raw::tags(&frames));
    assert_eq!(client.key.len(), 32);
    client.send(&raw::query("INSERT INTO t VALUES (1, 'a') RETURNING old.v, v")).await;
    assert_eq!(raw::tags(&client.until_ready(1).await), "TDCZ");
    client.send(&raw::query("SELECT pg_sleep(60)")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    raw::cancel(proxy.port(), client.pid, &client.key.clone()).await;
    let ended = tokio::time::timeout(Duration::from_secs(20), client.until_ready(1)).await.expect("is cancelled");
    assert_eq!(raw::tags(&ended), "TEZ");
    proxy.settle().await;
    assert_eq!(databases.assert_equal().await, 1);
}

/// Identity columns of partitioned tables (17), and a move that carries their sequences.
#[tokio::test(flavor = "multi_thread")]
async fn identities_of_partitioned_tables_go_on_behind_a_move() {
    let databases = Databases::start(&[]).await;
    if !are(&databases, 17, 17) {
        return;
    }
    let schema = "CREATE TABLE parts (id bigint GENERATED ALWAYS AS IDENTITY, r text, v text, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
        CREATE TABLE parts_a PARTITION OF parts FOR VALUES IN ('a');
        CREATE TABLE parts_b (v text, r text NOT NULL, id bigint NOT NULL GENERATED ALWAYS AS IDENTITY);
        ALTER TABLE parts_b ALTER id DROP IDENTITY; ALTER TABLE parts ATTACH PARTITION parts_b FOR VALUES IN ('b');";
    let mut pair = mirrored(databases, schema, schema).await;
    for phase in ["dual-write", "new-primary"] {
        if phase == "new-primary" {
            pair.proxy.set_phase(phase).await;
            pair.proxy.settle().await;
        }
        let before = failures(&pair).await;
        let client = pair.client().await;
        client
            .batch_execute("INSERT INTO parts (r, v) VALUES ('a', 'x'), ('b', 'y'), ('b', 'z')")
            .await
            .expect("inserts");
        client
            .batch_execute("UPDATE parts SET r = 'a' WHERE v = 'z'; UPDATE parts SET v = v || '!'")
            .await
            .expect("updates");
        assert_eq!(copy(&client, "COPY parts (r, v) FROM STDIN", &[b"a\tc\nb\td\n"]).await.expect("copies"), 2);
        let after = failures(&pair).await;
        assert_eq!(after.1, before.1, "{phase}");
        pair.settle_and_assert_equal().await;
    }
    let client = pair.client().await;
    let ids = "SELECT count(*) = count(DISTINCT id) FROM parts";
    assert_eq!(said(&client, ids).await, "t");
}

/// `transaction_timeout` (17) of a client counts what the mirror needs, too: its COMMIT does not fail for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_mirror_does_not_run_into_a_clients_transaction_timeout() {
    let databases = Databases::start(&[]).await;
    if !are(&databases, 17, 13) {
        return;
    }
    databases.run_on_both("CREATE TABLE t (id int PRIMARY KEY, v text);").await;
    let link = common::link::Link::to(databases.new.port()).await;
    let new = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
    let more = format!("{TRUST}\nmirror: {{ timeout: 20s }}");
    let mut proxy = Proxy::start(ProxyConfig { new, ..databases.proxy_config("old", &more) }).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let pair = Pair { proxy, databases };
    let client = pair.client().await;
    client.batch_execute("SET transaction_timeout = '1500ms'; INSERT INTO t VALUES (1, 'a')").await.expect("inserts");
    link.set(Way::ToClient, Flow::Stall);
    let slow = tokio::spawn(async move {
        client.batch_execute("INSERT INTO t VALUES (2, 'a')").await.expect("one by itself");
        client.batch_execute("BEGIN; INSERT INTO t VALUES (3, 'a'); COMMIT").await.expect("in a block");
        let shown = said(&client, "SHOW transaction_timeout").await;
        // Its own transactions are limited as before.
        let late = client.batch_execute("BEGIN; SELECT pg_sleep(4); COMMIT").await.expect_err("takes too long");
        (shown, late.code().map(|code| code.code().to_owned()))
    });
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(2500)).await;
        link.set(Way::ToClient, Flow::Pass);
        tokio::time::sleep(Duration::from_millis(100)).await;
        link.set(Way::ToClient, Flow::Stall);
    }
    link.set(Way::ToClient, Flow::Pass);
    let (shown, late) = slow.await.expect("runs");
    assert_eq!((shown.as_str(), late.as_deref()), ("1500ms", Some("25P04")));
    assert_eq!(pair.settle_and_assert_equal().await, 3);
}
