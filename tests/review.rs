//! Ways past the mirror that a reading of the code has found: each was a row that went missing, or a session that ended.

mod common;

use common::raw::{self, Frame, RawClient};
use common::{Databases, Pair, Proxy};

const SCHEMA: &str = "
    CREATE TABLE notes (id int PRIMARY KEY, body text);
    CREATE TABLE log (what text);
    CREATE TABLE seen (what text PRIMARY KEY);
    CREATE TABLE secrets (id int PRIMARY KEY, body text);
    CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE, body text);
    CREATE FUNCTION log_it(w text) RETURNS void LANGUAGE sql VOLATILE AS $$ INSERT INTO seen VALUES (w) $$;";

/// Clients need no password, servers get it.
const TRUST: &str = "auth: trust\nusers: { app: { password: app-secret } }";

/// Both databases with [`SCHEMA`] and what else a story needs, and the proxy in phase `old`.
async fn start(as_superuser: &str, more: &str) -> Pair {
    let databases = Databases::start(&[("max_prepared_transactions", "10")]).await;
    databases.run_on_both(SCHEMA).await;
    for side in [&databases.old, &databases.new] {
        side.run(common::pair::DATABASE, as_superuser).await.expect("runs on both sides");
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
    side.run(common::pair::DATABASE, sql).await.expect("answers").trim().to_owned()
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

/// Whether and when a prepared transaction commits is decided elsewhere: its rows are owed, and paid when they are there.
#[tokio::test]
async fn what_a_prepared_transaction_has_written_is_owed() {
    let pair = mirrored("", "limits: { mirror_buffer: 64KiB }").await;
    let mut client = raw_client(&pair).await;
    let write = |id: u32| {
        raw::query(&format!(
            "BEGIN; INSERT INTO notes VALUES ({id}, 'x'); INSERT INTO log VALUES ('row {id}'); SELECT log_it('unseen {id}')"
        ))
    };
    let big = raw::query("INSERT INTO notes SELECT n, repeat('y', 1000) FROM generate_series(1000, 1200) n");
    let prepare =
        |sql: &str| [raw::parse("", sql, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0), raw::sync()];

    says(&mut client, &[write(1)]).await;
    says(&mut client, &[big]).await;
    assert_eq!(says(&mut client, &[raw::query("PREPARE TRANSACTION 'simple'")]).await, "CZ");
    says(&mut client, &[write(2)]).await;
    assert_eq!(says(&mut client, &prepare("PREPARE TRANSACTION 'extended'")).await, "12CZ");
    let several = "BEGIN; INSERT INTO notes VALUES (3, 'x'); PREPARE TRANSACTION 'several'";
    assert_eq!(says(&mut client, &[raw::query(several)]).await, "CCCZ");
    says(&mut client, &[write(4)]).await;
    assert_eq!(says(&mut client, &[raw::query("PREPARE TRANSACTION 'undone'")]).await, "CZ");
    // A name that is taken: the transaction is gone, as without a proxy.
    says(&mut client, &[write(5)]).await;
    assert_eq!(says(&mut client, &[raw::query("PREPARE TRANSACTION 'undone'")]).await, "EZ");
    assert_eq!(says(&mut client, &[raw::query("PREPARE TRANSACTION 'no block'")]).await, "NCZ");
    assert_eq!(on(&pair.databases.new, "SELECT count(*) FROM notes").await, "0", "nothing has committed");

    for name in ["simple", "extended", "several"] {
        assert_eq!(says(&mut client, &[raw::query(&format!("COMMIT PREPARED '{name}'"))]).await, "CZ");
    }
    assert_eq!(says(&mut client, &[raw::query("ROLLBACK PREPARED 'undone'")]).await, "CZ");
    pair.settle_and_assert_equal().await;
    let rows = "SELECT (SELECT count(*) FROM notes), (SELECT string_agg(what, ',' ORDER BY what) FROM (TABLE log UNION ALL TABLE seen) t)";
    assert_eq!(on(&pair.databases.new, rows).await, "204|row 1,row 2,unseen 1,unseen 2");
}

/// It outlives its session, is committed by another, through the proxy or around it, and holds each move meanwhile: one into a mirrored phase, too, since nothing of it is owed.
#[tokio::test]
async fn a_prepared_transaction_outlives_its_session_and_holds_moves() {
    let mut pair = start("", "move: { pause: 1s }").await;
    let mut client = raw_client(&pair).await;
    let prepared = "BEGIN; INSERT INTO notes VALUES (1, 'in phase old'); PREPARE TRANSACTION 'before'";
    assert_eq!(says(&mut client, &[raw::query(prepared)]).await, "CCCZ");
    drop(client);
    pair.proxy.request_phase("dual-write");
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert!(!pair.proxy.holds("dual-write").await, "nobody would mirror its row");
    assert!(pair.proxy.log().contains("a prepared transaction (before) on old"), "it is named");
    let mut client = raw_client(&pair).await;
    assert_eq!(says(&mut client, &[raw::query("COMMIT PREPARED 'before'")]).await, "CZ");
    pair.proxy.reaches("dual-write").await;
    assert_eq!(pair.settle_and_assert_equal().await, 1);

    // One pipeline with one Sync, by a session that is gone then.
    let run = |sql: &str| [raw::parse("", sql, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat();
    for (id, name) in [(2, "through"), (3, "around"), (4, "undone")] {
        let insert = format!("INSERT INTO notes VALUES ({id}, '{name}')");
        let prepare = format!("PREPARE TRANSACTION '{name}'");
        let pipeline = [run("BEGIN"), run(&insert), run("UPDATE deferred SET id = id + 1"), run(&prepare), raw::sync()];
        let mut client = raw_client(&pair).await;
        assert_eq!(says(&mut client, &pipeline).await, "12C12C12C12CZ", "{name}");
    }
    assert_eq!(pair.settle_and_assert_equal().await, 1, "nothing of it is there");
    let mut client = raw_client(&pair).await;
    assert_eq!(says(&mut client, &[run("COMMIT PREPARED 'through'"), raw::sync()]).await, "12CZ");
    on(&pair.databases.old, "COMMIT PREPARED 'around'; ROLLBACK PREPARED 'undone'").await;
    assert_eq!(pair.settle_and_assert_equal().await, 3);
    assert_eq!(pair.proxy.metrics("crossfade_tainted_tables").await, 0.0);
}

/// A role that may write and not read: RETURNING would make its statements fail.
#[tokio::test]
async fn a_role_that_may_not_read_writes_through_set_role() {
    let roles = "DROP ROLE IF EXISTS writer; CREATE ROLE writer; GRANT writer TO app; GRANT INSERT ON secrets TO writer; \
        GRANT INSERT, SELECT ON notes TO writer";
    let pair = mirrored(roles, "").await;
    let mut client = raw_client(&pair).await;
    let put = |id: &str| [raw::bind("", "put", &[], &[Some(id.as_bytes())], &[]), raw::execute("", 0), raw::sync()];
    let parse = raw::parse("put", "INSERT INTO secrets VALUES ($1::int, 'x')", &[25]);
    assert_eq!(says(&mut client, &[parse, raw::sync()]).await, "1Z");
    assert_eq!(says(&mut client, &put("1")).await, "2CZ");
    assert_eq!(says(&mut client, &[raw::query("SET ROLE writer")]).await, "CZ");
    assert_eq!(says(&mut client, &put("2")).await, "2CZ", "its plan was made for another role");
    assert_eq!(says(&mut client, &[raw::query("INSERT INTO secrets VALUES (3, 'x')")]).await, "CZ");
    assert_eq!(says(&mut client, &[raw::query("INSERT INTO notes VALUES (3, 'x')")]).await, "CZ");
    let mut client = raw_client(&pair).await;
    let several = "BEGIN; SET LOCAL ROLE writer; INSERT INTO secrets VALUES (4, 'x'); COMMIT";
    assert_eq!(says(&mut client, &[raw::query(several)]).await, "CCCCZ");
    pair.settle_and_assert_equal().await;
    assert_eq!(on(&pair.databases.new, "SELECT string_agg(id::text, ',' ORDER BY id) FROM secrets").await, "1,2,3,4");
}

/// A start at which no numbers for debts could be drawn: the move draws them.
#[tokio::test]
async fn debts_have_numbers_where_the_start_could_not_draw_them() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let control = common::pair::CONTROL.0;
    // Without the right to make a schema, or to commit with a flush of its own accord.
    on(&databases.old, &format!("ALTER ROLE {control} NOSUPERUSER; ALTER ROLE {control} SET synchronous_commit = off"))
        .await;
    let proxy = Proxy::start(databases.proxy_config("old", TRUST)).await;
    on(&databases.old, &format!("ALTER ROLE {control} SUPERUSER")).await;
    let mut pair = Pair { proxy, databases };
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.settle().await;
    let mut client = raw_client(&pair).await;
    let debts = "SELECT count(*), bool_and(id >> 32 > 0) FROM crossfade.ledger";
    pair.databases.new.kill9();
    says(&mut client, &[raw::query("INSERT INTO notes VALUES (1, 'owed')")]).await;
    assert_eq!(on(&pair.databases.old, debts).await, "1|t");
    pair.databases.new.start().await.expect("starts");
    pair.settle_and_assert_equal().await;
    // Each ledger has numbers of its own.
    pair.proxy.set_phase("new-primary").await;
    says(&mut client, &[raw::query("INSERT INTO notes VALUES (2, 'back')")]).await;
    pair.settle_and_assert_equal().await;
    assert_eq!(on(&pair.databases.new, "SELECT is_called FROM crossfade.ledger_id").await, "t");
}

/// All sessions of the pool are in use: what waits in vain is owed, and nobody takes the mirror for dead.
#[tokio::test]
async fn a_pool_without_a_free_place_is_no_mirror_that_is_down() {
    let pair =
        mirrored("", "mirror: { connections: 1, timeout: 500ms }\nlimits: { mirror_buffer: 64KiB, threads: 1 }").await;
    let (mut long, mut short) = (raw_client(&pair).await, raw_client(&pair).await);
    let big = "BEGIN; INSERT INTO notes SELECT n, repeat('y', 1000) FROM generate_series(1000, 1200) n";
    says(&mut long, &[raw::query(big)]).await;
    says(&mut long, &[raw::query("SELECT 1")]).await;
    says(&mut short, &[raw::query("INSERT INTO notes VALUES (1, 'waits for a place')")]).await;
    assert_eq!(pair.proxy.metrics("crossfade_mirror_failures_total{reason=\"busy\"}").await, 1.0);
    assert!(!pair.proxy.log().contains("the mirror failed"));
    says(&mut long, &[raw::query("COMMIT")]).await;
    assert_eq!(
        pair.proxy.metrics("crossfade_mirror_failures_total").await,
        1.0,
        "its images were on the mirror all along"
    );
    pair.settle_and_assert_equal().await;
}

/// `best-effort` writes no debt beforehand: where the mirror's COMMIT fails it is written afterwards.
#[tokio::test]
async fn best_effort_owes_what_the_mirror_did_not_commit() {
    let pair = mirrored("", "mirror: { commit: best-effort }").await;
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$; \
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON notes DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse(); \
        ALTER TABLE notes ENABLE ALWAYS TRIGGER refuse";
    on(&pair.databases.new, refuse).await;
    let mut client = raw_client(&pair).await;
    assert_eq!(says(&mut client, &[raw::query("INSERT INTO notes VALUES (1, 'late')")]).await, "CZ");
    common::until("the row is owed", async || {
        on(&pair.databases.old, "SELECT count(*) FROM crossfade.ledger").await == "1"
    })
    .await;
    on(&pair.databases.new, "DROP TRIGGER refuse ON notes; DROP FUNCTION refuse()").await;
    pair.settle_and_assert_equal().await;
    assert_eq!(on(&pair.databases.new, "SELECT body FROM notes").await, "late");
}

/// Nothing on the mirror keeps two rows with one deferrable key apart: a second writer must not pass one whose COMMIT is under way there.
#[tokio::test]
async fn a_deferrable_key_stays_one_row_when_a_commit_is_late() {
    let pair = mirrored("", "mirror: { timeout: 20s }").await;
    // The mirror's COMMIT of the first row waits for a lock that the test holds.
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
        IF NEW.body = 'first' THEN PERFORM pg_advisory_xact_lock(77); END IF; RETURN NULL; END $$; \
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON deferred DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow(); \
        ALTER TABLE deferred ENABLE ALWAYS TRIGGER slow";
    on(&pair.databases.new, slow).await;
    let version = "SELECT last_value FROM crossfade.version";
    common::until("the proxy knows the trigger", async || {
        // A write of another table is mirrored again.
        let (before, client) = (pair.proxy.metrics("crossfade_mirror_failures_total").await, pair.client().await);
        client.batch_execute("INSERT INTO log VALUES ('try')").await.expect("inserts");
        let after = pair.proxy.metrics("crossfade_mirror_failures_total").await;
        on(&pair.databases.new, version).await != "1" && after == before
    })
    .await;
    let held = pair.databases.new.client(common::pair::DATABASE).await.expect("connects");
    held.batch_execute("SELECT pg_advisory_lock(77)").await.expect("locks");
    let (first, second) = (pair.client().await, pair.client().await);
    first.batch_execute("INSERT INTO deferred VALUES (1, 'first')").await.expect("is committed on old");
    common::until("the mirror's COMMIT waits", async || {
        let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 77 AND NOT granted";
        on(&pair.databases.new, waits).await == "1"
    })
    .await;
    let writing =
        tokio::spawn(async move { second.batch_execute("UPDATE deferred SET body = 'second' WHERE id = 1").await });
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    held.batch_execute("SELECT pg_advisory_unlock(77)").await.expect("unlocks");
    writing.await.expect("ends").expect("updates");
    pair.settle_and_assert_equal().await;
    assert_eq!(on(&pair.databases.new, "SELECT body FROM deferred").await, "second");
}
