//! A model of commit, ledger and reconcile: all that two or three transactions, one or two repairers and some faults can do to
//! one another, state by state.
//!
//! What clients' writes become is worked out by the product (`script`); what repair decides, and what an answer to COMMIT means, are its functions too
//! (`migrate::rules`, `mirror::flight`). The order of their steps is written down here once more, as docs/protocols.md has it, over
//! rows that behave as PostgreSQL's do (`rows`).

mod backfill;
mod barrier;
mod breaks;
mod checker;
mod faults;
mod gone;
mod repair;
mod rows;
mod script;
mod state;
mod symmetry;
mod writer;

use checker::{Bounds, Report, check};
use script::{GONE, Script, Sql, Way};
use state::{Start, World};

use breaks::Break;

const fn plain(statements: &'static [Sql]) -> Script {
    Script { statements, way: Way::Images }
}

/// What clients do. The first six are about one key; then two; then a write out of sight, which taints; and a backfill.
const SCRIPTS: [Script; 14] = [
    plain(&[Sql::Insert(0)]),
    plain(&[Sql::Update(0)]),
    plain(&[Sql::Delete(0)]),
    plain(&[Sql::Reset(0)]),
    plain(&[Sql::Upsert(0)]),
    plain(&[Sql::Delete(0), Sql::Insert(0)]),
    plain(&[Sql::Rekey(0, 1)]),
    plain(&[Sql::Rekey(1, 0)]),
    plain(&[Sql::Update(0), Sql::Upsert(1)]),
    plain(&[Sql::Delete(1), Sql::Upsert(0)]),
    plain(&[Sql::Delete(0), Sql::Delete(1)]),
    plain(&[Sql::Upsert(0), Sql::Rekey(0, 1)]),
    Script { statements: &[Sql::Upsert(0), Sql::Delete(1)], way: Way::Opaque },
    Script { statements: &[], way: Way::Backfill },
];

const INSERT: usize = 0;
const UPDATE: usize = 1;
const DELETE: usize = 2;
const RESET: usize = 3;
const REKEY: usize = 6;
const BOTH: usize = 8;
const CROSSED: usize = 9;
const GONE_BOTH: usize = 10;
const OPAQUE: usize = 12;
const BACKFILL: usize = 13;

/// One row, none, or two.
const ROWS: [[u8; 2]; 3] = [[1, 0], [0, 0], [1, 1]];

/// These rows on both sides; where there is a backfill, the mirror lacks the first, and its second is wrong.
fn start(rows: [u8; 2], scripts: &[usize]) -> Start {
    let mirror = if scripts.contains(&BACKFILL) { [0, GONE.min(rows[1] * GONE)] } else { rows };
    Start { rows, mirror, scripts: scripts.to_vec() }
}

/// Every choice of so many of these scripts, over a row or none.
fn starts(writers: usize, scripts: impl IntoIterator<Item = usize>) -> Vec<Start> {
    let scripts: Vec<usize> = scripts.into_iter().collect();
    let mut chosen: Vec<Vec<usize>> = vec![vec![]];
    for _ in 0..writers {
        let longer = |choice: &Vec<usize>| {
            let from = choice.last().copied().unwrap_or(0);
            let more = scripts.iter().filter(move |&&script| script >= from);
            more.map(|&script| [choice.clone(), vec![script]].concat()).collect::<Vec<_>>()
        };
        chosen = chosen.iter().flat_map(longer).collect();
    }
    ROWS[..2].iter().flat_map(|&rows| chosen.iter().map(move |scripts| start(rows, scripts))).collect()
}

/// Writers with these scripts, so many repairers, so many faults.
fn world(starts: Vec<Start>, repairs: usize, faults: u8) -> World {
    World { repairs, faults, ..World::new(SCRIPTS.to_vec(), starts) }
}

/// The full lengths are for `make proof`.
fn at_length() -> bool {
    std::env::var_os("CROSSFADE_PROOF").is_some()
}

/// Looks at all states, and whether rest can be reached from each of them.
const EVERYTHING: Bounds = Bounds { states: usize::MAX, progress: true };
/// ... without the latter, which would cost too much memory.
const STATES: Bounds = Bounds { states: usize::MAX, progress: false };

