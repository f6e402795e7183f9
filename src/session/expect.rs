//! The queue of replies that a server owes us: each is matched with what was asked, so that no reply goes to the wrong place. Pure.

use std::collections::VecDeque;
use std::rc::Rc;

use crate::plan::Capture;
use crate::wire::frame::Report;

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Parse.
    Parse,
    /// Bind.
    Bind,
    /// Close.
    Close,
    /// Describe of a statement or portal.
    Describe,
    /// Execute.
    Execute,
    /// Sync.
    Sync,
    /// Query.
    Query,
    /// FunctionCall.
    Call,
}

/// Where the reply goes.
#[derive(Clone, Debug)]
pub enum To {
    /// To the client as it is.
    Client,
    /// Ours: dropped, unless it is an error: that one is the client's.
    Nobody,
    /// Ours: rows, tag and error are kept for the step that waits for them.
    Us,
    /// The client's, with the hidden column cut out.
    Cut(Rc<Cut>),
    /// Ours: images of rows that a COPY has sent.
    Images(Rc<Cut>),
    /// Ours: a look of the audit.
    Audit(Look),
    /// It can only fail; the client is told this instead of the server's error.
    Refused(Rc<Report>),
}

/// A look at the server's row counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// What was counted since the last look is not compared: it was rolled back.
    pub rebase: bool,
    /// Who is told of an error.
    pub told: Told,
}

/// Who is told of an error of a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The client: in its pipeline, where the server passes over what follows.
    Client,
    /// Nobody: in front of or behind a Query, which has an end of its own.
    Nobody,
    /// The step that waits: COMMIT.
    Us,
}

/// The kind of statement to which an image belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// INSERT, COPY.
    Insert,
    /// INSERT ... ON CONFLICT DO UPDATE.
    Upsert,
    /// UPDATE.
    Update,
    /// DELETE.
    Delete,
}

/// How hidden columns are cut out of a statement's replies.
#[derive(Clone, Debug)]
pub struct Cut {
    /// What was planned.
    pub capture: std::sync::Arc<Capture>,
    /// The hidden column comes in binary.
    pub binary: bool,
    /// The kind of statement.
    pub written: Written,
}

/// What a statement changes in our own books once the server says that it is complete.
#[derive(Clone, Debug, PartialEq)]
pub enum Done {
    /// Nothing.
    Nothing,
    /// A block was opened.
    Begin,
    /// The transaction is over.
    End {
        /// AND CHAIN: another one has begun.
        chain: bool,
    },
    /// SAVEPOINT.
    Savepoint(Vec<u8>),
    /// RELEASE.
    Release(Vec<u8>),
    /// ROLLBACK TO.
    RollbackTo(Vec<u8>),
    /// TRUNCATE of these tables.
    Truncate(std::sync::Arc<Vec<std::sync::Arc<crate::catalog::Table>>>),
    /// DEALLOCATE of one, or of all (DISCARD ALL too).
    Deallocate(Option<Vec<u8>>),
    /// A statement of ours is prepared, unless the server passes over it.
    Ours(&'static [u8]),
}

/// One reply that is owed.
#[derive(Clone, Debug)]
pub struct Expected {
    /// What was asked.
    pub kind: Kind,
    /// Where the reply goes.
    pub to: To,
    /// The end of it (CommandComplete and ReadyForQuery of a Query) is held back until the transaction's outcome is known.
    pub hold: bool,
    /// Our books.
    pub done: Done,
}

impl Expected {
    /// A reply that goes to the client as it is.
    pub fn client(kind: Kind) -> Expected {
        Expected { kind, to: To::Client, hold: false, done: Done::Nothing }
    }

    /// A reply to a message of ours.
    pub fn of(kind: Kind, to: To) -> Expected {
        Expected { kind, to, hold: false, done: Done::Nothing }
    }
}

/// The queue.
#[derive(Debug, Default)]
pub struct Queue {
    owed: VecDeque<Expected>,
    /// After an error in the extended protocol the server passes over everything up to the next Sync: nothing is owed for it.
    skipping: bool,
}

impl Queue {
    /// Nothing is owed.
    pub fn is_empty(&self) -> bool {
        self.owed.is_empty()
    }

    /// The server is passing over messages until a Sync.
    pub fn skipping(&self) -> bool {
        self.skipping
    }

    /// A message was sent.
    pub fn push(&mut self, expected: Expected) {
        if self.skipping {
            if expected.kind != Kind::Sync {
                return;
            }
            self.skipping = false;
        }
        self.owed.push_back(expected);
    }

