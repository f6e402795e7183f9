//! From facts, catalog and phase to a plan: what the session does with a statement. Pure.
//!
//! `decide` holds the rules, `within` those for what a WITH clause writes, `splice` the hidden column, `weave` where it goes, `image` what becomes of it, `read` says which SELECTs may leave the authority, `route` on
//! which side a statement runs where some tables stay on old, `explain` tells people.

pub mod cache;
mod ddl;
mod decide;
mod explain;
pub mod image;
pub mod lazy;
pub mod point;
pub mod read;
pub mod route;
mod splice;
pub mod weave;
mod within;

use std::sync::Arc;

use crate::catalog::Table;

pub use ddl::narrow;
pub use decide::{ANY_ROLE, plan};
pub use explain::explain;
pub use weave::Splice;

/// What to do with one statement in a mirrored phase.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Runs on the authority as it is: it writes no migrating table.
    Pass,
    /// A write whose images are captured by hidden RETURNING columns.
    Capture(Arc<Capture>),
    /// It may write what no image shows: runs on the authority as it is, and is audited or taints.
    Opaque(Arc<Opaque>),
    /// TRUNCATE of migrating tables (all that it reaches, cascades included).
    Truncate(Arc<Vec<Arc<Table>>>),
    /// COPY FROM STDIN into a migrating table.
    Copy(Arc<CopyIn>),
}

/// A write with hidden columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Capture {
    /// What is put into its text. At its end, ` RETURNING <hidden>` or `, <hidden>`: one hidden column, a bytea: record_send(ROW(row.tableoid, row.*)).
    pub splice: Splice,
    /// What the statement does to the rows that come back. None: those are the client's, and no row of a migrating table; its WITH clause writes some.
    pub effect: Option<Effect>,
    /// The statement had a RETURNING clause of its own.
    pub returning: bool,
    /// The tables that the name may mean (one, unless several schemas have it), and those of `shown`.
    pub tables: Vec<Arc<Table>>,
    /// What the images may not show.
    pub audited: Audited,
    /// The statements of its WITH clause whose images come by notices, in the order of the numbers that those name.
    pub shown: Vec<Shown>,
}

/// A statement of a WITH clause whose images come by notices.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// Which of `Facts::within`.
    pub at: usize,
    /// Its plan as a statement by itself.
    pub capture: Arc<Capture>,
}

/// What a captured statement may write beside what its images show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audited {
    /// Nothing.
    No,
    /// Nothing but rows of its tables: the transaction is audited all the same, because an image may not come (WITH).
    Tables,
    /// Anything, by triggers, cascades, functions, or in its WITH clause: the transaction is audited.
    All,
}

impl Capture {
    /// The expression of the hidden column.
    pub fn image(&self) -> &str {
        let end = &self.splice.end;
        end.strip_prefix(" RETURNING ").or_else(|| end.strip_prefix(", ")).unwrap_or(end)
    }
}

/// What a captured statement does to the rows that it returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Each row is now as its image says (INSERT, UPDATE that keeps keys).
    Row,
    /// Each row is now as its image says, and may have had another key before: UPDATE. The old rows are read and locked before it.
    Moved,
    /// Each row is gone; the image is what it was.
    Gone,
    /// One of these, as the last field of its image says: MERGE, whose key stays.
    Merged,
}

/// A write that images do not show.
#[derive(Clone, Debug, PartialEq)]
pub struct Opaque {
    /// Why, as a metric label: `function`, `call`, `do`, `cte`, `merge`, `copy`, `view`, `rule`, `row-security`, `privilege`, `key-change`, `keyless`, `unparsed`, `ddl`, `prepare`, ...
    pub reason: &'static str,
    /// The migrating tables it names as targets; empty: unknown (for `ddl`, once `narrow` has seen it: none).
    pub tables: Vec<Arc<Table>>,
    /// It cannot run inside a transaction block that we open (CALL, DO, VACUUM, CREATE INDEX CONCURRENTLY, ...).
    pub unwrapped: bool,
    /// It may change definitions: the catalog is loaded again behind it.
    pub ddl: bool,
    /// Its text may run on the mirror, too, in the transaction that carries the images (`mirror.ddl: mirror`).
    pub replays: bool,
}

/// COPY FROM STDIN into one migrating table.
#[derive(Clone, Debug, PartialEq)]
pub struct CopyIn {
    /// The table.
    pub table: Arc<Table>,
    /// Its column list, if written.
    pub columns: Option<Vec<String>>,
    /// It names a partition, whose columns may stand in another order than its root's.
    pub through_partition: bool,
    /// Triggers, defaults or WHERE may write more than its rows.
    pub audited: bool,
}
