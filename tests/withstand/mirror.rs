//! A mirror that is frozen, full, crowded, strict, locked or far away: the application never hears of it, and waits once at most.

use std::time::{Duration, Instant};

use crossfade::cluster::processes;

use crate::common::link::Flow;
use crate::common::load::{Load, SCHEMA, assert_nothing_lost};
use crate::common::pair::{CONTROL, DATABASE};
use crate::common::{Pair, proof, until};
use crate::{SCHEMA as NOTES, Stage};

/// For `mirror.timeout: 1s`, with what a busy machine adds.
const ONE_WAIT: Duration = Duration::from_secs(6);

/// One row, in a transaction of its own; how long it took.
async fn write(pair: &Pair, client: &tokio_postgres::Client, id: i32, body: &str) -> Duration {
    let begun = Instant::now();
    let text = "INSERT INTO notes VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET body = excluded.body";
    let written = client.execute(text, &[&id, &body]).await;
    assert!(written.is_ok(), "the application heard of it: {written:?}\n{}", pair.proxy.log());
    begun.elapsed()
}

#[tokio::test]
async fn frozen_for_long() {
    let pair = Pair::dual_write(SCHEMA, "mirror: { timeout: 1s }").await;
    let load = Load::start(&pair.url(), 8);
    load.goes_on(30).await;
    pair.databases.new.freeze();
    let until_then = Instant::now() + Duration::from_secs(if proof() { 30 } else { 3 });
    while Instant::now() < until_then {
        load.goes_on(10).await;
    }
    let owed = pair.databases.old.run(DATABASE, "SELECT count(*) FROM crossfade.ledger").await.expect("reads");
    assert_ne!(owed.trim(), "0", "nothing is owed");
    pair.databases.new.thaw();
    load.goes_on(30).await;
    let written = load.end().await;
    assert_eq!((written.errors.len(), written.unknown), (0, 0), "clients heard of it: {:?}", written.errors);
    pair.proxy.settle().await;
    assert_nothing_lost(&pair.databases, &written).await;
}

#[tokio::test]
async fn out_of_connections() {
    let pair = Pair::dual_write(NOTES, "mirror: { timeout: 1s }").await;
    let client = pair.client().await;
    let new = &pair.databases.new;
    // The proxy's own sessions go, and every place is taken before it is back.
    let mut taken = Vec::new();
    let mut crowd = async || {
        while let Ok(one) = new.client_as(CONTROL.0, CONTROL.1, DATABASE).await {
            taken.push(one);
        }
    };
    crowd().await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'crossfade%'";
    let last = new.client_as(CONTROL.0, CONTROL.1, DATABASE).await;
    assert!(last.is_err(), "there is still a place");
    taken[0].batch_execute(end).await.expect("ends them");
    for id in 0..10 {
        let took = write(&pair, &client, id, "crowded out").await;
        assert!(took < ONE_WAIT, "row {id} took {took:?}");
    }
    let failures = pair.proxy.metrics("crossfade_mirror_failures_total").await;
    drop(taken);
    until("it is back", async || pair.proxy.metrics("crossfade_mirror_up").await == 1.0).await;
    write(&pair, &client, 10, "after").await;
    eprintln!("{failures} transactions were owed");
    assert_eq!(pair.settle_and_assert_equal().await, 11);
}

/// No file of new may grow past this: what is there already stays readable, WAL is written in files of 16 MiB.
const FILE_BYTES: u64 = 20 << 20;

/// For the server and all its sessions; run by the server itself, whose account may.
async fn limit_files(pair: &Pair, bytes: &str) {
    let new = &pair.databases.new;
    for pid in processes::of(&new.data()) {
        let limit = format!("COPY (SELECT WHERE false) TO PROGRAM 'prlimit --pid {pid} --fsize={bytes}:unlimited'");
        let limited = new.run(DATABASE, &limit).await;
        // A session may have ended since.
        assert!(limited.is_ok() || !processes::of(&new.data()).contains(&pid), "{limited:?}");
    }
}

