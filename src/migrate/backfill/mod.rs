//! Backfill (D5, D6): fills the mirror with what was there before, in chunks of keys, several at once, while clients write.
//!
//! [`run`] gives each job a `lane` (sessions of its own), which takes tables and parts of tables until none is left. A part goes chunk by chunk: `chunk`
//! reads it and looks again, `load` brings it to the mirror, `position` keeps where it stands and what is owed meanwhile, `super::pace` and `standbys` say
//! how fast. `indexes` are out of the way meanwhile, where that was asked for. What does not pass the second look is left to reconcile. docs/protocols.md, *Backfill*, says why this is right.

mod chunk;
mod indexes;
mod lane;
mod load;
mod position;
mod progress;
mod standbys;

use std::sync::atomic::AtomicI64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::error::{Error, Meaning};
use super::link::{Link, Pair, Settings, connect};
use super::lives;
use super::lock;
use super::pace::Pace;
use super::queue::Queue;
use crate::catalog::{Catalog, Table};
use crate::config::Database;
use crate::phase::Side;
use indexes::Indexes;
pub use indexes::{Dropped, dropped};
use lane::{Common, Lane, Ready, Taken};
pub(super) use position::under_way;
use progress::Tally;
pub use progress::{Standing, standing};
use standbys::Standbys;

/// What is filled from what.
pub struct Backfill {
    /// The side that is authority.
    pub authority_side: Side,
    /// Its database.
    pub authority: Database,
    /// The other side's.
    pub mirror: Database,
    /// The tables.
    pub catalog: Arc<Catalog>,
    /// The first of a block of numbers for ledger rows that nobody else uses.
    pub first_debt: i64,
}

/// How it is done.
#[derive(Clone, Debug)]
pub struct Options {
    /// Parts of tables that are worked on at once.
    pub jobs: usize,
    /// Rows per second at most, over all jobs.
    pub rate: Option<u64>,
    /// Tables that owe nothing as a whole are filled all the same.
    pub enter: bool,
    /// Indexes that are not unique are dropped before a table is filled, and made again when all is copied.
    pub rebuild_indexes: bool,
    /// It rests while a standby of either side is further behind.
    pub lag: Duration,
    /// A server that says nothing for this long is given up.
    pub patience: Duration,
}

/// What happens, for progress bars and lines.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Rows of a table are done.
    Rows {
        /// The table's number.
        table: u32,
        /// How many, since the last time.
        rows: u64,
        /// How much of the table's keys is covered, from 0 to 1.
        share: f64,
    },
    /// A table is done; false: it owed nothing.
    Table {
        /// The table's number.
        table: u32,
        /// There was something to do.
        owed: bool,
    },
    /// It waits for another job, or for a session that is gone but for its backend.
    Waits {
        /// The table's number.
        table: u32,
    },
    /// Its whole-table debt is gone: another has paid it, or the phase has moved. Nothing is left to do.
    Void {
        /// The table's number.
        table: u32,
    },
    /// It waits for whoever has the table locked on the mirror.
    Shut {
        /// The table's number.
        table: u32,
    },
    /// Something was done about an index of a table on the mirror.
    Index {
        /// The table's number.
        table: u32,
        /// What.
        what: String,
    },
    /// How standbys of a side are, where that matters.
    Standbys {
        /// Whose.
        side: Side,
        /// What is about them.
        what: String,
    },
    /// A connection was lost; it goes on with a new one.
    Again {
        /// What happened.
        error: String,
    },
}

/// A piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// Find out what there is to do about a table.
    Table(u32),
    /// A part of one.
    Part(u32, i32),
}

/// What its sessions are called on the servers.
const NAME: &str = "crossfade backfill";
/// How long lost connections are opened again, without anything being done in between.
const LOST: Duration = Duration::from_secs(60);
/// Before a unit that another has is tried again.
const ELSEWHERE: Duration = Duration::from_millis(200);

/// Fills these tables. Returns when all are done; what another process works on is waited for. Err: the first job that failed for good; what was done
/// by then is kept, and nothing is cleared that is not done.
pub async fn run(
    backfill: &Backfill,
    tables: &[Arc<Table>],
    options: &Options,
    tell: &(dyn Fn(Event) + Send + Sync),
) -> Result<(), Error> {
    let queue = Queue::new(tables.iter().map(|table| Unit::Table(table.number)));
    let tally = Mutex::new(Tally::default());
    let rows = |number: u32, part: i32, rows: usize| {
        let share = lock(&tally).add(number, part, rows as u64);
        tell(Event::Rows { table: number, rows: rows as u64, share });
    };
    let ids = AtomicI64::new(backfill.first_debt);
    let standbys = Standbys::new(options.lag);
    let shut = |table: u32| tell(Event::Shut { table });
    let pace = Pace::new(options.rate, Instant::now());
    let common = Common { ids, pace, standbys: &standbys, tell: &rows, shut: &shut };
    let worker = || Worker { backfill, options, queue: &queue, tally: &tally, common: &common, tell };
    let jobs = (0..options.jobs.max(1)).map(|_| worker().work());
    tokio::select! {
        worked = futures_util::future::try_join_all(jobs) => drop(worked?),
        never = standbys.watch(backfill, tell) => match never {},
    }
    // Also what a run before this one has dropped.
    let indexes = Indexes::open(backfill, tell).await?;
    for table in tables {
        indexes.make(table).await?;
    }
    Ok(())
}

