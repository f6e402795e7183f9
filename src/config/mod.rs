//! The YAML file: what an operator wants. `load` reads it, `parse` checks a text; an error names file, line and key.
//!
//! Nothing here holds a connection open; `Database::connect` opens one with the control role and hands it out.

mod control;
mod env;
mod locate;
mod parse;
mod tables;
mod units;
mod url;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::phase::Phase;
pub use control::{ConnectError, TlsOnce};
pub use parse::{ConfigError, load, parse};
pub use units::Share;

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
    /// Writes around the proxies are kept out of the side that is not authority.
    pub fence: bool,
    /// postgres_fdw on new answers what the proxy cannot merge.
    pub federate: bool,
    /// Continuous verification.
    pub verify: Verify,
    /// Change capture as a safety net.
    pub sweep: Sweep,
    /// Reads that are compared or served by new.
    pub reads: Reads,
    /// The largest shares that any table has.
    pub most: Shares,
    /// What is asked of new before it becomes authority.
    pub expect: Expect,
    /// Roles that may use the admin console; default: the control role of old's URL.
    pub admins: Vec<String>,
    /// Limits of every queue, cache, buffer and wait.
    pub limits: Limits,
    /// Logs.
    pub log: Log,
}

impl Config {
    /// What migrates: tables, where they go, and how their columns do. The same text says the same, in whatever order the file has it.
    pub fn definition(&self) -> String {
        let mut lines: Vec<String> = self.except.iter().map(|name| format!("not {name}")).collect();
        match &self.tables {
            None => lines.push("every table".to_owned()),
            Some(rules) => lines.extend(rules.iter().map(TableRule::definition)),
        }
        lines.sort();
        lines.dedup();
        lines.join("\n")
    }
}

impl Config {
    /// Settings that a running proxy does not take over, by their keys.
    pub fn at_start(&self) -> [(&'static str, String); 6] {
        let admin = self.admin.map_or_else(|| "none".to_owned(), |admin| admin.to_string());
        [
            ("listen", self.listen.to_string()),
            ("admin", admin),
            ("limits.threads", self.limits.threads.to_string()),
            ("limits.plan_cache", self.limits.plan_cache.to_string()),
            ("mirror.connections", self.mirror.connections.to_string()),
            ("log", format!("{}, {}", if self.log.json { "json" } else { "text" }, self.log.level)),
        ]
    }

    /// The share of reads of a table (`schema.name` on old) that is compared, 0 to 1.
    pub fn compare_share(&self, table: &str) -> f64 {
        self.rule(table).and_then(|rule| rule.compare).or(self.reads.compare).unwrap_or(Share(0.01)).0
    }

    /// The share of sessions whose eligible reads of a table (`schema.name` on old) new serves in dual-read, 0 to 1.
    pub fn serve_share(&self, table: &str) -> f64 {
        self.rule(table).and_then(|rule| rule.serve).or(self.reads.serve).unwrap_or(Share(1.0)).0
    }

    /// Columns of a table (`schema.name` on old) that are not compared.
    pub fn ignored_columns(&self, table: &str) -> &[String] {
        self.rule(table).map_or(&[], |rule| &rule.ignore)
    }

    fn rule(&self, table: &str) -> Option<&TableRule> {
        self.tables.as_ref()?.iter().find(|rule| rule.name == table)
    }

    /// What `most` is for the rest of the file.
    fn shares(&self) -> Shares {
        match &self.tables {
            None => Shares { serve: self.serve_share(""), compare: self.compare_share("") },
            Some(rules) => Shares {
                serve: rules.iter().map(|rule| self.serve_share(&rule.name)).fold(0.0, f64::max),
                compare: rules.iter().map(|rule| self.compare_share(&rule.name)).fold(0.0, f64::max),
            },
        }
    }
}

/// Shares, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shares {
    /// Of sessions.
    pub serve: f64,
    /// Of reads.
    pub compare: f64,
}

impl TableRule {
    fn definition(&self) -> String {
        let mut line = format!("table {} to {}", self.name, self.to.as_ref().unwrap_or(&self.name));
        for (name, rule) in &self.columns {
            line.push_str(&match rule {
                ColumnRule::Renamed(new) => format!(", {name} to {new}"),
                ColumnRule::Dropped => format!(", not {name}"),
                ColumnRule::Expression { new, sql } => format!(", {name} to {new} as {sql}"),
            });
        }
        line
    }
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
    /// What `sslmode` and `sslrootcert` mean to TLS, read at the first connection.
    pub tls: TlsOnce,
}

