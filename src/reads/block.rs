//! Tables that no proxy serves from new for a while, because one of them keeps adding to what is owed (R3).
//!
//! A debt may be acknowledged when nobody can rely any more on a look from before it. To wait that out for each transaction would tax an application for as long as the
//! mirror is down. So a proxy that owes says it beforehand: a row on the authority, which every look reads before it reads the ledger, keeps a table from being served
//! until a moment that is moved on while debts come. Who has waited out one lease since that row stood has waited for all debts until shortly before its end:
//! a look from before the row is void by then, a look that finds the row does not serve, and a look that finds that it has ended finds the debt.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::look::{LEASE, STUCK};

/// From the moment at which it is written a block stands for so long.
pub const STANDS: Duration = Duration::from_secs(3);

/// So often it is moved on, for as long as anybody wants it.
pub const RENEWED: Duration = Duration::from_millis(500);

/// Who has one debt soon has another.
pub const WANTED: Duration = Duration::from_secs(1);

/// The tables that this proxy keeps from being served, by all.
#[derive(Debug, Default)]
pub struct Blocks {
    tables: Mutex<HashMap<u32, Block>>,
    wanted: Notify,
    stands: Notify,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    /// Until then it is moved on.
    wanted: Instant,
    stands: Option<Stands>,
}

#[derive(Clone, Copy, Debug)]
struct Stands {
    /// Every look that has begun since finds it.
    since: Instant,
    /// ... until this moment, or later.
    until: Instant,
}

impl Stands {
    /// From when on a debt that is in the ledger by now may be acknowledged. None: it has ended, or does soon: a look could find neither the row, nor the debt
    /// that counts only once it is `STUCK`.
    fn covers_from(self, now: Instant) -> Option<Instant> {
        (now + STUCK < self.until).then(|| self.since + LEASE)
    }
}

impl Blocks {
    /// Waits until debts of these tables, which stand in the ledger, may be acknowledged, and later ones for as long as they are `wanted`. Where a block cannot
    /// be had, that is when no look from before this moment counts.
    pub async fn cover(&self, tables: &[u32], wanted: Duration) {
        let deadline = Instant::now() + LEASE + STUCK;
        loop {
            let changed = self.stands.notified();
            let now = Instant::now();
            let until = match self.covered_from(tables, wanted, now) {
                Some(from) if from <= now => return,
                from => from.unwrap_or(deadline).min(deadline),
            };
            if now >= deadline
                || tokio::time::timeout(until.saturating_duration_since(now), changed).await.is_err()
                    && until == deadline
            {
                return;
            }
        }
    }

    /// When debts of all of these are covered; None: not all are blocked yet. From now on they are wanted.
    fn covered_from(&self, tables: &[u32], wanted: Duration, now: Instant) -> Option<Instant> {
        let mut known = lock(&self.tables);
        let mut from = Some(now);
        for number in tables {
            let block = known.entry(*number).or_insert(Block { wanted: now, stands: None });
            block.wanted = block.wanted.max(now + wanted);
            let covers = block.stands.and_then(|stands| stands.covers_from(now));
            from = from.zip(covers).map(|(one, other)| one.max(other));
        }
        if from.is_none() {
            self.wanted.notify_one();
        }
        from
    }

    /// The tables that are wanted at this moment. Others are forgotten once their blocks have ended.
    pub fn wanted(&self, now: Instant) -> Vec<u32> {
        let mut known = lock(&self.tables);
        known.retain(|_, block| now < block.wanted || block.stands.is_some_and(|stands| now < stands.until));
        known.iter().filter(|(_, block)| now < block.wanted).map(|(number, _)| *number).collect()
    }

    /// The rows of these tables were sent at `sent`, and stand for all to see now.
    pub fn stand(&self, tables: &[u32], sent: Instant, now: Instant) {
        let mut known = lock(&self.tables);
        for number in tables {
            let Some(block) = known.get_mut(number) else { continue };
            // One that has ended meanwhile began anew: looks in between have found nothing.
            let since = block.stands.filter(|stands| now < stands.until).map_or(now, |stands| stands.since);
            block.stands = Some(Stands { since, until: sent + STANDS });
        }
        drop(known);
        self.stands.notify_waiters();
    }

    /// Waits until a table is wanted that is not blocked.
    pub async fn called(&self) {
        self.wanted.notified().await;
    }
}

fn lock(tables: &Mutex<HashMap<u32, Block>>) -> std::sync::MutexGuard<'_, HashMap<u32, Block>> {
    tables.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debt_is_covered_from_a_lease_behind_the_block_until_shortly_before_its_end() {
        let blocks = Blocks::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let lease = LEASE.as_millis() as u64;
        assert_eq!(blocks.covered_from(&[1], WANTED, at(0)), None, "nobody has written it");
        assert_eq!(blocks.wanted(at(1)), [1]);
        blocks.stand(&[1, 2], at(1), at(10));
        assert_eq!(
            blocks.covered_from(&[1], WANTED, at(11)),
            Some(at(10 + lease)),
            "looks from before it may still be relied on"
        );
        assert_eq!(
            blocks.covered_from(&[1, 2], WANTED, at(11)),
            None,
            "one of them was not wanted when it was written"
        );
        assert_eq!(blocks.covered_from(&[1], WANTED, at(500)), Some(at(500)));
        // Moved on: nobody waits again.
        blocks.stand(&[1], at(510), at(520));
        assert_eq!(blocks.covered_from(&[1], WANTED, at(521)), Some(at(521)));
        let end = at(510) + STANDS;
        assert_eq!(
            blocks.covered_from(&[1], WANTED, end - STUCK),
            None,
            "a debt in flight would count only behind its end"
        );
        // One that has ended is another one when it is back.
        blocks.stand(&[1], end, end + LEASE);
        assert_eq!(blocks.covered_from(&[1], WANTED, end + LEASE), Some(end + LEASE + LEASE));
    }

    #[test]
    fn a_block_that_nobody_wants_is_not_moved_on() {
        let blocks = Blocks::default();
        let start = Instant::now();
        blocks.covered_from(&[1], WANTED, start);
        blocks.stand(&[1], start, start);
        assert_eq!(blocks.wanted(start + WANTED / 2), [1]);
        assert_eq!(blocks.wanted(start + WANTED), Vec::<u32>::new());
        assert!(blocks.covered_from(&[1], WANTED, start + WANTED).is_some(), "it stands for as long as it says");
        blocks.wanted(start + STANDS + WANTED);
        assert_eq!(blocks.tables.lock().unwrap().len(), 0);
    }
}
