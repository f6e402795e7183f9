//! SQL's PREPARE and EXECUTE of a write. The client's statement stays as it is; beside it a twin is prepared that has the hidden column, and EXECUTE
//! runs that. So whatever happens to the twin, and in whatever phase, the client's name means what the client has said.
//!
//! What was prepared unseen (in a phase without a mirror, in a text too long to read) is opaque when it is executed.

use std::sync::Arc;

use bytes::Bytes;

use super::books::{Terms, There};
use super::expect::{Done, Expected, Kind, To};
use super::lazy::executed;
use super::{End, Kept, Session};
use crate::plan::cache::Planned;
use crate::plan::weave::{Edit, edited};
use crate::plan::{Capture, Effect, Plan, Splice};
use crate::sql;
use crate::sql::facts::Verb;
use crate::wire::frame::{self, HEAD};

const MAKE_NAME: &[u8] = b"crossfade_make_twin";

/// What twins' names begin with.
const TWIN: &str = "crossfade_execute_";

/// A statement that the client has prepared in SQL.
#[derive(Clone, Debug)]
pub(super) struct Named {
    /// The text of its PREPARE.
    text: Bytes,
    /// Its plan, on which terms it was made, and the name of the twin, where it needs one.
    twin: Option<(Terms, Arc<Planned>, Option<Bytes>)>,
}

/// The client's names, and twins whose names are gone.
#[derive(Debug, Default)]
pub(super) struct NamedStatements {
    by_name: std::collections::HashMap<String, Named>,
    gone: Vec<Bytes>,
    made: u64,
}

impl NamedStatements {
    /// The server has prepared this text. None: it was not seen.
    pub(super) fn prepared(&mut self, name: &str, text: Option<Bytes>) {
        self.forget(name);
        if let Some(text) = text {
            self.by_name.insert(name.to_owned(), Named { text, twin: None });
        }
    }

    /// DEALLOCATE.
    pub(super) fn forget(&mut self, name: &str) {
        let twin = self.by_name.remove(name).and_then(|named| named.twin).and_then(|(.., twin)| twin);
        self.gone.extend(twin);
    }

    /// An ErrorResponse's payload that names a twin, with the client's name instead. None: it names none.
    pub(super) fn in_clients_words(&self, payload: &[u8]) -> Option<Vec<u8>> {
        memchr::memmem::find(payload, TWIN.as_bytes())?;
        self.by_name.iter().find_map(|(name, named)| {
            let (.., twin) = named.twin.as_ref()?;
            let said = [b"\"", twin.as_deref()?, b"\""].concat();
            let at = memchr::memmem::find(payload, &said)?;
            Some([&payload[..=at], name.as_bytes(), &payload[at + said.len() - 1..]].concat())
        })
    }

    /// DEALLOCATE ALL: the twins are gone, too.
    pub(super) fn clear(&mut self) {
        self.by_name.clear();
        self.gone.clear();
    }
}

/// What PREPARE changes in our books when it completes. `text`: its own.
pub(super) fn prepares(planned: &Planned, text: Option<&Bytes>) -> Option<Done> {
    match &planned.facts.verb {
        Verb::Prepare(name) => Some(Done::Prepare(name.clone(), text.cloned())),
        _ => None,
    }
}

/// The text with another name in place of its second token, and these changes behind it.
fn renamed(text: &[u8], name: &str, more: Vec<Edit>) -> Option<Bytes> {
    let token = sql::lex(text).filter(|token| !token.kind.is_gap()).nth(1)?;
    let mut edits = vec![Edit { range: token.range(), text: name.to_owned() }];
    edits.extend(more);
    Some(edited(&text[..sql::end(text)], &edits))
}

/// The same plan for a text that has the hidden column already.
fn spliced(planned: &Planned, capture: &Capture) -> Arc<Planned> {
    let capture = Capture { splice: Splice::default(), ..capture.clone() };
    Arc::new(Planned { plan: Plan::Capture(Arc::new(capture)), ..planned.clone() })
}

