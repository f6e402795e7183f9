//! What one server says, row by row: a handful of set-based queries over its system catalogs, nothing paired or judged yet.

use std::collections::{HashMap, HashSet};

use tokio_postgres::{Client, Error};

/// A table, view, materialized view or foreign table outside the system's schemas.
pub(super) struct Relation {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// pg_class.relkind.
    pub kind: char,
    pub partition: bool,
    pub row_security: bool,
    pub rules: bool,
    pub of_extension: bool,
}

pub(super) struct Attribute {
    pub number: i16,
    pub name: String,
    pub type_oid: u32,
    /// format_type with the modifier.
    pub type_text: String,
    pub type_modifier: i32,
    pub not_null: bool,
    pub generated: bool,
    pub identity_always: bool,
}

/// A type that a column uses, directly or inside another.
pub(super) struct Type {
    pub schema: String,
    pub name: String,
    /// format_type with modifier -1 (`bpchar`, not `character`, which a cast takes for one character).
    pub text: String,
    /// pg_type.typtype.
    pub kind: char,
    /// `schema.name` of its send function; empty without one.
    pub send: String,
    pub receives: bool,
    pub of_extension: bool,
    pub element: u32,
    pub base: u32,
    pub subtype: u32,
    /// The range type of a multirange.
    pub range: u32,
    pub fields: Vec<(String, u32)>,
}

/// A unique index that may be a key.
pub(super) struct Index {
    pub immediate: bool,
    pub columns: Vec<i16>,
    pub deterministic: Vec<bool>,
    pub equals: Vec<String>,
}

pub(super) struct ForeignKey {
    pub referencing: u32,
    pub referenced_columns: Vec<i16>,
    pub cascades_update: bool,
    pub cascades_delete: bool,
}

/// An enabled trigger of a user.
pub(super) struct Trigger {
    /// pg_trigger.tgtype.
    pub bits: i16,
    pub function: String,
    pub language: String,
    pub body: String,
}

/// All that is read of one server.
pub(super) struct Server {
    pub version: u32,
    pub encoding: String,
    pub relations: HashMap<u32, Relation>,
    pub attributes: HashMap<u32, Vec<Attribute>>,
    pub types: HashMap<u32, Type>,
    /// By table; primary keys first, then by name.
    pub indexes: HashMap<u32, Vec<Index>>,
    /// By referenced table.
    pub foreign_keys: HashMap<u32, Vec<ForeignKey>>,
    /// By table.
    pub triggers: HashMap<u32, Vec<Trigger>>,
    /// (parent, child), partitions included.
    pub inherits: Vec<(u32, u32)>,
    /// Tables whose defaults or checks call a function that may write.
    pub calling: HashSet<u32>,
    pub functions: HashSet<String>,
    pub callable: HashSet<String>,
    /// Names of the system's functions that give the same on each server.
    pub reproducible: HashSet<String>,
    pub writing_functions: HashSet<String>,
    /// Views that call a function that may write, themselves.
    pub writing_views: HashSet<u32>,
    /// (view, relation that it reads).
    pub view_reads: Vec<(u32, u32)>,
    /// Sequences: schema, name, and the table that owns it, or 0.
    pub sequences: Vec<(String, String, u32)>,
    /// (role, table) that may write and not read.
    pub no_select: Vec<(String, u32)>,
}

/// Schemas whose relations are no user's.
const USER_SCHEMA: &str =
    "n.nspname NOT IN ('pg_catalog', 'information_schema', 'crossfade') AND n.nspname !~ '^pg_(toast|temp)'";

