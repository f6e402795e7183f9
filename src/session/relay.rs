//! The client's frames on their way to the authority; those of phases without a mirror pass here as they are.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes};

use super::books::{Prepared, Settings, There};
use super::expect::{Done, Expected, Kind, To};
use super::turn::Turned;
use super::{Aside, Carry, End, Session, ending};
use crate::mirror::flight::Debts;
use crate::plan::Plan;
use crate::plan::lazy::Lazy;
use crate::plan::weave::{Edit, put_edited};
use crate::sql;
use crate::sql::facts::Verb;
use crate::wire::conn::pass;
use crate::wire::frame::{self, Fields, HEAD, Head};

/// Larger frames are passed on as they come, where nothing needs to look inside.
const STREAMED: usize = 64 * 1024;

/// While so many replies are owed, no more is asked: five bytes from a client that does not read cost a hundred here.
const OWED_MAX: usize = 64 * 1024;

impl Session {
    /// Works through the frames that the client has sent. False: more bytes are needed.
    pub(super) async fn requests(&mut self) -> Result<bool, End> {
        let mut any = false;
        loop {
            if self.from_client > 0 {
                let count = self.from_client.min(self.client.inb.len());
                pass(&mut self.client.inb, &mut self.server.out, count);
                self.from_client -= count;
                if self.from_client > 0 {
                    return Ok(false);
                }
            }
            if self.crowded() {
                if self.queue.needs_flush() && self.queue.len() >= OWED_MAX {
                    frame::flush(&mut self.server.out);
                }
                return Ok(any);
            }
            let Some(head) = frame::head(&self.client.inb)? else { return Ok(any) };
            if self.client.inb.len() < head.total && !self.streams(head) {
                if !head.fits_client() {
                    return Err(frame::Malformed::Length.into());
                }
                self.needed = head.total;
                return Ok(any);
            }
            self.needed = 0;
            any = true;
            if head.tag == b'X' {
                self.client.inb.advance(head.total.min(self.client.inb.len()));
                return Err(End::Client);
            }
            if self.pass.is_none() {
                self.begin().await?;
                if self.client.inb.len() < head.total && !self.streams(head) {
                    // In the world that holds now somebody has to look inside.
                    self.needed = head.total;
                    return Ok(true);
                }
            }
            if self.world.phase.serves() && self.serve_read(head).await? {
                continue;
            }
            if self.world.merges() && self.read_point(head).await? {
                continue;
            }
            if self.world.splits() {
                match self.turn(head).await {
                    Ok(Turned::Go) => {}
                    Ok(Turned::Done) => continue,
                    Err(End::Overtaken) => {
                        self.once_more().await?;
                        continue;
                    }
                    Err(end) => return Err(end),
                }
            }
            if self.world.phase.mirror().is_some() && !self.is_away() {
                self.remember(head);
                match self.mirrored(head).await {
                    Err(End::Overtaken) => self.once_more().await?,
                    done => done?,
                }
            } else {
                self.unmirrored(head);
            }
        }
    }

    /// The client has to wait before its next message is looked at: a buffer is full, or too many replies are owed.
    pub(super) fn crowded(&self) -> bool {
        self.server.out.len() >= self.limit || self.client.out.len() >= self.limit || self.queue.len() >= OWED_MAX
    }

    /// The first message of a transaction: wait while the phase moves, then see the world as it is now.
    pub(super) async fn begin(&mut self) -> Result<(), End> {
        if self.outdated.is_some() {
            self.renewed().await;
        }
        let gate = match self.aside {
            None => &self.shared.gate,
            Some(Aside::OtherDatabase) => &self.shared.aside,
            // A stream of changes has no end that a move could wait for.
            Some(Aside::Replication) => return self.may_replicate(),
        };
        let gate = gate.clone();
        let mut turn = None;
        loop {
            if !self.known && self.aside.is_none() {
                self.make_known().await?;
            }
            drop(turn.take());
            let pass = match gate.try_enter() {
                Some(pass) => pass,
                None => gate.clone().enter().await.ok_or_else(ending)?,
            };
            self.pass = Some(pass);
            if self.aside.is_some() {
                return Ok(());
            }
            let current = self.shared.world.load();
            if Arc::ptr_eq(&current, &self.world) {
                return Ok(());
            }
            self.serving.renew(current.epoch != self.world.epoch);
            self.world = current.clone();
            drop(current);
            if !self.world.splits() {
                self.join_legs().await?;
            }
            if self.world.phase.authority() == self.side {
                return Ok(());
            }
            turn = self.take_turn().await;
            self.carry_over().await?;
            // It is another server session now, which nobody knows.
            self.known = false;
            self.pass = None;
        }
    }

