//! Logins on both legs, against PostgreSQL 15 with psql and tokio-postgres as clients.

mod auth_support;

use std::collections::BTreeMap;
use std::time::Duration;

use auth_support::{Cluster, Relay, parse_config, psql, talk};
use bytes::Bytes;
use crossfade::auth::Credentials;
use crossfade::auth::verifiers::Verifiers;
use crossfade::backend::connect::{Address, ConnectError, connect};
use crossfade::config::{AuthMethod, User};
use crossfade::wire::tls::ServerTls;

fn verifiers(cluster: &Cluster) -> Verifiers {
    Verifiers::new(&BTreeMap::new(), vec![cluster.control()])
}

fn listed(entries: &[(&str, &str)], cluster: &Cluster) -> Verifiers {
    let users = entries.iter().map(|(name, password)| ((*name).to_owned(), User { password: (*password).to_owned() }));
    Verifiers::new(&users.collect(), vec![cluster.control()])
}

/// A relay that takes `method` and knows what pg_authid knows.
async fn relay(cluster: &Cluster, method: AuthMethod, tls: Option<ServerTls>) -> Relay {
    Relay::start(method, verifiers(cluster), tls, cluster.database("nobody", "127.0.0.1", "")).await
}

const WHO: &str = "SELECT current_user || '@' || current_database()";

#[tokio::test]
async fn scram_with_verifiers_of_pg_authid() {
    let cluster = Cluster::shared();
    let relay = relay(&cluster, AuthMethod::Scram, None).await;
    for (user, password) in [("app", "app-pw"), ("oddsalt", "odd-pw"), ("umlaut", "päß wörd"), ("twin", "app-pw")] {
        let who = psql(relay.address, &format!("user={user} password='{password}'"), WHO).await;
        assert_eq!(who, Ok(format!("{user}@shop")));
    }
    // What a client may not learn: whether the role exists, has a password, or only mistyped it.
    for (user, password) in
        [("app", "wrong"), ("nobody_at_all", "x"), ("expired", "app-pw"), ("nopassword", "x"), ("hashed", "hashed-pw")]
    {
        let error = psql(relay.address, &format!("user={user} password={password}"), WHO).await.unwrap_err();
        assert!(error.contains(&format!("FATAL:  password authentication failed for user \"{user}\"")), "{error}");
    }
    let error = psql(relay.address, "user=nologin password=app-pw", WHO).await.unwrap_err();
    assert!(error.contains("role \"nologin\" is not permitted to log in"), "{error}");
    let error = psql(relay.address, "user=app password=app-pw dbname=nowhere", WHO).await.unwrap_err();
    assert!(error.contains("database \"nowhere\" does not exist"), "{error}");
    let error = psql(relay.address, "user=app", WHO).await.unwrap_err();
    assert!(error.contains("no password supplied"), "{error}");
}

#[tokio::test]
async fn a_changed_password_is_known_at_once() {
    let cluster = Cluster::shared();
    let relay = relay(&cluster, AuthMethod::Scram, None).await;
    let control = cluster.control().connect("test").await.unwrap();
    let login = async |password: &str| psql(relay.address, &format!("user=fickle password={password}"), WHO).await;
    assert!(login("one").await.is_err());
    control.batch_execute("CREATE ROLE fickle LOGIN PASSWORD 'one'").await.unwrap();
    assert_eq!(login("one").await, Ok("fickle@shop".into()));
    control.batch_execute("ALTER ROLE fickle PASSWORD 'two'").await.unwrap();
    assert!(login("one").await.is_err());
    assert_eq!(login("two").await, Ok("fickle@shop".into()));
}

