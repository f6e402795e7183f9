//! What operators see and do: HTTP, commands and their exit statuses, logs, the end of the proxy, TLS; and (`degrade`) a mirror that fails.

#[path = "../common/mod.rs"]
mod common;

mod degrade;

use std::process::Output;
use std::time::Duration;

use common::pair::{APP, CONTROL, DATABASE};
use common::{Databases, Pair, Proxy, until};
use crossfade::cluster::processes::{self, Signal};
use crossfade::cluster::{Cluster, Stop};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

pub(crate) const SCHEMA: &str = "CREATE TABLE notes (id int PRIMARY KEY, body text);
    CREATE TABLE history (note int, what text);";

pub(crate) async fn value(client: &Client, sql: &str) -> String {
    let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let row = messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    row.unwrap_or_else(|| panic!("{sql}: no value"))
}

/// Standard output and standard error.
pub(crate) fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).join("")
}

/// In `dual-write`, with nothing owed, and these lines in the file.
pub(crate) async fn dual_write(more: &str) -> Pair {
    let mut pair = Pair::start("old", SCHEMA, more).await;
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.settle().await;
    pair
}

/// Metrics of the contract, but for those of parts that are yet to come: in_doubt, read_*, verify_*; backfill_rows is there when a backfill was.
const METRICS: &[&str] = &[
    "phase",
    "epoch",
    "clients",
    "server_connections",
    "statements_total",
    "statement_seconds_count",
    "mirror_images_total",
    "mirror_commit_seconds_count",
    "mirror_failures_total",
    "mirror_up",
    "debt_keys",
    "debt_in_flight",
    "debt_oldest_seconds",
    "ledger_bytes",
    "opaque_writes_total",
    "tainted_tables",
    "config_reload_failures_total",
    "plan_cache_hits_total",
    "plan_cache_misses_total",
    "plan_cache_bytes",
    "move_pause_seconds_count",
];

#[tokio::test]
async fn every_metric_is_there_and_the_counters_count() {
    let mut pair = dual_write("mirror: { timeout: 500ms }").await;
    let client = pair.client().await;
    client.batch_execute("INSERT INTO notes VALUES (1, 'a')").await.expect("writes");
    client.batch_execute("INSERT INTO notes VALUES (2, 'a')").await.expect("writes");
    client.batch_execute("DO $$ BEGIN UPDATE notes SET body = 'b'; COMMIT; END $$").await.expect("writes out of sight");
    until("the taint shows", async || pair.proxy.metrics("crossfade_tainted_tables").await > 0.0).await;
    pair.databases.new.stop(Stop::Fast).await.expect("stops");
    client.batch_execute("INSERT INTO notes VALUES (3, 'c')").await.expect("writes");
    until("the mirror is known to be down", async || {
        pair.proxy.metrics("crossfade_mirror_up").await == 0.0
            && pair.proxy.metrics("crossfade_debt_keys").await > 0.0
            && pair.proxy.metrics("crossfade_debt_oldest_seconds").await > 0.0
    })
    .await;
    let (_, page) = pair.proxy.http("/metrics").await.expect("answers");
    for name in METRICS {
        let series = format!("crossfade_{name}");
        let there =
            page.lines().any(|line| line.strip_prefix(&series).is_some_and(|rest| rest.starts_with(['{', ' '])));
        assert!(there, "{series} is missing in\n{page}");
    }
    assert!(page.contains("process_resident_memory_bytes"));
    for (series, least) in [
        ("crossfade_epoch", 1.0),
        ("crossfade_clients", 1.0),
        ("crossfade_server_connections{side=\"old\"}", 1.0),
        ("crossfade_statements_total{class=\"write\",side=\"old\"}", 3.0),
        ("crossfade_statements_total{class=\"opaque\",side=\"old\"}", 1.0),
        ("crossfade_statement_seconds_count", 4.0),
        ("crossfade_mirror_images_total{table=\"public.notes\"}", 3.0),
        ("crossfade_mirror_commit_seconds_count", 3.0),
        ("crossfade_mirror_failures_total", 1.0),
        ("crossfade_opaque_writes_total", 1.0),
        ("crossfade_plan_cache_misses_total", 1.0),
        ("crossfade_plan_cache_hits_total", 1.0),
        ("crossfade_plan_cache_bytes", 1.0),
        ("crossfade_ledger_bytes", 1.0),
        ("crossfade_move_pause_seconds_count", 1.0),
    ] {
        let found = pair.proxy.metrics(series).await;
        assert!(found >= least, "{series} is {found}, at least {least} expected");
    }
    let (code, page) = pair.proxy.http("/").await.expect("a page for people");
    assert!(code == 200 && page.contains("dual-write"), "{page}");
    assert_eq!(pair.proxy.http("/healthz").await, Some((200, "ok\n".to_owned())));
    assert_eq!(pair.proxy.http("/readyz").await, Some((200, "ready\n".to_owned())));
}

