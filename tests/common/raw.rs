//! A client that speaks the protocol byte by byte, and keeps what comes back as it came.
//!
//! Message formats: PostgreSQL's documentation, chapter "Frontend/Backend Protocol". Servers must trust the role.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Protocol 3.0.
pub const V3_0: u32 = 196_608;
/// Protocol 3.2.
pub const V3_2: u32 = 196_610;

/// One message of the server: its type byte and its body, without the length.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    pub tag: u8,
    pub body: Vec<u8>,
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.body.len().min(400);
        write!(f, "{} {} bytes \"{}\"", char::from(self.tag), self.body.len(), self.body[..shown].escape_ascii())
    }
}

/// The tags of these messages, one letter each.
pub fn tags(frames: &[Frame]) -> String {
    frames.iter().map(|frame| char::from(frame.tag)).collect()
}

/// A message with a type byte.
pub fn message(tag: u8, body: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = vec![tag, 0, 0, 0, 0];
    body(&mut bytes);
    let length = u32::try_from(bytes.len() - 1).expect("short");
    bytes[1..5].copy_from_slice(&length.to_be_bytes());
    bytes
}

fn text(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.put_slice(text);
    bytes.put_u8(0);
}

fn count(number: usize) -> i16 {
    i16::try_from(number).expect("few")
}

