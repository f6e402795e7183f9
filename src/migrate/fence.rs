//! The fence (`fence: true`): writes that go around every proxy are kept out of the side that is not the authority.
//!
//! A trigger for statements on each migrating table and partition, on both sides, asks whether relation `crossfade.fenced` is there, and if so refuses. The
//! relation is made on the side that loses authority and dropped on the one that gains it, in the very transaction that writes the phase row
//! (`crossfade.fence_side`): so nothing is left by a mover that dies, no application's table is touched by a move, and whoever has an older snapshot is
//! refused all the same, since names are looked up as they are now. Where the side is the authority it costs a look-up in a cache for each statement.
//!
//! A server tells its sessions of a new relation a moment after others can read what was committed with it. So who moves locks the tables of the side that loses
//! authority (SHARE) from before that transaction's last look at debts to its end (`shut`): who then gets a lock has been told.
//!
//! A trigger stops superusers, COPY and TRUNCATE, too. Sessions of the mirror and of jobs are replicas (`session_replication_role`), for which an ordinary
//! trigger does not fire. So are those of logical replication: `crossfade check` names subscriptions that write migrating tables.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::error::Error;
use crate::ledger::FENCE;
use crate::phase::Side;

/// Its events and condition stand between the table's name and this.
const MAKE: &str = "FOR EACH STATEMENT WHEN (pg_catalog.to_regclass('crossfade.fenced') IS NOT NULL) EXECUTE FUNCTION crossfade.fence()";

/// A table's lock is waited for so long: writers wait behind who waits. Then again, so often, after a pause.
const LOCK: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_millis(300);
/// ... and while clients are held.
const AGAIN: Duration = Duration::from_millis(10);
const TRIES: u32 = 30;

/// Makes the triggers that are missing on these tables (their OIDs on that side, with their partitions'). Returns how many were made. Schema crossfade is there.
pub async fn raise(client: &Client, side: Side, tables: &[u32]) -> Result<u64, Error> {
    let text = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        WHERE c.oid = ANY ($1) AND c.relkind IN ('r', 'p') \
        AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = $2) ORDER BY 1";
    let missing = names(client, side, text, &[&tables, &FENCE]).await?;
    for table in &missing {
        let make = format!("CREATE TRIGGER {FENCE} BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON {table} {MAKE}");
        match alter(client, side, table, &make).await {
            // Another proxy of the fleet was first.
            Err(Error::Server { code: SqlState::DUPLICATE_OBJECT, .. }) => {}
            Err(Error::Server { code: SqlState::INSUFFICIENT_PRIVILEGE, message, .. }) => {
                return Err(Error::Unfit(format!(
                    "{side}: no fence can be made on {table}: {message}; `crossfade check` prints the GRANT that the control role needs, or set fence: false"
                )));
            }
            made => made?,
        }
    }
    Ok(missing.len() as u64)
}

/// The side is closed or open as it must be in this epoch; who moves sees to it himself. Returns nothing: where a later epoch holds already, its mover has.
pub async fn stand(client: &Client, side: Side, epoch: u64, authority: Side) -> Result<(), Error> {
    let closed = client.execute("SELECT crossfade.fence_side($1, $2)", &[&(epoch as i64), &(side != authority)]).await;
    closed.map(drop).map_err(|error| Error::from_driver(side, "raising the fence", &error))
}

/// Keeps whoever writes around the proxies from these tables (their OIDs on that side) until the client's open transaction ends, in which the fence goes up. So nobody
/// writes who has asked for the fence before it was up: that it is there, a server tells its sessions a moment after its row can be read.
/// Waits until `deadline` for those who are writing, and never for long at once.
pub async fn shut(client: &Client, side: Side, tables: &[u32], deadline: Instant) -> Result<(), Error> {
    // With a table its partitions are locked.
    let text = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        WHERE c.oid = ANY ($1) AND c.relkind IN ('r', 'p') AND NOT c.relispartition ORDER BY 1";
    let tables = names(client, side, text, &[&tables]).await?.join(", ");
    if tables.is_empty() {
        return Ok(());
    }
    let failed = |error: tokio_postgres::Error| Error::from_driver(side, "locking tables", &error);
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis().max(1);
        let text = format!(
            "SAVEPOINT shut; SET LOCAL lock_timeout = {}; LOCK TABLE {tables} IN SHARE MODE; SET LOCAL lock_timeout = {left}; RELEASE shut",
            LOCK.as_millis()
        );
        let Err(error) = client.batch_execute(&text).await else { return Ok(()) };
        if error.code() != Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return Err(failed(error));
        }
        client.batch_execute("ROLLBACK TO shut; RELEASE shut").await.map_err(failed)?;
        if Instant::now() > deadline {
            return Err(Error::Deadline(format!(
                "{side}: tables are written around the proxies all the time, and could not be closed within move.pause"
            )));
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Takes all triggers of the fence away. Returns how many there were.
pub async fn lower(client: &Client, side: Side) -> Result<u64, Error> {
    let text = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid \
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE t.tgname = $1 AND t.tgfoid = pg_catalog.to_regproc('crossfade.fence') ORDER BY 1";
    let there = names(client, side, text, &[&FENCE]).await?;
    for table in &there {
        let dropped = alter(client, side, table, &format!("DROP TRIGGER IF EXISTS {FENCE} ON {table}")).await;
        match dropped {
            // A trigger may be made by who does not own its table, and be dropped by him with its function only.
            Err(Error::Server { code: SqlState::INSUFFICIENT_PRIVILEGE, .. }) => {
                alter(client, side, table, "DROP FUNCTION crossfade.fence() CASCADE").await?;
                super::install(client, side).await?;
                break;
            }
            dropped => dropped?,
        }
    }
    Ok(there.len() as u64)
}

async fn names(
    client: &Client,
    side: Side,
    text: &str,
    parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
) -> Result<Vec<String>, Error> {
    let rows = client.query(text, parameters).await;
    let rows = rows.map_err(|error| Error::from_driver(side, "looking for the fence", &error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// One statement that wants a table's lock, which nobody waits for long behind.
async fn alter(client: &Client, side: Side, table: &str, sql: &str) -> Result<(), Error> {
    let text = format!(
        "BEGIN; SET LOCAL client_min_messages = error; SET LOCAL lock_timeout = {}; {sql}; COMMIT",
        LOCK.as_millis()
    );
    for _ in 0..TRIES {
        let Err(error) = client.batch_execute(&text).await else { return Ok(()) };
        let _ = client.batch_execute("ROLLBACK").await;
        if error.code() != Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return Err(Error::from_driver(side, "changing the fence", &error));
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(Error::Deadline(format!(
        "{side}: {table} is written or locked all the time: its trigger {FENCE} could not be changed; try again when it is quieter"
    )))
}
