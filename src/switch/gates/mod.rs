//! Gates: the conditions that a move to another phase must meet, each with its evidence.
//!
//! `evidence` reads both databases, `rules` decides from what was read: a pure function. It is asked before a move and again under its barrier, and by
//! `crossfade phase --dry-run`, always the same way. What nobody measures yet is `not measured`, never `met`.

pub mod evidence;
pub mod rules;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::phase::Phase;

/// What a gate is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Name {
    /// The databases that the move needs answer.
    Reachable,
    /// Schema crossfade is there.
    Installed,
    /// No crash and no promotion that nobody has looked at.
    Life,
    /// `crossfade check` finds no error.
    Check,
    /// Tables have keys and can be mirrored.
    Keys,
    /// What was there before has come over.
    Backfill,
    /// Tables with `backfill: lazy` can be that, or are complete.
    Lazy,
    /// Compared, and equal, since the last debt.
    Verified,
    /// Nothing is owed.
    Debt,
    /// No prepared transaction is undecided.
    Undecided,
    /// Sequences can go on where the other side's end.
    Sequences,
    /// Clients' roles may do on the side that gains authority what they may do now.
    Privileges,
    /// Sessions with state that cannot move to another server.
    Sessions,
    /// Who would be waited for.
    Transactions,
    /// What the file's `expect` asks of new.
    Expect,
    /// How long this phase has held.
    Soak,
    /// Somebody says that there is a backup of new.
    Backup,
    /// Reads that were run on both sides.
    Reads,
    /// Statements that touch tables of both authorities.
    Split,
}

/// All of them, in the order in which they are shown.
pub const NAMES: [Name; 19] = [
    Name::Reachable,
    Name::Installed,
    Name::Life,
    Name::Check,
    Name::Keys,
    Name::Backfill,
    Name::Lazy,
    Name::Verified,
    Name::Debt,
    Name::Undecided,
    Name::Sequences,
    Name::Privileges,
    Name::Sessions,
    Name::Transactions,
    Name::Expect,
    Name::Soak,
    Name::Backup,
    Name::Reads,
    Name::Split,
];

impl Name {
    /// As in commands and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Name::Reachable => "reachable",
            Name::Installed => "installed",
            Name::Life => "life",
            Name::Check => "check",
            Name::Keys => "keys",
            Name::Backfill => "backfill",
            Name::Lazy => "lazy",
            Name::Verified => "verified",
            Name::Debt => "debt",
            Name::Undecided => "undecided",
            Name::Sequences => "sequences",
            Name::Privileges => "privileges",
            Name::Sessions => "sessions",
            Name::Transactions => "transactions",
            Name::Expect => "expect",
            Name::Soak => "soak",
            Name::Backup => "backup",
            Name::Reads => "reads",
            Name::Split => "split",
        }
    }

    /// `--force` opens it. Not so where the move could not be carried out, or an acknowledged write would be missing and nothing would say so (law 3).
    pub fn can_be_forced(self) -> bool {
        !matches!(
            self,
            Name::Reachable
                | Name::Installed
                | Name::Life
                | Name::Backfill
                | Name::Lazy
                | Name::Debt
                | Name::Undecided
                | Name::Sequences
                | Name::Transactions
        )
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A word that names no gate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{word:?} is no gate: expected {}", NAMES.map(Name::name).join(", "))]
pub struct UnknownGate {
    /// The word.
    pub word: String,
}

impl FromStr for Name {
    type Err = UnknownGate;

    fn from_str(word: &str) -> Result<Name, UnknownGate> {
        NAMES.into_iter().find(|name| name.name() == word).ok_or_else(|| UnknownGate { word: word.to_owned() })
    }
}

/// How a gate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// The evidence is there.
    Met,
    /// Something that an operator should know; the move goes on.
    Warns,
    /// Nobody measures it yet.
    NotMeasured,
    /// The move waits.
    Closed,
    /// It was closed, and an operator has overridden it.
    Forced,
}

impl Standing {
    /// As in commands and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Standing::Met => "met",
            Standing::Warns => "warns",
            Standing::NotMeasured => "not-measured",
            Standing::Closed => "closed",
            Standing::Forced => "forced",
        }
    }
}

