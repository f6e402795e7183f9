//! Statements that need no tree: told by their keywords. What does not fit its grammar exactly where that decides about
//! transactions is no such statement: PostgreSQL would refuse it, and the session must not believe that it ran.

use std::ops::Range;

use super::facts::{Facts, Name, Target, Verb};
use super::lex::Kind;
use super::name;
use super::words::Words;

/// What the keywords say of a statement.
pub enum Read {
    /// All there is to know.
    Whole(Facts),
    /// The statement whose bytes these are lies inside; the facts are those of the statement around it.
    Around(Facts, Range<usize>),
    /// SELECT, DML, SELECT INTO: needs a tree.
    Tree,
    /// CREATE TABLE AS: its query's functions run.
    DdlWithQuery(Facts),
}

/// Reads by keywords. `bare` are facts with `parameters` and `end` set. None: the statement fits no grammar known here.
pub fn read(words: Words<'_>, bare: Facts) -> Option<Read> {
    let mut words = words;
    let first = words.tokens.first()?;
    if first.is_punct(words.text, b'(') {
        return Some(Read::Tree);
    }
    let keyword = std::str::from_utf8(first.bytes(words.text)).ok()?.to_ascii_lowercase();
    words.at = 1;
    let verb = match keyword.as_str() {
        "select" | "values" | "table" | "with" | "insert" | "update" | "delete" | "merge" => return Some(Read::Tree),
        "explain" => return explain(words, bare),
        "prepare" => return prepare(words, bare),
        "declare" => return declare(words, bare),
        "copy" => return copy(words, bare),
        "truncate" => return truncate(words, bare).map(Read::Whole),
        "lock" => return lock(words, bare).map(Read::Whole),
        "create" => return Some(create(words, bare)),
        "call" => Verb::Call,
        "execute" => Verb::Execute(words.ident()?),
        "begin" | "start" | "commit" | "end" | "rollback" | "abort" | "savepoint" | "release" => {
            transaction(words, &keyword)?
        }
        "set" | "reset" | "show" | "discard" | "deallocate" => setting(words, &keyword)?,
        "fetch" | "move" | "close" => Verb::Cursor,
        "listen" | "unlisten" | "notify" => Verb::Notify,
        "do" => Verb::Do,
        "vacuum" | "analyze" | "analyse" | "checkpoint" | "cluster" | "load" => Verb::Maintenance,
        "alter" | "drop" | "grant" | "revoke" | "comment" | "refresh" | "reindex" | "security" | "import"
        | "reassign" => Verb::Ddl { temporary: false },
        _ => return None,
    };
    // The arguments of EXECUTE and CALL, and the procedure itself.
    let functions = if matches!(verb, Verb::Execute(_) | Verb::Call) { words.calls() } else { Vec::new() };
    Some(Read::Whole(Facts { verb, functions, ..bare }))
}

fn transaction(mut words: Words<'_>, keyword: &str) -> Option<Verb> {
    let verb = match keyword {
        "savepoint" => Verb::Savepoint(words.ident()?),
        "release" => {
            if words.left() > 1 && !words.eat("savepoint") {
                return None;
            }
            Verb::Release(words.ident()?)
        }
        "start" if !words.eat("transaction") => return None,
        "begin" | "start" => {
            if keyword == "begin" {
                words.eat_any(&["work", "transaction"]);
            }
            let bare = keyword == "begin" && words.is_done();
            Verb::Begin { read_only: transaction_modes(&mut words)?, bare }
        }
        _ => end_of_transaction(&mut words, keyword)?,
    };
    words.is_done().then_some(verb)
}

fn end_of_transaction(words: &mut Words<'_>, keyword: &str) -> Option<Verb> {
    let commits = matches!(keyword, "commit" | "end");
    if matches!(keyword, "commit" | "rollback") && words.eat("prepared") {
        let gid = words.is_kind(Kind::Text);
        words.at += 1;
        return gid.then_some(if commits { Verb::CommitPrepared } else { Verb::RollbackPrepared });
    }
    words.eat_any(&["work", "transaction"]);
    if keyword == "rollback" && words.eat("to") {
        if words.left() > 1 && !words.eat("savepoint") {
            return None;
        }
        return Some(Verb::RollbackTo(words.ident()?));
    }
    let chain = words.eat_all(&["and", "chain"]);
    if !chain {
        words.eat_all(&["and", "no", "chain"]);
    }
    Some(if commits { Verb::Commit { chain } } else { Verb::Rollback { chain } })
}

