//! Statements that are captured in part or by other means: EXECUTE, cursors, WITH, EXPLAIN; and tables on which RETURNING would change the outcome.

use crate::common::pair::DATABASE;
use crate::common::raw::{bind, execute, parse};
use crate::stage::{Stage, ask, pipeline};

const SCHEMA: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE kept (id int PRIMARY KEY, v text);
    CREATE TABLE aside (id int PRIMARY KEY, v text);
    CREATE FUNCTION note(k int) RETURNS int LANGUAGE sql AS 'INSERT INTO aside VALUES (k, ''noted'') RETURNING id';
    CREATE TABLE ruled (id int PRIMARY KEY, v text);
    CREATE RULE also AS ON INSERT TO ruled DO ALSO INSERT INTO aside VALUES (NEW.id, NEW.v);
    CREATE TABLE secured (id int PRIMARY KEY, v text);
    ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
    CREATE POLICY all_but_hidden ON secured USING (v <> 'hidden') WITH CHECK (true);
    CREATE TABLE unread (id int PRIMARY KEY, v text, secret text);
    CREATE VIEW seen AS SELECT id, v FROM t WHERE id > 0;
";

async fn script(stage: &Stage, lines: &[(&str, &str)]) {
    let mut client = stage.raw().await;
    for (sql, reply) in lines {
        assert_eq!(ask(&mut client, sql).await, *reply, "{sql}");
    }
}

