//! A breadth-first explicit-state checker: every state that can be reached is looked at once, so the first violation has a shortest trace.
//!
//! Why not a library: what matters most here beside safety is that *from every state* rest can be reached without further faults (AG EF).
//! Checkers in Rust offer "eventually" along paths, which retries make false and cycles make unsound. And at tens of millions of states
//! it matters that one costs 24 bytes. States are told apart by 64 bits of hash: among n of them, two fall together with a chance of n²/2^65
//! (3 in 100,000 for 35 million).

use std::collections::HashMap;
use std::collections::VecDeque;
use std::fmt::Debug;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// What is checked.
pub trait Model {
    /// A state.
    type State: Clone + Hash + PartialEq + Debug;
    /// What leads from one to the next. Different successors of one state may share it only if they are equal.
    type Action: Copy + Debug;

    /// Where it begins.
    fn initial(&self) -> Vec<Self::State>;
    /// All that can happen next.
    fn next(&self, state: &Self::State, out: &mut Vec<(Self::Action, Self::State)>);
    /// Whether this happens by itself, sooner or later. The rest are faults: they may happen.
    fn is_fault(&self, action: &Self::Action) -> bool;
    /// What is wrong in this state, if anything.
    fn wrong(&self, state: &Self::State) -> Option<String>;
    /// Nothing is left to do here.
    fn at_rest(&self, state: &Self::State) -> bool;
}

/// How far to go.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// States at most.
    pub states: usize,
    /// Also check that rest can be reached from everywhere. Costs memory for each transition.
    pub progress: bool,
}

/// A state that must not be, and the shortest way to it.
#[derive(Debug)]
pub struct Violation {
    /// What is wrong.
    pub what: String,
    /// Each step, as text.
    pub trace: Vec<String>,
}

/// What was found.
#[derive(Debug)]
pub struct Report {
    /// States looked at.
    pub states: usize,
    /// Transitions between them.
    pub transitions: u64,
    /// Steps to the furthest.
    pub depth: usize,
    /// All reachable states were looked at.
    pub exhausted: bool,
    /// The first thing that was wrong.
    pub violation: Option<Violation>,
}

/// Goes through the states of a model until one is wrong, none is left or `bounds` are met.
pub fn check<M: Model>(model: &M, bounds: Bounds) -> Report {
    let mut search = Search::new(model, bounds);
    let found = search.run();
    let violation = found.or_else(|| search.without_rest()).map(|(id, what)| search.violation(id, what));
    Report {
        states: search.parents.len(),
        transitions: search.transitions,
        depth: search.depth,
        exhausted: search.frontier.is_empty(),
        violation,
    }
}

const NOBODY: u32 = u32::MAX;

struct Search<'m, M: Model> {
    model: &'m M,
    bounds: Bounds,
    known: HashMap<u64, u32, BuildHasherDefault<Same>>,
    parents: Vec<u32>,
    frontier: VecDeque<(u32, usize, M::State)>,
    transitions: u64,
    depth: usize,
    /// Successors without a fault, one state's behind the other's; where each state's begin.
    edges: Vec<u32>,
    edges_from: Vec<usize>,
    resting: Vec<bool>,
}

impl<'m, M: Model> Search<'m, M> {
    fn new(model: &'m M, bounds: Bounds) -> Self {
        let mut search = Search {
            model,
            bounds,
            known: HashMap::default(),
            parents: Vec::new(),
            frontier: VecDeque::new(),
            transitions: 0,
            depth: 0,
            edges: Vec::new(),
            edges_from: Vec::new(),
            resting: Vec::new(),
        };
        for state in model.initial() {
            search.meet(NOBODY, 0, state);
        }
        search
    }

    /// The number of a state, which is new or not.
    fn meet(&mut self, parent: u32, depth: usize, state: M::State) -> u32 {
        let next = self.parents.len() as u32;
        let id = *self.known.entry(fingerprint(&state)).or_insert(next);
        if id == next {
            self.parents.push(parent);
            self.frontier.push_back((id, depth, state));
        }
        id
    }

    /// The number of the first wrong state, and what is wrong with it.
    fn run(&mut self) -> Option<(u32, String)> {
        let mut next = Vec::new();
        while let Some((id, depth, state)) = self.frontier.pop_front() {
            self.depth = depth;
            if let Some(what) = self.model.wrong(&state) {
                return Some((id, what));
            }
            let resting = self.model.at_rest(&state);
            self.model.next(&state, &mut next);
            if !resting && next.iter().all(|(action, _)| self.model.is_fault(action)) {
                return Some((id, "stuck: nothing can happen, and it is not at rest".to_owned()));
            }
            self.transitions += next.len() as u64;
            if self.bounds.progress {
                self.edges_from.push(self.edges.len());
                self.resting.push(resting);
            }
            for (action, state) in next.drain(..) {
                let to = self.meet(id, depth + 1, state);
                if self.bounds.progress && !self.model.is_fault(&action) {
                    self.edges.push(to);
                }
            }
            if self.parents.len() >= self.bounds.states {
                return None;
            }
        }
        None
    }

