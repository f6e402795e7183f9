//! What is put into a statement's text, and where: the hidden column at its end, and beside each row that its WITH clause writes. The client's text is never
//! printed anew: these are insertions, and a name in place of another.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use crate::catalog::quote;
use crate::sql::facts::Place;
use crate::sql::{self, places};

/// All that is put into a statement's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Splice {
    /// Behind its last token (`Facts::end`): ` RETURNING <hidden>` or `, <hidden>`; or nothing.
    pub end: String,
    /// Into its WITH clause.
    pub within: Vec<Weave>,
    /// In place of names.
    pub names: Vec<Renamed>,
}

/// What is put in place of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renamed {
    /// The name, by its tokens among those of the text that are no gaps.
    pub tokens: Range<usize>,
    /// What is put there.
    pub text: String,
}

/// What is put beside one statement of a WITH clause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weave {
    /// Which of those that write, from 0.
    pub at: usize,
    /// By which name `manner` calls what it adds.
    pub hidden: String,
    /// How its rows are shown.
    pub manner: Manner,
}

/// How rows of a WITH clause are shown. `shown`: the call that shows one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It returns nothing: `RETURNING shown`.
    Returning {
        /// With the row of the statement.
        shown: String,
    },
    /// It returns columns: `shown` behind them, under another name; what the client calls by its name has those columns and no more.
    Renamed {
        /// With the row of the statement.
        shown: String,
        /// What the client sees, folded.
        columns: Vec<String>,
    },
    /// It returns its rows as they are: another reads them all, and adds no row anywhere.
    Read {
        /// With the row `crossfade_row`.
        shown: String,
    },
}

/// A change of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// What is replaced, in bytes of the client's text; empty where something is inserted.
    pub range: Range<usize>,
    /// By what.
    pub text: String,
}

impl Splice {
    /// Only behind the end.
    pub fn behind(end: String) -> Splice {
        Splice { end, ..Splice::default() }
    }

    /// Nothing is put in.
    pub fn is_empty(&self) -> bool {
        self.end.is_empty() && self.within.is_empty() && self.names.is_empty()
    }

    /// What changes in a text of the shape that was planned, in its order. `end`: behind its last token. None where its WITH clause is not as it was planned.
    pub fn edits(&self, text: &[u8], end: usize) -> Option<Vec<Edit>> {
        let mut edits = Vec::new();
        let places = if self.within.is_empty() { Vec::new() } else { places(text)? };
        for weave in &self.within {
            weave.edits(text, places.get(weave.at)?, &mut edits)?;
        }
        if !self.names.is_empty() {
            let tokens: Vec<_> = sql::lex(text).filter(|token| !token.kind.is_gap()).collect();
            for name in &self.names {
                let named = tokens.get(name.tokens.clone())?;
                let range = named.first()?.start()..named.last()?.end();
                edits.push(Edit { range, text: name.text.clone() });
            }
        }
        if !self.end.is_empty() {
            edits.push(Edit { range: end..end, text: self.end.clone() });
        }
        Some(edits)
    }
}

impl Weave {
    fn edits(&self, text: &[u8], place: &Place, edits: &mut Vec<Edit>) -> Option<()> {
        let insert = |at: usize, text: String| Edit { range: at..at, text };
        let name = std::str::from_utf8(text.get(place.name.clone())?).ok()?;
        let hidden = &self.hidden;
        match &self.manner {
            Manner::Returning { shown } => edits.push(insert(place.body.end, format!(" RETURNING {shown}"))),
            Manner::Renamed { shown, columns } => {
                let columns: Vec<String> = columns.iter().map(|column| quote(column)).collect();
                edits.push(Edit { range: place.name.clone(), text: hidden.clone() });
                edits.push(insert(place.body.end, format!(", {shown} AS crossfade_image")));
                edits.push(insert(place.close, format!(", {name} AS (SELECT {} FROM {hidden})", columns.join(", "))));
            }
            Manner::Read { shown } => edits.push(insert(
                place.close,
                format!(
                    ", {hidden} AS (INSERT INTO crossfade.ledger (id, debts) SELECT 0, '' FROM {name} AS crossfade_row WHERE {shown})"
                ),
            )),
        }
        Some(())
    }
}

/// The text with these edits.
pub fn edited(text: &[u8], edits: &[Edit]) -> Bytes {
    let mut out = BytesMut::with_capacity(text.len() + edits.iter().map(|edit| edit.text.len()).sum::<usize>());
    put_edited(&mut out, text, edits);
    out.freeze()
}

