//! Two databases, and Crossfade in front of them.

use crossfade::cluster::{Builder, Cluster};
use tokio_postgres::NoTls;

use super::link::Link;
use super::proxy::{Proxy, ProxyConfig};
use super::raw::{self, RawClient};

/// The database that migrates.
pub const DATABASE: &str = "shop";
/// The application's role, which owns the database, and the password that it has on both sides.
pub const APP: (&str, &str) = ("app", "app-secret");
/// The control role.
pub const CONTROL: (&str, &str) = ("crossfade", "control-secret");

/// Lines of the file: clients need no password, servers get it. [`Pair::raw`] wants them.
pub const TRUST: &str = "auth: trust\nusers: { app: { password: app-secret } }";

/// Two clusters that do not know each other, each with the roles and an empty database.
pub struct Databases {
    pub old: Cluster,
    pub new: Cluster,
}

impl Databases {
    /// Starts both, with these lines of postgresql.conf.
    pub async fn start(settings: &[(&str, &str)]) -> Databases {
        let [old, new] = ["old", "new"].map(|side| Cluster::builder().lineage(side).settings(settings));
        Databases::of(old, new).await
    }

    /// Starts two that ask nobody for a password: [`super::raw`] can log in. Crossfade needs `auth: trust` in its file.
    pub async fn start_trusting() -> Databases {
        Databases::start_trusting_with(&[], &[]).await
    }

    /// The same, with these lines of postgresql.conf on old and on new.
    pub async fn start_trusting_with(old: &[(&str, &str)], new: &[(&str, &str)]) -> Databases {
        let trust = "local all all trust\nhost all all 127.0.0.1/32 trust\n";
        let builder = |side, settings| Cluster::builder().lineage(side).hba(trust).settings(settings);
        Databases::of(builder("old", old), builder("new", new)).await
    }

    /// Starts these two.
    pub async fn of(old: Builder, new: Builder) -> Databases {
        let (old, new) = tokio::join!(old.start(), new.start());
        let (old, new) = (old.expect("old starts"), new.expect("new starts"));
        let roles = format!(
            "CREATE ROLE {} LOGIN PASSWORD '{}'; CREATE ROLE {} LOGIN SUPERUSER PASSWORD '{}'; \
             CREATE DATABASE {DATABASE} OWNER {};",
            APP.0, APP.1, CONTROL.0, CONTROL.1, APP.0
        );
        old.run("postgres", &roles).await.expect("makes the roles");
        new.run("postgres", &roles).await.expect("makes the roles");
        // One verifier on both sides, as after a pg_dumpall --roles-only: so a client's login is good for both.
        let copy = format!(
            "SELECT format('ALTER ROLE %I PASSWORD %L;', rolname, rolpassword) FROM pg_authid \
             WHERE rolname IN ('{}', '{}')",
            APP.0, CONTROL.0
        );
        let verifiers = old.run("postgres", &copy).await.expect("reads the verifiers");
        new.run("postgres", &verifiers).await.expect("writes the verifiers");
        // The two sides never give the same number to a type or a table; what mixes them up must show.
        let spend_oids = "SELECT count(lo_unlink(lo_create(0))) FROM generate_series(1, 1000)";
        new.run(DATABASE, spend_oids).await.expect("spends OIDs");
        Databases { old, new }
    }

    /// Runs a script as the application's role on both sides.
    pub async fn run_on_both(&self, script: &str) {
        for side in [&self.old, &self.new] {
            side.run(DATABASE, &format!("SET ROLE {};\n{script}", APP.0)).await.expect("runs on both sides");
        }
    }

    /// The smallest file for these two.
    pub fn proxy_config(&self, phase: &str, more: &str) -> ProxyConfig {
        ProxyConfig {
            old: self.old.url_as(CONTROL.0, CONTROL.1, DATABASE),
            new: self.new.url_as(CONTROL.0, CONTROL.1, DATABASE),
            phase: phase.to_owned(),
            more: more.to_owned(),
            environment: Vec::new(),
        }
    }

