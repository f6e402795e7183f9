//! A shop: three tables with years of data, and clients that write to them.
#![allow(dead_code, reason = "each test binary uses a part of this")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::Proxy;
use crate::common::pair::{APP, DATABASE};
use tokio_postgres::NoTls;

/// Accounts that foreign keys point to, and entries of theirs with a composite key.
pub const SHOP: &str = "CREATE TABLE accounts (aid bigint PRIMARY KEY, balance numeric NOT NULL, filler char(60) NOT NULL);
    CREATE TABLE entries (aid bigint REFERENCES accounts ON DELETE CASCADE, at timestamptz, what text COLLATE \"C\", amount int, PRIMARY KEY (aid, at, what));
    CREATE TABLE serials (id uuid PRIMARY KEY, n serial, tags text[], doc jsonb);";

/// So many accounts. Of the others together a share of 2 in 5.
pub fn years(rows: u64) -> String {
    format!(
        "INSERT INTO accounts SELECT n, n / 7.0, 'account ' || n FROM generate_series(1, {rows}) n;
         INSERT INTO entries SELECT n, timestamptz '2020-01-01' + n * interval '1 minute', 'opening', n % 100 FROM generate_series(1, {rows} / 5) n;
         INSERT INTO serials (id, tags, doc) SELECT md5(n::text)::uuid, ARRAY['a', n::text], jsonb_build_object('n', n) FROM generate_series(1, {rows} / 5) n;
         ANALYZE;"
    )
}

/// Clients that write where the backfill copies.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    /// So many clients of the proxy, over so many accounts.
    pub fn start(proxy: &Proxy, clients: u64, rows: u64) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let url = proxy.url_as(APP.0, APP.1, DATABASE);
        let clients = (0..clients)
            .map(|client| tokio::spawn(write(url.clone(), client + 1, rows, stop.clone(), done.clone())))
            .collect();
        Load { stop, done, clients }
    }

    /// Ends them. Returns the transactions that were acknowledged.
    pub async fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.expect("a client does not panic");
        }
        self.done.load(Ordering::Relaxed)
    }
}

async fn write(url: String, mut seed: u64, rows: u64, stop: Arc<AtomicBool>, done: Arc<AtomicU64>) {
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("connects to the proxy");
    tokio::spawn(async move { drop(connection.await) });
    while !stop.load(Ordering::Relaxed) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (at, what) = ((seed >> 33) % rows + 1, (seed >> 20) % 8);
        let sql = match what {
            0 => format!("UPDATE accounts SET balance = balance + 1 WHERE aid = {at}"),
            // With its entries, by cascade.
            1 => format!("DELETE FROM entries WHERE aid = {at}; DELETE FROM accounts WHERE aid = {at}"),
            2 => format!(
                "INSERT INTO accounts VALUES ({at}, 0, 'again') ON CONFLICT (aid) DO UPDATE SET balance = accounts.balance - 1"
            ),
            3 => format!(
                "INSERT INTO entries SELECT {at}, clock_timestamp(), 'written', 1 WHERE EXISTS (SELECT FROM accounts WHERE aid = {at} FOR KEY SHARE)"
            ),
            // Keys that change, and change back.
            4 => format!("UPDATE serials SET id = md5('moved {at}')::uuid WHERE id = md5('{at}')::uuid"),
            5 => format!("UPDATE serials SET id = md5('{at}')::uuid WHERE id = md5('moved {at}')::uuid"),
            6 => format!("DELETE FROM serials WHERE id = md5('{at}')::uuid"),
            _ => format!(
                "INSERT INTO serials (id, doc) VALUES (md5('{at}')::uuid, '{{\"again\": true}}') ON CONFLICT (id) DO NOTHING"
            ),
        };
        match client.batch_execute(&format!("BEGIN; {sql}; COMMIT")).await {
            Ok(()) => drop(done.fetch_add(1, Ordering::Relaxed)),
            // Two clients that delete and insert what refers to each other; a key that is taken.
            Err(error) => {
                let code = error.code().map(|code| code.code().to_owned());
                assert!(matches!(code.as_deref(), Some("40P01" | "23503" | "23505")), "{sql}: {error:?}");
                client.batch_execute("ROLLBACK").await.expect("rolls back");
            }
        }
    }
}
