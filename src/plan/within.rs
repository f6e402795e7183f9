//! What a WITH clause writes, as far as its rows can be shown without a change of what the client sees.
//!
//! A row that a statement of a WITH clause writes leaves the server by a call of `crossfade.show_cte_image` in its RETURNING list: a notice of level INFO, which
//! goes to the client whatever client_min_messages says, and is no part of the result. The proxy takes it out again. Each statement is judged as if it stood by itself.

use std::sync::Arc;

use super::decide::View;
use super::weave::{Manner, Weave};
use super::{Audited, Capture, Effect, Plan, Shown};
use crate::catalog::Table;
use crate::sql::facts::{Returned, Target, Within};

/// The function that shows an image (src/ledger/schema.sql).
const SHOW: &str = "show_cte_image";

/// What is known of a statement's WITH clause.
#[derive(Default)]
pub(super) struct Inside {
    /// What is shown.
    pub shown: Vec<Shown>,
    /// By which additions to the text.
    pub weaves: Vec<Weave>,
    /// All that it writes to migrating tables itself is shown.
    pub whole: bool,
    /// Triggers, cascades or functions may write more.
    pub more: bool,
}

impl Inside {
    /// The tables whose rows are shown.
    pub fn tables(&self) -> impl Iterator<Item = &Arc<Table>> {
        self.shown.iter().flat_map(|shown| &shown.capture.tables)
    }
}

impl View<'_> {
    /// What the WITH clause writes, beside a main statement that does this to these tables.
    pub(super) fn inside(&self, main: Option<(Effect, &[Arc<Table>])>) -> Inside {
        // Where characters are not counted as in UTF-8, the position in an error could not be set right.
        if !self.encoding_matches || !self.catalog.functions.get(self.side).contains(SHOW) {
            return Inside::default();
        }
        let mut inside = Inside { whole: !self.facts.within.is_empty(), ..Inside::default() };
        let mut captures: Vec<(usize, Arc<Capture>)> = Vec::new();
        for (at, within) in self.facts.within.iter().enumerate() {
            let view = View { facts: &within.facts, ..*self };
            match view.write() {
                Plan::Pass => {}
                Plan::Capture(capture) if matches!(capture.effect, Some(Effect::Row | Effect::Gone)) => {
                    inside.more |= capture.audited != Audited::No;
                    captures.push((at, capture));
                }
                _ => inside.whole = false,
            }
        }
        for (place, (at, capture)) in captures.iter().enumerate() {
            let others = captures.iter().enumerate().filter(|(other, _)| *other != place).map(|(_, (_, other))| other);
            let others = others.filter_map(|other| Some((other.effect?, &other.tables[..])));
            let number = inside.shown.len();
            let manner = self.manner(&self.facts.within[*at], capture, number);
            let kept = || {
                keeps_order(capture, main.into_iter(), |_| true)
                    && keeps_order(capture, others, |table| self.is_checked_later(table))
            };
            match manner.filter(|_| kept()) {
                Some(manner) => {
                    inside.weaves.push(Weave { at: *at, hidden: format!("crossfade_with_{number}"), manner });
                    inside.shown.push(Shown { at: *at, capture: capture.clone() });
                }
                None => inside.whole = false,
            }
        }
        inside
    }

    fn manner(&self, within: &Within, capture: &Capture, number: usize) -> Option<Manner> {
        let call = |image: &str| format!("crossfade.{SHOW}({image}, {number})");
        match &within.returned {
            Returned::Nothing => Some(Manner::Returning { shown: call(capture.image()) }),
            Returned::Columns(columns) => {
                Some(Manner::Renamed { shown: call(capture.image()), columns: columns.clone() })
            }
            Returned::Row => Some(Manner::Read { shown: call(&self.read_image(within, &capture.tables)?) }),
            Returned::Other => None,
        }
    }

    /// Two rows may hold one key of this table for a moment.
    pub(super) fn is_checked_later(&self, table: &Table) -> bool {
        table.key.as_ref().is_none_or(|key| *key.deferrable.get(self.side))
    }

    /// The image of a row that was returned as it is: which relation it is in follows from the name, where that stands for one relation only.
    fn read_image(&self, within: &Within, tables: &[Arc<Table>]) -> Option<String> {
        let target = within.facts.targets.first()?;
        let name = &target.table;
        let spread = |table: &Arc<Table>| {
            !table.partitions.get(self.side).is_empty() || self.catalog.heirs.contains_key(&table.number)
        };
        if tables.iter().any(spread) || self.catalog.partition_names.get(self.side).contains(&name.name) {
            return None;
        }
        let view = View { facts: &within.facts, ..*self };
        let row = Target { row: "crossfade_row".to_owned(), ..target.clone() };
        let image = view.hidden(&row, tables).ok()?;
        let schema = name.schema.as_ref().map(|schema| format!("{}.", crate::catalog::quote(schema)));
        let spelled =
            format!("{}{}", schema.unwrap_or_default(), crate::catalog::quote(&name.name)).replace('\'', "''");
        // What a backslash means depends on a setting.
        let relation = format!("'{spelled}'::pg_catalog.regclass::pg_catalog.oid");
        (!spelled.contains('\\')).then(|| image.replace("crossfade_row.tableoid", &relation))
    }
}

/// Images come in the order in which rows were written, but those of the main statement come last. Of one key a statement can remove a row and add another,
/// and not the other way round, unless uniqueness is checked later: what stays is the row that was added. So it must not come before the one that was removed.
/// `disordered`: images of this table may come in another order than its keys allow.
fn keeps_order<'a>(
    capture: &Capture,
    mut others: impl Iterator<Item = (Effect, &'a [Arc<Table>])>,
    disordered: impl Fn(&Table) -> bool,
) -> bool {
    let same = |tables: &[Arc<Table>]| {
        let written = |table: &Arc<Table>| capture.tables.iter().any(|other| other.number == table.number);
        tables.iter().any(|table| disordered(table) && written(table))
    };
    capture.effect != Some(Effect::Row) || !others.any(|(effect, tables)| effect == Effect::Gone && same(tables))
}
