//! Reads of one row of a lazy table by its key (R5): both sides are asked at once, and whether new speaks for the key says which answer holds.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use common::lazily::{TEN, lazily, new_primary, on_new, rows, until_one_waits};
use common::pair::DATABASE;
use common::{Databases, Pair, Proxy};
use crossfade::cluster::Stop;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::types::Type;
use tokio_postgres::{Client, NoTls};

/// How many reads were answered: by old, by new, merged.
async fn answered(proxy: &Proxy) -> [u64; 3] {
    let of = async |by: &str| proxy.metrics(&format!("crossfade_lazy_reads_total{{by=\"{by}\"}}")).await as u64;
    [of("old").await, of("new").await, of("merged").await]
}

/// The rows, and which side has answered.
async fn whose(pair: &Pair, client: &Client, sql: &str) -> (Vec<String>, &'static str) {
    let before = answered(&pair.proxy).await;
    let found = rows(client, sql).await;
    let after = answered(&pair.proxy).await;
    let side = match [0, 1, 2].map(|at| after[at] - before[at]) {
        [1, 0, 0] => "old",
        [0, 1, 0] => "new",
        [0, 0, 1] => "merged",
        other => panic!("{sql}: {other:?}"),
    };
    (found, side)
}

fn one(row: &str) -> Vec<String> {
    vec![row.to_owned()]
}

async fn direct(pair: &Pair, old: bool) -> Client {
    let cluster = if old { &pair.databases.old } else { &pair.databases.new };
    let (client, connection) = tokio_postgres::connect(&cluster.url(DATABASE), NoTls).await.expect("connects");
    tokio::spawn(connection);
    client
}

#[tokio::test]
async fn a_row_comes_from_the_side_that_has_it() {
    let mut pair = lazily(TEN).await;
    let client = pair.client().await;
    client.batch_execute("UPDATE photo SET size = 31 WHERE id = 3").await.expect("writes");
    pair.proxy.settle().await;
    let by_key = "SELECT size FROM photo WHERE id = 7";
    // While old is the authority it answers.
    assert_eq!(rows(&client, by_key).await, ["70"]);
    new_primary(&mut pair).await;
    assert_eq!(whose(&pair, &client, by_key).await, (one("70"), "old"));
    assert_eq!(whose(&pair, &client, "SELECT size FROM photo WHERE id = 3").await, (one("31"), "new"));
    assert_eq!(
        whose(&pair, &client, "SELECT count(*), max(owner) FROM photo WHERE id = 8").await,
        (one("1|o2"), "old")
    );
    assert_eq!(whose(&pair, &client, "SELECT p.size FROM public.photo p WHERE p.id = -1").await, (vec![], "old"));
    let found = client.query("SELECT size, owner FROM photo WHERE id = $1", &[&9_i64]).await.expect("reads");
    assert_eq!((found[0].get::<_, i32>(0), found[0].get::<_, &str>(1)), (90, "o0"));
    let typed = client.query_typed("SELECT size FROM photo WHERE size > 5 AND id = $1", &[(&9_i32, Type::INT4)]).await;
    assert_eq!(typed.expect("reads")[0].get::<_, i32>(0), 90);
    // What new has brought, and what is gone.
    client
        .batch_execute("UPDATE photo SET size = 71 WHERE id = 7; DELETE FROM photo WHERE id = 4")
        .await
        .expect("writes");
    assert_eq!(whose(&pair, &client, by_key).await, (one("71"), "new"));
    assert_eq!(whose(&pair, &client, "SELECT size FROM photo WHERE id = 4").await, (vec![], "new"));
    let prepared = client.prepare("SELECT size FROM photo WHERE id = $1").await.expect("prepares");
    for (key, size) in [(7_i64, Some(71)), (4, None), (5, Some(50)), (3, Some(31)), (5, Some(50))] {
        let found = client.query_opt(&prepared, &[&key]).await.expect("reads");
        assert_eq!(found.map(|row| row.get::<_, i32>(0)), size, "key {key}");
    }
    // In a block all of it is one transaction's.
    client.batch_execute("BEGIN; UPDATE photo SET size = 51 WHERE id = 5").await.expect("writes");
    assert_eq!(whose(&pair, &client, "SELECT size FROM photo WHERE id = 5").await, (one("51"), "merged"));
    client.batch_execute("ROLLBACK").await.expect("rolls back");
    assert_eq!(whose(&pair, &client, "SELECT size FROM photo WHERE id = 5").await, (one("50"), "old"));
    assert_eq!(on_new(&pair, "SELECT string_agg(id::text, ',' ORDER BY id) FROM photo").await, "3,7");
}

