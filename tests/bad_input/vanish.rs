//! Clients that are gone: in a transaction, in a COPY, within a message; with FIN and with RST.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::common::{raw, until};
use super::{DATABASE, Stage};

/// What a client has said when it goes, and how many ReadyForQuery it has heard before.
fn stories() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let begin = [raw::query("BEGIN"), raw::query("INSERT INTO notes VALUES (1, 'gone')")].concat();
    let parts = |sql: &str| [raw::parse("", sql, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat();
    vec![
        ("in a transaction", begin.clone(), Vec::new()),
        ("within a message", begin.clone(), raw::query("UPDATE notes SET body = 'x'")[..12].to_vec()),
        ("within a length", begin.clone(), vec![b'Q', 0, 0]),
        ("in a pipeline", Vec::new(), parts("INSERT INTO notes VALUES (1, 'gone')")),
        ("within a Bind", begin.clone(), raw::bind("", "", &[], &[Some(b"1")], &[])[..9].to_vec()),
        ("in a COPY", begin.clone(), [raw::query("COPY notes FROM STDIN"), raw::copy_data(b"2\tgone\n")].concat()),
        (
            "within COPY data",
            begin,
            [raw::query("COPY notes FROM STDIN"), raw::copy_data(b"2\tgone\n3\tgone\n")[..9].to_vec()].concat(),
        ),
        (
            "in a COPY by itself",
            Vec::new(),
            [raw::query("COPY notes FROM STDIN"), raw::copy_data(b"2\tgone\n")].concat(),
        ),
    ]
}

#[tokio::test]
async fn what_a_client_leaves_behind_is_rolled_back_at_once() {
    for phase in ["old", "dual-write"] {
        // One session on the mirror for all, so that one that is not given back is missed.
        let mut stage = Stage::start(phase, "mirror: { connections: 1 }\nlimits: { threads: 1 }").await;
        for (story, heard, unheard) in stories() {
            for reset in [false, true] {
                let mut client = stage.client().await;
                client.send(&heard).await;
                client.until_ready(if heard.is_empty() { 0 } else { 2 }).await;
                client.send(&unheard).await;
                // Long enough for the messages to arrive in most runs; that they have not is another story.
                tokio::time::sleep(Duration::from_millis(20)).await;
                let mut stream = client.into_stream();
                if reset {
                    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("sets");
                } else {
                    drop(stream.shutdown().await);
                }
                drop(stream);
                let what = format!("{phase}: {story} (reset: {reset}) nothing is left open");
                let control = stage.databases.old.client(DATABASE).await.expect("connects");
                until(&what, async || {
                    let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND xact_start IS NOT NULL";
                    control.query_one(sql, &[]).await.expect("reads").get::<_, i64>(0) == 0
                })
                .await;
                let rows: i64 = control.query_one("SELECT count(*) FROM notes", &[]).await.expect("reads").get(0);
                assert_eq!(rows, 0, "{what}");
                stage.others_go_on().await;
            }
        }
        until("the sessions are over", async || stage.proxy.metrics("crossfade_clients").await == 1.0).await;
        stage.end().await;
    }
}

/// What a client has sent before it closed its direction is carried out, and it hears all of the answers.
#[tokio::test]
async fn a_client_that_only_closes_its_direction_is_served_to_the_end() {
    for phase in ["old", "dual-write"] {
        let stage = Stage::start(phase, "limits: { client_buffer: 64kB }").await;
        let client = stage.client().await;
        let mut stream = client.into_stream();
        let mut bytes = Vec::new();
        for id in 0..500 {
            let text = format!("INSERT INTO notes VALUES ({id}, repeat('y', 200)) RETURNING repeat(body, 20)");
            bytes.extend(
                [raw::parse("", &text, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0), raw::sync()]
                    .concat(),
            );
        }
        let (mut from, mut to) = stream.split();
        let send = async {
            to.write_all(&bytes).await.expect("sends");
            to.shutdown().await.expect("closes");
        };
        let mut heard = Vec::new();
        let (_, read) = tokio::join!(send, tokio::io::AsyncReadExt::read_to_end(&mut from, &mut heard));
        read.expect("reads");
        let ready = heard.windows(6).filter(|bytes| bytes == b"Z\0\0\0\x05I").count();
        assert_eq!(ready, 500, "{phase}: every answer is heard");
        stage.end().await;
    }
}
