//! Are two databases equal, row by row? Asked with a driver, psql and COPY: nothing of Crossfade's own code has a part in it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use crossfade::cluster::Cluster;

/// Differences that are shown for one table.
const SHOWN: usize = 10;
/// Under these, the text of a value says all of it.
const SETTINGS: &str = "SET datestyle = 'ISO, YMD'; SET intervalstyle = 'postgres'; SET timezone = 'UTC'; \
    SET extra_float_digits = 3; SET bytea_output = 'hex'; SET client_encoding = 'UTF8'; SET row_security = off; \
    SET search_path = pg_catalog; SET standard_conforming_strings = on;";
/// Ordinary tables (and partitions) of the application.
const TABLES: &str = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = \
    c.relnamespace WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname NOT IN ('crossfade', \
    'information_schema') AND n.nspname NOT LIKE 'pg\\_%' ORDER BY 1";

/// Compares a database on both sides and answers with the number of rows (of old).
///
/// `tables`: as SQL writes them, with their schema; none: every ordinary table but for schema `crossfade`.
///
/// # Panics
/// They differ, in their lists of tables or in a row: shows the first differences of every table.
pub async fn assert_equal(old: &Cluster, new: &Cluster, database: &str, tables: &[&str]) -> u64 {
    let (rows, differences) = compare(old, new, database, tables).await;
    assert!(differences.is_empty(), "old and new differ:\n{}", differences.join("\n"));
    rows
}

/// As [`assert_equal`], for tests that expect differences: the number of rows on old, and what differs, as text.
pub async fn compare(old: &Cluster, new: &Cluster, database: &str, tables: &[&str]) -> (u64, Vec<String>) {
    let mut differences = Vec::new();
    let mut names: Vec<String> = tables.iter().map(|name| name.to_string()).collect();
    if tables.is_empty() {
        let [old_names, new_names] = [old, new].map(|side| async move {
            let client = side.client(database).await.expect("connects");
            let rows = client.query(TABLES, &[]).await.expect("lists the tables");
            rows.iter().map(|row| row.get(0)).collect::<Vec<String>>()
        });
        let (old_names, new_names) = tokio::join!(old_names, new_names);
        if old_names != new_names {
            differences.push(format!("tables on old {old_names:?}, on new {new_names:?}"));
        }
        names = old_names.into_iter().filter(|name| new_names.contains(name)).collect();
    }
    let scratch = tempfile::tempdir().expect("a directory");
    let [old_dir, new_dir] = ["old", "new"].map(|side| scratch.path().join(side));
    let columns = columns(old, database, &names).await;
    tokio::join!(spool(old, database, &names, &columns, &old_dir), spool(new, database, &names, &columns, &new_dir));
    let mut rows = 0;
    for (number, name) in names.iter().enumerate() {
        let file = number.to_string();
        rows += compare_sorted(name, &old_dir.join(&file), &new_dir.join(&file), &mut differences);
    }
    (rows, differences)
}

/// The columns of each table by name, so that their order does not matter. Those that new lacks fail there, loudly.
async fn columns(cluster: &Cluster, database: &str, tables: &[String]) -> Vec<String> {
    let client = cluster.client(database).await.expect("connects");
    let text = "SELECT string_agg(quote_ident(attname), ', ' ORDER BY attname) FROM pg_attribute \
        WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped";
    let mut found = Vec::new();
    for table in tables {
        let row = client.query_one(text, &[table]).await.expect("lists the columns");
        found.push(row.get::<_, Option<String>>(0).unwrap_or_default());
    }
    found
}

/// Writes each row's text to a file in `dir`, one a line, in the order of their bytes; the files' names are the tables' numbers.
async fn spool(cluster: &Cluster, database: &str, tables: &[String], columns: &[String], dir: &Path) {
    assert_eq!(tables.len(), columns.len(), "{tables:?}: {columns:?}");
    std::fs::create_dir(dir).expect("makes a directory");
    let mut psql = tokio::process::Command::new(cluster.program("psql"));
    psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", SETTINGS]);
    for (number, (table, columns)) in tables.iter().zip(columns).enumerate() {
        psql.args(["-c", &format!("\\o '{}'", dir.join(number.to_string()).display())]).args([
            "-c",
            &format!(
                "COPY (SELECT row_text FROM (SELECT ROW({columns})::text COLLATE \"C\" AS row_text FROM ONLY {table}) \
                 AS rows ORDER BY row_text) TO STDOUT"
            ),
        ]);
    }
    let psql = psql.envs(cluster.environment(database)).kill_on_drop(true).stderr(Stdio::piped()).spawn();
    let output = psql.expect("psql runs").wait_with_output().await.expect("psql ends");
    assert!(output.status.success(), "reading {tables:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Merges two sorted files; a row counts as often as it is there. Answers with old's number of rows.
fn compare_sorted(table: &str, old: &Path, new: &Path, differences: &mut Vec<String>) -> u64 {
    let [mut old, mut new] = [old, new].map(|path| BufReader::new(File::open(path).expect("was written")));
    let (mut old_row, mut new_row) = (next_row(&mut old), next_row(&mut new));
    let (mut rows, mut different) = (0, 0);
    while old_row.is_some() || new_row.is_some() {
        let order = match (&old_row, &new_row) {
            (Some(old), Some(new)) => old.cmp(new),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, _) => std::cmp::Ordering::Greater,
        };
        if order.is_ne() {
            different += 1;
            if different <= SHOWN {
                let (side, row) = if order.is_lt() { ("old", &old_row) } else { ("new", &new_row) };
                let text = String::from_utf8_lossy(row.as_deref().unwrap_or_default()).trim_end().to_owned();
                differences.push(format!("{table}: only on {side}: {text}"));
            }
        }
        if order.is_le() {
            rows += 1;
            old_row = next_row(&mut old);
        }
        if order.is_ge() {
            new_row = next_row(&mut new);
        }
    }
    if different > SHOWN {
        differences.push(format!("{table}: {} more", different - SHOWN));
    }
    rows
}

fn next_row(file: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut row = Vec::new();
    (file.read_until(b'\n', &mut row).expect("reads") > 0).then_some(row)
}
