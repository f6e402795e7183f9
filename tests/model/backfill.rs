//! A backfill's chunk: all keys. It is in work from the beginning, which its ledger row says, naming the worker's backend on the mirror (D5, D6).

use crate::breaks::Break;
use crate::rows::{KEYS, members};
use crate::script::IN_WORK;
use crate::state::{Action, Debt, Out, State, World, of_writer};
use crate::writer::{Carrier, Images, Session, Stage, Writer};

/// What the worker does next.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fill {
    /// Read the chunk on the authority, locking nothing.
    Read,
    /// Insert its rows on the mirror, where they are missing.
    Copy,
    /// The mirror reads COMMIT, flushes, and answers.
    Commit,
    /// Read keys, `xmin` and `xmax` once more, and enter the suspects as debts in the place of the chunk.
    Look,
}

impl Writer {
    /// A worker whose chunk is in work.
    pub fn backfill(script: u8) -> Writer {
        Writer {
            script,
            stage: Stage::Fill(Fill::Read),
            did: IN_WORK,
            images: Images::new(Session::Open, 0),
            carrier: Carrier::Backend,
            debt: Debt::Owed,
            ..Writer::default()
        }
    }

    /// It dies. Its COMMIT may be under way.
    pub fn end_fill(&mut self) {
        let sent = self.stage == Stage::Fill(Fill::Commit);
        self.images.session = if sent { Session::Committing } else { Session::Late };
        (self.stage, self.copied, self.touched) = (Stage::Over, [0; KEYS], 0);
    }
}

impl World {
    /// What the worker in the place of writer `w` does.
    pub fn fill(&self, state: &State, w: usize, fill: Fill, out: &mut Out) {
        let me = of_writer(w);
        let mut next = state.clone();
        let writer = &mut next.writers[w];
        let what = match fill {
            Fill::Read => {
                writer.copied = state.authority.committed();
                writer.stage = Stage::Fill(Fill::Copy);
                "backfill reads its chunk"
            }
            Fill::Copy => {
                let left = |key: &usize| writer.copied[*key] != 0 && writer.images.done & (1 << key) == 0;
                let Some(key) = (0..KEYS).find(left) else {
                    writer.stage = Stage::Fill(Fill::Commit);
                    return out.push((step(w, "backfill: COMMIT is sent to the mirror"), next));
                };
                if state.mirror.is_under_way(me, key) && writer.images.begun {
                    writer.end_fill();
                    return out.push((step(w, "backfill waits too long for a row: leaves the chunk to repair"), next));
                }
                writer.images.begun = true;
                if !state.mirror.is_under_way(me, key) {
                    writer.images.done |= 1 << key;
                    if state.mirror.sees(me, key) == 0 {
                        next.mirror.write(me, key, writer.copied[key]);
                    } else {
                        writer.images.short |= 1 << key;
                    }
                }
                "backfill inserts a row where it is missing"
            }
            Fill::Commit => {
                writer.stage = Stage::Fill(Fill::Look);
                next.end_on_mirror(me, true);
                next.log.flush();
                "backfill: the mirror commits, with a flush"
            }
            Fill::Look => {
                let suspects = self.suspects(state, w);
                *writer = Writer { script: writer.script, did: suspects, ..Writer::default() };
                writer.debt = if suspects == 0 { Debt::Cleared } else { Debt::Owed };
                next.authority_flushes();
                "backfill reads its chunk again: suspects are owed, the chunk is done"
            }
        };
        out.push((step(w, what), next));
    }

    fn suspects(&self, state: &State, w: usize) -> u8 {
        if self.lacks(Break::NoSecondReading) {
            return 0;
        }
        let writer = &state.writers[w];
        let copied = (0..KEYS).filter(|&key| writer.copied[key] != 0).fold(0, |keys, key| keys | 1 << key);
        let held = members(copied).filter(|&key| state.authority.0[key].owner != 0);
        let held = if self.lacks(Break::XmaxUnread) { 0 } else { held.fold(0, |keys, key| keys | 1 << key) };
        let there = if self.lacks(Break::ConflictTrusted) { 0 } else { writer.images.short };
        copied & (writer.touched | held | there)
    }
}

fn step(w: usize, what: &'static str) -> Action {
    Action { who: ('T', w), what, fault: false }
}
