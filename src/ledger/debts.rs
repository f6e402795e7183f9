//! `crossfade.ledger.debts`: a sequence of debts as bytes.
//!
//! Each begins with the table's number (u32, big-endian, as all numbers here) and a tag byte:
//! `K` a key, `T` the whole table, `X` the whole table, tainted by a write out of sight, `B` the keys between two, `R` a row of a table
//! without a key. `B`: the key before the first one, then the last one, each as a `K`'s; with 0 columns it is open at that end. `K`: number of key columns (u16), then each value. `R`: a token (16 bytes, the same for all rows of a transaction), number of
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
    /// Keys behind `after` up to `upto`, in the order of the authority's index.
    Range {
        /// The table's number.
        table: u32,
        /// The last key before it; None: from the first.
        after: Option<Values>,
        /// Its last key; None: to the end.
        upto: Option<Values>,
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
            Debt::Key { table, .. }
            | Debt::Table { table }
            | Debt::Taint { table }
            | Debt::Range { table, .. }
            | Debt::Row { table, .. } => *table,
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
        Debt::Range { table, after, upto } => {
            out.put_u32(*table);
            out.put_u8(b'B');
            for end in [after, upto] {
                put_values(end.as_deref().unwrap_or_default(), out);
            }
        }
        Debt::Row { table, token, values } => {
            out.put_u32(*table);
            out.put_u8(b'R');
            out.put_slice(token);
            put_values(values, out);
        }
    }
}

/// Appends values: their number, then each with its length.
pub fn put_values(values: &[Option<Bytes>], out: &mut BytesMut) {
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
        b'B' => {
            let mut end = || take_values(rest).map(|values| Some(values).filter(|values| !values.is_empty()));
            Some(Debt::Range { table, after: end()?, upto: end()? })
        }
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

/// Takes values off the front, as [`put_values`] has written them; None: there are none.
pub fn take_values(rest: &mut Bytes) -> Option<Values> {
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

    fn end() -> impl Strategy<Value = Option<Values>> {
        values().prop_map(|values| Some(values).filter(|values| !values.is_empty()))
    }

    fn debt() -> impl Strategy<Value = Debt> {
        prop_oneof![
            (any::<u32>(), values()).prop_map(|(table, key)| Debt::Key { table, key }),
            any::<u32>().prop_map(|table| Debt::Table { table }),
            any::<u32>().prop_map(|table| Debt::Taint { table }),
            (any::<u32>(), end(), end()).prop_map(|(table, after, upto)| Debt::Range { table, after, upto }),
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
