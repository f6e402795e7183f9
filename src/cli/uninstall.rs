//! `crossfade uninstall`: the end of a migration.

use std::path::Path;
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::{Trouble, what_holds};
use crate::config;
use crate::migrate::sweep::slot;
use crate::migrate::{self, install};
use crate::phase::Side;
use crate::shared::Shared;

/// A server needs a moment to end the sessions of a process that has ended.
const LEAVING: Duration = Duration::from_secs(3);

/// Who still uses the schema there.
async fn at_work(client: &Client, side: Side) -> Result<Vec<String>, migrate::Error> {
    let deadline = Instant::now() + LEAVING;
    loop {
        let found = install::at_work(client, side).await?;
        if found.is_empty() || Instant::now() > deadline {
            return Ok(found);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// `crossfade uninstall`: removes schema crossfade on both sides. False: something still needs it, and `force` is not given.
pub async fn uninstall(path: &Path, force: bool) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let holds = what_holds(&config).await?;
    let authority = holds.phase.authority();
    let mut needed = false;
    if let Some(mirror) = holds.phase.mirror() {
        println!(
            "phase {}: writes are mirrored to {mirror}, and the schema keeps what it lacks; move to old or to new first",
            holds.phase
        );
        needed = true;
    }
    // The authority's row is the one that is believed: it goes last.
    let mut clients = Vec::new();
    for side in [authority.other(), authority] {
        let client = Shared::database(&config, side).connect("crossfade uninstall").await?;
        let at_work = at_work(&client, side).await?;
        if !at_work.is_empty() {
            println!("{side}: in use by {}: end the proxy and its jobs first", at_work.join(", "));
            needed = true;
        }
        for index in migrate::backfill::dropped(&client, side, None).await? {
            println!(
                "{side}: a backfill has dropped index {} and not made it again; run it to its end, or: {};",
                index.name, index.definition
            );
            needed = true;
        }
        match install::kept(&client, side).await? {
            Some(kept) if !kept.is_empty() => println!("{side}: schema crossfade holds {}", kept.join(", ")),
            Some(_) => {}
            None => println!("{side}: schema crossfade is not there"),
        }
        clients.push((side, client));
    }
    if needed && !force {
        println!("nothing was removed; --force removes it all the same, and with it what is listed here");
        return Ok(false);
    }
    for (side, client) in &clients {
        if slot::end(client, *side).await? {
            println!("{side}: the sweep's slot is dropped");
        }
        install::uninstall(client, *side).await?;
        println!("{side}: schema crossfade is removed");
    }
    if holds.phase.authority() == Side::New {
        println!(
            "new is the authority: the application's connection string must name it, since a proxy that starts now knows of no phase but its file's"
        );
    }
    Ok(true)
}
