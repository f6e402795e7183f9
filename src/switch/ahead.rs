//! Before the authority changes, with nobody held: every session of every proxy logs in to the other side beforehand, and so do the sessions that will mirror.
//! Held clients then wait for no login. Nothing depends on it: whoever has not logged in when the move is made does so then.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tracing::debug;

use crate::phase::Side;
use crate::shared::Shared;

/// How long a move waits for logins, at most.
const WAITS: Duration = Duration::from_millis(1500);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(20);

/// What is known in this process.
#[derive(Debug, Default)]
pub struct Ahead {
    /// 0: no authority is about to change; else to which side.
    side: AtomicU8,
    /// Sessions that have tried to log in there.
    tried: AtomicI64,
}

impl Ahead {
    /// The side that is about to be authority.
    pub fn side(&self) -> Option<Side> {
        match self.side.load(Ordering::Relaxed) {
            1 => Some(Side::Old),
            2 => Some(Side::New),
            _ => None,
        }
    }

    fn set(&self, side: Option<Side>) {
        let number = side.map_or(0, |side| if side == Side::Old { 1 } else { 2 });
        self.side.store(number, Ordering::Relaxed);
    }

    /// One session has tried, whatever came of it, until what is returned is dropped.
    pub fn count(shared: &Arc<Shared>) -> Tried {
        shared.ahead.tried.fetch_add(1, Ordering::Relaxed);
        Tried(shared.clone())
    }
}

/// A session among those that have tried.
pub struct Tried(Arc<Shared>);

impl Drop for Tried {
    fn drop(&mut self) {
        self.0.ahead.tried.fetch_sub(1, Ordering::Relaxed);
    }
}

/// This process has heard of it, or that it is over.
pub fn hear(shared: &Arc<Shared>, side: Option<Side>) {
    if shared.ahead.side() == side {
        return;
    }
    shared.ahead.set(side);
    shared.call();
    if let Some(side) = side {
        // Beside whoever has heard: a server that does not answer holds nobody up.
        let shared = shared.clone();
        tokio::spawn(async move {
            if let Err(error) = shared.registry.ready(&shared.config.load_full(), side).await {
                debug!(%side, %error, "sessions cannot be entered there yet");
            }
        });
    }
}

/// All clients' sessions have tried. One in a long transaction has not, nor has one that takes no part.
pub fn all_have_tried(shared: &Shared) -> bool {
    shared.ahead.tried.load(Ordering::Relaxed) >= shared.metrics.clients.get()
}

/// Says so to other proxies, by this connection to the authority, and waits until their sessions and ours have logged in.
pub async fn announce(
    shared: &Arc<Shared>,
    (authority, epoch): (&Client, u64),
    gains: Side,
) -> Result<(), tokio_postgres::Error> {
    let sql = "INSERT INTO crossfade.coming (epoch, side, pid, start, proxy) \
        SELECT $1, $2, pid, backend_start, $3 FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid() \
        ON CONFLICT (one) DO UPDATE SET epoch = excluded.epoch, side = excluded.side, pid = excluded.pid, start = excluded.start, proxy = excluded.proxy";
    let (me, epoch) = (shared.registry.id(), epoch as i64);
    // What proxies have said before was about a move that was given up.
    authority.execute("UPDATE crossfade.proxies SET ready = NULL WHERE ready IS NOT NULL", &[]).await?;
    authority.execute(sql, &[&epoch, &gains.name(), &me]).await?;
    let until = Instant::now() + WAITS;
    hear(shared, Some(gains));
    let sql = "SELECT count(*) FROM crossfade.proxies p JOIN pg_catalog.pg_stat_activity a ON a.pid = p.pid AND a.backend_start IS NOT DISTINCT FROM p.start \
        WHERE p.id <> $1 AND p.ready IS DISTINCT FROM $2 AND a.query_start > clock_timestamp() - $3::text::interval";
    while Instant::now() < until {
        let others: i64 = authority.query_one(sql, &[&me, &epoch, &super::fleet::SILENT]).await?.get(0);
        if others == 0 && all_have_tried(shared) {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// The move is over, or was given up.
pub async fn over(shared: &Arc<Shared>, losing: Option<&Client>) {
    hear(shared, None);
    if let Some(client) = losing {
        let sql = "DELETE FROM crossfade.coming WHERE proxy = $1";
        if let Err(error) = client.execute(sql, &[&shared.registry.id()]).await {
            // With its connection it means nothing.
            debug!(%error, "what was said of the move that comes was not taken back");
        }
    }
}
