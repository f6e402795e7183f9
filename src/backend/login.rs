//! The client's part of a login at a server: StartupMessage to AuthenticationOk.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::AsyncWriteExt;

use super::connect::ConnectError;
use crate::auth::scram::{Binding, Challenge, ClientExchange, Proven, SCRAM, SCRAM_PLUS, ScramKeys, fresh_nonce};
use crate::auth::verifiers::derive_keys;
use crate::auth::{Credentials, md5};
use crate::wire::message::{put_message, read_message};
use crate::wire::stream::Stream;
use crate::wire::tls::end_point;

/// The longest message before AuthenticationOk, as in libpq: an ErrorResponse may be long.
const MESSAGE_MAX: usize = 30_000;

/// Who logs in, and how.
pub(super) struct Login<'a> {
    pub place: &'a str,
    pub credentials: &'a Credentials,
    pub parameters: &'a [(Bytes, Bytes)],
    pub minor: u16,
}

/// What was asked of us so far.
enum Asked {
    Nothing,
    Password,
    SaslStarted(ClientExchange),
    SaslProven(Proven),
    SaslDone,
}

impl Login<'_> {
    /// The connection after AuthenticationOk, what was read behind it, and the minor version.
    pub async fn run(&self, mut stream: Stream) -> Result<(Stream, BytesMut, u16), ConnectError> {
        let broke = |error| ConnectError::Io { place: self.place.to_owned(), error };
        stream.write_all(&startup_message(self.parameters, self.minor)).await.map_err(broke)?;
        stream.flush().await.map_err(broke)?;
        let mut buf = BytesMut::with_capacity(8192);
        let mut asked = Asked::Nothing;
        let mut minor = self.minor;
        loop {
            let message = read_message(&mut stream, &mut buf, MESSAGE_MAX)
                .await
                .and_then(|message| message.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()))
                .map_err(broke)?;
            match message.tag {
                b'E' => return Err(ConnectError::Refused(message.encode())),
                b'N' => {}
                b'v' => minor = self.negotiated(message.body)?,
                b'R' => {
                    let mut body = message.body;
                    if body.len() < 4 {
                        return Err(self.failed("the server's authentication request is malformed"));
                    }
                    let code = body.get_u32();
                    if code == 0 {
                        self.accepted(&asked)?;
                        return Ok((stream, buf, minor));
                    }
                    let (next, reply) = self.answer(code, body, asked, &stream).await?;
                    asked = next;
                    if let Some(reply) = reply {
                        stream.write_all(&reply).await.map_err(broke)?;
                        stream.flush().await.map_err(broke)?;
                    }
                }
                _ => return Err(self.failed("the server does not speak PostgreSQL's protocol")),
            }
        }
    }

    fn failed(&self, message: impl Into<String>) -> ConnectError {
        ConnectError::Auth { place: self.place.to_owned(), message: message.into() }
    }

    fn role(&self) -> String {
        format!("role \"{}\"", String::from_utf8_lossy(&self.credentials.user))
    }

    fn negotiated(&self, mut body: Bytes) -> Result<u16, ConnectError> {
        let version = if body.len() < 4 { 0 } else { body.get_u32() };
        match u16::try_from(version.wrapping_sub(3 << 16)) {
            Ok(minor) if minor <= self.minor => Ok(minor),
            _ => Err(self.failed("the server wants another protocol than 3.0 or 3.2")),
        }
    }

    /// AuthenticationOk: has everyone proven what they had to?
    fn accepted(&self, asked: &Asked) -> Result<(), ConnectError> {
        match asked {
            Asked::Password | Asked::SaslDone => Ok(()),
            Asked::Nothing if self.credentials.checked => Ok(()),
            Asked::Nothing => Err(self.failed(format!(
                "the server lets {} in without a password (`trust` in its pg_hba.conf), so nobody has checked the \
                 client's: demand scram-sha-256 there, or let the control role read pg_authid",
                self.role()
            ))),
            Asked::SaslStarted(_) | Asked::SaslProven(_) => {
                Err(self.failed("the server ended SCRAM without proving that it knows the password's verifier"))
            }
        }
    }

    /// The next state and what to send.
    async fn answer(
        &self,
        code: u32,
        body: Bytes,
        asked: Asked,
        stream: &Stream,
    ) -> Result<(Asked, Option<BytesMut>), ConnectError> {
        let scram_failed = |error: crate::auth::scram::ScramError| self.failed(error.to_string());
        match (code, asked) {
            (3, Asked::Nothing) => {
                let password = self.credentials.password.as_ref().ok_or_else(|| self.no_password("password"))?;
                Ok((Asked::Password, Some(password_message(&[password, &[0]]))))
            }
            (5, Asked::Nothing) => {
                let salt: [u8; 4] =
                    body.as_ref().try_into().map_err(|_| self.failed("the server's MD5 request is malformed"))?;
                let stored = self.md5_hash()?;
                Ok((Asked::Password, Some(password_message(&[md5::response(&stored, salt).as_bytes(), &[0]]))))
            }
            (10, Asked::Nothing) => {
                let own_end_point = server_end_point(stream);
                let binding = self.choose(&body, own_end_point.as_deref())?;
                let (exchange, first) = ClientExchange::start(binding, &fresh_nonce());
                let length = (first.len() as u32).to_be_bytes();
                let reply = password_message(&[binding.mechanism().as_bytes(), &[0], &length, first.as_bytes()]);
                Ok((Asked::SaslStarted(exchange), Some(reply)))
            }
            (11, Asked::SaslStarted(exchange)) => {
                let challenge = exchange.challenge(&body).map_err(scram_failed)?;
                let keys = self.scram_keys(&challenge).await?;
                let (proven, last) = challenge.prove(&keys);
                Ok((Asked::SaslProven(proven), Some(password_message(&[last.as_bytes()]))))
            }
            (12, Asked::SaslProven(proven)) => {
                proven.finish(&body).map_err(scram_failed)?;
                Ok((Asked::SaslDone, None))
            }
            (3 | 5 | 10 | 11 | 12, _) => Err(self.failed("the server's authentication requests make no sense")),
            (code, _) => Err(self.failed(format!(
                "the server asks {} for an authentication that the proxy does not have (request {code}): put \
                 scram-sha-256 for the proxy's address into its pg_hba.conf",
                self.role()
            ))),
        }
    }

    /// The mechanism, out of those that the server offers.
    fn choose<'e>(&self, offered: &[u8], end_point: Option<&'e [u8]>) -> Result<Binding<'e>, ConnectError> {
        let offers = |name: &str| offered.split(|byte| *byte == 0).any(|one| one == name.as_bytes());
        match end_point {
            Some(end_point) if offers(SCRAM_PLUS) => Ok(Binding::EndPoint(end_point)),
            Some(_) if offers(SCRAM) => Ok(Binding::NotOffered),
            None if offers(SCRAM) => Ok(Binding::Impossible),
            _ => Err(self.failed("the server offers no SASL mechanism that the proxy has: expected SCRAM-SHA-256")),
        }
    }

    fn md5_hash(&self) -> Result<String, ConnectError> {
        match (&self.credentials.md5, &self.credentials.password) {
            (Some(stored), _) => Ok(stored.clone()),
            (None, Some(password)) => Ok(md5::stored(&self.credentials.user, password)),
            (None, None) => Err(self.no_password("MD5 password")),
        }
    }

    /// Keys that the server's verifier asks for: those of the client's login if they fit, else from the password.
    async fn scram_keys(&self, challenge: &Challenge) -> Result<ScramKeys, ConnectError> {
        match (&self.credentials.scram, &self.credentials.password) {
            (Some(keys), _) if challenge.fits(keys) => Ok(keys.clone()),
            (_, Some(password)) => {
                Ok(derive_keys(password.clone(), challenge.salt.clone(), challenge.iterations).await)
            }
            (Some(_), None) => Err(self.failed(format!(
                "the server holds another SCRAM verifier for {} than the one that the client logged in with: copy the \
                 verifier from one server's pg_authid to the other with ALTER ROLE ... PASSWORD, or list the role with \
                 its password in `users:`",
                self.role()
            ))),
            (None, None) => Err(self.no_password("SCRAM password")),
        }
    }

    fn no_password(&self, kind: &str) -> ConnectError {
        self.failed(format!(
            "the server asks for the {kind} of {}, which the proxy does not have: list the role with its password in \
             `users:`, or let both servers hold the same kind of password for it",
            self.role()
        ))
    }
}

fn startup_message(parameters: &[(Bytes, Bytes)], minor: u16) -> BytesMut {
    let length = 9 + parameters.iter().map(|(name, value)| name.len() + value.len() + 2).sum::<usize>();
    let mut out = BytesMut::with_capacity(length);
    out.put_u32(length as u32);
    out.put_u32(3 << 16 | u32::from(minor));
    for (name, value) in parameters {
        out.put_slice(name);
        out.put_u8(0);
        out.put_slice(value);
        out.put_u8(0);
    }
    out.put_u8(0);
    out
}

fn password_message(parts: &[&[u8]]) -> BytesMut {
    let mut out = BytesMut::new();
    put_message(&mut out, b'p', &parts.concat());
    out
}

/// `tls-server-end-point` of the server's certificate.
fn server_end_point(stream: &Stream) -> Option<Vec<u8>> {
    let Stream::TlsClient(tls) = stream else { return None };
    tls.get_ref().1.peer_certificates()?.first().and_then(end_point)
}
