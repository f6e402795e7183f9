//! `crossfade install` and `uninstall`: the schema `crossfade` on one side.

use tokio_postgres::Client;

use super::error::Error;
use crate::ledger::SCHEMA_SQL;
use crate::phase::Side;

/// The oldest server_version_num that a side may have.
fn oldest(side: Side) -> i32 {
    match side {
        Side::Old => 130_000,
        Side::New => 150_000,
    }
}

/// Makes schema `crossfade` where it is missing or incomplete; may be run again, and by several at once. The role must be allowed to
/// create a schema in the database.
pub async fn install(client: &Client, side: Side) -> Result<(), Error> {
    let failed = |doing| move |error: tokio_postgres::Error| Error::from_driver(side, doing, &error);
    let row = client
        .query_one(
            "SELECT current_setting('server_version_num')::int, current_setting('server_version'), current_database()",
            &[],
        )
        .await
        .map_err(failed("reading the version"))?;
    let (number, version, database): (i32, String, String) = (row.get(0), row.get(1), row.get(2));
    if number < oldest(side) {
        return Err(Error::Unfit(format!(
            "{side} is PostgreSQL {version}; it must be {} or newer: upgrade it before it takes part in a migration",
            oldest(side) / 10_000
        )));
    }
    // Concurrent runs would collide in the system catalogs.
    let sql = format!(
        "BEGIN; SET LOCAL client_min_messages = warning; SET LOCAL search_path = pg_catalog; \
         SELECT pg_advisory_xact_lock(hashtextextended('crossfade.install', 0)); {SCHEMA_SQL}; SELECT crossfade.incarnate(); COMMIT"
    );
    if let Err(error) = client.batch_execute(&sql).await {
        let _ = client.batch_execute("ROLLBACK").await;
        let told = Error::from_driver(side, "installing schema crossfade", &error);
        let Error::Server { code, .. } = &told else { return Err(told) };
        if code.code() == "42501" {
            return Err(Error::Unfit(format!(
                "{told}; run `crossfade install --print-sql` and let an owner of database {database} run it, or GRANT CREATE ON DATABASE"
            )));
        }
        return Err(told);
    }
    Ok(())
}

/// What dropping schema `crossfade` on one side would lose, a line for each; none: the schema is not there.
pub async fn kept(client: &Client, side: Side) -> Result<Option<Vec<String>>, Error> {
    let failed = |error: tokio_postgres::Error| Error::from_driver(side, "reading schema crossfade", &error);
    let there = "SELECT to_regnamespace('crossfade') IS NOT NULL";
    if !client.query_one(there, &[]).await.map_err(failed)?.get::<_, bool>(0) {
        return Ok(None);
    }
    let mut kept = Vec::new();
    for (table, what) in [
        ("ledger", "transactions whose rows the other side may lack"),
        ("applied", "tokens of transactions whose rows are there"),
        ("history", "entries of history"),
        ("backfill", "positions of backfills"),
        ("verified", "tables' verification results"),
    ] {
        let there = format!("SELECT to_regclass('crossfade.{table}') IS NOT NULL");
        if !client.query_one(&there, &[]).await.map_err(failed)?.get::<_, bool>(0) {
            continue;
        }
        let count = format!("SELECT count(*) FROM crossfade.{table}");
        let count: i64 = client.query_one(&count, &[]).await.map_err(failed)?.get(0);
        if count > 0 {
            kept.push(format!("{count} {what}"));
        }
    }
    Ok(Some(kept))
}

/// Other sessions of a proxy or a job on one side, by their names.
pub async fn at_work(client: &Client, side: Side) -> Result<Vec<String>, Error> {
    let text = "SELECT DISTINCT application_name FROM pg_stat_activity WHERE datname = current_database() \
        AND application_name ~ '^crossfade' AND application_name <> 'crossfade uninstall' ORDER BY 1";
    let rows = client.query(text, &[]).await;
    let rows = rows.map_err(|error| Error::from_driver(side, "looking for other sessions", &error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Removes schema `crossfade`, its event triggers, the fence and what lazy tables have from one side. The role must own them. Waits for no lock longer than ten seconds.
pub async fn uninstall(client: &Client, side: Side) -> Result<(), Error> {
    // One table at a time: nobody holds the lock of one and waits for another's.
    super::fence::lower(client, side).await?;
    if side == Side::New {
        super::lazy::remove(client).await?;
    }
    let sql = "BEGIN; SET LOCAL client_min_messages = warning; SET LOCAL lock_timeout = '10s'; \
        DROP EVENT TRIGGER IF EXISTS crossfade_ddl; DROP EVENT TRIGGER IF EXISTS crossfade_drop; DROP SCHEMA IF EXISTS crossfade CASCADE; COMMIT";
    if let Err(error) = client.batch_execute(sql).await {
        let _ = client.batch_execute("ROLLBACK").await;
        return Err(Error::from_driver(side, "removing schema crossfade", &error));
    }
    Ok(())
}
