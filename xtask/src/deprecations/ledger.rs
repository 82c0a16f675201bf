//! The ledger: one line for each stage that an entry came to, only ever added to.
//!
//! It is what the registry is compared with. An earlier state of the repository would do as well, were it there: clones are
//! shallow, source archives have no history, and tags come later than the commits that lint must judge. Whoever takes a line
//! out of the ledger shows it in the diff, and the reviewer sees a line go from a file in which lines never go.

use std::fmt::Write as _;

use kata_config::deprecation::{Date, Origin, Registry, Stage};
use semver::Version;

/// What the lines say, in their order.
pub struct Ledger(Vec<Line>);

struct Line {
    id: String,
    stage: Stage,
    release: Version,
    date: Date,
}

impl Ledger {
    /// Reads `id stage release date` lines.
    ///
    /// # Errors
    /// The first line that says something else.
    pub fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with('#') && !line.is_empty());
        let read = |(index, line): (usize, &str)| {
            Line::parse(line)
                .ok_or_else(|| format!("line {}: {line:?} is not `id stage release date`", index + 1))
        };
        lines.map(read).collect::<Result<_, _>>().map(Self)
    }

    /// Where the registry and the ledger disagree.
    pub fn faults(&self, registry: &Registry) -> Vec<String> {
        let mut faults = Vec::new();
        let mut told: Vec<&str> = Vec::new();
        for line in &self.0 {
            if !told.contains(&line.id.as_str()) && !registry.entries.iter().any(|entry| entry.id == line.id)
            {
                told.push(&line.id);
                faults.push(format!(
                    "{} was dropped from the registry: an entry stays, as removed and later as archived",
                    line.id
                ));
            }
        }
        for entry in &registry.entries {
            let stages: Vec<&Line> = self.0.iter().filter(|line| line.id == entry.id).collect();
            let mut before = None;
            for line in &stages {
                if !may_follow(entry.origin, before, line.stage) {
                    faults.push(skipped(&entry.id, before, line.stage));
                }
                before = Some(line.stage);
            }
            if before != Some(entry.stage) {
                faults.push(match may_follow(entry.origin, before, entry.stage) {
                    true => format!(
                        "{} is {} and not in the ledger: run `cargo xtask docs`",
                        entry.id, entry.stage
                    ),
                    false => skipped(&entry.id, before, entry.stage),
                });
            }
            if let Some(first) = stages.first()
                && (entry.announced.date < first.date || entry.announced.release < first.release)
            {
                faults.push(format!(
                    "{} says it was announced in {} ({}), and is known since {} ({})",
                    entry.id, entry.announced.release, entry.announced.date, first.release, first.date
                ));
            }
        }
        faults
    }

    /// The lines that are to be added, today, at this version.
    ///
    /// # Errors
    /// The registry leaves a stage out, has lost an entry, or says of a new one that it was announced before today.
    pub fn missing(&self, registry: &Registry, release: &Version, date: Date) -> Result<String, Vec<String>> {
        let mut carried_on = String::new();
        let mut lines = Vec::new();
        for entry in &registry.entries {
            let before = self.0.iter().rfind(|line| line.id == entry.id).map(|line| line.stage);
            if before != Some(entry.stage) {
                // Writing to a string cannot fail.
                let _ = writeln!(carried_on, "{} {} {release} {date}", entry.id, entry.stage);
                lines.push(Line {
                    id: entry.id.to_string(),
                    stage: entry.stage,
                    release: release.clone(),
                    date,
                });
            }
        }
        let copies =
            self.0.iter().map(|line| Line { id: line.id.clone(), release: line.release.clone(), ..*line });
        let faults = Self(copies.chain(lines).collect()).faults(registry);
        if faults.is_empty() { Ok(carried_on) } else { Err(faults) }
    }
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let id = words.next()?.to_owned();
        let stage = words.next()?;
        let stage = *Stage::ALL.iter().find(|one| one.as_str() == stage)?;
        let (release, date) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        words.next().is_none().then_some(Self { id, stage, release, date })
    }
}

fn skipped(id: &str, before: Option<Stage>, stage: Stage) -> String {
    let before = before.map_or("new", Stage::as_str);
    format!("{id} cannot be {stage} after being {before}: a stage is left out")
}

