//! What ARCHITECTURE.md promises and can be read off the source text.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A module imports only from groups above its own in this list.
const GROUPS: &[&[&str]] = &[
    &["phase", "clock", "wire", "sql", "ledger"],
    &["config", "metrics", "cluster"],
    &["auth", "catalog"],
    &["backend", "plan"],
    &["mirror", "migrate", "check", "reads"],
    &["shared", "switch"],
    &["session"],
    &["server"],
    &["demo"],
    &["cli"],
];

/// Modules of one group that know each other all the same, and those of lower groups that do not.
const ALLOWED: &[(&str, &str)] = &[("shared", "switch"), ("switch", "shared")];
const FORBIDDEN: &[(&str, &str)] = &[("session", "migrate"), ("migrate", "mirror"), ("migrate", "backend")];

/// Lines in one file at most.
const LINES_MAX: usize = 700;

/// Modules without I/O, waiting and clocks.
const PURE: &[&str] = &[
    "src/phase.rs",
    "src/sql",
    "src/plan",
    "src/ledger/debts.rs",
    "src/mirror/flight.rs",
    "src/mirror/writes.rs",
    "src/migrate/rules.rs",
    "src/switch/gates/rules.rs",
    "src/server/console/command.rs",
    "src/session/expect.rs",
    "src/session/books.rs",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file's path from the root, and its text.
struct File {
    path: String,
    text: String,
}

impl File {
    fn read(path: &Path) -> File {
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let path = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
        File { path, text }
    }

    /// Its lines with their numbers, without comments.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let bare = |line: &'_ str| line.find("//").unwrap_or(line.len());
        self.text.lines().enumerate().map(move |(at, line)| (at + 1, &line[..bare(line)]))
    }

    /// The module of the crate that it belongs to; None for the crate's roots.
    fn module(&self) -> Option<&str> {
        let module = self.path.strip_prefix("src/")?.split(['/', '.']).next()?;
        (!matches!(module, "lib" | "main")).then_some(module)
    }
}

fn collect(folder: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("can be read").path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
            collect(&path, extensions, found);
        } else if path.extension().is_some_and(|extension| extensions.iter().any(|wanted| extension == *wanted)) {
            found.push(path);
        }
    }
}

fn files(folders: &[&str], extensions: &[&str]) -> Vec<File> {
    let mut found = Vec::new();
    for folder in folders {
        let path = root().join(folder);
        if path.is_dir() { collect(&path, extensions, &mut found) } else { found.push(path) }
    }
    assert!(!found.is_empty(), "no file below {folders:?}");
    found.iter().map(|path| File::read(path)).collect()
}

fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

fn group(module: &str) -> usize {
    GROUPS
        .iter()
        .position(|group| group.contains(&module))
        .unwrap_or_else(|| panic!("module {module} has no group: enter it here and in ARCHITECTURE.md"))
}

/// Modules that a line names as `crate::module`.
fn imported(line: &str) -> impl Iterator<Item = &str> {
    line.split("crate::").skip(1).map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
        &rest[..end]
    })
}

fn may_import(from: &str, to: &str) -> bool {
    from == to || ALLOWED.contains(&(from, to)) || (group(to) < group(from) && !FORBIDDEN.contains(&(from, to)))
}

#[test]
fn imports_go_down() {
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for file in files(&["src"], &["rs"]) {
        let Some(module) = file.module() else { continue };
        for (number, line) in file.code() {
            for to in imported(line) {
                assert!(
                    !to.is_empty(),
                    "{}:{number}: one path in each `use crate::`, so that it can be read here",
                    file.path
                );
                seen.insert((module.to_owned(), to.to_owned()));
                if !may_import(module, to) {
                    wrong.push(format!("{}:{number}: {module} imports {to}", file.path));
                }
            }
        }
    }
    assert!(seen.len() > 50, "imports are found at all: {seen:?}");
    assert_none("imports that go up, or sideways", &wrong);
    assert!(!may_import("mirror", "session") && !may_import("session", "migrate") && !may_import("wire", "config"));
}

