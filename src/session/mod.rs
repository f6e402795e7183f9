//! A client's session: its frames go to the authority, the authority's replies come back. In a mirrored phase its writes are captured on the
//! way and carried to the mirror at COMMIT.
//!
//! The life of a statement: `relay` takes the client's frames, `mirrored` plans them, `reply` matches each answer of the server with what was asked
//! and cuts images out, `commit` settles a transaction on both sides, `carry` moves a session to another authority.
//! Nothing here reads a catalog or opens a transaction on the mirror by itself: that is `mirror`.

mod acknowledge;
mod ahead;
mod answer;
mod audit;
mod books;
mod both;
mod carry;
mod commit;
mod copy;
mod copy_rows;
mod copy_stream;
mod define;
mod enter;
pub mod expect;
mod follow;
mod implicit;
mod lazy;
mod legs;
mod mirrored;
mod moved;
mod named;
mod point;
mod prove;
mod reading;
mod relay;
mod reply;
mod sampled;
mod served;
mod simple;
mod split_commit;
mod turn;

use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tracing::{debug, warn};

use self::books::{Portal, Prepared};
use self::expect::Queue;
use crate::auth::client::Login;
use crate::backend::connect::Address;
use crate::mirror::flight::Debts;
use crate::mirror::pool::Lease;
use crate::mirror::writes::Writes;
use crate::phase::Side;
use crate::shared::{Shared, Worker, World};
use crate::switch::bell::Bell;
use crate::switch::gate::Pass;
use crate::wire::conn::Conn;
use crate::wire::frame::{self, Report};
use crate::wire::stream::Stream;

/// How a session ended.
#[derive(Debug)]
pub enum End {
    /// The client said goodbye, or closed its connection.
    Client,
    /// The client's connection broke, or it sent what is no message.
    ClientBroke(String),
    /// The server closed its connection (after a FATAL error that was passed on).
    Server,
    /// The server's connection broke.
    ServerBroke(String),
    /// A reply that answers nothing that was asked. Nothing more may be passed on.
    Mismatch(String),
    /// We end it, and say why.
    Refused(Report),
    /// No end: the epoch is over, and what the client has sent since its transaction began is worked through again in the next one (`enter`).
    Overtaken,
}

/// What was kept of the replies to our own messages.
#[derive(Debug, Default)]
struct Kept {
    rows: Vec<Vec<Option<Bytes>>>,
    /// The last command tag, the client's or ours, with its NUL.
    tag: Bytes,
    /// A whole ErrorResponse frame.
    error: Option<Bytes>,
    /// What the rows hold; past `limits.mirror_buffer` no more are kept.
    bytes: usize,
    /// The last ParameterDescription, its payload.
    types: Bytes,
}

/// The end of a statement that waits for the outcome of its transaction.
#[derive(Debug, Default)]
struct Held {
    /// A whole CommandComplete frame.
    complete: Option<Bytes>,
    /// An error was passed on instead.
    failed: bool,
}

/// What carries this transaction's images.
enum Carry {
    /// Nothing was sent to the mirror yet.
    Nothing,
    /// Images were sent ahead of COMMIT, in the transaction of this session on the mirror.
    Ahead(Box<Lease>),
    /// The mirror's transaction was given up, for this reason.
    GivenUp(&'static str),
}

/// Why a session takes no part in the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aside {
    /// It is logged in to another database of old.
    OtherDatabase,
    /// It is a replication connection; served in phase old only.
    Replication,
}

/// The startup packet asks for a replication connection.
pub fn replicates(parameters: &[(Bytes, Bytes)]) -> bool {
    let value = parameters.iter().find(|(name, _)| &name[..] == b"replication").map(|(_, value)| value);
    value.is_some_and(|value| !matches!(&value[..], b"false" | b"off" | b"no" | b"0"))
}

