//! Connections that never speak, or one byte at a time.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::common::{raw, until};
use super::{Stage, login};

async fn connect(port: u16) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port)).await.expect("connects")
}

async fn is_closed(stream: &mut TcpStream) -> bool {
    let read = tokio::time::timeout(Duration::from_millis(1), stream.read(&mut [0])).await;
    matches!(read, Ok(Ok(0) | Err(_)))
}

#[tokio::test]
async fn a_thousand_connections_that_never_speak_keep_nobody_out() {
    let mut stage = Stage::start("dual-write", "limits: { login: 5s, logins: 100 }").await;
    let before = stage.proxy.peak_memory_bytes();
    let mut silent = Vec::new();
    for number in 0..1_000 {
        let mut stream = connect(stage.proxy.port()).await;
        if number % 2 == 0 {
            // The beginning of a startup packet, and nothing more.
            stream.write_all(&login()[..5]).await.expect("sends");
        }
        silent.push(stream);
        if number % 100 == 99 {
            stage.others_go_on().await;
        }
    }
    let grown = stage.proxy.peak_memory_bytes() - before;
    assert!(grown < 32 << 20, "a thousand silent connections took {grown} bytes");
    until("all but the newest are closed at once, those by the time limit", async || {
        let mut closed = 0;
        for stream in &mut silent {
            closed += usize::from(is_closed(stream).await);
        }
        closed == silent.len()
    })
    .await;
    stage.end().await;
}

#[tokio::test]
async fn a_startup_packet_byte_by_byte_has_its_time() {
    let stage = Stage::start("old", "limits: { login: 2s }").await;
    // In time.
    let (mut slow, _) = raw::RawClient::connect(stage.proxy.port(), Some(1), &login()).await;
    slow.send(&raw::query("SELECT 1")).await;
    assert_eq!(slow.until_ready(1).await.last().expect("frames").tag, b'Z');
    // Never.
    let mut stream = connect(stage.proxy.port()).await;
    let began = std::time::Instant::now();
    for byte in raw::startup(raw::V3_0, &[("user", &"x".repeat(200))]) {
        if stream.write_all(&[byte]).await.is_err() || is_closed(&mut stream).await {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(is_closed(&mut stream).await, "still open after {:?}", began.elapsed());
    assert!(began.elapsed() >= Duration::from_secs(1), "closed after {:?}", began.elapsed());
    stage.end().await;
}