/// Functions that may write. C functions of extensions do not, but for those that run SQL text or reach large objects. An aggregate
/// is marked immutable whatever its transition function does. Those of schema crossfade are of users as well: what a role of that name makes
/// without naming a schema comes to stand there.
const WRITING: &str = "
    SELECT p.oid, p.proname FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
    WHERE p.pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
      AND l.lanname <> 'internal' AND p.provolatile <> 'i'
      AND NOT (l.lanname = 'c' AND p.proname !~ '^(dblink|lo_|xpath_table|check_foreign_key)' AND EXISTS (SELECT FROM pg_depend d
               WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'))
    UNION
    SELECT a.oid, a.proname FROM pg_proc a JOIN pg_aggregate g ON g.aggfnoid = a.oid
      JOIN pg_proc p ON p.oid IN (g.aggtransfn, g.aggfinalfn) JOIN pg_language l ON l.oid = p.prolang
    WHERE p.pronamespace <> 'pg_catalog'::regnamespace AND l.lanname NOT IN ('internal', 'c') AND p.provolatile <> 'i'";

/// Reads everything. The caller's session is in a transaction with search_path `pg_catalog`.
pub(super) async fn server(client: &Client) -> Result<Server, Error> {
    let row = client
        .query_one("SELECT current_setting('server_version_num')::int, current_setting('server_encoding')", &[])
        .await?;
    let version = row.get::<_, i32>(0) as u32;
    let (functions, writing_functions) = functions(client).await?;
    Ok(Server {
        version,
        encoding: row.get(1),
        relations: relations(client).await?,
        attributes: attributes(client).await?,
        types: types(client, version).await?,
        indexes: indexes(client).await?,
        foreign_keys: foreign_keys(client).await?,
        triggers: triggers(client).await?,
        inherits: pairs(client, "SELECT inhparent, inhrelid FROM pg_inherits").await?,
        calling: calling(client).await?,
        functions,
        callable: callable(client, version).await?,
        reproducible: reproducible(client).await?,
        writing_functions,
        writing_views: writing_views(client).await?,
        view_reads: pairs(client, VIEW_READS).await?,
        sequences: sequences(client).await?,
        no_select: no_select(client).await?,
    })
}

async fn sequences(client: &Client) -> Result<Vec<(String, String, u32)>, Error> {
    let query = format!(
        "SELECT n.nspname::text, c.relname::text, coalesce((SELECT d.refobjid FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') LIMIT 1), 0::oid)
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'S' AND {USER_SCHEMA}"
    );
    Ok(client.query(&query, &[]).await?.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

fn character(row: &tokio_postgres::Row, column: usize) -> char {
    row.get::<_, &str>(column).chars().next().unwrap_or(' ')
}

async fn pairs(client: &Client, query: &str) -> Result<Vec<(u32, u32)>, Error> {
    Ok(client.query(query, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn relations(client: &Client) -> Result<HashMap<u32, Relation>, Error> {
    let query = format!(
        "SELECT c.oid, n.nspname::text, c.relname::text, c.relkind::text, c.relispartition, c.relrowsecurity,
                EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = c.oid AND r.rulename <> '_RETURN' AND r.ev_enabled IN ('O', 'A')),
                EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0 AND d.deptype = 'e')
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND {USER_SCHEMA}"
    );
    let rows = client.query(&query, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| Relation {
            oid: row.get(0),
            schema: row.get(1),
            name: row.get(2),
            kind: character(row, 3),
            partition: row.get(4),
            row_security: row.get(5),
            rules: row.get(6),
            of_extension: row.get(7),
        })
        .map(|relation| (relation.oid, relation))
        .collect())
}

/// Since PostgreSQL 18 a column whose NOT NULL is NOT VALID counts as not null, though it may hold NULLs; and generated columns may be virtual.
async fn attributes(client: &Client) -> Result<HashMap<u32, Vec<Attribute>>, Error> {
    let query = format!(
        "SELECT a.attrelid, a.attnum, a.attname::text, a.atttypid, format_type(a.atttypid, a.atttypmod), a.atttypmod,
                a.attnotnull AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = a.attrelid AND k.contype = 'n' AND NOT k.convalidated AND k.conkey[1] = a.attnum),
                a.attgenerated <> '', a.attidentity = 'a'
         FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND a.attnum > 0 AND NOT a.attisdropped AND {USER_SCHEMA}
         ORDER BY a.attrelid, a.attnum"
    );
    let mut found: HashMap<u32, Vec<Attribute>> = HashMap::new();
    for row in client.query(&query, &[]).await? {
        found.entry(row.get(0)).or_default().push(Attribute {
            number: row.get(1),
            name: row.get(2),
            type_oid: row.get(3),
            type_text: row.get(4),
            type_modifier: row.get(5),
            not_null: row.get(6),
            generated: row.get(7),
            identity_always: row.get(8),
        });
    }
    Ok(found)
}

/// The types that columns use, and those inside them: elements, bases, fields, subtypes.
async fn types(client: &Client, version: u32) -> Result<HashMap<u32, Type>, Error> {
    // Multiranges came with 14.
    let multirange = if version >= 140_000 { "m.rngmultitypid" } else { "NULL::oid" };
    let query = format!(
        "WITH RECURSIVE used(oid) AS (
            SELECT DISTINCT a.atttypid FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND a.attnum > 0 AND NOT a.attisdropped AND {USER_SCHEMA}
            UNION
            SELECT inside.oid FROM used JOIN pg_type t ON t.oid = used.oid CROSS JOIN LATERAL (
                SELECT t.typelem AS oid UNION ALL SELECT t.typbasetype
                UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE r.rngtypid = t.oid
                UNION ALL SELECT m.rngtypid FROM pg_range m WHERE {multirange} = t.oid
                UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = t.typrelid AND t.typtype = 'c' AND a.attnum > 0 AND NOT a.attisdropped
            ) inside WHERE inside.oid <> 0)
         SELECT t.oid, n.nspname::text, t.typname::text, format_type(t.oid, -1), t.typtype::text,
                coalesce((SELECT pn.nspname || '.' || p.proname FROM pg_proc p JOIN pg_namespace pn ON pn.oid = p.pronamespace WHERE p.oid = t.typsend), ''),
                t.typreceive <> 0,
                EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'),
                t.typelem, t.typbasetype,
                coalesce((SELECT r.rngsubtype FROM pg_range r WHERE r.rngtypid = t.oid), 0),
                coalesce((SELECT m.rngtypid FROM pg_range m WHERE {multirange} = t.oid), 0),
                ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = t.typrelid AND t.typtype = 'c' AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum),
                ARRAY(SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = t.typrelid AND t.typtype = 'c' AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum)
         FROM used JOIN pg_type t ON t.oid = used.oid JOIN pg_namespace n ON n.oid = t.typnamespace"
    );
    let rows = client.query(&query, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| {
            let names: Vec<String> = row.get(12);
            let oids: Vec<u32> = row.get(13);
            let found = Type {
                schema: row.get(1),
                name: row.get(2),
                text: row.get(3),
                kind: character(row, 4),
                send: row.get(5),
                receives: row.get(6),
                of_extension: row.get(7),
                element: row.get(8),
                base: row.get(9),
                subtype: row.get(10),
                range: row.get(11),
                fields: names.into_iter().zip(oids).collect(),
            };
            (row.get(0), found)
        })
        .collect())
}

