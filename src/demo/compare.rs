//! Are both databases equal? Asked of the servers directly, by something that shares no code with the mirror: every
//! table is read with COPY as the text of its rows in byte order, and the two streams are hashed.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};
use tokio_postgres::Client;

/// What makes a row's text the same on both servers, whatever their settings.
const SETTINGS: &str =
    "SET DateStyle = 'ISO, YMD'; SET TimeZone = 'UTC'; SET IntervalStyle = 'postgres'; SET extra_float_digits = 3;
    SET bytea_output = 'hex'; SET search_path = pg_catalog, public; SET default_transaction_read_only = on";

/// One table's comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compared {
    /// `schema.name`.
    pub table: String,
    /// Rows on old.
    pub old_rows: u64,
    /// Rows on new.
    pub new_rows: u64,
    /// Rows that only one side has; a row that both have with other columns counts once.
    pub different: u64,
    /// A first such row, cut short.
    pub example: Option<String>,
}

/// Compares every ordinary table outside the schemas of PostgreSQL and of Crossfade. A table that only one side has
/// counts as different in all its rows, and in at least one.
///
/// # Errors
/// When a server cannot be read.
pub async fn compare(old: &Client, new: &Client) -> Result<Vec<Compared>, tokio_postgres::Error> {
    tokio::try_join!(old.batch_execute(SETTINGS), new.batch_execute(SETTINGS))?;
    let (on_old, on_new) = tokio::try_join!(tables(old), tables(new))?;
    let mut all: BTreeMap<String, (bool, bool)> = BTreeMap::new();
    for table in on_old {
        all.entry(table).or_default().0 = true;
    }
    for table in on_new {
        all.entry(table).or_default().1 = true;
    }
    let mut compared = Vec::new();
    for (table, present) in all {
        compared.push(compare_table(old, new, table, present).await?);
    }
    Ok(compared)
}

async fn tables(server: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let sql = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
               WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'crossfade')
               AND n.nspname NOT LIKE 'pg\\_toast%' ORDER BY 1";
    Ok(server.query(sql, &[]).await?.iter().map(|row| row.get(0)).collect())
}

async fn compare_table(
    old: &Client,
    new: &Client,
    table: String,
    present: (bool, bool),
) -> Result<Compared, tokio_postgres::Error> {
    let (of_old, of_new) = tokio::try_join!(digest(old, &table, present.0), digest(new, &table, present.1))?;
    let mut compared = Compared { table, old_rows: of_old.rows, new_rows: of_new.rows, different: 0, example: None };
    if of_old.hash != of_new.hash {
        let mut surplus = HashMap::new();
        count(old, &compared.table, present.0, 1, &mut surplus).await?;
        count(new, &compared.table, present.1, -1, &mut surplus).await?;
        let only_old: i64 = surplus.values().filter(|surplus| **surplus > 0).sum();
        let only_new: i64 = -surplus.values().filter(|surplus| **surplus < 0).sum::<i64>();
        compared.different = only_old.max(only_new).unsigned_abs();
        compared.example = surplus.iter().find(|(_, surplus)| **surplus != 0).map(|(row, surplus)| {
            let row: String = String::from_utf8_lossy(row).trim_end().chars().take(200).collect();
            format!("only on {}: {row}", if *surplus > 0 { "old" } else { "new" })
        });
    }
    if present.0 != present.1 {
        compared.different = compared.different.max(1);
        compared.example = Some(format!("{} is not on {}", compared.table, if present.0 { "new" } else { "old" }));
    }
    Ok(compared)
}

struct TableDigest {
    rows: u64,
    hash: [u8; 32],
}

/// The hash over all rows, in an order that no collation of a server changes. `(t.*)` is the whole row, also where the
/// table has a column `t`, which a plain `t::text` would mean.
async fn digest(server: &Client, table: &str, present: bool) -> Result<TableDigest, tokio_postgres::Error> {
    let mut hash = Sha256::new();
    let mut rows = 0;
    if present {
        let sql = format!("COPY (SELECT (t.*)::text COLLATE \"C\" FROM {table} t ORDER BY 1) TO STDOUT");
        let mut lines = server.copy_out(&sql).await?.boxed();
        while let Some(line) = lines.try_next().await? {
            hash.update(&line);
            rows += 1;
        }
    }
    Ok(TableDigest { rows, hash: hash.finalize().into() })
}

/// Adds `by` for each row to its count; rows that both sides have cancel out, so that what stays is the difference.
async fn count(
    server: &Client,
    table: &str,
    present: bool,
    by: i64,
    surplus: &mut HashMap<Bytes, i64>,
) -> Result<(), tokio_postgres::Error> {
    if !present {
        return Ok(());
    }
    let mut lines = server.copy_out(&format!("COPY (SELECT (t.*)::text FROM {table} t) TO STDOUT")).await?.boxed();
    while let Some(line) = lines.try_next().await? {
        // A copy: the line is a slice of a large read buffer, which it would keep alive.
        *surplus.entry(Bytes::copy_from_slice(&line)).or_default() += by;
    }
    Ok(())
}
