//! Statements made to be misread, and statements that are too much.

use super::common::raw::{self, Frame};
use super::{DATABASE, Stage};

/// Runs each text as a Query, one after the other, in one session that begins with `settings`.
async fn run(stage: &Stage, settings: &str, texts: &[&[u8]]) -> Vec<Vec<Frame>> {
    let mut client = stage.client().await;
    let mut heard = Vec::new();
    for text in [settings.as_bytes()].iter().chain(texts) {
        client.doing = String::from_utf8_lossy(text).chars().take(100).collect();
        client.send(&raw::query_bytes(text)).await;
        heard.push(client.until_ready(1).await);
    }
    heard.remove(0);
    heard
}

fn failed(frames: &[Frame]) -> bool {
    frames.iter().any(|frame| frame.tag == b'E')
}

/// What old has in `notes`.
async fn rows(stage: &Stage) -> String {
    let sql = "SELECT coalesce(string_agg(format('%s=%s', id, body), ',' ORDER BY id), '-') FROM notes";
    stage.databases.old.run(DATABASE, sql).await.expect("reads").trim().to_owned()
}

/// The server converts a text to its own encoding before it reads it: what looks like a backslash is half a character.
#[tokio::test]
async fn half_a_character_hides_no_write() {
    let stage = Stage::start("dual-write", "").await;
    // 0x83 0x5c, 0xa5 0x5c, 0x81 0x5c, 0x81 0x5c: each one character of which the second byte is that of a backslash.
    for (number, (encoding, character)) in
        [("SJIS", b"\x83\x5c"), ("BIG5", b"\xa5\x5c"), ("GBK", b"\x81\x5c"), ("GB18030", b"\x81\x5c")]
            .iter()
            .enumerate()
    {
        let hidden = [
            &b"SELECT E'"[..],
            &character[..],
            format!("'; INSERT INTO notes VALUES ({number}, $$hidden$$); --'").as_bytes(),
        ]
        .concat();
        let (id, other) = (10 + number, 20 + number);
        let plain = [format!("INSERT INTO notes VALUES ({id}, E'").as_bytes(), &character[..], b"\\'')"].concat();
        let literal = [format!("INSERT INTO notes VALUES ({other}, '").as_bytes(), &character[..], b"')"].concat();
        let heard = run(&stage, &format!("SET client_encoding = '{encoding}'"), &[&hidden, &plain, &literal]).await;
        let errors: Vec<bool> = heard.iter().map(|frames| failed(frames)).collect();
        assert_eq!(errors, [false, true, false], "{encoding}: {heard:?}");
    }
    let rows = rows(&stage).await;
    for id in [0, 1, 2, 3, 20, 21, 22, 23] {
        assert!(rows.contains(&format!("{id}=")), "{id} in {rows}");
    }
    stage.end().await;
}

/// A table that another encoding spells with other bytes is the same table.
#[tokio::test]
async fn a_name_in_another_encoding_hides_no_write() {
    let table = "CREATE TABLE \"t\u{e4}\" (id int PRIMARY KEY, body text)";
    let mut stage = Stage::with(table, "dual-write", "").await;
    let heard = run(&stage, "SET client_encoding = 'LATIN1'", &[b"INSERT INTO t\xe4 VALUES (1, '\xe4')"]).await;
    assert!(!failed(&heard[0]), "{heard:?}");
    stage.others_go_on().await;
    stage.end().await;
}

