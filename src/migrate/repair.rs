//! Paying what the ledger holds: read, sort by table, reconcile, flush, clear exactly what was read.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backfill;
use super::error::{Error, Meaning};
use super::link::Pair;
use super::lives;
use super::locks::{self, Kind};
use super::payable::{self, Entry, State};
use super::reconcile::{self, Outcome};
use super::sql::Bounds;
use super::sweep::{AtWork, SPENT_BY_SWEEP};
use super::tokens;
use super::walk;
use crate::catalog::{Catalog, Sides, Table};
use crate::ledger::clear::{ClearError, Clearing, flush_and_clear};
use crate::ledger::debts::{Debt, Values, decode};
use crate::phase::Side;

/// What one pass did. Counts are of ledger rows, but for `repaired_rows`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Ledger rows cleared.
    pub cleared: u64,
    /// Rows of tables that were written or deleted on the mirror.
    pub repaired_rows: u64,
    /// Owed and not paid: locked by someone, refused by the mirror, or at work elsewhere.
    pub owed: u64,
    /// In flight.
    pub in_flight: u64,
    /// Tables of which the mirror refuses rows, with its message (once for a table).
    pub refused: Vec<(String, String)>,
}

impl Summary {
    fn add(&mut self, other: Summary) {
        self.cleared += other.cleared;
        self.repaired_rows += other.repaired_rows;
        self.owed += other.owed;
        self.in_flight += other.in_flight;
        for refused in other.refused {
            if !self.refused.iter().any(|(table, _)| *table == refused.0) {
                self.refused.push(refused);
            }
        }
    }
}

/// Why a debt was not paid.
#[derive(Clone, Debug)]
enum Unpaid {
    /// A lock stood in the way, or another repairer is at it.
    Busy,
    /// The mirror refuses it.
    Refused(String),
}

/// What was not paid, of the debts that were tried.
#[derive(Default)]
struct Ledger {
    tables: HashMap<u32, Unpaid>,
    keys: HashMap<u32, HashMap<Values, Unpaid>>,
    ranges: HashMap<(u32, Bounds), Unpaid>,
    tokens: HashMap<[u8; 16], Unpaid>,
    repaired: u64,
}

impl Ledger {
    /// Nothing that the table owes is paid.
    fn none_of(&mut self, table: u32, owes: &Owes, why: &Unpaid) {
        self.no_keys_of(table, owes, why);
        self.tables.insert(table, why.clone());
    }

    /// Its keys and ranges are not.
    fn no_keys_of(&mut self, table: u32, owes: &Owes, why: &Unpaid) {
        self.keys.insert(table, owes.keys.iter().map(|key| (key.clone(), why.clone())).collect());
        let ranges = owes.ranges.iter().map(|bounds| ((table, bounds.clone()), why.clone()));
        self.ranges.extend(ranges);
    }

    fn unpaid(&self, debt: &Debt) -> Option<&Unpaid> {
        match debt {
            Debt::Key { table, key } => self.keys.get(table)?.get(key),
            Debt::Table { table } | Debt::Taint { table } => self.tables.get(table),
            Debt::Range { table, after, upto } => {
                self.ranges.get(&(*table, Bounds { after: after.clone(), upto: upto.clone() }))
            }
            Debt::Row { token, .. } => self.tokens.get(token),
        }
    }
}

/// What one table owes.
#[derive(Clone, Default)]
struct Owes {
    /// All of it, by these debts of these ledger rows.
    whole: Vec<(i64, Debt)>,
    keys: HashSet<Values>,
    ranges: HashSet<Bounds>,
}

impl Owes {
    fn add(&mut self, id: i64, debt: &Debt) {
        match debt {
            Debt::Key { key, .. } => drop(self.keys.insert(key.clone())),
            Debt::Range { after, upto, .. } => {
                self.ranges.insert(Bounds { after: after.clone(), upto: upto.clone() });
            }
            Debt::Table { .. } | Debt::Taint { .. } => self.whole.push((id, debt.clone())),
            // Paid by their tokens.
            Debt::Row { .. } => {}
        }
    }

