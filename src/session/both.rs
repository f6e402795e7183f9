//! A block of the client that is open on both sides: its savepoints are made on both, and it ends on both.
//!
//! Whichever side has written nothing has nothing to lose: it ends first, and the other one's COMMIT decides. Where both have written: `split_commit`.

use bytes::{Buf, Bytes};

use super::expect::{Kind, To};
use super::legs::Block;
use super::turn::{Turned, leaves_failed};
use super::{End, Session};
use crate::sql::facts::Verb;
use crate::wire::frame::{self, Head, Report};

/// The transaction's number: it has one once it has written, or locked rows.
pub(super) const XID: &[u8] = b"SELECT pg_catalog.pg_current_xact_id_if_assigned()::text";

impl Session {
    /// A statement about the block itself, in `head`.
    pub(super) async fn on_both(&mut self, head: Head, verb: &Verb, text: &Bytes) -> Result<Turned, End> {
        if !self.queue.is_empty() {
            self.settle().await?;
        }
        if self.queue.skipping() {
            return Ok(Turned::Go);
        }
        if self.unsynced {
            self.sync_ours().await?;
            self.unsynced = false;
        }
        self.note_sent();
        let failed = self.status == b'E' || self.legs.other.as_deref().is_some_and(|leg| leg.status == b'E');
        if failed && !leaves_failed(verb) {
            // The side that has failed is in use, and says so.
            return Ok(Turned::Go);
        }
        match verb {
            Verb::Commit { chain } | Verb::Rollback { chain } => {
                let commit = matches!(verb, Verb::Commit { .. });
                self.end_both(head, commit, *chain).await?;
                Ok(Turned::Done)
            }
            Verb::PrepareTransaction => Ok(self.refuse(head, no_prepare())),
            _ if names_constraints(text) => Ok(Turned::Go),
            _ => self.part_both(head, verb, text).await,
        }
    }

    /// SAVEPOINT, RELEASE, ROLLBACK TO, SET TRANSACTION: on old unseen, then on new for the client.
    async fn part_both(&mut self, head: Head, verb: &Verb, text: &Bytes) -> Result<Turned, End> {
        if !self.is_away() {
            self.change_places();
        }
        self.ask_ours(text).await?;
        if let Some(error) = self.kept.error.take() {
            self.answer_error(head, &error);
            return Ok(Turned::Done);
        }
        self.change_places();
        self.legs.note_sending(verb, text);
        Ok(Turned::Go)
    }

    async fn end_both(&mut self, head: Head, commit: bool, chain: bool) -> Result<(), End> {
        let block = self.legs.block.take().unwrap_or_default();
        let failed = self.status == b'E' || self.legs.other.as_deref().is_some_and(|leg| leg.status == b'E');
        let committed = match commit && !failed {
            true => self.commit_both().await?,
            false => {
                self.roll_back_both().await?;
                Ok(())
            }
        };
        if self.is_away() {
            self.change_places();
        }
        let tag: &[u8] = if commit && !failed { b"COMMIT" } else { b"ROLLBACK" };
        match committed {
            Err(error) => self.answer_error(head, &error),
            Ok(()) => {
                if chain {
                    self.chain(&block).await?;
                }
                self.client.inb.advance(head.total.min(self.client.inb.len()));
                frame::complete(&mut self.client.out, tag);
                match head.tag {
                    b'Q' => frame::ready(&mut self.client.out, self.status),
                    _ => self.unsynced = true,
                }
            }
        }
        self.note_sent();
        Ok(())
    }

    async fn chain(&mut self, block: &Block) -> Result<(), End> {
        let block = block.again();
        self.open_here(block.begin.as_deref().unwrap_or(b"BEGIN")).await?;
        self.legs.block = Some(block);
        Ok(())
    }

    /// The client gets this error frame; in a pipeline what follows up to Sync is passed over.
    fn answer_error(&mut self, head: Head, error: &[u8]) {
        self.client.inb.advance(head.total.min(self.client.inb.len()));
        self.client.out.extend_from_slice(error);
        match head.tag {
            b'Q' => frame::ready(&mut self.client.out, self.status),
            _ => {
                self.put_failing(Kind::Bind, To::Nowhere, false);
                self.unsynced = true;
            }
        }
    }

    pub(super) async fn roll_back_both(&mut self) -> Result<(), End> {
        for _ in 0..2 {
            if self.status != b'I' {
                self.roll_back_ours().await?;
            }
            self.change_places();
        }
        Ok(())
    }

    /// Err: an error frame, which says why nothing was committed.
    async fn commit_both(&mut self) -> Result<Result<(), Bytes>, End> {
        let here = self.has_written().await?;
        self.change_places();
        let there = self.has_written().await?;
        if here && there {
            return self.commit_split().await;
        }
        // In use is the one that was asked last: it ends first, if it has written nothing.
        if there {
            self.change_places();
        }
        for _ in 0..2 {
            if let Err(error) = self.commit_here().await? {
                self.change_places();
                if self.status != b'I' {
                    self.roll_back_ours().await?;
                }
                return Ok(Err(error));
            }
            self.change_places();
        }
        Ok(Ok(()))
    }

    async fn has_written(&mut self) -> Result<bool, End> {
        self.ask_ours(XID).await?;
        Ok(self.first().is_some())
    }

    /// COMMIT on the session in use; Err: its error frame.
    pub(super) async fn commit_here(&mut self) -> Result<Result<(), Bytes>, End> {
        if self.is_away() || self.world.phase.mirror().is_none() {
            self.ask_ours(b"COMMIT").await?;
        } else {
            self.finish_ours().await?;
        }
        Ok(match self.kept.error.take() {
            Some(error) => Err(error),
            None => Ok(()),
        })
    }
}

/// SET CONSTRAINTS of some by their names, which are those of one side.
fn names_constraints(text: &[u8]) -> bool {
    let text = String::from_utf8_lossy(&text[..text.len().min(1024)]).to_lowercase();
    let mut words = text.split_whitespace();
    words.next() == Some("set") && words.next() == Some("constraints") && words.next() != Some("all")
}

pub(super) fn error_of(report: &Report) -> Bytes {
    let mut out = bytes::BytesMut::new();
    report.put(&mut out);
    out.freeze()
}

fn no_prepare() -> Report {
    Report::error(
        "0A000",
        "this transaction is open on two databases (some of its tables stay on old, others are on new): it cannot be prepared",
        "Use COMMIT.",
    )
}
