//! Reconcile: make keys equal on both sides under lock. The only way that rows are ever repaired (D1).
//!
//! One transaction on each side for a chunk of keys. On the authority: lock what can be locked at once, then read in a later
//! snapshot. On the mirror: lock, compare, rewrite only what differs. The mirror commits after everything before was answered and a
//! round trip has shown that the authority's session, and so its row locks, still stand. docs/protocols.md tells what goes wrong
//! without each of these.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures_util::SinkExt;

use super::across::{key_across, row_across};
use super::binary::{COPY_HEADER, COPY_TRAILER, put_copy_row, values};
use super::conflict;
use super::error::{Error, Meaning};
use super::gone;
use super::link::{Link, Pair};
use super::rules::{Place, place};
use super::sql::{TableSql, references};
pub(crate) use super::walk::range;
pub use super::walk::table;
use crate::catalog::Table;
use crate::ledger::debts::Values;
use crate::plan::image::{KEY_LOCK, needs_lock, needs_replace};

/// What became of the keys of a debt. Those that are named nowhere here are equal on both sides, as far as the mirror has flushed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Rows written on the mirror.
    pub written: u64,
    /// Rows deleted on the mirror.
    pub removed: u64,
    /// Keys that someone else held locked all the time: try again later.
    pub locked: Vec<Values>,
    /// Keys that the mirror refuses, with its message.
    pub refused: Vec<(Values, String)>,
}

impl Outcome {
    pub(crate) fn add(&mut self, other: Outcome) {
        self.written += other.written;
        self.removed += other.removed;
        self.locked.extend(other.locked);
        self.refused.extend(other.refused);
    }
}

/// How missing rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// COPY for many rows that are all missing, else as `Upsert`.
    Copy,
    /// INSERT ... ON CONFLICT DO UPDATE.
    Upsert,
    /// All that differ are deleted, then all are inserted.
    Replace,
}

/// Makes these keys (as the authority's images carry them) equal on both sides. Commits on the mirror without a flush: the caller
/// flushes (`ledger::clear`) before it clears any debt.
pub async fn keys(pair: &mut Pair, table: &Table, keys: Vec<Values>) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let width = table.key.as_ref().map_or(0, |key| key.columns.len());
    let mut seen = HashSet::new();
    let (mut left, unfit): (Vec<Values>, Vec<Values>) =
        keys.into_iter().filter(|key| seen.insert(key.clone())).partition(|key| key.len() == width && width > 0);
    let why = format!(
        "table {} has another key than when the debt was entered: enter the whole table (repair --table)",
        table.label()
    );
    outcome.refused.extend(unfit.into_iter().map(|key| (key, why.clone())));
    for round in 0..pair.settings.rounds.max(1) {
        if round > 0 {
            tokio::time::sleep(Duration::from_millis(10 << round.min(5))).await;
        }
        let mut again = Vec::new();
        for chunk in left.chunks(pair.settings.chunk_rows.max(1)) {
            let mut done = chunk_of_keys(pair, table, chunk.to_vec()).await?;
            again.append(&mut done.locked);
            outcome.add(done);
        }
        left = again;
        if left.is_empty() {
            break;
        }
    }
    outcome.locked = left;
    Ok(outcome)
}

