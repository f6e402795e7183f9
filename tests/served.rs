//! What new serves in dual-read: never less than a session, or anybody, has been told of (R1 to R3, interleaving 13).

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use common::link::{Link, Trip, Way};
use common::pair::{APP, CONTROL, DATABASE};
use common::{Databases, Pair, Proxy, ProxyConfig, until};
use crossfade::reads::look::{LEASE, STUCK};
use tokio_postgres::{Client, SimpleQueryMessage};

const SCHEMA: &str = "CREATE TABLE notes (id int PRIMARY KEY, body text);
    CREATE TABLE other (id int PRIMARY KEY, body text);
    CREATE PROCEDURE set_body(text) LANGUAGE sql AS 'UPDATE notes SET body = $1';
    CREATE SEQUENCE numbers;
    CREATE FUNCTION sneaky() RETURNS bigint IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN nextval(''numbers''); END';";

/// Sync, which is the COMMIT of a transaction on the mirror.
const SYNC: &[u8] = b"S\0\0\0\x04";
/// So long something that must wait is watched.
const WATCHED: Duration = Duration::from_millis(400);

/// Both databases and a proxy in `dual-read`, whose way to new is a link.
struct Stage {
    pair: Pair,
    new: Link,
}

impl Stage {
    async fn start(more: &str) -> Stage {
        let databases = Databases::start(&[]).await;
        databases.run_on_both(SCHEMA).await;
        let new = Link::to(databases.new.port()).await;
        let url = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, new.port());
        let mut proxy = Proxy::start(ProxyConfig { new: url, ..databases.proxy_config("old", more) }).await;
        proxy.set_phase("dual-write").await;
        proxy.settle().await;
        proxy.set_phase("dual-read").await;
        Stage { pair: Pair { proxy, databases }, new }
    }

    async fn on_new(&self, sql: &str) -> String {
        self.pair.databases.new.run(DATABASE, sql).await.expect("runs on new").trim().to_owned()
    }

    /// Reads that new has answered so far.
    async fn served(&self) -> f64 {
        self.pair.proxy.metrics("crossfade_read_served_total{side=\"new\"}").await
    }

    /// Reads until new has answered one.
    async fn until_served(&self, client: &Client, sql: &str) -> Option<String> {
        let before = self.served().await;
        let mut value = None;
        until("new serves", async || {
            value = read(client, sql).await;
            self.served().await > before
        })
        .await;
        value
    }
}

/// The first value of the answer to a Query.
async fn read(client: &Client, sql: &str) -> Option<String> {
    let answer = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    })
}

const BODY: &str = "SELECT body FROM notes WHERE id = 1";

#[tokio::test]
async fn new_answers_in_both_protocols_and_the_client_sees_no_difference() {
    let stage = Stage::start("").await;
    let client = stage.pair.client().await;
    client
        .batch_execute("INSERT INTO notes SELECT n, 'body ' || n FROM generate_series(1, 1000) n")
        .await
        .expect("writes");
    // So that it shows who answers; nothing tells the proxy.
    stage.on_new("UPDATE notes SET body = 'from new' WHERE id = 1").await;
    assert_eq!(stage.until_served(&client, BODY).await.as_deref(), Some("from new"));
    let before = stage.served().await;
    let prepared = client.prepare("SELECT id, body FROM notes WHERE id = $1").await.expect("prepares");
    // How many of them new serves is a matter of the machine: a look that is late is a read of the authority's.
    until("new has served prepared statements", async || {
        for id in 2..20_i32 {
            let row = client.query_one(&prepared, &[&id]).await.expect("reads");
            assert_eq!((row.get::<_, i32>(0), row.get::<_, String>(1)), (id, format!("body {id}")));
        }
        stage.served().await >= before + 10.0
    })
    .await;
    let before = stage.served().await;
    until("new has served all rows", async || {
        let all = client.query("SELECT * FROM notes WHERE id > $1 ORDER BY id", &[&1]).await.expect("reads");
        assert_eq!(all.len(), 999);
        stage.served().await > before
    })
    .await;
    // An error is the authority's, and the statement behind it is served again.
    let error = client.simple_query("SELECT 1 / (id - 1) FROM notes WHERE id = 1").await.expect_err("fails");
    assert_eq!(error.code().map(|code| code.code()), Some("22012"));
    stage.until_served(&client, BODY).await;
    // Settings of the session hold on new.
    client.batch_execute("SET datestyle = 'SQL, DMY'; SET extra_float_digits = -3").await.expect("sets");
    stage.until_served(&client, BODY).await;
    assert_eq!(
        stage.until_served(&client, "SELECT date '2026-02-01' FROM notes WHERE id = 1").await.as_deref(),
        Some("01/02/2026")
    );
    // State that new's session cannot have.
    client
        .batch_execute("CREATE TEMPORARY TABLE notes (id int, body text); INSERT INTO notes VALUES (1, 'temporary')")
        .await
        .expect("makes it");
    for _ in 0..10 {
        assert_eq!(read(&client, BODY).await.as_deref(), Some("temporary"));
    }
    client.batch_execute("DROP TABLE pg_temp.notes").await.expect("drops it");
    // (The proxy took the INSERT for one into the table that it hides: repair has healed new's row since.)
    assert!(stage.until_served(&client, BODY).await.is_some());
}

