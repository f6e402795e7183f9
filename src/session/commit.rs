//! Two databases and one outcome: images are executed on the mirror, then the debts and COMMIT go to the authority, then the mirror commits.
//! docs/protocols.md gives the argument; each step here is a step there.

use bytes::{Buf, Bytes};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::acknowledge::Behind;
use super::enter::refused_entry;
use super::expect::{Done, Expected, Kind, To};
use super::follow::commit_mirror;
use super::prove::Doubt;
use super::{Carry, End, Held, Kept, Session};
use crate::clock::Late;
use crate::config::Commit;
use crate::ledger::owe::{OWE, OWE_TYPES, PROVE, PROVE_TYPES, TAINT, TAINT_TYPES};
use crate::mirror::conn::{Backend, Carrier, Failure, Patience, Tail};
use crate::mirror::flight::{self, steps, with_room};
use crate::mirror::pool::Lease;
use crate::mirror::writes::Op;
use crate::plan::Opaque;
use crate::shared::Shared;
use crate::sql::facts::Verb;
use crate::wire::frame::{self, Report};

pub(super) const OWE_NAME: &[u8] = b"crossfade_owe";
pub(super) const PROVE_NAME: &[u8] = b"crossfade_prove";
pub(super) const TAINT_NAME: &[u8] = b"crossfade_taint";
pub(super) const UNLIMITED_NAME: &[u8] = b"crossfade_unlimited";
/// From this server_version_num on there is `transaction_timeout`.
const LIMITS_TRANSACTIONS: u32 = 170_000;

/// While the proxy holds a transaction for longer than this, the server is kept from taking it for idle.
const BUSY: Duration = Duration::from_millis(5);

/// What has become of a transaction's images before the authority commits.
enum Executed {
    /// Executed on the mirror, by this transaction.
    On(Box<Lease>, Carrier),
    /// Not on the mirror: owed. `backend` may still be at work.
    Owed(Option<Backend>, &'static str),
}

/// A transaction that is about to commit: its debts stand in the ledger's flight.
pub(super) struct Settled {
    executed: Executed,
    id: i64,
    /// What it owes beside taints.
    debts: Bytes,
    taints: Bytes,
    /// `best-effort`: the debts were not written; they are when the mirror's COMMIT fails.
    unwritten: bool,
}

/// How the client ends its transaction, where that may make its writes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// COMMIT.
    Commit {
        /// AND CHAIN.
        chain: bool,
    },
    /// PREPARE TRANSACTION: nobody knows yet whether it will commit, nor when, nor in whose session. The mirror cannot wait for that, so all of it
    /// is owed; COMMIT PREPARED makes the debts visible.
    Prepare,
}

impl Ending {
    /// What this statement does to an open block.
    pub(super) fn of(verb: &Verb) -> Option<Ending> {
        match verb {
            Verb::Commit { chain } => Some(Ending::Commit { chain: *chain }),
            Verb::PrepareTransaction => Some(Ending::Prepare),
            _ => None,
        }
    }

    fn done(self) -> Done {
        Done::End { chain: self == Ending::Commit { chain: true } }
    }
}

/// Whether COMMIT may be sent.
pub(super) enum Before {
    /// It may; what was executed on the mirror, if anything.
    Ready(Option<Settled>),
    /// The audit has failed, as COMMIT would have: its error is in `kept`.
    Failed,
}

impl Session {
    /// COMMIT as a Query.
    pub(super) async fn commit_simple(&mut self, text: &Bytes, ending: Ending) -> Result<(), End> {
        self.held = Held::default();
        self.commit_held(text, ending).await?;
        if let Some(complete) = self.held.complete.take() {
            self.client.out.extend_from_slice(&complete);
        }
        frame::ready(&mut self.client.out, self.status);
        Ok(())
    }

