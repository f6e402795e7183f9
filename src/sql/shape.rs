//! A statement with its literals taken out.

use super::lex::{Kind, lex};

/// Stands for a number.
const NUMBER: &[u8] = b"$?";
/// Stands for a string constant: not the same as a number's, since `date '...'` and `date 1` are not read alike.
const TEXT: &[u8] = b"'$?'";

/// A statement's shape. Statements of one shape have the same facts but for places in
/// the text (see [`place`](super::place)).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// The statement with `$?` for each number and `'$?'` for each string, blanks and comments as single spaces,
    /// without `;` at its ends. Meant as a key of caches, and to be shown.
    pub text: Vec<u8>,
    /// FNV-1a (64 bit) of `text`: the same in every run and build. Not safe against those who look for collisions:
    /// compare `text` where that matters.
    pub fingerprint: u64,
    /// `end` of the statement itself (see [`end`](super::end)).
    pub end: usize,
}

/// The shape of one statement, in one pass.
pub fn shape(text: &[u8]) -> Shape {
    let mut out = Vec::with_capacity(text.len().min(4096));
    let mut gap = false;
    let mut semicolons = 0;
    let mut end = 0;
    for token in lex(text) {
        if token.kind.is_gap() {
            gap = true;
            continue;
        }
        if token.is_punct(text, b';') {
            // At the ends of a statement it means nothing, and one between two statements is put back below.
            semicolons += usize::from(!out.is_empty());
            continue;
        }
        end = token.end();
        out.extend(std::iter::repeat_n(b';', std::mem::take(&mut semicolons)));
        if std::mem::take(&mut gap) && !out.is_empty() {
            out.push(b' ');
        }
        match token.kind {
            Kind::Number => out.extend_from_slice(NUMBER),
            Kind::Text => out.extend_from_slice(TEXT),
            // Doubled, so that no text spells a placeholder.
            Kind::Unknown if token.bytes(text) == b"$" => out.extend_from_slice(b"$$"),
            _ => out.extend_from_slice(token.bytes(text)),
        }
    }
    Shape { fingerprint: fnv1a(&out), text: out, end }
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_blanks_and_comments_go() {
        for (text, expected) in [
            ("SELECT abalance FROM a WHERE aid = 4711;", "SELECT abalance FROM a WHERE aid = $?"),
            ("  select /* x */ 'a'\n 'b',-1.5e3 -- y", "select '$?',-$?"),
            ("select $1, $$x$$, e'\\'', b'1'", "select $1, '$?', '$?', '$?'"),
            (";; select 1 ;;", "select $?"),
            ("select 1;select 2", "select $?;select $?"),
            ("select \"1\", U&\"x\" uescape '!'", "select \"1\", U&\"x\" uescape '!'"),
            ("select $?", "select $$?"),
            ("", ""),
        ] {
            assert_eq!(String::from_utf8(shape(text.as_bytes()).text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn fingerprints_stay_the_same_between_runs() {
        assert_eq!(shape(b"").fingerprint, 0xcbf2_9ce4_8422_2325);
        assert_eq!(shape(b"a").fingerprint, 0xaf63_dc4c_8601_ec8c);
        assert_eq!(shape(b"select 1"), shape(b"select 2"));
        assert_ne!(shape(b"select 1").fingerprint, shape(b"select '1'").fingerprint);
    }

    #[test]
    fn the_end_is_that_of_the_text() {
        for text in ["select 1 ; -- x", "", "/* */ ;", "a /* b */", "select 1;select 22;"] {
            assert_eq!(shape(text.as_bytes()).end, crate::sql::end(text.as_bytes()), "{text}");
        }
    }
}