impl Session {
    /// What an EXECUTE in a Query comes to: the plan of what it executes, and the text to send. None: as it is.
    pub(super) async fn executes(
        &mut self,
        planned: &Planned,
        text: &Bytes,
    ) -> Result<Option<(Arc<Planned>, Bytes)>, End> {
        let Verb::Execute(name) = &planned.facts.verb else { return Ok(None) };
        if self.status == b'E' || !planned.facts.functions.is_empty() {
            // What the arguments call may write.
            return Ok(None);
        }
        let key = Bytes::copy_from_slice(name.as_bytes());
        if self.prepared.contains_key(&key) {
            return Ok(Some((executed(self.executes_parsed(&key)), text.clone())));
        }
        if self.settings.escapes {
            return Ok(None);
        }
        let Some((planned, twin)) = self.twin_of(name).await? else { return Ok(None) };
        let text = twin
            .as_ref()
            .map_or_else(|| Some(text.clone()), |twin| renamed(text, &String::from_utf8_lossy(twin), Vec::new()));
        Ok(text.map(|text| (executed(planned), text)))
    }

    /// EXECUTE of a statement that was prepared by Parse: the server has it with its hidden column.
    fn executes_parsed(&mut self, name: &Bytes) -> Arc<Planned> {
        let planned = self.current(name);
        let there = self.prepared.get(name).map(|prepared| prepared.there.clone());
        match &planned.plan {
            Plan::Capture(capture) if matches!(there, Some(There::Spliced(_))) => spliced(&planned, capture),
            _ => planned,
        }
    }

    /// The plan of what a name stands for, and the twin to execute instead.
    async fn twin_of(&mut self, name: &str) -> Result<Option<(Arc<Planned>, Option<Bytes>)>, End> {
        let terms = self.terms();
        let Some(named) = self.named.by_name.get(name) else { return Ok(None) };
        let text = named.text.clone();
        if let Some((of, planned, twin)) = &named.twin
            && *of == terms
        {
            return Ok(Some((planned.clone(), twin.clone())));
        }
        let limits = sql::Limits { bytes_max: self.shared.config.load().limits.statement, ..Default::default() };
        let Some(inner) = sql::read(&text, limits).inner else { return Ok(None) };
        let (planned, _) = self.plan_for(&text[inner.0.clone()]);
        let made = match &planned.plan {
            // Which rows it reaches cannot be asked without its parameters.
            Plan::Capture(capture) if capture.effect == Some(Effect::Moved) => return Ok(None),
            Plan::Capture(capture) => match self.make_twin(&text, &inner.0, &capture.splice).await? {
                Some(twin) => (terms, spliced(&planned, capture), Some(twin)),
                None => return Ok(None),
            },
            _ => (terms, planned.clone(), None),
        };
        let (_, planned, twin) = made.clone();
        self.named.forget(name);
        self.named.by_name.insert(name.to_owned(), Named { text, twin: Some(made) });
        Ok(Some((planned, twin)))
    }

    /// Prepares a twin, behind a savepoint where a block is open. None: the server does not take it.
    /// `inner`: the statement inside PREPARE, where `splice` goes.
    async fn make_twin(
        &mut self,
        text: &Bytes,
        inner: &std::ops::Range<usize>,
        splice: &Splice,
    ) -> Result<Option<Bytes>, End> {
        self.settle().await?;
        self.named.made += 1;
        let twin = format!("{TWIN}{}", self.named.made);
        let Some(mut edits) = splice.edits(&text[inner.clone()], inner.len()) else { return Ok(None) };
        for edit in &mut edits {
            edit.range = edit.range.start + inner.start..edit.range.end + inner.start;
        }
        let Some(prepare) = renamed(text, &twin, edits) else { return Ok(None) };
        for gone in std::mem::take(&mut self.named.gone) {
            frame::close_statement(&mut self.server.out, &gone);
            self.queue.push(Expected::of(Kind::Close, To::Us));
        }
        let in_block = self.in_block();
        if in_block {
            self.put_ours(super::moved::SET_NAME, super::moved::SET, &[], &[], To::Us);
        }
        self.kept = Kept::default();
        self.put_once(MAKE_NAME, &prepare, &[], &[0; 4], To::Us);
        self.settle().await?;
        let error = self.kept.error.take();
        self.sync_ours().await?;
        if let Some(error) = &error {
            tracing::debug!(message = %frame::server_error(&error[HEAD..]).message, "no twin of a prepared statement");
            if in_block {
                self.put_ours(super::moved::BACK_NAME, super::moved::BACK, &[], &[], To::Us);
            }
        }
        if in_block {
            self.release_key().await?;
        }
        Ok(error.is_none().then(|| Bytes::from(twin)))
    }
}
