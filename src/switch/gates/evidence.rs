//! What the gates of a step are decided from, read from both databases. Nothing here changes anything, but that loading the catalog gives tables their
//! numbers where the schema is installed.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use tokio_postgres::Client;

use super::Gate;
use super::rules::{self, Step};
use crate::catalog::{self, Catalog, Sides};
use crate::check::{self, Finding};
use crate::config::{Config, ConnectError};
use crate::migrate;
use crate::migrate::debt::TableDebt;
use crate::migrate::lives::{self, Begun, Life};
use crate::migrate::sequences::Ahead;
use crate::phase::Side;
use crate::reads::tally::Recent;
use crate::shared::Shared;
use crate::switch::mover::{self, MoveError};
use crate::switch::record::{self, Backup};
use crate::switch::{epoch, fleet, writers};

/// How long one look of ours may take.
const LOOKS: Duration = Duration::from_secs(30);

/// What comparing reads has found longer ago says nothing of what is there now.
pub const COMPARED: Duration = Duration::from_secs(30 * 60);

/// What a side says of itself.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Schema crossfade is there.
    pub installed: bool,
    /// ... or the control role may make it.
    pub may_install: bool,
    /// Of its definitions; None: no event trigger keeps it.
    version: Option<i64>,
    /// A crash or a promotion that nobody has looked at.
    pub begun: Option<Begun>,
    /// Why it may lack what it had acknowledged.
    pub doubt: Option<String>,
}

/// What is known of one migrating table.
#[derive(Clone, Debug)]
pub struct TableFacts {
    /// Old's name.
    pub label: String,
    /// It has a key.
    pub keyed: bool,
    /// Why it cannot be mirrored.
    pub opaque: Option<String>,
    /// What it owes.
    pub owed: TableDebt,
    /// Where its backfill stands.
    pub backfill: Option<migrate::backfill::Standing>,
    /// What verify has found.
    pub verified: Option<migrate::verify::Standing>,
}

/// What the ledger holds. Ages in seconds.
#[derive(Clone, Debug)]
pub struct DebtFacts {
    /// Ledger rows that are owed.
    pub owed: u64,
    /// Ledger rows in flight.
    pub in_flight: u64,
    /// Age of the oldest of them.
    pub oldest: Option<Duration>,
    /// Age of the newest ledger row; None: it is empty.
    pub newest: Option<f64>,
    /// Its size.
    pub ledger_bytes: i64,
}

/// Sessions on the losing side with state that cannot move.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Stuck {
    /// Schemas with temporary tables: one for each session, or left over by one.
    pub temporary: i64,
    /// Idle sessions with advisory locks.
    pub advisory: i64,
    /// Sessions that have declared a cursor WITH HOLD or said LISTEN, as their proxies know.
    pub holding: i64,
}

/// Transactions of clients on the authority.
#[derive(Clone, Debug)]
pub struct Running {
    /// How many.
    pub count: i64,
    /// Age of the oldest, in seconds.
    pub oldest: Option<f64>,
    /// Who holds a lock that no client of a proxy holds for so long.
    pub foreign: Option<String>,
    /// How long the last move held clients.
    pub last_pause_ms: Option<f64>,
}

impl Running {
    /// How long a move would hold clients, in milliseconds: who has run for so long runs for as long again, but the move does not wait for longer than
    /// `pause`; and what the last one took.
    pub fn estimate_ms(&self, pause: Duration) -> f64 {
        self.oldest.unwrap_or(0.0).min(pause.as_secs_f64()) * 1000.0 + self.last_pause_ms.unwrap_or(0.0)
    }
}

/// All that was seen. None: not asked for in this step, or the side does not answer.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Each side, or why it cannot be reached.
    pub sides: Sides<Result<Answer, String>>,
    /// What `crossfade check` finds.
    pub findings: Option<Vec<Finding>>,
    /// The migrating tables, by name.
    pub tables: Vec<TableFacts>,
    /// Lazy tables that are not complete, by name, with what is in the way of their being lazy. Empty where new neither gains authority nor has it.
    pub lazy: Vec<(String, Vec<String>)>,
    /// What the ledger holds.
    pub debt: Option<DebtFacts>,
    /// Names of prepared transactions that have written a migrating table.
    pub undecided: Option<Vec<String>>,
    /// Sequences of the side that gains authority.
    pub sequences: Option<Vec<Ahead>>,
    /// What clients' roles lack there.
    pub privileges: Option<Vec<Finding>>,
    /// Sessions that will end.
    pub sessions: Option<Stuck>,
    /// What new lacks of `expect`.
    pub expected: Option<Vec<Finding>>,
    /// What comparing reads has found within `COMPARED`.
    pub compared: Option<Recent>,
    /// Shapes over tables of both kinds that the proxy which moves has seen: they are refused where new is the authority and some tables stay on old. None: who asks
    /// is no proxy.
    pub split: Option<Vec<String>>,
    /// Transactions under way; None under the barrier, where there are none.
    pub running: Option<Running>,
    /// Seconds since the last move.
    pub held: Option<f64>,
    /// The last backup of new that somebody has confirmed.
    pub backup: Option<Backup>,
    /// The side that gains authority had it in this stretch of mirrored phases.
    pub was_authority: bool,
}

