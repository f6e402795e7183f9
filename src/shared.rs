//! What all sessions and jobs of one proxy share, handed to them as a value.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use tokio::sync::{Notify, Semaphore};

use crate::auth::verifiers::Verifiers;
use crate::backend::connect::Address;
use crate::catalog::{Catalog, Sides};
use crate::clock::Clock;
use crate::config::{Config, Database};
use crate::metrics::Metrics;
use crate::migrate::sweep::AtWork;
use crate::mirror::health::Health;
use crate::mirror::pool::Pool;
use crate::phase::{Phase, Side};
use crate::plan::cache::Plans;
use crate::reads::Reads;
use crate::switch::ahead::Ahead;
use crate::switch::bell::Bells;
use crate::switch::fleet::Registry;
use crate::switch::gate::Gate;
use crate::wire::tls::ServerTls;

/// What holds at a moment: a transaction sees one world from its first statement to its end.
#[derive(Clone, Debug)]
pub struct World {
    /// Number of the move that made it so.
    pub epoch: u64,
    /// The phase.
    pub phase: Phase,
    /// Counts the loads of the catalog.
    pub generation: u64,
    /// The migrating tables. Empty in phases without a mirror until it is first needed.
    pub catalog: Arc<Catalog>,
}

impl Default for World {
    /// Phase old, before any move.
    fn default() -> World {
        World { epoch: 0, phase: Phase::Old, generation: 0, catalog: Arc::default() }
    }
}

impl World {
    /// New is the authority of the tables that migrate, and others stay on old.
    pub fn splits(&self) -> bool {
        self.phase.authority() == Side::New && !self.catalog.stays.is_empty()
    }

    /// New is the authority, and lacks rows of some tables.
    pub fn merges(&self) -> bool {
        self.phase.authority() == Side::New && self.catalog.behind.is_some()
    }
}

/// A debt whose mirror transaction has answered COMMIT: cleared after the next flush there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paid {
    /// Its number in the ledger.
    pub id: i64,
    /// The mirror's incarnation in which COMMIT was answered.
    pub incarnation: [u8; 16],
}

/// Debts that wait for the next flush.
#[derive(Debug, Default)]
pub struct PaidQueue {
    waiting: Mutex<Vec<Paid>>,
    /// Mirror transactions whose COMMIT is under way, and batches that are being cleared.
    pub carrying: AtomicI64,
}

impl PaidQueue {
    /// One more.
    pub fn push(&self, paid: Paid) {
        lock(&self.waiting).push(paid);
    }

    /// All that wait, taken out.
    pub fn take(&self) -> Vec<Paid> {
        std::mem::take(&mut lock(&self.waiting))
    }

    /// Nothing waits and nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.carrying.load(Ordering::SeqCst) == 0 && lock(&self.waiting).is_empty()
    }
}

/// Where the CancelRequests of clients go.
#[derive(Debug, Default)]
pub struct Cancels {
    targets: Mutex<HashMap<Bytes, (Side, Address, Bytes)>>,
}

impl Cancels {
    /// The client with this key is now served by that backend.
    pub fn set(&self, client: Bytes, side: Side, address: Address, key: Bytes) {
        lock(&self.targets).insert(client, (side, address, key));
    }

    /// The client has gone.
    pub fn remove(&self, client: &Bytes) {
        lock(&self.targets).remove(client);
    }

    /// Server processes on that side that serve our clients.
    pub fn pids(&self, side: Side) -> Vec<i32> {
        let targets = lock(&self.targets);
        let of_side = targets.values().filter(|(known, ..)| *known == side);
        of_side.filter_map(|(_, _, key)| Some(i32::from_be_bytes(key.get(..4)?.try_into().ok()?))).collect()
    }

    /// Where a CancelRequest with this key goes.
    pub fn get(&self, client: &Bytes) -> Option<(Side, Address, Bytes)> {
        lock(&self.targets).get(client).cloned()
    }
}

/// The class of the advisory locks by which a session on old names the one on new that is the same client's, with its process id.
pub const PAIR_CLASS: i32 = 0x0c0f_fade;

