//! What each role's password must hash to: from `users:` of the file, else from pg_authid, asked over a control
//! connection of its own that is opened when first needed and again when it broke.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::time::timeout;
use tokio_postgres::error::SqlState;

use super::md5;
use super::scram::{ITERATIONS, Key, ScramKeys, ScramVerifier};
use crate::config::{ConnectError, Database, User};

/// After a failed connection no other is tried for so long: logins that queue up must not each wait for their own.
const DOWN_TIME: Duration = Duration::from_secs(1);

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

/// The way to pg_authid.
enum Link {
    Closed,
    Open(Arc<Connection>),
    /// No database could be reached.
    Down {
        since: Instant,
        why: String,
    },
}

/// An open control connection, shared by all lookups under way, which it pipelines.
struct Connection {
    client: tokio_postgres::Client,
    query: tokio_postgres::Statement,
    database: Database,
}

/// Looks up roles. Each login asks anew, so that a password holds from the moment in which it was changed, as it does
/// without a proxy.
pub struct Verifiers {
    users: HashMap<Vec<u8>, Secret>,
    /// Asked in order, the next only where one cannot be reached.
    databases: Vec<Database>,
    link: tokio::sync::Mutex<Link>,
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
            link: tokio::sync::Mutex::new(Link::Closed),
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
        self.ask(name).await
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

    async fn ask(&self, name: &str) -> Result<Role, LookupError> {
        let open = self.open(None).await?;
        match open.ask(name).await {
            // It may have died unseen: a fresh one gets a second try.
            Err(LookupError::Query { .. }) => self.open(Some(&open)).await?.ask(name).await,
            result => result,
        }
    }

    /// The connection that is open and not `broken`, or a new one.
    async fn open(&self, broken: Option<&Arc<Connection>>) -> Result<Arc<Connection>, LookupError> {
        let mut link = self.link.lock().await;
        match &*link {
            Link::Open(open) if !open.client.is_closed() && !broken.is_some_and(|broken| Arc::ptr_eq(broken, open)) => {
                return Ok(open.clone());
            }
            Link::Down { since, why } if since.elapsed() < DOWN_TIME => {
                return Err(LookupError::Query { place: "the database".into(), message: why.clone() });
            }
            Link::Closed | Link::Open(_) | Link::Down { .. } => {}
        }
        let mut last = LookupError::Query { place: "the database".into(), message: "none is known".into() };
        for database in &self.databases {
            match Connection::open(database).await {
                Ok(open) => {
                    let open = Arc::new(open);
                    *link = Link::Open(open.clone());
                    return Ok(open);
                }
                Err(error) => last = error,
            }
        }
        *link = Link::Down { since: Instant::now(), why: last.to_string() };
        Err(last)
    }
}

impl Connection {
    async fn open(database: &Database) -> Result<Connection, LookupError> {
        let client = database.connect("crossfade verifiers").await?;
        let query = timeout(database.connect_timeout, client.prepare(QUERY))
            .await
            .map_err(|_| query_error(database, "no answer in time"))?
            .map_err(|error| query_error(database, &error.to_string()))?;
        Ok(Connection { client, query, database: database.clone() })
    }

    async fn ask(&self, name: &str) -> Result<Role, LookupError> {
        let answer =
            timeout(self.database.connect_timeout, async { self.client.query_one(&self.query, &[&name]).await });
        let error = match answer.await {
            Ok(Ok(row)) => return Ok(read_role(&row)),
            Ok(Err(error)) => error,
            Err(_) => return Err(query_error(&self.database, "no answer in time")),
        };
        if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
            let (control, place) = (self.database.user.clone(), self.database.place());
            return Err(LookupError::Forbidden { control, place });
        }
        let message = error.as_db_error().map_or("the connection broke", |error| error.message());
        Err(query_error(&self.database, message))
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
