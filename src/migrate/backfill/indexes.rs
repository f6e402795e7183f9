//! Indexes of the mirror that are out of the way while their tables are filled (`--rebuild-indexes`): dropped, and made again when all is copied.
//!
//! What is to be made again stands in `crossfade.indexes` on the mirror, durably, before an index is dropped, and until it is valid again: whoever comes
//! after a kill makes it. Only such indexes go as their definition brings back whole, and as nothing relies on: not unique ones (a duplicate must be noticed,
//! ON CONFLICT needs them), none of a constraint, of a partitioned table, or that is a replica identity. All is done CONCURRENTLY: no writer waits.

use tokio_postgres::Client;

use super::super::error::Error;
use super::super::link::connect;
use super::super::locks::Kind;
use super::{Backfill, ELSEWHERE, Event, NAME};
use crate::catalog::Table;
use crate::phase::Side;

/// An index that is missing, or is being made again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Its name, quoted, with its schema.
    pub name: String,
    /// Its table, so too.
    pub relation: String,
    /// `CREATE INDEX`.
    pub definition: String,
    tablespace: Option<String>,
    comment: Option<String>,
}

impl Dropped {
    fn concurrently(&self) -> String {
        let rest = self.definition.strip_prefix("CREATE INDEX ").unwrap_or(&self.definition);
        format!("CREATE INDEX CONCURRENTLY {rest}")
    }
}

/// Statements for indexes wait for long transactions, holding nothing that a writer wants.
const SETTINGS: &str = "SET search_path = pg_catalog; SET statement_timeout = 0; SET lock_timeout = 0; SET synchronous_commit = on; \
    SET client_min_messages = warning";
/// An index whose table is read all the time stays.
const DROP_WAITS: &str = "30s";

/// Indexes that could go. `indisclustered` and targets of statistics are not in a definition; what depends on an index would go with it.
const CANDIDATES: &str = "SELECT format('%I.%I', n.nspname, c.relname), format('%I.%I', (SELECT o.nspname FROM pg_namespace o WHERE o.oid = t.relnamespace), t.relname), pg_get_indexdef(c.oid), \
    (SELECT s.spcname::text FROM pg_tablespace s WHERE s.oid = c.reltablespace), obj_description(c.oid, 'pg_class') \
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_class t ON t.oid = i.indrelid \
    WHERE i.indrelid = $1 AND t.relkind = 'r' AND NOT t.relispartition AND NOT i.indisunique AND NOT i.indisexclusion \
    AND i.indisvalid AND NOT i.indisreplident AND NOT i.indisclustered \
    AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = c.oid) \
    AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND coalesce(a.attstattarget, -1) <> -1) \
    AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid \
        OR d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype IN ('x', 'e')) ORDER BY 1, 2";

/// A session on the mirror for this.
pub(super) struct Indexes<'a> {
    side: Side,
    client: Client,
    tell: &'a (dyn Fn(Event) + Send + Sync),
}

