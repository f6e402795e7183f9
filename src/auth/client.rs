//! A client's login, up to but without AuthenticationOk: that one is the real server's, and is passed on.
//!
//! Messages, SQLSTATEs and what is told to whom are PostgreSQL's (src/backend/libpq/auth.c): a role that does not
//! exist, one without a password and a wrong password all look the same.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::AsyncWriteExt;

use super::scram::{Offer, SCRAM, SCRAM_PLUS, ScramError, ServerExchange, fresh_nonce};
use super::verifiers::{LookupError, Role, Secret, Verifiers, check_password};
use super::{Credentials, md5, scram};
use crate::config::AuthMethod;
use crate::wire::message::{fatal, put_message, read_message};
use crate::wire::startup::Startup;

/// The longest password message (PostgreSQL's PG_MAX_AUTH_TOKEN_LENGTH) and SASL message (PG_MAX_SASL_MESSAGE_LENGTH).
const PASSWORD_MAX: usize = 65_535;
const SASL_MAX: usize = 1024;

const CLEARTEXT: u32 = 3;
const MD5: u32 = 5;
const SASL: u32 = 10;
const SASL_CONTINUE: u32 = 11;
const SASL_FINAL: u32 = 12;

/// Who logged in, to what, and what the login taught us.
#[derive(Clone, Debug)]
pub struct Login {
    /// The role, as the client sent it.
    pub user: Bytes,
    /// The database, by default called like the role.
    pub database: Bytes,
    /// For the servers.
    pub credentials: Credentials,
}

/// Why a login failed. The client was told where it could be.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The connection broke.
    #[error("connection of a client broke during its login: {0}")]
    Io(#[from] io::Error),
    /// The client went away when it was asked for a password: psql does, to ask its user.
    #[error("the client closed the connection during its login")]
    Closed,
    /// The client was refused.
    #[error("{message} ({code}){}", reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default())]
    Refused {
        /// SQLSTATE.
        code: &'static str,
        /// What the client was told.
        message: String,
        /// More, for the client too.
        detail: Option<&'static str>,
        /// What only the operator may know.
        reason: Option<String>,
    },
}

fn refused(code: &'static str, message: impl Into<String>) -> AuthError {
    AuthError::Refused { code, message: message.into(), detail: None, reason: None }
}

/// Runs a client's login. How long it may take is the caller's.
pub async fn authenticate(
    startup: &mut Startup,
    method: AuthMethod,
    verifiers: &Verifiers,
) -> Result<Login, AuthError> {
    let result = run(startup, method, verifiers).await;
    if let Err(AuthError::Refused { code, message, detail, .. }) = &result {
        // The client may be gone already: then nobody needs to know why.
        let _ = startup.stream.write_all(&fatal(code, message, *detail, None)).await;
        let _ = startup.stream.shutdown().await;
    }
    result
}

async fn run(startup: &mut Startup, method: AuthMethod, verifiers: &Verifiers) -> Result<Login, AuthError> {
    let user = startup.user();
    let role = match method {
        AuthMethod::Trust => None,
        AuthMethod::Plain => match verifiers.role(&user).await {
            // What we may not check, the server will: it gets the password itself.
            Err(LookupError::Forbidden { .. }) => None,
            other => Some(other.map_err(lookup_failed)?),
        },
        AuthMethod::Scram | AuthMethod::Md5 => Some(verifiers.role(&user).await.map_err(lookup_failed)?),
    };
    let credentials = match (method, &role) {
        (AuthMethod::Trust, _) => trusted(user.clone(), verifiers),
        (AuthMethod::Plain, role) => ask_cleartext(startup, user.clone(), role.as_ref()).await?,
        (AuthMethod::Md5, Some(role)) if asks_md5(role) => ask_md5(startup, user.clone(), role).await?,
        (_, Some(role)) => ask_scram(startup, user.clone(), role, verifiers).await?,
        (_, None) => return Err(refused("28000", "no authentication method")),
    };
    if role.is_some_and(|role| !role.may_login) {
        let name = String::from_utf8_lossy(&user);
        return Err(refused("28000", format!("role \"{name}\" is not permitted to log in")));
    }
    Ok(Login { user, database: startup.database(), credentials })
}

/// The client is told no more than that it cannot log in now; the operator is told why.
fn lookup_failed(error: LookupError) -> AuthError {
    let code = match error {
        LookupError::Forbidden { .. } => "28000",
        LookupError::Connect(_) | LookupError::Query { .. } => "08006",
    };
    AuthError::Refused {
        code,
        message: "the proxy cannot look up the role's password".into(),
        detail: Some("The proxy's log says why."),
        reason: Some(error.to_string()),
    }
}

