//! The admin console, with a client of PostgreSQL: what it shows, and what it does.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::pair::{APP, CONTROL, DATABASE};
use common::{Pair, until};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

async fn console(pair: &Pair, role: (&str, &str)) -> Result<Client, tokio_postgres::Error> {
    let url = pair.proxy.url_as(role.0, role.1, "crossfade");
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

/// A column of each row, asked for by a simple Query.
async fn column(console: &Client, sql: &str, name: &str) -> Vec<String> {
    let rows = console.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let rows = rows.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(name).unwrap_or("NULL").to_owned()),
        _ => None,
    });
    rows.collect()
}

#[tokio::test]
async fn an_operator_sees_the_gates_and_moves() {
    let mut pair = Pair::start("old", "CREATE TABLE notes (id int PRIMARY KEY)", "").await;
    let error = console(&pair, APP).await.expect_err("the application is no operator");
    assert_eq!(error.code().expect("is told").code(), "42501");
    let operator = console(&pair, CONTROL).await.expect("the control role is");
    assert_eq!(column(&operator, "SHOW PHASE", "phase").await, ["old"]);
    // The extended protocol, too.
    let rows = operator.query("SHOW PHASE", &[]).await.expect("shows");
    assert_eq!(rows[0].get::<_, &str>("authority"), "old");
    operator.batch_execute("SET phase = 'dual-write'").await.expect("moves");
    assert!(pair.proxy.holds("dual-write").await);
    pair.proxy.settle().await;
    let client = pair.client().await;
    client.batch_execute("INSERT INTO notes VALUES (1)").await.expect("writes");
    assert!(column(&operator, "SHOW GATES new-primary", "standing").await.contains(&"closed".to_owned()));
    let refused = operator.batch_execute("SET phase = 'new-primary'").await.expect_err("never verified");
    let refused = refused.as_db_error().expect("is told");
    assert_eq!(refused.code().code(), "55000");
    assert!(refused.detail().is_some_and(|detail| detail.contains("verified: public.notes")), "{refused:?}");
    let refused = operator.batch_execute("SET phase = 'new-primary' FORCE").await.expect_err("without a word");
    assert!(refused.as_db_error().expect("is told").message().contains("REASON"), "{refused:?}");
    operator.batch_execute("SET phase = 'new-primary' FORCE 'verified' REASON 'a test'").await.expect("moves");
    assert!(pair.proxy.holds("new-primary").await);
    assert_eq!(column(&operator, "SHOW HISTORY", "forced").await[0], "verified");
    assert_eq!(column(&operator, "SHOW HISTORY", "why").await[0], "a test");
    client.batch_execute("INSERT INTO notes VALUES (2)").await.expect("carried over");
    pair.settle_and_assert_equal().await;
    for what in ["TABLES", "CLIENTS", "SERVERS", "PROXIES", "DEBT", "STATS", "CONFIG", "VERSION", "HELP", "GATES"] {
        let rows =
            operator.simple_query(&format!("SHOW {what}")).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        assert!(what == "DEBT" || rows.len() > 1, "{what}: {rows:?}");
    }
    let settings = column(&operator, "SHOW CONFIG", "value").await.join("\n");
    assert!(!settings.contains(CONTROL.1), "a password is shown");
    // The file still says old: it is not obeyed, and it is said.
    until("the disagreement shows", async || pair.proxy.metrics("crossfade_file_disagrees").await == 1.0).await;
    assert!(operator.batch_execute("SELECT 1").await.is_err());
    pair.proxy.request_phase("new-primary");
    operator.batch_execute("RELOAD").await.expect("reloads");
    let shapes = column(&operator, "SHOW SHAPES", "shape").await.join("\n");
    assert!(shapes.to_lowercase().contains("insert into notes"), "{shapes}");
    // What drivers send around a statement.
    for sql in ["BEGIN", "SET application_name = 'x'", "SHOW VERSION", "COMMIT"] {
        operator.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    let path = pair.proxy.config_path();
    let text = std::fs::read_to_string(&path).expect("reads");
    std::fs::write(&path, format!("{text}\nlimit: 5\n")).expect("writes");
    let refused = operator.batch_execute("RELOAD").await.expect_err("the file is wrong");
    let refused = refused.as_db_error().expect("is told").message().to_owned();
    assert!(refused.contains("limit") && refused.contains("stay in force"), "{refused}");
    std::fs::write(&path, text).expect("writes");
    operator.batch_execute("RELOAD").await.expect("reloads");
}

/// `auth: plain` without a look at pg_authid lets the servers check passwords: the console has none behind it.
#[tokio::test]
async fn an_operator_whose_password_nobody_checks_is_refused() {
    let pair = Pair::start("old", "CREATE TABLE notes (id int PRIMARY KEY)", "auth: plain").await;
    console(&pair, CONTROL).await.expect("its password is known");
    let unprivileged = "ALTER ROLE crossfade NOSUPERUSER";
    pair.databases.old.run("postgres", unprivileged).await.expect("alters");
    pair.databases.new.run("postgres", unprivileged).await.expect("alters");
    until("nobody can check it", async || {
        let error = console(&pair, (CONTROL.0, "wrong")).await.expect_err("is refused");
        error.code().expect("is told").code() == "28000"
    })
    .await;
}

#[tokio::test]
async fn a_pause_waits_for_transactions_and_holds_new_ones() {
    let pair = Pair::start("old", "CREATE TABLE notes (id int PRIMARY KEY)", "").await;
    let operator = console(&pair, CONTROL).await.expect("connects");
    let (busy, idle) = (pair.client().await, pair.client().await);
    busy.batch_execute("BEGIN; INSERT INTO notes VALUES (1)").await.expect("begins");
    let pausing = tokio::spawn(async move {
        operator.batch_execute("PAUSE").await.expect("pauses");
        operator
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!pausing.is_finished(), "a transaction is under way");
    busy.batch_execute("COMMIT").await.expect("ends");
    let operator = pausing.await.expect("joins");
    let held = tokio::spawn(async move { idle.batch_execute("INSERT INTO notes VALUES (2)").await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!held.is_finished(), "it is held");
    assert_eq!(column(&operator, "SHOW PHASE", "paused").await, ["true"]);
    operator.batch_execute("RESUME").await.expect("resumes");
    held.await.expect("joins").expect("no error");
    assert_eq!(pair.databases.old.run(DATABASE, "SELECT count(*) FROM notes").await.unwrap().trim(), "2");
}

/// A certificate for localhost that nobody has signed.
fn certificate(folder: &Path, name: &str) {
    let key = rcgen::KeyPair::generate().expect("makes a key");
    let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("names");
    let signed = params.self_signed(&key).expect("signs");
    std::fs::write(folder.join(format!("{name}.crt")), signed.pem()).expect("writes");
    std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).expect("writes");
}

/// Whether a client that believes in this certificate, and in none else, can ask something.
fn served_with(pair: &Pair, folder: &Path, name: &str) -> bool {
    let login = format!(
        "host=localhost hostaddr=127.0.0.1 port={} dbname={DATABASE} user={} password={} sslmode=verify-full sslrootcert={}",
        pair.proxy.port(),
        APP.0,
        APP.1,
        folder.join(format!("{name}.crt")).display()
    );
    let psql =
        Command::new(pair.databases.old.program("psql")).args(["-XAtc", "SELECT 7", &login]).output().expect("runs");
    psql.status.success()
}

#[tokio::test]
async fn users_and_certificates_are_taken_over_and_the_rest_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    for name in ["one", "two"] {
        certificate(folder, name);
    }
    let install = |name: &str| {
        for kind in ["crt", "key"] {
            std::fs::copy(folder.join(format!("{name}.{kind}")), folder.join(format!("used.{kind}"))).expect("copies");
        }
    };
    install("one");
    let more = |password: &str, threads: usize| {
        let used = folder.join("used").display().to_string();
        format!(
            "users: {{ app: {{ password: {password} }} }}\ntls: {{ certificate: {used}.crt, key: {used}.key }}\nlimits: {{ threads: {threads} }}"
        )
    };
    let mut pair = Pair::start("old", "", &more("another", 2)).await;
    assert!(!served_with(&pair, folder, "one"), "another password is wanted");
    pair.proxy.set_more(&more(APP.1, 2));
    until("the password of the file is taken over", async || served_with(&pair, folder, "one")).await;
    assert!(!pair.proxy.log().contains("needs a restart"));
    install("two");
    assert!(served_with(&pair, folder, "one"), "nobody has said that it is another one now");
    pair.proxy.hang_up();
    until("the certificate is taken over", async || served_with(&pair, folder, "two")).await;
    assert!(!served_with(&pair, folder, "one"));
    std::fs::write(folder.join("used.crt"), "no certificate").expect("writes");
    pair.proxy.hang_up();
    until("the file is refused", async || pair.proxy.metrics("crossfade_config_reload_failures_total").await > 0.0)
        .await;
    assert!(served_with(&pair, folder, "two"), "what was there before stays");
    install("two");
    pair.proxy.set_more(&more(APP.1, 3));
    until("what needs a restart is said", async || {
        pair.proxy.log().lines().any(|line| line.contains("needs a restart") && line.contains("limits.threads"))
    })
    .await;
    pair.proxy.set_more(&more("another", 2));
    until("the first password is wanted again", async || !served_with(&pair, folder, "two")).await;
}
