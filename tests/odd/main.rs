//! Random statements of several clients on odd tables: keys whose equal values differ, a second unique index over the key, partitions, exclusion constraints,
//! cascades, deferrable keys, generated columns, triggers that cancel and rewrite rows, rules, views, functions. Nobody says what should come out: at rest both
//! sides hold the same rows.

#[path = "../common/mod.rs"]
mod common;
mod found;
mod killed;
mod statements;
mod twin;

use std::time::Duration;

use common::pair::{DATABASE, TRUST};
use common::{Pair, proof};
use rand::SeedableRng;
use rand::rngs::StdRng;
use statements::{Kinds, Player, SCHEMA};

/// Ends all sessions of the proxy on one side.
pub(crate) const END_SESSIONS: &str =
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'crossfade%'";

/// Pays what is owed. What a function, a rule or WITH wrote to a table without a key is copied by name only.
pub(crate) async fn pay(pair: &Pair) {
    let copied = pair.proxy.crossfade(&["repair", "--wait", "--table", "public.hist"]).await;
    assert!(copied.status.success(), "{copied:?}");
}

/// Pays what is owed, and compares.
pub(crate) async fn assert_equal_at_rest(pair: &Pair) {
    pay(pair).await;
    pair.databases.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_statements_on_odd_tables_leave_both_sides_equal() {
    let pair = Pair::dual_write(SCHEMA, TRUST).await;
    let (rounds, transactions) = if proof() { (60, 100) } else { (3, 30) };
    for round in 0..rounds {
        let mut clients = Vec::new();
        for own in 0..4 {
            let client = pair.client().await;
            clients.push(tokio::spawn(async move {
                client.batch_execute("SET lock_timeout = '2s'").await.expect("sets");
                let random = StdRng::seed_from_u64(round * 10 + own);
                let mut player = Player { client, random, kinds: Kinds::All, done: Vec::new() };
                for _ in 0..transactions {
                    player.transaction().await.unwrap_or_else(|lost| panic!("{lost:?}: {:?}", player.done.last()));
                }
                player.done
            }));
        }
        if round % 3 == 2 {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(200)).await;
                pair.databases.new.run(DATABASE, END_SESSIONS).await.expect("ends the proxy's sessions");
            }
        }
        let mut done = Vec::new();
        for client in clients {
            done.push(client.await.expect("runs"));
        }
        // Shown where something fails.
        println!("round {round}\n{}", done.concat().join("\n"));
        assert_equal_at_rest(&pair).await;
    }
}
