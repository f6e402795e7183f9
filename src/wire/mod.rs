//! The PostgreSQL wire protocol: frames and streams. Nothing outside this folder parses protocol bytes.

pub mod conn;
pub mod frame;
