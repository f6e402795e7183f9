//! Verify (D7, D8): whether both sides hold the same rows, while clients write.
//!
//! A table is gone through in ranges of the authority's key. `look` has each side hash its rows of the range, and where the sums differ names the
//! keys whose hashes do; `settle` looks at those again under lock, and tells a difference from a row that is on its way; `mend` writes down what was
//! found, and has what differs repaired. docs/protocols.md, *Verify*, says why nothing is called different that only is on its way.

mod look;
mod mend;
mod settle;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::error::Error;
use super::link::{Pair, Settings};
use super::pace::Pace;
use super::sql::{Bounds, TableSql};
use super::walk;
use crate::catalog::{Catalog, Table};
use crate::config::Database;
use crate::ledger::debts::Values;
use crate::phase::Side;
use look::Look;
pub use mend::{Standing, standing};
pub use settle::{Difference, How};

/// What is compared with what.
pub struct Verify {
    /// The side that is authority.
    pub authority_side: Side,
    /// Its database.
    pub authority: Database,
    /// The other side's.
    pub mirror: Database,
    /// The tables.
    pub catalog: Arc<Catalog>,
    /// Number of the move that made the phase.
    pub epoch: u64,
    /// The first of a block of numbers for ledger rows that nobody else uses.
    pub first_debt: i64,
}

/// How it is done.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tables that are compared at once.
    pub jobs: usize,
    /// Rows per second at most, over all jobs.
    pub rate: Option<u64>,
    /// What differs becomes a debt, and is paid.
    pub repair: bool,
    /// A server that says nothing for this long is given up.
    pub patience: Duration,
}

/// What was found of one table.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Rows of the authority that were compared.
    pub rows: u64,
    /// How long it took.
    pub took: Duration,
    /// What differs.
    pub different: Vec<Difference>,
    /// Keys that differ and are known to: debts of their own, which stayed open all the time.
    pub owed: u64,
    /// Keys that differ while the whole table, or a range of it, is owed: nothing can be said of them.
    pub covered: u64,
    /// Keys that differ and were locked by someone all the time.
    pub busy: u64,
    /// What was mended, of `different`.
    pub repaired: u64,
}

impl Found {
    /// Every row was seen to be equal, or to be known to differ and on its way.
    pub fn is_equal(&self) -> bool {
        self.different.len() as u64 == self.repaired && self.covered == 0 && self.busy == 0
    }
}

/// Compares these tables, which have keys. What was found of each is told as soon as it is. Err: the first that failed.
pub async fn run(
    verify: &Verify,
    tables: &[Arc<Table>],
    options: &Options,
    tell: &(dyn Fn(&Table, &Found) + Send + Sync),
) -> Result<(), Error> {
    let queue: Mutex<VecDeque<Arc<Table>>> = Mutex::new(tables.iter().cloned().collect());
    let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop_front();
    let pace = Pace::new(options.rate, Instant::now());
    let ids = AtomicI64::new(verify.first_debt);
    let worker = async || {
        while let Some(table) = next() {
            let mut pair = open(verify, options).await?;
            let begun = Instant::now();
            let owings = mend::owings(&mut pair, &table).await?;
            let mut found = compare(&mut pair, &table, &pace).await?;
            found.took = begun.elapsed();
            if options.repair && !found.different.is_empty() {
                let id = ids.fetch_add(1, Ordering::Relaxed);
                mend::repair(verify, &mut pair, &table, id, &mut found).await?;
            }
            mend::record(&mut pair, &table, verify.epoch, owings, &found).await?;
            tell(&table, &found);
        }
        Ok(())
    };
    let jobs = (0..options.jobs.clamp(1, tables.len().max(1))).map(|_| worker());
    futures_util::future::try_join_all(jobs).await.map(drop)
}

async fn open(verify: &Verify, options: &Options) -> Result<Pair, Error> {
    let side = verify.authority_side;
    let connect = async |side: Side, database: &Database| {
        let connected = database.connect("crossfade verify").await;
        connected.map_err(|error| Error::Broken { side, doing: "connecting", message: error.to_string() })
    };
    let (authority, mirror) = (connect(side, &verify.authority).await?, connect(side.other(), &verify.mirror).await?);
    let settings = Settings { patience: options.patience, ..Settings::default() };
    let pair = Pair::new(side, authority, mirror, settings).await?;
    for link in [&pair.authority, &pair.mirror] {
        link.batch("setting how values are written", look::SETTINGS).await?;
    }
    Ok(pair)
}

/// Rows of the first range, and of one at most.
const FIRST: usize = 1000;
const ROWS_MOST: usize = 50_000;
/// A range is to be hashed in this time.
const RANGE: Duration = Duration::from_millis(300);

/// Goes through one table.
async fn compare(pair: &mut Pair, table: &Table, pace: &Pace) -> Result<Found, Error> {
    let alike = walk::order_alike(pair, table).await?;
    let look = Look::new(table, pair.authority.side, alike, look::same_encoding(pair).await?);
    let mut found = Found::default();
    let (mut left, mut rows) = (Bounds::default(), FIRST);
    loop {
        let begun = Instant::now();
        let range = look.range(pair, &left, rows.min(pace.rows_max())).await?;
        let seen = look.compare(pair, &range).await?;
        found.rows += seen.rows;
        let took = begun.elapsed();
        settle::suspects(pair, table, seen.suspects, &mut found).await?;
        tokio::time::sleep(pace.after(seen.rows as usize, Instant::now())).await;
        let by_time = (rows as f64 * RANGE.as_secs_f64() / took.as_secs_f64().max(1e-6)) as usize;
        rows = by_time.clamp(rows / 4, rows * 4).clamp(16, ROWS_MOST);
        left.after = range.upto;
        if left.after.is_none() {
            break;
        }
    }
    if !alike {
        extra(pair, table, pace, &mut found).await?;
    }
    Ok(found)
}

/// Rows that only the mirror has, where its order is another: all its keys are asked for on the authority.
async fn extra(pair: &mut Pair, table: &Table, pace: &Pace, found: &mut Found) -> Result<(), Error> {
    let mut page = walk::Page::new(Bounds::default());
    loop {
        let limits = (pair.settings.chunk_rows.min(pace.rows_max()), usize::MAX);
        let keys = page.next(&mut pair.mirror, table, limits).await?;
        if keys.is_empty() {
            return Ok(());
        }
        let count = keys.len();
        let mut keys: Vec<Option<Values>> =
            keys.into_iter().map(|key| Some(super::across::key_across(table, pair.mirror.side, key))).collect();
        let here = TableSql::new(table, pair.authority.side);
        let asked: Vec<&Values> = keys.iter().flatten().collect();
        let answers =
            super::reconcile::ask(&mut pair.authority, "looking for rows", &here, &here.exist(), &asked).await?;
        for (at, _) in answers {
            keys[at] = None;
        }
        settle::suspects(pair, table, keys.into_iter().flatten().collect(), found).await?;
        tokio::time::sleep(pace.after(count, Instant::now())).await;
    }
}
