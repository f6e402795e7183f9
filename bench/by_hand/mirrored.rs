//! Transactions on both databases, as an application would write them that wants what Crossfade promises, and knows its own tables:
//!
//!     old   BEGIN, the epoch's lock                                    awaited
//!     old   each statement, RETURNING the rows as they then are        awaited
//!     new   BEGIN, the epoch's lock, the rows (and the token of those without a key), the transaction's number    one flight, awaited
//!     old   the ledger's row, COMMIT                                   one flight, awaited: the application goes on
//!     new   COMMIT                                                     its answer is read when the session is used again
//!
//! Every 200 ms what was answered is flushed on new and cleared from the ledger, by Crossfade's own `flush_and_clear`.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use crossfade::ledger::clear::{self, flush_and_clear};
use crossfade::ledger::debts::{Debt, encode};
use rand::Rng;
use tokio_postgres::NoTls;

use crate::connection::{Connection, Row};
use crate::statements::{Draw, Statement, Workload};
use crate::{Arguments, Outcome};

/// The epoch whose lock each transaction holds on both sides.
const LOCK: &str = "LOCK TABLE crossfade.epoch_1 IN ACCESS SHARE MODE";

/// What a session that writes images is set to, as Crossfade's are.
const OPTIONS: &str = "-c session_replication_role=replica -c synchronous_commit=off -c search_path=public,pg_catalog";

const OWE: &str = "INSERT INTO crossfade.ledger (id, carrier_xid, carrier_pid, carrier_start, carrier_incarnation, debts) \
    VALUES ($1, $2, $3, $4, $5, $6)";

const WHO: &str = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint, crossfade.incarnate() \
    FROM pg_stat_activity WHERE pid = pg_backend_pid()";

const CLEAR: Duration = Duration::from_millis(200);

/// One client with its session on each side.
pub struct Mirrored {
    old: Connection,
    new: Connection,
    workload: Workload,
    /// Of the session on new: pid, start, incarnation.
    carrier: Row,
    /// The debt of the last transaction, whose COMMIT new has not answered yet.
    unanswered: Option<i64>,
    paid: Paid,
}

/// Debts whose COMMIT new has answered go here.
#[derive(Clone)]
pub struct Paid {
    sender: mpsc::Sender<i64>,
    last_id: Arc<AtomicI64>,
}

/// Clears them, on a thread of its own.
pub struct Clearing {
    paid: Paid,
    thread: JoinHandle<Outcome<()>>,
}

impl Mirrored {
    pub async fn connect(arguments: &Arguments, new: &str, paid: Paid) -> Outcome<Mirrored> {
        let workload = arguments.workload;
        let written: Vec<_> = workload.statements().iter().filter_map(|statement| Written::of(*statement)).collect();
        let mut old = Connection::open(&arguments.old, &arguments.database, "").await?;
        let texts: Vec<_> = written.iter().map(Written::returning).collect();
        let mut statements = vec![
            ("begin", "BEGIN", &[][..]),
            ("lock", LOCK, &[]),
            ("owe", OWE, &[20, 20, 23, 20, 2950, 17]),
            ("commit", "COMMIT", &[]),
        ];
        statements.push(Statement::Select.prepared());
        statements.extend(written.iter().zip(&texts).map(|(written, text)| {
            let (name, _, types) = written.statement.prepared();
            (name, text.as_str(), types)
        }));
        old.prepare(&statements).await?;
        let mut new = Connection::open(new, &arguments.database, OPTIONS).await?;
        let last = written.len() - 1;
        let texts: Vec<_> = written.iter().enumerate().map(|(at, written)| written.upsert(at == last)).collect();
        let mut statements =
            vec![("begin", "BEGIN", &[][..]), ("lock", LOCK, &[]), ("who", WHO, &[]), ("commit", "COMMIT", &[])];
        statements.extend(
            written.iter().zip(&texts).map(|(written, text)| (written.statement.name(), text.as_str(), written.types)),
        );
        new.prepare(&statements).await?;
        new.put("who", &[]);
        let carrier = new.run().await?.rows.pop().ok_or("new does not say who it is")?;
        Ok(Mirrored { old, new, workload, carrier, unanswered: None, paid })
    }