/// Shared by all.
pub struct Shared {
    /// The file, as it was last read without an error.
    pub config: ArcSwap<Config>,
    /// What holds.
    pub world: ArcSwap<World>,
    /// Where transactions wait while the phase moves.
    pub gate: Arc<Gate>,
    /// Where transactions on databases that do not migrate pass: no move concerns them, only the end of the proxy.
    pub aside: Arc<Gate>,
    /// Sessions that wait for their clients are called to look around.
    pub calls: tokio::sync::watch::Sender<()>,
    /// Each side as mirror.
    pub health: Sides<Health>,
    /// Debts that wait for a flush.
    pub paid: PaidQueue,
    /// Metrics.
    pub metrics: Metrics,
    /// Plans by shape.
    pub plans: Plans,
    /// What is known of reads on both sides.
    pub reads: Reads,
    /// CancelRequests.
    pub cancels: Cancels,
    /// The file as it was at the start: some of it needs a restart.
    pub started: Arc<Config>,
    /// Secrets of clients, as the file last said.
    pub verifiers: ArcSwap<Verifiers>,
    /// The certificate for clients, as it last lay beside the file.
    pub tls: ArcSwapOption<ServerTls>,
    /// The next debt's number. Numbers are drawn by the proxy, in blocks from a sequence: nextval in a client's session would change its lastval().
    pub next_debt: AtomicI64,
    /// A table's definition is no longer what the catalog says.
    pub stale: Notify,
    /// The definitions were read again.
    pub renewed: Notify,
    /// The epoch in which a session began a transaction is over.
    pub overtaken: Notify,
    /// The world is that of another epoch.
    pub learnt: Notify,
    /// The phase that the operator has asked this proxy for, until it holds or another proxy has moved elsewhere.
    pub intent: Mutex<Option<Phase>>,
    /// This proxy among others.
    pub registry: Registry,
    /// Sessions that may have a cursor WITH HOLD, or listen.
    pub holding: AtomicI64,
    /// This process has run the schema's script there.
    pub installed: Sides<AtomicBool>,
    /// For sessions that move to another authority: so many at once.
    pub turns: Arc<Semaphore>,
    /// An authority that is about to change.
    pub ahead: Ahead,
    /// Server processes that were cancelled because of a deadlock across both sides.
    pub deadlocked: Mutex<HashSet<(Side, i32)>>,
    /// There is something to repair.
    pub owed: Notify,
    /// The file may want another phase.
    pub wanted: Notify,
    /// An operator asks for the file to be read again.
    pub reload: Notify,
    /// That was done.
    pub reloaded: Notify,
    /// ... and for the end of this proxy.
    pub shutdown: Notify,
    /// This proxy's sweep, while it is at work.
    pub sweep: Arc<AtWork>,
    /// A control connection to the ledger of a side, for debts that say more than is owed.
    pub ledger: tokio::sync::Mutex<Option<(Side, tokio_postgres::Client)>>,
    /// Held by whoever changes the world.
    pub switching: tokio::sync::Mutex<()>,
    /// Clients are served.
    pub ready: AtomicBool,
    /// Why the last file was refused.
    pub config_error: Mutex<Option<String>>,
    /// Why this proxy cannot follow another one's move.
    pub behind: Mutex<Option<String>>,
    /// Why the phase is not yet what the file says.
    pub waiting: Mutex<Option<String>>,
}

impl Shared {
    /// The number of a new debt.
    pub fn debt_id(&self) -> i64 {
        self.next_debt.fetch_add(1, Ordering::Relaxed)
    }

    /// Replaces what a ledger row on that side says by debts that are all that is owed. Err: the row stays as it is.
    pub async fn narrow(&self, side: Side, id: i64, debts: &[u8], reason: Option<&str>) -> Result<(), String> {
        let mut ledger = self.ledger.lock().await;
        if ledger.as_ref().is_none_or(|(known, client)| *known != side || client.is_closed()) {
            let config = self.config.load_full();
            let client = Shared::database(&config, side).connect("crossfade debts").await.map_err(|e| e.to_string())?;
            // A crash that loses it leaves the row as it was, which says more.
            client.batch_execute("SET synchronous_commit = off").await.map_err(|error| error.to_string())?;
            *ledger = Some((side, client));
        }
        let Some((_, client)) = ledger.as_ref() else { return Ok(()) };
        let text = "UPDATE crossfade.ledger SET debts = $2, reason = $3 WHERE id = $1";
        match client.execute(text, &[&id, &debts, &reason]).await {
            Ok(1) => Ok(()),
            Ok(_) => Err("it is not there any more".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Calls every session: the world is another, or the gate is shut.
    pub fn call(&self) {
        self.calls.send_replace(());
    }

    /// The configuration of that side.
    pub fn database(config: &Config, side: Side) -> &Database {
        match side {
            Side::Old => &config.old,
            Side::New => &config.new,
        }
    }
}

/// What the sessions of one thread share.
pub struct Worker {
    /// What all share.
    pub shared: Arc<Shared>,
    /// Sessions on each side as mirror.
    pub pools: Sides<Rc<Pool>>,
    /// Of its sessions.
    pub bells: Bells,
    /// Limits their waits.
    pub clock: Clock,
    /// Taints of all tables, as the ledger holds them, in this generation of definitions: each transaction has them at hand.
    pub taints: RefCell<(u64, Bytes)>,
}

impl Worker {
    /// With so many mirror sessions at most on each side.
    pub fn new(shared: Arc<Shared>, connections: usize) -> Worker {
        let pools = Sides { old: Pool::new(Side::Old, connections), new: Pool::new(Side::New, connections) };
        Worker { shared, pools, bells: Bells::default(), clock: Clock::default(), taints: RefCell::default() }
    }
}

/// A mutex whose holder panicked still guards a value that is whole: each critical section here is one operation.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