/// As PostgreSQL's `md5`: a role that holds a SCRAM verifier is asked for SCRAM.
fn asks_md5(role: &Role) -> bool {
    match &role.secret {
        Some(Secret::Md5(_) | Secret::Password(_)) => true,
        Some(Secret::Scram(_)) => false,
        None => role.md5_by_default,
    }
}

/// The client learns only that it did not work; the operator also what kind of secret it failed on.
fn wrong_password(user: &[u8], secret: Option<&Secret>) -> AuthError {
    let reason = match secret {
        Some(Secret::Password(_) | Secret::Scram(_)) => "the password is wrong",
        Some(Secret::Md5(_)) => {
            "the password is wrong, or `auth: scram` met a role whose password is stored as MD5 (use `auth: md5`, or set \
             the password again with password_encryption = 'scram-sha-256')"
        }
        None => "there is no such role, it has no password, or its password has expired (VALID UNTIL)",
    };
    AuthError::Refused {
        code: "28P01",
        message: format!("password authentication failed for user \"{}\"", String::from_utf8_lossy(user)),
        detail: None,
        reason: Some(reason.to_owned()),
    }
}

fn empty(user: Bytes) -> Credentials {
    Credentials { user, password: None, scram: None, md5: None, checked: true }
}

/// Nothing is asked; `users:` may still say how to log in to the servers.
fn trusted(user: Bytes, verifiers: &Verifiers) -> Credentials {
    let mut credentials = empty(user);
    match verifiers.listed(&credentials.user) {
        Some(Secret::Password(password)) => credentials.password = Some(password.clone()),
        Some(Secret::Md5(stored)) => credentials.md5 = Some(stored.clone()),
        Some(Secret::Scram(_)) | None => {}
    }
    credentials
}

async fn send(startup: &mut Startup, code: u32, data: &[u8]) -> io::Result<()> {
    let mut body = BytesMut::with_capacity(4 + data.len());
    body.put_u32(code);
    body.put_slice(data);
    let mut out = BytesMut::with_capacity(9 + data.len());
    put_message(&mut out, b'R', &body);
    startup.stream.write_all(&out).await?;
    startup.stream.flush().await
}

