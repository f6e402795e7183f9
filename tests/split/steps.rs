//! Deaths at each message of a COMMIT on both sides. What stands when all are back: both parts, if old had committed; else neither.

use std::time::Duration;

use crate::Stage;
use crate::both::transfer;
use crate::common::link::{Trip, Way};
use crate::common::{proof, until};
use crate::on;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dies {
    Proxy,
    Old,
    New,
}

/// A message: to or from new, what is in it, and whether old has committed where it was lost.
const STEPS: [(&str, bool, Way, &[u8], bool); 7] = [
    ("PREPARE", true, Way::ToServer, b"PREPARE TRANSACTION 'crossfade:", false),
    ("the answer to PREPARE", true, Way::ToClient, b"PREPARE TRANSACTION\0", false),
    ("the decision", false, Way::ToServer, b"crossfade.decide", false),
    ("COMMIT", false, Way::ToServer, b"Q\0\0\0\x0bCOMMIT\0", false),
    ("the answer to COMMIT", false, Way::ToClient, b"C\0\0\0\x0bCOMMIT\0", true),
    ("COMMIT PREPARED", true, Way::ToServer, b"COMMIT PREPARED 'crossfade:", true),
    ("the answer to COMMIT PREPARED", true, Way::ToClient, b"COMMIT PREPARED\0", true),
];

#[tokio::test]
async fn a_death_at_each_step_leaves_both_parts_or_neither() {
    let mut stage = Stage::start("").await;
    let mut expected = 100;
    for dies in [Dies::Proxy, Dies::Old, Dies::New] {
        for (name, to_new, way, pattern, committed) in STEPS {
            // All of them before a release.
            if !proof()
                && dies != Dies::Proxy
                && (dies == Dies::New || !matches!(name, "COMMIT" | "the answer to COMMIT"))
            {
                continue;
            }
            let case = format!("{dies:?} dies at {name}");
            let client = stage.pair.client().await;
            let link = if to_new { &stage.new } else { &stage.old };
            // Row 1 was written by the connection that is watched: others' messages pass.
            let marker: &[u8] = if to_new { b"UPDATE attachments" } else { b"UPDATE orders" };
            let struck = link.trip_behind(marker, way, pattern, Trip::HoldBefore);
            let transfer = tokio::spawn(async move { transfer(&client, 1, 1).await });
            tokio::time::timeout(Duration::from_secs(30), struck).await.expect(&case).expect(&case);
            match dies {
                Dies::Proxy => stage.pair.proxy.kill9(),
                Dies::Old => stage.pair.databases.old.kill9(),
                Dies::New => stage.pair.databases.new.kill9(),
            }
            stage.old.cut();
            stage.new.cut();
            // The message is lost: its connection ends before it is let go.
            tokio::time::sleep(Duration::from_millis(100)).await;
            stage.old.release();
            stage.new.release();
            assert!(transfer.await.expect("no panic").is_err(), "{case}: it was acknowledged");
            match dies {
                Dies::Proxy => stage.pair.proxy.run().await,
                Dies::Old => stage.pair.databases.old.start().await.expect("starts"),
                Dies::New => stage.pair.databases.new.start().await.expect("starts"),
            }
            stage.decided().await;
            expected += i64::from(committed);
            until(&format!("{case}: {expected} is to be seen on new"), async || {
                on(&stage.pair.databases.new, "SELECT amount FROM attachments WHERE id = 1").await
                    == expected.to_string()
            })
            .await;
            assert_eq!(stage.sum().await, 2000, "{case}");
        }
    }
    stage.assert_mirrored().await;
}

/// Interleaving 20: old crashes between PREPARE on new and its own COMMIT, and gives the number of that transaction to a stranger, who commits.
#[tokio::test]
async fn a_stranger_with_the_deciders_number_does_not_decide() {
    let mut stage = Stage::start("").await;
    for attempt in 1.. {
        let client = stage.pair.client().await;
        // Whatever is written on old now is flushed, and nothing else will be until the crash.
        tokio::time::sleep(Duration::from_millis(500)).await;
        on(&stage.pair.databases.old, "CHECKPOINT").await;
        let struck = stage.old.trip_behind(b"UPDATE orders", Way::ToServer, b"Q\0\0\0\x0bCOMMIT\0", Trip::HoldBefore);
        let transfer = tokio::spawn(async move { transfer(&client, 1, 1).await });
        struck.await.expect("COMMIT comes");
        let gid = on(&stage.pair.databases.new, "SELECT gid FROM pg_prepared_xacts").await;
        let xid: i64 = gid.rsplit(':').next().unwrap().parse().expect("a number");
        stage.pair.proxy.kill9();
        stage.pair.databases.old.kill9();
        stage.old.cut();
        stage.new.cut();
        tokio::time::sleep(Duration::from_millis(100)).await;
        stage.old.release();
        drop(transfer.await);
        stage.pair.databases.old.start().await.expect("starts");
        let mut last = 0;
        while last < xid {
            last =
                on(&stage.pair.databases.old, "INSERT INTO audit VALUES ('a stranger') RETURNING pg_current_xact_id()")
                    .await
                    .parse()
                    .expect("a number");
        }
        let status = on(&stage.pair.databases.old, &format!("SELECT pg_xact_status('{xid}')")).await;
        stage.pair.proxy.run().await;
        stage.decided().await;
        assert_eq!(stage.sum().await, 2000);
        assert_eq!(on(&stage.pair.databases.new, "SELECT amount FROM attachments WHERE id = 1").await, "100");
        if status == "committed" {
            break;
        }
        assert!(attempt < 10, "the number was never given out again: it is {status}");
    }
    stage.assert_mirrored().await;
}

/// While old decides nobody settles what is prepared, however long it takes.
#[tokio::test]
async fn a_transaction_in_progress_is_left_alone() {
    let stage = Stage::start("").await;
    let client = stage.pair.client().await;
    let struck = stage.old.trip_behind(b"UPDATE orders", Way::ToServer, b"Q\0\0\0\x0bCOMMIT\0", Trip::HoldBefore);
    let transfer = tokio::spawn(async move { transfer(&client, 1, 1).await });
    struck.await.expect("COMMIT comes");
    let proxy = &stage.pair.proxy;
    until("the metric says so", async || proxy.metrics("crossfade_in_doubt_transactions").await == 1.0).await;
    let status = proxy.crossfade(&["status"]).await;
    assert!(String::from_utf8_lossy(&status.stdout).contains("prepared on new"), "{status:?}");
    let repair = proxy.crossfade(&["repair"]).await;
    assert_eq!(repair.status.code(), Some(1), "{repair:?}");
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(on(&stage.pair.databases.new, "SELECT count(*) FROM pg_prepared_xacts").await, "1");
    // Nor is the phase moved meanwhile.
    let moved = proxy.crossfade(&["phase", "dual-write", "--dry-run"]).await;
    assert!(String::from_utf8_lossy(&moved.stdout).contains("undecided: crossfade:"), "{moved:?}");
    stage.old.release();
    transfer.await.expect("no panic").expect("commits");
    assert_eq!(on(&stage.pair.databases.new, "SELECT amount FROM attachments WHERE id = 1").await, "101");
    assert_eq!(stage.sum().await, 2000);
    stage.assert_mirrored().await;
}
