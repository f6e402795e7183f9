//! One socket of a client or a server, whatever it runs over.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{client, server};

/// A connected byte stream.
pub enum Stream {
    /// TCP in the clear.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// TLS over TCP in which we are the server: a client's connection.
    TlsServer(Box<server::TlsStream<TcpStream>>),
    /// TLS over TCP in which we are the client: a connection to PostgreSQL.
    TlsClient(Box<client::TlsStream<TcpStream>>),
}

/// No delay for small packets, and keepalives: a peer whose host died is noticed after about a minute.
///
/// TCP_USER_TIMEOUT is not set here: Linux also counts time in which a living peer does not read (a client that looks
/// at half a result, a COPY that waits for a lock), and would break such a connection. See `Stream::set_user_timeout`.
pub fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(10)).with_retries(3);
    SockRef::from(tcp).set_tcp_keepalive(&keepalive)
}

impl Stream {
    /// The TCP socket, where there is one.
    pub fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Stream::Tcp(tcp) => Some(tcp),
            Stream::Unix(_) => None,
            Stream::TlsServer(tls) => Some(tls.get_ref().0),
            Stream::TlsClient(tls) => Some(tls.get_ref().0),
        }
    }

    /// Ready once the socket has something to read, or has ended. Says nothing of what TLS has read from it already.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Tcp(tcp) => tcp.poll_read_ready(cx),
            Stream::Unix(unix) => unix.poll_read_ready(cx),
            Stream::TlsServer(tls) => tls.get_ref().0.poll_read_ready(cx),
            Stream::TlsClient(tls) => tls.get_ref().0.poll_read_ready(cx),
        }
    }

    /// Is it encrypted?
    pub fn is_tls(&self) -> bool {
        matches!(self, Stream::TlsServer(_) | Stream::TlsClient(_))
    }

    /// Breaks the connection when sent bytes stay unacknowledged, or the peer takes none, for so long
    /// (TCP_USER_TIMEOUT). For sessions whose waits are bounded anyway, such as the mirror's; a no-op on a Unix socket.
    pub fn set_user_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self.tcp() {
            Some(tcp) => SockRef::from(tcp).set_tcp_user_timeout(Some(timeout)),
            None => Ok(()),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(inner) => Pin::new(inner).poll_read(cx, buf),
            Stream::Unix(inner) => Pin::new(inner).poll_read(cx, buf),
            Stream::TlsServer(inner) => Pin::new(inner).poll_read(cx, buf),
            Stream::TlsClient(inner) => Pin::new(inner).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(inner) => Pin::new(inner).poll_write(cx, buf),
            Stream::Unix(inner) => Pin::new(inner).poll_write(cx, buf),
            Stream::TlsServer(inner) => Pin::new(inner).poll_write(cx, buf),
            Stream::TlsClient(inner) => Pin::new(inner).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(inner) => Pin::new(inner).poll_flush(cx),
            Stream::Unix(inner) => Pin::new(inner).poll_flush(cx),
            Stream::TlsServer(inner) => Pin::new(inner).poll_flush(cx),
            Stream::TlsClient(inner) => Pin::new(inner).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(inner) => Pin::new(inner).poll_shutdown(cx),
            Stream::Unix(inner) => Pin::new(inner).poll_shutdown(cx),
            Stream::TlsServer(inner) => Pin::new(inner).poll_shutdown(cx),
            Stream::TlsClient(inner) => Pin::new(inner).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(inner) => Pin::new(inner).poll_write_vectored(cx, bufs),
            Stream::Unix(inner) => Pin::new(inner).poll_write_vectored(cx, bufs),
            Stream::TlsServer(inner) => Pin::new(inner).poll_write_vectored(cx, bufs),
            Stream::TlsClient(inner) => Pin::new(inner).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Tcp(inner) => inner.is_write_vectored(),
            Stream::Unix(inner) => inner.is_write_vectored(),
            Stream::TlsServer(inner) => inner.is_write_vectored(),
            Stream::TlsClient(inner) => inner.is_write_vectored(),
        }
    }
}
