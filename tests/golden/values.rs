//! Values: defaults, every type, and sessions whose settings change how values are written.

use crate::stage::{Stage, ask};

const SCHEMA: &str = r#"
    CREATE SEQUENCE numbers;
    CREATE TABLE defaults (id int PRIMARY KEY, at timestamptz DEFAULT now(), clock timestamptz DEFAULT clock_timestamp(), r float8 DEFAULT random(),
        u uuid DEFAULT gen_random_uuid(), n bigint DEFAULT nextval('numbers'), who text DEFAULT current_user, stmt timestamptz DEFAULT statement_timestamp(),
        d date DEFAULT current_date, txid text DEFAULT pg_current_xact_id()::text);
    CREATE TYPE mood AS ENUM ('sad', 'so so', 'happy');
    CREATE TYPE pair AS (x int, y text, m mood);
    CREATE DOMAIN percent AS int CHECK (VALUE BETWEEN 0 AND 100);
    CREATE TABLE types (id int PRIMARY KEY, b boolean, i2 int2, i8 int8, f4 float4, f8 float8, n numeric, m money, t text, vc varchar(20), c char(5), bin bytea,
        d date, tm time, tz timetz, ts timestamp, tstz timestamptz, iv interval, u uuid, j json, jb jsonb, x xml, net inet, cid cidr, mac macaddr,
        bits bit(3), vb varbit, p point, poly polygon, ia int[], ta text[], md mood, mda mood[], pr pair, pra pair[], pc percent, r int4range, mr int4multirange,
        tr tstzrange, tsv tsvector, tsq tsquery, o oid, rc regclass, nm name, ch "char", pl pg_lsn);
    CREATE TABLE texts (id int PRIMARY KEY, t text);
"#;

/// Rows of `types`: as literals that mean the same under any setting.
const ROWS: &[&str] = &[
    r#"(1, true, -32768, 9223372036854775807, '1.17549435e-38', '0.1', 'NaN', 12.34, 'text', 'varchar', 'ab', decode('0001ff', 'hex'),
        DATE '2024-02-29', '23:59:59.999999', '12:00:00.5-05:30', TIMESTAMP '0044-03-15 12:00:00 BC', TIMESTAMPTZ '2024-07-01 00:00:00.000001+00', 'P1Y2M3DT4H5M6.789S',
        'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '{"b":  1, "a": [1,2]}', '{"b":  1, "a": [1, 2.50]}', '<a>x</a>', '10.1.2.3/8', '10.0.0.0/8', '08:00:2b:01:02:03',
        B'101', B'10101', '(0.1,1e300)', '((0,0),(1,0),(0.30000000000000004,1))', '{{1,NULL},{3,4}}', ARRAY['a,b', NULL, '"', ''], 'so so', '{happy,NULL,sad}',
        ROW(1, 'a "b", (c)', 'happy')::pair, ARRAY[ROW(NULL, '', 'sad')::pair, NULL], 100, '[1,5)', '{[1,3),[7,)}', tstzrange('2024-01-01+00', 'infinity'),
        'a:1A fat:2', 'fat & (rat | cat)', 4294967295, 'types', 'name', 'c', '16/B374D848')"#,
    r#"(2, false, 32767, -9223372036854775808, 'NaN', 'infinity', '-123456789012345678901234567890.1234567890', -0.01, E'\\ \' \n \t ü 漢 🦀', '', '', '', 'infinity', '00:00', '00:00+14',
        '-infinity', 'infinity', '-1 mons +1 days -00:00:01', '00000000-0000-0000-0000-000000000000', 'null', 'null', '', '::1', '::/0', 'ff:ff:ff:ff:ff:ff', B'000', B'',
        '(NaN,-0)', '((-1,-1),(1,1))', '{}', '{}', 'sad', '{}', ROW(NULL, NULL, NULL)::pair, '{}', 0, 'empty', '{}', '(,)', '', '', 0, NULL, '', '', '0/0')"#,
    "(3)",
    r#"(4, NULL, 0, 0, '-0', '-0', 'Infinity', 0, repeat('long ', 3000), 'v', 'c    ', decode(repeat('00', 5000), 'hex'), '4713-01-01 BC', '24:00', '00:00:00-14', '294276-12-31 23:59:59.999999',
        '4714-11-24 00:00:00+00 BC', '178000000 years', NULL, '[]', '"\ud83e\udd80"', '<?xml version="1.0"?><b/>', '1.2.3.4', '1.2.3.4/32', NULL, B'111', NULL, NULL, NULL, '[0:2]={1,2,3}', '{NULL}', 'happy', '{{sad},{happy}}',
        ROW(-1, NULL, 'so so')::pair, NULL, 50, '(,3]', '{(,)}', '[2024-01-01 00:00+00,2024-01-02 00:00+00]', '''a b''', '!x', 1, 'pg_catalog.pg_class', 'x', '~', NULL)"#,
];

