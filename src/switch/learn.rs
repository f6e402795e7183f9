//! What holds, as the databases say: learnt at the start, and whenever another proxy has moved the phase.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;
use tokio_postgres::Client;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::fleet::{self, Seen};
use super::mover::{self, MoveError, next};
use super::record;
use super::rows::{self, Holds, Verdict};
use super::{ahead, epoch};
use crate::catalog::{Catalog, Sides};
use crate::config::{Config, ConnectError};
use crate::migrate;
use crate::migrate::lives::{self, Begun, Life};
use crate::phase::{Phase, Side};
use crate::shared::{Shared, World, lock};

/// How often the phase row is looked at. Who finds that an epoch is over looks at once.
const LOOK: Duration = Duration::from_millis(250);

/// ... and while clients are held for another proxy's move.
const STILL: Duration = Duration::from_millis(20);

/// A connection that was opened beforehand is used if its server answers within this time.
const ANSWERS: Duration = Duration::from_millis(500);

/// A side that does not answer for so long is taken for gone.
const SILENT: Duration = Duration::from_secs(10);

/// Reads both rows, finishes a move that was cut short, and makes the world what they say. Whoever calls holds `switching`, or serves nobody yet.
pub async fn learn(shared: &Arc<Shared>) -> Result<(), MoveError> {
    learn_over(shared, Sides::default()).await
}

/// The same, over connections that are open already.
async fn learn_over(shared: &Arc<Shared>, open: Sides<Option<Client>>) -> Result<(), MoveError> {
    let config = shared.config.load_full();
    let world = shared.world.load_full();
    let Believed { holds, life, client } = believed(&config, open).await?;
    let authority = holds.phase.authority();
    let client = match client {
        Some(client) => client,
        None => Shared::database(&config, authority).connect("crossfade").await?,
    };
    // From one phase with a mirror to another clients wait: what this proxy has installed is there.
    let known = shared.installed.get(authority).load(Ordering::Relaxed);
    let mut installs = !known || world.phase.mirror().is_none();
    if let Some(life) = life {
        // Before debts are numbered, and before the row is believed without the other side.
        let mirrored = holds.phase.mirror().is_some();
        let begun = lives::authority(&client, authority, &life, holds.epoch, mirrored).await?;
        if begun.is_some_and(|begun| begun != Begun::First) {
            shared.metrics.new_lives.with_label_values(&[authority.name()]).inc();
        }
        installs |= begun.is_some();
    }
    if world.generation > 0 && holds.epoch <= world.epoch {
        return Ok(());
    }
    let catalog = if holds.phase.mirror().is_some() {
        if installs {
            migrate::install(&client, authority).await?;
            shared.installed.get(authority).store(true, Ordering::Relaxed);
        }
        let open_epoch = format!("SELECT crossfade.open_epoch({})", holds.epoch);
        let definition = config.definition();
        tokio::try_join!(epoch::same(&client, authority, &definition), async {
            Ok(client.batch_execute(&open_epoch).await?)
        })?;
        definitions(shared, &config, &world, holds).await?
    } else if authority == Side::New {
        staying(&config).await?
    } else {
        Arc::new(Catalog::default())
    };
    // Before any debt is written in this world: the numbers of another side's ledger may be taken in this one.
    if !installs || installed(&client, authority).await {
        draw_debt_numbers(shared, &client).await;
    }
    let generation = world.generation + 1;
    shared.world.store(Arc::new(World { epoch: holds.epoch, phase: holds.phase, generation, catalog }));
    shared.metrics.set_phase(holds.phase, holds.epoch);
    info!(phase = %holds.phase, epoch = holds.epoch, "this phase holds");
    Ok(())
}

/// What holds.
struct Believed {
    holds: Holds,
    /// The life of the authority in which both sides have said so; None: one of them was not heard, or its schema has no place for it.
    life: Option<Life>,
    /// To the authority.
    client: Option<Client>,
}

/// The life of a side, and its phase row.
type Heard = (Option<Life>, Option<Holds>);

async fn hear(client: &Client, side: Side) -> Result<Heard, MoveError> {
    // The life first: the row is no older.
    let life = lives::read(client, side).await?;
    Ok((life, rows::read(client, side).await?))
}