/// R1: what is served cannot write, whatever it calls and whatever was reset.
#[tokio::test]
async fn r1_what_new_serves_cannot_write() {
    let stage = Stage::start("").await;
    let client = stage.pair.client().await;
    client.batch_execute("INSERT INTO notes VALUES (1, 'x')").await.expect("writes");
    stage.until_served(&client, BODY).await;
    client.batch_execute("RESET ALL").await.expect("resets");
    stage.until_served(&client, BODY).await;
    let mut number = 0;
    until("new was asked", async || {
        number += 1;
        let drawn = read(&client, "SELECT sneaky() FROM notes WHERE id = 1").await;
        assert_eq!(drawn, Some(number.to_string()), "the authority has answered");
        stage.pair.proxy.metrics("crossfade_read_kept_total{reason=\"failed\"}").await > 0.0
    })
    .await;
    // Now it is remembered.
    for _ in 0..5 {
        number += 1;
        let drawn = read(&client, "SELECT sneaky() FROM notes WHERE id = 1").await;
        assert_eq!(drawn, Some(number.to_string()), "the authority has answered");
    }
    assert_eq!(stage.on_new("SELECT is_called FROM numbers").await, "f", "new has drawn a number");
}

/// Interleaving 13: T has committed on the authority, and its images are not committed on new. Who has seen them must not miss them there (R2).
#[tokio::test]
async fn i13_what_a_session_has_seen_on_the_authority_it_sees_on_new() {
    let stage = Stage::start("mirror: { timeout: 60s }").await;
    let (writer, reader) = (stage.pair.client().await, stage.pair.client().await);
    writer.batch_execute("INSERT INTO notes VALUES (1, 'v0')").await.expect("writes");
    assert_eq!(stage.until_served(&reader, BODY).await.as_deref(), Some("v0"));
    let held = stage.new.trip_behind(b"v1", Way::ToServer, SYNC, Trip::HoldBefore);
    let writing = tokio::spawn(async move { writer.batch_execute("UPDATE notes SET body = 'v1' WHERE id = 1").await });
    held.await.expect("is held");
    // In a block the authority answers.
    until("the authority has committed", async || {
        reader.batch_execute("BEGIN").await.expect("begins");
        let seen = read(&reader, BODY).await;
        reader.batch_execute("COMMIT").await.expect("ends");
        seen.as_deref() == Some("v1")
    })
    .await;
    for round in 0..20 {
        assert_eq!(read(&reader, BODY).await.as_deref(), Some("v1"), "round {round}: what was there is gone");
    }
    assert_eq!(stage.on_new(BODY).await, "v0", "the test has forced nothing");
    stage.new.release();
    writing.await.expect("runs").expect("is acknowledged");
    assert_eq!(stage.until_served(&reader, BODY).await.as_deref(), Some("v1"));
}

/// R2: what was acknowledged, everybody sees: also who has never asked the authority.
#[tokio::test]
async fn r2_an_acknowledgement_waits_for_the_commit_on_new() {
    let stage = Stage::start("mirror: { timeout: 60s }").await;
    let (writer, reader) = (stage.pair.client().await, stage.pair.client().await);
    writer.batch_execute("INSERT INTO notes VALUES (1, 'v0')").await.expect("writes");
    for round in 1..10 {
        stage.until_served(&reader, BODY).await;
        let (body, update) = (format!("v{round}"), format!("UPDATE notes SET body = 'v{round}' WHERE id = 1"));
        let held = stage.new.trip_behind(body.as_bytes(), Way::ToServer, SYNC, Trip::HoldBefore);
        let mut writing = Box::pin(writer.batch_execute(&update));
        let early = tokio::time::timeout(WATCHED, &mut writing).await;
        assert!(early.is_err(), "acknowledged, and new does not have it");
        held.await.expect("is held");
        stage.new.release();
        writing.await.expect("is acknowledged");
        let before = stage.served().await;
        assert_eq!(read(&reader, BODY).await, Some(body));
        if stage.served().await == before + 1.0 {
            return;
        }
        // A busy machine: the last look was older than a lease.
    }
    panic!("the reader has not asked the authority, and new has never served it");
}