/// Settings of sessions: each writes the same rows.
const SETTINGS: &[&str] = &[
    "",
    "-c datestyle=German -c timezone=Asia/Kolkata -c extra_float_digits=-15 -c intervalstyle=sql_standard -c bytea_output=escape",
    "-c datestyle=SQL,DMY -c timezone=America/St_Johns -c extra_float_digits=0 -c intervalstyle=iso_8601 -c xmloption=document",
    "-c search_path=pg_catalog,public -c quote_all_identifiers=on -c lc_monetary=C -c default_transaction_isolation=serializable",
];

#[tokio::test]
async fn values_arrive_exactly() {
    let mut stage = Stage::open(SCHEMA).await;
    defaults(&stage).await;
    types(&stage).await;
    long_text(&stage).await;
    encodings(&stage).await;
    strings(&stage).await;
    stage.enter("new-primary").await;
    defaults(&stage).await;
    types(&stage).await;
}

async fn defaults(stage: &Stage) {
    let story = stage.story("defaults that are evaluated once").await;
    let client = stage.client().await;
    client.batch_execute("TRUNCATE defaults").await.expect("empties");
    client.batch_execute("INSERT INTO defaults (id) SELECT generate_series(1, 5)").await.expect("inserts");
    client.execute("INSERT INTO defaults VALUES ($1)", &[&6]).await.expect("inserts");
    client.execute("UPDATE defaults SET r = random(), u = gen_random_uuid(), at = now(), clock = clock_timestamp(), n = nextval('numbers') WHERE id > $1", &[&4]).await.expect("updates");
    story.exact_rows("defaults", 6).await;
}

async fn types(stage: &Stage) {
    for settings in SETTINGS {
        let story = stage.story("every type, whatever the session's settings").await;
        let client = stage.client_with(settings).await;
        client.batch_execute("TRUNCATE types").await.expect("empties");
        client.batch_execute("SET xmloption = content").await.expect("sets");
        for (number, row) in ROWS.iter().enumerate() {
            // As a Query or as Parse, Bind and Execute: a hidden column travels as text or in binary.
            let insert = format!("INSERT INTO types VALUES {row}");
            let inserted = if number % 2 == 0 {
                client.batch_execute(&insert).await
            } else {
                client.execute(&insert, &[]).await.map(drop)
            };
            inserted.unwrap_or_else(|e| panic!("{settings}: row {number}: {e:?}"));
        }
        client.execute("UPDATE types SET b = NOT b WHERE id > $1", &[&1]).await.expect("updates");
        story.exact_rows("types", ROWS.len()).await;
    }
}

async fn long_text(stage: &Stage) {
    let story = stage.story("texts of 1 MB").await;
    let client = stage.client().await;
    let long: String = "äöü 漢字 'quoted' \\ \n".chars().cycle().take(1_000_000).collect();
    client.execute("INSERT INTO texts VALUES ($1, $2)", &[&1, &long]).await.expect("inserts");
    client
        .batch_execute(&format!("INSERT INTO texts VALUES (2, '{}')", long.replace('\'', "''")))
        .await
        .expect("inserts");
    client.execute("UPDATE texts SET t = t || $1 WHERE id = 2", &[&"end"]).await.expect("updates");
    story.exact_rows("(SELECT id, length(t), md5(t) FROM texts)", 2).await;
}

