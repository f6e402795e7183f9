//! Programs that people use, unchanged: psql, pgbench, psycopg 3, asyncpg and tokio-postgres each go through a scenario and
//! write a transcript of all they are told. It is the same through the proxy as it is without, in phase `old` and in
//! `dual-write` and `dual-read`, and in those both databases are equal afterwards. Each scenario is also held directly with two
//! databases, so that a difference is the proxy's.

#[path = "../common/mod.rs"]
mod common;
mod tokio_scenario;

use std::path::PathBuf;
use std::process::Stdio;

use common::pair::{APP, DATABASE};
use common::pgbench::pgbench;
use common::{Databases, Proxy};
use crossfade::cluster::Cluster;
use tokio_postgres::NoTls;

/// Who talks to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    Psql,
    Pgbench,
    Psycopg,
    Asyncpg,
    TokioPostgres,
}

impl Driver {
    /// Makes the tables on both sides.
    async fn prepare(self, databases: &Databases) {
        if self == Driver::Pgbench {
            for side in [&databases.old, &databases.new] {
                pgbench(&side.program("pgbench"), &app_url(side), &["-i", "-q", "-I", "dtp"]).await;
            }
        } else {
            databases.run_on_both(include_str!("schema.sql")).await;
        }
    }

    /// Goes through the scenario at a URL. `programs`: whose version of psql and pgbench.
    async fn transcript(self, programs: &Cluster, url: &str) -> String {
        let transcript = tokio::time::timeout(common::PATIENCE * 3, self.go_through(programs, url));
        transcript.await.unwrap_or_else(|_| panic!("{self:?} has not come to its end"))
    }

    async fn go_through(self, programs: &Cluster, url: &str) -> String {
        match self {
            Driver::Psql => psql(programs, url).await,
            Driver::Pgbench => pgbench_scenario(programs, url).await,
            Driver::Psycopg => python("psycopg_scenario.py", url).await,
            Driver::Asyncpg => python("asyncpg_scenario.py", url).await,
            Driver::TokioPostgres => tokio_scenario::transcript(url).await,
        }
    }
}

fn app_url(cluster: &Cluster) -> String {
    cluster.url_as(APP.0, APP.1, DATABASE)
}

/// The transcripts of two databases that know nothing of each other are the same.
async fn is_repeatable(driver: Driver) {
    let databases = Databases::start(&[]).await;
    driver.prepare(&databases).await;
    let old = driver.transcript(&databases.old, &app_url(&databases.old)).await;
    let new = driver.transcript(&databases.new, &app_url(&databases.new)).await;
    assert_same(&old, &new);
    assert!(old.lines().count() > 20, "a transcript that says nothing: {old}");
}

/// The transcript through the proxy is that of the database itself.
async fn is_served_as_ever(driver: Driver, phase: &str) {
    let (alone, databases) = tokio::join!(Databases::start(&[]), Databases::start(&[]));
    driver.prepare(&alone).await;
    driver.prepare(&databases).await;
    let direct = driver.transcript(&alone.old, &app_url(&alone.old)).await;
    // The phase is moved to, as an operator would, and what the move owes is paid before.
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    if phase != "old" {
        proxy.set_phase(phase).await;
        proxy.settle().await;
    }
    let through = driver.transcript(&databases.old, &proxy.url_as(APP.0, APP.1, DATABASE)).await;
    assert_same(&direct, &through);
    if phase != "old" {
        proxy.settle().await;
        assert!(databases.assert_equal().await > 0, "the scenario left no row");
    }
}

/// Fails at the first line that differs, with the lines before it.
fn assert_same(direct: &str, through: &str) {
    let (direct, through): (Vec<&str>, Vec<&str>) = (direct.lines().collect(), through.lines().collect());
    let same = direct.iter().zip(&through).take_while(|(direct, through)| direct == through).count();
    if same < direct.len().max(through.len()) {
        let before = direct[same.saturating_sub(10)..same].join("\n");
        let end = "(the end)";
        let (direct, through) = (direct.get(same).unwrap_or(&end), through.get(same).unwrap_or(&end));
        panic!("line {}:\n{before}\n- {direct}\n+ {through}", same + 1);
    }
}

async fn psql(programs: &Cluster, url: &str) -> String {
    let output = tokio::process::Command::new(programs.program("psql"))
        .args(["-X", "-a", "-f", "tests/drivers/psql.sql", "-d", url])
        .env("LC_ALL", "C.UTF-8")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .kill_on_drop(true)
        .stdin(Stdio::null())
        .output()
        .await
        .expect("psql runs");
    assert!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
    // What it echoes from the middle of LATIN1 need not be UTF-8.
    let texts = [output.stdout, output.stderr].map(|bytes| bytes.escape_ascii().to_string().replace("\\n", "\n"));
    without_numbers_after(&texts.join("\n"), &["with PID ", "lo_import ", "lo_unlink "])
}

