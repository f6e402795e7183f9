//! What a phase with a mirror begins with: a whole-table debt for each table, and copies of those that cannot be walked.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::BytesMut;
use tokio_postgres::Client;
use tracing::{info, warn};

use super::mover::MoveError;
use crate::catalog::{Catalog, Table};
use crate::config::Config;
use crate::ledger::debts::{Debt, encode};
use crate::migrate;
use crate::phase::Phase;
use crate::shared::Shared;

/// Tables without a key, and connections to copy them by. These are opened before any client is held.
pub(super) struct Keyless {
    pair: migrate::Pair,
    /// Its transaction takes the snapshot, and keeps it.
    exporter: Client,
    tables: Vec<Arc<Table>>,
}

/// Tables without a key, to be copied in the snapshot that was taken while no client wrote. The mirror's were emptied then; rows that clients
/// insert since are mirrored.
pub(super) struct Copies {
    keyless: Keyless,
    snapshot: String,
    /// By the table's number: its whole debt.
    debts: BTreeMap<u32, i64>,
}

impl Keyless {
    /// For a move to that phase. None: each table has a key, or cannot be mirrored.
    pub(super) async fn open(config: &Config, to: Phase, catalog: &Catalog) -> Result<Option<Keyless>, MoveError> {
        let tables = catalog.tables.values().filter(|table| table.key.is_none() && table.opaque.is_none());
        let tables: Vec<Arc<Table>> = tables.cloned().collect();
        if tables.is_empty() {
            return Ok(None);
        }
        let side = to.authority();
        let connect = |side| Shared::database(config, side).connect("crossfade copy");
        let (reader, writer, exporter) = tokio::try_join!(connect(side), connect(side.other()), connect(side))?;
        let mut pair = migrate::Pair::new(side, reader, writer, migrate::Settings::default()).await?;
        pair.warm().await?;
        // The snapshot is taken by the first statement that needs one.
        let begin = "SET idle_in_transaction_session_timeout = 0; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
        exporter.batch_execute(begin).await?;
        Ok(Some(Keyless { pair, exporter, tables }))
    }

    /// With no client writing: takes the snapshot, and empties the mirror's tables.
    async fn begin(mut self, catalog: &Catalog, debts: BTreeMap<u32, i64>) -> Result<Copies, MoveError> {
        let snapshot = self.exporter.query_one("SELECT pg_catalog.pg_export_snapshot()", &[]).await?.get(0);
        let tables: Vec<&Table> = self.tables.iter().map(AsRef::as_ref).collect();
        migrate::copy::prepare(&mut self.pair, catalog, &tables).await?;
        Ok(Copies { keyless: self, snapshot, debts })
    }
}

impl Copies {
    /// Copies them, with clients writing again. The debt of one that cannot be copied stays.
    pub(super) async fn run(mut self) {
        for table in &self.keyless.tables {
            let debts: Vec<i64> = self.debts.get(&table.number).copied().into_iter().collect();
            match migrate::copy::keyless(&mut self.keyless.pair, table, &self.snapshot, &debts).await {
                Ok(rows) => info!(table = %table.label(), rows, "a table without a key was copied"),
                Err(error) => {
                    warn!(%error, "a table without a key was not copied; its debt stays: `crossfade repair --table NAME` copies it under a lock");
                }
            }
        }
    }
}

/// A whole-table debt for each migrating table, in the transaction of the move on the side that is authority (what verify has found before is void); those
/// without a key are copied in the snapshot of this move.
pub(super) async fn owe_everything(
    shared: &Shared,
    authority: &Client,
    catalog: &Catalog,
    keyless: Option<Keyless>,
) -> Result<Option<Copies>, MoveError> {
    let ids: BTreeMap<u32, i64> = catalog.tables.keys().map(|number| (*number, shared.debt_id())).collect();
    let begun = async {
        match keyless {
            Some(keyless) => Ok(Some(keyless.begin(catalog, ids.clone()).await?)),
            None => Ok(None),
        }
    };
    let ((), copies) = tokio::try_join!(owe(authority, &ids), begun)?;
    Ok(copies)
}

async fn owe(authority: &Client, ids: &BTreeMap<u32, i64>) -> Result<(), MoveError> {
    authority.batch_execute("DELETE FROM crossfade.ledger; DELETE FROM crossfade.verified").await?;
    let debts: Vec<Vec<u8>> = ids.keys().map(|number| whole(*number)).collect();
    let ids: Vec<i64> = ids.values().copied().collect();
    let text = "INSERT INTO crossfade.ledger (id, debts, reason) SELECT id, debts, 'move' FROM unnest($1::bigint[], $2::bytea[]) AS owed(id, debts)";
    authority.execute(text, &[&ids, &debts]).await?;
    Ok(())
}

fn whole(table: u32) -> Vec<u8> {
    let mut debts = BytesMut::new();
    encode(&Debt::Table { table }, &mut debts);
    debts.to_vec()
}
