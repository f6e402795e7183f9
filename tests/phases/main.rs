//! Stories of the phase: the file asks, the databases say what holds, sessions go along. Real servers, the built program.

#[path = "../common/mod.rs"]
mod common;

mod carried;
mod fence;
mod starts;

use std::fs;
use std::time::Duration;

use common::pair::DATABASE;
use common::{Databases, Pair, Proxy, until};
use crossfade::cluster::Stop;
use tokio_postgres::{Client, SimpleQueryMessage};

const SCHEMA: &str = "CREATE TABLE photos (id serial PRIMARY KEY, name text NOT NULL);
    CREATE TABLE users (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL);
    CREATE SEQUENCE tickets INCREMENT 10 CACHE 5;
    CREATE TABLE orders (ticket bigint PRIMARY KEY DEFAULT nextval('tickets'), name text NOT NULL);
    CREATE TABLE history (at timestamptz NOT NULL DEFAULT clock_timestamp(), what text);
    INSERT INTO photos (name) SELECT 'before ' || n FROM generate_series(1, 20) n;
    INSERT INTO history (what) SELECT 'before ' || n FROM generate_series(1, 5) n;";

/// The first column of the first row.
pub(crate) async fn value(client: &Client, sql: &str) -> String {
    let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let row = messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    row.unwrap_or_else(|| panic!("{sql}: no value"))
}

/// One transaction in each way of writing, named after the phase.
pub(crate) async fn write(client: &Client, name: &str) {
    client.execute("INSERT INTO photos (name) VALUES ($1)", &[&name]).await.expect("an autocommit insert");
    let script = format!(
        "BEGIN; INSERT INTO users (name) VALUES ('{name}'); INSERT INTO orders (name) VALUES ('{name}'); \
         UPDATE photos SET name = name || '!' WHERE id = 1; INSERT INTO history (what) VALUES ('{name}'); COMMIT"
    );
    client.batch_execute(&script).await.expect("a transaction");
}

/// What the proxy says of itself.
pub(crate) async fn status(proxy: &Proxy) -> serde_json::Value {
    let (code, body) = proxy.http("/status").await.expect("answers");
    assert_eq!(code, 200);
    serde_json::from_str(&body).expect("JSON")
}

/// Waits until the proxy says why the phase stays.
async fn waits_for(proxy: &Proxy, why: &str) {
    let mut last = String::new();
    let found = async || {
        last = status(proxy).await["waiting_for"].to_string();
        last.contains(why)
    };
    until(&format!("the move waits for {why:?}"), found).await;
}

fn hangup(proxy: &Proxy) {
    let pid = proxy.pid().to_string();
    assert!(std::process::Command::new("kill").args(["-HUP", pid.as_str()]).status().expect("runs").success());
}

#[tokio::test]
async fn through_all_phases_and_back_with_writes_in_each() {
    let mut pair = Pair::start("old", SCHEMA, "").await;
    let (busy, idle) = (pair.client().await, pair.client().await);
    write(&busy, "old").await;
    let mut tickets = Vec::new();
    let way = [
        "dual-write",
        "dual-read",
        "new-primary",
        "old-read-only",
        "new",
        "new-primary",
        "dual-write",
        "dual-read",
        "old",
        "dual-write",
    ];
    for (epoch, phase) in (1..).zip(way) {
        pair.proxy.set_phase(phase).await;
        write(&busy, phase).await;
        let (old, new) = (&pair.databases.old, &pair.databases.new);
        let authority = if matches!(phase, "old" | "dual-write" | "dual-read") { old } else { new };
        let row = "SELECT epoch || ' ' || phase || ' ' || authority FROM crossfade.migration";
        let said = authority.run(DATABASE, row).await.expect("reads");
        let name = if std::ptr::eq(authority, old) { "old" } else { "new" };
        assert_eq!(said.trim(), format!("{epoch} {phase} {name}"));
        tickets.push(value(&busy, "SELECT max(ticket) FROM orders").await.parse::<i64>().expect("a number"));
        if matches!(phase, "dual-write" | "dual-read" | "new-primary") {
            pair.settle_and_assert_equal().await;
        } else {
            let count = format!("SELECT count(*) FROM users WHERE name = '{phase}'");
            let counts = (old.run(DATABASE, &count).await.unwrap(), new.run(DATABASE, &count).await.unwrap());
            assert_ne!(counts.0, counts.1, "in {phase} only one side is written");
        }
    }
    assert!(tickets.is_sorted_by(|a, b| a < b), "a sequence went back: {tickets:?}");
    // One in `old`, one in each phase after it; nothing twice, and the idle client is still there.
    assert_eq!(value(&idle, "SELECT count(*) FROM users").await, "11");
    assert_eq!(value(&idle, "SELECT count(*) FROM history").await, "16");
    assert_eq!(
        value(&idle, "SELECT length(name) - length(replace(name, '!', '')) FROM photos WHERE id = 1").await,
        "11"
    );
}

