//! What PostgreSQL's own parser says of the statements in psql scripts.
//!
//! `oracle SCRIPT... > regress.jsonl`: for each distinct SELECT, INSERT, UPDATE, DELETE and MERGE of the scripts that it accepts,
//! one JSON array a line: kind (`select`, `into`, `insert`, ...), tables written (its own first, then those of CTEs),
//! whether it has RETURNING, whether a CTE writes, whether it locks rows, other relations, functions called, the statement. A name is
//! [schema or null, name].

#[path = "../../../src/sql/lex.rs"]
#[allow(dead_code)]
mod lex;

use std::collections::BTreeSet;
use std::io::Write;

use lex::Kind;
use serde_json::{Value, json};

fn main() {
    let mut seen = BTreeSet::new();
    let (mut written, mut refused) = (0, 0);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for path in std::env::args().skip(1) {
        let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        for statement in statements(&text) {
            if !seen.insert(statement.clone()) {
                continue;
            }
            match facts(&statement) {
                Ok(Some(line)) => {
                    written += 1;
                    writeln!(out, "{line}").expect("standard output");
                }
                Ok(None) => {}
                Err(_) => refused += 1,
            }
        }
    }
    eprintln!("{written} statements, {refused} texts refused by PostgreSQL");
}

/// The statements of a psql script: up to `;` outside parentheses or a backslash command. Rows of COPY ... FROM stdin are
/// cut like statements too; PostgreSQL refuses them.
fn statements(text: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let (mut start, mut at, mut depth) = (0, 0, 0);
    while at < text.len() {
        let mut tokens = lex::lex(&text[at..]);
        let base = at;
        let mut cut = None;
        for token in &mut tokens {
            let bytes = token.bytes(&text[base..]);
            match (token.kind, bytes) {
                (Kind::Punct, b"(") => depth += 1,
                (Kind::Punct, b")") => depth -= 1,
                (Kind::Punct, b";") if depth <= 0 => cut = Some((base + token.start, base + token.end)),
                (Kind::Unknown, b"\\") => {
                    let line = text[base + token.start..].iter().position(|&byte| byte == b'\n');
                    cut = Some((base + token.start, line.map_or(text.len(), |length| base + token.start + length)));
                }
                (Kind::Unterminated, _) => {
                    cut = Some((
                        base + token.start,
                        text[base + token.start..]
                            .iter()
                            .position(|&byte| byte == b'\n')
                            .map_or(text.len(), |length| base + token.start + length + 1),
                    ))
                }
                _ => {}
            }
            if cut.is_some() {
                break;
            }
        }
        let Some((end, next)) = cut else { break };
        if let Ok(statement) = std::str::from_utf8(&text[start..end]) {
            found.push(without_comments_before(statement).to_owned());
        }
        (start, at, depth) = (next, next, 0);
    }
    found
}

fn without_comments_before(statement: &str) -> &str {
    let first = lex::lex(statement.as_bytes()).find(|token| !token.kind.is_gap());
    first.map_or("", |token| statement[token.start..].trim_end())
}

#[derive(Default)]
struct Found {
    targets: Vec<Value>,
    relations: BTreeSet<(Option<String>, String)>,
    functions: BTreeSet<(Option<String>, String)>,
    modifying_cte: bool,
    locking: bool,
    into: bool,
}

fn facts(statement: &str) -> Result<Option<Value>, String> {
    let parsed = pg_query::parse(statement, pg_query::ParserOptions::default()).map_err(|error| error.to_string())?;
    let tree = serde_json::to_value(&parsed.protobuf).map_err(|error| error.to_string())?;
    let [raw] = tree["stmts"].as_array().map(Vec::as_slice).unwrap_or_default() else { return Ok(None) };
    let Some((node, body)) = raw["stmt"]["node"].as_object().and_then(|node| node.iter().next()) else {
        return Ok(None);
    };
    let kind = match node.as_str() {
        "SelectStmt" => "select",
        "InsertStmt" => "insert",
        "UpdateStmt" => "update",
        "DeleteStmt" => "delete",
        "MergeStmt" => "merge",
        _ => return Ok(None),
    };
    let mut found = Found::default();
    if kind != "select" {
        found.targets.push(name(&body["relation"]));
    }
    walk(body, &[], &mut found, true);
    let returning = returns(body);
    let kind = if found.into { "into" } else { kind };
    Ok(Some(json!([
        kind,
        found.targets,
        returning,
        found.modifying_cte,
        found.locking,
        found.relations,
        found.functions,
        statement
    ])))
}

fn returns(body: &Value) -> bool {
    let list = |value: &Value| value.as_array().is_some_and(|list| !list.is_empty());
    list(&body["returning_list"]) || list(&body["returning_clause"]["exprs"])
}

fn text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

fn pair(relation: &Value) -> (Option<String>, String) {
    (text(&relation["schemaname"]), text(&relation["relname"]).unwrap_or_default())
}

fn name(relation: &Value) -> Value {
    json!(pair(relation))
}

/// Walks a tree with the CTE names that hold in it.
fn walk(value: &Value, ctes: &[String], found: &mut Found, top: bool) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| walk(item, ctes, found, false)),
        Value::Object(fields) => {
            if fields.contains_key("relname") && fields.contains_key("schemaname") {
                let pair = pair(value);
                if !(pair.0.is_none() && ctes.contains(&pair.1)) {
                    found.relations.insert(pair);
                }
                return;
            }
            if let Some(function) = fields.get("funcname").filter(|_| fields.contains_key("agg_star")) {
                let parts: Vec<String> = function
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|part| text(&part["node"]["String"]["sval"]))
                    .collect();
                if let Some((last, before)) = parts.split_last() {
                    found.functions.insert((before.last().cloned(), last.clone()));
                }
            }
            found.locking |=
                fields.get("locking_clause").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
            found.into |= fields.get("into_clause").is_some_and(|into| !into.is_null());
            let inner = with_clause(fields.get("with_clause"), ctes, found);
            let ctes = inner.as_deref().unwrap_or(ctes);
            for (field, value) in fields {
                match field.as_str() {
                    "with_clause" | "locking_clause" | "into_clause" => {}
                    // The table that a top statement writes is no reading of it.
                    "relation" if top && fields.contains_key("with_clause") => {}
                    _ => walk(value, ctes, found, false),
                }
            }
        }
        _ => {}
    }
}

/// The names that hold behind a WITH clause, once it was walked.
fn with_clause(clause: Option<&Value>, outer: &[String], found: &mut Found) -> Option<Vec<String>> {
    let clause = clause.filter(|clause| !clause.is_null())?;
    let tables: Vec<&Value> = clause["ctes"].as_array()?.iter().map(|cte| &cte["node"]["CommonTableExpr"]).collect();
    let names: Vec<String> = tables.iter().filter_map(|cte| text(&cte["ctename"])).collect();
    let recursive = clause["recursive"] == json!(true);
    for (place, cte) in tables.iter().enumerate() {
        let seen = if recursive { names.len() } else { place };
        let scope: Vec<String> = outer.iter().chain(&names[..seen]).cloned().collect();
        let node = cte["ctequery"]["node"].as_object().and_then(|node| node.iter().next());
        let Some((kind, body)) = node else { continue };
        let writes = matches!(kind.as_str(), "InsertStmt" | "UpdateStmt" | "DeleteStmt" | "MergeStmt");
        if writes {
            found.modifying_cte = true;
            found.targets.push(name(&body["relation"]));
        }
        walk(body, &scope, found, writes);
    }
    Some(outer.iter().chain(&names).cloned().collect())
}