async fn receive(startup: &mut Startup, max: usize) -> Result<Bytes, AuthError> {
    match read_message(&mut startup.stream, &mut startup.buf, max).await {
        Ok(None) => Err(AuthError::Closed),
        Ok(Some(message)) if message.tag == b'p' => Ok(message.body),
        Ok(Some(message)) => {
            Err(refused("08P01", format!("expected password response, got message type {}", message.tag)))
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(refused("08P01", "invalid message length")),
        Err(error) => Err(error.into()),
    }
}

async fn receive_password(startup: &mut Startup) -> Result<Bytes, AuthError> {
    let mut body = receive(startup, PASSWORD_MAX).await?;
    match body.split_last() {
        Some((0, text)) if !text.contains(&0) => body.truncate(body.len() - 1),
        _ => return Err(refused("08P01", "invalid password packet size")),
    }
    match body.is_empty() {
        true => Err(refused("28P01", "empty password returned by client")),
        false => Ok(body),
    }
}

async fn ask_cleartext(startup: &mut Startup, user: Bytes, role: Option<&Role>) -> Result<Credentials, AuthError> {
    send(startup, CLEARTEXT, b"").await?;
    let password = receive_password(startup).await?;
    let right = match role.map(|role| &role.secret) {
        None => true,
        Some(None) => false,
        Some(Some(Secret::Password(kept))) => scram::equal(kept, &password),
        Some(Some(Secret::Md5(kept))) => scram::equal(kept.as_bytes(), md5::stored(&user, &password).as_bytes()),
        Some(Some(Secret::Scram(verifier))) => check_password(verifier.clone(), password.clone()).await,
    };
    if !right {
        return Err(wrong_password(&user, role.and_then(|role| role.secret.as_ref())));
    }
    Ok(Credentials { password: Some(password.to_vec()), checked: role.is_some(), ..empty(user) })
}

async fn ask_md5(startup: &mut Startup, user: Bytes, role: &Role) -> Result<Credentials, AuthError> {
    let salt: [u8; 4] = rand::random();
    send(startup, MD5, &salt).await?;
    let answer = receive_password(startup).await?;
    let (stored, password) = match &role.secret {
        Some(Secret::Md5(stored)) => (stored.clone(), None),
        Some(Secret::Password(password)) => (md5::stored(&user, password), Some(password.clone())),
        Some(Secret::Scram(_)) | None => return Err(wrong_password(&user, role.secret.as_ref())),
    };
    if !md5::check(&stored, salt, &answer) {
        return Err(wrong_password(&user, role.secret.as_ref()));
    }
    Ok(Credentials { password, md5: Some(stored), ..empty(user) })
}

async fn ask_scram(
    startup: &mut Startup,
    user: Bytes,
    role: &Role,
    verifiers: &Verifiers,
) -> Result<Credentials, AuthError> {
    let verifier = match &role.secret {
        Some(Secret::Scram(verifier)) => verifier.clone(),
        Some(Secret::Password(password)) => verifiers.derive(&user, password).await,
        Some(Secret::Md5(_)) | None => verifiers.mock(&user),
    };
    let end_point = startup.end_point.clone();
    let mut mechanisms = match end_point {
        Some(_) => format!("{SCRAM_PLUS}\0{SCRAM}\0"),
        None => format!("{SCRAM}\0"),
    };
    mechanisms.push('\0');
    send(startup, SASL, mechanisms.as_bytes()).await?;
    let (mechanism, first) = read_initial_response(receive(startup, SASL_MAX).await?)?;
    let plus = mechanism == SCRAM_PLUS && end_point.is_some();
    if !plus && mechanism != SCRAM {
        return Err(refused("08P01", "client selected an invalid SASL authentication mechanism"));
    }
    let first = match first {
        Some(first) => first,
        // The client waits to be asked, which SASL allows.
        None => {
            send(startup, SASL_CONTINUE, b"").await?;
            receive(startup, SASL_MAX).await?
        }
    };
    let offer = Offer { end_point: end_point.as_deref(), plus };
    let (exchange, challenge) = ServerExchange::start(&first, offer, verifier, &fresh_nonce())
        .map_err(|error| scram_failed(error, &user, role))?;
    send(startup, SASL_CONTINUE, challenge.as_bytes()).await?;
    let last = receive(startup, SASL_MAX).await?;
    let (signature, keys) = exchange.finish(&last).map_err(|error| scram_failed(error, &user, role))?;
    send(startup, SASL_FINAL, signature.as_bytes()).await?;
    let password = match &role.secret {
        Some(Secret::Password(password)) => Some(password.clone()),
        _ => None,
    };
    Ok(Credentials { password, scram: Some(keys), ..empty(user) })
}

/// SASLInitialResponse: the mechanism, and the client's first message if it sent one.
fn read_initial_response(mut body: Bytes) -> Result<(String, Option<Bytes>), AuthError> {
    let malformed = || refused("08P01", "invalid SASLInitialResponse message");
    let end = memchr::memchr(0, &body).ok_or_else(malformed)?;
    let mechanism = String::from_utf8_lossy(&body.split_to(end)).into_owned();
    body.advance(1);
    if body.len() < 4 {
        return Err(malformed());
    }
    match body.get_i32() {
        -1 if body.is_empty() => Ok((mechanism, None)),
        length if usize::try_from(length) == Ok(body.len()) => Ok((mechanism, Some(body))),
        _ => Err(malformed()),
    }
}

fn scram_failed(error: ScramError, user: &[u8], role: &Role) -> AuthError {
    match error {
        ScramError::Proof => wrong_password(user, role.secret.as_ref()),
        ScramError::Binding => refused("28000", "SCRAM channel binding check failed"),
        ScramError::Malformed(detail) => AuthError::Refused {
            code: "08P01",
            message: "malformed SCRAM message".into(),
            detail: Some(detail),
            reason: None,
        },
        ScramError::Signature | ScramError::Server(_) => refused("08P01", "malformed SCRAM message"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fuzz_any_initial_response_is_read_without_panic(body in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = read_initial_response(body.into());
        }
    }

    #[test]
    fn initial_responses() {
        let read = |body: &'static [u8]| read_initial_response(Bytes::from_static(body)).ok();
        assert_eq!(read(b"X\0\0\0\0\x02ab"), Some(("X".into(), Some("ab".into()))));
        assert_eq!(read(b"X\0\xff\xff\xff\xff"), Some(("X".into(), None)));
        assert_eq!(read(b"X\0\xff\xff\xff\xfe"), None);
        assert_eq!(read(b"X\0\0\0\0\x03ab"), None);
        assert_eq!(read(b"X\0\0\0"), None);
        assert_eq!(read(b"X"), None);
    }
}
