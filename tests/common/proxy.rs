//! The built program, run as a user would: with a file, on free ports, killed on drop.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use crossfade::cluster::ports::PortLease;
use crossfade::cluster::processes::{self, Signal, Watchdog};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::until;

/// Lines of the log that a failed test shows.
const LOG_LINES: usize = 200;

/// What stands in the proxy's file.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// URL of old, for the control role.
    pub old: String,
    /// URL of new.
    pub new: String,
    /// The phase.
    pub phase: String,
    /// More YAML, at the top level.
    pub more: String,
    /// What else its process has in its environment.
    pub environment: Vec<(String, String)>,
}

impl ProxyConfig {
    fn yaml(&self, listen: u16, admin: u16) -> String {
        let ProxyConfig { old, new, phase, more, .. } = self;
        format!(
            "listen: 127.0.0.1:{listen}\nadmin: 127.0.0.1:{admin}\nold: {old}\nnew: {new}\nphase: {phase}\n{more}\n"
        )
    }
}

/// A running (or killed) `crossfade run`.
pub struct Proxy {
    config: ProxyConfig,
    listen: PortLease,
    admin: PortLease,
    dir: tempfile::TempDir,
    process: Option<(Child, Watchdog)>,
}

impl Proxy {
    /// Starts it and waits until it is ready.
    pub async fn start(config: ProxyConfig) -> Proxy {
        let lease = || PortLease::take().expect("a free port for the proxy");
        let dir = tempfile::tempdir().expect("a directory");
        let mut proxy = Proxy { config, listen: lease(), admin: lease(), dir, process: None };
        proxy.write_config();
        proxy.run().await;
        proxy
    }

