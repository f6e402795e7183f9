//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use crossfade::{cli, server};

/// Moves a live application from one PostgreSQL database to another: no downtime, no lost write, a way back at every step.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// The YAML file.
    #[arg(long, global = true, env = "CROSSFADE_CONFIG", default_value = "config/crossfade.yaml")]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The proxy, in the foreground. SIGHUP reads the file again, SIGTERM drains and ends, a second SIGTERM ends at once.
    Run,
    /// Makes schema crossfade on both sides.
    Install {
        /// Only print the SQL.
        #[arg(long)]
        print_sql: bool,
        /// As with `federate: true` in the file: new reads old's tables through postgres_fdw.
        #[arg(long)]
        federate: bool,
    },
    /// Whether both databases are fit to migrate: one finding a line, with the SQL that mends it. Alters nothing of yours.
    Check {
        /// One JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Copies what was there before, while clients write. May be killed and run again at any time.
    Backfill(cli::BackfillArguments),
    /// Compares both sides while clients write: 0 where they are equal, 1 where a row differs.
    Verify(cli::VerifyArguments),
    /// Finds what was written around the proxy, in the authority's write-ahead log, and has it repaired.
    Sweep(cli::SweepArguments),
    /// Pays what the ledger holds.
    Repair {
        /// Return when nothing is owed or in flight.
        #[arg(long)]
        wait: bool,
        /// Give up waiting after this many seconds.
        #[arg(long, default_value_t = 300)]
        timeout: u64,
        /// Copy this table, which has no key, under a lock that holds its writers back.
        #[arg(long)]
        table: Vec<String>,
    },
    /// The phase that holds and the gates of the next one; with a NAME, moves there.
    Phase(cli::PhaseArguments),
    /// Ends a migration: removes schema crossfade on both sides. Refuses while a phase or a proxy needs it.
    Uninstall {
        /// Remove it all the same.
        #[arg(long)]
        force: bool,
    },
    /// Where the migration stands.
    Status {
        /// One JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Statement shapes that the proxy has seen: what is mirrored, what may be served by new, what was compared.
    Report {
        /// One JSON document.
        #[arg(long)]
        json: bool,
    },
    /// What the proxy would do with a statement, in each phase.
    Explain {
        /// The statement.
        sql: String,
    },
    /// The whole migration on two throw-away clusters, with a load running.
    Demo(crossfade::demo::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("crossfade: threads cannot be started: {error}");
            return ExitCode::from(2);
        }
    };
    runtime.block_on(run(arguments))
}

async fn run(arguments: Arguments) -> ExitCode {
    let path = server::absolute(&arguments.config);
    let outcome = match arguments.command {
        Command::Run => cli::run(&path).await,
        Command::Install { print_sql, federate } => cli::install(&path, print_sql, federate).await,
        Command::Check { json } => cli::check(&path, json).await,
        Command::Backfill(arguments) => cli::backfill(&path, arguments).await,
        Command::Verify(arguments) => cli::verify(&path, arguments).await,
        Command::Sweep(arguments) => cli::sweep(&path, arguments).await,
        Command::Repair { wait, timeout, table } => {
            cli::repair(&path, wait, std::time::Duration::from_secs(timeout), &table).await
        }
        Command::Phase(arguments) => cli::phase(&path, arguments).await,
        Command::Uninstall { force } => cli::uninstall(&path, force).await,
        Command::Status { json } => cli::status(&path, json).await,
        Command::Report { json } => cli::report(&path, json).await,
        Command::Explain { sql } => cli::explain(&path, &sql).await,
        Command::Demo(options) => cli::demo(options).await,
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("crossfade: {error}");
            ExitCode::from(2)
        }
    }
}
