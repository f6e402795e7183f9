//! Which job works on what (D4): advisory locks *on the mirror*, held by the session whose statements could come late. A successor gets them
//! when that session is gone.

use std::time::{Duration, Instant};

use super::error::{Error, Meaning};
use super::link::Pair;

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(20);

/// What is locked. Each kind is the first key of its advisory locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A table's rows as a whole: walks, copies. Shared by the sessions of a backfill.
    Table = 0x4346_5442,
    /// A table's keys and ranges that are owed: one repairer at a time.
    Keys = 0x4346_4b59,
    /// A part of a table, in a backfill.
    Part = 0x4346_5054,
    /// A table's indexes, when a backfill drops or makes them.
    Indexes = 0x4346_4958,
    /// Verification in the background: one proxy at a time. Of no table: number 0.
    Verify = 0x4346_5652,
}

/// Takes all of these tables' locks, alone, or none. False: another job has one.
pub(crate) async fn take(pair: &mut Pair, kind: Kind, numbers: &[u32]) -> Result<bool, Error> {
    for (at, number) in numbers.iter().enumerate() {
        let text = "SELECT pg_try_advisory_lock($1, $2)";
        let rows =
            pair.mirror.rows("locking a table against other jobs", text, &[&(kind as i32), &(*number as i32)]).await?;
        if !rows[0].get::<_, bool>(0) {
            release(pair, kind, &numbers[..at]).await?;
            return Ok(false);
        }
    }
    Ok(true)
}

/// As [`take`], trying again for so long: who has it may have it for a moment only.
pub(crate) async fn take_within(pair: &mut Pair, kind: Kind, numbers: &[u32], limit: Duration) -> Result<bool, Error> {
    let deadline = Instant::now() + limit;
    loop {
        if take(pair, kind, numbers).await? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Releases what [`take`] has taken.
pub(crate) async fn release(pair: &mut Pair, kind: Kind, numbers: &[u32]) -> Result<(), Error> {
    for number in numbers {
        let text = "SELECT pg_advisory_unlock($1, $2)";
        pair.mirror.rows("unlocking a table", text, &[&(kind as i32), &(*number as i32)]).await?;
    }
    Ok(())
}

/// How a table is taken by a backfill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// Nobody else works on it.
    Alone,
    /// Only others of this kind do.
    Shared,
}

impl Hold {
    fn suffix(self) -> &'static str {
        match self {
            Hold::Alone => "",
            Hold::Shared => "_shared",
        }
    }
}

/// Waits for the table's lock, for a moment: [`wanted`] shows it to whoever holds it. False: not yet.
pub(crate) async fn wait_for_table(pair: &mut Pair, number: u32, hold: Hold) -> Result<bool, Error> {
    // Nothing is locked meanwhile that an application could wait for.
    let limit = (pair.settings.patience / 2).min(Duration::from_secs(2)).as_millis().max(1);
    pair.mirror.batch("waiting for another job", &format!("SET lock_timeout = {limit}")).await?;
    let text = format!("SELECT pg_advisory_lock{}($1, $2)", hold.suffix());
    let taken = pair.mirror.rows("waiting for another job", &text, &[&(Kind::Table as i32), &(number as i32)]).await;
    let usual = format!("SET lock_timeout = {}", pair.wait.as_millis().max(1));
    pair.mirror.batch("setting lock_timeout", &usual).await?;
    match taken {
        Ok(_) => Ok(true),
        Err(error) if error.meaning() == Meaning::Busy => {
            // The time-out may have come just behind the lock, which no rollback takes away. (Unlocking what is not held is a warning in the server's log.)
            let text = format!(
                "SELECT pg_advisory_unlock{}(classid::int, objid::int) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2 \
                 AND pid = pg_backend_pid() AND classid = $1::bigint::oid AND objid = $2::bigint::oid",
                hold.suffix()
            );
            let lock: [i64; 2] = [i64::from(Kind::Table as i32), i64::from(number)];
            pair.mirror.rows("unlocking a table", &text, &[&lock[0], &lock[1]]).await?;
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Gives back what [`wait_for_table`] has given.
pub(crate) async fn release_table(pair: &mut Pair, number: u32, hold: Hold) -> Result<(), Error> {
    let text = format!("SELECT pg_advisory_unlock{}($1, $2)", hold.suffix());
    pair.mirror.rows("unlocking a table", &text, &[&(Kind::Table as i32), &(number as i32)]).await?;
    Ok(())
}

/// Somebody waits for the table's lock.
pub(crate) async fn wanted(pair: &mut Pair, number: u32) -> Result<bool, Error> {
    let text = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objsubid = 2 \
        AND classid = $1::bigint::oid AND objid = $2::bigint::oid \
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
    let rows =
        pair.mirror.rows("looking for other jobs", text, &[&i64::from(Kind::Table as i32), &i64::from(number)]).await?;
    Ok(rows[0].get(0))
}
