//! On which side a statement runs in phases in which new is the authority, where some tables stay on old for ever. Pure.
//!
//! Where nothing can be told from the tables that it names (functions, CALL, DO, SET), it runs on new, the authority of migrating tables. That is the less
//! dangerous side: what it misses there fails, since the tables that stay are not there (`crossfade check` names those that are); on old it would find the
//! migrating tables as they once were, and write them unseen.

use std::fmt::Write;

use crate::catalog::{Catalog, Resolution};
use crate::phase::Side;
use crate::sql::facts::{Facts, Name, Verb};
use crate::sql::lex::{Kind, lex};
use crate::sql::name::fold;

/// The tables that a statement names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Route {
    /// None of either kind.
    #[default]
    Undecided,
    /// Migrating ones, or others of new.
    Migrating,
    /// Those that stay on old, and no others.
    Staying,
    /// One of each, at least, by their names.
    Both {
        /// It stays.
        staying: String,
        /// It migrates, or is new's.
        migrating: String,
    },
    /// This name, without a schema, means one of each: which it is depends on search_path.
    Ambiguous(String),
}

/// What a name means.
enum Means {
    Neither,
    Migrating,
    Staying,
    Both,
}

/// Decides by the tables that a statement names. `side`: whose names it uses, that of the authority of migrating tables.
pub fn route(text: &[u8], facts: &Facts, catalog: &Catalog, side: Side) -> Route {
    if catalog.stays.is_empty() {
        return Route::Migrating;
    }
    let mut names = Vec::new();
    named(facts, &mut names);
    if matches!(facts.verb, Verb::Ddl { .. } | Verb::Maintenance) {
        names.extend(words(text));
    }
    let (mut staying, mut migrating) = (None, None);
    for name in &names {
        match means(name, catalog, side) {
            Means::Neither => {}
            Means::Staying => staying = staying.or_else(|| Some(label(name))),
            Means::Migrating => migrating = migrating.or_else(|| Some(label(name))),
            Means::Both if name.schema.is_none() && !catalog.stays.mixes(name) => return Route::Ambiguous(label(name)),
            Means::Both => return Route::Both { staying: label(name), migrating: label(name) },
        }
    }
    match (staying, migrating) {
        (None, None) => Route::Undecided,
        (None, Some(_)) => Route::Migrating,
        (Some(_), None) => Route::Staying,
        (Some(staying), Some(migrating)) => Route::Both { staying, migrating },
    }
}

/// A call of the system's functions (nextval, currval, pg_relation_size, ...) with a literal that names a relation which stays. `facts` are those of a statement
/// that is undecided otherwise.
pub fn calls_staying(text: &[u8], facts: &Facts, catalog: &Catalog, side: Side) -> bool {
    let of_users = |function: &Name| {
        function.schema.as_deref().is_some_and(|schema| schema != "pg_catalog")
            || catalog.functions.get(side).contains(&function.name)
    };
    if facts.verb != Verb::Select || facts.functions.iter().any(of_users) {
        return false;
    }
    let names = |literal: &str| {
        let parts: Vec<&str> = literal.splitn(2, '.').collect();
        let plain = |part: &str| match part.strip_prefix('"').and_then(|part| part.strip_suffix('"')) {
            Some(quoted) => quoted.to_owned(),
            None => part.to_lowercase(),
        };
        let name = match parts[..] {
            [schema, name] => Name { schema: Some(plain(schema)), name: plain(name) },
            _ => Name { schema: None, name: plain(literal) },
        };
        catalog.stays.has_relation(&name)
    };
    lex(text).filter(|token| token.kind == Kind::Text).any(|token| {
        let literal = std::str::from_utf8(token.bytes(text)).unwrap_or_default();
        literal.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')).is_some_and(names)
    })
}

fn named(facts: &Facts, names: &mut Vec<Name>) {
    names.extend(facts.targets.iter().map(|target| target.table.clone()));
    names.extend(facts.reads.iter().cloned());
    if let Some(inner) = &facts.inner {
        named(&inner.1, names);
    }
}

/// Every word of a text that may be a name: what changes definitions is not read further.
fn words(text: &[u8]) -> impl Iterator<Item = Name> {
    let of_names = |kind| matches!(kind, Kind::Word | Kind::Quoted | Kind::UnicodeQuoted);
    lex(text)
        .filter(move |token| of_names(token.kind))
        .filter_map(|token| Some(Name { schema: None, name: fold(text, &token)? }))
}

fn means(name: &Name, catalog: &Catalog, side: Side) -> Means {
    if matches!(name.schema.as_deref(), Some("pg_catalog" | "information_schema")) {
        return Means::Neither;
    }
    if catalog.stays.mixes(name) {
        return Means::Both;
    }
    let stays = catalog.stays.has(name);
    let migrates = match catalog.resolve(side, name) {
        Resolution::Tables(tables) => !tables.is_empty(),
        // A qualified name is looked up by its bare one among views.
        Resolution::View { tables, .. } => !tables.is_empty() || !stays,
        Resolution::Other => false,
    };
    match (stays, migrates) {
        (false, false) => Means::Neither,
        (false, true) => Means::Migrating,
        (true, false) => Means::Staying,
        (true, true) => Means::Both,
    }
}

fn label(name: &Name) -> String {
    let mut label = String::new();
    if let Some(schema) = &name.schema {
        let _ = write!(label, "{schema}.");
    }
    label + &name.name
}
