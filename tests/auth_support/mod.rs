//! A small PostgreSQL cluster with a role for each way to log in, a certificate authority, and a relay that puts
//! `accept`, `authenticate` and `connect` in a row. Everything ends when it is dropped.

#![allow(dead_code)] // each test binary uses its part

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use crossfade::auth::client::authenticate;
use crossfade::auth::verifiers::Verifiers;
use crossfade::backend::connect::{Address, cancel, connect};
use crossfade::cluster::programs::Programs;
use crossfade::config::{AuthMethod, Config, Database};
use crossfade::wire::startup::{Accepted, accept};
use crossfade::wire::tls::ServerTls;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpListener;

/// Each host line names its roles, so that one cluster has every method.
const HBA: &str = "\
local all all trust
host all trusted 127.0.0.1/32 trust
host all plain 127.0.0.1/32 password
host all hashed 127.0.0.1/32 md5
hostssl all tlsonly 127.0.0.1/32 scram-sha-256
hostnossl all clearonly 127.0.0.1/32 scram-sha-256
hostssl all clearonly 127.0.0.1/32 reject
hostnossl all tlsonly 127.0.0.1/32 reject
host all all 127.0.0.1/32 scram-sha-256
";

const ROLES: &str = "
CREATE ROLE control SUPERUSER LOGIN PASSWORD 'control-pw';
CREATE ROLE weak LOGIN PASSWORD 'weak-pw';
CREATE ROLE app LOGIN PASSWORD 'app-pw';
CREATE ROLE umlaut LOGIN PASSWORD 'pä\u{00ad}ß wörd';
CREATE ROLE tlsonly LOGIN PASSWORD 'app-pw';
CREATE ROLE clearonly LOGIN PASSWORD 'app-pw';
CREATE ROLE plain LOGIN PASSWORD 'app-pw';
CREATE ROLE trusted LOGIN PASSWORD 'app-pw';
CREATE ROLE expired LOGIN PASSWORD 'app-pw' VALID UNTIL '2001-01-01';
CREATE ROLE nologin NOLOGIN PASSWORD 'app-pw';
CREATE ROLE nopassword LOGIN;
CREATE ROLE twin LOGIN;
DO $$ BEGIN EXECUTE format('ALTER ROLE twin PASSWORD %L', (SELECT rolpassword FROM pg_authid WHERE rolname = 'app')); END $$;
CREATE ROLE oddsalt LOGIN PASSWORD 'SCRAM-SHA-256$77:c2FsdA==$@STORED@:@SERVER@';
SET password_encryption = 'md5';
CREATE ROLE hashed LOGIN PASSWORD 'hashed-pw';
CREATE DATABASE shop;
";

/// PEM files, all signed by one authority but for `other_ca`.
pub struct Certificates {
    pub ca: PathBuf,
    pub other_ca: PathBuf,
    /// For `localhost` and 127.0.0.1.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

fn authority(name: &str) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    (params, KeyPair::generate().unwrap())
}

