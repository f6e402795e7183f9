//! Ending the transactions that a move cannot wait for: with `terminate` all that last longer than `move.pause`; without, those of a proxy that is frozen,
//! and the mirror's transactions that nobody finishes. A client whose transaction is ended is told 57P01 and may repeat it; nothing of it was committed.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;
use tracing::{debug, warn};

use super::gates::evidence::Eyes;
use super::{fleet, record};
use crate::phase::Side;

/// How long sessions that were ended have to be gone.
pub const ENDS: Duration = Duration::from_secs(2);

/// How often a move that waits looks for whom.
const LOOK: Duration = Duration::from_millis(250);

/// When the authority's lock is held and a transaction of the mirror still lasts so long, its proxy will not end it.
const LATE: Duration = Duration::from_secs(1);

/// History is written for so long at most: nobody waits for it.
const NOTED: Duration = Duration::from_secs(2);

/// What is done to those.
const SEEN: &str = "SELECT l.pid";
const ENDED: &str = "SELECT pg_catalog.pg_terminate_backend(l.pid)";

/// Those that hold the epoch's table ($1); $2: all of them, else those of proxies that are dead, cut off or frozen, and wait for these: the connection that
/// stands for such a proxy is gone, or has asked nothing for so long ($3; it asks four times a second, whatever its clients do), and the session has heard
/// nothing for as long. A proxy that is only slow still moves its sessions on. By that server's clock alone. (What the control role may not see of a
/// session does not count.)
const HOLDERS: &str = " FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid, \
    LATERAL (SELECT clock_timestamp() - $3::text::interval) AS silent(since) \
    WHERE l.locktype = 'relation' AND l.relation = pg_catalog.to_regclass($1) AND l.mode = 'AccessShareLock' AND l.granted \
    AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) \
    AND ($2 OR EXISTS (SELECT FROM crossfade.sessions s WHERE s.pid = a.pid AND s.start IS NOT DISTINCT FROM a.backend_start \
        AND a.backend_start < since AND coalesce(CASE WHEN a.state = 'active' \
            THEN a.wait_event_type IS NOT DISTINCT FROM 'Client' AND a.query_start < since ELSE a.state_change < since END, true) \
        AND NOT EXISTS (SELECT FROM crossfade.proxies p \
            JOIN pg_catalog.pg_stat_activity e ON e.pid = p.pid AND e.backend_start IS NOT DISTINCT FROM p.start \
            WHERE p.id = s.proxy AND coalesce(e.query_start > since, true))))";

/// On the mirror: transactions that carry images.
const CARRIERS: &str = " FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
    WHERE l.locktype = 'relation' AND l.relation = pg_catalog.to_regclass($1) AND l.mode = 'AccessShareLock' AND l.granted \
    AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) AND a.application_name = 'crossfade mirror'";

/// Sessions ($1) with a transaction.
const SESSIONS: &str = "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE pid = ANY ($1) AND xact_start IS NOT NULL";

/// For whom a move waits.
#[derive(Clone, Copy, Debug)]
pub struct Late {
    /// Of which epoch.
    pub epoch: u64,
    /// Until then transactions may end by themselves.
    pub deadline: Instant,
    /// Afterwards they are ended.
    pub terminate: bool,
    /// It is the mirror that is waited for: the authority's transactions are over, and what they owe stands in the ledger.
    pub mirror: bool,
}

/// Ends whom that finds, and says so first: whoever waits for them goes on as soon as they are gone.
async fn end(
    client: &Client,
    whom: &str,
    parameters: &[&(dyn ToSql + Sync)],
    (side, all): (Side, bool),
) -> Result<(), tokio_postgres::Error> {
    let found = client.query(&format!("{SEEN}{whom}"), parameters).await?;
    if !found.is_empty() {
        warn!(%side, sessions = found.len(), all, "transactions that the move cannot wait for are ended");
        client.query(&format!("{ENDED}{whom}"), parameters).await?;
    }
    Ok(())
}

impl Eyes {
    /// Ends the transactions of these sessions. Returns how many.
    pub async fn end_sessions(&self, side: Side, pids: &[i32]) -> usize {
        let Some(client) = self.on(side) else { return 0 };
        match client.query(SESSIONS, &[&pids]).await {
            Ok(rows) => rows.len(),
            Err(error) => {
                warn!(%side, %error, "sessions cannot be ended");
                0
            }
        }
    }

    /// While somebody waits for the epoch's lock: ends those that it must not wait for.
    pub async fn end_late(&self, side: Side, late: Late) -> Infallible {
        let Some(client) = self.on(side) else { return std::future::pending().await };
        let table = format!("crossfade.epoch_{}", late.epoch);
        let since = Instant::now();
        loop {
            let all = late.terminate && Instant::now() > late.deadline;
            let found = match late.mirror {
                true if since.elapsed() > LATE => end(client, CARRIERS, &[&table], (side, all)).await,
                true => Ok(()),
                false => end(client, HOLDERS, &[&table, &all, &fleet::SILENT], (side, all)).await,
            };
            if let Err(error) = found {
                debug!(%side, %error, "those that the move waits for cannot be seen");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Writes an entry of the history on that side, if it can be.
    pub async fn note(&self, side: Side, epoch: u64, event: &str, detail: &Value) {
        let Some(client) = self.on(side) else { return };
        let noted = tokio::time::timeout(NOTED, record::note(client, epoch, event, detail)).await;
        if !matches!(noted, Ok(Ok(()))) {
            warn!(%side, event, "the history could not be written");
        }
    }

    /// Adds to the history, on both sides if they can be reached, how long a move has held clients.
    pub async fn paused(&self, epoch: u64, pause: &record::Pause) {
        for client in Side::BOTH.into_iter().filter_map(|side| self.on(side)) {
            let noted = tokio::time::timeout(NOTED, record::paused(client, epoch, pause)).await;
            if !matches!(noted, Ok(Ok(()))) {
                debug!("the pause of a move could not be written down");
            }
        }
    }
}
