//! What was found about reads, by shape: runs, differences, times on both sides; and why reads that may leave the authority did not. Bounded in memory.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};

use crate::catalog::Sides;

/// Shapes of which something is kept; further ones are counted together.
const SHAPES_MAX: usize = 1000;
/// Samples of differences for each shape.
pub const SAMPLES_MAX: usize = 5;

/// New is slower at a shape where its median is so many times old's, and so many milliseconds more, of so many runs at least.
const SLOWER: f64 = 2.0;
const SLOWER_MS: f64 = 1.0;
const SLOWER_RUNS: u64 = 10;
/// Then both sides are asked for their plans, once in this time.
const PLANS_APART: Duration = Duration::from_secs(15 * 60);

/// What has become of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The same rows.
    Equal,
    /// The same rows in another order: ties, or another collation.
    Reordered,
    /// As many rows; which they are, or what is in them, the statement leaves open.
    Loose,
    /// Rows differ, and did so again in the same way.
    Different,
    /// Rows differed each time, in another way each time: they are being written.
    Unsettled,
    /// A side did not answer, or answered with an error.
    Failed,
    /// Not run: rows of a table are owed.
    Owed,
}

/// Why a read that may be served by new was answered by the authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The session, or the phase, has no share.
    Share,
    /// It came inside a block, or in a pipeline of another form than Parse, Bind, Describe, Execute, Sync.
    Form,
    /// The session has state that new's does not have (temporary tables, another role, SERIALIZABLE).
    State,
    /// Not long enough after the session's last contact with the authority (R2).
    Grace,
    /// Rows of a table are owed (R3).
    Owed,
    /// New did not answer, or answered with an error.
    Failed,
}

impl Kept {
    const ALL: [Kept; 6] = [Kept::Share, Kept::Form, Kept::State, Kept::Grace, Kept::Owed, Kept::Failed];

    /// For `crossfade_read_kept_total{reason}`.
    pub fn name(self) -> &'static str {
        match self {
            Kept::Share => "share",
            Kept::Form => "form",
            Kept::State => "state",
            Kept::Grace => "grace",
            Kept::Owed => "owed",
            Kept::Failed => "failed",
        }
    }
}

/// Times in classes of a fifth of an octave, from 10 µs to about a minute.
#[derive(Clone, Debug, Default)]
struct Times {
    classes: Vec<u64>,
    count: u64,
}

const CLASSES: usize = 113;

impl Times {
    fn note(&mut self, took: Duration) {
        let octaves = (took.as_secs_f64() / 1e-5).max(1.0).log2();
        if self.classes.is_empty() {
            self.classes = vec![0; CLASSES];
        }
        self.classes[((octaves * 5.0) as usize).min(CLASSES - 1)] += 1;
        self.count += 1;
    }

    /// In milliseconds, the upper end of its class; null where nothing was timed.
    fn quantile(&self, share: f64) -> Value {
        let wanted = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (class, count) in self.classes.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                let ms = 1e-2 * 2f64.powf((class + 1) as f64 / 5.0);
                return json!((ms * 1000.0).round() / 1000.0);
            }
        }
        Value::Null
    }

    fn json(&self) -> Value {
        json!({ "p50_ms": self.quantile(0.5), "p95_ms": self.quantile(0.95), "p99_ms": self.quantile(0.99) })
    }
}

/// One shape.
#[derive(Clone, Debug, Default)]
struct Found {
    counts: [u64; 7],
    rows: u64,
    times: Sides<Times>,
    samples: Vec<Value>,
    error: Option<String>,
    /// When both sides were last asked for their plans, and what they said.
    planned: Option<Instant>,
    plans: Value,
}

/// What one comparison has brought.
#[derive(Clone, Debug)]
pub struct Note {
    /// Its outcome.
    pub outcome: Outcome,
    /// Rows of the authority's answer.
    pub rows: u64,
    /// How long each side took; None: it did not run.
    pub took: Option<Sides<Duration>>,
    /// What a side has said that could not run it.
    pub error: Option<String>,
    /// Of a difference, what may be shown of it.
    pub sample: Option<Value>,
}