    /// COMMIT as a Query whose end is held back.
    pub(super) async fn commit_held(&mut self, text: &Bytes, ending: Ending) -> Result<(), End> {
        self.settle().await?;
        let Before::Ready(settled) = self.before_commit(ending).await? else { return self.undo_refused().await };
        self.put_query(text, &[]);
        self.queue.push(Expected { kind: Kind::Query, to: To::Client, hold: true, done: ending.done() });
        self.answered(settled).await?;
        if self.queue.skipping() {
            // The ledger refused: the server has passed over COMMIT.
            self.undo_refused().await?;
        }
        Ok(())
    }

    /// COMMIT in the extended protocol: `frame` is the client's Execute.
    pub(super) async fn commit_extended(&mut self, frame: Bytes, ending: Ending) -> Result<(), End> {
        // What executes nothing (COMMIT's own Bind) may be answered together with COMMIT.
        if !self.queue.quiet() || self.audit.is_some() || ending == Ending::Prepare {
            self.settle().await?;
        }
        self.held = Held::default();
        let mut synced = false;
        if let Before::Ready(settled) = self.before_commit(ending).await? {
            self.server.out.extend_from_slice(&frame);
            self.queue.push(Expected { kind: Kind::Execute, to: To::Client, hold: true, done: ending.done() });
            synced = self.sync_with_commit();
            self.answered(settled).await?;
        }
        if let Some(complete) = self.held.complete.take() {
            self.client.out.extend_from_slice(&complete);
        }
        if let Some(error) = self.kept.error.take() {
            self.client.out.extend_from_slice(&error);
            // A COMMIT that failed has ended its transaction: the failed block that is left goes with the client's Sync.
            self.ours = true;
            if synced {
                self.roll_back_ours().await?;
            }
        }
        if synced {
            frame::ready(&mut self.client.out, self.status);
        }
        Ok(())
    }

    /// The client's Sync, where it is here already, goes into COMMIT's flight.
    fn sync_with_commit(&mut self) -> bool {
        if self.ours || self.queue.skipping() || !self.client.inb.starts_with(b"S\0\0\0\x04") {
            return false;
        }
        self.client.inb.advance(frame::HEAD);
        self.unsynced = false;
        self.portals.remove(&b""[..]);
        frame::sync(&mut self.server.out);
        self.queue.push(Expected { hold: true, ..Expected::client(Kind::Sync) });
        true
    }

    /// The end of a block of ours around a Query: COMMIT, or ROLLBACK where the statement failed. Then the client gets its end.
    pub(super) async fn commit_ours(&mut self) -> Result<(), End> {
        self.finish_ours().await?;
        if let Some(error) = self.kept.error.take() {
            self.client.out.extend_from_slice(&error);
        } else if let Some(complete) = self.held.complete.take() {
            self.client.out.extend_from_slice(&complete);
        }
        frame::ready(&mut self.client.out, b'I');
        Ok(())
    }

    /// The end of a block of ours around a pipeline: the client has sent Sync.
    pub(super) async fn commit_pipeline(&mut self) -> Result<(), End> {
        if !self.queue.is_empty() {
            self.settle().await?;
        }
        if self.queue.skipping() {
            self.sync_ours().await?;
        }
        self.finish_ours().await?;
        if let Some(error) = self.kept.error.take() {
            self.client.out.extend_from_slice(&error);
        }
        frame::ready(&mut self.client.out, b'I');
        Ok(())
    }

    /// The end of a block on the authority, of ours or unseen: COMMIT, or ROLLBACK where it has failed. An error is in `kept`.
    pub(super) async fn finish_ours(&mut self) -> Result<(), End> {
        self.kept = Kept::default();
        if self.status == b'E' {
            return self.roll_back_ours().await;
        }
        match self.before_commit(Ending::Commit { chain: false }).await? {
            Before::Ready(settled) => {
                self.put_ours(b"crossfade_commit", b"COMMIT", &[], &[], To::Us);
                frame::sync(&mut self.server.out);
                self.queue.push(Expected::of(Kind::Sync, To::Us));
                self.answered(settled).await?;
            }
            Before::Failed => self.sync_ours().await?,
        }
        if self.status != b'I' {
            let error = self.kept.error.take();
            self.roll_back_ours().await?;
            self.kept.error = error;
        }
        self.ours = false;
        self.over();
        Ok(())
    }

