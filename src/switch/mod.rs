//! Moving between phases: the gate that transactions pass, the rows that say what holds, the mover.

pub mod gate;
pub mod mover;
pub mod rows;
