//! What is on its way out, what is gone, and what a user is told about it.
//!
//! ```text
//!  deprecations.toml ─▶ build script: rules ─▶ static D0001, D0002, … : Deprecation
//!                                                        │
//!  a key, annotation, flag, … ─▶ find ─▶ Policy::admit ──┼─▶ counted (metrics), logged once per process
//!                                                        └─▶ or Refused: id, reason, replacement, last release
//! ```
//!
//! A [`Deprecation`] can be made by the generated code alone: whoever warns of something has registered it.

mod entry;
mod policy;
mod registry;

use std::fmt::Write as _;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

pub use entry::{Date, Entry, Fit, Origin, Point, SecurityException, Selector, Stage, Surface, Tier};
pub use policy::{BadPolicy, Policy, Refused, Verdict};
pub use registry::Registry;

/// A registered entry, and how often it was met in this process.
#[derive(Debug)]
pub struct Deprecation {
    entry: Entry,
    /// One count for each [`Surface`].
    uses: [AtomicU64; Surface::ALL.len()],
}

impl Deref for Deprecation {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

/// The generated items: one `static` for each entry, named as its id, and `ALL`.
mod generated {
    use std::borrow::Cow::Borrowed;

    use semver::Version;

    #[allow(unused_imports, reason = "not every registry has a security exception")]
    use super::entry::SecurityException;
    use super::entry::{Date, Entry, Origin, Point, Selector, Stage, Surface, Tier};
    use super::{Deprecation, unmet};

    include!(concat!(env!("OUT_DIR"), "/deprecations.rs"));
}

pub use generated::*;

/// A set of registered entries: those of the program, or a test's own.
#[derive(Clone, Copy, Debug)]
pub struct Registered(&'static [&'static Deprecation]);

impl Registered {
    /// Those of the program.
    pub const PROGRAM: Self = Self(ALL);

    /// All of them, by id.
    pub fn all(self) -> impl Iterator<Item = &'static Deprecation> {
        self.0.iter().copied()
    }

    /// The one with this id.
    pub fn get(self, id: &str) -> Option<&'static Deprecation> {
        self.all().find(|item| item.id == id)
    }

    /// What `name` on `surface` is, whatever its value. What is proposed, cancelled or archived says nothing.
    pub fn find(self, surface: Surface, name: &str) -> Option<&'static Deprecation> {
        self.speaking()
            .find(|item| item.selectors.iter().any(|one| one.values.is_empty() && one.names(surface, name)))
    }

    /// What `name` with `value` is, and whether the value asks for anything.
    pub fn find_value(
        self,
        surface: Surface,
        name: &str,
        value: Option<&str>,
    ) -> Option<(&'static Deprecation, Fit)> {
        self.speaking().find_map(|item| {
            let fits = item.selectors.iter().map(|one| one.fits(surface, name, value));
            fits.filter(|fit| *fit != Fit::No).map(|fit| (item, fit)).next()
        })
    }

    /// Whether something below the dotted path `name` is registered.
    pub fn is_section(self, surface: Surface, name: &str) -> bool {
        self.speaking().any(|item| item.selectors.iter().any(|one| one.is_below(surface, name)))
    }

    fn speaking(self) -> impl Iterator<Item = &'static Deprecation> {
        let silent = |stage| matches!(stage, Stage::Proposed | Stage::Cancelled | Stage::Archived);
        self.all().filter(move |item| !silent(item.stage))
    }

    /// Uses so far, of what was met.
    pub fn uses(self) -> impl Iterator<Item = Uses> {
        self.all()
            .flat_map(|item| {
                let counts = Surface::ALL.iter().zip(&item.uses);
                counts.map(move |(surface, count)| Uses {
                    deprecation: item,
                    surface: *surface,
                    count: count.load(Ordering::Relaxed),
                })
            })
            .filter(|uses| uses.count > 0)
    }

    /// The uses and the days of removal, as Prometheus text. A day is told of what still works and of what was met.
    pub fn metrics(self) -> String {
        let mut text = String::from(
            "# HELP kata_deprecated_uses_total Uses of what is deprecated or removed, in this process.\n\
             # TYPE kata_deprecated_uses_total counter\n",
        );
        for uses in self.uses() {
            let item = uses.deprecation;
            // Writing to a string cannot fail; ids, surfaces and versions hold nothing that must be escaped.
            let _ = writeln!(
                text,
                "kata_deprecated_uses_total{{id=\"{}\",surface=\"{}\",remove_in=\"{}\"}} {}",
                item.id, uses.surface, item.remove_in.release, uses.count
            );
        }
        text.push_str(
            "# HELP kata_deprecated_removal_timestamp_seconds Day from which releases are without it, as Unix time.\n\
             # TYPE kata_deprecated_removal_timestamp_seconds gauge\n",
        );
        let leaving = |stage| matches!(stage, Stage::Deprecated | Stage::OffByDefault);
        for item in self.all().filter(|item| leaving(item.stage) || item.met() > 0) {
            let seconds = item.remove_in.date.unix_seconds();
            let _ =
                writeln!(text, "kata_deprecated_removal_timestamp_seconds{{id=\"{}\"}} {seconds}", item.id);
        }
        text
    }

    /// Entries that are not the program's, so that tests can show what no real entry is an example of.
    #[cfg(any(test, feature = "test-registry"))]
    pub fn of_test(registry: Registry) -> Self {
        let leak = |entry| &*Box::leak(Box::new(Deprecation { entry, uses: unmet() }));
        Self(Vec::leak(registry.entries.into_iter().map(leak).collect()))
    }
}