#[tokio::test]
async fn backslashes_in_plain_literals_hide_no_write() {
    let stage = Stage::start("dual-write", "").await;
    let off = "SET standard_conforming_strings = off; SET escape_string_warning = off; SET backslash_quote = on";
    let texts: [&[u8]; 9] = [
        br"INSERT INTO notes VALUES (1, 'it\'s'); UPDATE notes SET body = body || '\\' WHERE id = 1",
        br"INSERT INTO notes VALUES (2, 'a\'); ROLLBACK; --')",
        br"SELECT '\'; ', 'x'; INSERT INTO notes VALUES (3, 'seen') --'",
        br"BEGIN; INSERT INTO notes VALUES (4, '\''); COMMIT",
        br"INSERT INTO notes VALUES (5, $$\'$$), (6, E'\'x'), (7, N'\\'), (8, 'a' '\'')",
        b"INSERT INTO notes VALUES (9, 'a'\n'\\'b')",
        b"INSERT INTO notes VALUES (10, /* ' /* \\' */ */ '\\\\') -- '\n RETURNING id, '\\''",
        b"SET standard_conforming_strings = on; INSERT INTO notes VALUES (11, '\\'); --')",
        br"INSERT INTO notes VALUES (12, 'on\'), (13, '\\x')",
    ];
    let heard = run(&stage, off, &texts).await;
    let reference = super::soup::reference().await;
    let packet = super::login();
    let (mut direct, _) = raw::RawClient::connect(reference.port(), None, &packet).await;
    for (number, text) in [off.as_bytes()].iter().chain(&texts).enumerate() {
        direct.send(&raw::query_bytes(text)).await;
        let expected = failed(&direct.until_ready(1).await);
        if number > 0 {
            let ours = &heard[number - 1];
            assert_eq!(failed(ours), expected, "{} {ours:?}", text.escape_ascii());
        }
    }
    let sql = "SELECT coalesce(string_agg(format('%s=%s', id, body), ',' ORDER BY id), '-') FROM notes";
    let expected = reference.run(DATABASE, sql).await.expect("reads").trim().to_owned();
    assert_eq!(rows(&stage).await, expected);
    stage.end().await;
}

/// The setting changes within a pipeline, and the server says so only at its end: what is behind it is not read by the old rules.
#[tokio::test]
async fn a_setting_under_way_hides_no_write() {
    let function =
        "CREATE FUNCTION make(n int) RETURNS int LANGUAGE sql AS 'INSERT INTO notes VALUES (n, ''made'') RETURNING id'";
    let stage = Stage::with(function, "dual-write", "").await;
    let mut client = stage.client().await;
    let parts = |sql: &str| [raw::parse("", sql, &[]), raw::bind("", "", &[], &[], &[]), raw::execute("", 0)].concat();
    // By the rules of before, make(n) stands in a literal; by those of after, it does not.
    let off = [parts("SET standard_conforming_strings = off"), parts(r"SELECT '\', ', make(1), '\' --'"), raw::sync()]
        .concat();
    let on =
        [parts("SET standard_conforming_strings = on"), parts(r"SELECT '\', make(2), ' --\'"), raw::sync()].concat();
    for pipeline in [off, on] {
        // What is owed from before would heal what is missed now.
        stage.proxy.settle().await;
        client.send(&pipeline).await;
        let frames = client.until_ready(1).await;
        assert!(!failed(&frames), "{frames:?}");
    }
    assert_eq!(rows(&stage).await, "1=made,2=made");
    stage.end().await;
}

#[tokio::test]
async fn long_and_deep_statements_are_answered_and_mirrored() {
    let mut stage = Stage::start("dual-write", "limits: { statement: 12MiB }").await;
    let megabytes = "x".repeat(10_000_000);
    let chain = |term: &str, by: &str| vec![term; 100_000].join(by);
    let deep = |times: usize| format!("SELECT {}1{}", "(".repeat(times), ")".repeat(times));
    let texts = [
        format!("INSERT INTO notes VALUES (1, '{megabytes}')"),
        format!("UPDATE notes SET body = 'short' WHERE {}", chain("id = 1", " OR ")),
        format!("INSERT INTO notes VALUES (2, {})", chain("'a'", "||")),
        format!("INSERT INTO notes SELECT 3, 'in' WHERE 5 IN ({})", chain("5", ",")),
        format!("DELETE FROM notes WHERE id = {}", chain("1", "+")),
        deep(3_000),
        deep(1_000_000),
        format!(
            "INSERT INTO notes VALUES {}",
            (100..60_000).map(|id| format!("({id}, 'row')")).collect::<Vec<_>>().join(",")
        ),
        format!("SELECT 1 {}", "/* ".repeat(1_000_000)),
        "SELECT 1;".repeat(20_000),
        // Beyond limits.statement.
        format!(
            "BEGIN; INSERT INTO notes VALUES (4, '{megabytes}'); INSERT INTO notes VALUES (5, '{megabytes}'); COMMIT"
        ),
    ];
    let mut client = stage.client().await;
    for text in &texts {
        client.doing = text[..60].to_owned();
        client.send(&raw::query(text)).await;
        let frames = client.until_ready(1).await;
        let last = frames.last().expect("frames");
        assert_eq!((last.tag, &last.body[..]), (b'Z', &b"I"[..]), "{}: {:?}", client.doing, frames.first());
        stage.others_go_on().await;
    }
    let there = stage.databases.old.run(DATABASE, "SELECT count(*) FROM notes WHERE id < 100").await.expect("reads");
    assert_eq!(there, "4\n", "1, 3, 4 and 5 (the chain of || may be too deep for the server)");
    stage.end().await;
}

