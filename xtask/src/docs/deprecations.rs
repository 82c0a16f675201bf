//! What users read of the registry of deprecations: a page, a man page, a section of the changelog, a schema.

use std::fmt::Write as _;

use kata_config::deprecation::{Entry, Origin, Registry, Stage};
use roff::{Roff, bold, italic, roman};

use super::Generated;
use crate::Chores;
use crate::deprecations::{registry, version};
use crate::shell::{ChoreError, at, tree};

const PAGE: &str = "docs/deprecations.md";
const MAN: &str = "docs/man/kata-deprecations.7";
const CHANGELOG: &str = "CHANGELOG.md";
const SCHEMA: &str = "crates/kata-config/deprecations.schema.json";

/// What is between these lines of the changelog is generated.
const BEGIN: &str = "<!-- deprecations: written by cargo xtask docs -->";
const END: &str = "<!-- end of deprecations -->";

/// All of them.
pub fn generate() -> Chores<Generated> {
    let registry = registry()?;
    let changelog = tree().join(CHANGELOG);
    let text = std::fs::read_to_string(&changelog).map_err(at("read", &changelog))?;
    let section = release_notes(&registry, &version()?);
    let changelog = spliced(&text, &section).ok_or_else(|| {
        ChoreError::Found(format!("{CHANGELOG} has no lines {BEGIN:?} and {END:?} for what is deprecated"))
    })?;
    Ok(vec![
        (PAGE, page(&registry)),
        (MAN, man(&registry, &version()?)),
        (CHANGELOG, changelog),
        (SCHEMA, schema()?),
    ])
}

/// The stages that users must know of, and what is said of them.
const STAGES: [(Stage, &str, &str); 5] = [
    (Stage::Deprecated, "Deprecated", "These work, and warn."),
    (
        Stage::OffByDefault,
        "Off by default",
        "These work for those who name their id in `runtime.deprecated_opt_in`.",
    ),
    (
        Stage::Removed,
        "Removed",
        "These are refused, with what to do instead. What only upstream had was never in this project.",
    ),
    (
        Stage::Archived,
        "No longer recognised",
        "These were removed so long ago that they are unknown like any other word.",
    ),
    (Stage::Cancelled, "Here to stay", "These were to be removed, and are not."),
];

fn of(registry: &Registry, stage: Stage) -> Vec<&Entry> {
    registry.entries.iter().filter(|entry| entry.stage == stage).collect()
}

fn page(registry: &Registry) -> String {
    let mut text = String::from(
        "<!-- Written by cargo xtask docs from crates/kata-config/deprecations.toml. -->\n\
         # Deprecated and removed features\n\n\
         Each has an id, which is in every warning and error about it. `kata-ctl deprecations list` and `show ID` print what\n\
         is here, `kata-ctl deprecations check` finds uses in files and commands. How a removal comes about, and how long\n\
         users have, is in the [policy](deprecation-policy.md).\n",
    );
    for (stage, title, meaning) in STAGES {
        let entries = of(registry, stage);
        // Writing to a string cannot fail, here and below.
        match (entries.is_empty(), stage) {
            (true, Stage::Deprecated) => text.push_str("\n## Deprecated\n\nNothing at present.\n"),
            (true, _) => {}
            (false, _) => {
                let _ = write!(text, "\n## {title}\n\n{meaning}\n\n");
                table(&mut text, &entries);
                entries.iter().for_each(|entry| details(&mut text, entry));
            }
        }
    }
    text
}

fn table(text: &mut String, entries: &[&Entry]) {
    text.push_str("| id | what | last release with it |\n|---|---|---|\n");
    for entry in entries {
        let anchor = entry.id.to_lowercase();
        let _ = writeln!(text, "| [{}](#{anchor}) | {} | {} |", entry.id, entry.title, entry.last_release);
    }
}

