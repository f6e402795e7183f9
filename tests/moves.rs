//! Moves that are cut short: whatever holds afterwards, no acknowledged write is missing.

mod common;

use std::time::Duration;

use common::pair::{APP, DATABASE};
use common::{Databases, Proxy, until};
use tokio_postgres::NoTls;

/// What keeps the claim from being written on new.
const OBSTACLE: &str = "CREATE FUNCTION crossfade.refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''not now''; END';
    CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON crossfade.migration FOR EACH ROW EXECUTE FUNCTION crossfade.refuse()";

#[tokio::test]
async fn between_pointer_and_claim_no_transaction_runs() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both("CREATE TABLE notes (id int PRIMARY KEY)").await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let (client, connection) = tokio_postgres::connect(&proxy.url_as(APP.0, APP.1, DATABASE), NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute("INSERT INTO notes VALUES (1)").await.unwrap();
    proxy.settle().await;

    databases.new.psql(DATABASE, OBSTACLE).await.unwrap();
    proxy.request_phase("new-primary");
    until("old points to new", async || {
        let row = databases.old.psql(DATABASE, "SELECT authority FROM crossfade.migration").await;
        row.is_ok_and(|row| row.trim() == "new")
    })
    .await;
    // Behind the pointer old is no authority any more. A write that it acknowledged now would be missing for whoever believes the rows.
    let mut write = tokio::spawn(async move { client.batch_execute("INSERT INTO notes VALUES (2)").await });
    assert!(tokio::time::timeout(Duration::from_secs(2), &mut write).await.is_err(), "a write waits");
    let (_, status) = proxy.http("/status").await.expect("the proxy answers HTTP");
    assert!(status.contains("not now"), "status says what the move waits for: {status}");

    databases.new.psql(DATABASE, "DROP TRIGGER refuse ON crossfade.migration").await.unwrap();
    write.await.unwrap().expect("the write is done under the new authority");
    assert!(proxy.holds("new-primary").await);
    proxy.settle().await;
    assert!(databases.assert_equal().await >= 2);
}
