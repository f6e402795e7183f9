//! Issue of moving: three proxies of one fleet, under TPC-B and a transfer whose sum must stay, walk through all phases and back. No client sees an error, both
//! sides are equal at every stop in a mirrored phase, and the databases' own records say that nothing was written under the wrong authority.

mod common;

use std::path::Path;
use std::process::Stdio;

use common::pair::{APP, CONTROL, DATABASE};
use common::pgbench::pgbench;
use common::{Databases, Proxy, proof, until};
use crossfade::cluster::Cluster;
use tempfile::NamedTempFile;
use tokio::process::{Child, Command};
use tokio_postgres::{Client, NoTls};

/// What holds on this server in a transaction that asks: by a statement of its own, behind the epoch's lock.
const HOLDS: &str = "CREATE FUNCTION holds() RETURNS text STABLE SECURITY DEFINER LANGUAGE plpgsql AS $$ BEGIN
        RETURN coalesce((SELECT epoch || ' ' || phase || ' ' || authority FROM crossfade.migration), '0 old old'); END $$";

/// What is transferred, and a record of each transfer: on which server it was written, and what held there. Defaults are evaluated on the authority, and go to
/// the mirror as values.
const SCHEMA: &str = "CREATE TABLE purses (id int PRIMARY KEY, amount bigint NOT NULL);
    INSERT INTO purses SELECT n, 1000 FROM generate_series(1, 200) n;
    CREATE TABLE transfers (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(), payer int NOT NULL, payee int NOT NULL, amount bigint NOT NULL,
        port int NOT NULL DEFAULT current_setting('port')::int, holds text NOT NULL DEFAULT holds())";

/// In the order of their numbers: two transfers never wait for each other in a circle.
const TRANSFER: &str = "\\set a random(1, 199)
\\set b random(:a + 1, 200)
\\set amount random(-50, 50)
BEGIN;
UPDATE purses SET amount = amount - :amount WHERE id = :a;
UPDATE purses SET amount = amount + :amount WHERE id = :b;
INSERT INTO transfers (payer, payee, amount) VALUES (:a, :b, :amount);
COMMIT;
";

/// There and back. `backfill`, `verify` and what else a gate asks for come between.
const WALK: [&str; 8] =
    ["dual-write", "dual-read", "new-primary", "old-read-only", "new", "new-primary", "dual-write", "old"];

/// pgbench, as long as nobody ends it.
struct Load {
    child: Child,
    said: NamedTempFile,
}

impl Load {
    fn start(program: &Path, url: &str, clients: usize, more: &[&str]) -> Load {
        let said = NamedTempFile::new().expect("a file");
        let clients = clients.to_string();
        let mut command = Command::new(program);
        command.args(["-n", "-T", "100000", "-M", "prepared", "-c", &clients, "-j", "1"]).args(more);
        // In the short form, as few as leave the machine time for the jobs; else as fast as they can.
        command.args(if proof() { &[][..] } else { &["-R", "10"] }).arg(url);
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.reopen().expect("a file"));
        Load { child: command.spawn().expect("pgbench runs"), said }
    }

    /// It goes on, and has complained of nothing.
    fn assert_well(&mut self) {
        let said = std::fs::read_to_string(self.said.path()).expect("is read");
        let ended = self.child.try_wait().expect("waits");
        assert!(ended.is_none() && !said.contains("error") && !said.contains("aborted"), "{ended:?} {said}");
    }
}

struct Fleet {
    databases: Databases,
    proxies: Vec<Proxy>,
}

impl Fleet {
    /// Three proxies in `old`; the first is the one whose file is edited.
    async fn start() -> Fleet {
        // Of 48 clients each has up to three sessions on a side, and each proxy its jobs.
        let databases = Databases::start(&[("max_connections", "400")]).await;
        for side in [&databases.old, &databases.new] {
            side.run(DATABASE, HOLDS).await.expect("makes the function");
        }
        databases.run_on_both(SCHEMA).await;
        for side in [&databases.old, &databases.new] {
            let url = side.url_as(APP.0, APP.1, DATABASE);
            let scale = if proof() { "8" } else { "1" };
            pgbench(&databases.old.program("pgbench"), &url, &["-i", "-q", "-s", scale]).await;
        }
        if !proof() {
            databases
                .old
                .run(DATABASE, "DELETE FROM pgbench_accounts WHERE aid > 10000")
                .await
                .expect("makes it small");
        }
        let empty = "TRUNCATE purses, pgbench_accounts, pgbench_tellers, pgbench_branches";
        databases.new.run(DATABASE, empty).await.expect("new is empty");
        let mut proxies = Vec::new();
        for number in 0..3 {
            // The first makes the schema; those of a fleet go by the row that it wrote.
            let more = if number == 0 { "" } else { "fleet: true" };
            proxies.push(Proxy::start(databases.proxy_config("old", more)).await);
        }
        let mut fleet = Fleet { databases, proxies };
        fleet.proxies[0].set_more("fleet: true");
        fleet
    }

