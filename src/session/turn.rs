//! Which of a client's two server sessions a frame is for (`legs`): that on new, the authority of the tables that migrate, or that on old, where the others stay.
//! `plan::route` tells by the tables that a statement names; what it names none of goes to new, and what ends or parts a block to where that is open.

use std::sync::Arc;

use bytes::{Buf, Bytes};

use super::books::{Prepared, There};
use super::expect::{Expected, Kind, To};
use super::legs::Placed;
use super::{End, Session};
use crate::phase::Side;
use crate::plan::Plan;
use crate::plan::cache::Planned;
use crate::plan::route::{Route, calls_staying};
use crate::sql;
use crate::sql::facts::Verb;
use crate::sql::lex::lex;
use crate::wire::frame::{self, Fields, HEAD, Head, Report};

/// What has become of a frame.
pub(super) enum Turned {
    /// The session that it is for is in use: it takes its way.
    Go,
    /// It was answered.
    Done,
}

/// A statement as it was read.
type Part = (Arc<Planned>, Bytes);

impl Session {
    /// Before a frame is worked through: the session that it is for comes into use.
    pub(super) async fn turn(&mut self, head: Head) -> Result<Turned, End> {
        match head.tag {
            b'S' => {
                self.legs.ran = false;
                return Ok(Turned::Go);
            }
            b'Q' | b'P' | b'B' | b'D' | b'E' | b'C' | b'F' => {}
            _ => return Ok(Turned::Go),
        }
        if !self.queue.is_empty() && (!self.unsynced || head.tag == b'Q') {
            // Whether a block is open, and where, is known only when that is answered.
            self.settle().await?;
        }
        if self.queue.skipping() {
            return Ok(Turned::Go);
        }
        if self.queue.is_empty() && !self.unsynced {
            self.note_sent();
        }
        let turned = match head.tag {
            b'Q' => self.turn_query(head).await,
            b'P' => self.turn_parse(head).await,
            b'B' => self.turn_bind(head).await,
            b'D' | b'C' => self.turn_named(head).await,
            b'E' => self.turn_execute(head).await,
            _ => self.come_to(head, Some(Side::New), false).await,
        };
        if matches!(turned, Ok(Turned::Go)) && !self.queue.skipping() {
            self.close_forgotten();
        }
        turned
    }

    /// What the client has closed while the other session was in use, in front of what it sends now.
    fn close_forgotten(&mut self) {
        for name in std::mem::take(self.legs.closed.get_mut(self.side)) {
            if self.prepared.get(&name).is_none_or(|known| known.there == There::Nothing) {
                frame::close_statement(&mut self.server.out, &name);
                self.queue.push(Expected::of(Kind::Close, To::Nobody));
            }
        }
    }

    async fn turn_query(&mut self, head: Head) -> Result<Turned, End> {
        if self.client.inb.len() < head.total {
            return self.come_to(head, Some(Side::New), false).await;
        }
        let payload = &self.client.inb[HEAD..head.total];
        let text = Bytes::copy_from_slice(payload.strip_suffix(b"\0").unwrap_or(payload));
        let parts = self.parts_of(&text);
        let place = match self.place(&parts) {
            Ok(place) => place,
            Err(report) => return Ok(self.refuse(head, report)),
        };
        let leaves = parts.first().is_some_and(|(planned, _)| leaves_failed(&planned.facts.verb));
        if matches!(self.come_to(head, place, leaves).await?, Turned::Done) || self.queue.skipping() {
            return Ok(Turned::Done);
        }
        if let [(planned, text)] = &parts[..]
            && self.is_on_both()
            && is_of_block(&planned.facts.verb)
        {
            return self.on_both(head, &planned.facts.verb, text).await;
        }
        for (planned, text) in &parts {
            self.note_placed(planned, text).await?;
            self.legs.note_sending(&planned.facts.verb, text);
        }
        Ok(Turned::Go)
    }

