//! A client's transaction: its statements on the authority, its images on the mirror, its debt, and both COMMITs.

use crossfade::mirror::flight::{committed, is_short};

use crate::backfill::Fill;
use crate::breaks::Break;
use crate::rows::{KEYS, Rows, Set, Value, members};
use crate::script::{FIRST, GONE, Move, Sql, Way, own};
use crate::state::{Action, Debt, Out, State, World, of_writer};

/// Where a transaction is, as its proxy sees it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Stage {
    /// So many of its statements have run on the authority.
    Run(u8),
    /// Its images are being executed on the mirror.
    Images,
    /// The debts and COMMIT are on their way to the authority.
    Sent,
    /// ... and nobody waits for the answer.
    Orphan,
    /// The authority has decided; the answer is under way.
    Decided(bool),
    /// It is no client's transaction.
    Fill(Fill),
    /// Nothing is left to do.
    #[default]
    Over,
}

/// The mirror's session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Session {
    /// None was taken.
    #[default]
    None,
    /// At work, its transaction open.
    Open,
    /// Its proxy has left it: it executes what it was sent, and can only abort.
    Late,
    /// COMMIT is on its way to it.
    Committing,
    /// Its transaction has committed.
    Committed,
    /// Its transaction has aborted.
    Aborted,
}

/// Which statement of a flight is being executed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Part {
    /// Its own.
    #[default]
    Own,
    /// W7: what was deleted is inserted where it is missing, which waits for whoever has it under way.
    InsertMissing,
    /// ... and deleted by a new statement.
    DeleteAgain,
}

/// The mirror's session and how far it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Images {
    /// The session.
    pub session: Session,
    /// The incarnation in which it was opened.
    pub incarnation: u8,
    /// The move that it is at.
    pub at: u8,
    part: Part,
    pub begun: bool,
    /// Keys whose rows the statement saw when it began (DELETE).
    pub seen: Set,
    /// Keys that it is done with; that it did not find; that a delete of this flight did not find, or a copy could not insert.
    pub done: Set,
    missed: Set,
    pub short: Set,
    /// COMMIT's answer is waited for.
    pub listening: bool,
}

impl Images {
    /// Nothing was executed, or it does not matter any more.
    pub fn new(session: Session, incarnation: u8) -> Images {
        Images { session, incarnation, ..Images::default() }
    }

    /// It has executed something, or waits in it: it holds its lock on the table.
    pub fn has_begun(&self) -> bool {
        match self.session {
            Session::Open | Session::Late => self.at > 0 || self.begun || self.part != Part::Own,
            Session::Committing => true,
            Session::None | Session::Committed | Session::Aborted => false,
        }
    }
}

/// Whom the ledger row names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Carrier {
    /// Nobody.
    #[default]
    Nobody,
    /// A backend: its transaction was given up.
    Backend,
    /// A transaction and its backend.
    Transaction,
}

/// A client's transaction and what carries it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Writer {
    /// What it does.
    pub script: u8,
    /// Where it is.
    pub stage: Stage,
    /// Which of its statements had an effect.
    pub did: u8,
    /// On the mirror.
    pub images: Images,
    /// As the ledger names it.
    pub carrier: Carrier,
    /// Its ledger row.
    pub debt: Debt,
    /// A backfill's first reading, and the keys that were written since.
    pub copied: [Value; KEYS],
    /// ...
    pub touched: Set,
}

impl Writer {
    /// Its debt is gone for good, too.
    pub fn is_over(&self) -> bool {
        self.is_done() && matches!(self.debt, Debt::None | Debt::Cleared)
    }

    /// These keys have been written on the authority: the second reading of a backfill finds them changed.
    fn touch(&mut self, keys: Set) {
        if matches!(self.stage, Stage::Fill(Fill::Copy | Fill::Commit | Fill::Look)) {
            self.touched |= keys;
        }
    }

    /// It and what carries it have ended.
    pub fn is_done(&self) -> bool {
        self.stage == Stage::Over
            && matches!(self.images.session, Session::None | Session::Committed | Session::Aborted)
    }
}

