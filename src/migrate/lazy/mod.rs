//! Tables with `backfill: lazy`: new becomes the authority before it has all their rows. What only old has is read through postgres_fdw, and is brought
//! over when it is written (R5, D3; docs/protocols.md, *Lazy*).
//!
//! `make` gives new what this needs, while old is still the authority; `sql` is its text; `obstacles` says why a table cannot be lazy; `fill` brings
//! what is left. What a statement needs of it is decided by `plan::lazy` and done by `session::lazy`.

mod fill;
mod make;
mod obstacles;
mod sql;

pub use fill::fill;
pub use make::{forget, make, no_others, remove, serve_old};
pub use obstacles::obstacles;
