//! `crossfade sweep`: what it is asked for, what it shows.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Trouble, what_holds};
use crate::catalog::Catalog;
use crate::config::{self, Config};
use crate::migrate::repair::Repair;
use crate::migrate::sweep::{self, AtWork, Standing, Sweep, Sweeper, Turn, Turned};
use crate::phase::Side;
use crate::server::sweep::{pause, payer, prepare};
use crate::shared::Shared;
use crate::switch::mover;

/// What the command is asked for.
#[derive(clap::Args)]
pub struct SweepArguments {
    /// Go on until it is interrupted. Without it: what was written up to now.
    #[arg(long)]
    follow: bool,
    /// End it: drop its slots on both sides. What is written around the proxy is not seen from then on.
    #[arg(long, conflicts_with = "follow")]
    end: bool,
}

/// How often another sweep is looked at, and before one that failed begins again.
const LOOK: Duration = Duration::from_millis(200);
const AGAIN: Duration = Duration::from_secs(1);
/// How often the slot is looked after.
const WATCH: Duration = Duration::from_secs(2);
/// How long failures in a row are put up with.
const FAILING: Duration = Duration::from_secs(60);

/// What a stretch of sweeping has come to.
enum Ended {
    /// All that was asked for is swept.
    Done,
    /// To be opened anew.
    Again,
    /// Another one is at work.
    Elsewhere,
}

/// `crossfade sweep`: true when what was asked for is swept.
pub async fn sweep(path: &Path, arguments: SweepArguments) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    if arguments.end {
        return end(&config).await;
    }
    let work = work(&config, &arguments);
    tokio::select! {
        done = work => done,
        interrupted = interrupted() => {
            println!("interrupted: the next sweep goes on from where this one was");
            interrupted.map(|()| true)
        }
    }
}

async fn end(config: &Config) -> Result<bool, Trouble> {
    for side in Side::BOTH {
        let client = Shared::database(config, side).connect("crossfade sweep").await?;
        let ended = sweep::slot::end(&client, side).await?;
        println!("{side}: {}", if ended { "the sweep has ended, its slot is dropped" } else { "there is no sweep" });
    }
    if config.sweep.follow {
        println!("sweep.follow is on: a proxy with this file begins another one; set it to false");
    }
    Ok(true)
}

async fn interrupted() -> Result<(), Trouble> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

