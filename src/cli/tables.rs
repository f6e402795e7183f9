//! What commands about tables are asked for: which, how many at once, how fast.

use std::sync::Arc;

use super::{Trouble, named};
use crate::catalog::{Catalog, Table};

/// Tables, and how they are worked on.
#[derive(clap::Args)]
pub struct TableArguments {
    /// These tables only (old's names).
    #[arg(value_name = "TABLE")]
    tables: Vec<String>,
    /// The same, one at a time.
    #[arg(long = "table", value_name = "TABLE")]
    more_tables: Vec<String>,
    /// So many parts of tables are worked on at once. Each takes sessions of its own on both sides.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// Rows per second at most, over all jobs.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub rate: Option<u64>,
}

impl TableArguments {
    /// Tables are named; else all are meant.
    pub fn any_named(&self) -> bool {
        !self.tables.is_empty() || !self.more_tables.is_empty()
    }

    /// All tables that migrate.
    pub fn all(&self) -> bool {
        !self.any_named()
    }

    /// How many are worked on at once.
    pub fn jobs(&self) -> usize {
        self.jobs.into()
    }

    /// The tables that are meant, by name, each once. Err: a name that is no migrating table's.
    pub fn tables(&self, catalog: &Catalog) -> Result<Vec<Arc<Table>>, Trouble> {
        let mut tables: Vec<Arc<Table>> = match self.any_named() {
            false => catalog.tables.values().cloned().collect(),
            true => {
                let names = self.tables.iter().chain(&self.more_tables);
                names.map(|name| named(catalog, name).cloned()).collect::<Result<_, _>>()?
            }
        };
        tables.sort_by_key(|table| table.label());
        tables.dedup_by_key(|table| table.number);
        Ok(tables)
    }
}
