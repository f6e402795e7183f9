//! `fence: true`: writes that go around every proxy are kept out of the side that is not the authority, in each phase and on both ways; those of the
//! application, through the proxy, go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossfade::cluster::Cluster;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::common::pair::{APP, DATABASE};
use super::common::{Pair, proof, until};

const SCHEMA: &str = "CREATE TABLE notes (id int PRIMARY KEY, body text);
    CREATE TABLE events (what text);
    CREATE TABLE parts (id int PRIMARY KEY, body text) PARTITION BY RANGE (id);
    CREATE TABLE parts_low PARTITION OF parts FOR VALUES FROM (-1000) TO (1000);
    INSERT INTO notes VALUES (0, 'before');";

const DIRECT: [&str; 9] = [
    "INSERT INTO notes VALUES (-1, 'around')",
    "UPDATE notes SET body = 'around'",
    "DELETE FROM notes",
    "TRUNCATE notes",
    "INSERT INTO events VALUES ('around')",
    "INSERT INTO parts VALUES (-1, 'around')",
    "INSERT INTO parts_low VALUES (-2, 'around')",
    "WITH put AS (INSERT INTO notes VALUES (-1, 'around') RETURNING id) SELECT id FROM put",
    "MERGE INTO notes n USING (VALUES (0)) v(id) ON n.id = v.id WHEN MATCHED THEN UPDATE SET body = 'around'",
];

async fn on(side: &Cluster, sql: &str) -> String {
    side.run(DATABASE, sql).await.expect(sql).trim().to_owned()
}

async fn fences(side: &Cluster) -> String {
    on(side, "SELECT count(*) FROM pg_trigger WHERE tgname = 'crossfade_fence'").await
}

async fn refused(client: &Client, sql: &str) {
    let error = client.batch_execute(sql).await.expect_err(sql);
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "{sql}: {error:?}");
    let told = error.as_db_error().expect("the server says so");
    assert!(told.message().contains("went around the proxy") && told.hint().is_some(), "{sql}: {told}");
}

/// A superuser and the application's own role write directly: here it is refused, and there it is not (and is rolled back).
async fn assert_fenced(authority: &Cluster, other: &Cluster) {
    for role in ["postgres", APP.0] {
        for (side, fenced) in [(other, true), (authority, false)] {
            let client = side.client(DATABASE).await.expect("connects");
            client.batch_execute(&format!("SET ROLE {role}")).await.expect("sets");
            for sql in DIRECT {
                if fenced {
                    refused(&client, sql).await;
                } else {
                    client.batch_execute(&format!("BEGIN; {sql}; ROLLBACK")).await.expect(sql);
                }
            }
        }
    }
    let copy = "COPY notes FROM STDIN;\n-1\taround\n\\.\n";
    assert!(other.run(DATABASE, copy).await.is_err(), "COPY is kept out as well");
    let replica = "BEGIN; SET LOCAL session_replication_role = replica; INSERT INTO notes VALUES (-1, ''); ROLLBACK";
    on(other, replica).await;
}

#[tokio::test]
async fn writes_around_the_proxy_are_kept_out_of_the_side_that_is_not_the_authority() {
    let mut pair = Pair::start("old", SCHEMA, "fence: true").await;
    until("the fence stands", async || {
        let (old, new) = (&pair.databases.old, &pair.databases.new);
        let closed = "SELECT to_regclass('crossfade.fenced') IS NOT NULL";
        (fences(old).await, fences(new).await) == ("4".into(), "4".into()) && on(new, closed).await == "t"
    })
    .await;
    let client = pair.client().await;
    let early = pair.databases.old.client(DATABASE).await.expect("connects");
    let way: &[&str] = match proof() {
        true => &["old", "dual-write", "new-primary", "old-read-only", "new-primary", "dual-write", "old"],
        false => &["old", "dual-write", "new-primary", "dual-write"],
    };
    for (id, &phase) in (1..).zip(way) {
        if phase == "new-primary" && id == 3 {
            // Its snapshot is of the time when old was the authority.
            early
                .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM notes")
                .await
                .expect("reads");
        }
        if id > 1 {
            pair.proxy.set_phase(phase).await;
        }
        let script = format!(
            "INSERT INTO notes VALUES ({id}, '{phase}'); UPDATE notes SET body = '{phase}' WHERE id = 0; \
             INSERT INTO events VALUES ('{phase}'); INSERT INTO parts VALUES ({id}, '{phase}'); INSERT INTO parts_low VALUES ({}, '')",
            100 + id
        );
        client.batch_execute(&script).await.unwrap_or_else(|error| panic!("in {phase}: {error:?}"));
        let databases = &pair.databases;
        let (authority, other) = match phase {
            "new-primary" | "old-read-only" => (&databases.new, &databases.old),
            _ => (&databases.old, &databases.new),
        };
        if phase == "new-primary" && id == 3 {
            refused(&early, "INSERT INTO notes VALUES (-3, 'around')").await;
            early.batch_execute("ROLLBACK").await.expect("ends");
        }
        assert_fenced(authority, other).await;
        if matches!(phase, "dual-write" | "new-primary") {
            pair.settle_and_assert_equal().await;
        }
    }
    assert_eq!(pair.proxy.metrics("crossfade_mirror_failures_total").await, 0.0, "the mirror's sessions pass it");
    assert!(pair.proxy.terminate().await.success());
    pair.proxy.set_more("");
    let lowered = pair.proxy.crossfade(&["install"]).await;
    let said = String::from_utf8_lossy(&lowered.stdout).into_owned();
    assert!(said.contains("old: the fence is taken from 4 tables") && said.contains("new: the fence"), "{said}");
    on(&pair.databases.new, "INSERT INTO notes VALUES (-1, 'around')").await;
}

