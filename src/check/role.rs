//! What the control role lacks (the table in README.md, *What the control role needs*).

use super::{CheckError, View};
use crate::phase::Side;

/// The kind of a finding after which nothing more can be read.
pub(super) const BARRED: &str = "control role";
pub(super) const PRIVILEGE: &str = "control privilege";

/// What holds whatever tables there are. `verifiers`: clients' verifiers are to be read from old's pg_authid.
pub(super) async fn attributes(view: &mut View<'_>, verifiers: bool) -> Result<(), CheckError> {
    for side in Side::BOTH {
        let version = "SELECT current_setting('server_version_num')::int";
        let version: i32 = view.rows(side, "the version", version, &[]).await?[0].get(0);
        let replica = match version {
            150_000.. => "has_parameter_privilege('session_replication_role', 'SET')",
            _ => "(SELECT rolsuper FROM pg_roles WHERE rolname = current_user)",
        };
        let text = format!(
            "SELECT quote_ident(current_user), quote_ident(current_database()), rolsuper, {replica}, \
             has_database_privilege(current_database(), 'CREATE'), pg_has_role('pg_read_all_stats', 'USAGE'), has_table_privilege('pg_authid', 'SELECT'), \
             (SELECT pg_has_role(nspowner, 'USAGE') FROM pg_namespace WHERE nspname = 'crossfade'), \
             (SELECT count(*) FROM pg_tables WHERE schemaname = 'crossfade' AND NOT pg_has_role(tableowner, 'USAGE')) \
             FROM pg_roles WHERE rolname = current_user"
        );
        let row = &view.rows(side, "the control role", &text, &[]).await?[0];
        let (user, database): (String, String) = (row.get(0), row.get(1));
        let lacks = |at: usize| !row.get::<_, Option<bool>>(at).unwrap_or(true);
        if lacks(3) {
            let mend = match version {
                150_000.. => format!("GRANT SET ON PARAMETER session_replication_role TO {user};"),
                _ => format!("ALTER ROLE {user} SUPERUSER;"),
            };
            let what = "it may not set session_replication_role: triggers and foreign keys would act a second time on the mirror";
            view.error(PRIVILEGE, side, &user, what.to_owned(), mend);
        }
        let installed = row.get::<_, Option<bool>>(7).is_some();
        if !installed && lacks(4) {
            let what = format!("it may not make schema crossfade in database {database}");
            view.error(PRIVILEGE, side, &user, what, format!("GRANT CREATE ON DATABASE {database} TO {user};"));
        }
        if lacks(7) || row.get::<_, i64>(8) > 0 {
            let what = "schema crossfade, or a table in it, belongs to another role".to_owned();
            let mend = format!(
                "ALTER SCHEMA crossfade OWNER TO {user}; and ALTER TABLE crossfade.... OWNER TO {user}; for its tables"
            );
            view.error(BARRED, side, &user, what, mend);
        }
        if lacks(5) {
            let what =
                "it may not see what other backends do: a debt of CALL or DO waits while any backend has that pid"
                    .to_owned();
            view.warning(PRIVILEGE, side, &user, what, format!("GRANT pg_read_all_stats TO {user};"));
        }
        if side == Side::Old && verifiers && lacks(6) {
            let what = "it may not read pg_authid: clients' verifiers are not known".to_owned();
            let mend = format!("GRANT SELECT ON pg_authid TO {user}; or list clients in `users:`");
            view.error(PRIVILEGE, side, &user, what, mend);
        }
        if !row.get::<_, bool>(2) {
            let what =
                "it may not make event triggers: changes of definitions around the proxy are noticed late".to_owned();
            let mend = "let a superuser run the output of `crossfade install --print-sql`".to_owned();
            view.warning("event trigger", side, &user, what, mend);
        }
    }
    Ok(())
}

/// What it lacks on the migrating tables, their schemas, types and sequences.
pub(super) async fn privileges(view: &mut View<'_>) -> Result<(), CheckError> {
    let on_tables = "SELECT format('%I.%I', n.nspname, c.relname), string_agg(p, ', ' ORDER BY nth), quote_ident(current_user) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
        CROSS JOIN unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE}'::text[]) WITH ORDINALITY AS u(p, nth) WHERE c.oid = ANY($1) AND NOT has_table_privilege(c.oid, p) GROUP BY 1 ORDER BY 1";
    let on_schemas = "SELECT DISTINCT quote_ident(n.nspname), 'USAGE', quote_ident(current_user) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
        WHERE c.oid = ANY($1) AND NOT has_schema_privilege(n.oid, 'USAGE') ORDER BY 1";
    let on_types = "SELECT DISTINCT a.atttypid::regtype::text, 'USAGE', quote_ident(current_user) FROM pg_attribute a \
        WHERE a.attrelid = ANY($1) AND a.attnum > 0 AND NOT a.attisdropped AND NOT has_type_privilege(a.atttypid, 'USAGE') ORDER BY 1";
    let on_sequences = "SELECT format('%I.%I', n.nspname, c.relname), string_agg(p, ', ' ORDER BY nth), quote_ident(current_user) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
        CROSS JOIN unnest('{SELECT,UPDATE}'::text[]) WITH ORDINALITY AS u(p, nth) WHERE c.relkind = 'S' AND n.oid IN (SELECT relnamespace FROM pg_class WHERE oid = ANY($1)) \
        AND NOT has_sequence_privilege(c.oid, p) GROUP BY 1 ORDER BY 1";
    for side in Side::BOTH {
        let oids: Vec<u32> = view.tables.iter().flat_map(|table| table.oids(side)).collect();
        for (on, text) in [("", on_tables), ("SCHEMA ", on_schemas), ("TYPE ", on_types), ("SEQUENCE ", on_sequences)] {
            for row in view.rows(side, "privileges", text, &[&oids]).await? {
                let (name, lacks, user): (String, String, String) = (row.get(0), row.get(1), row.get(2));
                let what = format!("the control role {user} lacks {lacks}");
                view.error(PRIVILEGE, side, &name, what, format!("GRANT {lacks} ON {on}{name} TO {user};"));
            }
        }
        let bypasses =
            "SELECT rolsuper OR rolbypassrls, quote_ident(current_user) FROM pg_roles WHERE rolname = current_user";
        let row = &view.rows(side, "the control role", bypasses, &[]).await?[0];
        if !row.get::<_, bool>(0) && view.tables.iter().any(|table| *table.row_security.get(side)) {
            let user: String = row.get(1);
            let what = "a migrating table has row security, and the control role does not bypass it".to_owned();
            view.error(PRIVILEGE, side, &user, what, format!("ALTER ROLE {user} BYPASSRLS;"));
        }
    }
    Ok(())
}
