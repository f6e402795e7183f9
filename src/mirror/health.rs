//! The circuit breaker of a side as mirror: once it is known to be down, transactions do not wait for it.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// What is known of one side as mirror.
#[derive(Debug, Default)]
pub struct Health {
    down: AtomicBool,
    tripped: Notify,
}

impl Health {
    /// Transactions may try it.
    pub fn up(&self) -> bool {
        !self.down.load(Ordering::Relaxed)
    }

    /// It failed: no transaction tries it until a probe has reached it. True for the first to say so.
    pub fn trip(&self) -> bool {
        let first = !self.down.swap(true, Ordering::Relaxed);
        self.tripped.notify_one();
        first
    }

    /// A probe has reached it.
    pub fn restore(&self) {
        self.down.store(false, Ordering::Relaxed);
    }

    /// Waits until it has failed.
    pub async fn tripped(&self) {
        while self.up() {
            self.tripped.notified().await;
        }
    }
}
