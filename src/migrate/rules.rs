//! What repair decides from what it has seen. Pure: the jobs beside run these functions, and so does the model in tests/model, which goes
//! through what others may do between two looks.

/// What the mirror says of the transaction that carries a debt's images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It is at work.
    InProgress,
    /// It has committed.
    Committed,
    /// It has aborted.
    Aborted,
    /// Nothing: the debt names no transaction, or one of another incarnation (which must not be asked for: its number may have been
    /// given out again), or one that is too old to ask for.
    Nothing,
}

/// What may be done about a ledger row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its carrier has committed in this incarnation: it is cleared after a flush.
    Carried,
    /// Its carrier, or a backend that may still add to it, is at work.
    InFlight,
    /// Owed: anyone may pay it.
    Payable,
}

/// What may be done about a ledger row whose carrier is so. `alive`: the carrier's backend is still there. `whole`: among its debts are whole tables.
pub fn state(told: Told, alive: bool, whole: bool) -> State {
    match told {
        Told::InProgress => State::InFlight,
        // A carrier brings rows. What it did not bring is not paid by its commit.
        Told::Committed if whole => State::Payable,
        Told::Committed => State::Carried,
        Told::Aborted => State::Payable,
        // Given up, too old to ask, or of another incarnation: nothing of it can come any more once its backend is gone.
        Told::Nothing if alive => State::InFlight,
        Told::Nothing => State::Payable,
    }
}

/// What is done about a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Its row is locked: the mirror's is made equal.
    Held,
    /// The authority lacks it: deleted on the mirror, by a protocol of its own.
    Absent,
    /// Tried again later.
    Again,
}

/// What is done about a key of which a row could be locked on the authority (`ours`), and was found there by a later snapshot (`there`).
pub fn place(ours: bool, there: bool) -> Place {
    match (ours, there) {
        (true, true) => Place::Held,
        (false, false) => Place::Absent,
        // It is there, and not ours: someone has it locked, or it has just appeared.
        (false, true) | (true, false) => Place::Again,
    }
}

/// What is done with the open transaction on the mirror that has deleted a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Commit: the row was there and is gone.
    Commit,
    /// Roll back; there was none, and the authority has none. What is not committed yet may still bring one.
    Nothing,
    /// Roll back, and try again: the authority has the row after all.
    Again,
}

/// What follows a DELETE on the mirror that found so many rows, and a look at the authority after it.
pub fn removal(found: u64, appeared: bool) -> Removal {
    match (found, appeared) {
        (_, true) => Removal::Again,
        (0, false) => Removal::Nothing,
        (_, false) => Removal::Commit,
    }
}

/// What is done with the open transaction on the mirror that has deleted several keys, of which each alone would want this. One that has appeared undoes
/// all of them.
pub fn removals(each: impl IntoIterator<Item = Removal>) -> Removal {
    each.into_iter().fold(Removal::Nothing, |all, one| match (all, one) {
        (Removal::Again, _) | (_, Removal::Again) => Removal::Again,
        (Removal::Commit, _) | (_, Removal::Commit) => Removal::Commit,
        (Removal::Nothing, Removal::Nothing) => Removal::Nothing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_carrier_did_not_bring_is_not_paid_by_its_commit() {
        assert_eq!(state(Told::Committed, true, false), State::Carried);
        assert_eq!(state(Told::Committed, true, true), State::Payable);
        assert_eq!(state(Told::InProgress, true, true), State::InFlight);
        assert_eq!(state(Told::Aborted, true, false), State::Payable);
        assert_eq!(state(Told::Nothing, true, false), State::InFlight);
        assert_eq!(state(Told::Nothing, false, false), State::Payable);
    }

    #[test]
    fn one_key_that_has_appeared_undoes_a_batch() {
        use Removal::{Again, Commit, Nothing};
        assert_eq!(removals([Commit, Nothing, Again, Commit]), Again);
        assert_eq!(removals([Nothing, Commit, Nothing]), Commit);
        assert_eq!(removals([Nothing, Nothing]), Nothing);
    }
}
