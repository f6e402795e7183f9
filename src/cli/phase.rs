//! `crossfade phase`: shows the gates, or moves.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::{Trouble, what_holds};
use crate::config::{self, Config};
use crate::migrate::lives;
use crate::phase::{Phase, Side};
use crate::server;
use crate::shared::Shared;
use crate::switch::gates::evidence::look;
use crate::switch::gates::rules::Step;
use crate::switch::gates::{self, Force, Gate};
use crate::switch::learn::learn;
use crate::switch::mover::{self, MoveError, Stays};
use crate::switch::record::{self, Ask};
use crate::switch::rows::{self, Holds};

/// What the command is asked for.
#[derive(clap::Args)]
pub struct PhaseArguments {
    /// Move there. Without it: the phase that holds, and the gates of the next one.
    #[arg(value_name = "NAME")]
    name: Option<Phase>,
    /// Only show the gates, with their evidence, and how long clients would be held.
    #[arg(long)]
    dry_run: bool,
    /// Override closed gates: these (names with commas between them), or all that can be. It is kept in the history.
    #[arg(long, value_name = "GATES", num_args = 0..=1, require_equals = true, default_missing_value = "all", requires = "reason")]
    force: Option<String>,
    /// Why, in your words, for the history.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// End transactions that last longer than `move.pause`, instead of giving up.
    #[arg(long)]
    terminate: bool,
    /// Say that there is a backup of new, and where; kept in the history. Phase new asks for it.
    #[arg(long, value_name = "WHERE", conflicts_with_all = ["name", "dry_run"])]
    backup: Option<String>,
    /// Say of a side that has crashed or was promoted that its rows count as they are, where the other side is gone for good and a proxy waits for it.
    #[arg(long, value_name = "SIDE", conflicts_with_all = ["name", "dry_run", "backup"], requires = "reason")]
    accept: Option<Side>,
    /// One JSON document.
    #[arg(long)]
    json: bool,
}

/// `crossfade phase`: false where a gate is closed, or the move was given up.
pub async fn phase(path: &Path, arguments: PhaseArguments) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let force = match &arguments.force {
        Some(text) => Force::parse(text)?,
        None => Force::Nothing,
    };
    let who = format!("crossfade phase, {} on {}", user(), record::machine());
    if let Some(backup) = &arguments.backup {
        return confirm_backup(&config, &who, backup).await;
    }
    if let Some(side) = arguments.accept {
        return accept(&config, &who, side, arguments.reason.as_deref().unwrap_or_default()).await;
    }
    match arguments.name.filter(|_| !arguments.dry_run) {
        Some(name) => {
            let ask = Ask { who, why: arguments.reason, force, terminate: arguments.terminate };
            carry_out(config, name, &ask, arguments.json).await
        }
        None => show(&config, arguments.name, &force, arguments.dry_run, arguments.json).await,
    }
}

fn user() -> String {
    ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok()).unwrap_or_else(|| "somebody".to_owned())
}

async fn confirm_backup(config: &Config, who: &str, what: &str) -> Result<bool, Trouble> {
    let holds = what_holds(config).await?;
    if holds.phase.authority() != Side::New {
        println!("phase {}: new is not the authority yet; a backup counts that was taken since", holds.phase);
        return Ok(false);
    }
    let client = Shared::database(config, Side::New).connect("crossfade phase").await?;
    record::note(&client, holds.epoch, "backup", &json!({ "who": who, "what": what })).await?;
    println!("noted: a backup of new, {what}");
    Ok(true)
}

