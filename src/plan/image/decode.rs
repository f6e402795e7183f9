//! record_send's bytes: number of fields (i32), then for each its type's OID, its length (i32, -1 for NULL) and value.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::Row;
use crate::catalog::{Column, Format, Layout, Table};
use crate::phase::Side;
use crate::plan::splice::convertible;

const OID: u32 = 26;
const INT8: u32 = 20;
const TEXT: u32 = 25;
const BYTEA: u32 = 17;

/// The hidden column, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fields {
    /// The pg_class OID of the relation that holds the row: the table, a partition, or one that does not migrate at all (a temporary
    /// table of the same name): look it up in `Catalog::by_oid` before anything else.
    pub tableoid: u32,
    /// Text was made UTF-8 by `convert_to` (`Texts::Utf8`, `Texts::Stored`).
    pub converted: bool,
    /// Type OID and value of each column.
    pub values: Vec<(u32, Option<Bytes>)>,
}

/// What MERGE has done to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is new.
    Inserted,
    /// It is as the image says.
    Updated,
    /// It is gone; the image is what it was.
    Deleted,
}

impl Fields {
    /// Takes off what MERGE says of the row, behind its columns.
    ///
    /// # Errors
    /// It says nothing of the kind.
    pub fn take_action(&mut self) -> Result<Action, ImageError> {
        match self.values.pop() {
            Some((TEXT, Some(action))) if action == "INSERT" => Ok(Action::Inserted),
            Some((TEXT, Some(action))) if action == "UPDATE" => Ok(Action::Updated),
            Some((TEXT, Some(action))) if action == "DELETE" => Ok(Action::Deleted),
            _ => Err(ImageError("it does not say what MERGE has done")),
        }
    }
}

