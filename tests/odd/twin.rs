//! Law 1: one client says the same, at random, to crossfade in `dual-write` and to a server that stands alone: each reply is the same, and so are all rows.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Buf;
use crossfade::cluster::Cluster;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::common::compare;
use crate::common::pair::{APP, DATABASE, TRUST};
use crate::common::raw::{self, Frame, RawClient};
use crate::common::{Databases, Pair, Proxy, proof};
use crate::statements::{Kinds, SCHEMA, any, drawn};
use crate::{assert_equal_at_rest, pay};

/// What sessions say besides. (Not READ ONLY behind a write: then COMMIT fails, since the transaction cannot take its debts.)
const OTHERS: &[&str] = &[
    "BEGIN",
    "BEGIN",
    "BEGIN ISOLATION LEVEL REPEATABLE READ",
    "BEGIN ISOLATION LEVEL SERIALIZABLE",
    "BEGIN DEFERRABLE",
    "START TRANSACTION",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "COMMIT",
    "COMMIT",
    "END",
    "ROLLBACK",
    "ABORT",
    "COMMIT AND CHAIN",
    "ROLLBACK AND CHAIN",
    "SAVEPOINT s",
    "SAVEPOINT s",
    "ROLLBACK TO s",
    "RELEASE s",
    "SELECT * FROM ci ORDER BY name, v",
    "SELECT count(*), sum(v) FROM plain",
    "SELECT * FROM gen ORDER BY id",
    "SELECT p.id, p.v, c.id FROM parent p LEFT JOIN child c ON c.p = p.id ORDER BY p.id, c.id",
    "SELECT id FROM uq WHERE a = {i}",
    "SELECT v FROM num ORDER BY n LIMIT 2",
    "SELECT id, v FROM plain WHERE id = {i} FOR UPDATE",
    "SELECT lastval()",
    "SELECT currval('log_id_seq')",
    "SELECT pg_current_xact_id_if_assigned() IS NULL",
    "SHOW transaction_isolation",
    "SHOW transaction_read_only",
    "SELECT current_setting('synchronous_commit'), current_setting('search_path'), current_user",
    "DECLARE c CURSOR FOR SELECT * FROM plain ORDER BY id",
    "DECLARE c CURSOR FOR SELECT * FROM plain ORDER BY id FOR UPDATE",
    "FETCH 2 FROM c",
    "MOVE 1 IN c",
    "UPDATE plain SET v = {v} WHERE CURRENT OF c",
    "DELETE FROM plain WHERE CURRENT OF c RETURNING id",
    "CLOSE c",
    "PREPARE q AS UPDATE plain SET v = v + 1 WHERE id < {i} RETURNING *",
    "PREPARE q (int) AS INSERT INTO plain VALUES ($1, {v}) ON CONFLICT (id) DO NOTHING",
    "EXECUTE q",
    "EXECUTE q ({i})",
    "DEALLOCATE q",
    "DEALLOCATE ALL",
    "DISCARD ALL",
    "TRUNCATE later",
    "TRUNCATE ruled, hist",
    "SET LOCAL synchronous_commit = off",
    "SET search_path = pg_temp, public",
    "RESET ALL",
    "SET datestyle = 'SQL, DMY'",
    "CREATE TEMPORARY TABLE plain (id int PRIMARY KEY, v int)",
    "CREATE TEMPORARY TABLE IF NOT EXISTS scratch (id int)",
    "DROP TABLE IF EXISTS pg_temp.plain",
    "INSERT INTO scratch VALUES ({i})",
    "SET SESSION AUTHORIZATION DEFAULT",
    "VALUES (1), (2)",
    "SELECT 1 / ({i} - {j})",
    "SELEC nonsense",
    "SELECT 'unterminated",
    "",
    "LOCK TABLE plain IN SHARE MODE",
    "INSERT INTO plain DEFAULT VALUES",
    "INSERT INTO nowhere VALUES (1)",
    "UPDATE plain SET v = 'x'",
    "UPDATE plain SET v = v RETURNING id, v, v * 2 AS twice, plain.*, plain",
    "DELETE FROM child RETURNING *",
    "INSERT INTO hist VALUES (1, 'x') RETURNING id, v, tableoid::regclass::text",
    "LISTEN a; NOTIFY a, 'x'",
    "UNLISTEN *",
];

/// What succeeds or fails by the order in which a server meets the rows, which is nobody's promise.
const BY_ORDER: &[&str] = &["id = id + 1", "30 - a", "n = n + 1", "LIMIT 2", "upper(name)"];

