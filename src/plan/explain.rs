//! `crossfade explain`: what would be done with a statement, in words.

use std::fmt::Write;
use std::sync::Arc;

use super::lazy::{Lazy, lazy, refused_because};
use super::read::{Read, read, stays_because};
use super::route::{Route, route};
use super::weave::edited;
use super::{Audited, Capture, Effect, Opaque, Plan, narrow, plan};
use crate::catalog::{Catalog, Table};
use crate::phase::{Phase, Side};
use crate::sql::facts::{Facts, Name, Verb};

/// What the proxy would do with `text`, whose facts these are: its kind, and a line for each phase. For a session whose client_encoding
/// is UTF8 and whose role may read the tables.
pub fn explain(text: &str, facts: &Facts, catalog: &Catalog) -> String {
    let mut out = String::new();
    let kind = format!("{:?}", facts.verb);
    let targets: Vec<String> = facts.targets.iter().map(|target| label(&target.table)).collect();
    let reads: Vec<String> = facts.reads.iter().map(label).collect();
    let _ = writeln!(out, "statement    {}", kind.split([' ', '(']).next().unwrap_or_default().to_lowercase());
    if !targets.is_empty() {
        let _ = writeln!(out, "writes       {}", targets.join(", "));
    }
    if !reads.is_empty() {
        let _ = writeln!(out, "reads        {}", reads.join(", "));
    }
    if facts.verb == Verb::Select {
        leaving(&mut out, &read(text.as_bytes(), facts, catalog, Side::Old));
    }
    for phase in Phase::ALL {
        let authority = phase.authority();
        if authority == Side::New && elsewhere(&mut out, phase, &route(text.as_bytes(), facts, catalog, authority)) {
            continue;
        }
        let _ = write!(out, "{:<14} runs on {authority}", phase.name());
        let Some(mirror) = phase.mirror() else {
            let _ = writeln!(out, ", as it is");
            continue;
        };
        lazily(&mut out, text, facts, catalog, phase);
        let _ = match narrow(plan(facts, catalog, authority, None, true), text.as_bytes(), catalog, authority) {
            Plan::Pass => writeln!(out, ", as it is: it writes no migrating table"),
            Plan::Capture(found) => {
                let head = text.get(..facts.end).unwrap_or(text);
                let edits = found.splice.edits(head.as_bytes(), head.len()).unwrap_or_default();
                let sent = String::from_utf8_lossy(&edited(head.as_bytes(), &edits)).into_owned();
                captured(&mut out, &found, mirror)
                    .and_then(|()| writeln!(out, ". Sent to {authority} as\n               {sent}"))
            }
            Plan::Opaque(found) => unseen(&mut out, &found),
            Plan::Truncate(tables) => writeln!(out, "; {} truncated on {mirror} at COMMIT", labels(&tables)),
            Plan::Copy(copy) => {
                let label = copy.table.label();
                let audited = if copy.audited { AUDITED } else { "" };
                writeln!(out, "; the rows that it has added are mirrored to {label} on {mirror}{audited}")
            }
        };
    }
    out
}

/// Where some tables stay on old: a statement that does not run on new. True: it is one.
fn elsewhere(out: &mut String, phase: Phase, route: &Route) -> bool {
    let _ = match route {
        Route::Undecided | Route::Migrating => return false,
        Route::Staying => writeln!(out, "{:<14} runs on old, as it is: its tables stay there", phase.name()),
        Route::Both { staying, migrating } => {
            writeln!(out, "{:<14} is refused (0A000): {staying} stays on old, {migrating} is on new", phase.name())
        }
        Route::Ambiguous(name) => writeln!(
            out,
            "{:<14} is refused (0A000): {name} may mean a table that stays on old or one on new; write its schema",
            phase.name()
        ),
    };
    true
}

/// What is done about rows that only old has.
fn lazily(out: &mut String, text: &str, facts: &Facts, catalog: &Catalog, phase: Phase) {
    let planned = plan(facts, catalog, phase.authority(), None, true);
    let _ = match lazy(text.as_bytes(), facts, &planned, catalog, phase.authority()) {
        Lazy::Whole => Ok(()),
        Lazy::Merged(merged) => {
            let point = if merged.point.is_some() { ", by its key from both sides at once; in a block" } else { "" };
            write!(out, "{point}, over merged views (`backfill: lazy`), which read from old what only old has")
        }
        Lazy::Brings(brings) => {
            write!(out, ", behind a statement that brings the rows over which only old has of {}", brings.table.label())
        }
        Lazy::Refused(reason) => write!(
            out,
            ", and is refused while rows of a lazy table are on old alone ({}); else",
            refused_because(reason).0
        ),
    };
}

