//! Several proxies in front of one migration: whatever one of them does or does not notice, no two transactions write under different authorities.

mod common;

use std::time::Duration;

use common::pair::{APP, CONTROL, DATABASE};
use common::{Databases, Proxy, until};
use crossfade::cluster::processes::{Signal, signal};
use tokio_postgres::{Client, NoTls};

/// The column `port` says which server has executed the client's statement: a default is evaluated there, and goes to the mirror as a value.
const SCHEMA: &str = "CREATE TABLE notes (id int PRIMARY KEY, phase text NOT NULL DEFAULT '', port int NOT NULL DEFAULT current_setting('port')::int)";

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("connects");
    tokio::spawn(async move { drop(connection.await) });
    client
}

async fn client(proxy: &Proxy) -> Client {
    connect(&proxy.url_as(APP.0, APP.1, DATABASE)).await
}

/// Two proxies of one fleet, in dual-write. Nothing is owed.
async fn fleet(more: &str) -> (Databases, Proxy, Proxy) {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let mut first = Proxy::start(databases.proxy_config("old", more)).await;
    first.set_phase("dual-write").await;
    first.settle().await;
    first.verify().await;
    let second = Proxy::start(databases.proxy_config("old", &format!("fleet: true\n{more}"))).await;
    assert!(second.holds("dual-write").await, "a fleet's proxy goes by the row, not by its file");
    (databases, first, second)
}

