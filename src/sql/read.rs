//! From a statement's text to its facts.
//!
//! Tokens come first: they give the keywords, the highest parameter and the end. Utility statements need no more
//! (`utility`). For SELECT and DML two parsers read a cleaned copy of the text (`clean`): squawk-syntax gives the facts
//! (`tree`), and where sqlparser reads the statement too it must agree (`check`).

use std::collections::BTreeSet;

use super::check;
use super::clean::clean;
use super::facts::{Facts, Merges, Name, Target, Verb};
use super::lex::{Kind, Token, lex};
use super::name;
use super::tree::{self, Source};
use super::utility::{self, Read};
use super::within;
use super::words::Words;

/// What a statement may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest text that is parsed.
    pub bytes_max: usize,
    /// Most tokens that are parsed, after long lists of literals were shortened.
    pub tokens_max: usize,
    /// Deepest tree that is parsed, by the bound that `depth` computes.
    pub depth_max: usize,
}

impl Default for Limits {
    /// 16 MiB, 100,000 tokens, 5,000 deep: squawk-syntax takes time by the square of the depth for some chains.
    fn default() -> Limits {
        Limits { bytes_max: 16 << 20, tokens_max: 100_000, depth_max: 5_000 }
    }
}

/// Up to this depth a statement is parsed on the caller's own stack.
const OWN_STACK_DEPTH_MAX: usize = 48;
/// Stack for each level of depth: what a build without optimisation was seen to need at worst (13 KiB for sqlparser on
/// `t JOIN t JOIN ... ON a ON a`), doubled and more.
const STACK_BYTES_PER_LEVEL: usize = 32 << 10;
/// Most tokens that are kept at all: 12 bytes each.
const KEPT_TOKENS_MAX: usize = 3_000_000;
/// EXPLAIN of EXPLAIN and the like end here.
const INNER_MAX: usize = 4;

/// The facts of one statement (see [`split`](super::split)). What no reader understands, what two readers take for different statements,
/// what is beyond the limits, and a text of several statements is `Verb::Other`. Never panics.
pub fn read(text: &[u8], limits: Limits) -> Facts {
    read_inner(text, limits, 0)
}

fn read_inner(text: &[u8], limits: Limits, level: usize) -> Facts {
    let tokens = significant(text);
    let bare = bare(text, &tokens);
    if tokens.len() > KEPT_TOKENS_MAX {
        return Facts { parameters: u16::MAX, end: super::end(text), ..bare };
    }
    if tokens.is_empty() {
        return Facts { verb: Verb::Empty, ..bare };
    }
    let broken = tokens.iter().any(|token| matches!(token.kind, Kind::Unknown | Kind::Unterminated));
    let several = tokens.iter().any(|token| token.is_punct(text, b';')) && super::split(text).len() > 1;
    let words = Words::new(text, &tokens);
    if broken || several || level > INNER_MAX {
        return Facts { functions: words.calls(), ..bare };
    }
    match utility::read(words, bare.clone()) {
        None => other(words, bare),
        Some(Read::Whole(facts)) => facts,
        Some(Read::Tree) => {
            let mut facts = query(text, &tokens, bare.clone(), limits).unwrap_or_else(|| other(words, bare));
            if facts.modifying_cte {
                facts.within = within::read(words, &facts, |body| read_inner(&text[body], limits, level + 1));
            }
            facts
        }
        Some(Read::DdlWithQuery(facts)) => match query(text, &tokens, bare, limits) {
            Some(query) => Facts { verb: facts.verb, ..query },
            None => Facts { functions: words.calls(), ..facts },
        },
        Some(Read::Around(facts, range)) => around(facts, range.clone(), read_inner(&text[range], limits, level + 1)),
    }
}

/// The facts of a statement, given those of another of the same shape: only places in the text differ (`end`, and
/// where a statement inside lies).
pub fn place(facts: &Facts, text: &[u8]) -> Facts {
    let tokens = significant(text);
    let mut placed = Facts { end: super::end(text), ..facts.clone() };
    if let Some(inner) = &mut placed.inner
        && let Some(Read::Around(_, range)) = utility::read(Words::new(text, &tokens), bare(text, &tokens))
    {
        **inner = (range.clone(), place(&inner.1, &text[range]));
    }
    let places = if facts.within.is_empty() { None } else { within::places(text) };
    for (within, moved) in placed.within.iter_mut().zip(places.into_iter().flatten()) {
        within.facts = place(&within.facts, &text[moved.body.clone()]);
        within.place = moved;
    }
    placed
}

