//! Moving the phase: step by step, each behind the gate that transactions pass.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tracing::{info, warn};

use super::epoch;
use super::fleet::{self, Announcement};
use super::rows::{Holds, RowError};
use crate::catalog::{self, Catalog, CatalogError};
use crate::config::Config;
use crate::ledger::debts::{Debt, encode};
use crate::migrate;
use crate::phase::{Phase, Side};
use crate::shared::{Shared, World};

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
    #[error("{0}")]
    Database(#[from] tokio_postgres::Error),
}

/// The phase stays, and why.
#[derive(Debug)]
pub struct Stays {
    /// What is in the way.
    pub error: MoveError,
    /// Clients were held in vain: it must not happen again and again.
    pub held: bool,
}

/// Control connections of one move. A side that the move can do without may be out of reach.
struct Hands {
    old: Result<Client, crate::config::ConnectError>,
    new: Result<Client, crate::config::ConnectError>,
}

impl Hands {
    async fn open(config: &Config) -> Hands {
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
    async fn let_go(&self) {
        for client in [&self.old, &self.new].into_iter().flatten() {
            let _ = tokio::time::timeout(Duration::from_secs(1), client.batch_execute("ROLLBACK")).await;
        }
    }

    fn on(&self, side: Side) -> Result<&Client, MoveError> {
        self.get(side).as_ref().map_err(|error| MoveError::Closed(format!("{side} cannot be reached: {error}")))
    }
}

/// The move writes on that side. Leaving a mirror, or keeping it, needs the authority only: the way back is open while the mirror is dead.
fn needed(from: Phase, to: Phase, side: Side) -> bool {
    from.authority() == side || to.authority() == side || (to.mirror() == Some(side) && from.mirror() != Some(side))
}

/// Values that sequences are set ahead of the other side's. None: while they are read no client draws, and what sessions have cached
/// (`CACHE`) is behind `last_value` already. A margin would only leave a gap at every move, in small sequences a dear one.
const SEQUENCE_MARGIN: u32 = 0;

/// How long one write of a phase row may take before the move is withdrawn.
const ROW: Duration = Duration::from_secs(5);

/// How long the sweep is waited for while nobody is held.
const MOVE_SWEPT: Duration = Duration::from_secs(3);

/// A transaction around the proxy that is older than this is named before anybody is held.
const LONG: &str = "1 second";

/// A table without a key, to be copied in the snapshot that was taken while no client wrote. The mirror's table was emptied then; rows that clients
/// insert since are mirrored.
struct KeylessCopy {
    pair: migrate::Pair,
    /// Its transaction keeps the snapshot.
    _exporter: Client,
    snapshot: String,
    table: Arc<crate::catalog::Table>,
    debt: i64,
}

impl KeylessCopy {
    async fn run(mut self) -> Result<(), migrate::Error> {
        let rows = migrate::copy::keyless(&mut self.pair, &self.table, &self.snapshot, &[self.debt]).await?;
        info!(table = %self.table.label(), rows, "a table without a key was copied");
        Ok(())
    }
}

/// A block of 2^32 numbers for debts, from the sequence of the side whose ledger they stand in: nextval in a client's session would change
/// its lastval().
pub async fn draw_block(authority: &Client) -> Result<i64, tokio_postgres::Error> {
    let row = authority.query_one("SELECT pg_catalog.nextval('crossfade.ledger_id')", &[]).await?;
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
pub async fn step(shared: &Arc<Shared>, want: Phase) -> Result<Phase, Stays> {
    let world = shared.world.load_full();
    let (from, to) = (world.phase, next(world.phase, want));
    let config = shared.config.load_full();
    let hands = Hands::open(&config).await;
    let ready = async {
        for side in Side::BOTH.into_iter().filter(|side| needed(from, to, *side)) {
            migrate::install(hands.on(side)?, side).await?;
        }
        let catalog = definitions(&config, &hands, from, to, &world).await?;
        let definition = from.mirror().map(|_| config.definition());
        let side = from.authority();
        epoch::begin(hands.on(side)?, side, world.epoch, definition.as_deref()).await?;
        before(shared, &hands, (from, to), world.epoch, &catalog).await?;
        let block = match to.mirror() {
            Some(_) => Some(draw_block(hands.on(to.authority())?).await?),
            None => None,
        };
        Ok((catalog, block))
    };
    let (catalog, block) = match ready.await {
        Ok(ready) => ready,
        Err(error) => {
            if matches!(error, MoveError::Overtaken { .. }) {
                shared.overtaken.notify_one();
            }
            return Err(Stays { error, held: false });
        }
    };
    let announcement = match from.mirror().is_none() && to.mirror().is_some() {
        true => {
            let announced = fleet::announce(shared, &config, from.authority(), world.epoch, to).await;
            Some(announced.map_err(|error| Stays { error, held: true })?)
        }
        false => None,
    };
    let plan = Move {
        shared,
        config: &config,
        hands: &hands,
        from,
        to,
        catalog: &catalog,
        block,
        world: &world,
        announcement: &announcement,
    };
    let started = Instant::now();
    shared.gate.close();
    let outcome = plan.behind_the_gate().await;
    hands.let_go().await;
    if let Some(announcement) = announcement {
        announcement.end().await;
    }
    shared.gate.open();
    let held = started.elapsed();
    shared.metrics.move_pause_seconds.observe(held.as_secs_f64());
    let copies = outcome.map_err(|error| Stays { error, held: true })?;
    info!(%from, %to, pause_ms = held.as_millis() as u64, "the phase has moved");
    for copy in copies {
        if let Err(error) = copy.run().await {
            warn!(%error, "a table without a key was not copied; its debt stays: `crossfade repair --table NAME` copies it under a lock");
        }
    }
    shared.owed.notify_one();
    Ok(to)
}

/// The definitions that hold after the move.
async fn definitions(
    config: &Config,
    hands: &Hands,
    from: Phase,
    to: Phase,
    world: &World,
) -> Result<Arc<Catalog>, MoveError> {
    if from.mirror() == to.mirror() {
        return Ok(world.catalog.clone());
    }
    if to.mirror().is_none() {
        return Ok(Arc::new(Catalog::default()));
    }
    let (old, new) = (hands.on(Side::Old)?, hands.on(Side::New)?);
    Ok(Arc::new(catalog::load(old, new, config.tables.as_deref(), &config.except).await?))
}

/// Writers that this move waits for stand on this side: no transaction of theirs may outlive the phase in which it began.
fn writers_on(from: Phase, to: Phase) -> Option<Side> {
    let gains_mirror = from.mirror().is_none() && to.mirror().is_some();
    (gains_mirror || from.authority() != to.authority()).then(|| from.authority())
}

/// What can be known to be in the way before anybody is held.
async fn before(
    shared: &Arc<Shared>,
    hands: &Hands,
    (from, to): (Phase, Phase),
    epoch: u64,
    catalog: &Catalog,
) -> Result<(), MoveError> {
    let side = from.authority();
    if let Some(holder) = epoch::foreign_holder(hands.on(side)?, epoch, &shared.cancels.pids(side)).await? {
        return Err(MoveError::Closed(format!(
            "{to} waits: {holder} on {side} holds the lock of the epoch's table in schema crossfade; end it, or wait for it (and exclude the schema from dumps)"
        )));
    }
    if let Some(side) = writers_on(from, to) {
        let ours = shared.cancels.pids(side);
        if let Some(writer) = foreign_writer(hands.on(side)?, catalog, side, &ours).await? {
            return Err(MoveError::Closed(format!(
                "{to} waits: {writer} on {side} holds a writer's lock on a migrating table; end its transaction, or wait for it"
            )));
        }
    }
    if from.authority() == to.authority() {
        return Ok(());
    }
    if let Some(why) = migrate::sweep::obstacle(hands.on(side)?, side).await? {
        return Err(MoveError::Closed(format!("{to} waits: {why}")));
    }
    // Once more behind the gate; what is found now can still be paid without holding anybody.
    if !migrate::sweep::passed(Shared::database(&shared.config.load(), side), side, Instant::now() + MOVE_SWEPT).await?
    {
        return Err(MoveError::Closed(format!("{to} waits: the sweep has not passed yet what was written on {side}")));
    }
    let row = hands
        .on(from.authority())?
        .query_one("SELECT count(*) FROM crossfade.ledger WHERE at < clock_timestamp() - interval '5 seconds' OR carrier_xid IS NULL", &[])
        .await?;
    let owed: i64 = row.get(0);
    if owed > 0 {
        shared.owed.notify_one();
        return Err(MoveError::Closed(format!(
            "{to} waits: {owed} debts are still owed on {}; they are being paid (`crossfade status` shows them)",
            from.authority()
        )));
    }
    Ok(())
}

/// One step.
struct Move<'a> {
    shared: &'a Arc<Shared>,
    config: &'a Config,
    hands: &'a Hands,
    from: Phase,
    to: Phase,
    catalog: &'a Arc<Catalog>,
    /// The first of the numbers for debts on the side that will be authority.
    block: Option<i64>,
    world: &'a World,
    /// Where other proxies hold no locks: they know.
    announcement: &'a Option<Announcement>,
}

impl Move<'_> {
    /// With every client transaction ended and new ones waiting.
    async fn behind_the_gate(&self) -> Result<Vec<KeylessCopy>, MoveError> {
        let (shared, from) = (self.shared, self.from);
        let pause = self.config.moves.pause;
        let deadline = Instant::now() + pause;
        if tokio::time::timeout(pause, shared.gate.drained()).await.is_err() {
            return Err(MoveError::Held(format!(
                "{} transactions have not ended within move.pause ({pause:?}); clients were released and the phase stays {from}",
                shared.gate.under_way()
            )));
        }
        if from.mirror().is_some() {
            self.close_epoch().await?;
        }
        // What waits inside ends at the deadline by itself and says why; the rest is bounded here: a server may be frozen.
        let Ok(prepared) = tokio::time::timeout(pause + ROW, self.prepare(deadline)).await else {
            return Err(MoveError::Held(format!(
                "the move was not prepared within move.pause ({pause:?}): does a server not answer? Clients were released and the phase stays {from}"
            )));
        };
        let copies = prepared?;
        let epoch = self.world.epoch + 1;
        if let Err(error) = self.write_rows(self.hands, epoch).await {
            self.settle_rows(epoch, error).await?;
        }
        if from.authority() != self.to.authority() {
            self.number_debts();
        }
        self.holds(epoch, self.to, self.catalog.clone());
        if from.mirror().is_some() && self.to.mirror().is_none() {
            // Without a mirror nothing is owed to it any more: the next mirrored phase begins with whole-table debts.
            let emptied = self.hands.on(from.authority())?.batch_execute("DELETE FROM crossfade.ledger").await;
            if let Err(error) = emptied {
                warn!(%error, "the ledger could not be emptied; nothing reads it in this phase");
            }
        }
        Ok(copies)
    }

