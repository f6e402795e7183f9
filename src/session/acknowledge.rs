//! Before a client hears that its writes are safe, where new serves: whoever reads from now on must find them there, or be answered by the authority (R2, R3).

use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::Session;
use crate::ledger::debts;
use crate::plan::cache::Planned;
use crate::reads::block::WANTED;
use crate::sql::facts::Verb;

/// COMMIT PREPARED may take so long, where other proxies serve.
const SHOWING: Duration = Duration::from_secs(10);

/// What stands between the authority's COMMIT and its acknowledgement, where new serves.
pub(super) enum Behind {
    /// Nothing was written.
    Nothing,
    /// The mirror's COMMIT is under way; it tells whether it was answered.
    Commit(JoinHandle<bool>),
    /// The mirror does not have it.
    Owed,
    /// It was planned under definitions that have changed: it may have written anywhere.
    Doubt,
}

impl Session {
    /// Where new serves, an acknowledgement waits for the mirror's COMMIT (R2). What the mirror does not have blocks its tables, and where other proxies may
    /// serve, waits until none of them can rely on a look at the ledger from before it (R3).
    pub(super) async fn before_acknowledging(&mut self, behind: Behind, (debts, taints): (Bytes, Bytes)) {
        let config = self.shared.config.load_full();
        if !config.fleet && config.most.serve <= 0.0 {
            return;
        }
        let doubt = matches!(behind, Behind::Doubt);
        match behind {
            Behind::Nothing => return,
            Behind::Commit(answered) => {
                if let Ok(Ok(true)) = self.worker.clock.limit(config.mirror.timeout, answered).await {
                    return;
                }
            }
            Behind::Owed | Behind::Doubt => {}
        }
        let tables = [debts, taints].into_iter().filter_map(|debts| debts::decode(debts).ok()).flatten();
        let mut tables: Vec<u32> = tables.map(|debt| debt.table()).collect();
        if doubt {
            tables.extend(self.world.catalog.tables.keys());
        }
        tables.sort_unstable();
        tables.dedup();
        self.shared.reads.looks.owe(tables.iter().copied());
        self.cover(&tables, WANTED).await;
    }

    /// What is owed stands in the ledger: waits until no other proxy may serve these tables without knowing it.
    async fn cover(&self, tables: &[u32], wanted: Duration) {
        if self.shared.config.load().fleet {
            self.shared.reads.blocks.cover(tables, wanted).await;
        }
    }

    /// What is about to run has left debts in the ledger (CALL).
    pub(super) async fn owed_beforehand(&self, tables: &[u32]) {
        if self.world.phase.serves() {
            self.owe_all();
            self.cover(tables, WANTED).await;
        }
    }

    /// COMMIT PREPARED is about to show debts of long ago, of whatever tables: nothing is served until it has ended.
    pub(super) async fn before_showing(&self, planned: &Planned) {
        if planned.facts.verb == Verb::CommitPrepared && self.world.phase.serves() {
            let tables: Vec<u32> = self.world.catalog.tables.keys().copied().collect();
            self.cover(&tables, SHOWING).await;
            self.owe_all();
        }
    }

    fn owe_all(&self) {
        self.shared.reads.looks.owe(self.world.catalog.tables.keys().copied());
    }
}
