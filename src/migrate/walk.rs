//! A whole-table debt of a table with a key: both sides are walked once, in chunks of keys, each chunk reconciled under lock.
//!
//! Also the plain copy of what was there before: a chunk that the mirror lacks altogether goes over by COPY.

use super::across::key_across;
use std::time::Instant;

use super::binary::{Parameter, values};
use super::error::Error;
use super::gone;
use super::link::{Link, Pair};
use super::reconcile::{Outcome, ask, chunk_of_keys, keys};
use super::sql::{TableSql, references};
use crate::catalog::Table;
use crate::ledger::debts::Values;

/// Refused rows after which a walk ends: the table stays owed, and what is wrong is not about single rows.
const REFUSED_MOST: usize = 1000;
/// Rows of the first chunk; later ones by what the first have shown.
const FIRST: usize = 100;

/// Makes every row of a table equal on both sides. `progress` is told the rows done after each chunk. As in
/// [`keys`], the caller flushes before it clears the debt, and the debt is paid only if nothing is `locked` or `refused`.
///
/// One pass is enough: while the debt is open every writer is mirrored, so a key that is written behind the walk is that writer's debt.
pub async fn table(pair: &mut Pair, table: &Table, progress: &mut (dyn FnMut(u64) + Send)) -> Result<Outcome, Error> {
    if let Some(why) = &table.opaque {
        return Err(Error::Unfit(format!("table {} cannot be mirrored: {why}", table.label())));
    }
    if table.key.is_none() {
        let name = table.label();
        return Err(Error::Unfit(format!(
            "table {name} has no key that reconcile could walk: copy it by name (repair --table)"
        )));
    }
    let mut outcome = Outcome::default();
    walk_authority(pair, table, progress, &mut outcome).await?;
    walk_mirror(pair, table, &mut outcome).await?;
    let locked = std::mem::take(&mut outcome.locked);
    outcome.add(keys(pair, table, locked).await?);
    Ok(outcome)
}

async fn walk_authority(
    pair: &mut Pair,
    table: &Table,
    progress: &mut (dyn FnMut(u64) + Send),
    outcome: &mut Outcome,
) -> Result<(), Error> {
    let mut page = Page { after: None, rows: FIRST };
    let mut done = 0;
    loop {
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
        if outcome.refused.len() > REFUSED_MOST {
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

/// Rows that only the mirror has.
async fn walk_mirror(pair: &mut Pair, table: &Table, outcome: &mut Outcome) -> Result<(), Error> {
    // An insert under way on the mirror, of a transaction that the authority has ended, is invisible to the walk; the row may
    // have been deleted on the authority since, by a write that only this debt stands for.
    if let Err(holders) = gone::wait_for_writers(&mut pair.mirror, table, pair.settings.settle).await? {
        return Err(Error::Deadline(format!(
            "{}: transactions {} stay open on table {}; end them, then repair again",
            pair.mirror.side,
            holders.join(", "),
            table.label()
        )));
    }
    let here = TableSql::new(table, pair.authority.side);
    let mut page = Page { after: None, rows: FIRST };
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
struct Page {
    after: Option<Values>,
    rows: usize,
}

impl Page {
    /// The next keys; none at the end. `limits`: rows and bytes at most, but at least one row.
    async fn next(&mut self, link: &mut Link, table: &Table, limits: (usize, usize)) -> Result<Vec<Values>, Error> {
        let sql = TableSql::new(table, link.side);
        let rows = self.rows as i64;
        let mut parameters = self.after.as_deref().map_or_else(Vec::new, |after| sql.key_parameters(after));
        let rows = bytes::Bytes::copy_from_slice(&rows.to_be_bytes());
        parameters.push(Parameter { value: Some(rows), text: false });
        let found = link.rows("reading keys", &sql.page(self.after.is_some()), &references(&parameters)).await?;
        let (mut keys, mut bytes) = (Vec::new(), 0usize);
        for row in &found {
            bytes = bytes.saturating_add(row.get::<_, i64>(0) as usize);
            if bytes > limits.1 && !keys.is_empty() {
                break;
            }
            keys.push(values(row, 1, sql.key.len()));
        }
        if let Some(last) = keys.last() {
            self.after = Some(last.clone());
            let mean = (bytes / keys.len()).max(1);
            self.rows = (limits.1 / mean).clamp(1, limits.0).min(self.rows * 4).max(1);
        }
        Ok(keys)
    }
}
