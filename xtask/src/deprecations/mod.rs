//! The gates of the deprecation process that need more than the registry: the version, the clock, the ledger, the sources.
//!
//! ```text
//!  deprecations.toml ── build script ──▶ shape, ids, order, windows      fails the build
//!          │
//!          ├── due ───────▶ past its release or its day, and still there
//!          ├── ledger ────▶ dropped, a stage left out, announced in hindsight
//!          ├── hidden ────▶ an alias, hidden flag or #[deprecated] without an id    fail the lint
//!          └── docs ──────▶ pages out of date, or not there
//! ```

mod hidden;
mod ledger;

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use kata_config::deprecation::{Date, Entry, Registry, Stage};
use semver::Version;

use crate::shell::{ChoreError, at, tree};
use crate::{Chores, say};
use ledger::Ledger;

const REGISTRY: &str = "crates/kata-config/deprecations.toml";
const LEDGER: &str = "crates/kata-config/deprecations.ledger";
/// Months for which the hint of what was removed stays.
const TOMBSTONE: u16 = 12;
/// Removals that are this near are told of.
const SOON_DAYS: i64 = 60;

/// The registry of the tree, checked as the build script checks it.
pub fn registry() -> Chores<Registry> {
    Registry::parse(&read(REGISTRY)?)
        .map_err(|faults| ChoreError::Found(format!("{REGISTRY}: {}", faults.join("\n       "))))
}

/// The version that is being worked on: all crates have it.
pub fn version() -> Chores<Version> {
    env!("CARGO_PKG_VERSION").parse().map_err(|_| ChoreError::Found("the version is no version".to_owned()))
}

fn read(path: &str) -> Chores<String> {
    let file = tree().join(path);
    std::fs::read_to_string(&file).map_err(at("read", &file))
}

fn today() -> Date {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Date::of_unix_seconds(since.as_secs())
}

/// Fails, naming everything that the process does not allow.
pub fn check() -> Chores {
    say("deprecations");
    let (registry, version, today) = (registry()?, version()?, today());
    let sources = sources()?;
    let mut found = due(&registry, &version, today, &sources);
    let ledger = read(LEDGER)?;
    found.extend(match Ledger::parse(&ledger) {
        Ok(ledger) => ledger.faults(&registry),
        Err(fault) => vec![format!("{LEDGER}: {fault}")],
    });
    found.extend(hidden::faults(&registry, &sources));
    found.extend(absent_pages(&registry, |page| tree().join("docs").join(page).exists()));
    for entry in soon(&registry, today) {
        say(&format!(
            "{} {} is to go in {} on {}",
            entry.id, entry.title, entry.remove_in.release, entry.remove_in.date
        ));
    }
    if found.is_empty() { Ok(()) } else { Err(ChoreError::Found(found.join("\n       "))) }
}

/// Notes in the ledger which stage each entry is in.
pub fn write_ledger() -> Chores {
    let file = tree().join(LEDGER);
    let ledger =
        Ledger::parse(&read(LEDGER)?).map_err(|fault| ChoreError::Found(format!("{LEDGER}: {fault}")))?;
    let lines = ledger.missing(&registry()?, &version()?, today()).map_err(|faults| {
        ChoreError::Found(format!("the ledger cannot be carried on:\n       {}", faults.join("\n       ")))
    })?;
    let text = read(LEDGER)? + &lines;
    std::fs::write(&file, text).map_err(at("write", &file))
}

/// A Rust file of the tree: its path in it, and its text.
type Source = (String, String);

fn sources() -> Chores<Vec<Source>> {
    let mut found = Vec::new();
    let mut open = vec![tree().join("crates"), tree().join("xtask")];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).map_err(at("read", &dir))? {
            let path = entry.map_err(at("read", &dir))?.path();
            if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).map_err(at("read", &path))?;
                found.push((in_tree(&path), text));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn in_tree(path: &Path) -> String {
    path.strip_prefix(tree()).map_or_else(|_| PathBuf::from(path), Path::to_owned).display().to_string()
}

