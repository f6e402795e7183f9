//! A mirror that refuses, stalls or crashes, and an authority that crashes: what clients see, what is owed, and what both sides hold at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::common::link::{Flow, Link};
use crate::common::pair::{APP, DATABASE};
use crate::common::{Databases, Pair, Proxy, until};
use crate::{SCHEMA, dual_write, text, value};

const REFUSE: &str = "ALTER TABLE notes ADD CONSTRAINT odd CHECK (body <> 'odd')";

#[tokio::test]
async fn a_refused_row_is_a_debt_with_the_servers_words_and_heals() {
    let pair = dual_write("").await;
    let client = pair.client().await;
    pair.databases.new.run(DATABASE, REFUSE).await.expect("adds");
    pair.renewed().await;
    client
        .batch_execute("BEGIN; INSERT INTO notes VALUES (1, 'odd'); INSERT INTO notes VALUES (2, 'even'); COMMIT")
        .await
        .expect("no error");
    client.batch_execute("INSERT INTO notes VALUES (3, 'even')").await.expect("others go on");
    let shown = async || text(&pair.proxy.crossfade(&["status"]).await);
    until("status says why", async || shown().await.contains("violates check constraint \"odd\"")).await;
    assert!(pair.proxy.log().contains("violates check constraint \"odd\""));
    assert_eq!(pair.proxy.metrics("crossfade_mirror_up").await, 1.0, "one row is not the whole mirror");
    assert_eq!(pair.proxy.metrics("crossfade_mirror_failures_total{reason=\"refused\"}").await, 1.0);
    let there = pair.databases.new.run(DATABASE, "SELECT string_agg(id::text, ',' ORDER BY id) FROM notes").await;
    assert!(there.expect("reads").contains('3'), "what is not refused arrives");
    pair.databases.new.run(DATABASE, "ALTER TABLE notes DROP CONSTRAINT odd").await.expect("drops");
    // By the running proxy alone.
    until("it heals by itself", async || {
        let left = pair.databases.old.run(DATABASE, "SELECT count(*) FROM crossfade.ledger").await.expect("reads");
        left.trim() == "0"
    })
    .await;
    pair.databases.assert_equal().await;
}

/// A proxy whose way to new is a link, in `dual-write`.
async fn over_a_link(more: &str) -> (Pair, Link) {
    Pair::dual_write_over_a_link(SCHEMA, more).await
}

#[tokio::test]
async fn a_silent_mirror_costs_one_wait_and_then_nothing() {
    let (pair, link) = over_a_link("mirror: { timeout: 3s }").await;
    let client = pair.client().await;
    client.batch_execute("INSERT INTO notes VALUES (1, 'before')").await.expect("writes");
    link.set_both(Flow::Discard);
    let first = Instant::now();
    client.batch_execute("INSERT INTO notes VALUES (2, 'waits')").await.expect("no error");
    let first = first.elapsed();
    assert!(first >= Duration::from_millis(2900), "it waited for {first:?} only: mirror.timeout is 3s");
    let others = Instant::now();
    for id in 3..10 {
        client.execute("INSERT INTO notes VALUES ($1, 'does not wait')", &[&id]).await.expect("no error");
    }
    assert!(others.elapsed() < Duration::from_secs(2), "seven transactions waited {:?}", others.elapsed());
    assert!(pair.proxy.metrics("crossfade_mirror_failures_total{reason=\"timeout\"}").await >= 1.0);
    assert!(pair.proxy.metrics("crossfade_mirror_failures_total{reason=\"down\"}").await >= 7.0);
    link.set_both(Flow::Pass);
    link.cut();
    until("the mirror is back", async || pair.proxy.metrics("crossfade_mirror_up").await == 1.0).await;
    client.batch_execute("UPDATE notes SET body = 'after' WHERE id = 2").await.expect("writes");
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn strict_refuses_what_the_mirror_cannot_take() {
    let pair = dual_write("mirror: { strict: true, timeout: 5s }").await;
    let client = pair.client().await;
    pair.databases.new.run(DATABASE, REFUSE).await.expect("adds");
    pair.renewed().await;
    // Definitions that were being changed when they were read are read again: until then nothing is proven of images.
    let client = {
        let mut client = client;
        until("the mirror takes it", async || {
            let taken = client.batch_execute("INSERT INTO notes VALUES (1, 'even')").await;
            if taken.is_err() {
                client = pair.client().await;
            }
            taken.is_ok()
        })
        .await;
        client
    };
    let strict = pair.client().await;
    let error = strict.batch_execute("INSERT INTO notes VALUES (2, 'odd')").await.expect_err("refused");
    let error = error.as_db_error().unwrap_or_else(|| panic!("{error}"));
    assert!(error.message().contains("strict") && error.hint().is_some(), "{error}");
    assert_eq!(value(&client, "SELECT count(*) FROM notes").await, "1", "nothing was committed");
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn best_effort_writes_both_without_a_ledger_unless_it_failed() {
    let mut pair = dual_write("mirror: { commit: best-effort, timeout: 500ms }").await;
    let client = pair.client().await;
    let before = pair.databases.old.run(DATABASE, "SELECT pg_stat_get_xact_tuples_inserted('crossfade.ledger'::regclass), n_tup_ins FROM pg_stat_all_tables WHERE relid = 'crossfade.ledger'::regclass").await.expect("reads");
    for id in 0..20 {
        client.execute("INSERT INTO notes VALUES ($1, 'plain')", &[&id]).await.expect("writes");
    }
    until("both have it", async || {
        pair.databases.new.run(DATABASE, "SELECT count(*) FROM notes").await.expect("reads").trim() == "20"
    })
    .await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let after = pair.databases.old.run(DATABASE, "SELECT pg_stat_get_xact_tuples_inserted('crossfade.ledger'::regclass), n_tup_ins FROM pg_stat_all_tables WHERE relid = 'crossfade.ledger'::regclass").await.expect("reads");
    assert_eq!(before, after, "no ledger row was written");
    pair.databases.new.kill9();
    client.batch_execute("UPDATE notes SET body = 'owed' WHERE id < 5").await.expect("no error");
    pair.databases.new.start().await.expect("starts");
    pair.settle_and_assert_equal().await;
    pair.proxy.set_phase("new-primary").await;
    client.batch_execute("UPDATE notes SET body = 'moved' WHERE id < 9").await.expect("writes");
    pair.settle_and_assert_equal().await;
}

/// Interleaving 6: the mirror crashes after it has answered COMMIT and before the flush.
#[tokio::test]
async fn a_mirror_that_crashes_before_its_flush_loses_nothing() {
    // The mirror does not flush by itself for a while, so that a crash loses what it has answered (C3, C7).
    let mut databases = Databases::start(&[]).await;
    databases
        .new
        .configure(&[("wal_writer_delay", "10s"), ("wal_writer_flush_after", "1GB"), ("fsync", "on")])
        .expect("configures");
    databases.new.restart(crossfade::cluster::Stop::Fast).await.expect("restarts");
    databases.run_on_both(SCHEMA).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "mirror: { timeout: 500ms }")).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let mut pair = Pair { proxy, databases };
    let client = pair.client().await;
    let mut lost = 0;
    for round in 0..5 {
        for n in 0..20 {
            let id = round * 100 + n;
            client.execute("INSERT INTO notes VALUES ($1, 'acknowledged')", &[&id]).await.expect("writes");
            client.execute("INSERT INTO history VALUES ($1, 'acknowledged')", &[&id]).await.expect("writes");
        }
        pair.databases.new.kill9();
        pair.databases.new.start().await.expect("starts");
        let there =
            pair.databases.new.run(DATABASE, &format!("SELECT count(*) FROM notes WHERE id >= {}", round * 100)).await;
        lost += 20 - there.expect("reads").trim().parse::<i32>().expect("a number").min(20);
        until("the mirror is back", async || pair.proxy.metrics("crossfade_mirror_up").await == 1.0).await;
        client.execute("UPDATE notes SET body = 'after' WHERE id = $1", &[&(round * 100)]).await.expect("writes");
        assert_eq!(pair.settle_and_assert_equal().await, i64::from((round + 1) * 40).cast_unsigned());
    }
    eprintln!("{lost} rows were lost by the mirror's crashes and came back");
}

