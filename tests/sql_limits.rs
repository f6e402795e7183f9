//! Statements made to break a parser: bounded time, no overflow of the stack (which would end the process).

use std::time::{Duration, Instant};

use crossfade::sql::facts::{Facts, Verb};
use crossfade::sql::{self, Limits};

/// Generous: a build without optimisation on a busy machine.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Read on a stack as small as a runtime's worker has.
fn read(text: String) -> Facts {
    let start = Instant::now();
    let thread = std::thread::Builder::new().stack_size(2 << 20);
    let facts = thread.spawn(move || sql::read(text.as_bytes(), Limits::default())).unwrap().join().unwrap();
    assert!(start.elapsed() < TIME_MAX, "took {:?}", start.elapsed());
    facts
}

#[test]
fn what_is_too_deep_is_other_and_keeps_what_tokens_tell() {
    let chain = format!("update a.t set b = f($7) where {}", vec!["a = 1"; 100_000].join(" or "));
    let facts = read(chain.clone());
    assert_eq!(facts.verb, Verb::Other);
    assert_eq!(facts.end, chain.len());
    assert_eq!(facts.parameters, 7);
    assert_eq!(facts.targets[0].table.name, "t");
    assert_eq!(facts.functions[0].name, "f");

    assert_eq!(read(format!("select {}1{}", "(".repeat(10_000), ")".repeat(10_000))).verb, Verb::Other);
    assert_eq!(read("(".repeat(1_000_000)).verb, Verb::Other);
    assert_eq!(read(format!("select {}", "f(".repeat(1_000_000))).verb, Verb::Other);
}

#[test]
fn long_lists_are_read_in_full() {
    let list: Vec<String> = (0..1_200_000).map(|number| number.to_string()).collect();
    let text = format!("select * from t where a in ({}) and b = g()", list.join(", "));
    assert!(text.len() > 9_000_000);
    let facts = read(text);
    assert_eq!((facts.verb, facts.reads.len(), facts.functions.len()), (Verb::Select, 1, 1));

    let facts = read("a ".repeat(4_000_000));
    assert_eq!((facts.verb, facts.end), (Verb::Other, 7_999_999));

    let rows = vec!["('a', 1, null, -1.5, default)"; 100_000].join(",\n");
    let facts = read(format!("insert into t (a, b, c, d, e) values {rows} returning a"));
    assert_eq!((facts.verb, facts.returning), (Verb::Insert, true));

    let rows: Vec<String> = (0..3_000).map(|row| format!("(${}, now(), lower('x'))", row + 1)).collect();
    let facts = read(format!("insert into t values {}", rows.join(",")));
    assert_eq!((facts.verb, facts.functions.len(), facts.parameters), (Verb::Insert, 2, 3_000));
}

/// Each form in which depth grows, as deep as the limit lets it be parsed and a little deeper.
#[test]
fn no_form_of_depth_overflows_the_stack() {
    let forms: [(&str, &str, &str, &str); 22] = [
        ("select a", " or a", "", ""),
        ("select a", "+a", "", ""),
        ("select ", "(", "1", ")"),
        ("select ", "f(", "1", ")"),
        ("select ", "not ", "a", ""),
        ("select ", "- ", "a", ""),
        ("select a", "::int", "", ""),
        ("select a", "[1]", "", ""),
        ("select a", ".a", "", ""),
        ("select * from ", "(", "t", ")"),
        ("select * from ", "(select * from ", "t", ") x"),
        ("select ", "case when a then ", "1", " end"),
        ("select 1", " union select 1, 1", "", ""),
        ("select * from t", " join t on a", "", ""),
        ("select * from ", "t join ", "t", " on a"),
        ("select array", "[", "1", "]"),
        ("select ", "a between b and ", "a", ""),
        ("select ", "exists(select ", "1", ")"),
        ("", "with a as (", "select 1", ") select 1"),
        ("select ", "position(", "1", " in a)"),
        ("select a", " is null", "", ""),
        ("delete from t where a", " and a in (select 1)", "", ""),
    ];
    for (start, open, middle, close) in forms {
        for times in [12, 100, 400, 700] {
            let text = format!("{start}{}{middle}{}", open.repeat(times), close.repeat(times));
            let shown = text.chars().take(60).collect::<String>();
            let began = Instant::now();
            let facts = read(text);
            assert!(matches!(facts.verb, Verb::Select | Verb::Delete | Verb::Other), "{shown}");
            if times == 12 && !close.contains("x") && open != "(" {
                assert_ne!(facts.verb, Verb::Other, "{shown}");
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{shown} took {:?}", began.elapsed());
        }
    }
}
