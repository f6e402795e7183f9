//! `crossfade backfill` where new is the authority: what only old has is brought over, in chunks of keys, in the way in which a client's statement brings it.
//! So nothing has to be remembered: who is killed leaves what it has brought, and whoever comes next brings the rest.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::catalog::{Table, quote};
use crate::ledger::lazy as named;
use crate::migrate::error::{Error, Meaning};
use crate::phase::Side;

/// Keys in one transaction at most.
const CHUNK: i64 = 1000;
/// How long a pass that could not have some keys waits before the next.
const REST: Duration = Duration::from_millis(200);

/// A table's statements.
struct Texts {
    /// Begins a transaction of this epoch.
    begin: String,
    /// Brings a chunk over, from the first key on or behind one: rows brought, keys, the last key as texts. The first parameter is how many.
    bring: [String; 2],
    /// The same, and brings nothing.
    look: [String; 2],
    /// Whether anything is on old alone.
    left: String,
}

impl Texts {
    /// `wait`: for a lock that a client holds, while others may wait for this (law 4): long before deadlock_timeout.
    ///
    /// Chunks are of old's keys, whether new lacks them or not: so their order and their number are old's to see to, by its index. Of a key of several columns
    /// the first is bounded by itself, too, since a comparison of rows is not sent there.
    fn of(table: &Table, epoch: u64, wait: Duration) -> Texts {
        let columns: Vec<_> = table.key.iter().flat_map(|key| &key.columns).map(|&at| &table.columns[at]).collect();
        let equals = table.key.as_ref().map_or(&[][..], |key| &key.equals.new);
        let names: Vec<String> = columns.iter().map(|column| quote(&column.name.new)).collect();
        let kind = |n: usize| columns[n].kind.name.new.as_str();
        let list = names.iter().map(|name| format!("m.{name}")).collect::<Vec<_>>().join(", ");
        let each = |write: &dyn Fn(usize, &String) -> String| {
            names.iter().enumerate().map(|(n, name)| write(n, name)).collect::<Vec<_>>().join(", ")
        };
        let same = |other: &str| {
            let one = |(n, name): (usize, &String)| format!("{other}.{name} {} m.{name}", equals[n]);
            names.iter().enumerate().map(one).collect::<Vec<_>>().join(" AND ")
        };
        let [old, gone, missing, bring] = ["old", "gone", "missing", "bring"].map(|what| named(what, table.number));
        let lacking = format!(
            "NOT EXISTS (SELECT FROM ONLY {} AS n WHERE {}) AND NOT EXISTS (SELECT FROM {gone} AS g WHERE {})",
            table.qualified(Side::New),
            same("n"),
            same("g")
        );
        let keys = each(&|n, name| format!("(pg_catalog.array_agg(m.{name}) FILTER (WHERE {lacking}))::{}[]", kind(n)));
        let last = each(&|_, name| format!("(pg_catalog.array_agg(m.{name}))[pg_catalog.count(*)]::text"));
        let bound = each(&|n, _| format!("${}::text::{}", n + 2, kind(n)));
        let first = names.first().map_or_else(String::new, |name| format!("m.{name} >= $2::text::{}", kind(0)));
        let behind = format!("{first} AND ({list}) > ({bound})");
        let chunk = |first: &str, within: &str| {
            format!(
                "SELECT {first}, pg_catalog.count(*), {last} FROM (SELECT {list} FROM {old} AS m WHERE {within} ORDER BY {list} LIMIT $1::bigint) AS m"
            )
        };
        let bring = format!("{bring}({keys})");
        let wait = wait.as_millis();
        Texts {
            begin: format!(
                "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = on; SET LOCAL lock_timeout = {wait}; \
                 LOCK TABLE crossfade.epoch_{epoch} IN ACCESS SHARE MODE; SELECT crossfade.touch_old(true)"
            ),
            bring: [chunk(&bring, "true"), chunk(&bring, &behind)],
            look: [chunk("0::bigint", "true"), chunk("0::bigint", &behind)],
            left: format!("SELECT EXISTS (SELECT FROM {missing})"),
        }
    }
}