/// What a statement on the authority did.
enum Ran {
    Waits,
    Locked,
    Did(bool),
}

impl World {
    /// What the proxy and the authority do for writer `w`.
    pub fn write(&self, state: &State, w: usize, out: &mut Out) {
        let step = |what| Action { who: ('T', w), what, fault: false };
        match state.writers[w].stage {
            Stage::Run(at) => self.run(state, w, usize::from(at), out),
            Stage::Images => self.execute(state, w, out),
            Stage::Sent => {
                out.push((step("COMMIT: the authority commits, with the debt"), self.decide(state, w, true)))
            }
            Stage::Orphan => {
                let mut next = self.decide(state, w, true);
                next.writers[w].stage = Stage::Over;
                out.push((step("COMMIT is read though nobody waits: the authority commits"), next));
                let mut next = self.decide(state, w, false);
                next.writers[w].stage = Stage::Over;
                out.push((step("COMMIT is never read: the authority rolls back"), next));
            }
            Stage::Decided(true) => out.push((step("COMMIT is answered"), self.answer(state, w, Some(b"COMMIT\0")))),
            Stage::Decided(false) => {
                out.push((step("COMMIT is answered: ROLLBACK"), self.answer(state, w, Some(b"ROLLBACK\0"))))
            }
            Stage::Fill(fill) => self.fill(state, w, fill, out),
            Stage::Over => {}
        }
    }

    fn run(&self, state: &State, w: usize, at: usize, out: &mut Out) {
        let step = |what| Action { who: ('T', w), what, fault: false };
        let script = self.scripts[usize::from(state.writers[w].script)];
        let mut next = state.clone();
        match apply(&mut next.authority, w, script.statements[at]) {
            Ran::Locked => return out.push((step("locks the row"), next)),
            Ran::Did(effect) => {
                next.writers[w].did |= u8::from(effect) << at;
                next.writers[w].stage = Stage::Run(at as u8 + 1);
            }
            Ran::Waits => {
                if state.authority.holds(of_writer(w)) {
                    next.authority.end(of_writer(w), false);
                    next.writers[w].stage = Stage::Over;
                    out.push((step("is cut off while it waits for a row"), next));
                }
                return;
            }
        }
        if at + 1 < script.statements.len() {
            return out.push((step("statement"), next));
        }
        let writer = &mut next.writers[w];
        let what = if writer.did == 0 {
            writer.stage = Stage::Over;
            next.authority.end(of_writer(w), false);
            "statement; nothing was written"
        } else if script.way == Way::Opaque {
            writer.stage = Stage::Sent;
            "statement, out of sight; debt and COMMIT are sent"
        } else {
            writer.images = Images::new(Session::Open, state.incarnation);
            let after = self.lacks(Break::ImagesAfterCommit);
            writer.carrier = if after { Carrier::Transaction } else { Carrier::Backend };
            writer.stage = if after { Stage::Sent } else { Stage::Images };
            "statement; images are sent"
        };
        out.push((step(what), next));
    }

    /// The proxy waits for its images.
    fn execute(&self, state: &State, w: usize, out: &mut Out) {
        let step = |what| Action { who: ('T', w), what, fault: false };
        let mut next = state.clone();
        if !self.advance(&mut next, w) {
            next.writers[w].images.session = Session::Late;
            self.send_commit(&mut next, w, Carrier::Backend);
            return out.push((step("mirror.timeout while its images wait for a lock: given up"), next));
        }
        if usize::from(next.writers[w].images.at) < self.program(&next, w).moves.len() {
            return out.push((step("image"), next));
        }
        if state.writers[w].carrier == Carrier::Transaction {
            // The authority has committed already.
            next.writers[w].images.session = Session::Committing;
            next.writers[w].images.listening = true;
            next.writers[w].stage = Stage::Over;
            return out.push((step("last image; COMMIT is sent to the mirror"), next));
        }
        self.send_commit(&mut next, w, Carrier::Transaction);
        out.push((step("last image; debt and COMMIT are sent"), next));
    }

