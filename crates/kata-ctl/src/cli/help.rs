//! The first page of help: every verb on one screen, by what it is for.

use std::fmt::Write as _;

use clap::{Command, CommandFactory};

use super::Cli;

/// What verbs are for. One that is not here is shown with the last.
const GROUPS: [(&str, &[&str]); 4] = [
    ("Pods", &["run", "list", "exec", "cp", "kill", "rm"]),
    ("Look inside", &["inspect", "ps", "top", "stats", "logs", "events", "console", "analyze"]),
    (
        "Host",
        &[
            "check", "env", "image", "volume", "factory", "iptables", "policy", "initdata", "measure",
            "evidence", "metrics", "monitor",
        ],
    ),
    ("Configuration and support", &["config", "deprecations", "version", "bundle", "completion", "man"]),
];

/// Everything above and below the verbs.
const TEMPLATE: &str = "{about}\nUsage: {usage}{after-help}";

/// The command line, with its first page.
pub fn command() -> Command {
    let command = Cli::command().help_template(TEMPLATE);
    let page = groups(&command);
    command.after_help(page)
}

fn groups(command: &Command) -> String {
    let verbs: Vec<(&str, String)> = command
        .get_subcommands()
        .filter(|verb| !verb.is_hide_set())
        .map(|verb| (verb.get_name(), verb.get_about().map(ToString::to_string).unwrap_or_default()))
        .collect();
    let known = |name: &str| GROUPS.iter().any(|(_, names)| names.contains(&name));
    let width = verbs.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let mut page = String::new();
    for (index, (title, names)) in GROUPS.iter().enumerate() {
        let last = index + 1 == GROUPS.len();
        let named = names.iter().filter_map(|name| verbs.iter().find(|(verb, _)| verb == name));
        let others = verbs.iter().filter(|(name, _)| last && !known(name));
        let shown: Vec<_> = named.chain(others).collect();
        if !shown.is_empty() {
            // Writing to a String never fails.
            let _ = writeln!(page, "{title}:");
        }
        for (name, about) in shown {
            let _ = writeln!(page, "  {name:width$}  {about}");
        }
    }
    page.push_str("Options: --color auto|always|never, --version; `kata-ctl VERB --help` tells a verb's own");
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_page_of_help_fits_a_screen() {
        let help = command().render_help().to_string();
        let lines = help.lines().count();
        assert!((24..=40).contains(&lines), "{lines} lines:\n{help}");
        assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
    }

    #[test]
    fn every_verb_is_on_the_first_page_once() {
        let help = command().render_help().to_string();
        for verb in command().get_subcommands() {
            let name = format!("  {} ", verb.get_name());
            assert_eq!(help.lines().filter(|line| line.starts_with(&name)).count(), 1, "{name}\n{help}");
        }
    }

    #[test]
    fn every_verb_is_in_the_documentation() {
        let page = include_str!("../../../../docs/kata-ctl.md");
        for verb in command().get_subcommands() {
            assert!(page.contains(&format!("`{}", verb.get_name())), "{}", verb.get_name());
        }
    }
}
