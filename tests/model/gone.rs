//! Keys that the authority lacks (`migrate::gone`): several in one transaction of the mirror, which waits for no row; those on whose rows others have a hand,
//! one by one.

use crossfade::migrate::rules::{Place, Removal, place, removal, removals};

use crate::breaks::Break;
use crate::repair::Step;
use crate::rows::{Set, members};
use crate::state::{Action, Out, State, World, of_repair};

impl World {
    /// Lock what can be had at once, delete that, look again at the authority: for all of these keys.
    pub fn remove_many(&self, state: &State, r: usize, out: &mut Out) {
        let me = of_repair(r);
        let mut next = state.clone();
        let mut repair = state.repairs[r];
        let mut push = |what, next| out.push((Action { who: ('R', r), what, fault: false }, next));
        match repair.step {
            Step::Seize => {
                for key in members(repair.together()) {
                    repair.seized |= u8::from(next.mirror.lock(me, key)) << key;
                }
                repair.step = Step::DeleteMany;
                next.repairs[r] = repair;
                push("locks, of several keys that the authority lacks, the mirror's rows that nobody else has", next);
            }
            Step::DeleteMany => {
                for key in members(repair.together()) {
                    match place(repair.seized & (1 << key) != 0, state.mirror.sees(me, key) != 0) {
                        Place::Held => next.mirror.write(me, key, 0),
                        Place::Absent => {}
                        Place::Again if self.lacks(Break::LockedIsGone) => repair.absent &= !(1 << key),
                        Place::Again => repair.alone |= 1 << key,
                    }
                }
                repair.step = Step::LookAgainAtMany;
                next.repairs[r] = repair;
                push("deletes those", next);
            }
            Step::LookAgainAtMany => {
                let what = self.look_again_at_many(&mut next, r);
                push(what, next);
            }
            _ => {
                next.repairs[r].absent &= !repair.seized;
                self.after_many(&mut next, r, true);
                push("has committed these deletes on the mirror", next);
            }
        }
    }

    fn look_again_at_many(&self, next: &mut State, r: usize) -> &'static str {
        let mut repair = next.repairs[r];
        let judged = |key: usize| {
            let appeared = next.authority.sees(of_repair(r), key) != 0 && !self.lacks(Break::NoSecondLook);
            removal(u64::from(repair.seized & (1 << key) != 0), appeared)
        };
        let each: Vec<(usize, Removal)> = members(repair.together()).map(|key| (key, judged(key))).collect();
        let of = |wanted| each.iter().filter(|(_, one)| *one == wanted).fold(0, |keys: Set, (key, _)| keys | 1 << key);
        let end = match self.lacks(Break::OneForMany) {
            true => each.first().map_or(Removal::Nothing, |(_, first)| *first),
            false => removals(each.iter().map(|(_, one)| *one)),
        };
        match end {
            Removal::Again => {
                (repair.busy, repair.absent) = (repair.busy | of(Removal::Again), repair.absent & !of(Removal::Again));
            }
            Removal::Commit | Removal::Nothing => {
                (repair.unseen, repair.absent) =
                    (repair.unseen | of(Removal::Nothing), repair.absent & !of(Removal::Nothing));
            }
        }
        if end == Removal::Commit {
            repair.step = Step::DeleteManyCommit;
            next.repairs[r] = repair;
            return "sees that they are absent still; COMMIT is sent to the mirror";
        }
        next.repairs[r] = repair;
        self.after_many(next, r, false);
        "looks again at the authority for all of them, and rolls back on the mirror"
    }

    fn after_many(&self, next: &mut State, r: usize, commit: bool) {
        next.end_on_mirror(of_repair(r), commit);
        let writing = next.writing_on_mirror();
        next.repairs[r].seized = 0;
        next.repairs[r].proceed(self.broken, writing);
    }

    /// Delete on the mirror, then look again at the authority.
    pub fn remove(&self, state: &State, r: usize, out: &mut Out) {
        let me = of_repair(r);
        let mut next = state.clone();
        let mut repair = state.repairs[r];
        let mut push = |what, next| out.push((Action { who: ('R', r), what, fault: false }, next));
        let (Step::Delete(at) | Step::LookAgain(at) | Step::DeleteCommit(at)) = repair.step else { return };
        let key = usize::from(at);
        match repair.step {
            Step::Delete(_) => {
                if !repair.begun {
                    (repair.begun, repair.saw) = (true, state.mirror.sees(me, key) != 0);
                    if repair.saw && !state.mirror.is_free(me, key) {
                        next.repairs[r] = repair;
                        return push("DELETE of a key that the authority lacks: it waits", next);
                    }
                } else if repair.saw && !state.mirror.is_free(me, key) {
                    next.repairs[r].busy |= 1 << key;
                    self.after_delete(&mut next, r, key, false);
                    return push("waits too long for a row on the mirror: tries again later", next);
                }
                repair.found = repair.saw && state.mirror.sees(me, key) != 0;
                if repair.found {
                    next.mirror.write(me, key, 0);
                }
                repair.step = Step::LookAgain(at);
                next.repairs[r] = repair;
                push("DELETE of a key that the authority lacks", next);
            }
            Step::LookAgain(_) => {
                let appeared = state.authority.sees(me, key) != 0 && !self.lacks(Break::NoSecondLook);
                match removal(u64::from(repair.found), appeared) {
                    Removal::Commit => {
                        next.repairs[r].step = Step::DeleteCommit(at);
                        return push("sees that it is absent still; COMMIT is sent to the mirror", next);
                    }
                    Removal::Nothing => next.repairs[r].unseen |= 1 << key,
                    Removal::Again => next.repairs[r].busy |= 1 << key,
                }
                self.after_delete(&mut next, r, key, false);
                push("looks again at the authority, and rolls back on the mirror", next);
            }
            _ => {
                self.after_delete(&mut next, r, key, true);
                push("has committed the delete on the mirror", next);
            }
        }
    }

    fn after_delete(&self, next: &mut State, r: usize, key: usize, commit: bool) {
        next.end_on_mirror(of_repair(r), commit);
        let writing = next.writing_on_mirror();
        next.repairs[r].absent &= !(1 << key);
        next.repairs[r].proceed(self.broken, writing);
    }
}
