//! What the registry says of one thing. The build script and the library read it with the same code.

use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, UNIX_EPOCH};

use semver::Version;
use serde::{Deserialize, Serialize};

/// A text that is either part of the program or was read.
pub type Text = Cow<'static, str>;
/// A list, likewise.
pub type List<T> = Cow<'static, [T]>;

/// An enum that is written as one of a few words, with its words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] $variant),+
        }

        impl $name {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word in the registry.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

words! {
    /// Where a user meets a thing.
    Surface {
        /// A key, a section or a value of the configuration file, by dotted path.
        ConfigKey = "config-key",
        /// A program, a verb or a flag of a command line.
        Cli = "cli",
        /// An annotation of a pod.
        Annotation = "annotation",
        /// A value of the Helm chart, by dotted path.
        HelmValue = "helm-value",
        /// The name of a RuntimeClass or of its handler.
        RuntimeClass = "runtime-class",
        /// A method or path that programs call.
        Api = "api",
        /// A metric's name.
        Metric = "metric",
        /// A file, image or package that is shipped.
        Artifact = "artifact",
        /// A kind of host: hardware, kernel, other software.
        HostSupport = "host-support",
        /// An item of a published crate.
        CrateApi = "crate-api",
    }
}

words! {
    /// How much users may build on a thing.
    Tier {
        /// At least 12 months, two minor releases and one LTS release between announcement and removal.
        Stable = "stable",
        /// At least 6 months and two minor releases.
        Beta = "beta",
        /// At least one release.
        Experimental = "experimental",
    }
}

words! {
    /// How far the removal has come.
    Stage {
        /// Under discussion: nothing has changed yet.
        Proposed = "proposed",
        /// Works, and warns.
        Deprecated = "deprecated",
        /// Works only where its id is opted in by name.
        OffByDefault = "off-by-default",
        /// Refused, with the reason and the replacement.
        Removed = "removed",
        /// Refused as any unknown thing is; only the page of removed features still has it.
        Archived = "archived",
        /// The removal was called off: the thing stays.
        Cancelled = "cancelled",
    }
}

words! {
    /// Who had the thing.
    Origin {
        /// A release of this project: users of it need the whole window.
        Here = "here",
        /// Upstream alone. It is refused from the start, with what upstream's users can do instead.
        Upstream = "upstream",
    }
}

/// A calendar day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "toml::value::Datetime")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(with = "String", extend("format" = "date")))]
pub struct Date {
    /// Year of the common era.
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
}

impl Date {
    /// Seconds since 1970-01-01T00:00:00Z of the day's beginning; 0 for a day that no calendar has, or before that one.
    pub fn unix_seconds(self) -> u64 {
        let begin = humantime::parse_rfc3339(&format!("{self}T00:00:00Z"));
        begin.ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok()).map_or(0, |since| since.as_secs())
    }

    /// Whole days from `other` to this one; negative where it is the later.
    pub fn days_after(self, other: Self) -> i64 {
        (self.unix_seconds().cast_signed() - other.unix_seconds().cast_signed()) / 86_400
    }

    /// The day that holds a moment, in seconds since 1970-01-01T00:00:00Z; the year 9999 is the last.
    pub fn of_unix_seconds(seconds: u64) -> Self {
        const LAST: u64 = 253_402_300_799;
        let at = UNIX_EPOCH + Duration::from_secs(seconds.min(LAST));
        let text = humantime::format_rfc3339_seconds(at).to_string();
        let day = text.split('T').next().and_then(|day| day.parse().ok());
        day.unwrap_or(Self { year: 1970, month: 1, day: 1 })
    }

    /// The same day so many months later; the last one of that month where it has no such day.
    #[must_use]
    pub fn plus_months(self, months: u16) -> Self {
        let total = u32::from(self.year) * 12 + u32::from(self.month.saturating_sub(1)) + u32::from(months);
        let year = u16::try_from(total / 12).unwrap_or(u16::MAX);
        let month = u8::try_from(total % 12 + 1).unwrap_or(12);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let last = match month {
            2 if leap => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        Self { year, month, day: self.day.min(last) }
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

impl Serialize for Date {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl TryFrom<toml::value::Datetime> for Date {
    type Error = String;

    fn try_from(at: toml::value::Datetime) -> Result<Self, String> {
        match at {
            toml::value::Datetime { date: Some(date), time: None, offset: None } => {
                Ok(Self { year: date.year, month: date.month, day: date.day })
            }
            other => Err(format!("{other} is not a day of the form YYYY-MM-DD")),
        }
    }
}

impl std::str::FromStr for Date {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let at: toml::value::Datetime =
            text.parse().map_err(|_| format!("{text:?} is not a day of the form YYYY-MM-DD"))?;
        Self::try_from(at)
    }
}

/// A release and its day.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Point {
    /// Version of the release.
    pub release: Version,
    /// Day of the release.
    pub date: Date,
}

/// How a thing is recognised on one surface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Selector {
    /// Where.
    pub surface: Surface,
    /// Names, one of which must fit. Dotted paths may have `*` for one part, and cover all that is below them; command
    /// lines are words in order, of which the first is a program; artifacts are ends of paths.
    pub names: List<Text>,
    /// Values, one of which must have been given; any where there are none.
    #[serde(default)]
    pub values: List<Text>,
    /// Values that ask for nothing, as in files that upstream ships: they are noted and passed over.
    #[serde(default)]
    pub harmless: List<Text>,
}

/// Why a removal need not wait: a security exception.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SecurityException {
    /// Link to the published advisory.
    pub advisory: Text,
    /// The maintainers who agreed, two or more.
    pub approved_by: List<Text>,
}

