//! Keys that something has changed, compared with the mirror; what is not certain to be equal becomes a debt.
//!
//! Nothing is locked on the authority. The order of the looks says when equal is equal for good: the authority's row, then the ledger, then the mirror's.
//! Whoever's images were under way to the key when the authority was read owes it in the ledger, or had them committed and flushed before the mirror
//! was read. docs/protocols.md, *Sweep*.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use bytes::BytesMut;
use tokio_postgres::error::SqlState;

use super::super::across::{key_across, row_across};
use super::super::binary::values;
use super::super::error::Error;
use super::super::link::Pair;
use super::super::owes::Owes;
use super::super::reconcile::ask;
use super::super::sql::{TableSql, references};
use super::load::is_visible;
use crate::catalog::Table;
use crate::ledger::debts::{Debt, Values, encode};

/// Keys that are looked at in one go, and that one ledger row names at most.
const AT_ONCE: usize = 1000;
/// Pauses before keys that are in motion are looked at again. Then they are owed.
const PAUSES: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(300), Duration::from_millis(600)];
/// How long commits that are in the log are waited for to be seen.
const SEEN: Duration = Duration::from_secs(60);

/// Waits until a snapshot shows what these transactions did: a commit is in the log before others see it, for as long as a synchronous standby takes.
pub(super) async fn seen(pair: &mut Pair, xids: &BTreeSet<u32>) -> Result<(), Error> {
    let begun = std::time::Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        let text = "SELECT pg_snapshot_xmax(s)::text::bigint, ARRAY(SELECT x::text::bigint FROM pg_snapshot_xip(s) AS x) FROM pg_current_snapshot() AS s";
        let row = &pair.authority.rows("reading who is at work", text, &[]).await?[0];
        let xmax = row.get::<_, i64>(0).cast_unsigned();
        let running: Vec<u64> = row.get::<_, Vec<i64>>(1).into_iter().map(i64::cast_unsigned).collect();
        if xids.iter().all(|xid| is_visible(*xid, xmax, &running)) {
            return Ok(());
        }
        if begun.elapsed() > SEEN {
            return Err(Error::Deadline(format!(
                "{}: a transaction has committed and is not seen yet (does a synchronous standby not answer?); the sweep waits for it",
                pair.authority.side
            )));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// What a look at a key has shown.
enum Seen {
    Equal,
    /// A debt names it: rows may be on their way.
    Named,
    /// The authority's row, which differs (None: it has none).
    Different(Option<Values>),
}

/// Of these keys (texts, all of one table), those that are not certain to be equal on both sides, as images carry them. Err: a server's, also where a text
/// is no value of the key any more.
pub(super) async fn unequal(pair: &mut Pair, table: &Table, keys: &HashSet<Values>) -> Result<Vec<Values>, Error> {
    let asked: Vec<&Values> = keys.iter().collect();
    let mut found = Vec::new();
    let mut moving = Vec::new();
    for some in asked.chunks(AT_ONCE) {
        let some = convert(pair, table, some).await?;
        let (different, later) = twice(pair, table, some).await?;
        found.extend(different);
        moving.extend(later);
    }
    for pause in PAUSES {
        if moving.is_empty() {
            return Ok(found);
        }
        tokio::time::sleep(pause).await;
        let mut left = Vec::new();
        for some in moving.chunks(AT_ONCE) {
            let (different, later) = twice(pair, table, some.to_vec()).await?;
            found.extend(different);
            left.extend(later);
        }
        moving = left;
    }
    found.extend(moving);
    Ok(found)
}

/// Texts to values. Keys that are equal by their bytes are one.
async fn convert(pair: &mut Pair, table: &Table, keys: &[&Values]) -> Result<Vec<Values>, Error> {
    let here = TableSql::new(table, pair.authority.side);
    let mut found = HashSet::new();
    let pieces = keys.chunks(if here.many { keys.len().max(1) } else { 1 });
    for keys in pieces {
        let parameters = here.text_parameters(keys);
        let rows = pair.authority.rows("reading keys", &here.convert(), &references(&parameters)).await?;
        found.extend(rows.iter().map(|row| values(row, 1, here.key.len())));
    }
    Ok(found.into_iter().collect())
}

/// Those that differ, and differ in the same way when looked at again; and those in motion.
async fn twice(pair: &mut Pair, table: &Table, keys: Vec<Values>) -> Result<(Vec<Values>, Vec<Values>), Error> {
    let mut moving = Vec::new();
    let mut suspects = HashMap::new();
    for (key, seen) in look(pair, table, keys).await? {
        match seen {
            Seen::Equal => {}
            Seen::Named => moving.push(key),
            Seen::Different(row) => drop(suspects.insert(key, row)),
        }
    }
    let mut different = Vec::new();
    let again: Vec<Values> = suspects.keys().cloned().collect();
    for (key, seen) in look(pair, table, again).await? {
        match seen {
            Seen::Equal => {}
            Seen::Different(row) if suspects.get(&key) == Some(&row) => different.push(key),
            Seen::Different(_) | Seen::Named => moving.push(key),
        }
    }
    Ok((different, moving))
}

async fn look(pair: &mut Pair, table: &Table, keys: Vec<Values>) -> Result<Vec<(Values, Seen)>, Error> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let (here, there) = (TableSql::new(table, pair.authority.side), TableSql::new(table, pair.mirror.side));
    let columns = &there.writable;
    let asked: Vec<&Values> = keys.iter().collect();
    let mut rows = HashMap::new();
    for (at, row) in ask(&mut pair.authority, "reading rows", &here, &here.look(columns), &asked).await? {
        rows.insert(at, row_across(table, here.side, columns, values(&row, 1, columns.len())));
    }
    // Behind the authority, and before the mirror.
    let owes = Owes::read(pair, table).await?;
    let across: Vec<Values> = keys.iter().map(|key| key_across(table, here.side, key.clone())).collect();
    let asked: Vec<&Values> = across.iter().collect();
    // Who pays a whole table may be about to delete a row that has just come back: nobody else's images follow on it. He has it locked.
    let text = if owes.whole { there.lock_and_look(columns) } else { there.look(columns) };
    let mut mirrored = HashMap::new();
    for (at, row) in ask(&mut pair.mirror, "comparing rows", &there, &text, &asked).await? {
        mirrored.insert(at, values(&row, 1, columns.len()));
    }
    let judge = |(at, key): (usize, Values)| {
        let (row, other) = (rows.remove(&at), mirrored.remove(&at));
        let seen = match () {
            _ if owes.names(table, &key) => Seen::Named,
            _ if row == other => Seen::Equal,
            _ => Seen::Different(row),
        };
        (key, seen)
    };
    Ok(keys.into_iter().enumerate().map(judge).collect())
}

/// Under which epoch debts are entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epoch {
    /// A phase with a mirror: whoever moves waits for this debt, or it is refused.
    Mirrored(u64),
    /// Before the first mirrored phase: the move owes everything anyway.
    Before,
}

