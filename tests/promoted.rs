//! C7 and B1: a side fails over to a standby that was behind. What it may have lost is owed, or looked at, before anybody counts on it; and a proxy that starts then believes
//! no row that may be an older one.

mod common;

use std::process::Stdio;

use common::link::Link;
use common::pair::{APP, CONTROL, DATABASE};
use common::standby::Standby;
use common::{Databases, Proxy, ProxyConfig, until};
use crossfade::cluster::Cluster;
use crossfade::cluster::processes::Watchdog;
use crossfade::phase::Side;
use tokio_postgres::{Client, NoTls};

const SCHEMA: &str = "CREATE TABLE notes (id int PRIMARY KEY, body text); CREATE TABLE events (what text)";

/// All that a server has of both tables.
const ALL: &str =
    "SELECT coalesce(string_agg(n::text, ' ' ORDER BY id), '') || '|' || (SELECT count(*) FROM events) FROM notes n";

/// Two databases, the proxy, and a line to that side, which can lead to its standby.
struct Stage {
    databases: Databases,
    link: Link,
    proxy: Proxy,
    side: Side,
}

impl Stage {
    async fn start(side: Side, phase: &str) -> Stage {
        let databases = Databases::start(&[]).await;
        databases.run_on_both(SCHEMA).await;
        let cluster = if side == Side::Old { &databases.old } else { &databases.new };
        let link = Link::to(cluster.port()).await;
        let url = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
        let config = databases.proxy_config("old", "mirror: { timeout: 1s }");
        let config = match side {
            Side::Old => ProxyConfig { old: url, ..config },
            Side::New => ProxyConfig { new: url, ..config },
        };
        let mut proxy = Proxy::start(config).await;
        proxy.set_phase(phase).await;
        proxy.settle().await;
        let stage = Stage { databases, link, proxy, side };
        stage.looked_at().await;
        stage
    }

    fn cluster(&mut self) -> &mut Cluster {
        if self.side == Side::Old { &mut self.databases.old } else { &mut self.databases.new }
    }

    fn other(&self) -> &Cluster {
        if self.side == Side::Old { &self.databases.new } else { &self.databases.old }
    }

    /// The proxy has looked at this life of the side.
    async fn looked_at(&self) {
        let text = "SELECT count(*) FROM crossfade.life l JOIN crossfade.incarnation i ON i.id = l.incarnation";
        let side = if self.side == Side::Old { &self.databases.old } else { &self.databases.new };
        until("its life was looked at", async || side.run(DATABASE, text).await.is_ok_and(|said| said.trim() == "1"))
            .await;
    }

    /// A standby that has all that was written by now, and nothing of what comes later.
    async fn standby(&mut self) -> Standby {
        let standby = Standby::of(self.cluster());
        let behind = "SELECT coalesce(bool_and(replay_lsn >= pg_current_wal_lsn()), false) FROM pg_stat_replication WHERE state = 'streaming'";
        let cluster = self.cluster();
        until("the standby has caught up", async || cluster.run(DATABASE, behind).await.expect("reads").trim() == "t")
            .await;
        standby.stop();
        standby
    }

    /// The primary dies, and the standby takes its place.
    async fn fail_over(&mut self, standby: &Standby) {
        self.cluster().kill9();
        standby.start();
        standby.promote();
        self.link.turn_to(standby.port());
    }

    async fn client(&self) -> Client {
        let url = self.proxy.url_as(APP.0, APP.1, DATABASE);
        let mut found = None;
        until("a client is served", async || {
            let Ok((client, connection)) = tokio_postgres::connect(&url, NoTls).await else { return false };
            tokio::spawn(async move { drop(connection.await) });
            found = Some(client);
            true
        })
        .await;
        found.expect("was found")
    }

    /// Writes until it is acknowledged.
    async fn write(&self, sql: &str) {
        until(sql, async || self.client().await.batch_execute(sql).await.is_ok()).await;
    }
}

async fn all(cluster: &Cluster) -> String {
    cluster.run(DATABASE, ALL).await.expect("reads").trim().to_owned()
}

