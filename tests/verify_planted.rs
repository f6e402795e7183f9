//! Rows planted among many, of each kind, under load: verify names exactly those whose text under fixed settings differs, `--repair` mends exactly those.

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use common::pair::{DATABASE, Pair};
use common::pgbench::try_pgbench;
use serde_json::Value;

/// What is planted on new in the rows whose key is so far behind a multiple of the stride, and which columns differ then. None: nothing that a client
/// could tell.
const KINDS: [(&str, Option<&str>); 11] = [
    ("f = '-0'", Some("f")),
    ("f = 'NaN'", Some("f")),
    ("n = 1.00", Some("n")),
    ("j = '{\"b\": 2, \"a\": 1}'", None),
    ("ts = '2026-01-02 05:04:05+02'", None),
    ("ts = ts + interval '1 microsecond'", Some("ts")),
    ("t = NULL", Some("t")),
    ("t = 'planted'", Some("t")),
    ("n = n, t = t", None),
    ("f = 1, n = 2, j = '{}', t = 'all'", Some("f,n,j,t")),
    ("j = j || '{\"c\": null}'", Some("j")),
];
/// Of rows that are missing on new, and of rows that are there only, behind a multiple of the stride.
const MISSING: u64 = 21;
const EXTRA: u64 = 22;
/// Of rows that clients write.
const LOAD: u64 = 0;

/// How many rows there are, and how many of each kind are planted.
struct Sizes {
    rows: u64,
    each: u64,
}

impl Sizes {
    fn stride(&self) -> u64 {
        self.rows / self.each
    }

    /// `key how columns` of all that differs.
    fn expected(&self) -> BTreeSet<String> {
        let keys = |behind: u64| (0..self.each).map(move |nth| nth * self.stride() + behind);
        let mut all = BTreeSet::new();
        for (behind, (_, columns)) in (1..).zip(KINDS) {
            all.extend(
                columns.into_iter().flat_map(|columns| keys(behind).map(move |k| format!("{k} changed {columns}"))),
            );
        }
        all.extend(keys(MISSING).map(|k| format!("{k} missing ")));
        all.extend(keys(EXTRA).map(|k| format!("{k} extra ")));
        all
    }

    fn plant(&self) -> String {
        let stride = self.stride();
        let mut sql = String::new();
        for (behind, (set, _)) in (1..).zip(KINDS) {
            sql += &format!("UPDATE t SET {set} WHERE k % {stride} = {behind}; ");
        }
        sql + &format!(
            "DELETE FROM t WHERE k % {stride} = {MISSING}; INSERT INTO t (k, f, t) SELECT n * {stride} + {EXTRA}, 0, 'extra' FROM generate_series(0, {}) n",
            self.each - 1
        )
    }

    /// Rows of new that nobody has any reason to write, with their versions.
    fn untouched(&self) -> String {
        let stride = self.stride();
        format!(
            "SELECT count(*) || ' ' || sum(hashtextextended(k || ' ' || xmin, 0)) FROM t WHERE k < {} AND k % {stride} > {EXTRA}",
            self.rows
        )
    }
}

fn sizes() -> Sizes {
    match common::proof() {
        true => Sizes { rows: 5_000_000, each: 1000 },
        false => Sizes { rows: 16_000, each: 8 },
    }
}

/// `key how columns` of every row that differs.
fn named(document: &Value) -> BTreeSet<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let line = |found: &Value| {
        let columns: Vec<String> = found["columns"].as_array().into_iter().flatten().map(text).collect();
        format!("{} {} {}", text(&found["key"]["k"]), text(&found["how"]), columns.join(","))
    };
    document["tables"][0]["different"].as_array().expect("a list").iter().map(line).collect()
}

async fn verify(pair: &Pair, arguments: &[&str]) -> (Value, Option<i32>) {
    let begun = Instant::now();
    let output = pair.proxy.crossfade(&[&["verify", "--json", "--jobs", "2"], arguments].concat()).await;
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| {
        panic!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    });
    let table = &document["tables"][0];
    println!(
        "{arguments:?}: {:?}, {} rows/s, {} differ",
        begun.elapsed(),
        table["rows_per_second"],
        table["rows_different"]
    );
    (document, output.status.code())
}

/// Filled by a backfill; then rows are planted on new, and clients go on writing rows beside them.
#[tokio::test(flavor = "multi_thread")]
async fn exactly_what_was_planted_is_named_and_mended_under_load() {
    let sizes = sizes();
    let schema = "CREATE TABLE t (k bigint PRIMARY KEY, f float8, n numeric, j jsonb, ts timestamptz, t text)";
    let mut pair = Pair::start("old", schema, "").await;
    let rows = format!(
        "INSERT INTO t SELECT k, 0, 1.0, '{{\"a\": 1, \"b\": 2}}', '2026-01-02 03:04:05+00', '' FROM generate_series(0, {}) k WHERE k % {} <> {EXTRA}",
        sizes.rows - 1,
        sizes.stride()
    );
    pair.databases.old.run(DATABASE, &rows).await.expect("fills old");
    pair.proxy.set_phase("dual-write").await;
    let filled = pair.proxy.crossfade(&["backfill"]).await;
    assert!(filled.status.success(), "{filled:?}");
    pair.proxy.settle().await;
    let on_new = async |sql: &str| pair.databases.new.run(DATABASE, sql).await.expect(sql).trim().to_owned();
    on_new(&sizes.plant()).await;
    let dir = tempfile::tempdir().expect("a directory");
    let script = dir.path().join("script");
    let (each, stride, beyond) = (sizes.each - 1, sizes.stride(), sizes.rows);
    let text = format!(
        "\\set k random(0, {each}) * {stride} + {LOAD}\n\\set l random(0, 500) + {beyond}\nUPDATE t SET f = f + 1 WHERE k = :k;\n\
         BEGIN;\nINSERT INTO t VALUES (:l, 1, 1, NULL, now(), 'in') ON CONFLICT (k) DO UPDATE SET n = t.n + 1;\nDELETE FROM t WHERE k = :l + 1;\nCOMMIT;\n"
    );
    std::fs::write(&script, text).expect("writes");
    let program = pair.databases.old.program("pgbench");
    let (script, url) = (script.to_string_lossy().into_owned(), pair.url());
    // It is killed when all was looked at.
    let arguments = ["-n", "-c", "4", "-j", "1", "-T", "3600", "-f", &script];
    let load = try_pgbench(&program, &url, &arguments);
    let looking = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (document, status) = verify(&pair, &[]).await;
        assert_eq!((status, named(&document)), (Some(1), sizes.expected()));
        let before = on_new(&sizes.untouched()).await;
        let (document, status) = verify(&pair, &["--repair"]).await;
        let repaired = document["tables"][0]["repaired"].as_u64();
        assert_eq!((status, repaired), (Some(0), Some(sizes.expected().len() as u64)), "{document:#}");
        assert_eq!(on_new(&sizes.untouched()).await, before, "no other row was written");
        let (document, status) = verify(&pair, &[]).await;
        assert_eq!((status, named(&document)), (Some(0), BTreeSet::new()));
    };
    tokio::select! {
        ended = load => panic!("the load has ended: {ended:?}"),
        () = looking => {}
    }
    let written = format!("SELECT sum(f)::bigint FROM t WHERE k % {stride} = {LOAD} AND k < {beyond}");
    let written = pair.databases.old.run(DATABASE, &written).await.expect("reads");
    assert!(written.trim().parse::<u64>().expect("a number") > 100, "clients have written: {written}");
    pair.settle_and_assert_equal().await;
}
