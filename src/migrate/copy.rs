//! Tables without a key (O5): their rows have no name, so a debt on the whole table is paid only by a full copy, at a moment for which it
//! is known which rows come by image and which by copy.
//!
//! Either in the snapshot of a move ([`prepare`] and [`keyless`]): it is taken while no client writes, the mirror's table is emptied
//! before clients go on, and what they insert from then on comes by image. Or by name, later ([`locked`]): under a lock that keeps writers
//! out while the mirror's rows are replaced.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use futures_util::{SinkExt, StreamExt};

use super::across::row_across;
use super::binary::{COPY_HEADER, COPY_TRAILER, CopyRows, put_copy_row};
use super::error::{Error, Meaning};
use super::gone::wait_for_writers;
use super::link::Pair;
use super::locks::{self, Kind};
use super::payable::{self, Entry, State};
use super::repair::{clear, note_owings};
use super::sql::{TableSql, references};
use super::tokens;
use crate::catalog::{Catalog, Table};
use crate::ledger::debts::{self, Debt, Values};

/// Empties the mirror's tables, and commits that durably. To be called by the mover after its snapshot is taken and before clients go on,
/// when no transaction on them is under way on either side; the tables' whole debts must have been entered before, or be void if the move is. Rows that
/// the ledger owes to them are in the snapshot, and count as paid.
pub async fn prepare(pair: &mut Pair, catalog: &Catalog, tables: &[&Table]) -> Result<(), Error> {
    let incarnation = pair.incarnation().await?;
    let mut entries = debts_of(pair, tables, &incarnation).await?;
    // What is in flight is brought by its own transaction.
    entries.retain(|entry| entry.state != State::InFlight);
    let numbers = tables_of(tables, &entries);
    if !locks::take_within(pair, Kind::Table, &numbers, pair.settings.patience).await? {
        let labels: Vec<String> = tables.iter().map(|table| table.label()).collect();
        return Err(Error::Deadline(format!(
            "another job works on one of the tables {}: try again when it has ended",
            labels.join(", ")
        )));
    }
    let emptied = empty_for_good(pair, catalog, tables, &entries).await;
    if emptied.is_err() {
        pair.abandon().await;
    }
    if !pair.is_broken() {
        locks::release(pair, Kind::Table, &numbers).await?;
    }
    emptied
}

async fn empty_for_good(pair: &mut Pair, catalog: &Catalog, tables: &[&Table], entries: &[Entry]) -> Result<(), Error> {
    // Durable: were it lost in a crash, the copy would come on top of what was there.
    pair.mirror.batch("beginning", "BEGIN; SET LOCAL synchronous_commit = on").await?;
    empty(pair, tables).await?;
    absorb(pair, catalog, tables, entries).await?;
    pair.mirror.commit("committing").await
}

/// The tables themselves, and those that share a token with them.
fn tables_of(tables: &[&Table], entries: &[Entry]) -> Vec<u32> {
    let rows = entries.iter().flat_map(|entry| &entry.debts).filter(|debt| matches!(debt, Debt::Row { .. }));
    let own = tables.iter().map(|table| table.number);
    rows.map(Debt::table).chain(own).collect::<BTreeSet<_>>().into_iter().collect()
}

/// In the open transaction of the mirror.
async fn empty(pair: &mut Pair, tables: &[&Table]) -> Result<(), Error> {
    let only: Vec<String> = tables.iter().map(|table| TableSql::new(table, pair.mirror.side).only()).collect();
    let truncate = |what: &str| format!("SAVEPOINT crossfade_empty; TRUNCATE {what}; RELEASE crossfade_empty");
    match pair.mirror.batch("emptying tables", &truncate(&only.join(", "))).await {
        Err(error) if error.meaning() == Meaning::Refused => {}
        truncated => return truncated,
    }
    pair.mirror.batch("emptying tables", "ROLLBACK TO crossfade_empty").await?;
    for only in only {
        match pair.mirror.batch("emptying a table", &truncate(&only)).await {
            // Another table refers to it: TRUNCATE will not, DELETE may (triggers are off).
            Err(error) if error.meaning() == Meaning::Refused => {
                let rows = format!("ROLLBACK TO crossfade_empty; DELETE FROM {only}");
                pair.mirror.batch("emptying a table", &rows).await?;
            }
            truncated => truncated?,
        }
    }
    Ok(())
}