fn may_follow(origin: Origin, before: Option<Stage>, stage: Stage) -> bool {
    use Stage::{Archived, Cancelled, Deprecated, OffByDefault, Proposed, Removed};
    match (before, stage) {
        (None, Removed) => origin == Origin::Upstream,
        (None | Some(Cancelled), Proposed | Deprecated) => origin == Origin::Here,
        (Some(Proposed), Deprecated | Cancelled)
        | (Some(Deprecated), OffByDefault | Removed | Cancelled)
        | (Some(OffByDefault), Removed | Cancelled)
        | (Some(Removed), Archived) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tests' registry, with its second entry alone, in some stage.
    fn registry(stage: &str) -> Registry {
        let text = include_str!("../../../crates/kata-config/src/deprecation/tests/registry.toml");
        let mut registry = Registry::parse(text).unwrap();
        registry.entries.retain(|entry| entry.id == "D0002");
        let entry = &mut registry.entries[0];
        entry.stage = *Stage::ALL.iter().find(|one| one.as_str() == stage).unwrap();
        registry
    }

    fn faults(ledger: &str, stage: &str) -> Vec<String> {
        Ledger::parse(ledger).unwrap().faults(&registry(stage))
    }

    const DEPRECATED: &str = "D0002 deprecated 0.1.0 2026-11-25\n";

    #[test]
    fn an_entry_that_goes_its_way_is_fine() {
        assert_eq!(faults(DEPRECATED, "deprecated"), [""; 0]);
        let removed = format!(
            "# lines\n\n{DEPRECATED}D0002 off-by-default 0.2.0 2027-02-01\nD0002 removed 0.3.0 2027-06-25\n"
        );
        assert_eq!(faults(&removed, "removed"), [""; 0]);
    }

    #[test]
    fn an_entry_that_was_dropped_fails_once() {
        let ledger =
            format!("{DEPRECATED}D0009 deprecated 0.1.0 2026-11-25\nD0009 removed 0.3.0 2027-06-25\n");
        assert_eq!(
            faults(&ledger, "deprecated"),
            ["D0009 was dropped from the registry: an entry stays, as removed and later as archived"]
        );
    }

    #[test]
    fn a_stage_that_is_left_out_fails_in_the_registry_and_in_the_ledger() {
        assert_eq!(faults("", "removed"), ["D0002 cannot be removed after being new: a stage is left out"]);
        assert_eq!(
            faults(DEPRECATED, "archived"),
            ["D0002 cannot be archived after being deprecated: a stage is left out"]
        );
        let ledger = format!("{DEPRECATED}D0002 archived 0.2.0 2027-01-01\n");
        assert_eq!(
            faults(&ledger, "archived"),
            ["D0002 cannot be archived after being deprecated: a stage is left out"]
        );
    }

    #[test]
    fn a_stage_that_is_not_in_the_ledger_fails() {
        assert_eq!(
            faults(DEPRECATED, "off-by-default"),
            ["D0002 is off-by-default and not in the ledger: run `cargo xtask docs`"]
        );
    }

    #[test]
    fn an_announcement_in_hindsight_fails() {
        let later = "D0002 deprecated 0.2.0 2027-02-01\n";
        assert_eq!(
            faults(later, "deprecated"),
            ["D0002 says it was announced in 0.1.0 (2026-11-25), and is known since 0.2.0 (2027-02-01)"]
        );
        let ledger = Ledger::parse("").unwrap();
        let (release, date) = ("0.2.0".parse().unwrap(), "2027-02-01".parse().unwrap());
        assert!(ledger.missing(&registry("deprecated"), &release, date).is_err());
    }

    #[test]
    fn what_is_new_is_added_and_nothing_else() {
        let (release, date) = ("0.1.0".parse().unwrap(), "2026-11-25".parse().unwrap());
        let missing =
            |ledger: &str| Ledger::parse(ledger).unwrap().missing(&registry("deprecated"), &release, date);
        assert_eq!(missing("").unwrap(), DEPRECATED);
        assert_eq!(missing(DEPRECATED).unwrap(), "");
        assert!(missing("D0001 deprecated 0.1.0 2026-11-25\n").is_err(), "an entry was dropped");
    }

    #[test]
    fn a_removal_that_was_called_off_can_be_proposed_again() {
        let ledger = format!("{DEPRECATED}D0002 cancelled 0.2.0 2027-01-01\n");
        assert_eq!(faults(&ledger, "cancelled"), [""; 0]);
        assert_eq!(
            faults(&ledger, "deprecated"),
            ["D0002 is deprecated and not in the ledger: run `cargo xtask docs`"]
        );
    }

    #[test]
    fn a_line_of_another_form_fails() {
        for wrong in [
            "D0002",
            "D0002 gone 0.1.0 2026-11-25",
            "D0002 removed 0.1 2026-11-25",
            "D0002 removed 0.1.0 25.11.2026",
        ] {
            assert!(Ledger::parse(wrong).is_err(), "{wrong}");
        }
    }
}
