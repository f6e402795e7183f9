//! What a client says before it logs in: SSLRequest, GSSENCRequest, StartupMessage, CancelRequest
//! (<https://www.postgresql.org/docs/current/protocol-flow.html>, as PostgreSQL 18's backend_startup.c reads them).
//!
//! `accept` answers all of it, errors too, and returns what the client wants. How long it may take is the caller's.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::message::{fatal, put_message};
use super::stream::{Stream, tune};
use super::tls::{ALPN, ServerTls};

/// The longest packet before the login, its length included (PostgreSQL's MAX_STARTUP_PACKET_LENGTH).
pub const PACKET_MAX: usize = 10_000;
/// The newest minor version of protocol 3 that is spoken here.
pub const MINOR_MAX: u16 = 2;
/// The longest cancel key behind the process id (protocol 3.2).
pub const CANCEL_SECRET_MAX: usize = 256;

const MAJOR: u16 = 3;
const CANCEL: u32 = 80_877_102;
const SSL: u32 = 80_877_103;
const GSSENC: u32 = 80_877_104;
/// The first byte of a TLS ClientHello; a length below 10,000 never begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// A client that wants to log in.
pub struct Startup {
    /// Its connection.
    pub stream: Stream,
    /// Bytes that were read behind the StartupMessage.
    pub buf: BytesMut,
    /// Protocol 3.`minor`, after negotiation: 0 or 2.
    pub minor: u16,
    /// Its parameters but for `_pq_.` ones, in order, as they came: names and values need not be UTF-8.
    pub parameters: Vec<(Bytes, Bytes)>,
    /// `tls-server-end-point` of the certificate that it was shown, for channel binding; None in the clear.
    pub end_point: Option<Vec<u8>>,
}

impl Startup {
    /// The last parameter of that name, as PostgreSQL takes it.
    pub fn parameter(&self, name: &str) -> Option<&Bytes> {
        self.parameters.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// The role. `accept` returns none without.
    pub fn user(&self) -> Bytes {
        self.parameter("user").cloned().unwrap_or_default()
    }

    /// The database: by default the one called like the role.
    pub fn database(&self) -> Bytes {
        self.parameter("database").filter(|name| !name.is_empty()).cloned().unwrap_or_else(|| self.user())
    }
}

/// What a connection turned out to be.
pub enum Accepted {
    /// A client that wants to log in.
    Session(Startup),
    /// A CancelRequest. Its sender awaits nothing but the end of the connection.
    Cancel {
        /// Process id (4 bytes) and secret (4 to 256 bytes), as BackendKeyData gave them.
        key: Bytes,
        /// The connection, to be closed once the request was carried out.
        stream: Stream,
    },
    /// It was closed before it said anything: a port scan or a health check.
    Closed,
}

/// Why a connection was given up. The client was told where it could be.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The connection broke.
    #[error("connection of a client broke before its login: {0}")]
    Io(#[from] io::Error),
    /// The TLS handshake failed.
    #[error("TLS handshake with a client failed: {0}")]
    Tls(io::Error),
    /// The client was refused; `code` is the SQLSTATE that it was sent.
    #[error("client refused before its login: {message} ({code})")]
    Refused {
        /// SQLSTATE.
        code: &'static str,
        /// What it was told.
        message: String,
        /// What it can do.
        hint: Option<&'static str>,
    },
}

fn refused(code: &'static str, message: impl Into<String>) -> AcceptError {
    AcceptError::Refused { code, message: message.into(), hint: None }
}

/// Hears a new connection out. Without `tls` a client that asks for it is told that there is none.
pub async fn accept(tcp: TcpStream, tls: Option<&ServerTls>) -> Result<Accepted, AcceptError> {
    tune(&tcp)?;
    let mut first = [0_u8];
    if tcp.peek(&mut first).await? == 0 {
        return Ok(Accepted::Closed);
    }
    let direct = first[0] == TLS_HANDSHAKE;
    let mut greeting = Greeting {
        stream: Stream::Tcp(tcp),
        buf: BytesMut::with_capacity(1024),
        tls,
        tls_asked: direct,
        gss_asked: direct,
    };
    if direct {
        let tls = tls.ok_or_else(|| refused("08P01", "direct TLS, but the proxy has no certificate"))?;
        greeting.stream = handshake(greeting.stream, tls, Alpn::Required).await?;
    }
    loop {
        match greeting.answer().await {
            Ok(Answer::Again) => {}
            Ok(Answer::Handshake(tls)) => {
                greeting.stream = handshake(greeting.stream, tls, Alpn::Optional).await?;
            }
            Ok(Answer::Closed) => return Ok(Accepted::Closed),
            Ok(Answer::Cancel(key)) => return Ok(Accepted::Cancel { key, stream: greeting.stream }),
            Ok(Answer::Login(packet)) => return greeting.login(packet).await.map(Accepted::Session),
            Err(error) => {
                if let AcceptError::Refused { code, message, hint } = &error {
                    say_why(&mut greeting.stream, code, message, *hint).await;
                }
                return Err(error);
            }
        }
    }
}

/// A connection before its StartupMessage.
struct Greeting<'t> {
    stream: Stream,
    buf: BytesMut,
    tls: Option<&'t ServerTls>,
    /// Encryption of each kind may be asked for once, as in PostgreSQL, and none within TLS.
    tls_asked: bool,
    gss_asked: bool,
}

