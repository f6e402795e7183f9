//! The client's frames in mirrored phases: planned, spliced, in a block of ours where they have none.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::books::{Portal, Prepared, There};
use super::commit::Ending;
use super::expect::{Cut, Done, Entered, Expected, Kind, To, Told, Written};
use super::lazy::runs_before;
use super::moved::{self, Bound, Sent, moves};
use super::reading::{changes_reading, unread_plan};
use super::{End, Session, implicit};
use super::{audit, copy_rows};
use crate::plan::cache::Planned;
use crate::plan::lazy::Lazy;
use crate::plan::weave::{Edit, Positions};
use crate::plan::{Capture, Effect, Plan, Shown, Splice};
use crate::sql::facts::{Facts, OnConflict, Verb};
use crate::wire::frame::{self, Fields, HEAD, Head, Report};

/// What is decided for one statement.
pub(super) enum Way {
    /// As it is.
    Plain,
    /// With the hidden column.
    Cut(Rc<Cut>),
}

impl Session {
    pub(super) async fn mirrored(&mut self, head: Head) -> Result<(), End> {
        if self.client.inb.len() >= head.total {
            frame::check(head.tag, &self.client.inb[HEAD..head.total])?;
        }
        if matches!(head.tag, b'P' | b'B' | b'D' | b'E' | b'C') && !self.unsynced && !self.queue.is_empty() {
            // The first message behind a Sync (or a Query) that is not answered yet: whether a block is open is known only when it is, and what
            // that answer ends (`over`) must not be what begins here.
            self.settle().await?;
        }
        match head.tag {
            b'Q' if self.client.inb.len() < head.total => {
                // Too long to be read: it may write anything.
                self.unread(Kind::Query).await?;
                self.queue.push(Expected::client(Kind::Query));
                self.forward(head);
            }
            b'Q' => {
                let frame = self.take(head);
                let text = frame.strip_suffix(b"\0").map_or_else(|| frame.clone(), |text| frame.slice_ref(text));
                self.simple(text).await?;
            }
            b'P' => self.parse(head).await?,
            b'B' => self.bind(head).await?,
            b'D' => self.describe(head),
            b'E' => self.execute(head).await?,
            b'C' => {
                let done = self.forget(head);
                self.expect(Expected { done, ..Expected::client(Kind::Close) });
                self.unsynced = true;
                self.forward(head);
            }
            b'S' => {
                self.unsynced = false;
                self.bound = false;
                self.sync(head).await?;
            }
            b'F' => {
                self.unread(Kind::Call).await?;
                self.queue.push(Expected::client(Kind::Call));
                self.forward(head);
            }
            b'c' | b'f' => {
                self.queue.copy_end();
                self.forward(head);
            }
            _ => self.forward(head),
        }
        Ok(())
    }

    /// The payload of a frame that is here whole.
    pub(super) fn take(&mut self, head: Head) -> Bytes {
        let mut frame = self.client.inb.split_to(head.total).freeze();
        frame.advance(HEAD);
        frame
    }

    /// Parse: the text is read, and spliced where it is a write to be captured.
    pub(super) async fn parse(&mut self, head: Head) -> Result<(), End> {
        self.unsynced = true;
        if self.client.inb.len() < head.total {
            let done = self.note_parse(head, There::Plain);
            self.expect(Expected { done, ..Expected::client(Kind::Parse) });
            self.forward(head);
            return Ok(());
        }
        let done = self.note_parse(head, There::Plain);
        let payload = self.take(head);
        let mut fields = Fields::new(&payload);
        let name = payload.slice_ref(fields.string()?);
        let text = payload.slice_ref(fields.string()?);
        let types = payload.slice_ref(fields.rest());
        self.hear_settings(&text).await?;
        let (planned, end) = self.plan_for(&text);
        let edits = self.edits(&planned, &text, end);
        let terms = self.terms();
        // A position behind the last token is the client's own.
        let woven = splice(&planned).is_some_and(|splice| !splice.within.is_empty() || !splice.names.is_empty());
        let to = if woven { To::Woven(Rc::new(Positions::of(&text, &edits))) } else { To::Client };
        if let Some(prepared) = self.prepared.get_mut(&name) {
            prepared.there = there(&planned);
            prepared.planned = Some((terms, planned, end));
        }
        self.put_parse(&name, (&text, &edits), &types, false, to, done);
        Ok(())
    }

