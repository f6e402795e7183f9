//! The second server session of a client, where some tables stay on old for ever and new is the authority of the others (`World::splits`).
//!
//! One of the two is in use (`Session::server`, with all that belongs to it), the other waits here. They change places when all that was asked of the one
//! in use was answered, and change back when the session is at rest: between transactions the one on new is in use. `turn` says when to change,
//! `both` ends a block that is open on both.

use std::collections::HashMap;
use std::task::Poll;

use bytes::Bytes;
use tracing::{debug, warn};

use super::books::{Portal, Prepared, There};
use super::carry::{self, literal};
use super::turn::is_of_block;
use super::{End, Session};
use crate::backend::connect::Address;
use crate::catalog::Sides;
use crate::phase::Side;
use crate::shared::PAIR_CLASS;
use crate::sql::facts::Verb;
use crate::wire::conn::Conn;
use crate::wire::frame::{self, Report};
use crate::wire::stream::Stream;

/// Settings that the session has made, and those of which clients are told (ParameterStatus), whoever made them: rows must look the same from both sides.
const SETTINGS: &[u8] = b"SELECT name, setting FROM pg_catalog.pg_settings WHERE context IN ('user', 'superuser') AND (source = 'session' \
    OR name IN ('DateStyle', 'TimeZone', 'IntervalStyle', 'client_encoding', 'standard_conforming_strings', 'search_path', 'bytea_output', 'extra_float_digits')) \
    AND name NOT IN ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable', 'session_authorization', 'role', 'is_superuser')";

/// More savepoints than this are not made again on the other side.
const SAVEPOINTS_MAX: usize = 1000;

/// A server session that is not in use.
pub(super) struct Leg {
    pub(super) server: Conn<Stream>,
    pub(super) side: Side,
    address: Address,
    /// Its BackendKeyData.
    key: Bytes,
    /// Of its last ReadyForQuery.
    pub(super) status: u8,
    pub(super) prepared: HashMap<Bytes, Prepared>,
    portals: HashMap<Bytes, Portal>,
    ours_prepared: Vec<&'static [u8]>,
}

/// The client's block, as it must be opened on the other side, too.
#[derive(Debug, Default)]
pub(super) struct Block {
    /// The text of BEGIN. None: nobody has read it.
    pub(super) begin: Option<Bytes>,
    /// SET TRANSACTION.
    modes: Vec<Bytes>,
    /// Its savepoints: name and text.
    savepoints: Vec<(String, Bytes)>,
    /// Anything else has run in it.
    pub(super) touched: bool,
}

impl Block {
    /// One more statement has run in it.
    fn note(&mut self, verb: &Verb, text: &Bytes) {
        match verb {
            Verb::SetTransaction => self.modes.push(text.clone()),
            Verb::Savepoint(name) => self.savepoints.push((name.clone(), text.clone())),
            Verb::Release(name) => {
                if let Some(at) = self.savepoints.iter().rposition(|(known, _)| known == name) {
                    self.savepoints.truncate(at);
                }
            }
            Verb::RollbackTo(name) => {
                if let Some(at) = self.savepoints.iter().rposition(|(known, _)| known == name) {
                    self.savepoints.truncate(at + 1);
                }
            }
            _ => self.touched = true,
        }
    }

    /// What opens it on another server session, with `mark` outside its savepoints; None: that is not known.
    fn text(&self, mark: Option<String>) -> Option<Bytes> {
        let begin = self.begin.as_ref().filter(|_| self.savepoints.len() <= SAVEPOINTS_MAX)?;
        let mark = mark.map(Bytes::from);
        let savepoints = self.savepoints.iter().map(|(_, text)| text);
        let texts: Vec<&[u8]> =
            [begin].into_iter().chain(&self.modes).chain(&mark).chain(savepoints).map(|text| &text[..]).collect();
        // Whatever a text ends with: a comment, a semicolon.
        Some(texts.join(&b"\n;"[..]).into())
    }

    /// AND CHAIN: another one with the same modes.
    pub(super) fn again(&self) -> Block {
        Block { begin: self.begin.clone(), ..Block::default() }
    }
}

/// A portal of the client, on whatever side.
pub(super) struct Placed {
    pub(super) side: Side,
    pub(super) verb: Verb,
    pub(super) text: Bytes,
}

