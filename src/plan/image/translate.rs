//! OIDs inside values: array_send, record_send, range_send and multirange_send write those of the types inside, which differ between two
//! servers for types that users made. All of them have a fixed width, so a value keeps its length.

use bytes::{Bytes, BytesMut};

use super::Row;
use crate::catalog::{Format, Layout, Table, TypeInfo};
use crate::ledger::debts::Values;
use crate::phase::Side;

/// The row as the other side's receive functions want it. A value that does not look as its type's should is left as it is: the server
/// will refuse it.
pub fn translate(table: &Table, from: Side, mut row: Row) -> Row {
    for (column, value) in table.columns.iter().zip(&mut row.values) {
        if column.format == Format::Binary {
            translate_value(&column.kind, from, value);
        }
    }
    row
}

/// The same for a key, in the order of `Table::key`.
pub fn translate_key(table: &Table, from: Side, mut key: Values) -> Values {
    let columns = table.key.iter().flat_map(|key| &key.columns);
    for (&at, value) in columns.zip(&mut key) {
        if table.columns[at].format == Format::Binary {
            translate_value(&table.columns[at].kind, from, value);
        }
    }
    key
}

fn translate_value(kind: &TypeInfo, from: Side, value: &mut Option<Bytes>) {
    if let Some(bytes) = value
        && differs(&kind.layout)
    {
        let mut copy = BytesMut::from(&bytes[..]);
        if patch(&kind.layout, from, &mut copy).is_some() {
            *value = Some(copy.freeze());
        }
    }
}

/// Whether any OID inside differs between the sides.
fn differs(layout: &Layout) -> bool {
    let inside = |kind: &TypeInfo| kind.oid.old != kind.oid.new || differs(&kind.layout);
    match layout {
        Layout::Plain | Layout::Text | Layout::Jsonb | Layout::Mixed => false,
        Layout::Array(element) => inside(element),
        Layout::Composite(fields) => fields.iter().any(inside),
        // Ranges name no OID themselves.
        Layout::Range(kind) | Layout::Multirange(kind) => differs(&kind.layout),
    }
}

/// A value's bytes, walked from the front.
struct Walk<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Walk<'_> {
    fn number(&mut self) -> Option<i32> {
        let end = self.at.checked_add(4)?;
        let number = i32::from_be_bytes(self.bytes.get(self.at..end)?.try_into().ok()?);
        self.at = end;
        Some(number)
    }

    /// Overwrites the OID here, which must be that of the type on the side it comes from.
    fn oid(&mut self, kind: &TypeInfo, from: Side) -> Option<()> {
        let at = self.at;
        if self.number()? as u32 != *kind.oid.get(from) {
            return None;
        }
        self.bytes[at..at + 4].copy_from_slice(&kind.oid.get(from.other()).to_be_bytes());
        Some(())
    }

    /// A value with its length before it; -1 is NULL.
    fn value(&mut self, layout: &Layout, from: Side) -> Option<()> {
        let length = match self.number()? {
            -1 => return Some(()),
            length => usize::try_from(length).ok()?,
        };
        let end = self.at.checked_add(length)?;
        patch(layout, from, self.bytes.get_mut(self.at..end)?)?;
        self.at = end;
        Some(())
    }
}

/// None where the bytes do not look like the layout.
fn patch(layout: &Layout, from: Side, bytes: &mut [u8]) -> Option<()> {
    let mut walk = Walk { bytes, at: 0 };
    match layout {
        Layout::Plain | Layout::Text | Layout::Jsonb | Layout::Mixed => return Some(()),
        Layout::Array(element) => {
            let dimensions = walk.number()?;
            walk.number()?;
            walk.oid(element, from)?;
            for _ in 0..2 * i64::from(dimensions) {
                walk.number()?;
            }
            while walk.at < walk.bytes.len() {
                walk.value(&element.layout, from)?;
            }
        }
        Layout::Composite(fields) => {
            if usize::try_from(walk.number()?).ok()? != fields.len() {
                return None;
            }
            for field in fields {
                walk.oid(field, from)?;
                walk.value(&field.layout, from)?;
            }
        }
        Layout::Range(subtype) => {
            // Flags of the bounds (rangetypes.h): empty 1, lower infinite 8, upper infinite 16. Then each bound that is there.
            let flags = *walk.bytes.first()?;
            walk.at = 1;
            for infinite in [8, 16] {
                if flags & (1 | infinite) == 0 {
                    walk.value(&subtype.layout, from)?;
                }
            }
        }
        Layout::Multirange(range) => {
            for _ in 0..walk.number()? {
                walk.value(&range.layout, from)?;
            }
        }
    }
    (walk.at == walk.bytes.len()).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Sides;
    use proptest::prelude::*;

    fn kind(old: u32, new: u32, layout: Layout) -> TypeInfo {
        TypeInfo { oid: Sides { old, new }, name: Sides::default(), layout }
    }

    fn nested() -> TypeInfo {
        let point = kind(500, 700, Layout::Composite(vec![kind(23, 23, Layout::Plain), kind(501, 701, Layout::Text)]));
        kind(502, 702, Layout::Array(Box::new(point)))
    }

    fn value(element: u32, text: u32) -> Bytes {
        let words = [1, 1, element, 2, 1, 24, 2, 23, 4, 7, text, 4, 0x61626364, u32::MAX];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        // The composite: 4 (count) + 12 (int4) + 12 (text) = 28 bytes.
        let mut bytes = bytes;
        bytes[20..24].copy_from_slice(&28u32.to_be_bytes());
        bytes.into()
    }

    #[test]
    fn oids_at_every_depth_are_rewritten_and_back() {
        let mut there = Some(value(500, 501));
        translate_value(&nested(), Side::Old, &mut there);
        assert_eq!(there, Some(value(700, 701)));
        translate_value(&nested(), Side::New, &mut there);
        assert_eq!(there, Some(value(500, 501)));
        let mut foreign = Some(value(9, 501));
        translate_value(&nested(), Side::Old, &mut foreign);
        assert_eq!(foreign, Some(value(9, 501)), "what does not fit is left alone");
    }

    proptest! {
        #[test]
        fn fuzz_garbage_is_no_panic(bytes in prop::collection::vec(0u8..30, 0..120)) {
            let range = kind(1, 2, Layout::Range(Box::new(nested())));
            let kinds = [nested(), kind(3, 4, Layout::Multirange(Box::new(range.clone()))), range];
            for kind in kinds {
                let mut value = Some(Bytes::from(bytes.clone()));
                translate_value(&kind, Side::Old, &mut value);
                prop_assert_eq!(value.map(|value| value.len()), Some(bytes.len()));
            }
        }
    }
}