/// Two control connections for looking. A side that does not answer is a fact, too.
pub struct Eyes {
    clients: Sides<Result<Client, String>>,
}

impl Eyes {
    /// Opens them.
    pub async fn open(config: &Config) -> Eyes {
        let open = async |side| {
            let client = Shared::database(config, side).connect("crossfade gates").await;
            let client = client.map_err(|error: ConnectError| error.to_string())?;
            // Whoever looks is waited for by a move that holds locks.
            let limits = format!("SET lock_timeout = '2s'; SET statement_timeout = '{}s'", LOOKS.as_secs());
            client.batch_execute(&limits).await.map_err(|error| error.to_string())?;
            Ok(client)
        };
        let (old, new) = tokio::join!(open(Side::Old), open(Side::New));
        Eyes { clients: Sides { old, new } }
    }

    /// The connection to that side, where it answers.
    pub(in crate::switch) fn on(&self, side: Side) -> Option<&Client> {
        self.clients.get(side).as_ref().ok()
    }

    /// The connection to a side that cannot be done without.
    pub(in crate::switch) fn must(&self, side: Side) -> Result<&Client, MoveError> {
        let client = self.clients.get(side).as_ref();
        client.map_err(|error| MoveError::Closed(format!("{side} cannot be reached: {error}")))
    }

    fn both(&self) -> Option<(&Client, &Client)> {
        Some((self.on(Side::Old)?, self.on(Side::New)?))
    }

    async fn answers(&self) -> Result<Sides<Result<Answer, String>>, MoveError> {
        let answer = async |side| match self.clients.get(side) {
            Ok(client) => look_at(client, side).await.map(Ok),
            Err(error) => Ok(Err(error.clone())),
        };
        let (old, new) = tokio::try_join!(answer(Side::Old), answer(Side::New))?;
        Ok(Sides { old, new })
    }
}

async fn look_at(client: &Client, side: Side) -> Result<Answer, MoveError> {
    let text = "SELECT pg_catalog.to_regclass('crossfade.history') IS NOT NULL AND pg_catalog.to_regclass('crossfade.owings') IS NOT NULL, \
        pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE')";
    let row = client.query_typed_one(text, &[]).await?;
    let installed: bool = row.get(0);
    let version = if installed { catalog::version(client).await? } else { None };
    let life = lives::read(client, side).await?;
    let begun = life.as_ref().and_then(Life::begun).filter(|begun| *begun != Begun::First);
    Ok(Answer { installed, may_install: row.get(1), version, begun, doubt: life.and_then(|life| life.doubt) })
}

/// What is asked about.
pub struct Question<'a> {
    /// The file.
    pub config: &'a Config,
    /// The step.
    pub step: Step,
    /// Of the phase that holds.
    pub epoch: u64,
    /// Of both sides; empty where neither phase has a mirror.
    pub catalog: &'a Catalog,
    /// Server processes on the authority that serve clients of this proxy.
    pub ours: &'a [i32],
}

