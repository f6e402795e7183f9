//! The sweep beside the sessions: what was written around the proxy is found and owed; slots that keep too much log are given up.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Client;
use tracing::{debug, error, info, warn};

use crate::catalog::Catalog;
use crate::config::{Commit, Config};
use crate::migrate;
use crate::migrate::repair::Repair;
use crate::migrate::sweep::{self, Epoch, Sweep, Sweeper, Turn, Turned, Unnamed};
use crate::phase::{Phase, Side};
use crate::shared::{Shared, World};
use crate::switch::mover::{self, MoveError};

/// Between two turns, at least; and as a share of the time that reading takes, since the server decodes again from where its oldest transaction began.
const PAUSE: Duration = Duration::from_millis(300);
const READING: u32 = 4;
/// Before a sweep is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// How often slots are looked at, and whether there are any.
const WATCH: Duration = Duration::from_secs(2);
const UNUSED: Duration = Duration::from_secs(15);

/// How long to wait after a turn.
pub fn pause(turn: &Turn) -> Duration {
    if turn.more { Duration::ZERO } else { PAUSE.max(turn.reading * READING) }
}

/// What is to be swept in this phase, with schema crossfade made where it lacks the sweep's table. None: nothing.
pub async fn prepare(
    config: &Config,
    (phase, epoch): (Phase, u64),
    catalog: Arc<Catalog>,
) -> Result<Option<Sweep>, MoveError> {
    let Some((authority_side, other)) = sweep::sides(phase) else { return Ok(None) };
    let mut first_debt = 0;
    for side in [other, authority_side] {
        let client = Shared::database(config, side).connect("crossfade sweep").await?;
        let there = client.query_one("SELECT to_regclass('crossfade.sweep') IS NOT NULL", &[]).await?;
        if !there.get::<_, bool>(0) {
            migrate::install(&client, side).await?;
        }
        if side == authority_side {
            first_debt = mover::draw_block(&client).await?;
        }
    }
    let owing = phase.mirror().is_some() && config.mirror.commit == Commit::Ledger;
    Ok(Some(Sweep {
        authority_side,
        authority: Shared::database(config, authority_side).clone(),
        mirror: Shared::database(config, other).clone(),
        catalog,
        epoch: if phase.mirror().is_some() { Epoch::Mirrored(epoch) } else { Epoch::Before },
        unnamed: if owing { Unnamed::Owed } else { Unnamed::PassedOver },
        first_debt,
    }))
}

/// Who pays where no proxy does: before the first mirrored phase.
pub async fn payer(sweep: &Sweep) -> Result<Repair, migrate::Error> {
    let sides = (&sweep.authority, &sweep.mirror);
    let pair =
        migrate::Pair::open(sweep.authority_side, sides, "crossfade sweep", migrate::Settings::default()).await?;
    let mut payer = Repair::new(pair, sweep.catalog.clone());
    payer.leaves_backfills = Some(super::jobs::BACKFILL);
    Ok(payer)
}