#[tokio::test]
async fn channel_binding_over_tls_that_ends_here() {
    let cluster = Cluster::shared();
    let ca = cluster.certificates.ca.display().to_string();
    let relay = relay(&cluster, AuthMethod::Scram, Some(cluster.server_tls(true))).await;
    let login = |more: &str| format!("host=localhost user=app password=app-pw sslrootcert={ca} {more}");
    let who = psql(relay.address, &login("sslmode=verify-full channel_binding=require"), WHO).await;
    assert_eq!(who, Ok("app@shop".into()));
    let who = psql(relay.address, &login("sslmode=verify-full channel_binding=disable"), WHO).await;
    assert_eq!(who, Ok("app@shop".into()));
    let error = psql(relay.address, &login("sslmode=disable"), WHO).await.unwrap_err();
    assert!(error.contains("only connections with TLS"), "{error}");
    let error = psql(relay.address, "user=app password=wrong sslmode=require", WHO).await.unwrap_err();
    assert!(error.contains("password authentication failed"), "{error}");
}

#[tokio::test]
async fn md5_takes_both_kinds_of_hash() {
    let cluster = Cluster::shared();
    let relay = relay(&cluster, AuthMethod::Md5, None).await;
    assert_eq!(psql(relay.address, "user=hashed password=hashed-pw", WHO).await, Ok("hashed@shop".into()));
    assert_eq!(psql(relay.address, "user=app password=app-pw", WHO).await, Ok("app@shop".into()));
    for user in ["hashed", "app", "nobody_at_all"] {
        let error = psql(relay.address, &format!("user={user} password=wrong"), WHO).await.unwrap_err();
        assert!(error.contains("password authentication failed"), "{error}");
    }
}

#[tokio::test]
async fn cleartext_is_checked_against_any_hash() {
    let cluster = Cluster::shared();
    let relay = relay(&cluster, AuthMethod::Plain, None).await;
    for (user, password) in [("hashed", "hashed-pw"), ("app", "app-pw"), ("plain", "app-pw")] {
        let who = psql(relay.address, &format!("user={user} password={password}"), WHO).await;
        assert_eq!(who, Ok(format!("{user}@shop")));
        let error = psql(relay.address, &format!("user={user} password=wrong"), WHO).await.unwrap_err();
        assert!(error.contains("password authentication failed"), "{error}");
    }
}

#[tokio::test]
async fn trust_logs_in_with_what_the_file_says() {
    let cluster = Cluster::shared();
    let server = cluster.database("nobody", "127.0.0.1", "");
    let relay = Relay::start(AuthMethod::Trust, listed(&[("app", "app-pw")], &cluster), None, server).await;
    assert_eq!(psql(relay.address, "user=app", WHO).await, Ok("app@shop".into()));
    assert_eq!(psql(relay.address, "user=trusted", WHO).await, Ok("trusted@shop".into()));
    let error = psql(relay.address, "user=twin", WHO).await.unwrap_err();
    assert!(error.contains("role \"twin\", which the proxy does not have"), "{error}");
}

#[tokio::test]
async fn users_of_the_file_come_first() {
    let cluster = Cluster::shared();
    let server = cluster.database("nobody", "127.0.0.1", "");
    let control = cluster.control().connect("test").await.unwrap();
    let row = control.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'", &[]).await.unwrap();
    let verifier: String = row.get(0);
    let verifiers = listed(&[("app", &verifier), ("hashed", "hashed-pw"), ("twin", "other-pw")], &cluster);
    let relay = Relay::start(AuthMethod::Scram, verifiers, None, server).await;
    assert_eq!(psql(relay.address, "user=app password=app-pw", WHO).await, Ok("app@shop".into()));
    // The client speaks SCRAM to the proxy, and the proxy MD5 to the server.
    assert_eq!(psql(relay.address, "user=hashed password=hashed-pw", WHO).await, Ok("hashed@shop".into()));
    // The file's password lets the client in, but the server knows another one: its error is passed on.
    let error = psql(relay.address, "user=twin password=other-pw", WHO).await.unwrap_err();
    assert!(error.contains("password authentication failed for user \"twin\""), "{error}");
}

