//! Conversations at random, held with PostgreSQL itself and with the proxy in `dual-write`: each message by itself is one that clients send,
//! their order is one that no driver ever makes. The replies must be PostgreSQL's, and so must the rows, on both sides.

use std::fmt::Write as _;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::common::pair::DATABASE;
use super::common::raw::{self, Frame, RawClient};
use super::{APP, SCHEMA, Stage, login};
use crossfade::cluster::Cluster;

const ROWS: &str = "SELECT coalesce(string_agg(format('%s=%s', id, body), ',' ORDER BY id), '-') FROM notes";

/// Conversations; `CROSSFADE_PROOF` for more.
fn conversations() -> u64 {
    if std::env::var_os("CROSSFADE_PROOF").is_some() { 20_000 } else { 400 }
}

/// Conversations with another outcome that are shown.
const SHOWN: usize = 5;

fn one_of<'a>(random: &mut StdRng, choices: &[&'a str]) -> &'a str {
    choices[random.random_range(0..choices.len())]
}

/// A statement without parameters.
fn text(random: &mut StdRng) -> String {
    let id = random.random_range(0..12);
    match random.random_range(0..26) {
        0..4 => format!("INSERT INTO notes VALUES ({id}, 'a')"),
        4 => format!("INSERT INTO notes VALUES ({id}, 'b') RETURNING id"),
        5 => format!("INSERT INTO notes VALUES ({id}, 'c') ON CONFLICT (id) DO UPDATE SET body = excluded.body || 'x'"),
        6 | 7 => format!("UPDATE notes SET body = body || 'u' WHERE id <= {id}"),
        8 => format!("DELETE FROM notes WHERE id = {id}"),
        9 => format!("UPDATE notes SET body = 'r' WHERE id = {id} RETURNING body, id"),
        10 => format!("INSERT INTO notes VALUES ({id}, 'm'); UPDATE notes SET body = 'mm' WHERE id = {id}"),
        11 => format!("BEGIN; INSERT INTO notes VALUES ({id}, 'n'); COMMIT"),
        12 => format!("INSERT INTO notes VALUES ({id}, 'o'); SELECT 1/0"),
        13 => format!("INSERT INTO notes VALUES ({id}, 'p'); COMMIT; INSERT INTO notes VALUES ({id}, 'q')"),
        14 => format!("INSERT INTO notes VALUES ({id}, 's'); ROLLBACK; SELECT 2"),
        15 => "SELECT 1/0".to_owned(),
        16 => one_of(random, &["", ";", "-- nothing", "/* /* */ */;;"]).to_owned(),
        17 => "SELEC 1".to_owned(),
        18 | 19 => "BEGIN".to_owned(),
        20 => one_of(random, &["COMMIT", "ROLLBACK", "END", "ROLLBACK AND CHAIN", "COMMIT AND CHAIN"]).to_owned(),
        21 => one_of(random, &["SAVEPOINT s", "ROLLBACK TO s", "RELEASE s"]).to_owned(),
        22 => "TRUNCATE notes".to_owned(),
        23 => one_of(random, &["COPY notes FROM STDIN", "COPY (SELECT 1) TO STDOUT"]).to_owned(),
        24 => one_of(random, &["DEALLOCATE ALL", "SHOW datestyle", "LISTEN x", "SELECT body FROM notes ORDER BY id"])
            .to_owned(),
        _ => format!("DO $$ BEGIN INSERT INTO notes VALUES ({id}, 'do') ON CONFLICT DO NOTHING; END $$"),
    }
}

/// One message, and what it is, for the report.
fn message(random: &mut StdRng, log: &mut String) -> Vec<u8> {
    let (statement, portal) = (one_of(random, &["", "", "s1"]), one_of(random, &["", "", "p1"]));
    let (said, bytes) = match random.random_range(0..34) {
        0..5 => {
            let text = text(random);
            (format!("Query {text}"), raw::query(&text))
        }
        5..11 => {
            let text = text(random);
            (format!("Parse {statement:?} {text}"), raw::parse(statement, &text, &[]))
        }
        11..17 => (format!("Bind {portal:?} {statement:?}"), raw::bind(portal, statement, &[], &[], &[])),
        17 => {
            (format!("Bind {portal:?} {statement:?} of a value"), raw::bind(portal, statement, &[], &[Some(b"1")], &[]))
        }
        18 => (format!("Describe S {statement:?}"), raw::describe(b'S', statement)),
        19 => (format!("Describe P {portal:?}"), raw::describe(b'P', portal)),
        20..26 => (format!("Execute {portal:?}"), raw::execute(portal, 0)),
        26 => (format!("Execute {portal:?} 1"), raw::execute(portal, 1)),
        27 => (format!("Close S {statement:?}"), raw::close(b'S', statement)),
        28 => (format!("Close P {portal:?}"), raw::close(b'P', portal)),
        29..31 => ("Sync".to_owned(), raw::sync()),
        31 => ("Flush".to_owned(), raw::flush()),
        32 => ("CopyData".to_owned(), raw::copy_data(format!("{}\tcopied\n", random.random_range(0..12)).as_bytes())),
        _ => match random.random_range(0..2) {
            0 => ("CopyDone".to_owned(), raw::copy_done()),
            _ => ("CopyFail".to_owned(), raw::copy_fail("enough")),
        },
    };
    let _ = writeln!(log, "  {said}");
    bytes
}