    /// Whose reply comes next.
    pub fn front(&self) -> Option<&Expected> {
        self.owed.front()
    }

    /// The first reply has come whole.
    pub fn pop(&mut self) -> Option<Expected> {
        self.owed.pop_front()
    }

    /// An error came. In the extended protocol nothing more is owed up to the next Sync. Gives what failed, and what is passed over with it.
    pub fn fail(&mut self) -> Option<(Expected, Vec<Expected>)> {
        let failed = self.owed.front()?.clone();
        let mut passed = Vec::new();
        if !matches!(failed.kind, Kind::Query | Kind::Call | Kind::Sync) {
            while self.owed.front().is_some_and(|e| e.kind != Kind::Sync) {
                passed.extend(self.owed.pop_front());
            }
            self.skipping = self.owed.is_empty();
        }
        Some((failed, passed))
    }

    /// The end of a transaction is under way: what holds behind it is known only when it was answered.
    pub fn ends(&self) -> bool {
        self.owed.iter().any(|owed| matches!(owed.done, Done::End { .. }))
    }

    /// The server has begun to read COPY data for the first Execute: it passes over Sync (and Flush) that were sent before CopyDone.
    pub fn copy_in(&mut self) {
        if self.owed.front().is_some_and(|e| e.kind == Kind::Execute) {
            while self.owed.get(1).is_some_and(|e| e.kind == Kind::Sync) {
                self.owed.remove(1);
            }
        }
    }

    /// The server may keep the last replies in its buffer until it is sent Sync or Flush.
    pub fn needs_flush(&self) -> bool {
        self.owed.back().is_some_and(|owed| !matches!(owed.kind, Kind::Sync | Kind::Query | Kind::Call))
    }

    /// Number of replies owed.
    pub fn len(&self) -> usize {
        self.owed.len()
    }
}

/// Whether a reply's tag can answer what was asked, and whether it is the last part of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// More of this answer follows.
    Part,
    /// The answer is whole.
    Last,
    /// It answers something else: the session must end.
    Wrong,
}

/// Matches a reply's tag (not an error, notice, notification or ParameterStatus) with what was asked.
pub fn fit(kind: Kind, tag: u8) -> Fit {
    match (kind, tag) {
        (Kind::Parse, b'1') | (Kind::Bind, b'2') | (Kind::Close, b'3') | (Kind::Sync, b'Z') => Fit::Last,
        (Kind::Describe, b't') => Fit::Part,
        (Kind::Describe, b'T' | b'n') => Fit::Last,
        (Kind::Execute, b'D' | b'G' | b'H' | b'W' | b'd' | b'c') => Fit::Part,
        (Kind::Execute, b'C' | b'I' | b's') => Fit::Last,
        (Kind::Query, b'T' | b'D' | b'C' | b'I' | b'G' | b'H' | b'W' | b'd' | b'c') => Fit::Part,
        (Kind::Query, b'Z') => Fit::Last,
        (Kind::Call, b'V') => Fit::Part,
        (Kind::Call, b'Z') => Fit::Last,
        _ => Fit::Wrong,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(kinds: &[Kind]) -> Queue {
        let mut queue = Queue::default();
        for &kind in kinds {
            queue.push(Expected::client(kind));
        }
        queue
    }

    #[test]
    fn an_error_ends_what_is_owed_up_to_the_next_sync() {
        use Kind::*;
        let mut q = queue(&[Parse, Bind, Execute, Sync, Bind, Execute, Sync]);
        assert_eq!(q.pop().map(|e| e.kind), Some(Parse));
        assert_eq!(q.fail().map(|(e, passed)| (e.kind, passed.len())), Some((Bind, 2)));
        assert_eq!(q.len(), 4);
        assert_eq!(q.pop().map(|e| e.kind), Some(Sync));
        assert_eq!(q.fail().map(|(e, _)| e.kind), Some(Bind));
        assert!(!q.skipping());
    }

    #[test]
    fn behind_an_error_without_sync_nothing_is_owed_until_one_is_sent() {
        use Kind::*;
        let mut q = queue(&[Parse, Bind]);
        q.fail();
        assert!(q.skipping() && q.is_empty());
        q.push(Expected::client(Execute));
        assert!(q.is_empty());
        q.push(Expected::client(Sync));
        assert_eq!((q.len(), q.skipping()), (1, false));
    }

    #[test]
    fn a_sync_before_copy_done_is_not_answered() {
        use Kind::*;
        let mut q = queue(&[Execute, Sync]);
        q.copy_in();
        q.push(Expected::client(Sync));
        assert_eq!(q.len(), 2);
    }
}
