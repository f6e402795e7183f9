//! From a transaction's writes to the steps that the mirror executes, and to the debts that the authority keeps. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::writes::{Definition, Op};
use crate::catalog::Table;
use crate::ledger::debts::{Debt, Values, encode};
use crate::plan::image::{Row, key_of};

/// One step on the mirror.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// These rows are now so.
    Upsert(Arc<Table>, Vec<Row>),
    /// These rows are gone.
    Delete(Arc<Table>, Vec<Row>),
    /// These rows make room, whether they are there or not; what follows puts them there again.
    Clear(Arc<Table>, Vec<Row>),
    /// These rows were added (no key).
    Insert(Arc<Table>, Vec<Row>),
    /// These tables are empty.
    Truncate(Arc<Vec<Arc<Table>>>),
    /// Definitions change.
    Define(Arc<Definition>),
}

impl Step {
    /// The table whose rows it writes.
    pub fn table(&self) -> Option<&Table> {
        match self {
            Step::Upsert(table, _) | Step::Delete(table, _) | Step::Insert(table, _) | Step::Clear(table, _) => {
                Some(table)
            }
            Step::Truncate(_) | Step::Define(_) => None,
        }
    }
}

/// The steps for these writes. Where a key was written several times only its last state travels; vanished keys come before rows
/// (another row may take a unique value that they held). Tables whose equal keys may differ in bytes keep the authority's order.
pub fn steps(ops: Vec<Op>) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut segment = Vec::new();
    for op in ops {
        if matches!(op, Op::Truncate(_) | Op::Define(_)) {
            settle(std::mem::take(&mut segment), &mut steps);
            steps.push(single(op));
        } else {
            segment.push(op);
        }
    }
    settle(segment, &mut steps);
    steps
}

/// The same steps for a mirror that has refused them because two rows met in a unique value: it went from one row to another, and the rows came in
/// another order than on the authority. All rows that are written make room first; then they cannot meet, since they stand together on the
/// authority (W6).
pub fn with_room(steps: &[Step]) -> Vec<Step> {
    let mut out = Vec::with_capacity(steps.len() * 2);
    for segment in steps.split_inclusive(|step| matches!(step, Step::Truncate(_) | Step::Define(_))) {
        out.extend(segment.iter().filter_map(|step| match step {
            Step::Upsert(table, rows) => Some(Step::Clear(table.clone(), rows.clone())),
            _ => None,
        }));
        // Done again, each is inserted for a moment: two that are gone may have held the same value, one after the other.
        for step in segment {
            match step {
                Step::Delete(table, rows) => {
                    out.extend(rows.iter().map(|row| Step::Delete(table.clone(), vec![row.clone()])));
                }
                other => out.push(other.clone()),
            }
        }
    }
    out
}

fn settle(ops: Vec<Op>, steps: &mut Vec<Step>) {
    if ops.len() == 1 {
        steps.extend(ops.into_iter().map(single));
        return;
    }
    let mut tables: BTreeMap<u32, Vec<Op>> = BTreeMap::new();
    for op in ops {
        if let Some(table) = table_of(&op) {
            tables.entry(table.number).or_default().push(op);
        }
    }
    for ops in tables.into_values() {
        let Some(table) = table_of(&ops[0]).cloned() else { continue };
        match &table.key {
            Some(key) if key.bytewise => last_states(&table, ops, steps),
            _ => in_order(ops, steps),
        }
    }
}

fn table_of(op: &Op) -> Option<&Arc<Table>> {
    match op {
        Op::Upsert(table, _) | Op::Delete(table, _) | Op::Insert(table, _) => Some(table),
        Op::Truncate(tables) => tables.first(),
        Op::Define(_) => None,
    }
}

fn single(op: Op) -> Step {
    match op {
        Op::Upsert(table, row) => Step::Upsert(table, vec![row]),
        Op::Delete(table, row) => Step::Delete(table, vec![row]),
        Op::Insert(table, row) => Step::Insert(table, vec![row]),
        Op::Truncate(tables) => Step::Truncate(tables),
        Op::Define(definition) => Step::Define(definition),
    }
}

fn last_states(table: &Arc<Table>, ops: Vec<Op>, steps: &mut Vec<Step>) {
    let mut at: HashMap<Values, usize> = HashMap::with_capacity(ops.len());
    let mut states: Vec<Option<(bool, Row)>> = Vec::with_capacity(ops.len());
    for op in ops {
        let (present, row) = match op {
            Op::Upsert(_, row) | Op::Insert(_, row) => (true, row),
            Op::Delete(_, row) => (false, row),
            Op::Truncate(_) | Op::Define(_) => continue,
        };
        if let Some(before) = at.insert(key_of(table, &row), states.len()) {
            states[before] = None;
        }
        states.push(Some((present, row)));
    }
    let (rows, gone): (Vec<_>, Vec<_>) = states.into_iter().flatten().partition(|(present, _)| *present);
    let bare = |states: Vec<(bool, Row)>| states.into_iter().map(|(_, row)| row).collect::<Vec<_>>();
    if !gone.is_empty() {
        steps.push(Step::Delete(table.clone(), bare(gone)));
    }
    if !rows.is_empty() {
        steps.push(Step::Upsert(table.clone(), bare(rows)));
    }
}

