//! Rows owed to tables without a key: paid exactly once, by a token on the mirror in the same transaction as the rows.
//!
//! The carrier of such rows writes the token too. So a token on the mirror says that its transaction's rows are there, whatever became
//! of the carrier's xid (another incarnation, too old to ask). A token outlives its ledger row: it goes only after a *flushed*
//! clearing, else a crash of the authority brings the debt back and it would be paid twice.

use std::collections::HashSet;

use super::across::row_across;
use super::error::Error;
use super::link::{Link, Pair};
use super::payable;
use super::sql::{TableSql, references};
use crate::catalog::Catalog;
use crate::ledger::debts::{Debt, Values};

/// Inserts a transaction's rows (table's number, values in the order of its columns, as the authority has them) unless its token is
/// there already, or ledger row `id` has been cleared. Returns how many were inserted. Commits without a flush.
pub(crate) async fn pay(
    pair: &mut Pair,
    catalog: &Catalog,
    (id, token): (i64, [u8; 16]),
    rows: &[(u32, &Values)],
) -> Result<u64, Error> {
    pair.mirror.batch("beginning", "BEGIN").await?;
    if !claim(&mut pair.mirror, token).await? {
        pair.mirror.commit("committing").await?;
        return Ok(0);
    }
    // No token: nobody has paid yet, or somebody has since the ledger was read, and has cleared the debt and then removed the token. The ledger
    // as it is now tells.
    if !stands(pair, id).await? {
        pair.mirror.rollback().await?;
        return Ok(0);
    }
    let inserted = insert(pair, catalog, rows).await?;
    pair.mirror.commit("committing").await?;
    Ok(inserted)
}

/// The debt is in the ledger now. To be asked behind a claim: what was read before may have been paid and cleared since, and its token removed.
pub(crate) async fn stands(pair: &mut Pair, id: i64) -> Result<bool, Error> {
    let text = "SELECT EXISTS (SELECT FROM crossfade.ledger WHERE id = $1)";
    Ok(pair.authority.rows("looking for a debt", text, &[&id]).await?[0].get(0))
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
        let values: Vec<_> = there.writable.iter().map(|&at| row[at].clone()).collect();
        let parameters = there.row_parameters(&values);
        pair.mirror.execute("inserting a row", &there.insert(1, false), &references(&parameters)).await?;
    }
    Ok(rows.len() as u64)
}

/// Removes tokens whose ledger rows were cleared with a flush. Returns how many: those that somebody else is removing are left to him, and to the next [`sweep`].
pub(crate) async fn remove(mirror: &mut Link, tokens: &[[u8; 16]]) -> Result<u64, Error> {
    if tokens.is_empty() {
        return Ok(0);
    }
    let tokens: Vec<&[u8]> = tokens.iter().map(|token| token.as_slice()).collect();
    let text = "DELETE FROM crossfade.applied WHERE token IN (SELECT token FROM crossfade.applied \
        WHERE token = ANY (SELECT encode(t, 'hex')::uuid FROM unnest($1::bytea[]) t) FOR UPDATE SKIP LOCKED)";
    mirror.execute("removing tokens", text, &[&tokens]).await
}

/// Tokens looked at at once.
const SWEEP: i64 = 50_000;
/// A ledger larger than this (rows) is not searched for tokens: they wait until it is smaller.
const LEDGER_ROWS: i64 = 200_000;

/// Removes all tokens of carriers whose ledger rows are gone. Returns how many. To be called now and then.
pub async fn sweep(pair: &mut Pair) -> Result<u64, Error> {
    let mut count = 0;
    loop {
        let (seen, removed) = sweep_some(pair).await?;
        count += removed;
        // A busy application leaves more of them between two sweeps than are looked at at once.
        if seen < SWEEP as usize || removed == 0 {
            return Ok(count);
        }
    }
}

/// ... of some tokens: how many were looked at, how many removed.
///
/// A token that is visible was committed by the mirror, so its ledger row is visible on the authority unless it was cleared; what the
/// ledger, read *after* the tokens, does not name is cleared, and a flushed commit there makes that durable.
async fn sweep_some(pair: &mut Pair) -> Result<(usize, u64), Error> {
    let text = "SELECT uuid_send(token) FROM crossfade.applied LIMIT $1";
    let rows = pair.mirror.rows("reading tokens", text, &[&SWEEP]).await?;
    let mut unneeded: HashSet<[u8; 16]> =
        rows.iter().filter_map(|row| row.get::<_, &[u8]>(0).try_into().ok()).collect();
    let (mut after, mut left) = (0, LEDGER_ROWS);
    while !unneeded.is_empty() {
        let entries = payable::fetch_debts(pair.authority.at(), after).await?;
        let Some((last, _)) = entries.last() else { break };
        after = *last;
        left -= entries.len() as i64;
        if left < 0 {
            return Ok((rows.len(), 0));
        }
        for debt in entries.iter().flat_map(|(_, debts)| debts) {
            if let Debt::Row { token, .. } = debt {
                unneeded.remove(token);
            }
        }
    }
    if unneeded.is_empty() {
        return Ok((rows.len(), 0));
    }
    let flush = "BEGIN; SET LOCAL synchronous_commit = on; UPDATE crossfade.flush SET n = n + 1; COMMIT";
    pair.authority.batch("flushing", flush).await?;
    let removed = remove(&mut pair.mirror, &unneeded.into_iter().collect::<Vec<_>>()).await?;
    Ok((rows.len(), removed))
}
