//! The tests' own tools, tested: a comparer that cannot see a difference would make every other test pass.

mod common;

use std::time::Duration;

use common::link::{Flow, Link, Trip, Way};
use common::pair::{APP, DATABASE};
use common::{Databases, compare, pgbench};

const TYPES: &str = "CREATE TABLE t (id int PRIMARY KEY, f float8, b bytea, n text, \"Odd name\" timestamptz, g int GENERATED ALWAYS AS (id * 2) STORED);
    CREATE TABLE history (what text);
    CREATE TABLE parts (id int, v text) PARTITION BY LIST (id);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);";

#[tokio::test]
async fn the_comparer_sees_every_kind_of_difference_and_no_other() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(TYPES).await;
    databases
        .run_on_both(
            "INSERT INTO t VALUES (1, 0.1::float8 + 0.2, '\\x00ff', NULL, '2026-01-01 00:00Z'), (2, 'NaN', '', '', 'infinity');
             INSERT INTO history VALUES ('twice'), ('twice'), (NULL); INSERT INTO parts VALUES (1, E'a\\nb\\tc');",
        )
        .await;
    assert_eq!(databases.assert_equal().await, 6);
    // Settings of a role or database must not hide or make a difference.
    let settings = format!(
        "ALTER DATABASE {DATABASE} SET timezone = 'Asia/Tokyo'; ALTER DATABASE {DATABASE} SET extra_float_digits = -3;"
    );
    databases.new.run("postgres", &settings).await.expect("sets");
    databases.assert_equal().await;

    for (change, undo, expected) in [
        ("UPDATE t SET f = 0.3 WHERE id = 1", "UPDATE t SET f = 0.1::float8 + 0.2 WHERE id = 1", 2),
        ("UPDATE t SET n = NULL WHERE id = 2", "UPDATE t SET n = '' WHERE id = 2", 2),
        (
            "INSERT INTO history VALUES ('twice')",
            "DELETE FROM history; INSERT INTO history VALUES ('twice'), ('twice'), (NULL)",
            1,
        ),
        ("DELETE FROM parts", "INSERT INTO parts VALUES (1, E'a\\nb\\tc')", 1),
        ("CREATE TABLE more (a int)", "DROP TABLE more", 1),
    ] {
        databases.new.run(DATABASE, change).await.expect("changes");
        let (_, differences) = compare::compare(&databases.old, &databases.new, DATABASE, &[]).await;
        assert_eq!(differences.len(), expected, "{change}: {differences:?}");
        databases.new.run(DATABASE, undo).await.expect("undoes");
        databases.assert_equal().await;
    }
}

#[tokio::test]
async fn the_link_stalls_cuts_refuses_and_strikes() {
    let databases = Databases::start(&[]).await;
    let cluster = &databases.old;
    let mut link = Link::to(cluster.port()).await;
    let url = cluster.url("postgres").replace(&cluster.port().to_string(), &link.port().to_string());
    let connect = async || {
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await?;
        tokio::spawn(async move { drop(connection.await) });
        Ok::<_, tokio_postgres::Error>(client)
    };
    let short = Duration::from_millis(200);

    let client = connect().await.expect("connects");
    client.batch_execute("CREATE TABLE t (a int)").await.expect("passes");
    link.set(Way::ToClient, Flow::Stall);
    {
        let insert = client.batch_execute("INSERT INTO t VALUES (1)");
        tokio::pin!(insert);
        tokio::time::timeout(short, &mut insert).await.expect_err("the answer is stalled");
        assert_eq!(cluster.run("postgres", "SELECT a FROM t").await.expect("reads"), "1\n");
        link.set_both(Flow::Pass);
        insert.await.expect("the answer came through");
    }
    let late = std::time::Instant::now();
    link.set(Way::ToServer, Flow::Delay(short));
    client.batch_execute("SELECT 1").await.expect("passes");
    assert!(late.elapsed() >= short);
    link.set_both(Flow::Pass);

    link.refuse().await;
    connect().await.expect_err("refused");
    client.batch_execute("SELECT 1").await.expect("this connection is as before");
    link.accept().await;
    link.cut();
    client.batch_execute("SELECT 1").await.expect_err("cut");

    for (trip, arrived) in [(Trip::CutBefore, "1\n"), (Trip::CutAfter, "2\n")] {
        let client = connect().await.expect("accepted again");
        client.batch_execute("BEGIN; INSERT INTO t VALUES (2)").await.expect("passes");
        let struck = link.trip(Way::ToServer, b"COMMIT", trip);
        client.batch_execute("COMMIT").await.expect_err("cut");
        struck.await.expect("struck");
        common::until("the session is gone", async || {
            let sessions = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
            cluster.run("postgres", sessions).await.expect("reads") == "1\n"
        })
        .await;
        assert_eq!(cluster.run("postgres", "SELECT count(*) FROM t").await.expect("reads"), arrived);
    }
}

#[tokio::test]
async fn pgbench_on_one_side_makes_them_differ() {
    let databases = Databases::start(&[]).await;
    let program = databases.old.program("pgbench");
    let urls = [&databases.old, &databases.new].map(|side| side.url_as(APP.0, APP.1, DATABASE));
    for url in &urls {
        pgbench::pgbench(&program, url, &["-i", "-q", "-I", "dtgp", "-s", "1"]).await;
    }
    databases.assert_equal().await;
    let report = pgbench::pgbench(&program, &urls[0], &["-c", "4", "-t", "10", "-M", "prepared"]).await;
    assert_eq!((report.transactions, report.failed), (40, 0), "{}", report.text);
    let (rows, differences) = compare::compare(&databases.old, &databases.new, DATABASE, &[]).await;
    assert_eq!(rows, 100_000 + 10 + 1 + 40);
    assert!(differences.iter().any(|line| line.starts_with("public.pgbench_history: only on old")), "{differences:?}");
}