impl Question<'_> {
    /// Before anybody is held: all of it.
    pub async fn ask(&self, eyes: &Eyes) -> Result<Facts, MoveError> {
        let mut facts = self.under_the_barrier(eyes, None).await?;
        let (config, step, from) = (self.config, self.step, self.step.from.authority());
        if let Some((old, new)) = eyes.both() {
            if step.enters_mirror() || step.gains() == Some(Side::New) {
                facts.findings = Some(check::run(config, old, new).await.map_err(closed)?);
            }
            if step.gains().is_some() {
                facts.privileges = Some(check::privileges(config, self.catalog, old, new, from).await.map_err(closed)?);
                let (losing, gaining) = if from == Side::Old { (old, new) } else { (new, old) };
                let look = migrate::sequences::look((from, losing), (from.other(), gaining), self.catalog);
                facts.sequences = Some(look.await?);
            }
        }
        facts.lazy = self.lazy(eyes).await?;
        let Some(client) = eyes.on(from) else { return Ok(facts) };
        if step.gains().is_some() {
            let installed = matches!(facts.sides.get(from), Ok(answer) if answer.installed);
            facts.sessions = Some(stuck(client, installed).await?);
        }
        if matches!(facts.sides.get(from), Ok(answer) if answer.installed) {
            facts.held = record::held(client).await?;
            if step.gains() == Some(Side::New) {
                facts.compared = record::compared(client, COMPARED).await?;
            }
        }
        facts.running = Some(self.running(client, &facts).await?);
        Ok(facts)
    }

    /// With nobody writing: what those that wrote until now have left. What costs more is taken from before (`known`), unless definitions have changed.
    pub async fn under_the_barrier(&self, eyes: &Eyes, known: Option<Facts>) -> Result<Facts, MoveError> {
        let sides = eyes.answers().await?;
        let (step, from) = (self.step, self.step.from.authority());
        if let Some(before) = &known {
            let version =
                |facts: &Sides<Result<Answer, String>>, side| facts.get(side).as_ref().ok().map(|a| a.version);
            let costly = before.findings.is_some() || before.privileges.is_some();
            if costly
                && Side::BOTH
                    .iter()
                    .any(|side| step.needs(*side) && version(&before.sides, *side) != version(&sides, *side))
            {
                return Err(MoveError::Held(
                    "definitions have changed between the gates and the barrier; clients were released, and the gates are looked at again".into(),
                ));
            }
        }
        let mut facts = known.unwrap_or_else(|| Facts::none(sides.clone()));
        (facts.sides, facts.running) = (sides, None);
        let installed = matches!(facts.sides.get(from), Ok(answer) if answer.installed);
        let Some(client) = eyes.on(from).filter(|_| installed) else {
            facts.tables = self.tables(None).await?;
            return Ok(facts);
        };
        let owed = async {
            if step.from.mirror().is_none() {
                return Ok::<_, MoveError>((None, self.tables(None).await?));
            }
            let mirror = eyes.on(from.other());
            let counts = migrate::debt::counts(from, client, mirror).await?;
            let debt = debt(client, &counts, mirror.is_some()).await?;
            Ok((Some(debt), self.tables(Some((client, counts.tables))).await?))
        };
        let behind = async {
            let Some(gaining) = step.gains() else { return Ok(None) };
            let undecided = writers::prepared(client, from, self.catalog).await?;
            Ok::<_, MoveError>(Some((undecided, record::was_authority(client, gaining).await?)))
        };
        let expected = async {
            match eyes.both().filter(|_| step.gains() == Some(Side::New)) {
                Some((old, new)) => check::expected(self.config, old, new).await.map(Some).map_err(closed),
                None => Ok(None),
            }
        };
        let backup = async { Ok(record::backup(client, from).await?) };
        let ((debt, tables), behind, expected, backup) = tokio::try_join!(owed, behind, expected, backup)?;
        (facts.tables, facts.backup) = (tables, backup);
        facts.debt = debt.or(facts.debt);
        facts.expected = expected.or(facts.expected);
        if let Some((undecided, was_authority)) = behind {
            (facts.undecided, facts.was_authority) = (Some(undecided), was_authority);
        }
        Ok(facts)
    }

    /// The migrating tables; where writes are mirrored, with what they owe.
    async fn tables(&self, owed: Option<(&Client, BTreeMap<u32, TableDebt>)>) -> Result<Vec<TableFacts>, MoveError> {
        let (mut backfills, mut verified) = Default::default();
        let mut debts = BTreeMap::new();
        if let Some((client, owed)) = owed {
            debts = owed;
            backfills = migrate::backfill::standing(client).await?;
            verified = migrate::verify::standing(client).await?;
        }
        let mut tables: Vec<_> = self.catalog.tables.values().collect();
        tables.sort_by_key(|table| table.label());
        Ok(tables
            .into_iter()
            .map(|table| TableFacts {
                label: table.label(),
                keyed: table.key.is_some(),
                opaque: table.opaque.clone(),
                owed: debts.remove(&table.number).unwrap_or_default(),
                backfill: backfills.remove(&table.number),
                verified: verified.remove(&table.number),
            })
            .collect())
    }

    async fn lazy(&self, eyes: &Eyes) -> Result<Vec<(String, Vec<String>)>, MoveError> {
        let mut found = Vec::new();
        let mut tables: Vec<_> = self.catalog.tables.values().filter(|table| table.lazy).collect();
        tables.sort_by_key(|table| table.label());
        for table in tables {
            let obstacles = match eyes.on(Side::New) {
                Some(new) if self.step.gains() == Some(Side::New) => {
                    migrate::lazy::obstacles(new, self.catalog, table).await?
                }
                _ => Vec::new(),
            };
            found.push((table.label(), obstacles));
        }
        Ok(found)
    }

    async fn running(&self, authority: &Client, facts: &Facts) -> Result<Running, MoveError> {
        let (step, side) = (self.step, self.step.from.authority());
        let installed = matches!(facts.sides.get(side), Ok(answer) if answer.installed);
        let mut ours = self.ours.to_vec();
        if installed {
            ours.extend(writers::of_proxies(authority).await?);
        }
        let mut foreign = None;
        if step.from.mirror().is_some()
            && let Some(holder) = epoch::foreign_holder(authority, self.epoch, &ours).await?
        {
            foreign = Some(format!(
                "{holder} on {side} holds the lock of the epoch's table in schema crossfade (exclude the schema from dumps)"
            ));
        }
        if foreign.is_none()
            && (step.enters_mirror() || step.gains().is_some())
            && let Some(writer) = writers::foreign(authority, self.catalog, side, &ours).await?
        {
            foreign = Some(format!("{writer} on {side} holds a writer's lock on a migrating table"));
        }
        let text = "SELECT count(*), max(extract(epoch FROM clock_timestamp() - xact_start))::float8 FROM pg_catalog.pg_stat_activity \
            WHERE datname = pg_catalog.current_database() AND xact_start IS NOT NULL AND backend_type = 'client backend' AND application_name !~ '^crossfade'";
        let row = authority.query_one(text, &[]).await?;
        let last_pause_ms = if installed { record::last_pause(authority).await? } else { None };
        Ok(Running { count: row.get(0), oldest: row.get(1), foreign, last_pause_ms })
    }
}

