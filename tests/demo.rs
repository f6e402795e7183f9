//! The demo's own judges, tried on real servers without a proxy: what they pass must be right, and what is broken on
//! purpose they must find.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossfade::cluster::Cluster;
use crossfade::demo::acks::LookUp;
use crossfade::demo::load::{Load, Settings};
use crossfade::demo::pgbench::{self, Pgbench};
use crossfade::demo::show::Board;
use crossfade::demo::{self, Options, compare, schema};

/// A server with the application's tables and rows, in database `postgres`.
async fn filled() -> Cluster {
    let server = Cluster::builder().start().await.expect("a cluster");
    server.run("postgres", "CREATE ROLE app LOGIN PASSWORD 'photos'").await.expect("a role");
    server.run("postgres", schema::DEFINITIONS).await.expect("definitions");
    server.run("postgres", &schema::seed()).await.expect("rows");
    server
}

fn clients_of(server: &Cluster, clients: usize) -> Settings {
    let server = server.url_as("app", "photos", "postgres").parse().expect("a URL");
    Settings { server, clients, rest: Duration::from_millis(2), seed: 7 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_are_found_and_lost_ones_missed() {
    let server = filled().await;
    let board = Arc::new(Board::new());
    let mut load = Load::start(&clients_of(&server, 4), board.clone());
    let counts = load.counts.clone();
    tokio::time::sleep(Duration::from_millis(1500)).await;

    load.pause().await;
    let paused = counts.transactions.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(counts.transactions.load(Ordering::Relaxed), paused, "paused clients do nothing");
    load.resume();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let acknowledged = load.stop().await;
    assert!(counts.transactions.load(Ordering::Relaxed) > paused, "resumed clients go on");
    assert_eq!((counts.errors.load(Ordering::Relaxed), board.errors()), (0, Vec::new()));

    let direct = server.client("postgres").await.expect("a connection");
    let found = acknowledged.look_up(&direct).await.expect("a look-up");
    let clean = LookUp { acknowledged: acknowledged.writes(), ..LookUp::default() };
    assert_eq!(found, clean);
    assert!(acknowledged.writes() > 200, "{} writes", acknowledged.writes());
    for table in schema::Table::ALL.iter().map(|table| table.name()).chain(["history"]) {
        let sql = format!("SELECT count(*) FROM {table} WHERE token > 0");
        let written: i64 = direct.query_one(&sql, &[]).await.expect("a count").get(0);
        assert!(written > 0, "nobody wrote {table}");
    }

    // One write lost in each way, one that nobody made in each.
    let damage = "
        DELETE FROM history WHERE ctid = (SELECT ctid FROM history WHERE token > 0 LIMIT 1);
        UPDATE photos SET token = 1 WHERE id = (SELECT id FROM photos WHERE token > 1 LIMIT 1);
        DELETE FROM likes WHERE (liker, photo) = (SELECT liker, photo FROM likes WHERE token > 0 LIMIT 1);
        UPDATE users SET visits = visits - 1 WHERE id = (SELECT id FROM users WHERE visits > 0 LIMIT 1);
        INSERT INTO history (actor, action, detail, token) VALUES (1, 'stray', '{}', 5);
        INSERT INTO history SELECT * FROM history WHERE token > 5 LIMIT 1;
        INSERT INTO photos (owner, path, token) VALUES (1, 'stray', 6);
        UPDATE photos SET likes = likes + 2 WHERE path = 'stray'";
    direct.batch_execute(damage).await.expect("damage");
    let found = acknowledged.look_up(&direct).await.expect("a look-up");
    assert_eq!((found.missing, found.unexpected), (4, 5), "{:#?}", found.examples);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_report_what_they_are_told_falsely() {
    let server = filled().await;
    // Each committed photo changes behind the application's back: clients that read their own notice.
    let sql = "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN IF random() < 0.2 THEN NEW.token := 1; END IF; RETURN NEW; END $$;
        CREATE TRIGGER forget BEFORE INSERT OR UPDATE ON photos FOR EACH ROW EXECUTE FUNCTION forget()";
    server.run("postgres", sql).await.expect("a trigger");
    let board = Arc::new(Board::new());
    let load = Load::start(&clients_of(&server, 2), board.clone());
    let counts = load.counts.clone();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let acknowledged = load.stop().await;
    assert!(counts.errors.load(Ordering::Relaxed) > 0);
    assert!(board.errors()[0].contains("was acknowledged"), "{:?}", board.errors());
    let direct = server.client("postgres").await.expect("a connection");
    let found = acknowledged.look_up(&direct).await.expect("a look-up");
    assert!(found.missing > 0, "{found:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_goes_away_is_an_error_and_leaves_doubt_but_no_loss() {
    let mut server = filled().await;
    let board = Arc::new(Board::new());
    let load = Load::start(&clients_of(&server, 4), board.clone());
    let counts = load.counts.clone();
    tokio::time::sleep(Duration::from_millis(700)).await;
    server.restart(crossfade::cluster::Stop::Immediate).await.expect("a restart");
    tokio::time::sleep(Duration::from_millis(700)).await;
    let acknowledged = load.stop().await;
    assert!(counts.errors.load(Ordering::Relaxed) > 0);
    let direct = server.client("postgres").await.expect("a connection");
    let found = acknowledged.look_up(&direct).await.expect("a look-up");
    assert_eq!((found.missing, found.unexpected), (0, 0), "{:#?}", found.examples);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_difference_between_two_databases_is_counted() {
    let (old, new) =
        tokio::try_join!(Cluster::builder().start(), Cluster::builder().lineage("new").start()).expect("clusters");
    let same = "CREATE TABLE a (id int PRIMARY KEY, x float8, at timestamptz, b bytea, t text);
        INSERT INTO a SELECT n, n / 7.0, timestamptz '2026-01-01 UTC' + n * interval '1 min', decode(md5(n::text), 'hex'), E'tab\\t\\\\ ' || n
        FROM generate_series(1, 1000) n;
        CREATE TABLE keyless (x int); INSERT INTO keyless VALUES (1), (1), (2), (NULL);
        CREATE SCHEMA crossfade; CREATE TABLE crossfade.ledger (id int)";
    for server in [&old, &new] {
        server.run("postgres", same).await.expect("tables");
    }
    // Other settings and another order of the rows on disk are no difference.
    new.run("postgres", "ALTER DATABASE postgres SET TimeZone = 'Asia/Tokyo'; UPDATE a SET id = id WHERE id % 3 = 0")
        .await
        .expect("settings");
    new.run("postgres", "INSERT INTO crossfade.ledger VALUES (1)").await.expect("a debt");
    let judge = async || {
        let (old, new) = tokio::try_join!(old.client("postgres"), new.client("postgres")).expect("connections");
        compare::compare(&old, &new).await.expect("a comparison")
    };
    let compared = judge().await;
    let counts: Vec<_> =
        compared.iter().map(|table| (table.table.as_str(), table.old_rows, table.new_rows, table.different)).collect();
    assert_eq!(counts, [("public.a", 1000, 1000, 0), ("public.keyless", 4, 4, 0)]);

    let damage =
        "UPDATE a SET x = x + 1e-15 WHERE id = 1; UPDATE a SET t = NULL WHERE id = 2; DELETE FROM a WHERE id = 3;
        INSERT INTO keyless VALUES (1); CREATE TABLE stray (x int)";
    new.run("postgres", damage).await.expect("damage");
    let compared = judge().await;
    let counts: Vec<_> = compared.iter().map(|table| (table.table.as_str(), table.different)).collect();
    assert_eq!(counts, [("public.a", 3), ("public.keyless", 1), ("public.stray", 1)], "{compared:#?}");
    assert!(compared.iter().all(|table| table.example.is_some()), "{compared:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_of_pgbench_are_counted_and_looked_up() {
    let server = Cluster::builder().start().await.expect("a cluster");
    let scratch = tempfile::tempdir().expect("a directory");
    let made = tokio::process::Command::new(server.program("pgbench"))
        .args(["-i", "-q"])
        .envs(server.environment("postgres"))
        .status();
    assert!(made.await.expect("pgbench").success());
    let settings = pgbench::Settings {
        program: server.program("pgbench"),
        directory: scratch.path().to_owned(),
        environment: server.environment("postgres").to_vec(),
        clients: 2,
    };
    let board = Arc::new(Board::new());
    let running = Pgbench::start(settings, board.clone());
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(board.pgbench_rate.load(Ordering::Relaxed) > 0, "progress is shown");
    let totals = running.stop().await.expect("totals");
    assert!(totals.transactions > 0 && totals.longest_us > 0, "{totals:?}");
    assert_eq!((totals.errors, totals.retries), (0, 0));

    let direct = server.client("postgres").await.expect("a connection");
    let mut found = LookUp::default();
    pgbench::look_up(&direct, &totals, &mut found).await.expect("a look-up");
    assert_eq!(found, LookUp { acknowledged: totals.transactions, ..LookUp::default() });
    let damage = "DELETE FROM pgbench_history WHERE ctid = (SELECT ctid FROM pgbench_history WHERE delta <> 0 LIMIT 1)";
    direct.batch_execute(damage).await.expect("damage");
    let mut found = LookUp::default();
    pgbench::look_up(&direct, &totals, &mut found).await.expect("a look-up");
    assert_eq!(found.missing, 4, "one row of history, and three tables out of balance: {:?}", found.examples);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "wants the machine to itself: `make demo` is the same walk at full length; cargo nextest run --test demo --run-ignored all"]
async fn the_whole_demo_with_one_second_for_each_step() {
    let options = Options {
        clients: 4,
        pgbench_clients: 2,
        scale: 1,
        step: 1,
        seed: None,
        log: None,
        program: Some(env!("CARGO_BIN_EXE_crossfade").into()),
    };
    let report = demo::run(options).await.expect("a report");
    assert!(report.passed(), "{report}");
    assert!(report.pgbench_transactions > 0 && report.owed_most > 0, "{report}");
}
