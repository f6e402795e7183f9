//! What a statement needs of rows that only old has, where new is the authority and a table of its is lazy. Either the names of such tables give way to
//! merged views, or the rows that it may write or lock are brought over before it; what fits neither is refused. Pure.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::point::Point;
use super::weave::{Renamed, Splice};
use super::{Effect, Plan};
use crate::catalog::{Behind, Catalog, Resolution, Table, quote};
use crate::phase::Side;
use crate::sql::facts::{Facts, Name, OnConflict, Verb};
use crate::sql::lex::{Kind, Token, lex};
use crate::sql::{self, Limits, Naming, Relation, Relations, name};

/// What is done about rows that only old has.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Lazy {
    /// Nothing: all that the statement needs is on the authority.
    #[default]
    Whole,
    /// It reads merged views in place of the tables.
    Merged(Arc<Merged>),
    /// The rows that it may write or lock are brought over before it.
    Brings(Arc<Brings>),
    /// It cannot be done right: refused, for this reason (`refused_because` says more).
    Refused(&'static str),
}

/// A statement over merged views.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// The names.
    pub splice: Splice,
    /// Runs before it, in its transaction.
    pub touch: String,
    /// It may be answered by either side instead, outside a block.
    pub point: Option<Point>,
}

/// A statement before which rows are brought over.
#[derive(Clone, Debug, PartialEq)]
pub struct Brings {
    /// The table.
    pub table: Arc<Table>,
    /// Runs before all else, in its transaction.
    pub touch: String,
    /// Which rows.
    pub which: Which,
}

/// Which rows a statement may write or lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that meet its condition, in which the table is called so.
    Condition(String),
    /// Those with the keys of its VALUES, whose columns are these (folded).
    Rows(Vec<String>),
}

/// Columns that a view does not have.
const OF_TABLES: &[&str] = &["cmax", "cmin", "ctid", "tableoid", "xmax", "xmin"];
/// Functions that give the same to both statements of one transaction.
const OF_TRANSACTION: &[&str] = &["now", "transaction_timestamp", "current_setting"];

/// The verdict on a statement of these facts and this plan, where `side` is the authority.
pub fn lazy(text: &[u8], facts: &Facts, plan: &Plan, catalog: &Catalog, side: Side) -> Lazy {
    match (&catalog.behind, side) {
        (Some(behind), Side::New) => {
            let view = View { text, facts, plan, catalog, behind };
            view.decide().unwrap_or_else(Lazy::Refused)
        }
        _ => Lazy::Whole,
    }
}

/// The plan, with the names that the statement is to have.
pub fn with_names(plan: Plan, lazy: &Lazy) -> Plan {
    match (plan, lazy) {
        (Plan::Capture(mut capture), Lazy::Merged(merged)) => {
            Arc::make_mut(&mut capture).splice.names = merged.splice.names.clone();
            Plan::Capture(capture)
        }
        (plan, _) => plan,
    }
}

struct View<'a> {
    text: &'a [u8],
    facts: &'a Facts,
    plan: &'a Plan,
    catalog: &'a Catalog,
    behind: &'a Behind,
}

type Verdict = Result<Lazy, &'static str>;

