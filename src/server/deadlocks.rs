//! Deadlocks across both databases: a client's transaction that is open on both sides waits on one for a transaction that waits for it on the other. Neither
//! server sees more than its half. After a while one of them is ended, with 40P01, as a server would do (C11).
//!
//! Which two server sessions are one client's is to be read on old: the one there holds an advisory lock that names the one on new (`session::legs`), so that all
//! proxies see the same, and end the same one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Client;
use tracing::{debug, info};

use super::jobs::Hands;
use crate::phase::Side;
use crate::shared::{PAIR_CLASS, Shared, lock};

/// How often it is looked; what is seen twice in a row is a deadlock. A server's own deadlock_timeout is a second.
const LOOK: Duration = Duration::from_millis(500);

/// Who waits for a lock, and for whom.
const WAITING: &str = "SELECT pid, pg_catalog.pg_blocking_pids(pid) FROM pg_catalog.pg_stat_activity \
    WHERE datname = pg_catalog.current_database() AND wait_event_type = 'Lock'";

/// Sessions on old, and those on new that are the same client's.
const PAIRS: &str = "SELECT pid, objid::int8::int4 FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND classid::int8 = $1 AND objsubid = 2 AND granted \
    AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";

const CANCEL: &str = "SELECT pg_catalog.pg_cancel_backend(pid) FROM pg_catalog.pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Lock'";

/// A server session.
type Session = (Side, i32);

/// For as long as this process runs, in phases in which transactions may be open on both sides.
pub async fn watch(shared: Arc<Shared>) {
    let mut hands = Hands::default();
    let mut before = BTreeSet::new();
    loop {
        tokio::time::sleep(LOOK).await;
        if !shared.world.load().splits() {
            before.clear();
            continue;
        }
        match look(&shared, &mut hands, &before).await {
            Ok(found) => before = found,
            Err(error) => {
                debug!(%error, "waits cannot be looked at");
                hands = Hands::default();
            }
        }
    }
}

/// The sessions that would have to end now; those that were found before, too, are ended where they are ours.
async fn look(
    shared: &Arc<Shared>,
    hands: &mut Hands,
    before: &BTreeSet<Session>,
) -> Result<BTreeSet<Session>, String> {
    let (new, old) = hands.both(shared, Side::Old, "crossfade deadlocks").await.map_err(|error| error.to_string())?;
    let mut waits = Waits::default();
    for row in old.query(PAIRS, &[&i64::from(PAIR_CLASS)]).await.map_err(|error| error.to_string())? {
        waits.pairs.insert(row.get(0), row.get(1));
    }
    if waits.pairs.is_empty() {
        return Ok(BTreeSet::new());
    }
    waits.read(Side::Old, old).await?;
    waits.read(Side::New, new).await?;
    let found = waits.victims();
    for (side, pid) in found.intersection(before) {
        if shared.cancels.pids(*side).contains(pid) {
            lock(&shared.deadlocked).insert((*side, *pid));
            let client = if *side == Side::Old { old } else { new };
            client.execute(CANCEL, &[pid]).await.map_err(|error| error.to_string())?;
            info!(%side, pid, "a deadlock across both databases: one of its transactions is ended");
        }
    }
    Ok(found)
}

/// Who waits for whom.
#[derive(Default)]
struct Waits {
    /// Sessions on old to the same client's on new.
    pairs: BTreeMap<i32, i32>,
    edges: BTreeMap<Session, BTreeSet<Session>>,
    /// The session in which a client waits: edges are between clients.
    waiting: BTreeMap<Session, Session>,
}

impl Waits {
    async fn read(&mut self, side: Side, client: &Client) -> Result<(), String> {
        for row in client.query(WAITING, &[]).await.map_err(|error| error.to_string())? {
            self.waits(side, row.get(0), row.get(1));
        }
        Ok(())
    }

    /// A client is known by its session on new, where it has one.
    fn client(&self, side: Side, pid: i32) -> Session {
        match self.pairs.get(&pid) {
            Some(new) if side == Side::Old => (Side::New, *new),
            _ => (side, pid),
        }
    }

    fn waits(&mut self, side: Side, pid: i32, blocking: Vec<i32>) {
        let client = self.client(side, pid);
        self.waiting.insert(client, (side, pid));
        // Prepared transactions block as number 0: they wait for nobody.
        let blocking: Vec<Session> =
            blocking.into_iter().filter(|pid| *pid != 0).map(|pid| self.client(side, pid)).collect();
        self.edges.entry(client).or_default().extend(blocking);
    }

    /// One session of each circle that goes over both sides, in which it waits: the last by its number, so that all who look choose the same.
    fn victims(&self) -> BTreeSet<Session> {
        let mut victims = BTreeSet::new();
        for start in self.edges.keys() {
            let reached = self.reached(start);
            let circle: BTreeSet<&Session> =
                reached.iter().filter(|other| self.reached(other).contains(start)).collect();
            let waits: Vec<&Session> = circle.iter().filter_map(|client| self.waiting.get(client)).collect();
            let sides: BTreeSet<Side> = waits.iter().map(|(side, _)| *side).collect();
            if sides.len() == 2
                && let Some(last) = circle.iter().next_back().and_then(|client| self.waiting.get(client))
            {
                victims.insert(*last);
            }
        }
        victims
    }

    fn reached(&self, start: &Session) -> BTreeSet<Session> {
        let mut found = BTreeSet::new();
        let mut open = vec![*start];
        while let Some(next) = open.pop() {
            open.extend(self.edges.get(&next).into_iter().flatten().filter(|other| found.insert(**other)));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(pairs: &[(i32, i32)], waits: &[(Side, i32, i32)]) -> BTreeSet<Session> {
        let mut found = Waits { pairs: pairs.iter().copied().collect(), ..Waits::default() };
        for (side, pid, blocking) in waits {
            found.waits(*side, *pid, vec![*blocking]);
        }
        found.victims()
    }

    #[test]
    fn only_circles_over_both_sides_have_a_victim() {
        use Side::{New, Old};
        let pairs = [(11, 21), (12, 22)];
        // 1 waits on new for 2, which waits on old for 1.
        assert_eq!(waits(&pairs, &[(New, 21, 22), (Old, 12, 11)]), BTreeSet::from([(Old, 12)]));
        // No circle: 3 is only on old, and waits for nobody.
        assert_eq!(waits(&pairs, &[(New, 21, 22), (Old, 12, 13)]), BTreeSet::new());
        // The same numbers on both sides are not the same sessions.
        assert_eq!(waits(&[], &[(New, 21, 22), (Old, 22, 21)]), BTreeSet::new());
        // Over a third, which is on one side only.
        assert_eq!(waits(&pairs, &[(New, 21, 30), (New, 30, 22), (Old, 12, 11)]), BTreeSet::from([(New, 30)]));
        // Of one side alone: its server sees it.
        assert_eq!(waits(&pairs, &[(New, 21, 22), (New, 22, 21)]), BTreeSet::new());
    }
}