/// The startup packet of a version, with names and values.
pub fn startup(version: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.put_u32(version);
    for (name, value) in parameters {
        text(&mut bytes, name.as_bytes());
        text(&mut bytes, value.as_bytes());
    }
    bytes.put_u8(0);
    let length = u32::try_from(bytes.len()).expect("short");
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Query.
pub fn query(sql: &str) -> Vec<u8> {
    query_bytes(sql.as_bytes())
}

/// Query, in any encoding.
pub fn query_bytes(sql: &[u8]) -> Vec<u8> {
    message(b'Q', |body| text(body, sql))
}

/// Parse, with the types of parameters.
pub fn parse(name: &str, sql: &str, types: &[u32]) -> Vec<u8> {
    message(b'P', |body| {
        text(body, name.as_bytes());
        text(body, sql.as_bytes());
        body.put_i16(count(types.len()));
        types.iter().for_each(|oid| body.put_u32(*oid));
    })
}

/// Bind: formats of the parameters (0 text, 1 binary), their values, formats of the results.
pub fn bind(portal: &str, statement: &str, formats: &[i16], values: &[Option<&[u8]>], results: &[i16]) -> Vec<u8> {
    message(b'B', |body| {
        text(body, portal.as_bytes());
        text(body, statement.as_bytes());
        body.put_i16(count(formats.len()));
        formats.iter().for_each(|format| body.put_i16(*format));
        values_of(body, values);
        body.put_i16(count(results.len()));
        results.iter().for_each(|format| body.put_i16(*format));
    })
}

fn values_of(body: &mut Vec<u8>, values: &[Option<&[u8]>]) {
    body.put_i16(count(values.len()));
    for value in values {
        match value {
            None => body.put_i32(-1),
            Some(value) => {
                body.put_i32(i32::try_from(value.len()).expect("short"));
                body.put_slice(value);
            }
        }
    }
}

/// Describe: `S` statement or `P` portal.
pub fn describe(kind: u8, name: &str) -> Vec<u8> {
    message(b'D', |body| {
        body.put_u8(kind);
        text(body, name.as_bytes());
    })
}

/// Execute, with the number of rows at most (0: all).
pub fn execute(portal: &str, rows: i32) -> Vec<u8> {
    message(b'E', |body| {
        text(body, portal.as_bytes());
        body.put_i32(rows);
    })
}

/// Close: `S` statement or `P` portal.
pub fn close(kind: u8, name: &str) -> Vec<u8> {
    message(b'C', |body| {
        body.put_u8(kind);
        text(body, name.as_bytes());
    })
}

/// Sync.
pub fn sync() -> Vec<u8> {
    message(b'S', |_| {})
}

/// Flush.
pub fn flush() -> Vec<u8> {
    message(b'H', |_| {})
}

/// Terminate.
pub fn terminate() -> Vec<u8> {
    message(b'X', |_| {})
}

/// CopyData.
pub fn copy_data(data: &[u8]) -> Vec<u8> {
    message(b'd', |body| body.put_slice(data))
}

/// CopyDone.
pub fn copy_done() -> Vec<u8> {
    message(b'c', |_| {})
}

/// CopyFail.
pub fn copy_fail(reason: &str) -> Vec<u8> {
    message(b'f', |body| text(body, reason.as_bytes()))
}

/// FunctionCall: formats of the arguments, the arguments, format of the result.
pub fn function_call(oid: u32, formats: &[i16], values: &[Option<&[u8]>], result: i16) -> Vec<u8> {
    message(b'F', |body| {
        body.put_u32(oid);
        body.put_i16(count(formats.len()));
        formats.iter().for_each(|format| body.put_i16(*format));
        values_of(body, values);
        body.put_i16(result);
    })
}

/// One connection.
pub struct RawClient {
    stream: TcpStream,
    received: BytesMut,
    /// Bytes per write; none: as they are given.
    piece: Option<usize>,
    /// What is being said, for the report when no answer comes.
    pub doing: String,
    /// From BackendKeyData.
    pub pid: u32,
    /// From BackendKeyData.
    pub key: Vec<u8>,
}

impl RawClient {
    /// Connects, and logs in by a startup packet. The frames: what came after AuthenticationOk, to ReadyForQuery or the end.
    pub async fn connect(port: u16, piece: Option<usize>, startup: &[u8]) -> (RawClient, Vec<Frame>) {
        let mut client = RawClient::open(port, piece).await;
        let frames = client.log_in(startup).await;
        (client, frames)
    }

    /// Connects, and says nothing.
    pub async fn open(port: u16, piece: Option<usize>) -> RawClient {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("connects");
        stream.set_nodelay(true).expect("sets");
        RawClient { stream, received: BytesMut::new(), piece, doing: "log in".to_owned(), pid: 0, key: Vec::new() }
    }

    /// Logs in by a startup packet; see [`RawClient::connect`].
    pub async fn log_in(&mut self, startup: &[u8]) -> Vec<Frame> {
        self.send(startup).await;
        loop {
            // NegotiateProtocolVersion and what belongs to authentication is each leg's own affair.
            match self.read().await {
                Some(frame) if frame.tag == b'R' && frame.body == [0; 4] => break,
                Some(frame) if frame.tag == b'v' => {}
                other => panic!("the server must trust the role of this test, but said {other:?}"),
            }
        }
        let frames = self.until_ready(1).await;
        if let Some(key) = frames.iter().find(|frame| frame.tag == b'K') {
            self.pid = (&key.body[..4]).get_u32();
            self.key = key.body[4..].to_owned();
        }
        frames
    }

    /// Sends bytes; when the other side has closed, what it said before is still there to read.
    pub async fn send(&mut self, bytes: &[u8]) {
        // The beginning of what is large is enough to meet every boundary.
        let (pieces, rest) = bytes.split_at(bytes.len().min(if self.piece.is_some() { 10_000 } else { 0 }));
        for piece in pieces.chunks(self.piece.unwrap_or(1)).chain([rest]) {
            if self.stream.write_all(piece).await.is_err() {
                return;
            }
            if self.piece.is_some() {
                tokio::task::yield_now().await;
            }
        }
    }

    /// The next frame. None: the connection is closed.
    ///
    /// # Panics
    /// Nothing comes for 30 s.
    pub async fn read(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.frame() {
                return Some(frame);
            }
            let read = tokio::time::timeout(Duration::from_secs(30), self.stream.read_buf(&mut self.received));
            match read.await.unwrap_or_else(|_| panic!("no frame within 30 s: {:.200}", self.doing)) {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// One byte without a frame: the answer to SSLRequest and GSSENCRequest.
    pub async fn read_byte(&mut self) -> u8 {
        self.stream.read_u8().await.expect("an answer")
    }

    /// Frames up to this many ReadyForQuery, or to the end of the connection.
    pub async fn until_ready(&mut self, times: usize) -> Vec<Frame> {
        self.until(b'Z', times).await
    }

    /// Frames up to this many of one type, or to the end of the connection.
    pub async fn until(&mut self, tag: u8, times: usize) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut seen = 0;
        while seen < times {
            let Some(frame) = self.read().await else {
                // The end is a reply too.
                frames.push(Frame { tag: b'.', body: Vec::new() });
                break;
            };
            seen += usize::from(frame.tag == tag);
            frames.push(frame);
        }
        frames
    }

    /// The stream itself, for what does not fit in memory. Nothing may be read ahead.
    pub fn into_stream(self) -> TcpStream {
        assert!(self.received.is_empty(), "bytes were read ahead");
        self.stream
    }

    fn frame(&mut self) -> Option<Frame> {
        let length = (self.received.get(1..5)?).get_u32() as usize;
        if self.received.len() < length + 1 {
            return None;
        }
        let mut bytes = self.received.split_to(length + 1);
        let tag = bytes.get_u8();
        bytes.advance(4);
        Some(Frame { tag, body: bytes.to_vec() })
    }
}

/// Cancels what a session runs, and waits until the server has taken note.
pub async fn cancel(port: u16, pid: u32, key: &[u8]) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("connects");
    let mut bytes = Vec::new();
    bytes.put_u32(u32::try_from(12 + key.len()).expect("short"));
    bytes.put_u32(80_877_102);
    bytes.put_u32(pid);
    bytes.put_slice(key);
    stream.write_all(&bytes).await.expect("sends");
    let mut rest = Vec::new();
    drop(stream.read_to_end(&mut rest).await);
    assert!(rest.is_empty(), "nothing is ever answered to a CancelRequest");
}
