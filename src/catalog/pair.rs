//! Pairing what both servers say into the tables of the migration.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::number::Place;
use super::read::{Attribute, Index, Server};
use super::{Catalog, Column, Format, Key, SideEffects, Sides, Table, triggers, types};
use crate::phase::Side;

impl<T> Sides<T> {
    /// One value for each side.
    pub(super) fn of(mut value: impl FnMut(Side) -> T) -> Sides<T> {
        Sides { old: value(Side::Old), new: value(Side::New) }
    }
}

/// How the relations of one side hang together.
struct Relations {
    by_name: HashMap<(String, String), u32>,
    /// Partitions and heirs.
    children: HashMap<u32, Vec<u32>>,
    /// Of a partition.
    parent: HashMap<u32, u32>,
    /// Referenced table to those that reference it.
    referencing: HashMap<u32, Vec<u32>>,
}

impl Relations {
    fn of(server: &Server) -> Relations {
        let by_name =
            server.relations.values().map(|relation| ((relation.schema.clone(), relation.name.clone()), relation.oid));
        let mut found = Relations {
            by_name: by_name.collect(),
            children: HashMap::new(),
            parent: HashMap::new(),
            referencing: HashMap::new(),
        };
        for &(parent, child) in server.inherits.iter().filter(|(_, child)| server.relations.contains_key(child)) {
            found.children.entry(parent).or_default().push(child);
            if server.relations[&child].partition {
                found.parent.insert(child, parent);
            }
        }
        for (&referenced, keys) in &server.foreign_keys {
            let referenced = found.root(referenced);
            let referencing: Vec<u32> = keys.iter().map(|key| found.root(key.referencing)).collect();
            found.referencing.entry(referenced).or_default().extend(referencing);
        }
        found
    }

    fn root(&self, mut oid: u32) -> u32 {
        while let Some(&parent) = self.parent.get(&oid) {
            oid = parent;
        }
        oid
    }

    /// Everything below, by `edges`; sorted.
    fn below(edges: &HashMap<u32, Vec<u32>>, oid: u32) -> BTreeSet<u32> {
        let mut found = BTreeSet::new();
        let mut open = vec![oid];
        while let Some(next) = open.pop() {
            open.extend(edges.get(&next).into_iter().flatten().filter(|child| found.insert(**child)));
        }
        found.remove(&oid);
        found
    }
}

/// Builds the catalog. `places` are on both sides; `numbers` by schema and name on old.
pub(super) fn catalog(
    servers: &Sides<Server>,
    places: &[Place],
    numbers: &BTreeMap<(String, String), u32>,
    one_sided: Sides<Vec<String>>,
    lazy: &HashSet<u32>,
) -> Catalog {
    let relations = Sides::of(|side| Relations::of(servers.get(side)));
    let mut placed = Vec::new();
    for (old_schema, old_name, new_schema, new_name) in places {
        let from = (old_schema.clone(), old_name.clone());
        let to = (new_schema.clone(), new_name.clone());
        if let Some(&number) = numbers.get(&from) {
            placed.push((number, Sides { old: relations.old.by_name[&from], new: relations.new.by_name[&to] }));
        }
    }
    let number_of =
        Sides::of(|side| placed.iter().map(|(number, oid)| (*oid.get(side), *number)).collect::<HashMap<u32, u32>>());
    let mut catalog = Catalog {
        encoding: Sides::of(|side| servers.get(side).encoding.clone()),
        version: Sides::of(|side| servers.get(side).version),
        functions: Sides::of(|side| servers.get(side).functions.clone()),
        callable: Sides::of(|side| servers.get(side).callable.clone()),
        reproducible: Sides::of(|side| servers.get(side).reproducible.clone()),
        writing_functions: Sides::of(|side| servers.get(side).writing_functions.clone()),
        one_sided,
        ..Catalog::default()
    };
    for (number, oid) in placed {
        let mut table = table(servers, &relations, number, oid);
        table.lazy = lazy.contains(&number);
        table.truncate_cascade = Sides::of(|side| {
            let reached = Relations::below(&relations.get(side).referencing, *table.oid.get(side));
            reached.iter().filter_map(|oid| number_of.get(side).get(oid).copied()).collect()
        });
        heirs(servers, &relations, &number_of, &mut catalog, &mut table);
        enter(servers, &mut catalog, Arc::new(table));
    }
    for side in Side::BOTH {
        surroundings(servers.get(side), relations.get(side), &mut catalog, side);
    }
    catalog
}

