//! Rows owed to tables without a key: paid exactly once, by a token on the mirror in the same transaction as the rows.
//!
//! The carrier of such rows writes the token too. So a token on the mirror says that its transaction's rows are there, whatever became
//! of the carrier's xid (another incarnation, too old to ask). A token outlives its ledger row: it goes only after a *flushed*
//! clearing, else a crash of the authority brings the debt back and it would be paid twice.

use super::binary::Raw;
use super::error::Error;
use super::link::{Link, Pair};
use super::sql::{TableSql, references};
use super::across::row_across;
use crate::catalog::Catalog;
use crate::ledger::debts::Values;

/// Inserts a transaction's rows (table's number, values in the order of its columns, as the authority has them) unless its token is
/// there already. Returns how many were inserted. Commits without a flush.
pub(crate) async fn pay(pair: &mut Pair, catalog: &Catalog, token: [u8; 16], rows: &[(u32, &Values)]) -> Result<u64, Error> {
    pair.mirror.batch("beginning", "BEGIN").await?;
    let inserted = if claim(&mut pair.mirror, token).await? { insert(pair, catalog, rows).await? } else { 0 };
    pair.mirror.batch("committing", "COMMIT").await?;
    Ok(inserted)
}

/// Writes the token; false if it is there. Waits for a transaction that is about to write it.
pub(crate) async fn claim(mirror: &mut Link, token: [u8; 16]) -> Result<bool, Error> {
    let text = "INSERT INTO crossfade.applied (token) VALUES (encode($1::bytea, 'hex')::uuid) ON CONFLICT DO NOTHING";
    Ok(mirror.execute("claiming a token", text, &[&token.as_slice()]).await? == 1)
}

/// Inserts rows for tables without a key, in the open transaction of the mirror.
pub(crate) async fn insert(pair: &mut Pair, catalog: &Catalog, rows: &[(u32, &Values)]) -> Result<u64, Error> {
    for (number, row) in rows {
        let Some(table) = catalog.tables.get(number) else {
            return Err(Error::Unfit(format!("table number {number} is not among the migrating tables any more")));
        };
        if row.len() != table.columns.len() {
            return Err(Error::Unfit(format!(
                "table {} has other columns than when the row was written: copy it by name (repair --table)",
                table.label()
            )));
        }
        let there = TableSql::new(table, pair.mirror.side);
        let columns: Vec<usize> = (0..table.columns.len()).collect();
        let row = row_across(table, pair.authority.side, &columns, (*row).clone());
        let parameters: Vec<Raw> = there.writable.iter().map(|&at| Raw(row[at].clone())).collect();
        pair.mirror.execute("inserting a row", &there.insert(1, false), &references(&parameters)).await?;
    }
    Ok(rows.len() as u64)
}

/// Removes tokens whose ledger rows were cleared with a flush.
pub(crate) async fn remove(mirror: &mut Link, tokens: &[[u8; 16]]) -> Result<(), Error> {
    if tokens.is_empty() {
        return Ok(());
    }
    let tokens: Vec<&[u8]> = tokens.iter().map(|token| token.as_slice()).collect();
    let text = "DELETE FROM crossfade.applied WHERE token = ANY (SELECT encode(t, 'hex')::uuid FROM unnest($1::bytea[]) t)";
    mirror.execute("removing tokens", text, &[&tokens]).await?;
    Ok(())
}
