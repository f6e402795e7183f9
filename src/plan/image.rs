//! Images: decoding what the hidden column returned, translating OIDs, building what the mirror executes. Pure.
//!
//! `hidden` takes the column apart, `row` checks it against the table's definition, `translate` rewrites OIDs for the other side,
//! and `upsert`, `insert`, `delete` and their like are the statements that put rows there, with `parameters` and `key_parameters`.

mod decode;
mod statement;
mod translate;

use bytes::Bytes;

use crate::catalog::Table;
use crate::ledger::debts::Values;
use crate::phase::Side;

pub use super::splice::{Texts, expression, texts};
pub use decode::{Action, DefinitionChanged, Fields, ImageError, hidden, row};
pub use statement::{
    KEY_LOCK, added_behind, added_by_key, count_added, delete, insert, insert_missing, keys_max, needs_lock,
    needs_replace, put_insert, put_upsert, rows_max, select, upsert,
};
pub use translate::{translate, translate_key};

/// One row: values in the order of `Table::columns`, each in that column's `Format`, OIDs as on the side it was read from. None is NULL.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// The values.
    pub values: Vec<Option<Bytes>>,
}

/// A statement for one side, for the extended protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statement {
    /// With $1, $2, ...
    pub text: String,
    /// OIDs on that side (0: let the server decide).
    pub parameter_types: Vec<u32>,
    /// 1 binary, 0 text, one per parameter.
    pub formats: Vec<i16>,
}

/// What `upsert`, `insert` and `insert_missing` take for one row, translated for that side: its columns but for stored generated ones.
pub fn parameters(table: &Table, side: Side, row: &Row) -> Vec<Option<Bytes>> {
    statement::writable(table, side).map(|at| row.values[at].clone()).collect()
}

/// What `delete` and `select` take for one key: of a row translated for their side. Empty for a table without a key.
pub fn key_parameters(table: &Table, row: &Row) -> Vec<Option<Bytes>> {
    key_of(table, row)
}

/// The key of a row, in the order of `Table::key`, as a debt holds it: OIDs as in the row. Empty for a table without a key.
pub fn key_of(table: &Table, row: &Row) -> Values {
    table.key.iter().flat_map(|key| &key.columns).map(|&at| row.values[at].clone()).collect()
}
