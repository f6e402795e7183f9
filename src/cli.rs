//! The commands. Each gives true (done), false (the answer is no), or an error (it could not run).

mod backfill;
mod check;
mod phase;
mod progress;
mod report;
mod sweep;
mod tables;
mod uninstall;
mod verify;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::catalog::{Catalog, Sides, Table};
use crate::config::{self, Config};
use crate::migrate::repair::{self, Repair};
use crate::migrate::{self, Pair, fence, late, lives};
use crate::phase::{Phase, Side};
use crate::server;
use crate::shared::Shared;
use crate::sql;
use crate::switch::mover;
use crate::switch::record;
use crate::switch::rows::{self, Holds, Verdict};

pub use backfill::{BackfillArguments, backfill};
pub use check::check;
pub use phase::{PhaseArguments, phase};
pub use report::report;
pub use sweep::{SweepArguments, sweep};
pub use uninstall::uninstall;
pub use verify::{VerifyArguments, verify};

/// Whatever a person has to be told.
pub type Trouble = Box<dyn std::error::Error + Send + Sync>;

/// `crossfade run`.
pub async fn run(path: &Path) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    logs(&config);
    server::run(path).await?;
    Ok(true)
}

fn logs(config: &Config) {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log.level)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_writer(std::io::stderr);
    if config.log.json {
        builder.json().init()
    } else {
        builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init()
    }
}

/// `crossfade demo`.
pub async fn demo(options: crate::demo::Options) -> Result<bool, Trouble> {
    let report = crate::demo::run(options).await?;
    println!("{report}");
    Ok(report.passed())
}

/// `crossfade install`.
pub async fn install(path: &Path, print_sql: bool, federate: bool) -> Result<bool, Trouble> {
    if print_sql {
        print!("{}", crate::ledger::SCHEMA_SQL);
        return Ok(true);
    }
    let config = config::load(path)?;
    for side in Side::BOTH {
        let client = Shared::database(&config, side).connect("crossfade install").await?;
        migrate::install(&client, side).await?;
        println!("{side}: schema crossfade is there");
        let lowered = if config.fence { 0 } else { fence::lower(&client, side).await? };
        if lowered > 0 {
            println!("{side}: the fence is taken from {lowered} tables");
        }
    }
    if config.federate || federate {
        self::federate(&config).await?;
    }
    if config.fence {
        let holds = what_holds(&config).await?;
        let (catalog, _) = mover::load_catalog(&config, holds.phase.authority()).await?;
        server::fence::make(&config, holds, &catalog).await?;
        let closed = holds.phase.authority().other();
        println!("the fence stands on the migrating tables of both sides; {closed} takes no writes around the proxies");
    }
    Ok(true)
}

/// What new needs to read old: each move that makes new the authority makes it anew; made now, it shows what is missing.
async fn federate(config: &Config) -> Result<(), Trouble> {
    let new = config.new.connect("crossfade install").await?;
    migrate::lazy::serve_old(&new, &config.old).await?;
    new.batch_execute("SELECT crossfade.touch_old(true)").await.map_err(|error| {
        let said = error.as_db_error().map_or_else(|| error.to_string(), |said| said.message().to_owned());
        format!(
            "new cannot read old through postgres_fdw: {said}; look at new's way to the address of old in this file"
        )
    })?;
    println!("new: reads old as the foreign server crossfade_old");
    let holds = what_holds(config).await?;
    if holds.phase.authority() == Side::Old {
        let (catalog, _) = mover::load_catalog(config, Side::Old).await?;
        migrate::lazy::make(&new, &catalog).await?;
        let count = catalog.tables.values().filter(|table| table.lazy).count();
        println!(
            "new: {count} lazy tables have merged views, but for those that gate lazy names (`crossfade phase new-primary --dry-run`)"
        );
    }
    Ok(())
}

/// What holds, from the databases themselves; a side that cannot be reached is left out.
async fn what_holds(config: &Config) -> Result<Holds, Trouble> {
    let mut found = Sides::<Option<Holds>>::default();
    let mut reached = 0;
    for side in Side::BOTH {
        match Shared::database(config, side).connect("crossfade").await {
            Ok(client) => {
                reached += 1;
                *found.get_mut(side) = rows::read(&client, side).await?;
            }
            Err(error) => eprintln!("{side} cannot be reached: {error}"),
        }
    }
    match rows::judge(found.old, found.new) {
        _ if reached == 0 => Err("neither database can be reached".into()),
        Verdict::Fresh => Ok(Holds { epoch: 0, phase: crate::phase::Phase::Old }),
        Verdict::Holds(holds) | Verdict::Unclaimed(holds) => Ok(holds),
    }
}