/// Of PostgreSQL 18's temporal keys (WITHOUT OVERLAPS) none: they are exclusion constraints, which find no row by its key.
async fn indexes(client: &Client) -> Result<HashMap<u32, Vec<Index>>, Error> {
    let query = format!(
        "SELECT i.indrelid, i.indimmediate,
                ARRAY(SELECT k.attnum FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, at) WHERE k.at <= i.indnkeyatts ORDER BY k.at),
                ARRAY(SELECT coalesce(l.collisdeterministic, true) FROM unnest(i.indcollation::oid[]) WITH ORDINALITY k(oid, at)
                      LEFT JOIN pg_collation l ON l.oid = k.oid WHERE k.at <= i.indnkeyatts ORDER BY k.at),
                ARRAY(SELECT coalesce((SELECT 'OPERATOR(' || quote_ident(s.nspname) || '.' || o.oprname || ')'
                                FROM pg_opclass y JOIN pg_amop a ON a.amopfamily = y.opcfamily AND a.amopstrategy = 3
                                     AND a.amoplefttype = y.opcintype AND a.amoprighttype = y.opcintype
                                JOIN pg_operator o ON o.oid = a.amopopr JOIN pg_namespace s ON s.oid = o.oprnamespace
                                WHERE y.oid = k.oid LIMIT 1), 'OPERATOR(pg_catalog.=)')
                      FROM unnest(i.indclass::oid[]) WITH ORDINALITY k(oid, at) WHERE k.at <= i.indnkeyatts ORDER BY k.at)
         FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE i.indisunique AND NOT i.indisexclusion AND i.indisvalid AND i.indisready AND i.indpred IS NULL AND i.indexprs IS NULL
           AND NOT c.relispartition AND c.relkind IN ('r', 'p') AND {USER_SCHEMA}
         ORDER BY i.indrelid, i.indisprimary DESC, x.relname COLLATE \"C\", x.oid"
    );
    let mut found: HashMap<u32, Vec<Index>> = HashMap::new();
    for row in client.query(&query, &[]).await? {
        found.entry(row.get(0)).or_default().push(Index {
            immediate: row.get(1),
            columns: row.get(2),
            deterministic: row.get(3),
            equals: row.get(4),
        });
    }
    Ok(found)
}

