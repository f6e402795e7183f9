//! `crossfade demo`: a whole migration on two throw-away clusters, with a load running all the time.
//!
//! [`walk`] leads through it: it starts the servers, the proxy ([`proxy`]) and the load ([`load`], whose clients are in
//! [`client`], and [`pgbench`]), changes the phase, stops the new server and starts it again, compares both sides
//! ([`compare`]) and looks up every acknowledged write ([`acks`]). [`show`] draws what happens.
//!
//! The demo stands outside: it meets the proxy only through its port, its configuration file and /metrics.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cluster::ClusterError;

pub mod acks;
pub mod client;
pub mod compare;
pub mod load;
pub mod pgbench;
pub mod proxy;
pub mod schema;
pub mod show;
pub mod walk;

use acks::LookUp;
use compare::Compared;
use show::{Board, Display, Longest, milliseconds};

/// How the demo is run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Clients of the photo-sharing application (at most 100).
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub clients: u16,
    /// Clients of pgbench; 0: no pgbench.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(0..=100))]
    pub pgbench_clients: u16,
    /// pgbench's scale: 100,000 accounts each.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub scale: u16,
    /// How long each step lasts at least, in seconds.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub step: u16,
    /// Seed of the clients' random choices; default: another one each time.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Keep the proxy's log in this file.
    #[arg(long)]
    pub log: Option<PathBuf>,
    /// The program that runs as the proxy; default: this one.
    #[arg(long, hide = true)]
    pub program: Option<PathBuf>,
}

/// Why the demo could not be carried through.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A throw-away server.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// A statement of the demo's own, sent to a server directly.
    #[error("{what}: {error}")]
    Postgres {
        /// What the demo was doing.
        what: &'static str,
        /// What the server said.
        error: tokio_postgres::Error,
    },
    /// A file or a process.
    #[error("{what}: {error}")]
    Io {
        /// What the demo was doing.
        what: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
    /// The proxy did not do what was expected.
    #[error("the proxy: {what}. The end of its log:\n{log}")]
    Proxy {
        /// What it did.
        what: String,
        /// The last lines of its log.
        log: String,
    },
    /// Ctrl-C or SIGTERM.
    #[error("interrupted; the servers and the proxy are stopped and removed")]
    Interrupted,
}

impl DemoError {
    /// For `map_err` on I/O.
    pub fn io(what: &'static str) -> impl Fn(std::io::Error) -> DemoError {
        move |error| DemoError::Io { what, error }
    }

    /// For `map_err` on statements.
    pub fn postgres(what: &'static str) -> impl Fn(tokio_postgres::Error) -> DemoError {
        move |error| DemoError::Postgres { what, error }
    }
}

/// How it went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Transactions of the application's clients that were acknowledged, reading ones included.
    pub client_transactions: u64,
    /// Transactions of pgbench.
    pub pgbench_transactions: u64,
    /// Errors seen by clients of both kinds.
    pub errors: u64,
    /// Serialization failures and deadlocks, which applications repeat.
    pub retries: u64,
    /// The first errors.
    pub error_examples: Vec<String>,
    /// The longest single operation of any client.
    pub longest: Longest,
    /// The largest debt, owed and in flight; a whole table counts as one.
    pub owed_most: u64,
    /// Both sides, table by table, before phase `new`.
    pub compared: Vec<Compared>,
    /// Every acknowledged write, looked up in new at the end.
    pub looked_up: LookUp,
    /// From the first command to the last.
    pub took: Duration,
}

impl Report {
    /// Rows read and compared, those of old.
    pub fn rows_compared(&self) -> u64 {
        self.compared.iter().map(|table| table.old_rows).sum()
    }

    /// Rows that were not equal on both sides.
    pub fn rows_different(&self) -> u64 {
        self.compared.iter().map(|table| table.different).sum()
    }

