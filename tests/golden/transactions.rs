//! Blocks, savepoints, implicit transactions, and how they end.

use crate::stage::{Stage, ask, state};

const SCHEMA: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE parent (id int PRIMARY KEY);
    CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
    CREATE FUNCTION looks() RETURNS bigint LANGUAGE plpgsql AS 'BEGIN RETURN (SELECT count(*) FROM t); END';
";

#[tokio::test]
async fn transactions_arrive_whole_or_not_at_all() {
    let mut stage = Stage::open(SCHEMA).await;
    ends(&stage).await;
    savepoints(&stage).await;
    failures(&stage).await;
    implicit(&stage).await;
    unreadable(&stage).await;
    deferred(&stage).await;
    read_only(&stage).await;
    stage.enter("new-primary").await;
    ends(&stage).await;
    savepoints(&stage).await;
    implicit(&stage).await;
    deferred(&stage).await;
}

/// A script of Query messages: each with what must come back.
async fn script(stage: &Stage, lines: &[(&str, &str)]) {
    let mut client = stage.raw().await;
    for (sql, reply) in lines {
        assert_eq!(ask(&mut client, sql).await, *reply, "{sql}");
    }
}

async fn ends(stage: &Stage) {
    let story = stage.story("COMMIT, ROLLBACK, AND CHAIN").await;
    let lines = [
        ("TRUNCATE t", "C(TRUNCATE TABLE) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("INSERT INTO t VALUES (1, 'kept')", "C(INSERT 0 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
        ("START TRANSACTION", "C(START TRANSACTION) Z(T)"),
        ("INSERT INTO t VALUES (2, 'rolled back')", "C(INSERT 0 1) Z(T)"),
        ("ROLLBACK", "C(ROLLBACK) Z(I)"),
        ("begin work", "C(BEGIN) Z(T)"),
        ("INSERT INTO t VALUES (3, 'chained')", "C(INSERT 0 1) Z(T)"),
        ("COMMIT AND CHAIN", "C(COMMIT) Z(T)"),
        ("INSERT INTO t VALUES (4, 'rolled back')", "C(INSERT 0 1) Z(T)"),
        ("ROLLBACK AND CHAIN", "C(ROLLBACK) Z(T)"),
        ("INSERT INTO t VALUES (5, 'chained twice')", "C(INSERT 0 1) Z(T)"),
        ("END", "C(COMMIT) Z(I)"),
        ("COMMIT", "N(25P01) C(COMMIT) Z(I)"),
        ("ABORT", "N(25P01) C(ROLLBACK) Z(I)"),
    ];
    script(stage, &lines).await;
    story.exact(&[("t", &["(1,kept)", "(3,chained)", "(5,\"chained twice\")"])]).await;

    let story = stage.story("a client goes away in its transaction").await;
    let mut client = stage.raw().await;
    ask(&mut client, "BEGIN").await;
    assert_eq!(ask(&mut client, "UPDATE t SET v = 'lost'").await, "C(UPDATE 3) Z(T)");
    drop(client);
    // Waits for the row lock of the transaction that went.
    script(stage, &[("DELETE FROM t WHERE id = 3", "C(DELETE 1) Z(I)")]).await;
    story.exact(&[("t", &["(1,kept)", "(5,\"chained twice\")"])]).await;
}

async fn savepoints(stage: &Stage) {
    let story = stage.story("savepoints, ROLLBACK TO, RELEASE").await;
    let lines = [
        ("TRUNCATE t", "C(TRUNCATE TABLE) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("INSERT INTO t VALUES (1, 'a')", "C(INSERT 0 1) Z(T)"),
        ("SAVEPOINT s", "C(SAVEPOINT) Z(T)"),
        ("UPDATE t SET v = 'b'", "C(UPDATE 1) Z(T)"),
        ("SAVEPOINT \"S\"", "C(SAVEPOINT) Z(T)"),
        ("INSERT INTO t VALUES (2, 'S')", "C(INSERT 0 1) Z(T)"),
        ("ROLLBACK TO SAVEPOINT \"S\"", "C(ROLLBACK) Z(T)"),
        ("INSERT INTO t VALUES (3, 'after S')", "C(INSERT 0 1) Z(T)"),
        ("RELEASE \"S\"", "C(RELEASE) Z(T)"),
        ("INSERT INTO t VALUES (3, 'twice')", "E(23505) Z(E)"),
        ("INSERT INTO t VALUES (4, 'ignored')", "E(25P02) Z(E)"),
        ("ROLLBACK TO S", "C(ROLLBACK) Z(T)"),
        ("INSERT INTO t VALUES (5, 'after s')", "C(INSERT 0 1) Z(T)"),
        ("SAVEPOINT s", "C(SAVEPOINT) Z(T)"),
        ("DELETE FROM t", "C(DELETE 2) Z(T)"),
        ("rollback work to s", "C(ROLLBACK) Z(T)"),
        ("RELEASE SAVEPOINT s", "C(RELEASE) Z(T)"),
        ("INSERT INTO t VALUES (6, 'undone by the outer s')", "C(INSERT 0 1) Z(T)"),
        ("ROLLBACK TO s", "C(ROLLBACK) Z(T)"),
        ("INSERT INTO t VALUES (7, 'last')", "C(INSERT 0 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
    ];
    script(stage, &lines).await;
    story.exact(&[("t", &["(1,a)", "(7,last)"])]).await;

    let story = stage.story("savepoints in the extended protocol, as drivers nest transactions").await;
    let mut client = stage.client().await;
    let mut outer = client.transaction().await.expect("begins");
    outer.execute("INSERT INTO t VALUES ($1, 'outer')", &[&10]).await.expect("inserts");
    let mut inner = outer.transaction().await.expect("savepoint");
    inner.execute("INSERT INTO t VALUES ($1, 'inner')", &[&11]).await.expect("inserts");
    let innermost = inner.transaction().await.expect("savepoint");
    innermost.execute("UPDATE t SET v = 'innermost'", &[]).await.expect("updates");
    assert_eq!(
        state(&innermost.execute("INSERT INTO t VALUES ($1, 'twice')", &[&1]).await.expect_err("twice")),
        "23505"
    );
    innermost.rollback().await.expect("rolls back");
    inner.commit().await.expect("releases");
    outer.commit().await.expect("commits");
    story.exact(&[("t", &["(1,a)", "(10,outer)", "(11,inner)", "(7,last)"])]).await;
}

async fn failures(stage: &Stage) {
    let story = stage.story("COMMIT of a failed block answers ROLLBACK").await;
    let lines = [
        ("TRUNCATE t", "C(TRUNCATE TABLE) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("INSERT INTO t VALUES (1, 'a')", "C(INSERT 0 1) Z(T)"),
        ("SELECT 1/0", "E(22012) Z(E)"),
        ("COMMIT", "C(ROLLBACK) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("INSERT INTO t VALUES (1, 'a')", "C(INSERT 0 1) Z(T)"),
        ("SELECT 1/0", "E(22012) Z(E)"),
        ("COMMIT AND CHAIN", "C(ROLLBACK) Z(T)"),
        ("INSERT INTO t VALUES (2, 'chained')", "C(INSERT 0 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
    ];
    script(stage, &lines).await;
    story.exact(&[("t", &["(2,chained)"])]).await;
}

async fn implicit(stage: &Stage) {
    let story = stage.story("several statements in one Query").await;
    let lines = [
        (
            "TRUNCATE t; INSERT INTO t VALUES (1, 'a'); SELECT v FROM t; UPDATE t SET v = 'b' RETURNING id",
            "C(TRUNCATE TABLE) C(INSERT 0 1) T(v) D(a) C(SELECT 1) T(id) D(1) C(UPDATE 1) Z(I)",
        ),
        (
            "INSERT INTO t VALUES (2, 'undone'); SELECT 1/0; INSERT INTO t VALUES (3, 'never')",
            "C(INSERT 0 1) E(22012) Z(I)",
        ),
        ("INSERT INTO t VALUES (4, 'x'); INSERT INTO t VALUES (1, 'twice')", "C(INSERT 0 1) E(23505) Z(I)"),
        (
            "INSERT INTO t VALUES (5, 'kept'); COMMIT; INSERT INTO t VALUES (6, 'undone'); SELECT 1/0",
            "C(INSERT 0 1) N(25P01) C(COMMIT) C(INSERT 0 1) E(22012) Z(I)",
        ),
        (
            "INSERT INTO t VALUES (7, 'undone'); ROLLBACK; INSERT INTO t VALUES (8, 'kept')",
            "C(INSERT 0 1) N(25P01) C(ROLLBACK) C(INSERT 0 1) Z(I)",
        ),
        (
            "INSERT INTO t VALUES (9, 'kept'); BEGIN; INSERT INTO t VALUES (10, 'kept'); COMMIT; INSERT INTO t VALUES (11, 'kept')",
            "C(INSERT 0 1) C(BEGIN) C(INSERT 0 1) C(COMMIT) C(INSERT 0 1) Z(I)",
        ),
        ("BEGIN; INSERT INTO t VALUES (12, 'undone')", "C(BEGIN) C(INSERT 0 1) Z(T)"),
        (
            "INSERT INTO t VALUES (13, 'undone'); ROLLBACK; INSERT INTO t VALUES (14, 'kept');;",
            "C(INSERT 0 1) C(ROLLBACK) C(INSERT 0 1) Z(I)",
        ),
        ("BEGIN; INSERT INTO t VALUES (15, 'undone'); SELECT 1/0; COMMIT", "C(BEGIN) C(INSERT 0 1) E(22012) Z(E)"),
        ("COMMIT; INSERT INTO t VALUES (16, 'kept')", "C(ROLLBACK) C(INSERT 0 1) Z(I)"),
        (
            "BEGIN; INSERT INTO t VALUES (17, 'kept'); COMMIT; BEGIN; INSERT INTO t VALUES (18, 'open')",
            "C(BEGIN) C(INSERT 0 1) C(COMMIT) C(BEGIN) C(INSERT 0 1) Z(T)",
        ),
        ("ROLLBACK", "C(ROLLBACK) Z(I)"),
        (";", "I Z(I)"),
    ];
    script(stage, &lines).await;
    let rows: &[&str] =
        &["(1,b)", "(11,kept)", "(10,kept)", "(14,kept)", "(16,kept)", "(17,kept)", "(5,kept)", "(8,kept)", "(9,kept)"];
    let mut rows = rows.to_vec();
    rows.sort_unstable();
    story.exact(&[("t", &rows)]).await;
}

/// PostgreSQL reads all of a text before it runs the first statement of it.
async fn unreadable(stage: &Stage) {
    let story = stage.story("an error in a text of several statements").await;
    script(stage, &[("INSERT INTO t VALUES (19, 'never'); COMMIT; SELEC 1", "E(42601) Z(I)")]).await;
    story.heals("unparsed", &[]).await;
}

async fn deferred(stage: &Stage) {
    let story = stage.story("a deferred constraint fails at COMMIT").await;
    let lines = [
        ("TRUNCATE child, parent", "C(TRUNCATE TABLE) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("INSERT INTO child VALUES (1, 1)", "C(INSERT 0 1) Z(T)"),
        ("COMMIT", "E(23503) Z(I)"),
        ("INSERT INTO child VALUES (2, 2)", "E(23503) Z(I)"),
        ("INSERT INTO child VALUES (3, 3); SELECT 1", "C(INSERT 0 1) T(?column?) D(1) E(23503) Z(I)"),
        ("BEGIN", "C(BEGIN) Z(T)"),
        ("INSERT INTO child VALUES (4, 4)", "C(INSERT 0 1) Z(T)"),
        ("INSERT INTO parent VALUES (4)", "C(INSERT 0 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
    ];
    script(stage, &lines).await;
    let mut client = stage.client().await;
    let alone = client.execute("INSERT INTO child VALUES ($1, 5)", &[&5]).await;
    assert_eq!(state(&alone.expect_err("no parent")), "23503");
    let transaction = client.transaction().await.expect("begins");
    transaction.execute("INSERT INTO child VALUES ($1, 6)", &[&6]).await.expect("inserts");
    assert_eq!(state(&transaction.commit().await.expect_err("no parent")), "23503");
    story.exact(&[("parent", &["(4)"]), ("child", &["(4,4)"])]).await;
}

async fn read_only(stage: &Stage) {
    let story = stage.story("transactions that may not write").await;
    let lines = [
        ("TRUNCATE t", "C(TRUNCATE TABLE) Z(I)"),
        ("BEGIN READ ONLY", "C(BEGIN) Z(T)"),
        ("INSERT INTO t VALUES (1, 'a')", "E(25006) Z(E)"),
        ("ROLLBACK", "C(ROLLBACK) Z(I)"),
        ("SET default_transaction_read_only = on", "C(SET) Z(I)"),
        ("INSERT INTO t VALUES (1, 'a') RETURNING id", "E(25006) Z(I)"),
        ("BEGIN READ WRITE", "C(BEGIN) Z(T)"),
        ("INSERT INTO t VALUES (2, 'b')", "C(INSERT 0 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
    ];
    script(stage, &lines).await;
    story.exact(&[("t", &["(2,b)"])]).await;

    // A volatile function might write; where it cannot, the transaction must not fail for our sake.
    let owed = stage.owed().await;
    let lines = [
        ("BEGIN READ ONLY", "C(BEGIN) Z(T)"),
        ("SELECT looks()", "T(looks) D(1) C(SELECT 1) Z(T)"),
        ("COMMIT", "C(COMMIT) Z(I)"),
        ("SET default_transaction_read_only = on", "C(SET) Z(I)"),
        ("SELECT looks()", "T(looks) D(1) C(SELECT 1) Z(I)"),
    ];
    script(stage, &lines).await;
    assert_eq!(stage.owed().await, owed, "nothing was written, nothing is owed");
}