#[tokio::test]
async fn hidden_pg_authid_leaves_cleartext() {
    let cluster = Cluster::shared();
    let weak = || Verifiers::new(&BTreeMap::new(), vec![cluster.database("weak:weak-pw", "127.0.0.1", "")]);
    let server = cluster.database("nobody", "127.0.0.1", "");
    let scram = Relay::start(AuthMethod::Scram, weak(), None, server.clone()).await;
    let error = psql(scram.address, "user=app password=app-pw", WHO).await.unwrap_err();
    assert!(error.contains("cannot look up the role's password"), "{error}");
    assert!(scram.errors.lock().unwrap()[0].contains("role weak may not read pg_authid"));

    let plain = Relay::start(AuthMethod::Plain, weak(), None, server).await;
    assert_eq!(psql(plain.address, "user=app password=app-pw", WHO).await, Ok("app@shop".into()));
    let error = psql(plain.address, "user=app password=wrong", WHO).await.unwrap_err();
    assert!(error.contains("password authentication failed for user \"app\""), "{error}");
    // A server that trusts the proxy must not thereby trust the client.
    let error = psql(plain.address, "user=trusted password=whatever", WHO).await.unwrap_err();
    assert!(error.contains("without a password"), "{error}");
}

#[tokio::test]
async fn the_lookup_survives_a_broken_connection() {
    let cluster = Cluster::shared();
    let verifiers = Verifiers::new(
        &BTreeMap::new(),
        vec![cluster.database("control:control-pw", "127.0.0.1", "options=-c%20application_name%3Dbroken")],
    );
    assert!(verifiers.role(b"app").await.unwrap().secret.is_some());
    let control = cluster.control().connect("test").await.unwrap();
    let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                 WHERE application_name = 'crossfade verifiers' AND query LIKE '%pg_authid%'";
    let ended: i64 = control.query_one(ended, &[]).await.unwrap().get(0);
    assert!(ended >= 1);
    assert!(verifiers.role(b"twin").await.unwrap().secret.is_some());
    assert!(!verifiers.role(b"nologin").await.unwrap().may_login);
    assert!(verifiers.role(b"no such role").await.unwrap().secret.is_none());

    let nowhere = Verifiers::new(&BTreeMap::new(), vec![auth_support::parse_database("postgres://u@127.0.0.1:1/d")]);
    for _ in 0..2 {
        let error = nowhere.role(b"app").await.err().unwrap().to_string();
        assert!(error.contains("verifiers cannot be read") && error.contains("127.0.0.1:1"), "{error}");
    }
    // Where the first cannot be reached, the next is asked.
    let databases = vec![auth_support::parse_database("postgres://u@127.0.0.1:1/d"), cluster.control()];
    assert!(Verifiers::new(&BTreeMap::new(), databases).role(b"app").await.unwrap().secret.is_some());
}

fn parameters(user: &str) -> Vec<(Bytes, Bytes)> {
    [("user", user), ("database", "shop"), ("application_name", "login test")]
        .map(|(name, value)| (Bytes::from(name.to_owned()), Bytes::from(value.to_owned())))
        .to_vec()
}

async fn log_in(
    cluster: &Cluster,
    user: &str,
    password: &str,
    host: &str,
    query: &str,
) -> Result<(bool, u16), ConnectError> {
    let database = cluster.database("nobody", host, query);
    let credentials = Credentials::new(user.to_owned(), Some(password));
    let connected = connect(&database, &credentials, &parameters(user), 2).await?;
    Ok((matches!(connected.address, Address::Tcp { tls: true, .. }), connected.minor))
}

