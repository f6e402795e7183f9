//! `crossfade backfill --rebuild-indexes`: what is dropped, what stays, and that all of it is there again, whoever was killed in between.

mod backfill_support;
mod common;

use backfill_support::{Running, Stage};
use common::link::{Flow, Trip, Way};

const SCHEMA: &str = "CREATE TABLE t (k int PRIMARY KEY, v text, w int, x int UNIQUE, y int4range, EXCLUDE USING gist (y WITH &&)); \
    CREATE INDEX \"a Name\" ON t (lower(v), w DESC) WHERE w > 3; COMMENT ON INDEX \"a Name\" IS 'it''s \\ ours'; CREATE INDEX plain ON t USING hash (v); \
    CREATE UNIQUE INDEX once ON t (w, k); CREATE INDEX counted ON t ((w + 1)); ALTER INDEX counted ALTER COLUMN 1 SET STATISTICS 500; \
    CREATE INDEX clustered ON t (w); CLUSTER t USING clustered";
const ROWS: &str = "INSERT INTO t SELECT n, 'row ' || n, n, n, int4range(n, n + 1) FROM generate_series(1, 1000) n";
const COPY: &[u8] = b"COPY \"public\".\"t\"";
const INDEXES: &str = "SELECT string_agg(concat(pg_get_indexdef(indexrelid), ' ', indisvalid, ' ', obj_description(indexrelid, 'pg_class')), E'\\n' ORDER BY indexrelid::regclass::text) \
    FROM pg_index WHERE indrelid = 'public.t'::regclass";
const KEPT: &str = "SELECT coalesce(string_agg(name, ', ' ORDER BY name), '') FROM crossfade.indexes";

/// As the proxy's file says it.
async fn check(stage: &Stage) -> String {
    let output = stage.proxy.crossfade(&["check"]).await;
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The backfill is killed when it has dropped them; `check` names them; the next one, which nobody has asked for it, makes them again. A third one is killed while it
/// makes one, which leaves an invalid index.
#[tokio::test(flavor = "multi_thread")]
async fn indexes_that_were_dropped_come_back_whoever_is_killed() {
    let stage = Stage::new(SCHEMA, ROWS, 1).await;
    let before = stage.on_new(INDEXES).await;
    let copying = stage.mirror.trip(Way::ToServer, COPY, Trip::StallBefore);
    let first = stage.backfill(&["--rebuild-indexes"]);
    stage.let_begin(1).await;
    copying.await.expect("the indexes are dropped, and a chunk is read");
    first.kill();
    stage.mirror.set(Way::ToServer, Flow::Pass);
    assert_eq!(stage.on_new(KEPT).await, "public.\"a Name\", public.plain");
    let left = "SELECT string_agg(indexrelid::regclass::text, ', ' ORDER BY indexrelid::regclass::text) FROM pg_index WHERE indrelid = 'public.t'::regclass";
    assert_eq!(stage.on_new(left).await, "clustered, counted, once, t_pkey, t_x_key, t_y_excl");
    let said = check(&stage).await;
    for name in ["public.\"a Name\"", "public.plain"] {
        assert!(said.contains(&format!("a backfill has dropped index {name}")), "{said}");
    }
    assert!(said.contains("CREATE INDEX plain ON public.t USING hash (v);"), "{said}");
    // Somebody makes one, and is killed: it is there, and not valid.
    stage
        .on_new(
            "CREATE INDEX plain ON t (v); UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'plain'::regclass",
        )
        .await;
    let (status, said) = stage.backfill(&[]).end().await;
    assert!(status.success() && said.contains("making index public.plain"), "{said}");
    assert_eq!(stage.on_new(INDEXES).await, before);
    assert_eq!(stage.on_new(KEPT).await, "");
    assert!(!check(&stage).await.contains("has dropped index"));
    assert_eq!(stage.settle().await, 1000);
    killed_while_it_makes_one(&stage, &before).await;
}

/// Nothing is owed any more: a backfill that has nothing to fill drops nothing, and makes what is missing.
async fn killed_while_it_makes_one(stage: &Stage, before: &str) {
    let keep = "INSERT INTO crossfade.indexes (name, number, relation, definition, comment) SELECT 'public.\"a Name\"', 1, 'public.t', pg_get_indexdef(i), obj_description(i, 'pg_class') \
        FROM CAST('public.\"a Name\"'::regclass AS oid) AS i";
    stage.on_new(&format!("{keep}; DROP INDEX \"a Name\"")).await;
    // Its second transaction waits for this one, when the index is there and not valid.
    let holder = stage.databases.new.client(common::pair::DATABASE).await.expect("connects");
    holder.batch_execute("BEGIN; INSERT INTO t (k) VALUES (-1)").await.expect("holds the table");
    let making: Running = stage.backfill_straight();
    let invalid = "SELECT count(*) FROM pg_index WHERE indrelid = 'public.t'::regclass AND NOT indisvalid";
    common::until("the index is begun", async || stage.on_new(invalid).await == "1").await;
    making.kill();
    let at_work = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONCURRENTLY%' AND pid <> pg_backend_pid()";
    stage.on_new("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONCURRENTLY%' AND pid <> pg_backend_pid()").await;
    common::until("its session is gone", async || stage.on_new(at_work).await == "0").await;
    holder.batch_execute("ROLLBACK").await.expect("lets go");
    assert!(check(stage).await.contains("a backfill has dropped index public.\"a Name\""));
    let (status, said) = stage.backfill_straight().end().await;
    assert!(status.success() && said.contains("making index"), "{said}");
    assert_eq!(stage.on_new(INDEXES).await, before);
}
