//! Values as bytes: to and from the driver without looking inside, arrays for `unnest`, and the file format of COPY BINARY.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio_postgres::types::{Format, FromSql, IsNull, ToSql, Type};

use crate::ledger::debts::Values;

/// A value as it came, whatever its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Raw(pub Option<Bytes>);

type AnyError = Box<dyn std::error::Error + Sync + Send>;

impl<'a> FromSql<'a> for Raw {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Raw, AnyError> {
        Ok(Raw(Some(Bytes::copy_from_slice(raw))))
    }

    fn from_sql_null(_: &Type) -> Result<Raw, AnyError> {
        Ok(Raw(None))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// A value as it lies in its row, whatever its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Field<'a>(pub Option<&'a [u8]>);

impl<'a> FromSql<'a> for Field<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Field<'a>, AnyError> {
        Ok(Field(Some(raw)))
    }

    fn from_sql_null(_: &Type) -> Result<Field<'a>, AnyError> {
        Ok(Field(None))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// A parameter, whatever its type.
#[derive(Clone, Debug)]
pub(crate) struct Parameter {
    pub value: Option<Bytes>,
    /// As the type's output function gives it, and its input function takes it.
    pub text: bool,
}

impl ToSql for Parameter {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, AnyError> {
        Ok(match &self.value {
            None => IsNull::Yes,
            Some(bytes) => {
                out.extend_from_slice(bytes);
                IsNull::No
            }
        })
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        if self.text { Format::Text } else { Format::Binary }
    }

    fn to_sql_checked(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, AnyError> {
        self.to_sql(ty, out)
    }
}

/// `count` columns of a row, from column `from` on.
pub(crate) fn values(row: &tokio_postgres::Row, from: usize, count: usize) -> Values {
    (from..from + count).map(|column| row.get::<_, Raw>(column).0).collect()
}

/// A one-dimensional array as array_recv reads it.
pub(crate) fn array<'a>(element: u32, items: impl ExactSizeIterator<Item = &'a Option<Bytes>>) -> Bytes {
    let mut out = BytesMut::new();
    out.put_i32(i32::from(items.len() > 0));
    out.put_i32(1);
    out.put_u32(element);
    if items.len() > 0 {
        out.put_i32(items.len() as i32);
        out.put_i32(1);
    }
    for item in items {
        put(item, &mut out);
    }
    out.freeze()
}

/// A one-dimensional array of texts as array_in reads it.
pub(crate) fn array_text<'a>(items: impl Iterator<Item = &'a Option<Bytes>>) -> Bytes {
    let mut out = BytesMut::from(&b"{"[..]);
    for (at, item) in items.enumerate() {
        if at > 0 {
            out.put_u8(b',');
        }
        let Some(item) = item else {
            out.put_slice(b"NULL");
            continue;
        };
        out.put_u8(b'"');
        for &byte in item {
            if matches!(byte, b'"' | b'\\') {
                out.put_u8(b'\\');
            }
            out.put_u8(byte);
        }
        out.put_u8(b'"');
    }
    out.put_u8(b'}');
    out.freeze()
}

fn put(value: &Option<Bytes>, out: &mut BytesMut) {
    match value {
        None => out.put_i32(-1),
        Some(bytes) => {
            out.put_i32(bytes.len() as i32);
            out.put_slice(bytes);
        }
    }
}

/// What a COPY BINARY file begins with: signature, flags, length of the header's extension.
pub(crate) const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// ... and ends with.
pub(crate) const COPY_TRAILER: &[u8] = &[0xff, 0xff];

/// One row of a COPY BINARY file.
pub(crate) fn put_copy_row<'a>(row: impl ExactSizeIterator<Item = &'a Option<Bytes>>, out: &mut BytesMut) {
    out.put_i16(row.len() as i16);
    for value in row {
        put(value, out);
    }
}

/// Reads rows out of a COPY BINARY stream, however it is cut into pieces.
#[derive(Default)]
pub(crate) struct CopyRows {
    rest: BytesMut,
    begun: bool,
}

impl CopyRows {
    /// Appends what came.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
    }

    /// The next whole row, or None if there is none yet (or no more).
    pub(crate) fn next(&mut self) -> Option<Values> {
        if !self.begun {
            if self.rest.len() < COPY_HEADER.len() {
                return None;
            }
            // The header's extension is empty in every version of the format so far; its length says what to skip.
            let extension = u32::from_be_bytes(self.rest[15..19].try_into().ok()?) as usize;
            if self.rest.len() < COPY_HEADER.len() + extension {
                return None;
            }
            self.rest.advance(COPY_HEADER.len() + extension);
            self.begun = true;
        }
        let length = row_length(&self.rest)?;
        let mut row = self.rest.split_to(length).freeze();
        let count = row.get_i16();
        Some(
            (0..count)
                .map(|_| match row.get_i32() {
                    -1 => None,
                    length => Some(row.split_to(length as usize)),
                })
                .collect(),
        )
    }
}

/// Bytes of the row that `bytes` begins with; None if it is not whole, or the end mark.
fn row_length(bytes: &[u8]) -> Option<usize> {
    let count = i16::from_be_bytes(bytes.get(..2)?.try_into().ok()?);
    let mut at = 2;
    for _ in 0..usize::try_from(count).ok()? {
        let length = i32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?);
        at += 4 + usize::try_from(length).unwrap_or(0);
    }
    (at <= bytes.len()).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fuzz_copy_rows_come_out_as_they_went_in_however_the_stream_is_cut(
            rows in prop::collection::vec(prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..9)), 1..4), 0..6),
            piece in 1usize..20,
        ) {
            let rows: Vec<Values> = rows.into_iter().map(|row| row.into_iter().map(|value| value.map(Bytes::from)).collect()).collect();
            let mut file = BytesMut::from(COPY_HEADER);
            for row in &rows {
                put_copy_row(row.iter(), &mut file);
            }
            file.put_slice(COPY_TRAILER);
            let mut reader = CopyRows::default();
            let mut seen = Vec::new();
            for bytes in file.chunks(piece) {
                reader.push(bytes);
                while let Some(row) = reader.next() {
                    seen.push(row);
                }
            }
            prop_assert_eq!(seen, rows);
        }
    }
}
