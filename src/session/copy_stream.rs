//! The keys in a COPY stream, in PostgreSQL's text, csv and binary formats, however it is cut into pieces. Pure.
//!
//! Source: PostgreSQL documentation, "COPY", File Formats; `copyfromparse.c`.

use bytes::{BufMut, Bytes, BytesMut};

use crate::sql::lex::{Kind, Token, lex};

/// How a stream is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// text, with its delimiter.
    Text { delimiter: u8, header: bool },
    /// csv.
    Csv { delimiter: u8, quote: u8, escape: u8, header: bool },
    /// binary.
    Binary,
}

/// The form that a COPY statement asks for; None: it has options that are not understood here.
pub(super) fn form(text: &[u8]) -> Option<Form> {
    let tokens: Vec<Token> = lex(text).filter(|token| !token.kind.is_gap()).collect();
    if tokens.get(1)?.is_word(text, "binary") {
        return None;
    }
    let at = tokens.windows(2).position(|pair| pair[0].is_word(text, "from") && pair[1].is_word(text, "stdin"))?;
    let mut rest = &tokens[at + 2..];
    if rest.last().is_some_and(|token| token.is_punct(text, b';')) {
        rest = &rest[..rest.len() - 1];
    }
    if rest.first().is_some_and(|token| token.is_word(text, "with")) {
        rest = &rest[1..];
    }
    let mut options = Options::default();
    match rest {
        [] => {}
        [open, inside @ .., close] if open.is_punct(text, b'(') && close.is_punct(text, b')') => {
            for option in inside.split(|token| token.is_punct(text, b',')) {
                options.set(text, option)?;
            }
        }
        words => options.legacy(text, words)?,
    }
    options.form()
}

/// The statement may be COPY FREEZE.
pub(super) fn freezes(text: &[u8]) -> bool {
    lex(text).any(|token| token.is_word(text, "freeze"))
}

#[derive(Default)]
struct Options {
    format: String,
    delimiter: Option<u8>,
    quote: Option<u8>,
    escape: Option<u8>,
    header: bool,
}

impl Options {
    fn set(&mut self, text: &[u8], option: &[Token]) -> Option<()> {
        let (name, value) = option.split_first()?;
        let name = crate::sql::name::fold(text, name)?;
        let word = || match value {
            [] => Some("true".to_owned()),
            [value] if value.kind == Kind::Text => String::from_utf8(constant(text, value)?).ok(),
            [value] => Some(String::from_utf8_lossy(value.bytes(text)).to_lowercase()),
            _ => None,
        };
        match name.as_str() {
            "format" => self.format = word()?,
            "delimiter" => self.delimiter = Some(byte(text, value)?),
            "quote" => self.quote = Some(byte(text, value)?),
            "escape" => self.escape = Some(byte(text, value)?),
            "header" => self.header = !matches!(word()?.as_str(), "false" | "off" | "0"),
            // A key is never NULL, and FREEZE changes no row.
            "null" | "freeze" => {}
            _ => return None,
        }
        Some(())
    }

    /// The options of PostgreSQL before 9.0.
    fn legacy(&mut self, text: &[u8], mut words: &[Token]) -> Option<()> {
        while let Some((first, rest)) = words.split_first() {
            let as_word = usize::from(rest.first().is_some_and(|token| token.is_word(text, "as")));
            let value = rest.get(as_word..as_word + 1);
            let mut taken = as_word + 1;
            match String::from_utf8_lossy(first.bytes(text)).to_lowercase().as_str() {
                "delimiter" => self.delimiter = Some(byte(text, value?)?),
                "quote" => self.quote = Some(byte(text, value?)?),
                "escape" => self.escape = Some(byte(text, value?)?),
                "null" => drop(value?),
                other => {
                    taken = 0;
                    match other {
                        "csv" | "binary" => self.format = other.to_owned(),
                        "header" => self.header = true,
                        "freeze" => {}
                        _ => return None,
                    }
                }
            }
            words = &rest[taken..];
        }
        Some(())
    }