/// Reads whose answers have one order.
const READS: &[&str] = &[
    "SELECT * FROM ci ORDER BY name",
    "SELECT count(*), sum(v) FROM plain",
    "SELECT * FROM gen ORDER BY id",
    "SELECT * FROM num ORDER BY n",
    "SELECT * FROM part WHERE id < {i} ORDER BY id, r",
    "SELECT * FROM uq WHERE a = {i}",
    "SELECT id, r, upper(r) FROM ex ORDER BY id",
    "SELECT p.id, p.v, c.id FROM parent p LEFT JOIN child c ON c.p = p.id ORDER BY p.id, c.id",
    "SELECT 1 / (v - {v}) FROM plain WHERE id = {i}",
    "SELECT v, count(*) FROM hist GROUP BY v ORDER BY v COLLATE \"C\"",
];

/// Messages of one exchange, with how many ReadyForQuery it brings.
struct Exchange {
    bytes: Vec<u8>,
    ready: usize,
    said: Vec<String>,
}

struct Talk {
    random: StdRng,
    /// Parameters of the statements that were last sent by these names.
    parameters: [usize; 3],
    /// The transaction has failed. PostgreSQL describes no statement then that gives rows, and a write that is captured gives some.
    failed: bool,
    /// A block is open.
    open: bool,
}

const NAMES: [&str; 3] = ["", "s1", "s2"];
const PORTALS: [&str; 2] = ["", "p1"];

impl Talk {
    fn statement(&mut self) -> String {
        let random = &mut self.random;
        match random.random_bool(0.5) {
            true => drawn(OTHERS.choose(random).expect("some"), random),
            // The time in its answer differs.
            false => loop {
                let text = any(random, Kinds::All);
                if !text.starts_with("EXPLAIN") && !BY_ORDER.iter().any(|by_order| text.contains(by_order)) {
                    return text;
                }
            },
        }
    }

    fn exchange(&mut self) -> Exchange {
        let mut exchange = Exchange { bytes: Vec::new(), ready: 0, said: Vec::new() };
        if self.failed && self.random.random_bool(0.6) {
            let end = ["ROLLBACK", "ROLLBACK TO s", "COMMIT"][self.random.random_range(0..3)];
            return Exchange { bytes: raw::query(end), ready: 1, said: vec![format!("Query {end}")] };
        }
        for _ in 0..self.random.random_range(1..=2) {
            match self.random.random_range(0..10) {
                0 => self.copy(&mut exchange),
                1..=4 => self.query(&mut exchange),
                _ => self.extended(&mut exchange),
            }
        }
        exchange
    }

    fn query(&mut self, to: &mut Exchange) {
        let count = [1, 1, 1, 2, 3][self.random.random_range(0..5)];
        let mut statements = Vec::new();
        while statements.len() < count {
            let statement = self.statement();
            // Of several statements PostgreSQL reads the last before it runs the first; crossfade has them run one by one, and answers the first.
            if count == 1 || !["SELEC nonsense", "SELECT 'unterminated"].contains(&&statement[..]) {
                statements.push(statement);
            }
        }
        let text = statements.join("; ");
        to.bytes.extend(raw::query(&text));
        to.said.push(format!("Query {text}"));
        to.ready += 1;
    }

    /// One read.
    fn read(&mut self) -> Exchange {
        let text = drawn(READS.choose(&mut self.random).expect("some"), &mut self.random);
        // (A Query that new has answered leaves the authority its unnamed statement.)
        let bytes = [
            raw::parse("", &text, &[]),
            raw::bind("", "", &[], &[], &[1]),
            raw::describe(b'P', ""),
            raw::execute("", 0),
            raw::sync(),
        ]
        .concat();
        Exchange { bytes, ready: 1, said: vec![format!("Read {text}")] }
    }

    fn copy(&mut self, to: &mut Exchange) {
        let sql = ["COPY plain FROM STDIN", "COPY hist FROM STDIN", "COPY gen (id, v) FROM STDIN (FORMAT csv)"]
            [self.random.random_range(0..3)];
        let by_parts = self.random.random_bool(0.5);
        match by_parts {
            true => to.bytes.extend(
                [
                    raw::close(b'S', "cp"),
                    raw::parse("cp", sql, &[]),
                    raw::bind("", "cp", &[], &[], &[]),
                    raw::execute("", 0),
                ]
                .concat(),
            ),
            false => to.bytes.extend(raw::query(sql)),
        }
        let between = if sql.contains("csv") { ',' } else { '\t' };
        let row = format!("{}{between}{}\n", self.random.random_range(10..200), self.random.random_range(0..9));
        to.bytes.extend(raw::copy_data(row.as_bytes()));
        to.bytes.extend(if self.random.random_bool(0.8) { raw::copy_done() } else { raw::copy_fail("no") });
        if by_parts {
            to.bytes.extend(raw::sync());
        }
        to.said.push(format!("COPY ({}) {sql} {row:?}", if by_parts { "extended" } else { "simple" }));
        to.ready += 1;
    }

