//! Who moved, when and why, and how the gates stood: `crossfade.history`, on both sides.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::gates::{Force, Gate, Standing};
use crate::phase::{Phase, Side};
use crate::reads::tally::Recent;

/// Who asks for a move, and what for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ask {
    /// A file, a command, a user of the console; with the machine.
    pub who: String,
    /// In the operator's words.
    pub why: Option<String>,
    /// Which gates are overridden.
    pub force: Force,
    /// Transactions that last longer than `move.pause` are ended.
    pub terminate: bool,
}

impl Ask {
    /// By an edit of the file of the proxy that listens there.
    pub fn by_file(listen: std::net::SocketAddr) -> Ask {
        Ask { who: format!("the file of the proxy on {listen} ({})", machine()), ..Ask::default() }
    }
}

/// The machine's name, for people.
pub fn machine() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "unknown machine".to_owned() } else { name.trim().to_owned() }
}

/// What the history says of a move, beside phase and authority.
pub fn detail(from: Phase, ask: &Ask, gates: &[Gate]) -> Value {
    let forced: Vec<&str> =
        gates.iter().filter(|gate| gate.standing == Standing::Forced).map(|gate| gate.gate.name()).collect();
    json!({ "from": from, "who": ask.who, "why": ask.why, "forced": forced, "terminate": ask.terminate, "gates": gates })
}

/// An entry of the history.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// When, as that side's clock had it.
    pub at: String,
    /// Of which epoch.
    pub epoch: i64,
    /// `move`, `claim`, `withdrawn`, `given-up`, `backup`, `verify`.
    pub event: String,
    /// What else is known.
    pub detail: Value,
}

/// The last entries, newest first. Schema crossfade is there.
pub async fn read(client: &Client, most: i64) -> Result<Vec<Entry>, tokio_postgres::Error> {
    let text = "SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), epoch, event, detail FROM crossfade.history ORDER BY id DESC LIMIT $1";
    let rows = client.query(text, &[&most]).await?;
    let entry =
        |row: &tokio_postgres::Row| Entry { at: row.get(0), epoch: row.get(1), event: row.get(2), detail: row.get(3) };
    Ok(rows.iter().map(entry).collect())
}

/// Writes an entry that is about no row.
pub async fn note(client: &Client, epoch: u64, event: &str, detail: &Value) -> Result<(), tokio_postgres::Error> {
    let text = "INSERT INTO crossfade.history (epoch, event, detail) VALUES ($1, $2, $3)";
    client.execute(text, &[&(epoch as i64), &event, detail]).await.map(drop)
}

/// Adds how long the move to that epoch has held clients.
pub async fn paused(client: &Client, epoch: u64, pause: &Pause) -> Result<(), tokio_postgres::Error> {
    let text = "UPDATE crossfade.history SET detail = detail || $2::jsonb WHERE epoch = $1 AND event = 'move'";
    let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1000.0;
    let laps: serde_json::Map<String, Value> =
        pause.laps.iter().map(|(done, after)| ((*done).to_owned(), ms(*after).into())).collect();
    let detail = serde_json::json!({ "pause_ms": ms(pause.held), "waited_ms": ms(pause.waited), "laps_ms": laps });
    client.execute(text, &[&(epoch as i64), &detail]).await.map(drop)
}

