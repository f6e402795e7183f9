//! Sweep (D9): change capture as the safety net. A logical slot on the authority yields the keys that anything has changed: clients around the proxy,
//! triggers, functions, cascades, CALL, DO, rewrites. Those that are not equal on the mirror become debts; a taint is spent when all that its transaction
//! wrote was looked at.
//!
//! The way of a change: `slot` keeps it; `decode` reads it, `load` makes keys and whole tables of it; `settle` compares, and enters what differs; only then
//! the slot moves on. Whoever dies in between does it once more. Nothing here changes a row of an application's table: debts are paid by `repair` (D1).
//! docs/protocols.md, *Sweep*, says why nothing is passed over.

mod decode;
mod identity;
mod load;
mod settle;
pub mod slot;

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures_util::TryStreamExt;
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::binary::Field;
use super::error::{Error, Meaning};
use super::link::{Pair, Settings, connect};
use crate::catalog::{Catalog, Sides};
use crate::config::Database;
use crate::ledger::debts::{Debt, decode as decode_debts, encode};
use crate::phase::{Phase, Side};
use identity::Identities;
pub use load::Unnamed;
use load::{Load, Reader, Spent};
pub use settle::Epoch;
use slot::Begun;
pub use slot::{Standing, standing, watch};

/// What is swept.
pub struct Sweep {
    /// The side whose changes are read.
    pub authority_side: Side,
    /// Its database.
    pub authority: Database,
    /// The other side's.
    pub mirror: Database,
    /// The tables.
    pub catalog: Arc<Catalog>,
    /// Under which epoch debts are entered.
    pub epoch: Epoch,
    /// What becomes of changes that no key names.
    pub unnamed: Unnamed,
    /// The first of a block of numbers for ledger rows that nobody else uses.
    pub first_debt: i64,
}

/// Between which sides a phase is swept: from its authority to the other. None: the other side is not to be written.
pub fn sides(phase: Phase) -> Option<(Side, Side)> {
    match phase {
        // Before the first mirrored phase the new side is kept up to date for it.
        Phase::Old | Phase::DualWrite | Phase::DualRead | Phase::NewPrimary => {
            Some((phase.authority(), phase.authority().other()))
        }
        Phase::OldReadOnly | Phase::New => None,
    }
}

/// What one turn has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Changes of migrating tables that were read.
    pub changes: u64,
    /// Keys that were entered as debts.
    pub owed: u64,
    /// Tables that were entered as a whole, by number.
    pub whole: BTreeSet<u32>,
    /// Taints that are spent.
    pub cleared: u64,
    /// There may be more at once.
    pub more: bool,
    /// Else: all that was in the log up to here was read.
    pub passed: Option<PgLsn>,
    /// Reading took so long: the server decodes from where its oldest transaction began.
    pub reading: Duration,
}

/// How a turn ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turned {
    /// All that was read is settled.
    Done(Turn),
    /// Definitions have changed: it must be opened anew, with those that hold now. Nothing was passed over.
    Outdated,
}

/// What a sweep that is at work sees to: repair leaves those taints to it.
#[derive(Debug, Default)]
pub struct AtWork(Mutex<Option<(Instant, HashSet<u32>)>>);

impl AtWork {
    /// It is at work on these tables.
    pub fn note(&self, tables: HashSet<u32>) {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((Instant::now(), tables));
    }

    /// It has ended.
    pub fn end(&self) {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    }

    /// It clears this table's taints, and was at it a moment ago.
    pub fn clears(&self, table: u32) -> bool {
        let at_work = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        at_work.as_ref().is_some_and(|(at, tables)| at.elapsed() < ASLEEP && tables.contains(&table))
    }
}

/// A sweep that has done nothing for so long is not counted on.
const ASLEEP: Duration = Duration::from_secs(15);

/// Why tables are tainted by writes that a row's change tells of: all that they did to rows stands in the log of the transaction that owes them, or, where
/// they are held, before their release. Not among them: DDL, which changes rows without a word (a column's default).
pub(super) const SPENT_BY_SWEEP: &[&str] = &[
    "ambiguous",
    "call",
    "copy",
    "cte",
    "do",
    "encoding",
    "execute",
    "explain",
    "function",
    "key-change",
    "merge",
    "privilege",
    "row-security",
    "rule",
    "suspended",
    "trigger",
    "truncate",
    "unknown-table",
    "unparsed",
    "view",
];

