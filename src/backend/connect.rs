//! Opens a connection to a database as some role, up to AuthenticationOk; and cancels what runs on one.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::login;
use crate::auth::Credentials;
use crate::config::{Database, SslMode};
use crate::wire::message::{error_field, fatal};
use crate::wire::stream::{Stream, tune};
use crate::wire::tls::TlsError;

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const CANCEL_REQUEST: u32 = 80_877_102;

/// Where a server answered: enough to reach it again, for a CancelRequest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Over TCP.
    Tcp {
        /// As the URL has it: what a certificate must be for.
        host: String,
        /// What it resolved to.
        address: SocketAddr,
        /// The connection was encrypted.
        tls: bool,
    },
    /// Over a Unix socket.
    Unix(PathBuf),
}

/// A server that accepted us.
pub struct Connected {
    /// The connection.
    pub stream: Stream,
    /// What followed AuthenticationOk and was read with it: ParameterStatus, BackendKeyData, ... Nothing is consumed.
    pub buf: BytesMut,
    /// Where it is.
    pub address: Address,
    /// Protocol 3.`minor`, as the server negotiated.
    pub minor: u16,
}

/// Why no server accepted us. Texts are for operators; `to_client` is for clients.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The server refused: its ErrorResponse, a whole frame, to be passed on.
    #[error("the server refused the login: {}", error_text(.0))]
    Refused(Bytes),
    /// No connection, or it broke.
    #[error("cannot reach {place}: {error}")]
    Io {
        /// `host:port`.
        place: String,
        /// Why.
        error: io::Error,
    },
    /// No TLS as sslmode asks for it.
    #[error("no TLS to {place}: {message}")]
    Tls {
        /// `host:port`.
        place: String,
        /// Why, and what to do.
        message: String,
    },
    /// The certificates of `sslrootcert` cannot be used.
    #[error(transparent)]
    Certificates(#[from] TlsError),
    /// No login within connect_timeout.
    #[error("{place} did not answer within {} s (connect_timeout)", after.as_secs())]
    Timeout {
        /// `host:port`.
        place: String,
        /// connect_timeout.
        after: Duration,
    },
    /// The proxy cannot, or must not, log in as this role.
    #[error("cannot log in to {place}: {message}")]
    Auth {
        /// `host:port`.
        place: String,
        /// Why, and what to do.
        message: String,
    },
}

/// The message of an ErrorResponse frame.
fn error_text(frame: &Bytes) -> String {
    let body = frame.get(5..).unwrap_or_default();
    String::from_utf8_lossy(error_field(body, b'M').unwrap_or(b"(no message)")).into_owned()
}

impl ConnectError {
    /// The ErrorResponse for the client: the server's own, or one that says what happened without saying where.
    pub fn to_client(&self) -> Bytes {
        match self {
            ConnectError::Refused(frame) => frame.clone(),
            ConnectError::Auth { message, .. } => fatal("28000", message, None, None),
            ConnectError::Timeout { .. } => fatal("08006", "the database did not answer in time", None, None),
            ConnectError::Io { .. } | ConnectError::Tls { .. } | ConnectError::Certificates(_) => {
                fatal("08006", "the database cannot be reached", Some("The proxy's log says why."), None)
            }
        }
    }

    /// The SQLSTATE of a refusal.
    pub fn refusal(&self) -> Option<&[u8]> {
        match self {
            ConnectError::Refused(frame) => error_field(frame.get(5..)?, b'C'),
            _ => None,
        }
    }

    /// May another host do better? As libpq: not where a living server has said no.
    fn tries_next(&self) -> bool {
        match self {
            ConnectError::Refused(_) => self.refusal() == Some(b"57P03"),
            ConnectError::Io { .. } | ConnectError::Tls { .. } | ConnectError::Timeout { .. } => true,
            ConnectError::Certificates(_) | ConnectError::Auth { .. } => false,
        }
    }

    /// Would libpq's sslmode=prefer now try without TLS? A pg_hba.conf may have only `hostnossl` lines.
    fn prefers_clear(&self) -> bool {
        matches!(self, ConnectError::Tls { .. }) || self.refusal() == Some(b"28000")
    }
}