/// Messages of one conversation; none of them may leave a server waiting for more. Mostly with statements prepared, bound and executed in that order.
fn conversation(random: &mut StdRng, log: &mut String) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.random_range(1..14) {
        if random.random_range(0..3) == 0 {
            let text = text(random);
            let _ = writeln!(log, "  Parse Bind Execute {text}");
            bytes.extend([raw::parse("", &text, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat());
        } else {
            bytes.extend(message(random, log));
        }
    }
    bytes.extend(
        [raw::copy_fail("the end"), raw::sync(), raw::query("ROLLBACK"), raw::query("SELECT 'fence'")].concat(),
    );
    bytes
}

/// What is compared of a reply: an error's severity and SQLSTATE, a description without the number of its table. After FATAL a server that has
/// unread messages resets the connection, and what it said may be lost on its way: the end is all that is compared. Why an unnamed portal that is
/// over cannot run depends on what of PostgreSQL's the proxy has put in its place.
fn essence(frame: &Frame) -> String {
    match frame.tag {
        b'E' | b'N' => {
            let field = |code: u8| {
                let fields = frame.body.split(|byte| *byte == 0);
                fields
                    .filter(|field| field.first() == Some(&code))
                    .map(|field| String::from_utf8_lossy(field).into_owned())
                    .next()
            };
            let code = field(b'C').unwrap_or_default().replace("C55000", "C34000").replace("C25P02", "C34000");
            format!("{}{code}", char::from(frame.tag))
        }
        b'T' => format!("T{}", frame.body.iter().take(2).map(u8::to_string).collect::<String>()),
        tag => format!("{}{}", char::from(tag), frame.body.escape_ascii()),
    }
}

async fn hold(port: u16, bytes: &[u8], doing: &str) -> Vec<String> {
    let (mut client, _) = RawClient::connect(port, None, &login()).await;
    client.doing = doing.to_owned();
    client.send(bytes).await;
    let mut heard = Vec::new();
    let mut fence = false;
    loop {
        let frame = client.read().await.filter(|frame| frame.tag != b'E' || !frame.body.starts_with(b"SFATAL"));
        let Some(frame) = frame else {
            heard.push("the end".to_owned());
            return heard;
        };
        fence |= frame.tag == b'D' && frame.body.ends_with(b"fence");
        heard.push(essence(&frame));
        if fence && frame.tag == b'Z' {
            client.send(&raw::terminate()).await;
            return heard;
        }
    }
}

/// PostgreSQL by itself, with the same tables.
pub async fn reference() -> Cluster {
    let cluster =
        Cluster::builder().hba("local all all trust\nhost all all 127.0.0.1/32 trust\n").start().await.expect("starts");
    let roles = format!("CREATE ROLE {} LOGIN; CREATE DATABASE {DATABASE} OWNER {};", APP.0, APP.0);
    cluster.run("postgres", &roles).await.expect("makes the role");
    cluster.run(DATABASE, &format!("SET ROLE {};\n{SCHEMA}", APP.0)).await.expect("makes the tables");
    cluster
}

#[tokio::test]
async fn messages_in_any_order_are_answered_as_postgresql_does() {
    are_answered_as_postgresql_does("dual-write").await;
}

/// ... also where new answers what it may.
#[tokio::test]
async fn messages_in_any_order_are_answered_as_postgresql_does_in_dual_read() {
    are_answered_as_postgresql_does("dual-read").await;
}

async fn are_answered_as_postgresql_does(phase: &str) {
    let reference = reference().await;
    let stage = Stage::start(phase, "").await;
    let direct = reference.client(DATABASE).await.expect("connects");
    let old = stage.databases.old.client(DATABASE).await.expect("connects");
    let first: u64 = std::env::var("CROSSFADE_SEED").map_or(0, |seed| seed.parse().expect("a number"));
    let mut wrong = Vec::new();
    for seed in first..first + conversations() {
        let mut random = StdRng::seed_from_u64(seed);
        let mut log = String::new();
        let bytes = conversation(&mut random, &mut log);
        let doing = format!("conversation {seed}:\n{log}");
        let expected = hold(reference.port(), &bytes, &doing).await;
        let heard = hold(stage.proxy.port(), &bytes, &doing).await;
        let rows: String = direct.query_one(ROWS, &[]).await.expect("reads").get(0);
        let ours: String = old.query_one(ROWS, &[]).await.expect("reads").get(0);
        if heard != expected || ours != rows {
            let [heard, expected] = [heard, expected].map(|frames| frames.join("\n    "));
            wrong.push(format!(
                "{doing}PostgreSQL:\n    {expected}\nthe proxy:\n    {heard}\nrows {rows}, old has {ours}"
            ));
            for side in [&direct, &old] {
                side.batch_execute("TRUNCATE notes").await.expect("begins anew");
            }
        }
        if wrong.len() >= SHOWN {
            break;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    stage.end().await;
}
