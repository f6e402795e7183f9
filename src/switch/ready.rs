//! What a step of a move needs, read, made and opened before anybody is held: other movers are kept out, the gates are looked at, and every connection
//! that will be wanted with clients waiting stands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tracing::warn;

use super::copies::Keyless;
use super::gates::evidence::{Eyes, Facts, Question};
use super::gates::rules::{self, Step};
use super::gates::{self, Gate, Name, Standing};
use super::mover::{MoveError, Stays, draw_block};
use super::record::Ask;
use super::{ahead, epoch, fleet, writers};
use crate::catalog::{self, Catalog};
use crate::config::Config;
use crate::migrate;
use crate::migrate::repair::Repair;
use crate::phase::{Phase, Side};
use crate::shared::{Shared, World};

/// Control connections of one move. A side that the move can do without may be out of reach.
pub(super) struct Hands {
    old: Result<Client, crate::config::ConnectError>,
    new: Result<Client, crate::config::ConnectError>,
}

impl Hands {
    /// Opens them.
    pub(super) async fn open(config: &Config) -> Hands {
        let (old, new) = tokio::join!(config.old.connect("crossfade move"), config.new.connect("crossfade move"));
        let hands = Hands { old, new };
        for client in [&hands.old, &hands.new].into_iter().flatten() {
            // No lock of anybody's may hold the clients for longer than the pause; debts and rows are durable whatever the role's default.
            let pause = config.moves.pause.as_millis();
            let _ = client
                .batch_execute(&format!(
                    "SET lock_timeout = {pause}; SET synchronous_commit = on; SET client_min_messages = error"
                ))
                .await;
        }
        hands
    }

    fn get(&self, side: Side) -> &Result<Client, crate::config::ConnectError> {
        match side {
            Side::Old => &self.old,
            Side::New => &self.new,
        }
    }

    /// Whatever locks they hold.
    pub(super) async fn let_go(&self) {
        let roll_back = async |side: Side| {
            if let Ok(client) = self.get(side) {
                let _ = tokio::time::timeout(Duration::from_secs(1), client.batch_execute("ROLLBACK")).await;
            }
        };
        tokio::join!(roll_back(Side::Old), roll_back(Side::New));
    }

    pub(super) fn on(&self, side: Side) -> Result<&Client, MoveError> {
        self.get(side).as_ref().map_err(|error| MoveError::Closed(format!("{side} cannot be reached: {error}")))
    }
}

/// How long the sweep is waited for while nobody is held.
const MOVE_SWEPT: Duration = Duration::from_secs(3);

/// What a step was found to be able to do, before anybody is held.
pub(super) struct Ready {
    pub catalog: Arc<Catalog>,
    /// The first of the numbers for debts on the side that will be authority.
    pub block: Option<i64>,
    pub eyes: Eyes,
    pub facts: Facts,
    pub gates: Vec<Gate>,
}

/// Jobs that are done with clients held, with connections of their own.
#[derive(Default)]
pub(super) struct Jobs {
    /// Of tables without a key, where the step enters a phase with a mirror.
    pub keyless: Option<Keyless>,
    /// Of what is owed at the last moment, where the authority changes.
    pub repair: Option<Repair>,
}

impl Jobs {
    async fn open(config: &Config, step: Step, catalog: &Arc<Catalog>) -> Result<Jobs, MoveError> {
        let mut jobs = Jobs::default();
        if step.enters_mirror() {
            jobs.keyless = Keyless::open(config, step.to, catalog).await?;
        }
        if step.gains().is_some() {
            let authority = step.from.authority();
            let connect = |side| Shared::database(config, side).connect("crossfade move");
            let (first, second) = tokio::try_join!(connect(authority), connect(authority.other()))?;
            let mut pair = migrate::Pair::new(authority, first, second, migrate::Settings::default()).await?;
            pair.warm().await?;
            jobs.repair = Some(Repair::new(pair, catalog.clone()));
        }
        Ok(jobs)
    }
}

