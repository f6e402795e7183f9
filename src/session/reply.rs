//! The authority's replies: each is matched with what was asked, passed on, kept for us, or cut.

use std::rc::Rc;

use bytes::{Buf, Bytes, BytesMut};
use tracing::debug;

use super::expect::{Cut, Done, Entered, Fit, Kind, Look, To, Told, Written, fit};
use super::{End, Session, whole};
use crate::catalog::Table;
use crate::mirror::writes::{Op, RolledBack};
use crate::plan::cache::Application;
use crate::plan::weave::Positions;
use crate::plan::{Effect, image};
use crate::shared::lock;
use crate::wire::conn::pass;
use crate::wire::frame::{self, HEAD, Report};

/// Frames larger than this are passed on as they come, where nothing needs to look inside.
const STREAMED: usize = 64 * 1024;

/// What happens to one frame.
pub(super) enum Verdict {
    /// It goes to the client as it is.
    Forward,
    /// The client does not see it.
    Drop,
    /// The client gets this instead.
    Replace(BytesMut),
}

impl Session {
    /// Works through the frames that the server has sent. Runs of frames that go to the client as they are move in one piece.
    pub(super) fn replies(&mut self) -> Result<(), End> {
        if self.from_server > 0 {
            let count = self.from_server.min(self.server.inb.len());
            pass(&mut self.server.inb, &mut self.client.out, count);
            self.from_server -= count;
            if self.from_server > 0 {
                return Ok(());
            }
        }
        let mut run = 0;
        while let Some(head) = frame::head(&self.server.inb[run..]).map_err(|e| End::Mismatch(e.to_string()))? {
            let there = self.server.inb.len() - run;
            if !head.fits_server() {
                return Err(End::Mismatch(format!("{:?} of {} bytes", char::from(head.tag), head.total)));
            }
            if there < head.total {
                if head.total > STREAMED && self.forwards(head.tag) {
                    pass(&mut self.server.inb, &mut self.client.out, run + there);
                    self.from_server = head.total - there;
                    return Ok(());
                }
                break;
            }
            if matches!(head.tag, b'D' | b'd') && self.forwards(head.tag) {
                run += head.total;
                continue;
            }
            match self.judge(head.tag, run, head.total)? {
                Verdict::Forward => run += head.total,
                Verdict::Drop => {
                    self.pass_run(&mut run);
                    self.server.inb.advance(head.total);
                }
                Verdict::Replace(instead) => {
                    self.pass_run(&mut run);
                    self.server.inb.advance(head.total);
                    self.client.out.extend_from_slice(&instead);
                }
            }
        }
        self.pass_run(&mut run);
        Ok(())
    }

    fn pass_run(&mut self, run: &mut usize) {
        if *run > 0 {
            pass(&mut self.server.inb, &mut self.client.out, std::mem::take(run));
        }
    }

    /// A row or COPY data that goes to the client untouched.
    fn forwards(&self, tag: u8) -> bool {
        matches!(tag, b'D' | b'd' | b'V')
            && self.queue.front().is_some_and(|owed| {
                matches!(owed.to, To::Client) && fit(owed.kind, tag) == Fit::Part
                    || tag == b'd' && matches!(owed.to, To::Cut(_))
            })
    }