/// A side that cannot be reached is not heard. `open`: a connection that may serve, if its server answers.
async fn ask(
    config: &Config,
    open: Option<Client>,
    side: Side,
) -> Result<(Result<Client, ConnectError>, Option<Heard>), MoveError> {
    if let Some(client) = open
        && let Ok(Ok(heard)) = tokio::time::timeout(ANSWERS, hear(&client, side)).await
    {
        return Ok((Ok(client), Some(heard)));
    }
    match Shared::database(config, side).connect("crossfade").await {
        Ok(client) => {
            let heard = hear(&client, side).await?;
            Ok((Ok(client), Some(heard)))
        }
        Err(error) => Ok((Err(error), None)),
    }
}

async fn believed(config: &Config, open: Sides<Option<Client>>) -> Result<Believed, MoveError> {
    let both = tokio::try_join!(ask(config, open.old, Side::Old), ask(config, open.new, Side::New));
    let ((old, of_old), (new, of_new)) = both?;
    let heard = Sides { old: of_old, new: of_new };
    let both = heard.old.is_some() && heard.new.is_some();
    let row = |side: Side| heard.get(side).as_ref().and_then(|(_, row)| *row);
    let life = |side: Side| heard.get(side).as_ref().filter(|_| both).and_then(|(life, _)| life.clone());
    match rows::judge(row(Side::Old), row(Side::New)) {
        // Without a word from old nothing is known: a row there may point anywhere.
        Verdict::Fresh if heard.old.is_none() => Err(match old {
            Err(error) => error.into(),
            Ok(_) => MoveError::Closed("old cannot be reached".into()),
        }),
        Verdict::Fresh => {
            let holds = Holds { epoch: 0, phase: Phase::Old };
            alone(holds, heard.old.clone().filter(|_| !both).and_then(|(life, _)| life))?;
            Ok(Believed { holds, life: life(Side::Old), client: old.ok() })
        }
        Verdict::Holds(holds) => {
            let side = holds.phase.authority();
            alone(holds, heard.get(side).as_ref().filter(|_| !both).and_then(|(life, _)| life.clone()))?;
            let client = if side == Side::Old { old.ok() } else { new.ok() };
            Ok(Believed { holds, life: life(side), client })
        }
        Verdict::Unclaimed(holds) => {
            let side = holds.phase.authority();
            let losing = Shared::database(config, side.other()).connect("crossfade").await?;
            migrate::install(&losing, side.other()).await?;
            if !rows::take(&losing, side.other(), holds).await? {
                return Err(MoveError::Overtaken { epoch: holds.epoch });
            }
            let client = Shared::database(config, side).connect("crossfade").await?;
            // One that was promoted may be older than the schema.
            migrate::install(&client, side).await?;
            let detail = json!({ "who": format!("the proxy on {} ({})", config.listen, record::machine()), "why": "its mover has not written the claim" });
            // Where the mover is still alive this waits for it, and then changes nothing.
            let pause = config.moves.pause.as_millis();
            client.batch_execute(&format!("SET lock_timeout = {pause}; SET client_min_messages = error")).await?;
            epoch::turn(&client, side, (&config.name, None), holds, ("claim", &detail)).await?;
            let life = match heard.get(side) {
                // It has no schema, and must have had one: it has lost more than a row.
                Some((None, None)) => lives::read(&client, side).await?.map(Life::lost),
                Some(_) => life(side),
                // It was not heard in time, so that nothing is known of its row.
                None => None,
            };
            Ok(Believed { holds, life, client: None })
        }
    }
}

/// What the authority alone says, in this life, where the other side cannot be reached: not where it may have lost a later row (B1).
fn alone(holds: Holds, life: Option<Life>) -> Result<(), MoveError> {
    let side = holds.phase.authority();
    match life.as_ref().and_then(Life::begun) {
        None | Some(Begun::First) => Ok(()),
        Some(_) => Err(MoveError::Closed(format!(
            "{side} has crashed or was promoted since anybody looked, and {} cannot be reached: the phase row there may be a later one. Clients are served when it answers; \
             if it is gone for good: `crossfade phase --accept {side} --reason TEXT`",
            side.other()
        ))),
    }
}

/// Definitions of a phase with a mirror. From one such phase to another they stay what they are: clients wait meanwhile.
async fn definitions(
    shared: &Arc<Shared>,
    config: &Config,
    world: &World,
    holds: Holds,
) -> Result<Arc<Catalog>, MoveError> {
    let authority = holds.phase.authority();
    if world.phase.mirror().is_some() {
        shared.stale.notify_one();
        return Ok(world.catalog.clone());
    }
    if let Ok(mirror) = Shared::database(config, authority.other()).connect("crossfade").await {
        migrate::install(&mirror, authority.other()).await?;
        shared.installed.get(authority.other()).store(true, Ordering::Relaxed);
    }
    let (catalog, whole) = mover::load_catalog(config, authority).await?;
    if !whole {
        shared.health.get(authority.other()).trip();
        shared.stale.notify_one();
    }
    Ok(Arc::new(catalog))
}