impl Note {
    /// Nothing but an outcome.
    pub fn of(outcome: Outcome) -> Note {
        Note { outcome, rows: 0, took: None, error: None, sample: None }
    }
}

/// Comparisons since somebody last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Recent {
    /// Both sides have answered.
    pub runs: u64,
    /// ... with different rows, and again.
    pub different: u64,
    /// A side could not run it.
    pub failed: u64,
}

impl Recent {
    fn add(&mut self, other: Recent) {
        self.runs += other.runs;
        self.different += other.different;
        self.failed += other.failed;
    }
}

/// The whole of it.
#[derive(Debug, Default)]
pub struct Tally {
    shapes: Mutex<HashMap<Bytes, Found>>,
    recent: Mutex<Recent>,
    dropped: AtomicU64,
    kept: [AtomicU64; 6],
    served: AtomicU64,
    again: AtomicU64,
}

impl Tally {
    /// A comparison has ended.
    pub fn note(&self, shape: &Bytes, note: Note) {
        let mut shapes = self.shapes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let key = match shapes.len() >= SHAPES_MAX && !shapes.contains_key(shape) {
            true => Bytes::new(),
            false => shape.clone(),
        };
        let found = shapes.entry(key).or_default();
        found.counts[note.outcome as usize] += 1;
        found.rows += note.rows;
        if let Some(took) = note.took {
            found.times.old.note(took.old);
            found.times.new.note(took.new);
        }
        if note.error.is_some() {
            found.error = note.error;
        }
        found.samples.extend(note.sample.filter(|_| found.samples.len() < SAMPLES_MAX));
        let counted = |holds: bool| u64::from(holds);
        let (failed, owed) = (note.outcome == Outcome::Failed, note.outcome == Outcome::Owed);
        self.add_recent(Recent {
            runs: counted(!failed && !owed),
            different: counted(note.outcome == Outcome::Different),
            failed: counted(failed),
        });
    }

