//! What a session on the mirror has prepared: statements for so many rows of a table, and whole transactions in one statement.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};

use super::flight::Step;
use crate::catalog::Table;
use crate::phase::Side;
use crate::plan::image::{self, Statement};
use crate::wire::frame;

/// Parameters in one statement at most (the protocol counts them in 16 bits).
const PARAMETERS: usize = 32_000;

/// Rows in one statement at most. Statements are prepared for powers of two of rows.
const ROWS: usize = 64;

/// Rows of one table at most where a whole transaction is one statement.
const ROWS_TOGETHER: usize = 8;

/// Kinds of transactions at most that have a statement of their own.
const TOGETHER: usize = 64;

/// How a statement changes a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Verb {
    Upsert,
    Delete,
    Insert,
    InsertMissing,
}

/// A prepared statement's name and the formats of its parameters.
pub(super) type Known = (Bytes, Vec<i16>);

/// A kind of transactions: what it does to which table, with how many rows; and whether a token goes with it.
type Sort = (Vec<(u32, Verb, usize)>, bool);

/// The statements of one session.
pub(super) struct Statements {
    side: Side,
    epoch: Option<u64>,
    rows: HashMap<(u32, Verb, usize), Known>,
    together: HashMap<Sort, Option<Known>>,
    /// How many of these are prepared.
    named: usize,
    token: bool,
    key_lock: bool,
}

impl Statements {
    pub(super) fn new(side: Side, epoch: Option<u64>) -> Statements {
        Statements {
            side,
            epoch,
            rows: HashMap::new(),
            together: HashMap::new(),
            named: 0,
            token: false,
            key_lock: false,
        }
    }

    /// The server has forgotten them all.
    pub(super) fn clear(&mut self) {
        *self = Statements::new(self.side, self.epoch);
    }

    /// Asks for the open transaction's xid8 and the version of the definitions, under the lock of its epoch.
    ///
    /// LOCK TABLE wants a transaction block, which a pipeline is not. A join that can find nothing is planned away, but its table is locked like
    /// every other that a statement names, until the transaction ends.
    pub(super) fn xid(&self) -> String {
        Statements::xid_of(self.epoch)
    }

    fn xid_of(epoch: Option<u64>) -> String {
        let asked = "SELECT pg_catalog.pg_current_xact_id(), \
            pg_catalog.pg_sequence_last_value('crossfade.version'::pg_catalog.regclass)";
        match epoch {
            Some(epoch) => format!("{asked} FROM (SELECT 1) AS one LEFT JOIN crossfade.epoch_{epoch} ON false"),
            None => asked.to_owned(),
        }
    }

    /// The statement for so many rows, parsed in this flight if it is new.
    pub(super) fn rows(&mut self, table: &Table, verb: Verb, rows: usize, out: &mut BytesMut) -> Known {
        let at = (table.number, verb, rows);
        if let Some(known) = self.rows.get(&at) {
            return known.clone();
        }
        let statement = match verb {
            Verb::Upsert => image::upsert(table, self.side, rows),
            Verb::Delete => image::delete(table, self.side, rows),
            Verb::Insert => image::insert(table, self.side, rows),
            Verb::InsertMissing => image::insert_missing(table, self.side, rows),
        };
        let known = parse(format!("{verb:?}{}x{rows}", table.number), statement, out);
        self.rows.insert(at, known.clone());
        known
    }

    /// The statement that keeps other writers of a table away (`image::needs_lock`).
    pub(super) fn key_lock(&mut self, out: &mut BytesMut) -> Known {
        let name = "key_lock";
        if !std::mem::replace(&mut self.key_lock, true) {
            frame::parse(out, name.as_bytes(), image::KEY_LOCK.as_bytes(), &[23]);
        }
        (Bytes::from_static(name.as_bytes()), vec![1])
    }

    /// The statement that takes a transaction's token.
    pub(super) fn token(&mut self, out: &mut BytesMut) -> Known {
        let name = "token";
        if !std::mem::replace(&mut self.token, true) {
            let text = "INSERT INTO crossfade.applied (token) VALUES ($1) ON CONFLICT DO NOTHING";
            frame::parse(out, name.as_bytes(), text.as_bytes(), &[2950]);
        }
        (Bytes::from_static(name.as_bytes()), vec![1])
    }

