//! Moving the phase: step by step, each behind the gate that transactions pass.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tracing::{info, warn};

use super::rows::{self, Holds, RowError};
use crate::catalog::{self, Catalog, CatalogError};
use crate::config::Config;
use crate::ledger::debts::{Debt, encode};
use crate::migrate;
use crate::phase::{Phase, Side};
use crate::shared::{Shared, World, lock};

/// Why the phase stays.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// A gate is closed; nobody was held.
    #[error("{0}")]
    Closed(String),
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

impl MoveError {
    /// Clients had to wait for nothing.
    pub fn held_clients(&self) -> bool {
        !matches!(self, MoveError::Closed(_) | MoveError::Connect(_))
    }
}

/// Control connections of one move.
struct Hands {
    old: Client,
    new: Client,
}

impl Hands {
    async fn open(config: &Config) -> Result<Hands, MoveError> {
        Ok(Hands { old: config.old.connect("crossfade move").await?, new: config.new.connect("crossfade move").await? })
    }

    fn on(&self, side: Side) -> &Client {
        match side {
            Side::Old => &self.old,
            Side::New => &self.new,
        }
    }
}

/// Values that sequences are set ahead of the other side's.
const SEQUENCE_MARGIN: u32 = 0;

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
            Ok((catalog::load(&first, &first, config.tables.as_deref(), &config.except).await?, false))
        }
    }
}

/// Moves one step on the way to `want`. Gives the phase that holds then.
pub async fn step(shared: &Arc<Shared>, want: Phase) -> Result<Phase, MoveError> {
    let config = shared.config.load_full();
    let world = shared.world.load_full();
    let from = world.phase;
    let to = next(from, want);
    let hands = Hands::open(&config).await?;
    for side in Side::BOTH {
        migrate::install(hands.on(side), side).await?;
    }
    before(shared, &hands, from, to).await?;
    let catalog = match to.mirror().or(from.mirror()) {
        Some(_) => Arc::new(catalog::load(&hands.old, &hands.new, config.tables.as_deref(), &config.except).await?),
        None => Arc::new(Catalog::default()),
    };
    let started = Instant::now();
    shared.gate.close();
    let outcome = behind_the_gate(shared, &config, &hands, from, to, &catalog, &world).await;
    shared.gate.open();
    let held = started.elapsed();
    shared.metrics.move_pause_seconds.observe(held.as_secs_f64());
    let copies = outcome?;
    info!(%from, %to, pause_ms = held.as_millis() as u64, "the phase has moved");
    for copy in copies {
        if let Err(error) = copy.run().await {
            warn!(%error, "a table without a key was not copied; its debt stays: `crossfade repair --table NAME` copies it under a lock");
        }
    }
    shared.owed.notify_one();
    Ok(to)
}

