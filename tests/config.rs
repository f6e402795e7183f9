//! The example and the JSON Schema that lie in `config/` say what the program reads.

use std::collections::BTreeSet;
use std::path::Path;

use crossfade::config::{Limits, Log, Mirror, Move, Sweep, load, parse};
use serde_json::Value;

fn file(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

fn schema() -> Value {
    serde_json::from_str(&std::fs::read_to_string(file("crossfade.schema.json")).unwrap()).unwrap()
}

fn names<'v>(values: impl Iterator<Item = &'v String>) -> BTreeSet<String> {
    values.cloned().collect()
}

#[test]
fn the_example_parses_and_shows_the_defaults() {
    let config = load(&file("crossfade.yaml")).unwrap();
    assert_eq!(config.mirror, Mirror::default());
    assert_eq!(config.moves, Move::default());
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.log, Log::default());
    assert_eq!(config.sweep, Sweep::default());
    assert_eq!((config.tables, config.tls), (None, None));
}

/// Comments of the example that show keys are right, too.
#[test]
fn the_example_without_its_comments_parses() {
    let text = std::fs::read_to_string(file("crossfade.yaml")).unwrap();
    let shown: Vec<String> = text
        .lines()
        .map(|line| match line.strip_prefix("# ").or(line.strip_prefix('#')) {
            Some(rest) if is_yaml(rest) => rest.to_owned(),
            Some(_) => String::new(),
            None => line.to_owned(),
        })
        .filter(|line| !["users: {}", "except: []", "expect: {}"].contains(&line.as_str()))
        .collect();
    let text = shown.join("\n").replace("${APP_PASSWORD}", "secret");
    let config = parse(&text, "example").unwrap_or_else(|error| panic!("{error}\n{text}"));
    let tables = config.tables.unwrap();
    assert_eq!((tables.len(), tables[1].columns.len()), (2, 3));
    assert_eq!(config.users.len(), 2);
    assert_eq!((config.expect.standbys, config.except.len()), (Some(1), 1));
    assert!(config.tls.unwrap().client_ca.is_some());
}

/// Is this line of a comment a key or an item, and no sentence?
fn is_yaml(line: &str) -> bool {
    let word = line.trim_start().trim_start_matches("- ");
    let key = word.split(':').next().unwrap_or_default();
    (word.contains(": ") || word.ends_with(':') || line.trim_start().starts_with("- "))
        && !key.is_empty()
        && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b == b'.')
        && !line.starts_with("yaml-")
}

const SMALL: &str = "listen: 127.0.0.1:1\nold: postgres://a@b/c\nnew: postgres://a@b/c\nphase: old\n";

/// The keys that the program knows at a place, from what it says about one that it does not know.
fn known(place: &str) -> BTreeSet<String> {
    let unknown = place.replace('@', "qqqqqqqqqqqq: 1");
    let error = parse(&format!("{SMALL}{unknown}\n"), "test").unwrap_err();
    let (_, list) = error.message.split_once("expected one of ").unwrap_or_else(|| {
        panic!("{error}");
    });
    list.split(", ").map(str::to_owned).collect()
}

#[test]
fn the_schema_has_the_keys_that_the_program_knows() {
    let schema = schema();
    let table = "/properties/tables/items/anyOf/1";
    for (place, pointer) in [
        ("@", String::new()),
        ("tls: { @ }", "/properties/tls".into()),
        ("mirror: { @ }", "/properties/mirror".into()),
        ("move: { @ }", "/properties/move".into()),
        ("expect: { @ }", "/properties/expect".into()),
        ("limits: { @ }", "/properties/limits".into()),
        ("log: { @ }", "/properties/log".into()),
        ("reads: { @ }", "/properties/reads".into()),
        ("tables: [{ @ }]", table.into()),
    ] {
        let object = schema.pointer(&pointer).unwrap_or_else(|| panic!("{pointer}"));
        assert_eq!(object["additionalProperties"], Value::Bool(false), "{place}");
        let Value::Object(properties) = &object["properties"] else { panic!("{pointer}") };
        assert_eq!(names(properties.keys()), known(place), "{place}");
    }
    let required: BTreeSet<&str> = schema["required"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(required, BTreeSet::from(["listen", "old", "new", "phase"]));
}

/// Every word that the schema offers is taken, and its defaults are the program's.
#[test]
fn the_words_and_defaults_of_the_schema_are_taken() {
    let schema = schema();
    let properties = schema["properties"].as_object().unwrap();
    let mut tried = 0;
    for (section, object) in properties.iter().filter(|(_, object)| object.get("properties").is_some()) {
        for (key, property) in object["properties"].as_object().unwrap() {
            let words = property.get("enum").and_then(Value::as_array).cloned().unwrap_or_default();
            for value in words.iter().chain(property.get("default")) {
                if section == "tls" {
                    continue;
                }
                let text = format!("{SMALL}{section}: {{ {key}: {value} }}\n");
                parse(&text, "test").unwrap_or_else(|error| panic!("{error}"));
                tried += 1;
            }
        }
    }
    for key in ["auth", "other_databases"] {
        for word in properties[key]["enum"].as_array().unwrap() {
            parse(&format!("{SMALL}{key}: {word}\n"), "test").unwrap_or_else(|error| panic!("{error}"));
            tried += 1;
        }
    }
    assert!(tried > 25, "{tried}");
    for phase in properties["phase"]["enum"].as_array().unwrap() {
        parse(&SMALL.replace("phase: old", &format!("phase: {phase}")), "test").unwrap();
    }
}
