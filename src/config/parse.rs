//! From text to `Config`: YAML, environment, types, contradictions; and errors that name file, line and key.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;

use serde::Deserialize;
use serde::de::Deserializer;

use super::locate::{Step, duplicate, locate, path_text};
use super::tables::qualified;
use super::{
    AuthMethod, Backfill, Commit, Config, Database, Expect, Limits, Log, Mirror, Move, OtherDatabases, Reads, Shares,
    Sweep, TableRule, Tls, User, Verify, env, units,
};
use crate::phase::Phase;

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file's name as it was given.
    pub file: String,
    /// Line and column, from 1; None where the file could not be read at all.
    pub place: Option<(usize, usize)>,
    /// The key, as in `mirror.timeout`; empty where there is none.
    pub key: String,
    /// What is wrong and what was expected. Never a value.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for ConfigError {}

/// Reads and checks a file.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
        file: file.clone(),
        place: None,
        key: String::new(),
        message: format!("cannot be read: {error} (name another file with --config or $CROSSFADE_CONFIG)"),
    })?;
    parse(&text, &file)
}

/// Checks a text; `file` is its name in errors. `${NAME}` comes from this process's environment.
pub fn parse(text: &str, file: &str) -> Result<Config, ConfigError> {
    parse_with(text, file, &|name| std::env::var(name).ok())
}

/// `parse` with another environment.
pub(super) fn parse_with(text: &str, file: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
    let error_at = |path: &[Step], message: String| ConfigError {
        file: file.to_owned(),
        place: locate(text, path).or(Some((1, 1))),
        key: path_text(path),
        message,
    };
    let mut tree: serde_yaml::Value = serde_yaml::from_str(text).map_err(|error| syntax_error(text, file, &error))?;
    env::substitute(&mut tree, env).map_err(|(path, message)| error_at(&path, message))?;
    let raw: RawConfig = serde_path_to_error::deserialize(tree).map_err(|error| {
        let message = explain(&error.inner().to_string());
        let mut path = steps(error.path());
        // The path of an unknown key ends at the map that has it; its own place says more.
        if let Some(key) = unknown_key(&message)
            && path.last() != Some(&Step::Key(key.to_owned()))
        {
            path.push(Step::Key(key.to_owned()));
        }
        error_at(&path, message)
    })?;
    if let Some((path, message)) = contradiction(&raw) {
        return Err(error_at(&path, message));
    }
    Ok(finish(raw))
}

/// The keys of the file. Those that depend on others are filled in by `finish`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    #[serde(deserialize_with = "address")]
    listen: SocketAddr,
    #[serde(default, deserialize_with = "some_address")]
    admin: Option<SocketAddr>,
    old: Database,
    new: Database,
    phase: Phase,
    name: Option<String>,
    #[serde(default)]
    auth: AuthMethod,
    #[serde(default)]
    users: BTreeMap<String, User>,
    tls: Option<Tls>,
    tables: Option<Vec<TableRule>>,
    #[serde(default)]
    except: Vec<String>,
    #[serde(default)]
    other_databases: OtherDatabases,
    #[serde(default)]
    mirror: Mirror,
    #[serde(default, rename = "move")]
    moves: Move,
    #[serde(default, deserialize_with = "units::flag")]
    fleet: bool,
    #[serde(default, deserialize_with = "units::flag")]
    fence: bool,
    #[serde(default, deserialize_with = "units::flag")]
    federate: bool,
    #[serde(default)]
    verify: Verify,
    #[serde(default)]
    sweep: Sweep,
    #[serde(default)]
    reads: Reads,
    admins: Option<Vec<String>>,
    #[serde(default)]
    expect: Expect,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    log: Log,
}

fn address<'de, D: Deserializer<'de>>(d: D) -> Result<SocketAddr, D::Error> {
    units::scalar(d, "an address and a port, such as 127.0.0.1:6432 or [::]:6432", |text| {
        let text = text.strip_prefix("localhost:").map_or(text.to_owned(), |port| format!("127.0.0.1:{port}"));
        text.parse().ok()
    })
}

