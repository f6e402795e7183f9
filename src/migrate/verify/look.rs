//! Hashes of rows, computed by the servers.
//!
//! A row's hash is that of its text under settings that are the same on both sides: so it depends on no OID, on no order of columns and on no version
//! of a binary form, and tells what a client can tell (-0 from 0, 1.0 from 1.00). `hashtextextended` is as fast as PostgreSQL can read rows, and has 64 bits:
//! that a difference stays unseen has a chance of 2^-64 for each range, and nobody gains by finding one. MD5 and SHA-256, cut to as many bits, take several times as
//! long and see no more accidents (`bench/verify` measures both). The sum of all hashes does not depend on the order.

use std::collections::HashMap;

use super::super::across::key_across;
use super::super::binary::{Parameter, values};
use super::super::error::Error;
use super::super::link::{Link, Pair};
use super::super::reconcile::ask;
use super::super::sql::{Bounds, TableSql, references};
use crate::catalog::{Table, quote};
use crate::ledger::debts::Values;
use crate::phase::Side;

/// Under these a value's text says all of it, and is the same on all servers.
pub(super) const SETTINGS: &str = "SET datestyle = 'ISO, YMD'; SET intervalstyle = 'postgres'; SET timezone = 'UTC'; SET extra_float_digits = 3; \
    SET bytea_output = 'hex'; SET lc_monetary = 'C'; SET xmloption = 'content'";

/// Both servers keep text in the same bytes.
pub(super) async fn same_encoding(pair: &mut Pair) -> Result<bool, Error> {
    let text = "SELECT getdatabaseencoding()::text";
    let old: String = pair.authority.rows("reading the encoding", text, &[]).await?[0].get(0);
    let new: String = pair.mirror.rows("reading the encoding", text, &[]).await?[0].get(0);
    Ok(old == new)
}

/// How a table is looked at.
pub(super) struct Look<'a> {
    table: &'a Table,
    here: TableSql<'a>,
    there: TableSql<'a>,
    /// Both sides order keys alike: a range is the same keys on both.
    alike: bool,
    /// Of relation `t`, on each side.
    hash_here: String,
    hash_there: String,
}

/// What one look at a range has shown.
pub(super) struct Seen {
    /// Rows of the authority.
    pub rows: u64,
    /// Keys whose rows have other hashes, or that one side has alone; as the authority's images carry them.
    pub suspects: Vec<Values>,
}

/// What both sides say of a range.
struct Sums {
    /// Rows of the authority.
    rows: u64,
    /// Both have the same number of rows, and the same sum of hashes.
    equal: bool,
}

/// A range whose rows differ is cut into so many, ...
const PIECES: u64 = 8;
/// ... until one has no more rows than this: their keys are fetched, with the hashes.
const LISTED: u64 = 4000;

