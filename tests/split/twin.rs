//! Law 1 where some tables stay on old: one client says the same, at random, to crossfade and to a server that has all tables. Each answer is the same, and so
//! are all rows.

use crossfade::cluster::Cluster;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::common::pair::{APP, DATABASE};
use crate::common::proof;
use crate::{ATTACHMENTS, MONOLITH, on, split};

const SAID: &[&str] = &[
    "BEGIN",
    "BEGIN",
    "BEGIN ISOLATION LEVEL REPEATABLE READ",
    "START TRANSACTION",
    "COMMIT",
    "COMMIT",
    "ROLLBACK",
    "COMMIT AND CHAIN",
    "ROLLBACK AND CHAIN",
    "SAVEPOINT s",
    "SAVEPOINT t",
    "ROLLBACK TO s",
    "ROLLBACK TO t",
    "RELEASE s",
    "SELECT * FROM orders ORDER BY id",
    "SELECT * FROM attachments ORDER BY id",
    "SELECT count(*), sum(amount) FROM orders WHERE id < {i}",
    "SELECT name FROM attachments WHERE id = {i} FOR UPDATE",
    "INSERT INTO orders (note, amount) VALUES ('n{i}', {i}) RETURNING id",
    "INSERT INTO attachments VALUES ({i}, {i}, 'new', 1) ON CONFLICT (id) DO UPDATE SET amount = attachments.amount + 1",
    "INSERT INTO attachments VALUES ({i}, 0, 'again')",
    "UPDATE orders SET amount = amount + {i} WHERE id = {i}",
    "UPDATE attachments SET amount = amount - {i} WHERE id < {i}",
    "DELETE FROM orders WHERE id = {i} + 5 RETURNING *",
    "DELETE FROM attachments WHERE id = {i} + 5",
    "SELECT nextval('orders_id_seq')",
    "SELECT lastval() FROM orders WHERE id = 1",
    "SELECT 1 / ({i} - 3)",
    "SELECT 1 / (id - {i}) FROM orders ORDER BY id",
    "SELECT 1 / (id - {i}) FROM attachments ORDER BY id",
    "SELECT nothing FROM orders",
    "SELEC nonsense",
    "SET work_mem = '{i}MB'",
    "SET LOCAL work_mem = '1{i}MB'",
    "SHOW work_mem",
    "SELECT current_setting('work_mem') FROM orders WHERE id = 1",
    "SELECT current_setting('work_mem') FROM attachments WHERE id = 1",
    "RESET work_mem",
    "DECLARE c CURSOR FOR SELECT id FROM orders ORDER BY id",
    "DECLARE d CURSOR FOR SELECT id FROM attachments ORDER BY id",
    "FETCH 2 FROM c",
    "FETCH 2 FROM d",
    "PREPARE q AS SELECT count(*) FROM orders",
    "PREPARE r AS UPDATE attachments SET amount = amount + 1",
    "EXECUTE q",
    "DEALLOCATE q",
    "BEGIN; UPDATE orders SET amount = 0 WHERE id = {i}; COMMIT",
    "UPDATE orders SET amount = 1; SELECT sum(amount) FROM orders",
    "UPDATE attachments SET amount = 1; SELECT 1 / ({i} - 3)",
];

/// Said in the extended protocol, with a parameter.
const BOUND: &[&str] = &[
    "SELECT note FROM orders WHERE id = $1",
    "SELECT name FROM attachments WHERE id = $1",
    "UPDATE orders SET amount = amount + 1 WHERE id = $1 RETURNING amount",
    "UPDATE attachments SET amount = amount + 1 WHERE id = $1 RETURNING amount::text",
    "SELECT $1::int4 + 1",
    "SELECT 1 / ($1::int4 - 3) FROM orders",
];

/// What one of the two says: rows, tags or SQLSTATE.
async fn say(client: &Client, text: &str, bound: Option<i32>) -> String {
    let Some(value) = bound else {
        return match client.simple_query(text).await {
            Ok(said) => said.iter().map(shown).collect::<Vec<_>>().join(" | "),
            Err(error) => error.code().unwrap_or_else(|| panic!("{text}: {error}")).code().to_owned(),
        };
    };
    match client.query(text, &[&value]).await {
        Ok(rows) => format!("{} rows", rows.len()),
        Err(error) => error.code().unwrap_or_else(|| panic!("{text}: {error}")).code().to_owned(),
    }
}

fn shown(message: &SimpleQueryMessage) -> String {
    match message {
        SimpleQueryMessage::Row(row) => {
            (0..row.len()).map(|at| row.get(at).unwrap_or("NULL")).collect::<Vec<_>>().join(",")
        }
        SimpleQueryMessage::CommandComplete(count) => format!("done {count}"),
        _ => String::new(),
    }
}

async fn alone() -> Cluster {
    let trust = "local all all trust\nhost all all 127.0.0.1/32 trust\n";
    let alone = Cluster::builder().lineage("alone").hba(trust).start().await.expect("starts");
    alone
        .run("postgres", &format!("CREATE ROLE {0} LOGIN; CREATE DATABASE {DATABASE} OWNER {0}", APP.0))
        .await
        .expect("makes");
    let script = format!("SET ROLE {}; {ATTACHMENTS} {MONOLITH}", APP.0);
    alone.run(DATABASE, &script).await.expect("makes the tables");
    alone
}

#[tokio::test]
async fn a_random_conversation_is_answered_as_by_a_server_with_all_tables() {
    let (pair, alone) = tokio::join!(split("new-primary", ""), alone());
    let (conversations, exchanges) = if proof() { (200, 200) } else { (5, 50) };
    for seed in 0..conversations {
        let mut random = StdRng::seed_from_u64(seed);
        let url = format!("postgres://{}@127.0.0.1:{}/{DATABASE}", APP.0, alone.port());
        let (twin, connection) = tokio_postgres::connect(&url, NoTls).await.expect("connects");
        tokio::spawn(connection);
        let ours = pair.client().await;
        let mut said = Vec::new();
        for _ in 0..exchanges {
            let number = random.random_range(1..9);
            let bound = random.random_bool(0.3);
            let text = if bound { BOUND } else { SAID }.choose(&mut random).expect("one");
            let text = text.replace("{i}", &number.to_string());
            if text.starts_with("BEGIN;") {
                // Inside a block such a text is refused: its statements would belong to two sessions.
                assert_eq!(say(&ours, "ROLLBACK", None).await, say(&twin, "ROLLBACK", None).await);
            }
            said.push(text.clone());
            let expected = say(&twin, &text, bound.then_some(number)).await;
            let found = say(&ours, &text, bound.then_some(number)).await;
            assert_eq!(found, expected, "seed {seed}: {}", said.join("\n"));
        }
        let end = "ROLLBACK";
        say(&twin, end, None).await;
        say(&ours, end, None).await;
        for (side, table) in [(&pair.databases.old, "orders"), (&pair.databases.new, "attachments")] {
            let all = format!("SELECT string_agg(t::text, ' ' ORDER BY id) FROM {table} t");
            assert_eq!(on(side, &all).await, on(&alone, &all).await, "seed {seed}: {}", said.join("\n"));
        }
    }
    pair.proxy.settle().await;
    let all = "SELECT string_agg(t::text, ' ' ORDER BY id) FROM attachments t";
    assert_eq!(on(&pair.databases.old, all).await, on(&alone, all).await);
}