    fn form(self) -> Option<Form> {
        let header = self.header;
        match self.format.as_str() {
            "" | "text" => Some(Form::Text { delimiter: self.delimiter.unwrap_or(b'\t'), header }),
            "csv" => {
                let quote = self.quote.unwrap_or(b'"');
                let escape = self.escape.unwrap_or(quote);
                Some(Form::Csv { delimiter: self.delimiter.unwrap_or(b','), quote, escape, header })
            }
            "binary" => Some(Form::Binary),
            _ => None,
        }
    }
}

fn byte(text: &[u8], value: &[Token]) -> Option<u8> {
    match (value, value.first().map(|value| constant(text, value))) {
        ([_], Some(Some(bytes))) if bytes.len() == 1 => bytes.first().copied(),
        _ => None,
    }
}

/// A string constant, plain or with the simplest escapes.
fn constant(text: &[u8], token: &Token) -> Option<Vec<u8>> {
    let bytes = token.bytes(text);
    if token.kind != Kind::Text {
        return None;
    }
    let (escaped, inside) = match bytes {
        [b'\'', inside @ .., b'\''] => (false, inside),
        [b'e' | b'E', b'\'', inside @ .., b'\''] => (true, inside),
        _ => return None,
    };
    let mut out = Vec::new();
    let mut rest = inside.iter().copied();
    while let Some(byte) = rest.next() {
        out.push(match byte {
            b'\'' if rest.next() == Some(b'\'') => b'\'',
            b'\'' => return None,
            b'\\' if escaped => match rest.next()? {
                b't' => b'\t',
                b'n' => b'\n',
                other @ (b'\\' | b'\'') => other,
                _ => return None,
            },
            other => other,
        });
    }
    Some(out)
}

/// Where in a row the reader stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In a field, outside quotes.
    Field,
    /// Text: behind a backslash.
    Backslash,
    /// Text: behind a backslash and so many octal digits, or `\x` and so many hex digits.
    Octal {
        value: u8,
        digits: u8,
    },
    Hex {
        value: u8,
        digits: u8,
    },
    /// csv: in quotes.
    Quoted,
    /// csv: in quotes, behind the escape character.
    Escaped,
    /// Behind `\.`: what follows is no data.
    End,
    /// Binary: so many bytes of this part are still to come.
    Head {
        left: usize,
    },
    Extension {
        left: usize,
    },
    Count,
    Length,
    Value {
        left: usize,
    },
}

/// Reads a stream piece by piece and keeps the keys.
pub(super) struct Stream {
    form: Form,
    /// Of each column, its place in the key.
    places: Vec<Option<usize>>,
    limit: usize,
    state: State,
    /// The current column.
    column: usize,
    /// Columns of the current binary row.
    columns: usize,
    /// Bytes of the current part, where a number is read, or of the last backslash's line.
    part: BytesMut,
    /// The current row's key.
    key: Vec<BytesMut>,
    /// Lines that are skipped.
    skip: bool,
    /// The line has a byte; its first two decide about `\.`.
    line: Vec<u8>,
    /// The last byte was a carriage return outside quotes.
    carriage: bool,
    keys: Option<Vec<Bytes>>,
    bytes: usize,
}

impl Stream {
    pub(super) fn new(form: Form, places: Vec<Option<usize>>, limit: usize) -> Stream {
        let width = places.iter().flatten().count();
        let (state, skip) = match form {
            Form::Binary => (State::Head { left: 19 }, false),
            Form::Text { header, .. } | Form::Csv { header, .. } => (State::Field, header),
        };
        Stream {
            form,
            places,
            limit,
            state,
            column: 0,
            columns: 0,
            part: BytesMut::new(),
            key: vec![BytesMut::new(); width],
            skip,
            line: Vec::new(),
            carriage: false,
            keys: Some(Vec::new()),
            bytes: 0,
        }
    }

