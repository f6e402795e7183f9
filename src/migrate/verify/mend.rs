//! What is done about what was found: written down, and repaired where that was asked for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::super::copy;
use super::super::error::{Error, Meaning};
use super::super::link::{Pair, Settings};
use super::super::repair::Repair;
use super::{Found, Going, How, Job, NAME, Runner, Verify, keyless, look, position, settle};
use crate::catalog::Table;
use crate::ledger::debts::{Debt, Values, encode};

/// How long debts that were entered here may take to be paid.
const PAID: Duration = Duration::from_secs(60);
/// Before what was found is tried to be written down again, while somebody moves.
const AGAIN: Duration = Duration::from_millis(200);
/// Keys that the history names.
const NAMED: usize = 1000;

/// What is known of a table: `crossfade.verified`.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    /// Epoch of the last look.
    pub epoch: i64,
    /// Seconds since 1970 of its end.
    pub at: f64,
    /// Rows that it compared.
    pub rows: i64,
    /// Rows that differed.
    pub different: i64,
    /// Epoch, and seconds since 1970, of the last look that found all equal.
    pub equal: Option<(i64, f64)>,
    /// Nothing of the table was owed since that look began.
    pub still: bool,
}

/// What is known of each table, by its number. Nothing where schema crossfade does not have it yet.
pub async fn standing(authority: &Client) -> Result<BTreeMap<u32, Standing>, tokio_postgres::Error> {
    let text = "SELECT v.number, v.epoch, extract(epoch FROM v.at)::float8, v.rows, v.different, v.equal_epoch, extract(epoch FROM v.equal_at)::float8, \
        coalesce(v.equal_owings = coalesce(o.times, 0), false) FROM crossfade.verified v LEFT JOIN crossfade.owings o USING (number)";
    let rows = authority.query_typed(text, &[]).await?;
    let standing = |row: &tokio_postgres::Row| Standing {
        epoch: row.get(1),
        at: row.get(2),
        rows: row.get(3),
        different: row.get(4),
        equal: row.get::<_, Option<i64>>(5).zip(row.get(6)),
        still: row.get(7),
    };
    Ok(rows.iter().map(|row| (row.get::<_, i32>(0) as u32, standing(row))).collect())
}

/// How often debts of the table were owed and paid so far: to be read before it is compared.
pub(super) async fn owings(pair: &mut Pair, table: &Table) -> Result<i64, Error> {
    let text = "SELECT coalesce((SELECT times FROM crossfade.owings WHERE number = $1), 0)";
    Ok(pair.authority.rows("reading what was owed", text, &[&(table.number as i32)]).await?[0].get(0))
}

/// Writes down what was found by a look that began when debts of the table had been owed so often (`owings`). False: another number of rows differs than
/// when it was written down last. In the epoch of the look only: what moves made void stays so.
pub(super) async fn record(
    pair: &mut Pair,
    table: &Table,
    job: &Job<'_>,
    owings: i64,
    found: &Found,
) -> Result<bool, Error> {
    let begun = Instant::now();
    loop {
        let recorded = record_once(pair, table, job, owings, found).await;
        let Err(error) = recorded else { return recorded };
        pair.abandon().await;
        match error {
            // The epoch is over.
            Error::Server { code, .. } if code == SqlState::UNDEFINED_TABLE => return Ok(true),
            // Whoever moves has its lock, and may give it back.
            error if error.meaning() == Meaning::Busy && begun.elapsed() < pair.settings.settle => {
                tokio::time::sleep(AGAIN).await;
            }
            error => return Err(error),
        }
    }
}

async fn record_once(pair: &mut Pair, table: &Table, job: &Job<'_>, owings: i64, found: &Found) -> Result<bool, Error> {
    let epoch = job.verify.epoch;
    let begin =
        format!("BEGIN; SET LOCAL synchronous_commit = on; LOCK TABLE crossfade.epoch_{epoch} IN ACCESS SHARE MODE");
    pair.authority.batch("writing down", &begin).await?;
    let different = (found.rows_different() - found.repaired.min(found.rows_different())) as i64;
    let (number, epoch, rows, label) = (table.number as i32, epoch as i64, found.rows as i64, table.label());
    let text = "SELECT coalesce((SELECT different FROM crossfade.verified WHERE number = $1), 0) = $2";
    let known: bool = pair.authority.rows("writing down", text, &[&number, &different]).await?[0].get(0);
    if !known && job.runner == Runner::Proxy {
        let text = "INSERT INTO crossfade.history (epoch, event, detail) VALUES ($1, 'verify', \
            jsonb_build_object('who', 'verify.continuous', 'table', $2::text, 'different', $3::bigint, 'rows', $4::bigint))";
        pair.authority.execute("writing down", text, &[&epoch, &label, &different, &rows]).await?;
    }
    let text = "INSERT INTO crossfade.verified AS v (number, epoch, rows, different, unsettled, equal_epoch, equal_at, equal_owings) \
        VALUES ($1, $2::bigint, $3, $4, $5, CASE WHEN $6::boolean THEN $2::bigint END, CASE WHEN $6::boolean THEN clock_timestamp() END, \
        CASE WHEN $6::boolean THEN $7::bigint END) \
        ON CONFLICT (number) DO UPDATE SET epoch = excluded.epoch, at = clock_timestamp(), rows = excluded.rows, different = excluded.different, \
        unsettled = excluded.unsettled, equal_epoch = coalesce(excluded.equal_epoch, v.equal_epoch), equal_at = coalesce(excluded.equal_at, v.equal_at), \
        equal_owings = CASE WHEN $6::boolean THEN $7::bigint WHEN $4 > 0 THEN NULL ELSE v.equal_owings END";
    let unsettled = (found.owed + found.covered + found.busy) as i64 + i64::from(found.unseen.is_some());
    pair.authority
        .execute("writing down", text, &[&number, &epoch, &rows, &different, &unsettled, &found.is_equal(), &owings])
        .await?;
    match job.runner {
        Runner::Command if found.is_equal() => position::over(pair, table, job.since(owings), found.rows).await?,
        Runner::Command => {}
        Runner::Proxy => position::forget(pair, &[table.number], job.runner).await?,
    }
    pair.authority.commit("writing down").await?;
    Ok(known)
}

