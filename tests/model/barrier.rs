//! A second model: the phase row and the barrier. A mover or two that want different phases, two proxies with a transaction each, crashes, a proxy that freezes
//! and wakes up late.
//!
//! What the rows say together is decided by the product (`switch::rows::judge`). The rest is written down here once more, as docs/protocols.md has it:
//! the epoch's tables and who holds them, pointer and claim, withdrawal, who finishes a move that was cut short, and in phases without a mirror the list
//! of proxies and of their sessions. Every commit is one bit; a side has the bits that were written there.

use crossfade::phase::{Phase, Side};
use crossfade::switch::rows::{self, Holds, Verdict};

use super::checker::{Bounds, Model, check};

/// A rule that is left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Break {
    /// B3: a transaction does not take the epoch's lock on the authority.
    AuthorityUnlocked,
    /// B3: ... nor its images on the mirror.
    MirrorUnlocked,
    /// B5: the row is written, and the table of the epoch that is over stays.
    TableStays,
    /// A table is made for an epoch that the row has passed.
    TableComesBack,
    /// B1: the claim is written before the pointer.
    ClaimFirst,
    /// A move is withdrawn though another has taken the pointer.
    TakenUnread,
    /// B5: the authority changes with debts in the ledger.
    OwedLeft,
    /// B6: a phase without a mirror is left though a proxy is not still, and its sessions stay.
    NotStill,
    /// B6: a proxy takes back that it is still while the mover counts on it.
    StirsAnyTime,
    /// B6: a session that is entered does not learn the epoch.
    EntersUntold,
    /// B5: of two movers, one does not wait for the other's locks.
    MoversTogether,
    /// B1: a mover does not look at the row again when it has the authority's lock.
    RowUnread,
}

const BREAKS: [Break; 12] = [
    Break::AuthorityUnlocked,
    Break::MirrorUnlocked,
    Break::TableStays,
    Break::TableComesBack,
    Break::ClaimFirst,
    Break::TakenUnread,
    Break::OwedLeft,
    Break::NotStill,
    Break::StirsAnyTime,
    Break::EntersUntold,
    Break::MoversTogether,
    Break::RowUnread,
];

type Epoch = (u8, Phase);

