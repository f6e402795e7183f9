//! What the file's `expect` asks of new before it becomes authority.

use std::time::Duration;

use super::{CheckError, View};
use crate::config::Expect;
use crate::phase::Side;

const KIND: &str = "expect";

/// Warnings: nothing of it is needed before new becomes authority. (The gate of that move closes on them.)
pub(super) async fn compare(view: &mut View<'_>, expect: &Expect) -> Result<(), CheckError> {
    if expect.standbys.is_some() || expect.lag.is_some() {
        standbys(view, expect.standbys, expect.lag).await?;
    }
    if expect.archiving == Some(true) {
        archiving(view).await?;
    }
    Ok(())
}

/// Whether the migrating tables, as large as they are on old, have room on new's disk. None of them is read.
pub(super) async fn disk(view: &mut View<'_>, room: Option<usize>) -> Result<(), CheckError> {
    let Some(room) = room else { return Ok(()) };
    let oids = view.oids(Side::Old);
    let text = "SELECT coalesce(sum(pg_total_relation_size(part.relid)), 0)::bigint, pg_size_pretty(sum(pg_total_relation_size(part.relid))) \
        FROM unnest($1::oid[]) t (oid), LATERAL (SELECT t.oid UNION SELECT relid FROM pg_partition_tree(t.oid)) part (relid)";
    let row = &view.rows(Side::Old, "sizes of tables", text, &[&oids]).await?[0];
    let (size, pretty): (i64, Option<String>) = (row.get(0), row.get(1));
    if size as u64 > room as u64 {
        let pretty = pretty.unwrap_or_default();
        let what = format!("the migrating tables and their indexes take {pretty} on old, more than `expect.disk`");
        let mend = format!("give it more room than {pretty}: its write-ahead log needs some, too");
        view.error(KIND, Side::New, "disk", what, mend);
    }
    Ok(())
}

async fn standbys(view: &mut View<'_>, wanted: Option<usize>, lag: Option<Duration>) -> Result<(), CheckError> {
    // A standby that has replayed everything reports no lag, or an old one: what it has still to replay counts.
    let text = "SELECT coalesce(application_name, ''), CASE WHEN replay_lsn >= pg_current_wal_lsn() THEN 0 ELSE coalesce(extract(epoch FROM replay_lag), 0) END::float8 \
        FROM pg_stat_replication WHERE state = 'streaming' AND replay_lsn IS NOT NULL ORDER BY 1";
    let rows = view.rows(Side::New, "standbys", text, &[]).await?;
    if let Some(wanted) = wanted
        && rows.len() < wanted
    {
        let what = format!("{} standbys stream from it, and `expect` asks for {wanted}", rows.len());
        view.warning(KIND, Side::New, "standbys", what, "attach the standbys that are missing".to_owned());
    }
    for row in &rows {
        let (name, behind): (String, f64) = (row.get(0), row.get(1));
        if let Some(most) = lag.filter(|most| behind > most.as_secs_f64()) {
            let what = format!("standby {name:?} is {behind:.1} s behind, and `expect` allows {most:?}");
            view.warning(KIND, Side::New, "lag", what, "wait until it has caught up".to_owned());
        }
    }
    Ok(())
}

async fn archiving(view: &mut View<'_>) -> Result<(), CheckError> {
    let text = "SELECT current_setting('archive_mode') <> 'off', archived_count > 0, coalesce(last_failed_time > last_archived_time, last_failed_time IS NOT NULL) FROM pg_stat_archiver";
    let row = &view.rows(Side::New, "archiving", text, &[]).await?[0];
    let (on, archived, failing): (bool, bool, bool) = (row.get(0), row.get(1), row.get(2));
    let (what, mend) = match (on, archived, failing) {
        (false, _, _) => ("archive_mode is off", "set archive_mode and archive_command, and restart it"),
        (true, _, true) => ("the last segment could not be archived", "look at its log, and mend archive_command"),
        (true, false, false) => ("no segment was archived yet", "SELECT pg_switch_wal();"),
        (true, true, false) => return Ok(()),
    };
    view.warning(KIND, Side::New, "archiving", what.to_owned(), mend.to_owned());
    Ok(())
}
