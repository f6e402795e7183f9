//! The answer to a read of a session for reads, passed on to the client as it comes. Until its first row, or its end, the client knows of nothing: then the
//! authority's own session may still be asked.

use std::task::Poll;

use bytes::{Buf, BytesMut};

use super::served::Seat;
use super::{End, Session};
use crate::phase::Side;
use crate::wire::conn::pass;
use crate::wire::frame::{self, HEAD, Head, Report};

/// How an answer begins.
pub(super) enum Begun {
    /// The client has a part of it.
    Answer,
    /// With an error, which the client does not hear of: the authority is asked. `shape`: it is about the statement, whatever its values.
    Refused { shape: bool },
    /// The connection broke.
    Broken,
    /// Not in time.
    Late,
}

/// How an answer ends.
pub(super) enum Ended {
    /// With ReadyForQuery.
    Whole,
    /// The connection broke between two frames; the client was told.
    Broken,
    /// The session cannot go on.
    Gone(End),
}

impl Session {
    /// Waits for the first row or the end, for `mirror.timeout` at most. `swallowed`: answers to messages of ours in front of it.
    pub(super) async fn answer_begins(&mut self, side: Side, swallowed: &[u8]) -> Begun {
        let limit = self.shared.config.load().mirror.timeout;
        let clock = self.worker.clock.clone();
        clock.limit(limit, self.first_part(side, swallowed)).await.unwrap_or(Begun::Late)
    }

    async fn first_part(&mut self, side: Side, mut swallowed: &[u8]) -> Begun {
        let mut held = BytesMut::new();
        let mut refused = None;
        loop {
            let Some(seat) = self.seat(side) else { return Begun::Broken };
            let head = match frame::head(&seat.conn.inb) {
                Ok(Some(head)) if head.fits_server() => head,
                Ok(None) => match seat.conn.fill().await {
                    Ok(()) => continue,
                    Err(_) => return Begun::Broken,
                },
                _ => return Begun::Broken,
            };
            let begins = refused.is_none() && matches!(head.tag, b'D' | b'C' | b'I');
            if begins {
                self.client.out.unsplit(held);
                return Begun::Answer;
            }
            if seat.conn.inb.len() < head.total {
                match seat.conn.fill().await {
                    Ok(()) => continue,
                    Err(_) => return Begun::Broken,
                }
            }
            let frame = seat.conn.inb.split_to(head.total);
            match head.tag {
                b'Z' => return Begun::Refused { shape: refused.unwrap_or(false) },
                b'E' => {
                    let code = frame::server_error(&frame[HEAD..]).code;
                    if code == "57014" {
                        // Its client has cancelled it, or its statement_timeout: the authority must not begin anew.
                        self.client.out.unsplit(held);
                        self.client.out.extend_from_slice(&frame);
                        return Begun::Answer;
                    }
                    refused = Some(code.starts_with("42") || code == "25006");
                }
                b'S' | b'A' => {}
                tag if swallowed.first() == Some(&tag) => swallowed = &swallowed[1..],
                b'T' => {
                    let mut frame = frame;
                    self.rename_tables(side, &mut frame);
                    held.extend_from_slice(&frame);
                }
                _ => held.extend_from_slice(&frame),
            }
        }
    }

    /// RowDescription names tables by the numbers that they have on its server: the client knows the authority's.
    fn rename_tables(&self, side: Side, frame: &mut BytesMut) {
        let catalog = &self.world.catalog;
        let Ok(count) = frame::Fields::new(&frame[HEAD..]).count() else { return };
        let mut at = HEAD + 2;
        for _ in 0..count {
            let Some(end) = memchr::memchr(0, frame.get(at..).unwrap_or_default()) else { return };
            let Some(oid) = frame.get_mut(at + end + 1..at + end + 5) else { return };
            let number = u32::from_be_bytes([oid[0], oid[1], oid[2], oid[3]]);
            if let Some(table) = catalog.by_oid.get(side).get(&number) {
                oid.copy_from_slice(&table.oid.get(self.side).to_be_bytes());
            }
            at += end + 19;
        }
    }

