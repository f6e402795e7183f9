//! Strict isolation levels with retries, and locks in opposite orders: what an application relies on holds, and it meets no error that it would not meet
//! without a proxy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::Stage;
use crate::common::pair::{CONTROL, DATABASE};
use crate::common::{Pair, proof, until};

const ACCOUNTS: i32 = 10;
const SCHEMA: &str = "CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL);
    INSERT INTO accounts SELECT n, 100 FROM generate_series(0, 9) n;";

/// What a client of a strict level has to try again.
fn to_be_retried(error: &tokio_postgres::Error) -> bool {
    matches!(error.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE | &SqlState::T_R_DEADLOCK_DETECTED))
}

/// Moves 1 from one account to another, after having read both, until it is done. How often it was tried.
async fn transfer(client: &Client, level: &str, from: i32, to: i32) -> u64 {
    for tries in 1.. {
        let once = async {
            client.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}")).await?;
            let read = "SELECT balance FROM accounts WHERE id = $1";
            let (rich, poor): (i32, i32) =
                (client.query_one(read, &[&from]).await?.get(0), client.query_one(read, &[&to]).await?.get(0));
            let write = "UPDATE accounts SET balance = $2 WHERE id = $1";
            client.execute(write, &[&from, &(rich - 1)]).await?;
            client.execute(write, &[&to, &(poor + 1)]).await?;
            client.batch_execute("COMMIT").await
        };
        match once.await {
            Ok(()) => return tries,
            Err(error) => {
                assert!(to_be_retried(&error), "{level}: {error:?}");
                client.batch_execute("ROLLBACK").await.expect("rolls back");
            }
        }
    }
    unreachable!("it ends when it is done")
}

async fn sum_stays(level: &'static str) {
    let pair = Pair::dual_write(SCHEMA, "").await;
    let tries = Arc::new(AtomicU64::new(0));
    let transfers = if proof() { 1000 } else { 12 };
    let mut clients = Vec::new();
    for number in 0..6 {
        let (client, tries) = (pair.client().await, tries.clone());
        clients.push(tokio::spawn(async move {
            for round in 0..transfers {
                let (from, to) = ((number + round) % 4, (number * 3 + round * 7 + 1) % 4 + 4);
                let (from, to) = if round % 2 == 0 { (from, to) } else { (to, from) };
                tries.fetch_add(transfer(&client, level, from, to).await, Ordering::Relaxed);
            }
        }));
    }
    for client in clients {
        client.await.expect("no other error");
    }
    let retries = tries.load(Ordering::Relaxed) - 6 * u64::try_from(transfers).expect("positive");
    assert!(retries > 0, "{level}: nobody met anybody");
    assert_eq!(pair.settle_and_assert_equal().await, u64::try_from(ACCOUNTS).expect("positive"));
    let sum = pair.databases.new.run(DATABASE, "SELECT sum(balance) FROM accounts").await;
    assert_eq!(sum.expect("reads").trim(), "1000", "{level}");
    assert_eq!(pair.proxy.metrics("crossfade_mirror_failures_total").await, 0.0, "{level}: nothing was repaired");
}

#[tokio::test]
async fn repeatable_read_transfers_keep_the_sum() {
    sum_stays("REPEATABLE READ").await;
}

#[tokio::test]
async fn serializable_transfers_keep_the_sum() {
    sum_stays("SERIALIZABLE").await;
}

/// Interleaving 16: the application takes rows in one order, repair and the walk over tables in the other. Without the proxy such an application
/// never meets a deadlock; nor may it here, while the way to new is cut again and again and everything is repaired.
#[tokio::test]
async fn i16_opposite_orders_of_application_and_repair() {
    let mut stage = Stage::start(SCHEMA, "mirror: { timeout: 500ms }").await;
    // Of two that wait for each other it is the application's session that looks for a deadlock, and would be ended.
    let patient = format!("ALTER ROLE {} SET deadlock_timeout = '1min'", CONTROL.0);
    stage.pair.databases.old.run("postgres", &patient).await.expect("sets");
    stage.pair.proxy.restart().await;
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let mut clients = Vec::new();
    for number in 0..4 {
        let (client, stop, done) = (stage.pair.client().await, stop.clone(), done.clone());
        clients.push(tokio::spawn(async move {
            let mut round = number;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                // From the last to the first, as long as it takes.
                client.batch_execute("BEGIN").await.expect("begins");
                for id in (0..ACCOUNTS).rev().filter(|id| (id + round) % 3 != 0) {
                    let update = "UPDATE accounts SET balance = balance + 1 WHERE id = $1";
                    client.execute(update, &[&id]).await.expect("it never fails without a proxy");
                    // So that repair comes in between.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                client.batch_execute("COMMIT").await.expect("it never fails without a proxy");
                done.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    let until_then = Instant::now() + Duration::from_secs(if proof() { 60 } else { 6 });
    let mut repaired = false;
    while Instant::now() < until_then {
        stage.new.cut();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let enough = done.load(Ordering::Relaxed) + 5;
        until("transactions go on", async || done.load(Ordering::Relaxed) >= enough).await;
        repaired |= stage.debts().await > 0;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.expect("no error");
    }
    assert!(repaired, "nothing was owed");
    stage.pair.settle_and_assert_equal().await;
}
