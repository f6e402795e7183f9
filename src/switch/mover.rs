//! Moving the phase: step by step, each behind the gate that transactions pass.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_postgres::Client;
use tracing::{debug, info, warn};

use super::copies::{Copies, owe_everything};
use super::fleet::{self, Announcement};
use super::gates::evidence::Question;
use super::gates::rules::{self, Step};
use super::gates::{self, Gate};
use super::ready::{Hands, Jobs, Ready, ready};
use super::record::{self, Ask};
use super::rows::{self, Holds, RowError};
use super::{ahead, end, epoch, writers};
use crate::catalog::{self, Catalog, CatalogError};
use crate::config::{Commit, Config};
use crate::migrate;
use crate::phase::{Phase, Side};
use crate::shared::{Shared, World, lock};

/// Why the phase stays.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// A gate is closed; nobody was held.
    #[error("{0}")]
    Closed(String),
    /// The databases have another epoch than this proxy knows: another has moved the phase.
    #[error("another proxy has moved the phase (epoch {epoch}): this one follows")]
    Overtaken {
        /// Which holds now.
        epoch: u64,
    },
    /// Clients were held for as long as `move.pause` allows, in vain, and released.
    #[error("{0}")]
    Held(String),
    /// A side cannot be reached.
    #[error("{0}")]
    Connect(#[from] crate::config::ConnectError),
    /// The rows.
    #[error(transparent)]
    Rows(#[from] RowError),
    /// The catalog.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A job.
    #[error(transparent)]
    Job(#[from] migrate::Error),
    /// A database said no.
    #[error("{}", rows::said(.0))]
    Database(#[from] tokio_postgres::Error),
}

/// The phase stays, and why.
#[derive(Debug)]
pub struct Stays {
    /// What is in the way.
    pub error: MoveError,
    /// Clients were held in vain: it must not happen again and again.
    pub held: bool,
    /// The gates as they stood; none where they could not be looked at.
    pub gates: Vec<Gate>,
}

impl Stays {
    pub(super) fn at_once(error: MoveError, gates: Vec<Gate>) -> Stays {
        Stays { error, held: false, gates }
    }

    fn held(error: MoveError, gates: Vec<Gate>) -> Stays {
        Stays { error, held: true, gates }
    }
}

/// Values that sequences are set ahead of the other side's. None: while they are read no client draws, and what sessions have cached
/// (`CACHE`) is behind `last_value` already. A margin would only leave a gap at every move, in small sequences a dear one.
const SEQUENCE_MARGIN: u32 = 0;

/// How long the mirror's transactions have, at least, when those of the authority are over.
const CARRIED: Duration = Duration::from_millis(1500);

/// How long one write of a phase row may take before the move is withdrawn.
const ROW: Duration = Duration::from_secs(5);

/// A block of 2^32 numbers for debts, from the sequence of the side whose ledger they stand in: nextval in a client's session would change
/// its lastval().
pub async fn draw_block(authority: &Client) -> Result<i64, tokio_postgres::Error> {
    let row = authority.query_typed_one("SELECT pg_catalog.nextval('crossfade.ledger_id')", &[]).await?;
    Ok(row.get::<_, i64>(0) << 32)
}

/// The next phase on the way from one to another.
pub fn next(from: Phase, to: Phase) -> Phase {
    use Phase::{DualRead, DualWrite, New, NewPrimary, Old, OldReadOnly};
    match (from, to) {
        (Old, DualRead) => DualRead,
        (Old, _) => DualWrite,
        (DualWrite | DualRead, NewPrimary | OldReadOnly | New) => NewPrimary,
        (DualWrite | DualRead, to) => to,
        (NewPrimary, Old) => DualWrite,
        (NewPrimary, to) => to,
        (OldReadOnly, New) => New,
        (New, OldReadOnly) => OldReadOnly,
        (OldReadOnly | New, _) => NewPrimary,
    }
}

/// Where a step leads if nobody says: to what the file wants, else onwards.
pub fn onwards(holds: Phase, file: Phase) -> Phase {
    if file != holds {
        return file;
    }
    match holds {
        Phase::Old => Phase::DualWrite,
        Phase::DualWrite | Phase::DualRead => Phase::NewPrimary,
        Phase::NewPrimary | Phase::OldReadOnly => Phase::New,
        Phase::New => Phase::NewPrimary,
    }
}

/// Loads the definitions of both sides. Where the mirror cannot be reached its definitions are taken to be the authority's:
/// keys of debts need no more, and nothing is sent to a mirror that is down.
pub async fn load_catalog(config: &Config, authority: Side) -> Result<(Catalog, bool), MoveError> {
    let first = Shared::database(config, authority).connect("crossfade catalog").await?;
    match Shared::database(config, authority.other()).connect("crossfade catalog").await {
        Ok(second) => {
            let (old, new) = if authority == Side::Old { (&first, &second) } else { (&second, &first) };
            Ok((catalog::load(old, new, config.tables.as_deref(), &config.except).await?, true))
        }
        Err(error) => {
            warn!(side = %authority.other(), %error, "the mirror's definitions cannot be read; the authority's stand for them");
            let catalog = catalog::load(&first, &first, config.tables.as_deref(), &config.except).await?;
            Ok((Catalog { stands_in: Some(authority.other()), ..catalog }, false))
        }
    }
}

/// Moves one step on the way to `want`. Gives the phase that holds then.
pub async fn step(shared: &Arc<Shared>, want: Phase, ask: &Ask) -> Result<Phase, Stays> {
    let world = shared.world.load_full();
    let step = Step { from: world.phase, to: next(world.phase, want) };
    let config = shared.config.load_full();
    let hands = Hands::open(&config).await;
    let (ready, mut jobs) = match ready(shared, &config, &hands, &world, step, ask).await {
        Ok(ready) => ready,
        Err(stays) => {
            if matches!(stays.error, MoveError::Overtaken { .. }) {
                shared.overtaken.notify_one();
            }
            return Err(stays);
        }
    };
    let terminate = ask.terminate || config.moves.terminate;
    let announcement = match step.enters_mirror() {
        true => {
            let announced = fleet::announce(shared, &config, step.from.authority(), world.epoch, step.to, terminate);
            match announced.await {
                Ok(announcement) => Some(announcement),
                Err(error) => return Err(Stays::held(error, ready.gates)),
            }
        }
        false => None,
    };
    let started = Instant::now();
    let plan = Move {
        shared,
        started,
        config: &config,
        hands: &hands,
        from: step.from,
        to: step.to,
        step,
        ask,
        terminate,
        ready: &ready,
        world: &world,
        announcement,
        laps: Mutex::default(),
    };
    shared.gate.close();
    let outcome = plan.behind_the_gate(&mut jobs).await;
    if outcome.is_err() {
        // The phase stays: whoever goes on finds no lock of ours in the way.
        hands.let_go().await;
    }
    shared.gate.open();
    let held = started.elapsed();
    if let Ok(done) = &outcome
        && plan.leaves_mirror()
    {
        plan.leave_mirror(done).await;
    }
    hands.let_go().await;
    if step.gains().is_some() {
        ahead::over(shared, ready.eyes.on(step.from.authority())).await;
    }
    if let Some(announcement) = &plan.announcement {
        announcement.end().await;
    }
    shared.metrics.move_pause_seconds.observe(held.as_secs_f64());
    plan.after(held, outcome).await
}

/// Writers that this move waits for stand on this side: no transaction of theirs may outlive the phase in which it began.
fn writers_on(from: Phase, to: Phase) -> Option<Side> {
    let gains_mirror = from.mirror().is_none() && to.mirror().is_some();
    (gains_mirror || from.authority() != to.authority()).then(|| from.authority())
}

/// One step.
struct Move<'a> {
    shared: &'a Arc<Shared>,
    /// Since then clients are held.
    started: Instant,
    config: &'a Config,
    hands: &'a Hands,
    from: Phase,
    to: Phase,
    step: Step,
    ask: &'a Ask,
    /// Transactions that last are ended.
    terminate: bool,
    ready: &'a Ready,
    world: &'a World,
    /// Where other proxies hold no locks: they know.
    announcement: Option<Announcement>,
    /// What was done with clients held, and when.
    laps: Mutex<Vec<(&'static str, Duration)>>,
}

/// What was done with clients held.
struct Done {
    copies: Option<Copies>,
    epoch: u64,
    /// What the history says of the move.
    detail: Value,
    /// Since clients were held: when no transaction of theirs was left on the authority.
    waited: Duration,
}

impl Move<'_> {
    /// For who wants to know what a pause was made of.
    fn lap(&self, done: &'static str) {
        lock(&self.laps).push((done, self.started.elapsed()));
    }

    /// With every client transaction ended and new ones waiting.
    async fn behind_the_gate(&self, jobs: &mut Jobs) -> Result<Done, MoveError> {
        let (shared, from) = (self.shared, self.from);
        let pause = self.config.moves.pause;
        let deadline = Instant::now() + pause;
        self.drain().await?;
        let mut waited = self.started.elapsed();
        self.lap("drained");
        if from.mirror().is_some() {
            waited = self.close_epoch(deadline).await?;
            self.lap("the epoch is closed");
        }
        // What waits inside ends at the deadline by itself and says why; the rest is bounded here: a server may be frozen.
        let Ok(prepared) = tokio::time::timeout(pause + ROW, self.prepare(jobs, deadline)).await else {
            return Err(MoveError::Held(format!(
                "the move was not prepared within move.pause ({pause:?}): does a server not answer? Clients were released and the phase stays {from}"
            )));
        };
        let (copies, gates) = prepared?;
        self.lap("gates are met");
        let detail = record::detail(from, self.ask, &gates);
        let epoch = self.world.epoch + 1;
        if let Err(error) = self.write_rows(self.hands, epoch, &detail).await {
            self.settle_rows(epoch, error, &detail).await?;
        }
        self.lap("the rows are written");
        if from.authority() != self.to.authority() {
            self.number_debts();
        }
        self.holds(epoch, self.to, self.ready.catalog.clone());
        shared.owed.notify_one();
        Ok(Done { copies, epoch, detail, waited })
    }

    /// With clients released: what is still to be done, and what the history says.
    async fn after(&self, held: Duration, outcome: Result<Done, MoveError>) -> Result<Phase, Stays> {
        let (from, to) = (self.from, self.to);
        let done = match outcome {
            Ok(done) => done,
            Err(error) => {
                let mut detail = record::detail(from, self.ask, &[]);
                detail["to"] = to.name().into();
                detail["error"] = error.to_string().into();
                detail["pause_ms"] = (held.as_secs_f64() * 1000.0).into();
                self.ready.eyes.note(from.authority(), self.world.epoch, "given-up", &detail).await;
                return Err(Stays::held(error, self.ready.gates.clone()));
            }
        };
        info!(%from, %to, who = %self.ask.who, pause_ms = held.as_millis() as u64, "the phase has moved");
        let laps = lock(&self.laps).clone();
        self.ready.eyes.paused(done.epoch, &record::Pause { held, waited: done.waited, laps }).await;
        if let Some(copies) = done.copies {
            copies.run().await;
        }
        Ok(to)
    }

    /// The transactions of this process end, and none begins.
    async fn drain(&self) -> Result<(), MoveError> {
        let (gate, pause) = (&self.shared.gate, self.config.moves.pause);
        if tokio::time::timeout(pause, gate.drained()).await.is_ok() {
            return Ok(());
        }
        if self.terminate {
            let side = self.from.authority();
            let pids = self.shared.cancels.pids(side);
            let ended = self.ready.eyes.end_sessions(side, &pids).await;
            warn!(%side, ended, "transactions that last longer than move.pause are ended");
            if tokio::time::timeout(end::ENDS, gate.drained()).await.is_ok() {
                return Ok(());
            }
        }
        Err(MoveError::Held(format!(
            "{} transactions have not ended within move.pause ({pause:?}); clients were released and the phase stays {}",
            gate.under_way(),
            self.from
        )))
    }

    /// The transactions of other proxies: they end, and none begins. First on the authority: who holds its lock there may still need the mirror's.
    /// Sessions of a proxy that is frozen are ended meanwhile (B7), and with `terminate` all that last. Returns how long clients were held by the time that the
    /// authority's had ended.
    async fn close_epoch(&self, deadline: Instant) -> Result<Duration, MoveError> {
        let mut waited = Duration::ZERO;
        let (epoch, pause) = (self.world.epoch, self.config.moves.pause);
        // There no ledger would say what a carrier that was ended had brought.
        let best_effort = self.config.mirror.commit == Commit::BestEffort;
        for side in [self.from.authority(), self.from.authority().other()] {
            let client = match self.hands.on(side) {
                Ok(client) => client,
                // It is left behind: nothing commits on a server that is down, and nothing that it has is counted on.
                Err(_) if !self.step.needs(side) => continue,
                Err(error) => return Err(error),
            };
            let mirror = side != self.from.authority();
            let late = end::Late { epoch, deadline, terminate: self.terminate, mirror };
            let left = deadline.saturating_duration_since(Instant::now());
            let patience = match (mirror, self.terminate) {
                (true, _) => left.max(CARRIED),
                (false, true) => left + end::ENDS,
                (false, false) => left,
            };
            let closed = tokio::select! {
                closed = tokio::time::timeout(patience + ROW, epoch::close(client, side, epoch, patience, pause)) => closed,
                never = self.ready.eyes.end_late(side, late), if !(mirror && best_effort) => match never {},
            };
            match closed {
                Ok(closed) => closed?,
                Err(_) => {
                    return Err(MoveError::Held(format!(
                        "{side} has not answered within move.pause ({pause:?}); clients were released and the phase stays {}",
                        self.from
                    )));
                }
            }
            if !mirror {
                waited = self.started.elapsed();
            }
        }
        Ok(waited)
    }

    /// Everything up to the rows; may be given up at any point.
    async fn prepare(&self, jobs: &mut Jobs, deadline: Instant) -> Result<(Option<Copies>, Vec<Gate>), MoveError> {
        let (from, to, catalog) = (self.from, self.to, &self.ready.catalog);
        if let Some(announcement) = &self.announcement {
            announcement.fence(self.hands.on(from.authority())?, deadline).await?;
        }
        if let Some(side) = writers_on(from, to) {
            writers::gone(self.hands.on(side)?, catalog, side, deadline, self.terminate).await?;
        }
        self.lap("nobody writes");
        if self.config.fence && from.authority() != to.authority() {
            let side = from.authority();
            let tables: Vec<u32> = catalog.tables.values().map(|table| *table.oid.get(side)).collect();
            migrate::fence::shut(self.hands.on(side)?, side, &tables, deadline).await?;
        }
        let mut copies = None;
        if from.mirror().is_none() && to.mirror().is_some() {
            // Nobody else owes anything yet.
            self.number_debts();
            let authority = self.hands.on(to.authority())?;
            copies = owe_everything(self.shared, authority, catalog, jobs.keyless.take()).await?;
            self.lap("everything is owed");
        }
        if from.authority() != to.authority() {
            let side = from.authority();
            if !migrate::sweep::passed(self.ready.eyes.must(side)?, side, deadline).await? {
                return Err(MoveError::Held(format!(
                    "the sweep has not passed all that was written on {side} within move.pause: it may have found rows that differ; clients were released and the phase stays {from}"
                )));
            }
            nothing_owed(self.shared, self.hands.on(from.authority())?, from, jobs.repair.as_mut(), deadline).await?;
            self.lap("nothing is owed");
            let losing = (from.authority(), self.hands.on(from.authority())?);
            // Not by the hands, whose transaction keeps this epoch closed there.
            let gaining = (to.authority(), self.ready.eyes.must(to.authority())?);
            migrate::sequences::sequences(losing, gaining, catalog, SEQUENCE_MARGIN).await?;
            // What verify found here in an earlier stretch is not about the side that loses.
            let removed = gaining.1.batch_execute("DELETE FROM crossfade.verified").await;
            removed.map_err(|error| {
                let said = rows::said(&error);
                MoveError::Held(format!("what verify found on {} could not be removed: {said}; clients were released and the phase stays {from}", gaining.0))
            })?;
            self.lap("sequences are set");
        }
        Ok((copies, self.look_again().await?))
    }

    /// The gates once more, with nobody writing.
    async fn look_again(&self) -> Result<Vec<Gate>, MoveError> {
        let known = if self.from.mirror().is_some() { &self.world.catalog } else { &self.ready.catalog };
        let question =
            Question { config: self.config, step: self.step, epoch: self.world.epoch, catalog: known, ours: &[] };
        let facts = question.under_the_barrier(&self.ready.eyes, Some(self.ready.facts.clone())).await?;
        let mut gates = rules::judge(self.step, &self.config.moves, &facts);
        self.ask.force.open(&mut gates);
        match gates::why(self.to, &gates) {
            Some(why) => {
                Err(MoveError::Held(format!("{why}. It was met before clients were held; they were released")))
            }
            None => Ok(gates),
        }
    }

    /// The side that loses authority points first; then the side that gains it claims. Where authority stays, its side's row is what counts; the other's is
    /// written for those who look there, if it can be, and has its epoch's table. One that is left behind can wait (`leave_mirror`).
    async fn write_rows(&self, hands: &Hands, epoch: u64, detail: &Value) -> Result<(), MoveError> {
        let holds = Holds { epoch, phase: self.to };
        let (losing, gaining) = (self.from.authority(), self.to.authority());
        if losing != gaining {
            // What takes time comes before the first COMMIT: from then on other proxies' sessions wake up.
            let ours = self.prepare_row(hands, losing, holds, ("move", detail));
            tokio::try_join!(ours, self.prepare_row(hands, gaining, holds, ("move", detail)))?;
            self.lap("the rows are prepared");
            self.commit_row(hands, losing).await?;
            return self.commit_row(hands, gaining).await;
        }
        self.write_row(hands, losing, holds, ("move", detail)).await?;
        if !self.leaves_mirror() {
            self.write_other(hands, holds, detail).await;
        }
        Ok(())
    }

    async fn write_other(&self, hands: &Hands, holds: Holds, detail: &Value) {
        let side = self.to.authority().other();
        if let Err(error) = self.write_row(hands, side, holds, ("move", detail)).await {
            warn!(%side, %error, "the phase row of the other side was not written; the authority's holds");
        }
    }

    /// From now on nothing is mirrored; the authority stays.
    fn leaves_mirror(&self) -> bool {
        self.from.mirror().is_some() && self.to.mirror().is_none()
    }

    /// With clients released: what nobody has to wait for. The row of the side that is left behind, whose lock is held until then; and the ledger, since
    /// without a mirror nothing is owed to it. The next mirrored phase begins with whole-table debts: where somebody is about to enter one, or has, the
    /// ledger is his.
    async fn leave_mirror(&self, done: &Done) {
        self.write_other(self.hands, Holds { epoch: done.epoch, phase: self.to }, &done.detail).await;
        let side = self.to.authority();
        let emptied = async {
            let ledger = self.hands.on(side)?;
            epoch::begin(ledger, side, done.epoch, None).await?;
            ledger.batch_execute("DELETE FROM crossfade.ledger; COMMIT").await?;
            Ok::<(), MoveError>(())
        };
        if let Err(error) = emptied.await {
            debug!(%error, "the ledger was not emptied; nothing reads it in this phase");
        }
    }

    async fn write_row(&self, hands: &Hands, side: Side, holds: Holds, event: (&str, &Value)) -> Result<(), MoveError> {
        self.prepare_row(hands, side, holds, event).await?;
        self.commit_row(hands, side).await
    }

    async fn prepare_row(
        &self,
        hands: &Hands,
        side: Side,
        holds: Holds,
        event: (&str, &Value),
    ) -> Result<(), MoveError> {
        let definition = self.config.definition();
        let name = (self.config.name.as_str(), Some(definition.as_str()));
        in_time(side, epoch::prepare(hands.on(side)?, side, name, holds, event)).await
    }

    async fn commit_row(&self, hands: &Hands, side: Side) -> Result<(), MoveError> {
        in_time(side, epoch::commit(hands.on(side)?, side)).await
    }

    /// A row could not be written, or nobody knows whether it was: before clients go on it must be certain what holds. The move is withdrawn by a
    /// later epoch on the side that was authority; where that side is gone, it is finished.
    async fn settle_rows(&self, epoch: u64, error: MoveError, detail: &Value) -> Result<(), MoveError> {
        warn!(%error, "the phase rows were not written; clients wait until it is certain which phase holds");
        let back = Holds { epoch: epoch + 1, phase: self.from };
        self.hands.let_go().await;
        loop {
            let hands = Hands::open(self.config).await;
            if self.write_row(&hands, self.from.authority(), back, ("withdrawn", detail)).await.is_ok() {
                self.holds(back.epoch, self.from, self.world.catalog.clone());
                return Err(error);
            }
            if self.write_rows(&hands, epoch, detail).await.is_ok() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Numbers of another ledger from here on: those drawn from one side's sequence may be taken on the other.
    fn number_debts(&self) {
        if let Some(block) = self.ready.block {
            self.shared.next_debt.store(block, Ordering::SeqCst);
        }
    }

    fn holds(&self, epoch: u64, phase: Phase, catalog: Arc<Catalog>) {
        let generation = self.world.generation + 1;
        self.shared.world.store(Arc::new(World { epoch, phase, generation, catalog }));
        self.shared.metrics.set_phase(phase, epoch);
        self.shared.call();
    }
}

/// A phase row, or its COMMIT.
async fn in_time(side: Side, write: impl Future<Output = Result<(), RowError>>) -> Result<(), MoveError> {
    match tokio::time::timeout(ROW, write).await {
        Ok(written) => Ok(written?),
        Err(_) => Err(MoveError::Held(format!("{side} has not written its phase row within {ROW:?}"))),
    }
}

/// Debts in flight are cleared, what is owed is paid; then nothing may be left, and no transaction under way to the mirror (`best-effort` has no
/// debts that would show it).
async fn nothing_owed(
    shared: &Arc<Shared>,
    ledger: &Client,
    from: Phase,
    mut repair: Option<&mut migrate::repair::Repair>,
    deadline: Instant,
) -> Result<(), MoveError> {
    loop {
        let row = ledger.query_typed_one("SELECT count(*) FROM crossfade.ledger", &[]).await?;
        let left: i64 = row.get(0);
        if left == 0 && shared.paid.carrying.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(MoveError::Held(format!(
                "{left} debts are left on {}; clients were released and the phase stays {from}",
                from.authority()
            )));
        }
        if let Some(repair) = &mut repair {
            let pass = repair.try_pass().await?.unwrap_or_default();
            if pass.owed == 0 && pass.in_flight == 0 && pass.cleared > 0 {
                continue;
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_leads_there_and_never_skips_a_mirrored_phase() {
        for from in Phase::ALL {
            for to in Phase::ALL {
                let mut at = from;
                for _ in 0..5 {
                    if at == to {
                        break;
                    }
                    let then = next(at, to);
                    if at.authority() != then.authority() {
                        assert!(at.mirror().is_some() && then.mirror().is_some(), "{at} -> {then}");
                    }
                    at = then;
                }
                assert_eq!(at, to, "from {from}");
            }
        }
    }
}
