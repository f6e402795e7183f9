use std::time::Duration;

use super::*;
use crate::config::{Backfill, ColumnRule, Commit, ReadRule, Share, SslMode};

const SMALL: &str = "\
listen: 127.0.0.1:6432
admin: 127.0.0.1:9187
old: postgres://crossfade:secret@old.example:5432/shop
new: postgres://crossfade:secret@new.example:5432/shop
phase: old
";

fn read(text: &str) -> Result<Config, ConfigError> {
    parse_with(text, "test.yaml", &|name| match name {
        "PW" => Some("s3:\"# {c}ret".into()),
        "N" => Some("77".into()),
        "ON" => Some("true".into()),
        _ => None,
    })
}

/// The error of SMALL with `more` behind it, which begins in line 6.
fn error(more: &str) -> ConfigError {
    let error = read(&format!("{SMALL}{more}")).unwrap_err();
    assert!(!error.message.contains("hunter2"), "{error}");
    error
}

#[test]
fn the_smallest_file_has_defaults() {
    let config = read(SMALL).unwrap();
    assert_eq!((config.name.as_str(), config.admins.as_slice()), ("shop", &["crossfade".to_owned()][..]));
    assert_eq!(config.old.hosts, [("old.example".to_owned(), 5432)]);
    assert_eq!((config.auth, config.phase, config.tables), (AuthMethod::Scram, Phase::Old, None));
    assert_eq!((config.mirror.timeout, config.mirror.connections), (Duration::from_secs(2), 50));
    assert_eq!((config.limits.clients, config.limits.plan_cache), (500, 64 << 20));
}

#[test]
fn every_key_of_the_contract_is_typed() {
    let config = read(&format!(
        "{SMALL}{}",
        r##"
name: photos
auth: md5
users: { app: { password: "${PW}" } }
tls: { certificate: c.pem, key: k.pem, required: "${ON}", client_ca: ca.pem }
tables:
  - public.attachments
  - name: photos
    to: media.pictures
    columns: { owner: user_id, junk: null, full: { new: name, sql: "a || b" } }
    version: updated_at
    read: newest
    serve: 10%
    compare: 0.5%
    backfill: lazy
    phase: dual-write
    group: media
except: [schema_migrations]
other_databases: refuse
mirror: { commit: best-effort, timeout: 500ms, strict: false, ddl: refuse, connections: "${N}" }
move: { pause: 1s, terminate: true, soak: 1d }
fleet: true
fence: true
federate: true
verify: { continuous: 1% }
sweep: { follow: true, retain: 1GiB }
admins: [root]
expect: { standbys: 1, lag: 10s, archiving: true, disk: 2TiB }
limits: { clients: 5, plan_cache: 1MiB, client_buffer: 2MiB, mirror_buffer: 3MiB, statement: 4MiB, login: 5s, logins: 6, threads: 2 }
log: { format: json, level: "info,crossfade=debug" }
"##
    ))
    .unwrap();
    assert_eq!(config.users["app"].password, "s3:\"# {c}ret");
    assert!(config.tls.as_ref().unwrap().required && config.fleet && config.fence && config.federate);
    let tables = config.tables.as_ref().unwrap();
    assert_eq!((tables[0].name.as_str(), tables[0].to.as_deref()), ("public.attachments", None));
    let photos = &tables[1];
    assert_eq!((photos.name.as_str(), photos.to.as_deref()), ("public.photos", Some("media.pictures")));
    assert_eq!(photos.columns["owner"], ColumnRule::Renamed("user_id".into()));
    assert_eq!(photos.columns["junk"], ColumnRule::Dropped);
    assert_eq!(photos.columns["full"], ColumnRule::Expression { new: "name".into(), sql: "a || b".into() });
    assert_eq!((photos.read, photos.backfill), (ReadRule::Newest, Backfill::Lazy));
    assert_eq!((photos.serve, photos.compare), (Some(Share(0.1)), Some(Share(0.005))));
    assert_eq!((photos.phase, photos.group.as_deref()), (Some(Phase::DualWrite), Some("media")));
    assert_eq!(config.except, ["public.schema_migrations"]);
    assert_eq!((config.mirror.connections, config.mirror.commit), (77, Commit::BestEffort));
    assert_eq!((config.moves.pause, config.moves.terminate), (Duration::from_secs(1), true));
    assert_eq!((config.expect.standbys, config.expect.lag), (Some(1), Some(Duration::from_secs(10))));
    assert_eq!(config.expect.disk, Some(2 << 40));
    assert_eq!((config.limits.threads, config.limits.login), (2, Duration::from_secs(5)));
    assert_eq!(config.sweep, Sweep { follow: true, retain: 1 << 30 });
    assert!(config.log.json);
}

