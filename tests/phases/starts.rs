//! How a proxy finds out which phase holds: the rows in the databases, whoever is down, wherever a move was cut short.

use std::process::Stdio;
use std::time::Duration;

use crossfade::cluster::Stop;
use crossfade::cluster::processes::Watchdog;

use crate::common::pair::DATABASE;
use crate::common::{Databases, Pair, Proxy, until};
use crate::{SCHEMA, status, value, write};

#[tokio::test]
async fn the_row_says_what_holds_and_the_file_what_is_wanted() {
    let mut pair = Pair::start("old", SCHEMA, "").await;
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.set_phase("new-primary").await;
    write(&pair.client().await, "new-primary").await;
    // The file is edited while no proxy runs.
    pair.proxy.kill9();
    pair.proxy.request_phase("dual-read");
    pair.proxy.run().await;
    assert!(pair.proxy.log().contains("this phase holds phase=new-primary epoch=2"), "{}", pair.proxy.log());
    until("then the file is followed", async || pair.proxy.holds("dual-read").await).await;
    write(&pair.client().await, "dual-read").await;
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn a_proxy_that_starts_while_the_mirror_is_down_serves_at_once() {
    let mut pair = Pair::start("old", SCHEMA, "mirror: { timeout: 500ms }").await;
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.settle().await;
    pair.proxy.kill9();
    pair.databases.new.stop(Stop::Fast).await.expect("stops");
    pair.proxy.run().await;
    let client = pair.client().await;
    write(&client, "new is down").await;
    until("the writes are owed", async || pair.proxy.metrics("crossfade_debt_keys").await >= 4.0).await;
    assert_eq!(status(&pair.proxy).await["mirror_up"], false);
    let shown = pair.proxy.crossfade(&["status"]).await;
    assert!(shown.status.success() && String::from_utf8_lossy(&shown.stdout).contains("keys owed"), "{shown:?}");
    pair.databases.new.start().await.expect("starts");
    until("the mirror is back", async || status(&pair.proxy).await["mirror_up"] == true).await;
    write(&client, "new is back").await;
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn a_proxy_that_starts_while_old_is_down_waits_and_says_why() {
    let mut databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    for phase in ["old", "dual-write"] {
        proxy.set_phase(phase).await;
        proxy.kill9();
        databases.old.stop(Stop::Fast).await.expect("stops");
        let child = std::process::Command::new(env!("CARGO_BIN_EXE_crossfade"))
            .args(["run", "--config"])
            .arg(proxy.config_path())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("runs");
        let mut watchdog = Watchdog::over(child.id()).expect("guards");
        let mut child = Killed(child);
        until("its HTTP answers", async || proxy.http("/healthz").await.is_some_and(|(code, _)| code == 200)).await;
        assert_eq!(proxy.http("/readyz").await.expect("answers").0, 503);
        let says = async || status(&proxy).await["waiting_for"].to_string().contains("cannot connect to");
        until("it says why", says).await;
        // A client waits; nobody tells it that there is no server.
        let url = proxy.url_as(crate::common::pair::APP.0, crate::common::pair::APP.1, DATABASE);
        let client =
            tokio::spawn(async move { tokio_postgres::connect(&url, tokio_postgres::NoTls).await.map(|_| ()) });
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!client.is_finished());
        databases.old.start().await.expect("starts");
        until("it is ready", async || proxy.http("/readyz").await.is_some_and(|(code, _)| code == 200)).await;
        client.await.expect("joins").expect("is served in the end");
        child.0.kill().expect("kills");
        child.0.wait().expect("waits");
        watchdog.release();
        proxy.run().await;
    }
}

/// Kills on drop.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_move_that_was_cut_short_is_finished_and_a_backup_of_the_past_is_not_believed() {
    let mut pair = Pair::start("old", SCHEMA, "").await;
    pair.proxy.set_phase("dual-write").await;
    write(&pair.client().await, "dual-write").await;
    pair.proxy.settle().await;
    pair.proxy.kill9();
    // The mover died between the pointer on old and the claim on new; sequences come before both.
    let sequences = "SELECT setval('photos_id_seq', 1000), setval('users_id_seq', 1000), setval('tickets', 10001)";
    pair.databases.new.run(DATABASE, sequences).await.expect("sets");
    let pointer = "UPDATE crossfade.migration SET epoch = 2, phase = 'new-primary', authority = 'new'";
    pair.databases.old.run(DATABASE, pointer).await.expect("writes");
    pair.proxy.request_phase("new-primary");
    pair.proxy.run().await;
    assert!(pair.proxy.holds("new-primary").await, "always forward");
    let row = "SELECT epoch || phase || authority FROM crossfade.migration";
    assert_eq!(pair.databases.new.run(DATABASE, row).await.unwrap().trim(), "2new-primarynew", "the claim was written");
    let client = pair.client().await;
    assert_eq!(value(&client, "SHOW port").await, pair.databases.new.port().to_string());
    write(&client, "new-primary").await;
    pair.settle_and_assert_equal().await;
    // Before the pointer: nothing has happened.
    pair.proxy.kill9();
    pair.proxy.run().await;
    assert!(pair.proxy.holds("new-primary").await);
    // A backup of old claims an epoch that has long passed.
    pair.proxy.kill9();
    let backup = "UPDATE crossfade.migration SET epoch = 1, phase = 'dual-write', authority = 'old'";
    pair.databases.old.run(DATABASE, backup).await.expect("writes");
    pair.proxy.run().await;
    assert!(pair.proxy.holds("new-primary").await);
    // A row of a later epoch is never overwritten by a move that knows less.
    let later = "UPDATE crossfade.migration SET epoch = 99";
    pair.databases.old.run(DATABASE, later).await.expect("writes");
    pair.proxy.request_phase("dual-write");
    until("the move is refused", async || {
        status(&pair.proxy).await["waiting_for"].to_string().contains("passed epoch")
    })
    .await;
    assert!(pair.proxy.holds("new-primary").await);
    write(&pair.client().await, "goes on").await;
    pair.settle_and_assert_equal().await;
}
