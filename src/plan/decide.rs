//! The rules. A statement that may write a migrating table is captured where its images show all that it does and RETURNING does not change
//! its outcome; else it is opaque, for the first reason that applies.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::splice::{expression, texts, with_action};
use super::within::Inside;
use super::{Audited, Capture, CopyIn, Effect, Opaque, Plan, Splice};
use crate::catalog::{Catalog, Resolution, SideEffects, Table, WRITING_BUILT_IN};
use crate::phase::Side;
use crate::sql::facts::{Facts, Name, OnConflict, Target, Verb};

/// In place of a role: the session may run as any (SET ROLE). What one of them may not read is not captured. No role has an empty name.
pub const ANY_ROLE: &str = "";

/// From this server_version_num on MERGE has RETURNING.
const MERGE_RETURNS: u32 = 170_000;

/// What to do with a statement in a phase in which `authority` is mirrored. `role`: the session's current role, where known. `encoding_matches`: the
/// session's client_encoding is UTF8, as the mirror's sessions' is (SQL_ASCII on a server whose encoding is UTF8 comes to the same).
pub fn plan(facts: &Facts, catalog: &Catalog, authority: Side, role: Option<&str>, encoding_matches: bool) -> Plan {
    let view = View { facts, catalog, side: authority, role, encoding_matches };
    match &facts.verb {
        Verb::Insert | Verb::Update | Verb::Delete => view.write(),
        // SELECT.
        Verb::Other if facts.modifying_cte => view.beside(),
        _ if facts.modifying_cte => view.targets_opaque("cte"),
        Verb::Merge if *catalog.version.get(authority) >= MERGE_RETURNS => view.write(),
        Verb::Merge => view.targets_opaque("merge"),
        Verb::Truncate { cascade, .. } => view.truncate(*cascade),
        Verb::CopyFromStdin => view.copy(),
        Verb::CopyFromServer => view.targets_opaque("copy"),
        Verb::Select | Verb::CopyTo | Verb::Declare { .. } | Verb::Ddl { temporary: true } => view.read(),
        Verb::Explain { analyze: true } => view.explain_analyze(),
        Verb::Execute(_) => opaque("execute", Vec::new()),
        // Some DDL refuses to run inside a block that we open (CREATE INDEX CONCURRENTLY, ALTER TYPE ... ADD VALUE on old servers, CREATE DATABASE).
        Verb::Ddl { temporary: false } => {
            with(opaque("ddl", Vec::new()), |plan| (plan.ddl, plan.unwrapped) = (true, true))
        }
        Verb::Call => with(opaque("call", Vec::new()), |plan| plan.unwrapped = true),
        Verb::Do => with(opaque("do", Vec::new()), |plan| plan.unwrapped = true),
        Verb::Other => opaque("unparsed", Vec::new()),
        // What the session itself looks after, and what writes no row.
        Verb::Begin { .. }
        | Verb::Commit { .. }
        | Verb::Rollback { .. }
        | Verb::Savepoint(_)
        | Verb::Release(_)
        | Verb::RollbackTo(_)
        | Verb::PrepareTransaction
        | Verb::CommitPrepared
        | Verb::RollbackPrepared
        | Verb::Set { .. }
        | Verb::SetTransaction
        | Verb::Reset(_)
        | Verb::Show
        | Verb::Discard(_)
        | Verb::Prepare(_)
        | Verb::Deallocate(_)
        | Verb::Cursor
        | Verb::Explain { analyze: false }
        | Verb::Lock
        | Verb::Notify
        | Verb::Maintenance
        | Verb::Empty => Plan::Pass,
    }
}

fn opaque(reason: &'static str, tables: Vec<Arc<Table>>) -> Plan {
    Plan::Opaque(Arc::new(Opaque { reason, tables, unwrapped: false, ddl: false, replays: false }))
}

fn with(plan: Plan, change: impl FnOnce(&mut Opaque)) -> Plan {
    match plan {
        Plan::Opaque(mut opaque) => {
            change(Arc::make_mut(&mut opaque));
            Plan::Opaque(opaque)
        }
        other => other,
    }
}

