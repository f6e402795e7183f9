//! What PostgreSQL logs of a row as it was: its replica identity. Where that does not hold the table's key, an UPDATE or DELETE does not say which row it
//! was about.

use std::collections::{BTreeMap, HashSet};

use super::super::error::Error;
use super::super::link::Link;
use crate::catalog::{Catalog, Table};
use crate::phase::Side;

/// The tables and partitions of one side that log their keys.
#[derive(Debug, Default)]
pub(super) struct Identities {
    /// Schema and name.
    good: HashSet<(String, String)>,
    /// Labels of tables with a key that is not logged, with the SQL that has it logged.
    lacking: BTreeMap<u32, String>,
}

impl Identities {
    /// An UPDATE or DELETE of this table or partition of it says the row's key as it was, where it has changed.
    pub fn holds_key(&self, table: &Table, relation: &(String, String)) -> bool {
        table.key.is_some() && self.good.contains(relation)
    }

    /// All that is written to the table is named by key: it has one, and all of its partitions log it.
    pub fn is_named(&self, table: &Table) -> bool {
        table.key.is_some() && table.opaque.is_none() && !self.lacking.contains_key(&table.number)
    }

    /// What would have keys logged that are not, a statement for each table.
    pub fn lacking(&self) -> impl Iterator<Item = &str> {
        self.lacking.values().map(String::as_str)
    }
}

/// Ordinary tables and leaf partitions; the columns that are logged of the row as it was (NULL: all). As RelationGetIndexList picks the index:
/// not one that is deferrable.
const QUERY: &str = "SELECT c.oid, n.nspname::text, c.relname::text, c.relreplident = 'f', (SELECT array_agg(a.attname::text) FROM pg_index i \
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::int2[]) WHERE i.indrelid = c.oid AND i.indisvalid AND i.indisunique AND i.indimmediate \
    AND i.indpred IS NULL AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END) \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY ($1) AND c.relkind = 'r'";

/// Reads them for all migrating tables of that side.
pub(super) async fn read(link: &mut Link, catalog: &Catalog) -> Result<Identities, Error> {
    let side = link.side;
    let oids: Vec<u32> = catalog.by_oid.get(side).keys().copied().collect();
    let mut found = Identities::default();
    for row in link.rows("reading replica identities", QUERY, &[&oids]).await? {
        let Some(table) = catalog.by_oid.get(side).get(&row.get::<_, u32>(0)) else { continue };
        let Some(key) = &table.key else { continue };
        let relation: (String, String) = (row.get(1), row.get(2));
        let logged: Vec<String> = row.get::<_, Option<Vec<String>>>(4).unwrap_or_default();
        let all = row.get::<_, bool>(3);
        if all || key.columns.iter().all(|&at| logged.contains(table.columns[at].name.get(side))) {
            found.good.insert(relation);
        } else {
            found.lacking.entry(table.number).or_insert_with(|| mend(table, side, &relation));
        }
    }
    Ok(found)
}

fn mend(table: &Table, side: Side, (schema, name): &(String, String)) -> String {
    let quote = crate::catalog::quote;
    format!(
        "table {}: its replica identity on {side} does not hold its key: ALTER TABLE {}.{} REPLICA IDENTITY USING INDEX (that of its key), or FULL",
        table.label(),
        quote(schema),
        quote(name)
    )
}