    pub async fn transaction(&mut self, draw: &Draw) -> Outcome<()> {
        self.old.put("begin", &[]);
        self.old.put("lock", &[]);
        if !self.workload.is_autocommit() {
            self.old.run().await?;
        }
        let mut images = Vec::with_capacity(4);
        for statement in self.workload.statements() {
            statement.put(draw, &mut self.old);
            let answer = self.old.run().await?;
            if let Some(written) = Written::of(*statement) {
                images.push((written, answer.rows.into_iter().next().ok_or("a statement has written no row")?));
            }
        }
        let token: [u8; 16] = rand::rng().random();
        let xid = self.carry(&images, &token).await?;
        let id = self.paid.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let debts = debts(&images, token);
        let value = |at: usize| self.carrier[at].as_deref();
        let owed = [Some(&id.to_be_bytes()[..]), Some(&xid), value(0), value(1), value(2), Some(&debts)];
        self.old.put("owe", &owed);
        self.old.put("commit", &[]);
        if self.old.run().await?.tag[..] != *b"COMMIT\0" {
            return Err("old has not committed".into());
        }
        self.new.put("commit", &[]);
        self.unanswered = Some(id);
        self.new.sync().await
    }

    /// The images in one flight to new; answers the number of their transaction when all are executed.
    async fn carry(&mut self, images: &[(Written, Row)], token: &[u8; 16]) -> Outcome<Bytes> {
        self.new.put("begin", &[]);
        self.new.put("lock", &[]);
        for (written, row) in images {
            let mut values: Vec<_> = row.iter().map(Option::as_deref).collect();
            if written.key.is_none() {
                values.push(Some(token));
            }
            self.new.put(written.statement.name(), &values);
        }
        self.new.sync().await?;
        self.settle().await?;
        let last = self.new.answer().await?.rows.pop().and_then(|row| row.into_iter().next());
        last.flatten().ok_or_else(|| "new gives no number of the transaction".into())
    }

    /// Reads new's answer to the last COMMIT.
    pub async fn settle(&mut self) -> Outcome<()> {
        if let Some(id) = self.unanswered.take() {
            if self.new.answer().await?.tag[..] != *b"COMMIT\0" {
                return Err("new has not committed".into());
            }
            self.paid.sender.send(id)?;
        }
        Ok(())
    }
}

/// The keys and keyless rows as the ledger has them.
fn debts(images: &[(Written, Row)], token: [u8; 16]) -> BytesMut {
    let mut out = BytesMut::new();
    for (number, (written, row)) in images.iter().enumerate() {
        let table = number as u32 + 1;
        let debt = match written.key {
            Some(_) => Debt::Key { table, key: vec![row[0].clone()] },
            None => Debt::Row { table, token, values: row.clone() },
        };
        encode(&debt, &mut out);
    }
    out
}

/// A table that a statement writes.
struct Written {
    statement: Statement,
    table: &'static str,
    columns: &'static [&'static str],
    /// Types of the columns; of a table without a key also the token's.
    types: &'static [u32],
    /// The key's column, the first one.
    key: Option<&'static str>,
}

impl Written {
    /// None: it reads only.
    fn of(statement: Statement) -> Option<Written> {
        let (table, columns, types, key): (_, &[_], &[_], _) = match statement {
            Statement::Select => return None,
            Statement::Accounts => {
                ("pgbench_accounts", &["aid", "bid", "abalance", "filler"], &[23, 23, 23, 1042], Some("aid"))
            }
            Statement::Tellers => {
                ("pgbench_tellers", &["tid", "bid", "tbalance", "filler"], &[23, 23, 23, 1042], Some("tid"))
            }
            Statement::Branches => ("pgbench_branches", &["bid", "bbalance", "filler"], &[23, 23, 1042], Some("bid")),
            Statement::History => (
                "pgbench_history",
                &["tid", "bid", "aid", "delta", "mtime", "filler"],
                &[23, 23, 23, 23, 1114, 1042, 2950],
                None,
            ),
        };
        Some(Written { statement, table, columns, types, key })
    }

