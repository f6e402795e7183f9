//! Bytes that are no messages, at every stage of a connection; messages that are not laid out as they should be.

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::common::raw::{self, RawClient};
use super::{Stage, login};

const MILLION: usize = 1_000_000;
/// SSLRequest.
const SSL: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

fn garbage(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; MILLION];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Sends what can be sent, then reads to the end of the connection, which must come.
async fn to_the_end(port: u16, pieces: &[&[u8]]) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("connects");
    for piece in pieces {
        // The proxy may have closed already.
        if stream.write_all(piece).await.is_err() {
            break;
        }
    }
    drop(stream.shutdown().await);
    let mut heard = Vec::new();
    let read = tokio::time::timeout(std::time::Duration::from_secs(30), stream.read_to_end(&mut heard));
    drop(read.await.expect("the connection is closed"));
    heard
}

#[tokio::test]
async fn a_million_bytes_of_garbage_at_every_stage() {
    for phase in ["old", "dual-write"] {
        let mut stage = Stage::start(phase, "").await;
        let port = stage.proxy.port();
        let cut = &login()[..login().len() - 3];
        for seed in 0..6 {
            let noise = garbage(seed);
            // The first byte decides what is heard: a length, a TLS record, or a packet that is too long.
            for first in [None, Some(0), Some(0x16)] {
                let mut noise = noise.clone();
                first.into_iter().for_each(|byte| noise[0] = byte);
                to_the_end(port, &[&noise]).await;
            }
            to_the_end(port, &[cut, &noise]).await;
            to_the_end(port, &[&SSL, &noise]).await;
            // Logged in, and within a message.
            to_the_end(port, &[&login(), &noise]).await;
            to_the_end(port, &[&login(), &raw::query("SELECT 1")[..7], &noise]).await;
            to_the_end(
                port,
                &[&login(), &raw::query("BEGIN"), &raw::query("INSERT INTO notes VALUES (9, 'x')"), &noise],
            )
            .await;
            to_the_end(port, &[&login(), &raw::query("COPY notes FROM STDIN"), &noise]).await;
            stage.others_go_on().await;
        }
        assert_eq!(stage.in_transaction().await, 0);
        stage.end().await;
    }
}

/// Each message cut short with its length corrected, with a byte too many, and with a byte changed.
#[tokio::test]
async fn messages_that_are_not_laid_out_as_they_should_be() {
    let mut stage = Stage::start("dual-write", "").await;
    let mut random = StdRng::seed_from_u64(1);
    let messages = [
        raw::query("INSERT INTO notes VALUES (1, 'x')"),
        raw::parse("s", "INSERT INTO notes VALUES ($1, $2)", &[23, 25]),
        raw::bind("", "w", &[0], &[Some(b"1"), None], &[0]),
        raw::describe(b'S', "w"),
        raw::execute("", 0),
        raw::close(b'P', ""),
        raw::sync(),
        raw::function_call(1598, &[], &[], 0),
        raw::copy_fail("no"),
    ];
    // In front of each: a write in a pipeline, which nothing may commit.
    let before = [
        raw::parse("w", "INSERT INTO notes VALUES ($1, $2)", &[]),
        raw::bind("", "w", &[], &[Some(b"1000"), Some(b"written in front of a bad message")], &[]),
        raw::execute("", 0),
    ]
    .concat();
    for message in &messages {
        let mut bad = Vec::new();
        for length in 5..message.len() {
            bad.push(raw::message(message[0], |body| body.extend(&message[5..length])));
        }
        bad.push(raw::message(message[0], |body| body.extend(message[5..].iter().chain(b"\0"))));
        for _ in 0..10 {
            let mut changed = message.clone();
            let at = random.random_range(0..changed.len());
            changed[at] ^= 1 << random.random_range(0..8);
            bad.push(changed);
        }
        for bad in bad {
            to_the_end(stage.proxy.port(), &[&login(), &before, &bad]).await;
        }
        stage.others_go_on().await;
    }
    stage.end().await;
}

