//! Sessions, their statements and settings over a change of phase.

use crate::common::raw::{bind, describe, execute, parse};
use crate::stage::{Stage, ask, pipeline};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text, at timestamptz DEFAULT '2020-01-01 00:00Z');";

#[tokio::test]
async fn statements_prepared_in_old_serve_in_every_phase() {
    let mut stage = Stage::build(SCHEMA).await;
    let mut raw = stage.raw().await;
    let client = stage.client().await;
    let prepared =
        client.prepare("INSERT INTO t (id, v) VALUES ($1, $2) RETURNING id, at::text").await.expect("prepares");
    let prepare = [
        parse("ins", "INSERT INTO t VALUES ($1, $2)", &[23]),
        parse("sel", "SELECT count(*) FROM t", &[]),
        parse("upd", "UPDATE t SET v = $1 RETURNING *", &[25]),
    ];
    assert_eq!(pipeline(&mut raw, &prepare).await, "1 1 1 Z(I)");
    client.batch_execute("SET timezone = 'Asia/Tokyo'").await.expect("sets");
    let mut rows = Vec::new();
    for (number, phase) in ["old", "dual-write", "new-primary", "dual-write"].into_iter().enumerate() {
        if number > 0 {
            stage.enter(phase).await;
        }
        let story = stage.story(phase).await;
        let id = i32::try_from(number).expect("few") * 10;
        let row = client.query_one(&prepared, &[&id, &phase]).await.expect("inserts");
        assert_eq!(
            (row.get::<_, i32>(0), row.get::<_, &str>(1)),
            (id, "2020-01-01 09:00:00+09"),
            "the session's setting moved along"
        );
        let next = (id + 1).to_string();
        // A failure before the first use must not lose the statement.
        assert_eq!(ask(&mut raw, "BEGIN; SELECT 1/0").await, "C(BEGIN) E(22012) Z(E)");
        let insert =
            [bind("", "ins", &[], &[Some(next.as_bytes()), Some(b"raw")], &[]), describe(b'P', ""), execute("", 0)];
        assert_eq!(pipeline(&mut raw, &insert).await, "E(25P02) Z(E)");
        assert_eq!(ask(&mut raw, "ROLLBACK").await, "C(ROLLBACK) Z(I)");
        let broken = [parse("", "SELECT 1/0", &[]), bind("", "", &[], &[], &[]), execute("", 0), insert.concat()];
        assert_eq!(pipeline(&mut raw, &broken).await, "1 E(22012) Z(I)");
        assert_eq!(pipeline(&mut raw, &insert).await, "2 n C(INSERT 0 1) Z(I)");
        let count = [bind("", "sel", &[], &[], &[]), execute("", 0)];
        assert_eq!(pipeline(&mut raw, &count).await, format!("2 D({}) C(SELECT 1) Z(I)", 2 * number + 2));
        let update = [describe(b'S', "upd"), bind("", "upd", &[], &[Some(b"all")], &[]), execute("", 0)];
        assert!(pipeline(&mut raw, &update).await.starts_with("t T(id,v,at) 2 D("), "the client's own columns");
        rows.extend([id, id + 1]);
        let mut held: Vec<String> = rows.iter().map(|id| format!("({id},all,\"2020-01-01 00:00:00+00\")")).collect();
        held.sort_unstable();
        let held: Vec<&str> = held.iter().map(String::as_str).collect();
        if phase != "old" {
            story.exact(&[("t", &held)]).await;
        }
    }
}
