//! A TCP line to a server that a test can cut, stall, slow down, close and watch, each direction by itself.
//!
//! Put it where Crossfade should find the server: `Link::to(cluster.port())`, then `link.port()` in the URL.

use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossfade::cluster::ports::PortLease;
use tokio::io::AsyncReadExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the one who connected to the server.
    ToServer,
    /// From the server.
    ToClient,
}

/// What happens to bytes that go one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// They pass.
    Pass,
    /// They wait, in order; the connection stays open (a server that hangs, a network that lost its way).
    Stall,
    /// They are lost for ever; the connection stays open.
    Discard,
    /// Each read waits this long before it is written.
    Delay(Duration),
}

/// What a tripwire does to the connection on which the watched bytes came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trip {
    /// Resets the connection; the bytes do not arrive.
    CutBefore,
    /// Resets the connection after the bytes were written.
    CutAfter,
    /// Stalls this way on all connections; the bytes do not arrive until the way is opened.
    StallBefore,
    /// Stalls this way on all connections, after the bytes were written.
    StallAfter,
    /// Holds these bytes, and what comes behind them on this connection, until [`Link::release`]. Others go on.
    HoldBefore,
}

struct Tripwire {
    number: u64,
    /// Only on a connection to whose server these bytes went before.
    behind: Option<Vec<u8>>,
    way: Way,
    pattern: Vec<u8>,
    trip: Trip,
    struck: oneshot::Sender<()>,
}

struct Shared {
    server_port: AtomicU16,
    to_server: watch::Sender<Flow>,
    to_client: watch::Sender<Flow>,
    /// Counts the cuts: a connection ends when it changes.
    cuts: watch::Sender<u64>,
    /// Counts the releases: what is held goes on when it changes.
    releases: watch::Sender<u64>,
    /// So many connections were there.
    connections: AtomicU64,
    /// What connections before this one send waits.
    frozen: watch::Sender<u64>,
    tripwire: Mutex<Option<Tripwire>>,
    /// So many were there.
    tripwires: AtomicU64,
}

impl Shared {
    fn flow(&self, way: Way) -> &watch::Sender<Flow> {
        match way {
            Way::ToServer => &self.to_server,
            Way::ToClient => &self.to_client,
        }
    }
}

/// The line. Dropping it cuts it.
pub struct Link {
    lease: PortLease,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

impl Link {
    /// Listens on a port of its own and forwards to a server on 127.0.0.1.
    pub async fn to(server_port: u16) -> Link {
        let shared = Shared {
            server_port: AtomicU16::new(server_port),
            to_server: watch::Sender::new(Flow::Pass),
            to_client: watch::Sender::new(Flow::Pass),
            cuts: watch::Sender::new(0),
            releases: watch::Sender::new(0),
            connections: AtomicU64::new(0),
            frozen: watch::Sender::new(0),
            tripwire: Mutex::new(None),
            tripwires: AtomicU64::new(0),
        };
        let lease = PortLease::take().expect("a free port for the link");
        let mut link = Link { lease, shared: Arc::new(shared), listening: None };
        link.accept().await;
        link
    }

    /// Where to connect, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.lease.port()
    }

    /// What happens to bytes that go this way from now on, on present and later connections.
    pub fn set(&self, way: Way, flow: Flow) {
        self.shared.flow(way).send_replace(flow);
    }

    /// The same both ways.
    pub fn set_both(&self, flow: Flow) {
        self.set(Way::ToServer, flow);
        self.set(Way::ToClient, flow);
    }

    /// New connections go to another server from now on; present ones are reset.
    pub fn turn_to(&self, server_port: u16) {
        self.shared.server_port.store(server_port, Ordering::Relaxed);
        self.cut();
    }

    /// Resets every connection.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// New connections are refused from now on; present ones go on.
    pub async fn refuse(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
            drop(listening.await);
        }
    }

    /// New connections are accepted again.
    pub async fn accept(&mut self) {
        if self.listening.is_some() {
            return;
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, self.port())).await.expect("the leased port is free");
        let shared = self.shared.clone();
        self.listening = Some(tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                tokio::spawn(carry(client, shared.clone()));
            }
        }));
    }

    /// Waits once for bytes that go by (also split over two reads), and strikes. The answer comes when it has struck.
    pub fn trip(&self, way: Way, pattern: &[u8], trip: Trip) -> oneshot::Receiver<()> {
        self.arm(None, way, pattern, trip)
    }

    /// The same, on a connection to whose server the bytes `behind` went before, and only behind them.
    pub fn trip_behind(&self, behind: &[u8], way: Way, pattern: &[u8], trip: Trip) -> oneshot::Receiver<()> {
        self.arm(Some(behind.to_owned()), way, pattern, trip)
    }

    /// What is held goes on its way.
    pub fn release(&self) {
        self.shared.releases.send_modify(|releases| *releases += 1);
    }

    /// What present connections send waits until [`Link::thaw`], also their end; others go on. Who is killed meanwhile has sent it all the same.
    pub fn freeze(&self) {
        self.shared.frozen.send_replace(self.shared.connections.load(Ordering::Relaxed));
    }

    /// What was frozen goes on its way.
    pub fn thaw(&self) {
        self.shared.frozen.send_replace(0);
    }

    fn arm(&self, behind: Option<Vec<u8>>, way: Way, pattern: &[u8], trip: Trip) -> oneshot::Receiver<()> {
        let (struck, answer) = oneshot::channel();
        let number = self.shared.tripwires.fetch_add(1, Ordering::Relaxed) + 1;
        let tripwire = Tripwire { number, behind, way, pattern: pattern.to_owned(), trip, struck };
        *self.shared.tripwire.lock().expect("no panic under the lock") = Some(tripwire);
        answer
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
        }
        self.cut();
    }
}

