//! The table of keys: every setting of ours and of upstream's 4.1, each with all that is known of it.
//!
//! ```text
//!  settings!   (settings.rs)  keys with a field: this version acts on them ─┐
//!  planned     (hypervisor.rs, agent.rs, runtime.rs)  upstream's others     ─┼─▶ table ─▶ reading, explain, reference,
//!  deprecation registry       keys that are gone                            ─┘           schema, man page, example
//! ```
//!
//! A row for `hypervisor.*` stands for the key in each driver's section that has it.

mod agent;
mod hypervisor;
mod kind;
mod runtime;

use std::fmt;

use toml::de::DeValue;

pub use kind::{Kind, nearest};
pub(crate) use kind::{Value, parsed};

use crate::error::Fault;
use crate::{Config, settings};

/// Section of the keys that drivers have.
const HYPERVISOR: &str = "hypervisor.*";
/// The driver whose section is always read: the others' are read over it where they are chosen.
pub(crate) const OWN_DRIVER: &str = "qemu";

/// How a value gets into a [`Config`].
pub(crate) type Apply = fn(&mut Config, &DeValue<'_>) -> Result<(), Fault>;

/// Who knows the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Both of upstream's runtimes.
    Upstream,
    /// Upstream's Rust runtime alone.
    UpstreamRust,
    /// This project alone.
    Ours,
}

impl Source {
    /// In words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::UpstreamRust => "upstream, Rust runtime",
            Self::Ours => "this project",
        }
    }
}

/// What the key promises for the future.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stability {
    /// Changes only by the deprecation process.
    Stable,
    /// May change with notice.
    Beta,
    /// May change at any time.
    Experimental,
}

impl Stability {
    /// In a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Beta => "beta",
            Self::Experimental => "experimental",
        }
    }
}

/// What this version makes of the key.
#[derive(Clone, Copy)]
pub enum Status {
    /// Acts on it.
    Supported(#[doc(hidden)] Handle),
    /// Does not act on it yet: a value that asks for nothing is noted, any other keeps a pod from being created.
    Planned,
}

/// Puts a value where it belongs; made here alone.
#[derive(Clone, Copy)]
pub struct Handle(Apply);

/// One setting.
#[derive(Clone, Copy)]
pub struct Key {
    /// Section, with `*` for the name of a driver.
    pub section: &'static str,
    /// Name within the section.
    pub name: &'static str,
    /// What it does, one sentence or a few. Lines as in the source.
    doc: &'static str,
    /// Type and range.
    pub kind: Kind,
    /// Unit of a number.
    pub unit: Option<&'static str>,
    /// Who knows it.
    pub source: Source,
    /// What it promises.
    pub stability: Stability,
    /// What this version makes of it.
    pub status: Status,
    /// Upstream's default as TOML, that of its Rust runtime where they differ. Of supported keys only where ours differs.
    upstream_default: Option<&'static str>,
    /// What holds where nothing is written, in words.
    unset: Option<&'static str>,
    /// Further values that ask for nothing this version does not do anyway, as TOML; of a supported key, those that name a
    /// part of upstream's which this version has its own of.
    harmless: &'static [&'static str],
    /// Every value asks for nothing: there is nothing yet that the key would restrict or tune.
    inert: bool,
    /// Of a word's range, what upstream takes and this version does not yet.
    pub planned_words: &'static [&'static str],
    /// Name of the annotation that sets it, without its prefix and group.
    annotation: Option<&'static str>,
    /// How the annotation's text is a list.
    pub(crate) separator: Separator,
    /// What of the host the annotation names.
    pub(crate) reach: Reach,
    /// Drivers whose sections have the key; empty: all, or the section is no driver's.
    drivers: &'static [&'static str],
}

/// How an annotation's text is a list, as upstream's runtimes read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Separator {
    /// Blanks.
    Blank,
    /// Semicolons.
    Semicolon,
    /// The text is a JSON array.
    Json,
}

