//! Rows as PostgreSQL keeps them: one state that all see, and one inside the transaction that holds the row. READ COMMITTED, one unique key.

use crate::symmetry::Renumbering;

/// Keys of the one table.
pub const KEYS: usize = 2;
/// A set of keys, writers or ledger rows: one bit each.
pub type Set = u8;
/// A transaction on one side; 0: none.
pub type Txn = u8;
/// A row's value; 0: there is no row.
pub type Value = u8;

/// The members of a set.
pub fn members(set: Set) -> impl Iterator<Item = usize> {
    (0..8).filter(move |at| set & (1 << at) != 0)
}

/// One key on one side.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Cell {
    /// What all see.
    pub committed: Value,
    /// Who holds the row, or its absence: an insert under way makes others' inserts of the key wait.
    pub owner: Txn,
    /// What the owner sees.
    pub inside: Value,
    /// The owner has written it; otherwise it holds a lock only.
    pub written: bool,
}

/// All keys on one side.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Rows(pub [Cell; KEYS]);

impl Rows {
    /// Committed rows.
    pub fn of(values: [Value; KEYS]) -> Rows {
        Rows(values.map(|value| Cell { committed: value, inside: value, ..Cell::default() }))
    }

    /// Committed values.
    pub fn committed(&self) -> [Value; KEYS] {
        self.0.map(|cell| cell.committed)
    }

    /// What a statement of `me` that begins now sees.
    pub fn sees(&self, me: Txn, key: usize) -> Value {
        let cell = &self.0[key];
        if cell.owner == me { cell.inside } else { cell.committed }
    }

    /// No other transaction holds it.
    pub fn is_free(&self, me: Txn, key: usize) -> bool {
        let owner = self.0[key].owner;
        owner == 0 || owner == me
    }

    /// Someone who is not `me` has it under way: a unique index makes a second insert wait, ON CONFLICT DO NOTHING included. A mere row lock
    /// does not.
    pub fn is_under_way(&self, me: Txn, key: usize) -> bool {
        !self.is_free(me, key) && (self.0[key].written || self.0[key].committed == 0)
    }

    /// The row, or its absence, is written by `me`, who must be free to.
    pub fn write(&mut self, me: Txn, key: usize, value: Value) {
        assert!(self.is_free(me, key), "somebody else holds it");
        let cell = &mut self.0[key];
        (cell.owner, cell.inside, cell.written) = (me, value, true);
    }

    /// FOR NO KEY UPDATE SKIP LOCKED: whether `me` holds it now.
    pub fn lock(&mut self, me: Txn, key: usize) -> bool {
        if self.sees(me, key) == 0 || !self.is_free(me, key) {
            return false;
        }
        let cell = &mut self.0[key];
        if cell.owner == 0 {
            *cell = Cell { owner: me, inside: cell.committed, written: false, ..*cell };
        }
        true
    }

    /// COMMIT or ROLLBACK of `me`. Returns the keys of rows that are gone now.
    pub fn end(&mut self, me: Txn, commit: bool) -> Set {
        let mut gone = 0;
        for (key, cell) in self.0.iter_mut().enumerate() {
            if cell.owner == me {
                let value = if commit { cell.inside } else { cell.committed };
                if cell.committed != 0 && value == 0 {
                    gone |= 1 << key;
                }
                *cell = Cell { committed: value, inside: value, ..Cell::default() };
            }
        }
        gone
    }

    /// What one transaction holds is held by another from now on.
    pub fn rename(&mut self, from: Txn, to: Txn) {
        self.0.iter_mut().filter(|cell| cell.owner == from).for_each(|cell| cell.owner = to);
    }

    /// Keys that `me` has written.
    pub fn written(&self, me: Txn) -> Set {
        let mine = |key: &usize| self.0[*key].owner == me && self.0[*key].written;
        (0..KEYS).filter(mine).fold(0, |keys, key| keys | 1 << key)
    }

    /// `me` holds something.
    pub fn holds(&self, me: Txn) -> bool {
        self.0.iter().any(|cell| cell.owner == me)
    }
}

/// Commits in the log that are not flushed, oldest first, at most.
const LOG: usize = 4;

/// What a crash of the mirror leaves: its rows as they were after one of the commits that were not flushed, or before all of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Log {
    /// Rows that are on disk.
    pub durable: [Value; KEYS],
    after: [[Value; KEYS]; LOG],
    len: u8,
}

impl Log {
    /// Nothing but these.
    pub fn of(values: [Value; KEYS]) -> Log {
        Log { durable: values, ..Log::default() }
    }

    /// One more commit, not flushed. Where there are too many the oldest is taken for flushed: the server may do that whenever it likes.
    pub fn push(&mut self, values: [Value; KEYS]) {
        let last = self.states().last().unwrap_or(self.durable);
        if values == last {
            return;
        }
        if usize::from(self.len) == LOG {
            self.durable = self.after[0];
            self.after.rotate_left(1);
            self.len -= 1;
        }
        self.after[usize::from(self.len)] = values;
        self.len += 1;
    }

    /// All of it is on disk.
    pub fn flush(&mut self) {
        *self = Log::of(self.states().last().unwrap_or(self.durable));
    }

    /// Writers have other numbers.
    pub fn renumber(&mut self, new: &Renumbering) {
        self.durable = new.values(self.durable);
        self.after.iter_mut().for_each(|values| *values = new.values(*values));
    }

    /// Rows that a crash may leave.
    pub fn states(&self) -> impl Iterator<Item = [Value; KEYS]> + use<> {
        let (durable, after, len) = (self.durable, self.after, usize::from(self.len));
        std::iter::once(durable).chain(after.into_iter().take(len))
    }
}
