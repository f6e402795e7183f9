//! PostgreSQL's regression suite, as PostgreSQL's own parser reads it (see tests/oracle), against our facts.

use std::collections::{BTreeSet, HashMap};

use crossfade::sql::facts::{Facts, Name, Verb};
use crossfade::sql::{self, Limits};
use serde_json::Value;

/// The share of SELECT and DML that must have facts.
const FACTS_MIN: f64 = 0.999;

/// What PostgreSQL's parser says of one statement.
struct Expected {
    kind: String,
    targets: Vec<Name>,
    returning: bool,
    modifying_cte: bool,
    locking: bool,
    relations: BTreeSet<Name>,
    functions: BTreeSet<Name>,
    text: String,
}

fn name(value: &Value) -> Name {
    Name { schema: value[0].as_str().map(str::to_owned), name: value[1].as_str().unwrap().to_owned() }
}

fn names<C: FromIterator<Name>>(value: &Value) -> C {
    value.as_array().unwrap().iter().map(name).collect()
}

fn corpus() -> Vec<Expected> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sql/regress.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        Expected {
            kind: line[0].as_str().unwrap().to_owned(),
            targets: names(&line[1]),
            returning: line[2].as_bool().unwrap(),
            modifying_cte: line[3].as_bool().unwrap(),
            locking: line[4].as_bool().unwrap(),
            relations: names(&line[5]),
            functions: names(&line[6]),
            text: line[7].as_str().unwrap().to_owned(),
        }
    };
    text.lines().map(line).collect()
}

/// A SELECT with a CTE that writes is `Other` by design: its facts are there all the same.
fn is_understood(facts: &Facts) -> bool {
    facts.verb != Verb::Other || facts.modifying_cte
}

fn verb(kind: &str, modifying_cte: bool) -> Verb {
    match kind {
        "select" if modifying_cte => Verb::Other,
        "select" => Verb::Select,
        "insert" => Verb::Insert,
        "update" => Verb::Update,
        "delete" => Verb::Delete,
        "merge" => Verb::Merge,
        "into" => Verb::Ddl { temporary: false },
        kind => panic!("unknown kind {kind}"),
    }
}

/// What operators with keywords become in PostgreSQL's parser: not listed, as operators are not.
fn is_operator(function: &Name) -> bool {
    let names = ["timezone", "overlaps", "like_escape", "similar_to_escape", "is_normalized", "xmlexists", "normalize"];
    function.schema.as_deref() == Some("pg_catalog") && names.contains(&function.name.as_str())
}

/// What is wrong with the facts of a statement, in words.
fn mistakes(expected: &Expected, facts: &Facts) -> Vec<String> {
    let mut wrong = Vec::new();
    let verb = verb(&expected.kind, expected.modifying_cte);
    if std::mem::discriminant(&verb) != std::mem::discriminant(&facts.verb) {
        wrong.push(format!("verb {:?}", facts.verb));
    }
    let targets: Vec<&Name> = facts.targets.iter().map(|target| &target.table).collect();
    if !targets.iter().copied().eq(&expected.targets) {
        wrong.push(format!("targets {targets:?}, expected {:?}", expected.targets));
    }
    if facts.returning != expected.returning {
        wrong.push(format!("returning {}", facts.returning));
    }
    if facts.modifying_cte != expected.modifying_cte {
        wrong.push(format!("modifying_cte {}", facts.modifying_cte));
    }
    if facts.locking != expected.locking {
        wrong.push(format!("locking {}", facts.locking));
    }
    let reads: BTreeSet<Name> = facts.reads.iter().cloned().collect();
    if reads != expected.relations {
        wrong.push(format!("reads {reads:?}, expected {:?}", expected.relations));
    }
    let missing: Vec<&Name> =
        expected.functions.iter().filter(|name| !is_operator(name) && !facts.functions.contains(name)).collect();
    if !missing.is_empty() {
        wrong.push(format!("functions {:?} without {missing:?}", facts.functions));
    }
    wrong
}

#[test]
fn the_regression_suite_is_read_as_postgresql_reads_it() {
    let corpus = corpus();
    let mut unread = Vec::new();
    let mut wrong = Vec::new();
    let mut shapes: HashMap<Vec<u8>, (Facts, &str)> = HashMap::new();
    for expected in &corpus {
        let facts = sql::read(expected.text.as_bytes(), Limits::default());
        let shape = sql::shape(expected.text.as_bytes());
        assert_eq!(facts.end, shape.end, "{}", expected.text);
        let (same, first) = shapes.entry(shape.text).or_insert((facts.clone(), &expected.text));
        assert_eq!(sql::place(&facts, first.as_bytes()), *same, "of one shape:\n{first}\n{}", expected.text);
        if !is_understood(&facts) {
            unread.push(&expected.text);
            continue;
        }
        let mistakes = mistakes(expected, &facts);
        if !mistakes.is_empty() {
            wrong.push(format!("{}\n    {}", expected.text, mistakes.join("\n    ")));
        }
    }
    let share = 1.0 - unread.len() as f64 / corpus.len() as f64;
    println!(
        "{} statements, facts for {:.3} %, {} without, {} wrong, {} shapes",
        corpus.len(),
        share * 100.0,
        unread.len(),
        wrong.len(),
        shapes.len()
    );
    for text in unread.iter().take(60) {
        println!("--- without facts:\n{text}");
    }
    for mistake in wrong.iter().take(60) {
        println!("--- wrong:\n{mistake}");
    }
    assert!(corpus.len() > 20_000);
    assert!(wrong.is_empty(), "{} statements are read wrongly", wrong.len());
    assert!(share >= FACTS_MIN, "facts for only {share}");
}
