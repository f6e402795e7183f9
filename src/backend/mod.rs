//! Connections to PostgreSQL servers on behalf of clients.

pub mod connect;
mod login;
