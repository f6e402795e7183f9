//! An UPDATE that may change keys. RETURNING of PostgreSQL before 18 shows the row as it then is, and not which key is gone. So the rows are read and
//! locked by a SELECT with the same tables and conditions, in front of the UPDATE and behind a hidden savepoint.
//!
//! The two need not reach the same rows: the UPDATE has a later snapshot, a trigger may keep a row as it was, a condition may call random(). They did if
//! as many rows were updated as had been read, and none of the latter is still there in the version that was read (its ctid): it was locked, so nobody
//! else can have changed it. Otherwise back to the savepoint and again; the client has not seen anything yet. When that was in vain, or the
//! answer is too large to be held back, the UPDATE stands and the table is tainted.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use super::expect::{Done, Expected, Kind, To, Told};
use super::mirrored::{put_bind, way};
use super::{End, Held, Kept, Session};
use crate::catalog::Table;
use crate::mirror::writes::{Op, RolledBack};
use crate::plan::cache::Planned;
use crate::plan::{Capture, Effect, Plan, image};
use crate::sql;
use crate::wire::frame::{self, Fields, Report};

/// How often the rows are read and the UPDATE run before its keys are taken for unknown.
const ATTEMPTS: usize = 3;

const SAVEPOINT: &[u8] = b"crossfade_key";
pub(super) const SET_NAME: &[u8] = b"crossfade_key_savepoint";
pub(super) const BACK_NAME: &[u8] = b"crossfade_key_back";
pub(super) const SET: &[u8] = b"SAVEPOINT crossfade_key";
pub(super) const BACK: &[u8] = b"ROLLBACK TO SAVEPOINT crossfade_key";
pub(super) const RELEASE_NAME: &[u8] = b"crossfade_key_release";
const ROWS_NAME: &[u8] = b"crossfade_key_rows";

/// OID of tid[].
const TIDS: u32 = 1010;

/// A client's Bind of an UPDATE that may change keys: what is needed to read its rows, and to run it again.
#[derive(Debug)]
pub struct Bound {
    /// The statement's text.
    pub text: Bytes,
    /// Bind's payload.
    pub payload: Bytes,
}

impl Bound {
    fn names(&self) -> Result<(&[u8], &[u8]), End> {
        let mut fields = Fields::new(&self.payload);
        Ok((fields.string()?, fields.string()?))
    }

    /// Formats and values of the parameters as they stand in Bind, and how many values there are.
    pub(super) fn parameters(&self) -> Result<(&[u8], i16), End> {
        let mut fields = Fields::new(&self.payload);
        fields.string()?;
        fields.string()?;
        let from = fields.rest();
        let mut fields = Fields::new(from);
        for _ in 0..fields.int16()? {
            fields.int16()?;
        }
        let count = fields.int16()?;
        for _ in 0..count {
            fields.value()?;
        }
        Ok((&from[..from.len() - fields.rest().len()], count))
    }
}

/// How the client sent it.
pub(super) enum Sent<'a> {
    /// As a Query, or a part of one.
    Query {
        /// The statement.
        text: &'a Bytes,
        /// Where the hidden column is spliced.
        end: usize,
        /// Its end is held back.
        hold: bool,
    },
    /// As Execute of a portal.
    Portal {
        /// The whole Execute.
        frame: Bytes,
        /// What was bound.
        bound: Rc<Bound>,
        /// The portal's number.
        number: u64,
    },
}

impl Sent<'_> {
    fn told(&self) -> Told {
        match self {
            Sent::Query { .. } => Told::Nobody,
            Sent::Portal { .. } => Told::Client,
        }
    }
}

/// Versions of rows (tid) by the relation that they are in.
type Versions = BTreeMap<u32, (Arc<Table>, Vec<Bytes>)>;

/// The rows that the SELECT has found.
enum Before {
    /// As they were, with the version of each (a tid) by table.
    Rows(Vec<(Arc<Table>, image::Row)>, Versions),
    /// They cannot be had.
    Unknown,
    /// The transaction has failed as the UPDATE would have; the client has the error.
    Failed,
}

/// This statement's plan, where it may change keys.
pub(super) fn moves(planned: &Planned) -> Option<&Arc<Capture>> {
    match &planned.plan {
        Plan::Capture(capture) if capture.effect == Some(Effect::Moved) => Some(capture),
        _ => None,
    }
}

