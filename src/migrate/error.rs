//! What can stop a job, in words for people; never with a value of a row.

use std::time::Duration;

use tokio_postgres::error::SqlState;

use crate::ledger::debts::Malformed;
use crate::phase::Side;

/// Why a job ended without doing all that it was asked to. What it did not do is still in the ledger.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A server answered with an error.
    #[error("{side}, while {doing}: {message} (SQLSTATE {})", .code.code())]
    Server {
        /// Which side.
        side: Side,
        /// What was being done.
        doing: &'static str,
        /// SQLSTATE.
        code: SqlState,
        /// The server's message, without DETAIL, which may hold values.
        message: String,
        /// The constraint that was violated, if the server named one.
        constraint: Option<String>,
    },
    /// The connection broke.
    #[error("{side}, while {doing}: the connection broke ({message}); what was under way is still owed")]
    Broken {
        /// Which side.
        side: Side,
        /// What was being done.
        doing: &'static str,
        /// What the driver says.
        message: String,
    },
    /// No answer in time.
    #[error(
        "{side}, while {doing}: no answer for {after:?}; the connection was given up, what was under way is still owed"
    )]
    Stalled {
        /// Which side.
        side: Side,
        /// What was being done.
        doing: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The side has crashed, or another server answers for it: what it had promised may be lost, so nothing was cleared.
    #[error(
        "{side} has restarted after a crash, or another server answers for it: nothing was cleared, run the repair again"
    )]
    Reincarnated {
        /// Which side.
        side: Side,
    },
    /// A ledger row that cannot be read.
    #[error("ledger row {id}: {source}")]
    Ledger {
        /// Its id.
        id: i64,
        /// Where it is malformed.
        source: Malformed,
    },
    /// The deadline passed.
    #[error("{0}")]
    Deadline(String),
    /// Something that the job cannot work with; the text says what to do.
    #[error("{0}")]
    Unfit(String),
}

impl Error {
    /// From the driver's error.
    pub fn from_driver(side: Side, doing: &'static str, error: &tokio_postgres::Error) -> Error {
        match error.as_db_error() {
            Some(told) => Error::Server {
                side,
                doing,
                code: told.code().clone(),
                message: told.message().to_owned(),
                constraint: told.constraint().map(str::to_owned),
            },
            None => Error::Broken { side, doing, message: error.to_string() },
        }
    }

    /// The mirror has taken fewer rows than it was sent, and has said nothing of the others.
    pub(crate) fn short(side: Side, doing: &'static str, (taken, sent): (u64, u64)) -> Result<(), Error> {
        if taken == sent {
            return Ok(());
        }
        Err(Error::Server {
            side,
            doing,
            code: tokio_postgres::error::SqlState::TRIGGERED_ACTION_EXCEPTION,
            message: format!(
                "it took {taken} of {sent} rows and left out the others without an error: a trigger there is enabled ALWAYS or for replicas; `crossfade check` names it, and the SQL that mends it"
            ),
            constraint: None,
        })
    }

    /// A server's word about what one table holds (a broken index, a value that its type does not take): others may be better off. Not so where the
    /// connection is gone, or the server goes away.
    pub(crate) fn is_about_a_table(&self) -> bool {
        let Error::Server { code, .. } = self else { return false };
        !matches!(&code.code()[..2], "08" | "25" | "28" | "57")
    }

    /// What the error means for the rows that were under way.
    pub(crate) fn meaning(&self) -> Meaning {
        let Error::Server { code, message, .. } = self else { return Meaning::Fatal };
        match code.code() {
            // lock_timeout, statement_timeout, deadlock, serialization; and a transaction that one of them has ended unheard (`Link::commit`)
            "55P03" | "57014" | "40P01" | "40001" | "25P02" => Meaning::Busy,
            // "cached plan must not change result type": the plans are made anew.
            "0A000" if message.contains("cached plan") => Meaning::Busy,
            "23505" | "23P01" => Meaning::Conflict,
            other => match &other[..2] {
                // The server goes away, is out of resources, or broken: not about these rows.
                "08" | "25" | "28" | "53" | "57" | "58" | "XX" | "F0" => Meaning::Fatal,
                "42" => Meaning::Definition,
                _ => Meaning::Refused,
            },
        }
    }
}

/// What an error means for the rows that were under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Someone else's lock stood in the way: try again later, with fewer rows.
    Busy,
    /// Another row holds a unique value.
    Conflict,
    /// The server does not take these rows.
    Refused,
    /// The table is not as it was thought to be, or may not be used: no row of it can be written.
    Definition,
    /// Not about these rows: the job ends.
    Fatal,
}
