//! Which SELECTs another side than the authority may answer, with the same words: those that read migrating tables alone, and nothing that differs
//! between two servers or belongs to one session. Who answers, and when, is the session's matter. What is not known for certain stays.

use std::sync::Arc;

use crate::catalog::{Catalog, Resolution, Table};
use crate::phase::Side;
use crate::sql::facts::{Facts, Name, Verb};
use crate::sql::lex::{Kind, lex};
use crate::sql::name;

/// Whether a statement may leave the authority, outside a block or in one that has not written.
#[derive(Clone, Debug, PartialEq)]
pub enum Read {
    /// It may.
    Eligible(Arc<Eligible>),
    /// It stays, for this reason (a word for metrics and `report`; `stays_because` says more).
    Stays(&'static str),
}

/// A read that may be answered elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct Eligible {
    /// All that it reads. Never empty.
    pub tables: Vec<Arc<Table>>,
    /// It says in which order rows come (ORDER BY somewhere).
    pub ordered: bool,
    /// Which rows come, or what is in them, may depend on the order in which a server finds them: LIMIT, window functions, array_agg, sums of floats.
    pub loose: bool,
}

/// Keywords and columns of the system whose value is a session's, a server's or a moment's.
const OF_ONE_SERVER: &[&str] = &[
    "cmax",
    "cmin",
    "ctid",
    "current_catalog",
    "current_date",
    "current_role",
    "current_schema",
    "current_time",
    "current_timestamp",
    "current_user",
    "localtime",
    "localtimestamp",
    "oid",
    "regclass",
    "regcollation",
    "regconfig",
    "regdictionary",
    "regnamespace",
    "regoper",
    "regoperator",
    "regproc",
    "regprocedure",
    "regrole",
    "regtype",
    "session_user",
    "system_user",
    "tableoid",
    "tablesample",
    "user",
    "xmax",
    "xmin",
];

/// Words behind which the rows, or what is in them, may depend on the order in which they were found.
const LOOSE_WORDS: &[&str] = &["limit", "offset", "fetch", "over", "distinct"];
const LOOSE_FUNCTIONS: &[&str] = &[
    "array_agg",
    "avg",
    "json_agg",
    "json_object_agg",
    "jsonb_agg",
    "jsonb_object_agg",
    "string_agg",
    "stddev",
    "stddev_pop",
    "stddev_samp",
    "sum",
    "var_pop",
    "var_samp",
    "variance",
    "xmlagg",
];

/// Written like calls, and no functions.
pub(super) const GRAMMAR: &[&str] = &["coalesce", "exists", "greatest", "grouping", "least", "nullif", "row"];

/// The verdict on a statement of these facts, where `authority` answers otherwise.
pub fn read(text: &[u8], facts: &Facts, catalog: &Catalog, authority: Side) -> Read {
    match eligible(text, facts, catalog, authority) {
        Ok(eligible) if eligible.tables.iter().any(|table| table.lazy) => Read::Stays("lazy"),
        Ok(eligible) => Read::Eligible(Arc::new(eligible)),
        Err(reason) => Read::Stays(reason),
    }
}

/// Either side may answer it, as far as the statement goes; of lazy tables one side alone may not have all rows.
pub(super) fn eligible(
    text: &[u8],
    facts: &Facts,
    catalog: &Catalog,
    authority: Side,
) -> Result<Eligible, &'static str> {
    match facts.verb {
        Verb::Select => {}
        Verb::Other => return Err("unparsed"),
        _ => return Err("no-select"),
    }
    if facts.locking {
        return Err("locking");
    }
    if facts.modifying_cte || !facts.targets.is_empty() {
        return Err("writes");
    }
    let words = words(text);
    if words.iter().any(|word| OF_ONE_SERVER.contains(&word.as_str())) {
        return Err("of-one-server");
    }
    if !facts.functions.iter().all(|function| is_reproducible(function, catalog)) {
        return Err("function");
    }
    if facts.reads.is_empty() {
        return Err("no-table");
    }
    let tables = facts.reads.iter().map(|name| table(name, catalog, authority)).collect::<Result<Vec<_>, _>>()?;
    let loose = words.iter().any(|word| LOOSE_WORDS.contains(&word.as_str()))
        || facts.functions.iter().any(|function| LOOSE_FUNCTIONS.contains(&function.name.as_str()));
    Ok(Eligible { tables, ordered: words.iter().any(|word| word == "order"), loose })
}

