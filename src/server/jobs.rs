//! What runs beside the sessions: clearing debts, repair, probing a mirror that is down, reading definitions again, following the file.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use notify::Watcher;
use tokio::sync::{mpsc, watch};
use tokio_postgres::Client;
use tracing::{debug, error, info, warn};

use super::Stop;
use crate::catalog::{definitions, fingerprint};
use crate::config::Config;
use crate::ledger::clear::{self, ClearError, Clearing, flush_and_clear};
use crate::migrate::repair::Repair;
use crate::migrate::{self, Pair};
use crate::phase::Side;
use crate::shared::{Paid, Shared, World, lock};
use crate::switch::learn::Follower;
use crate::switch::mover::{self, Stays};
use crate::switch::record::Ask;
use crate::switch::renew::{renew, renew_if_other, renew_staying};

/// How often debts that were paid are cleared.
const CLEAR: Duration = Duration::from_millis(200);

/// How often a ledger that was cleared is vacuumed.
const VACUUM: Duration = Duration::from_secs(10);

/// How long after a closed gate a move is tried again; and after one that held clients in vain.
const MOVE_AGAIN: Duration = Duration::from_secs(1);
const MOVE_HELD: Duration = Duration::from_secs(30);

/// How often debts that are owed are looked for.
const REPAIR: Duration = Duration::from_secs(1);

/// How long a backfill that was ended has, to be run again, before repair pays its tables in its stead.
pub(super) const BACKFILL: Duration = Duration::from_secs(600);

/// How often tokens that no debt needs any more are removed.
const SWEEP: Duration = Duration::from_secs(60);

/// SIGHUP reads the file again, SIGTERM and SIGINT drain, the second of them ends at once.
pub fn signals(stop: watch::Sender<Stop>, path: PathBuf, shared: Arc<Shared>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut hangup), Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::hangup()), signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return error!("signals cannot be received");
    };
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = hangup.recv() => reload(&shared, &path),
                () = shared.reload.notified() => {
                    reload(&shared, &path);
                    shared.reloaded.notify_waiters();
                }
                () = shared.shutdown.notified() => further(&stop),
                _ = terminate.recv() => further(&stop),
                _ = interrupt.recv() => further(&stop),
            }
        }
    });
}

fn further(stop: &watch::Sender<Stop>) {
    stop.send_modify(|stop| *stop = if *stop == Stop::No { Stop::Drain } else { Stop::Now });
}

/// Starts all jobs.
pub fn start(shared: &Arc<Shared>, follower: Follower) {
    tokio::spawn(clear(shared.clone()));
    tokio::spawn(repair(shared.clone()));
    for side in Side::BOTH {
        tokio::spawn(probe(shared.clone(), side));
    }
    tokio::spawn(refresh(shared.clone()));
    tokio::spawn(super::reads::compare(shared.clone()));
    tokio::spawn(super::reads::look(shared.clone()));
    tokio::spawn(super::reads::block(shared.clone()));
    tokio::spawn(super::reads::keep(shared.clone()));
    tokio::spawn(observe(shared.clone()));
    tokio::spawn(crate::switch::learn::follow(shared.clone(), follower));
    tokio::spawn(move_phase(shared.clone()));
    tokio::spawn(super::sweep::follow(shared.clone()));
    tokio::spawn(super::sweep::watch(shared.clone()));
    tokio::spawn(super::verify::follow(shared.clone()));
    tokio::spawn(super::fence::keep(shared.clone()));
    tokio::spawn(super::late::end(shared.clone()));
    tokio::spawn(super::undecided::settle(shared.clone()));
    tokio::spawn(super::deadlocks::watch(shared.clone()));
    tokio::spawn(super::lives::watch(shared.clone()));
}

/// The two control connections of a job, opened anew where they were lost or the authority has changed.
#[derive(Default)]
pub(super) struct Hands {
    pub(super) open: Option<(Side, Client, Client)>,
}

impl Hands {
    /// To the authority and to the mirror.
    pub(super) async fn get(
        &mut self,
        shared: &Shared,
        name: &str,
    ) -> Result<Option<(&Client, &Client)>, crate::config::ConnectError> {
        let phase = shared.world.load().phase;
        let Some(mirror) = phase.mirror() else {
            self.open = None;
            return Ok(None);
        };
        self.both(shared, mirror, name).await.map(Some)
    }

