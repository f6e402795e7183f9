//! What both databases say of the migrating tables: definitions, keys, types, functions, privileges.
//! Loaded over control connections; a value without I/O once loaded.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::phase::Side;

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

/// The binary layout of a type, as far as OIDs inside values must be translated between the two servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// No OIDs inside.
    Plain,
    /// array_send: the element type's OID at byte 8, then elements.
    Array(Box<TypeInfo>),
    /// record_send: number of fields, then per field OID, length, value.
    Composite(Vec<TypeInfo>),
    /// range_send over a subtype.
    Range(Box<TypeInfo>),
    /// multirange_send over a range type.
    Multirange(Box<TypeInfo>),
}

/// A type as both sides know it (a domain stands as its base type).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeInfo {
    /// Its OID on each side.
    pub oid: Sides<u32>,
    /// `format_type` with schema where needed, usable in a cast on each side.
    pub name: Sides<String>,
    /// What lies inside its binary form.
    pub layout: Layout,
}

/// One column of a migrating table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name (not quoted), on each side.
    pub name: Sides<String>,
    /// Its type. For a domain: the base type's layout, with `type_oid` the domain's own.
    pub kind: TypeInfo,
    /// `atttypid` on each side (the domain's own OID for a domain): what record_send says of the field.
    pub type_oid: Sides<u32>,
    /// How its value travels.
    pub format: Format,
    /// A stored generated column: never written.
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
    /// An enabled BEFORE ROW trigger on UPDATE (it may change the key), or on INSERT.
    pub before_row: bool,
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
}

impl Table {
    /// `schema.name`, quoted for SQL on that side.
    pub fn qualified(&self, side: Side) -> String {
        format!("{}.{}", quote(self.schema.get(side)), quote(self.name.get(side)))
    }

    /// `schema.name` as people read it (old's name).
    pub fn label(&self) -> String {
        format!("{}.{}", self.schema.old, self.name.old)
    }
}

/// Everything known of the migrating tables at one moment.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// By number.
    pub tables: HashMap<u32, Arc<Table>>,
    /// By pg_class OID (the table's own and those of its partitions), on each side.
    pub by_oid: Sides<HashMap<u32, Arc<Table>>>,
    /// By bare name (no schema): every migrating table of that name (partitions included, leading to their root), on each side.
    pub by_name: Sides<HashMap<String, Vec<Arc<Table>>>>,
    /// Views, foreign tables and other relations that are no ordinary table: bare name, with whether reading it may call a function that can write.
    pub views: Sides<HashMap<String, bool>>,
    /// Names of functions outside pg_catalog that may write (not IMMUTABLE, and not written in C by an extension); bare names.
    pub writing_functions: Sides<HashSet<String>>,
    /// Names of all functions outside pg_catalog; bare names.
    pub functions: Sides<HashSet<String>>,
    /// (role, table number) without SELECT on all columns of the table, on each side.
    pub no_select: Sides<HashSet<(String, u32)>>,
    /// server_encoding of each side.
    pub encoding: Sides<String>,
    /// server_version_num of each side.
    pub version: Sides<u32>,
}

/// An identifier, quoted for SQL.
pub fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}
