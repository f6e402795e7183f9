//! Tables without a key (O5): both sides as multisets of rows, in two snapshots of one moment.
//!
//! No row has a name there, so none can be looked at again, and sums that were taken one after the other prove nothing: of two clicks that look alike one
//! may be missing and the other have come in between. So the table is at rest on both sides for a moment, in which each side takes a snapshot
//! ([`at_rest`]); then writers go on, and both are read for as long as it takes. A row's name is the hash of its text: equal rows are counted.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::super::copy::{busy, debts_of};
use super::super::error::{Error, Meaning};
use super::super::gone::wait_for_writers;
use super::super::link::{Link, Pair};
use super::super::locks::{self, Kind};
use super::super::payable::State;
use super::super::sql::TableSql;
use super::look::{in_same_bytes, row_text};
use super::settle::{Difference, How};
use super::{Found, Going};
use crate::catalog::{Sides, Table};
use crate::phase::Side;

/// Two hashes of a row's text, with seeds of their own: equal sums of both are no accident.
type Hash = (i64, i64);

/// Rows are counted and summed in so many buckets, by their hash: a difference is looked for in its bucket only.
const BUCKETS: usize = 1024;
/// Hashes of rows that are held in memory at once.
const HELD: u64 = 1_000_000;
/// Different texts of rows that are listed at most.
const LISTED: usize = 10_000;
/// Characters of a row that are shown.
const SHOWN: usize = 2000;
/// Before the table is tried to be had at rest again: writers that wait go first.
const AGAIN: Duration = Duration::from_millis(100);
/// How often it is asked whether somebody waits for the table: whoever truncates or alters it, and all behind him, wait until it is read.
const ASK: Duration = Duration::from_millis(250);
/// Rows that are fetched at once, and with their texts.
const FETCHED: usize = 65_536;
const FETCHED_SHOWN: usize = 1024;
/// A fetch is to take this time.
const FETCH: Duration = Duration::from_millis(300);