/// What follows from a packet.
enum Answer<'t> {
    Again,
    Handshake(&'t ServerTls),
    Login(StartupPacket),
    Cancel(Bytes),
    Closed,
}

impl<'t> Greeting<'t> {
    /// Reads a packet and answers it.
    async fn answer(&mut self) -> Result<Answer<'t>, AcceptError> {
        let Some(packet) = read_packet(&mut self.stream, &mut self.buf).await? else { return Ok(Answer::Closed) };
        match parse_packet(packet)? {
            Packet::Ssl if !self.tls_asked => {
                self.tls_asked = true;
                self.refuse_stuffing()?;
                let Some(tls) = self.tls else {
                    self.stream.write_all(b"N").await?;
                    return Ok(Answer::Again);
                };
                self.gss_asked = true;
                self.stream.write_all(b"S").await?;
                Ok(Answer::Handshake(tls))
            }
            Packet::Gssenc if !self.gss_asked => {
                self.gss_asked = true;
                self.refuse_stuffing()?;
                self.stream.write_all(b"N").await?;
                Ok(Answer::Again)
            }
            Packet::Ssl => Err(unsupported(SSL)),
            Packet::Gssenc => Err(unsupported(GSSENC)),
            Packet::Cancel(key) => Ok(Answer::Cancel(key)),
            Packet::Startup(_) if self.tls.is_some_and(|tls| tls.required) && !self.stream.is_tls() => {
                Err(AcceptError::Refused {
                    code: "28000",
                    message: "this proxy takes only connections with TLS".into(),
                    hint: Some("Set sslmode=require (or higher) in the client's connection string."),
                })
            }
            Packet::Startup(startup) => Ok(Answer::Login(startup)),
        }
    }

    /// What came in the clear behind a request for encryption may be a stranger's: it must never be read as if it had
    /// been encrypted (CVE-2021-23214).
    fn refuse_stuffing(&self) -> Result<(), AcceptError> {
        match self.buf.is_empty() {
            true => Ok(()),
            false => Err(refused("08P01", "received unencrypted data after a request for encryption")),
        }
    }

    /// Tells a client that asked for more than we speak what we do speak.
    async fn login(mut self, packet: StartupPacket) -> Result<Startup, AcceptError> {
        let (minor, reply) = negotiate(packet.minor, &packet.unknown_options);
        if let Some(reply) = reply {
            self.stream.write_all(&reply).await?;
            self.stream.flush().await?;
        }
        let end_point = match self.stream.is_tls() {
            true => self.tls.and_then(|tls| tls.end_point.clone()),
            false => None,
        };
        Ok(Startup { stream: self.stream, buf: self.buf, minor, parameters: packet.parameters, end_point })
    }
}

/// Direct TLS must name its protocol, so that a TLS connection meant for another service cannot be turned here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alpn {
    Required,
    Optional,
}

async fn handshake(stream: Stream, tls: &ServerTls, alpn: Alpn) -> Result<Stream, AcceptError> {
    let Stream::Tcp(tcp) = stream else {
        return Err(refused("08P01", "TLS within TLS"));
    };
    let stream = TlsAcceptor::from(tls.config.clone()).accept(tcp).await.map_err(AcceptError::Tls)?;
    let named = stream.get_ref().1.alpn_protocol() == Some(ALPN);
    let mut stream = Stream::TlsServer(Box::new(stream));
    if alpn == Alpn::Required && !named {
        let message = "received direct TLS connection request without ALPN protocol negotiation extension";
        say_why(&mut stream, "08P01", message, None).await;
        return Err(refused("08P01", message));
    }
    Ok(stream)
}