/// A client's session.
pub struct Session {
    worker: Rc<Worker>,
    shared: Arc<Shared>,
    client: Conn<Stream>,
    server: Conn<Stream>,
    side: Side,
    login: Login,
    parameters: Vec<(Bytes, Bytes)>,
    minor: u16,
    address: Address,
    /// The server session is entered among those of this proxy.
    known: bool,
    /// Where the transaction stands in its epoch.
    entry: enter::Entry,
    /// The client's frames since the epoch's lock was asked for, for when they must be worked through again.
    again: BytesMut,
    /// All of them are there.
    again_whole: bool,
    /// For which the lock's statements are prepared.
    entry_epoch: u64,
    /// The client has bound or executed something since the last Sync, outside any block.
    bound: bool,
    /// What BackendKeyData told the client.
    cancel_key: Option<Bytes>,
    queue: Queue,
    /// Of the last ReadyForQuery: I, T or E.
    status: u8,
    /// BEGIN was sent since.
    begun: bool,
    /// The open block is ours: the client knows of none.
    ours: bool,
    /// Messages of the extended protocol were sent since the last Sync.
    unsynced: bool,
    pass: Option<Pass>,
    world: Arc<World>,
    aside: Option<Aside>,
    bell: Rc<Bell>,
    /// The bell has rung, and the session was not yet free to look up.
    called: bool,
    /// Bytes of a large frame still to be passed on as they come.
    from_client: usize,
    from_server: usize,
    /// The client has sent a frame of this size, which must be here whole.
    needed: usize,
    prepared: HashMap<Bytes, Prepared>,
    /// What the client has prepared in SQL.
    named: named::NamedStatements,
    portals: HashMap<Bytes, Portal>,
    /// Portals so far.
    portal_count: u64,
    /// Captured writes of which rows, and so images, are still to be fetched: by the portal's number.
    suspended: HashMap<u64, std::rc::Rc<expect::Cut>>,
    writes: Writes,
    debts: Option<Debts>,
    /// The transaction has an opaque statement.
    audit: Option<audit::Audit>,
    /// Debts registered for statements that ran outside any block of ours, to be released when the session is at rest.
    registered: Vec<i64>,
    carry: Carry,
    /// The client has changed definitions in this generation of them.
    outdated: Option<u64>,
    /// A COPY of the client whose rows are captured.
    copying: Option<copy::Copying>,
    kept: Kept,
    held: Held,
    /// The server has said FATAL: it ends the session, and has said why.
    dismissed: bool,
    /// Our own statements that the server session has prepared.
    ours_prepared: Vec<&'static [u8]>,
    settings: books::Settings,
    holding: Option<carry::Holding>,
    /// Logged in where the authority is about to be.
    ahead: Option<ahead::Ahead>,
    sampling: sampled::Sampling,
    serving: served::Serving,
    legs: legs::Legs,
    since: Option<Instant>,
    limit: usize,
}

/// After so long without a message from its client a session gives its buffers back.
const IDLE: std::time::Duration = std::time::Duration::from_secs(1);

