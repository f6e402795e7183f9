//! A chunk of a table as the authority has it: read without a lock, and looked at again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::TryStreamExt;

use super::super::across::row_across;
use super::super::binary::{Field, Parameter, put_copy_row};
use super::super::error::Error;
use super::super::link::Link;
use super::super::sql::{Bounds, TableSql, references};
use crate::catalog::{Layout, Table};
use crate::ledger::debts::{Values, put_values, take_values};
use crate::phase::Side;

/// Keys of one chunk in their order, packed: each as [`put_values`] writes it, with the row's xmin.
#[derive(Default)]
struct Keys {
    bytes: BytesMut,
    /// Where each key ends, and the xmin of its row.
    ends: Vec<(usize, u32)>,
}

impl Keys {
    fn push<'a>(&mut self, key: impl ExactSizeIterator<Item = Option<&'a [u8]>>, xmin: u32) {
        self.bytes.put_u16(key.len() as u16);
        put_fields(key, &mut self.bytes);
        self.ends.push((self.bytes.len(), xmin));
    }

    fn iter(&self) -> impl Iterator<Item = (&[u8], u32)> {
        let mut from = 0;
        self.ends.iter().map(move |&(end, xmin)| (&self.bytes[std::mem::replace(&mut from, end)..end], xmin))
    }
}

fn put_fields<'a>(fields: impl Iterator<Item = Option<&'a [u8]>>, out: &mut BytesMut) {
    for field in fields {
        match field {
            None => out.put_i32(-1),
            Some(bytes) => {
                out.put_i32(bytes.len() as i32);
                out.put_slice(bytes);
            }
        }
    }
}

/// A key out of its packed form.
fn unpacked(packed: &[u8]) -> Values {
    take_values(&mut Bytes::copy_from_slice(packed)).unwrap_or_default()
}

/// The packed form of a key.
pub(super) fn packed(key: &[Option<Bytes>]) -> Bytes {
    let mut out = BytesMut::new();
    put_values(key, &mut out);
    out.freeze()
}

/// Rows between two keys as one snapshot of the authority showed them.
pub(super) struct Chunk {
    /// What it covers; never open at the end.
    pub bounds: Bounds,
    /// How many rows it holds, at least one.
    pub rows: usize,
    /// The rows as COPY BINARY takes them on the mirror, without header and trailer; empty where COPY does not take them.
    pub copy: Bytes,
    keys: Keys,
    /// No version that was committed after the reading has an older xmin.
    horizon: String,
}

impl Chunk {
    /// All keys, as the authority has them.
    pub fn keys(&self) -> Vec<Values> {
        self.keys.iter().map(|(key, _)| unpacked(key)).collect()
    }

    /// The keys that are not among these (packed).
    pub fn keys_but(&self, these: &std::collections::HashSet<Bytes>) -> Vec<Values> {
        self.keys.iter().filter(|(key, _)| !these.contains(*key)).map(|(key, _)| unpacked(key)).collect()
    }

    /// Its last key.
    pub fn last(&self) -> Option<Values> {
        self.bounds.upto.clone()
    }
}

/// How a table's rows are read for the other side.
pub(super) struct Reading<'a> {
    here: TableSql<'a>,
    /// What is written on the mirror.
    columns: Vec<usize>,
    /// Values go over as they are.
    plain: bool,
    /// COPY takes them.
    copies: bool,
}

