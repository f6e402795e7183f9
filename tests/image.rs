//! Images are exact: rows of every type family go from old to new by the hidden column, decoding, translation and the statements for the
//! mirror, whatever the client's settings, and are then the same text and the same bytes on both sides.

mod catalog_support;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use catalog_support::Server;
use crossfade::catalog::{self, Catalog, Table};
use crossfade::phase::Side;
use crossfade::plan::image::{self, Row, Texts};
use crossfade::sql::facts::Name;
use tokio_postgres::types::{Format, IsNull, Kind, ToSql, Type};
use tokio_postgres::{Client, SimpleQueryMessage};

/// A value as it is, in the format of the protocol that it has (1 binary, 0 text).
#[derive(Debug)]
struct Raw(Option<Bytes>, i16);

impl ToSql for Raw {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match &self.0 {
            None => Ok(IsNull::Yes),
            Some(bytes) => {
                out.extend_from_slice(bytes);
                Ok(IsNull::No)
            }
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn to_sql_checked(
        &self,
        kind: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.to_sql(kind, out)
    }

    fn encode_format(&self, _: &Type) -> Format {
        if self.1 == 1 { Format::Binary } else { Format::Text }
    }
}

/// Executes a statement of an image with these parameters; the rows that it returns.
async fn run(
    client: &Client,
    statement: &image::Statement,
    parameters: Vec<Option<Bytes>>,
) -> Result<Vec<tokio_postgres::Row>, tokio_postgres::Error> {
    assert_eq!(statement.parameter_types.len(), parameters.len());
    assert_eq!(statement.formats.len(), parameters.len());
    let kind =
        |oid: &u32| Type::from_oid(*oid).unwrap_or_else(|| Type::new("_".into(), *oid, Kind::Simple, "_".into()));
    let kinds: Vec<Type> = statement.parameter_types.iter().map(kind).collect();
    let prepared = client.prepare_typed(&statement.text, &kinds).await?;
    let raw: Vec<Raw> =
        parameters.into_iter().zip(&statement.formats).map(|(value, format)| Raw(value, *format)).collect();
    let parameters: Vec<&(dyn ToSql + Sync)> = raw.iter().map(|value| value as _).collect();
    client.query(&prepared, &parameters).await
}

const TYPES: &str = r#"
CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree; CREATE EXTENSION seg; CREATE EXTENSION cube;
CREATE SCHEMA "Odd ""schema";
CREATE TYPE mood AS ENUM ('sad', 'ok', 'glücklich');
CREATE TYPE "Odd ""schema"."In ner" AS (m mood, n numeric, t text);
CREATE TYPE outer_type AS (a int, "B" "Odd ""schema"."In ner"[], gone int, c "Odd ""schema"."In ner", r int4range);
ALTER TYPE outer_type DROP ATTRIBUTE gone;
CREATE DOMAIN positive AS int CHECK (value > 0);
CREATE DOMAIN moods AS mood[] CHECK (array_length(value, 1) < 9);
CREATE DOMAIN composite_domain AS outer_type;
CREATE DOMAIN padded AS char(6);
CREATE TYPE mood_range AS RANGE (subtype = mood);
CREATE TYPE float_range AS RANGE (subtype = float8, subtype_diff = float8mi);
CREATE TYPE composite_range AS RANGE (subtype = "Odd ""schema"."In ner");
"#;

/// Column types, and rows of literals for them.
const COLUMNS: &[(&str, &[&str])] = &[
    ("int2", &["-32768", "NULL"]),
    ("int4", &["2147483647", "0"]),
    ("int8", &["-9223372036854775808", "1"]),
    ("numeric", &["'-Infinity'", "'Infinity'"]),
    ("numeric", &["'NaN'", "'123456789012345678901234567890.000100'"]),
    ("numeric(10,2)", &["'1.50'", "'-0.01'"]),
    ("float4", &["'-0'", "'NaN'", "1.1754944e-38", "0.1"]),
    ("float8", &["'-0'", "'infinity'", "0.1::float8 + 0.2", "5e-324"]),
    ("text", &["''", "'grüße 東京 𝄞 €'", r"'back\slash ''quote'' and' || chr(10) || chr(9)"]),
    ("varchar(20)", &["'  blanks  '", "'東京'"]),
    ("char(5)", &["'a'", "'ab  '", "'é'"]),
    ("bpchar", &["'a  '::bpchar", "'b'"]),
    ("\"char\"", &["'x'", "NULL"]),
    ("name", &["'someName'"]),
    ("bytea", &[r"'\x00ff5c27'", "''", r"convert_to('東','UTF8')"]),
    ("bool", &["true", "false", "NULL"]),
    ("uuid", &["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"]),
    ("json", &[r#"'{"b": 1,  "a": [null, "東\u0041"], "b": 2}'"#, "'null'"]),
    ("jsonb", &[r#"'{"b": 1.00,  "a": [null, "東"], "b": 2}'"#, "'\"€\"'", "NULL"]),
    ("jsonpath", &["'$.a[*] ? (@ > 1)'"]),
    ("xml", &["'<a>é<b/></a>'", r#"'<?xml version="1.0" encoding="latin1"?><a/>'"#, "'x<b/>y'"]),
    ("int4[]", &["'{1,NULL,3}'", "'[5:6][-1:0]={{1,2},{3,4}}'", "'{}'"]),
    ("text[]", &[r#"'{"a,b","NULL",NULL,"\"東","x\\y"}'"#]),
    ("timestamptz[]", &["'{2020-01-02 03:04:05.678+00,infinity}'"]),
    ("mood", &["'glücklich'", "'ok'"]),
    ("mood[]", &["'{sad,NULL,glücklich}'", "'{{ok},{sad}}'"]),
    ("\"Odd \"\"schema\".\"In ner\"", &["ROW('ok', 1.50, 'x,y')", "ROW(NULL, 'NaN', NULL)"]),
    (
        "outer_type",
        &[r#"ROW(1, ARRAY[ROW('ok', 2, '東')::"Odd ""schema"."In ner", NULL], ROW('sad', 0, ''), '[1,5)')"#, "NULL"],
    ),
    (
        "outer_type[]",
        &[r#"ARRAY[ROW(1, ARRAY[ROW('ok', 2, 'q')::"Odd ""schema"."In ner"], NULL, NULL)::outer_type, NULL]"#],
    ),
    ("positive", &["7"]),
    ("positive[]", &["'{1,2}'"]),
    ("moods", &["'{ok,sad}'"]),
    ("moods[]", &[r#"ARRAY['{ok,sad}'::moods]"#]),
    ("composite_domain", &["ROW(2, NULL, ROW('ok', 3, 'z'), 'empty')::outer_type"]),
    ("padded", &["'a'"]),
    ("int4range", &["'[1,5)'", "'empty'", "'(,)'"]),
    ("numrange", &["'(1.50,2.0]'"]),
    ("tstzrange", &["'[2020-01-01 00:00+00,)'"]),
    ("mood_range", &["'[sad,ok)'"]),
    ("float_range", &["'(-0,0.30000000000000004]'"]),
    (
        "composite_range",
        &[r#"composite_range(ROW('sad',1,'a')::"Odd ""schema"."In ner", ROW('ok',1,'a')::"Odd ""schema"."In ner")"#],
    ),
    ("mood_range[]", &["'{\"[sad,ok)\",empty}'"]),
    ("int4multirange", &["'{[1,3),[5,9)}'", "'{}'"]),
    ("mood_multirange", &["'{[sad,ok)}'"]),
    (
        "composite_multirange",
        &[
            r#"composite_multirange(composite_range(ROW('sad',1,'a')::"Odd ""schema"."In ner", ROW('ok',1,'a')::"Odd ""schema"."In ner"))"#,
        ],
    ),
    ("inet", &["'192.168.0.1/24'", "'::1'"]),
    ("cidr", &["'10.0.0.0/8'"]),
    ("macaddr", &["'08:00:2b:01:02:03'"]),
    ("macaddr8", &["'08:00:2b:01:02:03:04:05'"]),
    ("bit(3)", &["B'101'"]),
    ("varbit", &["B'1010101010'", "B''"]),
    ("date", &["'2020-02-29'", "'infinity'", "'0044-03-15 BC'"]),
    ("time", &["'24:00'", "'01:02:03.000001'"]),
    ("timetz", &["'01:02:03.4+13:45'"]),
    ("timestamp", &["'-infinity'", "'4713-01-01 BC'", "'294276-12-31 23:59:59.999999'"]),
    ("timestamptz", &["'2020-12-31 23:59:59.999999+00'", "'infinity'", "'0044-03-15 12:00 BC'"]),
    ("interval", &["'1 year -2 mons +3 days -04:05:06.000007'", "'30 days'"]),
    ("money", &["'-1234.56'"]),
    ("point", &["'(0.1,-0)'"]),
    ("line", &["'{1,2,3}'"]),
    ("lseg", &["'[(0,0),(1,0.1)]'"]),
    ("box", &["'(2,2),(0,0.1)'"]),
    ("path", &["'[(0,0),(1,1)]'", "'((0,0),(1,1))'"]),
    ("polygon", &["'((0,0),(1,1),(2,0))'"]),
    ("circle", &["'<(0,0.1),3>'"]),
    ("tsvector", &["'''東'':1A,2 b:3C'"]),
    ("tsquery", &["'a & !(b | c:*A) <-> d'"]),
    ("hstore", &["'a=>1, b=>NULL, \"東\"=>\"\"'"]),
    ("citext", &["'GrÜße'"]),
    ("ltree", &["'Top.Science.Astronomy'"]),
    ("lquery", &["'Top.*{1,2}.!a'"]),
    ("seg", &["'1.0 .. 2.50'"]),
    ("cube", &["'(0.1,2),(3,4)'"]),
    ("pg_lsn", &["'16/B374D848'"]),
    ("oid", &["4294967295"]),
    (
        "regclass",
        &["'pg_class'::regclass", "'\"Odd \"\"schema\".\"t 2\"'::regclass", "0::regclass", "123456::oid::regclass"],
    ),
    ("regrole", &["'postgres'"]),
    ("regnamespace", &["'\"Odd \"\"schema\"'"]),
    ("int2vector", &["'1 2 3'"]),
    ("oidvector", &["'1 2'"]),
    ("tid", &["'(3,4)'"]),
    ("xid", &["'7'"]),
    ("xid8", &["'8'"]),
    ("pg_snapshot", &["'10:20:10,14'"]),
    ("text", &["repeat('東京 long ', 100000)"]),
];

const ROWS: usize = 4;

/// The columns that old's version knows: multiranges, infinite numerics and the binary form of cube came with 14.
async fn known(old: &Client) -> Vec<(&'static str, &'static [&'static str])> {
    let multiranges: bool = old.query_one("SELECT to_regtype('int4multirange') IS NOT NULL", &[]).await.unwrap().get(0);
    let later = |(kind, values): &(&str, &[&str])| {
        kind.contains("multirange") || *kind == "cube" || (*kind == "numeric" && values.contains(&"'Infinity'"))
    };
    COLUMNS.iter().copied().filter(|column| multiranges || !later(column)).collect()
}

/// The definition of a table with these columns; on new the columns stand in the other order.
fn definition(name: &str, columns: &[(&str, &[&str])], reverse: bool) -> String {
    let mut columns: Vec<String> =
        columns.iter().enumerate().map(|(at, (kind, _))| format!("\"C {at}\" {kind}")).collect();
    columns.insert(0, "id int PRIMARY KEY".into());
    columns.push("\"doubled\" int GENERATED ALWAYS AS (id * 2) STORED".into());
    columns.push("serial bigint GENERATED BY DEFAULT AS IDENTITY".into());
    if reverse {
        columns.reverse();
    }
    format!("CREATE TABLE {name} ({})", columns.join(", "))
}

async fn filled(client: &Client, name: &str, columns: &[(&str, &[&str])]) {
    for row in 0..ROWS {
        let values: Vec<&str> = columns.iter().map(|(_, values)| values[row % values.len()]).collect();
        let names: Vec<String> = (0..columns.len()).map(|at| format!("\"C {at}\"")).collect();
        let insert = format!("INSERT INTO {name} (id, {}) VALUES ({row}, {})", names.join(", "), values.join(", "));
        client.batch_execute(&insert).await.unwrap_or_else(|error| panic!("{insert}: {error:?}"));
    }
}

async fn both(old: &Client, new: &Client) {
    // The OIDs of what users make must differ between the sides.
    for at in 0..10 {
        old.batch_execute(&format!("CREATE TYPE dummy_{at} AS ENUM ('x'); CREATE TABLE dummy_table_{at} ()"))
            .await
            .unwrap();
    }
    for (client, reverse) in [(old, false), (new, true)] {
        client.batch_execute(TYPES).await.unwrap();
        client.batch_execute("CREATE TABLE \"Odd \"\"schema\".\"t 2\" ()").await.unwrap();
        client.batch_execute(&definition("everything", &known(old).await, reverse)).await.unwrap();
    }
}

async fn load(old: &Client, new: &Client) -> Catalog {
    catalog::load(old, new, None, &[]).await.unwrap()
}

fn table(catalog: &Catalog, name: &str) -> Arc<Table> {
    catalog.by_name.old[name][0].clone()
}

/// All rows on old, as images by way of RETURNING, through both result formats.
async fn images(client: &Client, table: &Table, texts: Texts) -> Vec<Row> {
    let hidden = image::expression(table, Side::Old, "\"Row\"", texts, false);
    let update = format!("UPDATE {} AS \"Row\" SET id = id RETURNING {hidden}", table.qualified(Side::Old));
    let decode = |field: &[u8], binary: bool| {
        let fields = image::hidden(field, binary).unwrap();
        assert_eq!(fields.tableoid, table.oid.old);
        image::row(table, Side::Old, fields).unwrap()
    };
    let mut binary: Vec<Row> =
        client.query(&update, &[]).await.unwrap().iter().map(|row| decode(row.get(0), true)).collect();
    let text = client.simple_query(&update).await.unwrap();
    let mut text: Vec<Row> = text
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(decode(row.get(0).unwrap().as_bytes(), false)),
            _ => None,
        })
        .collect();
    binary.sort_by_key(|row| row.values[0].clone());
    text.sort_by_key(|row| row.values[0].clone());
    assert_eq!(binary, text);
    assert_eq!(binary.len(), ROWS);
    binary
}

async fn put(new: &Client, table: &Table, rows: &[Row]) {
    let upsert = image::upsert(table, Side::New, rows.len());
    let translated = rows.iter().map(|row| image::translate(table, Side::Old, row.clone()));
    let parameters = translated.flat_map(|row| image::parameters(table, Side::New, &row)).collect();
    run(new, &upsert, parameters).await.unwrap();
}

/// Every row as text, the columns by name.
async fn texts_of(client: &Client, table: &Table, side: Side) -> Vec<String> {
    client.batch_execute("RESET ALL; SET extra_float_digits = 3").await.unwrap();
    let names: Vec<String> = table.columns.iter().map(|column| catalog::quote(column.name.get(side))).collect();
    let query =
        format!("SELECT t::text FROM (SELECT {} FROM {} ORDER BY id) t", names.join(", "), table.qualified(side));
    client.query(&query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// The images of the rows on new are those of old, translated.
async fn same_bytes(new: &Client, table: &Table, rows: &[Row]) {
    let select = image::select(table, Side::New, rows.len(), Texts::AsSession, " FOR NO KEY UPDATE");
    let keys = rows.iter().flat_map(|row| image::key_parameters(table, row)).collect();
    let mut found: Vec<Row> = run(new, &select, keys)
        .await
        .unwrap()
        .iter()
        .map(|row| image::row(table, Side::New, image::hidden(row.get(0), true).unwrap()).unwrap())
        .collect();
    found.sort_by_key(|row| row.values[0].clone());
    let expected: Vec<Row> = rows.iter().map(|row| image::translate(table, Side::Old, row.clone())).collect();
    for (found, expected) in found.iter().zip(&expected) {
        for (at, column) in table.columns.iter().enumerate() {
            assert_eq!(found.values[at], expected.values[at], "column {} {}", column.name.new, column.kind.name.new);
        }
        let back = image::translate(table, Side::New, found.clone());
        assert!(rows.contains(&back), "translated there and back");
    }
    assert_eq!(found.len(), expected.len());
}

const MIRROR: &str = "SET session_replication_role = replica; SET search_path = ''";
const ODD: &str = "SET DateStyle = 'SQL, DMY'; SET extra_float_digits = -3; SET TimeZone = 'Pacific/Chatham';
    SET IntervalStyle = 'iso_8601'; SET bytea_output = 'escape'; SET xmloption = document; SET search_path = \"Odd \"\"schema\"";

#[tokio::test]
async fn every_type_arrives_exactly_whatever_the_settings_of_the_client() {
    let server = Server::start().await;
    let (old, new) = server.pair(true).await;
    both(&old, &new).await;
    filled(&old, "everything", &known(&old).await).await;
    let catalog = load(&old, &new).await;
    let table = table(&catalog, "everything");
    assert_eq!(table.opaque, None);
    assert_eq!(image::texts(&table, "UTF8", true), Some(Texts::AsSession));
    assert_eq!(image::texts(&table, "UTF8", false), None, "text inside arrays cannot be had in another encoding");
    let user_type = table.columns.iter().find(|column| column.kind.name.old.contains("outer_type")).unwrap();
    assert_ne!(user_type.kind.oid.old, user_type.kind.oid.new, "the test must need translation");
    for settings in ["", ODD] {
        new.batch_execute("TRUNCATE everything").await.unwrap();
        old.batch_execute(settings).await.unwrap();
        new.batch_execute(MIRROR).await.unwrap();
        let rows = images(&old, &table, Texts::AsSession).await;
        put(&new, &table, &rows).await;
        put(&new, &table, &rows).await;
        same_bytes(&new, &table, &rows).await;
        let (there, here) = (texts_of(&new, &table, Side::New).await, texts_of(&old, &table, Side::Old).await);
        assert_eq!(there.len(), ROWS);
        assert_eq!(there, here);
    }
}

#[tokio::test]
async fn text_that_the_encoding_of_the_client_cannot_represent_arrives_too() {
    const LEAVES: &[(&str, &[&str])] = &[
        ("text", &["'東京 𝄞'", "NULL", "'é'"]),
        ("varchar(9)", &["'€'", "'a'"]),
        ("char(4)", &["'東'", "'a'"]),
        ("bpchar", &["'東  '::bpchar"]),
        ("padded", &["'東'"]),
        ("json", &["'{\"東\":  1}'"]),
        ("jsonb", &["'{\"東\": \"é\"}'", "NULL"]),
        ("xml", &["'<a>東</a>'"]),
        ("mood", &["'glücklich'", "NULL"]),
        ("citext", &["'東É'"]),
        ("name", &["'東'"]),
        ("bytea", &["'\\xe69db1'"]),
        ("timestamptz", &["'2020-12-31 23:59:59.999999+00'"]),
        ("float8[]", &["'{0.1,NaN}'"]),
        ("regclass", &["'\"Odd \"\"schema\".\"t 2\"'::regclass"]),
        ("int4range", &["'[1,2]'"]),
    ];
    let server = Server::start().await;
    let (old, new) = server.pair(true).await;
    both(&old, &new).await;
    for (client, reverse) in [(&old, false), (&new, true)] {
        client.batch_execute(&definition("leaves", LEAVES, reverse)).await.unwrap();
    }
    filled(&old, "leaves", LEAVES).await;
    let catalog = load(&old, &new).await;
    let table = table(&catalog, "leaves");
    assert_eq!(table.opaque, None);
    assert_eq!(image::texts(&table, "UTF8", false), Some(Texts::Utf8));
    assert_eq!(
        image::texts(&table, "EUC_JP", true),
        None,
        "a conversion that may fail is never part of a hidden column"
    );
    new.batch_execute(MIRROR).await.unwrap();
    let expected = images(&old, &table, Texts::AsSession).await;
    for encoding in ["LATIN1", "SQL_ASCII", "WIN1251"] {
        new.batch_execute("TRUNCATE public.leaves").await.unwrap();
        old.batch_execute(&format!("SET client_encoding = '{encoding}'; {ODD}")).await.unwrap();
        let rows = images(&old, &table, Texts::Utf8).await;
        assert_eq!(rows, expected, "{encoding}");
        assert_eq!(images(&old, &table, Texts::Stored).await, expected, "{encoding}");
        put(&new, &table, &rows).await;
        old.batch_execute("RESET ALL; SET client_encoding = 'UTF8'").await.unwrap();
        assert_eq!(texts_of(&new, &table, Side::New).await, texts_of(&old, &table, Side::Old).await);
        new.batch_execute(MIRROR).await.unwrap();
    }
}

/// A server whose encoding is SQL_ASCII holds bytes of which nobody knows what they mean; a UTF-8 client reads only those that are UTF-8.
#[tokio::test]
async fn bytes_without_an_encoding_do_not_make_a_write_fail() {
    let server = Server::start().await;
    let (_, new) = server.pair(true).await;
    new.batch_execute("CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'").await.unwrap();
    let old = server.client("ascii").await;
    old.batch_execute(include_str!("../src/ledger/schema.sql")).await.unwrap();
    for client in [&old, &new] {
        client.batch_execute("CREATE TABLE words (id int PRIMARY KEY, word text)").await.unwrap();
    }
    let catalog = load(&old, &new).await;
    let table = table(&catalog, "words");
    let texts = image::texts(&table, &catalog.encoding.old, true).unwrap();
    assert_eq!(texts, Texts::Stored);
    let insert = |bytes: &str, texts| {
        let hidden = image::expression(&table, Side::Old, "words", texts, false);
        format!(
            "INSERT INTO words VALUES (1, convert_from('{bytes}', 'SQL_ASCII')) ON CONFLICT (id) DO UPDATE SET word = excluded.word RETURNING {hidden}"
        )
    };
    assert!(
        old.query(&insert("\\xff", Texts::AsSession), &[]).await.is_err(),
        "why send functions cannot be used here"
    );
    for (bytes, accepted) in [("\\xe69db1", true), ("\\xff", false)] {
        let image: Vec<u8> = old.query_one(&insert(bytes, texts), &[]).await.unwrap().get(0);
        let row = image::row(&table, Side::Old, image::hidden(&image, true).unwrap()).unwrap();
        let upsert = image::upsert(&table, Side::New, 1);
        let put = run(&new, &upsert, image::parameters(&table, Side::New, &row)).await;
        assert_eq!(put.is_ok(), accepted, "the mirror refuses what is not UTF-8, and the debt says so");
    }
    let word: String = new.query_one("SELECT word FROM words", &[]).await.unwrap().get(0);
    assert_eq!(word, "東");
}

/// `TOTAL` in plan::splice claims that each byte of these encodings has a UTF-8 form.
#[tokio::test]
async fn encodings_that_are_taken_to_convert_always_do() {
    let server = Server::start().await;
    let client = server.client("postgres").await;
    for encoding in ["LATIN1", "LATIN2", "LATIN4", "LATIN5", "LATIN6", "LATIN9", "LATIN10", "KOI8R"] {
        let query = "SELECT count(convert_from(decode(lpad(to_hex(byte), 2, '0'), 'hex'), $1::text::name)) FROM generate_series(1, 255) byte";
        let converted: i64 =
            client.query_one(query, &[&encoding]).await.unwrap_or_else(|error| panic!("{encoding}: {error:?}")).get(0);
        assert_eq!(converted, 255);
    }
}

const KEYS: &str = r#"
CREATE EXTENSION citext SCHEMA public;
CREATE DOMAIN code AS varchar(8) CHECK (value <> '');
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TABLE one (id bigint PRIMARY KEY, note text);
CREATE TABLE two (a text, b uuid, note text, PRIMARY KEY (b, a));
CREATE TABLE only_key (a int, b mood, PRIMARY KEY (a, b));
CREATE TABLE by_domain (c code PRIMARY KEY, n numeric);
CREATE TABLE by_citext (c citext PRIMARY KEY, n int);
CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY IMMEDIATE, n int UNIQUE);
CREATE TABLE always (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int);
CREATE TABLE also_always (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY);
CREATE TABLE only_always (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
CREATE TABLE history (at timestamptz, what text);
CREATE TABLE parts (id int, region text, n int, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
CREATE TABLE parts_a PARTITION OF parts FOR VALUES IN ('a');
CREATE TABLE parts_b (n int, junk int, region text NOT NULL, id int NOT NULL);
ALTER TABLE parts_b DROP COLUMN junk;
ALTER TABLE parts ATTACH PARTITION parts_b FOR VALUES IN ('b');
"#;

async fn keyed(server: &Server) -> (Client, Client, Catalog) {
    let (old, new) = server.pair(true).await;
    old.batch_execute("CREATE TYPE dummy AS ENUM ('x')").await.unwrap();
    for client in [&old, &new] {
        client.batch_execute(KEYS).await.unwrap();
    }
    let catalog = load(&old, &new).await;
    new.batch_execute(MIRROR).await.unwrap();
    (old, new, catalog)
}

/// What a statement on old returns as images, translated for new.
async fn write(old: &Client, catalog: &Catalog, table: &Table, statement: &str, row: &str) -> Vec<Row> {
    let listed = catalog.partition_names.old.iter().any(|name| statement.contains(name));
    let hidden = image::expression(table, Side::Old, row, Texts::AsSession, listed);
    let rows = old.query(&format!("{statement} RETURNING {hidden}"), &[]).await;
    let rows = rows.unwrap_or_else(|error| panic!("{statement} RETURNING {hidden}: {error:?}"));
    let decode = |row: &tokio_postgres::Row| {
        let fields = image::hidden(row.get(0), true).unwrap();
        assert_eq!(catalog.by_oid.old[&fields.tableoid].number, table.number);
        image::translate(table, Side::Old, image::row(table, Side::Old, fields).unwrap())
    };
    rows.iter().map(decode).collect()
}

async fn same(old: &Client, new: &Client, table: &Table) -> i64 {
    let query = |side| {
        format!(
            "SELECT count(*), coalesce(string_agg(t::text, ' ' ORDER BY t::text), '') FROM {} t",
            table.qualified(side)
        )
    };
    let here = old.query_one(&query(Side::Old), &[]).await.unwrap();
    let there = new.query_one(&query(Side::New), &[]).await.unwrap();
    assert_eq!(here.get::<_, String>(1), there.get::<_, String>(1), "{}", table.label());
    here.get(0)
}

#[tokio::test]
async fn rows_are_put_and_deleted_by_every_kind_of_key() {
    let server = Server::start().await;
    let (old, new, catalog) = keyed(&server).await;
    let cases = [
        (
            "one",
            "INSERT INTO one VALUES (1, 'x'), (2, 'y'), (3, 'z')",
            "UPDATE one AS \"a b\" SET note = 'new'",
            "\"a b\"",
        ),
        (
            "two",
            "INSERT INTO two SELECT 'k' || n, gen_random_uuid() FROM generate_series(1, 3) n",
            "UPDATE two SET note = 'n'",
            "two",
        ),
        (
            "only_key",
            "INSERT INTO only_key VALUES (1, 'ok'), (1, 'sad'), (2, 'ok')",
            "UPDATE only_key SET a = a",
            "only_key",
        ),
        (
            "by_domain",
            "INSERT INTO by_domain VALUES ('a', 1), ('A', 'NaN'), ('b', 1.10)",
            "UPDATE by_domain SET n = n + 1",
            "by_domain",
        ),
        (
            "by_citext",
            "INSERT INTO by_citext VALUES ('a'), ('B'), ('ü')",
            "UPDATE by_citext SET n = 1, c = upper(c)",
            "by_citext",
        ),
        ("always", "INSERT INTO always (n) VALUES (1), (2), (3)", "UPDATE always SET n = n + 1", "always"),
        ("parts", "INSERT INTO parts VALUES (1, 'a', 1), (2, 'b', 2), (3, 'b', 3)", "UPDATE parts SET n = 7", "parts"),
    ];
    for (name, insert, update, row) in cases {
        let table = table(&catalog, name);
        assert_eq!(table.opaque, None);
        assert!(!image::needs_replace(&table, Side::New), "{name}");
        for (statement, row) in [(insert, name), (update, row), (update, row)] {
            let rows = write(&old, &catalog, &table, statement, row).await;
            assert_eq!(rows.len(), 3);
            let parameters = rows.iter().flat_map(|row| image::parameters(&table, Side::New, row)).collect();
            run(&new, &image::upsert(&table, Side::New, 3), parameters).await.unwrap();
            assert_eq!(same(&old, &new, &table).await, 3);
        }
        let rows = write(&old, &catalog, &table, &format!("DELETE FROM {name}"), name).await;
        let missing = image::insert_missing(&table, Side::New, 1);
        run(&new, &missing, image::parameters(&table, Side::New, &rows[0])).await.unwrap();
        run(&new, &image::delete(&table, Side::New, 1), image::key_parameters(&table, &rows[0])).await.unwrap();
        run(&new, &missing, image::parameters(&table, Side::New, &rows[0])).await.unwrap();
        let keys = rows.iter().flat_map(|row| image::key_parameters(&table, row)).collect();
        run(&new, &image::delete(&table, Side::New, 3), keys).await.unwrap();
        assert_eq!(same(&old, &new, &table).await, 0);
    }
}

#[tokio::test]
async fn rows_go_through_partitions_whose_columns_stand_in_another_order() {
    let server = Server::start().await;
    let (old, new, catalog) = keyed(&server).await;
    let table = table(&catalog, "parts");
    let statements = [
        ("INSERT INTO parts_b (id, region, n) VALUES (5, 'b', 6)", "parts_b"),
        ("UPDATE parts_b AS p SET n = 8", "p"),
        ("INSERT INTO parts VALUES (1, 'b', 2)", "parts"),
    ];
    for (statement, row) in statements {
        for row in write(&old, &catalog, &table, statement, row).await {
            run(&new, &image::upsert(&table, Side::New, 1), image::parameters(&table, Side::New, &row)).await.unwrap();
        }
        assert!(same(&old, &new, &table).await > 0);
    }
}

#[tokio::test]
async fn deferrable_keys_and_identities_are_replaced_and_history_is_appended() {
    let server = Server::start().await;
    let (old, new, catalog) = keyed(&server).await;
    let cases = [
        ("deferred", "INSERT INTO deferred VALUES (1, 1), (2, 2)", "UPDATE deferred SET n = n + 10"),
        ("also_always", "INSERT INTO also_always (id) VALUES (1), (2)", "UPDATE also_always SET n = DEFAULT"),
        (
            "only_always",
            "INSERT INTO only_always OVERRIDING SYSTEM VALUE VALUES (1), (2)",
            "UPDATE only_always SET id = DEFAULT WHERE false",
        ),
    ];
    for (name, insert, update) in cases {
        let table = table(&catalog, name);
        assert!(image::needs_replace(&table, Side::New), "{name}");
        for statement in [insert, update] {
            let rows = write(&old, &catalog, &table, statement, name).await;
            if rows.is_empty() {
                continue;
            }
            let keys = rows.iter().flat_map(|row| image::key_parameters(&table, row)).collect();
            let parameters = rows.iter().flat_map(|row| image::parameters(&table, Side::New, row)).collect();
            run(&new, &image::delete(&table, Side::New, rows.len()), keys).await.unwrap();
            run(&new, &image::insert(&table, Side::New, rows.len()), parameters).await.unwrap();
            assert_eq!(same(&old, &new, &table).await, 2, "{name}");
        }
    }
    let table = table(&catalog, "history");
    assert_eq!(table.key, None);
    let rows = write(&old, &catalog, &table, "INSERT INTO history VALUES (now(), 'a'), (NULL, NULL)", "history").await;
    let parameters = rows.iter().flat_map(|row| image::parameters(&table, Side::New, row)).collect();
    run(&new, &image::insert(&table, Side::New, 2), parameters).await.unwrap();
    assert_eq!(same(&old, &new, &table).await, 2);
}

/// Deleting by key reads the key's index for one key and for many, with a custom and with a generic plan.
#[tokio::test]
async fn keys_are_found_by_their_index() {
    let server = Server::start().await;
    let (_, new, catalog) = keyed(&server).await;
    new.batch_execute(
        "INSERT INTO public.one SELECT n, 'x' FROM generate_series(1, 50000) n;
         INSERT INTO public.two SELECT n::text, gen_random_uuid() FROM generate_series(1, 50000) n;
         INSERT INTO public.by_domain SELECT n FROM generate_series(1, 50000) n;
         INSERT INTO public.by_citext SELECT n FROM generate_series(1, 50000) n; ANALYZE",
    )
    .await
    .unwrap();
    for name in ["one", "two", "by_domain", "by_citext"] {
        let table = table(&catalog, name);
        let sample = format!(
            "SELECT {} FROM {} LIMIT 1",
            image::expression(&table, Side::New, "t", Texts::AsSession, false),
            format_args!("{} t", table.qualified(Side::New))
        );
        let image: Vec<u8> = new.query_one(&sample, &[]).await.unwrap().get(0);
        let row = image::row(&table, Side::New, image::hidden(&image, true).unwrap()).unwrap();
        for mode in ["force_custom_plan", "force_generic_plan"] {
            new.batch_execute(&format!("SET plan_cache_mode = {mode}")).await.unwrap();
            for keys in [1, 2, 50] {
                let mut statement = image::delete(&table, Side::New, keys);
                let mut parameters = Vec::new();
                (0..keys).for_each(|_| parameters.extend(image::key_parameters(&table, &row)));
                statement.text.insert_str(0, "EXPLAIN ");
                let plan: Vec<String> =
                    run(&new, &statement, parameters).await.unwrap().iter().map(|row| row.get(0)).collect();
                let plan = plan.join("\n");
                assert!(
                    plan.contains(&format!("{name}_pkey")) && !plan.contains("Seq Scan"),
                    "{name} {mode} {keys}:\n{plan}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_row_of_another_definition_is_refused() {
    let server = Server::start().await;
    let (old, _new, catalog) = keyed(&server).await;
    let table = table(&catalog, "one");
    let hidden = image::expression(&table, Side::Old, "one", Texts::AsSession, false);
    for (change, said) in [
        ("ALTER TABLE one ADD COLUMN more int", "3 columns"),
        ("ALTER TABLE one DROP COLUMN more; ALTER TABLE one ALTER COLUMN id TYPE numeric", "column id"),
    ] {
        old.batch_execute(change).await.unwrap();
        let insert = format!("INSERT INTO one VALUES (1) ON CONFLICT (id) DO UPDATE SET note = 'x' RETURNING {hidden}");
        let image: Vec<u8> = old.query_one(&insert, &[]).await.unwrap().get(0);
        let error = image::row(&table, Side::Old, image::hidden(&image, true).unwrap()).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }
    let resolved = catalog.resolve(Side::Old, &Name { schema: None, name: "one".into() });
    assert!(matches!(resolved, catalog::Resolution::Tables(tables) if tables.len() == 1));
}
