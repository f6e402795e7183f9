//! SELECT, VALUES, TABLE, INSERT, UPDATE, DELETE and MERGE as squawk-syntax reads them: its tree has exact byte ranges
//! and knows nearly all of PostgreSQL's grammar. Names are taken from the statement's own tokens, never from the tree.

use std::collections::BTreeSet;

use squawk_syntax::{SourceFile, SyntaxKind as K, SyntaxNode};

use super::facts::{Facts, Name, OnConflict, Target, Verb};
use super::lex::{Kind, Token};
use super::name;

/// A statement's text and its tokens without gaps.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The bytes.
    pub text: &'a [u8],
    /// Its tokens without gaps.
    pub tokens: &'a [Token],
}

impl<'a> Source<'a> {
    fn tokens_of(&self, node: &SyntaxNode) -> &'a [Token] {
        let range = node.text_range();
        let (start, end) = (usize::from(range.start()), usize::from(range.end()));
        let first = self.tokens.partition_point(|token| token.start() < start);
        let last = self.tokens.partition_point(|token| token.start() < end);
        &self.tokens[first..last]
    }

    fn name(&self, node: &SyntaxNode) -> Option<Name> {
        name::qualified(self.text, self.tokens_of(node))
    }

    /// Whether one of these keywords stands right inside the parentheses of a call, not deeper.
    fn has_word(&self, call: &SyntaxNode, words: &[&str]) -> bool {
        let mut depth = 0usize;
        self.tokens_of(call).iter().any(|token| {
            if token.is_punct(self.text, b'(') {
                depth += 1;
            } else if token.is_punct(self.text, b')') {
                depth = depth.saturating_sub(1);
            }
            depth == 1 && words.iter().any(|word| token.is_word(self.text, word))
        })
    }

    fn ident(&self, node: &SyntaxNode) -> Option<String> {
        match self.tokens_of(node) {
            [token] => name::fold(self.text, token),
            _ => None,
        }
    }
}

/// Fills `facts` with what the tree of `clean` says, the cleaned text of `source`. None where it has errors, is not one
/// statement of those kinds, or holds something of which the tree does not tell what is written.
pub fn read(clean: &str, source: Source<'_>, facts: Facts) -> Option<Facts> {
    let parse = SourceFile::parse(clean);
    if !parse.errors().is_empty() {
        return None;
    }
    let root = parse.syntax_node();
    let mut statements = root.children().filter(|node| node.kind() != K::EMPTY_STMT);
    let top = statements.next()?;
    if statements.next().is_some() {
        return None;
    }
    let mut reader = Reader {
        source,
        facts: Facts { verb: verb(top.kind())?, ..facts },
        reads: BTreeSet::new(),
        functions: BTreeSet::new(),
        cte_targets: Vec::new(),
        scopes: Vec::new(),
        writes: Vec::new(),
        top: top.clone(),
    };
    reader.walk(&top)?;
    Some(reader.finish())
}

fn verb(kind: K) -> Option<Verb> {
    Some(match kind {
        K::SELECT | K::COMPOUND_SELECT | K::PAREN_SELECT | K::TABLE | K::VALUES => Verb::Select,
        K::SELECT_INTO | K::CREATE_TABLE_AS => Verb::Ddl { temporary: false },
        K::INSERT => Verb::Insert,
        K::UPDATE => Verb::Update,
        K::DELETE => Verb::Delete,
        K::MERGE => Verb::Merge,
        _ => return None,
    })
}

fn is_write(kind: K) -> bool {
    matches!(kind, K::INSERT | K::UPDATE | K::DELETE | K::MERGE)
}

/// The CTEs of one WITH clause, while the walk is inside the statement that it belongs to.
struct Scope {
    /// The statement.
    owner: SyntaxNode,
    /// The clause.
    clause: SyntaxNode,
    /// Names that may be used where the walk is: without RECURSIVE a CTE sees only those before it.
    names: Vec<String>,
}

/// One INSERT, UPDATE, DELETE or MERGE that the walk is inside of.
struct Write {
    node: SyntaxNode,
    table: Option<Name>,
    alias: Option<String>,
    assigned: BTreeSet<String>,
}

struct Reader<'a> {
    source: Source<'a>,
    facts: Facts,
    reads: BTreeSet<Name>,
    functions: BTreeSet<Name>,
    cte_targets: Vec<Target>,
    scopes: Vec<Scope>,
    writes: Vec<Write>,
    top: SyntaxNode,
}