    /// The next piece.
    pub(super) fn feed(&mut self, mut piece: &[u8]) {
        if self.keys.is_none() {
            return;
        }
        while let Some(&byte) = piece.first() {
            let taken = match self.form {
                Form::Binary => self.binary(piece),
                Form::Text { delimiter, .. } => {
                    self.text(byte, delimiter);
                    1
                }
                Form::Csv { delimiter, quote, escape, .. } => {
                    self.csv(byte, delimiter, quote, escape);
                    1
                }
            };
            piece = &piece[taken..];
        }
    }

    /// The keys' values, one row's behind the other's. None: there were too many.
    pub(super) fn finish(mut self) -> Option<Vec<Bytes>> {
        if self.form != Form::Binary && self.state != State::End && !self.line.is_empty() {
            self.digits_end();
            self.row();
        }
        self.keys
    }

    fn put(&mut self, byte: u8) {
        if self.skip {
            return;
        }
        if let Some(&Some(place)) = self.places.get(self.column) {
            self.key[place].put_u8(byte);
            self.bound(1);
        }
    }

    fn bound(&mut self, more: usize) {
        self.bytes += more;
        if self.bytes > self.limit {
            self.keys = None;
            self.key.iter_mut().for_each(BytesMut::clear);
        }
    }

    fn row(&mut self) {
        self.column = 0;
        self.line.clear();
        let skip = std::mem::take(&mut self.skip);
        let width = self.key.len();
        self.bound(width * 64);
        if let (Some(keys), false) = (&mut self.keys, skip) {
            keys.extend(self.key.iter_mut().map(|value| value.split().freeze()));
        }
    }

    /// A line end outside quotes; `\r\n` is one.
    fn line_end(&mut self, byte: u8) {
        if byte == b'\n' && std::mem::take(&mut self.carriage) {
            return;
        }
        self.carriage = byte == b'\r';
        if self.line == b"\\." {
            self.state = State::End;
        } else {
            self.row();
        }
    }

    fn note(&mut self, byte: u8) {
        self.carriage = false;
        if self.line.len() < 3 {
            self.line.push(byte);
        }
    }

    fn digits_end(&mut self) {
        if let State::Octal { value, .. } | State::Hex { value, .. } = self.state {
            self.put(value);
            self.state = State::Field;
        }
    }

    fn text(&mut self, byte: u8, delimiter: u8) {
        match self.state {
            State::Octal { value, digits } if digits < 3 && (b'0'..=b'7').contains(&byte) => {
                self.state =
                    State::Octal { value: value.wrapping_mul(8).wrapping_add(byte - b'0'), digits: digits + 1 };
                return;
            }
            State::Hex { value, digits } if digits < 2 && byte.is_ascii_hexdigit() => {
                let digit = char::from(byte).to_digit(16).unwrap_or(0) as u8;
                self.state = State::Hex { value: value << 4 | digit, digits: digits + 1 };
                return;
            }
            State::Hex { digits: 0, .. } => {
                // `\x` without a digit is an x.
                self.put(b'x');
                self.state = State::Field;
            }
            State::Octal { .. } | State::Hex { .. } => self.digits_end(),
            State::Backslash => {
                self.note(byte);
                self.state = State::Field;
                match byte {
                    b'0'..=b'7' => self.state = State::Octal { value: byte - b'0', digits: 1 },
                    b'x' => self.state = State::Hex { value: 0, digits: 0 },
                    b'b' => self.put(8),
                    b'f' => self.put(12),
                    b'n' => self.put(b'\n'),
                    b'r' => self.put(b'\r'),
                    b't' => self.put(b'\t'),
                    b'v' => self.put(11),
                    other => self.put(other),
                }
                return;
            }
            State::End => return,
            _ => {}
        }
        match byte {
            b'\n' | b'\r' => return self.line_end(byte),
            b'\\' => self.state = State::Backslash,
            byte if byte == delimiter => self.column += 1,
            byte => self.put(byte),
        }
        self.note(byte);
    }

