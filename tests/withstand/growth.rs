//! What must not grow while a migration lasts. (The whole of it under load: bench/soak.)

use crate::common::pair::DATABASE;
use crate::common::pgbench::pgbench;
use crate::common::{Pair, until};

const VACUUMS: &str = "SELECT vacuum_count FROM pg_stat_user_tables WHERE relid = 'crossfade.ledger'::regclass";

/// Each debt stands in the ledger for a moment; its room is used again, though autovacuum never comes.
#[tokio::test]
async fn a_ledger_that_is_cleared_is_vacuumed() {
    let pair =
        Pair::dual_write("CREATE TABLE notes (id int PRIMARY KEY, n int); INSERT INTO notes VALUES (1, 0)", "").await;
    let old = &pair.databases.old;
    let ask = async |sql: &str| -> u64 {
        let said = old.run(DATABASE, sql).await.expect("reads");
        said.trim().parse().expect("a number")
    };
    let off = "ALTER TABLE crossfade.ledger SET (autovacuum_enabled = off)";
    old.run(DATABASE, off).await.expect("alters");
    let folder = tempfile::tempdir().expect("a folder");
    let script = folder.path().join("write.sql");
    std::fs::write(&script, "UPDATE notes SET n = n + 1;\n").expect("writes");
    let script = script.to_str().expect("a path");
    let mut sizes = Vec::new();
    for round in 1..=2 {
        let arguments = ["-n", "-M", "prepared", "-c", "2", "-t", "1000", "-f", script];
        assert_eq!(pgbench(&old.program("pgbench"), &pair.url(), &arguments).await.transactions, 2000);
        pair.proxy.settle().await;
        sizes.push(ask("SELECT pg_relation_size('crossfade.ledger')").await);
        let vacuums = ask(VACUUMS).await;
        pair.client().await.batch_execute("UPDATE notes SET n = n + 1").await.expect("writes");
        until("the ledger is vacuumed", async || ask(VACUUMS).await > vacuums).await;
        assert_eq!(ask("SELECT n FROM notes").await, round * 2001);
    }
    // What one round's debts take where no room is used twice, some 100 bytes each, and half of it again: two rounds would take twice as much.
    assert!(sizes[1] < 2001 * 150, "the ledger grows, in bytes: {sizes:?}");
    pair.databases.assert_equal().await;
}
