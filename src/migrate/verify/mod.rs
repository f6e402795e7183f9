//! Verify (D7, D8): whether both sides hold the same rows, while clients write.
//!
//! A table with a key is gone through in ranges of the authority's. `look` has each side hash its rows of the range, and where the sums differ names the
//! keys whose hashes do; `settle` looks at those again under lock, and tells a difference from a row that is on its way. `keyless` compares a table without
//! one as a whole. `mend` writes down what was found, and has what differs repaired; `position` keeps how far a look has come; `jobs` has several at work.
//! docs/protocols.md, *Verify*, says why nothing is called different that only is on its way.

mod jobs;
mod keyless;
mod look;
mod mend;
mod position;
mod settle;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::Error;
use super::link::{Pair, Settings};
use super::locks::{self, Kind};
use super::pace::{self, Pace, Strain};
use super::sql::{Bounds, TableSql};
use super::walk;
use crate::catalog::{Catalog, Table};
use crate::config::Database;
use crate::ledger::debts::Values;
use crate::phase::Side;
pub use jobs::run;
use look::Look;
pub use mend::{Standing, standing};
use position::{Beginning, Position, Runner, Since};
pub use position::{begun, installed};
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
    /// Tables, and parts of large ones, that are compared at once.
    pub jobs: usize,
    /// Rows per second at most, over all jobs.
    pub rate: Option<u64>,
    /// What differs becomes a debt, and is paid; a table without a key is copied again, with its writers held up.
    pub repair: bool,
    /// Goes on where an earlier run was ended.
    pub resume: bool,
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
    /// More differs than is listed there.
    pub at_least: bool,
    /// Keys that differ and are known to: debts of their own, which stayed open all the time.
    pub owed: u64,
    /// Keys that differ while the whole table, or a range of it, is owed: nothing can be said of them.
    pub covered: u64,
    /// Keys that differ and were locked by someone all the time.
    pub busy: u64,
    /// Rows that were mended, of those that differed.
    pub repaired: u64,
    /// Why nothing could be seen of it.
    pub unseen: Option<String>,
    /// An earlier run had compared all of it, and it was equal.
    pub before: bool,
}

impl Found {
    /// Every row was seen to be equal, or to be known to differ and on its way.
    pub fn is_equal(&self) -> bool {
        self.rows_different() == self.repaired
            && !self.at_least
            && self.covered == 0
            && self.busy == 0
            && self.unseen.is_none()
    }

    /// What was found of one part of a table, and of the next.
    fn and(mut self, next: Found) -> Found {
        self.rows += next.rows;
        self.different.extend(next.different);
        self.at_least |= next.at_least;
        (self.owed, self.covered, self.busy) =
            (self.owed + next.owed, self.covered + next.covered, self.busy + next.busy);
        self
    }

    /// All that differed is equal now.
    fn mended(&mut self) {
        (self.repaired, self.at_least) = (self.rows_different(), false);
    }

    /// Rows that differ, or differed before they were mended.
    pub fn rows_different(&self) -> u64 {
        self.different.iter().map(|difference| difference.how.rows()).sum()
    }
}

/// What happens, for progress bars, lines and metrics.
#[derive(Debug)]
pub enum Event<'a> {
    /// So many more rows of a table, by its number, were compared.
    Rows {
        /// The table's number.
        table: u32,
        /// How many, since the last time.
        rows: u64,
    },
    /// A table is done.
    Table {
        /// Which.
        table: &'a Table,
        /// What was found.
        found: &'a Found,
        /// The same number of rows differs as when it was looked at last.
        known: bool,
    },
}