    pub(super) async fn roll_back_ours(&mut self) -> Result<(), End> {
        // No Query: it would take the client's unnamed statement away.
        self.put_ours(b"crossfade_rollback", b"ROLLBACK", &[], &[], To::Us);
        self.sync_ours().await?;
        self.ours = false;
        self.over();
        Ok(())
    }

    pub(super) async fn sync_ours(&mut self) -> Result<(), End> {
        frame::sync(&mut self.server.out);
        self.queue.push(Expected::of(Kind::Sync, To::Us));
        self.settle().await
    }

    /// The ledger refused the debts of a COMMIT that came as a Query: the transaction is rolled back and the client told why.
    async fn undo_refused(&mut self) -> Result<(), End> {
        self.sync_ours().await?;
        let error = self.kept.error.take();
        self.roll_back_ours().await?;
        if let Some(error) = error {
            self.client.out.extend_from_slice(&error);
            self.held = Held { complete: None, failed: true };
        }
        Ok(())
    }

    /// Images to the mirror, executed and awaited; then the debts into the authority's flight. COMMIT follows in the same flight.
    pub(super) async fn before_commit(&mut self, ending: Ending) -> Result<Before, End> {
        self.kept = Kept::default();
        for cut in std::mem::take(&mut self.suspended).into_values() {
            self.lost(&cut.capture.tables, "suspended");
        }
        if self.status == b'E' {
            return Ok(Before::Ready(None));
        }
        if !self.audited().await? {
            return Ok(Before::Failed);
        }
        if self.writes.is_empty() {
            return Ok(Before::Ready(None));
        }
        if ending == Ending::Prepare {
            if self.strict() {
                return self.fail_prepare().await;
            }
            self.give_up("prepared");
        }
        let started = Instant::now();
        let ops = std::mem::take(&mut self.writes.ops);
        ops.iter().for_each(|op| self.debts().add(op));
        let tainted = std::mem::take(&mut self.writes.tainted);
        tainted.iter().for_each(|&table| self.debts().taint(table));
        let executed = self.execute_on_mirror(ops).await;
        self.shared.metrics.mirror_commit_seconds.observe(started.elapsed().as_secs_f64());
        if let Executed::Owed(_, reason) = &executed
            && self.shared.config.load().mirror.strict
            && *reason != "taint"
        {
            return Err(End::Refused(Report::fatal(
                "58000",
                format!("the mirror did not take the transaction ({reason}), and mirror.strict is on"),
                "Nothing was committed. Look at `crossfade status`; connect again once the mirror is up, or set mirror.strict: false.",
            )));
        }
        let settled = self.put_debts(executed);
        Ok(Before::Ready(Some(settled)))
    }

    /// `mirror.strict` wants every transaction on the mirror when it commits; one that is prepared cannot be there.
    async fn fail_prepare(&mut self) -> Result<Before, End> {
        self.fail_here(Report::error(
            "0A000",
            "crossfade cannot mirror a prepared transaction, and mirror.strict is on",
            "Nothing was prepared. Use COMMIT, or set mirror.strict: false.",
        ))
        .await?;
        Ok(Before::Failed)
    }