/// One chunk, cut smaller where locks or refused rows stand in the way. Tried once: what was locked is returned.
pub(crate) async fn chunk_of_keys(pair: &mut Pair, table: &Table, keys: Vec<Values>) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let mut absent = Vec::new();
    let mut stack = vec![(keys, Mode::Copy)];
    while let Some((keys, mode)) = stack.pop() {
        if keys.is_empty() {
            continue;
        }
        let trouble = match settle(pair, table, &keys, mode).await {
            Ok(settled) => {
                outcome.written += settled.written;
                outcome.locked.extend(settled.locked);
                absent.extend(settled.absent);
                continue;
            }
            Err(trouble) => trouble,
        };
        pair.abandon().await;
        match (trouble.why, mode) {
            (Why::TooBig, _) => halves(&mut stack, keys, |keys| (keys, mode)),
            // Fewer of them would wait for the same lock.
            (Why::Shut(_), _) => outcome.locked.extend(keys),
            (Why::Error(error), _) if error.meaning() == Meaning::Fatal => return Err(error),
            (Why::Error(error), Mode::Copy) if error.meaning() == Meaning::Conflict => stack.push((keys, Mode::Upsert)),
            (Why::Error(error), _) if error.meaning() == Meaning::Conflict => {
                if trouble.absent.is_empty() {
                    let joined = conflict::replace(pair, table, keys, trouble.writing, error).await?;
                    absent.extend(joined.absent);
                    outcome.add(joined.outcome);
                    stack.extend(joined.again.into_iter().map(|keys| (keys, Mode::Upsert)));
                } else {
                    // A row that is to go may hold the value.
                    let left = without(&keys, &trouble.absent);
                    outcome.add(gone::remove(pair, table, trouble.absent).await?);
                    stack.push((left, Mode::Upsert));
                }
            }
            (Why::Error(error), _) if keys.len() == 1 || error.meaning() == Meaning::Definition => {
                match error.meaning() {
                    Meaning::Busy => outcome.locked.extend(keys),
                    _ => outcome.refused.extend(keys.into_iter().map(|key| (key, error.to_string()))),
                }
            }
            (Why::Error(_), _) => halves(&mut stack, keys, |keys| (keys, mode)),
        }
    }
    outcome.add(gone::remove(pair, table, absent).await?);
    Ok(outcome)
}

/// Puts both halves of these keys on a stack, the first on top.
pub(crate) fn halves<T>(stack: &mut Vec<T>, mut keys: Vec<Values>, entry: impl Fn(Vec<Values>) -> T) {
    let tail = keys.split_off(keys.len().div_ceil(2));
    stack.push(entry(tail));
    stack.push(entry(keys));
}

pub(crate) fn without(keys: &[Values], these: &[Values]) -> Vec<Values> {
    let these: HashSet<&Values> = these.iter().collect();
    keys.iter().filter(|key| !these.contains(key)).cloned().collect()
}

/// What one pair of transactions did.
#[derive(Default)]
pub(crate) struct Settled {
    /// Rows written.
    pub written: u64,
    /// Keys that the authority lacks: nothing was done about them.
    pub absent: Vec<Values>,
    /// Keys that could not be locked at once.
    pub locked: Vec<Values>,
}

/// What stopped it. Nothing was committed; the transactions may still be open.
pub(crate) struct Trouble {
    pub why: Why,
    /// Keys that the authority lacks.
    pub absent: Vec<Values>,
    /// A key could not be locked at once.
    pub locked: bool,
    /// Rows that were to be written (the mirror's writable columns, as the mirror takes them).
    pub writing: Vec<Values>,
}

pub(crate) enum Why {
    /// The rows are more than may be held at once.
    TooBig,
    /// Somebody has the mirror's table locked as a whole.
    Shut(Error),
    /// A server's error.
    Error(Error),
}