fn details(text: &mut String, entry: &Entry) {
    let _ = write!(text, "\n### {} {} {{#{}}}\n\n", entry.id, entry.title, entry.id.to_lowercase());
    let _ = writeln!(text, "{}. Instead, {}.\n", capital(&entry.reason), entry.replacement);
    let mut item = |key: &str, value: &str| {
        let _ = writeln!(text, "- {key}: {value}");
    };
    let names = entry.selectors.iter().flat_map(|selector| {
        let values = match &selector.values[..] {
            [] => String::new(),
            values => format!(" = `{}`", values.join("`, `")),
        };
        selector.names.iter().map(move |name| format!("{} `{name}`{values}", selector.surface))
    });
    item("Recognised by", &names.collect::<Vec<_>>().join(", "));
    if entry.origin == Origin::Here {
        item(
            "Announced",
            &format!("{} ({}), tier {}", entry.announced.release, entry.announced.date, entry.tier),
        );
        item("Goes in", &format!("{} ({})", entry.remove_in.release, entry.remove_in.date));
    }
    item("Last release with it", &entry.last_release);
    if let Some(hatch) = &entry.escape_hatch {
        item("Until then", hatch);
    }
    if entry.automatic_migration {
        item("Migration", "`kata-ctl config migrate` does it");
    }
    item("More", &format!("[{}]({0})", entry.docs));
    item("Discussion", &format!("<{}>", entry.issue));
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

/// What a release says of what it deprecates and removes.
fn release_notes(registry: &Registry, version: &semver::Version) -> String {
    let line =
        |entry: &&Entry| format!("- {} ({}). Instead, {}.\n", entry.title, entry.id, entry.replacement);
    let listed = |title: &str, entries: Vec<&Entry>| match entries.is_empty() {
        true => String::new(),
        false => format!("### {title}\n\n{}\n", entries.iter().map(line).collect::<String>()),
    };
    let announced =
        of(registry, Stage::Deprecated).into_iter().filter(|entry| entry.announced.release == *version);
    let removed =
        of(registry, Stage::Removed).into_iter().filter(|entry| entry.remove_in.release == *version);
    let (absent, removed): (Vec<_>, Vec<_>) = removed.partition(|entry| entry.origin == Origin::Upstream);
    [
        listed("Deprecated", announced.collect()),
        listed("Removed", removed),
        listed("Of upstream, and not here", absent),
    ]
    .concat()
}

/// The changelog with another section between its two lines.
fn spliced(changelog: &str, section: &str) -> Option<String> {
    let (before, rest) = changelog.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{section}{END}{after}"))
}

fn man(registry: &Registry, version: &semver::Version) -> String {
    let mut roff = Roff::new();
    roff.control("TH", ["KATA-DEPRECATIONS", "7", "", &format!("Kata {version}"), "Kata"]);
    roff.control("SH", ["NAME"]).text([roman("kata-deprecations - what is deprecated or removed")]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([
        roman("Each entry has an id, which is in every warning and error about it. "),
        bold("kata-ctl deprecations check"),
        roman(" finds uses in files and commands; its exit code is 0 for none, 10 for uses that warn, 11 for uses that are off by default and 12 for uses that are removed."),
    ]);
    roff.control("PP", []).text([
        bold("KATA_DEPRECATED"),
        roman(", "),
        bold("--deprecated"),
        roman(" and the key "),
        bold("runtime.deprecated"),
        roman(" say what becomes of uses of what still works: "),
        italic("warn"),
        roman(", "),
        italic("reject"),
        roman(" or "),
        italic("off"),
        roman(". The command line wins over the environment, and that over the configuration."),
    ]);
    for (stage, title, meaning) in STAGES {
        let entries = of(registry, stage);
        if entries.is_empty() {
            continue;
        }
        roff.control("SH", [title.to_uppercase().as_str()]).text([roman(meaning.replace('`', ""))]);
        for entry in entries {
            roff.control("TP", []).text([bold(&*entry.id), roman(" "), bold(&*entry.title)]);
            roff.text([roman(format!(
                "{}. Instead, {}. Last release with it: {}.",
                capital(&entry.reason),
                entry.replacement,
                entry.last_release
            ))]);
        }
    }
    roff.control("SH", ["SEE ALSO"]).text([bold("kata-ctl"), roman("(1)")]);
    roff.render()
}

fn schema() -> Chores<String> {
    let schema = schemars::schema_for!(Registry);
    let text = serde_json::to_string_pretty(&schema)
        .map_err(|source| ChoreError::Json { what: "the schema of deprecations.toml", source })?;
    Ok(text + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_test() -> Registry {
        Registry::parse(include_str!("../../../crates/kata-config/src/deprecation/tests/registry.toml"))
            .unwrap()
    }

    #[test]
    fn the_page_has_each_stage_that_users_must_know_of() {
        let page = page(&of_test());
        for part in [
            "## Deprecated\n\nThese work, and warn.",
            "### D0002 Thing 2 {#d0002}\n\nThing 2 is no good. Instead, use thing 2b.\n",
            "- Recognised by: config-key `hypervisor.*.thing_2`, cli `kata-ctl thing-2 --flag`\n",
            "- Goes in: 0.3.0 (2027-06-25)\n",
            "## Off by default",
            "## Removed",
            "## No longer recognised",
            "## Here to stay",
        ] {
            assert!(page.contains(part), "{part:?} is not in {page}");
        }
        assert!(!page.contains("Thing 1"), "what is proposed is not decided");
    }

    #[test]
    fn every_entry_is_on_the_page_in_the_man_page_and_in_the_notes_of_its_release() {
        let registry = registry().unwrap();
        let all = [page(&registry), man(&registry, &version().unwrap())];
        for entry in &registry.entries {
            assert!(all.iter().all(|text| text.contains(&*entry.id)), "{}", entry.id);
            let notes = release_notes(&registry, &entry.remove_in.release);
            assert!(entry.stage != Stage::Removed || notes.contains(&*entry.id), "{}", entry.id);
        }
    }

    #[test]
    fn release_notes_are_of_one_release() {
        let notes = release_notes(&of_test(), &"0.1.0".parse().unwrap());
        assert_eq!(notes, "### Deprecated\n\n- Thing 2 (D0002). Instead, use thing 2b.\n\n");
        let notes = release_notes(&of_test(), &"0.3.0".parse().unwrap());
        assert_eq!(notes, "### Removed\n\n- Thing 4 (D0004). Instead, use thing 4b.\n\n");
        assert_eq!(release_notes(&of_test(), &"0.2.0".parse().unwrap()), "");
    }

    #[test]
    fn the_changelog_keeps_what_is_around_the_section() {
        let changelog = format!("# A\n{BEGIN}\nold\n{END}\n## B\n");
        let spliced = spliced(&changelog, "new\n").unwrap();
        assert_eq!(spliced, format!("# A\n{BEGIN}\n\nnew\n{END}\n## B\n"));
        assert!(super::spliced("# A\n", "new").is_none());
    }
}
