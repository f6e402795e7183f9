//! Jobs about reads: comparing what both sides answer, and looking at what new may serve.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio_postgres::Client;
use tracing::{debug, warn};

use super::jobs::Hands;
use crate::catalog::Sides;
use crate::migrate::{self, owing::owing};
use crate::phase::Side;
use crate::reads::block::{RENEWED, STANDS};
use crate::reads::compare::{Answer, RunError, Seat};
use crate::reads::digest::{Digest, Relation, only, relation};
use crate::reads::look::{LEASE, Look, Owing, Pending, STUCK};
use crate::reads::plans;
use crate::reads::tally::{Note, Outcome, Recent};
use crate::reads::{Sample, Who};
use crate::shared::Shared;
use crate::switch::record;

/// Clients as whom the job is logged in, at most.
const SEATS_MAX: usize = 4;
/// Nothing to compare for so long, and the job logs out.
const IDLE: Duration = Duration::from_secs(10);
/// A read whose answers differ is run again behind this pause, at most so often; so many wait for that at most.
const AGAIN: Duration = Duration::from_secs(1);
const TRIES_MAX: u32 = 5;
const DOUBTS_MAX: usize = 64;
/// Rows of a difference that are shown of each side.
const SHOWN: usize = 3;

/// How often what was found is kept for the gates.
const KEPT: Duration = Duration::from_secs(2);

/// Between two looks, at least, and at most: where new serves, and where only comparing asks what is owed.
const LOOKS_APART: Duration = Duration::from_millis(5);
const LOOKS_SERVING: Duration = Duration::from_millis(50);
const LOOKS_COMPARING: Duration = Duration::from_millis(500);

/// Transactions at work on the mirror in this epoch, and its incarnation. None of the first: that epoch is over there; of the
/// second: it has begun a new life, and may lack rows.
const AT_WORK: &str = "SELECT CASE WHEN to_regclass($1) IS NOT NULL THEN ARRAY(SELECT DISTINCT virtualtransaction FROM pg_locks \
    WHERE locktype = 'relation' AND relation = to_regclass($1) AND pid <> pg_backend_pid() \
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) END, (SELECT i.id::text FROM crossfade.incarnation i JOIN crossfade.life l ON l.incarnation = i.id LIMIT 1)";

/// Keeps what sessions may know of new: looks at the mirror's transactions and at the ledger.
pub async fn look(shared: Arc<Shared>) {
    let mut hands = Hands::default();
    let mut pending = Pending::default();
    let mut epoch = 0;
    loop {
        let (world, config) = (shared.world.load_full(), shared.config.load_full());
        let serving = world.phase.serves() && (config.fleet || config.most.serve > 0.0);
        if epoch != world.epoch || !serving {
            (epoch, pending) = (world.epoch, Pending::default());
        }
        match one_look(&shared, &mut hands, &mut pending, epoch).await {
            Ok(Some(look)) => shared.reads.looks.publish(Look { settled: look.settled.filter(|_| serving), ..look }),
            Ok(None) => shared.reads.looks.forget(),
            Err(error) => {
                debug!(%error, "it is not known what new may serve");
                (hands.open, pending) = (None, Pending::default());
                shared.reads.looks.forget();
                tokio::time::sleep(LOOKS_SERVING).await;
            }
        }
        tokio::time::sleep(LOOKS_APART).await;
        tokio::select! {
            () = shared.reads.looks.wanted(), if serving => {}
            () = shared.learnt.notified() => {}
            () = tokio::time::sleep(if serving { LOOKS_SERVING } else { LOOKS_COMPARING }) => {}
        }
    }
}

/// Blocks the tables of which sessions have debts to acknowledge, and keeps them blocked while there are more.
pub async fn block(shared: Arc<Shared>) {
    let mut open: Option<(Side, Client)> = None;
    loop {
        tokio::select! {
            () = shared.reads.blocks.called() => {}
            () = tokio::time::sleep(RENEWED) => {}
        }
        let sent = Instant::now();
        let tables = shared.reads.blocks.wanted(sent);
        if tables.is_empty() {
            continue;
        }
        match one_block(&shared, &mut open, &tables).await {
            Ok(()) => shared.reads.blocks.stand(&tables, sent, Instant::now()),
            Err(error) => {
                debug!(%error, "tables cannot be blocked: each debt waits for the looks of other proxies");
                open = None;
                tokio::time::sleep(LOOKS_SERVING).await;
            }
        }
    }
}