/// The client may be gone already: then nobody needs to know why.
async fn say_why(stream: &mut Stream, code: &str, message: &str, hint: Option<&str>) {
    let _ = stream.write_all(&fatal(code, message, None, hint)).await;
    let _ = stream.shutdown().await;
}

/// Reads a packet without its length. None: the connection ended before one began.
async fn read_packet(stream: &mut Stream, buf: &mut BytesMut) -> Result<Option<Bytes>, AcceptError> {
    loop {
        if let Some(header) = buf.first_chunk::<4>() {
            let length = u32::from_be_bytes(*header) as usize;
            if !(8..=PACKET_MAX).contains(&length) {
                return Err(refused("08P01", "invalid length of startup packet"));
            }
            if buf.len() >= length {
                let mut packet = buf.split_to(length);
                packet.advance(4);
                return Ok(Some(packet.freeze()));
            }
        }
        if stream.read_buf(buf).await? == 0 {
            return match buf.is_empty() {
                true => Ok(None),
                false => Err(AcceptError::Io(io::ErrorKind::UnexpectedEof.into())),
            };
        }
    }
}

/// A packet, understood.
#[derive(Debug, PartialEq, Eq)]
enum Packet {
    Ssl,
    Gssenc,
    Cancel(Bytes),
    Startup(StartupPacket),
}

#[derive(Debug, PartialEq, Eq)]
struct StartupPacket {
    /// As it was asked for.
    minor: u16,
    parameters: Vec<(Bytes, Bytes)>,
    /// Names of `_pq_.` options: none is known yet.
    unknown_options: Vec<Bytes>,
}

fn unsupported(code: u32) -> AcceptError {
    let message = format!(
        "unsupported frontend protocol {}.{}: server supports {MAJOR}.0 to {MAJOR}.{MINOR_MAX}",
        code >> 16,
        code & 0xffff
    );
    refused("0A000", message)
}

/// A packet without its length, of any content.
fn parse_packet(mut packet: Bytes) -> Result<Packet, AcceptError> {
    if packet.len() < 4 {
        return Err(refused("08P01", "invalid length of startup packet"));
    }
    let code = packet.get_u32();
    match code {
        SSL if packet.is_empty() => Ok(Packet::Ssl),
        GSSENC if packet.is_empty() => Ok(Packet::Gssenc),
        CANCEL if (8..=4 + CANCEL_SECRET_MAX).contains(&packet.len()) => Ok(Packet::Cancel(packet)),
        SSL | GSSENC | CANCEL => Err(refused("08P01", "invalid length of startup packet")),
        code if code >> 16 == u32::from(MAJOR) => parse_startup(code as u16, packet).map(Packet::Startup),
        code => Err(unsupported(code)),
    }
}

/// Pairs of zero-terminated names and values, and a zero at the very end.
fn parse_startup(minor: u16, mut rest: Bytes) -> Result<StartupPacket, AcceptError> {
    let mut packet = StartupPacket { minor, parameters: Vec::new(), unknown_options: Vec::new() };
    let layout = || refused("08P01", "invalid startup packet layout: expected terminator as last byte");
    loop {
        let name = take_text(&mut rest).ok_or_else(layout)?;
        if name.is_empty() {
            break;
        }
        let value = take_text(&mut rest).ok_or_else(layout)?;
        if name.starts_with(b"_pq_.") {
            packet.unknown_options.push(name);
        } else {
            packet.parameters.push((name, value));
        }
    }
    if !rest.is_empty() {
        return Err(layout());
    }
    let user = packet.parameters.iter().rev().find(|(name, _)| name == "user");
    if user.is_none_or(|(_, user)| user.is_empty()) {
        return Err(refused("28000", "no PostgreSQL user name specified in startup packet"));
    }
    Ok(packet)
}

fn take_text(rest: &mut Bytes) -> Option<Bytes> {
    let end = memchr::memchr(0, rest)?;
    let text = rest.split_to(end);
    rest.advance(1);
    Some(text)
}

