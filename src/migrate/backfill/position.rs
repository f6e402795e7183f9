//! Where a backfill stands: `crossfade.backfill` on the authority, written in the transactions that enter and clear the range debts.

use bytes::{Bytes, BytesMut};
use tokio_postgres::{Row, SimpleQueryMessage};

use super::super::error::Error;
use super::super::link::{Link, Pair};
use super::super::sql::Bounds;
use super::chunk::packed;
use crate::ledger::clear::deletion;
use crate::ledger::debts::{Debt, Values, encode, take_values};

/// A part of a table.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// The table's number.
    pub number: u32,
    /// Its own, from 0.
    pub part: i32,
    /// The whole-table debts that are paid when all parts are done. Those that are gone before were paid by others.
    pub debts: Vec<i64>,
    /// Its keys.
    pub bounds: Bounds,
    /// The last key that is done.
    pub position: Option<Values>,
    /// The range debt of the chunk in work, and that chunk's last key.
    pub work: Option<(i64, Values)>,
    /// Rows done.
    pub rows: i64,
    /// All its keys are done.
    pub done: bool,
}

impl Part {
    /// What is left of it.
    pub fn left(&self) -> Bounds {
        let after = self.position.clone().or_else(|| self.bounds.after.clone());
        Bounds { after, upto: self.bounds.upto.clone() }
    }
}

const COLUMNS: &str = "number, part, debts, after_key, upto_key, position, work, work_key, rows, done";

fn part(row: &Row) -> Part {
    let key = |at: usize| row.get::<_, Option<Vec<u8>>>(at).and_then(|bytes| take_values(&mut Bytes::from(bytes)));
    Part {
        number: row.get::<_, i32>(0) as u32,
        part: row.get(1),
        debts: row.get(2),
        bounds: Bounds { after: key(3), upto: key(4) },
        position: key(5),
        work: row.get::<_, Option<i64>>(6).zip(key(7)),
        rows: row.get(8),
        done: row.get(9),
    }
}

/// All parts of a table, or one.
pub(super) async fn read(authority: &mut Link, number: u32, only: Option<i32>) -> Result<Vec<Part>, Error> {
    let text = format!(
        "SELECT {COLUMNS} FROM crossfade.backfill WHERE number = $1 AND ($2::int IS NULL OR part = $2) ORDER BY part"
    );
    let rows = authority.rows("reading positions", &text, &[&(number as i32), &only]).await?;
    Ok(rows.iter().map(part).collect())
}

/// A backfill has begun with the table, is not done, and was at it within this time.
pub(in super::super) async fn under_way(
    authority: &mut Link,
    number: u32,
    patience: std::time::Duration,
) -> Result<bool, Error> {
    let text = "SELECT bool_or(changed > clock_timestamp() - make_interval(secs => $2)) AND NOT bool_and(done) FROM crossfade.backfill \
        WHERE number = $1 AND debts && (SELECT array_agg(id) FROM crossfade.ledger)";
    let seconds = patience.as_secs_f64();
    let rows = authority.rows("looking for a backfill", text, &[&(number as i32), &seconds]).await?;
    Ok(rows[0].get::<_, Option<bool>>(0).unwrap_or(false))
}

/// The ledger still holds one of these.
pub(super) async fn owed(authority: &mut Link, debts: &[i64]) -> Result<bool, Error> {
    let text = "SELECT EXISTS (SELECT FROM crossfade.ledger WHERE id = ANY ($1))";
    Ok(authority.rows("reading the ledger", text, &[&debts]).await?[0].get(0))
}

/// Numbers of ledger rows as an array.
fn list(debts: &[i64]) -> String {
    let numbers = debts.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
    format!("'{{{numbers}}}'::bigint[]")
}

fn hex(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("pg_catalog.decode('{digits}', 'hex')")
}

fn key(key: &Option<Values>) -> String {
    key.as_ref().map_or_else(|| "NULL".to_owned(), |key| hex(&packed(key)))
}

/// Begins anew: these parts, and nothing of earlier ones. One whose statement comes late, when another has begun since, changes nothing: parts whose debts are
/// still owed stay, and stand in the way of its own.
pub(super) async fn begin(
    authority: &mut Link,
    number: u32,
    debts: &[i64],
    parts: &[Bounds],
    keys: Option<KeyDebts>,
) -> Result<(), Error> {
    let list = list(debts);
    let mut sql = format!(
        "BEGIN; SET LOCAL synchronous_commit = on; DELETE FROM crossfade.backfill b WHERE number = {number} \
         AND NOT EXISTS (SELECT FROM crossfade.ledger WHERE id = ANY (b.debts));"
    );
    for (part, bounds) in parts.iter().enumerate() {
        sql += &format!(
            "INSERT INTO crossfade.backfill (number, part, debts, after_key, upto_key) VALUES ({number}, {part}, {list}, {}, {});",
            key(&bounds.after),
            key(&bounds.upto)
        );
    }
    sql += &keys.map_or_else(String::new, |keys| keys.insertion());
    let answered = authority.batch("keeping positions", &format!("{sql} COMMIT")).await;
    if answered.is_err() {
        let _ = authority.rollback().await;
    }
    answered
}

