//! Time limits of one thread, to a hundredth of a second.
//!
//! A timer of the runtime that is due before all others costs a wake-up of its driver (an eventfd written and read), and most limits here are on
//! waits that end at once. One ticker for all of them costs next to nothing, and nothing while nobody waits.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// How late a limit may be noticed.
const TICK: Duration = Duration::from_millis(10);

/// Ticks without anybody waiting after which the ticker ends.
const IDLE: u32 = 100;

/// The wait was longer than its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not within its time limit")]
pub struct Late;

/// Limits waits of one thread. Copies share their ticker, which runs on the thread's `LocalSet`.
#[derive(Clone, Default)]
pub struct Clock(Rc<Inner>);

#[derive(Default)]
struct Inner {
    waits: RefCell<Vec<Option<(Instant, Waker)>>>,
    free: RefCell<Vec<usize>>,
    ticking: Cell<bool>,
}

/// A place in `Inner::waits`, given back when it is dropped.
struct Place<'a> {
    inner: &'a Inner,
    at: usize,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.inner.waits.borrow_mut()[self.at] = None;
        self.inner.free.borrow_mut().push(self.at);
    }
}

impl Clock {
    /// The outcome of `work`, if it comes within `limit` or less than a tick later.
    pub async fn limit<F: Future>(&self, limit: Duration, work: F) -> Result<F::Output, Late> {
        let mut work = pin!(work);
        let mut due = None;
        let mut place = None;
        std::future::poll_fn(|cx| {
            if let Poll::Ready(outcome) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(outcome));
            }
            let due = *due.get_or_insert_with(|| Instant::now() + limit);
            match &place {
                Some(place) if self.is_due(place) => return Poll::Ready(Err(Late)),
                Some(place) => self.wake_at(place, due, cx),
                None => place = Some(self.take(due, cx)),
            }
            Poll::Pending
        })
        .await
    }

    /// Whether the ticker has found this wait due: only it looks at the time.
    fn is_due(&self, place: &Place<'_>) -> bool {
        self.0.waits.borrow()[place.at].is_none()
    }

    fn wake_at(&self, place: &Place<'_>, due: Instant, cx: &Context<'_>) {
        let mut waits = self.0.waits.borrow_mut();
        match &mut waits[place.at] {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            empty => *empty = Some((due, cx.waker().clone())),
        }
    }

    fn take(&self, due: Instant, cx: &Context<'_>) -> Place<'_> {
        let mut waits = self.0.waits.borrow_mut();
        let wait = Some((due, cx.waker().clone()));
        let at = match self.0.free.borrow_mut().pop() {
            Some(at) => {
                waits[at] = wait;
                at
            }
            None => {
                waits.push(wait);
                waits.len() - 1
            }
        };
        if !self.0.ticking.replace(true) {
            tokio::task::spawn_local(tick(self.0.clone()));
        }
        Place { inner: &self.0, at }
    }
}

async fn tick(inner: Rc<Inner>) {
    let mut idle = 0;
    while idle < IDLE {
        tokio::time::sleep(TICK).await;
        let now = Instant::now();
        let mut due = Vec::new();
        let mut waiting = false;
        for wait in inner.waits.borrow_mut().iter_mut() {
            waiting |= wait.is_some();
            due.extend(wait.take_if(|(due, _)| *due <= now).map(|(_, waker)| waker));
        }
        idle = if waiting { 0 } else { idle + 1 };
        due.into_iter().for_each(Waker::wake);
    }
    inner.ticking.set(false);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_a_thread<F: Future>(work: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        tokio::task::LocalSet::new().block_on(&runtime, work)
    }

    #[test]
    fn what_takes_longer_is_late() {
        on_a_thread(async {
            let clock = Clock::default();
            let began = Instant::now();
            let outcome = clock.limit(Duration::from_millis(60), std::future::pending::<()>()).await;
            assert_eq!(outcome, Err(Late));
            assert!(began.elapsed() >= Duration::from_millis(60));
            assert!(clock.0.waits.borrow().iter().all(Option::is_none));
        });
    }

    #[test]
    fn what_ends_in_time_is_not_and_gives_its_place_back() {
        on_a_thread(async {
            let clock = Clock::default();
            for turn in 0..3 {
                let work = async {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    turn
                };
                assert_eq!(clock.limit(Duration::from_secs(60), work).await, Ok(turn));
            }
            assert_eq!(clock.0.waits.borrow().len(), 1);
            assert_eq!(clock.limit(Duration::ZERO, async { 7 }).await, Ok(7), "what is ready is never late");
        });
    }
}