    /// Messages of the extended protocol up to a Sync: mostly in an order that makes sense.
    fn extended(&mut self, to: &mut Exchange) {
        // Behind a Query that has failed, PostgreSQL still has its unnamed portal, and looks for it where nothing is any more: 15.x crashes by it.
        let mut there = !self.failed;
        for _ in 0..self.random.random_range(1..=3) {
            let name = self.random.random_range(0..NAMES.len());
            let portal = PORTALS[self.random.random_range(0..PORTALS.len())];
            if self.random.random_bool(0.8) {
                let mut text = self.statement();
                // Outside any block these fail in a pipeline, before PostgreSQL 18; behind a write there is a block of ours.
                while text.starts_with("LOCK") || text.starts_with("DECLARE") {
                    text = self.statement();
                }
                // A number becomes a parameter.
                self.parameters[name] = 0;
                if let Some(at) = text.find("= ").filter(|_| self.random.random_bool(0.5))
                    && text[at + 2..].starts_with(|c: char| c.is_ascii_digit())
                    && !text.starts_with("PREPARE")
                {
                    let end = text[at + 2..].find(|c: char| !c.is_ascii_digit()).map_or(text.len(), |end| at + 2 + end);
                    text.replace_range(at + 2..end, "$1");
                    self.parameters[name] = 1;
                }
                if !NAMES[name].is_empty() && self.random.random_bool(0.7) {
                    to.bytes.extend(raw::close(b'S', NAMES[name]));
                    to.said.push(format!("Close S {:?}", NAMES[name]));
                }
                to.bytes.extend(raw::parse(NAMES[name], &text, &[]));
                to.said.push(format!("Parse {:?} {text}", NAMES[name]));
            }
            if self.random.random_bool(0.3) && !self.failed {
                to.bytes.extend(raw::describe(b'S', NAMES[name]));
                to.said.push(format!("Describe S {:?}", NAMES[name]));
            }
            if self.random.random_bool(0.9) {
                let value = self.random.random_range(1..13).to_string();
                let values = vec![Some(value.as_bytes()); self.parameters[name]];
                let formats: &[i16] = [&[][..], &[0], &[1]][self.random.random_range(0..3)];
                if !portal.is_empty() && self.random.random_bool(0.7) {
                    to.bytes.extend(raw::close(b'P', portal));
                    to.said.push(format!("Close P {portal:?}"));
                }
                to.bytes.extend(raw::bind(portal, NAMES[name], &[], &values, formats));
                to.said.push(format!("Bind {portal:?} {:?} {value} {formats:?}", NAMES[name]));
                there = true;
            }
            if self.random.random_bool(0.5) && there {
                to.bytes.extend(raw::describe(b'P', portal));
                to.said.push(format!("Describe P {portal:?}"));
            }
            for _ in 0..if there { [0, 1, 1, 1, 2][self.random.random_range(0..5)] } else { 0 } {
                let rows = [0, 0, 1, 2][self.random.random_range(0..4)];
                to.bytes.extend(raw::execute(portal, rows));
                to.said.push(format!("Execute {portal:?} {rows}"));
            }
            if self.random.random_bool(0.2) {
                let (kind, name) = if self.random.random_bool(0.5) { (b'S', NAMES[name]) } else { (b'P', portal) };
                to.bytes.extend(raw::close(kind, name));
                to.said.push(format!("Close {} {name:?}", char::from(kind)));
            }
            if self.random.random_bool(0.1) {
                to.bytes.extend(raw::flush());
            }
        }
        to.bytes.extend(raw::sync());
        to.said.push("Sync".to_owned());
        to.ready += 1;
    }
}

