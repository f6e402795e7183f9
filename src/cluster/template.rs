//! Data directories as initdb leaves them, made once for a machine and user, and copied for each cluster.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::ClusterError;
use super::programs::{Account, Programs, temporary_directory};

/// An initialised data directory that no server runs on.
pub(super) struct Template {
    dir: PathBuf,
    /// Of role `postgres`.
    pub(super) password: String,
}

/// The template of a version, lineage and list of initdb's arguments, made now if need be.
pub(super) async fn ready(
    programs: &Programs,
    account: &Account,
    lineage: &str,
    arguments: &[String],
) -> Result<Template, ClusterError> {
    let mut hasher = DefaultHasher::new();
    (&programs.bindir, &programs.version, lineage, arguments, account.uid).hash(&mut hasher);
    let name = format!("crossfade-template-{}-{:016x}", programs.major, hasher.finish());
    let (programs, account, arguments) = (programs.clone(), account.clone(), arguments.to_owned());
    let work = move || make_or_find(&programs, &account, &name, &arguments);
    tokio::task::spawn_blocking(work).await.expect("making a template does not panic")
}

/// Copies a template to `data` in a cluster's directory.
pub(super) async fn copy(account: &Account, template: &Template, dir: &Path) -> Result<(), ClusterError> {
    let mut command = account.command(Path::new("cp"), dir);
    command.args(["-a", "--reflink=auto"]).arg(template.dir.join("data")).arg(dir.join("data"));
    tokio::task::spawn_blocking(move || run(command)).await.expect("cp does not panic")
}

fn make_or_find(
    programs: &Programs,
    account: &Account,
    name: &str,
    arguments: &[String],
) -> Result<Template, ClusterError> {
    let dir = temporary_directory().join(name);
    // One makes it, the others wait: initdb takes a second of a core.
    let lock_path = temporary_directory().join(format!("{name}.lock"));
    let lock = File::create(&lock_path).and_then(|file| file.lock().map(|()| file));
    let _lock = lock.map_err(ClusterError::io("lock", &lock_path))?;
    let password_path = dir.join("password");
    if !password_path.exists() {
        let fresh = account.directory("crossfade-initdb")?;
        let made = initialise(programs, account, &fresh, arguments).and_then(|()| {
            // A half-made directory never has the template's name.
            fs::rename(&fresh, &dir).map_err(ClusterError::io("name the template", &dir))
        });
        if made.is_err() {
            drop(fs::remove_dir_all(&fresh));
        }
        made?;
    }
    let owner = fs::metadata(&dir).map(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata));
    if owner.map_err(ClusterError::io("look at", &dir))? != account.uid {
        let path = dir.display();
        return Err(ClusterError::Missing(format!("{path} belongs to another user: remove it, or set TMPDIR")));
    }
    let password = fs::read_to_string(&password_path).map_err(ClusterError::io("read", &password_path))?;
    Ok(Template { dir, password: password.trim().to_owned() })
}

fn initialise(programs: &Programs, account: &Account, dir: &Path, arguments: &[String]) -> Result<(), ClusterError> {
    // Random, since the port is open to every user of the machine.
    let password_path = dir.join("password");
    let written = fs::write(&password_path, format!("{:016x}\n", rand::random::<u64>()));
    written.and_then(|()| account.own(&password_path)).map_err(ClusterError::io("write", &password_path))?;
    let mut command = account.command(&programs.path("initdb"), dir);
    command.arg("-D").arg(dir.join("data")).arg("--pwfile").arg(&password_path);
    command.args(["--no-sync", "--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]);
    command.args(arguments);
    run(command)
}

fn run(mut command: Command) -> Result<(), ClusterError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |output: String| ClusterError::Program { program: program.clone(), output };
    let output = command.output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let texts = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Err(failed(texts.join("")))
}
