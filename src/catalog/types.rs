//! How values of a type travel: paired by name between the two sides, down to elements, fields and subtypes.

use super::read::Type;
use super::{Format, Layout, Sides, TypeInfo};
use crate::phase::Side;
use std::collections::HashMap;

/// Types of both sides, by OID.
pub(super) type Types<'a> = Sides<&'a HashMap<u32, Type>>;

/// Types nest no deeper than this; a composite cannot contain itself but through arrays.
const DEPTH_MAX: usize = 32;

/// Built-in types whose binary form holds neither text nor OIDs of the server (`oid` itself is a number like another).
const PLAIN: &[&str] = &[
    "bool",
    "bytea",
    "char",
    "int8",
    "int2",
    "int4",
    "oid",
    "tid",
    "xid",
    "cid",
    "xid8",
    "point",
    "lseg",
    "path",
    "box",
    "polygon",
    "line",
    "circle",
    "float4",
    "float8",
    "money",
    "macaddr",
    "macaddr8",
    "inet",
    "cidr",
    "date",
    "time",
    "timestamp",
    "timestamptz",
    "timetz",
    "interval",
    "bit",
    "varbit",
    "numeric",
    "uuid",
    "pg_lsn",
    "txid_snapshot",
    "pg_snapshot",
    "int2vector",
    "oidvector",
];

/// Send functions of pg_catalog that give nothing but the value's text.
const TEXT_SEND: &[&str] =
    &["textsend", "varcharsend", "bpcharsend", "namesend", "json_send", "enum_send", "citextsend"];

/// Types that travel as text, which depends on no setting (regclass: as `plan::splice` spells it).
/// tsquery: its receive function refuses what its send function makes of an empty one.
const AS_TEXT: &[&str] =
    &["xml", "tsquery", "regclass", "regrole", "regnamespace", "aclitem", "seg", "query_int", "lquery", "ltxtquery"];

/// Types whose binary form is an OID of the server, and whose text depends on search_path.
const BY_OID: &[&str] =
    &["regproc", "regprocedure", "regoper", "regoperator", "regtype", "regconfig", "regdictionary", "regcollation"];

/// A type and how its values travel, or why none can.
pub(super) fn pair(types: &Types, oid: &Sides<u32>) -> Result<(TypeInfo, Format), String> {
    descend(types, oid, 0)
}

fn descend(types: &Types, oid: &Sides<u32>, depth: usize) -> Result<(TypeInfo, Format), String> {
    let find = |side: Side| {
        types.get(side).get(oid.get(side)).ok_or_else(|| format!("type {} is unknown on {side}", oid.get(side)))
    };
    let found = Sides { old: find(Side::Old)?, new: find(Side::New)? };
    let (old, new) = (found.old, found.new);
    if depth > DEPTH_MAX {
        return Err(format!("type {} contains itself, or nests more than {DEPTH_MAX} types", old.text));
    }
    let name = Sides { old: old.text.clone(), new: new.text.clone() };
    // An extension may live in another schema on each side.
    let same_place = old.schema == new.schema || (old.of_extension && new.of_extension);
    if old.name != new.name && !(old.element != 0 && new.element != 0) || old.kind != new.kind || !same_place {
        return Err(format!("type {} on old is {} on new", old.text, new.text));
    }
    let info = |layout| TypeInfo { oid: oid.clone(), name: name.clone(), layout };
    let inner = |pick: fn(&Type) -> u32| descend(types, &Sides { old: pick(old), new: pick(new) }, depth + 1);
    let binary = |pick: fn(&Type) -> u32| match inner(pick)? {
        (inside, Format::Binary) => Ok(Box::new(inside)),
        (inside, Format::Text) => {
            Err(format!("type {}: values of {} inside it have no exact binary form", old.text, inside.name.old))
        }
    };
    match (old.kind, old.send.as_str()) {
        ('d', _) => {
            let (base, format) = inner(|kind| kind.base)?;
            if base.name.old == "regclass" {
                return Err(format!("domain {} over regclass: its text depends on search_path", old.text));
            }
            Ok((info(base.layout), format))
        }
        ('c', _) => Ok((info(Layout::Composite(fields(types, old, new, depth)?)), Format::Binary)),
        ('r', _) => Ok((info(Layout::Range(binary(|kind| kind.subtype)?)), Format::Binary)),
        ('m', _) => Ok((info(Layout::Multirange(binary(|kind| kind.range)?)), Format::Binary)),
        (_, "pg_catalog.array_send") => Ok((info(Layout::Array(binary(|kind| kind.element)?)), Format::Binary)),
        _ => leaf(old, new).map(|(layout, format)| (info(layout), format)),
    }
}

fn fields(types: &Types, old: &Type, new: &Type, depth: usize) -> Result<Vec<TypeInfo>, String> {
    if !old.fields.iter().map(|(name, _)| name).eq(new.fields.iter().map(|(name, _)| name)) {
        return Err(format!("composite type {} has other fields on new", old.text));
    }
    let pairs = old.fields.iter().zip(&new.fields);
    pairs
        .map(|((name, old_oid), (_, new_oid))| {
            match descend(types, &Sides { old: *old_oid, new: *new_oid }, depth + 1)? {
                (inside, Format::Binary) => Ok(inside),
                (inside, Format::Text) => Err(format!(
                    "composite type {}: its field {name} of type {} has no exact binary form",
                    old.text, inside.name.old
                )),
            }
        })
        .collect()
}

fn leaf(old: &Type, new: &Type) -> Result<(Layout, Format), String> {
    let name = old.name.as_str();
    let built_in = old.schema == "pg_catalog";
    if built_in && BY_OID.contains(&name) {
        return Err(format!("values of type {name} are OIDs of the server, and their text depends on search_path"));
    }
    if AS_TEXT.contains(&name) && (built_in || old.of_extension) {
        return Ok((Layout::Text, Format::Text));
    }
    if [old, new].iter().any(|kind| kind.send.is_empty() || !kind.receives) {
        return Err(format!("type {} has no binary form, and its text may depend on settings", old.text));
    }
    let send = old.send.rsplit('.').next().unwrap_or_default();
    let layout = match () {
        _ if built_in && PLAIN.contains(&name) => Layout::Plain,
        _ if TEXT_SEND.contains(&send) => Layout::Text,
        _ if send == "jsonb_send" => Layout::Jsonb,
        _ => Layout::Mixed,
    };
    Ok((layout, Format::Binary))
}

/// Whether equal values of the type have the same bytes, whatever wrote them. `modifier`: the column's; `deterministic`: the collation
/// of its index.
pub(super) fn bytewise(types: &HashMap<u32, Type>, oid: u32, modifier: i32, deterministic: bool) -> bool {
    let Some(mut found) = types.get(&oid) else { return false };
    let mut modifier = modifier;
    while found.kind == 'd' {
        // A domain over char(n) keeps its length in pg_type.typtypmod, which is not read: such a key is not taken to be bytewise.
        modifier = -1;
        match types.get(&found.base) {
            Some(base) => found = base,
            None => return false,
        }
    }
    if found.kind == 'e' {
        return true;
    }
    if found.schema != "pg_catalog" {
        return false;
    }
    match found.name.as_str() {
        "int2" | "int4" | "int8" | "uuid" | "bool" | "date" | "timestamp" | "timestamptz" | "time" | "bytea"
        | "oid" | "char" | "pg_lsn" | "xid8" => true,
        "text" | "varchar" | "name" => deterministic,
        // Padded to one length, so that equal values have equal bytes; bpchar without a length is not.
        "bpchar" => deterministic && modifier > 0,
        _ => false,
    }
}
