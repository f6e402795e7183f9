//! One job of a backfill: three sessions that work on one part of a table at a time.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use super::super::cut;
use super::super::error::{Error, Meaning};
use super::super::gone;
use super::super::link::{Link, Pair};
use super::super::locks::{self, Hold, Kind};
use super::super::pace::{Pace, Strain};
use super::super::payable::{self, Entry, State};
use super::super::reconcile::{self, Outcome};
use super::super::repair::clear;
use super::super::sql::Bounds;
use super::super::walk;
use super::chunk::{Chunk, Reading};
use super::load::{self, Loaded, Way};
use super::position::{self, Done, KeyDebts, Next, Part};
use super::standbys::Standbys;
use crate::catalog::{Sides, Table};
use crate::ledger::clear::flush;
use crate::ledger::debts::{Debt, Values};

/// What jobs of one backfill share.
pub(super) struct Common<'a> {
    /// The number of the next ledger row.
    pub ids: AtomicI64,
    /// How fast it may go.
    pub pace: Pace,
    /// Whether it may go.
    pub standbys: &'a Standbys,
    /// Told of rows that are done.
    pub tell: &'a (dyn Fn(u32, i32, usize) + Send + Sync),
    /// Told of a table of the mirror that somebody has locked.
    pub shut: &'a (dyn Fn(u32) + Send + Sync),
}

impl Common<'_> {
    fn id(&self) -> i64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }
}

/// Sessions of one job.
pub(super) struct Lane<'a> {
    pub pair: Pair,
    reader: Link,
    /// The mirror's session: pid and start (microseconds since 1970).
    backend: (i32, i64),
    /// The mirror's, when the lane was opened.
    incarnation: String,
    common: &'a Common<'a>,
    /// Rows of the next chunk.
    rows: usize,
    way: Way,
    /// Of both servers.
    strain: Sides<Strain>,
}

/// What became of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is done, by this job or by another.
    Done,
    /// Another job has it, or the table; or a session of one that died is not gone yet.
    Elsewhere,
    /// The whole-table debt is gone: another has paid it, or the phase has moved.
    Void,
}

/// What a table has become ready for.
pub(super) enum Ready {
    /// These parts are to be done.
    Parts(Vec<Part>),
    /// Another job has the table.
    Elsewhere,
    /// It owes nothing as a whole.
    Nothing,
}

/// Rows of the first chunk.
const FIRST: usize = 500;
/// Rows of a chunk at most, and bytes, roughly.
const ROWS_MOST: usize = 40_000;
const BYTES_MOST: usize = 4 << 20;
/// A chunk's transaction on the mirror is to be over in this time: carriers may wait for its rows.
const CHUNK: Duration = Duration::from_millis(150);
/// Before a table is tried again that somebody has locked.
const SHUT: Duration = Duration::from_millis(200);
/// Keys that the mirror refuses, in one chunk, before the table is given up.
const REFUSED_MOST: usize = 1000;

