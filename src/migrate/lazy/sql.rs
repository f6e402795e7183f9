//! What a lazy table has on new, in schema crossfade, by the table's number n:
//!
//! - `old_n`: old's table, as a foreign table;
//! - `gone_n`: keys for which new speaks, whatever old has: rows that were brought over, deleted, or got another key;
//! - `missing_n`: rows that only old has; `merged_n`: all rows;
//! - `bring_n(keys)`: brings rows over. Harmless whoever calls it: it changes no row that anybody sees;
//! - triggers: one brings a row before another with its key is inserted, so that it conflicts as it must; one notes keys that are gone.

use crate::catalog::{Table, quote};
use crate::ledger::lazy as named;
use crate::phase::Side;

/// One column, as new declares it.
pub(super) struct Declared {
    pub new: String,
    pub old: String,
    /// With its modifier.
    pub kind: String,
    /// ` COLLATE ...`, or nothing.
    pub collation: String,
    pub generated: bool,
}

/// What the texts are made of.
pub(super) struct Shape<'t> {
    pub table: &'t Table,
    pub columns: Vec<Declared>,
}

/// The triggers' names. The first must come behind all others that fire before a row is written (they go by name).
pub(super) const BRING: &str = "~crossfade_lazy_bring";
pub(super) const GONE: &str = "crossfade_lazy_gone";

/// The settings of a function that acts as its owner.
const DEFINER: &str = "SECURITY DEFINER SET search_path = pg_catalog, pg_temp";

