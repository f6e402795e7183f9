//! The rows that a COPY has added, fetched in its transaction, a batch at a time, when it has ended.
//!
//! A COPY ran in a hidden savepoint, so `xmin` of its rows is the id of that subtransaction, and of no row that anything else has written. Which id
//! that is, pg_locks says: each subtransaction under way holds the lock of its own id, and the newest of those that this backend holds is the
//! innermost one's. The rows are found by the keys that the stream has shown, or by a walk from the table's end towards its
//! front, in slices, until as many were counted as the COPY's tag says: COPY adds blocks at the end, and fills free space before it.
//! Fewer, or more, and nothing is fetched; the audit then taints the table. An error (statement_timeout, a privilege) goes back to a
//! savepoint behind the COPY: whether its rows can be fetched never decides over the client's transaction.

use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tracing::info;

use super::copy::{APART_NAME, Copying, Keys};
use super::expect::{Cut, Expected, Kind, To, Written};
use super::{End, Session};
use crate::plan::{Audited, Capture, Effect, Splice, image};
use crate::wire::frame;

/// Rows that are fetched at once, at most.
const BATCH: usize = 500;

/// Blocks that are looked through at most, from the table's end: 1 GiB. A taint would have all of the table compared; but this is done while the client waits.
const BLOCKS_MAX: u64 = 131_072;

/// Blocks that are looked through first, beside those that the data may have filled.
const BLOCKS_FIRST: u64 = 32;

/// From here on a range of tids is read as such, and not by reading all of the table.
const TID_RANGES: u32 = 140_000;

const IMAGES_NAME: &[u8] = b"crossfade_images";

const FETCH: &[u8] = b"crossfade_fetch";
const FETCHED: &[u8] = b"crossfade_fetched";
const NOT_FETCHED: &[u8] = b"crossfade_not_fetched";
const TOGETHER: &[u8] = b"crossfade_together";
const WHERE_NAME: &[u8] = b"crossfade_where";
/// Our statements around a COPY, each in a portal of its own.
pub(super) const AROUND: [&[u8]; 6] = [APART_NAME, FETCH, FETCHED, NOT_FETCHED, TOGETHER, WHERE_NAME];

/// The id under which the rows were written, and the size of the table and its partitions in blocks.
const WHERE: &[u8] = b"SELECT (SELECT l.transactionid FROM pg_catalog.pg_locks AS l \
    WHERE l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND l.locktype OPERATOR(pg_catalog.=) 'transactionid' \
    AND l.mode OPERATOR(pg_catalog.=) 'ExclusiveLock' AND l.granted ORDER BY pg_catalog.age(l.transactionid) LIMIT 1), \
    pg_catalog.sum(COALESCE(pg_catalog.pg_relation_size(o), 0) OPERATOR(pg_catalog./) \
    pg_catalog.current_setting('block_size')::pg_catalog.int8) FROM pg_catalog.unnest($1::pg_catalog.oid[]) AS o";

/// The rows that are to be fetched.
struct Added {
    copying: Copying,
    /// Of the command tag.
    rows: u64,
    xid: u32,
    blocks: u64,
    cut: Rc<Cut>,
}

impl Added {
    /// Rows at once, by the average of the stream: a batch is held whole.
    fn batch(&self, limit: usize) -> usize {
        let average = usize::try_from(self.copying.bytes / self.rows.max(1)).unwrap_or(usize::MAX);
        (limit / 16 / average.max(1)).clamp(1, BATCH)
    }
}

impl Session {
    /// The images of the rows that a COPY has added. Whatever comes of it, the transaction stands as the COPY has left it.
    pub(super) async fn fetch_added(&mut self, mut copying: Copying) -> Result<(), End> {
        let apart = copying.apart;
        let rows = rows_in(&self.kept.tag);
        if rows > 0 && self.audit.is_some() {
            let keys = copying.keys.take();
            self.put_around(FETCH, b"SAVEPOINT crossfade_fetch", &[]);
            let fetched = match self.added(copying, rows).await? {
                Some(added) => self.fetch(&added, keys).await?,
                None => false,
            };
            if self.kept.error.is_some() {
                self.explain_lost("an error");
                self.put_close();
                self.put_around(NOT_FETCHED, b"ROLLBACK TO SAVEPOINT crossfade_fetch", &[]);
                self.around().await?;
            } else if !fetched {
                self.explain_lost("they were not found");
            }
            if !apart {
                self.put_around(FETCHED, b"RELEASE SAVEPOINT crossfade_fetch", &[]);
            }
        }
        if apart {
            // With it goes the other one.
            self.put_around(TOGETHER, b"RELEASE SAVEPOINT crossfade_copy", &[]);
        }
        self.around().await?;
        self.kept.error = None;
        Ok(())
    }