impl<'a> Lane<'a> {
    /// Over connections of its own; `reader` is to the authority, too.
    pub async fn new(mut pair: Pair, mut reader: Link, common: &'a Common<'a>) -> Result<Lane<'a>, Error> {
        reader.set_up(false).await?;
        let text = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint FROM pg_stat_activity WHERE pid = pg_backend_pid()";
        let row = &pair.mirror.rows("asking who we are", text, &[]).await?[0];
        let backend = (row.get(0), row.get(1));
        let incarnation = pair.incarnation().await?;
        let (way, strain) = (Way::Straight, Sides::default());
        Ok(Lane { pair, reader, backend, incarnation, common, rows: FIRST, way, strain })
    }

    /// Finds what is to be done about a table: the parts of a backfill that was begun for the same debts, else of a new one. `enter`: a table that owes
    /// nothing as a whole is made to.
    pub async fn ready(&mut self, table: &Table, enter: bool) -> Result<Ready, Error> {
        let mut debts = self.whole_debts(table).await?;
        if debts.is_empty() && enter {
            debts = self.enter_debt(table).await?;
        }
        if debts.is_empty() {
            return Ok(Ready::Nothing);
        }
        if let Some(parts) = self.begun(table.number).await? {
            return Ok(Ready::Parts(parts));
        }
        // Alone: a job that has begun for an earlier debt may have rows under way.
        if !locks::wait_for_table(&mut self.pair, table.number, Hold::Alone).await? {
            return Ok(Ready::Elsewhere);
        }
        let parts = match self.begun(table.number).await? {
            Some(parts) => parts,
            None => self.begin(table, &debts).await?,
        };
        locks::release_table(&mut self.pair, table.number, Hold::Alone).await?;
        Ok(Ready::Parts(parts))
    }

    async fn begun(&mut self, number: u32) -> Result<Option<Vec<Part>>, Error> {
        let parts = position::read(&mut self.pair.authority, number, None).await?;
        let Some(first) = parts.first() else { return Ok(None) };
        // One is enough: another may have been paid alone, by whoever entered it.
        Ok(position::owed(&mut self.pair.authority, &first.debts).await?.then_some(parts))
    }

    /// Ledger rows that owe this table as a whole, and nothing else.
    async fn whole_debts(&mut self, table: &Table) -> Result<Vec<i64>, Error> {
        let whole = |debt: &Debt| match debt {
            Debt::Table { table: number } | Debt::Taint { table: number } => *number == table.number,
            _ => false,
        };
        let (mut after, mut found) = (0, Vec::new());
        loop {
            let (authority, mirror) = (self.pair.authority.at(), self.pair.mirror.at());
            let entries = payable::read(authority, mirror, after, payable::ROWS, &self.incarnation).await?;
            let Some(last) = entries.last() else { return Ok(found) };
            after = last.id;
            let ours = |entry: &&Entry| {
                entry.state == State::Payable && !entry.debts.is_empty() && entry.debts.iter().all(whole)
            };
            found.extend(entries.iter().filter(ours).map(|entry| entry.id));
        }
    }

    /// A table that joins later, or is to be looked at again. Transactions that wrote it unmirrored are waited for: they began before it was known.
    async fn enter_debt(&mut self, table: &Table) -> Result<Vec<i64>, Error> {
        let id = self.common.id();
        let mut debt = bytes::BytesMut::new();
        crate::ledger::debts::encode(&Debt::Table { table: table.number }, &mut debt);
        let text = "INSERT INTO crossfade.ledger (id, debts, reason) VALUES ($1, $2, 'backfill')";
        self.pair.authority.batch("entering a debt", "SET synchronous_commit = on").await?;
        self.pair.authority.execute("entering a debt", text, &[&id, &&debt[..]]).await?;
        self.pair.authority.batch("entering a debt", "SET synchronous_commit = off").await?;
        let settle = self.pair.settings.settle;
        if let Err(holders) = gone::wait_for_writers(&mut self.pair.authority, table, settle).await? {
            return Err(Error::Deadline(format!(
                "{}: transactions {} stay open on table {}; end them, then run the backfill again",
                self.pair.authority.side,
                holders.join(", "),
                table.label()
            )));
        }
        Ok(vec![id])
    }

    async fn begin(&mut self, table: &Table, debts: &[i64]) -> Result<Vec<Part>, Error> {
        // Now, when there are few: later all that is copied would have to be looked at.
        let outcome = walk::leftovers(&mut self.pair, table).await?;
        self.flushed().await?;
        let parts = cut::parts(&mut self.pair.authority, table, PARTS_MOST).await?;
        let keys = self.left(table, outcome)?;
        position::begin(&mut self.pair.authority, table.number, debts, &parts, keys).await?;
        position::read(&mut self.pair.authority, table.number, None).await
    }

    /// Works on a part until it is done.
    pub async fn part(&mut self, table: &Table, part: i32) -> Result<Taken, Error> {
        if !locks::wait_for_table(&mut self.pair, table.number, Hold::Shared).await? {
            return Ok(Taken::Elsewhere);
        }
        let lock = table.number * PARTS_MOST as u32 + part as u32;
        let taken = if locks::take(&mut self.pair, Kind::Part, &[lock]).await? {
            let taken = self.part_locked(table, part).await?;
            locks::release(&mut self.pair, Kind::Part, &[lock]).await?;
            taken
        } else {
            Taken::Elsewhere
        };
        locks::release_table(&mut self.pair, table.number, Hold::Shared).await?;
        Ok(taken)
    }

    async fn part_locked(&mut self, table: &Table, part: i32) -> Result<Taken, Error> {
        // As its last holder has left it: that one's session is gone, or has released the lock.
        let Some(mut part) = position::read(&mut self.pair.authority, table.number, Some(part)).await?.pop() else {
            return Ok(Taken::Void);
        };
        if part.done {
            return Ok(Taken::Done);
        }
        let mut done = self.recover(table, &mut part).await?;
        let reading = Reading::new(table, self.pair.authority.side);
        let mut left = part.left();
        let rows = self.rows_now();
        let mut chunk = reading.next(&mut self.reader, &left, rows, BYTES_MOST).await?;
        while let Some(now) = chunk {
            let begun = Instant::now();
            let next = Next { debt: self.common.id(), bounds: &now.bounds, backend: self.backend };
            if !position::step(&mut self.pair, &part, done.as_ref(), Some(&next)).await? {
                return Ok(Taken::Void);
            }
            let commit = begun.elapsed();
            left.after = now.last();
            let rows = self.rows_now();
            // The next chunk is read while this one is brought.
            let ahead = reading.next(&mut self.reader, &left, rows, BYTES_MOST);
            let bring = bring(&mut self.pair, &mut self.way, &reading, table, &now, self.common.shut);
            let (brought, ahead) = tokio::join!(bring, ahead);
            let brought = brought?;
            if brought.reconciled {
                self.flushed().await?;
            }
            self.size(&now, brought.took);
            let keys = self.left(table, brought.outcome)?;
            done = Some(Done { debt: next.debt, last: now.last(), rows: now.rows, keys });
            (self.common.tell)(table.number, part.part, now.rows);
            let mut pause = self.common.pace.after(now.rows, Instant::now());
            let commits = [(self.pair.authority.side, Some(commit)), (self.pair.mirror.side, brought.commit)];
            for (side, commit) in commits {
                let strain = self.strain.get_mut(side);
                pause = pause.max(commit.map_or(Duration::ZERO, |commit| strain.after(commit, begun.elapsed())));
            }
            tokio::time::sleep(pause).await;
            chunk = match self.common.standbys.rest().await {
                false => ahead?,
                // What was read before a rest may have changed since: read again, less of it is suspect.
                true => reading.next(&mut self.reader, &left, rows, BYTES_MOST).await?,
            };
        }
        position::step(&mut self.pair, &part, done.as_ref(), None).await?;
        Ok(Taken::Done)
    }

    /// A chunk that was found in work (D6): its holder's backend is gone. What both sides hold in its range is made equal; then the part goes on behind it.
    async fn recover(&mut self, table: &Table, part: &mut Part) -> Result<Option<Done>, Error> {
        let Some((debt, last)) = part.work.take() else { return Ok(None) };
        let bounds = Bounds { upto: Some(last.clone()), ..part.left() };
        part.position = Some(last.clone());
        // Cleared already: a repairer has paid it.
        let mut outcome = Outcome::default();
        if position::owed(&mut self.pair.authority, &[debt]).await? {
            outcome = reconcile::range(&mut self.pair, table, &bounds).await?;
            self.flushed().await?;
        }
        tracing::info!(
            table = table.label(),
            part = part.part,
            written = outcome.written,
            removed = outcome.removed,
            "a chunk was found in work and reconciled"
        );
        let keys = self.left(table, outcome)?;
        Ok(Some(Done { debt, last: Some(last), rows: 0, keys }))
    }

    /// What reconcile could not settle becomes key debts.
    fn left(&self, table: &Table, outcome: Outcome) -> Result<Option<KeyDebts>, Error> {
        if outcome.refused.len() > REFUSED_MOST {
            let message = &outcome.refused[0].1;
            return Err(Error::Unfit(format!(
                "table {}: {} does not take its rows: {message}; what was under way is still owed",
                table.label(),
                self.pair.mirror.side
            )));
        }
        let error = outcome.refused.first().map(|(_, message)| message.clone());
        let keys: Vec<Values> =
            outcome.locked.into_iter().chain(outcome.refused.into_iter().map(|(key, _)| key)).collect();
        Ok((!keys.is_empty()).then(|| KeyDebts { id: self.common.id(), number: table.number, keys, error }))
    }

    /// Reconcile commits without a flush: before its range debt is cleared the mirror must have one, in the same incarnation.
    async fn flushed(&mut self) -> Result<(), Error> {
        let side = self.pair.mirror.side;
        match flush(&self.pair.mirror.client).await {
            Ok(now) if now == self.incarnation => Ok(()),
            Ok(_) => Err(Error::Reincarnated { side }),
            Err(error) => Err(Error::Broken { side, doing: "flushing", message: error.to_string() }),
        }
    }

    fn rows_now(&self) -> usize {
        self.rows.min(self.common.pace.rows_max())
    }

    fn size(&mut self, chunk: &Chunk, took: Duration) {
        let by_bytes = BYTES_MOST / (chunk.copy.len() / chunk.rows).max(1);
        let by_time = (chunk.rows as f64 * CHUNK.as_secs_f64() / took.as_secs_f64().max(1e-6)) as usize;
        self.rows = by_bytes.min(by_time).min(self.rows * 4).clamp(16, ROWS_MOST);
    }

    /// All parts of the table are done: clears the whole-table debts, and has the mirror's planner look at the table. False: not all are.
    pub async fn finish(&mut self, table: &Table) -> Result<bool, Error> {
        let parts = position::read(&mut self.pair.authority, table.number, None).await?;
        let Some(first) = parts.first().filter(|_| parts.iter().all(|part| part.done)) else { return Ok(false) };
        let debt = |id: &i64| Entry {
            id: *id,
            state: State::Payable,
            age_us: 0,
            late: None,
            debts: vec![Debt::Table { table: table.number }],
            unreadable: None,
            reason: None,
        };
        let debts: Vec<Entry> = first.debts.iter().map(debt).collect();
        clear(&mut self.pair, &debts, &self.incarnation).await?;
        let analyze = format!("ANALYZE {}", table.qualified(self.pair.mirror.side));
        match tokio::time::timeout(ANALYZE, self.pair.mirror.client.batch_execute(&analyze)).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) => Err(Error::from_driver(self.pair.mirror.side, "analysing a table", &error)),
            Err(_) => Err(Error::Stalled { side: self.pair.mirror.side, doing: "analysing a table", after: ANALYZE }),
        }
    }
}