    /// The ledger rows of this transaction, into the flight of COMMIT.
    fn put_debts(&mut self, executed: Executed) -> Settled {
        let id = self.shared.debt_id();
        let (debts, taints) = (self.debts().encode(false).freeze(), self.debts().encode(true).freeze());
        let carried = matches!(executed, Executed::On(..));
        let unwritten = carried && self.shared.config.load().mirror.commit == Commit::BestEffort;
        // A transaction that has changed definitions itself has proven what it wrote before that.
        let version = self.world.catalog.definitions.get(self.side).version.filter(|_| !self.writes.redefined);
        if let (true, false, Some(version)) = (unwritten, debts.is_empty(), version) {
            self.put_proof(id, version);
        } else if !unwritten && !debts.is_empty() {
            let (xid, backend, reason) = match &executed {
                Executed::On(_, carrier) => (carrier.xid, Some(carrier.backend), None),
                Executed::Owed(backend, reason) => (None, *backend, Some(*reason)),
            };
            self.put_owe(id, (xid, backend), &debts, reason, version);
        }
        if !taints.is_empty() {
            let reason = self.writes.reason.unwrap_or("opaque");
            let refusal = self.writes.refusal.take().map(|said| format!("{reason}; the mirror: {said}"));
            let id = self.shared.debt_id();
            self.put_taint(id, &taints, refusal.as_deref().unwrap_or(reason));
        }
        // Definitions that the mirror is about to have, too, are read again when it has.
        self.writes.redefined &= !carried;
        Settled { executed, id, unwritten: unwritten && !debts.is_empty(), debts, taints }
    }

    /// Taints, unless the transaction has written nothing at all: a volatile function may have only looked, and a read-only transaction
    /// could not take the debt.
    fn put_taint(&mut self, id: i64, taints: &[u8], reason: &str) {
        let id = id.to_be_bytes();
        let values = [Some(&id[..]), Some(taints), Some(reason.as_bytes())];
        self.put_ours(TAINT_NAME, TAINT.as_bytes(), &TAINT_TYPES, &values, To::Us);
    }

    /// `best-effort`: only the question whether the plans were those of the definitions that hold.
    fn put_proof(&mut self, id: i64, version: i64) {
        let unproven = self.worker.all_tainted(&self.world);
        let (id, version) = (id.to_be_bytes(), version.to_be_bytes());
        let values = [Some(&id[..]), Some(&version[..]), Some(&unproven[..])];
        self.put_ours(PROVE_NAME, PROVE.as_bytes(), &PROVE_TYPES, &values, To::Us);
    }

    /// The debts; and the question whether the plans were those of the definitions that hold: what was written is locked, so that they hold from the
    /// first write on. If not, what the images say is not known, and a trigger made since may have written anywhere: all tables are owed.
    fn put_owe(
        &mut self,
        id: i64,
        (xid, backend): (Option<i64>, Option<Backend>),
        debts: &[u8],
        reason: Option<&str>,
        version: Option<i64>,
    ) {
        let id = id.to_be_bytes();
        let xid = xid.map(i64::to_be_bytes);
        let pid = backend.map(|backend| backend.pid.to_be_bytes());
        let start = backend.map(|backend| backend.start.to_be_bytes());
        let incarnation = backend.map(|backend| backend.incarnation);
        let unproven = version.map(|_| self.worker.all_tainted(&self.world));
        let version = version.map(i64::to_be_bytes);
        let values = [
            Some(&id[..]),
            xid.as_ref().map(|v| &v[..]),
            pid.as_ref().map(|v| &v[..]),
            start.as_ref().map(|v| &v[..]),
            incarnation.as_ref().map(|v| &v[..]),
            Some(debts),
            reason.map(str::as_bytes),
            version.as_ref().map(|v| &v[..]),
            unproven.as_deref(),
        ];
        self.put_ours(OWE_NAME, OWE.as_bytes(), &OWE_TYPES, &values, To::Us);
    }

    /// Waits for the authority's answer to COMMIT and settles the mirror by it.
    async fn answered(&mut self, settled: Option<Settled>) -> Result<(), End> {
        let outcome = self.settle().await;
        let Some(settled) = settled else { return outcome };
        let committed = flight::committed(outcome.is_ok().then_some(&self.kept.tag[..]));
        let owed = (settled.debts.clone(), settled.taints.clone());
        let behind = self.settled(settled, committed);
        if committed && self.world.phase.serves() {
            self.before_acknowledging(behind, owed).await;
        }
        outcome
    }

