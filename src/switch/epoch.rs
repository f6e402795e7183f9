//! The epoch as a lock in the databases: a table on each side in each phase with a mirror. Whoever may write holds it shared, on the authority from
//! the transaction's BEGIN on, and on the mirror in the transaction that carries the images; whoever moves takes it alone, first there, then here.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::mover::MoveError;
use super::rows::{self, Holds, RowError};
use crate::phase::Side;

/// A mover that has written its rows and does not commit them within this time (milliseconds) is frozen, or cut off.
const FROZEN_MS: u64 = 10_000;

/// Begins a move on the side that is authority: nobody else moves until this connection's transaction ends. Its row must still be of `epoch`, and while
/// writes are mirrored say what this proxy's file says (`definition`).
pub async fn begin(authority: &Client, side: Side, epoch: u64, definition: Option<&str>) -> Result<(), MoveError> {
    let sql = "BEGIN; LOCK TABLE crossfade.migration IN SHARE ROW EXCLUSIVE MODE NOWAIT";
    if let Err(error) = authority.batch_execute(sql).await {
        if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return Err(MoveError::Closed(format!(
                "another proxy is moving this migration; it holds the phase row on {side}. Look at its status"
            )));
        }
        return Err(error.into());
    }
    let holds = rows::read(authority, side).await?;
    let found = holds.map_or(0, |holds| holds.epoch);
    if found != epoch {
        return Err(MoveError::Overtaken { epoch: found });
    }
    match definition {
        Some(definition) => same(authority, side, definition).await,
        None => Ok(()),
    }
}

/// While writes are mirrored what migrates stays what it is: a proxy of another file would not mirror the same tables.
pub async fn same(authority: &Client, side: Side, definition: &str) -> Result<(), MoveError> {
    let Some(known) = rows::definition(authority, side).await? else { return Ok(()) };
    if known == definition {
        return Ok(());
    }
    let differs = |a: &str, b: &str| a.lines().find(|line| !b.lines().any(|other| other == *line)).map(str::to_owned);
    Err(MoveError::Closed(format!(
        "this file defines other tables than the migration has: {}. Clients are not served by it; make `tables` and `except` the same in all files, or go back to old first",
        match (differs(definition, &known), differs(&known, definition)) {
            (Some(ours), _) => format!("here is {ours:?}"),
            (None, Some(theirs)) => format!("there is {theirs:?}"),
            (None, None) => "in another order".to_owned(),
        }
    )))
}

/// Waits until no transaction of this epoch is left on that side, and lets none begin; for as long as `patience`. In the transaction that `begin` opened,
/// or in a new one. `pause`: what the operator has allowed, for the message.
pub async fn close(
    client: &Client,
    side: Side,
    epoch: u64,
    patience: Duration,
    pause: Duration,
) -> Result<(), MoveError> {
    client.batch_execute(&format!("BEGIN; SET LOCAL lock_timeout = {}", patience.as_millis().max(1))).await?;
    let there = client
        .query_one("SELECT pg_catalog.to_regclass($1) IS NOT NULL", &[&format!("crossfade.epoch_{epoch}")])
        .await?;
    if !there.get::<_, bool>(0) {
        return Ok(());
    }
    let lock = format!("LOCK TABLE crossfade.epoch_{epoch} IN ACCESS EXCLUSIVE MODE");
    match client.batch_execute(&lock).await {
        // What follows in this transaction waits for no more than the pause.
        Ok(()) => Ok(client.batch_execute(&format!("SET LOCAL lock_timeout = {}", pause.as_millis().max(1))).await?),
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Err(MoveError::Held(format!(
            "transactions that other proxies began on {side} have not ended within move.pause ({pause:?}); clients were released"
        ))),
        Err(error) => Err(error.into()),
    }
}

/// Asks once, within whatever transaction is open, for what a move asks with clients held: the server then has at hand what it needs for it.
pub async fn warm(client: &Client, epoch: u64) -> Result<(), tokio_postgres::Error> {
    let sql = format!("SELECT crossfade.close_epochs(0); SELECT crossfade.open_epoch({epoch})");
    client.batch_execute(&sql).await
}

/// The row of a later epoch, its table, and the end of all epochs before it; the fence goes up where the side is not the authority: in one transaction.
pub async fn turn(
    client: &Client,
    side: Side,
    name: (&str, Option<&str>),
    holds: Holds,
    event: (&str, &serde_json::Value),
) -> Result<(), RowError> {
    prepare(client, side, name, holds, event).await?;
    commit(client, side).await
}

/// All of it but the COMMIT. The server ends the transaction of a mover that goes no further.
pub async fn prepare(
    client: &Client,
    side: Side,
    name: (&str, Option<&str>),
    holds: Holds,
    event: (&str, &serde_json::Value),
) -> Result<(), RowError> {
    let failed = |error| RowError::Database { side, error };
    // One that `begin` or `close` has opened goes on.
    let begin = format!(
        "BEGIN; SET LOCAL synchronous_commit = on; SET LOCAL idle_in_transaction_session_timeout = {FROZEN_MS}"
    );
    client.batch_execute(&begin).await.map_err(failed)?;
    rows::write(client, side, name, holds, event).await?;
    let epoch = holds.epoch;
    let open =
        if holds.phase.mirror().is_some() { format!("SELECT crossfade.open_epoch({epoch});") } else { String::new() };
    let fence = format!("SELECT crossfade.fence_side({epoch}, {});", holds.phase.authority() != side);
    let turned = format!("SELECT crossfade.close_epochs({epoch}); {open} {fence}");
    client.batch_execute(&turned).await.map_err(failed)
}

/// From here on it holds.
pub async fn commit(client: &Client, side: Side) -> Result<(), RowError> {
    client.batch_execute("COMMIT").await.map_err(|error| RowError::Database { side, error })
}

/// Transactions that hold an epoch's lock for long and are no client's of a proxy: a dump, say. They would hold everybody up.
pub async fn foreign_holder(client: &Client, epoch: u64, ours: &[i32]) -> Result<Option<String>, MoveError> {
    let sql = "SELECT l.pid, coalesce(a.application_name, '') FROM pg_catalog.pg_locks l \
        JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
        WHERE l.locktype = 'relation' AND l.relation = pg_catalog.to_regclass($1) AND l.granted AND l.pid <> ALL ($2) \
        AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) \
        AND (a.application_name IN ('pg_dump', 'pg_dumpall', 'pg_basebackup') \
            OR EXISTS (SELECT FROM pg_catalog.pg_locks x WHERE x.pid = l.pid AND x.locktype = 'relation' AND x.granted \
                AND x.database = l.database AND x.relation = pg_catalog.to_regclass('crossfade.history'))) LIMIT 1";
    let row = client.query_opt(sql, &[&format!("crossfade.epoch_{epoch}"), &ours]).await?;
    Ok(row.map(|row| format!("backend {} ({})", row.get::<_, i32>(0), row.get::<_, String>(1))))
}
