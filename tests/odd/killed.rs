//! The same while the phase moves, and while processes die.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossfade::cluster::{Cluster, Stop};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

use crate::common::pair::DATABASE;
use crate::common::{Pair, Proxy, proof};
use crate::statements::{Kinds, Player, SCHEMA};
use crate::{END_SESSIONS, assert_equal_at_rest};

/// What happens while the clients write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// The other side becomes authority.
    Move,
    /// A move is asked for, and the proxy is killed at some moment of it.
    MoveAndKill,
    /// The proxy is killed.
    Kill,
    /// The mirror ends the proxy's sessions.
    EndMirror,
    /// A side crashes and comes back.
    CrashOld,
    CrashNew,
    /// A side crashes, and the proxy is killed meanwhile.
    CrashBoth,
}

const EVENTS: [Event; 10] = [
    Event::Move,
    Event::CrashNew,
    Event::MoveAndKill,
    Event::CrashOld,
    Event::Kill,
    Event::Move,
    Event::EndMirror,
    Event::CrashBoth,
    Event::MoveAndKill,
    Event::CrashNew,
];

/// One client that goes on, over new connections where it loses its own, until it is told to stop.
fn play(url: String, seed: u64, kinds: Kinds, stop: Arc<AtomicBool>) -> JoinHandle<Vec<String>> {
    tokio::spawn(async move {
        let (mut random, mut done) = (StdRng::seed_from_u64(seed), Vec::new());
        while !stop.load(Ordering::Relaxed) {
            let Some(client) = connect(&url).await else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let mut player = Player { client, random, kinds, done };
            while !stop.load(Ordering::Relaxed) && player.transaction().await.is_ok() {}
            (random, done) = (player.random, player.done);
        }
        done
    })
}

async fn connect(url: &str) -> Option<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.ok()?;
    tokio::spawn(async move { drop(connection.await) });
    client.batch_execute("SET lock_timeout = '2s'").await.ok()?;
    Some(client)
}

async fn crash(side: &mut Cluster) {
    side.restart(Stop::Immediate).await.expect("comes back");
}

fn other(phase: &str) -> &'static str {
    if phase == "dual-write" { "new-primary" } else { "dual-write" }
}

/// The phase that holds after at most 10 s, if it is this one.
async fn moved(proxy: &Proxy, phase: &str) -> bool {
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        if proxy.holds(phase).await {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn random_statements_go_on_while_the_phase_moves_and_processes_die() {
    let mut pair = Pair::dual_write(SCHEMA, "mirror: { timeout: 2s }").await;
    let (mut phase, mut moves) = ("dual-write", 0);
    let rounds = if proof() { 100 } else { 3_u64 };
    // A move may wait for a slow mirror until all have ended: then once more, or nothing was forced.
    for round in 0..rounds + 5 {
        if round >= rounds && moves > 0 {
            break;
        }
        let event = if round < rounds { EVENTS[round as usize % EVENTS.len()] } else { Event::Move };
        let moving = matches!(event, Event::Move | Event::MoveAndKill);
        let kinds = if moving { Kinds::Captured } else { Kinds::All };
        if moving {
            pair.proxy.verify().await;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let players: Vec<_> = (0..4).map(|own| play(pair.url(), round * 10 + own, kinds, stop.clone())).collect();
        let mut random = StdRng::seed_from_u64(round);
        tokio::time::sleep(Duration::from_millis(random.random_range(100..400))).await;
        match event {
            Event::Move => {
                pair.proxy.request_phase(other(phase));
                moves += u32::from(moved(&pair.proxy, other(phase)).await);
            }
            Event::MoveAndKill => {
                pair.proxy.request_phase(other(phase));
                tokio::time::sleep(Duration::from_millis(random.random_range(0..300))).await;
                pair.proxy.restart().await;
            }
            Event::Kill => pair.proxy.restart().await,
            Event::EndMirror => {
                let mirror = if phase == "dual-write" { &pair.databases.new } else { &pair.databases.old };
                mirror.run(DATABASE, END_SESSIONS).await.expect("ends the proxy's sessions");
            }
            Event::CrashOld => crash(&mut pair.databases.old).await,
            Event::CrashNew => crash(&mut pair.databases.new).await,
            Event::CrashBoth => {
                pair.proxy.kill9();
                let mirror = if phase == "dual-write" { &mut pair.databases.new } else { &mut pair.databases.old };
                crash(mirror).await;
                pair.proxy.run().await;
            }
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        stop.store(true, Ordering::Relaxed);
        let mut done = Vec::new();
        for player in players {
            done.push(player.await.expect("runs").join("\n"));
        }
        // Shown where something fails.
        println!("round {round}: {event:?} in {phase}\n{}", done.join("\n-- next client\n"));
        assert_equal_at_rest(&pair).await;
        if moving {
            phase = other(phase);
            pair.proxy.reaches(phase).await;
            assert_equal_at_rest(&pair).await;
        }
    }
    assert!(moves > 0, "no move took place while clients wrote: the test has forced nothing");
}
