//! COPY FROM STDIN in `dual-write`: its rows are captured, whatever its format, without tainting the table.

mod common;

use std::process::Stdio;

use bytes::{BufMut, Bytes, BytesMut};
use common::Pair;
use common::copy::{copy, images, on_new};
use common::pair::TRUST;
use common::raw::{self, tags};
use futures_util::SinkExt;
use tokio::io::AsyncWriteExt;

const SCHEMA: &str = "
    CREATE TABLE items (id bigint PRIMARY KEY, name text, amount numeric(10,2), made timestamptz DEFAULT clock_timestamp());
    CREATE TABLE pairs (a text, b int, note text, PRIMARY KEY (b, a));
    CREATE TABLE history (what text);
    CREATE TABLE serials (id serial PRIMARY KEY, what text);
    CREATE TABLE rounded (at timestamp(0) PRIMARY KEY, what text);";
const TABLES: [&str; 5] = ["items", "pairs", "history", "serials", "rounded"];

async fn start(more: &str) -> Pair {
    Pair::dual_write(SCHEMA, more).await
}

/// The tables that were tainted so far.
async fn tainted(pair: &Pair) -> Vec<&'static str> {
    TABLES.iter().zip(pair.taints(&TABLES).await).filter(|(_, count)| *count > 0.0).map(|(table, _)| *table).collect()
}