/// Changes that are read at once (one transaction may have more), and held at once.
const AT_ONCE: i32 = 10_000;
const HELD_KEYS: usize = 10_000;
const HELD_BYTES: usize = 4 << 20;
/// Of one change so many characters are read: keys stand in front.
const LINE: i32 = 1 << 20;

/// The lines that say nothing to us come without their text: whether more were there than asked for is seen by their number.
const PEEK: &str = "SELECT lsn, xid::text::bigint, CASE WHEN data LIKE 'table crossfade.%' AND data NOT LIKE 'table crossfade.ledger: %' THEN '' \
    WHEN octet_length(data) > $4 THEN left(data, $4) ELSE data END, octet_length(data) > $4 \
    FROM pg_logical_slot_peek_changes($1, $2, $3, 'include-xids', '0', 'skip-empty-xacts', '1', 'include-rewrites', '1')";

/// A sweep with its connections. While it lives nobody else sweeps this authority.
pub struct Sweeper {
    pair: Pair,
    reader: Client,
    catalog: Arc<Catalog>,
    identities: Identities,
    epoch: Epoch,
    unnamed: Unnamed,
    next_debt: i64,
    slot: String,
    held: HashSet<i64>,
    advanced: Option<Instant>,
}

/// One at a time for an authority: an advisory lock there.
const ONE: &str = "SELECT pg_try_advisory_lock(hashtextextended('crossfade.sweep', 0))";
/// What its sessions are called on the servers.
const NAME: &str = "crossfade sweep";
/// How long connections may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the slot moves on where nothing has changed.
const IDLE: Duration = Duration::from_secs(1);

impl Sweeper {
    /// Opens its connections, and makes the slot where there is none. None: another one is at work. Schema crossfade must be there on both sides.
    pub async fn open(sweep: &Sweep) -> Result<Option<Sweeper>, Error> {
        let side = sweep.authority_side;
        let reader = connect(&sweep.authority, side, NAME).await?;
        let failed = |doing| move |error: tokio_postgres::Error| Error::from_driver(side, doing, &error);
        let setting = "SET statement_timeout = 0; SET lock_timeout = 0; SET client_encoding = 'UTF8'; SET bytea_output = 'hex'; SET datestyle = 'ISO, YMD'; \
            SET intervalstyle = 'postgres'; SET extra_float_digits = 3; SET default_transaction_read_only = off; SET row_security = off";
        reader.batch_execute(setting).await.map_err(failed("setting up the session"))?;
        if !reader.query_one(ONE, &[]).await.map_err(failed("looking for another sweep"))?.get::<_, bool>(0) {
            return Ok(None);
        }
        let begun = slot::begin(&reader, side).await?;
        let settings = Settings { patience: PATIENCE, ..Settings::default() };
        let mut pair = Pair::open(side, (&sweep.authority, &sweep.mirror), NAME, settings).await?;
        pair.authority
            .batch("setting up the session", "SET datestyle = 'ISO, YMD'; SET intervalstyle = 'postgres'")
            .await?;
        let version = |side: Side| sweep.catalog.definitions.get(side).version;
        pair.versions = Sides { old: version(Side::Old), new: version(Side::New) };
        let identities = identity::read(&mut pair.authority, &sweep.catalog).await?;
        let slot = match standing(&reader, side).await? {
            Some(found) => found.slot,
            None => return Err(Error::Deadline(format!("{side}: the sweep's slot was dropped meanwhile"))),
        };
        let mut sweeper = Sweeper {
            pair,
            reader,
            catalog: sweep.catalog.clone(),
            identities,
            epoch: sweep.epoch,
            unnamed: sweep.unnamed,
            next_debt: sweep.first_debt,
            slot,
            held: HashSet::new(),
            advanced: None,
        };
        match begun {
            Begun::AfterLoss => sweeper.owe_everything().await?,
            Begun::Again => sweeper.held().await?,
            Begun::New => {}
        }
        Ok(Some(sweeper))
    }

    /// Tables whose taints it clears: all that is written to them is named by key.
    pub fn clears(&self) -> HashSet<u32> {
        let named = self.catalog.tables.values().filter(|table| self.identities.is_named(table));
        named.map(|table| table.number).collect()
    }

    /// Of which tables a change does not say its key though they have one, with the SQL that mends it.
    pub fn lacking(&self) -> impl Iterator<Item = &str> {
        self.identities.lacking()
    }

