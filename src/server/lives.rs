//! Looks after crashes and promotions of both databases (`migrate::lives`), for as long as the proxy runs.

use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use super::jobs::Hands;
use crate::migrate::lives::{self, Begun};
use crate::phase::Side;
use crate::shared::Shared;
use crate::switch::learn::learn;
use crate::switch::mover::{self, MoveError};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);

/// Both sides, whatever the phase. What is to be looked at needs both of them; until then it stays as it is.
pub async fn watch(shared: Arc<Shared>) {
    let mut hands = Hands::default();
    loop {
        tokio::time::sleep(LOOK).await;
        if let Err(error) = look(&shared, &mut hands).await {
            debug!(%error, "the lives of the databases cannot be looked at yet");
            hands = Hands::default();
        }
    }
}

/// Looks once, for a command that would else have to wait for a proxy. A side that cannot be reached is the gates' to name.
pub async fn look_once(shared: &Arc<Shared>) {
    if let Err(error) = look(shared, &mut Hands::default()).await {
        debug!(%error, "the lives of the databases cannot be looked at yet");
    }
}

async fn look(shared: &Arc<Shared>, hands: &mut Hands) -> Result<(), MoveError> {
    let world = shared.world.load_full();
    let side = world.phase.authority();
    let (authority, other) = hands.both(shared, side.other(), "crossfade lives").await?;
    if lives::read(authority, side).await?.is_some_and(|life| life.begun().is_some()) {
        let _switching = shared.switching.lock().await;
        // It may have lost the row of the phase: what both say together holds.
        learn(shared).await?;
    }
    if world.phase.mirror().is_none() || shared.world.load().epoch != world.epoch {
        return Ok(());
    }
    if lives::read(other, side.other()).await?.is_some_and(|life| life.begun().is_some()) {
        let tables: Vec<u32> = world.catalog.tables.keys().copied().collect();
        let first = mover::draw_block(authority).await?;
        let begun = lives::mirror((side, authority), other, &tables, first, world.epoch).await?;
        note(shared, side.other(), begun);
        shared.owed.notify_one();
    }
    Ok(())
}

fn note(shared: &Shared, side: Side, begun: Option<Begun>) {
    if begun.is_some_and(|begun| begun != Begun::First) {
        shared.metrics.new_lives.with_label_values(&[side.name()]).inc();
    }
}
