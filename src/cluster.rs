//! Throw-away PostgreSQL clusters, for the demo, the benchmarks and the tests.
//!
//! A [`Cluster`] is a real server on a port and in a directory of its own. [`programs`] finds the server's programs and
//! the account that runs them, a template data directory is made once (`template`) and copied, [`ports`] keeps a port
//! for as long as the cluster lives, and [`processes`] finds, freezes and kills the server's processes. Dropping the
//! cluster kills it and removes its directory; when the process that owns it is itself killed, a watchdog does.
//!
//! Nothing here is ever used on a database that somebody needs.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::sql::split;

pub mod ports;
pub mod processes;
pub mod programs;
mod template;

use ports::PortLease;
use processes::{Signal, Watchdog};
use programs::{Account, Programs};

/// How long a server may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many ports are tried before a start is given up.
const PORT_TRIES: usize = 20;
/// Bytes of the log's end that an error carries.
const LOG_TAIL_BYTES: u64 = 8 * 1024;

/// Why a throw-away cluster could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// No PostgreSQL server programs, or no account to run them as.
    #[error("{0}")]
    Missing(String),
    /// A file or a process of the cluster.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried, as in "write".
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program (initdb, cp) ended with an error.
    #[error("{program} failed: {output}")]
    Program {
        /// Its name.
        program: String,
        /// What it said.
        output: String,
    },
    /// The server did not start, or did not stop.
    #[error("PostgreSQL on port {port}: {reason}\n{log}")]
    Server {
        /// Its port.
        port: u16,
        /// What was waited for.
        reason: String,
        /// The end of its log.
        log: String,
    },
    /// A statement of a script.
    #[error("PostgreSQL on port {port}: {}", source.as_db_error().map_or_else(|| source.to_string(), ToString::to_string))]
    Script {
        /// Its port.
        port: u16,
        /// What the server said.
        source: tokio_postgres::Error,
    },
    /// A connection of ours.
    #[error("PostgreSQL on port {port}: {source}")]
    Connect {
        /// Its port.
        port: u16,
        /// What the client library said.
        source: tokio_postgres::Error,
    },
}

impl ClusterError {
    fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ClusterError + 'a {
        move |source| ClusterError::Io { what, path: path.to_owned(), source }
    }
}

/// How a server is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Sessions are ended, a checkpoint is written (`pg_ctl stop -m fast`).
    Fast,
    /// At once; the next start recovers (`pg_ctl stop -m immediate`).
    Immediate,
}

/// What a cluster is to be, before it is started.
#[derive(Clone, Debug)]
pub struct Builder {
    version: Option<u32>,
    bindir: Option<PathBuf>,
    settings: Vec<(String, String)>,
    initdb: Vec<String>,
    lineage: String,
    hba: Option<String>,
    files: Vec<(String, Vec<u8>)>,
}

impl Builder {
    /// The server's major version; default: the newest that is installed.
    pub fn version(mut self, major: u32) -> Builder {
        self.version = Some(major);
        self
    }

    /// Where initdb and postgres are; default: see [`Programs::of_side`], the side being the lineage.
    pub fn bindir(mut self, bindir: impl Into<PathBuf>) -> Builder {
        self.bindir = Some(bindir.into());
        self
    }

    /// Lines of postgresql.conf; later ones win. Without any, the server has its defaults, but for `fsync = off`.
    pub fn settings(mut self, settings: &[(&str, &str)]) -> Builder {
        self.settings.extend(settings.iter().map(|(key, value)| (key.to_string(), value.to_string())));
        self
    }

    /// More arguments for initdb, such as `--locale=C.UTF-8` or `--data-checksums`.
    pub fn initdb(mut self, arguments: &[&str]) -> Builder {
        self.initdb.extend(arguments.iter().map(|argument| argument.to_string()));
        self
    }

    /// Clusters of one lineage are copies of one initialised directory, with one system identifier, as a standby and its
    /// primary are; clusters of different lineages are as strange to each other as two that were made by hand.
    pub fn lineage(mut self, lineage: &str) -> Builder {
        self.lineage = lineage.to_owned();
        self
    }

    /// The whole pg_hba.conf; default: scram-sha-256 for everyone, locally and over TCP.
    pub fn hba(mut self, hba: &str) -> Builder {
        self.hba = Some(hba.to_owned());
        self
    }

