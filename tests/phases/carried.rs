//! What a session takes along when authority moves, what ends it, and who has no part in a move.

use bytes::Buf;
use tokio_postgres::error::SqlState;

use crate::common::pair::{APP, DATABASE};
use crate::common::raw::{self, RawClient};
use crate::common::{Databases, Pair, Proxy, until};
use crate::{SCHEMA, value};

/// What a session set, as it sees it.
const SEEN: &str = "SELECT concat_ws(' | ', current_setting('app.user'), current_setting('my.tenant'), current_setting('my.bound', true), current_setting('search_path'), \
    current_setting('timezone'), current_setting('application_name'), current_setting('datestyle'), current_setting('work_mem'), \
    current_user, current_setting('default_transaction_isolation'), current_setting('extra_float_digits'))";

#[tokio::test]
async fn settings_and_prepared_statements_hold_on_the_new_authority() {
    let schema = format!("{SCHEMA} CREATE SCHEMA media; CREATE TABLE media.pictures (id int PRIMARY KEY, name text);");
    let databases = Databases::start(&[]).await;
    databases.run_on_both(&schema).await;
    // EXECUTE is a write out of sight: it taints all tables, and one without a key would have to be copied by name.
    databases.run_on_both("DROP TABLE history").await;
    for side in [&databases.old, &databases.new] {
        let script = format!(
            "CREATE ROLE painter; GRANT painter TO {}; GRANT ALL ON ALL TABLES IN SCHEMA media, public TO painter; \
            GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO painter; GRANT ALL ON SCHEMA media TO painter",
            APP.0
        );
        side.run(DATABASE, &script).await.expect("grants");
    }
    // What the servers themselves say differs, and is reported.
    databases
        .new
        .run("postgres", "ALTER SYSTEM SET DateStyle = 'German'; SELECT pg_reload_conf()")
        .await
        .expect("sets");
    let proxy = Proxy::start(databases.proxy_config("old", "")).await;
    let mut pair = Pair { proxy, databases };
    let client = pair.client().await;
    let script = r#"SET "app"."user" = 'o''Brien \ 7'; SELECT set_config('my.tenant', 'blue', false); SET search_path = media, public; \
        SET app.other = ''; SET TIME ZONE 'Asia/Tokyo'; SET application_name = 'darkroom'; SET work_mem = '7MB'; SET DateStyle = 'SQL, DMY'; \
        SET ROLE painter; SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ; SET extra_float_digits = -3"#;
    client.batch_execute(&script.replace("\\\n", "\n")).await.expect("sets");
    // Its name stands in no text.
    let bound = "SELECT set_config($1, $2, false)";
    client.execute(bound, &[&"my.bound", &"by Bind"]).await.expect("sets");
    client.batch_execute("PREPARE by_sql (int, text) AS INSERT INTO pictures VALUES ($1, $2)").await.expect("prepares");
    let insert = client.prepare("INSERT INTO pictures VALUES ($1, $2) RETURNING id").await.expect("prepares");
    let select = client.prepare("SELECT count(*) FROM pictures WHERE id > $1").await.expect("prepares");
    let seen = value(&client, SEEN).await;
    for part in [
        "o'Brien \\ 7",
        "blue",
        "by Bind",
        "media, public",
        "Asia/Tokyo",
        "darkroom",
        "SQL, DMY",
        "7MB",
        "painter",
        "repeatable read",
        "-3",
    ] {
        assert!(seen.contains(part), "{part} is missing in {seen}");
    }
    let mut id = 0;
    for phase in ["dual-write", "new-primary", "new", "new-primary", "dual-write", "old"] {
        pair.proxy.set_phase(phase).await;
        assert_eq!(value(&client, SEEN).await, seen, "in {phase}");
        if id == 0 {
            client.execute(bound, &[&"my.later", &"while mirrored"]).await.expect("sets");
        }
        assert_eq!(value(&client, "SELECT current_setting('my.later', true)").await, "while mirrored", "in {phase}");
        id += 2;
        assert_eq!(client.query_one(&insert, &[&id, &phase]).await.expect(phase).get::<_, i32>(0), id);
        client.batch_execute(&format!("EXECUTE by_sql ({}, '{phase}')", id + 1)).await.expect(phase);
        assert_eq!(client.query_one(&select, &[&0]).await.expect(phase).get::<_, i64>(0), i64::from(id));
        if matches!(phase, "dual-write" | "new-primary") {
            pair.proxy.settle().await;
        }
    }
}

