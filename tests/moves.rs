//! Moves that are cut short: whatever holds afterwards, no acknowledged write is missing.

mod common;

use common::pair::{APP, DATABASE};
use common::{Databases, Proxy, until};
use tokio_postgres::NoTls;

/// What keeps the claim from being written on new.
const OBSTACLE: &str = "CREATE FUNCTION crossfade.refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''not now''; END';
    CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON crossfade.migration FOR EACH ROW EXECUTE FUNCTION crossfade.refuse()";

#[tokio::test]
async fn a_claim_that_is_refused_withdraws_the_move() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both("CREATE TABLE notes (id int PRIMARY KEY)").await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let (client, connection) = tokio_postgres::connect(&proxy.url_as(APP.0, APP.1, DATABASE), NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute("INSERT INTO notes VALUES (1)").await.unwrap();
    proxy.settle().await;

    databases.new.run(DATABASE, OBSTACLE).await.unwrap();
    proxy.verify().await;
    proxy.request_phase("new-primary");
    let withdrawn = "SELECT count(*) FROM crossfade.history WHERE event = 'withdrawn'";
    until("the move is withdrawn by a later epoch", async || {
        databases.old.run(DATABASE, withdrawn).await.is_ok_and(|count| count.trim() == "1")
    })
    .await;
    // Old claims itself again: what it acknowledges now is not missing for whoever believes the rows.
    client.batch_execute("INSERT INTO notes VALUES (2)").await.expect("old is authority");
    let row = databases.old.run(DATABASE, "SELECT epoch, phase, authority FROM crossfade.migration").await.unwrap();
    assert_eq!(row.trim(), "3|dual-write|old", "behind the pointer's epoch 2");
    let (_, status) = proxy.http("/status").await.expect("the proxy answers HTTP");
    assert!(status.contains("not now"), "status says what is in the way: {status}");
    proxy.settle().await;
    assert!(databases.assert_equal().await >= 2);

    databases.new.run(DATABASE, "DROP TRIGGER refuse ON crossfade.migration").await.unwrap();
    // Clients were held in vain: it is tried again at once only where somebody asks.
    proxy.hang_up();
    proxy.reaches("new-primary").await;
    client.batch_execute("INSERT INTO notes VALUES (3)").await.expect("new is authority");
    proxy.settle().await;
    assert!(databases.assert_equal().await >= 3);
}
