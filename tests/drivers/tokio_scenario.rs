//! tokio-postgres: what an application does with it.

use std::fmt::{Debug, Write};
use std::time::{Duration, SystemTime};

use futures_util::{SinkExt, StreamExt, TryStreamExt, future, pin_mut};
use tokio::sync::mpsc;
use tokio_postgres::binary_copy::{BinaryCopyInWriter, BinaryCopyOutStream};
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, Error, IsolationLevel, NoTls, SimpleQueryMessage};

use crate::common::until;

/// What was said, without anything that differs from run to run.
struct Transcript(String);

impl Transcript {
    fn say(&mut self, label: &str, value: impl Debug) {
        writeln!(self.0, "{label}: {value:?}").expect("a String takes all");
    }

    fn attempt<T: Debug>(&mut self, label: &str, outcome: Result<T, Error>) {
        match outcome {
            Ok(value) => self.say(label, value),
            Err(error) => match error.as_db_error() {
                Some(db) => {
                    self.say(label, (db.severity(), db.code().code(), db.message(), db.detail(), db.constraint()))
                }
                None => self.say(label, error.to_string()),
            },
        }
    }
}

/// Goes through all of it at a URL.
pub async fn transcript(url: &str) -> String {
    let mut transcript = Transcript(String::new());
    let (mut client, mut messages) = connect(url).await;
    pipelined(&client, &mut transcript).await;
    simple(&client, &mut transcript).await;
    transactions(&mut client, &mut transcript).await;
    portals(&mut client, &mut transcript).await;
    copy(&client, &mut transcript).await;
    typed(&client, &mut transcript).await;
    told(&client, &mut messages, &mut transcript, url).await;
    cancelled(&client, &mut transcript, url).await;
    let rows =
        client.query("SELECT b, count(*) FROM places GROUP BY b ORDER BY b COLLATE \"C\"", &[]).await.expect("reads");
    transcript
        .say("at the end", rows.iter().map(|row| (row.get::<_, String>(0), row.get::<_, i64>(1))).collect::<Vec<_>>());
    transcript.0
}

/// A connection, and the notices and notifications that come on it.
async fn connect(url: &str) -> (Client, mpsc::UnboundedReceiver<AsyncMessage>) {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await.expect("connects");
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut stream = futures_util::stream::poll_fn(move |context| connection.poll_message(context));
        while let Some(Ok(message)) = stream.next().await {
            // The scenario may have ended, and with it the one who listens.
            let _ = sender.send(message);
        }
    });
    (client, receiver)
}

async fn pipelined(client: &Client, transcript: &mut Transcript) {
    let insert = client.prepare("INSERT INTO places VALUES ($1, 'pipelined', $2) RETURNING a").await.expect("prepares");
    let numbers: Vec<i32> = (0..100).collect();
    let texts: Vec<String> = numbers.iter().map(|number| format!("v{number}")).collect();
    let parameters: Vec<[&(dyn tokio_postgres::types::ToSql + Sync); 2]> =
        numbers.iter().zip(&texts).map(|(number, text)| [number as _, text as _]).collect();
    // All are sent before the first is answered.
    let answers = future::join_all(parameters.iter().map(|parameters| client.query_one(&insert, parameters))).await;
    let answers: Result<Vec<i32>, Error> = answers.into_iter().map(|row| row.map(|row| row.get(0))).collect();
    transcript.attempt("pipelined", answers);
    let (one, two, three) = future::join3(
        client.execute("UPDATE places SET v = 'first' WHERE a = 1", &[]),
        client.execute("UPDATE places SET v = 1 / (a - 1) WHERE a = 1", &[]),
        client.execute("UPDATE places SET v = v || ' third' WHERE a = 1", &[]),
    )
    .await;
    transcript.attempt("one", one);
    transcript.attempt("two", two);
    transcript.attempt("three", three);
    let row = client.query_one("SELECT v FROM places WHERE a = 1", &[]).await.expect("reads");
    transcript.say("each by itself", row.get::<_, String>(0));
}

fn shown(messages: Vec<SimpleQueryMessage>) -> Vec<String> {
    let show = |message| match message {
        SimpleQueryMessage::Row(row) => format!("{:?}", (0..row.len()).map(|at| row.get(at)).collect::<Vec<_>>()),
        SimpleQueryMessage::CommandComplete(rows) => format!("{rows} rows"),
        SimpleQueryMessage::RowDescription(columns) => {
            format!("columns {:?}", columns.iter().map(|column| column.name().to_owned()).collect::<Vec<_>>())
        }
        other => format!("{other:?}"),
    };
    messages.into_iter().map(show).collect()
}

async fn simple(client: &Client, transcript: &mut Transcript) {
    for sql in [
        "INSERT INTO places VALUES (200, 'simple', 'a'), (201, 'simple', 'b'); SELECT * FROM places WHERE b = 'simple' ORDER BY a; \
         UPDATE places SET v = v || a WHERE b = 'simple' RETURNING v, a; DELETE FROM places WHERE a = 201 RETURNING *",
        "INSERT INTO places VALUES (202, 'simple', 'lost'); SELECT 1/0; SELECT 1",
        "SELECT 1; BEGIN; INSERT INTO places VALUES (203, 'simple', 'kept'); COMMIT; INSERT INTO places VALUES (204, 'simple', 'lost'); SELECT nosuch()",
        "SELECT count(*) FROM places WHERE b = 'simple'",
        "",
    ] {
        transcript.attempt(sql, client.simple_query(sql).await.map(shown));
    }
}