/// What a session knows of its two server sessions.
#[derive(Default)]
pub(super) struct Legs {
    /// The one that is not in use. None: there is only one.
    pub(super) other: Option<Box<Leg>>,
    /// The client's block, as far as it was answered.
    pub(super) block: Option<Block>,
    /// Statements that were sent since: they count when the status behind them is known.
    pub(super) sent: Vec<(Verb, Bytes)>,
    /// Something has run since the last Sync outside any block: Sync would commit it.
    pub(super) ran: bool,
    /// The settings of the session on old are no longer those of the one on new.
    pub(super) stale: bool,
    /// They were brought over, or altered, in the block that is open: whatever ends it may undo that.
    unsettled: bool,
    pub(super) portals: HashMap<Bytes, Placed>,
    /// Prepared statements that the client has closed while the other one was in use: the server still has them.
    pub(super) closed: Sides<Vec<Bytes>>,
    /// What SQL's PREPARE has made on old: name and text.
    pub(super) named: Vec<(String, Bytes)>,
    /// Cursors that were declared on old in this block.
    pub(super) cursors: Vec<String>,
    /// That of old, since the session there began. None: schema crossfade is not installed there.
    pub(super) incarnation: Option<Bytes>,
    /// Where a sequence was last drawn from, for lastval().
    pub(super) drawn_on_old: bool,
}

impl Legs {
    /// A statement is about to be sent. Of a run of those that are not about the block itself one says as much as all.
    pub(super) fn note_sending(&mut self, verb: &Verb, text: &Bytes) {
        let counts = |verb: &Verb| matches!(verb, Verb::Begin { .. }) || is_of_block(verb);
        if counts(verb) {
            self.sent.push((verb.clone(), text.clone()));
        } else if self.sent.last().is_none_or(|(last, _)| counts(last)) {
            self.sent.push((Verb::Other, Bytes::new()));
        }
    }

    /// Something that may alter settings runs on new.
    pub(super) fn alters(&mut self) {
        self.stale = true;
        self.unsettled = true;
    }
}

impl Session {
    /// The session on old is in use, although new is the authority.
    pub(super) fn is_away(&self) -> bool {
        self.legs.other.as_ref().is_some_and(|leg| leg.side == Side::New)
    }

    /// The client's block is open on both sides.
    pub(super) fn is_on_both(&self) -> bool {
        self.status != b'I' && self.legs.other.as_ref().is_some_and(|leg| leg.status != b'I')
    }

    /// The two change places. All that was asked was answered.
    pub(super) fn change_places(&mut self) {
        let Some(other) = self.legs.other.as_deref_mut() else { return };
        std::mem::swap(&mut self.server, &mut other.server);
        std::mem::swap(&mut self.side, &mut other.side);
        std::mem::swap(&mut self.address, &mut other.address);
        std::mem::swap(&mut self.status, &mut other.status);
        std::mem::swap(&mut self.prepared, &mut other.prepared);
        std::mem::swap(&mut self.portals, &mut other.portals);
        std::mem::swap(&mut self.ours_prepared, &mut other.ours_prepared);
        if let Some(client) = &self.cancel_key
            && let Some((_, _, key)) = self.shared.cancels.get(client)
        {
            let key = std::mem::replace(&mut other.key, key);
            self.shared.cancels.set(client.clone(), self.side, self.address.clone(), key);
        }
    }

    /// At rest the session on new is in use.
    pub(super) fn come_home(&mut self) {
        if self.is_away() {
            self.change_places();
        }
        if self.legs.block.take().is_some() || !self.legs.sent.is_empty() {
            self.legs.sent.clear();
        }
        self.legs.portals.clear();
        self.legs.cursors.clear();
        self.legs.stale |= std::mem::take(&mut self.legs.unsettled);
    }

    /// What was sent is answered, and the status is that behind it.
    pub(super) fn note_sent(&mut self) {
        for (verb, text) in std::mem::take(&mut self.legs.sent) {
            match verb {
                Verb::Begin { .. } => {
                    self.legs.block.get_or_insert_with(|| Block { begin: Some(text), ..Block::default() });
                }
                Verb::Commit { chain: false } | Verb::Rollback { chain: false } | Verb::PrepareTransaction => {
                    self.legs.block = None;
                }
                Verb::Commit { .. } | Verb::Rollback { .. } => {
                    self.legs.block = self.legs.block.take().map(|block| block.again());
                }
                verb => {
                    if let Some(block) = &mut self.legs.block {
                        block.note(&verb, &text);
                    }
                }
            }
        }
        if self.status == b'I' && self.legs.other.as_ref().is_none_or(|leg| leg.status == b'I') {
            self.legs.block = None;
            self.legs.cursors.clear();
            self.legs.stale |= std::mem::take(&mut self.legs.unsettled);
        } else {
            // Opened by a text that nobody has read.
            self.legs.block.get_or_insert_with(|| Block { touched: true, ..Block::default() });
        }
    }