/// What of the host a value from a pod can name: each needs more than being listed by a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Nothing of the host.
    Guest,
    /// A file or directory: only below what this key lists.
    Path(&'static str),
    /// A program: only below what this key lists, and only where the annotation is listed by its very name.
    Program(&'static str),
    /// Arguments of a program: only where the annotation is listed by its very name.
    Arguments,
}

impl Key {
    const fn new(section: &'static str, name: &'static str, kind: Kind, doc: &'static str) -> Self {
        Self {
            section,
            name,
            doc,
            kind,
            unit: None,
            source: Source::Upstream,
            stability: Stability::Stable,
            status: Status::Planned,
            upstream_default: None,
            unset: None,
            harmless: &[],
            inert: false,
            planned_words: &[],
            annotation: None,
            separator: Separator::Blank,
            reach: Reach::Guest,
            drivers: &[],
        }
    }

    /// A key with a field, see [`crate::settings`].
    pub(crate) const fn supported(
        section: &'static str,
        name: &'static str,
        kind: Kind,
        doc: &'static str,
        apply: Apply,
    ) -> Self {
        Self { status: Status::Supported(Handle(apply)), ..Self::new(section, name, kind, doc) }
    }

    /// A key of upstream's without a field, and upstream's default.
    const fn planned(
        section: &'static str,
        name: &'static str,
        kind: Kind,
        default: &'static str,
        doc: &'static str,
    ) -> Self {
        Self { upstream_default: Some(default), ..Self::new(section, name, kind, doc) }
    }

    /// Narrows the range of whole numbers.
    pub(crate) const fn range(self, least: i64, most: u64) -> Self {
        Self { kind: Kind::Integer { least, most }, ..self }
    }

    /// Narrows the range of decimal numbers from above.
    pub(crate) const fn up_to(self, most: f64) -> Self {
        Self { kind: Kind::Number { least: f64::NEG_INFINITY, most }, ..self }
    }

    pub(crate) const fn unit(self, unit: &'static str) -> Self {
        Self { unit: Some(unit), ..self }
    }

    pub(crate) const fn ours(self) -> Self {
        Self { source: Source::Ours, ..self }
    }

    pub(crate) const fn rust(self) -> Self {
        Self { source: Source::UpstreamRust, ..self }
    }

    pub(crate) const fn stability(self, stability: Stability) -> Self {
        Self { stability, ..self }
    }

    pub(crate) const fn upstream(self, default: &'static str) -> Self {
        Self { upstream_default: Some(default), ..self }
    }

    pub(crate) const fn unset(self, words: &'static str) -> Self {
        Self { unset: Some(words), ..self }
    }

    pub(crate) const fn harmless(self, values: &'static [&'static str]) -> Self {
        Self { harmless: values, ..self }
    }

    const fn inert(self) -> Self {
        Self { inert: true, ..self }
    }

    pub(crate) const fn planned_words(self, words: &'static [&'static str]) -> Self {
        Self { planned_words: words, ..self }
    }

    pub(crate) const fn annotation(self, name: &'static str) -> Self {
        Self { annotation: Some(name), ..self }
    }

    /// The annotation has the key's name.
    pub(crate) const fn annotated(self) -> Self {
        self.annotation(self.name)
    }

    pub(crate) const fn separator(self, separator: Separator) -> Self {
        Self { separator, ..self }
    }

    pub(crate) const fn reach(self, reach: Reach) -> Self {
        Self { reach, ..self }
    }

    pub(crate) const fn on(self, drivers: &'static [&'static str]) -> Self {
        Self { drivers, ..self }
    }

    /// Dotted path, with `*` for the name of a driver.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// Dotted path in the section that this version acts on.
    pub fn own_path(&self) -> String {
        self.path().replace('*', self.drivers.first().unwrap_or(&OWN_DRIVER))
    }

    /// What it does, on one line.
    pub fn doc(&self) -> String {
        self.doc.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Whether this version acts on it.
    pub fn is_supported(&self) -> bool {
        matches!(self.status, Status::Supported(_))
    }

    /// In a word.
    pub fn status_word(&self) -> &'static str {
        if self.is_supported() { "supported" } else { "planned" }
    }

    /// What holds where nothing is written, as TOML; in words where there is no value for it.
    pub fn default(&self) -> String {
        match self.status {
            Status::Supported(_) => settings::default_of(&self.own_path())
                .unwrap_or_else(|| self.unset.unwrap_or("unset").to_owned()),
            Status::Planned => self.upstream_default.unwrap_or("unset").to_owned(),
        }
    }

    /// Upstream's default where it is another one than ours.
    pub fn other_default(&self) -> Option<&'static str> {
        if self.is_supported() { self.upstream_default } else { None }
    }

    /// Full name of the annotation that sets it.
    pub fn annotation_name(&self) -> Option<String> {
        Some(format!("{PREFIX}{}", self.annotation_group()?))
    }

    /// `hypervisor.kernel_params`, `runtime.create_container_timeout`.
    pub(crate) fn annotation_group(&self) -> Option<String> {
        let name = self.annotation?;
        // One of upstream's annotations of the runtime sets a key of the agent.
        Some(match name.split_once('.') {
            Some(_) => name.to_owned(),
            None => format!("{}.{name}", self.section.split('.').next().unwrap_or_default()),
        })
    }

    /// What an annotation has to fulfil beyond being opened.
    pub fn condition(&self) -> Option<String> {
        match self.reach {
            Reach::Guest => None,
            Reach::Path(list) => Some(format!("matches `{list}`")),
            Reach::Program(list) => Some(format!("opened by its very name, matches `{list}`")),
            Reach::Arguments => Some("opened by its very name".to_owned()),
        }
    }

    /// Every driver whose section has the key; empty where the section is no driver's.
    pub fn drivers(&self) -> &'static [&'static str] {
        if self.section.contains('*') && self.drivers.is_empty() { DRIVERS } else { self.drivers }
    }

    /// Whether `value` asks for nothing that this version would have to do.
    pub(crate) fn asks_for_nothing(&self, value: &DeValue<'_>) -> bool {
        // `false` may well ask for something, of a key that switches a thing off.
        let off = !value.is_bool() && is_off(value);
        let listed = self.upstream_default.iter().chain(self.harmless).any(|text| same(text, value));
        self.inert || off || listed
    }

    /// Whether `value` names a part of upstream's that this version has its own of.
    pub(crate) fn is_foreign(&self, value: &DeValue<'_>) -> bool {
        self.is_supported() && self.harmless.iter().any(|text| same(text, value))
    }

    /// A value that asks for nothing.
    pub(crate) fn neutral(&self) -> Option<&'static str> {
        self.upstream_default.filter(|_| !self.is_supported())
    }

    pub(crate) fn apply(&self) -> Option<Apply> {
        match self.status {
            Status::Supported(Handle(apply)) => Some(apply),
            Status::Planned => None,
        }
    }
}