/// With an old row that the mirror has not written yet: it must not come back, not even by a condition that new's row does not meet.
#[tokio::test]
async fn what_old_still_has_is_not_believed() {
    let mut pair = lazily(TEN).await;
    let client = pair.client().await;
    client.batch_execute("UPDATE photo SET size = size WHERE id IN (2, 3)").await.expect("writes");
    pair.proxy.settle().await;
    new_primary(&mut pair).await;
    let holder = direct(&pair, true).await;
    holder.batch_execute("BEGIN; SELECT FROM photo WHERE id IN (1, 2, 3) FOR UPDATE").await.expect("locks");
    // Acknowledged when mirror.timeout is over.
    client.batch_execute("UPDATE photo SET size = 999 WHERE id = 3").await.expect("writes");
    client.batch_execute("DELETE FROM photo WHERE id = 2").await.expect("writes");
    client.batch_execute("UPDATE photo SET id = 100 WHERE id = 1").await.expect("writes");
    let reader = pair.client().await;
    for (condition, expected) in [
        ("id = 3 AND size = 30", vec![]),
        ("id = 3", one("3|999")),
        ("id = 2", vec![]),
        ("id = 1", vec![]),
        ("id = 100", one("100|10")),
    ] {
        let sql = format!("SELECT id, size FROM photo WHERE {condition}");
        assert_eq!(whose(&pair, &reader, &sql).await, (expected, "new"), "{condition}");
    }
    holder.batch_execute("ROLLBACK").await.expect("lets go");
    pair.proxy.settle().await;
}

/// New answers for what it speaks for although old is away; what only old has cannot be had, and the session goes on.
#[tokio::test]
async fn new_answers_without_old() {
    let mut pair = lazily(TEN).await;
    new_primary(&mut pair).await;
    let client = pair.client().await;
    client.batch_execute("UPDATE photo SET size = 11 WHERE id = 1").await.expect("writes");
    assert_eq!(rows(&client, "SELECT size FROM photo WHERE id = 2").await, ["20"]);
    pair.databases.old.stop(Stop::Fast).await.expect("stops");
    assert_eq!(rows(&client, "SELECT size FROM photo WHERE id = 1").await, ["11"]);
    let error = client.simple_query("SELECT size FROM photo WHERE id = 2").await.expect_err("old has it");
    assert_eq!(error.code().map(|code| code.code()), Some("08001"), "{error:?}");
    assert_eq!(rows(&client, "SELECT size FROM photo WHERE id = 1").await, ["11"]);
    pair.databases.old.start().await.expect("starts");
    common::until("old is asked again", async || {
        client.simple_query("SELECT size FROM photo WHERE id = 2").await.is_ok()
    })
    .await;
    pair.proxy.settle().await;
}

/// Old has answered, and new has not yet said whether it speaks for the key: who brings the row and changes it meanwhile is seen.
#[tokio::test]
async fn a_row_that_is_brought_between_the_two_answers_is_news() {
    let mut pair = lazily(TEN).await;
    new_primary(&mut pair).await;
    let (reader, writer) = (pair.client().await, direct(&pair, false).await);
    let by_key = "SELECT size FROM photo WHERE id = 6";
    assert_eq!(whose(&pair, &reader, by_key).await, (one("60"), "old"));
    let bring = "SELECT format('crossfade.bring_%s(ARRAY[6::bigint])', number) FROM crossfade.lazy";
    let bring = on_new(&pair, bring).await;
    writer.batch_execute("BEGIN; LOCK TABLE photo IN ACCESS EXCLUSIVE MODE").await.expect("locks");
    let read = async { rows(&reader, by_key).await };
    let write = async {
        until_one_waits(&pair).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let change = format!("SELECT {bring}; UPDATE photo SET size = 61 WHERE id = 6; COMMIT");
        writer.batch_execute(&change).await.expect("writes");
    };
    assert_eq!(tokio::join!(read, write).0, ["61"]);
}

