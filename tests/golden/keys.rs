//! Keys that change (W8) and values that change places (W6), captured exactly: nothing is owed afterwards.

use std::time::{Duration, Instant};

use crate::common::pair::DATABASE;
use crate::common::raw::{self, bind, close, describe, execute, parse};
use crate::stage::{Stage, ask, pipeline, said};

const SCHEMA: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE pick (id int PRIMARY KEY);
    CREATE TABLE pair (a int, b text, v text, PRIMARY KEY (a, b));
    CREATE TABLE made (n int NOT NULL, v text, k int GENERATED ALWAYS AS (n * 10) STORED PRIMARY KEY);
    CREATE TABLE rekeyed (id int PRIMARY KEY, v int);
    CREATE FUNCTION rekey() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.id := NEW.v * 100; RETURN NEW; END';
    CREATE TRIGGER rekey BEFORE UPDATE ON rekeyed FOR EACH ROW EXECUTE FUNCTION rekey();
    CREATE TABLE kept (id int PRIMARY KEY, v int);
    CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN IF OLD.v = 1 THEN RETURN NULL; END IF; RETURN NEW; END';
    CREATE TRIGGER keep BEFORE UPDATE ON kept FOR EACH ROW EXECUTE FUNCTION keep();
    CREATE TABLE swapped (id int PRIMARY KEY, u text NOT NULL UNIQUE, x text UNIQUE);
    CREATE TABLE later (id int PRIMARY KEY DEFERRABLE, u text UNIQUE DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE parted (k int, part int, v text, PRIMARY KEY (k, part)) PARTITION BY LIST (part);
    CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1);
    CREATE TABLE parted_2 (v text, part int NOT NULL, k int NOT NULL);
    ALTER TABLE parted ATTACH PARTITION parted_2 FOR VALUES IN (2);
    CREATE COLLATION folded (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
    CREATE TABLE names (name text PRIMARY KEY, v int);
    CREATE UNIQUE INDEX ON names (name COLLATE folded);
";

#[tokio::test]
async fn keys_that_change_are_captured() {
    let mut stage = Stage::open(SCHEMA).await;
    queries(&stage).await;
    parameters(&stage).await;
    by_other_ways(&stage).await;
    failures(&stage).await;
    stage.enter("new-primary").await;
    queries(&stage).await;
    parameters(&stage).await;
}

/// A script of Query messages: each with what must come back.
async fn script(stage: &Stage, lines: &[(&str, &str)]) {
    let mut client = stage.raw().await;
    for (sql, reply) in lines {
        assert_eq!(ask(&mut client, sql).await, *reply, "{sql}");
    }
}

async fn queries(stage: &Stage) {
    let story = stage.story("SET names the key").await;
    let lines = [
        ("TRUNCATE t, pick, pair, parted", "C(TRUNCATE TABLE) Z(I)"),
        ("INSERT INTO t SELECT i, 'r' || i FROM generate_series(1, 4) AS i", "C(INSERT 0 4) Z(I)"),
        ("UPDATE t SET id = id + 10 WHERE id < 3 RETURNING v, id", "T(v,id) D(r1,11) D(r2,12) C(UPDATE 2) Z(I)"),
        ("UPDATE t AS x SET id = 20 WHERE x.v = 'r3' -- a comment", "C(UPDATE 1) Z(I)"),
        ("UPDATE t SET id = 99 WHERE false", "C(UPDATE 0) Z(I)"),
        ("INSERT INTO pick VALUES (12)", "C(INSERT 0 1) Z(I)"),
        ("UPDATE t SET id = t.id + 1, v = v || '!' FROM pick AS p WHERE p.id = t.id", "C(UPDATE 1) Z(I)"),
        ("WITH s AS (SELECT 20 AS id) UPDATE t SET id = s.id + 1 FROM s WHERE s.id = t.id", "C(UPDATE 1) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("UPDATE t SET id = 30 WHERE id = 21", "C(UPDATE 1) Z(T)"),
        ("SAVEPOINT s", "C(SAVEPOINT) Z(T)"),
        ("UPDATE t SET id = 31 WHERE id = 30", "C(UPDATE 1) Z(T)"),
        ("ROLLBACK TO s", "C(ROLLBACK) Z(T)"),
        ("UPDATE t SET id = 32 WHERE id = 30 RETURNING id", "T(id) D(32) C(UPDATE 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
        (
            "INSERT INTO pair VALUES (1, 'a', 'x'), (1, 'b', 'y'); UPDATE pair SET b = b || b; UPDATE pair SET (a, b) = (2, 'c') WHERE b = 'aa'",
            "C(INSERT 0 2) C(UPDATE 2) C(UPDATE 1) Z(I)",
        ),
        ("INSERT INTO parted VALUES (1, 1, 'a'), (2, 1, 'b'), (3, 2, 'c')", "C(INSERT 0 3) Z(I)"),
        ("UPDATE parted SET part = 3 - part, v = v || k WHERE k > 1", "C(UPDATE 2) Z(I)"),
    ];
    script(stage, &lines).await;
    story
        .exact(&[
            ("t", &["(11,r1)", "(13,r2!)", "(32,r3)", "(4,r4)"]),
            ("pair", &["(1,bb,y)", "(2,c,x)"]),
            ("parted", &["(1,1,a)", "(2,2,b2)", "(3,1,c3)"]),
        ])
        .await;
}

async fn parameters(stage: &Stage) {
    let story = stage.story("in the extended protocol").await;
    let client = stage.client().await;
    client.batch_execute("TRUNCATE t; INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')").await.expect("fills");
    // $1 does not appear where the rows are read.
    let update = client.prepare("UPDATE t SET id = id + $1, v = v || $2 WHERE v = $3").await.expect("prepares");
    for (add, find) in [(10, "a"), (20, "b"), (30, "none")] {
        let count = client.execute(&update, &[&add, &"+", &find]).await.expect("updates");
        assert_eq!(count, u64::from(find != "none"));
    }
    let rows = client.query("UPDATE t SET id = -id RETURNING id, v", &[]).await.expect("updates");
    let mut ids: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    ids.sort_unstable();
    assert_eq!(ids, [-22, -11, -3]);

    let mut raw = stage.raw().await;
    let twice = [
        parse("s", "UPDATE t SET id = id - 1 WHERE id = $1 RETURNING id", &[]),
        bind("p", "s", &[], &[Some(b"-3")], &[]),
        describe(b'P', "p"),
        execute("p", 0),
        close(b'P', "p"),
        bind("", "s", &[1], &[Some(&(-4i32).to_be_bytes())], &[1]),
        execute("", 0),
        parse("", "SELECT count(*) FROM t", &[]),
        bind("", "", &[], &[], &[]),
        execute("", 0),
    ];
    assert_eq!(
        pipeline(&mut raw, &twice).await,
        r"1 2 T(id) D(-4) C(UPDATE 1) 3 2 D(\xff\xff\xff\xfb) C(UPDATE 1) 1 2 D(3) C(SELECT 1) Z(I)"
    );
    story.exact(&[("t", &["(-11,a+)", "(-22,b+)", "(-5,c)"])]).await;
}

async fn by_other_ways(stage: &Stage) {
    let story = stage.story("a generated key, and a BEFORE trigger that changes the key").await;
    let lines = [
        ("INSERT INTO made (n, v) VALUES (1, 'a'), (2, 'b')", "C(INSERT 0 2) Z(I)"),
        ("UPDATE made SET n = n + 5 WHERE v = 'a' RETURNING k", "T(k) D(60) C(UPDATE 1) Z(I)"),
        ("INSERT INTO rekeyed VALUES (1, 1), (2, 2)", "C(INSERT 0 2) Z(I)"),
        ("UPDATE rekeyed SET v = 7 WHERE id = 1 RETURNING id", "T(id) D(700) C(UPDATE 1) Z(I)"),
    ];
    script(stage, &lines).await;
    story.exact(&[("made", &["(2,b,20)", "(6,a,60)"]), ("rekeyed", &["(2,2)", "(700,7)"])]).await;

    let story = stage.story("ON CONFLICT DO UPDATE sets the key: which key is gone is not to be had").await;
    let upsert = "INSERT INTO swapped VALUES (1, 'u'), (2, 'w') ON CONFLICT (u) DO UPDATE SET id = swapped.id + 10";
    script(stage, &[(upsert, "C(INSERT 0 2) Z(I)"), (upsert, "C(INSERT 0 2) Z(I)")]).await;
    story.heals("key-change", &[("swapped", &["(11,u,)", "(12,w,)"])]).await;

    let story = stage.story("ON CONFLICT DO UPDATE sets all columns, those of the key to what they are").await;
    let all = "INSERT INTO pair VALUES (1, 'x', 'a'), (2, 'y', 'b') ON CONFLICT (b, a) DO UPDATE SET a = EXCLUDED.a, b = EXCLUDED.b, v = pair.v || EXCLUDED.v RETURNING v";
    let replies = ["T(v) D(a) D(b) C(INSERT 0 2) Z(I)", "T(v) D(aa) D(bb) C(INSERT 0 2) Z(I)"];
    script(stage, &[("TRUNCATE pair", "C(TRUNCATE TABLE) Z(I)"), (all, replies[0]), (all, replies[1])]).await;
    story.exact(&[("pair", &["(1,x,aa)", "(2,y,bb)"])]).await;

    let story = stage.story("... found by another index, to which other keys are equal").await;
    let (first, second) = (
        "INSERT INTO names VALUES ('a', 1) ON CONFLICT (name) DO UPDATE SET name = EXCLUDED.name",
        "INSERT INTO names VALUES ('A', 2) ON CONFLICT (name) DO UPDATE SET name = EXCLUDED.name",
    );
    script(stage, &[(first, "C(INSERT 0 1) Z(I)"), (second, "C(INSERT 0 1) Z(I)")]).await;
    story.heals("key-change", &[("names", &["(A,1)"])]).await;

    let story = stage.story("a trigger keeps a row as it was: the UPDATE never reaches what was read").await;
    let lines = [
        ("INSERT INTO kept VALUES (1, 1), (2, 2)", "C(INSERT 0 2) Z(I)"),
        ("UPDATE kept SET id = id + 10 RETURNING id", "T(id) D(12) C(UPDATE 1) Z(I)"),
    ];
    script(stage, &lines).await;
    story.heals("key-change", &[("kept", &["(1,1)", "(12,2)"])]).await;

    let story = stage.story("rows that are never fetched").await;
    let mut raw = stage.raw().await;
    ask(&mut raw, "TRUNCATE t; INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')").await;
    let limited =
        [parse("", "UPDATE t SET id = id + 10 RETURNING id", &[]), bind("", "", &[], &[], &[]), execute("", 1)];
    assert_eq!(pipeline(&mut raw, &limited).await, "1 2 D(11) s Z(I)");
    story.heals("key-change", &[("t", &["(11,a)", "(12,b)", "(13,c)"])]).await;
}

async fn failures(stage: &Stage) {
    let story = stage.story("an UPDATE that fails").await;
    let lines = [
        ("TRUNCATE t; INSERT INTO t VALUES (1, 'a'), (2, 'b')", "C(TRUNCATE TABLE) C(INSERT 0 2) Z(I)"),
        ("UPDATE t SET id = 2 WHERE id = 1", "E(23505) Z(I)"),
        ("UPDATE t SET id = 5 WHERE id / 0 = 1", "E(22012) Z(I)"),
        ("UPDATE t SET id = 5 WHERE nothing", "E(42703) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("UPDATE t SET id = 3 WHERE id = 1", "C(UPDATE 1) Z(T)"),
        ("SAVEPOINT s", "C(SAVEPOINT) Z(T)"),
        ("UPDATE t SET id = 2 WHERE id = 3", "E(23505) Z(E)"),
        ("UPDATE t SET id = 4", "E(25P02) Z(E)"),
        ("ROLLBACK TO s", "C(ROLLBACK) Z(T)"),
        ("SET LOCAL statement_timeout = 50", "C(SET) Z(T)"),
        ("UPDATE t SET id = 9 WHERE v = (SELECT 'a' FROM (SELECT pg_sleep(5)) AS s)", "E(57014) Z(E)"),
        ("ROLLBACK TO s", "C(ROLLBACK) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
    ];
    script(stage, &lines).await;
    let mut raw = stage.raw().await;
    let broken = [
        parse("", "UPDATE t SET id = 2 WHERE id = 3", &[]),
        bind("", "", &[], &[], &[]),
        execute("", 0),
        parse("", "INSERT INTO t VALUES (7, 'never')", &[]),
        bind("", "", &[], &[], &[]),
        execute("", 0),
    ];
    assert_eq!(pipeline(&mut raw, &broken).await, "1 2 E(23505) Z(I)");
    assert_eq!(ask(&mut raw, "UPDATE t SET id = 4 WHERE id = 3").await, "C(UPDATE 1) Z(I)");
    story.exact_after_failures(&[("t", &["(2,b)", "(4,a)"])]).await;
}

/// The SELECT waits for a lock, so that its snapshot is older than the UPDATE's: whatever is committed meanwhile only the UPDATE sees.
#[tokio::test]
async fn i19_an_update_that_reaches_other_rows_than_were_read_is_run_again() {
    let stage = Stage::open(SCHEMA).await;
    for extended in [false, true] {
        let story = stage.story("one row more").await;
        let reset = "TRUNCATE t; INSERT INTO t VALUES (1, 'a'), (2, 'b')";
        let update = "UPDATE t SET id = id + 100 WHERE id < 10 RETURNING id";
        let answer = forced(&stage, extended, reset, update, "INSERT INTO t VALUES (5, 'late')").await;
        assert_eq!(sorted(&answer), ["101", "102", "105"], "{answer}");
        story.exact(&[("t", &["(101,a*)", "(102,b)", "(105,late)"])]).await;

        let story = stage.story("as many rows, but others").await;
        let reset = "TRUNCATE t, pick; INSERT INTO t VALUES (1, 'a'), (2, 'b'); INSERT INTO pick VALUES (1)";
        let update = "UPDATE t SET id = t.id + 100 FROM pick WHERE pick.id = t.id RETURNING t.id";
        let answer = forced(&stage, extended, reset, update, "UPDATE pick SET id = 2").await;
        assert_eq!(sorted(&answer), ["102"], "{answer}");
        story.exact(&[("t", &["(1,a*)", "(102,b)"]), ("pick", &["(2)"])]).await;
    }
}

/// Runs `update` while the row 1 of `t` is locked; `meanwhile` is committed before that lock goes.
async fn forced(stage: &Stage, extended: bool, reset: &str, update: &str, meanwhile: &str) -> String {
    let (mut holder, mut client, mut other) = (stage.raw().await, stage.raw().await, stage.raw().await);
    ask(&mut other, reset).await;
    ask(&mut holder, "BEGIN; UPDATE t SET v = v || '*' WHERE id = 1").await;
    let message = match extended {
        false => raw::query(update),
        true => [parse("", update, &[]), bind("", "", &[], &[], &[]), execute("", 0), raw::sync()].concat(),
    };
    client.send(&message).await;
    waits_for_a_lock(stage).await;
    let reply = ask(&mut other, meanwhile).await;
    assert!(!reply.contains("E("), "{meanwhile}: {reply}");
    assert_eq!(ask(&mut holder, "COMMIT").await, "C(COMMIT) Z(I)");
    said(&client.until_ready(1).await)
}

async fn waits_for_a_lock(stage: &Stage) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'FOR UPDATE OF t'";
    while stage.sides().0.run(DATABASE, waiting).await.expect("asks").trim() != "1" {
        assert!(Instant::now() < deadline, "nobody waits for the lock");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The values of the rows in an answer.
fn sorted(answer: &str) -> Vec<&str> {
    let mut rows: Vec<&str> = answer.split(' ').filter_map(|word| word.strip_prefix("D(")?.strip_suffix(')')).collect();
    rows.sort_unstable();
    rows
}

#[tokio::test]
async fn i12_values_that_change_places_arrive() {
    let mut stage = Stage::open(SCHEMA).await;
    swaps(&stage).await;
    stage.enter("new-primary").await;
    swaps(&stage).await;
}

async fn swaps(stage: &Stage) {
    let story = stage.story("two keys change places in one transaction, and their rows hold unique values").await;
    let lines = [
        ("TRUNCATE swapped, later", "C(TRUNCATE TABLE) Z(I)"),
        ("INSERT INTO swapped VALUES (1, 'a', 'p'), (2, 'b', 'q'), (3, 'c', NULL)", "C(INSERT 0 3) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("UPDATE swapped SET id = 9 WHERE id = 1", "C(UPDATE 1) Z(T)"),
        ("UPDATE swapped SET id = 1 WHERE id = 2", "C(UPDATE 1) Z(T)"),
        ("UPDATE swapped SET id = 2 WHERE id = 9", "C(UPDATE 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
    ];
    script(stage, &lines).await;
    story.exact(&[("swapped", &["(1,b,q)", "(2,a,p)", "(3,c,)"])]).await;

    let story = stage.story("two unique values change places in one transaction").await;
    let lines = [
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("UPDATE swapped SET u = 'z', x = NULL WHERE id = 1", "C(UPDATE 1) Z(T)"),
        ("UPDATE swapped SET u = 'b', x = 'q' WHERE id = 2", "C(UPDATE 1) Z(T)"),
        ("UPDATE swapped SET u = 'a', x = 'p' WHERE id = 1", "C(UPDATE 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
    ];
    script(stage, &lines).await;
    story.exact(&[("swapped", &["(1,a,p)", "(2,b,q)", "(3,c,)"])]).await;

    let story = stage.story("every key moves on by one, and a value goes from one row to a new one").await;
    let lines = [
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("UPDATE swapped SET id = -id", "C(UPDATE 3) Z(T)"),
        ("UPDATE swapped SET id = 1 - id", "C(UPDATE 3) Z(T)"),
        ("UPDATE swapped SET u = 'd' WHERE id = 2", "C(UPDATE 1) Z(T)"),
        ("INSERT INTO swapped VALUES (1, 'a')", "C(INSERT 0 1) Z(T)"),
        ("DELETE FROM swapped WHERE id = 4", "C(DELETE 1) Z(T)"),
        ("INSERT INTO swapped VALUES (5, 'c')", "C(INSERT 0 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
    ];
    script(stage, &lines).await;
    story.exact(&[("swapped", &["(1,a,)", "(2,d,p)", "(3,b,q)", "(5,c,)"])]).await;

    let story = stage.story("deferrable keys and values change places in one statement").await;
    let lines = [
        ("INSERT INTO later VALUES (1, 'a'), (2, 'b'), (3, 'c')", "C(INSERT 0 3) Z(I)"),
        ("UPDATE later SET id = 3 - id WHERE id < 3 RETURNING id", "T(id) D(2) D(1) C(UPDATE 2) Z(I)"),
        ("UPDATE later SET u = CASE u WHEN 'a' THEN 'c' ELSE 'a' END WHERE u <> 'b'", "C(UPDATE 2) Z(I)"),
        ("UPDATE later SET id = id + 1", "C(UPDATE 3) Z(I)"),
    ];
    script(stage, &lines).await;
    story.exact(&[("later", &["(2,b)", "(3,c)", "(4,a)"])]).await;
}
