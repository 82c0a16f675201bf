//! Reads the layers over one another and keeps every fault.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::annotations::{self, Opened};
use crate::deprecation::{Deprecation, Fit, Policy, Registered, Stage, Surface};
use crate::error::{ConfigError, ConfigErrors, Fault, Note, Origin, Remark};
use crate::keys::{self, Key, Place};
use crate::{Config, Runtime, text};

mod confidential;

/// The file to read where none is given.
const FILE_VARIABLE: &str = "KATA_CONF_FILE";

/// Directories that may hold a `configuration.toml`, best first.
static SEARCH: [&str; 6] = [
    "/etc/kata-containers",
    "/etc/kata-containers/runtime-rs",
    "/usr/share/defaults/kata-containers",
    "/usr/share/defaults/kata-containers/runtime-rs",
    "/opt/kata/share/defaults/kata-containers",
    "/opt/kata/share/defaults/kata-containers/runtime-rs",
];

/// The key that opts in to what is off by default.
const OPT_IN: &str = "runtime.deprecated_opt_in";

/// Where a configuration comes from, beside the defaults.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The base file; `None` searches the well-known places, and finding nothing there means the defaults.
    pub file: Option<PathBuf>,
    /// Overrides, `key.path=value` each; the value is TOML, or a bare string.
    pub overrides: Vec<String>,
    /// The pod's annotations. Those that are not about the configuration are passed over.
    pub annotations: BTreeMap<String, String>,
}

impl Sources {
    /// The base file that is read, if there is one.
    pub fn base(&self) -> Option<PathBuf> {
        let named = self.file.clone().or_else(|| std::env::var_os(FILE_VARIABLE).map(PathBuf::from));
        named.or_else(|| first_file(&SEARCH.map(Path::new)))
    }
}

/// A value as it was written, in the layer that had the last word.
#[derive(Clone, Debug)]
pub struct Written {
    /// The value as TOML.
    pub value: String,
    /// Where it was written.
    pub origin: Origin,
}

/// A value with what is made of it.
struct Entry {
    written: Written,
    standing: Standing,
    /// Orders what was written.
    number: usize,
}

/// What is made of a value.
#[derive(Debug)]
enum Standing {
    /// It is in the [`Config`].
    Effective,
    /// It is in a section that is not read.
    Unread,
    /// It makes no difference.
    Noted(Remark),
    /// It asks for what this version does not do.
    Unmet(Fault),
}

/// A configuration that was understood. Not every one can be carried out: see [`Reading::into_config`].
#[derive(Debug)]
pub struct Reading {
    /// The settings that this version acts on.
    pub config: Config,
    /// Every key that was written, by its path.
    pub written: BTreeMap<String, Written>,
    /// What there is to know, in the order of the layers.
    pub notes: Vec<Note>,
    /// What keeps a pod from being made with it, in the order of the layers.
    pub unmet: Vec<ConfigError>,
}

impl Reading {
    /// Reads all layers (defaults, base file, `config.d/*.toml` beside it, environment, overrides, annotations) and checks the result as a
    /// whole.
    ///
    /// # Errors
    /// Every fault of every layer at once, each with its file and line or what else it came by, and its key.
    pub fn of(sources: &Sources) -> Result<Self, ConfigErrors> {
        Layers::read(sources, Registered::PROGRAM).finish()
    }

    /// Reads one text as the only layer; `name` stands for its file.
    ///
    /// # Errors
    /// As [`Reading::of`].
    pub fn of_text(name: &Path, text: &str) -> Result<Self, ConfigErrors> {
        let mut layers = Layers::new(Registered::PROGRAM);
        layers.text(name, text);
        layers.finish()
    }

    /// What a pod can be made with.
    ///
    /// # Errors
    /// Each value that asks for what this version does not do.
    pub fn into_config(self) -> Result<Config, ConfigErrors> {
        if self.unmet.is_empty() { Ok(self.config) } else { Err(ConfigErrors(self.unmet)) }
    }
}

impl Config {
    /// Reads all layers as [`Reading::of`], and takes nothing that this version does not carry out.
    ///
    /// # Errors
    /// Every fault of every layer at once, in their order.
    pub fn load(sources: &Sources) -> Result<Self, ConfigErrors> {
        let reading = Reading::of(sources)?;
        for note in &reading.notes {
            tracing::debug!("{note}");
        }
        reading.into_config()
    }
}

