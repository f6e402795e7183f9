//! The network between one proxy, or the mover, and one database fails in the middle of a move.

use std::path::PathBuf;

use super::common::link::{Flow, Link, Trip, Way};
use super::common::pair::{APP, CONTROL, DATABASE};
use super::common::{Databases, Proxy, ProxyConfig, proof, until};
use super::{TIMEOUT, Writers, assert_none_lost, assert_one_authority, assert_told, connect, fleet, mover, moves_to};

/// A client that comes now.
async fn writes_through(proxy: &Proxy, id: i64) {
    let url = proxy.url_as(APP.0, APP.1, DATABASE);
    until("a new client writes", async || {
        let Ok(client) = connect(&url).await else { return false };
        client.batch_execute(&format!("INSERT INTO notes (id) VALUES ({id}) ON CONFLICT DO NOTHING")).await.is_ok()
    })
    .await;
}

/// A mover must not wait long for what a proxy that is cut off has left open on the mirror.
const SHORT: &str = "mirror: { timeout: 3s }";

/// A proxy of that fleet that reaches old over this line.
async fn over(link: &Link, databases: &Databases) -> Proxy {
    let old = format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, link.port());
    let more = format!("fleet: true\n{SHORT}");
    Proxy::start(ProxyConfig { old, ..databases.proxy_config("dual-write", &more) }).await
}

/// The authority has committed, and the line dies before the answer is there: no end of the connection tells anybody. What the proxy has executed on the
/// mirror waits for a COMMIT that nobody sends. It is ended, its rows are repaired, and the gates open; the answer, when it comes at last, is the client's.
#[tokio::test]
async fn a_commit_whose_answer_is_lost_on_the_line_closes_no_gate_for_long() {
    let (databases, proxies) = fleet(0, SHORT).await;
    let link = Link::to(databases.old.port()).await;
    let cut_off = over(&link, &databases).await;
    let client = connect(&cut_off.url_as(APP.0, APP.1, DATABASE)).await.expect("connects");
    client.batch_execute("INSERT INTO notes (id) VALUES (1)").await.expect("writes");
    let on_old = async |sql: &str| databases.old.run(DATABASE, sql).await.expect(sql).trim().to_owned();
    until("nothing is owed", async || on_old("SELECT count(*) FROM crossfade.ledger").await == "0").await;
    let mut at_commit = link.trip(Way::ToServer, b"crossfade_commit", Trip::HoldBefore);
    let writing = tokio::spawn(async move { client.batch_execute("INSERT INTO notes (id) VALUES (2)").await });
    until("COMMIT is sent", async || at_commit.try_recv().is_ok()).await;
    link.set(Way::ToClient, Flow::Stall);
    link.release();
    until("the authority has committed", async || on_old("SELECT count(*) FROM notes").await == "2").await;
    assert_eq!(on_old("SELECT count(*) FROM crossfade.ledger WHERE carrier_xid IS NOT NULL").await, "1", "in flight");
    until("its debt is paid", async || on_old("SELECT count(*) FROM crossfade.ledger").await == "0").await;
    moves_to(&proxies[0], "new-primary").await;
    link.set_both(Flow::Pass);
    writing.await.expect("joins").expect("it was committed");
    until("it follows", async || cut_off.holds("new-primary").await).await;
    writes_through(&cut_off, 3).await;
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &[1, 2, 3]).await;
}

/// One proxy loses its way to the authority: bytes wait on the line, or connections break. The others move on; what arrives late changes nothing.
#[tokio::test]
async fn a_proxy_that_is_cut_off_from_one_database_keeps_nobody_and_writes_nothing() {
    let (databases, proxies) = fleet(0, SHORT).await;
    let mut link = Link::to(databases.old.port()).await;
    let cut_off = over(&link, &databases).await;
    let (here, there) = (Writers::start(&[&proxies[0]], 4), Writers::numbered(&[&cut_off], 4, 1_000_000));
    let rounds: &[(i64, bool)] = match proof() {
        true => &[(1, true), (2, false), (3, true), (4, false)],
        false => &[(1, true)],
    };
    for &(round, stalls) in rounds {
        there.go_on().await;
        if stalls {
            link.set_both(Flow::Stall);
        } else {
            link.refuse().await;
            link.cut();
        }
        moves_to(&proxies[0], "new-primary").await;
        here.go_on().await;
        link.set_both(Flow::Pass);
        link.accept().await;
        until("it follows", async || cut_off.holds("new-primary").await).await;
        writes_through(&cut_off, -round).await;
        there.go_on().await;
        moves_to(&proxies[0], "dual-write").await;
    }
    there.go_on().await;
    let (mut acknowledged, errors) = here.end().await;
    assert_eq!(errors, Vec::<String>::new(), "clients of the other proxy have only waited");
    let (written, errors) = there.end().await;
    acknowledged.extend(written);
    assert_told(&errors);
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &acknowledged).await;
}

/// The mover dies at its claim: before it is written, and behind that, before anybody was told. The pointer stands, and the move is finished.
#[tokio::test]
async fn a_mover_that_dies_at_its_claim_has_moved() {
    let (databases, proxies) = fleet(1, TIMEOUT).await;
    let link = Link::to(databases.new.port()).await;
    let folder = tempfile::tempdir().expect("a folder");
    let file: PathBuf = folder.path().join("crossfade.yaml");
    let text = std::fs::read_to_string(proxies[0].config_path()).expect("reads");
    let new = format!("127.0.0.1:{}/", databases.new.port());
    assert!(text.contains(&new), "{text}");
    std::fs::write(&file, text.replace(&new, &format!("127.0.0.1:{}/", link.port()))).expect("writes");
    let writers = Writers::start(&proxies.iter().collect::<Vec<_>>(), 4);
    let trips: &[Trip] = if proof() { &[Trip::HoldBefore, Trip::StallAfter] } else { &[Trip::StallAfter] };
    for &trip in trips {
        writers.go_on().await;
        // The last that the mover sends for its claim.
        let mut at_claim =
            link.trip_behind(b"SELECT crossfade.fence_side(", Way::ToServer, b"Q\0\0\0\x0bCOMMIT\0", trip);
        let mut moving = mover(&file, "new-primary");
        until("the mover is at its claim", async || {
            if moving.try_wait().expect("waits").is_some() {
                moving = mover(&file, "new-primary");
            }
            at_claim.try_recv().is_ok()
        })
        .await;
        let claims = "SELECT count(*) FROM crossfade.migration WHERE authority = 'new'";
        if trip == Trip::StallAfter {
            until("the claim is written", async || {
                databases.new.run(DATABASE, claims).await.is_ok_and(|count| count.trim() == "1")
            })
            .await;
        }
        moving.kill().await.expect("kills");
        link.cut();
        link.set_both(Flow::Pass);
        link.release();
        for proxy in &proxies {
            until("the move is finished", async || proxy.holds("new-primary").await).await;
        }
        writers.go_on().await;
        moves_to(&proxies[0], "dual-write").await;
    }
    let (acknowledged, errors) = writers.end().await;
    assert_eq!(errors, Vec::<String>::new(), "clients have only waited");
    proxies[0].settle().await;
    assert_one_authority(&databases).await;
    assert_none_lost(&databases, &acknowledged).await;
}
