//! How far a backfill is: by the keys that are covered.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::Client;

use super::position::Part;

/// What is known of one table.
#[derive(Default)]
struct Table {
    parts: usize,
    done: usize,
    /// Rows of parts that are done.
    rows_done: u64,
    /// Rows of parts in work.
    at_work: HashMap<i32, u64>,
}

impl Table {
    /// Parts are of about the same size; how far one in work is, the others' rows say.
    fn share(&self) -> f64 {
        if self.parts == 0 {
            return 0.0;
        }
        let mean = if self.done > 0 { self.rows_done as f64 / self.done as f64 } else { f64::INFINITY };
        let inside: f64 = self.at_work.values().map(|rows| (*rows as f64 / mean.max(1.0)).min(0.99)).sum();
        ((self.done as f64 + inside) / self.parts as f64).min(1.0)
    }
}

/// Of all tables of one backfill.
#[derive(Default)]
pub(super) struct Tally {
    tables: HashMap<u32, Table>,
}

impl Tally {
    /// A table's parts as they are found.
    pub fn begin(&mut self, parts: &[Part]) {
        let Some(first) = parts.first() else { return };
        let mut table = Table { parts: parts.len(), ..Table::default() };
        for part in parts {
            let rows = part.rows.max(0) as u64;
            if part.done {
                table.done += 1;
                table.rows_done += rows;
            } else if rows > 0 {
                table.at_work.insert(part.part, rows);
            }
        }
        self.tables.insert(first.number, table);
    }

    /// Rows of a part are done. Returns the table's share.
    pub fn add(&mut self, number: u32, part: i32, rows: u64) -> f64 {
        let table = self.tables.entry(number).or_default();
        *table.at_work.entry(part).or_default() += rows;
        table.share()
    }

    /// A part is done.
    pub fn done(&mut self, number: u32, part: i32) {
        let table = self.tables.entry(number).or_default();
        table.done += 1;
        table.rows_done += table.at_work.remove(&part).unwrap_or(0);
    }
}

/// Where the backfill of a table stands, as the authority has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// Rows that are done.
    pub rows: i64,
    /// How much of the table's keys is covered, from 0 to 1.
    pub share: f64,
}

/// Reads where the backfills stand, by the table's number. Only on the authority.
pub async fn standing(authority: &Client) -> Result<BTreeMap<u32, Standing>, tokio_postgres::Error> {
    let there = "SELECT pg_catalog.to_regclass('crossfade.backfill') IS NOT NULL";
    if !authority.query_typed_one(there, &[]).await?.get::<_, bool>(0) {
        return Ok(BTreeMap::new());
    }
    // Not those whose debts somebody else has paid, or a move has made void.
    let text = "SELECT number, part, rows, done FROM crossfade.backfill b WHERE EXISTS (SELECT FROM crossfade.ledger l WHERE l.id = ANY (b.debts)) \
        OR NOT EXISTS (SELECT FROM crossfade.backfill o WHERE o.number = b.number AND NOT o.done) ORDER BY number, part";
    let mut tables: BTreeMap<u32, (i64, Table)> = BTreeMap::new();
    for row in authority.query_typed(text, &[]).await? {
        let (number, rows, done): (i32, i64, bool) = (row.get(0), row.get(2), row.get(3));
        let (all, table) = tables.entry(number as u32).or_default();
        *all += rows;
        table.parts += 1;
        if done {
            table.done += 1;
            table.rows_done += rows.max(0) as u64;
        } else if rows > 0 {
            table.at_work.insert(row.get(1), rows.max(0) as u64);
        }
    }
    Ok(tables.into_iter().map(|(number, (rows, table))| (number, Standing { rows, share: table.share() })).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_are_done_count_whole_and_others_by_their_rows() {
        let mut tally = Tally::default();
        tally.tables.insert(1, Table { parts: 4, ..Table::default() });
        assert_eq!(tally.add(1, 0, 100), 0.0, "nobody knows yet how many rows a part has");
        tally.done(1, 0);
        assert_eq!(tally.add(1, 1, 50), 0.375);
        assert!(tally.add(1, 1, 500) < 0.5, "a part is done when it says so");
        tally.done(1, 1);
        assert_eq!(tally.tables[&1].share(), 0.5);
    }
}
