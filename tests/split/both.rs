//! A transaction that writes on both sides commits on both or on neither (C11).

use std::time::Duration;

use tokio_postgres::Client;

use crate::common::{Pair, Proxy, until};
use crate::{Stage, databases, lines, on, refusal, split, value};

/// Moves an amount from an order (on old) to an attachment (on new), with other reads between.
pub(crate) async fn transfer(client: &Client, id: i32, amount: i64) -> Result<(), tokio_postgres::Error> {
    client.batch_execute("BEGIN").await?;
    client.batch_execute(&format!("UPDATE orders SET amount = amount - {amount} WHERE id = {id}")).await?;
    client.batch_execute(&format!("UPDATE attachments SET amount = amount + {amount} WHERE id = {id}")).await?;
    client.batch_execute("COMMIT").await
}

#[tokio::test]
async fn both_sides_commit_or_neither() {
    let mut pair = split("new-primary", "").await;
    for phase in ["new-primary", "new"] {
        if phase == "new" {
            pair.proxy.set_phase("old-read-only").await;
            pair.proxy.set_phase("new").await;
        }
        let mut client = pair.client().await;
        let (old, new) = (&pair.databases.old, &pair.databases.new);
        let amounts = async |id: i32| {
            let sql = |table: &str| format!("SELECT amount FROM {table} WHERE id = {id}");
            (on(old, &sql("orders")).await, on(new, &sql("attachments")).await)
        };
        let before = amounts(1).await;
        transfer(&client, 1, 10).await.expect("commits");
        let moved = amounts(1).await;
        assert_eq!(moved.0.parse::<i64>().unwrap(), before.0.parse::<i64>().unwrap() - 10);
        assert_eq!(moved.1.parse::<i64>().unwrap(), before.1.parse::<i64>().unwrap() + 10);
        // By a driver, in the extended protocol.
        let transaction = client.transaction().await.expect("begins");
        transaction.execute("UPDATE attachments SET amount = amount - $1 WHERE id = 2", &[&7_i64]).await.expect("new");
        transaction.execute("UPDATE orders SET amount = amount + $1 WHERE id = 2", &[&7_i64]).await.expect("old");
        transaction.commit().await.expect("commits");
        let seven = if phase == "new" { ("114", "86") } else { ("107", "93") };
        assert_eq!(amounts(2).await, (seven.0.to_owned(), seven.1.to_owned()));
        // What old refuses at COMMIT undoes both.
        let deferred = "ALTER TABLE orders DROP CONSTRAINT IF EXISTS once; ALTER TABLE orders ADD CONSTRAINT once UNIQUE (note) DEFERRABLE INITIALLY DEFERRED";
        on(old, deferred).await;
        client.batch_execute("BEGIN; UPDATE attachments SET amount = 0 WHERE id = 3").await.expect("writes");
        client.batch_execute("UPDATE orders SET note = 'o4' WHERE id = 3").await.expect("writes");
        assert_eq!(refusal(&client, "COMMIT").await, "23505");
        assert_eq!(amounts(3).await.1, "100");
        on(old, "ALTER TABLE orders DROP CONSTRAINT once").await;
        // What new cannot prepare is refused before anything is committed, and the session goes on.
        client.batch_execute("BEGIN; CREATE TEMP TABLE IF NOT EXISTS scratch (id int)").await.expect("makes");
        client.batch_execute("UPDATE attachments SET amount = 0 WHERE id = 3").await.expect("writes");
        client.batch_execute("UPDATE orders SET amount = 0 WHERE id = 3").await.expect("writes");
        assert_eq!(refusal(&client, "COMMIT").await, "0A000");
        assert_eq!(amounts(3).await, ("100".to_owned(), "100".to_owned()));
        assert_eq!(value(&client, "SELECT amount FROM orders WHERE id = 3").await, "100");
        if phase == "new-primary" {
            pair.proxy.settle().await;
            assert_eq!(on(old, "SELECT amount FROM attachments WHERE id = 1").await, moved.1);
        }
        assert_eq!(on(new, "SELECT count(*) FROM pg_prepared_xacts").await, "0");
    }
}