/// `crossfade repair`.
pub async fn repair(path: &Path, wait: bool, timeout: Duration, tables: &[String]) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let holds = what_holds(&config).await?;
    let decided = settle_split(&config, holds.phase, wait, timeout).await?;
    let Some(mirror) = holds.phase.mirror() else {
        println!("phase {}: nothing is mirrored, nothing is owed", holds.phase);
        return Ok(decided);
    };
    let authority = mirror.other();
    let (catalog, whole) = mover::load_catalog(&config, authority).await?;
    if !whole {
        return Err(format!("{mirror} cannot be reached; nothing can be paid there").into());
    }
    let first = Shared::database(&config, authority).connect("crossfade repair").await?;
    let second = Shared::database(&config, mirror).connect("crossfade repair").await?;
    let mut pair = Pair::new(authority, first, second, migrate::Settings::default()).await?;
    if !tables.is_empty() {
        lives::sure(&pair.authority.client, authority).await?;
    }
    for name in tables {
        let table = named(&catalog, name)?;
        let copied = migrate::copy::locked(&mut pair, &catalog, table).await?;
        println!("{}: {copied} rows copied", table.label());
    }
    let mut worker = Repair::new(pair, Arc::new(catalog));
    let summary = match wait {
        true => repair_all(&config, authority, &mut worker, timeout).await?,
        false => worker.pass().await?,
    };
    println!(
        "cleared {}, rows repaired {}, owed {}, in flight {}",
        summary.cleared, summary.repaired_rows, summary.owed, summary.in_flight
    );
    for (table, error) in &summary.refused {
        println!("{table}: the {mirror} database refuses rows: {error}");
    }
    Ok(decided && summary.owed == 0)
}