    /// A file in the data directory, such as a certificate and its key. Readable by the server only.
    pub fn file(mut self, name: &str, content: impl Into<Vec<u8>>) -> Builder {
        self.files.push((name.to_owned(), content.into()));
        self
    }

    /// Makes the data directory and starts the server. Answers once it accepts connections.
    pub async fn start(self) -> Result<Cluster, ClusterError> {
        let programs = match &self.bindir {
            Some(bindir) => Programs::find(Some(bindir), self.version)?,
            None => Programs::of_side(&self.lineage, self.version)?,
        };
        let account = Account::find()?;
        let template = template::ready(&programs, &account, &self.lineage, &self.initdb).await?;
        let dir = account.directory("crossfade")?;
        // From here on the directory is removed whatever happens.
        let watchdog = Watchdog::guard(&account, &dir).map_err(ClusterError::io("guard", &dir))?;
        template::copy(&account, &template, &dir).await?;
        let mut cluster = Cluster {
            password: template.password,
            lease: PortLease::take().map_err(ClusterError::io("find a free port for", &dir))?,
            programs,
            account,
            dir,
            server: None,
            watchdog,
            sessions: Mutex::default(),
        };
        // What a server that is killed leaves in shared memory must go with its directory.
        let defaults = [
            ("fsync", "off"),
            ("listen_addresses", "127.0.0.1"),
            ("log_line_prefix", "%m [%p] %q%u@%d "),
            ("dynamic_shared_memory_type", "mmap"),
        ];
        cluster.configure(&defaults)?;
        for (key, value) in &self.settings {
            cluster.configure(&[(key, value)])?;
        }
        if let Some(hba) = &self.hba {
            cluster.write("pg_hba.conf", hba.as_bytes())?;
        }
        for (name, content) in &self.files {
            cluster.write(name, content)?;
        }
        cluster.start_on_any_port().await?;
        Ok(cluster)
    }
}

/// A throw-away server that is this value's own.
#[derive(Debug)]
pub struct Cluster {
    programs: Programs,
    account: Account,
    dir: PathBuf,
    password: String,
    lease: PortLease,
    server: Option<Child>,
    watchdog: Watchdog,
    /// Idle connections, each with its database.
    sessions: Mutex<Vec<(String, Client)>>,
}

impl Cluster {
    /// A cluster with PostgreSQL's defaults.
    pub fn builder() -> Builder {
        Builder {
            version: None,
            bindir: None,
            settings: Vec::new(),
            initdb: Vec::new(),
            lineage: "old".to_owned(),
            hba: None,
            files: Vec::new(),
        }
    }

