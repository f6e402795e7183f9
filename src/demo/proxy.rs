//! The proxy under the demo: a child process of the same program, its configuration file, and what it says at /metrics.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

use super::DemoError;
use crate::phase::Phase;

/// What the proxy is given.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The program that runs as `PROGRAM run --config FILE`.
    pub program: PathBuf,
    /// Where the configuration and the log are kept.
    pub directory: PathBuf,
    /// libpq URL of old, with the control role and its password.
    pub old: String,
    /// As `old`, of new.
    pub new: String,
}

/// A running proxy; killed when dropped.
#[derive(Debug)]
pub struct Proxy {
    setup: Setup,
    child: Child,
    /// A shell that waits for the end of the demo and then kills the proxy: a kill -9 of the demo leaves nothing.
    guard: Child,
    /// Where PostgreSQL clients connect.
    pub listen: SocketAddr,
    admin: SocketAddr,
}

/// How long a proxy may take to be ready.
const READY: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(100);
/// How long one answer of the admin endpoint may take.
const ANSWER: Duration = Duration::from_secs(3);

impl Proxy {
    /// Starts it in phase `old` and waits until it is ready.
    ///
    /// # Errors
    /// When it ends at once, or is not ready in time: with the end of its log.
    pub async fn start(setup: Setup) -> Result<Proxy, DemoError> {
        let (listen, admin) = (free_port().await?, free_port().await?);
        write_config(&setup, listen, admin, Phase::Old)?;
        let log =
            std::fs::File::create(log_path(&setup.directory)).map_err(DemoError::io("writing the proxy's log"))?;
        let errors = log.try_clone().map_err(DemoError::io("writing the proxy's log"))?;
        let child = Command::new(&setup.program)
            .arg("run")
            .arg("--config")
            .arg(config_path(&setup.directory))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // Ctrl-C on the terminal is for the demo, which ends the proxy after the clients.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(DemoError::io("starting the proxy"))?;
        let pid =
            child.id().ok_or_else(|| DemoError::Proxy { what: "it ended at once".to_owned(), log: String::new() })?;
        let guard = guard(pid, &setup.directory)?;
        let mut proxy = Proxy { setup, child, guard, listen, admin };
        proxy.wait_until_ready().await?;
        Ok(proxy)
    }

    async fn wait_until_ready(&mut self) -> Result<(), DemoError> {
        let deadline = tokio::time::Instant::now() + READY;
        loop {
            if let Some(status) = self.child.try_wait().map_err(DemoError::io("waiting for the proxy"))? {
                return Err(DemoError::Proxy { what: format!("it ended at once ({status})"), log: self.log_tail() });
            }
            let ready = get(self.admin, "/readyz").await.is_ok_and(|(status, _)| status == 200);
            if ready {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                let what = format!("/readyz did not say 200 within {} s", READY.as_secs());
                return Err(DemoError::Proxy { what, log: self.log_tail() });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Writes the phase that is wanted into the file, as an operator's editor would: all at once.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_phase(&self, phase: Phase) -> Result<(), DemoError> {
        write_config(&self.setup, self.listen, self.admin, phase)
    }

    /// Runs another command of the program with the same file. True: done; false: its answer is no.
    ///
    /// # Errors
    /// When it cannot be run, with what it says.
    pub async fn command(&self, arguments: &[&str]) -> Result<bool, DemoError> {
        let output = Command::new(&self.setup.program)
            .args(arguments)
            .arg("--config")
            .arg(config_path(&self.setup.directory))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(DemoError::io("running a command"))?;
        match output.status.code() {
            Some(0) => Ok(true),
            Some(1) => Ok(false),
            _ => Err(DemoError::Proxy {
                what: format!("`crossfade {}` could not run", arguments.join(" ")),
                log: String::from_utf8_lossy(&output.stderr).into_owned(),
            }),
        }
    }

    /// What it says of itself now.
    ///
    /// # Errors
    /// When the admin endpoint does not answer, with the end of the proxy's log.
    pub async fn gauges(&self) -> Result<Gauges, DemoError> {
        match get(self.admin, "/metrics").await {
            Ok((200, body)) => Ok(Gauges::parse(&body)),
            Ok((status, _)) => {
                Err(DemoError::Proxy { what: format!("/metrics answered {status}"), log: self.log_tail() })
            }
            Err(error) => {
                Err(DemoError::Proxy { what: format!("/metrics did not answer: {error}"), log: self.log_tail() })
            }
        }
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        tail(&log_path(&self.setup.directory), 20)
    }
}

/// `$1`: the proxy's process; `$2`: a directory of the demo's own. `read` succeeds when the guard is sent home, and fails
/// when the demo has died: its end of the pipe is closed then.
const GUARD: &str = r#"trap '' INT TERM HUP; read -r released && exit 0; kill -s KILL "$1"; rm -rf -- "$2""#;

fn guard(pid: u32, directory: &Path) -> Result<Child, DemoError> {
    Command::new("sh")
        .args(["-c", GUARD, "guard", &pid.to_string()])
        .arg(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(DemoError::io("starting sh"))
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The proxy's child is killed on drop; the guard has nothing left to do. Both may have ended already.
        let _ = self.guard.start_kill();
    }
}

fn config_path(directory: &Path) -> PathBuf {
    directory.join("crossfade.yaml")
}

fn log_path(directory: &Path) -> PathBuf {
    directory.join("crossfade.log")
}

fn write_config(setup: &Setup, listen: SocketAddr, admin: SocketAddr, phase: Phase) -> Result<(), DemoError> {
    let text = format!(
        "name: demo\nlisten: {listen}\nadmin: {admin}\nold: {}\nnew: {}\nphase: {phase}\n",
        serde_json::Value::from(setup.old.as_str()),
        serde_json::Value::from(setup.new.as_str()),
    );
    let path = config_path(&setup.directory);
    let draft = path.with_extension("yaml.draft");
    std::fs::write(&draft, text)
        .and_then(|()| std::fs::rename(&draft, &path))
        .map_err(DemoError::io("writing the configuration"))
}

/// A port that was free a moment ago. The proxy reports if somebody else took it meanwhile.
async fn free_port() -> Result<SocketAddr, DemoError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(DemoError::io("finding a free port"))?;
    listener.local_addr().map_err(DemoError::io("finding a free port"))
}

/// The last `lines` lines of a file; empty when it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A GET as HTTP/1.0, which is answered without chunks: status and body.
async fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        status.map(|status| (status, body.to_owned())).ok_or_else(|| std::io::Error::other("no HTTP answer"))
    };
    tokio::time::timeout(ANSWER, ask).await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
}

