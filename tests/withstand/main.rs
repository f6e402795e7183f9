//! What it must withstand: deaths at every step, races forced one by one, a mirror that misbehaves, strict isolation levels. Whatever happens, at
//! the end both sides are equal and nothing that was acknowledged is missing.

#[path = "../common/mod.rs"]
mod common;

mod crashes;
mod growth;
mod hidden;
mod interleavings;
mod isolation;
mod mirror;
mod steps;

use common::link::{Link, Way};
use common::pair::{CONTROL, DATABASE};
use common::{Databases, Pair, Proxy, ProxyConfig};

const SCHEMA: &str = "CREATE TABLE notes (id int PRIMARY KEY, body text);
    CREATE TABLE history (note int, what text);";

/// Sync, which is the COMMIT of a transaction on the mirror.
const SYNC: &[u8] = b"S\0\0\0\x04";

/// Both databases and a proxy in `dual-write` whose ways to both of them are links.
struct Stage {
    pair: Pair,
    old: Link,
    new: Link,
}

impl Stage {
    /// With these lines in the file; nothing is owed.
    async fn start(schema: &str, more: &str) -> Stage {
        let databases = Databases::start(&[]).await;
        databases.run_on_both(schema).await;
        let (old, new) = (Link::to(databases.old.port()).await, Link::to(databases.new.port()).await);
        let url = |link: &Link| format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
        let config = ProxyConfig { old: url(&old), new: url(&new), ..databases.proxy_config("old", more) };
        let mut proxy = Proxy::start(config).await;
        proxy.set_phase("dual-write").await;
        proxy.settle().await;
        Stage { pair: Pair { proxy, databases }, old, new }
    }

    /// One value of old.
    async fn on_old(&self, sql: &str) -> String {
        self.pair.databases.old.run(DATABASE, sql).await.expect("reads").trim().to_owned()
    }

    /// One value of new.
    async fn on_new(&self, sql: &str) -> String {
        self.pair.databases.new.run(DATABASE, sql).await.expect("reads").trim().to_owned()
    }

    /// Rows of the ledger.
    async fn debts(&self) -> u32 {
        self.on_old("SELECT count(*) FROM crossfade.ledger").await.parse().expect("a number")
    }

    /// Holds the mirror's COMMIT of the transaction that brings `marker`; the answer comes when it is held.
    fn hold_mirror_commit(&self, marker: &str) -> tokio::sync::oneshot::Receiver<()> {
        self.new.trip_behind(marker.as_bytes(), Way::ToServer, SYNC, common::link::Trip::HoldBefore)
    }
}