/// Has what differs made equal, and looks again. What a look that shows all as equal began behind is returned: how often something of the table had been owed.
pub(super) async fn repair(
    verify: &Verify,
    pair: &mut Pair,
    table: &Table,
    (id, owings): (i64, i64),
    found: &mut Found,
    going: &mut Going<'_>,
) -> Result<i64, Error> {
    if table.key.is_some() {
        pay(verify, pair, table, id, found).await?;
        return Ok(owings);
    }
    let copied = copy::locked(pair, &verify.catalog, table).await?;
    let text = "INSERT INTO crossfade.history (epoch, event, detail) VALUES ($1, 'verify', \
        jsonb_build_object('table', $2::text, 'repaired', $3::bigint, 'copied', $4::bigint))";
    let (epoch, different, copied) = (verify.epoch as i64, found.rows_different() as i64, copied as i64);
    pair.authority.execute("writing down", text, &[&epoch, &table.label(), &different, &copied]).await?;
    let owings = self::owings(pair, table).await?;
    let same_encoding = look::same_encoding(pair).await?;
    let again = keyless::compare(pair, table, same_encoding, going).await?;
    match again.is_equal() {
        true => found.mended(),
        false => *found = again,
    }
    Ok(owings)
}

/// Enters what differs as debts, under ledger number `id`, waits until they are paid, and looks again (D1: data is changed by paying debts only).
async fn pay(verify: &Verify, pair: &mut Pair, table: &Table, id: i64, found: &mut Found) -> Result<(), Error> {
    let keys: Vec<Values> = found.different.iter().map(|difference| difference.key.clone()).collect();
    let mut debts = BytesMut::new();
    for key in &keys {
        encode(&Debt::Key { table: table.number, key: key.clone() }, &mut debts);
    }
    let named: Vec<String> = found.different.iter().take(NAMED).map(|difference| difference.shown.join(", ")).collect();
    let text = "WITH owed AS (INSERT INTO crossfade.ledger (id, debts, reason) VALUES ($1, $2, 'verify')) \
        INSERT INTO crossfade.history (epoch, event, detail) VALUES ($3, 'verify', jsonb_build_object('table', $4::text, 'repaired', $5::bigint, 'keys', $6::text[]))";
    pair.authority.batch("entering debts", "SET synchronous_commit = on").await?;
    let (count, epoch, label) = (keys.len() as i64, verify.epoch as i64, table.label());
    pair.authority.execute("entering debts", text, &[&id, &&debts[..], &epoch, &label, &count, &named]).await?;
    let settings = Settings { patience: pair.settings.patience, ..Settings::default() };
    let sides = (&verify.authority, &verify.mirror);
    let mut worker =
        Repair::new(Pair::open(verify.authority_side, sides, NAME, settings).await?, verify.catalog.clone());
    let begun = Instant::now();
    // Perhaps the proxy's own repair pays it first.
    while owed(pair, id).await? && begun.elapsed() < PAID {
        worker.pass().await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    pair.authority.batch("looking again", look::SETTINGS).await?;
    let mut again = Found::default();
    settle::suspects(pair, table, keys, &mut again).await?;
    let still = |key: &Values| again.different.iter().any(|difference| difference.key == *key);
    let mended = found.different.iter().filter(|difference| !still(&difference.key)).count() as u64;
    found.repaired = mended.saturating_sub(again.busy + again.covered + again.owed);
    Ok(())
}

async fn owed(pair: &mut Pair, id: i64) -> Result<bool, Error> {
    let text = "SELECT EXISTS (SELECT FROM crossfade.ledger WHERE id = $1)";
    Ok(pair.authority.rows("reading the ledger", text, &[&id]).await?[0].get(0))
}

impl How {
    /// For people.
    pub fn told(&self, mirror: crate::phase::Side) -> String {
        match self {
            How::Missing => format!("missing on {mirror}"),
            How::Extra => format!("on {mirror} only"),
            How::Columns(columns) => format!("{} differ", columns.join(", ")),
            How::Count(counts) => format!("{} on old, {} on new", counts.old, counts.new),
        }
    }
}