async fn foreign_keys(client: &Client) -> Result<HashMap<u32, Vec<ForeignKey>>, Error> {
    let query = "SELECT confrelid, conrelid, confkey, confupdtype IN ('c', 'n', 'd'), confdeltype IN ('c', 'n', 'd')
                 FROM pg_constraint WHERE contype = 'f' AND conparentid = 0";
    let mut found: HashMap<u32, Vec<ForeignKey>> = HashMap::new();
    for row in client.query(query, &[]).await? {
        found.entry(row.get(0)).or_default().push(ForeignKey {
            referencing: row.get(1),
            referenced_columns: row.get(2),
            cascades_update: row.get(3),
            cascades_delete: row.get(4),
        });
    }
    Ok(found)
}

/// Of a user's tables. The fence and those of lazy tables are ours: they change nothing and write nothing of the application's but what old has.
async fn triggers(client: &Client) -> Result<HashMap<u32, Vec<Trigger>>, Error> {
    let query = "SELECT t.tgrelid, t.tgtype, p.proname::text, l.lanname::text, p.prosrc
                 FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_language l ON l.oid = p.prolang
                 WHERE NOT t.tgisinternal AND t.tgenabled IN ('O', 'A')
                   AND NOT (t.tgname ~ '^~?crossfade_' AND p.proname ~ '^(fence|lazy_[a-z]+_[0-9]+)$' AND p.pronamespace = to_regnamespace('crossfade'))";
    let mut found: HashMap<u32, Vec<Trigger>> = HashMap::new();
    for row in client.query(query, &[]).await? {
        found.entry(row.get(0)).or_default().push(Trigger {
            bits: row.get(1),
            function: row.get(2),
            language: row.get(3),
            body: row.get(4),
        });
    }
    Ok(found)
}

/// Tables whose defaults, generated columns or checks call a function that may write.
async fn calling(client: &Client) -> Result<HashSet<u32>, Error> {
    let query = format!(
        "WITH writing AS MATERIALIZED ({WRITING})
         SELECT a.adrelid FROM pg_attrdef a JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid
                AND d.refclassid = 'pg_proc'::regclass JOIN writing w ON w.oid = d.refobjid
         UNION
         SELECT k.conrelid FROM pg_constraint k JOIN pg_depend d ON d.classid = 'pg_constraint'::regclass AND d.objid = k.oid
                AND d.refclassid = 'pg_proc'::regclass JOIN writing w ON w.oid = d.refobjid WHERE k.conrelid <> 0"
    );
    Ok(client.query(&query, &[]).await?.iter().map(|row| row.get(0)).collect())
}