/// Settles transactions over both sides that were left prepared; with `wait`, until old has decided all of them. True: none is left.
async fn settle_split(config: &Config, phase: Phase, wait: bool, timeout: Duration) -> Result<bool, Trouble> {
    if phase.authority() == Side::Old {
        return Ok(true);
    }
    // Old may be gone for good, where all tables have migrated.
    let (Ok(old), Ok(new)) =
        tokio::join!(config.old.connect("crossfade repair"), config.new.connect("crossfade repair"))
    else {
        return Ok(true);
    };
    let there = "SELECT pg_catalog.to_regclass('crossfade.decided') IS NOT NULL";
    if !old.query_one(there, &[]).await?.get::<_, bool>(0) {
        return Ok(true);
    }
    let patience = Duration::from_secs(5);
    let (decider, prepared) = (
        migrate::link::At { side: Side::Old, client: &old, patience },
        migrate::link::At { side: Side::New, client: &new, patience },
    );
    let deadline = std::time::Instant::now() + timeout;
    let mut settled = 0;
    loop {
        let found = migrate::undecided::settle(decider, prepared, &config.name).await?;
        settled += found.settled;
        if found.undecided == 0 || !wait || std::time::Instant::now() > deadline {
            if settled + found.undecided > 0 {
                println!("prepared over both sides: settled {settled}, undecided {}", found.undecided);
            }
            return Ok(found.undecided == 0);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// How long definitions that have changed may go unnoticed while `repair --wait` waits.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Until nothing is owed; under definitions that are read again where they change.
async fn repair_all(
    config: &Config,
    authority: Side,
    worker: &mut Repair,
    timeout: Duration,
) -> Result<repair::Summary, Trouble> {
    let deadline = std::time::Instant::now() + timeout;
    let (mut watch, commits) = (late::Watch::default(), late::commits(config.mirror.timeout));
    loop {
        watch.look(worker.pair.authority.at(), worker.pair.mirror.at(), commits).await?;
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        match repair::wait(worker, left.min(LOOK_AGAIN)).await {
            Err(migrate::Error::Deadline(_)) if left > LOOK_AGAIN => {}
            done => return Ok(done?),
        }
        if worker.is_outdated().await? {
            let (catalog, _) = mover::load_catalog(config, authority).await?;
            worker.renew(Arc::new(catalog));
        }
    }
}

/// The migrating table of that name (old's), with or without its schema.
fn named<'c>(catalog: &'c Catalog, name: &str) -> Result<&'c Arc<Table>, Trouble> {
    let mut found = catalog.tables.values().filter(|table| table.label() == name || table.name.old == name);
    match (found.next(), found.next()) {
        (Some(table), None) => Ok(table),
        (Some(_), Some(_)) => Err(format!("{name} is the name of several tables: say which schema").into()),
        (None, _) => Err(format!("{name} is no migrating table").into()),
    }
}

/// Entries of the history that are shown.
const HISTORY: i64 = 10;

/// `crossfade status`.
pub async fn status(path: &Path, json: bool) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let holds = what_holds(&config).await?;
    let authority = holds.phase.authority();
    let proxy = match config.admin {
        Some(admin) => ask_proxy(admin, "/status").await,
        None => None,
    };
    let mut document = serde_json::json!({
        "migration": config.name,
        "phase": holds.phase,
        "epoch": holds.epoch,
        "wanted": config.phase,
        "authority": authority,
        "mirror": holds.phase.mirror(),
        "proxy": proxy,
    });
    if let Ok(client) = Shared::database(&config, authority).connect("crossfade status").await {
        // Nothing is installed before the first move.
        let history = record::read(&client, HISTORY).await.unwrap_or_default();
        document["history"] = serde_json::json!(history);
        if let Some(slot) = migrate::sweep::standing(&client, authority).await? {
            document["sweep"] =
                serde_json::json!({ "behind_bytes": slot.behind, "retained_bytes": slot.retained, "lost": slot.lost });
        }
    }
    if let Some(mirror) = holds.phase.mirror() {
        let (catalog, whole) = mover::load_catalog(&config, authority).await?;
        let client = Shared::database(&config, authority).connect("crossfade status").await?;
        let other = Shared::database(&config, mirror).connect("crossfade status").await.ok();
        let counts = migrate::debt::counts(authority, &client, other.as_ref()).await?;
        let mut tables: Vec<_> = catalog.tables.values().collect();
        tables.sort_by_key(|table| table.label());
        let verified = migrate::verify::standing(&client).await.unwrap_or_default();
        let standing = migrate::backfill::standing(&client).await.unwrap_or_default();
        document["tables"] = tables
            .iter()
            .map(|table| {
                let debt = counts.tables.get(&table.number).cloned().unwrap_or_default();
                serde_json::json!({
                    "table": table.label(), "key": table.key.is_some(), "opaque": table.opaque,
                    "backfill": standing.get(&table.number).map(|at| serde_json::json!({ "rows": at.rows, "share": at.share })),
                    "verified": verified.get(&table.number).map(|at| serde_json::json!({
                        "epoch": at.epoch, "at": at.at, "rows": at.rows, "different": at.different,
                        "equal_epoch": at.equal.map(|(epoch, _)| epoch), "equal_at": at.equal.map(|(_, at)| at),
                    })),
                    "keys_owed": debt.keys, "ranges_owed": debt.ranges, "whole_table_owed": debt.whole > 0, "tainted": debt.taints > 0, "rows_owed": debt.rows,
                })
            })
            .collect();
        document["not_migrating"] =
            serde_json::json!({ "only_old": catalog.one_sided.old, "only_new": catalog.one_sided.new });
        document["debt"] = serde_json::json!({
            "owed": counts.owed, "in_flight": counts.in_flight, "ledger_bytes": counts.ledger_bytes, "partial": counts.partial,
            "oldest_seconds": counts.oldest.map(|age| age.as_secs_f64()),
        });
        document["debt"]["why"] = why_owed(&client).await?;
        document["mirror_reachable"] = whole.into();
    }
    if authority == Side::New
        && let Ok(new) = config.new.connect("crossfade status").await
    {
        let text = "SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database = current_database() AND starts_with(gid, $1) ORDER BY prepared";
        let rows = new.query(text, &[&crate::ledger::split_prefix(&config.name)]).await?;
        let gids: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        document["in_doubt"] = serde_json::json!(gids);
    }
    if json {
        println!("{document:#}");
    } else {
        print!("{}", for_people(&document));
    }
    Ok(true)
}

/// Why debts are owed: the reason of each transaction that the mirror did not take, and what the mirror said when they were to be paid.
async fn why_owed(authority: &tokio_postgres::Client) -> Result<serde_json::Value, Trouble> {
    let text = "SELECT reason, error, count(*) FROM crossfade.ledger WHERE reason IS NOT NULL OR error IS NOT NULL \
        GROUP BY reason, error ORDER BY count(*) DESC, reason, error LIMIT 20";
    let rows = authority.query(text, &[]).await?;
    let why = |row: &tokio_postgres::Row| {
        let (reason, error): (Option<String>, Option<String>) = (row.get(0), row.get(1));
        serde_json::json!({ "reason": reason, "error": error, "transactions": row.get::<_, i64>(2) })
    };
    Ok(rows.iter().map(why).collect())
}

/// What a proxy answers to a GET of JSON.
async fn ask_proxy(admin: std::net::SocketAddr, path: &str) -> Option<serde_json::Value> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect(admin).await.ok()?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: crossfade\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    };
    tokio::time::timeout(Duration::from_secs(2), asked).await.ok()?
}