fn same(text: &str, value: &DeValue<'_>) -> bool {
    DeValue::parse(text).is_ok_and(|other| equal(other.get_ref(), value))
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path())
    }
}

/// What the names of annotations that change the configuration begin with.
pub const PREFIX: &str = "io.katacontainers.config.";

/// Names of the sections of upstream's drivers. A driver with two names has its section under either.
pub const DRIVERS: &[&str] =
    &["qemu", "clh", "cloud-hypervisor", "dragonball", "fc", "firecracker", "openvmm", "remote"];

/// Every key, in the order of the reference.
pub fn all() -> impl Iterator<Item = &'static Key> {
    let tables = [
        settings::Qemu::KEYS,
        settings::Factory::KEYS,
        hypervisor::KEYS,
        settings::KataAgent::KEYS,
        agent::KEYS,
    ];
    tables.into_iter().flatten().chain(settings::Runtime::KEYS).chain(runtime::KEYS)
}

/// A key in a section of its own.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) key: &'static Key,
    /// Whether the section is read as it stands, and not only where its driver is chosen.
    pub(crate) read: bool,
}

/// The setting written at `path`.
pub(crate) fn find(path: &str) -> Option<Place> {
    let (section, name) = path.rsplit_once('.')?;
    let read = driver_of(section).is_none_or(|driver| driver == OWN_DRIVER);
    let key = all().find(|key| key.name == name && covers(key, section))?;
    Some(Place { key, read })
}

/// The key that `path` names, in whichever driver's section.
pub fn lookup(path: &str) -> Option<&'static Key> {
    find(path).map(|place| place.key).or_else(|| all().find(|key| key.path() == path))
}

/// Whether this version has the driver whose section has this name.
pub(crate) fn is_own(driver: &str) -> bool {
    driver == OWN_DRIVER
        || [crate::HypervisorChoice::CloudHypervisor, crate::HypervisorChoice::Firecracker]
            .iter()
            .any(|choice| choice.sections().contains(&driver))
}

/// Name of the driver in a section's path.
pub(crate) fn driver_of(section: &str) -> Option<&str> {
    section.strip_prefix("hypervisor.")?.split('.').next()
}

fn covers(key: &Key, section: &str) -> bool {
    if !key.section.contains('*') {
        return key.section == section;
    }
    let drivers = key.drivers();
    driver_of(section)
        .is_some_and(|driver| drivers.contains(&driver) && key.section.replace('*', driver) == section)
}

