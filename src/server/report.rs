//! What `crossfade report` shows: the statements that this proxy has planned, by shape, with what becomes of each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::plan::Plan;
use crate::plan::cache::Planned;
use crate::plan::read::{Read, stays_because};
use crate::plan::route::Route;
use crate::shared::Shared;

/// Of one shape: how often it was seen, by whom, and what was last planned for it.
type Shape = (u64, BTreeSet<Arc<str>>, Arc<Planned>);

/// One document: totals, and the shapes, those seen most often first. Shapes hold no values.
pub fn report(shared: &Shared) -> Value {
    let world = shared.world.load();
    let mut shapes: BTreeMap<Vec<u8>, Shape> = BTreeMap::new();
    let of_this_world = |generation: u64| generation == world.generation;
    for (key, planned) in shared.plans.all() {
        let entry = shapes.entry(key.shape.to_vec()).or_insert_with(|| (0, BTreeSet::new(), planned.clone()));
        entry.0 += planned.seen.count();
        entry.1.extend(planned.seen.applications());
        if of_this_world(key.generation) {
            entry.2 = planned;
        }
    }
    let mut shapes: Vec<_> = shapes.into_iter().filter(|(_, (seen, ..))| *seen > 0).collect();
    shapes.sort_by_key(|(_, (seen, ..))| std::cmp::Reverse(*seen));
    let told = shapes.into_iter().map(|(shape, (seen, by, planned))| {
        let mut told = of_shape(shared, shape, seen, &planned);
        told["applications"] = by.iter().map(|name| &**name).collect();
        told
    });
    let shapes: Vec<Value> = told.collect();
    json!({ "phase": world.phase, "epoch": world.epoch, "reads": shared.reads.tally.totals(), "shapes": shapes })
}

fn of_shape(shared: &Shared, shape: Vec<u8>, seen: u64, planned: &Planned) -> Value {
    let (mirrored, tables): (&str, Vec<String>) = match &planned.plan {
        Plan::Pass => ("nothing to mirror", planned.facts.reads.iter().map(|name| name.name.clone()).collect()),
        Plan::Capture(capture) => ("captured", capture.tables.iter().map(|table| table.label()).collect()),
        Plan::Opaque(opaque) => (opaque.reason, opaque.tables.iter().map(|table| table.label()).collect()),
        Plan::Truncate(tables) => ("captured", tables.iter().map(|table| table.label()).collect()),
        Plan::Copy(copy) => ("captured", vec![copy.table.label()]),
    };
    let opaque = matches!(planned.plan, Plan::Opaque(_));
    let (eligible, why) = match &planned.read {
        Read::Eligible(_) => (true, None),
        Read::Stays(reason) => (false, Some(stays_because(reason).to_owned())),
    };
    let split = match &planned.route {
        Route::Both { staying, migrating } => Some(format!("{staying} stays on old, {migrating} migrates")),
        Route::Ambiguous(name) => Some(format!("{name} may mean a table that stays on old or one that migrates")),
        _ => None,
    };
    let compared = shared.reads.tally.of_shape(&shape.clone().into());
    json!({
        "shape": String::from_utf8_lossy(&shape), "count": seen, "tables": tables,
        "mirrored": mirrored, "opaque": opaque,
        "split": split, "served_by_new": eligible, "stays_because": why, "compared": compared,
    })
}