/// Compares the table's rows. Where it is never at rest, or always wanted, nothing is known: `Found::unseen` says why. Tries for as long as
/// `settings.settle`; each try holds writers up for a moment.
pub(super) async fn compare(
    pair: &mut Pair,
    table: &Table,
    same_encoding: bool,
    going: &mut Going<'_>,
) -> Result<Found, Error> {
    let begun = Instant::now();
    loop {
        let mut found = Found::default();
        let error = match once(pair, table, same_encoding, &mut found, going).await {
            Ok(()) => return Ok(found),
            Err(error) => error,
        };
        pair.abandon().await;
        if error.meaning() != Meaning::Busy || pair.is_broken() {
            return Err(error);
        }
        if begun.elapsed() > pair.settings.settle {
            return Ok(Found { unseen: Some(format!("it was in use all the time ({error})")), ..Found::default() });
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn once(
    pair: &mut Pair,
    table: &Table,
    same_encoding: bool,
    found: &mut Found,
    going: &mut Going<'_>,
) -> Result<(), Error> {
    let owed = at_rest(pair, table).await?;
    Snapshots { pair: &mut *pair, table, same_encoding, asked: Instant::now() }.look(found, going).await?;
    pair.authority.rollback().await?;
    pair.mirror.rollback().await?;
    if owed {
        found.covered = found.different.drain(..).map(|difference| difference.how.rows()).sum();
    }
    Ok(())
}

/// Opens a snapshot on each side, in which the two hold the same rows but for what differs, and what is owed. True: something of the table was owed then.
/// No other job has the table meanwhile, so that none pays what it owes.
async fn at_rest(pair: &mut Pair, table: &Table) -> Result<bool, Error> {
    if !locks::take(pair, Kind::Table, &[table.number]).await? {
        return Err(busy(pair, "another job works on the table".to_owned()));
    }
    let opened = open(pair, table).await;
    if opened.is_err() {
        pair.abandon().await;
    }
    if !pair.is_broken() {
        locks::release(pair, Kind::Table, &[table.number]).await?;
    }
    opened
}

/// Neither takes the snapshot of its transaction yet.
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL enable_seqscan = on";

async fn open(pair: &mut Pair, table: &Table) -> Result<bool, Error> {
    let incarnation = pair.incarnation().await?;
    let only = TableSql::new(table, pair.authority.side).only();
    // With the lock goes the savepoint, and the snapshot stays.
    let lock = format!("{BEGIN}; SAVEPOINT crossfade_rest; LOCK TABLE {only} IN SHARE MODE");
    pair.authority.batch("locking the table", &lock).await?;
    // Who wrote it there has ended; what carries his rows here has been executed before, and ends now.
    if let Err(holders) = wait_for_writers(&mut pair.mirror, table, pair.wait * 2).await? {
        return Err(busy(pair, format!("transactions {} stay open", holders.join(", "))));
    }
    for (link, text) in [(&pair.mirror, format!("{BEGIN}; SELECT 1")), (&pair.authority, "SELECT 1".to_owned())] {
        link.batch("taking a snapshot", &text).await?;
    }
    let entries = debts_of(pair, &[table], &incarnation).await?;
    if entries.iter().any(|entry| entry.state == State::InFlight) {
        return Err(busy(pair, "transactions that owe it something are in flight on the mirror".to_owned()));
    }
    pair.authority.batch("letting writers go on", "ROLLBACK TO crossfade_rest").await?;
    Ok(entries.iter().any(|entry| entry.state == State::Payable))
}

/// What one side holds of a bucket: the sums are of hashes, and overflow never.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Bucket {
    rows: u64,
    sums: (u128, u128),
}

impl Bucket {
    fn add(&mut self, hash: Hash) {
        self.rows += 1;
        self.sums.0 += u128::from(hash.0 as u64);
        self.sums.1 += u128::from(hash.1 as u64);
    }
}

fn bucket(hash: Hash) -> usize {
    hash.0 as u64 as usize % BUCKETS
}

/// Which rows are read.
enum Among<'a> {
    All,
    /// Those in these buckets.
    Buckets(&'a [(usize, u64)]),
    /// Those of these hashes, with their texts.
    Named(&'a [(Hash, [u64; 2])]),
}

impl Among<'_> {
    /// Their hashes are `h` and `g`.
    fn condition(&self) -> String {
        let list = |numbers: Vec<String>| format!("ANY ('{{{}}}'::pg_catalog.int8[])", numbers.join(","));
        match self {
            Among::All => "true".to_owned(),
            Among::Buckets(buckets) => {
                let buckets = list(buckets.iter().map(|(at, _)| at.to_string()).collect());
                format!("h & {} = {buckets}", BUCKETS - 1)
            }
            Among::Named(rows) => format!("h = {}", list(rows.iter().map(|(hash, _)| hash.0.to_string()).collect())),
        }
    }

    fn shows_texts(&self) -> bool {
        matches!(self, Among::Named(_))
    }

    /// A cursor of its own for each form of answer: FETCH is prepared.
    fn cursor(&self) -> &'static str {
        if self.shows_texts() { "crossfade_texts" } else { "crossfade_rows" }
    }

    fn fetched(&self) -> usize {
        if self.shows_texts() { FETCHED_SHOWN } else { FETCHED }
    }
}

/// Both sides at one moment.
struct Snapshots<'a> {
    pair: &'a mut Pair,
    table: &'a Table,
    same_encoding: bool,
    /// When it was asked last who waits for the table.
    asked: Instant,
}

