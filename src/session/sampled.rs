//! A share of the reads that clients send is handed to the job that runs them on both sides and compares (R4). The client has its answer by then, and
//! waits for nothing.

use std::sync::Arc;

use bytes::Bytes;

use super::Session;
use crate::plan::cache::Planned;
use crate::plan::read::Read;
use crate::reads::{Sample, Who};
use crate::sql;
use crate::wire::frame::{Fields, HEAD, Head};

/// Longer texts and parameters are not compared, in bytes.
const LONGEST: usize = 64 * 1024;

/// What a session has to do with reads on both sides.
pub(super) struct Sampling {
    /// To be handed over once the client has its answer.
    due: Option<Sample>,
    who: Option<Arc<Who>>,
    /// xorshift64: which reads are taken must only not follow the client's own rhythm.
    state: u64,
}

impl Sampling {
    pub(super) fn new() -> Sampling {
        Sampling { due: None, who: None, state: rand::random::<u64>() | 1 }
    }

    /// A number from 0 to 1.
    fn draw(&mut self) -> f64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl Session {
    /// Whether this read, outside any block, is one of those that are compared.
    pub(super) fn is_sampled(&mut self, planned: &Planned) -> bool {
        let Read::Eligible(read) = &planned.read else { return false };
        let config = self.shared.config.load();
        let most = config.most.compare;
        if most <= 0.0 || self.settings.role_changed || self.status != b'I' || self.begun || self.ours {
            return false;
        }
        let drawn = self.sampling.draw();
        drawn < most && read.tables.iter().all(|table| drawn < config.compare_share(&table.label()))
    }

    /// A read that came as a Query is about to be sent.
    pub(super) fn sample_query(&mut self, planned: &Planned, text: &Bytes) {
        if text.len() <= LONGEST && self.is_sampled(planned) {
            self.sample(planned, text.clone(), None);
        }
    }

    /// A Bind of a read is about to be sent.
    pub(super) fn sample_bind(&mut self, planned: &Planned, statement: &Bytes, head: Head) {
        if head.total > LONGEST || self.client.inb.len() < head.total || !self.is_sampled(planned) {
            return;
        }
        let Some(prepared) = self.prepared.get(statement) else { return };
        let Some(text) = prepared.text.clone().filter(|text| text.len() <= LONGEST) else { return };
        let payload = Bytes::copy_from_slice(&self.client.inb[HEAD..head.total]);
        let mut fields = Fields::new(&payload);
        if fields.string().is_ok() {
            let types = prepared.types.clone();
            self.sample(planned, text, Some((types, payload)));
        }
    }

    pub(super) fn sample(&mut self, planned: &Planned, text: Bytes, bound: Option<(Bytes, Bytes)>) {
        let Read::Eligible(read) = &planned.read else { return };
        let (login, parameters) = (&self.login, &self.parameters);
        let who = self
            .sampling
            .who
            .get_or_insert_with(|| Arc::new(Who { login: login.clone(), parameters: parameters.clone() }))
            .clone();
        let shape = Bytes::from(sql::shape(&text).text);
        let config = self.shared.config.load();
        if config.reads.ignore.iter().any(|ignored| is_of_shape(ignored, &shape)) {
            return;
        }
        let ignored = read.tables.iter().flat_map(|table| {
            let columns = config.ignored_columns(&table.label()).iter();
            columns.map(|column| (table.clone(), column.clone()))
        });
        self.sampling.due =
            Some(Sample { who, text, bound, shape, eligible: read.clone(), ignored: ignored.collect() });
    }

    /// The client has its answers.
    pub(super) fn hand_over(&mut self) {
        if let Some(sample) = self.sampling.due.take()
            && !self.shared.reads.hand(sample)
        {
            self.shared.metrics.read_dropped.inc();
        }
    }

    /// Something waits to be handed over.
    pub(super) fn has_sample(&self) -> bool {
        self.sampling.due.is_some()
    }
}

/// A statement of the file, which may be written in another case, has this shape.
fn is_of_shape(statement: &str, shape: &[u8]) -> bool {
    sql::shape(statement.as_bytes()).text.eq_ignore_ascii_case(shape)
}
