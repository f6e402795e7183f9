//! The two sides, the six phases, and what each phase does. Pure values: nothing here awaits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One of the two databases. Fixed for the whole migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The database that the application moves away from.
    Old,
    /// The database that it moves to.
    New,
}

impl Side {
    /// Both sides, old first.
    pub const BOTH: [Side; 2] = [Side::Old, Side::New];

    /// The side that this one is not.
    pub fn other(self) -> Side {
        match self {
            Side::Old => Side::New,
            Side::New => Side::Old,
        }
    }

    /// `old` or `new`, as in YAML, metrics and log lines.
    pub fn name(self) -> &'static str {
        match self {
            Side::Old => "old",
            Side::New => "new",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that names no side.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected old or new")]
pub struct UnknownSide;

impl FromStr for Side {
    type Err = UnknownSide;

    fn from_str(word: &str) -> Result<Side, UnknownSide> {
        Side::BOTH.into_iter().find(|side| side.name() == word).ok_or(UnknownSide)
    }
}

/// Where the migration stands: who is authority, who is written, who is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Everything on old.
    Old,
    /// Old is authority, writes are mirrored to new, reads on old.
    DualWrite,
    /// As `DualWrite`; new may serve reads that provably may.
    DualRead,
    /// New is authority, writes are mirrored to old.
    NewPrimary,
    /// New is authority, old is no longer written.
    OldReadOnly,
    /// Everything on new.
    New,
}

impl Phase {
    /// All phases in their order.
    pub const ALL: [Phase; 6] =
        [Phase::Old, Phase::DualWrite, Phase::DualRead, Phase::NewPrimary, Phase::OldReadOnly, Phase::New];

    /// The side whose answer is the truth in this phase.
    pub fn authority(self) -> Side {
        match self {
            Phase::Old | Phase::DualWrite | Phase::DualRead => Side::Old,
            Phase::NewPrimary | Phase::OldReadOnly | Phase::New => Side::New,
        }
    }

    /// The other side, while it also receives writes.
    pub fn mirror(self) -> Option<Side> {
        match self {
            Phase::DualWrite | Phase::DualRead => Some(Side::New),
            Phase::NewPrimary => Some(Side::Old),
            Phase::Old | Phase::OldReadOnly | Phase::New => None,
        }
    }

    /// New answers reads that it provably may, though it is not the authority.
    pub fn serves(self) -> bool {
        self == Phase::DualRead
    }

    /// The name in YAML, metrics, console and log lines.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Old => "old",
            Phase::DualWrite => "dual-write",
            Phase::DualRead => "dual-read",
            Phase::NewPrimary => "new-primary",
            Phase::OldReadOnly => "old-read-only",
            Phase::New => "new",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that names no phase.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a phase: expected old, dual-write, dual-read, new-primary, old-read-only or new")]
pub struct UnknownPhase(pub String);

impl FromStr for Phase {
    type Err = UnknownPhase;

    fn from_str(word: &str) -> Result<Phase, UnknownPhase> {
        Phase::ALL.into_iter().find(|phase| phase.name() == word).ok_or_else(|| UnknownPhase(word.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_only_mirrored_phases_have_a_mirror() {
        for phase in Phase::ALL {
            assert_eq!(phase.name().parse(), Ok(phase));
            assert_ne!(phase.mirror(), Some(phase.authority()));
        }
        assert_eq!(Phase::ALL.map(|phase| phase.mirror().is_some()), [false, true, true, true, false, false]);
        assert_eq!("dualwrite".parse::<Phase>(), Err(UnknownPhase("dualwrite".into())));
    }
}