fn for_people(document: &serde_json::Value) -> String {
    let text = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut out = format!(
        "{}: phase {} (epoch {}), authority {}\n",
        text(&document["migration"]),
        text(&document["phase"]),
        document["epoch"],
        text(&document["authority"])
    );
    for gid in document["in_doubt"].as_array().into_iter().flatten() {
        out += &format!("prepared on new, and old decides: {}\n", text(gid));
    }
    if document["wanted"] != document["phase"] {
        out += &format!("the file wants {}\n", text(&document["wanted"]));
    }
    match document["proxy"].as_object() {
        Some(proxy) => {
            out += &format!("proxy: {} clients, {} transactions under way\n", proxy["clients"], proxy["transactions"]);
            for (name, key) in [("waiting for", "waiting_for"), ("the file was refused", "config_error")] {
                if let Some(why) = proxy[key].as_str() {
                    out += &format!("{name}: {why}\n");
                }
            }
        }
        None => out += "proxy: not running here, or its admin port does not answer\n",
    }
    if let Some(slot) = document["sweep"].as_object() {
        out += &match slot["lost"].as_str() {
            Some(why) => format!("sweep: its slot was given up: {why}\n"),
            None => {
                format!("sweep: {} bytes behind, {} bytes of log kept\n", slot["behind_bytes"], slot["retained_bytes"])
            }
        };
    }
    if let Some(debt) = document["debt"].as_object() {
        out += &format!(
            "debt: {} owed, {} in flight, ledger {} bytes\n",
            debt["owed"], debt["in_flight"], debt["ledger_bytes"]
        );
        for why in debt["why"].as_array().into_iter().flatten() {
            let said = why["error"].as_str().map(|error| format!(": {error}")).unwrap_or_default();
            out += &format!("  {} because {}{said}\n", why["transactions"], text(&why["reason"]));
        }
    }
    for entry in document["history"].as_array().into_iter().flatten() {
        out += &told(entry);
    }
    for table in document["tables"].as_array().into_iter().flatten() {
        let mut notes = Vec::new();
        if table["whole_table_owed"] == true {
            notes.push("whole table owed".to_owned());
        }
        if let Some(share) = table["backfill"]["share"].as_f64().filter(|share| *share < 1.0) {
            notes.push(format!("backfill at {:.1}%", share * 100.0));
        }
        if table["tainted"] == true {
            notes.push("tainted".to_owned());
        }
        for (key, what) in [("keys_owed", "keys owed"), ("ranges_owed", "ranges owed"), ("rows_owed", "rows owed")] {
            if table[key].as_u64().unwrap_or(0) > 0 {
                notes.push(format!("{} {what}", table[key]));
            }
        }
        if let Some(count) = table["verified"]["different"].as_i64().filter(|count| *count > 0) {
            notes.push(format!("{count} rows differed when it was compared"));
        }
        if table["key"] == false {
            notes.push("no key".to_owned());
        }
        if let Some(why) = table["opaque"].as_str() {
            notes.push(format!("cannot be mirrored: {why}"));
        }
        out += &format!(
            "  {}: {}\n",
            text(&table["table"]),
            if notes.is_empty() { "equal, or in flight".to_owned() } else { notes.join(", ") }
        );
    }
    out
}

/// One line of the history.
fn told(entry: &serde_json::Value) -> String {
    let detail = &entry["detail"];
    let mut line = format!(
        "  {} epoch {}: {}",
        entry["at"].as_str().unwrap_or_default(),
        entry["epoch"],
        entry["event"].as_str().unwrap_or_default()
    );
    for (before, key) in [("", "phase"), ("by ", "who"), ("because ", "why"), ("", "what"), ("", "error")] {
        if let Some(text) = detail[key].as_str() {
            line += &format!(", {before}{text}");
        }
    }
    let forced: Vec<&str> =
        detail["forced"].as_array().into_iter().flatten().filter_map(|gate| gate.as_str()).collect();
    if !forced.is_empty() {
        line += &format!(", forced {}", forced.join(" "));
    }
    if let Some(pause) = detail["pause_ms"].as_f64() {
        line += &format!(", held clients for {pause:.0} ms");
    }
    line + "\n"
}

/// `crossfade explain`.
pub async fn explain(path: &Path, text: &str) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let authority = what_holds(&config).await?.phase.authority();
    let (catalog, whole) = mover::load_catalog(&config, authority).await?;
    if !whole {
        eprintln!("{} cannot be reached: the other side's definitions stand for it", authority.other());
    }
    for statement in sql::split(text.as_bytes()) {
        let part = &text[statement.range];
        let facts = sql::read(part.as_bytes(), sql::Limits::default());
        println!("{}", crate::plan::explain(part, &facts, &catalog));
    }
    Ok(true)
}
