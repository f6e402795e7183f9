//! A mover that dies at each step of a move, with clients on other proxies: the move is finished or undone, never half, and the databases' own records show
//! that nobody has written under the wrong authority.
//!
//! Each row is stamped by a trigger on the server that executes the client's statement: with that server, and with what its phase row says in the very
//! transaction. (The mirror's sessions fire no triggers.) A write under an authority that is over carries a row that names the other side.

#[path = "../common/mod.rs"]
mod common;

mod cut;
mod slow;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::pair::{APP, CONTROL, DATABASE};
use common::{Databases, Proxy, proof, until};
use crossfade::cluster::Cluster;
use tokio_postgres::{Client, NoTls};

const SCHEMA: &str =
    "CREATE TABLE notes (id bigint PRIMARY KEY, epoch bigint, authority text, port int); CREATE SEQUENCE tickets";

const STAMP: &str = "CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN \
        SELECT m.epoch, m.authority INTO NEW.epoch, NEW.authority FROM crossfade.migration m; NEW.port := current_setting('port')::int; RETURN NEW; END $$; \
    CREATE TRIGGER stamp BEFORE INSERT ON notes FOR EACH ROW EXECUTE FUNCTION stamp()";

/// A machine that is busy with other tests must not degrade writes: their debts would close the gates.
pub(crate) const TIMEOUT: &str = "mirror: { timeout: 15s }";

/// Stepping stones: while the test holds lock 42 on a side, a row of its phase table is not written.
const STONE: &str = "CREATE FUNCTION crossfade.stone() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NEW; END'";
/// The side that loses the authority: before the row is written. The other side has its row by then, too, and neither is committed.
const STONE_ON_OLD: &str = "CREATE TRIGGER stone BEFORE INSERT OR UPDATE ON crossfade.migration FOR EACH ROW EXECUTE FUNCTION crossfade.stone()";
/// The side that gains it: at COMMIT, when the pointer stands.
const STONE_ON_NEW: &str = "CREATE CONSTRAINT TRIGGER stone AFTER INSERT OR UPDATE ON crossfade.migration \
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION crossfade.stone()";
/// Movers that wait for a lock.
const WAITS: &str = "SELECT count(*) FROM pg_stat_activity \
    WHERE application_name IN ('crossfade move', 'crossfade gates') AND wait_event_type = 'Lock'";
/// A mover that is killed in COMMIT: its server has not heard of it yet, and would go on.
const ENDED: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'crossfade move' AND wait_event_type = 'Lock'";

/// How a connection ended.
pub(crate) type Ended = tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>;

pub(crate) async fn connect_and_hear(url: &str) -> Result<(Client, Ended), tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    Ok((client, tokio::spawn(connection)))
}

pub(crate) async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    Ok(connect_and_hear(url).await?.0)
}

/// What the client was told. What the server says between two statements the driver gives to the connection, and the next statement finds it closed.
pub(crate) async fn told(error: tokio_postgres::Error, ended: Ended) -> String {
    if !error.is_closed() {
        return format!("{error:?}");
    }
    format!("{:?}", ended.await.expect("joins"))
}

/// Clients that insert all the time.
pub(crate) struct Writers {
    stop: Arc<AtomicBool>,
    next: Arc<AtomicI64>,
    written: Arc<AtomicU64>,
    longest_us: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<(Vec<i64>, Vec<String>)>>,
}

impl Writers {
    pub(crate) fn start(proxies: &[&Proxy], each: usize) -> Writers {
        Writers::numbered(proxies, each, 1)
    }