    /// A state from which rest cannot be reached. States are numbered in the order in which they are looked at, and most
    /// successors have higher numbers, so a few passes from the last to the first settle all.
    fn without_rest(&mut self) -> Option<(u32, String)> {
        if !self.bounds.progress || !self.frontier.is_empty() {
            return None;
        }
        self.edges_from.push(self.edges.len());
        let mut reaches = std::mem::take(&mut self.resting);
        loop {
            let mut changed = false;
            for id in (0..reaches.len()).rev() {
                let successors = &self.edges[self.edges_from[id]..self.edges_from[id + 1]];
                if !reaches[id] && successors.iter().any(|&to| reaches[to as usize]) {
                    reaches[id] = true;
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        let id = reaches.iter().position(|reaches| !reaches)?;
        Some((id as u32, "no way from here to rest, even without further faults".to_owned()))
    }

    /// The trace is found again from the states' hashes: only their numbers are kept.
    fn violation(&self, id: u32, what: String) -> Violation {
        let mut path = vec![id];
        while let Some(&parent) = path.last().map(|&id| &self.parents[id as usize])
            && parent != NOBODY
        {
            path.push(parent);
        }
        path.reverse();
        let is = |state: &M::State, id: u32| self.known.get(&fingerprint(state)) == Some(&id);
        let mut state = self.model.initial().into_iter().find(|state| is(state, path[0])).expect("it was met");
        let mut trace = vec![format!("{state:?}")];
        for &id in &path[1..] {
            let mut next = Vec::new();
            self.model.next(&state, &mut next);
            let (action, to) = next.into_iter().find(|(_, state)| is(state, id)).expect("it was met");
            trace.push(format!("{action:?}"));
            state = to;
        }
        trace.push(format!("{state:?}"));
        Violation { what, trace }
    }
}

/// FNV-1a with a last stir.
struct Stir(u64);

impl Hasher for Stir {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u8(byte);
        }
    }

    fn write_u8(&mut self, byte: u8) {
        self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        let stirred = (self.0 ^ (self.0 >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        let stirred = (stirred ^ (stirred >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        stirred ^ (stirred >> 32)
    }
}

fn fingerprint<T: Hash>(state: &T) -> u64 {
    let mut stir = Stir(0xcbf2_9ce4_8422_2325);
    state.hash(&mut stir);
    stir.finish()
}

/// A fingerprint is its own hash.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only fingerprints are hashed");
    }

    fn write_u64(&mut self, fingerprint: u64) {
        self.0 = fingerprint;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

mod tests {
    use super::*;

    /// Two processes count to `most`, each in its own cell; one of them may stop for ever, which is a fault. Both together at `wrong` are wrong.
    struct Counters {
        most: u8,
        wrong: u8,
        trap: bool,
    }

    impl Model for Counters {
        type State = (u8, u8, bool);
        type Action = &'static str;

        fn initial(&self) -> Vec<Self::State> {
            vec![(0, 0, false)]
        }

        fn next(&self, &(a, b, stopped): &Self::State, out: &mut Vec<(&'static str, Self::State)>) {
            if a < self.most {
                out.push(("a", (a + 1, b, stopped)));
            }
            if b < self.most && !stopped {
                out.push(("b", (a, b + 1, stopped)));
                out.push(("stop", (a, b, true)));
            }
            if stopped && !self.trap {
                out.push(("wake", (a, b, false)));
            }
            if stopped && self.trap {
                out.push(("turn", (a, b, true)));
            }
        }

        fn is_fault(&self, action: &&'static str) -> bool {
            *action == "stop"
        }

        fn wrong(&self, &(a, b, _): &Self::State) -> Option<String> {
            (a == self.wrong && b == self.wrong).then(|| "both".to_owned())
        }

        fn at_rest(&self, &(a, b, _): &Self::State) -> bool {
            a == self.most && b == self.most
        }
    }

    const ALL: Bounds = Bounds { states: 1000, progress: true };

    #[test]
    fn all_states_are_met_once_and_the_trace_is_a_shortest_one() {
        let report = check(&Counters { most: 3, wrong: 9, trap: false }, ALL);
        assert_eq!((report.states, report.exhausted), (16 + 12, true));
        assert!(report.violation.is_none());
        let found = check(&Counters { most: 3, wrong: 2, trap: false }, ALL).violation.expect("both reach 2");
        assert_eq!(found.trace.len(), 4 + 2, "four steps between the first state and the last: {:?}", found.trace);
        assert!(!check(&Counters { most: 3, wrong: 9, trap: false }, Bounds { states: 5, ..ALL }).exhausted);
    }

    #[test]
    fn turning_in_a_circle_is_no_rest() {
        let found = check(&Counters { most: 3, wrong: 9, trap: true }, ALL).violation.expect("it never wakes");
        assert!(found.what.contains("no way"), "{}", found.what);
        let found = check(&Counters { most: 3, wrong: 9, trap: true }, Bounds { progress: false, ..ALL });
        assert!(found.violation.is_none(), "only the check of progress sees it");
    }
}