fn in_order(ops: Vec<Op>, steps: &mut Vec<Step>) {
    let from = steps.len();
    for op in ops {
        let next = single(op);
        match (steps[from..].last_mut(), next) {
            // Rows of a table without a key may go over together; equal keys that differ in bytes may not meet in one statement.
            (Some(Step::Insert(_, rows)), Step::Insert(_, more)) => rows.extend(more),
            (_, next) => steps.push(next),
        }
    }
}

/// The steps in flights, each to be executed whole (deletes that found too few rows done again) before the next one begins. At least one.
///
/// A delete is done again behind the other steps of its flight. It must not come behind one that puts the key there again: a TRUNCATE
/// and what follows it, or, where equal keys may differ in bytes, any later write. Where rows have made room it must come before they are back.
pub fn flights(steps: &[Step]) -> Vec<&[Step]> {
    let mut flights = Vec::new();
    let mut from = 0;
    for (at, step) in steps.iter().enumerate() {
        if let Step::Delete(table, _) = step
            && (steps[at + 1..].iter().any(|later| may_bring_back(later, table))
                || steps[..at].iter().any(|before| matches!(before, Step::Clear(..))))
        {
            flights.push(&steps[from..=at]);
            from = at + 1;
        }
    }
    flights.push(&steps[from..]);
    flights
}

fn may_bring_back(later: &Step, table: &Table) -> bool {
    match later {
        Step::Truncate(tables) => tables.iter().any(|truncated| truncated.number == table.number),
        Step::Upsert(written, _) | Step::Insert(written, _) => {
            written.number == table.number && !table.key.as_ref().is_some_and(|key| key.bytewise)
        }
        Step::Delete(..) | Step::Clear(..) => false,
        // What is done again was deleted under the definitions before.
        Step::Define(_) => true,
    }
}

/// Whether a delete of so many rows, which found so many, is done again (W7): a row that it did not see may be under way.
pub fn is_short(found: usize, rows: usize) -> bool {
    found < rows
}

/// Whether the mirror's transaction commits, by the authority's answer to COMMIT: its command tag as it came (empty after an error), None where the
/// connection broke. COMMIT may answer ROLLBACK; an error says that nothing was committed; a lost connection says nothing: then the mirror is rolled
/// back, and if the authority did commit, the ledger has it (C6, C8).
pub fn committed(answer: Option<&[u8]>) -> bool {
    answer == Some(b"COMMIT\0")
}

/// The debts of a transaction, bounded: past `limit` bytes those of a table collapse into the whole table.
#[derive(Debug)]
pub struct Debts {
    tables: BTreeMap<u32, Owed>,
    bytes: usize,
    limit: usize,
    token: [u8; 16],
}

#[derive(Debug)]
enum Owed {
    Keys(HashSet<Values>),
    Rows(Vec<Values>),
    Whole { taint: bool },
}

impl Debts {
    /// None yet. `token` names the transaction in `crossfade.applied` where it inserts rows without a key.
    pub fn new(limit: usize, token: [u8; 16]) -> Debts {
        Debts { tables: BTreeMap::new(), bytes: 0, limit, token }
    }

    /// The keys of one more write.
    pub fn add(&mut self, op: &Op) {
        match op {
            Op::Upsert(table, row) | Op::Delete(table, row) => {
                // A copy: a slice would keep the whole row's image for as long as the debt is held.
                let copied = |value: Option<Bytes>| value.map(|value| Bytes::copy_from_slice(&value));
                let key: Values = key_of(table, row).into_iter().map(copied).collect();
                let size = size_of(&key);
                let owed = self.tables.entry(table.number).or_insert_with(|| Owed::Keys(HashSet::new()));
                if let Owed::Keys(keys) = owed
                    && keys.insert(key)
                {
                    self.bytes += size;
                }
                self.bound(table.number);
            }
            Op::Insert(table, row) => {
                let size = size_of(&row.values);
                if let Owed::Rows(rows) = self.tables.entry(table.number).or_insert_with(|| Owed::Rows(Vec::new())) {
                    rows.push(row.values.clone());
                    self.bytes += size;
                }
                self.bound(table.number);
            }
            Op::Truncate(tables) => tables.iter().for_each(|table| self.whole(table.number, false)),
            // The tables that it names are tainted beside it.
            Op::Define(_) => {}
        }
    }

