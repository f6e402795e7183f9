//! What remains of an answer so that two of them can be compared: in constant memory, whatever the number of rows. Values come as text, under settings that are
//! the same on both sides; those that PostgreSQL holds for equal are made equal.

use std::hash::{DefaultHasher, Hash, Hasher};

use bytes::Bytes;

use crate::wire::frame::{Fields, Malformed};

/// OIDs of types of which equal values may have different texts.
const NUMERIC: u32 = 1700;
const BPCHAR: u32 = 1042;
const FLOATS: [u32; 2] = [700, 701];

/// Rows that are kept for a sample, at most, and their size in bytes.
const KEPT_MAX: usize = 1000;
const KEPT_BYTES: usize = 64 * 1024;

/// What remains of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    /// Rows.
    pub rows: u64,
    /// Of the rows as a multiset: the sum of their hashes.
    pub any_order: u128,
    /// Of the rows in their order.
    pub in_order: u64,
}

/// Reads an answer.
#[derive(Clone, Debug, Default)]
pub struct Reader {
    digest: Digest,
    types: Vec<u32>,
    /// Columns that are not looked at: the table's number on that server, and the name.
    ignored: Vec<(u32, String)>,
    /// Of the columns of this answer.
    skipped: Vec<bool>,
    /// The first rows, where they are wanted.
    kept: Option<(Vec<String>, usize)>,
}

impl Reader {
    /// Without these columns (a table's OID on that server, a name), and with the first rows kept or not.
    pub fn new(ignored: Vec<(u32, String)>, keep: bool) -> Reader {
        Reader { ignored, kept: keep.then(Default::default), ..Reader::default() }
    }

    /// RowDescription.
    pub fn description(&mut self, payload: &[u8]) -> Result<(), Malformed> {
        let mut fields = Fields::new(payload);
        let count = fields.count()?;
        self.types.clear();
        self.skipped.clear();
        for _ in 0..count {
            let name = fields.string()?;
            let fixed = fields.take(18)?;
            let number = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
            self.types.push(number(6));
            self.skipped.push(self.ignored.iter().any(|(oid, of)| *oid == number(0) && of.as_bytes() == name));
        }
        Ok(())
    }

    /// DataRow.
    pub fn row(&mut self, payload: &[u8]) -> Result<(), Malformed> {
        let mut fields = Fields::new(payload);
        let count = fields.count()?;
        let (mut low, mut high) = (DefaultHasher::new(), DefaultHasher::new());
        1_u8.hash(&mut high);
        let mut shown = self.kept.as_ref().map(|_| Vec::new());
        for at in 0..count {
            let value = fields.value()?;
            if self.skipped.get(at) == Some(&true) {
                continue;
            }
            let value = value.map(|value| same(self.types.get(at).copied().unwrap_or(0), value));
            value.hash(&mut low);
            value.hash(&mut high);
            if let Some(shown) = &mut shown {
                shown.push(value.map_or("NULL".to_owned(), |value| String::from_utf8_lossy(value).into_owned()));
            }
        }
        let (low, high) = (low.finish(), high.finish());
        let digest = &mut self.digest;
        digest.rows += 1;
        digest.any_order = digest.any_order.wrapping_add(u128::from(high) << 64 | u128::from(low));
        digest.in_order = digest.in_order.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ low;
        if let (Some(shown), Some((rows, bytes))) = (shown, &mut self.kept) {
            let row = shown.join(" | ");
            *bytes += row.len();
            if rows.len() < KEPT_MAX && *bytes <= KEPT_BYTES {
                rows.push(row);
            }
        }
        Ok(())
    }

    /// The answer is over: what remains, and the rows that were kept.
    pub fn finish(self) -> (Digest, Vec<String>) {
        (self.digest, self.kept.map(|(rows, _)| rows).unwrap_or_default())
    }
}

/// The part of a value's text that says what PostgreSQL compares.
fn same(kind: u32, value: &[u8]) -> &[u8] {
    match kind {
        NUMERIC if value.contains(&b'.') => {
            let end = value.iter().rposition(|digit| *digit != b'0').map_or(0, |at| at + 1);
            value[..end].strip_suffix(b".").unwrap_or(&value[..end])
        }
        BPCHAR => &value[..value.iter().rposition(|byte| *byte != b' ').map_or(0, |at| at + 1)],
        kind if FLOATS.contains(&kind) && value == b"-0" => b"0",
        _ => value,
    }
}

/// How two answers relate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// The same rows; in the same order where one was asked for.
    Equal,
    /// The same rows in another order than was asked for: ties, or another collation.
    Reordered,
    /// As many rows, of which the statement does not say which they are, or how they are put together.
    Loose,
    /// Different rows.
    Different,
}