    /// The statement for old.
    fn returning(&self) -> String {
        format!("{} RETURNING {}", self.statement.prepared().1, self.columns.join(", "))
    }

    /// The statement for new; the last of a transaction returns its number.
    fn upsert(&self, last: bool) -> String {
        let values: Vec<_> = (1..=self.columns.len()).map(|number| format!("${number}")).collect();
        let mut text =
            format!("INSERT INTO {} ({}) VALUES ({})", self.table, self.columns.join(", "), values.join(", "));
        match self.key {
            Some(key) => {
                let set: Vec<_> =
                    self.columns[1..].iter().map(|column| format!("{column} = excluded.{column}")).collect();
                text.push_str(&format!(" ON CONFLICT ({key}) DO UPDATE SET {}", set.join(", ")));
            }
            None => {
                let token = self.types.len();
                text = format!("WITH token AS (INSERT INTO crossfade.applied (token) VALUES (${token})) {text}");
            }
        }
        if last {
            text.push_str(" RETURNING pg_current_xact_id()");
        }
        text
    }
}

impl Clearing {
    /// Opens the epoch on both sides, and begins.
    pub fn start(arguments: &Arguments, new: &str) -> Outcome<Clearing> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (authority, mirror, last_id) = runtime.block_on(async {
            let authority = control(&arguments.old, &arguments.database).await?;
            let mirror = control(new, &arguments.database).await?;
            for client in [&authority, &mirror] {
                client.batch_execute("SELECT crossfade.open_epoch(1)").await?;
            }
            let block: i64 = authority.query_one("SELECT nextval('crossfade.ledger_id')", &[]).await?.get(0);
            Outcome::Ok((authority, mirror, block << 32))
        })?;
        let (sender, ids) = mpsc::channel();
        let thread = std::thread::spawn(move || runtime.block_on(clear(&authority, &mirror, &ids)));
        Ok(Clearing { paid: Paid { sender, last_id: Arc::new(AtomicI64::new(last_id)) }, thread })
    }

    /// For one more client.
    pub fn sender(&self) -> Paid {
        self.paid.clone()
    }

    /// All clients have ended: what they have sent is cleared, and nothing is left in the ledger.
    pub fn finish(self) -> Outcome<()> {
        drop(self.paid);
        self.thread.join().map_err(|_| "the thread that clears has panicked")?
    }
}

async fn control(address: &str, database: &str) -> Outcome<tokio_postgres::Client> {
    let url = format!("postgres://postgres@{address}/{database}");
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn clear(
    authority: &tokio_postgres::Client,
    mirror: &tokio_postgres::Client,
    paid: &mpsc::Receiver<i64>,
) -> Outcome<()> {
    let incarnation: String = mirror.query_one("SELECT crossfade.incarnate()::text", &[]).await?.get(0);
    let mut ended = false;
    while !ended {
        tokio::time::sleep(CLEAR).await;
        let mut ids = Vec::new();
        loop {
            match paid.try_recv() {
                Ok(id) => ids.push(id),
                Err(error) => break ended = error == mpsc::TryRecvError::Disconnected,
            }
        }
        flush_and_clear(mirror, authority, &ids, &incarnation, clear::Clearing::Lazy).await?;
    }
    let left: i64 = authority.query_one("SELECT count(*) FROM crossfade.ledger", &[]).await?.get(0);
    if left == 0 { Ok(()) } else { Err(format!("{left} rows are left in the ledger").into()) }
}