/// What two servers that do not know each other say alike: without the numbers of tables and of the database's own types.
fn comparable(mut frame: Frame) -> Frame {
    let mask = |body: &mut [u8], at: usize, always: bool| {
        let oid = (&body[at..]).get_u32();
        if always || oid >= 16_384 {
            body[at..at + 4].fill(0);
        }
    };
    match frame.tag {
        b'T' => {
            let mut at = 2;
            while at < frame.body.len() {
                at += frame.body[at..].iter().position(|&byte| byte == 0).expect("a name ends") + 1;
                mask(&mut frame.body, at, true);
                mask(&mut frame.body, at + 6, false);
                at += 18;
            }
        }
        b't' => (2..frame.body.len()).step_by(4).for_each(|at| mask(&mut frame.body, at, false)),
        // Not where in PostgreSQL's sources it was found: some are crossfade's own. Nor where in the text: of several statements each is a text of its own.
        b'E' | b'N' => {
            let fields = frame.body.split(|&byte| byte == 0).filter(|field| {
                !matches!(field.first(), Some(b'F' | b'L' | b'R' | b'P')) && !field.starts_with(b"spg_temp")
            });
            frame.body = fields.collect::<Vec<_>>().join(&0);
        }
        // The notifying backend's number.
        b'A' => frame.body[..4].fill(0),
        _ => {}
    }
    frame
}

/// Rows that come together, in one order: of those that a write returns nobody promises any.
fn in_one_order(frames: &mut [Frame]) {
    for run in frames.chunk_by_mut(|a, b| a.tag == b'D' && b.tag == b'D') {
        run.sort_by(|a, b| a.body.cmp(&b.body));
    }
}

/// The warning that no block is open: in an implicit transaction that crossfade has made explicit it does not come.
fn says_no_block(frame: &Frame) -> bool {
    frame.tag == b'N' && frame.body.windows(7).any(|field| field == b"C25P01\0")
}

/// The same client of both: of a server that stands alone, and of crossfade.
pub struct Both {
    alone: RawClient,
    ours: RawClient,
    /// What ParameterStatus has said last.
    settings: [HashMap<Vec<u8>, Vec<u8>>; 2],
}

impl Both {
    pub async fn connect(alone: &Cluster, ours: &Pair) -> Both {
        let (alone, ours) = (client(alone.port()).await, client(ours.proxy.port()).await);
        Both { alone, ours, settings: [HashMap::new(), HashMap::new()] }
    }

    /// Sends the same to both. `said` is shown where something fails; `orderless`: rows that come together have no order. Gives the one answer.
    pub async fn say(&mut self, bytes: &[u8], ready: usize, said: &str, orderless: bool) -> Vec<Frame> {
        let mut replies = Vec::new();
        for (client, settings) in [&mut self.alone, &mut self.ours].into_iter().zip(&mut self.settings) {
            said.clone_into(&mut client.doing);
            client.send(bytes).await;
            let frames = client.until_ready(ready).await;
            let frames = frames.into_iter().filter(|frame| !says_no_block(frame)).map(comparable);
            // ParameterStatus may come at any time, and of one setting more than once: what it says in the end is compared.
            let (told, rest): (Vec<_>, Vec<_>) = frames.partition(|frame| frame.tag == b'S');
            for setting in told {
                let name = setting.body.split(|&byte| byte == 0).next().expect("a name").to_vec();
                settings.insert(name, setting.body);
            }
            // A notification, too, may come at any time: here, in front.
            let (mut heard, rest): (Vec<_>, Vec<_>) = rest.into_iter().partition(|frame| frame.tag == b'A');
            heard.extend(rest);
            if orderless {
                in_one_order(&mut heard);
            }
            replies.push(heard);
        }
        for (name, value) in &self.settings[0] {
            assert!(self.settings[1].get(name).is_none_or(|ours| ours == value), "{said}: {:?}", name.escape_ascii());
        }
        let (alone, ours) = (&replies[0], &replies[1]);
        let same = alone.iter().zip(ours).take_while(|(a, b)| a == b).count();
        let rest = |frames: &[Frame]| format!("{:#?}", &frames[same..]);
        assert!(
            alone == ours,
            "{said}\n after {:?} alone: {}\n ours: {}",
            raw::tags(&alone[..same]),
            rest(alone),
            rest(ours)
        );
        replies.swap_remove(0)
    }
}

/// A server that stands alone with the same tables.
pub async fn twin(schema: &str) -> Cluster {
    let trust = "local all all trust\nhost all all 127.0.0.1/32 trust\n";
    let twin = Cluster::builder().lineage("old").hba(trust).start().await.expect("starts");
    let (role, password) = APP;
    let roles = format!("CREATE ROLE {role} LOGIN PASSWORD '{password}'; CREATE DATABASE {DATABASE} OWNER {role}");
    twin.run("postgres", &roles).await.expect("makes the role");
    twin.run(DATABASE, &format!("SET ROLE {role};\n{schema}")).await.expect("makes the tables");
    twin
}