/// `READ ONLY, ISOLATION LEVEL ...`: whether it says READ ONLY or READ WRITE (the last one counts). None: no such list.
fn transaction_modes(words: &mut Words<'_>) -> Option<Option<bool>> {
    let mut read_only = None;
    while !words.is_done() {
        if words.eat_all(&["read", "only"]) {
            read_only = Some(true);
        } else if words.eat_all(&["read", "write"]) {
            read_only = Some(false);
        } else if words.eat_all(&["isolation", "level"]) {
            let levels: [&[&str]; 4] =
                [&["serializable"], &["repeatable", "read"], &["read", "committed"], &["read", "uncommitted"]];
            if !levels.iter().any(|level| words.eat_all(level)) {
                return None;
            }
        } else {
            words.eat("not");
            if !words.eat("deferrable") {
                return None;
            }
        }
        if words.eat_punct(b',') && words.is_done() {
            return None;
        }
    }
    Some(read_only)
}

fn setting(mut words: Words<'_>, keyword: &str) -> Option<Verb> {
    match keyword {
        "set" => set(words),
        "reset" => reset(words),
        "show" => Some(Verb::Show),
        "discard" => {
            let kinds = [
                ("all", "all"),
                ("plans", "plans"),
                ("temp", "temp"),
                ("temporary", "temp"),
                ("sequences", "sequences"),
            ];
            let (_, kind) = kinds.into_iter().find(|(word, _)| words.eat(word))?;
            words.is_done().then(|| Verb::Discard(kind.to_owned()))
        }
        _ => {
            if words.left() > 1 && !words.eat("prepare") {
                return None;
            }
            let all = words.is("all");
            let name = words.ident()?;
            words.is_done().then_some(Verb::Deallocate(if all { None } else { Some(name) }))
        }
    }
}

fn set(mut words: Words<'_>) -> Option<Verb> {
    let whole = words;
    if words.is("constraints") || words.eat_all(&["session", "characteristics"]) {
        return Some(Verb::SetTransaction);
    }
    let local = words.eat("local");
    if !local && words.is("session") && !whole.next_is_assignment() {
        // SET SESSION AUTHORIZATION is a parameter of its own, else SESSION says how long.
        let mut next = words;
        next.eat("session");
        if !next.is("authorization") {
            words = next;
        }
    }
    let mut next = words;
    if next.eat("transaction") && !words.next_is_assignment() {
        return Some(Verb::SetTransaction);
    }
    let fixed: [(&[&str], &str); 6] = [
        (&["time", "zone"], "timezone"),
        (&["session", "authorization"], "session_authorization"),
        (&["xml", "option"], "xmloption"),
        (&["names"], "client_encoding"),
        (&["schema"], "search_path"),
        (&["role"], "role"),
    ];
    if !words.next_is_assignment()
        && let Some((_, name)) = fixed.into_iter().find(|(said, _)| words.eat_all(said))
    {
        return Some(Verb::Set { name: name.to_owned(), local });
    }
    let name = words.parts()?.join(".").to_ascii_lowercase();
    (words.eat("to") || words.tokens.get(words.at)?.bytes(words.text) == b"=").then_some(Verb::Set { name, local })
}

fn reset(mut words: Words<'_>) -> Option<Verb> {
    let fixed: [(&[&str], &str); 3] = [
        (&["time", "zone"], "timezone"),
        (&["session", "authorization"], "session_authorization"),
        (&["transaction", "isolation", "level"], "transaction_isolation"),
    ];
    if let Some((_, name)) = fixed.into_iter().find(|(said, _)| words.eat_all(said)) {
        return words.is_done().then(|| Verb::Reset(Some(name.to_owned())));
    }
    let all = words.is("all");
    let name = words.parts()?.join(".").to_ascii_lowercase();
    words.is_done().then_some(Verb::Reset(if all { None } else { Some(name) }))
}

fn explain(mut words: Words<'_>, bare: Facts) -> Option<Read> {
    let mut analyze = false;
    let mut options = words;
    options.at += 1;
    if words.is_punct(b'(')
        && !options.is_punct(b'(')
        && !["select", "values", "table", "with"].iter().any(|word| options.is(word))
    {
        let end = {
            let mut end = words;
            end.skip_parens()?;
            end.at
        };
        while options.at < end {
            let is_analyze = options.eat_any(&["analyze", "analyse"]);
            // Any value but these may switch it on: a literal's value is not in the shape, so it cannot be looked at.
            analyze |= is_analyze && !options.is("false") && !options.is("off");
            while options.at < end && !options.eat_punct(b',') {
                options.at += 1;
            }
        }
        words.at = end;
    } else {
        analyze = words.eat_any(&["analyze", "analyse"]);
        words.eat("verbose");
    }
    let inner = words.rest()?;
    Some(Read::Around(Facts { verb: Verb::Explain { analyze }, ..bare }, inner))
}

