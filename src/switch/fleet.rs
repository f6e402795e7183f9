//! Several proxies: who they are, which server sessions are theirs, and how those that take no lock are brought to a stop.
//!
//! In a phase without a mirror a transaction pays nothing, and so holds no lock of any epoch. Whoever leaves such a phase announces it; each proxy holds
//! its clients' next transactions, lets those under way end, and says that it is still. Sessions of a proxy that does not hear are terminated. Each server
//! session is entered here before its first transaction, under a lock that the mover takes exclusively: one that comes later learns the new epoch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Statement};
use tracing::{debug, warn};

use super::mover::MoveError;
use crate::catalog::Sides;
use crate::config::Config;
use crate::phase::{Phase, Side};
use crate::shared::Shared;

/// A proxy looks four times a second. One that has not for so long, by the clock of the server that it looks at, is frozen, cut off or dead.
pub const SILENT: &str = "3 seconds";

/// One that has looked within this time hears of a move.
const AWAKE: &str = "1 second";

/// How long a move waits, with nobody held, for proxies of which it is not known yet whether they are awake or silent.
const WAKES: Duration = Duration::from_secs(6);

/// How long the others of a fleet are waited for, at least.
const HEARS: Duration = Duration::from_secs(4);

/// Other proxies release their clients at the end of `move.pause`; their transactions are ended so long before.
const BEFORE: Duration = Duration::from_millis(250);

/// How often the mover looks who is still.
const LOOK: Duration = Duration::from_millis(20);

/// A server session of this proxy: its backend ($1), this proxy ($2). Returns the epoch that holds once it stands there.
const ENTER: &str = "INSERT INTO crossfade.sessions AS s (pid, start, proxy) \
    SELECT pid, backend_start, $2 FROM pg_catalog.pg_stat_activity WHERE pid = $1 \
    ON CONFLICT (pid) DO UPDATE SET start = excluded.start, proxy = excluded.proxy \
    RETURNING coalesce((SELECT epoch FROM crossfade.migration), 0)";

/// This proxy among others.
#[derive(Default)]
pub struct Registry {
    /// Random, of this process.
    id: String,
    open: Sides<tokio::sync::Mutex<Option<Enters>>>,
}

/// A connection, and the statement that enters a session.
type Enters = (Arc<Client>, Statement);

