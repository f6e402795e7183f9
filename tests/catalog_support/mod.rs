//! A PostgreSQL server of a test's own, ended when it is dropped, and sessions on it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crossfade::cluster::programs::Programs;
use tokio_postgres::{Client, NoTls};

/// A server that listens on a Unix socket in its own directory. Both sides are databases of it, unless they are to be of two versions
/// (see [`Programs::of_side`]): then `old` is a server of its own.
pub struct Server {
    process: Child,
    directory: tempfile::TempDir,
    old: Option<Box<Server>>,
}

/// PostgreSQL refuses to run as root.
fn unprivileged(program: PathBuf) -> Command {
    let root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    if !root {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command
}

impl Server {
    /// A new cluster, encoding UTF8; two where old is of another version.
    pub async fn start() -> Server {
        let [old, new] = ["old", "new"].map(|side| Programs::of_side(side, None).expect("PostgreSQL is installed"));
        let mut server = Server::of(&new.bindir).await;
        if old != new {
            server.old = Some(Box::new(Server::of(&old.bindir).await));
        }
        server
    }

    async fn of(programs: &Path) -> Server {
        let directory = tempfile::Builder::new().prefix("crossfade").tempdir().unwrap();
        let _ = Command::new("chown").arg("postgres").arg(directory.path()).status();
        let data = directory.path().join("data");
        let made = unprivileged(programs.join("initdb"))
            .args(["-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C.UTF-8", "-N", "-D"])
            .arg(&data)
            .current_dir(directory.path())
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let process = unprivileged(programs.join("postgres"))
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=30", "-D"])
            .arg(&data)
            .arg("-k")
            .arg(directory.path())
            .current_dir(directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Server { process, directory, old: None };
        let started = Instant::now();
        while server.connect("postgres").await.is_err() {
            assert!(started.elapsed() < Duration::from_secs(60), "the server did not start");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        server
    }

    async fn connect(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(self.directory.path()).user("postgres").dbname(database);
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// A session of the superuser.
    pub async fn client(&self, database: &str) -> Client {
        match &self.old {
            Some(old) if database == "old" => old.connect(database).await.unwrap(),
            _ => self.connect(database).await.unwrap(),
        }
    }

    /// Two new databases, with schema `crossfade` where `installed`.
    pub async fn pair(&self, installed: bool) -> (Client, Client) {
        let admin = self.client("postgres").await;
        let old_admin = self.old.as_deref().unwrap_or(self).connect("postgres").await.unwrap();
        old_admin.batch_execute("CREATE DATABASE old TEMPLATE template0").await.unwrap();
        admin.batch_execute("CREATE DATABASE new TEMPLATE template0").await.unwrap();
        let pair = (self.client("old").await, self.client("new").await);
        if installed {
            for client in [&pair.0, &pair.1] {
                client.batch_execute(include_str!("../../src/ledger/schema.sql")).await.unwrap();
            }
        }
        pair
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-INT", &self.process.id().to_string()]).status();
        let _ = self.process.wait();
    }
}
