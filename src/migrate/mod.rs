//! The jobs that move data and pay debts: install, reconcile, repair, plain copies, sequences.
//!
//! The way of a debt: `payable` reads the ledger and asks the mirror which carriers have ended; `repair` sorts what is owed by
//! table; `reconcile` makes keys equal under lock (`gone` those that the authority lacks, `walk` whole tables, `copy` tables without
//! a key); `ledger::clear` flushes the mirror and then clears exactly the rows that were read. docs/protocols.md says why each
//! step stands where it does; `rules` are its decisions. Nothing here knows of client sessions, and data is changed nowhere else.

mod across;
pub mod backfill;
mod binary;
mod conflict;
pub mod copy;
mod cut;
pub mod debt;
pub mod error;
pub mod fence;
mod gone;
pub mod install;
pub mod late;
pub mod lazy;
pub mod link;
pub mod lives;
mod locks;
mod owes;
pub mod owing;
mod pace;
mod payable;
mod queue;
pub mod reconcile;
pub mod repair;
pub mod rules;
pub mod sequences;
mod sql;
pub mod sweep;
pub mod tokens;
pub mod undecided;
pub mod verify;
mod walk;

pub use error::Error;
pub use install::install;
pub use link::{Link, Pair, Settings};
pub use sequences::sequences;

/// A mutex of a job, whoever died holding it: what it guards is counted up, and never half written.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