impl From<Error> for Why {
    fn from(error: Error) -> Why {
        Why::Error(error)
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Trouble {
        Trouble { why: error.into(), absent: Vec::new(), locked: false, writing: Vec::new() }
    }
}

/// A row that the authority holds under our lock.
struct Held {
    /// Its key, as the mirror takes it.
    key: Values,
    /// The mirror's writable columns, as the mirror takes them.
    row: Values,
}

/// One pair of transactions over these keys.
pub(crate) async fn settle(pair: &mut Pair, table: &Table, keys: &[Values], mode: Mode) -> Result<Settled, Trouble> {
    let begun = Instant::now();
    pair.authority.batch("beginning", "BEGIN").await?;
    let (held, settled) = hold(pair, table, keys).await?;
    if held.is_empty() {
        pair.authority.rollback().await?;
        return Ok(settled);
    }
    let mut writing = Vec::new();
    match equalise(pair, table, held, mode, begun, &mut writing).await {
        Ok(written) => Ok(Settled { written, ..settled }),
        Err(why) => Err(Trouble { why, absent: settled.absent, locked: !settled.locked.is_empty(), writing }),
    }
}

/// Locks on the authority what can be locked, and reads it in a later snapshot.
async fn hold(pair: &mut Pair, table: &Table, keys: &[Values]) -> Result<(Vec<Held>, Settled), Trouble> {
    let here = TableSql::new(table, pair.authority.side);
    let columns = TableSql::new(table, pair.mirror.side).writable;
    let asked: Vec<&Values> = keys.iter().collect();
    let mut ours = HashSet::new();
    let mut bytes = 0;
    for (at, row) in ask(&mut pair.authority, "locking rows", &here, &here.lock(), &asked).await? {
        bytes += row.get::<_, i64>(1);
        ours.insert(at);
    }
    if bytes > pair.settings.chunk_bytes as i64 && keys.len() > 1 {
        return Err(Trouble { why: Why::TooBig, absent: Vec::new(), locked: false, writing: Vec::new() });
    }
    let mut found: HashMap<usize, Values> = HashMap::new();
    for (at, row) in ask(&mut pair.authority, "reading locked rows", &here, &here.look(&columns), &asked).await? {
        found.insert(at, values(&row, 1, columns.len()));
    }
    let mut held = Vec::new();
    let mut settled = Settled::default();
    for (at, key) in keys.iter().enumerate() {
        let row = found.remove(&at);
        let place = place(ours.contains(&at), row.is_some());
        match (row, place) {
            (Some(row), Place::Held) => held.push(Held {
                key: key_across(table, here.side, key.clone()),
                row: row_across(table, here.side, &columns, row),
            }),
            (_, Place::Absent) => settled.absent.push(key.clone()),
            (_, Place::Again | Place::Held) => settled.locked.push(key.clone()),
        }
    }
    Ok((held, settled))
}

/// Makes the mirror's rows equal to those held, and commits. Returns how many were written.
async fn equalise(
    pair: &mut Pair,
    table: &Table,
    held: Vec<Held>,
    mode: Mode,
    begun: Instant,
    writing: &mut Vec<Values>,
) -> Result<u64, Why> {
    let there = TableSql::new(table, pair.mirror.side);
    let one = held.len() == 1;
    begin_on_mirror(pair, table, one).await.map_err(|error| match error.meaning() {
        Meaning::Busy => Why::Shut(error),
        _ => Why::Error(error),
    })?;
    if needs_lock(table, pair.mirror.side) {
        let number = table.number.cast_signed();
        pair.mirror.rows("keeping other writers away", KEY_LOCK, &[&number]).await?;
    }
    let asked: Vec<&Values> = held.iter().map(|held| &held.key).collect();
    let mut present: HashMap<usize, Values> = HashMap::new();
    let text = there.lock_and_look(&there.writable);
    for (at, row) in ask(&mut pair.mirror, "comparing rows", &there, &text, &asked).await? {
        present.insert(at, values(&row, 1, there.writable.len()));
    }
    let (mut missing, mut differing) = (Vec::new(), Vec::new());
    for (at, held) in held.into_iter().enumerate() {
        match present.remove(&at) {
            Some(row) if row == held.row => {}
            Some(_) => differing.push(held),
            None => missing.push(held),
        }
    }
    let written = (missing.len() + differing.len()) as u64;
    if written > 0 {
        // Kept for the case of a conflict only; shared bytes, not copied ones.
        writing.extend(missing.iter().chain(&differing).map(|held| held.row.clone()));
        write(pair, &there, missing, differing, mode, (!one).then_some(begun)).await?;
    }
    // While this answers, the row locks on the authority stand.
    pair.authority.batch("holding rows", "SELECT 1").await?;
    if written > 0 {
        pair.prove().await?;
    }
    pair.mirror.end("committing", written > 0).await?;
    pair.authority.rollback().await?;
    Ok(written)
}

/// The table is locked as each write of a row locks it: where somebody else has all of it, that is seen now. A later statement about several rows is cut off
/// after `wait`: each of its rows may wait for another lock.
pub(crate) async fn begin_on_mirror(pair: &mut Pair, table: &Table, one: bool) -> Result<(), Error> {
    let limit = if one { 0 } else { pair.wait.as_millis().max(1) };
    let lock = TableSql::new(table, pair.mirror.side).lock_table();
    let begin = format!("BEGIN; SET LOCAL statement_timeout = {limit}; SET CONSTRAINTS ALL DEFERRED; {lock}");
    pair.mirror.batch("beginning", &begin).await
}

/// Fewer rows than this are not worth a COPY.
const COPY_FROM: usize = 16;

async fn write(
    pair: &mut Pair,
    there: &TableSql<'_>,
    missing: Vec<Held>,
    differing: Vec<Held>,
    mode: Mode,
    begun: Option<Instant>,
) -> Result<(), Error> {
    let replace = mode == Mode::Replace || needs_replace(there.table, there.side);
    let mut rows: Vec<&Held> = differing.iter().collect();
    if mode == Mode::Copy && there.copies() && missing.len() >= COPY_FROM {
        copy_in(&mut pair.mirror, there, missing.iter().map(|held| &held.row)).await?;
    } else {
        rows.extend(&missing);
    }
    if replace && !rows.is_empty() {
        let asked: Vec<&Values> = rows.iter().map(|held| &held.key).collect();
        delete(&mut pair.mirror, there, &asked).await?;
    }
    let mut rest = rows.as_slice();
    while !rest.is_empty() {
        in_time(pair, begun)?;
        let (some, more) = rest.split_at(there.rows_per_insert(rest.len()));
        let parameters: Vec<_> = some.iter().flat_map(|held| there.row_parameters(&held.row)).collect();
        let text = there.insert(some.len(), !replace);
        let taken = pair.mirror.execute("writing rows", &text, &references(&parameters)).await?;
        Error::short(there.side, "writing rows", (taken, some.len() as u64))?;
        rest = more;
    }
    Ok(())
}

/// Half of deadlock_timeout is over: a wait that began now could make an application's session the victim of a deadlock.
fn in_time(pair: &Pair, begun: Option<Instant>) -> Result<(), Error> {
    match begun {
        Some(begun) if begun.elapsed() > pair.wait * 2 => Err(Error::Server {
            side: pair.mirror.side,
            doing: "writing rows",
            code: tokio_postgres::error::SqlState::LOCK_NOT_AVAILABLE,
            message: "so many rows take too long under locks".to_owned(),
            constraint: None,
        }),
        _ => Ok(()),
    }
}

/// Deletes by key; how many were there.
pub(crate) async fn delete(mirror: &mut Link, there: &TableSql<'_>, keys: &[&Values]) -> Result<u64, Error> {
    let mut count = 0;
    for keys in pieces(there, keys) {
        let parameters = there.asked_parameters(keys);
        count += mirror.execute("deleting rows", &there.delete(), &references(&parameters)).await?;
    }
    Ok(count)
}

fn pieces<'k>(sql: &TableSql<'_>, keys: &'k [&'k Values]) -> std::slice::Chunks<'k, &'k Values> {
    keys.chunks(if sql.many { keys.len().max(1) } else { 1 })
}