#[tokio::test]
async fn commands_answer_and_end_with_their_exit_status() {
    let pair = dual_write("").await;
    let run = async |arguments: &[&str]| {
        let output = pair.proxy.crossfade(arguments).await;
        (output.status.code().expect("ends"), text(&output))
    };
    let (code, said) = run(&["status"]).await;
    assert!(code == 0 && said.contains("shop: phase dual-write (epoch 1), authority old"), "{said}");
    assert!(said.contains("public.notes") && said.contains("public.history: ") && said.contains("no key"), "{said}");
    let (code, said) = run(&["status", "--json"]).await;
    let document: serde_json::Value = serde_json::from_str(&said).expect("one JSON document");
    assert_eq!((code, document["phase"].as_str(), document["debt"]["owed"].as_u64()), (0, Some("dual-write"), Some(0)));
    assert_eq!(document["proxy"]["mirror_up"], true);
    let (code, said) = run(&["explain", "UPDATE notes SET body = 'x' WHERE id = 1"]).await;
    assert!(code == 0 && said.contains("RETURNING") && said.contains("dual-write"), "{said}");
    let (code, said) = run(&["install", "--print-sql"]).await;
    assert!(code == 0 && said.contains("CREATE SCHEMA IF NOT EXISTS crossfade"), "{said}");
    assert_eq!(run(&["install"]).await.0, 0);
    // 1: the answer is no.
    pair.databases.new.run(DATABASE, "ALTER TABLE notes ADD CONSTRAINT odd CHECK (body <> 'odd')").await.expect("adds");
    pair.renewed().await;
    pair.client().await.batch_execute("INSERT INTO notes VALUES (1, 'odd')").await.expect("writes");
    let (code, said) = run(&["repair"]).await;
    assert!(code == 1 && said.contains("odd"), "{code} {said}");
    // 2: it could not run.
    assert_eq!(run(&["repair", "--wait", "--timeout", "1"]).await.0, 2);
    assert_eq!(run(&["no-such-command"]).await.0, 2);
    assert_eq!(run(&["repair", "--table", "public.nothing"]).await.0, 2);
    let missing = tokio::process::Command::new(env!("CARGO_BIN_EXE_crossfade"));
    let missing = { missing }.args(["status", "--config", "/nowhere/crossfade.yaml"]).output().await.expect("runs");
    assert!(missing.status.code() == Some(2) && text(&missing).contains("/nowhere/crossfade.yaml"), "{missing:?}");
}

/// What must never be in a log.
const MARKER: &str = "marker5167";