/// One database.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Base {
    row: Epoch,
    taken: bool,
    /// Epochs that have a table here, by bit.
    tables: u8,
    /// The mover that holds this epoch's table alone.
    alone: Option<u8>,
    /// What was written here.
    has: u8,
    /// What is owed, on the side that is authority.
    ledger: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    /// It runs on the authority, under the lock of its epoch where there is one.
    Begun,
    /// Its images were executed on the mirror.
    Carried,
    /// It has committed on the authority; its images have not, on the mirror.
    Committed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Running {
    epoch: Epoch,
    step: Step,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Proxy {
    world: Epoch,
    /// What it has read, and not yet acted on.
    read: Option<Epoch>,
    running: Option<Running>,
    left: u8,
    frozen: bool,
    /// Its session stands on the list.
    entered: bool,
    still: bool,
    /// It has taken this pointer, and writes the claim.
    claims: Option<Epoch>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum At {
    Idle,
    /// It has read the row, and waits for the authority's lock.
    Waiting,
    /// It has announced, where the phase has no mirror; it holds `migration`.
    Announced,
    /// The list is locked; whoever is not still was ended.
    Fenced,
    AuthorityClosed,
    BothClosed,
    /// The first of the rows is written.
    Pointed,
    /// The claim was refused: it is withdrawn, or finished.
    Unsure,
    Done,
    Dead,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    bases: [Base; 2],
    proxies: [Proxy; 2],
    movers: [At; 2],
    acknowledged: u8,
    faults: u8,
    wrong: Option<&'static str>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Action {
    Begin(usize),
    Carry(usize),
    Commit(usize),
    CommitMirror(usize),
    Read(usize),
    Learn(usize),
    Claim(usize),
    Enter(usize),
    Still(usize),
    Stir(usize),
    Freeze(usize),
    Thaw(usize),
    Die(usize),
    End(usize),
    Pay,
    Move(usize),
    GiveUp(usize),
    Refuse(usize),
    Withdraw(usize),
    Kill(usize),
}

struct Barrier {
    from: Phase,
    /// What each mover wants; None: there is one only.
    to: (Phase, Option<Phase>),
    transactions: u8,
    faults: u8,
    broken: Option<Break>,
}

fn index(side: Side) -> usize {
    usize::from(side == Side::New)
}

fn authority(phase: Phase) -> usize {
    index(phase.authority())
}

impl State {
    fn says(&self) -> Verdict {
        let row = |(epoch, phase): Epoch| Some(Holds { epoch: u64::from(epoch), phase });
        rows::judge(row(self.bases[0].row), row(self.bases[1].row))
    }

    /// Whoever runs under that epoch's lock on that side.
    fn held(&self, side: usize, broken: Option<Break>) -> bool {
        self.proxies.iter().filter_map(|proxy| proxy.running).any(|running| {
            let mirrored = running.epoch.1.mirror().is_some();
            let here = authority(running.epoch.1) == side;
            let locks = if here { Break::AuthorityUnlocked } else { Break::MirrorUnlocked };
            let holds = if here { running.step != Step::Committed } else { running.step != Step::Begun };
            mirrored && holds && broken != Some(locks)
        })
    }

    /// The locks of a mover whose connections are gone, or that gives up.
    fn let_go(&mut self, m: usize) {
        for base in self.bases.iter_mut().filter(|base| base.alone == Some(m as u8)) {
            base.alone = None;
        }
    }

    /// The list of proxies is locked, or both sides are closed.
    fn fenced(&self) -> bool {
        self.movers.iter().any(|at| matches!(at, At::Fenced | At::BothClosed))
    }
}

impl Barrier {
    fn is(&self, rule: Break) -> bool {
        self.broken == Some(rule)
    }

    /// What a mover would have.
    fn target(&self, m: usize) -> Phase {
        if m == 0 { self.to.0 } else { self.to.1.unwrap_or(self.to.0) }
    }

    fn epoch(&self, m: usize) -> Epoch {
        (2, self.target(m))
    }

    /// Row, tables and locks of one side, in one transaction. False: the row has passed it.
    fn turn(&self, base: &mut Base, epoch: Epoch, withdraws: bool) -> bool {
        if base.row.0 > epoch.0 || (withdraws && base.taken && !self.is(Break::TakenUnread)) {
            return false;
        }
        base.taken &= base.row.0 == epoch.0;
        base.row = epoch;
        if !self.is(Break::TableStays) {
            base.tables = 0;
        }
        if epoch.1.mirror().is_some() {
            base.tables |= 1 << epoch.0;
        }
        base.alone = None;
        true
    }

    fn transaction(&self, s: &State, p: usize, out: &mut Vec<(Action, State)>) {
        let proxy = s.proxies[p];
        let (side, mirrored) = (authority(proxy.world.1), proxy.world.1.mirror().is_some());
        let locked = mirrored && !self.is(Break::AuthorityUnlocked);
        let base = s.bases[side];
        let may = if locked {
            base.tables & 1 << proxy.world.0 != 0 && base.alone.is_none()
        } else {
            mirrored || (proxy.entered && !proxy.still)
        };
        if proxy.running.is_none() && proxy.left > 0 && proxy.world.0 > 0 && may {
            let mut n = *s;
            n.proxies[p].running = Some(Running { epoch: proxy.world, step: Step::Begun });
            n.proxies[p].left -= 1;
            out.push((Action::Begin(p), n));
        }
        let Some(running) = proxy.running else { return };
        let (here, mirrored) = (authority(running.epoch.1), running.epoch.1.mirror().is_some());
        let there = 1 - here;
        let bit = 1 << (p as u8 * self.transactions + proxy.left);
        let free = s.bases[there].tables & 1 << running.epoch.0 != 0 && s.bases[there].alone.is_none();
        if running.step == Step::Begun && mirrored && (free || self.is(Break::MirrorUnlocked)) {
            let mut n = *s;
            n.proxies[p].running = Some(Running { step: Step::Carried, ..running });
            out.push((Action::Carry(p), n));
        }
        if running.step != Step::Committed {
            let mut n = *s;
            if s.acknowledged & !s.bases[here].has != 0 {
                n.wrong = Some("a transaction commits where an acknowledged write is missing");
            }
            n.acknowledged |= bit;
            n.bases[here].has |= bit;
            if mirrored {
                n.bases[here].ledger |= bit;
            }
            let carried = running.step == Step::Carried;
            n.proxies[p].running = carried.then_some(Running { step: Step::Committed, ..running });
            out.push((Action::Commit(p), n));
        } else {
            let mut n = *s;
            if s.bases[there].row.0 > running.epoch.0 {
                n.wrong = Some("an image of an epoch that is over is committed");
            }
            n.bases[there].has |= bit;
            n.bases[here].ledger &= !bit;
            n.proxies[p].running = None;
            out.push((Action::CommitMirror(p), n));
        }
    }

    fn follows(&self, s: &State, p: usize, out: &mut Vec<(Action, State)>) {
        let proxy = s.proxies[p];
        match (proxy.read, proxy.claims, s.says()) {
            (None, None, Verdict::Holds(holds)) if holds.epoch > u64::from(proxy.world.0) => {
                let mut n = *s;
                n.proxies[p].read = Some((holds.epoch as u8, holds.phase));
                out.push((Action::Read(p), n));
            }
            // Whether its mover is dead nobody knows.
            (None, None, Verdict::Unclaimed(holds)) => {
                let mut n = *s;
                n.bases[1 - authority(holds.phase)].taken = true;
                n.proxies[p].claims = Some((holds.epoch as u8, holds.phase));
                out.push((Action::Read(p), n));
            }
            (Some(epoch), ..) => {
                let mut n = *s;
                let base = &mut n.bases[authority(epoch.1)];
                n.proxies[p].read = None;
                if base.row.0 <= epoch.0 || self.is(Break::TableComesBack) {
                    if epoch.1.mirror().is_some() {
                        base.tables |= 1 << epoch.0;
                    }
                    n.proxies[p].world = epoch;
                    n.proxies[p].entered &= authority(epoch.1) == authority(proxy.world.1);
                }
                out.push((Action::Learn(p), n));
            }
            // Behind the lock of whoever holds the gaining side's.
            (_, Some(epoch), _)
                if s.bases[authority(epoch.1)].alone.is_none() && !s.held(authority(epoch.1), self.broken) =>
            {
                let mut n = *s;
                self.turn(&mut n.bases[authority(epoch.1)], epoch, false);
                n.proxies[p].claims = None;
                out.push((Action::Claim(p), n));
            }
            _ => {}
        }
    }

    /// Phases without a mirror: the list of proxies and of their sessions.
    fn list(&self, s: &State, p: usize, out: &mut Vec<(Action, State)>) {
        let proxy = s.proxies[p];
        let fenced = s.fenced();
        let row = s.bases[authority(proxy.world.1)].row;
        if !proxy.entered && proxy.running.is_none() && (!fenced || self.is(Break::EntersUntold)) {
            let mut n = *s;
            if row.0 <= proxy.world.0 || self.is(Break::EntersUntold) {
                n.proxies[p].entered = true;
                out.push((Action::Enter(p), n));
            }
        }
        if s.movers.contains(&At::Announced) && !proxy.still && proxy.running.is_none() && proxy.world.0 == 1 {
            let mut n = *s;
            n.proxies[p].still = true;
            out.push((Action::Still(p), n));
        }
        let counts = fenced && !self.is(Break::StirsAnyTime);
        if proxy.still && !counts && (row.0 == proxy.world.0 || self.is(Break::StirsAnyTime)) {
            let mut n = *s;
            n.proxies[p].still = false;
            out.push((Action::Stir(p), n));
        }
    }

    fn moves(&self, s: &State, m: usize, out: &mut Vec<(Action, State)>) {
        let (here, gains) = (authority(self.from), authority(self.target(m)));
        let (other, changes) = (1 - here, here != gains);
        let mirrored = self.from.mirror().is_some();
        let mut n = *s;
        let alone = self.is(Break::MoversTogether);
        let free = |side: usize| !s.held(side, self.broken) && (s.bases[side].alone.is_none() || alone);
        // One at a time: who announces holds the lock of `migration` for as long as it is at it.
        let lists = matches!(s.movers[1 - m], At::Announced | At::Fenced | At::BothClosed) && !alone;
        let row = s.bases[here].row.0;
        match s.movers[m] {
            At::Idle if row == 1 && !mirrored && !lists => n.movers[m] = At::Announced,
            At::Idle if row == 1 && mirrored => n.movers[m] = At::Waiting,
            At::Idle if row > 1 => n.movers[m] = At::Done,
            // It is told that the table is gone; or that the row is another.
            At::Waiting if row > 1 && !self.is(Break::RowUnread) => n.movers[m] = At::Done,
            At::Waiting if free(here) => (n.movers[m], n.bases[here].alone) = (At::AuthorityClosed, Some(m as u8)),
            At::Announced => {
                n.movers[m] = At::Fenced;
                if !self.is(Break::NotStill) {
                    for proxy in n.proxies.iter_mut().filter(|proxy| !proxy.still) {
                        (proxy.entered, proxy.running) = (false, None);
                    }
                }
            }
            At::Fenced => {
                // Whole-table debts of all that is there; repair pays them when clients are released.
                n.movers[m] = At::BothClosed;
                n.bases[here].ledger = n.bases[here].has;
            }
            At::AuthorityClosed if free(other) => {
                (n.movers[m], n.bases[other].alone) = (At::BothClosed, Some(m as u8));
            }
            At::BothClosed if !changes || s.bases[here].ledger == 0 || self.is(Break::OwedLeft) => {
                let first = if self.is(Break::ClaimFirst) { gains } else { here };
                n.movers[m] = At::Pointed;
                self.turn(&mut n.bases[first], self.epoch(m), false);
                if self.target(m).mirror().is_none() {
                    n.bases[here].ledger = 0;
                }
            }
            At::Pointed => {
                let second = if changes && self.is(Break::ClaimFirst) {
                    here
                } else if changes {
                    gains
                } else {
                    other
                };
                self.turn(&mut n.bases[second], self.epoch(m), false);
                n.let_go(m);
                n.movers[m] = At::Done;
            }
            At::Unsure if free(here) && free(gains) => {
                let written = [here, gains].map(|side| self.turn(&mut n.bases[side], self.epoch(m), false));
                if written != [true, true] {
                    return;
                }
                n.movers[m] = At::Done;
            }
            _ => return,
        }
        out.push((Action::Move(m), n));
    }

    fn fails(&self, s: &State, m: usize, out: &mut Vec<(Action, State)>) {
        let here = authority(self.from);
        let at = s.movers[m];
        let listed = at == At::BothClosed && self.from.mirror().is_none();
        if at == At::Unsure {
            let mut n = *s;
            if self.turn(&mut n.bases[here], (3, self.from), true) {
                n.movers[m] = At::Done;
                out.push((Action::Withdraw(m), n));
            }
        }
        let gives_up = |n: &mut State, to: At| {
            n.let_go(m);
            if listed {
                n.bases[here].ledger = 0;
            }
            n.movers[m] = to;
        };
        if matches!(at, At::Announced | At::Fenced | At::Waiting | At::AuthorityClosed | At::BothClosed) {
            let mut n = *s;
            gives_up(&mut n, At::Done);
            out.push((Action::GiveUp(m), n));
        }
        if s.faults == 0 {
            return;
        }
        let mut n = *s;
        n.faults -= 1;
        if at == At::Pointed && here != authority(self.target(m)) && !self.is(Break::ClaimFirst) {
            let mut n = n;
            n.let_go(m);
            n.movers[m] = At::Unsure;
            out.push((Action::Refuse(m), n));
        }
        if !matches!(at, At::Done | At::Dead) {
            gives_up(&mut n, At::Dead);
            out.push((Action::Kill(m), n));
        }
    }

    /// What happens to proxies.
    fn falls(&self, s: &State, p: usize, out: &mut Vec<(Action, State)>) {
        if s.faults == 0 {
            return;
        }
        let mut n = *s;
        n.faults -= 1;
        if !s.proxies[p].frozen {
            let mut frozen = n;
            frozen.proxies[p].frozen = true;
            out.push((Action::Freeze(p), frozen));
        }
        // Started again it knows nothing, and reads the rows.
        n.proxies[p] = proxy((0, Phase::Old), n.proxies[p].left);
        out.push((Action::Die(p), n));
    }
}

fn proxy(world: Epoch, left: u8) -> Proxy {
    Proxy { world, read: None, running: None, left, frozen: false, entered: false, still: false, claims: None }
}

impl Model for Barrier {
    type State = State;
    type Action = Action;

    fn initial(&self) -> Vec<State> {
        let tables = if self.from.mirror().is_some() { 1 << 1 } else { 0 };
        let base = Base { row: (1, self.from), taken: false, tables, alone: None, has: 0, ledger: 0 };
        let proxies = [proxy((1, self.from), self.transactions); 2];
        let movers = [At::Idle, if self.to.1.is_some() { At::Idle } else { At::Done }];
        vec![State { bases: [base; 2], proxies, movers, acknowledged: 0, faults: self.faults, wrong: None }]
    }

    fn next(&self, s: &State, out: &mut Vec<(Action, State)>) {
        for p in 0..2 {
            // Whoever is waited for, frozen or not (`--terminate`): its server session is ended. What has committed on the authority stays owed: so, too, where
            // repair ends a transaction of the mirror whose COMMIT does not come.
            if s.proxies[p].running.is_some() {
                let mut n = *s;
                (n.proxies[p].running, n.proxies[p].entered) = (None, false);
                out.push((Action::End(p), n));
            }
            if s.proxies[p].frozen {
                let mut n = *s;
                n.proxies[p].frozen = false;
                out.push((Action::Thaw(p), n));
                continue;
            }
            self.transaction(s, p, out);
            self.follows(s, p, out);
            self.list(s, p, out);
        }
        // Repair: what no carrier brings is written from the authority, where nobody else has the rows.
        for side in 0..2 {
            let flying = s
                .proxies
                .iter()
                .enumerate()
                .filter(|(_, proxy)| proxy.running.is_some_and(|at| at.step == Step::Committed));
            let flying = flying.fold(0, |bits, (p, proxy)| bits | 1 << (p as u8 * self.transactions + proxy.left));
            let payable = s.bases[side].ledger & !flying;
            let free = !s.fenced() || (self.from.mirror().is_some() && !s.movers.contains(&At::Fenced));
            if payable != 0 && free && s.bases[side].row.1.mirror().is_some() {
                let mut n = *s;
                n.bases[1 - side].has |= payable;
                n.bases[side].ledger &= !payable;
                out.push((Action::Pay, n));
            }
        }
        for at in 0..2 {
            self.moves(s, at, out);
            self.fails(s, at, out);
            self.falls(s, at, out);
        }
    }

    fn is_fault(&self, action: &Action) -> bool {
        matches!(action, Action::Freeze(_) | Action::Die(_) | Action::Kill(_) | Action::Refuse(_))
    }

    fn wrong(&self, s: &State) -> Option<String> {
        if let Some(what) = s.wrong {
            return Some(what.to_owned());
        }
        let (Verdict::Holds(holds) | Verdict::Unclaimed(holds)) = s.says() else { return None };
        let (here, there) = (authority(holds.phase), 1 - authority(holds.phase));
        if s.acknowledged & !s.bases[here].has != 0 {
            return Some(format!("{} is authority and lacks an acknowledged write", holds.phase.authority()));
        }
        let known = s.bases[there].has | s.bases[here].ledger;
        let entered = holds.phase.mirror().is_some() && s.movers == [At::Done; 2];
        (entered && s.acknowledged & !known != 0).then(|| "the mirror lacks a write, and nothing says so".to_owned())
    }

    fn at_rest(&self, s: &State) -> bool {
        let over = |proxy: &Proxy| proxy.running.is_none() && proxy.left == 0 && !proxy.frozen;
        s.movers.iter().all(|at| matches!(at, At::Done | At::Dead)) && s.proxies.iter().all(over)
    }
}

const MOVES: [(Phase, Phase); 4] = [
    (Phase::DualWrite, Phase::NewPrimary),
    (Phase::Old, Phase::DualWrite),
    (Phase::DualWrite, Phase::Old),
    (Phase::DualRead, Phase::DualWrite),
];

/// Two operators at once, and what each of them wants.
const DUELS: [(Phase, Phase, Phase); 4] = [
    (Phase::DualWrite, Phase::NewPrimary, Phase::Old),
    (Phase::DualWrite, Phase::NewPrimary, Phase::NewPrimary),
    (Phase::DualRead, Phase::NewPrimary, Phase::DualWrite),
    (Phase::Old, Phase::DualWrite, Phase::DualWrite),
];

fn assert_kept(model: &Barrier) {
    let what = match model.to {
        (to, None) => format!("{} -> {to}", model.from),
        (to, Some(other)) => format!("{} -> {to} | {other}", model.from),
    };
    let report = check(model, Bounds { states: usize::MAX, progress: true });
    println!("{what}: {} states, {} transitions, depth {}", report.states, report.transitions, report.depth);
    if let Some(violation) = report.violation {
        panic!("{what}: {}\n  {}", violation.what, violation.trace.join("\n  "));
    }
    assert!(report.exhausted, "{what}: not all states were looked at");
}

#[test]
fn the_barrier_keeps_one_authority() {
    let (transactions, faults) = if super::at_length() { (2, 3) } else { (1, 2) };
    for (from, to) in MOVES {
        assert_kept(&Barrier { from, to: (to, None), transactions, faults, broken: None });
    }
}

#[test]
fn of_two_movers_one_wins() {
    let faults = if super::at_length() { 3 } else { 1 };
    for (from, to, other) in DUELS {
        assert_kept(&Barrier { from, to: (to, Some(other)), transactions: 1, faults, broken: None });
    }
}

#[test]
fn every_rule_of_the_barrier_is_needed() {
    let alone = MOVES.into_iter().map(|(from, to)| (from, (to, None)));
    let tried: Vec<_> = alone.chain(DUELS.into_iter().map(|(from, to, other)| (from, (to, Some(other))))).collect();
    for rule in BREAKS {
        let found = tried.iter().find_map(|&(from, to)| {
            let model = Barrier { from, to, transactions: 1, faults: 2, broken: Some(rule) };
            let violation = check(&model, Bounds { states: usize::MAX, progress: false }).violation?;
            Some(format!("{from} -> {to:?}: {} after {} steps", violation.what, violation.trace.len() - 2))
        });
        println!("without {rule:?}: {}", found.unwrap_or_else(|| panic!("{rule:?} is left out, and nothing is wrong")));
    }
}
