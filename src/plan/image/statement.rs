//! What a side executes to hold the rows of images. Names are qualified and quoted, operators too: no search_path matters. The session there
//! runs with session_replication_role = replica and client_encoding UTF8.

use std::fmt::Write;

use super::super::splice::{Texts, expression};
use super::Statement;
use crate::catalog::{Column, Format, Table, quote};
use crate::phase::Side;

const XID: u32 = 28;
const TID: u32 = 27;

/// The protocol counts parameters in 16 bits.
const PARAMETERS_MAX: usize = 65_535;

/// Positions in `Table::columns` that an image writes on that side: all but stored generated columns.
pub(super) fn writable(table: &Table, side: Side) -> impl Iterator<Item = usize> + '_ {
    table.columns.iter().enumerate().filter(move |(_, column)| !column.generated.get(side)).map(|(at, _)| at)
}

/// How many rows one `upsert`, `insert` or `insert_missing` can take.
pub fn rows_max(table: &Table, side: Side) -> usize {
    PARAMETERS_MAX / writable(table, side).count().max(1)
}

/// How many keys one `delete` or `select` can take.
pub fn keys_max(table: &Table) -> usize {
    PARAMETERS_MAX / table.key.as_ref().map_or(1, |key| key.columns.len().max(1))
}

/// Nothing there keeps two rows with one key apart: a deferrable key is checked by a trigger, which sessions with session_replication_role = replica do not
/// fire. Whoever writes to such a table takes `KEY_LOCK` first, to the end of his transaction.
pub fn needs_lock(table: &Table, side: Side) -> bool {
    table.key.as_ref().is_some_and(|key| *key.deferrable.get(side))
}

/// One writer of a table at a time, the next one when the transaction before it has ended. Its parameter: the table's number.
pub const KEY_LOCK: &str = "SELECT pg_catalog.pg_advisory_xact_lock(1668443764, $1)";

/// `upsert` cannot be had on that side: the key is deferrable there (no arbiter of ON CONFLICT), another index over the same columns takes other
/// values for equal (ON CONFLICT would take its rows for the key's), or a GENERATED ALWAYS identity would have to be set by UPDATE. `delete` of the keys and then `insert` do instead, with SET CONSTRAINTS ALL DEFERRED.
pub fn needs_replace(table: &Table, side: Side) -> bool {
    let Some(key) = &table.key else { return false };
    let of_key = |at: usize| key.columns.contains(&at);
    let identity = |at: usize| *table.columns[at].identity_always.get(side);
    *key.deferrable.get(side)
        || !*key.alone.get(side)
        || writable(table, side).any(|at| identity(at) && !of_key(at))
        || assigned(table, side).is_empty()
}

/// The columns that DO UPDATE sets: all but the key. The key's too, where equal keys may differ in their bytes ('a' and 'A' in citext); one of
/// the key's where there is no other column, for the sake of the row lock.
fn assigned(table: &Table, side: Side) -> Vec<usize> {
    let Some(key) = &table.key else { return Vec::new() };
    let of_key = |at: &usize| key.columns.contains(at);
    let mut found: Vec<usize> = writable(table, side).filter(|at| !of_key(at) || !key.bytewise).collect();
    if found.is_empty() {
        found.extend(writable(table, side).find(|at| !*table.columns[*at].identity_always.get(side)));
    }
    found
}

/// Makes `rows` rows (at least one, with distinct keys) what their images say, whether they are there or not. Parameters: `parameters` of each row.
/// Only for tables with a key and without `needs_replace`.
pub fn upsert(table: &Table, side: Side, rows: usize) -> Statement {
    let mut statement = Statement::default();
    put_upsert(table, side, rows, &mut statement);
    statement
}

/// `upsert` behind what is in `statement`; its parameters are numbered on.
pub fn put_upsert(table: &Table, side: Side, rows: usize, statement: &mut Statement) {
    put_insert(table, side, rows, statement);
    let mut separator = " DO UPDATE SET ";
    conflict(table, side, &mut statement.text);
    for at in assigned(table, side) {
        let name = quote(table.columns[at].name.get(side));
        let _ = write!(statement.text, "{separator}{name} = EXCLUDED.{name}");
        separator = ", ";
    }
}

/// Adds rows whose key is not there, and waits for transactions that are inserting the same key. Where the key is deferrable there is no
/// such thing: it is a plain INSERT, which fails with 23505 on a row that is there.
///
/// The key is named as the arbiter, since without it a row that stands in the way by another UNIQUE column would end the waiting early.
pub fn insert_missing(table: &Table, side: Side, rows: usize) -> Statement {
    let mut statement = insert(table, side, rows);
    if table.key.as_ref().is_some_and(|key| !key.deferrable.get(side)) {
        conflict(table, side, &mut statement.text);
        statement.text.push_str(" DO NOTHING");
    }
    statement
}

fn conflict(table: &Table, side: Side, text: &mut String) {
    let columns = table.key.iter().flat_map(|key| &key.columns).map(|&at| quote(table.columns[at].name.get(side)));
    let _ = write!(text, " ON CONFLICT ({})", columns.collect::<Vec<_>>().join(", "));
}

/// Adds rows. Parameters: `parameters` of each row.
pub fn insert(table: &Table, side: Side, rows: usize) -> Statement {
    let mut statement = Statement::default();
    put_insert(table, side, rows, &mut statement);
    statement
}