/// Takes out process ids and OIDs, which stand behind these words.
fn without_numbers_after(text: &str, words: &[&str]) -> String {
    words.iter().fold(text.to_owned(), |text, word| {
        let mut parts = text.split(word);
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |text, part| text + word + part.trim_start_matches(|c: char| c.is_ascii_digit()))
    })
}

/// Fills the tables (COPY in a block with TRUNCATE, then by INSERT ... SELECT), runs TPC-B in each protocol with concurrent
/// clients, and says what the tables hold: the seeds are fixed, and what transactions add up to is the same in any order.
async fn pgbench_scenario(programs: &Cluster, url: &str) -> String {
    let program = programs.program("pgbench");
    let mut transcript = String::new();
    for step in ["g", "G"] {
        pgbench(&program, url, &["-i", "-q", "-I", step]).await;
        transcript += &format!("filled by {step}\n{}", pgbench_tables(url).await);
    }
    for protocol in ["simple", "extended", "prepared"] {
        let arguments = ["-n", "-M", protocol, "-c", "4", "-t", "50", "--random-seed", "7"];
        let report = pgbench(&program, url, &arguments).await;
        transcript += &format!("{protocol}: {} done, {} failed\n", report.transactions, report.failed);
        transcript += &pgbench_tables(url).await;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/drivers/pipeline.pgbench");
    let report =
        pgbench(&program, url, &["-n", "-M", "extended", "-f", script, "-c", "2", "-t", "20", "--random-seed", "7"])
            .await;
    transcript += &format!("pipeline: {} done, {} failed\n", report.transactions, report.failed);
    transcript + &pgbench_tables(url).await
}

async fn pgbench_tables(url: &str) -> String {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("connects");
    let driving = tokio::spawn(connection);
    let mut text = String::new();
    for sql in [
        "SELECT count(*), sum(abalance), md5(string_agg(aid || ':' || abalance, ',' ORDER BY aid)) FROM pgbench_accounts",
        "SELECT count(*), sum(tbalance), md5(string_agg(tid || ':' || tbalance, ',' ORDER BY tid)) FROM pgbench_tellers",
        "SELECT count(*), sum(bbalance), md5(string_agg(bid || ':' || bbalance, ',' ORDER BY bid)) FROM pgbench_branches",
        "SELECT count(*), sum(delta), md5(string_agg(concat_ws(':', tid, bid, aid, delta), ',' ORDER BY tid, bid, aid, delta)) FROM pgbench_history",
    ] {
        for message in client.simple_query(sql).await.expect("reads") {
            if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
                let values: Vec<&str> = (0..row.len()).map(|at| row.get(at).unwrap_or("NULL")).collect();
                text += &format!("  {}\n", values.join(" "));
            }
        }
    }
    drop(client);
    driving.await.expect("no panic").expect("a clean end");
    text
}

async fn python(script: &str, url: &str) -> String {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/venv/bin/python");
    assert!(python.exists(), "{} is missing: run `make setup`", python.display());
    let output = tokio::process::Command::new(python)
        .arg(root.join("tests/drivers").join(script))
        .env("CROSSFADE_TEST_DSN", url)
        .env("PYTHONIOENCODING", "utf-8")
        .env_remove("PGPASSWORD")
        .kill_on_drop(true)
        .stdin(Stdio::null())
        .output()
        .await
        .expect("python runs");
    let [text, errors] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{script}: {errors}\nafter:\n{text}");
    text
}

/// Three tests for each driver.
macro_rules! scenarios {
    ($($name:ident: $driver:expr,)*) => {$(
        mod $name {
            use super::*;

            #[tokio::test]
            async fn says_the_same_twice() {
                is_repeatable($driver).await;
            }

            #[tokio::test]
            async fn is_served_as_ever_in_old() {
                is_served_as_ever($driver, "old").await;
            }

            #[tokio::test]
            async fn is_served_as_ever_in_dual_write() {
                is_served_as_ever($driver, "dual-write").await;
            }

            #[tokio::test]
            async fn is_served_as_ever_in_dual_read() {
                is_served_as_ever($driver, "dual-read").await;
            }
        }
    )*};
}

scenarios! {
    psql_client: Driver::Psql,
    pgbench_client: Driver::Pgbench,
    psycopg_driver: Driver::Psycopg,
    asyncpg_driver: Driver::Asyncpg,
    tokio_driver: Driver::TokioPostgres,
}