/// Whether settings are written below `path`.
pub(crate) fn is_section(path: &str) -> bool {
    sections().any(|section| {
        section == path || section.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'))
    })
}

/// Paths of all sections, drivers' written out.
fn sections() -> impl Iterator<Item = String> {
    const SECTIONS: &[&str] =
        &["agent.kata", "agent.kata.mem_agent", "runtime", "hypervisor.*", "hypervisor.*.factory"];
    SECTIONS.iter().flat_map(|section| match section.contains('*') {
        false => vec![(*section).to_owned()],
        true => DRIVERS.iter().map(|driver| section.replace('*', driver)).collect(),
    })
}

/// Why `path`, which is neither a setting nor a section, is refused.
pub(crate) fn refusal(path: &str) -> Fault {
    Fault::Unknown { nearest: nearest_path(path) }
}

/// The setting or section spelt most alike, if any is near enough to be meant. A right name in the wrong section counts.
fn nearest_path(path: &str) -> Option<String> {
    let name = last(path);
    let mut best: Option<(usize, String)> = None;
    // What this version acts on is meant rather than what it does not.
    let supported = all().filter(|key| key.is_supported()).chain(all().filter(|key| !key.is_supported()));
    let driver = driver_of(path).filter(|driver| DRIVERS.contains(driver)).unwrap_or(OWN_DRIVER);
    let candidates = supported.filter(|key| key.drivers().is_empty() || key.drivers().contains(&driver));
    let paths = candidates.map(|key| key.path().replace('*', driver));
    for candidate in paths.flat_map(|path| prefixes(&path)).chain(sections()) {
        let whole = strsim::osa_distance(path, &candidate);
        let moved = 1 + strsim::osa_distance(name, last(&candidate));
        let distance = whole.min(moved);
        if best.as_ref().is_none_or(|(least, _)| distance < *least) {
            best = Some((distance, candidate));
        }
    }
    best.filter(|(distance, _)| *distance <= 1 + name.len() / 4).map(|(_, candidate)| candidate)
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// `a`, `a.b` and `a.b.c` of `a.b.c`.
fn prefixes(path: &str) -> Vec<String> {
    let sections = path.match_indices('.').filter_map(|(dot, _)| path.get(..dot));
    sections.chain(std::iter::once(path)).map(str::to_owned).collect()
}

/// Switched off, or nothing at all.
pub(crate) fn is_off(value: &DeValue<'_>) -> bool {
    match value {
        DeValue::Boolean(on) => !on,
        DeValue::Integer(number) => {
            i128::from_str_radix(number.as_str(), number.radix()).is_ok_and(|number| number == 0)
        }
        DeValue::Float(number) => number.as_str().parse::<f64>().is_ok_and(|number| number == 0.0),
        DeValue::String(text) => text.is_empty(),
        DeValue::Array(items) => items.is_empty(),
        DeValue::Table(_) | DeValue::Datetime(_) => false,
    }
}

/// A value as the registry of deprecations writes it. A list without a text in it is as good as an empty one.
pub(crate) fn plain(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => {
            i128::from_str_radix(number.as_str(), number.radix()).ok().map(|number| number.to_string())
        }
        DeValue::Boolean(on) => Some(on.to_string()),
        DeValue::Array(items) => {
            let blank = |item: &toml::Spanned<DeValue<'_>>| item.get_ref().as_str() == Some("");
            items.iter().all(blank).then(|| "[]".to_owned())
        }
        DeValue::Float(_) | DeValue::Table(_) | DeValue::Datetime(_) => None,
    }
}

fn equal(left: &DeValue<'_>, right: &DeValue<'_>) -> bool {
    let number = |value: &DeValue<'_>| match value {
        DeValue::Integer(number) if number.radix() == 10 => number.as_str().parse::<f64>().ok(),
        DeValue::Float(number) => number.as_str().parse().ok(),
        _ => None,
    };
    match (left, right) {
        (DeValue::Boolean(left), DeValue::Boolean(right)) => left == right,
        (DeValue::String(left), DeValue::String(right)) => left == right,
        (DeValue::Array(left), DeValue::Array(right)) => {
            left.len() == right.len()
                && left.iter().zip(right.iter()).all(|(left, right)| equal(left.get_ref(), right.get_ref()))
        }
        _ => number(left).is_some_and(|left| number(right) == Some(left)),
    }
}

#[cfg(test)]
mod tests;
