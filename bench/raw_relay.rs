//! The least that a proxy for PostgreSQL costs: it finds the frames of both streams and passes them on, and that is all.
//! A baseline for the benchmark, not part of Crossfade.
//!
//! `raw-relay LISTEN SERVER`, such as `raw-relay 127.0.0.1:6000 127.0.0.1:5432`.

use std::io::{Error, Result};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// The code of an SSLRequest, PostgreSQL's documentation, "Message Formats".
const SSL_REQUEST: u32 = 80877103;
/// Bytes read at once.
const BUFFER: usize = 32 * 1024;

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(listen), Some(server)) = (arguments.next(), arguments.next()) else {
        return Err(Error::other("usage: raw-relay LISTEN SERVER"));
    };
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (client, _) = listener.accept().await?;
        let server = server.clone();
        tokio::spawn(async move {
            if let Err(error) = relay(client, &server).await {
                eprintln!("raw-relay: {error}");
            }
        });
    }
}

async fn relay(mut client: TcpStream, server: &str) -> Result<()> {
    client.set_nodelay(true)?;
    let startup = startup(&mut client).await?;
    let mut server = TcpStream::connect(server).await?;
    server.set_nodelay(true)?;
    server.write_all(&startup).await?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // The first side that ends, ends both.
    tokio::select! {
        done = frames(from_client, to_server) => done,
        done = frames(from_server, to_client) => done,
    }
}

/// The startup packet; TLS is refused before it.
async fn startup(client: &mut TcpStream) -> Result<Vec<u8>> {
    loop {
        let length = client.read_u32().await?;
        if !(8..=10_000).contains(&length) {
            return Err(Error::other("no startup packet of PostgreSQL"));
        }
        let mut packet = length.to_be_bytes().to_vec();
        packet.resize(length as usize, 0);
        client.read_exact(&mut packet[4..]).await?;
        if packet[4..8] != SSL_REQUEST.to_be_bytes() {
            return Ok(packet);
        }
        client.write_all(b"N").await?;
    }
}

/// Passes frames on: all that one read brought, in one write.
async fn frames(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> Result<()> {
    let mut buffer = BytesMut::with_capacity(BUFFER);
    // Of the frame under way, bytes that have not been passed on yet.
    let mut rest = 0;
    loop {
        buffer.reserve(BUFFER);
        if from.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
        let (whole, left) = measure(&buffer, rest)?;
        rest = left;
        to.write_all(&buffer[..whole]).await?;
        buffer.advance(whole);
    }
}

/// How many bytes of `read` may go: all but a header that is not complete. And how many of its last frame are missing.
fn measure(read: &[u8], mut rest: usize) -> Result<(usize, usize)> {
    let mut at = 0;
    loop {
        let step = rest.min(read.len() - at);
        at += step;
        rest -= step;
        if rest > 0 || read.len() - at < 5 {
            return Ok((at, rest));
        }
        let length = u32::from_be_bytes([read[at + 1], read[at + 2], read[at + 3], read[at + 4]]) as usize;
        if length < 4 {
            return Err(Error::other("a frame shorter than its own length"));
        }
        rest = length + 1;
    }
}