fn some_address<'de, D: Deserializer<'de>>(d: D) -> Result<Option<SocketAddr>, D::Error> {
    #[derive(Deserialize)]
    struct Address(#[serde(deserialize_with = "address")] SocketAddr);
    Option::<Address>::deserialize(d).map(|address| address.map(|Address(address)| address))
}

fn finish(raw: RawConfig) -> Config {
    let mut config = Config {
        name: raw.name.unwrap_or_else(|| raw.old.database.clone()),
        admins: raw.admins.unwrap_or_else(|| vec![raw.old.user.clone()]),
        listen: raw.listen,
        admin: raw.admin,
        old: raw.old,
        new: raw.new,
        phase: raw.phase,
        auth: raw.auth,
        users: raw.users,
        tls: raw.tls,
        tables: raw.tables,
        except: raw.except.iter().map(|name| qualified(name, "public")).collect(),
        other_databases: raw.other_databases,
        mirror: raw.mirror,
        moves: raw.moves,
        fleet: raw.fleet,
        fence: raw.fence,
        federate: raw.federate,
        verify: raw.verify,
        sweep: raw.sweep,
        reads: raw.reads,
        most: Shares::default(),
        expect: raw.expect,
        limits: raw.limits,
        log: raw.log,
    };
    config.most = config.shares();
    config
}

fn key(name: &str) -> Step {
    Step::Key(name.to_owned())
}

/// Two keys that cannot both be meant: the path of the second, and why.
fn contradiction(raw: &RawConfig) -> Option<(Vec<Step>, String)> {
    if raw.admin.is_some_and(|admin| admin == raw.listen && admin.port() != 0) {
        return Some((vec![key("admin")], "is the same address as listen: expected another port".into()));
    }
    if raw.mirror.strict && raw.mirror.commit == Commit::BestEffort {
        return Some((
            vec![key("mirror"), key("strict")],
            "strict: true and commit: best-effort contradict each other: best-effort commits on the authority before \
             the mirror can refuse; expected commit: ledger"
                .into(),
        ));
    }
    // A verifier of the other kind could never be met. (SCRAM works under `auth: md5`, as it does in PostgreSQL.)
    let md5_hash = |user: &User| user.password.len() == 35 && user.password.starts_with("md5");
    if let Some((name, _)) = raw.users.iter().find(|(_, user)| raw.auth == AuthMethod::Scram && md5_hash(user)) {
        return Some((
            vec![key("users"), key(name)],
            "an md5 hash contradicts auth: scram: expected a password or a SCRAM verifier, or auth: md5".into(),
        ));
    }
    table_contradiction(raw)
}

fn table_contradiction(raw: &RawConfig) -> Option<(Vec<Step>, String)> {
    let except: BTreeSet<String> = raw.except.iter().map(|name| qualified(name, "public")).collect();
    let mut seen = BTreeSet::new();
    let mut moved_to = BTreeMap::new();
    let mut phases: BTreeMap<&str, (Phase, &str)> = BTreeMap::new();
    for (index, table) in raw.tables.iter().flatten().enumerate() {
        let at = vec![key("tables"), Step::Item(index)];
        if table.backfill == Backfill::Lazy && !raw.federate {
            let message = "lazy wants federate: true: what only old has is read from new through postgres_fdw; expected federate: true, or backfill: eager";
            return Some((vec![key("tables"), Step::Item(index), key("backfill")], message.into()));
        }
        if except.contains(&table.name) {
            return Some((at, format!("{} is in tables and in except: expected one of them", table.name)));
        }
        if !seen.insert(&table.name) {
            return Some((at, format!("{} is listed twice", table.name)));
        }
        let to = table.to.as_ref().unwrap_or(&table.name);
        if let Some(first) = moved_to.insert(to, &table.name) {
            return Some((at, format!("{} and {first} both become {to} on new", table.name)));
        }
        let (Some(group), Some(phase)) = (&table.group, table.phase) else { continue };
        let (first, name) = *phases.entry(group).or_insert((phase, &table.name));
        if first != phase {
            let message =
                format!("phase {phase} contradicts phase {first} of {name}, which is in the same group {group}");
            return Some((at, message));
        }
    }
    None
}

fn steps(path: &serde_path_to_error::Path) -> Vec<Step> {
    use serde_path_to_error::Segment;
    path.iter()
        .filter_map(|segment| match segment {
            Segment::Seq { index } => Some(Step::Item(*index)),
            Segment::Map { key } => Some(Step::Key(key.clone())),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect()
}

fn syntax_error(text: &str, file: &str, error: &serde_yaml::Error) -> ConfigError {
    if let Some((key, place)) = duplicate(text) {
        let message = "duplicate key: expected it once".to_owned();
        return ConfigError { file: file.to_owned(), place: Some(place), key, message };
    }
    let place = error.location().map(|at| (at.line(), at.column()));
    let line = place.and_then(|(line, _)| text.lines().nth(line - 1)).unwrap_or_default();
    let hint = match line.contains("${") && line.contains('{') {
        true => " (inside { } or [ ] write \"${NAME}\" with quotes)",
        false => "",
    };
    ConfigError {
        file: file.to_owned(),
        place,
        key: String::new(),
        message: format!("is no valid YAML: {error}{hint}"),
    }
}

/// serde's message, without the value that it may quote, and with the key that was probably meant.
fn explain(message: &str) -> String {
    if let Some(field) = unknown_key(message) {
        let known: Vec<&str> = message.split('`').skip(3).step_by(2).collect();
        let close = known.iter().map(|name| (distance(field, name), *name)).min().filter(|(d, _)| *d <= 2);
        return match close {
            Some((_, name)) => format!("unknown field `{field}`: did you mean {name}?"),
            None => format!("unknown field `{field}`: expected one of {}", known.join(", ")),
        };
    }
    // `invalid type: string "...", expected ...`: what was written may be a secret in the wrong place.
    let Some(rest) = message.strip_prefix("invalid ") else { return message.to_owned() };
    match (rest.split_once(": "), rest.rsplit_once(", expected ")) {
        (Some((what, value)), Some((_, expected))) => {
            let kind = value.split([' ', ',']).next().unwrap_or_default();
            format!("invalid {what} ({kind}): expected {expected}")
        }
        _ => "invalid value".to_owned(),
    }
}

fn unknown_key(message: &str) -> Option<&str> {
    message.strip_prefix("unknown field `")?.split('`').next()
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
