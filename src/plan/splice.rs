//! The hidden column: one row of a migrating table as one bytea, in SQL.
//!
//! `record_send(ROW(t.tableoid, t.*))` gives each column as its type's send function does: no setting of the session touches it but one, the
//! client's encoding, to which send functions convert text. Where that is not UTF-8 the columns are listed, and text is made UTF-8 by
//! `convert_to`: a value that the client's encoding cannot represent must not make the statement fail.

use crate::catalog::{Column, Format, Layout, Table, TypeInfo, quote};
use crate::phase::Side;

/// How text gets into an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Texts {
    /// As send functions give it: the session's client_encoding is UTF8.
    AsSession,
    /// By `convert_to(..., 'UTF8')`, whatever the session's client_encoding is.
    Utf8,
    /// As the bytes that are stored (a server whose encoding is SQL_ASCII, which cannot say what they mean).
    Stored,
}

/// Server encodings of which each character, and each byte, has a UTF-8 form: a conversion never fails.
const TOTAL: &[&str] = &["UTF8", "LATIN1", "LATIN2", "LATIN4", "LATIN5", "LATIN6", "LATIN9", "LATIN10", "KOI8R"];

/// How text of this table's rows can be had exactly, without ever failing; None where it cannot.
/// `server`: the side's server_encoding. `matches`: the session's client_encoding is UTF8.
pub fn texts(table: &Table, server: &str, matches: bool) -> Option<Texts> {
    let without_text = table.columns.iter().all(|column| column.format == Format::Binary && !has_text(&column.kind));
    let lists = || table.columns.iter().all(|column| convertible(column) || !has_text(&column.kind));
    match (server, matches) {
        _ if without_text => Some(Texts::AsSession),
        ("SQL_ASCII", _) => lists().then_some(Texts::Stored),
        (server, true) => TOTAL.contains(&server).then_some(Texts::AsSession),
        (server, false) => (TOTAL.contains(&server) && lists()).then_some(Texts::Utf8),
    }
}

fn has_text(kind: &TypeInfo) -> bool {
    match &kind.layout {
        Layout::Plain => false,
        Layout::Text | Layout::Jsonb | Layout::Mixed => true,
        Layout::Array(inside) | Layout::Range(inside) | Layout::Multirange(inside) => has_text(inside),
        // The names of the fields are not in it.
        Layout::Composite(fields) => fields.iter().any(has_text),
    }
}

/// The column's whole value is text, or text and a version byte.
pub(super) fn convertible(column: &Column) -> bool {
    column.format == Format::Text || matches!(column.kind.layout, Layout::Text | Layout::Jsonb)
}

/// The expression that yields the image of the row that SQL calls `row` there. `listed`: the row may be of a partition, whose columns may
/// stand in another order than its root's, so each is named.
pub fn expression(table: &Table, side: Side, row: &str, texts: Texts, listed: bool) -> String {
    let listed =
        listed || texts != Texts::AsSession || table.columns.iter().any(|column| column.format == Format::Text);
    if !listed {
        return format!("pg_catalog.record_send(ROW({row}.tableoid, {row}.*))");
    }
    // int8 says to who decodes it that text was converted.
    let mut fields = match texts {
        Texts::AsSession => format!("{row}.tableoid"),
        Texts::Utf8 | Texts::Stored => format!("{row}.tableoid::pg_catalog.int8"),
    };
    for &position in table.order.get(side) {
        fields.push_str(", ");
        fields.push_str(&value(&table.columns[position], side, row, texts));
    }
    format!("pg_catalog.record_send(ROW({fields}))")
}

/// The same image, which says at its end what MERGE (from PostgreSQL 17 on) has done to the row. MERGE_ACTION is a word of the grammar: no search_path gives it
/// another meaning.
pub fn with_action(image: &str) -> String {
    let fields = image.strip_suffix("))").unwrap_or(image);
    format!("{fields}, MERGE_ACTION()))")
}

fn value(column: &Column, side: Side, row: &str, texts: Texts) -> String {
    let value = format!("{row}.{}", quote(column.name.get(side)));
    let encoding = match texts {
        Texts::AsSession if column.format == Format::Text => return text(column, &value),
        Texts::AsSession => return value,
        Texts::Utf8 => "UTF8",
        Texts::Stored => "SQL_ASCII",
    };
    if convertible(column) { format!("pg_catalog.convert_to({}, '{encoding}')", text(column, &value)) } else { value }
}

/// The value as text. Not by a cast: char(n)::text loses blanks, and users may have made casts of their own.
fn text(column: &Column, value: &str) -> String {
    match column.kind.name.old.as_str() {
        // xml::text is what is stored; its output function drops the declaration.
        "xml" => format!("({value})::pg_catalog.text"),
        // regclass writes a name as search_path wants it; qualified it means the same everywhere.
        "regclass" => format!(
            "COALESCE((SELECT pg_catalog.concat(pg_catalog.quote_ident(crossfade_n.nspname), '.', pg_catalog.quote_ident(crossfade_c.relname)) \
             FROM pg_catalog.pg_class crossfade_c JOIN pg_catalog.pg_namespace crossfade_n ON crossfade_n.oid OPERATOR(pg_catalog.=) crossfade_c.relnamespace \
             WHERE crossfade_c.oid OPERATOR(pg_catalog.=) ({value})::pg_catalog.oid), ({value})::pg_catalog.oid::pg_catalog.text)"
        ),
        _ => format!("CASE WHEN {value} IS NOT NULL THEN pg_catalog.format('%s', {value}) END"),
    }
}
