//! What both sides should have alike, by name or by text: constraints, indexes, triggers, policies, sequences, extensions, functions, views, types.

use std::collections::BTreeMap;

use super::{CheckError, Level, View};
use crate::catalog::Sides;
use crate::phase::Side;

/// One kind of thing, and how bad it is where the sides differ. None: not at all.
struct Kind {
    name: &'static str,
    /// Its table's OID (0: none), what identifies it there, its text, SQL that makes it and SQL that removes it. `%T` stands for the
    /// table's name. Of a table: `$1` are OIDs.
    query: &'static str,
    of_table: bool,
    only_old: Option<Level>,
    only_new: Option<Level>,
    differs: Option<Level>,
    /// What it means where new has it alone.
    meaning: &'static str,
}

const ERROR: Option<Level> = Some(Level::Error);
const WARNING: Option<Level> = Some(Level::Warning);
const REFUSES: &str = "new refuses rows that old takes";

const KINDS: &[Kind] = &[
    Kind {
        name: "check constraint",
        query: "SELECT conrelid, pg_get_constraintdef(oid), '', format('ALTER TABLE %%T ADD CONSTRAINT %I %s;', conname, pg_get_constraintdef(oid)), \
            format('ALTER TABLE %%T DROP CONSTRAINT %I;', conname) FROM pg_constraint WHERE contype IN ('c', 'x') AND conrelid = ANY($1)",
        of_table: true,
        only_old: WARNING,
        only_new: ERROR,
        differs: None,
        meaning: REFUSES,
    },
    Kind {
        name: "unique index",
        query: "SELECT i.indrelid, regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING ', '') || CASE WHEN i.indimmediate THEN '' ELSE ' DEFERRABLE' END, '', \
            CASE WHEN k.oid IS NULL THEN 'CREATE UNIQUE INDEX ON %T USING ' || regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING ', '') || ';' \
            ELSE format('ALTER TABLE %%T ADD CONSTRAINT %I %s;', k.conname, pg_get_constraintdef(k.oid)) END, \
            CASE WHEN k.oid IS NULL THEN format('DROP INDEX %s;', i.indexrelid::regclass) ELSE format('ALTER TABLE %%T DROP CONSTRAINT %I;', k.conname) END \
            FROM pg_index i LEFT JOIN pg_constraint k ON k.conindid = i.indexrelid AND k.contype IN ('p', 'u') \
            WHERE i.indisunique AND i.indisvalid AND i.indrelid = ANY($1)",
        of_table: true,
        only_old: WARNING,
        only_new: ERROR,
        differs: None,
        meaning: REFUSES,
    },
    Kind {
        name: "index",
        query: "SELECT i.indrelid, regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING ', ''), '', \
            'CREATE INDEX ON %T USING ' || regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING ', '') || ';', '' \
            FROM pg_index i WHERE NOT i.indisunique AND NOT i.indisexclusion AND i.indrelid = ANY($1)",
        of_table: true,
        only_old: WARNING,
        only_new: None,
        differs: None,
        meaning: "",
    },
    Kind {
        name: "foreign key",
        query: "SELECT conrelid, pg_get_constraintdef(oid), '', format('ALTER TABLE %%T ADD CONSTRAINT %I %s;', conname, pg_get_constraintdef(oid)), \
            format('ALTER TABLE %%T DROP CONSTRAINT %I;', conname) FROM pg_constraint WHERE contype = 'f' AND conparentid = 0 AND conrelid = ANY($1)",
        of_table: true,
        only_old: WARNING,
        only_new: WARNING,
        differs: None,
        meaning: "it is not checked while new is the mirror, and refuses rows when new is the authority",
    },
    Kind {
        name: "trigger",
        query: "SELECT tgrelid, tgname::text, regexp_replace(pg_get_triggerdef(oid), ' ON \\S+ ', ' ON %T ') || CASE WHEN tgenabled = 'D' THEN ' (disabled)' ELSE '' END, \
            regexp_replace(pg_get_triggerdef(oid), ' ON \\S+ ', ' ON %T ') || ';', format('DROP TRIGGER %I ON %%T;', tgname) \
            FROM pg_trigger WHERE NOT tgisinternal AND tgname <> 'crossfade_fence' AND tgrelid = ANY($1)",
        of_table: true,
        only_old: WARNING,
        only_new: WARNING,
        differs: WARNING,
        meaning: "it fires when new is the authority",
    },
    Kind {
        name: "policy",
        query: "SELECT p.polrelid, p.polname::text, concat_ws(' ', p.polcmd, p.polpermissive, pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid)), \
            format('CREATE POLICY %I ON %%T ...;', p.polname), format('DROP POLICY %I ON %%T;', p.polname) FROM pg_policy p WHERE p.polrelid = ANY($1)",
        of_table: true,
        only_old: WARNING,
        only_new: WARNING,
        differs: WARNING,
        meaning: "it hides or refuses rows when new is the authority",
    },
    Kind {
        name: "extension",
        query: "SELECT 0::oid, extname::text, extversion, format('CREATE EXTENSION %I;', extname), '' FROM pg_extension",
        of_table: false,
        only_old: ERROR,
        only_new: None,
        differs: WARNING,
        meaning: "",
    },
    Kind {
        name: "sequence",
        query: "SELECT 0::oid, format('%I.%I', n.nspname, c.relname), concat_ws(' ', format_type(s.seqtypid, NULL), s.seqincrement, s.seqmin, s.seqmax, s.seqcycle), \
            format('CREATE SEQUENCE %I.%I AS %s INCREMENT %s MINVALUE %s MAXVALUE %s%s;', n.nspname, c.relname, format_type(s.seqtypid, NULL), s.seqincrement, s.seqmin, s.seqmax, CASE WHEN s.seqcycle THEN ' CYCLE' END), '' \
            FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
            WHERE n.nspname <> 'crossfade' AND n.nspname !~ '^pg_'",
        of_table: false,
        only_old: ERROR,
        only_new: None,
        differs: WARNING,
        meaning: "",
    },
    Kind {
        name: "function",
        query: "SELECT 0::oid, p.oid::regprocedure::text, '', format('take it over by pg_dump --schema-only, or run what SELECT pg_get_functiondef(%L::regprocedure) gives on old', p.oid::regprocedure), '' FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
            WHERE p.prokind IN ('f', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'crossfade') AND n.nspname !~ '^pg_' \
            AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')",
        of_table: false,
        only_old: WARNING,
        only_new: None,
        differs: None,
        meaning: "",
    },
    Kind {
        name: "view",
        query: "SELECT 0::oid, format('%I.%I', n.nspname, c.relname), '', format('CREATE %s %I.%I AS %s', CASE c.relkind WHEN 'v' THEN 'VIEW' ELSE 'MATERIALIZED VIEW' END, n.nspname, c.relname, pg_get_viewdef(c.oid)), '' \
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
            WHERE c.relkind IN ('v', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'crossfade') AND n.nspname !~ '^pg_' \
            AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')",
        of_table: false,
        only_old: WARNING,
        only_new: None,
        differs: None,
        meaning: "",
    },
    Kind {
        name: "enum value",
        query: "SELECT 0::oid, format('%s: %L', e.enumtypid::regtype, e.enumlabel), '', format('ALTER TYPE %s ADD VALUE %L;', e.enumtypid::regtype, e.enumlabel), '' FROM pg_enum e",
        of_table: false,
        only_old: ERROR,
        only_new: None,
        differs: None,
        meaning: "",
    },
    Kind {
        name: "domain constraint",
        query: "SELECT 0::oid, format('%s: %s', contypid::regtype, pg_get_constraintdef(oid)), '', \
            format('ALTER DOMAIN %s ADD CONSTRAINT %I %s;', contypid::regtype, conname, pg_get_constraintdef(oid)), format('ALTER DOMAIN %s DROP CONSTRAINT %I;', contypid::regtype, conname) \
            FROM pg_constraint WHERE contypid <> 0 AND connamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)",
        of_table: false,
        only_old: WARNING,
        only_new: ERROR,
        differs: None,
        meaning: REFUSES,
    },
];