#[tokio::test]
async fn the_server_leg_knows_every_method_and_sslmode() {
    let cluster = Cluster::shared();
    let control = cluster.control().connect("test").await.unwrap();
    let version: i32 =
        control.query_one("SELECT current_setting('server_version_num')::int", &[]).await.unwrap().get(0);
    // Before 18 PostgreSQL knows 3.0 only, and says so.
    let minor = if version >= 180_000 { 2 } else { 0 };
    let ca = |mode: &str| format!("sslmode={mode}&sslrootcert={}", cluster.certificates.ca.display());
    for (user, password) in [
        ("app", "app-pw"),
        ("oddsalt", "odd-pw"),
        ("umlaut", "päß wörd"),
        ("hashed", "hashed-pw"),
        ("plain", "app-pw"),
        ("trusted", ""),
    ] {
        // Over TLS the server offers -PLUS, which is then what is used.
        for (host, mode, tls) in [
            ("127.0.0.1", "sslmode=disable".into(), false),
            ("127.0.0.1", String::new(), true),
            ("localhost", ca("verify-full"), true),
            ("127.0.0.1", ca("verify-ca"), true),
        ] {
            let result = log_in(&cluster, user, password, host, &mode).await;
            assert_eq!(result.unwrap_or_else(|error| panic!("{user} {mode}: {error}")), (tls, minor));
        }
    }
    let socket = cluster.dir.path().display().to_string().replace('/', "%2F");
    assert_eq!(log_in(&cluster, "app", "", &socket, "sslmode=require").await.unwrap(), (false, minor));
    // prefer: TLS first, then without, as libpq does.
    assert_eq!(log_in(&cluster, "tlsonly", "app-pw", "127.0.0.1", "").await.unwrap(), (true, minor));
    assert_eq!(log_in(&cluster, "clearonly", "app-pw", "127.0.0.1", "").await.unwrap(), (false, minor));
}

#[tokio::test]
async fn the_server_leg_refuses_what_it_must() {
    let cluster = Cluster::shared();
    let with = |mode: &str, ca: &std::path::Path| format!("sslmode={mode}&sslrootcert={}", ca.display());
    let (ca, other) = (&cluster.certificates.ca, &cluster.certificates.other_ca);
    for (host, query) in [
        ("127.0.0.1", with("verify-full", ca)),
        ("localhost", with("verify-full", other)),
        ("localhost", with("verify-ca", other)),
    ] {
        let error = log_in(&cluster, "app", "app-pw", host, &query).await.expect_err("no TLS error");
        assert!(matches!(error, ConnectError::Tls { .. }), "{error}");
    }
    let error = log_in(&cluster, "app", "wrong", "127.0.0.1", "").await.expect_err("logged in");
    assert_eq!(error.refusal(), Some(&b"28P01"[..]), "{error}");
    let nowhere = auth_support::parse_database("postgres://u@127.0.0.1:1/d");
    let error = connect(&nowhere, &Credentials::new("app", None), &parameters("app"), 0).await.err().unwrap();
    assert!(matches!(error, ConnectError::Io { .. }), "{error}");
}

#[tokio::test]
async fn the_next_host_is_tried() {
    let cluster = Cluster::shared();
    let url = format!("postgres://u@127.0.0.1:1,nowhere.invalid:1,127.0.0.1:{}/shop", cluster.port);
    let database = auth_support::parse_database(&url);
    let credentials = Credentials::new("app", Some("app-pw"));
    let connected = connect(&database, &credentials, &parameters("app"), 0).await.unwrap();
    assert!(matches!(connected.address, Address::Tcp { address, .. } if address.port() == cluster.port));
}

#[tokio::test]
async fn keys_go_where_the_same_verifier_is_and_nowhere_else() {
    let cluster = Cluster::shared();
    let database = cluster.database("nobody", "127.0.0.1", "");
    let control = cluster.control().connect("test").await.unwrap();
    let row = control.query_one("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'", &[]).await.unwrap();
    let verifier = crossfade::auth::scram::ScramVerifier::parse(row.get(0)).unwrap();
    let keys = crossfade::auth::scram::ScramKeys::derive(b"app-pw", &verifier.salt, verifier.iterations);
    let with_keys = |user: &'static str| Credentials { scram: Some(keys.clone()), ..Credentials::new(user, None) };
    for user in ["app", "twin"] {
        assert!(connect(&database, &with_keys(user), &parameters(user), 0).await.is_ok(), "{user}");
    }
    let error = connect(&database, &with_keys("umlaut"), &parameters("umlaut"), 0).await.err().unwrap();
    assert!(error.to_string().contains("another SCRAM verifier for role \"umlaut\""), "{error}");
    let error = connect(&database, &with_keys("hashed"), &parameters("hashed"), 0).await.err().unwrap();
    assert!(error.to_string().contains("MD5 password of role \"hashed\""), "{error}");
}

