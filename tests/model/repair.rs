//! The jobs: repair pays what is owed (`migrate::repair`, `reconcile`, `walk`; `gone` beside), the clearing job deletes what was answered
//! (`ledger::clear`). And what dead repairers have left on the mirror.

use crossfade::migrate::rules::{Place, State as Payable, place};

use crate::breaks::Break;
use crate::rows::{KEYS, Set, Value, members};
use crate::state::{Action, Clearing, Debt, GHOSTS, Ghost, Out, REPAIRS, State, WRITERS, World, of_ghost, of_repair};
use crate::symmetry::Renumbering;

const ALL_KEYS: Set = (1 << KEYS) - 1;

/// What a repairer does next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Step {
    /// Read the mirror's incarnation and the ledger.
    #[default]
    Read,
    /// Ask the mirror which carriers have ended.
    Ask,
    /// Read the keys of the authority's rows: a whole table is owed.
    Page,
    /// Lock rows on the authority.
    Lock,
    /// Read them in a later snapshot.
    Look,
    /// Lock and read the same keys on the mirror.
    Compare,
    /// Write what differs.
    Write,
    /// A round trip to the authority, behind which COMMIT goes to the mirror.
    Hold,
    /// The mirror reads COMMIT, and answers.
    Commit,
    /// Lock on the mirror, of several keys that the authority lacks, the rows that nobody else has.
    Seize,
    /// Look for those that could not be locked; delete those that could.
    DeleteMany,
    /// Look again at the authority, and end the mirror's transaction.
    LookAgainAtMany,
    /// The mirror reads COMMIT, and answers.
    DeleteManyCommit,
    /// Delete a key that the authority lacks.
    Delete(u8),
    /// Look again at the authority, and end the mirror's transaction.
    LookAgain(u8),
    /// The mirror reads COMMIT, and answers.
    DeleteCommit(u8),
    /// Wait for those who write the table on the mirror: before the second deletes, or before the walk.
    Wait,
    /// Read the keys of the mirror's rows.
    Walk,
    /// Which of them the authority has.
    Exist,
    /// Flush the mirror.
    Flush,
    /// Delete ledger rows.
    Clear,
}

/// A repairer, in one pass over the ledger.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Repair {
    /// What it does next.
    pub step: Step,
    incarnation: u8,
    /// Ledger rows: read; to be paid; to be cleared.
    read: Set,
    pay: Set,
    clear: Set,
    /// Keys: of this chunk; locked on the authority; to be written on the mirror, and written; that the authority lacks; whose delete found
    /// nothing; not paid.
    keys: Set,
    held: Set,
    values: [Value; KEYS],
    write: Set,
    written: Set,
    pub absent: Set,
    pub unseen: Set,
    pub busy: Set,
    /// Of those that the authority lacks: locked on the mirror, and deleted; to be deleted in a transaction of their own.
    pub seized: Set,
    pub alone: Set,
    /// Transactions that are waited for.
    awaited: Set,
    /// The delete under way: its statement has begun, saw a row, has removed it.
    pub begun: bool,
    pub saw: bool,
    pub found: bool,
    /// Deletes are done for the second time.
    again: bool,
    /// The table is owed as a whole; its rows on the mirror were read.
    whole: bool,
    walked: bool,
    /// Its session on the authority is gone, which it will notice when it uses it.
    pub cut: bool,
}

impl Repair {
    /// Ledger rows whose fate it holds in its hands.
    pub fn ids(&self) -> Set {
        self.read | self.pay | self.clear
    }

    /// Writers have other numbers.
    pub fn renumber(&mut self, new: &Renumbering) {
        [self.read, self.pay, self.clear] = [self.read, self.pay, self.clear].map(|debts| new.debts(debts));
        self.awaited = new.txns(self.awaited);
        self.values = new.values(self.values);
    }

    /// Rows with these keys are gone.
    pub fn miss(&mut self, gone: Set) {
        if let Step::Delete(key) = self.step
            && gone & (1 << key) != 0
        {
            self.saw = false;
        }
    }

