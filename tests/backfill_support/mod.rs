//! A backfill on a stage: both databases, a proxy beside them, and lines from the backfill to each that a test can stall.
#![allow(dead_code, reason = "each test binary uses a part of this")]

pub mod shop;

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::common::link::Link;
use crate::common::pair::{APP, CONTROL, DATABASE};
use crate::common::{Databases, Proxy, until};
use tokio_postgres::{Client, NoTls};

/// The first keys of the advisory locks of jobs, as src/migrate/locks.rs has them.
const TABLE: i32 = 0x4346_5442;
const KEYS: i32 = 0x4346_4b59;
const PART: i32 = 0x4346_5054;
/// Parts of a table at most.
const PARTS: i32 = 64;

/// In `dual-write`, with whole-table debts that nobody has begun to pay.
pub struct Stage {
    /// The proxy, which goes straight to both.
    pub proxy: Proxy,
    /// Both databases.
    pub databases: Databases,
    /// From the backfill to the authority.
    pub authority: Link,
    /// From the backfill to the mirror.
    pub mirror: Link,
    /// Keeps the proxy's own repair away from what the test is about.
    guard: Client,
    dir: tempfile::TempDir,
}

impl Stage {
    /// Runs `schema` on both sides and `old` on old, then moves to `dual-write`. Tables have the numbers from 1 to `tables`.
    pub async fn new(schema: &str, old: &str, tables: i32) -> Stage {
        Stage::with(schema, old, "", tables).await
    }

    /// The same, with rows on new that are there before.
    pub async fn with(schema: &str, old: &str, new: &str, tables: i32) -> Stage {
        let databases = Databases::start(&[]).await;
        databases.run_on_both(schema).await;
        databases.old.run(DATABASE, old).await.expect("fills old");
        databases.new.run(DATABASE, new).await.expect("fills new");
        let guard = databases.new.client(DATABASE).await.expect("connects");
        for number in 1..=tables {
            lock(&guard, "pg_advisory_lock", TABLE, number).await;
            lock(&guard, "pg_advisory_lock", KEYS, number).await;
        }
        let mut proxy = Proxy::start(databases.proxy_config("old", "mirror: { timeout: 1s }")).await;
        proxy.set_phase("dual-write").await;
        let (authority, mirror) = (Link::to(databases.old.port()).await, Link::to(databases.new.port()).await);
        let dir = tempfile::tempdir().expect("a directory");
        let url = |port: u16| format!("postgres://{}:{}@127.0.0.1:{port}/{DATABASE}", CONTROL.0, CONTROL.1);
        let config = format!(
            "listen: 127.0.0.1:1\nold: {}\nnew: {}\nphase: dual-write\n",
            url(authority.port()),
            url(mirror.port())
        );
        std::fs::write(dir.path().join("crossfade.yaml"), config).expect("writes");
        Stage { proxy, databases, authority, mirror, guard, dir }
    }

    /// A client of the application, through the proxy.
    pub async fn client(&self) -> Client {
        let url = self.proxy.url_as(APP.0, APP.1, DATABASE);
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("connects to the proxy");
        tokio::spawn(async move { drop(connection.await) });
        client
    }

    /// Starts `crossfade backfill` over the two lines.
    pub fn backfill(&self, arguments: &[&str]) -> Running {
        // A line that a test stalls is no server that is gone.
        self.backfill_so_patient(60, arguments)
    }

    /// The same, which gives up a server that says nothing for so many seconds.
    pub fn backfill_so_patient(&self, seconds: u32, arguments: &[&str]) -> Running {
        let patience = seconds.to_string();
        let arguments = [arguments, &["--patience", &patience]].concat();
        Running::start(&self.dir.path().join("crossfade.yaml"), &arguments)
    }

    /// The same, straight to both servers: whatever is stalled.
    pub fn backfill_straight(&self) -> Running {
        Running::start(&self.proxy.config_path(), &[])
    }

    /// Lets the backfill begin with table `number`, before the proxy's repair can; afterwards the proxy can still not walk the table.
    pub async fn let_begin(&self, number: i32) {
        self.asks(number).await;
        // Both wait in one queue: the backfill comes first, and shares the lock from then on.
        unlock(&self.guard, TABLE, number).await;
        lock(&self.guard, "pg_advisory_lock_shared", TABLE, number).await;
    }

    /// A job waits for the table, which another one has.
    pub async fn asks(&self, number: i32) {
        until("a backfill asks for the table", async || self.waits_for(TABLE, number).await).await;
    }

