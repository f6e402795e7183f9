//! Rules that can be left out, one at a time: the checker must then find what goes wrong. A rule whose absence it does not notice is either
//! not needed, or not in the model.

/// A rule that is left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Break {
    /// W7: a delete that found too few rows is not done again.
    DeleteOnce,
    /// C1: images are executed on the mirror after the authority has committed.
    ImagesAfterCommit,
    /// C2: the debts are entered behind COMMIT, in a transaction of their own.
    DebtsAfterCommit,
    /// C3: the flush comes before the answer to the mirror's COMMIT.
    FlushBeforeAnswer,
    /// C3: what was answered in one incarnation is cleared by a flush in another.
    AnyIncarnation,
    /// C3: the flushing transaction writes nothing.
    FlushOfNothing,
    /// C3: all ledger rows up to the highest that was paid are cleared.
    ClearByRange,
    /// C3: all ledger rows that name only keys which were paid are cleared.
    ClearByKey,
    /// C4: the end of the mirror's transaction is sent together with its images.
    CommitWithImages,
    /// C6: an unknown outcome is taken for a commit.
    UnknownIsCommitted,
    /// C8: an answer to COMMIT is taken for a commit whatever its tag.
    TagUnread,
    /// C7: a carrier of another incarnation is asked for by a number that was given out again.
    AskAcrossIncarnations,
    /// C7: the authority's COMMIT is not durable when it is answered.
    CommitNotDurable,
    /// D1: debts in flight are paid, too.
    PayInFlight,
    /// D1: a key that could not be locked is not tried again.
    SkippedIsPaid,
    /// D1: a row that appears in the later snapshot is written without its lock.
    WriteUnlocked,
    /// D1: the mirror's rows are compared without a lock.
    CompareUnlocked,
    /// D1: no round trip shows that the authority's row locks still stand.
    NoRoundTrip,
    /// D1: the mirror's COMMIT is sent together with the statements before it.
    CommitPipelined,
    /// D2: a delete that found nothing is not done again.
    NoSecondTry,
    /// D2: it is done again without waiting for those who write the table.
    NoWait,
    /// D2: the authority is not looked at behind the delete.
    NoSecondLook,
    /// D2: of several keys that go together, one whose row somebody else has is taken for one that is not there.
    LockedIsGone,
    /// D2: what the first of several keys wants is done for all of them.
    OneForMany,
    /// Whole tables: the walk over the mirror does not wait for those who write it.
    WalkAtOnce,
    /// D4: repair does not hold the table's lock on the mirror.
    NoJobsLock,
    /// D5: a backfill does not read its chunk a second time.
    NoSecondReading,
    /// D5: in its second reading a backfill does not look at `xmax`.
    XmaxUnread,
    /// D5: a row that a backfill could not insert, since one was there, is taken for equal.
    ConflictTrusted,
    /// D6: a chunk in work is reconciled while the backend that copied it may still commit.
    ChunkNotAwaited,
    /// D6: a chunk in work is reconciled over the authority's keys only.
    NoUnion,
}

impl Break {
    /// All of them.
    pub const ALL: [Break; 31] = [
        Break::DeleteOnce,
        Break::ImagesAfterCommit,
        Break::DebtsAfterCommit,
        Break::FlushBeforeAnswer,
        Break::AnyIncarnation,
        Break::FlushOfNothing,
        Break::ClearByRange,
        Break::ClearByKey,
        Break::CommitWithImages,
        Break::UnknownIsCommitted,
        Break::TagUnread,
        Break::AskAcrossIncarnations,
        Break::CommitNotDurable,
        Break::PayInFlight,
        Break::SkippedIsPaid,
        Break::WriteUnlocked,
        Break::CompareUnlocked,
        Break::NoRoundTrip,
        Break::CommitPipelined,
        Break::NoSecondTry,
        Break::NoWait,
        Break::NoSecondLook,
        Break::LockedIsGone,
        Break::OneForMany,
        Break::WalkAtOnce,
        Break::NoJobsLock,
        Break::NoSecondReading,
        Break::XmaxUnread,
        Break::ConflictTrusted,
        Break::ChunkNotAwaited,
        Break::NoUnion,
    ];
}