#[tokio::test]
async fn control_connections_honour_sslmode() {
    let cluster = Cluster::shared();
    let ssl = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let ca = cluster.certificates.ca.display();
    for (host, query, tls) in [
        ("127.0.0.1", "sslmode=disable".to_owned(), false),
        ("127.0.0.1", String::new(), true),
        ("127.0.0.1", "sslmode=require".to_owned(), true),
        ("localhost", format!("sslmode=verify-full&sslrootcert={ca}"), true),
    ] {
        let client = cluster.database("control:control-pw", host, &query).connect("test").await.unwrap();
        assert_eq!(client.query_one(ssl, &[]).await.unwrap().get::<_, bool>(0), tls, "{query}");
    }
    let wrong = format!("sslmode=verify-full&sslrootcert={}", cluster.certificates.other_ca.display());
    assert!(cluster.database("control:control-pw", "localhost", &wrong).connect("test").await.is_err());
    let error = cluster.database("control:wrong", "127.0.0.1", "").connect("test").await.err().unwrap();
    assert!(error.to_string().contains("password authentication failed"), "{error}");
    assert!(!error.to_string().contains("wrong"), "{error}");
}

#[tokio::test]
async fn cancel_requests_reach_the_server() {
    let cluster = Cluster::shared();
    for query in ["sslmode=disable", "sslmode=require"] {
        let server = cluster.database("nobody", "127.0.0.1", query);
        let relay = Relay::start(AuthMethod::Scram, verifiers(&cluster), None, server).await;
        let conninfo = format!("host=127.0.0.1 port={} user=app password=app-pw dbname=shop", relay.address.port());
        let (client, connection) = tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let token = client.cancel_token();
        let work = tokio::spawn(async move { client.simple_query("SELECT pg_sleep(60)").await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
        let error = tokio::time::timeout(Duration::from_secs(20), work).await.unwrap().unwrap().unwrap_err();
        assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::QUERY_CANCELED));
    }
}

const SSL: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];
const GSSENC: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 48];

fn startup(version: u32, rest: &[u8]) -> Vec<u8> {
    [&(rest.len() as u32 + 8).to_be_bytes()[..], &version.to_be_bytes(), rest].concat()
}