impl View<'_> {
    fn decide(&self) -> Verdict {
        let executes = |facts: &Facts| matches!(facts.verb, Verb::Execute(_));
        if executes(self.facts) || self.facts.inner.as_ref().is_some_and(|inner| executes(&inner.1)) {
            return Err("prepare");
        }
        let words = self.words();
        let lazy: HashSet<&str> =
            self.catalog.tables.values().filter(|table| table.lazy).map(|table| table.name.new.as_str()).collect();
        let behind = |name: &Name| self.behind.names.contains(&name.name);
        let (facts, inner) = (self.facts, self.facts.inner.as_ref().map(|inner| &inner.1));
        let all = || [Some(facts), inner].into_iter().flatten();
        let unread = matches!(facts.verb, Verb::Call | Verb::Do | Verb::Other);
        if all().any(|facts| facts.functions.iter().chain(&facts.reads).any(behind))
            || unread && words.iter().any(|word| self.behind.names.contains(word) || word == "execute")
        {
            return Err("behind");
        }
        let triggered =
            |facts: &Facts| facts.targets.iter().any(|target| self.behind.triggered.contains(&target.table.name));
        if all().any(triggered) {
            return Err("trigger");
        }
        if !words.iter().any(|word| lazy.contains(word.as_str())) {
            return Ok(Lazy::Whole);
        }
        match &facts.verb {
            Verb::Select if facts.locking => self.locking(),
            Verb::Select => self.merged(0..self.text.len(), &words),
            Verb::Insert | Verb::Update | Verb::Delete => self.write(&words),
            Verb::Explain { .. } | Verb::Declare { .. } | Verb::CopyTo => match &facts.inner {
                Some(inner) if inner.1.verb == Verb::Select && !inner.1.locking => self.merged(inner.0.clone(), &words),
                Some(_) if facts.verb == (Verb::Explain { analyze: false }) => Ok(Lazy::Whole),
                _ => Err("form"),
            },
            Verb::Truncate { .. } if facts.targets.iter().any(|target| self.is_lazy(&target.table)) => Err("truncate"),
            Verb::Prepare(_) => Err("prepare"),
            Verb::Merge | Verb::Ddl { .. } | Verb::Call | Verb::Do | Verb::Other => Err("form"),
            _ => Ok(Lazy::Whole),
        }
    }

    /// Every word, folded; of a block of DO those in its body, too.
    fn words(&self) -> BTreeSet<String> {
        let mut words = BTreeSet::new();
        for token in lex(self.text).filter(|token| !token.kind.is_gap()) {
            match token.kind {
                Kind::Word | Kind::Quoted | Kind::UnicodeQuoted => words.extend(name::fold(self.text, &token)),
                _ if matches!(self.facts.verb, Verb::Do | Verb::Other) => {
                    let text = String::from_utf8_lossy(&self.text[token.range()]);
                    let split = text.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$'));
                    words.extend(split.filter(|word| !word.is_empty()).map(str::to_lowercase));
                }
                _ => {}
            }
        }
        words
    }

    fn is_lazy(&self, name: &Name) -> bool {
        matches!(self.lazy_table(name), Ok(Some(_)) | Err(_))
    }

    /// The lazy table that a name means. Err: it may mean one, and another.
    fn lazy_table(&self, name: &Name) -> Result<Option<Arc<Table>>, &'static str> {
        let tables = match self.catalog.resolve(Side::New, name) {
            Resolution::Tables(tables) | Resolution::View { tables, .. } => tables,
            Resolution::Other => return Ok(None),
        };
        let staying = name.schema.is_none() && self.catalog.staying.new.contains(&name.name);
        match &tables[..] {
            [table] if table.lazy && !staying => Ok(Some(table.clone())),
            tables if tables.iter().any(|table| table.lazy) => Err("ambiguous"),
            _ => Ok(None),
        }
    }

    fn relations(&self, range: Range<usize>) -> Result<Relations, &'static str> {
        sql::relations(self.text, range, Limits::default()).ok_or("form")
    }

    /// The names that give way, in a statement that may read merged views.
    fn merged(&self, range: Range<usize>, words: &BTreeSet<String>) -> Verdict {
        if self.facts.modifying_cte {
            return Err("form");
        }
        let relations = self.relations(range)?;
        let tokens: Vec<Token> = lex(self.text).filter(|token| !token.kind.is_gap()).collect();
        let namings: HashSet<usize> = relations
            .named
            .iter()
            .flat_map(|relation| {
                let alias = relation.naming == Naming::From { alias: true };
                let end = relation.tokens.end;
                let behind = end + usize::from(tokens.get(end).is_some_and(|token| token.is_word(self.text, "as")));
                relation.tokens.clone().chain(alias.then_some(behind))
            })
            .collect();
        let mut names = Vec::new();
        let mut means = BTreeSet::new();
        let mut point = None;
        for relation in &relations.named {
            let Some(table) = self.lazy_table(&relation.name)? else { continue };
            if relation.name.schema.is_none() && relations.ctes.contains(&relation.name.name) {
                return Err("ambiguous");
            }
            let alias = match relation.naming {
                Naming::From { alias } => alias,
                Naming::Written => continue,
                Naming::Other => return Err("form"),
            };
            let called = self.called(&tokens, relation, alias).ok_or("form")?;
            self.by_columns_only(&tokens, &namings, &called)?;
            means.extend(means_table(&relation.name, &table));
            if relations.named.len() == 1 && self.plan == &Plan::Pass {
                point = super::point::point(self.text, self.facts, self.catalog, relation, called.clone());
            }
            let view = crate::ledger::lazy("merged", table.number);
            let text = if alias { view } else { format!("{view} AS {}", name::spell(&called)) };
            names.push(Renamed { tokens: relation.tokens.clone(), text });
        }
        if names.is_empty() {
            return Ok(Lazy::Whole);
        }
        if OF_TABLES.iter().any(|column| words.contains(*column)) {
            return Err("system-column");
        }
        let splice = Splice { names, ..Splice::default() };
        Ok(Lazy::Merged(Arc::new(Merged { splice, touch: touch(&means), point })))
    }

    /// By which name the statement knows the relation.
    fn called(&self, tokens: &[Token], relation: &Relation, alias: bool) -> Option<String> {
        if !alias {
            return Some(relation.name.name.clone());
        }
        let at = relation.tokens.end;
        let at = at + usize::from(tokens.get(at)?.is_word(self.text, "as"));
        name::fold(self.text, tokens.get(at)?)
    }

    /// The name stands in front of columns only: as a value it would have another type, and with its schema it would not be found.
    fn by_columns_only(&self, tokens: &[Token], namings: &HashSet<usize>, called: &str) -> Result<(), &'static str> {
        let dot = |at: usize| tokens.get(at).is_some_and(|token| token.is_punct(self.text, b'.'));
        for (at, token) in tokens.iter().enumerate() {
            if namings.contains(&at) || name::fold(self.text, token).as_deref() != Some(called) {
                continue;
            }
            match (at > 0 && dot(at - 1), dot(at + 1)) {
                (true, true) => return Err("form"),
                (true, false) | (false, true) => {}
                (false, false) if at > 0 && tokens[at - 1].is_word(self.text, "as") => {}
                (false, false) => return Err("whole-row"),
            }
        }
        Ok(())
    }

    fn write(&self, words: &BTreeSet<String>) -> Verdict {
        let facts = self.facts;
        let target = facts.targets.first().ok_or("form")?;
        if facts.modifying_cte {
            return Err("form");
        }
        let Some(table) = self.lazy_table(&target.table)? else {
            let merged = self.merged(0..self.text.len(), words)?;
            return match self.plan {
                // Its rows are read by a SELECT of ours first, from its own text.
                Plan::Capture(capture) if capture.effect == Some(Effect::Moved) && merged != Lazy::Whole => {
                    Err("joined")
                }
                Plan::Opaque(_) if merged != Lazy::Whole => Err("form"),
                _ => Ok(merged),
            };
        };
        if !matches!(self.plan, Plan::Capture(_)) {
            return Err("form");
        }
        match facts.verb {
            // A trigger of the table sees to it that it conflicts with what only old has.
            Verb::Insert if facts.on_conflict != Some(OnConflict::Update) => self.merged(0..self.text.len(), words),
            Verb::Insert => self.upsert(&table),
            _ if !facts.reads.is_empty() || facts.current_of => Err("joined"),
            _ => self.by_condition(table, &target.table, target.row.clone()),
        }
    }

    fn locking(&self) -> Verdict {
        let relations = self.relations(0..self.text.len())?;
        let [relation] = &relations.named[..] else { return Err("joined") };
        let Some(table) = self.lazy_table(&relation.name)? else { return Ok(Lazy::Whole) };
        let tokens: Vec<Token> = lex(self.text).filter(|token| !token.kind.is_gap()).collect();
        let Naming::From { alias } = relation.naming else { return Err("form") };
        let called = self.called(&tokens, relation, alias).ok_or("form")?;
        self.by_condition(table, &relation.name, name::spell(&called))
    }

    /// A statement about one table, by a condition that says the same of a row whenever it is asked within the transaction.
    fn by_condition(&self, table: Arc<Table>, written: &Name, row: String) -> Verdict {
        let relations = self.relations(0..self.text.len())?;
        if relations.named.len() != 1 {
            return Err("joined");
        }
        if let Some(at) = &relations.condition {
            let condition = [b"SELECT 1 FROM crossfade_row WHERE " as &[u8], &self.text[at.clone()]].concat();
            self.holds_still(&condition)?;
        }
        let touch = touch(&means_table(written, &table).into_iter().collect());
        Ok(Lazy::Brings(Arc::new(Brings { table, touch, which: Which::Condition(row) })))
    }

    fn upsert(&self, table: &Arc<Table>) -> Verdict {
        let relations = self.relations(0..self.text.len())?;
        let (Some(at), Some(columns)) = (&relations.values, &self.facts.columns) else { return Err("upsert") };
        let key = table.key.iter().flat_map(|key| &key.columns).map(|&at| &table.columns[at].name.new);
        let named = key.clone().filter(|name| columns.contains(name)).count();
        let values = &self.text[at.clone()];
        let default = lex(values).any(|token| token.is_word(values, "default"));
        if relations.named.len() != 1 || default || named != key.count() {
            return Err("upsert");
        }
        let rows = [b"SELECT 1 FROM (" as &[u8], values, b") AS crossfade_row"].concat();
        self.holds_still(&rows)?;
        let written = &self.facts.targets[0].table;
        let touch = touch(&means_table(written, table).into_iter().collect());
        Ok(Lazy::Brings(Arc::new(Brings { table: table.clone(), touch, which: Which::Rows(columns.clone()) })))
    }

    /// What this SELECT's condition says of a row, or gives as one, is the same for both statements.
    fn holds_still(&self, select: &[u8]) -> Result<(), &'static str> {
        let facts = sql::read(select, Limits::default());
        let steady = |function: &Name| {
            let built_in = self.catalog.reproducible.new.contains(&function.name)
                || OF_TRANSACTION.contains(&function.name.as_str());
            let of_users = self.catalog.functions.new.contains(&function.name);
            let immutable = of_users && !self.catalog.writing_functions.new.contains(&function.name);
            match function.schema.as_deref() {
                Some("pg_catalog") => built_in,
                Some(_) => immutable,
                None => immutable || built_in && !of_users || super::read::GRAMMAR.contains(&function.name.as_str()),
            }
        };
        let system = |token: Token| name::fold(select, &token).is_some_and(|word| OF_TABLES.contains(&word.as_str()));
        let words = |token: &Token| matches!(token.kind, Kind::Word | Kind::Quoted);
        match () {
            _ if facts.verb != Verb::Select || facts.reads.len() > 1 || facts.locking => Err("joined"),
            _ if !facts.functions.iter().all(steady) => Err("function"),
            _ if lex(select).filter(words).any(system) => Err("system-column"),
            _ => Ok(()),
        }
    }
}