/// Whether a SELECT may leave the authority.
fn leaving(out: &mut String, read: &Read) {
    let _ = match read {
        Read::Eligible(found) => writeln!(
            out,
            "as a read    may be run on both and compared (`compare`) and, in dual-read, answered by new (`serve`) while nothing is owed of {}; \
             in a block it stays on the authority, whose lock on the table it must hold to the block's end",
            labels(&found.tables)
        ),
        Read::Stays(reason) => writeln!(out, "as a read    stays on the authority: {}", stays_because(reason)),
    };
}

const AUDITED: &str =
    "; triggers, cascades, functions or a WITH clause may write more, so the transaction is audited before COMMIT";

fn label(name: &Name) -> String {
    match &name.schema {
        Some(schema) => format!("{schema}.{}", name.name),
        None => name.name.clone(),
    }
}

fn labels(tables: &[Arc<Table>]) -> String {
    tables.iter().map(|table| table.label()).collect::<Vec<_>>().join(", ")
}

fn captured(out: &mut String, found: &Capture, mirror: Side) -> std::fmt::Result {
    let rows = match found.effect {
        None => "each row that its WITH clause writes",
        Some(Effect::Row) => "each row as it then is",
        Some(Effect::Moved) => "each row as it then is (its key before is read and locked first)",
        Some(Effect::Merged) => "each row as it then is, or the key of one that is gone",
        Some(Effect::Gone) => "the key of each row that is gone",
    };
    write!(out, "; {rows}, of {}, is mirrored to {mirror}", labels(&found.tables))?;
    if found.audited != Audited::No {
        out.push_str(AUDITED);
    }
    Ok(())
}

fn unseen(out: &mut String, found: &Opaque) -> std::fmt::Result {
    write!(out, ", as it is, and is not captured: {}. ", why(found))?;
    if found.ddl && found.tables.is_empty() {
        return writeln!(out, "It names no migrating table");
    }
    match (found.tables.is_empty(), found.unwrapped) {
        (false, _) => writeln!(out, "{} will be compared and repaired as a whole", labels(&found.tables)),
        (true, false) => writeln!(
            out,
            "Before COMMIT the server's row counters tell which tables it wrote; those are repaired as a whole"
        ),
        (true, true) => {
            writeln!(out, "Every migrating table that it may have written will be compared and repaired as a whole")
        }
    }
}

/// The reason in words; where a table is to blame, its own.
fn why(found: &Opaque) -> String {
    let blamed = found.tables.iter().find_map(|table| Some((table.label(), table.opaque.as_ref()?)));
    match (found.reason, blamed) {
        ("definition", Some((table, reason))) => format!("{table}: {reason}"),
        (reason, _) => words(reason).to_owned(),
    }
}

fn words(reason: &'static str) -> &'static str {
    match reason {
        "ambiguous" => "the table's name may mean several tables that differ",
        "call" => "a procedure may write anything",
        "copy" => "the rows that COPY sends are not all that it writes",
        "cte" => "it writes in a WITH clause",
        "ddl" => "it changes definitions",
        "definition" => "the table's definitions differ, or it has a column whose values have no exact form",
        "do" => "an anonymous block may write anything",
        "encoding" => "it has text that cannot be had exactly in this client's encoding",
        "execute" => "a prepared statement of SQL",
        "explain" => "EXPLAIN ANALYZE runs the write and returns no rows",
        "function" => "it calls a function that may write",
        "key-change" => "it may change a row's key, and the key before cannot be had",
        "keyless" => "the table has no key",
        "merge" => "MERGE, before PostgreSQL 17, or of a table whose key is deferrable",
        "privilege" => "the role may not read the table",
        "row-security" => "the table has row security",
        "rule" => "the table has rules",
        "trigger" => "triggers, cascades or rules of a table that does not migrate may write others",
        "truncate" => "TRUNCATE reaches tables that do not migrate, or part of one",
        "unparsed" => "no reader understood it, so it counts as a write",
        "view" => "it writes to a view or foreign table",
        other => other,
    }
}