/// Old is held while new answers: what old says later, to questions that nobody waits for any more, is no answer to the next one.
#[tokio::test]
async fn late_answers_of_old_are_passed_over() {
    let mut pair = lazily(TEN).await;
    new_primary(&mut pair).await;
    let client = pair.client().await;
    let prepared = client.prepare("SELECT size FROM photo WHERE id = $1").await.expect("prepares");
    let read = async |key: i64| client.query_one(&prepared, &[&key]).await.expect("reads").get::<_, i32>(0);
    client.batch_execute("UPDATE photo SET size = 11 WHERE id = 1").await.expect("writes");
    pair.proxy.settle().await;
    assert_eq!((read(1).await, read(2).await), (11, 20));
    let holder = direct(&pair, true).await;
    holder.batch_execute("BEGIN; LOCK TABLE photo IN ACCESS EXCLUSIVE MODE").await.expect("locks");
    let before = answered(&pair.proxy).await;
    for _ in 0..3 {
        assert_eq!(read(1).await, 11);
        assert_eq!(rows(&client, "SELECT size FROM photo WHERE id = 1").await, ["11"]);
    }
    let after = answered(&pair.proxy).await;
    assert_eq!([0, 1, 2].map(|at| after[at] - before[at]), [0, 6, 0]);
    holder.batch_execute("ROLLBACK").await.expect("lets go");
    for key in 2..=10 {
        assert_eq!((read(key).await, read(1).await), (key as i32 * 10, 11));
    }
}

/// A text that the session's server reads otherwise than our lexer holds no key that could be asked for.
#[tokio::test]
async fn a_text_with_escapes_is_merged() {
    let mut pair = lazily(TEN).await;
    new_primary(&mut pair).await;
    let client = pair.client().await;
    let by_key = "SELECT id FROM photo WHERE id = 7";
    client.batch_execute("SET standard_conforming_strings = off").await.expect("sets");
    assert_eq!(whose(&pair, &client, by_key).await, (one("7"), "merged"));
    client.batch_execute("SET standard_conforming_strings = on").await.expect("sets");
    assert_eq!(whose(&pair, &client, by_key).await, (one("7"), "old"));
    client.batch_execute("SET client_encoding = 'SJIS'").await.expect("sets");
    assert_eq!(whose(&pair, &client, by_key).await, (one("7"), "old"));
}

/// What a literal of such a type says may be another thing for each of the two sides.
#[tokio::test]
async fn keys_that_the_clock_may_change_are_merged() {
    let databases = Databases::start(&[]).await;
    databases
        .run_on_both("CREATE TABLE day (d date PRIMARY KEY); CREATE TABLE word (w text, u uuid, PRIMARY KEY (w, u))")
        .await;
    let file =
        "federate: true\ntables:\n  - { name: public.day, backfill: lazy }\n  - { name: public.word, backfill: lazy }";
    let proxy = Proxy::start(databases.proxy_config("old", file)).await;
    for (sql, point) in [
        ("SELECT * FROM day WHERE d = 'today'", false),
        ("SELECT * FROM day WHERE d = $1", false),
        ("SELECT * FROM word WHERE w = 'a' AND u = '00000000-0000-0000-0000-000000000000'::uuid", true),
        ("SELECT * FROM word WHERE w = $1::varchar AND u = $2", true),
        ("SELECT * FROM word WHERE w = $1", false),
    ] {
        assert_eq!(is_point(&proxy, sql).await, point, "{sql}");
    }
}