async fn transactions(client: &mut Client, transcript: &mut Transcript) {
    let mut outer = client.transaction().await.expect("begins");
    outer.execute("INSERT INTO places VALUES (300, 'tx', 'outer')", &[]).await.expect("writes");
    let inner = outer.savepoint("sp").await.expect("a savepoint");
    inner.execute("UPDATE places SET v = 'inner' WHERE a = 300 AND b = 'tx'", &[]).await.expect("writes");
    transcript
        .attempt("a key that is there", inner.execute("INSERT INTO places VALUES (300, 'tx', 'twice')", &[]).await);
    transcript.attempt("in a failed block", inner.execute("SELECT 1", &[]).await);
    inner.rollback().await.expect("back");
    let inner = outer.transaction().await.expect("a savepoint");
    inner.execute("INSERT INTO places VALUES (301, 'tx', 'released')", &[]).await.expect("writes");
    inner.commit().await.expect("released");
    outer.commit().await.expect("commits");
    let dropped = client.transaction().await.expect("begins");
    dropped.execute("DELETE FROM places", &[]).await.expect("writes");
    drop(dropped);
    let serializable =
        client.build_transaction().isolation_level(IsolationLevel::Serializable).start().await.expect("begins");
    let rows =
        serializable.query("UPDATE places SET v = v || '?' WHERE b = 'tx' RETURNING a, v", &[]).await.expect("writes");
    let mut rows: Vec<(i32, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    rows.sort();
    transcript.say("serializable", rows);
    serializable.commit().await.expect("commits");
    let read_only = client.build_transaction().read_only(true).start().await.expect("begins");
    transcript.attempt("read only", read_only.execute("DELETE FROM places", &[]).await);
    read_only.rollback().await.expect("back");
    let deferred = client.transaction().await.expect("begins");
    deferred.execute("INSERT INTO children VALUES (1, 99)", &[]).await.expect("writes");
    transcript.attempt("deferred to COMMIT", deferred.commit().await);
}

async fn portals(client: &mut Client, transcript: &mut Transcript) {
    let tx = client.transaction().await.expect("begins");
    let portal = tx.bind("SELECT a FROM places WHERE b = $1 ORDER BY a", &[&"pipelined"]).await.expect("binds");
    let other = tx.bind("SELECT generate_series(1, 7)", &[]).await.expect("binds");
    for rows_max in [3, 40, 1, 0] {
        let rows = tx.query_portal(&portal, rows_max).await.expect("fetches");
        let others = tx.query_portal(&other, 2).await.expect("fetches");
        transcript.say("portal", (rows.len(), rows.first().map(|row| row.get::<_, i32>(0)), others.len()));
    }
    // A write in parts: RETURNING through a portal with a limit.
    let portal = tx
        .bind("UPDATE places SET v = 'portal' WHERE b = 'pipelined' AND a < 10 RETURNING a", &[])
        .await
        .expect("binds");
    for rows_max in [4, 4, 0] {
        let rows = tx.query_portal(&portal, rows_max).await.expect("fetches");
        transcript.say("a write in parts", rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>());
    }
    tx.commit().await.expect("commits");
}

async fn copy(client: &Client, transcript: &mut Transcript) {
    let sink = client.copy_in("COPY places FROM STDIN BINARY").await.expect("starts");
    let writer = BinaryCopyInWriter::new(sink, &[Type::INT4, Type::TEXT, Type::TEXT]);
    pin_mut!(writer);
    for number in 0..1_000_i32 {
        let value = (number % 3 != 0).then(|| "x".repeat(number as usize));
        writer.as_mut().write(&[&number, &"binary", &value]).await.expect("writes");
    }
    transcript.attempt("binary copy in", writer.finish().await);
    let stream = client
        .copy_out("COPY (SELECT a, v FROM places WHERE b = 'binary' ORDER BY a) TO STDOUT BINARY")
        .await
        .expect("starts");
    let rows: Vec<_> = BinaryCopyOutStream::new(stream, &[Type::INT4, Type::TEXT]).try_collect().await.expect("reads");
    let length: usize = rows.iter().filter_map(|row| row.get::<Option<String>>(1)).map(|value| value.len()).sum();
    transcript.say("binary copy out", (rows.len(), length));

    let sink = client.copy_in("COPY places FROM STDIN").await.expect("starts");
    pin_mut!(sink);
    sink.send(bytes::Bytes::from_static(b"0\tbinary\ttwice\n")).await.expect("sends");
    transcript.attempt("a key that is there", sink.finish().await);
    let sink = client.copy_in::<_, bytes::Bytes>("COPY places FROM STDIN").await.expect("starts");
    drop(sink);
    {
        let stream = client.copy_out("COPY (SELECT generate_series(1, 100000)) TO STDOUT").await.expect("starts");
        pin_mut!(stream);
        transcript.say("copy out, not read to its end", stream.next().await.is_some_and(|data| data.is_ok()));
    }
    let sink = client.copy_in("COPY events (what) FROM STDIN CSV").await.expect("starts");
    pin_mut!(sink);
    sink.send(bytes::Bytes::from_static(b"one\n\"two, three\"\n")).await.expect("sends");
    transcript.attempt("copy in", sink.finish().await);
}

async fn typed(client: &Client, transcript: &mut Transcript) {
    let stamp = SystemTime::UNIX_EPOCH + Duration::from_micros(1_767_225_600_000_001);
    let bytes: Vec<u8> = (0..=255).collect();
    let tags = vec![Some("a"), None, Some("q\"")];
    let document = serde_json::json!({"k": [1, null, "ü"]});
    let row = client
        .query_one(
            "INSERT INTO things (name, flag, small, big, single, double, bytes, stamp, tags, doc) \
             VALUES ('typed', $1, $2, $3, $4, $5, $6, $7, $8, $9) RETURNING bytes, stamp, tags, doc, twice, single, double",
            &[&true, &i16::MIN, &(1_i64 << 60), &0.1_f32, &(1.0_f64 / 3.0), &bytes, &stamp, &tags, &document],
        )
        .await
        .expect("writes");
    transcript.say("bytes", row.get::<_, Vec<u8>>(0) == bytes);
    transcript.say("stamp", row.get::<_, SystemTime>(1) == stamp);
    transcript.say("tags", row.get::<_, Vec<Option<String>>>(2));
    transcript.say("document", row.get::<_, serde_json::Value>(3));
    transcript.say("numbers", (row.get::<_, i64>(4), row.get::<_, f32>(5), row.get::<_, f64>(6)));
    // The driver asks pg_type about types that it does not know.
    let statement = client.prepare("SELECT state, couple, seen FROM things WHERE state = $1").await.expect("prepares");
    transcript
        .say("types", statement.columns().iter().map(|column| column.type_().name().to_owned()).collect::<Vec<_>>());
    let upsert = "INSERT INTO places VALUES ($1, 'upsert', $2) ON CONFLICT (a, b) DO UPDATE SET v = excluded.v || places.v RETURNING v, xmax = 0";
    for value in ["x", "y"] {
        let row = client.query_one(upsert, &[&1, &value]).await.expect("writes");
        transcript.say("upsert", (row.get::<_, String>(0), row.get::<_, bool>(1)));
    }
    let rows = client
        .query_raw("SELECT n, repeat('x', 1000) FROM generate_series(1, 5000) AS n", Vec::<i32>::new())
        .await
        .expect("reads");
    let count = rows.try_fold(0, async |count, _| Ok(count + 1)).await;
    transcript.attempt("streamed", count);
}

async fn told(
    client: &Client,
    messages: &mut mpsc::UnboundedReceiver<AsyncMessage>,
    transcript: &mut Transcript,
    url: &str,
) {
    let (other, _) = connect(url).await;
    let pid =
        async |client: &Client| client.query_one("SELECT pg_backend_pid()", &[]).await.expect("reads").get::<_, i32>(0);
    let pids = [(pid(client).await, "mine"), (pid(&other).await, "theirs")];
    client
        .batch_execute("LISTEN channel; DO $$ BEGIN RAISE NOTICE 'told'; END $$; NOTIFY channel, 'a'")
        .await
        .expect("runs");
    client.batch_execute("BEGIN; NOTIFY channel, 'b'; COMMIT").await.expect("runs");
    other.batch_execute("NOTIFY channel, 'c'").await.expect("runs");
    for _ in 0..4 {
        let message =
            tokio::time::timeout(Duration::from_secs(20), messages.recv()).await.expect("a message within 20 s");
        match message.expect("connected") {
            AsyncMessage::Notice(notice) => transcript.say("notice", (notice.severity(), notice.message())),
            AsyncMessage::Notification(notification) => {
                let whose = pids.iter().find(|(pid, _)| *pid == notification.process_id()).map(|(_, whose)| whose);
                transcript.say("notification", (whose, notification.channel(), notification.payload()));
            }
            _ => unreachable!("there are no others"),
        }
    }
}

async fn cancelled(client: &Client, transcript: &mut Transcript, url: &str) {
    let (other, _) = connect(url).await;
    let token = client.cancel_token();
    let cancel = async {
        until("it sleeps", async || {
            let sql = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND usename = user";
            !other.query(sql, &[]).await.expect("reads").is_empty()
        })
        .await;
        token.cancel_query(NoTls).await.expect("sends");
    };
    let sleep = client.execute("UPDATE places SET v = pg_sleep(60)::text WHERE a = 300 AND b = 'tx'", &[]);
    let (outcome, ()) = future::join(sleep, cancel).await;
    transcript.attempt("cancelled", outcome);
    transcript.say(
        "usable",
        client
            .query_one("SELECT v FROM places WHERE a = 300 AND b = 'tx'", &[])
            .await
            .expect("reads")
            .get::<_, String>(0),
    );
}
