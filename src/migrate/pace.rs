//! How fast a job may go: by the rate that was asked for, and slower when commits of either server take longer than they did.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Shared by all workers of one job.
pub(super) struct Pace {
    /// Rows per second at most.
    rate: Option<f64>,
    /// When the next rows are due.
    due: Mutex<Instant>,
}

impl Pace {
    /// At most `rate` rows in a second.
    pub fn new(rate: Option<u64>, now: Instant) -> Pace {
        Pace { rate: rate.map(|rate| rate.max(1) as f64), due: Mutex::new(now) }
    }

    /// How many rows a chunk may have, so that the rate is kept within a second or so.
    pub fn rows_max(&self) -> usize {
        self.rate.map_or(usize::MAX, |rate| (rate / 2.0).ceil() as usize).max(1)
    }

    /// These rows have been brought: how long to wait before the next.
    pub fn after(&self, rows: usize, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let mut due = self.due.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *due = (*due).max(now.checked_sub(Duration::from_secs(1)).unwrap_or(now))
            + Duration::from_secs_f64(rows as f64 / rate);
        due.saturating_duration_since(now)
    }
}

/// How long a job rests that may use this share (above 0, up to 1) of the time, and has worked for so long.
pub(super) fn rest(share: f64, worked: Duration) -> Duration {
    worked.mul_f64((1.0 / share.clamp(SHARE_LEAST, 1.0)) - 1.0)
}

/// A smaller share than this is none.
const SHARE_LEAST: f64 = 0.00001;

/// Whether the servers suffer, seen from one job: how long the commits of its steps take, beside how long they have taken at best.
#[derive(Default)]
pub(super) struct Strain {
    /// A moving average, and its least, in seconds.
    now: f64,
    least: Option<f64>,
}

/// Commits that take this many times as long as at best are a strain.
const STRAIN: f64 = 3.0;
/// ... if they take longer than this, in seconds.
const STRAIN_FROM: f64 = 0.02;
/// A chunk is followed by a pause of this many times its own length at most.
const PAUSE_MOST: f64 = 4.0;

impl Strain {
    /// A commit has taken this long, in a chunk of that length: how long to pause.
    pub fn after(&mut self, commit: Duration, chunk: Duration) -> Duration {
        let commit = commit.as_secs_f64();
        self.now = if self.least.is_some() { self.now * 0.8 + commit * 0.2 } else { commit };
        // The least rises slowly: what once was may not be possible any more.
        let least = self.least.map_or(self.now, |least| (least * 1.001).min(self.now));
        self.least = Some(least);
        let times = self.now / least.max(1e-6);
        if times < STRAIN || self.now < STRAIN_FROM {
            return Duration::ZERO;
        }
        chunk.mul_f64((times / STRAIN).min(PAUSE_MOST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_on_the_whole_and_not_made_up_for() {
        let begun = Instant::now();
        let pace = Pace::new(Some(1000), begun);
        assert_eq!(pace.rows_max(), 500);
        let second = Duration::from_secs(1);
        assert_eq!(pace.after(500, begun), second / 2);
        assert_eq!(pace.after(500, begun + second / 2), second / 2);
        // An hour of waiting is not made up for by an hour's rows at once: a second's at most.
        let later = begun + second * 3600;
        assert_eq!(pace.after(500, later), Duration::ZERO);
        assert_eq!(pace.after(1000, later), second / 2);
        assert_eq!(Pace::new(None, begun).after(1_000_000, begun), Duration::ZERO);
    }

    #[test]
    fn a_share_of_the_time_is_worked() {
        let second = Duration::from_secs(1);
        assert_eq!(rest(1.0, second), Duration::ZERO);
        assert_eq!(rest(0.25, second), second * 3);
        assert_eq!(rest(0.01, second).as_secs_f64().round(), 99.0);
    }

    #[test]
    fn commits_that_take_longer_than_they_did_slow_it_down() {
        let mut strain = Strain::default();
        let (ms, chunk) = (Duration::from_millis, Duration::from_millis(100));
        for _ in 0..20 {
            assert_eq!(strain.after(ms(2), chunk), Duration::ZERO);
        }
        assert_eq!(strain.after(ms(40), chunk), Duration::ZERO, "one slow commit says nothing");
        let paused: Vec<Duration> = (0..20).map(|_| strain.after(ms(60), chunk)).collect();
        assert!(paused.iter().all(|pause| *pause <= chunk * 4), "{paused:?}");
        assert!(paused[19] > chunk, "{paused:?}");
        let mut fast = Strain::default();
        fast.after(ms(1), chunk);
        assert!((0..50).all(|_| fast.after(ms(10), chunk).is_zero()), "10 ms are no strain, whatever the best");
    }
}