/// A client's startup parameters, for a database of another name.
pub fn to_database(parameters: &[(Bytes, Bytes)], name: &str) -> Vec<(Bytes, Bytes)> {
    let mut parameters = parameters.to_vec();
    parameters.retain(|(known, _)| &known[..] != b"database");
    parameters.push((Bytes::from_static(b"database"), Bytes::from(name.to_owned())));
    parameters
}

/// The same, for a session that writes nothing: what RESET goes back to stands in the startup packet.
pub fn read_only(mut parameters: Vec<(Bytes, Bytes)>) -> Vec<(Bytes, Bytes)> {
    const NAME: &[u8] = b"default_transaction_read_only";
    parameters.retain(|(known, _)| !known.eq_ignore_ascii_case(NAME));
    parameters.push((Bytes::from_static(NAME), Bytes::from_static(b"on")));
    parameters
}

/// Logs in to the first host of `db` that answers, each address within connect_timeout. `parameters` go into the
/// StartupMessage as they are (`user`, `database`, `application_name`, ...).
pub async fn connect(
    db: &Database,
    credentials: &Credentials,
    parameters: &[(Bytes, Bytes)],
    protocol_minor: u16,
) -> Result<Connected, ConnectError> {
    let mut last = None;
    for (host, port) in &db.hosts {
        let place = format!("{host}:{port}");
        let addresses = match resolve(host, *port, &place, db.connect_timeout).await {
            Ok(addresses) => addresses,
            Err(error) => {
                last = Some(error);
                continue;
            }
        };
        for address in addresses {
            let attempt = attempt(db, &place, &address, credentials, parameters, protocol_minor);
            match timeout(db.connect_timeout, attempt).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(error)) if error.tries_next() => last = Some(error),
                Ok(Err(error)) => return Err(error),
                Err(_) => last = Some(ConnectError::Timeout { place: place.clone(), after: db.connect_timeout }),
            }
        }
    }
    Err(last.unwrap_or_else(|| ConnectError::Io { place: db.place(), error: io::ErrorKind::NotFound.into() }))
}

/// Asks the server at `address` to cancel what the session with this key does (process id and secret, as
/// BackendKeyData has them); over TLS if the session was. Returns when the server has taken the request.
pub async fn cancel(db: &Database, address: &Address, key: &[u8]) -> Result<(), ConnectError> {
    let place = address.place();
    let io_error = |error| ConnectError::Io { place: place.clone(), error };
    let work = async {
        let mut stream = open(address).await.map_err(io_error)?;
        if let Address::Tcp { host, tls: true, .. } = address {
            stream = encrypt(stream, db, host, &place).await?;
        }
        let mut packet = BytesMut::with_capacity(8 + key.len());
        packet.put_u32((8 + key.len()) as u32);
        packet.put_u32(CANCEL_REQUEST);
        packet.put_slice(key);
        stream.write_all(&packet).await.map_err(io_error)?;
        stream.flush().await.map_err(io_error)?;
        // The server closes the connection when it has sent the signal. How it closes it does not matter.
        let _ = stream.read(&mut [0_u8; 64]).await;
        Ok(())
    };
    let result = timeout(db.connect_timeout, work).await;
    result.unwrap_or_else(|_| Err(ConnectError::Timeout { place: place.clone(), after: db.connect_timeout }))
}

impl Address {
    fn place(&self) -> String {
        match self {
            Address::Tcp { host, address, .. } => format!("{host}:{}", address.port()),
            Address::Unix(path) => path.display().to_string(),
        }
    }
}

/// Addresses of a host; `tls` is not known yet.
async fn resolve(host: &str, port: u16, place: &str, limit: Duration) -> Result<Vec<Address>, ConnectError> {
    if host.starts_with('/') {
        return Ok(vec![Address::Unix(PathBuf::from(format!("{host}/.s.PGSQL.{port}")))]);
    }
    let found = timeout(limit, tokio::net::lookup_host((host, port)))
        .await
        .map_err(|_| ConnectError::Timeout { place: place.to_owned(), after: limit })?
        .map_err(|error| ConnectError::Io { place: place.to_owned(), error })?;
    Ok(found.map(|address| Address::Tcp { host: host.to_owned(), address, tls: false }).collect())
}

