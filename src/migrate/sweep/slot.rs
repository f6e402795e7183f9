//! The logical slot of one side: made, watched, given up, removed. What is known of it stands in `crossfade.sweep` there.

use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::super::error::Error;
use crate::ledger::clear::{ClearError, flush};
use crate::phase::Side;

/// Comes with PostgreSQL's contrib modules.
const PLUGIN: &str = "test_decoding";

/// How a side's slot stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    /// Its name.
    pub slot: String,
    /// It is there, and the server still has what it needs.
    pub whole: bool,
    /// Bytes of WAL that the server keeps because of it.
    pub retained: u64,
    /// Bytes of WAL that have not been swept.
    pub behind: u64,
    /// All that was committed before has been swept.
    pub swept: Option<PgLsn>,
    /// Why an earlier one was given up, and none has begun since.
    pub lost: Option<String>,
}

const STANDING: &str = "SELECT s.slot, r.slot_name IS NOT NULL AND r.wal_status IS DISTINCT FROM 'lost', \
    coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), r.restart_lsn), 0)::bigint, coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), r.confirmed_flush_lsn), 0)::bigint, \
    r.confirmed_flush_lsn, s.lost FROM crossfade.sweep s LEFT JOIN pg_replication_slots r ON r.slot_name = s.slot";

fn failed(side: Side, doing: &'static str) -> impl Fn(tokio_postgres::Error) -> Error {
    move |error| Error::from_driver(side, doing, &error)
}

/// How the slot of this side stands. None: no sweep has begun there, or schema crossfade is not there.
pub async fn standing(client: &Client, side: Side) -> Result<Option<Standing>, Error> {
    let there = client.query_one("SELECT to_regclass('crossfade.sweep') IS NOT NULL", &[]).await;
    if !there.map_err(failed(side, "looking for the sweep's slot"))?.get::<_, bool>(0) {
        return Ok(None);
    }
    let row = client.query_opt(STANDING, &[]).await.map_err(failed(side, "looking at the sweep's slot"))?;
    Ok(row.map(|row| Standing {
        slot: row.get(0),
        whole: row.get(1),
        retained: row.get::<_, i64>(2).max(0) as u64,
        behind: row.get::<_, i64>(3).max(0) as u64,
        swept: row.get(4),
        lost: row.get(5),
    }))
}

/// What a beginning has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begun {
    /// The slot of before goes on.
    Again,
    /// The first one.
    New,
    /// One that comes after one that was lost: what was written in between nobody has seen.
    AfterLoss,
}

/// What would keep a slot from being made on this side, in words for people.
pub async fn unfit(client: &Client, side: Side) -> Result<Option<String>, Error> {
    let text = "SELECT current_setting('wal_level'), current_setting('max_replication_slots')::int, \
        (SELECT count(*) FROM pg_replication_slots)::int, (SELECT rolsuper OR rolreplication FROM pg_roles WHERE rolname = current_user), current_user::text, pg_is_in_recovery()";
    let row = client.query_one(text, &[]).await.map_err(failed(side, "looking at the settings for a slot"))?;
    let (level, most, slots): (String, i32, i32) = (row.get(0), row.get(1), row.get(2));
    let (may, role): (bool, String) = (row.get(3), row.get(4));
    Ok(match () {
        _ if row.get::<_, bool>(5) => Some(format!("{side} is a standby: a sweep reads the primary's slot")),
        _ if level != "logical" => Some(format!(
            "{side} has wal_level = {level}: a sweep reads what has changed from the write-ahead log, which says it at wal_level = logical only. \
             ALTER SYSTEM SET wal_level = 'logical', then restart {side}"
        )),
        _ if !may => Some(format!(
            "role {role} may not use replication slots on {side}: ALTER ROLE {role} REPLICATION (or grant the provider's role for it)"
        )),
        _ if slots >= most => Some(format!(
            "all {most} replication slots of {side} are in use: raise max_replication_slots there and restart, or drop one that nobody needs"
        )),
        () => None,
    })
}

/// Has a slot that goes on from where it was, or a new one. Waits for transactions that are under way, as making a slot does.
pub(super) async fn begin(client: &Client, side: Side) -> Result<Begun, Error> {
    let found = standing(client, side).await?;
    if let Some(found) = &found
        && found.whole
        && found.lost.is_none()
    {
        return Ok(Begun::Again);
    }
    let doing = "making the sweep's slot";
    let name = "SELECT 'crossfade_sweep_' || oid FROM pg_database WHERE datname = current_database()";
    let name: String = client.query_one(name, &[]).await.map_err(failed(side, doing))?.get(0);
    if let Some(found) = &found {
        // What is between the two is not known, whatever happens from here on.
        note_loss(client, side, found.lost.as_deref().unwrap_or("the slot is gone (a failover? dropped by hand?)"))
            .await?;
        drop_slot(client, side).await?;
    }
    let there = "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1)";
    // One that was made just before its maker died begins early enough.
    if !client.query_one(there, &[&name]).await.map_err(failed(side, doing))?.get::<_, bool>(0) {
        if let Some(why) = unfit(client, side).await? {
            return Err(Error::Unfit(why));
        }
        let make = "SELECT pg_create_logical_replication_slot($1, $2)";
        client.query(make, &[&name, &PLUGIN]).await.map_err(|error| match error.code().map(|code| code.code()) {
            Some("58P01") => Error::Unfit(format!(
                "{side} lacks the output plugin {PLUGIN}: install PostgreSQL's contrib modules there (package postgresql-contrib)"
            )),
            _ => Error::from_driver(side, doing, &error),
        })?;
    }
    let enter = "INSERT INTO crossfade.sweep (slot) VALUES ($1) ON CONFLICT DO NOTHING";
    client.execute(enter, &[&name]).await.map_err(failed(side, doing))?;
    Ok(if found.is_some() { Begun::AfterLoss } else { Begun::New })
}

