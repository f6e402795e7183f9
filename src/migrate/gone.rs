//! Keys that the authority lacks (D2): delete on the mirror, then look again at the authority.
//!
//! An absent row has no lock that could be held, so the order of steps must do what locks do elsewhere. A delete that found no row
//! may have missed an insert that is not committed yet (it is invisible, and DELETE does not wait for it): such a transaction
//! holds RowExclusiveLock on the table. Those are waited for, holding nothing, and the delete is done again.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::across::key_across;
use super::error::{Error, Meaning};
use super::link::{Link, Pair};
use super::reconcile::{Outcome, ask, begin_on_mirror, delete};
use super::rules::{Removal, removal};
use super::sql::TableSql;
use crate::catalog::Table;
use crate::ledger::debts::Values;

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

/// Deletes on the mirror what the authority lacks, one key in a transaction.
pub(crate) async fn remove(pair: &mut Pair, table: &Table, keys: Vec<Values>) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let mut unseen = Vec::new();
    for key in keys {
        match remove_one(pair, table, &key).await? {
            Tried::Nothing => unseen.push(key),
            tried => note(tried, key, &mut outcome),
        }
    }
    if unseen.is_empty() {
        return Ok(outcome);
    }
    // One wait for all of them: it begins after the last of these deletes.
    if let Err(holders) = wait_for_writers(&mut pair.mirror, table, pair.settings.settle).await? {
        tracing::warn!(side = %pair.mirror.side, table = table.label(), ?holders, "transactions stay open on the mirror; keys are tried again later");
        outcome.locked.extend(unseen);
        return Ok(outcome);
    }
    for key in unseen {
        let tried = remove_one(pair, table, &key).await?;
        note(tried, key, &mut outcome);
    }
    Ok(outcome)
}

fn note(tried: Tried, key: Values, outcome: &mut Outcome) {
    match tried {
        Tried::Removed => outcome.removed += 1,
        Tried::Nothing => {}
        Tried::Again => outcome.locked.push(key),
        Tried::Refused(message) => outcome.refused.push((key, message)),
    }
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
    begin_on_mirror(pair, true).await?;
    let there_key = key_across(table, here.side, key.clone());
    let found = delete(&mut pair.mirror, &there, &[&there_key]).await?;
    // No transaction is open on the authority: this is a new snapshot, taken after the delete was answered.
    let appeared = !ask(&mut pair.authority, "looking again", &here, &here.exist(), &[key]).await?.is_empty();
    let (end, tried) = match removal(found, appeared) {
        Removal::Commit => ("COMMIT", Tried::Removed),
        Removal::Nothing => ("ROLLBACK", Tried::Nothing),
        Removal::Again => ("ROLLBACK", Tried::Again),
    };
    pair.mirror.batch("ending", end).await?;
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
