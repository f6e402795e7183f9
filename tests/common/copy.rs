//! COPY FROM STDIN, and what became of its rows.

use bytes::Bytes;
use futures_util::SinkExt;

use super::pair::{DATABASE, Pair};

/// Images of this table of schema public that went to new.
pub async fn images(pair: &Pair, table: &str) -> f64 {
    pair.proxy.metrics(&format!("crossfade_mirror_images_total{{table=\"public.{table}\"}}")).await
}

/// The rows that new has.
pub async fn on_new(pair: &Pair, table: &str) -> u64 {
    // Nobody waits for COMMIT there.
    pair.proxy.settle().await;
    let count = format!("SELECT count(*) FROM {table}");
    pair.databases.new.run(DATABASE, &count).await.expect("counts").trim().parse().expect("a number")
}

/// COPY FROM STDIN by tokio-postgres, with the data in these pieces; the number of rows.
///
/// # Panics
/// It does not end within 20 s.
pub async fn copy(client: &tokio_postgres::Client, sql: &str, pieces: &[&[u8]]) -> Result<u64, tokio_postgres::Error> {
    let done = copy_all(client, sql, pieces);
    tokio::time::timeout(std::time::Duration::from_secs(20), done).await.unwrap_or_else(|_| panic!("hangs: {sql}"))
}

async fn copy_all(client: &tokio_postgres::Client, sql: &str, pieces: &[&[u8]]) -> Result<u64, tokio_postgres::Error> {
    let sink = client.copy_in(sql).await?;
    let mut sink = std::pin::pin!(sink);
    for piece in pieces {
        sink.send(Bytes::copy_from_slice(piece)).await?;
    }
    let count = sink.as_mut().finish().await?;
    // Behind the last Sync: only there the COPY is committed.
    client.simple_query("SELECT 1").await?;
    Ok(count)
}
