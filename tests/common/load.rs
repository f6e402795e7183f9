//! Clients that write until they are stopped, through whatever happens, and know what was acknowledged to them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio_postgres::NoTls;

use super::pair::DATABASE;
use super::{Databases, until};

/// What the clients of [`Load`] write: rows that are inserted, updated and deleted, and one row that all fight for.
pub const SCHEMA: &str =
    "CREATE TABLE notes (id bigint PRIMARY KEY, writer int NOT NULL, version int NOT NULL, body text, \
        made timestamptz NOT NULL DEFAULT clock_timestamp());
    CREATE TABLE counters (name text PRIMARY KEY, n bigint NOT NULL);
    CREATE TABLE history (at timestamptz NOT NULL DEFAULT clock_timestamp(), note bigint, what text);
    INSERT INTO counters VALUES ('all', 0);";

/// Writers that go on until they are stopped, and remember what was acknowledged to them.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    writers: Vec<tokio::task::JoinHandle<Written>>,
}

/// What one writer knows.
#[derive(Default)]
pub struct Written {
    /// Notes whose insert was acknowledged, and that were not touched by a transaction of unknown outcome since.
    pub kept: Vec<i64>,
    /// Notes whose delete was acknowledged.
    pub deleted: Vec<i64>,
    /// Acknowledged additions to the counter.
    pub counted: u64,
    /// Transactions of which the writer was not told how they ended.
    pub unknown: u64,
    /// Errors that a server or the proxy reported.
    pub errors: Vec<String>,
}

impl Load {
    /// So many of them, each with a connection of its own.
    pub fn start(url: &str, writers: i64) -> Load {
        Load::of(url, 0..writers)
    }

    /// These: several loads beside each other need writers of different numbers.
    pub fn of(url: &str, writers: std::ops::Range<i64>) -> Load {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let writers = writers
            .map(|writer| tokio::spawn(write(url.to_owned(), writer, stop.clone(), acknowledged.clone())))
            .collect();
        Load { stop, acknowledged, writers }
    }

    /// Waits until this many more transactions have been acknowledged.
    pub async fn goes_on(&self, transactions: u64) {
        let enough = self.acknowledged.load(Ordering::Relaxed) + transactions;
        until("transactions are acknowledged", async || self.acknowledged.load(Ordering::Relaxed) >= enough).await;
    }

    /// Stops them; what all of them know.
    pub async fn end(self) -> Written {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Written::default();
        for writer in self.writers {
            let one = writer.await.expect("a writer does not panic");
            all.kept.extend(one.kept);
            all.deleted.extend(one.deleted);
            all.counted += one.counted;
            all.unknown += one.unknown;
            all.errors.extend(one.errors);
        }
        all
    }
}

async fn write(url: String, writer: i64, stop: Arc<AtomicBool>, acknowledged: Arc<AtomicU64>) -> Written {
    let mut written = Written::default();
    let mut next = writer * 1_000_000_000;
    while !stop.load(Ordering::Relaxed) {
        // The proxy may be dead for the moment.
        let Ok((mut client, connection)) = tokio_postgres::connect(&url, NoTls).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        tokio::spawn(async move { drop(connection.await) });
        while !stop.load(Ordering::Relaxed) {
            next += 1;
            let victim = (next % 3 == 0).then(|| written.kept.pop()).flatten();
            match one_transaction(&mut client, next, writer, victim).await {
                Ok(()) => {
                    acknowledged.fetch_add(1, Ordering::Relaxed);
                    written.counted += 1;
                    written.kept.push(next);
                    written.deleted.extend(victim);
                }
                Err(error) => {
                    if let Some(reported) = error.as_db_error() {
                        written.errors.push(reported.to_string());
                    }
                    // The note, and the victim, may be there or not: nobody knows, and nothing is claimed of them.
                    written.unknown += 1;
                    break;
                }
            }
        }
    }
    written
}

async fn one_transaction(
    client: &mut tokio_postgres::Client,
    note: i64,
    writer: i64,
    victim: Option<i64>,
) -> Result<(), tokio_postgres::Error> {
    let tx = client.transaction().await?;
    let writer = i32::try_from(writer).expect("few writers");
    tx.execute("INSERT INTO notes (id, writer, version, body) VALUES ($1, $2, 1, 'new')", &[&note, &writer]).await?;
    tx.execute("UPDATE notes SET version = version + 1, body = repeat('x', 20) WHERE id = $1", &[&note]).await?;
    if let Some(victim) = victim {
        tx.execute("DELETE FROM notes WHERE id = $1", &[&victim]).await?;
    }
    tx.execute("INSERT INTO history (note, what) VALUES ($1, 'written')", &[&note]).await?;
    tx.execute("UPDATE counters SET n = n + 1 WHERE name = 'all'", &[]).await?;
    tx.commit().await
}

/// What was acknowledged is there, what was deleted is not, on both sides; and both sides are equal in every row.
pub async fn assert_nothing_lost(databases: &Databases, written: &Written) {
    databases.assert_equal().await;
    for side in [&databases.old, &databases.new] {
        let client = side.client(DATABASE).await.expect("connects");
        let there = |ids: Vec<i64>| {
            let client = &client;
            async move { client.query("SELECT id FROM notes WHERE id = ANY ($1)", &[&ids]).await.expect("reads").len() }
        };
        assert_eq!(there(written.kept.clone()).await, written.kept.len(), "an acknowledged note is missing");
        assert_eq!(there(written.deleted.clone()).await, 0, "a deleted note is back");
        let counted: i64 = client.query_one("SELECT n FROM counters", &[]).await.expect("reads").get(0);
        let counted = u64::try_from(counted).expect("it only grows");
        let possible = written.counted..=written.counted + written.unknown;
        assert!(possible.contains(&counted), "{counted} counted, {possible:?} acknowledged");
    }
}
