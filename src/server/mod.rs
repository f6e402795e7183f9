//! The proxy as a process: threads that run sessions, jobs beside them, an end in good order.

mod console;
mod deadlocks;
pub mod fence;
pub mod http;
mod jobs;
mod late;
mod listen;
pub mod lives;
mod logins;
mod reads;
mod report;
pub mod sweep;
mod undecided;
mod verify;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{Notify, Semaphore, watch};
use tracing::warn;

use crate::auth::verifiers::Verifiers;
use crate::catalog::{Catalog, Sides};
use crate::config::{Config, ConfigError};
use crate::metrics::Metrics;
use crate::phase::Phase;
use crate::plan::cache::Plans;
use crate::shared::{Cancels, PaidQueue, Shared, World, lock};
use crate::switch::gate::Gate;
use crate::switch::learn::{Follower, learn};

/// Why the proxy could not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A port.
    #[error("cannot listen on {address}: {error}; is another process there?")]
    Listen {
        /// Which address.
        address: std::net::SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// TLS towards clients.
    #[error("{0}")]
    Tls(#[from] crate::wire::tls::TlsError),
    /// Metrics.
    #[error("metrics: {0}")]
    Metrics(#[from] crate::metrics::MetricError),
    /// The runtime.
    #[error("threads cannot be started: {0}")]
    Threads(std::io::Error),
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Serving.
    No,
    /// No new clients; transactions under way end.
    Drain,
    /// At once.
    Now,
}

/// Runs the proxy until it is told to stop.
pub async fn run(path: &Path) -> Result<(), RunError> {
    let config = crate::config::load(path)?;
    let tls = listen::tls(&config)?;
    // The ports first: a second proxy by mistake must end before it touches a database.
    let listener = listen::bind(config.listen).await?;
    let admin = match config.admin {
        Some(address) => Some(listen::bind(address).await?),
        None => None,
    };
    let shared = Arc::new(share(config)?);
    shared.tls.store(tls);
    let (stop, stopping) = watch::channel(Stop::No);
    if let Some(admin) = admin {
        tokio::spawn(http::serve(admin, shared.clone(), stopping.clone()));
    }
    jobs::signals(stop.clone(), path.to_owned(), shared.clone());
    // Before anything is known of the databases: a wrong address in the file can be mended.
    tokio::spawn(jobs::follow(shared.clone(), path.to_owned()));
    if !settle_phase(&shared, stopping.clone()).await {
        return Ok(());
    }
    jobs::start(&shared, Follower::appear(&shared).await);
    listen::serve(listener, shared, stopping).await
}

/// Where clients' secrets come from.
fn verifiers(config: &Config) -> Verifiers {
    Verifiers::new(&config.users, vec![config.old.clone(), config.new.clone()])
}

/// What all of one process share, before anything is known of the databases.
pub fn share(config: Config) -> Result<Shared, RunError> {
    let verifiers = verifiers(&config);
    let config = Arc::new(config);
    let plans = Plans::new(config.limits.plan_cache);
    // In a fleet the row says the phase, and a proxy that starts never moves it.
    let intent = (!config.fleet).then_some(config.phase);
    let world = World { epoch: 0, phase: Phase::Old, generation: 0, catalog: Arc::new(Catalog::default()) };
    Ok(Shared {
        started: config.clone(),
        config: ArcSwap::new(config),
        world: ArcSwap::from_pointee(world),
        gate: Arc::new(Gate::default()),
        aside: Arc::new(Gate::default()),
        calls: tokio::sync::watch::Sender::new(()),
        health: Sides::default(),
        paid: PaidQueue::default(),
        metrics: Metrics::new()?,
        plans,
        reads: crate::reads::Reads::default(),
        cancels: Cancels::default(),
        verifiers: ArcSwap::from_pointee(verifiers),
        tls: arc_swap::ArcSwapOption::empty(),
        // Never 0: whoever reads the ledger begins behind it.
        next_debt: AtomicI64::new(1),
        stale: Notify::new(),
        renewed: Notify::new(),
        registry: crate::switch::fleet::Registry::new(),
        deadlocked: Default::default(),
        installed: Default::default(),
        turns: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, usize::from))),
        ahead: Default::default(),
        holding: AtomicI64::new(0),
        overtaken: Notify::new(),
        learnt: Notify::new(),
        intent: std::sync::Mutex::new(intent),
        owed: Notify::new(),
        wanted: Notify::new(),
        reload: Notify::new(),
        reloaded: Notify::new(),
        shutdown: Notify::new(),
        sweep: Default::default(),
        ledger: Default::default(),
        switching: tokio::sync::Mutex::new(()),
        ready: std::sync::atomic::AtomicBool::new(false),
        config_error: Default::default(),
        behind: Default::default(),
        waiting: Default::default(),
    })
}

/// Finds out which phase holds before any client is served; tries until a database that can tell is there. False: told to stop meanwhile.
async fn settle_phase(shared: &Arc<Shared>, mut stopping: watch::Receiver<Stop>) -> bool {
    loop {
        match learn(shared).await {
            Ok(()) => {
                *lock(&shared.waiting) = None;
                return true;
            }
            Err(error) => {
                warn!(%error, "the phase that holds is not known yet; clients wait");
                *lock(&shared.waiting) = Some(format!("the phase that holds is not known yet: {error}"));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            _ = stopping.wait_for(|stop| *stop != Stop::No) => return false,
        }
    }
}

/// The file's path, absolute, so that a change of directory does not matter.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
