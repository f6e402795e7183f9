//! The processes of one server, found by their working directory: PostgreSQL's processes all work in the data directory,
//! those too whose postmaster is dead, and no other program does.

use std::fs;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use super::programs::Account;

/// How long a process that was sent SIGKILL may take to go.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is sent to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGHUP: read the configuration again.
    Reload,
    /// SIGINT: to a postmaster, a fast shutdown.
    Interrupt,
    /// SIGQUIT: to a postmaster, an immediate shutdown.
    Quit,
    /// SIGTERM: please end.
    Terminate,
    /// SIGKILL: end.
    Kill,
    /// SIGSTOP: freeze.
    Freeze,
    /// SIGCONT: go on.
    Continue,
}

impl Signal {
    fn name(self) -> &'static str {
        match self {
            Signal::Reload => "HUP",
            Signal::Interrupt => "INT",
            Signal::Quit => "QUIT",
            Signal::Terminate => "TERM",
            Signal::Kill => "KILL",
            Signal::Freeze => "STOP",
            Signal::Continue => "CONT",
        }
    }
}

/// Sends a signal to processes; those that are gone already are passed over.
pub fn signal(signal: Signal, pids: &[u32]) {
    if pids.is_empty() {
        return;
    }
    // kill(2) itself cannot be called from safe code; the shell's own `kill` is everywhere.
    let sent = Command::new("/bin/sh")
        .args(["-c", r#"for pid; do kill -s "$0" "$pid"; done"#, signal.name()])
        .args(pids.iter().map(u32::to_string))
        .stderr(Stdio::null())
        .status();
    sent.expect("/bin/sh runs");
}

/// The processes of the server whose data directory this is.
pub fn of(data: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let of_process = |name: &str| format!("/proc/{pid}/{name}");
            fs::read_link(of_process("cwd")).is_ok_and(|cwd| cwd == data)
                && fs::read_to_string(of_process("comm")).is_ok_and(|name| name.trim() == "postgres")
        })
        .collect()
}

/// Kills all processes of a server with SIGKILL and waits until they hold nothing any more.
pub fn kill_all(data: &Path) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let pids = of(data);
        if pids.is_empty() || Instant::now() > deadline {
            return;
        }
        signal(Signal::Kill, &pids);
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The server's segment of System V shared memory, by which it knows that it is the only one on its data. It outlives a SIGKILL, and a machine
/// has some thousands of them at most.
pub fn shared_memory(data: &Path) -> Option<String> {
    let lock = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    // The seventh line: its key and its id.
    Some(lock.lines().nth(6)?.split_whitespace().nth(1)?.to_owned())
}

/// Gives it back, once the server is gone.
pub fn release(segment: &str) {
    let quiet = || std::process::Stdio::null();
    drop(std::process::Command::new("ipcrm").args(["-m", segment]).stdout(quiet()).stderr(quiet()).status());
}

/// Freezes all processes of a server.
pub fn freeze_all(data: &Path) {
    let mut frozen = Vec::new();
    // Until a look finds nobody new: the postmaster may have been starting a process at the first.
    loop {
        let pids = of(data);
        if pids.iter().all(|pid| frozen.contains(pid)) {
            return;
        }
        signal(Signal::Freeze, &pids);
        frozen = pids;
    }
}

/// A shell that waits for the end of the process which made it, then kills what works in a directory's `data` and removes
/// the directory. SIGKILL leaves no other way: nothing of ours runs after it, but the pipe to the shell closes.
#[derive(Debug)]
pub struct Watchdog {
    shell: Child,
    pipe: Option<ChildStdin>,
}

/// `read` succeeds when the watchdog is released, and fails at the end of the pipe.
const WATCHDOG: &str = r#"
trap '' INT TERM HUP
read -r released && exit 0
for try in 1 2 3 4 5 6 7 8 9 10; do
  cwds=$(find /proc/[0-9]* -maxdepth 1 -name cwd -lname "$1/data" 2>/dev/null)
  [ -n "$cwds" ] || break
  for cwd in $cwds; do pid=${cwd#/proc/}; kill -s KILL "${pid%/cwd}" 2>/dev/null; done
  sleep 0.1
done
rm -rf -- "$1"
"#;

/// The same for one process.
const WATCHDOG_OF_PROCESS: &str = r#"
trap '' INT TERM HUP
read -r released && exit 0
kill -s KILL "$1" 2>/dev/null
"#;

impl Watchdog {
    /// Sees to it that a process which we started ends when we do. Release it once the process has been waited for.
    ///
    /// # Errors
    /// The shell cannot be started.
    pub fn over(pid: u32) -> io::Result<Watchdog> {
        Watchdog::spawn(Command::new("/bin/sh"), WATCHDOG_OF_PROCESS, Path::new(&pid.to_string()))
    }

    /// Guards a directory (absolute, without symbolic links).
    ///
    /// # Errors
    /// The shell cannot be started.
    pub fn guard(account: &Account, dir: &Path) -> io::Result<Watchdog> {
        Watchdog::spawn(account.command(Path::new("/bin/sh"), Path::new("/")), WATCHDOG, dir)
    }

    fn spawn(mut command: Command, script: &str, argument: &Path) -> io::Result<Watchdog> {
        command.args(["-c", script, "watchdog"]).arg(argument);
        // A group of its own, so that what kills ours does not reach it.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut shell = command.spawn()?;
        let pipe = shell.stdin.take();
        Ok(Watchdog { shell, pipe })
    }

    /// Sends it home: there is nothing left to guard.
    pub fn release(&mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            drop(pipe.write_all(b"released\n"));
            drop(pipe);
            drop(self.shell.wait());
        }
    }
}
