//! What both databases say of the migrating tables: definitions, keys, types, functions, privileges.
//! Loaded over control connections; a value without I/O once loaded.

//!
//! `load` reads both sides (`read`), pairs their tables and types (`pair`, `types`) under the numbers of `crossfade.tables` (`number`);
//! `fingerprint` says cheaply whether any of it has changed since. Nothing here decides what a statement does: that is `plan`.

mod definitions;
mod fingerprint;
mod lazy;
mod load;
mod number;
mod pair;
mod read;
mod stays;
mod triggers;
mod types;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::phase::Side;
use crate::sql::facts::Name;

pub use definitions::{Definitions, Unsettled, read as definitions, version};
pub use fingerprint::fingerprint;
pub use lazy::Behind;
pub use load::{CatalogError, load};
pub use number::number;
pub use stays::Stays;

/// A value of `T` for each side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sides<T> {
    /// On old.
    pub old: T,
    /// On new.
    pub new: T,
}

impl<T> Sides<T> {
    /// The value of that side.
    pub fn get(&self, side: Side) -> &T {
        match side {
            Side::Old => &self.old,
            Side::New => &self.new,
        }
    }

    /// The value of that side, to change.
    pub fn get_mut(&mut self, side: Side) -> &mut T {
        match side {
            Side::Old => &mut self.old,
            Side::New => &mut self.new,
        }
    }
}

/// How a column's value travels in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As the type's send function gives it.
    Binary,
    /// As its output function gives it (types without a send function, or whose binary form holds OIDs of the server).
    Text,
}

/// The binary layout of a type, as far as OIDs inside values must be translated between the two servers, or text inside depends on the
/// encoding of the session that reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// No OIDs inside, and no text.
    Plain,
    /// Nothing but the value's text, in the encoding of the session (text, varchar, json, enums, citext, ...).
    Text,
    /// jsonb_send: a byte 1, then the text.
    Jsonb,
    /// No OIDs inside, but text in the encoding of the session may be (hstore, tsvector, types of extensions).
    Mixed,
    /// array_send: the element type's OID at byte 8, then elements.
    Array(Box<TypeInfo>),
    /// record_send: number of fields, then per field OID, length, value.
    Composite(Vec<TypeInfo>),
    /// range_send over a subtype.
    Range(Box<TypeInfo>),
    /// multirange_send over a range type.
    Multirange(Box<TypeInfo>),
}

/// A type as both sides know it. A domain has its own OID and name, and the layout of its base type: so do array_send and record_send
/// write the values of domains inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeInfo {
    /// Its OID on each side.
    pub oid: Sides<u32>,
    /// `format_type` with schema where needed, usable in a cast on each side.
    pub name: Sides<String>,
    /// What lies inside its binary form.
    pub layout: Layout,
}

impl TypeInfo {
    /// On that side it is what `other` is, down to what lies inside.
    fn same_on(&self, side: Side, other: &TypeInfo) -> bool {
        let inside = match (&self.layout, &other.layout) {
            (Layout::Array(one), Layout::Array(other))
            | (Layout::Range(one), Layout::Range(other))
            | (Layout::Multirange(one), Layout::Multirange(other)) => one.same_on(side, other),
            (Layout::Composite(one), Layout::Composite(other)) => {
                one.len() == other.len() && one.iter().zip(other).all(|(one, other)| one.same_on(side, other))
            }
            (one, other) => one == other,
        };
        self.oid.get(side) == other.oid.get(side) && inside
    }
}

/// One column of a migrating table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name (not quoted), on each side.
    pub name: Sides<String>,
    /// Its type.
    pub kind: TypeInfo,
    /// `atttypid` on each side (the domain's own OID for a domain): what record_send says of the field.
    pub type_oid: Sides<u32>,
    /// How its value travels.
    pub format: Format,
    /// A generated column, stored or virtual: never written.
    pub generated: Sides<bool>,
    /// GENERATED ALWAYS AS IDENTITY.
    pub identity_always: Sides<bool>,
}

/// The key of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Positions in `Table::columns`, in key order.
    pub columns: Vec<usize>,
    /// Deferrable on that side: cannot be an arbiter of ON CONFLICT there.
    pub deferrable: Sides<bool>,
    /// Two equal keys have the same bytes (integers, uuid, text with a deterministic collation, ...; not numeric, float, citext).
    pub bytewise: bool,
    /// The equality operator of the key's index for each column, usable in SQL whatever the search_path: `OPERATOR(pg_catalog.=)`.
    pub equals: Sides<Vec<String>>,
    /// No other unique index stands over the same columns with another equality: ON CONFLICT on these columns finds rows with an equal key.
    pub alone: Sides<bool>,
}

/// What may happen beside the rows that a statement names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SideEffects {
    /// Enabled user triggers, or foreign keys with a cascading action towards other tables, fire on INSERT.
    pub insert: bool,
    /// ... on UPDATE.
    pub update: bool,
    /// ... on DELETE.
    pub delete: bool,
    /// A foreign key towards the key cascades (or sets null, or default) where an UPDATE changes it.
    pub rekey: bool,
    /// An enabled BEFORE ROW trigger on UPDATE that may change the key.
    pub before_row: bool,
    /// An enabled trigger fires on TRUNCATE.
    pub truncate: bool,
}

