//! Who writes migrating tables on a server: clients of proxies and others, seen by their locks.

use std::time::{Duration, Instant};

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use super::mover::MoveError;
use crate::catalog::Catalog;
use crate::phase::Side;

/// Backends with a writer's lock on a migrating table. $1: the tables, $2: backends to leave out, $3: younger transactions are left out.
const WRITERS: &str = "SELECT coalesce('backend ' || l.pid, 'a prepared transaction'), coalesce(a.application_name, \
        (SELECT p.gid FROM pg_catalog.pg_prepared_xacts p JOIN pg_catalog.pg_locks x ON x.locktype = 'transactionid' AND x.transactionid = p.transaction \
            WHERE x.pid IS NULL AND x.virtualtransaction = l.virtualtransaction LIMIT 1), ''), l.pid FROM pg_catalog.pg_locks l \
    LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
    WHERE l.locktype = 'relation' AND l.relation = ANY ($1) AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) \
    AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') AND l.granted \
    AND (l.pid IS NULL OR l.pid <> ALL ($2)) AND coalesce(a.xact_start < clock_timestamp() - $3::text::interval, true) LIMIT 1";

/// Prepared transactions that have written a migrating table ($1), or are a proxy's.
const PREPARED: &str = "SELECT p.gid FROM pg_catalog.pg_prepared_xacts p WHERE p.database = current_database() AND (p.gid LIKE 'crossfade:%' \
    OR EXISTS (SELECT FROM pg_catalog.pg_locks x JOIN pg_catalog.pg_locks l USING (virtualtransaction) WHERE x.pid IS NULL AND x.locktype = 'transactionid' \
        AND x.transactionid = p.transaction AND l.pid IS NULL AND l.locktype = 'relation' \
        AND l.relation = ANY ($1) AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))) ORDER BY 1";

/// A transaction around the proxy that is older than this is named before anybody is held.
const LONG: &str = "1 second";

/// How often it is looked again.
const LOOK: Duration = Duration::from_millis(20);

fn oids(catalog: &Catalog, side: Side) -> Vec<u32> {
    catalog.by_oid.get(side).keys().copied().collect()
}

/// Who writes around the proxies, and has for a while. `ours`: their server processes.
pub async fn foreign(
    authority: &Client,
    catalog: &Catalog,
    side: Side,
    ours: &[i32],
) -> Result<Option<String>, tokio_postgres::Error> {
    let row = authority.query_opt(WRITERS, &[&oids(catalog, side), &ours, &LONG]).await?;
    Ok(row.map(|row| format!("{} ({})", row.get::<_, String>(0), row.get::<_, String>(1))))
}

/// Server processes on that side that serve clients of any proxy. Schema crossfade is there.
pub async fn of_proxies(authority: &Client) -> Result<Vec<i32>, tokio_postgres::Error> {
    let text = "SELECT s.pid FROM crossfade.sessions s JOIN pg_catalog.pg_stat_activity a ON a.pid = s.pid AND a.backend_start IS NOT DISTINCT FROM s.start";
    Ok(authority.query(text, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// Names of prepared transactions that a change of the authority would leave behind.
pub async fn prepared(authority: &Client, side: Side, catalog: &Catalog) -> Result<Vec<String>, tokio_postgres::Error> {
    let found = authority.query_typed(PREPARED, &[(&oids(catalog, side), Type::OID_ARRAY)]).await?;
    Ok(found.iter().map(|row| row.get(0)).collect())
}

/// Asks once, so that the server has at hand what it needs for it.
pub async fn warm(authority: &Client, catalog: &Catalog, side: Side) -> Result<(), tokio_postgres::Error> {
    holder(authority, &oids(catalog, side), LONG).await.map(drop)
}

async fn holder(authority: &Client, oids: &[u32], older: &str) -> Result<Option<Row>, tokio_postgres::Error> {
    let nobody: [i32; 0] = [];
    let parameters: [(&(dyn ToSql + Sync), Type); 3] =
        [(&oids, Type::OID_ARRAY), (&&nobody[..], Type::INT4_ARRAY), (&older, Type::TEXT)];
    authority.query_typed_opt(WRITERS, &parameters).await
}

/// Transactions that write migrating tables and are not ours to hold (a proxy that died, other clients) must have ended: what they write later
/// would be mirrored by nobody and copied too early, or owed by a side that is no authority any more. With `terminate` those that have not ended by
/// the deadline are ended.
pub async fn gone(
    authority: &Client,
    catalog: &Catalog,
    side: Side,
    deadline: Instant,
    terminate: bool,
) -> Result<(), MoveError> {
    let oids = oids(catalog, side);
    let mut until = deadline;
    let mut ended = false;
    loop {
        let Some(row) = holder(authority, &oids, "0 seconds").await? else { return Ok(()) };
        if Instant::now() > until {
            let (who, name): (String, String) = (row.get(0), row.get(1));
            match row.get::<_, Option<i32>>(2).filter(|_| terminate && !ended) {
                Some(_) => {
                    (ended, until) = (true, Instant::now() + super::end::ENDS);
                    let text = format!(
                        "SELECT pg_catalog.pg_terminate_backend(w.pid) FROM ({}) AS w(who, name, pid)",
                        WRITERS.trim_end_matches(" LIMIT 1")
                    );
                    authority.execute(&text, &[&oids, &Vec::<i32>::new(), &"0 seconds"]).await?;
                }
                None => {
                    return Err(MoveError::Held(format!(
                        "{who} ({name}) on {side} holds a writer's lock on a migrating table and has not ended within move.pause"
                    )));
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}