    fn csv(&mut self, byte: u8, delimiter: u8, quote: u8, escape: u8) {
        match self.state {
            State::Quoted if byte == escape => self.state = State::Escaped,
            State::Quoted if byte == quote => self.state = State::Field,
            State::Quoted => self.put(byte),
            State::Escaped if byte == escape || byte == quote => {
                self.put(byte);
                self.state = State::Quoted;
            }
            State::Escaped if escape == quote => {
                // It was the closing quote.
                self.state = State::Field;
                self.csv(byte, delimiter, quote, escape);
            }
            State::Escaped => {
                self.put(escape);
                self.put(byte);
                self.state = State::Quoted;
            }
            State::End => {}
            _ => {
                match byte {
                    b'\n' | b'\r' => return self.line_end(byte),
                    byte if byte == quote => self.state = State::Quoted,
                    byte if byte == delimiter => self.column += 1,
                    byte => self.put(byte),
                }
                self.note(byte);
            }
        }
    }

    /// Takes what it can of a piece, at least one byte.
    fn binary(&mut self, piece: &[u8]) -> usize {
        match self.state {
            State::Head { left } => {
                let taken = left.min(piece.len());
                self.part.put_slice(&piece[..taken]);
                self.state = State::Head { left: left - taken };
                if left == taken {
                    let extension = number(&self.part[15..19]);
                    self.part.clear();
                    self.state = if extension > 0 { State::Extension { left: extension } } else { State::Count };
                }
                taken
            }
            State::Extension { left } => {
                let taken = left.min(piece.len());
                self.state = if taken == left { State::Count } else { State::Extension { left: left - taken } };
                taken
            }
            State::Count => {
                self.part.put_u8(piece[0]);
                if self.part.len() == 2 {
                    let count = i16::from_be_bytes([self.part[0], self.part[1]]);
                    self.part.clear();
                    self.columns = usize::try_from(count).unwrap_or(0);
                    self.state = if count < 0 { State::End } else { State::Length };
                    self.column = 0;
                    if count == 0 {
                        self.state = State::Count;
                    }
                }
                1
            }
            State::Length => {
                self.part.put_u8(piece[0]);
                if self.part.len() == 4 {
                    let length = number(&self.part);
                    self.part.clear();
                    self.state = State::Value { left: length };
                    if length == 0 {
                        self.value_end();
                    }
                }
                1
            }
            State::Value { left } => {
                let taken = left.min(piece.len());
                if let Some(&Some(place)) = self.places.get(self.column) {
                    self.key[place].put_slice(&piece[..taken]);
                    self.bound(taken);
                }
                self.state = State::Value { left: left - taken };
                if taken == left {
                    self.value_end();
                }
                taken
            }
            _ => piece.len(),
        }
    }

    fn value_end(&mut self) {
        self.column += 1;
        self.state = State::Length;
        if self.column == self.columns {
            self.row();
            self.state = State::Count;
        }
    }
}

