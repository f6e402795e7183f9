//! pgbench's TPC-B beside the clients: run after run, each with another protocol, through the proxy.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::DemoError;
use super::acks::LookUp;
use super::show::Board;

/// How pgbench is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The program.
    pub program: PathBuf,
    /// Where it writes its transaction logs.
    pub directory: PathBuf,
    /// PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE: the proxy.
    pub environment: Vec<(&'static str, String)>,
    /// Connections.
    pub clients: usize,
}

/// What pgbench has said of its runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Transactions that it was told are committed.
    pub transactions: u64,
    /// Serialization failures and deadlocks.
    pub retries: u64,
    /// Runs that ended early, because of an error that a client saw.
    pub errors: u64,
    /// Its longest transaction, in microseconds.
    pub longest_us: u64,
}

impl Totals {
    /// Adds those of another series of runs.
    pub fn add(&mut self, other: Totals) {
        self.transactions += other.transactions;
        self.retries += other.retries;
        self.errors += other.errors;
        self.longest_us = self.longest_us.max(other.longest_us);
    }
}

/// The length of one run, in seconds: the time that a stop may take.
const RUN_S: u64 = 4;
/// One a run, in turn. Prepared statements live through a phase change within a run.
const PROTOCOLS: [&str; 3] = ["simple", "prepared", "extended"];

/// pgbench, running again and again until it is stopped.
pub struct Pgbench {
    go_on: watch::Sender<bool>,
    runs: Option<JoinHandle<Result<Totals, DemoError>>>,
}

impl Pgbench {
    /// Starts the first run.
    pub fn start(settings: Settings, board: Arc<Board>) -> Pgbench {
        let (go_on, wanted) = watch::channel(true);
        let runs = tokio::spawn(async move {
            let mut totals = Totals::default();
            for protocol in PROTOCOLS.iter().cycle() {
                if !*wanted.borrow() {
                    break;
                }
                run(&settings, protocol, &board, &mut totals).await?;
            }
            Ok(totals)
        });
        Pgbench { go_on, runs: Some(runs) }
    }

    /// Lets the run under way end, and starts none after it.
    ///
    /// # Errors
    /// When pgbench could not be run at all.
    pub async fn stop(mut self) -> Result<Totals, DemoError> {
        self.go_on.send_replace(false);
        match self.runs.take() {
            Some(runs) => runs.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())),
            None => Ok(Totals::default()),
        }
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        if let Some(runs) = &self.runs {
            runs.abort();
        }
    }
}

async fn run(settings: &Settings, protocol: &str, board: &Arc<Board>, totals: &mut Totals) -> Result<(), DemoError> {
    let prefix = settings.directory.join("pgbench");
    let clients = settings.clients.to_string();
    let mut child = Command::new(&settings.program)
        .args(["--no-vacuum", "--builtin=tpcb-like", "--progress=1", "--log"])
        .args(["--client", &clients, "--jobs=1", "--time", &RUN_S.to_string(), "--protocol", protocol])
        .arg("--log-prefix")
        .arg(&prefix)
        .envs(settings.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(DemoError::io("starting pgbench (it comes with PostgreSQL's server or postgresql-contrib)"))?;
    let mut complaints = Vec::new();
    if let Some(progress) = child.stderr.take() {
        let mut lines = BufReader::new(progress).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            match progress_tps(&line) {
                Some(tps) => board.pgbench_rate.store(tps as u64, Ordering::Relaxed),
                None if line.contains("error") || line.contains("fatal") => complaints.push(line),
                None => {}
            }
        }
    }
    let output = child.wait_with_output().await.map_err(DemoError::io("running pgbench"))?;
    board.pgbench_rate.store(0, Ordering::Relaxed);
    let said = String::from_utf8_lossy(&output.stdout);
    totals.transactions += number_after(&said, "number of transactions actually processed: ").unwrap_or(0);
    totals.retries += number_after(&said, "number of failed transactions: ").unwrap_or(0);
    if !output.status.success() {
        totals.errors += 1;
        board.error(complaints.into_iter().next().unwrap_or_else(|| format!("pgbench ended with {}", output.status)));
    }
    totals.longest_us = totals.longest_us.max(longest_in_logs(&settings.directory));
    Ok(())
}

/// `progress: 1.0 s, 523.0 tps, lat ...`
fn progress_tps(line: &str) -> Option<f64> {
    line.strip_prefix("progress: ")?.split(", ").nth(1)?.strip_suffix(" tps")?.parse().ok()
}

fn number_after(text: &str, label: &str) -> Option<u64> {
    let rest = &text[text.find(label)? + label.len()..];
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The third field of pgbench's transaction logs, at its largest. The logs are removed.
fn longest_in_logs(directory: &Path) -> u64 {
    let mut longest = 0;
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with("pgbench.") {
            continue;
        }
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let times = text.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok());
        longest = longest.max(times.max().unwrap_or(0));
        // One that stays is read again, which changes nothing.
        let _ = std::fs::remove_file(entry.path());
    }
    longest
}

/// Looks up what pgbench was told: as many rows of history as transactions, and all four tables in balance.
///
/// # Errors
/// When the server cannot be read.
pub async fn look_up(server: &Client, totals: &Totals, found: &mut LookUp) -> Result<(), tokio_postgres::Error> {
    let sql = "SELECT count(*), coalesce(sum(delta), 0)::bigint,
               (SELECT coalesce(sum(abalance), 0) FROM pgbench_accounts)::bigint,
               (SELECT coalesce(sum(tbalance), 0) FROM pgbench_tellers)::bigint,
               (SELECT coalesce(sum(bbalance), 0) FROM pgbench_branches)::bigint FROM pgbench_history";
    let row = server.query_one(sql, &[]).await?;
    // A run that ended early has not told how each of its clients' last transactions went.
    let doubtful = if totals.errors > 0 { i64::MAX / 2 } else { 0 };
    found.acknowledged += totals.transactions;
    found.count("pgbench_history", totals.transactions as i64, doubtful, row.get(0));
    let sum: i64 = row.get(1);
    for (column, table) in [(2, "pgbench_accounts"), (3, "pgbench_tellers"), (4, "pgbench_branches")] {
        let balance: i64 = row.get(column);
        if balance != sum {
            found.miss(format!("{table}: its balance is {balance}, that of pgbench_history {sum}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pgbench_prints_is_read() {
        assert_eq!(progress_tps("progress: 1.0 s, 523.5 tps, lat 7.6 ms stddev 1.2, 0 failed"), Some(523.5));
        assert_eq!(progress_tps("pgbench: error: client 2 aborted"), None);
        let said = "number of transactions actually processed: 2615\nnumber of failed transactions: 3 (0.1%)\n";
        assert_eq!(number_after(said, "number of transactions actually processed: "), Some(2615));
        assert_eq!(number_after(said, "number of failed transactions: "), Some(3));
        assert_eq!(number_after("", "number of failed transactions: "), None);
    }
}
