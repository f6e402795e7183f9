//! Where the stories play: two servers, the proxy in a mirrored phase, and a witness of every debt that is owed.

use std::time::{Duration, Instant};

use bytes::Buf;
use crossfade::cluster::Cluster;
use tokio_postgres::{Client, NoTls};

use crate::common::pair::{APP, DATABASE};
use crate::common::raw::{self, Frame, RawClient};
use crate::common::{Databases, Pair, Proxy};

/// How long the mirror's COMMIT may take to show. Nobody waits for it, but it follows at once.
const FOLLOWS: Duration = Duration::from_secs(20);

/// Notes each debt that enters the ledger as owed (with a reason): those of a captured transaction enter without one.
/// Whatever repair could heal has left its trace here, so that a healed difference is not taken for a captured write.
const WITNESS: &str = "CREATE TABLE crossfade.witness (reason text);
    CREATE FUNCTION crossfade.testify() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
        'BEGIN INSERT INTO crossfade.witness VALUES (NEW.reason); RETURN NULL; END';
    CREATE TRIGGER testify AFTER INSERT ON crossfade.ledger FOR EACH ROW WHEN (NEW.reason IS NOT NULL)
        EXECUTE FUNCTION crossfade.testify();";

/// Both databases and the proxy, in a mirrored phase with nothing owed.
pub struct Stage {
    pub pair: Pair,
    /// The phase.
    phase: &'static str,
}

impl Stage {
    /// In phase `old`, with `schema` on both sides. The roles need no password: so [`RawClient`] can log in.
    pub async fn build(schema: &str) -> Stage {
        Stage::build_with(schema, "mirror: { timeout: 20s }").await
    }

    /// With these settings at the file's top level.
    async fn build_with(schema: &str, settings: &str) -> Stage {
        let databases = Databases::start_trusting().await;
        databases.run_on_both(schema).await;
        let more = format!("auth: trust\n{settings}");
        let proxy = Proxy::start(databases.proxy_config("old", &more)).await;
        let installed = proxy.crossfade(&["install"]).await;
        assert!(installed.status.success(), "{installed:?}");
        for side in [&databases.old, &databases.new] {
            side.run(DATABASE, WITNESS).await.expect("posts the witness");
        }
        Stage { pair: Pair { proxy, databases }, phase: "old" }
    }

    /// In `dual-write`, with `schema` on both sides.
    pub async fn open(schema: &str) -> Stage {
        let mut stage = Stage::build(schema).await;
        stage.enter("dual-write").await;
        stage
    }

    /// In `dual-write`, with these settings.
    pub async fn open_with(schema: &str, settings: &str) -> Stage {
        let mut stage = Stage::build_with(schema, settings).await;
        stage.enter("dual-write").await;
        stage
    }

    /// Moves to another phase, and waits until nothing is owed.
    pub async fn enter(&mut self, phase: &'static str) {
        self.pair.proxy.set_phase(phase).await;
        self.pair.proxy.settle().await;
        self.phase = phase;
    }

    /// Authority and mirror.
    pub fn sides(&self) -> (&Cluster, &Cluster) {
        let Databases { old, new } = &self.pair.databases;
        if self.phase == "new-primary" { (new, old) } else { (old, new) }
    }

    /// A client of the proxy.
    pub async fn client(&self) -> Client {
        self.pair.client().await
    }

    /// A client with these settings (`options` of libpq).
    pub async fn client_with(&self, options: &str) -> Client {
        let mut config: tokio_postgres::Config = self.pair.url().parse().expect("a URL");
        config.options(options);
        let (client, connection) = config.connect(NoTls).await.expect("connects");
        tokio::spawn(async move { drop(connection.await) });
        client
    }

    /// A client that speaks the protocol by itself.
    pub async fn raw(&self) -> RawClient {
        let startup = raw::startup(raw::V3_0, &[("user", APP.0), ("database", DATABASE)]);
        RawClient::connect(self.pair.proxy.port(), None, &startup).await.0
    }

