//! COPY FROM STDIN in mirrored phases: it runs untouched on the authority, the keys of its rows are read as the stream passes, and when it has
//! ended their images are fetched by those keys, in the same transaction, a batch at a time.
//!
//! What cannot be read so (unusual options, tables without a key, more keys than `limits.mirror_buffer` holds) is left to the audit, and so is
//! every row that the images do not show.

use std::rc::Rc;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::copy_stream::{Form, Stream, form};
use super::expect::{Cut, Done, Expected, Kind, To, Written};
use super::{End, Session};
use crate::catalog::Table;
use crate::phase::Side;
use crate::plan::cache::Planned;
use crate::plan::{Capture, CopyIn, Effect, Plan, image};
use crate::sql::facts::Verb;
use crate::wire::conn::pass;
use crate::wire::frame::{self, HEAD};

/// Rows that are fetched at once.
const BATCH: usize = 500;
const IMAGES_NAME: &[u8] = b"crossfade_images";

/// A COPY whose rows are captured.
pub(super) struct Copying {
    table: Arc<Table>,
    texts: image::Texts,
    stream: Stream,
    /// The format in which the keys go back: 1 where the stream is binary.
    format: i16,
}

/// Client encodings in which no byte of another character looks like ASCII.
fn encoding_is_plain(encoding: &str) -> bool {
    encoding == "UTF8" || encoding == "SQL_ASCII" || encoding.starts_with("LATIN") || encoding.starts_with("WIN")
}

/// Of each column in the stream, its place in the key.
fn places(copy: &CopyIn, side: Side) -> Option<Vec<Option<usize>>> {
    let table = &copy.table;
    let key = table.key.as_ref()?;
    let columns: Vec<usize> = match &copy.columns {
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
        let form = form(text)?;
        if form != Form::Binary && !encoding_is_plain(&self.settings.client_encoding) {
            return None;
        }
        let matches = self.settings.client_encoding == "UTF8";
        let texts = image::texts(&copy.table, self.world.catalog.encoding.get(self.side), matches)?;
        let format = i16::from(form == Form::Binary);
        let limit = self.shared.config.load().limits.mirror_buffer;
        let stream = Stream::new(form, places(copy, self.side)?, limit);
        Some(Copying { table: copy.table.clone(), texts, stream, format })
    }

    /// Waits for the end of a Query, the last that was sent; where it is a COPY, with the client's data.
    pub(super) async fn settle_query(&mut self, planned: &Planned, text: &[u8]) -> Result<(), End> {
        if planned.facts.verb != Verb::CopyFromStdin {
            return self.settle().await;
        }
        self.settle_copy(planned, text).await?;
        if self.queue.skipping() {
            // Fetching images has failed: the Query has.
            frame::sync(&mut self.server.out);
            self.queue.push(Expected::of(Kind::Sync, To::Us));
            self.settle().await?;
        }
        Ok(())
    }

    /// The client's data, then the images of its rows.
    async fn settle_copy(&mut self, planned: &Planned, text: &[u8]) -> Result<(), End> {
        self.copying = self.copying(planned, text);
        let outcome = self.settle().await;
        let copying = self.copying.take();
        outcome?;
        match copying {
            Some(copying) if self.held.complete.is_some() && !self.held.failed => self.fetch(copying).await,
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
                copying.stream.feed(&self.client.inb[..count]);
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

    /// The images of the rows whose keys the stream has shown.
    async fn fetch(&mut self, copying: Copying) -> Result<(), End> {
        let Copying { table, texts, stream, format } = copying;
        let Some(keys) = stream.finish() else { return Ok(()) };
        let width = table.key.as_ref().map_or(1, |key| key.columns.len());
        let capture = Capture {
            splice: String::new(),
            effect: Effect::Row,
            returning: false,
            tables: vec![table.clone()],
            audited: true,
        };
        let cut = Rc::new(Cut { capture: Arc::new(capture), binary: true, written: Written::Insert });
        let mut values = keys.into_iter();
        loop {
            let batch: Vec<Bytes> = values.by_ref().take(width * BATCH.min(image::keys_max(&table))).collect();
            if batch.is_empty() {
                break;
            }
            self.put_fetch(&table, texts, &batch, format, width, &cut);
            self.settle().await?;
            if self.queue.skipping() {
                // The client has had the error; without its COMMIT the images do not matter.
                self.held.complete = None;
                self.held.failed = true;
                break;
            }
            // A long COPY would fill the whole buffer again and again: it is held three times over while it is sent.
            if self.writes.bytes > self.shared.config.load().limits.mirror_buffer / 8 {
                self.send_ahead().await;
            }
        }
        Ok(())
    }

    fn put_fetch(
        &mut self,
        table: &Table,
        texts: image::Texts,
        batch: &[Bytes],
        format: i16,
        width: usize,
        cut: &Rc<Cut>,
    ) {
        let select = image::select(table, self.side, batch.len() / width, texts, "");
        let out = &mut self.server.out;
        let to = To::Images(cut.clone());
        frame::parse(out, IMAGES_NAME, select.text.as_bytes(), &select.parameter_types);
        frame::bind(out, IMAGES_NAME, IMAGES_NAME, &[format], batch.iter().map(|value| Some(&value[..])), 1);
        frame::execute(out, IMAGES_NAME);
        frame::close_portal(out, IMAGES_NAME);
        frame::close_statement(out, IMAGES_NAME);
        for kind in [Kind::Parse, Kind::Bind, Kind::Execute, Kind::Close, Kind::Close] {
            self.queue.push(Expected::of(kind, to.clone()));
        }
    }

    /// A COPY as a Query, inside a block: its end, which was held back.
    pub(super) async fn copy_simple(&mut self, planned: &Planned, text: &[u8]) -> Result<(), End> {
        self.settle_query(planned, text).await?;
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
        self.server.out.put_slice(&frame);
        self.queue.push(Expected { kind: Kind::Execute, to: To::Client, hold: true, done: Done::Nothing });
        if self.queue.skipping() {
            return Ok(());
        }
        self.settle_copy(planned, text).await?;
        if let Some(complete) = self.held.complete.take() {
            self.client.out.extend_from_slice(&complete);
        }
        Ok(())
    }

    /// A row that was fetched.
    pub(super) fn fetched(&mut self, cut: &Cut, payload: &[u8]) -> Result<(), End> {
        let payload = BytesMut::from(payload);
        let (_, _, hidden) = frame::cut_row(&payload)?;
        if let Some(hidden) = hidden {
            self.capture(cut, hidden);
        }
        Ok(())
    }
}