/// The minor version to speak, and a NegotiateProtocolVersion where it is not the one that was asked for or an option
/// is not known. There is no 3.1: it is answered with 3.0.
fn negotiate(asked: u16, unknown_options: &[Bytes]) -> (u16, Option<Bytes>) {
    let minor = if asked >= MINOR_MAX { MINOR_MAX } else { 0 };
    if minor == asked && unknown_options.is_empty() {
        return (minor, None);
    }
    let mut body = BytesMut::new();
    body.put_u32(u32::from(MAJOR) << 16 | u32::from(minor));
    body.put_u32(unknown_options.len() as u32);
    for name in unknown_options {
        body.put_slice(name);
        body.put_u8(0);
    }
    let mut reply = BytesMut::new();
    put_message(&mut reply, b'v', &body);
    (minor, Some(reply.freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(code: u32, rest: &[u8]) -> Bytes {
        [&code.to_be_bytes()[..], rest].concat().into()
    }

    fn startup(minor: u32, rest: &[u8]) -> Result<Packet, AcceptError> {
        parse_packet(packet(3 << 16 | minor, rest))
    }

    fn code(result: Result<Packet, AcceptError>) -> &'static str {
        match result {
            Err(AcceptError::Refused { code, .. }) => code,
            other => panic!("expected a refusal: {other:?}"),
        }
    }

    #[test]
    fn parameters_keep_order_and_bytes_and_options_are_taken_out() {
        let Packet::Startup(found) =
            startup(2, b"user\0\xff\xfe\0_pq_.x\0on\0database\0d\0options\0-c a=b\0\0").unwrap()
        else {
            panic!("no startup")
        };
        let names: Vec<&[u8]> = found.parameters.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names, [&b"user"[..], b"database", b"options"]);
        assert_eq!(&found.parameters[0].1[..], b"\xff\xfe");
        assert_eq!(found.unknown_options, ["_pq_.x"]);
        assert_eq!(found.minor, 2);
    }

    #[test]
    fn malformed_packets_are_refused() {
        for rest in [&b""[..], b"user\0a", b"user\0a\0", b"user\0a\0\0x", b"user\0"] {
            assert_eq!(code(startup(0, rest)), "08P01", "{rest:?}");
        }
        assert_eq!(code(startup(0, b"\0")), "28000");
        assert_eq!(code(startup(0, b"user\0\0\0")), "28000");
        assert_eq!(code(parse_packet(packet(2 << 16, b"user\0a\0\0"))), "0A000");
        assert_eq!(code(parse_packet(packet(4 << 16, b"user\0a\0\0"))), "0A000");
        assert_eq!(code(parse_packet(packet(SSL, b"x"))), "08P01");
        assert_eq!(code(parse_packet(packet(CANCEL, b"1234567"))), "08P01");
        assert_eq!(code(parse_packet(packet(CANCEL, &[7; 261]))), "08P01");
        assert_eq!(parse_packet(packet(CANCEL, &[7; 260])).unwrap(), Packet::Cancel(vec![7; 260].into()));
    }

    #[test]
    fn versions_and_options_are_negotiated() {
        assert_eq!(negotiate(0, &[]), (0, None));
        assert_eq!(negotiate(2, &[]), (2, None));
        let (minor, reply) = negotiate(1, &[]);
        assert_eq!((minor, &reply.unwrap()[..]), (0, &b"v\0\0\0\x0c\0\x03\0\0\0\0\0\0"[..]));
        let (minor, reply) = negotiate(9999, &["_pq_.a".into(), "_pq_.b".into()]);
        assert_eq!((minor, &reply.unwrap()[..]), (2, &b"v\0\0\0\x1a\0\x03\0\x02\0\0\0\x02_pq_.a\0_pq_.b\0"[..]));
    }

    proptest! {
        #[test]
        fn fuzz_any_bytes_are_read_without_panic(
            code in prop_oneof![Just(3 << 16), Just(SSL), Just(GSSENC), Just(CANCEL), any::<u32>()],
            rest in proptest::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..300),
        ) {
            let _ = parse_packet(packet(code, &rest));
        }

        #[test]
        fn fuzz_any_parameters_come_out_as_they_went_in(
            parameters in proptest::collection::vec(
                (proptest::collection::vec(1_u8.., 1..20), proptest::collection::vec(1_u8.., 0..20)), 0..8),
        ) {
            let mut wire = b"user\0me\0".to_vec();
            for (name, value) in &parameters {
                wire.extend([&name[..], b"\0", value, b"\0"].concat());
            }
            wire.push(0);
            if parameters.iter().all(|(name, _)| name != b"user" && !name.starts_with(b"_pq_.")) {
                let Packet::Startup(found) = startup(0, &wire).unwrap() else { panic!("no startup") };
                let found: Vec<_> = found.parameters[1..].iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
                prop_assert_eq!(found, parameters);
            }
        }
    }
}