/// Entries whose time has come, and those that are hidden from users too early.
fn due(registry: &Registry, version: &Version, today: Date, sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in &registry.entries {
        let Entry { id, stage, remove_in, off_by_default_in, .. } = entry;
        let works = matches!(stage, Stage::Deprecated | Stage::OffByDefault);
        if works && (*version >= remove_in.release || today >= remove_in.date) {
            let users: Vec<&str> = sources
                .iter()
                .filter(|(_, text)| text.contains(&**id))
                .map(|(path, _)| path.as_str())
                .collect();
            let users = if users.is_empty() { "no source names it".to_owned() } else { users.join(", ") };
            found.push(format!(
                "{id} was to go in {} on {} and is {stage}: remove it, set another date, or cancel ({users})",
                remove_in.release, remove_in.date
            ));
        }
        if *stage == Stage::Deprecated && off_by_default_in.as_ref().is_some_and(|release| version >= release)
        {
            found.push(format!("{id} was to be off by default in {version} and is on"));
        }
        let kept_until = remove_in.date.plus_months(TOMBSTONE);
        if *stage == Stage::Archived && today < kept_until {
            found.push(format!("{id} is archived, and its hint must stay until {kept_until}"));
        }
    }
    found
}

/// Entries that go within two months, so that the release does not come as a surprise.
fn soon(registry: &Registry, today: Date) -> impl Iterator<Item = &Entry> {
    registry.entries.iter().filter(move |entry| {
        let left = entry.remove_in.date.days_after(today);
        matches!(entry.stage, Stage::Deprecated | Stage::OffByDefault) && (0..=SOON_DAYS).contains(&left)
    })
}

fn absent_pages(registry: &Registry, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let absent = registry.entries.iter().filter(|entry| !exists(&entry.docs));
    absent.map(|entry| format!("{}: there is no page docs/{}", entry.id, entry.docs)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> Registry {
        Registry::parse(include_str!("../../../crates/kata-config/src/deprecation/tests/registry.toml"))
            .unwrap()
    }

    fn due_at(version: &str, today: &str) -> Vec<String> {
        let sources = [("crates/x/src/a.rs".to_owned(), "deprecation::D0002.warn()".to_owned())];
        let found = due(&registry(), &version.parse().unwrap(), today.parse().unwrap(), &sources);
        found.into_iter().filter(|line| !line.contains("archived")).collect()
    }

    #[test]
    fn what_works_in_the_release_that_was_to_be_without_it_fails() {
        assert_eq!(due_at("0.1.9", "2027-01-01"), [""; 0]);
        let found = due_at("0.3.0", "2027-01-01");
        assert!(
            found[0].starts_with("D0002 was to go in 0.3.0 on 2027-06-25 and is deprecated: ")
                && found[0].ends_with("(crates/x/src/a.rs)"),
            "{found:?}"
        );
        assert!(
            found.iter().any(|line| line.starts_with("D0003 ") && line.contains("no source names it")),
            "{found:?}"
        );
    }

    #[test]
    fn what_works_after_its_day_fails_whatever_the_version() {
        assert_eq!(due_at("0.1.9", "2027-06-24"), [""; 0]);
        assert!(due_at("0.1.9", "2027-06-25")[0].starts_with("D0002 was to go in 0.3.0"));
    }

    #[test]
    fn what_was_to_be_off_by_default_and_is_on_fails() {
        assert_eq!(due_at("0.2.0", "2027-01-01"), ["D0002 was to be off by default in 0.2.0 and is on"]);
    }

    #[test]
    fn a_hint_that_is_taken_away_within_a_year_fails() {
        let at = |today: &str| due(&registry(), &"0.1.0".parse().unwrap(), today.parse().unwrap(), &[]);
        assert!(
            at("2028-06-24")
                .iter()
                .any(|line| line == "D0005 is archived, and its hint must stay until 2028-06-25")
        );
        assert!(!at("2028-06-25").iter().any(|line| line.starts_with("D0005")));
    }

    #[test]
    fn removals_within_two_months_are_told_of() {
        let ids = |today: &str| {
            soon(&registry(), today.parse().unwrap()).map(|e| e.id.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(ids("2027-04-25"), [""; 0]);
        assert_eq!(ids("2027-04-26"), ["D0002", "D0003"]);
    }

    #[test]
    fn a_page_that_is_not_there_fails() {
        assert_eq!(absent_pages(&registry(), |_| true), [""; 0]);
        assert_eq!(absent_pages(&registry(), |_| false)[0], "D0001: there is no page docs/x.md");
    }
}
