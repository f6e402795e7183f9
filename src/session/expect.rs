//! The queue of replies that a server owes us: each is matched with what was asked, so that no reply goes to the wrong place. Pure.

use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;

use super::books::{Portal, Prepared};
use crate::plan::Capture;
use crate::plan::weave::Positions;
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
    /// CopyDone or CopyFail: nothing is owed for it; it marks how far a COPY's data may reach.
    CopyEnd,
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
    /// The client's, to a Parse or Query of an edited text: a position in an error is made one in the client's.
    Woven(Rc<Positions>),
    /// Ours, around a COPY: rows are images of those that it has added, or without a cut are kept. An error is kept and not the client's.
    Around(Option<Rc<Cut>>),
    /// Ours: a look of the audit.
    Audit(Look),
    /// The lock of the epoch: ours, but for an error that does not say that the epoch is over.
    Enter(Entered),
    /// What will be sent again, in another epoch: dropped, with its errors.
    Nowhere,
    /// It can only fail; the client is told this instead of the server's error.
    Refused(Rc<Report>),
}

/// What the lock of the epoch goes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// A BEGIN of ours, or a block that is open already.
    Ours,
    /// The client's BEGIN in front of it, whose answer was held back: it comes with the lock's.
    Begin,
    /// The client's BEGIN, in the same Query.
    Together,
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
    /// Images of what the WITH clause writes, by the numbers that notices give them.
    pub shown: Vec<Rc<Cut>>,
    /// Where characters of what was sent stand in the client's text, of a Query.
    pub positions: Option<Rc<Positions>>,
}

/// What a statement changes in our own books once the server says that it is complete.
#[derive(Clone, Debug)]
pub enum Done {
    /// Nothing.
    Nothing,
    /// A block was opened.
    Begin,
    /// A BEGIN with modes, or START TRANSACTION, behind a write in one implicit transaction: the block that we opened has them from now on, and is the client's.
    TakeOver,
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
    /// PREPARE of SQL: the name, and its text where it was seen.
    Prepare(String, Option<Bytes>),
    /// DEALLOCATE of one, or of all (DISCARD ALL too).
    Deallocate(Option<Vec<u8>>),
    /// Rows of a captured write's portal, by its number, that may be limited.
    Fetched(u64),
    /// Parse of a client's statement: what our books hold if it fails or is passed over.
    Parse(Bytes, Option<Box<Prepared>>),
    /// Close of a client's statement: what our books hold if it is passed over.
    Close(Bytes, Option<Box<Prepared>>),
    /// Bind or Close of a client's portal: what our books hold if it fails or is passed over.
    Portal(Bytes, Option<Box<Portal>>),
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
    /// The server reads COPY data, and CopyDone was not sent yet.
    copying: bool,
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

    /// A message was sent. Gives it back where the server passes over it.
    pub fn push(&mut self, expected: Expected) -> Option<Expected> {
        if self.copying && expected.kind == Kind::Sync {
            return Some(expected);
        }
        if self.skipping {
            if expected.kind != Kind::Sync {
                return Some(expected);
            }
            self.skipping = false;
        }
        self.owed.push_back(expected);
        None
    }

    /// Whose reply comes next.
    pub fn front(&self) -> Option<&Expected> {
        self.owed.front()
    }

    /// The first reply has come whole.
    pub fn pop(&mut self) -> Option<Expected> {
        let first = self.owed.pop_front();
        self.trim();
        first
    }

    fn trim(&mut self) {
        while self.owed.front().is_some_and(|owed| owed.kind == Kind::CopyEnd) {
            self.owed.pop_front();
        }
    }

    /// Nothing that is owed executes anything.
    pub fn quiet(&self) -> bool {
        !self.skipping
            && !self.copying
            && self.owed.iter().all(|owed| matches!(owed.kind, Kind::Parse | Kind::Bind | Kind::Describe | Kind::Close))
    }

    /// All that is owed answers what will be sent again.
    pub fn silence(&mut self) {
        for owed in &mut self.owed {
            (owed.to, owed.hold) = (To::Nowhere, false);
        }
    }

    /// Nothing that is owed ends a transaction or says that none is open.
    pub fn is_within(&self) -> bool {
        self.owed.iter().all(|owed| {
            !matches!(owed.kind, Kind::Sync | Kind::Query | Kind::Call) && !matches!(owed.done, Done::End { .. })
        })
    }