/// No time of day of this machine is compared with a server's, whose clock may be an hour off: ages are asked for where the times were written, and what is
/// measured here is measured by clocks that know no time of day.
#[test]
fn no_clock_on_the_wall_is_read() {
    let wall = ["SystemTime", "UNIX_EPOCH", "chrono::", "Utc::now", "OffsetDateTime", "Local::now"];
    let mut wrong = Vec::new();
    for file in files(&["src"], &["rs"]) {
        for (number, line) in file.code() {
            if wall.iter().any(|word| line.contains(word)) {
                wrong.push(format!("{}:{number}: {}", file.path, line.trim()));
            }
        }
    }
    assert_none("a clock on the wall", &wrong);
}

#[test]
fn sides_are_called_old_and_new_and_nothing_else() {
    // `source` is also a cause of an error and a text that was parsed; it is a side only in front of these.
    let sides = [
        "master",
        "slave",
        "source_db",
        "target_db",
        "source database",
        "target database",
        "source side",
        "target side",
        "source and target",
    ];
    let mut wrong = Vec::new();
    let ours = Path::new(file!()).file_name().and_then(|name| name.to_str()).expect("a name");
    let folders = [
        "src",
        "tests/common",
        "tests",
        "docs",
        "config",
        "deploy",
        "scripts",
        "bench",
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
    ];
    for file in files(&folders, &["rs", "md", "yaml", "json", "sql", "sh", "py", "service", "yml"]) {
        if file.path.ends_with(ours) || file.path.contains("fixtures") {
            continue;
        }
        for (at, line) in file.text.lines().enumerate() {
            // PostgreSQL's own word for its first process.
            let line = line.to_lowercase().replace("postmaster", "");
            if let Some(word) = sides.iter().find(|word| line.contains(**word)) {
                wrong.push(format!("{}:{}: {word}", file.path, at + 1));
            }
        }
    }
    assert_none("words for sides that are not ours", &wrong);
}

#[test]
fn there_is_no_unsafe_code_and_no_global_state() {
    let manifest = File::read(&root().join("Cargo.toml"));
    assert!(manifest.text.contains("unsafe_code = \"forbid\""), "Cargo.toml forbids unsafe code");
    let mut wrong = Vec::new();
    for file in files(&["src"], &["rs"]) {
        for (number, line) in file.code() {
            let code = line.trim_start().trim_start_matches("pub ").trim_start_matches("pub(crate) ");
            if code.starts_with("static ")
                || ["thread_local!", "LazyLock", "lazy_static"].iter().any(|word| code.contains(word))
            {
                wrong.push(format!("{}:{number}: {}", file.path, line.trim()));
            }
        }
    }
    assert_none("global state", &wrong);
}

#[test]
fn what_is_pure_does_not_wait() {
    let words = [".await", "async ", "tokio", "Instant", "SystemTime", "std::fs", "std::net", "std::io", "rand::"];
    let mut wrong = Vec::new();
    for file in files(PURE, &["rs"]) {
        for (number, line) in file.code() {
            if let Some(word) = words.iter().find(|word| line.contains(**word)) {
                wrong.push(format!("{}:{number}: {word}", file.path));
            }
        }
    }
    assert_none("I/O, waiting or clocks in pure modules", &wrong);
}

#[test]
fn clients_data_does_not_pass_through_the_driver_of_control_connections() {
    let mut wrong = Vec::new();
    for file in files(&["src/wire", "src/backend", "src/plan", "src/mirror", "src/session"], &["rs"]) {
        wrong.extend(
            file.code()
                .filter(|(_, line)| line.contains("tokio_postgres"))
                .map(|(number, _)| format!("{}:{number}", file.path)),
        );
    }
    assert_none("tokio_postgres on the data path", &wrong);
}