async fn client(port: u16) -> RawClient {
    let startup = raw::startup(raw::V3_0, &[("user", APP.0), ("database", DATABASE)]);
    RawClient::connect(port, None, &startup).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_random_conversation_is_answered_as_by_a_server_that_stands_alone() {
    let (conversations, exchanges) = if proof() { (400, 100) } else { (3, 60) };
    converse("dual-write", 0..conversations, exchanges).await;
}

/// R1 to R3: the same where new serves what it may.
#[tokio::test(flavor = "multi_thread")]
async fn a_random_conversation_is_answered_the_same_where_new_serves() {
    let (conversations, exchanges) = if proof() { (200, 100) } else { (2, 60) };
    let served = converse("dual-read", 1000..1000 + conversations, exchanges).await;
    assert!(served > 0.0, "new has served nothing: the test has forced nothing");
}

/// Conversations of these numbers in this phase. Gives how many reads new has served.
async fn converse(phase: &str, conversations: std::ops::Range<u64>, exchanges: usize) -> f64 {
    let (twin, databases) = tokio::join!(twin(SCHEMA), Databases::start_trusting());
    databases.run_on_both(SCHEMA).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", &format!("{TRUST}\nreads: {{ serve: 100% }}"))).await;
    proxy.set_phase("dual-write").await;
    proxy.set_phase(phase).await;
    let reading = phase == "dual-read";
    let pair = Pair { proxy, databases };
    pair.proxy.settle().await;
    for seed in conversations {
        let mut talk = Talk { random: StdRng::seed_from_u64(seed), parameters: [0; 3], failed: false, open: false };
        let mut both = Both::connect(&twin, &pair).await;
        for number in 0..exchanges {
            // A session that only reads for a while is served.
            if reading && number % 20 == 5 && !talk.open {
                pay(&pair).await;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            let exchange = if reading && number % 20 > 5 && !talk.open { talk.read() } else { talk.exchange() };
            let said = format!("conversation {seed}, exchange {number}:\n  {}", exchange.said.join("\n  "));
            // Shown where something fails.
            println!("{said}");
            let orderless = ["RETURNING", "EXECUTE", "Bind"];
            let orderless = exchange.said.iter().any(|said| orderless.iter().any(|word| said.contains(word)));
            let alone = both.say(&exchange.bytes, exchange.ready, &said, orderless).await;
            println!("  -> {}", raw::tags(&alone));
            talk.open = alone.last().is_some_and(|frame| frame.tag == b'Z' && frame.body != b"I");
            talk.failed = alone.last().is_some_and(|frame| frame.tag == b'Z' && frame.body == b"E");
        }
        drop(both);
        assert_equal_at_rest(&pair).await;
        compare::assert_equal(&twin, &pair.databases.old, DATABASE, &[]).await;
    }
    pair.proxy.metrics("crossfade_read_served_total{side=\"new\"}").await
}

/// A pipeline that comes while the one before it is not answered yet: what that answer ends is the transaction before, not the one that has begun behind it.
#[tokio::test(flavor = "multi_thread")]
async fn what_begins_behind_a_sync_that_is_not_answered_is_seen() {
    let databases = Databases::start_trusting().await;
    databases.run_on_both(SCHEMA).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", TRUST)).await;
    proxy.set_phase("dual-write").await;
    let pair = Pair { proxy, databases };
    pair.proxy.settle().await;
    let mut client = client(pair.proxy.port()).await;
    let run = |text: &str| [raw::parse("", text, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat();
    for (number, first) in ["SELECT 1", "SELECT 1 / 0", "COMMIT"].iter().enumerate() {
        let id = 10 * number;
        let copied = [
            run("COPY plain FROM STDIN"),
            raw::copy_data(format!("{id}\t1\n").as_bytes()),
            raw::copy_done(),
            raw::sync(),
        ];
        let opaque = format!("WITH x AS (INSERT INTO plain VALUES ({id} + 1, 1) RETURNING id) SELECT * FROM x");
        let mut bytes = Vec::new();
        for second in [copied.concat(), [run(&opaque), raw::sync()].concat()] {
            bytes.extend([run(first), raw::sync(), second].concat());
        }
        client.doing = format!("behind {first}");
        client.send(&bytes).await;
        let answered = raw::tags(&client.until_ready(4).await);
        assert_eq!(answered.matches('Z').count(), 4, "{first}: {answered}");
        assert_equal_at_rest(&pair).await;
        let count = format!("SELECT count(*) FROM plain WHERE id IN ({id}, {id} + 1)");
        let rows = pair.databases.new.run(DATABASE, &count).await.expect("reads");
        assert_eq!(rows.trim(), "2", "{first}: {answered}");
    }
}