/// The tokens without gaps and without `;` at the ends. Of a text with more than are kept one too many.
fn significant(text: &[u8]) -> Vec<Token> {
    let mut tokens: Vec<Token> = lex(text).filter(|token| !token.kind.is_gap()).take(KEPT_TOKENS_MAX + 1).collect();
    if tokens.len() > KEPT_TOKENS_MAX {
        return tokens;
    }
    while tokens.last().is_some_and(|token| token.is_punct(text, b';')) {
        tokens.pop();
    }
    let leading = tokens.iter().take_while(|token| token.is_punct(text, b';')).count();
    tokens.drain(..leading);
    tokens
}

/// What is known before anything is read.
fn bare(text: &[u8], tokens: &[Token]) -> Facts {
    Facts {
        verb: Verb::Other,
        targets: Vec::new(),
        reads: Vec::new(),
        functions: Vec::new(),
        returning: false,
        on_conflict: None,
        conflict_columns: Vec::new(),
        set_to_excluded: Vec::new(),
        merges: Merges::default(),
        modifying_cte: false,
        within: Vec::new(),
        locking: false,
        current_of: false,
        columns: None,
        parameters: parameters(text, tokens),
        end: tokens.last().map_or(0, |token| token.end()),
        inner: None,
    }
}

/// The statement around another takes on what the inner one reads and calls.
fn around(facts: Facts, range: std::ops::Range<usize>, inner: Facts) -> Facts {
    let writes = matches!(facts.verb, Verb::CopyTo | Verb::Declare { .. }) && inner.verb != Verb::Select;
    Facts {
        verb: if writes { Verb::Other } else { facts.verb.clone() },
        targets: if writes { inner.targets.clone() } else { Vec::new() },
        reads: inner.reads.clone(),
        functions: inner.functions.clone(),
        locking: inner.locking,
        modifying_cte: inner.modifying_cte,
        inner: Some(Box::new((range, inner))),
        ..facts
    }
}

/// What tokens alone tell: each name that could be a call, and the table that a plain write names.
fn other(words: Words<'_>, bare: Facts) -> Facts {
    let target = |table: Name| Target { row: name::spell(&table.name), table, assigned: Vec::new() };
    Facts { functions: words.calls(), targets: utility::first_target(words).map(target).into_iter().collect(), ..bare }
}

fn parameters(text: &[u8], tokens: &[Token]) -> u16 {
    let numbers = tokens.iter().filter(|token| token.kind == Kind::Param).map(|token| {
        // More digits than fit say as much as the most that fit.
        std::str::from_utf8(&token.bytes(text)[1..]).map_or(u16::MAX, |digits| digits.parse().unwrap_or(u16::MAX))
    });
    numbers.max().unwrap_or(0)
}

/// SELECT and DML. None where nothing sure is known.
fn query(text: &[u8], tokens: &[Token], bare: Facts, limits: Limits) -> Option<Facts> {
    let depth = depth(text, tokens);
    if text.len() > limits.bytes_max || depth.tree > limits.depth_max {
        return None;
    }
    let clean = clean(text, tokens)?;
    if clean.tokens > limits.tokens_max {
        return None;
    }
    let both = move || {
        let facts = tree::read(&clean.text, Source { text, tokens }, bare)?;
        // A decoded name is not in the cleaned text.
        let decoded = tokens.iter().any(|token| token.kind == Kind::UnicodeQuoted);
        let second = if decoded { None } else { check::read(&clean.compact, depth.nesting) };
        match second {
            Some(reading) if !check::agrees(&facts, &reading) => None,
            Some(reading) => Some(with_functions(facts, reading.functions)),
            None => Some(facts),
        }
    };
    on_enough_stack(depth.tree, both)
}

