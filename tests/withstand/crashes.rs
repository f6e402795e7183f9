//! Servers that crash under load, alone and with the proxy. (The proxy alone: tests/stories.rs.)

use std::time::Duration;

use crate::common::load::{Load, SCHEMA, assert_nothing_lost};
use crate::common::{Pair, proof};

/// Who is killed in a round.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Killed {
    Old,
    New,
    Both,
    ProxyAndOld,
    ProxyAndNew,
}

/// Kills under the load of 8 clients, starts again, goes on; at the end nothing is lost, and no error reached a client that only the mirror could
/// have caused.
async fn under_load(killed: Killed, rounds: u64) {
    let mut pair = Pair::dual_write(SCHEMA, "mirror: { timeout: 1s }").await;
    let load = Load::start(&pair.url(), 8);
    for round in 0..rounds {
        load.goes_on(30 + round % 3 * 10).await;
        let Pair { proxy, databases } = &mut pair;
        if matches!(killed, Killed::ProxyAndOld | Killed::ProxyAndNew) {
            proxy.kill9();
        }
        for (side, dies) in [
            (&mut databases.old, matches!(killed, Killed::Old | Killed::Both | Killed::ProxyAndOld)),
            (&mut databases.new, matches!(killed, Killed::New | Killed::Both | Killed::ProxyAndNew)),
        ] {
            if dies {
                side.kill9();
            }
        }
        if killed == Killed::New {
            load.goes_on(20).await;
        }
        // What still runs has seen it.
        tokio::time::sleep(Duration::from_millis(round % 4 * 50)).await;
        for side in [&mut databases.old, &mut databases.new] {
            if !side.running() {
                side.start().await.expect("starts");
            }
        }
        if matches!(killed, Killed::ProxyAndOld | Killed::ProxyAndNew) {
            proxy.run().await;
        }
    }
    load.goes_on(30).await;
    let written = load.end().await;
    if killed == Killed::New {
        assert_eq!((written.errors.len(), written.unknown), (0, 0), "clients heard of it: {:?}", written.errors);
    } else {
        assert!(written.unknown > 0, "no kill met a transaction");
    }
    pair.proxy.settle().await;
    assert_nothing_lost(&pair.databases, &written).await;
}

fn rounds() -> u64 {
    if proof() { 20 } else { 2 }
}

#[tokio::test]
async fn the_authority_is_killed_under_load() {
    under_load(Killed::Old, rounds()).await;
}

#[tokio::test]
async fn the_mirror_is_killed_under_load() {
    under_load(Killed::New, rounds()).await;
}

#[tokio::test]
async fn both_servers_are_killed_under_load() {
    under_load(Killed::Both, rounds()).await;
}

#[tokio::test]
async fn the_proxy_and_a_server_are_killed_under_load() {
    under_load(Killed::ProxyAndOld, rounds()).await;
    under_load(Killed::ProxyAndNew, rounds()).await;
}