    fn authority(&self, phase: &str) -> &Cluster {
        if matches!(phase, "old" | "dual-write" | "dual-read") { &self.databases.old } else { &self.databases.new }
    }

    /// What an operator types on the console of each proxy.
    async fn operators(&self) -> Vec<Client> {
        let mut consoles = Vec::new();
        for proxy in &self.proxies {
            let url = proxy.url_as(CONTROL.0, CONTROL.1, "crossfade");
            let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("connects");
            tokio::spawn(async move { drop(connection.await) });
            consoles.push(client);
        }
        consoles
    }

    /// With all clients paused: both sides are equal, and so is the sum.
    async fn assert_equal(&self, phase: &str) {
        let consoles = self.operators().await;
        for console in &consoles {
            console.batch_execute("PAUSE").await.expect("pauses");
        }
        self.proxies[0].settle().await;
        let rows = self.databases.assert_equal().await;
        let sum = self.authority(phase).run(DATABASE, "SELECT sum(amount) FROM purses").await.expect("reads");
        assert_eq!(sum.trim(), "200000", "in {phase}");
        println!("{phase}: {rows} rows are equal");
        for console in &consoles {
            console.batch_execute("RESUME").await.expect("resumes");
        }
    }

    /// Clients go on: as many more transfers as there are clients.
    async fn goes_on(&self, phase: &str, loads: &mut [Load], clients: usize) {
        let count = async || -> usize {
            let count = self.authority(phase).run(DATABASE, "SELECT count(*) FROM transfers").await.expect("counts");
            count.trim().parse().expect("a number")
        };
        let before = count().await;
        until(&format!("clients go on in {phase}"), async || {
            loads.iter_mut().for_each(Load::assert_well);
            count().await > before + clients
        })
        .await;
    }

    /// Each transfer was written where the row of the phase, as it stood in its transaction, says that the authority is, and the row is one that this walk has seen.
    async fn assert_written_where_the_authority_was(&self, held: &[String]) {
        let text = "SELECT DISTINCT holds || '|' || port FROM transfers";
        let (old, new) = (self.databases.old.port().to_string(), self.databases.new.port().to_string());
        let told = self.databases.old.run(DATABASE, text).await.expect("reads");
        let mut seen = 0;
        for line in told.lines() {
            let (holds, port) = line.split_once('|').expect("two fields");
            assert!(held.iter().any(|known| known == holds), "{line}: nobody moved there; {held:?}");
            let authority = if holds.ends_with("old") { &old } else { &new };
            assert_eq!(
                port, authority,
                "{line}: written under the wrong authority; old listens on {old}, new on {new}"
            );
            seen += 1;
        }
        assert!(seen + 1 >= held.len(), "clients wrote in {seen} of {} phases: {told}", held.len());
    }
}

/// Issue 5, *What it must withstand*, 1.
#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_walks_through_all_phases_and_back_under_load() {
    let (walks, each) = if proof() { (10, 8) } else { (1, 1) };
    let mut fleet = Fleet::start().await;
    let script = tempfile::Builder::new().suffix(".sql").tempfile().expect("a file");
    std::fs::write(script.path(), TRANSFER).expect("is written");
    let script = script.path().display().to_string();
    let program = fleet.databases.old.program("pgbench");
    let mut loads = Vec::new();
    for proxy in &fleet.proxies {
        let url = proxy.url_as(APP.0, APP.1, DATABASE);
        loads.push(Load::start(&program, &url, each, &["-b", "tpcb-like"]));
        loads.push(Load::start(&program, &url, each, &["-f", &script]));
    }
    fleet.goes_on("old", &mut loads, 6 * each).await;
    let mut held = vec!["0 old old".to_owned()];
    for walk in 0..walks {
        for (number, phase) in WALK.into_iter().enumerate() {
            let back = number > 4;
            fleet.proxies[0].set_phase(phase).await;
            let row = "SELECT epoch || ' ' || phase || ' ' || authority FROM crossfade.migration";
            held.push(fleet.authority(phase).run(DATABASE, row).await.expect("reads").trim().to_owned());
            for proxy in &fleet.proxies {
                proxy.reaches(phase).await;
            }
            if phase == "dual-write" && !back || phase == "new-primary" && back {
                let arguments: &[&str] = if back { &["backfill", "--reverse"] } else { &["backfill"] };
                let output = fleet.proxies[walk % 3].crossfade(arguments).await;
                assert!(output.status.success(), "{arguments:?}: {output:?}");
            }
            fleet.goes_on(phase, &mut loads, 6 * each).await;
            if matches!(phase, "dual-write" | "dual-read" | "new-primary") {
                fleet.assert_equal(phase).await;
            }
        }
    }
    loads.iter_mut().for_each(Load::assert_well);
    drop(loads);
    fleet.assert_written_where_the_authority_was(&held).await;
    for proxy in &fleet.proxies {
        assert!(!proxy.log().contains("ERROR"), "{}", proxy.log());
    }
}
