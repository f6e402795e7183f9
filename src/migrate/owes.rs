//! Which keys of a table the ledger names.

use std::collections::HashSet;

use super::error::Error;
use super::link::Pair;
use super::lives;
use super::payable;
use crate::catalog::Table;
use crate::ledger::debts::{Debt, Values};

/// What the ledger holds of one table.
#[derive(Default)]
pub(super) struct Owes {
    /// All of it, or a range, or rows without a key; and it will be paid.
    pub whole: bool,
    any: bool,
    keys: HashSet<Values>,
}

impl Owes {
    /// Reads all of the ledger.
    pub async fn read(pair: &mut Pair, table: &Table) -> Result<Owes, Error> {
        let (mut owes, mut after) = (Owes::default(), 0);
        loop {
            let rows = payable::fetch_debts(pair.authority.at(), after).await?;
            let Some((last, _)) = rows.last() else { break };
            after = *last;
            for debt in rows.into_iter().flat_map(|(_, debts)| debts).filter(|debt| debt.table() == table.number) {
                match debt {
                    Debt::Key { key, .. } => {
                        owes.any = true;
                        owes.keys.insert(key);
                    }
                    _ => owes.whole = true,
                }
            }
        }
        if owes.whole {
            // Of an authority that may have lost something such a debt is not paid before somebody has seen what.
            let life = lives::read(&pair.authority.client, pair.authority.side).await?;
            owes.whole = life.is_none_or(|life| life.doubt.is_none());
        }
        Ok(owes)
    }

    /// A debt names the key.
    pub fn names(&self, table: &Table, key: &Values) -> bool {
        // Equal keys with other bytes are one key: which of them is owed cannot be seen from here.
        let blurred = !table.key.as_ref().is_some_and(|found| found.bytewise);
        self.keys.contains(key) || (blurred && self.any)
    }
}
