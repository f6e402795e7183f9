//! Images: decoding what the hidden column returned, translating OIDs, building what the mirror executes. Pure.

use bytes::Bytes;

/// One row: values in the order of `Table::columns`, each in that column's `Format`, OIDs as on the side it was read from. None is NULL.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// The values.
    pub values: Vec<Option<Bytes>>,
}

/// A statement for one side, for the extended protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// With $1, $2, ...
    pub text: String,
    /// OIDs on that side (0: let the server decide).
    pub parameter_types: Vec<u32>,
    /// 1 binary, 0 text, one per parameter.
    pub formats: Vec<i16>,
}
