//! Reading the ledger: which debts are in flight, which are owed, which only wait to be cleared (C2, C4).

use std::collections::HashMap;

use super::error::Error;
use super::link::{Link, Pair};
use crate::ledger::debts::{self, Debt};

/// What may be done about a ledger row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its carrier has committed in this incarnation: it is cleared after a flush.
    Carried,
    /// Its carrier, or a backend that may still add to it, is at work.
    InFlight,
    /// Owed: anyone may pay it.
    Payable,
}

/// A ledger row.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub id: i64,
    pub state: State,
    pub debts: Vec<Debt>,
}

/// Rows read at once at most.
const ROWS: i64 = 10_000;
/// ... and bytes of debts.
const BYTES: i64 = 16 << 20;
/// A carrier that was given up is ended when its debt is older than this (microseconds): until then it may end by itself.
const GRACE_US: i64 = 1_000_000;

const READ: &str = "SELECT id, carrier_xid, carrier_pid, carrier_start, carrier_incarnation::text, holder_pid, holder_start, debts, \
    (extract(epoch FROM clock_timestamp() - at) * 1000000)::bigint \
    FROM (SELECT l.*, sum(octet_length(debts)) OVER (ORDER BY id) AS total, row_number() OVER (ORDER BY id) AS nth \
    FROM (SELECT * FROM crossfade.ledger WHERE id > $1 ORDER BY id LIMIT $2::bigint) l) l WHERE total <= $3::bigint OR nth = 1 ORDER BY id";

/// A transaction that is newer than all that ended is asked for by its lock: pg_xact_status refuses an xid that was never given out.
const STATUS: &str = "SELECT x, CASE WHEN x::text::xid8 < pg_snapshot_xmax(pg_current_snapshot()) THEN pg_xact_status(x::text::xid8) \
    WHEN EXISTS (SELECT FROM pg_locks WHERE locktype = 'transactionid' AND granted AND transactionid::text = (x % 4294967296)::text) \
    THEN 'in progress' END FROM unnest($1::bigint[]) AS x";

/// A backend: its pid and start (microseconds since 1970).
type Backend = (i32, i64);

struct Found {
    id: i64,
    carrier_xid: Option<i64>,
    carrier: Option<Backend>,
    incarnation: Option<String>,
    holder: Option<Backend>,
    debts: Vec<Debt>,
    age_us: i64,
}

/// The next rows behind id `after`, with what may be done about each. `incarnation`: the mirror's, read before.
pub(crate) async fn read(pair: &mut Pair, after: i64, incarnation: &str) -> Result<Vec<Entry>, Error> {
    let found = fetch(&mut pair.authority, after).await?;
    let asked = |row: &&Found| row.incarnation.as_deref() == Some(incarnation);
    let xids: Vec<i64> = found.iter().filter(asked).filter_map(|row| row.carrier_xid).collect();
    let status = statuses(&mut pair.mirror, &xids).await?;
    let carriers = alive(&mut pair.mirror, found.iter().filter_map(|row| row.carrier).collect()).await?;
    let holders = alive(&mut pair.authority, found.iter().filter_map(|row| row.holder).collect()).await?;
    let mut entries = Vec::with_capacity(found.len());
    for row in found {
        let held = row.holder.is_some_and(|holder| holders.is(holder));
        let carried = row.carrier.is_some_and(|carrier| carriers.is(carrier));
        let told = row.carrier_xid.filter(|_| row.incarnation.as_deref() == Some(incarnation)).and_then(|xid| status.get(&xid));
        let state = match told.map(String::as_str) {
            _ if held => State::InFlight,
            Some("in progress") => State::InFlight,
            Some("committed") => State::Carried,
            Some("aborted") => State::Payable,
            _ if carried => State::InFlight,
            _ => State::Payable,
        };
        if let (State::InFlight, None, Some(carrier), true) = (state, row.carrier_xid, row.carrier, row.age_us > GRACE_US)
            && carried
        {
            end(&mut pair.mirror, carrier).await?;
        }
        entries.push(Entry { id: row.id, state, debts: row.debts });
    }
    Ok(entries)
}

async fn fetch(authority: &mut Link, after: i64) -> Result<Vec<Found>, Error> {
    let rows = authority.rows("reading the ledger", READ, &[&after, &ROWS, &BYTES]).await?;
    rows.iter()
        .map(|row| {
            let id = row.get(0);
            let backend = |pid: usize| row.get::<_, Option<i32>>(pid).map(|it| (it, row.get::<_, Option<i64>>(pid + 1).unwrap_or(0)));
            let debts: Vec<u8> = row.get(7);
            Ok(Found {
                id,
                carrier_xid: row.get(1),
                carrier: backend(2),
                incarnation: row.get(4),
                holder: backend(5),
                debts: debts::decode(debts).map_err(|source| Error::Ledger { id, source })?,
                age_us: row.get(8),
            })
        })
        .collect()
}

async fn statuses(mirror: &mut Link, xids: &[i64]) -> Result<HashMap<i64, String>, Error> {
    if xids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = mirror.rows("asking for carriers", STATUS, &[&xids]).await?;
    Ok(rows.iter().filter_map(|row| Some((row.get(0), row.get::<_, Option<String>>(1)?))).collect())
}

struct Alive(HashMap<i32, Option<i64>>);

impl Alive {
    /// A start that may not be read counts as the same.
    fn is(&self, (pid, start): Backend) -> bool {
        // backend_start went through a double before PostgreSQL 14.
        self.0.get(&pid).is_some_and(|found| found.is_none_or(|found| found.abs_diff(start) <= 10))
    }
}

async fn alive(link: &mut Link, backends: Vec<Backend>) -> Result<Alive, Error> {
    let pids: Vec<i32> = backends.iter().map(|(pid, _)| *pid).collect();
    if pids.is_empty() {
        return Ok(Alive(HashMap::new()));
    }
    let text = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint FROM pg_stat_activity WHERE pid = ANY($1)";
    let rows = link.rows("looking for backends", text, &[&pids]).await?;
    Ok(Alive(rows.iter().map(|row| (row.get(0), row.get(1))).collect()))
}

/// Its transaction can only abort: COMMIT was never sent, and its session is closed.
async fn end(mirror: &mut Link, (pid, start): Backend) -> Result<(), Error> {
    let text = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 \
                AND abs((extract(epoch FROM backend_start) * 1000000)::bigint - $2) <= 10";
    mirror.rows("ending a carrier that was given up", text, &[&pid, &start]).await?;
    Ok(())
}
