//! The statements of a WITH clause that write: where each stands in the text, and under which names its rows leave it. By tokens alone, whose places are exact.

use std::collections::BTreeSet;
use std::ops::Range;

use super::facts::{Facts, Place, Returned, Verb, Within};
use super::lex::{Kind, Token};
use super::name;
use super::words::Words;

/// One table of a WITH clause, by places among the tokens.
struct Cte {
    name: usize,
    /// Its columns are named: `WITH c (a, b) AS`.
    columns: bool,
    /// What stands between its parentheses.
    body: Range<usize>,
}

/// Where each INSERT, UPDATE and DELETE of the statement's own WITH clause stands, in the order of the text. None where it has no such clause, or one that is not
/// plain to read.
pub fn places(text: &[u8]) -> Option<Vec<Place>> {
    let tokens: Vec<Token> = super::lex(text).filter(|token| !token.kind.is_gap()).collect();
    let words = Words::new(text, &tokens);
    Some(ctes(words)?.iter().filter(|cte| writes(words, cte)).map(|cte| place(words, cte)).collect())
}

/// What the WITH clause of a statement with these facts writes. `read`: the facts of such a statement by itself. Empty where not all of it is understood.
pub(super) fn read(words: Words<'_>, facts: &Facts, read: impl Fn(Range<usize>) -> Facts) -> Vec<Within> {
    let itself = match facts.verb {
        Verb::Insert | Verb::Update | Verb::Delete => 1,
        Verb::Other => 0,
        _ => return Vec::new(),
    };
    let Some(ctes) = ctes(words) else { return Vec::new() };
    let found: Option<Vec<Within>> = ctes
        .iter()
        .filter(|cte| writes(words, cte))
        .map(|cte| {
            let place = place(words, cte);
            let facts = read(place.body.clone());
            let written = matches!(facts.verb, Verb::Insert | Verb::Update | Verb::Delete) && facts.targets.len() == 1;
            let returned = returned(words, cte, &facts)?;
            written.then_some(Within { place, returned, facts })
        })
        .collect();
    // MERGE, and what stands behind a WITH of its own, is a target, too.
    found.filter(|found| found.len() + itself == facts.targets.len()).unwrap_or_default()
}

fn ctes(mut words: Words<'_>) -> Option<Vec<Cte>> {
    let mut found = Vec::new();
    words.at = 0;
    if !words.eat("with") {
        return None;
    }
    words.eat("recursive");
    loop {
        let name = words.at;
        if !(words.is_kind(Kind::Word) || words.is_kind(Kind::Quoted)) {
            return None;
        }
        words.at += 1;
        let columns = words.is_punct(b'(');
        if columns {
            words.skip_parens()?;
        }
        if !words.eat("as") {
            return None;
        }
        words.eat("not");
        words.eat("materialized");
        let open = words.at;
        if !words.is_punct(b'(') {
            return None;
        }
        words.skip_parens()?;
        found.push(Cte { name, columns, body: open + 1..words.at - 1 });
        if words.is_done() || words.is("search") || words.is("cycle") {
            return None;
        }
        if !words.eat_punct(b',') {
            // A name that is given twice is an error, which is to point at the client's.
            let names: Option<BTreeSet<String>> =
                found.iter().map(|cte| name::fold(words.text, &words.tokens[cte.name])).collect();
            return names.filter(|names| names.len() == found.len()).map(|_| found);
        }
    }
}

fn writes(words: Words<'_>, cte: &Cte) -> bool {
    let first = words.tokens.get(cte.body.start).filter(|_| !cte.body.is_empty());
    first.is_some_and(|token| ["insert", "update", "delete"].iter().any(|word| token.is_word(words.text, word)))
}

fn place(words: Words<'_>, cte: &Cte) -> Place {
    let tokens = words.tokens;
    let body = tokens[cte.body.start].start()..tokens[cte.body.end - 1].end();
    Place { name: tokens[cte.name].range(), body, close: tokens[cte.body.end].end() }
}