impl Session {
    /// Runs it, within a block. When this returns, it was answered, or the server passes over it.
    pub(super) async fn run_moved(&mut self, planned: &Planned, capture: &Capture, sent: &Sent<'_>) -> Result<(), End> {
        self.settle().await?;
        if self.status == b'E' || self.queue.skipping() {
            self.put_sent(planned, sent, false)?;
            return Ok(());
        }
        self.held = Held::default();
        let told = sent.told();
        if self.audit.is_some() {
            self.look(false, told);
        }
        self.put_ours(SET_NAME, SET, &[], &[], To::Us);
        for attempt in 1..=ATTEMPTS {
            let (rows, versions) = match self.rows_before(planned, capture, sent).await? {
                Before::Rows(rows, versions) => (rows, versions),
                Before::Unknown if self.strict() => return self.refuse_moved(capture, sent).await,
                Before::Unknown => {
                    self.put_sent(planned, sent, attempt > 1)?;
                    self.settle().await?;
                    if !self.has_failed() {
                        self.lost(&capture.tables, "key-change");
                        self.release_key().await?;
                    }
                    return Ok(());
                }
                Before::Failed => return Ok(()),
            };
            self.kept = Kept::default();
            self.writes.savepoint(SAVEPOINT);
            let count = rows.len();
            rows.into_iter().for_each(|(table, row)| self.writes.push(Op::Delete(table, row)));
            self.put_sent(planned, sent, attempt > 1)?;
            let mut answer = BytesMut::new();
            let mut last = !self.settle_apart(&mut answer).await? || attempt == ATTEMPTS;
            if self.has_failed() {
                self.client.out.extend_from_slice(&answer);
                return Ok(());
            }
            // Rows that the client has not fetched yet: it is not known how many there are.
            last |= matches!(sent, Sent::Portal { number, .. } if self.suspended.contains_key(number));
            // A trigger may take rows out each time, and what else it does (nextval) is not undone.
            last |= capture.tables.iter().any(|table| table.effects.get(self.side).before_row);
            let mut exact = updated(&self.kept.tag) == Some(count);
            if exact {
                match self.all_gone(versions, sent).await? {
                    Some(gone) => exact = gone,
                    None => return Ok(()),
                }
            }
            if exact || last {
                if !exact && self.strict() {
                    return self.refuse_moved(capture, sent).await;
                }
                if !exact {
                    self.lost(&capture.tables, "key-change");
                }
                self.writes.release(SAVEPOINT);
                self.release_key().await?;
                self.client.out.extend_from_slice(&answer);
                return Ok(());
            }
            self.held.complete = None;
            self.put_ours(BACK_NAME, BACK, &[], &[], To::Us);
            if self.writes.rollback_to(SAVEPOINT) == RolledBack::Spilled {
                self.give_up("rolled-back");
            }
            self.writes.release(SAVEPOINT);
            if self.audit.is_some() {
                self.look(true, told);
            }
        }
        Ok(())
    }

    /// `mirror.strict` is on, and which keys are gone is not known.
    async fn refuse_moved(&mut self, capture: &Capture, sent: &Sent<'_>) -> Result<(), End> {
        let labels: Vec<String> = capture.tables.iter().map(|table| table.label()).collect();
        self.fail_here(Report::error(
            "0A000",
            format!(
                "crossfade cannot tell which keys of {} this UPDATE has changed (key-change), and mirror.strict is on",
                labels.join(", ")
            ),
            "Nothing was changed. Try again, change the rows by DELETE and INSERT, or set mirror.strict: false.",
        ))
        .await?;
        match self.kept.error.take() {
            Some(error) => self.fail_moved(&error, sent).await,
            None => Ok(()),
        }
    }

    pub(super) async fn release_key(&mut self) -> Result<(), End> {
        self.put_ours(RELEASE_NAME, b"RELEASE SAVEPOINT crossfade_key", &[], &[], To::Us);
        self.settle().await
    }

    /// The UPDATE has failed, and its transaction or pipeline with it.
    fn has_failed(&self) -> bool {
        self.status == b'E' || self.queue.skipping() || self.held.failed
    }

