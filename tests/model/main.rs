//! A model of commit, ledger and reconcile: all that two or three transactions, one or two repairers and some faults can do to
//! one another, state by state.
//!
//! What clients' writes become is worked out by the product (`script`); what repair decides, and what an answer to COMMIT means, are its functions too
//! (`migrate::rules`, `mirror::flight`). The order of their steps is written down here once more, as docs/protocols.md has it, over
//! rows that behave as PostgreSQL's do (`rows`).

mod breaks;
mod checker;
mod faults;
mod repair;
mod rows;
mod script;
mod state;
mod symmetry;
mod writer;

use checker::{Bounds, Report, check};
use script::{Script, Sql};
use state::{Start, World};

use breaks::Break;

const fn plain(statements: &'static [Sql]) -> Script {
    Script { statements, opaque: false }
}

/// What clients do. The first six are about one key; the last is a write out of sight, which taints.
const SCRIPTS: [Script; 13] = [
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
    Script { statements: &[Sql::Upsert(0), Sql::Delete(1)], opaque: true },
];

const INSERT: usize = 0;
const UPDATE: usize = 1;
const DELETE: usize = 2;
const RESET: usize = 3;
const REKEY: usize = 6;
const OPAQUE: usize = 12;

/// One row, or none.
const ROWS: [[u8; 2]; 2] = [[1, 0], [0, 0]];

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
    ROWS.iter().flat_map(|&rows| chosen.iter().map(move |scripts| Start { rows, scripts: scripts.clone() })).collect()
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
    let three = World { symmetric: true, ..world(starts(3, [INSERT, UPDATE, DELETE, REKEY]), 1, 1) };
    holds("three writers, one fault", &three, STATES);
}

/// Where the lack of a rule shows: who writes, over a row or none, how many repairers, how many faults. None: it does not show.
fn stage(rule: Break) -> Option<(&'static [usize], usize, usize, u8)> {
    Some(match rule {
        Break::DebtsAfterCommit | Break::FlushBeforeAnswer | Break::FlushOfNothing => (&[INSERT, UPDATE], 0, 1, 0),
        Break::ImagesAfterCommit | Break::ClearByRange | Break::ClearByKey => (&[INSERT, DELETE], 0, 1, 0),
        Break::DeleteOnce | Break::NoSecondTry | Break::NoWait => (&[INSERT, DELETE], 1, 1, 0),
        Break::WalkAtOnce => (&[8, OPAQUE], 1, 1, 0),
        Break::CompareUnlocked => (&[UPDATE, RESET], 0, 1, 0),
        Break::AnyIncarnation | Break::AskAcrossIncarnations | Break::CommitNotDurable => (&[INSERT, UPDATE], 0, 1, 1),
        Break::CommitWithImages | Break::UnknownIsCommitted | Break::TagUnread => (&[INSERT, UPDATE], 0, 1, 1),
        Break::SkippedIsPaid | Break::WriteUnlocked => (&[UPDATE, UPDATE], 0, 1, 1),
        Break::NoSecondLook => (&[INSERT, DELETE], 0, 1, 1),
        Break::NoRoundTrip => (&[UPDATE, UPDATE], 0, 1, 2),
        Break::CommitPipelined => (&[INSERT, DELETE], 0, 1, 2),
        Break::NoJobsLock => (&[INSERT, DELETE], 1, 2, 2),
        Break::PayInFlight => return None,
    })
}

#[test]
fn every_rule_is_needed() {
    for rule in Break::ALL {
        let Some((scripts, rows, repairs, faults)) = stage(rule) else { continue };
        let starts = vec![Start { rows: ROWS[rows], scripts: scripts.to_vec() }];
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

#[test]
fn probe() {
    let var = |name: &str, default: usize| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (from, to) = (var("FROM", 0), var("TO", 6));
    let list = std::env::var("LIST")
        .map_or((from..to).collect::<Vec<_>>(), |list| list.split(',').map(|n| n.parse().unwrap()).collect());
    let mut world = world(starts(var("WRITERS", 2), list), 1, var("FAULTS", 1) as u8);
    world.symmetric = var("SYMMETRIC", 0) == 1;
    world.repairs = var("REPAIRS", 1);
    if std::env::var("BREAKS").is_ok() {
        for rule in Break::ALL
            .into_iter()
            .filter(|rule| std::env::var("ONLY").map_or(true, |only| only.contains(&format!("{rule:?}"))))
        {
            world.broken = Some(rule);
            let report = check(&world, EVERYTHING);
            let found = report.violation.map(|v| {
                let rows = v.trace[0].split("committed: ").skip(1).take(2).map(|s| &s[..1]).collect::<String>();
                let scripts = v.trace[0].split("script: ").skip(1).map(|s| s[..2].to_owned()).collect::<String>();
                format!("{} steps, rows {rows} scripts {scripts}: {}", v.trace.len() - 2, v.what)
            });
            println!("{rule:?}: {} states, {found:?}", report.states);
        }
        return;
    }
    let begun = std::time::Instant::now();
    let report = check(&world, Bounds { progress: var("PROGRESS", 0) == 1, ..EVERYTHING });
    told("probe", &report);
    println!("{:?}", begun.elapsed());
}
