//! Throw-away clusters: what they promise to the other tests.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crossfade::cluster::{Cluster, ClusterError, Stop, processes};

#[tokio::test]
async fn a_crash_keeps_what_was_flushed_and_the_port() {
    let mut cluster = Cluster::builder().settings(&[("fsync", "on")]).start().await.expect("starts");
    let client = cluster.client("postgres").await.expect("connects");
    client.batch_execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await.expect("writes");
    let port = cluster.port();

    cluster.kill9();
    assert!(!cluster.running());
    assert!(processes::of(&cluster.data()).is_empty());
    cluster.client("postgres").await.expect_err("nobody listens");

    cluster.start().await.expect("recovers");
    assert_eq!(cluster.port(), port);
    assert_eq!(cluster.run("postgres", "SELECT a FROM t").await.expect("reads"), "1\n");
    assert!(cluster.log_tail().contains("database system was not properly shut down"), "{}", cluster.log_tail());
    cluster.restart(Stop::Fast).await.expect("restarts");
    assert_eq!(cluster.run("postgres", "SHOW fsync").await.expect("reads"), "on\n");
}

#[tokio::test]
async fn a_frozen_server_answers_nothing_until_it_is_thawed() {
    let cluster = Cluster::builder().start().await.expect("starts");
    let client = cluster.client("postgres").await.expect("connects");
    cluster.freeze();
    let answer = client.simple_query("SELECT 1");
    tokio::pin!(answer);
    tokio::time::timeout(Duration::from_millis(300), &mut answer).await.expect_err("frozen");
    let fresh = tokio::time::timeout(Duration::from_millis(300), cluster.client("postgres")).await;
    fresh.expect_err("the postmaster is frozen too");
    cluster.thaw();
    tokio::time::timeout(Duration::from_secs(10), answer).await.expect("thawed").expect("answers");
}

#[tokio::test]
async fn lineages_tell_copies_of_one_database_from_strangers() {
    let identifier = async |lineage: &str| {
        let cluster = Cluster::builder().lineage(lineage).start().await.expect("starts");
        cluster.run("postgres", "SELECT system_identifier FROM pg_control_system()").await.expect("reads")
    };
    assert_eq!(identifier("old").await, identifier("old").await);
    assert_ne!(identifier("old").await, identifier("new").await);
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why_and_leaves_nothing() {
    let builder = Cluster::builder().settings(&[("shared_buffers", "a lot")]);
    let error = builder.start().await.expect_err("a setting that is wrong");
    assert!(matches!(&error, ClusterError::Server { log, .. } if log.contains("shared_buffers")), "{error}");
    let error = Cluster::builder().version(9).start().await.expect_err("nobody has 9").to_string();
    assert!(error.contains("no PostgreSQL 9 server programs"), "{error}");
}

#[tokio::test]
async fn a_script_reports_its_first_error_and_leaves_nothing_in_its_session() {
    let cluster = Cluster::builder().start().await.expect("starts");
    let run = async |script: &str| cluster.run("postgres", script).await;
    let error = run("CREATE TABLE t (a int, b text); SELECT 1/0; DROP TABLE t").await.expect_err("fails").to_string();
    assert!(error.contains("division by zero"), "{error}");
    assert_eq!(run("INSERT INTO t VALUES (1, ';'), (2, NULL); SELECT * FROM t").await.expect("runs"), "1|;\n2|\n");
    let long = format!("{}SELECT 'end';", "SELECT repeat('x', 100);\n".repeat(5_000));
    assert!(run(&long).await.expect("reads").ends_with("end\n"));

    let backend = run("SET work_mem = '1MB'; SELECT pg_backend_pid(), pg_advisory_lock(1)").await.expect("runs");
    let state = "SELECT pg_backend_pid(), ''; SHOW work_mem; SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    assert_eq!(run(state).await.expect("runs"), format!("{backend}4MB\n0\n"));
    // A transaction that is left open ends, and so does a session that somebody ends.
    run("BEGIN; DELETE FROM t").await.expect("runs");
    assert_eq!(run("SELECT count(*) FROM t").await.expect("reads"), "2\n");
    let other = cluster.client("postgres").await.expect("connects");
    let end = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename = 'postgres'";
    assert!(!other.simple_query(end).await.expect("ends them").is_empty());
    assert_eq!(run("SELECT count(*) FROM t").await.expect("connects anew"), "2\n");
}

#[tokio::test]
async fn dropping_a_cluster_removes_it() {
    let cluster = Cluster::builder().start().await.expect("starts");
    let (data, dir) = (cluster.data(), cluster.dir().to_owned());
    assert!(!processes::of(&data).is_empty());
    drop(cluster);
    assert!(processes::of(&data).is_empty());
    assert!(!dir.exists());
}

/// No test of its own: the test below runs it in another process, to kill that.
#[tokio::test]
async fn wait_to_be_killed() {
    let Ok(note) = std::env::var("CROSSFADE_TEST_NOTE") else { return };
    let cluster = Cluster::builder().start().await.expect("starts");
    std::fs::write(format!("{note}.part"), cluster.dir().to_str().expect("text")).expect("writes");
    std::fs::rename(format!("{note}.part"), note).expect("renames");
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_cluster_ends_with_the_process_that_made_it_even_by_kill_9_and_frozen() {
    let scratch = tempfile::tempdir().expect("a directory");
    let note = scratch.path().join("note");
    let mut owner = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "wait_to_be_killed"])
        .env("CROSSFADE_TEST_NOTE", &note)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("runs");
    until("the cluster is up", || note.exists()).await;
    let dir = std::fs::read_to_string(&note).expect("reads");
    let data = Path::new(&dir).join("data");
    assert!(!processes::of(&data).is_empty());
    processes::freeze_all(&data);
    owner.kill().expect("kills");
    owner.wait().expect("waits");
    until("the watchdog has worked", || processes::of(&data).is_empty() && !Path::new(&dir).exists()).await;
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