    async fn waits_for(&self, kind: i32, number: i32) -> bool {
        let sql = format!(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = {kind} AND objid = {number} AND NOT granted"
        );
        self.databases.new.run(DATABASE, &sql).await.expect("reads").trim() != "0"
    }

    /// Keeps jobs from the table, as soon as the one that has it has done with it.
    pub async fn keep_table(&self, number: i32) {
        lock(&self.guard, "pg_advisory_lock", TABLE, number).await;
    }

    /// Keeps backfills from the table's parts, whichever it will be cut into, until what is returned is dropped.
    pub async fn keep_parts(&self, number: i32) -> Client {
        let client = self.databases.new.client(DATABASE).await.expect("connects");
        for part in 0..PARTS {
            lock(&client, "pg_advisory_lock", PART, number * PARTS + part).await;
        }
        client
    }

    /// Keeps the proxy's repair from the table's keys and ranges, as soon as it has done with them.
    pub async fn keep_keys(&self, number: i32) {
        lock(&self.guard, "pg_advisory_lock", KEYS, number).await;
    }

    /// From now on the proxy's repair may pay the table's keys and ranges.
    pub async fn free_keys(&self, number: i32) {
        unlock(&self.guard, KEYS, number).await;
    }

    /// The same for all that it owes.
    pub async fn free_all(&self) {
        self.guard.batch_execute("SELECT pg_advisory_unlock_all()").await.expect("unlocks");
    }

    /// Rows of the ledger.
    pub async fn debts(&self) -> i64 {
        self.on_old("SELECT count(*) FROM crossfade.ledger").await.parse().expect("a number")
    }

    /// One value from old.
    pub async fn on_old(&self, sql: &str) -> String {
        self.databases.old.run(DATABASE, sql).await.expect(sql).trim().to_owned()
    }

    /// One value from new.
    pub async fn on_new(&self, sql: &str) -> String {
        self.databases.new.run(DATABASE, sql).await.expect(sql).trim().to_owned()
    }

    /// The backend of new that holds the backfill's open chunk.
    pub async fn copying_backend(&self) -> i32 {
        let sql = "SELECT coalesce(max(pid), 0) FROM pg_stat_activity WHERE application_name = 'crossfade backfill' AND backend_xid IS NOT NULL";
        let mut pid = 0;
        until("a chunk is open on new", async || {
            pid = self.on_new(sql).await.parse().expect("a pid");
            pid != 0
        })
        .await;
        pid
    }

    /// Runs a backfill to its end, and what is left by the proxy; then both sides are equal. Returns the rows.
    pub async fn finish(&self) -> u64 {
        let (status, said) = self.backfill(&[]).end().await;
        assert!(status.success(), "{said}");
        self.settle().await
    }

    /// Frees everything, waits until nothing is owed, and compares.
    pub async fn settle(&self) -> u64 {
        self.free_all().await;
        self.proxy.settle().await;
        assert_eq!(self.debts().await, 0);
        self.databases.assert_equal().await
    }
}

async fn lock(client: &Client, function: &str, kind: i32, number: i32) {
    client.batch_execute(&format!("SELECT {function}({kind}, {number})")).await.expect("locks");
}

async fn unlock(client: &Client, kind: i32, number: i32) {
    client.batch_execute(&format!("SELECT pg_advisory_unlock({kind}, {number})")).await.expect("unlocks");
}

/// A running `crossfade backfill`, killed on drop.
pub struct Running(Option<Child>);

impl Running {
    /// With this file.
    pub fn start(config: &std::path::Path, arguments: &[&str]) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_crossfade"));
        command.arg("backfill").args(arguments).arg("--config").arg(config);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running(Some(command.spawn().expect("runs")))
    }

    /// kill -9, and it is gone when this returns.
    pub fn kill(mut self) {
        self.stop();
    }

    /// It has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.0.as_mut().expect("is there").try_wait().expect("waits").is_some()
    }

    /// Waits for its end: how it ended, and all it said.
    pub async fn end(mut self) -> (ExitStatus, String) {
        until("the backfill has ended", async || self.has_ended()).await;
        let mut child = self.0.take().expect("is there");
        let mut said = String::new();
        child.stdout.take().expect("is piped").read_to_string(&mut said).expect("reads");
        child.stderr.take().expect("is piped").read_to_string(&mut said).expect("reads");
        (child.wait().expect("ended"), said)
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

/// SIGSTOP or SIGCONT to a backend.
pub fn signal(pid: i32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(sent.expect("kill runs").success());
}