    fn bound(&mut self, table: u32) {
        if self.bytes > self.limit && !matches!(self.tables.get(&table), Some(Owed::Whole { .. })) {
            self.whole(table, false);
            self.bytes = 0;
        }
    }

    fn whole(&mut self, table: u32, taint: bool) {
        let taint = taint || matches!(self.tables.get(&table), Some(Owed::Whole { taint: true }));
        self.tables.insert(table, Owed::Whole { taint });
    }

    /// A write out of sight may have changed this table.
    pub fn taint(&mut self, table: u32) {
        self.whole(table, true);
    }

    /// The token, where rows without a key are among the writes.
    pub fn token(&self) -> Option<[u8; 16]> {
        self.tables.values().any(|owed| matches!(owed, Owed::Rows(_))).then_some(self.token)
    }

    /// Nothing is owed.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// Tainted tables only, or all others only, for the ledger.
    pub fn encode(&self, taints: bool) -> BytesMut {
        let mut out = BytesMut::new();
        for (&table, owed) in &self.tables {
            match owed {
                Owed::Whole { taint: true } if taints => encode(&Debt::Taint { table }, &mut out),
                Owed::Whole { taint: true } => {}
                _ if taints => {}
                Owed::Whole { taint: false } => encode(&Debt::Table { table }, &mut out),
                Owed::Keys(keys) => {
                    keys.iter().for_each(|key| encode(&Debt::Key { table, key: key.clone() }, &mut out));
                }
                Owed::Rows(rows) => {
                    for values in rows {
                        encode(&Debt::Row { table, token: self.token, values: values.clone() }, &mut out);
                    }
                }
            }
        }
        out
    }
}

fn size_of(values: &Values) -> usize {
    16 + values.iter().flatten().map(|value| value.len() + 32).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Key;

    fn table(number: u32, bytewise: bool) -> Arc<Table> {
        let key = Key {
            columns: vec![],
            deferrable: Default::default(),
            bytewise,
            equals: Default::default(),
            alone: crate::catalog::Sides { old: true, new: true },
        };
        Arc::new(Table {
            number,
            schema: Default::default(),
            name: Default::default(),
            oid: Default::default(),
            partitions: Default::default(),
            columns: vec![],
            order: Default::default(),
            key: Some(key),
            effects: Default::default(),
            row_security: Default::default(),
            rules: Default::default(),
            opaque: None,
            truncate_cascade: Default::default(),
            lazy: false,
        })
    }

    #[test]
    fn rows_make_room_behind_each_truncate_anew() {
        let (one, two) = (table(1, true), table(2, false));
        let upsert = |table: &Arc<Table>| Step::Upsert(table.clone(), vec![]);
        let clear = |table: &Arc<Table>| Step::Clear(table.clone(), vec![]);
        let row = || Row { values: vec![] };
        let gone = Step::Delete(one.clone(), vec![row(), row()]);
        let (delete, truncate) = (Step::Delete(one.clone(), vec![row()]), Step::Truncate(Arc::new(vec![one.clone()])));
        let steps = [gone, upsert(&one), truncate.clone(), upsert(&two), upsert(&one)];
        let expected = [
            clear(&one),
            delete.clone(),
            delete,
            upsert(&one),
            truncate,
            clear(&two),
            clear(&one),
            upsert(&two),
            upsert(&one),
        ];
        assert_eq!(with_room(&steps), expected);
        assert_eq!(lengths(&expected), [2, 1, 6]);
    }

    fn lengths(steps: &[Step]) -> Vec<usize> {
        flights(steps).iter().map(|flight| flight.len()).collect()
    }

    #[test]
    fn a_delete_is_not_done_again_behind_what_brings_the_key_back() {
        let delete = |table: &Arc<Table>| Step::Delete(table.clone(), vec![]);
        let upsert = |table: &Arc<Table>| Step::Upsert(table.clone(), vec![]);
        let (plain, folding, other) = (table(1, true), table(2, false), table(3, true));
        let truncate = Step::Truncate(Arc::new(vec![plain.clone()]));
        assert_eq!(lengths(&[]), [0], "a token alone is a flight, too");
        assert_eq!(lengths(&[delete(&plain), upsert(&plain)]), [2], "distinct keys: one flight");
        assert_eq!(lengths(&[delete(&folding), upsert(&folding)]), [1, 1]);
        assert_eq!(lengths(&[upsert(&folding), delete(&folding), upsert(&other)]), [3]);
        assert_eq!(lengths(&[delete(&plain), truncate.clone(), upsert(&plain)]), [1, 2]);
        assert_eq!(lengths(&[delete(&other), truncate, upsert(&plain)]), [3]);
    }
}
