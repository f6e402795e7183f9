//! The ledger: the append-only table of debts on the authority, and what it is made of.
//! Here: its SQL and the encoding of debts. Who writes it: `mirror`; who pays: `migrate`.

pub mod clear;
pub mod debts;
pub mod owe;

/// The trigger that keeps writes around the proxies out, on application's tables (`fence: true`).
pub const FENCE: &str = "crossfade_fence";

/// What a lazy table has on new, by its number: its relation or function of this kind (src/migrate/lazy/sql.rs).
pub fn lazy(kind: &str, number: u32) -> String {
    format!("crossfade.{kind}_{number}")
}

/// Makes schema `crossfade`, on either side; may be run again.
pub const SCHEMA_SQL: &str = include_str!("schema.sql");

/// What the names begin with under which transactions of this migration are prepared that have written on both sides.
pub fn split_prefix(migration: &str) -> String {
    let end = (0..=migration.len().min(100)).rev().find(|end| migration.is_char_boundary(*end)).unwrap_or(0);
    format!("crossfade:{}:", &migration[..end])
}

/// Such a name: `crossfade:<migration>:<incarnation>:<xid8>`, both of the transaction that decides. 199 bytes at most.
pub fn split_name(migration: &str, incarnation: &str, xid: &str) -> String {
    format!("{}{incarnation}:{xid}", split_prefix(migration))
}
