//! Golden scripts of capture: small stories of one to three sessions in a mirrored phase, with the rows that both databases
//! hold at their ends. A story that captures leaves nothing owed, so that no repair can have mended what capture missed.

#[path = "../common/mod.rs"]
mod common;
mod keys;
mod merge;
mod opaque;
mod phases;
mod protocol;
mod rest;
mod sessions;
mod stage;
mod statements;
mod transactions;
mod values;
mod within;