    /// COMMIT is under way, or statements are whose COMMIT was sent with them.
    fn leaves(&self, broken: Option<Break>) -> Option<Ghost> {
        let pipelined = broken == Some(Break::CommitPipelined);
        let ghost = |writes, values| Some(Ghost { live: true, writes, values });
        match self.step {
            Step::Commit | Step::DeleteCommit(_) | Step::DeleteManyCommit => ghost(0, [0; KEYS]),
            Step::Write if pipelined => ghost(self.write & !self.written, self.values),
            Step::Delete(key) if pipelined => ghost(1 << key, [0; KEYS]),
            Step::DeleteMany if pipelined => ghost(self.seized, [0; KEYS]),
            _ => None,
        }
    }

    /// Keys that the authority lacks, which are deleted in one transaction.
    pub fn together(&self) -> Set {
        self.absent & !self.alone
    }

    /// What comes next among keys that the authority lacks, and after them.
    pub fn proceed(&mut self, broken: Option<Break>, writing: Set) {
        (self.begun, self.saw, self.found) = (false, false, false);
        if self.together().count_ones() > 1 {
            self.step = Step::Seize;
        } else if let Some(key) = members(self.absent).next() {
            self.step = Step::Delete(key as u8);
        } else if self.unseen != 0 && !self.again && broken != Some(Break::NoSecondTry) {
            (self.step, self.awaited) = (Step::Wait, if broken == Some(Break::NoWait) { 0 } else { writing });
        } else if self.whole && !self.walked {
            (self.unseen, self.alone, self.again, self.walked) = (0, 0, false, true);
            (self.step, self.awaited) = (Step::Wait, if broken == Some(Break::WalkAtOnce) { 0 } else { writing });
        } else {
            self.step = Step::Flush;
        }
    }
}

impl World {
    /// What the clearing job does.
    pub fn clear(&self, state: &State, out: &mut Out) {
        let step = |what| Action { who: ('C', 0), what, fault: false };
        let mut next = state.clone();
        let clearing = &mut next.clearing;
        if self.lacks(Break::FlushBeforeAnswer) && !clearing.early && clearing.ids == 0 {
            let under_way = state.writers.iter().any(|writer| writer.images.listening);
            if clearing.paid != 0 || under_way {
                clearing.early = true;
                next.log.flush();
                out.push((step("flushes the mirror before it looks what was answered"), next));
            }
        } else if clearing.ids != 0 {
            let ids = std::mem::take(&mut clearing.ids);
            self.delete_debts(&mut next, ids);
            out.push((step("deletes ledger rows"), next));
        } else if clearing.paid != 0 || clearing.early {
            let same = |w: &usize| {
                state.writers[*w].images.incarnation == state.incarnation || self.lacks(Break::AnyIncarnation)
            };
            let ids = members(clearing.paid).filter(same).fold(0, |ids, w| ids | 1 << w);
            let early = clearing.early;
            *clearing = Clearing { ids, ..Clearing::default() };
            if ids != 0 && !early && !self.lacks(Break::FlushOfNothing) {
                next.log.flush();
            }
            out.push((step("flushes the mirror, in the same incarnation as the answers"), next));
        }
    }

    fn delete_debts(&self, next: &mut State, ids: Set) {
        let paid = members(ids).fold(0, |keys, w| keys | self.program(next, w).keys);
        let highest = 8 - ids.leading_zeros() as usize;
        for w in 0..WRITERS {
            let exactly = ids & (1 << w) != 0;
            let by_range = self.lacks(Break::ClearByRange) && w < highest;
            let by_key = self.lacks(Break::ClearByKey) && self.program(next, w).keys & !paid == 0;
            if (exactly || by_range || by_key) && next.writers[w].debt == Debt::Owed {
                next.writers[w].debt = Debt::Clearing;
            }
        }
    }