/// C7: new lacks rows that nothing owed any more. All tables are owed, and no read is answered without them.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_was_promoted_is_owed_all_tables() {
    let mut stage = Stage::start(Side::New, "dual-read").await;
    stage.write("INSERT INTO notes SELECT n, 'both have it' FROM generate_series(1, 10) n").await;
    stage.proxy.settle().await;
    let standby = stage.standby().await;
    stage.write("INSERT INTO notes SELECT n, 'the standby lacks it' FROM generate_series(11, 20) n").await;
    stage
        .write("UPDATE notes SET body = 'the standby has an older one' WHERE id = 1; DELETE FROM notes WHERE id = 2")
        .await;
    stage.proxy.settle().await;
    let ledger = "SELECT count(*) FROM crossfade.ledger";
    assert_eq!(stage.databases.old.run(DATABASE, ledger).await.expect("reads").trim(), "0", "nothing is owed");
    assert_eq!(all(&stage.databases.old).await, all(&stage.databases.new).await);
    // Whoever would enter the debts waits, and new can be read meanwhile.
    let ledger = stage.databases.old.client(DATABASE).await.expect("connects");
    ledger.batch_execute("BEGIN; LOCK TABLE crossfade.ledger IN SHARE MODE").await.expect("locks");
    stage.fail_over(&standby).await;
    assert_eq!(standby.says(DATABASE, "SELECT count(*) FROM notes").await, "10", "it is behind");
    let client = stage.client().await;
    let no_read_misses_a_row = async || {
        for _ in 0..20 {
            let row = client
                .query_one("SELECT count(*), min(id) FILTER (WHERE id > 1) FROM notes", &[])
                .await
                .expect("reads");
            assert_eq!((row.get::<_, i64>(0), row.get::<_, i32>(1)), (19, 3), "a read that lacks a row was answered");
        }
    };
    let incarnation = "SELECT count(*) FROM crossfade.incarnation";
    until("its new life has a name", async || {
        no_read_misses_a_row().await;
        standby.says(DATABASE, incarnation).await == "1"
    })
    .await;
    let begun = std::time::Instant::now();
    while begun.elapsed() < std::time::Duration::from_secs(2) {
        no_read_misses_a_row().await;
    }
    ledger.batch_execute("COMMIT").await.expect("lets go");
    until("all is paid, and no read has missed a row", async || {
        no_read_misses_a_row().await;
        standby.says(DATABASE, ALL).await == all(&stage.databases.old).await
    })
    .await;
    // A table without a key is copied when somebody asks for it.
    let copied = stage.proxy.crossfade(&["repair", "--table", "events"]).await;
    assert!(copied.status.code() != Some(2), "{copied:?}");
    until("it is told", async || {
        stage.proxy.log().contains("a database has begun a new life side=new has=\"promoted\"")
    })
    .await;
    assert!(stage.proxy.metrics("crossfade_new_lives_total{side=\"new\"}").await >= 1.0);
    stage.proxy.settle().await;
    let served = stage.proxy.metrics("crossfade_read_served_total{side=\"new\"}").await;
    until("new answers again", async || {
        client.query("SELECT count(*) FROM notes", &[]).await.expect("reads");
        stage.proxy.metrics("crossfade_read_served_total{side=\"new\"}").await > served
    })
    .await;
}

