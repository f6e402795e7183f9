//! Deaths at every step between a transaction's first write and the clearing of its debt.
//!
//! A step is a message between the proxy and a server: what a process does between two messages nobody else can see, so a death there is one
//! at the next message or behind the last. Each message is stopped on its way, somebody is killed, and the message is lost, or comes late: when a
//! new proxy has begun its work.

use std::time::Duration;

use tokio::task::JoinHandle;

use crate::common::link::{Link, Trip, Way};
use crate::common::{proof, until};
use crate::{SCHEMA, SYNC, Stage};

/// One message.
struct Step {
    name: &'static str,
    /// It goes to, or comes from, the mirror.
    mirror: bool,
    way: Way,
    /// Only behind these bytes. None: behind the transaction's own rows.
    behind: Option<&'static [u8]>,
    /// Part of it. Empty: the transaction's own rows.
    pattern: &'static [u8],
    /// The transaction has committed if this message was lost.
    committed: bool,
}

/// The message is told by the bytes in it.
const fn step(name: &'static str, mirror: bool, way: Way, pattern: &'static [u8], committed: bool) -> Step {
    Step { name, mirror, way, behind: None, pattern, committed }
}

const fn behind(step: Step, bytes: &'static [u8]) -> Step {
    Step { behind: Some(bytes), ..step }
}

const FLUSH: &[u8] = b"UPDATE crossfade.flush";
const CLEAR: &[u8] = b"DELETE FROM crossfade.ledger";

const STEPS: [Step; 12] = [
    step("the first write", false, Way::ToServer, b"", false),
    step("the answer to the first write", false, Way::ToClient, b"INSERT 0 1", false),
    step("images", true, Way::ToServer, b"", false),
    step("the answer to images", true, Way::ToClient, b"2\0\0\0\x04", false),
    step("debts and COMMIT", false, Way::ToServer, b"crossfade_owe", false),
    step("the answer to COMMIT", false, Way::ToClient, b"COMMIT\0", true),
    step("the mirror's COMMIT", true, Way::ToServer, SYNC, true),
    step("the answer to the mirror's COMMIT", true, Way::ToClient, b"Z\0\0\0\x05I", true),
    behind(step("the flush", true, Way::ToServer, FLUSH, true), b"BEGIN; "),
    behind(step("the answer to the flush", true, Way::ToClient, b"COMMIT\0", true), FLUSH),
    behind(step("the clearing", false, Way::ToServer, CLEAR, true), b"BEGIN; "),
    behind(step("the answer to the clearing", false, Way::ToClient, b"COMMIT\0", true), CLEAR),
];

/// Who dies while the message is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dies {
    Proxy,
    Authority,
    Mirror,
    ProxyAndAuthority,
    ProxyAndMirror,
}

/// What becomes of the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Message {
    Lost,
    /// It arrives when the dead are back and at work.
    Late,
}

/// Rows 1 and 2 are there beforehand; row 1 is changed, row 2 deleted, a row and a line without a key are added.
async fn begin(stage: &Stage, marker: &str, id: usize) -> JoinHandle<Result<(), tokio_postgres::Error>> {
    let client = stage.pair.client().await;
    client
        .batch_execute(
            "INSERT INTO notes VALUES (1, 'before'), (2, 'before') ON CONFLICT (id) DO UPDATE SET body = 'before'",
        )
        .await
        .expect("writes");
    until("what came before is cleared", async || stage.debts().await == 0).await;
    let statements = [
        "BEGIN".to_owned(),
        format!("INSERT INTO notes VALUES ({id}, '{marker}')"),
        format!("UPDATE notes SET body = '{marker}' WHERE id = 1"),
        "DELETE FROM notes WHERE id = 2".to_owned(),
        format!("INSERT INTO history VALUES ({id}, '{marker}')"),
        "COMMIT".to_owned(),
    ];
    tokio::spawn(async move {
        for statement in statements {
            client.batch_execute(&statement).await?;
        }
        Ok(())
    })
}

/// Kills them, loses the message if it is to be lost, and starts them again.
async fn die(stage: &mut Stage, dies: Dies, message: Message) {
    let databases = &mut stage.pair.databases;
    if matches!(dies, Dies::Proxy | Dies::ProxyAndAuthority | Dies::ProxyAndMirror) {
        stage.pair.proxy.kill9();
    }
    if matches!(dies, Dies::Authority | Dies::ProxyAndAuthority) {
        databases.old.kill9();
    }
    if matches!(dies, Dies::Mirror | Dies::ProxyAndMirror) {
        databases.new.kill9();
    }
    // A message between two that live is neither lost nor late.
    match (dies, message) {
        (Dies::Authority, Message::Lost) => {
            stage.old.cut();
            stage.new.release();
        }
        (Dies::Mirror, Message::Lost) => {
            stage.new.cut();
            stage.old.release();
        }
        (_, Message::Lost) => {
            stage.old.cut();
            stage.new.cut();
        }
        (_, Message::Late) => {}
    }
    for side in [&mut databases.old, &mut databases.new] {
        if !side.running() {
            side.start().await.expect("starts");
        }
    }
    if dies != Dies::Authority && dies != Dies::Mirror {
        stage.pair.proxy.run().await;
    }
}

