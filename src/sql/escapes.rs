//! Texts of sessions in which `standard_conforming_strings` is off.

use super::lex::lex;

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
                at += lex(rest).next().map_or(rest.len(), |token| token.end);
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