/// C7: old lacks rows that were acknowledged, and new has them. Nothing deletes them there, and no authority moves, until somebody has looked.
#[tokio::test(flavor = "multi_thread")]
async fn what_only_the_mirror_has_of_a_promoted_authority_is_not_deleted() {
    let mut stage = Stage::start(Side::Old, "dual-write").await;
    stage.write("INSERT INTO notes SELECT n, 'both have it' FROM generate_series(1, 10) n").await;
    stage.proxy.settle().await;
    stage.proxy.verify().await;
    let standby = stage.standby().await;
    stage.write("INSERT INTO notes VALUES (11, 'the standby lacks it')").await;
    stage.proxy.settle().await;
    stage.fail_over(&standby).await;
    let doubt = "SELECT count(*) FROM crossfade.life WHERE doubt LIKE 'old was promoted%'";
    until("it is in doubt", async || standby.says(DATABASE, doubt).await == "1").await;
    assert!(
        stage.proxy.log().contains("a database has begun a new life side=old has=\"promoted\""),
        "{}",
        stage.proxy.log()
    );
    // A write out of sight owes the whole table: a walk would delete what only new has. What is owed by key is paid.
    stage.write("DO $$ BEGIN INSERT INTO notes VALUES (12, 'out of sight'); END $$").await;
    stage.write("INSERT INTO notes VALUES (13, 'in sight')").await;
    let refused = "SELECT count(*) FROM crossfade.ledger WHERE error LIKE '%verify --repair --force%'";
    until("the walk is refused", async || standby.says(DATABASE, refused).await == "1").await;
    let found =
        stage.other().run(DATABASE, "SELECT string_agg(id::text, ' ' ORDER BY id) FROM notes WHERE id > 10").await;
    assert_eq!(found.expect("reads").trim(), "11 13");
    for arguments in [&["phase", "new-primary"][..], &["phase", "new-primary", "--force", "--reason", "must be"]] {
        let moved = stage.proxy.crossfade(arguments).await;
        let said = String::from_utf8_lossy(&moved.stdout).into_owned();
        assert!(!moved.status.success() && said.contains("old was promoted or restored"), "{said}");
    }
    // Its own doors stay open: what verify shows, and what it asks for before it deletes.
    let looked = stage.proxy.crossfade(&["verify", "--json"]).await;
    let said = String::from_utf8_lossy(&looked.stdout).into_owned();
    assert!(looked.status.code() == Some(1) && said.contains("11"), "{said}");
    for arguments in [&["verify", "--repair"][..], &["backfill"], &["repair", "--table", "events"]] {
        let refused = stage.proxy.crossfade(arguments).await;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            refused.status.code() == Some(2) && said.contains("old was promoted or restored"),
            "{arguments:?} {said}"
        );
    }
    let given_up = stage.proxy.crossfade(&["verify", "--repair", "--force"]).await;
    assert_ne!(given_up.status.code(), Some(2), "{given_up:?}");
    stage.proxy.settle().await;
    until("both are equal", async || standby.says(DATABASE, ALL).await == all(&stage.databases.new).await).await;
    assert_eq!(standby.says(DATABASE, "SELECT count(*) FROM notes").await, "12");
    stage.proxy.set_phase("new-primary").await;
}

/// B1: a standby that does not know of the last move, and a proxy that starts while the other side is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_may_be_an_older_one_is_not_believed_alone() {
    let mut stage = Stage::start(Side::Old, "old").await;
    let standby = stage.standby().await;
    stage.proxy.set_phase("dual-write").await;
    stage.write("INSERT INTO notes VALUES (1, 'mirrored')").await;
    stage.proxy.settle().await;
    stage.proxy.kill9();
    stage.databases.new.stop(crossfade::cluster::Stop::Fast).await.expect("stops");
    stage.fail_over(&standby).await;
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_crossfade"))
        .args(["run", "--config"])
        .arg(stage.proxy.config_path())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut child = child.expect("runs");
    let mut watchdog = Watchdog::over(child.id()).expect("guards");
    let says = async || stage.proxy.http("/status").await.is_some_and(|(_, said)| said.contains("phase --accept old"));
    until("it says why it serves nobody", says).await;
    assert_eq!(stage.proxy.http("/readyz").await.expect("answers").0, 503);
    stage.databases.new.start().await.expect("starts");
    let holds = "SELECT phase || ' ' || authority FROM crossfade.migration";
    until("the later row holds", async || {
        standby.says(DATABASE, "SELECT count(*) FROM pg_class WHERE oid = to_regclass('crossfade.migration')").await
            == "1"
            && standby.says(DATABASE, holds).await == "dual-write old"
    })
    .await;
    until("clients are served", async || stage.proxy.http("/readyz").await.is_some_and(|(code, _)| code == 200)).await;
    child.kill().expect("kills");
    child.wait().expect("waits");
    watchdog.release();
    // Once more, and new is gone for good.
    stage.databases.new.kill9();
    standby.stop();
    standby.start();
    stage.link.turn_to(standby.port());
    let begun = "DELETE FROM crossfade.incarnation";
    standby.says(DATABASE, begun).await;
    let accepted = stage.proxy.crossfade(&["phase", "--accept", "old", "--reason", "new is lost"]).await;
    let said = String::from_utf8_lossy(&accepted.stdout).into_owned();
    assert!(accepted.status.success() && said.contains("accepted as it is, phase dual-write"), "{accepted:?}");
    stage.proxy.run().await;
    stage.write("INSERT INTO notes VALUES (2, 'old alone')").await;
}