    /// What repairer `r` does next.
    pub fn repair(&self, state: &State, r: usize, out: &mut Out) {
        let me = of_repair(r);
        let repair = state.repairs[r];
        let mut next = state.clone();
        let mut push = |what, next| out.push((Action { who: ('R', r), what, fault: false }, next));
        match repair.step {
            Step::Read => {
                if state.ledger() != 0 {
                    let read =
                        Repair { step: Step::Ask, incarnation: state.incarnation, read: state.ledger(), ..repair };
                    next.repairs[r] = read;
                    push("reads the ledger", next);
                }
            }
            Step::Ask => {
                self.ask(&mut next, r);
                push("asks the mirror for carriers", next);
            }
            Step::Page
            | Step::Lock
            | Step::Look
            | Step::Hold
            | Step::LookAgain(_)
            | Step::LookAgainAtMany
            | Step::Exist
                if repair.cut =>
            {
                self.abandon(&mut next, r);
                push("finds its session on the authority dead", next);
            }
            Step::Page => {
                let here = state.authority.committed();
                next.repairs[r].keys = (0..KEYS).filter(|&key| here[key] != 0).fold(0, |keys, key| keys | 1 << key);
                next.repairs[r].step = Step::Lock;
                push("reads the keys of the authority's rows", next);
            }
            Step::Lock => {
                for key in members(repair.keys) {
                    next.repairs[r].held |= u8::from(next.authority.lock(me, key)) << key;
                }
                next.repairs[r].step = Step::Look;
                push("locks rows on the authority", next);
            }
            Step::Look => {
                self.look(&mut next, r);
                push("reads them in a later snapshot", next);
            }
            Step::Compare | Step::Write | Step::Hold | Step::Commit => self.equalise(state, r, out),
            Step::Seize | Step::DeleteMany | Step::LookAgainAtMany | Step::DeleteManyCommit => {
                self.remove_many(state, r, out);
            }
            Step::Delete(_) | Step::LookAgain(_) | Step::DeleteCommit(_) => self.remove(state, r, out),
            Step::Wait | Step::Walk | Step::Exist => self.walk(state, r, out),
            Step::Flush | Step::Clear => self.flush(state, r, out),
        }
    }

    fn ask(&self, next: &mut State, r: usize) {
        let repair = next.repairs[r];
        let ids = |wanted| {
            let is = |w: &usize| self.payable(next, *w, repair.incarnation) == wanted;
            members(repair.read).filter(is).fold(0, |ids, w| ids | 1 << w)
        };
        let (clear, mut pay) = (ids(Payable::Carried), ids(Payable::Payable));
        if pay != 0 && next.jobs_lock != 0 && !self.lacks(Break::NoJobsLock) {
            // Another job is at the table.
            pay = 0;
        }
        if pay != 0 {
            next.jobs_lock = of_repair(r);
        }
        let keys = members(pay).fold(0, |keys, w| keys | self.program(next, w).keys);
        let whole = members(pay).any(|w| self.program(next, w).whole);
        let step = match (pay, clear) {
            (0, 0) => return next.repairs[r] = Repair::default(),
            (0, _) => Step::Flush,
            _ if whole => Step::Page,
            _ => Step::Lock,
        };
        let walked = self.lacks(Break::NoUnion) && members(pay).any(|w| self.is_backfill(&next.writers[w]));
        next.repairs[r] = Repair { step, read: 0, pay, clear, keys, whole, walked, ..repair };
    }

    fn look(&self, next: &mut State, r: usize) {
        let me = of_repair(r);
        let mut repair = next.repairs[r];
        for key in members(std::mem::take(&mut repair.keys)) {
            let (ours, value) = (repair.held & (1 << key) != 0, next.authority.sees(me, key));
            match place(ours, value != 0) {
                Place::Held => repair.values[key] = value,
                Place::Absent => repair.absent |= 1 << key,
                Place::Again if self.lacks(Break::SkippedIsPaid) => {}
                Place::Again if self.lacks(Break::WriteUnlocked) => {
                    repair.held |= 1 << key;
                    repair.values[key] = value;
                }
                Place::Again => repair.busy |= 1 << key,
            }
        }
        if repair.held != 0 {
            repair.step = Step::Compare;
        } else {
            repair.proceed(self.broken, next.writing_on_mirror());
        }
        next.repairs[r] = repair;
    }

