//! What stays on old for ever while other tables migrate: a service that takes only some tables out of a monolith leaves the rest where it is. Which
//! relations these are, by name.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::read::{Relation, Server};
use super::{Sides, Table};
use crate::sql::facts::Name;

/// Names with the schemas that have them.
type Names = HashMap<String, HashSet<String>>;

/// Relations of old that do not migrate, by the names that a statement may give them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stays {
    /// Tables, foreign tables, and views over such alone.
    relations: Names,
    /// Views over tables that stay and tables that migrate.
    mixed: Names,
    /// Sequences that no migrating table owns.
    sequences: Names,
    /// `schema.name` of the tables among them that new has, too: a statement that is run there by mistake would not fail. Sorted.
    pub twice: Vec<String>,
}

impl Stays {
    /// `migrating`: by OID on old. `named`: the file names the tables that migrate, so that all others stay; else those stay that new lacks, and one that
    /// both sides have is each side's own.
    pub(super) fn of(servers: &Sides<Server>, migrating: &HashMap<u32, Arc<Table>>, named: bool) -> Stays {
        let old = &servers.old;
        let on_new: HashSet<(&str, &str)> =
            servers.new.relations.values().map(|found| (found.schema.as_str(), found.name.as_str())).collect();
        let is_on_new = |found: &Relation| on_new.contains(&(found.schema.as_str(), found.name.as_str()));
        let table = |found: &Relation| matches!(found.kind, 'r' | 'p' | 'f') && !found.of_extension;
        let staying: HashSet<u32> = old
            .relations
            .values()
            .filter(|found| table(found) && !migrating.contains_key(&found.oid) && (named || !is_on_new(found)))
            .map(|found| found.oid)
            .collect();
        let mut stays = Stays::default();
        for found in old.relations.values() {
            if staying.contains(&found.oid) {
                enter(&mut stays.relations, &found.schema, &found.name);
                if is_on_new(found) && !found.partition {
                    stays.twice.push(label(found));
                }
            } else if matches!(found.kind, 'v' | 'm') {
                let read = below(&old.view_reads, found.oid);
                match (read.iter().any(|oid| staying.contains(oid)), read.iter().any(|oid| migrating.contains_key(oid)))
                {
                    (true, false) => enter(&mut stays.relations, &found.schema, &found.name),
                    (true, true) => enter(&mut stays.mixed, &found.schema, &found.name),
                    (false, _) => {}
                }
            }
        }
        if stays.relations.is_empty() {
            return Stays::default();
        }
        let sequences_of_new: HashSet<(&String, &String)> =
            servers.new.sequences.iter().map(|(schema, name, _)| (schema, name)).collect();
        for (schema, name, owner) in &old.sequences {
            if staying.contains(owner) || !migrating.contains_key(owner) && !sequences_of_new.contains(&(schema, name))
            {
                enter(&mut stays.sequences, schema, name);
            }
        }
        stays.twice.sort();
        stays
    }

    /// Nothing stays: all that old has migrates, or new has its own.
    pub fn is_empty(&self) -> bool {
        self.relations.is_empty()
    }

    /// The name may mean a table that stays, or a view over such alone.
    pub fn has(&self, name: &Name) -> bool {
        means(&self.relations, name)
    }

    /// The name may mean a view over tables that stay and tables that migrate.
    pub fn mixes(&self, name: &Name) -> bool {
        means(&self.mixed, name)
    }

    /// The name may mean a table, view or sequence that stays.
    pub fn has_relation(&self, name: &Name) -> bool {
        self.has(name) || means(&self.sequences, name)
    }

    /// The same of `schema.name`, quoted where it must be; or a view over tables of both kinds.
    pub fn has_label(&self, label: &str) -> bool {
        let plain = label.replace('"', "");
        let Some((schema, name)) = plain.split_once('.') else { return false };
        let name = Name { schema: Some(schema.to_owned()), name: name.to_owned() };
        self.has_relation(&name) || self.mixes(&name)
    }
}

fn label(relation: &Relation) -> String {
    format!("{}.{}", relation.schema, relation.name)
}

fn enter(names: &mut Names, schema: &str, name: &str) {
    names.entry(name.to_owned()).or_default().insert(schema.to_owned());
}

fn means(names: &Names, name: &Name) -> bool {
    let schemas = names.get(&name.name);
    schemas.is_some_and(|schemas| name.schema.as_ref().is_none_or(|schema| schemas.contains(schema)))
}

/// All that a view reads, by whatever views.
fn below(reads: &[(u32, u32)], view: u32) -> HashSet<u32> {
    let mut found = HashSet::new();
    let mut open = vec![view];
    while let Some(next) = open.pop() {
        open.extend(
            reads
                .iter()
                .filter(|(reader, _)| *reader == next)
                .map(|(_, read)| *read)
                .filter(|read| found.insert(*read)),
        );
    }
    found
}
