//! `deprecations check`: uses, what becomes of them, and the exit code that says how bad it is.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use kata_config::deprecation::{Deprecation, Policy, Stage, Surface, Verdict};
use kata_config::{ConfigErrors, Sources, Survey};
use serde::Serialize;
use thiserror::Error;

use super::scan;
use crate::cli::{UseIn, UseInFile};
use crate::command::Outcome;
use crate::failure::Failure;
use crate::output;
use crate::table;

/// A file that cannot be looked through.
#[derive(Debug, Error)]
pub enum CheckError {
    /// It could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not YAML.
    #[error("{} is not YAML", path.display())]
    Yaml {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_saphyr::Error,
    },
    /// It is no configuration, or one that cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
}

/// One use of something deprecated or removed.
#[derive(Clone, Debug)]
pub struct Use {
    /// Of what.
    pub deprecation: &'static Deprecation,
    /// On which surface.
    pub surface: Surface,
    /// In which file, document and field.
    pub place: String,
    /// What is written there.
    pub what: String,
    /// Whether it asks for anything.
    pub asks: bool,
}

/// A use as it is told of.
#[derive(Debug, Serialize)]
struct Finding {
    id: &'static str,
    /// `note`, `deprecated`, `off by default`, `rejected` or `removed`.
    verdict: &'static str,
    surface: &'static str,
    place: String,
    what: String,
    title: &'static str,
    reason: &'static str,
    replacement: &'static str,
    automatic_migration: bool,
    remove_in: String,
    removal_date: String,
    last_release: &'static str,
}

/// Everything that is told of one run.
#[derive(Debug, Serialize)]
struct Report {
    policy: Policy,
    exit_code: u8,
    findings: Vec<Finding>,
}

/// Looks through what was named, and prints what was found.
pub fn run(what: &UseIn, policy: Option<Policy>) -> Outcome {
    let given = match policy {
        Some(policy) => Some(policy),
        None => Policy::of_environment()?,
    };
    let policy = given.unwrap_or(Policy::Warn);
    let (report, json) = match what {
        UseIn::Config(UseInFile { file, json }) => {
            // As when a pod is made: the command line wins over the environment, and that over the files.
            let overrides = given.iter().map(|policy| policy.assignment()).collect();
            let sources = Sources { file: Some(file.clone()), overrides, ..Sources::default() };
            let survey = Survey::of(&sources).map_err(CheckError::from)?;
            let uses = in_configuration(&survey);
            (report(uses, survey.policy, &survey.opted_in), *json)
        }
        UseIn::Values(UseInFile { file, json }) => {
            let uses = scan::values(&named(file), &documents(file)?);
            (report(uses, policy, &[]), *json)
        }
        UseIn::Manifest(UseInFile { file, json }) => {
            let uses = scan::manifests(&named(file), &documents(file)?);
            (report(uses, policy, &[]), *json)
        }
        UseIn::CommandLine { json, words } => (report(scan::command_line(words), policy, &[]), *json),
    };
    if json {
        output::document(&report)?;
    } else {
        output::print(&as_text(&report.findings))?;
    }
    Ok(report.exit_code)
}

fn in_configuration(survey: &Survey) -> Vec<Use> {
    let uses = survey.met.iter().map(|met| Use {
        deprecation: met.deprecation,
        surface: met.surface,
        place: met.origin.to_string(),
        what: met.key.clone(),
        asks: met.asks,
    });
    uses.collect()
}

fn named(file: &Path) -> String {
    if file == Path::new("-") { "standard input".to_owned() } else { file.display().to_string() }
}

fn documents(file: &Path) -> Result<Vec<serde_json::Value>, Failure> {
    let mut text = String::new();
    let read = match file == Path::new("-") {
        true => io::stdin().read_to_string(&mut text).map(drop),
        false => std::fs::read_to_string(file).map(|read| text = read),
    };
    read.map_err(|source| CheckError::Read { path: file.to_owned(), source })?;
    // One line says where and what; the excerpt would take six.
    let options = serde_saphyr::options! { with_snippet: false };
    let documents = serde_saphyr::from_multiple_with_options(&text, options);
    Ok(documents.map_err(|source| CheckError::Yaml { path: file.to_owned(), source })?)
}

