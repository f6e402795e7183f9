//! A session moves to another authority: logged in there as the same client, with its settings and prepared statements.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tracing::{debug, warn};

use super::books::There;
use super::expect::{Expected, Kind, Queue, To};
use super::{End, Kept, Session};
use crate::auth::client::Login;
use crate::backend::connect::{self, ConnectError, Connected};
use crate::phase::Side;
use crate::shared::Shared;
use crate::wire::conn::Conn;
use crate::wire::frame::{self, Report};
use crate::wire::stream::Stream;

/// State that cannot move: whoever has it is ended, and connects again.
macro_rules! stuck {
    () => {
        "SELECT CASE \
        WHEN EXISTS (SELECT FROM pg_catalog.pg_listening_channels()) THEN 'LISTEN' \
        WHEN EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable) THEN 'a cursor WITH HOLD' \
        WHEN EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace = pg_catalog.pg_my_temp_schema() AND relkind = 'r') THEN 'a temporary table' \
        WHEN EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid()) THEN 'a session advisory lock' \
        END"
    };
}
const STUCK: &[u8] = stuck!().as_bytes();

const MOVES_NAME: &[u8] = b"crossfade_moves";
/// That, without a second value, and what SET and set_config have left behind: name and value.
const MOVES: &[u8] = concat!(
    stuck!(),
    ", NULL UNION ALL SELECT name, setting FROM pg_catalog.pg_settings WHERE source = 'session' AND name NOT IN \
    ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable', 'session_authorization', 'role', 'is_superuser')"
)
.as_bytes();

/// Other sessions are let pass for no longer: a server that is far away takes its time for each, and could take many at once.
const TURN: Duration = Duration::from_millis(50);

/// The session that was left is closed this much later at most: many that end at once would hold up those that have just begun.
const LINGERS: Duration = Duration::from_secs(1);

/// What SQL PREPARE has left behind.
const PREPARED: &[u8] = b"SELECT statement FROM pg_catalog.pg_prepared_statements WHERE from_sql";

/// Counts a session among those of its proxy that may have a cursor WITH HOLD, or listen: no other session of the server sees that.
pub(super) struct Holding(Arc<Shared>);