async fn one_block(shared: &Shared, open: &mut Option<(Side, Client)>, tables: &[u32]) -> Result<(), Trouble> {
    let side = shared.world.load().phase.authority();
    if open.as_ref().is_none_or(|(known, client)| *known != side || client.is_closed()) {
        let config = shared.config.load_full();
        let client = Shared::database(&config, side).connect("crossfade blocks").await?;
        client.batch_execute("SET synchronous_commit = on").await?;
        *open = Some((side, client));
    }
    let Some((_, client)) = open.as_ref() else { return Ok(()) };
    Ok(migrate::owing::block((side, client), tables, STANDS).await?)
}

type Trouble = Box<dyn std::error::Error + Send + Sync>;

/// None: there is no mirror, or it is known to be down.
async fn one_look(
    shared: &Shared,
    hands: &mut Hands,
    pending: &mut Pending,
    epoch: u64,
) -> Result<Option<Look>, Trouble> {
    let Some(side) = shared.world.load().phase.mirror().filter(|side| shared.health.get(*side).up()) else {
        hands.open = None;
        return Ok(None);
    };
    let Some((authority, mirror)) = hands.get(shared, "crossfade looks").await? else { return Ok(None) };
    let began = Instant::now();
    let Some((at_work, incarnation)) = at_work(mirror, epoch).await? else { return Ok(None) };
    let settled = pending.settle(began, at_work.into_iter().collect());
    // Behind the end of those transactions: what they did not bring is in the ledger by now.
    let ledger = Instant::now();
    let owing = owing(authority, (side, mirror), &incarnation, STUCK).await?;
    Ok(Some(Look { epoch, settled, ledger, owing: owing.map_or(Owing::All, Owing::Tables) }))
}

async fn at_work(mirror: &Client, epoch: u64) -> Result<Option<(Vec<String>, String)>, Trouble> {
    let table = format!("crossfade.epoch_{epoch}");
    let row = tokio::time::timeout(LEASE * 4, mirror.query_one(AT_WORK, &[&table])).await??;
    Ok(row.get::<_, Option<Vec<String>>>(0).zip(row.get::<_, Option<String>>(1)))
}

/// A client's sessions on both sides: on old and on new, or, where the noise is wanted, both on the authority.
struct Seats {
    who: Arc<Who>,
    generation: u64,
    seats: Sides<Seat>,
}

/// A read whose answers have differed.
struct Doubt {
    sample: Sample,
    digests: Sides<Digest>,
    tries: u32,
    due: Instant,
}

/// Keeps what was found where the gates of a move look, whoever moves.
pub async fn keep(shared: Arc<Shared>) {
    let mut hands = Hands::default();
    loop {
        tokio::time::sleep(KEPT).await;
        let recent = shared.reads.tally.take_recent();
        if recent == Recent::default() || shared.config.load().reads.noise {
            continue;
        }
        let Err(error) = keep_one(&shared, &mut hands, recent).await else { continue };
        debug!(%error, "what comparing has found cannot be kept yet");
        shared.reads.tally.add_recent(recent);
        hands.open = None;
    }
}

async fn keep_one(shared: &Shared, hands: &mut Hands, recent: Recent) -> Result<(), Trouble> {
    let Some((authority, _)) = hands.get(shared, "crossfade compared").await? else { return Ok(()) };
    Ok(record::compare(authority, shared.registry.id(), recent).await?)
}

struct Comparer {
    shared: Arc<Shared>,
    open: Vec<Seats>,
    doubts: VecDeque<Doubt>,
}