    fn judge(&mut self, tag: u8, at: usize, total: usize) -> Result<Verdict, End> {
        match tag {
            b'S' => {
                self.parameter_status(at, total);
                // What we set on a second session is what the client has been told by the first.
                let ours = self.is_away() && self.queue.front().is_some_and(|owed| matches!(owed.to, To::Us));
                return Ok(if ours { Verdict::Drop } else { Verdict::Forward });
            }
            b'A' => return Ok(Verdict::Forward),
            b'N' if self.shows(at, total) => return Ok(Verdict::Drop),
            b'N' => {
                let ours = self.queue.front().is_some_and(|owed| {
                    // For the server a block is open already.
                    matches!(owed.done, Done::TakeOver)
                        || matches!(
                            owed.to,
                            To::Us
                                | To::Nobody
                                | To::Nowhere
                                | To::Enter(Entered::Ours | Entered::Begin)
                                | To::Around(_)
                        )
                });
                return Ok(if ours { Verdict::Drop } else { Verdict::Forward });
            }
            b'K' => return Ok(self.backend_key(at, total)),
            b'E' => return Ok(self.error(at, total)),
            _ => {}
        }
        let Some(owed) = self.queue.front() else {
            return Err(End::Mismatch(format!("{:?} while nothing was asked", char::from(tag))));
        };
        let (kind, to, hold) = (owed.kind, owed.to.clone(), owed.hold);
        if tag == b's'
            && let (Done::Fetched(portal), To::Cut(cut)) = (&owed.done, &to)
            && cut.capture.effect.is_some()
        {
            // The rest of the rows, and their images, may never be fetched.
            self.suspended.insert(*portal, cut.clone());
        }
        let fit = fit(kind, tag);
        if fit == Fit::Wrong {
            return Err(End::Mismatch(format!("{:?} in answer to {kind:?}", char::from(tag))));
        }
        if tag == b'G' {
            self.queue.copy_in();
        }
        let payload = at + HEAD..at + total;
        if tag == b'C' {
            if hold || matches!(to, To::Us | To::Cut(_)) {
                self.kept.tag = Bytes::copy_from_slice(&self.server.inb[payload.clone()]);
            }
            self.complete();
        }
        if fit == Fit::Last {
            self.queue.pop();
        }
        if tag == b'Z' {
            return Ok(self.ready(at + HEAD, &to, hold));
        }
        Ok(match to {
            To::Client | To::Woven(_) if tag == b'C' && hold => {
                self.held.complete = Some(Bytes::copy_from_slice(&self.server.inb[at..at + total]));
                Verdict::Drop
            }
            To::Client | To::Woven(_) => Verdict::Forward,
            To::Nobody | To::Nowhere => Verdict::Drop,
            To::Enter(entered) if tag == b'C' => self.entered(entered, at, total, hold),
            To::Enter(_) => Verdict::Drop,
            To::Us | To::Around(None) => {
                self.keep(tag, at, total)?;
                Verdict::Drop
            }
            To::Cut(cut) => self.cut(tag, at, total, kind, hold, &cut)?,
            To::Audit(look) => {
                if tag == b'D' {
                    let row = row(&self.server.inb[payload])?;
                    self.looked(&row, look);
                }
                Verdict::Drop
            }
            To::Around(Some(cut)) => {
                if tag == b'D' {
                    let row = self.server.inb[payload].to_vec();
                    self.fetched(&cut, &row)?;
                }
                Verdict::Drop
            }
            // Its error was replaced; what follows is the end of a Query.
            To::Refused(_) if matches!(tag, b'Z') => Verdict::Forward,
            To::Refused(_) => return Err(End::Mismatch("success of what can only fail".to_owned())),
        })
    }

    /// A part of the answer to a statement of ours.
    fn keep(&mut self, tag: u8, at: usize, total: usize) -> Result<(), End> {
        let payload = &self.server.inb[at + HEAD..at + total];
        if tag == b't' {
            self.kept.types = Bytes::copy_from_slice(payload);
        }
        if tag == b'D' {
            self.kept.bytes += total;
            if self.kept.bytes <= self.shared.config.load().limits.mirror_buffer {
                self.kept.rows.push(row(payload)?);
            }
        }
        Ok(())
    }

    fn ready(&mut self, at: usize, to: &To, hold: bool) -> Verdict {
        self.status = self.server.inb[at];
        self.begun = false;
        if self.world.phase.serves() {
            self.serving.touch();
        }
        self.settings.unsettled &= !self.queue.is_empty();
        if self.status == b'I' {
            self.over();
        }
        if !matches!(to, To::Audit(_) | To::Around(_))
            && let Some(since) = self.since.take()
        {
            self.observe(since.elapsed());
        }
        match to {
            To::Client | To::Woven(_) | To::Cut(_) | To::Refused(_) | To::Enter(Entered::Together) if !hold => {
                Verdict::Forward
            }
            _ => Verdict::Drop,
        }
    }

