//! The extended protocol: pipelines, portals, prepared statements.

use crate::common::pair::DATABASE;
use crate::common::raw::{self, bind, close, describe, execute, flush, parse};
use crate::stage::{Stage, ask, pipeline, said};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text);
    CREATE TABLE late (id int PRIMARY KEY, once int UNIQUE DEFERRABLE INITIALLY DEFERRED);";

/// Parse, Bind and Execute of a text without parameters.
fn run(sql: &str) -> Vec<u8> {
    [parse("", sql, &[]), bind("", "", &[], &[], &[]), execute("", 0)].concat()
}

#[tokio::test]
async fn pipelines_and_portals_arrive() {
    let mut stage = Stage::open(SCHEMA).await;
    pipelines(&stage).await;
    broken_pipelines(&stage).await;
    blocks_in_pipelines(&stage).await;
    commits_that_fail(&stage).await;
    row_limits(&stage).await;
    bind_many(&stage).await;
    names_that_failed(&stage).await;
    stage.enter("new-primary").await;
    pipelines(&stage).await;
    broken_pipelines(&stage).await;
    bind_many(&stage).await;
}

async fn pipelines(stage: &Stage) {
    let story = stage.story("a pipeline is one transaction up to Sync").await;
    let mut client = stage.raw().await;
    ask(&mut client, "TRUNCATE t, u").await;
    let two = [
        run("INSERT INTO t VALUES (1, 'a')"),
        run("SELECT 1"),
        run("INSERT INTO t VALUES (2, 'b') RETURNING v"),
        run("UPDATE t SET v = v || 'x'"),
    ];
    assert_eq!(
        pipeline(&mut client, &two).await,
        "1 2 C(INSERT 0 1) 1 2 D(1) C(SELECT 1) 1 2 D(b) C(INSERT 0 1) 1 2 C(UPDATE 2) Z(I)"
    );
    // Two pipelines in one flight.
    let both =
        [run("INSERT INTO t VALUES (3, 'c')"), raw::sync(), run("INSERT INTO t VALUES (4, 'd')"), raw::sync()].concat();
    client.send(&both).await;
    assert_eq!(said(&client.until_ready(2).await), "1 2 C(INSERT 0 1) Z(I) 1 2 C(INSERT 0 1) Z(I)");
    // Flush asks for the replies before the transaction has ended.
    client.send(&[run("INSERT INTO t VALUES (5, 'e')"), flush()].concat()).await;
    assert_eq!(said(&client.until(b'C', 1).await), "1 2 C(INSERT 0 1)");
    assert_eq!(pipeline(&mut client, &[run("DELETE FROM t WHERE id = 4")]).await, "1 2 C(DELETE 1) Z(I)");
    story.exact(&[("t", &["(1,ax)", "(2,bx)", "(3,c)", "(5,e)"])]).await;
}

async fn broken_pipelines(stage: &Stage) {
    let story = stage.story("an error in a pipeline undoes it").await;
    let mut client = stage.raw().await;
    ask(&mut client, "TRUNCATE t, u").await;
    let error = [run("INSERT INTO t VALUES (1, 'a')"), run("SELECT 1/0"), run("INSERT INTO t VALUES (2, 'b')")];
    assert_eq!(pipeline(&mut client, &error).await, "1 2 C(INSERT 0 1) 1 E(22012) Z(I)");
    let twice = [run("INSERT INTO t VALUES (1, 'a')"), run("INSERT INTO t VALUES (1, 'b')")];
    assert_eq!(pipeline(&mut client, &twice).await, "1 2 C(INSERT 0 1) 1 2 E(23505) Z(I)");
    let fresh = [run("INSERT INTO t VALUES (3, 'c')")];
    assert_eq!(pipeline(&mut client, &fresh).await, "1 2 C(INSERT 0 1) Z(I)");
    story.exact(&[("t", &["(3,c)"])]).await;

    let story = stage.story("an error before a session's first write").await;
    let mut client = stage.raw().await;
    let error = [run("SELECT 1/0"), run("INSERT INTO t VALUES (4, 'never')")];
    assert_eq!(pipeline(&mut client, &error).await, "1 E(22012) Z(I)");
    assert_eq!(pipeline(&mut client, &[run("INSERT INTO t VALUES (5, 'kept')")]).await, "1 2 C(INSERT 0 1) Z(I)");
    assert_eq!(ask(&mut client, "INSERT INTO t VALUES (6, 'kept')").await, "C(INSERT 0 1) Z(I)");
    story.exact(&[("t", &["(3,c)", "(5,kept)", "(6,kept)"])]).await;
}