async fn functions(client: &Client) -> Result<(HashSet<String>, HashSet<String>), Error> {
    let query = format!(
        "WITH writing AS MATERIALIZED ({WRITING})
         SELECT p.proname::text, bool_or(w.oid IS NOT NULL) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
         LEFT JOIN writing w ON w.oid = p.oid WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_temp' GROUP BY 1"
    );
    let rows = client.query(&query, &[]).await?;
    let all = rows.iter().map(|row| row.get(0)).collect();
    let writing = rows.iter().filter(|row| row.get(1)).map(|row| row.get(0)).collect();
    Ok((all, writing))
}

/// Parts of the grammar that are written like calls, and the version that they came with.
const GRAMMAR: &[(u32, &[&str])] = &[
    (160_000, &["json_array", "json_arrayagg", "json_objectagg"]),
    (170_000, &["json", "json_exists", "json_query", "json_scalar", "json_serialize", "json_table", "json_value"]),
];

/// Names that are written like a function's and are no user's: the system's functions, and types (a cast). Ours are none of them: each move makes one.
async fn callable(client: &Client, version: u32) -> Result<HashSet<String>, Error> {
    let query = "SELECT p.proname::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                 WHERE n.nspname IN ('pg_catalog', 'information_schema') UNION SELECT t.typname::text
                 FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.typelem = 0 AND n.nspname <> 'crossfade'";
    let there = client.query(query, &[]).await?;
    let grammar = GRAMMAR.iter().filter(|(since, _)| version >= *since).flat_map(|(_, names)| *names);
    Ok(there.iter().map(|row| row.get(0)).chain(grammar.map(|name| name.to_string())).collect())
}

/// What is STABLE depends on settings, which a session has the same on both sides; but for what tells the time, or of the session, the server or its catalogs.
async fn reproducible(client: &Client) -> Result<HashSet<String>, Error> {
    let query = "SELECT p.proname::text FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace
                 AND p.proname !~ '^(pg_|has_|inet_|txid_|current|session|to_reg|lo_|binary_upgrade|row_security|getpgusername)'
                 AND p.proname NOT IN ('age', 'col_description', 'database_to_xml', 'format_type', 'getdatabaseencoding', 'hashoid', 'now', 'obj_description',
                     'oid', 'schema_to_xml', 'shobj_description', 'statement_timestamp', 'table_to_xml', 'transaction_timestamp',
                     'version', 'unicode_version', 'icu_unicode_version')
                 GROUP BY 1 HAVING bool_and(p.provolatile <> 'v')";
    Ok(client.query(query, &[]).await?.iter().map(|row| row.get(0)).collect())
}

const VIEW_READS: &str = "SELECT DISTINCT r.ev_class, d.refobjid FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
      AND d.refclassid = 'pg_class'::regclass WHERE r.rulename = '_RETURN' AND d.refobjid <> r.ev_class";

/// Views that call a function that may write, by name or behind an operator.
async fn writing_views(client: &Client) -> Result<HashSet<u32>, Error> {
    let query = format!(
        "WITH writing AS MATERIALIZED ({WRITING})
         SELECT r.ev_class FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
              LEFT JOIN pg_operator o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
              JOIN writing w ON w.oid = CASE WHEN d.refclassid = 'pg_proc'::regclass THEN d.refobjid ELSE o.oprcode::oid END
         WHERE r.rulename = '_RETURN'"
    );
    Ok(client.query(&query, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// Only SELECT on the whole table counts: `tableoid` is no column that a column privilege reaches.
async fn no_select(client: &Client) -> Result<Vec<(String, u32)>, Error> {
    let query = format!(
        "SELECT r.rolname::text, c.oid FROM pg_roles r CROSS JOIN pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE NOT r.rolsuper AND c.relkind IN ('r', 'p') AND {USER_SCHEMA}
           AND (has_table_privilege(r.oid, c.oid, 'INSERT, UPDATE, DELETE') OR has_any_column_privilege(r.oid, c.oid, 'INSERT, UPDATE'))
           AND NOT has_table_privilege(r.oid, c.oid, 'SELECT')"
    );
    Ok(client.query(&query, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}
