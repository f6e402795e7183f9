//! Where a statement names relations, by its tokens: for who puts another name in place of one.

use std::collections::BTreeSet;
use std::ops::Range;

use squawk_syntax::{SourceFile, SyntaxKind as K, SyntaxNode};

use super::clean::clean;
use super::facts::Name;
use super::lex::{Token, lex};
use super::name;
use super::read::{Limits, apart};

/// One naming of a relation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// As it is written.
    pub name: Name,
    /// Its tokens among those of the text that are no gaps.
    pub tokens: Range<usize>,
    /// How it stands there.
    pub naming: Naming,
}

/// How a name of a relation stands in a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// As an item of FROM or USING, with an alias or without.
    From {
        /// An alias follows.
        alias: bool,
    },
    /// As what the statement writes.
    Written,
    /// In another way: with `*`, TABLESAMPLE, in TABLE t. (ONLY is not told apart: it stands in front of the name, and stays there.)
    Other,
}

/// What a SELECT, INSERT, UPDATE or DELETE names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relations {
    /// Each naming, in the order of the text.
    pub named: Vec<Relation>,
    /// Names that its WITH clauses give.
    pub ctes: BTreeSet<String>,
    /// The condition behind WHERE of the statement itself, in bytes; None: it has none.
    pub condition: Option<Range<usize>>,
    /// The rows behind VALUES of an INSERT, with that word, in bytes.
    pub values: Option<Range<usize>>,
}

/// What the statement in this range of a text names. None where it is not plain to read.
pub fn relations(text: &[u8], range: Range<usize>, limits: Limits) -> Option<Relations> {
    let all: Vec<Token> = lex(text).filter(|token| !token.kind.is_gap()).collect();
    let before = all.iter().take_while(|token| token.start() < range.start).count();
    let inner = text.get(range.clone())?;
    let tokens: Vec<Token> = lex(inner).filter(|token| !token.kind.is_gap()).collect();
    if inner.len() > limits.bytes_max {
        return None;
    }
    let clean = clean(inner, &tokens)?;
    if clean.tokens > limits.tokens_max {
        return None;
    }
    let found = apart(inner, &tokens, limits, || {
        let parse = SourceFile::parse(&clean.text);
        if !parse.errors().is_empty() {
            return None;
        }
        let root = parse.syntax_node();
        let mut statements = root.children().filter(|node| node.kind() != K::EMPTY_STMT);
        let top = statements.next()?;
        if statements.next().is_some() {
            return None;
        }
        read(inner, &tokens, &top)
    })?;
    let named = found
        .named
        .into_iter()
        .map(|relation| Relation { tokens: relation.tokens.start + before..relation.tokens.end + before, ..relation });
    let moved = |place: Range<usize>| place.start + range.start..place.end + range.start;
    Some(Relations {
        named: named.collect(),
        condition: found.condition.map(moved),
        values: found.values.map(moved),
        ctes: found.ctes,
    })
}

fn read(text: &[u8], tokens: &[Token], top: &SyntaxNode) -> Option<Relations> {
    let places = |node: &SyntaxNode| {
        let range = node.text_range();
        let (start, end) = (usize::from(range.start()), usize::from(range.end()));
        tokens.partition_point(|token| token.start() < start)..tokens.partition_point(|token| token.start() < end)
    };
    let bytes = |node: &SyntaxNode| usize::from(node.text_range().start())..usize::from(node.text_range().end());
    let mut found = Relations::default();
    for node in top.descendants() {
        match node.kind() {
            K::RELATION_NAME_REF | K::TABLE_NAME_REF => {
                let at = places(&node);
                let name = name::qualified(text, &tokens[at.clone()])?;
                found.named.push(Relation { name, tokens: at, naming: naming(&node) });
            }
            K::CTE_NAME => {
                let at = places(&node);
                found.ctes.insert(name::fold(text, tokens.get(at.start)?)?);
            }
            K::WHERE_CLAUSE if node.parent().as_ref() == Some(top) => {
                let word = node.children_with_tokens().find(|child| child.kind() == K::WHERE_KW)?;
                found.condition = Some(usize::from(word.text_range().end())..bytes(&node).end);
            }
            K::VALUES if top.kind() == K::INSERT && node.parent().as_ref() == Some(top) => {
                found.values = Some(bytes(&node))
            }
            _ => {}
        }
    }
    Some(found)
}