/// Copies a table without a key as `snapshot` (of pg_export_snapshot on the authority) shows it to the mirror, behind what clients insert
/// meanwhile, and clears the ledger rows `debts`, which must hold nothing but this table's whole debt. Returns the rows copied.
/// May be called again after an error whose outcome is not known, for as long as the snapshot is there: it copies once.
pub async fn keyless(pair: &mut Pair, table: &Table, snapshot: &str, ids: &[i64]) -> Result<u64, Error> {
    let Some(&first) = ids.first() else {
        return Err(Error::Unfit(format!("the copy of table {} pays no debt", table.label())));
    };
    if !locks::take_within(pair, Kind::Table, &[table.number], pair.settings.settle).await? {
        return Err(Error::Deadline(format!(
            "another job works on table {}: try again when it has ended",
            table.label()
        )));
    }
    let copied = keyless_locked(pair, table, snapshot, ids, first).await;
    if copied.is_err() {
        pair.abandon().await;
    }
    if !pair.is_broken() {
        locks::release(pair, Kind::Table, &[table.number]).await?;
    }
    copied
}

async fn keyless_locked(pair: &mut Pair, table: &Table, snapshot: &str, ids: &[i64], first: i64) -> Result<u64, Error> {
    let incarnation = pair.incarnation().await?;
    let snapshot = snapshot.replace('\'', "''");
    let begin = format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{snapshot}'");
    pair.authority.batch("entering the snapshot", &begin).await?;
    pair.mirror.batch("beginning", "BEGIN").await?;
    // The outcome of a COMMIT may not be known: the token, in the same transaction, says that the copy is there.
    let token = copy_token(pair, first).await?;
    let mut rows = 0;
    if tokens::claim(&mut pair.mirror, token).await? {
        rows = copy_all(pair, table).await?;
    }
    pair.mirror.commit("committing").await?;
    pair.authority.rollback().await?;
    let debt = |id: &i64| Entry {
        id: *id,
        state: State::Payable,
        age_us: 0,
        late: None,
        unreadable: None,
        reason: None,
        debts: vec![Debt::Row { table: table.number, token, values: Vec::new() }],
    };
    note_owings(pair, [table.number as i32].into()).await?;
    clear(pair, &ids.iter().map(debt).collect::<Vec<_>>(), &incarnation).await?;
    Ok(rows)
}

/// The token of the copy that pays a ledger row: ids are unique on one authority.
async fn copy_token(pair: &mut Pair, id: i64) -> Result<[u8; 16], Error> {
    let text = "SELECT decode(md5('crossfade copy ' || $1::text || ' ' || $2::bigint), 'hex')";
    let name = pair.authority.side.name();
    let rows = pair.mirror.rows("naming the copy", text, &[&name, &id]).await?;
    let bytes: &[u8] = rows[0].get(0);
    bytes.try_into().map_err(|_| Error::Unfit("md5 on the mirror is not 16 bytes".to_owned()))
}

/// COPY in pieces of this size.
const PIECE: usize = 256 << 10;

