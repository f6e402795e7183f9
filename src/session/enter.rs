//! The epoch of a transaction: in a phase with a mirror each transaction that may write holds the lock of the epoch's table on the authority, from
//! its BEGIN on. Whoever moves the phase takes that lock alone, so that no transaction of any proxy, frozen or cut off, outlives its epoch.
//!
//! The lock is asked for in the flight of BEGIN, and nobody waits for the answer. Where it says that the epoch is over, nothing of the transaction
//! has run: it is rolled back, the world is learnt anew, and what the client has sent since is worked through once more. The client notices a pause.
//!
//! LOCK TABLE takes no snapshot, so that SET TRANSACTION may still follow; and no reset (DISCARD ALL, pg_advisory_unlock_all()) lets go of it.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tracing::{debug, warn};

use super::expect::{Done, Entered, Expected, Kind, To};
use super::reply::Verdict;
use super::{End, Held, Kept, Session};
use crate::plan::Plan;
use crate::plan::cache::Planned;
use crate::sql::facts::Verb;
use crate::wire::frame::{self, HEAD, Head, Report};

/// The lock in the flight of a BEGIN of ours, or in a block that is open.
const NAME: &[u8] = b"crossfade_enter";
/// The lock behind the client's own BEGIN.
pub(super) const BEGUN_NAME: &[u8] = b"crossfade_entered";
/// The client's BEGIN, sent again by us.
const BEGIN_NAME: &[u8] = b"crossfade_begin_again";

/// What the client has sent in the flight of its BEGIN is kept up to this size, in bytes.
const KEPT_MAX: usize = 256 * 1024;

/// How long the next epoch is waited for.
const NEXT: Duration = Duration::from_secs(60);

/// Where a transaction stands in its epoch.
#[derive(Debug, Default)]
pub(super) enum Entry {
    /// It does not hold the lock, and has not asked for it.
    #[default]
    Out,
    /// The lock was asked for.
    Asked(Asked),
    /// It holds the lock, to its end; or, where it was asked for `late`, perhaps no longer than to the next ROLLBACK TO.
    In { late: bool },
    /// The epoch is over, or somebody moves the phase. `wait`: in which case the lock may be had a moment later.
    Over { asked: Asked, wait: bool },
}

/// What is needed to do it all again.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    /// Nothing of this transaction was seen by the client before.
    repeatable: bool,
    /// The block was open already, and may have savepoints.
    late: bool,
    /// The client was in the middle of a pipeline.
    unsynced: bool,
    /// The text of the client's BEGIN, where that came as an Execute.
    begin: Option<Bytes>,
    /// Its answer, held back until the lock's.
    answer: Option<Bytes>,
}

impl Entry {
    /// The epoch is over, and that was not yet dealt with.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Entry::Over { .. })
    }

    /// The transaction has ended, and with it the lock.
    pub(super) fn leave(&mut self) {
        if !self.is_over() {
            *self = Entry::Out;
        }
    }
}

/// What a client is told whose transaction cannot be repeated unseen.
pub(super) fn overtaken() -> Report {
    Report::fatal(
        "57P01",
        "terminating connection: the phase of the migration has moved in the middle of this transaction",
        "Nothing was committed. Connect again and repeat the transaction.",
    )
}

/// The epoch's table is gone; or the client's lock_timeout has struck while somebody moves the phase.
pub(super) fn refused_entry(code: &str) -> bool {
    matches!(code, "42P01" | "55P03")
}

fn lock(epoch: u64) -> String {
    format!("LOCK TABLE crossfade.epoch_{epoch} IN ACCESS SHARE MODE")
}

impl Session {
    /// Before a frame is worked through: until the epoch's lock is held, it may have to be once more.
    pub(super) fn remember(&mut self, head: Head) {
        match self.entry {
            Entry::In { .. } | Entry::Over { .. } => {
                self.again_whole = false;
                return;
            }
            Entry::Out => (self.again_whole, _) = (true, self.again.clear()),
            Entry::Asked(_) => {}
        }
        match self.client.inb.get(..head.total) {
            Some(frame) if self.again.len() + frame.len() <= KEPT_MAX => self.again.extend_from_slice(frame),
            _ => self.again_whole = false,
        }
    }

    /// Asks for the epoch's lock, in the flight of a BEGIN.
    pub(super) fn enter(&mut self, entered: Entered, begin: Option<Bytes>) {
        let epoch = self.world.epoch;
        if self.entry_epoch != epoch {
            self.entry_epoch = epoch;
            for name in [NAME, BEGUN_NAME] {
                if let Some(at) = self.ours_prepared.iter().position(|prepared| *prepared == name) {
                    self.ours_prepared.remove(at);
                    frame::close_statement(&mut self.server.out, name);
                    self.queue.push(Expected::of(Kind::Close, To::Nobody));
                }
            }
        }
        let repeatable = !self.bound && (entered == Entered::Ours || begin.is_some());
        self.entry = Entry::Asked(Asked { repeatable, unsynced: self.unsynced, begin, ..Asked::default() });
        let name = if entered == Entered::Ours { NAME } else { BEGUN_NAME };
        self.put_ours(name, lock(epoch).as_bytes(), &[], &[], To::Enter(entered));
    }