/// Enters debts: keys, and tables as a whole. `next`: the next number for a ledger row. Durable when this returns.
pub(super) async fn owe(
    pair: &mut Pair,
    epoch: Epoch,
    next: &mut i64,
    keys: &[(u32, Vec<Values>)],
    whole: &BTreeSet<u32>,
) -> Result<(), Error> {
    let mut entries: Vec<BytesMut> = Vec::new();
    for (number, keys) in keys {
        for some in keys.chunks(AT_ONCE) {
            let mut debts = BytesMut::new();
            some.iter().for_each(|key| encode(&Debt::Key { table: *number, key: key.clone() }, &mut debts));
            entries.push(debts);
        }
    }
    for &table in whole {
        let mut debts = BytesMut::new();
        encode(&Debt::Taint { table }, &mut debts);
        entries.push(debts);
    }
    if entries.is_empty() {
        return Ok(());
    }
    let entered = async {
        pair.authority.batch("entering debts", "BEGIN; SET LOCAL synchronous_commit = on").await?;
        if let Epoch::Mirrored(epoch) = epoch {
            let lock = format!("LOCK TABLE crossfade.epoch_{epoch} IN ACCESS SHARE MODE");
            pair.authority.batch("entering debts", &lock).await?;
        }
        for debts in &entries {
            let text = "INSERT INTO crossfade.ledger (id, debts, reason) VALUES ($1, $2, 'sweep')";
            pair.authority.execute("entering debts", text, &[&*next, &&debts[..]]).await?;
            *next += 1;
        }
        pair.authority.commit("entering debts").await
    };
    let entered = entered.await;
    if entered.is_err() {
        pair.abandon().await;
    }
    entered
}

/// The epoch in which debts were to be entered is over.
pub(super) fn is_overtaken(error: &Error) -> bool {
    matches!(error, Error::Server { code, doing: "entering debts", .. } if *code == SqlState::UNDEFINED_TABLE)
}
