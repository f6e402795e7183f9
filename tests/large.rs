//! Statements that write more than the proxy may hold: its memory stays bounded with the mirror up, slow and down (law 8).

mod common;

use std::time::Duration;

use common::link::{Flow, Link};
use common::pair::{APP, CONTROL, DATABASE};
use common::{Databases, Proxy, ProxyConfig};
use crossfade::cluster::Stop;
use tokio_postgres::Client;

/// What is written, and what the process may hold at most.
struct Scale {
    rows: i64,
    /// Bytes of each row's text.
    width: i32,
    /// More of the file.
    limits: &'static str,
    /// Most that the process may ever have held.
    peak_bytes: u64,
}

/// A million rows and the limits that everybody has; or fewer and smaller ones, with a buffer that is as much smaller.
fn scale() -> Scale {
    match std::env::var_os("CROSSFADE_PROOF") {
        Some(_) => Scale { rows: 1_000_000, width: 300, limits: "", peak_bytes: 200 << 20 },
        None => Scale { rows: 40_000, width: 300, limits: "limits: { mirror_buffer: 1MiB }", peak_bytes: 90 << 20 },
    }
}

struct Stage {
    databases: Databases,
    proxy: Proxy,
    link: Link,
}

impl Stage {
    async fn start() -> Stage {
        let databases = Databases::start(&[]).await;
        databases.run_on_both("CREATE TABLE big (id int PRIMARY KEY, v text)").await;
        let link = Link::to(databases.new.port()).await;
        let new = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
        let config = databases.proxy_config("old", &format!("mirror: {{ timeout: 5s }}\n{}", scale().limits));
        let mut proxy = Proxy::start(ProxyConfig { new, ..config }).await;
        proxy.set_phase("dual-write").await;
        proxy.settle().await;
        Stage { databases, proxy, link }
    }

    async fn client(&self) -> Client {
        let url = self.proxy.url_as(APP.0, APP.1, DATABASE);
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects");
        tokio::spawn(async move { drop(connection.await) });
        client
    }

    /// An INSERT ... SELECT and two UPDATEs of all rows, one of each protocol.
    async fn write(&self, client: &Client) {
        let Scale { rows, width, .. } = scale();
        client.batch_execute("TRUNCATE big").await.expect("empties");
        let insert = format!("INSERT INTO big SELECT i, repeat('x', {width}) FROM generate_series(1, {rows}) AS i");
        client.batch_execute(&insert).await.expect("inserts");
        self.bounded("INSERT ... SELECT");
        let updated = client.execute("UPDATE big SET v = v || $1", &[&"y"]).await.expect("updates");
        assert_eq!(i64::try_from(updated), Ok(rows));
        self.bounded("UPDATE");
    }

    fn bounded(&self, what: &str) {
        let peak = self.proxy.peak_memory_bytes();
        eprintln!("{what}: peak {} MiB", peak >> 20);
        assert!(peak < scale().peak_bytes, "{what}: the proxy has held {} MiB", peak >> 20);
    }

    async fn equal(&self) {
        self.proxy.settle().await;
        let rows = self.databases.assert_equal().await;
        assert!(rows >= scale().rows.unsigned_abs(), "{rows} rows");
    }
}

#[tokio::test]
async fn with_the_mirror_up_images_stream_ahead() {
    let stage = Stage::start().await;
    let client = stage.client().await;
    stage.write(&client).await;
    let owed =
        stage.databases.old.run(DATABASE, "SELECT count(*) FROM crossfade.ledger WHERE reason IS NOT NULL").await;
    assert_eq!(owed.expect("asks").trim(), "0", "nothing was given up");
    // More old rows than may be held: which keys are gone is not known any more.
    let moved = client.execute("UPDATE big SET id = -id", &[]).await.expect("updates");
    assert_eq!(i64::try_from(moved), Ok(scale().rows));
    stage.bounded("UPDATE of the key");
    stage.equal().await;
}

#[tokio::test]
async fn with_a_slow_mirror_the_statement_waits() {
    let stage = Stage::start().await;
    let client = stage.client().await;
    stage.link.set_both(Flow::Delay(Duration::from_millis(1)));
    stage.write(&client).await;
    stage.link.set_both(Flow::Pass);
    stage.equal().await;
}

#[tokio::test]
async fn with_the_mirror_down_the_table_is_owed() {
    let mut stage = Stage::start().await;
    let client = stage.client().await;
    stage.databases.new.stop(Stop::Immediate).await.expect("stops");
    let Scale { rows, width, .. } = scale();
    let insert = format!("INSERT INTO big SELECT i, repeat('x', {width}) FROM generate_series(1, {rows}) AS i");
    client.batch_execute(&insert).await.expect("inserts");
    stage.bounded("INSERT ... SELECT");
    client.execute("UPDATE big SET v = v || $1", &[&"y"]).await.expect("updates");
    stage.bounded("UPDATE");
    stage.databases.new.start().await.expect("starts");
    stage.equal().await;
}
