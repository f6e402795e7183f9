//! What an operator may say to the console. Pure.

use crate::phase::Phase;
use crate::switch::gates::Force;

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// The phase that holds.
    Phase,
    /// The gates of the next step to this phase; None: to the one that the file wants, or onwards.
    Gates(Option<Phase>),
    /// The migrating tables.
    Tables,
    /// Clients of this proxy, by their server sessions.
    Clients,
    /// Both sides.
    Servers,
    /// Proxies that stand on the side that is authority.
    Proxies,
    /// What is owed.
    Debt,
    /// Statement shapes.
    Shapes,
    /// The metrics.
    Stats,
    /// What the file says.
    Config,
    /// Who moved, when and why.
    History,
    /// The program's.
    Version,
    /// All of this.
    Help,
}

/// A move, as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Where to.
    pub phase: Phase,
    /// Only show the gates.
    pub dry_run: bool,
    /// Which are overridden.
    pub force: Force,
    /// Why.
    pub reason: Option<String>,
    /// Transactions that last are ended.
    pub terminate: bool,
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// SHOW.
    Show(Show),
    /// SET phase.
    Set(Set),
    /// SET of anything else: drivers and tools send some by themselves.
    SetOther,
    /// BEGIN, COMMIT, ROLLBACK: drivers send them around whatever is asked. Nothing here is undone.
    Transaction {
        /// Of its answer.
        tag: &'static str,
        /// BEGIN.
        begins: bool,
    },
    /// Reads the file again.
    Reload,
    /// Waits until no transaction is under way, and lets none begin.
    Pause,
    /// Lets them begin again.
    Resume,
    /// Ends this proxy as SIGTERM does.
    Shutdown,
}

/// How to say it, for SHOW HELP.
pub const HELP: [(&str, &str); 19] = [
    ("SHOW PHASE", "the phase that holds, and what it waits for"),
    ("SHOW GATES [phase]", "the gates of the next step there, with evidence"),
    ("SHOW TABLES", "the migrating tables"),
    ("SHOW CLIENTS", "clients of this proxy"),
    ("SHOW SERVERS", "both sides"),
    ("SHOW PROXIES", "proxies of this migration"),
    ("SHOW DEBT", "what is owed"),
    ("SHOW SHAPES", "statement shapes"),
    ("SHOW STATS", "this proxy's metrics"),
    ("SHOW CONFIG", "what the file says"),
    ("SHOW HISTORY", "who moved, when and why"),
    ("SHOW VERSION", "of this program"),
    ("SHOW HELP", "this"),
    ("SET phase = 'NAME'", "moves there"),
    ("  ... DRY RUN | TERMINATE | FORCE ['GATES'] REASON 'TEXT'", "as `crossfade phase` does"),
    ("RELOAD", "reads the file again"),
    ("PAUSE", "waits for transactions to end, and holds new ones"),
    ("RESUME", "lets them go on"),
    ("SHUTDOWN", "ends this proxy in good order"),
];

/// Reads a command.
pub fn read(text: &str) -> Result<Command, String> {
    let words = words(text)?;
    let lower: Vec<String> = words.iter().map(|word| word.to_lowercase()).collect();
    let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
    match lower.as_slice() {
        ["show", what] => show(what).map(Command::Show),
        ["show", "gates", phase] => {
            let phase = phase.parse::<Phase>().map_err(|error| error.to_string())?;
            Ok(Command::Show(Show::Gates(Some(phase))))
        }
        ["set", "phase", "=" | "to", rest @ ..] => set(&words[3..], rest).map(Command::Set),
        ["set", ..] => Ok(Command::SetOther),
        ["begin" | "start", ..] => Ok(Command::Transaction { tag: "BEGIN", begins: true }),
        ["commit" | "end", ..] => Ok(Command::Transaction { tag: "COMMIT", begins: false }),
        ["rollback" | "abort", ..] => Ok(Command::Transaction { tag: "ROLLBACK", begins: false }),
        ["reload"] => Ok(Command::Reload),
        ["pause"] => Ok(Command::Pause),
        ["resume"] => Ok(Command::Resume),
        ["shutdown"] => Ok(Command::Shutdown),
        _ => Err(format!("{:?} is no command of the console: SHOW HELP lists them", text.trim())),
    }
}