/// No transaction of the load is carried for longer.
const CARRIED_MS_MAX: u64 = 3000;

/// What the demo reads from /metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// The phase that holds; None: none does yet.
    pub phase: Option<Phase>,
    /// Debts owed, over all tables: keys, and whole tables that count as one.
    pub owed: u64,
    /// Debts in flight.
    pub in_flight: u64,
    /// Age of the oldest debt of either kind, in milliseconds.
    pub oldest_ms: u64,
    /// Tables that a write out of sight has tainted.
    pub tainted: u64,
    /// The mirror takes what it is given.
    pub mirror_up: bool,
}

impl Gauges {
    /// Reads Prometheus's text format; what it does not know it leaves out.
    pub fn parse(text: &str) -> Gauges {
        let mut gauges = Gauges::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            match name {
                "crossfade_phase" if value == 1.0 => {
                    let phase = labels.trim_start_matches("phase=\"").trim_end_matches("\"}");
                    gauges.phase = phase.parse().ok();
                }
                "crossfade_debt_keys" => gauges.owed += value as u64,
                "crossfade_debt_in_flight" => gauges.in_flight += value as u64,
                "crossfade_debt_oldest_seconds" => gauges.oldest_ms = (value * 1000.0) as u64,
                "crossfade_tainted_tables" => gauges.tainted += value as u64,
                "crossfade_mirror_up" => gauges.mirror_up = value == 1.0,
                _ => {}
            }
        }
        gauges
    }

    /// The phase's name, or `-`.
    pub fn phase_name(&self) -> &'static str {
        self.phase.map_or("-", Phase::name)
    }

    /// The phase that holds writes to both sides.
    pub fn has_mirror(&self) -> bool {
        self.phase.is_some_and(|phase| phase.mirror().is_some())
    }

    /// Nothing is owed, apart from what the sessions are carrying just now, while the load runs. A proxy that has not asked
    /// the mirror may count as in flight what was given up: its age tells.
    pub fn caught_up(&self) -> bool {
        self.owed == 0 && self.tainted == 0 && self.oldest_ms < CARRIED_MS_MAX
    }

    /// Nothing is owed or in flight: both databases are equal, if nobody writes.
    pub fn all_paid(&self) -> bool {
        self.caught_up() && self.in_flight == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauges_are_summed_over_tables_and_the_phase_is_the_one_with_1() {
        let text = "# HELP crossfade_phase x\ncrossfade_phase{phase=\"old\"} 0\ncrossfade_phase{phase=\"dual-write\"} 1\n\
            crossfade_debt_keys{table=\"public.photos\"} 3\ncrossfade_debt_keys{table=\"public.likes\"} 4\n\
            crossfade_debt_in_flight 2\ncrossfade_debt_oldest_seconds 0.25\ncrossfade_tainted_tables 1\ncrossfade_mirror_up 1\nprocess_open_fds 9\n";
        let gauges = Gauges::parse(text);
        let phase = Some(Phase::DualWrite);
        let expected = Gauges { phase, owed: 7, in_flight: 2, oldest_ms: 250, tainted: 1, mirror_up: true };
        assert_eq!(gauges, expected);
        assert!(gauges.has_mirror() && !gauges.caught_up());
        let carried = Gauges { owed: 0, tainted: 0, ..gauges };
        assert!(carried.caught_up() && !carried.all_paid());
        assert!(Gauges { in_flight: 0, ..carried.clone() }.all_paid());
        assert!(!Gauges { oldest_ms: 9000, ..carried }.caught_up());
        assert_eq!(Gauges::parse("").phase_name(), "-");
    }
}