    /// The end of a transaction, or of prepared statements, is under way: what holds behind it is known only when it was answered.
    pub fn ends(&self) -> bool {
        self.owed.iter().any(|owed| matches!(owed.done, Done::End { .. } | Done::Deallocate(_)))
    }

    /// A Bind of this portal is under way: behind what the server answers now.
    pub fn binds(&self, name: &[u8]) -> bool {
        self.owed.iter().any(|owed| matches!(&owed.done, Done::Portal(bound, _) if &bound[..] == name))
    }

    /// A Parse of this name is under way: behind what the server answers now.
    pub fn parses(&self, name: &[u8]) -> bool {
        self.owed.iter().any(|owed| match &owed.done {
            Done::Parse(parsed, _) => &parsed[..] == name,
            Done::Ours(ours) => *ours == name,
            _ => false,
        })
    }

    /// An error came. In the extended protocol nothing more is owed up to the next Sync. Gives what failed, and behind it what is passed over.
    pub fn fail(&mut self) -> Vec<Expected> {
        self.copying = false;
        let Some(failed) = self.owed.front() else { return Vec::new() };
        if matches!(failed.kind, Kind::Query | Kind::Call | Kind::Sync) {
            return vec![failed.clone()];
        }
        let upto = self.owed.iter().position(|e| e.kind == Kind::Sync).unwrap_or(self.owed.len());
        let failed = self.owed.drain(..upto).collect();
        self.skipping = self.owed.is_empty();
        failed
    }

    /// The server has begun to read COPY data for the first message: it passes over Sync (and Flush) up to CopyDone or CopyFail.
    pub fn copy_in(&mut self) {
        let mut at = 1;
        loop {
            match self.owed.get(at).map(|owed| owed.kind) {
                Some(Kind::Sync) => drop(self.owed.remove(at)),
                Some(Kind::CopyEnd) => {
                    self.owed.remove(at);
                    return;
                }
                Some(_) => at += 1,
                None => break,
            }
        }
        self.copying = true;
    }

    /// The server reads COPY data, and the client has not ended it.
    pub fn copying(&self) -> bool {
        self.copying
    }

    /// CopyDone or CopyFail was sent.
    pub fn copy_end(&mut self) {
        if self.copying {
            self.copying = false;
        } else if !self.owed.is_empty() {
            self.owed.push_back(Expected::client(Kind::CopyEnd));
        }
    }

    /// A ReadyForQuery will come, whatever the client does: the server reads no COPY data, and has been asked for one.
    pub fn gets_ready(&self) -> bool {
        !self.copying && self.owed.iter().any(|owed| matches!(owed.kind, Kind::Sync | Kind::Query | Kind::Call))
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
        assert_eq!(q.fail().iter().map(|e| e.kind).collect::<Vec<_>>(), [Bind, Execute]);
        assert_eq!(q.len(), 4);
        assert_eq!(q.pop().map(|e| e.kind), Some(Sync));
        assert_eq!(q.fail().len(), 2);
        assert!(!q.skipping());
    }

    #[test]
    fn behind_an_error_without_sync_nothing_is_owed_until_one_is_sent() {
        use Kind::*;
        let mut q = queue(&[Parse, Bind]);
        q.fail();
        assert!(q.skipping() && q.is_empty());
        assert!(q.push(Expected::client(Execute)).is_some());
        assert!(q.is_empty());
        q.push(Expected::client(Sync));
        assert_eq!((q.len(), q.skipping()), (1, false));
    }

    #[test]
    fn a_sync_before_copy_done_is_not_answered() {
        use Kind::*;
        for kind in [Execute, Query] {
            let mut q = queue(&[kind, Sync]);
            q.copy_in();
            q.push(Expected::client(Sync));
            assert_eq!(q.len(), 1);
            q.copy_end();
            q.push(Expected::client(Sync));
            assert_eq!(q.len(), 2);
        }
        // All sent before the server said that it reads.
        let mut q = queue(&[Execute, Sync]);
        q.copy_end();
        q.push(Expected::client(Sync));
        q.copy_in();
        assert_eq!(q.len(), 2);
        // No COPY at all: stray messages.
        let mut q = queue(&[Query]);
        q.copy_end();
        q.pop();
        assert!(q.is_empty());
    }
}
