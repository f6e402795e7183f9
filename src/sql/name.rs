//! Identifiers: folding, unquoting, quoting.

use super::facts::Name;
use super::lex::{Kind, Token, lex};

/// An identifier's most bytes: NAMEDATALEN less one. What is longer, PostgreSQL cuts.
const NAME_BYTES_MAX: usize = 63;

/// The identifier that a token spells, as PostgreSQL folds it: None if it is no identifier, empty, not UTF-8, or its
/// Unicode escapes are broken.
pub fn fold(text: &[u8], token: &Token) -> Option<String> {
    let spelled = std::str::from_utf8(token.bytes(text)).ok()?;
    match token.kind {
        Kind::Word => fold_spelled(spelled, false),
        Kind::Quoted => fold_spelled(&spelled[1..spelled.len() - 1].replace("\"\"", "\""), true),
        Kind::UnicodeQuoted => fold_spelled(&unicode(spelled)?, true),
        _ => None,
    }
}

/// An identifier without its quotes, folded. None if it is empty.
pub(super) fn fold_spelled(spelled: &str, quoted: bool) -> Option<String> {
    let mut name = if quoted { spelled.to_owned() } else { spelled.to_ascii_lowercase() };
    name.truncate(name.floor_char_boundary(NAME_BYTES_MAX));
    if name.is_empty() { None } else { Some(name) }
}

/// `U&"..." [UESCAPE '.']` decoded.
fn unicode(spelled: &str) -> Option<String> {
    let close = spelled.rfind('"')?;
    // A quote behind UESCAPE cannot be the escape character, so the last quote ends the identifier.
    let body = spelled.get(3..close)?.replace("\"\"", "\"");
    let tail = spelled[close + 1..].trim_end_matches('\'');
    let escape = if tail.is_empty() { '\\' } else { tail.chars().next_back()? };
    let mut name = String::new();
    let mut units: Vec<u16> = Vec::new();
    let mut rest = body.as_str();
    while let Some(first) = rest.chars().next() {
        rest = &rest[first.len_utf8()..];
        if first != escape || rest.starts_with(escape) {
            flush(&mut units, &mut name)?;
            name.push(first);
            if first == escape {
                rest = &rest[escape.len_utf8()..];
            }
            continue;
        }
        let (digits, width) =
            if let Some(long) = rest.strip_prefix('+') { (long.get(..6)?, 7) } else { (rest.get(..4)?, 4) };
        let code = char_code(digits)?;
        match u16::try_from(code) {
            Ok(unit) => units.push(unit),
            Err(_) => {
                flush(&mut units, &mut name)?;
                name.push(char::from_u32(code)?);
            }
        }
        rest = &rest[width..];
    }
    flush(&mut units, &mut name)?;
    Some(name)
}

/// Whether no identifier of the text has a byte from 0x80 on. What others mean depends on client_encoding: where that is
/// not UTF8, a name in the facts is then not the name that the server sees.
pub fn names_are_ascii(text: &[u8]) -> bool {
    text.is_ascii()
        || lex(text)
            .filter(|token| matches!(token.kind, Kind::Word | Kind::Quoted | Kind::UnicodeQuoted))
            .all(|token| token.bytes(text).is_ascii())
}

fn char_code(digits: &str) -> Option<u32> {
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u32::from_str_radix(digits, 16).ok().filter(|&code| code != 0)
}

/// Escapes may spell a surrogate pair in two: joined here.
fn flush(units: &mut Vec<u16>, name: &mut String) -> Option<()> {
    for unit in char::decode_utf16(units.drain(..)) {
        name.push(unit.ok()?);
    }
    Some(())
}

/// The possibly qualified name that these tokens (gaps left out) spell: `a`, `a.b` or `database.a.b`.
pub fn qualified(text: &[u8], tokens: &[Token]) -> Option<Name> {
    let mut parts = Vec::new();
    for (place, token) in tokens.iter().enumerate() {
        match place % 2 {
            0 => parts.push(fold(text, token)?),
            _ if token.is_punct(text, b'.') => {}
            _ => return None,
        }
    }
    if tokens.len().is_multiple_of(2) || parts.len() > 3 {
        return None;
    }
    let name = parts.pop()?;
    Some(Name { schema: parts.pop(), name })
}

