//! Query messages in mirrored phases: one statement or several, with the rules of an implicit transaction kept.

use std::rc::Rc;
use std::sync::Arc;

use bytes::{BufMut, Bytes};

use super::commit::Ending;
use super::expect::{Done, Expected, Kind, To, Told};
use super::implicit;
use super::lazy::runs_before;
use super::mirrored::{Way, done, way};
use super::moved::{Sent, moves};
use super::named::prepares;
use super::reading::changes_lexing;
use super::{End, Held, Session};
use crate::plan::Plan;
use crate::plan::cache::Planned;
use crate::plan::lazy::Lazy;
use crate::plan::weave::{Edit, Positions, put_edited};
use crate::sql;
use crate::sql::facts::Verb;
use crate::wire::frame;

impl Session {
    /// One Query message.
    pub(super) async fn simple(&mut self, text: Bytes) -> Result<(), End> {
        if !self.queue.is_empty() {
            self.settle().await?;
        }
        self.hear_settings(&text).await?;
        if self.queue.skipping() {
            // Behind an error in the extended protocol the server passes over a Query too.
            return Ok(());
        }
        self.since = Some(std::time::Instant::now());
        (self.unsynced, self.bound) = (false, false);
        // A Query takes the place of the unnamed portal and statement.
        self.portals.remove(&b""[..]);
        self.prepared.remove(&b""[..]);
        self.settings.glance(&text);
        let (planned, end) = self.plan_for(&text);
        if self.ours {
            // Behind a write of the extended protocol without Sync: one implicit transaction, which the end of the Query ends.
            return self.behind_pipeline(&text, (planned, end)).await;
        }
        if planned.facts.verb != Verb::Other {
            return self.one(&text, &planned, end).await;
        }
        let parts = self.parts(&text);
        if parts.len() < 2 {
            return self.one(&text, &planned, end).await;
        }
        let plans: Vec<_> = parts.iter().map(|part| self.plan_for(part)).collect();
        let quiet = plans.iter().all(|(planned, _)| {
            planned.plan == Plan::Pass && planned.lazy == Lazy::Whole && matches!(done(planned), Done::Nothing)
        });
        if quiet {
            plans.iter().for_each(|(planned, _)| self.note_for_serving(planned));
            self.put_query(&text, &[]);
            self.queue.push(Expected::client(Kind::Query));
            return Ok(());
        }
        self.several_as_read(&text, &parts, &plans).await
    }

    /// PostgreSQL reads a text of several statements before it runs the first: where that one changes how texts are read, the others cannot be
    /// sent one by one. Nor where one that nobody reads may be an error, for which none of them runs, and a COMMIT among them would have run.
    async fn several_as_read(
        &mut self,
        text: &Bytes,
        parts: &[Bytes],
        plans: &[(Arc<Planned>, usize)],
    ) -> Result<(), End> {
        let [before @ .., _] = plans else { return Ok(()) };
        let moves = |(planned, _): &(Arc<Planned>, usize)| changes_lexing(planned);
        let errs = |(planned, _): &(Arc<Planned>, usize)| planned.facts.verb == Verb::Other;
        let settles = |(planned, _): &(Arc<Planned>, usize)| Ending::of(&planned.facts.verb).is_some();
        let as_one = plans.iter().any(errs) && plans.iter().any(settles);
        let as_one = as_one && !self.ours && self.status != b'E' && !self.strict();
        // In a block that has failed the first fails, and with it the text.
        let goes_on = |(planned, _): &(Arc<Planned>, usize)| {
            ends(&planned.facts.verb) || matches!(planned.facts.verb, Verb::RollbackTo(_))
        };
        let fails = self.status == b'E' && !before.first().is_some_and(goes_on);
        if fails || !as_one && !before.iter().any(moves) {
            return self.several(parts, plans).await;
        }
        self.unread(Kind::Query).await?;
        self.put_query(text, &[]);
        self.queue.push(Expected::client(Kind::Query));
        Ok(())
    }