/// By `crossfade explain`.
async fn is_point(proxy: &Proxy, sql: &str) -> bool {
    let told = proxy.crossfade(&["explain", sql]).await;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let line = told.lines().find(|line| line.starts_with("new-primary")).unwrap_or_else(|| panic!("{sql}: {told}"));
    line.contains("from both sides at once")
}

/// What may not be read so: more than one key, or another's.
#[tokio::test]
async fn only_reads_of_one_key_are_points() {
    let mut pair = lazily(TEN).await;
    new_primary(&mut pair).await;
    for sql in [
        "SELECT * FROM photo WHERE id = 1",
        "SELECT * FROM photo WHERE owner = 'x' AND (size = 1 OR size = 2) AND photo.id = $1 ORDER BY size LIMIT 1",
        "SELECT count(*) FROM public.photo AS p WHERE p.id = '5'::bigint GROUP BY size HAVING count(*) > 0;",
        "SELECT CASE WHEN size > 1 THEN 1 END FROM photo p WHERE id = -5",
        "SELECT size, (SELECT 1 WHERE true) FROM photo WHERE id = $1::int8",
    ] {
        assert!(is_point(&pair.proxy, sql).await, "{sql}");
    }
    for sql in [
        "SELECT * FROM photo",
        "SELECT * FROM photo WHERE id > 1",
        "SELECT * FROM photo WHERE id = 1 OR size = 2",
        "SELECT * FROM photo WHERE size BETWEEN 1 AND id = 5",
        "SELECT * FROM photo WHERE id = ANY (ARRAY[1, 2])",
        "SELECT * FROM photo WHERE id IN (1, 2)",
        "SELECT * FROM photo WHERE NOT id = 1",
        "SELECT * FROM photo WHERE id = 1 IS NULL",
        "SELECT * FROM photo WHERE id = size",
        "SELECT * FROM photo WHERE id = $1 AND size = $1",
        "SELECT * FROM photo WHERE id = 1::float8",
        "SELECT * FROM photo WHERE id = (SELECT 1)",
        "SELECT * FROM photo WHERE size = 1",
        "SELECT * FROM photo, generate_series(1, 2) AS g (id) WHERE g.id = 1",
        "SELECT * FROM (SELECT max(id) AS id FROM photo) AS p WHERE id = 1",
        "SELECT 1 FROM (VALUES (1)) AS v (id) WHERE id = 1 UNION SELECT size FROM photo",
        "SELECT size FROM photo WHERE id = 1 UNION SELECT size FROM photo",
        "SELECT p.id FROM photo p JOIN photo q USING (id) WHERE p.id = 1",
        "SELECT p.id FROM photo p JOIN note USING (id) WHERE p.id = 1",
        "WITH w AS (SELECT 1 AS id) SELECT * FROM w, photo p WHERE w.id = 1",
        "SELECT * FROM photo WHERE id = 1 FOR UPDATE",
        "SELECT now(), size FROM photo WHERE id = 1",
        "SELECT random() FROM photo WHERE id = 1",
    ] {
        assert!(!is_point(&pair.proxy, sql).await, "{sql}");
    }
}

const COUNTED: i64 = 30;

/// What all clients know of a key.
#[derive(Default)]
struct Known {
    /// Its value has been acknowledged to be at least this.
    least: AtomicI64,
    /// And at most this was ever asked for.
    most: AtomicI64,
    /// Its deletion was acknowledged.
    gone: AtomicBool,
}

