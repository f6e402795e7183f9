//! Reading both servers at once, and what can go wrong with it.

use std::collections::{BTreeMap, HashMap, HashSet};

use tokio_postgres::Client;

use super::definitions::Definitions;
use super::number::{Numbers, Place, known, number};
use super::read::{self, Relation, Server};
use super::{Catalog, Sides, Stays, definitions, lazy, pair};
use crate::config::TableRule;
use crate::phase::Side;

/// Why no catalog could be had.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// A query failed.
    #[error("reading the definitions of the {side} database failed: {error}")]
    Server {
        /// Where.
        side: Side,
        /// What the server or the connection said.
        error: tokio_postgres::Error,
    },
    /// The two sides' `crossfade.tables` contradict each other.
    #[error(
        "crossfade.tables on old and new give table {table} and number {number} differently: they belong to two migrations; \
         run `crossfade uninstall` for the one that is over"
    )]
    Numbers {
        /// `schema.name` on old.
        table: String,
        /// The number in question.
        number: i32,
    },
}

impl CatalogError {
    pub(super) fn server(side: Side, error: tokio_postgres::Error) -> CatalogError {
        CatalogError::Server { side, error }
    }
}

/// Loads the definitions of both sides. `rules`: the tables that migrate (None: every ordinary or partitioned table that has one of the same
/// schema and name on the other side); `except`: `schema.name` on old of those that do not.
///
/// The sessions must not be in a transaction: each is read in one of its own. Tables get their numbers from `crossfade.tables`; where
/// that does not exist on both sides yet (before `install`), they are numbered by their names, for showing only.
pub async fn load(
    old: &Client,
    new: &Client,
    rules: Option<&[TableRule]>,
    except: &[String],
) -> Result<Catalog, CatalogError> {
    let ((old_definitions, old_server), (new_definitions, new_server)) =
        futures_util::try_join!(side(old, Side::Old), side(new, Side::New))?;
    let servers = Sides { old: old_server, new: new_server };
    let (places, one_sided) = places(&servers, rules, except);
    let (mut gone, mut all) = (HashSet::new(), Numbers::new());
    let numbers = if installed(old, Side::Old).await? && installed(new, Side::New).await? {
        let numbers = number(old, new, &places).await?;
        all = known(old, Side::Old).await?;
        gone = self::gone(&servers, &all);
        numbers
    } else {
        places.iter().zip(1..).map(|(place, number)| ((place.0.clone(), place.1.clone()), number)).collect()
    };
    let definitions = Sides { old: old_definitions, new: new_definitions };
    let lazy = lazy::incomplete(new, rules, &numbers).await?;
    let mut catalog = pair::catalog(&servers, &places, &numbers, one_sided, &lazy);
    catalog.stays = Stays::of(&servers, &catalog.by_oid.old, rules.is_some());
    catalog.attached = attached(&catalog, &all);
    let behind = if lazy.is_empty() { None } else { Some(lazy::behind(new, &catalog).await?) };
    Ok(Catalog { definitions, gone, behind, ..catalog })
}

async fn side(client: &Client, side: Side) -> Result<(Definitions, Server), CatalogError> {
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL search_path = pg_catalog";
    let read = async {
        // Before the snapshot: what has changed since is seen with an older version, and taken for changed.
        let definitions = definitions::read(client).await?;
        client.batch_execute(begin).await?;
        let server = read::server(client).await;
        client.batch_execute("ROLLBACK").await?;
        Ok((definitions, server?))
    };
    read.await.map_err(|error| CatalogError::server(side, error))
}

async fn installed(client: &Client, side: Side) -> Result<bool, CatalogError> {
    let query = "SELECT pg_catalog.to_regclass('crossfade.tables') IS NOT NULL";
    client.query_one(query, &[]).await.map(|row| row.get(0)).map_err(|error| CatalogError::server(side, error))
}

/// Numbered tables that are on neither side any more.
fn gone(servers: &Sides<Server>, known: &Numbers) -> HashSet<u32> {
    let there = |side: Side, schema: &str, name: &str| {
        servers.get(side).relations.values().any(|found| found.schema == schema && found.name == name)
    };
    let gone = known.iter().filter(|((old_schema, old_name), (_, new_schema, new_name))| {
        !there(Side::Old, old_schema, old_name) && !there(Side::New, new_schema, new_name)
    });
    gone.map(|(_, (number, ..))| *number as u32).collect()
}

/// Numbered tables that have become partitions of one and the same migrating table on both sides.
fn attached(catalog: &Catalog, known: &Numbers) -> HashMap<u32, u32> {
    let root = |side: Side, schema: &String, name: &String| {
        catalog.by_qualified.get(side).get(&(schema.clone(), name.clone())).map(|table| table.number)
    };
    let attached = known.iter().filter_map(|((old_schema, old_name), (number, new_schema, new_name))| {
        let root =
            root(Side::Old, old_schema, old_name).filter(|old| root(Side::New, new_schema, new_name) == Some(*old))?;
        (root != *number as u32).then_some((*number as u32, root))
    });
    attached.collect()
}

/// A table that may migrate: no partition (its root does), and not an extension's own.
fn eligible(relation: &Relation) -> bool {
    matches!(relation.kind, 'r' | 'p') && !relation.partition && !relation.of_extension
}

/// The tables that migrate, sorted; and the names of those that could not, as the other side has none of that name.
fn places(servers: &Sides<Server>, rules: Option<&[TableRule]>, except: &[String]) -> (Vec<Place>, Sides<Vec<String>>) {
    let names = |side: Side| {
        let found = servers.get(side).relations.values().filter(|relation| eligible(relation));
        found.map(|relation| ((relation.schema.clone(), relation.name.clone()), ())).collect::<BTreeMap<_, _>>()
    };
    let (old, new) = (names(Side::Old), names(Side::New));
    let excluded = |place: &(String, String)| except.iter().any(|name| split(name) == *place);
    let mut one_sided = Sides::<Vec<String>>::default();
    let mut places = Vec::new();
    let wanted: Vec<((String, String), (String, String))> = match rules {
        None => old.keys().map(|place| (place.clone(), place.clone())).collect(),
        Some(rules) => {
            rules.iter().map(|rule| (split(&rule.name), split(rule.to.as_deref().unwrap_or(&rule.name)))).collect()
        }
    };
    for (from, to) in wanted.into_iter().filter(|(from, _)| !excluded(from)) {
        match (old.contains_key(&from), new.contains_key(&to)) {
            (true, true) => places.push((from.0, from.1, to.0, to.1)),
            (true, false) => one_sided.old.push(format!("{}.{}", from.0, from.1)),
            (false, true) => one_sided.new.push(format!("{}.{}", to.0, to.1)),
            (false, false) => {
                one_sided.old.push(format!("{}.{}", from.0, from.1));
                one_sided.new.push(format!("{}.{}", to.0, to.1));
            }
        }
    }
    if rules.is_none() {
        let only_new = new.keys().filter(|place| !old.contains_key(*place) && !excluded(place));
        one_sided.new.extend(only_new.map(|place| format!("{}.{}", place.0, place.1)));
    }
    for side in Side::BOTH {
        one_sided.get_mut(side).sort();
    }
    places.sort();
    places.dedup_by(|a, b| (&a.0, &a.1) == (&b.0, &b.1));
    (places, one_sided)
}

fn split(name: &str) -> (String, String) {
    let (schema, name) = name.split_once('.').unwrap_or(("public", name));
    (schema.to_owned(), name.to_owned())
}