    /// Its connections are of no more use.
    pub fn is_broken(&self) -> bool {
        self.pair.is_broken() || self.reader.is_closed()
    }

    /// Bytes of the log that were not swept yet.
    pub async fn behind(&self) -> Result<u64, Error> {
        Ok(standing(&self.reader, self.pair.authority.side).await?.map_or(0, |standing| standing.behind))
    }

    /// Those whose statements began within sight of this slot, and whose release is still to be read.
    async fn held(&mut self) -> Result<(), Error> {
        let text =
            "SELECT id FROM crossfade.ledger WHERE holder_pid IS NOT NULL AND at > (SELECT begun FROM crossfade.sweep)";
        let rows = self.pair.authority.rows("reading taints", text, &[]).await?;
        self.held = rows.iter().map(|row| row.get(0)).collect();
        Ok(())
    }

    /// Nobody has seen what was written between two slots: it is found by comparing all tables.
    async fn owe_everything(&mut self) -> Result<(), Error> {
        let keyed = |table: &&Arc<crate::catalog::Table>| table.opaque.is_none();
        let all: BTreeSet<u32> = self.catalog.tables.values().filter(keyed).map(|table| table.number).collect();
        settle::owe(&mut self.pair, self.epoch, &mut self.next_debt, &[], &all).await?;
        slot::settle_loss(&self.reader, self.pair.authority.side).await
    }

    /// Reads some of what has changed, settles it, and moves the slot on. After an error it must be opened anew (unless [`is_busy`]); nothing is passed over.
    pub async fn turn(&mut self) -> Result<Turned, Error> {
        let side = self.pair.authority.side;
        let end = slot::log_end(&self.reader, side).await?;
        let mut turn = Turn::default();
        let mut spent = Vec::new();
        let Some((last, more)) = self.read(end, &mut turn, &mut spent).await? else { return Ok(Turned::Outdated) };
        turn.more = more;
        turn.passed = (!more).then_some(end);
        turn.cleared = self.spend(&spent).await?;
        let idle = self.advanced.is_none_or(|at| at.elapsed() > IDLE);
        let to = match more {
            true => last,
            // All that had committed by then was read.
            false => last.max(Some(end)).filter(|_| last.is_some() || idle),
        };
        if let Some(to) = to {
            let begun = Instant::now();
            slot::advance(&self.reader, side, &self.slot, to).await?;
            turn.reading += begun.elapsed();
            self.advanced = Some(Instant::now());
        }
        Ok(Turned::Done(turn))
    }