    /// The debts and COMMIT go to the authority, unless (which is a rule left out) it has committed already.
    pub fn send_commit(&self, next: &mut State, w: usize, carrier: Carrier) {
        let after = next.writers[w].carrier == Carrier::Transaction;
        next.writers[w].stage = if after { Stage::Over } else { Stage::Sent };
        if !after {
            next.writers[w].carrier = carrier;
        }
    }

    /// The authority reads COMMIT.
    pub fn decide(&self, state: &State, w: usize, commit: bool) -> State {
        let mut next = state.clone();
        if commit && self.lacks(Break::CommitNotDurable) {
            next.kept.get_or_insert(state.authority.committed());
        }
        let written = state.authority.written(of_writer(w));
        next.authority.end(of_writer(w), commit);
        if commit {
            next.writers.iter_mut().for_each(|writer| writer.touch(written));
            next.authority_flushes();
            if !self.lacks(Break::DebtsAfterCommit) {
                next.writers[w].debt = Debt::Owed;
            }
        }
        next.writers[w].stage = Stage::Decided(commit);
        next
    }

    /// The proxy knows the answer, or (None) knows that there will be none.
    pub fn answer(&self, state: &State, w: usize, answer: Option<&[u8]>) -> State {
        let mut next = state.clone();
        let decided = state.writers[w].stage == Stage::Decided(true);
        let writer = &mut next.writers[w];
        writer.stage = Stage::Over;
        if decided && self.lacks(Break::DebtsAfterCommit) && answer.is_some() {
            writer.debt = Debt::Owed;
        }
        if writer.images.session != Session::Open {
            return next;
        }
        let commits = committed(answer)
            || (answer.is_none() && self.lacks(Break::UnknownIsCommitted))
            || (answer.is_some() && self.lacks(Break::TagUnread));
        if commits && self.lacks(Break::ImagesAfterCommit) {
            writer.stage = Stage::Images;
        } else if commits {
            (writer.images.session, writer.images.listening) = (Session::Committing, true);
        } else {
            writer.images.session = Session::Late;
        }
        next
    }

    /// What the mirror does for writer `w` when its proxy does not wait for images.
    pub fn carry(&self, state: &State, w: usize, out: &mut Out) {
        let step = |what| Action { who: ('T', w), what, fault: false };
        let images = state.writers[w].images;
        let end = |session, commit| {
            let mut next = state.clone();
            next.writers[w].images = Images::new(session, images.incarnation);
            next.end_on_mirror(of_writer(w), commit);
            next
        };
        match images.session {
            Session::Late => {
                let rest = self.program(state, w).moves.len() - usize::from(images.at);
                if rest > 0 {
                    let mut next = state.clone();
                    if self.advance(&mut next, w) {
                        out.push((step("image, late"), next));
                    }
                } else if self.lacks(Break::CommitWithImages) {
                    out.push((step("the mirror commits, late"), end(Session::Committed, true)));
                }
                out.push((step("its session on the mirror ends"), end(Session::Aborted, false)));
            }
            Session::Committing => {
                let mut next = end(Session::Committed, true);
                if images.listening {
                    next.clearing.paid |= 1 << w;
                }
                out.push((step("the mirror commits"), next));
                if !images.listening {
                    out.push((step("its session on the mirror ends, COMMIT unread"), end(Session::Aborted, false)));
                }
            }
            Session::None | Session::Open | Session::Committed | Session::Aborted => {}
        }
    }

