//! Connections of the control role: what catalog, ledger, repair and data jobs use.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_postgres_rustls::MakeRustlsConnect;

use super::{Database, SslMode};
use crate::wire::tls::{self, ServerCheck, TlsError};

/// Why a control connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The certificates that `sslrootcert` names cannot be used.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// No login in time.
    #[error("cannot connect to {place} as {user}: no answer within {} s (connect_timeout)", after.as_secs())]
    Timeout {
        /// `host:port/database`.
        place: String,
        /// The control role.
        user: String,
        /// connect_timeout, once for each host.
        after: Duration,
    },
    /// No host answered, or the server refused.
    #[error("cannot connect to {place} as {user}: {}", innermost(.error))]
    Postgres {
        /// `host:port/database`.
        place: String,
        /// The control role.
        user: String,
        /// What tokio-postgres says; its `code()` is the server's SQLSTATE.
        error: tokio_postgres::Error,
    },
}

/// tokio-postgres says only "db error" or "error connecting to server"; its causes say why.
fn innermost(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// The TLS configuration of a database, made once and shared by its clones: root certificates are read at the first
/// connection, and again when the file is loaded again.
#[derive(Clone, Default)]
pub struct TlsOnce(Arc<OnceLock<Arc<rustls::ClientConfig>>>);

/// A cache, so that it makes no database different from another.
impl PartialEq for TlsOnce {
    fn eq(&self, _: &TlsOnce) -> bool {
        true
    }
}

impl Database {
    /// What TLS to this database demands of its certificate.
    pub fn tls_config(&self) -> Result<Arc<rustls::ClientConfig>, TlsError> {
        if let Some(config) = self.tls.0.get() {
            return Ok(config.clone());
        }
        let check = match self.sslmode {
            SslMode::Disable | SslMode::Prefer | SslMode::Require => ServerCheck::Nothing,
            SslMode::VerifyCa => ServerCheck::Chain,
            SslMode::VerifyFull => ServerCheck::ChainAndName,
        };
        let roots = self.sslrootcert.as_deref().filter(|file| *file != "system").map(Path::new);
        let config = tls::client_config(check, roots)?;
        Ok(self.tls.0.get_or_init(|| config).clone())
    }

    /// `host:port/database` of the first host, for messages.
    pub fn place(&self) -> String {
        let hosts: Vec<String> = self.hosts.iter().map(|(host, port)| format!("{host}:{port}")).collect();
        format!("{}/{}", hosts.join(","), self.database)
    }

    /// This database's settings for tokio-postgres. TLS is `tls_config`'s; see `connect`.
    pub fn tokio_postgres(&self, application_name: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .user(&self.user)
            .dbname(&self.database)
            .application_name(application_name)
            .connect_timeout(self.connect_timeout)
            .keepalives_idle(Duration::from_secs(30))
            .keepalives_interval(Duration::from_secs(10))
            .keepalives_retries(3);
        for (host, port) in &self.hosts {
            config.host(host).port(*port);
        }
        if let Some(password) = &self.password {
            config.password(password);
        }
        // Nothing of our own: a pooler between here and the server takes no options, or leaves them out.
        if let Some(options) = &self.options {
            config.options(options);
        }
        // As libpq: sslmode means nothing on a Unix socket.
        let sockets_only = self.hosts.iter().all(|(host, _)| host.starts_with('/'));
        config.ssl_mode(match self.sslmode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            _ if sockets_only => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => tokio_postgres::config::SslMode::Require,
        });
        config
    }

    /// Opens a connection as the control role. Its I/O runs in a task of its own until the client is dropped.
    pub async fn connect(&self, application_name: &str) -> Result<tokio_postgres::Client, ConnectError> {
        let connector = MakeRustlsConnect::new((*self.tls_config()?).clone());
        // tokio-postgres bounds only the TCP connection: a server that is frozen then would hold us for ever.
        let after = self.connect_timeout.saturating_mul(self.hosts.len().max(1) as u32);
        let settings = self.tokio_postgres(application_name);
        let (place, user) = (self.place(), self.user.clone());
        let (client, connection) = match tokio::time::timeout(after, settings.connect(connector)).await {
            Ok(Ok(open)) => open,
            Ok(Err(error)) => return Err(ConnectError::Postgres { place, user, error }),
            Err(_) => return Err(ConnectError::Timeout { place, user, after }),
        };
        let version = connection.parameter("server_version").map(str::to_owned);
        let told = place.clone();
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(place = told, error = innermost(&error), "control connection ended");
            }
        });
        match tokio::time::timeout(after, client.batch_execute(settings_of(version.as_deref()))).await {
            Ok(Ok(())) => Ok(client),
            Ok(Err(error)) => Err(ConnectError::Postgres { place, user, error }),
            Err(_) => Err(ConnectError::Timeout { place, user, after }),
        }
    }
}

/// How a control session is set on a server of this version. Wide joins over the catalogs cost enough on paper to be compiled, which takes longer than running them.
/// And limits that a role or a server may have for idle sessions (PostgreSQL 14) and for whole transactions (17) are not for jobs, whose transactions may be long.
fn settings_of(version: Option<&str>) -> &'static str {
    let major: String = version.unwrap_or_default().chars().take_while(char::is_ascii_digit).collect();
    match major.parse() {
        Ok(17..) => "SET jit = off; SET idle_session_timeout = 0; SET transaction_timeout = 0",
        Ok(14..=16) => "SET jit = off; SET idle_session_timeout = 0",
        _ => "SET jit = off",
    }
}
