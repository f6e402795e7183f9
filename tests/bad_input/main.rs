//! Bad input and load: what no well-behaved client or server sends. A clear error or a closed connection, no crash, bounded memory, other
//! sessions unaffected, and both sides equal afterwards.

#[path = "../common/mod.rs"]
mod common;
mod garbage;
mod server;
mod silent;
mod slow;
mod soup;
mod texts;
mod vanish;

use common::pair::{APP, DATABASE};
use common::raw::{self, RawClient};
use common::{Databases, Proxy, ProxyConfig};

/// What bad clients write.
const SCHEMA: &str = "CREATE TABLE notes (id int PRIMARY KEY, body text);
    CREATE TABLE blobs (id int PRIMARY KEY, data bytea);
    CREATE TABLE witness (id int PRIMARY KEY, seen int NOT NULL);
    INSERT INTO witness VALUES (1, 0);";

/// The most that the proxy may hold, whatever it is sent: the settings' buffers for a few sessions, and what a build without optimisation takes.
const MEMORY_MAX: u64 = 200 << 20;

/// Two servers that ask for no password, the proxy before them, and a session that must not notice anything.
struct Stage {
    proxy: Proxy,
    databases: Databases,
    witness: tokio_postgres::Client,
    seen: i32,
}

impl Stage {
    /// In this phase, with nothing owed; `more` lines in the proxy's file.
    async fn start(phase: &str, more: &str) -> Stage {
        Stage::with("", phase, more).await
    }

    /// The same, with more in the databases.
    async fn with(schema: &str, phase: &str, more: &str) -> Stage {
        let databases = Databases::start_trusting().await;
        databases.run_on_both(&format!("{SCHEMA}\n{schema}")).await;
        let config = databases.proxy_config("old", &format!("auth: trust\n{more}"));
        Stage::over(databases, config, phase).await
    }

    /// The same over other ways to the servers, as `config` has them.
    async fn over(databases: Databases, config: ProxyConfig, phase: &str) -> Stage {
        let mut proxy = Proxy::start(config).await;
        if phase != "old" {
            proxy.set_phase(phase).await;
            proxy.settle().await;
        }
        let url = proxy.url_as(APP.0, APP.1, DATABASE);
        let (witness, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects");
        tokio::spawn(async move { drop(connection.await) });
        Stage { proxy, databases, witness, seen: 0 }
    }

    /// A bad client, logged in.
    async fn client(&self) -> RawClient {
        RawClient::connect(self.proxy.port(), None, &login()).await.0
    }

    /// Another session's work goes on, and a new one is let in.
    async fn others_go_on(&mut self) {
        self.seen += 1;
        let counted = self.witness.execute("UPDATE witness SET seen = seen + 1", &[]).await.expect("others write");
        assert_eq!(counted, 1);
        let mut fresh = self.client().await;
        fresh.send(&raw::query("SELECT seen FROM witness")).await;
        let frames = fresh.until_ready(1).await;
        let expected = self.seen.to_string();
        let row = frames.iter().find(|frame| frame.tag == b'D').expect("a row");
        assert_eq!(&row.body[6..], expected.as_bytes(), "others read what was written");
        fresh.send(&raw::terminate()).await;
    }

    /// The end of every story: nobody else has noticed, nothing crashed, memory stayed bounded, and both sides are equal.
    async fn end(mut self) {
        self.others_go_on().await;
        let log = self.proxy.log();
        assert!(!log.contains("panicked"), "a panic:\n{log}");
        let peak = self.proxy.peak_memory_bytes();
        assert!(peak < MEMORY_MAX, "the proxy's peak was {peak} bytes");
        if self.proxy.holds("dual-write").await {
            self.proxy.settle().await;
            self.databases.assert_equal().await;
        }
    }

    /// Sessions of the application on old that are in a transaction.
    async fn in_transaction(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND xact_start IS NOT NULL";
        let control = self.databases.old.client(DATABASE).await.expect("connects");
        control.query_one(sql, &[&APP.0]).await.expect("reads").get(0)
    }
}

/// The startup packet of the application's role.
fn login() -> Vec<u8> {
    raw::startup(raw::V3_0, &[("user", APP.0), ("database", DATABASE)])
}
