//! The server's programs, and the account that they run as: PostgreSQL refuses to run as root.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::ClusterError;

/// The longest directory that leaves room for `/.s.PGSQL.65535` in a socket's address (108 bytes, one of them NUL).
const SOCKET_DIR_BYTES_MAX: usize = 90;

/// Where a version's programs are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// The directory with initdb and postgres.
    pub bindir: PathBuf,
    /// Such as 15.
    pub major: u32,
    /// Such as `15.18`, or `18beta1`.
    pub version: String,
}

impl Programs {
    /// Looks in `bindir` alone where it is given; else in `$CROSSFADE_PG_BIN`, /usr/lib/postgresql/*/bin (newest first), what
    /// `pg_config --bindir` says, and the directories of PATH. `major`: pass over other versions.
    ///
    /// # Errors
    /// No server was found: names the directories and what to install.
    pub fn find(bindir: Option<&Path>, major: Option<u32>) -> Result<Programs, ClusterError> {
        let candidates = match bindir {
            Some(bindir) => vec![bindir.to_owned()],
            None => candidates(),
        };
        let found = candidates.iter().filter_map(|bindir| Programs::in_directory(bindir));
        found.into_iter().find(|programs| major.is_none_or(|major| major == programs.major)).ok_or_else(|| {
            let version = major.map_or_else(String::new, |major| format!(" {major}"));
            let looked: Vec<String> = candidates.iter().map(|dir| dir.display().to_string()).collect();
            ClusterError::Missing(format!(
                "no PostgreSQL{version} server programs (initdb, postgres) in {}. Install the server (Debian, Ubuntu: \
                 apt-get install postgresql) or name its directory in CROSSFADE_PG_BIN.",
                looked.join(", ")
            ))
        })
    }

    /// Those of one side of a pair (`old` or `new`): in `$CROSSFADE_PG_OLD_BIN` or `$CROSSFADE_PG_NEW_BIN` alone where that is set, so that the
    /// two may be of different versions; else as [`Programs::find`] does.
    ///
    /// # Errors
    /// As [`Programs::find`].
    pub fn of_side(side: &str, major: Option<u32>) -> Result<Programs, ClusterError> {
        let named = std::env::var_os(format!("CROSSFADE_PG_{}_BIN", side.to_uppercase()));
        Programs::find(named.as_ref().map(Path::new), major)
    }

    fn in_directory(bindir: &Path) -> Option<Programs> {
        if !bindir.join("initdb").is_file() {
            return None;
        }
        let output = Command::new(bindir.join("postgres")).arg("--version").output().ok()?;
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let line = String::from_utf8(output.stdout).ok()?;
        let version = line.split_once("(PostgreSQL) ")?.1.split_whitespace().next()?.to_owned();
        let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
        Some(Programs { bindir: bindir.to_owned(), major: version[..digits].parse().ok()?, version })
    }

    /// A program of this version, or its bare name, for PATH to find, where this directory lacks it (servers come without
    /// psql now and then).
    pub fn path(&self, name: &str) -> PathBuf {
        let path = self.bindir.join(name);
        if path.is_file() { path } else { PathBuf::from(name) }
    }
}

fn candidates() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::env::var_os("CROSSFADE_PG_BIN").map(PathBuf::from).into_iter().collect();
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut majors: Vec<u32> = versions.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    majors.sort_unstable_by(|a, b| b.cmp(a));
    found.extend(majors.iter().map(|major| PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"))));
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        found.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    found.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut seen = Vec::new();
    found.retain(|dir| !dir.as_os_str().is_empty() && !seen.contains(dir) && (seen.push(dir.clone()), true).1);
    found
}

/// Who runs the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// We are root, and have to become it.
    switch: bool,
}

impl Account {
    /// The account that we run as; where that is root, `postgres`, else `nobody`.
    ///
    /// # Errors
    /// We are root and /etc/passwd has neither.
    pub fn find() -> Result<Account, ClusterError> {
        let path = Path::new("/proc/self");
        let ours = fs::metadata(path).map_err(ClusterError::io("look at", path))?;
        if ours.uid() != 0 {
            return Ok(Account { uid: ours.uid(), gid: ours.gid(), switch: false });
        }
        let path = Path::new("/etc/passwd");
        let passwd = fs::read_to_string(path).map_err(ClusterError::io("read", path))?;
        let account = |name| entry(&passwd, name).map(|(uid, gid)| Account { uid, gid, switch: true });
        account("postgres").or_else(|| account("nobody")).ok_or_else(|| {
            ClusterError::Missing(
                "PostgreSQL does not run as root, and /etc/passwd has no account `postgres` or `nobody` to run it as: \
                 add one, or run this as another user."
                    .to_owned(),
            )
        })
    }

    /// A program that will run as this account, in a clean environment.
    pub fn command(&self, program: &Path, dir: &Path) -> Command {
        let mut command = Command::new(program);
        // PGDATA, PGPORT and the like are about somebody's real server.
        command.env_clear().env("LC_ALL", "C").env("HOME", dir).current_dir(dir);
        for name in ["PATH", "LD_LIBRARY_PATH", "TMPDIR"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        if self.switch {
            command.uid(self.uid).gid(self.gid);
        }
        command
    }

    /// Makes a file or directory this account's own.
    ///
    /// # Errors
    /// The file is not there.
    pub fn own(&self, path: &Path) -> io::Result<()> {
        if self.switch { chown(path, Some(self.uid), Some(self.gid)) } else { Ok(()) }
    }

    /// Makes a fresh directory that only this account may enter, in the temporary directory.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn directory(&self, prefix: &str) -> Result<PathBuf, ClusterError> {
        let base = temporary_directory();
        let path = base.join(format!("{prefix}-{:016x}", rand::random::<u64>()));
        let made = fs::DirBuilder::new().mode(0o700).create(&path).and_then(|()| self.own(&path));
        made.map_err(ClusterError::io("make the directory", &path))?;
        Ok(path)
    }
}

/// $TMPDIR without symbolic links, or /tmp where a socket's name would be too long there.
pub(super) fn temporary_directory() -> PathBuf {
    let base = std::env::temp_dir();
    let base = base.canonicalize().unwrap_or(base);
    let room = SOCKET_DIR_BYTES_MAX - "/crossfade-0123456789abcdef".len();
    if base.as_os_str().len() <= room { base } else { PathBuf::from("/tmp") }
}

/// User and group of an account in the text of /etc/passwd.
fn entry(passwd: &str, name: &str) -> Option<(u32, u32)> {
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == name)?;
    Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_found_by_its_whole_name() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\npostgresql:x:7:8::/:\npostgres:x:101:104:admin:/var/lib:/bin/bash\n";
        assert_eq!(entry(passwd, "postgres"), Some((101, 104)));
        assert_eq!(entry(passwd, "nobody"), None);
    }

    #[test]
    fn a_server_that_is_not_there_is_reported_with_what_to_do() {
        let error = Programs::find(Some(Path::new("/nonexistent")), Some(15)).expect_err("nothing there").to_string();
        assert!(error.contains("/nonexistent") && error.contains("apt-get install postgresql"), "{error}");
    }
}