#[tokio::test]
async fn what_may_come_before_a_login() {
    let cluster = Cluster::shared();
    let clear = relay(&cluster, AuthMethod::Scram, None).await;
    let tls = relay(&cluster, AuthMethod::Scram, Some(cluster.server_tls(false))).await;
    let login = startup(3 << 16, b"user\0app\0\0");
    let asks_scram = b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0";

    assert_eq!(talk(clear.address, SSL).await, b"N");
    assert_eq!(talk(clear.address, GSSENC).await, b"N");
    assert_eq!(talk(tls.address, SSL).await, b"S");
    assert_eq!(talk(clear.address, &login).await, asks_scram);
    assert_eq!(talk(tls.address, &login).await, asks_scram);
    assert_eq!(talk(clear.address, b"").await, b"");
    // Newer protocols and options are negotiated, then the login goes on.
    let answer = talk(clear.address, &startup(3 << 16 | 9999, b"user\0app\0_pq_.hi\0x\0\0")).await;
    assert_eq!(answer, [&b"v\0\0\0\x14\0\x03\0\x02\0\0\0\x01_pq_.hi\0"[..], asks_scram].concat());
    for (what, bytes, code) in [
        ("stuffing", [SSL, &login].concat(), "08P01"),
        ("stuffing of GSS", [GSSENC, &login].concat(), "08P01"),
        ("protocol 2", startup(2 << 16, b"user\0app\0\0"), "0A000"),
        ("no user", startup(3 << 16, b"database\0shop\0\0"), "28000"),
        ("no end", startup(3 << 16, b"user\0app\0"), "08P01"),
        ("too long", vec![0, 0, 0x40, 0, 0, 3, 0, 0], "08P01"),
        ("too short", vec![0, 0, 0, 4], "08P01"),
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec(), "08P01"),
        ("no password", [&login[..], b"Q\0\0\0\x06;\0"].concat(), "08P01"),
        ("long password", [&login[..], b"p\x7f\xff\xff\xff"].concat(), "08P01"),
        ("odd mechanism", [&login[..], b"p\0\0\0\x0aX\0\0\0\0\0"].concat(), "08P01"),
    ] {
        for relay in [&clear, &tls] {
            let answer = talk(relay.address, &bytes).await;
            let text = String::from_utf8_lossy(&answer);
            assert!(text.contains(&format!("\0C{code}\0")), "{what}: {text:?}");
            assert!(!text.contains("SELECT"), "{what}: {text:?}");
        }
    }
}

#[tokio::test]
async fn direct_tls_needs_alpn_and_client_certificates_are_checked() {
    use crossfade::wire::tls::{ServerCheck, client_config};
    use rustls::pki_types::ServerName;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let cluster = Cluster::shared();
    let relay = relay(&cluster, AuthMethod::Scram, Some(cluster.server_tls(true))).await;
    let dial = async |alpn: &[u8]| {
        let mut config = (*client_config(ServerCheck::ChainAndName, Some(&cluster.certificates.ca)).unwrap()).clone();
        config.alpn_protocols = Some(alpn).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).into_iter().collect();
        let tcp = tokio::net::TcpStream::connect(relay.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        let mut tls =
            connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.map_err(|e| e.to_string())?;
        tls.write_all(&startup(3 << 16 | 2, b"user\0app\0\0")).await.map_err(|e| e.to_string())?;
        let mut answer = vec![0; 200];
        let n = tls.read(&mut answer).await.map_err(|e| e.to_string())?;
        Ok::<_, String>(String::from_utf8_lossy(&answer[..n]).into_owned())
    };
    assert!(dial(b"postgresql").await.unwrap().contains("SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"));
    assert!(dial(b"").await.unwrap().contains("without ALPN"));
    assert!(dial(b"http/1.1").await.is_err());

    let certificates = &cluster.certificates;
    let strict = ServerTls::load(&certificates.certificate, &certificates.key, Some(&certificates.ca), true).unwrap();
    let server = cluster.database("nobody", "127.0.0.1", "");
    let strict = Relay::start(AuthMethod::Scram, verifiers(&cluster), Some(strict), server).await;
    let login = "user=app password=app-pw sslmode=require";
    assert!(psql(strict.address, login, WHO).await.is_err());
    let (certificate, key) = (certificates.certificate.display(), certificates.key.display());
    let shown = format!("{login} sslcert={certificate} sslkey={key}");
    assert_eq!(psql(strict.address, &shown, WHO).await, Ok("app@shop".into()));
}

#[test]
fn a_missing_certificate_is_named() {
    let config = parse_config(
        "listen: 127.0.0.1:1\nold: postgres://a@b/c\nnew: postgres://a@b/c\nphase: old\n\
         tls: { certificate: /nowhere/c.pem, key: /nowhere/k.pem }\n",
    );
    let tls = config.tls.unwrap();
    let error = ServerTls::load(&tls.certificate, &tls.key, None, tls.required).err().unwrap();
    assert!(error.to_string().contains("certificate /nowhere/c.pem cannot be read"), "{error}");
}
