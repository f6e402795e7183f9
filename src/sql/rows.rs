//! From an UPDATE to the SELECT of the rows that it reaches.

use squawk_syntax::{SourceFile, SyntaxKind as K, SyntaxNode};

use super::clean::clean;
use super::lex::{Token, lex};
use super::read::{Limits, apart};

/// `SELECT list FROM ... WHERE ... FOR UPDATE OF row`, with the tables, the condition and the WITH clause of this UPDATE, byte for byte.
/// `row`: by which name the statement knows the row that it writes. None where the text is no UPDATE that is plain to read.
pub fn rows_of_update(text: &[u8], limits: Limits, list: &str, row: &str) -> Option<Vec<u8>> {
    let tokens: Vec<Token> = lex(text).filter(|token| !token.kind.is_gap()).collect();
    if text.len() > limits.bytes_max {
        return None;
    }
    let clean = clean(text, &tokens)?;
    if clean.tokens > limits.tokens_max {
        return None;
    }
    apart(text, &tokens, limits, || {
        let parse = SourceFile::parse(&clean.text);
        if !parse.errors().is_empty() {
            return None;
        }
        let root = parse.syntax_node();
        let mut statements = root.children().filter(|node| node.kind() != K::EMPTY_STMT);
        let update = statements.next().filter(|node| node.kind() == K::UPDATE)?;
        if statements.next().is_some() {
            return None;
        }
        select(text, &update, list, row)
    })
}

fn select(text: &[u8], update: &SyntaxNode, list: &str, row: &str) -> Option<Vec<u8>> {
    let word = |node: &SyntaxNode, kind: K| {
        let tokens = node.children_with_tokens().filter_map(|child| child.into_token());
        tokens.filter(|token| token.kind() == kind).map(|token| token.text_range()).next()
    };
    let child = |kind: K| update.children().find(|node| node.kind() == kind);
    let keyword = word(update, K::UPDATE_KW)?;
    let set = child(K::SET_CLAUSE)?;
    let table = &text[keyword.end().into()..set.text_range().start().into()];
    let mut out = text[update.text_range().start().into()..keyword.start().into()].to_vec();
    // A comment that ends with its line may stand at the end of each piece.
    out.extend_from_slice(format!("SELECT {list} FROM").as_bytes());
    out.extend_from_slice(table);
    if let Some(from) = child(K::FROM_CLAUSE) {
        out.extend_from_slice(b"\n,");
        out.extend_from_slice(&text[word(&from, K::FROM_KW)?.end().into()..from.text_range().end().into()]);
    }
    if child(K::WHERE_CURRENT_OF).is_some() {
        return None;
    }
    if let Some(condition) = child(K::WHERE_CLAUSE) {
        out.extend_from_slice(b"\n");
        out.extend_from_slice(&text[condition.text_range().start().into()..condition.text_range().end().into()]);
    }
    out.extend_from_slice(format!("\nFOR UPDATE OF {row}").as_bytes());
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<String> {
        let row = if text.contains(" x ") { "x" } else { "t" };
        let select = rows_of_update(text.as_bytes(), Limits::default(), "i", row)?;
        Some(String::from_utf8(select).expect("UTF-8").split_whitespace().collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn tables_and_conditions_stay_as_they_are() {
        for (update, select) in [
            ("UPDATE t SET id = 2", "SELECT i FROM t FOR UPDATE OF t"),
            ("UPDATE t SET id = $1 WHERE id = $2 RETURNING id", "SELECT i FROM t WHERE id = $2 FOR UPDATE OF t"),
            (
                "update only a.t as x set id = id is distinct from 1, n = (select 1 from s where true) from b, c join d using (e) where x.id in (1, 'from') returning *;",
                "SELECT i FROM only a.t as x , b, c join d using (e) where x.id in (1, 'from') FOR UPDATE OF x",
            ),
            (
                "WITH s AS (SELECT 1 FROM q WHERE r) UPDATE t /* t */ SET id = 1 FROM s -- end",
                "WITH s AS (SELECT 1 FROM q WHERE r) SELECT i FROM t /* t */ , s FOR UPDATE OF t",
            ),
            (
                "UPDATE t SET (id, n) = (1, 2) WHERE s = 'SET q FROM y' AND n IN (1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19)",
                "SELECT i FROM t WHERE s = 'SET q FROM y' AND n IN (1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19) FOR UPDATE OF t",
            ),
        ] {
            assert_eq!(of(update).as_deref(), Some(select), "{update}");
        }
    }

    #[test]
    fn nothing_else_is_read() {
        for text in [
            "",
            "DELETE FROM t",
            "UPDATE t SET id = 1 WHERE CURRENT OF c",
            "UPDATE t SET",
            "UPDATE t SET a = 1; UPDATE t SET a = 2",
        ] {
            assert_eq!(of(text), None, "{text}");
        }
    }
}