    /// A block that holds no lock yet (it was READ ONLY, or follows on COMMIT AND CHAIN) comes to a statement that may write. Where the epoch is over by
    /// then, the session ends: the client has seen a part of this transaction.
    pub(super) fn enter_late(&mut self, planned: &Planned) {
        // In a savepoint the lock goes with it: it is asked for by each such statement again.
        let out = match &self.entry {
            Entry::Out => true,
            Entry::Asked(asked) => asked.late,
            Entry::In { late } => *late,
            Entry::Over { .. } => false,
        };
        let block = self.in_block() && self.status != b'E' && !self.queue.skipping();
        if out && block && planned.plan != Plan::Pass {
            self.enter(Entered::Ours, None);
            if let Entry::Asked(asked) = &mut self.entry {
                (asked.repeatable, asked.late) = (false, true);
            }
        }
    }

    /// The client's block, which is open on another side, is opened here as well. Where the epoch is over by then, the session ends.
    pub(super) fn enter_block(&mut self) {
        self.enter(Entered::Ours, None);
        if let Entry::Asked(asked) = &mut self.entry {
            asked.repeatable = false;
        }
    }

    /// The client's BEGIN, which opens a block that may write.
    pub(super) fn begins(&self, planned: &Planned) -> bool {
        matches!(planned.facts.verb, Verb::Begin { read_only, .. } if read_only != Some(true)) && !self.in_block()
    }

    /// ... as a Query: the lock goes into the same one.
    pub(super) fn begin_simple(&mut self, text: &[u8], hold: bool) {
        let lock = lock(self.world.epoch);
        frame::put(&mut self.server.out, b'Q', |out| {
            out.put_slice(text);
            // Whatever the text ends with: a comment, a semicolon.
            out.put_slice(b"\n;");
            out.put_slice(lock.as_bytes());
            out.put_u8(0);
        });
        self.begun = true;
        self.entry = Entry::Asked(Asked { repeatable: true, ..Asked::default() });
        let to = To::Enter(Entered::Together);
        self.queue.push(Expected { kind: Kind::Query, to, hold, done: Done::Begin });
    }

    /// ... as an Execute: the lock goes behind it.
    pub(super) async fn begin_extended(
        &mut self,
        head: Head,
        planned: &Planned,
        text: Option<Bytes>,
    ) -> Result<(), End> {
        if !self.queue.is_within() {
            // Answers to what was sent before would be taken for the end of this transaction.
            self.settle().await?;
        }
        if !self.begins(planned) || self.queue.skipping() {
            self.begun = true;
            self.queue.push(Expected { done: Done::Begin, ..Expected::client(Kind::Execute) });
            self.forward(head);
            return Ok(());
        }
        self.begun = true;
        let to = To::Enter(Entered::Begin);
        self.queue.push(Expected { done: Done::Begin, ..Expected::of(Kind::Execute, to) });
        self.forward(head);
        self.enter(Entered::Begin, text);
        Ok(())
    }

    /// CommandComplete of a BEGIN or of its lock: the client gets the first when the second has come.
    pub(super) fn entered(&mut self, entered: Entered, at: usize, total: usize, hold: bool) -> Verdict {
        let complete = &self.server.inb[at..at + total];
        if &complete[HEAD..] != b"LOCK TABLE\0" {
            if let Entry::Asked(asked) = &mut self.entry {
                asked.answer = Some(Bytes::copy_from_slice(complete));
            }
            return Verdict::Drop;
        }
        let Entry::Asked(asked) = std::mem::take(&mut self.entry) else {
            // Asked for once more.
            self.entry = if self.in_block() { Entry::In { late: true } } else { Entry::Out };
            return Verdict::Drop;
        };
        self.entry = Entry::In { late: asked.late };
        self.again = BytesMut::new();
        match asked.answer {
            Some(answer) if hold => {
                self.held.complete = Some(answer);
                Verdict::Drop
            }
            Some(answer) if entered != Entered::Ours => Verdict::Replace(answer[..].into()),
            _ => Verdict::Drop,
        }
    }

    /// An error in answer to the lock: whether it says that the epoch is over.
    pub(super) fn refuses_entry(&mut self, at: usize, total: usize) -> bool {
        let code = frame::server_error(&self.server.inb[at + HEAD..at + total]).code;
        if !refused_entry(&code) {
            return false;
        }
        let Entry::Asked(asked) = std::mem::take(&mut self.entry) else { return false };
        self.entry = Entry::Over { asked, wait: code == "55P03" };
        // Whatever is answered from here on will be asked again.
        self.queue.silence();
        true
    }

