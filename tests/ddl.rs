//! Definitions that change under the proxy: by clients through it and around it, in the middle of transactions. Nothing is written wrongly; what cannot
//! be written is owed, and paid when both sides agree again.

mod common;

use common::pair::DATABASE;
use common::{Pair, until};
use crossfade::cluster::Cluster;

const SCHEMA: &str = "
    CREATE TYPE mood AS ENUM ('sad', 'ok');
    CREATE DOMAIN short AS text CHECK (length(VALUE) < 10);
    CREATE TYPE pair AS (x int, y int);
    CREATE TABLE words (id int PRIMARY KEY, a text, b text);
    CREATE TABLE others (id int PRIMARY KEY, body text);
    CREATE TABLE typed (id int PRIMARY KEY, m mood, s short, p pair);
    CREATE TABLE audit (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
    CREATE TABLE parts (id int, region text, body text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
    CREATE TABLE parts_eu PARTITION OF parts FOR VALUES IN ('eu');
    CREATE TABLE history (at timestamptz DEFAULT clock_timestamp(), what text);
    INSERT INTO words SELECT n, 'a' || n, 'b' || n FROM generate_series(1, 20) n;";

/// A proof that takes longer than half of `mirror.timeout` owes all tables: what is tested here is not how busy the machine is.
const PATIENT: &str = "mirror: { timeout: 60s }";

/// In `dual-write`, with nothing owed.
async fn mirrored(more: &str) -> Pair {
    let mut pair = Pair::start("old", SCHEMA, more).await;
    pair.proxy.set_phase("dual-write").await;
    pair.proxy.settle().await;
    pair
}

/// Behind the proxy's back, as the application's role.
async fn around(side: &Cluster, sql: &str) -> String {
    side.run(DATABASE, &format!("SET ROLE app;\n{sql}")).await.expect("answers").trim().to_owned()
}

async fn around_both(pair: &Pair, sql: &str) {
    around(&pair.databases.old, sql).await;
    around(&pair.databases.new, sql).await;
}

/// What a query gives on new.
async fn on_new(pair: &Pair, sql: &str) -> String {
    pair.databases.new.run(DATABASE, sql).await.expect("answers").trim().to_owned()
}

async fn ledger(pair: &Pair) -> String {
    let text = "SELECT count(*) FROM crossfade.ledger";
    pair.databases.old.run(DATABASE, text).await.expect("answers").trim().to_owned()
}

/// Waits until the proxy has logged something so many times.
async fn said(pair: &Pair, what: &str, times: usize) {
    until(&format!("{what:?} was logged {times} times"), async || pair.proxy.log().matches(what).count() >= times)
        .await;
}

// With the word by which `open_epoch` hides its GRANT: it hides nothing else.
const SWAP: &str = "SET crossfade.installing = on; ALTER TABLE words RENAME a TO c; ALTER TABLE words RENAME b TO a; ALTER TABLE words RENAME c TO b";

/// Columns of one type exchange their names under a transaction that has planned with the old ones: number and types of an image's columns say nothing.
#[tokio::test]
async fn names_that_are_swapped_under_a_transaction() {
    let pair = mirrored(PATIENT).await;
    let client = pair.client().await;
    client.batch_execute("BEGIN").await.expect("begins");
    around_both(&pair, SWAP).await;
    // What the change itself has left is paid: the transaction's own doubt must do.
    said(&pair, "definition has changed", 1).await;
    until("the table's debt is paid", async || ledger(&pair).await == "0").await;
    client.execute("INSERT INTO words (id, a, b) VALUES (100, 'is a', 'is b')", &[]).await.expect("inserts");
    client.execute("UPDATE words SET a = 'is a, too' WHERE id = 3", &[]).await.expect("updates");
    client.batch_execute("COMMIT").await.expect("commits");
    pair.settle_and_assert_equal().await;
    assert_eq!(on_new(&pair, "SELECT a, b FROM words WHERE id = 100").await, "is a|is b");
}

/// The same on old alone: new's definitions are those of the plan, so that nothing but the authority's version speaks against its images.
#[tokio::test]
async fn names_that_are_swapped_on_the_authority_alone() {
    let pair = mirrored(PATIENT).await;
    let client = pair.client().await;
    client.batch_execute("BEGIN").await.expect("begins");
    around(&pair.databases.old, SWAP).await;
    said(&pair, "definition has changed", 1).await;
    until("the table's debt is paid", async || ledger(&pair).await == "0").await;
    client.execute("INSERT INTO words (id, a, b) VALUES (100, 'is a', 'is b')", &[]).await.expect("inserts");
    client.batch_execute("COMMIT").await.expect("commits");
    pair.settle_and_assert_equal().await;
    assert_eq!(on_new(&pair, "SELECT a, b FROM words WHERE id = 100").await, "is a|is b");
}

/// The same on new alone: what is executed there by name would go to the wrong column.
#[tokio::test]
async fn names_that_are_swapped_on_the_mirror_alone() {
    let pair = mirrored(PATIENT).await;
    let client = pair.client().await;
    client.batch_execute("BEGIN").await.expect("begins");
    around(&pair.databases.new, SWAP).await;
    client.execute("INSERT INTO words (id, a, b) VALUES (100, 'is a', 'is b')", &[]).await.expect("inserts");
    client.batch_execute("COMMIT").await.expect("commits");
    assert_eq!(pair.proxy.metrics("crossfade_mirror_failures_total{reason=\"definition\"}").await, 1.0);
    // Whatever was written by name meanwhile goes to the other name now.
    around(&pair.databases.new, SWAP).await;
    pair.renewed().await;
    pair.settle_and_assert_equal().await;
}

/// A change of something else: the transaction's images are those that the mirror commits, and nothing is walked for it.
#[tokio::test]
async fn a_change_elsewhere_costs_no_debt() {
    let pair = mirrored(PATIENT).await;
    let client = pair.client().await;
    client.batch_execute("BEGIN").await.expect("begins");
    around(&pair.databases.old, "CREATE TABLE elsewhere (n int)").await;
    client.execute("INSERT INTO words VALUES (100, 'x', 'y')", &[]).await.expect("inserts");
    client.execute("INSERT INTO history (what) VALUES ('x')", &[]).await.expect("inserts");
    client.batch_execute("COMMIT").await.expect("commits");
    until("the debt is cleared", async || ledger(&pair).await == "0").await;
    assert_eq!(on_new(&pair, "SELECT (SELECT count(*) FROM words), (SELECT count(*) FROM history)").await, "21|1");
    assert!(!pair.proxy.log().contains("are owed"), "{}", pair.proxy.log());
    assert_eq!(pair.proxy.metrics("crossfade_mirror_failures_total").await, 0.0);
    around(&pair.databases.old, "DROP TABLE elsewhere").await;
    pair.settle_and_assert_equal().await;
}

/// A change that has a version and has not committed: definitions read now are those of before, under the version that will hold behind.
#[tokio::test]
async fn a_change_that_commits_behind_the_reading() {
    let pair = mirrored(PATIENT).await;
    let (control, changer) = (pair.client().await, direct(&pair.databases.old).await);
    around(&pair.databases.new, SWAP).await;
    changer.batch_execute(&format!("BEGIN; {SWAP}")).await.expect("changes");
    pair.renewed().await;
    control.batch_execute("BEGIN").await.expect("begins");
    let seen = pair.proxy.log().matches("definition has changed").count();
    changer.batch_execute("COMMIT").await.expect("commits");
    said(&pair, "definition has changed", seen + 1).await;
    until("the table's debt is paid", async || ledger(&pair).await == "0").await;
    control.execute("INSERT INTO words (id, a, b) VALUES (100, 'is a', 'is b')", &[]).await.expect("inserts");
    control.batch_execute("COMMIT").await.expect("commits");
    pair.settle_and_assert_equal().await;
}

/// Plans without an audit, and then a trigger: what it writes is in no image.
#[tokio::test]
async fn a_trigger_that_was_made_under_a_transaction() {
    let pair = mirrored(PATIENT).await;
    let client = pair.client().await;
    client.batch_execute("BEGIN").await.expect("begins");
    let trigger = "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO audit (what) VALUES (NEW.a); RETURN NULL; END $$; \
        CREATE TRIGGER noted AFTER INSERT ON words FOR EACH ROW EXECUTE FUNCTION note()";
    around_both(&pair, trigger).await;
    client.execute("INSERT INTO words VALUES (100, 'seen', 'b')", &[]).await.expect("inserts");
    client.batch_execute("COMMIT").await.expect("commits");
    // Tables without a key would keep such a debt until someone copies them; these have one.
    until("all tables are owed", async || pair.proxy.log().contains("all tables are owed")).await;
    copy(&pair, "public.history").await;
    pair.settle_and_assert_equal().await;
    assert_eq!(on_new(&pair, "SELECT string_agg(what, ',') FROM audit").await, "seen");
}

/// Statements that were prepared before, and the types and columns that they write: no client sees an error that it would not see without the proxy.
#[tokio::test]
async fn prepared_statements_outlive_changes_of_their_table() {
    let pair = mirrored(PATIENT).await;
    let client = pair.client().await;
    let put = client.prepare("INSERT INTO words (id, a) VALUES ($1, $2)").await.expect("prepares");
    let change = client.prepare("UPDATE words SET a = $2 WHERE id = $1").await.expect("prepares");
    let remove = client.prepare("DELETE FROM words WHERE id = $1").await.expect("prepares");
    let typed = client.prepare("INSERT INTO typed (id, s) VALUES ($1, 'short')").await.expect("prepares");
    let changes = [
        "ALTER TABLE words ADD COLUMN c text DEFAULT 'made'",
        "ALTER TABLE words DROP COLUMN b, ADD COLUMN b text",
        "ALTER TABLE words ALTER COLUMN a TYPE varchar(100)",
        "ALTER TABLE words ADD COLUMN made timestamptz DEFAULT clock_timestamp()",
        "ALTER TABLE words RENAME a TO d; ALTER TABLE words RENAME c TO a; ALTER TABLE words RENAME d TO c",
        "ALTER TYPE pair ADD ATTRIBUTE z int CASCADE",
        "ALTER TYPE mood ADD VALUE 'happy'",
        "ALTER DOMAIN short ADD CHECK (VALUE <> 'never')",
        "ALTER TABLE words DROP CONSTRAINT words_pkey, ADD PRIMARY KEY (id)",
    ];
    for (at, sql) in changes.iter().enumerate() {
        let id = 100 + 10 * at as i32;
        client.batch_execute("BEGIN").await.expect("begins");
        around_both(&pair, sql).await;
        client.execute(&put, &[&id, &"within"]).await.expect(sql);
        client.execute(&typed, &[&id]).await.expect(sql);
        client.execute("UPDATE typed SET p = ROW(1, 2), m = 'ok' WHERE id = $1", &[&(id - 10)]).await.ok();
        client.batch_execute("COMMIT").await.expect(sql);
        client.execute(&put, &[&(id + 1), &"behind"]).await.expect(sql);
        client.execute(&change, &[&(id + 1), &"changed"]).await.expect(sql);
        client.execute(&change, &[&(at as i32 + 1), &"changed"]).await.expect(sql);
        client.execute(&remove, &[&(at as i32 + 10)]).await.expect(sql);
    }
    pair.renewed().await;
    // Where one change follows another before they are read, what a transaction has written cannot be told.
    copy(&pair, "public.history").await;
    pair.settle_and_assert_equal().await;
}

/// A table that appears on both sides while transactions are open that plan without it.
#[tokio::test]
async fn a_new_table_owes_what_older_transactions_write() {
    let pair = mirrored(PATIENT).await;
    let (client, other) = (pair.client().await, pair.client().await);
    client.batch_execute("BEGIN").await.expect("begins");
    around_both(&pair, "CREATE TABLE fresh (id int PRIMARY KEY, body text)").await;
    said(&pair, "a new table migrates from now on table=public.fresh", 1).await;
    other.execute("INSERT INTO fresh VALUES (1, 'mirrored')", &[]).await.expect("inserts");
    until("it is mirrored", async || on_new(&pair, "SELECT count(*) FROM fresh").await == "1").await;
    // Time in which a debt that is not held would be paid.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    client.execute("INSERT INTO fresh VALUES (2, 'not mirrored')", &[]).await.expect("inserts");
    client.batch_execute("COMMIT").await.expect("commits");
    pair.settle_and_assert_equal().await;
    assert_eq!(on_new(&pair, "SELECT count(*) FROM fresh").await, "2");

    // Renamed on one side: it does not migrate, and says so. On both: another table, with all its rows.
    around(&pair.databases.old, "ALTER TABLE others RENAME TO different").await;
    said(&pair, "table public.others is missing on old", 1).await;
    client.execute("INSERT INTO different VALUES (7, 'where to?')", &[]).await.expect("inserts");
    assert_ne!(ledger(&pair).await, "0");
    around(&pair.databases.new, "ALTER TABLE others RENAME TO different").await;
    said(&pair, "from now on table=public.different", 1).await;
    pair.settle_and_assert_equal().await;
    assert_eq!(on_new(&pair, "SELECT body FROM different").await, "where to?");

    // Dropped on one side it owes; on both there is nothing to owe.
    around(&pair.databases.new, "DROP TABLE fresh").await;
    said(&pair, "table public.fresh is missing on new", 1).await;
    client.execute("INSERT INTO fresh VALUES (3, 'nowhere')", &[]).await.expect("inserts");
    around(&pair.databases.old, "DROP TABLE fresh").await;
    pair.settle_and_assert_equal().await;

    // A partition with rows is attached.
    around_both(&pair, "CREATE TABLE parts_us (id int NOT NULL, region text NOT NULL, body text)").await;
    around(&pair.databases.old, "INSERT INTO parts_us VALUES (1, 'us', 'came with it')").await;
    around_both(&pair, "ALTER TABLE parts ATTACH PARTITION parts_us FOR VALUES IN ('us')").await;
    client.execute("INSERT INTO parts VALUES (2, 'us', 'at once')", &[]).await.expect("inserts");
    pair.renewed().await;
    copy(&pair, "public.history").await;
    pair.settle_and_assert_equal().await;
    assert_eq!(on_new(&pair, "SELECT count(*) FROM parts_us").await, "2");
}

/// A table that migrates by itself, and owes all its rows while an older transaction lasts, becomes a partition: its root owes them.
#[tokio::test]
async fn a_table_that_is_owed_becomes_a_partition() {
    let pair = mirrored(PATIENT).await;
    let (client, other) = (pair.client().await, pair.client().await);
    client.batch_execute("BEGIN").await.expect("begins");
    around_both(&pair, "CREATE TABLE parts_us (id int NOT NULL, region text NOT NULL, body text)").await;
    around(&pair.databases.old, "INSERT INTO parts_us VALUES (1, 'us', 'came with it')").await;
    said(&pair, "a new table migrates from now on table=public.parts_us", 1).await;
    around_both(&pair, "ALTER TABLE parts ATTACH PARTITION parts_us FOR VALUES IN ('us')").await;
    said(&pair, "table public.parts_us is a partition of public.parts now", 1).await;
    other.execute("INSERT INTO parts VALUES (2, 'us', 'mirrored')", &[]).await.expect("inserts");
    assert_ne!(ledger(&pair).await, "0", "the older transaction lasts");
    client.batch_execute("COMMIT").await.expect("commits");
    copy(&pair, "public.history").await;
    pair.settle_and_assert_equal().await;
    assert_eq!(on_new(&pair, "SELECT count(*) FROM parts_us").await, "2");
}

/// DDL through the proxy: in transactions with images before and behind it, undone, and refused by the mirror.
#[tokio::test]
async fn ddl_through_the_proxy_runs_on_both_sides() {
    let pair = mirrored(PATIENT).await;
    let client = pair.client().await;
    let run = async |sql: &str| client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    run("CREATE TABLE made (id int PRIMARY KEY, body text)").await;
    said(&pair, "from now on table=public.made", 1).await;
    run("BEGIN; INSERT INTO made VALUES (1, 'before'); ALTER TABLE made ADD COLUMN at timestamptz DEFAULT clock_timestamp(); \
        INSERT INTO made VALUES (2, 'behind'); INSERT INTO others VALUES (1, 'behind'); COMMIT")
    .await;
    run("CREATE SCHEMA apart; SET search_path = apart").await;
    run("CREATE TABLE here (id int PRIMARY KEY)").await;
    run("RESET search_path").await;
    client.execute("ALTER TABLE words RENAME b TO c", &[]).await.expect("in the extended protocol");
    run("CREATE UNIQUE INDEX ON words (a)").await;
    run("BEGIN; ALTER TABLE words DROP COLUMN a; ROLLBACK").await;
    run("BEGIN; SAVEPOINT s; DROP TABLE others; ROLLBACK TO s; INSERT INTO others VALUES (2, 'still there'); COMMIT")
        .await;
    // What is the session's own, or cannot be in a block, is not run there.
    run("CREATE TEMP TABLE mine (n int); ALTER TABLE mine ADD COLUMN m int; DROP TABLE mine").await;
    run("CREATE INDEX CONCURRENTLY slow ON words (c)").await;
    pair.settle_and_assert_equal().await;
    let there = "SELECT to_regclass('apart.here') IS NOT NULL, to_regclass('words_a_idx') IS NOT NULL, to_regclass('slow') IS NULL, \
        (SELECT tableowner FROM pg_tables WHERE tablename = 'made'), (SELECT count(*) FROM made WHERE at IS NOT NULL)";
    assert_eq!(on_new(&pair, there).await, "t|t|t|app|2");
    assert_eq!(pair.proxy.metrics("crossfade_mirror_failures_total{reason=\"refused\"}").await, 0.0);

    // The mirror refuses: the client is told nothing, the table is owed, and pays when it is the same again.
    around(&pair.databases.new, "ALTER TABLE words ADD COLUMN d int").await;
    run("ALTER TABLE words ADD COLUMN d int DEFAULT 7").await;
    run("INSERT INTO words (id, a, d) VALUES (300, 'owed', 8)").await;
    assert!(pair.proxy.metrics("crossfade_mirror_failures_total{reason=\"refused\"}").await > 0.0);
    // The ledger had the same words; they may be paid by now.
    said(&pair, "column \"d\" of relation \"words\" already exists", 1).await;
    pair.renewed().await;
    copy(&pair, "public.history").await;
    pair.settle_and_assert_equal().await;
    run("DROP TABLE made").await;
    run("DROP SCHEMA apart CASCADE").await;
    pair.settle_and_assert_equal().await;
}

/// `mirror.ddl: refuse`, then `authority`.
#[tokio::test]
async fn ddl_is_refused_or_left_to_the_authority() {
    let mut pair = mirrored("mirror: { ddl: refuse }").await;
    let client = pair.client().await;
    for sql in ["ALTER TABLE words ADD COLUMN c int", "CREATE TABLE made (id int)"] {
        let simple = client.batch_execute(sql).await.expect_err("is refused");
        assert_eq!(simple.code().expect("an error of SQL").code(), "0A000");
        let extended = client.execute(sql, &[]).await.expect_err("is refused");
        assert_eq!(extended.code().expect("an error of SQL").code(), "0A000");
    }
    client.batch_execute("CREATE TEMP TABLE mine (n int)").await.expect("is the session's own");
    pair.proxy.set_more("mirror: { ddl: authority }");
    until("the file was read", async || client.batch_execute("ALTER TABLE others ADD COLUMN c int").await.is_ok())
        .await;
    client
        .batch_execute("BEGIN; INSERT INTO words VALUES (100, 'a', 'b'); ALTER TABLE words ADD COLUMN c int; COMMIT")
        .await
        .expect("runs");
    around(&pair.databases.new, "ALTER TABLE others ADD COLUMN c int; ALTER TABLE words ADD COLUMN c int").await;
    pair.renewed().await;
    copy(&pair, "public.history").await;
    pair.settle_and_assert_equal().await;
}

/// A connection of the application's role that knows nothing of the proxy.
async fn direct(side: &Cluster) -> tokio_postgres::Client {
    let url = side.url_as(common::pair::APP.0, common::pair::APP.1, DATABASE);
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("connects");
    tokio::spawn(async move { drop(connection.await) });
    client
}

/// `crossfade repair --table`.
async fn copy(pair: &Pair, table: &str) {
    let output = pair.proxy.crossfade(&["repair", "--table", table]).await;
    assert!(output.status.code().is_some_and(|code| code < 2), "{output:?}");
}