/// A raw client that the servers trust.
async fn trusted() -> (Pair, u16) {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let proxy =
        Proxy::start(databases.proxy_config("old", "auth: trust\nusers: { app: { password: app-secret } }")).await;
    let port = proxy.port();
    (Pair { proxy, databases }, port)
}

fn startup(more: &[(&str, &str)]) -> Vec<u8> {
    let mut parameters = vec![("user", APP.0), ("database", DATABASE)];
    parameters.extend_from_slice(more);
    raw::startup(raw::V3_0, &parameters)
}

#[tokio::test]
async fn statements_by_name_and_unnamed_ones_outlive_the_move_and_new_parameters_are_told() {
    let (mut pair, port) = trusted().await;
    pair.databases
        .new
        .run("postgres", "ALTER SYSTEM SET DateStyle = 'German'; SELECT pg_reload_conf()")
        .await
        .expect("sets");
    let (mut client, greeting) = RawClient::connect(port, None, &startup(&[])).await;
    let style = |frames: &[raw::Frame], value: &str| {
        frames.iter().any(|frame| frame.tag == b'S' && frame.body.starts_with(format!("DateStyle\0{value}").as_bytes()))
    };
    assert!(style(&greeting, "ISO"));
    let insert = "INSERT INTO photos (name) VALUES ($1) RETURNING name";
    let flight =
        [raw::parse("named", insert, &[25]), raw::parse("", "SELECT 'unnamed ' || $1", &[25]), raw::sync()].concat();
    client.send(&flight).await;
    client.until_ready(1).await;
    for phase in ["dual-write", "new-primary", "new"] {
        pair.proxy.set_phase(phase).await;
        let use_both = [
            raw::describe(b'S', "named"),
            raw::bind("", "named", &[], &[Some(phase.as_bytes())], &[]),
            raw::execute("", 0),
            raw::bind("", "", &[], &[Some(phase.as_bytes())], &[]),
            raw::execute("", 0),
            raw::sync(),
        ];
        client.send(&use_both.concat()).await;
        let frames = client.until_ready(1).await;
        let rows: Vec<String> = frames
            .iter()
            .filter(|frame| frame.tag == b'D')
            .map(|frame| String::from_utf8_lossy(&frame.body[6..]).into_owned())
            .collect();
        assert_eq!(rows, [phase.to_owned(), format!("unnamed {phase}")], "{frames:?}");
        let described = frames.iter().find(|frame| frame.tag == b'T').expect("described");
        assert_eq!((&described.body[..2]).get_i16(), 1, "the hidden column is not seen");
        assert_eq!(
            style(&frames, "German"),
            phase == "new-primary",
            "what differs on new is told, once: {phase} {frames:?}"
        );
    }
}

#[tokio::test]
async fn sessions_that_cannot_move_are_told_at_once() {
    let mut pair = Pair::start("old", SCHEMA, "").await;
    pair.proxy.set_phase("dual-write").await;
    let stuck = [
        ("LISTEN news", "LISTEN"),
        ("CREATE TEMP TABLE basket (id int)", "a temporary table"),
        ("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 1; COMMIT", "a cursor WITH HOLD"),
        ("SELECT pg_advisory_lock(7)", "a session advisory lock"),
    ];
    let mut ended = Vec::new();
    for (sql, _) in stuck {
        let (client, connection) = tokio_postgres::connect(&pair.url(), tokio_postgres::NoTls).await.expect("connects");
        let end = tokio::spawn(connection);
        client.batch_execute(sql).await.expect(sql);
        ended.push((client, end));
    }
    let free = pair.client().await;
    // What drivers say when they give a session back.
    free.batch_execute("SELECT pg_advisory_lock(8); SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL")
        .await
        .expect("runs");
    pair.proxy.settle().await;
    let counted = async |proxy: &Proxy, phase: &str, found: &str| {
        until(&format!("the gate says: {found}"), async || {
            let gates = proxy.crossfade(&["phase", phase, "--dry-run"]).await;
            String::from_utf8_lossy(&gates.stdout).contains(found)
        })
        .await;
    };
    counted(&pair.proxy, "new-primary", "2 sessions that have declared a cursor WITH HOLD or said LISTEN").await;
    pair.proxy.set_phase("new-primary").await;
    counted(&pair.proxy, "dual-write", "0 sessions that have declared a cursor WITH HOLD or said LISTEN").await;
    for ((client, end), (sql, what)) in ended.into_iter().zip(stuck) {
        // Nothing was sent: they hear of it by themselves.
        let error = end.await.expect("joins").expect_err(sql);
        let error = error.as_db_error().unwrap_or_else(|| panic!("{sql}: {error}"));
        assert_eq!(error.code(), &SqlState::ADMIN_SHUTDOWN);
        assert!(error.message().contains(what) && error.message().contains("new"), "{error}");
        assert!(error.hint().is_some());
        drop(client);
    }
    assert_eq!(value(&free, "SELECT 1").await, "1");
}

