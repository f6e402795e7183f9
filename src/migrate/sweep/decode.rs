//! What `test_decoding` says of a change, read. Pure.
//!
//! The output is text, one change a line: `table public.t: UPDATE: old-key: id[integer]:1 new-tuple: id[integer]:2 v[text]:'it''s'`. Names stand as
//! SQL quotes them, types in brackets; numbers stand bare, what else there is in quotes, with quotes doubled. Bytes and not strings: a server whose
//! encoding is SQL_ASCII gives what it has stored.

use bytes::Bytes;

/// One row of the slot's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said<'a> {
    /// A transaction that has committed begins.
    Begin,
    /// ... and ends.
    Commit,
    /// A row has changed.
    Row(Change<'a>),
    /// These tables were emptied: schema and name.
    Truncate(Vec<(String, String)>),
    /// A message, or what is of no interest.
    Other,
}

/// What a statement did to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Insert,
    Update,
    Delete,
}

/// One row's change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change<'a> {
    /// Schema and name of the table or partition, as they were then.
    pub relation: (String, String),
    /// What happened.
    pub verb: Verb,
    /// What is logged of the row as it was: its replica identity, or all of it. None: nothing is, or the identity has not changed (UPDATE).
    pub old: Option<Tuple<'a>>,
    /// The row as it is then.
    pub new: Option<Tuple<'a>>,
}

/// Columns by name, as they stand in the line.
pub(super) type Tuple<'a> = Vec<(String, Value<'a>)>;

/// A column's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Null,
    /// It is stored out of line and has not changed: it is not said.
    Unchanged,
    /// As the type's output function gives it.
    Bare(&'a [u8]),
    /// The same with its quotes doubled.
    Quoted(&'a [u8]),
}

impl Value<'_> {
    /// The text of the value; None: NULL, or not said.
    pub fn text(&self) -> Option<Bytes> {
        match self {
            Value::Null | Value::Unchanged => None,
            Value::Bare(text) => Some(Bytes::copy_from_slice(text)),
            Value::Quoted(text) => {
                let mut out = Vec::with_capacity(text.len());
                let mut rest = text.iter();
                while let Some(&byte) = rest.next() {
                    out.push(byte);
                    if byte == b'\'' {
                        rest.next();
                    }
                }
                Some(out.into())
            }
        }
    }
}

/// A line that is not laid out as `test_decoding` does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the slot's output cannot be read (at byte {0}): is its plugin test_decoding?")]
pub(super) struct Unreadable(pub usize);

/// Reads one line. `cut`: the line's end is missing; then a column that is not whole ends it.
pub(super) fn read(line: &[u8], cut: bool) -> Result<Said<'_>, Unreadable> {
    if line.starts_with(b"BEGIN") {
        return Ok(Said::Begin);
    }
    if line.starts_with(b"COMMIT") {
        return Ok(Said::Commit);
    }
    if !line.starts_with(b"table ") {
        return Ok(Said::Other);
    }
    let mut reader = Reader { line, at: b"table ".len() };
    let said = reader.change(cut);
    said.ok_or(Unreadable(reader.at))
}

