//! From the changes of transactions to what is to be looked at: keys, whole tables, taints that are spent. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use bytes::Bytes;

use super::decode::{Change, Said, Tuple, Value, Verb};
use super::identity::Identities;
use crate::catalog::{Catalog, Table};
use crate::ledger::debts::{Debt, Values, decode};
use crate::phase::Side;

/// Keys as texts, each with the table's number.
pub(super) type Keys = BTreeMap<u32, HashSet<Values>>;

/// What was read and not yet looked at.
#[derive(Default)]
pub(super) struct Load {
    /// Keys that something has changed: texts, as the types' output functions give them.
    pub keys: Keys,
    /// How many.
    pub count: usize,
    /// Roughly their bytes.
    pub bytes: usize,
    /// Tables of which it is not known which rows have changed.
    pub whole: BTreeSet<u32>,
    /// Relations that no migrating table is known to have.
    pub unknown: HashSet<(String, String)>,
    /// Taints whose writes have been read.
    pub spent: Vec<Spent>,
    /// The transactions.
    pub xids: BTreeSet<u32>,
    /// Rows of migrating tables that have changed.
    pub changes: u64,
}

/// A ledger row with taints, whose writes have been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spent {
    /// Its number.
    pub id: i64,
    /// Tables that stay tainted: what was written to them is not all named by key.
    pub but: BTreeSet<u32>,
}

/// What is not known before a transaction's last change.
#[derive(Default)]
struct Open {
    /// Tables that it has changed in a way that no key names.
    unnamed: BTreeSet<u32>,
    /// Tables that its own ledger rows are about: the proxy saw to them.
    own: BTreeSet<u32>,
    /// Those with taints that nobody holds.
    taints: Vec<i64>,
}

/// What becomes of changes that no key names (tables without a key, TRUNCATE, a replica identity that does not hold the key), in transactions whose own
/// ledger rows are not about that table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unnamed {
    /// The table is owed as a whole.
    Owed,
    /// Nothing: transactions leave no ledger rows in this phase, or by this `mirror.commit`.
    PassedOver,
}

/// Reads the slot's output.
pub(super) struct Reader<'a> {
    pub catalog: &'a Catalog,
    pub identities: &'a Identities,
    /// Whose changes they are.
    pub side: Side,
    pub unnamed: Unnamed,
    /// Ledger rows whose taints a statement held that may still have been writing: CALL, DO.
    held: &'a mut HashSet<i64>,
    open: Open,
}

impl<'a> Reader<'a> {
    pub fn new(
        (catalog, side): (&'a Catalog, Side),
        identities: &'a Identities,
        unnamed: Unnamed,
        held: &'a mut HashSet<i64>,
    ) -> Reader<'a> {
        Reader { catalog, identities, side, unnamed, held, open: Open::default() }
    }

    /// Takes one line in.
    pub fn take(&mut self, said: Said<'_>, xid: u32, load: &mut Load) {
        match said {
            Said::Begin => self.open = Open::default(),
            Said::Commit => self.commit(load),
            Said::Row(change) if change.relation.0 == "crossfade" => self.ledger(&change),
            Said::Row(change) => {
                load.xids.insert(xid);
                self.row(change, load);
            }
            Said::Truncate(relations) => {
                load.xids.insert(xid);
                for relation in relations {
                    if let Some(table) = self.table(relation, load) {
                        load.changes += 1;
                        // Emptied, whatever its identity.
                        self.open.unnamed.insert(table.number);
                    }
                }
            }
            Said::Other => {}
        }
    }

    fn commit(&mut self, load: &mut Load) {
        let Open { unnamed, own, taints } = std::mem::take(&mut self.open);
        load.spent.extend(taints.into_iter().map(|id| Spent { id, but: unnamed.clone() }));
        if self.unnamed == Unnamed::Owed {
            load.whole.extend(unnamed.difference(&own));
        }
    }

    fn table(&self, relation: (String, String), load: &mut Load) -> Option<Arc<Table>> {
        let found = self.catalog.by_qualified.get(self.side).get(&relation).cloned();
        if found.is_none() {
            load.unknown.insert(relation);
        }
        found
    }