/// Notes that a slot's changes are lost; the next sweep owes all tables because of it.
async fn note_loss(client: &Client, side: Side, why: &str) -> Result<(), Error> {
    let text = "UPDATE crossfade.sweep SET lost = coalesce(lost, $1), changed = clock_timestamp()";
    client.execute(text, &[&why]).await.map_err(failed(side, "noting that a slot is lost"))?;
    Ok(())
}

/// All tables are owed: what was lost is known to be.
pub(super) async fn settle_loss(client: &Client, side: Side) -> Result<(), Error> {
    let text = "UPDATE crossfade.sweep SET lost = NULL, begun = clock_timestamp(), changed = clock_timestamp()";
    client.execute(text, &[]).await.map_err(failed(side, "noting that a new slot has begun"))?;
    Ok(())
}

/// Drops this side's slot, if it is there. A consumer at work is ended first.
async fn drop_slot(client: &Client, side: Side) -> Result<(), Error> {
    let doing = "dropping the sweep's slot";
    let text = "SELECT slot_name::text, active_pid FROM pg_replication_slots \
        WHERE slot_name = 'crossfade_sweep_' || (SELECT oid FROM pg_database WHERE datname = current_database())";
    for _ in 0..50 {
        let Some(row) = client.query_opt(text, &[]).await.map_err(failed(side, doing))? else { return Ok(()) };
        let (name, pid): (String, Option<i32>) = (row.get(0), row.get(1));
        if let Some(pid) = pid {
            let end = "SELECT pg_terminate_backend($1)";
            client.query(end, &[&pid]).await.map_err(failed(side, doing))?;
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        match client.query("SELECT pg_drop_replication_slot($1)", &[&name]).await {
            Ok(_) => return Ok(()),
            // In use again.
            Err(error) if error.code().is_some_and(|code| code.code() == "55006") => {}
            Err(error) => return Err(Error::from_driver(side, doing, &error)),
        }
    }
    Err(Error::Deadline(format!("{side}: the sweep's slot stays in use; end its session, then try again")))
}

/// Gives the slot up where the server keeps more WAL for it than `limit` bytes, or has thrown away what it needs. Some: why, in words for people; the
/// next sweep begins anew and owes all tables.
pub async fn watch(client: &Client, side: Side, limit: u64) -> Result<Option<String>, Error> {
    let Some(found) = standing(client, side).await? else { return Ok(None) };
    let why = match () {
        _ if found.lost.is_some() => return Ok(None),
        _ if !found.whole => {
            "the server has removed the slot, or the WAL that it needs (max_slot_wal_keep_size, a failover)".to_owned()
        }
        _ if found.retained > limit => format!(
            "{side} kept {} bytes of WAL for it, more than sweep.retain ({limit}); {} of them were not swept: is `crossfade sweep --follow` (or sweep.follow) at work, and fast enough?",
            found.retained, found.behind
        ),
        () => return Ok(None),
    };
    note_loss(client, side, &why).await?;
    drop_slot(client, side).await?;
    Ok(Some(why))
}

/// Ends the sweep on a side: the slot is dropped, and nothing is known of it any more. True: there was one.
pub async fn end(client: &Client, side: Side) -> Result<bool, Error> {
    if standing(client, side).await?.is_none() {
        return Ok(false);
    }
    drop_slot(client, side).await?;
    client.execute("DELETE FROM crossfade.sweep", &[]).await.map_err(failed(side, "ending the sweep"))?;
    Ok(true)
}

/// Where the server's log ends now: all that has committed is before.
pub(super) async fn log_end(client: &Client, side: Side) -> Result<PgLsn, Error> {
    let row = client.query_one("SELECT pg_current_wal_flush_lsn()", &[]).await;
    Ok(row.map_err(failed(side, "reading the end of the log"))?.get(0))
}

/// The same, behind all that has committed by now: a commit of ours flushes what others have committed asynchronously. (What is in the log and belongs to
/// no commit may stay unflushed for ever on an idle server: the end of *that* is nothing to wait for.) No transaction may be open.
pub async fn flushed_end(client: &Client, side: Side) -> Result<PgLsn, Error> {
    match flush(client).await {
        Ok(_) => log_end(client, side).await,
        Err(ClearError::Mirror(error)) => Err(Error::from_driver(side, "flushing", &error)),
        Err(error) => Err(Error::Unfit(format!("{side}: {error}"))),
    }
}

/// All before this position was seen to.
pub(super) async fn advance(client: &Client, side: Side, slot: &str, to: PgLsn) -> Result<(), Error> {
    let text = "SELECT pg_replication_slot_advance($1, $2) FROM pg_replication_slots WHERE slot_name = $1 AND confirmed_flush_lsn < $2";
    client.query(text, &[&slot, &to]).await.map_err(failed(side, "advancing the slot"))?;
    Ok(())
}
