//! A pooler (PgBouncer) between the proxy and both databases. One that gives each session a backend of its own disturbs nothing, barriers included; one that
//! does not is named by `crossfade check`, and no row is written by a session that has lost its settings.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::pair::{APP, CONTROL, DATABASE};
use common::{Databases, Proxy, ProxyConfig, until};
use crossfade::cluster::Cluster;
use tempfile::TempDir;
use tokio_postgres::NoTls;

struct PgBouncer {
    child: Child,
    port: u16,
    dir: TempDir,
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl PgBouncer {
    /// In front of a server. Its users are that server's, by their verifiers: a login goes through.
    async fn before(server: &Cluster, mode: &str) -> Option<PgBouncer> {
        let Some(program) =
            ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"].into_iter().find(|path| Path::new(path).exists())
        else {
            eprintln!("PgBouncer is missing (scripts/setup.sh): nothing is tested");
            return None;
        };
        let dir = TempDir::new().expect("a directory");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("is set");
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("binds").local_addr().expect("an address").port();
        let text = format!(
            "SELECT format('\"%s\" \"%s\"', rolname, rolpassword) FROM pg_authid WHERE rolname IN ('{}', '{}')",
            APP.0, CONTROL.0
        );
        let users = server.run("postgres", &text).await.expect("reads the verifiers");
        std::fs::write(dir.path().join("users.txt"), users).expect("is written");
        let ini = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = scram-sha-256\nauth_file = {}\npool_mode = {mode}\nmax_client_conn = 300\ndefault_pool_size = 90\n",
            server.port(),
            dir.path().join("users.txt").display()
        );
        std::fs::write(dir.path().join("ini"), ini).expect("is written");
        let mut command = Command::new(program);
        // It does not run as root.
        if std::fs::metadata("/proc/self").is_ok_and(|of| std::os::unix::fs::MetadataExt::uid(&of) == 0) {
            command.args(["-u", "nobody"]);
        }
        let log = std::fs::File::create(dir.path().join("log")).expect("a log");
        command.arg(dir.path().join("ini")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("PgBouncer is there: scripts/setup.sh");
        let bouncer = PgBouncer { child, port, dir };
        until("PgBouncer listens", async || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()).await;
        Some(bouncer)
    }

    fn url(&self) -> String {
        format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, self.port)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

/// A trigger that shows when it runs twice: on the mirror it must not run at all.
const SCHEMA: &str = "CREATE TABLE notes (id int PRIMARY KEY, body text);
    CREATE FUNCTION mark() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.body := NEW.body || ''!''; RETURN NEW; END';
    CREATE TRIGGER mark BEFORE INSERT OR UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION mark();
    CREATE TABLE events (what text)";

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_session_mode_disturbs_no_write_and_no_move() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let both = tokio::join!(PgBouncer::before(&databases.old, "session"), PgBouncer::before(&databases.new, "session"));
    let (Some(old), Some(new)) = both else { return };
    let config =
        ProxyConfig { old: old.url(), new: new.url(), ..databases.proxy_config("old", "mirror: { timeout: 20s }") };
    let mut proxy = Proxy::start(config).await;
    let checked = proxy.crossfade(&["check"]).await;
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(!said.contains("pooler") && checked.status.success(), "{said}");
    let url = proxy.url_as(APP.0, APP.1, DATABASE);
    let (idle, connection) = tokio_postgres::connect(&url, NoTls).await.expect("connects");
    tokio::spawn(async move { drop(connection.await) });
    let mut id = 0;
    for phase in ["old", "dual-write", "new-primary", "dual-write", "old"] {
        if phase != "old" || id > 0 {
            proxy.set_phase(phase).await;
        }
        // A session of its own in each phase: the pooler gives it a backend that another one has left.
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("connects");
        tokio::spawn(async move { drop(connection.await) });
        for client in [&client, &idle] {
            id += 1;
            client.execute("INSERT INTO notes VALUES ($1, 'a')", &[&id]).await.expect("writes");
            client
                .batch_execute(
                    "BEGIN; UPDATE notes SET body = 'b' WHERE id = 1; INSERT INTO events VALUES ('x'); COMMIT",
                )
                .await
                .unwrap();
        }
        let backend: i32 = idle.query_one("SELECT pg_backend_pid()", &[]).await.expect("reads").get(0);
        assert!(backend > 0);
        if matches!(phase, "dual-write" | "dual-read" | "new-primary") {
            proxy.settle().await;
            databases.assert_equal().await;
            let failures = proxy.http("/metrics").await.expect("answers").1;
            let failures: Vec<&str> =
                failures.lines().filter(|line| line.starts_with("crossfade_mirror_failures")).collect();
            assert!(failures.iter().all(|line| line.ends_with(" 0")), "{failures:?}\n{}\n{}", old.log(), new.log());
        }
    }
    let bodies = databases.old.run(DATABASE, "SELECT DISTINCT body FROM notes ORDER BY 1").await.expect("reads");
    assert_eq!(bodies.split_whitespace().collect::<Vec<_>>(), ["a!", "b!"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_shares_backends_is_named() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let Some(new) = PgBouncer::before(&databases.new, "transaction").await else { return };
    let proxy = Proxy::start(ProxyConfig { new: new.url(), ..databases.proxy_config("old", "") }).await;
    let checked = proxy.crossfade(&["check"]).await;
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert_eq!(checked.status.code(), Some(1), "{said}");
    let line = said.lines().find(|line| line.contains("pooler")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("new") && line.contains("pool_mode = session"), "{line}");
}