    /// The plan of a prepared statement in this world; the server's copy is made to fit.
    pub(super) fn current(&mut self, name: &Bytes) -> Arc<Planned> {
        // A name that our books do not have may be one of SQL's PREPARE, and a text too long to be kept was not read: it may write anything.
        let Some((prepared, text)) =
            self.prepared.get(name).and_then(|known| Some((known.clone(), known.text.clone()?)))
        else {
            return Arc::new(unread_plan());
        };
        let terms = self.terms();
        let (planned, end) = match prepared.planned {
            Some((of, planned, end)) if of == terms => (planned, end),
            _ => self.plan_for(&text),
        };
        let wanted = there(&planned);
        let before = (prepared.there != wanted).then(|| prepared.there.clone());
        if let Some(prepared) = self.prepared.get_mut(name) {
            prepared.planned = Some((terms, planned.clone(), end));
            prepared.there = wanted;
        }
        if let Some(there) = before {
            let edits = self.edits(&planned, &text, end);
            let failed = Prepared {
                text: Some(text.clone()),
                types: prepared.types.clone(),
                planned: None,
                there: There::Unknown,
                sets: prepared.sets,
            };
            let done = Done::Parse(name.clone(), Some(Box::new(failed)));
            self.put_parse(name, (&text, &edits), &prepared.types, there != There::Nothing, To::Nobody, done);
        }
        planned
    }

    pub(super) async fn bind(&mut self, head: Head) -> Result<(), End> {
        self.glance_at_bind(head);
        let Some(name) = self.name_in(head, b'B') else {
            self.extended(Kind::Bind);
            self.forward(head);
            return Ok(());
        };
        let portal = {
            let mut fields = Fields::new(&self.client.inb[HEAD..head.total.min(self.client.inb.len())]);
            Bytes::copy_from_slice(fields.string()?)
        };
        let planned = self.current(&name);
        if let Some(report) = self.refusal(&planned) {
            self.client.inb.advance(head.total);
            self.unsynced = true;
            self.put_refused(report, Kind::Bind, false);
            return Ok(());
        }
        self.open_block_for(&planned).await?;
        if runs_before(&planned) {
            self.bring_before_bind(&planned, &name, head).await?;
        }
        self.bound |= !self.in_block() && !matches!(planned.facts.verb, Verb::Begin { .. });
        self.unsynced = true;
        let mut binary = false;
        let mut bound = None;
        match &planned.plan {
            Plan::Capture(capture) if capture.effect.is_some() => {
                let payload = self.take(head);
                bound = self.bound(capture, &name, &payload);
                binary = put_bind(&mut self.server.out, &payload, capture.returning)?;
            }
            _ => {
                self.sample_bind(&planned, &name, head);
                self.forward(head);
            }
        }
        let kept = matches!(planned.facts.verb, Verb::CopyFromStdin | Verb::Ddl { .. } | Verb::Begin { .. });
        let text = self.prepared.get(&name).filter(|_| kept).and_then(|prepared| prepared.text.clone());
        self.portal_count += 1;
        let planned = Some(planned);
        let bound = Portal { number: self.portal_count, planned, binary, text, ran: false, bound };
        let before = self.portals.insert(portal.clone(), bound).map(Box::new);
        self.expect(Expected { done: Done::Portal(portal, before), ..Expected::client(Kind::Bind) });
        Ok(())
    }

    /// What running this portal needs beside the portal, where it may change keys.
    fn bound(&self, capture: &Capture, statement: &Bytes, payload: &Bytes) -> Option<Rc<Bound>> {
        let text = self.prepared.get(statement)?.text.clone()?;
        (capture.effect == Some(Effect::Moved)).then(|| Rc::new(Bound { text, payload: payload.clone() }))
    }