/// libpq's sslmode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuthMethod {
    /// SCRAM-SHA-256 (and -PLUS over TLS).
    #[default]
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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// PEM file.
    pub certificate: PathBuf,
    /// PEM file.
    pub key: PathBuf,
    /// Refuse clients without TLS.
    #[serde(default, deserialize_with = "units::flag")]
    pub required: bool,
    /// TLS clients must show a certificate signed by one of these (PEM file).
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
}

/// One entry of `tables:`. `TableRule::default()` with a name is what a bare `- schema.name` says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableRule {
    /// `schema.name` on old (schema `public` where none was written).
    pub name: String,
    /// `schema.name` on new, where it differs (old's schema where none was written).
    pub to: Option<String>,
    /// Columns that are not simply carried over under their own name, by their name on old.
    pub columns: BTreeMap<String, ColumnRule>,
    /// The column that decides which copy of a row is newer.
    pub version: Option<String>,
    /// The rule of reading while rows may be missing on new.
    pub read: ReadRule,
    /// The share of eligible reads that new serves; None: the phase's default.
    pub serve: Option<Share>,
    /// The share of reads that is run on both sides and compared; None: the phase's default.
    pub compare: Option<Share>,
    /// Columns (old's names) that are not compared, where a read gives them under their own name.
    pub ignore: Vec<String>,
    /// When rows come over.
    pub backfill: Backfill,
    /// Overrides the phase for its group.
    pub phase: Option<Phase>,
    /// The group that it moves with.
    pub group: Option<String>,
}

/// What becomes of a column of old.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ColumnRule {
    /// It is called so on new.
    Renamed(String),
    /// It is not carried over.
    Dropped,
    /// New's column `new` holds what the SQL expression yields.
    Expression {
        /// The column's name on new.
        new: String,
        /// An SQL expression over old's columns.
        sql: String,
    },
}

/// `tables: read:`, the rule while rows may be missing on new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReadRule {
    /// The authority answers.
    #[default]
    Authority,
    /// New, and where it lacks the row old.
    Fallback,
    /// Both; an older copy never wins.
    Newest,
    /// Both, merged by key.
    Merge,
}

/// `tables: backfill:`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backfill {
    /// A job copies what was there before.
    #[default]
    Eager,
    /// Rows come over when they are written.
    Lazy,
}

/// Reads, where a table's own rule does not say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reads {
    /// The share of sessions whose eligible reads new serves, from dual-read on. Default 100%.
    pub serve: Option<Share>,
    /// The share of eligible reads that is run on both sides and compared, from dual-write on. Default 1%.
    pub compare: Option<Share>,
    /// A share to serve is one of sessions or of statements.
    pub serve_by: ServeBy,
    /// Statements that are not compared: any of these shapes, whatever their values.
    pub ignore: Vec<String>,
    /// Samples of differences hold the statement and the rows.
    #[serde(deserialize_with = "units::flag")]
    pub samples: bool,
    /// The authority is compared with itself: what differs then is noise.
    #[serde(deserialize_with = "units::flag")]
    pub noise: bool,
}

/// `reads: serve_by:`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServeBy {
    /// A client sees one side, but where its reads cannot be served.
    #[default]
    Session,
    /// Each statement is drawn anew.
    Statement,
}

/// Continuous verification.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Verify {
    /// The share of the time in which tables are compared in the background. Default 0%: never.
    pub continuous: Share,
}

/// Change capture as a safety net.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sweep {
    /// The proxy sweeps. Default false.
    #[serde(deserialize_with = "units::flag")]
    pub follow: bool,
    /// Bytes of write-ahead log that a server may keep for a slot; past it the slot is dropped. Default 10 GiB.
    #[serde(deserialize_with = "units::size")]
    pub retain: usize,
}

impl Default for Sweep {
    fn default() -> Sweep {
        Sweep { follow: false, retain: 10 << 30 }
    }
}

