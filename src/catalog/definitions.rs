//! Which version of its definitions a side has, and what is being changed there at the moment.
//!
//! An event trigger gives `crossfade.version` another number at each DDL, when the DDL has run and before its transaction commits. The number is no
//! transaction's: everyone sees it at once. So a reader who has seen a number may still read definitions of before: those of a transaction
//! that has not committed. Each such transaction holds a lock on `crossfade.ddl`, taken before it gave the number; its tables are *unsettled*.

use std::collections::HashSet;

use tokio_postgres::{Client, Error};

/// The definitions of one side, as they were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Definitions {
    /// `crossfade.version`, read before they were; None: no event trigger keeps it (`install` needs a superuser for that).
    pub version: Option<i64>,
    /// What transactions had changed by then that had not ended.
    pub unsettled: Unsettled,
}

/// Of which relations the definitions read may be those of before a change that had a version already.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Unsettled {
    /// Of none.
    #[default]
    Nothing,
    /// Of these (pg_class OIDs), which are locked until the change has committed or is undone.
    Relations(HashSet<u32>),
    /// Of any: something was changed that stands behind no table's lock, such as a type.
    Anything,
}

impl Definitions {
    /// What was read of these relations holds as long as the version does.
    pub fn settled(&self, oids: &[u32]) -> bool {
        match &self.unsettled {
            Unsettled::Nothing => true,
            Unsettled::Relations(relations) => !oids.iter().any(|oid| relations.contains(oid)),
            Unsettled::Anything => false,
        }
    }
}

/// The version that holds now; None: no event trigger keeps it, or the schema is not installed.
pub async fn version(client: &Client) -> Result<Option<i64>, Error> {
    let query = "SELECT pg_catalog.pg_sequence_last_value(pg_catalog.to_regclass('crossfade.version')::oid) \
        WHERE pg_catalog.to_regclass('crossfade.ddl') IS NOT NULL AND 2 = (SELECT pg_catalog.count(*) FROM pg_catalog.pg_event_trigger \
        WHERE evtname IN ('crossfade_ddl', 'crossfade_drop') AND evtenabled = 'A')";
    Ok(client.query_typed_opt(query, &[]).await?.and_then(|row| row.get(0)))
}

/// Version, then who is at work: whoever gave the version that was read has his lock still, or has ended and is visible to what is read later.
/// To be called before the definitions are read.
pub async fn read(client: &Client) -> Result<Definitions, Error> {
    let version = version(client).await?;
    let query = "WITH here AS (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()), \
        at_work AS (SELECT l.virtualtransaction AS transaction, l.mode FROM pg_catalog.pg_locks l, here \
        WHERE l.locktype = 'relation' AND l.granted AND l.database = here.oid AND l.relation = pg_catalog.to_regclass('crossfade.ddl') \
        AND l.mode IN ('RowShareLock', 'RowExclusiveLock')) \
        SELECT NULL::oid FROM at_work WHERE mode = 'RowShareLock' \
        UNION SELECT l.relation FROM pg_catalog.pg_locks l JOIN at_work ON at_work.transaction = l.virtualtransaction, here \
        WHERE l.locktype = 'relation' AND l.granted AND l.database = here.oid \
        AND l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')";
    let found: Vec<Option<u32>> = client.query(query, &[]).await?.iter().map(|row| row.get(0)).collect();
    let unsettled = match () {
        _ if found.is_empty() => Unsettled::Nothing,
        _ if found.contains(&None) => Unsettled::Anything,
        _ => Unsettled::Relations(found.into_iter().flatten().collect()),
    };
    Ok(Definitions { version, unsettled })
}
