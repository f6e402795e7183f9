//! What a client's transaction has written so far, with its savepoints. Pure.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::catalog::Table;
use crate::plan::image::Row;

/// One write, as the authority left it.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// The row is now so.
    Upsert(Arc<Table>, Row),
    /// The row, which was so, is gone.
    Delete(Arc<Table>, Row),
    /// A row of a table without a key was added.
    Insert(Arc<Table>, Row),
    /// All rows of these tables are gone.
    Truncate(Arc<Vec<Arc<Table>>>),
    /// Definitions were changed.
    Define(Arc<Definition>),
}

/// DDL that the authority has run.
#[derive(Clone, Debug, PartialEq)]
pub struct Definition {
    /// The client's text.
    pub text: Bytes,
    /// Settings of the client's session under which it means the same, by name: its role, its search_path.
    pub settings: Vec<(&'static str, String)>,
    /// How long the authority took.
    pub took: Duration,
}

impl Op {
    /// Bytes that holding it costs, roughly.
    pub fn size(&self) -> usize {
        match self {
            Op::Upsert(_, row) | Op::Delete(_, row) | Op::Insert(_, row) => {
                64 + row.values.iter().flatten().map(Bytes::len).sum::<usize>() + 32 * row.values.len()
            }
            Op::Truncate(tables) => 64 + 8 * tables.len(),
            Op::Define(definition) => 64 + definition.text.len(),
        }
    }
}

/// A savepoint: its name and how much had been written when it was set.
#[derive(Clone, Debug, PartialEq)]
struct Savepoint {
    name: Vec<u8>,
    ops: usize,
    spilled: u64,
    suspects: usize,
}

/// What a transaction has written.
#[derive(Debug, Default)]
pub struct Writes {
    /// Not sent to the mirror yet, in the authority's order.
    pub ops: Vec<Op>,
    /// Bytes that `ops` holds.
    pub bytes: usize,
    /// Writes that were sent ahead of COMMIT.
    pub spilled: u64,
    /// Tables (by number) that a write out of sight may have changed.
    pub tainted: BTreeSet<u32>,
    /// Tables that the audit found to be written out of sight; gone with the savepoint behind which they were found.
    pub suspects: Vec<u32>,
    /// The transaction has changed definitions: plans do not fit any more, and images from here on are not used.
    pub redefined: bool,
    /// What the mirror said to that.
    pub refusal: Option<String>,
    /// Why, for logs, metrics and the sweep: the first reason; one about definitions goes before others, since no reading of rows makes up for it.
    pub reason: Option<&'static str>,
    savepoints: Vec<Savepoint>,
}

/// What ROLLBACK TO found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RolledBack {
    /// Everything since the savepoint was still held, and is dropped.
    Dropped,
    /// Some of it had been sent ahead: the mirror's transaction must be given up.
    Spilled,
}

