//! The application: clients that write and read through the proxy the whole time, each over a connection of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Config, NoTls};

use super::acks::Acknowledged;
use super::client::{Client, Failure};
use super::show::Board;

/// What the clients are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Work,
    Pause,
    Stop,
}

/// What clients have counted so far.
#[derive(Debug, Default)]
pub struct Counts {
    /// Transactions acknowledged, reading ones included.
    pub transactions: AtomicU64,
    /// Errors seen by clients.
    pub errors: AtomicU64,
    /// Serialization failures and deadlocks: an application repeats these.
    pub retries: AtomicU64,
}

/// The running clients.
pub struct Load {
    orders: watch::Sender<Order>,
    waiting: watch::Receiver<usize>,
    clients: Vec<JoinHandle<Acknowledged>>,
    /// What they have counted.
    pub counts: Arc<Counts>,
}

/// How the clients behave.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where they connect, as whom.
    pub server: Config,
    /// How many.
    pub clients: usize,
    /// The longest rest between two operations.
    pub rest: Duration,
    /// Of the random choices.
    pub seed: u64,
}

impl Load {
    /// Starts the clients.
    pub fn start(settings: &Settings, board: Arc<Board>) -> Load {
        let (orders, _) = watch::channel(Order::Work);
        let (arrivals, waiting) = watch::channel(0);
        let arrivals = Arc::new(arrivals);
        let counts = Arc::new(Counts::default());
        let clients = (0..settings.clients)
            .map(|number| {
                let worker = Worker {
                    number,
                    settings: settings.clone(),
                    orders: orders.subscribe(),
                    arrivals: arrivals.clone(),
                    counts: counts.clone(),
                    board: board.clone(),
                };
                tokio::spawn(worker.run())
            })
            .collect();
        Load { orders, waiting, clients, counts }
    }

    /// Holds every client between two of its operations; returns when all of them stand still.
    pub async fn pause(&mut self) {
        self.orders.send_replace(Order::Pause);
        let all = self.clients.len();
        // The sender lives as long as the clients do; when the last one ends there is nobody left to wait for.
        let _ = self.waiting.wait_for(|waiting| *waiting == all).await;
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.orders.send_replace(Order::Work);
    }

    /// Ends them, and says what they were told.
    pub async fn stop(mut self) -> Acknowledged {
        self.orders.send_replace(Order::Stop);
        let mut all = Acknowledged::default();
        for client in std::mem::take(&mut self.clients) {
            match client.await {
                Ok(acknowledged) => all.merge(acknowledged),
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            }
        }
        all
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for client in &self.clients {
            client.abort();
        }
    }
}

struct Worker {
    number: usize,
    settings: Settings,
    orders: watch::Receiver<Order>,
    arrivals: Arc<watch::Sender<usize>>,
    counts: Arc<Counts>,
    board: Arc<Board>,
}

/// A client with an odd number closes its connection and opens a new one after this many operations.
const OPERATIONS_PER_CONNECTION: u64 = 400;
/// The rest after an error, so that a proxy that is gone is not asked a thousand times a second.
const REST_AFTER_ERROR: Duration = Duration::from_millis(100);

impl Worker {
    async fn run(mut self) -> Acknowledged {
        let mut rng = StdRng::seed_from_u64(self.settings.seed.wrapping_add(self.number as u64));
        let mut client = Client::new(self.number, &self.settings.server);
        // Its first login is no pause of an application at work: it is not timed. A failure shows in the first operation.
        let _ = client.connect().await;
        let mut operations = 0u64;
        while self.may_go_on().await {
            operations += 1;
            if self.number % 2 == 1 && operations.is_multiple_of(OPERATIONS_PER_CONNECTION) {
                client.disconnect();
            }
            let started = Instant::now();
            let outcome = client.operate(&mut rng).await;
            self.record(started.elapsed(), &outcome);
            let rest = match outcome {
                Ok(()) => self.settings.rest.mul_f64(rng.random_range(0.0..=1.0)),
                Err(_) => {
                    client.disconnect();
                    REST_AFTER_ERROR
                }
            };
            if !rest.is_zero() {
                tokio::time::sleep(rest).await;
            }
        }
        client.acknowledged
    }

    /// False: stop. Waits while the clients are paused.
    async fn may_go_on(&mut self) -> bool {
        let order = *self.orders.borrow_and_update();
        match order {
            Order::Work => true,
            Order::Stop => false,
            Order::Pause => {
                self.arrivals.send_modify(|waiting| *waiting += 1);
                let next = self.orders.wait_for(|order| *order != Order::Pause).await.map(|order| *order);
                self.arrivals.send_modify(|waiting| *waiting -= 1);
                matches!(next, Ok(Order::Work))
            }
        }
    }

    fn record(&self, took: Duration, outcome: &Result<(), Failure>) {
        self.board.operation(took.as_micros() as u64);
        match outcome {
            Ok(()) => {
                self.counts.transactions.fetch_add(1, Ordering::Relaxed);
            }
            Err(failure) if is_retry(failure) => {
                self.counts.retries.fetch_add(1, Ordering::Relaxed);
            }
            Err(failure) => {
                self.counts.errors.fetch_add(1, Ordering::Relaxed);
                self.board.error(format!("client {}: {failure}", self.number));
            }
        }
    }
}

/// What every PostgreSQL application must be ready to repeat.
fn is_retry(failure: &Failure) -> bool {
    match failure {
        Failure::Server { error, .. } => {
            matches!(error.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE | &SqlState::T_R_DEADLOCK_DETECTED))
        }
        Failure::Wrong(_) => false,
    }
}

/// Opens a connection; its other half runs until the client is dropped.
///
/// # Errors
/// When it cannot be opened.
pub async fn connect(server: &Config) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = server.connect(NoTls).await?;
    // How a connection ends is seen by its client's next statement.
    tokio::spawn(connection);
    Ok(client)
}
