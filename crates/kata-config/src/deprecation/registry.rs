//! The registry as it is written, and the rules that hold within it. What needs the clock, the version or the source tree
//! is checked by `cargo xtask lint`.

use std::collections::BTreeSet;

use semver::Version;
use serde::Deserialize;

use super::entry::{Entry, Origin, Stage, Surface, Text, Tier};

/// `deprecations.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(title = "deprecations.toml"))]
pub struct Registry {
    /// The LTS releases, one a year, published or planned.
    #[serde(default)]
    pub lts: Vec<Version>,
    /// The entries, by id.
    #[serde(rename = "deprecation", default)]
    pub entries: Vec<Entry>,
}

impl Registry {
    /// Reads a registry and checks it.
    ///
    /// # Errors
    /// One line for each thing that is wrong, with the id it is about.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let registry: Self = toml::from_str(text).map_err(|error| vec![error.to_string()])?;
        let faults = registry.faults();
        if faults.is_empty() { Ok(registry) } else { Err(faults) }
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut previous = "";
        let mut seen = BTreeSet::new();
        for entry in &self.entries {
            let mut found = shape(entry);
            found.extend(order(entry));
            found.extend(self.window(entry));
            if *entry.id <= *previous {
                found.push(format!("must come after {previous}: ids are in order and never given twice"));
            }
            found.extend(
                selections(entry)
                    .filter(|one| !seen.insert(one.clone()))
                    .map(|(surface, name, _)| format!("{surface} {name:?} is selected twice")),
            );
            faults.extend(found.into_iter().map(|fault| format!("{}: {fault}", entry.id)));
            previous = &entry.id;
        }
        faults
    }

    /// Whether users of this project get as long as the tier promises.
    fn window(&self, entry: &Entry) -> Option<String> {
        let leaves = matches!(entry.stage, Stage::Deprecated | Stage::OffByDefault | Stage::Removed);
        if entry.origin == Origin::Upstream || !leaves || entry.security_exception.is_some() {
            return None;
        }
        let (from, to) = (&entry.announced, &entry.remove_in);
        let (months, minors, lts) = match entry.tier {
            Tier::Stable => (12, 2, true),
            Tier::Beta => (6, 2, false),
            Tier::Experimental => (0, 1, false),
        };
        let mut missing = Vec::new();
        if to.date < from.date.plus_months(months) {
            missing.push(format!("{months} months"));
        }
        if !minors_apart(&from.release, &to.release, minors) {
            missing.push(format!("{minors} minor release{}", if minors == 1 { "" } else { "s" }));
        }
        if lts && !self.lts.iter().any(|lts| *lts >= entry.warn_from && *lts < to.release) {
            missing.push("an LTS release that warns".to_owned());
        }
        (!missing.is_empty()).then(|| {
            format!(
                "the window is too short: {} needs {} before {}",
                entry.tier,
                missing.join(", "),
                to.release
            )
        })
    }
}

/// Everything that is selected: surface, name, and value unless any will do.
fn selections(entry: &Entry) -> impl Iterator<Item = (Surface, Text, Option<Text>)> {
    entry.selectors.iter().flat_map(|selector| {
        selector.names.iter().flat_map(|name| {
            let any = selector.values.is_empty().then_some(None);
            let values = any.into_iter().chain(selector.values.iter().cloned().map(Some));
            values.map(|value| (selector.surface, name.clone(), value))
        })
    })
}

/// A major release counts as enough minor ones: its predecessors are not known here, and it may break things anyhow.
fn minors_apart(from: &Version, to: &Version, minors: u64) -> bool {
    to.major > from.major || to.minor >= from.minor + minors
}

fn shape(entry: &Entry) -> Vec<String> {
    let mut faults = Vec::new();
    let digits = entry.id.strip_prefix('D').unwrap_or_default();
    if digits.len() != 4 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        faults.push("an id is D and four digits".to_owned());
    }
    let texts = [
        ("title", &entry.title),
        ("last_release", &entry.last_release),
        ("replacement", &entry.replacement),
        ("docs", &entry.docs),
        ("owner", &entry.owner),
        ("issue", &entry.issue),
        ("reason", &entry.reason),
    ];
    faults.extend(
        texts.iter().filter(|(_, text)| text.trim().is_empty()).map(|(key, _)| format!("{key} is empty")),
    );
    let sentences = [("reason", &entry.reason), ("replacement", &entry.replacement)];
    faults.extend(
        sentences
            .iter()
            .filter(|(_, text)| text.ends_with('.') || text.contains('\n'))
            .map(|(key, _)| format!("{key} is a clause on one line, without a full stop")),
    );
    if !entry.issue.starts_with("https://") {
        faults.push("issue must be a link".to_owned());
    }
    if entry.selectors.is_empty() || entry.selectors.iter().any(|selector| selector.names.is_empty()) {
        faults.push("nothing selects it".to_owned());
    }
    if entry.origin == Origin::Upstream && !matches!(entry.stage, Stage::Removed | Stage::Archived) {
        faults.push("what only upstream had can only be removed or archived".to_owned());
    }
    if entry.stage == Stage::OffByDefault
        && (entry.off_by_default_in.is_none() || entry.escape_hatch.is_none())
    {
        faults.push("off by default needs off_by_default_in and an escape_hatch".to_owned());
    }
    if let Some(exception) = &entry.security_exception {
        if !exception.advisory.starts_with("https://") {
            faults.push("a security exception needs a link to the advisory".to_owned());
        }
        if exception.approved_by.iter().collect::<BTreeSet<_>>().len() < 2 {
            faults.push("a security exception needs two maintainers".to_owned());
        }
    }
    faults
}

fn order(entry: &Entry) -> Vec<String> {
    let mut faults = Vec::new();
    let (from, to) = (&entry.announced, &entry.remove_in);
    if to.date < from.date || to.release < from.release {
        faults.push(format!("is removed in {} ({}) before it is announced", to.release, to.date));
    }
    if entry.warn_from < from.release || entry.warn_from > to.release {
        faults.push(format!("warns from {}, outside {} to {}", entry.warn_from, from.release, to.release));
    }
    if let Some(off) = &entry.off_by_default_in
        && (*off < entry.warn_from || *off > to.release)
    {
        faults.push(format!("is off by default in {off}, outside {} to {}", entry.warn_from, to.release));
    }
    faults
}
