//! Tokens of PostgreSQL's SQL: the rules of its `scan.l` with `standard_conforming_strings` on.
//!
//! Bytes from 0x80 are identifier characters, whatever the encoding. The tokens of a text cover it without a gap, and
//! nothing here fails: what `scan.l` would refuse becomes [`Kind::Unknown`] or [`Kind::Unterminated`].

use std::ops::Range;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Blanks, tabs, line ends.
    Space,
    /// `-- ...` up to the line's end, or a nested `/* ... */`.
    Comment,
    /// An identifier without quotes, or a keyword.
    Word,
    /// `"..."`.
    Quoted,
    /// `U&"..."`, with its `UESCAPE '.'` where there is one.
    UnicodeQuoted,
    /// Any string constant: `'..'`, `E'..'`, `B'..'`, `X'..'`, `N'..'`, `U&'..'` (with UESCAPE), `$tag$..$tag$`;
    /// one that continues on the next line is one token.
    Text,
    /// A number.
    Number,
    /// `$1`.
    Param,
    /// An operator.
    Operator,
    /// `,` `(` `)` `[` `]` `.` `;` `:` `::` `..` `:=`.
    Punct,
    /// A byte that begins no token.
    Unknown,
    /// A string, identifier or comment without an end: reaches to the end of the text.
    Unterminated,
}

impl Kind {
    /// Blanks or a comment.
    pub fn is_gap(self) -> bool {
        matches!(self, Kind::Space | Kind::Comment)
    }
}

/// One token: its kind and byte range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// What it is.
    pub kind: Kind,
    start: u32,
    end: u32,
}

impl Token {
    /// Offset of its first byte. A statement has millions of tokens at most, in a text that fits one message: 32 bits hold what is kept of them.
    pub fn start(&self) -> usize {
        self.start as usize
    }

    /// Offset behind its last byte.
    pub fn end(&self) -> usize {
        self.end as usize
    }

    /// Its byte range.
    pub fn range(&self) -> Range<usize> {
        self.start()..self.end()
    }

    /// Its bytes in `text`, from which it was lexed.
    pub fn bytes<'a>(&self, text: &'a [u8]) -> &'a [u8] {
        &text[self.range()]
    }

    /// Whether it is exactly this one byte of punctuation.
    pub fn is_punct(&self, text: &[u8], byte: u8) -> bool {
        self.kind == Kind::Punct && self.end - self.start == 1 && text[self.start()] == byte
    }

    /// Whether it is this keyword (given in lowercase), in any case.
    pub fn is_word(&self, text: &[u8], word: &str) -> bool {
        self.kind == Kind::Word && self.bytes(text).eq_ignore_ascii_case(word.as_bytes())
    }
}

/// The tokens of a text, blanks and comments included.
#[derive(Clone, Debug)]
pub struct Tokens<'a> {
    text: &'a [u8],
    at: usize,
    /// Up to here lie only `+` and `-` that were cut off an operator, each a token. Without this a run of them would be
    /// scanned again for each of its bytes.
    signs_end: usize,
}

/// Lexes `text`. Linear in its length; never fails.
pub fn lex(text: &[u8]) -> Tokens<'_> {
    Tokens { text, at: 0, signs_end: 0 }
}

impl Iterator for Tokens<'_> {
    type Item = Token;

    #[inline]
    fn next(&mut self) -> Option<Token> {
        if self.at >= self.text.len() {
            return None;
        }
        let start = self.at;
        let (kind, end) = if start < self.signs_end { (Kind::Operator, start + 1) } else { self.scan(start) };
        self.at = end;
        Some(Token { kind, start: start as u32, end: end as u32 })
    }
}

#[inline]
fn byte(text: &[u8], at: usize) -> u8 {
    // NUL begins and continues no token, and no protocol message can hold one inside a statement.
    text.get(at).copied().unwrap_or(0)
}

/// Blank by scan.l's `space`.
#[inline]
pub(super) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

#[inline]
fn is_word_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

#[inline]
fn is_word_part(byte: u8) -> bool {
    is_word_start(byte) || byte.is_ascii_digit() || byte == b'$'
}

#[inline]
fn is_operator(byte: u8) -> bool {
    matches!(
        byte,
        b'~' | b'!'
            | b'@'
            | b'#'
            | b'^'
            | b'&'
            | b'|'
            | b'`'
            | b'?'
            | b'+'
            | b'-'
            | b'*'
            | b'/'
            | b'%'
            | b'<'
            | b'>'
            | b'='
    )
}

impl Tokens<'_> {
    #[inline]
    fn scan(&mut self, at: usize) -> (Kind, usize) {
        let (kind, end) = scan(self.text, at);
        if kind != Kind::Operator {
            return (kind, end);
        }
        self.signs_end = end;
        (kind, without_signs(self.text, at, end))
    }
}

