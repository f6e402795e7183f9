//! What a statement is, as far as the plan needs to know: kind, tables, functions, where to splice.

/// A possibly qualified name, each part as PostgreSQL would fold it (unquoted parts lowercased, quoted ones exact).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// The schema, if it was written.
    pub schema: Option<String>,
    /// The name itself.
    pub name: String,
}

/// What kind of statement this is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verb {
    /// SELECT, VALUES, TABLE without INTO and without data-modifying CTEs.
    Select,
    /// INSERT.
    Insert,
    /// UPDATE.
    Update,
    /// DELETE.
    Delete,
    /// MERGE.
    Merge,
    /// TRUNCATE.
    Truncate {
        /// RESTART IDENTITY was written.
        restart_identity: bool,
        /// CASCADE was written.
        cascade: bool,
    },
    /// COPY ... FROM STDIN.
    CopyFromStdin,
    /// COPY ... FROM a file or program: a write that runs in the server.
    CopyFromServer,
    /// COPY ... TO (a table or a SELECT; a data-modifying query inside is `Other`).
    CopyTo,
    /// BEGIN, START TRANSACTION. `read_only` is None where the statement does not say.
    Begin {
        /// READ ONLY (true) or READ WRITE (false).
        read_only: Option<bool>,
        /// BEGIN alone: it names no mode (READ ONLY, ISOLATION LEVEL, DEFERRABLE).
        bare: bool,
    },
    /// COMMIT, END.
    Commit {
        /// AND CHAIN.
        chain: bool,
    },
    /// ROLLBACK, ABORT.
    Rollback {
        /// AND CHAIN.
        chain: bool,
    },
    /// SAVEPOINT name (folded).
    Savepoint(String),
    /// RELEASE name (folded).
    Release(String),
    /// ROLLBACK TO name (folded).
    RollbackTo(String),
    /// PREPARE TRANSACTION.
    PrepareTransaction,
    /// COMMIT PREPARED.
    CommitPrepared,
    /// ROLLBACK PREPARED.
    RollbackPrepared,
    /// SET name (folded, dotted names kept), SET LOCAL, SET ROLE (`role`), SET SESSION AUTHORIZATION (`session_authorization`), SET TIME ZONE (`timezone`).
    Set {
        /// The parameter.
        name: String,
        /// SET LOCAL.
        local: bool,
    },
    /// SET TRANSACTION, SET SESSION CHARACTERISTICS, SET CONSTRAINTS.
    SetTransaction,
    /// RESET name, or None for RESET ALL.
    Reset(Option<String>),
    /// SHOW.
    Show,
    /// DISCARD ALL | PLANS | TEMP | SEQUENCES (the word, lowercased).
    Discard(String),
    /// SQL PREPARE name: the inner statement is in `Facts::inner`.
    Prepare(String),
    /// SQL EXECUTE name.
    Execute(String),
    /// DEALLOCATE name, or None for ALL.
    Deallocate(Option<String>),
    /// DECLARE a cursor; the query's facts are in `Facts::inner`.
    Declare {
        /// The cursor's name, folded.
        name: String,
        /// WITH HOLD.
        hold: bool,
    },
    /// FETCH, MOVE, CLOSE of a cursor.
    Cursor,
    /// EXPLAIN; the explained statement is in `Facts::inner`.
    Explain {
        /// With ANALYZE: the statement runs.
        analyze: bool,
    },
    /// LOCK TABLE.
    Lock,
    /// LISTEN, UNLISTEN, NOTIFY.
    Notify,
    /// CALL.
    Call,
    /// DO.
    Do,
    /// CREATE, ALTER, DROP, GRANT, COMMENT, REFRESH, REINDEX and so on, SELECT INTO, CREATE TABLE AS. `temporary` where it only makes a temporary object.
    Ddl {
        /// CREATE TEMP ..., SELECT INTO TEMP.
        temporary: bool,
    },
    /// VACUUM, ANALYZE, CHECKPOINT, CLUSTER and what else changes no row's content.
    Maintenance,
    /// No statement at all (blanks, comments).
    Empty,
    /// Whatever no reader understood, or on which two readers disagree. Counts as a write.
    Other,
}

