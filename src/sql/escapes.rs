//! Texts that our lexer reads only after a change: of sessions in which `standard_conforming_strings` is off, or whose client_encoding has
//! characters with bytes that look like ASCII.

use std::borrow::Cow;

use super::lex::lex;

/// The text with each character of more than one byte made of bytes from 0x80 on, where client_encoding (as PostgreSQL spells it) is one in which
/// it may have others: the second byte of a character of SJIS or BIG5 may be a backslash. The server converts a text before it reads it. To be
/// read only; offsets are those of the text.
pub fn mask_characters<'t>(text: &'t [u8], encoding: &str) -> Cow<'t, [u8]> {
    // As PostgreSQL's wchar.c counts (pg_sjis_mblen, pg_gb18030_mblen, ...).
    let width = |first: u8, second: u8| match encoding {
        "SJIS" | "SHIFT_JIS_2004" if (0xa1..=0xdf).contains(&first) => 1,
        "SJIS" | "SHIFT_JIS_2004" | "BIG5" | "GBK" | "UHC" => 2,
        "GB18030" if second.is_ascii_digit() => 4,
        "GB18030" => 2,
        "JOHAB" if first == 0x8f => 3,
        "JOHAB" => 2,
        _ => 1,
    };
    if text.is_ascii() || width(0x81, b'0') == 1 {
        return Cow::Borrowed(text);
    }
    let mut masked = text.to_vec();
    let mut at = 0;
    while let Some(found) = masked[at..].iter().position(|byte| *byte >= 0x80) {
        at += found;
        let end = (at + width(masked[at], masked.get(at + 1).copied().unwrap_or(0))).min(masked.len());
        masked[at..end].iter_mut().for_each(|byte| *byte |= 0x80);
        at = end;
    }
    Cow::Owned(masked)
}

/// The text with each byte that a backslash escapes in a plain string constant, and the backslash, made an `x`: what the session's server
/// reads lies where our lexer, for which only `E'...'` has escapes, finds it. To be read only; offsets are those of the text.
pub fn mask_escapes(text: &[u8]) -> Vec<u8> {
    let mut masked = text.to_vec();
    if memchr::memchr(b'\\', text).is_none() {
        return masked;
    }
    let mut at = 0;
    while at < masked.len() {
        let quote = match &masked[at..] {
            [b'\'', ..] => at,
            [b'n' | b'N', b'\'', ..] => at + 1,
            rest => {
                at += lex(rest).next().map_or(rest.len(), |token| token.end());
                continue;
            }
        };
        at = mask_constant(&mut masked, quote + 1);
    }
    masked
}

/// From behind the opening quote; answers with the offset behind the closing one.
fn mask_constant(text: &mut [u8], mut at: usize) -> usize {
    while let Some(found) = memchr::memchr2(b'\'', b'\\', &text[at..]) {
        at += found;
        match (text[at], text.get(at + 1)) {
            (b'\\', _) => {
                let end = (at + 2).min(text.len());
                text[at..end].fill(b'x');
                at = end;
            }
            (_, Some(b'\'')) => at += 2,
            _ => return at + 1,
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::split;

    #[test]
    fn a_characters_second_byte_is_no_backslash() {
        for (encoding, text, masked) in [
            ("SJIS", &b"E'\x83\x5c' \xb1'"[..], &b"E'\x83\xdc' \xb1'"[..]),
            ("BIG5", b"'\xa5\x5c", b"'\xa5\xdc"),
            ("GB18030", b"'\x81\x30\x81\x30'", b"'\x81\xb0\x81\xb0'"),
            ("JOHAB", b"'\x8f\x41\x5c'", b"'\x8f\xc1\xdc'"),
            ("GBK", b"'\x81", b"'\x81"),
            ("UTF8", b"'\x83\x5c'", b"'\x83\x5c'"),
        ] {
            assert_eq!(mask_characters(text, encoding), masked, "{encoding}");
        }
    }

    #[test]
    fn constants_end_where_the_server_ends_them() {
        let masks = [
            (r"SELECT 'a\'b'", "SELECT 'axxb'"),
            (r"SELECT 'a''\\' '\''; x", r"SELECT 'a''xx' 'xx'; x"),
            (r#"SELECT "a\" -- '\'"#, r#"SELECT "a\" -- '\'"#),
            (r"SELECT E'\'' '\'' n'\''", r"SELECT E'\'' 'xx' n'xx'"),
            (r"SELECT $$'\'$$ /* ' */ '\", r"SELECT $$'\'$$ /* ' */ 'x"),
            (r"SELECT column'\'; DROP'", r"SELECT column'xx; DROP'"),
        ];
        for (text, masked) in masks {
            assert_eq!(String::from_utf8_lossy(&mask_escapes(text.as_bytes())), masked, "{text}");
        }
        let one = r"INSERT INTO t VALUES ('\'; COMMIT; --')";
        assert_eq!(split(&mask_escapes(one.as_bytes())).len(), 1);
    }
}