    /// Makes the mirror's rows equal to those held.
    fn equalise(&self, state: &State, r: usize, out: &mut Out) {
        let me = of_repair(r);
        let mut next = state.clone();
        let mut repair = state.repairs[r];
        let mut push = |what, next| out.push((Action { who: ('R', r), what, fault: false }, next));
        match repair.step {
            Step::Compare => {
                for key in members(repair.held) {
                    let locked = next.mirror.lock(me, key) || self.lacks(Break::CompareUnlocked);
                    let found = if locked { next.mirror.sees(me, key) } else { 0 };
                    repair.write |= u8::from(found != repair.values[key]) << key;
                }
                repair.step = if repair.write == 0 { Step::Hold } else { Step::Write };
                next.repairs[r] = repair;
                push("locks and compares rows on the mirror", next);
            }
            Step::Write => {
                let left = members(repair.write & !repair.written).next();
                let key = left.expect("the last row has changed the step");
                if !next.mirror.is_free(me, key) {
                    self.give_up_chunk(&mut next, r);
                    return push("waits too long for a row on the mirror: tries again later", next);
                }
                next.mirror.write(me, key, repair.values[key]);
                repair.written |= 1 << key;
                if repair.written == repair.write {
                    repair.step = if self.lacks(Break::NoRoundTrip) { Step::Commit } else { Step::Hold };
                }
                next.repairs[r] = repair;
                push("writes a row on the mirror", next);
            }
            Step::Hold if repair.write != 0 => {
                next.repairs[r].step = Step::Commit;
                push("sees its locks stand; COMMIT is sent to the mirror", next);
            }
            _ => {
                // COMMIT is read; or nothing was written, and both are rolled back.
                next.end_on_mirror(me, repair.step == Step::Commit);
                next.authority.end(me, false);
                (repair.held, repair.write, repair.written, repair.values) = (0, 0, 0, [0; KEYS]);
                repair.proceed(self.broken, next.writing_on_mirror());
                next.repairs[r] = repair;
                push("ends both transactions", next);
            }
        }
    }

    /// Its transactions are rolled back; what it held is tried again later.
    fn give_up_chunk(&self, next: &mut State, r: usize) {
        next.authority.end(of_repair(r), false);
        next.end_on_mirror(of_repair(r), false);
        let mut repair = next.repairs[r];
        repair.busy |= repair.held;
        (repair.held, repair.write, repair.written, repair.values) = (0, 0, 0, [0; KEYS]);
        repair.proceed(self.broken, next.writing_on_mirror());
        next.repairs[r] = repair;
    }

    /// Waiting, holding nothing; and the walk over the mirror's rows.
    fn walk(&self, state: &State, r: usize, out: &mut Out) {
        let mut next = state.clone();
        let mut repair = state.repairs[r];
        let mut push = |what, next| out.push((Action { who: ('R', r), what, fault: false }, next));
        match repair.step {
            Step::Wait => {
                // A transaction that ended and one that began in its place are not told apart: each writer has one only.
                repair.awaited &= state.writing_on_mirror();
                if repair.awaited != 0 {
                    if repair.whole {
                        self.abandon(&mut next, r);
                    } else {
                        (repair.busy, repair.unseen, repair.awaited) = (repair.busy | repair.unseen, 0, 0);
                        repair.proceed(self.broken, 0);
                        next.repairs[r] = repair;
                    }
                    return push("waits too long for those who write the table: tries again later", next);
                }
                if repair.unseen != 0 {
                    (repair.absent, repair.unseen, repair.alone, repair.again) = (repair.unseen, 0, 0, true);
                    repair.proceed(self.broken, 0);
                } else {
                    repair.step = Step::Walk;
                }
                next.repairs[r] = repair;
                push("has waited for those who write the table", next);
            }
            Step::Walk => {
                let there = state.mirror.committed();
                repair.keys = (0..KEYS).filter(|&key| there[key] != 0).fold(0, |keys, key| keys | 1 << key);
                repair.step = Step::Exist;
                next.repairs[r] = repair;
                push("reads the keys of the mirror's rows", next);
            }
            _ => {
                let here = state.authority.committed();
                repair.absent = members(repair.keys).filter(|&key| here[key] == 0).fold(0, |keys, key| keys | 1 << key);
                repair.keys = 0;
                repair.proceed(self.broken, state.writing_on_mirror());
                next.repairs[r] = repair;
                push("looks which of them the authority has", next);
            }
        }
    }

