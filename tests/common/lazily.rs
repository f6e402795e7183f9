//! Databases of which old alone has rows of a table with `backfill: lazy`.

use tokio_postgres::{Client, SimpleQueryMessage};

use super::pair::{APP, DATABASE};
use super::{Databases, Pair, Proxy, until};

pub const SCHEMA: &str = "CREATE TABLE photo (id bigint PRIMARY KEY, owner text, size int NOT NULL, taken timestamptz);
    CREATE TABLE note (id int PRIMARY KEY, body text);
    CREATE PROCEDURE change_note() LANGUAGE sql AS 'UPDATE note SET body = ''by CALL'' WHERE id = 1';";

pub const FILE: &str = "federate: true
tables:
  - { name: public.photo, backfill: lazy }
  - public.note";

/// Both databases, with rows on old alone, and a proxy in `new-primary`.
pub async fn lazily(rows: &str) -> Pair {
    lazily_on(Databases::start(&[]).await, rows).await
}

pub async fn lazily_on(databases: Databases, rows: &str) -> Pair {
    databases.run_on_both(SCHEMA).await;
    databases.old.run(DATABASE, &format!("SET ROLE {}; {rows}", APP.0)).await.expect("fills old");
    let mut proxy = Proxy::start(databases.proxy_config("old", FILE)).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    Pair { proxy, databases }
}

pub async fn new_primary(pair: &mut Pair) {
    pair.proxy.verify().await;
    pair.proxy.set_phase("new-primary").await;
}

/// All values of the answer to a Query, a row as `a|b`.
pub async fn rows(client: &Client, sql: &str) -> Vec<String> {
    let answer = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let mut found = Vec::new();
    for message in answer {
        if let SimpleQueryMessage::Row(row) = message {
            let values: Vec<&str> = (0..row.len()).map(|at| row.get(at).unwrap_or("NULL")).collect();
            found.push(values.join("|"));
        }
    }
    found
}

pub async fn on_new(pair: &Pair, sql: &str) -> String {
    pair.databases.new.run(DATABASE, sql).await.expect("runs on new").trim().to_owned()
}

pub async fn on_old(pair: &Pair, sql: &str) -> String {
    pair.databases.old.run(DATABASE, sql).await.expect("runs on old").trim().to_owned()
}

pub const TEN: &str = "INSERT INTO photo SELECT n, 'o' || n % 3, n * 10, '2026-01-01'::timestamptz + n * interval '1 day' FROM generate_series(1, 10) n;
    INSERT INTO note SELECT n, 'note ' || n FROM generate_series(1, 5) n";

/// Waits until somebody on new waits for a lock.
pub async fn until_one_waits(pair: &Pair) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    until("a session waits", async || on_new(pair, waiting).await != "0").await;
}