/// The token that begins at `at`, which lies inside the text; an operator with all signs at its end.
#[inline]
fn scan(text: &[u8], at: usize) -> (Kind, usize) {
    match text[at] {
        byte if is_space(byte) => (Kind::Space, skip_while(text, at + 1, is_space)),
        b'\'' => quoted_text(text, at + 1, false),
        b'"' => quoted_name(text, at + 1, Kind::Quoted),
        b'0'..=b'9' => (Kind::Number, number_end(text, at)),
        b'$' => dollar(text, at),
        b',' | b'(' | b')' | b'[' | b']' | b';' => (Kind::Punct, at + 1),
        b'.' => dot(text, at),
        b':' if matches!(byte(text, at + 1), b':' | b'=') => (Kind::Punct, at + 2),
        b':' => (Kind::Punct, at + 1),
        first if is_word_start(first) => word(text, at, first),
        first if is_operator(first) => operator_or_comment(text, at),
        _ => (Kind::Unknown, at + 1),
    }
}

#[inline]
fn skip_while(text: &[u8], from: usize, test: impl Fn(u8) -> bool) -> usize {
    text[from..].iter().position(|&byte| !test(byte)).map_or(text.len(), |length| from + length)
}

/// A word, or a string or identifier with a letter before its quote.
fn word(text: &[u8], at: usize, first: u8) -> (Kind, usize) {
    match (first.to_ascii_lowercase(), byte(text, at + 1)) {
        (b'e', b'\'') => quoted_text(text, at + 2, true),
        (b'b' | b'x' | b'n', b'\'') => quoted_text(text, at + 2, false),
        (b'u', b'&') if byte(text, at + 2) == b'\'' => with_uescape(text, quoted_text(text, at + 3, false)),
        (b'u', b'&') if byte(text, at + 2) == b'"' => {
            with_uescape(text, quoted_name(text, at + 3, Kind::UnicodeQuoted))
        }
        _ => (Kind::Word, skip_while(text, at + 1, is_word_part)),
    }
}

/// The rest of a string constant whose first quote lies before `at`. With `escapes`, a backslash takes the next byte.
fn quoted_text(text: &[u8], mut at: usize, escapes: bool) -> (Kind, usize) {
    loop {
        let stop =
            if escapes { memchr::memchr2(b'\'', b'\\', &text[at..]) } else { memchr::memchr(b'\'', &text[at..]) };
        let Some(offset) = stop else { return (Kind::Unterminated, text.len()) };
        at += offset + 1;
        if text[at - 1] == b'\\' {
            at += 1;
            if at > text.len() {
                return (Kind::Unterminated, text.len());
            }
        } else if byte(text, at) == b'\'' {
            at += 1;
        } else if let Some(next) = continuation(text, at) {
            at = next;
        } else {
            return (Kind::Text, at);
        }
    }
}

/// scan.l's `quotecontinue`: blanks with at least one line end (`--` comments count as blanks), then a quote. Where the string goes on.
fn continuation(text: &[u8], mut at: usize) -> Option<usize> {
    let mut line_end = false;
    loop {
        match byte(text, at) {
            b'\n' | b'\r' => line_end = true,
            byte if is_space(byte) => {}
            b'-' if byte(text, at + 1) == b'-' => {
                at = skip_while(text, at, |byte| byte != b'\n' && byte != b'\r');
                continue;
            }
            b'\'' if line_end => return Some(at + 1),
            _ => return None,
        }
        at += 1;
    }
}

/// The rest of a quoted identifier whose first quote lies before `at`.
fn quoted_name(text: &[u8], mut at: usize, kind: Kind) -> (Kind, usize) {
    loop {
        let Some(offset) = memchr::memchr(b'"', &text[at..]) else { return (Kind::Unterminated, text.len()) };
        at += offset + 1;
        if byte(text, at) != b'"' {
            return (kind, at);
        }
        at += 1;
    }
}

/// Takes `UESCAPE '.'` along: without it the token cannot be read.
fn with_uescape(text: &[u8], (kind, end): (Kind, usize)) -> (Kind, usize) {
    let word = skip_gap(text, end);
    let word_end = skip_while(text, word, is_word_part);
    if kind == Kind::Unterminated || !text[word..word_end].eq_ignore_ascii_case(b"uescape") {
        return (kind, end);
    }
    let quote = skip_gap(text, word_end);
    if byte(text, quote) != b'\'' {
        return (kind, end);
    }
    match quoted_text(text, quote + 1, false) {
        (Kind::Text, with_escape) => (kind, with_escape),
        _ => (kind, end),
    }
}

