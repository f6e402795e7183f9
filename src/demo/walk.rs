//! The way through the demo, step by step.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use tokio_postgres::Config;

use super::load::{self, Load};
use super::pgbench::{self, Pgbench, Totals};
use super::proxy::{Gauges, Proxy, Setup};
use super::show::{Board, Longest};
use super::{DemoError, Options, Report, compare, schema};
use crate::cluster::{Cluster, Stop};
use crate::phase::Phase;

/// The database that moves.
const DATABASE: &str = "shop";
/// The role of the application, and its password.
const ROLE: &str = "app";
const PASSWORD: &str = "photos";
/// How long a step may take before the demo is given up.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long the new server is away.
const AWAY: Duration = Duration::from_secs(4);
/// A phase is asked for again when it does not hold after this time: a gate may have been closed just then.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// For how long gauges must say the same: the proxy renews them once a second.
const STEADY: Duration = Duration::from_millis(2500);
const POLL: Duration = Duration::from_millis(100);
/// The longest rest of a client between two operations.
const REST: Duration = Duration::from_millis(6);

/// Both servers, filled.
struct Servers {
    old: Cluster,
    new: Cluster,
}

/// Walks old, dual-write (with the new server away for a while), new-primary, new. Cancelling this future ends everything.
///
/// # Errors
/// As [`super::run`].
pub async fn walk(options: &Options, board: Arc<Board>) -> Result<Report, DemoError> {
    board.say("starting two PostgreSQL clusters and filling the old one");
    let mut servers = Servers::start(options).await?;
    let scratch = Scratch::make()?;
    board.say("starting the proxy in phase old");
    let setup = Setup {
        program: program(options)?,
        directory: scratch.path.clone(),
        old: servers.old.url(DATABASE),
        new: servers.new.url(DATABASE),
    };
    let proxy = Arc::new(Proxy::start(setup).await?);
    let _watching = AbortOnDrop(tokio::spawn(watch(proxy.clone(), board.clone())).abort_handle());
    let steps = Steps { options, board: &board, proxy: &proxy };
    let outcome = steps.walk(&mut servers, &scratch.path).await;
    if let Some(keep) = &options.log {
        let copied = std::fs::copy(scratch.path.join("crossfade.log"), keep);
        copied.map_err(DemoError::io("keeping the proxy's log"))?;
    }
    outcome
}

fn program(options: &Options) -> Result<PathBuf, DemoError> {
    match &options.program {
        Some(program) => Ok(program.clone()),
        None => std::env::current_exe().map_err(DemoError::io("finding this program")),
    }
}

impl Servers {
    async fn start(options: &Options) -> Result<Servers, DemoError> {
        // Durable, as real servers are: the mirror is stopped at once, and must remember what it has promised.
        let settings =
            [("fsync", "on"), ("max_connections", "200"), ("shared_buffers", "128MB"), ("max_wal_size", "1GB")];
        let cluster = |lineage| Cluster::builder().settings(&settings).lineage(lineage).start();
        let (old, new) = tokio::try_join!(cluster("old"), cluster("new"))?;
        let servers = Servers { old, new };
        servers.make_role().await?;
        tokio::try_join!(define(&servers.old), define(&servers.new))?;
        if options.pgbench_clients > 0 {
            let scale = options.scale.to_string();
            let on_new = initialise(&servers.new, "dtp", &scale);
            tokio::try_join!(initialise(&servers.old, "dtGp", &scale), on_new)?;
        }
        let old = servers.old.client(DATABASE).await?;
        old.batch_execute(&schema::seed()).await.map_err(DemoError::postgres("filling old"))?;
        for server in [&servers.old, &servers.new] {
            let server = server.client(DATABASE).await?;
            let grant = format!("GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}");
            server.batch_execute(&grant).await.map_err(DemoError::postgres("granting"))?;
        }
        Ok(servers)
    }

    /// Makes the application's role on both, with the same SCRAM verifier: so a client's login opens both servers.
    async fn make_role(&self) -> Result<(), DemoError> {
        let old = self.old.client("postgres").await?;
        let sql = format!("CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'");
        let failed = DemoError::postgres("creating the application's role");
        old.batch_execute(&sql).await.map_err(&failed)?;
        let row =
            old.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = $1", &[&ROLE]).await.map_err(&failed)?;
        let verifier: String = row.get(0);
        let new = self.new.client("postgres").await?;
        new.batch_execute(&format!("CREATE ROLE {ROLE} LOGIN PASSWORD '{verifier}'")).await.map_err(&failed)
    }
}