impl Holding {
    fn new(shared: &Arc<Shared>) -> Holding {
        shared.holding.fetch_add(1, Ordering::Relaxed);
        Holding(shared.clone())
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.0.holding.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Logs a client in on a side, as itself.
pub(super) async fn connect(
    shared: &Shared,
    side: Side,
    login: &Login,
    parameters: &[(Bytes, Bytes)],
    minor: u16,
) -> Result<Connected, Report> {
    let config = shared.config.load_full();
    let mut db = Shared::database(&config, side).clone();
    let mut parameters = parameters.to_vec();
    if login.database == config.old.database.as_bytes() {
        // The database that migrates may be called otherwise on new.
        parameters = connect::to_database(&parameters, &db.database);
    } else {
        // Another database of old: passed through.
        db = config.old.clone();
    }
    connect::connect(&db, &login.credentials, &parameters, minor).await.map_err(|error| refusal(side, &error))
}

/// Ends a server session, somewhat later.
fn leave(mut server: Conn<Stream>) {
    let lingers = LINGERS.mul_f64(rand::random());
    tokio::task::spawn_local(async move {
        tokio::time::sleep(lingers).await;
        frame::terminate(&mut server.out);
        let _ = tokio::time::timeout(Duration::from_secs(1), server.flush()).await;
    });
}

fn refusal(side: Side, error: &ConnectError) -> Report {
    if let ConnectError::Refused(frame) = error {
        let said = frame::server_error(&frame[frame::HEAD.min(frame.len())..]);
        let code = match said.code.as_str() {
            "28P01" => "28P01",
            "28000" => "28000",
            "3D000" => "3D000",
            "53300" => "53300",
            "57P03" => "57P03",
            _ => "08006",
        };
        return Report {
            severity: "FATAL",
            code,
            message: said.message,
            hint: Some(format!("This is what the {side} database answered to crossfade's login as the client.")),
        };
    }
    Report::fatal(
        "08006",
        format!("cannot reach the {side} database: {error}"),
        format!("Look whether the {side} database is up and whether its address in crossfade's file is right."),
    )
}

impl Session {
    /// Whether it may have a cursor WITH HOLD, or listen, for the gate on sessions.
    pub(super) fn count_holding(&mut self) {
        // A session that has no part in the migration moves nowhere.
        let holds = self.settings.stays && self.aside.is_none();
        if holds != self.holding.is_some() {
            self.holding = holds.then(|| Holding::new(&self.shared));
        }
    }

    /// Between two transactions: leave the old authority for the one that holds now.
    pub(super) async fn carry_over(&mut self) -> Result<(), End> {
        let side = self.world.phase.authority();
        debug!(user = %self.user(), %side, "a session moves to another authority");
        let (settings, mut prepared) = self.what_moves().await?;
        prepared.extend(std::mem::take(&mut self.legs.named).into_iter().map(|(_, text)| text));
        let (server, address) = match self.ahead_on(side).await {
            Some(seat) => (seat.conn, seat.address),
            None => {
                let connected = connect(&self.shared, side, &self.login, &self.parameters, self.minor).await;
                let connected = connected.map_err(End::Refused)?;
                (Conn::new(connected.stream, connected.buf), connected.address)
            }
        };
        leave(std::mem::replace(&mut self.server, server));
        self.shared.metrics.servers(self.side).dec();
        self.shared.metrics.servers(side).inc();
        self.address = address;
        self.side = side;
        self.queue = Queue::default();
        self.ours_prepared.clear();
        for prepared in self.prepared.values_mut() {
            prepared.there = There::Nothing;
        }
        self.portals.clear();
        // The greeting: its parameters go to the client (they may differ), its key stays with us.
        self.queue.push(Expected::of(Kind::Sync, To::Us));
        self.settle().await?;
        for (name, value) in settings {
            let set = match name.as_str() {
                "session_authorization" => format!("SET SESSION AUTHORIZATION {}", literal(&value)),
                "role" => format!("SET ROLE {}", literal(&value)),
                _ => format!("SELECT pg_catalog.set_config({}, {}, false)", literal(&name), literal(&value)),
            };
            self.ask_ours(set.as_bytes()).await?;
            if self.kept.error.take().is_some() {
                warn!(setting = %name, %side, "a session's setting could not be carried over");
            }
        }
        for statement in prepared {
            if self.prepares_staying(&statement) {
                // It is prepared where its tables are, when that is needed.
                continue;
            }
            self.ask_ours(&statement).await?;
            if self.kept.error.take().is_some() {
                warn!(%side, "a statement of SQL PREPARE could not be carried over");
            }
        }
        Ok(())
    }

    /// Settings by name, and texts of SQL PREPARE.
    async fn what_moves(&mut self) -> Result<(Vec<(String, String)>, Vec<Bytes>), End> {
        self.ask_at_last(MOVES_NAME, MOVES).await?;
        self.refuse_stuck()?;
        self.settings.stays = false;
        let settings = self.listed_and_more().await?;
        let mut prepared = Vec::new();
        if self.settings.sql_prepared {
            self.ask_ours(PREPARED).await?;
            prepared = self.kept.rows.iter().filter_map(|row| row.first()?.clone()).collect();
        }
        Ok((settings, prepared))
    }

    /// Asks what will be asked when the session moves, so that its server has prepared it.
    pub(super) async fn ask_what_moves(&mut self) -> Result<(), End> {
        self.ask_prepared(MOVES_NAME, MOVES).await
    }

    /// Waits for a few others of this proxy that move to another authority: the first of many clients goes on sooner, and the last no later.
    pub(super) async fn take_turn(&self) -> Option<OwnedSemaphorePermit> {
        tokio::time::timeout(TURN, self.shared.turns.clone().acquire_owned()).await.ok()?.ok()
    }

    /// State that cannot move ends the session.
    pub(super) async fn check_stuck(&mut self) -> Result<(), End> {
        self.ask_ours(STUCK).await?;
        self.refuse_stuck()
    }

    fn refuse_stuck(&self) -> Result<(), End> {
        if let Some(what) = self.kept.rows.iter().find(|row| text(row, 1).is_none()).and_then(|row| text(row, 0)) {
            return Err(End::Refused(Report::fatal(
                "57P01",
                format!(
                    "terminating connection: the application moves to the {} database, and this session has {what}, which cannot move along",
                    self.world.phase.authority()
                ),
                "Connect again: the new session is served by the new authority.",
            )));
        }
        Ok(())
    }

    /// Settings by name: what this query says, those that no server lists, and the role.
    pub(super) async fn what_is_set(&mut self, query: &[u8]) -> Result<Vec<(String, String)>, End> {
        self.ask_ours(query).await?;
        self.listed_and_more().await
    }

    /// The same, where the query was answered.
    async fn listed_and_more(&mut self) -> Result<Vec<(String, String)>, End> {
        let mut settings: Vec<(String, String)> =
            self.kept.rows.iter().filter_map(|row| Some((text(row, 0)?, text(row, 1)?))).collect();
        for name in self.settings.custom.clone() {
            self.ask_ours(format!("SELECT pg_catalog.current_setting({}, true)", literal(&name)).as_bytes()).await?;
            if let Some(value) = self.first() {
                settings.push((name, value));
            }
        }
        if self.settings.role_changed {
            for name in ["session_authorization", "role"] {
                self.ask_ours(format!("SELECT pg_catalog.current_setting('{name}')").as_bytes()).await?;
                if let Some(value) = self.first().filter(|value| value != "none") {
                    settings.push((name.to_owned(), value));
                }
            }
        }
        Ok(settings)
    }

    pub(super) fn first(&self) -> Option<String> {
        self.kept.rows.first().and_then(|row| text(row, 0))
    }

    /// A statement of ours that takes nothing away from a client whose session stays: a Query would drop its unnamed statement. Outside any block; its rows or
    /// its error are in `kept`.
    pub(super) async fn ask_prepared(&mut self, name: &'static [u8], query: &'static [u8]) -> Result<(), End> {
        self.kept = Kept::default();
        self.put_ours(name, query, &[], &[], To::Us);
        self.sync_ours().await
    }

    /// The same, of a session that leaves. What was prepared may have gone unseen: a function of the client's may say DEALLOCATE ALL.
    async fn ask_at_last(&mut self, name: &'static [u8], query: &'static [u8]) -> Result<(), End> {
        self.ask_prepared(name, query).await?;
        if self.kept.error.is_none() {
            return Ok(());
        }
        self.ours_prepared.retain(|prepared| *prepared != name);
        self.ask_ours(query).await
    }

    /// A Query of ours; its rows or its error are in `kept`.
    pub(super) async fn ask_ours(&mut self, query: &[u8]) -> Result<(), End> {
        self.kept = Kept::default();
        frame::query(&mut self.server.out, query);
        self.queue.push(Expected::of(Kind::Query, To::Us));
        self.settle().await
    }
}

/// Reads a server's greeting to its end; BackendKeyData, or why it does not let us in.
pub(super) async fn greeted(conn: &mut Conn<Stream>) -> Result<Bytes, String> {
    let mut key = Bytes::new();
    loop {
        let (tag, payload) = conn.frame().await.map_err(|error| error.to_string())?;
        match tag {
            b'K' => key = payload,
            b'E' => return Err(frame::server_error(&payload).message),
            b'Z' => return Ok(key),
            _ => {}
        }
    }
}

fn text(row: &[Option<Bytes>], at: usize) -> Option<String> {
    row.get(at)?.as_ref().map(|value| String::from_utf8_lossy(value).into_owned())
}

/// A string constant that reads the same whatever standard_conforming_strings says.
pub(super) fn literal(value: &str) -> String {
    if value.contains('\\') {
        format!("E'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
    } else {
        format!("'{}'", value.replace('\'', "''"))
    }
}
