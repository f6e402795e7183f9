//! A free TCP port that stays ours.
//!
//! Binding port 0 and letting go again is a race twice over: with another test that does the same, and, when a server is
//! restarted, with anybody's outgoing connection, which takes its port from the same range. So ports come from below the
//! system's range for outgoing connections, and each is held by a lock on a file for as long as its lease lives.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener};

/// Below what Linux gives to outgoing connections (32768 and up), above what services are known by.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// Enough to find one in a crowd, few enough to end.
const TRIES: usize = 1_000;

/// A port on 127.0.0.1 that no other lease on this machine has.
#[derive(Debug)]
pub struct PortLease {
    port: u16,
    /// The lock goes when this is closed, also by a kill.
    _lock: File,
}

impl PortLease {
    /// Takes a port that nobody listens on.
    ///
    /// # Errors
    /// No lock file can be made in the temporary directory, or every port that was tried is taken.
    pub fn take() -> io::Result<PortLease> {
        // Several users may run tests on one machine; each has locks of its own, and the bind below sees the rest.
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata("/proc/self")?);
        let dir = std::env::temp_dir().join(format!("crossfade-ports-{owner}"));
        fs::create_dir_all(&dir)?;
        for _ in 0..TRIES {
            let port = rand::random_range(PORTS);
            let lock = File::create(dir.join(port.to_string()))?;
            if lock.try_lock().is_ok() && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
                return Ok(PortLease { port, _lock: lock });
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, format!("no free port found in {PORTS:?}")))
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn leases_that_live_at_once_differ_and_are_free_to_listen_on() {
        let leases: Vec<PortLease> = (0..50).map(|_| PortLease::take().expect("a port")).collect();
        let ports: BTreeSet<u16> = leases.iter().map(PortLease::port).collect();
        assert_eq!(ports.len(), leases.len());
        for port in ports {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("free");
        }
    }
}
