//! `crossfade backfill`: what it is asked for, what it shows.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::{Trouble, named, what_holds};
use crate::catalog::Table;
use crate::config;
use crate::migrate;
use crate::migrate::backfill::{self, Backfill, Event, Options};
use crate::phase::{Phase, Side};
use crate::shared::{Shared, lock};
use crate::switch::mover;

/// What the command is asked for.
#[derive(clap::Args)]
pub struct BackfillArguments {
    /// These tables only (old's names). One that owes nothing is filled all the same: a table that joined later.
    #[arg(value_name = "TABLE")]
    tables: Vec<String>,
    /// The same, one at a time.
    #[arg(long = "table", value_name = "TABLE")]
    more_tables: Vec<String>,
    /// Parts of tables that are copied at once. Each takes two sessions of the authority and one of the mirror.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// Rows per second at most, over all jobs.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
    /// A server that says nothing for so many seconds is given up; it goes on with a new connection.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    patience: u64,
    /// Fills old from new, in phases in which new is the authority.
    #[arg(long)]
    reverse: bool,
}

/// `crossfade backfill`: true when all that was asked for is copied.
pub async fn backfill(path: &Path, arguments: BackfillArguments) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let holds = what_holds(&config).await?;
    let authority = holds.phase.authority();
    if arguments.reverse != (authority == Side::New) {
        let told = match authority {
            Side::New => "new is the authority: `crossfade backfill --reverse` fills old from it",
            Side::Old => "old is the authority: there is nothing on new to fill it from (leave --reverse out)",
        };
        return Err(format!("phase {}: {told}", holds.phase).into());
    }
    let before = holds.phase == Phase::Old && is_swept(&config).await?;
    let Some(mirror) = holds.phase.mirror().or(before.then_some(Side::New)) else {
        let (next, or) = match authority {
            Side::Old => ("dual-write", " (or begin with `crossfade sweep --follow`, which keeps new up to date)"),
            Side::New => ("new-primary", ""),
        };
        return Err(format!(
            "phase {}: writes are not mirrored, so what is copied would be out of date at once; set `phase: {next}`{or}, then run the backfill",
            holds.phase
        )
        .into());
    };
    let (catalog, whole) = mover::load_catalog(&config, authority).await?;
    if !whole {
        return Err(format!("{mirror} cannot be reached; nothing can be copied there").into());
    }
    let control = Shared::database(&config, authority).connect("crossfade backfill").await?;
    for side in Side::BOTH {
        let client = Shared::database(&config, side).connect("crossfade backfill").await?;
        migrate::install(&client, side).await?;
    }
    let names: Vec<&String> = arguments.tables.iter().chain(&arguments.more_tables).collect();
    let mut tables: Vec<Arc<Table>> = if names.is_empty() {
        catalog.tables.values().cloned().collect()
    } else {
        names.iter().map(|name| named(&catalog, name).cloned()).collect::<Result<_, _>>()?
    };
    tables.sort_by_key(|table| table.label());
    tables.dedup_by_key(|table| table.number);
    let tables = copyable(tables);
    let job = Backfill {
        authority_side: authority,
        authority: Shared::database(&config, authority).clone(),
        mirror: Shared::database(&config, mirror).clone(),
        catalog: Arc::new(catalog),
        first_debt: mover::draw_block(&control).await?,
    };
    let options = Options {
        jobs: arguments.jobs.into(),
        rate: arguments.rate,
        enter: before || !names.is_empty(),
        patience: Duration::from_secs(arguments.patience),
    };
    let show = Show::new(&tables);
    let run = backfill::run(&job, &tables, &options, &|event| show.tell(event)).await;
    show.end();
    run?;
    set_sequences(&job, &control).await?;
    let now = what_holds(&config).await?;
    if now != holds {
        println!("the phase has moved to {} meanwhile: what was copied for {} counts no more", now.phase, holds.phase);
    }
    Ok(now == holds)
}

/// A sweep carries over what is written on old while it is copied.
async fn is_swept(config: &config::Config) -> Result<bool, Trouble> {
    let client = Shared::database(config, Side::Old).connect("crossfade backfill").await?;
    let slot = migrate::sweep::standing(&client, Side::Old).await?;
    Ok(slot.is_some_and(|slot| slot.whole && slot.lost.is_none()))
}

/// Leaves out, and says so, what cannot be copied in chunks.
fn copyable(tables: Vec<Arc<Table>>) -> Vec<Arc<Table>> {
    let fits = |table: &Arc<Table>| {
        if let Some(why) = &table.opaque {
            println!("{}: cannot be mirrored: {why}", table.label());
        } else if table.key.is_none() {
            let name = table.label();
            println!(
                "{name}: has no key: the move copies it in its snapshot; later `crossfade repair --table {name}` does, under a lock"
            );
        }
        table.opaque.is_none() && table.key.is_some()
    };
    tables.into_iter().filter(fits).collect()
}

