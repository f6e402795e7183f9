//! How far a look has come: `crossfade.verifying` on the authority. Whoever comes after one that was ended goes on there, if what was seen still counts: in the
//! same epoch, with nothing of the table owed in between.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio_postgres::Client;

use super::super::cut;
use super::super::error::Error;
use super::super::link::Pair;
use super::super::sql::Bounds;
use super::Found;
use crate::catalog::Table;
use crate::ledger::debts::{Values, put_values, take_values};

/// A position is written down this often.
const KEEP: Duration = Duration::from_secs(1);

/// Who looks. Each has positions of his own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Runner {
    /// `crossfade verify`.
    Command,
    /// A proxy, in the background.
    Proxy,
}

impl Runner {
    fn name(self) -> &'static str {
        match self {
            Runner::Command => "command",
            Runner::Proxy => "proxy",
        }
    }
}

/// What a look has begun with: it counts for that.
#[derive(Clone, Copy, Debug)]
pub(super) struct Since {
    /// Who looks.
    pub runner: Runner,
    /// The epoch.
    pub epoch: u64,
    /// How often something of the table had been owed by then.
    pub owings: i64,
}

/// Where a look at a table begins.
pub(super) enum Beginning {
    /// An earlier one has found all these rows equal.
    Over(u64),
    /// At these parts; an earlier one may have come through some of them.
    Parts(Vec<Position>),
}

/// How far one look has come with a part of a table.
pub(super) struct Position {
    /// Its number.
    pub part: i32,
    /// Its keys. Where the table has no key it is the one part, and has no bounds.
    pub bounds: Bounds,
    /// The last key up to which all was equal; None: from the part's first.
    pub after: Option<Values>,
    /// Rows up to there.
    pub rows: u64,
    /// All of the part was equal.
    pub done: bool,
    written: Instant,
}

/// The number of the row that stands for a whole table, of which all was equal.
const WHOLE: i32 = -1;

impl Beginning {
    /// Where an earlier look has come to, with `resume` and if that counts; else the beginning, with so many parts at most, and nothing is kept of an
    /// earlier one.
    pub async fn of(
        pair: &mut Pair,
        table: &Table,
        since: Since,
        resume: bool,
        parts: usize,
    ) -> Result<Beginning, Error> {
        if resume && let Some(kept) = read(pair, table, since).await? {
            return Ok(kept);
        }
        let bounds = match table.key {
            Some(_) => cut::parts(&mut pair.authority, table, parts as i64).await?,
            None => vec![Bounds::default()],
        };
        let packed = |key: &Option<Values>| key.as_ref().map(packed);
        let after: Vec<Option<Vec<u8>>> = bounds.iter().map(|bounds| packed(&bounds.after)).collect();
        let upto: Vec<Option<Vec<u8>>> = bounds.iter().map(|bounds| packed(&bounds.upto)).collect();
        forget(pair, &[table.number], since.runner).await?;
        let text = "INSERT INTO crossfade.verifying (number, runner, epoch, owings, part, after_key, upto_key, rows) \
            SELECT $1, $2, $3, $4, p.n - 1, p.after_key, p.upto_key, 0 FROM unnest($5::bytea[], $6::bytea[]) WITH ORDINALITY AS p(after_key, upto_key, n)";
        let (number, epoch) = (table.number as i32, since.epoch as i64);
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
            [&number, &since.runner.name(), &epoch, &since.owings, &after, &upto];
        pair.authority.execute("beginning anew", text, &parameters).await?;
        let position = |(part, bounds)| Position {
            part: part as i32,
            bounds,
            after: None,
            rows: 0,
            done: false,
            written: Instant::now(),
        };
        Ok(Beginning::Parts(bounds.into_iter().enumerate().map(position).collect()))
    }
}

fn packed(key: &Values) -> Vec<u8> {
    let mut out = BytesMut::new();
    put_values(key, &mut out);
    out.to_vec()
}

