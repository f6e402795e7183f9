//! How this session's texts are read: as its server will, whose settings for it change what a text means.

use std::borrow::Cow;
use std::sync::Arc;

use super::books::Terms;
use super::expect::{Kind, Told};
use super::{End, Session};
use crate::phase::Side;
use crate::plan::cache::{Key, Planned};
use crate::plan::lazy::{Lazy, lazy, with_names};
use crate::plan::read::{Read, read};
use crate::plan::route::{Route, route};
use crate::plan::{ANY_ROLE, Opaque, Plan, narrow, plan};
use crate::sql;
use crate::sql::facts::Verb;
use crate::wire::frame::Report;

/// The plan of what nobody reads: it may write anything.
pub(super) fn unread_plan() -> Planned {
    let facts = sql::facts::Facts { verb: Verb::Other, ..sql::read(b"", sql::Limits::default()) };
    let opaque = Opaque { reason: "unparsed", tables: Vec::new(), unwrapped: false, ddl: false, replays: false };
    Planned::new(facts, Plan::Opaque(Arc::new(opaque)))
}

/// The statement says of itself that it changes how texts are read.
pub(super) fn changes_lexing(planned: &Planned) -> bool {
    let lexing = |name: &str| name == "standard_conforming_strings" || name == "client_encoding";
    match &planned.facts.verb {
        Verb::Set { name, .. } | Verb::Reset(Some(name)) => lexing(name),
        Verb::Reset(None) => true,
        Verb::Discard(what) => what == "all",
        _ => planned.facts.functions.iter().any(|function| function.name == "set_config"),
    }
}

/// The same, or a function that it calls may.
pub(super) fn changes_reading(planned: &Planned) -> bool {
    matches!(planned.plan, Plan::Opaque(_)) || changes_lexing(planned)
}

impl Session {
    /// What the plan of a text depends on.
    pub(super) fn terms(&self) -> Terms {
        Terms {
            generation: self.world.generation,
            utf8: self.settings.client_encoding == "UTF8",
            role_changed: self.settings.role_changed,
        }
    }

    /// The plan of a text in this world, and where its hidden column goes.
    pub(super) fn plan_for(&self, text: &[u8]) -> (Arc<Planned>, usize) {
        let limit = self.shared.config.load().limits.statement;
        let text = &self.legible(text)[..];
        if text.len() > limit || !self.believable(text) {
            // It may be about rows that only old has.
            let lazy = self.lazy_unread();
            return (Arc::new(Planned { lazy, ..unread_plan() }), text.len());
        }
        let shape = sql::shape(text);
        let encoding_matches = self.settings.client_encoding == "UTF8";
        // Not the side of the server session in use: that may be the other one (`legs`).
        let side = self.world.phase.authority();
        let role = (!self.world.catalog.no_select.get(side).is_empty()).then(|| match self.settings.role_changed {
            true => Arc::from(ANY_ROLE),
            false => Arc::from(self.user()),
        });
        let key =
            Key { shape: shape.text.into(), generation: self.world.generation, encoding_matches, role: role.clone() };
        let planned = self.shared.plans.get(key, || {
            let facts = sql::read(text, sql::Limits { bytes_max: limit, ..Default::default() });
            let plan = plan(&facts, &self.world.catalog, side, role.as_deref(), encoding_matches);
            let plan = narrow(plan, text, &self.world.catalog, side);
            let route = route(text, &facts, &self.world.catalog, side);
            let lazy = match route {
                Route::Staying => Lazy::Whole,
                _ => lazy(text, &facts, &plan, &self.world.catalog, side),
            };
            let plan = with_names(plan, &lazy);
            let read = match plan {
                Plan::Pass => read(text, &facts, &self.world.catalog, side),
                _ => Read::Stays("writes"),
            };
            Planned { read, route, lazy, ..Planned::new(facts, plan) }
        });
        // The body of DO is a literal, which the shape leaves out.
        let planned = if planned.facts.verb == Verb::Do { planned.for_body(text) } else { planned };
        (planned, shape.end)
    }

    fn lazy_unread(&self) -> Lazy {
        let lazy = self.world.phase.authority() == Side::New && self.world.catalog.behind.is_some();
        if lazy { Lazy::Refused("form") } else { Lazy::Whole }
    }

    /// The text as our lexer has to see it; offsets stay.
    pub(super) fn legible<'t>(&self, text: &'t [u8]) -> Cow<'t, [u8]> {
        let masked = sql::mask_characters(text, &self.settings.client_encoding);
        match self.settings.escapes {
            true => Cow::Owned(sql::mask_escapes(&masked)),
            false => masked,
        }
    }

    /// Names are the same in the server's encoding.
    fn believable(&self, text: &[u8]) -> bool {
        self.settings.client_encoding == "UTF8" || sql::names_are_ascii(text)
    }

    /// Before a text is read: a statement in front of it may have changed how it is to be read, of which the server tells with ReadyForQuery only. In
    /// a block it can be asked for that without ending anything.
    pub(super) async fn hear_settings(&mut self, text: &[u8]) -> Result<(), End> {
        let either_way = text.is_ascii() && memchr::memchr(b'\\', text).is_none();
        if either_way || !self.settings.unsettled {
            return Ok(());
        }
        self.settle().await?;
        if self.queue.skipping() {
            return Ok(());
        }
        if !self.in_block() {
            self.begin_ours();
        }
        self.sync_ours().await
    }

    /// A Query or FunctionCall that nobody reads follows: every table may be written. A text may even end the transaction and begin another, so
    /// that what it may write is owed from before its first statement until the session is at rest.
    pub(super) async fn unread(&mut self, kind: Kind) -> Result<(), End> {
        self.settle().await?;
        self.serving.alter();
        if self.queue.skipping() {
            return Ok(());
        }
        let refused = |what: &str, hint: &str| {
            let message = format!("crossfade cannot mirror what a FunctionCall or an unread text may write {what}");
            Err(End::Refused(Report::fatal("0A000", message, hint)))
        };
        if self.strict() {
            return refused(
                "while mirror.strict is on",
                "Call the function in a SELECT, send shorter statements, or set mirror.strict: false.",
            );
        }
        if kind == Kind::Query && self.lazy_unread() != Lazy::Whole {
            return refused(
                "while rows of a table are still on old alone",
                "Send shorter statements, or complete the table with `crossfade backfill`.",
            );
        }
        if self.ours {
            return refused("behind a write of the same pipeline", "Send Sync before it.");
        }
        if kind == Kind::Query && self.status == b'E' {
            return refused("in a transaction that has failed", "Send ROLLBACK by itself.");
        }
        let opaque = Opaque { reason: "unparsed", tables: Vec::new(), unwrapped: true, ddl: false, replays: false };
        self.shared.metrics.opaque_writes.with_label_values(&[opaque.reason]).inc();
        if self.in_block() && kind == Kind::Call {
            self.audit_from_here(opaque.reason, &[], Told::Nobody);
            return Ok(());
        }
        let (writes, debts) = (std::mem::take(&mut self.writes), self.debts.take());
        let registered = self.register_unwrapped(&opaque).await?;
        (self.writes, self.debts) = (writes, debts);
        self.registered.extend(registered);
        Ok(())
    }
}