/// Definitions of a phase in which new alone is written: sessions need them where some tables stay on old. Old may be gone for good, where none do.
async fn staying(config: &Config) -> Result<Arc<Catalog>, MoveError> {
    match mover::load_catalog(config, Side::New).await {
        Ok((catalog, whole)) => {
            if whole && !catalog.stays.is_empty() {
                // Transactions over both sides are decided there.
                migrate::install(&config.old.connect("crossfade").await?, Side::Old).await?;
            }
            Ok(Arc::new(catalog))
        }
        Err(error) if config.tables.is_none() => {
            warn!(%error, "the definitions cannot be read: if tables stay on old, statements over them fail");
            Ok(Arc::new(Catalog::default()))
        }
        Err(error) => Err(error),
    }
}

/// The schema that ledger and numbers stand in. Where it cannot be had (a control role without rights, in phase old) the move to a phase with a mirror is
/// the first to draw numbers.
async fn installed(authority: &Client, side: Side) -> bool {
    let installed = migrate::install(authority, side).await;
    if let Err(error) = &installed {
        warn!(%error, "schema crossfade is not installed; phases with a mirror need it");
    }
    installed.is_ok()
}

/// Numbers of debts are drawn at each start of a proxy, and again by each move.
async fn draw_debt_numbers(shared: &Shared, authority: &Client) {
    match mover::draw_block(authority).await {
        Ok(block) => shared.next_debt.store(block, Ordering::SeqCst),
        Err(error) => warn!(%error, "no numbers for debts could be drawn"),
    }
}

/// Looks at the side that is authority, now and then and whenever a session was overtaken.
#[derive(Default)]
pub struct Follower {
    eye: Option<(Side, Client)>,
    /// The gate is closed: another proxy has announced the end of this epoch.
    still: Option<u64>,
    /// So many sessions may have a cursor WITH HOLD or listen, as the others know.
    holding: i64,
    /// Another proxy has said that the authority will change; whether it knows that our sessions have logged in there.
    coming: Option<(Side, bool)>,
    /// Connections for when it has.
    open: Option<AbortOnDropHandle<Sides<Option<Client>>>>,
}

/// Follows other proxies for as long as this one runs.
pub async fn follow(shared: Arc<Shared>, mut follower: Follower) {
    loop {
        tokio::select! {
            () = shared.overtaken.notified() => {}
            () = tokio::time::sleep(if follower.hurries() { STILL } else { LOOK }) => {}
        }
        let quiet = |seen: &Seen| seen.epoch <= shared.world.load().epoch && !seen.announced;
        match follower.look(&shared).await {
            Ok(seen) if follower.still.is_none() && seen.as_ref().is_none_or(quiet) => continue,
            Ok(_) => {}
            Err(error) => {
                debug!(%error, "the phase row cannot be read");
                follower.eye = None;
                tokio::time::sleep(LOOK).await;
            }
        }
        // A move of our own may have been under way.
        let switching = shared.switching.lock().await;
        let failed = follower.act(&shared).await.err().map(|error| error.to_string());
        drop(switching);
        if let Some(error) = &failed {
            follower.eye = None;
            if *lock(&shared.behind) != failed {
                warn!(%error, "another proxy has moved the phase, and this one cannot follow yet");
            }
        }
        let again = failed.is_some();
        *lock(&shared.behind) = failed;
        if again {
            tokio::time::sleep(LOOK * 2).await;
        }
    }
}

impl Follower {
    /// Whoever moves must know of this proxy before it serves clients: one that is on no list is taken for dead, and its sessions are ended.
    pub async fn appear(shared: &Arc<Shared>) -> Follower {
        let mut follower = Follower::default();
        if let Err(error) = follower.look(shared).await {
            debug!(%error, "the other proxies do not know of this one yet");
            follower.eye = None;
        }
        follower
    }

