//! What a trigger may do: whether a BEFORE ROW trigger can change a row's key. Most of them set `updated_at` and nothing else; to take
//! each for a change of the key would make every UPDATE of such a table opaque.

use super::read::Trigger;

/// Functions in C that come with PostgreSQL and write no table. None of them can change a key, but for autoinc and insert_username.
const HARMLESS: &[&str] = &[
    "moddatetime",
    "tsvector_update_trigger",
    "tsvector_update_trigger_column",
    "suppress_redundant_updates_trigger",
    "triggered_change_notification",
];

/// The trigger's function writes no table.
pub(super) fn harmless(trigger: &Trigger) -> bool {
    matches!(trigger.language.as_str(), "c" | "internal") && HARMLESS.contains(&trigger.function.as_str())
}

/// Proves from the text of a PL/pgSQL function that the row which it returns has the key that it was given: it returns NEW, OLD or NULL,
/// and nothing in it can assign NEW, OLD, or one of their key columns. False where that is not plain to see.
pub(super) fn keeps_key(trigger: &Trigger, key: &[&str]) -> bool {
    if harmless(trigger) {
        return true;
    }
    if trigger.language != "plpgsql" {
        return false;
    }
    let Some(tokens) = tokens(&trigger.body) else { return false };
    (0..tokens.len()).all(|at| match &tokens[at] {
        Token::Word(word) if word == "return" => returns_row(&tokens[at + 1..]),
        // `function.new` is NEW too: a block's variables go by its label.
        Token::Word(word) if word == "new" || word == "old" => !qualified(&tokens, at) && keeps(&tokens, at, key),
        _ => true,
    })
}

#[derive(Debug, PartialEq)]
enum Token {
    /// An identifier or keyword as PostgreSQL folds it.
    Word(String),
    /// Any other character; `:=` is one, as `:`.
    Mark(char),
    /// A literal.
    Literal,
}

impl Token {
    fn is(&self, word: &str) -> bool {
        matches!(self, Token::Word(found) if found == word)
    }
}

/// None where the text has something that this does not read: dollar quotes, escape strings.
fn tokens(body: &str) -> Option<Vec<Token>> {
    let mut found = Vec::new();
    let mut rest = body;
    while let Some(first) = rest.chars().next() {
        if let Some(comment) = rest.strip_prefix("--") {
            rest = comment.find('\n').map_or("", |end| &comment[end..]);
        } else if let Some(comment) = rest.strip_prefix("/*") {
            // Nested comments are rare: the first end must be the end.
            let end = comment.find("*/")?;
            if comment[..end].contains("/*") {
                return None;
            }
            rest = &comment[end + 2..];
        } else if first == '\'' {
            let end = rest[1..].find('\'')? + 1;
            if rest[..end].contains('\\') {
                return None;
            }
            found.push(Token::Literal);
            rest = &rest[end + 1..];
        } else if first == '"' {
            let end = rest[1..].find('"')? + 1;
            found.push(Token::Word(rest[1..end].to_owned()));
            rest = &rest[end + 1..];
        } else if first == '$' {
            return None;
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$')).unwrap_or(rest.len());
            found.push(Token::Word(rest[..end].to_lowercase()));
            rest = &rest[end..];
        } else {
            if let Some(behind) = rest.strip_prefix(":=") {
                found.push(Token::Mark(':'));
                rest = behind;
                continue;
            }
            if !first.is_whitespace() {
                found.push(Token::Mark(first));
            }
            rest = &rest[first.len_utf8()..];
        }
    }
    Some(found)
}

fn qualified(tokens: &[Token], at: usize) -> bool {
    at > 0 && tokens[at - 1] == Token::Mark('.')
}

/// `RETURN NEW;`, `RETURN OLD;`, `RETURN NULL;` or `RETURN coalesce(NEW, OLD);`.
fn returns_row(behind: &[Token]) -> bool {
    let end = behind.iter().position(|token| *token == Token::Mark(';')).unwrap_or(behind.len());
    match &behind[..end] {
        [Token::Word(word)] => ["new", "old", "null"].contains(&word.as_str()),
        [first, Token::Mark('('), a, Token::Mark(','), b, Token::Mark(')')] => {
            first.is("coalesce") && [a, b].iter().all(|row| row.is("new") || row.is("old"))
        }
        _ => false,
    }
}