    /// What `owe` said of the definitions: None, they are those of our plans; else their version.
    fn other_version(&self) -> Option<i64> {
        let said = self.kept.rows.first()?.first()?.as_ref()?;
        std::str::from_utf8(said).ok()?.parse().ok()
    }

    /// The mirror's part of it, for which nobody waits but where new serves.
    pub(super) fn settled(&mut self, settled: Settled, committed: bool) -> Behind {
        let shared = self.shared.clone();
        let clock = self.worker.clock.clone();
        let Settled { executed, id, debts, unwritten, .. } = settled;
        let doubt = self.other_version().filter(|_| committed).map(|version| Doubt {
            world: self.world.clone(),
            side: self.side,
            id,
            debts: debts.clone(),
            version,
        });
        match (executed, doubt) {
            (Executed::On(lease, carrier), Some(doubt)) => {
                tokio::task::spawn_local(doubt.decide(shared, clock, Some((lease, carrier))));
                Behind::Doubt
            }
            (Executed::Owed(..), Some(doubt)) => {
                tokio::task::spawn_local(doubt.decide(shared, clock, None));
                Behind::Doubt
            }
            (Executed::On(lease, carrier), None) if committed => {
                shared.paid.carrying.fetch_add(1, Ordering::SeqCst);
                let owed = unwritten.then_some((self.side, debts));
                Behind::Commit(tokio::task::spawn_local(commit_mirror(shared, clock, lease, (carrier, id), owed)))
            }
            (Executed::On(mut lease, _), None) => {
                tokio::task::spawn_local(async move {
                    if lease.conn.roll_back().await.is_ok() {
                        lease.release();
                    }
                });
                Behind::Nothing
            }
            (Executed::Owed(..), None) => {
                if committed {
                    shared.owed.notify_one();
                }
                Behind::Owed
            }
        }
    }

    /// Executes what is held on the mirror. The server of the authority is kept from ending the transaction as idle meanwhile.
    async fn execute_on_mirror(&mut self, ops: Vec<Op>) -> Executed {
        if ops.is_empty() && matches!(self.carry, Carry::Nothing) {
            return Executed::Owed(None, "taint");
        }
        match self.send_to_mirror(ops, true).await {
            Ok((lease, xid)) => {
                let backend = lease.conn.backend();
                Executed::On(lease, Carrier { xid, backend })
            }
            Err((backend, reason)) => Executed::Owed(backend, reason),
        }
    }

    /// Sends writes ahead of COMMIT: the transaction has grown past `limits.mirror_buffer`.
    pub(super) async fn send_ahead(&mut self) {
        let ops = self.writes.spill();
        ops.iter().for_each(|op| self.debts().add(op));
        self.carry = match self.send_to_mirror(ops, false).await {
            Ok((lease, _)) => Carry::Ahead(lease),
            Err((_, reason)) => Carry::GivenUp(reason),
        };
    }

    async fn send_to_mirror(
        &mut self,
        ops: Vec<Op>,
        last: bool,
    ) -> Result<(Box<Lease>, Option<i64>), (Option<Backend>, &'static str)> {
        let lease = match std::mem::replace(&mut self.carry, Carry::Nothing) {
            Carry::GivenUp(reason) => {
                self.carry = Carry::GivenUp(reason);
                return Err((None, reason));
            }
            Carry::Ahead(lease) => Some(lease),
            Carry::Nothing => None,
        };
        for op in &ops {
            self.count_image(op);
        }
        let token = if last { self.debts().token() } else { None };
        let mut flight = Box::pin(carry_out(self.worker.clone(), self.world.clone(), lease, ops, token, last));
        // Nothing else is owed by the authority now: a Flush that it reads keeps its idle-in-transaction timers from running. That of the whole transaction counts
        // on, until it is set to nothing for the rest of it, which is its COMMIT.
        let outcome = match self.worker.clock.limit(BUSY, &mut flight).await {
            Ok(outcome) => outcome,
            Err(Late) => {
                if last && *self.world.catalog.version.get(self.side) >= LIMITS_TRANSACTIONS {
                    self.put_ours(UNLIMITED_NAME, b"SET LOCAL transaction_timeout = 0", &[], &[], To::Nobody);
                }
                frame::flush(&mut self.server.out);
                let _ = self.server.flush().await;
                flight.await
            }
        };
        outcome.map_err(|(backend, failure)| {
            self.degrade(&failure);
            if self.writes.redefined {
                self.writes.refusal = Some(failure.to_string());
            }
            (backend, failure.reason())
        })
    }

