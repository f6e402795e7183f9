//! Where transactions wait while the phase moves: those under way end in the phase in which they began, new ones wait at their start.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

/// Who keeps it closed: each opens it for himself only.
const MOVE: u8 = 1;
const PAUSE: u8 = 2;
/// Closed for good: the proxy ends.
const SHUT: u8 = 4;

/// Counts the transactions under way; closed, it lets no new one begin.
#[derive(Debug, Default)]
pub struct Gate {
    under_way: AtomicU64,
    /// By whom it is closed.
    closed: AtomicU8,
    opened: Notify,
    drained: Notify,
    /// Held by the transactions that began since the last `turn`.
    cohort: ArcSwap<()>,
}

/// The transactions that were under way at a moment.
#[derive(Debug)]
pub struct Cohort(Weak<()>);

impl Cohort {
    /// All of them have ended.
    pub fn ended(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// A transaction under way. It is over when this is dropped.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    _cohort: Arc<()>,
}

impl Gate {
    /// Begins a transaction at once, or not (the gate is closed).
    pub fn try_enter(self: &Arc<Self>) -> Option<Pass> {
        // First count, then look: the mover first closes, then counts. Whichever comes second sees the other (hence SeqCst).
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let pass = Pass { gate: self.clone(), _cohort: self.cohort.load_full() };
        (self.closed.load(Ordering::SeqCst) == 0).then_some(pass)
    }

    /// Begins a transaction; waits while the gate is closed. None: it was shut for good.
    pub async fn enter(self: &Arc<Self>) -> Option<Pass> {
        loop {
            let opened = self.opened.notified();
            if let Some(pass) = self.try_enter() {
                return Some(pass);
            }
            if self.is_shut() {
                return None;
            }
            opened.await;
        }
    }

    /// Lets no new transaction begin, for a move.
    pub fn close(&self) {
        self.closed.fetch_or(MOVE, Ordering::SeqCst);
    }

    /// Lets no new transaction begin, until an operator says otherwise.
    pub fn pause(&self) {
        self.closed.fetch_or(PAUSE, Ordering::SeqCst);
    }

    /// The end of `pause`.
    pub fn resume(&self) {
        self.closed.fetch_and(!PAUSE, Ordering::SeqCst);
        self.opened.notify_waiters();
    }

    /// An operator has paused it.
    pub fn is_paused(&self) -> bool {
        self.closed.load(Ordering::SeqCst) & PAUSE != 0
    }

    /// Waits until none is under way.
    pub async fn drained(&self) {
        loop {
            let drained = self.drained.notified();
            if self.under_way.load(Ordering::SeqCst) == 0 {
                return;
            }
            drained.await;
        }
    }

    /// The transactions that are under way now, without holding any up. Whoever is not among them began later, and looks at the world after this.
    pub fn turn(&self) -> Cohort {
        Cohort(Arc::downgrade(&self.cohort.swap(Arc::new(()))))
    }

    /// The end of `close`. Transactions begin again, unless the gate was paused or shut.
    pub fn open(&self) {
        self.closed.fetch_and(!MOVE, Ordering::SeqCst);
        self.opened.notify_waiters();
    }

    /// Closes for good: no move opens it again, and whoever waits is sent away.
    pub fn shut(&self) {
        self.closed.fetch_or(SHUT, Ordering::SeqCst);
        self.opened.notify_waiters();
    }

    /// It was shut.
    pub fn is_shut(&self) -> bool {
        self.closed.load(Ordering::SeqCst) & SHUT != 0
    }

    /// Transactions under way.
    pub fn under_way(&self) -> u64 {
        self.under_way.load(Ordering::SeqCst)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.gate.under_way.fetch_sub(1, Ordering::SeqCst) == 1 && self.gate.closed.load(Ordering::SeqCst) != 0 {
            self.gate.drained.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_cohort_ends_with_the_last_that_began_before() {
        let gate = Arc::new(Gate::default());
        let (first, second) = (gate.enter().await.unwrap(), gate.enter().await.unwrap());
        let cohort = gate.turn();
        let later = gate.enter().await.unwrap();
        drop(first);
        assert!(!cohort.ended());
        drop(second);
        assert!(cohort.ended(), "who began later is waited for by nobody");
        assert_eq!(gate.under_way(), 1);
        drop(later);
    }

    #[tokio::test]
    async fn a_move_waits_for_what_is_under_way_and_holds_what_is_new() {
        let gate = Arc::new(Gate::default());
        let first = gate.enter().await.unwrap();
        gate.close();
        assert!(gate.try_enter().is_none());
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { drop(gate.enter().await) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        let drained = tokio::spawn({
            let gate = gate.clone();
            async move { gate.drained().await }
        });
        tokio::task::yield_now().await;
        assert!(!drained.is_finished());
        drop(first);
        drained.await.unwrap();
        assert!(!waiting.is_finished());
        gate.open();
        waiting.await.unwrap();
        assert_eq!(gate.under_way(), 0);
    }

    #[tokio::test]
    async fn a_gate_that_was_shut_sends_away_who_waits_and_stays_closed() {
        let gate = Arc::new(Gate::default());
        gate.close();
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter().await.is_some() }
        });
        tokio::task::yield_now().await;
        gate.shut();
        assert!(!waiting.await.unwrap());
        gate.open();
        assert!(gate.try_enter().is_none(), "the end of a move opens nothing");
    }

    #[tokio::test]
    async fn a_pause_outlives_a_move_and_its_end_does_not_end_the_move() {
        let gate = Arc::new(Gate::default());
        gate.pause();
        gate.close();
        gate.open();
        assert!(gate.is_paused() && gate.try_enter().is_none());
        gate.close();
        gate.resume();
        assert!(gate.try_enter().is_none(), "the move still holds it");
        gate.open();
        assert!(gate.try_enter().is_some());
    }
}
