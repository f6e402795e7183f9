//! A backfill through whatever may happen to it at once: lines to either server that stall, are slow or break, a mirror that is given up by the proxy, repair that
//! comes late and has much to do, a worker that is killed. Afterwards both sides are equal.

mod backfill_support;
mod common;

use std::time::{Duration, Instant};

use backfill_support::Stage;
use backfill_support::shop::{Load, SHOP, years};
use common::link::{Flow, Way};
use common::pair::DATABASE;
use common::{proof, until};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// A line that says nothing for longer is given up.
const PATIENCE: u32 = 2;

/// What happens to the lines, or to who is at work.
#[derive(Clone, Copy, Debug)]
enum Weather {
    /// One way of a line, or both.
    Stall,
    Slow,
    Cut,
    Kill,
    /// Killed, and what it has sent arrives late.
    LateWords,
    /// The mirror's tables are locked: the proxy gives it up, and owes.
    Lock,
    /// Repair has to wait for keys and ranges.
    Late,
}

const WEATHER: &[Weather] = &[
    Weather::Stall,
    Weather::Slow,
    Weather::Cut,
    Weather::Kill,
    Weather::LateWords,
    Weather::LateWords,
    Weather::LateWords,
    Weather::Lock,
    Weather::Late,
];

#[tokio::test(flavor = "multi_thread")]
async fn no_row_is_lost_in_a_storm() {
    let (rows, lasts) = if proof() { (1_000_000, 600) } else { (20_000, 20) };
    let seed = std::env::var("STORM").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random::<u32>);
    eprintln!("STORM={seed}");
    let mut random = StdRng::seed_from_u64(seed.into());
    let stage = Stage::new(SHOP, &years(rows), 3).await;
    let load = Load::start(&stage.proxy, if proof() { 16 } else { 4 }, rows);
    let rate = (rows / lasts).to_string();
    let start = || stage.backfill_so_patient(PATIENCE, &["--jobs", "2", "--rate", &rate]);
    let mut worker = start();
    for number in 1..=3 {
        stage.let_begin(number).await;
        stage.free_keys(number).await;
    }
    let ends = Instant::now() + Duration::from_secs(lasts);
    let mut weathers = Vec::new();
    while Instant::now() < ends {
        let weather = *WEATHER.choose(&mut random).expect("there is weather");
        weathers.push(weather);
        let lasts = Duration::from_millis(random.random_range(0..u64::from(PATIENCE) * 1500));
        let line = if random.random() { &stage.authority } else { &stage.mirror };
        match weather {
            Weather::Stall | Weather::Slow => {
                let ways = *[&[Way::ToServer][..], &[Way::ToClient], &[Way::ToServer, Way::ToClient]]
                    .choose(&mut random)
                    .expect("there are ways");
                let slow = Flow::Delay(Duration::from_millis(random.random_range(1..100)));
                let flow = if matches!(weather, Weather::Stall) { Flow::Stall } else { slow };
                ways.iter().for_each(|way| line.set(*way, flow));
                tokio::time::sleep(lasts).await;
                line.set_both(Flow::Pass);
            }
            Weather::Cut => line.cut(),
            Weather::Kill => {
                worker.kill();
                worker = start();
            }
            Weather::LateWords => {
                let lines = [&stage.authority, &stage.mirror];
                let lines = &lines[[0..1, 1..2, 0..2][random.random_range(0..3)].clone()];
                lines.iter().for_each(|line| line.freeze());
                tokio::time::sleep(Duration::from_millis(random.random_range(0..100))).await;
                worker.kill();
                worker = start();
                tokio::time::sleep(lasts).await;
                lines.iter().for_each(|line| line.thaw());
            }
            Weather::Lock => {
                let client = stage.databases.new.client(DATABASE).await.expect("connects");
                // Where somebody is at work on them all the time, another time.
                let locked = client.batch_execute(
                    "SET lock_timeout = '500ms'; BEGIN; LOCK TABLE accounts, entries, serials IN EXCLUSIVE MODE",
                );
                if locked.await.is_ok() {
                    tokio::time::sleep(lasts).await;
                }
            }
            Weather::Late => {
                let number = random.random_range(1..=3);
                stage.keep_keys(number).await;
                tokio::time::sleep(lasts).await;
                stage.free_keys(number).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..300))).await;
        if worker.has_ended() {
            // What was not about a connection, or there was nothing left to do.
            let (_, said) = worker.end().await;
            eprintln!("{said}");
            worker = start();
        }
    }
    eprintln!("{weathers:?}; {} rows in the ledger", stage.debts().await);
    worker.kill();
    until("a backfill comes to its end", async || stage.backfill(&["--jobs", "2"]).end().await.0.success()).await;
    assert!(load.end().await > 50);
    assert!(stage.settle().await > rows);
}
