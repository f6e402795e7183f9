//! What `fence: true` needs, and where no fence stands.

use super::role::PRIVILEGE;
use super::{CheckError, View};
use crate::ledger::FENCE;
use crate::phase::Side;

const KIND: &str = "fence";

pub(super) async fn compare(view: &mut View<'_>, wanted: bool) -> Result<(), CheckError> {
    let text = "SELECT format('%I.%I', n.nspname, c.relname), quote_ident(current_user), has_table_privilege(c.oid, 'TRIGGER'), \
        coalesce((SELECT t.tgenabled::text FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = $2), ''), \
        EXISTS (SELECT FROM pg_subscription_rel s WHERE s.srrelid = c.oid) \
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY ($1) ORDER BY 1";
    for side in Side::BOTH {
        let oids: Vec<u32> = view.tables.iter().flat_map(|table| table.oids(side)).collect();
        for row in view.rows(side, "the fence", text, &[&oids, &FENCE]).await? {
            let (name, role): (String, String) = (row.get(0), row.get(1));
            let (may, enabled, subscribed): (bool, String, bool) = (row.get(2), row.get(3), row.get(4));
            match (wanted, enabled.as_str()) {
                (false, "") | (true, "O") => {}
                (false, _) => {
                    let what = "a fence is on it, and this file does not ask for one".to_owned();
                    view.warning(KIND, side, &name, what, "none but `crossfade install`: it takes it away".to_owned());
                }
                (true, "") if !may => {
                    let what = format!("the control role {role} lacks TRIGGER: no fence can be made on it");
                    view.error(PRIVILEGE, side, &name, what, format!("GRANT TRIGGER ON {name} TO {role};"));
                }
                (true, "") => {
                    let what = "no fence is on it yet: `crossfade install` and `run` make it".to_owned();
                    view.warning(KIND, side, &name, what, "none but `crossfade install`".to_owned());
                }
                (true, _) => {
                    let what = "its fence is not enabled as it was made: it keeps writes out that it must not, or none";
                    let mend = format!("ALTER TABLE {name} ENABLE TRIGGER {FENCE};");
                    view.error(KIND, side, &name, what.to_owned(), mend);
                }
            }
            if wanted && subscribed {
                let what = "a subscription writes it: the fence does not keep logical replication out".to_owned();
                view.warning(KIND, side, &name, what, "ALTER SUBSCRIPTION ... DISABLE;".to_owned());
            }
        }
    }
    Ok(())
}
