//! Which tables have rows that the mirror may lack, for those who would read there (R3).

use std::collections::HashSet;
use std::time::Duration;

use tokio_postgres::Client;

use super::error::Error;
use super::link::At;
use super::payable::statuses;
use crate::ledger::debts::{Debt, decode};
use crate::phase::Side;

/// Rows of the ledger that are looked through, at most.
const ROWS: i64 = 10_000;

/// How long one question may take: what is told later says nothing any more.
const PATIENCE: Duration = Duration::from_secs(1);

/// Every row but for its debts. A number of rows is in flight at any time: their debts are read only where they count.
const READ: &str = "SELECT id, carrier_xid, carrier_incarnation::text, (extract(epoch FROM clock_timestamp() - at) * 1000000)::bigint \
    FROM crossfade.ledger ORDER BY id LIMIT $1";

/// Tables that a proxy keeps from being served: it is adding to what is owed.
/// NULL: of an authority that may lack what it had acknowledged, or that nobody has looked at since a crash, nothing is read elsewhere.
const BLOCKED: &str = "SELECT number FROM crossfade.blocked WHERE until > clock_timestamp() UNION ALL SELECT NULL FROM crossfade.life \
    WHERE doubt IS NOT NULL OR incarnation IS DISTINCT FROM (SELECT id FROM crossfade.incarnation LIMIT 1)";

/// $2 in milliseconds. Two proxies may want the same tables.
const BLOCK: &str = "INSERT INTO crossfade.blocked AS b (number, until) \
    SELECT n, clock_timestamp() + $2 * interval '1 millisecond' FROM unnest($1::int[]) AS n ORDER BY n \
    ON CONFLICT (number) DO UPDATE SET until = greatest(b.until, excluded.until)";

/// Keeps these tables from being served by any proxy whose look begins behind this, until `stands` have passed since it was called. It must be durable: after a crash
/// of the authority its owner still counts on it. (`synchronous_commit` is the caller's to set.)
pub async fn block(authority: (Side, &Client), tables: &[u32], stands: Duration) -> Result<(), Error> {
    let (side, client) = authority;
    let tables: Vec<i32> = tables.iter().map(|number| *number as i32).collect();
    let at = At { side, client, patience: PATIENCE };
    at.rows("blocking tables", BLOCK, &[&tables, &(stands.as_millis() as f64)]).await.map(drop)
}

/// The tables, by number, that are blocked, and those of all debts but those whose mirror transaction has committed in this `incarnation` of the mirror, or is at work and younger than `stuck`.
/// None: there are too many, or one cannot be read: every table counts.
pub async fn owing(
    authority: &Client,
    mirror: (Side, &Client),
    incarnation: &str,
    stuck: Duration,
) -> Result<Option<HashSet<u32>>, Error> {
    let (side, mirror) = mirror;
    let authority = At { side: side.other(), client: authority, patience: PATIENCE };
    // Before the ledger: who finds that a block has ended finds the debts that were acknowledged under it.
    let blocked = authority.rows("reading what is blocked", BLOCKED, &[]).await?;
    let blocked: Option<HashSet<u32>> =
        blocked.iter().map(|row| row.get::<_, Option<i32>>(0).map(|number| number as u32)).collect();
    let Some(mut tables) = blocked else { return Ok(None) };
    let rows = authority.rows("reading the ledger", READ, &[&(ROWS + 1)]).await?;
    if rows.len() as i64 > ROWS {
        return Ok(None);
    }
    let carried = |row: &tokio_postgres::Row| {
        row.get::<_, Option<i64>>(1).filter(|_| row.get::<_, Option<&str>>(2) == Some(incarnation))
    };
    let xids: Vec<i64> = rows.iter().filter_map(carried).collect();
    let statuses = statuses(At { side, client: mirror, patience: PATIENCE }, &xids).await?;
    let stuck = stuck.as_micros() as i64;
    let counts = |row: &&tokio_postgres::Row| {
        let status = carried(row).and_then(|xid| statuses.get(&xid));
        match status.map(String::as_str) {
            Some("committed") => false,
            Some("in progress") => row.get::<_, i64>(3) >= stuck,
            _ => true,
        }
    };
    let ids: Vec<i64> = rows.iter().filter(counts).map(|row| row.get(0)).collect();
    if ids.is_empty() {
        return Ok(Some(tables));
    }
    let text = "SELECT debts FROM crossfade.ledger WHERE id = ANY ($1)";
    // One that has gone meanwhile was paid.
    for row in authority.rows("reading debts", text, &[&ids]).await? {
        let Ok(debts) = decode(row.get::<_, Vec<u8>>(0)) else { return Ok(None) };
        tables.extend(debts.iter().map(Debt::table));
    }
    Ok(Some(tables))
}