/// That a bare name means this table in the session, and no temporary one.
fn means_table(written: &Name, table: &Table) -> Option<String> {
    let name = quote(&written.name).replace('\'', "''").replace('\\', "\\\\");
    written.schema.is_none().then(|| {
        format!(
            "pg_catalog.oideq(pg_catalog.to_regclass(E'{name}')::pg_catalog.oid, {}::pg_catalog.oid)",
            table.oid.new
        )
    })
}

fn touch(means: &BTreeSet<String>) -> String {
    let all: Vec<&str> = means.iter().map(String::as_str).collect();
    let means = if all.is_empty() { "true".to_owned() } else { all.join(" AND ") };
    format!("SELECT crossfade.touch_old({means})")
}

impl Brings {
    /// What brings the rows over before this text of the statement; its parameters are the statement's. None: the text is not as it was planned.
    pub fn bring(&self, text: &[u8]) -> Option<Vec<u8>> {
        let relations = sql::relations(text, 0..text.len(), Limits::default())?;
        let number = self.table.number;
        let of = |row: &str| {
            let key = self.table.key.iter().flat_map(|key| &key.columns).map(|&at| &self.table.columns[at]);
            let one = key.map(|column| {
                format!("pg_catalog.array_agg({row}.{}::{})", quote(&column.name.new), column.kind.name.new)
            });
            format!("SELECT {}({}) FROM ", crate::ledger::lazy("bring", number), one.collect::<Vec<_>>().join(", "))
        };
        match &self.which {
            Which::Condition(row) => {
                let mut out = format!("{}{} AS {row}", of(row), crate::ledger::lazy("missing", number)).into_bytes();
                if let Some(at) = relations.condition {
                    out.extend_from_slice(b" WHERE");
                    out.extend_from_slice(&text[at]);
                }
                Some(out)
            }
            Which::Rows(columns) => {
                let mut out = format!("{}(", of("crossfade_row")).into_bytes();
                out.extend_from_slice(&text[relations.values?]);
                let columns: Vec<String> = columns.iter().map(|column| quote(column)).collect();
                // A comment that ends with its line may stand at the end of the rows.
                out.extend_from_slice(format!("\n) AS crossfade_row ({})", columns.join(", ")).as_bytes());
                Some(out)
            }
        }
    }
}

