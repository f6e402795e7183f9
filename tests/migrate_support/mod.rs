//! Two real PostgreSQL clusters for the tests of `migrate`: started once for a test binary, killed and removed when it ends, however
//! it ends. Each test has a database of its own on both.
#![allow(dead_code)]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crossfade::catalog::{self, Catalog, Sides, Table};
use crossfade::cluster::programs::Programs;
use crossfade::ledger::debts::{self, Debt};
use crossfade::migrate::repair::Repair;
use crossfade::migrate::{self, Pair, Settings};
use crossfade::phase::Side;
use tokio_postgres::{Client, NoTls};

/// A program of the version that a side has.
fn bin(side: Side, program: &str) -> PathBuf {
    Programs::of_side(side.name(), None).expect("PostgreSQL is installed").bindir.join(program)
}

fn root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}

/// PostgreSQL refuses to run as root.
fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if !root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command
}

fn run(mut command: Command) {
    let output = command.current_dir("/tmp").stdin(Stdio::null()).output().expect("runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// One server.
pub struct Cluster {
    side: Side,
    dir: PathBuf,
    /// Stops and removes the cluster when this process has ended and its standard input closes.
    _guard: Child,
}

impl Cluster {
    pub fn start(side: Side) -> Cluster {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let dir =
            std::env::temp_dir().join(format!("xf-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&dir).expect("a directory for the cluster");
        if root() {
            run({
                let mut chown = Command::new("chown");
                chown.arg("postgres").arg(&dir);
                chown
            });
        }
        let data = dir.join("data");
        let script = format!(
            "cat >/dev/null; {} -D {} -m immediate stop >/dev/null 2>&1; rm -rf {}",
            bin(side, "pg_ctl").display(),
            data.display(),
            dir.display()
        );
        // A group of its own: what is sent to the group of the tests (Ctrl-C, a time limit) must not reach it.
        let guard = command("sh")
            .args(["-c", &script])
            .current_dir("/tmp")
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("the guard starts");
        run({
            let mut initdb = command(bin(side, "initdb"));
            initdb.args(["-D"]).arg(&data).args([
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
            ]);
            initdb
        });
        let cluster = Cluster { side, dir, _guard: guard };
        cluster.up();
        cluster
    }

    pub fn up(&self) {
        let options = format!(
            "-c listen_addresses='' -c unix_socket_directories='{}' -c fsync=off -c max_connections=200 -c max_prepared_transactions=20 -c shared_buffers=64MB -c max_wal_size=256MB",
            self.dir.display()
        );
        let mut start = command(bin(self.side, "pg_ctl"));
        start
            .arg("-D")
            .arg(self.dir.join("data"))
            .arg("-l")
            .arg(self.dir.join("log"))
            .args(["-o", &options, "-w", "start"]);
        start.stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/tmp");
        assert!(
            start.status().expect("pg_ctl runs").success(),
            "{}",
            std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
        );
    }

    /// As a crash: nothing is written, unlogged tables are emptied at the next start.
    pub fn crash(&self) {
        let mut stop = command(bin(self.side, "pg_ctl"));
        stop.arg("-D").arg(self.dir.join("data")).args(["-m", "immediate", "-w", "stop"]);
        run(stop);
    }

    pub async fn connect(&self, database: &str) -> Client {
        connect(&self.dir, database).await
    }
}

async fn connect(socket: &Path, database: &str) -> Client {
    let config = format!("host={} user=postgres dbname={database}", socket.display());
    let (client, connection) = tokio_postgres::connect(&config, NoTls).await.expect("connects");
    tokio::spawn(connection);
    client
}

fn shared() -> &'static Sides<Cluster> {
    static CLUSTERS: OnceLock<Sides<Cluster>> = OnceLock::new();
    CLUSTERS.get_or_init(|| Sides { old: Cluster::start(Side::Old), new: Cluster::start(Side::New) })
}

/// One database on both sides, with the same schema.
pub struct World {
    own: Option<Sides<Cluster>>,
    pub database: String,
    pub schema: String,
}

impl World {
    /// On the clusters that all tests share.
    pub async fn new(schema: &str) -> World {
        World::on(None, schema).await
    }

    /// On clusters of its own, which it may crash.
    pub async fn alone(schema: &str) -> World {
        World::on(Some(Sides { old: Cluster::start(Side::Old), new: Cluster::start(Side::New) }), schema).await
    }

    async fn on(own: Option<Sides<Cluster>>, schema: &str) -> World {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let world =
            World { own, database: format!("t{}", NUMBER.fetch_add(1, Ordering::Relaxed)), schema: schema.to_owned() };
        for side in Side::BOTH {
            world
                .cluster(side)
                .connect("postgres")
                .await
                .batch_execute(&format!("CREATE DATABASE {}", world.database))
                .await
                .expect("creates");
            let client = world.client(side).await;
            if side == Side::New {
                // OIDs of user types differ between the sides.
                client
                    .batch_execute("CREATE TYPE public.padding AS ENUM ('x'); CREATE TYPE public.padding2 AS (a int)")
                    .await
                    .expect("pads");
            }
            client.batch_execute(schema).await.expect("the schema is right");
            migrate::install(&client, side).await.expect("installs");
        }
        world
    }

    pub fn cluster(&self, side: Side) -> &Cluster {
        match &self.own {
            Some(own) => own.get(side),
            None => shared().get(side),
        }
    }

    pub async fn client(&self, side: Side) -> Client {
        self.cluster(side).connect(&self.database).await
    }

    pub async fn old(&self) -> Client {
        self.client(Side::Old).await
    }

    /// A session of new as the proxy's mirror sessions are.
    pub async fn new_replica(&self) -> Client {
        let client = self.client(Side::New).await;
        let settings = "SET session_replication_role = replica; SET application_name = 'crossfade mirror'";
        client.batch_execute(settings).await.expect("sets");
        client
    }

    pub async fn both(&self, sql: &str) {
        for side in Side::BOTH {
            self.client(side).await.batch_execute(sql).await.expect(sql);
        }
    }

    pub async fn on_old(&self, sql: &str) {
        self.old().await.batch_execute(sql).await.expect(sql);
    }

    pub async fn on_new(&self, sql: &str) {
        self.client(Side::New).await.batch_execute(sql).await.expect(sql);
    }

    pub async fn catalog(&self) -> Arc<Catalog> {
        let (old, new) = (self.client(Side::Old).await, self.client(Side::New).await);
        Arc::new(catalog::load(&old, &new, None, &[]).await.expect("loads"))
    }

    pub async fn table(&self, name: &str) -> Arc<Table> {
        let catalog = self.catalog().await;
        let table = catalog.tables.values().find(|table| table.name.old == name).cloned();
        table.unwrap_or_else(|| panic!("{name} migrates"))
    }

    pub async fn pair(&self) -> Pair {
        self.pair_with(Settings::default()).await
    }

    pub async fn pair_with(&self, settings: Settings) -> Pair {
        let (authority, mirror) = (self.client(Side::Old).await, self.client(Side::New).await);
        Pair::new(Side::Old, authority, mirror, settings).await.expect("sets up")
    }

    pub async fn repair(&self) -> Repair {
        Repair::new(self.pair().await, self.catalog().await)
    }

    /// Enters debts as they are owed from the start.
    pub async fn owe(&self, debts: &[Debt]) -> i64 {
        owe(&self.old().await, None, debts).await
    }

    pub async fn debts_left(&self) -> i64 {
        self.old().await.query_one("SELECT count(*) FROM crossfade.ledger", &[]).await.expect("counts").get(0)
    }

    /// All rows of a table as text, sorted.
    pub async fn rows(&self, side: Side, table: &str) -> Vec<String> {
        let sql = format!("SELECT t::text FROM {table} t ORDER BY 1");
        self.client(side).await.query(&sql, &[]).await.expect("reads").iter().map(|row| row.get(0)).collect()
    }

    pub async fn assert_equal(&self, table: &str) {
        assert_eq!(self.rows(Side::Old, table).await, self.rows(Side::New, table).await, "{table} on old and on new");
    }
}

/// The transaction on the mirror that carries images.
#[derive(Clone)]
pub struct Carrier {
    pub xid: Option<i64>,
    pub pid: i32,
    pub start: i64,
    pub incarnation: String,
}

/// Who the session is; `xid` only inside a transaction that has written.
pub async fn carrier(mirror: &Client) -> Carrier {
    let row = mirror
        .query_one(
            "SELECT pg_current_xact_id_if_assigned()::text::bigint, pid, (extract(epoch FROM backend_start) * 1000000)::bigint, crossfade.incarnate()::text \
             FROM pg_stat_activity WHERE pid = pg_backend_pid()",
            &[],
        )
        .await
        .expect("says who it is");
    Carrier { xid: row.get(0), pid: row.get(1), start: row.get(2), incarnation: row.get(3) }
}

/// What the proxy sends with COMMIT: in the session's transaction, if one is open.
pub async fn owe(authority: &Client, carrier: Option<&Carrier>, debts: &[Debt]) -> i64 {
    let mut bytes = bytes::BytesMut::new();
    for debt in debts {
        debts::encode(debt, &mut bytes);
    }
    let bytes: &[u8] = &bytes;
    let id: i64 = authority.query_one("SELECT nextval('crossfade.ledger_id')", &[]).await.expect("a number").get(0);
    authority
        .execute(
            &crossfade::ledger::owe::OWE.replace("$5", "$5::text::uuid"),
            &[
                &id,
                &carrier.and_then(|carrier| carrier.xid),
                &carrier.map(|carrier| carrier.pid),
                &carrier.map(|carrier| carrier.start),
                &carrier.map(|carrier| carrier.incarnation.clone()),
                &bytes,
                &"test",
                &None::<i64>,
                &None::<&[u8]>,
            ],
        )
        .await
        .expect("owes");
    id
}

/// The debt of an integer key.
pub fn key(table: &Table, key: i32) -> Debt {
    Debt::Key { table: table.number, key: vec![Some(bytes::Bytes::copy_from_slice(&key.to_be_bytes()))] }
}

pub async fn exec(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}
