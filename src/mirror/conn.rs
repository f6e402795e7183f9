//! One session of the control role on the mirror, which carries one transaction at a time.
//!
//! Its transaction is the implicit one of an extended-protocol pipeline: it begins with the first statement and commits with Sync, so
//! BEGIN and COMMIT cost no statements, and the server never takes the session for idle in transaction. Sync is sent only after every statement
//! was answered (a commit that is sent with its statements could run after its sender has died).

use std::io;
use std::time::Duration;

use bytes::Bytes;

use super::flight::{Step, flights, is_short};
use super::prepared::{Statements, Verb, chunks, per_statement};
use crate::auth::Credentials;
use crate::backend::connect::{self, ConnectError};
use crate::catalog::Table;
use crate::clock::{Clock, Late};
use crate::config::Database;
use crate::phase::Side;
use crate::plan::image::{self, Row};
use crate::wire::conn::Conn;
use crate::wire::frame::{self, ServerError};
use crate::wire::stream::Stream;

/// The statement that asks for the open transaction's number.
const XID: &[u8] = b"xid";

/// How its sessions must be set. Not in the startup packet: a pooler between here and the server takes no options, or leaves them out.
const SETTINGS: &str = "SET session_replication_role = replica; SET row_security = off; SET synchronous_commit = off; SET statement_timeout = 0; \
    SET lock_timeout = 0; SET search_path = pg_catalog; SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; \
    SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; \
    SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3";

/// How long the next answer may take, and the clock that tells.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    /// Of this thread.
    pub clock: &'a Clock,
    /// `mirror.timeout`.
    pub limit: Duration,
}

impl Patience<'_> {
    async fn wait<T, E: Into<Failure>>(self, work: impl Future<Output = Result<T, E>>) -> Result<T, Failure> {
        match self.clock.limit(self.limit, work).await {
            Ok(outcome) => outcome.map_err(Into::into),
            Err(Late) => Err(Failure::Timeout(self.limit)),
        }
    }
}

/// What goes behind the last steps of a transaction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tail {
    /// The transaction's token in `crossfade.applied`, where it adds rows to tables without a key.
    pub token: Option<[u8; 16]>,
    /// Ask for the transaction's xid8.
    pub xid: bool,
    /// Of the definitions that the steps were made for, where one is kept: what was written to is locked, so that the version that the xid brings
    /// holds to the transaction's end.
    pub version: Option<i64>,
}

/// Who carries images: the transaction on the mirror and its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carrier {
    /// xid8 of the mirror's transaction; None: it was given up, or wrote nothing.
    pub xid: Option<i64>,
    /// Its backend.
    pub backend: Backend,
}

/// A backend of the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Process id.
    pub pid: i32,
    /// backend_start in microseconds since 1970.
    pub start: i64,
    /// The mirror's incarnation when it was opened.
    pub incarnation: [u8; 16],
}

/// Why the mirror did not take a transaction.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It answered with an error.
    #[error("refused: {} ({})", .0.message, .0.code)]
    Refused(ServerError),
    /// The connection broke.
    #[error("connection lost: {0}")]
    Broken(#[from] io::Error),
    /// No connection could be made.
    #[error("{0}")]
    Connect(#[from] ConnectError),
    /// No progress for `mirror.timeout`.
    #[error("no progress for {0:?}")]
    Timeout(Duration),
    /// All sessions were in use for `mirror.timeout`. Says nothing of the mirror itself.
    #[error("no free session for {0:?} (mirror.connections)")]
    Busy(Duration),
    /// The circuit breaker is open.
    #[error("known to be down")]
    Down,
    /// Its definitions are not those that the images were made for.
    #[error("its definitions have changed, and are read again")]
    Definition,
}

impl Failure {
    /// For `crossfade_mirror_failures_total{reason}`.
    pub fn reason(&self) -> &'static str {
        match self {
            Failure::Refused(_) => "refused",
            Failure::Broken(_) => "broken",
            Failure::Connect(_) => "connect",
            Failure::Timeout(_) => "timeout",
            Failure::Busy(_) => "busy",
            Failure::Down => "down",
            Failure::Definition => "definition",
        }
    }

    /// It speaks of the mirror as a whole, not of one row.
    pub fn opens_breaker(&self) -> bool {
        matches!(self, Failure::Broken(_) | Failure::Connect(_) | Failure::Timeout(_))
    }
}

