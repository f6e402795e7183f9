//! From what was seen to gates. Pure.

use std::time::Duration;

use serde_json::{Value, json};

use super::evidence::{COMPARED, Facts, TableFacts};
use super::{Gate, Name, Standing};
use crate::check::{Finding, Level};
use crate::phase::{Phase, Side};
use crate::reads::tally::Recent;

/// One step of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The phase that holds.
    pub from: Phase,
    /// The next one.
    pub to: Phase,
}

impl Step {
    /// The side that gains authority; None: it stays where it is.
    pub fn gains(self) -> Option<Side> {
        (self.from.authority() != self.to.authority()).then(|| self.to.authority())
    }

    /// Writes become mirrored.
    pub fn enters_mirror(self) -> bool {
        self.from.mirror().is_none() && self.to.mirror().is_some()
    }

    /// Away from old.
    pub fn is_forward(self) -> bool {
        self.to > self.from
    }

    /// The move writes on that side. Leaving a mirror, or keeping it, needs the authority only: the way back is open while the mirror is dead.
    pub fn needs(self, side: Side) -> bool {
        self.from.authority() == side
            || self.to.authority() == side
            || (self.to.mirror() == Some(side) && self.from.mirror() != Some(side))
    }

    /// What is seen of the migrating tables matters.
    pub fn is_about_tables(self) -> bool {
        self.from.mirror().is_some() || self.to.mirror().is_some()
    }
}

/// A sequence with fewer values left than this is worth a word.
const FEW_LEFT: u64 = 10_000;

/// Fewer reads than this on both sides say little.
const FEW_READS: u64 = 100;

/// A transaction that is in flight for longer is no passing matter.
const IN_FLIGHT: Duration = Duration::from_secs(5);

/// What stands in the way of a step, and what does not.
pub fn judge(step: Step, config: &crate::config::Move, facts: &Facts) -> Vec<Gate> {
    let mut gates = Vec::new();
    reachable(step, facts, &mut gates);
    installed(step, facts, &mut gates);
    lives(step, facts, &mut gates);
    check(step, facts, &mut gates);
    tables(step, facts, &mut gates);
    lazy(step, facts, &mut gates);
    debt(step, facts, &mut gates);
    authority(step, facts, &mut gates);
    transactions(step, config, facts, &mut gates);
    forward(step, config, facts, &mut gates);
    gates.sort_by_key(|gate| gate.gate);
    gates
}

fn gate(gate: Name, standing: Standing, evidence: String, facts: Value, next: &str) -> Gate {
    let next = (!next.is_empty() && standing != Standing::Met).then(|| next.to_owned());
    Gate { gate, table: None, standing, evidence, facts, next }
}

/// `Met` where nothing was found, else as bad as it is.
fn unless(found: bool, standing: Standing) -> Standing {
    if found { standing } else { Standing::Met }
}

fn reachable(step: Step, facts: &Facts, gates: &mut Vec<Gate>) {
    for side in Side::BOTH {
        let about = json!({ "side": side });
        gates.push(match facts.sides.get(side) {
            Ok(_) => gate(Name::Reachable, Standing::Met, format!("{side} answers"), about, ""),
            Err(error) => {
                let needed = step.needs(side);
                let standing = if needed { Standing::Closed } else { Standing::Warns };
                let next =
                    if needed { "start it, or mend its address in the file" } else { "the move does without it" };
                gate(Name::Reachable, standing, format!("{side} cannot be reached: {error}"), about, next)
            }
        });
    }
}

fn installed(step: Step, facts: &Facts, gates: &mut Vec<Gate>) {
    for side in Side::BOTH.into_iter().filter(|side| step.needs(*side)) {
        let Ok(answer) = facts.sides.get(side) else { continue };
        let about = json!({ "side": side, "installed": answer.installed });
        gates.push(match (answer.installed, answer.may_install) {
            (true, _) => gate(Name::Installed, Standing::Met, format!("schema crossfade is on {side}"), about, ""),
            (false, true) => {
                gate(Name::Installed, Standing::Met, format!("{side}: the move makes schema crossfade"), about, "")
            }
            (false, false) => {
                let evidence = format!("schema crossfade is not on {side}, and the control role may not make it");
                let next = "let an owner of the database run the output of `crossfade install --print-sql`";
                gate(Name::Installed, Standing::Closed, evidence, about, next)
            }
        });
    }
}