/// A text beyond `limits.statement` in a block: it may hold a COMMIT, of what was captured before it too.
#[tokio::test]
async fn a_commit_in_a_text_that_nobody_reads_loses_nothing() {
    let stage = Stage::start("dual-write", "limits: { statement: 100kB }").await;
    let padding = "x".repeat(200_000);
    let mut client = stage.client().await;
    for text in [
        "BEGIN".to_owned(),
        "INSERT INTO notes VALUES (1, 'captured')".to_owned(),
        format!("INSERT INTO notes VALUES (2, '{padding}'); COMMIT; INSERT INTO notes VALUES (3, 'behind it')"),
        "INSERT INTO notes VALUES (4, 'after')".to_owned(),
    ] {
        client.send(&raw::query(&text)).await;
        let frames = client.until_ready(1).await;
        assert!(!failed(&frames), "{frames:?}");
    }
    // In a pipeline too.
    client
        .send(
            &[
                raw::parse("long", &format!("INSERT INTO notes VALUES (5, '{padding}')"), &[]),
                raw::bind("", "long", &[], &[], &[]),
                raw::execute("", 0),
                raw::sync(),
            ]
            .concat(),
        )
        .await;
    assert!(!failed(&client.until_ready(1).await));
    assert_eq!(stage.databases.old.run(DATABASE, "SELECT count(*) FROM notes").await.expect("reads"), "5\n");
    stage.end().await;
}

/// Statements of SQL's PREPARE have names that a Bind can use.
#[tokio::test]
async fn a_bind_of_a_statement_of_sqls_prepare_hides_no_write() {
    let stage = Stage::start("dual-write", "").await;
    let mut client = stage.client().await;
    client.send(&raw::query("PREPARE mine AS INSERT INTO notes VALUES (1, 'x')")).await;
    client.until_ready(1).await;
    client.send(&[raw::bind("", "mine", &[], &[], &[]), raw::execute("", 0), raw::sync()].concat()).await;
    assert!(!failed(&client.until_ready(1).await));
    assert_eq!(rows(&stage).await, "1=x");
    stage.end().await;
}

#[tokio::test]
async fn bytes_that_are_no_text_are_refused_and_nothing_is_written() {
    let stage = Stage::start("dual-write", "").await;
    let texts: [&[u8]; 5] = [
        b"INSERT INTO notes VALUES (1, '\xff\xfe')",
        b"INSERT INTO notes VALUES (1, E'\\xc3\\x28')",
        b"INSERT INTO \xc3( VALUES (1, 'x')",
        b"INSERT INTO notes VALUES (1, 'x') \xe2\x82",
        b"INSERT INTO notes VALUES (1, '\xed\xa0\x80')",
    ];
    let heard = run(&stage, "SELECT 1", &texts).await;
    assert!(heard.iter().all(|frames| failed(frames)), "{heard:?}");
    assert_eq!(rows(&stage).await, "-");
    stage.end().await;
}
