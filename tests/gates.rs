//! Gates of a move, each with its evidence from real servers; `crossfade phase`; what the history keeps.

mod common;

use std::process::Output;
use std::time::Duration;

use common::pair::{APP, DATABASE};
use common::{Databases, Pair, Proxy, until};
use serde_json::Value;

const SCHEMA: &str = "CREATE TABLE notes (id int PRIMARY KEY, body text NOT NULL DEFAULT '');
    CREATE TABLE history (at timestamptz NOT NULL DEFAULT now(), what text);
    CREATE SEQUENCE tickets;
    INSERT INTO notes SELECT n FROM generate_series(1, 100) n";

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).join("")
}

/// `crossfade phase NAME --dry-run --json`: its document, whose answer its exit status repeats.
async fn gates(proxy: &Proxy, name: &str) -> Value {
    let output = proxy.crossfade(&["phase", name, "--dry-run", "--json"]).await;
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    let open = document["open"].as_bool().expect("says whether it is open");
    assert_eq!(output.status.code(), Some(if open { 0 } else { 1 }), "{document}");
    document
}

/// How a gate stands; of one table, where it is named.
fn standing<'d>(document: &'d Value, gate: &str, table: Option<&str>) -> &'d str {
    let found = document["gates"].as_array().expect("gates").iter();
    let mut found =
        found.filter(|found| found["gate"] == gate && (table.is_none() || found["table"].as_str() == table));
    found.next().and_then(|found| found["standing"].as_str()).unwrap_or("absent")
}

fn closed(document: &Value) -> Vec<&str> {
    let gates = document["gates"].as_array().expect("gates").iter();
    gates.filter(|gate| gate["standing"] == "closed").filter_map(|gate| gate["gate"].as_str()).collect()
}

/// The newest entry of that side's history.
async fn last_entry(side: &crossfade::cluster::Cluster, event: &str) -> Value {
    let sql = format!("SELECT detail FROM crossfade.history WHERE event = '{event}' ORDER BY id DESC LIMIT 1");
    serde_json::from_str(&side.run(DATABASE, &sql).await.expect("reads")).expect("an entry")
}

