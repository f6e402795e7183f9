//! The lives of a side: PostgreSQL empties `crossfade.incarnation` when it recovers from a crash or is promoted, and a new life begins. `crossfade.life` says which
//! one was last looked at, with both sides' rows in sight [B1, C7].
//!
//! After a crash a server has all that it had promised. One that was promoted (its timeline is another) may lack what its primary had, and the phase row with it. So
//! a promoted mirror owes all tables again; of a promoted authority nothing is known to be equal any more, and what only the mirror has, no job deletes (`doubt`).

use bytes::BytesMut;
use serde_json::json;
use tokio_postgres::Client;
use tracing::warn;

use super::error::Error;
use crate::ledger::debts::{Debt, encode};
use crate::phase::Side;

/// What has begun a new life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It was never looked at before.
    First,
    /// It has crashed and recovered.
    Recovered,
    /// It was promoted, or restored from a backup.
    Promoted,
}

impl Begun {
    fn name(self) -> &'static str {
        match self {
            Begun::First => "first",
            Begun::Recovered => "recovered",
            Begun::Promoted => "promoted",
        }
    }
}

/// The life that a side is in, beside the one that was last looked at.
#[derive(Clone, Debug)]
pub struct Life {
    now: (String, i32),
    known: Option<(String, i32)>,
    /// Why the side may lack what it has promised; nobody has looked at it since.
    pub doubt: Option<String>,
}

impl Life {
    /// The same, of a side of which it is known that it has lost something.
    pub fn lost(self) -> Life {
        Life { known: Some((String::new(), 0)), ..self }
    }

    /// None: it is the one that was looked at.
    pub fn begun(&self) -> Option<Begun> {
        match &self.known {
            None => Some(Begun::First),
            Some(known) if *known == self.now => None,
            Some((_, timeline)) if *timeline == self.now.1 => Some(Begun::Recovered),
            Some(_) => Some(Begun::Promoted),
        }
    }
}

/// The timeline is that of the log which is written now: what the control file says comes with the next checkpoint.
const READ: &str = "SELECT crossfade.incarnate()::text, \
    ('x' || left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8))::bit(32)::int, l.incarnation::text, l.timeline, l.doubt \
    FROM (SELECT) one LEFT JOIN crossfade.life l ON true";

const NOTE: &str = "INSERT INTO crossfade.life AS l (incarnation, timeline, doubt) VALUES ($1::text::uuid, $2, $3) ON CONFLICT (one) DO UPDATE \
    SET incarnation = excluded.incarnation, timeline = excluded.timeline, since = clock_timestamp(), doubt = coalesce(l.doubt, excluded.doubt)";

/// Numbers of debts that were drawn from a primary and are not known here: a proxy that has a block of them may still be at work.
const DRAWN: &str = "SELECT pg_catalog.setval('crossfade.ledger_id', last_value + 1000) FROM crossfade.ledger_id";

/// The life of a side. None: the schema is not there, or is an older one.
pub async fn read(client: &Client, side: Side) -> Result<Option<Life>, Error> {
    let failed = |error| Error::from_driver(side, "reading its life", &error);
    let there = "SELECT pg_catalog.to_regclass('crossfade.life') IS NOT NULL";
    if !client.query_typed_one(there, &[]).await.map_err(failed)?.get::<_, bool>(0) {
        return Ok(None);
    }
    let row = client.query_typed_one(READ, &[]).await.map_err(failed)?;
    let known = row.get::<_, Option<String>>(2).zip(row.get(3));
    Ok(Some(Life { now: (row.get(0), row.get(1)), known, doubt: row.get(4) }))
}

/// Looks at the authority in a life that was read before both sides' phase rows: another one that has begun since is looked at the next time. `mirrored`: writes
/// are. Returns what has begun there.
pub async fn authority(
    client: &Client,
    side: Side,
    life: &Life,
    epoch: u64,
    mirrored: bool,
) -> Result<Option<Begun>, Error> {
    let Some(begun) = life.begun() else { return Ok(None) };
    let doubt = (begun == Begun::Promoted && mirrored).then(|| {
        format!(
            "{side} was promoted or restored (timeline {}, before it {}): it may lack what it had acknowledged",
            life.now.1,
            life.known.as_ref().map_or(0, |known| known.1)
        )
    });
    let write = async {
        client.batch_execute("BEGIN; SET LOCAL synchronous_commit = on").await?;
        if begun == Begun::Promoted {
            client.query(DRAWN, &[]).await?;
            client.batch_execute("UPDATE crossfade.verified SET equal_owings = NULL").await?;
        }
        note(client, side, life, begun, epoch, doubt.as_deref()).await?;
        client.batch_execute("COMMIT").await
    };
    finish(client, side, write.await).await?;
    tell(side, begun, doubt.as_deref());
    Ok(Some(begun))
}

