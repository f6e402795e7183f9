//! Statements as text: tokens, shapes, facts. Pure; never prints a statement from a tree; knows no catalog.

mod check;
mod clean;
pub mod facts;
pub mod lex;
pub mod name;
mod read;
mod shape;
mod split;
mod tree;
mod utility;

pub use lex::lex;
pub use read::{Limits, read};
pub use shape::{Shape, shape};
pub use split::{Statement, end, split};
