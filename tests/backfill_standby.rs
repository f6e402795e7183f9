//! A backfill beside a standby of new that lags: a real one, whose recovery is paused.

mod backfill_support;
mod common;

use std::time::Duration;

use backfill_support::Running;
use common::Pair;
use common::pair::DATABASE;
use common::standby::Standby;

/// What a lag is has a test of its own (`standbys`): this one takes long for what it adds.
#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_rests_while_a_standby_is_too_far_behind() {
    if !common::proof() {
        return println!("CROSSFADE_PROOF is not set");
    }
    let schema = "CREATE TABLE t (k int PRIMARY KEY, v text)";
    let mut pair = Pair::start("old", schema, "expect: { lag: 1s }").await;
    let rows = "INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 8000) n";
    pair.databases.old.run(DATABASE, rows).await.expect("fills old");
    let config = pair.proxy.config_path();
    pair.proxy.set_phase("dual-write").await;
    let databases = &pair.databases;
    let standby = Standby::of(&databases.new);
    let streams = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
    common::until("the standby streams", async || {
        databases.new.run(DATABASE, streams).await.expect("reads").trim() == "1"
    })
    .await;
    standby.says(DATABASE, "SELECT pg_wal_replay_pause()").await;
    // The proxy's own repair is not what this is about: its walk gives way.
    let mut running = Running::start(&config, &["--rate", "2000", "t"]);
    let filled = async || -> i64 {
        let rows = "SELECT coalesce(sum(rows), 0) FROM crossfade.backfill";
        databases.old.run(DATABASE, rows).await.expect("reads").trim().parse().expect("a number")
    };
    common::until("it has begun", async || filled().await > 0).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let rested = filled().await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(filled().await, rested, "it rests");
    assert!(rested < 8000 && !running.has_ended(), "{rested}");
    standby.says(DATABASE, "SELECT pg_wal_replay_resume()").await;
    let (status, said) = running.end().await;
    assert!(status.success(), "{said}");
    assert!(said.contains("s behind, and 1 s are allowed") && said.contains("standbys have caught up"), "{said}");
    assert_eq!(pair.settle_and_assert_equal().await, 8000);
    drop(standby);
}