fn show(what: &str) -> Result<Show, String> {
    Ok(match what {
        "phase" => Show::Phase,
        "gates" => Show::Gates(None),
        "tables" => Show::Tables,
        "clients" => Show::Clients,
        "servers" => Show::Servers,
        "proxies" => Show::Proxies,
        "debt" => Show::Debt,
        "shapes" => Show::Shapes,
        "stats" => Show::Stats,
        "config" => Show::Config,
        "history" => Show::History,
        "version" => Show::Version,
        "help" => Show::Help,
        other => return Err(format!("there is nothing called {other:?} to show: SHOW HELP lists what there is")),
    })
}

fn set(words: &[String], lower: &[&str]) -> Result<Set, String> {
    let name = lower.first().ok_or("SET phase = 'NAME': the name is missing")?;
    let phase = name.parse::<Phase>().map_err(|error| error.to_string())?;
    let mut set = Set { phase, dry_run: false, force: Force::Nothing, reason: None, terminate: false };
    let mut at = 1;
    while at < words.len() {
        match &lower[at..] {
            ["dry", "run", ..] => (set.dry_run, at) = (true, at + 2),
            ["terminate", ..] => (set.terminate, at) = (true, at + 1),
            ["force"] | ["force", "reason" | "terminate" | "dry", ..] => (set.force, at) = (Force::All, at + 1),
            ["force", gates, ..] => (set.force, at) = (Force::parse(gates).map_err(|error| error.to_string())?, at + 2),
            ["reason", _, ..] => (set.reason, at) = (Some(words[at + 1].clone()), at + 2),
            [word, ..] => return Err(format!("{word:?} is not understood here: SHOW HELP says what is")),
            [] => break,
        }
    }
    match (&set.force, &set.reason) {
        (Force::Nothing, _) | (_, Some(_)) => Ok(set),
        (_, None) => Err("FORCE needs a REASON 'TEXT': it is kept in the history".to_owned()),
    }
}

/// Words and strings in quotes; `=` is a word of its own.
fn words(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut rest = text.trim().trim_end_matches(';').trim();
    while let Some(first) = rest.chars().next() {
        let end = match first {
            '\'' => {
                let mut word = String::new();
                let mut inside = rest[1..].chars().peekable();
                let mut taken = 1;
                loop {
                    let next = inside.next().ok_or("a quote is not closed")?;
                    taken += next.len_utf8();
                    if next != '\'' {
                        word.push(next);
                    } else if inside.next_if_eq(&'\'').is_some() {
                        taken += 1;
                        word.push('\'');
                    } else {
                        break;
                    }
                }
                words.push(word);
                taken
            }
            '=' => {
                words.push("=".to_owned());
                1
            }
            _ => {
                let end = rest.find([' ', '\t', '\n', '\r', '=', '\'']).unwrap_or(rest.len());
                words.push(rest[..end].to_owned());
                end
            }
        };
        rest = rest[end..].trim_start();
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_as_people_write_them() {
        assert_eq!(read("show phase;"), Ok(Command::Show(Show::Phase)));
        assert_eq!(read("SHOW GATES dual-write"), Ok(Command::Show(Show::Gates(Some(Phase::DualWrite)))));
        let plain =
            Set { phase: Phase::DualWrite, dry_run: false, force: Force::Nothing, reason: None, terminate: false };
        for text in ["SET phase = 'dual-write'", "set phase='dual-write';", "SET PHASE TO dual-write"] {
            assert_eq!(read(text), Ok(Command::Set(plain.clone())), "{text}");
        }
        let forced = "SET phase = 'new' FORCE 'backup, soak' REASON 'it''s late' TERMINATE DRY RUN";
        let Ok(Command::Set(set)) = read(forced) else { panic!("{:?}", read(forced)) };
        assert_eq!((set.reason.as_deref(), set.terminate, set.dry_run), (Some("it's late"), true, true));
        assert_eq!(set.force, Force::parse("backup,soak").unwrap());
        assert!(read("SET phase = new FORCE").unwrap_err().contains("REASON"));
        assert!(read("SET phase = 'bew'").unwrap_err().contains("not a phase"));
        assert!(read("SET phase = 'new' QUICKLY").unwrap_err().contains("quickly"));
        assert!(read("SET phase = 'new").is_err(), "a quote is open");
        assert_eq!(read("SET extra_float_digits = 3"), Ok(Command::SetOther));
        assert!(read("SELECT 1").unwrap_err().contains("SHOW HELP"));
    }
}