impl Reader<'_> {
    /// Preorder without recursion: a tree may be as deep as the text is long.
    fn walk(&mut self, top: &SyntaxNode) -> Option<()> {
        let mut node = top.clone();
        self.enter(&node)?;
        loop {
            if let Some(child) = node.first_child() {
                node = child;
            } else {
                loop {
                    self.leave(&node)?;
                    if node == *top {
                        return Some(());
                    }
                    if let Some(next) = node.next_sibling() {
                        node = next;
                        break;
                    }
                    node = node.parent()?;
                }
            }
            self.enter(&node)?;
        }
    }

    fn enter(&mut self, node: &SyntaxNode) -> Option<()> {
        if let Some(clause) = with_clause(node)
            && self.scopes.last().is_none_or(|scope| scope.clause != clause)
        {
            let names = if is_recursive(&clause) { self.cte_names(&clause)? } else { Vec::new() };
            self.scopes.push(Scope { owner: node.clone(), clause, names });
        }
        match node.kind() {
            kind if is_write(kind) => {
                self.writes.push(Write { node: node.clone(), table: None, alias: None, assigned: BTreeSet::new() });
            }
            K::RELATION_NAME_REF | K::TABLE_NAME_REF => self.relation(node)?,
            K::TABLE_ALIAS => self.alias(node)?,
            K::COLUMN_TARGET => self.column(node)?,
            K::CALL_EXPR => self.call(node)?,
            K::LOCKING_CLAUSE => self.facts.locking = true,
            K::WHERE_CURRENT_OF => self.facts.current_of = true,
            K::RETURNING_CLAUSE if node.parent().as_ref() == Some(&self.top) => self.facts.returning = true,
            K::CONFLICT_ON_INDEX => self.conflict_columns(node),
            K::CONFLICT_DO_NOTHING => self.on_conflict(node, OnConflict::Nothing),
            K::CONFLICT_DO_UPDATE_SET => self.on_conflict(node, OnConflict::Update),
            K::MERGE_INSERT | K::MERGE_UPDATE | K::MERGE_DELETE => self.merges(node),
            K::INTO_CLAUSE => self.into(node),
            // PostgreSQL 19: writes more rows than it names, or needs another RETURNING.
            K::CONFLICT_DO_SELECT | K::FOR_PORTION_OF | K::GRAPH_TABLE_FN => return None,
            kind => self.special_call(kind, node),
        }
        Some(())
    }

    fn leave(&mut self, node: &SyntaxNode) -> Option<()> {
        if node.kind() == K::WITH_TABLE {
            let scope = self.scopes.last_mut().filter(|scope| Some(&scope.clause) == node.parent().as_ref())?;
            if !is_recursive(&scope.clause) {
                scope.names.push(cte_name(self.source, node)?);
            }
        }
        if self.scopes.last().is_some_and(|scope| scope.owner == *node) {
            self.scopes.pop();
        }
        if self.writes.last().is_some_and(|write| write.node == *node) {
            let write = self.writes.pop()?;
            self.target(write)?;
        }
        Some(())
    }

    fn target(&mut self, write: Write) -> Option<()> {
        let table = write.table?;
        let row = name::spell(write.alias.as_ref().unwrap_or(&table.name));
        let target = Target { table, row, assigned: write.assigned.into_iter().collect() };
        if write.node == self.top {
            self.facts.targets.push(target);
        } else {
            self.facts.modifying_cte = true;
            self.cte_targets.push(target);
        }
        Some(())
    }

    fn cte_names(&self, clause: &SyntaxNode) -> Option<Vec<String>> {
        let tables = clause.children().filter(|child| child.kind() == K::WITH_TABLE);
        tables.map(|table| cte_name(self.source, &table)).collect()
    }

    fn relation(&mut self, node: &SyntaxNode) -> Option<()> {
        if let [token] = self.source.tokens_of(node)
            && is_value_function(self.source.text, token)
        {
            return None; // FROM current_date: no table, though both parsers say so
        }
        let name = self.source.name(node)?;
        if let Some(write) = self.writes.last_mut()
            && write.table.is_none()
            && is_target_of(node, &write.node)
        {
            write.table = Some(name);
            return Some(());
        }
        let is_cte = name.schema.is_none() && self.scopes.iter().any(|scope| scope.names.contains(&name.name));
        if !is_cte {
            self.reads.insert(name);
        }
        Some(())
    }

    fn alias(&mut self, node: &SyntaxNode) -> Option<()> {
        let parent = node.parent()?;
        if !matches!(parent.kind(), K::OPTIONAL_AS_ALIAS | K::REQUIRED_AS_ALIAS) {
            return Some(());
        }
        if let Some(write) = self.writes.last_mut()
            && parent.parent().as_ref() == Some(&write.node)
        {
            write.alias = Some(self.source.ident(node)?);
        }
        Some(())
    }

    /// A column that SET names, or one of an INSERT's list.
    fn column(&mut self, node: &SyntaxNode) -> Option<()> {
        let parent = node.parent()?;
        let column = name::fold(self.source.text, self.source.tokens_of(node).first()?)?;
        let write = self.writes.last_mut()?;
        let holder = if parent.kind() == K::COLUMN_TARGET_LIST { parent.parent()? } else { parent };
        match holder.kind() {
            K::SET_SINGLE_COLUMN | K::SET_MULTIPLE_COLUMNS => {
                let again = write.node == self.top && is_set_to_excluded(self.source, &holder, &column);
                self.facts.set_to_excluded.extend(again.then(|| column.clone()));
                write.assigned.insert(column);
            }
            K::INSERT if holder == self.top => self.facts.columns.get_or_insert_default().push(column),
            _ => {}
        }
        Some(())
    }

    fn on_conflict(&mut self, node: &SyntaxNode, action: OnConflict) {
        if node.parent().and_then(|clause| clause.parent()).as_ref() == Some(&self.top) {
            self.facts.on_conflict = Some(action);
        }
    }

    /// An action of MERGE, behind its WHEN.
    fn merges(&mut self, node: &SyntaxNode) {
        if node.parent().and_then(|when| when.parent()).as_ref() != Some(&self.top) {
            return;
        }
        match node.kind() {
            K::MERGE_INSERT => self.facts.merges.insert = true,
            K::MERGE_UPDATE => self.facts.merges.update = true,
            _ => self.facts.merges.delete = true,
        }
    }

    fn conflict_columns(&mut self, node: &SyntaxNode) {
        if node.parent().and_then(|clause| clause.parent()).as_ref() != Some(&self.top) {
            return;
        }
        let plain = |item: &SyntaxNode| match self.source.tokens_of(item) {
            [token] => name::fold(self.source.text, token),
            _ => None,
        };
        let mut parts = node.children();
        let (list, more) = (parts.next(), parts.next());
        let columns =
            list.filter(|_| more.is_none()).and_then(|list| list.children().map(|item| plain(&item)).collect());
        let mut columns: Vec<String> = columns.unwrap_or_default();
        columns.sort_unstable();
        self.facts.conflict_columns = columns;
    }

    fn into(&mut self, node: &SyntaxNode) {
        let temporary = node.descendants().any(|inner| inner.kind() == K::TEMP);
        self.facts.verb = Verb::Ddl { temporary };
    }

    /// `name(...)`.
    fn call(&mut self, node: &SyntaxNode) -> Option<()> {
        let mut children = node.children();
        let callee = children.next()?;
        if !children.any(|child| child.kind() == K::ARG_LIST) {
            return Some(()); // a form with keywords: its own node follows
        }
        let name = self.source.name(&callee)?;
        let plain = matches!(self.source.tokens_of(&callee), [token] if token.kind == Kind::Word);
        if !(plain && is_expression(&name.name)) {
            self.functions.insert(name);
        }
        Some(())
    }

    /// Forms with keywords that PostgreSQL turns into calls of its own functions.
    fn special_call(&mut self, kind: K, node: &SyntaxNode) {
        if is_function_before_17(kind) {
            let first = self.source.tokens_of(node).first().and_then(|token| name::fold(self.source.text, token));
            self.functions.extend(first.map(|name| Name { schema: None, name }));
        }
        let has = |words: &[&str]| self.source.has_word(node, words);
        let name = match kind {
            K::EXTRACT_FN => "extract",
            K::SUBSTRING_FN => "substring",
            K::POSITION_FN => "position",
            K::OVERLAY_FN => "overlay",
            K::COLLATION_FOR_FN => "pg_collation_for",
            K::XML_EXISTS_FN => "xmlexists",
            K::JSON_OBJECT_FN => "json_object",
            K::TRIM_FN if has(&["leading"]) => "ltrim",
            K::TRIM_FN if has(&["trailing"]) => "rtrim",
            K::TRIM_FN => "btrim",
            _ => return,
        };
        // With commas instead of keywords these two are calls like any other.
        let plain = matches!(kind, K::SUBSTRING_FN | K::OVERLAY_FN) && !has(&["from", "for", "similar", "placing"]);
        let schema = if plain { None } else { Some("pg_catalog".to_owned()) };
        self.functions.insert(Name { schema, name: name.to_owned() });
    }

    fn finish(self) -> Facts {
        let mut facts = self.facts;
        if facts.modifying_cte && facts.verb == Verb::Select {
            facts.verb = Verb::Other;
        }
        facts.targets.extend(self.cte_targets);
        facts.reads = self.reads.into_iter().collect();
        facts.functions = self.functions.into_iter().collect();
        facts
    }
}