async fn blocks_in_pipelines(stage: &Stage) {
    let story = stage.story("BEGIN and COMMIT inside pipelines").await;
    let mut client = stage.raw().await;
    ask(&mut client, "TRUNCATE t, u").await;
    let whole = [run("BEGIN"), run("INSERT INTO t VALUES (1, 'a')"), run("COMMIT")];
    assert_eq!(pipeline(&mut client, &whole).await, "1 2 C(BEGIN) 1 2 C(INSERT 0 1) 1 2 C(COMMIT) Z(I)");
    let open = [run("BEGIN"), run("INSERT INTO t VALUES (2, 'b')")];
    assert_eq!(pipeline(&mut client, &open).await, "1 2 C(BEGIN) 1 2 C(INSERT 0 1) Z(T)");
    let next = [run("INSERT INTO t VALUES (3, 'c')"), run("COMMIT"), run("INSERT INTO t VALUES (4, 'd')")];
    assert_eq!(pipeline(&mut client, &next).await, "1 2 C(INSERT 0 1) 1 2 C(COMMIT) 1 2 C(INSERT 0 1) Z(I)");
    let broken = [run("BEGIN"), run("INSERT INTO t VALUES (5, 'e')"), run("SELECT 1/0"), run("COMMIT")];
    assert_eq!(pipeline(&mut client, &broken).await, "1 2 C(BEGIN) 1 2 C(INSERT 0 1) 1 E(22012) Z(E)");
    assert_eq!(pipeline(&mut client, &[run("COMMIT")]).await, "1 2 C(ROLLBACK) Z(I)");
    let chain = [
        run("BEGIN"),
        run("INSERT INTO t VALUES (6, 'f')"),
        run("COMMIT AND CHAIN"),
        run("INSERT INTO t VALUES (7, 'g')"),
    ];
    assert_eq!(
        pipeline(&mut client, &chain).await,
        "1 2 C(BEGIN) 1 2 C(INSERT 0 1) 1 2 C(COMMIT) 1 2 C(INSERT 0 1) Z(T)"
    );
    assert_eq!(ask(&mut client, "ROLLBACK").await, "C(ROLLBACK) Z(I)");
    story.exact(&[("t", &["(1,a)", "(2,b)", "(3,c)", "(4,d)", "(6,f)"])]).await;

    let story = stage.story("BEGIN behind a write in one pipeline").await;
    assert_eq!(ask(&mut client, "TRUNCATE t, u").await, "C(TRUNCATE TABLE) Z(I)");
    let behind = [run("INSERT INTO t VALUES (1, 'a')"), run("BEGIN"), run("INSERT INTO t VALUES (2, 'b')")];
    assert_eq!(pipeline(&mut client, &behind).await, "1 2 C(INSERT 0 1) 1 2 C(BEGIN) 1 2 C(INSERT 0 1) Z(T)");
    assert_eq!(ask(&mut client, "COMMIT").await, "C(COMMIT) Z(I)");
    story.exact(&[("t", &["(1,a)", "(2,b)"])]).await;
}