/// R3: a table of which a row is owed is not served; others are. (The reading side of interleaving 18: a row that only old has.)
#[tokio::test]
async fn r3_rows_that_are_owed_come_from_the_authority() {
    let stage = Stage::start("").await;
    let (writer, reader) = (stage.pair.client().await, stage.pair.client().await);
    writer
        .batch_execute("INSERT INTO notes VALUES (1, 'v0'); INSERT INTO other VALUES (1, 'o')")
        .await
        .expect("writes");
    stage.on_new("ALTER TABLE notes ADD CONSTRAINT no CHECK (body NOT LIKE 'v1%')").await;
    stage.pair.renewed().await;
    stage.until_served(&reader, BODY).await;
    writer
        .batch_execute("UPDATE notes SET body = 'v1' WHERE id = 1")
        .await
        .expect("the application does not hear of it");
    writer.batch_execute("INSERT INTO notes VALUES (2, 'v1 too')").await.expect("nor of this");
    for round in 0..30 {
        assert_eq!(read(&reader, BODY).await.as_deref(), Some("v1"), "round {round}");
        assert_eq!(read(&reader, "SELECT count(*) FROM notes").await.as_deref(), Some("2"), "round {round}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(stage.on_new("SELECT count(*) FROM notes").await, "1", "the test has forced nothing");
    assert!(stage.pair.proxy.metrics("crossfade_read_kept_total{reason=\"owed\"}").await > 0.0);
    stage.until_served(&reader, "SELECT body FROM other").await;
    stage.on_new("ALTER TABLE notes DROP CONSTRAINT no").await;
    stage.pair.settle_and_assert_equal().await;
    assert_eq!(stage.until_served(&reader, BODY).await.as_deref(), Some("v1"));
}

/// New fails before the first row, hangs, or is cut off: the authority answers, and no client hears of it.
#[tokio::test]
async fn where_new_fails_the_authority_answers() {
    let mut stage = Stage::start("mirror: { timeout: 500ms }").await;
    let client = stage.pair.client().await;
    client.batch_execute("INSERT INTO notes VALUES (1, 'x')").await.expect("writes");
    stage.until_served(&client, BODY).await;
    stage.new.cut();
    for _ in 0..5 {
        assert_eq!(read(&client, BODY).await.as_deref(), Some("x"), "cut");
    }
    let again = stage.pair.client().await;
    stage.until_served(&again, BODY).await;
    stage.new.set_both(common::link::Flow::Stall);
    for _ in 0..5 {
        assert_eq!(read(&again, BODY).await.as_deref(), Some("x"), "stalled");
    }
    stage.new.set_both(common::link::Flow::Pass);
    stage.new.refuse().await;
    stage.new.cut();
    let later = stage.pair.client().await;
    for _ in 0..5 {
        assert_eq!(read(&later, BODY).await.as_deref(), Some("x"), "refused");
        client.batch_execute("UPDATE other SET body = body").await.expect("writes");
    }
    stage.new.accept().await;
    let last = stage.pair.client().await;
    until("the mirror is back", async || stage.pair.proxy.metrics("crossfade_mirror_up").await == 1.0).await;
    stage.until_served(&last, BODY).await;
    stage.on_new("REVOKE SELECT ON notes FROM app").await;
    stage.pair.renewed().await;
    for _ in 0..10 {
        assert_eq!(read(&last, BODY).await.as_deref(), Some("x"), "not allowed on new");
    }
}

/// Histories: each client writes its own counter and reads all of them, half of the clients served by new, with new cut off again and again. Nobody reads less than was
/// acknowledged before the read began, nor less than it has read before.
#[tokio::test]
async fn nobody_reads_less_than_was_acknowledged_or_read_before() {
    const CLIENTS: usize = 4;
    let stage = Arc::new(Stage::start("mirror: { timeout: 5s }").await);
    let first = stage.pair.client().await;
    first
        .batch_execute(&format!("INSERT INTO notes SELECT n, '0' FROM generate_series(1, {CLIENTS}) n"))
        .await
        .expect("writes");
    let acknowledged: Arc<Vec<AtomicI64>> = Arc::new((0..=CLIENTS).map(|_| AtomicI64::new(0)).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for own in 1..=CLIENTS {
        let (stage, acknowledged, stop) = (stage.clone(), acknowledged.clone(), stop.clone());
        clients.push(tokio::spawn(async move {
            let client = stage.pair.client().await;
            let mut seen = [0_i64; CLIENTS + 1];
            let (mut count, mut reads) = (0_i64, 0_u64);
            while !stop.load(Ordering::SeqCst) {
                if own % 2 == 0 || count == 0 {
                    count += 1;
                    let update = format!("UPDATE notes SET body = '{count}' WHERE id = {own}");
                    client.batch_execute(&update).await.expect("writes");
                    acknowledged[own].store(count, Ordering::SeqCst);
                }
                for _ in 0..8 {
                    let other = 1 + (reads as usize % CLIENTS);
                    let least = acknowledged[other].load(Ordering::SeqCst).max(seen[other]);
                    // In a block the authority answers.
                    let (begin, end) = if own % 4 < 2 { ("", "") } else { ("BEGIN; ", "; COMMIT") };
                    let sql = format!("{begin}SELECT body FROM notes WHERE id = {other}{end}");
                    let found: i64 = read(&client, &sql).await.expect("is there").parse().expect("a number");
                    assert!(found >= least, "client {own} reads {found} of {other}, and {least} was there before");
                    seen[other] = found;
                    reads += 1;
                }
            }
            reads
        }));
    }
    let rounds = if common::proof() { 30 } else { 3 };
    for _ in 0..rounds {
        let before = stage.served().await;
        until("new serves again", async || stage.served().await > before + 100.0).await;
        stage.new.cut();
    }
    stop.store(true, Ordering::SeqCst);
    let mut reads = 0;
    for client in clients {
        reads += client.await.expect("no client failed");
    }
    let served = stage.served().await;
    eprintln!("{reads} reads, {served} of them served by new");
    assert!(served > 0.0);
    stage.pair.settle_and_assert_equal().await;
}

/// A fleet of two in `dual-read`. The way to new of the first is a link; the second serves.
struct Fleet {
    first: Proxy,
    second: Proxy,
    databases: Databases,
    new: Link,
}

impl Fleet {
    async fn start() -> Fleet {
        let databases = Databases::start(&[("max_prepared_transactions", "5")]).await;
        databases.run_on_both(SCHEMA).await;
        let new = Link::to(databases.new.port()).await;
        let url = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, new.port());
        let mut first = Proxy::start(ProxyConfig { new: url, ..databases.proxy_config("old", "fleet: true") }).await;
        first.set_phase("dual-write").await;
        first.settle().await;
        first.set_phase("dual-read").await;
        let second = Proxy::start(databases.proxy_config("old", "fleet: true")).await;
        Fleet { first, second, databases, new }
    }

    async fn client(&self, proxy: &Proxy) -> Client {
        let url = proxy.url_as(APP.0, APP.1, DATABASE);
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects");
        tokio::spawn(async move { drop(connection.await) });
        client
    }

    /// Reads until new has answered one.
    async fn until_served(&self, client: &Client) {
        let served = async || self.second.metrics("crossfade_read_served_total{side=\"new\"}").await;
        let before = served().await;
        until("new serves the second proxy's clients", async || {
            read(client, BODY).await;
            served().await > before
        })
        .await;
    }
}

/// Law 4 and R3 at once, where new is out of reach of one proxy only: the other serves, and pays what the first owes as fast as it can. A look of the second finds
/// nothing owed; the first acknowledges another write; the second must not serve from that look, and the first must not wait for its end each time.
#[tokio::test]
async fn r3_a_fleet_waits_once_for_a_mirror_that_is_down_and_serves_nothing_of_what_is_owed() {
    let mut fleet = Fleet::start().await;
    let (writer, reader) = (fleet.client(&fleet.first).await, fleet.client(&fleet.second).await);
    writer.batch_execute("INSERT INTO notes VALUES (1, '0')").await.expect("writes");
    fleet.until_served(&reader).await;
    fleet.new.refuse().await;
    fleet.new.cut();
    let mut count = 0;
    let write = async |count: &mut u32| {
        *count += 1;
        let started = Instant::now();
        let update = format!("UPDATE notes SET body = '{count}' WHERE id = 1");
        writer.batch_execute(&update).await.expect("the application does not hear of it");
        let took = started.elapsed();
        assert_eq!(read(&reader, BODY).await, Some(count.to_string()), "acknowledged, and the other proxy serves less");
        took
    };
    let mut took = Duration::ZERO;
    for _ in 0..20 {
        took += write(&mut count).await;
    }
    // Each of them would wait for a lease and for what is stuck.
    assert!(took < (LEASE + STUCK) * 10, "20 transactions took {took:?}");
    let mut at_once = 0;
    for _ in 0..4 {
        until("the second proxy has paid", async || {
            let owed = fleet.databases.old.run(DATABASE, "SELECT count(*) FROM crossfade.ledger").await;
            owed.expect("reads").trim() == "0"
        })
        .await;
        // It has time to find that nothing is owed.
        for _ in 0..10 {
            read(&reader, BODY).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        at_once += u32::from(write(&mut count).await < LEASE);
    }
    assert!(at_once > 0, "the test has forced nothing: each write has waited out the other's look");
    fleet.until_served(&reader).await;
    fleet.new.accept().await;
    until("the mirror is back", async || fleet.first.metrics("crossfade_mirror_up").await == 1.0).await;
    fleet.first.settle().await;
    fleet.databases.assert_equal().await;
}

/// What CALL writes is owed before it runs, and COMMIT PREPARED shows debts of long ago: another proxy's look from before must be void when they are acknowledged.
#[tokio::test]
async fn r3_what_a_call_or_a_prepared_transaction_has_written_no_other_proxy_misses() {
    let fleet = Fleet::start().await;
    let (writer, reader) = (fleet.client(&fleet.first).await, fleet.client(&fleet.second).await);
    writer.batch_execute("INSERT INTO notes VALUES (1, '0')").await.expect("writes");
    let prepare = "BEGIN; UPDATE notes SET body = 'prepared' WHERE id = 1; PREPARE TRANSACTION 'p'";
    for (before, shows, body) in
        [("", "CALL set_body('called')", "called"), (prepare, "COMMIT PREPARED 'p'", "prepared")]
    {
        // What is prepared holds its rows: repair must be done with them.
        fleet.until_served(&reader).await;
        writer.batch_execute(before).await.expect("runs");
        fleet.until_served(&reader).await;
        writer.batch_execute(shows).await.expect("runs");
        assert_eq!(read(&reader, BODY).await.as_deref(), Some(body), "acknowledged, and the other proxy serves less");
    }
    fleet.first.settle().await;
    fleet.databases.assert_equal().await;
}

/// Interleaving of a login: new is cut off while the session's settings go over. That says nothing of the settings: later reads are served again.
#[tokio::test]
async fn a_session_whose_settings_were_cut_off_on_their_way_is_served_again() {
    let mut stage = Stage::start("").await;
    let (writer, reader) = (stage.pair.client().await, stage.pair.client().await);
    writer.batch_execute("INSERT INTO notes VALUES (1, 'x')").await.expect("writes");
    let mut struck = stage.new.trip(Way::ToServer, b"RESET ALL", Trip::CutBefore);
    until("its settings go over", async || {
        assert_eq!(read(&reader, BODY).await.as_deref(), Some("x"));
        struck.try_recv().is_ok()
    })
    .await;
    for _ in 0..20 {
        assert_eq!(read(&reader, BODY).await.as_deref(), Some("x"));
    }
    // The one that was under way. (Without a word from anybody the session would stay so, until definitions are read again.)
    let unfit = stage.pair.proxy.metrics("crossfade_read_kept_total{reason=\"state\"}").await;
    assert!(unfit <= 1.0, "{unfit} reads were kept as if new could not have this session's settings");
    assert_eq!(stage.until_served(&reader, BODY).await.as_deref(), Some("x"));
    // From now on each of its statements is drawn for itself.
    stage.pair.proxy.set_more("reads: { serve: 50%, serve_by: statement }");
    let kept = async || stage.pair.proxy.metrics("crossfade_read_kept_total{reason=\"share\"}").await;
    until("a statement was kept", async || {
        read(&reader, BODY).await;
        kept().await > 0.0
    })
    .await;
    stage.until_served(&reader, BODY).await;
}
