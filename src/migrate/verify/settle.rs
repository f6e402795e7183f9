//! Rows that seem to differ, looked at until it is known why.
//!
//! The order of the looks is what keeps a row that is on its way from being called different:
//! - a row that the authority has is locked there, so that no other write of it can come; then the ledger is read; then the mirror. A writer that came
//!   before has its debt in the ledger, or had it cleared, and then the mirror has its row;
//! - a row that the authority lacks cannot be locked. The mirror is read, then the authority, then the ledger, then the mirror again: a delete that the
//!   authority has seen owes the key until the mirror's version of the row is gone, so the same version in both readings was not its.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::super::across::{key_across, row_across};
use super::super::binary::values;
use super::super::error::Error;
use super::super::gone;
use super::super::link::{Link, Pair};
use super::super::owes::Owes;
use super::super::reconcile::ask;
use super::super::rules::{Place, place};
use super::super::sql::TableSql;
use super::Found;
use crate::catalog::{Sides, Table};
use crate::ledger::debts::Values;
use crate::phase::Side;

/// In which way a row differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// The mirror lacks it.
    Missing,
    /// Only the mirror has it.
    Extra,
    /// These columns differ (old's names).
    Columns(Vec<String>),
    /// Of a table without a key: so many rows of this text are on each side.
    Count(Sides<u64>),
}

impl How {
    /// How many rows that is.
    pub fn rows(&self) -> u64 {
        match self {
            How::Missing | How::Extra | How::Columns(_) => 1,
            How::Count(counts) => counts.old.abs_diff(counts.new),
        }
    }
}

/// A row that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its key as the authority's images carry it. Empty where the table has none.
    pub key: Values,
    /// The same as text, in the order of the key's columns; where there is no key, the row's text alone, cut off after some length.
    pub shown: Vec<String>,
    /// In which way.
    pub how: How,
}

/// Keys that are looked at in one go: they are locked meanwhile.
const AT_ONCE: usize = 200;
/// How often a key that is locked or owed is looked at.
const ROUNDS: u32 = 10;

/// What stands in the way of saying anything about a key.
enum Unsettled {
    Locked,
    Owed,
    Covered,
}

/// Finds out about these keys; what is known then is added to `found`.
pub(super) async fn suspects(
    pair: &mut Pair,
    table: &Table,
    keys: Vec<Values>,
    found: &mut Found,
) -> Result<(), Error> {
    let mut left = keys;
    let mut last = Vec::new();
    for round in 0..ROUNDS {
        if left.is_empty() {
            return Ok(());
        }
        if round > 0 {
            tokio::time::sleep(Duration::from_millis(10 << round.min(6))).await;
        }
        last.clear();
        for some in left.chunks(AT_ONCE) {
            let before = found.different.len();
            let looked = at_once(pair, table, some, &mut found.different, &mut last).await;
            pair.authority.rollback().await?;
            looked?;
            name(pair, table, &mut found.different[before..]).await?;
        }
        left = last.iter().map(|(key, _): &(Values, Unsettled)| key.clone()).collect();
    }
    for (_, why) in last {
        match why {
            Unsettled::Locked => found.busy += 1,
            Unsettled::Owed => found.owed += 1,
            Unsettled::Covered => found.covered += 1,
        }
    }
    Ok(())
}

/// What the ledger says of a key.
fn owed(owes: &Owes, table: &Table, key: &Values) -> Option<Unsettled> {
    match () {
        _ if owes.whole => Some(Unsettled::Covered),
        _ if owes.names(table, key) => Some(Unsettled::Owed),
        _ => None,
    }
}

/// Looks at some keys. The authority's transaction stays open: the caller ends it.
async fn at_once(
    pair: &mut Pair,
    table: &Table,
    keys: &[Values],
    different: &mut Vec<Difference>,
    unsettled: &mut Vec<(Values, Unsettled)>,
) -> Result<(), Error> {
    let (here, there) = (TableSql::new(table, pair.authority.side), TableSql::new(table, pair.mirror.side));
    let columns: Vec<usize> = (0..table.columns.len()).collect();
    let asked: Vec<&Values> = keys.iter().collect();
    pair.authority.batch("beginning", "BEGIN").await?;
    let locked = ask(&mut pair.authority, "locking rows", &here, &here.lock(), &asked).await?;
    let ours: HashSet<usize> = locked.iter().map(|(at, _)| *at).collect();
    let mut rows = read(&mut pair.authority, &here, &columns, &asked).await?;
    // After the locks, and before the mirror.
    let owes = Owes::read(pair, table).await?;
    let across: Vec<Values> = keys.iter().map(|key| key_across(table, here.side, key.clone())).collect();
    let asked: Vec<&Values> = across.iter().collect();
    let mut mirrored = read(&mut pair.mirror, &there, &columns, &asked).await?;
    let mut absent = Vec::new();
    for (at, key) in keys.iter().enumerate() {
        let row = rows.remove(&at);
        match place(ours.contains(&at), row.is_some()) {
            Place::Held => {
                let row = row_across(table, here.side, &columns, row.unwrap_or_default());
                let how = match mirrored.remove(&at) {
                    Some(other) if other == row => continue,
                    Some(other) => How::Columns(differing(table, &row, &other)),
                    // What new lacks of a lazy table it may lack.
                    None if table.lazy && here.side == Side::Old => continue,
                    None => How::Missing,
                };
                match owed(&owes, table, key) {
                    Some(why) => unsettled.push((key.clone(), why)),
                    None => different.push(Difference { key: key.clone(), shown: Vec::new(), how }),
                }
            }
            Place::Absent if mirrored.contains_key(&at) => absent.push(key.clone()),
            Place::Absent => {}
            Place::Again => unsettled.push((key.clone(), Unsettled::Locked)),
        }
    }
    pair.authority.rollback().await?;
    if table.lazy && here.side == Side::New && !absent.is_empty() {
        // What only old has of it is no difference, unless new has deleted it.
        absent = gone::spoken_for(pair, table, absent).await?;
    }
    for (key, why) in alone(pair, table, absent).await? {
        match why {
            Some(why) => unsettled.push((key, why)),
            None => different.push(Difference { key, shown: Vec::new(), how: How::Extra }),
        }
    }
    Ok(())
}