/// One job.
struct Worker<'a> {
    backfill: &'a Backfill,
    options: &'a Options,
    queue: &'a Queue<Unit>,
    tally: &'a Mutex<Tally>,
    common: &'a Common<'a>,
    tell: &'a (dyn Fn(Event) + Send + Sync),
}

impl<'a> Worker<'a> {
    async fn work(self) -> Result<(), Error> {
        let mut open: Option<Lane<'a>> = None;
        let mut lost: Option<Instant> = None;
        while let Some(unit) = self.queue.next().await {
            let worked = match &mut open {
                Some(lane) => self.unit(lane, unit).await,
                None => match self.lane().await {
                    Ok(lane) => self.unit(open.insert(lane), unit).await,
                    Err(error) => Err(error),
                },
            };
            match worked {
                Ok(more) => {
                    lost = None;
                    self.queue.later(more);
                }
                Err(error) => {
                    // With its locks.
                    open = None;
                    let since = *lost.get_or_insert_with(Instant::now);
                    let hopeless = since.elapsed() > LOST || !is_about_the_connection(&error);
                    self.queue.later([unit]);
                    if hopeless {
                        return Err(error);
                    }
                    (self.tell)(Event::Again { error: error.to_string() });
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        Ok(())
    }

    async fn lane(&self) -> Result<Lane<'a>, Error> {
        let side = self.backfill.authority_side;
        let (authority, mirror) = (&self.backfill.authority, &self.backfill.mirror);
        let settings = Settings { patience: self.options.patience, ..Settings::default() };
        let reader = Link::new(side, connect(authority, side, NAME).await?, settings.patience);
        let pair = Pair::open(side, (authority, mirror), NAME, settings).await?;
        // Also where the connection was lost meanwhile: what is found in work is made equal by deleting, too.
        lives::sure(&pair.authority.client, side).await?;
        Lane::new(pair, reader, self.common).await
    }

    /// Does one piece; gives what is to be done because of it.
    async fn unit(&self, lane: &mut Lane<'a>, unit: Unit) -> Result<Vec<Unit>, Error> {
        let (Unit::Table(number) | Unit::Part(number, _)) = unit;
        let Some(table) = self.backfill.catalog.tables.get(&number) else { return Ok(Vec::new()) };
        let Unit::Part(_, part) = unit else { return self.table(lane, table).await };
        match lane.part(table, part).await? {
            Taken::Done => {
                lock(self.tally).done(number, part);
                if lane.finish(table).await? {
                    (self.tell)(Event::Table { table: number, owed: true });
                }
                Ok(Vec::new())
            }
            Taken::Elsewhere => Ok(self.waits(unit, number).await),
            Taken::Void => {
                (self.tell)(Event::Void { table: number });
                Ok(Vec::new())
            }
        }
    }

    async fn table(&self, lane: &mut Lane<'a>, table: &Table) -> Result<Vec<Unit>, Error> {
        let number = table.number;
        match lane.ready(table, self.options.enter).await? {
            Ready::Nothing => {
                (self.tell)(Event::Table { table: number, owed: false });
                Ok(Vec::new())
            }
            Ready::Elsewhere => Ok(self.waits(Unit::Table(number), number).await),
            Ready::Parts(parts) => {
                lock(self.tally).begin(&parts);
                let left: Vec<Unit> =
                    parts.iter().filter(|part| !part.done).map(|part| Unit::Part(number, part.part)).collect();
                if self.options.rebuild_indexes && !left.is_empty() {
                    Indexes::open(self.backfill, self.tell).await?.set_aside(table).await?;
                }
                if left.is_empty() && lane.finish(table).await? {
                    (self.tell)(Event::Table { table: number, owed: true });
                }
                Ok(left)
            }
        }
    }

    async fn waits(&self, unit: Unit, number: u32) -> Vec<Unit> {
        (self.tell)(Event::Waits { table: number });
        tokio::time::sleep(ELSEWHERE).await;
        vec![unit]
    }
}

/// A new connection may do better.
fn is_about_the_connection(error: &Error) -> bool {
    match error {
        Error::Broken { .. } | Error::Stalled { .. } | Error::Reincarnated { .. } => true,
        Error::Server { code, .. } => {
            error.meaning() == Meaning::Busy || matches!(&code.code()[..2], "08" | "25" | "57")
        }
        Error::Ledger { .. } | Error::Deadline(_) | Error::Unfit(_) => false,
    }
}