    /// Flush, and clear what was paid.
    fn flush(&self, state: &State, r: usize, out: &mut Out) {
        let mut next = state.clone();
        let repair = state.repairs[r];
        let mut push = |what, next| out.push((Action { who: ('R', r), what, fault: false }, next));
        if repair.step == Step::Clear {
            if repair.cut {
                self.abandon(&mut next, r);
                return push("finds its session on the authority dead", next);
            }
            self.delete_debts(&mut next, repair.clear);
            next.repairs[r] = Repair::default();
            return push("deletes exactly the ledger rows that it has paid", next);
        }
        let unpaid = |keys: Set| if repair.whole { repair.busy & ALL_KEYS } else { repair.busy & keys };
        let paid = members(repair.pay).filter(|&w| unpaid(self.program(state, w).keys) == 0);
        let clear = paid.fold(repair.clear, |clear, w| clear | 1 << w);
        if next.jobs_lock == of_repair(r) {
            next.jobs_lock = 0;
        }
        let same = repair.incarnation == state.incarnation || self.lacks(Break::AnyIncarnation);
        if clear == 0 || !same {
            next.repairs[r] = Repair::default();
            return push("has nothing to clear", next);
        }
        if !self.lacks(Break::FlushOfNothing) {
            next.log.flush();
        }
        next.repairs[r] = Repair { step: Step::Clear, clear, cut: repair.cut, ..Repair::default() };
        push("flushes the mirror", next);
    }

    /// Its sessions end, and it begins anew. What it has sent may still happen.
    pub fn abandon(&self, next: &mut State, r: usize) {
        let me = of_repair(r);
        next.authority.end(me, false);
        let free = (0..GHOSTS).find(|&g| !next.ghosts[g].live);
        match (next.repairs[r].leaves(self.broken), free) {
            (Some(ghost), Some(g)) => {
                next.ghosts[g] = ghost;
                next.mirror.rename(me, of_ghost(g));
                if next.jobs_lock == me {
                    next.jobs_lock = of_ghost(g);
                }
            }
            _ => next.end_on_mirror(me, false),
        }
        if next.jobs_lock == me {
            next.jobs_lock = 0;
        }
        next.repairs[r] = Repair::default();
    }

    /// What happens on the mirror for a repairer who is dead.
    pub fn haunt(&self, state: &State, g: usize, out: &mut Out) {
        let ghost = state.ghosts[g];
        if !ghost.live {
            return;
        }
        let me = of_ghost(g);
        let mut push = |what, next| out.push((Action { who: ('G', g), what, fault: false }, next));
        let end = |commit| {
            let mut next = state.clone();
            next.end_on_mirror(me, commit);
            next.ghosts[g] = Ghost::default();
            if next.jobs_lock == me {
                next.jobs_lock = 0;
            }
            next
        };
        push("ends, COMMIT unread", end(false));
        let Some(key) = members(ghost.writes).next() else { return push("commits, late", end(true)) };
        let mut next = state.clone();
        if ghost.values[key] != 0 || state.mirror.sees(me, key) != 0 {
            if !state.mirror.is_free(me, key) {
                return;
            }
            next.mirror.write(me, key, ghost.values[key]);
        }
        next.ghosts[g].writes &= !(1 << key);
        push("executes a statement, late", next);
    }
}

const _: () = assert!(WRITERS + REPAIRS + GHOSTS < 8, "transactions fit a set");