/// One migrating table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its number in the migration (`crossfade.tables`): the same on both sides and for ever.
    pub number: u32,
    /// Schema, on each side.
    pub schema: Sides<String>,
    /// Name, on each side.
    pub name: Sides<String>,
    /// pg_class OID, on each side.
    pub oid: Sides<u32>,
    /// OIDs of all partitions below it (leaves and inner), on each side; empty for an ordinary table.
    pub partitions: Sides<Vec<u32>>,
    /// Its columns in the order of old's attnum, without dropped ones.
    pub columns: Vec<Column>,
    /// The order of columns as record_send(ROW(t.*)) gives them on that side: positions in `columns`.
    pub order: Sides<Vec<usize>>,
    /// Its key; None: rows are only ever added by image.
    pub key: Option<Key>,
    /// Triggers and cascades, on each side.
    pub effects: Sides<SideEffects>,
    /// Row security is enabled on that side.
    pub row_security: Sides<bool>,
    /// It has rules on that side.
    pub rules: Sides<bool>,
    /// Why no image of its rows can be had at all (a type whose text depends on settings, columns that differ): such a table's writes are opaque.
    pub opaque: Option<String>,
    /// Tables (by number) that TRUNCATE ... CASCADE of this one would reach, on each side, itself not included.
    pub truncate_cascade: Sides<Vec<u32>>,
    /// `backfill: lazy`, and not complete: new may lack rows, and those it has are right once nothing of the table is owed.
    pub lazy: bool,
}

impl Table {
    /// `schema.name`, quoted for SQL on that side.
    pub fn qualified(&self, side: Side) -> String {
        format!("{}.{}", quote(self.schema.get(side)), quote(self.name.get(side)))
    }

    /// Its pg_class OID and those of its partitions on that side.
    pub fn oids(&self, side: Side) -> Vec<u32> {
        self.partitions.get(side).iter().chain([self.oid.get(side)]).copied().collect()
    }

    /// On that side it is what `other` is: a statement that was planned under the one means the same under the other, and so does its image.
    pub fn same_on(&self, side: Side, other: &Table) -> bool {
        let place = |table: &Table| {
            let Table { schema, name, oid, partitions, order, row_security, rules, .. } = table;
            let place = (schema.get(side).clone(), name.get(side).clone(), *oid.get(side));
            (place, partitions.get(side).clone(), order.get(side).clone(), *row_security.get(side), *rules.get(side))
        };
        let key = |table: &Table| table.key.as_ref().map(|key| key.columns.clone());
        let columns = |one: &Column, other: &Column| {
            let of = |column: &Column| {
                let Column { name, type_oid, generated, .. } = column;
                (name.get(side).clone(), *type_oid.get(side), column.format, *generated.get(side))
            };
            of(one) == of(other) && one.kind.same_on(side, &other.kind)
        };
        self.number == other.number
            && place(self) == place(other)
            && key(self) == key(other)
            && self.effects.get(side) == other.effects.get(side)
            && self.columns.len() == other.columns.len()
            && self.columns.iter().zip(&other.columns).all(|(one, other)| columns(one, other))
    }

    /// The same rows are kept in the same way as in `other`, on both sides: what was known of their equality is still known.
    pub fn keeps(&self, other: &Table) -> bool {
        self.oid == other.oid
            && self.partitions == other.partitions
            && self.columns == other.columns
            // A column may have taken the name of another.
            && self.order == other.order
            && self.key == other.key
            && self.opaque.is_some() == other.opaque.is_some()
    }

    /// `schema.name` as people read it (old's name).
    pub fn label(&self) -> String {
        format!("{}.{}", self.schema.old, self.name.old)
    }
}

