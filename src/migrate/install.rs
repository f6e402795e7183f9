//! `crossfade install`: the schema `crossfade` on one side.

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
        "BEGIN; SET LOCAL client_min_messages = warning; SET LOCAL search_path = pg_catalog; SET LOCAL crossfade.installing = on; \
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
