//! What new may answer at this moment (R2, R3).
//!
//! A *look* at the mirror lists the transactions at work there that hold the epoch's lock: every transaction that has committed on the authority by then, and whose images
//! are not on new yet, is among them, for its images were executed, under that lock, before its COMMIT was sent. When each of those listed has ended, whoever
//! was in contact with the authority no later than the look began has seen no commit that new lacks, but for those that the ledger, read *after that*,
//! says are owed. One look serves all sessions.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// A look at the ledger that began longer ago says nothing any more. Whoever owes waits this long before it acknowledges, where several proxies serve.
pub const LEASE: Duration = Duration::from_millis(250);

/// A debt in flight for longer counts as owed: its mirror transaction may have been given up by its proxy.
pub const STUCK: Duration = Duration::from_millis(500);

/// Looks at the mirror that wait for the end of somebody, at most: the oldest is given up.
const PENDING_MAX: usize = 64;

/// Whose rows may be missing on the mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owing {
    /// Nobody has looked, or there is more than can be looked through: any table.
    All,
    /// These, by number.
    Tables(HashSet<u32>),
}

/// What one round has found.
#[derive(Clone, Debug)]
pub struct Look {
    /// The epoch whose locks were looked at.
    pub epoch: u64,
    /// Every mirror transaction that was at work at this moment has ended. None: of no moment yet.
    pub settled: Option<Instant>,
    /// Before the ledger was read.
    pub ledger: Instant,
    /// What it says.
    pub owing: Owing,
}

/// What a session is told that would read from new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// New has all that this session can know of.
    Serve,
    /// Rows of a table are owed.
    Owed,
    /// A later look may say that it serves.
    Later,
}

/// The looks of one proxy.
#[derive(Debug, Default)]
pub struct Looks {
    last: Mutex<State>,
    wanted: Notify,
    published: Notify,
}

#[derive(Debug, Default)]
struct State {
    look: Option<Look>,
    /// Tables that this proxy knows to be owed, until a look at the ledger that began later than this.
    owed: HashMap<u32, Instant>,
}

impl Looks {
    /// May new answer a read of these tables, for a session that was last in contact with the authority then (None: not in this phase)?
    pub fn ask(&self, tables: impl Iterator<Item = u32>, epoch: u64, contact: Option<Instant>, now: Instant) -> Says {
        let state = crate::reads::look::lock(&self.last);
        let Some(look) = state.look.as_ref().filter(|look| look.epoch == epoch) else { return Says::Later };
        let late = match (look.settled, contact) {
            (None, _) => true,
            (Some(settled), Some(contact)) => settled <= contact,
            (Some(_), None) => false,
        };
        if late || now.saturating_duration_since(look.ledger) > LEASE {
            return Says::Later;
        }
        let owed = |number: u32| match &look.owing {
            Owing::All => true,
            Owing::Tables(tables) => tables.contains(&number) || state.owed.contains_key(&number),
        };
        for number in tables {
            if owed(number) {
                return Says::Owed;
            }
        }
        Says::Serve
    }

    /// What the last look says of a table, however old it is.
    pub fn is_owed(&self, number: u32) -> bool {
        match &lock(&self.last).look {
            None | Some(Look { owing: Owing::All, .. }) => true,
            Some(Look { owing: Owing::Tables(tables), .. }) => tables.contains(&number),
        }
    }

    /// From this moment on these tables are owed; until the ledger, read late enough to show it, says otherwise.
    pub fn owe(&self, tables: impl Iterator<Item = u32>) {
        let until = Instant::now() + STUCK;
        lock(&self.last).owed.extend(tables.map(|number| (number, until)));
    }

    /// What a round has found.
    pub fn publish(&self, look: Look) {
        let mut state = lock(&self.last);
        state.owed.retain(|_, until| look.ledger <= *until);
        state.look = Some(look);
        drop(state);
        self.published.notify_waiters();
    }

    /// Nothing is known any more.
    pub fn forget(&self) {
        lock(&self.last).look = None;
    }

    /// Asks for a look and waits for what comes; true: something has come within the limit.
    pub async fn next(&self, limit: Duration) -> bool {
        let published = self.published.notified();
        self.wanted.notify_one();
        tokio::time::timeout(limit, published).await.is_ok()
    }

    /// Waits until somebody wants a look.
    pub async fn wanted(&self) {
        self.wanted.notified().await;
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Looks at the mirror whose transactions have not all ended.
#[derive(Debug, Default)]
pub struct Pending {
    looks: Vec<(Instant, HashSet<String>)>,
    settled: Option<Instant>,
}

impl Pending {
    /// A look that began at this moment found these transactions at work: the latest moment of which all have ended.
    pub fn settle(&mut self, began: Instant, at_work: HashSet<String>) -> Option<Instant> {
        for (moment, left) in &mut self.looks {
            left.retain(|transaction| at_work.contains(transaction));
            if left.is_empty() {
                self.settled = self.settled.max(Some(*moment));
            }
        }
        if at_work.is_empty() {
            self.settled = Some(began);
        }
        let settled = self.settled;
        self.looks.retain(|(moment, _)| Some(*moment) > settled);
        if !at_work.is_empty() {
            if self.looks.len() >= PENDING_MAX {
                self.looks.remove(0);
            }
            self.looks.push((began, at_work));
        }
        settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> HashSet<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn a_moment_is_settled_when_all_that_were_at_work_then_have_ended() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut pending = Pending::default();
        assert_eq!(pending.settle(at(0), set(&["3/1"])), None);
        assert_eq!(pending.settle(at(1), set(&["3/1", "4/1"])), None);
        // 3/1 has ended: of the first moment all have, of the second one has not.
        assert_eq!(pending.settle(at(2), set(&["4/1", "3/2"])), Some(at(0)));
        assert_eq!(pending.settle(at(3), set(&["3/2"])), Some(at(1)));
        assert_eq!(pending.settle(at(4), set(&[])), Some(at(4)));
    }

    #[test]
    fn who_was_in_contact_behind_the_look_is_not_served_and_who_is_owed_neither() {
        let looks = Looks::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let ask = |table: u32, contact: Option<Instant>, now: Instant| looks.ask([table].into_iter(), 7, contact, now);
        assert_eq!(ask(1, None, at(0)), Says::Later, "nobody has looked");
        let look = |ms: u64| Look { epoch: 7, settled: Some(at(ms)), ledger: at(ms), owing: Owing::Tables([2].into()) };
        looks.publish(look(10));
        assert_eq!(ask(1, Some(at(9)), at(11)), Says::Serve);
        assert_eq!(ask(1, Some(at(10)), at(11)), Says::Later, "in contact behind the look");
        assert_eq!(ask(2, Some(at(9)), at(11)), Says::Owed);
        assert_eq!(ask(1, Some(at(9)), at(11) + LEASE), Says::Later, "the lease is over");
        assert_eq!(looks.ask([1].into_iter(), 8, None, at(11)), Says::Later, "another epoch");
        looks.owe([1].into_iter());
        looks.publish(look(20));
        assert_eq!(ask(1, Some(at(9)), at(21)), Says::Owed, "the ledger was read too early to show it");
        looks.publish(look(10_000));
        assert_eq!(ask(1, Some(at(9)), at(10_001)), Says::Serve);
    }
}
