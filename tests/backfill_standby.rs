//! A backfill beside a standby of new that lags: a real one, whose recovery is paused.

mod backfill_support;
mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use backfill_support::Running;
use common::Pair;
use common::pair::DATABASE;
use crossfade::cluster::Cluster;

/// A standby that streams from a cluster; it is stopped, and its files go, when this is dropped.
struct Standby<'a> {
    primary: &'a Cluster,
    dir: PathBuf,
}

/// As the account that the primary runs as: PostgreSQL refuses to be root.
fn run(program: &Path, arguments: &[&str], primary: &Cluster) {
    let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n");
    let mut command = Command::new(if root { "setpriv".as_ref() } else { program.as_os_str() });
    if root {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    }
    command.args(arguments).envs(primary.environment("postgres")).current_dir("/tmp");
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.expect("runs").success(), "{program:?} {arguments:?}");
}

impl<'a> Standby<'a> {
    fn of(primary: &'a Cluster) -> Standby<'a> {
        let dir = std::env::temp_dir().join(format!("xf-standby-{}", std::process::id()));
        let data = dir.display().to_string();
        run(&primary.program("pg_basebackup"), &["-D", &data, "-X", "stream", "-R", "-c", "fast"], primary);
        let standby = Standby { primary, dir };
        // No port that anybody else could have.
        let options = format!("-c listen_addresses='' -c unix_socket_directories='{data}'");
        let log = format!("{data}/log");
        run(&primary.program("pg_ctl"), &["-D", &data, "-l", &log, "-o", &options, "-w", "start"], primary);
        standby
    }

    async fn says(&self, sql: &str) -> String {
        let mut environment = self.primary.environment(DATABASE).to_vec();
        environment.push(("PGHOST", self.dir.display().to_string()));
        let psql = self.primary.program("psql");
        let output = tokio::process::Command::new(psql).args(["-XAtc", sql]).envs(environment).output().await;
        String::from_utf8_lossy(&output.expect("psql runs").stdout).trim().to_owned()
    }
}

impl Drop for Standby<'_> {
    fn drop(&mut self) {
        let data = self.dir.display().to_string();
        run(&self.primary.program("pg_ctl"), &["-D", &data, "-m", "immediate", "-w", "stop"], self.primary);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// What a lag is has a test of its own (`standbys`): this one takes long for what it adds.
#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_rests_while_a_standby_is_too_far_behind() {
    if !common::proof() {
        return println!("CROSSFADE_PROOF is not set");
    }
    let schema = "CREATE TABLE t (k int PRIMARY KEY, v text)";
    let mut pair = Pair::start("old", schema, "expect: { lag: 1s }").await;
    let rows = "INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 8000) n";
    pair.databases.old.psql(DATABASE, rows).await.expect("fills old");
    let config = pair.proxy.config_path();
    pair.proxy.set_phase("dual-write").await;
    let databases = &pair.databases;
    let standby = Standby::of(&databases.new);
    let streams = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
    common::until("the standby streams", async || {
        databases.new.psql(DATABASE, streams).await.expect("reads").trim() == "1"
    })
    .await;
    standby.says("SELECT pg_wal_replay_pause()").await;
    // The proxy's own repair is not what this is about: its walk gives way.
    let mut running = Running::start(&config, &["--rate", "2000", "t"]);
    let filled = async || -> i64 {
        let rows = "SELECT coalesce(sum(rows), 0) FROM crossfade.backfill";
        databases.old.psql(DATABASE, rows).await.expect("reads").trim().parse().expect("a number")
    };
    common::until("it has begun", async || filled().await > 0).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let rested = filled().await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(filled().await, rested, "it rests");
    assert!(rested < 8000 && !running.has_ended(), "{rested}");
    standby.says("SELECT pg_wal_replay_resume()").await;
    let (status, said) = running.end().await;
    assert!(status.success(), "{said}");
    assert!(said.contains("s behind, and 1 s are allowed") && said.contains("standbys have caught up"), "{said}");
    assert_eq!(pair.settle_and_assert_equal().await, 8000);
    drop(standby);
}
