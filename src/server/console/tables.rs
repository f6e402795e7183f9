//! What SHOW answers with: tables of text.

use std::sync::atomic::Ordering;

use super::command::{HELP, Show};
use crate::config::Config;
use crate::migrate;
use crate::phase::{Phase, Side};
use crate::shared::{Shared, lock};
use crate::switch::gates::evidence::look;
use crate::switch::gates::rules::Step;
use crate::switch::gates::{self, Force};
use crate::switch::{mover, record};

/// Rows under columns; None is NULL.
pub struct Table {
    /// Names of the columns.
    pub columns: &'static [&'static str],
    /// As many values in each row.
    pub rows: Vec<Vec<Option<String>>>,
}

/// Of SHOW GATES.
pub const GATES: [&str; 6] = ["phase", "gate", "table", "standing", "evidence", "next"];

/// Entries of the history that are shown.
const HISTORY: i64 = 100;

/// The columns of an answer.
pub fn columns(show: Show) -> &'static [&'static str] {
    match show {
        Show::Phase => &["migration", "phase", "epoch", "authority", "mirror", "file", "waiting_for", "paused"],
        Show::Gates(_) => &GATES,
        Show::Tables => &["table", "key", "cannot_be_mirrored"],
        Show::Clients => &["side", "server_pid", "role", "application_name", "state", "transaction_seconds"],
        Show::Servers => &["side", "addresses", "database", "sessions", "up"],
        Show::Proxies => &["id", "listen", "live"],
        Show::Debt => &["table", "keys", "ranges", "whole", "taints", "rows"],
        Show::Shapes => &[
            "count",
            "shape",
            "tables",
            "mirrored",
            "opaque",
            "served_by_new",
            "stays_because",
            "compared",
            "different",
        ],
        Show::Stats | Show::Config => &["name", "value"],
        Show::History => &["at", "epoch", "event", "phase", "who", "why", "forced", "pause_ms", "error"],
        Show::Version => &["version"],
        Show::Help => &["command", "does"],
    }
}

/// Answers a SHOW. Err: in words.
pub async fn show(shared: &Shared, show: Show) -> Result<Table, String> {
    let config = shared.config.load_full();
    let text = |value: &dyn ToString| Some(value.to_string());
    let rows = match show {
        Show::Phase => vec![phase(shared, &config)],
        Show::Gates(phase) => return gates(shared, phase, &Force::Nothing).await,
        Show::Tables => tables(shared),
        Show::Clients => clients(shared, &config).await?,
        Show::Servers => Side::BOTH.into_iter().map(|side| server(shared, &config, side)).collect(),
        Show::Proxies => proxies(shared, &config).await?,
        Show::Debt => debt(shared, &config).await?,
        Show::Shapes => shapes(shared),
        Show::Stats => stats(shared),
        Show::Config => settings(shared, &config),
        Show::History => history(shared, &config).await?,
        Show::Version => vec![vec![text(&format!("Crossfade {}", env!("CARGO_PKG_VERSION")))]],
        Show::Help => HELP.iter().map(|(command, does)| vec![text(command), text(does)]).collect(),
    };
    Ok(Table { columns: columns(show), rows })
}

/// What `crossfade report` has, in short.
fn shapes(shared: &Shared) -> Vec<Vec<Option<String>>> {
    let report = crate::server::report::report(shared);
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::Null => None,
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Array(values) => {
            Some(values.iter().filter_map(|value| value.as_str()).collect::<Vec<_>>().join(", "))
        }
        other => Some(other.to_string()),
    };
    let names = ["count", "shape", "tables", "mirrored", "opaque", "served_by_new", "stays_because"];
    let row = |shape: &serde_json::Value| {
        let mut row: Vec<Option<String>> = names.iter().map(|name| text(&shape[*name])).collect();
        row.extend(["runs", "different"].map(|name| text(&shape["compared"][name])));
        row
    };
    report["shapes"].as_array().into_iter().flatten().map(row).collect()
}