/// The places of `body` that stand in no parentheses or brackets of their own.
fn outside(words: Words<'_>, body: Range<usize>) -> Vec<usize> {
    let mut depth = 0usize;
    let mut found = Vec::new();
    for at in body {
        let token = &words.tokens[at];
        let closes = token.is_punct(words.text, b')') || token.is_punct(words.text, b']');
        depth -= usize::from(closes && depth > 0);
        if depth == 0 && !closes {
            found.push(at);
        }
        depth += usize::from(token.is_punct(words.text, b'(') || token.is_punct(words.text, b'['));
    }
    found
}

/// None where RETURNING is not where the tree sees it, or a name of the clause is not plain.
fn returned(words: Words<'_>, cte: &Cte, facts: &Facts) -> Option<Returned> {
    let word = |at: usize, word: &str| words.tokens[at].is_word(words.text, word);
    let behind = |at: usize, what: fn(&Token, &[u8]) -> bool| at > 0 && what(&words.tokens[at - 1], words.text);
    let flat = outside(words, cte.body.clone());
    // The word is reserved, but for a label behind AS and for a column behind a dot.
    let clause = flat.iter().position(|&at| {
        word(at, "returning")
            && !behind(at, |token, text| token.is_word(text, "as"))
            && !behind(at, |token, text| token.is_punct(text, b'.'))
    });
    if clause.is_some() != facts.returning {
        return None;
    }
    let Some(clause) = clause else {
        let own = name::fold(words.text, &words.tokens[cte.name])?;
        let others = (0..words.tokens.len()).filter(|&at| at != cte.name);
        let mut names = others.filter_map(|at| name::fold(words.text, &words.tokens[at]));
        // What returns nothing cannot be read from; whoever tries is to be told so, and not to be shown our column.
        return Some(if names.any(|name| name == own) { Returned::Other } else { Returned::Nothing });
    };
    if cte.columns {
        return Some(Returned::Other);
    }
    let joins = flat[..clause].iter().any(|&at| match facts.verb {
        Verb::Update => word(at, "from"),
        Verb::Delete => word(at, "using"),
        _ => false,
    });
    let list = flat[clause] + 1..cte.body.end;
    let commas = flat[clause + 1..].iter().copied().filter(|&at| words.tokens[at].is_punct(words.text, b','));
    let mut from = list.start;
    let mut items = Vec::new();
    for comma in commas.chain([list.end]) {
        items.push(&words.tokens[from..comma]);
        from = comma + 1;
    }
    if let [item] = items[..]
        && is_whole_row(words.text, item, facts, joins)
    {
        return Some(Returned::Row);
    }
    let names: Option<Vec<String>> = items.iter().map(|item| label(words.text, item)).collect();
    let Some(names) = names else { return Some(Returned::Other) };
    let distinct: BTreeSet<&String> = names.iter().collect();
    Some(if distinct.len() == names.len() { Returned::Columns(names) } else { Returned::Other })
}

/// `*` of a statement that has no other table, or `row.*`.
fn is_whole_row(text: &[u8], item: &[Token], facts: &Facts, joins: bool) -> bool {
    let star = |token: &Token| token.bytes(text) == b"*";
    match item {
        [all] => star(all) && !joins,
        [row, dot, all] => {
            let row = name::fold(text, row).map(|row| name::spell(&row));
            row.as_deref() == facts.targets.first().map(|target| target.row.as_str())
                && dot.is_punct(text, b'.')
                && star(all)
        }
        _ => false,
    }
}

/// The name of an item of RETURNING, where it is a column or is given one.
fn label(text: &[u8], item: &[Token]) -> Option<String> {
    let named = match item {
        [column] => Some(column).filter(|column| !is_value(text, column)),
        [_, dot, column] if dot.is_punct(text, b'.') => Some(column),
        [.., word, label] if word.is_word(text, "as") => Some(label),
        _ => None,
    }?;
    // How the server folds other letters depends on its encoding.
    let plain = named.kind == Kind::Quoted || named.kind == Kind::Word && named.bytes(text).is_ascii();
    name::fold(text, named).filter(|name| plain && !name.starts_with("crossfade"))
}

