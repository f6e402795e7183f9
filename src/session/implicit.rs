//! What PostgreSQL says in an implicit transaction (a pipeline, a Query of several statements), which for the server is a block of ours. Pure.

use bytes::{BufMut, BytesMut};

use crate::sql::facts::Verb;
use crate::wire::frame::{self, Report};

/// The refusal of what needs a block of the client.
pub(super) fn refusal(verb: &Verb) -> Option<Report> {
    let statement = match verb {
        Verb::Savepoint(_) => "SAVEPOINT",
        Verb::Release(_) => "RELEASE SAVEPOINT",
        Verb::RollbackTo(_) => "ROLLBACK TO SAVEPOINT",
        Verb::Commit { chain: true } => "COMMIT AND CHAIN",
        Verb::Rollback { chain: true } => "ROLLBACK AND CHAIN",
        _ => return None,
    };
    let message = format!("{statement} can only be used in transaction blocks");
    Some(Report { severity: "ERROR", code: "25P01", message, hint: None })
}

/// The statement ends the transaction, and with a warning.
pub(super) fn ends(verb: &Verb) -> bool {
    matches!(verb, Verb::Commit { chain: false } | Verb::Rollback { chain: false })
}

/// PostgreSQL's warning at a COMMIT or ROLLBACK without BEGIN.
pub(super) fn no_transaction(out: &mut BytesMut) {
    frame::put(out, b'N', |out| {
        out.put_slice(b"SWARNING\0VWARNING\0C25P01\0Mthere is no transaction in progress\0\0");
    });
}