/// The first byte from `at` on that is neither blank nor inside a comment.
fn skip_gap(text: &[u8], mut at: usize) -> usize {
    while at < text.len() {
        match scan_gap(text, at) {
            Some(end) => at = end,
            None => break,
        }
    }
    at
}

fn scan_gap(text: &[u8], at: usize) -> Option<usize> {
    match (text[at], byte(text, at + 1)) {
        (first, _) if is_space(first) => Some(at + 1),
        (b'-', b'-') => Some(line_comment_end(text, at)),
        (b'/', b'*') => match block_comment(text, at) {
            (Kind::Comment, end) => Some(end),
            _ => None,
        },
        _ => None,
    }
}

fn line_comment_end(text: &[u8], at: usize) -> usize {
    memchr::memchr2(b'\n', b'\r', &text[at..]).map_or(text.len(), |length| at + length)
}

/// `/* ... */`, nested.
fn block_comment(text: &[u8], at: usize) -> (Kind, usize) {
    let mut depth = 1usize;
    let mut at = at + 2;
    while let Some(offset) = memchr::memchr2(b'*', b'/', &text[at..]) {
        at += offset;
        match (text[at], byte(text, at + 1)) {
            (b'*', b'/') => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return (Kind::Comment, at);
                }
            }
            (b'/', b'*') => {
                depth += 1;
                at += 2;
            }
            _ => at += 1,
        }
    }
    (Kind::Unterminated, text.len())
}

fn dot(text: &[u8], at: usize) -> (Kind, usize) {
    match byte(text, at + 1) {
        b'.' => (Kind::Punct, at + 2),
        b'0'..=b'9' => (Kind::Number, exponent_end(text, digits_end(text, at + 1))),
        _ => (Kind::Punct, at + 1),
    }
}

/// Digits with single underscores between them.
fn digits_end(text: &[u8], at: usize) -> usize {
    radix_end(text, at, |byte| byte.is_ascii_digit())
}

fn radix_end(text: &[u8], mut at: usize, digit: impl Fn(u8) -> bool) -> usize {
    while digit(byte(text, at)) || (byte(text, at) == b'_' && digit(byte(text, at + 1))) {
        at += 1;
    }
    at
}

fn number_end(text: &[u8], at: usize) -> usize {
    if text[at] == b'0' {
        let end = match byte(text, at + 1).to_ascii_lowercase() {
            b'x' => radix_end(text, at + 2, |byte| byte.is_ascii_hexdigit()),
            b'o' => radix_end(text, at + 2, |byte| matches!(byte, b'0'..=b'7')),
            b'b' => radix_end(text, at + 2, |byte| matches!(byte, b'0' | b'1')),
            _ => at,
        };
        if end > at + 2 {
            return end;
        }
    }
    let whole = digits_end(text, at);
    if byte(text, whole) != b'.' || byte(text, whole + 1) == b'.' {
        return exponent_end(text, whole); // `1..2` is 1, then the operator of PL/pgSQL's loops
    }
    let fraction = if byte(text, whole + 1).is_ascii_digit() { digits_end(text, whole + 1) } else { whole + 1 };
    exponent_end(text, fraction)
}

fn exponent_end(text: &[u8], at: usize) -> usize {
    if !byte(text, at).eq_ignore_ascii_case(&b'e') {
        return at;
    }
    let digits = at + 1 + usize::from(matches!(byte(text, at + 1), b'+' | b'-'));
    if byte(text, digits).is_ascii_digit() { digits_end(text, digits) } else { at }
}

/// A parameter, a dollar-quoted string, or a lone `$`.
fn dollar(text: &[u8], at: usize) -> (Kind, usize) {
    let next = byte(text, at + 1);
    if next.is_ascii_digit() {
        return (Kind::Param, skip_while(text, at + 1, |byte| byte.is_ascii_digit()));
    }
    let tag_end = if is_word_start(next) {
        skip_while(text, at + 1, |byte| is_word_start(byte) || byte.is_ascii_digit())
    } else {
        at + 1
    };
    if byte(text, tag_end) != b'$' {
        return (Kind::Unknown, at + 1);
    }
    let tag = &text[at..=tag_end];
    match memchr::memmem::find(&text[tag_end + 1..], tag) {
        Some(offset) => (Kind::Text, tag_end + 1 + offset + tag.len()),
        None => (Kind::Unterminated, text.len()),
    }
}