/// Sweeps while the file says so.
pub async fn follow(shared: Arc<Shared>) {
    let mut said = String::new();
    loop {
        let world = shared.world.load_full();
        let config = shared.config.load_full();
        let mirror_is_down = world.phase.mirror().is_some_and(|side| !shared.health.get(side).up());
        if config.sweep.follow && !mirror_is_down {
            match follow_world(&shared, &world, &config).await {
                Ok(Next::AtOnce) => {
                    said.clear();
                    continue;
                }
                Ok(Next::Later) => said.clear(),
                Err(error) => {
                    let error = error.to_string();
                    if error != said {
                        warn!(%error, "the sweep cannot go on; it is tried again");
                    }
                    said = error;
                }
            }
            shared.sweep.end();
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// When it is to begin anew.
enum Next {
    AtOnce,
    /// Another proxy sweeps, or there is nothing to sweep for.
    Later,
}

/// As long as nothing changes.
async fn follow_world(shared: &Arc<Shared>, world: &World, config: &Config) -> Result<Next, MoveError> {
    let catalog = match world.phase.mirror() {
        Some(_) => world.catalog.clone(),
        None => match mover::load_catalog(config, world.phase.authority()).await? {
            (catalog, true) => Arc::new(catalog),
            (_, false) => return Ok(Next::Later),
        },
    };
    let Some(sweep) = prepare(config, (world.phase, world.epoch), catalog).await? else {
        return end_all(config).await.map(|()| Next::Later);
    };
    let Some(mut sweeper) = Sweeper::open(&sweep).await? else { return Ok(Next::Later) };
    info!(side = %sweep.authority_side, phase = %world.phase, "the sweep follows what is written there");
    sweeper.lacking().for_each(|why| warn!("{why}; until then a write around the proxy has the whole table compared"));
    let mut payer = if world.phase.mirror().is_none() { Some(payer(&sweep).await?) } else { None };
    let same = || {
        let now = shared.world.load();
        now.generation == world.generation && now.epoch == world.epoch && shared.config.load().sweep.follow
    };
    while same() {
        let begun = std::time::Instant::now();
        let turned = sweeper.turn().await;
        debug!(took = ?begun.elapsed(), ?turned, "a turn");
        let turn = match turned {
            Ok(Turned::Done(turn)) => turn,
            Ok(Turned::Outdated) => {
                debug!("definitions have changed: the sweep begins anew with them");
                shared.stale.notify_one();
                tokio::time::sleep(PAUSE).await;
                return Ok(Next::AtOnce);
            }
            // A move that waits for us has the epoch, and gives it back.
            Err(error) if sweep::is_busy(&error) && !sweeper.is_broken() => {
                debug!(%error, "the sweep tries again");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            // The world is about to change.
            Err(error) if sweep::is_overtaken(&error) => return Ok(Next::Later),
            Err(error) => return Err(error.into()),
        };
        shared.sweep.note(sweeper.clears());
        tell(shared, &turn, &sweep.catalog);
        if let Some(payer) = &mut payer
            && payer.pass().await?.repaired_rows > 0
        {
            debug!("rows were brought up to date");
        }
        let behind = sweeper.behind().await?;
        shared.metrics.sweep_behind_bytes.set(behind as i64);
        tokio::time::sleep(pause(&turn)).await;
    }
    Ok(Next::AtOnce)
}

fn tell(shared: &Shared, turn: &Turn, catalog: &Catalog) {
    let metrics = &shared.metrics;
    metrics.sweep_changes.inc_by(turn.changes);
    metrics.sweep_owed.inc_by(turn.owed);
    metrics.sweep_taints_cleared.inc_by(turn.cleared);
    if turn.owed > 0 {
        info!(keys = turn.owed, "rows that were written around the proxy, or out of its sight, differ: they are owed");
    }
    for table in turn.whole.iter().filter_map(|number| catalog.tables.get(number)) {
        warn!(table = %table.label(), "it was written around the proxy, and no key says where: the whole table is owed");
    }
    if turn.owed > 0 || turn.cleared > 0 || !turn.whole.is_empty() {
        shared.owed.notify_one();
    }
}

/// In phases whose other side is not written any more there is nothing to sweep for.
async fn end_all(config: &Config) -> Result<(), MoveError> {
    for side in Side::BOTH {
        let client = Shared::database(config, side).connect("crossfade sweep").await?;
        if sweep::slot::end(&client, side).await? {
            info!(%side, "the sweep has ended there: its slot is dropped");
        }
    }
    Ok(())
}

/// Looks after the slots of both sides, whoever reads them.
pub async fn watch(shared: Arc<Shared>) {
    let mut clients: [Option<Client>; 2] = [None, None];
    let (mut pause, mut said) = (WATCH, String::new());
    loop {
        tokio::time::sleep(pause).await;
        let config = shared.config.load_full();
        pause = if config.sweep.follow { WATCH } else { UNUSED };
        for (side, client) in Side::BOTH.into_iter().zip(&mut clients) {
            if client.as_ref().is_none_or(Client::is_closed) {
                let mirror_is_down = shared.world.load().phase.mirror() == Some(side) && !shared.health.get(side).up();
                *client = match mirror_is_down {
                    true => None,
                    false => Shared::database(&config, side).connect("crossfade slots").await.ok(),
                };
            }
            let Some(open) = client else { continue };
            match look(&shared, &config, open, side).await {
                Ok(true) => pause = WATCH,
                Ok(false) => *client = None,
                Err(error) => {
                    debug!(%side, %error, "the sweep's slot cannot be looked at");
                    (*client, pause) = (None, WATCH);
                }
            }
        }
        if let Err(error) = keep(&shared, &clients).await {
            let error = error.to_string();
            if error != said {
                warn!(%error, "the mirror has no slot: when it becomes the authority, what is written around the proxy at first is not seen");
            }
            said = error;
        }
    }
}

/// The mirror's slot follows that of the authority.
async fn keep(shared: &Shared, clients: &[Option<Client>; 2]) -> Result<(), migrate::Error> {
    let world = shared.world.load_full();
    let Some(mirror) = world.phase.mirror() else { return Ok(()) };
    let client = |side: Side| clients[usize::from(side == Side::New)].as_ref();
    let Some(authority) = client(mirror.other()) else { return Ok(()) };
    if !shared.health.get(mirror).up() || sweep::standing(authority, mirror.other()).await?.is_none() {
        return Ok(());
    }
    let config = shared.config.load_full();
    let connected = Shared::database(&config, mirror).connect("crossfade slots").await;
    let broken = |error: crate::config::ConnectError| error.to_string();
    let other = connected.map_err(|error| migrate::Error::Broken {
        side: mirror,
        doing: "connecting",
        message: broken(error),
    })?;
    sweep::keep(authority, &other, mirror, world.epoch).await
}

/// False: there is no slot.
async fn look(shared: &Shared, config: &Config, client: &Client, side: Side) -> Result<bool, migrate::Error> {
    if let Some(why) = sweep::watch(client, side, config.sweep.retain as u64).await? {
        shared.metrics.sweep_lost.inc();
        error!(%side, why, "the sweep's slot was dropped: writes around the proxy are not seen until the next sweep begins, which compares all tables");
    }
    let standing = sweep::standing(client, side).await?;
    let retained = standing.as_ref().map_or(0, |standing| standing.retained);
    shared.metrics.sweep_retained_bytes.with_label_values(&[side.name()]).set(retained as i64);
    Ok(standing.is_some())
}
