//! Work that several jobs of one process share.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use super::lock;

/// What is still to be done, and how many jobs are at it: those may find more.
struct Units<T> {
    waiting: VecDeque<T>,
    busy: usize,
}

/// Pieces of work, each taken by one job.
pub(super) struct Queue<T>(Mutex<Units<T>>);

/// Before it is looked again whether a job that is at work has found more.
const AGAIN: Duration = Duration::from_millis(10);

impl<T> Queue<T> {
    /// With these to begin with.
    pub fn new(units: impl IntoIterator<Item = T>) -> Queue<T> {
        Queue(Mutex::new(Units { waiting: units.into_iter().collect(), busy: 0 }))
    }

    /// The next piece, which is at work until the taker says what it has come to. None: all is done.
    pub async fn next(&self) -> Option<T> {
        loop {
            {
                let mut units = lock(&self.0);
                if let Some(unit) = units.waiting.pop_front() {
                    units.busy += 1;
                    return Some(unit);
                }
                if units.busy == 0 {
                    return None;
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// A piece is no more at work; these are to be done because of it, behind all others.
    pub fn later(&self, more: impl IntoIterator<Item = T>) {
        let mut units = lock(&self.0);
        units.busy -= 1;
        units.waiting.extend(more);
    }

    /// The same, before all others.
    pub fn at_once(&self, more: Vec<T>) {
        let mut units = lock(&self.0);
        units.busy -= 1;
        more.into_iter().rev().for_each(|unit| units.waiting.push_front(unit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_ends_when_nobody_is_at_work_who_might_find_more() {
        let queue = Queue::new([1, 2]);
        assert_eq!((queue.next().await, queue.next().await), (Some(1), Some(2)));
        queue.at_once(vec![11, 12]);
        queue.later([]);
        assert_eq!((queue.next().await, queue.next().await), (Some(11), Some(12)));
        let waits = async { queue.next().await };
        let finds = async {
            tokio::time::sleep(AGAIN * 3).await;
            queue.later([3]);
            queue.later([]);
        };
        assert_eq!(tokio::join!(waits, finds).0, Some(3));
        queue.later([]);
        assert_eq!(queue.next().await, None);
    }
}