/// Runs a parser over a text with these tokens; None where that is too deep, or where it fails.
pub(super) fn apart<T: Send>(
    text: &[u8],
    tokens: &[Token],
    limits: Limits,
    work: impl FnOnce() -> Option<T> + Send,
) -> Option<T> {
    let depth = depth(text, tokens).tree;
    if depth > limits.depth_max { None } else { on_enough_stack(depth, work) }
}

fn on_enough_stack<T: Send>(depth: usize, work: impl FnOnce() -> Option<T> + Send) -> Option<T> {
    if depth <= OWN_STACK_DEPTH_MAX {
        // A parser that fails an assertion has not understood the statement.
        return std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).ok().flatten();
    }
    on_large_stack(STACK_BYTES_PER_LEVEL * (depth + OWN_STACK_DEPTH_MAX), work)
}

/// A function that only one of the readers found counts: one more can only make the plan more careful.
fn with_functions(mut facts: Facts, functions: BTreeSet<Name>) -> Facts {
    let (known, found): (BTreeSet<Name>, _) = (facts.functions.into_iter().collect(), functions);
    // sqlparser takes `coalesce` and the like for functions, and keyword forms for calls without their schema.
    let new = found.into_iter().filter(|name| !(name.schema.is_none() && name::is_keyword(&name.name)));
    facts.functions = known.into_iter().chain(new).collect::<BTreeSet<Name>>().into_iter().collect();
    facts
}

/// Runs `work` on a thread with that much stack (the system gives pages only as they are touched). None if it panics or
/// no thread can be had.
fn on_large_stack<T: Send>(bytes: usize, work: impl FnOnce() -> Option<T> + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("parse".to_owned()).stack_size(bytes).spawn_scoped(scope, work);
        thread.ok()?.join().ok().flatten()
    })
}

/// Bounds of a statement's tree, from its tokens.
struct Depth {
    /// Of parentheses and brackets.
    nesting: usize,
    /// Of the tree: the tokens since the last comma, summed over the open parentheses. An expression cannot be deeper than
    /// it has tokens, and lists do not nest. Only a chain of UNIONs goes on behind a comma.
    tree: usize,
}

/// What one level of parentheses adds to the depth.
#[derive(Clone, Copy, Default)]
struct Level {
    since_comma: usize,
    set_operations: usize,
}

/// Nobody parses what is deeper, whatever the limits: how much deeper it is need not be counted, which takes memory.
const COUNTED_MAX: usize = 100_000;

fn depth(text: &[u8], tokens: &[Token]) -> Depth {
    let mut bound = Depth { nesting: 0, tree: 0 };
    let mut outer: Vec<Level> = Vec::new();
    let mut level = Level::default();
    // Of `outer`.
    let mut below = 0;
    for token in tokens {
        let byte = if token.kind == Kind::Punct { text[token.start()] } else { 0 };
        match byte {
            b'(' | b'[' => {
                level.since_comma += 1;
                below += level.since_comma + level.set_operations;
                outer.push(std::mem::take(&mut level));
            }
            b')' | b']' => {
                level = outer.pop().unwrap_or_default();
                below -= level.since_comma + level.set_operations;
            }
            b',' => level.since_comma = 0,
            _ if ["union", "intersect", "except"].iter().any(|word| token.is_word(text, word)) => {
                level.set_operations += 1
            }
            _ => level.since_comma += 1,
        }
        bound.tree = bound.tree.max(below + level.since_comma + level.set_operations);
        bound.nesting = bound.nesting.max(outer.len());
        if bound.tree > COUNTED_MAX {
            break;
        }
    }
    bound
}

#[cfg(test)]
mod tests {
    use super::*;

    fn depth_of(text: &str) -> (usize, usize) {
        let tokens: Vec<Token> = lex(text.as_bytes()).filter(|token| !token.kind.is_gap()).collect();
        let depth = depth(text.as_bytes(), &tokens);
        (depth.nesting, depth.tree)
    }

    #[test]
    fn depth_counts_chains_and_not_lists() {
        assert_eq!(depth_of("((a))"), (2, 3));
        assert_eq!(depth_of("a, b, c"), (0, 1));
        assert_eq!(depth_of("f(a or b or c), (d)"), (1, 7));
        assert_eq!(depth_of("select 1, 1 union select 2, 2 union select 3, 3"), (0, 5));
        assert_eq!(depth_of(")) a )"), (0, 1));
    }
}
