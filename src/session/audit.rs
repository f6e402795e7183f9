//! The audit of writes that no image shows: before COMMIT the server's own row counters say which tables were written.
//!
//! `look` puts a hidden query into the flight; its reply is compared with the look before and with the images that were captured since.
//! What they do not explain taints that table. Counters carry unflushed counts of earlier transactions and of statements that failed, so the
//! first look comes right before the first opaque statement, one before each later SAVEPOINT, and one after each ROLLBACK TO, which only
//! starts afresh. A look that fails leaves a failed block behind, from which only ROLLBACK TO leads on. Transactions with plain statements only are never looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tracing::info;

use super::expect::{Expected, Kind, Look, To, Told, Written};
use super::{End, Session};
use crate::catalog::{Catalog, Table};
use crate::phase::Side;
use crate::plan::cache::Planned;
use crate::plan::{Audited, Opaque, Plan};
use crate::sql::facts::Verb;
use crate::wire::frame::{self, Report};

pub(super) const LOOK_NAME: &[u8] = b"crossfade_look";
pub(super) const CONSTRAINTS_NAME: &[u8] = b"crossfade_constraints";

/// One line of text for all tables: number, rows inserted, updated, deleted, and the sum of the files' numbers (a file's number only grows),
/// partitions included. Counters of this transaction: pg_stat_get_xact_*; TRUNCATE leaves none, but a new file.
const LOOK: &[u8] = b"SELECT pg_catalog.current_setting('track_counts'), pg_catalog.string_agg(\
    pg_catalog.concat_ws(' ', c.n, c.i, c.u, c.d, c.f), ',') FROM (SELECT t.n, \
    pg_catalog.sum(pg_catalog.pg_stat_get_xact_tuples_inserted(t.o)) AS i, \
    pg_catalog.sum(pg_catalog.pg_stat_get_xact_tuples_updated(t.o)) AS u, \
    pg_catalog.sum(pg_catalog.pg_stat_get_xact_tuples_deleted(t.o)) AS d, \
    pg_catalog.sum(COALESCE(pg_catalog.pg_relation_filenode(t.o)::pg_catalog.int8, 0)) AS f \
    FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.oid[]), pg_catalog.unnest($2::pg_catalog.int4[])) AS t(o, n) GROUP BY t.n) AS c";

/// Counters of one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    inserted: i64,
    updated: i64,
    deleted: i64,
    files: i64,
}

/// Images of one table that were captured since the last look, by the kind of statement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    inserts: i64,
    /// INSERT ... ON CONFLICT DO UPDATE: either.
    upserts: i64,
    updates: i64,
    deletes: i64,
}

impl Tally {
    /// The images are all that the counters have counted since. An UPDATE that moves a row to another partition counts as a delete and an
    /// insert.
    fn explains(&self, from: &Counts, to: &Counts, partitioned: bool) -> bool {
        let inserted = to.inserted - from.inserted;
        let updated = to.updated - from.updated;
        let moves = to.deleted - from.deleted - self.deletes;
        let upserts_inserted = inserted - self.inserts - moves;
        to.files == from.files
            && (0..=if partitioned { self.updates } else { 0 }).contains(&moves)
            && (0..=self.upserts).contains(&upserts_inserted)
            && updated == self.updates - moves + self.upserts - upserts_inserted
    }
}

/// What is known of a transaction that has an opaque statement.
#[derive(Debug)]
pub(super) struct Audit {
    /// The last look.
    base: Option<BTreeMap<u32, Counts>>,
    tallies: BTreeMap<u32, Tally>,
    /// What the opaque statements may have written, for when the counters cannot say. None: any table.
    reach: Option<BTreeSet<u32>>,
    /// The counters cannot say.
    blind: bool,
    /// Of the first opaque statement.
    reason: &'static str,
}

impl Audit {
    fn new(reason: &'static str) -> Audit {
        Audit { base: None, tallies: BTreeMap::new(), reach: Some(BTreeSet::new()), blind: false, reason }
    }

    fn reaches(&mut self, tables: &[Arc<Table>]) {
        match &mut self.reach {
            Some(reach) if !tables.is_empty() => reach.extend(tables.iter().map(|table| table.number)),
            reach => *reach = None,
        }
    }

    /// A captured image.
    pub(super) fn count(&mut self, table: u32, written: Written) {
        let tally = self.tallies.entry(table).or_default();
        match written {
            Written::Insert => tally.inserts += 1,
            Written::Upsert => tally.upserts += 1,
            Written::Update => tally.updates += 1,
            Written::Delete => tally.deletes += 1,
        }
    }

