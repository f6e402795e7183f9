//! Reads of one row of a lazy table by its key, where new is the authority: whether new speaks for a key is asked beside the read itself, of both sides at
//! once, and says which of the two answers holds. docs/protocols.md, *Lazy*. Pure.

use std::sync::Arc;

use crate::catalog::{Catalog, Column, Table, quote};
use crate::ledger::lazy as named;
use crate::phase::Side;
use crate::sql::facts::Facts;
use crate::sql::lex::{Kind, Token, lex};
use crate::sql::{Relation, name};

/// A read of what belongs to one key.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    table: Arc<Table>,
    /// By which name the statement knows it.
    called: String,
}

/// Whether new speaks for the key of a read: it has the row, or knows that it is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spoken {
    /// One row of one boolean.
    pub text: String,
    /// Which of the read's parameters are its own, from 1.
    pub parameters: Vec<usize>,
}

/// Behind the condition of a SELECT.
const BEHIND: &[&str] = &["group", "having", "window", "order", "limit", "offset", "fetch"];
/// With any of these the condition may be another SELECT's.
const SEVERAL: &[&str] = &["union", "intersect", "except"];
/// With any of these a condition is no plain list of what must all hold.
const TANGLED: &[&str] = &["or", "between", "case"];

const INTEGERS: &[u32] = &[20, 21, 23];
const TEXTS: &[u32] = &[25, 1043];
const UNKNOWN: u32 = 705;
const UUID: u32 = 2950;
/// Types whose texts mean the same whenever they are read (a date may be 'today').
const STEADY: &[&[u32]] = &[INTEGERS, TEXTS, &[UUID]];

/// Whether a SELECT of one table, known by that name, gives what depends on one of its rows alone, the one with a key that it names.
pub(super) fn point(
    text: &[u8],
    facts: &Facts,
    catalog: &Catalog,
    relation: &Relation,
    called: String,
) -> Option<Point> {
    let eligible = super::read::eligible(text, facts, catalog, Side::New).ok()?;
    let [table] = &eligible.tables[..] else { return None };
    let key = table.key.as_ref().filter(|key| table.lazy && key.bytewise)?;
    let steady = |&at: &usize| STEADY.iter().any(|types| types.contains(&table.columns[at].type_oid.new));
    let tokens: Vec<Token> = lex(text).filter(|token| !token.kind.is_gap()).collect();
    // In a subquery, or behind the condition of another SELECT, the condition would not be about the table.
    let from = tokens.get(..relation.tokens.start)?;
    let count = |byte: u8| from.iter().filter(|token| token.is_punct(text, byte)).count();
    let outside = count(b'(') == count(b')') && conjuncts(text, from).is_none();
    let several = tokens.iter().any(|token| SEVERAL.iter().any(|word| token.is_word(text, word)));
    let steady = key.columns.iter().all(steady);
    let point = Point { table: table.clone(), called };
    (steady && outside && !several && point.spoken(text, &[]).is_some()).then_some(point)
}

impl Point {
    /// For a text of such a shape. `types`: those that the client has declared for its parameters. None: more than one key may meet the condition.
    pub fn spoken(&self, text: &[u8], types: &[u32]) -> Option<Spoken> {
        let table = &self.table;
        let tokens: Vec<Token> = lex(text).filter(|token| !token.kind.is_gap()).collect();
        let parts = conjuncts(text, &tokens)?;
        let (mut texts, mut parameters) = (Vec::new(), Vec::new());
        for &at in &table.key.as_ref()?.columns {
            let column = &table.columns[at];
            let value = parts.iter().find_map(|part| self.equals(text, part, column))?;
            texts.push(format!(
                "{} = {}",
                quote(&column.name.new),
                written(text, &tokens, value, column, types, &mut parameters)?
            ));
        }
        let condition = texts.join(" AND ");
        let text = format!(
            "SELECT EXISTS (SELECT FROM {} WHERE {condition}) OR EXISTS (SELECT FROM ONLY {} WHERE {condition})",
            named("gone", table.number),
            table.qualified(Side::New)
        );
        Some(Spoken { text, parameters })
    }