/// Sessions of before, on either side, of which something may still come (those of the test are a superuser's).
async fn left(stage: &Stage, since: &str) -> bool {
    let count = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND usename <> 'postgres' AND backend_start < '{since}'"
    );
    stage.on_old(&count).await != "0" || stage.on_new(&count).await != "0"
}

async fn round(stage: &mut Stage, number: usize, step: &Step, dies: Dies, message: Message) {
    let what = format!("{} is {message:?}, dies: {dies:?}", step.name);
    let (id, marker) = (100 + number, format!("round-{number}-end"));
    let transaction = {
        let link: &Link = if step.mirror { &stage.new } else { &stage.old };
        let pattern = if step.pattern.is_empty() { marker.as_bytes() } else { step.pattern };
        let behind = step.behind.unwrap_or(marker.as_bytes());
        let running = begin(stage, &marker, id).await;
        let struck = match step.pattern.is_empty() {
            true => link.trip(step.way, pattern, Trip::HoldBefore),
            false => link.trip_behind(behind, step.way, pattern, Trip::HoldBefore),
        };
        tokio::time::timeout(crate::common::PATIENCE, struck).await.expect(&what).expect(&what);
        running
    };
    let since = stage.on_old("SELECT clock_timestamp()").await;
    die(stage, dies, message).await;
    if message == Message::Late {
        // Repair has looked at what it finds.
        tokio::time::sleep(Duration::from_millis(300)).await;
        stage.old.release();
        stage.new.release();
    }
    let acknowledged = tokio::time::timeout(crate::common::PATIENCE, transaction).await.expect(&what).expect("joins");
    if dies == Dies::Mirror {
        assert!(acknowledged.is_ok(), "{what}: the application heard of it: {acknowledged:?}");
    } else {
        until(&format!("{what}: sessions of before have ended"), async || {
            dies == Dies::Authority || !left(stage, &since).await
        })
        .await;
    }
    stage.pair.settle_and_assert_equal().await;
    let there = stage.on_old(&format!("SELECT count(*) FROM history WHERE what = '{marker}'")).await;
    let note = stage.on_new(&format!("SELECT count(*) FROM notes WHERE id = {id} AND body = '{marker}'")).await;
    assert_eq!(there, note, "{what}: half a transaction");
    assert!(there == "1" || acknowledged.is_err(), "{what}: acknowledged and gone");
    if message == Message::Lost && dies == Dies::Proxy {
        assert_eq!(there == "1", step.committed, "{what}: this is not the step that it is said to be");
    }
    assert_eq!(stage.debts().await, 0, "{what}");
    assert_eq!(stage.on_old("SELECT count(*) FROM notes WHERE id = 2").await == "0", there == "1", "{what}");
}

async fn all(rounds: impl Iterator<Item = (usize, Dies, Message)>) {
    let mut stage = Stage::start(SCHEMA, "mirror: { timeout: 2s }").await;
    for (number, (step, dies, message)) in rounds.enumerate() {
        round(&mut stage, number, &STEPS[step], dies, message).await;
    }
}

/// All steps; every second one, from `first` on, where there is no time for more.
fn every(first: usize) -> impl Iterator<Item = usize> {
    let (first, apart) = if proof() { (0, 1) } else { (first, 2) };
    (first..STEPS.len()).step_by(apart)
}

/// Interleaving 6: the proxy dies between any two steps, and what it sent last is lost with it.
#[tokio::test]
async fn i06_the_proxy_dies_at_every_step_and_its_message_is_lost() {
    all(every(0).map(|step| (step, Dies::Proxy, Message::Lost))).await;
}

/// Interleaving 6: the proxy dies between any two steps, and what it sent last arrives when its successor is at work.
#[tokio::test]
async fn i06_the_proxy_dies_at_every_step_and_its_message_comes_late() {
    all(every(1).map(|step| (step, Dies::Proxy, Message::Late))).await;
}

/// Of all steps, or of these where there is no time for more.
fn some(dies: Dies, steps: &[usize]) -> impl Iterator<Item = (usize, Dies, Message)> {
    let steps = if proof() { (0..STEPS.len()).collect() } else { steps.to_vec() };
    steps.into_iter().map(move |step| (step, dies, Message::Lost))
}

/// Interleaving 6: the authority dies with COMMIT under way, answered and not; the mirror with its own.
#[tokio::test]
async fn i06_a_server_dies_at_a_step() {
    all(some(Dies::Authority, &[1, 4, 5, 6, 10]).chain(some(Dies::Mirror, &[2, 3, 6, 7, 8, 9]))).await;
}

/// Interleaving 6: two of them at once.
#[tokio::test]
async fn i06_the_proxy_and_a_server_die_at_once() {
    all(some(Dies::ProxyAndAuthority, &[4, 5, 6]).chain(some(Dies::ProxyAndMirror, &[2, 5, 7, 9]))).await;
}
