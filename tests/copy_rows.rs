//! COPY FROM STDIN in `dual-write` where the data does not show which rows it adds: no key, a key by default, rows that triggers change, WHERE.
//! They are captured by the id under which the COPY has written them, and by nothing else.

mod common;

use common::copy::{copy, images, on_new};
use common::pair::{DATABASE, TRUST};
use common::raw::{self, tags};
use common::{Pair, until};
use futures_util::SinkExt;
use tokio_postgres::Client;

const SCHEMA: &str = "
    CREATE TABLE items (id bigint PRIMARY KEY, name text);
    CREATE TABLE history (what text, at timestamptz DEFAULT clock_timestamp());
    CREATE TABLE serials (id serial PRIMARY KEY, what text);
    CREATE TABLE idents (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text,
        twice text GENERATED ALWAYS AS (what || what) STORED, at timestamptz DEFAULT clock_timestamp());
    CREATE TABLE uuids (id uuid DEFAULT gen_random_uuid() PRIMARY KEY, n int);
    CREATE TABLE rounded (at timestamp(0) PRIMARY KEY, what text);
    CREATE TABLE parts (id int, what text DEFAULT 'part ' || random()) PARTITION BY RANGE (id);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
    CREATE TABLE parts_2 (what text, id int);
    ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES FROM (10) TO (20);
    CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
    CREATE TABLE noted (id serial PRIMARY KEY, what text);
    CREATE TABLE shifted (id int PRIMARY KEY, what text);
    CREATE TABLE again (what text);
    CREATE TABLE tree (id int PRIMARY KEY, parent int REFERENCES tree);
    CREATE TABLE wide (what text, pad char(4000));
    ALTER TABLE wide ALTER COLUMN pad SET STORAGE PLAIN;
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN IF NEW.what = 'never' THEN RETURN NULL; END IF; NEW.what := NEW.what || '!'; INSERT INTO log (what) VALUES (NEW.what); RETURN NEW; END $$;
    CREATE TRIGGER note BEFORE INSERT ON noted FOR EACH ROW EXECUTE FUNCTION note();
    CREATE FUNCTION shift() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.id := NEW.id + 1000; RETURN NEW; END $$;
    CREATE TRIGGER shift BEFORE INSERT ON shifted FOR EACH ROW EXECUTE FUNCTION shift();
    CREATE FUNCTION more() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN IF NEW.what NOT LIKE 'more%' THEN INSERT INTO again VALUES ('more ' || NEW.what); END IF; RETURN NEW; END $$;
    CREATE TRIGGER more BEFORE INSERT ON again FOR EACH ROW EXECUTE FUNCTION more();
    CREATE FUNCTION above(n bigint) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN INSERT INTO log (what) VALUES ('above'); RETURN n > 1; END $$;";
const TABLES: [&str; 13] = [
    "items", "history", "serials", "idents", "uuids", "rounded", "parts", "log", "noted", "shifted", "again", "tree",
    "wide",
];
const NONE: [&str; 0] = [];

async fn start() -> Pair {
    Pair::dual_write(SCHEMA, TRUST).await
}

/// One COPY in a transaction of its own, and the tables that it tainted.
async fn tainted_by(pair: &Pair, client: &Client, sql: &str, data: &[u8]) -> Vec<&'static str> {
    pair.tainted_by(&TABLES, async || {
        copy(client, sql, &[data]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    })
    .await
}

