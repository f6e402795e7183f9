//! `crossfade check` on real servers: each thing that stands in the way of a migration is named with its place and the SQL that mends it; that SQL does
//! mend it; and two databases that are fit are said to be.

mod common;

use common::pair::{CONTROL, DATABASE};
use common::{Databases, Proxy};
use serde_json::Value;

const SCHEMA: &str = "
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE DOMAIN small AS int;
CREATE TABLE parent (id int PRIMARY KEY, name text NOT NULL);
CREATE TABLE t (id int PRIMARY KEY, a text, b varchar(20), c int NOT NULL DEFAULT 7, m mood, s small, g int GENERATED ALWAYS AS (c * 2) STORED, p int REFERENCES parent);
CREATE INDEX ON t (a);
CREATE SEQUENCE drawn INCREMENT 5;
CREATE FUNCTION twice(i int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT i * 2';
CREATE VIEW seen AS SELECT id FROM t;
";

struct Stage {
    databases: Databases,
    dir: tempfile::TempDir,
}

impl Stage {
    async fn new(schema: &str) -> Stage {
        let databases = Databases::start(&[]).await;
        databases.run_on_both(schema).await;
        let stage = Stage { databases, dir: tempfile::tempdir().expect("a directory") };
        stage.write_config(CONTROL, "");
        stage
    }

    fn write_config(&self, role: (&str, &str), more: &str) {
        let url = |cluster: &crossfade::cluster::Cluster| cluster.url_as(role.0, role.1, DATABASE);
        let text = format!(
            "listen: 127.0.0.1:1\nold: {}\nnew: {}\nphase: old\n{more}\n",
            url(&self.databases.old),
            url(&self.databases.new)
        );
        std::fs::write(self.dir.path().join("crossfade.yaml"), text).expect("writes");
    }

    async fn run(&self, arguments: &[&str]) -> std::process::Output {
        tokio::process::Command::new(env!("CARGO_BIN_EXE_crossfade"))
            .args(arguments)
            .arg("--config")
            .arg(self.dir.path().join("crossfade.yaml"))
            .kill_on_drop(true)
            .output()
            .await
            .expect("runs")
    }

    /// What it finds; its status says the same.
    async fn findings(&self) -> Vec<Value> {
        let output = self.run(&["check", "--json"]).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let document: Value =
            serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
        let errors = document["errors"].as_u64().expect("a number");
        assert_eq!(output.status.code(), Some(i32::from(errors > 0)), "{said}");
        document["findings"].as_array().expect("a list").clone()
    }

    async fn on_new(&self, script: &str) {
        self.databases.new.run(DATABASE, script).await.expect(script);
    }

    async fn on_old(&self, script: &str) {
        self.databases.old.run(DATABASE, script).await.expect(script);
    }
}

fn lines(found: &[Value]) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let line = |finding: &Value| {
        format!(
            "{} {} {}: {}",
            text(&finding["level"]),
            text(&finding["kind"]),
            text(&finding["object"]),
            text(&finding["what"])
        )
    };
    found.iter().map(line).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn databases_that_are_fit_are_said_to_be() {
    let stage = Stage::new(SCHEMA).await;
    assert_eq!(lines(&stage.findings().await), Vec::<String>::new());
    let output = stage.run(&["check"]).await;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "0 errors, 0 warnings\n");
    // Room on new's disk, as the file declares it: for all partitions, too.
    stage.write_config(CONTROL, "expect: { disk: 1TiB }");
    assert_eq!(lines(&stage.findings().await), Vec::<String>::new());
    let log = "CREATE TABLE log (at int PRIMARY KEY) PARTITION BY RANGE (at); CREATE TABLE log_1 PARTITION OF log FOR VALUES FROM (0) TO (9999999)";
    stage.on_old(log).await;
    stage.on_new(log).await;
    stage.on_old("INSERT INTO log SELECT generate_series(0, 99999)").await;
    stage.write_config(CONTROL, "expect: { disk: 4MB }");
    let said = lines(&stage.findings().await);
    assert!(said.len() == 1 && said[0].starts_with("error expect disk: the migrating tables"), "{said:#?}");
}