    /// The epoch was over when something was to be noted in it, outside any block.
    pub(super) fn overtaken_outside(&mut self) -> End {
        let asked = Asked { repeatable: !self.bound, unsynced: self.unsynced, ..Asked::default() };
        self.entry = Entry::Over { asked, wait: false };
        End::Overtaken
    }

    /// The transaction is rolled back, and begins in the epoch that holds now, with all that the client has sent for it.
    pub(super) async fn once_more(&mut self) -> Result<(), End> {
        let Entry::Over { asked, wait } = std::mem::take(&mut self.entry) else { return Ok(()) };
        let epoch = self.world.epoch;
        debug!(user = %self.user(), epoch, "the epoch is over: a transaction begins once more");
        if !asked.repeatable || !self.again_whole {
            return Err(End::Refused(overtaken()));
        }
        let again = std::mem::take(&mut self.again);
        self.queue.silence();
        (self.held, self.kept) = (Held::default(), Kept::default());
        self.sync_ours().await?;
        if self.status != b'I' {
            self.roll_back_ours().await?;
        }
        (self.ours, self.begun, self.unsynced) = (false, false, false);
        self.over();
        self.pass = None;
        self.next_epoch(epoch, wait).await?;
        self.begin().await?;
        self.unsynced = asked.unsynced;
        let mut inb = again;
        inb.extend_from_slice(&self.client.inb);
        self.client.inb = inb;
        if let Some(text) = asked.begin {
            self.begin_again(text)?;
        }
        Ok(())
    }

    /// Waits until this proxy knows the epoch that has followed.
    async fn next_epoch(&self, epoch: u64, wait: bool) -> Result<(), End> {
        let deadline = tokio::time::Instant::now() + NEXT;
        loop {
            let learnt = self.shared.learnt.notified();
            if self.shared.world.load().epoch != epoch {
                return Ok(());
            }
            self.shared.overtaken.notify_one();
            let heard = tokio::time::timeout(Duration::from_millis(100), learnt).await.is_ok();
            if wait && !heard {
                // The lock may be had again: the move was given up.
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                return Err(End::Refused(overtaken()));
            }
        }
    }

    /// The client's BEGIN that came as an Execute: its portal is gone, so that it is sent by us. It is the first of what is worked through again.
    fn begin_again(&mut self, text: Bytes) -> Result<(), End> {
        let Some(head) = frame::head(&self.client.inb)? else { return Ok(()) };
        let first = self.client.inb.split_to(head.total);
        let out = &mut self.server.out;
        frame::close_statement(out, BEGIN_NAME);
        frame::parse(out, BEGIN_NAME, &text, &[]);
        frame::bind(out, BEGIN_NAME, BEGIN_NAME, &[], std::iter::empty(), 0);
        frame::execute(out, BEGIN_NAME);
        for kind in [Kind::Close, Kind::Parse, Kind::Bind] {
            self.queue.push(Expected::of(kind, To::Nobody));
        }
        (self.begun, self.unsynced) = (true, true);
        if self.world.phase.mirror().is_none() {
            self.queue.push(Expected { done: Done::Begin, ..Expected::client(Kind::Execute) });
            return Ok(());
        }
        let to = To::Enter(Entered::Begin);
        self.queue.push(Expected { done: Done::Begin, ..Expected::of(Kind::Execute, to) });
        (self.again, self.again_whole) = (first, true);
        self.enter(Entered::Begin, Some(text));
        Ok(())
    }

    /// Before its first transaction a server session is entered among those of this proxy: where no lock is taken, that is how it can be stopped. It learns
    /// which epoch holds, and waits until this proxy knows that one.
    pub(super) async fn make_known(&mut self) -> Result<(), End> {
        if self.cancel_key.is_none() {
            // The server's greeting says who it is.
            self.settle().await?;
        }
        let key = self.cancel_key.as_ref().and_then(|key| self.shared.cancels.get(key)).map(|(_, _, key)| key);
        let Some(pid) = key.and_then(|key| Some(i32::from_be_bytes(key.get(..4)?.try_into().ok()?))) else {
            return Ok(());
        };
        let config = self.shared.config.load_full();
        self.known = true;
        match self.shared.registry.enter(&config, self.side, pid).await {
            Ok(Some(epoch)) => self.reach(epoch).await,
            Ok(None) => Ok(()),
            Err(error) if config.fleet => Err(End::Refused(Report::fatal(
                "57P03",
                format!("crossfade cannot enter this session among those of the {} database: {error}", self.side),
                "Connect again in a moment; look at `crossfade status`.",
            ))),
            Err(error) => {
                warn!(side = %self.side, %error, "a session is not known to other proxies, if there are any");
                Ok(())
            }
        }
    }

    /// Waits until this proxy knows that epoch, or a later one.
    async fn reach(&self, epoch: u64) -> Result<(), End> {
        let known = self.shared.world.load().epoch;
        if known < epoch { self.next_epoch(known, false).await } else { Ok(()) }
    }
}