    /// Their first row is of this number.
    pub(crate) fn numbered(proxies: &[&Proxy], each: usize, first: i64) -> Writers {
        let mut writers = Writers {
            stop: Arc::default(),
            next: Arc::new(AtomicI64::new(first)),
            written: Arc::default(),
            longest_us: Arc::default(),
            tasks: Vec::new(),
        };
        for proxy in proxies {
            for _ in 0..each {
                let url = proxy.url_as(APP.0, APP.1, DATABASE);
                let (stop, next) = (writers.stop.clone(), writers.next.clone());
                let (written, longest) = (writers.written.clone(), writers.longest_us.clone());
                writers.tasks.push(tokio::spawn(async move {
                    let (mut acknowledged, mut errors) = (Vec::new(), Vec::new());
                    while !stop.load(Ordering::SeqCst) {
                        let Ok((client, ended)) = connect_and_hear(&url).await else {
                            tokio::time::sleep(Duration::from_millis(50)).await;
                            continue;
                        };
                        while !stop.load(Ordering::SeqCst) {
                            let id = next.fetch_add(1, Ordering::SeqCst);
                            let begun = Instant::now();
                            let done = client.batch_execute(&format!("INSERT INTO notes (id) VALUES ({id})")).await;
                            longest.fetch_max(begun.elapsed().as_micros() as u64, Ordering::SeqCst);
                            match done {
                                Ok(()) => acknowledged.push(id),
                                Err(error) => {
                                    errors.push(told(error, ended).await);
                                    break;
                                }
                            }
                            written.fetch_add(1, Ordering::SeqCst);
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                    }
                    (acknowledged, errors)
                }));
            }
        }
        writers
    }

    /// Waits until each can have written since.
    pub(crate) async fn go_on(&self) {
        let enough = self.written.load(Ordering::SeqCst) + 3 * self.tasks.len() as u64;
        until("clients go on", async || self.written.load(Ordering::SeqCst) > enough).await;
    }

    pub(crate) async fn end(self) -> (Vec<i64>, Vec<String>) {
        self.stop.store(true, Ordering::SeqCst);
        let (mut acknowledged, mut errors) = (Vec::new(), Vec::new());
        for task in self.tasks {
            let (written, told) = task.await.expect("joins");
            acknowledged.extend(written);
            errors.extend(told);
        }
        (acknowledged, errors)
    }
}

/// Proxies of one fleet in dual-write, with stamps on both sides.
pub(crate) async fn fleet(others: usize, more: &str) -> (Databases, Vec<Proxy>) {
    let databases = Databases::start(&[("max_connections", "300")]).await;
    databases.run_on_both(SCHEMA).await;
    for side in [&databases.old, &databases.new] {
        side.run(DATABASE, STAMP).await.expect("stamps");
    }
    let mut first = Proxy::start(databases.proxy_config("old", more)).await;
    first.set_phase("dual-write").await;
    first.settle().await;
    let mut proxies = vec![first];
    for _ in 0..others {
        proxies.push(Proxy::start(databases.proxy_config("dual-write", &format!("fleet: true\n{more}"))).await);
    }
    (databases, proxies)
}

pub(crate) fn mover(file: &Path, phase: &str) -> tokio::process::Child {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_crossfade"))
        .args(["phase", phase, "--force=verified,check", "--reason", "a test", "--config"])
        .arg(file)
        .stdout(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("runs")
}

/// Starts a mover that comes to wait for a lock on that side. One that a gate keeps away (something was owed just then) is started again.
async fn mover_at(proxy: &Proxy, side: &Cluster) -> tokio::process::Child {
    let mut moving = mover(&proxy.config_path(), "new-primary");
    until("the mover stands at the stepping stone", async || {
        if moving.try_wait().expect("waits").is_some() {
            moving = mover(&proxy.config_path(), "new-primary");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        side.run(DATABASE, WAITS).await.is_ok_and(|count| count.trim() != "0")
    })
    .await;
    moving
}

/// Moves; again where a gate was closed just then.
pub(crate) async fn moves_to(proxy: &Proxy, phase: &str) {
    until(&format!("{phase} is reached"), async || {
        mover(&proxy.config_path(), phase).wait().await.expect("runs").success()
    })
    .await;
}

/// Each client that was sent away was told why, and by whom: the connection never just closed.
pub(crate) fn assert_told(errors: &[String]) {
    let told = |error: &String| ["E57P01", "E08006", "E57P03"].iter().any(|code| error.contains(code));
    let bare: Vec<&String> = errors.iter().filter(|error| !told(error)).collect();
    assert!(bare.is_empty(), "sent away without a word: {bare:#?}");
}

/// From the databases' records: each row was written where its server's phase row named itself, and each epoch has one authority.
pub(crate) async fn assert_one_authority(databases: &Databases) {
    let (old, new) = (databases.old.port(), databases.new.port());
    let wrong = format!(
        "SELECT count(*) FROM notes WHERE port <> CASE authority WHEN 'old' THEN {old} ELSE {new} END OR authority IS NULL"
    );
    let epochs = "SELECT count(*) FROM (SELECT epoch FROM notes GROUP BY epoch HAVING count(DISTINCT port) > 1) e";
    for side in [&databases.old, &databases.new] {
        assert_eq!(side.run(DATABASE, &wrong).await.unwrap().trim(), "0", "written under the wrong authority");
        assert_eq!(side.run(DATABASE, epochs).await.unwrap().trim(), "0", "two authorities in one epoch");
    }
}

pub(crate) async fn assert_none_lost(databases: &Databases, acknowledged: &[i64]) {
    databases.assert_equal().await;
    let client = connect(&databases.new.url_as(CONTROL.0, CONTROL.1, DATABASE)).await.expect("connects");
    let there = client.query("SELECT id FROM notes WHERE id = ANY ($1)", &[&acknowledged]).await.expect("reads").len();
    assert_eq!(there, acknowledged.len(), "an acknowledged write is missing");
}

/// A write around the proxies: into the authority it goes, and nowhere else, whatever the mover has left behind.
async fn assert_fenced(databases: &Databases, phase: &str) {
    let direct = "BEGIN; INSERT INTO notes (id) VALUES (-42); ROLLBACK";
    let (old, new) = (&databases.old, &databases.new);
    let (authority, other) = if phase == "new-primary" { (new, old) } else { (old, new) };
    authority.run(DATABASE, direct).await.expect("the authority is open");
    let refused = other.run(DATABASE, direct).await.expect_err("the other side is closed").to_string();
    assert!(refused.contains("went around the proxy"), "{refused}");
}

#[tokio::test]
async fn a_mover_that_dies_at_any_step_leaves_no_half_of_a_move() {
    let (databases, proxies) = fleet(1, &format!("{TIMEOUT}\nfence: true")).await;
    for (side, stone) in [(&databases.old, STONE_ON_OLD), (&databases.new, STONE_ON_NEW)] {
        side.run(DATABASE, &format!("{STONE}; {stone}")).await.expect("lays stones");
    }
    let writers = Writers::start(&proxies.iter().collect::<Vec<_>>(), 4);
    writers.go_on().await;
    // Where it dies, what keeps it there, and whether the pointer was written by then.
    let steps = [
        (
            "before the authority's lock",
            &databases.old,
            "BEGIN; LOCK TABLE crossfade.epoch_EPOCH IN ACCESS SHARE MODE",
            false,
        ),
        (
            "before the mirror's lock",
            &databases.new,
            "BEGIN; LOCK TABLE crossfade.epoch_EPOCH IN ACCESS SHARE MODE",
            false,
        ),
        ("under both locks", &databases.new, "BEGIN; LOCK TABLE crossfade.verified IN ACCESS EXCLUSIVE MODE", false),
        ("before the pointer", &databases.old, "BEGIN; SELECT pg_advisory_xact_lock(42)", false),
        ("between pointer and claim", &databases.new, "BEGIN; SELECT pg_advisory_xact_lock(42)", true),
        ("with a claim under way", &databases.new, "BEGIN; SELECT pg_advisory_xact_lock(42)", true),
    ];
    for (what, side, stone, finished) in steps {
        eprintln!("the mover dies {what}");
        let row = databases.old.run(DATABASE, "SELECT epoch FROM crossfade.migration").await.unwrap();
        let stone = stone.replace("EPOCH", row.trim());
        let held = connect(&side.url_as(CONTROL.0, CONTROL.1, DATABASE)).await.expect("connects");
        held.batch_execute(&stone).await.expect(what);
        let mut moving = mover_at(&proxies[0], side).await;
        moving.kill().await.expect("kills");
        if what == "between pointer and claim" {
            side.run(DATABASE, ENDED).await.expect("ends");
            until("the claim was rolled back", async || {
                side.run(DATABASE, WAITS).await.is_ok_and(|count| count.trim() == "0")
            })
            .await;
        }
        held.batch_execute("ROLLBACK").await.expect("lets go");
        let phase = if finished { "new-primary" } else { "dual-write" };
        writers.go_on().await;
        for proxy in &proxies {
            until(&format!("{phase} holds when the mover died {what}"), async || proxy.holds(phase).await).await;
        }
        writers.go_on().await;
        assert_fenced(&databases, phase).await;
        if finished {
            // The way back, through the same proxies.
            moves_to(&proxies[0], "dual-write").await;
            writers.go_on().await;
        }
    }
    let (acknowledged, errors) = writers.end().await;
    assert_eq!(errors, Vec::<String>::new(), "clients have only waited");
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &acknowledged).await;
}

/// The authority is restarted while the mover holds all locks; then the mirror. Clients see what a restart does, and no write is lost.
#[tokio::test]
async fn a_server_that_restarts_under_a_move_undoes_it() {
    let (mut databases, proxies) = fleet(1, "").await;
    let writers = Writers::start(&proxies.iter().collect::<Vec<_>>(), 2);
    writers.go_on().await;
    for authority in [true, false] {
        let held = connect(&databases.new.url_as(CONTROL.0, CONTROL.1, DATABASE)).await.expect("connects");
        held.batch_execute("BEGIN; LOCK TABLE crossfade.verified IN ACCESS EXCLUSIVE MODE").await.expect("locks");
        let mut moving = mover_at(&proxies[0], &databases.new).await;
        let side = if authority { &mut databases.old } else { &mut databases.new };
        side.kill9();
        side.start().await.expect("starts");
        drop(held);
        assert!(!moving.wait().await.expect("ends").success(), "it cannot have moved");
        writers.go_on().await;
        for proxy in &proxies {
            assert!(proxy.holds("dual-write").await);
        }
    }
    let (acknowledged, _) = writers.end().await;
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &acknowledged).await;
}

/// Three proxies, 24 clients (48 at length), moves there and back: prints how long clients were held. (Debug builds, shared cores: figures are for comparison.)
#[tokio::test]
async fn how_long_moves_hold_clients() {
    if !proof() {
        return eprintln!("it measures: see `make proof`");
    }
    let (databases, proxies) = fleet(2, TIMEOUT).await;
    let writers = Writers::start(&proxies.iter().collect::<Vec<_>>(), 16);
    writers.go_on().await;
    let moves = 50;
    let clients = writers.tasks.len();
    for number in 0..moves {
        let phase = if number % 2 == 0 { "new-primary" } else { "dual-write" };
        moves_to(&proxies[0], phase).await;
        writers.go_on().await;
        eprintln!("move {number} to {phase}: {} writes so far", writers.written.load(Ordering::SeqCst));
    }
    let longest = writers.longest_us.load(Ordering::SeqCst) as f64 / 1000.0;
    let (acknowledged, errors) = writers.end().await;
    assert_eq!(errors, Vec::<String>::new(), "clients have only waited");
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &acknowledged).await;
    let pauses = "SELECT percentile_disc(ARRAY[0.5, 1]) WITHIN GROUP (ORDER BY (detail->>'pause_ms')::float8) FROM crossfade.history \
        WHERE event = 'move' AND detail->>'why' = 'a test'";
    let pauses = databases.old.run(DATABASE, pauses).await.unwrap();
    println!(
        "{moves} moves, 3 proxies, {clients} clients, {} writes: median and worst pause in ms {}, longest wait of a client {longest:.0} ms",
        acknowledged.len(),
        pauses.trim()
    );
}