#[tokio::test]
async fn the_file_is_followed_however_it_changes_and_a_bad_one_is_refused() {
    let databases = Databases::start(&[]).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    let path = proxy.config_path();
    let text = fs::read_to_string(&path).expect("reads");
    let with = |phase: &str| text.replace("phase: old", &format!("phase: {phase}"));
    // In place.
    fs::write(&path, with("dual-write")).expect("writes");
    until("an edit in place holds", async || proxy.holds("dual-write").await).await;
    // A rename over it.
    proxy.set_phase("dual-read").await;
    // A ConfigMap: the file is a link through a link to a folder, which changes.
    let folder = path.parent().expect("has one").to_owned();
    for (version, phase) in [("..v1", "dual-read"), ("..v2", "new-primary")] {
        fs::create_dir(folder.join(version)).expect("makes");
        fs::write(folder.join(version).join("crossfade.yaml"), with(phase)).expect("writes");
    }
    std::os::unix::fs::symlink("..v1", folder.join("..data")).expect("links");
    std::os::unix::fs::symlink("..data/crossfade.yaml", folder.join("link")).expect("links");
    fs::rename(folder.join("link"), &path).expect("renames");
    std::os::unix::fs::symlink("..v2", folder.join("..data_tmp")).expect("links");
    fs::rename(folder.join("..data_tmp"), folder.join("..data")).expect("renames");
    proxy.reaches("new-primary").await;
    // A bad file: what was read before stays in force, and is said.
    fs::write(&path, with("dual-write").replace("listen:", "lisssten:")).expect("writes");
    until("the failure is counted", async || proxy.metrics("crossfade_config_reload_failures_total").await == 1.0)
        .await;
    let said = status(&proxy).await;
    assert!(
        said["config_error"].as_str().is_some_and(|error| error.contains("lisssten") && error.contains(":1")),
        "{said}"
    );
    assert_eq!((said["phase"].as_str(), said["wanted"].as_str()), (Some("new-primary"), Some("new-primary")));
    assert!(proxy.log().contains("crossfade.yaml:1"), "the log names the line: {}", proxy.log());
    let shown = proxy.crossfade(&["status"]).await;
    assert_eq!(shown.status.code(), Some(2), "the file is bad");
    assert!(String::from_utf8_lossy(&shown.stderr).contains("lisssten"));
    hangup(&proxy);
    until("SIGHUP reads again", async || proxy.metrics("crossfade_config_reload_failures_total").await == 2.0).await;
    fs::write(&path, with("dual-write")).expect("writes");
    until("a mended file holds", async || proxy.holds("dual-write").await).await;
    assert!(status(&proxy).await["config_error"].is_null());
}