/// Every word of the text, quoted or not, folded.
fn words(text: &[u8]) -> Vec<String> {
    let named = |kind| matches!(kind, Kind::Word | Kind::Quoted | Kind::UnicodeQuoted);
    lex(text).filter(|token| named(token.kind)).filter_map(|token| name::fold(text, &token)).collect()
}

/// On both sides it gives the same for the same arguments and settings.
fn is_reproducible(function: &Name, catalog: &Catalog) -> bool {
    Side::BOTH.iter().all(|&side| {
        let built_in = catalog.reproducible.get(side).contains(&function.name);
        let of_users = catalog.functions.get(side).contains(&function.name);
        let immutable = !catalog.writing_functions.get(side).contains(&function.name);
        match function.schema.as_deref() {
            Some("pg_catalog") => built_in,
            Some(_) => of_users && immutable,
            None if of_users => immutable,
            None => built_in || GRAMMAR.contains(&function.name.as_str()),
        }
    })
}

/// The one table that a name means, on both sides and for every search_path, and its rows can be had there in the same form.
fn table(name: &Name, catalog: &Catalog, authority: Side) -> Result<Arc<Table>, &'static str> {
    let table = match catalog.resolve(authority, name) {
        Resolution::Tables(mut tables) if tables.len() == 1 => tables.remove(0),
        Resolution::Tables(_) => return Err("ambiguous"),
        Resolution::View { .. } => return Err("view"),
        Resolution::Other => return Err("not-migrating"),
    };
    if Side::BOTH.iter().any(|&side| catalog.partition_names.get(side).contains(&name.name)) {
        return Err("partition");
    }
    let hidden = |&side: &Side| name.schema.is_none() && catalog.staying.get(side).contains(&name.name);
    if Side::BOTH.iter().any(hidden) {
        return Err("ambiguous");
    }
    if Side::BOTH.iter().any(|&side| *table.row_security.get(side)) {
        return Err("row-security");
    }
    if table.opaque.is_some() || catalog.heirs.contains_key(&table.number) || !same_form(&table) {
        return Err("definition");
    }
    if !Side::BOTH.iter().all(|&side| catalog.settled(side, &table)) {
        return Err("definition");
    }
    Ok(table)
}

/// Name, columns, their order and types are the same on both sides, and so is what RowDescription says of them.
fn same_form(table: &Table) -> bool {
    let columns = &table.columns;
    table.schema.old == table.schema.new
        && table.name.old == table.name.new
        && table.order.old == table.order.new
        && table.order.old.len() == columns.len()
        && columns.iter().all(|column| {
            column.name.old == column.name.new
                && column.type_oid.old == column.type_oid.new
                && column.kind.oid.old == column.kind.oid.new
                && column.kind.name.old == column.kind.name.new
        })
}

/// A reason of `Read::Stays`, for people.
pub fn stays_because(reason: &str) -> &str {
    match reason {
        "no-select" => "it is no SELECT",
        "unparsed" => "no reader understood it",
        "locking" => "it locks rows",
        "writes" => "it writes",
        "of-one-server" => "it asks for what belongs to one session, server or moment",
        "function" => "it calls a function that may give something else on another server or at another moment",
        "no-table" => "it reads no table",
        "ambiguous" => "a table's name may mean several tables",
        "view" => "it reads a view or foreign table",
        "not-migrating" => "it reads a table that does not migrate",
        "lazy" => "rows of a table are still on old alone (`backfill: lazy`)",
        "partition" => "it names a partition",
        "row-security" => "a table has row security",
        "definition" => "a table's definitions are not the same on both sides, down to the numbers of its types",
        other => other,
    }
}
