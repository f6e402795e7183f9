//! `crossfade.ledger.debts`: a sequence of debts as bytes.
//!
//! Each begins with the table's number (u32, big-endian, as all numbers here) and a tag byte:
//! `K` a key, `T` the whole table, `X` the whole table, tainted by a write out of sight, `R` a row of a table without a key.
//! `K`: number of key columns (u16), then each value. `R`: a token (16 bytes, the same for all rows of a transaction), number of
//! columns (u16), then each value. A value: its length (i32, -1 for NULL), then its bytes, as an image of the authority carries them.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Values in the order of a table's key or of its columns; None is NULL.
pub type Values = Vec<Option<Bytes>>;

/// One debt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Debt {
    /// The row with this key (values in the order of `Table::key`).
    Key {
        /// The table's number.
        table: u32,
        /// The key.
        key: Values,
    },
    /// The whole table.
    Table {
        /// The table's number.
        table: u32,
    },
    /// The whole table: a write out of sight may have changed it.
    Taint {
        /// The table's number.
        table: u32,
    },
    /// A row inserted into a table without a key (values in the order of `Table::columns`).
    Row {
        /// The table's number.
        table: u32,
        /// What `crossfade.applied` on the mirror holds once the transaction's rows are there.
        token: [u8; 16],
        /// The row.
        values: Values,
    },
}

impl Debt {
    /// The table's number.
    pub fn table(&self) -> u32 {
        match self {
            Debt::Key { table, .. } | Debt::Table { table } | Debt::Taint { table } | Debt::Row { table, .. } => *table,
        }
    }
}

/// Bytes that are no sequence of debts.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the ledger holds debts that cannot be read (at byte {0}): was it written by another version of crossfade?")]
pub struct Malformed(pub usize);

/// Appends one debt.
pub fn encode(debt: &Debt, out: &mut BytesMut) {
    match debt {
        Debt::Key { table, key } => {
            out.put_u32(*table);
            out.put_u8(b'K');
            put_values(key, out);
        }
        Debt::Table { table } => {
            out.put_u32(*table);
            out.put_u8(b'T');
        }
        Debt::Taint { table } => {
            out.put_u32(*table);
            out.put_u8(b'X');
        }
        Debt::Row { table, token, values } => {
            out.put_u32(*table);
            out.put_u8(b'R');
            out.put_slice(token);
            put_values(values, out);
        }
    }
}

fn put_values(values: &[Option<Bytes>], out: &mut BytesMut) {
    out.put_u16(values.len() as u16);
    for value in values {
        match value {
            None => out.put_i32(-1),
            Some(bytes) => {
                out.put_i32(bytes.len() as i32);
                out.put_slice(bytes);
            }
        }
    }
}

/// Reads all debts of a ledger row.
pub fn decode(bytes: impl Into<Bytes>) -> Result<Vec<Debt>, Malformed> {
    let mut rest: Bytes = bytes.into();
    let total = rest.len();
    let mut debts = Vec::new();
    while !rest.is_empty() {
        debts.push(take(&mut rest).ok_or(Malformed(total - rest.len()))?);
    }
    Ok(debts)
}

fn take(rest: &mut Bytes) -> Option<Debt> {
    if rest.len() < 5 {
        return None;
    }
    let table = rest.get_u32();
    match rest.get_u8() {
        b'K' => Some(Debt::Key { table, key: take_values(rest)? }),
        b'T' => Some(Debt::Table { table }),
        b'X' => Some(Debt::Taint { table }),
        b'R' => {
            let mut token = [0; 16];
            if rest.len() < token.len() {
                return None;
            }
            rest.copy_to_slice(&mut token);
            Some(Debt::Row { table, token, values: take_values(rest)? })
        }
        _ => None,
    }
}

fn take_values(rest: &mut Bytes) -> Option<Values> {
    if rest.len() < 2 {
        return None;
    }
    let count = rest.get_u16();
    let mut values = Vec::with_capacity(usize::from(count).min(rest.len() / 4 + 1));
    for _ in 0..count {
        if rest.len() < 4 {
            return None;
        }
        values.push(match rest.get_i32() {
            -1 => None,
            length => {
                let length = usize::try_from(length).ok()?;
                if rest.len() < length {
                    return None;
                }
                Some(rest.split_to(length))
            }
        });
    }
    Some(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values() -> impl Strategy<Value = Values> {
        prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..20).prop_map(Bytes::from)), 0..5)
    }

    fn debt() -> impl Strategy<Value = Debt> {
        prop_oneof![
            (any::<u32>(), values()).prop_map(|(table, key)| Debt::Key { table, key }),
            any::<u32>().prop_map(|table| Debt::Table { table }),
            any::<u32>().prop_map(|table| Debt::Taint { table }),
            (any::<u32>(), any::<[u8; 16]>(), values())
                .prop_map(|(table, token, values)| { Debt::Row { table, token, values } }),
        ]
    }

    proptest! {
        #[test]
        fn fuzz_debts_round_trip(debts in prop::collection::vec(debt(), 0..10)) {
            let mut bytes = BytesMut::new();
            for debt in &debts {
                encode(debt, &mut bytes);
            }
            prop_assert_eq!(decode(bytes.freeze()), Ok(debts));
        }

        #[test]
        fn fuzz_garbage_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(bytes);
        }
    }
}