    fn parameter_status(&mut self, at: usize, total: usize) {
        let mut fields = frame::Fields::new(&self.server.inb[at + HEAD..at + total]);
        if let (Ok(name), Ok(value)) = (fields.string(), fields.string()) {
            match name {
                b"client_encoding" => self.settings.client_encoding = String::from_utf8_lossy(value).into_owned(),
                b"application_name" => self.settings.application = Application::new(&String::from_utf8_lossy(value)),
                b"standard_conforming_strings" => self.settings.escapes = value == b"off",
                _ => {}
            }
        }
    }

    /// The client keeps the key that it was first told; on another authority only our own books change.
    fn backend_key(&mut self, at: usize, total: usize) -> Verdict {
        let key = Bytes::copy_from_slice(&self.server.inb[at + HEAD..at + total]);
        let first = self.cancel_key.is_none();
        let client = self.cancel_key.get_or_insert_with(|| key.clone()).clone();
        self.shared.cancels.set(client, self.side, self.address.clone(), key);
        if first { Verdict::Forward } else { Verdict::Drop }
    }

    fn error(&mut self, at: usize, total: usize) -> Verdict {
        let said = frame::server_error(&self.server.inb[at + HEAD..at + total]);
        let fatal = said.fatal;
        self.dismissed |= fatal;
        let deadlocked = said.code == "57014" && self.world.splits() && self.is_deadlocked();
        let mut failed = self.queue.fail();
        // The last first: each remembers what was before it.
        while failed.len() > 1 {
            failed.pop().into_iter().for_each(|passed| self.undo(passed.done));
        }
        let Some(owed) = failed.pop() else { return Verdict::Forward };
        self.undo(owed.done.clone());
        if owed.hold {
            self.held.failed = true;
        }
        match &owed.to {
            To::Us | To::Nobody | To::Nowhere => {}
            _ if deadlocked => return Verdict::Replace(deadlock()),
            _ => {}
        }
        match &owed.to {
            // The server ends the session, whatever it was doing: for the client, or for us, whose statements the client does not see.
            _ if fatal => Verdict::Forward,
            To::Nowhere => Verdict::Drop,
            To::Enter(_) if self.refuses_entry(at, total) => Verdict::Drop,
            To::Us | To::Around(_) | To::Audit(Look { told: Told::Us, .. }) => {
                self.kept.error = Some(Bytes::copy_from_slice(&self.server.inb[at..at + total]));
                Verdict::Drop
            }
            To::Audit(Look { told: Told::Nobody, .. }) => Verdict::Drop,
            To::Refused(report) => {
                let mut instead = BytesMut::new();
                report.put(&mut instead);
                Verdict::Replace(instead)
            }
            to => {
                let positions = match to {
                    To::Woven(positions) => Some(positions.clone()),
                    To::Cut(cut) => cut.positions.clone(),
                    _ => None,
                };
                self.as_asked(at, total, positions.as_deref())
            }
        }
    }

    /// The statement was cancelled by whoever watches over deadlocks across both sides.
    fn is_deadlocked(&self) -> bool {
        let key = self.cancel_key.as_ref().and_then(|client| self.shared.cancels.get(client));
        let pid = key.and_then(|(side, _, key)| Some((side, i32::from_be_bytes(key.get(..4)?.try_into().ok()?))));
        pid.is_some_and(|pid| lock(&self.shared.deadlocked).remove(&pid))
    }

    /// An error about what the client has asked: with the client's name of a twin, and, of an edited text, with the position in the client's.
    fn as_asked(&self, at: usize, total: usize, positions: Option<&Positions>) -> Verdict {
        let payload = &self.server.inb[at + HEAD..at + total];
        let named = self.named.in_clients_words(payload);
        let placed = positions.and_then(|positions| {
            let payload = named.as_deref().unwrap_or(payload);
            frame::with_position(payload, |position| positions.in_clients_text(position))
        });
        match placed.map(|said| said.to_vec()).or(named) {
            Some(said) => Verdict::Replace(whole(b'E', &said)),
            None => Verdict::Forward,
        }
    }

