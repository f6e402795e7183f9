//! Transactions that committed under other definitions than their plans were made for.
//!
//! A plan is made for definitions of one version. `crossfade.owe` compares it with the one that holds, in the flight of COMMIT: what the transaction
//! has written to is locked since its first write, so that nothing has changed there since. Where it is another one, the ledger has taken taints
//! of all tables for the transaction's debts, and the mirror's transaction is neither committed nor undone until the definitions have
//! been read again: those of *exactly* the version that `owe` has seen (a later one may look the same and not have been the same meanwhile) say what the
//! images mean. Nobody waits for that but those who write the same rows on the mirror, and they no longer than half of `mirror.timeout`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;
use tracing::{info, warn};

use super::follow::commit_mirror;
use crate::clock::Clock;
use crate::ledger::debts::{Debt, decode, encode};
use crate::mirror::conn::Carrier;
use crate::mirror::pool::Lease;
use crate::phase::Side;
use crate::shared::{Shared, Worker, World};

/// How long the definitions of one version are waited for, once the mirror's transaction is given up.
const LATE: Duration = Duration::from_secs(30);

/// A committed transaction whose plans are not proven.
pub(super) struct Doubt {
    /// In which it was planned.
    pub world: Arc<World>,
    /// Where it committed.
    pub side: Side,
    /// Its row in the ledger.
    pub id: i64,
    /// What stood there, had the plans been proven.
    pub debts: Bytes,
    /// Of the definitions when it committed; negative: it has changed some itself.
    pub version: i64,
}

/// What was found out.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The images mean what they seem to.
    Proven,
    /// Of these tables they do not.
    Changed(BTreeSet<u32>),
    /// Triggers or cascades have changed: anything may have been written out of sight.
    Unseen,
    /// The definitions of that version were not to be had.
    Unknown,
}

impl Doubt {
    /// Commits the mirror's transaction where that is proven to be right, or gives it up; the ledger then says what is owed, and no more.
    pub async fn decide(self, shared: Arc<Shared>, clock: Clock, carried: Option<(Box<Lease>, Carrier)>) {
        let patience = shared.config.load().mirror.timeout / 2;
        let mut verdict = self.judge(&shared, if carried.is_some() { patience } else { LATE }).await;
        if let Some((mut lease, carrier)) = carried {
            if verdict == Verdict::Proven && self.write(&shared, &self.debts, None).await {
                shared.paid.carrying.fetch_add(1, Ordering::SeqCst);
                info!(debt = self.id, "definitions have changed, and not those that the transaction depends on");
                commit_mirror(shared, clock, lease, (carrier, self.id), None).await;
                return;
            }
            if lease.conn.roll_back().await.is_ok() {
                lease.release();
            }
            if verdict == Verdict::Unknown {
                verdict = self.judge(&shared, LATE).await;
            }
        }
        match verdict {
            Verdict::Proven => {
                self.write(&shared, &self.debts, Some("definition")).await;
            }
            Verdict::Changed(tables) => {
                info!(debt = self.id, "definitions have changed under a transaction: its tables are owed");
                self.write(&shared, &self.without(&tables), Some("definition")).await;
            }
            Verdict::Unseen | Verdict::Unknown => {
                warn!(
                    debt = self.id,
                    "definitions have changed under a transaction, and what it wrote cannot be told: all tables are owed"
                );
            }
        }
        shared.owed.notify_one();
    }

    async fn judge(&self, shared: &Shared, patience: Duration) -> Verdict {
        let deadline = Instant::now() + patience;
        loop {
            let renewed = shared.renewed.notified();
            match self.look(&shared.world.load_full()) {
                Verdict::Unknown if self.version >= 0 => {}
                verdict => return verdict,
            }
            shared.stale.notify_one();
            if tokio::time::timeout_at(deadline, renewed).await.is_err() {
                return Verdict::Unknown;
            }
        }
    }

    fn look(&self, now: &World) -> Verdict {
        let Ok(debts) = decode(self.debts.clone()) else { return Verdict::Unknown };
        if now.phase.authority() != self.side || now.catalog.definitions.get(self.side).version != Some(self.version) {
            return Verdict::Unknown;
        }
        let numbers: BTreeSet<u32> = debts.iter().map(Debt::table).collect();
        let mut changed = BTreeSet::new();
        for number in numbers {
            match (self.world.catalog.tables.get(&number), now.catalog.tables.get(&number)) {
                (Some(before), Some(after)) if before.effects.get(self.side) != after.effects.get(self.side) => {
                    return Verdict::Unseen;
                }
                (Some(before), Some(after))
                    if before.same_on(self.side, after) && now.catalog.settled(self.side, after) => {}
                _ => drop(changed.insert(number)),
            }
        }
        if changed.is_empty() { Verdict::Proven } else { Verdict::Changed(changed) }
    }

    /// The debts, those of some tables replaced by taints.
    fn without(&self, tables: &BTreeSet<u32>) -> Bytes {
        let mut out = BytesMut::new();
        let debts = decode(self.debts.clone()).unwrap_or_default();
        debts.iter().filter(|debt| !tables.contains(&debt.table())).for_each(|debt| encode(debt, &mut out));
        tables.iter().for_each(|&table| encode(&Debt::Taint { table }, &mut out));
        out.freeze()
    }

    /// The ledger row is narrowed. False: it could not be; what it says is more than is owed, and never less.
    async fn write(&self, shared: &Shared, debts: &[u8], reason: Option<&str>) -> bool {
        match shared.narrow(self.side, self.id, debts, reason).await {
            Ok(()) => true,
            Err(error) => {
                warn!(debt = self.id, %error, "a debt of all tables could not be narrowed to what is owed");
                false
            }
        }
    }
}

impl Worker {
    /// Taints of all tables of this world, for the ledger.
    pub(super) fn all_tainted(&self, world: &World) -> Bytes {
        let mut known = self.taints.borrow_mut();
        if known.0 != world.generation {
            *known = (world.generation, taints(world.catalog.tables.keys().copied()));
        }
        known.1.clone()
    }
}

/// Taints of these tables, for the ledger.
fn taints(tables: impl Iterator<Item = u32>) -> Bytes {
    let mut out = BytesMut::new();
    tables.for_each(|table| encode(&Debt::Taint { table }, &mut out));
    out.freeze()
}