    /// The TCP port, on 127.0.0.1. It stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.lease.port()
    }

    /// The password of role `postgres`, a superuser.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// The server's major version.
    pub fn version(&self) -> u32 {
        self.programs.major
    }

    /// The directory with the Unix socket, the log and the data directory `data`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The server's log.
    pub fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// A libpq URL of a database, for role `postgres`, over TCP.
    pub fn url(&self, database: &str) -> String {
        self.url_as("postgres", &self.password, database)
    }

    /// A libpq URL of a database, for any role; name and password must need no percent-encoding.
    pub fn url_as(&self, role: &str, password: &str, database: &str) -> String {
        format!("postgres://{role}:{password}@127.0.0.1:{}/{database}", self.port())
    }

    /// A connection of role `postgres`, driven by a task of the current runtime.
    pub async fn client(&self, database: &str) -> Result<Client, ClusterError> {
        self.client_of(&self.url(database)).await
    }

    /// A connection as any role.
    pub async fn client_as(&self, role: &str, password: &str, db: &str) -> Result<Client, ClusterError> {
        self.client_of(&self.url_as(role, password, db)).await
    }

    async fn client_of(&self, url: &str) -> Result<Client, ClusterError> {
        let (client, connection) = tokio_postgres::connect(url, NoTls)
            .await
            .map_err(|source| ClusterError::Connect { port: self.port(), source })?;
        // A connection that the server ended is what many tests are about; the client's calls report it.
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    }

    /// Runs a script as role `postgres`, statement by statement, and answers with its rows as `psql -qAt` writes them: one
    /// a line, a `|` between columns, nothing for NULL. The first error ends it. Each script finds a session's defaults
    /// and leaves nothing in the session; the connection is kept for the next one.
    pub async fn run(&self, database: &str, script: &str) -> Result<String, ClusterError> {
        let client = match self.kept(database).await {
            Some(client) => client,
            None => self.client(database).await?,
        };
        let mut rows = String::new();
        for statement in split(script.as_bytes()) {
            let failed = |source| ClusterError::Script { port: self.port(), source };
            for message in client.simple_query(&script[statement.range]).await.map_err(failed)? {
                if let SimpleQueryMessage::Row(row) = message {
                    let values: Vec<&str> = (0..row.len()).map(|column| row.get(column).unwrap_or_default()).collect();
                    rows.push_str(&values.join("|"));
                    rows.push('\n');
                }
            }
        }
        // Refused where the script left a transaction open: that ends with its connection.
        if client.batch_execute("DISCARD ALL").await.is_ok() {
            self.sessions.lock().expect("no panic beside it").push((database.to_owned(), client));
        }
        Ok(rows)
    }

    /// A connection that an earlier script left, if it still answers.
    async fn kept(&self, database: &str) -> Option<Client> {
        let client = {
            let mut sessions = self.sessions.lock().expect("no panic beside it");
            let at = sessions.iter().rposition(|(of, _)| of == database)?;
            sessions.swap_remove(at).1
        };
        client.batch_execute("").await.ok().map(|()| client)
    }

    /// What libpq's programs need in their environment to reach a database here as role `postgres`.
    pub fn environment(&self, database: &str) -> [(&'static str, String); 5] {
        [
            ("PGHOST", "127.0.0.1".to_owned()),
            ("PGPORT", self.port().to_string()),
            ("PGUSER", "postgres".to_owned()),
            ("PGPASSWORD", self.password.clone()),
            ("PGDATABASE", database.to_owned()),
        ]
    }

    /// Where a program of this server's version is (pgbench, pg_dump), or its bare name for PATH to find.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.path(name)
    }

    /// Adds lines to postgresql.conf; they hold after [`Cluster::reload`] or the next start, as PostgreSQL says of each.
    pub fn configure(&mut self, settings: &[(&str, &str)]) -> Result<(), ClusterError> {
        let path = self.data().join("postgresql.conf");
        let mut text = fs::read_to_string(&path).map_err(ClusterError::io("read", &path))?;
        for (key, value) in settings {
            text.push_str(&format!("{key} = '{}'\n", value.replace('\'', "''")));
        }
        self.write("postgresql.conf", text.as_bytes())
    }

    /// Has the server read its configuration files again.
    pub fn reload(&self) {
        if let Some(server) = &self.server {
            processes::signal(Signal::Reload, &[server.id()]);
        }
    }

    /// Writes a file of the data directory.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), ClusterError> {
        let path = self.data().join(name);
        // PostgreSQL does not take a key that others may read.
        let only_the_server = || fs::set_permissions(&path, fs::Permissions::from_mode(0o600));
        let written = fs::write(&path, content).and_then(|()| only_the_server()).and_then(|()| self.account.own(&path));
        written.map_err(ClusterError::io("write", &path))
    }

    /// Starts a stopped or killed server again: same data, same port. It recovers if it must.
    pub async fn start(&mut self) -> Result<(), ClusterError> {
        assert!(self.server.is_none(), "the cluster on port {} runs already", self.port());
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.launch().await {
                // Somebody's outgoing connection may hold the port for a moment.
                Err(ClusterError::Server { log, .. }) if port_was_taken(&log) && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Stops the server and waits for its end.
    pub async fn stop(&mut self, how: Stop) -> Result<(), ClusterError> {
        self.sessions = Mutex::default();
        let Some(mut server) = self.server.take() else { return Ok(()) };
        let signal = match how {
            Stop::Fast => Signal::Interrupt,
            Stop::Immediate => Signal::Quit,
        };
        processes::signal(signal, &[server.id()]);
        let deadline = Instant::now() + PATIENCE;
        while server.try_wait().map_err(ClusterError::io("wait for", &self.dir))?.is_none() {
            if Instant::now() > deadline {
                self.server = Some(server);
                return Err(self.failure(format!("did not stop within {PATIENCE:?}"), 0));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Stops and starts.
    pub async fn restart(&mut self, how: Stop) -> Result<(), ClusterError> {
        self.stop(how).await?;
        self.start().await
    }

    /// Kills the postmaster and every other process of the server with SIGKILL, as a crash of the machine would (but for
    /// what the kernel has in its cache). Answers when all are gone.
    pub fn kill9(&mut self) {
        self.sessions = Mutex::default();
        processes::kill_all(&self.data());
        if let Some(mut server) = self.server.take() {
            drop(server.wait());
        }
    }

    /// Stops the postmaster and every other process of the server where they are (SIGSTOP): connections stay open and
    /// nothing answers.
    pub fn freeze(&self) {
        processes::freeze_all(&self.data());
    }

    /// Lets a frozen server go on.
    pub fn thaw(&self) {
        processes::signal(Signal::Continue, &processes::of(&self.data()));
    }

    /// Whether the server runs (a frozen one does).
    pub fn running(&mut self) -> bool {
        matches!(self.server.as_mut().map(Child::try_wait), Some(Ok(None)))
    }

    /// The end of the server's log.
    pub fn log_tail(&self) -> String {
        tail(&self.log(), 0)
    }

    async fn start_on_any_port(&mut self) -> Result<(), ClusterError> {
        for _ in 1..PORT_TRIES {
            match self.launch().await {
                Err(ClusterError::Server { log, .. }) if port_was_taken(&log) => {
                    self.lease = PortLease::take().map_err(ClusterError::io("find a free port for", &self.dir))?;
                }
                outcome => return outcome,
            }
        }
        self.launch().await
    }

    /// Starts the postmaster on the leased port and waits until it accepts connections.
    async fn launch(&mut self) -> Result<(), ClusterError> {
        let path = self.log();
        let log = fs::OpenOptions::new().append(true).create(true).open(&path);
        let log = log.map_err(ClusterError::io("open", &path))?;
        let log_start = log.metadata().map_or(0, |metadata| metadata.len());
        let mut command = self.account.command(&self.programs.path("postgres"), &self.dir);
        command.arg("-D").arg(self.data()).args(["-p", &self.port().to_string(), "-k"]).arg(&self.dir);
        command.stdin(Stdio::null()).stderr(log.try_clone().map_err(ClusterError::io("open", &path))?).stdout(log);
        // A group of its own: an interrupt typed at the terminal is for us, and we stop the server.
        command.process_group(0);
        let mut server = command.spawn().map_err(ClusterError::io("run", &self.programs.path("postgres")))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = server.try_wait().map_err(ClusterError::io("wait for", &self.dir))? {
                return Err(self.failure(format!("ended while starting ({status})"), log_start));
            }
            if self.accepts(server.id()) {
                self.server = Some(server);
                return Ok(());
            }
            if Instant::now() > deadline {
                self.server = Some(server);
                let failure = self.failure(format!("did not start within {PATIENCE:?}"), log_start);
                self.kill9();
                return Err(failure);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The postmaster writes its state to line 8 of postmaster.pid (src/include/utils/pidfile.h).
    fn accepts(&self, pid: u32) -> bool {
        let Ok(text) = fs::read_to_string(self.data().join("postmaster.pid")) else { return false };
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        lines.first() == Some(&pid.to_string().as_str()) && lines.get(7) == Some(&"ready")
    }

    fn failure(&self, reason: String, log_start: u64) -> ClusterError {
        ClusterError::Server { port: self.port(), reason, log: tail(&self.log(), log_start) }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let segment = processes::shared_memory(&self.data());
        self.kill9();
        if let Some(segment) = segment {
            processes::release(&segment);
        }
        drop(fs::remove_dir_all(&self.dir));
        self.watchdog.release();
    }
}

fn port_was_taken(log: &str) -> bool {
    log.contains("Address already in use")
}

/// The end of a text file, from `start` on at most `LOG_TAIL_BYTES` bytes.
fn tail(path: &Path, start: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(start.max(end.saturating_sub(LOG_TAIL_BYTES))))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_or_else(
        |error| format!("(no log at {}: {error})", path.display()),
        |bytes| String::from_utf8_lossy(&bytes).into_owned(),
    )
}