/// A reason of `Lazy::Refused`, and what to do instead.
pub fn refused_because(reason: &str) -> (&'static str, &'static str) {
    match reason {
        "ambiguous" => ("the table's name may mean several relations", "Write the table with its schema."),
        "behind" => (
            "it uses a view or function that may read such a table by itself",
            "Name the table in the statement instead.",
        ),
        "trigger" => {
            ("a trigger calls a function that may read such a table by itself", "Disable the trigger, or wait.")
        }
        "form" => (
            "it names the table in a way that no merged view can stand for",
            "Use a plain SELECT, INSERT, UPDATE or DELETE.",
        ),
        "function" => (
            "its condition calls a function that may give something else when it is asked twice",
            "Give the value as a parameter.",
        ),
        "joined" => (
            "rows to be written or locked are found by more than a condition on the table itself",
            "Select the keys first, then write by key.",
        ),
        "prepare" => ("PREPARE of SQL is not taken apart", "Use the extended protocol, or send the statement itself."),
        "system-column" => ("rows on old have no ctid, xmin, tableoid and the like", "Use the key."),
        "truncate" => ("TRUNCATE would leave the rows on old", "Use DELETE."),
        "upsert" => (
            "the keys of ON CONFLICT DO UPDATE are not plain values of a list with all key columns",
            "Write VALUES, and name the columns.",
        ),
        "whole-row" => ("it uses the row as a value", "Name the columns."),
        _ => ("it cannot be merged", ""),
    }
}
