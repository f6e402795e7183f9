//! The conversation: every type of message, in the ways in which clients use it.

use crate::common::pair::{APP, DATABASE};
use crate::common::raw::{self, Frame, RawClient};
use crate::common::until;

const INT4: u32 = 23;
const TEXT: u32 = 25;
const BYTEA: u32 = 17;

/// What was said at each step, with the server's replies.
pub struct Transcript {
    /// In the order in which they were said.
    pub steps: Vec<(String, Vec<Frame>)>,
}

/// One session of the conversation, which writes down what it hears.
struct Speaker<'a> {
    client: RawClient,
    transcript: &'a mut Transcript,
}

impl<'a> Speaker<'a> {
    async fn log_in(port: u16, piece: Option<usize>, transcript: &'a mut Transcript) -> Speaker<'a> {
        let packet = raw::startup(raw::V3_0, &[("user", APP.0), ("database", DATABASE), ("application_name", "relay")]);
        let (client, frames) = RawClient::connect(port, piece, &packet).await;
        let mut speaker = Speaker { client, transcript };
        speaker.heard("log in", frames);
        speaker
    }

    fn heard(&mut self, step: &str, mut frames: Vec<Frame>) {
        for frame in &mut frames {
            match frame.tag {
                // The process and its secret are new each time; the length is not.
                b'K' => frame.body.fill(0),
                // The process that sent a notification.
                b'A' if frame.body[..4] == self.client.pid.to_be_bytes() => frame.body[..4].copy_from_slice(b"self"),
                b'A' => frame.body[..4].copy_from_slice(b"else"),
                _ => {}
            }
        }
        self.transcript.steps.push((step.to_owned(), frames));
    }

    /// Sends messages in one write and hears the replies up to a number of ReadyForQuery.
    async fn say_until_ready(&mut self, step: &str, messages: &[Vec<u8>], times: usize) {
        self.client.doing = step.to_owned();
        self.client.send(&messages.concat()).await;
        let frames = self.client.until_ready(times).await;
        self.heard(step, frames);
    }

    async fn say(&mut self, step: &str, messages: &[Vec<u8>]) {
        self.say_until_ready(step, messages, 1).await;
    }

    async fn query(&mut self, sql: &str) {
        self.say(sql, &[raw::query(sql)]).await;
    }

    /// Sends messages that end in Flush and hears the replies up to one of a type.
    async fn say_until(&mut self, step: &str, messages: &[Vec<u8>], tag: u8) {
        self.client.doing = step.to_owned();
        self.client.send(&messages.concat()).await;
        let frames = self.client.until(tag, 1).await;
        self.heard(step, frames);
    }
}

/// Holds the whole conversation on a port. `piece`: bytes per write.
pub async fn converse(port: u16, piece: Option<usize>) -> Transcript {
    let mut transcript = Transcript { steps: Vec::new() };
    let mut speaker = Speaker::log_in(port, piece, &mut transcript).await;
    simple(&mut speaker).await;
    parameters(&mut speaker).await;
    extended(&mut speaker).await;
    pipelines(&mut speaker).await;
    copy_in(&mut speaker).await;
    copy_out(&mut speaker).await;
    function_calls(&mut speaker).await;
    large(&mut speaker).await;
    notifications(&mut speaker, port).await;
    cancel(&mut speaker, port).await;
    speaker.query("SELECT * FROM items ORDER BY id").await;
    speaker.say("terminate", &[raw::terminate()]).await;
    endings(port, piece, &mut transcript).await;
    transcript
}

async fn simple(speaker: &mut Speaker<'_>) {
    for sql in [
        "SELECT 1 AS one, 'text' AS two, NULL AS three, ARRAY[1,2]",
        "",
        " ; -- nothing\n;",
        "SELECT 1; SELECT 'two'; INSERT INTO items (name) VALUES ('a'), ('b') RETURNING id; UPDATE items SET price = 1",
        "SELEC 1",
        "SELECT 1; INSERT INTO items (name) VALUES ('lost'); SELECT 1/0; SELECT 2",
        "INSERT INTO items (name, price) VALUES ('cheap', -1)",
        "INSERT INTO items (id, name) VALUES (1, 'again')",
        "BEGIN; INSERT INTO items (name) VALUES ('in'); SAVEPOINT s; SELECT nosuch",
        "SELECT 1",
        "ROLLBACK TO s; INSERT INTO items (name) VALUES ('out')",
        "COMMIT AND CHAIN",
        "ROLLBACK",
        "COMMIT",
        "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE; SHOW transaction_isolation; COMMIT",
        "BEGIN; INSERT INTO child VALUES (1, 99)",
        "COMMIT",
        "DO $$ BEGIN RAISE NOTICE 'a notice'; RAISE WARNING 'a warning' USING HINT = 'a hint', DETAIL = 'more'; END $$",
        "DO $$ BEGIN RAISE EXCEPTION 'raised' USING ERRCODE = 'XX123', COLUMN = 'c', TABLE = 't', SCHEMA = 's'; END $$",
        "DROP TABLE IF EXISTS nosuch, items_nosuch",
        "PREPARE p (int) AS SELECT $1 + 1; EXECUTE p(41); DEALLOCATE p; EXECUTE p(1)",
        "BEGIN; DECLARE c CURSOR FOR SELECT generate_series(1, 5); FETCH 2 FROM c; MOVE 1 IN c; FETCH ALL FROM c; COMMIT",
        "EXPLAIN (COSTS OFF) SELECT * FROM items WHERE id = 1",
        "SELECT",
        "VALUES (1, 'x'), (2, NULL)",
        "CREATE TEMP TABLE scratch (a int); INSERT INTO scratch SELECT generate_series(1, 3); SELECT count(*) FROM scratch",
    ] {
        speaker.query(sql).await;
    }
}

/// ParameterStatus, and text that is not UTF-8.
async fn parameters(speaker: &mut Speaker<'_>) {
    for sql in [
        "SET TimeZone = 'Europe/Vienna'; SET DateStyle = 'SQL, DMY'; SET application_name = 'renamed'",
        "BEGIN; SET LOCAL IntervalStyle = 'iso_8601'; SELECT interval '1 day'; COMMIT",
        "SET standard_conforming_strings = off",
        "SELECT 'a\\nb'",
        "SET standard_conforming_strings = on",
        "SET client_encoding = 'LATIN1'",
    ] {
        speaker.query(sql).await;
    }
    let latin1 = b"SELECT 'caf\xe9' AS \"\xe9t\xe9\", convert_to('caf\xe9', 'UTF8')";
    speaker.say("LATIN1", &[raw::query_bytes(latin1)]).await;
    speaker.say("an error in LATIN1", &[raw::query_bytes(b"SELECT \"\xe9\"")]).await;
    speaker.query("RESET ALL").await;
    speaker.say("text that is not UTF-8", &[raw::query_bytes(b"SELECT '\xff'")]).await;
    speaker.query("DISCARD ALL").await;
}

async fn extended(speaker: &mut Speaker<'_>) {
    let (parse, bind, describe, execute) = (raw::parse, raw::bind, raw::describe, raw::execute);
    let select = "SELECT $1 + 1 AS n, $2 AS t, $3::bytea";
    speaker
        .say_until(
            "parse and describe, flushed",
            &[parse("s1", select, &[INT4, TEXT]), describe(b'S', "s1"), raw::flush()],
            b'T',
        )
        .await;
    let seven = 7_i32.to_be_bytes();
    let mixed: [Option<&[u8]>; 3] = [Some(&seven), Some(b"text"), None];
    speaker
        .say_until(
            "bind, describe, execute, flushed",
            &[bind("p1", "s1", &[1, 0, 1], &mixed, &[1, 0, 1]), describe(b'P', "p1"), execute("p1", 0), raw::flush()],
            b'C',
        )
        .await;
    speaker.say("sync", &[raw::sync()]).await;
    speaker.say("again, all binary", &[bind("", "s1", &[1], &mixed, &[1]), execute("", 0), raw::sync()]).await;
    speaker
        .say("wrong binary", &[bind("", "s1", &[1], &[Some(b"\0"), None, None], &[]), execute("", 0), raw::sync()])
        .await;
    speaker.say("wrong number", &[bind("", "s1", &[], &[None], &[]), execute("", 0), raw::sync()]).await;
    speaker.say("name taken", &[parse("s1", "SELECT 1", &[]), raw::sync()]).await;
    speaker
        .say("close", &[raw::close(b'S', "s1"), raw::close(b'S', "never"), raw::close(b'P', "never"), raw::sync()])
        .await;
    speaker.say("gone", &[bind("", "s1", &[], &[], &[]), raw::sync()]).await;
    let rows = "SELECT n, repeat('x', n) FROM generate_series(1, 7) AS n";
    speaker
        .say(
            "a portal in parts",
            &[
                parse("", rows, &[]),
                bind("p", "", &[], &[], &[]),
                execute("p", 3),
                execute("p", 3),
                execute("p", 3),
                execute("p", 3),
                raw::sync(),
            ],
        )
        .await;
    speaker
        .say_until(
            "a portal in parts, flushed",
            &[raw::query("BEGIN"), parse("", rows, &[]), bind("q", "", &[], &[], &[1]), execute("q", 2), raw::flush()],
            b's',
        )
        .await;
    speaker.say_until("the next part", &[execute("q", 2), raw::flush()], b's').await;
    speaker.say("the portal lives on over Sync in a block", &[raw::sync()]).await;
    speaker.say("the rest", &[execute("q", 0), raw::close(b'P', "q"), raw::sync()]).await;
    speaker.say("portal gone", &[execute("q", 0), raw::sync()]).await;
    speaker.query("ROLLBACK").await;
    speaker
        .say(
            "empty",
            &[parse("", "", &[]), describe(b'S', ""), bind("", "", &[], &[], &[]), execute("", 0), raw::sync()],
        )
        .await;
    speaker.say("several in one", &[parse("", "SELECT 1; SELECT 2", &[]), raw::sync()]).await;
    let insert = "INSERT INTO items (name, data) VALUES ($1, $2)";
    let value: [Option<&[u8]>; 2] = [Some(b"extended"), Some(b"\\x0001")];
    speaker
        .say(
            "no data",
            &[
                parse("", insert, &[]),
                describe(b'S', ""),
                bind("", "", &[], &value, &[]),
                describe(b'P', ""),
                execute("", 0),
                raw::sync(),
            ],
        )
        .await;
    speaker.say("sync alone", &[raw::sync()]).await;
    speaker
        .say("BEGIN by Parse", &[parse("", "BEGIN", &[]), bind("", "", &[], &[], &[]), execute("", 0), raw::sync()])
        .await;
    speaker
        .say(
            "ROLLBACK by Parse",
            &[parse("", "ROLLBACK", &[]), bind("", "", &[], &[], &[]), execute("", 0), raw::sync()],
        )
        .await;
}

/// Parse, Bind, Execute of one statement without parameters.
fn run(sql: &str) -> Vec<u8> {
    [raw::parse("", sql, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat()
}

async fn pipelines(speaker: &mut Speaker<'_>) {
    let insert = |name: &str| run(&format!("INSERT INTO items (name) VALUES ('{name}') RETURNING id"));
    speaker.say("one transaction", &[insert("p1"), insert("p2"), run("SELECT count(*) FROM items"), raw::sync()]).await;
    speaker
        .say("an error inside", &[insert("p3"), run("SELECT 1/0"), insert("p4"), run("SELECT 'skipped'"), raw::sync()])
        .await;
    speaker
        .say_until_ready(
            "many syncs, an error in the second",
            &[
                insert("p5"),
                raw::sync(),
                insert("p6"),
                run("SELECT nosuch"),
                insert("p7"),
                raw::sync(),
                insert("p8"),
                raw::sync(),
                raw::sync(),
            ],
            4,
        )
        .await;
    speaker
        .say_until_ready(
            "queries one behind the other",
            &[raw::query("SELECT 1"), raw::query("SELECT 2/0"), raw::query("SELECT 3")],
            3,
        )
        .await;
    speaker
        .say_until_ready(
            "simple behind extended",
            &[run("SELECT 1"), raw::sync(), raw::query("SELECT 2"), run("SELECT 3"), raw::sync()],
            3,
        )
        .await;
    speaker
        .say_until_ready(
            "a block in a pipeline",
            &[
                run("BEGIN"),
                insert("p9"),
                raw::sync(),
                run("SELECT nosuch"),
                raw::sync(),
                run("SELECT 1"),
                raw::sync(),
                run("COMMIT"),
                raw::sync(),
            ],
            4,
        )
        .await;
    speaker
        .say(
            "explicit blocks between implicit ones",
            &[run("SELECT 1"), run("BEGIN"), insert("p10"), run("COMMIT"), insert("p11"), raw::sync()],
        )
        .await;
    speaker.say("savepoints in an implicit block", &[insert("p12"), run("SAVEPOINT s"), raw::sync()]).await;
    speaker.say("a block that stays open", &[raw::query("BEGIN; SELECT 1"), raw::sync()]).await;
    speaker.say("", &[]).await;
    speaker.query("ROLLBACK").await;
}

async fn copy_in(speaker: &mut Speaker<'_>) {
    let copy = || raw::query("COPY items (name, price) FROM STDIN");
    speaker.say("COPY in", &[copy(), raw::copy_data(b"one\t1\ntw"), raw::copy_data(b"o\t2\n"), raw::copy_done()]).await;
    speaker.say("COPY fail", &[copy(), raw::copy_data(b"three\t3\n"), raw::copy_fail("changed my mind")]).await;
    speaker
        .say(
            "COPY of nonsense",
            &[copy(), raw::copy_data(b"four\tx\n"), raw::copy_data(b"five\t5\n"), raw::copy_done()],
        )
        .await;
    speaker
        .say(
            "COPY with Flush and Sync in it",
            &[copy(), raw::flush(), raw::copy_data(b"six\t6\n"), raw::sync(), raw::copy_done()],
        )
        .await;
    let several = "SELECT 1; COPY items (name) FROM STDIN; SELECT 2; COPY items (name) FROM STDIN; SELECT 3";
    let data = [
        raw::query(several),
        raw::copy_data(b"seven\n"),
        raw::copy_done(),
        raw::copy_data(b"eight\n"),
        raw::copy_done(),
    ];
    speaker.say("COPY among others", &data).await;
    let binary = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x06binary\xff\xff";
    speaker
        .say(
            "COPY in binary",
            &[raw::query("COPY items (name) FROM STDIN (FORMAT binary)"), raw::copy_data(binary), raw::copy_done()],
        )
        .await;
    let by_parse = [run("COPY items (name) FROM STDIN"), raw::copy_data(b"nine\n"), raw::copy_done(), raw::sync()];
    speaker.say("COPY in by Parse", &by_parse).await;
    let failed = [run("COPY items (name) FROM STDIN"), raw::copy_fail("no"), run("SELECT 'skipped'"), raw::sync()];
    speaker.say("COPY fail by Parse", &failed).await;
    speaker
        .say(
            "stray copy messages are passed over",
            &[raw::copy_data(b"stray"), raw::copy_done(), raw::copy_fail("x"), raw::query("SELECT 1")],
        )
        .await;
    speaker.say("COPY in a block, failing", &[raw::query("BEGIN; COPY nosuch FROM STDIN")]).await;
    speaker.query("ROLLBACK").await;
}

async fn copy_out(speaker: &mut Speaker<'_>) {
    for sql in [
        "COPY (SELECT id, name FROM items ORDER BY id) TO STDOUT",
        "COPY (SELECT id, name FROM items ORDER BY id) TO STDOUT (FORMAT binary)",
        "COPY (SELECT 1) TO STDOUT (FORMAT csv, HEADER); SELECT 2; COPY (SELECT 3) TO STDOUT",
        "COPY (SELECT 1/(3 - n) FROM generate_series(1, 5) AS n) TO STDOUT",
    ] {
        speaker.query(sql).await;
    }
    speaker.say("COPY out by Parse", &[run("COPY (SELECT 1) TO STDOUT"), run("SELECT 2"), raw::sync()]).await;
}

/// The fast path, and libpq's large objects, which use it.
async fn function_calls(speaker: &mut Speaker<'_>) {
    let int = |number: i32| number.to_be_bytes();
    let call = raw::function_call;
    speaker.say("int4pl", &[call(177, &[1], &[Some(&int(40)), Some(&int(2))], 1)]).await;
    speaker.say("int4pl in text", &[call(177, &[0, 0], &[Some(b"40"), Some(b"2")], 0)]).await;
    speaker.say("a NULL", &[call(177, &[1], &[None, Some(&int(2))], 1)]).await;
    speaker.say("int4div by 0", &[call(154, &[1], &[Some(&int(1)), Some(&int(0))], 1)]).await;
    speaker.say("no such function", &[call(1, &[], &[], 1)]).await;
    speaker.query("BEGIN").await;
    speaker.say("lo_create", &[call(715, &[1], &[Some(&int(424_242))], 1)]).await;
    speaker.say("lo_open", &[call(952, &[1], &[Some(&int(424_242)), Some(&int(0x60000))], 1)]).await;
    speaker.say("lowrite", &[call(955, &[1], &[Some(&int(0)), Some(b"\0\x01large")], 1)]).await;
    speaker.say("lo_lseek", &[call(956, &[1], &[Some(&int(0)), Some(&int(2)), Some(&int(0))], 1)]).await;
    speaker.say("loread", &[call(954, &[1], &[Some(&int(0)), Some(&int(100))], 1)]).await;
    speaker.say("lo_close", &[call(953, &[1], &[Some(&int(0))], 1)]).await;
    speaker.query("COMMIT; SELECT lo_get(424242)").await;
}

async fn large(speaker: &mut Speaker<'_>) {
    speaker.query("SELECT repeat('0123456789', 300000)").await;
    speaker.query("SELECT n, repeat('x', 100) FROM generate_series(1, 5000) AS n").await;
    let columns: Vec<String> = (0..1_600).map(|n| format!("{n} AS c{n}")).collect();
    speaker.query(&format!("SELECT {}", columns.join(", "))).await;
    speaker.query(&format!("SELECT length('{}')", "x".repeat(3_000_000))).await;
    let value = vec![b'\xfe'; 3_000_000];
    let bind = raw::bind("", "", &[1], &[Some(&value)], &[1]);
    speaker
        .say(
            "a large parameter and row",
            &[raw::parse("", "SELECT $1", &[BYTEA]), bind, raw::execute("", 0), raw::sync()],
        )
        .await;
    let rows: Vec<u8> = (0..20_000).flat_map(|n| format!("row {n}\n").into_bytes()).collect();
    let pieces: Vec<Vec<u8>> = rows.chunks(8_192).map(raw::copy_data).collect();
    let copy =
        [vec![raw::query("CREATE TEMP TABLE many (t text); COPY many FROM STDIN")], pieces, vec![raw::copy_done()]];
    speaker.say("a long COPY", &copy.concat()).await;
    speaker.query("COPY many TO STDOUT").await;
}

async fn notifications(speaker: &mut Speaker<'_>, port: u16) {
    speaker.query("LISTEN channel").await;
    speaker.query("NOTIFY channel, 'to myself'; SELECT 1").await;
    speaker.query("BEGIN; NOTIFY channel, 'at commit'; SELECT 1").await;
    speaker.query("COMMIT").await;
    let packet = raw::startup(raw::V3_0, &[("user", APP.0), ("database", DATABASE)]);
    let (mut other, _) = RawClient::connect(port, None, &packet).await;
    other.send(&raw::query("NOTIFY channel, 'from elsewhere'")).await;
    other.until_ready(1).await;
    speaker.say_until("a notification while idle", &[], b'A').await;
    speaker.query("UNLISTEN *").await;
}

async fn cancel(speaker: &mut Speaker<'_>, port: u16) {
    speaker.client.doing = "sleep, to be cancelled".to_owned();
    speaker.client.send(&raw::query("SELECT pg_sleep(60)")).await;
    let packet = raw::startup(raw::V3_0, &[("user", APP.0), ("database", DATABASE)]);
    let (mut other, _) = RawClient::connect(port, None, &packet).await;
    // A cancel that comes before the statement does nothing.
    until("it sleeps", async || {
        other.send(&raw::query("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND usename = user")).await;
        other.until_ready(1).await.iter().any(|frame| frame.tag == b'D')
    })
    .await;
    raw::cancel(port, speaker.client.pid, &speaker.client.key).await;
    let frames = speaker.client.until_ready(1).await;
    speaker.heard("cancelled", frames);
}

/// Ways in which a session ends, each in one of its own.
async fn endings(port: u16, piece: Option<usize>, transcript: &mut Transcript) {
    let mut speaker = Speaker::log_in(port, piece, transcript).await;
    speaker.query("SELECT 1; SELECT pg_terminate_backend(pg_backend_pid()); SELECT 2").await;
    let mut speaker = Speaker::log_in(port, piece, transcript).await;
    speaker.say("what is no message", &[raw::message(b'y', |_| {})]).await;
    let mut speaker = Speaker::log_in(port, piece, transcript).await;
    speaker.query("SET idle_in_transaction_session_timeout = '50ms'; BEGIN").await;
    speaker.say("too long idle", &[]).await;
    for (step, parameters) in [
        ("no such database", &[("user", APP.0), ("database", "nosuch")][..]),
        ("a wrong option", &[("user", APP.0), ("database", DATABASE), ("options", "-c nosuch=1")]),
        ("a wrong setting", &[("user", APP.0), ("database", DATABASE), ("datestyle", "nonsense")]),
        (
            "settings",
            &[
                ("user", APP.0),
                ("database", DATABASE),
                ("TimeZone", "UTC"),
                ("options", "-c search_path=x\\ y -c geqo=off"),
            ],
        ),
    ] {
        let (client, frames) = RawClient::connect(port, piece, &raw::startup(raw::V3_0, parameters)).await;
        let mut speaker = Speaker { client, transcript };
        speaker.heard(step, frames);
        if step == "settings" {
            speaker.query("SHOW search_path; SHOW geqo").await;
        }
    }
    // GSSENCRequest: a server with Kerberos says G, whatever it is set up for.
    let mut client = RawClient::open(port, None).await;
    client.send(&[8_u32.to_be_bytes(), 80_877_104_u32.to_be_bytes()].concat()).await;
    assert!(matches!(client.read_byte().await, b'N' | b'G'));
    // SSLRequest: no, and the same connection goes on.
    let mut client = RawClient::open(port, None).await;
    client.send(&[8_u32.to_be_bytes(), 80_877_103_u32.to_be_bytes()].concat()).await;
    assert_eq!(client.read_byte().await, b'N');
    let packet = raw::startup(raw::V3_2, &[("user", APP.0), ("database", DATABASE), ("_pq_.nosuch", "1")]);
    let frames = client.log_in(&packet).await;
    let mut speaker = Speaker { client, transcript };
    speaker.heard("protocol 3.2 with an option that nobody knows", frames);
    speaker.query("SELECT 1").await;
}

/// Fails at the first step that differs, with the first frame.
pub fn assert_same(direct: &Transcript, other: &Transcript) {
    for ((step, expected), (_, got)) in direct.steps.iter().zip(&other.steps) {
        let at = expected.iter().zip(got).position(|(expected, got)| expected != got);
        if let Some(at) = at {
            panic!("step {step:.200?}, reply {at}:\n  the server {:?}\n  the other  {:?}", expected[at], got[at]);
        }
        assert_eq!(expected.len(), got.len(), "step {step:.200?}: replies {expected:?} against {got:?}");
    }
    assert_eq!(direct.steps.len(), other.steps.len());
}
