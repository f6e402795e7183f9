//! The ledger: the append-only table of debts on the authority, and what it is made of.
//! Here: its SQL and the encoding of debts. Who writes it: `mirror`; who pays: `migrate`.

pub mod clear;
pub mod debts;
pub mod owe;

/// The trigger that keeps writes around the proxies out, on application's tables (`fence: true`).
pub const FENCE: &str = "crossfade_fence";

/// Makes schema `crossfade`, on either side; may be run again.
pub const SCHEMA_SQL: &str = include_str!("schema.sql");
