//! Definitions change while a phase with a mirror holds: they are read again, and what that means for rows that are there already is owed.
//!
//! A transaction plans with the definitions of its first message to its end (`World`). So a table that is new on both sides is written unmirrored by
//! those that began before: its debt is *held* until they have ended. A table whose columns or key have changed owes itself: what a default
//! or a cast has put into its rows is not known. One that is missing on one side only owes itself, too, and cannot pay until it is back.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio_postgres::Client;
use tracing::{info, warn};

use super::gate::Cohort;
use super::mover::{self, MoveError};
use crate::catalog::{Catalog, Table};
use crate::ledger::debts::{Debt, encode};
use crate::phase::Side;
use crate::shared::{Shared, World};

/// What has become of the tables.
#[derive(Debug, Default)]
struct Difference {
    /// Migrating from now on.
    new: Vec<Arc<Table>>,
    /// Kept in another way than before.
    changed: Vec<Arc<Table>>,
    /// On one side only.
    missing: Vec<Arc<Table>>,
}

impl Difference {
    fn between(before: &Catalog, after: &Catalog) -> Difference {
        let mut found = Difference::default();
        for (number, table) in &after.tables {
            match before.tables.get(number) {
                None => found.new.push(table.clone()),
                Some(known) if !kept(before, known, table) => found.changed.push(table.clone()),
                Some(_) => {}
            }
        }
        let vanished = |number: &u32| !after.tables.contains_key(number) && !after.gone.contains(number);
        if before.stands_in.is_none() {
            let missing = before.tables.iter().filter(|(number, _)| vanished(number));
            found.missing = missing.map(|(_, table)| table.clone()).collect();
        }
        found
    }
}

fn kept(before: &Catalog, known: &Table, table: &Table) -> bool {
    match before.stands_in {
        Some(side) => known.same_on(side.other(), table),
        None => known.keeps(table),
    }
}

/// Reads the definitions of both sides again; from now on transactions plan with them.
pub async fn renew(shared: &Arc<Shared>) -> Result<(), MoveError> {
    read(shared, false).await
}

/// The same, where they are found to be other ones; else plans and the mirror's sessions stay.
pub async fn renew_if_other(shared: &Arc<Shared>) -> Result<(), MoveError> {
    read(shared, true).await
}

async fn read(shared: &Arc<Shared>, only_other: bool) -> Result<(), MoveError> {
    let _switching = shared.switching.lock().await;
    let world = shared.world.load_full();
    if world.phase.mirror().is_none() {
        return Ok(());
    }
    let config = shared.config.load_full();
    let authority = world.phase.authority();
    let (catalog, whole) = mover::load_catalog(&config, authority).await?;
    if !whole {
        return Err(MoveError::Closed("the mirror's definitions cannot be read".into()));
    }
    if only_other && *world.catalog == catalog {
        return Ok(());
    }
    let found = Difference::between(&world.catalog, &catalog);
    let client = Shared::database(&config, authority).connect("crossfade definitions").await?;
    for table in &found.changed {
        let why = table.opaque.as_ref().map(|why| format!("table {} cannot be mirrored: {why}", table.label()));
        enter(shared, &client, table, why.as_deref()).await?;
        info!(table = %table.label(), opaque = table.opaque, "a table's definition has changed: it is owed");
    }
    for table in &found.missing {
        let why = missing(table, &catalog);
        enter(shared, &client, table, Some(&why)).await?;
        warn!(table = %table.label(), "{why}");
    }
    let mut held = Vec::new();
    for table in &found.new {
        held.push(hold(shared, &client, table).await?);
        info!(table = %table.label(), "a new table migrates from now on");
    }
    let generation = world.generation + 1;
    let renewed = World { generation, catalog: Arc::new(catalog), ..(*world).clone() };
    shared.world.store(Arc::new(renewed));
    shared.renewed.notify_waiters();
    shared.owed.notify_one();
    if !held.is_empty() {
        tokio::spawn(release(shared.clone(), client, shared.gate.turn(), held));
    }
    Ok(())
}

/// Reads the definitions again in a phase in which new alone is written: which tables stay on old may be others now. Nothing is owed for it.
pub async fn renew_staying(shared: &Arc<Shared>) -> Result<(), MoveError> {
    let _switching = shared.switching.lock().await;
    let world = shared.world.load_full();
    if world.phase.mirror().is_some() || !world.splits() {
        return Ok(());
    }
    let (catalog, whole) = mover::load_catalog(&shared.config.load_full(), Side::New).await?;
    if whole && *world.catalog != catalog {
        let generation = world.generation + 1;
        shared.world.store(Arc::new(World { generation, catalog: Arc::new(catalog), ..(*world).clone() }));
        shared.renewed.notify_waiters();
    }
    Ok(())
}

fn missing(table: &Table, after: &Catalog) -> String {
    if let Some(root) = after.attached.get(&table.number).and_then(|root| after.tables.get(root)) {
        return format!("table {} is a partition of {} now, which owes what it owes", table.label(), root.label());
    }
    let name = |side: Side| format!("{}.{}", table.schema.get(side), table.name.get(side));
    let lacking = Side::BOTH.into_iter().find(|side| after.one_sided.get(side.other()).contains(&name(side.other())));
    match lacking {
        Some(side) => format!(
            "table {} is missing on {side}: its writes are not mirrored. Make it there, or drop it on {}",
            table.label(),
            side.other()
        ),
        None => format!("table {} does not migrate any more: its writes are not mirrored", table.label()),
    }
}

fn taint(table: &Table) -> BytesMut {
    let mut debts = BytesMut::new();
    encode(&Debt::Taint { table: table.number }, &mut debts);
    debts
}

async fn enter(shared: &Shared, client: &Client, table: &Table, why: Option<&str>) -> Result<(), MoveError> {
    let text = "INSERT INTO crossfade.ledger (id, debts, reason, error) VALUES ($1, $2, 'definition', $3)";
    client.execute(text, &[&shared.debt_id(), &&taint(table)[..], &why]).await?;
    Ok(())
}

/// A debt that nobody pays before `release`, unless this process ends.
async fn hold(shared: &Shared, client: &Client, table: &Table) -> Result<i64, MoveError> {
    let id = shared.debt_id();
    let text = "SELECT crossfade.owe_unwrapped($1, $2, 'definition')";
    client.execute(text, &[&id, &&taint(table)[..]]).await?;
    Ok(id)
}

/// Once all who began before the tables were known have ended.
async fn release(shared: Arc<Shared>, client: Client, before: Cohort, held: Vec<i64>) {
    while !before.ended() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for id in held {
        let released = client.execute("SELECT crossfade.release_unwrapped($1)", &[&id]).await;
        if let Err(error) = released {
            // With its holder's connection the debt is released as well.
            warn!(debt = id, %error, "a new table's debt was not released");
        }
    }
    shared.owed.notify_one();
}
