//! Reads: which may leave the authority, what comparing finds, and what new serves.

mod common;

use std::time::Duration;

use common::link::{Trip, Way};
use common::{Pair, until};
use serde_json::Value;

const SCHEMA: &str = "CREATE TABLE photos (id int PRIMARY KEY, owner int, title text, price numeric);
    CREATE TABLE other (id int PRIMARY KEY, body text);
    CREATE TYPE mood AS ENUM ('glad', 'sad');
    CREATE TABLE moods (id int PRIMARY KEY, mood mood);
    CREATE VIEW titles AS SELECT title FROM photos;";

/// Every eligible read is compared, and differences are shown.
const COMPARED: &str = "reads: { compare: 100%, samples: true }";

/// What the proxy found of the statements whose shape begins so.
async fn found(pair: &Pair, shape: &str) -> Value {
    let output = pair.proxy.crossfade(&["report", "--json"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout).expect("is JSON");
    let shapes = document["shapes"].as_array().expect("has shapes");
    shapes
        .iter()
        .find(|found| found["shape"].as_str().is_some_and(|text| text.starts_with(shape)))
        .cloned()
        .unwrap_or_default()
}

async fn on_new(pair: &Pair, sql: &str) -> String {
    pair.databases.new.run(common::pair::DATABASE, sql).await.expect("runs on new")
}

#[tokio::test]
async fn explain_says_which_reads_may_leave_the_authority() {
    let pair = Pair::dual_write(SCHEMA, "").await;
    for (text, says) in [
        ("SELECT title FROM photos WHERE id = 1 ORDER BY lower(title) LIMIT 3", "may be run on both"),
        ("SELECT count(*), max(p.price) FROM public.photos p JOIN other o USING (id)", "may be run on both"),
        ("WITH x AS (SELECT id FROM photos) SELECT * FROM x", "may be run on both"),
        ("SELECT title FROM photos FOR UPDATE", "locks rows"),
        ("SELECT random(), title FROM photos", "calls a function"),
        ("SELECT nextval('s'), title FROM photos", "calls a function"),
        ("SELECT pg_advisory_lock(1) FROM photos", "calls a function"),
        ("SELECT now(), title FROM photos", "calls a function"),
        ("SELECT title FROM photos WHERE title = current_user", "one session, server or moment"),
        ("SELECT CURRENT_TIMESTAMP, id FROM photos", "one session, server or moment"),
        ("SELECT ctid FROM photos", "one session, server or moment"),
        ("SELECT tableoid::regclass FROM photos", "one session, server or moment"),
        ("SELECT title FROM photos TABLESAMPLE system (10)", "one session, server or moment"),
        ("SELECT * FROM titles", "view"),
        ("SELECT * FROM moods", "numbers of its types"),
        ("SELECT relname FROM pg_class", "does not migrate"),
        ("SELECT 1", "reads no table"),
    ] {
        let output = pair.proxy.crossfade(&["explain", text]).await;
        let told = String::from_utf8_lossy(&output.stdout);
        let line = told.lines().find(|line| line.starts_with("as a read")).unwrap_or_default();
        assert!(line.contains(says), "{text}\n{told}{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test]
async fn what_differs_is_found_and_what_is_equal_is_not() {
    let pair = Pair::dual_write(SCHEMA, COMPARED).await;
    let client = pair.client().await;
    client
        .batch_execute("INSERT INTO photos SELECT n, n % 3, 'title ' || n, 1.50 FROM generate_series(1, 50) n; INSERT INTO other VALUES (1, 'x')")
        .await
        .expect("writes");
    pair.proxy.settle().await;
    // As an accident would: nothing tells the proxy.
    on_new(&pair, "UPDATE photos SET title = 'spoilt' WHERE id = 7; UPDATE photos SET price = 1.5000").await;
    until("the ledger was looked at", async || {
        client.batch_execute("SELECT title FROM photos WHERE id = 1").await.expect("reads");
        found(&pair, "SELECT title FROM photos WHERE id =").await["compared"]["runs"].as_u64() > Some(0)
    })
    .await;
    // A Query, and the extended protocol with parameters in binary.
    client.batch_execute("SELECT id, title FROM photos ORDER BY id").await.expect("reads");
    let spoilt = client.query("SELECT title, id FROM photos WHERE id = $1", &[&7]).await.expect("reads");
    assert_eq!(spoilt[0].get::<_, &str>(0), "title 7", "the authority has answered");
    for _ in 0..5 {
        client.query("SELECT price FROM photos WHERE owner = $1", &[&2]).await.expect("reads");
    }
    until("both differences are found", async || {
        found(&pair, "SELECT id, title FROM").await["compared"]["different"] == 1
            && found(&pair, "SELECT title, id FROM").await["compared"]["different"] == 1
    })
    .await;
    let sample = found(&pair, "SELECT title, id FROM").await["compared"]["samples"][0].clone();
    assert_eq!(sample["only_on_old"][0], "title 7 | 7");
    assert_eq!(sample["only_on_new"][0], "spoilt | 7");
    until("the prices were compared", async || found(&pair, "SELECT price").await["compared"]["runs"] == 5).await;
    let prices = found(&pair, "SELECT price").await;
    assert_eq!(prices["compared"]["different"], 0, "1.50 is 1.5000: {prices}");
    assert!(prices["compared"]["old"]["p50_ms"].as_f64() > Some(0.0), "{prices}");
    assert_eq!(prices["count"], 5);
    assert!(pair.proxy.metrics("crossfade_read_compared_total{table=\"public.photos\"}").await >= 8.0);
    assert_eq!(pair.proxy.metrics("crossfade_read_different_total{table=\"public.photos\"}").await, 2.0);
    let log = pair.proxy.log();
    assert!(!log.contains("spoilt") && !log.contains("title 7"), "values are in the log:\n{log}");
}

/// A difference counts where it stays the same. One row differs for good, and another is being written: the answers differ at each look, and in another way each time.
/// That is not known to be a difference; when the writing stops, it is.
#[tokio::test]
async fn a_difference_counts_where_it_stays_the_same() {
    let pair = Pair::dual_write(SCHEMA, COMPARED).await;
    let (writer, reader) = (pair.client().await, pair.client().await);
    writer
        .batch_execute("INSERT INTO photos SELECT n, 0, 'title', 1 FROM generate_series(1, 20) n")
        .await
        .expect("writes");
    pair.proxy.settle().await;
    on_new(&pair, "UPDATE photos SET title = 'spoilt' WHERE id = 7").await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writing = tokio::spawn({
        let stop = stop.clone();
        async move {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                writer.batch_execute("UPDATE photos SET owner = owner + 1 WHERE id = 1").await.expect("writes");
            }
        }
    });
    const READ: &str = "SELECT id, owner, title FROM photos ORDER BY id";
    until("one was looked at to the end, and it differed each time", async || {
        reader.batch_execute(READ).await.expect("reads");
        // A look and its next ones take five seconds: not many of them are needed.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let seen = found(&pair, "SELECT id, owner").await["compared"].clone();
        assert!(seen.is_null() || seen["different"] == 0, "{seen}");
        seen["unsettled"].as_u64() > Some(0)
    })
    .await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writing.await.expect("writes");
    until("nobody writes, and it differs as it did", async || {
        reader.batch_execute(READ).await.expect("reads");
        found(&pair, "SELECT id, owner").await["compared"]["different"].as_u64() > Some(0)
    })
    .await;
}

/// What is meant to differ: a column, where it comes under its own name, and a whole shape.
#[tokio::test]
async fn what_is_to_be_ignored_is_no_difference() {
    let more = "tables: [{ name: photos, ignore: [title] }, other]\n\
        reads: { compare: 100%, ignore: [\"select body from other where id = 0\"] }";
    let pair = Pair::dual_write(SCHEMA, more).await;
    let client = pair.client().await;
    client
        .batch_execute("INSERT INTO photos VALUES (1, 1, 'title', 1); INSERT INTO other VALUES (1, 'x')")
        .await
        .expect("writes");
    pair.proxy.settle().await;
    on_new(&pair, "UPDATE photos SET title = 'other'; UPDATE other SET body = 'y'").await;
    const IGNORED: &str = "SELECT id, title FROM photos";
    const SEEN: &str = "SELECT owner, lower(title) FROM photos";
    until("what is not ignored differs, and the rest was compared", async || {
        client.batch_execute("SELECT body FROM other WHERE id = 1").await.expect("reads");
        client.batch_execute(IGNORED).await.expect("reads");
        client.batch_execute(SEEN).await.expect("reads");
        tokio::time::sleep(Duration::from_millis(100)).await;
        found(&pair, "SELECT owner, lower").await["compared"]["different"].as_u64() > Some(0)
            && found(&pair, "SELECT id, title").await["compared"]["runs"].as_u64() > Some(0)
    })
    .await;
    let found_ignored = found(&pair, "SELECT id, title").await;
    assert_eq!(found_ignored["compared"]["different"], 0, "{found_ignored}");
    let shape = found(&pair, "SELECT body FROM other").await;
    assert!(shape["count"].as_u64() > Some(0) && shape["compared"].is_null(), "{shape}");
    // The gate of the move that trusts new: what differs closes it.
    until("the gate knows", async || {
        let output = pair.proxy.crossfade(&["phase", "new-primary", "--dry-run", "--json"]).await;
        let document: Value = serde_json::from_slice(&output.stdout).expect("is JSON");
        let gates = document["gates"].as_array().expect("gates");
        let gate = gates.iter().find(|gate| gate["gate"] == "reads").expect("is there");
        gate["standing"] == "closed" && gate["facts"]["different"].as_u64() > Some(0)
    })
    .await;
}

/// New takes longer than old: both are asked how they go about it, and the index that new lacks is named. No value is.
#[tokio::test]
async fn where_new_is_slower_its_missing_index_is_named() {
    let pair = Pair::dual_write(SCHEMA, COMPARED).await;
    let client = pair.client().await;
    client
        .batch_execute("INSERT INTO photos SELECT n, n, repeat('title ', 20), 1 FROM generate_series(1, 30000) n")
        .await
        .expect("writes");
    pair.proxy.settle().await;
    let index = "CREATE INDEX photos_owner ON photos (owner); ANALYZE photos";
    pair.databases.old.run(common::pair::DATABASE, index).await.expect("makes an index on old only");
    on_new(&pair, "ANALYZE photos").await;
    pair.renewed().await;
    until("it was found out", async || {
        client.query("SELECT title FROM photos WHERE owner = $1", &[&29_876]).await.expect("reads");
        found(&pair, "SELECT title FROM").await["compared"]["plans"].is_object()
    })
    .await;
    let plans = found(&pair, "SELECT title FROM").await["compared"]["plans"].clone();
    assert_eq!(
        plans["missing"][0],
        "old reads photos by the index photos_owner, and new from end to end: is it missing there?",
        "{plans}"
    );
    assert!(!plans.to_string().contains("29876") && !pair.proxy.log().contains("29876"), "a value is shown: {plans}");
    let output = pair.proxy.crossfade(&["report"]).await;
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("new: Seq Scan on photos") && told.contains("using photos_owner"), "{told}");
}

/// Whom to ask about a shape that is in the way (R6).
#[tokio::test]
async fn shapes_say_which_applications_send_them() {
    let pair = Pair::dual_write(SCHEMA, "").await;
    let url = format!("{}?application_name=web", pair.url());
    let (web, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects");
    tokio::spawn(async move { drop(connection.await) });
    web.batch_execute("SELECT title FROM photos WHERE id = 1").await.expect("reads");
    web.batch_execute("SELECT title FROM photos WHERE id = 2").await.expect("reads");
    let job = pair.client().await;
    job.batch_execute("SET application_name = 'nightly job'").await.expect("sets");
    job.query("SELECT title FROM photos WHERE id = 3", &[]).await.expect("reads");
    job.batch_execute("UPDATE photos SET title = 'x'").await.expect("writes");
    let both = found(&pair, "SELECT title FROM photos").await;
    assert_eq!(
        (both["count"].as_u64(), both["applications"].to_string()),
        (Some(3), r#"["nightly job","web"]"#.into())
    );
    assert_eq!(found(&pair, "UPDATE photos").await["applications"][0], "nightly job");
    let output = pair.proxy.crossfade(&["report"]).await;
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("; by nightly job, web"), "{told}");
}

/// The mirror's COMMIT is late: the first look sees what was there before on new, and the second one what the authority has. That is no difference.
#[tokio::test]
async fn a_mirror_that_is_a_moment_late_is_no_difference() {
    let (pair, new) = Pair::dual_write_over_a_link(SCHEMA, COMPARED).await;
    let client = pair.client().await;
    client.batch_execute("INSERT INTO photos VALUES (1, 0, 'v0', 1)").await.expect("writes");
    pair.proxy.settle().await;
    let runs = async || found(&pair, "SELECT title FROM").await["compared"]["runs"].as_u64();
    until("the ledger was looked at, and the job is logged in", async || {
        client.batch_execute("SELECT title FROM photos").await.expect("reads");
        runs().await > Some(0)
    })
    .await;
    let compared = async || pair.proxy.metrics("crossfade_read_compared_total").await;
    let held = new.trip_behind(b"v1", Way::ToServer, b"S\0\0\0\x04", Trip::HoldBefore);
    client.batch_execute("UPDATE photos SET title = 'v1'").await.expect("is acknowledged");
    held.await.expect("is held");
    let (before, looked) = (compared().await, runs().await);
    client.batch_execute("SELECT title FROM photos").await.expect("reads");
    until("the first look is over", async || compared().await > before).await;
    new.release();
    until("the second look is over", async || runs().await > looked).await;
    let found = found(&pair, "SELECT title FROM").await;
    assert_eq!(found["compared"]["different"], 0, "{found}");
}