/// A length; -1 (NULL) has no bytes.
fn number(bytes: &[u8]) -> usize {
    let bytes = bytes.first_chunk().copied().unwrap_or_default();
    usize::try_from(i32::from_be_bytes(bytes)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of a stream, cut after every byte and not at all.
    fn keys(form: Form, places: &[Option<usize>], stream: &[u8]) -> Vec<String> {
        let read = |size: usize| {
            let mut reader = Stream::new(form, places.to_vec(), 1 << 20);
            stream.chunks(size).for_each(|piece| reader.feed(piece));
            let keys = reader.finish().expect("few");
            keys.iter().map(|key| key.escape_ascii().to_string()).collect::<Vec<_>>()
        };
        let whole = read(stream.len().max(1));
        assert_eq!(read(1), whole);
        assert_eq!(read(3), whole);
        whole
    }

    #[test]
    fn options_are_understood_or_refused() {
        let text = |delimiter, header| Some(Form::Text { delimiter, header });
        let csv = |delimiter, quote, escape, header| Some(Form::Csv { delimiter, quote, escape, header });
        for (sql, expected) in [
            ("COPY t FROM STDIN", text(b'\t', false)),
            ("copy t (a, \"from\") from stdin;", text(b'\t', false)),
            ("COPY t FROM STDIN WITH (DELIMITER '|', NULL '')", text(b'|', false)),
            ("COPY t FROM STDIN (FORMAT 'csv', HEADER)", csv(b',', b'"', b'"', true)),
            (
                "COPY t FROM STDIN (FORMAT csv, HEADER false, QUOTE '''', ESCAPE E'\\\\')",
                csv(b',', b'\'', b'\\', false),
            ),
            (
                "COPY t FROM STDIN WITH DELIMITER AS E'\\t' NULL AS 'x' CSV HEADER QUOTE '$'",
                csv(b'\t', b'$', b'$', true),
            ),
            ("COPY t FROM STDIN BINARY", Some(Form::Binary)),
            ("COPY t FROM STDIN (FORMAT binary)", Some(Form::Binary)),
            ("COPY t FROM STDIN (FORMAT csv, FORCE_NULL (a))", None),
            ("COPY t FROM STDIN (ENCODING 'latin1')", None),
            ("COPY t FROM STDIN WHERE a > 1", None),
            ("COPY t FROM STDIN (DELIMITER U&'x')", None),
            ("COPY BINARY t FROM STDIN", None),
        ] {
            assert_eq!(form(sql.as_bytes()), expected, "{sql}");
        }
    }

    #[test]
    fn keys_of_text() {
        let form = Form::Text { delimiter: b'\t', header: false };
        assert_eq!(keys(form, &[Some(0), None], b"1\ta\n2\tb\\\nc\r\n3\t\\N\n\\.\n9\tx\n"), ["1", "2", "3"]);
        assert_eq!(keys(form, &[None, Some(0)], b"x\ta\\tb\\101\\x42\\\\\\q\\n\ny\tlast"), ["a\\tbAB\\\\q\\n", "last"]);
        assert_eq!(keys(form, &[Some(1), Some(0)], b"a\tb\nc\td\n"), ["b", "a", "d", "c"]);
        assert_eq!(keys(form, &[Some(0)], b"\\x\n\\7\n\\x4\n"), ["x", "\\x07", "\\x04"]);
        let header = Form::Text { delimiter: b'|', header: true };
        assert_eq!(keys(header, &[Some(0), None], b"id|name\n5|x\n"), ["5"]);
    }

    #[test]
    fn keys_of_csv() {
        let form = Form::Csv { delimiter: b',', quote: b'"', escape: b'"', header: true };
        let stream = b"id,name\r\n1,\"a,\"\"b\nc\"\r\n\"2\"\"x\",y\r\n3,\r\n\\.\r\n4,z";
        assert_eq!(keys(form, &[Some(0), None], stream), ["1", "2\\\"x", "3"]);
        assert_eq!(keys(form, &[None, Some(0)], stream), ["a,\\\"b\\nc", "y", ""]);
        let form = Form::Csv { delimiter: b',', quote: b'\'', escape: b'\\', header: false };
        assert_eq!(keys(form, &[Some(0), None], b"'a\\'b\\\\c\\d',1\n"), ["a\\'b\\\\c\\\\d"]);
    }

    #[test]
    fn keys_of_binary() {
        let mut stream = b"PGCOPY\n\xff\r\n\0".to_vec();
        stream.put_i32(0);
        stream.put_i32(3);
        stream.put_slice(b"ext");
        for (key, other) in [("k1", Some("abc")), ("", None), ("k3", Some(""))] {
            stream.put_i16(2);
            stream.put_i32(other.map_or(-1, |other| other.len() as i32));
            stream.put_slice(other.unwrap_or_default().as_bytes());
            stream.put_i32(key.len() as i32);
            stream.put_slice(key.as_bytes());
        }
        stream.put_i16(-1);
        assert_eq!(keys(Form::Binary, &[None, Some(0)], &stream), ["k1", "", "k3"]);
    }

    #[test]
    fn keys_are_bounded() {
        let mut reader = Stream::new(Form::Text { delimiter: b'\t', header: false }, vec![Some(0)], 1000);
        (0..100).for_each(|_| reader.feed(b"12345\n"));
        assert!(reader.finish().is_none());
    }
}
