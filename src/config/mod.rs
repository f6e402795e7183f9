//! The YAML file: what an operator wants.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::phase::Phase;

/// The whole file, checked, defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where PostgreSQL clients connect.
    pub listen: SocketAddr,
    /// HTTP: /metrics, /healthz, /readyz, status page. None: no HTTP.
    pub admin: Option<SocketAddr>,
    /// The old database.
    pub old: Database,
    /// The new database.
    pub new: Database,
    /// The phase that the operator wants.
    pub phase: Phase,
    /// Of the migration; default: old's database name.
    pub name: String,
    /// How clients authenticate.
    pub auth: AuthMethod,
    /// Clients whose verifiers do not come from old's pg_authid.
    pub users: BTreeMap<String, User>,
    /// TLS towards clients.
    pub tls: Option<Tls>,
    /// None: every ordinary table of the same name on both sides, but for those in `except`.
    pub tables: Option<Vec<TableRule>>,
    /// Tables (`schema.name`) that do not migrate.
    pub except: Vec<String>,
    /// Databases of old that do not migrate.
    pub other_databases: OtherDatabases,
    /// The mirror.
    pub mirror: Mirror,
    /// Moves between phases.
    pub moves: Move,
    /// Several proxies.
    pub fleet: bool,
    /// Roles that may use the admin console; default: the control role of old's URL.
    pub admins: Vec<String>,
    /// Limits of every queue, cache, buffer and wait.
    pub limits: Limits,
    /// Logs.
    pub log: Log,
}

/// One side's database: a libpq URL, taken apart.
#[derive(Clone, PartialEq)]
pub struct Database {
    /// Hosts and ports, tried in order. A host that starts with `/` is a directory of Unix sockets.
    pub hosts: Vec<(String, u16)>,
    /// The control role.
    pub user: String,
    /// Its password, from the URL or `password_file`.
    pub password: Option<String>,
    /// The database's name.
    pub database: String,
    /// sslmode.
    pub sslmode: SslMode,
    /// sslrootcert (`system` for the system's).
    pub sslrootcert: Option<String>,
    /// connect_timeout; default 10 s.
    pub connect_timeout: Duration,
    /// `options` of the URL.
    pub options: Option<String>,
}

/// libpq's sslmode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// TLS if the server has it (default).
    Prefer,
    /// TLS, certificate not checked.
    Require,
    /// TLS, certificate checked against sslrootcert.
    VerifyCa,
    /// TLS, certificate and host name checked.
    VerifyFull,
}

/// How clients authenticate to the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    /// SCRAM-SHA-256 (and -PLUS over TLS).
    Scram,
    /// MD5.
    Md5,
    /// Not at all.
    Trust,
    /// Cleartext password.
    Plain,
}

/// A client from `users:`.
#[derive(Clone, PartialEq, Eq)]
pub struct User {
    /// A password in the clear, a SCRAM-SHA-256 verifier, or an md5 hash, as pg_authid would hold it.
    pub password: String,
}

/// TLS towards clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// PEM file.
    pub certificate: PathBuf,
    /// PEM file.
    pub key: PathBuf,
    /// Refuse clients without TLS.
    pub required: bool,
    /// Clients must show a certificate signed by one of these.
    pub client_ca: Option<PathBuf>,
}

/// One entry of `tables:`.
#[derive(Clone, Debug, PartialEq)]
pub struct TableRule {
    /// `schema.name` on old (schema `public` where none was written).
    pub name: String,
    /// `schema.name` on new, where it differs.
    pub to: Option<String>,
    /// The rest of the entry's keys are accepted by name and kept for what comes later.
    pub rest: serde_json::Value,
}

/// What to do with other databases of old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherDatabases {
    /// Passed to old, untouched.
    Pass,
    /// Refused.
    Refuse,
}

/// Settings of the mirror.
#[derive(Clone, Debug, PartialEq)]
pub struct Mirror {
    /// `ledger` or `best-effort`.
    pub commit: Commit,
    /// No progress for this long: degrade. Default 2 s.
    pub timeout: Duration,
    /// Refuse opaque writes, and fail transactions that the mirror cannot take.
    pub strict: bool,
    /// DDL through the proxy.
    pub ddl: Ddl,
    /// Mirror sessions at most. Default 50.
    pub connections: usize,
}

/// `mirror.commit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// Debts in the authority's own transaction.
    Ledger,
    /// Authority, then mirror; ledger only where it failed.
    BestEffort,
}

/// `mirror.ddl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ddl {
    /// Run on both sides.
    Mirror,
    /// Run on the authority only.
    Authority,
    /// Refuse.
    Refuse,
}

/// Settings of moves.
#[derive(Clone, Debug, PartialEq)]
pub struct Move {
    /// How long a move may hold clients. Default 5 s.
    pub pause: Duration,
    /// End transactions that last longer.
    pub terminate: bool,
    /// A gate warns when a phase has held for less. Default 7 d.
    pub soak: Duration,
}

/// Limits. Sizes in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Client connections. Default 500.
    pub clients: usize,
    /// Default 64 MiB.
    pub plan_cache: usize,
    /// Per client and direction. Default 1 MiB.
    pub client_buffer: usize,
    /// Images held per transaction. Default 16 MiB.
    pub mirror_buffer: usize,
    /// A statement longer than this is not read, and counts as an unknown write. Default 16 MiB.
    pub statement: usize,
    /// A client must log in within. Default 60 s.
    pub login: Duration,
    /// Connections that have not logged in yet. Default 100.
    pub logins: usize,
    /// Threads that run sessions; 0: one per core.
    pub threads: usize,
}

/// Logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// `json` instead of `text`.
    pub json: bool,
    /// A tracing filter: `info`, `debug`, `crossfade=debug`, ...
    pub level: String,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database")
            .field("hosts", &self.hosts)
            .field("user", &self.user)
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("User { .. }")
    }
}
