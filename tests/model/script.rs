//! What clients' transactions do, and what the product makes of it: `mirror::writes`, `mirror::flight` and `ledger::debts` turn the
//! writes into what the mirror executes and what the ledger holds. Each is worked out once, before the states are gone through.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use crossfade::catalog::{Key, Table};
use crossfade::ledger::debts::{Debt, decode};
use crossfade::mirror::flight::{Debts, Step, flights, steps};
use crossfade::mirror::writes::{Op, Writes};
use crossfade::plan::image::Row;

use crate::rows::{KEYS, Set, Value};

/// One statement of a client. Keys are 0 and 1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Sql {
    /// Fails, here: does nothing, where the row is there.
    Insert(usize),
    /// Gives the row the writer's own value.
    Update(usize),
    /// Gives the row the value that it had at first: what was compared once may be equal again.
    Reset(usize),
    /// Deletes the row.
    Delete(usize),
    /// INSERT ... ON CONFLICT DO UPDATE.
    Upsert(usize),
    /// UPDATE of the key itself, and of the value.
    Rekey(usize, usize),
}

/// A client's transaction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Script {
    /// Its statements.
    pub statements: &'static [Sql],
    /// How it reaches the mirror.
    pub way: Way,
}

/// How what is written reaches the mirror.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Way {
    /// By images.
    Images,
    /// Out of sight: a taint.
    Opaque,
    /// No client's transaction at all, but a worker that copies what was there before.
    Backfill,
}

/// In the place of `did`, of a backfill: its chunk is in work. Without this bit: the keys that its second reading suspects.
pub const IN_WORK: u8 = 1 << KEYS;

/// Values: 1 is what rows have at first, then one for each writer.
pub const FIRST: Value = 1;
/// The value in the images of deleted rows, which nobody may ever see.
pub const GONE: Value = 9;

/// What writer `w` writes.
pub fn own(w: usize) -> Value {
    2 + w as Value
}

/// What the mirror executes, in this order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Move {
    /// One statement about these keys, each of which gets its value.
    Upsert(Vec<(usize, Value)>),
    /// One statement about these keys.
    Delete(Set),
    /// Everything before is answered before anything behind is sent; deletes that found too few rows are done again here.
    Settle,
}

/// What became of a transaction's writes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Program {
    /// Its images on the mirror.
    pub moves: Vec<Move>,
    /// The keys that its ledger row names; all, for a whole table.
    pub keys: Set,
    /// The ledger row names the whole table.
    pub whole: bool,
}

/// Programs by script, by which of its statements had an effect (one bit each), and by writer.
pub struct Programs {
    known: HashMap<(Script, u8, usize), Program>,
}

impl Programs {
    /// Of all that these scripts may do.
    pub fn of(scripts: &[Script], writers: usize) -> Programs {
        let table = Arc::new(table());
        let mut known = HashMap::new();
        for &script in scripts {
            let bits = if script.way == Way::Backfill { KEYS + 1 } else { script.statements.len() };
            for (did, w) in (0..1u8 << bits).flat_map(|did| (0..writers).map(move |w| (did, w))) {
                known.insert((script, did, w), program(&table, script, did, w));
            }
        }
        Programs { known }
    }

    /// Of one.
    pub fn get(&self, script: Script, did: u8, w: usize) -> &Program {
        &self.known[&(script, did, w)]
    }
}

fn program(table: &Arc<Table>, script: Script, did: u8, w: usize) -> Program {
    if script.way == Way::Backfill {
        let whole = did & IN_WORK != 0;
        return Program { moves: vec![], keys: if whole { IN_WORK - 1 } else { did }, whole };
    }
    let mut writes = Writes::default();
    for (_, &sql) in script.statements.iter().enumerate().filter(|(at, _)| did & (1 << at) != 0) {
        if script.way == Way::Opaque {
            writes.taint(table.number, "opaque");
        } else {
            images(table, sql, w).into_iter().for_each(|op| writes.push(op));
        }
    }
    let mut debts = Debts::new(1 << 20, [0; 16]);
    writes.ops.iter().for_each(|op| debts.add(op));
    writes.tainted.iter().for_each(|&table| debts.taint(table));
    let mut program = Program::default();
    for taints in [false, true] {
        for debt in decode(debts.encode(taints).freeze()).expect("what was encoded can be read") {
            match debt {
                Debt::Key { key, .. } => program.keys |= 1 << number(&key[0]),
                Debt::Table { .. } | Debt::Taint { .. } => (program.keys, program.whole) = ((1 << KEYS) - 1, true),
                Debt::Range { .. } => unreachable!("no writer owes a range"),
                Debt::Row { .. } => unreachable!("the table has a key"),
            }
        }
    }
    let steps = steps(writes.ops);
    for flight in flights(&steps) {
        program.moves.extend(flight.iter().map(as_move));
        program.moves.push(Move::Settle);
    }
    program
}

fn images(table: &Arc<Table>, sql: Sql, w: usize) -> Vec<Op> {
    let upsert = |key, value| Op::Upsert(table.clone(), row(key, value));
    let delete = |key| Op::Delete(table.clone(), row(key, GONE));
    match sql {
        Sql::Insert(key) | Sql::Update(key) | Sql::Upsert(key) => vec![upsert(key, own(w))],
        Sql::Reset(key) => vec![upsert(key, FIRST)],
        Sql::Delete(key) => vec![delete(key)],
        Sql::Rekey(from, to) => vec![delete(from), upsert(to, own(w))],
    }
}

fn as_move(step: &Step) -> Move {
    match step {
        Step::Upsert(_, rows) => {
            Move::Upsert(rows.iter().map(|row| (number(&row.values[0]), number(&row.values[1]) as Value)).collect())
        }
        Step::Delete(_, rows) => Move::Delete(rows.iter().fold(0, |keys, row| keys | 1 << number(&row.values[0]))),
        Step::Clear(..) | Step::Insert(..) | Step::Truncate(_) | Step::Define(_) => {
            unreachable!("not among these scripts")
        }
    }
}

fn row(key: usize, value: Value) -> Row {
    Row { values: vec![Some(Bytes::from(vec![key as u8])), Some(Bytes::from(vec![value]))] }
}

fn number(value: &Option<Bytes>) -> usize {
    usize::from(value.as_ref().expect("no NULL here")[0])
}

fn table() -> Table {
    let key = Key {
        columns: vec![0],
        deferrable: Default::default(),
        bytewise: true,
        equals: Default::default(),
        alone: crossfade::catalog::Sides { old: true, new: true },
    };
    Table {
        number: 1,
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
    }
}

mod tests {
    use super::*;

    #[test]
    fn the_product_makes_steps_and_debts_of_writes() {
        let script = Script { statements: &[Sql::Rekey(0, 1), Sql::Delete(1)], way: Way::Images };
        let programs = Programs::of(&[script], 1);
        let rekeyed = programs.get(script, 0b01, 0);
        assert_eq!(rekeyed.moves, [Move::Delete(0b01), Move::Upsert(vec![(1, own(0))]), Move::Settle]);
        assert_eq!((rekeyed.keys, rekeyed.whole), (0b11, false));
        assert_eq!(programs.get(script, 0b11, 0).moves, [Move::Delete(0b11), Move::Settle], "last states only");
        assert_eq!(programs.get(script, 0b10, 0).keys, 0b10);
    }
}