    /// The session of that side comes into use. All was answered; the status is known. A report: it cannot, and nothing has happened.
    pub(super) async fn use_side(&mut self, side: Side) -> Result<Option<Report>, End> {
        if let Err(report) = self.have_other(side).await? {
            return Ok(Some(report));
        }
        let open = self.status == b'T' && self.legs.other.as_ref().is_some_and(|leg| leg.status == b'I');
        let mut text = Bytes::new();
        if open {
            let mark = (side == Side::Old).then(|| self.mark()).flatten();
            match self.legs.block.as_ref().and_then(|block| block.text(mark)) {
                Some(found) => text = found,
                None => return Ok(Some(unknown_block())),
            }
        }
        // A block in which nothing has run yet moves as a whole; so it is open on one side, and commits there as ever.
        if open && side == Side::Old && self.legs.block.as_ref().is_some_and(|block| !block.touched) {
            self.roll_back_ours().await?;
        }
        if side == Side::Old && self.legs.stale && self.status != b'E' {
            self.bring_settings().await?;
        }
        self.change_places();
        if open {
            self.open_here(&text).await?;
        }
        Ok(None)
    }

    /// The client's block is opened on the session in use, too.
    pub(super) async fn open_here(&mut self, text: &[u8]) -> Result<(), End> {
        self.ask_ours(text).await?;
        if self.kept.error.take().is_some() {
            return Err(lost_block(self.side));
        }
        if !self.is_away() && self.world.phase.mirror().is_some() {
            self.enter_block();
            self.sync_ours().await?;
        }
        Ok(())
    }

    /// Says on old which session on new is the same client's, to whoever looks for deadlocks, for as long as the transaction lasts.
    fn mark(&self) -> Option<String> {
        let key = self.cancel_key.as_ref().and_then(|client| self.shared.cancels.get(client))?.2;
        let pid = i32::from_be_bytes(key.get(..4)?.try_into().ok()?);
        Some(format!("SELECT pg_catalog.pg_try_advisory_xact_lock_shared({PAIR_CLASS}, {pid})"))
    }

    /// There is a session on that side, or a report of why not.
    async fn have_other(&mut self, side: Side) -> Result<Result<(), Report>, End> {
        let (status, gone) = match self.legs.other.as_deref_mut() {
            Some(leg) => (leg.status, leg.is_gone().await),
            None => (b'I', true),
        };
        if !gone {
            return Ok(Ok(()));
        }
        if status != b'I' || side == Side::New {
            return Err(End::ServerBroke("it was closed while the other side was at work".into()));
        }
        let before = self.legs.other.take();
        if before.is_some() {
            self.shared.metrics.servers(side).dec();
        }
        let prepared = before.map(|leg| leg.prepared).unwrap_or_default();
        let connected = match carry::connect(&self.shared, side, &self.login, &self.parameters, self.minor).await {
            Ok(connected) => connected,
            Err(report) => return Ok(Err(Report { severity: "ERROR", ..report })),
        };
        let mut server = Conn::new(connected.stream, connected.buf);
        let key = match carry::greeted(&mut server).await {
            Ok(key) => key,
            Err(why) => return Ok(Err(unreachable(side, &why))),
        };
        debug!(user = %self.user(), %side, "a session of its own for the tables that stay");
        self.shared.metrics.servers(side).inc();
        let prepared = prepared.into_iter().map(|(name, known)| (name, Prepared { there: There::Nothing, ..known }));
        let mut leg = Leg {
            server,
            side,
            address: connected.address,
            key,
            status: b'I',
            prepared: prepared.collect(),
            portals: HashMap::new(),
            ours_prepared: Vec::new(),
        };
        // As long as this session lives: a crash ends it. Not asked for in a client's transaction, whose snapshot may be older than the answer.
        match leg.query(b"SELECT crossfade.incarnate()").await {
            Ok(incarnation) => self.legs.incarnation = incarnation.ok().flatten(),
            Err(error) => return Ok(Err(unreachable(side, &error.to_string()))),
        }
        for (name, text) in &self.legs.named {
            match leg.query(text).await {
                Ok(Ok(_)) => {}
                Ok(Err(why)) => warn!(%side, %name, %why, "a statement of SQL PREPARE could not be prepared again"),
                Err(error) => return Ok(Err(unreachable(side, &error.to_string()))),
            }
        }
        *self.legs.closed.get_mut(side) = Vec::new();
        self.legs.other = Some(Box::new(leg));
        self.legs.stale = true;
        Ok(Ok(()))
    }

