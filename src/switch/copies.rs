//! What a phase with a mirror begins with: a whole-table debt for each table, and copies of those that cannot be walked.

use std::sync::Arc;

use tokio_postgres::Client;
use tracing::info;

use super::mover::{Hands, MoveError};
use crate::catalog::Catalog;
use crate::config::Config;
use crate::ledger::debts::{Debt, encode};
use crate::migrate;
use crate::phase::Phase;
use crate::shared::Shared;

/// A table without a key, to be copied in the snapshot that was taken while no client wrote. The mirror's table was emptied then; rows that clients
/// insert since are mirrored.
pub(super) struct KeylessCopy {
    pair: migrate::Pair,
    /// Its transaction keeps the snapshot.
    _exporter: Client,
    snapshot: String,
    table: Arc<crate::catalog::Table>,
    debt: i64,
}

impl KeylessCopy {
    /// Copies it, with clients writing again.
    pub(super) async fn run(mut self) -> Result<(), migrate::Error> {
        let rows = migrate::copy::keyless(&mut self.pair, &self.table, &self.snapshot, &[self.debt]).await?;
        info!(table = %self.table.label(), rows, "a table without a key was copied");
        Ok(())
    }
}

/// A whole-table debt for each migrating table (what verify has found before is void); those without a key are copied in the snapshot of this move.
pub(super) async fn owe_everything(
    shared: &Arc<Shared>,
    config: &Config,
    hands: &Hands,
    to: Phase,
    catalog: &Arc<Catalog>,
) -> Result<Vec<KeylessCopy>, MoveError> {
    let authority = to.authority();
    hands.on(authority)?.batch_execute("DELETE FROM crossfade.ledger; DELETE FROM crossfade.verified").await?;
    let mut keyless = Vec::new();
    for table in catalog.tables.values() {
        let id = shared.debt_id();
        let mut debts = bytes::BytesMut::new();
        encode(&Debt::Table { table: table.number }, &mut debts);
        let sql = "INSERT INTO crossfade.ledger (id, debts, reason) VALUES ($1, $2, 'move')";
        hands.on(authority)?.execute(sql, &[&id, &&debts[..]]).await?;
        if table.key.is_none() && table.opaque.is_none() {
            keyless.push((table.clone(), id));
        }
    }
    let mut copies = Vec::new();
    for (table, id) in keyless {
        let reader = Shared::database(config, authority).connect("crossfade copy").await?;
        let writer = Shared::database(config, authority.other()).connect("crossfade copy").await?;
        let exporter = Shared::database(config, authority).connect("crossfade copy").await?;
        exporter.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        let snapshot = exporter.query_one("SELECT pg_export_snapshot()", &[]).await?.get(0);
        let mut pair = migrate::Pair::new(authority, reader, writer, migrate::Settings::default()).await?;
        migrate::copy::prepare(&mut pair, catalog, &table).await?;
        copies.push(KeylessCopy { pair, _exporter: exporter, snapshot, table, debt: id });
    }
    Ok(copies)
}
