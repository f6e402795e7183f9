//! Where transactions wait while the phase moves: those under way end in the phase in which they began, new ones wait at their start.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::Notify;

/// Counts the transactions under way; closed, it lets no new one begin.
#[derive(Debug, Default)]
pub struct Gate {
    under_way: AtomicU64,
    closed: AtomicBool,
    opened: Notify,
    drained: Notify,
}

/// A transaction under way. It is over when this is dropped.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
}

impl Gate {
    /// Begins a transaction at once, or not (the gate is closed).
    pub fn try_enter(self: &Arc<Self>) -> Option<Pass> {
        // First count, then look: the mover first closes, then counts. Whichever comes second sees the other (hence SeqCst).
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let pass = Pass { gate: self.clone() };
        (!self.closed.load(Ordering::SeqCst)).then_some(pass)
    }

    /// Begins a transaction; waits while the gate is closed.
    pub async fn enter(self: &Arc<Self>) -> Pass {
        loop {
            let opened = self.opened.notified();
            if let Some(pass) = self.try_enter() {
                return pass;
            }
            opened.await;
        }
    }

    /// Lets no new transaction begin.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
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

    /// Lets transactions begin again.
    pub fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
        self.opened.notify_waiters();
    }

    /// Transactions under way.
    pub fn under_way(&self) -> u64 {
        self.under_way.load(Ordering::SeqCst)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.gate.under_way.fetch_sub(1, Ordering::SeqCst) == 1 && self.gate.closed.load(Ordering::SeqCst) {
            self.gate.drained.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_move_waits_for_what_is_under_way_and_holds_what_is_new() {
        let gate = Arc::new(Gate::default());
        let first = gate.enter().await;
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
}
