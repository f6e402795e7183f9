//! The PostgreSQL wire protocol: frames, streams, TLS, and what is said before a login. Nothing outside this folder parses protocol bytes.

pub mod conn;
pub mod frame;
pub mod message;
pub mod startup;
pub mod stream;
pub mod tls;
