//! Keys that the authority lacks (D2): delete on the mirror, then look again at the authority.
//!
//! An absent row has no lock that could be held, so the order of steps must do what locks do elsewhere. A delete that found no row
//! may have missed an insert that is not committed yet (it is invisible, and DELETE does not wait for it): such a transaction
//! holds RowExclusiveLock on the table. Those are waited for, holding nothing, and the delete is done again.
//!
//! Many keys go in one transaction, which never waits for anybody while it holds a row: it locks what it can have at once, and deletes just that.
//! Keys on whose rows others have a hand go one by one. docs/protocols.md says what a batch must not do.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::across::key_across;
use super::error::{Error, Meaning};
use super::link::{Link, Pair};
use super::reconcile::{Outcome, ask, begin_on_mirror, delete, halves};
use super::rules::{Place, Removal, place, removal, removals};
use super::sql::TableSql;
use crate::catalog::Table;
use crate::ledger::debts::Values;
use crate::phase::Side;

/// What one try did.
enum Tried {
    /// The row was there and is gone.
    Removed,
    /// There was none, and the authority has none.
    Nothing,
    /// The authority has the row after all, or a lock stood in the way.
    Again,
    /// The mirror does not let it go.
    Refused(String),
}

/// Deletes on the mirror what the authority lacks.
///
/// D3: while new lacks rows of a lazy table, its lacking one proves nothing. What was deleted there stands in `crossfade.gone_n`, by the deleting
/// transaction itself; all else stays as it is on old, and is equal in that sense.
pub(crate) async fn remove(pair: &mut Pair, table: &Table, mut keys: Vec<Values>) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    if table.lazy && pair.authority.side == Side::New && !keys.is_empty() {
        keys = spoken_for(pair, table, keys).await?;
    }
    let unseen = try_all(pair, table, keys, &mut outcome).await?;
    if unseen.is_empty() {
        return Ok(outcome);
    }
    // One wait for all of them: it begins after the last of these deletes.
    if let Err(holders) = wait_for_writers(&mut pair.mirror, table, pair.settings.settle).await? {
        tracing::warn!(side = %pair.mirror.side, table = table.label(), ?holders, "transactions stay open on the mirror; keys are tried again later");
        outcome.locked.extend(unseen);
        return Ok(outcome);
    }
    // Those that are not there even now are equal.
    try_all(pair, table, unseen, &mut outcome).await?;
    Ok(outcome)
}

/// Those of which new, as the authority, says that they are gone.
pub(crate) async fn spoken_for(pair: &mut Pair, table: &Table, keys: Vec<Values>) -> Result<Vec<Values>, Error> {
    let here = TableSql::new(table, pair.authority.side);
    let asked: Vec<&Values> = keys.iter().collect();
    let noted = found(&mut pair.authority, "looking for keys that are gone", &here, &here.noted_gone(), &asked).await?;
    Ok(keys.into_iter().enumerate().filter(|(at, _)| noted.contains(at)).map(|(_, key)| key).collect())
}

/// Tries each key once. Returns those of which there was no row, on either side.
async fn try_all(
    pair: &mut Pair,
    table: &Table,
    keys: Vec<Values>,
    outcome: &mut Outcome,
) -> Result<Vec<Values>, Error> {
    let mut unseen = Vec::new();
    let mut stack: Vec<Vec<Values>> = keys.chunks(pair.settings.chunk_rows.max(1)).rev().map(<[_]>::to_vec).collect();
    while let Some(keys) = stack.pop() {
        if let [key] = &keys[..] {
            match remove_one(pair, table, key).await? {
                Tried::Nothing => unseen.extend(keys),
                Tried::Removed => outcome.removed += 1,
                Tried::Again => outcome.locked.extend(keys),
                Tried::Refused(message) => outcome.refused.extend(keys.into_iter().map(|key| (key, message.clone()))),
            }
            continue;
        }
        match remove_many(pair, table, &keys).await {
            Ok(batch) => {
                outcome.removed += batch.removed;
                unseen.extend(batch.unseen);
                outcome.locked.extend(batch.again);
                if !batch.undone.is_empty() {
                    stack.push(batch.undone);
                }
                stack.extend(batch.alone.into_iter().map(|key| vec![key]));
            }
            Err(error) => {
                pair.abandon().await;
                match error.meaning() {
                    Meaning::Fatal => return Err(error),
                    Meaning::Definition => {
                        outcome.refused.extend(keys.into_iter().map(|key| (key, error.to_string())));
                    }
                    _ => halves(&mut stack, keys, |keys| keys),
                }
            }
        }
    }
    Ok(unseen)
}

/// What became of keys that were tried together. What is nowhere here is gone.
#[derive(Default)]
struct Batch {
    /// Rows that were there and are gone.
    removed: u64,
    /// Not there on either side.
    unseen: Vec<Values>,
    /// The authority has them after all: nothing of the batch was committed.
    again: Vec<Values>,
    /// The others, then: to be tried without those.
    undone: Vec<Values>,
    /// Somebody else has a hand on their rows.
    alone: Vec<Values>,
}