    /// The statements of a text.
    fn parts_of(&self, text: &Bytes) -> Vec<Part> {
        let whole = self.plan_for(text).0;
        if whole.facts.verb == Verb::Other {
            let statements = sql::split(&self.legible(text));
            if statements.len() > 1 {
                let parts = statements.iter().map(|statement| text.slice(statement.range.clone()));
                return parts.map(|part| (self.plan_for(&part).0, part)).collect();
            }
        }
        vec![(whole, text.clone())]
    }

    async fn turn_parse(&mut self, head: Head) -> Result<Turned, End> {
        if self.client.inb.len() < head.total {
            return self.come_to(head, Some(Side::New), false).await;
        }
        let payload = Bytes::copy_from_slice(&self.client.inb[HEAD..head.total]);
        frame::check(b'P', &payload)?;
        let mut fields = Fields::new(&payload);
        let (name, text) = (payload.slice_ref(fields.string()?), payload.slice_ref(fields.string()?));
        let part = (self.plan_for(&text).0, text);
        let there = |leg: &super::legs::Leg| leg.prepared.contains_key(&name).then_some(leg.side);
        let taken = self.legs.other.as_deref().and_then(there);
        let place = match taken.filter(|_| !name.is_empty() && !self.prepared.contains_key(&name)) {
            // PostgreSQL refuses a name that is taken.
            Some(side) => Ok(Some(side)),
            None => self.place(std::slice::from_ref(&part)),
        };
        let place = match place {
            Ok(place) => place,
            Err(report) => return Ok(self.refuse(head, report)),
        };
        if matches!(self.come_to(head, place, leaves_failed(&part.0.facts.verb)).await?, Turned::Done) {
            return Ok(Turned::Done);
        }
        if name.is_empty()
            && let Some(leg) = self.legs.other.as_deref_mut()
        {
            leg.prepared.remove(&name);
        }
        Ok(Turned::Go)
    }

    /// Comes to where the statement of this name runs, and has it there. None: nobody knows it.
    async fn reach_statement(&mut self, head: Head, name: &Bytes) -> Result<(Turned, Option<Part>), End> {
        let other = self.legs.other.as_deref().and_then(|leg| leg.prepared.get(name));
        let Some(known) = self.prepared.get(name).or(other).cloned() else {
            let by_sql = self.legs.named.iter().any(|(named, _)| named.as_bytes() == &name[..]);
            let place = if by_sql { Some(Side::Old) } else { None };
            return Ok((self.come_to(head, place, false).await?, None));
        };
        let Some(text) = known.text.clone() else { return Ok((Turned::Go, None)) };
        let part = (self.plan_for(&text).0, text);
        let place = match self.place(std::slice::from_ref(&part)) {
            Ok(place) => place,
            Err(report) => return Ok((self.refuse(head, report), None)),
        };
        if matches!(self.come_to(head, place, leaves_failed(&part.0.facts.verb)).await?, Turned::Done) {
            return Ok((Turned::Done, None));
        }
        if !self.prepared.contains_key(name) {
            let there = There::Nothing;
            self.prepared.insert(name.clone(), Prepared { there, planned: None, ..known });
        }
        Ok((Turned::Go, Some(part)))
    }

    async fn turn_bind(&mut self, head: Head) -> Result<Turned, End> {
        let Some(name) = self.name_in(head, b'B') else { return Ok(Turned::Go) };
        let portal = {
            let mut fields = Fields::new(&self.client.inb[HEAD..head.total.min(self.client.inb.len())]);
            Bytes::copy_from_slice(fields.string()?)
        };
        let (turned, part) = self.reach_statement(head, &name).await?;
        if matches!(turned, Turned::Done) {
            return Ok(Turned::Done);
        }
        let (verb, text) = match part {
            Some((planned, text)) => {
                self.note_placed(&planned, &text).await?;
                let verb = planned.facts.verb.clone();
                let kept = matches!(verb, Verb::Begin { .. }) || is_of_block(&verb);
                (verb, if kept { text } else { Bytes::new() })
            }
            None => (Verb::Other, Bytes::new()),
        };
        self.legs.portals.insert(portal, Placed { side: self.side, verb, text });
        Ok(Turned::Go)
    }

