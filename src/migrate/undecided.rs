//! Transactions that have written on both sides, and were prepared on new by a proxy that died before it could commit or roll them back there (C11).
//!
//! Old decides. The transaction there has entered its name in `crossfade.decided`, so that the name is to be read if, and only if, it has committed: also
//! after a crash of old, which may give the same number to another transaction. While it is in progress nobody settles it; a transaction of an earlier
//! incarnation is not.

use tokio_postgres::error::SqlState;
use tracing::{info, warn};

use super::error::Error;
use super::link::At;
use crate::ledger::split_prefix;

/// What a look at prepared transactions has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Committed or rolled back now.
    pub settled: u64,
    /// Left as they are: old still decides, or we may not.
    pub undecided: u64,
}

/// How a transaction stands on the side that decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    InProgress,
    Committed,
    Aborted,
}

/// Incarnation and xid8 of a name.
fn parts(gid: &str) -> Option<(&str, i64)> {
    let (rest, xid) = gid.rsplit_once(':')?;
    let (_, incarnation) = rest.rsplit_once(':')?;
    Some((incarnation, xid.parse().ok()?))
}

/// Settles what can be settled of this migration. What is prepared between two looks is found by the next one.
pub async fn settle(decider: At<'_>, prepared: At<'_>, migration: &str) -> Result<Settled, Error> {
    let mut done = Settled::default();
    let text = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() AND starts_with(gid, $1) ORDER BY prepared";
    let prefix = split_prefix(migration);
    let gids: Vec<String> = prepared
        .rows("looking for prepared transactions", text, &[&prefix])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    for gid in &gids {
        let Some((incarnation, xid)) = parts(gid) else { continue };
        match outcome(decider, gid, incarnation, xid).await? {
            Outcome::InProgress => done.undecided += 1,
            outcome => match end(prepared, gid, outcome == Outcome::Committed).await {
                Ok(()) => done.settled += 1,
                Err(error) => {
                    warn!(side = %prepared.side, %gid, %error, "a prepared transaction cannot be settled: only its own role or a superuser may. Run COMMIT PREPARED or ROLLBACK PREPARED as `crossfade status` says");
                    done.undecided += 1;
                }
            },
        }
    }
    forget(decider, prepared, &prefix).await?;
    Ok(done)
}

/// In this order: whatever is not in progress has ended before its name is looked for.
async fn outcome(decider: At<'_>, gid: &str, incarnation: &str, xid: i64) -> Result<Outcome, Error> {
    let doing = "asking how a transaction has ended";
    let now: String = decider.rows(doing, "SELECT crossfade.incarnate()::text", &[]).await?[0].get(0);
    if now == incarnation {
        let text = "SELECT pg_xact_status($1::text::xid8) = 'in progress'";
        let status: Option<bool> = decider.rows(doing, text, &[&xid.to_string()]).await?[0].get(0);
        if status == Some(true) {
            return Ok(Outcome::InProgress);
        }
    }
    let text = "SELECT EXISTS (SELECT FROM crossfade.decided WHERE gid = $1)";
    let committed: bool = decider.rows(doing, text, &[&gid]).await?[0].get(0);
    Ok(if committed { Outcome::Committed } else { Outcome::Aborted })
}

async fn end(prepared: At<'_>, gid: &str, commit: bool) -> Result<(), Error> {
    let word = if commit { "COMMIT" } else { "ROLLBACK" };
    let literal = gid.replace('\'', "''");
    match prepared.rows("settling a prepared transaction", &format!("{word} PREPARED '{literal}'"), &[]).await {
        Ok(_) => {
            info!(side = %prepared.side, %gid, commit, "a transaction that a proxy left prepared is settled");
            Ok(())
        }
        // Another was first: its own proxy, or another one's look.
        Err(Error::Server { code: SqlState::UNDEFINED_OBJECT, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Names are kept for a while: a standby of new that is promoted may have a transaction prepared that was settled here. A name is only forgotten once
/// nothing is prepared under it, which was so before the transaction could enter it.
async fn forget(decider: At<'_>, prepared: At<'_>, prefix: &str) -> Result<(), Error> {
    let text = "SELECT gid FROM crossfade.decided WHERE at < clock_timestamp() - interval '10 minutes' AND starts_with(gid, $1) LIMIT 10000";
    let old: Vec<String> =
        decider.rows("reading decisions", text, &[&prefix]).await?.iter().map(|row| row.get(0)).collect();
    if old.is_empty() {
        return Ok(());
    }
    let text = "SELECT gid FROM unnest($1::text[]) gid WHERE gid NOT IN (SELECT gid FROM pg_prepared_xacts)";
    let over = prepared.rows("looking for prepared transactions", text, &[&old]).await?;
    let over: Vec<String> = over.iter().map(|row| row.get(0)).collect();
    decider.rows("forgetting decisions", "DELETE FROM crossfade.decided WHERE gid = ANY ($1)", &[&over]).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::split_name;

    #[test]
    fn a_name_fits_and_is_read_back() {
        let incarnation = "8c1f0a52-8d38-4b2e-9d1e-3f5f0f3f9a11";
        for migration in ["shop", "a:b", &"ä".repeat(200)] {
            let gid = split_name(migration, incarnation, "18446744073709551");
            assert!(gid.len() <= 199, "{gid}");
            assert_eq!(parts(&gid), Some((incarnation, 18_446_744_073_709_551)));
            assert!(gid.starts_with(&split_prefix(migration)));
        }
        assert_eq!(parts("crossfade"), None);
    }
}
