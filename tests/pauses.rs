//! How long moves hold clients: what can be done before they are held, or after, is not done meanwhile.

mod common;

use common::link::{Link, Trip, Way};
use common::pair::{APP, CONTROL, DATABASE};
use common::pgbench::pgbench;
use common::{Databases, Proxy, ProxyConfig, until};

/// Five tables with a key and five without, rows in each.
const SCHEMA: &str = "DO $$ BEGIN FOR n IN 1..5 LOOP \
        EXECUTE format('CREATE TABLE keyed_%s (id bigserial PRIMARY KEY, name text NOT NULL DEFAULT ''x'')', n); \
        EXECUTE format('CREATE TABLE keyless_%s (at timestamptz NOT NULL DEFAULT clock_timestamp(), name text)', n); \
        EXECUTE format('INSERT INTO keyed_%s SELECT FROM generate_series(1, 100)', n); \
        EXECUTE format('INSERT INTO keyless_%s SELECT now(), ''x'' FROM generate_series(1, 100)', n); \
    END LOOP; END $$";

/// From each phase to the next and back.
const WALK: [&str; 8] =
    ["dual-write", "dual-read", "new-primary", "old-read-only", "new", "new-primary", "dual-write", "old"];

/// Each move of the history of either side, with what it took: the epoch, from, to, milliseconds.
async fn pauses(databases: &Databases) -> Vec<(i64, String)> {
    let text = "SELECT epoch || '|' || (detail->>'from') || ' -> ' || (detail->>'phase') || ' ' || round((detail->>'pause_ms')::numeric) || ' ms' \
        FROM crossfade.history WHERE event = 'move' AND detail ? 'pause_ms' ORDER BY epoch";
    let mut all = std::collections::BTreeMap::new();
    for side in [&databases.old, &databases.new] {
        for line in side.run(DATABASE, text).await.expect("reads").lines() {
            let (epoch, what) = line.split_once('|').expect("two fields");
            all.insert(epoch.parse().expect("a number"), what.to_owned());
        }
    }
    all.into_iter().collect()
}

/// A walk there and back, idle and with eight clients of pgbench: prints how long each move held clients. (Debug builds: figures are for comparison.)
#[tokio::test]
#[ignore = "measures"]
async fn how_long_each_move_of_a_walk_holds_clients() {
    for clients in [0, 8] {
        let databases = Databases::start(&[]).await;
        databases.run_on_both(SCHEMA).await;
        let program = databases.old.program("pgbench");
        for side in [&databases.old, &databases.new] {
            pgbench(&program, &side.url_as(APP.0, APP.1, DATABASE), &["-i", "-q"]).await;
        }
        let mut proxy =
            Proxy::start(databases.proxy_config("old", "mirror: { timeout: 15s }\nlog: { level: debug }")).await;
        let url = proxy.url_as(APP.0, APP.1, DATABASE);
        let number = clients.to_string();
        let load = (clients > 0).then(|| {
            let arguments = ["-n", "-c", &number, "-j", "1", "-T", "600", "-R", "100"].map(str::to_owned);
            tokio::process::Command::new(&program).args(arguments).arg(&url).kill_on_drop(true).spawn().expect("runs")
        });
        for phase in WALK {
            proxy.set_phase(phase).await;
            if matches!(phase, "dual-write" | "new-primary") {
                until("tables came over", async || !proxy.log().is_empty()).await;
                tokio::time::sleep(std::time::Duration::from_secs(2)).await;
            }
        }
        if let Some(mut load) = load {
            assert!(load.try_wait().expect("waits").is_none(), "pgbench has ended");
            load.kill().await.expect("kills");
        }
        println!("{clients} clients: {:#?}", pauses(&databases).await);
        println!(
            "{}",
            proxy
                .log()
                .lines()
                .filter(|line| line.contains("clients are held") || line.contains("has moved "))
                .collect::<Vec<_>>()
                .join("\n")
        );
    }
}

/// What a move needs stands before clients are held: a server whose connections are slow to make, or used up, makes no pause longer.
#[tokio::test]
async fn no_connection_is_opened_while_clients_are_held() {
    let databases = Databases::start(&[]).await;
    databases.run_on_both(SCHEMA).await;
    let mut links = [Link::to(databases.old.port()).await, Link::to(databases.new.port()).await];
    let [old, new] =
        [0, 1].map(|at| format!("postgres://{}:{}@127.0.0.1:{}/{DATABASE}", CONTROL.0, CONTROL.1, links[at].port()));
    let mut proxy = Proxy::start(ProxyConfig { old, new, ..databases.proxy_config("old", "") }).await;
    // What a move sends first when clients are held: to the side that is authority.
    for (phase, authority, first) in [
        ("dual-write", 0, "LOCK TABLE crossfade.sessions IN EXCLUSIVE MODE"),
        ("new-primary", 0, "IN ACCESS EXCLUSIVE MODE"),
        ("old-read-only", 1, "IN ACCESS EXCLUSIVE MODE"),
        ("new-primary", 1, "LOCK TABLE crossfade.sessions IN EXCLUSIVE MODE"),
        ("dual-write", 1, "IN ACCESS EXCLUSIVE MODE"),
    ] {
        if first.starts_with("IN ACCESS") && phase != "old-read-only" {
            proxy.settle().await;
            proxy.verify().await;
        }
        let mut held = links[authority].trip(Way::ToServer, first.as_bytes(), Trip::HoldBefore);
        proxy.request_phase(phase);
        until(&format!("clients are held on the way to {phase}"), async || held.try_recv().is_ok()).await;
        for link in &mut links {
            link.refuse().await;
        }
        links[authority].release();
        let moved = format!(" to={phase} ");
        until(&format!("{phase} holds"), async || {
            let log = proxy.log();
            assert!(!log.contains("clients were released"), "{log}");
            log.contains(&moved) && proxy.holds(phase).await
        })
        .await;
        for link in &mut links {
            link.accept().await;
        }
    }
    proxy.settle().await;
    databases.assert_equal().await;
}
