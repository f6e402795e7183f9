//! A debt of a whole table with a key, or of a range of its keys: both sides are walked once, in chunks of keys, each chunk reconciled under lock.
//!
//! Also the plain copy of what was there before: a chunk that the mirror lacks altogether goes over by COPY.

use super::across::key_across;
use std::time::Instant;

use super::binary::{Parameter, values};
use super::error::Error;
use super::gone;
use super::link::{Link, Pair};
use super::locks;
use super::reconcile::{Outcome, ask, chunk_of_keys, keys};
use super::sql::{Bounds, TableSql, references};
use crate::catalog::Table;
use crate::ledger::debts::Values;
use crate::phase::Side;

/// Refused rows after which a walk ends: the table stays owed, and what is wrong is not about single rows.
const REFUSED_MOST: usize = 1000;
/// Rows of the first chunk; later ones by what the first have shown.
const FIRST: usize = 100;

/// A walk with this outcome has not gone through all of its keys.
pub(crate) fn ended_early(outcome: &Outcome) -> bool {
    outcome.refused.len() > REFUSED_MOST
}

/// Why a table cannot be walked, as an error.
pub(crate) fn walkable(table: &Table) -> Result<(), Error> {
    let name = table.label();
    match &table.opaque {
        Some(why) => Err(Error::Unfit(format!("table {name} cannot be mirrored: {why}"))),
        None if table.key.is_none() => Err(Error::Unfit(format!(
            "table {name} has no key that reconcile could walk: copy it by name (repair --table)"
        ))),
        None => Ok(()),
    }
}

/// Makes every row of a table equal on both sides. `progress` is told the rows done after each chunk. As in
/// [`keys`], the caller flushes before it clears the debt, and the debt is paid only if nothing is `locked` or `refused`.
///
/// One pass is enough: while the debt is open every writer is mirrored, so a key that is written behind the walk is that writer's debt.
pub async fn table(pair: &mut Pair, table: &Table, progress: &mut (dyn FnMut(u64) + Send)) -> Result<Outcome, Error> {
    walkable(table)?;
    let mut outcome = Outcome::default();
    if table.lazy && pair.authority.side == Side::Old {
        // What new lacks it may lack; what it has must be right.
        walk_present(pair, table, progress, &mut outcome).await?;
    } else {
        walk_authority(pair, table, &Bounds::default(), Manners::GiveWay, progress, &mut outcome).await?;
        walk_mirror(pair, table, &Bounds::default(), &mut outcome).await?;
    }
    let locked = std::mem::take(&mut outcome.locked);
    outcome.add(keys(pair, table, locked).await?);
    Ok(outcome)
}

/// The same for the keys between two, as both sides hold them: also those that only the mirror has.
pub(crate) async fn range(pair: &mut Pair, table: &Table, bounds: &Bounds) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    walk_authority(pair, table, bounds, Manners::GoOn, &mut |_| {}, &mut outcome).await?;
    if order_alike(pair, table).await? {
        let across = |key: &Option<Values>| key.clone().map(|key| key_across(table, pair.authority.side, key));
        let bounds = Bounds { after: across(&bounds.after), upto: across(&bounds.upto) };
        walk_mirror(pair, table, &bounds, &mut outcome).await?;
    } else {
        walk_mirror(pair, table, &Bounds::default(), &mut outcome).await?;
    }
    let locked = std::mem::take(&mut outcome.locked);
    outcome.add(keys(pair, table, locked).await?);
    Ok(outcome)
}

/// Rows that only the mirror has are removed.
pub(crate) async fn leftovers(pair: &mut Pair, table: &Table) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    walk_mirror(pair, table, &Bounds::default(), &mut outcome).await?;
    let locked = std::mem::take(&mut outcome.locked);
    outcome.add(keys(pair, table, locked).await?);
    Ok(outcome)
}

/// Both sides order the table's keys alike (D7): built-in types, compared by their bytes where they have a collation. An enum's order is its
/// server's, and that of a language depends on the library that the server uses. The built-in provider (PostgreSQL 17) orders by bytes.
pub(crate) async fn order_alike(pair: &mut Pair, table: &Table) -> Result<bool, Error> {
    let text = "SELECT getdatabaseencoding()::text, bool_and(a.atttypid < 16384 AND (a.attcollation = 0 OR coalesce(CASE c.collprovider \
        WHEN 'c' THEN c.collcollate WHEN 'b' THEN 'C' WHEN 'd' THEN (SELECT CASE to_jsonb(d)->>'datlocprovider' WHEN 'b' THEN 'C' WHEN 'i' THEN '' ELSE d.datcollate END \
        FROM pg_database d WHERE d.datname = current_database()) END, '') IN ('C', 'POSIX', 'C.UTF-8', 'C.UTF8', 'C.utf8'))) \
        FROM pg_attribute a LEFT JOIN pg_collation c ON c.oid = a.attcollation WHERE a.attrelid = $1 AND a.attname = ANY ($2)";
    let mut encodings = Vec::new();
    for link in [&mut pair.authority, &mut pair.mirror] {
        let sql = TableSql::new(table, link.side);
        let names: Vec<&String> = sql.key.iter().map(|&at| table.columns[at].name.get(link.side)).collect();
        let row = &link.rows("reading collations", text, &[table.oid.get(link.side), &names]).await?[0];
        if row.get::<_, Option<bool>>(1) != Some(true) {
            return Ok(false);
        }
        encodings.push(row.get::<_, String>(0));
    }
    Ok(encodings[0] == encodings[1])
}

/// Whether a walk ends where another job waits for the table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manners {
    GiveWay,
    GoOn,
}

