//! One connection's stream with a buffer for each direction. Reads are made only when asked for; writes go out as they can.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};

use super::stream::Stream;

/// Bytes asked for by one read.
const READ: usize = 16 * 1024;
/// An empty buffer with more room than this is given back at once: a statement of many megabytes is no measure for the next one.
const KEPT: usize = 1024 * 1024;

/// A connection: what has been read and not used yet, what has not been written yet.
#[derive(Debug)]
pub struct Conn<S> {
    stream: S,
    /// Read, not used.
    pub inb: BytesMut,
    /// To be written.
    pub out: BytesMut,
    /// The other end has closed its direction, or reading failed.
    pub closed: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Conn<S> {
    /// Over a stream, with bytes that were read from it before.
    pub fn new(stream: S, inb: BytesMut) -> Conn<S> {
        Conn { stream, inb, out: BytesMut::new(), closed: false }
    }

    /// Writes what can be written. Ready once nothing is left.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.out.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while !self.out.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.out) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) if written == self.out.len() => clear(&mut self.out),
                Poll::Ready(Ok(written)) => bytes::Buf::advance(&mut self.out, written),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Reads once. Ready with the number of bytes; 0 at the end of the stream, which also sets `closed`.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.closed {
            return Poll::Pending;
        }
        if self.inb.is_empty() {
            clear(&mut self.inb);
        }
        // A frame that is larger than one read is read in larger steps.
        let additional = if self.inb.len() >= READ { READ * 4 } else { READ };
        self.inb.reserve(additional);
        // Not whatever the buffer has room for: the limits of what a session holds are looked at between reads.
        let mut room = BufMut::limit(&mut self.inb, additional);
        let polled = tokio_util::io::poll_read_buf(Pin::new(&mut self.stream), cx, &mut room);
        self.closed = matches!(polled, Poll::Ready(Ok(0) | Err(_)));
        polled
    }

    /// Writes everything.
    pub async fn flush(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Reads once, after writing what can be written. An error where the stream has ended.
    pub async fn fill(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| {
            if let Poll::Ready(Err(error)) = self.poll_flush(cx) {
                return Poll::Ready(Err(error));
            }
            if self.closed {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            match self.poll_fill(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Ok(0)) => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Poll::Ready(Ok(_)) => Poll::Ready(Ok(())),
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            }
        })
        .await
    }

    /// The next whole frame, taken out of the buffer; waits for it.
    pub async fn frame(&mut self) -> io::Result<(u8, bytes::Bytes)> {
        loop {
            let head = super::frame::head(&self.inb).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            match head {
                Some(head) if self.inb.len() >= head.total => {
                    let mut frame = self.inb.split_to(head.total).freeze();
                    bytes::Buf::advance(&mut frame, super::frame::HEAD);
                    return Ok((head.tag, frame));
                }
                _ => self.fill().await?,
            }
        }
    }
}

impl Conn<Stream> {
    /// Nothing is in its buffers.
    pub fn is_empty(&self) -> bool {
        self.inb.is_empty() && self.out.is_empty()
    }

    /// Gives empty buffers back. Reading makes new ones: wait for `poll_readable` first.
    pub fn shrink(&mut self) {
        if self.inb.is_empty() {
            self.inb = BytesMut::new();
        }
        if self.out.is_empty() {
            self.out = BytesMut::new();
        }
    }

    /// Ready once a read that found nothing is worth another try.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.poll_read_ready(cx).map(|_| ())
    }
}

fn clear(buffer: &mut BytesMut) {
    match buffer.capacity() > KEPT {
        true => *buffer = BytesMut::new(),
        false => buffer.clear(),
    }
}

/// Moves the first `count` bytes of `from` behind `to`; takes the whole buffer over where that needs no copy.
pub fn pass(from: &mut BytesMut, to: &mut BytesMut, count: usize) {
    if to.is_empty() && count == from.len() {
        std::mem::swap(from, to);
        return;
    }
    to.extend_from_slice(&from[..count]);
    bytes::Buf::advance(from, count);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    /// Buffers change places (`pass`), so that one with much room comes to be read into: what it then takes must not depend on that room.
    #[tokio::test]
    async fn a_read_takes_no_more_than_asked_for() {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        far.write_all(&vec![b'x'; 1 << 20]).await.expect("fits");
        let mut conn = Conn::new(near, BytesMut::with_capacity(4 << 20));
        conn.fill().await.expect("reads");
        assert_eq!(conn.inb.len(), READ);
        conn.fill().await.expect("reads");
        assert_eq!(conn.inb.len(), READ + READ * 4);
    }

    /// The room that one long statement took is not kept for the session's life.
    #[tokio::test]
    async fn much_room_is_given_back_once_it_is_empty() {
        let (mut far, near) = tokio::io::duplex(8 << 20);
        let mut conn = Conn::new(near, BytesMut::new());
        conn.out.extend_from_slice(&vec![b'x'; 4 << 20]);
        conn.flush().await.expect("writes");
        assert!(conn.out.capacity() <= KEPT, "{}", conn.out.capacity());
        far.write_all(&vec![b'x'; 4 << 20]).await.expect("fits");
        while conn.inb.len() < 4 << 20 {
            conn.fill().await.expect("reads");
        }
        conn.inb.clear();
        far.write_all(b"y").await.expect("fits");
        conn.fill().await.expect("reads");
        assert!(conn.inb.capacity() <= KEPT, "{}", conn.inb.capacity());
        assert_eq!(&conn.inb[..], b"y");
    }
}
