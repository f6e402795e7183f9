//! Reading the ledger: which debts are in flight, which are owed, which only wait to be cleared (C2, C4).

use std::collections::{HashMap, HashSet};

use tokio_postgres::types::{ToSql, Type};

use super::error::Error;
use super::link::At;
pub(crate) use super::rules::State;
use super::rules::{Told, state};
use crate::ledger::debts::{self, Debt};

/// A ledger row.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub id: i64,
    pub state: State,
    /// Microseconds since it was entered.
    pub age_us: i64,
    /// A carrier that was given up long enough ago to be ended.
    pub late: Option<Backend>,
    pub debts: Vec<Debt>,
    /// Why its debts cannot be read.
    pub unreadable: Option<String>,
    /// Why it is owed, where that is known.
    pub reason: Option<String>,
}

/// Rows read at once at most.
pub(crate) const ROWS: i64 = 10_000;
/// ... and bytes of debts.
const BYTES: i64 = 16 << 20;
/// A carrier that was given up is ended when its debt is older than this (microseconds): until then it may end by itself.
const GRACE_US: i64 = 1_000_000;

const READ: &str = "SELECT id, carrier_xid, carrier_pid, carrier_start, carrier_incarnation::text, holder_pid, holder_start, debts, \
    (extract(epoch FROM clock_timestamp() - at) * 1000000)::bigint, reason \
    FROM (SELECT l.*, sum(octet_length(debts)) OVER (ORDER BY id) AS total, row_number() OVER (ORDER BY id) AS nth \
    FROM (SELECT * FROM crossfade.ledger WHERE id > $1 ORDER BY id LIMIT $2::bigint) l) l WHERE total <= $3::bigint OR nth = 1 ORDER BY id";

/// A transaction that is newer than all that ended is asked for by its lock: pg_xact_status refuses an xid that was never given out.
const STATUS: &str = "SELECT x, CASE WHEN x::text::xid8 < pg_snapshot_xmax(pg_current_snapshot()) THEN pg_xact_status(x::text::xid8) \
    WHEN EXISTS (SELECT FROM pg_locks WHERE locktype = 'transactionid' AND granted AND transactionid::text = (x % 4294967296)::text) \
    THEN 'in progress' END FROM unnest($1::bigint[]) AS x";

/// A backend: its pid and start (microseconds since 1970).
pub(crate) type Backend = (i32, i64);

struct Found {
    id: i64,
    carrier_xid: Option<i64>,
    carrier: Option<Backend>,
    incarnation: Option<String>,
    holder: Option<Backend>,
    debts: Result<Vec<Debt>, Error>,
    age_us: i64,
    reason: Option<String>,
}