    /// The transactions of other proxies: they end, and none begins. First on the authority: who holds its lock there may still need the mirror's.
    async fn close_epoch(&self) -> Result<(), MoveError> {
        let (epoch, pause) = (self.world.epoch, self.config.moves.pause);
        for side in [self.from.authority(), self.from.authority().other()] {
            let client = match self.hands.on(side) {
                Ok(client) => client,
                // It is left behind: nothing commits on a server that is down, and nothing that it has is counted on.
                Err(_) if !needed(self.from, self.to, side) => continue,
                Err(error) => return Err(error),
            };
            match tokio::time::timeout(pause + ROW, epoch::close(client, side, epoch, pause)).await {
                Ok(closed) => closed?,
                Err(_) => {
                    return Err(MoveError::Held(format!(
                        "{side} has not answered within move.pause ({pause:?}); clients were released and the phase stays {}",
                        self.from
                    )));
                }
            }
        }
        Ok(())
    }

    /// Everything up to the rows; may be given up at any point.
    async fn prepare(&self, deadline: Instant) -> Result<Vec<KeylessCopy>, MoveError> {
        let (from, to) = (self.from, self.to);
        if let Some(announcement) = self.announcement {
            announcement.fence(self.hands.on(from.authority())?, deadline).await?;
        }
        if let Some(side) = writers_on(from, to) {
            writers_gone(self.hands.on(side)?, self.catalog, side, deadline).await?;
        }
        let mut copies = Vec::new();
        if from.mirror().is_none() && to.mirror().is_some() {
            // Nobody else owes anything yet.
            self.number_debts();
            copies = owe_everything(self.shared, self.config, self.hands, to, self.catalog).await?;
        }
        if from.authority() != to.authority() {
            let side = from.authority();
            if !migrate::sweep::passed(Shared::database(self.config, side), side, deadline).await? {
                return Err(MoveError::Held(format!(
                    "the sweep has not passed all that was written on {side} within move.pause: it may have found rows that differ; clients were released and the phase stays {from}"
                )));
            }
            nothing_owed(self.shared, self.config, self.hands.on(from.authority())?, from, self.catalog, deadline)
                .await?;
            let losing = (from.authority(), self.hands.on(from.authority())?);
            let gaining = (to.authority(), self.hands.on(to.authority())?);
            migrate::sequences::sequences(losing, gaining, self.catalog, SEQUENCE_MARGIN).await?;
        }
        Ok(copies)
    }