/// Compares two answers to a statement that asks for an order or not, and leaves open what comes or not.
pub fn relation(one: &Digest, other: &Digest, ordered: bool, loose: bool) -> Relation {
    match one.any_order == other.any_order && one.rows == other.rows {
        true if ordered && one.in_order != other.in_order => Relation::Reordered,
        true => Relation::Equal,
        false if loose && one.rows == other.rows => Relation::Loose,
        false => Relation::Different,
    }
}

/// Rows of the one that the other lacks, each as often as it is missing; at most `count`.
pub fn only(one: &[String], other: &[String], count: usize) -> Vec<String> {
    let mut left = std::collections::HashMap::<&str, usize>::new();
    other.iter().for_each(|row| *left.entry(row).or_default() += 1);
    let missing = one.iter().filter(|row| match left.get_mut(row.as_str()) {
        Some(found) if *found > 0 => {
            *found -= 1;
            false
        }
        _ => true,
    });
    missing.take(count).cloned().collect()
}

/// A Bind's payload with every result in text: what can be hashed as it is.
pub fn in_text(payload: &Bytes) -> Result<Bytes, Malformed> {
    let mut fields = Fields::new(payload);
    fields.string()?;
    fields.string()?;
    let start = payload.len() - fields.rest().len();
    fields.skip_values()?;
    let end = payload.len() - fields.rest().len();
    Ok([b"\0\0", &payload[start..end], &[0, 0]].concat().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::{BufMut, BytesMut};

    fn digest(types: &[u32], rows: &[&[Option<&str>]]) -> Digest {
        let mut reader = Reader { types: types.to_vec(), ..Reader::default() };
        for row in rows {
            let mut payload = BytesMut::new();
            payload.put_u16(row.len() as u16);
            for value in *row {
                match value {
                    Some(text) => {
                        payload.put_i32(text.len() as i32);
                        payload.put_slice(text.as_bytes());
                    }
                    None => payload.put_i32(-1),
                }
            }
            reader.row(&payload).unwrap();
        }
        reader.finish().0
    }

    #[test]
    fn rows_are_a_multiset_unless_an_order_was_asked_for() {
        let ab = digest(&[25], &[&[Some("a")], &[Some("b")]]);
        let ba = digest(&[25], &[&[Some("b")], &[Some("a")]]);
        let aab = digest(&[25], &[&[Some("a")], &[Some("a")], &[Some("b")]]);
        let abb = digest(&[25], &[&[Some("a")], &[Some("b")], &[Some("b")]]);
        assert_eq!(relation(&ab, &ba, false, false), Relation::Equal);
        assert_eq!(relation(&ab, &ba, true, false), Relation::Reordered);
        assert_eq!(relation(&ab, &ab, true, false), Relation::Equal);
        assert_eq!(relation(&aab, &abb, false, false), Relation::Different);
        assert_eq!(relation(&aab, &abb, false, true), Relation::Loose);
        assert_eq!(relation(&ab, &abb, false, true), Relation::Different);
        // Neither the ends of values nor NULL are mixed up.
        let split = [digest(&[25, 25], &[&[Some("ab"), Some("c")]]), digest(&[25, 25], &[&[Some("a"), Some("bc")]])];
        assert_eq!(relation(&split[0], &split[1], false, false), Relation::Different);
        assert_ne!(digest(&[25], &[&[None]]), digest(&[25], &[&[Some("")]]));
    }

    #[test]
    fn what_postgresql_holds_for_equal_is_equal() {
        for (kind, one, other, equal) in [
            (NUMERIC, "1.50", "1.5", true),
            (NUMERIC, "1.00", "1", true),
            (NUMERIC, "100", "1", false),
            (NUMERIC, "0.10", "0.01", false),
            (NUMERIC, "NaN", "NaN", true),
            (BPCHAR, "a  ", "a", true),
            (25, "a  ", "a", false),
            (701, "-0", "0", true),
            (25, "1.50", "1.5", false),
        ] {
            let same = digest(&[kind], &[&[Some(one)]]) == digest(&[kind], &[&[Some(other)]]);
            assert_eq!(same, equal, "{one} and {other} of type {kind}");
        }
    }

    #[test]
    fn rows_that_one_side_lacks_are_named_as_often_as_they_are_missing() {
        let rows = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(only(&rows("a a b c"), &rows("a b"), 3), ["a", "c"]);
        assert_eq!(only(&rows("a b c"), &rows("x"), 2), ["a", "b"]);
    }
}
