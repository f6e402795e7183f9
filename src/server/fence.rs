//! The fence around the side that is not the authority, made and kept for as long as the file asks for it.

use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use crate::catalog::Catalog;
use crate::config::Config;
use crate::migrate::{self, fence};
use crate::phase::Side;
use crate::shared::{Shared, World};
use crate::switch::mover::{self, MoveError};
use crate::switch::rows::Holds;

/// How often it is looked at whether there is something to do.
const LOOK: Duration = Duration::from_secs(1);

/// Definitions that change in a phase without a mirror are told by nobody.
const AGAIN: Duration = Duration::from_secs(60);

/// Where the file says `fence: true`: each migrating table has its trigger, and each side is closed or open. Moves turn it round by themselves.
pub async fn keep(shared: Arc<Shared>) {
    let mut done: Option<(u64, tokio::time::Instant)> = None;
    let mut said = String::new();
    loop {
        let (config, world) = (shared.config.load_full(), shared.world.load_full());
        let stands =
            |(generation, at): (u64, tokio::time::Instant)| generation == world.generation && at.elapsed() < AGAIN;
        if !config.fence {
            done = None;
        } else if !done.is_some_and(stands) {
            match stand(&config, &world).await {
                Ok(made) => {
                    if made > 0 {
                        info!(
                            tables = made,
                            "the fence stands: writes around the proxies are kept out of the side that is not the authority"
                        );
                    }
                    done = Some((world.generation, tokio::time::Instant::now()));
                    said.clear();
                }
                Err(error) => {
                    let error = error.to_string();
                    if error != said {
                        warn!(%error, "the fence does not stand everywhere; it is tried again");
                        said = error;
                    }
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn stand(config: &Config, world: &World) -> Result<u64, MoveError> {
    let holds = Holds { epoch: world.epoch, phase: world.phase };
    match world.phase.mirror() {
        Some(_) => make(config, holds, &world.catalog).await,
        None => make(config, holds, &mover::load_catalog(config, world.phase.authority()).await?.0).await,
    }
}

/// Makes what is missing on both sides of these tables, in this epoch; returns how many triggers.
pub async fn make(config: &Config, holds: Holds, catalog: &Catalog) -> Result<u64, MoveError> {
    let mut made = 0;
    for side in Side::BOTH {
        let client = Shared::database(config, side).connect("crossfade fence").await?;
        if holds.phase.mirror().is_none() {
            // A mirror has it.
            migrate::install(&client, side).await?;
        }
        let tables: Vec<u32> = catalog.tables.values().flat_map(|table| table.oids(side)).collect();
        made += fence::raise(&client, side, &tables).await?;
        fence::stand(&client, side, holds.epoch, holds.phase.authority()).await?;
    }
    Ok(made)
}