#[tokio::test]
async fn disk_full() {
    let pair = Pair::dual_write(NOTES, "mirror: { timeout: 5s }").await;
    let client = pair.client().await;
    limit_files(&pair, &FILE_BYTES.to_string()).await;
    let before = pair.proxy.metrics("crossfade_mirror_failures_total").await;
    let mut id = 0;
    until("new is full", async || {
        id += 1;
        // Not compressible, and too large for a page: the table's TOAST file grows by a megabyte.
        let fill = "INSERT INTO notes SELECT $1, string_agg(md5(random()::text), '') FROM generate_series(1, 32768)";
        client.execute(fill, &[&id]).await.expect("the application does not hear of it");
        assert!(id < 100, "100 MiB are there, and no file was too large");
        pair.proxy.metrics("crossfade_mirror_failures_total").await > before
    })
    .await;
    assert!(pair.proxy.log().contains("File too large"), "{}", pair.proxy.log());
    for more in 0..3 {
        client.execute("INSERT INTO notes VALUES ($1, 'small')", &[&(1000 + more)]).await.expect("is acknowledged");
    }
    limit_files(&pair, "unlimited").await;
    let rows = u64::try_from(id).expect("positive") + 3;
    assert_eq!(pair.settle_and_assert_equal().await, rows);
}

#[tokio::test]
async fn stricter_than_the_authority() {
    let pair = Pair::dual_write(NOTES, "mirror: { timeout: 1s }").await;
    let client = pair.client().await;
    pair.databases.new.run(DATABASE, "ALTER TABLE notes ADD CHECK (length(body) < 10) NOT VALID").await.expect("adds");
    let up = async || pair.proxy.metrics("crossfade_mirror_up").await;
    for id in 0..20 {
        write(&pair, &client, id, if id % 2 == 0 { "short" } else { "much too long for new" }).await;
        assert_eq!(up().await, 1.0, "one row is not the whole mirror");
    }
    until("what fits is there", async || {
        pair.databases.new.run(DATABASE, "SELECT count(*) FROM notes").await.expect("reads").trim() == "10"
    })
    .await;
    let waited = pair.proxy.crossfade(&["repair", "--wait", "--timeout", "2"]).await;
    assert!(!waited.status.success(), "what new refuses is not paid");
    pair.databases.new.run(DATABASE, "ALTER TABLE notes DROP CONSTRAINT notes_body_check").await.expect("drops");
    assert_eq!(pair.settle_and_assert_equal().await, 20);
}

#[tokio::test]
async fn a_row_that_somebody_else_has_locked_for_long() {
    let pair = Pair::dual_write(NOTES, "mirror: { timeout: 1s }").await;
    let client = pair.client().await;
    for id in 0..3 {
        write(&pair, &client, id, "before").await;
    }
    pair.settle_and_assert_equal().await;
    let somebody = pair.databases.new.client(DATABASE).await.expect("connects");
    somebody.batch_execute("BEGIN; SELECT FROM notes WHERE id = 1 FOR UPDATE").await.expect("locks");
    let until_then = Instant::now() + Duration::from_secs(if proof() { 60 } else { 5 });
    let mut rounds = 0;
    while Instant::now() < until_then {
        rounds += 1;
        for id in 0..3 {
            let took = write(&pair, &client, id, &format!("round {rounds}")).await;
            assert!(took < ONE_WAIT, "row {id} took {took:?}");
        }
    }
    until("the others are there", async || {
        write(&pair, &client, 2, "at last").await;
        pair.databases.new.run(DATABASE, "SELECT body FROM notes WHERE id = 2").await.expect("reads").trim()
            == "at last"
    })
    .await;
    somebody.batch_execute("ROLLBACK").await.expect("lets go");
    assert_eq!(pair.settle_and_assert_equal().await, 3);
}

#[tokio::test]
async fn two_hundred_milliseconds_away() {
    let stage = Stage::start(SCHEMA, "mirror: { timeout: 5s }").await;
    stage.new.set_both(Flow::Delay(Duration::from_millis(100)));
    let load = Load::start(&stage.pair.url(), 8);
    load.goes_on(if proof() { 400 } else { 30 }).await;
    let written = load.end().await;
    assert_eq!((written.errors.len(), written.unknown), (0, 0), "clients heard of it: {:?}", written.errors);
    let failures = stage.pair.proxy.metrics("crossfade_mirror_failures_total").await;
    assert_eq!(failures, 0.0, "it is slow, and not down");
    stage.new.set_both(Flow::Pass);
    stage.pair.proxy.settle().await;
    assert_nothing_lost(&stage.pair.databases, &written).await;
}