async fn encodings(stage: &Stage) {
    for encoding in ["LATIN1", "WIN1252", "SQL_ASCII"] {
        let story = stage.story("another client_encoding").await;
        let mut client = stage.raw().await;
        ask(&mut client, "TRUNCATE texts").await;
        ask(&mut client, &format!("SET client_encoding = {encoding}")).await;
        let umlaut: &[u8] = if encoding == "SQL_ASCII" { b"\xC3\xA4" } else { b"\xE4" };
        let sql = [b"INSERT INTO texts VALUES (1, '", umlaut, b"')"].concat();
        client.send(&crate::common::raw::query_bytes(&sql)).await;
        assert_eq!(crate::stage::said(&client.until_ready(1).await), "C(INSERT 0 1) Z(I)", "{encoding}");
        // A character that the client's encoding lacks is no reason for a write to fail.
        assert_eq!(
            ask(&mut client, "INSERT INTO texts VALUES (2, chr(28450)), (3, U&'\\6F22')").await,
            "C(INSERT 0 2) Z(I)",
            "{encoding}"
        );
        let values = [Some(&b"4"[..]), Some(umlaut)];
        let insert = [
            crate::common::raw::parse("", "INSERT INTO texts VALUES ($1, $2)", &[]),
            crate::common::raw::bind("", "", &[], &values, &[]),
            crate::common::raw::execute("", 0),
        ];
        assert_eq!(crate::stage::pipeline(&mut client, &insert).await, "1 2 C(INSERT 0 1) Z(I)", "{encoding}");
        story.exact(&[("texts", &["(1,ä)", "(2,漢)", "(3,漢)", "(4,ä)"])]).await;
    }
}

async fn strings(stage: &Stage) {
    let story = stage.story("standard_conforming_strings off").await;
    let mut client = stage.raw().await;
    ask(&mut client, "TRUNCATE texts").await;
    assert_eq!(
        ask(&mut client, "SET standard_conforming_strings = off; SET escape_string_warning = off").await,
        "C(SET) C(SET) Z(I)"
    );
    assert_eq!(ask(&mut client, "BEGIN").await, "C(BEGIN) Z(T)");
    assert_eq!(ask(&mut client, "INSERT INTO texts VALUES (1, 'a')").await, "C(INSERT 0 1) Z(T)");
    assert_eq!(ask(&mut client, "ROLLBACK").await, "C(ROLLBACK) Z(I)");
    assert_eq!(ask(&mut client, "BEGIN").await, "C(BEGIN) Z(T)");
    assert_eq!(ask(&mut client, "INSERT INTO texts VALUES (2, 'b')").await, "C(INSERT 0 1) Z(T)");
    assert_eq!(ask(&mut client, "COMMIT").await, "C(COMMIT) Z(I)");
    story.exact(&[("texts", &["(2,b)"])]).await;

    let story = stage.story("backslashes that escape").await;
    assert_eq!(ask(&mut client, r"INSERT INTO texts VALUES (3, '\'; COMMIT; --')").await, "C(INSERT 0 1) Z(I)");
    assert_eq!(
        ask(&mut client, r"BEGIN; INSERT INTO texts VALUES (4, '\'); COMMIT; --'); ROLLBACK").await,
        "C(BEGIN) C(INSERT 0 1) C(ROLLBACK) Z(I)"
    );
    assert_eq!(
        ask(&mut client, r"BEGIN; INSERT INTO texts VALUES (5, '\''); COMMIT").await,
        "C(BEGIN) C(INSERT 0 1) C(COMMIT) Z(I)"
    );
    story.exact(&[("texts", &["(2,b)", "(3,\"'; COMMIT; --\")", "(5,')"])]).await;
}