type Tell<'a> = &'a (dyn Fn(Event<'_>) + Send + Sync);

/// How a proxy verifies in the background.
pub struct Background {
    /// The share of the time that it may work, from 0 to 1.
    pub share: f64,
    /// A server that says nothing for this long is given up.
    pub patience: Duration,
}

/// Compares all tables once, the one first that was not compared for longest, one at a time, and repairs nothing. False: another process does. An earlier
/// pass that was ended goes on where it was.
pub async fn pass(verify: &Verify, how: &Background, tell: Tell<'_>) -> Result<bool, Error> {
    let mut pair = open(verify, how.patience).await?;
    if !locks::take(&mut pair, Kind::Verify, &[0]).await? {
        return Ok(false);
    }
    let seen = standing(&pair.authority.client).await;
    let seen = seen.map_err(|error| Error::from_driver(verify.authority_side, "reading what was verified", &error))?;
    let mut tables: Vec<&Arc<Table>> = verify.catalog.tables.values().filter(|table| table.opaque.is_none()).collect();
    let at = |table: &Table| seen.get(&table.number).map_or(f64::NEG_INFINITY, |seen| seen.at);
    tables.sort_by(|one, other| at(one).total_cmp(&at(other)).then_with(|| one.number.cmp(&other.number)));
    let (job, mut failed) = (Job { verify, runner: Runner::Proxy, resume: true }, None);
    for table in tables {
        let tempo = Tempo::Beside { share: how.share, strain: Strain::default() };
        if let Err(error) = job.beside(&mut pair, table, how.share, &mut Going::new(tempo, tell)).await {
            pair.abandon().await;
            // One that cannot be compared must not keep the others from it.
            if !error.is_about_a_table() || pair.is_broken() {
                return Err(error);
            }
            failed.get_or_insert(error);
        }
    }
    failed.map_or(Ok(true), Err)
}

/// Who looks at tables, and whether an earlier look of his counts.
struct Job<'a> {
    verify: &'a Verify,
    runner: Runner,
    resume: bool,
}

impl Job<'_> {
    /// Where a look at a table begins, with so many parts at most, and how often something of the table had been owed then.
    async fn begin(&self, pair: &mut Pair, table: &Table, parts: usize) -> Result<(i64, Beginning), Error> {
        let owings = mend::owings(pair, table).await?;
        Ok((owings, Beginning::of(pair, table, self.since(owings), self.resume, parts).await?))
    }

    fn since(&self, owings: i64) -> Since {
        Since { runner: self.runner, epoch: self.verify.epoch, owings }
    }

    /// Looks at a table: what was found, and how often something of it had been owed when the look began.
    async fn look(&self, pair: &mut Pair, table: &Table, going: &mut Going<'_>) -> Result<(Found, i64), Error> {
        let begun = Instant::now();
        let (owings, beginning) = self.begin(pair, table, 1).await?;
        let mut found = match beginning {
            Beginning::Over(rows) => Found { rows, before: true, ..Found::default() },
            Beginning::Parts(_) if table.key.is_none() => {
                let same_encoding = look::same_encoding(pair).await?;
                keyless::compare(pair, table, same_encoding, going).await?
            }
            Beginning::Parts(parts) => {
                let mut found = Found::default();
                for part in parts {
                    found = found.and(compare(pair, (table, self.runner), part, going).await?);
                }
                extra(pair, table, going, &mut found).await?;
                found
            }
        };
        found.took = begun.elapsed();
        Ok((found, owings))
    }

    /// One table of a pass.
    async fn beside(&self, pair: &mut Pair, table: &Table, share: f64, going: &mut Going<'_>) -> Result<(), Error> {
        let (found, owings) = self.look(pair, table, going).await?;
        self.end(pair, table, owings, &found, going.tell).await?;
        if table.key.is_none() {
            // It was compared at one moment, without a rest.
            tokio::time::sleep(pace::rest(share, found.took)).await;
        }
        Ok(())
    }

    /// Writes down what was found, and tells of it.
    async fn end(
        &self,
        pair: &mut Pair,
        table: &Table,
        owings: i64,
        found: &Found,
        tell: Tell<'_>,
    ) -> Result<(), Error> {
        let known = found.before || mend::record(pair, table, self, owings, found).await?;
        tell(Event::Table { table, found, known });
        Ok(())
    }
}

/// What a process's sessions are called on the servers.
const NAME: &str = "crossfade verify";

async fn open(verify: &Verify, patience: Duration) -> Result<Pair, Error> {
    let settings = Settings { patience, settle: patience, ..Settings::default() };
    let pair = Pair::open(verify.authority_side, (&verify.authority, &verify.mirror), NAME, settings).await?;
    for link in [&pair.authority, &pair.mirror] {
        link.batch("setting how values are written", look::SETTINGS).await?;
    }
    Ok(pair)
}

/// How fast it goes.
enum Tempo<'a> {
    /// As fast as it can, or as was asked for.
    Asked(&'a Pace),
    /// For a share of the time, and less where the authority suffers.
    Beside { share: f64, strain: Strain },
}

