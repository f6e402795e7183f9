//! Statements as text: tokens, shapes, facts. Pure; never prints a statement from a tree; knows no catalog.
//!
//! The way of a text: [`split`] cuts a Query string into statements, [`shape`] takes the literals out of one (a cache's
//! key), [`read`] tells its [`facts`], and [`place`] moves the facts of one statement to another of its shape. All lex as
//! PostgreSQL does with `standard_conforming_strings` on, and in an encoding that is also one of servers: a session that
//! turned it off passes its texts through [`mask_escapes`] first, one whose client_encoding is SJIS, BIG5, GBK, UHC, GB18030 or JOHAB through
//! [`mask_characters`]; what is said here of a text in another encoding than UTF8 is to be believed only where [`names_are_ascii`].

mod check;
mod clean;
mod escapes;
pub mod facts;
pub mod lex;
pub mod name;
mod read;
mod relations;
mod rows;
mod shape;
mod split;
mod tree;
mod utility;
mod within;
mod words;

pub use escapes::{mask_characters, mask_escapes};
pub use lex::lex;
pub use name::names_are_ascii;
pub use read::{Limits, place, read};
pub use relations::{Naming, Relation, Relations, relations};
pub use rows::rows_of_update;
pub use shape::{Shape, shape};
pub use split::{Statement, end, split};
pub use within::places;
