//! `crossfade backfill`: what it is asked for, what it shows.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::progress::Show;
use super::tables::TableArguments;
use super::{Trouble, what_holds};
use crate::catalog::Table;
use crate::config;
use crate::migrate;
use crate::migrate::backfill::{self, Backfill, Event, Options};
use crate::migrate::lives;
use crate::phase::{Phase, Side};
use crate::shared::Shared;
use crate::switch::mover;
use crate::switch::rows::Holds;

/// What the command is asked for. A table that is named and owes nothing is filled all the same: one that joined later.
#[derive(clap::Args)]
pub struct BackfillArguments {
    #[command(flatten)]
    chosen: TableArguments,
    /// A server that says nothing for so many seconds is given up; it goes on with a new connection.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    patience: u64,
    /// Drops indexes of the tables that are filled, and makes them again when all is copied: not unique ones, nor those of constraints. A run that
    /// is killed in between leaves them to the next; `crossfade check` names what is missing.
    #[arg(long)]
    rebuild_indexes: bool,
    /// Fills old from new, in phases in which new is the authority.
    #[arg(long)]
    reverse: bool,
}

/// It rests while a standby is further behind, where the file's `expect.lag` says nothing.
const LAG: Duration = Duration::from_secs(10);

/// Of a lazy table it says how far it is after so many rows.
const TOLD: u64 = 100_000;

/// `crossfade backfill`: true when all that was asked for is copied.
pub async fn backfill(path: &Path, arguments: BackfillArguments) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let holds = what_holds(&config).await?;
    let authority = holds.phase.authority();
    if holds.phase == Phase::NewPrimary && !arguments.reverse && config.federate {
        return complete(&config, holds, &arguments).await;
    }
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
    lives::sure(&control, authority).await?;
    let mut tables = copyable(arguments.chosen.tables(&catalog)?);
    if authority == Side::Old && !arguments.chosen.any_named() {
        // Their rows come over when they are written; by name they are filled now.
        tables.retain(|table| !table.lazy);
    }
    let job = Backfill {
        authority_side: authority,
        authority: Shared::database(&config, authority).clone(),
        mirror: Shared::database(&config, mirror).clone(),
        catalog: Arc::new(catalog),
        first_debt: mover::draw_block(&control).await?,
    };
    let options = Options {
        jobs: arguments.chosen.jobs(),
        rate: arguments.chosen.rate,
        enter: before || arguments.chosen.any_named(),
        rebuild_indexes: arguments.rebuild_indexes,
        lag: config.expect.lag.unwrap_or(LAG),
        patience: Duration::from_secs(arguments.patience),
    };
    let show = Show::new(&tables, "of its keys");
    let run = backfill::run(&job, &tables, &options, &|event| tell(&show, event)).await;
    show.end();
    run?;
    set_sequences(&job, &control).await?;
    let now = what_holds(&config).await?;
    if now != holds {
        println!("the phase has moved to {} meanwhile: what was copied for {} counts no more", now.phase, holds.phase);
    }
    Ok(now == holds)
}

/// What only old has of lazy tables, while new is the authority already. True when nothing is left there.
async fn complete(config: &config::Config, holds: Holds, arguments: &BackfillArguments) -> Result<bool, Trouble> {
    let (catalog, _) = mover::load_catalog(config, Side::New).await?;
    let chosen = arguments.chosen.tables(&catalog)?;
    let tables: Vec<Arc<Table>> = chosen.into_iter().filter(|table| table.lazy).collect();
    if tables.is_empty() {
        println!(
            "phase {}: no table of these has rows on old alone (`crossfade backfill --reverse` fills old)",
            holds.phase
        );
        return Ok(true);
    }
    let new = config.new.connect("crossfade backfill").await?;
    let show = Show::new(&tables, "of its rows");
    let mut whole = true;
    for table in &tables {
        let mut told = 0;
        let mut progress = |rows| {
            if rows >= told + TOLD {
                told = rows;
                show.said(table.number, &format!("{rows} rows brought over"));
            }
        };
        let filled = migrate::lazy::fill(&new, table, holds.epoch, &mut progress).await;
        match filled {
            Ok(rows) => show.done(table.number, &format!("complete: {rows} rows brought over, none is on old alone")),
            Err(error) => {
                whole = false;
                show.line(&format!("{}: {error}", table.label()));
            }
        }
    }
    show.end();
    Ok(whole)
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

fn tell(show: &Show, event: Event) {
    match event {
        Event::Rows { table, rows, share } => show.rows(table, rows, share),
        Event::Table { table, owed } => show.done(table, if owed { "done" } else { "owes nothing as a whole" }),
        Event::Void { table } => show.done(table, "its whole-table debt is gone"),
        Event::Waits { table } => show.waits(table, "waits for another job on it, or for the session of one that died"),
        Event::Shut { table } => show.waits(table, "waits for whoever has it locked on the side that is filled"),
        Event::Index { table, what } => show.said(table, &what),
        Event::Standbys { side, what } => show.line(&format!("{side}: {what}")),
        Event::Again { error } => show.line(&format!("{error}; trying again")),
    }
}