/// Ids of rows that one side has and the other lacks.
async fn only_on_one(databases: &Databases) -> Vec<String> {
    let read = "SELECT id FROM notes ORDER BY id";
    let old = databases.old.run(DATABASE, read).await.unwrap();
    let new = databases.new.run(DATABASE, read).await.unwrap();
    let (old, new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    let lacks = |left: &[&str], right: &[&str]| -> Vec<String> {
        left.iter().filter(|id| !right.contains(id)).map(|id| (*id).to_owned()).collect()
    };
    [lacks(&old, &new), lacks(&new, &old)].concat()
}

#[tokio::test]
async fn a_proxy_whose_file_lags_follows_the_row_and_its_clients_see_no_error() {
    let (databases, mut first, second) = fleet("").await;
    let (a, b) = (client(&first).await, client(&second).await);
    b.batch_execute("SET application_name = 'kept'; PREPARE put AS INSERT INTO notes VALUES ($1, 'sql')")
        .await
        .unwrap();
    let put = b.prepare("INSERT INTO notes VALUES ($1, $2)").await.expect("prepares");
    let mut id = 0;
    for phase in ["new-primary", "dual-write"] {
        first.set_phase(phase).await;
        // No wait: what the other proxy does not know yet, the databases tell it. In each way of beginning a transaction.
        id += 10;
        b.batch_execute(&format!("INSERT INTO notes VALUES ({id}, '{phase}')")).await.expect("a Query of its own");
        first.set_phase(if phase == "new-primary" { "dual-write" } else { "new-primary" }).await;
        b.execute(&put, &[&(id + 1), &phase]).await.expect("a prepared statement");
        first.set_phase(phase).await;
        b.batch_execute(&format!("BEGIN; INSERT INTO notes VALUES ({}, ''); COMMIT", id + 2)).await.expect("a text");
        first.set_phase(if phase == "new-primary" { "dual-write" } else { "new-primary" }).await;
        b.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE -- a block").await.expect("a block");
        b.execute(&put, &[&(id + 3), &phase]).await.expect("in a block");
        let level = b.query_one("SELECT current_setting('transaction_isolation')", &[]).await.unwrap();
        assert_eq!(level.get::<_, String>(0), "serializable", "BEGIN is repeated with its options");
        b.batch_execute("COMMIT").await.expect("commits");
        first.set_phase(phase).await;
        let begin = b.prepare("START TRANSACTION").await.expect("prepares");
        first.set_phase(if phase == "new-primary" { "dual-write" } else { "new-primary" }).await;
        b.execute(&begin, &[]).await.expect("a prepared BEGIN");
        b.execute(&put, &[&(id + 4), &phase]).await.expect("in its block");
        b.batch_execute("COMMIT").await.expect("commits");
        b.batch_execute("DO $$ BEGIN INSERT INTO notes VALUES (0, '', 1); DELETE FROM notes WHERE id = 0; END $$")
            .await
            .unwrap();
        let name = b.query_one("SELECT current_setting('application_name')", &[]).await.unwrap();
        assert_eq!(name.get::<_, String>(0), "kept");
        a.batch_execute(&format!("INSERT INTO notes VALUES ({}, '')", id + 5)).await.expect("on the mover's side");
        first.settle().await;
        databases.assert_equal().await;
        let ports = format!("SELECT port FROM notes WHERE id BETWEEN {id} AND {} ORDER BY id", id + 5);
        let ports = databases.old.run(DATABASE, &ports).await.unwrap();
        let (new, old) = (databases.new.port().to_string(), databases.old.port().to_string());
        let [here, there] = if phase == "new-primary" { [&new, &old] } else { [&old, &new] };
        let expected = [here, there, here, there, there, there].map(String::as_str);
        assert_eq!(ports.lines().collect::<Vec<_>>(), expected, "each where its authority was");
    }
    assert_eq!(only_on_one(&databases).await, Vec::<String>::new());
    let rows = databases.old.run(DATABASE, "SELECT count(*) FROM notes").await.unwrap();
    assert_eq!(rows.trim(), "12");
    until("the file's disagreement shows", async || second.metrics("crossfade_file_disagrees").await == 1.0).await;
    let (_, status) = second.http("/status").await.expect("answers");
    assert!(status.contains("this file says old"), "{status}");
}

/// Sessions of clients on new, by whichever proxy.
const ON_NEW: &str = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND backend_type = 'client backend'";

/// Whether the server session that serves this client on that side was there before the move that has made the side authority was written.
async fn was_there_before(client: &Client, side: &crossfade::cluster::Cluster) -> bool {
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("is served").get(0);
    let text = format!(
        "SELECT backend_start < (SELECT max(at) FROM crossfade.history WHERE event = 'move') FROM pg_stat_activity WHERE pid = {pid}"
    );
    side.run(DATABASE, &text).await.expect("reads").trim() == "t"
}

/// Before the authority changes, sessions of all proxies log in on the other side: whoever is held waits for no login.
#[tokio::test]
async fn sessions_log_in_before_the_authority_changes() {
    let (databases, mut first, second) = fleet("").await;
    let (a, b) = (client(&first).await, client(&second).await);
    let mut early = 0;
    // A proxy that is slow for a moment is not waited for: there and back until both were there in time on either side.
    for _ in 0..5 {
        for (phase, side) in [("new-primary", &databases.new), ("dual-write", &databases.old)] {
            first.set_phase(phase).await;
            second.reaches(phase).await;
            let both = was_there_before(&a, side).await && was_there_before(&b, side).await;
            early = if both { early + 1 } else { 0 };
            first.settle().await;
            first.verify().await;
        }
        if early >= 2 {
            break;
        }
    }
    assert!(early >= 2, "they logged in when the move was made");
    // Nobody keeps what it does not need.
    until("no session is left on new", async || databases.new.run(DATABASE, ON_NEW).await.unwrap().trim() == "0").await;
}

/// A login that the server has ended meanwhile is made again; where a move is given up, whoever has logged in leaves.
#[tokio::test]
async fn a_login_before_a_move_may_come_to_nothing() {
    let (databases, mut first, second) = fleet("move: { pause: 1s }").await;
    let (a, b) = (client(&first).await, client(&second).await);
    let holder = client(&second).await;
    holder.batch_execute("BEGIN; INSERT INTO notes VALUES (1)").await.expect("writes");
    let on_new = async |count: &str| databases.new.run(DATABASE, ON_NEW).await.unwrap().trim() == count;
    first.request_phase("new-primary");
    until("both have logged in on new", async || on_new("2").await).await;
    until("they leave when the move is given up", async || on_new("0").await).await;
    // What was prepared for the move goes, and what was set must move all the same.
    a.batch_execute("SET application_name = 'kept'").await.expect("sets");
    a.batch_execute("DEALLOCATE ALL").await.expect("forgets");
    // The move is tried again and again: now the server ends what has logged in, and then the transaction ends.
    until("both have logged in on new again", async || on_new("2").await).await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app' AND backend_type = 'client backend'";
    databases.new.run(DATABASE, end).await.expect("ends them");
    holder.batch_execute("COMMIT").await.expect("commits");
    first.reaches("new-primary").await;
    second.reaches("new-primary").await;
    for (id, client) in [(2, &a), (3, &b), (4, &holder)] {
        client.execute("INSERT INTO notes VALUES ($1)", &[&id]).await.expect("goes on");
    }
    assert_eq!(a.query_one("SHOW application_name", &[]).await.expect("shows").get::<_, String>(0), "kept");
    first.settle().await;
    assert!(only_on_one(&databases).await.is_empty());
    assert_eq!(databases.new.run(DATABASE, "SELECT count(*) FROM notes").await.unwrap().trim(), "4");
}

#[tokio::test]
async fn a_frozen_proxy_cannot_write_in_an_epoch_that_is_over() {
    let (databases, mut first, second) = fleet("").await;
    let (inside, outside) = (client(&second).await, client(&second).await);
    outside.batch_execute("SELECT 1").await.unwrap();
    inside.batch_execute("BEGIN; INSERT INTO notes VALUES (1, 'frozen')").await.unwrap();
    signal(Signal::Freeze, &[second.pid()]);
    first.request_phase("new-primary");
    // Its session is ended (B7), and nobody waits for it for longer. Its other session holds nothing up.
    first.reaches("new-primary").await;
    let writer = client(&first).await;
    writer.batch_execute("INSERT INTO notes VALUES (3, 'new')").await.expect("new is authority");
    assert!(first.log().contains("transactions that the move cannot wait for are ended"), "{}", first.log());
    signal(Signal::Continue, &[second.pid()]);
    assert!(inside.batch_execute("COMMIT").await.is_err(), "its epoch is over");
    outside.batch_execute("INSERT INTO notes VALUES (4, 'thawed')").await.expect("where new is authority");
    first.settle().await;
    assert_eq!(only_on_one(&databases).await, Vec::<String>::new());
    let rows = databases.new.run(DATABASE, "SELECT string_agg(id::text, ' ' ORDER BY id) FROM notes").await.unwrap();
    assert_eq!(rows.trim(), "3 4");
}

/// Interleaving 10: what lets go of advisory locks does not let go of the epoch's.
#[tokio::test]
async fn no_reset_lets_go_of_the_epoch() {
    let (databases, mut first, second) = fleet("move: { pause: 1s }").await;
    let held = "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation WHERE c.relname LIKE 'epoch%' AND l.mode = 'AccessShareLock' AND l.granted";
    let b = client(&second).await;
    for (begin, reset) in [
        ("BEGIN", "SELECT pg_advisory_unlock_all()"),
        ("BEGIN", "CLOSE ALL; UNLISTEN *; RESET ALL"),
        ("BEGIN", "SAVEPOINT a; ROLLBACK TO a"),
        ("BEGIN; SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT 1"),
        (
            "BEGIN READ ONLY; SET TRANSACTION READ WRITE; INSERT INTO notes VALUES (98)",
            "DELETE FROM notes WHERE id = 98",
        ),
        ("BEGIN; INSERT INTO notes VALUES (99); COMMIT AND CHAIN; DELETE FROM notes WHERE id = 99", "SELECT 1"),
        (
            "BEGIN; COMMIT AND CHAIN; SAVEPOINT a; INSERT INTO notes VALUES (97); ROLLBACK TO a",
            "INSERT INTO notes VALUES (97); DELETE FROM notes WHERE id = 97",
        ),
    ] {
        b.batch_execute(begin).await.expect(begin);
        b.batch_execute(reset).await.expect(reset);
        let count = databases.old.run(DATABASE, held).await.unwrap();
        assert_eq!(count.trim(), "1", "{begin}; {reset}");
        b.batch_execute("COMMIT").await.expect("commits");
    }
    assert_eq!(databases.old.run(DATABASE, held).await.unwrap().trim(), "0");
    b.batch_execute("BEGIN; INSERT INTO notes VALUES (1); SELECT pg_advisory_unlock_all()").await.unwrap();
    first.request_phase("new-primary");
    until("the move waits", async || {
        let status = first.http("/status").await.map(|(_, status)| status).unwrap_or_default();
        status.contains("transactions that other proxies began")
    })
    .await;
    b.batch_execute("COMMIT").await.expect("was waited for");
    // It is not tried again at once: clients were held in vain. But whoever edits the file means it.
    first.request_phase("dual-write");
    tokio::time::sleep(Duration::from_millis(500)).await;
    first.request_phase("new-primary");
    b.batch_execute("DISCARD ALL").await.expect("resets");
    first.reaches("new-primary").await;
    until("followed", async || second.holds("new-primary").await).await;
    b.batch_execute("INSERT INTO notes VALUES (2)").await.expect("goes on");
    first.settle().await;
    databases.assert_equal().await;
}

#[tokio::test]
async fn a_dump_that_holds_the_epoch_is_named_at_once() {
    let (databases, mut first, _second) = fleet("").await;
    let dump = connect(&databases.old.url_as(CONTROL.0, CONTROL.1, DATABASE)).await;
    dump.batch_execute("SET application_name = 'pg_dump'; BEGIN").await.unwrap();
    let tables = dump.query("SELECT relname::text FROM pg_class WHERE relname LIKE 'epoch%'", &[]).await.unwrap();
    assert_eq!(tables.len(), 1, "one epoch, one table");
    let lock = format!("LOCK TABLE crossfade.{} IN ACCESS SHARE MODE", tables[0].get::<_, String>(0));
    dump.batch_execute(&lock).await.unwrap();
    first.request_phase("new-primary");
    until("it is named", async || {
        let status = first.http("/status").await.map(|(_, status)| status).unwrap_or_default();
        status.contains("(pg_dump) on old holds the lock")
    })
    .await;
    assert_eq!(first.metrics("crossfade_move_pause_seconds_count").await, 1.0, "nobody was held for it");
    dump.batch_execute("COMMIT").await.unwrap();
    first.reaches("new-primary").await;
}

/// Two proxies of one fleet, in phase old.
async fn fleet_in_old(more: &str) -> (Databases, Proxy, Proxy) {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let first = Proxy::start(databases.proxy_config("old", more)).await;
    let second = Proxy::start(databases.proxy_config("old", &format!("fleet: true\n{more}"))).await;
    (databases, first, second)
}

/// In phase old transactions take no lock: a proxy that hears of the move holds its clients and says that it is still.
#[tokio::test]
async fn a_phase_without_a_mirror_is_left_when_every_proxy_is_still() {
    let (databases, mut first, second) = fleet_in_old("move: { pause: 2s }").await;
    let (inside, outside) = (client(&second).await, client(&second).await);
    inside.batch_execute("BEGIN; SELECT 1").await.unwrap();
    first.request_phase("dual-write");
    let waits = format!("the proxy that listens on 127.0.0.1:{} has transactions", second.port());
    until("the move names who holds it", async || {
        first.http("/status").await.is_some_and(|(_, status)| status.contains(&waits))
    })
    .await;
    inside.batch_execute("INSERT INTO notes VALUES (1, 'old'); COMMIT").await.expect("was waited for");
    outside.batch_execute("INSERT INTO notes VALUES (2, 'released')").await.expect("goes on");
    // It is not tried again at once: clients were held in vain.
    first.request_phase("old");
    tokio::time::sleep(Duration::from_millis(300)).await;
    first.set_phase("dual-write").await;
    for id in 3..20 {
        let through = if id % 2 == 0 { &inside } else { &outside };
        through.batch_execute(&format!("INSERT INTO notes VALUES ({id}, 'dual-write')")).await.expect("no error");
    }
    first.settle().await;
    assert_eq!(only_on_one(&databases).await, Vec::<String>::new());
    assert!(second.holds("dual-write").await);
}

/// Interleaving: a proxy is frozen in the middle of a transaction that has written nothing; the phase leaves old; it wakes up and writes.
#[tokio::test]
async fn a_frozen_proxy_cannot_write_unmirrored_after_old_was_left() {
    let (databases, mut first, second) = fleet_in_old("").await;
    let (inside, idle) = (client(&second).await, client(&second).await);
    idle.batch_execute("SELECT 1").await.unwrap();
    inside.batch_execute("BEGIN; SELECT 1").await.unwrap();
    signal(Signal::Freeze, &[second.pid()]);
    first.set_phase("dual-write").await;
    first.settle().await;
    signal(Signal::Continue, &[second.pid()]);
    assert!(inside.batch_execute("INSERT INTO notes VALUES (1, 'frozen')").await.is_err(), "its session was ended");
    let _ = idle.batch_execute("INSERT INTO notes VALUES (2, 'idle')").await;
    let late = client(&second).await;
    late.batch_execute("INSERT INTO notes VALUES (3, 'late')").await.expect("a new session learns what holds");
    first.settle().await;
    assert_eq!(only_on_one(&databases).await, Vec::<String>::new());
    assert!(second.holds("dual-write").await);
}

#[tokio::test]
async fn of_two_operators_one_wins_and_the_other_is_told() {
    let (databases, mut first, mut second) = fleet("").await;
    first.request_phase("new-primary");
    second.request_phase("dual-read");
    until("both have come to rest", async || {
        let mut at_rest = true;
        for proxy in [&first, &second] {
            let (_, status) = proxy.http("/status").await.expect("answers");
            let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
            at_rest &= status["epoch"].as_u64() > Some(1)
                && (status["phase"] == status["wanted"]
                    || status["waiting_for"].to_string().contains("this file says"));
        }
        at_rest
    })
    .await;
    let row = "SELECT phase FROM crossfade.migration ORDER BY epoch DESC";
    let held = databases.old.run(DATABASE, row).await.unwrap();
    until("both know it", async || first.holds(held.trim()).await && second.holds(held.trim()).await).await;
    for (id, proxy) in [(1, &first), (2, &second)] {
        let client = client(proxy).await;
        client.batch_execute(&format!("INSERT INTO notes VALUES ({id}, '')")).await.expect("goes on");
    }
    first.settle().await;
    databases.assert_equal().await;
}

/// Interleaving 14: a proxy whose file defines other tables would leave the writes of some unmirrored. It serves nobody, and says why.
#[tokio::test]
async fn a_proxy_whose_file_defines_other_tables_does_not_write() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(&format!("{SCHEMA}; CREATE TABLE other (id int PRIMARY KEY)")).await;
    let mut first = Proxy::start(databases.proxy_config("old", "")).await;
    let mut second = Proxy::start(databases.proxy_config("old", "fleet: true\nexcept: [public.notes]")).await;
    let writer = client(&second).await;
    writer
        .batch_execute("INSERT INTO notes VALUES (1, 'old')")
        .await
        .expect("in old the definition is nobody's matter");
    first.set_phase("dual-write").await;
    let waiting = tokio::spawn(async move {
        let written = writer.batch_execute("INSERT INTO notes VALUES (2, 'waits')").await;
        written.map(|()| writer)
    });
    until("it says why", async || {
        let (_, status) = second.http("/status").await.expect("answers");
        status.contains("this file defines other tables") && status.contains("not public.notes")
    })
    .await;
    assert!(!waiting.is_finished(), "what it would not mirror it does not pass on");
    // The same list, and it goes along; the client has only waited.
    second.set_more("fleet: true");
    let writer = waiting.await.unwrap().expect("no error");
    writer.batch_execute("INSERT INTO notes VALUES (3, 'mirrored')").await.expect("goes on");
    first.settle().await;
    databases.assert_equal().await;
    // While writes are mirrored it stays what it is.
    second.set_more("fleet: true\nexcept: [public.notes]");
    until("the file is refused", async || second.metrics("crossfade_config_reload_failures_total").await == 1.0).await;
    writer.batch_execute("INSERT INTO notes VALUES (4, 'mirrored')").await.expect("goes on");
    first.settle().await;
    databases.assert_equal().await;
}

