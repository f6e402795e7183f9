//! Verification beside the sessions, for a share of the time (`verify.continuous`): what differs is said and written down, and nothing is changed.

use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, info, warn};

use crate::catalog::Table;
use crate::migrate;
use crate::migrate::verify::{self, Background, Event, Found, Verify};
use crate::shared::{Shared, World};
use crate::switch::mover::MoveError;

/// Between two passes over all tables, at least.
const AGAIN: Duration = Duration::from_secs(2);
/// How often it is looked whether there is still a reason to go on.
const WATCH: Duration = Duration::from_millis(250);
/// A server that says nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Verifies while the file says so, and writes are mirrored.
pub async fn follow(shared: Arc<Shared>) {
    let mut said = String::new();
    loop {
        tokio::time::sleep(AGAIN).await;
        let (world, share) = (shared.world.load_full(), share(&shared));
        if !may_go_on(&shared, &world, share) {
            continue;
        }
        // Whatever it has open ends with it.
        let passed = tokio::select! {
            passed = pass(&shared, &world, share) => passed,
            () = stopped(&shared, &world, share) => continue,
        };
        match passed {
            Ok(()) => said.clear(),
            Err(error) => {
                let error = error.to_string();
                if error != said {
                    warn!(%error, "tables cannot be verified in the background; it is tried again");
                }
                said = error;
            }
        }
    }
}

fn share(shared: &Shared) -> f64 {
    shared.config.load().verify.continuous.0
}

fn may_go_on(shared: &Shared, world: &World, with: f64) -> bool {
    let now = shared.world.load();
    let same = now.generation == world.generation && now.epoch == world.epoch;
    let up = world.phase.mirror().is_some_and(|side| shared.health.get(side).up());
    same && up && with > 0.0 && share(shared) == with
}

async fn stopped(shared: &Shared, world: &World, with: f64) {
    while may_go_on(shared, world, with) {
        tokio::time::sleep(WATCH).await;
    }
}

async fn pass(shared: &Shared, world: &World, share: f64) -> Result<(), MoveError> {
    let Some(mirror) = world.phase.mirror() else { return Ok(()) };
    let config = shared.config.load_full();
    let client = Shared::database(&config, mirror.other()).connect("crossfade verify").await?;
    // Of a version before. Not again where all of it is there: clients' transactions see definitions change when it is made.
    if !verify::installed(&client).await? {
        migrate::install(&client, mirror.other()).await?;
    }
    drop(client);
    let job = Verify {
        authority_side: mirror.other(),
        authority: Shared::database(&config, mirror.other()).clone(),
        mirror: Shared::database(&config, mirror).clone(),
        catalog: world.catalog.clone(),
        epoch: world.epoch,
        // It enters no debts.
        first_debt: 0,
    };
    let label = |number: u32| world.catalog.tables.get(&number).map(|table| table.label()).unwrap_or_default();
    let tell = |event: Event<'_>| match event {
        Event::Rows { table, rows } => shared.metrics.verify_rows.with_label_values(&[&label(table)]).inc_by(rows),
        Event::Table { table, found, known } => told(shared, table, found, known),
    };
    match verify::pass(&job, &Background { share, patience: PATIENCE }, &tell).await? {
        true => debug!("all tables were verified"),
        false => debug!("another proxy verifies"),
    }
    Ok(())
}

fn told(shared: &Shared, table: &Table, found: &Found, known: bool) {
    let (name, rows) = (table.label(), found.rows_different());
    shared.metrics.verify_different.with_label_values(&[&name]).set(rows as i64);
    if let Some(why) = &found.unseen {
        return debug!(table = %name, why, "it could not be compared");
    }
    match (known, rows) {
        (true, _) => debug!(table = %name, rows = found.rows, different = rows, "verified"),
        (false, 0) => info!(table = %name, rows = found.rows, "it differed, and does not any more"),
        (false, _) => warn!(
            table = %name, rows,
            "rows differ between old and new, and nothing is owed for them: `crossfade verify --table {name}` names them, with --repair they are made equal"
        ),
    }
}