/// The mirror's sequences go beyond the authority's; each move sets them again, with nobody drawing.
async fn set_sequences(job: &Backfill, authority: &tokio_postgres::Client) -> Result<(), Trouble> {
    let mirror = job.mirror.connect("crossfade backfill").await?;
    let (losing, gaining) = ((job.authority_side, authority), (job.authority_side.other(), &mirror));
    let moved = migrate::sequences::sequences(losing, gaining, &job.catalog, 0).await?;
    println!("{} sequences set on {}", moved.len(), gaining.0);
    Ok(())
}

/// Between two lines about a table, where there is no terminal.
const LINE: Duration = Duration::from_secs(10);
/// A bar's length: shares in thousandths of a percent.
const WHOLE: u64 = 100_000;

/// What is shown of one table.
struct Shown {
    label: String,
    bar: Option<ProgressBar>,
    rows: u64,
    begun: Option<(Instant, f64)>,
    said: Instant,
    waits: bool,
}

/// Bars on a terminal, a line now and then elsewhere.
struct Show {
    bars: MultiProgress,
    tables: Mutex<BTreeMap<u32, Shown>>,
}

impl Show {
    fn new(tables: &[Arc<Table>]) -> Show {
        let bars = MultiProgress::new();
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let style = ProgressStyle::with_template("{prefix:30!} {bar:30} {percent:>3}%  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let shown = |table: &Arc<Table>| {
            let bar = terminal.then(|| {
                let bar = bars.add(ProgressBar::new(WHOLE).with_style(style.clone()));
                bar.set_prefix(table.label());
                bar
            });
            let shown = Shown { label: table.label(), bar, rows: 0, begun: None, said: Instant::now(), waits: false };
            (table.number, shown)
        };
        let tables = Mutex::new(tables.iter().map(shown).collect());
        Show { bars, tables }
    }

    fn tell(&self, event: Event) {
        let mut tables = lock(&self.tables);
        match event {
            Event::Rows { table, rows, share } => {
                if let Some(shown) = tables.get_mut(&table) {
                    shown.rows(rows, share);
                }
            }
            Event::Table { table, owed } => {
                if let Some(shown) = tables.get_mut(&table) {
                    shown.end(if owed { "done" } else { "owes nothing as a whole" });
                }
            }
            Event::Void { table } => {
                if let Some(shown) = tables.get_mut(&table) {
                    shown.end("its whole-table debt is gone");
                }
            }
            Event::Waits { table } => {
                if let Some(shown) = tables.get_mut(&table).filter(|shown| !shown.waits) {
                    shown.waits = true;
                    shown.say("waits for another job on it, or for the session of one that died");
                }
            }
            Event::Again { error } => {
                let line = format!("{error}; trying again");
                if self.bars.println(&line).is_err() || self.bars.is_hidden() {
                    eprintln!("{line}");
                }
            }
        }
    }

    fn end(&self) {
        for shown in lock(&self.tables).values() {
            shown.bar.iter().for_each(ProgressBar::abandon);
        }
    }
}

impl Shown {
    fn rows(&mut self, rows: u64, share: f64) {
        self.rows += rows;
        self.waits = false;
        let (begun, first) = *self.begun.get_or_insert_with(|| (Instant::now(), share));
        let seconds = begun.elapsed().as_secs_f64();
        let per_second = self.rows as f64 / seconds.max(0.1);
        let left = match share - first {
            covered if covered > 0.0 => {
                let left = Duration::from_secs((seconds * (1.0 - share) / covered) as u64);
                format!(", {} left", indicatif::HumanDuration(left))
            }
            _ => String::new(),
        };
        let line = format!("{} rows, {per_second:.0} rows/s{left}", self.rows);
        match &self.bar {
            Some(bar) => {
                bar.set_position((share * WHOLE as f64) as u64);
                bar.set_message(line);
            }
            None if self.said.elapsed() > LINE => self.say(&format!("{:.1}% of its keys, {line}", share * 100.0)),
            None => {}
        }
    }

    fn end(&mut self, how: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(WHOLE);
        }
        let rows = self.rows;
        self.say(&if rows > 0 { format!("{how}, {rows} rows") } else { how.to_owned() });
    }

    fn say(&mut self, text: &str) {
        self.said = Instant::now();
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => println!("{}: {text}", self.label),
        }
    }
}