    fn explain_lost(&self, why: &str) {
        let error = self.kept.error.as_ref().map(|error| frame::server_error(&error[frame::HEAD..]).message);
        info!(why, error, "the rows of a COPY were not captured; the audit will find their table");
    }

    fn put_around(&mut self, name: &'static [u8], text: &[u8], values: &[Option<&[u8]>]) {
        let types = &[25][..values.len()];
        self.put_ours(name, text, types, values, To::Around(None));
    }

    /// Waits for what was put around a COPY, with an end of its own. Rows and error are in `kept`; false: there was an error.
    async fn around(&mut self) -> Result<bool, End> {
        self.kept.rows.clear();
        self.kept.bytes = 0;
        frame::sync(&mut self.server.out);
        self.queue.push(Expected::of(Kind::Sync, To::Around(None)));
        self.settle().await?;
        Ok(self.kept.error.is_none())
    }

    /// What must be known to find the rows.
    async fn added(&mut self, copying: Copying, rows: u64) -> Result<Option<Added>, End> {
        self.kept.error = None;
        let table = &copying.table;
        let partitions = table.partitions.get(self.side);
        let oids: Vec<String> = partitions.iter().chain([table.oid.get(self.side)]).map(u32::to_string).collect();
        let oids = format!("{{{}}}", oids.join(","));
        self.put_around(WHERE_NAME, WHERE, &[Some(oids.as_bytes())]);
        if !self.around().await? {
            return Ok(None);
        }
        let number = |at: usize| {
            let value = self.kept.rows.first()?.get(at)?.as_ref()?;
            std::str::from_utf8(value).ok()?.parse::<u64>().ok()
        };
        let (Some(Ok(xid)), Some(blocks)) = (number(0).map(u32::try_from), number(1)) else { return Ok(None) };
        let capture = Capture {
            splice: Splice::default(),
            effect: Some(Effect::Row),
            returning: false,
            tables: vec![copying.table.clone()],
            audited: Audited::All,
            shown: Vec::new(),
        };
        let cut = Rc::new(Cut {
            capture: Arc::new(capture),
            binary: true,
            written: Written::Insert,
            shown: Vec::new(),
            positions: None,
        });
        Ok(Some(Added { copying, rows, xid, blocks, cut }))
    }

    /// True: all of the rows were fetched, and no other.
    async fn fetch(&mut self, added: &Added, keys: Option<Keys>) -> Result<bool, End> {
        let number = added.copying.table.number;
        let before = self.inserts(number);
        if let Some(Keys { stream, format }) = keys
            && let Some(keys) = stream.finish()
        {
            self.fetch_by_key(added, keys, format).await?;
            if self.kept.error.is_some() {
                return Ok(false);
            }
            if self.inserts(number) - before == added.rows as i64 {
                return Ok(true);
            }
            // Rounded when stored, changed by a trigger, left out by WHERE. What was found is right, and is found again.
            if let Some(audit) = &mut self.audit {
                *audit.inserts(number) = before;
            }
        }
        match self.first_block(added).await? {
            Some(first) => self.fetch_behind(added, first).await?,
            None => return Ok(false),
        }
        Ok(self.kept.error.is_none() && self.inserts(number) - before == added.rows as i64)
    }

    /// Images of added rows so far, as the audit counts them.
    fn inserts(&mut self, table: u32) -> i64 {
        self.audit.as_mut().map_or(0, |audit| *audit.inserts(table))
    }

    async fn fetch_by_key(&mut self, added: &Added, keys: Vec<Bytes>, format: i16) -> Result<(), End> {
        let table = &added.copying.table;
        let width = table.key.as_ref().map_or(1, |key| key.columns.len());
        let rows = added.batch(self.shared.config.load().limits.mirror_buffer);
        let rows = rows.min(image::keys_max(table) - 1);
        let xid = if format == 1 { added.xid.to_be_bytes().to_vec() } else { added.xid.to_string().into_bytes() };
        let mut values = keys.into_iter();
        loop {
            let batch: Vec<Bytes> = values.by_ref().take(width * rows).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let select = image::added_by_key(table, self.side, batch.len() / width, added.copying.texts);
            let values: Vec<Option<&[u8]>> =
                [&xid[..]].into_iter().chain(batch.iter().map(|value| &value[..])).map(Some).collect();
            self.put_select(&select, &[format], &values, &added.cut);
            self.put_batch(0, &added.cut);
            self.put_close();
            if !self.around().await? {
                return Ok(());
            }
            self.send_some_ahead().await;
        }
    }

