//! The parts of the file that are a word or a map: databases, users, tables, columns.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use super::units::Share;
use super::{Backfill, ColumnRule, Database, ReadRule, TableRule, User};
use crate::phase::Phase;

/// A word, a map `M`, or null, told apart by what stands there, so that errors inside the map keep their place.
enum WordOr<M> {
    Word(String),
    Map(M),
    Null,
}

struct WordOrVisitor<M>(&'static str, PhantomData<M>);

impl<'de, M: Deserialize<'de>> Visitor<'de> for WordOrVisitor<M> {
    type Value = WordOr<M>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<WordOr<M>, E> {
        Ok(WordOr::Word(word.to_owned()))
    }

    fn visit_unit<E: de::Error>(self) -> Result<WordOr<M>, E> {
        Ok(WordOr::Null)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<WordOr<M>, A::Error> {
        M::deserialize(de::value::MapAccessDeserializer::new(map)).map(WordOr::Map)
    }
}

fn word_or<'de, D: Deserializer<'de>, M: Deserialize<'de>>(
    deserializer: D,
    expected: &'static str,
) -> Result<WordOr<M>, D::Error> {
    deserializer.deserialize_any(WordOrVisitor(expected, PhantomData))
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDatabase {
    url: String,
    password_file: Option<std::path::PathBuf>,
}

impl<'de> Deserialize<'de> for Database {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Database, D::Error> {
        let expected = "a URL such as postgres://user:password@host:5432/database, or a map with url and password_file";
        let (url, file) = match word_or::<_, RawDatabase>(d, expected)? {
            WordOr::Word(url) => (url, None),
            WordOr::Map(raw) => (raw.url, raw.password_file),
            WordOr::Null => return Err(de::Error::custom(format_args!("expected {expected}"))),
        };
        let mut database = super::url::parse_url(&url).map_err(de::Error::custom)?;
        if let Some(file) = file {
            if database.password.is_some() {
                return Err(de::Error::custom(
                    "a password in the url and a password_file contradict each other: expected one of them",
                ));
            }
            let text = std::fs::read_to_string(&file).map_err(|error| {
                de::Error::custom(format_args!("password_file {} cannot be read: {error}", file.display()))
            })?;
            // Editors and `echo` end a file with a line end that is no part of the password.
            let password = text.trim_end_matches(['\r', '\n']);
            if password.is_empty() {
                return Err(de::Error::custom(format_args!("password_file {} is empty", file.display())));
            }
            database.password = Some(password.to_owned());
        }
        Ok(database)
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUser {
    #[serde(deserialize_with = "password")]
    password: String,
}

fn password<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    // Only a string: from a YAML number 0123 or 1e3 the text that was written could not be had back.
    match word_or::<_, BTreeMap<String, de::IgnoredAny>>(d, "a password in quotes")? {
        WordOr::Word(word) if !word.is_empty() => Ok(word),
        _ => Err(de::Error::custom("expected a password in quotes, a SCRAM verifier or an md5 hash")),
    }
}

impl<'de> Deserialize<'de> for User {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<User, D::Error> {
        match word_or::<_, RawUser>(d, "a map with password")? {
            WordOr::Map(raw) => Ok(User { password: raw.password }),
            _ => Err(de::Error::custom("expected a map with password, as in app: { password: \"${APP_PASSWORD}\" }")),
        }
    }
}

/// `name` with schema `schema` where it has none.
pub(super) fn qualified(name: &str, schema: &str) -> String {
    if name.contains('.') { name.to_owned() } else { format!("{schema}.{name}") }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTable {
    name: String,
    to: Option<String>,
    #[serde(default)]
    columns: BTreeMap<String, ColumnRule>,
    version: Option<String>,
    #[serde(default)]
    read: ReadRule,
    serve: Option<Share>,
    compare: Option<Share>,
    #[serde(default)]
    ignore: Vec<String>,
    #[serde(default)]
    backfill: Backfill,
    phase: Option<Phase>,
    group: Option<String>,
}

impl<'de> Deserialize<'de> for TableRule {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<TableRule, D::Error> {
        match word_or::<_, RawTable>(d, "a table's name, or a map with name")? {
            WordOr::Word(name) => Ok(TableRule { name: qualified(&name, "public"), ..TableRule::default() }),
            WordOr::Null => Err(de::Error::custom("expected a table's name, or a map with name")),
            WordOr::Map(raw) => {
                let name = qualified(&raw.name, "public");
                let schema = name.split('.').next().unwrap_or("public");
                let to = raw.to.map(|to| qualified(&to, schema));
                Ok(TableRule {
                    to,
                    columns: raw.columns,
                    version: raw.version,
                    read: raw.read,
                    serve: raw.serve,
                    compare: raw.compare,
                    ignore: raw.ignore,
                    backfill: raw.backfill,
                    phase: raw.phase,
                    group: raw.group,
                    name,
                })
            }
        }
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExpression {
    new: String,
    sql: String,
}

impl<'de> Deserialize<'de> for ColumnRule {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<ColumnRule, D::Error> {
        match word_or::<_, RawExpression>(d, "the column's name on new, null, or a map with new and sql")? {
            WordOr::Word(name) => Ok(ColumnRule::Renamed(name)),
            WordOr::Null => Ok(ColumnRule::Dropped),
            WordOr::Map(raw) => Ok(ColumnRule::Expression { new: raw.new, sql: raw.sql }),
        }
    }
}
