//! Ends what other proxies, or this one, have left open on the mirror (`migrate::late`).

use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use super::jobs::Hands;
use crate::migrate::late::{Watch, commits};
use crate::migrate::link::At;
use crate::shared::Shared;

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);

/// A look that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(5);

/// For as long as this process runs. Not a part of repair, whose passes may take hours.
pub async fn end(shared: Arc<Shared>) {
    let mut hands = Hands::default();
    let mut watch = Watch::default();
    loop {
        tokio::time::sleep(LOOK).await;
        let authority = shared.world.load().phase.authority();
        let commits = commits(shared.config.load().mirror.timeout);
        let Ok(Some((first, second))) = hands.get(&shared, "crossfade carriers").await else {
            watch = Watch::default();
            continue;
        };
        let authority = At { side: authority, client: first, patience: PATIENCE };
        let mirror = At { side: authority.side.other(), client: second, patience: PATIENCE };
        match watch.look(authority, mirror, commits).await {
            Ok(0) => {}
            Ok(_) => shared.owed.notify_one(),
            Err(error) => {
                debug!(%error, "carriers cannot be looked at");
                (hands, watch) = (Hands::default(), Watch::default());
            }
        }
    }
}
