//! What tables that stay on old for ever ask for, while others migrate.

use super::{CheckError, View};
use crate::phase::Side;

/// Foreign keys between a migrating table and another: referencing, referenced, and what drops it.
const FOREIGN_KEYS: &str = "SELECT conrelid::regclass::text, confrelid::regclass::text, format('ALTER TABLE %s DROP CONSTRAINT %I;', conrelid::regclass, conname), \
    conrelid = ANY($1) FROM pg_constraint WHERE contype = 'f' AND conparentid = 0 AND (conrelid = ANY($1)) <> (confrelid = ANY($1)) ORDER BY 1, 2, conname";

pub(super) async fn compare(view: &mut View<'_>) -> Result<(), CheckError> {
    let stays = &view.catalog.stays;
    if stays.is_empty() {
        return Ok(());
    }
    let oids: Vec<u32> = view.tables.iter().flat_map(|table| table.oids(Side::Old)).collect();
    for row in view.rows(Side::Old, "foreign keys", FOREIGN_KEYS, &[&oids]).await? {
        let (from, to, mend): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let (stays, migrates) = if row.get(3) { (&to, &from) } else { (&from, &to) };
        let what = format!(
            "a foreign key leads from {from} to {to}: {stays} stays on old and {migrates} migrates. Once new is the authority, old checks it against rows that come late or not at all"
        );
        view.error("foreign key", Side::Old, &from, what, mend);
    }
    for name in &stays.twice {
        let what = "it stays on old, and new has a table of that name: what a function reads there by mistake is wrong and does not fail".to_owned();
        view.warning("table", Side::New, name, what, format!("DROP TABLE {name};"));
    }
    let text = "SELECT current_setting('max_prepared_transactions')::int";
    if view.rows(Side::New, "settings", text, &[]).await?[0].get::<_, i32>(0) == 0 {
        let what = "it is 0: a transaction that writes tables which stay on old and tables which are on new is refused"
            .to_owned();
        let mend = "ALTER SYSTEM SET max_prepared_transactions = 100; (as many as max_connections, if such transactions are frequent) and restart the server".to_owned();
        view.warning("server", Side::New, "max_prepared_transactions", what, mend);
    }
    Ok(())
}