    /// The side that loses authority points first; then the side that gains it claims. Where authority stays, its side's row is what counts;
    /// the other's is written for those who look there, if it can be.
    async fn write_rows(&self, hands: &Hands, epoch: u64) -> Result<(), MoveError> {
        let holds = Holds { epoch, phase: self.to };
        let (losing, gaining) = (self.from.authority(), self.to.authority());
        self.write_row(hands, losing, holds, "move").await?;
        let other = if losing == gaining { gaining.other() } else { gaining };
        match self.write_row(hands, other, holds, "move").await {
            Err(error) if losing == gaining => {
                warn!(side = %other, %error, "the phase row of the other side was not written; the authority's holds");
                Ok(())
            }
            written => written,
        }
    }

    async fn write_row(&self, hands: &Hands, side: Side, holds: Holds, event: &str) -> Result<(), MoveError> {
        let definition = self.config.definition();
        let name = (self.config.name.as_str(), Some(definition.as_str()));
        let write = epoch::turn(hands.on(side)?, side, name, holds, event);
        match tokio::time::timeout(ROW, write).await {
            Ok(written) => Ok(written?),
            Err(_) => Err(MoveError::Held(format!("{side} has not written its phase row within {ROW:?}"))),
        }
    }

    /// A row could not be written, or nobody knows whether it was: before clients go on it must be certain what holds. The move is withdrawn by a
    /// later epoch on the side that was authority; where that side is gone, it is finished.
    async fn settle_rows(&self, epoch: u64, error: MoveError) -> Result<(), MoveError> {
        warn!(%error, "the phase rows were not written; clients wait until it is certain which phase holds");
        let back = Holds { epoch: epoch + 1, phase: self.from };
        self.hands.let_go().await;
        loop {
            let hands = Hands::open(self.config).await;
            if self.write_row(&hands, self.from.authority(), back, "withdrawn").await.is_ok() {
                self.holds(back.epoch, self.from, self.world.catalog.clone());
                return Err(error);
            }
            if self.write_rows(&hands, epoch).await.is_ok() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Numbers of another ledger from here on: those drawn from one side's sequence may be taken on the other.
    fn number_debts(&self) {
        if let Some(block) = self.block {
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

/// Backends with a writer's lock on a migrating table. $1: the tables, $2: backends to leave out, $3: younger transactions are left out.
const WRITERS: &str = "SELECT coalesce('backend ' || l.pid, 'a prepared transaction'), coalesce(a.application_name, '') FROM pg_catalog.pg_locks l \
    LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
    WHERE l.locktype = 'relation' AND l.relation = ANY ($1) AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) \
    AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') AND l.granted \
    AND (l.pid IS NULL OR l.pid <> ALL ($2)) AND coalesce(a.xact_start < clock_timestamp() - $3::text::interval, true) LIMIT 1";

/// Who writes around this proxy, and has for a while.
async fn foreign_writer(
    authority: &Client,
    catalog: &Catalog,
    side: Side,
    ours: &[i32],
) -> Result<Option<String>, MoveError> {
    let oids: Vec<u32> = catalog.by_oid.get(side).keys().copied().collect();
    let row = authority.query_opt(WRITERS, &[&oids, &ours, &LONG]).await?;
    Ok(row.map(|row| format!("{} ({})", row.get::<_, String>(0), row.get::<_, String>(1))))
}

/// Transactions that write migrating tables and are not ours to hold (a proxy that died, other clients) must have ended: what they write later
/// would be mirrored by nobody and copied too early, or owed by a side that is no authority any more.
async fn writers_gone(authority: &Client, catalog: &Catalog, side: Side, deadline: Instant) -> Result<(), MoveError> {
    let oids: Vec<u32> = catalog.by_oid.get(side).keys().copied().collect();
    loop {
        let row = authority.query_opt(WRITERS, &[&oids, &Vec::<i32>::new(), &"0 seconds"]).await?;
        let Some(row) = row else { return Ok(()) };
        if Instant::now() > deadline {
            let (who, name): (String, String) = (row.get(0), row.get(1));
            return Err(MoveError::Held(format!(
                "{who} ({name}) on {side} holds a writer's lock on a migrating table and has not ended within move.pause"
            )));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A whole-table debt for each migrating table; those without a key are copied in the snapshot of this move.
async fn owe_everything(
    shared: &Arc<Shared>,
    config: &Config,
    hands: &Hands,
    to: Phase,
    catalog: &Arc<Catalog>,
) -> Result<Vec<KeylessCopy>, MoveError> {
    let authority = to.authority();
    hands.on(authority)?.batch_execute("DELETE FROM crossfade.ledger").await?;
    let mut keyless = Vec::new();
    for table in catalog.tables.values() {
        let id = shared.debt_id();
        let mut debts = bytes::BytesMut::new();
        encode(&Debt::Table { table: table.number }, &mut debts);
        let sql = "INSERT INTO crossfade.ledger (id, debts, reason) VALUES ($1, $2, 'move')";
        hands.on(authority)?.execute(sql, &[&id, &&debts[..]]).await?;
        if table.key.is_none() && table.opaque.is_none() {
            keyless.push((table.clone(), id));
        }
    }
    let mut copies = Vec::new();
    for (table, id) in keyless {
        let reader = Shared::database(config, authority).connect("crossfade copy").await?;
        let writer = Shared::database(config, authority.other()).connect("crossfade copy").await?;
        let exporter = Shared::database(config, authority).connect("crossfade copy").await?;
        exporter.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        let snapshot = exporter.query_one("SELECT pg_export_snapshot()", &[]).await?.get(0);
        let mut pair = migrate::Pair::new(authority, reader, writer, migrate::Settings::default()).await?;
        migrate::copy::prepare(&mut pair, catalog, &table).await?;
        copies.push(KeylessCopy { pair, _exporter: exporter, snapshot, table, debt: id });
    }
    Ok(copies)
}

/// Debts in flight are cleared, what is owed is paid; then nothing may be left, and no transaction under way to the mirror (`best-effort` has no
/// debts that would show it).
async fn nothing_owed(
    shared: &Arc<Shared>,
    config: &Config,
    ledger: &Client,
    from: Phase,
    catalog: &Arc<Catalog>,
    deadline: Instant,
) -> Result<(), MoveError> {
    let authority = from.authority();
    let mut repair: Option<migrate::repair::Repair> = None;
    loop {
        let row = ledger.query_one("SELECT count(*) FROM crossfade.ledger", &[]).await?;
        let left: i64 = row.get(0);
        if left == 0 && shared.paid.carrying.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(MoveError::Held(format!(
                "{left} debts are left on {authority}; clients were released and the phase stays {from}"
            )));
        }
        if repair.is_none() {
            let first = Shared::database(config, authority).connect("crossfade move").await?;
            let second = Shared::database(config, authority.other()).connect("crossfade move").await?;
            let pair = migrate::Pair::new(authority, first, second, migrate::Settings::default()).await?;
            repair = Some(migrate::repair::Repair::new(pair, catalog.clone()));
        }
        if let Some(repair) = &mut repair {
            repair.pass().await?;
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