/// What `check` and the gates ask of new before it becomes authority. None: nothing is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Expect {
    /// Standbys that stream from it.
    #[serde(deserialize_with = "units::some_count")]
    pub standbys: Option<usize>,
    /// The most that they may lag behind.
    #[serde(deserialize_with = "units::some_duration")]
    pub lag: Option<Duration>,
    /// WAL archiving works.
    #[serde(deserialize_with = "units::some_flag")]
    pub archiving: Option<bool>,
    /// Room that its disk has for the migrating tables, with their indexes, in bytes: PostgreSQL cannot be asked.
    #[serde(deserialize_with = "units::some_size")]
    pub disk: Option<usize>,
}

/// What to do with other databases of old.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OtherDatabases {
    /// Passed to old, untouched.
    #[default]
    Pass,
    /// Refused.
    Refuse,
}

/// Settings of the mirror.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mirror {
    /// `ledger` or `best-effort`.
    pub commit: Commit,
    /// No progress for this long: degrade. Default 2 s.
    #[serde(deserialize_with = "units::duration")]
    pub timeout: Duration,
    /// Refuse opaque writes, and fail transactions that the mirror cannot take.
    #[serde(deserialize_with = "units::flag")]
    pub strict: bool,
    /// DDL through the proxy.
    pub ddl: Ddl,
    /// Mirror sessions at most. Default 50.
    #[serde(deserialize_with = "units::at_least_one")]
    pub connections: usize,
}

/// `mirror.commit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Commit {
    /// Debts in the authority's own transaction.
    Ledger,
    /// Authority, then mirror; ledger only where it failed.
    BestEffort,
}

/// `mirror.ddl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ddl {
    /// Run on both sides.
    Mirror,
    /// Run on the authority only.
    Authority,
    /// Refuse.
    Refuse,
}

/// Settings of moves.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Move {
    /// How long a move may hold clients. Default 5 s.
    #[serde(deserialize_with = "units::duration")]
    pub pause: Duration,
    /// End transactions that last longer.
    #[serde(deserialize_with = "units::flag")]
    pub terminate: bool,
    /// A gate warns when a phase has held for less. Default 7 d.
    #[serde(deserialize_with = "units::duration")]
    pub soak: Duration,
}

/// Limits. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Client connections. Default 500.
    #[serde(deserialize_with = "units::at_least_one")]
    pub clients: usize,
    /// Default 64 MiB.
    #[serde(deserialize_with = "units::size")]
    pub plan_cache: usize,
    /// Per client and direction. Default 1 MiB.
    #[serde(deserialize_with = "units::size")]
    pub client_buffer: usize,
    /// Images held per transaction. Default 16 MiB.
    #[serde(deserialize_with = "units::size")]
    pub mirror_buffer: usize,
    /// A statement longer than this is not read, and counts as an unknown write. Default 16 MiB.
    #[serde(deserialize_with = "units::size")]
    pub statement: usize,
    /// A client must log in within. Default 60 s.
    #[serde(deserialize_with = "units::duration")]
    pub login: Duration,
    /// Connections that have not logged in yet; one more, and the one that has waited longest is closed. Default 100.
    #[serde(deserialize_with = "units::at_least_one")]
    pub logins: usize,
    /// Threads that run sessions; 0: one per core.
    #[serde(deserialize_with = "units::count")]
    pub threads: usize,
}

/// Logs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `json` instead of `text`.
    #[serde(rename = "format", deserialize_with = "units::is_json")]
    pub json: bool,
    /// A tracing filter: `info`, `debug`, `crossfade=debug`, ...
    #[serde(deserialize_with = "units::log_filter")]
    pub level: String,
}

impl Default for Mirror {
    fn default() -> Mirror {
        Mirror {
            commit: Commit::Ledger,
            timeout: Duration::from_secs(2),
            strict: false,
            ddl: Ddl::Mirror,
            connections: 50,
        }
    }
}

impl Default for Move {
    fn default() -> Move {
        Move { pause: Duration::from_secs(5), terminate: false, soak: Duration::from_secs(7 * 24 * 3600) }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            clients: 500,
            plan_cache: 64 << 20,
            client_buffer: 1 << 20,
            mirror_buffer: 16 << 20,
            statement: 16 << 20,
            login: Duration::from_secs(60),
            logins: 100,
            threads: 0,
        }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log { json: false, level: "info".to_owned() }
    }
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