/// Everything known of the migrating tables at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Catalog {
    /// By number.
    pub tables: HashMap<u32, Arc<Table>>,
    /// By pg_class OID (the table's own and those of its partitions), on each side.
    pub by_oid: Sides<HashMap<u32, Arc<Table>>>,
    /// By schema and name: migrating tables and partitions of such, leading to their root, on each side.
    pub by_qualified: Sides<HashMap<(String, String), Arc<Table>>>,
    /// By bare name (no schema): every migrating table of that name (partitions included, leading to their root), on each side.
    pub by_name: Sides<HashMap<String, Vec<Arc<Table>>>>,
    /// Views, foreign tables and other relations that are no ordinary table: bare name, with whether reading it may call a function that can write.
    pub views: Sides<HashMap<String, bool>>,
    /// Names of functions outside pg_catalog that may write (not IMMUTABLE, and not written in C by an extension); bare names.
    pub writing_functions: Sides<HashSet<String>>,
    /// Names of all functions outside pg_catalog; bare names.
    pub functions: Sides<HashSet<String>>,
    /// Other names that may stand where a function's does: those of the system's functions, of types (a cast) and of what the grammar knows.
    pub callable: Sides<HashSet<String>>,
    /// Names of the system's functions that give the same on each server, for the same arguments and settings: none by this name is volatile, tells the
    /// time, or tells of the session or the server.
    pub reproducible: Sides<HashSet<String>>,
    /// Bare names of partitions of migrating tables: their columns may stand in another order than their root's.
    pub partition_names: Sides<HashSet<String>>,
    /// By number: the tables that inherit from this one (INHERITS, not partitions), on either side: a write to it may reach their rows.
    pub heirs: HashMap<u32, Vec<u32>>,
    /// Bare names of tables that do not migrate, where a write may reach others by a trigger, a cascade, a rule or a default that calls a function.
    pub triggered: Sides<HashSet<String>>,
    /// Bare names of tables that do not migrate, from where TRUNCATE ... CASCADE or one of its triggers may reach migrating ones.
    pub truncate_reaches: Sides<HashSet<String>>,
    /// Bare names of tables that do not migrate: a bare name in a statement may mean one of them.
    pub staying: Sides<HashSet<String>>,
    /// What stays on old for ever, while other tables migrate.
    pub stays: Stays,
    /// `schema.name` of tables that do not migrate because the other side has none of that name; sorted. With rules: those named there.
    pub one_sided: Sides<Vec<String>>,
    /// (role, table number) that may write the table or a partition and lacks SELECT there, on each side.
    pub no_select: Sides<HashSet<(String, u32)>>,
    /// Numbers of tables that are on neither side any more: nothing can be owed there.
    pub gone: HashSet<u32>,
    /// Numbers of tables that are partitions of a migrating one by now, on both sides, and its number: what they owe it owes.
    pub attached: HashMap<u32, u32>,
    /// What of new leads to lazy tables without naming them. None: no table is lazy.
    pub behind: Option<Behind>,
    /// This side could not be read: the other's definitions stand for it.
    pub stands_in: Option<Side>,
    /// Which version of the definitions this is, on each side.
    pub definitions: Sides<Definitions>,
    /// server_encoding of each side.
    pub encoding: Sides<String>,
    /// server_version_num of each side.
    pub version: Sides<u32>,
}

/// What a name in a statement may mean.
#[derive(Clone, Debug, PartialEq)]
pub enum Resolution {
    /// One of these migrating tables (several where a bare name stands for tables in several schemas). A temporary table or one that
    /// does not migrate may hide behind the same bare name: `tableoid` in the image tells.
    Tables(Vec<Arc<Table>>),
    /// A view or foreign table.
    View {
        /// Reading it may call a function that can write.
        writes: bool,
        /// Migrating tables of the same bare name.
        tables: Vec<Arc<Table>>,
    },
    /// Neither.
    Other,
}

impl Catalog {
    /// Nothing was being changed on either side, when it was read.
    pub fn is_settled(&self) -> bool {
        Side::BOTH.iter().all(|side| self.definitions.get(*side).unsettled == Unsettled::Nothing)
    }

    /// Nothing was being changed on that side, when it was read, that this table depends on.
    pub fn settled(&self, side: Side, table: &Table) -> bool {
        let definitions = self.definitions.get(side);
        definitions.unsettled == Unsettled::Nothing || definitions.settled(&table.oids(side))
    }

    /// What a name in a statement may mean on that side, whatever the search_path.
    pub fn resolve(&self, side: Side, name: &Name) -> Resolution {
        let tables: Vec<Arc<Table>> = match &name.schema {
            Some(schema) => {
                let key = (schema.clone(), name.name.clone());
                self.by_qualified.get(side).get(&key).cloned().into_iter().collect()
            }
            None => self.by_name.get(side).get(&name.name).cloned().unwrap_or_default(),
        };
        if name.schema.is_some() && !tables.is_empty() {
            return Resolution::Tables(tables);
        }
        match self.views.get(side).get(&name.name) {
            Some(&writes) => Resolution::View { writes, tables },
            None if tables.is_empty() => Resolution::Other,
            None => Resolution::Tables(tables),
        }
    }
}

/// Functions of pg_catalog that write (large objects), or that run SQL text in which anything may be called.
pub const WRITING_BUILT_IN: &[&str] = &[
    "cursor_to_xml",
    "cursor_to_xmlschema",
    "database_to_xml",
    "database_to_xml_and_xmlschema",
    "lo_close",
    "lo_creat",
    "lo_create",
    "lo_from_bytea",
    "lo_import",
    "lo_put",
    "lo_truncate",
    "lo_truncate64",
    "lo_unlink",
    "lowrite",
    "query_to_xml",
    "query_to_xml_and_xmlschema",
    "query_to_xmlschema",
    "schema_to_xml",
    "schema_to_xml_and_xmlschema",
    "table_to_xml",
    "table_to_xml_and_xmlschema",
    "ts_rewrite",
    "ts_stat",
];

/// An identifier, quoted for SQL.
pub fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}