/// Each read by key gives a value that was current at some moment of the read: never one of before an acknowledgement, whichever client has got that. Writers
/// bring rows, count them up and delete some; rows of old are held now and then, so that the mirror is late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_by_key_never_go_back() {
    let fill = format!("INSERT INTO photo SELECT n, 'old', 100 FROM generate_series(1, {COUNTED}) n");
    let mut pair = lazily(&fill).await;
    new_primary(&mut pair).await;
    let known: Arc<Vec<Known>> = Arc::new((0..=COUNTED).map(|_| Known::default()).collect());
    known.iter().for_each(|key| {
        key.least.store(100, Ordering::SeqCst);
        key.most.store(100, Ordering::SeqCst);
    });
    let over = Arc::new(AtomicBool::new(false));
    let mut at_work = Vec::new();
    for seed in 0..4 {
        let (client, known, over) = (pair.client().await, known.clone(), over.clone());
        at_work.push(tokio::spawn(async move { keep_counting(client, seed, &known, &over).await }));
    }
    for seed in 0..4 {
        let (client, known, over) = (pair.client().await, known.clone(), over.clone());
        at_work.push(tokio::spawn(async move { keep_reading(client, seed, &known, &over).await }));
    }
    let holder = direct(&pair, true).await;
    for round in 0..if common::proof() { 60 } else { 6 } {
        let held = format!("BEGIN; SELECT FROM photo WHERE id % 3 = {} FOR UPDATE", round % 3);
        holder.batch_execute(&held).await.expect("holds rows of old");
        tokio::time::sleep(Duration::from_millis(400)).await;
        holder.batch_execute("ROLLBACK").await.expect("lets go");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    over.store(true, Ordering::SeqCst);
    let mut done = Vec::new();
    for worker in at_work {
        done.push(worker.await.expect("ends"));
    }
    let [old, new, merged] = answered(&pair.proxy).await;
    println!("{done:?} writes and reads; answered by old {old}, by new {new}, merged {merged}");
    assert!(old > 50 && new > 50, "both sides have answered: {old}, {new}");
    pair.proxy.settle().await;
    let filled = pair.proxy.crossfade(&["backfill"]).await;
    assert!(filled.status.success(), "{filled:?}");
    pair.proxy.settle().await;
    pair.databases.assert_equal().await;
}

async fn keep_counting(client: Client, seed: u64, known: &[Known], over: &AtomicBool) -> u64 {
    let mut random = StdRng::seed_from_u64(seed);
    let update =
        client.prepare("UPDATE photo SET size = size + 1 WHERE id = $1 RETURNING size").await.expect("prepares");
    let mut done = 0;
    while !over.load(Ordering::SeqCst) {
        // The keys come into play one after another, so that some are on old alone for long.
        let key = random.random_range(1..=COUNTED.min(3 + done as i64 / 8));
        let of = &known[key as usize];
        if key % 10 == 0 && random.random_range(0..20) == 0 {
            client.execute("DELETE FROM photo WHERE id = $1", &[&key]).await.expect("deletes");
            of.gone.store(true, Ordering::SeqCst);
        } else {
            of.most.fetch_add(1, Ordering::SeqCst);
            let size = client.query_opt(&update, &[&key]).await.expect("counts");
            if let Some(row) = size {
                of.least.fetch_max(row.get::<_, i32>(0).into(), Ordering::SeqCst);
            }
        }
        done += 1;
    }
    done
}

async fn keep_reading(client: Client, seed: u64, known: &[Known], over: &AtomicBool) -> u64 {
    let mut random = StdRng::seed_from_u64(1000 + seed);
    let read = client.prepare("SELECT size FROM photo WHERE id = $1").await.expect("prepares");
    let mut done = 0;
    while !over.load(Ordering::SeqCst) {
        let key = random.random_range(1..=COUNTED);
        let of = &known[key as usize];
        let (least, gone) = (of.least.load(Ordering::SeqCst), of.gone.load(Ordering::SeqCst));
        let found: Option<i64> = match seed % 2 {
            0 => client.query_opt(&read, &[&key]).await.expect("reads").map(|row| row.get::<_, i32>(0).into()),
            _ => rows(&client, &format!("SELECT size FROM photo WHERE id = {key}"))
                .await
                .first()
                .map(|size| size.parse().expect("a number")),
        };
        let most = of.most.load(Ordering::SeqCst);
        match found {
            Some(size) => {
                assert!(!gone && (least..=most).contains(&size), "key {key}: {size}, {least} to {most}, {gone}")
            }
            None => assert!(key % 10 == 0, "key {key} was never deleted"),
        }
        done += 1;
    }
    done
}