/// Parts of a table at most.
const PARTS_MOST: i64 = 64;
/// How long ANALYZE may take.
const ANALYZE: Duration = Duration::from_secs(600);

/// What became of a chunk that was brought.
struct Brought {
    /// Of the keys that had to be reconciled.
    outcome: Outcome,
    /// Some had to be: the mirror's last commit had no flush.
    reconciled: bool,
    /// How long the mirror's transaction took.
    took: Duration,
    /// ... and its COMMIT, with a flush, where there was one.
    commit: Option<Duration>,
}

/// Copies a chunk, looks again, reconciles the suspects.
async fn bring(
    pair: &mut Pair,
    way: &mut Way,
    reading: &Reading<'_>,
    table: &Table,
    chunk: &Chunk,
    shut: &(dyn Fn(u32) + Send + Sync),
) -> Result<Brought, Error> {
    let (mut loaded, mut took) = (None, CHUNK);
    while loaded.is_none() && !chunk.copy.is_empty() {
        let begun = Instant::now();
        loaded = load::load(pair, table, chunk, way).await?;
        took = begun.elapsed();
        if loaded.is_none() {
            // Its keys are no debts of their own: chunk by chunk, the ledger would hold all of the table.
            shut(table.number);
            tokio::time::sleep(SHUT).await;
        }
    }
    let (suspects, took, commit) = match loaded {
        Some(Loaded::But(mut there, commit)) => {
            there.extend(reading.moved(&mut pair.authority, chunk).await?);
            (there, took, Some(commit))
        }
        Some(Loaded::Not(error)) => {
            tracing::debug!(table = table.label(), %error, "a chunk is reconciled instead of copied");
            // Smaller ones, if it was about time or locks.
            let took = if error.meaning() == Meaning::Busy { took.max(load::limit(pair)) } else { CHUNK };
            (chunk.keys(), took, None)
        }
        None => (chunk.keys(), CHUNK, None),
    };
    if suspects.is_empty() {
        return Ok(Brought { outcome: Outcome::default(), reconciled: false, took, commit });
    }
    let outcome = reconcile::keys(pair, table, suspects).await?;
    Ok(Brought { outcome, reconciled: true, took, commit })
}
