//! A standby that streams from a cluster, and can take its place.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crossfade::cluster::Cluster;
use crossfade::cluster::ports::PortLease;
use crossfade::cluster::processes::{self, Watchdog};
use crossfade::cluster::programs::Account;

/// It is stopped, and its files go, when this is dropped. Its primary may be gone by then.
pub struct Standby {
    lease: PortLease,
    /// Its files are in `data` below.
    dir: PathBuf,
    watchdog: Watchdog,
    pg_ctl: PathBuf,
    psql: PathBuf,
    environment: Vec<(&'static str, String)>,
}

/// As the account that the primary runs as: PostgreSQL refuses to be root.
fn run(program: &Path, arguments: &[&str], environment: &[(&'static str, String)]) {
    let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n");
    let mut command = Command::new(if root { "setpriv".as_ref() } else { program.as_os_str() });
    if root {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    }
    command.args(arguments).envs(environment.iter().cloned()).current_dir("/tmp");
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.expect("runs").success(), "{program:?} {arguments:?}");
}

impl Standby {
    /// A copy of the primary as it is now, which follows it.
    pub fn of(primary: &Cluster) -> Standby {
        let lease = PortLease::take().expect("a free port for the standby");
        let account = Account::find().expect("an account");
        let dir = account.directory("crossfade").expect("a directory");
        let watchdog = Watchdog::guard(&account, &dir).expect("guards");
        let data = dir.join("data").display().to_string();
        let environment = primary.environment("postgres").to_vec();
        run(&primary.program("pg_basebackup"), &["-D", &data, "-X", "stream", "-R", "-c", "fast"], &environment);
        let (pg_ctl, psql) = (primary.program("pg_ctl"), primary.program("psql"));
        let standby = Standby { lease, dir, watchdog, pg_ctl, psql, environment };
        standby.start();
        standby
    }

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.lease.port()
    }

    fn data(&self) -> String {
        self.dir.join("data").display().to_string()
    }

    fn control(&self, arguments: &[&str]) {
        let data = self.data();
        run(&self.pg_ctl, &[&["-D", &data, "-w"], arguments].concat(), &self.environment);
    }

    /// Starts it; where its primary is gone it has what it had.
    pub fn start(&self) {
        let data = self.data();
        let options = format!("-p {} -c unix_socket_directories='{data}'", self.port());
        self.control(&["-l", &format!("{data}/log"), "-o", &options, "start"]);
    }

    /// Stops it: from now on it falls behind.
    pub fn stop(&self) {
        self.control(&["-m", "fast", "stop"]);
    }

    /// It is a primary from now on.
    pub fn promote(&self) {
        self.control(&["promote"]);
    }

    /// What a query gives there.
    pub async fn says(&self, database: &str, sql: &str) -> String {
        let mut environment = self.environment.clone();
        environment.extend([("PGHOST", "127.0.0.1".to_owned()), ("PGPORT", self.port().to_string())]);
        environment.push(("PGDATABASE", database.to_owned()));
        let output = tokio::process::Command::new(&self.psql).args(["-XAtc", sql]).envs(environment).output().await;
        let output = output.expect("psql runs");
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        processes::kill_all(&self.dir.join("data"));
        drop(std::fs::remove_dir_all(&self.dir));
        self.watchdog.release();
    }
}