impl Session {
    /// A session whose client has logged in, on its way to a first authority. Nothing was sent to the client since its login.
    pub async fn open(
        worker: Rc<Worker>,
        startup: crate::wire::startup::Startup,
        login: Login,
    ) -> Result<Session, (Box<crate::wire::startup::Startup>, Report)> {
        let shared = worker.shared.clone();
        let aside = if replicates(&startup.parameters) {
            Some(Aside::Replication)
        } else {
            let migrates = login.database == shared.config.load().old.database.as_bytes();
            (!migrates).then_some(Aside::OtherDatabase)
        };
        // Another database has no part in any phase: for it, it is phase old for ever.
        let world = if aside.is_some() { Arc::new(World::default()) } else { shared.world.load_full() };
        let side = world.phase.authority();
        let connected = match carry::connect(&shared, side, &login, &startup.parameters, startup.minor).await {
            Ok(connected) => connected,
            Err(report) => return Err((Box::new(startup), report)),
        };
        let mut client = Conn::new(startup.stream, startup.buf);
        frame::put(&mut client.out, b'R', |out| bytes::BufMut::put_u32(out, 0));
        let limit = shared.config.load().limits.client_buffer;
        let mut session = Session {
            client,
            server: Conn::new(connected.stream, connected.buf),
            side,
            login,
            parameters: startup.parameters,
            minor: startup.minor,
            address: connected.address,
            known: false,
            entry: enter::Entry::default(),
            again: BytesMut::new(),
            again_whole: false,
            entry_epoch: 0,
            bound: false,
            cancel_key: None,
            queue: Queue::default(),
            status: b'I',
            begun: false,
            ours: false,
            unsynced: false,
            pass: None,
            world,
            aside,
            bell: worker.bells.hang(),
            // Whatever has changed since `world` was read.
            called: true,
            from_client: 0,
            from_server: 0,
            needed: 0,
            prepared: HashMap::new(),
            named: Default::default(),
            portals: HashMap::new(),
            portal_count: 0,
            suspended: HashMap::new(),
            writes: Writes::default(),
            debts: None,
            audit: None,
            registered: Vec::new(),
            carry: Carry::Nothing,
            outdated: None,
            copying: None,
            kept: Kept::default(),
            held: Held::default(),
            dismissed: false,
            ours_prepared: Vec::new(),
            settings: books::Settings::default(),
            holding: None,
            ahead: None,
            sampling: sampled::Sampling::new(),
            serving: served::Serving::new(),
            legs: legs::Legs::default(),
            since: None,
            limit,
            shared,
            worker,
        };
        session.shared.metrics.servers(side).inc();
        // The server's greeting (parameters, key, ReadyForQuery) is the answer to a Sync that was never sent.
        session.queue.push(expect::Expected::client(expect::Kind::Sync));
        Ok(session)
    }

    /// Serves the client to the end.
    pub async fn run(mut self) {
        let end = self.serve().await.unwrap_or_else(|end| end);
        self.finish(end).await;
    }

    /// The role's name, for logs.
    fn user(&self) -> String {
        String::from_utf8_lossy(&self.login.user).into_owned()
    }

    async fn serve(&mut self) -> Result<End, End> {
        loop {
            self.replies()?;
            if self.entry.is_over() {
                self.once_more().await?;
            }
            self.spill_if_full().await;
            self.release_registered().await?;
            self.rest();
            self.count_holding();
            self.called |= self.bell.take();
            let free = self.queue.is_empty() || self.aside == Some(Aside::Replication);
            if self.called && self.pass.is_none() && free {
                self.called = false;
                self.look_up().await?;
            }
            if !self.requests().await? {
                // What it sent before it closed is carried out and answered, as PostgreSQL does: it may still read. Half a message has no answer.
                let answered = !self.crowded() && !self.queue.gets_ready();
                if self.client.closed && (answered || self.from_client > 0) {
                    return Ok(End::Client);
                }
                self.wait().await?;
            }
        }
    }