/// Writes the text with these edits.
pub fn put_edited(out: &mut BytesMut, text: &[u8], edits: &[Edit]) {
    let mut from = 0;
    for edit in edits {
        out.extend_from_slice(&text[from..edit.range.start]);
        out.extend_from_slice(edit.text.as_bytes());
        from = edit.range.end;
    }
    out.extend_from_slice(&text[from..]);
}

/// Where characters of the edited text stand in the client's, in UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// Of each edit: where it begins in the edited text, how many characters it has there, how many in the client's text.
    edits: Vec<(usize, usize, usize)>,
}

impl Positions {
    /// Of this text with these edits.
    pub fn of(text: &[u8], edits: &[Edit]) -> Positions {
        let characters = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count();
        let (mut from, mut at) = (0, 0);
        let mut found = Vec::new();
        for edit in edits {
            at += characters(&text[from..edit.range.start]);
            let there = characters(edit.text.as_bytes());
            found.push((at, there, characters(&text[edit.range.clone()])));
            at += there;
            from = edit.range.end;
        }
        Positions { edits: found }
    }

    /// The position in the client's text of one in the edited text; both count from 1. What lies in an edit is where that begins.
    pub fn in_clients_text(&self, position: usize) -> usize {
        let (mut gained, mut lost) = (0, 0);
        for &(start, there, here) in &self.edits {
            if position <= start {
                break;
            }
            if position <= start + there {
                return start + 1 + lost - gained;
            }
            gained += there;
            lost += here;
        }
        position + lost - gained
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn woven(text: &str, within: Vec<Weave>) -> Option<String> {
        let splice = Splice { end: " RETURNING x".to_owned(), within, names: Vec::new() };
        let edits = splice.edits(text.as_bytes(), crate::sql::end(text.as_bytes()))?;
        Some(String::from_utf8(edited(text.as_bytes(), &edits).to_vec()).expect("UTF-8"))
    }

    fn weave(at: usize, manner: Manner) -> Weave {
        Weave { at, hidden: format!("h{at}"), manner }
    }

    #[test]
    fn each_manner_leaves_the_rest_as_it_was() {
        let text = "WITH a AS (DELETE FROM t RETURNING *), \"B\" AS (INSERT INTO t VALUES (1) RETURNING id, v AS \"V\" -- x\n), c AS (DELETE FROM u) DELETE FROM w USING a;";
        let shown = || "s()".to_owned();
        let within = vec![
            weave(0, Manner::Read { shown: shown() }),
            weave(1, Manner::Renamed { shown: shown(), columns: vec!["id".to_owned(), "V".to_owned()] }),
            weave(2, Manner::Returning { shown: shown() }),
        ];
        let expected = "WITH a AS (DELETE FROM t RETURNING *), h0 AS (INSERT INTO crossfade.ledger (id, debts) SELECT 0, '' FROM a AS crossfade_row WHERE s()), \
            h1 AS (INSERT INTO t VALUES (1) RETURNING id, v AS \"V\", s() AS crossfade_image -- x\n), \"B\" AS (SELECT \"id\", \"V\" FROM h1), \
            c AS (DELETE FROM u RETURNING s()) DELETE FROM w USING a RETURNING x;";
        assert_eq!(woven(text, within).as_deref(), Some(expected));
        assert_eq!(woven("DELETE FROM w", vec![weave(0, Manner::Returning { shown: shown() })]), None);
        assert_eq!(woven("DELETE FROM w;", Vec::new()).as_deref(), Some("DELETE FROM w RETURNING x;"));
    }

    #[test]
    fn positions_lead_back_to_the_clients_text() {
        let text = "é name b end";
        let edit = |range: Range<usize>, text: &str| Edit { range, text: text.to_owned() };
        let at = |part: &str| text.find(part).expect("is there");
        let edits = [edit(at("name")..at("name") + 4, "other name"), edit(at("b") + 1..at("b") + 1, " insert")];
        let new = String::from_utf8(edited(text.as_bytes(), &edits).to_vec()).expect("UTF-8");
        let positions = Positions::of(text.as_bytes(), &edits);
        let of = |text: &str, part: &str| text[..text.find(part).expect("is there")].chars().count() + 1;
        for part in ["é", "b", "end"] {
            assert_eq!(positions.in_clients_text(of(&new, part)), of(text, part), "{part}");
        }
        assert_eq!(positions.in_clients_text(of(&new, "other")), of(text, "name"));
        assert_eq!(positions.in_clients_text(of(&new, "sert")), of(text, "b") + 1);
        assert_eq!(Positions::default().in_clients_text(7), 7);
    }
}