async fn walk_authority(
    pair: &mut Pair,
    table: &Table,
    bounds: &Bounds,
    manners: Manners,
    progress: &mut (dyn FnMut(u64) + Send),
    outcome: &mut Outcome,
) -> Result<(), Error> {
    let mut page = Page::new(bounds.clone());
    let mut done = 0;
    loop {
        if manners == Manners::GiveWay && locks::wanted(pair, table.number).await? {
            return Err(Error::Deadline(format!("another job asks for table {}: the walk gives way", table.label())));
        }
        let limits = (pair.settings.chunk_rows, pair.settings.chunk_bytes);
        let found = page.next(&mut pair.authority, table, limits).await?;
        if found.is_empty() {
            return Ok(());
        }
        done += found.len() as u64;
        let begun = Instant::now();
        let chunk = chunk_of_keys(pair, table, found).await?;
        outcome.add(chunk);
        if begun.elapsed() > pair.wait / 2 {
            // Statements about several rows are cut off after `wait`.
            page.rows = (page.rows / 4).max(1);
        }
        if ended_early(outcome) {
            return Ok(());
        }
        // Bounded: a table with more locked rows than this is held by someone for long.
        if outcome.locked.len() > 100 * pair.settings.chunk_rows {
            let locked = std::mem::take(&mut outcome.locked);
            outcome.add(keys(pair, table, locked).await?);
        }
        progress(done);
    }
}

/// Nobody's insert is under way on the mirror that a walk over it would not see.
async fn settled(pair: &mut Pair, table: &Table) -> Result<(), Error> {
    if let Err(holders) = gone::wait_for_writers(&mut pair.mirror, table, pair.settings.settle).await? {
        return Err(Error::Deadline(format!(
            "{}: transactions {} stay open on table {}; end them, then repair again",
            pair.mirror.side,
            holders.join(", "),
            table.label()
        )));
    }
    Ok(())
}

/// All rows that the mirror has, and no others.
async fn walk_present(
    pair: &mut Pair,
    table: &Table,
    progress: &mut (dyn FnMut(u64) + Send),
    outcome: &mut Outcome,
) -> Result<(), Error> {
    settled(pair, table).await?;
    let (mut page, mut done) = (Page::new(Bounds::default()), 0);
    loop {
        let limits = (pair.settings.chunk_rows, pair.settings.chunk_bytes);
        let found = page.next(&mut pair.mirror, table, limits).await?;
        if found.is_empty() {
            return Ok(());
        }
        done += found.len() as u64;
        let found = found.into_iter().map(|key| key_across(table, pair.mirror.side, key)).collect();
        outcome.add(chunk_of_keys(pair, table, found).await?);
        if outcome.refused.len() > REFUSED_MOST {
            return Ok(());
        }
        progress(done);
    }
}

/// Rows that only the mirror has.
async fn walk_mirror(pair: &mut Pair, table: &Table, bounds: &Bounds, outcome: &mut Outcome) -> Result<(), Error> {
    // An insert under way on the mirror, of a transaction that the authority has ended, is invisible to the walk; the row may
    // have been deleted on the authority since, by a write that only this debt stands for.
    settled(pair, table).await?;
    let here = TableSql::new(table, pair.authority.side);
    let mut page = Page::new(bounds.clone());
    loop {
        let limits = (pair.settings.chunk_rows * 4, usize::MAX);
        let found = page.next(&mut pair.mirror, table, limits).await?;
        if found.is_empty() {
            return Ok(());
        }
        let mut found: Vec<Option<Values>> =
            found.into_iter().map(|key| Some(key_across(table, pair.mirror.side, key))).collect();
        let asked: Vec<&Values> = found.iter().flatten().collect();
        for (at, _) in ask(&mut pair.authority, "looking for rows", &here, &here.exist(), &asked).await? {
            found[at] = None;
        }
        let lacking = found.into_iter().flatten().collect();
        outcome.add(gone::remove(pair, table, lacking).await?);
    }
}

/// A walk in key order, in the order of the side that is walked.
pub(crate) struct Page {
    /// What is left.
    bounds: Bounds,
    rows: usize,
}

impl Page {
    /// Of the keys within these bounds.
    pub(crate) fn new(bounds: Bounds) -> Page {
        Page { bounds, rows: FIRST }
    }

    /// The next keys; none at the end. `limits`: rows and bytes at most, but at least one row.
    pub(crate) async fn next(
        &mut self,
        link: &mut Link,
        table: &Table,
        limits: (usize, usize),
    ) -> Result<Vec<Values>, Error> {
        let sql = TableSql::new(table, link.side);
        let rows = self.rows as i64;
        let mut parameters = sql.bound_parameters(&self.bounds);
        let rows = bytes::Bytes::copy_from_slice(&rows.to_be_bytes());
        parameters.push(Parameter { value: Some(rows), text: false });
        let text = sql.page(self.bounds.after.is_some(), self.bounds.upto.is_some());
        let found = link.rows("reading keys", &text, &references(&parameters)).await?;
        let (mut keys, mut bytes) = (Vec::new(), 0usize);
        for row in &found {
            bytes = bytes.saturating_add(row.get::<_, i64>(0) as usize);
            if bytes > limits.1 && !keys.is_empty() {
                break;
            }
            keys.push(values(row, 1, sql.key.len()));
        }
        if let Some(last) = keys.last() {
            self.bounds.after = Some(last.clone());
            let mean = (bytes / keys.len()).max(1);
            self.rows = (limits.1 / mean).clamp(1, limits.0).min(self.rows * 4).max(1);
        }
        Ok(keys)
    }
}