#[test]
fn errors_name_line_column_key_and_what_was_expected() {
    for (more, place, key, message) in [
        ("fleat: true", (6, 1), "fleat", "did you mean fleet"),
        ("mirror: { timout: 2s }", (6, 11), "mirror.timout", "did you mean timeout"),
        ("mirror:\n  timeout: soon", (7, 3), "mirror.timeout", "expected a duration"),
        ("limits:\n  clients: many", (7, 3), "limits.clients", "whole number, 1 or more"),
        ("limits: { plan_cache: 1 parsec }", (6, 11), "limits.plan_cache", "expected a size"),
        ("tables:\n  - a\n  - { name: b, serve: 110% }", (8, 16), "tables[1].serve", "0% to 100%"),
        ("tables:\n  - a\n  - { nam: b }", (8, 7), "tables[1].nam", "did you mean name"),
        ("tables: 5", (6, 1), "tables", "invalid type"),
        ("auth: hunter3", (6, 1), "auth", "`scram`"),
        ("log: [text]", (6, 1), "log", "invalid type"),
        ("users: { app: hunter2 }", (6, 10), "users.app", "a map with password"),
        ("users: { app: { password: 12345 } }", (6, 17), "users.app.password", "password in quotes"),
        ("users: [hunter2]", (6, 1), "users", "expected a map"),
        ("fleet: hunter2", (6, 1), "fleet", "true or false"),
        ("name: ${NOPE}", (6, 1), "name", "NOPE is not set"),
        ("tls: { certificate: c }", (6, 1), "tls", "missing field `key`"),
        ("mirror: { commit: best-effort, strict: true }", (6, 32), "mirror.strict", "contradict"),
        ("users: { app: { password: md5aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa } }", (6, 10), "users.app", "contradicts"),
        ("tables: [a, b]\nexcept: [public.b]", (6, 13), "tables[1]", "in tables and in except"),
        ("tables: [a, public.a]", (6, 13), "tables[1]", "twice"),
        ("tables: [a, {name: b, to: a}]", (6, 13), "tables[1]", "both become"),
    ] {
        let error = error(more);
        assert_eq!(error.place, Some(place), "{error}");
        assert_eq!(error.key, key, "{error}");
        assert!(error.message.contains(message), "{error}");
    }
    let text = error("fleat: true").to_string();
    assert_eq!(text, "test.yaml:6:1: fleat: unknown field `fleat`: did you mean fleet?");
}

#[test]
fn errors_in_what_must_be_there() {
    let error = read("listen: 127.0.0.1:6432\n").unwrap_err();
    assert!(error.message.contains("missing field `old`"), "{error}");
    for (from, to, line, message) in [
        ("postgres://crossfade:secret@old.example", "mysql://u:hunter2@h", 3, "postgres://"),
        ("127.0.0.1:6432", "6432", 1, "an address and a port"),
        ("127.0.0.1:9187", "127.0.0.1:6432", 2, "same address as listen"),
        ("phase: old", "phase: dualwrite", 5, "dual-write"),
        ("phase: old", "phase: [old", 6, "no valid YAML"),
        ("phase: old", "phase: old\nphase: new", 6, "duplicate"),
    ] {
        let error = read(&SMALL.replacen(from, to, 1)).unwrap_err();
        assert_eq!(error.place.map(|place| place.0), Some(line), "{error}");
        assert!(error.message.contains(message), "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}

#[test]
fn unquoted_names_in_braces_get_a_hint() {
    let error = error("users: { app: { password: ${PW} } }");
    assert!(error.message.contains("with quotes"), "{error}");
}

#[test]
fn a_password_file_stands_in_for_the_password() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pw");
    std::fs::write(&file, "from file\n").unwrap();
    let with = |url: &str, file: &std::path::Path| {
        let old = format!("old: {{ url: \"{url}\", password_file: {} }}", file.display());
        read(&SMALL.replacen("old: postgres://crossfade:secret@old.example:5432/shop", &old, 1))
    };
    let config = with("postgres://me@h/d?sslmode=require", &file).unwrap();
    assert_eq!((config.old.password.as_deref(), config.old.sslmode), (Some("from file"), SslMode::Require));
    let error = with("postgres://me:x@h/d", &file).unwrap_err();
    assert!(error.message.contains("contradict"), "{error}");
    let error = with("postgres://me@h/d", &dir.path().join("none")).unwrap_err();
    assert!(error.message.contains("cannot be read"), "{error}");
    assert_eq!((error.key.as_str(), error.place), ("old", Some((3, 1))));
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_without_panic(more in "([a-z]{1,6}: |- |\n|  |[{}\\[\\]\",:&*!$%]|[a-z0-9]{1,4}){0,30}") {
        let _ = read(&format!("{SMALL}{more}"));
        let _ = read(&more);
    }
}