    /// Describe and Close.
    async fn turn_named(&mut self, head: Head) -> Result<Turned, End> {
        let (kind, name) = {
            let mut fields = Fields::new(&self.client.inb[HEAD..head.total.min(self.client.inb.len())]);
            let (Ok(kind), Ok(name)) = (fields.byte(), fields.string()) else { return Ok(Turned::Go) };
            (kind, Bytes::copy_from_slice(name))
        };
        match (head.tag, kind) {
            (b'D', b'S') => Ok(self.reach_statement(head, &name).await?.0),
            (_, b'P') => {
                let place = self.legs.portals.get(&name).map(|placed| placed.side);
                if head.tag == b'C' {
                    self.legs.portals.remove(&name);
                }
                self.come_to(head, place, true).await
            }
            _ => {
                if let Some(leg) = self.legs.other.as_deref_mut()
                    && leg.prepared.remove(&name).is_some_and(|known| known.there != There::Nothing)
                {
                    self.legs.closed.get_mut(leg.side).push(name);
                }
                Ok(Turned::Go)
            }
        }
    }

    async fn turn_execute(&mut self, head: Head) -> Result<Turned, End> {
        let placed = {
            let mut fields = Fields::new(&self.client.inb[HEAD..head.total.min(self.client.inb.len())]);
            let Ok(name) = fields.string() else { return Ok(Turned::Go) };
            self.legs.portals.get(name).map(|placed| (placed.side, placed.verb.clone(), placed.text.clone()))
        };
        let Some((side, verb, text)) = placed else { return Ok(Turned::Go) };
        if matches!(self.come_to(head, Some(side), leaves_failed(&verb)).await?, Turned::Done) {
            return Ok(Turned::Done);
        }
        if self.is_on_both() && is_of_block(&verb) {
            return self.on_both(head, &verb, &text).await;
        }
        self.legs.ran |= !matches!(verb, Verb::Begin { .. });
        self.legs.note_sending(&verb, &text);
        Ok(Turned::Go)
    }

    /// Where these statements, of one text, run. None: where the session is.
    fn place(&self, parts: &[Part]) -> Result<Option<Side>, Report> {
        let Some((first, _)) = parts.first() else { return Ok(None) };
        let other = self.legs.other.as_deref();
        if !leaves_failed(&first.facts.verb) {
            // A block that has failed says so, whatever it is asked.
            if self.status == b'E' {
                return Ok(None);
            }
            if let Some(leg) = other.filter(|leg| leg.status == b'E') {
                return Ok(Some(leg.side));
            }
        }
        let (mut staying, mut migrating) = (None, None);
        for (planned, text) in parts {
            match self.route_of(planned, text) {
                Route::Undecided => {}
                Route::Staying => staying = Some(planned),
                Route::Migrating => migrating = Some(planned),
                Route::Both { staying, migrating } => return Err(touches_both(&staying, &migrating)),
                Route::Ambiguous(name) => return Err(ambiguous(&name)),
            }
        }
        let of_block = |part: &Part| is_of_block(&part.0.facts.verb) || matches!(part.0.facts.verb, Verb::Begin { .. });
        match (staying, migrating) {
            (Some(_), Some(_)) => Err(one_text()),
            (Some(planned), None) => {
                if parts.len() > 1 && parts.iter().any(|(planned, _)| sets_session(&planned.facts.verb))
                    || parts.iter().any(of_block) && (self.status != b'I' || !is_whole_block(parts))
                {
                    return Err(one_text());
                }
                match &planned.plan {
                    Plan::Opaque(opaque) if self.strict() && !opaque.ddl => Err(unseen()),
                    _ => Ok(Some(Side::Old)),
                }
            }
            (None, _) if parts.len() > 1 && self.is_on_both() && parts.iter().any(of_block) => Err(one_text()),
            (None, None) if parts.len() == 1 && of_block(&parts[0]) && self.status != b'I' && !self.is_on_both() => {
                Ok(None)
            }
            (None, _) => Ok(Some(Side::New)),
        }
    }

