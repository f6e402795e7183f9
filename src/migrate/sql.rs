//! The statements by which reconcile looks at many keys at once and writes many rows. Pure: text from a table's definition.
//!
//! Keys are passed as one array for each key column and joined by `unnest(...) WITH ORDINALITY`, so that the server compares them by
//! its own `=` (citext, numeric) and the answer says by position which key it is about. Columns of array type cannot be elements
//! of an array, unnest takes composites apart, and values that travel as text are no elements: tables with such a key are asked for one key
//! at a time.

use bytes::Bytes;
use tokio_postgres::types::ToSql;

use super::binary::{Parameter, array, array_text};
use crate::catalog::{Format, Layout, Table, quote};
use crate::ledger::debts::Values;
use crate::phase::Side;
use crate::plan::image;

/// Keys behind `after` up to `upto`, in the order of a side's index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Bounds {
    /// None: from the first.
    pub after: Option<Values>,
    /// None: to the end.
    pub upto: Option<Values>,
}

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
        let many = !key.iter().map(|&at| &table.columns[at]).any(|column| {
            matches!(column.kind.layout, Layout::Array(_) | Layout::Composite(_)) || column.format == Format::Text
        });
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

    /// `$n` as a value of that column. One that travels as text goes through the type's input function: no cast from text.
    fn parameter(&self, at: usize, number: usize) -> String {
        format!("${number}::{}", self.type_name(at))
    }

    /// The relation `q` of the keys asked for (columns k0, k1, ..., and position `i` from 1).
    fn asked(&self) -> String {
        let names: Vec<String> = (0..self.key.len()).map(|n| format!("k{n}")).collect();
        let names = names.join(", ");
        if !self.many {
            let one: Vec<String> = self.key.iter().enumerate().map(|(n, &at)| self.parameter(at, n + 1)).collect();
            return format!("(VALUES ({}, 1::bigint)) AS q({names}, i)", one.join(", "));
        }
        let arrays: Vec<String> =
            self.key.iter().enumerate().map(|(n, &at)| format!("${}::{}[]", n + 1, self.type_name(at))).collect();
        format!("unnest({}) WITH ORDINALITY AS q({names}, i)", arrays.join(", "))
    }

    fn matches(&self) -> String {
        let Some(key) = &self.table.key else { return "false".to_owned() };
        let equals = key.equals.get(self.side);
        let equal = |(n, &at): (usize, &usize)| format!("t.{} {} q.k{n}", self.name(at), equals[n]);
        self.key.iter().enumerate().map(equal).collect::<Vec<_>>().join(" AND ")
    }

    /// Positions and the asked keys themselves, as images carry them.
    pub fn convert(&self) -> String {
        let names: Vec<String> = (0..self.key.len())
            .map(|n| match self.table.columns[self.key[n]].format {
                Format::Binary => format!("q.k{n}"),
                Format::Text => format!("(q.k{n})::text"),
            })
            .collect();
        format!("SELECT q.i, {} FROM {}", names.join(", "), self.asked())
    }

    /// The parameters of a question about keys whose values are texts.
    pub fn text_parameters(&self, keys: &[&Values]) -> Vec<Parameter> {
        let value = |n: usize| match self.many {
            true => Some(array_text(keys.iter().map(|key| &key[n]))),
            false => keys[0][n].clone(),
        };
        (0..self.key.len()).map(|n| Parameter { value: value(n), text: true }).collect()
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

    /// Positions of the asked rows that could be locked at once to be deleted.
    pub fn seize(&self) -> String {
        format!("{} FOR UPDATE OF t SKIP LOCKED", self.exist())
    }

    /// Positions and columns of the asked rows, without a lock.
    pub fn look(&self, columns: &[usize]) -> String {
        self.look_at(&self.read_columns(columns))
    }

    /// Positions of the asked rows, and these expressions over each (relation `t`).
    pub fn look_at(&self, expressions: &str) -> String {
        format!("SELECT q.i, {expressions} FROM {} JOIN {} AS t ON {}", self.asked(), self.only(), self.matches())
    }

    /// Positions and columns of the asked rows that could be locked at once.
    pub fn lock_and_look(&self, columns: &[usize]) -> String {
        format!("{} FOR NO KEY UPDATE OF t SKIP LOCKED", self.look(columns))
    }

    /// Positions of the asked rows that are there.
    pub fn exist(&self) -> String {
        format!("SELECT q.i FROM {} JOIN {} AS t ON {}", self.asked(), self.only(), self.matches())
    }

    /// Positions of the asked keys that new, as the authority of a lazy table, has deleted or brought over.
    pub fn noted_gone(&self) -> String {
        let gone = crate::ledger::lazy("gone", self.table.number);
        format!("SELECT q.i FROM {} JOIN {gone} AS t ON {}", self.asked(), self.matches())
    }

    /// Takes the lock that every write of a row takes.
    pub fn lock_table(&self) -> String {
        format!("LOCK TABLE {} IN ROW EXCLUSIVE MODE", self.only())
    }

    /// Deletes the asked rows.
    pub fn delete(&self) -> String {
        format!("DELETE FROM {} AS t USING {} WHERE {}", self.only(), self.asked(), self.matches())
    }

    /// The key's columns of relation `t`, as they stand in ORDER BY.
    pub fn key_columns(&self) -> String {
        self.key.iter().map(|&at| format!("t.{}", self.name(at))).collect::<Vec<_>>().join(", ")
    }

    /// The key's columns of relation `t`, as images carry them.
    pub fn read_key(&self) -> String {
        self.read(self.key.iter().copied())
    }

    /// The key's columns of relation `t` as an array of texts.
    pub fn key_texts(&self) -> String {
        let texts: Vec<String> =
            self.key.iter().map(|&at| format!("pg_catalog.format('%s', t.{})", self.name(at))).collect();
        format!("ARRAY[{}]", texts.join(", "))
    }

    /// That a row's key lies within bounds of this shape; their keys are the first parameters. And the number of the next parameter.
    pub fn within(&self, after: bool, upto: bool) -> (String, usize) {
        let columns = self.key_columns();
        let (mut number, mut terms) = (1, Vec::new());
        for (there, operator) in [(after, ">"), (upto, "<=")] {
            if there {
                let bound: Vec<String> =
                    self.key.iter().enumerate().map(|(n, &at)| self.parameter(at, number + n)).collect();
                terms.push(format!("({columns}) {operator} ({})", bound.join(", ")));
                number += self.key.len();
            }
        }
        (if terms.is_empty() { "true".to_owned() } else { terms.join(" AND ") }, number)
    }

    /// The parameters that bounds are.
    pub fn bound_parameters(&self, bounds: &Bounds) -> Vec<Parameter> {
        [&bounds.after, &bounds.upto].into_iter().flatten().flat_map(|key| self.key_parameters(key)).collect()
    }

    /// Keys within bounds of this shape in the order of this side, with the bytes of their rows. The last parameter is how many.
    pub fn page(&self, after: bool, upto: bool) -> String {
        let (within, limit) = self.within(after, upto);
        format!(
            "SELECT {}, {} FROM {} AS t WHERE {within} ORDER BY {} LIMIT ${limit}::bigint",
            self.size(),
            self.read_key(),
            self.only(),
            self.key_columns()
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
        let statement = if upsert { image::upsert } else { image::insert };
        statement(self.table, self.side, rows).text
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
    pub fn asked_parameters(&self, keys: &[&Values]) -> Vec<Parameter> {
        if !self.many {
            return self.key_parameters(keys[0]);
        }
        let column = |n: usize| {
            let element = *self.table.columns[self.key[n]].kind.oid.get(self.side);
            let values: Vec<&Option<Bytes>> = keys.iter().map(|key| &key[n]).collect();
            Parameter { value: Some(array(element, values.into_iter())), text: false }
        };
        (0..self.key.len()).map(column).collect()
    }

    /// The parameters that one key is.
    pub fn key_parameters(&self, key: &[Option<Bytes>]) -> Vec<Parameter> {
        self.parameters(self.key, key)
    }

    /// The parameters that one row of the writable columns is.
    pub fn row_parameters(&self, row: &[Option<Bytes>]) -> Vec<Parameter> {
        self.parameters(&self.writable, row)
    }

    fn parameters(&self, columns: &[usize], values: &[Option<Bytes>]) -> Vec<Parameter> {
        let text = |at: usize| self.table.columns[at].format == Format::Text;
        columns.iter().zip(values).map(|(&at, value)| Parameter { value: value.clone(), text: text(at) }).collect()
    }
}

/// As the driver takes them.
pub(crate) fn references(parameters: &[Parameter]) -> Vec<&(dyn ToSql + Sync)> {
    parameters.iter().map(|parameter| parameter as &(dyn ToSql + Sync)).collect()
}