/// `column = EXCLUDED.column` of DO UPDATE SET.
fn is_set_to_excluded(source: Source<'_>, set: &SyntaxNode, column: &str) -> bool {
    let of_conflict = set.ancestors().skip(1).take(4).any(|above| above.kind() == K::CONFLICT_DO_UPDATE_SET);
    let fold = |token| name::fold(source.text, token);
    match source.tokens_of(set) {
        [_, _, excluded, _, named] if of_conflict => {
            fold(excluded).as_deref() == Some("excluded") && fold(named).as_deref() == Some(column)
        }
        _ => false,
    }
}

/// The WITH clause whose names hold in all of `node`. That of a UNION stands in front of its first operand; of a chain
/// of UNIONs only the outermost is asked, since each asking walks down the chain.
fn with_clause(node: &SyntaxNode) -> Option<SyntaxNode> {
    if node.kind() == K::COMPOUND_SELECT && node.parent().is_some_and(|parent| parent.kind() == K::COMPOUND_SELECT) {
        return None;
    }
    let mut node = node.clone();
    loop {
        if let Some(clause) = node.children().find(|child| child.kind() == K::WITH_CLAUSE) {
            return Some(clause);
        }
        if node.kind() != K::COMPOUND_SELECT {
            return None;
        }
        node = node.first_child()?;
    }
}

