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
mod writer;

use checker::{Bounds, Report, check};
use script::{Script, Sql};
use state::{Start, World};

use breaks::Break;

const fn plain(statements: &'static [Sql]) -> Script {
    Script { statements, opaque: false }
}

/// Transactions about one key.
const ONE_KEY: [Script; 6] = [
    plain(&[Sql::Insert(0)]),
    plain(&[Sql::Update(0)]),
    plain(&[Sql::Delete(0)]),
    plain(&[Sql::Reset(0)]),
    plain(&[Sql::Upsert(0)]),
    plain(&[Sql::Delete(0), Sql::Insert(0)]),
];

/// Transactions about two keys.
const TWO_KEYS: [Script; 6] = [
    plain(&[Sql::Rekey(0, 1)]),
    plain(&[Sql::Rekey(1, 0)]),
    plain(&[Sql::Update(0), Sql::Upsert(1)]),
    plain(&[Sql::Delete(1), Sql::Upsert(0)]),
    plain(&[Sql::Delete(0), Sql::Delete(1)]),
    plain(&[Sql::Upsert(0), Sql::Rekey(0, 1)]),
];

/// A write out of sight: a taint.
const OPAQUE: Script = Script { statements: &[Sql::Upsert(0), Sql::Delete(1)], opaque: true };

/// Every choice of so many of these scripts, in every order of rows.
fn starts(writers: usize, scripts: std::ops::Range<usize>, rows: &[[u8; 2]]) -> Vec<Start> {
    let mut chosen: Vec<Vec<usize>> = vec![vec![]];
    for _ in 0..writers {
        let longer = |choice: &Vec<usize>| {
            let from = choice.last().copied().unwrap_or(scripts.start);
            (from..scripts.end).map(|script| [choice.clone(), vec![script]].concat()).collect::<Vec<_>>()
        };
        chosen = chosen.iter().flat_map(longer).collect();
    }
    rows.iter().flat_map(|&rows| chosen.iter().map(move |scripts| Start { rows, scripts: scripts.clone() })).collect()
}

const EVERYTHING: Bounds = Bounds { states: usize::MAX, progress: false };

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
fn probe() {
    let var = |name: &str, default: usize| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let scripts = [&ONE_KEY[..], &TWO_KEYS[..], &[OPAQUE]].concat();
    let (from, to) = (var("FROM", 0), var("TO", 6));
    let mut world = World::new(scripts, starts(var("WRITERS", 2), from..to, &[[1, 0], [0, 0]]));
    world.faults = var("FAULTS", 1) as u8;
    world.repairs = var("REPAIRS", 1);
    if std::env::var("BREAKS").is_ok() {
        for rule in Break::ALL {
            world.broken = Some(rule);
            let report = check(&world, EVERYTHING);
            let found = report.violation.map(|v| format!("{} steps: {}", v.trace.len() - 2, v.what));
            println!("{rule:?}: {} states, {found:?}", report.states);
        }
        return;
    }
    let begun = std::time::Instant::now();
    let report = check(&world, Bounds { progress: var("PROGRESS", 0) == 1, ..EVERYTHING });
    told("probe", &report);
    println!("{:?}", begun.elapsed());
}
