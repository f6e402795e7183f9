//! Writes that no image shows, in `dual-write` (interleaving 11): the audit before COMMIT finds which tables they wrote, by name, and no other.

mod common;

use common::pair::TRUST;
use common::{Pair, raw, until};
use tokio_postgres::error::SqlState;

const SCHEMA: &str = "
    CREATE TABLE users (id int PRIMARY KEY, name text UNIQUE, visits int NOT NULL DEFAULT 0);
    CREATE TABLE posts (id int PRIMARY KEY, owner int REFERENCES users ON DELETE CASCADE, body text);
    CREATE TABLE teams (id int PRIMARY KEY, name text);
    CREATE TABLE members (id int PRIMARY KEY, team int REFERENCES teams ON UPDATE CASCADE);
    CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
    CREATE TABLE audited (id int PRIMARY KEY, what text);
    CREATE TABLE deferred (id int PRIMARY KEY, what text);
    CREATE TABLE parts (id int, day int, what text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20);
    CREATE FUNCTION log_it(w text) RETURNS void LANGUAGE sql VOLATILE AS $$ INSERT INTO log (what) VALUES (w) $$;
    CREATE FUNCTION quiet() RETURNS int LANGUAGE plpgsql VOLATILE AS $$ BEGIN RETURN 7; END $$;
    CREATE FUNCTION stable_wrapper(w text) RETURNS int LANGUAGE sql STABLE AS $$ SELECT 1 FROM log_it(w) $$;
    CREATE FUNCTION empty_log() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'TRUNCATE log'; END $$;
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO log (what) VALUES ('note ' || NEW.id); RETURN NEW; END $$;
    CREATE TRIGGER audited_note AFTER INSERT ON audited FOR EACH ROW EXECUTE FUNCTION note();
    CREATE CONSTRAINT TRIGGER deferred_note AFTER INSERT ON deferred DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION note();
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE NOTICE 'looking at %', NEW.id; IF NEW.what = 'bad' THEN RAISE EXCEPTION 'a bad one' USING ERRCODE = '23514'; END IF;
        RETURN NEW; END $$;
    CREATE CONSTRAINT TRIGGER deferred_refuse AFTER INSERT ON deferred DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION refuse();
    CREATE PROCEDURE call_it(w text) LANGUAGE plpgsql AS $$ BEGIN INSERT INTO log (what) VALUES (w); COMMIT; END $$;
    INSERT INTO users VALUES (1, 'ann'), (2, 'bob'), (3, 'cy');
    INSERT INTO teams VALUES (1, 'a'), (2, 'b');
    INSERT INTO members VALUES (1, 1);
    INSERT INTO posts VALUES (1, 1, 'a'), (2, 1, 'b'), (3, 2, 'c');
    INSERT INTO parts VALUES (1, 1, 'x'), (2, 2, 'y');";

const TABLES: [&str; 8] = ["users", "posts", "teams", "members", "log", "audited", "deferred", "parts"];

/// In `dual-write`, nothing owed.
async fn start(more: &str) -> Pair {
    Pair::dual_write(SCHEMA, more).await
}

/// Runs something, and says which tables it tainted.
async fn tainted(pair: &Pair, what: impl AsyncFnOnce()) -> Vec<&'static str> {
    pair.tainted_by(&TABLES, what).await
}

/// Runs a script as one Query, and says which tables it tainted.
async fn tainted_by(pair: &Pair, script: &str) -> Vec<&'static str> {
    let client = pair.client().await;
    tainted(pair, async || client.batch_execute(script).await.unwrap_or_else(|error| panic!("{script}: {error:?}")))
        .await
}