/// How often one thing was met on one surface.
#[derive(Clone, Copy, Debug)]
pub struct Uses {
    /// The thing.
    pub deprecation: &'static Deprecation,
    /// Where it was met.
    pub surface: Surface,
    /// How often, in this process.
    pub count: u64,
}

/// [`Registered::find`] in the program's registry.
pub fn find(surface: Surface, name: &str) -> Option<&'static Deprecation> {
    Registered::PROGRAM.find(surface, name)
}

/// Everything that is registered.
pub fn all() -> impl Iterator<Item = &'static Deprecation> {
    Registered::PROGRAM.all()
}

/// [`Registered::uses`] of the program's registry.
pub fn uses() -> impl Iterator<Item = Uses> {
    Registered::PROGRAM.uses()
}

/// [`Registered::metrics`] of the program's registry.
pub fn metrics() -> String {
    Registered::PROGRAM.metrics()
}

impl Deprecation {
    /// Uses on all surfaces so far.
    pub fn met(&self) -> u64 {
        self.uses.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// Counts a use; whether it is the first in this process.
    fn count(&self, surface: Surface) -> bool {
        let first = self.met() == 0;
        if let Some(count) = self.uses.get(surface as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        first
    }

    /// Counts a use of `what`, and tells of the first one in this process, from [`Entry::warn_from`] on.
    pub fn warn(&self, surface: Surface, what: &str) {
        let early = version().is_some_and(|version| version < self.warn_from);
        if self.count(surface) && !early {
            tracing::warn!(
                deprecation = %self.id,
                %surface,
                what,
                remove_in = %self.remove_in.release,
                removal_date = %self.remove_in.date,
                replacement = %self.replacement,
                "{} is deprecated: {}. It goes in {}. Instead, {}",
                self.title,
                self.reason,
                self.remove_in.release,
                self.replacement,
            );
        }
    }
}

/// The version of this program.
fn version() -> Option<semver::Version> {
    env!("CARGO_PKG_VERSION").parse().ok()
}

const fn unmet() -> [AtomicU64; Surface::ALL.len()] {
    [const { AtomicU64::new(0) }; Surface::ALL.len()]
}

#[cfg(test)]
mod tests;
