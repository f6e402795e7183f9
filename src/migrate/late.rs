//! A COMMIT on the mirror that does not come (C4): its proxy is frozen, or has lost the authority's answer to its own on a line that nobody sees end. The
//! transaction there would stay open, its debt in flight, and the gate of debts closed. It is ended, and what it brought is owed. docs/protocols.md says why
//! that is right whenever it happens.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::error::Error;
use super::link::At;
use super::payable::statuses;

/// Who carries what is owed for a while already. Only the oldest rows are looked at: others are soon among them, or their mirror is down.
const OLD: &str = "SELECT id, carrier_xid, carrier_pid, carrier_start FROM (SELECT * FROM crossfade.ledger ORDER BY id LIMIT 10000) l \
    WHERE carrier_xid IS NOT NULL AND carrier_pid IS NOT NULL AND carrier_incarnation::text = $1 AND at < clock_timestamp() - interval '500 ms'";

/// A proxy's session on the mirror, and no other, whatever the ledger says (any role may write there); and only while this very transaction waits for a message.
const END: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND application_name = 'crossfade mirror' \
    AND abs((extract(epoch FROM backend_start) * 1000000)::bigint - $2) <= 10 \
    AND wait_event = 'ClientRead' AND backend_xid::text = ($3 % 4294967296)::text";

/// No COMMIT on the mirror is taken for lost earlier: a proxy that is slow for a moment commits by itself.
const COMMITS: Duration = Duration::from_secs(3);

/// How long a COMMIT is awaited behind the authority's, with this `mirror.timeout`: its proxy may hold it back for half of that, until definitions are read
/// again.
pub fn commits(timeout: Duration) -> Duration {
    timeout.max(COMMITS)
}

/// Carriers whose COMMIT is awaited, by the ids of their ledger rows, and since when that was seen. By then the authority's has happened, since the row can be
/// read; the row's own time may be much earlier (a commit there waits for its standby).
#[derive(Debug, Default)]
pub struct Watch {
    awaited: HashMap<i64, Instant>,
}

impl Watch {
    /// Looks once. Those that were awaited for `commits` are ended; returns how many.
    pub async fn look(&mut self, authority: At<'_>, mirror: At<'_>, commits: Duration) -> Result<u64, Error> {
        let rows = mirror.rows("reading the incarnation", "SELECT crossfade.incarnate()::text", &[]).await?;
        let incarnation: String = rows[0].get(0);
        let rows = authority.rows("looking for carriers", OLD, &[&incarnation]).await?;
        let xids: Vec<i64> = rows.iter().map(|row| row.get(1)).collect();
        let status = statuses(mirror, &xids).await?;
        let now = Instant::now();
        let mut awaited = HashMap::new();
        let mut ended = 0;
        for row in &rows {
            let (id, xid, pid, start): (i64, i64, i32, Option<i64>) = (row.get(0), row.get(1), row.get(2), row.get(3));
            if status.get(&xid).is_none_or(|said| said != "in progress") {
                continue;
            }
            let since = *self.awaited.get(&id).unwrap_or(&now);
            awaited.insert(id, since);
            if now.duration_since(since) >= commits {
                let gone = mirror.rows("ending a carrier", END, &[&pid, &start.unwrap_or(0), &xid]).await?;
                ended += gone.len() as u64;
            }
        }
        self.awaited = awaited;
        if ended > 0 {
            tracing::warn!(
                side = %mirror.side,
                transactions = ended,
                "a proxy has not committed what the authority has: is it frozen, or cut off? Its transactions are ended, and what they brought is repaired"
            );
        }
        Ok(ended)
    }
}
