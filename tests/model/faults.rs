//! What may fail, at any step.

use crate::repair::{Repair, Step};
use crate::rows::{Log, Rows};
use crate::state::{Action, Clearing, Debt, GHOSTS, Ghost, Out, State, WRITERS, World, of_repair, of_writer};
use crate::writer::{Carrier, Images, Session, Stage};

impl World {
    /// All faults that may happen now.
    pub fn fail(&self, state: &State, out: &mut Out) {
        let from = out.len();
        self.proxy_dies(state, out);
        self.authority_crashes(state, out);
        self.mirror_crashes(state, out);
        for w in 0..WRITERS {
            self.writer_fails(state, w, out);
        }
        for r in 0..self.repairs {
            self.repair_fails(state, r, out);
        }
        out[from..].iter_mut().for_each(|(_, next)| next.faults -= 1);
    }

    /// All that it holds in memory is gone; its sessions end. What it has sent may still be read.
    fn proxy_dies(&self, state: &State, out: &mut Out) {
        let mut next = state.clone();
        for w in 0..WRITERS {
            let writer = &mut next.writers[w];
            match writer.stage {
                // It has not begun: its client connects again.
                Stage::Run(0) | Stage::Over => {}
                Stage::Run(_) | Stage::Images => {
                    writer.stage = Stage::Over;
                    next.authority.end(of_writer(w), false);
                }
                Stage::Sent => writer.stage = Stage::Orphan,
                Stage::Orphan => {}
                Stage::Decided(_) => writer.stage = Stage::Over,
                Stage::Fill(_) => writer.end_fill(),
            }
            let images = &mut next.writers[w].images;
            if images.session == Session::Open {
                images.session = Session::Late;
            }
            images.listening = false;
        }
        next.clearing = Clearing::default();
        (0..self.repairs).for_each(|r| self.abandon(&mut next, r));
        if next != *state {
            out.push((Action { who: ('-', 0), what: "the proxy dies", fault: true }, next));
        }
    }

    /// Transactions that have not committed are gone, and all sessions.
    fn authority_crashes(&self, state: &State, out: &mut Out) {
        let mut next = state.clone();
        for w in 0..WRITERS {
            match state.writers[w].stage {
                Stage::Run(0) | Stage::Over => {}
                Stage::Run(_) | Stage::Images | Stage::Sent | Stage::Decided(_) => {
                    next.authority.end(of_writer(w), false);
                    next = self.answer(&next, w, None);
                }
                Stage::Orphan => {
                    next.authority.end(of_writer(w), false);
                    next.writers[w].stage = Stage::Over;
                }
                Stage::Fill(_) => next.writers[w].end_fill(),
            }
            // What was deleted without a flush is there again.
            if next.writers[w].debt == Debt::Clearing {
                next.writers[w].debt = Debt::Owed;
            }
        }
        for r in 0..self.repairs {
            next.authority.end(of_repair(r), false);
            if next.repairs[r] != Repair::default() {
                next.repairs[r].cut = true;
            }
        }
        // Its deletion fails: the debts stay, and are looked at again.
        next.clearing.paid |= std::mem::take(&mut next.clearing.ids);
        if let Some(kept) = next.kept.take() {
            next.authority = Rows::of(kept);
            next.writers.iter_mut().for_each(|writer| writer.debt = Debt::None);
        }
        out.push((Action { who: ('-', 0), what: "the authority crashes", fault: true }, next));
    }

    /// Commits that were answered and not flushed may be gone, from some commit on; all sessions are; the incarnation is another.
    fn mirror_crashes(&self, state: &State, out: &mut Out) {
        for left in state.log.states() {
            let mut next = state.clone();
            next.mirror = Rows::of(left);
            next.log = Log::of(left);
            next.incarnation += 1;
            for w in 0..WRITERS {
                let images = next.writers[w].images;
                let aborted = Images::new(Session::Aborted, images.incarnation);
                match images.session {
                    Session::Open | Session::Late | Session::Committing => {
                        next.writers[w].images = aborted;
                        match state.writers[w].stage {
                            Stage::Images => self.send_commit(&mut next, w, Carrier::Backend),
                            Stage::Fill(_) => next.writers[w].stage = Stage::Over,
                            _ => {}
                        }
                    }
                    Session::None | Session::Committed | Session::Aborted => {}
                }
            }
            // Nothing of a session outlives its server.
            for r in 0..self.repairs {
                next.authority.end(of_repair(r), false);
                let told = matches!(next.repairs[r].step, Step::Clear);
                if !told {
                    next.repairs[r] = Repair::default();
                }
            }
            next.ghosts = [Ghost::default(); GHOSTS];
            next.jobs_lock = 0;
            out.push((Action { who: ('-', 0), what: "the mirror crashes", fault: true }, next));
        }
    }

    fn writer_fails(&self, state: &State, w: usize, out: &mut Out) {
        let mut push = |what, next| out.push((Action { who: ('T', w), what, fault: true }, next));
        let writer = state.writers[w];
        let with = |session, stage| {
            let mut next = state.clone();
            next.writers[w].images.session = session;
            next.writers[w].stage = stage;
            next
        };
        match writer.stage {
            Stage::Images if writer.carrier != Carrier::Transaction => {
                let mut next = with(Session::Late, Stage::Images);
                self.send_commit(&mut next, w, Carrier::Backend);
                push("the mirror makes no progress for mirror.timeout: given up", next);
                let mut next = state.clone();
                next.writers[w].images = Images::new(Session::Aborted, writer.images.incarnation);
                next.end_on_mirror(of_writer(w), false);
                self.send_commit(&mut next, w, Carrier::Backend);
                push("its session on the mirror dies", next);
                if writer.images == Images::new(Session::Open, writer.images.incarnation) {
                    let mut next = state.clone();
                    next.writers[w].images = Images::default();
                    self.send_commit(&mut next, w, Carrier::Nobody);
                    push("no session on the mirror: given up", next);
                }
                let mut next = with(Session::Late, Stage::Over);
                next.authority.end(of_writer(w), false);
                push("its session on the authority dies", next);
            }
            Stage::Sent => {
                push("the authority refuses COMMIT", self.decide(state, w, false));
                let mut next = self.answer(state, w, None);
                next.writers[w].stage = Stage::Orphan;
                push("its connection to the authority breaks", next);
            }
            Stage::Decided(_) => push("its connection to the authority breaks", self.answer(state, w, None)),
            Stage::Fill(_) => {
                let mut next = state.clone();
                next.writers[w].end_fill();
                push("dies", next);
            }
            Stage::Run(_) | Stage::Images | Stage::Orphan | Stage::Over => {}
        }
        if writer.images.session == Session::Committing && writer.images.listening {
            let mut next = state.clone();
            next.writers[w].images.listening = false;
            push("COMMIT on the mirror is not answered in time", next);
        }
    }

    fn repair_fails(&self, state: &State, r: usize, out: &mut Out) {
        let mut push = |what, next| out.push((Action { who: ('R', r), what, fault: true }, next));
        if state.repairs[r] == Repair::default() {
            return;
        }
        let mut next = state.clone();
        self.abandon(&mut next, r);
        push("dies, or gives the mirror up", next);
        if !state.repairs[r].cut {
            let mut next = state.clone();
            next.authority.end(of_repair(r), false);
            next.repairs[r].cut = true;
            push("loses its session on the authority, and does not know", next);
        }
    }
}