    /// Images of rows of this table that INSERT or COPY has added since the last look.
    pub(super) fn inserts(&mut self, table: u32) -> &mut i64 {
        &mut self.tallies.entry(table).or_default().inserts
    }

    /// A look's reply: the tables whose counters the images do not explain.
    fn seen(&mut self, row: &[Option<Bytes>], rebase: bool, catalog: &Catalog, side: Side) -> Vec<u32> {
        let text = |at: usize| row.get(at).and_then(Option::as_ref).and_then(|value| std::str::from_utf8(value).ok());
        if text(0) != Some("on") {
            self.blind = true;
        }
        let Some(now) = text(1).unwrap_or_default().split(',').map(counts).collect::<Option<BTreeMap<u32, Counts>>>()
        else {
            self.blind = true;
            return Vec::new();
        };
        let tallies = std::mem::take(&mut self.tallies);
        let Some(before) = self.base.replace(now) else { return Vec::new() };
        if rebase {
            return Vec::new();
        }
        let now = self.base.iter().flatten();
        let unexplained = now.filter(|(number, counts)| {
            let partitioned = catalog.tables.get(number).is_some_and(|table| !table.partitions.get(side).is_empty());
            let from = before.get(number).copied().unwrap_or_default();
            !tallies.get(number).copied().unwrap_or_default().explains(&from, counts, partitioned)
        });
        unexplained.map(|(&number, _)| number).collect()
    }
}

/// `number inserted updated deleted files`.
fn counts(text: &str) -> Option<(u32, Counts)> {
    let mut numbers = text.split(' ').map(|number| number.parse::<i64>().ok());
    let mut next = || numbers.next().flatten();
    let number = u32::try_from(next()?).ok()?;
    Some((number, Counts { inserted: next()?, updated: next()?, deleted: next()?, files: next()? }))
}

impl Session {
    /// Before a statement goes to the server: the look that it needs, in its flight.
    pub(super) fn look_before(&mut self, planned: &Planned, told: Told) {
        let (reason, tables): (&'static str, &[Arc<Table>]) = match &planned.plan {
            Plan::Opaque(opaque) if opaque.unwrapped && !self.in_block() => return,
            // What it names is tainted, and it runs nothing else.
            Plan::Opaque(opaque) if self.replays(opaque) => return,
            Plan::Opaque(opaque) => (opaque.reason, &opaque.tables),
            Plan::Capture(capture) if capture.audited == Audited::Tables => ("cte", &capture.tables),
            Plan::Capture(capture) if capture.audited == Audited::All => {
                (if planned.facts.modifying_cte { "cte" } else { "trigger" }, &[])
            }
            Plan::Copy(copy) if copy.audited => ("trigger", &[]),
            Plan::Copy(copy) => ("copy", std::slice::from_ref(&copy.table)),
            Plan::Truncate(_) if self.audit.is_some() => return self.look(false, told),
            Plan::Pass if self.audit.is_some() && matches!(planned.facts.verb, Verb::Savepoint(_)) => {
                return self.look(false, told);
            }
            _ => return,
        };
        self.audit_from_here(reason, tables, told);
        if let Some(audit) = &mut self.audit {
            // The rows of a cursor WITH HOLD are computed at COMMIT, behind the last look.
            audit.blind |= matches!(planned.facts.verb, Verb::Declare { hold: true, .. });
        }
    }

    /// Behind a statement that has made the counters say something else.
    pub(super) fn look_behind(&mut self, planned: &Planned, told: Told) {
        let restarts = matches!(planned.plan, Plan::Truncate(_)) || matches!(planned.facts.verb, Verb::RollbackTo(_));
        if restarts && self.audit.is_some() {
            self.look(true, told);
        }
    }

    /// An opaque statement follows. In a failed block it does nothing.
    pub(super) fn audit_from_here(&mut self, reason: &'static str, tables: &[Arc<Table>], told: Told) {
        if self.status == b'E' && told == Told::Nobody {
            return;
        }
        let first = self.audit.is_none();
        self.audit.get_or_insert_with(|| Audit::new(reason)).reaches(tables);
        if first {
            self.look(false, told);
        }
    }