#[tokio::test]
async fn no_log_holds_a_value_or_a_password() {
    for format in ["text", "json"] {
        let log = format!("mirror: {{ timeout: 500ms }}\nlog: {{ format: {format}, level: \"info,crossfade=trace\" }}");
        let mut pair = dual_write(&log).await;
        let client = pair.client().await;
        pair.databases
            .new
            .run(DATABASE, "ALTER TABLE notes ADD CONSTRAINT odd CHECK (body NOT LIKE 'odd%')")
            .await
            .expect("adds");
        let (odd, even) = (format!("odd {MARKER}"), format!("even {MARKER}"));
        client.execute("INSERT INTO notes VALUES (1, $1)", &[&odd]).await.expect("new refuses it, and nobody hears");
        client
            .batch_execute(&format!(
                "INSERT INTO notes VALUES (2, '{odd}'); UPDATE notes SET body = '{even}' WHERE id = 7"
            ))
            .await
            .expect("writes");
        client.batch_execute(&format!("SELECT '{MARKER}'::int")).await.expect_err("an error of the application");
        client.execute("INSERT INTO notes VALUES (1, $1)", &[&even]).await.expect_err("a duplicate");
        client
            .batch_execute(&format!("DO $$ BEGIN INSERT INTO notes VALUES (9, '{even}'); END $$"))
            .await
            .expect("out of sight");
        client.batch_execute(&format!("SET app.secret = '{MARKER}'")).await.expect("sets");
        pair.databases
            .new
            .run(DATABASE, "DROP TABLE history; ALTER TABLE notes DROP CONSTRAINT odd, ALTER body TYPE int USING 0")
            .await
            .expect("breaks new");
        client.execute("INSERT INTO notes VALUES (4, $1)", &[&even]).await.expect("new cannot take it");
        client.execute("INSERT INTO history VALUES (4, $1)", &[&even]).await.expect("new has no such table");
        drop(
            tokio_postgres::connect(&pair.proxy.url_as(APP.0, MARKER, DATABASE), NoTls)
                .await
                .err()
                .expect("a wrong password"),
        );
        until("repair has failed", async || pair.proxy.log().contains("debts stay")).await;
        pair.databases.new.stop(Stop::Immediate).await.expect("stops");
        client.execute("INSERT INTO notes VALUES (5, $1)", &[&even]).await.expect("new is down");
        pair.proxy.crossfade(&["status"]).await;
        until("it is down", async || pair.proxy.log().contains("writes are owed")).await;
        drop(client);
        pair.proxy.terminate().await;
        let log = pair.proxy.log();
        assert!(log.contains("DEBUG"), "the level is not what was asked for");
        for line in log.lines() {
            for secret in [MARKER, APP.1, CONTROL.1] {
                assert!(!line.contains(secret), "{secret} in {line}");
            }
            if format == "json" {
                serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            }
        }
    }
}

#[tokio::test]
async fn sigterm_lets_transactions_end_and_tells_the_others() {
    let mut pair = dual_write("").await;
    let open = async || {
        let (client, connection) = tokio_postgres::connect(&pair.url(), NoTls).await.expect("connects");
        (client, tokio::spawn(connection))
    };
    let (busy, busy_end) = open().await;
    let (idle, idle_end) = open().await;
    busy.batch_execute("BEGIN; INSERT INTO notes VALUES (1, 'begun')").await.expect("begins");
    processes::signal(Signal::Terminate, &[pair.proxy.pid()]);
    let told = idle_end.await.expect("joins").expect_err("the idle client is told");
    assert_eq!(told.as_db_error().map(|told| told.code()), Some(&SqlState::ADMIN_SHUTDOWN), "{told}");
    drop(idle);
    assert_eq!(pair.proxy.http("/readyz").await.map(|(code, _)| code), Some(503));
    assert!(tokio_postgres::connect(&pair.url(), NoTls).await.is_err(), "no new clients");
    busy.batch_execute("INSERT INTO notes VALUES (2, 'goes on'); COMMIT").await.expect("ends in order");
    let told = busy_end.await.expect("joins").expect_err("now it is told, too");
    assert_eq!(told.as_db_error().map(|told| told.code()), Some(&SqlState::ADMIN_SHUTDOWN), "{told}");
    until("the process has ended", async || pair.proxy.http("/healthz").await.is_none()).await;
    pair.databases.assert_equal().await;
    let left = pair.databases.old.run(DATABASE, "SELECT count(*) FROM crossfade.ledger").await.expect("reads");
    assert_eq!(left.trim(), "0", "debts in flight were cleared before the end");
    assert!(pair.proxy.terminate().await.success());
}

