//! `crossfade check`: what it shows.

use std::path::Path;

use super::Trouble;
use crate::check::{self, Level};
use crate::config;
use crate::phase::Side;
use crate::shared::Shared;

/// `crossfade check`: true when nothing of it stands in the way of a migration.
pub async fn check(path: &Path, json: bool) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let old = Shared::database(&config, Side::Old).connect("crossfade check").await?;
    let new = Shared::database(&config, Side::New).connect("crossfade check").await?;
    let found = check::run(&config, &old, &new).await?;
    let errors = found.iter().filter(|finding| finding.level == Level::Error).count();
    let warnings = found.len() - errors;
    if json {
        let document = serde_json::json!({ "errors": errors, "warnings": warnings, "findings": found });
        println!("{document:#}");
        return Ok(errors == 0);
    }
    for finding in &found {
        let level = if finding.level == Level::Error { "error" } else { "warning" };
        let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        println!(
            "{level}: {} ({}, {}): {}; mend on {}: {}",
            finding.object,
            finding.kind,
            finding.side,
            one_line(&finding.what),
            finding.side,
            one_line(&finding.mend)
        );
    }
    println!("{errors} errors, {warnings} warnings");
    Ok(errors == 0)
}