/// What is deprecated or removed in a configuration, whether or not a pod could be made with it.
#[derive(Debug)]
pub struct Survey {
    /// What becomes of uses.
    pub policy: Policy,
    /// Ids that are wanted although they are off by default.
    pub opted_in: Vec<String>,
    /// What was met, in the order of the layers.
    pub met: Vec<Met>,
}

impl Survey {
    /// Looks through all layers.
    ///
    /// # Errors
    /// The files that cannot be read or are not TOML: nothing is known of what is in them.
    pub fn of(sources: &Sources) -> Result<Self, ConfigErrors> {
        let Layers { config, met, mut errors, .. } = Layers::read(sources, Registered::PROGRAM);
        errors.retain(|(_, error)| matches!(error.fault, Fault::Unreadable(_) | Fault::Syntax(_)));
        if !errors.is_empty() {
            return Err(ConfigErrors(in_order(errors)));
        }
        let Runtime { deprecated: policy, deprecated_opt_in: opted_in, .. } = config.runtime;
        Ok(Self { policy, opted_in, met })
    }
}

/// Something deprecated or removed that a configuration has.
#[derive(Clone, Debug)]
pub struct Met {
    /// Where it is written.
    pub origin: Origin,
    /// Dotted path of the key.
    pub key: String,
    /// Whether it is a key or an annotation.
    pub surface: Surface,
    /// What it is.
    pub deprecation: &'static Deprecation,
    /// Whether its value asks for anything; what does not is passed over.
    pub asks: bool,
}

/// Directories that may hold a `configuration.toml`, best first.
pub fn search() -> &'static [&'static str] {
    &SEARCH
}

fn first_file(dirs: &[&Path]) -> Option<PathBuf> {
    dirs.iter().map(|dir| dir.join("configuration.toml")).find(|file| file.exists())
}

/// The configuration as read so far.
pub(crate) struct Layers {
    pub(crate) config: Config,
    /// What is looked up as deprecated.
    registered: Registered,
    /// What is deprecated or removed, in the order of the layers.
    met: Vec<Met>,
    entries: BTreeMap<String, Entry>,
    errors: Vec<(usize, ConfigError)>,
    /// Counts what was written.
    number: usize,
}

impl Layers {
    pub(crate) fn new(registered: Registered) -> Self {
        Self {
            config: Config::default(),
            registered,
            met: Vec::new(),
            entries: BTreeMap::new(),
            errors: Vec::new(),
            number: 0,
        }
    }

    pub(crate) fn read(sources: &Sources, registered: Registered) -> Self {
        let mut layers = Self::of_administrator(sources, registered);
        layers.chosen_driver();
        let opened = Opened::by(&layers.config.hypervisor.qemu);
        let own = layers.config.runtime.hypervisor_name;
        annotations::apply(&mut layers, &opened, &sources.annotations);
        let chosen = layers.config.runtime.hypervisor_name;
        if chosen == own {
            return layers;
        }
        // The pod chose another driver: nothing of the section that was read may stay.
        let mut layers = Self::of_administrator(sources, registered);
        layers.config.runtime.hypervisor_name = chosen;
        layers.chosen_driver();
        annotations::apply(&mut layers, &opened, &sources.annotations);
        layers
    }

    /// All layers but the annotations; no driver's own section is read yet.
    fn of_administrator(sources: &Sources, registered: Registered) -> Self {
        let mut layers = Self::new(registered);
        match sources.base() {
            Some(file) => layers.base(&file),
            None => tracing::debug!(places = ?SEARCH, "no configuration file: defaults apply"),
        }
        if let Some(policy) = std::env::var_os(Policy::VARIABLE) {
            layers.environment(Policy::VARIABLE, "runtime.deprecated", &policy.to_string_lossy());
        }
        for assignment in &sources.overrides {
            layers.assign(assignment);
        }
        layers
    }

    fn environment(&mut self, variable: &'static str, key: &str, value: &str) {
        self.set(key, &DeValue::String(value.into()), 0, &|_| Origin::Environment(variable));
    }

    fn base(&mut self, file: &Path) {
        self.file(file);
        for drop_in in self.drop_ins(file) {
            self.file(&drop_in);
        }
    }

