//! Clients that do not read, or send more than anyone reads.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::common::{raw, until};
use super::{DATABASE, Stage};

#[tokio::test]
async fn a_huge_result_that_nobody_reads_takes_no_memory_and_can_be_cancelled() {
    for phase in ["old", "dual-write"] {
        let mut stage = Stage::start(phase, "").await;
        let mut client = stage.client().await;
        let (pid, key) = (client.pid, client.key.clone());
        client.send(&raw::query("SELECT n, repeat('x', 100) FROM generate_series(1, 10000000) AS n")).await;
        let control = stage.databases.old.client(DATABASE).await.expect("connects");
        until("the server waits for its reader", async || {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND wait_event = 'ClientWrite'";
            control.query_one(sql, &[]).await.expect("reads").get::<_, i64>(0) == 1
        })
        .await;
        stage.others_go_on().await;
        raw::cancel(stage.proxy.port(), pid, &key).await;
        // The server notices a cancel between two rows.
        let mut stream = client.into_stream();
        let (mut heard, mut last) = (0_usize, Vec::new());
        let mut buffer = vec![0; 64 * 1024];
        while !last.ends_with(b"Z\0\0\0\x05I") {
            let count = stream.read(&mut buffer).await.expect("reads");
            assert!(count > 0, "the session goes on");
            heard += count;
            last.extend_from_slice(&buffer[..count]);
            last.drain(..last.len().saturating_sub(4096));
        }
        let text = String::from_utf8_lossy(&last);
        assert!(text.contains("C57014"), "{heard} bytes, then {text}");
        stage.end().await;
    }
}

/// Requests without end from a client that reads nothing: it waits, as it would for PostgreSQL, and nobody else does.
#[tokio::test]
async fn endless_pipelines_that_nobody_reads_take_no_memory() {
    let write = [
        raw::parse("", "INSERT INTO notes VALUES (1, 'p') ON CONFLICT (id) DO UPDATE SET body = excluded.body", &[]),
        raw::bind("", "", &[], &[], &[]),
        raw::execute("", 0),
        raw::sync(),
    ]
    .concat();
    for phase in ["old", "dual-write"] {
        let mut stage = Stage::start(phase, "").await;
        let floods =
            [raw::sync(), write.clone(), raw::query("SELECT 1"), raw::parse("", "SELECT 1", &[]), raw::copy_done()];
        let mut clients = Vec::new();
        for flood in floods {
            let block: Vec<u8> = flood.iter().copied().cycle().take(flood.len() * (64 * 1024 / flood.len())).collect();
            let mut stream = stage.client().await.into_stream();
            let mut sent = 0;
            // 32 MB, or as much as anybody takes.
            while sent < 32 << 20 {
                let rest = &block[sent % block.len()..];
                match tokio::time::timeout(Duration::from_millis(500), stream.write(rest)).await {
                    Ok(Ok(count)) => sent += count,
                    Ok(Err(error)) => panic!("{phase}: {error} after {sent} bytes of {:?}", char::from(block[0])),
                    Err(_) => break,
                }
            }
            clients.push(stream);
        }
        stage.others_go_on().await;
        drop(clients);
        until("the sessions are over", async || stage.proxy.metrics("crossfade_clients").await == 1.0).await;
        stage.end().await;
    }
}

/// The same, and the client then reads: every answer is there.
#[tokio::test]
async fn a_long_pipeline_is_answered_whole() {
    for phase in ["old", "dual-write"] {
        let stage = Stage::start(phase, "limits: { client_buffer: 64kB }").await;
        let mut stream = stage.client().await.into_stream();
        let (count, sync) = (200_000, raw::sync());
        let parses = raw::parse("", "SELECT 1", &[]).repeat(100_000);
        let (mut from, mut to) = stream.split();
        let send = async {
            // Without Sync, more than the proxy lets be owed.
            to.write_all(&parses).await.expect("sends");
            to.write_all(&sync.repeat(count)).await.expect("sends");
        };
        let receive = async {
            let mut bytes = vec![0; 100_000 * 5 + count * 6];
            from.read_exact(&mut bytes).await.expect("every answer");
            bytes
        };
        let ((), bytes) = tokio::join!(send, receive);
        assert!(bytes.ends_with(b"Z\0\0\0\x05I"));
        stage.end().await;
    }
}