    /// One statement on the mirror, as far as it gets. False: it waits where it waited.
    fn advance(&self, next: &mut State, w: usize) -> bool {
        let before = next.writers[w].images;
        let moves = &self.program(next, w).moves;
        let mut images = before;
        let now = match images.part {
            Part::Own => moves[usize::from(images.at)].clone(),
            Part::InsertMissing => Move::Upsert(members(images.short).map(|key| (key, GONE)).collect()),
            Part::DeleteAgain => Move::Delete(images.short),
        };
        let finished = match &now {
            Move::Upsert(rows) => upsert(&mut next.mirror, w, &mut images, rows),
            Move::Delete(keys) => delete(&mut next.mirror, w, &mut images, *keys),
            Move::Settle => true,
        };
        if finished {
            let (missed, keys) = (images.missed.count_ones() as usize, images.done.count_ones() as usize);
            let short = images.part == Part::Own && matches!(now, Move::Delete(_)) && is_short(keys - missed, keys);
            images.short |= if short { images.done } else { 0 };
            (images.begun, images.seen, images.done, images.missed) = (false, 0, 0, 0);
            images.part = match images.part {
                Part::InsertMissing => Part::DeleteAgain,
                Part::Own | Part::DeleteAgain => Part::Own,
            };
            if before.part == Part::DeleteAgain {
                images.short = 0;
            } else if before.part == Part::Own {
                images.at += 1;
            }
            while images.part == Part::Own && moves.get(usize::from(images.at)) == Some(&Move::Settle) {
                if images.short != 0 && !self.lacks(Break::DeleteOnce) {
                    images.part = Part::InsertMissing;
                } else {
                    images.at += 1;
                }
            }
        }
        next.writers[w].images = images;
        images != before
    }
}

fn upsert(mirror: &mut Rows, w: usize, images: &mut Images, rows: &[(usize, Value)]) -> bool {
    let me = of_writer(w);
    images.begun = true;
    for &(key, value) in rows.iter().filter(|(key, _)| images.done & (1 << key) == 0).collect::<Vec<_>>() {
        let missing = images.part == Part::InsertMissing;
        let waits = if missing { mirror.is_under_way(me, key) } else { !mirror.is_free(me, key) };
        if waits {
            return false;
        }
        images.done |= 1 << key;
        if !missing || mirror.sees(me, key) == 0 {
            mirror.write(me, key, value);
        }
    }
    true
}

fn delete(mirror: &mut Rows, w: usize, images: &mut Images, keys: Set) -> bool {
    let me = of_writer(w);
    if !images.begun {
        images.begun = true;
        images.seen = members(keys).filter(|&key| mirror.sees(me, key) != 0).fold(0, |seen, key| seen | 1 << key);
    }
    for key in members(keys & !images.done) {
        let seen = images.seen & (1 << key) != 0;
        if seen && !mirror.is_free(me, key) {
            return false;
        }
        images.done |= 1 << key;
        if seen && mirror.sees(me, key) != 0 {
            mirror.write(me, key, 0);
        } else {
            images.missed |= 1 << key;
        }
    }
    true
}

fn apply(authority: &mut Rows, w: usize, sql: Sql) -> Ran {
    let me = of_writer(w);
    let change = |authority: &mut Rows, key, value| {
        if authority.sees(me, key) == 0 {
            return Ran::Did(false);
        }
        if !authority.is_free(me, key) {
            return Ran::Waits;
        }
        authority.write(me, key, value);
        Ran::Did(true)
    };
    match sql {
        Sql::Update(key) => change(authority, key, own(w)),
        Sql::Reset(key) => change(authority, key, FIRST),
        Sql::Delete(key) => change(authority, key, 0),
        Sql::Insert(key) | Sql::Upsert(key) if !authority.is_free(me, key) => Ran::Waits,
        Sql::Insert(key) if authority.sees(me, key) != 0 => Ran::Did(false),
        Sql::Insert(key) | Sql::Upsert(key) => {
            authority.write(me, key, own(w));
            Ran::Did(true)
        }
        Sql::Rekey(from, to) => {
            if authority.0[from].owner != me {
                return match authority.sees(me, from) {
                    0 => Ran::Did(false),
                    _ if authority.lock(me, from) => Ran::Locked,
                    _ => Ran::Waits,
                };
            }
            if !authority.is_free(me, to) {
                return Ran::Waits;
            }
            if authority.sees(me, from) == 0 || authority.sees(me, to) != 0 {
                return Ran::Did(false);
            }
            authority.write(me, from, 0);
            authority.write(me, to, own(w));
            Ran::Did(true)
        }
    }
}