#[tokio::test]
async fn a_transaction_ends_in_its_phase_and_others_wait_for_the_move() {
    let mut pair = Pair::start("old", SCHEMA, "move: { pause: 20s }").await;
    let (first, second) = (pair.client().await, pair.client().await);
    first.batch_execute("BEGIN; INSERT INTO photos (name) VALUES ('first')").await.expect("begins");
    pair.proxy.request_phase("dual-write");
    // The move closes the gate: whoever begins now waits.
    let mut tries = 0;
    let waiting = loop {
        tries += 1;
        assert!(tries < 200, "the gate never closed");
        let sql = format!("INSERT INTO users (name) VALUES ('second {tries}')");
        let second = &second;
        let mut insert = Box::pin(async move { second.batch_execute(&sql).await });
        match tokio::time::timeout(Duration::from_millis(500), &mut insert).await {
            Ok(done) => done.expect("inserts"),
            Err(_) => break insert,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(pair.proxy.holds("old").await);
    first.batch_execute("INSERT INTO photos (name) VALUES ('still in old')").await.expect("goes on");
    first.batch_execute("COMMIT").await.expect("ends");
    waiting.await.expect("goes on after the move");
    assert!(pair.proxy.holds("dual-write").await, "who waited began after the move");
    assert!(pair.proxy.metrics("crossfade_mirror_images_total").await >= 1.0, "and was mirrored");
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn a_transaction_that_does_not_end_keeps_the_phase_and_frees_the_others() {
    let mut pair = Pair::start("old", SCHEMA, "move: { pause: 1s }").await;
    let (first, second) = (pair.client().await, pair.client().await);
    first.batch_execute("BEGIN; SELECT 1").await.expect("begins");
    pair.proxy.request_phase("dual-write");
    waits_for(&pair.proxy, "1 transactions have not ended within move.pause").await;
    assert!(pair.proxy.holds("old").await);
    tokio::time::timeout(Duration::from_secs(10), write(&second, "meanwhile")).await.expect("clients were released");
    assert!(pair.proxy.metrics("crossfade_move_pause_seconds_count").await >= 1.0);
    first.batch_execute("INSERT INTO photos (name) VALUES ('first'); COMMIT").await.expect("ends in old");
    // Tried again by itself, later; an operator need not wait.
    hangup(&pair.proxy);
    until("the move goes through", async || pair.proxy.holds("dual-write").await).await;
    until("nothing is waited for", async || status(&pair.proxy).await["waiting_for"].is_null()).await;
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn authority_does_not_move_while_anything_is_owed() {
    let mut pair = Pair::start("old", SCHEMA, "mirror: { timeout: 500ms }").await;
    let client = pair.client().await;
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.settle().await;
    // A row that new refuses.
    pair.databases.new.run(DATABASE, "ALTER TABLE users ADD CONSTRAINT odd CHECK (name <> 'odd')").await.expect("adds");
    client.batch_execute("INSERT INTO users (name) VALUES ('odd')").await.expect("the client sees no error");
    pair.proxy.request_phase("new-primary");
    waits_for(&pair.proxy, "1 debts are still owed on old").await;
    write(&client, "goes on").await;
    assert!(pair.proxy.holds("dual-write").await);
    pair.databases.new.run(DATABASE, "ALTER TABLE users DROP CONSTRAINT odd").await.expect("drops");
    pair.proxy.reaches("new-primary").await;
    pair.settle_and_assert_equal().await;
    // The mirror is down.
    pair.databases.old.stop(Stop::Fast).await.expect("stops");
    write(&client, "old is down").await;
    pair.proxy.request_phase("dual-write");
    waits_for(&pair.proxy, "old cannot be reached").await;
    write(&client, "still down").await;
    pair.databases.old.start().await.expect("starts");
    until("paid, and moved by itself: old was authority before", async || pair.proxy.holds("dual-write").await).await;
    write(&client, "back").await;
    pair.settle_and_assert_equal().await;
    // A taint is paid before authority moves.
    client
        .batch_execute("DO $$ BEGIN UPDATE photos SET name = 'out of sight' WHERE id = 2; COMMIT; END $$")
        .await
        .expect("runs");
    pair.proxy.request_phase("new-primary");
    // Nobody can tell what the block has done to a table without a key: that is copied by name.
    waits_for(&pair.proxy, "1 debts are still owed on old").await;
    let repair = pair.proxy.crossfade(&["repair", "--wait", "--table", "public.history"]).await;
    assert!(repair.status.success(), "{repair:?}");
    pair.proxy.reaches("new-primary").await;
    assert_eq!(value(&client, "SELECT name FROM photos WHERE id = 2").await, "out of sight");
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn a_writer_around_the_proxy_is_waited_for_and_named() {
    let mut pair = Pair::start("old", SCHEMA, "").await;
    let client = pair.client().await;
    let around = pair.databases.old.client(DATABASE).await.expect("connects");
    around
        .batch_execute("SET application_name = 'nightly job'; BEGIN; INSERT INTO photos (name) VALUES ('around')")
        .await
        .unwrap();
    let pid = value(&around, "SELECT pg_backend_pid()").await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    pair.proxy.request_phase("dual-write");
    waits_for(&pair.proxy, &format!("backend {pid} (nightly job) on old holds a writer's lock")).await;
    assert_eq!(pair.proxy.metrics("crossfade_move_pause_seconds_count").await, 0.0, "nobody was held for it");
    write(&client, "meanwhile").await;
    around.batch_execute("COMMIT").await.expect("commits");
    until("the move goes through by itself", async || pair.proxy.holds("dual-write").await).await;
    assert_eq!(pair.settle_and_assert_equal().await, 30);
}

#[tokio::test]
async fn a_dead_mirror_is_left_behind_and_idle_clients_outlive_the_old_authority() {
    let mut pair = Pair::start("old", SCHEMA, "mirror: { timeout: 500ms }").await;
    let (client, idle) = (pair.client().await, pair.client().await);
    assert_eq!(value(&idle, "SELECT 1").await, "1");
    pair.proxy.set_phase("dual-write").await;
    pair.databases.new.kill9();
    write(&client, "new is dead").await;
    pair.proxy.set_phase("old").await;
    write(&client, "back in old").await;
    pair.databases.new.start().await.expect("starts");
    pair.proxy.set_phase("dual-write").await;
    pair.settle_and_assert_equal().await;
    pair.proxy.set_phase("new-primary").await;
    let gone = async || pair.proxy.metrics("crossfade_server_connections{side=\"old\"}").await == 0.0;
    until("idle sessions have moved", gone).await;
    pair.databases.old.stop(Stop::Fast).await.expect("stops");
    pair.proxy.set_phase("old-read-only").await;
    pair.proxy.set_phase("new").await;
    write(&client, "new").await;
    assert_eq!(value(&idle, "SELECT count(*) FROM users WHERE name = 'new'").await, "1");
    // Started again, the proxy learns that from new alone.
    pair.proxy.restart().await;
    assert!(pair.proxy.holds("new").await);
    write(&pair.client().await, "after a restart").await;
}
