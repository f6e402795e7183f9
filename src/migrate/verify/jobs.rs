//! `crossfade verify`: several jobs at once, on tables and on parts of large ones.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::super::error::Error;
use super::super::link::Pair;
use super::super::lock;
use super::super::pace::Pace;
use super::super::queue::Queue;
use super::position::{self, Beginning, Position, Runner};
use super::{Found, Going, Job, Options, Tell, Tempo, Verify, compare, extra, keyless, look, mend, open};
use crate::catalog::Table;

/// A piece of work.
enum Unit {
    /// Find out what there is to do about a table.
    Table(Arc<Table>),
    /// A part of one.
    Part(Arc<Parts>, Position),
}

/// A table that is looked at in parts.
struct Parts {
    table: Arc<Table>,
    begun: Instant,
    /// How often something of it had been owed then.
    owings: i64,
    seen: Mutex<Seen>,
}

/// What has come of them.
struct Seen {
    /// Parts that are still to be looked at.
    left: usize,
    /// Of each that was.
    found: BTreeMap<i32, Found>,
}

/// Parts of a table for each job: so that all have something to do until its end.
const PARTS_EACH: usize = 4;

/// What the jobs of one run share.
struct Work<'a> {
    job: Job<'a>,
    options: &'a Options,
    tell: Tell<'a>,
    queue: Queue<Unit>,
    pace: Pace,
    /// The number of the next ledger row.
    ids: AtomicI64,
}

/// Compares these tables. What was found of each is told as soon as it is. Err: the first that failed; tables that were done by then are, for a run that
/// resumes.
pub async fn run(verify: &Verify, tables: &[Arc<Table>], options: &Options, tell: Tell<'_>) -> Result<(), Error> {
    let work = Work {
        job: Job { verify, runner: Runner::Command, resume: options.resume },
        options,
        tell,
        queue: Queue::new(tables.iter().cloned().map(Unit::Table)),
        pace: Pace::new(options.rate, Instant::now()),
        ids: AtomicI64::new(verify.first_debt),
    };
    futures_util::future::try_join_all((0..options.jobs.max(1)).map(|_| work.job())).await?;
    let mut pair = open(verify, options.patience).await?;
    let numbers: Vec<u32> = tables.iter().map(|table| table.number).collect();
    position::forget(&mut pair, &numbers, Runner::Command).await
}

impl Work<'_> {
    async fn job(&self) -> Result<(), Error> {
        let mut opened = None;
        let mut going = Going::new(Tempo::Asked(&self.pace), self.tell);
        while let Some(unit) = self.queue.next().await {
            let pair = match &mut opened {
                Some(pair) => pair,
                None => opened.insert(open(self.job.verify, self.options.patience).await?),
            };
            let more = match unit {
                Unit::Table(table) => self.table(pair, table, &mut going).await?,
                Unit::Part(parts, position) => {
                    self.part(pair, &parts, position, &mut going).await?;
                    Vec::new()
                }
            };
            // Before other tables: what was owed since a table's beginning makes its look void.
            self.queue.at_once(more);
        }
        Ok(())
    }

    async fn table(&self, pair: &mut Pair, table: Arc<Table>, going: &mut Going<'_>) -> Result<Vec<Unit>, Error> {
        let begun = Instant::now();
        let most = if self.options.jobs > 1 { self.options.jobs * PARTS_EACH } else { 1 };
        let (owings, beginning) = self.job.begin(pair, &table, most).await?;
        let positions = match beginning {
            Beginning::Over(rows) => {
                let found = Found { rows, before: true, ..Found::default() };
                self.job.end(pair, &table, owings, &found, self.tell).await?;
                return Ok(Vec::new());
            }
            Beginning::Parts(positions) => positions,
        };
        if table.key.is_none() {
            let same_encoding = look::same_encoding(pair).await?;
            let mut found = keyless::compare(pair, &table, same_encoding, going).await?;
            found.took = begun.elapsed();
            self.found(pair, &table, owings, found, going).await?;
            return Ok(Vec::new());
        }
        let seen = Mutex::new(Seen { left: positions.len(), found: BTreeMap::new() });
        let parts = Arc::new(Parts { table, begun, owings, seen });
        Ok(positions.into_iter().map(|position| Unit::Part(parts.clone(), position)).collect())
    }

    /// Looks at a part; behind the last one the table is done.
    async fn part(
        &self,
        pair: &mut Pair,
        parts: &Parts,
        position: Position,
        going: &mut Going<'_>,
    ) -> Result<(), Error> {
        let table = &*parts.table;
        let part = position.part;
        let found = compare(pair, (table, self.job.runner), position, going).await?;
        let all = {
            let mut seen = lock(&parts.seen);
            seen.found.insert(part, found);
            seen.left -= 1;
            if seen.left > 0 { BTreeMap::new() } else { std::mem::take(&mut seen.found) }
        };
        if all.is_empty() {
            return Ok(());
        }
        // In the order of keys.
        let mut found = all.into_values().fold(Found::default(), Found::and);
        extra(pair, table, going, &mut found).await?;
        found.took = parts.begun.elapsed();
        self.found(pair, table, parts.owings, found, going).await
    }

    /// All of a table was compared.
    async fn found(
        &self,
        pair: &mut Pair,
        table: &Table,
        mut owings: i64,
        mut found: Found,
        going: &mut Going<'_>,
    ) -> Result<(), Error> {
        if self.options.repair && found.rows_different() > 0 {
            let from = (self.ids.fetch_add(1, Ordering::Relaxed), owings);
            owings = mend::repair(self.job.verify, pair, table, from, &mut found, going).await?;
        }
        self.job.end(pair, table, owings, &found, self.tell).await
    }
}