/// How it goes from range to range, and whom it tells.
struct Going<'a> {
    tempo: Tempo<'a>,
    tell: Tell<'a>,
    /// The table that it was at last, and the rows of the range that would have come next there.
    last: (u32, usize),
}

/// A commit that flushes, as clients' do: how long it takes says how the server is.
const COMMIT: &str = "BEGIN; SET LOCAL synchronous_commit = on; UPDATE crossfade.flush SET n = n + 1; COMMIT";

impl<'a> Going<'a> {
    fn new(tempo: Tempo<'a>, tell: Tell<'a>) -> Going<'a> {
        Going { tempo, tell, last: (0, 0) }
    }

    /// Rows of the first range of a part of that table.
    fn first(&self, table: u32) -> usize {
        if self.last.0 == table { self.last.1 } else { FIRST }
    }

    fn rows_max(&self) -> usize {
        match &self.tempo {
            Tempo::Asked(pace) => pace.rows_max(),
            Tempo::Beside { .. } => usize::MAX,
        }
    }

    /// Rows were compared. Returns how long to wait because of a rate.
    fn rows(&self, table: u32, rows: usize) -> Duration {
        (self.tell)(Event::Rows { table, rows: rows as u64 });
        match &self.tempo {
            Tempo::Asked(pace) => pace.after(rows, Instant::now()),
            Tempo::Beside { .. } => Duration::ZERO,
        }
    }

    /// Behind a range of so many rows that took so long.
    async fn rest(&mut self, pair: &mut Pair, table: u32, rows: usize, took: Duration) -> Result<(), Error> {
        let mut pause = self.rows(table, rows);
        if let Tempo::Beside { share, strain } = &mut self.tempo {
            let rest = pace::rest(*share, took);
            let begun = Instant::now();
            pair.authority.batch("looking how the server is", COMMIT).await?;
            pause = rest + strain.after(begun.elapsed(), took + rest);
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// Rows of the first range, and of one at most: what differs is looked for in its range again, and a large one costs more than many small ones save.
const FIRST: usize = 1000;
const ROWS_MOST: usize = 32_000;
/// A range is to be hashed in this time.
const RANGE: Duration = Duration::from_millis(300);

/// Goes through one part of a table with a key, from where an earlier look has come to.
async fn compare(
    pair: &mut Pair,
    (table, runner): (&Table, Runner),
    mut position: Position,
    going: &mut Going<'_>,
) -> Result<Found, Error> {
    let mut found = Found { rows: position.rows, ..Found::default() };
    if position.done {
        return Ok(found);
    }
    let alike = walk::order_alike(pair, table).await?;
    let look = Look::new(table, pair.authority.side, alike, look::same_encoding(pair).await?);
    let (mut left, mut rows) = (position.left(), going.first(table.number));
    loop {
        let begun = Instant::now();
        let (range, last) = look.range(pair, &left, rows.min(going.rows_max())).await?;
        let seen = look.compare(pair, &range).await?;
        found.rows += seen.rows;
        let took = begun.elapsed();
        settle::suspects(pair, table, seen.suspects, &mut found).await?;
        if let Some(upto) = range.upto.as_ref().filter(|_| !last) {
            position.keep(pair, (table, runner), &found, upto).await?;
        }
        left.after = range.upto;
        going.rest(pair, table.number, seen.rows as usize, took).await?;
        let by_time = (rows as f64 * RANGE.as_secs_f64() / took.as_secs_f64().max(1e-6)) as usize;
        rows = by_time.clamp(rows / 4, rows * 4).clamp(16, ROWS_MOST);
        if last {
            going.last = (table.number, rows);
            position.end(pair, (table, runner), &found).await?;
            return Ok(found);
        }
    }
}

/// Rows that only the mirror has, where its order is another: all its keys are asked for on the authority.
async fn extra(pair: &mut Pair, table: &Table, going: &mut Going<'_>, found: &mut Found) -> Result<(), Error> {
    if walk::order_alike(pair, table).await? {
        return Ok(());
    }
    let mut page = walk::Page::new(Bounds::default());
    loop {
        let begun = Instant::now();
        let limits = (pair.settings.chunk_rows.min(going.rows_max()), usize::MAX);
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
        going.rest(pair, table.number, count, begun.elapsed()).await?;
    }
}