    /// The end of the last transaction that was read, and whether there may be more. None: outdated.
    async fn read(
        &mut self,
        end: PgLsn,
        turn: &mut Turn,
        spent: &mut Vec<Spent>,
    ) -> Result<Option<(Option<PgLsn>, bool)>, Error> {
        let side = self.pair.authority.side;
        let failed = |error: tokio_postgres::Error| Error::from_driver(side, "reading the slot", &error);
        let begun = Instant::now();
        let (slot, reader) = (self.slot.clone(), self.reader.prepare(PEEK).await.map_err(failed)?);
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 4] = [&slot, &end, &AT_ONCE, &LINE];
        let rows = self.reader.query_raw(&reader, parameters).await.map_err(failed)?;
        let mut rows = std::pin::pin!(rows);
        let catalog = self.catalog.clone();
        let identities = std::mem::take(&mut self.identities);
        let mut held = self.held.clone();
        let mut lines = Reader::new((&catalog, side), &identities, self.unnamed, &mut held);
        let (mut load, mut last, mut count) = (Load::default(), None, 0);
        let done = async {
            while let Some(row) = rows.try_next().await.map_err(failed)? {
                if count == 0 {
                    turn.reading = begun.elapsed();
                }
                count += 1;
                let xid = row.get::<_, i64>(1) as u32;
                let text = row.get::<_, Field<'_>>(2).0.unwrap_or_default();
                let said = decode::read(text, row.get(3)).map_err(|error| Error::Unfit(error.to_string()))?;
                if said == decode::Said::Commit {
                    last = Some(row.get::<_, PgLsn>(0));
                }
                lines.take(said, xid, &mut load);
                if (load.count > HELD_KEYS || load.bytes > HELD_BYTES)
                    && !settle_load(
                        &mut self.pair,
                        &catalog,
                        self.epoch,
                        &mut self.next_debt,
                        std::mem::take(&mut load),
                        turn,
                        spent,
                    )
                    .await?
                {
                    return Ok(None);
                }
            }
            if !settle_load(&mut self.pair, &catalog, self.epoch, &mut self.next_debt, load, turn, spent).await? {
                return Ok(None);
            }
            Ok(Some((last, count >= AT_ONCE)))
        };
        let done = done.await;
        self.identities = identities;
        if matches!(done, Ok(Some(_))) {
            self.held = held;
        }
        if turn.reading.is_zero() {
            turn.reading = begun.elapsed();
        }
        done
    }

    /// Tables whose every change by the tainting transactions was looked at are no longer tainted by them.
    async fn spend(&mut self, spent: &[Spent]) -> Result<u64, Error> {
        if spent.is_empty() {
            return Ok(0);
        }
        let ids: Vec<i64> = spent.iter().map(|spent| spent.id).collect();
        let text =
            "SELECT id, debts FROM crossfade.ledger WHERE id = ANY ($1) AND holder_pid IS NULL AND reason = ANY ($2)";
        let rows = self.pair.authority.rows("reading taints", text, &[&ids, &SPENT_BY_SWEEP]).await?;
        let mut cleared = 0;
        for row in rows {
            let (id, bytes): (i64, Vec<u8>) = (row.get(0), row.get(1));
            let Ok(debts) = decode_debts(bytes.clone()) else { continue };
            let but: BTreeSet<u32> =
                spent.iter().filter(|spent| spent.id == id).flat_map(|spent| spent.but.iter().copied()).collect();
            let stays = |debt: &&Debt| match debt {
                Debt::Taint { table } => {
                    but.contains(table)
                        || !self.catalog.tables.get(table).is_some_and(|table| self.identities.is_named(table))
                }
                _ => true,
            };
            let mut left = BytesMut::new();
            let kept = debts.iter().filter(stays).inspect(|debt| encode(debt, &mut left)).count();
            // A row without debts is cleared by repair, as all are; what stays is not left to a sweep any more.
            let text =
                "UPDATE crossfade.ledger SET debts = $2, reason = reason || ', swept' WHERE id = $1 AND debts = $3";
            let changed = self.pair.authority.execute("clearing taints", text, &[&id, &&left[..], &bytes]).await?;
            cleared += changed * (debts.len() - kept) as u64;
        }
        Ok(cleared)
    }
}

/// Compares what was read, and enters what differs. False: definitions are other ones than it was read by.
async fn settle_load(
    pair: &mut Pair,
    catalog: &Catalog,
    epoch: Epoch,
    next_debt: &mut i64,
    load: Load,
    turn: &mut Turn,
    spent: &mut Vec<Spent>,
) -> Result<bool, Error> {
    // Behind the reading: what was read is of before.
    if !is_current(pair, catalog, &load).await? {
        return Ok(false);
    }
    turn.changes += load.changes;
    spent.extend(load.spent);
    if load.keys.is_empty() && load.whole.is_empty() {
        return Ok(true);
    }
    settle::seen(pair, &load.xids).await?;
    let (mut keys, mut whole) = (Vec::new(), load.whole);
    for (number, texts) in &load.keys {
        let Some(table) = catalog.tables.get(number) else { continue };
        match settle::unequal(pair, table, texts).await {
            Ok(unequal) if unequal.is_empty() => {}
            Ok(unequal) => keys.push((*number, unequal)),
            // The texts are no keys of this table any more: its definition was another one.
            Err(error) if error.meaning() == Meaning::Refused || error.meaning() == Meaning::Definition => {
                tracing::warn!(table = %table.label(), %error, "changed keys cannot be looked at: the whole table is owed");
                whole.insert(*number);
            }
            Err(error) => return Err(error),
        }
    }
    settle::owe(pair, epoch, next_debt, &keys, &whole).await?;
    turn.owed += keys.iter().map(|(_, keys)| keys.len() as u64).sum::<u64>();
    turn.whole.extend(whole);
    Ok(true)
}