    fn row(&mut self, change: Change<'_>, load: &mut Load) {
        let leaf = change.relation.clone();
        let Some(table) = self.table(change.relation, load) else { return };
        load.changes += 1;
        let named = match (&table.key, &table.opaque, change.verb) {
            (None, ..) | (_, Some(_), _) => false,
            (_, _, Verb::Insert) => self.add(&table, change.new.as_ref(), None, load),
            (_, _, _) if !self.identities.holds_key(&table, &leaf) => false,
            (_, _, Verb::Delete) => self.add(&table, change.old.as_ref(), None, load),
            // No old key: it is the same.
            (_, _, Verb::Update) => match &change.old {
                None => self.add(&table, change.new.as_ref(), None, load),
                Some(old) => {
                    self.add(&table, Some(old), None, load)
                        && self.add(&table, change.new.as_ref(), change.old.as_ref(), load)
                }
            },
        };
        if !named {
            self.open.unnamed.insert(table.number);
        }
    }

    /// The key of this row; `unchanged`: where values that are not said are found. False: it is not all there.
    fn add(&self, table: &Table, row: Option<&Tuple<'_>>, unchanged: Option<&Tuple<'_>>, load: &mut Load) -> bool {
        let (Some(key), Some(row)) = (&table.key, row) else { return false };
        let mut values = Vec::with_capacity(key.columns.len());
        for &at in &key.columns {
            let name = table.columns[at].name.get(self.side);
            let found = match value(row, name) {
                Some(Value::Unchanged) => unchanged.and_then(|tuple| value(tuple, name)),
                found => found,
            };
            let Some(text) = found.and_then(|value| value.text()) else { return false };
            values.push(Some(text));
        }
        let bytes: usize = values.iter().flatten().map(Bytes::len).sum();
        if load.keys.entry(table.number).or_default().insert(values) {
            load.count += 1;
            load.bytes += bytes + 64;
        }
        true
    }

    /// A row of the ledger that this transaction has entered or changed. Taints that it enters are about its own writes, and are spent with it. Those that
    /// are held are about writes of others, which come after it and before the row is released.
    fn ledger(&mut self, change: &Change<'_>) {
        let Some(new) = change.new.as_ref().filter(|_| change.relation.1 == "ledger") else { return };
        let text = |name: &str| new.iter().find(|(known, _)| known == name).and_then(|(_, value)| value.text());
        let id = text("id").and_then(|text| std::str::from_utf8(&text).ok()?.parse::<i64>().ok());
        let Some(id) = id else { return };
        let held = text("holder_pid").is_some();
        match change.verb {
            Verb::Insert => {
                let debts = text("debts").and_then(|text| decode(unhex(&text)?).ok()).unwrap_or_default();
                self.open.own.extend(debts.iter().map(Debt::table));
                match (debts.iter().any(|debt| matches!(debt, Debt::Taint { .. })), held) {
                    (true, true) => drop(self.held.insert(id)),
                    (true, false) => self.open.taints.push(id),
                    (false, _) => {}
                }
            }
            Verb::Update if !held && self.held.remove(&id) => self.open.taints.push(id),
            Verb::Update | Verb::Delete => {}
        }
    }
}

fn value<'t>(tuple: &Tuple<'t>, name: &str) -> Option<Value<'t>> {
    tuple.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
}

/// Of bytea_output = hex: `\x0a1b`.
fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    let digits = text.strip_prefix(b"\\x")?;
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    digits.chunks(2).map(|pair| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?)).collect()
}

/// A transaction's changes are visible to a snapshot with this xmax and these in progress (xid8 as numbers).
pub(super) fn is_visible(xid: u32, xmax: u64, in_progress: &[u64]) -> bool {
    // 32 bits wrap around: it is the newest number below 2^31 beyond xmax that ends so.
    let behind = (xmax as u32).wrapping_sub(xid).cast_signed();
    behind > 0 && !in_progress.iter().any(|running| *running as u32 == xid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_that_no_snapshot_shows_yet_is_not_visible() {
        assert!(is_visible(10, 12, &[11]));
        assert!(!is_visible(11, 12, &[11]));
        assert!(!is_visible(12, 12, &[11]), "newer than all that have ended");
        assert!(is_visible(u32::MAX, (1 << 32) + 3, &[]), "before the numbers began again");
        assert!(!is_visible(3, (1 << 32) - 2, &[]), "after");
        assert!(!is_visible(5, (1 << 32) + 9, &[(1 << 32) + 5]));
    }

    #[test]
    fn hexadecimal_digits_are_bytes() {
        assert_eq!(unhex(b"\\x000aFf"), Some(vec![0, 10, 255]));
        assert_eq!(unhex(b"\\x0"), None);
        assert_eq!(unhex(b"0a"), None);
    }
}
