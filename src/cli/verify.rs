//! `crossfade verify`: what it is asked for, what it shows.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_postgres::Client;

use super::progress::Show;
use super::tables::TableArguments;
use super::{Trouble, what_holds};
use crate::catalog::Table;
use crate::config;
use crate::migrate;
use crate::migrate::lives;
use crate::migrate::verify::{self, Event, Found, How, Options, Verify};
use crate::phase::Side;
use crate::shared::{Shared, lock};
use crate::switch::{mover, record};

/// What the command is asked for.
#[derive(clap::Args)]
pub struct VerifyArguments {
    #[command(flatten)]
    chosen: TableArguments,
    /// What differs is made equal to the authority's rows: entered as debts and paid. A table without a key is copied, and its writers wait meanwhile.
    #[arg(long)]
    repair: bool,
    /// With --repair, where the authority was promoted and may lack what it had acknowledged: what only the other side has is given up, and deleted there.
    #[arg(long, requires = "repair")]
    force: bool,
    /// Goes on where an earlier run was ended: what it saw as equal is not compared again, unless something of the table was owed since.
    #[arg(long)]
    resume: bool,
    /// One JSON document, with every row that differs.
    #[arg(long)]
    json: bool,
    /// A server that says nothing for so many seconds is given up, and a table without a key that is never at rest, too.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    patience: u64,
}

/// Rows that differ, of one table, that are shown to people.
const SHOWN: usize = 20;

/// `crossfade verify`: true when every table was compared, and nothing differs.
pub async fn verify(path: &Path, arguments: VerifyArguments) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let holds = what_holds(&config).await?;
    let authority = holds.phase.authority();
    let Some(mirror) = holds.phase.mirror() else {
        return Err(format!(
            "phase {}: writes are not mirrored, so the sides differ by what is written now; verify in a mirrored phase",
            holds.phase
        )
        .into());
    };
    let (catalog, whole) = mover::load_catalog(&config, authority).await?;
    if !whole {
        return Err(format!("{mirror} cannot be reached; nothing can be compared").into());
    }
    let control = Shared::database(&config, authority).connect("crossfade verify").await?;
    // Not again where all of it is there: clients' transactions see definitions change when it is made.
    if !verify::installed(&control).await? {
        migrate::install(&control, authority).await?;
    }
    let doubt = lives::read(&control, authority).await?.and_then(|life| life.doubt);
    if let Some(doubt) = doubt.as_ref().filter(|_| arguments.repair) {
        if !arguments.force {
            lives::sure(&control, authority).await?;
        }
        lives::believe(&control, authority).await?;
        let detail = serde_json::json!({ "side": authority, "given_up": doubt });
        record::note(&control, holds.epoch, "life", &detail).await?;
    }
    let all = arguments.chosen.all();
    let (tables, left_out): (Vec<_>, Vec<_>) =
        arguments.chosen.tables(&catalog)?.into_iter().partition(|table| table.opaque.is_none());
    let job = Verify {
        authority_side: authority,
        authority: Shared::database(&config, authority).clone(),
        mirror: Shared::database(&config, mirror).clone(),
        catalog: Arc::new(catalog),
        epoch: holds.epoch,
        first_debt: mover::draw_block(&control).await?,
    };
    let options = Options {
        jobs: arguments.chosen.jobs(),
        rate: arguments.chosen.rate,
        repair: arguments.repair,
        resume: arguments.resume,
        patience: Duration::from_secs(arguments.patience),
    };
    if let Some(seconds) = verify::begun(&control, holds.epoch).await?.filter(|_| !arguments.resume) {
        eprintln!("a run was ended {seconds:.0} s ago: --resume would have gone on there; this one begins anew");
    }
    let told = Told::new(&tables, authority, &control, arguments.json).await?;
    left_out.iter().for_each(|table| told.left_out(table));
    let run = verify::run(&job, &tables, &options, &|event| told.event(event)).await;
    told.show.iter().for_each(Show::end);
    run?;
    let now = what_holds(&config).await?;
    let equal = *lock(&told.equal) && now == holds;
    if equal && all && left_out.is_empty() && doubt.is_some() {
        lives::believe(&control, authority).await?;
    }
    if arguments.json {
        let mut tables = std::mem::take(&mut *lock(&told.documents));
        // They end in any order.
        tables.sort_by_key(|found| found["table"].as_str().map(str::to_owned));
        let document =
            serde_json::json!({ "epoch": holds.epoch, "phase": holds.phase, "equal": equal, "tables": tables });
        println!("{document:#}");
    } else if now != holds {
        println!(
            "the phase has moved to {} meanwhile: what was found for {} says nothing about it",
            now.phase, holds.phase
        );
    }
    Ok(equal)
}

/// What is told while it runs, and kept for the document.
struct Told {
    mirror: Side,
    /// Where lines are for people.
    show: Option<Show>,
    /// Rows of each table, as the authority's statistics have them, and those that were compared.
    rows: Mutex<BTreeMap<u32, (f64, u64)>>,
    documents: Mutex<Vec<serde_json::Value>>,
    equal: Mutex<bool>,
}