/// One thing that is, or was, on its way out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Entry {
    /// `D` and four digits; never given twice.
    pub id: Text,
    /// What it is, in a few words.
    pub title: Text,
    /// Who had it.
    pub origin: Origin,
    /// How much users may have built on it.
    pub tier: Tier,
    /// How far its removal has come.
    pub stage: Stage,
    /// When it was made public.
    pub announced: Point,
    /// First release that warns.
    pub warn_from: Version,
    /// First release in which it needs an opt-in, if there is one.
    pub off_by_default_in: Option<Version>,
    /// First release without it.
    pub remove_in: Point,
    /// The last release that is known to have it, with the project's name.
    pub last_release: Text,
    /// What to use instead: a clause that follows "Instead, ".
    pub replacement: Text,
    /// Whether `kata-ctl config migrate` makes the change, and pods stay as they are.
    pub automatic_migration: bool,
    /// Page of the documentation, below `docs/`.
    pub docs: Text,
    /// Who answers for it.
    pub owner: Text,
    /// Where it was discussed.
    pub issue: Text,
    /// Why: a clause that follows a colon.
    pub reason: Text,
    /// How to have it a little longer, if there is a way.
    pub escape_hatch: Option<Text>,
    /// Why the window may be shorter than the tier's.
    pub security_exception: Option<SecurityException>,
    /// How it is recognised.
    pub selectors: List<Selector>,
}

/// Whether a name and its value are those of a thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// They are not.
    No,
    /// The name is, and the value asks for nothing.
    Harmless,
    /// They are.
    Yes,
}

impl Selector {
    /// Whether `name` on `surface` is meant, whatever its value.
    pub fn names(&self, surface: Surface, name: &str) -> bool {
        self.surface == surface && self.names.iter().any(|pattern| covers(surface, pattern, name))
    }

    /// Whether a name below the dotted path `section`, spelt out, is meant.
    pub fn is_below(&self, surface: Surface, section: &str) -> bool {
        let deeper = |pattern: &Text| {
            let mut wanted = pattern.split('.');
            let inside = section.split('.').all(|part| wanted.next() == Some(part));
            inside && wanted.next().is_some()
        };
        self.surface == surface && self.names.iter().any(deeper)
    }

    /// Whether `name` with `value` is meant; `None` is a name without a value, or with one that is no plain value.
    pub fn fits(&self, surface: Surface, name: &str, value: Option<&str>) -> Fit {
        if !self.names(surface, name) {
            return Fit::No;
        }
        let among = |list: &[Text]| value.is_some_and(|value| list.iter().any(|listed| listed == value));
        match (self.values.is_empty(), among(&self.values), among(&self.harmless)) {
            (_, _, true) => Fit::Harmless,
            (true, ..) | (_, true, _) => Fit::Yes,
            _ => Fit::No,
        }
    }
}

fn covers(surface: Surface, pattern: &str, name: &str) -> bool {
    match surface {
        Surface::Cli => in_order(pattern, name),
        Surface::Artifact => {
            name.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
        }
        _ => below(pattern, name),
    }
}

/// Dotted paths: `a.*` is `a.b`, and covers `a.b.c`.
fn below(pattern: &str, name: &str) -> bool {
    let mut parts = name.split('.');
    pattern.split('.').all(|wanted| parts.next().is_some_and(|part| wanted == "*" || wanted == part))
}

/// Words of a command line: the program by its file name anywhere, what belongs to it after that and in order.
fn in_order(pattern: &str, line: &str) -> bool {
    let mut words = line.split_whitespace();
    pattern.split_whitespace().enumerate().all(|(index, wanted)| {
        words.any(|word| match index {
            0 => word.rsplit('/').next() == Some(wanted),
            _ => word == wanted || word.strip_prefix(wanted).is_some_and(|rest| rest.starts_with('=')),
        })
    })
}