    async fn behind_pipeline(&mut self, text: &Bytes, whole: (Arc<Planned>, usize)) -> Result<(), End> {
        let parts = self.parts(text);
        if parts.len() < 2 {
            return self.several(std::slice::from_ref(text), &[whole]).await;
        }
        let plans: Vec<_> = parts.iter().map(|part| self.plan_for(part)).collect();
        self.several_as_read(text, &parts, &plans).await
    }

    /// The statements of a text.
    fn parts(&self, text: &Bytes) -> Vec<Bytes> {
        let statements = sql::split(&self.legible(text));
        statements.iter().map(|statement| text.slice(statement.range.clone())).collect()
    }

    pub(super) fn put_query(&mut self, text: &[u8], edits: &[Edit]) {
        frame::put(&mut self.server.out, b'Q', |out| {
            put_edited(out, text, edits);
            out.put_u8(0);
        });
    }

    /// Runs one statement within a block; its end is held back where `hold`.
    async fn run_one(&mut self, text: &Bytes, planned: &Planned, end: usize, hold: bool) -> Result<(), End> {
        if self.refusal(planned).is_none() && !self.bring_before_query(text, planned, hold).await? {
            return Ok(());
        }
        let Some(capture) = moves(planned).filter(|_| self.refusal(planned).is_none()) else {
            self.send(text, planned, end, hold);
            return Ok(());
        };
        self.note_statement(planned);
        self.look_before(planned, Told::Nobody);
        self.run_moved(planned, capture, &Sent::Query { text, end, hold }).await
    }

    /// Sends one statement; its end is held back where `hold`.
    fn send(&mut self, text: &Bytes, planned: &Planned, end: usize, hold: bool) {
        self.note_statement(planned);
        if let Some(report) = self.refusal(planned) {
            return self.put_refused(report, Kind::Query, hold);
        }
        self.look_before(planned, Told::Nobody);
        self.copy_begins(planned, text, Told::Nobody);
        if self.begins(planned) {
            return self.begin_simple(text, hold);
        }
        let edits = self.edits(planned, text, end);
        self.put_query(text, &edits);
        let to = match way(planned, false) {
            Way::Plain if !edits.is_empty() => To::Woven(Rc::new(Positions::of(text, &edits))),
            Way::Plain => To::Client,
            Way::Cut(cut) => To::Cut(cut.sent(text, &edits)),
        };
        self.note_sql_prepared(planned);
        let done = prepares(planned, Some(text)).unwrap_or_else(|| done(planned));
        self.begun |= matches!(done, Done::Begin);
        self.queue.push(Expected { kind: Kind::Query, to, hold, done });
        self.look_behind(planned, Told::Nobody);
    }

    /// A Query of one statement.
    async fn one(&mut self, text: &Bytes, planned: &Arc<Planned>, end: usize) -> Result<(), End> {
        let executed = self.executes(planned, text).await?;
        let (planned, text, end) = match &executed {
            Some((planned, text)) => (planned, text, text.len()),
            None => (planned, text, end),
        };
        match &planned.plan {
            Plan::Pass if !runs_before(planned) => {
                if let Some(ending) = Ending::of(&planned.facts.verb)
                    && self.in_block()
                {
                    return self.commit_simple(text, ending).await;
                }
                self.before_showing(planned).await;
                self.sample_query(planned, text);
                self.send(text, planned, end, false);
                Ok(())
            }
            Plan::Opaque(opaque)
                if opaque.unwrapped && !self.replays(opaque) && !self.in_block() && self.refusal(planned).is_none() =>
            {
                let debt = self.register_unwrapped(opaque).await?;
                self.registered.extend(debt);
                self.send(text, planned, end, false);
                Ok(())
            }
            _ if self.in_block() && planned.facts.verb == Verb::CopyFromStdin => {
                self.enter_late(planned);
                self.held = Held::default();
                self.send(text, planned, end, true);
                self.copy_simple(planned).await
            }
            _ if self.in_block() => {
                self.enter_late(planned);
                let defined = self.before_definition(planned).await?;
                self.run_one(text, planned, end, false).await?;
                match defined {
                    Some(defined) => self.after_definition(defined, text).await,
                    None => Ok(()),
                }
            }
            _ => {
                self.begin_ours();
                self.held = Held::default();
                self.send_whole(text, planned, end).await?;
                self.commit_ours().await
            }
        }
    }

