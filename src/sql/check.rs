//! The second reading: what sqlparser makes of a statement. Where it reads one at all it must agree with the tree about
//! the kind of statement, the tables written and the relations named; if not, nobody knows what the statement is.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use sqlparser::ast::{
    Expr, FromTable, Ident, ObjectName, ObjectNamePart, Query, SetExpr, Statement, TableFactor, TableObject, Visit,
    Visitor, With,
};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;

use super::facts::{Facts, Name, Verb};
use super::name::fold_spelled;

/// sqlparser tries two meanings of some parentheses (`position(`), which doubles its work with each level: 25 ms for these.
const NESTING_MAX: usize = 12;

/// What both readings are compared by.
#[derive(Debug, PartialEq, Eq)]
pub struct Reading {
    /// Select, Insert, Update, Delete, Merge, Ddl (SELECT INTO).
    pub verb: Verb,
    /// Tables written, its own first.
    pub targets: Vec<Name>,
    /// All relations named, those written too, CTEs not.
    pub relations: BTreeSet<Name>,
    /// Functions called.
    pub functions: BTreeSet<Name>,
}

/// sqlparser's reading of a cleaned statement; None where it has none. `nesting` is the depth of its parentheses.
pub fn read(clean: &str, nesting: usize) -> Option<Reading> {
    if nesting > NESTING_MAX {
        return None;
    }
    let mut statements = Parser::parse_sql(&PostgreSqlDialect {}, clean).ok()?;
    let statement = statements.pop().filter(|_| statements.is_empty())?;
    let mut reader = Reader::default();
    if statement.visit(&mut reader).is_break() {
        return None;
    }
    reader.finish(&statement)
}

/// Whether the facts of the tree agree with this reading.
pub fn agrees(facts: &Facts, reading: &Reading) -> bool {
    let kind = match (&facts.verb, &reading.verb) {
        (Verb::Ddl { .. }, Verb::Ddl { .. }) => true,
        // The tree's reader calls a SELECT with a CTE that writes `Other`.
        (Verb::Other, Verb::Select) => facts.modifying_cte,
        (one, other) => one == other,
    };
    let targets: Vec<&Name> = facts.targets.iter().map(|target| &target.table).collect();
    let relations: BTreeSet<&Name> = facts.reads.iter().chain(targets.iter().copied()).collect();
    kind && targets.into_iter().eq(&reading.targets) && relations.into_iter().eq(&reading.relations)
}

/// A query with a WITH clause that the walk is inside of.
struct Scope {
    query: *const Query,
    recursive: bool,
    /// Name and query of each CTE.
    ctes: Vec<(String, *const Query)>,
    /// How many of them may be named where the walk is.
    visible: usize,
}

#[derive(Default)]
struct Reader {
    scopes: Vec<Scope>,
    targets: Vec<Name>,
    relations: BTreeSet<Name>,
    functions: BTreeSet<Name>,
    /// The next relation is the name of a function in FROM.
    function_next: bool,
    into: bool,
}

impl Reader {
    fn finish(mut self, statement: &Statement) -> Option<Reading> {
        let verb = match top(statement) {
            Statement::Query(_) if self.into => Verb::Ddl { temporary: false },
            Statement::Query(_) => Verb::Select,
            Statement::Insert(_) => Verb::Insert,
            Statement::Update(_) => Verb::Update,
            Statement::Delete(_) => Verb::Delete,
            Statement::Merge(_) => Verb::Merge,
            _ => return None,
        };
        // The walk meets a WITH clause before what follows it.
        if matches!(verb, Verb::Insert | Verb::Update | Verb::Delete | Verb::Merge) && !self.targets.is_empty() {
            self.targets.rotate_right(usize::from(matches!(statement, Statement::Query(_))));
        }
        self.relations.extend(self.targets.iter().cloned());
        Some(Reading { verb, targets: self.targets, relations: self.relations, functions: self.functions })
    }

    fn scope(query: &Query, with: &With) -> Option<Scope> {
        let ctes: Option<Vec<_>> =
            with.cte_tables.iter().map(|cte| Some((ident(&cte.alias.name)?, &raw const *cte.query))).collect();
        let ctes = ctes?;
        let visible = ctes.len();
        Some(Scope { query, recursive: with.recursive, ctes, visible })
    }