    /// The block from which on all of the rows lie. None: they do not, as far as was looked, or something else has written under the same id.
    async fn first_block(&mut self, added: &Added) -> Result<Option<u64>, End> {
        let table = &added.copying.table;
        let partitioned = !table.partitions.get(self.side).is_empty();
        // Without a savepoint other rows may have the same id: then all must be counted. Each partition has an end of its own.
        let walks = added.copying.apart && !partitioned && *self.world.catalog.version.get(self.side) >= TID_RANGES;
        if !walks && added.blocks > BLOCKS_MAX {
            return Ok(None);
        }
        let floor = added.blocks.saturating_sub(BLOCKS_MAX);
        let mut step = if walks { BLOCKS_FIRST + added.copying.bytes / 4096 } else { u64::MAX };
        let (mut first, mut found) = (added.blocks, 0);
        let select = image::count_added(table, self.side);
        while found < added.rows && first > floor {
            let behind = if walks { tid(first) } else { tid(u64::from(u32::MAX)) };
            first = first.saturating_sub(step).max(floor);
            step = step.saturating_mul(4);
            let (xid, from) = (added.xid.to_string(), tid(first));
            let values = [xid.as_bytes(), from.as_bytes(), behind.as_bytes()].map(Some);
            self.put_select(&select, &[0], &values, &added.cut);
            frame::execute(&mut self.server.out, IMAGES_NAME);
            self.queue.push(Expected::of(Kind::Execute, To::Around(None)));
            self.put_close();
            if !self.around().await? {
                return Ok(None);
            }
            let counted = self.kept.rows.first().and_then(|row| row.first()?.as_ref()?.first_chunk().copied());
            found += counted.map_or(0, u64::from_be_bytes);
        }
        Ok((found == added.rows).then_some(first))
    }

    /// The rows from that block on, in batches of one portal.
    async fn fetch_behind(&mut self, added: &Added, first: u64) -> Result<(), End> {
        let select = image::added_behind(&added.copying.table, self.side, added.copying.texts);
        let (xid, first) = (added.xid.to_string(), tid(first));
        self.put_select(&select, &[0], &[Some(xid.as_bytes()), Some(first.as_bytes())], &added.cut);
        let batch = added.batch(self.shared.config.load().limits.mirror_buffer);
        for _ in 0..added.rows.div_ceil(batch as u64) {
            self.put_batch(batch as u32, &added.cut);
            if !self.around().await? {
                return Ok(());
            }
            self.send_some_ahead().await;
        }
        self.put_close();
        self.around().await.map(|_| ())
    }

    /// A long COPY would fill the whole buffer again and again: it is held three times over while it is sent.
    async fn send_some_ahead(&mut self) {
        if self.writes.bytes > self.shared.config.load().limits.mirror_buffer / 8 {
            self.send_ahead().await;
        }
    }

    fn put_select(&mut self, select: &image::Statement, formats: &[i16], values: &[Option<&[u8]>], cut: &Rc<Cut>) {
        let out = &mut self.server.out;
        frame::parse(out, IMAGES_NAME, select.text.as_bytes(), &select.parameter_types);
        frame::bind(out, IMAGES_NAME, IMAGES_NAME, formats, values.iter().copied(), 1);
        for kind in [Kind::Parse, Kind::Bind] {
            self.queue.push(Expected::of(kind, To::Around(Some(cut.clone()))));
        }
    }

    fn put_batch(&mut self, rows: u32, cut: &Rc<Cut>) {
        frame::execute_rows(&mut self.server.out, IMAGES_NAME, rows);
        self.queue.push(Expected::of(Kind::Execute, To::Around(Some(cut.clone()))));
    }

    fn put_close(&mut self) {
        frame::close_portal(&mut self.server.out, IMAGES_NAME);
        frame::close_statement(&mut self.server.out, IMAGES_NAME);
        for _ in 0..2 {
            self.queue.push(Expected::of(Kind::Close, To::Around(None)));
        }
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

fn tid(block: u64) -> String {
    format!("({block},0)")
}

/// `COPY 12`.
fn rows_in(tag: &[u8]) -> u64 {
    let digits = tag.strip_suffix(b"\0").unwrap_or(tag).strip_prefix(b"COPY ").unwrap_or_default();
    std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}