/// Brings all that is left of a table. New is the authority of this epoch; it ends where that is no longer so. `progress` is told the rows after each chunk.
/// Returns how many; the table is no longer lazy then.
pub async fn fill(
    new: &Client,
    table: &Table,
    epoch: u64,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<u64, Error> {
    let failed = |error: tokio_postgres::Error| Error::from_driver(Side::New, "bringing rows over", &error);
    let limit = "SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'deadlock_timeout'";
    let limit: i64 = new.query_one(limit, &[]).await.map_err(failed)?.get(0);
    let texts = Texts::of(table, epoch, Duration::from_millis(limit.cast_unsigned().max(40) / 4));
    let (mut rows, mut size) = (0, CHUNK);
    let mut after: Option<Vec<Option<String>>> = None;
    // Of this pass: rows brought, and keys that a client held locked.
    let (mut brought, mut locked) = (0, 0);
    loop {
        let chunk = match chunk(new, &texts, size, after.as_deref()).await {
            Ok(chunk) => {
                size = CHUNK.min(size * 4);
                chunk
            }
            Err(error) if error.meaning() == Meaning::Busy && size > 1 => {
                size = (size / 8).max(1);
                continue;
            }
            Err(error) if error.meaning() == Meaning::Busy => {
                locked += 1;
                let look = &texts.look[usize::from(after.is_some())];
                asked(new, &texts.begin, look, 1, after.as_deref()).await?
            }
            Err(error) => return Err(error),
        };
        rows += chunk.brought;
        brought += chunk.brought;
        progress(rows);
        if chunk.keys > 0 {
            after = Some(chunk.last);
            continue;
        }
        // What only old has never grows.
        if locked == 0 && is_complete(new, &texts, table, epoch).await? {
            return Ok(rows);
        }
        match (brought, locked) {
            (0, 0) => {
                return Err(Error::Unfit(format!(
                    "table {}: rows are left on old that new does not take; look at its constraints on both sides",
                    table.label()
                )));
            }
            (_, 0) => {}
            _ => tokio::time::sleep(REST).await,
        }
        // Where the two sides order keys otherwise, a pass may leave some out, too.
        (after, brought, locked) = (None, 0, 0);
    }
}

/// What became of a chunk.
struct Chunk {
    brought: u64,
    keys: i64,
    last: Vec<Option<String>>,
}

async fn chunk(new: &Client, texts: &Texts, size: i64, after: Option<&[Option<String>]>) -> Result<Chunk, Error> {
    let done = asked(new, &texts.begin, &texts.bring[usize::from(after.is_some())], size, after).await;
    if done.is_err() {
        let _ = new.batch_execute("ROLLBACK").await;
    }
    done
}

async fn asked(
    new: &Client,
    begin: &str,
    text: &str,
    size: i64,
    after: Option<&[Option<String>]>,
) -> Result<Chunk, Error> {
    let failed = |error: tokio_postgres::Error| Error::from_driver(Side::New, "bringing rows over", &error);
    new.batch_execute(begin).await.map_err(failed)?;
    let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&size];
    parameters.extend(after.unwrap_or_default().iter().map(|value| value as &(dyn ToSql + Sync)));
    let row = new.query_one(text, &parameters).await.map_err(failed)?;
    new.batch_execute("COMMIT").await.map_err(failed)?;
    Ok(Chunk {
        brought: row.get::<_, Option<i64>>(0).unwrap_or(0).cast_unsigned(),
        keys: row.get(1),
        last: (2..row.len()).map(|at| row.get(at)).collect(),
    })
}

/// A look at all of it; where nothing is left, that is noted. Under the lock of the epoch: in another, what was found says nothing.
async fn is_complete(new: &Client, texts: &Texts, table: &Table, epoch: u64) -> Result<bool, Error> {
    let failed = |error: tokio_postgres::Error| Error::from_driver(Side::New, "looking for rows on old alone", &error);
    let looked = async {
        new.batch_execute(&texts.begin).await?;
        let left: bool = new.query_one(texts.left.as_str(), &[]).await?.get(0);
        if !left {
            let note = "UPDATE crossfade.lazy SET complete = true, changed = clock_timestamp() WHERE number = $1";
            new.execute(note, &[&table.number.cast_signed()]).await?;
        }
        new.batch_execute("COMMIT").await?;
        Ok(!left)
    };
    let complete = looked.await.map_err(failed)?;
    if complete {
        tracing::info!(table = table.label(), epoch, "new has all rows: it is no longer lazy");
        // Behind the commit: who reads definitions because of it is to see it.
        new.batch_execute(RENEW).await.map_err(failed)?;
    }
    Ok(complete)
}

/// Whoever plans statements reads the definitions again.
const RENEW: &str = "SELECT setval('crossfade.version', ('x' || substr(replace(gen_random_uuid()::text, '-', ''), 1, 15))::bit(60)::bigint | 2)";