impl<'a> Reading<'a> {
    /// Of `table` on side `from`.
    pub fn new(table: &'a Table, from: Side) -> Reading<'a> {
        let there = TableSql::new(table, from.other());
        let plain = |&at: &usize| {
            matches!(table.columns[at].kind.layout, Layout::Plain | Layout::Text | Layout::Jsonb | Layout::Mixed)
        };
        let (copies, columns) = (there.copies(), there.writable);
        Reading { here: TableSql::new(table, from), plain: columns.iter().all(plain), copies, columns }
    }

    fn text(&self, after: bool, upto: bool) -> String {
        let (within, limit) = self.here.within(after, upto);
        let columns = if self.copies { format!(", {}", self.here.read_columns(&self.columns)) } else { String::new() };
        format!(
            "SELECT t.xmin, {}{columns} FROM {} AS t WHERE {within} ORDER BY {} LIMIT ${limit}::bigint",
            self.here.read_key(),
            self.here.only(),
            self.here.key_columns()
        )
    }

    /// The next chunk within bounds: at most `rows` rows, and no more than `bytes` bytes unless one row is larger. None: there are none.
    pub async fn next(
        &self,
        link: &mut Link,
        bounds: &Bounds,
        rows: usize,
        bytes: usize,
    ) -> Result<Option<Chunk>, Error> {
        let doing = "reading a chunk";
        let horizon = "SELECT (pg_snapshot_xmin(pg_current_snapshot())::xid)::text";
        let horizon: String = link.rows(doing, horizon, &[]).await?[0].get(0);
        let statement = link.prepared(doing, &self.text(bounds.after.is_some(), bounds.upto.is_some())).await?;
        let mut parameters = self.here.bound_parameters(bounds);
        let limit = Bytes::copy_from_slice(&(rows as i64).to_be_bytes());
        parameters.push(Parameter { value: Some(limit), text: false });
        let stream = link.answered(doing, link.client.query_raw(&statement, parameters)).await?;
        let mut stream = std::pin::pin!(stream);
        let (mut keys, mut copy) = (Keys::default(), BytesMut::new());
        while let Some(row) = link.answered(doing, stream.try_next()).await? {
            let xmin =
                row.get::<_, Field<'_>>(0).0.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes);
            let width = self.here.key.len();
            keys.push((0..width).map(|at| row.get::<_, Field<'_>>(at + 1).0), xmin);
            if self.copies {
                self.put(&row, width + 1, &mut copy);
            }
            if copy.len() >= bytes {
                break;
            }
        }
        let Some((last, _)) = keys.iter().last() else { return Ok(None) };
        let bounds = Bounds { after: bounds.after.clone(), upto: Some(unpacked(last)) };
        let (rows, copy) = (keys.ends.len(), copy.freeze());
        Ok(Some(Chunk { bounds, rows, copy, keys, horizon }))
    }

    fn put(&self, row: &tokio_postgres::Row, from: usize, out: &mut BytesMut) {
        let fields = (from..from + self.columns.len()).map(|at| row.get::<_, Field<'_>>(at).0);
        if self.plain {
            out.put_i16(self.columns.len() as i16);
            put_fields(fields, out);
        } else {
            let values = fields.map(|field| field.map(Bytes::copy_from_slice)).collect();
            put_copy_row(row_across(self.here.table, self.here.side, &self.columns, values).iter(), out);
        }
    }

    /// The second look, after the mirror has committed the chunk: keys that are gone, changed, or being changed.
    pub async fn moved(&self, link: &mut Link, chunk: &Chunk) -> Result<Vec<Values>, Error> {
        let doing = "looking again";
        let mut parameters = self.here.bound_parameters(&chunk.bounds);
        let (within, horizon) = self.here.within(chunk.bounds.after.is_some(), true);
        let later = format!("count(*) FILTER (WHERE age(t.xmin) <= age(${horizon}::text::xid))");
        let from = format!("FROM {} AS t WHERE {within}", self.here.only());
        let text = format!("SELECT count(*), {later}, count(*) FILTER (WHERE t.xmax <> '0'::xid) {from}");
        let xid = Bytes::copy_from_slice(chunk.horizon.as_bytes());
        parameters.push(Parameter { value: Some(xid), text: true });
        let row = &link.rows(doing, &text, &references(&parameters)).await?[0];
        let same = |row: &tokio_postgres::Row| (row.get(0), row.get(1)) == (chunk.rows as i64, 0i64);
        let held: i64 = row.get(2);
        if held == 0 && same(row) {
            return Ok(Vec::new());
        }
        let ended = held > 0 && holders_ended(link, held).await?;
        if ended {
            let text = format!("SELECT count(*), {later} {from}");
            if same(&link.rows(doing, &text, &references(&parameters)).await?[0]) {
                return Ok(Vec::new());
            }
        }
        parameters.pop();
        let held = if ended { "false" } else { "t.xmax <> '0'::xid" };
        let text = format!("SELECT t.xmin, {held}, {} {from}", self.here.read_key());
        let found = link.rows(doing, &text, &references(&parameters)).await?;
        let mut now: HashMap<Bytes, (u32, bool)> = HashMap::with_capacity(found.len());
        for row in &found {
            let xmin =
                row.get::<_, Field<'_>>(0).0.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes);
            let mut key = BytesMut::new();
            key.put_u16(self.here.key.len() as u16);
            put_fields((0..self.here.key.len()).map(|at| row.get::<_, Field<'_>>(at + 2).0), &mut key);
            now.insert(key.freeze(), (xmin, row.get(1)));
        }
        let still = |key: &[u8], xmin: u32| now.get(key) == Some(&(xmin, false));
        Ok(chunk.keys.iter().filter(|(key, xmin)| !still(key, *xmin)).map(|(key, _)| unpacked(key)).collect())
    }
}

/// How long the transactions that hold rows are waited for, in microseconds a row: comparing one would take longer.
const HELD_US: u64 = 5;
const HELD_MOST: Duration = Duration::from_millis(200);
const HELD_LOOK: Duration = Duration::from_millis(2);

/// Rows that foreign keys' checks have locked keep their xmax. What had touched a row by the second look has a number older than one that is drawn now: once all
/// of these have ended, a row that is still there in its old version was only locked, or what was to change it was rolled back. False: they have not, in time.
async fn holders_ended(link: &mut Link, held: i64) -> Result<bool, Error> {
    let doing = "waiting for who holds rows";
    let drawn: String = link.rows(doing, "SELECT pg_current_xact_id()::text", &[]).await?[0].get(0);
    let deadline = Instant::now() + Duration::from_micros(held.unsigned_abs() * HELD_US).min(HELD_MOST);
    let text = "SELECT pg_snapshot_xmin(pg_current_snapshot()) > $1::text::xid8";
    loop {
        if link.rows(doing, text, &[&drawn]).await?[0].get(0) {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        tokio::time::sleep(HELD_LOOK).await;
    }
}