    /// What `plan::route` says, and what this session knows beside.
    fn route_of(&self, planned: &Planned, text: &[u8]) -> Route {
        if planned.route != Route::Undecided {
            return planned.route.clone();
        }
        let named = |name: &str| self.legs.named.iter().any(|(known, _)| known == name);
        let stays = match &planned.facts.verb {
            Verb::Execute(name) | Verb::Deallocate(Some(name)) => named(name),
            Verb::Cursor => {
                let names = |token: sql::lex::Token| sql::name::fold(text, &token);
                !self.legs.cursors.is_empty()
                    && lex(text).filter_map(names).any(|word| self.legs.cursors.contains(&word))
            }
            Verb::Select => {
                let only_last = planned.facts.functions.len() == 1 && planned.facts.functions[0].name == "lastval";
                only_last && self.legs.drawn_on_old
                    || calls_staying(&self.legible(text), &planned.facts, &self.world.catalog, Side::New)
            }
            _ => false,
        };
        if stays { Route::Staying } else { Route::Undecided }
    }

    /// The session of that side comes into use, if it can. `leaves`: what follows may leave a block that has failed.
    async fn come_to(&mut self, head: Head, side: Option<Side>, leaves: bool) -> Result<Turned, End> {
        let Some(side) = side.filter(|side| *side != self.side) else { return Ok(Turned::Go) };
        if !self.queue.is_empty() {
            self.settle().await?;
        }
        if self.queue.skipping() {
            return Ok(Turned::Go);
        }
        let begins = self.legs.sent.iter().any(|(verb, _)| matches!(verb, Verb::Begin { .. }));
        if self.ours || self.unsynced && self.legs.ran && self.status == b'I' && !begins {
            return Ok(self.refuse(head, one_pipeline()));
        }
        if self.unsynced {
            self.sync_ours().await?;
            self.unsynced = false;
        }
        self.note_sent();
        if self.status == b'E' && !leaves {
            return Ok(Turned::Go);
        }
        Ok(match self.use_side(side).await? {
            Some(report) => self.refuse(head, report),
            None => Turned::Go,
        })
    }

    /// The frame is answered with an error.
    pub(super) fn refuse(&mut self, head: Head, report: Report) -> Turned {
        self.client.inb.advance(head.total.min(self.client.inb.len()));
        let kind = match head.tag {
            b'Q' | b'F' => Kind::Query,
            _ => Kind::Bind,
        };
        self.unsynced = kind == Kind::Bind;
        self.put_refused(report, kind, false);
        Turned::Done
    }

    /// What a statement that is about to run on the session in use means for the other one.
    async fn note_placed(&mut self, planned: &Planned, text: &Bytes) -> Result<(), End> {
        let verb = &planned.facts.verb;
        let writes = matches!(verb, Verb::Insert | Verb::Merge | Verb::CopyFromStdin);
        if writes || planned.facts.functions.iter().any(|function| function.name == "nextval") {
            self.legs.drawn_on_old = self.is_away();
        }
        match verb {
            Verb::Prepare(name) if self.is_away() => {
                self.legs.named.push((String::from_utf8_lossy(name.as_bytes()).into_owned(), text.clone()));
            }
            Verb::Deallocate(Some(name)) if self.is_away() => self.legs.named.retain(|(known, _)| known != name),
            Verb::Declare { name, .. } if self.is_away() => self.legs.cursors.push(name.clone()),
            Verb::Deallocate(None) => self.forget_other().await,
            Verb::Discard(what) if what == "all" => self.forget_other().await,
            _ => {}
        }
        if self.is_away() {
            let class = if planned.facts.targets.is_empty() { "pass" } else { "write" };
            planned.see(&self.settings.application);
            self.shared.metrics.statements.with_label_values(&[class, self.side.name()]).inc();
        } else if planned.alters {
            self.legs.alters();
        }
        Ok(())
    }