    /// Before a write outside any block: a block of ours, so that its images, its debts and its commit have one transaction.
    pub(super) async fn open_block_for(&mut self, planned: &Planned) -> Result<(), End> {
        if planned.plan == Plan::Pass && !runs_before(planned) {
            self.before_showing(planned).await;
            return Ok(());
        }
        if self.queue.ends() {
            // Whether a block is open is known only when its end was answered.
            self.settle().await?;
        }
        if self.in_block() {
            self.enter_late(planned);
            return Ok(());
        }
        match &planned.plan {
            Plan::Opaque(opaque) if opaque.unwrapped && !self.replays(opaque) => {
                self.settle().await?;
                if !self.queue.skipping()
                    && let Some(debt) = self.register_unwrapped(opaque).await?
                {
                    self.registered.push(debt);
                }
            }
            _ => self.begin_ours(),
        }
        Ok(())
    }

    /// How a text of this plan is changed before it is sent. Texts of one shape have the same tokens, so what was planned fits.
    pub(super) fn edits(&self, planned: &Planned, text: &[u8], end: usize) -> Vec<Edit> {
        splice(planned).and_then(|splice| splice.edits(&self.legible(text), end)).unwrap_or_default()
    }

    /// A transaction block is open, the client's or ours.
    pub(super) fn in_block(&self) -> bool {
        self.status != b'I' || self.begun || self.ours
    }

    /// BEGIN, unseen by the client. Behind statements of the same pipeline it takes their transaction over.
    pub(super) fn begin_ours(&mut self) {
        self.put_ours(b"crossfade_begin", b"BEGIN", &[], &[], To::Nobody);
        self.ours = true;
        self.enter(Entered::Ours, None);
    }

    /// Executes a statement of ours, prepared once per server session.
    pub(super) fn put_ours(
        &mut self,
        name: &'static [u8],
        text: &[u8],
        types: &[u32],
        values: &[Option<&[u8]>],
        to: To,
    ) {
        if !self.ours_prepared.contains(&name) {
            frame::parse(&mut self.server.out, name, text, types);
            self.ours_prepared.push(name);
            self.expect(Expected { done: Done::Ours(name), ..Expected::of(Kind::Parse, to.clone()) });
        }
        // The client's unnamed portal may be waiting for its Execute. Ours of this name goes with the transaction that it ends, or is closed.
        let apart = [
            super::commit::OWE_NAME,
            super::commit::PROVE_NAME,
            super::commit::TAINT_NAME,
            super::commit::UNLIMITED_NAME,
            audit::LOOK_NAME,
            audit::CONSTRAINTS_NAME,
            super::define::NAME,
            moved::SET_NAME,
            moved::BACK_NAME,
            moved::RELEASE_NAME,
            super::enter::BEGUN_NAME,
        ]
        .contains(&name)
            || copy_rows::AROUND.contains(&name);
        let portal: &[u8] = if apart { name } else { b"" };
        frame::bind(&mut self.server.out, portal, name, &[1], values.iter().copied(), 0);
        self.queue.push(Expected::of(Kind::Bind, to.clone()));
        frame::execute(&mut self.server.out, portal);
        self.queue.push(Expected::of(Kind::Execute, to.clone()));
        if !portal.is_empty() {
            frame::close_portal(&mut self.server.out, portal);
            self.queue.push(Expected::of(Kind::Close, to));
        }
    }

    pub(super) fn describe(&mut self, head: Head) {
        let cut = {
            let mut fields = Fields::new(&self.client.inb[HEAD..head.total.min(self.client.inb.len())]);
            match (fields.byte(), fields.string()) {
                (Ok(b'P'), Ok(b"")) if self.has_no_portal(b"") => {
                    self.client.inb.advance(head.total);
                    self.unsynced = true;
                    return self.put_refused(no_portal(), Kind::Describe, false);
                }
                (Ok(b'S'), Ok(name)) => {
                    let name = Bytes::copy_from_slice(name);
                    way(&self.current(&name), false).cut()
                }
                (Ok(b'P'), Ok(name)) => self
                    .portals
                    .get(name)
                    .and_then(|portal| portal.planned.as_ref().and_then(|planned| way(planned, portal.binary).cut())),
                _ => None,
            }
        };
        self.unsynced = true;
        self.queue.push(Expected::of(Kind::Describe, cut.map_or(To::Client, To::Cut)));
        self.forward(head);
    }

