//! What holds for every text.

use crossfade::sql::lex::{Kind, lex};
use crossfade::sql::{self, Limits};
use proptest::prelude::*;

/// Pieces of SQL that make texts which are nearly statements.
fn pieces() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop::sample::select(vec![
        "select",
        "insert into",
        "update",
        "delete from",
        "merge into",
        "with",
        "as",
        "from",
        "where",
        "set",
        "values",
        "returning",
        "on conflict",
        "do update",
        "union",
        "begin",
        "commit",
        "end",
        "create function",
        "atomic",
        "case",
        "explain",
        "copy",
        "prepare",
        "t",
        "a.b",
        "\"X y\"",
        "U&\"\\0061\"",
        "uescape '!'",
        "f(",
        "(",
        ")",
        "[",
        "]",
        ",",
        ";",
        ".",
        "::",
        "*",
        "=",
        "-",
        "--",
        "/*",
        "*/",
        "'",
        "''",
        "'x'",
        "e'\\''",
        "$$",
        "$a$",
        "$1",
        "$99999999",
        "1",
        "1.5e3",
        "0x",
        "\n",
        " ",
        "\t",
        "é",
        "\\",
        "$",
        "only",
        "recursive",
    ]);
    prop::collection::vec((piece, any::<bool>()), 0..40).prop_map(|pieces| {
        let mut text = String::new();
        for (piece, space) in pieces {
            text.push_str(piece);
            if space {
                text.push(' ');
            }
        }
        text.into_bytes()
    })
}

fn texts() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![pieces(), prop::collection::vec(any::<u8>(), 0..80)]
}

fn encodings() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["UTF8", "SJIS", "SHIFT_JIS_2004", "BIG5", "GBK", "UHC", "GB18030", "JOHAB", "LATIN1"])
}

/// `PROPTEST_CASES` where it is set: `make fuzz`.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2_000)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn masks_keep_offsets_and_what_is_read_either_way(text in texts(), encoding in encodings()) {
        let masked = sql::mask_characters(&text, encoding);
        prop_assert_eq!(masked.len(), text.len());
        prop_assert_eq!(sql::mask_escapes(&masked).len(), text.len());
        // A mask makes nothing more to be masked, and ASCII without a backslash needs none.
        prop_assert_eq!(&sql::mask_characters(&masked, "UTF8")[..], &masked[..]);
        if text.is_ascii() {
            prop_assert_eq!(&masked[..], &text[..]);
        }
        if !masked.contains(&b'\\') {
            prop_assert_eq!(&sql::mask_escapes(&masked)[..], &masked[..]);
        }
        let _ = sql::split(&sql::mask_escapes(&masked));
    }

    #[test]
    fn tokens_cover_the_text_without_a_gap(text in texts()) {
        let mut at = 0;
        for token in lex(&text) {
            prop_assert_eq!(token.start(), at);
            prop_assert!(token.end() > token.start());
            at = token.end();
        }
        prop_assert_eq!(at, text.len());
    }

    #[test]
    fn each_token_but_the_last_stands_alone(text in texts()) {
        // A token that is lexed again by itself is the same token (operators and numbers end where something else begins).
        for token in lex(&text).filter(|token| token.kind != Kind::Unterminated) {
            let again: Vec<_> = lex(token.bytes(&text)).map(|token| token.kind).collect();
            prop_assert_eq!(again, vec![token.kind]);
        }
    }

    #[test]
    fn reading_never_panics_and_says_where_the_text_ends(text in texts()) {
        let facts = sql::read(&text, Limits::default());
        prop_assert!(facts.end <= text.len());
        prop_assert_eq!(facts.end, sql::shape(&text).end);
        prop_assert_eq!(facts.end, sql::end(&text));
    }

    #[test]
    fn a_splice_at_the_end_keeps_the_rest(text in texts()) {
        let significant = |text: &[u8]| -> Vec<(Kind, Vec<u8>)> {
            lex(text).filter(|token| !token.kind.is_gap()).map(|token| (token.kind, token.bytes(text).to_vec())).collect()
        };
        if lex(&text).any(|token| token.kind == Kind::Unterminated) {
            return Ok(()); // it has no end to splice at
        }
        let end = sql::end(&text);
        let spliced = [&text[..end], b" RETURNING x", &text[end..]].concat();
        let added = significant(&spliced);
        let mut expected = significant(&text[..end]);
        expected.extend(significant(b"RETURNING x"));
        expected.extend(significant(&text[end..]));
        prop_assert_eq!(added, expected);
        prop_assert!(significant(&text[end..]).iter().all(|(_, bytes)| bytes == b";"));
    }

    #[test]
    fn statements_of_a_text_lie_in_order_and_hold_its_tokens(text in texts()) {
        let mut at = 0;
        for statement in sql::split(&text) {
            prop_assert!(statement.range.start >= at && statement.end > statement.range.start && statement.end <= statement.range.end);
            prop_assert_eq!(statement.end - statement.range.start, sql::end(&text[statement.range.clone()]));
            at = statement.range.end;
        }
    }

    #[test]
    fn a_shape_knows_no_literal(number in 0u32..1_000_000, text in "[a-z'\\\\]{0,9}") {
        let literal = format!("'{}'", text.replace('\'', "''"));
        let statement = format!("update t set a = {number}, b = {literal} where c = -{number}.5");
        let (one, other) = (sql::shape(statement.as_bytes()), sql::shape(b"update t set a = 1, b = '' where c = -1.5"));
        prop_assert_eq!(one.text, other.text);
        prop_assert_eq!(one.fingerprint, other.fingerprint);
    }
}