    pub(super) fn look(&mut self, rebase: bool, told: Told) {
        if self.status == b'E' && told == Told::Nobody && !rebase {
            return;
        }
        let (oids, numbers) = self.relations();
        let to = To::Audit(Look { rebase, told });
        self.put_ours(LOOK_NAME, LOOK, &[25, 25], &[Some(oids.as_bytes()), Some(numbers.as_bytes())], to.clone());
        if told == Told::Nobody {
            // Around a Query: an error of ours may not make the server pass over it.
            frame::sync(&mut self.server.out);
            self.queue.push(Expected::of(Kind::Sync, to));
        }
    }

    /// OIDs of the migrating tables and their partitions, and each one's number, as arrays.
    fn relations(&self) -> (String, String) {
        let list = |numbers: Vec<String>| format!("{{{}}}", numbers.join(","));
        let by_oid = self.world.catalog.by_oid.get(self.side);
        let oids = by_oid.keys().map(u32::to_string).collect();
        let numbers = by_oid.values().map(|table| table.number.to_string()).collect();
        (list(oids), list(numbers))
    }

    /// A look was answered.
    pub(super) fn looked(&mut self, row: &[Option<Bytes>], look: Look) {
        let Some(audit) = &mut self.audit else { return };
        let found = audit.seen(row, look.rebase, &self.world.catalog, self.side);
        self.writes.suspects.extend(found);
    }

    /// Before COMMIT: deferred triggers write now, then the last look. False: COMMIT fails, with the error in `kept`.
    pub(super) async fn audited(&mut self) -> Result<bool, End> {
        if self.audit.is_none() {
            return Ok(true);
        }
        let to = To::Audit(Look { rebase: false, told: Told::Us });
        self.put_ours(CONSTRAINTS_NAME, b"SET CONSTRAINTS ALL IMMEDIATE", &[], &[], to);
        self.look(false, Told::Us);
        self.settle().await?;
        if self.kept.error.is_some() {
            return Ok(false);
        }
        let Some(audit) = self.audit.take() else { return Ok(true) };
        let mut found: BTreeSet<u32> = std::mem::take(&mut self.writes.suspects).into_iter().collect();
        if audit.blind || audit.base.is_none() {
            found.extend(audit.reach.unwrap_or_else(|| self.world.catalog.tables.keys().copied().collect()));
        }
        if found.is_empty() {
            return Ok(true);
        }
        if self.strict() {
            self.fail_commit(&found).await?;
            return Ok(false);
        }
        found.into_iter().for_each(|table| self.taint(table, audit.reason));
        Ok(true)
    }

    /// A write out of sight may have changed this table.
    pub(super) fn taint(&mut self, table: u32, reason: &'static str) {
        if let Some(known) = self.world.catalog.tables.get(&table) {
            let label = known.label();
            self.shared.metrics.taints.with_label_values(&[&label]).inc();
            info!(table = %label, reason, "a write out of sight: the whole table is owed");
        }
        self.writes.taint(table, reason);
    }

    pub(super) fn strict(&self) -> bool {
        self.shared.config.load().mirror.strict
    }

    /// This statement is refused: by `mirror.strict`, or since rows that it needs are still on old.
    pub(super) fn refusal(&self, planned: &Planned) -> Option<Report> {
        let lazy = super::lazy::refusal(planned);
        if lazy.is_some() {
            return lazy;
        }
        match &planned.plan {
            Plan::Opaque(opaque) if self.refuses_ddl(opaque).is_some() => self.refuses_ddl(opaque),
            Plan::Opaque(opaque) if self.replays(opaque) => None,
            Plan::Opaque(opaque) if self.strict() && !(opaque.ddl && opaque.tables.is_empty()) => Some(refused(opaque)),
            _ => None,
        }
    }

    /// What the statement wrote out of sight was seen only now: the transaction fails, as by a deferred constraint.
    async fn fail_commit(&mut self, tables: &BTreeSet<u32>) -> Result<(), End> {
        let labels = tables.iter().filter_map(|table| self.world.catalog.tables.get(table)).map(|table| table.label());
        let report = Report::error(
            "0A000",
            format!(
                "the transaction has written {} in a way that crossfade cannot mirror, and mirror.strict is on",
                labels.collect::<Vec<_>>().join(", ")
            ),
            "Nothing was committed. Write the rows by INSERT, UPDATE or DELETE of the client, or set mirror.strict: false.",
        );
        self.fail_here(report).await
    }

