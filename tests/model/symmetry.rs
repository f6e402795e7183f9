//! Writers who do the same are told apart by their number only, and by the value that they write. States which differ by an exchange of
//! numbers are one: of three writers that saves up to five states in six.

use crate::rows::{Rows, Set, Txn, Value, members};
use crate::script::own;
use crate::state::{State, WRITERS, of_writer};

/// The new number of each writer.
#[derive(Clone, Copy, Debug)]
pub struct Renumbering([usize; WRITERS]);

impl Renumbering {
    fn txn(&self, txn: Txn) -> Txn {
        let first = of_writer(0);
        if (first..of_writer(WRITERS)).contains(&txn) { of_writer(self.0[usize::from(txn - first)]) } else { txn }
    }

    fn value(&self, value: Value) -> Value {
        if (own(0)..own(WRITERS)).contains(&value) { own(self.0[usize::from(value - own(0))]) } else { value }
    }

    /// Of values by key.
    pub fn values<const N: usize>(&self, values: [Value; N]) -> [Value; N] {
        values.map(|value| self.value(value))
    }

    /// Of ledger rows.
    pub fn debts(&self, debts: Set) -> Set {
        members(debts).fold(0, |set, w| set | 1 << self.0[w])
    }

    /// Of transactions.
    pub fn txns(&self, txns: Set) -> Set {
        members(txns).fold(0, |set, txn| set | 1 << self.txn(txn as Txn))
    }

    fn rows(&self, rows: &mut Rows) {
        for cell in &mut rows.0 {
            cell.owner = self.txn(cell.owner);
            [cell.committed, cell.inside] = self.values([cell.committed, cell.inside]);
        }
    }
}

impl State {
    /// The writers in an order that depends on what they are and not on their numbers (where two are alike in all that is looked at: as they were).
    pub fn in_order(mut self) -> State {
        let mut order: [usize; WRITERS] = std::array::from_fn(|w| w);
        order.sort_by_key(|&w| (self.writers[w], self.traces(w)));
        let mut new = Renumbering([0; WRITERS]);
        order.iter().enumerate().for_each(|(to, &from)| new.0[from] = to);
        if order.is_sorted() {
            return self;
        }
        self.writers = order.map(|from| self.writers[from]);
        new.rows(&mut self.authority);
        new.rows(&mut self.mirror);
        self.log.renumber(&new);
        self.kept = self.kept.map(|kept| new.values(kept));
        self.clearing.paid = new.debts(self.clearing.paid);
        self.clearing.ids = new.debts(self.clearing.ids);
        self.repairs.iter_mut().for_each(|repair| repair.renumber(&new));
        self.ghosts.iter_mut().for_each(|ghost| ghost.values = new.values(ghost.values));
        self
    }

    /// Where the values of writer `w` are.
    fn traces(&self, w: usize) -> u32 {
        let cells = self.authority.0.iter().chain(&self.mirror.0);
        let in_rows = cells.flat_map(|cell| [cell.committed == own(w), cell.inside == own(w)]);
        let in_log = self.log.states().flatten().map(|value| value == own(w));
        in_rows.chain(in_log).fold(1, |bits, is| bits << 1 | u32::from(is))
    }
}