/// How long a move has held clients.
#[derive(Clone, Debug)]
pub struct Pause {
    /// From the closing of the gate to its opening.
    pub held: Duration,
    /// Of that, until the last transaction was over that was under way on the authority.
    pub waited: Duration,
    /// What was done meanwhile, and when each was done, since the closing.
    pub laps: Vec<(&'static str, Duration)>,
}

/// How long the last move held clients, in milliseconds.
pub async fn last_pause(client: &Client) -> Result<Option<f64>, tokio_postgres::Error> {
    let text = "SELECT (detail->>'pause_ms')::float8 FROM crossfade.history WHERE event = 'move' AND detail ? 'pause_ms' ORDER BY id DESC LIMIT 1";
    Ok(client.query_opt(text, &[]).await?.and_then(|row| row.get(0)))
}

/// Seconds since the last move; None: there was none. By the clock of that server alone.
pub async fn held(client: &Client) -> Result<Option<f64>, tokio_postgres::Error> {
    let text = "SELECT extract(epoch FROM clock_timestamp() - changed)::float8 FROM crossfade.migration";
    Ok(client.query_opt(text, &[]).await?.map(|row| row.get(0)))
}

/// A backup that somebody has confirmed.
#[derive(Clone, Debug, Serialize)]
pub struct Backup {
    /// Seconds since.
    pub age: f64,
    /// Who.
    pub who: String,
    /// Where it is, in the operator's words.
    pub what: String,
}

/// The last one since that side, which is authority, has become it.
pub async fn backup(client: &Client, authority: Side) -> Result<Option<Backup>, tokio_postgres::Error> {
    let text = "SELECT extract(epoch FROM clock_timestamp() - at)::float8, coalesce(detail->>'who', ''), coalesce(detail->>'what', '') FROM crossfade.history \
        WHERE event = 'backup' AND epoch > coalesce((SELECT max(epoch) FROM crossfade.history WHERE detail->>'authority' <> $1), 0) ORDER BY id DESC LIMIT 1";
    let row = client.query_typed_opt(text, &[(&authority.name(), Type::TEXT)]).await?;
    Ok(row.map(|row| Backup { age: row.get(0), who: row.get(1), what: row.get(2) }))
}

/// Adds what a proxy has found since it was last here, of reads that it ran on both sides.
pub async fn compare(client: &Client, proxy: &str, recent: Recent) -> Result<(), tokio_postgres::Error> {
    let text = "INSERT INTO crossfade.compared AS c (proxy, minute, runs, different, failed) \
        VALUES ($1, date_trunc('minute', clock_timestamp()), $2, $3, $4) ON CONFLICT (proxy, minute) DO UPDATE SET \
        runs = c.runs + excluded.runs, different = c.different + excluded.different, failed = c.failed + excluded.failed";
    let [runs, different, failed] = [recent.runs, recent.different, recent.failed].map(|count| count as i64);
    client.execute(text, &[&proxy, &runs, &different, &failed]).await?;
    client.execute("DELETE FROM crossfade.compared WHERE minute < clock_timestamp() - interval '1 day'", &[]).await?;
    Ok(())
}

/// What all proxies have found within this time, in whole minutes. None: an older schema has no place for it.
pub async fn compared(client: &Client, within: Duration) -> Result<Option<Recent>, tokio_postgres::Error> {
    let there = "SELECT pg_catalog.to_regclass('crossfade.compared') IS NOT NULL";
    if !client.query_one(there, &[]).await?.get::<_, bool>(0) {
        return Ok(None);
    }
    let text = "SELECT coalesce(sum(runs), 0)::bigint, coalesce(sum(different), 0)::bigint, coalesce(sum(failed), 0)::bigint FROM crossfade.compared \
        WHERE minute > clock_timestamp() - $1 * interval '1 second'";
    let row = client.query_one(text, &[&within.as_secs_f64()]).await?;
    let [runs, different, failed] = [0, 1, 2].map(|at| row.get::<_, i64>(at) as u64);
    Ok(Some(Recent { runs, different, failed }))
}

/// Whether that side was authority in the stretch of mirrored phases that holds: then it had all rows.
pub async fn was_authority(client: &Client, side: Side) -> Result<bool, tokio_postgres::Error> {
    let text = "SELECT detail->>'phase' FROM crossfade.history WHERE event IN ('move', 'claim', 'withdrawn') AND detail ? 'phase' ORDER BY epoch DESC, id DESC LIMIT 1000";
    let rows = client.query_typed(text, &[]).await?;
    let phases = rows.iter().filter_map(|row| row.get::<_, String>(0).parse::<Phase>().ok());
    Ok(stretch(phases).any(|phase| phase.authority() == side))
}

/// Of phases, newest first: those since writes are mirrored.
fn stretch(phases: impl Iterator<Item = Phase>) -> impl Iterator<Item = Phase> {
    phases.take_while(|phase| phase.mirror().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_ends_where_writes_were_not_mirrored() {
        use Phase::*;
        let of = |phases: &[Phase]| stretch(phases.iter().copied()).collect::<Vec<_>>();
        assert_eq!(of(&[NewPrimary, DualWrite, Old]), [NewPrimary, DualWrite]);
        assert_eq!(of(&[NewPrimary, New, NewPrimary, DualWrite]), [NewPrimary]);
    }
}
