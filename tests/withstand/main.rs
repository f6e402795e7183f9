//! What it must withstand.

#[path = "../common/mod.rs"]
mod common;

mod hidden;
