//! Ways past the mirror that a reading of the code has found: each was a row that went missing, or a session that ended.

mod common;

use common::raw::{self, Frame, RawClient};
use common::{Databases, Pair, Proxy};

const SCHEMA: &str = "
    CREATE TABLE notes (id int PRIMARY KEY, body text);
    CREATE TABLE log (what text);
    CREATE TABLE secrets (id int PRIMARY KEY, body text);
    CREATE FUNCTION log_it(w text) RETURNS void LANGUAGE sql VOLATILE AS $$ INSERT INTO log (what) VALUES (w) $$;";

/// Clients need no password, servers get it.
const TRUST: &str = "auth: trust\nusers: { app: { password: app-secret } }";

/// Both databases with [`SCHEMA`] and what else a story needs, and the proxy in phase `old`.
async fn start(as_superuser: &str, more: &str) -> Pair {
    let databases = Databases::start(&[("max_prepared_transactions", "10")]).await;
    databases.run_on_both(SCHEMA).await;
    for side in [&databases.old, &databases.new] {
        side.psql(common::pair::DATABASE, as_superuser).await.expect("runs on both sides");
    }
    let proxy = Proxy::start(databases.proxy_config("old", &format!("{TRUST}\n{more}"))).await;
    Pair { proxy, databases }
}

/// The same in `dual-write`, with nothing owed.
async fn mirrored(as_superuser: &str, more: &str) -> Pair {
    let mut pair = start(as_superuser, more).await;
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.settle().await;
    pair
}

async fn raw_client(pair: &Pair) -> RawClient {
    let startup = raw::startup(raw::V3_0, &[("user", "app"), ("database", common::pair::DATABASE)]);
    RawClient::connect(pair.proxy.port(), None, &startup).await.0
}

/// Sends messages and reads up to ReadyForQuery.
async fn says(client: &mut RawClient, messages: &[Vec<u8>]) -> String {
    client.send(&messages.concat()).await;
    tags(&client.until_ready(1).await)
}

fn tags(frames: &[Frame]) -> String {
    frames.iter().filter(|frame| frame.tag != b'S').map(|frame| char::from(frame.tag)).collect()
}

/// What a query gives on one side, asked behind the proxy's back.
async fn on(side: &crossfade::cluster::Cluster, sql: &str) -> String {
    side.psql(common::pair::DATABASE, sql).await.expect("answers").trim().to_owned()
}

/// A Bind that does not come in one piece, of a statement that was prepared before the phase moved: its plan is not known when its first bytes
/// come.
#[tokio::test]
async fn a_large_bind_of_a_statement_from_another_world_is_captured() {
    let mut pair = start("", "").await;
    let mut client = raw_client(&pair).await;
    let parse = raw::parse("put", "INSERT INTO notes VALUES ($1::int, $2)", &[25, 25]);
    assert_eq!(says(&mut client, &[parse, raw::sync()]).await, "1Z");
    let body = vec![b'x'; 3 << 20];
    let bind = |statement: &str| {
        let values = [Some(&b"1"[..]), Some(&body[..])];
        [raw::bind("", statement, &[], &values, &[]), raw::execute("", 0), raw::sync()]
    };
    pair.proxy.set_phase("dual-write").await;
    assert_eq!(says(&mut client, &bind("put")).await, "2CZ", "prepared in phase old");

    // A table that does not migrate yet: its plan lets writes pass. In another generation of the catalog it does.
    let table = "CREATE TABLE late (id int PRIMARY KEY, body text); ALTER TABLE late OWNER TO app";
    on(&pair.databases.old, table).await;
    pair.proxy.set_phase("old").await;
    pair.proxy.set_phase("dual-write").await;
    let parse = raw::parse("late", "INSERT INTO late VALUES ($1::int, $2)", &[25, 25]);
    assert_eq!(says(&mut client, &[parse, raw::sync()]).await, "1Z");
    on(&pair.databases.new, table).await;
    pair.proxy.set_phase("old").await;
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.settle().await;
    let images = pair.proxy.metrics("crossfade_mirror_images_total").await;
    assert_eq!(says(&mut client, &bind("late")).await, "2CZ", "with a plan that is stale");
    assert_eq!(pair.proxy.metrics("crossfade_mirror_images_total").await, images + 1.0);
    pair.settle_and_assert_equal().await;
    assert_eq!(
        on(&pair.databases.new, "SELECT sum(length(body)) FROM (TABLE notes UNION ALL TABLE late) t").await,
        "6291456"
    );
}