fn told(name: &str, report: &Report) {
    let Report { states, transitions, depth, exhausted, .. } = report;
    let all = if *exhausted { "all" } else { "the first" };
    println!("{name}: {all} {states} states, {transitions} transitions, depth {depth}");
    if let Some(violation) = &report.violation {
        println!("{}\n  {}", violation.what, violation.trace.join("\n  "));
    }
}

fn holds(name: &str, world: &World, bounds: Bounds) {
    let report = check(world, bounds);
    told(name, &report);
    assert!(report.violation.is_none(), "{name}: see above");
    assert!(report.exhausted, "{name}: not all states were looked at");
}

#[test]
fn two_writers_of_one_key() {
    holds("two writers, one key, one fault", &world(starts(2, 0..6), 1, 1), EVERYTHING);
}

#[test]
fn two_writers_of_two_keys() {
    holds("two writers, two keys, no fault", &world(starts(2, 0..13), 1, 0), EVERYTHING);
    holds("two writers, two keys, one fault", &world(starts(2, [DELETE, REKEY, OPAQUE]), 1, 1), EVERYTHING);
}

/// Two keys that the authority lacks go together.
#[test]
fn deletes_of_both_keys_beside_a_writer() {
    let pairs =
        [INSERT, UPDATE, BOTH, CROSSED, REKEY, GONE_BOTH, OPAQUE].map(|script| start(ROWS[2], &[script, GONE_BOTH]));
    holds("both keys deleted, a writer, one fault", &world(pairs.to_vec(), 1, 1), EVERYTHING);
}

#[test]
fn three_writers_with_a_key_change() {
    let starts = starts(3, [INSERT, DELETE, REKEY]);
    let world = World { symmetric: true, ..world(starts, 1, 0) };
    holds("three writers, no fault", &world, EVERYTHING);
}

#[test]
fn two_repairers() {
    holds("two repairers, no fault", &world(starts(2, [INSERT, DELETE, REKEY]), 2, 0), EVERYTHING);
}

/// With one row, which the mirror lacks; and with two, of which the mirror has the second, but wrong.
fn backfills(scripts: &[usize], repairs: usize, faults: u8) -> World {
    let pairs = scripts.iter().flat_map(|&script| [ROWS[0], ROWS[2]].map(|rows| start(rows, &[script, BACKFILL])));
    world(pairs.collect(), repairs, faults)
}

#[test]
fn a_backfill_beside_a_writer() {
    let scripts = [INSERT, UPDATE, DELETE, REKEY, CROSSED, GONE_BOTH, OPAQUE];
    holds("backfill, a writer, one fault", &backfills(&scripts, 1, 1), EVERYTHING);
}

#[test]
fn all_of_it() {
    if !at_length() {
        return println!("CROSSFADE_PROOF is not set");
    }
    holds("two writers, all scripts, one fault", &world(starts(2, 0..13), 1, 1), EVERYTHING);
    holds("two writers, one key, two faults", &world(starts(2, 0..6), 1, 2), EVERYTHING);
    holds("two writers, all scripts, two faults", &world(starts(2, 0..13), 1, 2), STATES);
    holds("two repairers, one key, one fault", &world(starts(2, 0..6), 2, 1), EVERYTHING);
    holds("two repairers, key change, two faults", &world(starts(2, [INSERT, DELETE, REKEY]), 2, 2), STATES);
    holds("backfill, a writer, two faults", &backfills(&(0..13).collect::<Vec<_>>(), 1, 2), STATES);
    let two: Vec<Start> = starts(2, [UPDATE, DELETE, REKEY])
        .iter()
        .map(|pair| start(ROWS[0], &[&pair.scripts[..], &[BACKFILL]].concat()))
        .collect();
    holds("backfill, two writers, one fault", &world(two.clone(), 1, 1), STATES);
    let blind = World { broken: Some(Break::XmaxUnread), ..world(two, 1, 1) };
    holds("backfill, two writers, one fault, xmax is not looked at", &blind, STATES);
    let three = World { symmetric: true, ..world(starts(3, [INSERT, UPDATE, DELETE, REKEY]), 1, 1) };
    holds("three writers, one fault", &three, STATES);
}