/// The mover cannot write its claim, and withdraws; the other proxy has seen the pointer, and finishes the move. One of the two, never both.
#[tokio::test]
async fn a_move_is_withdrawn_or_finished_by_another_and_never_both() {
    let (databases, mut first, second) = fleet("").await;
    let obstacle = "CREATE FUNCTION crossfade.refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.4); RAISE ''not now''; END';
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON crossfade.migration FOR EACH ROW EXECUTE FUNCTION crossfade.refuse()";
    databases.new.run(DATABASE, obstacle).await.unwrap();
    let mut clients = Vec::new();
    for (number, proxy) in [&first, &second].into_iter().enumerate() {
        let client = client(proxy).await;
        clients.push(tokio::spawn(async move {
            for id in 0..150 {
                let id = number * 1000 + id;
                client.batch_execute(&format!("INSERT INTO notes VALUES ({id}, '')")).await.expect("no error");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }));
    }
    first.request_phase("new-primary");
    tokio::time::sleep(Duration::from_secs(2)).await;
    databases.new.run(DATABASE, "DROP TRIGGER refuse ON crossfade.migration").await.unwrap();
    first.reaches("new-primary").await;
    until("followed", async || second.holds("new-primary").await).await;
    for client in clients {
        client.await.expect("no error");
    }
    first.settle().await;
    databases.assert_equal().await;
    let rows = databases.new.run(DATABASE, "SELECT count(*) FROM notes").await.unwrap();
    assert_eq!(rows.trim(), "300");
}