/// Several keys in one transaction of the mirror. Whoever waits for a row of its waits for no longer than its statements take, since it waits for none itself:
/// for the table before it holds a row, for rows never.
async fn remove_many(pair: &mut Pair, table: &Table, keys: &[Values]) -> Result<Batch, Error> {
    let here = TableSql::new(table, pair.authority.side);
    let there = TableSql::new(table, pair.mirror.side);
    match begin_on_mirror(pair, table, false).await {
        // Somebody has all of it.
        Err(error) if error.meaning() == Meaning::Busy => {
            pair.abandon().await;
            return Ok(Batch { again: keys.to_vec(), ..Batch::default() });
        }
        begun => begun?,
    }
    let across: Vec<Values> = keys.iter().map(|key| key_across(table, here.side, key.clone())).collect();
    let asked: Vec<&Values> = across.iter().collect();
    let ours = found(&mut pair.mirror, "locking rows", &there, &there.seize(), &asked).await?;
    let present = match ours.len() == keys.len() {
        true => ours.clone(),
        // One that is there and not ours is somebody else's at this moment; it is not absent.
        false => found(&mut pair.mirror, "looking for rows", &there, &there.exist(), &asked).await?,
    };
    let mine: Vec<&Values> =
        asked.iter().enumerate().filter(|(at, _)| ours.contains(at)).map(|(_, key)| *key).collect();
    if delete(&mut pair.mirror, &there, &mine).await? < mine.len() as u64 {
        // A trigger that fires always has kept one: which, is seen one by one.
        pair.mirror.rollback().await?;
        return Ok(Batch { alone: keys.to_vec(), ..Batch::default() });
    }
    // No transaction is open on the authority: this is a new snapshot, taken after every delete was answered.
    let asked: Vec<&Values> = keys.iter().collect();
    let appeared = found(&mut pair.authority, "looking again", &here, &here.exist(), &asked).await?;
    let mut batch = Batch::default();
    let mut judged = Vec::with_capacity(keys.len());
    for (at, key) in keys.iter().enumerate() {
        match place(ours.contains(&at), present.contains(&at)) {
            Place::Held => judged.push((key, removal(1, appeared.contains(&at)))),
            Place::Absent => judged.push((key, removal(0, appeared.contains(&at)))),
            Place::Again => batch.alone.push(key.clone()),
        }
    }
    let end = removals(judged.iter().map(|(_, removal)| *removal));
    for (key, removal) in judged {
        match (end, removal) {
            (Removal::Again, Removal::Again) => batch.again.push(key.clone()),
            (Removal::Again, _) => batch.undone.push(key.clone()),
            (_, Removal::Nothing) => batch.unseen.push(key.clone()),
            (_, Removal::Commit | Removal::Again) => batch.removed += 1,
        }
    }
    pair.mirror.end("deleting rows", end == Removal::Commit).await?;
    Ok(batch)
}

/// Positions of the asked keys that this statement answers.
async fn found(
    link: &mut Link,
    doing: &'static str,
    sql: &TableSql<'_>,
    text: &str,
    keys: &[&Values],
) -> Result<HashSet<usize>, Error> {
    Ok(ask(link, doing, sql, text, keys).await?.into_iter().map(|(at, _)| at).collect())
}

async fn remove_one(pair: &mut Pair, table: &Table, key: &Values) -> Result<Tried, Error> {
    match delete_then_look(pair, table, key).await {
        Ok(tried) => Ok(tried),
        Err(error) => {
            pair.abandon().await;
            match error.meaning() {
                Meaning::Fatal => Err(error),
                Meaning::Busy => Ok(Tried::Again),
                _ => Ok(Tried::Refused(error.to_string())),
            }
        }
    }
}

async fn delete_then_look(pair: &mut Pair, table: &Table, key: &Values) -> Result<Tried, Error> {
    let here = TableSql::new(table, pair.authority.side);
    let there = TableSql::new(table, pair.mirror.side);
    begin_on_mirror(pair, table, true).await?;
    let there_key = key_across(table, here.side, key.clone());
    let found = delete(&mut pair.mirror, &there, &[&there_key]).await?;
    // No transaction is open on the authority: this is a new snapshot, taken after the delete was answered.
    let appeared = !ask(&mut pair.authority, "looking again", &here, &here.exist(), &[key]).await?.is_empty();
    let (committed, tried) = match removal(found, appeared) {
        Removal::Commit => (true, Tried::Removed),
        Removal::Nothing => (false, Tried::Nothing),
        Removal::Again => (false, Tried::Again),
    };
    pair.mirror.end("deleting rows", committed).await?;
    Ok(tried)
}

/// Locks that a transaction which wrote the table holds.
const WRITES: &str = "'RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'";

/// Waits until no transaction that holds such a lock on the table now still does. Err: who still does after `patience`
/// (virtual transactions; `-1/...` is a prepared one).
pub(crate) async fn wait_for_writers(
    link: &mut Link,
    table: &Table,
    patience: Duration,
) -> Result<Result<(), Vec<String>>, Error> {
    let begun = Instant::now();
    let mut awaited = writers(link, table).await?;
    let mut pause = Duration::from_millis(1);
    while !awaited.is_empty() {
        if begun.elapsed() > patience {
            return Ok(Err(awaited.into_iter().collect()));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
        let still = writers(link, table).await?;
        awaited.retain(|transaction| still.contains(transaction));
    }
    Ok(Ok(()))
}

async fn writers(link: &mut Link, table: &Table) -> Result<HashSet<String>, Error> {
    let mut relations = vec![*table.oid.get(link.side)];
    relations.extend(table.partitions.get(link.side));
    let text = format!(
        "SELECT DISTINCT virtualtransaction FROM pg_locks WHERE locktype = 'relation' AND granted \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
         AND relation = ANY($1) AND mode IN ({WRITES}) AND pid IS DISTINCT FROM pg_backend_pid()"
    );
    let rows = link.rows("reading who writes the table", &text, &[&relations]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