/// What one target may be.
enum Written {
    /// One of these migrating tables.
    Migrating(Vec<Arc<Table>>),
    /// A write to it may reach migrating tables in ways that nobody sees.
    Unseen(&'static str, Vec<Arc<Table>>),
    /// No migrating table is reached.
    Elsewhere,
}

/// A statement, seen from the authority.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) facts: &'a Facts,
    pub(super) catalog: &'a Catalog,
    pub(super) side: Side,
    pub(super) role: Option<&'a str>,
    pub(super) encoding_matches: bool,
}

impl View<'_> {
    fn inner(&self) -> Option<View<'_>> {
        self.facts.inner.as_ref().map(|inner| View { facts: &inner.1, ..*self })
    }

    /// It calls a function that may write, by name or behind a view.
    fn calls(&self) -> bool {
        let writes = |function: &Name| {
            let of_users = || self.catalog.writing_functions.get(self.side).contains(&function.name);
            let built_in = || WRITING_BUILT_IN.contains(&function.name.as_str());
            let known = self.catalog.functions.get(self.side).contains(&function.name);
            match function.schema.as_deref() {
                Some("pg_catalog") => built_in(),
                // pg_temp, or made since the catalog was loaded.
                Some(_) if !known => true,
                None if !known && !self.catalog.callable.get(self.side).contains(&function.name) => true,
                Some(_) => of_users(),
                None => built_in() || of_users(),
            }
        };
        let calling =
            |read: &Name| matches!(self.catalog.resolve(self.side, read), Resolution::View { writes: true, .. });
        self.facts.functions.iter().any(writes)
            || self.facts.reads.iter().any(calling)
            || self.inner().is_some_and(|inner| inner.calls())
    }

    fn read(&self) -> Plan {
        if self.calls() { opaque("function", Vec::new()) } else { Plan::Pass }
    }

    fn explain_analyze(&self) -> Plan {
        let Some((_, inner)) = self.facts.inner.as_deref() else { return opaque("explain", Vec::new()) };
        match plan(inner, self.catalog, self.side, self.role, self.encoding_matches) {
            Plan::Pass => Plan::Pass,
            // Naming some tables would say that no other was written.
            Plan::Capture(capture) if capture.audited == Audited::All => opaque("explain", Vec::new()),
            Plan::Capture(capture) => opaque("explain", capture.tables.clone()),
            // What it would be without EXPLAIN: EXPLAIN ANALYZE CREATE TABLE AS does make the table.
            Plan::Opaque(opaque) => with(Plan::Opaque(opaque), |plan| plan.reason = "explain"),
            Plan::Truncate(_) | Plan::Copy(_) => opaque("explain", Vec::new()),
        }
    }

    fn written(&self, table: &Name) -> Written {
        match self.catalog.resolve(self.side, table) {
            Resolution::Tables(tables) => Written::Migrating(tables),
            Resolution::View { tables, .. } => Written::Unseen("view", tables),
            Resolution::Other if self.catalog.triggered.get(self.side).contains(&table.name) => {
                Written::Unseen("trigger", Vec::new())
            }
            Resolution::Other => Written::Elsewhere,
        }
    }

    /// A write that is never captured: opaque, with its tables, unless none of its targets matters.
    fn targets_opaque(&self, reason: &'static str) -> Plan {
        let mut tables = Vec::new();
        let mut unseen = None;
        let mut migrating = false;
        for target in &self.facts.targets {
            match self.written(&target.table) {
                Written::Migrating(found) => {
                    migrating = true;
                    tables.extend(self.reached(found));
                }
                Written::Unseen(why, found) => {
                    unseen.get_or_insert(why);
                    tables.extend(found);
                }
                Written::Elsewhere => {}
            }
        }
        match unseen {
            // Naming some tables would say that no other was written.
            Some(_) if migrating => opaque(reason, Vec::new()),
            Some(why) => opaque(why, Vec::new()),
            None if migrating && self.calls() => opaque(reason, Vec::new()),
            None if migrating => opaque(reason, distinct(tables)),
            None if self.facts.targets.is_empty() => opaque(reason, Vec::new()),
            None => self.read(),
        }
    }

    /// The tables, and those that inherit from them.
    fn reached(&self, tables: Vec<Arc<Table>>) -> Vec<Arc<Table>> {
        let heirs: Vec<Arc<Table>> = tables
            .iter()
            .filter_map(|table| self.catalog.heirs.get(&table.number))
            .flatten()
            .filter_map(|number| self.catalog.tables.get(number).cloned())
            .collect();
        tables.into_iter().chain(heirs).collect()
    }

    /// A statement that writes no migrating table itself, but in its WITH clause.
    fn beside(&self) -> Plan {
        let inside = self.inside(None);
        if !inside.whole || inside.shown.is_empty() {
            return self.targets_opaque("cte");
        }
        let tables = distinct(inside.tables().cloned().collect());
        Plan::Capture(Arc::new(Capture {
            effect: None,
            returning: true,
            tables,
            audited: if inside.more || self.calls() { Audited::All } else { Audited::Tables },
            splice: Splice { within: inside.weaves, ..Splice::default() },
            shown: inside.shown,
        }))
    }

    /// INSERT, UPDATE, DELETE, and MERGE where it has RETURNING.
    pub(super) fn write(&self) -> Plan {
        let Some(target) = self.facts.targets.first() else { return opaque("unparsed", Vec::new()) };
        let tables = match self.written(&target.table) {
            Written::Migrating(tables) => tables,
            Written::Unseen(reason, _) => return opaque(reason, Vec::new()),
            Written::Elsewhere if self.facts.modifying_cte => return self.beside(),
            Written::Elsewhere => return self.read(),
        };
        let calls = self.calls();
        let side_effects =
            calls || self.facts.modifying_cte || tables.iter().any(|table| self.side_effects(target, table));
        let hidden = match self.refusal(target, &tables) {
            None if self.facts.verb == Verb::Merge => self.hidden(target, &tables).map(|hidden| with_action(&hidden)),
            None => self.hidden(target, &tables),
            Some(reason) => Err(reason),
        };
        match hidden {
            Ok(hidden) => self.captured(target, tables, &hidden),
            // What triggers, cascades and functions write beside it is not known, nor which of several tables is meant.
            Err(reason) if side_effects || reason == "ambiguous" => opaque(reason, Vec::new()),
            Err(reason) => opaque(reason, distinct(self.reached(tables))),
        }
    }

    fn captured(&self, target: &Target, tables: Vec<Arc<Table>>, hidden: &str) -> Plan {
        let effect = self.effect(target, &tables);
        let inside = if self.facts.modifying_cte { self.inside(Some((effect, &tables))) } else { Inside::default() };
        let more = self.calls() || tables.iter().any(|table| self.side_effects(target, table));
        let audited = match self.facts.modifying_cte {
            _ if more || inside.more => Audited::All,
            true if inside.whole => Audited::Tables,
            true => Audited::All,
            false => Audited::No,
        };
        let end = format!("{} {hidden}", if self.facts.returning { "," } else { " RETURNING" });
        Plan::Capture(Arc::new(Capture {
            effect: Some(effect),
            returning: self.facts.returning,
            tables: distinct(tables.iter().chain(inside.tables()).cloned().collect()),
            audited,
            splice: Splice { within: inside.weaves, ..Splice::behind(end) },
            shown: inside.shown,
        }))
    }

    fn effect(&self, target: &Target, tables: &[Arc<Table>]) -> Effect {
        match self.facts.verb {
            Verb::Delete => Effect::Gone,
            Verb::Merge => Effect::Merged,
            Verb::Update if tables.iter().any(|table| self.key_may_change(target, table)) => Effect::Moved,
            _ => Effect::Row,
        }
    }

    /// The rows that an UPDATE is about to change can be had by a SELECT in front of it. Those that ON CONFLICT finds cannot.
    fn old_rows_are_had(&self) -> bool {
        self.facts.verb == Verb::Update
            && !self.facts.current_of
            && !self.facts.modifying_cte
            && self.may_be_read_twice()
    }

    /// What the statement reads can be read twice: it calls nothing that would show.
    fn may_be_read_twice(&self) -> bool {
        let noticed = |function: &Name| {
            let name = function.name.as_str();
            ["pg_advisory", "pg_try_advisory", "pg_sleep", "lo_"].iter().any(|prefix| name.starts_with(prefix))
                || ["nextval", "setval", "set_config", "pg_notify"].contains(&name)
        };
        !self.calls() && !self.facts.functions.iter().any(noticed)
    }

    fn updates(&self) -> bool {
        self.facts.verb == Verb::Update
            || self.facts.on_conflict == Some(OnConflict::Update)
            || self.facts.merges.update
    }

    fn inserts(&self) -> bool {
        self.facts.verb == Verb::Insert || self.facts.merges.insert
    }

    fn deletes(&self) -> bool {
        self.facts.verb == Verb::Delete || self.facts.merges.delete
    }

    fn only_adds(&self) -> bool {
        matches!(self.facts.verb, Verb::Insert | Verb::CopyFromStdin | Verb::Merge)
            && !self.updates()
            && !self.deletes()
    }

    /// MERGE may add a row with the key of one that it then removes: their images would come in an order that keys do not allow.
    fn may_add_before_it_removes(&self, table: &Table) -> bool {
        self.facts.merges.insert && self.facts.merges.delete && self.is_checked_later(table)
    }

    /// Triggers or cascades may write more than the statement itself.
    fn side_effects(&self, target: &Target, table: &Table) -> bool {
        let SideEffects { insert, update, delete, rekey, .. } = table.effects.get(self.side);
        // An UPDATE that moves a row to another partition deletes and inserts it.
        let moves = self.updates() && !table.partitions.get(self.side).is_empty();
        (self.inserts() && *insert)
            || (self.updates() && (*update || *rekey && self.key_may_change(target, table)))
            || (self.deletes() && *delete)
            || (moves && (*insert || *delete))
    }

    /// Why the write cannot be captured, by the first reason that applies to any of the tables.
    fn refusal(&self, target: &Target, tables: &[Arc<Table>]) -> Option<&'static str> {
        let refused = |table: &Arc<Table>| {
            let no_select = self.catalog.no_select.get(self.side);
            let denied = |role: &str| match role {
                ANY_ROLE => no_select.iter().any(|(_, refused)| *refused == table.number),
                _ => no_select.contains(&(role.to_owned(), table.number)),
            };
            match () {
                _ if table.opaque.is_some() => Some("definition"),
                _ if *table.row_security.get(self.side) => Some("row-security"),
                _ if *table.rules.get(self.side) => Some("rule"),
                _ if self.role.is_some_and(denied) => Some("privilege"),
                _ if table.key.is_none() && !self.only_adds() => Some("keyless"),
                _ if self.may_add_before_it_removes(table) => Some("merge"),
                _ if self.updates() && self.key_may_change(target, table) && !self.old_rows_are_had() => {
                    Some("key-change")
                }
                _ => None,
            }
        };
        tables.iter().find_map(refused)
    }

    fn key_may_change(&self, target: &Target, table: &Table) -> bool {
        let columns = table.key.iter().flat_map(|key| &key.columns).map(|&at| &table.columns[at]);
        let mut columns = columns.map(|column| (column.name.get(self.side), *column.generated.get(self.side)));
        let kept = |name: &String| self.finds_by_key(table) && self.facts.set_to_excluded.contains(name);
        table.effects.get(self.side).before_row
            || columns.any(|(name, generated)| generated || target.assigned.contains(name) && !kept(name))
    }

    /// The row that ON CONFLICT finds has the key of the row that was to be inserted: setting its key to that one's (as some libraries set all
    /// columns) does not change it.
    fn finds_by_key(&self, table: &Table) -> bool {
        table.key.as_ref().is_some_and(|key| {
            let mut columns: Vec<&String> =
                key.columns.iter().map(|&at| table.columns[at].name.get(self.side)).collect();
            columns.sort_unstable();
            key.bytewise && *key.alone.get(self.side) && self.facts.conflict_columns.iter().eq(columns)
        })
    }

    /// The hidden column for a name that may mean any of these tables.
    pub(super) fn hidden(&self, target: &Target, tables: &[Arc<Table>]) -> Result<String, &'static str> {
        // UPDATE a.t ... FROM b.t: `t` would mean both.
        let name = &target.table.name;
        let twice = |read: &Name| read.name == *name && read.schema != target.table.schema;
        if self.facts.verb != Verb::Insert
            && (target.row == *name || target.row == crate::catalog::quote(name))
            && self.facts.reads.iter().any(twice)
        {
            return Err("ambiguous");
        }
        let listed = self.catalog.partition_names.get(self.side).contains(name);
        let bare_elsewhere = target.table.schema.is_none() && self.catalog.staying.get(self.side).contains(name);
        let mut found: Option<String> = None;
        for table in tables {
            let server = self.catalog.encoding.get(self.side);
            let texts = texts(table, server, self.encoding_matches).ok_or("encoding")?;
            let hidden = expression(table, self.side, &target.row, texts, listed);
            // A list of columns fits one table only, and would fail on another that search_path finds first.
            if found.as_ref().is_some_and(|found| *found != hidden) || (bare_elsewhere && !hidden.ends_with(".*))")) {
                return Err("ambiguous");
            }
            found = Some(hidden);
        }
        found.ok_or("unparsed")
    }

    /// TRUNCATE of tables that all migrate, with what CASCADE reaches.
    fn truncate(&self, cascade: bool) -> Plan {
        let mut tables: BTreeMap<u32, Arc<Table>> = BTreeMap::new();
        let mut elsewhere = false;
        let mut exact = true;
        for target in &self.facts.targets {
            let name = &target.table;
            let Resolution::Tables(found) = self.catalog.resolve(self.side, name) else {
                elsewhere = true;
                exact &= !self.catalog.truncate_reaches.get(self.side).contains(&name.name);
                continue;
            };
            let whole = |table: &Arc<Table>| {
                name.name == *table.name.get(self.side)
                    && !self.catalog.partition_names.get(self.side).contains(&name.name)
            };
            exact &= found.len() == 1 && found.iter().all(whole);
            tables.extend(self.reached(found).into_iter().map(|table| (table.number, table)));
        }
        if cascade {
            let reached: BTreeSet<u32> =
                tables.values().flat_map(|table| table.truncate_cascade.get(self.side)).copied().collect();
            tables
                .extend(reached.iter().filter_map(|number| Some((*number, self.catalog.tables.get(number)?.clone()))));
        }
        let tables: Vec<Arc<Table>> = tables.into_values().collect();
        let triggers = tables.iter().any(|table| table.effects.get(self.side).truncate);
        match (tables.is_empty(), exact) {
            (true, true) => Plan::Pass,
            _ if triggers || !exact && elsewhere => opaque("truncate", Vec::new()),
            (false, true) if !elsewhere && tables.iter().all(|table| table.opaque.is_none()) => {
                Plan::Truncate(Arc::new(tables))
            }
            _ => opaque("truncate", tables),
        }
    }

    /// COPY FROM STDIN: it only adds rows, and those that it has added can be told from all others when it has ended.
    fn copy(&self) -> Plan {
        let Some(target) = self.facts.targets.first() else { return opaque("unparsed", Vec::new()) };
        let table = match self.written(&target.table) {
            Written::Migrating(tables) if tables.len() == 1 => tables[0].clone(),
            _ => return self.targets_opaque("copy"),
        };
        let audited = self.calls() || table.effects.get(self.side).insert;
        let texts = || texts(&table, self.catalog.encoding.get(self.side), self.encoding_matches);
        let refusal = self.refusal(target, std::slice::from_ref(&table));
        match refusal.or_else(|| texts().is_none().then_some("encoding")) {
            None => Plan::Copy(Arc::new(CopyIn {
                columns: self.facts.columns.clone(),
                through_partition: self.catalog.partition_names.get(self.side).contains(&target.table.name),
                audited,
                table,
            })),
            Some(reason) if audited => opaque(reason, Vec::new()),
            Some(reason) => opaque(reason, vec![table]),
        }
    }
}

fn distinct(mut tables: Vec<Arc<Table>>) -> Vec<Arc<Table>> {
    tables.sort_by_key(|table| table.number);
    tables.dedup_by_key(|table| table.number);
    tables
}
