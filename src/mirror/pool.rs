//! A worker's sessions on the mirror: one for each transaction that is sending images, a bounded number in all.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use super::conn::{Failure, MirrorConn};
use crate::config::Database;
use crate::phase::Side;

/// The generation of sessions that were opened for none yet.
const NOT_YET: u64 = u64::MAX;

/// The sessions of one worker on one side.
pub struct Pool {
    side: Side,
    limit: usize,
    idle: RefCell<Vec<MirrorConn>>,
    places: std::sync::Arc<Semaphore>,
}

/// A session in use. Given back with `Lease::release`; dropped otherwise, which closes it: what it carried is undone.
pub struct Lease {
    /// The session.
    pub conn: MirrorConn,
    pool: Rc<Pool>,
    place: OwnedSemaphorePermit,
}

impl Pool {
    /// At most `limit` sessions.
    pub fn new(side: Side, limit: usize) -> Rc<Pool> {
        let limit = limit.max(1);
        Rc::new(Pool {
            side,
            limit,
            idle: RefCell::new(Vec::new()),
            places: std::sync::Arc::new(Semaphore::new(limit)),
        })
    }

    /// A session. A place and a connection may take the time-out each: what was spent on waiting for a place is not the mirror's fault. `generation` is that of the catalog: statements prepared for another one are forgotten.
    /// Each epoch has generations of its own.
    pub async fn lease(
        self: &Rc<Self>,
        db: &Database,
        (generation, epoch): (u64, u64),
        timeout: Duration,
    ) -> Result<Lease, Failure> {
        let place = tokio::time::timeout(timeout, self.places.clone().acquire_owned())
            .await
            .map_err(|_| Failure::Busy(timeout))?
            .map_err(|_| Failure::Down)?;
        let take = async {
            let idle = loop {
                let found = self.idle.borrow_mut().pop();
                match found {
                    Some(mut conn) if conn.generation != generation => {
                        if conn.adopt(generation, epoch).await.is_ok() {
                            break Some(conn);
                        }
                        // It may have been idle for long, and be dead.
                    }
                    found => break found,
                }
            };
            let conn = match idle {
                Some(conn) => conn,
                None => MirrorConn::open(db, self.side, generation, Some(epoch)).await?,
            };
            Ok(Lease { conn, pool: self.clone(), place })
        };
        tokio::time::timeout(timeout, take).await.map_err(|_| Failure::Timeout(timeout))?
    }

    /// Sessions that there are, in use or not.
    pub fn sessions(&self) -> usize {
        self.limit - self.places.available_permits() + self.idle.borrow().len()
    }

    /// Opens sessions until so many are not in use: they will be wanted all at once, for an epoch that has not begun.
    pub async fn fill(&self, db: &Database, wanted: usize) {
        while self.idle.borrow().len() < wanted && self.sessions() < self.limit {
            let open = MirrorConn::open(db, self.side, NOT_YET, None);
            match tokio::time::timeout(db.connect_timeout, open).await {
                Ok(Ok(conn)) if self.sessions() < self.limit => self.idle.borrow_mut().push(conn),
                Ok(Ok(_)) => return,
                Ok(Err(error)) => return debug!(side = %self.side, %error, "no sessions are opened beforehand"),
                Err(_) => return debug!(side = %self.side, "no sessions are opened beforehand: it does not answer"),
            }
        }
    }

    /// The epoch for which they were opened has not come.
    pub fn empty(&self) {
        self.idle.borrow_mut().retain(|conn| conn.generation != NOT_YET);
    }

    /// Closes the sessions that are not in use (the mirror failed: they may be dead without knowing it).
    pub fn clear(&self) {
        self.idle.borrow_mut().clear();
    }
}

impl Lease {
    /// Back into the pool: no transaction is open on it.
    pub fn release(self) {
        self.pool.idle.borrow_mut().push(self.conn);
        drop(self.place);
    }
}