    /// The UPDATE itself, with the hidden column. `again`: its portal has run, and is bound anew.
    fn put_sent(&mut self, planned: &Planned, sent: &Sent<'_>, again: bool) -> Result<(), End> {
        let cut = |binary: bool| way(planned, binary).cut().map_or(To::Client, To::Cut);
        let Some(capture) = moves(planned) else { return Ok(()) };
        match sent {
            Sent::Query { text, end, hold } => {
                let edits = self.edits(planned, text, *end);
                self.put_query(text, &edits);
                self.queue.push(Expected { hold: *hold, ..Expected::of(Kind::Query, cut(false)) });
            }
            Sent::Portal { frame, bound, number } => {
                let (portal, _) = bound.names()?;
                if again {
                    frame::close_portal(&mut self.server.out, portal);
                    self.queue.push(Expected::of(Kind::Close, To::Nobody));
                    put_bind(&mut self.server.out, &bound.payload, capture.returning)?;
                    self.queue.push(Expected::of(Kind::Bind, To::Nobody));
                }
                let binary = self.portals.get(portal).is_some_and(|portal| portal.binary);
                self.queue.push(Expected { done: Done::Fetched(*number), ..Expected::of(Kind::Execute, cut(binary)) });
                if capture.returning {
                    self.server.out.extend_from_slice(frame);
                } else {
                    frame::execute(&mut self.server.out, portal);
                }
            }
        }
        Ok(())
    }