fn prepare(mut words: Words<'_>, bare: Facts) -> Option<Read> {
    if words.is("transaction") && words.left() == 2 {
        words.at += 1;
        let verb = words.is_kind(Kind::Text).then_some(Verb::PrepareTransaction)?;
        return Some(Read::Whole(Facts { verb, ..bare }));
    }
    let name = words.ident()?;
    if words.is_punct(b'(') {
        words.skip_parens()?;
    }
    if !words.eat("as") {
        return None;
    }
    let inner = words.rest()?;
    Some(Read::Around(Facts { verb: Verb::Prepare(name), ..bare }, inner))
}

fn declare(mut words: Words<'_>, bare: Facts) -> Option<Read> {
    let name = words.ident()?;
    while words.eat_any(&["binary", "insensitive", "asensitive", "no", "scroll"]) {}
    if !words.eat("cursor") {
        return None;
    }
    let hold = words.eat_all(&["with", "hold"]);
    if !hold {
        words.eat_all(&["without", "hold"]);
    }
    if !words.eat("for") {
        return None;
    }
    let inner = words.rest()?;
    Some(Read::Around(Facts { verb: Verb::Declare { name, hold }, ..bare }, inner))
}

fn truncate(mut words: Words<'_>, bare: Facts) -> Option<Facts> {
    words.eat("table");
    let targets = words.relations()?.into_iter().map(whole_table).collect();
    let restart_identity = words.eat_all(&["restart", "identity"]);
    if !restart_identity {
        words.eat_all(&["continue", "identity"]);
    }
    let cascade = words.eat("cascade");
    if !cascade {
        words.eat("restrict");
    }
    words.is_done().then_some(Facts { verb: Verb::Truncate { restart_identity, cascade }, targets, ..bare })
}

fn whole_table(table: Name) -> Target {
    Target { row: name::spell(&table.name), table, assigned: Vec::new() }
}

fn lock(mut words: Words<'_>, bare: Facts) -> Option<Facts> {
    words.eat("table");
    let mut reads = words.relations()?;
    reads.sort();
    reads.dedup();
    Some(Facts { verb: Verb::Lock, reads, ..bare })
}

fn copy(mut words: Words<'_>, bare: Facts) -> Option<Read> {
    if words.is_punct(b'(') {
        let open = words.at;
        words.skip_parens()?;
        let inner = words.tokens.get(open + 1)?.start()..words.tokens[words.at - 2].end();
        let to = words.eat("to");
        return to.then_some(Read::Around(Facts { verb: Verb::CopyTo, ..bare }, inner));
    }
    words.eat("binary");
    let table = words.qualified()?;
    let mut columns = None;
    if words.eat_punct(b'(') {
        let listed = columns.insert(Vec::new());
        while !words.eat_punct(b')') {
            listed.push(words.ident()?);
            words.eat_punct(b',');
        }
    }
    let from = words.eat("from");
    if !from && !words.eat("to") {
        return None;
    }
    // COPY ... FROM STDOUT is accepted too, and means the client.
    let client = words.eat_any(&["stdin", "stdout"]);
    let functions = if from { words.calls_behind("where") } else { Vec::new() };
    Some(Read::Whole(match (from, client) {
        (true, true) => {
            Facts { verb: Verb::CopyFromStdin, targets: vec![whole_table(table)], columns, functions, ..bare }
        }
        (true, false) => {
            Facts { verb: Verb::CopyFromServer, targets: vec![whole_table(table)], columns, functions, ..bare }
        }
        (false, _) => Facts { verb: Verb::CopyTo, reads: vec![table], columns, ..bare },
    }))
}

fn create(mut words: Words<'_>, bare: Facts) -> Read {
    words.eat_all(&["or", "replace"]);
    words.eat_any(&["global", "local"]);
    let temporary = words.eat_any(&["temp", "temporary"]);
    words.eat("unlogged");
    let table = words.is("table");
    let facts = Facts { verb: Verb::Ddl { temporary }, ..bare };
    let queries = ["select", "with", "values", "execute"];
    let mut behind = words;
    while table && !behind.is_done() {
        if behind.eat("as")
            && (queries.iter().any(|query| behind.is(query)) || behind.is("table") || behind.is_punct(b'('))
        {
            return Read::DdlWithQuery(facts);
        }
        behind.at += 1;
    }
    Read::Whole(facts)
}

/// The table that a text names as its target where no tree is to be had: INSERT INTO, UPDATE and DELETE FROM say it
/// before anything that could be misread.
pub fn first_target(mut words: Words<'_>) -> Option<Name> {
    let starts: [&[&str]; 4] = [&["insert", "into"], &["update"], &["delete", "from"], &["merge", "into"]];
    starts.iter().any(|start| words.eat_all(start)).then(|| words.relation())?
}