impl Writes {
    /// Nothing was written, and nothing may have been.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty() && self.spilled == 0 && self.tainted.is_empty()
    }

    /// One more write.
    pub fn push(&mut self, op: Op) {
        self.bytes += op.size();
        self.ops.push(op);
    }

    /// A write out of sight to this table.
    pub fn taint(&mut self, table: u32, reason: &'static str) {
        self.tainted.insert(table);
        if matches!(reason, "ddl" | "definition") {
            self.reason = Some(reason);
        }
        self.reason.get_or_insert(reason);
    }

    /// Drops the images that are held. What was sent ahead cannot be dropped: true, there is such.
    pub fn forsake(&mut self) -> bool {
        self.ops.retain(|op| matches!(op, Op::Define(_)));
        self.bytes = self.ops.iter().map(Op::size).sum();
        for savepoint in &mut self.savepoints {
            savepoint.ops = savepoint.ops.min(self.ops.len());
        }
        self.spilled > 0
    }

    /// Takes what is held, to be sent to the mirror now.
    pub fn spill(&mut self) -> Vec<Op> {
        self.spilled += self.ops.len() as u64;
        self.bytes = 0;
        for savepoint in &mut self.savepoints {
            savepoint.ops = 0;
        }
        std::mem::take(&mut self.ops)
    }

    /// SAVEPOINT.
    pub fn savepoint(&mut self, name: &[u8]) {
        self.savepoints.push(Savepoint {
            name: name.to_vec(),
            ops: self.ops.len(),
            spilled: self.spilled,
            suspects: self.suspects.len(),
        });
    }

    /// RELEASE: the savepoint and those behind it are forgotten, what was written stays.
    pub fn release(&mut self, name: &[u8]) {
        if let Some(at) = self.savepoints.iter().rposition(|s| s.name == name) {
            self.savepoints.truncate(at);
        }
    }

    /// ROLLBACK TO: what was written since is dropped; the savepoint itself stays.
    /// Taints stay too: one too many costs a comparison, one too few a row.
    pub fn rollback_to(&mut self, name: &[u8]) -> RolledBack {
        let Some(at) = self.savepoints.iter().rposition(|s| s.name == name) else { return RolledBack::Dropped };
        self.savepoints.truncate(at + 1);
        let savepoint = &self.savepoints[at];
        self.ops.truncate(savepoint.ops);
        self.suspects.truncate(savepoint.suspects);
        let spilled = savepoint.spilled != self.spilled;
        self.bytes = self.ops.iter().map(Op::size).sum();
        if spilled { RolledBack::Spilled } else { RolledBack::Dropped }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sweep makes up for rows that nobody saw, and not for definitions.
    #[test]
    fn a_reason_about_definitions_goes_before_others() {
        let reasons = |given: &[&'static str]| {
            let mut writes = Writes::default();
            given.iter().for_each(|reason| writes.taint(1, reason));
            writes.reason
        };
        assert_eq!(reasons(&["function", "cte"]), Some("function"));
        assert_eq!(reasons(&["function", "definition"]), Some("definition"));
        assert_eq!(reasons(&["ddl", "function"]), Some("ddl"));
    }

    fn op(byte: u8) -> Op {
        let table = Table {
            number: 1,
            schema: Default::default(),
            name: Default::default(),
            oid: Default::default(),
            partitions: Default::default(),
            columns: vec![],
            order: Default::default(),
            key: None,
            effects: Default::default(),
            row_security: Default::default(),
            rules: Default::default(),
            opaque: None,
            truncate_cascade: Default::default(),
            lazy: false,
        };
        Op::Insert(Arc::new(table), Row { values: vec![Some(Bytes::copy_from_slice(&[byte]))] })
    }

    #[test]
    fn rollback_to_drops_what_came_behind_and_keeps_the_savepoint() {
        let mut writes = Writes::default();
        writes.push(op(1));
        writes.savepoint(b"a");
        writes.push(op(2));
        writes.savepoint(b"b");
        writes.push(op(3));
        assert_eq!(writes.rollback_to(b"a"), RolledBack::Dropped);
        assert_eq!(writes.ops, [op(1)]);
        writes.push(op(4));
        assert_eq!(writes.rollback_to(b"b"), RolledBack::Dropped, "b went with a");
        assert_eq!(writes.ops, [op(1), op(4)]);
        assert_eq!(writes.rollback_to(b"a"), RolledBack::Dropped, "a can be used again");
        assert_eq!(writes.ops, [op(1)]);
        writes.release(b"a");
        writes.push(op(5));
        assert_eq!(writes.ops, [op(1), op(5)]);
        assert_eq!(writes.bytes, 2 * op(1).size());
    }

    #[test]
    fn the_innermost_savepoint_of_a_name_counts() {
        let mut writes = Writes::default();
        writes.savepoint(b"a");
        writes.push(op(1));
        writes.savepoint(b"a");
        writes.push(op(2));
        writes.rollback_to(b"a");
        assert_eq!(writes.ops, [op(1)]);
        writes.release(b"a");
        writes.rollback_to(b"a");
        assert!(writes.is_empty());
    }

    #[test]
    fn what_was_sent_ahead_cannot_be_dropped() {
        let mut writes = Writes::default();
        writes.push(op(1));
        writes.savepoint(b"a");
        writes.push(op(2));
        assert_eq!(writes.spill().len(), 2);
        writes.push(op(3));
        assert_eq!(writes.rollback_to(b"a"), RolledBack::Spilled);
        let mut writes = Writes::default();
        writes.push(op(1));
        writes.spill();
        writes.savepoint(b"a");
        writes.push(op(2));
        assert_eq!(writes.rollback_to(b"a"), RolledBack::Dropped);
        assert!(writes.ops.is_empty() && !writes.is_empty());
    }
}