/// Looks at the mirror: one that was promoted may lack rows that nothing owes any more, so that all of them are owed, under ledger numbers from `first_debt` on.
/// `tables`: their numbers.
pub async fn mirror(
    (authority_side, authority): (Side, &Client),
    mirror: &Client,
    tables: &[u32],
    first_debt: i64,
    epoch: u64,
) -> Result<Option<Begun>, Error> {
    let side = authority_side.other();
    let Some(life) = read(mirror, side).await? else { return Ok(None) };
    let Some(begun) = life.begun() else { return Ok(None) };
    if begun == Begun::Promoted {
        let debts: Vec<Vec<u8>> = tables.iter().map(|table| whole(*table)).collect();
        let ids: Vec<i64> = (first_debt..).take(debts.len()).collect();
        let text = "INSERT INTO crossfade.ledger (id, debts, reason) SELECT id, debts, 'promoted' FROM unnest($1::bigint[], $2::bytea[]) AS owed(id, debts)";
        let owe = async {
            authority.batch_execute("BEGIN; SET LOCAL synchronous_commit = on").await?;
            authority.execute(text, &[&ids, &debts]).await?;
            authority.batch_execute("COMMIT").await
        };
        finish(authority, authority_side, owe.await).await?;
    }
    let write = async {
        mirror.batch_execute("BEGIN; SET LOCAL synchronous_commit = on").await?;
        note(mirror, side, &life, begun, epoch, None).await?;
        mirror.batch_execute("COMMIT").await
    };
    finish(mirror, side, write.await).await?;
    tell(side, begun, (begun == Begun::Promoted).then_some("it may lack rows: all tables are owed"));
    Ok(Some(begun))
}

/// Err: the authority may lack what it had acknowledged, so that nothing that only the mirror has may be deleted there.
pub async fn sure(client: &Client, side: Side) -> Result<(), Error> {
    let Some(life) = read(client, side).await? else { return Ok(()) };
    let doubt = match life.begun() {
        Some(Begun::Promoted) => Some(format!("{side} was promoted or restored, and nobody has looked at it yet")),
        _ => life.doubt,
    };
    doubt.map_or(Ok(()), |doubt| {
        Err(Error::Unfit(format!(
            "{doubt}. Rows that only {} has may be those, and would be deleted there: look with `crossfade verify`, bring back to {side} what must stay, and give up the rest by \
             `crossfade verify --repair --force`",
            side.other()
        )))
    })
}

/// Somebody has looked at what the authority may lack, and says that it counts as it is.
pub async fn believe(client: &Client, side: Side) -> Result<(), Error> {
    let text = "DO $$ BEGIN IF to_regclass('crossfade.life') IS NOT NULL THEN UPDATE crossfade.life SET doubt = NULL WHERE doubt IS NOT NULL; END IF; END $$";
    client.batch_execute(text).await.map_err(|error| Error::from_driver(side, "writing down its life", &error))
}

fn whole(table: u32) -> Vec<u8> {
    let mut debts = BytesMut::new();
    encode(&Debt::Table { table }, &mut debts);
    debts.to_vec()
}

async fn note(
    client: &Client,
    side: Side,
    life: &Life,
    begun: Begun,
    epoch: u64,
    doubt: Option<&str>,
) -> Result<(), tokio_postgres::Error> {
    client.execute(NOTE, &[&life.now.0, &life.now.1, &doubt]).await?;
    if begun != Begun::First {
        let detail = json!({ "side": side, "has": begun.name(), "timeline": life.now.1, "doubt": doubt });
        let text = "INSERT INTO crossfade.history (epoch, event, detail) VALUES ($1, 'life', $2)";
        client.execute(text, &[&(epoch as i64), &detail]).await?;
    }
    Ok(())
}

async fn finish(client: &Client, side: Side, done: Result<(), tokio_postgres::Error>) -> Result<(), Error> {
    let Err(error) = done else { return Ok(()) };
    let _ = client.batch_execute("ROLLBACK").await;
    Err(Error::from_driver(side, "writing down its life", &error))
}

fn tell(side: Side, begun: Begun, doubt: Option<&str>) {
    match (begun, doubt) {
        (Begun::First, _) => {}
        (_, Some(doubt)) => warn!(%side, has = begun.name(), doubt, "a database has begun a new life"),
        (_, None) => {
            warn!(%side, has = begun.name(), "a database has begun a new life: it crashed, and has what it had promised")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_is_known_or_says_how_it_began() {
        let life = |known: Option<(&str, i32)>| Life {
            now: ("b".into(), 2),
            known: known.map(|(incarnation, timeline)| (incarnation.into(), timeline)),
            doubt: None,
        };
        assert_eq!(life(None).begun(), Some(Begun::First));
        assert_eq!(life(Some(("b", 2))).begun(), None);
        assert_eq!(life(Some(("a", 2))).begun(), Some(Begun::Recovered));
        assert_eq!(life(Some(("a", 1))).begun(), Some(Begun::Promoted));
    }
}
