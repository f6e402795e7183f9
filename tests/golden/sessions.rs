//! Two and three sessions at once: both sides end in the order of the authority.

use crate::stage::{Stage, state};

const SCHEMA: &str =
    "CREATE TABLE hot (id int PRIMARY KEY, n int NOT NULL, who text); CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE u (id int PRIMARY KEY, v text UNIQUE);";

#[tokio::test]
async fn sessions_that_meet_leave_both_sides_equal() {
    let mut stage = Stage::open(SCHEMA).await;
    hot_row(&stage).await;
    delete_and_insert(&stage).await;
    unique_value_moves(&stage).await;
    serialization(&stage).await;
    stage.enter("new-primary").await;
    hot_row(&stage).await;
    delete_and_insert(&stage).await;
}

/// Waits until a session of the authority waits for a lock: the story's next step meets it there.
async fn someone_waits(stage: &Stage) {
    let (authority, _) = stage.sides();
    crate::common::until("a session waits for a lock", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = 'app'";
        authority.run("postgres", sql).await.expect("asks").trim() != "0"
    })
    .await;
}

async fn hot_row(stage: &Stage) {
    let story = stage.story("many sessions on one row").await;
    let first = stage.client().await;
    first.batch_execute("TRUNCATE hot; INSERT INTO hot VALUES (1, 0)").await.expect("fills");
    let clients: Vec<_> = (0..6)
        .map(|number: i32| {
            let url = stage.pair.url();
            tokio::spawn(async move {
                let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects");
                tokio::spawn(async move { drop(connection.await) });
                for turn in 0..25 {
                    let who = format!("{number}/{turn}");
                    match (number + turn) % 3 {
                        0 => client.batch_execute(&format!("UPDATE hot SET n = n + 1, who = '{who}' WHERE id = 1")).await,
                        1 => client.execute("UPDATE hot SET n = n + 1, who = $1 WHERE id = 1", &[&who]).await.map(drop),
                        _ => client.batch_execute(&format!("BEGIN; INSERT INTO hot VALUES (1, 0) ON CONFLICT (id) DO UPDATE SET n = hot.n + 1, who = '{who}'; COMMIT")).await,
                    }
                    .expect("adds");
                }
            })
        })
        .collect();
    for client in clients {
        client.await.expect("ends");
    }
    let n: i32 = first.query_one("SELECT n FROM hot", &[]).await.expect("reads").get(0);
    assert_eq!(n, 150);
    story.exact_rows("hot", 1).await;
}

/// Interleaving 1: a delete and an insert of one key. Whoever comes second on the authority comes second on the mirror.
async fn delete_and_insert(stage: &Stage) {
    let story = stage.story("a delete and an insert of one key").await;
    let client = stage.client().await;
    client.batch_execute("TRUNCATE t; INSERT INTO t VALUES (1, 'first'), (2, 'first')").await.expect("fills");
    delete_meets_insert(stage, 1, "COMMIT").await;
    delete_meets_insert(stage, 2, "ROLLBACK").await;
    story.exact(&[("t", &["(1,second)", "(2,\"first and second\")"])]).await;
}

async fn delete_meets_insert(stage: &Stage, key: i32, end: &str) {
    let (a, b) = (stage.client().await, stage.client().await);
    a.batch_execute(&format!("BEGIN; DELETE FROM t WHERE id = {key}")).await.expect("deletes");
    let insert =
        format!("INSERT INTO t VALUES ({key}, 'second') ON CONFLICT (id) DO UPDATE SET v = t.v || ' and second'");
    let second = tokio::spawn(async move { b.batch_execute(&insert).await });
    someone_waits(stage).await;
    a.batch_execute(end).await.expect("ends");
    second.await.expect("ends").expect("inserts");
}

async fn unique_value_moves(stage: &Stage) {
    let story = stage.story("a unique value goes from one row to another").await;
    let (a, b) = (stage.client().await, stage.client().await);
    a.batch_execute("INSERT INTO u VALUES (1, 'x'), (2, 'y')").await.expect("fills");
    a.batch_execute("BEGIN; DELETE FROM u WHERE id = 1; INSERT INTO u VALUES (3, 'x'); COMMIT").await.expect("moves");
    a.batch_execute("BEGIN; UPDATE u SET v = 'free' WHERE id = 3").await.expect("frees");
    let second = tokio::spawn(async move { b.batch_execute("UPDATE u SET v = 'x' WHERE id = 2").await });
    someone_waits(stage).await;
    a.batch_execute("COMMIT").await.expect("commits");
    second.await.expect("ends").expect("takes the value");
    story.exact(&[("u", &["(2,x)", "(3,free)"])]).await;
}

async fn serialization(stage: &Stage) {
    let story = stage.story("serialization failures").await;
    let (a, b) = (stage.client().await, stage.client().await);
    a.batch_execute("TRUNCATE t; INSERT INTO t VALUES (1, 'x'), (2, 'y')").await.expect("fills");
    // REPEATABLE READ: the second writer of a row fails at its statement.
    for client in [&a, &b] {
        client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM t").await.expect("begins");
    }
    a.batch_execute("UPDATE t SET v = 'a' WHERE id = 1; COMMIT").await.expect("commits");
    assert_eq!(state(&b.batch_execute("UPDATE t SET v = 'b' WHERE id = 1").await.expect_err("came second")), "40001");
    b.batch_execute("ROLLBACK").await.expect("rolls back");
    // SERIALIZABLE: write skew. One of the two fails, at its COMMIT.
    for client in [&a, &b] {
        client.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM t").await.expect("begins");
    }
    a.batch_execute("INSERT INTO t VALUES (3, 'a')").await.expect("inserts");
    b.batch_execute("INSERT INTO t VALUES (4, 'b')").await.expect("inserts");
    a.batch_execute("COMMIT").await.expect("commits");
    assert_eq!(state(&b.batch_execute("COMMIT").await.expect_err("came second")), "40001");
    b.batch_execute("INSERT INTO t VALUES (5, 'again')").await.expect("the session goes on");
    story.exact(&[("t", &["(1,a)", "(2,y)", "(3,a)", "(5,again)"])]).await;
}