pub fn certificates(dir: &Path) -> Certificates {
    let write = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (params, key) = authority("Test CA");
    let ca = write("ca.pem", params.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(params, key);
    let server_key = KeyPair::generate().unwrap();
    let server = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = write("server.crt", server.signed_by(&server_key, &issuer).unwrap().pem());
    let key = write("server.key", server_key.serialize_pem());
    let (params, other) = authority("Another CA");
    let other_ca = write("other.pem", params.self_signed(&other).unwrap().pem());
    Certificates { ca, other_ca, certificate, key }
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// PostgreSQL refuses to run as root: then it runs as `postgres`.
fn postgres_command(program: &str) -> Command {
    let bindir = Programs::of_side("old", None).expect("PostgreSQL is installed").bindir;
    let program = bindir.join(program);
    let root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    if !root {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command
}

/// A running server.
pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub port: u16,
    pub certificates: Certificates,
    postmaster: Child,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-QUIT", &self.postmaster.id().to_string()]).status();
        let _ = self.postmaster.wait();
    }
}

impl Cluster {
    /// One for all tests of this binary that run at the same time.
    pub fn shared() -> Arc<Cluster> {
        static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Cluster::start());
            *shared = Arc::downgrade(&cluster);
            cluster
        })
    }

    fn start() -> Cluster {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let certificates = certificates(dir.path());
        let port = free_port();
        let own = |path: &Path| {
            let _ = Command::new("chown").args(["-R", "postgres"]).arg(path).stderr(Stdio::null()).status();
        };
        Command::new("chmod").args(["600"]).arg(&certificates.key).status().unwrap();
        own(dir.path());
        let data = dir.path().join("data");
        let initdb = postgres_command("initdb")
            .args(["-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--locale=C", "-D"])
            .arg(&data)
            .output()
            .unwrap();
        assert!(initdb.status.success(), "{}", String::from_utf8_lossy(&initdb.stderr));
        std::fs::write(data.join("pg_hba.conf"), HBA).unwrap();
        let postmaster = postgres_command("postgres")
            .arg("-D")
            .arg(&data)
            .args(["-k".as_ref(), dir.path().as_os_str()])
            .args([
                "-c",
                "listen_addresses=127.0.0.1",
                "-c",
                "fsync=off",
                "-c",
                "ssl=on",
                "-c",
                "password_encryption=scram-sha-256",
            ])
            .args(["-c", "logging_collector=off", "-c", &format!("port={port}")])
            .arg("-c")
            .arg(format!("ssl_cert_file={}", certificates.certificate.display()))
            .arg("-c")
            .arg(format!("ssl_key_file={}", certificates.key.display()))
            .stderr(std::fs::File::create(dir.path().join("server.log")).unwrap())
            .spawn()
            .unwrap();
        let cluster = Cluster { dir, port, certificates, postmaster };
        cluster.fill();
        cluster
    }

    fn fill(&self) {
        use base64::Engine;
        let keys = crossfade::auth::scram::ScramKeys::derive(b"odd-pw", b"salt", 77);
        let base64 = |key| base64::engine::general_purpose::STANDARD.encode(key);
        let roles = ROLES
            .replace("@STORED@", &base64(keys.verifier.stored_key))
            .replace("@SERVER@", &base64(keys.verifier.server_key));
        for _ in 0..200 {
            if self.psql_local("SELECT 1").is_ok() {
                for statement in roles.split(";\n").filter(|text| !text.trim().is_empty()) {
                    // `SET` would end with its psql.
                    if statement.contains("password_encryption") {
                        continue;
                    }
                    let md5 = statement.contains("ROLE hashed");
                    let set = if md5 { "SET password_encryption = 'md5';" } else { "" };
                    self.psql_local(&format!("{set}{statement}")).unwrap();
                }
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{}", std::fs::read_to_string(self.dir.path().join("server.log")).unwrap_or_default());
    }

    fn psql_local(&self, sql: &str) -> Result<(), String> {
        let output = Command::new("psql")
            .args(["-XAtqw", "-U", "postgres", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-h"])
            .arg(self.dir.path())
            .args(["-p", &self.port.to_string(), "-c", sql])
            .output()
            .unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    /// A database URL of this server, read as the file would have it.
    pub fn database(&self, userinfo: &str, host: &str, query: &str) -> Database {
        parse_database(&format!("postgres://{userinfo}@{host}:{}/shop?{query}", self.port))
    }

    /// With the superuser as control role.
    pub fn control(&self) -> Database {
        self.database("control:control-pw", "127.0.0.1", "")
    }

    pub fn server_tls(&self, required: bool) -> ServerTls {
        ServerTls::load(&self.certificates.certificate, &self.certificates.key, None, required).unwrap()
    }
}

pub fn parse_config(text: &str) -> Config {
    crossfade::config::parse(text, "test.yaml").unwrap_or_else(|error| panic!("{error}"))
}

pub fn parse_database(url: &str) -> Database {
    parse_config(&format!("listen: 127.0.0.1:1\nold: \"{url}\"\nnew: \"{url}\"\nphase: old\n")).old
}

/// A relay in front of a server: what a proxy in phase `old` does, with nothing on the way.
pub struct Relay {
    pub address: SocketAddr,
    /// What went wrong, for tests that look at it.
    pub errors: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Inner {
    method: AuthMethod,
    verifiers: Verifiers,
    tls: Option<ServerTls>,
    server: Database,
    /// BackendKeyData is passed on unchanged, so that only the address must be known.
    last: Mutex<Option<Address>>,
}

impl Relay {
    pub async fn start(method: AuthMethod, verifiers: Verifiers, tls: Option<ServerTls>, server: Database) -> Relay {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let errors = Arc::new(Mutex::new(Vec::new()));
        let inner = Arc::new(Inner { method, verifiers, tls, server, last: Mutex::new(None) });
        let seen = errors.clone();
        let task = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (inner, seen) = (inner.clone(), seen.clone());
                tokio::spawn(async move {
                    if let Err(error) = inner.serve(tcp).await {
                        seen.lock().unwrap().push(error);
                    }
                });
            }
        });
        Relay { address, errors, task }
    }
}

impl Inner {
    async fn serve(&self, tcp: tokio::net::TcpStream) -> Result<(), String> {
        let mut startup = match accept(tcp, self.tls.as_ref()).await.map_err(|e| e.to_string())? {
            Accepted::Closed => return Ok(()),
            Accepted::Cancel { key, .. } => {
                let address = self.last.lock().unwrap().clone().ok_or("no session")?;
                return cancel(&self.server, &address, &key).await.map_err(|e| e.to_string());
            }
            Accepted::Session(startup) => startup,
        };
        let login = authenticate(&mut startup, self.method, &self.verifiers).await.map_err(|e| e.to_string())?;
        let server = match connect(&self.server, &login.credentials, &startup.parameters, startup.minor).await {
            Ok(server) => server,
            Err(error) => {
                let _ = startup.stream.write_all(&error.to_client()).await;
                let _ = startup.stream.shutdown().await;
                return Err(error.to_string());
            }
        };
        *self.last.lock().unwrap() = Some(server.address.clone());
        let mut first = b"R\0\0\0\x08\0\0\0\0".to_vec();
        first.extend_from_slice(&server.buf);
        let (mut client, mut server) = (startup.stream, server.stream);
        client.write_all(&first).await.map_err(|e| e.to_string())?;
        client.flush().await.map_err(|e| e.to_string())?;
        server.write_all(&startup.buf).await.map_err(|e| e.to_string())?;
        let _ = copy_bidirectional(&mut client, &mut server).await;
        Ok(())
    }
}

/// psql through `address` with a connection string's `rest`: its output, or what it says.
pub async fn psql(address: SocketAddr, rest: &str, sql: &str) -> Result<String, String> {
    let conninfo =
        format!("host=127.0.0.1 hostaddr=127.0.0.1 port={} dbname=shop connect_timeout=20 {rest}", address.port());
    let output = tokio::process::Command::new("psql")
        .args(["-XAtqw", "-d", &conninfo, "-c", sql])
        .env("LC_ALL", "C.UTF-8")
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Sends `bytes` and reads until the other end closes or falls silent.
pub async fn talk(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    tcp.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    while let Ok(Ok(n)) = tokio::time::timeout(Duration::from_millis(700), tcp.read_buf(&mut answer)).await {
        if n == 0 {
            break;
        }
    }
    answer
}
