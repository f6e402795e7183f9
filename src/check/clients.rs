//! What the application's roles have on one side and lack on the other; and who may write and not read.

use std::collections::{BTreeMap, BTreeSet};

use super::{CheckError, View};
use crate::auth::verifiers::Secret;
use crate::catalog::{Sides, quote};
use crate::config::{AuthMethod, Config};
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

/// What they have on the side that `loses` authority, and lack on the other. Gives those that log in and are there.
pub(super) async fn lacking(view: &mut View<'_>, loses: Side) -> Result<Vec<String>, CheckError> {
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
    let mut logins = Vec::new();
    for (name, role) in roles.get(loses) {
        if role.logs_in && there.contains_key(name) {
            logins.push(name.clone());
        }
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
    Ok(logins)
}

/// Of roles ($1): may it log in, and what its password is kept as. What is kept never leaves the server: equal digests are enough.
const PASSWORDS: &str = "SELECT rolname::text, rolcanlogin, encode(sha256(convert_to(rolpassword, 'UTF8')), 'hex') FROM pg_authid WHERE rolname = ANY ($1)";

/// Which of these roles could not log in on the side that gains authority. Crossfade logs in there by what the client's login has shown of its password, which
/// is good only where the same verifier is kept.
pub(super) async fn passwords(
    view: &mut View<'_>,
    config: &Config,
    loses: Side,
    logins: &[String],
) -> Result<(), CheckError> {
    // A password in the clear, the file's or the client's, is good for any verifier of it.
    let passed_through = matches!(config.auth, AuthMethod::Scram | AuthMethod::Md5);
    let in_the_clear = |name: &String| {
        config.users.get(name).is_some_and(|user| matches!(Secret::read(&user.password), Secret::Password(_)))
    };
    let roles: Vec<&String> = logins.iter().filter(|name| !in_the_clear(name)).collect();
    if !passed_through || roles.is_empty() {
        return Ok(());
    }
    let gains = loses.other();
    let mut kept = Sides::<BTreeMap<String, (bool, Option<String>)>>::default();
    for side in Side::BOTH {
        let may = "SELECT has_table_privilege('pg_authid', 'SELECT'), quote_ident(current_user)";
        let row = &view.rows(side, "the control role", may, &[]).await?[0];
        if !row.get::<_, bool>(0) {
            let what = format!(
                "it cannot be seen whether clients can log in on {gains} with the passwords that they have on {loses}: pg_authid of {side} is not readable"
            );
            let mend = format!("GRANT SELECT ON pg_authid TO {}; or list clients in `users:`", row.get::<_, String>(1));
            view.warning("password", side, "pg_authid", what, mend);
            return Ok(());
        }
        for row in view.rows(side, "passwords", PASSWORDS, &[&roles]).await? {
            kept.get_mut(side).insert(row.get(0), (row.get(1), row.get(2)));
        }
    }
    for name in roles {
        let (Some((_, here)), Some((may_login, there))) = (kept.get(loses).get(name), kept.get(gains).get(name)) else {
            continue;
        };
        if !may_login {
            let what = format!("role {name} may not log in on {gains}");
            view.error("password", gains, name, what, format!("ALTER ROLE {} LOGIN;", quote(name)));
        }
        if here.is_some() && here != there {
            let what = match there {
                Some(_) => format!(
                    "role {name} has another password on {gains}, or another salt for the same: its clients could not log in there"
                ),
                None => format!("role {name} has no password on {gains}: its clients could not log in there"),
            };
            let name_text = name.replace('\'', "''");
            let mend = format!(
                "run on {gains} what this prints on {loses}: SELECT format('ALTER ROLE %I PASSWORD %L;', rolname, rolpassword) FROM pg_authid WHERE rolname = '{name_text}';"
            );
            view.error("password", gains, name, what, mend);
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
