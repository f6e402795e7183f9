//! A server, or what stands before it, that sends what is no message of the protocol. In front of the real server a relay spoils its replies.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::common::pair::CONTROL;
use super::common::{Databases, ProxyConfig, raw};
use super::{DATABASE, SCHEMA, Stage};

/// What the relay sends instead of a reply, or in front of it; and whether it closes then.
const SPOILED: [(&[u8], bool); 8] = [
    (b"\xff\xff\xff\xff\xff\xff\xff\xff", false),
    (b"D\x00\x00\x00\x03", false),
    (b"D\x7f\xff\xff\xff", false),
    (b"Z\x00\x00\x00\x05", true),
    (b"T\x00\x00\x00\x06\x00\x05", false),
    (b"S\x3f\xff\xff\xff", false),
    (b"v\x00\x00\x00\x04", false),
    (b"", true),
];

/// A relay to a server; the next reply of a session of the application is spoiled when `armed` is not 0.
async fn relay(server: u16, armed: Arc<AtomicUsize>) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("binds");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        loop {
            let Ok((client, _)) = listener.accept().await else { continue };
            tokio::spawn(carry(client, server, armed.clone()));
        }
    });
    port
}

async fn carry(client: TcpStream, server: u16, armed: Arc<AtomicUsize>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let there = async move { drop(tokio::io::copy(&mut from_client, &mut to_server).await) };
    let back = async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
            let spoil = armed.swap(0, Ordering::SeqCst);
            if spoil > 0 {
                let (bytes, close) = SPOILED[spoil - 1];
                drop(to_client.write_all(bytes).await);
                if close {
                    return;
                }
            }
            if to_client.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = there => {}
        () = back => {}
    }
}

#[tokio::test]
async fn replies_that_are_no_messages_end_a_session_and_nothing_else() {
    for side in ["old", "new"] {
        let databases = Databases::start_trusting().await;
        databases.run_on_both(SCHEMA).await;
        let armed = Arc::new(AtomicUsize::new(0));
        let server = if side == "old" { databases.old.port() } else { databases.new.port() };
        let url = format!(
            "postgres://{}:{}@127.0.0.1:{}/{DATABASE}",
            CONTROL.0,
            CONTROL.1,
            relay(server, armed.clone()).await
        );
        let config = databases.proxy_config("old", "auth: trust\nmirror: { timeout: 500ms }");
        let config =
            if side == "old" { ProxyConfig { old: url, ..config } } else { ProxyConfig { new: url, ..config } };
        let mut stage = Stage::over(databases, config, "dual-write").await;
        for spoil in 1..=SPOILED.len() {
            let mut client = stage.client().await;
            client.send(&raw::query("BEGIN")).await;
            client.until_ready(1).await;
            armed.store(spoil, Ordering::SeqCst);
            client.send(&raw::query(&format!("INSERT INTO notes VALUES ({spoil}, 'x')"))).await;
            client.send(&raw::query("COMMIT")).await;
            // On old's side the session may end at once; on new's the client hears of nothing.
            let frames = client.until_ready(2).await;
            let failed = frames.iter().any(|frame| matches!(frame.tag, b'E' | b'.'));
            assert!(side == "old" || !failed, "{side} {spoil}: {frames:?}");
            armed.store(0, Ordering::SeqCst);
            drop(client);
            stage.others_go_on().await;
        }
        stage.end().await;
    }
}
