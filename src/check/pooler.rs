//! What stands between the proxy and a database: a pooler that gives one backend to several sessions loses what a session has set.

use std::collections::BTreeSet;

use tokio_postgres::{Client, SimpleQueryMessage};

use super::{CheckError, View};
use crate::config::Config;
use crate::phase::Side;

/// So often the two sessions are asked: whoever else uses the pool may come between them now and then.
const ROUNDS: usize = 20;

/// What this finding is about. Nothing else can be looked at through such a pooler.
pub(super) const POOLER: &str = "pooler";

/// The backend of one session serves another one, too, or a session has changed its backend: then no session has what it has set. A pooler in session mode
/// is no finding.
pub(super) async fn compare(view: &mut View<'_>, config: &Config) -> Result<(), CheckError> {
    for side in Side::BOTH {
        let database = if side == Side::Old { &config.old } else { &config.new };
        let second = match database.connect("crossfade check").await {
            Ok(second) => second,
            Err(error) => {
                let mend =
                    "let it have as many connections as the file's mirror.connections, and twenty more".to_owned();
                view.error("connection", side, "control role", format!("it cannot have a second one: {error}"), mend);
                continue;
            }
        };
        let (mut firsts, mut seconds) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..ROUNDS {
            firsts.extend(backend(side, view.clients.get(side)).await?);
            seconds.extend(backend(side, &second).await?);
        }
        if firsts.len() > 1 || seconds.len() > 1 || !firsts.is_disjoint(&seconds) {
            let what = "two sessions of the control role have shared backends: there is a pooler in transaction or statement mode";
            let mend = "point the URL at the server itself, or set pool_mode = session";
            view.error(POOLER, side, "the URL", what.to_owned(), mend.to_owned());
        }
    }
    Ok(())
}

/// Unprepared: a statement that is prepared may be gone with the next.
async fn backend(side: Side, client: &Client) -> Result<Option<String>, CheckError> {
    let answer = client.simple_query("SELECT pg_backend_pid()").await;
    let messages = answer.map_err(|error| CheckError::Server { side, what: "backends of two sessions", error })?;
    Ok(messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    }))
}