#[tokio::test]
async fn execute_of_sql_is_captured() {
    let mut stage = Stage::build(SCHEMA).await;
    let mut early = stage.raw().await;
    assert_eq!(ask(&mut early, "PREPARE early AS INSERT INTO t VALUES ($1, 'early')").await, "C(PREPARE) Z(I)");
    stage.enter("dual-write").await;
    let mut client = stage.raw().await;
    let story = stage.story("PREPARE and EXECUTE").await;
    for (sql, reply) in [
        ("PREPARE put (int, text) AS INSERT INTO t VALUES ($1, $2) RETURNING v; -- a comment", "C(PREPARE) Z(I)"),
        ("EXECUTE put(1, 'a')", "T(v) D(a) C(INSERT 0 1) Z(I)"),
        ("EXECUTE put(2, 'b') -- again", "T(v) D(b) C(INSERT 0 1) Z(I)"),
        ("EXECUTE put(2, 'twice')", "E(23505) Z(I)"),
        (
            "PREPARE alter_it AS UPDATE t SET v = v || $1; EXECUTE alter_it('+'); EXECUTE put(3, 'c')",
            "C(PREPARE) C(UPDATE 2) T(v) D(c) C(INSERT 0 1) Z(I)",
        ),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("PREPARE \"Drop it\" AS DELETE FROM t WHERE id = $1", "C(PREPARE) Z(T)"),
        ("EXECUTE \"Drop it\"(3)", "C(DELETE 1) Z(T)"),
        ("SAVEPOINT s", "C(SAVEPOINT) Z(T)"),
        ("EXECUTE \"Drop it\"(2)", "C(DELETE 1) Z(T)"),
        ("ROLLBACK TO s", "C(ROLLBACK) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
        // The name means something else from now on.
        ("DEALLOCATE alter_it", "C(DEALLOCATE) Z(I)"),
        ("EXECUTE alter_it('-')", "E(26000) Z(I)"),
        ("PREPARE alter_it AS INSERT INTO t VALUES ($1, 'new')", "C(PREPARE) Z(I)"),
        ("EXECUTE alter_it(4)", "C(INSERT 0 1) Z(I)"),
        ("PREPARE look AS SELECT v FROM t WHERE id = $1", "C(PREPARE) Z(I)"),
        ("EXECUTE look(1)", "T(v) D(a+) C(SELECT 1) Z(I)"),
    ] {
        assert_eq!(ask(&mut client, sql).await, reply, "{sql}");
    }
    // What Parse has prepared, the hidden column with it.
    let messages = [parse("parsed", "INSERT INTO t VALUES ($1, 'parsed') RETURNING id", &[])];
    assert_eq!(pipeline(&mut client, &messages).await, "1 Z(I)");
    assert_eq!(ask(&mut client, "EXECUTE parsed(5)").await, "T(id) D(5) C(INSERT 0 1) Z(I)");
    let rows = ["(1,a+)", "(2,b+)", "(4,new)", "(5,parsed)"];
    story.exact_after_failures(&[("t", &rows)]).await;

    let story = stage.story("what was prepared out of sight is opaque").await;
    assert_eq!(ask(&mut early, "EXECUTE early(6)").await, "C(INSERT 0 1) Z(I)");
    let rows = ["(1,a+)", "(2,b+)", "(4,new)", "(5,parsed)", "(6,early)"];
    story.heals("execute", &[("t", &rows)]).await;

    let story = stage.story("Bind of what SQL has prepared").await;
    let messages = [bind("", "put", &[], &[Some(b"7"), Some(b"bound")], &[]), execute("", 0)];
    assert_eq!(pipeline(&mut client, &messages).await, "2 D(bound) C(INSERT 0 1) Z(I)");
    let rows = ["(1,a+)", "(2,b+)", "(4,new)", "(5,parsed)", "(6,early)", "(7,bound)"];
    story.heals("unparsed", &[("t", &rows)]).await;

    // The client's name means what the client has said, in a phase in which nobody looks.
    stage.enter("old").await;
    assert_eq!(ask(&mut client, "EXECUTE put(8, 'h')").await, "T(v) D(h) C(INSERT 0 1) Z(I)");
}

#[tokio::test]
async fn what_is_captured_in_part_names_the_rest() {
    let stage = Stage::open(SCHEMA).await;
    let story = stage.story("WHERE CURRENT OF").await;
    script(
        &stage,
        &[
            ("INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')", "C(INSERT 0 3) Z(I)"),
            ("BEGIN", "C(BEGIN) Z(T)"),
            ("DECLARE c CURSOR FOR SELECT id FROM t ORDER BY id FOR UPDATE", "C(DECLARE CURSOR) Z(T)"),
            ("FETCH c", "T(id) D(1) C(FETCH 1) Z(T)"),
            ("UPDATE t SET v = 'x' WHERE CURRENT OF c RETURNING v", "T(v) D(x) C(UPDATE 1) Z(T)"),
            ("FETCH c", "T(id) D(2) C(FETCH 1) Z(T)"),
            ("DELETE FROM t WHERE CURRENT OF c", "C(DELETE 1) Z(T)"),
            ("COMMIT", "C(COMMIT) Z(I)"),
        ],
    )
    .await;
    story.exact(&[("t", &["(1,x)", "(3,c)"])]).await;

    let story =
        stage.story("WITH that writes what cannot be shown, in front of a write: that one is captured, the other tainted by name").await;
    script(
        &stage,
        &[(
            "WITH gone AS (DELETE FROM t WHERE id = 3 RETURNING id, lower(v)) INSERT INTO kept SELECT * FROM gone RETURNING id",
            "T(id) D(3) C(INSERT 0 1) Z(I)",
        )],
    )
    .await;
    let tainted = stage.pair.proxy.metrics("crossfade_taints_total{table=\"public.kept\"}").await;
    assert_eq!(tainted.to_bits() << 1, 0, "kept is captured");
    story.taints_only("cte", &[("t", &["(1,x)"]), ("kept", &["(3,c)"])]).await;

    let story = stage.story("EXPLAIN ANALYZE runs the write").await;
    ask(&mut stage.raw().await, "EXPLAIN (ANALYZE, COSTS OFF) UPDATE t SET v = 'y'").await;
    story.heals("explain", &[("t", &["(1,y)"])]).await;
}

#[tokio::test]
async fn where_returning_would_change_the_outcome_the_write_runs_as_it_is() {
    let stage = Stage::build(SCHEMA).await;
    let grants = "CREATE ROLE adder LOGIN; GRANT USAGE ON SCHEMA public TO adder; GRANT INSERT ON unread TO adder; \
                  GRANT SELECT (id, v), UPDATE (v) ON unread TO adder;";
    for side in [&stage.pair.databases.old, &stage.pair.databases.new] {
        side.run(DATABASE, grants).await.expect("grants");
    }
    let mut stage = stage;
    stage.enter("dual-write").await;

    let story = stage.story("a table with rules").await;
    script(&stage, &[("INSERT INTO ruled VALUES (1, 'a')", "C(INSERT 0 1) Z(I)")]).await;
    story.heals("rule", &[("ruled", &["(1,a)"]), ("aside", &["(1,a)"])]).await;

    let story = stage.story("row security: RETURNING of a row that may not be seen would fail").await;
    script(&stage, &[("INSERT INTO secured VALUES (1, 'hidden'), (2, 'b')", "C(INSERT 0 2) Z(I)")]).await;
    story.heals("row-security", &[("secured", &["(1,hidden)", "(2,b)"])]).await;

    let story = stage.story("a view that can be updated").await;
    let lines = [
        ("INSERT INTO seen VALUES (7, 'view')", "C(INSERT 0 1) Z(I)"),
        ("UPDATE seen SET v = 'seen' WHERE id = 7", "C(UPDATE 1) Z(I)"),
    ];
    script(&stage, &lines).await;
    story.heals("view", &[("t", &["(7,seen)"])]).await;

    let story = stage.story("no SELECT on a column").await;
    let startup = crate::common::raw::startup(crate::common::raw::V3_0, &[("user", "adder"), ("database", DATABASE)]);
    let mut adder = crate::common::raw::RawClient::connect(stage.pair.proxy.port(), None, &startup).await.0;
    assert_eq!(ask(&mut adder, "INSERT INTO unread VALUES (1, 'a', 's')").await, "C(INSERT 0 1) Z(I)");
    assert_eq!(ask(&mut adder, "UPDATE unread SET v = 'b' WHERE id = 1").await, "C(UPDATE 1) Z(I)");
    story.heals("privilege", &[("unread", &["(1,b,s)"])]).await;
}

#[tokio::test]
async fn strict_says_what_to_do_instead() {
    let stage = Stage::open_with(SCHEMA, "mirror: { timeout: 20s, strict: true }").await;
    let client = stage.client().await;
    client.batch_execute("INSERT INTO t VALUES (1, 'a'), (2, 'b'); UPDATE t SET id = id + 10").await.expect("mirrored");
    for sql in [
        "INSERT INTO t VALUES (11, 'x') ON CONFLICT (id) DO UPDATE SET id = t.id + 1",
        "WITH w AS (DELETE FROM t RETURNING abs(id)) SELECT count(*) FROM w",
        "WITH w AS (DELETE FROM t RETURNING id, lower(v)) INSERT INTO kept SELECT * FROM w",
        "EXPLAIN ANALYZE DELETE FROM t",
        "MERGE INTO t USING (VALUES (11)) AS s (id) ON s.id = t.id WHEN MATCHED THEN UPDATE SET id = 12",
        "INSERT INTO ruled VALUES (1, 'a')",
        "INSERT INTO secured VALUES (1, 'a')",
        "INSERT INTO seen VALUES (5, 'a')",
        "BEGIN; INSERT INTO t VALUES (3, 'c'); PREPARE TRANSACTION 'refused'",
    ] {
        let error = client.batch_execute(sql).await.expect_err("is refused");
        let error = error.as_db_error().unwrap_or_else(|| panic!("{sql}: {error}"));
        assert_eq!(error.code().code(), "0A000", "{sql}");
        assert!(error.hint().is_some_and(|hint| hint.contains("mirror.strict: false")), "{sql}: {:?}", error.hint());
        let said = error.hint().is_some_and(|hint| hint.contains("EXPLAIN without ANALYZE"));
        assert_eq!(said, sql.starts_with("EXPLAIN"), "{sql}: {:?}", error.hint());
        client.batch_execute("ROLLBACK").await.expect("goes on");
    }
    let story = stage.story("nothing of it was done").await;
    story.exact(&[("t", &["(11,a)", "(12,b)"]), ("kept", &[]), ("ruled", &[]), ("secured", &[])]).await;
}