    /// What has come since this was last asked for.
    pub fn take_recent(&self) -> Recent {
        std::mem::take(&mut self.recent.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// More of it, or what could not be kept elsewhere.
    pub fn add_recent(&self, recent: Recent) {
        self.recent.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(recent);
    }

    /// A run whose answers differ, and which is looked at again.
    pub fn looks_again(&self) {
        self.again.fetch_add(1, Ordering::Relaxed);
    }

    /// New is slower at this shape, and nobody has asked both sides why within `PLANS_APART`. Whoever is told so asks.
    pub fn wants_plans(&self, shape: &Bytes, now: Instant) -> bool {
        let mut shapes = self.shapes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(found) = shapes.get_mut(shape) else { return false };
        let (old, new) = (found.times.old.quantile(0.5), found.times.new.quantile(0.5));
        let slower = matches!((old.as_f64(), new.as_f64()), (Some(old), Some(new)) if new > old * SLOWER && new - old > SLOWER_MS);
        let due = found.planned.is_none_or(|at| now.saturating_duration_since(at) >= PLANS_APART);
        let wants = slower && due && found.times.new.count >= SLOWER_RUNS;
        if wants {
            found.planned = Some(now);
        }
        wants
    }

    /// How both sides run this shape.
    pub fn plans(&self, shape: &Bytes, plans: Value) {
        let mut shapes = self.shapes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(found) = shapes.get_mut(shape) {
            found.plans = plans;
        }
    }

    /// A sample found no place in the queue.
    pub fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// A read that may be served by new went to the authority.
    pub fn kept(&self, why: Kept) {
        self.kept[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// New has answered.
    pub fn served(&self) {
        self.served.fetch_add(1, Ordering::Relaxed);
    }

    /// What was found of one shape; null: nothing.
    pub fn of_shape(&self, shape: &Bytes) -> Value {
        let shapes = self.shapes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(found) = shapes.get(shape) else { return Value::Null };
        let count = |outcome: Outcome| found.counts[outcome as usize];
        let runs: u64 = found.counts.iter().sum::<u64>() - count(Outcome::Owed);
        json!({
            "runs": runs, "rows": found.rows, "different": count(Outcome::Different), "reordered": count(Outcome::Reordered),
            "loose": count(Outcome::Loose), "unsettled": count(Outcome::Unsettled), "failed": count(Outcome::Failed), "owed": count(Outcome::Owed),
            "old": found.times.old.json(), "new": found.times.new.json(), "samples": found.samples, "error": found.error,
            "plans": found.plans,
        })
    }

    /// What was served, and why the rest was not.
    pub fn totals(&self) -> Value {
        let kept: serde_json::Map<String, Value> = Kept::ALL
            .iter()
            .map(|why| (why.name().to_owned(), json!(self.kept[*why as usize].load(Ordering::Relaxed))))
            .collect();
        json!({
            "served_by_new": self.served.load(Ordering::Relaxed), "kept_on_the_authority": kept,
            "comparisons_dropped": self.dropped.load(Ordering::Relaxed),
            "comparisons_looked_at_again": self.again.load(Ordering::Relaxed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_to_a_fifth_of_an_octave() {
        let mut times = Times::default();
        assert_eq!(times.quantile(0.5), Value::Null);
        for ms in 1..=100 {
            times.note(Duration::from_millis(ms));
        }
        for (share, exact) in [(0.5, 50.0), (0.95, 95.0), (0.99, 99.0)] {
            let told = times.quantile(share).as_f64().unwrap();
            assert!(told >= exact && told <= exact * 1.16, "{told} for {exact}");
        }
        times.note(Duration::from_secs(3600));
        times.note(Duration::ZERO);
    }

    #[test]
    fn plans_are_asked_for_where_new_is_slower_and_not_too_often() {
        let tally = Tally::default();
        let (quick, slow) = (Bytes::from("SELECT 1"), Bytes::from("SELECT 2"));
        let took = |ms: u64| Some(Sides { old: Duration::from_millis(2), new: Duration::from_millis(ms) });
        let start = Instant::now();
        for run in 0..SLOWER_RUNS {
            assert!(!tally.wants_plans(&slow, start), "of {run} runs");
            tally.note(&quick, Note { took: took(2), ..Note::of(Outcome::Equal) });
            tally.note(&slow, Note { took: took(40), ..Note::of(Outcome::Equal) });
        }
        assert!(!tally.wants_plans(&quick, start));
        assert!(tally.wants_plans(&slow, start));
        assert!(!tally.wants_plans(&slow, start + PLANS_APART / 2));
        assert!(tally.wants_plans(&slow, start + PLANS_APART));
    }

    #[test]
    fn what_came_lately_is_told_once() {
        let tally = Tally::default();
        for outcome in [Outcome::Equal, Outcome::Different, Outcome::Failed, Outcome::Owed, Outcome::Unsettled] {
            tally.note(&Bytes::from("SELECT 1"), Note::of(outcome));
        }
        let recent = tally.take_recent();
        assert_eq!(recent, Recent { runs: 3, different: 1, failed: 1 });
        assert_eq!(tally.take_recent(), Recent::default());
        tally.add_recent(recent);
        assert_eq!(tally.take_recent(), recent);
    }

    #[test]
    fn shapes_and_samples_are_bounded() {
        let tally = Tally::default();
        for number in 0..SHAPES_MAX + 10 {
            let shape = Bytes::from(format!("SELECT {number}"));
            tally.note(&shape, Note { sample: Some(json!(1)), ..Note::of(Outcome::Different) });
        }
        assert_eq!(tally.of_shape(&Bytes::from("SELECT 1"))["different"], 1);
        assert_eq!(tally.of_shape(&Bytes::new())["different"], 10);
        assert_eq!(tally.of_shape(&Bytes::new())["samples"].as_array().map(Vec::len), Some(SAMPLES_MAX));
        assert!(tally.shapes.lock().unwrap().len() <= SHAPES_MAX + 1);
    }
}