/// `name` as SQL must spell it: quoted unless it is a plain word that means itself everywhere.
pub fn spell(name: &str) -> String {
    let plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        && !name.starts_with(|first: char| first.is_ascii_digit());
    if plain && !is_keyword(name) { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

/// Whether it is a keyword that is reserved or names a type or function in PostgreSQL 13 to 18 (appendix C).
pub fn is_keyword(word: &str) -> bool {
    KEYWORDS.binary_search(&word).is_ok()
}

/// Sorted. Reserved, "cannot be function or type" and "can be function or type" of PostgreSQL 13 to 18.
#[rustfmt::skip]
const KEYWORDS: &[&str] = &[
    "all", "analyse", "analyze", "and", "any", "array", "as", "asc", "asymmetric", "authorization", "between",
    "bigint", "binary", "bit", "boolean", "both", "case", "cast", "char", "character", "check", "coalesce", "collate",
    "collation", "column", "concurrently", "constraint", "create", "cross", "current_catalog", "current_date",
    "current_role", "current_schema", "current_time", "current_timestamp", "current_user", "dec", "decimal", "default",
    "deferrable", "desc", "distinct", "do", "else", "end", "except", "exists", "extract", "false", "fetch", "float",
    "for", "foreign", "freeze", "from", "full", "grant", "greatest", "group", "grouping", "having", "ilike", "in",
    "initially", "inner", "inout", "int", "integer", "intersect", "interval", "into", "is", "isnull", "join", "json",
    "json_array", "json_arrayagg", "json_exists", "json_object", "json_objectagg", "json_query", "json_scalar",
    "json_serialize", "json_table", "json_value", "lateral", "leading", "least", "left", "like", "limit", "localtime",
    "localtimestamp", "merge_action", "national", "natural", "nchar", "none", "normalize", "not", "notnull", "null",
    "nullif", "numeric", "offset", "on", "only", "or", "order", "out", "outer", "overlaps", "overlay", "placing",
    "position", "precision", "primary", "real", "references", "returning", "right", "row", "select", "session_user",
    "setof", "similar", "smallint", "some", "substring", "symmetric", "system_user", "table", "tablesample", "then",
    "time", "timestamp", "to", "trailing", "treat", "trim", "true", "union", "unique", "user", "using", "values",
    "varchar", "variadic", "verbose", "when", "where", "window", "with", "xmlattributes", "xmlconcat", "xmlelement",
    "xmlexists", "xmlforest", "xmlnamespaces", "xmlparse", "xmlpi", "xmlroot", "xmlserialize", "xmltable",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(text: &str) -> Option<String> {
        fold(text.as_bytes(), &lex(text.as_bytes()).next().unwrap())
    }

    #[test]
    fn identifiers_fold_as_in_postgresql() {
        let long = format!("{}é", "x".repeat(62));
        for (text, expected) in [
            ("Photo", Some("photo")),
            ("\"Photo\"", Some("Photo")),
            ("\"a\"\"b\"", Some("a\"b")),
            ("ÄB", Some("Äb")),
            (r#"U&"d\0061t\+000061""#, Some("data")),
            (r#"U&"d!0061t!!" UESCAPE '!'"#, Some("dat!")),
            (r#"u&"\D83D\DE00""#, Some("😀")),
            (r#"U&"\D83Dx""#, None),
            (r#"U&"\00g1""#, None),
            ("\"\"", None),
            (long.as_str(), Some(&long[..62])),
        ] {
            assert_eq!(folded(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn only_names_count_as_names() {
        assert!(names_are_ascii("select 'é', a /* é */".as_bytes()));
        assert!(!names_are_ascii("select 'é', é".as_bytes()));
        assert!(!names_are_ascii(b"select \"\xe9\""));
    }

    #[test]
    fn names_are_spelled_so_that_they_mean_themselves() {
        assert!(KEYWORDS.is_sorted());
        for (name, expected) in [
            ("photo", "photo"),
            ("Photo", "\"Photo\""),
            ("user", "\"user\""),
            ("a\"b", "\"a\"\"b\""),
            ("1a", "\"1a\""),
            ("new", "new"),
        ] {
            assert_eq!(spell(name), expected);
        }
    }
}