/// Facts and gates of a step as they stand now, for who only looks.
pub async fn look(config: &Config, epoch: u64, step: Step) -> Result<(Facts, Vec<Gate>), MoveError> {
    let catalog = match step.is_about_tables() {
        true => mover::load_catalog(config, step.from.authority()).await?.0,
        false => Catalog::default(),
    };
    let eyes = Eyes::open(config).await;
    let facts = Question { config, step, epoch, catalog: &catalog, ours: &[] }.ask(&eyes).await?;
    let gates = rules::judge(step, &config.moves, &facts);
    Ok((facts, gates))
}

impl Facts {
    fn none(sides: Sides<Result<Answer, String>>) -> Facts {
        Facts {
            sides,
            findings: None,
            tables: Vec::new(),
            lazy: Vec::new(),
            debt: None,
            undecided: None,
            sequences: None,
            privileges: None,
            sessions: None,
            expected: None,
            compared: None,
            split: None,
            running: None,
            held: None,
            backup: None,
            was_authority: false,
        }
    }
}

fn closed(error: check::CheckError) -> MoveError {
    MoveError::Closed(error.to_string())
}

/// `asked`: the mirror could be asked which debts are in flight.
async fn debt(
    authority: &Client,
    counts: &migrate::debt::Counts,
    asked: bool,
) -> Result<DebtFacts, tokio_postgres::Error> {
    // The counts are of the oldest rows only where there are many.
    let text = "SELECT count(*) FILTER (WHERE carrier_xid IS NULL), extract(epoch FROM clock_timestamp() - max(at))::float8 FROM crossfade.ledger";
    let row = authority.query_typed_one(text, &[]).await?;
    let uncarried = row.get::<_, i64>(0) as u64;
    let owed = if counts.partial || !asked { counts.owed.max(uncarried) } else { counts.owed };
    let (in_flight, oldest, ledger_bytes) = (counts.in_flight, counts.oldest, counts.ledger_bytes);
    Ok(DebtFacts { owed, in_flight, oldest, newest: row.get(1), ledger_bytes })
}

async fn stuck(losing: &Client, installed: bool) -> Result<Stuck, tokio_postgres::Error> {
    let text = "SELECT (SELECT count(DISTINCT c.relnamespace) FROM pg_catalog.pg_class c WHERE c.relpersistence = 't' AND c.relkind = 'r'), \
        (SELECT count(DISTINCT a.pid) FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid WHERE l.locktype = 'advisory' \
            AND a.datname = pg_catalog.current_database() AND a.state = 'idle' AND a.application_name !~ '^crossfade')";
    let row = losing.query_one(text, &[]).await?;
    let holding = if installed { fleet::holding(losing).await? } else { 0 };
    Ok(Stuck { temporary: row.get(0), advisory: row.get(1), holding })
}