/// The gates of the next step on the way to a phase.
pub async fn gates(shared: &Shared, to: Option<Phase>, force: &Force) -> Result<Table, String> {
    let (config, world) = (shared.config.load_full(), shared.world.load_full());
    let want = to.unwrap_or_else(|| mover::onwards(world.phase, config.phase));
    if want == world.phase {
        return Ok(Table { columns: &GATES, rows: Vec::new() });
    }
    let step = Step { from: world.phase, to: mover::next(world.phase, want) };
    let (_, mut gates) = look(&config, world.epoch, step).await.map_err(|error| error.to_string())?;
    force.open(&mut gates);
    let row = |gate: gates::Gate| {
        let standing = gate.standing.name().to_owned();
        vec![
            Some(step.to.to_string()),
            Some(gate.gate.to_string()),
            gate.table,
            Some(standing),
            Some(gate.evidence),
            gate.next,
        ]
    };
    Ok(Table { columns: &GATES, rows: gates.into_iter().map(row).collect() })
}

fn phase(shared: &Shared, config: &Config) -> Vec<Option<String>> {
    let world = shared.world.load();
    vec![
        Some(config.name.clone()),
        Some(world.phase.to_string()),
        Some(world.epoch.to_string()),
        Some(world.phase.authority().to_string()),
        world.phase.mirror().map(|side| side.to_string()),
        Some(config.phase.to_string()),
        lock(&shared.waiting).clone(),
        Some(shared.gate.is_paused().to_string()),
    ]
}

fn tables(shared: &Shared) -> Vec<Vec<Option<String>>> {
    let world = shared.world.load();
    let mut tables: Vec<_> = world.catalog.tables.values().collect();
    tables.sort_by_key(|table| table.label());
    let key = |table: &crate::catalog::Table| {
        let names = table.key.iter().flat_map(|key| &key.columns).map(|&at| table.columns[at].name.old.clone());
        table.key.is_some().then(|| names.collect::<Vec<_>>().join(", "))
    };
    tables.into_iter().map(|table| vec![Some(table.label()), key(table), table.opaque.clone()]).collect()
}

async fn authority(shared: &Shared, config: &Config) -> Result<(Side, tokio_postgres::Client), String> {
    let side = shared.world.load().phase.authority();
    let client = Shared::database(config, side).connect("crossfade console").await;
    client.map(|client| (side, client)).map_err(|error| error.to_string())
}

async fn clients(shared: &Shared, config: &Config) -> Result<Vec<Vec<Option<String>>>, String> {
    let mut rows = Vec::new();
    let text = "SELECT pid::text, usename::text, application_name, state, round(extract(epoch FROM clock_timestamp() - xact_start)::numeric, 3)::text \
        FROM pg_catalog.pg_stat_activity WHERE pid = ANY ($1) ORDER BY backend_start";
    for side in Side::BOTH {
        let pids = shared.cancels.pids(side);
        if pids.is_empty() {
            continue;
        }
        let client =
            Shared::database(config, side).connect("crossfade console").await.map_err(|error| error.to_string())?;
        for row in client.query(text, &[&pids]).await.map_err(|error| error.to_string())? {
            let values = (0..5).map(|at| row.get::<_, Option<String>>(at));
            rows.push(std::iter::once(Some(side.to_string())).chain(values).collect());
        }
    }
    Ok(rows)
}

fn server(shared: &Shared, config: &Config, side: Side) -> Vec<Option<String>> {
    let database = Shared::database(config, side);
    let hosts: Vec<String> = database.hosts.iter().map(|(host, port)| format!("{host}:{port}")).collect();
    vec![
        Some(side.to_string()),
        Some(hosts.join(",")),
        Some(database.database.clone()),
        Some(shared.metrics.servers(side).get().to_string()),
        Some(shared.health.get(side).up().to_string()),
    ]
}

