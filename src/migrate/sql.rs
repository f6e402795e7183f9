//! The statements by which reconcile looks at many keys at once and writes many rows. Pure: text from a table's definition.
//!
//! Keys are passed as one array for each key column and joined by `unnest(...) WITH ORDINALITY`, so that the server compares them by
//! its own `=` (citext, numeric) and the answer says by position which key it is about. Columns of array type cannot be elements
//! of an array, and unnest takes composites apart: tables with such a key are asked for one key at a time.

use bytes::Bytes;
use tokio_postgres::types::ToSql;

use super::binary::{Raw, array};
use crate::catalog::{Column, Format, Layout, Table, quote};
use crate::ledger::debts::Values;
use crate::phase::Side;

/// OID of type text.
const TEXT: u32 = 25;

/// A table's statements on one side.
pub(crate) struct TableSql<'a> {
    pub table: &'a Table,
    pub side: Side,
    /// Positions of the key's columns.
    pub key: &'a [usize],
    /// Positions of the columns that can be written on this side.
    pub writable: Vec<usize>,
    /// Keys can be passed as arrays.
    pub many: bool,
}

impl<'a> TableSql<'a> {
    /// For that side; a table without a key has no key columns.
    pub fn new(table: &'a Table, side: Side) -> TableSql<'a> {
        let key: &[usize] = table.key.as_ref().map_or(&[], |key| &key.columns);
        let writable = (0..table.columns.len()).filter(|&at| !*table.columns[at].generated.get(side)).collect();
        let many =
            !key.iter().any(|&at| matches!(table.columns[at].kind.layout, Layout::Array(_) | Layout::Composite(_)));
        TableSql { table, side, key, writable, many }
    }

    /// `ONLY schema.table` for an ordinary table: rows of tables that inherit from it are not its own.
    pub fn only(&self) -> String {
        let partitioned = !self.table.partitions.get(self.side).is_empty();
        format!("{}{}", if partitioned { "" } else { "ONLY " }, self.table.qualified(self.side))
    }

    fn name(&self, at: usize) -> String {
        quote(self.table.columns[at].name.get(self.side))
    }

    fn type_name(&self, at: usize) -> &str {
        self.table.columns[at].kind.name.get(self.side)
    }

    /// Columns as images carry them, of relation `t`.
    fn read(&self, columns: impl Iterator<Item = usize>) -> String {
        let read = |at: usize| match self.table.columns[at].format {
            Format::Binary => format!("t.{}", self.name(at)),
            Format::Text => format!("(t.{})::text", self.name(at)),
        };
        columns.map(read).collect::<Vec<_>>().join(", ")
    }

    /// The columns that can be written here. The same columns are read on the other side for it.
    pub fn read_columns(&self, columns: &[usize]) -> String {
        self.read(columns.iter().copied())
    }

    /// `$n` as a value of that column.
    fn parameter(&self, at: usize, number: usize) -> String {
        match self.table.columns[at].format {
            Format::Binary => format!("${number}::{}", self.type_name(at)),
            Format::Text => format!("${number}::text::{}", self.type_name(at)),
        }
    }

    /// The relation `q` of the keys asked for (columns k0, k1, ..., and position `i` from 1).
    fn asked(&self) -> String {
        let names: Vec<String> = (0..self.key.len()).map(|n| format!("k{n}")).collect();
        let names = names.join(", ");
        if !self.many {
            let one: Vec<String> = self.key.iter().enumerate().map(|(n, &at)| self.parameter(at, n + 1)).collect();
            return format!("(VALUES ({}, 1::bigint)) AS q({names}, i)", one.join(", "));
        }
        let arrays: Vec<String> = (self.key.iter().enumerate())
            .map(|(n, &at)| match self.table.columns[at].format {
                Format::Binary => format!("${}::{}[]", n + 1, self.type_name(at)),
                Format::Text => format!("${}::text[]", n + 1),
            })
            .collect();
        format!("unnest({}) WITH ORDINALITY AS q({names}, i)", arrays.join(", "))
    }

    fn matches(&self) -> String {
        let equal = |(n, &at): (usize, &usize)| match self.table.columns[at].format {
            Format::Binary => format!("t.{} = q.k{n}", self.name(at)),
            Format::Text => format!("t.{} = q.k{n}::{}", self.name(at), self.type_name(at)),
        };
        self.key.iter().enumerate().map(equal).collect::<Vec<_>>().join(" AND ")
    }

    /// Positions (and roughly the bytes) of the asked rows that could be locked at once.
    pub fn lock(&self) -> String {
        format!(
            "SELECT q.i, {} FROM {} JOIN {} AS t ON {} FOR NO KEY UPDATE OF t SKIP LOCKED",
            self.size(),
            self.asked(),
            self.only(),
            self.matches()
        )
    }

    /// Positions and columns of the asked rows, without a lock.
    pub fn look(&self, columns: &[usize]) -> String {
        format!(
            "SELECT q.i, {} FROM {} JOIN {} AS t ON {}",
            self.read_columns(columns),
            self.asked(),
            self.only(),
            self.matches()
        )
    }

    /// Positions and columns of the asked rows that could be locked at once.
    pub fn lock_and_look(&self, columns: &[usize]) -> String {
        format!("{} FOR NO KEY UPDATE OF t SKIP LOCKED", self.look(columns))
    }

    /// Positions of the asked rows that are there.
    pub fn exist(&self) -> String {
        format!("SELECT q.i FROM {} JOIN {} AS t ON {}", self.asked(), self.only(), self.matches())
    }

    /// Deletes the asked rows.
    pub fn delete(&self) -> String {
        format!("DELETE FROM {} AS t USING {} WHERE {}", self.only(), self.asked(), self.matches())
    }

    /// Keys behind the one given (all keys where `after` is false) in the order of this side, with the bytes of their rows.
    /// The last parameter is how many.
    pub fn page(&self, after: bool) -> String {
        let columns: Vec<String> = self.key.iter().map(|&at| format!("t.{}", self.name(at))).collect();
        let columns = columns.join(", ");
        let from = if after {
            let bound: Vec<String> = self.key.iter().enumerate().map(|(n, &at)| self.parameter(at, n + 1)).collect();
            format!("WHERE ({columns}) > ({})", bound.join(", "))
        } else {
            String::new()
        };
        format!(
            "SELECT {}, {} FROM {} AS t {from} ORDER BY {columns} LIMIT ${}::bigint",
            self.size(),
            self.read(self.key.iter().copied()),
            self.only(),
            if after { self.key.len() + 1 } else { 1 }
        )
    }

    /// Roughly the bytes of a row, found without fetching what is stored out of line.
    fn size(&self) -> String {
        let mut parts = vec!["16".to_owned()];
        for (at, column) in self.table.columns.iter().enumerate() {
            parts.push(match column.kind.oid.get(self.side) {
                // bytea, text, bpchar, varchar: octet_length reads the size only, before compression.
                17 | 25 | 1042 | 1043 => format!("coalesce(octet_length(t.{}), 0)", self.name(at)),
                // Fixed length.
                16 | 18 | 20 | 21 | 23 | 26 | 700 | 701 | 1082 | 1083 | 1114 | 1184 | 2950 => "8".to_owned(),
                _ => format!("coalesce(pg_column_size(t.{}), 0)", self.name(at)),
            });
        }
        format!("({})::bigint", parts.join(" + "))
    }

    /// Inserts `rows` rows of the writable columns; with `upsert`, a row that is there is rewritten.
    pub fn insert(&self, rows: usize, upsert: bool) -> String {
        let columns: Vec<String> = self.writable.iter().map(|&at| self.name(at)).collect();
        let width = self.writable.len();
        let row = |row: usize| {
            let values: Vec<String> =
                self.writable.iter().enumerate().map(|(n, &at)| self.parameter(at, row * width + n + 1)).collect();
            format!("({})", values.join(", "))
        };
        let rows: Vec<String> = (0..rows).map(row).collect();
        let always = self.table.columns.iter().any(|column| *column.identity_always.get(self.side));
        format!(
            "INSERT INTO {} ({}) {}VALUES {}{}",
            self.table.qualified(self.side),
            columns.join(", "),
            if always { "OVERRIDING SYSTEM VALUE " } else { "" },
            rows.join(", "),
            if upsert { self.on_conflict() } else { String::new() }
        )
    }

    fn on_conflict(&self) -> String {
        let bytewise = self.table.key.as_ref().is_none_or(|key| key.bytewise);
        let names: Vec<String> = self.key.iter().map(|&at| self.name(at)).collect();
        // Equal keys whose bytes differ ('A' and 'a' of citext) must be rewritten too.
        let settable = |at: &usize| {
            !(*self.table.columns[*at].identity_always.get(self.side) || bytewise && self.key.contains(at))
        };
        let mut set: Vec<usize> = self.writable.iter().copied().filter(settable).collect();
        if set.is_empty() {
            // Nothing but the key: it is set to itself for the row's lock, where it may be set at all.
            set.extend(self.key.iter().copied().find(|&at| !*self.table.columns[at].identity_always.get(self.side)));
        }
        if set.is_empty() {
            return format!(" ON CONFLICT ({}) DO NOTHING", names.join(", "));
        }
        let set: Vec<String> = set.iter().map(|&at| format!("{0} = EXCLUDED.{0}", self.name(at))).collect();
        format!(" ON CONFLICT ({}) DO UPDATE SET {}", names.join(", "), set.join(", "))
    }

    /// ON CONFLICT cannot be used: a deferrable key is no arbiter, an identity GENERATED ALWAYS outside the key cannot be SET.
    pub fn replaces(&self) -> bool {
        let Some(key) = &self.table.key else { return false };
        let fixed =
            |(at, column): (usize, &Column)| *column.identity_always.get(self.side) && !key.columns.contains(&at);
        *key.deferrable.get(self.side) || self.table.columns.iter().enumerate().any(fixed)
    }

    /// COPY in binary takes the rows as they are.
    pub fn copies(&self) -> bool {
        self.writable.iter().all(|&at| self.table.columns[at].format == Format::Binary)
    }

    /// COPY of the writable columns.
    pub fn copy_in(&self) -> String {
        let columns: Vec<String> = self.writable.iter().map(|&at| self.name(at)).collect();
        format!("COPY {} ({}) FROM STDIN (FORMAT binary)", self.table.qualified(self.side), columns.join(", "))
    }

    /// Rows in one INSERT: as few different statements as possible, below the protocol's 65,535 parameters.
    pub fn rows_per_insert(&self, left: usize) -> usize {
        let most = 32_767 / self.writable.len().max(1);
        [64, 8, 1].into_iter().find(|&size| size <= left && size <= most).unwrap_or(1)
    }

    /// The parameters of a question about these keys; where `many` is false there is one key.
    pub fn asked_parameters(&self, keys: &[&Values]) -> Vec<Raw> {
        if !self.many {
            return keys[0].iter().cloned().map(Raw).collect();
        }
        let column = |n: usize| {
            let column = &self.table.columns[self.key[n]];
            let element = match column.format {
                Format::Binary => *column.kind.oid.get(self.side),
                Format::Text => TEXT,
            };
            let values: Vec<&Option<Bytes>> = keys.iter().map(|key| &key[n]).collect();
            array(element, values.into_iter())
        };
        (0..self.key.len()).map(column).collect()
    }
}

/// As the driver takes them.
pub(crate) fn references(parameters: &[Raw]) -> Vec<&(dyn ToSql + Sync)> {
    parameters.iter().map(|parameter| parameter as &(dyn ToSql + Sync)).collect()
}