/// Interleavings 6 and 7: a crash of the authority, also where clients or their role have turned `synchronous_commit` off.
#[tokio::test]
async fn an_authority_that_crashes_under_load_leaves_both_sides_equal() {
    for asynchronous in [false, true] {
        let mut databases = Databases::start(&[]).await;
        databases
            .old
            .configure(&[("wal_writer_delay", "10s"), ("wal_writer_flush_after", "1GB"), ("fsync", "on")])
            .expect("configures");
        databases.old.restart(crossfade::cluster::Stop::Fast).await.expect("restarts");
        databases.run_on_both(SCHEMA).await;
        if asynchronous {
            // By the role: what is acknowledged must outlive a crash all the same, once it is mirrored.
            databases
                .old
                .run("postgres", &format!("ALTER ROLE {} SET synchronous_commit = off", APP.0))
                .await
                .expect("sets");
        }
        let mut proxy = Proxy::start(databases.proxy_config("old", "mirror: { timeout: 500ms }")).await;
        proxy.set_phase("dual-write").await;
        proxy.settle().await;
        let mut pair = Pair { proxy, databases };
        let mut acknowledged = Vec::new();
        for round in 0..3 {
            let count = Arc::new(AtomicUsize::new(0));
            let writers: Vec<_> = (0..4)
                .map(|writer| {
                    let first = round * 100_000 + writer * 10_000;
                    tokio::spawn(until_it_breaks(pair.url(), first, count.clone()))
                })
                .collect();
            // They are at it.
            until("rows are acknowledged", async || count.load(Ordering::Relaxed) > 20).await;
            pair.databases.old.kill9();
            for writer in writers {
                acknowledged.extend(writer.await.expect("joins"));
            }
            pair.databases.old.start().await.expect("starts");
            pair.settle_and_assert_equal().await;
            let client = pair.databases.old.client(DATABASE).await.expect("connects");
            let there =
                client.query("SELECT id FROM notes WHERE id = ANY ($1)", &[&acknowledged]).await.expect("reads");
            assert_eq!(there.len(), acknowledged.len(), "an acknowledged row is gone (asynchronous: {asynchronous})");
        }
    }
}

/// Inserts until the connection breaks; what was acknowledged.
async fn until_it_breaks(url: String, first: i32, count: Arc<AtomicUsize>) -> Vec<i32> {
    let mut acknowledged = Vec::new();
    let (client, connection) = match tokio_postgres::connect(&url, tokio_postgres::NoTls).await {
        Ok(connected) => connected,
        // The crash may come before it.
        Err(error) => {
            eprintln!("a writer could not connect: {error:?}");
            return acknowledged;
        }
    };
    tokio::spawn(connection);
    if first % 20_000 == 0 && client.batch_execute("SET synchronous_commit = off").await.is_err() {
        return acknowledged;
    }
    for id in first..first + 10_000 {
        if let Err(error) = client.execute("INSERT INTO notes VALUES ($1, 'acknowledged')", &[&id]).await {
            eprintln!("a writer ends behind {} rows: {error:?}", acknowledged.len());
            break;
        }
        acknowledged.push(id);
        count.fetch_add(1, Ordering::Relaxed);
    }
    acknowledged
}