/// A table from which others inherit cannot be captured: RETURNING gives their rows without their own columns.
fn heirs(
    servers: &Sides<Server>,
    relations: &Sides<Relations>,
    number_of: &Sides<HashMap<u32, u32>>,
    catalog: &mut Catalog,
    table: &mut Table,
) {
    let mut found = BTreeSet::new();
    for side in Side::BOTH {
        let oid = *table.oid.get(side);
        if servers.get(side).relations[&oid].kind == 'r' && relations.get(side).children.contains_key(&oid) {
            let below = Relations::below(&relations.get(side).children, oid);
            found.extend(below.iter().filter_map(|oid| number_of.get(side).get(oid).copied()));
            table.opaque.get_or_insert_with(|| format!("other tables inherit from it on {side}"));
        }
    }
    if !found.is_empty() {
        catalog.heirs.insert(table.number, found.into_iter().collect());
    }
}

fn enter(servers: &Sides<Server>, catalog: &mut Catalog, table: Arc<Table>) {
    for side in Side::BOTH {
        let server = servers.get(side);
        let oid = *table.oid.get(side);
        let parts = table.partitions.get(side);
        for member in parts.iter().chain([&oid]) {
            let relation = &server.relations[member];
            catalog.by_oid.get_mut(side).insert(*member, table.clone());
            let qualified = (relation.schema.clone(), relation.name.clone());
            catalog.by_qualified.get_mut(side).insert(qualified, table.clone());
            let named = catalog.by_name.get_mut(side).entry(relation.name.clone()).or_default();
            if !named.iter().any(|known| known.number == table.number) {
                named.push(table.clone());
            }
            if relation.partition {
                catalog.partition_names.get_mut(side).insert(relation.name.clone());
            }
        }
    }
    catalog.tables.insert(table.number, table);
}

/// Views, and the tables that do not migrate.
fn surroundings(server: &Server, relations: &Relations, catalog: &mut Catalog, side: Side) {
    let mut reads: HashMap<u32, Vec<u32>> = HashMap::new();
    for &(view, relation) in &server.view_reads {
        reads.entry(view).or_default().push(relation);
    }
    let migrating: HashSet<u32> = catalog.by_oid.get(side).keys().copied().collect();
    for (role, refused) in &server.no_select {
        if let Some(table) = catalog.by_oid.get(side).get(refused) {
            let refused = (role.clone(), table.number);
            catalog.no_select.get_mut(side).insert(refused);
        }
    }
    for relation in server.relations.values() {
        let oid = relation.oid;
        if matches!(relation.kind, 'v' | 'm' | 'f') {
            // A materialized view was computed before: reading it calls nothing.
            let calls = |view: &u32| {
                server.relations.get(view).is_some_and(|found| found.kind == 'v') && server.writing_views.contains(view)
            };
            let writes = relation.kind == 'v' && (calls(&oid) || Relations::below(&reads, oid).iter().any(calls));
            *catalog.views.get_mut(side).entry(relation.name.clone()).or_default() |= writes;
            continue;
        }
        if migrating.contains(&oid) {
            continue;
        }
        catalog.staying.get_mut(side).insert(relation.name.clone());
        let below = Relations::below(&relations.children, oid);
        let effects = effects(server, &below.iter().copied().chain([oid]).collect(), oid, &[]);
        if effects.insert
            || effects.update
            || effects.delete
            || relation.rules
            || below.iter().any(|heir| migrating.contains(heir))
        {
            catalog.triggered.get_mut(side).insert(relation.name.clone());
        }
        let reached = Relations::below(&relations.referencing, relations.root(oid));
        if effects.truncate || reached.iter().chain(&below).any(|oid| migrating.contains(oid)) {
            catalog.truncate_reaches.get_mut(side).insert(relation.name.clone());
        }
    }
}

