//! What the application's roles have on one side and lack on the other; and who may write and not read.

use std::collections::{BTreeMap, BTreeSet};

use super::{CheckError, View};
use crate::catalog::{Sides, quote};
use crate::phase::Side;

/// Roles that are no superusers and may do something with the migrating tables: role, may log in, table, privilege.
const GRANTS: &str = "SELECT r.rolname::text, r.rolcanlogin, c.oid, p FROM pg_roles r CROSS JOIN pg_class c \
    CROSS JOIN unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE}'::text[]) p \
    WHERE c.oid = ANY($1) AND NOT r.rolsuper AND r.rolname !~ '^pg_' AND has_table_privilege(r.oid, c.oid, p)";

#[derive(Default)]
struct Role {
    logs_in: bool,
    /// Table's number and privilege.
    may: BTreeSet<(u32, String)>,
}

/// What they have on old and lack on new; and who may write and not read.
pub(super) async fn compare(view: &mut View<'_>) -> Result<(), CheckError> {
    lacking(view, Side::Old).await?;
    unread(view);
    Ok(())
}

/// What they have on the side that `loses` authority, and lack on the other.
pub(super) async fn lacking(view: &mut View<'_>, loses: Side) -> Result<(), CheckError> {
    let gains = loses.other();
    let mut roles = Sides::<BTreeMap<String, Role>>::default();
    for side in Side::BOTH {
        for row in view.rows(side, "privileges", GRANTS, &[&view.oids(side)]).await? {
            let Some(table) = view.catalog.by_oid.get(side).get(&row.get::<_, u32>(2)) else { continue };
            let role = roles.get_mut(side).entry(row.get(0)).or_default();
            role.logs_in = row.get(1);
            role.may.insert((table.number, row.get(3)));
        }
    }
    // A superuser there may do all of it.
    let all = "SELECT rolname::text, rolsuper FROM pg_roles";
    let there: BTreeMap<String, bool> =
        view.rows(gains, "roles", all, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect();
    for (name, role) in roles.get(loses) {
        match there.get(name) {
            Some(true) => continue,
            Some(false) => {}
            None => {
                let what = format!("role {name} is missing on {gains}");
                let login = if role.logs_in { " LOGIN PASSWORD '...'" } else { "" };
                let mend = format!("CREATE ROLE {}{login}; (pg_dumpall --roles-only keeps the password)", quote(name));
                view.error("role", gains, name, what, mend);
            }
        }
        let none = BTreeSet::new();
        let there = roles.get(gains).get(name).map_or(&none, |role| &role.may);
        let mut lacks: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
        for (number, privilege) in role.may.difference(there) {
            lacks.entry(*number).or_default().push(privilege);
        }
        for (number, privileges) in lacks {
            let table = &view.catalog.tables[&number];
            let list = privileges.join(", ");
            let mend = format!("GRANT {list} ON {} TO {};", table.qualified(gains), quote(name));
            view.error("privilege", gains, &table.label(), format!("role {name} lacks {list} on {gains}"), mend);
        }
    }
    Ok(())
}

/// A hidden RETURNING needs SELECT: without it such a role's writes are opaque.
fn unread(view: &mut View<'_>) {
    for side in Side::BOTH {
        let mut refused: Vec<&(String, u32)> =
            view.catalog.no_select.get(side).iter().filter(|(role, _)| !role.starts_with("pg_")).collect();
        refused.sort();
        for (role, number) in refused {
            let Some(table) = view.catalog.tables.get(number) else { continue };
            let what = format!("role {role} may write and not read: its writes are opaque, and taint the table");
            let mend = format!("GRANT SELECT ON {} TO {};", table.qualified(side), quote(role));
            view.warning("privilege", side, &table.label(), what, mend);
        }
    }
}