    /// No client saw an error, both sides were equal, every acknowledged write is there, and nothing else is.
    pub fn passed(&self) -> bool {
        let missing = self.looked_up.missing + self.looked_up.unexpected;
        // A demo that did nothing has shown nothing.
        let did = self.client_transactions > 0 && self.rows_compared() > 0 && self.looked_up.acknowledged > 0;
        did && self.errors == 0 && self.rows_different() == 0 && missing == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transactions = self.client_transactions + self.pgbench_transactions;
        let longest = &self.longest;
        let rows: [(&str, String, String); 10] = [
            ("transactions", transactions.to_string(), format!("{} of them pgbench's", self.pgbench_transactions)),
            ("errors seen by clients", self.errors.to_string(), String::new()),
            ("serialization failures, deadlocks", self.retries.to_string(), String::new()),
            ("longest pause of any client", milliseconds(longest.us), longest.during.clone()),
            ("largest debt", self.owed_most.to_string(), "keys and tables, owed or in flight".to_owned()),
            (
                "rows compared",
                self.rows_compared().to_string(),
                format!("in {} tables, old with new", self.compared.len()),
            ),
            ("rows different", self.rows_different().to_string(), String::new()),
            ("writes acknowledged", self.looked_up.acknowledged.to_string(), "each looked up in new".to_owned()),
            ("of these missing", self.looked_up.missing.to_string(), String::new()),
            ("writes that nobody made", self.looked_up.unexpected.to_string(), String::new()),
        ];
        for (name, value, remark) in rows {
            writeln!(f, "{}", format!("  {name:<34}{value:>12}  {remark}").trim_end())?;
        }
        let tables = self.compared.iter().filter(|table| table.different > 0);
        for table in tables {
            let example = table.example.as_deref().unwrap_or("");
            writeln!(f, "    {}: {} rows different; {example}", table.table, table.different)?;
        }
        for example in self.error_examples.iter().chain(&self.looked_up.examples) {
            writeln!(f, "    {example}")?;
        }
        let verdict = if self.passed() { "passed" } else { "FAILED" };
        write!(f, "  {verdict} in {:.0} s", self.took.as_secs_f64())
    }
}

/// Runs the demo and shows it on standard error. The servers, the proxy and their files are gone when this returns.
///
/// # Errors
/// When it could not be carried through: a server or the proxy that does not start, a phase that is not reached, Ctrl-C.
/// Errors that clients saw, and rows that differ, are in the report instead.
pub async fn run(options: Options) -> Result<Report, DemoError> {
    let board = Arc::new(Board::new());
    let display = tokio::spawn(Display::new(board.clone()).run());
    let outcome = tokio::select! {
        outcome = walk::walk(&options, board) => outcome,
        () = interrupted() => Err(DemoError::Interrupted),
    };
    display.abort();
    outcome
}

async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => () }
        }
        // Without signals of our own the process ends by theirs.
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Report {
        let table = |name: &str, rows| Compared {
            table: name.to_owned(),
            old_rows: rows,
            new_rows: rows,
            different: 0,
            example: None,
        };
        Report {
            client_transactions: 900,
            pgbench_transactions: 100,
            compared: vec![table("public.photos", 40), table("public.likes", 2)],
            looked_up: LookUp { acknowledged: 500, ..LookUp::default() },
            ..Report::default()
        }
    }

    #[test]
    fn a_report_passes_only_without_any_fault() {
        assert!(good().passed());
        assert!(!Report::default().passed(), "nothing done, nothing shown");
        let faults: [fn(&mut Report); 4] = [
            |report| report.errors = 1,
            |report| report.compared[1].different = 1,
            |report| report.looked_up.missing = 1,
            |report| report.looked_up.unexpected = 1,
        ];
        for fault in faults {
            let mut report = good();
            fault(&mut report);
            assert!(!report.passed() && report.to_string().contains("FAILED"), "{report}");
        }
    }

    #[test]
    fn a_report_adds_up_and_names_what_differs() {
        let mut report = good();
        report.compared[0].different = 3;
        report.compared[0].example = Some("only on old: (7)".to_owned());
        let text = report.to_string();
        for expected in
            ["transactions", "1000", "42", "in 2 tables", "public.photos: 3 rows different; only on old: (7)"]
        {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }
}