    /// The frame may be passed on before it is here whole.
    pub(super) fn streams(&self, head: Head) -> bool {
        if head.total <= STREAMED || self.client.inb.len() < STREAMED {
            return false;
        }
        let mirrored = self.world.phase.mirror().is_some();
        let limit = self.shared.config.load().limits.statement;
        match head.tag {
            b'd' | b'F' | b'p' => true,
            b'B' => !mirrored || self.bind_streams(head),
            b'Q' | b'P' => !mirrored && !self.world.splits() || head.total > limit,
            _ => !mirrored,
        }
    }

    /// Nothing looks inside this Bind in a mirrored phase. Where the statement's plan is not that of the world as it is now, or may change before
    /// its turn comes, the Bind has to be here whole: a new plan may capture.
    pub(super) fn bind_streams(&self, head: Head) -> bool {
        if !self.queue.is_empty() && !self.unsynced {
            return false;
        }
        let Some(name) = self.name_in(head, b'B') else { return false };
        let Some(prepared) = self.prepared.get(&name).filter(|prepared| prepared.text.is_some()) else {
            return !self.strict();
        };
        prepared.planned.as_ref().is_some_and(|(terms, planned, _)| {
            *terms == self.terms()
                && !matches!(planned.plan, Plan::Capture(_))
                && planned.lazy == Lazy::Whole
                && self.refusal(planned).is_none()
        })
    }

    /// In phases without a mirror frames pass as they are; only what is owed for them is noted.
    pub(super) fn unmirrored(&mut self, head: Head) {
        let there = head.total.min(self.client.inb.len());
        match head.tag {
            b'Q' => {
                self.since = Some(Instant::now());
                let frame = &self.client.inb[HEAD..there];
                self.settings.glance(frame);
                let done = if Settings::forgets(frame) { done_of_text(frame) } else { Done::Nothing };
                self.queue.push(Expected { done, ..Expected::client(Kind::Query) });
                self.unsynced = false;
            }
            b'P' => {
                let done = self.note_parse(head, There::Plain);
                self.expect(Expected { done, ..Expected::client(Kind::Parse) });
                self.unsynced = true;
            }
            b'B' => {
                self.glance_at_bind(head);
                self.prepare_again_if_needed(head, b'B');
                self.extended(Kind::Bind);
            }
            b'D' => {
                self.prepare_again_if_needed(head, b'D');
                self.extended(Kind::Describe);
            }
            b'E' => {
                self.since.get_or_insert_with(Instant::now);
                self.extended(Kind::Execute);
            }
            b'C' => {
                let done = self.forget(head);
                self.expect(Expected { done, ..Expected::client(Kind::Close) });
                self.unsynced = true;
            }
            b'S' => {
                self.queue.push(Expected::client(Kind::Sync));
                self.unsynced = false;
            }
            b'F' => drop(self.queue.push(Expected::client(Kind::Call))),
            b'c' | b'f' => self.queue.copy_end(),
            _ => {}
        }
        self.forward(head);
    }

    pub(super) fn extended(&mut self, kind: Kind) {
        self.queue.push(Expected::client(kind));
        self.unsynced = true;
    }

    /// Passes the frame on as it is; what has not come yet follows as it comes.
    pub(super) fn forward(&mut self, head: Head) {
        let there = head.total.min(self.client.inb.len());
        pass(&mut self.client.inb, &mut self.server.out, there);
        self.from_client = head.total - there;
    }

    /// A message was sent. What our books say of it is undone where the server passes over it.
    pub(super) fn expect(&mut self, expected: Expected) {
        if let Some(passed) = self.queue.push(expected) {
            self.undo(passed.done);
        }
    }

    /// A message has failed, or was passed over: what it names is as it was.
    pub(super) fn undo(&mut self, done: Done) {
        match done {
            Done::Parse(name, Some(before)) | Done::Close(name, Some(before)) => {
                drop(self.prepared.insert(name, *before));
            }
            Done::Parse(name, None) | Done::Close(name, None) => drop(self.prepared.remove(&name)),
            Done::Portal(name, Some(before)) => drop(self.portals.insert(name, *before)),
            Done::Portal(name, None) => drop(self.portals.remove(&name)),
            Done::Ours(name) => self.ours_prepared.retain(|prepared| *prepared != name),
            _ => {}
        }
    }

    /// Remembers a Parse: the statement may have to be prepared again, on another server or with a hidden column.
    pub(super) fn note_parse(&mut self, head: Head, there: There) -> Done {
        let payload = &self.client.inb[HEAD..head.total.min(self.client.inb.len())];
        let mut fields = Fields::new(payload);
        let Ok(name) = fields.string() else { return Done::Nothing };
        let name = Bytes::copy_from_slice(name);
        let whole = self.client.inb.len() >= head.total;
        let text = if whole { fields.string().ok().map(Bytes::copy_from_slice) } else { None };
        let types = Bytes::copy_from_slice(if whole { fields.rest() } else { b"\0\0" });
        if let Some(text) = &text {
            self.settings.glance(text);
        }
        // A Parse of a name that is taken fails: then what was before holds.
        let sets = text.as_ref().is_some_and(|text| Settings::sets(text));
        let before = self.prepared.insert(name.clone(), Prepared { text, types, planned: None, there, sets });
        Done::Parse(name, before.map(Box::new))
    }

