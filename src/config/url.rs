//! libpq's URLs: `postgres://user:password@host:5432,host2/database?sslmode=verify-full`
//! (<https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS>).
//! No message repeats a part of the URL that may hold a password.

use std::time::Duration;

use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde::de::IntoDeserializer;

use super::{Database, SslMode, TlsOnce};

const PORT: u16 = 5432;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const PARAMETERS: &str = "host, port, dbname, user, password, sslmode, sslrootcert, connect_timeout and options";

/// What the URL says, before defaults.
#[derive(Default)]
struct Parts {
    hosts: Vec<String>,
    ports: Vec<u16>,
    user: Option<String>,
    password: Option<String>,
    database: Option<String>,
    sslmode: Option<SslMode>,
    sslrootcert: Option<String>,
    connect_timeout: Option<Duration>,
    options: Option<String>,
}

/// Reads a URL. An error says what was expected.
pub fn parse_url(text: &str) -> Result<Database, String> {
    let rest = ["postgres://", "postgresql://"].iter().find_map(|scheme| text.strip_prefix(scheme)).ok_or(
        "expected a URL such as postgres://user:password@host:5432/database (a PostgreSQL URL starts with postgres://)",
    )?;
    // The password may hold an @ that nobody encoded: libpq ends it at the first one, and so do we.
    let end = rest.find(['/', '@']).unwrap_or(rest.len());
    let (userinfo, rest) =
        if rest[end..].starts_with('@') { (Some(&rest[..end]), &rest[end + 1..]) } else { (None, rest) };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (hostspec, path) = rest.split_once('/').unwrap_or((rest, ""));

    let mut parts = Parts::default();
    if let Some(userinfo) = userinfo {
        let (user, password) = userinfo.split_once(':').map_or((userinfo, None), |(u, p)| (u, Some(p)));
        parts.user = Some(decode(user)?).filter(|user| !user.is_empty());
        parts.password = password.map(decode).transpose()?.filter(|password| !password.is_empty());
    }
    if !path.is_empty() {
        parts.database = Some(decode(path)?);
    }
    read_hosts(&mut parts, hostspec)?;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or("expected name=value behind the ? of the URL")?;
        read_parameter(&mut parts, &decode(name)?, decode(value)?)?;
    }
    finish(parts)
}

fn decode(text: &str) -> Result<String, String> {
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        let digits = rest.as_bytes().get(at + 1..at + 3);
        if !digits.is_some_and(|d| d.iter().all(u8::is_ascii_hexdigit)) {
            return Err("a % in the URL is not followed by two hexadecimal digits: expected %25 for a % sign".into());
        }
        rest = &rest[at + 3..];
    }
    let text = percent_decode_str(text).decode_utf8().map_err(|_| "the URL's percent codes are not UTF-8")?;
    if text.contains('\0') {
        return Err("the URL holds %00, which no PostgreSQL name or password can".into());
    }
    Ok(text.into_owned())
}

fn read_hosts(parts: &mut Parts, hostspec: &str) -> Result<(), String> {
    if hostspec.is_empty() {
        return Ok(());
    }
    for one in hostspec.split(',') {
        let (host, port) = if let Some(inner) = one.strip_prefix('[') {
            let (host, rest) = inner.split_once(']').ok_or("expected ] behind the IPv6 address in the URL")?;
            (host, rest.strip_prefix(':').or(rest.is_empty().then_some("")).ok_or("expected :port behind ]")?)
        } else {
            one.split_once(':').unwrap_or((one, ""))
        };
        parts.hosts.push(decode(host)?);
        parts.ports.push(read_port(port)?);
    }
    Ok(())
}

fn read_port(text: &str) -> Result<u16, String> {
    match text {
        "" => Ok(PORT),
        text => text
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| "the port in the URL is not a number from 1 to 65535".into()),
    }
}

fn read_parameter(parts: &mut Parts, name: &str, value: String) -> Result<(), String> {
    match name {
        "host" => parts.hosts = value.split(',').map(str::to_owned).collect(),
        "port" => parts.ports = value.split(',').map(read_port).collect::<Result<_, _>>()?,
        "dbname" => parts.database = Some(value),
        "user" => parts.user = Some(value),
        "password" => parts.password = Some(value),
        "sslmode" => parts.sslmode = Some(read_sslmode(&value)?),
        "sslrootcert" => parts.sslrootcert = Some(value),
        "options" => parts.options = Some(value),
        "connect_timeout" => {
            let seconds: i64 =
                value.trim().parse().map_err(|_| "connect_timeout in the URL is not a number of seconds")?;
            parts.connect_timeout = u64::try_from(seconds).ok().filter(|s| *s > 0).map(Duration::from_secs);
        }
        // Harmless ones that people's URLs have, whose only value that we could honour is what happens anyhow.
        "gssencmode" if matches!(value.as_str(), "disable" | "prefer") => {}
        "channel_binding" if matches!(value.as_str(), "disable" | "prefer") => {}
        "target_session_attrs" if value == "any" => {}
        "application_name" | "fallback_application_name" => {}
        _ => return Err(format!("the URL's parameter {name:?} is not understood: expected {PARAMETERS}")),
    }
    Ok(())
}