#[tokio::test]
async fn only_tables_that_were_written_out_of_sight_are_tainted() {
    let pair = start("").await;
    let none: [&str; 0] = [];
    // MERGE came with 15, and returns its rows from 17 on: then it is captured, but for keys that it changes.
    let merge = match pair.databases.old.version() {
        ..=14 => ("SELECT 1", &none[..]),
        _ => (
            "MERGE INTO users u USING (VALUES (30)) v(id) ON u.id = v.id WHEN MATCHED THEN UPDATE SET id = v.id, visits = 3",
            &["users"][..],
        ),
    };
    for (script, expected) in [
        ("SELECT log_it('alone')", &["log"][..]),
        ("BEGIN; SELECT log_it('in a block'); COMMIT", &["log"]),
        ("SELECT stable_wrapper('a stable one calls it')", &["log"]),
        ("SELECT quiet()", &none),
        (
            "BEGIN; SELECT quiet(); INSERT INTO users VALUES (10, 'ten'); UPDATE users SET visits = 1 WHERE id < 3; \
          DELETE FROM users WHERE id = 10; SELECT quiet(); COMMIT",
            &none,
        ),
        ("BEGIN; INSERT INTO users VALUES (11, 'eleven'); SELECT quiet(); COMMIT", &none),
        ("INSERT INTO users VALUES (11, 'eleven', quiet()) ON CONFLICT (id) DO UPDATE SET visits = quiet()", &none),
        ("INSERT INTO users VALUES (12, 'twelve', quiet()) ON CONFLICT (id) DO UPDATE SET visits = quiet()", &none),
        ("INSERT INTO audited VALUES (1, 'a trigger')", &["log"]),
        ("INSERT INTO deferred VALUES (1, 'a deferred trigger')", &["log"]),
        ("DELETE FROM users WHERE id = 1", &["posts"]),
        ("DELETE FROM users WHERE id = 3", &none),
        ("UPDATE teams SET name = 'all'", &none),
        ("UPDATE teams SET id = id + 10 WHERE id = 2", &none),
        ("UPDATE teams SET id = id + 10 WHERE id = 1", &["members"]),
        ("BEGIN; UPDATE teams SET id = id + 10; SELECT quiet(); COMMIT", &["members"]),
        ("INSERT INTO teams VALUES (21, 'c') ON CONFLICT (id) DO UPDATE SET id = EXCLUDED.id, name = 'd'", &none),
        ("SELECT empty_log()", &["log"]),
        ("UPDATE users SET id = 20 WHERE id = 2 AND false", &none),
        ("UPDATE users SET id = 21 WHERE id = 11", &none),
        ("BEGIN; SELECT quiet(); UPDATE users SET id = 22 WHERE id = 21; SELECT quiet(); COMMIT", &none),
        ("WITH w AS (INSERT INTO log (what) SELECT 'a CTE') UPDATE users SET visits = 5 WHERE id = 22", &none),
        (
            "WITH w AS (INSERT INTO log (what) SELECT 'x' RETURNING lower(what)) UPDATE users SET visits = 5 WHERE id = 22",
            &["log"],
        ),
        ("WITH w AS (INSERT INTO users VALUES (29, 'shown') RETURNING id) SELECT * FROM w", &none),
        ("WITH w AS (INSERT INTO audited VALUES (29, 'a trigger') RETURNING id) SELECT * FROM w", &["log"]),
        ("WITH w AS (INSERT INTO users VALUES (30, 'thirty') RETURNING abs(id)) SELECT * FROM w", &["users"]),
        ("WITH w AS (DELETE FROM users WHERE id = 999 RETURNING id) SELECT * FROM w", &none),
        merge,
        ("BEGIN; SELECT quiet(); TRUNCATE log; INSERT INTO users VALUES (31, 'x'); COMMIT", &none),
        ("BEGIN; SELECT log_it('gone'); ROLLBACK", &none),
        ("BEGIN; SELECT log_it('kept'); TRUNCATE log; COMMIT", &["log"]),
        ("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT quiet(); COMMIT; CLOSE c", &TABLES),
    ] {
        assert_eq!(tainted_by(&pair, script).await, expected, "{script}");
    }
    pair.settle_and_assert_equal().await;
}