    /// Waits for bytes. A session whose client has sent nothing for a while keeps no buffers: there may be thousands of them.
    async fn wait(&mut self) -> Result<(), End> {
        if !(self.queue.is_empty() && self.client.is_empty() && self.server.is_empty()) || self.client.closed {
            return self.drive().await;
        }
        let clock = self.worker.clock.clone();
        if let Ok(moved) = clock.limit(IDLE, self.drive()).await {
            return moved;
        }
        self.client.shrink();
        self.server.shrink();
        std::future::poll_fn(|cx| {
            let readable = self.client.poll_readable(cx).is_ready() | self.server.poll_readable(cx).is_ready();
            let rung = self.bell.hear(cx);
            self.called |= rung;
            if readable | rung { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        Ok(())
    }

    /// Between transactions: the phase may move.
    fn rest(&mut self) {
        if self.pass.is_some() && self.at_rest() {
            self.come_home();
            self.pass = None;
            if self.has_sample() {
                self.hand_over();
            }
        }
    }

    /// No transaction is open and nothing is under way.
    fn at_rest(&self) -> bool {
        self.queue.is_empty() && self.status == b'I' && !self.unsynced && !self.begun && !self.ours
    }

    /// Between transactions, called: the phase has moved, or the proxy ends. Whoever has no reason to wait for its client's next message moves now,
    /// so that the old authority may be stopped, and a session that cannot move hears of it.
    async fn look_up(&mut self) -> Result<(), End> {
        if self.shared.gate.is_shut() {
            return Err(ending());
        }
        if self.aside == Some(Aside::Replication) {
            return self.may_replicate();
        }
        if self.aside.is_none() && self.shared.world.load().phase.authority() != self.side {
            self.begin().await?;
            self.rest();
        }
        if self.aside.is_none() && self.at_rest() {
            self.look_ahead().await?;
        }
        Ok(())
    }

    /// A replication connection reads one side's log, and may write around the plan.
    fn may_replicate(&self) -> Result<(), End> {
        let phase = self.shared.world.load().phase;
        if phase == crate::phase::Phase::Old {
            return Ok(());
        }
        Err(End::Refused(Report::fatal(
            "57P01",
            format!("terminating connection: replication connections are not served in phase {phase}"),
            "Connect to the database directly for replication; crossfade passes it on in phase old only.",
        )))
    }

    /// Moves bytes both ways until some came in, a full buffer has emptied, or the bell has rung: for each ring once, since in the middle of a statement
    /// nobody answers it.
    async fn drive(&mut self) -> Result<(), End> {
        let limit = self.limit;
        let Session { client, server, needed, bell, called, .. } = self;
        std::future::poll_fn(|cx| {
            let crowded = client.out.len() >= limit || server.out.len() >= limit;
            if let Poll::Ready(Err(error)) = client.poll_flush(cx) {
                return Poll::Ready(Err(End::ClientBroke(error.to_string())));
            }
            if let Poll::Ready(Err(error)) = server.poll_flush(cx) {
                // It may have said why before it closed: that is read first.
                debug!(%error, "cannot write to the server");
                server.out.clear();
            }
            let mut moved = crowded && client.out.len() < limit && server.out.len() < limit;
            if client.out.len() < limit {
                match server.poll_fill(cx) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(End::Server)),
                    Poll::Ready(Ok(_)) => moved = true,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(End::ServerBroke(error.to_string()))),
                    Poll::Pending => {}
                }
            }
            if server.out.len() < limit && (client.inb.len() < limit || client.inb.len() < *needed) {
                match client.poll_fill(cx) {
                    Poll::Ready(Ok(_)) => moved = true,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(End::ClientBroke(error.to_string()))),
                    Poll::Pending => {}
                }
            }
            let rung = bell.hear(cx);
            *called |= rung;
            if moved || rung { Poll::Ready(Ok(())) } else { Poll::Pending }
        })
        .await
    }

    /// Waits until the server has answered all that was sent to it. The client's further messages wait meanwhile.
    async fn settle(&mut self) -> Result<(), End> {
        if !self.queue.is_empty() {
            self.replies()?;
        }
        if self.queue.needs_flush() {
            frame::flush(&mut self.server.out);
        }
        while !self.queue.is_empty() {
            if self.queue.copying() {
                self.copy_data().await?;
            } else {
                self.drive_server().await?;
            }
            self.replies()?;
            self.spill_if_full().await;
        }
        self.copy_rest().await?;
        if self.entry.is_over() { Err(End::Overtaken) } else { Ok(()) }
    }

    /// Images do not pile up beyond `limits.mirror_buffer`.
    async fn spill_if_full(&mut self) {
        if self.writes.bytes > self.shared.config.load().limits.mirror_buffer {
            self.send_ahead().await;
        }
    }

    /// Like `drive`, without reading from the client: a client that has gone does not undo what it asked for.
    async fn drive_server(&mut self) -> Result<(), End> {
        let limit = self.limit;
        let Session { client, server, .. } = self;
        std::future::poll_fn(|cx| {
            let crowded = client.out.len() >= limit;
            if let Poll::Ready(Err(_)) = client.poll_flush(cx) {
                client.out.clear();
                client.closed = true;
            }
            if let Poll::Ready(Err(error)) = server.poll_flush(cx) {
                debug!(%error, "cannot write to the server");
                server.out.clear();
            }
            if client.out.len() < limit {
                match server.poll_fill(cx) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(End::Server)),
                    Poll::Ready(Ok(_)) => return Poll::Ready(Ok(())),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(End::ServerBroke(error.to_string()))),
                    Poll::Pending => {}
                }
            }
            if crowded && client.out.len() < limit { Poll::Ready(Ok(())) } else { Poll::Pending }
        })
        .await
    }

    async fn finish(mut self, end: End) {
        let user = self.user();
        let side = self.side;
        let report = match end {
            End::Client => {
                frame::terminate(&mut self.server.out);
                let _ = tokio::time::timeout(std::time::Duration::from_secs(1), self.server.flush()).await;
                None
            }
            End::ClientBroke(error) => {
                debug!(%user, %error, "client's connection broke");
                None
            }
            End::Server => {
                // A last ErrorResponse may still be in the buffer: `replies` has passed on whatever was whole.
                let _ = self.replies();
                // A stream of changes ends so.
                (self.aside.is_none() && !self.dismissed && self.from_server == 0)
                    .then(|| broken(side, "it was closed without a word"))
            }
            End::ServerBroke(error) => {
                // A server that leaves messages unread behind its FATAL resets the connection.
                let _ = self.replies();
                warn!(%user, %side, %error, "server's connection broke");
                // In the middle of a message the client would take it for a part of that.
                (!self.dismissed && self.from_server == 0).then(|| broken(side, &error))
            }
            End::Mismatch(what) => {
                warn!(%user, %side, %what, "a reply that answers nothing that was asked; the session ends");
                Some(Report::fatal(
                    "08P01",
                    format!("the {side} database sent a reply that answers nothing that was asked ({what})"),
                    "Connect again, and report this: it is a defect of crossfade or of the server.",
                ))
            }
            End::Refused(report) => Some(report),
            End::Overtaken => Some(enter::overtaken()),
        };
        if let Some(report) = report {
            report.put(&mut self.client.out);
        }
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), self.client.flush()).await;
        self.shared.metrics.servers(side).dec();
        self.leave_other().await;
        if let Some(key) = &self.cancel_key {
            self.shared.cancels.remove(key);
        }
    }
}

/// The proxy ends: what PostgreSQL says in that case.
fn ending() -> End {
    End::Refused(Report::fatal(
        "57P01",
        "terminating connection due to administrator command",
        "crossfade is being stopped; connect again.",
    ))
}

/// The server is gone, and has not said why.
fn broken(side: Side, error: &str) -> Report {
    Report::fatal(
        "08006",
        format!("the connection to the {side} database broke: {error}"),
        "Connect again; whether a COMMIT that was under way took place must be looked up, as without a proxy.",
    )
}

/// A whole frame with this tag and payload.
fn whole(tag: u8, payload: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(payload.len() + frame::HEAD);
    frame::put(&mut out, tag, |out| out.extend_from_slice(payload));
    out
}

impl From<frame::Malformed> for End {
    fn from(error: frame::Malformed) -> End {
        End::Refused(Report { severity: "FATAL", code: "08P01", message: error.to_string(), hint: None })
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> End {
        End::ServerBroke(error.to_string())
    }
}