impl Told {
    async fn new(tables: &[Arc<Table>], authority: Side, client: &Client, json: bool) -> Result<Told, Trouble> {
        let text =
            "SELECT coalesce(sum(greatest(reltuples, 0)), 0)::float8 FROM pg_catalog.pg_class WHERE oid = ANY ($1)";
        let mut rows = BTreeMap::new();
        for table in tables {
            let mut relations = vec![*table.oid.get(authority)];
            relations.extend(table.partitions.get(authority));
            rows.insert(table.number, (client.query_one(text, &[&relations]).await?.get(0), 0));
        }
        Ok(Told {
            mirror: authority.other(),
            show: (!json).then(|| Show::new(tables, "of about all its rows")),
            rows: Mutex::new(rows),
            documents: Mutex::default(),
            equal: Mutex::new(true),
        })
    }

    fn left_out(&self, table: &Table) {
        *lock(&self.equal) = false;
        let why = table.opaque.clone().unwrap_or_default();
        if self.show.is_some() {
            println!("{}: not compared: {why}", table.label());
        }
        lock(&self.documents).push(serde_json::json!({ "table": table.label(), "not_compared": why }));
    }

    fn event(&self, event: Event<'_>) {
        match (event, &self.show) {
            (Event::Rows { table, rows }, Some(show)) => {
                let mut all = lock(&self.rows);
                let (about, done) = all.entry(table).or_default();
                *done += rows;
                show.rows(table, rows, (*done as f64 / about.max(1.0)).min(0.99));
            }
            (Event::Rows { .. }, None) => {}
            (Event::Table { table, found, .. }, show) => {
                *lock(&self.equal) &= found.is_equal();
                match show {
                    Some(show) => show.result(table.number, &lines(table, found, self.mirror)),
                    None => lock(&self.documents).push(document(table, found)),
                }
            }
        }
    }
}

fn per_second(found: &Found) -> u64 {
    (found.rows as f64 / found.took.as_secs_f64().max(1e-6)) as u64
}

fn shown(table: &Table, texts: &[String]) -> serde_json::Map<String, serde_json::Value> {
    let columns = table.key.iter().flat_map(|key| &key.columns).map(|&at| table.columns[at].name.old.clone());
    columns.zip(texts).map(|(name, text)| (name, text.as_str().into())).collect()
}

fn document(table: &Table, found: &Found) -> serde_json::Value {
    let difference = |difference: &verify::Difference| {
        let (how, columns) = match &difference.how {
            How::Missing => ("missing", &[][..]),
            How::Extra => ("extra", &[][..]),
            How::Columns(columns) => ("changed", &columns[..]),
            How::Count(counts) => {
                return serde_json::json!({ "row": difference.shown.concat(), "old": counts.old, "new": counts.new });
            }
        };
        serde_json::json!({ "key": shown(table, &difference.shown), "how": how, "columns": columns })
    };
    serde_json::json!({
        "table": table.label(), "rows": found.rows, "rows_per_second": per_second(found), "equal": found.is_equal(),
        "different": found.different.iter().map(difference).collect::<Vec<_>>(), "rows_different": found.rows_different(),
        "at_least": found.at_least, "repaired": found.repaired, "owed": found.owed, "owed_as_a_whole": found.covered, "locked": found.busy,
        "unseen": found.unseen, "compared_before": found.before,
    })
}

fn lines(table: &Table, found: &Found, mirror: Side) -> String {
    let mut out = format!("{}: {} rows", table.label(), found.rows);
    out += &match found.before {
        true => ", as an earlier run has found".to_owned(),
        false => format!(", {} rows/s", per_second(found)),
    };
    let differ = if found.at_least { "or more differ" } else { "differ" };
    for (count, what) in [
        (found.rows_different(), differ),
        (found.repaired, "repaired"),
        (found.owed, "differ and are owed"),
        (found.covered, "differ while the table is owed as a whole: repair or backfill it first"),
        (found.busy, "differ and were locked all the time"),
    ] {
        if count > 0 {
            out += &format!(", {count} {what}");
        }
    }
    if let Some(why) = &found.unseen {
        out += &format!(", not compared: {why}; try again when it is written less");
    }
    out += if found.is_equal() { ", equal\n" } else { "\n" };
    for difference in found.different.iter().take(SHOWN) {
        let row = match &difference.how {
            How::Count(_) => difference.shown.concat(),
            _ => {
                let key = shown(table, &difference.shown);
                let part = |(name, text): (&String, &serde_json::Value)| {
                    format!("{name} {}", text.as_str().unwrap_or_default())
                };
                key.iter().map(part).collect::<Vec<_>>().join(", ")
            }
        };
        out += &format!("  {row}: {}\n", difference.how.told(mirror));
    }
    if found.different.len() > SHOWN {
        out += &format!("  and {} more (--json shows all)\n", found.different.len() - SHOWN);
    }
    out
}