/// COMMIT and its Sync go over in one flight with the debts: whatever of it fails, the client hears what PostgreSQL says, and goes on.
async fn commits_that_fail(stage: &Stage) {
    let story = stage.story("a COMMIT that fails").await;
    let mut client = stage.raw().await;
    ask(&mut client, "TRUNCATE t, u").await;
    let write = [run("BEGIN"), run("INSERT INTO t VALUES (1, 'never')"), run("INSERT INTO late VALUES (1, 1), (2, 1)")];
    let written = "1 2 C(BEGIN) 1 2 C(INSERT 0 1) 1 2 C(INSERT 0 2) Z(T)";
    assert_eq!(pipeline(&mut client, &write).await, written);
    assert_eq!(pipeline(&mut client, &[run("COMMIT")]).await, "1 2 E(23505) Z(I)");
    // COMMIT's own Bind fails: the block is left to the client.
    assert_eq!(pipeline(&mut client, &write).await, written);
    let wrong = [parse("", "COMMIT", &[]), bind("", "", &[], &[Some(b"1")], &[]), execute("", 0)];
    assert_eq!(pipeline(&mut client, &wrong).await, "1 E(08P01) Z(E)");
    assert_eq!(pipeline(&mut client, &[run("COMMIT")]).await, "1 2 C(ROLLBACK) Z(I)");
    // The ledger refuses: nothing is committed.
    let (authority, _) = stage.sides();
    let shut = "ALTER TABLE crossfade.ledger ADD CONSTRAINT shut CHECK (id < 0) NOT VALID";
    authority.run(DATABASE, shut).await.expect("shuts the ledger");
    assert_eq!(pipeline(&mut client, &write[..2]).await, "1 2 C(BEGIN) 1 2 C(INSERT 0 1) Z(T)");
    assert_eq!(pipeline(&mut client, &[run("COMMIT")]).await, "1 2 E(23514) Z(I)");
    assert_eq!(
        pipeline(&mut client, &[run("INSERT INTO t VALUES (2, 'never')")]).await,
        "1 2 C(INSERT 0 1) E(23514) Z(I)"
    );
    authority.run(DATABASE, "ALTER TABLE crossfade.ledger DROP CONSTRAINT shut").await.expect("opens it");
    let kept = [run("BEGIN"), run("INSERT INTO t VALUES (3, 'kept')"), run("COMMIT")];
    assert_eq!(pipeline(&mut client, &kept).await, "1 2 C(BEGIN) 1 2 C(INSERT 0 1) 1 2 C(COMMIT) Z(I)");
    story.exact(&[("t", &["(3,kept)"])]).await;
}

async fn row_limits(stage: &Stage) {
    let story = stage.story("a row limit on a write without RETURNING limits nothing").await;
    let mut client = stage.raw().await;
    ask(&mut client, "TRUNCATE t, u").await;
    let insert = [
        parse("", "INSERT INTO t SELECT i, 'v' FROM generate_series(1, 3) i", &[]),
        bind("p", "", &[], &[], &[]),
        execute("p", 1),
    ];
    assert_eq!(pipeline(&mut client, &insert).await, "1 2 C(INSERT 0 3) Z(I)");
    story.exact(&[("t", &["(1,v)", "(2,v)", "(3,v)"])]).await;

    let story = stage.story("a portal whose rows are fetched piece by piece").await;
    ask(&mut client, "BEGIN").await;
    let sql = "INSERT INTO t SELECT i, 'w' FROM generate_series(11, 13) i RETURNING id";
    let first = [parse("", sql, &[]), bind("p", "", &[], &[], &[]), describe(b'P', "p"), execute("p", 2)];
    assert_eq!(pipeline(&mut client, &first).await, "1 2 T(id) D(11) D(12) s Z(T)");
    assert_eq!(ask(&mut client, "UPDATE u SET v = v").await, "C(UPDATE 0) Z(T)");
    assert_eq!(pipeline(&mut client, &[execute("p", 2)]).await, "D(13) C(INSERT 0 1) Z(T)");
    assert_eq!(ask(&mut client, "COMMIT").await, "C(COMMIT) Z(I)");
    story.exact(&[("t", &["(1,v)", "(11,w)", "(12,w)", "(13,w)", "(2,v)", "(3,v)"])]).await;

    let story = stage.story("a portal whose last rows nobody fetches").await;
    let sql = "UPDATE t SET v = 'x' RETURNING id";
    let some = [parse("", sql, &[]), bind("", "", &[], &[], &[]), execute("", 1)];
    let reply = pipeline(&mut client, &some).await;
    assert!(reply.ends_with(" s Z(I)"), "{reply}");
    story.heals("suspended", &[("t", &["(1,x)", "(11,x)", "(12,x)", "(13,x)", "(2,x)", "(3,x)"])]).await;
}

