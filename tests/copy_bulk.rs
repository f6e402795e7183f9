//! COPY of many rows in `dual-write`, into a table without a key and into one whose key is a default, with the mirror up, slow and down: the
//! proxy's memory is bounded, clients see no error, and in the end nothing is owed and both sides are equal.
//!
//! 100,000 rows each; 1,000,000 with `CROSSFADE_PROOF=1`.

mod common;

use std::fmt::Write;
use std::time::Duration;

use bytes::Bytes;
use common::Pair;
use common::link::{Flow, Link};
use futures_util::SinkExt;

const SCHEMA: &str = "
    CREATE TABLE history (n int, what text, at timestamptz DEFAULT clock_timestamp());
    CREATE TABLE serials (id bigserial PRIMARY KEY, n int, what text);";
const TABLES: [&str; 2] = ["history", "serials"];
const MEMORY_MAX: u64 = 200 << 20;

fn rows() -> u64 {
    if std::env::var("CROSSFADE_PROOF").is_ok_and(|value| value == "1") { 1_000_000 } else { 100_000 }
}

async fn start() -> (Pair, Link) {
    Pair::dual_write_over_a_link(SCHEMA, "").await
}

/// Fills both tables, each by one COPY.
async fn fill(pair: &Pair) {
    let client = pair.client().await;
    for table in TABLES {
        let sink = client.copy_in(&format!("COPY {table} (n, what) FROM STDIN")).await.expect("begins");
        let mut sink = std::pin::pin!(sink);
        let mut piece = String::new();
        for n in 0..rows() {
            let _ = writeln!(piece, "{n}\tthe row with number {n} of this table");
            if piece.len() > 60_000 || n + 1 == rows() {
                sink.send(Bytes::from(std::mem::take(&mut piece))).await.expect("sends");
            }
        }
        assert_eq!(sink.as_mut().finish().await.expect("copies"), rows());
        client.simple_query("SELECT 1").await.expect("is committed");
    }
}

/// All of it is on both sides, by images alone, and the proxy has stayed small.
async fn assert_carried(pair: &Pair) {
    let owed = pair.proxy.metrics("crossfade_mirror_failures_total").await;
    assert_eq!((owed, pair.taints(&TABLES).await), (0.0, vec![0.0, 0.0]));
    for table in TABLES {
        assert_eq!(common::copy::images(pair, table).await, rows() as f64, "{table}");
    }
    assert_eq!(pair.settle_and_assert_equal().await, 2 * rows());
    assert_small(pair);
}

fn assert_small(pair: &Pair) {
    let peak = pair.proxy.peak_memory_bytes();
    eprintln!("peak memory of the proxy: {} MiB for 2 x {} rows", peak >> 20, rows());
    assert!(peak < MEMORY_MAX, "{} MiB", peak >> 20);
}

#[tokio::test]
async fn the_mirror_is_up() {
    let (pair, _link) = start().await;
    fill(&pair).await;
    assert_carried(&pair).await;
}

#[tokio::test]
async fn the_mirror_is_slow() {
    let (pair, link) = start().await;
    // Each 64 KiB at most wait so long, one after the other: some 3 MB/s.
    link.set_both(Flow::Delay(Duration::from_millis(20)));
    fill(&pair).await;
    link.set_both(Flow::Pass);
    assert_carried(&pair).await;
}

#[tokio::test]
async fn the_mirror_is_down() {
    let (pair, mut link) = start().await;
    link.refuse().await;
    link.cut();
    fill(&pair).await;
    assert_small(&pair);
    assert_eq!(pair.taints(&TABLES).await, [0.0, 0.0], "owed, but not as written out of sight");
    link.accept().await;
    common::until("the mirror is back", async || pair.proxy.metrics("crossfade_mirror_up").await == 1.0).await;
    // So many rows without a key are owed as a whole table, which an operator must have copied.
    let output = pair.proxy.crossfade(&["repair", "--table", "public.history"]).await;
    // Its status speaks of all debts, and the keys of the other table may not be paid yet.
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(&format!("public.history: {} rows copied", rows())), "{output:?}");
    assert_eq!(pair.settle_and_assert_equal().await, 2 * rows());
    assert_small(&pair);
}