/// COPY inside a block.
async fn copy_within(client: &Client, sql: &str, data: &'static [u8]) {
    let mut sink = Box::pin(client.copy_in(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")));
    sink.send(bytes::Bytes::from_static(data)).await.expect("sends");
    sink.as_mut().finish().await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// One word of an answer of old.
async fn on_old(pair: &Pair, sql: &str) -> String {
    pair.databases.old.run(DATABASE, sql).await.expect("reads").trim().to_owned()
}

#[tokio::test]
async fn rows_that_the_data_does_not_show_are_captured() {
    let pair = start().await;
    let client = pair.client().await;
    // HEADER MATCH came with 15.
    let header = if pair.databases.old.version() < 15 { "HEADER" } else { "HEADER MATCH" };
    let header = format!("COPY history (what) FROM STDIN (FORMAT csv, {header})");
    let statements: [(&str, &[u8]); 18] = [
        ("COPY history (what) FROM STDIN", b"a\nb\n"),
        (&header, b"what\n\"c,\"\n"),
        ("COPY history (what) FROM STDIN (FORMAT csv, FORCE_NULL (what), NULL 'x')", b"\"x\"\n"),
        ("COPY history (what) FROM STDIN (ENCODING 'latin1')", b"\xfc\n"),
        ("COPY history (what) FROM STDIN WHERE what <> 'left out'", b"kept\nleft out\n"),
        ("COPY BINARY history (what) FROM STDIN", b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x02hi\xff\xff"),
        ("COPY serials (what) FROM STDIN", b"a default as key\nand another\n"),
        ("COPY idents (what) FROM STDIN", b"x\ny\n"),
        ("COPY uuids (n) FROM STDIN", b"1\n2\n3\n"),
        ("COPY rounded FROM STDIN", b"2024-01-01 00:00:00.4\tis stored otherwise\n2024-01-02\tis not\n"),
        ("COPY items (id) FROM STDIN WHERE id > 1", b"1\n2\n"),
        ("COPY items FROM STDIN (FORMAT csv, FORCE_NOT_NULL (name))", b"3,\n4,x\n"),
        ("COPY parts (id) FROM STDIN", b"1\n11\n12\n"),
        ("COPY parts_1 (id) FROM STDIN", b"2\n"),
        ("COPY parts_2 FROM STDIN", b"the other order\t13\n"),
        ("COPY tree FROM STDIN", b"1\t\\N\n2\t1\n3\t1\n"),
        ("COPY shifted FROM STDIN", b"1\tis stored as 1001\n"),
        // Its key is there, in another row than the one that it adds.
        ("COPY shifted FROM STDIN", b"1001\tis stored as 2001\n"),
    ];
    for (sql, data) in statements {
        assert_eq!(tainted_by(&pair, &client, sql, data).await, NONE, "{sql}");
    }
    let counts =
        [("history", 7), ("serials", 2), ("idents", 2), ("uuids", 3), ("rounded", 2), ("items", 3), ("parts", 5)];
    for (table, count) in counts.into_iter().chain([("tree", 3), ("shifted", 2)]) {
        assert_eq!(on_new(&pair, table).await, count, "{table}");
        assert!(images(&pair, table).await >= count as f64, "{table}");
    }
    // What is found twice, by key and then by its transaction, is found twice: one of two in `rounded`.
    assert_eq!((images(&pair, "history").await, images(&pair, "serials").await), (7.0, 2.0));
    pair.settle_and_assert_equal().await;
    assert_eq!(pair.taints(&TABLES).await, [0.0; 13]);
}

/// What triggers and functions write beside it is seen by the audit, by name. What the trigger has made of the rows is captured.
#[tokio::test]
async fn triggers_taint_what_they_write_and_no_more() {
    let pair = start().await;
    let client = pair.client().await;
    assert_eq!(tainted_by(&pair, &client, "COPY noted (what) FROM STDIN", b"a\nnever\nb\n").await, ["log"]);
    assert_eq!((on_new(&pair, "noted").await, images(&pair, "noted").await), (2, 2.0));
    let found = tainted_by(&pair, &client, "COPY items (id) FROM STDIN WHERE above(id)", b"1\n2\n").await;
    assert_eq!((found, images(&pair, "items").await), (vec!["log"], 1.0));
    // Rows of one id, and the COPY's are not to be told from the trigger's.
    assert_eq!(tainted_by(&pair, &client, "COPY again FROM STDIN", b"a\nb\n").await, ["again"]);
    assert_eq!(images(&pair, "again").await, 0.0);
    let output = pair.proxy.crossfade(&["repair", "--table", "public.again"]).await;
    assert!(output.status.success(), "{output:?}");
    pair.settle_and_assert_equal().await;
}

/// Rows of the same transaction that the COPY has not added are not taken for its own: before it, behind it, in savepoints, in another COPY.
#[tokio::test]
async fn other_rows_of_the_transaction_are_not_captured_again() {
    let pair = start().await;
    let client = pair.client().await;
    let sql = "COPY history (what) FROM STDIN";
    let found = pair
        .tainted_by(&TABLES, async || {
            run(&client, "BEGIN; INSERT INTO history VALUES ('insert 1'), ('insert 2')").await;
            copy_within(&client, sql, b"copy 1\ncopy 2\n").await;
            run(&client, "SAVEPOINT a; INSERT INTO history VALUES ('insert 3')").await;
            copy_within(&client, sql, b"copy 3\n").await;
            run(&client, "SAVEPOINT b").await;
            copy_within(&client, sql, b"gone 1\ngone 2\n").await;
            run(&client, "ROLLBACK TO b").await;
            copy_within(&client, sql, b"copy 4\n").await;
            run(&client, "RELEASE a").await;
            copy_within(&client, sql, b"").await;
            copy_within(&client, "COPY serials (what) FROM STDIN", b"s\n").await;
            run(&client, "INSERT INTO history VALUES ('insert 4'); UPDATE serials SET what = 't'; COMMIT").await;
            run(&client, "BEGIN").await;
            copy_within(&client, sql, b"gone 3\n").await;
            run(&client, "ROLLBACK").await;
        })
        .await;
    assert_eq!(found, NONE);
    assert_eq!((on_new(&pair, "history").await, images(&pair, "history").await), (8, 8.0));
    pair.settle_and_assert_equal().await;
}

/// COPY fills free space anywhere in a table: its rows may stand hundreds of blocks before the end, where the walk begins.
#[tokio::test]
async fn rows_in_free_space_far_from_the_end_are_found() {
    let pair = start().await;
    let fill = "INSERT INTO wide SELECT 'w' || n, '' FROM generate_series(1, 1200) AS n; DELETE FROM wide WHERE ctid < '(3,0)'";
    let sides = [&pair.databases.old, &pair.databases.new];
    for side in sides {
        for sql in fill.split("; ") {
            side.run(DATABASE, sql).await.expect("fills");
        }
        // As long as a snapshot is older than the DELETE, nothing is freed.
        until("room is free", async || {
            side.run(DATABASE, "VACUUM wide").await.expect("vacuums");
            let dead = "SELECT pg_stat_get_dead_tuples('wide'::regclass)";
            side.run(DATABASE, dead).await.expect("reads").trim() == "0"
        })
        .await;
    }
    let client = pair.client().await;
    let found = pair
        .tainted_by(&TABLES, async || {
            run(&client, "BEGIN").await;
            copy_within(&client, "COPY wide FROM STDIN", b"a\t\nb\t\nc\t\nd\t\n").await;
            run(&client, "COMMIT").await;
        })
        .await;
    assert_eq!(found, NONE);
    let blocks = "SELECT count(*) FILTER (WHERE ctid < '(3,0)'), pg_relation_size('wide') / 8192 FROM wide WHERE what IN ('a', 'b', 'c', 'd')";
    let blocks = on_old(&pair, blocks).await;
    let (low, size) = blocks.split_once('|').expect("two columns");
    assert!(low.parse::<u32>().expect("a number") > 0 && size.parse::<u32>().expect("a number") > 400, "{blocks}");
    assert_eq!(images(&pair, "wide").await, 4.0);
    pair.settle_and_assert_equal().await;
}

/// COPY FREEZE wants the subtransaction in which its table was truncated: no savepoint is set, and other rows of that one cannot be told from its own.
#[tokio::test]
async fn copy_freeze_is_captured_behind_truncate() {
    let pair = start().await;
    let client = pair.client().await;
    let sql = "COPY history (what) FROM STDIN (FREEZE)";
    copy(&client, "COPY history (what) FROM STDIN", &[b"goes\n"]).await.expect("copies");
    let truncated = "TRUNCATE history";
    let found = pair
        .tainted_by(&TABLES, async || {
            run(&client, &format!("BEGIN; SAVEPOINT s; {truncated}")).await;
            copy_within(&client, sql, b"frozen 1\nfrozen 2\n").await;
            run(&client, "COMMIT").await;
        })
        .await;
    assert_eq!(found, NONE);
    assert_eq!((on_new(&pair, "history").await, images(&pair, "history").await), (2, 4.0));
    pair.settle_and_assert_equal().await;
    let found = pair
        .tainted_by(&TABLES, async || {
            run(&client, &format!("BEGIN; {truncated}; INSERT INTO history VALUES ('same id')")).await;
            copy_within(&client, sql, b"frozen 3\n").await;
            run(&client, "COMMIT").await;
        })
        .await;
    assert_eq!(found, ["history"]);
    let output = pair.proxy.crossfade(&["repair", "--table", "public.history"]).await;
    assert!(output.status.success(), "{output:?}");
    pair.settle_and_assert_equal().await;
}

/// Law 1: what the proxy cannot read never decides over the client's transaction.
#[tokio::test]
async fn a_failing_fetch_fails_nothing() {
    let pair = start().await;
    let client = pair.client().await;
    let blind = "REVOKE EXECUTE ON FUNCTION pg_lock_status() FROM PUBLIC";
    pair.databases.old.run(DATABASE, blind).await.expect("revokes");
    pair.renewed().await;
    let found = pair
        .tainted_by(&TABLES, async || {
            copy(&client, "COPY serials (what) FROM STDIN", &[b"alone\n"]).await.expect("copies");
            run(&client, "BEGIN; INSERT INTO items VALUES (1, 'before')").await;
            copy_within(&client, "COPY serials (what) FROM STDIN", b"in a block\n").await;
            run(&client, "INSERT INTO items VALUES (2, 'behind'); COMMIT").await;
        })
        .await;
    assert_eq!(found, ["serials"]);
    assert_eq!(pair.taints(&["serials"]).await, [2.0]);
    let sighted = "GRANT EXECUTE ON FUNCTION pg_lock_status() TO PUBLIC";
    pair.databases.old.run(DATABASE, sighted).await.expect("grants");
    pair.renewed().await;
    assert_eq!(tainted_by(&pair, &client, "COPY serials (what) FROM STDIN", b"seen\n").await, NONE);
    assert_eq!((on_new(&pair, "serials").await, on_new(&pair, "items").await), (3, 2));
    pair.settle_and_assert_equal().await;
}

/// A role that may add rows and not read them.
#[tokio::test]
async fn without_select_a_copy_runs_and_taints() {
    let pair = start().await;
    let role = "CREATE ROLE writer; GRANT writer TO app; GRANT INSERT ON items, serials TO writer; GRANT USAGE ON SEQUENCE serials_id_seq TO writer";
    for side in [&pair.databases.old, &pair.databases.new] {
        side.run(DATABASE, role).await.expect("makes the role");
    }
    let refused = "crossfade_opaque_writes_total{reason=\"privilege\"}";
    let client = pair.client().await;
    run(&client, "SET ROLE writer").await;
    common::until("the catalog knows", async || {
        copy(&client, "COPY serials (what) FROM STDIN", &[b"x\n"]).await.expect("copies");
        pair.proxy.metrics(refused).await > 0.0
    })
    .await;
    assert_eq!(tainted_by(&pair, &client, "COPY items FROM STDIN", b"1\ta\n").await, ["items"]);
    pair.settle_and_assert_equal().await;
}

/// Both protocols, with errors, CopyFail, and a client that vanishes: what the server says is passed on, and nothing stays behind.
#[tokio::test]
async fn the_replies_are_the_servers() {
    let pair = start().await;
    let sql = "COPY history (what) FROM STDIN";
    let extended =
        [raw::parse("", sql, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0), raw::sync()].concat();
    for (way, simple) in [(raw::query(sql), true), (extended, false)] {
        let begun = if simple { "G" } else { "12G" };
        let mut client = pair.raw().await;
        for (block, data, ending, expected) in [
            (false, &b"a\n"[..], raw::copy_done(), "CZ"),
            (true, b"b\n", raw::copy_done(), "CZ"),
            (false, b"too\tmany\n", raw::copy_done(), "EZ"),
            (true, b"", raw::copy_fail("changed my mind"), "EZ"),
        ] {
            client.send(&raw::query(if block { "BEGIN" } else { "SELECT 1" })).await;
            client.until_ready(1).await;
            client.send(&way).await;
            assert_eq!(tags(&client.until(b'G', 1).await), begun);
            let sync = if simple { Vec::new() } else { raw::sync() };
            client.send(&[raw::copy_data(data), ending, sync].concat()).await;
            assert_eq!(tags(&client.until_ready(1).await), expected, "simple={simple} block={block} {data:?}");
            client.send(&raw::query("COMMIT")).await;
            client.until_ready(1).await;
        }
        client.send(&way).await;
        client.until(b'G', 1).await;
        client.send(&raw::copy_data(b"vanishes\n")).await;
        drop(client);
    }
    common::until("no COPY is under way", async || {
        let busy = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY%' AND state <> 'idle'";
        on_old(&pair, busy).await == "0"
    })
    .await;
    assert_eq!(on_old(&pair, "SELECT string_agg(what, ',' ORDER BY what) FROM history").await, "a,a,b,b");
    assert_eq!(pair.taints(&TABLES).await, [0.0; 13]);
    assert_eq!((on_new(&pair, "history").await, images(&pair, "history").await), (4, 4.0));
    pair.settle_and_assert_equal().await;
}