#[tokio::test]
async fn a_second_sigterm_ends_at_once_and_a_dead_mirror_does_not_hold_the_end_up() {
    let mut pair = dual_write("mirror: { timeout: 500ms }").await;
    let client = pair.client().await;
    client.batch_execute("BEGIN; INSERT INTO notes VALUES (1, 'begun')").await.expect("begins");
    processes::signal(Signal::Terminate, &[pair.proxy.pid()]);
    until("it drains", async || pair.proxy.http("/readyz").await.is_some_and(|(code, _)| code == 503)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(pair.proxy.http("/healthz").await.is_some(), "it waits for the transaction");
    assert!(pair.proxy.terminate().await.success(), "the second signal");
    pair.proxy.run().await;
    let client = pair.client().await;
    client.batch_execute("INSERT INTO notes VALUES (2, 'a')").await.expect("writes");
    pair.databases.new.kill9();
    client.batch_execute("INSERT INTO notes VALUES (3, 'a')").await.expect("writes");
    assert!(pair.proxy.terminate().await.success(), "one signal is enough");
    pair.databases.new.start().await.expect("starts");
    pair.proxy.run().await;
    pair.settle_and_assert_equal().await;
}

/// A certificate authority's certificate, and one for 127.0.0.1 with its key.
fn certificates() -> (String, String, String) {
    let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().expect("a key");
    let root = authority.self_signed(&authority_key).expect("signs itself");
    let key = KeyPair::generate().expect("a key");
    let server = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("parameters");
    let server = server.signed_by(&key, &Issuer::from_params(&authority, &authority_key)).expect("signs");
    (root.pem(), server.pem(), key.serialize_pem())
}

#[tokio::test]
async fn both_databases_on_tls() {
    let (root, certificate, key) = certificates();
    let scratch = tempfile::tempdir().expect("a directory");
    let root_file = scratch.path().join("root.crt");
    std::fs::write(&root_file, root).expect("writes");
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let Databases { mut old, mut new } = databases;
    for side in [&mut old, &mut new] {
        // The roles of this story by TLS only; the harness itself goes as it always does.
        let tls_only = "local all all scram-sha-256\nhostssl all all all scram-sha-256\nhostnossl all postgres all scram-sha-256\n";
        let files: [(&str, &str); 3] = [("server.crt", &certificate), ("server.key", &key), ("pg_hba.conf", tls_only)];
        for (name, content) in files {
            side.write(name, content.as_bytes()).expect("writes");
        }
        side.configure(&[("ssl", "on")]).expect("configures");
        side.reload();
        let plain = async || side.client_as(CONTROL.0, CONTROL.1, DATABASE).await.is_err();
        until("nobody gets in without TLS", plain).await;
    }
    let url = |side: &Cluster| {
        format!(
            "{}?sslmode=verify-full&sslrootcert={}",
            side.url_as(CONTROL.0, CONTROL.1, DATABASE),
            root_file.display()
        )
    };
    let config = common::ProxyConfig {
        old: url(&old),
        new: url(&new),
        phase: "old".to_owned(),
        more: String::new(),
        environment: Vec::new(),
    };
    let mut proxy = Proxy::start(config).await;
    let (client, connection) =
        tokio_postgres::connect(&proxy.url_as(APP.0, APP.1, DATABASE), NoTls).await.expect("connects");
    tokio::spawn(connection);
    for (id, phase) in (1..).zip(["old", "dual-write", "new-primary", "new"]) {
        proxy.set_phase(phase).await;
        client.execute("INSERT INTO notes VALUES ($1, $2)", &[&id, &phase]).await.expect(phase);
        assert_eq!(value(&client, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").await, "t");
        if phase != "old" && phase != "new" {
            proxy.settle().await;
        }
    }
    assert_eq!(value(&client, "SELECT count(*) FROM notes").await, "4");
}