impl Snapshots<'_> {
    /// For so long, unless somebody wants the table as a whole: then it is read again later.
    async fn rest(&mut self, pause: Duration) -> Result<(), Error> {
        let until = Instant::now() + pause;
        loop {
            if self.asked.elapsed() >= ASK {
                self.asked = Instant::now();
                if wanted(&mut self.pair.authority, self.table).await?
                    || wanted(&mut self.pair.mirror, self.table).await?
                {
                    return Err(busy(self.pair, "somebody wants the table for himself".to_owned()));
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            tokio::time::sleep(left.min(ASK)).await;
        }
    }

    async fn look(&mut self, found: &mut Found, going: &mut Going<'_>) -> Result<(), Error> {
        let mut sides = [vec![Bucket::default(); BUCKETS], vec![Bucket::default(); BUCKETS]];
        let number = self.table.number;
        self.read(&Among::All, &mut |here, rows| {
            let side = &mut sides[usize::from(!here)];
            rows.iter().for_each(|(hash, _)| side[bucket(*hash)].add(*hash));
            if here { going.rows(number, rows.len()) } else { Duration::ZERO }
        })
        .await?;
        found.rows = sides[0].iter().map(|bucket| bucket.rows).sum();
        let differ: Vec<(usize, u64)> = (0..BUCKETS)
            .filter(|&at| sides[0][at] != sides[1][at])
            .map(|at| (at, sides[0][at].rows + sides[1][at].rows))
            .collect();
        let mut counts: Vec<(Hash, [u64; 2])> = Vec::new();
        let mut left = &differ[..];
        while !left.is_empty() && counts.len() < LISTED {
            let (some, rest) = left.split_at(fitting(left));
            counts.extend(self.count(some).await?);
            left = rest;
        }
        found.at_least = !left.is_empty() || counts.len() > LISTED;
        counts.truncate(LISTED);
        found.different = self.name(counts).await?;
        Ok(())
    }

    /// How often each row of these buckets is on the two sides, where that is not the same.
    async fn count(&mut self, buckets: &[(usize, u64)]) -> Result<Vec<(Hash, [u64; 2])>, Error> {
        let mut counts: HashMap<Hash, [u64; 2]> = HashMap::new();
        self.read(&Among::Buckets(buckets), &mut |here, rows| {
            for (hash, _) in rows {
                counts.entry(*hash).or_default()[usize::from(!here)] += 1;
            }
            Duration::ZERO
        })
        .await?;
        let mut differ: Vec<_> = counts.into_iter().filter(|(_, [here, there])| here != there).collect();
        differ.sort_unstable();
        Ok(differ)
    }

    /// The texts of these rows.
    async fn name(&mut self, counts: Vec<(Hash, [u64; 2])>) -> Result<Vec<Difference>, Error> {
        if counts.is_empty() {
            return Ok(Vec::new());
        }
        let mut texts: HashMap<Hash, String> = HashMap::new();
        self.read(&Among::Named(&counts), &mut |_, rows| {
            for (hash, text) in rows {
                texts.entry(*hash).or_insert_with(|| text.clone().unwrap_or_default());
            }
            Duration::ZERO
        })
        .await?;
        let authority = self.pair.authority.side;
        let mut different: Vec<Difference> = counts
            .into_iter()
            .map(|(hash, [here, there])| {
                let mut sides = Sides::default();
                (*sides.get_mut(authority), *sides.get_mut(authority.other())) = (here, there);
                let shown = vec![texts.remove(&hash).unwrap_or_default()];
                Difference { key: Vec::new(), shown, how: How::Count(sides) }
            })
            .collect();
        different.sort_by(|one, other| one.shown.cmp(&other.shown));
        Ok(different)
    }

    /// Reads rows of both sides, a piece of each at a time.
    async fn read(&mut self, among: &Among<'_>, each: Each<'_>) -> Result<(), Error> {
        for side in Side::BOTH {
            let text = self.declare(side, among);
            let link = if side == self.pair.authority.side { &self.pair.authority } else { &self.pair.mirror };
            link.batch("reading the table", &text).await?;
        }
        let (mut rows, mut open) = (among.fetched().min(1024), [true, true]);
        while open.contains(&true) {
            let begun = Instant::now();
            let (ours, theirs) = futures_util::future::try_join(
                fetch(&mut self.pair.authority, rows, among, open[0]),
                fetch(&mut self.pair.mirror, rows, among, open[1]),
            )
            .await?;
            let took = begun.elapsed();
            open = [ours.len() == rows, theirs.len() == rows];
            let pause = each(true, &ours) + each(false, &theirs);
            self.rest(pause).await?;
            // A power of two: each number of rows is a statement of its own.
            rows = match took {
                took if took < FETCH / 2 => (rows * 2).min(among.fetched()),
                took if took > FETCH * 2 => (rows / 2).max(1),
                _ => rows,
            };
        }
        for link in [&self.pair.authority, &self.pair.mirror] {
            link.batch("reading the table", "CLOSE ALL").await?;
        }
        Ok(())
    }

    /// The text of a row is made once: OFFSET 0 keeps the planner from putting it in the place of each hash.
    fn declare(&self, side: Side, among: &Among<'_>) -> String {
        let shown = if among.shows_texts() { format!(", pg_catalog.left(s, {SHOWN})") } else { String::new() };
        format!(
            "DECLARE {} NO SCROLL CURSOR FOR SELECT h, g{shown} FROM (SELECT pg_catalog.hashtextextended(x, 0) AS h, \
             pg_catalog.hashtextextended(x, 7046029254386353131) AS g, s FROM (SELECT {} AS x, s FROM (SELECT {} AS s FROM {} AS t OFFSET 0) AS a OFFSET 0) AS b \
             OFFSET 0) AS c WHERE {}",
            among.cursor(),
            in_same_bytes("s", self.same_encoding),
            row_text(self.table, side),
            TableSql::new(self.table, side).only(),
            among.condition()
        )
    }
}

/// A row: its hashes, and its text where that is read.
type Read = (Hash, Option<String>);

/// Is told rows of one side (true: the authority's), and says how long to wait.
type Each<'a> = &'a mut (dyn FnMut(bool, &[Read]) -> Duration + Send);

/// How many of these buckets are held in memory together.
fn fitting(buckets: &[(usize, u64)]) -> usize {
    let mut held = 0;
    let fits = |(_, rows): &&(usize, u64)| {
        held += rows;
        held <= HELD
    };
    buckets.iter().take_while(fits).count().max(1)
}

/// Somebody waits for a lock on the table that a reader is in the way of.
async fn wanted(link: &mut Link, table: &Table) -> Result<bool, Error> {
    let mut relations = vec![*table.oid.get(link.side)];
    relations.extend(table.partitions.get(link.side));
    let text = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'relation' AND NOT granted AND mode = 'AccessExclusiveLock' \
        AND relation = ANY ($1) AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
    Ok(link.rows("looking who waits for the table", text, &[&relations]).await?[0].get(0))
}

async fn fetch(link: &mut Link, rows: usize, among: &Among<'_>, open: bool) -> Result<Vec<Read>, Error> {
    if !open {
        return Ok(Vec::new());
    }
    let text = format!("FETCH {rows} FROM {}", among.cursor());
    let found = link.rows("reading the table", &text, &[]).await?;
    Ok(found.iter().map(|row| ((row.get(0), row.get(1)), among.shows_texts().then(|| row.get(2)))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_are_counted_and_none_makes_up_for_another() {
        let sum = |hashes: &[Hash]| {
            let mut bucket = Bucket::default();
            hashes.iter().for_each(|hash| bucket.add(*hash));
            bucket
        };
        let (a, b) = ((-1, 5), (i64::MIN, -7));
        assert!(sum(&[a, b, a]) == sum(&[b, a, a]), "the order is nothing");
        assert!(sum(&[a, a, b]) != sum(&[a, b, b]), "how often is all");
        assert!(sum(&[(3, 1), (1, 3)]) != sum(&[(2, 1), (2, 4)]), "one sum alone may be the same");
        assert!(sum(&vec![(-1, -1); 1000]).sums.0 == 1000 * u128::from(u64::MAX), "nothing overflows");
        assert!(bucket((-1, 0)) == BUCKETS - 1 && bucket((1024, 0)) == 0);
    }

    #[test]
    fn as_many_buckets_are_held_as_fit_and_at_least_one() {
        assert_eq!(fitting(&[(0, HELD * 9), (1, 1)]), 1);
        assert_eq!(fitting(&[(0, HELD / 2), (1, HELD / 2), (2, 1)]), 2);
        assert_eq!(fitting(&[(0, 1), (1, 1)]), 2);
    }
}