    /// The drop-ins of a base file, by name. Where the file is a link they are looked for beside its target, then beside
    /// the link.
    fn drop_ins(&mut self, file: &Path) -> Vec<PathBuf> {
        let target = std::fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
        let mut dirs: Vec<PathBuf> = [target.as_path(), file]
            .into_iter()
            .filter_map(|file| std::fs::canonicalize(file.parent()?.join("config.d")).ok())
            .collect();
        dirs.dedup();
        let mut found = Vec::new();
        for dir in dirs {
            match toml_files(&dir) {
                Ok(files) => found.extend(files),
                Err(error) => self.fault(Origin::file(&dir, None), "", Fault::Unreadable(error)),
            }
        }
        found
    }

    fn file(&mut self, path: &Path) {
        match std::fs::read_to_string(path) {
            Ok(text) => self.text(path, &text),
            Err(error) => self.fault(Origin::file(path, None), "", Fault::Unreadable(error)),
        }
    }

    pub(crate) fn text(&mut self, path: &Path, text: &str) {
        let line = |offset: usize| Some(1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count());
        let (table, faults) = DeTable::parse_recoverable(text);
        let mut broken: Vec<_> = faults
            .iter()
            .map(|fault| (fault.span().and_then(|span| line(span.start)), fault.message()))
            .collect();
        // What follows on the same line is mostly the parser trying to get back on track.
        broken.dedup_by_key(|(line, _)| *line);
        for (line, message) in broken {
            self.fault(Origin::file(path, line), "", Fault::Syntax(message.to_owned()));
        }
        // What the parser made of a broken file would only lead to faults that are not there.
        if faults.is_empty() {
            self.table("", table.get_ref(), &|offset| Origin::file(path, line(offset)));
        }
    }

    pub(crate) fn assign(&mut self, assignment: &str) {
        let Some((key, value)) = assignment.split_once('=') else {
            return self.fault(Origin::Override, "", Fault::NotAnAssignment(assignment.to_owned()));
        };
        let (key, value) = (key.trim(), value.trim());
        let bare = !value.starts_with(['"', '\'', '[', '{']);
        match DeValue::parse(value) {
            Ok(value) => self.set(key, value.get_ref(), 0, &|_| Origin::Override),
            Err(_) if bare => self.set(key, &DeValue::String(value.into()), 0, &|_| Origin::Override),
            Err(error) => self.fault(Origin::Override, key, Fault::Syntax(error.message().to_owned())),
        }
    }

