//! Tables in parts of about the same size, so that several jobs can be at one.

use super::binary::values;
use super::error::Error;
use super::link::Link;
use super::sql::{Bounds, TableSql};
use crate::catalog::Table;
use crate::ledger::debts::Values;

/// Pages of a part at least: of the first few, and of as many as there may be. The beginning of each part costs a reading that nothing else goes on beside.
const PART_PAGES: i64 = 128;
const FEW: i64 = 8;
const PART_PAGES_OF_MANY: i64 = 4096;

/// Parts of a table's keys, so many at most, in the order of this side's index. The first is open at its beginning, the last at its end.
pub(super) async fn parts(link: &mut Link, table: &Table, most: i64) -> Result<Vec<Bounds>, Error> {
    let mut parts = Vec::new();
    let mut after = None;
    for upto in cuts(link, table, most).await?.into_iter().map(Some).chain([None]) {
        parts.push(Bounds { after: after.take(), upto: upto.clone() });
        after = upto;
    }
    Ok(parts)
}

/// Keys at which it is cut: from a sample.
async fn cuts(link: &mut Link, table: &Table, most: i64) -> Result<Vec<Values>, Error> {
    let sql = TableSql::new(table, link.side);
    let doing = "sampling keys";
    let size = "SELECT (coalesce(sum(pg_relation_size(relid)), 0) / 8192)::bigint FROM unnest($1::oid[]) AS relid";
    let mut relations = vec![*table.oid.get(sql.side)];
    relations.extend(table.partitions.get(sql.side));
    let pages: i64 = link.rows(doing, size, &[&relations]).await?[0].get(0);
    let parts = (pages / PART_PAGES).min(FEW).max(pages / PART_PAGES_OF_MANY).clamp(1, most.max(1));
    if parts == 1 {
        return Ok(Vec::new());
    }
    // Some pages of each part; a whole page's rows come with it.
    let percent = (100.0 * (parts * 16) as f64 / pages as f64).min(100.0);
    let text = format!(
        "WITH t AS MATERIALIZED (SELECT {key}, pg_catalog.ntile({parts}) OVER (ORDER BY {key}) AS crossfade_tile FROM {} AS t TABLESAMPLE SYSTEM ({percent})), \
         last AS (SELECT t.*, pg_catalog.row_number() OVER (PARTITION BY t.crossfade_tile ORDER BY {key} DESC) AS crossfade_nth FROM t) \
         SELECT {read} FROM last AS t WHERE t.crossfade_nth = 1 AND t.crossfade_tile < {parts} ORDER BY {key}",
        sql.only(),
        key = sql.key_columns(),
        read = sql.read_key()
    );
    let rows = link.rows(doing, &text, &[]).await?;
    Ok(rows.iter().map(|row| values(row, 0, sql.key.len())).collect())
}