async fn bind_many(stage: &Stage) {
    let story = stage.story("Parse once, Bind many").await;
    let mut client = stage.raw().await;
    ask(&mut client, "TRUNCATE t, u").await;
    let prepare = [
        parse("ins", "INSERT INTO t VALUES ($1, $2) RETURNING id", &[23, 25]),
        parse("upd", "UPDATE t SET v = $2 WHERE id = $1", &[]),
        describe(b'S', "ins"),
        describe(b'S', "upd"),
    ];
    assert_eq!(pipeline(&mut client, &prepare).await, "1 1 t T(id) t n Z(I)");
    for number in ["1", "2"] {
        let values = [Some(number.as_bytes()), Some(&b"v"[..])];
        let batch = [
            bind("", "ins", &[], &values, &[1]),
            execute("", 0),
            bind("", "upd", &[], &[values[0], Some(b"new")], &[]),
            execute("", 0),
        ];
        let byte = format!("\\x00\\x00\\x00\\x0{number}");
        assert_eq!(pipeline(&mut client, &batch).await, format!("2 D({byte}) C(INSERT 0 1) 2 C(UPDATE 1) Z(I)"));
    }
    let binary = [&7_i32.to_be_bytes()[..], &[0xC3, 0xA4][..]];
    let batch =
        [bind("", "ins", &[1, 0], &[Some(binary[0]), Some(binary[1])], &[0]), execute("", 0), close(b'S', "ins")];
    assert_eq!(pipeline(&mut client, &batch).await, "2 D(7) C(INSERT 0 1) 3 Z(I)");
    // Several portals of one statement, executed in another order.
    let portals = [
        parse("ins", "INSERT INTO t VALUES ($1, 'p')", &[23]),
        bind("a", "ins", &[], &[Some(b"20")], &[]),
        bind("b", "ins", &[], &[Some(b"21")], &[]),
        execute("b", 0),
        execute("a", 0),
    ];
    assert_eq!(pipeline(&mut client, &portals).await, "1 2 2 C(INSERT 0 1) C(INSERT 0 1) Z(I)");
    story.exact(&[("t", &["(1,new)", "(2,new)", "(20,p)", "(21,p)", "(7,ä)"])]).await;

    for (forget, mark) in [("DEALLOCATE ALL", "+"), ("DISCARD ALL", "++")] {
        assert!(ask(&mut client, forget).await.ends_with(" Z(I)"));
        // A name that is not known here may be one of SQL's PREPARE, and counts as out of sight: that is no part of the story.
        let gone = [bind("", "ins", &[], &[Some(b"30")], &[]), execute("", 0)];
        assert_eq!(pipeline(&mut client, &gone).await, "E(26000) Z(I)");
        let story = stage.story("DEALLOCATE ALL and DISCARD ALL, and on").await;
        let again =
            [parse("ins", "UPDATE t SET v = v || $1", &[25]), bind("", "ins", &[], &[Some(b"+")], &[]), execute("", 0)];
        assert_eq!(pipeline(&mut client, &again).await, "1 2 C(UPDATE 5) Z(I)");
        let rows = ["(1,new+)", "(2,new+)", "(20,p+)", "(21,p+)", "(7,ä+)"].map(|row| row.replace('+', mark));
        story.exact(&[("t", &rows.each_ref().map(String::as_str))]).await;
    }
}

async fn names_that_failed(stage: &Stage) {
    let story = stage.story("a name whose Parse has failed, or was passed over, is free again").await;
    let mut client = stage.raw().await;
    ask(&mut client, "TRUNCATE t, u").await;
    assert_eq!(pipeline(&mut client, &[parse("s", "INSERT INTO nowhere VALUES (1)", &[])]).await, "E(42P01) Z(I)");
    let over = [run("SELECT 1/0"), parse("s", "INSERT INTO u VALUES ($1, 'passed over')", &[])];
    assert_eq!(pipeline(&mut client, &over).await, "1 E(22012) Z(I)");
    let insert =
        [parse("s", "INSERT INTO t VALUES ($1, 's')", &[23]), bind("", "s", &[], &[Some(b"1")], &[]), execute("", 0)];
    assert_eq!(pipeline(&mut client, &insert).await, "1 2 C(INSERT 0 1) Z(I)");
    // The name is taken: what it meant stays.
    assert_eq!(pipeline(&mut client, &[parse("s", "DELETE FROM t", &[])]).await, "E(42P05) Z(I)");
    assert_eq!(
        pipeline(&mut client, &[bind("", "s", &[], &[Some(b"2")], &[]), execute("", 0)]).await,
        "2 C(INSERT 0 1) Z(I)"
    );
    story.exact(&[("t", &["(1,s)", "(2,s)"]), ("u", &[])]).await;
}
