//! Statements about rows that only old has, where new is the authority: what runs in front of them, in their transaction. docs/protocols.md, *Lazy*.
//!
//! The first is always a touch: the transaction's snapshot of old must be older than new's snapshot of the statement.

use bytes::Bytes;

use super::expect::To;
use super::moved::Bound;
use super::{End, Held, Kept, Session};
use crate::plan::cache::Planned;
use crate::plan::lazy::{Brings, Lazy, refused_because};
use crate::wire::frame::{self, HEAD, Head, Report};

const TOUCH_NAME: &[u8] = b"crossfade_touch";
const BRING_NAME: &[u8] = b"crossfade_bring";
/// Formats and values of no parameters.
const NONE: &[u8] = &[0; 4];

/// Something runs in front of it.
pub(super) fn runs_before(planned: &Planned) -> bool {
    matches!(planned.lazy, Lazy::Merged(_) | Lazy::Brings(_))
}

/// PREPARE's own text is not taken apart: whoever executes it is told so.
pub(super) fn executed(planned: std::sync::Arc<Planned>) -> std::sync::Arc<Planned> {
    match planned.lazy {
        Lazy::Whole => planned,
        _ => std::sync::Arc::new(Planned { lazy: Lazy::Refused("prepare"), ..Planned::clone(&planned) }),
    }
}

/// What the client is told of a statement that cannot be done right.
pub(super) fn refusal(planned: &Planned) -> Option<Report> {
    let Lazy::Refused(reason) = planned.lazy else { return None };
    let (why, instead) = refused_because(reason);
    let hint = format!("{instead} Or complete the table: `crossfade backfill`.");
    Some(Report::error(
        "0A000",
        format!("crossfade cannot run this while rows of a table are still on old alone: {why} ({reason})"),
        hint.trim_start(),
    ))
}

impl Session {
    /// In front of a statement of a Query, in an open block. False: it has failed, and the client was told.
    pub(super) async fn bring_before_query(
        &mut self,
        text: &Bytes,
        planned: &Planned,
        hold: bool,
    ) -> Result<bool, End> {
        if !runs_before(planned) {
            return Ok(true);
        }
        self.settle().await?;
        if self.status == b'E' || self.queue.skipping() {
            return Ok(true);
        }
        self.kept = Kept::default();
        match &planned.lazy {
            Lazy::Merged(merged) => self.touch_merged(&merged.touch, To::Us),
            Lazy::Brings(brings) => {
                self.put_once(TOUCH_NAME, brings.touch.as_bytes(), &[], NONE, To::Us);
                let bring = self.bring(brings, text);
                self.put_once(BRING_NAME, &bring, &[], NONE, To::Us);
            }
            Lazy::Whole | Lazy::Refused(_) => {}
        }
        self.settle().await?;
        let Some(error) = self.kept.error.take() else { return Ok(true) };
        self.client.out.extend_from_slice(&error);
        self.sync_ours().await?;
        self.held = Held { complete: None, failed: true };
        if !hold {
            frame::ready(&mut self.client.out, self.status);
        }
        Ok(false)
    }

    /// In front of a read that is merged.
    fn touch_merged(&mut self, touch: &str, to: To) {
        self.shared.metrics.lazy_reads.with_label_values(&["merged"]).inc();
        self.put_once(TOUCH_NAME, touch.as_bytes(), &[], NONE, to);
    }

    /// In front of a Bind, in an open block: the portal's snapshot is taken by Bind. An error is the client's, and the server passes over what follows.
    pub(super) async fn bring_before_bind(
        &mut self,
        planned: &Planned,
        statement: &Bytes,
        head: Head,
    ) -> Result<(), End> {
        match &planned.lazy {
            Lazy::Merged(merged) => self.touch_merged(&merged.touch, To::Nobody),
            Lazy::Brings(brings) => {
                let text = self.prepared.get(statement).and_then(|prepared| prepared.text.clone()).unwrap_or_default();
                let payload = Bytes::copy_from_slice(&self.client.inb[HEAD..head.total]);
                let bound = Bound { text: text.clone(), payload };
                self.settle().await?;
                if self.queue.skipping() {
                    return Ok(());
                }
                let (parameters, count) = bound.parameters()?;
                let types = if count > 0 { self.parameter_types(&bound).await? } else { Vec::new() };
                if self.queue.skipping() {
                    return Ok(());
                }
                self.put_once(TOUCH_NAME, brings.touch.as_bytes(), &[], NONE, To::Nobody);
                let bring = self.bring(brings, &text);
                self.put_once(BRING_NAME, &bring, &types, parameters, To::Nobody);
            }
            Lazy::Whole | Lazy::Refused(_) => {}
        }
        Ok(())
    }

    /// A text that is not as it was planned (its shape is the same) brings nothing, and fails.
    fn bring(&self, brings: &Brings, text: &Bytes) -> Vec<u8> {
        let legible = self.legible(text);
        let bring = if self.settings.escapes { None } else { brings.bring(&legible) };
        bring.unwrap_or_else(|| {
            b"SELECT crossfade.touch_old(pg_catalog.current_setting('standard_conforming_strings')::pg_catalog.bool AND false)".to_vec()
        })
    }
}
