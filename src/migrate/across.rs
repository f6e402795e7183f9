//! Values of one side as the other takes them: OIDs inside arrays, composites and ranges differ between servers.

use crate::catalog::Table;
use crate::ledger::debts::Values;
use crate::phase::Side;
use crate::plan::image::{Row, translate, translate_key};

/// A key as read on side `from`, for the other.
pub(crate) fn key_across(table: &Table, from: Side, key: Values) -> Values {
    translate_key(table, from, key)
}

/// Values of these columns as read on side `from`, for the other.
pub(crate) fn row_across(table: &Table, from: Side, columns: &[usize], values: Values) -> Values {
    let mut row = Row { values: vec![None; table.columns.len()] };
    for (&at, value) in columns.iter().zip(values) {
        row.values[at] = value;
    }
    let mut row = translate(table, from, row);
    columns.iter().map(|&at| row.values[at].take()).collect()
}
