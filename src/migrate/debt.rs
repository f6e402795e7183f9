//! How much is owed, for metrics and status.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::error::Error;
use super::link::At;
use super::payable::{self, State};
use crate::ledger::debts::Debt;
use crate::phase::Side;

/// What one table owes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableDebt {
    /// Keys owed (a key in two ledger rows counts twice).
    pub keys: u64,
    /// Whole-table debts.
    pub whole: u64,
    /// Taints.
    pub taints: u64,
    /// Ranges of keys.
    pub ranges: u64,
    /// Rows of a table without a key.
    pub rows: u64,
}

/// What the ledger holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// By the table's number: what is owed. Debts that only wait to be cleared are not counted.
    pub tables: BTreeMap<u32, TableDebt>,
    /// Ledger rows that are owed.
    pub owed: u64,
    /// Ledger rows in flight, or (where the mirror cannot be asked) perhaps so.
    pub in_flight: u64,
    /// Age of the oldest ledger row that is owed or in flight.
    pub oldest: Option<Duration>,
    /// Size of the ledger on disk, indexes included.
    pub ledger_bytes: i64,
    /// The ledger is larger than what was read: the counts are of its oldest rows only.
    pub partial: bool,
}

/// Ledger rows that are read at most.
const ROWS: i64 = 10_000;
const PATIENCE: Duration = Duration::from_secs(5);

/// Counts what the ledger on the authority holds, by its oldest 10,000 rows (at most 16 MiB of debts). `mirror`: None where it cannot be
/// reached; then a debt whose carrier is not known to have ended counts as in flight.
pub async fn counts(authority_side: Side, authority: &Client, mirror: Option<&Client>) -> Result<Counts, Error> {
    let at = At { side: authority_side, client: authority, patience: PATIENCE };
    let size = "SELECT pg_total_relation_size('crossfade.ledger')";
    let mut counts =
        Counts { ledger_bytes: at.typed("reading the ledger's size", size, &[]).await?[0].get(0), ..Counts::default() };
    let entries = match mirror {
        Some(client) => {
            let mirror = At { side: authority_side.other(), client, patience: PATIENCE };
            let incarnation: String =
                mirror.typed("reading the incarnation", "SELECT crossfade.incarnate()::text", &[]).await?[0].get(0);
            payable::read(at, mirror, 0, ROWS, &incarnation).await?
        }
        None => payable::read_alone(at, ROWS).await?,
    };
    for entry in &entries {
        match entry.state {
            State::Carried => continue,
            State::InFlight => counts.in_flight += 1,
            State::Payable => {
                counts.owed += 1;
                entry.debts.iter().for_each(|debt| count(debt, &mut counts.tables));
            }
        }
        let age = Duration::from_micros(entry.age_us.max(0) as u64);
        counts.oldest = counts.oldest.max(Some(age));
    }
    if let Some(last) = entries.last() {
        let more = "SELECT EXISTS (SELECT FROM crossfade.ledger WHERE id > $1)";
        counts.partial = at.typed("reading the ledger", more, &[(&last.id, Type::INT8)]).await?[0].get(0);
    }
    Ok(counts)
}

fn count(debt: &Debt, tables: &mut BTreeMap<u32, TableDebt>) {
    let table = tables.entry(debt.table()).or_default();
    match debt {
        Debt::Key { .. } => table.keys += 1,
        Debt::Table { .. } => table.whole += 1,
        Debt::Taint { .. } => table.taints += 1,
        Debt::Range { .. } => table.ranges += 1,
        Debt::Row { .. } => table.rows += 1,
    }
}
