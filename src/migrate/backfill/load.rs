//! A chunk into the mirror: by COPY, or where rows are there already by way of a temporary table. Nothing that is there is overwritten.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;

use super::super::across::key_across;
use super::super::binary::{COPY_HEADER, COPY_TRAILER, values};
use super::super::error::{Error, Meaning};
use super::super::link::Pair;
use super::super::sql::TableSql;
use super::chunk::{Chunk, packed};
use crate::catalog::{Table, quote};
use crate::ledger::debts::Values;
use crate::plan::image::needs_lock;

/// What became of a chunk on the mirror.
pub(super) enum Loaded {
    /// These rows were there already (keys as the authority has them); all others are committed, with a flush, which took that long.
    But(Vec<Values>, Duration),
    /// Nothing was written: reconcile must do it. The mirror's words.
    Not(Error),
}

/// Whether the last chunk met rows that were there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Straight into the table.
    Straight,
    /// By a temporary table.
    Staged,
}

/// Writes the chunk in one transaction of the mirror, which is committed with a flush after everything before was answered. Err: the
/// connection is gone, and the outcome perhaps not known. None: somebody has the table locked as a whole, and nothing was written.
pub(super) async fn load(
    pair: &mut Pair,
    table: &Table,
    chunk: &Chunk,
    way: &mut Way,
) -> Result<Option<Loaded>, Error> {
    let there = TableSql::new(table, pair.mirror.side);
    if needs_lock(table, pair.mirror.side) {
        let why = "its key is deferrable: a duplicate would not be noticed".to_owned();
        return Ok(Some(Loaded::Not(Error::Unfit(why))));
    }
    if *way == Way::Straight {
        match straight(pair, &there, chunk).await {
            Ok(commit) => return Ok(commit.map(|commit| Loaded::But(Vec::new(), commit))),
            Err(error) => {
                undo(pair, &error).await?;
                match error.meaning() {
                    Meaning::Fatal => return Err(error),
                    Meaning::Conflict => *way = Way::Staged,
                    _ => return Ok(Some(Loaded::Not(error))),
                }
            }
        }
    }
    match staged(pair, &there, chunk).await {
        Ok(None) => Ok(None),
        Ok(Some((inserted, commit))) => {
            let but = if inserted.len() == chunk.rows { Vec::new() } else { chunk.keys_but(&inserted) };
            if but.is_empty() {
                *way = Way::Straight;
            }
            Ok(Some(Loaded::But(but, commit)))
        }
        Err(error) => {
            undo(pair, &error).await?;
            match error.meaning() {
                Meaning::Fatal => Err(error),
                _ => Ok(Some(Loaded::Not(error))),
            }
        }
    }
}

async fn undo(pair: &mut Pair, error: &Error) -> Result<(), Error> {
    if error.meaning() != Meaning::Fatal {
        pair.mirror.rollback().await?;
        pair.mirror.forget_statements();
    }
    Ok(())
}

/// Locks of clients are waited for as `Pair::wait` says, one by one; all of it ends after half of deadlock_timeout, so that nobody who waits for
/// our rows is ever the victim of a deadlock. False: somebody has the table locked, and nothing has begun.
async fn begin(pair: &mut Pair, there: &TableSql<'_>) -> Result<bool, Error> {
    let limit = limit(pair).as_millis().max(1);
    let begin = format!(
        "BEGIN; SET LOCAL synchronous_commit = on; SET LOCAL statement_timeout = {limit}; SET CONSTRAINTS ALL DEFERRED; {}",
        there.lock_table()
    );
    match pair.mirror.batch("beginning a chunk", &begin).await {
        Err(error) if error.meaning() == Meaning::Busy => pair.mirror.rollback().await.map(|()| false),
        begun => begun.map(|()| true),
    }
}

/// How long one statement of a chunk may take.
pub(super) fn limit(pair: &Pair) -> Duration {
    pair.wait * 2
}

/// How long it took.
async fn commit(pair: &Pair) -> Result<Duration, Error> {
    let begun = Instant::now();
    pair.mirror.commit("committing a chunk").await?;
    Ok(begun.elapsed())
}

/// Returns how long COMMIT took. None: somebody has the table locked.
async fn straight(pair: &mut Pair, there: &TableSql<'_>, chunk: &Chunk) -> Result<Option<Duration>, Error> {
    if !begin(pair, there).await? {
        return Ok(None);
    }
    copy(pair, &there.copy_in(), chunk).await?;
    commit(pair).await.map(Some)
}

/// What [`staged`] has done: the keys that were inserted (packed, as the authority has them), and how long COMMIT took.
type Staged = (HashSet<Bytes>, Duration);

/// None: somebody has the table locked.
async fn staged(pair: &mut Pair, there: &TableSql<'_>, chunk: &Chunk) -> Result<Option<Staged>, Error> {
    let stage = format!("pg_temp.crossfade_stage_{}", there.table.number);
    let make = format!(
        "CREATE TEMPORARY TABLE IF NOT EXISTS {} (LIKE {}) ON COMMIT DELETE ROWS",
        stage.trim_start_matches("pg_temp."),
        there.table.qualified(there.side)
    );
    pair.mirror.batch("making room for a chunk", &format!("SET client_min_messages = warning; {make}")).await?;
    if !begin(pair, there).await? {
        return Ok(None);
    }
    let name = |&at: &usize| quote(there.table.columns[at].name.get(there.side));
    let columns = there.writable.iter().map(name).collect::<Vec<_>>().join(", ");
    copy(pair, &format!("COPY {stage} ({columns}) FROM STDIN (FORMAT binary)"), chunk).await?;
    let identity = there.writable.iter().any(|&at| *there.table.columns[at].identity_always.get(there.side));
    let text = format!(
        "INSERT INTO {} AS t ({columns}) {}SELECT {columns} FROM {stage} ON CONFLICT DO NOTHING RETURNING {}",
        there.table.qualified(there.side),
        if identity { "OVERRIDING SYSTEM VALUE " } else { "" },
        there.read_key()
    );
    let rows = pair.mirror.rows("inserting a chunk", &text, &[]).await?;
    let took = commit(pair).await?;
    let key = |row| packed(&key_across(there.table, there.side, values(row, 0, there.key.len())));
    Ok(Some((rows.iter().map(key).collect(), took)))
}

/// COPY in pieces of this size.
const PIECE: usize = 256 << 10;

async fn copy(pair: &mut Pair, text: &str, chunk: &Chunk) -> Result<(), Error> {
    let doing = "copying a chunk";
    let mut sink = pair.mirror.copy_in(doing, text).await?;
    let mirror = &pair.mirror;
    let mut rest = chunk.copy.clone();
    mirror.answered(doing, sink.send(BytesMut::from(COPY_HEADER).freeze())).await?;
    while !rest.is_empty() {
        mirror.answered(doing, sink.send(rest.split_to(PIECE.min(rest.len())))).await?;
    }
    mirror.answered(doing, sink.send(Bytes::from_static(COPY_TRAILER))).await?;
    let taken = mirror.answered(doing, sink.as_mut().finish()).await?;
    Error::short(mirror.side, doing, (taken, chunk.rows as u64))
}
