//! Two control connections, one to each side, and the settings that every job works under.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, CopyInSink, Row, Statement};

use super::error::Error;
use crate::catalog::Sides;
use crate::config::Database;
use crate::phase::Side;

/// How jobs work. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Keys in one transaction at most.
    pub chunk_rows: usize,
    /// Rows held in memory at once, roughly.
    pub chunk_bytes: usize,
    /// A server that says nothing for this long, while rows are locked on the other, is given up.
    pub patience: Duration,
    /// How often a key that someone else has locked is tried within one call.
    pub rounds: u32,
    /// How long to wait for transactions that hold the mirror's table (they are waited for without holding anything).
    pub settle: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            chunk_rows: 1000,
            chunk_bytes: 4 << 20,
            patience: Duration::from_secs(5),
            rounds: 5,
            settle: Duration::from_secs(30),
        }
    }
}

/// A control connection to one side, with its prepared statements.
pub struct Link {
    /// Which side.
    pub side: Side,
    /// The connection. Nothing else may use it while a job does.
    pub client: Client,
    patience: Duration,
    statements: HashMap<String, Statement>,
    /// Its answers are out of step with what is asked: see [`Link::copy_in`].
    out_of_step: bool,
}

/// A connection that is asked now and then: nothing is kept prepared.
#[derive(Clone, Copy)]
pub struct At<'c> {
    /// Which side.
    pub side: Side,
    /// The connection.
    pub client: &'c Client,
    /// How long an answer may take.
    pub patience: Duration,
}

