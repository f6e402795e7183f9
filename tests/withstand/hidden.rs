//! Functions that write, made where and when nobody looks: each call of them is audited all the same.

use crate::common::pair::{CONTROL, DATABASE};
use crate::common::{Databases, Pair, Proxy};

const TABLE: &str = "CREATE TABLE notes (id int PRIMARY KEY, body text)";

fn function(name: &str) -> String {
    format!(
        "CREATE FUNCTION {name}(k int) RETURNS void LANGUAGE sql AS 'INSERT INTO notes VALUES (k, ''out of sight'')'"
    )
}

/// What a role makes without naming a schema comes into the schema of its own name, where there is one. The control role's is ours, once a proxy
/// has installed it: before, the same script makes the same function in `public`.
#[tokio::test]
async fn a_function_in_our_own_schema_is_audited() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(TABLE).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "")).await;
    for side in [&databases.old, &databases.new] {
        let control = side.client_as(CONTROL.0, CONTROL.1, DATABASE).await.expect("connects");
        // As a proxy has made it on old; on new the first mirrored phase would.
        control.batch_execute("CREATE SCHEMA IF NOT EXISTS crossfade").await.expect("is there");
        control.batch_execute(&function("f")).await.expect("makes");
    }
    proxy.restart().await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    let url = proxy.url_as(CONTROL.0, CONTROL.1, DATABASE);
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects");
    tokio::spawn(async move { drop(connection.await) });
    let pair = Pair { proxy, databases };
    let found = pair.tainted_by(&["notes"], async || client.batch_execute("SELECT f(1)").await.expect("writes")).await;
    assert_eq!(found, ["notes"]);
    assert_eq!(pair.settle_and_assert_equal().await, 1);
}

/// Between the making of a function around the proxy and the next look at the definitions its name is not known: nor is what it does.
#[tokio::test]
async fn a_function_that_was_made_a_moment_ago_is_audited() {
    let pair = Pair::dual_write(TABLE, "").await;
    let client = pair.client().await;
    for id in 0..5 {
        let name = format!("made_{id}");
        pair.databases.run_on_both(&function(&name)).await;
        let call = format!("SELECT {name}({id})");
        let found = pair.tainted_by(&["notes"], async || client.batch_execute(&call).await.expect("writes")).await;
        assert_eq!(found, ["notes"], "{call}");
    }
    // What the server itself knows costs nothing.
    let plain = "SELECT now(), uuid('00000000-0000-0000-0000-000000000000'), count(*), max(id), coalesce(min(id), 1) FROM notes";
    let opaque = pair.proxy.metrics("crossfade_opaque_writes_total").await;
    client.batch_execute(plain).await.expect("reads");
    assert_eq!(pair.proxy.metrics("crossfade_opaque_writes_total").await, opaque);
    assert_eq!(pair.settle_and_assert_equal().await, 5);
}
