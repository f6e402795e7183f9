//! Bytes of clients and servers: sockets, TLS, and what is said before and during a login.

pub mod message;
pub mod startup;
pub mod stream;
pub mod tls;
