//! What each role's password must hash to: from `users:` of the file, else from pg_authid, asked over a control
//! connection of its own that is opened when first needed and again when it broke.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::md5;
use super::scram::{ITERATIONS, Key, ScramKeys, ScramVerifier};
use crate::config::{ConnectError, Database, User};

/// How long an answer of pg_authid holds: a changed password is known after so long.
const CACHE_TIME: Duration = Duration::from_secs(5);
/// Answers that are kept at most, so that made-up names cannot fill the memory.
const CACHE_MAX: usize = 10_000;

/// LEFT JOIN: also for a role that does not exist we want to know how the server would have asked for its password.
const QUERY: &str = "SELECT current_setting('password_encryption') = 'md5', role.rolpassword, \
     coalesce(role.rolcanlogin, true), coalesce(role.rolvaliduntil < now(), false) \
     FROM (VALUES (1)) AS one LEFT JOIN pg_catalog.pg_authid AS role ON role.rolname = $1::text::name";

/// A role's password, or what is kept of it.
#[derive(Clone)]
pub enum Secret {
    /// In the clear.
    Password(Vec<u8>),
    /// A SCRAM verifier.
    Scram(ScramVerifier),
    /// `md5...`.
    Md5(String),
}

impl Secret {
    /// Told apart as PostgreSQL does with `ALTER ROLE ... PASSWORD`.
    pub fn read(text: &str) -> Secret {
        match ScramVerifier::parse(text) {
            Some(verifier) => Secret::Scram(verifier),
            None if md5::is_stored(text) => Secret::Md5(text.to_owned()),
            None => Secret::Password(text.as_bytes().to_vec()),
        }
    }
}

/// What is known of a role.
#[derive(Clone)]
pub struct Role {
    /// None: no such role, or it has no password, or its password has expired. Nobody may tell which.
    pub secret: Option<Secret>,
    /// False for NOLOGIN roles.
    pub may_login: bool,
    /// Where there is no secret: would the server have asked for MD5?
    pub md5_by_default: bool,
}

/// Why a role could not be looked up.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// No connection.
    #[error("verifiers cannot be read: {0}")]
    Connect(#[from] ConnectError),
    /// The control role may not read pg_authid, as on many managed servers.
    #[error(
        "role {control} may not read pg_authid on {place}: GRANT SELECT ON pg_authid TO {control}, or list the \
         clients' roles in `users:`, or use `auth: plain`"
    )]
    Forbidden {
        /// The control role.
        control: String,
        /// `host:port/database`.
        place: String,
    },
    /// The query failed.
    #[error("verifiers cannot be read from {place}: {message}")]
    Query {
        /// `host:port/database`.
        place: String,
        /// What the server says.
        message: String,
    },
}

/// Looks up roles.
pub struct Verifiers {
    users: HashMap<Vec<u8>, Secret>,
    /// Asked in order, the next only where one cannot be reached.
    databases: Vec<Database>,
    connection: tokio::sync::Mutex<Option<(tokio_postgres::Client, Database)>>,
    cache: Mutex<HashMap<String, (Instant, Role)>>,
    /// Verifiers of those `users:` that were given as passwords.
    derived: Mutex<HashMap<Vec<u8>, ScramVerifier>>,
    mock_seed: Key,
}

impl Verifiers {
    /// `users:` first, then pg_authid of the first of `databases` that can be reached.
    pub fn new(users: &BTreeMap<String, User>, databases: Vec<Database>) -> Verifiers {
        let users = users.iter().map(|(name, user)| (name.as_bytes().to_vec(), Secret::read(&user.password))).collect();
        Verifiers {
            users,
            mock_seed: mock_seed(&databases),
            databases,
            connection: tokio::sync::Mutex::new(None),
            cache: Mutex::default(),
            derived: Mutex::default(),
        }
    }

    /// The entry of `users:`.
    pub fn listed(&self, user: &[u8]) -> Option<&Secret> {
        self.users.get(user)
    }

    /// What is known of a role; one that does not exist has no secret.
    pub async fn role(&self, user: &[u8]) -> Result<Role, LookupError> {
        if let Some(secret) = self.listed(user) {
            return Ok(Role { secret: Some(secret.clone()), may_login: true, md5_by_default: false });
        }
        // A name that is not UTF-8 cannot be asked for over a UTF-8 connection.
        let Ok(name) = std::str::from_utf8(user) else {
            return Ok(Role { secret: None, may_login: true, md5_by_default: false });
        };
        if let Some(role) = self.cached(name) {
            return Ok(role);
        }
        let role = self.ask(name).await?;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= CACHE_MAX {
            cache.retain(|_, (at, _)| at.elapsed() < CACHE_TIME);
        }
        if cache.len() < CACHE_MAX {
            cache.insert(name.to_owned(), (Instant::now(), role.clone()));
        }
        Ok(role)
    }