/// Keys that could not be made equal now: a ledger row of their own.
pub(super) struct KeyDebts {
    /// The ledger row's number.
    pub id: i64,
    /// The table's number.
    pub number: u32,
    /// The keys.
    pub keys: Vec<Values>,
    /// What the mirror said, if it refused one.
    pub error: Option<String>,
}

impl KeyDebts {
    fn insertion(&self) -> String {
        let mut debts = BytesMut::new();
        for key in &self.keys {
            encode(&Debt::Key { table: self.number, key: key.clone() }, &mut debts);
        }
        let error = self.error.as_ref().map_or_else(
            || "NULL".to_owned(),
            |error| format!("pg_catalog.convert_from({}, 'UTF8')", hex(error.as_bytes())),
        );
        format!(
            "INSERT INTO crossfade.ledger (id, debts, reason, error) VALUES ({}, {}, 'backfill', {error});",
            self.id,
            hex(&debts)
        )
    }
}

/// A chunk that is done.
pub(super) struct Done {
    /// Its range debt.
    pub debt: i64,
    /// Its last key.
    pub last: Option<Values>,
    /// Its rows.
    pub rows: usize,
    /// What of it is still owed.
    pub keys: Option<KeyDebts>,
}

/// A chunk to be taken into work.
pub(super) struct Next<'a> {
    /// Its range debt.
    pub debt: i64,
    /// Its keys.
    pub bounds: &'a Bounds,
    /// The mirror's backend that will bring it: pid and start.
    pub backend: (i32, i64),
}

/// One step, one commit with a flush: the chunk before is cleared and its position kept, the next one is owed. Without a next one the part is done.
/// False: the whole-table debts are gone, and with them the reason to go on; nothing was taken into work.
///
/// Whoever sent it may be gone when it is carried out: then it says what was so when it was sent. It is about a part of its own cut (which the whole-table
/// debts name), and of no other: its keys are other ones there.
pub(super) async fn step(
    pair: &mut Pair,
    part: &Part,
    done: Option<&Done>,
    next: Option<&Next<'_>>,
) -> Result<bool, Error> {
    let at = format!("WHERE number = {} AND part = {} AND debts = {}", part.number, part.part, list(&part.debts));
    let mut sql = String::from("BEGIN; SET LOCAL synchronous_commit = on;");
    if let Some(done) = done {
        sql += &done.keys.as_ref().map_or_else(String::new, KeyDebts::insertion);
        sql += &format!("{};", deletion(&[done.debt]));
        sql += &format!(
            "UPDATE crossfade.backfill SET position = {}, rows = rows + {}, work = NULL, work_key = NULL, changed = clock_timestamp() {at};",
            key(&done.last),
            done.rows
        );
    }
    sql += &next.map_or_else(
        || format!("UPDATE crossfade.backfill SET done = true, changed = clock_timestamp() {at};"),
        |next| taking(part, next, &at),
    );
    sql += "COMMIT";
    let answers = pair.authority.answered("keeping a position", pair.authority.client.simple_query(&sql)).await;
    let Ok(answers) = answers else {
        let _ = pair.authority.rollback().await;
        return answers.map(|_| false);
    };
    // The last two that are answered: the UPDATE, which changes a row only if the debt was entered, and COMMIT.
    let counts: Vec<u64> = answers
        .iter()
        .filter_map(|answer| match answer {
            SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
            _ => None,
        })
        .collect();
    Ok(counts.iter().rev().nth(1) == Some(&1))
}

fn taking(part: &Part, next: &Next<'_>, at: &str) -> String {
    let mut debt = BytesMut::new();
    let Bounds { after, upto } = next.bounds.clone();
    encode(&Debt::Range { table: part.number, after, upto }, &mut debt);
    let (pid, start) = next.backend;
    format!(
        "INSERT INTO crossfade.ledger (id, carrier_pid, carrier_start, debts, reason) SELECT {id}, {pid}, {start}, {debt}, 'backfill' \
         WHERE EXISTS (SELECT FROM crossfade.ledger WHERE id = ANY ({list}));\
         UPDATE crossfade.backfill SET work = {id}, work_key = {last} {at} AND EXISTS (SELECT FROM crossfade.ledger WHERE id = {id});",
        id = next.debt,
        debt = hex(&debt),
        list = list(&part.debts),
        last = key(&next.bounds.upto)
    )
}
