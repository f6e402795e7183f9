//! COMMIT of a transaction that has written tables which stay on old and tables that are on new (C11): the one place for two-phase commit.
//!
//! Old decides, new is prepared: old is a production server as it stands, whose `max_prepared_transactions` is 0 as a rule and cannot be changed without a
//! restart; new is being set up. docs/protocols.md says what a death at each step leaves, and `migrate::undecided` settles it.

use bytes::Bytes;

use super::both::{XID, error_of};
use super::carry::literal;
use super::commit::{Before, Ending, Settled};
use super::expect::{Expected, Kind, To};
use super::{End, Kept, Session};
use crate::ledger::split_name;
use crate::wire::frame::{self, Report};

const PREPARE_NAME: &[u8] = b"crossfade_prepare_split";

impl Session {
    /// Err: an error frame, which says why nothing was committed. Which of the two is in use does not matter, before and afterwards.
    pub(super) async fn commit_split(&mut self) -> Result<Result<(), Bytes>, End> {
        if !self.is_away() {
            self.change_places();
        }
        let Some(incarnation) = self.legs.incarnation.clone() else {
            return self.give_up_split(error_of(&not_installed())).await;
        };
        self.ask_ours(XID).await?;
        let Some(xid) = self.first() else {
            let error = self.kept.error.take().unwrap_or_default();
            return self.give_up_split(error).await;
        };
        let incarnation = String::from_utf8_lossy(&incarnation);
        let gid = literal(&split_name(&self.shared.config.load().name, &incarnation, &xid));
        self.change_places();
        let settled = match self.prepare_split(&gid).await? {
            Ok(settled) => settled,
            Err(error) => return self.give_up_split(error).await,
        };
        // What the ledger said of the definitions, in the flight of PREPARE.
        let said = std::mem::take(&mut self.kept);
        let decided = self.decide(&gid).await;
        let committed = matches!(decided, Ok(Ok(())));
        if let Err(end) = decided {
            // Nobody knows: old does, and the next look at what is prepared asks it. What was mirrored is owed then.
            self.let_go(settled, Kept::default(), false);
            return Err(end);
        }
        self.change_places();
        let word = if committed { "COMMIT" } else { "ROLLBACK" };
        let ended = self.ask_ours(format!("{word} PREPARED {gid}").as_bytes()).await;
        let error = self.kept.error.take().map(|error| frame::server_error(&error[frame::HEAD..]));
        // 42704: another was first, and has done the same.
        let done = ended.is_ok() && error.as_ref().is_none_or(|error| error.code == "42704");
        self.let_go(settled, said, committed && done);
        ended?;
        match decided {
            Ok(Err(error)) => Ok(Err(error)),
            _ if done => Ok(Ok(())),
            _ => Err(End::Refused(half_done(error.map(|error| error.message).unwrap_or_default()))),
        }
    }

    async fn give_up_split(&mut self, error: Bytes) -> Result<Result<(), Bytes>, End> {
        self.roll_back_both().await?;
        Ok(Err(error))
    }

    /// The mirror's part of it: it commits, or is rolled back, and what it brought is owed if the ledger says so.
    fn let_go(&mut self, settled: Option<Settled>, said: Kept, committed: bool) {
        if let Some(settled) = settled {
            self.kept = said;
            self.settled(settled, committed);
        }
        self.kept = Kept::default();
    }

    /// On new: the images on the mirror, their debts, and PREPARE TRANSACTION in their flight. Err: why not.
    async fn prepare_split(&mut self, gid: &str) -> Result<Result<Option<Settled>, Bytes>, End> {
        let mut settled = None;
        if self.world.phase.mirror().is_some() {
            match self.before_commit(Ending::Commit { chain: false }).await? {
                Before::Ready(found) => settled = found,
                Before::Failed => {
                    let error = self.kept.error.take().unwrap_or_default();
                    self.sync_ours().await?;
                    return Ok(Err(error));
                }
            }
        } else {
            self.kept = Kept::default();
        }
        let text = format!("PREPARE TRANSACTION {gid}");
        let out = &mut self.server.out;
        frame::parse(out, PREPARE_NAME, text.as_bytes(), &[]);
        frame::bind(out, PREPARE_NAME, PREPARE_NAME, &[], std::iter::empty(), 0);
        frame::execute(out, PREPARE_NAME);
        frame::close_statement(out, PREPARE_NAME);
        frame::sync(out);
        for kind in [Kind::Parse, Kind::Bind, Kind::Execute, Kind::Close, Kind::Sync] {
            self.queue.push(Expected::of(kind, To::Us));
        }
        if let Err(end) = self.settle().await {
            self.let_go(settled, Kept::default(), false);
            return Err(end);
        }
        if let Some(error) = self.kept.error.take() {
            self.let_go(settled, Kept::default(), false);
            return Ok(Err(unprepared(&error)));
        }
        Ok(Ok(settled))
    }

    /// On old: the decision. Ok(Err(..)): it was refused; Err(..): nobody knows.
    async fn decide(&mut self, gid: &str) -> Result<Result<(), Bytes>, End> {
        self.change_places();
        self.ask_ours(format!("SELECT crossfade.decide({gid})").as_bytes()).await?;
        if self.kept.error.is_none() {
            self.ask_ours(b"COMMIT").await?;
        }
        Ok(match self.kept.error.take() {
            None => Ok(()),
            Some(error) => {
                if self.status != b'I' {
                    self.roll_back_ours().await?;
                }
                Err(error)
            }
        })
    }
}

/// What PREPARE TRANSACTION was refused for, as the client is told.
fn unprepared(error: &Bytes) -> Bytes {
    let said = frame::server_error(&error[frame::HEAD..]);
    let hint = match said.code.as_str() {
        "55000" => {
            "Nothing was committed. Set max_prepared_transactions on new (`crossfade check` says how), or write the two in two transactions."
        }
        "0A000" => {
            "Nothing was committed. Leave that out of the transaction, or write the tables of the two databases in two transactions."
        }
        _ => return error.clone(),
    };
    error_of(&Report::error(
        "0A000",
        format!("this transaction has written tables of two databases, and new cannot prepare it: {}", said.message),
        hint,
    ))
}

fn not_installed() -> Report {
    Report::error(
        "0A000",
        "this transaction has written tables of two databases, and schema crossfade is not installed on old, which decides",
        "Nothing was committed. Run `crossfade install`, and connect again.",
    )
}

fn half_done(why: String) -> Report {
    Report::fatal(
        "08007",
        format!(
            "this transaction is committed on old, and its part on new, which is prepared, could not be committed yet: {why}"
        ),
        "crossfade commits it as soon as it can; do not repeat the transaction. Look at `crossfade status`.",
    )
}