    /// A statement is complete: our books follow.
    fn complete(&mut self) {
        let Some(owed) = self.queue.front() else { return };
        match owed.done.clone() {
            Done::Nothing | Done::TakeOver | Done::Parse(..) | Done::Close(..) | Done::Portal(..) | Done::Ours(_) => {}
            Done::Fetched(portal) => drop(self.suspended.remove(&portal)),
            Done::Begin => self.status = b'T',
            Done::End { chain } => {
                self.status = if chain { b'T' } else { b'I' };
                self.begun = false;
                self.ours = false;
                self.over();
            }
            Done::Savepoint(name) => self.writes.savepoint(&name),
            Done::Release(name) => self.writes.release(&name),
            Done::RollbackTo(name) => {
                if self.writes.rollback_to(&name) == RolledBack::Spilled {
                    self.give_up("rolled-back");
                }
            }
            Done::Truncate(tables) => self.writes.push(Op::Truncate(tables)),
            Done::Prepare(name, text) => self.named.prepared(&name, text),
            // What was sent behind it is not dropped.
            Done::Deallocate(None) => {
                self.named.clear();
                self.prepared.retain(|name, _| name.is_empty() || self.queue.parses(name));
                self.ours_prepared.retain(|name| self.queue.parses(name));
            }
            Done::Deallocate(Some(name)) if self.queue.parses(&name) => {}
            Done::Deallocate(Some(name)) => {
                self.named.forget(&String::from_utf8_lossy(&name));
                self.prepared.remove(&name[..]);
            }
        }
    }

    /// A notice that shows what the WITH clause of the statement under way has written.
    fn shows(&mut self, at: usize, total: usize) -> bool {
        let Some(To::Cut(cut)) = self.queue.front().map(|owed| &owed.to) else { return false };
        if cut.shown.is_empty() {
            return false;
        }
        let cut = cut.clone();
        // As with rows: they may be large.
        let inb = std::mem::take(&mut self.server.inb);
        let payload = &inb[at + HEAD..at + total];
        let ours = frame::field(payload, b'C') == Some(b"CFIMG");
        if ours {
            match frame::field(payload, b'M').and_then(|message| shown_by(message, &cut)) {
                Some((cut, image)) => self.capture(cut, image),
                None => self.lost(&cut.capture.tables, "image"),
            }
        }
        self.server.inb = inb;
        ours
    }

    fn cut(&mut self, tag: u8, at: usize, total: usize, kind: Kind, hold: bool, cut: &Rc<Cut>) -> Result<Verdict, End> {
        if cut.capture.effect.is_none() && tag != b'C' {
            // The rows are the client's own.
            return Ok(Verdict::Forward);
        }
        let payload = at + HEAD..at + total;
        let wrong = |error: frame::Malformed| End::Mismatch(format!("a reply with hidden columns: {error}"));
        Ok(match tag {
            b'T' if !cut.capture.returning && kind == Kind::Describe => {
                let mut no_data = BytesMut::new();
                frame::no_data(&mut no_data);
                Verdict::Replace(no_data)
            }
            b'T' => match frame::cut_description(&self.server.inb[payload]).map_err(wrong)? {
                Some(rest) if cut.capture.returning => Verdict::Replace(whole(b'T', &rest)),
                _ => Verdict::Drop,
            },
            b'D' => {
                // Out of the session while its row is read, instead of a copy: rows may be large, and there may be many.
                let inb = std::mem::take(&mut self.server.inb);
                let (count, kept, hidden) = frame::cut_row(&inb[payload]).map_err(wrong)?;
                if let Some(hidden) = hidden {
                    self.capture(cut, hidden);
                }
                let verdict = match cut.capture.returning {
                    true => {
                        let mut row = BytesMut::with_capacity(kept.len() + 8);
                        frame::put(&mut row, b'D', |out| {
                            bytes::BufMut::put_i16(out, count - 1);
                            out.extend_from_slice(kept);
                        });
                        Verdict::Replace(row)
                    }
                    false => Verdict::Drop,
                };
                self.server.inb = inb;
                verdict
            }
            b'C' if hold => {
                self.held.complete = Some(Bytes::copy_from_slice(&self.server.inb[at..at + total]));
                Verdict::Drop
            }
            _ => Verdict::Forward,
        })
    }

