//! A load generator that keeps Crossfade's protocol by hand: what it costs an application to write both databases itself, with the same promise.
//! The benchmark's yardstick for phases with a mirror, not part of Crossfade.
//!
//! `by-hand --old HOST:PORT --database NAME` runs plain transactions against one address: a server, or a proxy. With `--new HOST:PORT` each
//! transaction is mirrored by hand (`mirrored`); both databases must have had `crossfade install`, and no proxy may write them meanwhile.
//! It prints one figure a line: transactions, tps, and mean, median and 99th percentile of the latency in microseconds.

mod connection;
mod mirrored;
mod plain;
mod statements;

use std::error::Error;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::Parser;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::JoinSet;

use mirrored::{Clearing, Mirrored};
use plain::Plain;
use statements::{Draw, Scale, Workload};

/// What goes wrong ends the run; its text is for people.
type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// pgbench's transactions, plain or mirrored by hand.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    /// The server or proxy that transactions run on, as HOST:PORT; the login is postgres, without a password.
    #[arg(long)]
    old: String,
    /// The server that they are mirrored to.
    #[arg(long)]
    new: Option<String>,
    /// The database, on both. It has pgbench's tables.
    #[arg(long)]
    database: String,
    #[arg(long, value_enum, default_value = "tpcb")]
    workload: Workload,
    #[arg(long, default_value_t = 8)]
    clients: usize,
    /// How long, in seconds.
    #[arg(long, default_value_t = 6)]
    seconds: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// One client, in one of two ways.
enum Client {
    Plain(Plain),
    Mirrored(Box<Mirrored>),
}

/// Latencies of one client's transactions in microseconds, in their order.
type Latencies = Vec<u32>;

fn main() -> Outcome<()> {
    let arguments = Arguments::parse();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = processors.clamp(1, arguments.clients.max(1));
    let clearing = arguments.new.as_ref().map(|new| Clearing::start(&arguments, new)).transpose()?;
    let (tell, told) = mpsc::channel();
    let mut workers = Vec::new();
    for thread in 0..threads {
        let (arguments, clearing, tell) = (arguments.clone(), clearing.as_ref().map(Clearing::sender), tell.clone());
        let (go, begin) = mpsc::channel();
        let numbers = (thread..arguments.clients).step_by(threads).collect();
        workers.push((go, std::thread::spawn(move || work(&arguments, numbers, clearing, &tell, &begin))));
    }
    // The clock starts when all are connected and have prepared their statements.
    for _ in 0..threads {
        told.recv()??;
    }
    let start = Instant::now();
    let deadline = start + Duration::from_secs(arguments.seconds);
    let mut latencies = Vec::new();
    workers.iter().try_for_each(|(go, _)| go.send(deadline))?;
    for (_, worker) in workers {
        latencies.extend(worker.join().map_err(|_| "a thread has panicked")??);
    }
    let took = start.elapsed();
    if let Some(clearing) = clearing {
        clearing.finish()?;
    }
    print(latencies, took)
}

/// One thread with its clients: connects, says so, waits for the start, and runs transactions until the time is over.
fn work(
    arguments: &Arguments,
    numbers: Vec<usize>,
    clearing: Option<mirrored::Paid>,
    tell: &mpsc::Sender<Outcome<()>>,
    begin: &mpsc::Receiver<Instant>,
) -> Outcome<Latencies> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let connected = async {
            let mut clients = Vec::new();
            for number in numbers {
                let client = match (&arguments.new, &clearing) {
                    (Some(new), Some(paid)) => {
                        Client::Mirrored(Box::new(Mirrored::connect(arguments, new, paid.clone()).await?))
                    }
                    _ => Client::Plain(Plain::connect(arguments).await?),
                };
                clients.push((number, client));
            }
            Ok((clients, Scale::ask(arguments).await?))
        };
        let (clients, scale) = match connected.await {
            Ok(connected) => connected,
            Err(error) => return Ok(tell.send(Err(error)).map(|()| Vec::new())?),
        };
        tell.send(Ok(()))?;
        let Ok(deadline) = begin.recv() else { return Ok(Vec::new()) };
        let mut running = JoinSet::new();
        for (number, client) in clients {
            let random = StdRng::seed_from_u64(arguments.seed << 16 | number as u64);
            running.spawn(run(client, scale, random, deadline));
        }
        let mut latencies = Vec::new();
        while let Some(run) = running.join_next().await {
            latencies.extend(run??);
        }
        Ok(latencies)
    })
}

async fn run(mut client: Client, scale: Scale, mut random: StdRng, deadline: Instant) -> Outcome<Latencies> {
    let mut latencies = Vec::new();
    let mut now = Instant::now();
    while now < deadline {
        let draw = Draw::new(scale, &mut random);
        match &mut client {
            Client::Plain(plain) => plain.transaction(&draw).await?,
            Client::Mirrored(mirrored) => mirrored.transaction(&draw).await?,
        }
        let done = Instant::now();
        latencies.push((done - now).as_micros() as u32);
        now = done;
    }
    if let Client::Mirrored(mirrored) = &mut client {
        mirrored.settle().await?;
    }
    Ok(latencies)
}

fn print(mut latencies: Latencies, took: Duration) -> Outcome<()> {
    if latencies.is_empty() {
        return Err("no transaction was run".into());
    }
    latencies.sort_unstable();
    let count = latencies.len();
    let at = |share: f64| latencies[((count - 1) as f64 * share) as usize];
    println!("transactions {count}");
    println!("tps {:.1}", count as f64 / took.as_secs_f64());
    println!("mean_us {:.1}", latencies.iter().map(|&us| f64::from(us)).sum::<f64>() / count as f64);
    println!("p50_us {}", at(0.50));
    println!("p99_us {}", at(0.99));
    Ok(())
}