    /// Compares every table; see [`super::compare::assert_equal`].
    pub async fn assert_equal(&self) -> u64 {
        super::compare::assert_equal(&self.old, &self.new, DATABASE, &[]).await
    }
}

/// Both databases and the proxy. The proxy goes first when this is dropped.
pub struct Pair {
    pub proxy: Proxy,
    pub databases: Databases,
}

impl Pair {
    /// Starts both clusters, runs `schema` on both as the application's role, and starts the proxy in `phase` with `more`
    /// lines in its file.
    pub async fn start(phase: &str, schema: &str, more: &str) -> Pair {
        let databases = Databases::start(&[]).await;
        databases.run_on_both(schema).await;
        let proxy = Proxy::start(databases.proxy_config(phase, more)).await;
        Pair { proxy, databases }
    }

    /// The same, then moved from `old` to `dual-write`; nothing is owed.
    pub async fn dual_write(schema: &str, more: &str) -> Pair {
        let mut pair = Pair::start("old", schema, more).await;
        pair.proxy.set_phase("dual-write").await;
        pair.proxy.settle().await;
        pair
    }

    /// The same, with a line between the proxy and new.
    pub async fn dual_write_over_a_link(schema: &str, more: &str) -> (Pair, Link) {
        let databases = Databases::start(&[]).await;
        databases.run_on_both(schema).await;
        let link = Link::to(databases.new.port()).await;
        let new = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
        let mut proxy = Proxy::start(ProxyConfig { new, ..databases.proxy_config("old", more) }).await;
        proxy.set_phase("dual-write").await;
        proxy.settle().await;
        (Pair { proxy, databases }, link)
    }

    /// A URL through the proxy for the application's role.
    pub fn url(&self) -> String {
        self.proxy.url_as(APP.0, APP.1, DATABASE)
    }

    /// A connection through the proxy as the application's role.
    pub async fn client(&self) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await.expect("connects to the proxy");
        tokio::spawn(async move { drop(connection.await) });
        client
    }

    /// A client that speaks the protocol by itself, logged in as the application's role. The file must have [`TRUST`].
    pub async fn raw(&self) -> RawClient {
        let startup = raw::startup(raw::V3_0, &[("user", APP.0), ("database", DATABASE)]);
        RawClient::connect(self.proxy.port(), None, &startup).await.0
    }

    /// Waits until the proxy has read the definitions again: all that were changed by now are known. It makes a table for that.
    pub async fn renewed(&self) {
        let seen = self.proxy.log().matches("from now on table=public.marker_").count();
        let table = format!("marker_{seen}");
        for side in [&self.databases.old, &self.databases.new] {
            let sql = format!("SET ROLE {}; CREATE TABLE {table} (id int PRIMARY KEY)", APP.0);
            side.run(DATABASE, &sql).await.expect("makes a table");
        }
        let known = format!("from now on table=public.{table}");
        super::until("the definitions are read again", async || self.proxy.log().contains(&known)).await;
    }

    /// How often each of these tables of schema public was tainted so far.
    pub async fn taints(&self, tables: &[&str]) -> Vec<f64> {
        let mut counts = Vec::new();
        for table in tables {
            counts.push(self.proxy.metrics(&format!("crossfade_taints_total{{table=\"public.{table}\"}}")).await);
        }
        counts
    }

    /// Runs something, and says which of these tables it tainted.
    pub async fn tainted_by<'t>(&self, tables: &[&'t str], what: impl AsyncFnOnce()) -> Vec<&'t str> {
        let before = self.taints(tables).await;
        what().await;
        let after = self.taints(tables).await;
        tables.iter().zip(before.iter().zip(&after)).filter(|(_, (b, a))| a > b).map(|(table, _)| *table).collect()
    }

    /// Waits until nothing is owed, then compares every table.
    pub async fn settle_and_assert_equal(&self) -> u64 {
        self.proxy.settle().await;
        self.databases.assert_equal().await
    }
}