/// Writes directly, one statement after the other, until it is told to stop: how many were taken, and how many the fence kept out.
async fn stranger(client: Client, stop: Arc<AtomicBool>) -> (u64, u64) {
    let (mut taken, mut kept_out) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        match client.batch_execute("INSERT INTO strays DEFAULT VALUES").await {
            Ok(()) => taken += 1,
            Err(error) => {
                assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "{error:?}");
                kept_out += 1;
            }
        }
    }
    (taken, kept_out)
}

/// While the authority moves to and fro, strangers write directly on both sides: each row that was taken says, by what its own transaction saw, that its side was the
/// authority.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_who_write_while_the_authority_moves_are_kept_out_of_the_other_side() {
    let schema = "CREATE TABLE notes (id int PRIMARY KEY, body text);
        CREATE FUNCTION holder() RETURNS text STABLE SECURITY DEFINER LANGUAGE plpgsql AS $$ BEGIN
            RETURN (SELECT authority FROM crossfade.migration); END $$;
        CREATE TABLE strays (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), holder text DEFAULT holder());";
    let pair = Pair::dual_write(schema, "fence: true").await;
    let (old, new) = (&pair.databases.old, &pair.databases.new);
    for side in [old, new] {
        // As the owner, who may read what holds.
        on(side, "ALTER FUNCTION holder() OWNER TO postgres").await;
    }
    until("the fence stands", async || (fences(old).await, fences(new).await) == ("2".into(), "2".into())).await;
    let client = pair.client().await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut strangers = Vec::new();
    for side in [old, new] {
        strangers.push(tokio::spawn(stranger(side.client(DATABASE).await.expect("connects"), stop.clone())));
    }
    let moves = if proof() { 40 } else { 6 };
    for id in 0..moves {
        let phase = if id % 2 == 0 { "new-primary" } else { "dual-write" };
        // The strays are on one side only: no verification finds both sides equal.
        let arguments = ["phase", phase, "--force", "--reason", "strangers write"];
        // Now and then one of them is seen at work by the gate.
        until("the move goes through", async || pair.proxy.crossfade(&arguments).await.status.success()).await;
        client.execute("INSERT INTO notes VALUES ($1, 'through the proxy')", &[&id]).await.expect("goes on");
    }
    stop.store(true, Ordering::Relaxed);
    for ((side, name), stranger) in [(old, "old"), (new, "new")].into_iter().zip(strangers) {
        let (taken, kept_out) = stranger.await.expect("ends");
        let text = format!("SELECT count(*) || ' ' || count(*) FILTER (WHERE holder = '{name}') FROM strays");
        let said = on(side, &text).await;
        assert_eq!(said, format!("{taken} {taken}"), "{name}: of the rows taken, those where it was the authority");
        assert!(taken > 0 && kept_out > 0, "{name}: {taken} taken, {kept_out} kept out");
    }
    let notes = "SELECT count(*) FROM notes";
    assert_eq!(on(new, notes).await, moves.to_string());
}

/// The end of the migration takes it away with everything else.
#[tokio::test]
async fn uninstall_takes_the_fence_away() {
    let pair = Pair::start("old", SCHEMA, "").await;
    let mut proxy = pair.proxy;
    assert!(proxy.terminate().await.success());
    proxy.set_more("fence: true");
    let installed = proxy.crossfade(&["install"]).await;
    assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
    let (old, new) = (&pair.databases.old, &pair.databases.new);
    assert_fenced(old, new).await;
    let check = proxy.crossfade(&["check"]).await;
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(!said.contains("fence"), "what is as it should be is not named: {said}");
    assert!(!said.contains("trigger"), "it is no trigger of the application's: {said}");
    let ended = proxy.crossfade(&["uninstall"]).await;
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stdout));
    for side in [old, new] {
        assert_eq!(fences(side).await, "0");
        on(side, "INSERT INTO notes VALUES (-1, 'around')").await;
    }
}