struct Fact {
    text: String,
    create: String,
    drop: String,
}

/// By table (its number; 0: of the database) and what identifies it there.
type Facts = BTreeMap<(u32, String), Fact>;

pub(super) async fn compare(view: &mut View<'_>) -> Result<(), CheckError> {
    for kind in KINDS {
        let facts = Sides { old: read(view, kind, Side::Old).await?, new: read(view, kind, Side::New).await? };
        for (key, fact) in &facts.old {
            match facts.new.get(key) {
                // It stays on old.
                None if matches!(kind.name, "sequence" | "view") && view.catalog.stays.has_label(&key.1) => {}
                None => tell(view, kind.only_old, kind, key, format!("{} is missing on new", key.1), &fact.create),
                Some(other) if other.text != fact.text => {
                    let what = format!("{} is {} on old and {} on new", key.1, fact.text, other.text);
                    let mend = match kind.name {
                        "extension" => format!("ALTER EXTENSION {} UPDATE; where the same version is to be had", key.1),
                        _ => format!("{} {}", other.drop, fact.create).trim().to_owned(),
                    };
                    tell(view, kind.differs, kind, key, what, &mend);
                }
                Some(_) => {}
            }
        }
        for (key, fact) in facts.new.iter().filter(|(key, _)| !facts.old.contains_key(*key)) {
            tell(view, kind.only_new, kind, key, format!("{} is on new only: {}", key.1, kind.meaning), &fact.drop);
        }
    }
    always(view).await?;
    large_objects(view).await
}