    /// Sends one statement whose end is held back, and waits for it.
    async fn send_whole(&mut self, text: &Bytes, planned: &Planned, end: usize) -> Result<(), End> {
        let defined = self.before_definition(planned).await?;
        self.run_one(text, planned, end, true).await?;
        self.settle_query(planned).await?;
        match defined {
            Some(defined) => self.after_definition(defined, text).await,
            None => Ok(()),
        }
    }

    fn note_sql_prepared(&mut self, planned: &Planned) {
        if matches!(planned.facts.verb, Verb::Prepare(_)) {
            self.settings.sql_prepared = true;
        }
    }

    /// A Query of several statements: one implicit transaction, until a BEGIN or COMMIT among them says otherwise.
    /// They are sent one by one; the client sees their replies and one ReadyForQuery.
    async fn several(&mut self, parts: &[Bytes], plans: &[(Arc<Planned>, usize)]) -> Result<(), End> {
        for (number, (part, (planned, end))) in parts.iter().zip(plans).enumerate() {
            let executed = self.executes(planned, part).await?;
            let (planned, part, end) = match &executed {
                Some((planned, part)) => (planned, part, &part.len()),
                None => (planned, part, end),
            };
            let verb = &planned.facts.verb;
            self.held = Held::default();
            match verb {
                Verb::Begin { bare: false, .. } if self.ours => {
                    self.put_query(part, &[]);
                    self.queue.push(Expected { hold: true, done: Done::TakeOver, ..Expected::client(Kind::Query) });
                    self.settle_query(planned).await?;
                    self.ours = self.held.failed;
                }
                Verb::Begin { .. } if self.ours => {
                    // The implicit transaction becomes the client's block.
                    self.ours = false;
                    self.status = b'T';
                    // The server hears of no Query.
                    frame::close_statement(&mut self.server.out, b"");
                    self.queue.push(Expected::of(Kind::Close, To::Nobody));
                    frame::complete(&mut self.client.out, b"BEGIN");
                    continue;
                }
                _ if self.in_block() && ends(verb) && !(self.ours && implicit::refusal(verb).is_some()) => {
                    self.end_among_several(part, planned, *end).await?;
                }
                _ => {
                    if !self.in_block() && !matches!(verb, Verb::Begin { .. }) {
                        self.begin_ours();
                    }
                    self.enter_late(planned);
                    match implicit::refusal(verb).filter(|_| self.ours) {
                        Some(report) => {
                            self.put_refused(report, Kind::Query, true);
                            self.settle_query(planned).await?;
                        }
                        None => self.send_whole(part, planned, *end).await?,
                    }
                }
            }
            // The last is complete when the implicit transaction is committed.
            if !(self.ours && number + 1 == parts.len())
                && let Some(complete) = self.held.complete.take()
            {
                self.client.out.extend_from_slice(&complete);
            }
            if self.held.failed {
                break;
            }
        }
        if self.ours {
            return self.commit_ours().await;
        }
        frame::ready(&mut self.client.out, self.status);
        Ok(())
    }

    async fn end_among_several(&mut self, part: &Bytes, planned: &Planned, end: usize) -> Result<(), End> {
        if std::mem::take(&mut self.ours) {
            // As PostgreSQL does: the implicit transaction is no block, and yet it ends here.
            implicit::no_transaction(&mut self.client.out);
        }
        match Ending::of(&planned.facts.verb) {
            Some(ending) => self.commit_held(part, ending).await?,
            None => {
                self.send(part, planned, end, true);
                self.settle().await?;
            }
        }
        Ok(())
    }
}

fn ends(verb: &Verb) -> bool {
    matches!(verb, Verb::Commit { .. } | Verb::PrepareTransaction | Verb::Rollback { .. })
}