/// Whether this mention of NEW or OLD cannot change the row's key.
fn keeps(tokens: &[Token], at: usize, key: &[&str]) -> bool {
    let start = tokens[..at].iter().rposition(|token| *token == Token::Mark(';')).map_or(0, |found| found + 1);
    let end = tokens[at..].iter().position(|token| *token == Token::Mark(';')).map_or(tokens.len(), |found| at + found);
    let statement = &tokens[start..end];
    let assigns = ["into", "get", "fetch", "call", "for", "foreach", "move"];
    let may_assign = statement.iter().any(|token| assigns.iter().any(|word| token.is(word)));
    match (tokens.get(at + 1), tokens.get(at + 2), tokens.get(at + 3)) {
        (Some(Token::Mark('.')), Some(Token::Mark('*')), _) => true,
        (Some(Token::Mark('.')), Some(Token::Word(column)), _) if !key.contains(&column.as_str()) => true,
        (Some(Token::Mark('.')), Some(Token::Word(_)), next) => {
            let compared = at > 0
                && matches!(&tokens[at - 1], Token::Word(word) if
                ["if", "elsif", "when", "and", "or", "not", "where", "on", "return"].contains(&word.as_str()));
            match next {
                // `=` assigns in PL/pgSQL too, but never in a condition.
                Some(Token::Mark('=')) => compared && !may_assign,
                Some(Token::Mark(':' | '[' | '.')) => false,
                _ => !may_assign,
            }
        }
        // The whole row: returned, compared, or given to a function.
        (next, _, _) => {
            let before = at.checked_sub(1).map(|before| &tokens[before]);
            let word_before = |words: &[&str]| before.is_some_and(|token| words.iter().any(|word| token.is(word)));
            let open = statement.iter().take(at - start).fold(0i32, |depth, token| match token {
                Token::Mark('(') => depth + 1,
                Token::Mark(')') => depth - 1,
                _ => depth,
            });
            let copied = before == Some(&Token::Mark(':'));
            (copied && next == Some(&Token::Mark(';')))
                || word_before(&["return"])
                || (word_before(&["from", "if", "when", "and", "or"]) && !may_assign && next != Some(&Token::Mark(':')))
                || (open > 0 && !may_assign && matches!(next, Some(Token::Mark(',' | ')'))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trigger(body: &str) -> Trigger {
        Trigger { bits: 19, function: "f".into(), language: "plpgsql".into(), body: body.into() }
    }

    #[test]
    fn a_trigger_that_cannot_touch_the_key_is_told_from_one_that_may() {
        let keeping = [
            "BEGIN NEW.updated_at := now(); RETURN NEW; END",
            "begin\n new.updated_at = now(); -- set new.id := 3;\n return new;\nend;",
            "BEGIN IF NEW.id = OLD.id THEN NEW.n := 1; END IF; RETURN NEW; END",
            "BEGIN IF NEW IS DISTINCT FROM OLD THEN NEW.n = NEW.id + 1; END IF; RETURN NEW; END",
            "BEGIN IF OLD IS DISTINCT FROM NEW THEN RETURN NEW; END IF; RETURN NULL; END",
            "BEGIN INSERT INTO log SELECT NEW.*; RETURN COALESCE(NEW, OLD); END",
            "BEGIN PERFORM note(to_jsonb(NEW), NEW.id); RETURN NEW; END",
            "BEGIN NEW.\"Id\" := 3; RETURN NEW; END",
            "DECLARE r t := NEW; BEGIN r.id := 3; INSERT INTO log SELECT r.*; RETURN NEW; END",
        ];
        for body in keeping {
            assert!(keeps_key(&trigger(body), &["id"]), "{body}");
        }
        let changing = [
            "BEGIN NEW.id := 3; RETURN NEW; END",
            "BEGIN NEW.id = 3; RETURN NEW; END",
            "BEGIN NEW.\"id\" := 3; RETURN NEW; END",
            "BEGIN IF true THEN NEW.id = 3; END IF; RETURN NEW; END",
            "BEGIN SELECT max(id) INTO NEW.id FROM t; RETURN NEW; END",
            "BEGIN SELECT max(id), 2 INTO x, NEW.id FROM t; RETURN NEW; END",
            "BEGIN NEW := OLD; RETURN NEW; END",
            "BEGIN NEW = OLD; RETURN NEW; END",
            "BEGIN f.new.id := 3; RETURN NEW; END",
            "BEGIN IF TG_OP = 'UPDATE' THEN NEW.n := 1; ELSE NEW.id = 4; END IF; RETURN NEW; END",
            "BEGIN EXECUTE 'SELECT 1' INTO NEW.id; RETURN NEW; END",
            "BEGIN NEW.id := $1; RETURN NEW; END",
            "BEGIN SELECT * INTO NEW FROM t; RETURN NEW; END",
            "BEGIN RETURN f(NEW); END",
            "DECLARE r t; BEGIN r := NEW; RETURN r; END",
            "DECLARE r ALIAS FOR NEW; BEGIN r.id := 2; RETURN NEW; END",
            "BEGIN OLD.id := 3; RETURN OLD; END",
            "BEGIN CALL p(NEW.id); RETURN NEW; END",
            "BEGIN GET DIAGNOSTICS NEW.id = ROW_COUNT; RETURN NEW; END",
            "BEGIN FOR NEW IN SELECT * FROM t LOOP END LOOP; RETURN NEW; END",
        ];
        for body in changing {
            assert!(!keeps_key(&trigger(body), &["id"]), "{body}");
        }
        let sql = Trigger { language: "c".into(), ..trigger("") };
        assert!(!keeps_key(&sql, &["id"]));
        assert!(keeps_key(&Trigger { function: "moddatetime".into(), ..sql }, &["id"]));
    }
}