    /// To the side that is not this one, and to this one.
    pub(super) async fn both(
        &mut self,
        shared: &Shared,
        mirror: Side,
        name: &str,
    ) -> Result<(&Client, &Client), crate::config::ConnectError> {
        let open = self.open.take().filter(|(side, a, b)| *side == mirror && !a.is_closed() && !b.is_closed());
        let open = match open {
            Some(open) => open,
            None => {
                let config = shared.config.load_full();
                let authority = Shared::database(&config, mirror.other()).connect(name).await?;
                (mirror, authority, Shared::database(&config, mirror).connect(name).await?)
            }
        };
        let (_, authority, mirror) = self.open.insert(open);
        Ok((authority, mirror))
    }
}

/// Debts whose mirror transactions have answered COMMIT: one flushed commit on the mirror, then their ledger rows go, in batches.
async fn clear(shared: Arc<Shared>) {
    let mut hands = Hands::default();
    let mut vacuumed = Instant::now();
    let mut room = false;
    loop {
        tokio::time::sleep(CLEAR).await;
        // While a batch is under way the queue is not empty: the end of the proxy waits for it.
        shared.paid.carrying.fetch_add(1, Ordering::SeqCst);
        let cleared = match shared.paid.take() {
            paid if paid.is_empty() => Ok(()),
            paid => {
                room = true;
                clear_batch(&shared, &mut hands, paid).await
            }
        };
        let failed = cleared.is_err();
        if let Err((rest, error)) = cleared {
            debug!(%error, "debts could not be cleared yet");
            hands.open = None;
            // They may be cleared by any later flush in the same incarnation.
            rest.into_iter().for_each(|paid| shared.paid.push(paid));
        }
        shared.paid.carrying.fetch_sub(1, Ordering::SeqCst);
        if failed {
            tokio::time::sleep(CLEAR * 2).await;
        } else if room && vacuumed.elapsed() > VACUUM {
            (room, vacuumed) = (false, Instant::now());
            if let Ok(Some((authority, _))) = hands.get(&shared, "crossfade clear").await
                && let Err(error) = clear::vacuum(authority).await
            {
                debug!(%error, "the ledger could not be vacuumed");
            }
        }
    }
}

async fn clear_batch(shared: &Shared, hands: &mut Hands, mut paid: Vec<Paid>) -> Result<(), (Vec<Paid>, String)> {
    let (authority, mirror) = match hands.get(shared, "crossfade clear").await {
        Ok(Some(clients)) => clients,
        // The phase has no mirror any more: its move has emptied the ledger.
        Ok(None) => return Ok(()),
        Err(error) => return Err((paid, error.to_string())),
    };
    while let Some(first) = paid.first() {
        let incarnation = first.incarnation;
        let (now, later): (Vec<_>, Vec<_>) = paid.iter().copied().partition(|paid| paid.incarnation == incarnation);
        let ids: Vec<i64> = now.iter().map(|paid| paid.id).collect();
        match flush_and_clear(mirror, authority, &ids, &uuid(incarnation), Clearing::Lazy).await {
            Ok(_) => {}
            // What was answered in another incarnation may be lost: it is owed, and repair looks at it.
            Err(ClearError::Reincarnated) => shared.owed.notify_one(),
            Err(error) => return Err((paid, error.to_string())),
        }
        paid = later;
    }
    Ok(())
}

fn uuid(bytes: [u8; 16]) -> String {
    let digits = format!("{:032x}", u128::from_be_bytes(bytes));
    format!("{}-{}-{}-{}-{}", &digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..])
}

/// Pays what is owed.
async fn repair(shared: Arc<Shared>) {
    let mut worker: Option<(u64, Repair)> = None;
    let mut swept: Option<Instant> = None;
    loop {
        tokio::select! {
            () = shared.owed.notified() => {}
            () = tokio::time::sleep(REPAIR) => {}
        }
        let world = shared.world.load_full();
        let Some(mirror) = world.phase.mirror().filter(|mirror| shared.health.get(*mirror).up()) else {
            worker = None;
            continue;
        };
        if worker.as_ref().is_none_or(|(generation, repair)| *generation != world.generation || repair.pair.is_broken())
        {
            worker = match open_repair(&shared, mirror).await {
                Ok(repair) => Some((world.generation, repair)),
                Err(error) => {
                    debug!(%error, "repair cannot begin");
                    None
                }
            };
        }
        let Some((_, repair)) = &mut worker else { continue };
        match repair.pass().await {
            Ok(summary) => {
                if summary.repaired_rows > 0 {
                    info!(rows = summary.repaired_rows, cleared = summary.cleared, owed = summary.owed, "repaired");
                }
                for (table, error) in summary.refused {
                    warn!(%table, %error, "the mirror refuses rows; their debts stay");
                }
            }
            Err(error) => {
                debug!(%error, "repair was interrupted");
                worker = None;
                continue;
            }
        }
        if swept.is_none_or(|at| at.elapsed() > SWEEP) {
            swept = Some(Instant::now());
            match migrate::tokens::sweep(&mut repair.pair).await {
                Ok(0) => {}
                Ok(tokens) => debug!(tokens, "tokens that no debt needs any more were removed"),
                Err(error) => {
                    debug!(%error, "tokens could not be swept");
                    worker = None;
                }
            }
        }
    }
}

