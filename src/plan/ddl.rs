//! What a change of definitions may do to the rows of migrating tables, by the words of its text. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Opaque, Plan};
use crate::catalog::{Catalog, Table};
use crate::phase::Side;
use crate::sql::lex::{Kind, lex};
use crate::sql::name::fold;

/// Gives a plan of DDL the migrating tables whose names occur in its text; none where it names none. It keeps all of them where a word of it may
/// be code that writes others.
pub fn narrow(plan: Plan, text: &[u8], catalog: &Catalog, side: Side) -> Plan {
    match plan {
        Plan::Opaque(opaque) if opaque.ddl && opaque.tables.is_empty() => {
            let tables = named(text, catalog, side).unwrap_or_else(|| catalog.tables.values().cloned().collect());
            let mut tables: Vec<Arc<Table>> = tables;
            tables.sort_by_key(|table| table.number);
            Plan::Opaque(Arc::new(Opaque { tables, replays: replays(text), ..Opaque::clone(&opaque) }))
        }
        other => other,
    }
}

/// What stands for a whole server, or refuses to run in a transaction block, runs on the authority alone.
fn replays(text: &[u8]) -> bool {
    let tokens: Vec<_> = lex(text).filter(|token| !token.kind.is_gap()).collect();
    let is = |at: usize, words: &[&str]| {
        tokens.get(at).is_some_and(|token| words.iter().any(|word| token.is_word(text, word)))
    };
    let server = [
        "database",
        "tablespace",
        "system",
        "subscription",
        "publication",
        "role",
        "user",
        "group",
        "server",
        "foreign",
        "event",
        "language",
    ];
    let of_server =
        is(0, &["create", "alter", "drop", "comment"]) && (is(1, &server) || is(1, &["on"]) && is(2, &server));
    let data = is(0, &["reindex", "refresh", "reassign", "import", "security"]);
    // GRANT role TO role has no ON.
    let grants_role = is(0, &["grant", "revoke"]) && !(0..tokens.len()).any(|at| is(at, &["on"]));
    !(of_server || data || grants_role || (1..tokens.len()).any(|at| is(at, &["concurrently"])))
}

/// None: it may run code of the application.
fn named(text: &[u8], catalog: &Catalog, side: Side) -> Option<Vec<Arc<Table>>> {
    let tokens: Vec<_> = lex(text).filter(|token| !token.kind.is_gap()).collect();
    let is = |at: usize, word: &str| tokens.get(at).is_some_and(|token| token.is_word(text, word));
    // An index changes no row, and the functions in it must be IMMUTABLE.
    if is(0, "create") && (is(1, "index") || is(1, "unique") && is(2, "index")) {
        return Some(Vec::new());
    }
    // CREATE FUNCTION names the function, and runs none.
    let defines = is(0, "create") && (1..4).any(|at| is(at, "function") || is(at, "procedure") || is(at, "trigger"));
    let mut tables = BTreeMap::new();
    for token in &tokens {
        let name = match (token.kind, fold(text, token)) {
            (Kind::Unknown | Kind::Unterminated, _) | (Kind::Quoted | Kind::UnicodeQuoted, None) => return None,
            (_, None) => continue,
            (_, Some(name)) => name,
        };
        let runs = catalog.writing_functions.get(side).contains(&name)
            || catalog.views.get(side).get(&name) == Some(&true)
            || token.is_word(text, "execute");
        if runs && !defines {
            return None;
        }
        let found = catalog.by_name.get(side).get(&name).into_iter().flatten();
        tables.extend(found.map(|table| (table.number, table.clone())));
    }
    Some(tables.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_one_database_runs_on_both() {
        for text in [
            "CREATE TABLE t (id int)",
            "alter table t add column c text default 'x'",
            "CREATE UNIQUE INDEX ON t (id)",
            "GRANT SELECT ON t TO app",
            "CREATE TYPE mood AS ENUM ('sad')",
            "DROP TABLE t",
        ] {
            assert!(replays(text.as_bytes()), "{text}");
        }
        for text in [
            "CREATE INDEX CONCURRENTLY ON t (id)",
            "DROP INDEX /* x */ concurrently i",
            "ALTER TABLE t DETACH PARTITION p CONCURRENTLY",
            "CREATE DATABASE x",
            "ALTER ROLE app PASSWORD 'x'",
            "GRANT app TO other",
            "ALTER SYSTEM SET a = 1",
            "REINDEX TABLE t",
            "REFRESH MATERIALIZED VIEW v",
        ] {
            assert!(!replays(text.as_bytes()), "{text}");
        }
    }
}
