//! `check`: whether this host can run pods, how well, and what would help.

use std::process::{Command, Stdio};

use kata_config::Artefacts;
use serde::Serialize;
use serde_json::Value;

use super::{Outcome, absolute};
use crate::cli::CheckArgs;
use crate::failure::Failure;
use crate::pod::SHIM;
use crate::table;

mod host;
mod machine;

/// What was found out about one thing.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// The thing.
    what: &'static str,
    verdict: Verdict,
    /// How it is.
    found: String,
    /// What that means for pods; only where it is not well.
    cost: Option<String>,
    /// What to do about it; only where it is not well.
    remedy: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Pods run, and could run better.
    Warning,
    /// No pod runs.
    Failed,
}

impl Finding {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Ok, found: found.into(), cost: None, remedy: None }
    }

    fn warning(what: &'static str, found: impl Into<String>, cost: &str, remedy: &str) -> Self {
        let (cost, remedy) = (Some(cost.to_owned()), Some(remedy.to_owned()));
        Self { what, verdict: Verdict::Warning, found: found.into(), cost, remedy }
    }

    fn failed(what: &'static str, found: impl Into<String>, remedy: &str) -> Self {
        let (cost, remedy) = (Some("no pod can run".to_owned()), Some(remedy.to_owned()));
        Self { what, verdict: Verdict::Failed, found: found.into(), cost, remedy }
    }
}

/// Looks at the host and prints what was found.
pub fn run(args: &CheckArgs) -> Outcome {
    let mut findings = match ask_owner(args) {
        Ok(answer) => machine::findings(&answer),
        Err(failure) => {
            let why = failure.error.map(|error| crate::failure::chain(&*error)).unwrap_or_default();
            vec![Finding::failed(
                "owner",
                why,
                "mend what it says; nothing about virtual machines is known without it",
            )]
        }
    };
    findings.extend(host::findings());
    let able = findings.iter().all(|finding| finding.verdict != Verdict::Failed);
    if args.json {
        println!("{:#}", serde_json::json!({ "can_run_pods": able, "findings": findings }));
    } else {
        print!("{}", as_text(&findings, able));
    }
    Ok(if able { 0 } else { 1 })
}

/// What the owner's program says of this host: it is the one that would run the virtual machine.
fn ask_owner(args: &CheckArgs) -> Result<Value, Failure> {
    let mut command = Command::new(Artefacts::program(SHIM)?);
    command.args(["host", "--json"]).stdin(Stdio::null());
    if let Some(config) = &args.config {
        command.arg("--config").arg(absolute(config));
    }
    for assignment in &args.set {
        command.arg("--set").arg(assignment);
    }
    let output = command.output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::text(words.trim().trim_start_matches(SHIM).trim_start_matches(": ")));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn as_text(findings: &[Finding], able: bool) -> String {
    let mut lines = Vec::new();
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failed => "FAILED",
        };
        lines.push([finding.what.to_owned(), verdict.to_owned(), finding.found.clone()]);
        for (label, text) in [("costs: ", &finding.cost), ("mend: ", &finding.remedy)] {
            if let Some(text) = text {
                lines.push([String::new(), String::new(), format!("{label}{text}")]);
            }
        }
    }
    let verdict = if able { "Pods can run on this host." } else { "No pod can run on this host." };
    format!("{}{verdict}\n", table::columns(&lines))
}

#[cfg(test)]
mod tests;
