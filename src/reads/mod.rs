//! Reads on new before it is trusted with them: compared with the authority's in the background, or served from there where that is proven right.
//!
//! `look` knows what new may answer at this moment; `block` keeps tables from being served while debts come; `compare` runs a read on both sides; `digest` makes of an answer what can be compared; `plans` says how both sides carried a read out; `tally` keeps what was
//! found, by shape. Which statements come into question at all says `plan::read`; a client's session is served by `session::served`.

pub mod block;
pub mod compare;
pub mod digest;
pub mod look;
pub mod plans;
pub mod tally;

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};

use crate::auth::client::Login;
use crate::catalog::Table;
use crate::plan::read::Eligible;

/// Reads that wait to be compared, at most; one more is dropped.
const WAITING_MAX: usize = 256;

/// Who has sent a read: enough to log in as the same client.
#[derive(Clone, Debug)]
pub struct Who {
    /// Its login.
    pub login: Login,
    /// Of its startup packet.
    pub parameters: Vec<(Bytes, Bytes)>,
}

/// A read that is to be run on both sides.
#[derive(Clone, Debug)]
pub struct Sample {
    /// By whom.
    pub who: Arc<Who>,
    /// Its text.
    pub text: Bytes,
    /// In the extended protocol: the types that Parse declared (number and OIDs), and Bind's payload.
    pub bound: Option<(Bytes, Bytes)>,
    /// Its shape.
    pub shape: Bytes,
    /// What it reads.
    pub eligible: Arc<Eligible>,
    /// Columns that are not compared, by their names on old.
    pub ignored: Vec<(Arc<Table>, String)>,
}

/// What sessions and jobs of one proxy share about reads.
pub struct Reads {
    /// What new may answer.
    pub looks: look::Looks,
    /// What no proxy serves, by word of this one.
    pub blocks: block::Blocks,
    /// What was found.
    pub tally: tally::Tally,
    samples: mpsc::Sender<Sample>,
    /// Taken by the job that compares.
    pub waiting: Mutex<mpsc::Receiver<Sample>>,
}

impl Default for Reads {
    fn default() -> Reads {
        let (samples, waiting) = mpsc::channel(WAITING_MAX);
        Reads {
            looks: Default::default(),
            blocks: Default::default(),
            tally: Default::default(),
            samples,
            waiting: Mutex::new(waiting),
        }
    }
}

impl Reads {
    /// Hands a read to the job that compares. False: too many wait already; it is dropped and counted.
    pub fn hand(&self, sample: Sample) -> bool {
        let taken = self.samples.try_send(sample).is_ok();
        if !taken {
            self.tally.dropped();
        }
        taken
    }
}