impl<'a> Look<'a> {
    pub fn new(table: &'a Table, authority: Side, alike: bool, same_encoding: bool) -> Look<'a> {
        let (here, there) = (TableSql::new(table, authority), TableSql::new(table, authority.other()));
        let hash = |side| hash(table, side, same_encoding);
        Look { table, here, there, alike, hash_here: hash(authority), hash_there: hash(authority.other()) }
    }

    /// The first keys of what is left, about so many of the authority's; true: there are no more, and it goes to the end of what is left.
    pub async fn range(&self, pair: &mut Pair, left: &Bounds, rows: usize) -> Result<(Bounds, bool), Error> {
        let (within, number) = self.here.within(left.after.is_some(), left.upto.is_some());
        let text = format!(
            "SELECT {} FROM {} AS t WHERE {within} ORDER BY {} OFFSET ${number}::bigint LIMIT 1",
            self.here.read_key(),
            self.here.only(),
            self.here.key_columns()
        );
        let mut parameters = self.here.bound_parameters(left);
        let offset = bytes::Bytes::copy_from_slice(&(rows as i64).to_be_bytes());
        parameters.push(Parameter { value: Some(offset), text: false });
        let found = pair.authority.rows("cutting a range", &text, &references(&parameters)).await?;
        Ok(match found.first() {
            Some(row) => {
                let upto = Some(values(row, 0, self.here.key.len()));
                (Bounds { after: left.after.clone(), upto }, false)
            }
            None => (left.clone(), true),
        })
    }

    /// Compares the rows of a range: by sums first, where the order is the same; a range whose sums differ is cut into smaller ones, down to such as can be
    /// listed.
    pub async fn compare(&self, pair: &mut Pair, range: &Bounds) -> Result<Seen, Error> {
        if !self.alike {
            let here = rows(&mut pair.authority, &self.here, &self.hash_here, range).await?;
            return self.by_keys(pair, here).await;
        }
        let Sums { rows, equal } = self.sums(pair, range).await?;
        let mut suspects = Vec::new();
        let mut differ = if equal { Vec::new() } else { vec![(range.clone(), rows)] };
        while let Some((range, rows)) = differ.pop() {
            if rows <= LISTED {
                suspects.extend(self.list(pair, &range).await?);
                continue;
            }
            let mut left = range.clone();
            loop {
                let (piece, last) = self.range(pair, &left, rows.div_ceil(PIECES) as usize).await?;
                match self.sums(pair, &piece).await? {
                    Sums { equal: true, .. } => {}
                    // Most of its rows are gone meanwhile: it cannot be cut.
                    _ if piece == range => suspects.extend(self.list(pair, &piece).await?),
                    Sums { rows, .. } => differ.push((piece.clone(), rows)),
                }
                if last {
                    break;
                }
                left.after = piece.upto;
            }
        }
        Ok(Seen { rows, suspects })
    }

    /// Rows and hashes of a range on both sides, at about the same time.
    async fn sums(&self, pair: &mut Pair, range: &Bounds) -> Result<Sums, Error> {
        let range_there = self.across(range);
        let (here, there) = futures_util::future::try_join(
            sum(&mut pair.authority, &self.here, &self.hash_here, range),
            sum(&mut pair.mirror, &self.there, &self.hash_there, &range_there),
        )
        .await?;
        Ok(Sums { rows: here.0 as u64, equal: here == there })
    }

    fn across(&self, range: &Bounds) -> Bounds {
        let across = |key: &Option<Values>| key.clone().map(|key| key_across(self.table, self.here.side, key));
        Bounds { after: across(&range.after), upto: across(&range.upto) }
    }

    /// Keys of a range whose rows have other hashes on the other side, or that one side has alone.
    async fn list(&self, pair: &mut Pair, range: &Bounds) -> Result<Vec<Values>, Error> {
        let range_there = self.across(range);
        let (here, there) = futures_util::future::try_join(
            rows(&mut pair.authority, &self.here, &self.hash_here, range),
            rows(&mut pair.mirror, &self.there, &self.hash_there, &range_there),
        )
        .await?;
        let mut there: HashMap<Values, i64> =
            there.into_iter().map(|(key, hash)| (key_across(self.table, self.there.side, key), hash)).collect();
        let mut suspects: Vec<Values> =
            here.into_iter().filter(|(key, hash)| there.remove(key) != Some(*hash)).map(|(key, _)| key).collect();
        suspects.extend(there.into_keys());
        Ok(suspects)
    }

    /// The mirror is asked for just these keys.
    async fn by_keys(&self, pair: &mut Pair, here: Vec<(Values, i64)>) -> Result<Seen, Error> {
        let across: Vec<Values> =
            here.iter().map(|(key, _)| key_across(self.table, self.here.side, key.clone())).collect();
        let text = self.there.look_at(&self.hash_there);
        let asked: Vec<&Values> = across.iter().collect();
        let mut hashes: HashMap<usize, i64> = HashMap::new();
        for (at, row) in ask(&mut pair.mirror, "hashing rows", &self.there, &text, &asked).await? {
            hashes.insert(at, row.get(1));
        }
        let rows = here.len() as u64;
        let differs = |(at, (key, hash)): (usize, (Values, i64))| (hashes.get(&at) != Some(&hash)).then_some(key);
        Ok(Seen { rows, suspects: here.into_iter().enumerate().filter_map(differs).collect() })
    }
}

/// The text of a row of relation `t`: the same for rows that are the same, whatever the order of columns.
pub(super) fn row_text(table: &Table, side: Side) -> String {
    let column = |column: &crate::catalog::Column| {
        let name = format!("t.{}", quote(column.name.get(side)));
        // The output function of xml leaves the declaration out.
        if column.kind.name.old == "xml" { format!("({name})::pg_catalog.text") } else { name }
    };
    let columns: Vec<String> = table.columns.iter().map(column).collect();
    format!("ROW({})::pg_catalog.text", columns.join(", "))
}

/// A text as both servers have it in the same bytes.
pub(super) fn in_same_bytes(text: &str, same_encoding: bool) -> String {
    match same_encoding {
        true => text.to_owned(),
        false => format!("pg_catalog.encode(pg_catalog.convert_to({text}, 'UTF8'), 'hex')"),
    }
}

fn hash(table: &Table, side: Side, same_encoding: bool) -> String {
    let text = in_same_bytes(&row_text(table, side), same_encoding);
    format!("pg_catalog.hashtextextended({text}, 0)")
}

/// Rows and the sum of their hashes.
async fn sum(link: &mut Link, sql: &TableSql<'_>, hash: &str, range: &Bounds) -> Result<(i64, String), Error> {
    let (within, _) = sql.within(range.after.is_some(), range.upto.is_some());
    let text = format!(
        "SELECT pg_catalog.count(*), coalesce(pg_catalog.sum({hash}), 0)::pg_catalog.text FROM {} AS t WHERE {within}",
        sql.only()
    );
    let parameters = sql.bound_parameters(range);
    let row = &link.rows("hashing a range", &text, &references(&parameters)).await?[0];
    Ok((row.get(0), row.get(1)))
}

/// Keys of a range with the hashes of their rows.
async fn rows(link: &mut Link, sql: &TableSql<'_>, hash: &str, range: &Bounds) -> Result<Vec<(Values, i64)>, Error> {
    let (within, _) = sql.within(range.after.is_some(), range.upto.is_some());
    let text = format!("SELECT {hash}, {} FROM {} AS t WHERE {within}", sql.read_key(), sql.only());
    let parameters = sql.bound_parameters(range);
    let found = link.rows("hashing rows", &text, &references(&parameters)).await?;
    Ok(found.iter().map(|row| (values(row, 1, sql.key.len()), row.get(0))).collect())
}