    /// The settings of the session on new, which is in use, for the one on old.
    async fn bring_settings(&mut self) -> Result<(), End> {
        if let Some(unnamed) = self.prepared.get_mut(&b""[..]) {
            // A Query takes its place.
            unnamed.there = There::Nothing;
        }
        let set = self.what_is_set(SETTINGS).await?;
        let mut text = "RESET ALL".to_owned();
        for (name, value) in &set {
            text += &match name.as_str() {
                "session_authorization" => format!("; SET SESSION AUTHORIZATION {}", literal(value)),
                "role" => format!("; SET ROLE {}", literal(value)),
                _ => format!("; SELECT pg_catalog.set_config({}, {}, false)", literal(name), literal(value)),
            };
        }
        if self.settings.role_changed && !set.iter().any(|(name, _)| name == "role") {
            text += "; RESET ROLE";
        }
        self.legs.unsettled |= self.status != b'I';
        self.legs.stale = false;
        let Some(leg) = self.legs.other.as_deref_mut() else { return Ok(()) };
        if let Some(unnamed) = leg.prepared.get_mut(&b""[..]) {
            unnamed.there = There::Nothing;
        }
        match leg.query(text.as_bytes()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(why)) => Err(End::Refused(Report::fatal(
                "58000",
                format!("this session's settings cannot be had on {}: {why}", leg.side),
                "Both databases must take the same settings; see what the session sets, and connect again.",
            ))),
            Err(error) => Err(End::ServerBroke(error.to_string())),
        }
    }

    /// The session on old ends; it comes back when it is needed.
    pub(super) async fn leave_other(&mut self) {
        let Some(mut leg) = self.legs.other.take() else { return };
        frame::terminate(&mut leg.server.out);
        let _ = tokio::time::timeout(std::time::Duration::from_secs(1), leg.server.flush()).await;
        self.shared.metrics.servers(leg.side).dec();
    }

    /// Nothing stays any more, or old is the authority again: what was prepared on the second session is the first one's. It has state that cannot move: the
    /// session ends.
    pub(super) async fn join_legs(&mut self) -> Result<(), End> {
        if self.legs.other.is_none() {
            return Ok(());
        }
        self.change_places();
        let stuck = self.check_stuck().await;
        self.change_places();
        stuck?;
        if let Some(leg) = self.legs.other.as_deref_mut() {
            for (name, known) in std::mem::take(&mut leg.prepared) {
                self.prepared.entry(name).or_insert(Prepared { there: There::Nothing, ..known });
            }
        }
        self.leave_other().await;
        Ok(())
    }
}

impl Leg {
    /// The server has ended it, or is about to.
    async fn is_gone(&mut self) -> bool {
        let read = std::future::poll_fn(|cx| Poll::Ready(self.server.poll_fill(cx))).await;
        let ended = matches!(read, Poll::Ready(Ok(0) | Err(_))) || self.server.closed;
        ended || self.server.inb.first() == Some(&b'E')
    }

    /// Runs statements of ours. Returns the first value of the last one that gave any, or what the server refused; an error where it was cut off.
    pub(super) async fn query(&mut self, text: &[u8]) -> std::io::Result<Result<Option<Bytes>, String>> {
        frame::query(&mut self.server.out, text);
        let mut said = Ok(None);
        loop {
            let (tag, payload) = self.server.frame().await?;
            match tag {
                b'E' => said = Err(frame::server_error(&payload).message),
                b'D' if said.is_ok() => {
                    let mut fields = frame::Fields::new(&payload);
                    let first = fields.int16().and_then(|_| fields.value());
                    said = Ok(first.ok().flatten().map(Bytes::copy_from_slice));
                }
                b'Z' => {
                    self.status = payload.first().copied().unwrap_or(b'I');
                    return Ok(said);
                }
                _ => {}
            }
        }
    }
}

fn unreachable(side: Side, why: &str) -> Report {
    Report::error(
        "08006",
        format!("cannot log in to the {side} database, where a table of this statement stays: {why}"),
        format!("Look whether the {side} database is up, and whether this role may log in there."),
    )
}

/// A text that nobody has read has opened the block, or it has more savepoints than are made again.
fn unknown_block() -> Report {
    Report::error(
        "0A000",
        "crossfade cannot open this transaction on the other side as well, and this statement's table is there",
        "Begin transactions that use tables of both sides by a BEGIN of its own, with at most 1000 savepoints.",
    )
}

fn lost_block(side: Side) -> End {
    End::Refused(Report::fatal(
        "08006",
        format!("crossfade cannot open this transaction on the {side} database as well"),
        "Nothing was committed. Connect again and repeat the transaction.",
    ))
}