/// All rows that the authority's transaction sees, into the mirror's. Memory: a piece and the largest row.
async fn copy_all(pair: &mut Pair, table: &Table) -> Result<u64, Error> {
    let doing = "copying a table";
    let here = TableSql::new(table, pair.authority.side);
    let there = TableSql::new(table, pair.mirror.side);
    let columns = &there.writable;
    let out =
        format!("COPY (SELECT {} FROM {} AS t) TO STDOUT (FORMAT binary)", here.read_columns(columns), here.only());
    let stream = pair.authority.answered(doing, pair.authority.client.copy_out(&out)).await?;
    let mut stream = std::pin::pin!(stream);
    let mut reader = CopyRows::default();
    let mut count = 0;
    let mut sink = None;
    if there.copies() {
        sink = Some(pair.mirror.copy_in(doing, &there.copy_in()).await?);
    }
    let mut piece = BytesMut::from(COPY_HEADER);
    loop {
        let Some(bytes) = pair.authority.answered(doing, async { stream.next().await.transpose() }).await? else {
            break;
        };
        reader.push(&bytes);
        while let Some(row) = reader.next() {
            let row = row_across(table, here.side, columns, row);
            count += 1;
            match &mut sink {
                None => insert_one(pair, &there, row).await?,
                Some(sink) => {
                    put_copy_row(row.iter(), &mut piece);
                    if piece.len() >= PIECE {
                        pair.mirror.answered(doing, sink.send(piece.split().freeze())).await?;
                    }
                }
            }
        }
    }
    if let Some(mut sink) = sink {
        piece.put_slice(COPY_TRAILER);
        pair.mirror.answered(doing, sink.send(piece.freeze())).await?;
        let taken = pair.mirror.answered(doing, sink.as_mut().finish()).await?;
        Error::short(there.side, doing, (taken, count))?;
    }
    Ok(count)
}

async fn insert_one(pair: &mut Pair, there: &TableSql<'_>, row: Values) -> Result<(), Error> {
    let parameters = there.row_parameters(&row);
    let taken = pair.mirror.execute("inserting a row", &there.insert(1, false), &references(&parameters)).await?;
    Error::short(there.side, "inserting a row", (taken, 1))
}