    /// Waits for all answers, with what goes to the client kept in `answer`. False: it grew too long, and has gone to the client.
    async fn settle_apart(&mut self, answer: &mut BytesMut) -> Result<bool, End> {
        if self.queue.needs_flush() {
            frame::flush(&mut self.server.out);
        }
        while !self.queue.is_empty() {
            self.drive_server().await?;
            std::mem::swap(&mut self.client.out, answer);
            let replies = self.replies();
            std::mem::swap(&mut self.client.out, answer);
            replies?;
            self.spill_if_full().await;
            if answer.len() > self.limit {
                self.client.out.extend_from_slice(&std::mem::take(answer));
                self.settle().await?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The rows that the UPDATE is about to reach, locked.
    async fn rows_before(&mut self, planned: &Planned, capture: &Capture, sent: &Sent<'_>) -> Result<Before, End> {
        let text = match sent {
            Sent::Query { text, .. } => *text,
            Sent::Portal { bound, .. } => &bound.text,
        };
        let limit = self.shared.config.load().limits.statement;
        let limits = sql::Limits { bytes_max: limit, ..Default::default() };
        let row = planned.facts.targets.first().map(|target| target.row.as_str()).unwrap_or_default();
        let list = format!("{}, {row}.ctid", capture.image());
        // Where backslashes escape, our reader knows the text only with these masked.
        let select = if self.settings.escapes { None } else { sql::rows_of_update(text, limits, &list, row) };
        let Some(select) = select else { return Ok(Before::Unknown) };
        self.kept = Kept::default();
        let types = match sent {
            Sent::Portal { bound, .. } if bound.parameters()?.1 > 0 => self.parameter_types(bound).await?,
            _ => Vec::new(),
        };
        let parameters: &[u8] = match sent {
            Sent::Portal { bound, .. } => bound.parameters()?.0,
            Sent::Query { .. } => &[0; 4],
        };
        self.put_once(ROWS_NAME, &select, &types, parameters, To::Us);
        self.settle().await?;
        if self.kept.error.is_some() {
            return self.not_read(sent).await;
        }
        Ok(self.rows_found())
    }

    /// The types that the server has found for the parameters of a client's statement.
    pub(super) async fn parameter_types(&mut self, bound: &Bound) -> Result<Vec<u32>, End> {
        let (_, statement) = bound.names()?;
        frame::put(&mut self.server.out, b'D', |out| {
            out.put_u8(b'S');
            out.put_slice(statement);
            out.put_u8(0);
        });
        self.queue.push(Expected::of(Kind::Describe, To::Us));
        self.settle().await?;
        let mut fields = Fields::new(&self.kept.types);
        let count = fields.int16()?;
        let mut types = Vec::new();
        for _ in 0..count {
            let oid = fields.take(4)?;
            types.push(u32::from_be_bytes([oid[0], oid[1], oid[2], oid[3]]));
        }
        Ok(types)
    }

    /// A statement of ours that is used once, with its parameters as in a Bind (formats, then values). Its rows come as text.
    pub(super) fn put_once(&mut self, name: &[u8], text: &[u8], types: &[u32], parameters: &[u8], to: To) {
        let out = &mut self.server.out;
        // One that has failed was not closed.
        frame::close_statement(out, name);
        frame::parse(out, name, text, types);
        frame::put(out, b'B', |out| {
            for part in [name, name] {
                out.put_slice(part);
                out.put_u8(0);
            }
            out.put_slice(parameters);
            out.put_i16(0);
        });
        frame::execute(out, name);
        frame::close_portal(out, name);
        frame::close_statement(out, name);
        for kind in [Kind::Close, Kind::Parse, Kind::Bind, Kind::Execute, Kind::Close, Kind::Close] {
            self.queue.push(Expected::of(kind, to.clone()));
        }
    }

    /// The SELECT has failed. What has to do with others (a lock, a deadlock, a cancel, a lack of memory) would have hit the UPDATE as well, and is
    /// the client's; for anything else the UPDATE gets its chance.
    async fn not_read(&mut self, sent: &Sent<'_>) -> Result<Before, End> {
        let Some(error) = self.kept.error.take() else { return Ok(Before::Unknown) };
        let code = frame::server_error(&error[frame::HEAD..]).code;
        if !["40", "53", "54", "55", "57", "58"].iter().any(|class| code.starts_with(class)) {
            self.sync_ours().await?;
            self.put_ours(BACK_NAME, BACK, &[], &[], To::Us);
            self.settle().await?;
            return Ok(Before::Unknown);
        }
        self.fail_moved(&error, sent).await?;
        Ok(Before::Failed)
    }

    /// A statement of ours has failed, and the transaction with it: the client gets the error as that of its UPDATE.
    async fn fail_moved(&mut self, error: &[u8], sent: &Sent<'_>) -> Result<(), End> {
        self.client.out.extend_from_slice(error);
        if let Sent::Query { hold, .. } = sent {
            self.sync_ours().await?;
            self.held = Held { complete: None, failed: true };
            if !hold {
                frame::ready(&mut self.client.out, self.status);
            }
        }
        Ok(())
    }

    fn rows_found(&mut self) -> Before {
        if self.kept.bytes > self.shared.config.load().limits.mirror_buffer {
            return Before::Unknown;
        }
        let mut rows = Vec::new();
        let mut versions = Versions::new();
        for found in std::mem::take(&mut self.kept.rows) {
            let [Some(hidden), Some(version)] = &found[..] else { return Before::Unknown };
            let Ok(fields) = image::hidden(hidden, false) else { return Before::Unknown };
            let relation = fields.tableoid;
            let table = self.world.catalog.by_oid.get(self.side).get(&relation).cloned();
            let Some(table) = table else { return Before::Unknown };
            let Ok(row) = image::row(&table, self.side, fields) else { return Before::Unknown };
            versions.entry(relation).or_insert_with(|| (table.clone(), Vec::new())).1.push(version.clone());
            rows.push((table, row));
        }
        Before::Rows(rows, versions)
    }

    /// None of these versions is there any more: their rows were written by this transaction. None: the transaction has failed, and the client
    /// was told.
    async fn all_gone(&mut self, versions: Versions, sent: &Sent<'_>) -> Result<Option<bool>, End> {
        for (relation, (table, versions)) in versions {
            let text = format!(
                "SELECT 1 FROM {} AS t WHERE t.tableoid OPERATOR(pg_catalog.=) '{relation}'::pg_catalog.oid \
                 AND t.ctid OPERATOR(pg_catalog.=) ANY ($1) LIMIT 1",
                table.qualified(self.side)
            );
            let mut list = BytesMut::from(&b"{"[..]);
            for (at, version) in versions.iter().enumerate() {
                list.put_slice(if at == 0 { b"\"" } else { b",\"" });
                list.put_slice(version);
                list.put_u8(b'"');
            }
            list.put_u8(b'}');
            let mut parameters = BytesMut::new();
            parameters.put_i16(0);
            parameters.put_i16(1);
            parameters.put_i32(list.len() as i32);
            parameters.put_slice(&list);
            self.kept = Kept::default();
            self.put_once(ROWS_NAME, text.as_bytes(), &[TIDS], &parameters, To::Us);
            self.settle().await?;
            if let Some(error) = self.kept.error.take() {
                self.fail_moved(&error, sent).await?;
                return Ok(None);
            }
            if !self.kept.rows.is_empty() {
                return Ok(Some(false));
            }
        }
        Ok(Some(true))
    }
}

/// The number of rows in `UPDATE n`.
fn updated(tag: &[u8]) -> Option<usize> {
    std::str::from_utf8(tag.strip_suffix(b"\0")?).ok()?.strip_prefix("UPDATE ")?.parse().ok()
}