#[tokio::test]
async fn what_will_be_refused_is_said_beforehand() {
    let databases = databases(&[]).await;
    let proxy = Proxy::start(databases.proxy_config("old", &lines(""))).await;
    let mut pair = Pair { proxy, databases };
    let check = pair.proxy.crossfade(&["check"]).await;
    assert!(String::from_utf8_lossy(&check.stdout).contains("max_prepared_transactions"), "{check:?}");
    // A foreign key between the two kinds of tables closes the way.
    on(&pair.databases.old, "ALTER TABLE attachments ADD CONSTRAINT of_order FOREIGN KEY (order_id) REFERENCES orders")
        .await;
    let check = pair.proxy.crossfade(&["check"]).await;
    assert!(String::from_utf8_lossy(&check.stdout).contains("DROP CONSTRAINT of_order"), "{check:?}");
    on(&pair.databases.old, "ALTER TABLE attachments DROP CONSTRAINT of_order").await;
    // Statements over both kinds.
    pair.proxy.set_phase("dual-write").await;
    let client = pair.client().await;
    let joined = "SELECT count(*) FROM orders JOIN attachments ON order_id = orders.id";
    assert_eq!(value(&client, joined).await, "10");
    let report = pair.proxy.crossfade(&["report"]).await;
    let report = String::from_utf8_lossy(&report.stdout).into_owned();
    assert!(report.contains("split: orders stays on old, attachments migrates"), "{report}");
    let explained = pair.proxy.crossfade(&["explain", joined]).await;
    let explained = String::from_utf8_lossy(&explained.stdout).into_owned();
    assert!(explained.contains("new-primary    is refused (0A000)"), "{explained}");
    pair.proxy.settle().await;
    pair.proxy.set_phase("new-primary").await;
    let history = on(&pair.databases.new, "SELECT detail FROM crossfade.history ORDER BY id DESC LIMIT 1").await;
    assert!(history.contains("1 shapes over tables that stay on old"), "{history}");
    assert_eq!(refusal(&client, joined).await, "0A000");
    // Where new cannot prepare a transaction.
    client.batch_execute("BEGIN; UPDATE attachments SET amount = 0 WHERE id = 1").await.expect("writes");
    client.batch_execute("UPDATE orders SET amount = 0 WHERE id = 1").await.expect("writes");
    assert_eq!(refusal(&client, "COMMIT").await, "0A000");
    assert_eq!(value(&client, "SELECT amount FROM orders WHERE id = 1").await, "100");
    assert_eq!(value(&client, "SELECT amount FROM attachments WHERE id = 1").await, "100");
}

/// Transfers by several clients while the proxy and both servers are killed.
#[tokio::test]
async fn the_sum_stays_whoever_is_killed() {
    let mut stage = Stage::start("").await;
    let rounds = if crate::common::proof() { 30 } else { 3 };
    let url = stage.pair.url();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let transfers = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let clients: Vec<_> = (0..4_i32)
        .map(|number| {
            let (url, stop, transfers) = (url.clone(), stop.clone(), transfers.clone());
            tokio::spawn(async move {
                let mut done = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let Ok((client, connection)) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await else {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        continue;
                    };
                    tokio::spawn(connection);
                    // Each has rows of its own: what waits for a transaction in doubt waits for no other.
                    while !stop.load(std::sync::atomic::Ordering::Relaxed)
                        && transfer(&client, number * 2 + 1 + done % 2, 1).await.is_ok()
                    {
                        done += 1;
                        transfers.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    for round in 0..rounds {
        let enough = transfers.load(std::sync::atomic::Ordering::Relaxed) + 8;
        until("transfers are made", async || transfers.load(std::sync::atomic::Ordering::Relaxed) >= enough).await;
        tokio::time::sleep(Duration::from_millis(13 * (round % 7))).await;
        match round % 3 {
            0 => stage.pair.proxy.restart().await,
            1 => {
                stage.pair.databases.old.kill9();
                stage.pair.databases.old.start().await.expect("starts");
            }
            _ => {
                stage.pair.databases.new.kill9();
                stage.pair.databases.new.start().await.expect("starts");
            }
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in clients {
        client.await.expect("no panic");
    }
    stage.pair.proxy.restart().await;
    stage.decided().await;
    assert_eq!(stage.sum().await, 2000);
    stage.assert_mirrored().await;
    until("the metric says so", async || stage.pair.proxy.metrics("crossfade_in_doubt_transactions").await == 0.0)
        .await;
}

/// Each server sees half of it.
#[tokio::test]
async fn a_deadlock_across_both_databases_ends_one_of_them() {
    let pair = split("new-primary", "").await;
    let (one, two) = (pair.client().await, pair.client().await);
    let write = |table: &str| format!("UPDATE {table} SET amount = amount + 1 WHERE id = 1");
    for (client, table) in [(&one, "orders"), (&two, "attachments")] {
        client.batch_execute("BEGIN").await.expect("begins");
        client.batch_execute(&write(table)).await.expect("writes");
    }
    let (new, old) = (write("attachments"), write("orders"));
    let ends = async |client: &Client, sql: &str| {
        let done = tokio::time::timeout(Duration::from_secs(30), client.batch_execute(sql)).await.expect("it ends");
        client.batch_execute("COMMIT").await.expect("ends");
        done
    };
    let (first, second) = tokio::join!(ends(&one, &new), ends(&two, &old));
    let errors: Vec<_> = [first, second].into_iter().filter_map(Result::err).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(errors[0].code(), Some(&tokio_postgres::error::SqlState::T_R_DEADLOCK_DETECTED));
    assert_eq!(on(&pair.databases.old, "SELECT amount FROM orders WHERE id = 1").await, "101");
    assert_eq!(on(&pair.databases.new, "SELECT amount FROM attachments WHERE id = 1").await, "101");
}
