//! Behind the authority's COMMIT: the mirror's, for which nobody waits.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tracing::{debug, error, warn};

use crate::clock::{Clock, Late};
use crate::ledger::owe::OWE;
use crate::mirror::conn::Carrier;
use crate::mirror::pool::Lease;
use crate::phase::Side;
use crate::shared::{Paid, Shared};

/// The authority has committed: so does the mirror. Nobody waits; the debt is cleared after the next flush there.
/// `owed`: debts that the authority on that side has not been told of. True: it was answered.
pub(super) async fn commit_mirror(
    shared: std::sync::Arc<Shared>,
    clock: Clock,
    mut lease: Box<Lease>,
    (carrier, id): (Carrier, i64),
    owed: Option<(Side, Bytes)>,
) -> bool {
    let timeout = shared.config.load().mirror.timeout.max(Duration::from_secs(10));
    let redefined = lease.conn.redefined;
    let commit = async {
        lease.conn.send_commit().await?;
        lease.conn.committed().await
    };
    let committed = clock.limit(timeout, commit).await;
    if !matches!(committed, Ok(Ok(())))
        && let Some((side, debts)) = owed
    {
        owe_afterwards(&shared, side, (carrier, id), &debts).await;
    }
    let answered = matches!(committed, Ok(Ok(())));
    match committed {
        Ok(Ok(())) => {
            shared.paid.push(Paid { id, incarnation: carrier.backend.incarnation });
            lease.release();
        }
        Ok(Err(failure)) => {
            debug!(error = %failure, "COMMIT on the mirror failed; its debt stays");
            shared.owed.notify_one();
        }
        Err(Late) => {
            debug!("COMMIT on the mirror was not answered; its debt stays");
            shared.owed.notify_one();
        }
    }
    if redefined {
        shared.stale.notify_one();
    }
    // Last: whoever sees that nothing is carried finds the debt in the queue.
    shared.paid.carrying.fetch_sub(1, Ordering::SeqCst);
    answered
}

/// `best-effort`: the authority has committed, and the mirror has not. The debts come late; a proxy that dies before them leaves rows that differ.
async fn owe_afterwards(shared: &Shared, side: Side, (carrier, id): (Carrier, i64), debts: &[u8]) {
    let config = shared.config.load_full();
    let backend = carrier.backend;
    let written = async {
        let ledger =
            Shared::database(&config, side).connect("crossfade owes").await.map_err(|error| error.to_string())?;
        let owe = OWE.replace("$5", "pg_catalog.encode($5::bytea, 'hex')::uuid");
        let incarnation = &backend.incarnation[..];
        ledger
            .execute(
                &owe,
                &[
                    &id,
                    &carrier.xid,
                    &backend.pid,
                    &backend.start,
                    &incarnation,
                    &debts,
                    &None::<&str>,
                    &None::<i64>,
                    &None::<&[u8]>,
                ],
            )
            .await
            .map_err(|error| error.to_string())
    };
    match written.await {
        Ok(_) => warn!(
            debt = id,
            "COMMIT on the mirror failed after the authority had committed (best-effort); its rows are owed now"
        ),
        Err(error) => error!(
            debt = id,
            %error,
            "COMMIT on the mirror failed and its debts could not be written: rows may differ. Moving back to `old` and to `dual-write` again compares every row; a table without a key is copied by `crossfade repair --table NAME`"
        ),
    }
}
