//! The text that the parsers are given: as long as the statement, byte for byte, but with nothing in it that they may
//! lex differently from PostgreSQL. Strings hold only `x`, numbers are integers, comments are blanks; long lists of
//! literals are blanked too, and ONLY; so that a bulk INSERT costs no more than a single one.

use super::lex::{Kind, Token};

/// Lists of at least this many literals, or rows of literals, are shortened to their first.
const LIST_MIN: usize = 16;

/// The text for the parsers, and how many tokens are left in it.
pub struct Clean {
    /// As many bytes as the statement, names at the same places.
    pub text: String,
    /// The same with single blanks, for a parser that makes a token of each.
    pub compact: String,
    /// Tokens that are no blank.
    pub tokens: usize,
}

/// `tokens` are those of `text` without gaps. None where a name is not UTF-8 or the text has bytes that begin no token.
pub fn clean(text: &[u8], tokens: &[Token]) -> Option<Clean> {
    let mut out = vec![b' '; text.len()];
    for token in tokens {
        let place = &mut out[token.range()];
        match token.kind {
            Kind::Text => quoted(place, b'\''),
            Kind::UnicodeQuoted => quoted(place, b'"'),
            Kind::Number => place.fill(b'1'),
            Kind::Unknown | Kind::Unterminated => return None,
            _ => place.copy_from_slice(token.bytes(text)),
        }
    }
    let blanked = blank_lists(text, tokens, &mut out) + blank_only(text, tokens, &mut out);
    let compact = String::from_utf8(compact(tokens, &out)).ok()?;
    Some(Clean { text: String::from_utf8(out).ok()?, compact, tokens: tokens.len() - blanked })
}

fn compact(tokens: &[Token], out: &[u8]) -> Vec<u8> {
    let mut compact = Vec::new();
    let mut end = 0;
    for token in tokens.iter().filter(|token| out[token.start()] != b' ') {
        if token.start() > end {
            compact.push(b' ');
        }
        compact.extend_from_slice(&out[token.range()]);
        end = token.end();
    }
    compact
}

/// Blanks ONLY before a table's name, and the parentheses that may stand around that: it changes no name, and sqlparser
/// takes it for one. How many tokens went.
fn blank_only(text: &[u8], tokens: &[Token], out: &mut [u8]) -> usize {
    let mut blanked = 0;
    let mut blank = |token: &Token| {
        out[token.range()].fill(b' ');
        blanked += 1;
    };
    let is_name = |token: &Token| matches!(token.kind, Kind::Word | Kind::Quoted | Kind::UnicodeQuoted);
    for (place, pair) in tokens.windows(2).enumerate() {
        let [before, only] = pair else { continue };
        let in_place =
            ["from", "join", "update", "into", "using", "table"].iter().any(|word| before.is_word(text, word));
        let rest = &tokens[place + 2..];
        if !only.is_word(text, "only") || !(in_place || before.is_punct(text, b',')) {
            continue;
        }
        if rest.first().is_some_and(is_name) {
            blank(only);
        } else if let Some(open) = rest.first().filter(|token| token.is_punct(text, b'(')) {
            let inside = rest[1..].iter().take_while(|token| is_name(token) || token.is_punct(text, b'.')).count();
            if let Some(close) = rest.get(1 + inside).filter(|token| token.is_punct(text, b')')) {
                [only, open, close].into_iter().for_each(&mut blank);
            }
        }
    }
    blanked
}

fn quoted(place: &mut [u8], quote: u8) {
    place.fill(b'x');
    let last = place.len() - 1;
    place[0] = quote;
    place[last] = quote;
}

/// Blanks all but the first of long lists `(literal, literal, ...)` and `(...), (...), ...`. How many tokens went.
fn blank_lists(text: &[u8], tokens: &[Token], out: &mut [u8]) -> usize {
    let mut blanked = 0;
    let mut at = 0;
    while at < tokens.len() {
        let opens = tokens[at].is_punct(text, b'(') || tokens[at].is_punct(text, b'[');
        if !opens {
            at += 1;
            continue;
        }
        let mut cut = |first: usize, last: usize| {
            blanked += last + 1 - first;
            out[tokens[first].start()..tokens[last].end()].fill(b' ');
        };
        let list = items(tokens, at + 1, |from| literal(text, tokens, from), text);
        let rows = items(tokens, at, |from| row(text, tokens, from), text);
        if rows.count >= LIST_MIN {
            cut(rows.first_end, rows.end - 1);
            at = rows.end;
        } else if list.count >= LIST_MIN {
            cut(list.first_end, list.end - 1);
            at = list.end;
        } else {
            at += 1;
        }
    }
    blanked
}