struct Reader<'a> {
    line: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn change(&mut self, cut: bool) -> Option<Said<'a>> {
        let mut relations = vec![self.relation()?];
        while self.take(b", ") {
            relations.push(self.relation()?);
        }
        if self.take(b": TRUNCATE:") {
            return Some(Said::Truncate(relations));
        }
        let relation = relations.pop().filter(|_| relations.is_empty())?;
        let verbs: [(&[u8], Verb); 3] =
            [(b": INSERT:", Verb::Insert), (b": UPDATE:", Verb::Update), (b": DELETE:", Verb::Delete)];
        let (_, verb) = verbs.into_iter().find(|(word, _)| self.take(word))?;
        if self.take(b" (no-tuple-data)") {
            return Some(Said::Row(Change { relation, verb, old: None, new: None }));
        }
        let mut old = None;
        if self.take(b" old-key:") {
            old = Some(self.tuple(cut)?);
            if !self.take(b" new-tuple:") && !cut {
                return None;
            }
        }
        let tuple = self.tuple(cut)?;
        let (old, new) = if verb == Verb::Delete { (Some(tuple), None) } else { (old, Some(tuple)) };
        (self.at == self.line.len() || cut).then_some(Said::Row(Change { relation, verb, old, new }))
    }

    fn rest(&self) -> &'a [u8] {
        &self.line[self.at..]
    }

    fn take(&mut self, word: &[u8]) -> bool {
        let there = self.rest().starts_with(word);
        if there {
            self.at += word.len();
        }
        there
    }

    fn relation(&mut self) -> Option<(String, String)> {
        let schema = self.identifier()?;
        if !self.take(b".") {
            return None;
        }
        Some((schema, self.identifier()?))
    }

    /// As quote_identifier writes it.
    fn identifier(&mut self) -> Option<String> {
        let mut name = Vec::new();
        if self.take(b"\"") {
            loop {
                let byte = *self.rest().first()?;
                self.at += 1;
                if byte == b'"' && !self.take(b"\"") {
                    break;
                }
                name.push(byte);
            }
        } else {
            let bare = |byte: &&u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
            name.extend(self.rest().iter().take_while(bare));
            self.at += name.len();
        }
        String::from_utf8(name).ok().filter(|name| !name.is_empty())
    }

    fn tuple(&mut self, cut: bool) -> Option<Tuple<'a>> {
        let mut columns = Vec::new();
        while !self.rest().is_empty() && !self.rest().starts_with(b" new-tuple:") {
            match self.column() {
                Some((column, whole)) if whole || !cut => columns.push(column),
                _ if cut => {
                    self.at = self.line.len();
                    break;
                }
                _ => return None,
            }
        }
        Some(columns)
    }

    /// ` name[type]:value`; and whether it is certain that the value ends where it seems to.
    fn column(&mut self) -> Option<((String, Value<'a>), bool)> {
        if !self.take(b" ") {
            return None;
        }
        let name = self.identifier()?;
        self.type_name()?;
        let value = self.value()?;
        Some(((name, value), !self.rest().is_empty()))
    }

    /// `[type]:`. The type's name may hold brackets, and within quotes anything.
    fn type_name(&mut self) -> Option<()> {
        if !self.take(b"[") {
            return None;
        }
        let mut quoted = false;
        while let Some(&byte) = self.rest().first() {
            if !quoted && self.take(b"]:") {
                return Some(());
            }
            quoted ^= byte == b'"';
            self.at += 1;
        }
        None
    }

    fn value(&mut self) -> Option<Value<'a>> {
        // B'0101': of bit strings.
        let _ = self.rest().starts_with(b"B'") && self.take(b"B");
        if self.take(b"'") {
            let from = self.at;
            loop {
                let quote = self.rest().iter().position(|&byte| byte == b'\'')?;
                self.at += quote + 1;
                if !self.take(b"'") {
                    return Some(Value::Quoted(&self.line[from..self.at - 1]));
                }
            }
        }
        let rest = self.rest();
        let end = rest.iter().position(|&byte| byte == b' ').unwrap_or(rest.len());
        self.at += end;
        match &rest[..end] {
            b"" => None,
            b"null" => Some(Value::Null),
            b"unchanged-toast-datum" => Some(Value::Unchanged),
            bare => Some(Value::Bare(bare)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(line: &str) -> Change<'_> {
        match read(line.as_bytes(), false) {
            Ok(Said::Row(change)) => change,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn lines_as_the_server_writes_them() {
        assert_eq!(read(b"BEGIN 529", false), Ok(Said::Begin));
        assert_eq!(read(b"COMMIT", false), Ok(Said::Commit));
        assert_eq!(read(b"message: transactional: 1 prefix: a, sz: 1 content:x", false), Ok(Said::Other));
        let change = row(
            "table public.t: UPDATE: old-key: id[integer]:1 new-tuple: id[integer]:-2 v[text]:'it''s ''' b[bit(4)]:B'0101' z[text[]]:null",
        );
        assert_eq!(change.relation, ("public".to_owned(), "t".to_owned()));
        assert_eq!(change.old, Some(vec![("id".to_owned(), Value::Bare(b"1"))]));
        let new = change.new.unwrap();
        let texts: Vec<_> = new.iter().map(|(name, value)| (name.as_str(), value.text())).collect();
        assert_eq!(texts[0], ("id", Some("-2".into())));
        assert_eq!(texts[1], ("v", Some("it's '".into())));
        assert_eq!(texts[2], ("b", Some("0101".into())));
        assert_eq!(texts[3], ("z", None));
        let change = row(
            "table \"My \"\"schema\".\"T: INSERT:\": DELETE: \"a b\"[\"odd]: type\"]:'x' c[character varying(3)]:'' d[boolean]:true",
        );
        assert_eq!(change.relation, ("My \"schema".to_owned(), "T: INSERT:".to_owned()));
        assert_eq!((change.verb, change.new), (Verb::Delete, None));
        let old = change.old.unwrap();
        assert_eq!(old[0], ("a b".to_owned(), Value::Quoted(b"x")));
        assert_eq!(old[1].1.text(), Some(Bytes::new()));
        assert_eq!(row("table public.t: DELETE: (no-tuple-data)").old, None);
        let unchanged = row("table public.t: UPDATE: k[text]:unchanged-toast-datum n[integer]:1").new.unwrap();
        assert_eq!(unchanged[0].1, Value::Unchanged);
        let truncated = read(b"table public.a, \"B\".c: TRUNCATE: restart_seqs cascade", false);
        let names = [("public", "a"), ("B", "c")].map(|(schema, name)| (schema.to_owned(), name.to_owned()));
        assert_eq!(truncated, Ok(Said::Truncate(names.to_vec())));
    }

    #[test]
    fn of_a_line_that_was_cut_only_whole_columns_count() {
        let line = b"table public.t: INSERT: id[integer]:12 v[text]:'a long text";
        let Ok(Said::Row(change)) = read(line, true) else { panic!("a row") };
        assert_eq!(change.new, Some(vec![("id".to_owned(), Value::Bare(b"12"))]));
        // The number may go on.
        let Ok(Said::Row(change)) = read(b"table public.t: INSERT: id[integer]:12", true) else { panic!("a row") };
        assert_eq!(change.new, Some(Vec::new()));
        assert_eq!(read(line, false), Err(Unreadable(line.len() - "a long text".len())));
    }

    fn quoted(text: &str, quote: char) -> String {
        format!("{quote}{}{quote}", text.replace(quote, &format!("{quote}{quote}")))
    }

    proptest! {
        #[test]
        fn fuzz_texts_come_out_as_they_went_in(
            name in "\\PC{1,8}", values in prop::collection::vec(prop::option::of("\\PC{0,12}|[' ]{0,5}"), 0..5),
        ) {
            let mut line = format!("table s.{}: INSERT:", quoted(&name, '"'));
            for (at, value) in values.iter().enumerate() {
                let value = value.as_ref().map_or("null".to_owned(), |value| quoted(value, '\''));
                line += &format!(" c{at}[{}]:{value}", quoted(&name, '"'));
            }
            let change = row(&line);
            prop_assert_eq!(change.relation.1, name);
            let texts: Vec<_> = change.new.unwrap().iter().map(|(_, value)| value.text()).collect();
            let expected: Vec<_> = values.into_iter().map(|value| value.map(Bytes::from)).collect();
            prop_assert_eq!(texts, expected);
        }

        #[test]
        fn fuzz_garbage_is_an_error_and_no_panic(line in "(table )?[a-z.: \\[\\]'\"BINSERTDOL-]{0,60}", cut in any::<bool>()) {
            let _ = read(line.as_bytes(), cut);
        }
    }
}