    /// All that was prepared is dropped: on the session on old, too.
    async fn forget_other(&mut self) {
        self.legs.named.clear();
        if let Some(leg) = self.legs.other.as_deref_mut().filter(|leg| leg.side == Side::Old) {
            leg.prepared.clear();
            if leg.status != b'I' {
                let _ = leg.query(b"DEALLOCATE ALL").await;
                return;
            }
            self.leave_other().await;
        }
    }

    /// A statement of SQL's PREPARE, on its way to another authority, over a table that stays: it is prepared again where that is.
    pub(super) fn prepares_staying(&mut self, statement: &Bytes) -> bool {
        let planned = self.plan_for(statement).0;
        match &planned.facts.verb {
            Verb::Prepare(name) if self.world.splits() && planned.route == Route::Staying => {
                self.legs.named.push((name.clone(), statement.clone()));
                true
            }
            _ => false,
        }
    }
}

/// It ends a block, or a part of it.
pub(super) fn is_of_block(verb: &Verb) -> bool {
    leaves_failed(verb)
        || matches!(verb, Verb::PrepareTransaction | Verb::Savepoint(_) | Verb::Release(_) | Verb::SetTransaction)
}

/// It may leave a block that has failed.
pub(super) fn leaves_failed(verb: &Verb) -> bool {
    matches!(verb, Verb::Commit { .. } | Verb::Rollback { .. } | Verb::RollbackTo(_))
}

/// It changes what holds for the session, and not for one transaction.
fn sets_session(verb: &Verb) -> bool {
    matches!(verb, Verb::Set { local: false, .. } | Verb::Reset(_) | Verb::Discard(_) | Verb::Prepare(_))
}

/// BEGIN; ...; COMMIT, and no other end between.
fn is_whole_block(parts: &[Part]) -> bool {
    let verb = |part: &Part| part.0.facts.verb.clone();
    let [first, within @ .., last] = parts else { return false };
    let ends = |verb: &Verb| matches!(verb, Verb::Commit { chain: false } | Verb::Rollback { chain: false });
    matches!(verb(first), Verb::Begin { .. })
        && ends(&verb(last))
        && !within.iter().any(|part| ends(&verb(part)) || matches!(verb(part), Verb::Begin { .. }))
}

fn touches_both(staying: &str, migrating: &str) -> Report {
    Report::error(
        "0A000",
        format!("this statement needs tables of two databases: {staying} stays on old, and {migrating} is on new"),
        "Read the one and then the other, in one transaction if need be; `crossfade report` lists such statements beforehand. `federate: true` answers reads over both.",
    )
}

fn ambiguous(name: &str) -> Report {
    Report::error(
        "0A000",
        format!("{name} may mean a table that stays on old or one that is on new, depending on search_path"),
        "Write its schema in front of it.",
    )
}

fn one_text() -> Report {
    Report::error(
        "0A000",
        "the statements of this text belong to two databases (some of their tables stay on old, and others are on new)",
        "Send them one by one, in a transaction if they belong together.",
    )
}

fn one_pipeline() -> Report {
    Report::error(
        "0A000",
        "the statements of this pipeline belong to two databases (some of their tables stay on old, and others are on new)",
        "Send Sync between them, or BEGIN in front of them.",
    )
}

fn unseen() -> Report {
    Report::error(
        "0A000",
        "this statement, over tables that stay on old, calls a function that may write tables which are on new, and mirror.strict is on",
        "Call the function by itself, or set mirror.strict: false.",
    )
}