/// One gate of one move.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gate {
    /// What it is about.
    pub gate: Name,
    /// Of one table (old's name) only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    /// How it stands.
    pub standing: Standing,
    /// What was seen, for people.
    pub evidence: String,
    /// The same, for programs.
    pub facts: serde_json::Value,
    /// What to do about it, where it is not met.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.table.as_ref().map(|table| format!("{table}: ")).unwrap_or_default();
        write!(f, "{table}{}", self.evidence)?;
        match &self.next {
            Some(next) => write!(f, "; {next}"),
            None => Ok(()),
        }
    }
}

/// Which closed gates an operator overrides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Force {
    /// None.
    #[default]
    Nothing,
    /// These.
    These(BTreeSet<Name>),
    /// All that can be.
    All,
}

impl Force {
    /// `all`, or gates' names with commas between them.
    pub fn parse(text: &str) -> Result<Force, UnknownGate> {
        match text.trim() {
            "all" => Ok(Force::All),
            list => {
                list.split(',').map(|word| word.trim().parse()).collect::<Result<BTreeSet<_>, _>>().map(Force::These)
            }
        }
    }

    fn names(&self, name: Name) -> bool {
        match self {
            Force::Nothing => false,
            Force::These(names) => names.contains(&name),
            Force::All => true,
        }
    }

    /// Overrides what is closed and may be.
    pub fn open(&self, gates: &mut [Gate]) {
        for gate in gates {
            if gate.standing == Standing::Closed && gate.gate.can_be_forced() && self.names(gate.gate) {
                gate.standing = Standing::Forced;
            }
        }
    }
}

/// Those that keep a move waiting.
pub fn closed(gates: &[Gate]) -> Vec<&Gate> {
    gates.iter().filter(|gate| gate.standing == Standing::Closed).collect()
}

/// Why a move waits, in one line: what no force opens first, and of each gate one table. None: nothing is closed.
pub fn why(to: Phase, gates: &[Gate]) -> Option<String> {
    let mut closed = closed(gates);
    if closed.is_empty() {
        return None;
    }
    closed.sort_by_key(|gate| gate.gate.can_be_forced());
    let mut told: Vec<String> = Vec::new();
    for (at, gate) in closed.iter().enumerate() {
        if closed[..at].iter().any(|before| before.gate == gate.gate) {
            continue;
        }
        let more = match closed.iter().filter(|other| other.gate == gate.gate).count() - 1 {
            0 => String::new(),
            more => format!(" (and {more} more, see `crossfade phase {to} --dry-run`)"),
        };
        told.push(format!("{gate}{more}"));
    }
    Some(format!("{to} waits: {}", told.join(". ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(name: Name, standing: Standing) -> Gate {
        Gate { gate: name, table: None, standing, evidence: "seen".into(), facts: serde_json::json!({}), next: None }
    }

    #[test]
    fn force_opens_what_it_names_and_never_what_would_lose_a_write() {
        for name in NAMES {
            assert_eq!(name.name().parse(), Ok(name));
        }
        assert!(Force::parse("verified,odd").unwrap_err().to_string().contains("\"odd\" is no gate"));
        let all = || {
            vec![
                gate(Name::Verified, Standing::Closed),
                gate(Name::Debt, Standing::Closed),
                gate(Name::Soak, Standing::Warns),
            ]
        };
        let standings = |force: &str| {
            let mut gates = all();
            Force::parse(force).unwrap().open(&mut gates);
            gates.iter().map(|gate| gate.standing.name()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(standings("all"), "forced closed warns");
        assert_eq!(standings("verified, debt"), "forced closed warns");
        assert_eq!(standings("backup"), "closed closed warns");
        assert_eq!(why(Phase::New, &all()).unwrap(), "new waits: seen. seen");
        let twice = [gate(Name::Verified, Standing::Closed), gate(Name::Verified, Standing::Closed)];
        assert!(why(Phase::New, &twice).unwrap().contains("and 1 more"));
        assert_eq!(why(Phase::New, &all()[2..]), None);
    }
}
