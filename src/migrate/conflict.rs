//! A unique value that another row of the mirror holds: its key joins, all are deleted, then all are inserted (D1).

use std::collections::HashSet;

use super::across::key_across;
use super::binary::values;
use super::error::{Error, Meaning};
use super::gone;
use super::link::Pair;
use super::reconcile::{Mode, Outcome, Trouble, Why, settle, without};
use super::sql::{TableSql, references};
use crate::catalog::{Table, quote};
use crate::ledger::debts::Values;

/// What came of it.
#[derive(Default)]
pub(crate) struct Joined {
    pub outcome: Outcome,
    /// Keys that the authority lacks.
    pub absent: Vec<Values>,
    /// To be tried again in these smaller sets.
    pub again: Vec<Vec<Values>>,
}

/// Tries at most.
const ROUNDS: usize = 8;

/// Writes `keys` together with whatever rows stand in their way. `rows`: what was to be written when `error` came.
pub(crate) async fn replace(
    pair: &mut Pair,
    table: &Table,
    keys: Vec<Values>,
    mut rows: Vec<Values>,
    mut error: Error,
) -> Result<Joined, Error> {
    let mut set = keys.clone();
    let mut locked = false;
    let mut joined = Joined::default();
    for _ in 0..ROUNDS {
        for key in holders(pair, table, &rows).await? {
            if !set.contains(&key) {
                set.push(key);
            }
        }
        if set.len() > 4 * pair.settings.chunk_rows + keys.len() {
            break;
        }
        match settle(pair, table, &set, Mode::Replace).await {
            Ok(settled) => {
                joined.outcome.written += settled.written;
                let ours: HashSet<&Values> = keys.iter().collect();
                joined.outcome.locked.extend(settled.locked.into_iter().filter(|key| ours.contains(key)));
                joined.absent.extend(settled.absent);
                return Ok(joined);
            }
            Err(Trouble { why: Why::Error(again), absent, locked: skipped, writing })
                if again.meaning() == Meaning::Conflict =>
            {
                pair.abandon().await;
                set = without(&set, &absent);
                joined.outcome.add(gone::remove(pair, table, absent).await?);
                locked |= skipped;
                rows = writing;
                error = again;
            }
            Err(trouble) => {
                pair.abandon().await;
                match trouble.why {
                    Why::TooBig => break,
                    Why::Shut(other) => {
                        locked = true;
                        error = other;
                        break;
                    }
                    Why::Error(other) if other.meaning() == Meaning::Fatal => return Err(other),
                    Why::Error(other) => {
                        locked |= other.meaning() == Meaning::Busy;
                        error = other;
                        break;
                    }
                }
            }
        }
    }
    give_up(keys, locked, error, &mut joined);
    Ok(joined)
}

fn give_up(mut keys: Vec<Values>, locked: bool, error: Error, joined: &mut Joined) {
    if keys.len() > 1 {
        let tail = keys.split_off(keys.len().div_ceil(2));
        joined.again.extend([keys, tail]);
    } else if locked {
        joined.outcome.locked.extend(keys);
    } else {
        joined.outcome.refused.extend(keys.into_iter().map(|key| (key, error.to_string())));
    }
}

/// Keys (as the authority has them) of the mirror's rows that hold a unique value of one of these rows.
async fn holders(pair: &mut Pair, table: &Table, rows: &[Values]) -> Result<Vec<Values>, Error> {
    let there = TableSql::new(table, pair.mirror.side);
    let mut keys = Vec::new();
    for text in questions(pair, &there).await? {
        for row in rows {
            let parameters = there.row_parameters(row);
            for found in pair.mirror.rows("finding who holds a unique value", &text, &references(&parameters)).await? {
                keys.push(key_across(table, there.side, values(&found, 0, there.key.len())));
            }
        }
    }
    Ok(keys)
}

/// The unique indexes of a table and those of exclusion constraints (temporal keys of PostgreSQL 18 are both): terms, predicate, the operators by which values exclude each
/// other (none: they are equal), and whether NULLs are equal, too (15).
const INDEXES: &str = "SELECT array(SELECT pg_get_indexdef(i.indexrelid, n, false) FROM generate_series(1, i.indnkeyatts::int) n), \
    coalesce(pg_get_expr(i.indpred, i.indrelid), 'true'), \
    array(SELECT format('OPERATOR(%I.%s)', s.nspname, o.oprname) FROM pg_constraint k CROSS JOIN unnest(k.conexclop) WITH ORDINALITY AS u(op, nth) \
        JOIN pg_operator o ON o.oid = u.op JOIN pg_namespace s ON s.oid = o.oprnamespace WHERE k.conindid = i.indexrelid AND k.conrelid = i.indrelid ORDER BY u.nth), \
    coalesce((to_jsonb(i)->>'indnullsnotdistinct')::boolean, false) \
    FROM pg_index i WHERE i.indrelid = $1 AND (i.indisunique OR i.indisexclusion) AND i.indisvalid";

/// For each such index of the mirror's table: who holds a value that excludes the one that a row (its parameters) would have in it.
async fn questions(pair: &mut Pair, there: &TableSql<'_>) -> Result<Vec<String>, Error> {
    let table = there.table;
    let indexes = pair.mirror.rows("reading unique indexes", INDEXES, &[table.oid.get(there.side)]).await?;
    let given: Vec<String> = (there.writable.iter().enumerate())
        .map(|(n, &at)| {
            let column = &table.columns[at];
            format!("${}::{} AS {}", n + 1, column.kind.name.get(there.side), quote(column.name.get(there.side)))
        })
        .collect();
    let key: Vec<usize> = there.key.to_vec();
    Ok(indexes
        .iter()
        .map(|index| {
            let terms: Vec<String> = index.get(0);
            let predicate: String = index.get(1);
            let (operators, nulls): (Vec<String>, bool) = (index.get(2), index.get(3));
            let list = |letter: char| {
                terms.iter().enumerate().map(|(n, term)| format!("({term}) AS {letter}{n}")).collect::<Vec<_>>().join(", ")
            };
            let excludes = |n: usize| {
                let operator = operators.get(n).map_or("=", String::as_str);
                let both_null = if nulls { format!(" OR m.x{n} IS NULL AND g.y{n} IS NULL") } else { String::new() };
                format!("(m.x{n} {operator} g.y{n}{both_null})")
            };
            let equal: Vec<String> = (0..terms.len()).map(excludes).collect();
            let names: Vec<String> = (0..key.len()).map(|n| format!("m.crossfade_key{n}")).collect();
            let read: Vec<String> = (key.iter().enumerate())
                .map(|(n, &at)| format!("{} AS crossfade_key{n}", there.read_columns(&[at])))
                .collect();
            format!(
                "SELECT {} FROM (SELECT {}, {} FROM {} AS t WHERE {predicate}) m, (SELECT {} FROM (SELECT {}) AS t WHERE {predicate}) g WHERE {}",
                names.join(", "),
                read.join(", "),
                list('x'),
                there.only(),
                list('y'),
                given.join(", "),
                equal.join(" AND ")
            )
        })
        .collect())
}