#[test]
fn ledger_rows_are_deleted_where_the_page_says_and_nowhere_else() {
    let deleting = |file: &File| {
        file.code().any(|(_, line)| {
            line.contains("DELETE FROM crossfade.ledger") || line.contains("TRUNCATE crossfade.ledger")
        })
    };
    let found: Vec<String> =
        files(&["src"], &["rs", "sql"]).iter().filter(|file| deleting(file)).map(|file| file.path.clone()).collect();
    assert_eq!(found, ["src/ledger/clear.rs", "src/switch/copies.rs", "src/switch/mover.rs"]);
}

#[test]
fn files_are_short() {
    let long = files(&["src", "tests"], &["rs"])
        .iter()
        .filter_map(|file| {
            let lines = file.text.lines().count();
            (lines > LINES_MAX).then(|| format!("{}: {lines} lines; what is its second job?", file.path))
        })
        .collect::<Vec<_>>();
    assert_none("long files", &long);
}

#[test]
fn the_page_names_every_module() {
    let page = File::read(&root().join("ARCHITECTURE.md"));
    let library = File::read(&root().join("src/lib.rs"));
    let modules: Vec<&str> =
        library.code().filter_map(|(_, line)| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert!(modules.len() > 15, "modules are found: {modules:?}");
    let missing: Vec<String> = modules
        .iter()
        .filter(|module| {
            ![format!("`{module}/`"), format!("`{module}.rs`")].iter().any(|name| page.text.contains(name))
        })
        .map(|module| (*module).to_owned())
        .collect();
    assert_none("modules that ARCHITECTURE.md does not name", &missing);
    // Functions that the life of a statement names are there.
    let all: String = files(&["src"], &["rs"]).into_iter().map(|file| file.text).collect();
    let names = [
        "requests",
        "begin",
        "plan_for",
        "replies",
        "judge",
        "capture",
        "before_commit",
        "answered",
        "commit_mirror",
        "begin_ours",
        "drive",
        "unmirrored",
        "steps",
        "serve",
    ];
    let gone: Vec<String> =
        names.iter().filter(|name| !all.contains(&format!("fn {name}("))).map(|name| (*name).to_owned()).collect();
    assert_none("functions that the page names and that are gone", &gone);
}

/// A safeguard that tests/mutants.json says can be taken out.
#[derive(serde::Deserialize)]
struct Mutant {
    name: String,
    file: String,
    find: String,
    replace: String,
    test: String,
    filter: String,
}

/// The texts of a test binary: one file, or a folder.
fn texts_of(test: &str) -> Option<String> {
    let folder = match test {
        "lib" => "src".to_owned(),
        _ if root().join(format!("tests/{test}.rs")).exists() => format!("tests/{test}.rs"),
        _ => format!("tests/{test}"),
    };
    root().join(&folder).exists().then(|| files(&[&folder], &["rs"]).into_iter().map(|file| file.text).collect())
}

#[test]
fn safeguards_that_are_taken_out_are_there() {
    let list = File::read(&root().join("tests/mutants.json"));
    let mutants: Vec<Mutant> = serde_json::from_str(&list.text).expect("a list");
    assert!(mutants.len() > 20, "the list is read");
    let mut wrong = Vec::new();
    for mutant in &mutants {
        let times = File::read(&root().join(&mutant.file)).text.matches(&mutant.find).count();
        if times != 1 || mutant.find == mutant.replace {
            wrong.push(format!("{}: {} has what is to be taken out {times} times", mutant.name, mutant.file));
        }
        let called = |text: &String| text.contains(&format!("fn {}", mutant.filter));
        if !texts_of(&mutant.test).as_ref().is_some_and(called) {
            wrong.push(format!("{}: {} has no test {}", mutant.name, mutant.test, mutant.filter));
        }
    }
    let names: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.name.as_str()).collect();
    assert_eq!(names.len(), mutants.len(), "each name once");
    assert_none("tests/mutants.json", &wrong);
}