/// What a side may have lost since it was last looked at nobody knows yet; what it may have lost by then must have been looked at.
fn lives(step: Step, facts: &Facts, gates: &mut Vec<Gate>) {
    if step.gains().is_none() && !step.enters_mirror() {
        return;
    }
    let before = gates.len();
    for side in Side::BOTH.into_iter().filter(|side| step.needs(*side)) {
        let Ok(answer) = facts.sides.get(side) else { continue };
        let about = json!({ "side": side, "doubt": answer.doubt });
        let (evidence, next) = match (answer.begun, &answer.doubt) {
            (Some(_), _) => (
                format!("{side} has crashed or was promoted, and nobody has looked at it since"),
                "a proxy looks within a second of both sides' being there; without one: `crossfade phase --accept` with its name",
            ),
            (None, Some(doubt)) if step.from.mirror().is_some() => (
                doubt.clone(),
                "run `crossfade verify`: what only the other side has may be what is missing. `crossfade verify --repair --force` gives it up",
            ),
            (None, _) => continue,
        };
        gates.push(gate(Name::Life, Standing::Closed, evidence, about, next));
    }
    if gates.len() == before {
        let evidence = "no crash and no promotion that nobody has looked at".to_owned();
        gates.push(gate(Name::Life, Standing::Met, evidence, Value::Null, ""));
    }
}

/// Findings that are shown by name.
const NAMED: usize = 3;

fn named(found: &[&Finding]) -> String {
    let told =
        |finding: &&Finding| format!("{} ({}, {}): {}", finding.object, finding.kind, finding.side, finding.what);
    let mut told: Vec<String> = found.iter().take(NAMED).map(told).collect();
    if found.len() > NAMED {
        told.push(format!("and {} more", found.len() - NAMED));
    }
    told.join(", ")
}

/// A mirror that lacks something hurts nobody: what it refuses is owed. An authority that does, hurts the application.
fn check(step: Step, facts: &Facts, gates: &mut Vec<Gate>) {
    let Some(findings) = &facts.findings else { return };
    // Clients' roles have a gate of their own.
    let errors: Vec<&Finding> = findings
        .iter()
        .filter(|finding| finding.level == Level::Error && !matches!(finding.kind, "role" | "privilege"))
        .collect();
    let worst = if step.gains() == Some(Side::New) { Standing::Closed } else { Standing::Warns };
    let evidence = match errors.len() {
        0 => "`crossfade check` finds no error".to_owned(),
        count => format!("`crossfade check` finds {count} errors: {}", named(&errors)),
    };
    let about = json!({ "errors": errors.len(), "findings": errors });
    let next = "run `crossfade check`: it prints the SQL that mends each";
    gates.push(gate(Name::Check, unless(!errors.is_empty(), worst), evidence, about, next));
}