    fn count_image(&self, op: &Op) {
        let table = match op {
            Op::Upsert(table, _) | Op::Delete(table, _) | Op::Insert(table, _) => table,
            Op::Truncate(tables) => &tables[0],
            Op::Define(_) => return,
        };
        self.shared.metrics.mirror_images.with_label_values(&[&table.label()]).inc();
    }

    /// The mirror did not take the transaction: counted, and later ones do not wait for a mirror that is down.
    fn degrade(&self, failure: &Failure) {
        let Some(mirror) = self.world.phase.mirror() else { return };
        self.shared.metrics.mirror_failures.with_label_values(&[failure.reason()]).inc();
        if failure.opens_breaker() {
            self.worker.pools.get(mirror).clear();
            if self.shared.health.get(mirror).trip() {
                warn!(side = %mirror, error = %failure, "the mirror failed; writes are owed until it is back");
            }
        } else if !matches!(failure, Failure::Down) {
            warn!(side = %mirror, error = %failure, "the mirror refused a transaction; its rows are owed");
        }
    }

    /// The mirror's part of this transaction is given up; what it has written is owed.
    pub(super) fn give_up(&mut self, reason: &'static str) {
        if let Carry::Ahead(mut lease) = std::mem::replace(&mut self.carry, Carry::GivenUp(reason)) {
            tokio::task::spawn_local(async move {
                if lease.conn.roll_back().await.is_ok() {
                    lease.release();
                }
            });
        }
    }

    /// The transaction ended without a COMMIT of ours.
    pub(super) fn undo_carry(&mut self) {
        self.give_up("rolled-back");
        self.carry = Carry::Nothing;
    }

    /// Before a statement that cannot run in a block of ours (CALL, DO): what it may write is owed beforehand, held by its backend.
    /// None: it writes no migrating table.
    pub(super) async fn register_unwrapped(&mut self, opaque: &Opaque) -> Result<Option<i64>, End> {
        let mut tables: Vec<u32> = opaque.tables.iter().map(|table| table.number).collect();
        if tables.is_empty() && !opaque.ddl {
            tables = self.world.catalog.tables.keys().copied().collect();
        }
        if tables.is_empty() {
            return Ok(None);
        }
        for &table in &tables {
            self.taint(table, opaque.reason);
            self.debts().taint(table);
        }
        let taints = self.debts().encode(true);
        self.debts = None;
        self.writes = Default::default();
        let id = self.shared.debt_id();
        self.kept = Kept::default();
        let number = id.to_be_bytes();
        let epoch = (self.world.epoch as i64).to_be_bytes();
        let values = [Some(&number[..]), Some(&taints[..]), Some(opaque.reason.as_bytes()), Some(&epoch[..])];
        self.put_ours(
            b"crossfade_unwrapped",
            b"SELECT crossfade.owe_unwrapped($1, $2, $3, $4)",
            &[20, 17, 25, 20],
            &values,
            To::Us,
        );
        self.sync_ours().await?;
        if let Some(error) = self.kept.error.take() {
            let error = frame::server_error(&error[frame::HEAD..]);
            if refused_entry(&error.code) {
                return Err(self.overtaken_outside());
            }
            warn!(message = %error.message, "the ledger refused a debt");
            return Err(End::Refused(Report::fatal(
                "58000",
                format!("crossfade cannot note what this statement may write: {}", error.message),
                "Nothing was run. Run `crossfade install`, look at `crossfade status`, then connect again.",
            )));
        }
        self.owed_beforehand(&tables).await;
        Ok(Some(id))
    }

