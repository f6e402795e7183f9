//! Plans by shape, bounded by bytes.

use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, Weighter};

use super::Plan;
use super::lazy::Lazy;
use super::read::Read;
use super::route::Route;
use crate::sql::facts::{Facts, Verb};

/// A client's application_name.
#[derive(Clone, Debug)]
pub struct Application {
    name: Arc<str>,
    /// One of 64, by its hash: whether a statement knows it is seen without a lock.
    bit: u64,
}

impl Default for Application {
    fn default() -> Application {
        Application::new("")
    }
}

impl Application {
    /// Of this name; empty: it has none.
    pub fn new(name: &str) -> Application {
        let mut hasher = std::hash::DefaultHasher::new();
        name.hash(&mut hasher);
        Application { name: name.into(), bit: 1 << (hasher.finish() % 64) }
    }
}

/// Names of applications that are kept of one statement, at most.
const APPLICATIONS: usize = 8;

/// How often a statement was about to run, and by whom.
#[derive(Debug, Default)]
pub struct Seen {
    count: AtomicU64,
    known: AtomicU64,
    names: Mutex<Vec<Arc<str>>>,
}

impl Seen {
    /// How often.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// By whom: some of them, where there are many.
    pub fn applications(&self) -> Vec<Arc<str>> {
        self.names.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn note(&self, by: &Application) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if self.known.load(Ordering::Relaxed) & by.bit == 0
            && self.known.fetch_or(by.bit, Ordering::Relaxed) & by.bit == 0
        {
            let mut names = self.names.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if names.len() < APPLICATIONS && !by.name.is_empty() {
                names.push(by.name.clone());
            }
        }
    }
}

/// A statement's facts and plan. `facts.end` is that of the text it was first read from, and of no other.
#[derive(Clone, Debug)]
pub struct Planned {
    /// What it is.
    pub facts: Facts,
    /// What is done with it.
    pub plan: Plan,
    /// Whether another side than the authority may answer it.
    pub read: Read,
    /// Where it runs, in phases in which new is the authority and some tables stay on old.
    pub route: Route,
    /// What it needs of rows that only old has.
    pub lazy: Lazy,
    /// It may change what the session's later statements see beside rows: settings, role, temporary tables.
    pub alters: bool,
    /// How often it was about to run, and by whom.
    pub seen: Arc<Seen>,
    /// See `refuse`.
    pub refused: Arc<AtomicBool>,
}

/// Words without which the body of DO cannot end the transaction that it runs in.
const ENDS: [&[u8]; 3] = [b"commit", b"rollback", b"call"];

impl Planned {
    /// Of a statement that stays on the authority.
    pub fn new(facts: Facts, plan: Plan) -> Planned {
        let sets = facts.functions.iter().any(|function| function.name == "set_config");
        let verb = matches!(
            facts.verb,
            Verb::Set { .. } | Verb::SetTransaction | Verb::Reset(_) | Verb::Discard(_) | Verb::Ddl { .. }
        );
        let alters = sets || verb || matches!(plan, Plan::Opaque(_));
        Planned {
            facts,
            plan,
            read: Read::Stays("unplanned"),
            route: Route::default(),
            lazy: Lazy::Whole,
            alters,
            seen: Arc::default(),
            refused: Arc::default(),
        }
    }

    /// Another side than the authority has refused it, whatever its values: it stays from now on.
    pub fn refuse(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// It was refused.
    pub fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// It was about to run once more.
    pub fn see(&self, by: &Application) {
        self.seen.note(by);
    }

    /// The plan of DO with this body: one that cannot end its transaction may run in a block of ours, where the audit sees what it writes.
    pub fn for_body(self: Arc<Self>, text: &[u8]) -> Arc<Planned> {
        let lower = text.to_ascii_lowercase();
        match &self.plan {
            Plan::Opaque(opaque) if !ENDS.iter().any(|word| memchr::memmem::find(&lower, word).is_some()) => {
                let plan = Plan::Opaque(Arc::new(super::Opaque { unwrapped: false, ..super::Opaque::clone(opaque) }));
                Arc::new(Planned { plan, ..Planned::clone(&self) })
            }
            _ => self,
        }
    }
}

/// What a plan depends on beside the shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The shape.
    pub shape: Bytes,
    /// The world: catalog, phase.
    pub generation: u64,
    /// The client's encoding is the mirror's.
    pub encoding_matches: bool,
    /// The role, where roles differ in what they may read.
    pub role: Option<Arc<str>>,
}

#[derive(Clone)]
struct Size;

/// What a cached plan costs beyond its shape, roughly.
const COST: usize = 1024;

impl Weighter<Key, Arc<Planned>> for Size {
    fn weight(&self, key: &Key, _: &Arc<Planned>) -> u64 {
        (key.shape.len() * 3 + COST) as u64
    }
}

/// The cache.
pub struct Plans {
    cache: Cache<Key, Arc<Planned>, Size, DefaultHashBuilder, Unobserved>,
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Clone, Default)]
struct Unobserved;

impl Lifecycle<Key, Arc<Planned>> for Unobserved {
    type RequestState = ();
    fn on_evict(&self, (): &mut (), _: Key, _: Arc<Planned>) {}
}

impl Plans {
    /// At most so many bytes.
    pub fn new(bytes: usize) -> Plans {
        let items = bytes / (2 * COST);
        Plans {
            cache: Cache::with(items.max(16), bytes as u64, Size, DefaultHashBuilder::default(), Unobserved),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// The plan, made by `make` where it is not known.
    pub fn get(&self, key: Key, make: impl FnOnce() -> Planned) -> Arc<Planned> {
        if let Some(planned) = self.cache.get(&key) {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return planned;
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        let planned = Arc::new(make());
        self.cache.insert(key, planned.clone());
        planned
    }

    /// All plans that are kept.
    pub fn all(&self) -> Vec<(Key, Arc<Planned>)> {
        self.cache.iter().collect()
    }

    /// Shapes that were seen and that neither side can answer alone where some tables stay on old, at most 100.
    pub fn split(&self) -> Vec<String> {
        let split = |planned: &Planned| matches!(planned.route, Route::Both { .. } | Route::Ambiguous(_));
        let seen = |planned: &Planned| planned.seen.count() > 0;
        let found = self.cache.iter().filter(|(_, planned)| split(planned) && seen(planned));
        let mut shapes: Vec<String> =
            found.map(|(key, _)| String::from_utf8_lossy(&key.shape).into_owned()).take(100).collect();
        shapes.sort();
        shapes.dedup();
        shapes
    }

    /// Hits, misses and bytes.
    pub fn counts(&self) -> (u64, u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed), self.cache.weight())
    }
}
