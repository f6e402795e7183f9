//! Table numbers: the same on both sides and for ever, kept in `crossfade.tables` there.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use super::load::CatalogError;
use crate::phase::Side;

/// A migrating table's schema and name, on old and on new.
pub(super) type Place = (String, String, String, String);

/// By schema and name on old: number, schema and name on new.
pub(super) type Numbers = BTreeMap<(String, String), (i32, String, String)>;

/// The number of each table, given by (schema and name on old, schema and name on new). Known tables keep theirs, others get the next one,
/// written on both sides. What one side lacks (a crash between the two, a side made anew) is copied from the other.
/// Schema `crossfade` must exist on both sides; the sessions must not be in a transaction.
pub async fn number(
    old: &Client,
    new: &Client,
    tables: &[(String, String, String, String)],
) -> Result<BTreeMap<(String, String), u32>, CatalogError> {
    let known = agree(&known(old, Side::Old).await?, &known(new, Side::New).await?)?;
    if !(tables.iter().all(|place| known.contains_key(&key(place)))) || incomplete(old, new, &known).await? {
        return enter(old, new, tables).await;
    }
    Ok(known.into_iter().map(|(place, (number, ..))| (place, number as u32)).collect())
}

fn key(place: &Place) -> (String, String) {
    (place.0.clone(), place.1.clone())
}

pub(super) async fn known(client: &Client, side: Side) -> Result<Numbers, CatalogError> {
    let query = "SELECT old_schema, old_name, number, new_schema, new_name FROM crossfade.tables";
    let rows = client.query(query, &[]).await.map_err(|error| CatalogError::server(side, error))?;
    Ok(rows.iter().map(|row| ((row.get(0), row.get(1)), (row.get(2), row.get(3), row.get(4)))).collect())
}

/// One list from both; an error where they contradict each other.
fn agree(old: &Numbers, new: &Numbers) -> Result<Numbers, CatalogError> {
    let mut all = old.clone();
    let mut taken: BTreeMap<i32, &(String, String)> =
        old.iter().map(|(place, (number, ..))| (*number, place)).collect();
    for (place, entry) in new {
        let contradicts = all.get(place).is_some_and(|known| known.0 != entry.0)
            || taken.insert(entry.0, place).is_some_and(|other| other != place);
        if contradicts {
            return Err(CatalogError::Numbers { table: format!("{}.{}", place.0, place.1), number: entry.0 });
        }
        all.entry(place.clone()).or_insert_with(|| entry.clone());
    }
    Ok(all)
}

async fn incomplete(old: &Client, new: &Client, all: &Numbers) -> Result<bool, CatalogError> {
    Ok(known(old, Side::Old).await?.len() < all.len() || known(new, Side::New).await?.len() < all.len())
}

/// Under a lock on old (two proxies may start at once); new is written and committed first, so that a crash leaves a number that the next
/// start copies to old, never one that is given out twice.
async fn enter(old: &Client, new: &Client, tables: &[Place]) -> Result<BTreeMap<(String, String), u32>, CatalogError> {
    let begin =
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; LOCK TABLE crossfade.tables IN SHARE ROW EXCLUSIVE MODE";
    old.batch_execute(begin).await.map_err(|error| CatalogError::server(Side::Old, error))?;
    let entered = enter_locked(old, new, tables).await;
    let end = if entered.is_ok() { "COMMIT" } else { "ROLLBACK" };
    let ended = old.batch_execute(end).await.map_err(|error| CatalogError::server(Side::Old, error));
    let entered = entered?;
    ended?;
    Ok(entered)
}

async fn enter_locked(
    old: &Client,
    new: &Client,
    tables: &[Place],
) -> Result<BTreeMap<(String, String), u32>, CatalogError> {
    let mut all = agree(&known(old, Side::Old).await?, &known(new, Side::New).await?)?;
    let wanted: BTreeSet<&Place> = tables.iter().collect();
    let mut next = all.values().map(|entry| entry.0).max().unwrap_or(0) + 1;
    for place in wanted {
        all.entry(key(place)).or_insert_with(|| {
            next += 1;
            (next - 1, place.2.clone(), place.3.clone())
        });
    }
    for (client, side) in [(new, Side::New), (old, Side::Old)] {
        insert(client, &all).await.map_err(|error| CatalogError::server(side, error))?;
    }
    Ok(all.into_iter().map(|(place, (number, ..))| (place, number as u32)).collect())
}

async fn insert(client: &Client, all: &Numbers) -> Result<(), tokio_postgres::Error> {
    let numbers: Vec<i32> = all.values().map(|entry| entry.0).collect();
    let old_schemas: Vec<&str> = all.keys().map(|place| place.0.as_str()).collect();
    let old_names: Vec<&str> = all.keys().map(|place| place.1.as_str()).collect();
    let new_schemas: Vec<&str> = all.values().map(|entry| entry.1.as_str()).collect();
    let new_names: Vec<&str> = all.values().map(|entry| entry.2.as_str()).collect();
    let query = "INSERT INTO crossfade.tables (number, old_schema, old_name, new_schema, new_name)
                 SELECT * FROM unnest($1::int[], $2::text[], $3::text[], $4::text[], $5::text[]) ON CONFLICT (number) DO NOTHING";
    client.execute(query, &[&numbers, &old_schemas, &old_names, &new_schemas, &new_names]).await.map(|_| ())
}