fn report(uses: Vec<Use>, policy: Policy, opted_in: &[String]) -> Report {
    let mut findings = Vec::new();
    let mut exit_code = 0;
    for one in uses {
        let item = one.deprecation;
        let verdict = if one.asks { policy.verdict(item, opted_in) } else { Verdict::Pass };
        let word = match (verdict, item.stage) {
            (Verdict::Pass, _) if one.asks => continue,
            (Verdict::Pass, _) => "note",
            (Verdict::Warn, _) => "deprecated",
            (Verdict::OffByDefault, _) => "off by default",
            (Verdict::Refuse, Stage::Deprecated | Stage::OffByDefault) => "rejected",
            (Verdict::Refuse, _) => "removed",
        };
        exit_code = exit_code.max(code(verdict));
        findings.push(Finding {
            id: &item.id,
            verdict: word,
            surface: one.surface.as_str(),
            place: one.place,
            what: one.what,
            title: &item.title,
            reason: &item.reason,
            replacement: &item.replacement,
            automatic_migration: item.automatic_migration,
            remove_in: item.remove_in.release.to_string(),
            removal_date: item.remove_in.date.to_string(),
            last_release: &item.last_release,
        });
    }
    Report { policy, exit_code, findings }
}

/// The exit codes are an interface: see docs/deprecation-policy.md.
fn code(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Pass => 0,
        Verdict::Warn => 10,
        Verdict::OffByDefault => 11,
        Verdict::Refuse => 12,
    }
}

fn as_text(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "Nothing of it is deprecated or removed.\n".to_owned();
    }
    let mut lines = Vec::new();
    for finding in findings {
        let row = |first: &str, second: &str, text: String| [first.to_owned(), second.to_owned(), text];
        lines.push(row(finding.verdict, finding.id, format!("{} ({})", finding.what, finding.place)));
        if finding.verdict == "note" {
            let text =
                format!("{}: not carried; this value asks for nothing beyond what pods have", finding.title);
            lines.push(row("", "", text));
            continue;
        }
        lines.push(row("", "", format!("{}: {}", finding.title, finding.reason)));
        lines.push(row("", "", format!("instead: {}", finding.replacement)));
        if matches!(finding.verdict, "deprecated" | "off by default" | "rejected") {
            lines.push(row("", "", format!("goes in: {} ({})", finding.remove_in, finding.removal_date)));
        }
    }
    table::columns(&lines)
}

#[cfg(test)]
mod tests {
    use kata_config::deprecation::{Registered, Registry};

    use super::*;

    /// What becomes of a use of an entry of the tests' registry, which has one in each stage: exit code, and word.
    fn told(id: &str, policy: Policy, opted_in: &[&str]) -> (u8, Option<&'static str>) {
        let text = include_str!("../../../../kata-config/src/deprecation/tests/registry.toml");
        let registered = Registered::of_test(Registry::parse(text).unwrap());
        let deprecation = registered.get(id).unwrap();
        let one = Use {
            deprecation,
            surface: Surface::Cli,
            place: "here".to_owned(),
            what: "it".to_owned(),
            asks: true,
        };
        let opted_in: Vec<String> = opted_in.iter().map(|id| (*id).to_owned()).collect();
        let report = report(vec![one], policy, &opted_in);
        (report.exit_code, report.findings.first().map(|finding| finding.verdict))
    }

    #[test]
    fn exit_codes_say_how_far_the_removal_is() {
        assert_eq!(told("D0001", Policy::Warn, &[]), (0, None), "proposed");
        assert_eq!(told("D0002", Policy::Warn, &[]), (10, Some("deprecated")));
        assert_eq!(told("D0003", Policy::Warn, &[]), (11, Some("off by default")));
        assert_eq!(told("D0003", Policy::Warn, &["D0003"]), (10, Some("deprecated")));
        assert_eq!(told("D0004", Policy::Warn, &[]), (12, Some("removed")));
    }

    #[test]
    fn the_strict_policy_tests_the_future_and_the_silent_one_hides_what_works() {
        assert_eq!(told("D0002", Policy::Reject, &[]), (12, Some("rejected")));
        assert_eq!(told("D0003", Policy::Reject, &["D0003"]), (12, Some("rejected")));
        assert_eq!(told("D0002", Policy::Off, &[]), (0, None));
        assert_eq!(told("D0003", Policy::Off, &[]), (11, Some("off by default")));
        assert_eq!(told("D0004", Policy::Off, &[]), (12, Some("removed")));
    }
}
