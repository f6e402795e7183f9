//! COPY FROM STDIN in mirrored phases: it runs untouched on the authority. Around it stands a hidden savepoint, so that its rows have a
//! transaction id that no other row has; `copy_rows` fetches their images by it when the COPY has ended.
//!
//! Where the key is in the data it is read as the stream passes: few rows of a large table are found sooner by key.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};

use super::copy_stream::{Form, Stream, form, freezes};
use super::expect::{Done, Expected, Kind, To, Told};
use super::{End, Session};
use crate::catalog::Table;
use crate::phase::Side;
use crate::plan::cache::Planned;
use crate::plan::{CopyIn, Plan, image};
use crate::sql::facts::Verb;
use crate::wire::conn::pass;
use crate::wire::frame::{self, HEAD};

pub(super) const APART_NAME: &[u8] = b"crossfade_copy";

/// A COPY whose rows are captured.
pub(super) struct Copying {
    pub(super) table: Arc<Table>,
    pub(super) texts: image::Texts,
    /// Reads the keys in the stream, where they are there to be read.
    pub(super) keys: Option<Keys>,
    /// It runs in a savepoint of its own. Not COPY FREEZE: that wants the subtransaction in which the table was truncated.
    pub(super) apart: bool,
    /// Bytes that the client has sent.
    pub(super) bytes: u64,
}

/// The keys that a stream shows.
pub(super) struct Keys {
    pub(super) stream: Stream,
    /// The format in which they go back: 1 where the stream is binary.
    pub(super) format: i16,
}

/// Client encodings in which no byte of another character looks like ASCII.
fn encoding_is_plain(encoding: &str) -> bool {
    encoding == "UTF8" || encoding == "SQL_ASCII" || encoding.starts_with("LATIN") || encoding.starts_with("WIN")
}

/// Of each column in the stream, its place in the key. None: not all of the key is there.
fn places(copy: &CopyIn, side: Side) -> Option<Vec<Option<usize>>> {
    let table = &copy.table;
    let key = table.key.as_ref()?;
    let columns: Vec<usize> = match &copy.columns {
        None if copy.through_partition => return None,
        None => table.order.get(side).iter().copied().filter(|&at| !table.columns[at].generated.get(side)).collect(),
        Some(names) => names
            .iter()
            .map(|name| table.columns.iter().position(|column| column.name.get(side) == name))
            .collect::<Option<_>>()?,
    };
    let places: Vec<Option<usize>> =
        columns.iter().map(|at| key.columns.iter().position(|of_key| of_key == at)).collect();
    (places.iter().flatten().count() == key.columns.len()).then_some(places)
}

impl Session {
    /// How the rows of a COPY are captured; None: they are not.
    fn copying(&self, planned: &Planned, text: &[u8]) -> Option<Copying> {
        let Plan::Copy(copy) = &planned.plan else { return None };
        let matches = self.settings.client_encoding == "UTF8";
        let texts = image::texts(&copy.table, self.world.catalog.encoding.get(self.side), matches)?;
        let (table, keys, apart) = (copy.table.clone(), self.keys(copy, text), !freezes(text));
        Some(Copying { table, texts, keys, apart, bytes: 0 })
    }

    fn keys(&self, copy: &CopyIn, text: &[u8]) -> Option<Keys> {
        let form = form(text)?;
        if form != Form::Binary && !encoding_is_plain(&self.settings.client_encoding) {
            return None;
        }
        let limit = self.shared.config.load().limits.mirror_buffer;
        let stream = Stream::new(form, places(copy, self.side)?, limit);
        Some(Keys { stream, format: i16::from(form == Form::Binary) })
    }

    /// In front of a COPY, in its flight: the savepoint that sets its rows apart.
    pub(super) fn copy_begins(&mut self, planned: &Planned, text: &[u8], told: Told) {
        self.copying = self.copying(planned, text);
        let failed = self.status == b'E' && told == Told::Nobody;
        if failed || !self.copying.as_ref().is_some_and(|copying| copying.apart) {
            return;
        }
        let to = if told == Told::Nobody { To::Around(None) } else { To::Nobody };
        self.put_ours(APART_NAME, b"SAVEPOINT crossfade_copy", &[], &[], to.clone());
        if told == Told::Nobody {
            frame::sync(&mut self.server.out);
            self.queue.push(Expected::of(Kind::Sync, to));
        }
    }