fn is_recursive(clause: &SyntaxNode) -> bool {
    clause.children_with_tokens().any(|child| child.kind() == K::RECURSIVE_KW)
}

fn cte_name(source: Source<'_>, table: &SyntaxNode) -> Option<String> {
    source.ident(&table.children().find(|child| child.kind() == K::CTE_NAME)?)
}

/// A function without parentheses, which may stand in FROM.
fn is_value_function(text: &[u8], token: &Token) -> bool {
    let words = [
        "current_catalog",
        "current_date",
        "current_role",
        "current_schema",
        "current_time",
        "current_timestamp",
        "current_user",
        "localtime",
        "localtimestamp",
        "session_user",
        "user",
    ];
    words.iter().any(|word| token.is_word(text, word))
}

/// Whether this name stands where `write` names its table.
fn is_target_of(node: &SyntaxNode, write: &SyntaxNode) -> bool {
    let parent = match node.parent() {
        Some(parent) if matches!(parent.kind(), K::RELATION_NAME | K::TABLE_RELATION_NAME) => parent.parent(),
        parent => parent,
    };
    parent.as_ref() == Some(write)
}

/// Expressions of PostgreSQL 16 and 17 whose names an older server takes for functions, which anyone may have made.
fn is_function_before_17(kind: K) -> bool {
    matches!(
        kind,
        K::JSON_ARRAY_FN
            | K::JSON_ARRAY_AGG_FN
            | K::JSON_OBJECT_FN
            | K::JSON_OBJECT_AGG_FN
            | K::JSON_EXISTS_FN
            | K::JSON_QUERY_FN
            | K::JSON_VALUE_FN
            | K::JSON_SCALAR_FN
            | K::JSON_SERIALIZE_FN
            | K::JSON_FN
            | K::JSON_TABLE
    )
}

/// Written like calls, but no functions: parts of the grammar.
fn is_expression(name: &str) -> bool {
    matches!(
        name,
        "coalesce"
            | "greatest"
            | "least"
            | "nullif"
            | "grouping"
            | "row"
            | "xmlconcat"
            | "xmlforest"
            | "current_time"
            | "current_timestamp"
            | "localtime"
            | "localtimestamp"
    )
}
