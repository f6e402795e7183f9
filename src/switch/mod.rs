//! Moving between phases: the gate that transactions pass, the bell that calls idle sessions, the rows that say what holds, the mover.

pub mod bell;
pub mod epoch;
pub mod fleet;
pub mod gate;
pub mod learn;
pub mod mover;
pub mod renew;
pub mod rows;