/// Asks about keys; answers come with the position of their key.
pub(crate) async fn ask(
    link: &mut Link,
    doing: &'static str,
    sql: &TableSql<'_>,
    text: &str,
    keys: &[&Values],
) -> Result<Vec<(usize, tokio_postgres::Row)>, Error> {
    let mut answers = Vec::with_capacity(keys.len());
    let mut before = 0;
    for keys in pieces(sql, keys) {
        let parameters = sql.asked_parameters(keys);
        for row in link.rows(doing, text, &references(&parameters)).await? {
            answers.push((before + row.get::<_, i64>(0) as usize - 1, row));
        }
        before += keys.len();
    }
    Ok(answers)
}

/// COPY in pieces of this size.
const PIECE: usize = 256 << 10;

pub(crate) async fn copy_in<'r>(
    mirror: &mut Link,
    there: &TableSql<'_>,
    rows: impl Iterator<Item = &'r Values>,
) -> Result<(), Error> {
    let doing = "copying rows";
    let mut sink = mirror.copy_in(doing, &there.copy_in()).await?;
    let mut piece = BytesMut::from(COPY_HEADER);
    let mut sent = 0;
    for row in rows {
        sent += 1;
        put_copy_row(row.iter(), &mut piece);
        if piece.len() >= PIECE {
            mirror.answered(doing, sink.send(piece.split().freeze())).await?;
        }
    }
    piece.extend_from_slice(COPY_TRAILER);
    mirror.answered(doing, sink.send(piece.freeze())).await?;
    let taken = mirror.answered(doing, sink.as_mut().finish()).await?;
    Error::short(there.side, doing, (taken, sent))
}
