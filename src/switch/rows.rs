//! The row that says what holds: `crossfade.migration`, on both sides. It is believed only on the side that it names as authority; a row that
//! names the other side is a pointer; the higher epoch wins. A move writes the pointer first, then the claim.

use tokio_postgres::Client;

use crate::phase::{Phase, Side};

/// What holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holds {
    /// Number of the move.
    pub epoch: u64,
    /// The phase.
    pub phase: Phase,
}

/// Why the rows could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// The database said no, or is gone.
    #[error("the phase row of the {side} database: {}", said(.error))]
    Database {
        /// Which side.
        side: Side,
        /// What it said.
        error: tokio_postgres::Error,
    },
    /// Another move was later.
    #[error(
        "the phase row of the {side} database has passed epoch {epoch}: does another proxy move the same migration?"
    )]
    Passed {
        /// Which side.
        side: Side,
        /// The epoch that was to be written.
        epoch: u64,
    },
    /// A row that this version does not understand.
    #[error(
        "the phase row of the {side} database names phase {phase:?}, which this version does not know; run the version that wrote it"
    )]
    Unknown {
        /// Which side.
        side: Side,
        /// What stands there.
        phase: String,
    },
}

/// The server's own words, where it has said something.
pub(super) fn said(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string)
}

impl RowError {
    /// The server has said no: the row is as it was. Not so where the connection broke, or was ended from outside, which also happens to one whose
    /// commit waits for a standby.
    pub fn wrote_nothing(&self) -> bool {
        match self {
            RowError::Database { error, .. } => error.code().is_some_and(|code| !code.code().starts_with("57P")),
            RowError::Unknown { .. } | RowError::Passed { .. } => true,
        }
    }
}

/// The row of one side; None: nothing was installed there, or nothing was ever moved.
pub async fn read(client: &Client, side: Side) -> Result<Option<Holds>, RowError> {
    let database = |error| RowError::Database { side, error };
    let there = client
        .query_typed_one("SELECT pg_catalog.to_regclass('crossfade.migration') IS NOT NULL", &[])
        .await
        .map_err(database)?;
    if !there.get::<_, bool>(0) {
        return Ok(None);
    }
    let row = client.query_typed_opt("SELECT epoch, phase FROM crossfade.migration", &[]).await.map_err(database)?;
    let Some(row) = row else {
        return Ok(None);
    };
    let phase: String = row.get(1);
    let phase = phase.parse().map_err(|_| RowError::Unknown { side, phase })?;
    Ok(Some(Holds { epoch: row.get::<_, i64>(0) as u64, phase }))
}

/// What migrates, as the row of that side says; None: it does not say. The schema is installed there.
pub async fn definition(client: &Client, side: Side) -> Result<Option<String>, RowError> {
    let row = client.query_typed_opt("SELECT definition FROM crossfade.migration", &[]).await;
    Ok(row.map_err(|error| RowError::Database { side, error })?.and_then(|row| row.get(0)))
}

/// What the two rows say together. `None` in `rows` stands for a side that has no row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was ever moved.
    Fresh,
    /// This holds.
    Holds(Holds),
    /// A move was cut short after its pointer: it is finished by writing this claim on its authority.
    Unclaimed(Holds),
}

/// Decides which row is believed.
pub fn judge(old: Option<Holds>, new: Option<Holds>) -> Verdict {
    let rows = [(Side::Old, old), (Side::New, new)];
    let claims = rows.iter().filter_map(|(side, row)| row.filter(|row| row.phase.authority() == *side));
    let pointers = rows.iter().filter_map(|(side, row)| row.filter(|row| row.phase.authority() != *side));
    let claim = claims.max_by_key(|row| row.epoch);
    let pointer = pointers.max_by_key(|row| row.epoch);
    match (claim, pointer) {
        (None, None) => Verdict::Fresh,
        // A side that points away from itself has given its authority up: what it points to is finished, never undone.
        (Some(claim), Some(pointer)) if pointer.epoch > claim.epoch => Verdict::Unclaimed(pointer),
        (None, Some(pointer)) => Verdict::Unclaimed(pointer),
        (Some(claim), _) => Verdict::Holds(claim),
    }
}

/// Before the claim of a move that another process has cut short: from now on nobody withdraws it. The pointer stands on `side`. False: it does not any more.
pub async fn take(client: &Client, side: Side, pointer: Holds) -> Result<bool, RowError> {
    let epoch = pointer.epoch as i64;
    let sql = "UPDATE crossfade.migration SET taken = true WHERE epoch = $1 AND authority = $2";
    let taken = async {
        client.batch_execute("SET synchronous_commit = on").await?;
        client.execute(sql, &[&epoch, &pointer.phase.authority().name()]).await
    };
    Ok(taken.await.map_err(|error| RowError::Database { side, error })? == 1)
}

/// Writes the row of one side, with an entry in its history (an event, and what else is known of it: an object), in the open transaction. A row of a higher epoch stays: what comes late (a statement
/// that was given up, another proxy) never takes a phase back. No `definition`: the one that stands there stays.
pub async fn write(
    client: &Client,
    side: Side,
    (name, definition): (&str, Option<&str>),
    holds: Holds,
    (event, detail): (&str, &serde_json::Value),
) -> Result<(), RowError> {
    let epoch = holds.epoch as i64;
    let sql = "WITH row AS ( \
            INSERT INTO crossfade.migration AS m (one, name, epoch, phase, authority, definition) VALUES (true, $1, $2, $3, $4, $6) \
            ON CONFLICT (one) DO UPDATE SET name = $1, epoch = $2, phase = $3, authority = $4, definition = coalesce($6, m.definition), changed = clock_timestamp(), \
            taken = m.taken AND m.epoch = $2 \
            WHERE m.epoch <= $2 AND NOT (m.taken AND $5 = 'withdrawn') RETURNING epoch) \
        INSERT INTO crossfade.history (epoch, event, detail) SELECT $2, $5, $7::jsonb || jsonb_build_object('phase', $3::text, 'authority', $4::text) FROM row";
    let phase = holds.phase;
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
        [&name, &epoch, &phase.name(), &phase.authority().name(), &event, &definition, detail];
    match client.execute(sql, &parameters).await {
        Ok(0) => Err(RowError::Passed { side, epoch: holds.epoch }),
        Ok(_) => Ok(()),
        Err(error) => Err(RowError::Database { side, error }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(epoch: u64, phase: Phase) -> Option<Holds> {
        Some(Holds { epoch, phase })
    }

    #[test]
    fn a_row_is_believed_only_where_it_names_itself() {
        use Phase::*;
        assert_eq!(judge(None, None), Verdict::Fresh);
        assert_eq!(judge(row(1, DualWrite), None), Verdict::Holds(Holds { epoch: 1, phase: DualWrite }));
        assert_eq!(judge(row(1, DualWrite), row(1, DualWrite)), Verdict::Holds(Holds { epoch: 1, phase: DualWrite }));
        assert_eq!(
            judge(row(2, NewPrimary), row(2, NewPrimary)),
            Verdict::Holds(Holds { epoch: 2, phase: NewPrimary })
        );
        // The mover died between pointer and claim: always forward.
        assert_eq!(
            judge(row(2, NewPrimary), row(1, DualWrite)),
            Verdict::Unclaimed(Holds { epoch: 2, phase: NewPrimary })
        );
        // A restored backup of old claims what new has long passed.
        assert_eq!(judge(row(1, DualWrite), row(4, New)), Verdict::Holds(Holds { epoch: 4, phase: New }));
    }
}
