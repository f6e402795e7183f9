//! Settles what a proxy that died has left prepared (`migrate::undecided`): at the start and all the time.

use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use super::jobs::Hands;
use crate::migrate::link::At;
use crate::migrate::undecided;
use crate::phase::Side;
use crate::shared::Shared;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(500);

/// A look that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(5);

/// For as long as this process runs, in phases in which transactions may be split.
pub async fn settle(shared: Arc<Shared>) {
    let mut hands = Hands::default();
    loop {
        if shared.world.load().splits() {
            match look(&shared, &mut hands).await {
                Ok(settled) => shared.metrics.in_doubt.set(settled.undecided as i64),
                Err(error) => {
                    debug!(%error, "prepared transactions cannot be settled");
                    hands = Hands::default();
                }
            }
        } else {
            shared.metrics.in_doubt.set(0);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn look(shared: &Arc<Shared>, hands: &mut Hands) -> Result<undecided::Settled, String> {
    let (new, old) = hands.both(shared, Side::Old, "crossfade undecided").await.map_err(|error| error.to_string())?;
    let decider = At { side: Side::Old, client: old, patience: PATIENCE };
    let prepared = At { side: Side::New, client: new, patience: PATIENCE };
    let settled = undecided::settle(decider, prepared, &shared.config.load().name).await;
    if settled.as_ref().is_ok_and(|settled| settled.settled > 0) {
        // What was mirrored by a transaction that was settled here is owed.
        shared.owed.notify_one();
    }
    settled.map_err(|error| error.to_string())
}