/// One table of the migration; `truncate_cascade` is filled in later.
fn table(servers: &Sides<Server>, relations: &Sides<Relations>, number: u32, oid: Sides<u32>) -> Table {
    let relation = Sides::of(|side| &servers.get(side).relations[oid.get(side)]);
    let empty = Vec::new();
    let attributes = Sides::of(|side| servers.get(side).attributes.get(oid.get(side)).unwrap_or(&empty));
    let (columns, mut opaque) = columns(servers, &attributes);
    let key = match key(servers, &oid, &attributes, &columns) {
        Ok(key) => key,
        Err(reason) => {
            opaque.get_or_insert(reason);
            None
        }
    };
    let members = Sides::of(|side| {
        let mut members = match relation.get(side).kind {
            'p' => Relations::below(&relations.get(side).children, *oid.get(side)),
            _ => BTreeSet::new(),
        };
        members.insert(*oid.get(side));
        members
    });
    let any = |side: Side, says: fn(&super::read::Relation) -> bool| {
        members.get(side).iter().any(|member| servers.get(side).relations.get(member).is_some_and(says))
    };
    Table {
        number,
        schema: Sides::of(|side| relation.get(side).schema.clone()),
        name: Sides::of(|side| relation.get(side).name.clone()),
        partitions: Sides::of(|side| {
            members.get(side).iter().copied().filter(|member| member != oid.get(side)).collect()
        }),
        order: Sides::of(|side| order(attributes.get(side), &columns, side)),
        effects: Sides::of(|side| {
            let names = key.iter().flat_map(|key| &key.columns).map(|at| columns[*at].name.get(side).as_str());
            let names: Vec<&str> = names.collect();
            let key_columns = attributes.get(side).iter().filter(|attribute| names.contains(&attribute.name.as_str()));
            let key_columns: Vec<(i16, &str)> = key_columns.map(|found| (found.number, found.name.as_str())).collect();
            effects(servers.get(side), members.get(side), *oid.get(side), &key_columns)
        }),
        row_security: Sides::of(|side| any(side, |relation| relation.row_security)),
        rules: Sides::of(|side| any(side, |relation| relation.rules)),
        truncate_cascade: Sides::default(),
        lazy: false,
        oid,
        columns,
        key,
        opaque,
    }
}

fn order(attributes: &[Attribute], columns: &[Column], side: Side) -> Vec<usize> {
    let position = |attribute: &Attribute| columns.iter().position(|column| *column.name.get(side) == attribute.name);
    attributes.iter().filter_map(position).collect()
}

/// The columns that both sides have, in old's order, and why no image of the table can be had.
fn columns(servers: &Sides<Server>, attributes: &Sides<&Vec<Attribute>>) -> (Vec<Column>, Option<String>) {
    let mut columns = Vec::new();
    let mut opaque = None;
    let known = Sides::of(|side| &servers.get(side).types);
    for old in attributes.old {
        let Some(new) = attributes.new.iter().find(|new| new.name == old.name) else {
            opaque.get_or_insert(format!("column {} is missing on new", old.name));
            continue;
        };
        let type_oid = Sides { old: old.type_oid, new: new.type_oid };
        match types::pair(&known, &type_oid) {
            Ok((kind, format)) => {
                // Schemas of extensions may differ; modifiers must not: varchar(10) would refuse what varchar(20) holds.
                if old.type_modifier != new.type_modifier {
                    opaque.get_or_insert(format!(
                        "column {} is {} on old and {} on new",
                        old.name, old.type_text, new.type_text
                    ));
                }
                columns.push(Column {
                    name: Sides { old: old.name.clone(), new: new.name.clone() },
                    kind,
                    type_oid,
                    format,
                    generated: Sides { old: old.generated, new: new.generated },
                    identity_always: Sides { old: old.identity_always, new: new.identity_always },
                });
            }
            Err(reason) => {
                opaque.get_or_insert(format!("column {}: {reason}", old.name));
            }
        }
    }
    if let Some(new) = attributes.new.iter().find(|new| !attributes.old.iter().any(|old| old.name == new.name)) {
        opaque.get_or_insert(format!("column {} is missing on old", new.name));
    }
    (columns, opaque)
}