async fn define(server: &Cluster) -> Result<(), DemoError> {
    let failed = DemoError::postgres("creating the application's tables");
    let postgres = server.client("postgres").await?;
    postgres.batch_execute(&format!("CREATE DATABASE {DATABASE}")).await.map_err(&failed)?;
    server.client(DATABASE).await?.batch_execute(schema::DEFINITIONS).await.map_err(&failed)
}

/// pgbench's tables; `steps` as in `pgbench --init-steps`.
async fn initialise(server: &Cluster, steps: &str, scale: &str) -> Result<(), DemoError> {
    let output = tokio::process::Command::new(server.program("pgbench"))
        .args(["--initialize", "--quiet", "--init-steps", steps, "--scale", scale])
        .envs(server.environment(DATABASE))
        .kill_on_drop(true)
        .output()
        .await
        .map_err(DemoError::io("running pgbench (it comes with PostgreSQL's server)"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(DemoError::Io { what: "pgbench --initialize", error: std::io::Error::other(said) })
}

struct Steps<'a> {
    options: &'a Options,
    board: &'a Arc<Board>,
    proxy: &'a Proxy,
}

impl Steps<'_> {
    async fn walk(&self, servers: &mut Servers, scratch: &Path) -> Result<Report, DemoError> {
        let board = self.board;
        let mut load = self.start_load();
        let pgbench = self.start_pgbench(servers, scratch);
        board.say("the application works on old");
        self.hold().await;
        self.move_to(Phase::DualWrite).await?;
        board.say("every write goes to both; new catches up with what was there before");
        self.wait_until("new to have caught up", Gauges::caught_up).await?;
        board.say("both databases are the same, and stay so");
        self.hold().await;
        self.lose_new(servers).await?;
        self.hold().await;
        self.move_to(Phase::NewPrimary).await?;
        board.say("new decides; old is kept exact, as the way back");
        self.hold().await;
        let mut totals = stop_pgbench(pgbench).await?;
        let compared = self.compare(servers, &mut load).await?;
        let pgbench = self.start_pgbench(servers, scratch);
        load.resume();
        self.move_to(Phase::New).await?;
        board.say("the application works on new; old is out of use");
        self.hold().await;
        board.say("the clients stop; every acknowledged write is looked up in new");
        let counts = load.counts.clone();
        let (acknowledged, last) = tokio::join!(load.stop(), stop_pgbench(pgbench));
        totals.add(last?);
        let new = servers.new.client(DATABASE).await?;
        let failed = DemoError::postgres("looking up acknowledged writes");
        let mut looked_up = acknowledged.look_up(&new).await.map_err(&failed)?;
        if self.options.pgbench_clients > 0 {
            pgbench::look_up(&new, &totals, &mut looked_up).await.map_err(&failed)?;
        }
        let mut longest = board.longest();
        if totals.longest_us > longest.us {
            longest = Longest { us: totals.longest_us, during: "a transaction of pgbench".to_owned() };
        }
        Ok(Report {
            client_transactions: counts.transactions.load(Ordering::Relaxed),
            pgbench_transactions: totals.transactions,
            errors: counts.errors.load(Ordering::Relaxed) + totals.errors,
            retries: counts.retries.load(Ordering::Relaxed) + totals.retries,
            error_examples: board.errors(),
            longest,
            owed_most: board.owed_most(),
            compared,
            looked_up,
            took: board.elapsed(),
        })
    }

    fn start_load(&self) -> Load {
        let mut server = Config::new();
        server.host(self.proxy.listen.ip().to_string()).port(self.proxy.listen.port());
        server.user(ROLE).password(PASSWORD).dbname(DATABASE).application_name("photos");
        let seed = self.options.seed.unwrap_or_else(rand::random);
        let settings = load::Settings { server, clients: self.options.clients.into(), rest: REST, seed };
        Load::start(&settings, self.board.clone())
    }

    fn start_pgbench(&self, servers: &Servers, scratch: &Path) -> Option<Pgbench> {
        let environment = vec![
            ("PGHOST", self.proxy.listen.ip().to_string()),
            ("PGPORT", self.proxy.listen.port().to_string()),
            ("PGUSER", ROLE.to_owned()),
            ("PGPASSWORD", PASSWORD.to_owned()),
            ("PGDATABASE", DATABASE.to_owned()),
        ];
        let settings = pgbench::Settings {
            program: servers.old.program("pgbench"),
            directory: scratch.to_owned(),
            environment,
            clients: self.options.pgbench_clients.into(),
        };
        (settings.clients > 0).then(|| Pgbench::start(settings, self.board.clone()))
    }

    async fn hold(&self) {
        sleep(Duration::from_secs(self.options.step.into())).await;
    }

    /// Writes the phase into the proxy's file and waits until it holds.
    async fn move_to(&self, phase: Phase) -> Result<(), DemoError> {
        self.bring_evidence(phase).await?;
        self.board.say(format!("phase: {phase} is written into the configuration file"));
        let deadline = Instant::now() + PATIENCE;
        let mut asked = Instant::now();
        self.proxy.set_phase(phase)?;
        loop {
            let gauges = self.look().await?;
            if gauges.phase == Some(phase) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.gave_up(&format!("phase {phase} does not hold"), &gauges));
            }
            if asked.elapsed() > ASK_AGAIN {
                asked = Instant::now();
                self.bring_evidence(phase).await?;
                self.proxy.set_phase(phase)?;
            }
            sleep(POLL).await;
        }
    }

    /// What the gates of that phase ask an operator for.
    async fn bring_evidence(&self, phase: Phase) -> Result<(), DemoError> {
        match phase {
            Phase::NewPrimary => {
                self.board.say("`crossfade verify` compares both databases while clients write");
                // A row that differs closes the gate, which says so.
                self.proxy.command(&["verify"]).await?;
            }
            Phase::New => {
                self.board.say("`crossfade phase --backup` says that a backup of new is not needed here");
                self.proxy.command(&["phase", "--backup", "none: these databases are thrown away"]).await?;
            }
            _ => {}
        }
        Ok(())
    }

    async fn wait_until(&self, what: &str, enough: impl Fn(&Gauges) -> bool) -> Result<(), DemoError> {
        let deadline = Instant::now() + PATIENCE;
        let mut since: Option<Instant> = None;
        loop {
            let gauges = self.look().await?;
            since = if enough(&gauges) { since.or_else(|| Some(Instant::now())) } else { None };
            if since.is_some_and(|since| since.elapsed() > STEADY) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.gave_up(&format!("waited in vain for {what}"), &gauges));
            }
            sleep(POLL).await;
        }
    }

    async fn look(&self) -> Result<Gauges, DemoError> {
        let gauges = self.proxy.gauges().await?;
        self.board.observe(gauges.clone());
        Ok(gauges)
    }

    fn gave_up(&self, what: &str, gauges: &Gauges) -> DemoError {
        let errors: String = self.board.errors().iter().map(|error| format!("\n  {error}")).collect();
        let what = format!(
            "{what} after {} s (phase {}, {} owed, {} in flight, {} tables tainted, mirror {}){errors}",
            PATIENCE.as_secs(),
            gauges.phase_name(),
            gauges.owed,
            gauges.in_flight,
            gauges.tainted,
            if gauges.mirror_up { "up" } else { "down" },
        );
        DemoError::Proxy { what, log: self.proxy.log_tail() }
    }

    /// The new server goes away without a word, and comes back.
    async fn lose_new(&self, servers: &mut Servers) -> Result<(), DemoError> {
        self.board.say("the new server is stopped at once (immediate); clients should notice nothing");
        servers.new.stop(Stop::Immediate).await?;
        sleep(AWAY).await;
        self.board.say("the new server is started again");
        servers.new.start().await?;
        self.board.say("new is back; what it is owed is paid");
        self.wait_until("the mirror to be up and the debt paid", |gauges| gauges.mirror_up && gauges.caught_up())
            .await?;
        self.board.say("both databases are the same again");
        Ok(())
    }

    async fn compare(&self, servers: &Servers, load: &mut Load) -> Result<Vec<compare::Compared>, DemoError> {
        self.board.say("the clients are paused, so that both databases stand still");
        load.pause().await;
        self.wait_until("nothing to be in flight", Gauges::all_paid).await?;
        self.board.say("every row of every table is compared, past the proxy");
        let (old, new) = tokio::try_join!(servers.old.client(DATABASE), servers.new.client(DATABASE))?;
        compare::compare(&old, &new).await.map_err(DemoError::postgres("comparing both databases"))
    }
}

async fn stop_pgbench(pgbench: Option<Pgbench>) -> Result<Totals, DemoError> {
    match pgbench {
        Some(pgbench) => pgbench.stop().await,
        None => Ok(Totals::default()),
    }
}

/// Keeps the board's gauges fresh.
async fn watch(proxy: Arc<Proxy>, board: Arc<Board>) {
    loop {
        // An endpoint that does not answer is reported by the step that needs it.
        if let Ok(gauges) = proxy.gauges().await {
            board.observe(gauges);
        }
        sleep(Duration::from_millis(250)).await;
    }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A directory of the demo's own (the configuration in it holds passwords), removed when dropped.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn make() -> Result<Scratch, DemoError> {
        let path = std::env::temp_dir().join(format!("crossfade-demo-{:016x}", rand::random::<u64>()));
        DirBuilder::new().mode(0o700).create(&path).map_err(DemoError::io("making a temporary directory"))?;
        Ok(Scratch { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays is a small directory in the temporary one.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