/// A hidden column that is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an image cannot be read: {0}")]
pub struct ImageError(&'static str);

/// The row was read under another definition of its table than the catalog has: load it again.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the definition of table {table} has changed: {what}")]
pub struct DefinitionChanged {
    /// `schema.name` on old.
    pub table: String,
    /// What differs.
    pub what: String,
}

/// Takes the hidden column of a DataRow apart. `binary`: the result format of that column; in text it is bytea_output's hex or escape form.
pub fn hidden(field: &[u8], binary: bool) -> Result<Fields, ImageError> {
    let mut rest = match binary {
        true => Bytes::copy_from_slice(field),
        false => unescape(field)?,
    };
    let cut = ImageError("it ends early");
    if rest.len() < 4 {
        return Err(cut);
    }
    let count = rest.get_i32();
    let mut values = Vec::with_capacity(usize::try_from(count).unwrap_or(0).min(rest.len() / 8));
    for _ in 0..count {
        if rest.len() < 8 {
            return Err(cut);
        }
        let kind = rest.get_u32();
        let length = rest.get_i32();
        let value = match usize::try_from(length) {
            Err(_) if length == -1 => None,
            Ok(length) if length <= rest.len() => Some(rest.split_to(length)),
            _ => return Err(cut),
        };
        values.push((kind, value));
    }
    if !rest.is_empty() {
        return Err(ImageError("there are bytes behind its end"));
    }
    if values.is_empty() {
        return Err(ImageError("it has no field"));
    }
    let (tableoid, converted) = match values.remove(0) {
        (OID, Some(mut oid)) if oid.len() == 4 => (oid.get_u32(), false),
        (INT8, Some(mut oid)) if oid.len() == 8 => {
            (u32::try_from(oid.get_i64()).map_err(|_| ImageError("its tableoid is no OID"))?, true)
        }
        _ => return Err(ImageError("its first field is no tableoid")),
    };
    Ok(Fields { tableoid, converted, values })
}

/// bytea's text: `\x` and hex digits, or the older form with octal escapes.
fn unescape(text: &[u8]) -> Result<Bytes, ImageError> {
    if let Some(digits) = text.strip_prefix(b"\\x") {
        let mut bytes = BytesMut::with_capacity(digits.len() / 2);
        if digits.len() % 2 != 0 {
            return Err(ImageError("an odd number of hex digits"));
        }
        for pair in digits.chunks_exact(2) {
            match (hex(pair[0]), hex(pair[1])) {
                (Some(high), Some(low)) => bytes.put_u8(high << 4 | low),
                _ => return Err(ImageError("a character that is no hex digit")),
            }
        }
        return Ok(bytes.freeze());
    }
    let mut bytes = BytesMut::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, behind)) = rest.split_first() {
        let byte;
        (byte, rest) = match (first, behind) {
            (b'\\', [b'\\', behind @ ..]) => (b'\\', behind),
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', behind @ ..]) => {
                ((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'), behind)
            }
            (b'\\', _) => return Err(ImageError("a backslash that begins no escape")),
            (plain, behind) => (plain, behind),
        };
        bytes.put_u8(byte);
    }
    Ok(bytes.freeze())
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

/// The row of a table, read on that side, in the order of `Table::columns`. An error where number or types of its columns are not as the
/// catalog has them.
pub fn row(table: &Table, side: Side, fields: Fields) -> Result<Row, DefinitionChanged> {
    let changed = |what: String| DefinitionChanged { table: table.label(), what };
    let order = table.order.get(side);
    if fields.values.len() != order.len() {
        let (found, known) = (fields.values.len(), order.len());
        return Err(changed(format!("it has {found} columns on {side}, the catalog knows {known}")));
    }
    let mut values = vec![None; table.columns.len()];
    for (&position, (kind, value)) in order.iter().zip(fields.values) {
        let column = &table.columns[position];
        let expected = expected(column, side, fields.converted);
        if kind != expected {
            let name = column.name.get(side);
            return Err(changed(format!("column {name} on {side} came as type {kind}, not {expected}")));
        }
        values[position] = match column.kind.layout {
            Layout::Jsonb if fields.converted && column.format == Format::Binary => value.map(versioned),
            _ => value,
        };
    }
    Ok(Row { values })
}

/// The type as which the hidden column gives this one: see `plan::splice`.
fn expected(column: &Column, side: Side, converted: bool) -> u32 {
    match column.format {
        _ if converted && convertible(column) => BYTEA,
        Format::Text => TEXT,
        Format::Binary => *column.type_oid.get(side),
    }
}

/// jsonb_send's form of jsonb's text.
fn versioned(text: Bytes) -> Bytes {
    let mut bytes = BytesMut::with_capacity(text.len() + 1);
    bytes.put_u8(1);
    bytes.put_slice(&text);
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(fields: &[(u32, Option<Vec<u8>>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_i32(fields.len() as i32);
        for (kind, value) in fields {
            bytes.put_u32(*kind);
            bytes.put_i32(value.as_ref().map_or(-1, |value| value.len() as i32));
            bytes.put_slice(value.as_deref().unwrap_or_default());
        }
        bytes
    }

    fn escaped(bytes: &[u8]) -> Vec<u8> {
        let each = bytes.iter().flat_map(|&byte| match byte {
            b'\\' => b"\\\\".to_vec(),
            0x20..=0x7e => vec![byte],
            _ => format!("\\{byte:03o}").into_bytes(),
        });
        each.collect()
    }

    proptest! {
        #[test]
        fn fuzz_all_three_forms_of_a_record_decode_to_its_fields(
            oid in any::<u32>(),
            values in prop::collection::vec((any::<u32>(), prop::option::of(prop::collection::vec(any::<u8>(), 0..40))), 0..8)
        ) {
            let mut fields = vec![(OID, Some(oid.to_be_bytes().to_vec()))];
            fields.extend(values.iter().cloned());
            let bytes = record(&fields);
            let hex = format!("\\x{}", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
            let expected = Fields {
                tableoid: oid,
                converted: false,
                values: values.into_iter().map(|(kind, value)| (kind, value.map(Bytes::from))).collect(),
            };
            prop_assert_eq!(hidden(&bytes, true), Ok(expected.clone()));
            prop_assert_eq!(hidden(hex.as_bytes(), false), Ok(expected.clone()));
            prop_assert_eq!(hidden(&escaped(&bytes), false), Ok(expected));
        }

        #[test]
        fn fuzz_a_record_that_is_cut_is_an_error(cut in 0usize..30) {
            let bytes = record(&[(OID, Some(vec![0, 0, 0, 9])), (25, Some(b"abcdefg".to_vec())), (25, None)]);
            prop_assert!(cut < bytes.len());
            prop_assert!(hidden(&bytes[..cut], true).is_err());
        }

        #[test]
        fn fuzz_garbage_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), binary in any::<bool>()) {
            let _ = hidden(&bytes, binary);
        }

        #[test]
        fn fuzz_garbage_behind_a_plausible_head_neither(count in any::<i32>(), bytes in prop::collection::vec(0u8..30, 0..200)) {
            let mut all = count.to_be_bytes().to_vec();
            all.extend(bytes);
            let _ = hidden(&all, true);
        }
    }
}
