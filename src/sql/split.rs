//! The statements of one Query string.

use std::ops::Range;

use super::lex::{Kind, Token, lex};

/// One statement of a text that may hold several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// Its bytes, with blanks and comments around it but without its `;`.
    pub range: Range<usize>,
    /// Offset in the whole text just behind its last token that is no comment and no `;`.
    pub end: usize,
}

/// Splits at each `;` outside parentheses (CREATE RULE) and outside BEGIN ATOMIC bodies. Statements without a token are
/// left out; what lies behind the last `;` too, unless it has one.
pub fn split(text: &[u8]) -> Vec<Statement> {
    let mut statements = Vec::new();
    let mut start = 0;
    let mut end = None;
    let mut body = Body::default();
    for token in lex(text).filter(|token| !token.kind.is_gap()) {
        if body.step(text, &token) {
            if let Some(end) = end.take() {
                statements.push(Statement { range: start..token.start(), end });
            }
            start = token.end();
            body = Body::default();
        } else if !token.is_punct(text, b';') {
            end = Some(token.end());
        }
    }
    if let Some(end) = end {
        statements.push(Statement { range: start..text.len(), end });
    }
    statements
}

/// Where in a statement a token stands, as far as it decides whether a `;` ends it.
#[derive(Default)]
struct Body {
    parens: usize,
    /// How far `CREATE [OR REPLACE] FUNCTION | PROCEDURE` was read.
    head: Head,
    /// BEGIN ATOMIC and CASE without their END.
    blocks: usize,
    previous: Previous,
}

#[derive(Default, PartialEq)]
enum Head {
    #[default]
    Start,
    Create,
    Routine,
    Otherwise,
}

#[derive(Default, PartialEq)]
enum Previous {
    Begin,
    /// Behind AS or a dot a keyword is a name.
    Label,
    #[default]
    Plain,
}

impl Body {
    /// Whether this token ends the statement.
    fn step(&mut self, text: &[u8], token: &Token) -> bool {
        let is = |word| token.is_word(text, word);
        let previous = std::mem::take(&mut self.previous);
        if token.kind == Kind::Punct {
            match text[token.start()] {
                b'(' => self.parens += 1,
                b')' => self.parens = self.parens.saturating_sub(1),
                b'.' => self.previous = Previous::Label,
                b';' => return self.parens == 0 && self.blocks == 0,
                _ => {}
            }
        }
        self.head = match self.head {
            Head::Start if is("create") => Head::Create,
            Head::Create if is("or") || is("replace") => Head::Create,
            Head::Create if is("function") || is("procedure") => Head::Routine,
            Head::Routine => Head::Routine,
            _ => Head::Otherwise,
        };
        if self.head != Head::Routine || token.kind != Kind::Word || previous == Previous::Label {
            return false;
        }
        let opens =
            if is("atomic") { previous == Previous::Begin && self.parens == 0 } else { is("case") && self.blocks > 0 };
        if opens {
            self.blocks += 1;
        } else if is("end") {
            self.blocks = self.blocks.saturating_sub(1);
        } else if is("begin") {
            self.previous = Previous::Begin;
        } else if is("as") {
            self.previous = Previous::Label;
        }
        false
    }
}

/// Byte offset just behind the last token that is no comment and no `;`: where RETURNING is spliced. 0 without one.
pub fn end(text: &[u8]) -> usize {
    let last = lex(text).filter(|token| !token.kind.is_gap() && !token.is_punct(text, b';')).last();
    last.map_or(0, |token| token.end())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Vec<&str> {
        split(text.as_bytes())
            .into_iter()
            .map(|statement| text[statement.range.start..statement.end].trim_start())
            .collect()
    }

    #[test]
    fn statements_end_where_the_server_ends_them() {
        for (text, expected) in [
            ("", vec![]),
            (" ; -- x\n;", vec![]),
            ("select 1", vec!["select 1"]),
            ("select 1; /* x */ select ';' ; -- y", vec!["select 1", "/* x */ select ';'"]),
            (
                "create rule r as on insert to t do (delete from u; notify x); select 2",
                vec!["create rule r as on insert to t do (delete from u; notify x)", "select 2"],
            ),
            (
                "create or replace function f() returns int begin atomic select case a when 1 then 2 end as end; select 2; end; commit",
                vec![
                    "create or replace function f() returns int begin atomic select case a when 1 then 2 end as end; select 2; end",
                    "commit",
                ],
            ),
            ("begin; update t set a = 1; end", vec!["begin", "update t set a = 1", "end"]),
            (
                "create function f() returns int as $$ begin; end $$ language plpgsql; begin",
                vec!["create function f() returns int as $$ begin; end $$ language plpgsql", "begin"],
            ),
        ] {
            assert_eq!(pieces(text), expected, "{text}");
        }
    }

    #[test]
    fn the_end_leaves_comments_and_semicolons_behind() {
        for (text, expected) in [
            ("select 1 ; -- x", 8),
            ("", 0),
            ("/* */ ;", 0),
            ("a /* b */", 1),
            ("insert into t values ('x')/**/;;", 26),
        ] {
            assert_eq!(end(text.as_bytes()), expected, "{text}");
        }
    }
}