/// The first key of old that is a key on new too. An error where there are keys and none in common.
fn key(
    servers: &Sides<Server>,
    oid: &Sides<u32>,
    attributes: &Sides<&Vec<Attribute>>,
    columns: &[Column],
) -> Result<Option<Key>, String> {
    let candidates = Sides::of(|side| {
        let of_table = servers.get(side).indexes.get(oid.get(side)).into_iter().flatten();
        of_table.filter_map(|index| Some((index, names(index, attributes.get(side))?))).collect::<Vec<_>>()
    });
    for (old, old_names) in &candidates.old {
        let same = |names: &[&str]| names.len() == old_names.len() && names.iter().all(|name| old_names.contains(name));
        let Some((new, new_names)) = candidates.new.iter().find(|(_, names)| same(names)) else { continue };
        let positions: Option<Vec<usize>> =
            old_names.iter().map(|name| columns.iter().position(|column| column.name.old == *name)).collect();
        let Some(positions) = positions else { continue };
        let new_at: Vec<usize> =
            old_names.iter().filter_map(|name| new_names.iter().position(|other| other == name)).collect();
        let modifier =
            |name: &str| attributes.old.iter().find(|found| found.name == name).map_or(-1, |found| found.type_modifier);
        let bytewise = positions.iter().enumerate().all(|(at, &column)| {
            let deterministic = old.deterministic[at] && new.deterministic[new_at[at]];
            columns[column].format == Format::Binary
                && types::bytewise(
                    &servers.old.types,
                    columns[column].type_oid.old,
                    modifier(old_names[at]),
                    deterministic,
                )
        });
        let alone = Sides::of(|side| {
            let (index, names) = if side == Side::Old { (*old, old_names) } else { (*new, new_names) };
            candidates.get(side).iter().all(|(other, others)| same_equality((index, names), (other, others)))
        });
        return Ok(Some(Key {
            columns: positions,
            alone,
            deferrable: Sides { old: !old.immediate, new: !new.immediate },
            bytewise,
            equals: Sides { old: old.equals.clone(), new: new_at.iter().map(|&at| new.equals[at].clone()).collect() },
        }));
    }
    match (candidates.old.first(), candidates.new.first()) {
        (None, None) => Ok(None),
        (Some((_, names)), _) => Err(format!("its key ({}) on old is no key on new", names.join(", "))),
        (None, Some((_, names))) => Err(format!("its key ({}) on new is no key on old", names.join(", "))),
    }
}

/// Where they stand over the same columns, both take the same values for equal (and neither is deferrable alone, which ON CONFLICT does not take).
fn same_equality((index, names): (&Index, &[&str]), (other, others): (&Index, &[&str])) -> bool {
    let at = |name: &&str| others.iter().position(|other| other == name);
    let found: Option<Vec<usize>> = names.iter().map(at).collect();
    found.filter(|_| names.len() == others.len()).is_none_or(|found| {
        let mut pairs = found.into_iter().enumerate();
        index.immediate == other.immediate
            && pairs
                .all(|(a, b)| index.equals[a] == other.equals[b] && index.deterministic[a] == other.deterministic[b])
    })
}

/// The names of an index's columns, if all are NOT NULL.
fn names<'a>(index: &Index, attributes: &'a [Attribute]) -> Option<Vec<&'a str>> {
    let find = |number: &i16| attributes.iter().find(|found| found.number == *number && found.not_null);
    index.columns.iter().map(|number| find(number).map(|found| found.name.as_str())).collect()
}

const ROW: i16 = 1;
const BEFORE: i16 = 2;
const INSERT: i16 = 4;
const DELETE: i16 = 8;
const UPDATE: i16 = 16;
const TRUNCATE: i16 = 32;

/// What a write to a table may do beside it. `members`: the table and its partitions; `key`: number and name of its key's columns.
fn effects(server: &Server, members: &BTreeSet<u32>, root: u32, key: &[(i16, &str)]) -> SideEffects {
    let mut effects = SideEffects::default();
    let names: Vec<&str> = key.iter().map(|(_, name)| *name).collect();
    for trigger in members.iter().flat_map(|member| server.triggers.get(member)).flatten() {
        if !triggers::writes_nothing(trigger, &server.functions) {
            effects.insert |= trigger.bits & INSERT != 0;
            effects.update |= trigger.bits & UPDATE != 0;
            effects.delete |= trigger.bits & DELETE != 0;
            effects.truncate |= trigger.bits & TRUNCATE != 0;
        }
        let before_update = trigger.bits & (ROW | BEFORE | UPDATE) == ROW | BEFORE | UPDATE;
        effects.before_row |= before_update && !triggers::keeps_key(trigger, &names);
    }
    for (referenced, foreign) in members.iter().flat_map(|&oid| server.foreign_keys.get(&oid).map(|found| (oid, found)))
    {
        for foreign in foreign {
            effects.delete |= foreign.cascades_delete;
            // An UPDATE that leaves the key as it is cannot cascade from it.
            let to_key = referenced == root
                && foreign.referenced_columns.iter().all(|column| key.iter().any(|(number, _)| number == column));
            effects.update |= foreign.cascades_update && !to_key;
            effects.rekey |= foreign.cascades_update && to_key;
        }
    }
    if members.iter().any(|member| server.calling.contains(member)) {
        effects.insert = true;
        effects.update = true;
    }
    effects
}
