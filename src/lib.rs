//! Crossfade: a proxy that moves a live application from one PostgreSQL database to another.

pub mod auth;
pub mod backend;
pub mod catalog;
pub mod check;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod demo;
pub mod ledger;
pub mod metrics;
pub mod migrate;
pub mod mirror;
pub mod phase;
pub mod plan;
pub mod reads;
pub mod server;
pub mod session;
pub mod shared;
pub mod sql;
pub mod switch;
pub mod wire;
