//! Statements as text: tokens, shapes, facts. Pure; never prints a statement from a tree; knows no catalog.

pub mod facts;