/// Each difference, planted alone: what is said of it, and that running what `mend` says ends it.
#[tokio::test(flavor = "multi_thread")]
async fn each_difference_is_found_and_mended_by_what_is_said() {
    let stage = Stage::new(SCHEMA).await;
    let planted = [
        ("ALTER TABLE t DROP COLUMN a", "error column public.t: column a is missing on new"),
        ("ALTER TABLE t ADD COLUMN extra int", "error column public.t: column extra is on new only"),
        (
            "ALTER TABLE t ALTER COLUMN b TYPE varchar(10)",
            "error column public.t: column b is character varying(20) on old and character varying(10) on new",
        ),
        ("ALTER TABLE t ALTER COLUMN a SET NOT NULL", "error column public.t: column a is NOT NULL on new only"),
        ("ALTER TABLE t ALTER COLUMN c DROP NOT NULL", "warning column public.t: column c may be NULL on new"),
        (
            "ALTER TABLE t ALTER COLUMN c SET DEFAULT 8",
            "warning column public.t: the default of column c is 7 on old and 8 on new",
        ),
        (
            "ALTER TABLE t ALTER COLUMN g DROP EXPRESSION",
            "error column public.t: column g is generated on one side only",
        ),
        (
            "ALTER TABLE t ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY",
            "warning column public.t: column id is an identity column",
        ),
        (
            r#"ALTER TABLE t ALTER COLUMN a TYPE text COLLATE "POSIX""#,
            "warning collation public.t: column a is collated by",
        ),
        (
            "ALTER TABLE t ADD CHECK (c > 0)",
            "error check constraint public.t: CHECK ((c > 0)) is on new only: new refuses rows",
        ),
        (
            "ALTER TABLE t ADD EXCLUDE USING btree (c WITH =)",
            "error check constraint public.t: EXCLUDE USING btree (c WITH =) is on new only",
        ),
        ("ALTER TABLE t ADD UNIQUE (a)", "error unique index public.t: btree (a) is on new only: new refuses rows"),
        (
            "CREATE UNIQUE INDEX ON t (a) WHERE c > 3",
            "error unique index public.t: btree (a) WHERE (c > 3) is on new only",
        ),
        ("DROP INDEX t_a_idx", "warning index public.t: btree (a) is missing on new"),
        (
            "ALTER TABLE t DROP CONSTRAINT t_p_fkey",
            "warning foreign key public.t: FOREIGN KEY (p) REFERENCES public.parent(id) is missing on new",
        ),
        (
            "ALTER TABLE t ADD FOREIGN KEY (c) REFERENCES parent",
            "warning foreign key public.t: FOREIGN KEY (c) REFERENCES public.parent(id) is on new only",
        ),
        (
            "CREATE TRIGGER quiet BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "warning trigger public.t: quiet is on new only",
        ),
        ("DROP SEQUENCE drawn", "error sequence public.drawn: public.drawn is missing on new"),
        ("DROP FUNCTION twice", "warning function public.twice(integer): public.twice(integer) is missing on new"),
        ("DROP VIEW seen", "warning view public.seen: public.seen is missing on new"),
        (
            "ALTER DOMAIN small ADD CHECK (value < 100)",
            "error domain constraint public.small: CHECK ((VALUE < 100)): public.small",
        ),
        ("REVOKE SELECT ON t FROM app", "error privilege public.t: role app lacks SELECT on new"),
    ];
    for (plant, expected) in planted {
        stage.on_new(plant).await;
        let found = stage.findings().await;
        let said = lines(&found);
        let at =
            said.iter().position(|line| line.starts_with(expected.split(": public.small").next().unwrap_or(expected)));
        let Some(at) = at else { panic!("{plant}: {said:#?}") };
        let mend = found[at]["mend"].as_str().expect("a text");
        match mend.strip_prefix("take it over by pg_dump") {
            Some(_) => stage.on_new("CREATE FUNCTION twice(i int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT i * 2'; ALTER FUNCTION twice OWNER TO app").await,
            None => stage.on_new(mend).await,
        }
        // Made anew by the control role here: its owner is another.
        stage.on_new("GRANT ALL ON ALL TABLES IN SCHEMA public TO app").await;
        // A dropped column took its index along.
        stage.on_new("CREATE INDEX IF NOT EXISTS t_a_idx ON t (a)").await;
        assert_eq!(lines(&stage.findings().await), Vec::<String>::new(), "after {plant}; {mend}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_as_a_whole_is_found() {
    let stage = Stage::new(SCHEMA).await;
    stage
        .on_old(
            "CREATE TABLE gone (k int PRIMARY KEY); CREATE EXTENSION hstore; CREATE TABLE bag (k int); ALTER TYPE mood ADD VALUE 'glad'; \
             CREATE ROLE clerk LOGIN; GRANT INSERT ON t TO clerk; ALTER TABLE parent ENABLE ROW LEVEL SECURITY; CREATE POLICY all_of_it ON parent USING (true); \
             CREATE RULE quiet AS ON DELETE TO parent DO ALSO NOTHING; SELECT lo_create(0); \
             CREATE TABLE kids (p int PRIMARY KEY REFERENCES parent ON DELETE CASCADE)",
        )
        .await;
    stage
        .on_new(
            "CREATE TABLE bag (k int); CREATE TABLE added (k int); CREATE TABLE kids (p int PRIMARY KEY); \
             CREATE TRIGGER twice AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger(); ALTER TABLE t ENABLE ALWAYS TRIGGER twice; \
             ALTER TABLE parent DROP CONSTRAINT parent_pkey CASCADE; ALTER TABLE parent ADD PRIMARY KEY (name)",
        )
        .await;
    let said = lines(&stage.findings().await);
    for expected in [
        "error table public.gone: it is not on new: it does not migrate",
        "warning table public.added: it is on new only",
        "error extension hstore: hstore is missing on new",
        "error enum value public.mood: 'glad': public.mood: 'glad' is missing on new",
        "error role clerk: role clerk is missing on new",
        "warning privilege public.t: role clerk may write and not read",
        "warning key public.bag: it has no key",
        "error table public.parent: it cannot be mirrored: its key (id) on old is no key on new",
        "warning row security public.parent: row security is on",
        "warning policy public.parent: all_of_it is missing on new",
        "warning rule public.parent: it has rules",
        "warning large object pg_largeobject: 1 large objects",
        "warning trigger public.parent: a trigger or a cascading foreign key of it may write tables",
        "error trigger public.t: trigger twice is enabled ALWAYS or for replicas",
    ] {
        assert!(said.iter().any(|line| line.starts_with(expected)), "{expected}\nnot in {said:#?}");
    }
}

/// The control role lacks one thing after the other: each is a finding of `check`, whose SQL mends it.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_control_role_lacks_is_found() {
    let stage = Stage::new(SCHEMA).await;
    let role = "CREATE ROLE plain LOGIN PASSWORD 'plain-secret'";
    stage.on_old(role).await;
    stage.on_new(role).await;
    stage.on_old("ALTER TABLE parent ENABLE ROW LEVEL SECURITY; REVOKE USAGE ON SCHEMA public FROM PUBLIC; REVOKE USAGE ON TYPE mood FROM PUBLIC; GRANT USAGE ON SCHEMA public TO app").await;
    stage.on_new("ALTER TABLE parent ENABLE ROW LEVEL SECURITY").await;
    stage.write_config(("plain", "plain-secret"), "fence: true");
    let found = stage.findings().await;
    let said = lines(&found);
    for expected in [
        "error control privilege plain: it may not set session_replication_role",
        "error control privilege plain: it may not make schema crossfade",
        "error control privilege plain: it may not read pg_authid",
        "warning control privilege plain: it may not see what other backends do",
        "warning event trigger plain: it may not make event triggers",
        "error control privilege plain: a migrating table has row security",
        "error control privilege public.t: the control role plain lacks SELECT, INSERT, UPDATE, DELETE, TRUNCATE",
        "error control privilege public.t: the control role plain lacks TRIGGER",
        "error control privilege public: the control role plain lacks USAGE",
        "error control privilege public.mood: the control role plain lacks USAGE",
        "error control privilege public.drawn: the control role plain lacks SELECT, UPDATE",
    ] {
        assert!(said.iter().any(|line| line.starts_with(expected)), "{expected}\nnot in {said:#?}");
    }
    for finding in found.iter().filter(|finding| finding["kind"] == "control privilege") {
        let mend = finding["mend"].as_str().expect("a text");
        let mend = mend.split("; or").next().expect("the SQL");
        if finding["side"] == "old" { stage.on_old(mend).await } else { stage.on_new(mend).await }
    }
    let said = lines(&stage.findings().await);
    assert!(!said.iter().any(|line| line.contains("control")), "{said:#?}");
    // It does: the proxy itself agrees.
    let url = |cluster: &crossfade::cluster::Cluster| cluster.url_as("plain", "plain-secret", DATABASE);
    let (old, new) = (url(&stage.databases.old), url(&stage.databases.new));
    let config = stage.databases.proxy_config("old", "fence: true");
    let mut proxy = Proxy::start(common::ProxyConfig { old, new, ..config }).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let fenced = async || !lines(&stage.findings().await).iter().any(|line| line.contains(" fence "));
    common::until("the fence stands, though the tables are another role's", fenced).await;
    let direct = "UPDATE t SET c = 1";
    assert!(stage.databases.new.run(DATABASE, direct).await.is_err(), "a superuser's write is refused");
    drop(proxy);
    stage.write_config(("plain", "plain-secret"), "fence: false");
    let lowered = stage.run(&["install"]).await;
    assert!(lowered.status.success(), "{lowered:?}");
    stage.on_new(direct).await;
    // Before 15 nobody but a superuser can be a control role, and he needs no schema of his own.
    if stage.databases.old.version() < 15 {
        return;
    }
    // Installed by another role: said, and nothing is tried.
    stage.on_old("ALTER SCHEMA crossfade OWNER TO crossfade").await;
    let said = lines(&stage.findings().await);
    assert!(said.iter().any(|line| line.starts_with("error control role plain: schema crossfade")), "{said:#?}");
}

/// `uninstall` refuses while it is needed and says what would be lost; afterwards nothing of it is there.
#[tokio::test(flavor = "multi_thread")]
async fn uninstall_leaves_nothing_and_not_too_early() {
    let stage = Stage::new(SCHEMA).await;
    let mut proxy = Proxy::start(stage.databases.proxy_config("old", "")).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let there = "SELECT count(*) FROM pg_namespace WHERE nspname = 'crossfade'";
    let said = stage.run(&["uninstall"]).await;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.status.code() == Some(1)
            && text.contains("writes are mirrored to new")
            && text.contains("in use by")
            && text.contains("entries of history"),
        "{text}"
    );
    proxy.set_phase("old").await;
    proxy.terminate().await;
    assert_eq!(stage.databases.new.run(DATABASE, there).await.expect("reads").trim(), "1");
    let said = stage.run(&["uninstall"]).await;
    assert!(said.status.success(), "{said:?}");
    for side in [&stage.databases.old, &stage.databases.new] {
        let left = "SELECT (SELECT count(*) FROM pg_namespace WHERE nspname = 'crossfade') + (SELECT count(*) FROM pg_event_trigger)";
        assert_eq!(side.run(DATABASE, left).await.expect("reads").trim(), "0");
    }
    assert_eq!(lines(&stage.findings().await), Vec::<String>::new());
}
