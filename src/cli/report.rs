//! `crossfade report`: the statements that the proxy has seen, by shape.

use std::path::Path;

use serde_json::Value;

use super::{Trouble, ask_proxy};
use crate::config;

/// `crossfade report`.
pub async fn report(path: &Path, json: bool) -> Result<bool, Trouble> {
    let config = config::load(path)?;
    let admin = config.admin.ok_or("the file has no `admin` address: the running proxy is asked there")?;
    let Some(document) = ask_proxy(admin, "/report").await else {
        return Err(format!("no proxy answers at {admin}: statements are counted by the proxy that runs").into());
    };
    if json {
        println!("{document:#}");
    } else {
        print!("{}", for_people(&document));
    }
    Ok(true)
}

fn for_people(document: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let reads = &document["reads"];
    let mut out = format!(
        "phase {} (epoch {}); eligible reads in dual-read: {} answered by new, by the authority",
        text(&document["phase"]),
        document["epoch"],
        reads["served_by_new"]
    );
    for (reason, count) in reads["kept_on_the_authority"].as_object().into_iter().flatten() {
        out += &format!(" {count} ({reason})");
    }
    out += &format!("; {} comparisons dropped\n", reads["comparisons_dropped"]);
    for shape in document["shapes"].as_array().into_iter().flatten() {
        out += &format!("{:>10}  {}\n", shape["count"].to_string(), text(&shape["shape"]));
        let mirrored = text(&shape["mirrored"]);
        let mut notes = vec![if shape["opaque"] == true { format!("opaque: {mirrored}") } else { mirrored }];
        if let Some(why) = shape["split"].as_str() {
            notes.insert(0, format!("split: {why}; refused once new is the authority"));
        }
        match shape["stays_because"].as_str() {
            Some(why) => notes.push(format!("stays on the authority: {why}")),
            None => notes.push("may be served by new".to_owned()),
        }
        let by: Vec<&str> = shape["applications"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !by.is_empty() {
            notes.push(format!("by {}", by.join(", ")));
        }
        out += &format!("            {}\n", notes.join("; "));
        let found = &shape["compared"];
        if found.is_object() {
            out += &format!(
                "            compared {} times: {} different, {} reordered, {} loose, {} unsettled, {} failed, {} not run (owed); p50/p95/p99 ms on old {}/{}/{}, on new {}/{}/{}\n",
                found["runs"],
                found["different"],
                found["reordered"],
                found["loose"],
                found["unsettled"],
                found["failed"],
                found["owed"],
                found["old"]["p50_ms"],
                found["old"]["p95_ms"],
                found["old"]["p99_ms"],
                found["new"]["p50_ms"],
                found["new"]["p95_ms"],
                found["new"]["p99_ms"],
            );
            for sample in found["samples"].as_array().into_iter().flatten() {
                out += &format!("              {sample}\n");
            }
            out += &plans(&found["plans"]);
            if let Some(error) = found["error"].as_str() {
                out += &format!("              {error}\n");
            }
        }
    }
    out
}

/// Where new takes longer: how both sides go about it.
fn plans(plans: &Value) -> String {
    let mut out = String::new();
    for side in ["old", "new"] {
        for line in plans[side].as_array().into_iter().flatten().filter_map(Value::as_str) {
            out += &format!("              {side}: {line}\n");
        }
    }
    for missing in plans["missing"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        out += &format!("              {missing}\n");
    }
    out
}