/// What can be known to be in the way before anybody is held.
async fn before(shared: &Arc<Shared>, hands: &Hands, from: Phase, to: Phase) -> Result<(), MoveError> {
    if from.authority() == to.authority() {
        return Ok(());
    }
    let row = hands
        .on(from.authority())
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

/// With every client transaction ended and new ones waiting.
async fn behind_the_gate(
    shared: &Arc<Shared>,
    config: &Config,
    hands: &Hands,
    from: Phase,
    to: Phase,
    catalog: &Arc<Catalog>,
    world: &World,
) -> Result<Vec<KeylessCopy>, MoveError> {
    let pause = config.moves.pause;
    let deadline = Instant::now() + pause;
    if tokio::time::timeout(pause, shared.gate.drained()).await.is_err() {
        return Err(MoveError::Held(format!(
            "{} transactions have not ended within move.pause ({pause:?}); clients were released and the phase stays {from}",
            shared.gate.under_way()
        )));
    }
    let epoch = world.epoch + 1;
    let mut copies = Vec::new();
    if from.mirror().is_none() && to.mirror().is_some() {
        writers_gone(hands.on(to.authority()), catalog, to.authority(), deadline).await?;
        copies = owe_everything(shared, config, hands, to, catalog).await?;
    }
    if from.authority() != to.authority() {
        nothing_owed(shared, config, hands, from, catalog, deadline).await?;
        let losing = (from.authority(), hands.on(from.authority()));
        migrate::sequences::sequences(losing, (to.authority(), hands.on(to.authority())), catalog, SEQUENCE_MARGIN)
            .await?;
    }
    declare(shared, hands, from, Holds { epoch, phase: to }).await?;
    if from.mirror().is_some() && to.mirror().is_none() {
        // Without a mirror nothing is owed to it any more: the next mirrored phase begins with whole-table debts, and empties it first, too.
        let emptied = hands.on(from.authority()).batch_execute("DELETE FROM crossfade.ledger").await;
        if let Err(error) = emptied {
            warn!(%error, "the ledger could not be emptied; the next move to a mirrored phase does it");
        }
    }
    shared.world.store(Arc::new(World {
        epoch,
        phase: to,
        generation: world.generation + 1,
        catalog: catalog.clone(),
    }));
    shared.metrics.set_phase(to, epoch);
    Ok(copies)
}

/// Writes the rows that say what holds. Where the authority changes, the side that loses it points first; then the side that gains it claims.
///
/// An error means that nothing was written. Once the first row may be there, the move holds for whoever reads it: from then on there is no way
/// back, and no transaction may run under the old phase. So this does not return, and the gate stays closed, until it is finished.
async fn declare(shared: &Arc<Shared>, hands: &Hands, from: Phase, holds: Holds) -> Result<(), MoveError> {
    let (first, second) = (from.authority(), from.authority().other());
    let name = shared.config.load().name.clone();
    match rows::write(hands.on(first), first, &name, holds, "move").await {
        Ok(()) => {}
        Err(error) if error.wrote_nothing() => return Err(error.into()),
        Err(error) => write_for_sure(shared, first, holds, error).await,
    }
    if let Err(error) = rows::write(hands.on(second), second, &name, holds, "move").await {
        if holds.phase.authority() == second {
            write_for_sure(shared, second, holds, error).await;
        } else {
            // The authority claims; what the other side says of it is older, and not believed.
            warn!(%error, "the other side does not know of the move");
        }
    }
    Ok(())
}

async fn write_for_sure(shared: &Arc<Shared>, side: Side, holds: Holds, mut error: RowError) {
    loop {
        warn!(%side, phase = %holds.phase, %error, "the move has begun and cannot be undone; clients wait until it is finished");
        *lock(&shared.waiting) = Some(format!("{side} must say that phase {} holds: {error}", holds.phase));
        tokio::time::sleep(Duration::from_millis(200)).await;
        let config = shared.config.load_full();
        let client = match Shared::database(&config, side).connect("crossfade move").await {
            Ok(client) => client,
            Err(reason) => {
                warn!(%side, error = %reason, "no connection to finish the move");
                continue;
            }
        };
        match rows::write(&client, side, &config.name, holds, "move").await {
            Ok(()) => return,
            Err(again) => error = again,
        }
    }
}

/// Transactions that write migrating tables and are not ours to hold (a proxy that died, other clients) must have ended before the mirror's
/// debts are entered: what they write later would be mirrored by nobody and copied too early.
async fn writers_gone(authority: &Client, catalog: &Catalog, side: Side, deadline: Instant) -> Result<(), MoveError> {
    let oids: Vec<u32> = catalog.by_oid.get(side).keys().copied().collect();
    let sql = "SELECT coalesce(l.pid::text, 'a prepared transaction'), coalesce(a.application_name, '') FROM pg_catalog.pg_locks l \
        LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
        WHERE l.locktype = 'relation' AND l.relation = ANY ($1) AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) \
        AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') AND l.granted LIMIT 1";
    loop {
        let Some(row) = authority.query_opt(sql, &[&oids]).await? else { return Ok(()) };
        if Instant::now() > deadline {
            let (who, name): (String, String) = (row.get(0), row.get(1));
            return Err(MoveError::Held(format!(
                "backend {who} ({name}) on {side} holds a writer's lock on a migrating table and has not ended within move.pause"
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
    hands.on(authority).batch_execute("DELETE FROM crossfade.ledger").await?;
    let mut keyless = Vec::new();
    for table in catalog.tables.values() {
        let id = shared.debt_id();
        let mut debts = bytes::BytesMut::new();
        encode(&Debt::Table { table: table.number }, &mut debts);
        let sql = "INSERT INTO crossfade.ledger (id, debts, reason) VALUES ($1, $2, 'move')";
        hands.on(authority).execute(sql, &[&id, &&debts[..]]).await?;
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

/// Debts in flight are cleared, what is owed is paid; then nothing may be left.
async fn nothing_owed(
    shared: &Arc<Shared>,
    config: &Config,
    hands: &Hands,
    from: Phase,
    catalog: &Arc<Catalog>,
    deadline: Instant,
) -> Result<(), MoveError> {
    let authority = from.authority();
    loop {
        let row = hands.on(authority).query_one("SELECT count(*) FROM crossfade.ledger", &[]).await?;
        let left: i64 = row.get(0);
        if left == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(MoveError::Held(format!(
                "{left} debts are left on {authority}; clients were released and the phase stays {from}"
            )));
        }
        let first = Shared::database(config, authority).connect("crossfade move").await?;
        let second = Shared::database(config, authority.other()).connect("crossfade move").await?;
        let pair = migrate::Pair::new(authority, first, second, migrate::Settings::default()).await?;
        migrate::repair::Repair::new(pair, catalog.clone()).pass().await?;
        let _ = shared;
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