/// O2: what was rolled back is in the server's counters, and must not taint.
#[tokio::test]
async fn create_or_find_with_rollback_to_taints_nothing() {
    let pair = start("").await;
    let mut client = pair.client().await;
    let found = tainted(&pair, async || {
        // Unflushed counts of an earlier transaction that failed.
        client.execute("INSERT INTO users VALUES (1, 'again')", &[]).await.expect_err("is there");
        let tx = client.transaction().await.expect("begins");
        tx.execute("INSERT INTO users VALUES (40, 'forty')", &[]).await.expect("inserts");
        tx.query("SELECT quiet()", &[]).await.expect("runs");
        tx.batch_execute("SAVEPOINT s").await.expect("sets");
        tx.execute("INSERT INTO users VALUES (41, 'ann')", &[]).await.expect_err("the name is there");
        tx.batch_execute("ROLLBACK TO s").await.expect("rolls back");
        tx.query_one("SELECT id FROM users WHERE name = 'ann'", &[]).await.expect("finds");
        tx.execute("UPDATE users SET visits = visits + 1 WHERE name = 'ann'", &[]).await.expect("updates");
        tx.batch_execute("SAVEPOINT t; SELECT log_it('undone'); ROLLBACK TO t; RELEASE t").await.expect("undoes");
        tx.commit().await.expect("commits");
    })
    .await;
    assert_eq!(found, [""; 0]);
    let script = "BEGIN; SELECT log_it('before'); SAVEPOINT s; SELECT quiet(); ROLLBACK TO s; COMMIT";
    assert_eq!(tainted_by(&pair, script).await, ["log"], "what came before the savepoint counts");
    let script = "BEGIN; SAVEPOINT s; SELECT log_it('x'); ROLLBACK TO s; SELECT log_it('behind'); COMMIT";
    assert_eq!(tainted_by(&pair, script).await, ["log"], "and what came behind ROLLBACK TO");
    let script = "BEGIN; SAVEPOINT s; SELECT log_it('x'); SAVEPOINT t; SELECT quiet(); ROLLBACK TO s; COMMIT";
    assert_eq!(tainted_by(&pair, script).await, [""; 0], "found at t, undone with s");
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn a_row_that_moves_to_another_partition_taints_nothing() {
    let pair = start("").await;
    let script = "BEGIN; SELECT quiet(); UPDATE parts SET what = 'z' WHERE id = 1; COMMIT";
    assert_eq!(tainted_by(&pair, script).await, [""; 0]);
    // `day` is of the key, and says which partition.
    for (id, day) in [(1, 12), (2, 13), (1, 3)] {
        let update = format!("UPDATE parts SET day = {day} WHERE id = {id}");
        let script = if day == 13 { update } else { format!("BEGIN; SELECT quiet(); {update}; COMMIT") };
        assert_eq!(tainted_by(&pair, &script).await, [""; 0], "{script}");
    }
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn the_extended_protocol_is_audited_as_well() {
    let pair = start("").await;
    let mut client = pair.client().await;
    let found = tainted(&pair, async || {
        client.query("SELECT log_it($1)", &[&"alone"]).await.expect("runs");
    })
    .await;
    assert_eq!(found, ["log"]);
    let found = tainted(&pair, async || {
        client.query("SELECT quiet()", &[]).await.expect("runs");
        let tx = client.transaction().await.expect("begins");
        tx.execute("INSERT INTO users VALUES ($1, $2)", &[&50, &"fifty"]).await.expect("inserts");
        tx.query("SELECT quiet()", &[]).await.expect("runs");
        tx.execute("SAVEPOINT s", &[]).await.expect("sets");
        tx.execute("INSERT INTO users VALUES ($1, $2)", &[&50, &"again"]).await.expect_err("is there");
        tx.execute("ROLLBACK TO s", &[]).await.expect("rolls back");
        tx.execute("UPDATE users SET visits = $1 WHERE id = 50", &[&5]).await.expect("updates");
        tx.commit().await.expect("commits");
    })
    .await;
    assert_eq!(found, [""; 0]);
    let found = tainted(&pair, async || {
        let tx = client.transaction().await.expect("begins");
        tx.query("SELECT log_it($1)", &[&"in a block"]).await.expect("runs");
        tx.execute("COMMIT", &[]).await.expect("commits");
        drop(tx);
    })
    .await;
    assert_eq!(found, ["log"]);
}

/// A pipeline in which a transaction ends and another one begins, all sent before the first answer.
#[tokio::test]
async fn a_pipeline_across_transactions_is_audited() {
    let pair = start(TRUST).await;
    let mut client = pair.raw().await;
    let run = |sql: &str| [raw::parse("", sql, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat();
    let found = tainted(&pair, async || {
        let flight = [
            run("BEGIN"),
            run("INSERT INTO users VALUES (60, 'gone')"),
            run("ROLLBACK"),
            run("SELECT log_it('behind a rollback')"),
            run("INSERT INTO users VALUES (61, 'kept')"),
            raw::sync(),
        ];
        client.send(&flight.concat()).await;
        let frames = client.until_ready(1).await;
        assert!(frames.iter().all(|frame| frame.tag != b'E'), "{frames:?}");
        assert_eq!(raw::tags(&frames), "12C12C12C12DC12CZ");
    })
    .await;
    assert_eq!(found, ["log"]);
    pair.settle_and_assert_equal().await;
    let count =
        pair.databases.new.run("shop", "SELECT count(*) FROM users WHERE id IN (60, 61)").await.expect("counts");
    assert_eq!(count.trim(), "1");
}

/// An error in a pipeline makes the server pass over statements of ours, too: they must be prepared again.
#[tokio::test]
async fn what_the_server_has_passed_over_is_sent_again() {
    let pair = start(TRUST).await;
    let mut client = pair.raw().await;
    let run = |sql: &str| [raw::parse("", sql, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat();
    client
        .send(
            &[run("SELECT 1 / 0"), run("INSERT INTO users VALUES (70, 'never')"), run("SELECT quiet()"), raw::sync()]
                .concat(),
        )
        .await;
    let frames = client.until_ready(1).await;
    assert_eq!(frames.iter().filter(|frame| frame.tag == b'E').count(), 1, "{frames:?}");
    for (id, expected) in [(71, "12C12DCZ"), (72, "12C12DCZ")] {
        let insert = format!("INSERT INTO users VALUES ({id}, 'n{id}')");
        client.send(&[run(&insert), run("SELECT log_it('x')"), raw::sync()].concat()).await;
        let frames = client.until_ready(1).await;
        assert_eq!(raw::tags(&frames), expected, "{frames:?}");
    }
    pair.settle_and_assert_equal().await;
}

/// C8: a deferred constraint fails COMMIT, wherever the proxy has looked; its notices arrive.
#[tokio::test]
async fn an_error_of_a_deferred_trigger_is_commits_own() {
    let pair = start(TRUST).await;
    let mut client = pair.raw().await;
    let run = |sql: &str| [raw::parse("", sql, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat();
    let idle = |frames: &[raw::Frame]| frames.last().expect("frames").body == b"I";
    client.send(&raw::query("BEGIN; INSERT INTO deferred VALUES (1, 'bad')")).await;
    assert_eq!(raw::tags(&client.until_ready(1).await), "CCZ");
    client.send(&raw::query("COMMIT")).await;
    let frames = client.until_ready(1).await;
    assert_eq!((raw::tags(&frames).as_str(), idle(&frames)), ("NEZ", true), "{frames:?}");
    client
        .send(
            &[run("BEGIN"), run("INSERT INTO deferred VALUES (2, 'bad')"), run("COMMIT"), run("SELECT 1"), raw::sync()]
                .concat(),
        )
        .await;
    let frames = client.until_ready(1).await;
    assert_eq!((raw::tags(&frames).as_str(), idle(&frames)), ("12C12C12NEZ", true), "{frames:?}");
    client.send(&[run("INSERT INTO deferred VALUES (3, 'bad')"), raw::sync()].concat()).await;
    let frames = client.until_ready(1).await;
    assert_eq!(raw::tags(&frames).replace('C', ""), "12NEZ", "{frames:?}");
    assert!(idle(&frames));
    client.send(&raw::query("INSERT INTO deferred VALUES (4, 'bad')")).await;
    let frames = client.until_ready(1).await;
    assert_eq!((raw::tags(&frames).as_str(), idle(&frames)), ("NEZ", true), "{frames:?}");
    client.send(&raw::query("INSERT INTO deferred VALUES (5, 'good')")).await;
    assert_eq!(raw::tags(&client.until_ready(1).await), "NCZ");
    let count = pair.databases.old.run("shop", "SELECT string_agg(id::text, ',') FROM deferred").await.expect("counts");
    assert_eq!(count.trim(), "5");
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn definitions_taint_the_tables_that_they_name() {
    let pair = start("").await;
    let none: [&str; 0] = [];
    for (script, expected) in [
        ("CREATE INDEX posts_body ON posts (body)", &none[..]),
        ("CREATE FUNCTION f2() RETURNS void LANGUAGE sql AS $$ INSERT INTO log (what) VALUES ('f2') $$", &none),
        ("COMMENT ON TABLE users IS 'people'", &["users"]),
        ("ALTER TABLE \"posts\" ALTER COLUMN body SET STATISTICS 50", &["posts"]),
        ("BEGIN; ALTER TABLE users ALTER COLUMN name SET STATISTICS 50; COMMIT", &["users"]),
    ] {
        assert_eq!(tainted_by(&pair, script).await, expected, "{script}");
    }
    // A table of old alone. What its making calls may write anything.
    let client = pair.client().await;
    let before = pair.taints(&TABLES).await;
    client.batch_execute("CREATE TABLE fresh (id int PRIMARY KEY); DROP TABLE fresh").await.expect("makes");
    assert_eq!(pair.taints(&TABLES).await, before);
    client.batch_execute("CREATE TABLE fresh AS SELECT 1 AS one FROM log_it('made')").await.expect("makes");
    assert!(pair.taints(&TABLES).await.iter().zip(&before).all(|(after, before)| after > before));
    client.batch_execute("DROP TABLE fresh").await.expect("drops");
    pair.settle_and_assert_equal().await;
}

/// What cannot be wrapped taints everything beforehand, in both protocols, and is paid afterwards.
#[tokio::test]
async fn calls_outside_a_block_are_registered() {
    let pair = start("").await;
    let client = pair.client().await;
    let all = tainted(&pair, async || client.batch_execute("CALL call_it('simple')").await.expect("calls")).await;
    assert_eq!(all, TABLES);
    let all = tainted(&pair, async || {
        client.execute("CALL call_it($1)", &[&"extended"]).await.expect("calls");
    })
    .await;
    assert_eq!(all, TABLES);
    let all = tainted(&pair, async || {
        client.execute("DO $$ BEGIN INSERT INTO log (what) VALUES ('do'); COMMIT; END $$", &[]).await.expect("does");
    })
    .await;
    assert_eq!(all, TABLES, "it ends its transaction: no block of ours may be around it");
    let plain = tainted(&pair, async || {
        client.execute("DO $$ BEGIN INSERT INTO log (what) VALUES ('do'); END $$", &[]).await.expect("does");
    })
    .await;
    assert_eq!(plain, ["log"], "it cannot end its transaction: it is audited");
    let in_block = "BEGIN; DO $$ BEGIN INSERT INTO log (what) VALUES ('do'); END $$; COMMIT";
    assert_eq!(tainted_by(&pair, in_block).await, ["log"], "inside a block it is audited");
    pair.settle_and_assert_equal().await;
    let count = pair.databases.new.run("shop", "SELECT count(*) FROM log").await.expect("counts");
    assert_eq!(count.trim(), "5");
    client.execute("SELECT 1", &[]).await.expect("the session goes on");
    until("nothing is held", async || {
        let held = "SELECT count(*) FROM crossfade.ledger WHERE holder_pid IS NOT NULL";
        pair.databases.old.run("shop", held).await.expect("counts").trim() == "0"
    })
    .await;
}

/// FunctionCall has no text that could be read.
#[tokio::test]
async fn a_function_call_is_audited_in_a_block_and_registered_outside() {
    let pair = start(TRUST).await;
    let oid =
        pair.databases.old.run("shop", "SELECT 'quiet()'::regprocedure::oid, 'log_it(text)'::regprocedure::oid").await;
    let oids: Vec<u32> = oid.expect("reads").trim().split('|').map(|oid| oid.parse().expect("an OID")).collect();
    let mut client = pair.raw().await;
    let log_it = raw::function_call(oids[1], &[0], &[Some(b"called")], 0);
    let found = tainted(&pair, async || {
        client.send(&raw::query("BEGIN")).await;
        client.until_ready(1).await;
        client.send(&raw::function_call(oids[0], &[], &[], 0)).await;
        assert_eq!(client.until_ready(1).await.len(), 2);
        client.send(&raw::query("COMMIT")).await;
        client.until_ready(1).await;
    })
    .await;
    assert_eq!(found, [""; 0]);
    let found = tainted(&pair, async || {
        client.send(&raw::query("BEGIN")).await;
        client.until_ready(1).await;
        client.send(&log_it).await;
        assert_eq!(client.until_ready(1).await.len(), 2);
        client.send(&raw::query("COMMIT")).await;
        client.until_ready(1).await;
    })
    .await;
    assert_eq!(found, ["log"]);
    let found = tainted(&pair, async || {
        client.send(&log_it).await;
        assert_eq!(client.until_ready(1).await.len(), 2);
    })
    .await;
    assert_eq!(found, TABLES);
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn without_track_counts_what_an_opaque_statement_names_is_tainted() {
    let pair = start("").await;
    let script = "ALTER ROLE app SET track_counts = off";
    pair.databases.old.run("postgres", script).await.expect("sets");
    let of = |table: &str| format!("WITH w AS (DELETE FROM {table} WHERE false RETURNING id) SELECT id FROM w");
    assert_eq!(tainted_by(&pair, &of("log")).await, ["log"]);
    assert_eq!(tainted_by(&pair, &of("users")).await, TABLES, "by a cascade");
    assert_eq!(tainted_by(&pair, "SELECT quiet()").await, TABLES);
    assert_eq!(tainted_by(&pair, "UPDATE users SET visits = 9 WHERE id = 2").await, [""; 0]);
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn strict_refuses_opaque_writes_and_the_session_goes_on() {
    let pair = start("mirror: { strict: true }").await;
    let mut client = pair.client().await;
    let hint =
        |error: &tokio_postgres::Error| error.as_db_error().and_then(|error| error.hint()).unwrap_or("").to_owned();
    for script in ["SELECT log_it('x')", "CALL call_it('x')", "DO $$ BEGIN PERFORM log_it('x'); END $$"] {
        let error = client.batch_execute(script).await.expect_err("is refused");
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{script}");
        assert!(hint(&error).contains("mirror.strict: false"), "{script}");
        let error = client.execute(script, &[]).await.expect_err("is refused");
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{script}, extended");
    }
    client.execute("INSERT INTO users VALUES (80, 'eighty')", &[]).await.expect("plain writes go on");
    let tx = client.transaction().await.expect("begins");
    tx.batch_execute("INSERT INTO users VALUES (81, 'x'); SAVEPOINT s").await.expect("inserts");
    for extended in [false, true] {
        let error = match extended {
            true => tx.execute("SELECT log_it('x')", &[]).await.expect_err("is refused"),
            false => tx.batch_execute("SELECT log_it('x')").await.expect_err("is refused"),
        };
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED));
        let error = tx.batch_execute("SELECT 1").await.expect_err("the block has failed");
        assert_eq!(error.code(), Some(&SqlState::IN_FAILED_SQL_TRANSACTION));
        tx.batch_execute("ROLLBACK TO s").await.expect("leads back");
    }
    tx.commit().await.expect("commits");
    // What a trigger writes is seen only at COMMIT.
    let error = client.execute("INSERT INTO audited VALUES (1, 'a trigger')", &[]).await.expect_err("is refused");
    assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED));
    for commit in ["COMMIT", "commit and chain"] {
        client.batch_execute("BEGIN; INSERT INTO audited VALUES (2, 'a trigger')").await.expect("inserts");
        let error = client.batch_execute(commit).await.expect_err("is refused");
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED));
        client.batch_execute("BEGIN; INSERT INTO audited VALUES (3, 'a trigger')").await.expect("inserts");
        let error = client.execute(commit, &[]).await.expect_err("is refused");
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED));
    }
    client.execute("INSERT INTO users VALUES (82, 'y')", &[]).await.expect("the session goes on");
    client
        .batch_execute("CREATE TABLE fresh (id int PRIMARY KEY); DROP TABLE fresh")
        .await
        .expect("no migrating table");
    let there = pair.databases.new.run("shop", "SELECT count(*) FROM users WHERE id IN (80, 81, 82)").await;
    assert_eq!(there.expect("counts").trim(), "3");
    assert_eq!(pair.databases.old.run("shop", "SELECT count(*) FROM audited").await.expect("counts").trim(), "0");
    assert_eq!(pair.taints(&TABLES).await, [0.0; TABLES.len()]);
}