    /// A story begins.
    pub async fn story(&self, title: &'static str) -> Story<'_> {
        eprintln!("story: {title}");
        Story { stage: self, title, before: self.counts().await }
    }

    /// How many debts were ever owed.
    pub async fn owed(&self) -> usize {
        self.counts().await.reasons.len()
    }

    async fn counts(&self) -> Counts {
        let (authority, _) = self.sides();
        let reasons = authority.run(DATABASE, "SELECT reason FROM crossfade.witness").await.expect("asks");
        Counts {
            reasons: reasons.lines().map(str::to_owned).collect(),
            opaque: self.pair.proxy.metrics("crossfade_opaque_writes_total").await,
            failures: self.pair.proxy.metrics("crossfade_mirror_failures_total").await,
        }
    }
}

#[derive(Debug, PartialEq)]
struct Counts {
    /// Of the debts that were owed.
    reasons: Vec<String>,
    opaque: f64,
    failures: f64,
}

/// A story under way.
pub struct Story<'a> {
    stage: &'a Stage,
    title: &'static str,
    before: Counts,
}

impl Story<'_> {
    /// Every write was captured: nothing is or was owed, and both sides hold these rows (as `row::text`, in the order of their text).
    pub async fn exact(self, tables: &[(&str, &[&str])]) {
        let (authority, mirror) = self.stage.sides();
        for (table, rows) in tables {
            assert_eq!(&held(authority, table).await, rows, "{}: {table} on the authority", self.title);
            follows(mirror, table, rows, self.title).await;
        }
        self.nothing_owed().await;
    }

    /// The same, where some statements have failed on the authority: those are counted as what they were planned to be.
    pub async fn exact_after_failures(mut self, tables: &[(&str, &[&str])]) {
        self.before.opaque = self.stage.counts().await.opaque;
        self.exact(tables).await;
    }

    /// The same, where the rows are not known beforehand: there are `count` of them.
    pub async fn exact_rows(self, table: &str, count: usize) {
        let (authority, mirror) = self.stage.sides();
        let rows = held(authority, table).await;
        assert_eq!(rows.len(), count, "{}: {table} on the authority: {rows:?}", self.title);
        follows(mirror, table, &rows, self.title).await;
        self.nothing_owed().await;
    }

    async fn nothing_owed(self) {
        assert_eq!(self.stage.counts().await, self.before, "{}: something was owed or out of sight", self.title);
    }

    /// Something was out of sight, for this reason: counted, noted in the ledger; and repair makes both sides equal.
    pub async fn heals(self, reason: &str, tables: &[(&str, &[&str])]) {
        let stage = self.stage;
        let title = self.title;
        self.taints(reason, tables).await;
        stage.pair.proxy.settle().await;
        for (table, rows) in tables {
            assert_eq!(&held(stage.sides().1, table).await, rows, "{title}: {table} on the mirror");
        }
    }

    /// All of it is owed, for this reason; repair makes both sides equal.
    pub async fn pays(self, reason: &str, tables: &[(&str, &[&str])]) {
        let after = self.stage.counts().await;
        let new = &after.reasons[self.before.reasons.len()..];
        assert_eq!(new, [reason], "{}: owed", self.title);
        self.stage.pair.proxy.settle().await;
        for (table, rows) in tables {
            assert_eq!(&held(self.stage.sides().1, table).await, rows, "{}: {table} on the mirror", self.title);
        }
    }

    /// The audit has found one table written out of sight, the first of these; repair makes both sides equal.
    pub async fn taints_only(self, reason: &str, tables: &[(&str, &[&str])]) {
        let log = self.stage.pair.proxy.log();
        let last = log.lines().rfind(|line| line.contains("a write out of sight")).unwrap_or_default();
        assert!(last.contains(&format!("public.{} ", tables[0].0)), "{}: {last}", self.title);
        self.pays(reason, tables).await;
    }

    /// Something was out of sight, for this reason: counted, and noted in the ledger. The authority holds these rows.
    pub async fn taints(self, reason: &str, tables: &[(&str, &[&str])]) {
        let after = self.stage.counts().await;
        let new = &after.reasons[self.before.reasons.len()..];
        assert!(new.iter().any(|found| found == reason), "{}: owed {new:?}, not {reason}", self.title);
        assert!(after.opaque > self.before.opaque, "{}: not counted in opaque_writes_total", self.title);
        for (table, rows) in tables {
            assert_eq!(&held(self.stage.sides().0, table).await, rows, "{}: {table} on the authority", self.title);
        }
    }
}