    fn table(&mut self, section: &str, table: &DeTable<'_>, origin: &dyn Fn(usize) -> Origin) {
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, value) in entries {
            let name = bare_or_quoted(key.get_ref());
            let path = if section.is_empty() { name } else { format!("{section}.{name}") };
            self.set(&path, value.get_ref(), key.span().start, origin);
        }
    }

    fn set(&mut self, path: &str, value: &DeValue<'_>, offset: usize, origin: &dyn Fn(usize) -> Origin) {
        if self.departed(Surface::ConfigKey, path, path, value, &origin(offset)) {
            return;
        }
        if let Some(place) = keys::find(path) {
            return self.write(path, place, value, origin(offset));
        }
        match value {
            DeValue::Table(table)
                if keys::is_section(path) || self.registered.is_section(Surface::ConfigKey, path) =>
            {
                self.table(path, table, origin);
            }
            other if keys::is_section(path) => {
                let fault = Fault::WrongType { expected: "table", found: other.type_str() };
                self.fault(origin(offset), path, fault);
            }
            _ => self.fault(origin(offset), path, keys::refusal(path)),
        }
    }

    /// Looks a name up among what is deprecated. Whether there is no more to it: it is gone, or asks for nothing that this
    /// version could lack. What still works is set as ever, and decided on when all layers have had their say.
    pub(crate) fn departed(
        &mut self,
        surface: Surface,
        name: &str,
        path: &str,
        value: &DeValue<'_>,
        origin: &Origin,
    ) -> bool {
        let plain = keys::plain(value);
        let Some((item, fit)) = self.registered.find_value(surface, name, plain.as_deref()) else {
            return false;
        };
        let asks = fit == Fit::Yes;
        self.met.push(Met { origin: origin.clone(), key: name.to_owned(), surface, deprecation: item, asks });
        match (asks, item.stage) {
            (false, _) => self.enter(name, value, origin.clone(), Standing::Noted(Remark::Removed(item))),
            (true, Stage::Removed) => {
                if let Err(refused) = Policy::Warn.admit(item, surface, path, &[]) {
                    self.enter(name, value, origin.clone(), Standing::Unmet(Fault::Deprecated(refused)));
                }
            }
            (true, _) => return false,
        }
        true
    }

    /// One value of a known key, in any layer.
    pub(crate) fn write(&mut self, path: &str, place: Place, value: &DeValue<'_>, origin: Origin) {
        match self.standing(place, value) {
            Ok(standing) => self.enter(path, value, origin, standing),
            Err(fault) => self.fault(origin, path, fault),
        }
    }

    fn enter(&mut self, path: &str, value: &DeValue<'_>, origin: Origin, standing: Standing) {
        let written = Written { value: text::as_toml(value), origin };
        self.number += 1;
        self.entries.insert(path.to_owned(), Entry { written, standing, number: self.number });
    }

    fn standing(&mut self, Place { key, read }: Place, value: &DeValue<'_>) -> Result<Standing, Fault> {
        if let Some(word) = planned_word(key, value) {
            let fault = Fault::PlannedWord { word, words: words(key) };
            return Ok(if read { Standing::Unmet(fault) } else { Standing::Unread });
        }
        key.kind.check(value)?;
        if !read {
            return Ok(Standing::Unread);
        }
        match key.apply() {
            Some(_) if key.is_foreign(value) => Ok(Standing::Noted(Remark::Foreign)),
            Some(apply) => apply(&mut self.config, value).map(|()| Standing::Effective),
            None if key.asks_for_nothing(value) => Ok(Standing::Noted(Remark::Idle)),
            None => Ok(Standing::Unmet(Fault::Planned { default: key.neutral() })),
        }
    }

    /// Reads the section of the driver that was chosen: it wins over `[hypervisor.qemu]`, which all drivers start from, but not
    /// over a later `--set`, nor over an annotation.
    fn chosen_driver(&mut self) {
        let driver = self.config.runtime.hypervisor_name;
        let of_it = |path: &str| keys::driver_of(path).is_some_and(|name| driver.sections().contains(&name));
        let mut chosen: Vec<(usize, String, Written)> = self
            .entries
            .iter()
            .filter(|(path, entry)| matches!(entry.standing, Standing::Unread) && of_it(path))
            .map(|(path, entry)| (entry.number, path.clone(), entry.written.clone()))
            .collect();
        chosen.sort_by_key(|(number, ..)| *number);
        for (number, path, written) in chosen {
            let Some(place) = keys::find(&path) else { continue };
            let later = self
                .entries
                .get(&place.key.own_path())
                .is_some_and(|own| own.number > number && !matches!(own.written.origin, Origin::File { .. }));
            let standing = match DeValue::parse(&written.value) {
                Ok(_) if later => Ok(Standing::Effective),
                Ok(value) if place.key.name == "path" => {
                    self.config.hypervisor.set_program(driver, value.get_ref()).map(|()| Standing::Effective)
                }
                Ok(value) => self.standing(Place { read: true, ..place }, value.get_ref()),
                Err(error) => Err(Fault::Syntax(error.message().to_owned())),
            };
            match standing {
                Ok(standing) => {
                    self.entries.entry(path).and_modify(|entry| entry.standing = standing);
                }
                Err(fault) => {
                    // It is told once, however often sections are read.
                    self.entries.remove(&path);
                    self.fault(written.origin, &path, fault);
                }
            }
        }
    }

    pub(crate) fn fault(&mut self, origin: Origin, key: &str, fault: Fault) {
        self.number += 1;
        self.errors.push((self.number, ConfigError { origin, key: key.to_owned(), fault }));
    }

    /// Checks the settings against each other.
    pub(crate) fn finish(mut self) -> Result<Reading, ConfigErrors> {
        self.chosen_driver();
        self.contradictions();
        self.departing();
        let mut written = BTreeMap::new();
        let mut notes = Vec::new();
        let mut unmet = Vec::new();
        let mut unread: BTreeMap<String, Vec<(usize, Origin)>> = BTreeMap::new();
        for (key, entry) in self.entries {
            let origin = entry.written.origin.clone();
            written.insert(key.clone(), entry.written);
            match entry.standing {
                Standing::Effective => {}
                Standing::Noted(remark) => notes.push((entry.number, Note { origin, key, remark })),
                Standing::Unmet(fault) => {
                    // What is not the name of a key is an annotation's, which the origin has.
                    let key = if key.starts_with("io.") { String::new() } else { key };
                    unmet.push((entry.number, ConfigError { origin, key, fault }));
                }
                Standing::Unread => {
                    let section = format!("hypervisor.{}", keys::driver_of(&key).unwrap_or_default());
                    unread.entry(section).or_default().push((entry.number, origin));
                }
            }
        }
        for (key, places) in unread {
            let known = keys::driver_of(&key).is_some_and(keys::is_own);
            let remark = Remark::NoDriver { keys: places.len(), known };
            let first = places.into_iter().min_by_key(|(number, _)| *number);
            notes.extend(first.map(|(number, origin)| (number, Note { origin, key, remark })));
        }
        let understood = self.errors.iter().all(|(_, error)| error.fault.is_unmet());
        unmet.append(&mut self.errors);
        let unmet = in_order(unmet);
        if understood {
            Ok(Reading { config: self.config, written, notes: in_order(notes), unmet })
        } else {
            Err(ConfigErrors(unmet))
        }
    }

    fn contradictions(&mut self) {
        const INITRD: &str = "hypervisor.qemu.initrd";
        const IMAGE: &str = "hypervisor.qemu.image";
        let qemu = &self.config.hypervisor.qemu;
        if let (Some(_), Some(_), Some(initrd), Some(image)) =
            (&qemu.initrd, &qemu.image, self.entries.get(INITRD), self.entries.get(IMAGE))
        {
            let fault = Fault::Contradiction(format!(
                "excludes {IMAGE} (set by {}); set one of them to \"\"",
                image.written.origin
            ));
            self.fault(initrd.written.origin.clone(), INITRD, fault);
        }
        if let Some((path, fault)) = confidential::unfit(&self.config) {
            self.fault(self.origin_of(path), path, Fault::Unfit(fault));
        }
        for (path, error) in annotations::bad_patterns(&self.config.hypervisor.qemu) {
            self.fault(self.origin_of(path), path, Fault::Invalid(error));
        }
        for id in self.config.runtime.deprecated_opt_in.clone() {
            if self.registered.get(&id).is_none() {
                let words = format!("no deprecation has the id {id:?}; see kata-ctl deprecations list");
                self.fault(self.origin_of(OPT_IN), OPT_IN, Fault::Invalid(words));
            }
        }
    }

    fn origin_of(&self, path: &str) -> Origin {
        self.entries.get(path).map_or(Origin::Override, |entry| entry.written.origin.clone())
    }

    /// Decides on what is deprecated and works, now that the policy is known.
    fn departing(&mut self) {
        let Runtime { deprecated: policy, deprecated_opt_in: opted_in, .. } = self.config.runtime.clone();
        for Met { origin, key, surface, deprecation, asks } in std::mem::take(&mut self.met) {
            // What is removed was refused where it was met.
            if !asks || deprecation.stage == Stage::Removed {
                continue;
            }
            let what = format!("{key} in {origin}");
            if let Err(refused) = policy.admit(deprecation, surface, &what, &opted_in) {
                self.fault(origin, &key, Fault::Deprecated(refused));
            }
        }
    }
}

fn in_order<T>(mut numbered: Vec<(usize, T)>) -> Vec<T> {
    numbered.sort_by_key(|(number, _)| *number);
    numbered.into_iter().map(|(_, what)| what).collect()
}

/// The word, if it is one of upstream's that this version has nothing for.
fn planned_word(key: &Key, value: &DeValue<'_>) -> Option<String> {
    let word = value.as_str()?;
    key.planned_words.contains(&word).then(|| word.to_owned())
}

fn words(key: &Key) -> &'static [&'static str] {
    match key.kind {
        keys::Kind::Word(words) => words,
        _ => &[],
    }
}

/// A quoted key may hold anything, dots included: quoted again it cannot be taken for a path.
fn bare_or_quoted(key: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !key.is_empty() && key.chars().all(bare) { key.to_owned() } else { format!("{key:?}") }
}

fn toml_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests;