/// `repair --table` for a table without a key: keeps its writers out (SHARE lock on the authority) while the mirror's rows are replaced
/// by a full copy, and clears the debts that this pays. Returns the rows copied. Err with [`Error::Deadline`] where writers or
/// other jobs did not make room within `settings.settle`; each try holds writers up for a moment only.
pub async fn locked(pair: &mut Pair, catalog: &Catalog, table: &Table) -> Result<u64, Error> {
    if table.key.is_some() || table.opaque.is_some() {
        return Err(Error::Unfit(format!("table {} is not one that has to be copied under a lock", table.label())));
    }
    let begun = Instant::now();
    loop {
        match locked_once(pair, catalog, table).await {
            Err(error) if error.meaning() == Meaning::Busy && begun.elapsed() < pair.settings.settle => {
                pair.abandon().await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => {
                pair.abandon().await;
                return Err(match error.meaning() {
                    Meaning::Busy => Error::Deadline(format!("table {} is always in use: {error}", table.label())),
                    _ => error,
                });
            }
            Ok(rows) => return Ok(rows),
        }
    }
}

/// What stands in the way of having the table at rest on both sides, to be tried again.
pub(super) fn busy(pair: &Pair, message: String) -> Error {
    Error::Server {
        side: pair.mirror.side,
        doing: "having a table at rest",
        code: tokio_postgres::error::SqlState::LOCK_NOT_AVAILABLE,
        message,
        constraint: None,
    }
}

async fn locked_once(pair: &mut Pair, catalog: &Catalog, table: &Table) -> Result<u64, Error> {
    let incarnation = pair.incarnation().await?;
    let here = TableSql::new(table, pair.authority.side);
    pair.authority.batch("locking the table", &format!("BEGIN; LOCK TABLE {} IN SHARE MODE", here.only())).await?;
    // Carriers of transactions that the lock has seen end.
    if let Err(holders) = wait_for_writers(&mut pair.mirror, table, pair.wait * 8).await? {
        return Err(busy(pair, format!("transactions {} stay open", holders.join(", "))));
    }
    let entries = debts_of(pair, &[table], &incarnation).await?;
    // A taint whose transaction carries images of other tables is in flight with them: left out, it would stay behind the copy that pays it.
    if entries.iter().any(|entry| entry.state == State::InFlight) {
        return Err(busy(pair, "transactions that owe it something are in flight on the mirror".to_owned()));
    }
    let numbers = tables_of(&[table], &entries);
    if !locks::take(pair, Kind::Table, &numbers).await? {
        return Err(busy(pair, "another job works on the table".to_owned()));
    }
    let copied = replace_all(pair, catalog, table, &entries).await;
    if copied.is_err() {
        pair.abandon().await;
    }
    if !pair.is_broken() {
        locks::release(pair, Kind::Table, &numbers).await?;
    }
    let rows = copied?;
    if entries.iter().any(|entry| entry.state == State::Payable) {
        note_owings(pair, numbers.into_iter().map(|number| number as i32).collect()).await?;
    }
    settle_debts(pair, table, entries, &incarnation).await?;
    Ok(rows)
}

/// Ledger rows that have to do with the tables.
pub(super) async fn debts_of(pair: &mut Pair, tables: &[&Table], incarnation: &str) -> Result<Vec<Entry>, Error> {
    let (mut after, mut found) = (0, Vec::new());
    loop {
        let entries = payable::read(pair.authority.at(), pair.mirror.at(), after, payable::ROWS, incarnation).await?;
        let Some(last) = entries.last() else { return Ok(found) };
        after = last.id;
        let about = |debt: &Debt| tables.iter().any(|table| table.number == debt.table());
        found.extend(entries.into_iter().filter(|entry| entry.debts.iter().any(about)));
    }
}

async fn replace_all(pair: &mut Pair, catalog: &Catalog, table: &Table, entries: &[Entry]) -> Result<u64, Error> {
    pair.mirror.batch("beginning", "BEGIN").await?;
    empty(pair, &[table]).await?;
    absorb(pair, catalog, &[table], entries).await?;
    let rows = copy_all(pair, table).await?;
    // While this answers, the lock on the authority stands.
    pair.authority.batch("holding the table", "SELECT 1").await?;
    pair.mirror.commit("committing").await?;
    pair.authority.rollback().await?;
    Ok(rows)
}

/// A transaction's rows are paid together, by one token: those for these tables come with the copy, those for others now.
async fn absorb(pair: &mut Pair, catalog: &Catalog, tables: &[&Table], entries: &[Entry]) -> Result<(), Error> {
    let copied = |number: u32| tables.iter().any(|table| table.number == number);
    for entry in entries {
        let mut seen = BTreeSet::new();
        for debt in &entry.debts {
            let Debt::Row { token, .. } = debt else { continue };
            if !seen.insert(*token) || !tokens::claim(&mut pair.mirror, *token).await? {
                continue;
            }
            if !tokens::stands(pair, entry.id).await? {
                // Paid and cleared by another job since the ledger was read. The token is swept.
                continue;
            }
            let others: Vec<(u32, &Values)> = (entry.debts.iter())
                .filter_map(|debt| match debt {
                    Debt::Row { table: number, token: of, values } if of == token && !copied(*number) => {
                        Some((*number, values))
                    }
                    _ => None,
                })
                .collect();
            tokens::insert(pair, catalog, &others).await?;
        }
    }
    Ok(())
}

/// Clears rows that owe nothing else, and takes the table's whole debts out of the others.
async fn settle_debts(pair: &mut Pair, table: &Table, entries: Vec<Entry>, incarnation: &str) -> Result<(), Error> {
    let paid = |debt: &Debt| match debt {
        Debt::Table { table: number } | Debt::Taint { table: number } => *number == table.number,
        Debt::Row { .. } => true,
        Debt::Key { .. } | Debt::Range { .. } => false,
    };
    let (whole, part): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(|entry| entry.debts.iter().all(paid));
    // This flushes the mirror, also for the rows that are only cut down.
    clear(pair, &whole, incarnation).await?;
    if whole.is_empty() && !part.is_empty() {
        let now = crate::ledger::clear::flush(&pair.mirror.client).await;
        if now.ok().as_deref() != Some(incarnation) {
            return Err(Error::Reincarnated { side: pair.mirror.side });
        }
    }
    for entry in part {
        let (mut before, mut left) = (BytesMut::new(), BytesMut::new());
        for debt in &entry.debts {
            debts::encode(debt, &mut before);
            // Rows stay: their token says that they are paid.
            if !paid(debt) || matches!(debt, Debt::Row { .. }) {
                debts::encode(debt, &mut left);
            }
        }
        let text = "UPDATE crossfade.ledger SET debts = $2 WHERE id = $1 AND debts = $3";
        pair.authority.execute("cutting a debt down", text, &[&entry.id, &&left[..], &&before[..]]).await?;
    }
    Ok(())
}