async fn accept(config: &Config, who: &str, side: Side, why: &str) -> Result<bool, Trouble> {
    let client = Shared::database(config, side).connect("crossfade phase").await?;
    let row = rows::read(&client, side).await?.unwrap_or(Holds { epoch: 0, phase: Phase::Old });
    let Some(holds) = Some(row).filter(|holds| holds.phase.authority() == side) else {
        println!("{side}: no row there says that it is the authority; nothing is to be accepted");
        return Ok(false);
    };
    let life = lives::read(&client, side).await?;
    let begun = match &life {
        Some(life) => lives::authority(&client, side, life, holds.epoch, holds.phase.mirror().is_some()).await?,
        None => None,
    };
    if begun.is_none() {
        println!("{side}: nothing has begun there that was not looked at");
        return Ok(false);
    }
    record::note(&client, holds.epoch, "life", &json!({ "side": side, "who": who, "accepted": why })).await?;
    println!("{side}: accepted as it is, phase {} (epoch {})", holds.phase, holds.epoch);
    Ok(true)
}

async fn show(config: &Config, name: Option<Phase>, force: &Force, dry_run: bool, json: bool) -> Result<bool, Trouble> {
    let holds = what_holds(config).await?;
    let want = name.unwrap_or_else(|| mover::onwards(holds.phase, config.phase));
    let step = Step { from: holds.phase, to: mover::next(holds.phase, want) };
    let none = holds.phase == want;
    let (facts, mut gates) =
        if none { (None, Vec::new()) } else { look(config, holds.epoch, step).await.map(|(f, g)| (Some(f), g))? };
    force.open(&mut gates);
    let closed = gates::closed(&gates).len();
    let estimate = facts.and_then(|facts| facts.running).map(|running| running.estimate_ms(config.moves.pause));
    if json {
        let document = json!({
            "phase": holds.phase, "epoch": holds.epoch, "authority": holds.phase.authority(), "to": step.to, "wanted": want,
            "open": closed == 0, "estimated_pause_ms": estimate, "gates": gates,
        });
        println!("{document:#}");
    } else {
        println!(
            "{}: phase {} (epoch {}), authority {}",
            config.name,
            holds.phase,
            holds.epoch,
            holds.phase.authority()
        );
        if none {
            println!("{want} holds already");
        } else {
            println!("gates of {}:", step.to);
            print!("{}", lines(&gates));
            let then =
                if step.to == want { String::new() } else { format!("; {want} comes after it, with gates of its own") };
            let estimate =
                estimate.map_or_else(String::new, |ms| format!("; it would hold clients for about {ms:.0} ms"));
            println!("{closed} closed{estimate}{then}");
        }
    }
    // Without a name nothing was asked that could be answered with no.
    Ok(closed == 0 || !(dry_run || name.is_some()))
}

fn lines(gates: &[Gate]) -> String {
    gates.iter().map(|gate| format!("  {:<13} {:<13} {gate}\n", gate.standing.name(), gate.gate)).collect()
}

async fn carry_out(config: Config, want: Phase, ask: &Ask, json: bool) -> Result<bool, Trouble> {
    let (name, file) = (config.name.clone(), config.phase);
    let shared = Arc::new(server::share(config)?);
    learn(&shared).await?;
    server::lives::look_once(&shared).await;
    let mut steps = Vec::new();
    let stays = loop {
        let holds = shared.world.load().phase;
        if holds == want {
            break None;
        }
        match mover::step(&shared, want, ask).await {
            Ok(phase) => {
                if !json {
                    println!("{name}: {holds} -> {phase}");
                }
                steps.push(phase);
            }
            Err(stays) => break Some(stays),
        }
    };
    let holds = shared.world.load().phase;
    match stays {
        Some(Stays { error: MoveError::Closed(_) | MoveError::Held(_) | MoveError::Overtaken { .. }, .. }) | None => {}
        Some(Stays { error, .. }) => return Err(error.into()),
    }
    if json {
        let (error, gates) = stays.as_ref().map(|stays| (stays.error.to_string(), &stays.gates)).unzip();
        let document = json!({ "phase": holds, "epoch": shared.world.load().epoch, "moved": steps, "error": error, "gates": gates });
        println!("{document:#}");
    } else if let Some(stays) = &stays {
        print!("{}", lines(&stays.gates));
        println!("{name}: phase {holds} stays: {}", stays.error);
    } else if file != want {
        println!("the file says {file}: write {want} there too, or a lone proxy that starts again goes back to {file}");
    }
    Ok(stays.is_none())
}
