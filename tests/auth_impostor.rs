//! Servers that are not what they claim to be, or do not answer: nothing logs in to them, and nothing hangs.

mod auth_support;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use auth_support::parse_database;
use bytes::Bytes;
use crossfade::auth::Credentials;
use crossfade::backend::connect::{ConnectError, connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// Says one line for each message that it hears, and then nothing. Its port, until it is dropped.
async fn impostor(lines: Vec<Vec<u8>>) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let lines = lines.clone();
            tokio::spawn(async move {
                let mut heard = [0_u8; 4096];
                for line in lines {
                    let n = tcp.read(&mut heard).await.unwrap_or(0);
                    if n == 0 {
                        return;
                    }
                    // SCRAM's nonce must begin with the client's, which stands behind `r=` in what was heard.
                    let nonce = heard[..n].windows(2).position(|two| two == b"r=").map(|at| heard[at + 2..n].to_vec());
                    let line = match (line.strip_prefix(b"CHALLENGE"), nonce) {
                        (Some(rest), Some(nonce)) => {
                            let text = [b"r=", &nonce[..], b"x,s=c2FsdA==,i=1", rest].concat();
                            let mut line = vec![b'R'];
                            line.extend((text.len() as u32 + 8).to_be_bytes());
                            line.extend(11_u32.to_be_bytes());
                            line.extend(text);
                            line
                        }
                        _ => line,
                    };
                    let _ = tcp.write_all(&line).await;
                }
                while tcp.read(&mut heard).await.is_ok_and(|n| n > 0) {}
            });
        }
    });
    port
}

async fn log_in(port: u16, query: &str, checked: bool) -> Result<(), ConnectError> {
    let database = parse_database(&format!("postgres://u@127.0.0.1:{port}/d?connect_timeout=1&{query}"));
    let parameters = [(Bytes::from_static(b"user"), Bytes::from_static(b"u"))];
    let credentials = Credentials { checked, ..Credentials::new("u", Some("secret")) };
    connect(&database, &credentials, &parameters, 2).await.map(|_| ())
}

const OK: &[u8] = b"R\0\0\0\x08\0\0\0\0";
const SASL: &[u8] = b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0";

fn signature(text: &str) -> Vec<u8> {
    let mut line = vec![b'R'];
    line.extend((text.len() as u32 + 8).to_be_bytes());
    line.extend(12_u32.to_be_bytes());
    line.extend(text.as_bytes());
    line
}

#[tokio::test]
async fn a_server_must_prove_that_it_knows_the_verifier() {
    let clear = "sslmode=disable";
    assert!(log_in(impostor(vec![OK.to_vec()]).await, clear, true).await.is_ok());
    for (what, lines, message) in [
        ("no proof", vec![SASL.to_vec(), b"CHALLENGE".to_vec(), OK.to_vec()], "without proving"),
        ("no challenge", vec![SASL.to_vec(), OK.to_vec()], "without proving"),
        ("wrong proof", vec![SASL.to_vec(), b"CHALLENGE".to_vec(), signature("v=AAAA")], "signature is wrong"),
        ("an error", vec![SASL.to_vec(), b"CHALLENGE".to_vec(), signature("e=other-error")], "other-error"),
        ("twice", vec![SASL.to_vec(), SASL.to_vec()], "make no sense"),
        ("another method", vec![b"R\0\0\0\x08\0\0\0\x07".to_vec()], "scram-sha-256"),
        ("another mechanism", vec![b"R\0\0\0\x0b\0\0\0\x0aX\0\0".to_vec()], "no SASL mechanism"),
        ("a version nobody asked for", vec![b"v\0\0\0\x0c\0\x03\0\x09\0\0\0\0".to_vec()], "3.0 or 3.2"),
        ("HTTP", vec![b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()], "impossible length"),
        ("another protocol", vec![b"Z\0\0\0\x05I".to_vec()], "does not speak"),
        ("a cut request", vec![b"R\0\0\0\x06\0\0".to_vec()], "malformed"),
        ("a long message", vec![b"E\x7f\0\0\0".to_vec()], "impossible length"),
    ] {
        let error = log_in(impostor(lines).await, clear, true).await.expect_err(what).to_string();
        assert!(error.contains(message), "{what}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
    let error = log_in(impostor(vec![OK.to_vec()]).await, clear, false).await.unwrap_err();
    assert!(matches!(&error, ConnectError::Auth { message, .. } if message.contains("without a password")), "{error}");
}

#[tokio::test]
async fn tls_is_not_given_up() {
    for answer in [&b"N"[..], b"Eoops", b"Sno TLS at all, but a text long enough to be read as a record"] {
        for mode in ["require", "verify-full"] {
            let port = impostor(vec![answer.to_vec(), OK.to_vec()]).await;
            let error = log_in(port, &format!("sslmode={mode}"), true).await.unwrap_err();
            assert!(matches!(error, ConnectError::Tls { .. }), "{error}");
            assert!(!error.to_string().contains("oops"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_given_up() {
    let start = Instant::now();
    for lines in [vec![], vec![SASL.to_vec()]] {
        let error = log_in(impostor(lines).await, "sslmode=disable", true).await.unwrap_err();
        assert!(matches!(error, ConnectError::Timeout { .. }), "{error}");
    }
    let database = parse_database(&format!("postgres://u@127.0.0.1:{}/d?connect_timeout=1", impostor(vec![]).await));
    let error = database.connect("test").await.err().unwrap().to_string();
    assert!(error.contains("no answer within 1 s"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(30));
}