async fn work(config: &Config, arguments: &SweepArguments) -> Result<bool, Trouble> {
    let mut total = Turn::default();
    let mut failing: Option<Instant> = None;
    loop {
        match stretch(config, arguments, &mut total, &mut failing).await {
            Ok(Ended::Done) => {
                println!("{}", counts(&total));
                return Ok(true);
            }
            Ok(Ended::Again) => tokio::time::sleep(LOOK).await,
            Ok(Ended::Elsewhere) if arguments.follow => tokio::time::sleep(AGAIN).await,
            Ok(Ended::Elsewhere) => return wait_for_other(config).await,
            Err(error) => {
                let since = *failing.get_or_insert_with(Instant::now);
                let fit = error.downcast_ref::<crate::migrate::Error>();
                let hopeless = matches!(fit, Some(crate::migrate::Error::Unfit(_)));
                if hopeless || (!arguments.follow && since.elapsed() > FAILING) {
                    return Err(error);
                }
                eprintln!("{error}; it goes on");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Sweeps with the definitions of now, and under the phase of now, as long as they hold.
async fn stretch(
    config: &Config,
    arguments: &SweepArguments,
    total: &mut Turn,
    failing: &mut Option<Instant>,
) -> Result<Ended, Trouble> {
    let holds = what_holds(config).await?;
    let Some((authority, other)) = sweep::sides(holds.phase) else {
        println!("phase {}: the other side is not written any more, there is nothing to sweep for", holds.phase);
        return Ok(Ended::Done);
    };
    let (catalog, whole) = mover::load_catalog(config, authority).await?;
    if !whole {
        return Err(format!("{other} cannot be reached; nothing can be compared").into());
    }
    let catalog = Arc::new(catalog);
    let Some(job) = prepare(config, (holds.phase, holds.epoch), catalog.clone()).await? else {
        return Ok(Ended::Done);
    };
    let Some(mut sweeper) = Sweeper::open(&job).await? else { return Ok(Ended::Elsewhere) };
    if total.changes == 0 && failing.is_none() {
        sweeper
            .lacking()
            .for_each(|why| println!("{why}; until then a write around the proxy has the whole table compared"));
    }
    let mut payer = payer(&job).await?;
    let at_work = Arc::new(AtWork::default());
    payer.leaves_taints = Some(at_work.clone());
    let slots = Shared::database(config, authority).connect("crossfade sweep").await?;
    let target = sweep::slot::flushed_end(&slots, authority).await?;
    let mut watched = Instant::now();
    loop {
        let turn = match sweeper.turn().await {
            Ok(Turned::Done(turn)) => turn,
            Ok(Turned::Outdated) => return Ok(Ended::Again),
            Err(error) if sweep::is_overtaken(&error) => return Ok(Ended::Again),
            Err(error) if sweep::is_busy(&error) && !sweeper.is_broken() => {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        *failing = None;
        at_work.note(sweeper.clears());
        tell(&turn, &catalog, arguments.follow);
        add(total, &turn);
        pay(&mut payer, &job, &turn).await?;
        if !arguments.follow && turn.passed.is_some_and(|passed| passed >= target) {
            return Ok(Ended::Done);
        }
        if watched.elapsed() > WATCH {
            watched = Instant::now();
            if let Some(why) = sweep::watch(&slots, authority, config.sweep.retain as u64).await? {
                eprintln!(
                    "{authority}: the sweep's slot was dropped: {why}. It begins anew, and all tables are compared"
                );
                return Ok(Ended::Again);
            }
        }
        tokio::time::sleep(pause(&turn)).await;
    }
}

/// In a phase with a mirror the proxy pays, too: they do not disturb each other.
async fn pay(payer: &mut Repair, job: &Sweep, turn: &Turn) -> Result<(), Trouble> {
    let before = matches!(job.epoch, sweep::Epoch::Before);
    if before || turn.owed > 0 || turn.cleared > 0 {
        payer.pass().await?;
    }
    Ok(())
}

fn add(total: &mut Turn, turn: &Turn) {
    total.changes += turn.changes;
    total.owed += turn.owed;
    total.cleared += turn.cleared;
    total.whole.extend(&turn.whole);
}

fn counts(turn: &Turn) -> String {
    format!(
        "{} changes swept, {} keys differed and are owed, {} tables are owed as a whole, {} taints cleared",
        turn.changes,
        turn.owed,
        turn.whole.len(),
        turn.cleared
    )
}

fn tell(turn: &Turn, catalog: &Catalog, follow: bool) {
    for table in turn.whole.iter().filter_map(|number| catalog.tables.get(number)) {
        println!("{}: it was written around the proxy, and no key says where: the whole table is owed", table.label());
    }
    if follow && (turn.owed > 0 || turn.cleared > 0) {
        println!("{}", counts(turn));
    }
}

/// Until whoever sweeps has passed what is written now.
async fn wait_for_other(config: &Config) -> Result<bool, Trouble> {
    let holds = what_holds(config).await?;
    let Some((side, _)) = sweep::sides(holds.phase) else { return Ok(true) };
    let client = Shared::database(config, side).connect("crossfade sweep").await?;
    let end = sweep::slot::flushed_end(&client, side).await?;
    println!("another sweep is at work (a proxy with sweep.follow?): waiting until it has passed what is written now");
    loop {
        match sweep::standing(&client, side).await? {
            Some(Standing { lost: None, swept: Some(swept), .. }) if swept >= end => return Ok(true),
            Some(Standing { lost: Some(why), .. }) => return Err(lost(side, &why)),
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

fn lost(side: Side, why: &str) -> Trouble {
    format!("{side}: the sweep's slot was given up: {why}; the next sweep begins anew and compares all tables").into()
}