    async fn look(&mut self, shared: &Arc<Shared>) -> Result<Option<Seen>, MoveError> {
        let side = shared.world.load().phase.authority();
        if self.eye.as_ref().is_none_or(|(known, client)| *known != side || client.is_closed()) {
            let config = shared.config.load_full();
            let eye = Shared::database(&config, side).connect("crossfade follow").await?;
            fleet::appear(shared, &eye).await?;
            (self.eye, self.holding) = (Some((side, eye)), 0);
        }
        let Some((_, eye)) = &self.eye else { return Ok(None) };
        let holding = shared.holding.load(Ordering::Relaxed);
        if holding != self.holding {
            fleet::holds(shared, eye, holding).await?;
            self.holding = holding;
        }
        let seen = tokio::time::timeout(SILENT, fleet::look(shared, eye)).await;
        let seen = seen.map_err(|_| MoveError::Closed(format!("{side} does not answer")))??;
        let coming = seen.as_ref().and_then(|seen| seen.coming);
        // Of an epoch that is over it is not heard any more; sessions have yet to follow.
        let follows = seen.as_ref().is_some_and(|seen| seen.epoch > shared.world.load().epoch);
        if coming != self.coming.map(|(side, _)| side) && !follows {
            self.coming = coming.map(|side| (side, false));
            ahead::hear(shared, coming);
            let config = shared.config.load_full();
            self.open = coming.map(|_| AbortOnDropHandle::new(tokio::spawn(async move { open(&config).await })));
        }
        if let (Some((side, false)), Some((_, eye)), Some(seen)) = (self.coming, &self.eye, &seen)
            && ahead::all_have_tried(shared)
        {
            let said = tokio::time::timeout(SILENT, fleet::is_ready(shared, eye, seen.epoch)).await;
            said.map_err(|_| MoveError::Closed(format!("{} does not answer", side.other())))??;
            self.coming = Some((side, true));
        }
        Ok(seen)
    }

    /// Somebody waits for what it does next.
    fn hurries(&self) -> bool {
        self.still.is_some() || self.coming.is_some_and(|(_, told)| !told)
    }

    async fn act(&mut self, shared: &Arc<Shared>) -> Result<(), MoveError> {
        let before = shared.world.load_full();
        let seen = match self.look(shared).await {
            Ok(seen) => seen.unwrap_or_default(),
            // The side that was authority may be gone for good: then the other is asked.
            Err(_) => return self.go_along(shared).await,
        };
        if seen.epoch > before.epoch {
            self.go_along(shared).await?;
        } else if seen.announced && self.still.is_none() {
            let Some((_, eye)) = &self.eye else { return Ok(()) };
            if fleet::fall_still(shared, eye, seen.epoch).await? {
                self.still = Some(seen.epoch);
            }
            return Ok(());
        }
        if self.still.is_some() && !(seen.announced && self.still == Some(seen.epoch)) {
            self.stir(shared).await?;
        }
        Ok(())
    }

    /// The gate opens once nobody counts on it, and in the world that holds then.
    async fn stir(&mut self, shared: &Arc<Shared>) -> Result<(), MoveError> {
        self.look(shared).await?;
        if let Some((_, eye)) = &self.eye {
            fleet::stir(shared, eye).await?;
        }
        if self.look(shared).await?.is_some_and(|seen| seen.epoch > shared.world.load().epoch) {
            self.go_along(shared).await?;
        }
        self.still = None;
        shared.gate.open();
        Ok(())
    }

    async fn go_along(&mut self, shared: &Arc<Shared>) -> Result<(), MoveError> {
        let open = match self.open.take().filter(|open| open.is_finished()) {
            Some(open) => open.await.unwrap_or_default(),
            None => Sides::default(),
        };
        go_along(shared, open).await
    }
}

/// Connections to both sides on which what a proxy looks at when the phase has moved was looked at before.
async fn open(config: &Config) -> Sides<Option<Client>> {
    let connect = async |side| {
        let client = Shared::database(config, side).connect("crossfade").await.ok()?;
        hear(&client, side).await.ok()?;
        Some(client)
    };
    let (old, new) = tokio::join!(connect(Side::Old), connect(Side::New));
    Sides { old, new }
}

/// Another proxy has moved the phase.
async fn go_along(shared: &Arc<Shared>, open: Sides<Option<Client>>) -> Result<(), MoveError> {
    let before = shared.world.load_full();
    learn_over(shared, open).await?;
    let now = shared.world.load_full();
    if now.epoch == before.epoch {
        return Ok(());
    }
    shared.learnt.notify_waiters();
    shared.call();
    shared.owed.notify_one();
    let mut intent = lock(&shared.intent);
    if let Some(wanted) = *intent
        && next(before.phase, wanted) != now.phase
    {
        *intent = None;
        warn!(phase = %now.phase, epoch = now.epoch, %wanted, "another proxy has moved the phase: what this file asked for is dropped");
    }
    Ok(())
}