async fn open_repair(shared: &Shared, mirror: Side) -> Result<Repair, Box<dyn std::error::Error + Send + Sync>> {
    let config = shared.config.load_full();
    let world = shared.world.load_full();
    let authority = Shared::database(&config, mirror.other()).connect("crossfade repair").await?;
    let second = Shared::database(&config, mirror).connect("crossfade repair").await?;
    let pair = Pair::new(mirror.other(), authority, second, migrate::Settings::default()).await?;
    let mut repair = Repair::new(pair, world.catalog.clone());
    repair.leaves_backfills = Some(BACKFILL);
    repair.leaves_taints = Some(shared.sweep.clone());
    Ok(repair)
}

/// Finds out when a mirror that failed is back.
async fn probe(shared: Arc<Shared>, side: Side) {
    loop {
        shared.health.get(side).tripped().await;
        let mut pause = Duration::from_millis(100);
        loop {
            let config = shared.config.load_full();
            let timeout = config.mirror.timeout;
            let open = crate::mirror::conn::MirrorConn::open(Shared::database(&config, side), side, 0, None);
            match tokio::time::timeout(timeout, open).await {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => debug!(%side, %error, "the mirror is still down"),
                Err(_) => debug!(%side, "the mirror still does not answer"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
        // Definitions that were taken from the authority while the mirror was down are read before anything is sent to it.
        if let Err(error) = renew(&shared).await {
            debug!(%error, "definitions cannot be read yet");
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        shared.health.get(side).restore();
        shared.owed.notify_one();
        info!(%side, "the mirror is back");
    }
}

/// How often it is asked whether definitions have changed, and how often where a change is under way; and how often all of them are compared, where no
/// event trigger tells (roles are told of by none).
const VERSION: Duration = Duration::from_secs(1);
const UNSETTLED: Duration = Duration::from_millis(100);
const FINGERPRINT: Duration = Duration::from_secs(5);

/// Reads the definitions again where they have changed.
async fn refresh(shared: Arc<Shared>) {
    let mut prints: Option<(String, String)> = None;
    let mut compared = Instant::now();
    let mut hands = Hands::default();
    loop {
        let pause = match shared.world.load().catalog.is_settled() {
            true => VERSION,
            false => UNSETTLED,
        };
        let told = tokio::select! {
            () = shared.stale.notified() => true,
            () = tokio::time::sleep(pause) => false,
        };
        let Some(mirror) = shared.world.load().phase.mirror() else {
            refresh_staying(&shared, &mut hands).await;
            continue;
        };
        if !shared.health.get(mirror).up() {
            continue;
        }
        let Ok(Some((authority, other))) = hands.get(&shared, "crossfade catalog").await else { continue };
        let found = async { Some((definitions(authority).await.ok()?, definitions(other).await.ok()?)) };
        let Some(found) = found.await else { continue };
        let known = shared.world.load().catalog.definitions.clone();
        let told = told && (found.0.version.is_none() || found.1.version.is_none());
        let mut changed = (known.get(mirror.other()), known.get(mirror)) != (&found.0, &found.1);
        if !changed && (told || prints.is_none() || compared.elapsed() > FINGERPRINT) {
            let now = async { Some((fingerprint(authority).await.ok()?, fingerprint(other).await.ok()?)) };
            let Some(now) = now.await else { continue };
            changed = prints.as_ref().is_some_and(|known| *known != now);
            let first = prints.is_none();
            (prints, compared) = (Some(now), Instant::now());
            // It is later than the definitions that it is to watch over: those are read once more.
            if first && let Err(error) = renew_if_other(&shared).await {
                prints = None;
                debug!(%error, "definitions cannot be read once more");
            }
        }
        if (changed || told)
            && let Err(error) = renew(&shared).await
        {
            prints = None;
            warn!(%error, "definitions cannot be read again");
        }
    }
}

/// The same where new alone is written and some tables stay on old.
async fn refresh_staying(shared: &Arc<Shared>, hands: &mut Hands) {
    let world = shared.world.load_full();
    if !world.splits() {
        return;
    }
    let Ok((new, old)) = hands.both(shared, Side::Old, "crossfade catalog").await else { return };
    let (Ok(new), Ok(old)) = (definitions(new).await, definitions(old).await) else { return };
    let known = &world.catalog.definitions;
    if (new != known.new || old != known.old)
        && let Err(error) = renew_staying(shared).await
    {
        warn!(%error, "definitions cannot be read again");
    }
}

/// Keeps the metrics that are read from the databases.
async fn observe(shared: Arc<Shared>) {
    let mut authority: Option<(Side, Client)> = None;
    let mut mirror: Option<(Side, Client)> = None;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let world = shared.world.load_full();
        let (hits, misses, bytes) = shared.plans.counts();
        let metrics = &shared.metrics;
        metrics.plan_hits.inc_by(hits.saturating_sub(metrics.plan_hits.get()));
        metrics.plan_misses.inc_by(misses.saturating_sub(metrics.plan_misses.get()));
        metrics.plan_cache_bytes.set(bytes as i64);
        let Some(side) = world.phase.mirror() else {
            metrics.mirror_up.set(1);
            metrics.set_debts(&[]);
            metrics.tainted_tables.set(0);
            metrics.debt_in_flight.set(0);
            metrics.debt_oldest_seconds.set(0.0);
            continue;
        };
        let up = shared.health.get(side).up();
        metrics.mirror_up.set(i64::from(up));
        keep_open(&shared, &mut authority, side.other(), true).await;
        keep_open(&shared, &mut mirror, side, up).await;
        let Some((_, client)) = &authority else { continue };
        if let Err(error) = read_debts(&shared, &world, client, mirror.as_ref().map(|(_, client)| client)).await {
            debug!(%error, "the ledger cannot be read");
            (authority, mirror) = (None, None);
        }
    }
}

async fn keep_open(shared: &Shared, client: &mut Option<(Side, Client)>, side: Side, up: bool) {
    if !up || client.as_ref().is_some_and(|(known, client)| *known != side || client.is_closed()) {
        *client = None;
    }
    if up && client.is_none() {
        let config = shared.config.load_full();
        *client = Shared::database(&config, side).connect("crossfade status").await.ok().map(|client| (side, client));
    }
}

async fn read_debts(
    shared: &Shared,
    world: &World,
    authority: &Client,
    mirror: Option<&Client>,
) -> Result<(), migrate::Error> {
    let counts = migrate::debt::counts(world.phase.authority(), authority, mirror).await?;
    let metrics = &shared.metrics;
    let label = |number: u32| {
        world.catalog.tables.get(&number).map_or_else(|| format!("table {number}"), |table| table.label())
    };
    let owed: Vec<(String, i64)> = counts
        .tables
        .iter()
        .map(|(number, debt)| (label(*number), (debt.keys + debt.whole + debt.taints + debt.ranges + debt.rows) as i64))
        .collect();
    metrics.set_debts(&owed);
    metrics.tainted_tables.set(counts.tables.values().filter(|debt| debt.taints > 0).count() as i64);
    metrics.debt_in_flight.set(counts.in_flight as i64);
    metrics.debt_oldest_seconds.set(counts.oldest.map_or(0.0, |age| age.as_secs_f64()));
    metrics.ledger_bytes.set(counts.ledger_bytes);
    if let Ok(standing) = migrate::backfill::standing(authority).await {
        for (number, standing) in standing {
            metrics.set_backfill(&label(number), standing.rows.max(0) as u64, standing.share);
        }
    }
    if let Ok(standing) = migrate::verify::standing(authority).await {
        for (number, standing) in standing {
            metrics.verify_different.with_label_values(&[&label(number)]).set(standing.different);
        }
    }
    Ok(())
}

/// Follows the file: an edit in place, a rename over it, a symbolic link that changes (ConfigMaps).
pub async fn follow(shared: Arc<Shared>, path: PathBuf) {
    let (sender, mut events) = mpsc::unbounded_channel();
    let watcher = notify::recommended_watcher(move |_| {
        let _ = sender.send(());
    });
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    let mut watcher = watcher.ok();
    if let Some(watcher) = &mut watcher
        && let Err(error) = watcher.watch(folder, notify::RecursiveMode::NonRecursive)
    {
        warn!(%error, "the file's folder cannot be watched; it is looked at every second");
    }
    // Whatever was written since the file was read at the start is seen at once.
    let mut last = None;
    let mut first = true;
    loop {
        tokio::select! {
            () = std::future::ready(()), if std::mem::take(&mut first) => {}
            _ = events.recv(), if watcher.is_some() => tokio::time::sleep(Duration::from_millis(20)).await,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
        while events.try_recv().is_ok() {}
        let now = std::fs::read(&path).ok();
        if now != last && now.is_some() {
            last = now;
            reload(&shared, &path);
        }
    }
}

/// Reads the file again; a bad one changes nothing.
fn reload(shared: &Shared, path: &std::path::Path) {
    let refuse = |error: String| {
        shared.metrics.config_reload_failures.inc();
        error!(%error, "the file is not used; what was read before stays in force");
        *lock(&shared.config_error) = Some(error);
    };
    match crate::config::load(path) {
        Ok(config)
            if shared.world.load().phase.mirror().is_some()
                && config.definition() != shared.config.load().definition() =>
        {
            refuse(
                "what migrates (`tables`, `except`) cannot change while writes are mirrored: go back to old first"
                    .to_owned(),
            );
        }
        Ok(config) => {
            let tls = match super::listen::tls(&config) {
                Ok(tls) => tls,
                Err(error) => return refuse(error.to_string()),
            };
            info!(phase = %config.phase, "the file was read again");
            shared.tls.store(tls);
            adopt(shared, &config);
            if config.phase != shared.config.load().phase {
                *lock(&shared.intent) = Some(config.phase);
            }
            shared.config.store(Arc::new(config));
            *lock(&shared.config_error) = None;
            shared.wanted.notify_one();
        }
        Err(error) => refuse(error.to_string()),
    }
}

/// What hangs on settings that have changed.
fn adopt(shared: &Shared, config: &Config) {
    let before = shared.config.load();
    if (&before.users, &before.old, &before.new) != (&config.users, &config.old, &config.new) {
        shared.verifiers.store(Arc::new(super::verifiers(config)));
    }
    if before.at_start() == config.at_start() {
        return;
    }
    for ((key, started), (_, file)) in shared.started.at_start().into_iter().zip(config.at_start()) {
        if started != file {
            warn!(key, %started, %file, "this setting has changed in the file, and needs a restart");
        }
    }
}

/// Moves the phase to what the file says, one step at a time; what is in the way is said once.
async fn move_phase(shared: Arc<Shared>) {
    let mut said = String::new();
    let mut pause = MOVE_AGAIN;
    loop {
        let world = shared.world.load_full();
        let wanted = *lock(&shared.intent);
        if let Some(want) = wanted.filter(|want| *want != world.phase) {
            let _switching = shared.switching.lock().await;
            if shared.world.load().epoch != world.epoch {
                continue;
            }
            let ask = Ask::by_file(shared.config.load().listen);
            match mover::step(&shared, want, &ask).await {
                Ok(_) => {
                    said.clear();
                    pause = MOVE_AGAIN;
                    *lock(&shared.waiting) = None;
                    continue;
                }
                Err(Stays { error, held, .. }) => {
                    // A move that held clients in vain must not hold them again and again.
                    pause = if held { (pause * 2).max(MOVE_HELD).min(MOVE_HELD * 8) } else { MOVE_AGAIN };
                    let error = error.to_string();
                    *lock(&shared.waiting) = Some(error.clone());
                    if error != said {
                        warn!(%want, %error, "the phase cannot move yet; it is tried again");
                        said = error;
                    }
                }
            }
        } else {
            lock(&shared.intent).take_if(|want| *want == world.phase);
            disagree(&shared, &world);
        }
        tokio::select! {
            () = shared.wanted.notified() => pause = MOVE_AGAIN,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// The file says one thing and the databases another: said, and nothing done.
fn disagree(shared: &Shared, world: &World) {
    let file = shared.config.load().phase;
    let disagrees = file != world.phase && lock(&shared.intent).is_none();
    shared.metrics.file_disagrees.set(i64::from(disagrees));
    let says = format!(
        "{} holds (epoch {}), as another proxy or an operator has moved it, and this file says {file}: edit `phase` here, or there",
        world.phase, world.epoch
    );
    let mut waiting = lock(&shared.waiting);
    if disagrees && waiting.as_ref() != Some(&says) {
        warn!("{says}");
    }
    *waiting = disagrees.then_some(says);
}