    /// Where PostgreSQL clients connect, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.listen.port()
    }

    /// Where its HTTP is, on 127.0.0.1.
    pub fn admin_port(&self) -> u16 {
        self.admin.port()
    }

    /// A libpq URL through the proxy.
    pub fn url_as(&self, role: &str, password: &str, database: &str) -> String {
        format!("postgres://{role}:{password}@127.0.0.1:{}/{database}", self.port())
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("it runs").0.id()
    }

    /// The file that it runs with.
    pub fn config_path(&self) -> PathBuf {
        self.dir.path().join("crossfade.yaml")
    }

    /// What it has logged, over all its runs.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Starts it again with the same file, after [`Proxy::kill9`] or [`Proxy::terminate`], and waits until it is ready.
    pub async fn run(&mut self) {
        assert!(self.process.is_none(), "the proxy runs already");
        let log = File::options().append(true).create(true).open(self.dir.path().join("log")).expect("a log");
        let child = Command::new(env!("CARGO_BIN_EXE_crossfade"))
            .args(["run", "--config"])
            .arg(self.config_path())
            .envs(self.config.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("runs");
        let watchdog = Watchdog::over(child.id()).expect("guards");
        self.process = Some((child, watchdog));
        until("the proxy is ready (/readyz)", async || {
            self.assert_alive();
            self.http("/readyz").await.is_some_and(|(status, _)| status == 200)
        })
        .await;
    }

    /// Kills it with SIGKILL.
    pub fn kill9(&mut self) {
        self.end(Signal::Kill);
    }

    /// Asks it to end (SIGTERM) and waits: it lets its clients finish.
    pub async fn terminate(&mut self) -> ExitStatus {
        let (mut child, mut watchdog) = self.process.take().expect("it runs");
        processes::signal(Signal::Terminate, &[child.id()]);
        let mut status = None;
        until("the proxy has ended", async || {
            status = child.try_wait().expect("waits");
            status.is_some()
        })
        .await;
        watchdog.release();
        status.expect("it ended")
    }

    /// Kills it with SIGKILL and starts it again.
    pub async fn restart(&mut self) {
        self.kill9();
        self.run().await;
    }

    /// Changes the phase in the file, as an operator would, and waits until it holds.
    pub async fn set_phase(&mut self, phase: &str) {
        self.request_phase(phase);
        self.reaches(phase).await;
    }

    /// Waits until a phase that was asked for holds, and brings the evidence that its gates ask for meanwhile.
    pub async fn reaches(&self, phase: &str) {
        until(&format!("phase {phase} holds"), async || {
            if self.holds(phase).await {
                return true;
            }
            self.bring_evidence().await;
            false
        })
        .await;
    }

    /// What an operator does about the gate that the move waits for, if it is one of these.
    async fn bring_evidence(&self) {
        let status = self.http("/status").await.map(|(_, status)| status).unwrap_or_default();
        let waits: serde_json::Value = serde_json::from_str(&status).unwrap_or_default();
        let waits = waits["waiting_for"].as_str().unwrap_or_default();
        let arguments: &[&str] = if waits.contains("run `crossfade verify`") {
            &["verify"]
        } else if waits.contains("`crossfade phase --backup WHERE`") {
            &["phase", "--backup", "of a test"]
        } else {
            return;
        };
        let output = self.crossfade(arguments).await;
        if output.status.code() == Some(2) {
            eprintln!("{arguments:?}: {output:?}");
        }
        // It looks again at once, and not in a while.
        self.hang_up();
        tokio::time::sleep(Duration::from_millis(300)).await;
    }

    /// Compares both sides: `crossfade verify`. Its answer may be no; the gates say what they make of it.
    pub async fn verify(&self) {
        let output = self.crossfade(&["verify"]).await;
        assert_ne!(output.status.code(), Some(2), "verify: {output:?}");
    }

    /// SIGHUP: the file is read again.
    pub fn hang_up(&self) {
        let pid = self.pid().to_string();
        let sent = Command::new("kill").args(["-HUP", pid.as_str()]).status();
        assert!(sent.expect("runs").success());
    }

    /// Changes the phase in the file and does not wait.
    pub fn request_phase(&mut self, phase: &str) {
        self.config.phase = phase.to_owned();
        self.write_config();
    }

    /// Whether a phase holds, by its metric.
    pub async fn holds(&self, phase: &str) -> bool {
        self.assert_alive();
        self.metrics(&format!("crossfade_phase{{phase=\"{phase}\"}}")).await == 1.0
    }

    /// Changes other lines of the file; see [`ProxyConfig::more`].
    pub fn set_more(&mut self, more: &str) {
        self.config.more = more.to_owned();
        self.write_config();
    }

    /// The sum of the series whose text begins so: `crossfade_debt_keys`, or `crossfade_phase{phase="old"}`. 0 if none.
    pub async fn metrics(&self, series: &str) -> f64 {
        let (status, text) = self.http("/metrics").await.expect("the proxy answers HTTP");
        assert_eq!(status, 200, "/metrics: {text}");
        text.lines()
            .filter(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(['{', ' '])))
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .sum()
    }

    /// Runs another command of the program with the same file, such as `["repair", "--wait"]`.
    pub async fn crossfade(&self, arguments: &[&str]) -> Output {
        tokio::process::Command::new(env!("CARGO_BIN_EXE_crossfade"))
            .args(arguments)
            .arg("--config")
            .arg(self.config_path())
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .output()
            .await
            .expect("runs")
    }

    /// Waits until nothing is owed or in flight: `crossfade repair --wait`.
    pub async fn settle(&self) {
        let output = self.crossfade(&["repair", "--wait"]).await;
        let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).join("");
        assert!(output.status.success(), "repair --wait ended with {}: {text}", output.status);
    }

    /// The most memory that its process has held so far (VmHWM), in bytes.
    pub fn peak_memory_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// One GET on the admin port: status and body. None: nobody answers.
    pub async fn http(&self, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.admin_port())).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.ok()?.ok()?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    }

    /// A file is replaced in one step, or the proxy might read half of it.
    fn write_config(&self) {
        let part = self.dir.path().join("crossfade.yaml.part");
        fs::write(&part, self.config.yaml(self.port(), self.admin_port())).expect("writes");
        fs::rename(part, self.config_path()).expect("renames");
    }

    /// A process that ended of itself fails the test at once, with its log.
    fn assert_alive(&self) {
        let pid = self.pid();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The state stands behind the name, which is in parentheses (proc(5)).
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        let gone = matches!(state, None | Some('Z' | 'X'));
        assert!(!gone, "`crossfade run` ended by itself; its log:\n{}", self.log());
    }

    fn end(&mut self, signal: Signal) {
        if let Some((mut child, mut watchdog)) = self.process.take() {
            processes::signal(signal, &[child.id()]);
            let status = child.wait().expect("waits");
            // Released only now: until it has been waited for, its number is nobody else's.
            watchdog.release();
            if status.signal().is_none() && std::thread::panicking() {
                eprintln!("`crossfade run` had ended before: {status}");
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.end(Signal::Kill);
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- the proxy's log ---\n{}", lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"));
        }
    }
}
