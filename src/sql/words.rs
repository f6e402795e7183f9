//! A cursor over a statement's tokens, for what is told by keywords.

use std::ops::Range;

use super::facts::Name;
use super::lex::{Kind, Token};
use super::name;

/// A statement's text and its tokens without gaps and without `;` at its ends.
#[derive(Clone, Copy)]
pub(super) struct Words<'a> {
    pub(super) text: &'a [u8],
    pub(super) tokens: &'a [Token],
    /// The place of the next token.
    pub(super) at: usize,
}

impl<'a> Words<'a> {
    /// Stands at the first token.
    pub(super) fn new(text: &'a [u8], tokens: &'a [Token]) -> Words<'a> {
        Words { text, tokens, at: 0 }
    }

    /// Whether the next token is this keyword.
    pub(super) fn is(&self, word: &str) -> bool {
        self.tokens.get(self.at).is_some_and(|token| token.is_word(self.text, word))
    }

    /// Steps over this keyword if it is next.
    pub(super) fn eat(&mut self, word: &str) -> bool {
        let found = self.is(word);
        self.at += usize::from(found);
        found
    }

    /// Steps over one of these keywords.
    pub(super) fn eat_any(&mut self, words: &[&str]) -> bool {
        words.iter().any(|word| self.eat(word))
    }

    /// Steps over these keywords if all of them are next.
    pub(super) fn eat_all(&mut self, words: &[&str]) -> bool {
        let mut next = *self;
        let found = words.iter().all(|word| next.eat(word));
        if found {
            *self = next;
        }
        found
    }

    pub(super) fn eat_punct(&mut self, byte: u8) -> bool {
        let found = self.is_punct(byte);
        self.at += usize::from(found);
        found
    }

    pub(super) fn is_punct(&self, byte: u8) -> bool {
        self.tokens.get(self.at).is_some_and(|token| token.is_punct(self.text, byte))
    }

    pub(super) fn is_kind(&self, kind: Kind) -> bool {
        self.tokens.get(self.at).is_some_and(|token| token.kind == kind)
    }

    pub(super) fn is_done(&self) -> bool {
        self.at >= self.tokens.len()
    }

    pub(super) fn left(&self) -> usize {
        self.tokens.len().saturating_sub(self.at)
    }

    pub(super) fn ident(&mut self) -> Option<String> {
        let name = name::fold(self.text, self.tokens.get(self.at)?)?;
        self.at += 1;
        Some(name)
    }

    /// `a.b.c` as its parts.
    pub(super) fn parts(&mut self) -> Option<Vec<String>> {
        let mut parts = vec![self.ident()?];
        while self.eat_punct(b'.') {
            parts.push(self.ident()?);
        }
        Some(parts)
    }

    /// A possibly qualified name.
    pub(super) fn qualified(&mut self) -> Option<Name> {
        let mut parts = self.parts().filter(|parts| parts.len() <= 3)?;
        let name = parts.pop()?;
        Some(Name { schema: parts.pop(), name })
    }

    /// `[ONLY] name [*] | ONLY (name)`.
    pub(super) fn relation(&mut self) -> Option<Name> {
        let only = self.eat("only");
        if only && self.eat_punct(b'(') {
            return self.qualified().filter(|_| self.eat_punct(b')'));
        }
        let name = self.qualified()?;
        if !only && self.tokens.get(self.at).is_some_and(|token| token.bytes(self.text) == b"*") {
            self.at += 1;
        }
        Some(name)
    }

    pub(super) fn relations(&mut self) -> Option<Vec<Name>> {
        let mut names = vec![self.relation()?];
        while self.eat_punct(b',') {
            names.push(self.relation()?);
        }
        Some(names)
    }

    /// Stands at `(`: steps behind its `)`.
    pub(super) fn skip_parens(&mut self) -> Option<()> {
        let mut depth = 0usize;
        loop {
            if self.is_done() {
                return None;
            }
            if self.is_punct(b'(') {
                depth += 1;
            } else if self.is_punct(b')') {
                depth -= 1;
            }
            self.at += 1;
            if depth == 0 {
                return Some(());
            }
        }
    }

    /// The bytes from the next token to the last.
    pub(super) fn rest(&self) -> Option<Range<usize>> {
        Some(self.tokens.get(self.at)?.start()..self.tokens.last()?.end())
    }

    /// Each name before a `(` from here on: all calls are among them.
    pub(super) fn calls(&self) -> Vec<Name> {
        let mut names = Vec::new();
        let tokens = &self.tokens[self.at.min(self.tokens.len())..];
        for (place, pair) in tokens.windows(2).enumerate() {
            let is_name = matches!(pair[0].kind, Kind::Word | Kind::Quoted | Kind::UnicodeQuoted);
            if is_name && pair[1].is_punct(self.text, b'(') {
                let qualified = place >= 2 && tokens[place - 1].is_punct(self.text, b'.');
                let first = if qualified { place - 2 } else { place };
                names.extend(name::qualified(self.text, &tokens[first..=place]));
            }
        }
        names.sort();
        names.dedup();
        names
    }

    /// Whether the token behind the next is `=`, TO or a dot: then the next is a parameter's name.
    pub(super) fn next_is_assignment(&self) -> bool {
        self.tokens.get(self.at + 1).is_some_and(|token| {
            token.bytes(self.text) == b"=" || token.is_punct(self.text, b'.') || token.is_word(self.text, "to")
        })
    }

    pub(super) fn calls_behind(&self, word: &str) -> Vec<Name> {
        let mut behind = *self;
        while !behind.is_done() {
            if behind.eat(word) {
                return behind.calls();
            }
            behind.at += 1;
        }
        Vec::new()
    }
}