    /// The client has no such portal, and under no name the server may have one of ours. (In a failed block it refuses whatever is asked.)
    fn has_no_portal(&self, name: &[u8]) -> bool {
        !self.portals.contains_key(name) && self.status != b'E'
    }

    /// The portal of an Execute, as it was before; or what PostgreSQL would answer where the server has something else.
    fn portal_of(&mut self, head: Head) -> Result<Option<Portal>, Report> {
        let mut fields = Fields::new(&self.client.inb[HEAD..head.total.min(self.client.inb.len())]);
        let Ok(name) = fields.string() else { return Ok(None) };
        if name.is_empty() && self.has_no_portal(name) {
            return Err(no_portal());
        }
        let Some(portal) = self.portals.get_mut(name) else { return Ok(None) };
        let before = portal.clone();
        portal.ran = true;
        // In a failed block it is refused for that.
        match (before.ran && self.status != b'E').then(|| ran_already(name, portal)).flatten() {
            Some(report) => Err(report),
            None => Ok(Some(before)),
        }
    }

    pub(super) async fn execute(&mut self, head: Head) -> Result<(), End> {
        self.since.get_or_insert_with(Instant::now);
        self.unsynced = true;
        let portal = match self.portal_of(head) {
            Ok(portal) => portal,
            Err(report) => {
                self.client.inb.advance(head.total);
                self.put_refused(report, Kind::Execute, false);
                return Ok(());
            }
        };
        let Some((planned, binary, number, text, bound)) =
            portal.and_then(|portal| Some((portal.planned?, portal.binary, portal.number, portal.text, portal.bound)))
        else {
            self.queue.push(Expected::client(Kind::Execute));
            self.forward(head);
            return Ok(());
        };
        if self.ours {
            if let Some(report) = implicit::refusal(&planned.facts.verb) {
                self.client.inb.advance(head.total);
                self.put_refused(report, Kind::Execute, false);
                return Ok(());
            }
            if implicit::ends(&planned.facts.verb) {
                self.settle().await?;
                if self.ours && !self.queue.skipping() {
                    implicit::no_transaction(&mut self.client.out);
                }
            }
        }
        if let Some(ending) = Ending::of(&planned.facts.verb)
            && self.in_block()
        {
            let frame = self.client.inb.split_to(head.total).freeze();
            return self.commit_extended(frame, ending).await;
        }
        if planned.plan != Plan::Pass && self.queue.ends() {
            self.settle().await?;
        }
        self.note_statement(&planned);
        self.look_before(&planned, Told::Client);
        let defined = self.before_definition(&planned).await?;
        if let (Some(text), Verb::CopyFromStdin, true) = (&text, &planned.facts.verb, self.in_block()) {
            let frame = self.client.inb.split_to(head.total).freeze();
            return self.copy_extended(frame, &planned, text).await;
        }
        if let (Some(bound), Some(capture)) = (bound, moves(&planned)) {
            let frame = self.client.inb.split_to(head.total).freeze();
            return self.run_moved(&planned, capture, &Sent::Portal { frame, bound, number }).await;
        }
        let to = way(&planned, binary).cut().map_or(To::Client, To::Cut);
        let mut done = done(&planned);
        if matches!(done, Done::Begin) {
            if self.ours && self.takes_over(head, &planned).await? {
                return Ok(());
            }
            return self.begin_extended(head, &planned, text).await;
        }
        if matches!(planned.plan, Plan::Capture(_)) {
            done = Done::Fetched(number);
        }
        self.queue.push(Expected { kind: Kind::Execute, to, hold: false, done });
        match &planned.plan {
            Plan::Capture(capture) if !capture.returning => self.execute_all(head)?,
            _ => self.forward(head),
        }
        self.look_behind(&planned, Told::Client);
        if let (Some(defined), Some(text)) = (defined, text) {
            self.after_definition(defined, &text).await?;
        }
        Ok(())
    }