async fn carry(client: TcpStream, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    let number = shared.connections.fetch_add(1, Ordering::Relaxed);
    let port = shared.server_port.load(Ordering::Relaxed);
    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else {
        reset_on_close(&client);
        return;
    };
    for stream in [&client, &server] {
        drop(stream.set_nodelay(true));
    }
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    // The tripwire for which `behind` has gone by here.
    let armed = AtomicU64::new(0);
    let both = async {
        tokio::try_join!(
            pump(from_client, &to_server, Way::ToServer, &shared, (number, &armed)),
            pump(from_server, &to_client, Way::ToClient, &shared, (number, &armed))
        )
    };
    let cut = tokio::select! {
        ended = both => ended.is_err(),
        _ = cuts.changed() => true,
    };
    if cut {
        reset_on_close(to_client.as_ref());
        reset_on_close(to_server.as_ref());
    }
}

/// Closing a socket that lingers for no time sends RST, as a crashed host's would.
fn reset_on_close(stream: &TcpStream) {
    drop(socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)));
}

/// Carries one way until the end of the stream; an error means that the connection is to be reset.
async fn pump(
    mut from: OwnedReadHalf,
    to: &OwnedWriteHalf,
    way: Way,
    shared: &Shared,
    (number, armed): (u64, &AtomicU64),
) -> io::Result<()> {
    let mut frozen = shared.frozen.subscribe();
    let mut releases = shared.releases.subscribe();
    let mut flow = shared.flow(way).subscribe();
    let mut buffer = vec![0; 64 * 1024];
    let mut seen = Vec::new();
    loop {
        let length = from.read(&mut buffer).await?;
        if way == Way::ToServer {
            // A link that is gone holds nothing.
            drop(frozen.wait_for(|frozen| number >= *frozen).await);
        }
        if length == 0 {
            return socket2::SockRef::from(to.as_ref()).shutdown(std::net::Shutdown::Write);
        }
        let bytes = &buffer[..length];
        releases.mark_unchanged();
        let struck = strike(shared, way, &mut seen, bytes, armed);
        match struck {
            // A link that is gone holds nothing.
            Some(Trip::HoldBefore) => drop(releases.changed().await),
            Some(Trip::CutBefore) => return Err(io::ErrorKind::ConnectionReset.into()),
            _ => {}
        }
        if passes(&mut flow).await {
            write_all(to, bytes).await?;
        }
        match struck {
            Some(Trip::CutAfter) => return Err(io::ErrorKind::ConnectionReset.into()),
            Some(Trip::StallAfter) => drop(shared.flow(way).send_replace(Flow::Stall)),
            _ => {}
        }
    }
}

/// Waits until bytes may go on; false: they are lost.
async fn passes(flow: &mut watch::Receiver<Flow>) -> bool {
    loop {
        let now = *flow.borrow_and_update();
        match now {
            Flow::Pass => return true,
            Flow::Discard => return false,
            Flow::Delay(delay) => {
                tokio::time::sleep(delay).await;
                return true;
            }
            Flow::Stall => {
                if flow.changed().await.is_err() {
                    return false;
                }
            }
        }
    }
}

async fn write_all(to: &OwnedWriteHalf, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.as_ref().writable().await?;
        match to.as_ref().try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Looks for the tripwire's pattern in what came by on this connection; takes the wire down when it strikes.
fn strike(shared: &Shared, way: Way, seen: &mut Vec<u8>, bytes: &[u8], armed: &AtomicU64) -> Option<Trip> {
    let mut tripwire = shared.tripwire.lock().expect("no panic under the lock");
    let Some(wire) = tripwire.as_ref() else {
        seen.clear();
        return None;
    };
    seen.extend_from_slice(bytes);
    if let Some(behind) = wire.behind.as_ref().filter(|_| armed.load(Ordering::Relaxed) != wire.number) {
        match find(seen, behind) {
            Some(at) if way == Way::ToServer => {
                armed.store(wire.number, Ordering::Relaxed);
                seen.drain(..at + behind.len());
            }
            // What might be the beginning stays.
            _ => {
                seen.drain(..seen.len().saturating_sub(behind.len() - 1));
                return None;
            }
        }
    }
    if way != wire.way {
        seen.clear();
        return None;
    }
    if find(seen, &wire.pattern).is_some() {
        seen.clear();
        let wire = tripwire.take()?;
        // Before the answer: whoever has it may open the way again at once.
        if wire.trip == Trip::StallBefore {
            shared.flow(way).send_replace(Flow::Stall);
        }
        // Nobody may be waiting for it.
        let _ = wire.struck.send(());
        return Some(wire.trip);
    }
    // What might be the pattern's beginning stays.
    seen.drain(..seen.len().saturating_sub(wire.pattern.len() - 1));
    None
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}