impl<'a> Indexes<'a> {
    /// Over a connection of its own.
    pub async fn open(backfill: &Backfill, tell: &'a (dyn Fn(Event) + Send + Sync)) -> Result<Indexes<'a>, Error> {
        let side = backfill.authority_side.other();
        let indexes = Indexes { side, client: connect(&backfill.mirror, side, NAME).await?, tell };
        indexes.batch("setting up the session", SETTINGS).await?;
        Ok(indexes)
    }

    fn told(&self, table: &Table, what: String) {
        (self.tell)(Event::Index { table: table.number, what });
    }

    async fn batch(&self, doing: &'static str, sql: &str) -> Result<(), Error> {
        self.client.batch_execute(sql).await.map_err(|error| Error::from_driver(self.side, doing, &error))
    }

    /// One at a time works on a table's indexes. It is not waited for in one statement: that would be a transaction that who makes an index waits for.
    async fn alone(&self, table: &Table) -> Result<(), Error> {
        let text = "SELECT pg_try_advisory_lock($1, $2)";
        loop {
            let row = self.client.query_one(text, &[&(Kind::Indexes as i32), &(table.number as i32)]).await;
            let row = row.map_err(|error| Error::from_driver(self.side, "locking a table's indexes", &error))?;
            if row.get(0) {
                return Ok(());
            }
            tokio::time::sleep(ELSEWHERE).await;
        }
    }

    async fn release(&self, table: &Table) -> Result<(), Error> {
        let text = format!("SELECT pg_advisory_unlock({}, {})", Kind::Indexes as i32, table.number);
        self.batch("unlocking a table's indexes", &text).await
    }

    /// Drops what can be made again of a table's indexes.
    pub async fn set_aside(&self, table: &Table) -> Result<(), Error> {
        self.alone(table).await?;
        let doing = "setting indexes aside";
        let failed = |error: tokio_postgres::Error| Error::from_driver(self.side, doing, &error);
        self.batch(doing, &format!("SET lock_timeout = '{DROP_WAITS}'")).await?;
        for row in self.client.query(CANDIDATES, &[table.oid.get(self.side)]).await.map_err(failed)? {
            let (name, relation, definition): (String, String, String) = (row.get(0), row.get(1), row.get(2));
            let (tablespace, comment): (Option<String>, Option<String>) = (row.get(3), row.get(4));
            let keep = "INSERT INTO crossfade.indexes (number, name, relation, definition, tablespace, comment) VALUES ($1, $2, $3, $4, $5, $6) \
                ON CONFLICT (name) DO UPDATE SET number = excluded.number, relation = excluded.relation, definition = excluded.definition, \
                tablespace = excluded.tablespace, comment = excluded.comment";
            let number = table.number as i32;
            let values: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
                [&number, &name, &relation, &definition, &tablespace, &comment];
            self.client.execute(keep, &values).await.map_err(failed)?;
            let told = match self.batch(doing, &format!("DROP INDEX CONCURRENTLY {name}")).await {
                Ok(()) => format!("index {name} is dropped, and made again when all is copied"),
                // Perhaps not valid any more: then it is made again at the end.
                Err(error) if error.is_about_a_table() => format!("index {name} stays: {error}"),
                Err(error) => return Err(error),
            };
            self.told(table, told);
        }
        self.batch(doing, "SET lock_timeout = 0").await?;
        self.release(table).await
    }

    /// Makes what was dropped of a table's indexes, by this run or one before.
    pub async fn make(&self, table: &Table) -> Result<(), Error> {
        if dropped(&self.client, self.side, Some(table.number)).await?.is_empty() {
            return Ok(());
        }
        self.alone(table).await?;
        let mut made = false;
        for index in dropped(&self.client, self.side, Some(table.number)).await? {
            made |= self.make_one(table, &index).await?;
        }
        if made {
            // Of expressions there are statistics only where an index has them.
            self.batch("analysing a table", &format!("ANALYZE {}", table.qualified(self.side))).await?;
        }
        self.release(table).await
    }

    /// False: it is there.
    async fn make_one(&self, table: &Table, index: &Dropped) -> Result<bool, Error> {
        let doing = "making an index again";
        let failed = |error: tokio_postgres::Error| Error::from_driver(self.side, doing, &error);
        let valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)";
        let there = self.client.query_opt(valid, &[&index.name]).await.map_err(failed)?;
        let there = there.map(|row| row.get::<_, bool>(0));
        if there == Some(false) {
            // Whoever made it, or dropped it, was ended in the middle.
            self.batch(doing, &format!("DROP INDEX CONCURRENTLY {}", index.name)).await?;
        }
        if there != Some(true) {
            self.told(table, format!("making index {}", index.name));
            let tablespace = index.tablespace.as_deref().map_or_else(|| "''".to_owned(), literal);
            self.batch(doing, &format!("SET default_tablespace = {tablespace}")).await?;
            let made = self.batch(doing, &index.concurrently()).await;
            made.map_err(|error| unmade(error, index))?;
            if let Some(comment) = &index.comment {
                self.batch(doing, &format!("COMMENT ON INDEX {} IS {}", index.name, literal(comment))).await?;
            }
        }
        let text = "DELETE FROM crossfade.indexes WHERE name = $1";
        self.client.execute(text, &[&index.name]).await.map_err(failed)?;
        Ok(there != Some(true))
    }
}

/// As SQL, whatever standard_conforming_strings says.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

fn unmade(error: Error, index: &Dropped) -> Error {
    match error {
        Error::Server { side, .. } => Error::Unfit(format!(
            "{error}; index {} of {} was dropped by a backfill on {side} and cannot be made again: make it by hand (crossfade check shows how), \
             or DELETE FROM crossfade.indexes WHERE name = '{}' there if it is not wanted any more",
            index.name, index.relation, index.name
        )),
        error => error,
    }
}

/// Indexes that a backfill has dropped on this side and not made again, of one table or of all. Nothing where schema crossfade does not know of such.
pub async fn dropped(client: &Client, side: Side, number: Option<u32>) -> Result<Vec<Dropped>, Error> {
    let failed = |error: tokio_postgres::Error| Error::from_driver(side, "reading which indexes are missing", &error);
    let there = "SELECT to_regclass('crossfade.indexes') IS NOT NULL";
    if !client.query_one(there, &[]).await.map_err(failed)?.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let text = "SELECT name, relation, definition, tablespace, comment FROM crossfade.indexes WHERE $1::int IS NULL OR number = $1 ORDER BY name";
    let rows = client.query(text, &[&number.map(|number| number as i32)]).await.map_err(failed)?;
    let one = |row: &tokio_postgres::Row| Dropped {
        name: row.get(0),
        relation: row.get(1),
        definition: row.get(2),
        tablespace: row.get(3),
        comment: row.get(4),
    };
    Ok(rows.iter().map(one).collect())
}
