//! WITH that writes: each statement runs at the server itself and is rolled back, then through the proxy. What the client is told must be the same, byte for byte, and
//! then both sides must hold the same rows with nothing owed.

use crate::common::pair::{APP, DATABASE};
use crate::common::raw::{self, Frame, RawClient};
use crate::stage::{Stage, ask, held, pipeline, said};

const SCHEMA: &str = r#"
    CREATE TABLE a (id int PRIMARY KEY, v text);
    CREATE TABLE b (id int PRIMARY KEY, v text);
    CREATE TABLE q (id int PRIMARY KEY, name varchar(20), price numeric(8, 2), at timestamptz DEFAULT '2020-01-01 00:00Z', size int GENERATED ALWAYS AS (id * 2) STORED);
    CREATE TABLE bag (id int, v text);
    CREATE TABLE "Odd 'Name" ("The Key" int PRIMARY KEY, "order" text);
    CREATE TABLE parts (id int, r text, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
    CREATE TABLE parts_a PARTITION OF parts FOR VALUES IN ('a');
    CREATE TABLE parts_b (r text NOT NULL, id int NOT NULL);
    ALTER TABLE parts ATTACH PARTITION parts_b FOR VALUES IN ('b');
    CREATE TABLE stays (id int PRIMARY KEY, v text);
    CREATE FUNCTION noisy(k int) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE NOTICE 'at %', k; RAISE INFO '0 \x00'; RETURN true; END $$;
"#;

const ROWS: &str = r#"TRUNCATE a, b, q, bag, "Odd 'Name", parts; DELETE FROM stays; INSERT INTO a VALUES (1, 'one'), (2, 'two'), (3, NULL);
    INSERT INTO b VALUES (1, 'first'), (4, 'fourth'); INSERT INTO q SELECT i, 'n' || i, i * 1.5 FROM generate_series(1, 5) i;
    INSERT INTO "Odd 'Name" VALUES (1, 'x'), (2, 'y'); INSERT INTO parts VALUES (1, 'a'), (2, 'b')"#;

/// All rows of the tables that migrate.
const ALL: &str = "(SELECT 'a', a::text FROM a UNION ALL SELECT 'b', b::text FROM b UNION ALL SELECT 'q', q::text FROM q UNION ALL SELECT 'bag', bag::text FROM bag \
    UNION ALL SELECT 'odd', o::text FROM \"Odd 'Name\" o UNION ALL SELECT 'parts', p::text FROM parts p)";

const STATEMENTS: &[&str] = &[
    "WITH moved AS (DELETE FROM a WHERE id < 3 RETURNING *) INSERT INTO b SELECT id + 10, v FROM moved",
    "WITH moved AS (DELETE FROM a WHERE id > 1 RETURNING *) INSERT INTO b SELECT * FROM moved RETURNING *;",
    "WITH moved AS (DELETE FROM a RETURNING a.*) SELECT * FROM moved ORDER BY id DESC -- a comment",
    "WITH x AS (INSERT INTO a VALUES (1, 'x'), (9, 'new') ON CONFLICT DO NOTHING RETURNING id) \
     SELECT id, true AS fresh FROM x UNION ALL SELECT id, false FROM a WHERE id = 1 ORDER BY id",
    "WITH taken AS (DELETE FROM q WHERE id IN (SELECT id FROM q ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 2) RETURNING *) SELECT * FROM taken ORDER BY id",
    "WITH taken AS (UPDATE q SET price = price * 2 WHERE id < 4 RETURNING name, price AS \"Price\", at, size, upper(name) AS shout) \
     SELECT *, taken.at FROM taken ORDER BY name",
    "WITH u AS (UPDATE a SET v = v || '!' WHERE id > 1), d AS (DELETE FROM b /* all */) SELECT 1 AS one",
    "WITH u AS (UPDATE a SET v = 'u' WHERE id = 1 RETURNING a.v AS \"V V\", id) UPDATE b SET v = u.\"V V\" FROM u WHERE b.id = u.id RETURNING b.*, u.*",
    "WITH up AS (INSERT INTO a AS x VALUES (1, 'n'), (7, 'n') ON CONFLICT (id) DO UPDATE SET v = x.v || EXCLUDED.v RETURNING x.id, x.v) SELECT * FROM up",
    "WITH d AS (DELETE FROM a RETURNING id, v) INSERT INTO bag SELECT id, v FROM d",
    "WITH d AS (DELETE FROM a RETURNING *), i AS (INSERT INTO b SELECT id + 20, v FROM d RETURNING *), u AS (UPDATE q SET name = 'u' FROM d WHERE q.id = d.id RETURNING q.id, d.v) \
     SELECT d.id, i.v, u.v FROM d LEFT JOIN i ON i.id = d.id + 20 LEFT JOIN u ON u.id = d.id ORDER BY 1",
    "WITH d AS (DELETE FROM a WHERE id = 1 RETURNING *) INSERT INTO a SELECT id, v || ' again' FROM d RETURNING *",
    "WITH d AS (DELETE FROM a RETURNING *) SELECT id FROM d LIMIT 1",
    "WITH d AS (DELETE FROM a WHERE id < 3 RETURNING id, v) SELECT row_to_json(d), d, count(*) OVER () FROM d NATURAL LEFT JOIN (SELECT id FROM b) x ORDER BY 1::text",
    "WITH d AS (DELETE FROM a RETURNING *), e AS (DELETE FROM b RETURNING *) SELECT row_to_json(d), e FROM d JOIN e USING (id)",
    "WITH RECURSIVE s (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < 3), i AS (INSERT INTO a SELECT n + 20, 'r' FROM s RETURNING id) SELECT count(*), sum(id) FROM i",
    "WITH \"D d\" AS MATERIALIZED (DELETE FROM \"Odd 'Name\" WHERE \"The Key\" = 1 RETURNING \"The Key\", \"order\") SELECT * FROM \"D d\"",
    "WITH d AS (DELETE FROM public.\"Odd 'Name\" AS \"Row\" RETURNING \"Row\".*) SELECT \"order\" FROM d ORDER BY 1",
    "WITH p AS (DELETE FROM parts WHERE id = 1), i AS (INSERT INTO parts VALUES (5, 'b') RETURNING id, r) SELECT * FROM i",
    "WITH d AS (DELETE FROM a RETURNING id, v) INSERT INTO stays SELECT * FROM d RETURNING id",
    "WITH d AS (DELETE FROM a RETURNING id, v) INSERT INTO stays SELECT * FROM d",
    "WITH d AS (DELETE FROM a WHERE noisy(id) RETURNING id) SELECT * FROM d",
    "WITH d AS (DELETE FROM a WHERE false RETURNING *) INSERT INTO b SELECT * FROM d",
    "WITH s AS (SELECT 1 AS id) DELETE FROM a USING s WHERE a.id = s.id",
    "WITH e AS (UPDATE a SET v = 'é' || v RETURNING id, v AS \"naïve\") SELECT id FROM e ORDER BY id",
];

/// Statements that fail, also where the hidden parts would have let them pass.
const ERRORS: &[&str] = &[
    "WITH d AS (DELETE FROM a RETURNING id) SELECT nothing FROM d",
    "WITH d AS (DELETE FROM a WHERE v <> 'é' RETURNING id, v), e AS (DELETE FROM b) SELECT 'é', d.v, nothing FROM d",
    "WITH d AS (DELETE FROM a WHERE nothing RETURNING id) SELECT id FROM d",
    "WITH d AS (DELETE FROM a RETURNING nothing) SELECT id FROM d",
    "WITH d AS (DELETE FROM a RETURNING id) SELECT crossfade_image FROM d",
    "WITH d AS (DELETE FROM a) SELECT * FROM d",
    "WITH d AS (DELETE FROM a RETURNING id), d AS (DELETE FROM b RETURNING id) SELECT * FROM d",
    "WITH d AS (DELETE FROM a RETURNING id) SELECT 1 / (id - 1) FROM d ORDER BY id",
    "WITH i AS (INSERT INTO a VALUES (1, 'twice') RETURNING *) SELECT * FROM i",
    "WITH a AS (DELETE FROM a RETURNING *) INSERT INTO a SELECT * FROM a",
];

async fn direct(stage: &Stage) -> RawClient {
    let startup = raw::startup(raw::V3_0, &[("user", APP.0), ("database", DATABASE)]);
    RawClient::connect(stage.sides().0.port(), None, &startup).await.0
}

/// Everything but ReadyForQuery: whether a block is open is each leg's own affair.
async fn answer(client: &mut RawClient, sql: &str, extended: bool) -> Vec<Frame> {
    let prepare = [raw::parse("", sql, &[]), raw::describe(b'S', ""), raw::bind("", "", &[], &[], &[0])].concat();
    let run = [raw::describe(b'P', ""), raw::execute("", 0), raw::sync()].concat();
    client.doing = sql.to_owned();
    client.send(&if extended { [prepare, run].concat() } else { raw::query(sql) }).await;
    let mut frames = client.until_ready(1).await;
    frames.retain(|frame| frame.tag != b'Z');
    frames
}

/// What the server says of a statement, which is rolled back there, and what the proxy says of it: the same bytes.
pub async fn same_answers(stage: &Stage, sql: &str, extended: bool) {
    let (mut direct, mut client) = (direct(stage).await, stage.raw().await);
    ask(&mut direct, "BEGIN").await;
    let expected = answer(&mut direct, sql, extended).await;
    ask(&mut direct, "ROLLBACK").await;
    let answer = answer(&mut client, sql, extended).await;
    assert!(answer == expected, "{sql}\n{}\n{}\n{answer:?}\n{expected:?}", said(&answer), said(&expected));
}

/// Each of these over these rows, in both protocols: the client is answered as by the server itself, and both sides hold the same of these tables.
pub async fn all_exact(stage: &Stage, fill: &str, tables: &str, statements: &[&'static str]) {
    let client = stage.client().await;
    for sql in statements {
        for extended in [false, true] {
            client.batch_execute(fill).await.expect("fills");
            let story = stage.story(sql).await;
            same_answers(stage, sql, extended).await;
            let rows = held(stage.sides().0, tables).await;
            story.exact(&[(tables, &rows.iter().map(String::as_str).collect::<Vec<_>>())]).await;
        }
    }
}

/// Statements that fail do so as at the server itself.
pub async fn all_answered_alike(stage: &Stage, statements: &[&str]) {
    for sql in statements {
        for extended in [false, true] {
            same_answers(stage, sql, extended).await;
        }
    }
}

#[tokio::test]
async fn with_that_writes_is_captured_and_the_client_sees_nothing_of_it() {
    let mut stage = Stage::open_with(SCHEMA, "mirror: { timeout: 20s }\nexcept: [public.stays]").await;
    all_exact(&stage, ROWS, ALL, STATEMENTS).await;
    let client = stage.client().await;
    client.batch_execute(ROWS).await.expect("fills");
    let story = stage.story("errors").await;
    all_answered_alike(&stage, ERRORS).await;
    story.exact_after_failures(&[("a", &["(1,one)", "(2,two)", "(3,)"]), ("b", &["(1,first)", "(4,fourth)"])]).await;
    blocks(&stage).await;
    bulk(&stage).await;
    if crate::common::proof() {
        stage.enter("new-primary").await;
        all_exact(&stage, ROWS, ALL, STATEMENTS).await;
    }
}

/// Savepoints, several statements in one Query, portals with limits, parameters, PREPARE and EXECUTE.
async fn blocks(stage: &Stage) {
    let client = stage.client().await;
    client.batch_execute(ROWS).await.expect("fills");
    let mut raw = stage.raw().await;
    let story = stage.story("WITH in blocks, portals and named statements").await;
    for (sql, reply) in [
        // What shows images goes to the client whatever it wants to hear, in whatever form.
        ("SET client_min_messages = error", "C(SET) Z(I)"),
        ("SET bytea_output = escape", "C(SET) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("WITH d AS (DELETE FROM a WHERE id = 1 RETURNING *) INSERT INTO bag SELECT * FROM d", "C(INSERT 0 1) Z(T)"),
        ("SAVEPOINT s", "C(SAVEPOINT) Z(T)"),
        ("WITH d AS (DELETE FROM a WHERE id = 2 RETURNING id) SELECT id FROM d", "T(id) D(2) C(SELECT 1) Z(T)"),
        ("ROLLBACK TO s", "C(ROLLBACK) Z(T)"),
        ("WITH d AS (DELETE FROM b RETURNING id) SELECT 1 / 0 FROM d", "E(22012) Z(E)"),
        ("ROLLBACK TO s", "C(ROLLBACK) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
        (
            "INSERT INTO b VALUES (9, 'nine'); WITH u AS (UPDATE b SET v = 'ninth' WHERE id = 9) SELECT 2 AS two; SELECT 3 AS three",
            "C(INSERT 0 1) T(two) D(2) C(SELECT 1) T(three) D(3) C(SELECT 1) Z(I)",
        ),
        (
            "PREPARE move (int) AS WITH d AS (DELETE FROM b WHERE id = $1 RETURNING id, v) INSERT INTO bag SELECT * FROM d; EXECUTE move(4)",
            "C(PREPARE) C(INSERT 0 1) Z(I)",
        ),
        ("EXECUTE move(4)", "C(INSERT 0 0) Z(I)"),
    ] {
        assert_eq!(ask(&mut raw, sql).await, reply, "{sql}");
    }
    let sql =
        "WITH d AS (DELETE FROM q WHERE id < $1 RETURNING id, name, $2::text AS t) SELECT id, t FROM d ORDER BY id";
    let bind = raw::bind("p", "s", &[], &[Some(b"4"), Some(b"x")], &[0, 1]);
    let run = [raw::parse("s", sql, &[]), bind, raw::execute("p", 2), raw::execute("p", 0)];
    assert_eq!(pipeline(&mut raw, &run).await, "1 2 D(1,x) D(2,x) s D(3,x) C(SELECT 1) Z(I)");
    // The rest is never asked for; it was written all the same.
    let again = [raw::bind("p", "s", &[], &[Some(b"6"), Some(b"y")], &[]), raw::execute("p", 1)];
    assert_eq!(pipeline(&mut raw, &again).await, "2 D(4,y) s Z(I)");
    let rows: [(&str, &[&str]); 4] = [
        ("a", &["(2,two)", "(3,)"]),
        ("b", &["(1,first)", "(9,ninth)"]),
        ("bag", &["(1,one)", "(4,fourth)"]),
        ("q", &[]),
    ];
    story.exact_after_failures(&rows).await;
}

/// More rows than are held at once: they stream.
async fn bulk(stage: &Stage) {
    let client = stage.client().await;
    let rows = if crate::common::proof() { 1_000_000 } else { 3_000 };
    let fill = format!("TRUNCATE a, b; INSERT INTO a SELECT i, repeat('x', 100) FROM generate_series(1, {rows}) i");
    client.batch_execute(&fill).await.expect("fills");
    let story = stage.story("many rows").await;
    let begun = std::time::Instant::now();
    let sql = "WITH moved AS (DELETE FROM a RETURNING *) INSERT INTO b SELECT * FROM moved";
    assert_eq!(client.execute(sql, &[]).await.expect("moves"), rows);
    eprintln!("{rows} rows moved by WITH in {:?}", begun.elapsed());
    story.exact_rows("b", rows as usize).await;
    assert!(stage.pair.proxy.peak_memory_bytes() < 200_000_000);
}

/// What is left to the audit, by name: the answers stay those of the server.
#[tokio::test]
async fn what_with_writes_out_of_sight_taints_its_own_tables() {
    let stage = Stage::open_with(SCHEMA, "mirror: { timeout: 20s }\nexcept: [public.stays]").await;
    let client = stage.client().await;
    for (sql, table) in [
        ("WITH d AS (DELETE FROM b RETURNING *) UPDATE a SET v = v || 'x'; -- captured, both", None),
        ("WITH u AS (UPDATE b SET id = id + 10 RETURNING id) UPDATE a SET v = v || 'x'", Some("b")),
        ("WITH d AS (DELETE FROM b RETURNING lower(v)) UPDATE a SET v = v || 'x'", Some("b")),
        ("WITH d AS (DELETE FROM parts RETURNING *) UPDATE a SET v = v || 'x'", Some("parts")),
        // The row that was added stays. The image of the one that was removed comes last.
        ("WITH i AS (INSERT INTO b VALUES (1, 'again') RETURNING id) DELETE FROM b WHERE id = 1", Some("b")),
        ("WITH u AS (UPDATE b SET id = id + 10 RETURNING id) SELECT count(*) FROM u", Some("b")),
    ] {
        for extended in [false, true] {
            client.batch_execute(ROWS).await.expect("fills");
            let story = stage.story("left to the audit").await;
            same_answers(&stage, sql, extended).await;
            let Some(table) = table else { continue };
            let rows = held(stage.sides().0, table).await;
            let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
            story.taints_only("cte", &[(table, &rows)]).await;
        }
    }
    // An image that the server would log is not shown: the audit misses it.
    client.batch_execute(ROWS).await.expect("fills");
    stage.sides().0.run(DATABASE, "ALTER SYSTEM SET log_min_messages = info").await.expect("sets");
    stage.sides().0.run(DATABASE, "SELECT pg_reload_conf()").await.expect("reloads");
    let logs = "SHOW log_min_messages";
    crate::common::until("the setting is known", async || ask(&mut stage.raw().await, logs).await.contains("D(info)"))
        .await;
    let story = stage.story("an image that would be logged").await;
    same_answers(&stage, "WITH d AS (DELETE FROM b RETURNING *) SELECT * FROM d", false).await;
    story.taints_only("cte", &[("b", &[])]).await;
    stage.pair.settle_and_assert_equal().await;
}