    fn is_cte(&self, name: &Name) -> bool {
        let seen = |scope: &Scope| scope.ctes[..scope.visible].iter().any(|(cte, _)| *cte == name.name);
        name.schema.is_none() && self.scopes.iter().any(seen)
    }
}

/// The statement that a WITH clause stands in front of.
fn top(statement: &Statement) -> &Statement {
    if let Statement::Query(query) = statement
        && let SetExpr::Insert(inner) | SetExpr::Update(inner) | SetExpr::Delete(inner) | SetExpr::Merge(inner) =
            query.body.as_ref()
    {
        return inner;
    }
    statement
}

impl Visitor for Reader {
    type Break = ();

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        if let Some(scope) = self.scopes.last_mut()
            && !scope.recursive
            && let Some(place) = scope.ctes.iter().position(|(_, cte)| std::ptr::eq(*cte, query))
        {
            scope.visible = place;
        }
        if let Some(with) = &query.with {
            let Some(scope) = Reader::scope(query, with) else { return ControlFlow::Break(()) };
            self.scopes.push(scope);
        }
        if has_table_command(&query.body) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn post_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        if self.scopes.last().is_some_and(|scope| std::ptr::eq(scope.query, query)) {
            self.scopes.pop();
        }
        if let Some(scope) = self.scopes.last_mut()
            && scope.ctes.iter().any(|(_, cte)| std::ptr::eq(*cte, query))
        {
            scope.visible = scope.ctes.len();
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, select: &sqlparser::ast::Select) -> ControlFlow<()> {
        self.into |= select.into.is_some();
        ControlFlow::Continue(())
    }

    fn pre_visit_statement(&mut self, statement: &Statement) -> ControlFlow<()> {
        let table = match statement {
            Statement::Query(_) => return ControlFlow::Continue(()),
            Statement::Insert(insert) => match &insert.table {
                TableObject::TableName(name) => object_name(name),
                _ => None,
            },
            Statement::Update(update) if update.table.joins.is_empty() => table_name(&update.table.relation),
            Statement::Delete(delete) if delete.tables.is_empty() => match &delete.from {
                FromTable::WithFromKeyword(tables) | FromTable::WithoutKeyword(tables) => match tables.as_slice() {
                    [table] if table.joins.is_empty() => table_name(&table.relation),
                    _ => None,
                },
            },
            Statement::Merge(merge) => table_name(&merge.table),
            _ => None,
        };
        match table {
            Some(table) => self.targets.push(table),
            None => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        match factor {
            TableFactor::Table { name, args: Some(_), .. } => {
                self.function_next = true;
                self.functions.extend(object_name(name));
            }
            TableFactor::Function { name, .. } => self.functions.extend(object_name(name)),
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_relation(&mut self, relation: &ObjectName) -> ControlFlow<()> {
        if std::mem::take(&mut self.function_next) {
            return ControlFlow::Continue(());
        }
        let Some(name) = object_name(relation) else { return ControlFlow::Break(()) };
        if !self.is_cte(&name) {
            self.relations.insert(name);
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        if let Expr::Function(function) = expr {
            self.functions.extend(object_name(&function.name));
        }
        ControlFlow::Continue(())
    }
}

/// `TABLE name` in a query or an operand of its UNIONs: the walk does not show it, and its name has lost its quotes.
fn has_table_command(body: &SetExpr) -> bool {
    let mut left = vec![body];
    while let Some(body) = left.pop() {
        match body {
            SetExpr::Table(_) => return true,
            SetExpr::SetOperation { left: one, right: other, .. } => left.extend([one.as_ref(), other.as_ref()]),
            _ => {}
        }
    }
    false
}

fn table_name(factor: &TableFactor) -> Option<Name> {
    match factor {
        TableFactor::Table { name, args: None, .. } => object_name(name),
        _ => None,
    }
}

fn object_name(name: &ObjectName) -> Option<Name> {
    let mut parts: Vec<String> = Vec::new();
    for part in &name.0 {
        let ObjectNamePart::Identifier(part) = part else { return None };
        parts.push(ident(part)?);
    }
    if parts.len() > 3 {
        return None;
    }
    let name = parts.pop()?;
    Some(Name { schema: parts.pop(), name })
}

fn ident(ident: &Ident) -> Option<String> {
    fold_spelled(&ident.value, ident.quote_style.is_some())
}