async fn read(pair: &mut Pair, table: &Table, since: Since) -> Result<Option<Beginning>, Error> {
    let text = "SELECT part, after_key, upto_key, position, rows, done FROM crossfade.verifying \
        WHERE number = $1 AND runner = $2 AND epoch = $3 AND owings = $4 ORDER BY part";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
        [&(table.number as i32), &since.runner.name(), &(since.epoch as i64), &since.owings];
    let rows = pair.authority.rows("reading a position", text, &parameters).await?;
    let key = |row: &tokio_postgres::Row, at: usize| {
        row.get::<_, Option<Vec<u8>>>(at).and_then(|bytes| take_values(&mut Bytes::from(bytes)))
    };
    let position = |row: &tokio_postgres::Row| Position {
        part: row.get(0),
        bounds: Bounds { after: key(row, 1), upto: key(row, 2) },
        after: key(row, 3),
        rows: row.get::<_, i64>(4) as u64,
        done: row.get(5),
        written: Instant::now(),
    };
    let positions: Vec<Position> = rows.iter().map(position).collect();
    Ok(match positions.first() {
        None => None,
        Some(first) if first.part == WHOLE => Some(Beginning::Over(first.rows)),
        Some(_) => Some(Beginning::Parts(positions)),
    })
}

impl Position {
    /// What is left of the part.
    pub fn left(&self) -> Bounds {
        Bounds { after: self.after.clone().or_else(|| self.bounds.after.clone()), upto: self.bounds.upto.clone() }
    }

    /// All up to this key was compared. It is kept for as long as nothing was found: what differs is to be found again.
    pub async fn keep(
        &mut self,
        pair: &mut Pair,
        (table, runner): (&Table, Runner),
        found: &Found,
        after: &Values,
    ) -> Result<(), Error> {
        if !found.is_equal() || self.written.elapsed() < KEEP {
            return Ok(());
        }
        self.written = Instant::now();
        self.write(pair, (table, runner), Some(packed(after)), found).await
    }

    /// All of the part was compared.
    pub async fn end(
        &mut self,
        pair: &mut Pair,
        (table, runner): (&Table, Runner),
        found: &Found,
    ) -> Result<(), Error> {
        if !found.is_equal() {
            return Ok(());
        }
        self.done = true;
        self.write(pair, (table, runner), None, found).await
    }

    async fn write(
        &self,
        pair: &mut Pair,
        (table, runner): (&Table, Runner),
        key: Option<Vec<u8>>,
        found: &Found,
    ) -> Result<(), Error> {
        let text = "UPDATE crossfade.verifying SET position = $4, rows = $5, done = $6, changed = clock_timestamp() \
            WHERE number = $1 AND runner = $2 AND part = $3";
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
            [&(table.number as i32), &runner.name(), &self.part, &key, &(found.rows as i64), &self.done];
        pair.authority.execute("keeping a position", text, &parameters).await?;
        Ok(())
    }
}

/// All of a table was equal: a run that resumes passes it over.
pub(super) async fn over(pair: &mut Pair, table: &Table, since: Since, rows: u64) -> Result<(), Error> {
    forget(pair, &[table.number], since.runner).await?;
    let text = "INSERT INTO crossfade.verifying (number, runner, part, epoch, owings, rows, done) VALUES ($1, $2, $3, $4, $5, $6, true)";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
        [&(table.number as i32), &since.runner.name(), &WHOLE, &(since.epoch as i64), &since.owings, &(rows as i64)];
    pair.authority.execute("keeping a position", text, &parameters).await?;
    Ok(())
}

/// Looks at these tables have ended: the next begins anew.
pub(super) async fn forget(pair: &mut Pair, numbers: &[u32], runner: Runner) -> Result<(), Error> {
    let numbers: Vec<i32> = numbers.iter().map(|number| *number as i32).collect();
    let text = "DELETE FROM crossfade.verifying WHERE number = ANY ($1) AND runner = $2";
    pair.authority.execute("forgetting positions", text, &[&numbers, &runner.name()]).await?;
    Ok(())
}

/// Schema crossfade has all that verify needs.
pub async fn installed(authority: &Client) -> Result<bool, tokio_postgres::Error> {
    let text = "SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute WHERE attrelid = pg_catalog.to_regclass('crossfade.verifying') AND attname = 'part') \
        AND pg_catalog.to_regclass('crossfade.owings') IS NOT NULL";
    Ok(authority.query_one(text, &[]).await?.get(0))
}

/// Seconds since an earlier run of `crossfade verify`, which was ended in the middle of this epoch, kept something; None: there was none.
pub async fn begun(authority: &Client, epoch: u64) -> Result<Option<f64>, tokio_postgres::Error> {
    let text = "SELECT extract(epoch FROM clock_timestamp() - max(changed))::float8 FROM crossfade.verifying WHERE runner = 'command' AND epoch = $1";
    Ok(authority.query_one(text, &[&(epoch as i64)]).await?.get(0))
}