    /// ... and when it has ended, anyone may pay.
    pub(super) async fn release_registered(&mut self) -> Result<(), End> {
        if self.registered.is_empty() || !self.at_rest() {
            return Ok(());
        }
        for debt in std::mem::take(&mut self.registered) {
            let number = debt.to_be_bytes();
            self.put_ours(
                b"crossfade_release",
                b"SELECT crossfade.release_unwrapped($1)",
                &[20],
                &[Some(&number[..])],
                To::Us,
            );
            self.sync_ours().await?;
            debug!(debt, "an unwrapped statement has ended");
        }
        self.shared.owed.notify_one();
        Ok(())
    }
}

/// Images over to the mirror, in a transaction that stays open.
async fn carry_out(
    worker: std::rc::Rc<crate::shared::Worker>,
    world: std::sync::Arc<crate::shared::World>,
    lease: Option<Box<Lease>>,
    ops: Vec<Op>,
    token: Option<[u8; 16]>,
    last: bool,
) -> Result<(Box<Lease>, Option<i64>), (Option<Backend>, Failure)> {
    let Some(mirror) = world.phase.mirror() else { return Err((None, Failure::Down)) };
    let config = worker.shared.config.load_full();
    let timeout = Session::patience(&ops, config.mirror.timeout);
    let begun = lease.is_some();
    let mut lease = match lease {
        Some(lease) => lease,
        None => {
            if !worker.shared.health.get(mirror).up() {
                return Err((None, Failure::Down));
            }
            let pool = worker.pools.get(mirror);
            let db = Shared::database(&config, mirror);
            let age = (world.generation, world.epoch);
            Box::new(pool.lease(db, age, config.mirror.timeout).await.map_err(|failure| (None, failure))?)
        }
    };
    let backend = lease.conn.backend();
    // A session that answered with an error has undone its transaction; one that did not answer may still be at work.
    let failed = |failure: Failure| match failure {
        Failure::Refused(_) | Failure::Definition => (None, failure),
        _ => (Some(backend), failure),
    };
    let patience = Patience { clock: &worker.clock, limit: timeout };
    let version = world.catalog.definitions.get(mirror).version;
    match execute(&mut lease, (version, begun), ops, Tail { token, xid: last, version: None }, patience).await {
        Ok(xid) => Ok((lease, xid)),
        Err(failure) => {
            if matches!(failure, Failure::Definition) {
                worker.shared.stale.notify_one();
            }
            if matches!(failure, Failure::Refused(_) | Failure::Definition) {
                lease.release();
            }
            Err(failed(failure))
        }
    }
}

/// What was written before the transaction has changed definitions is proven to be for those that the mirror has; behind that the version is its own.
async fn execute(
    lease: &mut Lease,
    (version, begun): (Option<i64>, bool),
    mut ops: Vec<Op>,
    tail: Tail,
    patience: Patience<'_>,
) -> Result<Option<i64>, Failure> {
    if let Some(at) = ops.iter().position(|op| matches!(op, Op::Define(_)))
        && !lease.conn.redefined
    {
        let behind = ops.split_off(at);
        if !ops.is_empty() {
            lease.conn.execute(&steps(ops), Tail { token: None, xid: true, version }, patience).await?;
        }
        return lease.conn.execute(&steps(behind), tail, patience).await;
    }
    let version = version.filter(|_| tail.xid && !lease.conn.redefined);
    let (steps, tail) = (steps(ops), Tail { version, ..tail });
    match lease.conn.execute(&steps, tail, patience).await {
        Err(Failure::Refused(error)) if !begun && ["23505", "23P01"].contains(&error.code.as_str()) => {
            lease.conn.execute(&with_room(&steps), tail, patience).await
        }
        executed => executed,
    }
}