/// One session on the mirror.
pub struct MirrorConn {
    conn: Conn<Stream>,
    side: Side,
    backend: Backend,
    statements: Statements,
    /// Statements executed since the last Sync: a transaction is open.
    open: bool,
    /// The open transaction has changed definitions here: their version is its own.
    pub redefined: bool,
    /// The catalog's generation that its statements were made for.
    pub generation: u64,
}

/// What each awaited answer is for.
enum Await {
    /// Any number of rows.
    Any,
    /// A delete that must find this many rows, else it is done again.
    Deleted { step: usize, rows: usize },
    /// One row: the transaction's xid8.
    Xid,
}

/// What was learnt from answers.
#[derive(Default)]
struct Answers {
    /// Steps whose deletes found too few rows.
    again: Vec<usize>,
    xid: Option<i64>,
    version: Option<i64>,
}

impl MirrorConn {
    /// Logs in as the control role and prepares what every transaction needs. Each holds the lock of `epoch`, whose table is made here where it is
    /// missing (the mirror was away when the phase moved).
    pub async fn open(db: &Database, side: Side, generation: u64, epoch: Option<u64>) -> Result<MirrorConn, Failure> {
        let credentials = Credentials::new(db.user.clone(), db.password.as_deref());
        let parameters = [
            ("user", db.user.as_str()),
            ("database", db.database.as_str()),
            ("application_name", "crossfade mirror"),
            ("client_encoding", "UTF8"),
        ]
        .map(|(name, value)| (Bytes::copy_from_slice(name.as_bytes()), Bytes::copy_from_slice(value.as_bytes())));
        let connected = connect::connect(db, &credentials, &parameters, 0).await?;
        let mut conn = MirrorConn {
            conn: Conn::new(connected.stream, connected.buf),
            side,
            backend: Backend { pid: 0, start: 0, incarnation: [0; 16] },
            statements: Statements::new(side, epoch),
            open: false,
            redefined: false,
            generation,
        };
        conn.until_ready().await?;
        frame::query(&mut conn.conn.out, SETTINGS.as_bytes());
        conn.until_ready().await?;
        conn.backend = conn.identify(epoch).await?;
        let xid = conn.statements.xid();
        frame::parse(&mut conn.conn.out, XID, xid.as_bytes(), &[]);
        frame::sync(&mut conn.conn.out);
        conn.until_ready().await?;
        Ok(conn)
    }

    /// For other definitions, or another epoch, than it was opened for. No transaction is open.
    pub async fn adopt(&mut self, generation: u64, epoch: u64) -> Result<(), Failure> {
        self.statements = Statements::new(self.side, Some(epoch));
        self.backend = self.identify(Some(epoch)).await?;
        self.forget().await?;
        self.generation = generation;
        Ok(())
    }

    /// Who this session is on the mirror.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Limits of a role or a server for idle sessions (PostgreSQL 14) and whole transactions (17) are not for this one, which waits for work. A server that
    /// does not know a setting has none of it.
    const UNLIMITED: &str = "CASE WHEN current_setting('idle_session_timeout', true) IS NOT NULL THEN set_config('idle_session_timeout', '0', false) END, \
        CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL THEN set_config('transaction_timeout', '0', false) END";