impl At<'_> {
    pub(crate) async fn rows(
        &self,
        doing: &'static str,
        text: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>, Error> {
        self.within(doing, self.client.query(text, parameters)).await
    }

    /// In one round trip: the parameters' types are known.
    pub(crate) async fn typed(
        &self,
        doing: &'static str,
        text: &str,
        parameters: &[(Parameter<'_>, Type)],
    ) -> Result<Vec<Row>, Error> {
        self.within(doing, self.client.query_typed(text, parameters)).await
    }

    async fn within(
        &self,
        doing: &'static str,
        answer: impl Future<Output = Result<Vec<Row>, tokio_postgres::Error>>,
    ) -> Result<Vec<Row>, Error> {
        match tokio::time::timeout(self.patience, answer).await {
            Ok(answer) => answer.map_err(|error| Error::from_driver(self.side, doing, &error)),
            Err(_) => Err(Error::Stalled { side: self.side, doing, after: self.patience }),
        }
    }
}

/// A control connection to that side, under this `application_name`.
pub(crate) async fn connect(database: &Database, side: Side, name: &str) -> Result<Client, Error> {
    let broken = |error: crate::config::ConnectError| error.to_string();
    let connected = database.connect(name).await;
    connected.map_err(|error| Error::Broken { side, doing: "connecting", message: broken(error) })
}

type Parameter<'a> = &'a (dyn ToSql + Sync);

/// Prepared statements kept at most.
const STATEMENTS: usize = 256;

impl Link {
    /// A link over an open connection; it is set up by [`Pair::new`].
    pub fn new(side: Side, client: Client, patience: Duration) -> Link {
        Link { side, client, patience, statements: HashMap::new(), out_of_step: false }
    }

    /// The connection as it is, without its prepared statements.
    pub fn at(&self) -> At<'_> {
        At { side: self.side, client: &self.client, patience: self.patience }
    }

    /// Awaits an answer for as long as the job's patience lasts.
    pub(crate) async fn answered<T>(
        &self,
        doing: &'static str,
        answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Error> {
        if self.out_of_step {
            let message = "it was given up behind a COPY that the server had refused".to_owned();
            return Err(Error::Broken { side: self.side, doing, message });
        }
        match tokio::time::timeout(self.patience, answer).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(Error::from_driver(self.side, doing, &error)),
            Err(_) => Err(Error::Stalled { side: self.side, doing, after: self.patience }),
        }
    }

    /// Runs statements without parameters.
    pub(crate) async fn batch(&self, doing: &'static str, sql: &str) -> Result<(), Error> {
        self.answered(doing, self.client.batch_execute(sql)).await
    }

    /// COMMIT, which a transaction that has failed refuses. By itself it would answer ROLLBACK, which the driver does not tell from COMMIT, nor does it
    /// always hear of the failure: it takes the tag of a COPY for its end, and a time-out that fired just before is told behind it.
    pub(crate) async fn commit(&self, doing: &'static str) -> Result<(), Error> {
        self.batch(doing, "SELECT 1; COMMIT").await
    }

    /// COMMIT or ROLLBACK.
    pub(crate) async fn end(&mut self, doing: &'static str, committed: bool) -> Result<(), Error> {
        match committed {
            true => self.commit(doing).await,
            false => self.rollback().await,
        }
    }

    pub(crate) async fn prepared(&mut self, doing: &'static str, text: &str) -> Result<Statement, Error> {
        if let Some(statement) = self.statements.get(text) {
            return Ok(statement.clone());
        }
        let statement = self.answered(doing, self.client.prepare(text)).await?;
        if self.statements.len() >= STATEMENTS {
            self.statements.clear();
        }
        self.statements.insert(text.to_owned(), statement.clone());
        Ok(statement)
    }

    /// Begins a COPY FROM STDIN. Err: nothing else may be asked over this connection.
    ///
    /// Where the server refuses it before it takes any data, the driver sends a Sync too many, and each later question gets the answer to the one before it
    /// (rust-postgres, issue 789). Who copies takes the table's lock first, so that this is rare.
    pub(crate) async fn copy_in(
        &mut self,
        doing: &'static str,
        text: &str,
    ) -> Result<Pin<Box<CopyInSink<Bytes>>>, Error> {
        let statement = self.prepared(doing, text).await?;
        let begun = self.answered(doing, self.client.copy_in(&statement)).await;
        self.out_of_step |= begun.is_err();
        begun.map(Box::pin)
    }

    pub(crate) async fn rows(
        &mut self,
        doing: &'static str,
        text: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>, Error> {
        let statement = self.prepared(doing, text).await?;
        self.answered(doing, self.client.query(&statement, parameters)).await
    }

    pub(crate) async fn execute(
        &mut self,
        doing: &'static str,
        text: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<u64, Error> {
        let statement = self.prepared(doing, text).await?;
        self.answered(doing, self.client.execute(&statement, parameters)).await
    }

    /// Ends whatever transaction is open, without keeping anything of it. Plans that a changed definition has made void go too.
    pub(crate) async fn rollback(&mut self) -> Result<(), Error> {
        self.batch("rolling back", "ROLLBACK").await
    }

    /// The version of the definitions now, where one is kept.
    pub(crate) async fn version(&mut self) -> Result<Option<i64>, Error> {
        let text = "SELECT pg_sequence_last_value('crossfade.version')";
        Ok(self.rows("reading the definitions' version", text, &[]).await?[0].get(0))
    }

    pub(crate) fn forget_statements(&mut self) {
        self.statements.clear();
    }

    pub(crate) async fn set_up(&mut self, replica: bool) -> Result<Duration, Error> {
        // Operators of key types may live in any schema (citext in public, say): `=` must find them, and nothing else.
        let path: String = self
            .rows(
                "reading the schemas of operators",
                "SELECT coalesce(string_agg(DISTINCT ', ' || quote_ident(n.nspname), ''), '') FROM pg_operator o \
                 JOIN pg_namespace n ON n.oid = o.oprnamespace WHERE o.oprname = '=' AND n.nspname <> 'pg_catalog' \
                 AND n.nspname NOT LIKE 'pg\\_%' AND has_schema_privilege(n.oid, 'USAGE')",
                &[],
            )
            .await?[0]
            .get(0);
        let deadlock_ms: i64 = self
            .rows(
                "reading deadlock_timeout",
                "SELECT setting::bigint FROM pg_settings WHERE name = 'deadlock_timeout'",
                &[],
            )
            .await?[0]
            .get(0);
        let role = if replica { "SET session_replication_role = replica;" } else { "" };
        self.batch(
            "setting up the session",
            &format!(
                "SET search_path = pg_catalog{path}; SET client_encoding = 'UTF8'; SET row_security = off; {role}
                 SET synchronous_commit = off; SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off;
                 SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0;
                 SET jit = off; SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off"
            ),
        )
        .await?;
        Ok(Duration::from_millis(deadlock_ms.max(8) as u64))
    }
}

/// The two connections of a job.
pub struct Pair {
    /// To the side that is authority.
    pub authority: Link,
    /// To the other side.
    pub mirror: Link,
    /// How the job works.
    pub settings: Settings,
    /// No wait under locks lasts longer than a quarter of the shorter deadlock_timeout, and none begins after half of it: so it is
    /// never an application's session that PostgreSQL ends for a deadlock with ours.
    pub(crate) wait: Duration,
    pub(crate) broken: bool,
    /// The version of each side's definitions that the tables were read at, where one is kept: under another one nothing is written.
    pub(crate) versions: Sides<Option<i64>>,
}

impl Pair {
    /// Opens both connections under this `application_name`, and sets them up as [`Pair::new`] does.
    pub async fn open(
        authority_side: Side,
        (authority, mirror): (&Database, &Database),
        name: &str,
        settings: Settings,
    ) -> Result<Pair, Error> {
        let first = connect(authority, authority_side, name).await?;
        let second = connect(mirror, authority_side.other(), name).await?;
        Pair::new(authority_side, first, second, settings).await
    }

    /// Sets up both sessions. `authority_side` says which of the two is authority now; the connections are of the control role,
    /// which must be able to set session_replication_role and to bypass row security.
    pub async fn new(
        authority_side: Side,
        authority: Client,
        mirror: Client,
        settings: Settings,
    ) -> Result<Pair, Error> {
        let mut authority = Link::new(authority_side, authority, settings.patience);
        let mut mirror = Link::new(authority_side.other(), mirror, settings.patience);
        let (here, there) = tokio::try_join!(authority.set_up(false), mirror.set_up(true))?;
        let wait = here.min(there) / 4;
        for link in [&authority, &mirror] {
            link.batch("setting lock_timeout", &format!("SET lock_timeout = {}", wait.as_millis().max(1))).await?;
        }
        Ok(Pair { authority, mirror, settings, wait, broken: false, versions: Sides::default() })
    }

    /// Has statements at hand that will be wanted when somebody waits.
    pub(crate) async fn warm(&mut self) -> Result<(), Error> {
        self.incarnation().await.map(drop)
    }

    /// A connection was lost or given up: this pair is of no more use.
    pub fn is_broken(&self) -> bool {
        let gone = |link: &Link| link.out_of_step || link.client.is_closed();
        self.broken || gone(&self.authority) || gone(&self.mirror)
    }

    /// While rows are locked on both sides, their tables' definitions stay what they are: are they those that the statements were made for?
    pub(crate) async fn prove(&mut self) -> Result<(), Error> {
        for link in [&mut self.authority, &mut self.mirror] {
            let known = *self.versions.get(link.side);
            if known.is_some() && link.version().await? != known {
                return Err(Error::Server {
                    side: link.side,
                    doing: "writing rows",
                    code: tokio_postgres::error::SqlState::LOCK_NOT_AVAILABLE,
                    message: "definitions have changed; they are read again".to_owned(),
                    constraint: None,
                });
            }
        }
        Ok(())
    }

    /// The mirror's incarnation now.
    pub(crate) async fn incarnation(&mut self) -> Result<String, Error> {
        let rows = self.mirror.rows("reading the incarnation", "SELECT crossfade.incarnate()::text", &[]).await?;
        Ok(rows[0].get(0))
    }

    /// Ends both transactions. The authority's first: an application may wait for its locks.
    pub(crate) async fn abandon(&mut self) {
        let released = self.authority.rollback().await.is_ok();
        let undone = self.mirror.rollback().await.is_ok();
        self.broken |= !(released && undone);
        self.authority.forget_statements();
        self.mirror.forget_statements();
    }
}
