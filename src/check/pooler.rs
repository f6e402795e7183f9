//! What stands between the proxy and a database: a pooler that gives one backend to several sessions loses what a session has set.

use super::{CheckError, View};
use crate::config::Config;
use crate::phase::Side;

/// The backend of one session that is open and idle serves another one: then no session has what it has set. A pooler in session mode is no finding.
pub(super) async fn compare(view: &mut View<'_>, config: &Config) -> Result<(), CheckError> {
    const PID: &str = "SELECT pg_backend_pid()";
    for side in Side::BOTH {
        let (what, database) = ("backends of two sessions", if side == Side::Old { &config.old } else { &config.new });
        let failed = |error| CheckError::Server { side, what, error };
        let second = match database.connect("crossfade check").await {
            Ok(second) => second,
            Err(error) => {
                let mend =
                    "let it have as many connections as the file's mirror.connections, and twenty more".to_owned();
                view.error("connection", side, "control role", format!("it cannot have a second one: {error}"), mend);
                continue;
            }
        };
        let first: i32 = view.rows(side, what, PID, &[]).await?[0].get(0);
        second.batch_execute("BEGIN").await.map_err(failed)?;
        let second: i32 = second.query_one(PID, &[]).await.map_err(failed)?.get(0);
        if first == second {
            let what =
                "two sessions of the control role had one backend: there is a pooler in transaction or statement mode";
            let mend = "point the URL at the server itself, or set pool_mode = session";
            view.error("pooler", side, "the URL", what.to_owned(), mend.to_owned());
        }
    }
    Ok(())
}