impl Found {
    /// One row that cannot be read must not keep the others from being paid.
    fn entry(self, state: impl FnOnce(&[Debt]) -> State) -> Entry {
        let (debts, unreadable) = match self.debts {
            Ok(debts) => (debts, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let state = if unreadable.is_some() { State::Payable } else { state(&debts) };
        Entry { id: self.id, state, age_us: self.age_us, late: None, debts, unreadable, reason: self.reason }
    }
}

/// The next rows behind id `after`, with what may be done about each, at most `rows` of them. `incarnation`: the mirror's, read before.
pub(crate) async fn read(
    authority: At<'_>,
    mirror: At<'_>,
    after: i64,
    rows: i64,
    incarnation: &str,
) -> Result<Vec<Entry>, Error> {
    let found = fetch(authority, after, rows).await?;
    let asked = |row: &&Found| row.incarnation.as_deref() == Some(incarnation);
    let xids: Vec<i64> = found.iter().filter(asked).filter_map(|row| row.carrier_xid).collect();
    // Who has not ended when it is asked for may have ended when it is looked for: it is asked first.
    let of_mirror = async {
        let status = statuses(mirror, &xids).await?;
        Ok((status, alive(mirror, found.iter().filter_map(|row| row.carrier).collect()).await?))
    };
    let of_authority = alive(authority, found.iter().filter_map(|row| row.holder).collect());
    let ((status, carriers), holders) = tokio::try_join!(of_mirror, of_authority)?;
    Ok(found
        .into_iter()
        .map(|row| {
            let answer = row
                .carrier_xid
                .filter(|_| row.incarnation.as_deref() == Some(incarnation))
                .and_then(|xid| status.get(&xid));
            let alive = row.carrier.is_some_and(|carrier| carriers.is(carrier));
            let held = row.holder.is_some_and(|holder| holders.is(holder));
            let (carrier, no_xid) = (row.carrier, row.carrier_xid.is_none());
            let state = |debts: &[Debt]| match held {
                true => State::InFlight,
                false => state(told(answer.map(String::as_str)), alive, debts.iter().any(is_whole)),
            };
            let mut entry = row.entry(state);
            // A backend that a range names is at work on it, for as long as that takes.
            let given_up = no_xid && !entry.debts.iter().any(|debt| matches!(debt, Debt::Range { .. }));
            let late = entry.state == State::InFlight && !held && given_up && entry.age_us > GRACE_US;
            entry.late = carrier.filter(|_| late);
            entry
        })
        .collect())
}

/// `answer`: what pg_xact_status says of the carrier, asked in its own incarnation.
fn told(answer: Option<&str>) -> Told {
    match answer {
        Some("in progress") => Told::InProgress,
        Some("committed") => Told::Committed,
        Some("aborted") => Told::Aborted,
        _ => Told::Nothing,
    }
}

/// Not what a carrier brings.
fn is_whole(debt: &Debt) -> bool {
    matches!(debt, Debt::Table { .. } | Debt::Taint { .. } | Debt::Range { .. })
}

/// Ends carriers that were given up and have not ended by themselves: their transactions can only abort, since COMMIT was never sent
/// and their sessions are closed. Sessions of a proxy on the mirror, and no others, whatever the ledger says: any role may write there.
pub(crate) async fn end_late(mirror: At<'_>, entries: &[Entry]) -> Result<(), Error> {
    let text = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND application_name = 'crossfade mirror' \
                AND abs((extract(epoch FROM backend_start) * 1000000)::bigint - $2) <= 10";
    let late: HashSet<Backend> = entries.iter().filter_map(|entry| entry.late).collect();
    for (pid, start) in late {
        mirror.rows("ending a carrier that was given up", text, &[&pid, &start]).await?;
    }
    Ok(())
}

async fn fetch(authority: At<'_>, after: i64, rows: i64) -> Result<Vec<Found>, Error> {
    let parameters: [(&(dyn ToSql + Sync), Type); 3] =
        [(&after, Type::INT8), (&rows, Type::INT8), (&BYTES, Type::INT8)];
    let rows = authority.typed("reading the ledger", READ, &parameters).await?;
    rows.iter()
        .map(|row| {
            let id = row.get(0);
            let backend = |at: usize| {
                row.get::<_, Option<i32>>(at).map(|pid| (pid, row.get::<_, Option<i64>>(at + 1).unwrap_or(0)))
            };
            let debts: Vec<u8> = row.get(7);
            Ok(Found {
                id,
                carrier_xid: row.get(1),
                carrier: backend(2),
                incarnation: row.get(4),
                holder: backend(5),
                debts: debts::decode(debts).map_err(|source| Error::Ledger { id, source }),
                age_us: row.get(8),
                reason: row.get(9),
            })
        })
        .collect()
}

/// Ids and debts of the next rows behind id `after`.
pub(crate) async fn fetch_debts(authority: At<'_>, after: i64) -> Result<Vec<(i64, Vec<Debt>)>, Error> {
    fetch(authority, after, ROWS).await?.into_iter().map(|row| Ok((row.id, row.debts?))).collect()
}

/// The oldest rows, where the mirror cannot be asked: a row with a carrier may be in flight.
pub(crate) async fn read_alone(authority: At<'_>, rows: i64) -> Result<Vec<Entry>, Error> {
    let found = fetch(authority, 0, rows).await?;
    let holders = alive(authority, found.iter().filter_map(|row| row.holder).collect()).await?;
    let busy = |row: &Found| row.holder.is_some_and(|holder| holders.is(holder)) || row.carrier.is_some();
    let state = |busy: bool| if busy { State::InFlight } else { State::Payable };
    Ok(found
        .into_iter()
        .map(|row| {
            let busy = busy(&row);
            row.entry(|_| state(busy))
        })
        .collect())
}

pub(super) async fn statuses(mirror: At<'_>, xids: &[i64]) -> Result<HashMap<i64, String>, Error> {
    if xids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = mirror.typed("asking for carriers", STATUS, &[(&xids, Type::INT8_ARRAY)]).await?;
    Ok(rows.iter().filter_map(|row| Some((row.get(0), row.get::<_, Option<String>>(1)?))).collect())
}

/// Backends that are there: pid and start.
struct Alive(HashMap<i32, Option<i64>>);

impl Alive {
    /// A start that we may not read counts as the same.
    fn is(&self, (pid, start): Backend) -> bool {
        // backend_start goes through a double before PostgreSQL 14.
        self.0.get(&pid).is_some_and(|found| found.is_none_or(|found| found.abs_diff(start) <= 10))
    }
}

async fn alive(at: At<'_>, backends: Vec<Backend>) -> Result<Alive, Error> {
    let pids: Vec<i32> = backends.iter().map(|(pid, _)| *pid).collect();
    if pids.is_empty() {
        return Ok(Alive(HashMap::new()));
    }
    let text =
        "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint FROM pg_stat_activity WHERE pid = ANY($1)";
    let rows = at.typed("looking for backends", text, &[(&pids, Type::INT4_ARRAY)]).await?;
    Ok(Alive(rows.iter().map(|row| (row.get(0), row.get(1))).collect()))
}