    /// Among its keys and ranges is this one.
    fn names(&self, debt: &Debt) -> bool {
        match debt {
            Debt::Key { key, .. } => self.keys.contains(key),
            Debt::Range { after, upto, .. } => {
                self.ranges.contains(&Bounds { after: after.clone(), upto: upto.clone() })
            }
            Debt::Table { .. } | Debt::Taint { .. } | Debt::Row { .. } => false,
        }
    }
}

/// What has become of whole-table debts since they were read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Since {
    /// The ledger holds one of them.
    Owed,
    /// Other debts stand in the place of one (`Shared::narrow`), which were not read: the ledger row must stay.
    Replaced,
    /// Another job has paid them.
    Gone,
}

/// The first wait before a refused debt is tried again; doubled each time.
const BACK_OFF: Duration = Duration::from_secs(1);
const BACK_OFF_MOST: Duration = Duration::from_secs(60);

/// A taint that is older than this (microseconds) is not left to a sweep any more.
const LEFT_US: i64 = 300_000_000;

/// The worker that pays.
pub struct Repair {
    /// Its connections.
    pub pair: Pair,
    /// The tables as they are now. Set anew by the caller when definitions change.
    pub catalog: Arc<Catalog>,
    /// Whole-table debts that a backfill has begun to pay are left to it for this long after its last step, so that one that was ended can go on.
    pub leaves_backfills: Option<Duration>,
    /// Taints that a sweep at work will clear are left to it, for a while: it need not walk whole tables.
    pub leaves_taints: Option<Arc<AtWork>>,
    refused: HashMap<i64, (Instant, Duration)>,
    /// Why the authority may lack what only the mirror has: no walk deletes it.
    doubt: Option<String>,
}

impl Repair {
    /// A worker over these connections, which nothing else may use.
    pub fn new(pair: Pair, catalog: Arc<Catalog>) -> Repair {
        let mut repair = Repair {
            pair,
            catalog: Arc::default(),
            leaves_backfills: None,
            leaves_taints: None,
            refused: HashMap::new(),
            doubt: None,
        };
        repair.renew(catalog);
        repair
    }

    /// Goes on under these definitions.
    pub fn renew(&mut self, catalog: Arc<Catalog>) {
        let version = |side: Side| catalog.definitions.get(side).version;
        self.pair.versions = Sides { old: version(Side::Old), new: version(Side::New) };
        self.catalog = catalog;
    }

    /// Definitions have changed, or were being changed, when they were read: `renew` is needed.
    pub async fn is_outdated(&mut self) -> Result<bool, Error> {
        Ok(!self.catalog.is_settled() || !self.versions_hold().await?)
    }