fn naming(node: &SyntaxNode) -> Naming {
    let mut parents =
        node.ancestors().skip(1).filter(|parent| !matches!(parent.kind(), K::RELATION_NAME | K::TABLE_RELATION_NAME));
    let item = match parents.next() {
        Some(item) if item.kind() == K::RELATION_FROM_ITEM => item,
        Some(write) if matches!(write.kind(), K::INSERT | K::UPDATE | K::DELETE) => return Naming::Written,
        _ => return Naming::Other,
    };
    let mut alias = false;
    for child in item.children_with_tokens() {
        match child.kind() {
            K::FROM_ALIAS => alias = true,
            K::RELATION_NAME_REF | K::WHITESPACE | K::COMMENT => {}
            _ => return Naming::Other,
        }
    }
    Naming::From { alias }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<(String, Naming)> {
        let found = relations(text.as_bytes(), 0..text.len(), Limits::default()).expect("is read");
        let tokens: Vec<Token> = lex(text.as_bytes()).filter(|token| !token.kind.is_gap()).collect();
        let told = |relation: &Relation| {
            let at = tokens[relation.tokens.start].start()..tokens[relation.tokens.end - 1].end();
            (text[at].to_owned(), relation.naming)
        };
        found.named.iter().map(told).collect()
    }

    #[test]
    fn each_naming_has_its_place() {
        let plain = |name: &str| (name.to_owned(), Naming::From { alias: false });
        let called = |name: &str| (name.to_owned(), Naming::From { alias: true });
        let other = |name: &str| (name.to_owned(), Naming::Other);
        let written = |name: &str| (name.to_owned(), Naming::Written);
        for (text, named) in [
            (
                "SELECT 1 FROM a, s.b AS x, \"C\" y (q) JOIN d USING (i)",
                vec![plain("a"), called("s.b"), called("\"C\""), plain("d")],
            ),
            (
                "SELECT (SELECT 1 FROM a) FROM ONLY b, c *, d TABLESAMPLE system (1)",
                vec![plain("a"), plain("b"), other("c"), other("d")],
            ),
            (
                "SELECT * FROM a WHERE EXISTS (TABLE b) UNION SELECT * FROM c -- d",
                vec![plain("a"), other("b"), plain("c")],
            ),
            ("UPDATE a SET v = 1 FROM b x WHERE a.i = x.i", vec![written("a"), called("b")]),
            ("DELETE FROM a USING b WHERE true", vec![written("a"), plain("b")]),
            ("INSERT INTO a SELECT * FROM b", vec![written("a"), plain("b")]),
            ("WITH w AS (SELECT 1 FROM a) SELECT * FROM w", vec![plain("a"), plain("w")]),
        ] {
            assert_eq!(of(text), named, "{text}");
        }
    }

    #[test]
    fn conditions_and_rows_are_found() {
        let text = "EXPLAIN DELETE FROM a WHERE i = $1 RETURNING i";
        let found = relations(text.as_bytes(), 8..text.len(), Limits::default()).expect("is read");
        assert_eq!(found.condition.map(|at| &text[at]), Some(" i = $1"));
        assert_eq!(found.named[0].tokens, 3..4);
        let text = "INSERT INTO a (i) VALUES (1), ($2) ON CONFLICT DO NOTHING";
        let found = relations(text.as_bytes(), 0..text.len(), Limits::default()).expect("is read");
        assert_eq!(found.values.map(|at| &text[at]), Some("VALUES (1), ($2)"));
    }
}
