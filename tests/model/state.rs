//! One state of the world: two databases, the transactions that write them, the jobs that pay and clear.

use crossfade::migrate::rules::{State as Payable, Told, state};

use crate::breaks::Break;
use crate::checker::Model;
use crate::repair::Repair;
use crate::rows::{KEYS, Log, Rows, Set, Txn, Value, members};
use crate::script::{Program, Programs, Script, Way};
use crate::writer::{Carrier, Session, Stage, Writer};

/// Clients' transactions at most.
pub const WRITERS: usize = 3;
/// Repairers at most: each stands for a proxy's job, or for `crossfade repair`.
pub const REPAIRS: usize = 2;
/// Sessions on the mirror whose repairer is dead, at most.
pub const GHOSTS: usize = 2;

/// The transactions of writer `w`, one on each side.
pub fn of_writer(w: usize) -> Txn {
    1 + w as Txn
}

/// The transactions of repairer `r`, one on each side.
pub fn of_repair(r: usize) -> Txn {
    (1 + WRITERS + r) as Txn
}

/// The transaction on the mirror of ghost `g`.
pub fn of_ghost(g: usize) -> Txn {
    (1 + WRITERS + REPAIRS + g) as Txn
}

/// A ledger row. There is at most one for each writer: its number in sets of debts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Debt {
    /// Not entered, or not committed.
    #[default]
    None,
    /// It is there.
    Owed,
    /// Deleted, but not on the authority's disk: a crash brings it back.
    Clearing,
    /// Gone for good.
    Cleared,
}

/// The job that clears what was answered.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Clearing {
    /// Answered on the mirror, waiting for a flush.
    pub paid: Set,
    /// To be deleted: the flush is over.
    pub ids: Set,
    /// With [`Break::FlushBeforeAnswer`]: the flush is over, and what is to be deleted is not taken yet.
    pub early: bool,
}

/// A session on the mirror whose repairer is dead: what it was sent may still happen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Ghost {
    /// It is there.
    pub live: bool,
    /// With [`Break::CommitPipelined`]: still to be written, in front of the COMMIT.
    pub writes: Set,
    /// ... these values.
    pub values: [Value; KEYS],
}

/// Everything.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    /// Rows on the authority.
    pub authority: Rows,
    /// With [`Break::CommitNotDurable`]: what a crash of the authority leaves.
    pub kept: Option<[Value; KEYS]>,
    /// Rows on the mirror.
    pub mirror: Rows,
    /// What a crash of the mirror leaves.
    pub log: Log,
    /// Of the mirror: how often it has crashed.
    pub incarnation: u8,
    /// Clients' transactions, with what carries them.
    pub writers: [Writer; WRITERS],
    /// Clears what was answered.
    pub clearing: Clearing,
    /// Pay what is owed.
    pub repairs: [Repair; REPAIRS],
    /// Sessions of dead repairers.
    pub ghosts: [Ghost; GHOSTS],
    /// Who holds the table's lock among jobs, on the mirror.
    pub jobs_lock: Txn,
    /// Faults that may still happen.
    pub faults: u8,
}

/// One step: who, what, and whether it is a fault.
#[derive(Clone, Copy)]
pub struct Action {
    /// `T` writers, `R` repairers, `G` ghosts, `C` the clearing job, `-` servers and proxies.
    pub who: (char, usize),
    /// What happens.
    pub what: &'static str,
    /// It need not happen.
    pub fault: bool,
}

impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fault = if self.fault { "FAULT " } else { "" };
        match self.who {
            ('-', _) => write!(f, "{fault}{}", self.what),
            (who, number) => write!(f, "{fault}{who}{} {}", number + 1, self.what),
        }
    }
}

/// Successors of a state.
pub type Out = Vec<(Action, State)>;

/// Rows at first, and what clients do.
#[derive(Clone, PartialEq, Debug)]
pub struct Start {
    /// On the authority, by key.
    pub rows: [Value; KEYS],
    /// On the mirror: the same, unless there is a backfill.
    pub mirror: [Value; KEYS],
    /// The transactions, by position in [`World::scripts`].
    pub scripts: Vec<usize>,
}

/// What is gone through.
pub struct World {
    /// What transactions there are.
    pub scripts: Vec<Script>,
    /// What the product makes of them.
    pub programs: Programs,
    /// Where it begins.
    pub starts: Vec<Start>,
    /// Repairers at work.
    pub repairs: usize,
    /// Faults at most.
    pub faults: u8,
    /// Writers may change their numbers: fewer states, traces that are hard to read.
    pub symmetric: bool,
    /// What is left out.
    pub broken: Option<Break>,
}

impl World {
    /// These transactions, with one repairer, without faults.
    pub fn new(scripts: Vec<Script>, starts: Vec<Start>) -> World {
        let programs = Programs::of(&scripts, WRITERS);
        World { scripts, programs, starts, repairs: 1, faults: 0, symmetric: false, broken: None }
    }

    /// This rule is left out.
    pub fn lacks(&self, rule: Break) -> bool {
        self.broken == Some(rule)
    }

    /// What the product makes of the writes of `w` so far.
    pub fn program(&self, state: &State, w: usize) -> &Program {
        let writer = &state.writers[w];
        self.programs.get(self.scripts[usize::from(writer.script)], writer.did, w)
    }