/// A run of operator characters up to where a comment begins, or that comment.
fn operator_or_comment(text: &[u8], at: usize) -> (Kind, usize) {
    match (text[at], byte(text, at + 1)) {
        (b'-', b'-') => return (Kind::Comment, line_comment_end(text, at)),
        (b'/', b'*') => return block_comment(text, at),
        _ => {}
    }
    let mut end = at + 1;
    while is_operator(byte(text, end)) && !matches!((text[end], byte(text, end + 1)), (b'-', b'-') | (b'/', b'*')) {
        end += 1;
    }
    (Kind::Operator, end)
}

/// Where the operator in `at..end` ends once the signs behind it are cut off: none is where it holds one of the
/// characters that no operator of standard SQL has.
fn without_signs(text: &[u8], at: usize, end: usize) -> usize {
    let special = |byte: &u8| matches!(byte, b'~' | b'!' | b'@' | b'#' | b'^' | b'&' | b'|' | b'`' | b'?' | b'%');
    if !matches!(text[end - 1], b'+' | b'-') || text[at..end].iter().any(special) {
        return end;
    }
    let signs = text[at + 1..end].iter().rev().take_while(|byte| matches!(byte, b'+' | b'-')).count();
    end - signs
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokens that are no gap, as kind and text.
    fn tokens(text: &str) -> Vec<(Kind, &str)> {
        lex(text.as_bytes())
            .filter(|token| !token.kind.is_gap())
            .map(|token| (token.kind, &text[token.range()]))
            .collect()
    }

    #[test]
    fn each_kind_of_token_is_cut_as_in_scan_l() {
        use Kind::*;
        for (text, expected) in [
            ("select é$1", vec![(Word, "select"), (Word, "é$1")]),
            (
                r#""a""b" U&"d\0061" uescape '!' x"#,
                vec![(Quoted, r#""a""b""#), (UnicodeQuoted, r#"U&"d\0061" uescape '!'"#), (Word, "x")],
            ),
            (r"'a\' 'b''c'", vec![(Text, r"'a\'"), (Text, "'b''c'")]),
            (r"E'a\'b' e'\\'", vec![(Text, r"E'a\'b'"), (Text, r"e'\\'")]),
            (
                "b'01'x'ff'n'z' u&'z' UESCAPE '!'",
                vec![(Text, "b'01'"), (Text, "x'ff'"), (Text, "n'z'"), (Text, "u&'z' UESCAPE '!'")],
            ),
            ("'a' -- c\n  'b' 'c'", vec![(Text, "'a' -- c\n  'b'"), (Text, "'c'")]),
            (
                "$$a'$$ $t$ $$ $t$ $1 $ $é1$x$é1$",
                vec![(Text, "$$a'$$"), (Text, "$t$ $$ $t$"), (Param, "$1"), (Unknown, "$"), (Text, "$é1$x$é1$")],
            ),
            (
                "1 1.5 .5e-3 1e5 0x1F 0b101 1_000 1..2 1.",
                vec![
                    (Number, "1"),
                    (Number, "1.5"),
                    (Number, ".5e-3"),
                    (Number, "1e5"),
                    (Number, "0x1F"),
                    (Number, "0b101"),
                    (Number, "1_000"),
                    (Number, "1"),
                    (Punct, ".."),
                    (Number, "2"),
                    (Number, "1."),
                ],
            ),
            (
                "a.b a::int :=x[1:2]",
                vec![
                    (Word, "a"),
                    (Punct, "."),
                    (Word, "b"),
                    (Word, "a"),
                    (Punct, "::"),
                    (Word, "int"),
                    (Punct, ":="),
                    (Word, "x"),
                    (Punct, "["),
                    (Number, "1"),
                    (Punct, ":"),
                    (Number, "2"),
                    (Punct, "]"),
                ],
            ),
            (
                "1=-1 a@-b *- <>+-",
                vec![
                    (Number, "1"),
                    (Operator, "="),
                    (Operator, "-"),
                    (Number, "1"),
                    (Word, "a"),
                    (Operator, "@-"),
                    (Word, "b"),
                    (Operator, "*"),
                    (Operator, "-"),
                    (Operator, "<>"),
                    (Operator, "+"),
                    (Operator, "-"),
                ],
            ),
            (
                "a--b\nc /* /* */ ' */ d -/**/e",
                vec![(Word, "a"), (Word, "c"), (Word, "d"), (Operator, "-"), (Word, "e")],
            ),
            ("'abc", vec![(Unterminated, "'abc")]),
            ("x /* /* */", vec![(Word, "x"), (Unterminated, "/* /* */")]),
            ("$a$ b", vec![(Unterminated, "$a$ b")]),
        ] {
            assert_eq!(tokens(text), expected, "{text}");
        }
    }

    #[test]
    fn a_run_of_signs_takes_linear_time() {
        let text = b"+-".repeat(500_000);
        assert_eq!(lex(&text).count(), 1_000_000);
    }
}