    async fn identify(&mut self, epoch: Option<u64>) -> Result<Backend, Failure> {
        let open = epoch.map(|epoch| format!(", crossfade.open_epoch({epoch})")).unwrap_or_default();
        let sql = format!(
            "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint, replace(crossfade.incarnate()::text, '-', ''), \
             current_setting('session_replication_role'), {}{open} FROM pg_stat_activity WHERE pid = pg_backend_pid()",
            MirrorConn::UNLIMITED
        );
        frame::query(&mut self.conn.out, sql.as_bytes());
        let row = self.until_ready().await?.ok_or_else(|| io::Error::other("no row in pg_stat_activity"))?;
        let text = |value: Option<&Bytes>| {
            value.and_then(|v| std::str::from_utf8(v).ok().map(str::to_owned)).unwrap_or_default()
        };
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "the mirror did not say who it is");
        let incarnation = u128::from_str_radix(&text(row.get(2)), 16).map_err(|_| wrong())?.to_be_bytes();
        let pid = text(row.first()).parse().map_err(|_| wrong())?;
        let start = text(row.get(1)).parse().map_err(|_| wrong())?;
        if text(row.get(3)) != "replica" {
            // Triggers would run a second time.
            let error = "the mirror's session has lost its settings: a pooler between the proxy and this database must give each session a backend of its own (session pooling)";
            return Err(io::Error::new(io::ErrorKind::InvalidData, error).into());
        }
        Ok(Backend { pid, start, incarnation })
    }

    /// Reads up to ReadyForQuery; gives the last row, or the error.
    async fn until_ready(&mut self) -> Result<Option<Vec<Bytes>>, Failure> {
        let mut row = None;
        let mut error = None;
        loop {
            let (tag, payload) = self.conn.frame().await?;
            match tag {
                b'D' => row = Some(values(&payload)?),
                b'E' => error = Some(frame::server_error(&payload)),
                b'Z' => break,
                _ => {}
            }
        }
        (self.open, self.redefined) = (false, false);
        match error {
            Some(error) => Err(Failure::Refused(error)),
            None => Ok(row),
        }
    }

    /// Executes steps in this session's transaction and waits until all were executed. Nothing is committed. Gives the xid8 where `tail` asks for it.
    /// On an error the transaction is over, and nothing of it stays.
    pub async fn execute(
        &mut self,
        steps: &[Step],
        tail: Tail,
        patience: Patience<'_>,
    ) -> Result<Option<i64>, Failure> {
        let flights = flights(steps);
        let mut xid = None;
        for (number, steps) in flights.iter().enumerate() {
            let tail = if number + 1 == flights.len() { tail } else { Tail::default() };
            xid = self.execute_flight(steps, tail, patience).await?;
        }
        match (tail.xid, xid) {
            (true, None) => Err(io::Error::new(io::ErrorKind::InvalidData, "the mirror gave no xid").into()),
            (_, xid) => Ok(xid),
        }
    }

    async fn execute_flight(
        &mut self,
        steps: &[Step],
        tail: Tail,
        patience: Patience<'_>,
    ) -> Result<Option<i64>, Failure> {
        let mut awaited = Vec::with_capacity(steps.len() + 2);
        let together = match tail.xid {
            true => self.statements.together(steps, tail.token.is_some(), &mut self.conn.out),
            false => None,
        };
        if let Some((name, formats)) = together {
            let mut values = Vec::new();
            for step in steps {
                if let Step::Upsert(table, rows) | Step::Insert(table, rows) = step {
                    values.extend(rows.iter().flat_map(|row| image::parameters(table, self.side, row)));
                }
            }
            let values = values.iter().map(Option::as_deref).chain(tail.token.iter().map(|token| Some(&token[..])));
            self.bind_execute(&name, &formats, &values.collect::<Vec<_>>());
            awaited.push(Await::Xid);
        } else {
            for (number, step) in steps.iter().enumerate() {
                self.put_lock(step, &mut awaited);
                self.put_step(number, step, &mut awaited);
            }
            if let Some(token) = tail.token {
                let (name, formats) = self.statements.token(&mut self.conn.out);
                self.bind_execute(&name, &formats, &[Some(&token[..])]);
                awaited.push(Await::Any);
            }
            if tail.xid {
                self.bind_execute(XID, &[], &[]);
                awaited.push(Await::Xid);
            }
        }
        let Answers { again, xid, version } = self.answers(&awaited, patience).await?;
        if tail.version.is_some() && tail.version != version {
            patience.wait(self.roll_back()).await?;
            return Err(Failure::Definition);
        }
        for step in again {
            self.delete_again(&steps[step], patience).await?;
        }
        Ok(xid)
    }

    /// A delete that found too few rows may have met an insert of a transaction that is over on the authority and not yet here:
    /// invisible, and DELETE does not wait for it. Inserting the deleted rows waits for it; then they are deleted in a new statement (W7).
    async fn delete_again(&mut self, step: &Step, patience: Patience<'_>) -> Result<(), Failure> {
        let Step::Delete(table, rows) = step else { return Ok(()) };
        let mut awaited = Vec::new();
        self.put_rows(table, Verb::InsertMissing, rows, &mut |_| awaited.push(Await::Any));
        self.put_rows(table, Verb::Delete, rows, &mut |_| ());
        let deletes = chunks(rows.len(), per_statement(table, Verb::Delete)).count();
        awaited.extend((0..deletes).map(|_| Await::Any));
        self.answers(&awaited, patience).await.map(|_| ())
    }

    /// A statement of its own: what follows sees what the writer before us has committed.
    fn put_lock(&mut self, step: &Step, awaited: &mut Vec<Await>) {
        let Some(table) = step.table().filter(|table| image::needs_lock(table, self.side)) else { return };
        let (name, formats) = self.statements.key_lock(&mut self.conn.out);
        self.bind_execute(&name, &formats, &[Some(&table.number.to_be_bytes())]);
        awaited.push(Await::Any);
    }

    fn put_step(&mut self, number: usize, step: &Step, awaited: &mut Vec<Await>) {
        match step {
            Step::Upsert(table, rows) if image::needs_replace(table, self.side) => {
                self.put_rows(table, Verb::Delete, rows, &mut |_| awaited.push(Await::Any));
                self.put_rows(table, Verb::Insert, rows, &mut |_| awaited.push(Await::Any));
            }
            Step::Upsert(table, rows) => self.put_rows(table, Verb::Upsert, rows, &mut |_| awaited.push(Await::Any)),
            Step::Clear(table, rows) => self.put_rows(table, Verb::Delete, rows, &mut |_| awaited.push(Await::Any)),
            Step::Insert(table, rows) => self.put_rows(table, Verb::Insert, rows, &mut |_| awaited.push(Await::Any)),
            Step::Delete(table, rows) => {
                self.put_rows(table, Verb::Delete, rows, &mut |rows| {
                    awaited.push(Await::Deleted { step: number, rows })
                });
            }
            Step::Truncate(tables) => {
                let names: Vec<_> = tables.iter().map(|table| table.qualified(self.side)).collect();
                frame::parse(&mut self.conn.out, b"", format!("TRUNCATE {}", names.join(", ")).as_bytes(), &[]);
                self.bind_execute(b"", &[], &[]);
                awaited.push(Await::Any);
            }
            Step::Define(definition) => {
                self.redefined = true;
                let patience = definition.took * 4 + Duration::from_secs(1);
                let limit = ("lock_timeout", patience.as_millis().to_string());
                let settings: Vec<_> = definition.settings.iter().cloned().chain([limit]).collect();
                self.put_settings(&settings);
                frame::parse(&mut self.conn.out, b"", &definition.text, &[]);
                self.bind_execute(b"", &[], &[]);
                // What follows in this transaction runs as before.
                let ours = [("role", "none"), ("search_path", "pg_catalog"), ("lock_timeout", "0")];
                self.put_settings(&ours.map(|(name, value)| (name, value.to_owned())));
                awaited.extend([Await::Any, Await::Any, Await::Any]);
            }
        }
    }

    /// Settings for the rest of the transaction. SET LOCAL would warn that there is no block.
    fn put_settings(&mut self, settings: &[(&str, String)]) {
        let calls: Vec<String> =
            (0..settings.len()).map(|at| format!("set_config(${}, ${}, true)", 2 * at + 1, 2 * at + 2)).collect();
        let types = vec![25; settings.len() * 2];
        frame::parse(&mut self.conn.out, b"", format!("SELECT {}", calls.join(", ")).as_bytes(), &types);
        let values: Vec<_> =
            settings.iter().flat_map(|(name, value)| [Some(name.as_bytes()), Some(value.as_bytes())]).collect();
        self.bind_execute(b"", &[0], &values);
    }

    fn put_rows(&mut self, table: &Table, verb: Verb, rows: &[Row], sent: &mut dyn FnMut(usize)) {
        let most = per_statement(table, verb);
        let mut rest = rows;
        for count in chunks(rows.len(), most) {
            let (now, later) = rest.split_at(count);
            rest = later;
            let (name, formats) = self.statements.rows(table, verb, count, &mut self.conn.out);
            let values: Vec<Option<Bytes>> = now
                .iter()
                .flat_map(|row| match verb {
                    Verb::Delete => image::key_parameters(table, row),
                    _ => image::parameters(table, self.side, row),
                })
                .collect();
            self.bind_execute(&name, &formats, &values.iter().map(Option::as_deref).collect::<Vec<_>>());
            sent(count);
        }
    }

    fn bind_execute(&mut self, name: &[u8], formats: &[i16], values: &[Option<&[u8]>]) {
        frame::bind(&mut self.conn.out, b"", name, formats, values.iter().copied(), 1);
        frame::execute(&mut self.conn.out, b"");
        self.open = true;
    }

    /// Waits for all answers.
    async fn answers(&mut self, awaited: &[Await], patience: Patience<'_>) -> Result<Answers, Failure> {
        frame::flush(&mut self.conn.out);
        let mut found = Answers::default();
        for one in awaited {
            loop {
                let (tag, payload) = self.next(patience).await?;
                match (tag, one) {
                    (b'D', Await::Xid) => (found.xid, found.version) = (number(&payload, 0), number(&payload, 1)),
                    (b'C', &Await::Deleted { step, rows }) => {
                        if is_short(affected(&payload), rows) && found.again.last() != Some(&step) {
                            found.again.push(step);
                        }
                        break;
                    }
                    (b'C', _) => break,
                    _ => {}
                }
            }
        }
        Ok(found)
    }

    /// The next answer within the time-out. An error ends the transaction: the session is made ready for another one.
    async fn next(&mut self, patience: Patience<'_>) -> Result<(u8, Bytes), Failure> {
        let (tag, payload) = patience.wait(self.conn.frame()).await?;
        if tag == b'E' {
            let error = frame::server_error(&payload);
            // A statement that failed to parse is not there, and neither are those parsed behind it in this flight.
            patience.wait(self.forget()).await?;
            return Err(Failure::Refused(error));
        }
        Ok((tag, payload))
    }

    async fn forget(&mut self) -> Result<(), Failure> {
        self.statements.clear();
        frame::sync(&mut self.conn.out);
        self.until_ready().await?;
        frame::query(&mut self.conn.out, b"DEALLOCATE ALL");
        let xid = self.statements.xid();
        frame::parse(&mut self.conn.out, XID, xid.as_bytes(), &[]);
        frame::sync(&mut self.conn.out);
        self.until_ready().await?;
        self.until_ready().await?;
        Ok(())
    }

    /// Sends COMMIT without waiting for its answer. Everything before it has been answered.
    pub async fn send_commit(&mut self) -> Result<(), Failure> {
        frame::sync(&mut self.conn.out);
        self.conn.flush().await?;
        Ok(())
    }

    /// Waits for the answer to COMMIT.
    pub async fn committed(&mut self) -> Result<(), Failure> {
        self.until_ready().await.map(|_| ())
    }

    /// Gives the open transaction up; the session can carry another one.
    pub async fn roll_back(&mut self) -> Result<(), Failure> {
        if self.open {
            frame::parse(&mut self.conn.out, b"", b"ROLLBACK", &[]);
            self.bind_execute(b"", &[], &[]);
            frame::sync(&mut self.conn.out);
            self.until_ready().await?;
        }
        Ok(())
    }
}

/// The number of rows in a command tag such as `DELETE 3`.
fn affected(payload: &[u8]) -> usize {
    let tag = payload.strip_suffix(b"\0").unwrap_or(payload);
    let digits = tag.rsplit(|&byte| byte == b' ').next().unwrap_or_default();
    std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// A number of eight bytes in a row, in binary.
fn number(payload: &Bytes, at: usize) -> Option<i64> {
    let row = values(payload).ok()?;
    Some(i64::from_be_bytes(row.get(at)?.as_ref().try_into().ok()?))
}

fn values(payload: &Bytes) -> Result<Vec<Bytes>, Failure> {
    let mut fields = frame::Fields::new(payload);
    let wrong = |error| Failure::Broken(io::Error::new(io::ErrorKind::InvalidData, error));
    let count = fields.int16().map_err(wrong)?;
    (0..count).map(|_| Ok(payload.slice_ref(fields.value().map_err(wrong)?.unwrap_or_default()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_say_how_many_rows() {
        assert_eq!(affected(b"DELETE 3\0"), 3);
        assert_eq!(affected(b"INSERT 0 12\0"), 12);
        assert_eq!(affected(b"TRUNCATE TABLE\0"), 0);
    }
}