/// Items with commas between them, by places in the tokens.
struct Items {
    count: usize,
    first_end: usize,
    end: usize,
}

fn items(tokens: &[Token], start: usize, item: impl Fn(usize) -> Option<usize>, text: &[u8]) -> Items {
    let mut found = Items { count: 0, first_end: start, end: start };
    let mut at = start;
    while let Some(end) = item(at) {
        found.count += 1;
        found.end = end;
        if found.count == 1 {
            found.first_end = end;
        }
        if !tokens.get(end).is_some_and(|token| token.is_punct(text, b',')) {
            break;
        }
        at = end + 1;
    }
    // What follows must be the list's end or another item of it, else the last literal is the beginning of something longer.
    let closed =
        tokens.get(found.end).is_some_and(|next| [b',', b')', b']'].iter().any(|&byte| next.is_punct(text, byte)));
    let row_end = tokens.get(found.end.wrapping_sub(1)).is_some_and(|last| last.is_punct(text, b')'));
    if closed || row_end { found } else { Items { count: 0, first_end: start, end: start } }
}

/// `[-] literal [:: type]`: the place behind it.
fn literal(text: &[u8], tokens: &[Token], at: usize) -> Option<usize> {
    let signed = tokens.get(at).is_some_and(|token| matches!(token.bytes(text), b"-" | b"+"));
    let value = at + usize::from(signed);
    let token = tokens.get(value)?;
    let constant = match token.kind {
        Kind::Number => true,
        Kind::Text | Kind::Param => !signed,
        Kind::Word => !signed && ["null", "true", "false", "default"].iter().any(|word| token.is_word(text, word)),
        _ => false,
    };
    if !constant {
        return None;
    }
    match tokens.get(value + 1..value + 3) {
        Some([cast, kind]) if cast.bytes(text) == b"::" && kind.kind == Kind::Word => Some(value + 3),
        _ => Some(value + 1),
    }
}

/// `(literal, ...)`: the place behind it.
fn row(text: &[u8], tokens: &[Token], at: usize) -> Option<usize> {
    tokens.get(at).filter(|token| token.is_punct(text, b'('))?;
    let mut place = literal(text, tokens, at + 1)?;
    loop {
        let next = tokens.get(place)?;
        if next.is_punct(text, b')') {
            return Some(place + 1);
        }
        if !next.is_punct(text, b',') {
            return None;
        }
        place = literal(text, tokens, place + 1)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::lex::lex;

    fn cleaned(text: &str) -> (String, usize) {
        let tokens: Vec<Token> = lex(text.as_bytes()).filter(|token| !token.kind.is_gap()).collect();
        let clean = clean(text.as_bytes(), &tokens).unwrap();
        assert_eq!(clean.text.len(), text.len());
        assert_eq!(clean.compact.split_whitespace().count(), clean.text.split_whitespace().count());
        (clean.text.split_whitespace().collect::<Vec<_>>().join(" "), clean.tokens)
    }

    #[test]
    fn literals_lose_their_content_and_names_stay() {
        assert_eq!(
            cleaned("select e'\\'', 1.5, $$;$$ /* ' */ from \"A'b\" -- x").0,
            "select 'xxx', 111, 'xxx' from \"A'b\""
        );
        let text = b"select \xff from t";
        assert!(clean(text, &lex(text).filter(|token| !token.kind.is_gap()).collect::<Vec<_>>()).is_none());
    }

    #[test]
    fn long_lists_are_shortened_and_short_ones_are_not() {
        let numbers = vec!["-1"; 40].join(",");
        assert_eq!(
            cleaned(&format!("select f(a) where a in ({numbers})")),
            ("select f(a) where a in (-1 )".into(), 12)
        );
        let rows = vec!["(1, 'x', null, $1::int)"; 40].join(", ");
        let (text, _) = cleaned(&format!("insert into t values {rows} returning a"));
        assert_eq!(text, "insert into t values (1, 'x', null, $1::int) returning a");
        let calls = vec!["(1, now())"; 40].join(",");
        assert_eq!(cleaned(&format!("insert into t values {calls}")).0.matches("now()").count(), 40);
        let sums = format!("select ({numbers} + f(1))");
        assert!(cleaned(&sums).0.ends_with("+ f(1))"));
    }
}