/// `insert` behind what is in `statement`; its parameters are numbered on.
pub fn put_insert(table: &Table, side: Side, rows: usize, statement: &mut Statement) {
    let columns: Vec<usize> = writable(table, side).collect();
    let names: Vec<String> = columns.iter().map(|&at| quote(table.columns[at].name.get(side))).collect();
    let overriding = match columns.iter().any(|&at| *table.columns[at].identity_always.get(side)) {
        true => " OVERRIDING SYSTEM VALUE",
        false => "",
    };
    let _ = write!(statement.text, "INSERT INTO {} ({}){overriding} VALUES ", table.qualified(side), names.join(", "));
    for row in 0..rows {
        statement.text.push_str(if row == 0 { "(" } else { ", (" });
        for (position, &at) in columns.iter().enumerate() {
            if position > 0 {
                statement.text.push_str(", ");
            }
            parameter(&table.columns[at], side, statement);
        }
        statement.text.push(')');
    }
}

/// Deletes the rows with these keys. Parameters: the key's values of each, in the order of `Table::key`.
pub fn delete(table: &Table, side: Side, keys: usize) -> Statement {
    let mut statement = empty(format!("DELETE FROM {} AS t WHERE ", table.qualified(side)));
    by_key(table, side, keys, &mut statement);
    statement
}

/// Reads the rows with these keys as images (one bytea each, see `hidden`), with `locking` (` FOR NO KEY UPDATE`, or nothing) behind.
/// Parameters as for `delete`.
pub fn select(table: &Table, side: Side, keys: usize, texts: Texts, locking: &str) -> Statement {
    let image = expression(table, side, "t", texts, false);
    let mut statement = empty(format!("SELECT {image} FROM {} AS t WHERE ", table.qualified(side)));
    by_key(table, side, keys, &mut statement);
    statement.text.push_str(locking);
    statement
}

/// The rows with these keys that one transaction has added, as images. Parameters: its xid, then as for `delete`.
pub fn added_by_key(table: &Table, side: Side, keys: usize, texts: Texts) -> Statement {
    let mut statement = added(&expression(table, side, "t", texts, false), table, side);
    statement.text.push_str(" AND (");
    by_key(table, side, keys, &mut statement);
    statement.text.push(')');
    statement
}

/// All rows that one transaction has added at or behind a place, as images. Parameters: its xid, the place (a tid).
pub fn added_behind(table: &Table, side: Side, texts: Texts) -> Statement {
    let mut statement = added(&expression(table, side, "t", texts, false), table, side);
    place(" AND t.ctid OPERATOR(pg_catalog.>=) ", &mut statement);
    statement
}

/// How many rows one transaction has added between two places. Parameters: its xid, the first place, the place behind the last.
pub fn count_added(table: &Table, side: Side) -> Statement {
    let mut statement = added("pg_catalog.count(*)", table, side);
    place(" AND t.ctid OPERATOR(pg_catalog.>=) ", &mut statement);
    place(" AND t.ctid OPERATOR(pg_catalog.<) ", &mut statement);
    statement
}

/// Rows of heirs (INHERITS) are none of this table; those of partitions are.
fn added(what: &str, table: &Table, side: Side) -> Statement {
    let only = if table.partitions.get(side).is_empty() { "ONLY " } else { "" };
    let from = table.qualified(side);
    let mut statement = empty(format!("SELECT {what} FROM {only}{from} AS t WHERE t.xmin OPERATOR(pg_catalog.=) $1"));
    statement.parameter_types.push(XID);
    statement
}

fn place(compared: &str, statement: &mut Statement) {
    statement.parameter_types.push(TID);
    let _ = write!(statement.text, "{compared}${}", statement.parameter_types.len());
}

fn empty(text: String) -> Statement {
    Statement { text, ..Statement::default() }
}

/// `k = $1`; `k = ANY (ARRAY[$1, $2])`; `(k = $1 AND l = $2) OR (k = $3 AND l = $4)`: forms for which the key's index is used.
fn by_key(table: &Table, side: Side, keys: usize, statement: &mut Statement) {
    let Some(key) = &table.key else {
        statement.text.push_str("false");
        return;
    };
    let equals = key.equals.get(side);
    if let ([at], true) = (key.columns.as_slice(), keys > 1) {
        let column = &table.columns[*at];
        let _ = write!(statement.text, "t.{} {} ANY (ARRAY[", quote(column.name.get(side)), equals[0]);
        for number in 0..keys {
            if number > 0 {
                statement.text.push_str(", ");
            }
            parameter(column, side, statement);
        }
        statement.text.push_str("])");
        return;
    }
    for number in 0..keys {
        statement.text.push_str(if number == 0 { "(" } else { " OR (" });
        for (position, &at) in key.columns.iter().enumerate() {
            let and = if position > 0 { " AND " } else { "" };
            let column = &table.columns[at];
            let _ = write!(statement.text, "{and}t.{} {} ", quote(column.name.get(side)), equals[position]);
            parameter(column, side, statement);
        }
        statement.text.push(')');
    }
}

/// The next parameter. One that travels as text goes through its type's input function: a cast from text may be another function (text to
/// regclass takes no number).
fn parameter(column: &Column, side: Side, statement: &mut Statement) {
    statement.parameter_types.push(*column.type_oid.get(side));
    statement.formats.push(match column.format {
        Format::Binary => 1,
        Format::Text => 0,
    });
    let _ = write!(statement.text, "${}", statement.parameter_types.len());
}