    /// The verifier of a password from `users:`, computed once.
    pub async fn derive(&self, user: &[u8], password: &[u8]) -> ScramVerifier {
        let known = self.derived.lock().unwrap_or_else(PoisonError::into_inner).get(user).cloned();
        if let Some(verifier) = known {
            return verifier;
        }
        let salt = self.mock(user).salt;
        let verifier = derive_keys(password.to_vec(), salt, ITERATIONS).await.verifier;
        self.derived.lock().unwrap_or_else(PoisonError::into_inner).insert(user.to_vec(), verifier.clone());
        verifier
    }

    /// A verifier that nobody can meet, for roles without a secret.
    pub fn mock(&self, user: &[u8]) -> ScramVerifier {
        ScramVerifier::mock(user, &self.mock_seed)
    }

    fn cached(&self, name: &str) -> Option<Role> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.get(name).filter(|(at, _)| at.elapsed() < CACHE_TIME).map(|(_, role)| role.clone())
    }

    async fn ask(&self, name: &str) -> Result<Role, LookupError> {
        let mut connection = self.connection.lock().await;
        // An old connection may have died unseen: then a fresh one gets a second try.
        for fresh in [false, true] {
            let (client, database) = match connection.take() {
                Some(open) if !fresh && !open.0.is_closed() => open,
                _ => self.open().await?,
            };
            let query = async { client.query_one(QUERY, &[&name]).await };
            let answer = match tokio::time::timeout(database.connect_timeout, query).await {
                Ok(answer) => answer,
                Err(_) if fresh => return Err(query_error(&database, "no answer in time")),
                Err(_) => continue,
            };
            match answer {
                Ok(row) => {
                    *connection = Some((client, database));
                    return Ok(read_role(&row));
                }
                Err(error) => match error.as_db_error() {
                    Some(db) if *db.code() == tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE => {
                        let (control, place) = (database.user.clone(), database.place());
                        *connection = Some((client, database));
                        return Err(LookupError::Forbidden { control, place });
                    }
                    Some(db) if fresh => return Err(query_error(&database, db.message())),
                    None if fresh => return Err(query_error(&database, "the connection broke")),
                    _ => {}
                },
            }
        }
        Err(LookupError::Query { place: String::new(), message: "no database to ask".into() })
    }

    async fn open(&self) -> Result<(tokio_postgres::Client, Database), LookupError> {
        let mut last = None;
        for database in &self.databases {
            match database.connect("crossfade verifiers").await {
                Ok(client) => return Ok((client, database.clone())),
                Err(error) => last = Some(error),
            }
        }
        Err(last.map_or_else(
            || LookupError::Query { place: "no database".into(), message: "none is configured".into() },
            LookupError::Connect,
        ))
    }
}

fn query_error(database: &Database, message: &str) -> LookupError {
    LookupError::Query { place: database.place(), message: message.to_owned() }
}

fn read_role(row: &tokio_postgres::Row) -> Role {
    let (md5_by_default, password, may_login, expired): (bool, Option<String>, bool, bool) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    // pg_authid never holds a password in the clear (since PostgreSQL 10): what is no hash meets nothing.
    let secret = password.filter(|_| !expired).map(|text| Secret::read(&text));
    let secret = secret.filter(|secret| !matches!(secret, Secret::Password(_)));
    Role { secret, may_login, md5_by_default }
}

/// The same after a restart wherever something secret is at hand: a salt that changed would give away a made-up role.
fn mock_seed(databases: &[Database]) -> Key {
    let mut hash = Sha256::new_with_prefix(b"crossfade mock authentication");
    let passwords: Vec<&String> = databases.iter().filter_map(|database| database.password.as_ref()).collect();
    if passwords.is_empty() {
        return rand::random();
    }
    passwords.iter().for_each(|password| hash.update(password));
    hash.finalize().into()
}

/// `ScramKeys::derive` on a thread that may be busy.
pub async fn derive_keys(password: Vec<u8>, salt: Vec<u8>, iterations: u32) -> ScramKeys {
    let work = move || ScramKeys::derive(&password, &salt, iterations);
    tokio::task::spawn_blocking(work).await.expect("key derivation does not panic and is not aborted")
}

/// `ScramVerifier::check` on a thread that may be busy.
pub async fn check_password(verifier: ScramVerifier, password: Bytes) -> bool {
    let work = move || verifier.check(&password);
    tokio::task::spawn_blocking(work).await.expect("key derivation does not panic and is not aborted")
}
