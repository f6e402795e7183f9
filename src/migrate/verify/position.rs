//! How far a look has come: `crossfade.verifying` on the authority. Whoever comes after one that was ended goes on there, if what was seen still counts: in the
//! same epoch, with nothing of the table owed in between.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio_postgres::Client;

use super::super::error::Error;
use super::super::link::Pair;
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

/// How far one look at one table has come.
pub(super) struct Position {
    runner: Runner,
    /// The epoch in which it began, and how often something of the table had been owed by then.
    since: (u64, i64),
    /// The last key up to which all was equal; None: from the first.
    pub after: Option<Values>,
    /// Rows up to there.
    pub rows: u64,
    /// All of the table was equal.
    pub done: bool,
    written: Instant,
}

impl Position {
    /// Where an earlier look has come to, with `resume` and if that counts; else the beginning, and nothing is kept of an earlier one.
    pub async fn begin(
        pair: &mut Pair,
        table: &Table,
        runner: Runner,
        since: (u64, i64),
        resume: bool,
    ) -> Result<Position, Error> {
        let mut position = Position { runner, since, after: None, rows: 0, done: false, written: Instant::now() };
        let number = table.number as i32;
        if resume {
            let text = "SELECT position, rows, done FROM crossfade.verifying WHERE number = $1 AND runner = $2 AND epoch = $3 AND owings = $4";
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
                [&number, &runner.name(), &(since.0 as i64), &since.1];
            if let Some(row) = pair.authority.rows("reading a position", text, &parameters).await?.first() {
                let key = row.get::<_, Option<Vec<u8>>>(0).and_then(|bytes| take_values(&mut Bytes::from(bytes)));
                (position.after, position.rows, position.done) = (key, row.get::<_, i64>(1) as u64, row.get(2));
            }
        } else {
            let text = "DELETE FROM crossfade.verifying WHERE number = $1 AND runner = $2";
            pair.authority.execute("beginning anew", text, &[&number, &runner.name()]).await?;
        }
        Ok(position)
    }

    /// All up to this key was compared; None: all there is. It is kept for as long as nothing was found: what differs is to be found again.
    pub async fn keep(
        &mut self,
        pair: &mut Pair,
        table: &Table,
        found: &Found,
        after: Option<&Values>,
    ) -> Result<(), Error> {
        let Some(after) = after.filter(|_| found.is_equal()) else { return Ok(()) };
        if self.written.elapsed() < KEEP {
            return Ok(());
        }
        self.written = Instant::now();
        let mut key = BytesMut::new();
        put_values(after, &mut key);
        write(pair, table, (self.runner, self.since), Some(&key), found.rows, false).await
    }
}

/// All of a table was equal: a run that resumes passes it over.
pub(super) async fn done(
    pair: &mut Pair,
    table: &Table,
    look: (Runner, (u64, i64)),
    found: &Found,
) -> Result<(), Error> {
    write(pair, table, look, None, found.rows, true).await
}

async fn write(
    pair: &mut Pair,
    table: &Table,
    (runner, (epoch, owings)): (Runner, (u64, i64)),
    key: Option<&[u8]>,
    rows: u64,
    done: bool,
) -> Result<(), Error> {
    let text = "INSERT INTO crossfade.verifying (number, runner, epoch, owings, position, rows, done) VALUES ($1, $2, $3, $4, $5, $6, $7) \
        ON CONFLICT (number, runner) DO UPDATE SET epoch = excluded.epoch, owings = excluded.owings, position = excluded.position, rows = excluded.rows, \
        done = excluded.done, changed = clock_timestamp()";
    let (number, epoch, rows) = (table.number as i32, epoch as i64, rows as i64);
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
        [&number, &runner.name(), &epoch, &owings, &key, &rows, &done];
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
    let text = "SELECT pg_catalog.to_regclass('crossfade.verifying') IS NOT NULL AND pg_catalog.to_regclass('crossfade.owings') IS NOT NULL";
    Ok(authority.query_one(text, &[]).await?.get(0))
}

/// Seconds since an earlier run of `crossfade verify`, which was ended in the middle of this epoch, kept something; None: there was none.
pub async fn begun(authority: &Client, epoch: u64) -> Result<Option<f64>, tokio_postgres::Error> {
    let text = "SELECT extract(epoch FROM clock_timestamp() - max(changed))::float8 FROM crossfade.verifying WHERE runner = 'command' AND epoch = $1";
    Ok(authority.query_one(text, &[&(epoch as i64)]).await?.get(0))
}