/// Runs what sessions hand over on both sides, one read at a time.
pub async fn compare(shared: Arc<Shared>) {
    let mut waiting = shared.reads.waiting.lock().await;
    let mut comparer = Comparer { shared: shared.clone(), open: Vec::new(), doubts: VecDeque::new() };
    loop {
        let pause = comparer.doubts.front().map_or(IDLE, |doubt| doubt.due.saturating_duration_since(Instant::now()));
        match tokio::time::timeout(pause, waiting.recv()).await {
            Ok(Some(sample)) => comparer.first_look(sample).await,
            Ok(None) => return,
            Err(_) if comparer.doubts.is_empty() => comparer.open.clear(),
            Err(_) => {}
        }
        while comparer.doubts.front().is_some_and(|doubt| doubt.due <= Instant::now()) {
            let Some(doubt) = comparer.doubts.pop_front() else { break };
            comparer.look_again(doubt).await;
        }
    }
}

impl Comparer {
    async fn first_look(&mut self, sample: Sample) {
        let reads = &self.shared.reads;
        let mirror = self.shared.world.load().phase.mirror();
        let Some(mirror) = mirror.filter(|mirror| self.shared.health.get(*mirror).up()) else { return };
        let noise = self.shared.config.load().reads.noise;
        if !noise && sample.eligible.tables.iter().any(|table| reads.looks.is_owed(table.number)) {
            return reads.tally.note(&sample.shape, Note::of(Outcome::Owed));
        }
        let answers = match self.run(&sample, mirror, false).await {
            Ok(answers) => answers,
            Err((side, error)) => return self.failed(&sample, side, &error),
        };
        for table in &sample.eligible.tables {
            self.shared.metrics.read_compared.with_label_values(&[&table.label()]).inc();
        }
        let outcome = match compared(&sample, &answers) {
            Relation::Different => {
                let digests = Sides { old: answers.old.digest.clone(), new: answers.new.digest.clone() };
                if self.doubts.len() >= DOUBTS_MAX {
                    Outcome::Unsettled
                } else {
                    self.shared.reads.tally.looks_again();
                    self.doubts.push_back(Doubt { sample, digests, tries: 1, due: Instant::now() + AGAIN });
                    return;
                }
            }
            Relation::Equal => Outcome::Equal,
            Relation::Reordered => Outcome::Reordered,
            Relation::Loose => Outcome::Loose,
        };
        self.note(&sample, outcome, &answers);
        self.plan_if_slower(&sample, mirror).await;
    }

    /// New takes longer than old for this shape: how both go about it.
    async fn plan_if_slower(&mut self, sample: &Sample, mirror: Side) {
        if self.shared.config.load().reads.noise || !self.shared.reads.tally.wants_plans(&sample.shape, Instant::now())
        {
            return;
        }
        let Ok(seats) = self.seats(&sample.who, mirror).await else { return };
        let (old, new) = tokio::join!(seats.old.plan(sample), seats.new.plan(sample));
        let (old, new) = match (old, new) {
            (Ok(Some(old)), Ok(Some(new))) => (old, new),
            (Ok(_), Ok(_)) => return,
            _ => return self.open.clear(),
        };
        let missing = plans::missing(&old, &new);
        let shape = String::from_utf8_lossy(&sample.shape);
        warn!(%shape, missing = missing.join("; "), "new takes longer for a read than old; `crossfade report` shows both plans");
        let found = json!({ "old": plans::lines(&old), "new": plans::lines(&new), "missing": missing });
        self.shared.reads.tally.plans(&sample.shape, found);
    }

    fn note(&self, sample: &Sample, outcome: Outcome, answers: &Sides<Answer>) {
        let took = Some(Sides { old: answers.old.took, new: answers.new.took });
        let note = Note { rows: answers.old.digest.rows, took, ..Note::of(outcome) };
        self.shared.reads.tally.note(&sample.shape, note);
    }

    /// A difference counts where it stays: both sides answer as they did, and not the same. Rows that are being written differ in another way each time.
    async fn look_again(&mut self, doubt: Doubt) {
        let Doubt { sample, digests, tries, .. } = doubt;
        let mirror = self.shared.world.load().phase.mirror();
        let Some(mirror) = mirror.filter(|mirror| self.shared.health.get(*mirror).up()) else { return };
        let samples = self.shared.config.load().reads.samples;
        let answers = match self.run(&sample, mirror, samples).await {
            Ok(answers) => answers,
            Err((side, error)) => return self.failed(&sample, side, &error),
        };
        match compared(&sample, &answers) {
            Relation::Different if answers.old.digest == digests.old && answers.new.digest == digests.new => {
                self.differs(&sample, &answers, samples);
            }
            Relation::Different if tries < TRIES_MAX => {
                let digests = Sides { old: answers.old.digest.clone(), new: answers.new.digest.clone() };
                self.doubts.push_back(Doubt { sample, digests, tries: tries + 1, due: Instant::now() + AGAIN });
            }
            Relation::Different => self.note(&sample, Outcome::Unsettled, &answers),
            Relation::Reordered => self.note(&sample, Outcome::Reordered, &answers),
            Relation::Equal | Relation::Loose => self.note(&sample, Outcome::Equal, &answers),
        }
    }

