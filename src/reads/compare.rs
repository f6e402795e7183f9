//! Running a read on both sides, as its client, in sessions that cannot write. Each answer is read as it comes and never held.

use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::digest::{self, Digest, Reader};
use super::plans::{self, Node};
use super::{Sample, Who};
use crate::backend::connect::{self, read_only, to_database};
use crate::config::Database;
use crate::phase::Side;
use crate::wire::conn::Conn;
use crate::wire::frame::{self, HEAD};
use crate::wire::stream::Stream;

/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(10);
/// A larger row is not compared, in bytes.
const ROW_MAX: usize = 8 << 20;

/// Before a read, it gives its plan, and runs nothing.
const EXPLAIN: &[u8] = b"EXPLAIN (FORMAT JSON, COSTS OFF) ";

/// The same on both sides, so that equal values have equal texts; and nobody's locks are waited for.
const SETTINGS: &[u8] = b"SET timezone = 'UTC'; SET datestyle = 'ISO, MDY'; SET intervalstyle = 'postgres'; SET extra_float_digits = 1; \
    SET bytea_output = 'hex'; SET lc_monetary = 'C'; SET statement_timeout = '10s'; SET lock_timeout = '1s'; SET application_name = 'crossfade compare'";

/// A side that could not run a read.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It answered with an error: SQLSTATE and message.
    #[error("{1} ({0})")]
    Refused(String, String),
    /// The session is of no more use.
    #[error("{0}")]
    Broken(String),
}

/// What one side has answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What remains of it.
    pub digest: Digest,
    /// From sending to the end of the answer.
    pub took: Duration,
    /// The first rows, where they were wanted.
    pub rows: Vec<String>,
}

/// A client's session on one side, for comparing.
pub struct Seat {
    conn: Conn<Stream>,
    side: Side,
}

impl Seat {
    /// Logs in as the client; all that the session begins is READ ONLY.
    pub async fn open(db: &Database, side: Side, who: &Who) -> Result<Seat, RunError> {
        let broken = |error: String| RunError::Broken(error);
        let parameters = read_only(to_database(&who.parameters, &db.database));
        let connected = connect::connect(db, &who.login.credentials, &parameters, 0)
            .await
            .map_err(|error| broken(error.to_string()))?;
        let mut conn = Conn::new(connected.stream, connected.buf);
        let ready = async {
            until_ready(&mut conn).await?;
            frame::query(&mut conn.out, SETTINGS);
            until_ready(&mut conn).await
        };
        tokio::time::timeout(LIMIT, ready).await.map_err(|_| broken("it did not answer".to_owned()))??;
        Ok(Seat { conn, side })
    }

    /// Runs a read; `keep` the first rows.
    pub async fn run(&mut self, sample: &Sample, keep: bool) -> Result<Answer, RunError> {
        let run = self.run_it(sample, keep);
        match tokio::time::timeout(LIMIT + Duration::from_secs(1), run).await {
            Ok(answer) => answer,
            Err(_) => Err(RunError::Broken("it did not answer".to_owned())),
        }
    }

    /// How this side would run it. None: it does not say.
    pub async fn plan(&mut self, sample: &Sample) -> Result<Option<Vec<Node>>, RunError> {
        let text = [EXPLAIN, &sample.text[..]].concat().into();
        let answer = self.run(&Sample { text, ..sample.clone() }, true).await?;
        Ok(answer.rows.first().and_then(|explained| plans::nodes(explained)))
    }

    async fn run_it(&mut self, sample: &Sample, keep: bool) -> Result<Answer, RunError> {
        let started = Instant::now();
        put(&mut self.conn.out, sample).map_err(|error| RunError::Broken(error.to_string()))?;
        let ignored = sample.ignored.iter().map(|(table, column)| (*table.oid.get(self.side), column.clone()));
        let mut reader = Reader::new(ignored.collect(), keep);
        let mut refused = None;
        loop {
            let head = frame::head(&self.conn.inb).map_err(|error| RunError::Broken(error.to_string()))?;
            match head {
                Some(head) if head.total > ROW_MAX => {
                    return Err(RunError::Broken("a row is too large to be compared".to_owned()));
                }
                Some(head) if self.conn.inb.len() >= head.total => {
                    let payload = &self.conn.inb[HEAD..head.total];
                    let read = match head.tag {
                        b'T' => reader.description(payload),
                        b'D' => reader.row(payload),
                        _ => Ok(()),
                    };
                    read.map_err(|error| RunError::Broken(error.to_string()))?;
                    if head.tag == b'E' {
                        let error = frame::server_error(payload);
                        refused = Some(RunError::Refused(error.code, error.message));
                    }
                    bytes::Buf::advance(&mut self.conn.inb, head.total);
                    if head.tag == b'Z' {
                        break;
                    }
                }
                _ => self.conn.fill().await.map_err(|error| RunError::Broken(error.to_string()))?,
            }
        }
        let (digest, rows) = reader.finish();
        refused.map_or(Ok(Answer { digest, took: started.elapsed(), rows }), Err)
    }
}

/// Up to ReadyForQuery; an error on the way is the session's end.
async fn until_ready(conn: &mut Conn<Stream>) -> Result<(), RunError> {
    loop {
        let (tag, payload) = conn.frame().await.map_err(|error| RunError::Broken(error.to_string()))?;
        match tag {
            b'E' => return Err(RunError::Broken(frame::server_error(&payload).message)),
            b'Z' => return Ok(()),
            _ => {}
        }
    }
}

/// A read as one pipeline, with every value asked for in text.
fn put(out: &mut BytesMut, sample: &Sample) -> Result<(), frame::Malformed> {
    frame::put(out, b'P', |out| {
        out.extend_from_slice(b"\0");
        out.extend_from_slice(&sample.text);
        out.extend_from_slice(b"\0");
        out.extend_from_slice(sample.bound.as_ref().map_or(&[0, 0], |(types, _)| types));
    });
    match &sample.bound {
        Some((_, payload)) => {
            let bind = digest::in_text(payload)?;
            frame::put(out, b'B', |out| out.extend_from_slice(&bind));
        }
        None => frame::bind(out, b"", b"", &[], std::iter::empty(), 0),
    }
    frame::put(out, b'D', |out| out.extend_from_slice(b"P\0"));
    frame::execute(out, b"");
    frame::sync(out);
    Ok(())
}