#[tokio::test]
async fn other_databases_have_no_part_in_any_phase() {
    let mut pair = Pair::start("old", SCHEMA, "move: { pause: 1s }").await;
    pair.databases.old.run("postgres", &format!("CREATE DATABASE other OWNER {}", APP.0)).await.expect("makes");
    let url = pair.proxy.url_as(APP.0, APP.1, "other");
    let (other, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects");
    tokio::spawn(connection);
    // The same name as a migrating table, and other columns.
    other
        .batch_execute(
            "CREATE TABLE photos (id int PRIMARY KEY, colour text); BEGIN; INSERT INTO photos VALUES (1, 'red')",
        )
        .await
        .unwrap();
    for phase in ["dual-write", "new-primary", "new"] {
        pair.proxy.set_phase(phase).await;
        assert_eq!(value(&other, "SELECT colour FROM photos").await, "red", "its transaction goes on in {phase}");
    }
    other.batch_execute("COMMIT; INSERT INTO photos VALUES (2, 'blue')").await.expect("writes");
    assert_eq!(pair.databases.old.run("other", "SELECT count(*) FROM photos").await.unwrap().trim(), "2");
    let (late, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects in phase new");
    tokio::spawn(connection);
    assert_eq!(value(&late, "SELECT count(*) FROM photos").await, "2");
    pair.proxy.set_more("other_databases: refuse");
    let mut refused = None;
    until("other databases are refused", async || {
        refused = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.err();
        refused.is_some()
    })
    .await;
    let refused = refused.expect("refused");
    let refused = refused.as_db_error().expect("told");
    assert_eq!(refused.code(), &SqlState::INVALID_CATALOG_NAME);
    assert!(refused.hint().is_some_and(|hint| hint.contains("other_databases")));
}

#[tokio::test]
async fn replication_passes_in_old_holds_no_move_up_and_ends_with_the_phase() {
    let (mut pair, port) = trusted().await;
    pair.databases.old.run(DATABASE, &format!("ALTER ROLE {} REPLICATION", APP.0)).await.expect("grants");
    let packet = startup(&[("replication", "database")]);
    let (mut stream, _) = RawClient::connect(port, None, &packet).await;
    stream.send(&raw::query("IDENTIFY_SYSTEM")).await;
    let frames = stream.until_ready(1).await;
    let row = frames.iter().find(|frame| frame.tag == b'D').expect("a row");
    let mut fields = &row.body[2..];
    let mut texts = Vec::new();
    while fields.remaining() > 4 {
        let length = usize::try_from(fields.get_i32()).unwrap_or(0);
        texts.push(String::from_utf8_lossy(&fields[..length]).into_owned());
        fields.advance(length);
    }
    stream.send(&raw::query(&format!("START_REPLICATION PHYSICAL {} TIMELINE {}", texts[2], texts[1]))).await;
    assert_eq!(stream.read().await.expect("streams").tag, b'W');
    pair.proxy.set_phase("dual-write").await;
    let mut last = None;
    while let Some(frame) = stream.read().await {
        last = Some(frame);
    }
    let last = last.expect("it was told");
    assert!(last.tag == b'E' && String::from_utf8_lossy(&last.body).contains("57P01"), "{last:?}");
    let mut late = RawClient::open(port, None).await;
    late.send(&packet).await;
    let refused = late.read().await.expect("an answer");
    let text = String::from_utf8_lossy(&refused.body).into_owned();
    assert!(refused.tag == b'E' && text.contains("0A000") && text.contains("directly"), "{text}");
}

#[tokio::test]
async fn too_many_clients_are_told_so() {
    let pair = Pair::start("old", SCHEMA, "limits: { clients: 2 }").await;
    let (first, _second) = (pair.client().await, pair.client().await);
    let refused = tokio_postgres::connect(&pair.url(), tokio_postgres::NoTls).await.err().expect("one too many");
    let refused = refused.as_db_error().expect("told");
    assert_eq!(refused.code(), &SqlState::TOO_MANY_CONNECTIONS);
    drop(first);
    until("a place is free again", async || tokio_postgres::connect(&pair.url(), tokio_postgres::NoTls).await.is_ok())
        .await;
}