    /// Passes the rest on.
    pub(super) async fn answer_ends(&mut self, side: Side) -> Ended {
        // Of a frame that is passed on as it comes.
        let mut left = 0;
        loop {
            let limit = self.limit;
            let out = &mut self.client.out;
            let Some(seat) = super::served::taken(&mut self.serving, side) else { return Ended::Broken };
            if left > 0 {
                let count = left.min(seat.conn.inb.len());
                pass(&mut seat.conn.inb, out, count);
                left -= count;
                if left == 0 && out.len() < limit {
                    continue;
                }
            } else {
                match step(seat, out) {
                    Ok(Step::Passed(more)) => {
                        left = more;
                        if out.len() < limit {
                            continue;
                        }
                    }
                    Ok(Step::Ready) => return Ended::Whole,
                    Ok(Step::More) => {}
                    Ok(Step::Dismissed) => return self.broke_off(side),
                    Err(why) => return Ended::Gone(End::Mismatch(why)),
                }
            }
            if let Err(ended) = self.more(side, left > 0).await {
                return ended;
            }
        }
    }

    /// Moves bytes until some came from the server.
    async fn more(&mut self, side: Side, within: bool) -> Result<(), Ended> {
        let limit = self.limit;
        let client = &mut self.client;
        let Some(seat) = super::served::taken(&mut self.serving, side) else { return Err(Ended::Broken) };
        let moved = std::future::poll_fn(|cx| {
            let crowded = client.out.len() >= limit;
            if let Poll::Ready(Err(error)) = client.poll_flush(cx) {
                return Poll::Ready(Err(Ended::Gone(End::ClientBroke(error.to_string()))));
            }
            if client.out.len() < limit {
                match seat.conn.poll_fill(cx) {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(Ended::Broken)),
                    Poll::Ready(Ok(_)) => return Poll::Ready(Ok(())),
                    Poll::Pending => {}
                }
            }
            if crowded && client.out.len() < limit { Poll::Ready(Ok(())) } else { Poll::Pending }
        })
        .await;
        match moved {
            Err(Ended::Broken) if within => {
                Err(Ended::Gone(End::ServerBroke(format!("{side} broke off in the middle of a row"))))
            }
            Err(Ended::Broken) => Err(self.broke_off(side)),
            moved => moved,
        }
    }

    /// The server ended the session between two frames of its answer.
    fn broke_off(&mut self, side: Side) -> Ended {
        let report = Report::error(
            "08006",
            format!("the connection to the {side} database broke in the middle of its answer"),
            "Repeat the statement: it only reads.",
        );
        report.put(&mut self.client.out);
        Ended::Broken
    }
}

enum Step {
    /// A frame, or the beginning of one of which so many bytes are to come.
    Passed(usize),
    /// The end of the answer.
    Ready,
    /// More bytes are needed.
    More,
    /// The server ends the session.
    Dismissed,
}

fn step(seat: &mut Seat, out: &mut BytesMut) -> Result<Step, String> {
    let inb = &mut seat.conn.inb;
    let head: Head = match frame::head(inb).map_err(|error| error.to_string())? {
        Some(head) if head.fits_server() => head,
        Some(head) => {
            return Err(format!("{:?} of {} bytes from a session for reads", char::from(head.tag), head.total));
        }
        None => return Ok(Step::More),
    };
    if head.tag == b'D' {
        let there = head.total.min(inb.len());
        pass(inb, out, there);
        return Ok(Step::Passed(head.total - there));
    }
    if inb.len() < head.total {
        return Ok(Step::More);
    }
    match head.tag {
        b'E' if frame::server_error(&inb[HEAD..head.total]).fatal => return Ok(Step::Dismissed),
        b'S' | b'A' => inb.advance(head.total),
        b'C' | b'E' | b'N' | b'I' | b'Z' => pass(inb, out, head.total),
        tag => return Err(format!("{:?} in the middle of the answer to a read", char::from(tag))),
    }
    Ok(if head.tag == b'Z' { Step::Ready } else { Step::Passed(0) })
}
