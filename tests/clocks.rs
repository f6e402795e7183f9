//! Issue of moving: clocks that are off by an hour. The old server's is an hour ahead, the new one's an hour behind, and each of two proxies of a fleet believes another
//! one of them (libfaketime). Nothing may be decided by comparing times of two machines: moves, debts, reads of new and verify go as they do elsewhere.

mod common;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use common::load::{Load, SCHEMA, assert_nothing_lost};
use common::pair::{APP, DATABASE};
use common::{Databases, Proxy, until};
use crossfade::cluster::programs::Programs;
use crossfade::cluster::{Builder, Cluster};
use tempfile::TempDir;
use tokio_postgres::NoTls;

const AHEAD: &str = "+3600";
const BEHIND: &str = "-3600";

/// The library that shifts the clock of a process.
fn library() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").expect("is read");
    let found = folders.filter_map(|folder| Some(folder.ok()?.path().join("faketime/libfaketime.so.1")));
    let found = found.into_iter().find(|path| path.is_file());
    if found.is_none() {
        eprintln!("libfaketime is missing (scripts/setup.sh): nothing is tested");
    }
    found
}

/// What a process with a shifted clock has in its environment. Time goes by as it does; only what the clock on the wall says is shifted.
fn shifted(library: &std::path::Path, by: &str) -> Vec<(String, String)> {
    let pairs =
        [("LD_PRELOAD", library.to_str().expect("is text")), ("FAKETIME", by), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
}

/// A server with a shifted clock: its programs by other names, and one of them under the library.
fn server(side: &str, library: &std::path::Path, by: &str) -> (TempDir, Builder) {
    let real = Programs::of_side(side, None).expect("there is a server").bindir;
    let dir = TempDir::new().expect("a directory");
    let allow = |path: &std::path::Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("others may run it");
    };
    allow(dir.path());
    for program in std::fs::read_dir(&real).expect("is read") {
        let program = program.expect("is read").path();
        let name = program.file_name().expect("has a name");
        if name != "postgres" {
            symlink(&program, dir.path().join(name)).expect("is linked");
        }
    }
    let environment: String =
        shifted(library, by).iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
    let postgres = dir.path().join("postgres");
    let script = format!("#!/bin/sh\n{environment}exec '{}' \"$@\"\n", real.join("postgres").display());
    std::fs::write(&postgres, script).expect("is written");
    allow(&postgres);
    let builder = Cluster::builder().lineage(side).bindir(dir.path());
    (dir, builder)
}

/// Seconds by which the server's clock is ahead of ours.
async fn ahead(server: &Cluster) -> f64 {
    let theirs = server.run(DATABASE, "SELECT extract(epoch FROM clock_timestamp())").await.expect("says its time");
    let ours = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("it is later than 1970");
    theirs.trim().parse::<f64>().expect("a number") - ours.as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_are_off_by_an_hour_decide_nothing() {
    let Some(library) = library() else { return };
    let ((_old, old), (_new, new)) = (server("old", &library, AHEAD), server("new", &library, BEHIND));
    let databases = Databases::of(old, new).await;
    assert!((ahead(&databases.old).await - 3600.0).abs() < 60.0, "old is an hour ahead");
    assert!((ahead(&databases.new).await + 3600.0).abs() < 60.0, "new is an hour behind");
    databases.run_on_both(SCHEMA).await;
    databases.new.run(DATABASE, "TRUNCATE counters").await.expect("new is empty");
    let environment = |by: &str| shifted(&library, by);
    let mut first =
        Proxy::start(common::ProxyConfig { environment: environment(BEHIND), ..databases.proxy_config("old", "") })
            .await;
    let fleet = databases.proxy_config("old", "fleet: true");
    let second = Proxy::start(common::ProxyConfig { environment: environment(AHEAD), ..fleet }).await;
    first.set_more("fleet: true");
    let loads = [(&first, 0..2), (&second, 2..4)]
        .map(|(proxy, writers)| Load::of(&proxy.url_as(APP.0, APP.1, DATABASE), writers));
    let reader = |proxy: &Proxy| {
        let url = proxy.url_as(APP.0, APP.1, DATABASE);
        async move {
            let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("connects");
            tokio::spawn(async move { drop(connection.await) });
            client
        }
    };
    for phase in ["dual-write", "dual-read", "new-primary", "dual-write", "old"] {
        first.set_phase(phase).await;
        second.reaches(phase).await;
        for load in &loads {
            load.goes_on(20).await;
        }
        if phase == "dual-read" {
            // Whoever looks at new judges how old its look is by a clock of its own.
            for proxy in [&first, &second] {
                let client = reader(proxy).await;
                until("new answers reads", async || {
                    client.query("SELECT n FROM counters WHERE name = 'all'", &[]).await.expect("reads");
                    proxy.metrics("crossfade_read_served_total{side=\"new\"}").await > 0.0
                })
                .await;
            }
        }
        if phase == "new-primary" {
            // Debts whose age is said by one clock are paid by who believes another.
            let text = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'crossfade mirror'";
            databases.old.run(DATABASE, text).await.expect("ends the mirror's sessions");
            for load in &loads {
                load.goes_on(20).await;
            }
            second.settle().await;
        }
        let pause =
            "SELECT count(*) FROM crossfade.history WHERE (detail->>'pause_ms')::float8 NOT BETWEEN 0 AND 60000";
        for side in [&databases.old, &databases.new] {
            assert_eq!(
                side.run(DATABASE, pause).await.expect("reads the history").trim(),
                "0",
                "a pause is what it took"
            );
        }
        if phase == "dual-write" {
            let verified = second.crossfade(&["verify"]).await;
            assert!(verified.status.success(), "{verified:?}");
        }
    }
    let mut written = common::load::Written::default();
    for load in loads {
        let one = load.end().await;
        assert_eq!((one.unknown, &one.errors), (0, &Vec::new()), "no client sees an error");
        written.kept.extend(one.kept);
        written.deleted.extend(one.deleted);
        written.counted += one.counted;
    }
    // Back in `old` new is written no more: once more to a phase in which both are.
    first.set_phase("dual-write").await;
    second.reaches("dual-write").await;
    first.settle().await;
    assert_nothing_lost(&databases, &written).await;
}
