//! What `federate: true` needs on new.

use super::{CheckError, View};
use crate::phase::Side;

const KIND: &str = "federate";

pub(super) async fn compare(view: &mut View<'_>, wanted: bool) -> Result<(), CheckError> {
    if !wanted {
        return Ok(());
    }
    let text = "SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'postgres_fdw'), EXISTS (SELECT FROM pg_extension WHERE extname = 'postgres_fdw'), \
        current_setting('is_superuser') = 'on', coalesce((SELECT has_foreign_data_wrapper_privilege(oid, 'USAGE') FROM pg_foreign_data_wrapper WHERE fdwname = 'postgres_fdw'), false), \
        quote_ident(current_user)";
    let rows = view.rows(Side::New, "postgres_fdw", text, &[]).await?;
    let Some(row) = rows.first() else { return Ok(()) };
    let (available, made, superuser, may): (bool, bool, bool, bool) = (row.get(0), row.get(1), row.get(2), row.get(3));
    let role: String = row.get(4);
    let mut error = |what: &str, mend: String| view.error(KIND, Side::New, "postgres_fdw", what.to_owned(), mend);
    match (available, made) {
        (false, _) => error(
            "the server does not have this extension, through which new reads what only old has",
            "install PostgreSQL's contrib modules on new's host, or set federate: false".to_owned(),
        ),
        (true, false) if !superuser => error(
            "the extension is not in this database, and the control role may not make it",
            "CREATE EXTENSION postgres_fdw;".to_owned(),
        ),
        (true, true) if !may && !superuser => error(
            "the control role may not make a foreign server",
            format!("GRANT USAGE ON FOREIGN DATA WRAPPER postgres_fdw TO {role};"),
        ),
        _ => {}
    }
    Ok(())
}
