//! The other side: sessions of the control role that apply images, one per transaction that writes. Never reads for a client.

pub mod conn;
pub mod flight;
pub mod health;
pub mod pool;
mod prepared;
pub mod writes;
