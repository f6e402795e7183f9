//! pgbench's scripts as prepared statements, and what they draw at random.

use clap::ValueEnum;
use rand::Rng;
use rand::rngs::StdRng;

use crate::connection::Connection;
use crate::{Arguments, Outcome};

const INT4: u32 = 23;

/// What one transaction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// pgbench's tpcb-like: three updates of one row, a select, an insert.
    Tpcb,
    /// pgbench's simple-update: an update, a select, an insert.
    Update,
    /// One update of one row by its key, outside of any block.
    OneRow,
}

/// One statement of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statement {
    Accounts,
    Select,
    Tellers,
    Branches,
    History,
}

impl Workload {
    /// The statements, between BEGIN and COMMIT where it has them.
    pub fn statements(self) -> &'static [Statement] {
        use Statement::{Accounts, Branches, History, Select, Tellers};
        match self {
            Workload::Tpcb => &[Accounts, Select, Tellers, Branches, History],
            Workload::Update => &[Accounts, Select, History],
            Workload::OneRow => &[Accounts],
        }
    }

    /// Whether it is one statement outside of a block.
    pub fn is_autocommit(self) -> bool {
        self == Workload::OneRow
    }
}

impl Statement {
    /// Name, text, types of the parameters.
    pub fn prepared(self) -> (&'static str, &'static str, &'static [u32]) {
        match self {
            Statement::Accounts => {
                (self.name(), "UPDATE pgbench_accounts SET abalance = abalance + $1 WHERE aid = $2", &[INT4; 2])
            }
            Statement::Select => (self.name(), "SELECT abalance FROM pgbench_accounts WHERE aid = $1", &[INT4]),
            Statement::Tellers => {
                (self.name(), "UPDATE pgbench_tellers SET tbalance = tbalance + $1 WHERE tid = $2", &[INT4; 2])
            }
            Statement::Branches => {
                (self.name(), "UPDATE pgbench_branches SET bbalance = bbalance + $1 WHERE bid = $2", &[INT4; 2])
            }
            Statement::History => (
                self.name(),
                "INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES ($1, $2, $3, $4, CURRENT_TIMESTAMP)",
                &[INT4; 4],
            ),
        }
    }

    /// Its name on a session.
    pub fn name(self) -> &'static str {
        match self {
            Statement::Accounts => "accounts",
            Statement::Select => "select",
            Statement::Tellers => "tellers",
            Statement::Branches => "branches",
            Statement::History => "history",
        }
    }

    /// Puts it into a connection's flight.
    pub fn put(self, draw: &Draw, to: &mut Connection) {
        let values: &[&[u8; 4]] = match self {
            Statement::Accounts => &[&draw.delta, &draw.aid],
            Statement::Select => &[&draw.aid],
            Statement::Tellers => &[&draw.delta, &draw.tid],
            Statement::Branches => &[&draw.delta, &draw.bid],
            Statement::History => &[&draw.tid, &draw.bid, &draw.aid, &draw.delta],
        };
        let mut bound = [None; 4];
        bound.iter_mut().zip(values).for_each(|(bound, value)| *bound = Some(&value[..]));
        to.put(self.name(), &bound[..values.len()]);
    }
}

/// How many branches the database has.
#[derive(Clone, Copy, Debug)]
pub struct Scale(i32);

impl Scale {
    /// Asks the server.
    pub async fn ask(arguments: &Arguments) -> Outcome<Scale> {
        let mut connection = Connection::open(&arguments.old, &arguments.database, "").await?;
        connection.prepare(&[("scale", "SELECT count(*)::int4 FROM pgbench_branches", &[])]).await?;
        connection.put("scale", &[]);
        let answer = connection.run().await?;
        let count = answer.rows.first().and_then(|row| row.first()?.clone()).ok_or("no row of pgbench_branches")?;
        match i32::from_be_bytes(count[..].try_into()?) {
            0 => Err("pgbench_branches is empty: fill it with pgbench -i".into()),
            scale => Ok(Scale(scale)),
        }
    }
}

/// What one transaction has drawn, as pgbench does, in binary.
pub struct Draw {
    aid: [u8; 4],
    tid: [u8; 4],
    bid: [u8; 4],
    delta: [u8; 4],
}

impl Draw {
    /// One more.
    pub fn new(Scale(scale): Scale, random: &mut StdRng) -> Draw {
        Draw {
            aid: random.random_range(1..=scale * 100_000).to_be_bytes(),
            tid: random.random_range(1..=scale * 10).to_be_bytes(),
            bid: random.random_range(1..=scale).to_be_bytes(),
            delta: random.random_range(-5000..=5000_i32).to_be_bytes(),
        }
    }
}