impl Registry {
    /// Of a process that has just begun.
    pub fn new() -> Registry {
        Registry { id: format!("{:032x}", rand::random::<u128>()), open: Sides::default() }
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Enters a server session, before its first transaction. Gives the epoch that holds; None: no schema is installed there, so that nobody can move.
    pub async fn enter(&self, config: &Config, side: Side, pid: i32) -> Result<Option<u64>, String> {
        let Some((client, statement)) = self.ready(config, side).await? else { return Ok(None) };
        match client.query_opt(&statement, &[&pid, &self.id]).await {
            Ok(row) => Ok(row.map(|row| row.get::<_, i64>(0) as u64)),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The connection by which sessions are entered on that side: one, however many ask for it at once. None: no schema is installed there.
    pub async fn ready(&self, config: &Config, side: Side) -> Result<Option<Enters>, String> {
        let mut open = self.open.get(side).lock().await;
        if let Some((client, statement)) = open.as_ref().filter(|(client, _)| !client.is_closed()) {
            return Ok(Some((client.clone(), statement.clone())));
        }
        // Others wait for it.
        let opened = tokio::time::timeout(HEARS, Registry::connect(config, side)).await;
        let opened = opened.map_err(|_| format!("{side} does not answer"))??;
        open.clone_from(&opened);
        Ok(opened)
    }

    async fn connect(config: &Config, side: Side) -> Result<Option<Enters>, String> {
        let client = Shared::database(config, side).connect("crossfade sessions").await;
        let client = Arc::new(client.map_err(|error| error.to_string())?);
        client.batch_execute("SET synchronous_commit = off").await.map_err(|error| error.to_string())?;
        match client.prepare(ENTER).await {
            Ok(statement) => Ok(Some((client, statement))),
            Err(error) if missing(&error) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// No schema `crossfade` is there, or not for this role.
fn missing(error: &tokio_postgres::Error) -> bool {
    let code = error.code();
    [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME, SqlState::INSUFFICIENT_PRIVILEGE]
        .iter()
        .any(|of| code == Some(of))
}

/// What a proxy sees of the others on the side that is authority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Which holds there.
    pub epoch: u64,
    /// Another proxy is about to leave this epoch.
    pub announced: bool,
    /// ... and to make this side the authority.
    pub coming: Option<Side>,
}

/// Stands for this proxy on the side that is authority. With its connection it is gone.
pub async fn appear(shared: &Shared, eye: &Client) -> Result<(), MoveError> {
    let listen = shared.config.load().listen.to_string();
    let sql = "INSERT INTO crossfade.proxies AS p (id, listen, pid, start) \
        SELECT $1, $2, pid, backend_start FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid() \
        ON CONFLICT (id) DO UPDATE SET pid = excluded.pid, start = excluded.start, heard = NULL, still = NULL, holding = 0, ready = NULL";
    let gone = "DELETE FROM crossfade.sessions s WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_stat_activity a \
        WHERE a.pid = s.pid AND a.backend_start IS NOT DISTINCT FROM s.start)";
    match eye.execute(sql, &[&shared.registry.id, &listen]).await {
        Ok(_) => {}
        Err(error) if missing(&error) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    eye.execute(gone, &[]).await?;
    Ok(())
}

/// Says how many sessions of this proxy may have a cursor WITH HOLD or listen; a proxy that has just appeared has none.
pub async fn holds(shared: &Shared, eye: &Client, sessions: i64) -> Result<(), MoveError> {
    let sql = "UPDATE crossfade.proxies SET holding = $2 WHERE id = $1";
    match eye.execute(sql, &[&shared.registry.id, &sessions]).await {
        Err(error) if !missing(&error) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Says that the sessions of this proxy have logged in on the other side.
pub async fn is_ready(shared: &Shared, eye: &Client, epoch: u64) -> Result<(), MoveError> {
    let sql = "UPDATE crossfade.proxies SET ready = $2 WHERE id = $1";
    eye.execute(sql, &[&shared.registry.id, &(epoch as i64)]).await?;
    Ok(())
}

/// Sessions of all proxies that are there and may have a cursor WITH HOLD or listen. Schema crossfade is there.
pub async fn holding(authority: &Client) -> Result<i64, tokio_postgres::Error> {
    let sql = "SELECT coalesce(sum(p.holding), 0)::bigint FROM crossfade.proxies p \
        JOIN pg_catalog.pg_stat_activity e ON e.pid = p.pid AND e.backend_start IS NOT DISTINCT FROM p.start";
    Ok(authority.query_one(sql, &[]).await?.get(0))
}

/// Looks at the phase row, and whether somebody has announced a move. None: nothing is installed.
pub async fn look(shared: &Shared, eye: &Client) -> Result<Option<Seen>, MoveError> {
    let sql = "SELECT coalesce(m.epoch, 0), EXISTS (SELECT FROM crossfade.announced v JOIN pg_catalog.pg_stat_activity a ON a.pid = v.pid \
        WHERE v.epoch = coalesce(m.epoch, 0) AND a.backend_start IS NOT DISTINCT FROM v.start AND v.proxy <> $1), \
        (SELECT v.side FROM crossfade.coming v JOIN pg_catalog.pg_stat_activity a ON a.pid = v.pid \
        WHERE v.epoch = coalesce(m.epoch, 0) AND a.backend_start IS NOT DISTINCT FROM v.start AND v.proxy <> $1) \
        FROM (SELECT 1) AS one LEFT JOIN crossfade.migration m ON true";
    match eye.query_typed_one(sql, &[(&shared.registry.id, Type::TEXT)]).await {
        Ok(row) => {
            let coming =
                row.get::<_, Option<&str>>(2).and_then(|side| Side::BOTH.into_iter().find(|one| one.name() == side));
            Ok(Some(Seen { epoch: row.get::<_, i64>(0) as u64, announced: row.get(1), coming }))
        }
        Err(error) if missing(&error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Another has announced a move: no transaction of this proxy begins, and once none is under way it says so. False: they have not ended in time, and
/// clients are released.
pub async fn fall_still(shared: &Shared, eye: &Client, epoch: u64) -> Result<bool, MoveError> {
    let (id, epoch) = (&shared.registry.id, epoch as i64);
    eye.execute("UPDATE crossfade.proxies SET heard = $2 WHERE id = $1", &[id, &epoch]).await?;
    shared.gate.close();
    let pause = shared.config.load().moves.pause;
    if tokio::time::timeout(pause, shared.gate.drained()).await.is_err() {
        shared.gate.open();
        return Ok(false);
    }
    eye.execute("UPDATE crossfade.proxies SET still = $2 WHERE id = $1", &[id, &epoch]).await?;
    Ok(true)
}

/// Before anybody is held: waits until each other proxy has looked a moment ago, or is silent. One that is slow for a moment would have its sessions ended,
/// and one that is frozen would be found out with clients waiting. Schema crossfade is there.
pub async fn awake(shared: &Shared, authority: &Client) -> Result<(), MoveError> {
    let sql = "SELECT p.listen FROM crossfade.proxies p JOIN pg_catalog.pg_stat_activity e ON e.pid = p.pid AND e.backend_start IS NOT DISTINCT FROM p.start \
        WHERE p.id <> $1 AND e.query_start < clock_timestamp() - $2::text::interval AND e.query_start >= clock_timestamp() - $3::text::interval LIMIT 1";
    let until = Instant::now() + WAKES;
    while let Some(slow) = authority.query_opt(sql, &[&shared.registry.id, &AWAKE, &SILENT]).await? {
        if Instant::now() > until {
            warn!(
                proxy = slow.get::<_, String>(0),
                "a proxy is slow to look at the phase row: the move may end transactions of its clients"
            );
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Takes it back. A mover that counts on it is waited for: it has this proxy's row locked until its own transaction ends.
pub async fn stir(shared: &Shared, eye: &Client) -> Result<(), MoveError> {
    let sql = "UPDATE crossfade.proxies SET heard = NULL, still = NULL WHERE id = $1";
    eye.execute(sql, &[&shared.registry.id]).await?;
    Ok(())
}

/// A move out of a phase without a mirror, announced to all proxies.
pub struct Announcement {
    client: Client,
    side: Side,
    me: String,
    epoch: i64,
}

/// Announces it, and waits until each proxy that hears is still; with `terminate` the transactions of those that are not in time are ended.
pub async fn announce(
    shared: &Shared,
    config: &Config,
    side: Side,
    epoch: u64,
    to: Phase,
    terminate: bool,
) -> Result<Announcement, MoveError> {
    let client = Shared::database(config, side).connect("crossfade announces").await?;
    let sql = "INSERT INTO crossfade.announced (epoch, phase, pid, start, proxy) \
        SELECT $1, $2, pid, backend_start, $3 FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid() \
        ON CONFLICT (one) DO UPDATE SET epoch = excluded.epoch, phase = excluded.phase, pid = excluded.pid, start = excluded.start, proxy = excluded.proxy";
    let me = shared.registry.id.clone();
    let epoch = epoch as i64;
    client.execute(sql, &[&epoch, &to.name(), &me]).await?;
    let announcement = Announcement { client, side, me, epoch };
    announcement.stillness(config.moves.pause, terminate).await?;
    Ok(announcement)
}

impl Announcement {
    async fn stillness(&self, pause: Duration, terminate: bool) -> Result<(), MoveError> {
        let since = Instant::now();
        let end = "SELECT pg_catalog.pg_terminate_backend(s.pid) FROM crossfade.sessions s JOIN pg_catalog.pg_stat_activity a ON a.pid = s.pid \
            AND a.backend_start IS NOT DISTINCT FROM s.start WHERE s.proxy = ANY ($1) AND a.xact_start IS NOT NULL";
        let mut patience = pause.max(HEARS);
        let mut ended = false;
        let sql = "SELECT p.listen, p.id FROM crossfade.proxies p JOIN pg_catalog.pg_stat_activity a ON a.pid = p.pid AND a.backend_start IS NOT DISTINCT FROM p.start \
            WHERE p.id <> $2 AND p.still IS DISTINCT FROM $1 \
            AND (coalesce(p.heard = $1, false) OR coalesce(a.query_start > clock_timestamp() - $3::text::interval, true))";
        loop {
            let waiting = self.client.query(sql, &[&self.epoch, &self.me, &SILENT]).await?;
            let Some(waits) = waiting.first() else { return Ok(()) };
            if terminate && !ended && since.elapsed() + BEFORE > pause {
                (ended, patience) = (true, patience + super::end::ENDS);
                let of: Vec<String> = waiting.iter().map(|row| row.get(1)).collect();
                let found = self.client.query(end, &[&of]).await?;
                warn!(side = %self.side, sessions = found.len(), "transactions that last longer than move.pause are ended");
            }
            if since.elapsed() > patience {
                return Err(MoveError::Held(format!(
                    "the proxy that listens on {} has transactions that have not ended within move.pause ({pause:?}); clients were released",
                    waits.get::<_, String>(0)
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// In the move's transaction on that side (`mover`): from here on no proxy takes back that it is still, and no session is entered. Sessions of proxies
    /// that are not still are terminated.
    pub async fn fence(&self, mover: &Client, deadline: Instant) -> Result<(), MoveError> {
        mover.batch_execute("LOCK TABLE crossfade.sessions IN EXCLUSIVE MODE").await?;
        let sql = "SELECT id FROM crossfade.proxies WHERE still = $1 FOR SHARE";
        let rows = mover.query(sql, &[&self.epoch]).await?;
        let mut spared: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        spared.push(self.me.clone());
        let sql = "SELECT s.pid, pg_catalog.pg_terminate_backend(s.pid) FROM crossfade.sessions s JOIN pg_catalog.pg_stat_activity a ON a.pid = s.pid \
            AND a.backend_start IS NOT DISTINCT FROM s.start WHERE s.proxy <> ALL ($1)";
        let mut said = false;
        loop {
            let found = self.client.query(sql, &[&spared]).await?;
            if found.is_empty() {
                return Ok(());
            }
            if !std::mem::replace(&mut said, true) {
                warn!(side = %self.side, sessions = found.len(), "a proxy does not hear of the move: its sessions are terminated");
            }
            if Instant::now() > deadline {
                return Err(MoveError::Held(format!(
                    "backend {} on {} is of a proxy that does not answer, and has not ended; clients were released",
                    found[0].get::<_, i32>(0),
                    self.side
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The move is over, or was given up.
    pub async fn end(&self) {
        let sql = "DELETE FROM crossfade.announced WHERE proxy = $1";
        if let Err(error) = self.client.execute(sql, &[&self.me]).await {
            // With its connection it means nothing.
            debug!(%error, "the announcement was not taken back");
        }
    }
}