    /// The name of a setting may be a parameter.
    pub(super) fn glance_at_bind(&mut self, head: Head) {
        let payload = &self.client.inb[HEAD..head.total.min(self.client.inb.len())];
        let sets = name_of(payload, b'B').and_then(|name| self.prepared.get(name)).is_some_and(|known| known.sets);
        if sets {
            self.settings.collect(payload);
        }
    }

    /// A statement that was prepared on another server session is prepared here before its first Bind or Describe.
    pub(super) fn prepare_again_if_needed(&mut self, head: Head, tag: u8) {
        let payload = &self.client.inb[HEAD..head.total.min(self.client.inb.len())];
        let Some(name) = name_of(payload, tag) else { return };
        let Some(prepared) = self.prepared.get_mut(name) else { return };
        if prepared.there == There::Plain {
            return;
        }
        let name = Bytes::copy_from_slice(name);
        let spliced = prepared.there != There::Nothing;
        let Some(text) = prepared.text.clone() else { return };
        let types = prepared.types.clone();
        let failed = Prepared { there: There::Unknown, ..prepared.clone() };
        prepared.there = There::Plain;
        let done = Done::Parse(name.clone(), Some(Box::new(failed)));
        self.put_parse(&name, (&text, &[]), &types, spliced, To::Nobody, done);
    }

    /// The statement's name in a Bind, or in a Describe or Close of a statement; None for portals.
    pub(super) fn name_in(&self, head: Head, tag: u8) -> Option<Bytes> {
        name_of(&self.client.inb[HEAD..head.total.min(self.client.inb.len())], tag).map(Bytes::copy_from_slice)
    }

    /// Sends Parse of a text with these changes; `replace`: a statement of this name is there.
    pub(super) fn put_parse(
        &mut self,
        name: &Bytes,
        (text, edits): (&Bytes, &[Edit]),
        types: &Bytes,
        replace: bool,
        to: To,
        done: Done,
    ) {
        if replace && !name.is_empty() {
            frame::close_statement(&mut self.server.out, name);
            self.queue.push(Expected::of(Kind::Close, To::Nobody));
        }
        frame::put(&mut self.server.out, b'P', |out| {
            out.put_slice(name);
            out.put_u8(0);
            put_edited(out, text, edits);
            out.put_u8(0);
            out.put_slice(types);
        });
        self.expect(Expected { done, ..Expected::of(Kind::Parse, to) });
    }

    /// How long a statement took, from the client's message to ReadyForQuery.
    pub(super) fn observe(&self, took: Duration) {
        self.shared.metrics.observe_statement(self.side, took.as_secs_f64());
    }

    /// The transaction is over; whatever was not settled is undone on the mirror.
    pub(super) fn over(&mut self) {
        if self.is_away() {
            // The one on new has a transaction of its own.
            return;
        }
        self.entry.leave();
        // What is bound behind the end belongs to what begins there.
        let queue = &self.queue;
        self.portals.retain(|name, _| queue.binds(name));
        self.suspended.clear();
        self.audit = None;
        if self.writes.redefined {
            self.shared.stale.notify_one();
        }
        if !self.writes.is_empty() || !matches!(self.carry, Carry::Nothing) || self.debts.is_some() {
            self.writes = Default::default();
            self.debts = None;
            self.undo_carry();
        } else {
            self.writes = Default::default();
        }
    }

    /// The transaction's debts so far.
    pub(super) fn debts(&mut self) -> &mut Debts {
        let limit = self.shared.config.load().limits.mirror_buffer / 4;
        self.debts.get_or_insert_with(|| Debts::new(limit, rand::random()))
    }
}

fn name_of(payload: &[u8], tag: u8) -> Option<&[u8]> {
    let mut fields = Fields::new(payload);
    if tag == b'B' {
        fields.string().ok()?;
    } else if fields.byte().ok()? != b'S' {
        return None;
    }
    fields.string().ok()
}

/// The same, in phases in which no statement is planned, for texts that drop prepared statements.
fn done_of_text(payload: &[u8]) -> Done {
    let text = payload.strip_suffix(b"\0").unwrap_or(payload);
    match sql::read(text, sql::Limits::default()).verb {
        Verb::Deallocate(name) => Done::Deallocate(name.map(String::into_bytes)),
        Verb::Discard(what) if what == "all" => Done::Deallocate(None),
        _ => Done::Nothing,
    }
}