async fn attempt(
    db: &Database,
    place: &str,
    address: &Address,
    credentials: &Credentials,
    parameters: &[(Bytes, Bytes)],
    minor: u16,
) -> Result<Connected, ConnectError> {
    let one = async |sslmode| {
        let (stream, address) = encrypted(db, sslmode, place, address).await?;
        let login = login::Login { place, credentials, parameters, minor };
        let (stream, buf, minor) = login.run(stream).await?;
        Ok::<_, ConnectError>(Connected { stream, buf, address, minor })
    };
    match one(db.sslmode).await {
        Err(error) if db.sslmode == SslMode::Prefer && error.prefers_clear() => {
            // Where it does not help either, the first error says more.
            one(SslMode::Disable).await.map_err(|_| error)
        }
        result => result,
    }
}

/// A connection with TLS or without, as `sslmode` says and the server can.
async fn encrypted(
    db: &Database,
    sslmode: SslMode,
    place: &str,
    address: &Address,
) -> Result<(Stream, Address), ConnectError> {
    let stream = open(address).await.map_err(|error| ConnectError::Io { place: place.to_owned(), error })?;
    let Address::Tcp { host, address: socket, .. } = address else { return Ok((stream, address.clone())) };
    let with_tls = |tls| Address::Tcp { host: host.clone(), address: *socket, tls };
    match sslmode {
        SslMode::Disable => Ok((stream, with_tls(false))),
        SslMode::Prefer | SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
            match ask_tls(stream, place).await? {
                (true, stream) => Ok((handshake(stream, db, host, place).await?, with_tls(true))),
                (false, stream) if sslmode == SslMode::Prefer => Ok((stream, with_tls(false))),
                (false, _) => Err(no_tls(place)),
            }
        }
    }
}

fn no_tls(place: &str) -> ConnectError {
    let message = "the server has none, but sslmode demands it: set ssl = on in its postgresql.conf, or sslmode=prefer";
    ConnectError::Tls { place: place.to_owned(), message: message.to_owned() }
}

async fn open(address: &Address) -> io::Result<Stream> {
    match address {
        Address::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).await?)),
        Address::Tcp { address, .. } => {
            let tcp = TcpStream::connect(address).await?;
            tune(&tcp)?;
            Ok(Stream::Tcp(tcp))
        }
    }
}

/// SSLRequest: does the server have TLS?
async fn ask_tls(mut stream: Stream, place: &str) -> Result<(bool, Stream), ConnectError> {
    let io_error = |error| ConnectError::Io { place: place.to_owned(), error };
    stream.write_all(&SSL_REQUEST).await.map_err(io_error)?;
    // Exactly one byte: what a stranger may have put behind it in the clear goes to the handshake, and breaks it.
    match stream.read_u8().await.map_err(io_error)? {
        b'S' => Ok((true, stream)),
        b'N' => Ok((false, stream)),
        // An error that is sent before the server has shown who it is is not passed on.
        _ => Err(ConnectError::Tls {
            place: place.to_owned(),
            message: "the server answered the request for TLS with an error: its log says why".to_owned(),
        }),
    }
}

async fn encrypt(stream: Stream, db: &Database, host: &str, place: &str) -> Result<Stream, ConnectError> {
    match ask_tls(stream, place).await? {
        (true, stream) => handshake(stream, db, host, place).await,
        (false, _) => Err(no_tls(place)),
    }
}

async fn handshake(stream: Stream, db: &Database, host: &str, place: &str) -> Result<Stream, ConnectError> {
    let failed = |message: String| ConnectError::Tls { place: place.to_owned(), message };
    let Stream::Tcp(tcp) = stream else { return Err(failed("TLS needs TCP".into())) };
    let name = ServerName::try_from(host.to_owned()).map_err(|_| failed("the host's name is no DNS name".into()))?;
    let connector = TlsConnector::from(db.tls_config()?);
    let stream = connector.connect(name, tcp).await.map_err(|error| {
        failed(format!("{error} (sslmode and sslrootcert in the URL say what its certificate must be)"))
    })?;
    Ok(Stream::TlsClient(Box::new(stream)))
}
