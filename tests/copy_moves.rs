//! COPY FROM STDIN while the authority changes: between any two of its messages, and at random.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::copy::copy;
use common::pair::TRUST;
use common::raw::{self, RawClient, tags};
use common::{Pair, proof, until};
use tokio::net::TcpStream;

const SCHEMA: &str = "CREATE TABLE plain (id int PRIMARY KEY, n int)";

fn other(phase: &str) -> &'static str {
    if phase == "dual-write" { "new-primary" } else { "dual-write" }
}

/// One message, the rest of its flight later, or the answer that is read.
enum Step {
    Send(Vec<u8>),
    Read(u8),
}

/// As tokio-postgres sends it: in three flights.
fn by_parts(row: &str) -> Vec<Step> {
    vec![
        Step::Send(raw::parse("s", "COPY plain FROM STDIN", &[])),
        Step::Send(raw::describe(b'S', "s")),
        Step::Send(raw::sync()),
        Step::Read(b'Z'),
        Step::Send(raw::bind("", "s", &[], &[], &[])),
        Step::Send(raw::execute("", 0)),
        Step::Send(raw::sync()),
        Step::Read(b'G'),
        Step::Send(raw::copy_data(row.as_bytes())),
        Step::Send(raw::copy_done()),
        Step::Send(raw::sync()),
        Step::Read(b'Z'),
        Step::Send([raw::close(b'S', "s"), raw::sync()].concat()),
        Step::Read(b'Z'),
    ]
}

fn simple(row: &str) -> Vec<Step> {
    vec![
        Step::Send(raw::query("COPY plain FROM STDIN")),
        Step::Read(b'G'),
        Step::Send(raw::copy_data(row.as_bytes())),
        Step::Send(raw::copy_done()),
        Step::Read(b'Z'),
    ]
}

/// Of each message, whether nothing is under way in front of it: the phase can move.
fn rests(steps: &[Step]) -> Vec<bool> {
    let before = [None].into_iter().chain(steps.iter().map(Some));
    let sent = before.zip(steps).filter(|(_, step)| matches!(step, Step::Send(_)));
    sent.map(|(before, _)| matches!(before, None | Some(Step::Read(b'Z')))).collect()
}

/// All of these. In front of the message with this number it is waited until somebody says so.
async fn play(client: &mut RawClient, steps: Vec<Step>, gap: usize, wait: impl Future<Output = ()>) {
    let (mut sent, mut wait) = (0, Some(wait));
    for step in steps {
        match step {
            Step::Send(bytes) => {
                if sent == gap
                    && let Some(wait) = wait.take()
                {
                    wait.await;
                }
                client.send(&bytes).await;
                sent += 1;
            }
            Step::Read(tag) => {
                let frames = client.until(tag, 1).await;
                assert!(!tags(&frames).contains('E'), "{frames:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_authority_changes_between_two_messages_of_a_copy() {
    let mut pair = Pair::dual_write(SCHEMA, TRUST).await;
    let (mut phase, mut row) = ("dual-write", 0);
    let mut client = pair.raw().await;
    for steps in [by_parts, simple] {
        let rests = rests(&steps(""));
        for (gap, rests) in rests.into_iter().enumerate().step_by(if proof() { 1 } else { 3 }) {
            row += 1;
            let steps = steps(&format!("{row}\t{gap}\n"));
            let asked = async {
                pair.proxy.request_phase(other(phase));
                let moves = pair.proxy.reaches(other(phase));
                // In the middle of something it is asked for only.
                let limit = if rests { Duration::MAX } else { Duration::from_secs(1) };
                drop(tokio::time::timeout(limit, moves).await);
            };
            play(&mut client, steps, gap, asked).await;
            phase = other(phase);
            pair.proxy.reaches(phase).await;
            assert_eq!(pair.settle_and_assert_equal().await, row);
        }
    }
}

/// All sessions are called when the proxy is told to end. One that is in the middle of a COPY cannot answer, and must not keep its thread busy with that.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_under_way_and_its_thread_outlive_a_call() {
    let mut pair = Pair::dual_write(SCHEMA, TRUST).await;
    // As many as there are threads, and more.
    let mut copying = Vec::new();
    for _ in 0..8 {
        let mut client = pair.raw().await;
        client.send(&raw::query("COPY plain FROM STDIN")).await;
        client.until(b'G', 1).await;
        copying.push(client);
    }
    let mut open = pair.raw().await;
    open.send(&raw::query("BEGIN; INSERT INTO plain VALUES (1000, 0)")).await;
    open.until_ready(1).await;
    let port = pair.proxy.port();
    let go_on = async {
        until("the proxy listens no more", async || TcpStream::connect(("127.0.0.1", port)).await.is_err()).await;
        // Until the sessions have been called.
        tokio::time::sleep(Duration::from_millis(200)).await;
        for (row, client) in copying.iter_mut().enumerate() {
            client.send(&[raw::copy_data(format!("{row}\t0\n").as_bytes()), raw::copy_done()].concat()).await;
            assert_eq!(tags(&client.until(b'Z', 1).await), "CZ");
        }
        open.send(&raw::query("COMMIT")).await;
        assert_eq!(tags(&open.until_ready(1).await), "CZ");
    };
    tokio::join!(pair.proxy.terminate(), go_on);
    pair.proxy.run().await;
    assert_eq!(pair.settle_and_assert_equal().await, 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_go_on_while_the_authority_changes() {
    let mut pair = Pair::dual_write(SCHEMA, "").await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for writer in 0..6 {
        let (client, stop) = (pair.client().await, stop.clone());
        writers.push(tokio::spawn(async move {
            let mut rows = 0;
            while !stop.load(Ordering::Relaxed) {
                let data = format!("{}\t1\n{}\t2\n", rows * 10 + writer, (rows + 1) * 10 + writer);
                let copied = copy(&client, "COPY plain FROM STDIN", &[data.as_bytes()]).await;
                assert_eq!(copied.expect("copies"), 2);
                rows += 2;
                tokio::time::sleep(Duration::from_millis(rows as u64 % 7)).await;
            }
            rows
        }));
    }
    let mut phase = "dual-write";
    for _ in 0..if proof() { 50 } else { 4 } {
        phase = other(phase);
        pair.proxy.request_phase(phase);
        pair.proxy.reaches(phase).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut rows = 0;
    for writer in writers {
        rows += writer.await.expect("goes on");
    }
    assert_eq!(pair.settle_and_assert_equal().await, rows as u64);
}
