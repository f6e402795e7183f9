//! `crossfade backfill`, a process of its own beside the proxy, on two real servers: what was there before comes over while clients write.

mod common;

use std::time::Duration;

use common::pair::DATABASE;
use common::{Databases, Proxy, until};

/// True before a release: everything longer.
fn proof() -> bool {
    std::env::var_os("CROSSFADE_PROOF").is_some()
}

/// Rows of years.
fn years() -> u64 {
    if proof() { 1_000_000 } else { 100_000 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_look() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both("CREATE TABLE t (k bigint PRIMARY KEY, v text, at timestamptz DEFAULT now())").await;
    let rows = years();
    databases
        .old
        .psql(DATABASE, &format!("INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, {rows}) n"))
        .await
        .expect("fills");
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    proxy.set_phase("dual-write").await;
    let output = proxy.crossfade(&["backfill"]).await;
    eprintln!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success());
    until("nothing is owed", async || proxy.metrics("crossfade_debt_keys").await == 0.0).await;
    assert_eq!(databases.assert_equal().await, rows);
    tokio::time::sleep(Duration::ZERO).await;
}