/// A word that is no column.
fn is_value(text: &[u8], token: &Token) -> bool {
    token.kind == Kind::Word && name::fold(text, token).is_none_or(|name| name::is_keyword(&name))
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, read};
    use super::*;

    fn of(text: &str) -> Vec<(&str, &str, &str, Returned)> {
        let facts = read(text.as_bytes(), Limits::default());
        let places = places(text.as_bytes()).unwrap_or_default();
        assert!(facts.within.is_empty() || facts.within.iter().map(|within| &within.place).eq(&places), "{text}");
        let part = |within: &Within| {
            let Place { name, body, close } = within.place.clone();
            (&text[name], &text[body.end..close], &text[close..], within.returned.clone())
        };
        facts.within.iter().map(part).collect()
    }

    fn columns(names: &[&str]) -> Returned {
        Returned::Columns(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn places_and_names_are_exact() {
        for (text, expected) in [
            (
                "WITH moved AS (DELETE FROM a WHERE id IN (1, 2) RETURNING * -- all\n ) INSERT INTO b SELECT * FROM moved",
                vec![("moved", " -- all\n )", " INSERT INTO b SELECT * FROM moved", Returned::Row)],
            ),
            (
                "with recursive \"X y\" as not materialized (insert into a values (1) on conflict do nothing returning id, a.v as \"V\", upper(v) as u) select 1",
                vec![("\"X y\"", ")", " select 1", columns(&["id", "V", "u"]))],
            ),
            (
                "WITH s AS (SELECT 1), d AS (DELETE FROM a USING s), u AS (UPDATE a x SET v = 1 FROM s RETURNING x.*) SELECT 2 FROM u",
                vec![
                    ("d", ")", ", u AS (UPDATE a x SET v = 1 FROM s RETURNING x.*) SELECT 2 FROM u", Returned::Nothing),
                    ("u", ")", " SELECT 2 FROM u", Returned::Row),
                ],
            ),
            (
                "WITH i AS (INSERT INTO a SELECT v AS returning FROM s RETURNING id) SELECT * FROM i",
                vec![("i", ")", " SELECT * FROM i", columns(&["id"]))],
            ),
        ] {
            assert_eq!(of(text), expected, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_named_is_not_taken_apart() {
        for text in [
            "WITH d AS (DELETE FROM a USING b RETURNING *) SELECT 1",
            "WITH d AS (DELETE FROM a RETURNING *, id) SELECT 1",
            "WITH d AS (DELETE FROM a RETURNING b.*) SELECT 1",
            "WITH d AS (DELETE FROM a RETURNING lower(v)) SELECT 1",
            "WITH d AS (DELETE FROM a RETURNING id, a.id) SELECT 1",
            "WITH d AS (DELETE FROM a RETURNING null) SELECT 1",
            "WITH d AS (DELETE FROM a RETURNING current_user) SELECT 1",
            "WITH d AS (DELETE FROM a RETURNING id AS crossfade_image) SELECT 1",
            "WITH d (x) AS (DELETE FROM a RETURNING id) SELECT x FROM d",
            // Reading from what returns nothing is an error, and stays one.
            "WITH d AS (DELETE FROM a) SELECT * FROM d",
        ] {
            assert_eq!(of(text).into_iter().map(|part| part.3).collect::<Vec<_>>(), [Returned::Other], "{text}");
        }
    }

    #[test]
    fn what_is_not_all_understood_is_left_alone() {
        for text in [
            "WITH s AS (SELECT 1) DELETE FROM a",
            "WITH d AS (DELETE FROM a), m AS (MERGE INTO b USING c ON true WHEN MATCHED THEN DELETE) SELECT 1",
            "WITH d AS (WITH s AS (SELECT 1) DELETE FROM a USING s RETURNING id) SELECT 1",
            "WITH d AS (DELETE FROM a) MERGE INTO b USING c ON true WHEN MATCHED THEN DELETE",
            "SELECT 1",
            "WITH d AS (DELETE FROM a), D AS (DELETE FROM b) SELECT 1",
            "WITH d AS (DELETE FROM a",
            "WITH",
        ] {
            assert_eq!(of(text), [], "{text}");
        }
    }
}