fn read_sslmode(word: &str) -> Result<SslMode, String> {
    let words: serde::de::value::StrDeserializer<'_, serde::de::value::Error> = word.into_deserializer();
    SslMode::deserialize(words).map_err(|_| {
        "sslmode in the URL: expected disable, prefer, require, verify-ca or verify-full (allow is not known: use prefer)"
            .into()
    })
}

fn finish(mut parts: Parts) -> Result<Database, String> {
    let user = parts.user.filter(|user| !user.is_empty()).ok_or(
        "the URL names no user: expected the control role, as in postgres://crossfade:secret@host:5432/database",
    )?;
    if parts.hosts.is_empty() || parts.hosts.iter().any(String::is_empty) {
        return Err(
            "the URL names no host: expected one, as in postgres://user@host/database or ?host=/run/postgresql".into(),
        );
    }
    match parts.ports.len() {
        0 => parts.ports = vec![PORT; parts.hosts.len()],
        1 => parts.ports = vec![parts.ports[0]; parts.hosts.len()],
        n if n == parts.hosts.len() => {}
        _ => return Err("the URL has another number of ports than of hosts".into()),
    }
    let mut sslmode = parts.sslmode.unwrap_or(SslMode::Prefer);
    if parts.sslrootcert.as_deref() == Some("system") {
        // As libpq: the system's authorities vouch for anyone, so only the name tells who it is.
        if parts.sslmode.is_some_and(|mode| mode != SslMode::VerifyFull) {
            return Err("sslrootcert=system goes only with sslmode=verify-full".into());
        }
        sslmode = SslMode::VerifyFull;
    } else if parts.sslrootcert.is_some() && sslmode == SslMode::Require {
        // As libpq: `require` with a root certificate behaves as `verify-ca`.
        sslmode = SslMode::VerifyCa;
    }
    Ok(Database {
        hosts: parts.hosts.into_iter().zip(parts.ports).collect(),
        database: parts.database.filter(|name| !name.is_empty()).unwrap_or_else(|| user.clone()),
        user,
        password: parts.password,
        sslmode,
        sslrootcert: parts.sslrootcert,
        connect_timeout: parts.connect_timeout.unwrap_or(CONNECT_TIMEOUT),
        options: parts.options,
        tls: TlsOnce::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_urls() {
        let db = parse_url("postgres://me:p%40s%2Fs@a.example:5433,[::1]:7,b/shop?sslmode=verify-full&connect_timeout=3&options=-c%20geqo%3Doff").unwrap();
        assert_eq!(db.hosts, [("a.example".to_owned(), 5433), ("::1".to_owned(), 7), ("b".to_owned(), 5432)]);
        assert_eq!((db.user.as_str(), db.password.as_deref(), db.database.as_str()), ("me", Some("p@s/s"), "shop"));
        assert_eq!((db.sslmode, db.connect_timeout), (SslMode::VerifyFull, Duration::from_secs(3)));
        assert_eq!(db.options.as_deref(), Some("-c geqo=off"));
        let db = parse_url("postgresql:///shop?host=/run/postgresql&port=6000&user=me").unwrap();
        assert_eq!(db.hosts, [("/run/postgresql".to_owned(), 6000)]);
        let db = parse_url("postgres://me@h").unwrap();
        assert_eq!((db.database.as_str(), db.sslmode), ("me", SslMode::Prefer));
        let db = parse_url("postgres://me:what?@h/d").unwrap();
        assert_eq!((db.password.as_deref(), db.database.as_str()), (Some("what?"), "d"));
        let db = parse_url("postgres://me@%2Ftmp%2Fsock/shop").unwrap();
        assert_eq!(db.hosts, [("/tmp/sock".to_owned(), 5432)]);
        let db = parse_url("postgres://me@h/d?sslmode=require&sslrootcert=/ca.pem").unwrap();
        assert_eq!(db.sslmode, SslMode::VerifyCa);
    }

    #[test]
    fn errors_say_what_was_expected_and_hide_the_password() {
        for (url, what) in [
            ("mysql://me:hunter2@h/d", "postgres://"),
            ("host=h password=hunter2", "postgres://"),
            ("postgres://me:hunter2@h:99999/d", "port"),
            ("postgres://me:hunter2%zz@h/d", "%25"),
            ("postgres://:hunter2@h/d", "no user"),
            ("postgres://me:hunter2@/d", "no host"),
            ("postgres://me:hunter2@h/d?sslmode=allow", "sslmode"),
            ("postgres://me:hunter2@h/d?pasword=hunter2", "pasword"),
            ("postgres://me:hunter2@h/d?sslrootcert=system&sslmode=require", "verify-full"),
            ("postgres://me:hunter2@a,b/d?port=1,2,3", "ports"),
        ] {
            let error = parse_url(url).unwrap_err();
            assert!(error.contains(what), "{url}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_url_is_read_without_panic(rest in "([a-z%@:/?&=,0-9]|\\[|\\]|ü){0,40}") {
            let _ = parse_url(&format!("postgres://{rest}"));
        }
    }
}