/// A gate for each table that does not meet it, and one for all others.
fn of_tables(
    name: Name,
    facts: &Facts,
    gates: &mut Vec<Gate>,
    met: &str,
    look: impl Fn(&TableFacts) -> Option<(Standing, String, Value, &'static str)>,
) {
    let before = gates.len();
    for table in &facts.tables {
        if let Some((standing, evidence, about, next)) = look(table) {
            let found = gate(name, standing, evidence, about, next);
            gates.push(Gate { table: Some(table.label.clone()), ..found });
        }
    }
    let rest = facts.tables.len() - (gates.len() - before);
    if rest > 0 {
        gates.push(gate(name, Standing::Met, format!("{rest} tables {met}"), json!({ "tables": rest }), ""));
    }
}

fn tables(step: Step, facts: &Facts, gates: &mut Vec<Gate>) {
    if !step.is_about_tables()
        || !matches!(&facts.sides.get(step.from.authority()), Ok(answer) if answer.installed || step.enters_mirror())
    {
        return;
    }
    let gains = step.gains().is_some();
    if step.enters_mirror() || gains {
        of_tables(Name::Keys, facts, gates, "have a key, and can be mirrored", |table| keys(table, gains));
    }
    let reads = step.to == Phase::DualRead && step.from == Phase::DualWrite;
    if gains || reads {
        let worst = if gains { Standing::Closed } else { Standing::Warns };
        let way =
            if step.from.authority() == Side::New { "crossfade backfill --reverse" } else { "crossfade backfill" };
        of_tables(Name::Backfill, facts, gates, "have come over", |table| backfill(table, worst, way));
        of_tables(Name::Verified, facts, gates, "were compared, and equal, since anything of them was owed", |table| {
            verified(table, worst, gains && facts.was_authority)
        });
    }
}

/// While new is authority and lacks rows, clients read them from old over new. In phases without a mirror nobody looks at their statements.
fn lazy(step: Step, facts: &Facts, gates: &mut Vec<Gate>) {
    let (gains, leaves) = (step.gains() == Some(Side::New), step.from == Phase::NewPrimary && step.is_forward());
    for (label, obstacles) in facts.lazy.iter().filter(|_| gains || leaves) {
        let about = json!({ "obstacles": obstacles });
        let found = match (leaves, obstacles.is_empty()) {
            (true, _) => {
                let evidence = "rows of it may still be on old alone".to_owned();
                gate(Name::Lazy, Standing::Closed, evidence, about, "run `crossfade backfill` to its end")
            }
            (false, true) => {
                let evidence =
                    "new may lack rows of it: those are read from old, and come over when they are written".to_owned();
                gate(Name::Lazy, Standing::Met, evidence, about, "")
            }
            (false, false) => {
                let evidence = format!("cannot be lazy: {}", obstacles.join("; "));
                gate(
                    Name::Lazy,
                    Standing::Closed,
                    evidence,
                    about,
                    "run `crossfade backfill` with its name now, and set backfill: eager",
                )
            }
        };
        gates.push(Gate { table: Some(label.clone()), ..found });
    }
}

fn keys(table: &TableFacts, gains: bool) -> Option<(Standing, String, Value, &'static str)> {
    let standing = if gains { Standing::Closed } else { Standing::Warns };
    if let Some(why) = &table.opaque {
        let next = "mend the table, or leave it out by `except`";
        return Some((standing, format!("cannot be mirrored: {why}"), json!({ "opaque": why }), next));
    }
    (!table.keyed).then(|| {
        let evidence = "has no key: inserts are mirrored, an UPDATE or DELETE taints it".to_owned();
        (Standing::Warns, evidence, json!({ "key": false }), "give it a primary key if its rows ever change")
    })
}

fn backfill(table: &TableFacts, worst: Standing, way: &str) -> Option<(Standing, String, Value, &'static str)> {
    if table.opaque.is_some() || (table.owed.whole == 0 && table.owed.ranges == 0) {
        return None;
    }
    let share = table.backfill.map_or(0.0, |at| at.share);
    let evidence = match (table.keyed, table.backfill) {
        (true, Some(at)) => format!("its backfill is at {:.1}% ({} rows)", share * 100.0, at.rows),
        (true, None) => format!("what was there before is still owed; `{way}` brings it, or repair in time"),
        (false, _) => "it has no key, and is still to be copied as a whole".to_owned(),
    };
    let next = if table.keyed {
        "wait for it, or run the backfill"
    } else {
        "run `crossfade repair --wait --table` with its name"
    };
    Some((worst, evidence, json!({ "share": share, "ranges_owed": table.owed.ranges }), next))
}

fn verified(
    table: &TableFacts,
    worst: Standing,
    exact_before: bool,
) -> Option<(Standing, String, Value, &'static str)> {
    if table.opaque.is_some() {
        return None;
    }
    let next = "run `crossfade verify`";
    // A side that was authority in this stretch of mirrored phases had all rows then; what was owed to it since was paid under lock.
    let worst = if exact_before { Standing::Warns } else { worst };
    let Some(seen) = &table.verified else {
        return Some((worst, "was not compared yet".to_owned(), Value::Null, next));
    };
    let about = json!({ "epoch": seen.epoch, "at": seen.at, "rows": seen.rows, "different": seen.different, "still": seen.still });
    if seen.still && seen.equal.is_some() {
        return None;
    }
    let evidence = match seen.equal {
        _ if seen.different > 0 => format!("{} of {} rows differed when it was compared", seen.different, seen.rows),
        Some(_) => "something of it was owed since it was compared".to_owned(),
        None => "was compared, and not all of it could be seen to be equal".to_owned(),
    };
    Some((worst, evidence, about, if seen.different > 0 { "run `crossfade verify --repair`" } else { next }))
}

fn debt(step: Step, facts: &Facts, gates: &mut Vec<Gate>) {
    let Some(debt) = &facts.debt else { return };
    let (side, gains) = (step.from.authority(), step.gains().is_some());
    let about = json!({
        "owed": debt.owed, "in_flight": debt.in_flight, "oldest_seconds": debt.oldest.map(|age| age.as_secs_f64()),
        "ledger_bytes": debt.ledger_bytes, "newest_seconds": debt.newest,
    });
    let late = debt.oldest.is_some_and(|age| age > IN_FLIGHT);
    let fresh = debt.newest.map_or_else(String::new, |age| format!(", the last debt entered {age:.1} s ago"));
    let (standing, evidence) = match (debt.owed, debt.in_flight) {
        (0, 0) => (Standing::Met, format!("nothing is owed on {side} and nothing in flight{fresh}")),
        (0, flying) if !late => {
            (Standing::Met, format!("nothing is owed on {side}; {flying} in flight, which the move clears{fresh}"))
        }
        (0, flying) => (
            Standing::Closed,
            format!(
                "of {flying} debts in flight on {side} one is older than {IN_FLIGHT:?}, and is ended after mirror.timeout"
            ),
        ),
        (owed, _) => (Standing::Closed, format!("{owed} debts are still owed on {side}")),
    };
    let (standing, next) = match (standing, gains) {
        (Standing::Met, _) => (standing, ""),
        (_, true) => (standing, "they are being paid (`crossfade status` shows them)"),
        // The mirror stays what it is, or is left behind as it is.
        (_, false) if step.to.mirror().is_some() => (Standing::Warns, "reads of these tables stay on the authority"),
        (_, false) => (Standing::Warns, "the side that is left behind lacks them"),
    };
    gates.push(gate(Name::Debt, standing, evidence, about, next));
}

/// Statements that no side can answer alone, once some tables stay on old. What was seen may be mended by now: it warns.
fn split(shapes: Option<&[String]>) -> Gate {
    let Some(shapes) = shapes else {
        let evidence = "the proxy knows which statements it has seen: `crossfade report`".to_owned();
        return gate(Name::Split, Standing::NotMeasured, evidence, Value::Null, "");
    };
    let evidence = match shapes.len() {
        0 => "no statement was seen over tables that stay on old and tables that migrate".to_owned(),
        count => format!("{count} shapes over tables that stay on old and tables that migrate, such as: {}", shapes[0]),
    };
    let next = "they are refused (0A000) once new is the authority: `crossfade report` lists them";
    gate(Name::Split, unless(!shapes.is_empty(), Standing::Warns), evidence, json!(shapes), next)
}

/// What a change of the authority asks for.
fn authority(step: Step, facts: &Facts, gates: &mut Vec<Gate>) {
    let Some(side) = step.gains() else { return };
    if let Some(undecided) = &facts.undecided {
        let evidence = match undecided.len() {
            0 => "no prepared transaction has written a migrating table".to_owned(),
            count => format!("{count} prepared transactions are undecided: {}", undecided.join(", ")),
        };
        let standing = unless(!undecided.is_empty(), Standing::Closed);
        let next = "COMMIT PREPARED or ROLLBACK PREPARED each";
        gates.push(gate(Name::Undecided, standing, evidence, json!(undecided), next));
    }
    if let Some(sequences) = &facts.sequences {
        let narrow: Vec<&str> = sequences.iter().filter(|one| !one.fits).map(|one| one.name.as_str()).collect();
        let few = sequences.iter().filter(|one| one.left.is_some_and(|left| left < FEW_LEFT));
        let few: Vec<String> = few.map(|one| format!("{} ({})", one.name, one.left.unwrap_or(0))).collect();
        let behind = sequences.iter().filter(|one| one.set).count();
        let (standing, evidence, next) = if !narrow.is_empty() {
            let evidence = format!("bounds on {side} are too narrow: {}", narrow.join(", "));
            (Standing::Closed, evidence, "ALTER SEQUENCE with wider bounds")
        } else if !few.is_empty() {
            (Standing::Warns, format!("few values are left on {side}: {}", few.join(", ")), "widen them in time")
        } else {
            let evidence =
                format!("{} on {side}; {behind} are behind and set beyond the other's by the move", sequences.len());
            (Standing::Met, evidence, "")
        };
        let about = json!({ "sequences": sequences.len(), "behind": behind, "too_narrow": narrow, "few_left": few });
        gates.push(gate(Name::Sequences, standing, evidence, about, next));
    }
    if let Some(lacking) = &facts.privileges {
        let evidence = match lacking.len() {
            0 => format!("clients' roles have on {side} what they have now, and can log in there"),
            _ => named(&lacking.iter().collect::<Vec<_>>()),
        };
        let next = lacking.first().map(|finding| finding.mend.as_str()).unwrap_or_default();
        let standing = match lacking.iter().map(|finding| finding.level).min() {
            None => Standing::Met,
            Some(Level::Error) => Standing::Closed,
            Some(Level::Warning) => Standing::Warns,
        };
        gates.push(gate(Name::Privileges, standing, evidence, json!(lacking), next));
    }
    if let Some(stuck) = &facts.sessions {
        let count = stuck.temporary + stuck.advisory + stuck.holding;
        let evidence = format!(
            "{} schemas with temporary tables, {} idle sessions with advisory locks, {} sessions that have declared a cursor WITH HOLD or said LISTEN",
            stuck.temporary, stuck.advisory, stuck.holding
        );
        let next = "these sessions end with 57P01 at the move, and connect again";
        gates.push(gate(Name::Sessions, unless(count > 0, Standing::Warns), evidence, json!(stuck), next));
    }
    gates.push(split(facts.split.as_deref()));
    if side == Side::New {
        gates.push(reads(facts.compared));
        if let Some(found) = &facts.expected {
            let evidence = match found.len() {
                0 => "new has what `expect` asks for".to_owned(),
                _ => named(&found.iter().collect::<Vec<_>>()),
            };
            let next = found.first().map(|finding| finding.mend.as_str()).unwrap_or_default();
            gates.push(gate(Name::Expect, unless(!found.is_empty(), Standing::Closed), evidence, json!(found), next));
        }
    }
}

/// Reads that were run on both sides.
fn reads(found: Option<Recent>) -> Gate {
    let within = people(COMPARED.as_secs_f64());
    let Some(found) = found.filter(|found| found.runs + found.failed > 0) else {
        let evidence = format!("no reads were run on both sides within the last {within}");
        let next = "let a share be compared: `reads: { compare: 5% }`";
        return gate(Name::Reads, Standing::NotMeasured, evidence, Value::Null, next);
    };
    let Recent { runs, different, failed } = found;
    let mut evidence = format!("of {runs} reads on both sides within the last {within} {different} gave other rows");
    if failed > 0 {
        evidence += &format!("; {failed} could not be run on one of them");
    }
    let report = "`crossfade report` names them; what is meant to differ goes into `ignore`";
    let (standing, next) = match found {
        Recent { different: 1.., .. } => (Standing::Closed, report),
        Recent { failed: 1.., .. } => (Standing::Warns, report),
        Recent { runs: ..FEW_READS, .. } => (Standing::Warns, "they are few: let a larger share be compared"),
        _ => (Standing::Met, ""),
    };
    gate(Name::Reads, standing, evidence, json!(found), next)
}

fn transactions(step: Step, config: &crate::config::Move, facts: &Facts, gates: &mut Vec<Gate>) {
    let Some(running) = &facts.running else { return };
    let about = json!({
        "under_way": running.count, "oldest_seconds": running.oldest, "estimate_ms": running.estimate_ms(config.pause),
        "last_pause_ms": running.last_pause_ms, "in_the_way": running.foreign,
    });
    if let Some(foreign) = &running.foreign {
        let next = "end it, or wait for it";
        return gates.push(gate(Name::Transactions, Standing::Closed, foreign.clone(), about, next));
    }
    let last = running.last_pause_ms.map_or_else(String::new, |ms| format!("; the last move held clients for {ms} ms"));
    let evidence = match running.oldest {
        None => format!("none is under way on {}{last}", step.from.authority()),
        Some(oldest) => format!(
            "{} under way on {}, the oldest for {oldest:.1} s: the move waits for them, for {:?} at most{last}",
            running.count,
            step.from.authority(),
            config.pause
        ),
    };
    let long = running.oldest.is_some_and(|oldest| oldest > config.pause.as_secs_f64());
    let next = "a transaction that lasts makes the move give up; `--terminate` ends it";
    gates.push(gate(Name::Transactions, unless(long, Standing::Warns), evidence, about, next));
}

fn forward(step: Step, config: &crate::config::Move, facts: &Facts, gates: &mut Vec<Gate>) {
    if !step.is_forward() || step.from == Phase::Old {
        return;
    }
    if let Some(held) = facts.held {
        let soak = config.soak;
        let evidence = format!("{} has held for {}", step.from, people(held));
        let next = format!("`move.soak` is {}", people(soak.as_secs_f64()));
        let standing = unless(held < soak.as_secs_f64(), Standing::Warns);
        gates.push(gate(Name::Soak, standing, evidence, json!({ "seconds": held, "soak": soak.as_secs() }), &next));
    }
    if step.to == Phase::New {
        let (standing, evidence) = match &facts.backup {
            Some(backup) => {
                (Standing::Met, format!("confirmed by {} {} ago: {}", backup.who, people(backup.age), backup.what))
            }
            None => (Standing::Closed, "nobody has confirmed a backup of new since it is the authority".to_owned()),
        };
        let next = "take one, and say so: `crossfade phase --backup WHERE`";
        gates.push(gate(Name::Backup, standing, evidence, json!(facts.backup), next));
    }
}

/// Seconds in the largest unit that fits.
fn people(seconds: f64) -> String {
    match seconds {
        s if s >= 2.0 * 86_400.0 => format!("{:.1} days", s / 86_400.0),
        s if s >= 2.0 * 3600.0 => format!("{:.1} hours", s / 3600.0),
        s if s >= 120.0 => format!("{:.1} minutes", s / 60.0),
        s => format!("{s:.1} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_on_both_sides_close_the_gate_where_they_differ() {
        let standing = |runs, different, failed| reads(Some(Recent { runs, different, failed })).standing;
        assert_eq!(reads(None).standing, Standing::NotMeasured);
        assert_eq!(standing(0, 0, 0), Standing::NotMeasured);
        assert_eq!(standing(FEW_READS - 1, 0, 0), Standing::Warns);
        assert_eq!(standing(FEW_READS, 0, 0), Standing::Met);
        assert_eq!(standing(FEW_READS, 0, 1), Standing::Warns);
        assert_eq!(standing(0, 0, 1), Standing::Warns);
        assert_eq!(standing(FEW_READS, 1, 1), Standing::Closed);
    }
}