/// What PostgreSQL refuses in a Query is not read in any other way.
#[tokio::test]
async fn a_query_with_a_nul_within_or_none_at_its_end_writes_nothing() {
    let stage = Stage::start("dual-write", "").await;
    for body in [
        &b"INSERT INTO notes VALUES (1, 'x'); COMMIT; SELECT 1\0; SELECT 2\0"[..],
        b"INSERT INTO notes VALUES (2, 'x')",
    ] {
        let bad = raw::message(b'Q', |message| message.extend(body));
        let mut client = stage.client().await;
        client.send(&bad).await;
        let frames = client.until_ready(1).await;
        assert_eq!(frames[0].tag, b'E', "{frames:?}");
        assert!(String::from_utf8_lossy(&frames[0].body).contains("C08P01"), "{frames:?}");
    }
    let rows = stage.databases.old.run("shop", "SELECT count(*) FROM notes").await.expect("reads");
    assert_eq!(rows, "0\n");
    stage.end().await;
}

/// A message that says it is a gigabyte long, and whose bytes never come, takes no memory; one that must not be so long is refused at once.
#[tokio::test]
async fn a_length_that_is_not_meant_takes_no_memory() {
    for phase in ["old", "dual-write"] {
        let mut stage = Stage::start(phase, "").await;
        let mut waiting: Vec<RawClient> = Vec::new();
        for tag in *b"QPBDECSHFdcfXp\0\xff" {
            let mut client = stage.client().await;
            let mut head = vec![tag];
            head.extend(0x3fff_fff0_u32.to_be_bytes());
            client.send(&head).await;
            client.send(&vec![b'x'; 300_000]).await;
            if phase == "dual-write" && b"DECSHcf\0\xff".contains(&tag) {
                let frames = client.until_ready(1).await;
                assert!(
                    String::from_utf8_lossy(&frames[0].body).contains("C08P01"),
                    "{} {frames:?}",
                    tag.escape_ascii()
                );
            }
            waiting.push(client);
        }
        let mut long = stage.client().await;
        long.send(b"Q\xff\xff\xff\xff").await;
        assert_eq!(long.until_ready(1).await[0].tag, b'E');
        stage.others_go_on().await;
        drop(waiting);
        stage.end().await;
    }
}

/// As many parameters as a Bind can have: more than 32,767, where a number with a sign turns over.
#[tokio::test]
async fn a_write_with_65_534_parameters_is_mirrored() {
    let stage = Stage::start("dual-write", "").await;
    let rows: Vec<String> = (0..32_767).map(|row| format!("(${}, ${})", 2 * row + 1, 2 * row + 2)).collect();
    for returning in ["", " RETURNING id"] {
        let texts: Vec<String> = (0..32_767).map(|id| id.to_string()).collect();
        let values: Vec<Option<&[u8]>> =
            texts.iter().flat_map(|id| [Some(id.as_bytes()), Some(&b"many"[..])]).collect();
        // The counts are unsigned on the wire; the tests' own writer takes them as they are.
        let bind = raw::message(b'B', |body| {
            body.extend([0, 0, 0, 0]);
            body.extend(u16::try_from(values.len()).expect("fits").to_be_bytes());
            for value in values.iter().flatten() {
                body.extend(u32::try_from(value.len()).expect("short").to_be_bytes());
                body.extend(*value);
            }
            body.extend([0, 0]);
        });
        let parse = raw::parse("", &format!("INSERT INTO notes (id, body) VALUES {}{returning}", rows.join(",")), &[]);
        let mut client = stage.client().await;
        client.send(&[raw::query("TRUNCATE notes"), parse, bind, raw::execute("", 0), raw::sync()].concat()).await;
        let frames = client.until_ready(2).await;
        assert!(
            frames.iter().any(|frame| frame.tag == b'C' && frame.body == b"INSERT 0 32767\0"),
            "{:?}",
            frames.last()
        );
    }
    stage.end().await;
}