fn tell(view: &mut View<'_>, level: Option<Level>, kind: &Kind, key: &(u32, String), what: String, mend: &str) {
    let Some(level) = level else { return };
    let table = view.catalog.tables.get(&key.0);
    let object = table.map_or_else(|| key.1.clone(), |table| table.label());
    let name = table.map(|table| table.qualified(Side::New)).unwrap_or_default();
    let (what, mend) = (what.replace("%T", &name), mend.replace("%T", &name));
    view.found.push(super::Finding { level, kind: kind.name, side: Side::New, object, what, mend });
}

async fn read(view: &View<'_>, kind: &Kind, side: Side) -> Result<Facts, CheckError> {
    let rows = match kind.of_table {
        true => view.rows(side, kind.name, kind.query, &[&view.oids(side)]).await?,
        false => view.rows(side, kind.name, kind.query, &[]).await?,
    };
    let fact = |row: &tokio_postgres::Row| {
        let number = view.catalog.by_oid.get(side).get(&row.get::<_, u32>(0)).map_or(0, |table| table.number);
        let fact = Fact { text: row.get(2), create: row.get(3), drop: row.get(4) };
        ((number, row.get(1)), fact)
    };
    Ok(rows.iter().map(fact).collect())
}

/// Triggers that fire in sessions of the mirror, too: what they do is done twice.
async fn always(view: &mut View<'_>) -> Result<(), CheckError> {
    let text = "SELECT tgrelid, tgname::text FROM pg_trigger WHERE NOT tgisinternal AND tgenabled IN ('A', 'R') AND tgrelid = ANY($1)";
    for side in Side::BOTH {
        let oids: Vec<u32> = view.tables.iter().flat_map(|table| table.oids(side)).collect();
        for row in view.rows(side, "triggers", text, &[&oids]).await? {
            let Some(table) = view.catalog.by_oid.get(side).get(&row.get::<_, u32>(0)) else { continue };
            let name: String = row.get(1);
            let what = format!(
                "trigger {name} is enabled ALWAYS or for replicas: it fires on rows that are mirrored to {side}, too"
            );
            let mend =
                format!("ALTER TABLE {} ENABLE TRIGGER {};", table.qualified(side), crate::catalog::quote(&name));
            view.error("trigger", side, &table.label(), what, mend);
        }
    }
    Ok(())
}

async fn large_objects(view: &mut View<'_>) -> Result<(), CheckError> {
    let text = "SELECT count(*) FROM (SELECT FROM pg_largeobject_metadata LIMIT 1000) l";
    let count: i64 = view.rows(Side::Old, "large objects", text, &[]).await?[0].get(0);
    if count > 0 {
        let what = format!(
            "{count}{} large objects are on old: they are not carried",
            if count == 1000 { " or more" } else { "" }
        );
        let mend = "copy them by hand, with their numbers (lo_export, lo_import), when nobody writes them".to_owned();
        view.warning("large object", Side::Old, "pg_largeobject", what, mend);
    }
    Ok(())
}
