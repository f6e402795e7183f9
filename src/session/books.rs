//! What a session remembers of its client: prepared statements, portals, settings whose names the server does not list. No I/O.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;

use super::moved::Bound;
use crate::plan::Splice;
use crate::plan::cache::{Application, Planned};

/// What a plan depends on beside its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The world.
    pub generation: u64,
    /// The client's encoding is UTF8.
    pub utf8: bool,
    /// The session may run as another role than it logged in as.
    pub role_changed: bool,
}

/// A prepared statement of the client.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Its text, without the NUL. None: too long to keep; it goes through as an unknown write.
    pub text: Option<Bytes>,
    /// Number and OIDs of declared parameter types, as they stood in Parse.
    pub types: Bytes,
    /// Its plan, on which terms it was made, and where the hidden column is spliced.
    pub planned: Option<(Terms, Arc<Planned>, usize)>,
    /// What the server session has under this name.
    pub there: There,
    /// It calls set_config: which setting that is about may come with Bind.
    pub sets: bool,
}

/// What a server session has prepared under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum There {
    /// Nothing: it was prepared on another server session.
    Nothing,
    /// The client's own text.
    Plain,
    /// The text with this splice.
    Spliced(Splice),
    /// Unknown: what was to replace it has failed.
    Unknown,
}

/// A portal of the client.
#[derive(Clone, Debug)]
pub struct Portal {
    /// Its number in this session: a name may be used again.
    pub number: u64,
    /// The statement's plan; None in phases without a mirror.
    pub planned: Option<Arc<Planned>>,
    /// The hidden column comes in binary.
    pub binary: bool,
    /// The statement's text, of a COPY or of DDL.
    pub text: Option<Bytes>,
    /// It has run to its end, as far as was asked. A write without RETURNING runs once.
    pub ran: bool,
    /// What was bound, of an UPDATE that may change keys.
    pub bound: Option<Rc<Bound>>,
}

/// Names of settings that pg_settings does not list, and that must be asked for by name when a session is carried over.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Custom settings (with a dot) that a statement may have set.
    pub custom: BTreeSet<String>,
    /// client_encoding, as ParameterStatus last said.
    pub client_encoding: String,
    /// application_name, as ParameterStatus last said.
    pub application: Application,
    /// standard_conforming_strings is off: backslashes escape, and our lexer does not read such text.
    pub escapes: bool,
    /// A statement under way may change how texts are read. The server says so only with its next ReadyForQuery.
    pub unsettled: bool,
    /// SQL PREPARE was used.
    pub sql_prepared: bool,
    /// The session may run as another role than it logged in as.
    pub role_changed: bool,
    /// A cursor WITH HOLD was declared, or LISTEN said: the session may have what cannot move.
    pub stays: bool,
}

impl Settings {
    /// Looks at a text that may set something, cheaply: in phases without a mirror no statement is read.
    pub fn glance(&mut self, text: &[u8]) {
        let start = text.iter().position(|b| !b.is_ascii_whitespace()).unwrap_or(0);
        let word = &text[start..text.len().min(start + 7)];
        let is = |keyword: &[u8]| word.len() >= keyword.len() && word[..keyword.len()].eq_ignore_ascii_case(keyword);
        if is(b"set") || Settings::sets(text) {
            self.collect(text);
        } else if memchr::memchr(b';', text).is_some_and(|at| text[at + 1..].iter().any(|b| !b.is_ascii_whitespace())) {
            // Several statements: one behind the first may set something.
            let text = &text[..text.len().min(64 * 1024)];
            if text.windows(4).any(|word| word.eq_ignore_ascii_case(b"set ")) {
                self.collect(text);
            }
            self.stays |=
                has(text, b"declare") && has(text, b"hold") || has(text, b"listen") && !has(text, b"unlisten");
        }
        if is(b"declare") {
            self.stays |= has(&text[..text.len().min(64 * 1024)], b"hold");
        }
        self.stays |= is(b"listen");
        if is(b"prepare") {
            self.sql_prepared = true;
        }
    }

    /// The text may call set_config.
    pub fn sets(text: &[u8]) -> bool {
        text.len() < 64 * 1024 && memchr::memmem::find(text, b"set_config").is_some()
    }

    /// The text may drop prepared statements (DEALLOCATE, DISCARD).
    pub fn forgets(text: &[u8]) -> bool {
        let start = text.iter().position(|b| !b.is_ascii_whitespace()).unwrap_or(0);
        let word = &text[start..text.len().min(start + 7)];
        word.eq_ignore_ascii_case(b"dealloc") || word.eq_ignore_ascii_case(b"discard")
    }

    /// Every word with a dot in a statement that sets something, or in its parameters, may be a custom setting: asking for one too many costs nothing.
    pub fn collect(&mut self, text: &[u8]) {
        let text = String::from_utf8_lossy(&text[..text.len().min(64 * 1024)]).replace('"', "");
        let words = text.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.' || c == '$'));
        let dotted =
            words.filter(|word| word.contains('.') && !word.starts_with(|c: char| c.is_ascii_digit() || c == '.'));
        for word in dotted.take(64) {
            if self.custom.len() < 1024 {
                self.custom.insert(word.trim_end_matches('.').to_lowercase());
            }
        }
        // The name may be a parameter.
        let unnamed = |rest: &str| !rest.trim_start().trim_start_matches('(').trim_start().starts_with('\'');
        self.role_changed |= text.split("set_config").skip(1).any(unnamed)
            || text.to_ascii_lowercase().contains("role")
            || text.to_ascii_lowercase().contains("authorization");
    }
}

fn has(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|found| found.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_with_hold_and_listen_are_noticed_without_reading_statements() {
        for (text, stays) in [
            ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", true),
            ("begin; declare c cursor with\nhold for select 1; commit", true),
            ("DECLARE c CURSOR FOR SELECT 1", false),
            ("SELECT 'declare', 'hold'", false),
            ("listen jobs", true),
            ("SELECT 1; LISTEN jobs", true),
            ("SELECT 'listen'", false),
        ] {
            let mut settings = Settings::default();
            settings.glance(text.as_bytes());
            assert_eq!(settings.stays, stays, "{text}");
        }
    }

    #[test]
    fn custom_settings_are_remembered_by_name() {
        let mut settings = Settings::default();
        settings.glance(b" SET app.user_id = '7'");
        settings.glance(b"select set_config('My.Tenant', $1, false)");
        settings.glance(b"SET \"app\".\"user\" TO 'x'");
        settings.glance(b"SELECT a.b FROM a");
        settings.glance(b"set role admin");
        assert_eq!(
            settings.custom.iter().map(String::as_str).collect::<Vec<_>>(),
            ["app.user", "app.user_id", "my.tenant"]
        );
        assert!(settings.role_changed && !settings.sql_prepared);
        for (text, changes) in [
            ("BEGIN; SET LOCAL ROLE admin; INSERT INTO t VALUES (1)", true),
            ("select set_config($1, $2, false)", true),
            ("select set_config('a.b', $2, false)", false),
            ("BEGIN; UPDATE t SET n = 1; COMMIT", false),
        ] {
            let mut settings = Settings::default();
            settings.glance(text.as_bytes());
            assert_eq!(settings.role_changed, changes, "{text}");
        }
    }
}