async fn proxies(shared: &Shared, config: &Config) -> Result<Vec<Vec<Option<String>>>, String> {
    let (_, client) = authority(shared, config).await?;
    let text = "SELECT p.id, p.listen, (a.pid IS NOT NULL)::text FROM crossfade.proxies p LEFT JOIN pg_catalog.pg_stat_activity a \
        ON a.pid = p.pid AND a.backend_start IS NOT DISTINCT FROM p.start ORDER BY p.listen, p.id";
    let rows = client.query(text, &[]).await.map_err(|error| error.to_string())?;
    Ok(rows.iter().map(|row| (0..3).map(|at| row.get(at)).collect()).collect())
}

async fn debt(shared: &Shared, config: &Config) -> Result<Vec<Vec<Option<String>>>, String> {
    let world = shared.world.load_full();
    let Some(mirror) = world.phase.mirror() else { return Ok(Vec::new()) };
    let (side, client) = authority(shared, config).await?;
    let other = Shared::database(config, mirror).connect("crossfade console").await.ok();
    let counts = migrate::debt::counts(side, &client, other.as_ref()).await.map_err(|error| error.to_string())?;
    let row = |(number, debt): (&u32, &migrate::debt::TableDebt)| {
        let label = world.catalog.tables.get(number).map_or_else(|| format!("table {number}"), |table| table.label());
        let counts = [debt.keys, debt.ranges, debt.whole, debt.taints, debt.rows];
        std::iter::once(Some(label)).chain(counts.map(|count| Some(count.to_string()))).collect()
    };
    Ok(counts.tables.iter().map(row).collect())
}

fn stats(shared: &Shared) -> Vec<Vec<Option<String>>> {
    let text = shared.metrics.text();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(name, value)| vec![Some(name.into()), Some(value.into())])
        .collect()
}

/// Never a password.
fn settings(shared: &Shared, config: &Config) -> Vec<Vec<Option<String>>> {
    let about = |database: &crate::config::Database| format!("{database:?}");
    let said = [
        ("name", config.name.clone()),
        ("listen", config.listen.to_string()),
        ("admin", config.admin.map_or_else(String::new, |admin| admin.to_string())),
        ("old", about(&config.old)),
        ("new", about(&config.new)),
        ("phase", config.phase.to_string()),
        ("fleet", config.fleet.to_string()),
        ("mirror", format!("{:?}", config.mirror)),
        ("move", format!("{:?}", config.moves)),
        ("expect", format!("{:?}", config.expect)),
        ("limits", format!("{:?}", config.limits)),
        ("admins", config.admins.join(", ")),
        ("definition", config.definition()),
        ("ready", shared.ready.load(Ordering::SeqCst).to_string()),
    ];
    let mut rows: Vec<_> = said.into_iter().map(|(name, value)| vec![Some(name.to_owned()), Some(value)]).collect();
    rows.push(vec![Some("refused".to_owned()), lock(&shared.config_error).clone()]);
    rows
}

async fn history(shared: &Shared, config: &Config) -> Result<Vec<Vec<Option<String>>>, String> {
    let (_, client) = authority(shared, config).await?;
    let entries = record::read(&client, HISTORY).await.map_err(|error| error.to_string())?;
    let row = |entry: record::Entry| {
        let text = |name: &str| entry.detail[name].as_str().map(str::to_owned);
        let forced = entry.detail["forced"]
            .as_array()
            .map(|gates| gates.iter().filter_map(|gate| gate.as_str()).collect::<Vec<_>>().join(" "));
        let pause = entry.detail["pause_ms"].as_f64().map(|ms| format!("{ms:.1}"));
        let phase = text("phase").or_else(|| text("to"));
        vec![
            Some(entry.at.clone()),
            Some(entry.epoch.to_string()),
            Some(entry.event.clone()),
            phase,
            text("who"),
            text("why").or_else(|| text("what")),
            forced,
            pause,
            text("error"),
        ]
    };
    Ok(entries.into_iter().map(row).collect())
}