/// A table's rows, or those of a query in parentheses.
pub async fn held(side: &Cluster, table: &str) -> Vec<String> {
    let sql = format!(
        "SET timezone = 'UTC'; SET extra_float_digits = 3; \
         SELECT replace(r::text, E'\\n', '\\n') FROM {table} AS r ORDER BY r::text COLLATE \"C\""
    );
    let text = side.run(DATABASE, &sql).await.expect("reads");
    text.lines().filter(|line| *line != "SET").map(str::to_owned).collect()
}

async fn follows<T: AsRef<str>>(mirror: &Cluster, table: &str, rows: &[T], title: &str) {
    let deadline = Instant::now() + FOLLOWS;
    loop {
        let found = held(mirror, table).await;
        if found.iter().map(String::as_str).eq(rows.iter().map(AsRef::as_ref)) {
            return;
        }
        let rows: Vec<&str> = rows.iter().map(AsRef::as_ref).collect();
        assert!(
            Instant::now() < deadline,
            "{title}: {table} on the mirror\n  is        {found:?}\n  should be {rows:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What a server said, in short: `T(id,name) D(1,a) C(INSERT 0 1) Z(I)`. A column in binary is marked with `:b`; NULL is `~`.
pub fn said(frames: &[Frame]) -> String {
    let mut words: Vec<String> = Vec::new();
    for frame in frames {
        let mut body = &frame.body[..];
        let inside = match frame.tag {
            b'T' => Some(columns(&mut body)),
            b'D' => Some(values(&mut body)),
            b'C' | b'Z' => Some(text(body)),
            // ParameterStatus comes when it comes.
            b'S' => continue,
            b'E' | b'N' => Some(field(body, b'C')),
            _ => None,
        };
        let tag = char::from(frame.tag);
        words.push(inside.map_or_else(|| tag.to_string(), |inside| format!("{tag}({inside})")));
    }
    words.join(" ")
}

fn columns(body: &mut &[u8]) -> String {
    let columns = (0..body.get_i16()).map(|_| {
        let end = body.iter().position(|&b| b == 0).expect("ends");
        let name = text(&body[..end]);
        body.advance(end + 1 + 16);
        if body.get_i16() == 1 { format!("{name}:b") } else { name }
    });
    columns.collect::<Vec<_>>().join(",")
}

fn values(body: &mut &[u8]) -> String {
    let values = (0..body.get_i16()).map(|_| {
        let Ok(length) = usize::try_from(body.get_i32()) else { return "~".to_owned() };
        let value = body[..length].escape_ascii().to_string();
        body.advance(length);
        value
    });
    values.collect::<Vec<_>>().join(",")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(b"\0").unwrap_or(bytes)).into_owned()
}

/// A field of an ErrorResponse or NoticeResponse.
fn field(body: &[u8], code: u8) -> String {
    body.split(|&b| b == 0).find(|part| part.first() == Some(&code)).map(|part| text(&part[1..])).unwrap_or_default()
}

/// One Query, and what came back.
pub async fn ask(client: &mut RawClient, sql: &str) -> String {
    client.doing = sql.to_owned();
    client.send(&raw::query(sql)).await;
    said(&client.until_ready(1).await)
}

/// Messages that end in one Sync, and what came back.
pub async fn pipeline(client: &mut RawClient, messages: &[Vec<u8>]) -> String {
    client.send(&[messages.concat(), raw::sync()].concat()).await;
    said(&client.until_ready(1).await)
}

/// The SQLSTATE of a failure that a server reported.
pub fn state(error: &tokio_postgres::Error) -> String {
    error.code().map(|code| code.code().to_owned()).unwrap_or_else(|| format!("no report: {error}"))
}
