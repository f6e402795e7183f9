//! Tables with `backfill: lazy`: which of them may lack rows on new, and what on new would read them behind a name of its own.

use std::collections::{BTreeMap, HashMap, HashSet};

use tokio_postgres::Client;

use super::load::CatalogError;
use super::{Catalog, quote};
use crate::config::{Backfill, TableRule};
use crate::phase::Side;

/// What on new leads to lazy tables without naming them, by bare names. A statement that uses any of it would see new's rows only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Behind {
    /// Functions, procedures and views whose texts name a lazy table, or any of these, or may run any text (EXECUTE).
    pub names: HashSet<String>,
    /// Tables on which a trigger calls such a function.
    pub triggered: HashSet<String>,
}

/// Numbers of the tables that are lazy and not complete. Where new is the authority the database says which: another file would have clients miss rows.
pub(super) async fn incomplete(
    new: &Client,
    rules: Option<&[TableRule]>,
    numbers: &BTreeMap<(String, String), u32>,
) -> Result<HashSet<u32>, CatalogError> {
    let lazy = rules.unwrap_or_default().iter().filter(|rule| rule.backfill == Backfill::Lazy);
    let place = |rule: &TableRule| {
        let (schema, name) = rule.name.split_once('.')?;
        numbers.get(&(schema.to_owned(), name.to_owned())).copied()
    };
    let mut found: HashSet<u32> = lazy.filter_map(place).collect();
    let failed = |error| CatalogError::server(Side::New, error);
    let there = "SELECT pg_catalog.to_regclass('crossfade.lazy') IS NOT NULL";
    if !new.query_one(there, &[]).await.map_err(failed)?.get::<_, bool>(0) {
        return Ok(found);
    }
    let rows = "SELECT l.number, l.complete, m.authority IS NOT DISTINCT FROM 'new' FROM (SELECT 1) one \
        LEFT JOIN crossfade.migration m ON true LEFT JOIN crossfade.lazy l ON true";
    let rows = new.query(rows, &[]).await.map_err(failed)?;
    let numbered = |complete: bool| {
        let rows = rows.iter().filter(move |row| row.get::<_, Option<bool>>(1) == Some(complete));
        rows.map(|row| row.get::<_, i32>(0).cast_unsigned())
    };
    if rows.first().is_some_and(|row| row.get(2)) {
        let migrating: HashSet<u32> = numbers.values().copied().collect();
        return Ok(numbered(false).filter(|number| migrating.contains(number)).collect());
    }
    for complete in numbered(true) {
        found.remove(&complete);
    }
    Ok(found)
}

/// Texts of functions and views. A view's text is asked for with no search_path but pg_catalog, so that each table comes with its schema.
const TEXTS: &str = "
    SELECT 'function', p.oid, p.proname::text, p.prosrc || coalesce(pg_catalog.pg_get_function_sqlbody(p.oid), ''),
           l.lanname NOT IN ('sql', 'plpgsql', 'c', 'internal')
    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang
    WHERE p.prokind IN ('f', 'p', 'w') AND p.pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
      AND p.pronamespace IS DISTINCT FROM pg_catalog.to_regnamespace('crossfade') AND l.lanname NOT IN ('c', 'internal')
    UNION ALL
    SELECT 'view', c.oid, c.relname::text, pg_catalog.pg_get_viewdef(c.oid), false
    FROM pg_catalog.pg_class c WHERE c.relkind IN ('v', 'm')
      AND c.relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
      AND c.relnamespace IS DISTINCT FROM pg_catalog.to_regnamespace('crossfade')";

/// Reads it, for the lazy tables of this catalog.
pub(super) async fn behind(new: &Client, catalog: &Catalog) -> Result<Behind, CatalogError> {
    let failed = |error| CatalogError::server(Side::New, error);
    let mut known: HashSet<String> = catalog
        .tables
        .values()
        .filter(|table| table.lazy)
        .flat_map(|table| [table.name.new.clone(), quote(&table.name.new)])
        .collect();
    let mut texts: Vec<(u32, String, Vec<String>)> = Vec::new();
    let mut functions = HashMap::new();
    for row in new.query(TEXTS, &[]).await.map_err(failed)? {
        let (kind, oid, name): (String, u32, String) = (row.get(0), row.get(1), row.get(2));
        let mut words = words(row.get::<_, Option<&str>>(3).unwrap_or_default());
        if row.get(4) {
            // Nobody here reads that language.
            words.push("execute".to_owned());
        }
        if kind == "function" {
            functions.insert(oid, name.clone());
        }
        texts.push((oid, name, words));
    }
    let tables = known.clone();
    known.insert("execute".to_owned());
    // Until nothing more is found: what names a function that names a table leads there, too.
    loop {
        let before = known.len();
        texts.retain(|(_, name, words)| {
            let leads = words.iter().any(|word| known.contains(word));
            if leads {
                known.insert(name.clone());
            }
            !leads
        });
        if known.len() == before {
            break;
        }
    }
    known.remove("execute");
    let names: HashSet<String> = known.difference(&tables).cloned().collect();
    let triggers = "SELECT c.relname::text, t.tgfoid FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid \
        WHERE NOT t.tgisinternal AND t.tgenabled <> 'D'";
    let mut triggered = HashSet::new();
    for row in new.query(triggers, &[]).await.map_err(failed)? {
        if functions.get(&row.get::<_, u32>(1)).is_some_and(|name| names.contains(name)) {
            triggered.insert(row.get(0));
        }
    }
    Ok(Behind { names, triggered })
}

/// Its words, folded as PostgreSQL folds names that are not quoted, and as they stand.
fn words(text: &str) -> Vec<String> {
    let split = text.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$'));
    split.filter(|word| !word.is_empty()).flat_map(|word| [word.to_lowercase(), word.to_owned()]).collect()
}
