//! `deprecations`: what is on its way out or gone, and where it is used.
//!
//! ```text
//!  configuration ─▶ kata_config::Survey ─┐
//!  values, manifests ─▶ YAML ─▶ scan ────┼─▶ uses ─▶ Policy::verdict ─▶ report, exit code 0, 10, 11 or 12
//!  command line ──────────────▶ scan ────┘
//! ```

use std::fmt::Write as _;

use kata_config::deprecation::{Deprecation, Policy, Registered, Stage};
use thiserror::Error;

use super::Outcome;
use crate::cli::DeprecationsCommand;
use crate::failure::{Failure, NO_SUCH};
use crate::output;
use crate::table;

mod check;
mod scan;

#[derive(Debug, Error)]
#[error("no deprecation has the id {0:?}; kata-ctl deprecations list has all of them")]
struct NoSuchId(String);

/// Does what was asked. `policy` is the command line's.
pub fn run(command: &DeprecationsCommand, policy: Option<Policy>) -> Outcome {
    match command {
        DeprecationsCommand::List { stage, json } => {
            let listed = |item: &&Deprecation| stage.is_none_or(|stage| item.stage == stage);
            let items: Vec<_> = Registered::PROGRAM.all().filter(listed).collect();
            if *json {
                let entries: Vec<_> = items.iter().map(|item| &***item).collect();
                output::document(&entries)?;
            } else {
                output::print(&as_table(&items))?;
            }
            Ok(0)
        }
        DeprecationsCommand::Show { id, json } => {
            let wanted = id.to_ascii_uppercase();
            let Some(item) = Registered::PROGRAM.get(&wanted) else {
                return Err(Failure::with_code(NO_SUCH, NoSuchId(id.clone())));
            };
            if *json {
                output::document(&**item)?;
            } else {
                output::print(&as_text(item))?;
            }
            Ok(0)
        }
        DeprecationsCommand::Check(what) => check::run(what, policy),
    }
}

fn as_table(items: &[&Deprecation]) -> String {
    if items.is_empty() {
        return "Nothing is in this stage.\n".to_owned();
    }
    let header = ["ID", "STAGE", "WHAT", "LAST RELEASE WITH IT"].map(str::to_owned);
    let line = |item: &&Deprecation| {
        [item.id.to_string(), item.stage.to_string(), item.title.to_string(), item.last_release.to_string()]
    };
    let lines: Vec<[String; 4]> = std::iter::once(header).chain(items.iter().map(line)).collect();
    table::columns(&lines)
}

fn as_text(item: &Deprecation) -> String {
    let mut lines: Vec<[String; 2]> = Vec::new();
    let mut line = |key: &str, value: String| lines.push([key.to_owned(), value]);
    line("Stage", format!("{} (tier {}, had by {})", item.stage, item.tier, had_by(item)));
    line("Why", item.reason.to_string());
    line("Instead", item.replacement.to_string());
    line("Announced", format!("{}, {}", item.announced.release, item.announced.date));
    if item.stage < Stage::Removed {
        line("Warns from", item.warn_from.to_string());
    }
    if let Some(release) = &item.off_by_default_in {
        line("Off by default in", release.to_string());
    }
    line("Removed in", format!("{}, {}", item.remove_in.release, item.remove_in.date));
    line("Last release with it", item.last_release.to_string());
    if let Some(hatch) = &item.escape_hatch {
        line("Escape hatch", hatch.to_string());
    }
    let migrates = if item.automatic_migration { "kata-ctl config migrate does it" } else { "by hand" };
    line("Migration", migrates.to_owned());
    for (index, selector) in item.selectors.iter().enumerate() {
        let among = match &selector.values[..] {
            [] => String::new(),
            values => format!(" = {}", values.join(", ")),
        };
        for (place, name) in selector.names.iter().enumerate() {
            let key = if index + place == 0 { "Recognised by" } else { "" };
            line(key, format!("{}: {name}{among}", selector.surface));
        }
    }
    line("Discussion", item.issue.to_string());
    line("Documentation", format!("docs/{}", item.docs));
    line("Owner", item.owner.to_string());
    let mut text = String::new();
    // Writing to a String never fails.
    let _ = writeln!(text, "{} {}\n", item.id, item.title);
    text + &table::columns(&lines)
}

fn had_by(item: &Deprecation) -> &'static str {
    match item.origin {
        kata_config::deprecation::Origin::Here => "this project",
        kata_config::deprecation::Origin::Upstream => "upstream only",
    }
}

#[cfg(test)]
mod tests;