    /// One statement for a whole transaction, where its kind was seen before: rows are added and rewritten only, in different tables. It returns
    /// the transaction's xid8 and the version of the definitions. Its parameters are those of the steps, one after another, then the token.
    ///
    /// The parts of such a statement do not see each other, and run in any order: deletes stay apart, since rows wait for them.
    pub(super) fn together(&mut self, steps: &[Step], token: bool, out: &mut BytesMut) -> Option<Known> {
        let mut parts = Vec::with_capacity(steps.len());
        let mut sort: Vec<(u32, Verb, usize)> = Vec::with_capacity(steps.len());
        for step in steps {
            let (table, verb, rows) = match step {
                Step::Upsert(table, _) if image::needs_replace(table, self.side) => return None,
                Step::Upsert(table, rows) => (table, Verb::Upsert, rows.len()),
                Step::Insert(table, rows) => (table, Verb::Insert, rows.len()),
                Step::Delete(..) | Step::Clear(..) | Step::Truncate(_) | Step::Define(_) => return None,
            };
            if rows > ROWS_TOGETHER.min(per_statement(table, verb)) || sort.iter().any(|(n, ..)| *n == table.number) {
                return None;
            }
            parts.push((table, verb, rows));
            sort.push((table.number, verb, rows));
        }
        if parts.iter().map(|(table, _, rows)| table.columns.len() * rows).sum::<usize>() > PARAMETERS {
            return None;
        }
        let sort = (sort, token);
        let kinds = self.together.len();
        match self.together.get_mut(&sort) {
            Some(Some(known)) => Some(known.clone()),
            Some(unprepared) => {
                let mut statement = Statement::default();
                let xid = Statements::xid_of(self.epoch);
                for (at, (table, verb, rows)) in parts.into_iter().enumerate() {
                    statement.text.push_str(if at == 0 { "WITH " } else { ", " });
                    statement.text.push_str(&format!("w{at} AS ("));
                    match verb {
                        Verb::Upsert => image::put_upsert(table, self.side, rows, &mut statement),
                        _ => image::put_insert(table, self.side, rows, &mut statement),
                    }
                    statement.text.push(')');
                }
                if token {
                    statement.parameter_types.push(2950);
                    statement.formats.push(1);
                    let number = statement.parameter_types.len();
                    let taken = format!(", t AS (INSERT INTO crossfade.applied (token) VALUES (${number}))");
                    statement.text.push_str(&taken);
                }
                statement.text.push(' ');
                statement.text.push_str(&xid);
                let known = parse(format!("together{}", self.named), statement, out);
                self.named += 1;
                Some(unprepared.insert(known).clone())
            }
            None => {
                if kinds < TOGETHER && !sort.0.is_empty() {
                    self.together.insert(sort, None);
                }
                None
            }
        }
    }
}

fn parse(name: String, statement: Statement, out: &mut BytesMut) -> Known {
    frame::parse(out, name.as_bytes(), statement.text.as_bytes(), &statement.parameter_types);
    (Bytes::from(name), statement.formats)
}

/// Rows of a table in one statement at most.
pub(super) fn per_statement(table: &Table, verb: Verb) -> usize {
    let width = match verb {
        Verb::Delete => table.key.as_ref().map_or(1, |key| key.columns.len()),
        _ => table.columns.len(),
    };
    (PARAMETERS / width.max(1)).clamp(1, ROWS)
}

/// `total` rows as chunks of powers of two, none larger than `most`.
pub(super) fn chunks(total: usize, most: usize) -> impl Iterator<Item = usize> {
    let mut left = total;
    std::iter::from_fn(move || {
        let largest = left.min(most);
        (largest > 0).then(|| {
            let count = 1 << largest.ilog2();
            left -= count;
            count
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sent_in_powers_of_two() {
        assert_eq!(chunks(13, 64).collect::<Vec<_>>(), [8, 4, 1]);
        assert_eq!(chunks(150, 64).collect::<Vec<_>>(), [64, 64, 16, 4, 2]);
        assert_eq!(chunks(5, 1).collect::<Vec<_>>(), [1; 5]);
        assert_eq!(chunks(0, 64).count(), 0);
    }
}
