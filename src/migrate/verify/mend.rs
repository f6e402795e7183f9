//! What is done about what was found: written down, and repaired where that was asked for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio_postgres::Client;

use super::super::error::Error;
use super::super::link::{Pair, Settings};
use super::super::repair::Repair;
use super::{Found, How, Verify, look, settle};
use crate::catalog::Table;
use crate::ledger::debts::{Debt, Values, encode};

/// How long debts that were entered here may take to be paid.
const PAID: Duration = Duration::from_secs(60);
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
    let rows = authority.query(text, &[]).await?;
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

/// Writes down what was found by a look that began when debts of the table had been owed so often (`owings`).
pub(super) async fn record(
    pair: &mut Pair,
    table: &Table,
    epoch: u64,
    owings: i64,
    found: &Found,
) -> Result<(), Error> {
    let text = "INSERT INTO crossfade.verified AS v (number, epoch, rows, different, unsettled, equal_epoch, equal_at, equal_owings) \
        VALUES ($1, $2::bigint, $3, $4, $5, CASE WHEN $6::boolean THEN $2::bigint END, CASE WHEN $6::boolean THEN clock_timestamp() END, \
        CASE WHEN $6::boolean THEN $7::bigint END) \
        ON CONFLICT (number) DO UPDATE SET epoch = excluded.epoch, at = clock_timestamp(), rows = excluded.rows, different = excluded.different, \
        unsettled = excluded.unsettled, equal_epoch = coalesce(excluded.equal_epoch, v.equal_epoch), equal_at = coalesce(excluded.equal_at, v.equal_at), \
        equal_owings = CASE WHEN $6::boolean THEN $7::bigint WHEN $4 > 0 THEN NULL ELSE v.equal_owings END";
    let different = found.different.len() as i64 - found.repaired as i64;
    let unsettled = (found.owed + found.covered + found.busy) as i64;
    let (number, epoch, rows) = (table.number as i32, epoch as i64, found.rows as i64);
    pair.authority
        .execute("writing down", text, &[&number, &epoch, &rows, &different, &unsettled, &found.is_equal(), &owings])
        .await?;
    Ok(())
}

/// Enters what differs as debts, under ledger number `id`, waits until they are paid, and looks again (D1: data is changed by paying debts only).
pub(super) async fn repair(
    verify: &Verify,
    pair: &mut Pair,
    table: &Table,
    id: i64,
    found: &mut Found,
) -> Result<(), Error> {
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
    let connect = async |database: &crate::config::Database, side| {
        let connected = database.connect("crossfade verify").await;
        connected.map_err(|error| Error::Broken { side, doing: "connecting", message: error.to_string() })
    };
    let side = verify.authority_side;
    let (first, second) = (connect(&verify.authority, side).await?, connect(&verify.mirror, side.other()).await?);
    let mut worker = Repair::new(Pair::new(side, first, second, settings).await?, verify.catalog.clone());
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
        }
    }
}