/// Whether the step can be made, with nobody held: what it needs is made or read, other movers are kept out, the gates are looked at.
pub(super) async fn ready(
    shared: &Arc<Shared>,
    config: &Config,
    hands: &Hands,
    world: &World,
    step: Step,
    ask: &Ask,
) -> Result<(Ready, Jobs), Stays> {
    let Step { from, to } = step;
    let prepared = async {
        for side in Side::BOTH.into_iter().filter(|side| step.needs(*side)) {
            migrate::install(hands.on(side)?, side).await?;
        }
        let catalog = definitions(config, hands, from, to, world).await?;
        let definition = from.mirror().map(|_| config.definition());
        let side = from.authority();
        epoch::begin(hands.on(side)?, side, world.epoch, definition.as_deref()).await?;
        lazy(config, hands, world, &catalog, step).await?;
        let eyes = Eyes::open(config).await;
        let known = if from.mirror().is_some() { &world.catalog } else { &catalog };
        let ours = shared.cancels.pids(side);
        let question = Question { config, step, epoch: world.epoch, catalog: known, ours: &ours };
        let mut facts = question.ask(&eyes).await?;
        facts.split = Some(shared.plans.split());
        Ok((catalog, eyes, facts))
    };
    let (catalog, eyes, facts) = prepared.await.map_err(|error| Stays::at_once(error, Vec::new()))?;
    let mut gates = rules::judge(step, &config.moves, &facts);
    ask.force.open(&mut gates);
    if let Some(why) = gates::why(to, &gates) {
        if gates.iter().any(|gate| gate.gate == Name::Debt && gate.standing == Standing::Closed) {
            shared.owed.notify_one();
        }
        return Err(Stays::at_once(MoveError::Closed(why), gates));
    }
    for gate in gates.iter().filter(|gate| gate.standing == Standing::Forced) {
        warn!(%from, %to, who = %ask.who, why = ask.why.as_deref().unwrap_or(""), "a gate is overridden: {}: {gate}", gate.gate);
    }
    let opened = async {
        swept(&eyes, hands, step).await?;
        let block = match to.mirror() {
            Some(_) => Some(draw_block(hands.on(to.authority())?).await?),
            None => None,
        };
        let mut jobs = Jobs::open(config, step, &catalog).await?;
        if from.mirror().is_some() {
            warm(hands, world, &catalog, step, &mut jobs).await?;
        }
        if let Some(gains) = step.gains() {
            ahead::announce(shared, (eyes.must(from.authority())?, world.epoch), gains).await?;
        }
        // The last before anybody is held.
        fleet::awake(shared, eyes.must(from.authority())?).await?;
        Ok((block, jobs))
    };
    match opened.await {
        Ok((block, jobs)) => Ok((Ready { catalog, block, eyes, facts, gates }, jobs)),
        Err(error) => {
            ahead::over(shared, None).await;
            Err(Stays::at_once(error, gates))
        }
    }
}

/// What is asked with clients held is asked once now; and of what is in flight most is cleared, so that little is left.
async fn warm(hands: &Hands, world: &World, catalog: &Catalog, step: Step, jobs: &mut Jobs) -> Result<(), MoveError> {
    for side in Side::BOTH.into_iter().filter(|side| step.needs(*side)) {
        epoch::warm(hands.on(side)?, world.epoch).await?;
    }
    let side = step.from.authority();
    writers::warm(hands.on(side)?, catalog, side).await?;
    if let Some(repair) = &mut jobs.repair {
        let _ = repair.try_pass().await?;
    }
    Ok(())
}

/// What lazy tables need on new, while old is the authority.
async fn lazy(config: &Config, hands: &Hands, world: &World, catalog: &Catalog, step: Step) -> Result<(), MoveError> {
    if step.enters_mirror() && step.from == Phase::Old {
        migrate::lazy::forget(hands.on(Side::New)?).await?;
    }
    if step.gains() != Some(Side::New) {
        return Ok(());
    }
    let known = if step.from.mirror().is_some() { &world.catalog } else { catalog };
    let new = hands.on(Side::New)?;
    migrate::lazy::no_others(new, known).await?;
    if config.federate && known.tables.values().any(|table| table.lazy) {
        migrate::lazy::serve_old(new, &config.old).await?;
        migrate::lazy::make(new, known).await?;
    }
    Ok(())
}

/// The definitions that hold after the move.
async fn definitions(
    config: &Config,
    hands: &Hands,
    from: Phase,
    to: Phase,
    world: &World,
) -> Result<Arc<Catalog>, MoveError> {
    // Where new alone is written sessions need to know which tables stay on old.
    if from.mirror() == to.mirror() || to.mirror().is_none() && to.authority() == Side::New {
        return Ok(world.catalog.clone());
    }
    if to.mirror().is_none() {
        return Ok(Arc::new(Catalog::default()));
    }
    let (old, new) = (hands.on(Side::Old)?, hands.on(Side::New)?);
    Ok(Arc::new(catalog::load(old, new, config.tables.as_deref(), &config.except).await?))
}

/// Where the authority changes: a sweep that was begun has passed what was written there. Once more behind the gate; what is found now can still be
/// paid without holding anybody.
async fn swept(eyes: &Eyes, hands: &Hands, Step { from, to }: Step) -> Result<(), MoveError> {
    let side = from.authority();
    if side == to.authority() {
        return Ok(());
    }
    if let Some(why) = migrate::sweep::obstacle(hands.on(side)?, side).await? {
        return Err(MoveError::Closed(format!("{to} waits: {why}")));
    }
    if !migrate::sweep::passed(eyes.must(side)?, side, Instant::now() + MOVE_SWEPT).await? {
        return Err(MoveError::Closed(format!("{to} waits: the sweep has not passed yet what was written on {side}")));
    }
    Ok(())
}