    /// One row as the authority left it.
    pub(super) fn capture(&mut self, cut: &Cut, hidden: &[u8]) {
        let (fields, effect, written) = match taken(cut, hidden) {
            Ok(taken) => taken,
            Err(error) => {
                debug!(%error, "an image that cannot be read");
                return self.lost(&cut.capture.tables, "image");
            }
        };
        let Some(table) = self.world.catalog.by_oid.get(self.side).get(&fields.tableoid).cloned() else {
            // A temporary table of the same name, or a partition that the catalog does not know yet.
            self.shared.stale.notify_one();
            return self.lost(&cut.capture.tables, "unknown-table");
        };
        match image::row(&table, self.side, fields) {
            Ok(_) if self.writes.redefined || !self.world.catalog.settled(self.side, &table) => {
                self.shared.stale.notify_one();
                self.lost(&[table], "definition");
            }
            Ok(row) => {
                if self.world.phase.mirror().is_some_and(|mirror| !self.world.catalog.settled(mirror, &table)) {
                    self.give_up("definition");
                }
                if let Some(audit) = &mut self.audit {
                    audit.count(table.number, written);
                }
                self.writes.push(op(effect, table, row));
            }
            Err(_) => {
                self.shared.stale.notify_one();
                self.lost(&[table], "definition");
            }
        }
    }
}

/// What PostgreSQL says of a deadlock.
fn deadlock() -> BytesMut {
    let mut out = BytesMut::new();
    let hint = "Transactions that use tables of both databases wait for each other; repeat this one.";
    Report::error("40P01", "deadlock detected", hint).put(&mut out);
    out
}

/// `number image`, as `crossfade.show_cte_image` says it.
fn shown_by<'m>(message: &'m [u8], cut: &'m Cut) -> Option<(&'m Cut, &'m [u8])> {
    let space = memchr::memchr(b' ', message)?;
    let number: usize = std::str::from_utf8(&message[..space]).ok()?.parse().ok()?;
    Some((cut.shown.get(number)?, &message[space + 1..]))
}

/// The hidden column taken apart, and what its statement did to the row.
fn taken(cut: &Cut, hidden: &[u8]) -> Result<(image::Fields, Effect, Written), image::ImageError> {
    let mut fields = image::hidden(hidden, cut.binary)?;
    let (effect, written) = match cut.capture.effect {
        Some(Effect::Merged) => match fields.take_action()? {
            image::Action::Inserted => (Effect::Row, Written::Insert),
            image::Action::Updated => (Effect::Row, Written::Update),
            image::Action::Deleted => (Effect::Gone, Written::Delete),
        },
        effect => (effect.unwrap_or(Effect::Row), cut.written),
    };
    Ok((fields, effect, written))
}

fn op(effect: Effect, table: std::sync::Arc<Table>, row: image::Row) -> Op {
    match (effect, table.key.is_some()) {
        (Effect::Row | Effect::Moved | Effect::Merged, true) => Op::Upsert(table, row),
        (Effect::Row | Effect::Moved | Effect::Merged, false) => Op::Insert(table, row),
        (Effect::Gone, _) => Op::Delete(table, row),
    }
}

fn row(payload: &[u8]) -> Result<Vec<Option<Bytes>>, End> {
    let mut fields = frame::Fields::new(payload);
    let count = fields.int16()?;
    (0..count).map(|_| Ok(fields.value()?.map(Bytes::copy_from_slice))).collect()
}