#[tokio::test]
async fn every_format_is_captured() {
    let pair = start("").await;
    let mut client = pair.client().await;
    let text = b"1\tone\\ttab\t1.50\n2\t\\N\t\\N\n3\tback\\\\slash\\nline\t3\n";
    let n = copy(&client, "COPY items (id, name, amount) FROM STDIN", &[&text[..5], &text[5..11], &text[11..]]).await;
    assert_eq!(n.expect("copies"), 3);
    let csv = "id,name,amount\n4,\"a, \"\"b\"\"\nc\",4.25\n\"5\",,\n6,ü,6\n".as_bytes();
    let pieces: Vec<&[u8]> = csv.chunks(7).collect();
    let sql = "COPY items (id, name, amount) FROM STDIN (FORMAT csv, HEADER)";
    assert_eq!(copy(&client, sql, &pieces).await.expect("copies"), 3);
    let mut binary = BytesMut::from(&b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0"[..]);
    for id in 7..10i64 {
        binary.put_i16(2);
        binary.put_i32(8);
        binary.put_i64(id);
        binary.put_i32(-1);
    }
    binary.put_i16(-1);
    let pieces: Vec<&[u8]> = binary.chunks(5).collect();
    assert_eq!(copy(&client, "COPY items (id, name) FROM STDIN BINARY", &pieces).await.expect("copies"), 3);
    let pairs = b"x|1|n\ny\\x41|2|m\n";
    let sql = "COPY pairs FROM STDIN WITH (DELIMITER '|')";
    assert_eq!(copy(&client, sql, &[&pairs[..8], &pairs[8..]]).await.expect("copies"), 2);
    // Two COPYs, and other writes to the same rows, in one transaction and in order.
    let tx = client.transaction().await.expect("begins");
    let sink = tx.copy_in("COPY items (id, name) FROM STDIN").await.expect("begins");
    let mut sink: std::pin::Pin<Box<tokio_postgres::CopyInSink<Bytes>>> = Box::pin(sink);
    sink.send(Bytes::from_static(b"20\ta\n21\tb\n")).await.expect("sends");
    sink.as_mut().finish().await.expect("copies");
    tx.execute("UPDATE items SET name = 'updated' WHERE id = 20", &[]).await.expect("updates");
    tx.execute("DELETE FROM items WHERE id = 21", &[]).await.expect("deletes");
    let sink = tx.copy_in("COPY items (id, name) FROM STDIN").await.expect("begins");
    let mut sink: std::pin::Pin<Box<tokio_postgres::CopyInSink<Bytes>>> = Box::pin(sink);
    sink.send(Bytes::from_static(b"21\tagain\n22\tc\n")).await.expect("sends");
    sink.as_mut().finish().await.expect("copies");
    tx.commit().await.expect("commits");
    assert_eq!(tainted(&pair).await, [""; 0]);
    assert_eq!((on_new(&pair, "items").await, on_new(&pair, "pairs").await), (12, 2));
    assert_eq!((images(&pair, "items").await, images(&pair, "pairs").await), (15.0, 2.0));
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn what_is_rolled_back_or_fails_is_not_captured() {
    let pair = start("").await;
    let mut client = pair.client().await;
    for (sql, data, why) in [
        ("COPY items (id) FROM STDIN", &b"1\n2\nnonsense\n"[..], "invalid input syntax"),
        ("COPY items (id) FROM STDIN", b"3\n3\n", "duplicate key"),
        ("COPY nowhere FROM STDIN", b"3\n", "does not exist"),
    ] {
        // One client each: behind a COPY that failed this one takes PostgreSQL's own answers, too, for unexpected ones.
        let error = copy(&pair.client().await, sql, &[data]).await.expect_err("fails");
        assert!(error.as_db_error().is_some_and(|error| error.message().contains(why)), "{sql}: {error:?}");
    }
    assert_eq!(copy(&client, "COPY items (id) FROM STDIN", &[b"1\n"]).await.expect("goes on"), 1);
    let tx = client.transaction().await.expect("begins");
    tx.batch_execute("SAVEPOINT s").await.expect("sets");
    let sink = tx.copy_in("COPY items (id) FROM STDIN").await.expect("begins");
    let mut sink: std::pin::Pin<Box<tokio_postgres::CopyInSink<Bytes>>> = Box::pin(sink);
    sink.send(Bytes::from_static(b"5\n6\n")).await.expect("sends");
    sink.as_mut().finish().await.expect("copies");
    tx.batch_execute("ROLLBACK TO s").await.expect("rolls back");
    tx.execute("INSERT INTO items (id) VALUES (7)", &[]).await.expect("inserts");
    tx.commit().await.expect("commits");
    assert_eq!(tainted(&pair).await, [""; 0]);
    assert_eq!((on_new(&pair, "items").await, images(&pair, "items").await), (2, 2.0));
    pair.settle_and_assert_equal().await;
}

/// The extended protocol: behind an error nothing is answered up to the client's Sync, whatever of the data is still to come.
#[tokio::test]
async fn copy_by_execute() {
    let pair = start(TRUST).await;
    let mut client = pair.raw().await;
    // As drivers do it: the Sync behind Execute is passed over, since the server reads data by then.
    let copy = [
        raw::parse("", "COPY items (id) FROM STDIN", &[]),
        raw::bind("", "", &[], &[], &[]),
        raw::execute("", 0),
        raw::sync(),
    ]
    .concat();
    let mut cut = raw::copy_data(&b"4\n".repeat(20_000));
    let rest = cut.split_off(30_000);
    for (number, (data, end)) in [
        (raw::copy_data(b"nonsense\n"), [raw::copy_data(b"1\n"), raw::copy_done()].concat()),
        (raw::copy_data(b"nonsense\n"), raw::copy_fail("no more")),
        // The error comes in the midst of a CopyData.
        ([raw::copy_data(b"4\nnonsense\n"), cut].concat(), [rest, raw::copy_done()].concat()),
    ]
    .into_iter()
    .enumerate()
    {
        client.send(&copy).await;
        assert_eq!(tags(&client.until(b'G', 1).await), "12G");
        client.send(&data).await;
        assert_eq!(tags(&client.until(b'E', 1).await), "E");
        client.send(&[end, raw::sync(), raw::query("SELECT 1")].concat()).await;
        assert_eq!(tags(&client.until_ready(2).await), "ZTDCZ", "{number}");
    }
    for (block, data, expected) in [("BEGIN", "1\n2\n", "CZT"), ("SELECT 1", "3\n", "CZI")] {
        client.send(&raw::query(block)).await;
        client.until_ready(1).await;
        client.send(&copy).await;
        client.until(b'G', 1).await;
        client.send(&[raw::copy_data(data.as_bytes()), raw::copy_done(), raw::sync()].concat()).await;
        let frames = client.until_ready(1).await;
        let status = frames.last().map(|frame| char::from(frame.body[0])).expect("is ready");
        assert_eq!(format!("{}{status}", tags(&frames)), expected, "behind {block}");
        client.send(&raw::query("COMMIT")).await;
        client.until_ready(1).await;
    }
    assert_eq!(tainted(&pair).await, [""; 0]);
    assert_eq!((on_new(&pair, "items").await, images(&pair, "items").await), (3, 3.0));
    pair.settle_and_assert_equal().await;
}

/// The simple protocol: alone, in a block, and among others; a failure ends it where PostgreSQL does.
#[tokio::test]
async fn copy_in_queries() {
    let pair = start(TRUST).await;
    let mut client = pair.raw().await;
    client.send(&raw::query("COPY items (id) FROM STDIN")).await;
    assert_eq!(tags(&client.until(b'G', 1).await), "G");
    client
        .send(&[raw::copy_data(b"1\n2"), raw::copy_data(b"0\n"), raw::copy_done(), raw::query("SELECT 1")].concat())
        .await;
    assert_eq!(tags(&client.until_ready(2).await), "CZTDCZ");
    client.send(&raw::query("COPY items (id) FROM STDIN")).await;
    client.until(b'G', 1).await;
    client.send(&[raw::copy_data(b"3\n"), raw::copy_fail("changed my mind")].concat()).await;
    assert_eq!(tags(&client.until_ready(1).await), "EZ");
    client.send(&raw::query("COPY items (id) FROM STDIN")).await;
    client.until(b'G', 1).await;
    client.send(&raw::copy_data(b"nonsense\n4\n")).await;
    assert_eq!(tags(&client.until_ready(1).await), "EZ", "before the client's CopyDone");
    client.send(&[raw::copy_data(b"5\n"), raw::copy_done()].concat()).await;
    client.send(&raw::query("COPY items (id) FROM STDIN")).await;
    client.until(b'G', 1).await;
    let mut cut = raw::copy_data(&b"5\n".repeat(20_000));
    let rest = cut.split_off(30_000);
    client.send(&[raw::copy_data(b"5\nnonsense\n"), cut].concat()).await;
    assert_eq!(tags(&client.until(b'E', 1).await), "E", "in the midst of a CopyData");
    client.send(&[rest, raw::copy_done(), raw::query("BEGIN")].concat()).await;
    assert_eq!(tags(&client.until_ready(2).await), "ZCZ");
    client
        .send(&raw::query("COPY items (id) FROM STDIN; INSERT INTO items (id) VALUES (7); COPY items (id) FROM STDIN"))
        .await;
    client.until(b'G', 1).await;
    client.send(&[raw::copy_data(b"6\n"), raw::copy_done()].concat()).await;
    assert_eq!(tags(&client.until(b'G', 1).await), "CCG");
    client.send(&[raw::copy_data(b"8\n"), raw::copy_done(), raw::query("COMMIT")].concat()).await;
    assert_eq!(tags(&client.until_ready(2).await), "CZCZ");
    client.send(&raw::query("BEGIN")).await;
    client.until_ready(1).await;
    client.send(&raw::query("COPY items (id) FROM STDIN")).await;
    client.until(b'G', 1).await;
    client.send(&[raw::copy_data(b"nonsense\n"), raw::copy_done()].concat()).await;
    let frames = client.until_ready(1).await;
    assert_eq!((tags(&frames).as_str(), &frames[1].body[..]), ("EZ", &b"E"[..]));
    client.send(&raw::query("ROLLBACK")).await;
    assert_eq!(tags(&client.until_ready(1).await), "CZ");
    assert_eq!(tainted(&pair).await, [""; 0]);
    assert_eq!((on_new(&pair, "items").await, images(&pair, "items").await), (5, 5.0));
    pair.settle_and_assert_equal().await;
}

#[tokio::test]
async fn psql_copies_a_hundred_thousand_rows_in_bounded_memory() {
    let pair = start("").await;
    let client = pair.client().await;
    copy(&client, "COPY items (id) FROM STDIN", &[b"-1\n"]).await.expect("copies");
    let before = pair.proxy.peak_memory_bytes();
    let mut psql = tokio::process::Command::new(pair.databases.old.program("psql"))
        .args([
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            "\\copy items (id, name) from pstdin (format csv)",
            &pair.url(),
        ])
        .kill_on_drop(true)
        .stdin(Stdio::piped())
        .spawn()
        .expect("runs");
    let mut stdin = psql.stdin.take().expect("is piped");
    let body = "x".repeat(1000);
    let mut rows = String::new();
    for id in 0..100_000 {
        rows.push_str(&format!("{id},\"{body}\"\n"));
        if rows.len() > 1 << 20 {
            stdin.write_all(rows.as_bytes()).await.expect("writes");
            rows.clear();
        }
    }
    stdin.write_all(rows.as_bytes()).await.expect("writes");
    drop(stdin);
    assert!(psql.wait().await.expect("waits").success());
    let grown = (pair.proxy.peak_memory_bytes() - before) >> 20;
    eprintln!("the proxy has grown by {grown} MiB");
    assert!(grown < 80, "{grown} MiB for a stream of 100 MB");
    assert_eq!(tainted(&pair).await, [""; 0]);
    assert_eq!((on_new(&pair, "items").await, images(&pair, "items").await), (100_001, 100_001.0));
    pair.settle_and_assert_equal().await;
}