/// The action of ON CONFLICT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnConflict {
    /// DO NOTHING.
    Nothing,
    /// DO UPDATE.
    Update,
}

/// What the actions of a MERGE may do to rows of its table (DO NOTHING does nothing).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merges {
    /// THEN INSERT.
    pub insert: bool,
    /// THEN UPDATE.
    pub update: bool,
    /// THEN DELETE.
    pub delete: bool,
}

/// One table that is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The table as written.
    pub table: Name,
    /// The text by which RETURNING may refer to its row, exactly as it must be spelled in SQL (quoted where needed):
    /// the alias, else the table's name without schema.
    pub row: String,
    /// Columns that SET names (UPDATE, ON CONFLICT DO UPDATE, MERGE), folded. Sorted, no duplicates.
    pub assigned: Vec<String>,
}

/// Where a statement of a WITH clause stands in the text, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The name that the clause gives it.
    pub name: std::ops::Range<usize>,
    /// The statement itself, from its first token to its last.
    pub body: std::ops::Range<usize>,
    /// Just behind the parenthesis that closes it.
    pub close: usize,
}

/// As what the rows of a statement in a WITH clause leave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Returned {
    /// Not at all: it has no RETURNING, and nothing reads from it.
    Nothing,
    /// As they are, with exactly the columns of their table.
    Row,
    /// Under these names, folded, no two alike.
    Columns(Vec<String>),
    /// In another way.
    Other,
}

/// An INSERT, UPDATE or DELETE in a WITH clause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Within {
    /// Where it stands, in the text that was read.
    pub place: Place,
    /// As what its rows leave it.
    pub returned: Returned,
    /// Its own facts, read as a statement by itself: names of the WITH clause count as tables.
    pub facts: Facts,
}

/// The facts of one statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its kind.
    pub verb: Verb,
    /// Tables it writes itself (not through triggers). For INSERT, UPDATE, DELETE, MERGE, COPY FROM exactly one, plus those of data-modifying CTEs, which come
    /// behind it; for TRUNCATE all named.
    pub targets: Vec<Target>,
    /// Other relations it names (tables, views; not CTE names). Sorted, no duplicates.
    pub reads: Vec<Name>,
    /// Functions it calls, folded. Sorted, no duplicates. Operators and casts are not listed.
    pub functions: Vec<Name>,
    /// It has a RETURNING clause of its own (at top level).
    pub returning: bool,
    /// ON CONFLICT's action.
    pub on_conflict: Option<OnConflict>,
    /// The columns by which ON CONFLICT finds the row, where these alone are named (no expression, collation, operator class or WHERE), folded and sorted.
    pub conflict_columns: Vec<String>,
    /// Columns that DO UPDATE sets to what the row that conflicts has in them: `SET id = EXCLUDED.id`. Folded; `assigned` has them too.
    pub set_to_excluded: Vec<String>,
    /// MERGE's actions.
    pub merges: Merges,
    /// A CTE of it writes.
    pub modifying_cte: bool,
    /// Each statement of its WITH clause that writes, in the order of the text. Empty where one of them is not plain to read, or writes as part of something else
    /// than SELECT, INSERT, UPDATE and DELETE.
    pub within: Vec<Within>,
    /// FOR UPDATE, FOR NO KEY UPDATE, FOR SHARE, FOR KEY SHARE somewhere.
    pub locking: bool,
    /// WHERE CURRENT OF.
    pub current_of: bool,
    /// Columns of an INSERT's or COPY's column list, folded; None where it has none.
    pub columns: Option<Vec<String>>,
    /// The highest $n.
    pub parameters: u16,
    /// Byte offset just behind the last token that is no comment and no `;`: where RETURNING is spliced.
    pub end: usize,
    /// Byte range in this statement's text and facts of the statement inside EXPLAIN, PREPARE, DECLARE (and COPY (query) TO).
    pub inner: Option<Box<(std::ops::Range<usize>, Facts)>>,
}