    /// Waits for the end of a Query, the last that was sent; where it is a COPY, with the client's data, then the images of its rows.
    pub(super) async fn settle_query(&mut self, planned: &Planned) -> Result<(), End> {
        if planned.facts.verb == Verb::CopyFromStdin { self.settle_copy().await } else { self.settle().await }
    }

    async fn settle_copy(&mut self) -> Result<(), End> {
        let outcome = self.settle().await;
        let copying = self.copying.take();
        outcome?;
        match copying {
            Some(copying) if self.held.complete.is_some() && !self.held.failed => self.fetch_added(copying).await,
            _ => Ok(()),
        }
    }

    /// The server waits for COPY data: what the client has sent of it is passed on, and more is awaited.
    pub(super) async fn copy_data(&mut self) -> Result<(), End> {
        let mut starved = false;
        while self.queue.copying() && !starved && self.server.out.len() < self.limit {
            starved = !self.copy_piece()?;
        }
        if starved && self.client.closed {
            return Err(End::Client);
        }
        if self.queue.copying() { self.drive().await } else { Ok(()) }
    }

    /// Passes on one message to a server that reads COPY data, or what is there of it. False: more bytes are needed.
    fn copy_piece(&mut self) -> Result<bool, End> {
        if self.from_client > 0 {
            let count = self.from_client.min(self.client.inb.len());
            if let Some(copying) = &mut self.copying {
                copying.bytes += count as u64;
                if let Some(keys) = &mut copying.keys {
                    keys.stream.feed(&self.client.inb[..count]);
                }
            }
            pass(&mut self.client.inb, &mut self.server.out, count);
            self.from_client -= count;
            return Ok(count > 0);
        }
        let Some(head) = frame::head(&self.client.inb)? else { return Ok(false) };
        if head.tag == b'd' {
            pass(&mut self.client.inb, &mut self.server.out, HEAD);
            self.from_client = head.total - HEAD;
            return Ok(true);
        }
        if head.total > frame::SMALL {
            return Err(frame::Malformed::Length.into());
        }
        if self.client.inb.len() < head.total {
            self.needed = head.total;
            return Ok(false);
        }
        self.needed = 0;
        match head.tag {
            b'X' => return Err(End::Client),
            // The server would pass over Flush and Sync here; but where it has failed meanwhile it would answer the Sync.
            b'H' | b'S' => self.client.inb.advance(head.total),
            tag => {
                pass(&mut self.client.inb, &mut self.server.out, head.total);
                if matches!(tag, b'c' | b'f') {
                    self.queue.copy_end();
                    // A Flush from before was passed over.
                    frame::flush(&mut self.server.out);
                }
            }
        }
        Ok(true)
    }

    /// The rest of a CopyData of which the server has the head: the COPY has failed, and nothing of ours may come in between.
    pub(super) async fn copy_rest(&mut self) -> Result<(), End> {
        while self.from_client > 0 {
            let count = self.from_client.min(self.client.inb.len());
            pass(&mut self.client.inb, &mut self.server.out, count);
            self.from_client -= count;
            if self.from_client > 0 {
                if self.client.closed && count == 0 {
                    return Err(End::Client);
                }
                self.drive().await?;
                self.replies()?;
            }
        }
        Ok(())
    }

    /// A COPY as a Query, inside a block: its end, which was held back.
    pub(super) async fn copy_simple(&mut self, planned: &Planned) -> Result<(), End> {
        self.settle_query(planned).await?;
        if let Some(complete) = self.held.complete.take() {
            self.client.out.extend_from_slice(&complete);
        }
        frame::ready(&mut self.client.out, self.status);
        Ok(())
    }

    /// COPY in the extended protocol: `frame` is the client's Execute.
    pub(super) async fn copy_extended(&mut self, frame: Bytes, planned: &Planned, text: &[u8]) -> Result<(), End> {
        self.settle().await?;
        self.held = Default::default();
        self.copy_begins(planned, text, Told::Client);
        self.server.out.put_slice(&frame);
        self.queue.push(Expected { kind: Kind::Execute, to: To::Client, hold: true, done: Done::Nothing });
        if self.queue.skipping() {
            self.copying = None;
            return Ok(());
        }
        self.settle_copy().await?;
        if let Some(complete) = self.held.complete.take() {
            self.client.out.extend_from_slice(&complete);
        }
        Ok(())
    }
}
