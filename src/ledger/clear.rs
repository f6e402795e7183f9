//! Clearing paid debts (C3): a flush on the mirror first, then exactly those rows of the ledger.

use tokio_postgres::{Client, SimpleQueryMessage};

/// Why nothing was cleared.
#[derive(Debug, thiserror::Error)]
pub enum ClearError {
    /// The mirror did not flush.
    #[error("the mirror could not flush: {0}")]
    Mirror(#[source] tokio_postgres::Error),
    /// The authority did not clear: the rows stay, and are paid again.
    #[error("the authority could not clear the ledger: {0}")]
    Authority(#[source] tokio_postgres::Error),
    /// The mirror has crashed since: what it answered may be lost, and the flush proves nothing.
    #[error("the mirror's incarnation is another one now")]
    Reincarnated,
    /// `crossfade.flush` holds no row: nothing was written, so nothing was flushed.
    #[error("crossfade.flush on the mirror is empty: run `crossfade install`")]
    NothingWritten,
}

/// How the clearing itself is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clearing {
    /// Without a flush: a clearing that a crash of the authority undoes is harmless, the debt is paid again.
    Lazy,
    /// With one: needed before the tokens of these debts are removed.
    Flushed,
}

/// Flushes the mirror. All that it answered as committed before this began is durable afterwards, if it is still the same
/// incarnation; returns which one it is.
pub async fn flush(mirror: &Client) -> Result<String, ClearError> {
    // A commit that wrote nothing flushes nothing. Not `local`: where the mirror has synchronous standbys, it promises them too.
    // Others flush too, and hold the row while they do: nothing else is locked here, so waiting is harmless.
    let sql = "BEGIN; SET LOCAL synchronous_commit = on; SET LOCAL lock_timeout = '10s'; UPDATE crossfade.flush SET n = n + 1; \
               SELECT crossfade.incarnate()::text; COMMIT";
    let answers = match mirror.simple_query(sql).await {
        Ok(answers) => answers,
        Err(error) => {
            // The transaction block stays open after an error.
            let _ = mirror.batch_execute("ROLLBACK").await;
            return Err(ClearError::Mirror(error));
        }
    };
    let wrote = answers.iter().filter_map(|answer| match answer {
        SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
        _ => None,
    });
    // Completions: BEGIN, SET, SET, UPDATE, SELECT, COMMIT.
    if wrote.take(4).last() != Some(1) {
        return Err(ClearError::NothingWritten);
    }
    answers
        .iter()
        .find_map(|answer| match answer {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .ok_or(ClearError::NothingWritten)
}

/// The statement that clears exactly these rows; also for others who have seen to the flush themselves (their mirror transaction was
/// committed with one), inside a transaction of theirs.
pub fn deletion(ids: &[i64]) -> String {
    let list = ids.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
    format!("DELETE FROM crossfade.ledger WHERE id = ANY ('{{{list}}}')")
}

/// Makes room in a ledger that was cleared. Autovacuum looks once a minute (`autovacuum_naptime`): by then a busy ledger has grown by a minute's debts.
///
/// It is passed over where somebody else is at it, and does not cut the file: that would keep writers out for a moment.
pub async fn vacuum(authority: &Client) -> Result<(), ClearError> {
    authority
        .batch_execute("VACUUM (TRUNCATE false, SKIP_LOCKED true) crossfade.ledger")
        .await
        .map_err(ClearError::Authority)
}

/// Clears ledger rows whose debts the mirror has answered as committed, or was seen to have committed, while its incarnation was
/// `incarnation`: flush on the mirror, compare the incarnation, delete exactly these ids on the authority. Returns how many rows
/// were cleared (fewer than asked where someone else has cleared some).
pub async fn flush_and_clear(
    mirror: &Client,
    authority: &Client,
    ids: &[i64],
    incarnation: &str,
    clearing: Clearing,
) -> Result<u64, ClearError> {
    if ids.is_empty() {
        return Ok(0);
    }
    if flush(mirror).await? != incarnation {
        return Err(ClearError::Reincarnated);
    }
    let commit = match clearing {
        Clearing::Lazy => "off",
        Clearing::Flushed => "on",
    };
    let sql = format!("BEGIN; SET LOCAL synchronous_commit = {commit}; {}; COMMIT", deletion(ids));
    match authority.simple_query(&sql).await {
        Ok(answers) => Ok(answers
            .iter()
            .filter_map(|answer| match answer {
                SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
                _ => None,
            })
            .sum()),
        Err(error) => {
            let _ = authority.batch_execute("ROLLBACK").await;
            Err(ClearError::Authority(error))
        }
    }
}