#[tokio::test]
async fn each_gate_on_the_way_to_new_shows_its_evidence_and_the_history_keeps_it() {
    let mut pair = Pair::start("old", SCHEMA, "").await;
    // Nothing was installed for the dry run, and nothing is by it.
    let seen = gates(&pair.proxy, "dual-write").await;
    assert_eq!(closed(&seen), Vec::<&str>::new(), "{seen:#}");
    assert_eq!(standing(&seen, "keys", Some("public.history")), "warns");
    pair.proxy.set_phase("dual-write").await;
    let client = pair.client().await;
    pair.proxy.settle().await;
    // Repaired, and never compared.
    let seen = gates(&pair.proxy, "new-primary").await;
    assert_eq!(closed(&seen), ["verified"; 2], "{seen:#}");
    for table in ["public.notes", "public.history"] {
        assert_eq!(standing(&seen, "verified", Some(table)), "closed");
    }
    for gate in ["split", "reads"] {
        assert_eq!(standing(&seen, gate, None), "not-measured");
    }
    assert_eq!(standing(&seen, "soak", None), "warns", "seven days are the default");
    let moved = pair.proxy.crossfade(&["phase", "new-primary"]).await;
    assert_eq!(moved.status.code(), Some(1), "{}", text(&moved));
    assert!(text(&moved).contains("public.notes: was not compared yet; run `crossfade verify`"), "{}", text(&moved));
    assert!(pair.proxy.holds("dual-write").await);
    pair.proxy.verify().await;
    let seen = gates(&pair.proxy, "new-primary").await;
    assert_eq!(closed(&seen), Vec::<&str>::new(), "{seen:#}");
    // A row that was owed since voids it: what was seen then is not what is there now.
    owe_one(&pair, &client).await;
    let seen = gates(&pair.proxy, "new-primary").await;
    assert_eq!(closed(&seen), ["verified"], "{seen:#}");
    pair.proxy.verify().await;
    let moved = pair.proxy.crossfade(&["phase", "new-primary", "--reason", "the rehearsal went well"]).await;
    assert!(moved.status.success(), "{}", text(&moved));
    until("the proxy follows the command", async || pair.proxy.holds("new-primary").await).await;
    client.batch_execute("INSERT INTO notes VALUES (1000)").await.expect("carried over");
    for side in [&pair.databases.old, &pair.databases.new] {
        let entry = last_entry(side, "move").await;
        assert_eq!((&entry["phase"], &entry["from"]), (&"new-primary".into(), &"dual-write".into()), "{entry:#}");
        assert_eq!(entry["why"], "the rehearsal went well");
        assert!(entry["who"].as_str().is_some_and(|who| who.starts_with("crossfade phase, ")), "{entry:#}");
        assert!(entry["pause_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{entry:#}");
        assert_eq!(entry["forced"], serde_json::json!([]));
        assert_eq!(standing(&entry, "verified", None), "met", "of all tables");
        assert_eq!(standing(&entry, "debt", None), "met");
    }
    // Where old was left a moment ago the way back is open at once, verified or not.
    let seen = gates(&pair.proxy, "dual-write").await;
    assert_eq!((closed(&seen), standing(&seen, "verified", Some("public.notes"))), (Vec::new(), "warns"), "{seen:#}");
    let seen = gates(&pair.proxy, "new").await;
    assert_eq!(closed(&seen), ["backup"], "{seen:#}");
    let noted = pair.proxy.crossfade(&["phase", "--backup", "tape 7"]).await;
    assert!(noted.status.success(), "{}", text(&noted));
    let seen = gates(&pair.proxy, "new").await;
    assert_eq!(closed(&seen), Vec::<&str>::new(), "{seen:#}");
}

/// A row that new refuses at first: owed, and paid later.
async fn owe_one(pair: &Pair, client: &tokio_postgres::Client) {
    let refuse = "ALTER TABLE notes ADD CONSTRAINT odd CHECK (body <> 'odd')";
    pair.databases.new.run(DATABASE, refuse).await.expect("adds");
    client.batch_execute("INSERT INTO notes VALUES (500, 'odd')").await.expect("no error");
    let seen = gates(&pair.proxy, "new-primary").await;
    assert!(closed(&seen).contains(&"debt"), "{seen:#}");
    let forced = ["phase", "new-primary", "--force", "--reason", "hurry"];
    let forced = pair.proxy.crossfade(&forced).await;
    assert_eq!(forced.status.code(), Some(1), "no force loses an acknowledged write: {}", text(&forced));
    pair.databases.new.run(DATABASE, "ALTER TABLE notes DROP CONSTRAINT odd").await.expect("drops");
    pair.proxy.settle().await;
}

#[tokio::test]
async fn what_stands_in_the_way_of_new_as_authority_closes_its_gate_and_force_is_kept() {
    let more = "expect: { standbys: 1, archiving: true }\nmove: { soak: 1s }";
    let pair = Pair::dual_write(SCHEMA, more).await;
    let client = pair.client().await;
    pair.proxy.verify().await;
    client.batch_execute("LISTEN news").await.expect("listens");
    let locks = pair.client().await;
    locks.batch_execute("SELECT pg_advisory_lock(7); CREATE TEMP TABLE basket (id int)").await.expect("runs");
    let broken = "CREATE ROLE clerk LOGIN; GRANT SELECT ON notes TO clerk";
    pair.databases.old.run(DATABASE, broken).await.expect("runs");
    pair.databases
        .new
        .run(DATABASE, "ALTER TABLE notes ADD CONSTRAINT odd CHECK (body <> 'odd'); ALTER SEQUENCE tickets MAXVALUE 5")
        .await
        .expect("runs");
    pair.databases.old.run(DATABASE, "SELECT setval('tickets', 100)").await.expect("runs");
    // The same password, and another salt: the keys of a login on one side do not open the other.
    let other_salt = format!("ALTER ROLE {} PASSWORD '{}'", APP.0, APP.1);
    pair.databases.new.run(DATABASE, &other_salt).await.expect("alters");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let sessions = async || {
        let seen = gates(&pair.proxy, "new-primary").await;
        let of = |gate: &&Value| gate["gate"] == "sessions";
        let facts = seen["gates"].as_array().unwrap().iter().find(of).unwrap()["facts"].clone();
        (seen, [&facts["temporary"], &facts["advisory"], &facts["holding"]].map(|count| count.as_i64().unwrap()))
    };
    // A proxy tells of its sessions now and then.
    until("the sessions are counted", async || sessions().await.1 == [1, 1, 1]).await;
    let (seen, _) = sessions().await;
    assert_eq!(closed(&seen), ["check", "sequences", "privileges", "expect"], "{seen:#}");
    assert_eq!((standing(&seen, "sessions", None), standing(&seen, "soak", None)), ("warns", "met"), "{seen:#}");
    let lacking = seen["gates"].as_array().unwrap().iter().find(|gate| gate["gate"] == "privileges").unwrap();
    let password = lacking["facts"].as_array().unwrap().iter().find(|finding| finding["kind"] == "password").unwrap();
    assert_eq!(password["object"], APP.0, "{lacking:#}");
    let print = password["mend"].as_str().unwrap().split_once(": ").expect("says what to run").1;
    assert!(!lacking.to_string().contains("SCRAM-SHA-256"), "a verifier is a secret: {lacking:#}");
    let mend = pair.databases.old.run(DATABASE, print).await.expect("prints");
    pair.databases.new.run(DATABASE, &mend).await.expect("mends");
    let seen = gates(&pair.proxy, "new-primary").await;
    assert!(!seen.to_string().contains("could not log in there"), "it was mended: {seen:#}");
    pair.databases.new.run(DATABASE, "ALTER SEQUENCE tickets NO MAXVALUE").await.expect("runs");
    // One by one, or all; never without a word.
    let refused = pair.proxy.crossfade(&["phase", "new-primary", "--force"]).await;
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    let one = pair.proxy.crossfade(&["phase", "new-primary", "--force=check", "--reason", "we know"]).await;
    assert_eq!(one.status.code(), Some(1), "{}", text(&one));
    let all = ["phase", "new-primary", "--force=check,privileges,expect", "--reason", "we know"];
    let all = pair.proxy.crossfade(&all).await;
    assert!(all.status.success(), "{}", text(&all));
    let entry = last_entry(&pair.databases.new, "move").await;
    assert_eq!(entry["forced"], serde_json::json!(["check", "privileges", "expect"]), "{entry:#}");
    assert_eq!(entry["why"], "we know");
    until("the proxy follows", async || pair.proxy.holds("new-primary").await).await;
}

#[tokio::test]
async fn a_prepared_transaction_and_a_long_one_are_named_before_anybody_is_held() {
    let databases = Databases::start(&[("max_prepared_transactions", "5")]).await;
    databases.run_on_both(SCHEMA).await;
    let mut proxy = Proxy::start(databases.proxy_config("old", "move: { pause: 1s }")).await;
    proxy.set_phase("dual-write").await;
    proxy.settle().await;
    proxy.verify().await;
    let connect = async |url: String| {
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects");
        tokio::spawn(async move { drop(connection.await) });
        client
    };
    let client = connect(proxy.url_as(APP.0, APP.1, DATABASE)).await;
    client
        .batch_execute("BEGIN; UPDATE notes SET body = 'later' WHERE id = 1; PREPARE TRANSACTION 'till monday'")
        .await
        .expect("prepares");
    let seen = gates(&proxy, "new-primary").await;
    assert!(closed(&seen).contains(&"undecided") && seen.to_string().contains("till monday"), "{seen:#}");
    client.batch_execute("ROLLBACK PREPARED 'till monday'").await.expect("rolls back");
    client.batch_execute("BEGIN; SELECT 1").await.expect("begins");
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let seen = gates(&proxy, "new-primary").await;
    assert_eq!(standing(&seen, "transactions", None), "warns", "{seen:#}");
    assert!(seen["estimated_pause_ms"].as_f64().is_some_and(|ms| ms >= 1000.0), "{seen:#}");
    // Given up, and clients released; the history says so.
    let given_up = proxy.crossfade(&["phase", "new-primary"]).await;
    assert_eq!(given_up.status.code(), Some(1), "{}", text(&given_up));
    assert!(text(&given_up).contains("have not ended within move.pause"), "{}", text(&given_up));
    let other = connect(proxy.url_as(APP.0, APP.1, DATABASE)).await;
    other.batch_execute("INSERT INTO notes VALUES (2000)").await.expect("released");
    let entry = last_entry(&databases.old, "given-up").await;
    assert_eq!(entry["to"], "new-primary");
    assert!(entry["pause_ms"].as_f64().is_some_and(|ms| ms >= 1000.0), "{entry:#}");
    // Or ended.
    let moved = proxy.crossfade(&["phase", "new-primary", "--terminate"]).await;
    assert!(moved.status.success(), "{}", text(&moved));
    let error = client.batch_execute("COMMIT").await.expect_err("it was ended");
    assert!(error.as_db_error().is_none_or(|error| error.code().code() == "57P01"), "{error}");
    until("the proxy follows", async || proxy.holds("new-primary").await).await;
    proxy.settle().await;
    databases.assert_equal().await;
    let status = proxy.crossfade(&["status", "--json"]).await;
    let status: Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(status["history"][0]["event"], "move", "{status:#}");
}