    async fn versions_hold(&mut self) -> Result<bool, Error> {
        for link in [&mut self.pair.authority, &mut self.pair.mirror] {
            let known = self.catalog.definitions.get(link.side).version;
            if known.is_some() && known != link.version().await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tries refused debts at once, in the next pass.
    pub fn forget_refusals(&mut self) {
        self.refused.clear();
    }

    /// Goes through the ledger once, oldest rows first. Err: a server failed; what was paid by then is paid, and no row was cleared
    /// that was not. After an error ask `pair.is_broken()` whether new connections are needed.
    pub async fn pass(&mut self) -> Result<Summary, Error> {
        let passed = self.pass_once().await;
        if passed.is_err() {
            self.pair.abandon().await;
        }
        passed
    }

    /// A pass. What is in the `Err` inside: somebody's lock stood in its way, and it is to be made again.
    pub async fn try_pass(&mut self) -> Result<Result<Summary, Error>, Error> {
        match self.pass().await {
            Err(error) if error.meaning() == Meaning::Busy && !self.pair.is_broken() => Ok(Err(error)),
            passed => passed.map(Ok),
        }
    }

    async fn pass_once(&mut self) -> Result<Summary, Error> {
        let mut summary = Summary::default();
        let (mut after, until) = (0, self.last_id().await?);
        if until > 0 {
            self.doubt = match lives::sure(&self.pair.authority.client, self.pair.authority.side).await {
                Ok(()) => None,
                Err(Error::Unfit(doubt)) => Some(doubt),
                Err(error) => return Err(error),
            };
        }
        // Not further: under load there is always a newer row.
        while after < until {
            let incarnation = self.pair.incarnation().await?;
            let (authority, mirror) = (self.pair.authority.at(), self.pair.mirror.at());
            let entries = payable::read(authority, mirror, after, payable::ROWS, &incarnation).await?;
            payable::end_late(mirror, &entries).await?;
            let Some(last) = entries.last() else { break };
            after = last.id;
            summary.add(self.batch(entries, &incarnation).await?);
        }
        Ok(summary)
    }

    async fn last_id(&mut self) -> Result<i64, Error> {
        let text = "SELECT coalesce(max(id), 0) FROM crossfade.ledger";
        Ok(self.pair.authority.rows("reading the ledger", text, &[]).await?[0].get(0))
    }

    /// A sweep at work clears some of it, and leaves the rest to be paid then.
    fn is_left(&self, entry: &Entry) -> bool {
        let Some(sweep) = &self.leaves_taints else { return false };
        entry.age_us < LEFT_US
            && entry.reason.as_deref().is_some_and(|reason| SPENT_BY_SWEEP.contains(&reason))
            && entry.debts.iter().all(|debt| matches!(debt, Debt::Taint { .. }))
            && entry.debts.iter().any(|debt| sweep.clears(debt.table()))
    }

    async fn batch(&mut self, entries: Vec<Entry>, incarnation: &str) -> Result<Summary, Error> {
        let now = Instant::now();
        let mut summary = Summary::default();
        let (mut clear, mut payable) = (Vec::new(), Vec::new());
        for entry in entries {
            match entry.state {
                State::Carried => clear.push(entry),
                State::InFlight => summary.in_flight += 1,
                State::Payable if self.is_left(&entry) => summary.owed += 1,
                State::Payable if self.refused.get(&entry.id).is_some_and(|(next, _)| *next > now) => summary.owed += 1,
                State::Payable => payable.push(entry),
            }
        }
        let ledger = self.pay(&payable).await?;
        summary.repaired_rows = ledger.repaired;
        let mut paid = BTreeSet::new();
        for entry in payable {
            if let Some(why) = &entry.unreadable {
                summary.owed += 1;
                self.note_refusal(entry.id, why).await?;
                summary.add(Summary { refused: vec![("the ledger".to_owned(), why.clone())], ..Summary::default() });
                continue;
            }
            match entry
                .debts
                .iter()
                .filter_map(|debt| Some((debt, ledger.unpaid(debt)?)))
                .max_by_key(|(_, why)| matches!(why, Unpaid::Refused(_)))
            {
                None => {
                    paid.extend(entry.debts.iter().map(|debt| debt.table() as i32));
                    clear.push(entry);
                }
                Some((_, Unpaid::Busy)) => summary.owed += 1,
                Some((debt, Unpaid::Refused(message))) => {
                    summary.owed += 1;
                    let table = self
                        .catalog
                        .tables
                        .get(&debt.table())
                        .map_or_else(|| debt.table().to_string(), |table| table.label());
                    self.note_refusal(entry.id, message).await?;
                    summary.add(Summary { refused: vec![(table, message.clone())], ..Summary::default() });
                }
            }
        }
        note_owings(&mut self.pair, paid).await?;
        summary.cleared = self.clear(clear, incarnation).await?;
        Ok(summary)
    }

    /// The ledger says why a debt stays.
    async fn note_refusal(&mut self, id: i64, message: &str) -> Result<(), Error> {
        let wait = self.refused.get(&id).map_or(BACK_OFF, |(_, wait)| (*wait * 2).min(BACK_OFF_MOST));
        self.refused.insert(id, (Instant::now() + wait, wait));
        let text = "UPDATE crossfade.ledger SET error = $2 WHERE id = $1 AND error IS DISTINCT FROM $2";
        self.pair.authority.execute("noting a refusal", text, &[&id, &message]).await?;
        Ok(())
    }

    async fn clear(&mut self, entries: Vec<Entry>, incarnation: &str) -> Result<u64, Error> {
        for entry in &entries {
            self.refused.remove(&entry.id);
        }
        clear(&mut self.pair, &entries, incarnation).await
    }

    /// Pays what can be paid. Debts of one table, whichever rows they stand in, are paid together.
    async fn pay(&mut self, entries: &[Entry]) -> Result<Ledger, Error> {
        let mut tables: BTreeMap<u32, Owes> = BTreeMap::new();
        let mut within: BTreeMap<u32, Owes> = BTreeMap::new();
        for (id, debt) in entries.iter().flat_map(|entry| entry.debts.iter().map(|debt| (entry.id, debt))) {
            if matches!(debt, Debt::Row { .. }) {
                continue;
            }
            let number = debt.table();
            match self.catalog.attached.get(&number) {
                None => tables.entry(number).or_default().add(id, debt),
                // Which of the root's rows are its own is not known any more.
                Some(root) => {
                    within.entry(number).or_default().add(id, debt);
                    tables.entry(*root).or_default().whole.push((id, debt.clone()));
                }
            }
        }
        let mut ledger = Ledger::default();
        for (number, owes) in tables {
            if self.catalog.gone.contains(&number) {
                // Dropped on both sides, and its rows with it.
                continue;
            }
            let Some(table) = self.catalog.tables.get(&number).cloned() else {
                let why = format!(
                    "table number {number} is not among the migrating tables any more: make it the same on both sides again, or drop it on both"
                );
                ledger.none_of(number, &owes, &Unpaid::Refused(why));
                continue;
            };
            if let Err(error) = self.pay_table(&table, &owes, &mut ledger).await {
                // What one table cannot have must not keep the others from being paid.
                if !error.is_about_a_table() {
                    return Err(error);
                }
                self.pair.abandon().await;
                self.unlock(number).await?;
                ledger.none_of(number, &owes, &Unpaid::Refused(error.to_string()));
            }
        }
        for (number, owes) in within {
            let root = self.catalog.attached.get(&number);
            if let Some(why) = root.and_then(|root| ledger.tables.get(root)).cloned() {
                ledger.none_of(number, &owes, &why);
            }
        }
        for entry in entries {
            self.pay_rows(entry, &mut ledger).await?;
        }
        Ok(ledger)
    }

    /// Whatever of the table's locks an error has left behind.
    async fn unlock(&mut self, number: u32) -> Result<(), Error> {
        for kind in [Kind::Table, Kind::Keys] {
            locks::release(&mut self.pair, kind, &[number]).await?;
        }
        Ok(())
    }

    async fn pay_table(&mut self, table: &Arc<Table>, owes: &Owes, ledger: &mut Ledger) -> Result<(), Error> {
        if let Some(why) = &table.opaque {
            let why = format!("table {} cannot be mirrored: {why}", table.label());
            ledger.none_of(table.number, owes, &Unpaid::Refused(why));
            return Ok(());
        }
        if !self.is_current(table).await? {
            ledger.none_of(table.number, owes, &Unpaid::Busy);
            return Ok(());
        }
        let number = table.number;
        // Walks delete what only the mirror has.
        if let Some(doubt) = self.doubt.clone().filter(|_| !owes.whole.is_empty() || !owes.ranges.is_empty()) {
            ledger.none_of(number, &Owes { keys: HashSet::new(), ..owes.clone() }, &Unpaid::Refused(doubt));
        } else if !owes.whole.is_empty() && self.pay_whole(table, owes, ledger).await? {
            return Ok(());
        }
        let ranges = if self.doubt.is_some() { HashSet::new() } else { owes.ranges.clone() };
        if owes.keys.is_empty() && ranges.is_empty() {
            return Ok(());
        }
        if !locks::take(&mut self.pair, Kind::Keys, &[number]).await? {
            ledger.no_keys_of(number, owes, &Unpaid::Busy);
            return Ok(());
        }
        let outcome = reconcile::keys(&mut self.pair, table, owes.keys.iter().cloned().collect()).await?;
        ledger.repaired += outcome.written + outcome.removed;
        let unpaid = ledger.keys.entry(number).or_default();
        unpaid.extend(outcome.locked.into_iter().map(|key| (key, Unpaid::Busy)));
        unpaid.extend(outcome.refused.into_iter().map(|(key, message)| (key, Unpaid::Refused(message))));
        for bounds in &ranges {
            let why = match reconcile::range(&mut self.pair, table, bounds).await {
                Ok(outcome) => {
                    ledger.repaired += outcome.written + outcome.removed;
                    why_unpaid(&outcome)
                }
                Err(Error::Deadline(_)) => Some(Unpaid::Busy),
                Err(error) => return Err(error),
            };
            ledger.ranges.extend(why.map(|why| ((number, bounds.clone()), why)));
        }
        locks::release(&mut self.pair, Kind::Keys, &[number]).await
    }

    /// A whole-table debt covers the keys and ranges that were read with it: the walk begins after they were read, and passes each of them. False:
    /// it was not paid, for a reason that does not concern them.
    async fn pay_whole(&mut self, table: &Arc<Table>, owes: &Owes, ledger: &mut Ledger) -> Result<bool, Error> {
        let number = table.number;
        let busy = self.backfill_is_at(number).await?;
        // Without its lock: a copy that can pay it may be about to take that.
        if let (false, Err(why)) = (busy, walk::walkable(table)) {
            ledger.tables.insert(number, Unpaid::Refused(why.to_string()));
            return Ok(false);
        }
        if busy || !locks::take(&mut self.pair, Kind::Table, &[number]).await? {
            ledger.tables.insert(number, Unpaid::Busy);
            return Ok(false);
        }
        // Once more under the lock: a backfill may have begun between the look and the lock, and would find its debts gone.
        if self.backfill_is_at(number).await? {
            locks::release(&mut self.pair, Kind::Table, &[number]).await?;
            ledger.tables.insert(number, Unpaid::Busy);
            return Ok(false);
        }
        let since = self.since_read(owes).await?;
        if since != Since::Owed {
            // That of a large table is not walked for nothing.
            locks::release(&mut self.pair, Kind::Table, &[number]).await?;
            if since == Since::Replaced {
                ledger.tables.insert(number, Unpaid::Busy);
            }
            return Ok(false);
        }
        let outcome = match reconcile::table(&mut self.pair, table, &mut |_| {}).await {
            Ok(outcome) => outcome,
            Err(error @ (Error::Unfit(_) | Error::Deadline(_))) => {
                self.pair.abandon().await;
                let why = match error {
                    Error::Deadline(why) => {
                        tracing::info!(table = table.label(), why, "a whole-table debt waits");
                        Unpaid::Busy
                    }
                    error => Unpaid::Refused(error.to_string()),
                };
                ledger.tables.insert(number, why);
                locks::release(&mut self.pair, Kind::Table, &[number]).await?;
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        ledger.repaired += outcome.written + outcome.removed;
        if let Some(why) = why_unpaid(&outcome) {
            // It has passed all keys, unless it has ended early.
            let keys = if walk::ended_early(&outcome) { owes.keys.clone() } else { HashSet::new() };
            ledger.none_of(number, &Owes { keys, ..owes.clone() }, &why);
        }
        let unpaid = ledger.keys.entry(number).or_default();
        unpaid.extend(outcome.locked.into_iter().map(|key| (key, Unpaid::Busy)));
        unpaid.extend(outcome.refused.into_iter().map(|(key, message)| (key, Unpaid::Refused(message))));
        locks::release(&mut self.pair, Kind::Table, &[number]).await?;
        Ok(true)
    }

    /// What has become of the whole-table debts since the ledger was read.
    async fn since_read(&mut self, owes: &Owes) -> Result<Since, Error> {
        let ids: Vec<i64> = owes.whole.iter().map(|(id, _)| *id).collect();
        let text = "SELECT id, debts FROM crossfade.ledger WHERE id = ANY ($1)";
        let rows = self.pair.authority.rows("reading the ledger again", text, &[&ids]).await?;
        let mut since = Since::Gone;
        for row in &rows {
            let id: i64 = row.get(0);
            // What cannot be read is owed.
            let Ok(held) = decode(row.get::<_, Vec<u8>>(1)) else { return Ok(Since::Owed) };
            let read: Vec<&Debt> = owes.whole.iter().filter(|(of, _)| *of == id).map(|(_, debt)| debt).collect();
            if read.iter().any(|debt| held.contains(debt)) {
                return Ok(Since::Owed);
            }
            let tables: BTreeSet<u32> = read.iter().map(|debt| debt.table()).collect();
            if held.iter().any(|debt| tables.contains(&debt.table()) && !owes.names(debt)) {
                since = Since::Replaced;
            }
        }
        Ok(since)
    }

    /// A backfill is at this table, and repair leaves it to that.
    async fn backfill_is_at(&mut self, number: u32) -> Result<bool, Error> {
        match self.leaves_backfills {
            Some(patience) => backfill::under_way(&mut self.pair.authority, number, patience).await,
            None => Ok(false),
        }
    }

    /// What a change of definitions has left is not paid by the definitions of before: a new column would not be looked at.
    async fn is_current(&mut self, table: &Table) -> Result<bool, Error> {
        let settled = Side::BOTH.iter().all(|side| self.catalog.settled(*side, table));
        Ok(settled && self.versions_hold().await?)
    }

    /// Rows for tables without a key. All of a transaction's rows stand in one ledger row under one token.
    async fn pay_rows(&mut self, entry: &Entry, ledger: &mut Ledger) -> Result<(), Error> {
        let mut by_token: BTreeMap<[u8; 16], Vec<(u32, &Values)>> = BTreeMap::new();
        for debt in &entry.debts {
            if let Debt::Row { table, token, values } = debt {
                by_token.entry(*token).or_default().push((*table, values));
            }
        }
        for (token, rows) in by_token {
            let numbers: Vec<u32> =
                rows.iter().map(|(number, _)| *number).collect::<BTreeSet<_>>().into_iter().collect();
            if !locks::take(&mut self.pair, Kind::Table, &numbers).await? {
                ledger.tokens.insert(token, Unpaid::Busy);
                continue;
            }
            let paid = tokens::pay(&mut self.pair, &self.catalog, (entry.id, token), &rows).await;
            if paid.is_err() {
                self.pair.abandon().await;
            }
            locks::release(&mut self.pair, Kind::Table, &numbers).await?;
            match paid {
                Ok(written) => ledger.repaired += written,
                Err(error) => match error.meaning() {
                    Meaning::Busy => drop(ledger.tokens.insert(token, Unpaid::Busy)),
                    Meaning::Fatal if !matches!(error, Error::Unfit(_)) => return Err(error),
                    _ => drop(ledger.tokens.insert(token, Unpaid::Refused(error.to_string()))),
                },
            }
        }
        Ok(())
    }
}

/// Why a debt of more than one key stays.
fn why_unpaid(outcome: &Outcome) -> Option<Unpaid> {
    match outcome.refused.first() {
        Some((_, message)) => Some(Unpaid::Refused(message.clone())),
        None => (!outcome.locked.is_empty()).then_some(Unpaid::Busy),
    }
}

/// Debts of these tables were paid. Between paying and clearing: while a debt stands, it stands in the ledger, and once it does not, no look of verify that
/// began before counts.
pub(crate) async fn note_owings(pair: &mut Pair, paid: BTreeSet<i32>) -> Result<(), Error> {
    if paid.is_empty() {
        return Ok(());
    }
    let paid: Vec<i32> = paid.into_iter().collect();
    let text = "INSERT INTO crossfade.owings AS o (number, times) SELECT n, 1 FROM unnest($1::int[]) AS n ORDER BY n \
        ON CONFLICT (number) DO UPDATE SET times = o.times + 1";
    pair.authority.execute("noting what was owed", text, &[&paid]).await?;
    Ok(())
}

/// Flushes the mirror and clears these ledger rows, then the tokens that only they needed. Returns how many rows were cleared.
pub(crate) async fn clear(pair: &mut Pair, entries: &[Entry], incarnation: &str) -> Result<u64, Error> {
    let (mut lazy, mut flushed, mut tokens) = (Vec::new(), Vec::new(), BTreeSet::new());
    for entry in entries {
        let before = tokens.len();
        tokens.extend(entry.debts.iter().filter_map(|debt| match debt {
            Debt::Row { token, .. } => Some(*token),
            _ => None,
        }));
        if tokens.len() > before { flushed.push(entry.id) } else { lazy.push(entry.id) }
    }
    let mut cleared = 0;
    for (ids, clearing) in [(lazy, Clearing::Lazy), (flushed, Clearing::Flushed)] {
        let clearing = flush_and_clear(&pair.mirror.client, &pair.authority.client, &ids, incarnation, clearing);
        cleared += clearing.await.map_err(|error| told(error, pair.mirror.side))?;
    }
    tokens::remove(&mut pair.mirror, &tokens.into_iter().collect::<Vec<_>>()).await?;
    Ok(cleared)
}

fn told(error: ClearError, mirror: Side) -> Error {
    match error {
        ClearError::Mirror(error) => Error::from_driver(mirror, "flushing", &error),
        ClearError::Authority(error) => Error::from_driver(mirror.other(), "clearing the ledger", &error),
        ClearError::Reincarnated => Error::Reincarnated { side: mirror },
        ClearError::NothingWritten => Error::Unfit(format!("{mirror}: {error}")),
    }
}

/// Passes until nothing is owed or in flight. Err with [`Error::Deadline`] after `patience`, saying what is left.
pub async fn wait(repair: &mut Repair, patience: Duration) -> Result<Summary, Error> {
    let begun = Instant::now();
    let mut total = Summary::default();
    let mut pause = Duration::from_millis(20);
    repair.forget_refusals();
    loop {
        let why = match repair.try_pass().await? {
            Err(held_up) => held_up.to_string(),
            Ok(pass) => {
                let (owed, in_flight) = (pass.owed, pass.in_flight);
                let refused = pass.refused.clone();
                total.add(pass);
                (total.owed, total.in_flight) = (owed, in_flight);
                if owed == 0 && in_flight == 0 {
                    total.refused.clear();
                    return Ok(total);
                }
                let refused = refused.iter().chain(&total.refused);
                let why: Vec<String> = refused.map(|(table, message)| format!("{table}: {message}")).collect();
                let why = if why.is_empty() {
                    "rows are locked, or transactions have not ended".to_owned()
                } else {
                    why.join("; ")
                };
                format!("{owed} ledger rows are still owed and {in_flight} in flight ({why})")
            }
        };
        if begun.elapsed() > patience {
            return Err(Error::Deadline(format!(
                "after {patience:?} {why}; what is owed stays in crossfade.ledger and is tried again"
            )));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}