    /// BEGIN behind a write in one pipeline: the transaction that we opened for the write becomes the client's block. False: the server is
    /// passing over messages.
    async fn takes_over(&mut self, head: Head, planned: &Planned) -> Result<bool, End> {
        self.settle().await?;
        if self.queue.skipping() {
            return Ok(false);
        }
        if matches!(planned.facts.verb, Verb::Begin { bare: false, .. }) {
            self.queue.push(Expected { done: Done::TakeOver, ..Expected::client(Kind::Execute) });
            self.forward(head);
            self.settle().await?;
            if self.queue.skipping() {
                return Ok(true);
            }
        } else {
            self.client.inb.advance(head.total);
            frame::complete(&mut self.client.out, b"BEGIN");
        }
        self.ours = false;
        self.begun = true;
        Ok(true)
    }

    /// Execute without its row limit: it means nothing to a statement that gives no rows, but the hidden column makes some.
    pub(super) fn execute_all(&mut self, head: Head) -> Result<(), End> {
        let payload = self.take(head);
        frame::execute(&mut self.server.out, Fields::new(&payload).string()?);
        Ok(())
    }

    /// What a statement that is about to run means for the transaction's books.
    pub(super) fn note_statement(&mut self, planned: &Planned) {
        self.settings.unsettled |= changes_reading(planned);
        let class = match &planned.plan {
            Plan::Pass => "pass",
            Plan::Capture(_) | Plan::Truncate(_) | Plan::Copy(_) => "write",
            Plan::Opaque(_) => "opaque",
        };
        planned.see(&self.settings.application);
        self.note_for_serving(planned);
        self.shared.metrics.statements.with_label_values(&[class, self.side.name()]).inc();
        if let Plan::Opaque(opaque) = &planned.plan {
            self.shared.metrics.opaque_writes.with_label_values(&[opaque.reason]).inc();
            if opaque.ddl && self.in_block() {
                // Row counters do not tell what has become of the rows of a table whose definition changed.
                opaque.tables.iter().for_each(|table| self.taint(table.number, opaque.reason));
            }
        }
    }

    /// A write whose images turn out not to be had: counted like any other out of sight.
    pub(super) fn lost(&mut self, tables: &[Arc<crate::catalog::Table>], reason: &'static str) {
        self.shared.metrics.opaque_writes.with_label_values(&[reason]).inc();
        tables.iter().for_each(|table| self.taint(table.number, reason));
    }

    /// Close: our books follow at once, and go back where the server passes over it.
    pub(super) fn forget(&mut self, head: Head) -> Done {
        if let Some(name) = self.name_in(head, b'C') {
            let before = self.prepared.remove(&name).map(Box::new);
            return Done::Close(name, before);
        }
        let mut fields = Fields::new(&self.client.inb[HEAD..head.total.min(self.client.inb.len())]);
        match (fields.byte(), fields.string()) {
            (Ok(b'P'), Ok(name)) => {
                let name = Bytes::copy_from_slice(name);
                let before = self.portals.remove(&name).map(Box::new);
                Done::Portal(name, before)
            }
            _ => Done::Nothing,
        }
    }

    pub(super) async fn sync(&mut self, head: Head) -> Result<(), End> {
        if !self.ours {
            self.queue.push(Expected::client(Kind::Sync));
            self.forward(head);
            return Ok(());
        }
        self.client.inb.advance(head.total);
        self.commit_pipeline().await
    }
}

impl Way {
    pub(super) fn cut(self) -> Option<Rc<Cut>> {
        match self {
            Way::Plain => None,
            Way::Cut(cut) => Some(cut),
        }
    }
}

pub(super) fn way(planned: &Planned, binary: bool) -> Way {
    match &planned.plan {
        Plan::Capture(capture) => {
            let cut = |capture: &Arc<Capture>, facts: &Facts, binary: bool, shown: Vec<Rc<Cut>>| {
                Rc::new(Cut { capture: capture.clone(), binary, written: written(facts), shown, positions: None })
            };
            // Notices are text.
            let within = |shown: &Shown| {
                let facts = planned.facts.within.get(shown.at)?;
                Some(cut(&shown.capture, &facts.facts, false, Vec::new()))
            };
            let shown = capture.shown.iter().filter_map(within).collect();
            Way::Cut(cut(capture, &planned.facts, binary, shown))
        }
        _ => Way::Plain,
    }
}