/// The tables are still those of the catalog.
async fn is_current(pair: &mut Pair, catalog: &Catalog, load: &Load) -> Result<bool, Error> {
    let mut known = true;
    let versions = pair.versions.clone();
    for link in [&mut pair.authority, &mut pair.mirror] {
        let version = *versions.get(link.side);
        known &= version.is_some();
        if version.is_some() && link.version().await? != version {
            return Ok(false);
        }
    }
    if known || load.unknown.is_empty() {
        return Ok(true);
    }
    // Nobody tells of new definitions at once. What matters is a new partition: new tables are owed when they are known.
    let names: Vec<String> = load
        .unknown
        .iter()
        .map(|(schema, name)| format!("{}.{}", crate::catalog::quote(schema), crate::catalog::quote(name)))
        .collect();
    let text = "SELECT EXISTS (SELECT FROM unnest($1::text[]) AS n JOIN pg_class c ON c.oid = to_regclass(n) \
        WHERE c.relispartition AND pg_partition_root(c.oid)::oid = ANY ($2))";
    let known: Vec<u32> = catalog.by_oid.get(pair.authority.side).keys().copied().collect();
    Ok(!pair.authority.rows("looking for new partitions", text, &[&names, &known]).await?[0].get::<_, bool>(0))
}

/// How long making a slot may wait for transactions that are under way.
const MAKING: Duration = Duration::from_secs(10);

/// While a sweep reads the authority's slot, the mirror's follows behind: when the mirror becomes the authority, what is written there from then on stands
/// behind it. A phase with a mirror, of this epoch. Err: also where the mirror is not fit for a slot.
pub async fn keep(authority: &Client, mirror: &Client, side: Side, epoch: u64) -> Result<(), Error> {
    match tokio::time::timeout(MAKING, slot::begin(mirror, side)).await {
        // Nothing of the mirror's log is asked for.
        Ok(Ok(Begun::AfterLoss)) => slot::settle_loss(mirror, side).await?,
        Ok(begun) => drop(begun?),
        Err(_) => return Err(Error::Stalled { side, doing: "making the sweep's slot", after: MAKING }),
    }
    let Some(found) = standing(mirror, side).await? else { return Ok(()) };
    let end = slot::log_end(mirror, side).await?;
    // The epoch is not over: when its log ended there, the mirror was the mirror.
    let lock = format!(
        "BEGIN; SET LOCAL lock_timeout = '1s'; LOCK TABLE crossfade.epoch_{epoch} IN ACCESS SHARE MODE; ROLLBACK"
    );
    if authority.batch_execute(&lock).await.is_err() {
        let undone = authority.batch_execute("ROLLBACK").await;
        return undone.map_err(|error| Error::from_driver(side.other(), "holding the epoch", &error));
    }
    slot::advance(mirror, side, &found.slot, end).await
}

/// Before the authority changes: what keeps it from being known that nothing around the proxy was missed, in words for people. A sweep that was never begun
/// keeps nothing.
pub async fn obstacle(authority: &Client, side: Side) -> Result<Option<String>, Error> {
    let Some(found) = standing(authority, side).await? else { return Ok(None) };
    let or_end = "or end it with `crossfade sweep --end`";
    if let Some(why) = found.lost {
        return Ok(Some(format!(
            "the sweep of {side} has lost its slot ({why}): let it begin again (sweep.follow, or `crossfade sweep`), {or_end}"
        )));
    }
    let text = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'crossfade sweep' AND datname = current_database())";
    let at_work = authority.query_one(text, &[]).await;
    let at_work: bool = at_work.map_err(|error| Error::from_driver(side, "looking for the sweep", &error))?.get(0);
    Ok((!at_work).then(|| {
        format!("a sweep of {side} was begun and nobody follows it ({} bytes are unread): set sweep.follow, run `crossfade sweep --follow`, {or_end}", found.behind)
    }))
}

/// Waits until the sweep has passed all that has committed by now. False: not by `deadline`. In no transaction: each look sees what holds then.
pub async fn passed(client: &Client, side: Side, deadline: Instant) -> Result<bool, Error> {
    if standing(client, side).await?.is_none() {
        return Ok(true);
    }
    let end = slot::flushed_end(client, side).await?;
    loop {
        match standing(client, side).await? {
            None => return Ok(true),
            Some(found) if found.lost.is_none() && found.swept.is_some_and(|swept| swept >= end) => return Ok(true),
            Some(_) if Instant::now() > deadline => return Ok(false),
            Some(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Somebody's lock stood in the way: the turn may be done again as it is.
pub fn is_busy(error: &Error) -> bool {
    error.meaning() == Meaning::Busy
}

/// The error says no more than that the phase has moved.
pub fn is_overtaken(error: &Error) -> bool {
    settle::is_overtaken(error)
}
