//! Connections that have not logged in. Where there are too many, the one that has waited longest goes: whoever means to log in does so at once,
//! and those that never speak keep nobody out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Connections that have not logged in, in the order in which they came.
#[derive(Default)]
pub struct Logins(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    came: u64,
    places: BTreeMap<u64, Arc<Notify>>,
}

/// One of them. Dropping it gives the place back.
pub struct Place<'a> {
    logins: &'a Logins,
    number: u64,
    over: Arc<Notify>,
}

impl Logins {
    /// A place for a new connection; with `limit` of them taken, that of the oldest.
    pub fn enter(&self, limit: usize) -> Place<'_> {
        let mut waiting = self.waiting();
        while waiting.places.len() >= limit.max(1) {
            let Some((_, oldest)) = waiting.places.pop_first() else { break };
            oldest.notify_one();
        }
        waiting.came += 1;
        let (number, over) = (waiting.came, Arc::new(Notify::new()));
        waiting.places.insert(number, over.clone());
        Place { logins: self, number, over }
    }

    /// Nothing that holds the lock panics.
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place<'_> {
    /// Waits until another connection needs the place.
    pub async fn over(&self) {
        self.over.notified().await;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.logins.waiting().places.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn the_oldest_goes_and_a_place_that_was_given_back_is_free() {
        let logins = Logins::default();
        let (first, second) = (logins.enter(2), logins.enter(2));
        drop(second);
        let third = logins.enter(2);
        assert_eq!([&first, &third].map(|place| place.over().now_or_never()), [None, None]);
        let _fourth = logins.enter(2);
        assert_eq!([&first, &third].map(|place| place.over().now_or_never()), [Some(()), None]);
    }
}