fn written(facts: &Facts) -> Written {
    match facts.verb {
        Verb::Update => Written::Update,
        Verb::Delete => Written::Delete,
        _ if facts.on_conflict == Some(OnConflict::Update) => Written::Upsert,
        _ => Written::Insert,
    }
}

/// What is spliced into the statement.
fn splice(planned: &Planned) -> Option<&Splice> {
    match &planned.plan {
        Plan::Capture(capture) if !capture.splice.is_empty() => Some(&capture.splice),
        _ => match &planned.lazy {
            Lazy::Merged(merged) => Some(&merged.splice),
            _ => None,
        },
    }
}

/// What the server is to have under the name of a statement with this plan.
fn there(planned: &Planned) -> There {
    splice(planned).map_or(There::Plain, |splice| There::Spliced(splice.clone()))
}

impl Cut {
    /// For a Query whose text was sent with these changes.
    pub(super) fn sent(self: Rc<Cut>, text: &[u8], edits: &[Edit]) -> Rc<Cut> {
        if self.shown.is_empty() {
            return self;
        }
        Rc::new(Cut { positions: Some(Rc::new(Positions::of(text, edits))), ..Cut::clone(&self) })
    }
}

/// PostgreSQL's answer to Describe or Execute of an unnamed portal that is not there.
fn no_portal() -> Report {
    Report { severity: "ERROR", code: "34000", message: "portal \"\" does not exist".to_owned(), hint: None }
}

/// PostgreSQL's answer to a second Execute of what gives no rows. With the hidden column the server would say that no more rows were written, and
/// a BEGIN that took over a block of ours was never sent.
fn ran_already(name: &[u8], portal: &Portal) -> Option<Report> {
    let planned = portal.planned.as_ref()?;
    let once = match &planned.plan {
        Plan::Capture(capture) => !capture.returning,
        _ => matches!(planned.facts.verb, Verb::Begin { .. }),
    };
    let message = || format!("portal \"{}\" cannot be run", String::from_utf8_lossy(name));
    once.then(|| Report { severity: "ERROR", code: "55000", message: message(), hint: None })
}

/// What a statement changes in our books when it completes.
pub(super) fn done(planned: &Planned) -> Done {
    if let Plan::Truncate(tables) = &planned.plan {
        return Done::Truncate(tables.clone());
    }
    match &planned.facts.verb {
        Verb::Begin { .. } => Done::Begin,
        Verb::Commit { chain } | Verb::Rollback { chain } => Done::End { chain: *chain },
        Verb::PrepareTransaction => Done::End { chain: false },
        Verb::Savepoint(name) => Done::Savepoint(name.clone().into_bytes()),
        Verb::Release(name) => Done::Release(name.clone().into_bytes()),
        Verb::RollbackTo(name) => Done::RollbackTo(name.clone().into_bytes()),
        Verb::Prepare(name) => Done::Prepare(name.clone(), None),
        Verb::Deallocate(name) => Done::Deallocate(name.clone().map(String::into_bytes)),
        Verb::Discard(what) if what == "all" => Done::Deallocate(None),
        _ => Done::Nothing,
    }
}

/// Bind with a format for the hidden column: none and one format hold for all columns, more are one each. True: it comes in binary.
pub(super) fn put_bind(out: &mut BytesMut, payload: &[u8], returning: bool) -> Result<bool, End> {
    let mut fields = Fields::new(payload);
    fields.string()?;
    fields.string()?;
    fields.skip_values()?;
    let head = payload.len() - fields.rest().len();
    let count = fields.count()?;
    let formats = fields.take(count * 2)?;
    let binary = match count {
        0 => !returning,
        1 => !returning || formats == [0, 1],
        _ => true,
    };
    frame::put(out, b'B', |out| {
        out.put_slice(&payload[..head]);
        // Formats for a statement that gives no rows are not looked at.
        if count > 1 && returning {
            out.put_u16(count.saturating_add(1) as u16);
            out.put_slice(formats);
            out.put_i16(1);
        } else if !returning {
            out.put_i16(1);
            out.put_i16(1);
        } else {
            out.put_u16(count as u16);
            out.put_slice(formats);
        }
    });
    Ok(binary)
}
