//! How far standbys are behind: a backfill rests while one of either side is too far.
//!
//! `replay_lag` says how long the last that was replayed had taken, and says it for ever while nothing more is replayed: a standby whose recovery is
//! paused has none. So the ends of the log are remembered with their times, and a standby is behind since the first end that it has not replayed.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::super::error::Error;
use super::super::link::connect;
use super::super::lock;
use super::{Backfill, Event, NAME};
use crate::catalog::Sides;
use crate::config::Database;
use crate::phase::Side;

/// They are looked at this often.
const LOOK: Duration = Duration::from_millis(500);
/// Ends of the log that are remembered: for half an hour. Who is further behind seems to be by that much.
const ENDS: usize = 3600;

/// Where a side's log has ended, and when.
#[derive(Default)]
struct Ends(VecDeque<(Instant, u64)>);

impl Ends {
    /// The log ends there now, and a standby has replayed up to `replayed`: since when it is behind.
    fn behind(&mut self, now: Instant, end: u64, replayed: u64) -> Duration {
        if self.0.back().is_none_or(|(_, last)| end > *last) {
            if self.0.len() == ENDS {
                self.0.pop_front();
            }
            self.0.push_back((now, end));
        }
        while self.0.front().is_some_and(|(_, end)| *end <= replayed) {
            self.0.pop_front();
        }
        self.0.front().map_or(Duration::ZERO, |(since, _)| now.saturating_duration_since(*since))
    }
}

/// Whether jobs must rest.
pub(super) struct Standbys {
    /// The most that a standby may be behind.
    most: Duration,
    /// One of a side is.
    late: Mutex<Sides<bool>>,
}

/// The one that is furthest behind. Those that a backup or a slot without a follower stands for replay nothing.
const FURTHEST: &str = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint, pg_wal_lsn_diff(replay_lsn, '0/0')::bigint, \
    coalesce(nullif(application_name, ''), 'without a name') FROM pg_stat_replication WHERE replay_lsn IS NOT NULL AND state <> 'backup' ORDER BY replay_lsn LIMIT 1";
/// Walsenders of which this role may not see how they do.
const HIDDEN: &str = "SELECT count(*) FROM pg_stat_replication WHERE state IS NULL";

impl Standbys {
    pub fn new(most: Duration) -> Standbys {
        Standbys { most, late: Mutex::default() }
    }

    fn is_late(&self) -> bool {
        let late = lock(&self.late);
        late.old || late.new
    }

    /// Waits until no standby is too far behind. True: it was waited for.
    pub async fn rest(&self) -> bool {
        let mut rested = false;
        while self.is_late() {
            rested = true;
            tokio::time::sleep(LOOK / 5).await;
        }
        rested
    }

    /// Looks at the standbys of both sides for as long as it is polled.
    pub async fn watch(&self, backfill: &Backfill, tell: &(dyn Fn(Event) + Send + Sync)) -> Infallible {
        let side = backfill.authority_side;
        let authority = self.watch_side(side, &backfill.authority, tell);
        let mirror = self.watch_side(side.other(), &backfill.mirror, tell);
        tokio::join!(authority, mirror).0
    }

    async fn watch_side(&self, side: Side, database: &Database, tell: &(dyn Fn(Event) + Send + Sync)) -> Infallible {
        let (mut open, mut ends, mut asked) = (None, Ends::default(), false);
        loop {
            if open.is_none() {
                // What cannot be seen keeps nobody from his work: the jobs find out by themselves when a server is gone.
                open = connect(database, side, NAME).await.ok();
            }
            if let Some(client) = &open {
                if !std::mem::replace(&mut asked, true) && hidden(client).await {
                    tell(Event::Standbys { side, what: HIDDEN_TOLD.to_owned() });
                }
                match look(client, side, &mut ends).await {
                    Ok(furthest) => self.found(side, furthest, tell),
                    Err(_) => {
                        open = None;
                        self.found(side, None, tell);
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn found(&self, side: Side, furthest: Option<(String, Duration)>, tell: &(dyn Fn(Event) + Send + Sync)) {
        let late = furthest.filter(|(_, behind)| *behind > self.most);
        let was = std::mem::replace(lock(&self.late).get_mut(side), late.is_some());
        match late {
            Some((name, behind)) if !was => {
                let what = format!(
                    "standby {name:?} is {:.0} s behind, and {:.0} s are allowed (expect.lag): resting until it has caught up",
                    behind.as_secs_f64(),
                    self.most.as_secs_f64()
                );
                tell(Event::Standbys { side, what });
            }
            None if was => {
                tell(Event::Standbys { side, what: "standbys have caught up: going on".to_owned() });
            }
            _ => {}
        }
    }
}

const HIDDEN_TOLD: &str =
    "this role may not see how far standbys are behind: it goes on whatever they do (GRANT pg_monitor would show it)";

async fn hidden(client: &Client) -> bool {
    client.query_one(HIDDEN, &[]).await.is_ok_and(|row| row.get::<_, i64>(0) > 0)
}

async fn look(client: &Client, side: Side, ends: &mut Ends) -> Result<Option<(String, Duration)>, Error> {
    let row = client.query_opt(FURTHEST, &[]).await;
    let row = row.map_err(|error| Error::from_driver(side, "looking at standbys", &error))?;
    let Some(row) = row else {
        ends.0.clear();
        return Ok(None);
    };
    let (end, replayed): (i64, i64) = (row.get(0), row.get(1));
    Ok(Some((row.get(2), ends.behind(Instant::now(), end as u64, replayed as u64))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_is_behind_since_the_first_end_that_it_has_not_replayed() {
        let (mut ends, begun, second) = (Ends::default(), Instant::now(), Duration::from_secs(1));
        assert_eq!(ends.behind(begun, 100, 100), Duration::ZERO);
        assert_eq!(ends.behind(begun + second, 100, 100), Duration::ZERO, "nothing was written");
        assert_eq!(ends.behind(begun + second * 2, 200, 100), Duration::ZERO, "just written");
        assert_eq!(ends.behind(begun + second * 3, 300, 100), second);
        assert_eq!(ends.behind(begun + second * 9, 300, 150), second * 7, "paused, with nothing written any more");
        assert_eq!(ends.behind(begun + second * 9, 300, 200), second * 6);
        assert_eq!(ends.behind(begun + second * 10, 300, 300), Duration::ZERO);
        for nth in 0..2 * ENDS as u32 {
            ends.behind(begun + second * (20 + nth), 301 + u64::from(nth), 300);
        }
        assert_eq!(ends.0.len(), ENDS);
    }
}
