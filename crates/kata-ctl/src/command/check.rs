//! `check`: whether this host can run pods, how well, and what would help.

use std::path::Path;
use std::process::{Command, Stdio};

use kata_config::Artefacts;
use serde::Serialize;
use serde_json::Value;

use super::{Outcome, absolute};
use crate::cli::{CheckArgs, Profile};
use crate::colour::Palette;
use crate::failure::Failure;
use crate::output;
use crate::pod::SHIM;
use crate::table;

mod devices;
mod host;
mod jetson;
mod known_bad;
mod machine;
mod versions;

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
    let report = Report::make(args);
    if args.json {
        output::document(&report)?;
    } else {
        output::print(&report.as_text())?;
    }
    Ok(u8::from(report.has_failed(args.strict)))
}

/// Everything that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    can_run_pods: bool,
    warnings: usize,
    findings: Vec<Finding>,
}

impl Report {
    /// Looks at the host.
    pub fn make(args: &CheckArgs) -> Self {
        let mut findings = Vec::new();
        let answer = ask_owner(HOST, args.config.as_deref(), &args.set);
        match &answer {
            Ok(answer) => findings.extend(machine::findings(answer)),
            Err(failure) => {
                let why =
                    failure.error.as_ref().map(|error| crate::failure::chain(&**error)).unwrap_or_default();
                findings.push(Finding::failed(
                    "owner",
                    why,
                    "mend what it says; nothing about virtual machines is known without it",
                ));
            }
        }
        let root = Path::new("/");
        findings.extend(host::findings());
        findings.extend(devices::findings(root));
        if args.profile == Profile::Jetson {
            findings.extend(jetson::findings(root));
        }
        findings.extend(versions::findings(answer.as_ref().ok(), args));
        Self::of(findings)
    }

    fn of(findings: Vec<Finding>) -> Self {
        let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
        Self { can_run_pods: count(Verdict::Failed) == 0, warnings: count(Verdict::Warning), findings }
    }

    fn has_failed(&self, strict: bool) -> bool {
        !self.can_run_pods || (strict && self.warnings > 0)
    }

    fn as_text(&self) -> String {
        let palette = Palette::stdout();
        let mut lines = Vec::new();
        for finding in &self.findings {
            let verdict = match finding.verdict {
                Verdict::Ok => palette.green("ok"),
                Verdict::Warning => palette.yellow("warning"),
                Verdict::Failed => palette.red("FAILED"),
            };
            lines.push([finding.what.to_owned(), verdict, finding.found.clone()]);
            for (label, text) in [("costs: ", &finding.cost), ("mend: ", &finding.remedy)] {
                if let Some(text) = text {
                    lines.push([String::new(), String::new(), format!("{label}{text}")]);
                }
            }
        }
        let verdict = match (self.can_run_pods, self.warnings) {
            (false, _) => palette.red("No pod can run on this host."),
            (true, 0) => "Pods can run on this host.".to_owned(),
            (true, 1) => "Pods can run on this host; one thing could be better.".to_owned(),
            (true, warnings) => format!("Pods can run on this host; {warnings} things could be better."),
        };
        format!("{}{verdict}\n", table::columns(&lines))
    }
}

/// The owner's verb about this host.
pub(super) const HOST: &[&str] = &["host", "--json"];

/// What the owner's program answers to a verb, e.g. `host` about this host: it is the one that would run the virtual machine.
pub(super) fn ask_owner(verb: &[&str], config: Option<&Path>, set: &[String]) -> Result<Value, Failure> {
    let mut command = Command::new(Artefacts::program(SHIM)?);
    command.args(verb).stdin(Stdio::null());
    if let Some(config) = config {
        command.arg("--config").arg(absolute(config));
    }
    for assignment in set {
        command.arg("--set").arg(assignment);
    }
    let output = command.output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::text(words.trim().trim_start_matches(SHIM).trim_start_matches(": ")));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[cfg(test)]
mod tests;