/// Where the lack of a rule shows: who writes, over a row or none, how many repairers, how many faults. None: it does not show.
fn stage(rule: Break) -> Option<(&'static [usize], usize, usize, u8)> {
    Some(match rule {
        Break::DebtsAfterCommit | Break::FlushBeforeAnswer | Break::FlushOfNothing => (&[INSERT, UPDATE], 0, 1, 0),
        Break::ImagesAfterCommit | Break::ClearByRange | Break::ClearByKey => (&[INSERT, DELETE], 0, 1, 0),
        Break::DeleteOnce | Break::NoSecondTry | Break::NoWait => (&[INSERT, DELETE], 1, 1, 0),
        Break::LockedIsGone | Break::OneForMany => (&[BOTH, GONE_BOTH], 2, 1, 1),
        Break::WalkAtOnce => (&[BOTH, OPAQUE], 1, 1, 0),
        Break::CompareUnlocked => (&[UPDATE, RESET], 0, 1, 0),
        Break::AnyIncarnation | Break::AskAcrossIncarnations | Break::CommitNotDurable => (&[INSERT, UPDATE], 0, 1, 1),
        Break::CommitWithImages | Break::UnknownIsCommitted | Break::TagUnread => (&[INSERT, UPDATE], 0, 1, 1),
        Break::SkippedIsPaid | Break::WriteUnlocked => (&[UPDATE, UPDATE], 0, 1, 1),
        Break::NoSecondLook => (&[INSERT, DELETE], 0, 1, 1),
        Break::NoRoundTrip => (&[UPDATE, UPDATE], 0, 1, 2),
        Break::CommitPipelined => (&[INSERT, DELETE], 0, 1, 2),
        Break::NoJobsLock => (&[INSERT, DELETE], 1, 2, 2),
        Break::NoSecondReading => (&[DELETE, BACKFILL], 0, 1, 0),
        Break::ConflictTrusted => (&[BACKFILL], 2, 1, 0),
        Break::ChunkNotAwaited | Break::NoUnion => (&[DELETE, BACKFILL], 0, 1, 1),
        Break::PayInFlight | Break::XmaxUnread => return None,
    })
}

#[test]
fn every_rule_is_needed() {
    for rule in Break::ALL {
        let Some((scripts, rows, repairs, faults)) = stage(rule) else { continue };
        if repairs > 1 && !at_length() {
            println!("without {rule:?}: millions of states, with CROSSFADE_PROOF=1 only");
            continue;
        }
        let starts = vec![start(ROWS[rows], scripts)];
        let broken = World { broken: Some(rule), ..world(starts.clone(), repairs, faults) };
        let report = check(&broken, STATES);
        let violation = report.violation.unwrap_or_else(|| panic!("{rule:?} is left out, and nothing is wrong"));
        let steps = violation.trace.len() - 2;
        println!("without {rule:?}: {} after {steps} steps ({} states)", violation.what, report.states);
        if at_length() {
            println!("  {}", violation.trace[1..=steps].join("\n  "));
        }
    }
}

/// Paying what is in flight costs waits, and nothing else: the row locks, and the wait for those who write the table, stand in its way too.
#[test]
fn paying_what_is_in_flight_is_harmless() {
    let broken = World { broken: Some(Break::PayInFlight), ..world(starts(2, [INSERT, DELETE, UPDATE]), 1, 1) };
    holds("debts in flight are paid", &broken, STATES);
}

/// A writer whose images came before the copy holds the key on the mirror, even one that it deleted (W7), until it has committed on both
/// sides, which the second reading sees by `xmin`. One that commits without its images has a debt of its own.
#[test]
fn the_second_reading_could_do_without_xmax() {
    let world =
        backfills(&[INSERT, UPDATE, DELETE, REKEY, CROSSED, GONE_BOTH, OPAQUE], 1, if at_length() { 2 } else { 1 });
    holds("xmax is not looked at", &World { broken: Some(Break::XmaxUnread), ..world }, STATES);
}