impl Shape<'_> {
    fn name(&self, what: &str) -> String {
        named(what, self.table.number)
    }

    fn only(&self) -> String {
        format!("ONLY {}", self.table.qualified(Side::New))
    }

    /// The key's columns by their names on new, with their types' names and equality.
    fn key(&self) -> Vec<(String, &str, &str)> {
        let Some(key) = &self.table.key else { return Vec::new() };
        let column = |(n, &at): (usize, &usize)| {
            let column = &self.table.columns[at];
            (quote(&column.name.new), column.kind.name.new.as_str(), key.equals.new[n].as_str())
        };
        key.columns.iter().enumerate().map(column).collect()
    }

    fn key_list(&self, of: &str) -> String {
        self.key().iter().map(|(name, ..)| format!("{of}{name}")).collect::<Vec<_>>().join(", ")
    }

    /// That two relations have the same key.
    fn same_key(&self, one: &str, other: &str) -> String {
        let equal = |(name, _, equals): &(String, &str, &str)| format!("{one}.{name} {equals} {other}.{name}");
        self.key().iter().map(equal).collect::<Vec<_>>().join(" AND ")
    }

    /// `prefix0 type[], prefix1 type[]`.
    fn arrays(&self, prefix: &str, between: &str) -> String {
        let array = |(n, (_, kind, _)): (usize, &(String, &str, &str))| format!("{prefix}{n} {kind}[]");
        self.key().iter().enumerate().map(array).collect::<Vec<_>>().join(between)
    }

    /// `unnest(prefix0, prefix1) AS alias (key columns)`.
    fn unnest(&self, prefix: &str, alias: &str) -> String {
        let arrays: Vec<String> = (0..self.key().len()).map(|n| format!("{prefix}{n}")).collect();
        format!("unnest({}) AS {alias} ({})", arrays.join(", "), self.key_list(""))
    }

    /// `array_agg(of.key column)` for each.
    fn aggregates(&self, of: &str) -> String {
        self.key().iter().map(|(name, ..)| format!("array_agg({of}.{name})")).collect::<Vec<_>>().join(", ")
    }

    fn variables(&self, prefix: &str) -> String {
        (0..self.key().len()).map(|n| format!("{prefix}{n}")).collect::<Vec<_>>().join(", ")
    }

    fn columns(&self, of: &str) -> String {
        self.columns.iter().map(|column| format!("{of}{}", quote(&column.new))).collect::<Vec<_>>().join(", ")
    }

    fn writable(&self, of: &str) -> String {
        let columns = self.columns.iter().filter(|column| !column.generated);
        columns.map(|column| format!("{of}{}", quote(&column.new))).collect::<Vec<_>>().join(", ")
    }

    /// All of it, to be run in one transaction in which none of it is there.
    pub(super) fn create(&self) -> Vec<String> {
        let [old, gone, missing, merged] = ["old", "gone", "missing", "merged"].map(|what| self.name(what));
        let declared: Vec<String> = self
            .columns
            .iter()
            .map(|column| {
                let Declared { new, old, kind, collation, .. } = column;
                format!("{} {kind}{collation} OPTIONS (column_name {})", quote(new), literal(old))
            })
            .collect();
        let keys: Vec<String> = self
            .key()
            .iter()
            .map(|(name, ..)| {
                let column = self.columns.iter().find(|column| quote(&column.new) == *name);
                column.map_or_else(String::new, |column| format!("{name} {}{}", column.kind, column.collation))
            })
            .collect();
        let (schema, name) = (&self.table.schema.old, &self.table.name.old);
        vec![
            format!(
                "CREATE FOREIGN TABLE {old} ({}) SERVER crossfade_old OPTIONS (schema_name {}, table_name {}, updatable 'false')",
                declared.join(", "),
                literal(schema),
                literal(name)
            ),
            format!("CREATE TABLE {gone} ({}, PRIMARY KEY ({}))", keys.join(", "), self.key_list("")),
            format!(
                "CREATE VIEW {missing} AS SELECT {} FROM {old} AS o WHERE NOT EXISTS (SELECT FROM {} AS n WHERE {}) \
                 AND NOT EXISTS (SELECT FROM {gone} AS g WHERE {})",
                self.columns("o."),
                self.only(),
                self.same_key("n", "o"),
                self.same_key("g", "o")
            ),
            // Whoever reads it needs what he needs to read the table itself.
            format!(
                "CREATE VIEW {merged} WITH (security_invoker = true) AS SELECT {} FROM {} UNION ALL SELECT {} FROM {missing}",
                self.columns(""),
                self.only(),
                self.columns("")
            ),
            format!("GRANT SELECT ON {merged} TO PUBLIC"),
            self.bring(),
            self.before_insert(),
            self.note_gone(),
        ]
    }

    /// Rows first, keys second, in the order of the keys: all who bring, insert or delete do it in that order, so that none waits for one who waits for him.
    /// What was noted by somebody who has brought the row and removed it, while this waited for him, goes again.
    fn bring(&self) -> String {
        let [bring, old, gone] = ["bring", "old", "gone"].map(|what| self.name(what));
        let wanted: Vec<String> =
            self.key().iter().enumerate().map(|(n, (name, ..))| format!("o.{name} = ANY (k{n})")).collect();
        let several = if self.key().len() < 2 {
            String::new()
        } else {
            format!(" AND EXISTS (SELECT FROM {} WHERE {})", self.unnest("k", "q"), self.same_key("q", "o"))
        };
        format!(
            "CREATE FUNCTION {bring}({}) RETURNS bigint LANGUAGE plpgsql {DEFINER} SET session_replication_role = replica AS $bring$\n\
             DECLARE\n    {};\n    {};\n    brought bigint := 0;\n\
             BEGIN\n\
             IF k0 IS NULL OR EXISTS (SELECT FROM crossfade.lazy WHERE number = {number} AND complete) THEN RETURN 0; END IF;\n\
             WITH rows AS (INSERT INTO {table} ({writable}) OVERRIDING SYSTEM VALUE SELECT {of_old} FROM {old} AS o WHERE {wanted}{several}\n\
                 AND NOT EXISTS (SELECT FROM {gone} AS g WHERE {g_is_o}) ORDER BY {order} ON CONFLICT DO NOTHING RETURNING {key})\n\
             SELECT {aggregates}, count(*) INTO {b}, brought FROM rows;\n\
             IF brought = 0 THEN RETURN 0; END IF;\n\
             WITH noted AS (INSERT INTO {gone} ({key}) SELECT {q_key} FROM {b_rows} ORDER BY {q_key} ON CONFLICT DO NOTHING RETURNING {key})\n\
             SELECT {noted} INTO {n} FROM noted;\n\
             IF coalesce(cardinality(n0), 0) < brought THEN\n\
                 DELETE FROM {only} AS t USING {b_rows} WHERE {t_is_q} AND NOT EXISTS (SELECT FROM {n_rows} WHERE {m_is_q});\n\
                 brought := coalesce(cardinality(n0), 0);\n\
             END IF;\n\
             RETURN brought;\n\
             END $bring$",
            self.arrays("k", ", "),
            self.arrays("b", ";\n    "),
            self.arrays("n", ";\n    "),
            number = self.table.number,
            table = self.table.qualified(Side::New),
            writable = self.writable(""),
            of_old = self.writable("o."),
            wanted = wanted.join(" AND "),
            g_is_o = self.same_key("g", "o"),
            order = self.key_list("o."),
            key = self.key_list(""),
            aggregates = self.aggregates("rows"),
            b = self.variables("b"),
            q_key = self.key_list("q."),
            b_rows = self.unnest("b", "q"),
            noted = self.aggregates("noted"),
            n = self.variables("n"),
            only = self.only(),
            t_is_q = self.same_key("t", "q"),
            n_rows = self.unnest("n", "m"),
            m_is_q = self.same_key("m", "q"),
        )
    }

    fn before_insert(&self) -> String {
        let (number, bring) = (self.table.number, self.name("bring"));
        let keys: Vec<String> = self.key().iter().map(|(name, ..)| format!("ARRAY[NEW.{name}]")).collect();
        format!(
            "CREATE FUNCTION crossfade.lazy_bring_{number}() RETURNS trigger LANGUAGE plpgsql {DEFINER} AS $bring$\n\
             BEGIN\n    PERFORM {bring}({});\n    RETURN NEW;\nEND $bring$",
            keys.join(", ")
        )
    }

    fn note_gone(&self) -> String {
        let (number, gone) = (self.table.number, self.name("gone"));
        format!(
            "CREATE FUNCTION crossfade.lazy_gone_{number}() RETURNS trigger LANGUAGE plpgsql {DEFINER} AS $gone$\n\
             BEGIN\n    INSERT INTO {gone} ({}) VALUES ({}) ON CONFLICT DO NOTHING;\n    RETURN NULL;\nEND $gone$",
            self.key_list(""),
            self.key_list("OLD.")
        )
    }

    /// The triggers, which take the table's lock. They do not fire for replicas (`session_replication_role`): images, repair and `bring` itself.
    pub(super) fn triggers(&self) -> Vec<String> {
        let (number, table) = (self.table.number, self.table.qualified(Side::New));
        let changed = format!("({}) IS DISTINCT FROM ({})", self.key_list("OLD."), self.key_list("NEW."));
        let trigger = |name: &str, suffix: &str, when: &str, condition: &str, function: &str| {
            let name = quote(&format!("{name}{suffix}"));
            format!(
                "CREATE TRIGGER {name} {when} ON {table} FOR EACH ROW {condition} EXECUTE FUNCTION crossfade.{function}_{number}()"
            )
        };
        let rekeyed = format!("WHEN ({changed})");
        vec![
            trigger(BRING, "", "BEFORE INSERT", "", "lazy_bring"),
            trigger(BRING, "_key", "BEFORE UPDATE", &rekeyed, "lazy_bring"),
            trigger(GONE, "", "AFTER DELETE", "", "lazy_gone"),
            trigger(GONE, "_key", "AFTER UPDATE", &rekeyed, "lazy_gone"),
        ]
    }

    /// Takes all of it away, where it is there.
    pub(super) fn drop(table: &Table) -> Vec<String> {
        let number = table.number;
        let mut texts: Vec<String> = [BRING, GONE]
            .iter()
            .flat_map(|name| [quote(name), quote(&format!("{name}_key"))])
            .map(|name| format!("DROP TRIGGER IF EXISTS {name} ON {}", table.qualified(Side::New)))
            .collect();
        texts.extend([
            format!("DROP VIEW IF EXISTS crossfade.merged_{number}"),
            format!("DROP VIEW IF EXISTS crossfade.missing_{number}"),
            format!("DROP FUNCTION IF EXISTS crossfade.lazy_bring_{number}"),
            format!("DROP FUNCTION IF EXISTS crossfade.lazy_gone_{number}"),
            format!("DROP FUNCTION IF EXISTS crossfade.bring_{number}"),
            format!("DROP TABLE IF EXISTS crossfade.gone_{number}"),
            format!("DROP FOREIGN TABLE IF EXISTS crossfade.old_{number}"),
        ]);
        texts
    }
}

/// A literal, whatever standard_conforming_strings is.
pub(super) fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if text.contains('\\') { format!("E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}
