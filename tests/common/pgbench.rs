//! PostgreSQL's own load generator.

use std::path::Path;
use std::process::Stdio;

/// What pgbench said at its end.
#[derive(Clone, Debug)]
pub struct Report {
    /// "number of transactions actually processed".
    pub transactions: u64,
    /// "number of failed transactions": those given up after serialization failures and deadlocks.
    pub failed: u64,
    /// All it said, on both streams.
    pub text: String,
}

/// Runs pgbench against a libpq URL with these arguments.
///
/// # Panics
/// It ends with an error: shows what it said.
pub async fn pgbench(program: &Path, url: &str, arguments: &[&str]) -> Report {
    try_pgbench(program, url, arguments).await.unwrap_or_else(|text| panic!("pgbench {arguments:?}: {text}"))
}

/// As [`pgbench`]; an error is what it said.
pub async fn try_pgbench(program: &Path, url: &str, arguments: &[&str]) -> Result<Report, String> {
    let output = tokio::process::Command::new(program)
        .args(arguments)
        .arg(url)
        .kill_on_drop(true)
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(|error| error.to_string())?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(text);
    }
    let transactions = number_after(&text, "number of transactions actually processed: ").unwrap_or(0);
    let failed = number_after(&text, "number of failed transactions: ").unwrap_or(0);
    Ok(Report { transactions, failed, text })
}

fn number_after(text: &str, label: &str) -> Option<u64> {
    let rest = text.split_once(label)?.1;
    rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())].parse().ok()
}
