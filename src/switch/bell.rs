//! How sessions that wait for their clients hear that something has changed: the phase has moved, or the proxy ends. One thread's sessions
//! share a thread; nothing here is locked, and a session that is not called pays for a look at a cell.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::task::{Context, Waker};

/// One session's bell.
#[derive(Debug, Default)]
pub struct Bell {
    rung: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Bell {
    /// Rings: the session looks up.
    pub fn ring(&self) {
        self.rung.set(true);
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// It has rung since this was last asked; if not, this task is woken when it does.
    pub fn hear(&self, cx: &Context<'_>) -> bool {
        if self.take() {
            return true;
        }
        let mut waker = self.waker.borrow_mut();
        if waker.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        false
    }

    /// It has rung since this was last asked.
    pub fn take(&self) -> bool {
        self.rung.take()
    }
}

/// The bells of one thread's sessions.
#[derive(Debug, Default)]
pub struct Bells {
    all: RefCell<Vec<Weak<Bell>>>,
}

impl Bells {
    /// A bell for a new session.
    pub fn hang(&self) -> Rc<Bell> {
        let bell = Rc::new(Bell::default());
        let mut all = self.all.borrow_mut();
        if all.len() == all.capacity() {
            all.retain(|bell| bell.strong_count() > 0);
        }
        all.push(Rc::downgrade(&bell));
        bell
    }

    /// Those that hang now.
    pub fn hanging(&self) -> Vec<Rc<Bell>> {
        self.all.borrow().iter().filter_map(Weak::upgrade).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_heard_once_and_the_dead_are_forgotten() {
        let bells = Bells::default();
        let bell = bells.hang();
        for _ in 0..100 {
            drop(bells.hang());
        }
        assert!(bells.all.borrow().len() < 20, "bells of sessions that are gone pile up");
        assert_eq!(bells.hanging().len(), 1);
        let cx = Context::from_waker(Waker::noop());
        assert!(!bell.hear(&cx));
        bells.hanging()[0].ring();
        assert!(bell.hear(&cx) && !bell.hear(&cx) && !bell.take());
    }
}
