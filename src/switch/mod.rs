//! Moving between phases: the gate that transactions pass, the gates that a move must meet, the bell that calls idle sessions, the rows that say what
//! holds, the mover.

pub mod ahead;
pub mod bell;
mod copies;
mod end;
pub mod epoch;
pub mod fleet;
pub mod gate;
pub mod gates;
pub mod learn;
pub mod mover;
mod ready;
pub mod record;
pub mod renew;
pub mod rows;
pub mod writers;