    /// The value that this asks the column to have.
    fn equals<'t>(&self, text: &[u8], part: &'t [Token], column: &Column) -> Option<&'t [Token]> {
        let (found, behind) = match part {
            [of, dot, found, behind @ ..] if dot.is_punct(text, b'.') => {
                if name::fold(text, of).as_deref() != Some(self.called.as_str()) {
                    return None;
                }
                (found, behind)
            }
            [found, behind @ ..] => (found, behind),
            [] => return None,
        };
        let (sign, value) = behind.split_first()?;
        let is_column = matches!(found.kind, Kind::Word | Kind::Quoted)
            && name::fold(text, found).as_deref() == Some(column.name.new.as_str());
        (is_column && sign.kind == Kind::Operator && sign.bytes(text) == b"=").then_some(value)
    }
}

/// What must all hold, as the statement's own WHERE has it.
fn conjuncts<'t>(text: &[u8], tokens: &'t [Token]) -> Option<Vec<&'t [Token]>> {
    let mut depth = 0usize;
    let (mut begin, mut parts) = (None, Vec::new());
    for (at, token) in tokens.iter().enumerate() {
        if token.is_punct(text, b'(') || token.is_punct(text, b'[') {
            depth += 1;
        } else if token.is_punct(text, b')') || token.is_punct(text, b']') {
            depth = depth.checked_sub(1)?;
        }
        if depth > 0 {
            continue;
        }
        let word = |words: &[&str]| words.iter().any(|word| token.is_word(text, word));
        match begin {
            None => begin = word(&["where"]).then_some(at + 1),
            Some(_) if word(TANGLED) => return None,
            Some(from) if word(&["and"]) => {
                parts.push(&tokens[from..at]);
                begin = Some(at + 1);
            }
            Some(from) if word(BEHIND) || token.is_punct(text, b';') => {
                parts.push(&tokens[from..at]);
                return Some(parts);
            }
            Some(_) => {}
        }
    }
    parts.push(&tokens[begin?..]);
    Some(parts)
}

/// The value as `Spoken` has it: one that is compared with the column's own equality, by which no two keys are equal.
fn written(
    text: &[u8],
    tokens: &[Token],
    value: &[Token],
    column: &Column,
    types: &[u32],
    parameters: &mut Vec<usize>,
) -> Option<String> {
    let oid = column.type_oid.new;
    let (value, cast) = match value {
        [value @ .., colons, cast] if colons.bytes(text) == b"::" && cast.kind == Kind::Word => (value, Some(cast)),
        value => (value, None),
    };
    let bytes = |token: &Token| std::str::from_utf8(token.bytes(text)).ok();
    let whole = INTEGERS.contains(&oid);
    let mut out = match value {
        [one] if one.kind == Kind::Param => {
            let number: usize = bytes(one)?.strip_prefix('$')?.parse().ok()?;
            let used = tokens.iter().filter(|token| token.kind == Kind::Param && token.bytes(text) == one.bytes(text));
            let declared = types.get(number.checked_sub(1)?).copied().unwrap_or(0);
            let alike = [INTEGERS, TEXTS].iter().any(|alike| alike.contains(&declared) && alike.contains(&oid));
            if used.count() != 1 || !(declared == 0 || declared == UNKNOWN || declared == oid || alike) {
                return None;
            }
            parameters.push(number);
            format!("${}", parameters.len())
        }
        [one] if one.kind == Kind::Number && whole => bytes(one)?.to_owned(),
        [minus, one] if minus.bytes(text) == b"-" && one.kind == Kind::Number && whole => {
            format!("-{}", bytes(one)?)
        }
        [one] if one.kind == Kind::Text && one.bytes(text).first() == Some(&b'\'') => bytes(one)?.to_owned(),
        _ => return None,
    };
    if let Some(cast) = cast {
        let cast = name::fold(text, cast)?;
        let fits = match cast.as_str() {
            "int2" | "int4" | "int8" | "smallint" | "int" | "integer" | "bigint" => INTEGERS.contains(&oid),
            "text" | "varchar" => TEXTS.contains(&oid),
            "uuid" => oid == UUID,
            _ => false,
        };
        if !fits {
            return None;
        }
        out = format!("{out}::{cast}");
    }
    Some(out)
}