    fn differs(&self, sample: &Sample, answers: &Sides<Answer>, samples: bool) {
        let shape = String::from_utf8_lossy(&sample.shape);
        let (old, new) = (&answers.old, &answers.new);
        warn!(%shape, rows_on_old = old.digest.rows, rows_on_new = new.digest.rows, "old and new answer a read differently");
        for table in &sample.eligible.tables {
            self.shared.metrics.read_different.with_label_values(&[&table.label()]).inc();
        }
        let mut shown = json!({ "rows_on_old": old.digest.rows, "rows_on_new": new.digest.rows });
        if samples {
            shown["statement"] = json!(String::from_utf8_lossy(&sample.text));
            shown["only_on_old"] = json!(only(&old.rows, &new.rows, SHOWN));
            shown["only_on_new"] = json!(only(&new.rows, &old.rows, SHOWN));
        }
        let took = Some(Sides { old: old.took, new: new.took });
        let note = Note { rows: old.digest.rows, took, sample: Some(shown), ..Note::of(Outcome::Different) };
        self.shared.reads.tally.note(&sample.shape, note);
    }

    fn failed(&mut self, sample: &Sample, side: Side, error: &RunError) {
        debug!(%side, %error, "a read could not be compared");
        // What a server says may quote values: only its SQLSTATE is kept.
        let said = match error {
            RunError::Refused(code, _) => format!("{side} refused it: SQLSTATE {code}"),
            RunError::Broken(error) => {
                self.open.clear();
                format!("{side}: {error}")
            }
        };
        self.shared.reads.tally.note(&sample.shape, Note { error: Some(said), ..Note::of(Outcome::Failed) });
    }

    /// Both answers, asked for at the same time.
    async fn run(&mut self, sample: &Sample, mirror: Side, keep: bool) -> Result<Sides<Answer>, (Side, RunError)> {
        let seats = self.seats(&sample.who, mirror).await?;
        let (old, new) = tokio::join!(seats.old.run(sample, keep), seats.new.run(sample, keep));
        Ok(Sides { old: old.map_err(|error| (Side::Old, error))?, new: new.map_err(|error| (Side::New, error))? })
    }

    async fn seats(&mut self, who: &Arc<Who>, mirror: Side) -> Result<&mut Sides<Seat>, (Side, RunError)> {
        let generation = self.shared.world.load().generation;
        self.open.retain(|open| open.generation == generation);
        let same = |open: &Seats| {
            open.who.login.user == who.login.user
                && open.who.login.database == who.login.database
                && open.who.parameters == who.parameters
        };
        let at = match self.open.iter().position(same) {
            Some(at) => at,
            None => {
                let config = self.shared.config.load_full();
                let authority = mirror.other();
                let real = |side: Side| if config.reads.noise { authority } else { side };
                let open = |side: Side| Seat::open(Shared::database(&config, real(side)), real(side), who);
                let (old, new) = tokio::join!(open(Side::Old), open(Side::New));
                let seats = Sides {
                    old: old.map_err(|error| (Side::Old, error))?,
                    new: new.map_err(|error| (Side::New, error))?,
                };
                if self.open.len() >= SEATS_MAX {
                    self.open.remove(0);
                }
                self.open.push(Seats { who: who.clone(), generation, seats });
                self.open.len() - 1
            }
        };
        Ok(&mut self.open[at].seats)
    }
}

fn compared(sample: &Sample, answers: &Sides<Answer>) -> Relation {
    let read = &sample.eligible;
    relation(&answers.old.digest, &answers.new.digest, read.ordered, read.loose)
}