    /// What may be done about the ledger row of `w`, asked at this moment by someone who knows the mirror by this incarnation.
    pub fn payable(&self, state_now: &State, w: usize, incarnation: u8) -> Payable {
        let writer = &state_now.writers[w];
        let (session, whole) = (writer.images.session, self.program(state_now, w).whole);
        let same = writer.images.incarnation == incarnation;
        let told = match (writer.carrier, session) {
            (Carrier::Transaction, _) if !same && self.lacks(Break::AskAcrossIncarnations) => Told::Committed,
            (Carrier::Transaction, Session::Open | Session::Late | Session::Committing) if same => Told::InProgress,
            (Carrier::Transaction, Session::Committed) if same => Told::Committed,
            (Carrier::Transaction, Session::Aborted) if same => Told::Aborted,
            _ => Told::Nothing,
        };
        let alive = matches!(session, Session::Open | Session::Late | Session::Committing);
        let awaited = !self.is_backfill(writer) || !self.lacks(Break::ChunkNotAwaited);
        let named = writer.carrier != Carrier::Nobody && awaited;
        match state(told, named && alive, whole) {
            Payable::InFlight if self.lacks(Break::PayInFlight) => Payable::Payable,
            found => found,
        }
    }

    /// It copies what was there before.
    pub fn is_backfill(&self, writer: &Writer) -> bool {
        self.scripts[usize::from(writer.script)].way == Way::Backfill
    }

    fn first(&self, start: &Start) -> State {
        let mut writers = [Writer::default(); WRITERS];
        for (writer, &script) in writers.iter_mut().zip(&start.scripts) {
            *writer = Writer { script: script as u8, stage: Stage::Run(0), ..Writer::default() };
            if self.is_backfill(writer) {
                *writer = Writer::backfill(script as u8);
            }
        }
        State {
            authority: Rows::of(start.rows),
            kept: None,
            mirror: Rows::of(start.mirror),
            log: Log::of(start.mirror),
            incarnation: 0,
            writers,
            clearing: Clearing::default(),
            repairs: Default::default(),
            ghosts: Default::default(),
            jobs_lock: 0,
            faults: self.faults,
        }
    }
}

impl State {
    /// Ledger rows that are there.
    pub fn ledger(&self) -> Set {
        (0..WRITERS).filter(|&w| self.writers[w].debt == Debt::Owed).fold(0, |set, w| set | 1 << w)
    }

    /// The authority has flushed.
    pub fn authority_flushes(&mut self) {
        for writer in &mut self.writers {
            if writer.debt == Debt::Clearing {
                writer.debt = Debt::Cleared;
            }
        }
    }

    /// A transaction on the mirror ends.
    pub fn end_on_mirror(&mut self, txn: Txn, commit: bool) {
        let gone = self.mirror.end(txn, commit);
        if commit {
            self.log.push(self.mirror.committed());
        }
        // A DELETE that has seen a row, and waits for it, does not see one that comes in its place.
        self.writers.iter_mut().for_each(|writer| writer.images.seen &= !gone);
        for repair in &mut self.repairs {
            repair.miss(gone);
        }
    }

    /// Transactions on the mirror that hold a writer's lock on the table, one bit each.
    pub fn writing_on_mirror(&self) -> Set {
        let writers = (0..WRITERS).filter(|&w| self.writers[w].images.has_begun()).map(of_writer);
        let ghosts = (0..GHOSTS).filter(|&g| self.ghosts[g].live).map(of_ghost);
        writers.chain(ghosts).fold(0, |set, txn| set | 1 << txn)
    }

    /// What cannot matter any more is forgotten, so that states which differ only in it are one.
    fn forget(&mut self) {
        let reading = self.repairs.iter().fold(0, |ids, repair| ids | repair.ids());
        let reading = reading | self.clearing.ids | self.clearing.paid;
        for (w, writer) in self.writers.iter_mut().enumerate() {
            if self.faults == 0 && writer.debt == Debt::Clearing {
                writer.debt = Debt::Cleared;
            }
            if writer.is_over() && reading & (1 << w) == 0 {
                *writer = Writer::default();
            }
        }
    }
}

impl Model for World {
    type State = State;
    type Action = Action;

    fn initial(&self) -> Vec<State> {
        let first = |start| if self.symmetric { self.first(start).in_order() } else { self.first(start) };
        self.starts.iter().map(first).collect()
    }

    fn next(&self, state: &State, out: &mut Out) {
        for w in 0..WRITERS {
            self.write(state, w, out);
            self.carry(state, w, out);
        }
        self.clear(state, out);
        for r in 0..self.repairs {
            self.repair(state, r, out);
        }
        for g in 0..GHOSTS {
            self.haunt(state, g, out);
        }
        if state.faults > 0 {
            self.fail(state, out);
        }
        for (_, state) in out.iter_mut() {
            state.forget();
            if self.symmetric {
                *state = state.clone().in_order();
            }
        }
    }

    fn is_fault(&self, action: &Action) -> bool {
        action.fault
    }

    /// What the ledger does not name is equal, on disk too.
    fn wrong(&self, state: &State) -> Option<String> {
        let named = members(state.ledger()).fold(0, |keys, w| keys | self.program(state, w).keys);
        let (authority, mirror) = (state.authority.committed(), state.mirror.committed());
        (0..KEYS).filter(|key| named & (1 << key) == 0).find_map(|key| {
            let (here, there, disk) = (authority[key], mirror[key], state.log.durable[key]);
            (here != there || here != disk).then(|| {
                format!("key {key} is {here} on the authority, {there} on the mirror, {disk} on its disk, and no debt names it")
            })
        })
    }

    fn at_rest(&self, state: &State) -> bool {
        state.ledger() == 0
            && state.writers.iter().all(Writer::is_done)
            && state.clearing == Clearing::default()
            && state.repairs.iter().all(|repair| *repair == Repair::default())
            && !state.ghosts.iter().any(|ghost| ghost.live)
    }
}