    /// The transaction fails on the server, so that its state and the client's agree; `kept` has what the client is told.
    pub(super) async fn fail_here(&mut self, report: Report) -> Result<(), End> {
        let mut error = BytesMut::new();
        report.put(&mut error);
        self.put_failing(Kind::Bind, To::Us, false);
        self.settle().await?;
        self.kept.error = Some(error.freeze());
        Ok(())
    }

    /// A message that fails on the server, so that its state and the client's agree; the client is told `report`.
    pub(super) fn put_refused(&mut self, report: Report, kind: Kind, hold: bool) {
        self.put_failing(kind, To::Refused(std::rc::Rc::new(report)), hold);
    }

    /// Sends what can only fail.
    pub(super) fn put_failing(&mut self, kind: Kind, to: To, hold: bool) {
        if kind == Kind::Query {
            self.put_query(b"refused by crossfade", &[]);
        } else {
            frame::bind(&mut self.server.out, b"", b"refused by crossfade", &[], [].into_iter(), 0);
        }
        self.queue.push(Expected { hold, ..Expected::of(kind, to) });
    }
}

fn refused(opaque: &Opaque) -> Report {
    let tables: Vec<String> = opaque.tables.iter().map(|table| table.label()).collect();
    let of = if tables.is_empty() { String::new() } else { format!(" of {}", tables.join(", ")) };
    Report::error(
        "0A000",
        format!(
            "crossfade cannot mirror what this statement may write{of} ({}), and mirror.strict is on",
            opaque.reason
        ),
        match opaque.reason {
            "explain" => {
                "EXPLAIN without ANALYZE runs nothing, and EXPLAIN ANALYZE can be run on the database itself, in a transaction that is rolled back. Or set mirror.strict: false."
            }
            _ => {
                "Write the rows by plain INSERT, UPDATE or DELETE; `crossfade explain` shows what can be mirrored. Or set mirror.strict: false."
            }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(inserted: i64, updated: i64, deleted: i64) -> Counts {
        Counts { inserted, updated, deleted, files: 7 }
    }

    #[test]
    fn images_explain_exactly_what_they_show() {
        let tally = Tally { inserts: 2, upserts: 1, updates: 3, deletes: 1 };
        let from = counts(10, 10, 10);
        for (inserted, updated, deleted, plain, partitioned) in [
            (2, 4, 1, true, true),
            (3, 3, 1, true, true),
            // One, two or three of the updates moved their rows.
            (3, 3, 2, false, true),
            (4, 2, 2, false, true),
            (6, 0, 4, false, true),
            (7, 0, 5, false, false),
            (3, 4, 1, false, false),
            (2, 5, 1, false, false),
            (2, 4, 2, false, false),
            (2, 3, 1, false, false),
            (0, 0, 0, false, false),
        ] {
            let to = counts(10 + inserted, 10 + updated, 10 + deleted);
            assert_eq!(tally.explains(&from, &to, false), plain, "{inserted} {updated} {deleted}");
            assert_eq!(tally.explains(&from, &to, true), partitioned, "{inserted} {updated} {deleted}, partitioned");
            assert!(!tally.explains(&from, &Counts { files: 8, ..to }, true), "TRUNCATE makes a new file");
        }
    }

    #[test]
    fn a_reply_that_cannot_be_read_leaves_the_audit_blind() {
        let row = |on: &str, text: &str| [Some(Bytes::from(on.to_owned())), Some(Bytes::from(text.to_owned()))];
        let catalog = Catalog::default();
        let mut audit = Audit::new("function");
        assert!(audit.seen(&row("on", "1 0 0 0 5,2 1 0 0 6"), false, &catalog, Side::Old).is_empty());
        audit.count(2, Written::Insert);
        assert_eq!(audit.seen(&row("on", "1 0 0 0 6,2 2 0 0 6"), false, &catalog, Side::Old), [1]);
        assert_eq!(audit.seen(&row("on", "1 0 0 0 6,2 3 0 0 6"), true, &catalog, Side::Old), [0u32; 0]);
        assert_eq!(audit.seen(&row("on", "1 0 0 0 6,2 3 0 0 6"), false, &catalog, Side::Old), [0u32; 0]);
        assert!(!audit.blind);
        audit.seen(&row("on", "nonsense"), false, &catalog, Side::Old);
        assert!(audit.blind);
        let mut off = Audit::new("function");
        off.seen(&row("off", "1 0 0 0 5"), false, &catalog, Side::Old);
        assert!(off.blind);
    }
}
