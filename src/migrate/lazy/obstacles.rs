//! Why a table cannot be lazy.

use tokio_postgres::Client;

use crate::catalog::{Catalog, Table};
use crate::ledger::lazy as named;
use crate::migrate::error::Error;
use crate::migrate::sql::TableSql;
use crate::phase::Side;

/// What is in the way of this table's being lazy: each a sentence's end. Empty: nothing.
pub async fn obstacles(new: &Client, catalog: &Catalog, table: &Table) -> Result<Vec<String>, Error> {
    let mut found: Vec<&str> = Vec::new();
    let mut unless = |fits: bool, why: &'static str| found.extend((!fits).then_some(why));
    let any = |holds: fn(&Table, Side) -> bool| Side::BOTH.iter().any(|&side| holds(table, side));
    unless(table.opaque.is_none(), "it cannot be mirrored");
    unless(table.key.is_some(), "it has no key");
    unless(!any(|table, side| *table.row_security.get(side)), "it has row security");
    unless(!any(|table, side| *table.rules.get(side)), "it has rules");
    unless(!any(|table, side| !table.partitions.get(side).is_empty()), "it is partitioned");
    unless(table.key.as_ref().is_none_or(|key| !key.deferrable.new), "its key is deferrable on new");
    unless(TableSql::new(table, Side::New).many, "its key has a column that can be no element of an array");
    let plain = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    unless(plain(&table.name.new), "its name on new is no plain word, which is looked for in the texts of functions");
    let behind = catalog.behind.as_ref();
    unless(
        behind.is_none_or(|behind| !behind.triggered.contains(&table.name.new)),
        "a trigger on new calls a function that may read lazy tables by itself",
    );
    let text = "SELECT EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE contype = 'f' AND $1 IN (conrelid, confrelid)), \
        1 < (SELECT count(*) FROM pg_catalog.pg_index WHERE indrelid = $1 AND (indisunique OR indisexclusion))";
    let failed = |error: tokio_postgres::Error| Error::from_driver(Side::New, "looking at a lazy table", &error);
    let row = new.query_one(text, &[&table.oid.new]).await.map_err(failed)?;
    // A parent that only old has is no parent for new, nor a child for who removes its parent there.
    unless(!row.get::<_, bool>(0), "a foreign key on new leads from it or to it");
    unless(
        !row.get::<_, bool>(1),
        "it has another unique index or an exclusion constraint on new, which rows on old do not take part in",
    );
    let mut found: Vec<String> = found.into_iter().map(str::to_owned).collect();
    let there = "SELECT pg_catalog.to_regclass($1) IS NOT NULL";
    // Before a move has made it there is nothing to be looked at.
    if new.query_one(there, &[&named("merged", table.number)]).await.map_err(failed)?.get(0)
        && let Err(error) = new.batch_execute("SELECT crossfade.touch_old(true)").await
    {
        let error = Error::from_driver(Side::New, "reading old through postgres_fdw", &error);
        found.push(format!("old cannot be read from new ({error})"));
    }
    Ok(found)
}