async fn read(
    link: &mut Link,
    sql: &TableSql<'_>,
    columns: &[usize],
    keys: &[&Values],
) -> Result<HashMap<usize, Values>, Error> {
    let answers = ask(link, "reading rows", sql, &sql.look(columns), keys).await?;
    Ok(answers.iter().map(|(at, row)| (*at, values(row, 1, columns.len()))).collect())
}

fn differing(table: &Table, one: &Values, other: &Values) -> Vec<String> {
    let columns = table.columns.iter().zip(one.iter().zip(other));
    columns.filter(|(_, (one, other))| one != other).map(|(column, _)| column.name.old.clone()).collect()
}

/// Of keys that the mirror has and the authority seems to lack: those that are there alone, and those of which nothing can be said yet.
async fn alone(pair: &mut Pair, table: &Table, keys: Vec<Values>) -> Result<Vec<(Values, Option<Unsettled>)>, Error> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let here = TableSql::new(table, pair.authority.side);
    let before = versions(pair, table, &keys).await?;
    let asked: Vec<&Values> = keys.iter().collect();
    let answers = ask(&mut pair.authority, "looking for rows", &here, &here.exist(), &asked).await?;
    let there: HashSet<usize> = answers.into_iter().map(|(at, _)| at).collect();
    let owes = Owes::read(pair, table).await?;
    let after = versions(pair, table, &keys).await?;
    let mut found = Vec::new();
    for (at, key) in keys.into_iter().enumerate() {
        match (before.get(&at), after.get(&at)) {
            (Some(one), Some(other)) if one == other && !there.contains(&at) => {
                let why = owed(&owes, table, &key);
                found.push((key, why));
            }
            (None, None) => {}
            _ => found.push((key, Some(Unsettled::Locked))),
        }
    }
    Ok(found)
}

/// Which version of each row the mirror has.
async fn versions(pair: &mut Pair, table: &Table, keys: &[Values]) -> Result<HashMap<usize, String>, Error> {
    let there = TableSql::new(table, pair.mirror.side);
    let across: Vec<Values> = keys.iter().map(|key| key_across(table, pair.authority.side, key.clone())).collect();
    let asked: Vec<&Values> = across.iter().collect();
    let text = there.look_at("pg_catalog.concat(t.xmin, ' ', t.tableoid, ' ', t.ctid)");
    let answers = ask(&mut pair.mirror, "looking for rows", &there, &text, &asked).await?;
    Ok(answers.iter().map(|(at, row)| (*at, row.get(1))).collect())
}

/// Puts the keys' texts in, as the side that has the row writes them.
async fn name(pair: &mut Pair, table: &Table, different: &mut [Difference]) -> Result<(), Error> {
    for extra in [false, true] {
        let side = if extra { pair.mirror.side } else { pair.authority.side };
        let sql = TableSql::new(table, side);
        let text = sql.look_at(&sql.key_texts());
        let wanted: Vec<usize> =
            (0..different.len()).filter(|&at| (different[at].how == How::Extra) == extra).collect();
        let key = |at: &usize| match extra {
            true => key_across(table, side.other(), different[*at].key.clone()),
            false => different[*at].key.clone(),
        };
        let keys: Vec<Values> = wanted.iter().map(key).collect();
        let asked: Vec<&Values> = keys.iter().collect();
        if asked.is_empty() {
            continue;
        }
        let link = if extra { &mut pair.mirror } else { &mut pair.authority };
        for (at, row) in ask(link, "reading keys", &sql, &text, &asked).await? {
            different[wanted[at]].shown = row.get(1);
        }
    }
    Ok(())
}
