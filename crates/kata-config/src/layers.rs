//! Reads the layers over one another and keeps every fault.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::error::{ConfigError, ConfigErrors, Fault, Note, Origin, Remark};
use crate::keys::{self, Key, Place};
use crate::{Config, annotations, text};

/// The file to read where none is given.
const FILE_VARIABLE: &str = "KATA_CONF_FILE";

/// Directories that may hold a `configuration.toml`, best first.
pub(crate) const SEARCH: [&str; 6] = [
    "/etc/kata-containers",
    "/etc/kata-containers/runtime-rs",
    "/usr/share/defaults/kata-containers",
    "/usr/share/defaults/kata-containers/runtime-rs",
    "/opt/kata/share/defaults/kata-containers",
    "/opt/kata/share/defaults/kata-containers/runtime-rs",
];

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
    /// Reads all layers (defaults, base file, `config.d/*.toml` beside it, overrides, annotations) and checks the result as a
    /// whole.
    ///
    /// # Errors
    /// Every fault of every layer at once, each with its file and line or what else it came by, and its key.
    pub fn of(sources: &Sources) -> Result<Self, ConfigErrors> {
        let mut layers = Layers::default();
        match sources.base() {
            Some(file) => layers.base(&file),
            None => tracing::debug!(places = ?SEARCH, "no configuration file: defaults apply"),
        }
        for assignment in &sources.overrides {
            layers.assign(assignment);
        }
        annotations::apply(&mut layers, &sources.annotations);
        layers.finish()
    }

    /// Reads one text as the only layer; `name` stands for its file.
    ///
    /// # Errors
    /// As [`Reading::of`].
    pub fn of_text(name: &Path, text: &str) -> Result<Self, ConfigErrors> {
        let mut layers = Layers::default();
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

fn first_file(dirs: &[&Path]) -> Option<PathBuf> {
    dirs.iter().map(|dir| dir.join("configuration.toml")).find(|file| file.exists())
}

/// The configuration as read so far.
#[derive(Default)]
pub(crate) struct Layers {
    pub(crate) config: Config,
    entries: BTreeMap<String, Entry>,
    errors: Vec<(usize, ConfigError)>,
    /// Counts what was written.
    number: usize,
}

impl Layers {
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
        if let Some(place) = keys::find(path) {
            return self.write(path, place, value, origin(offset));
        }
        match value {
            DeValue::Table(table) if keys::is_section(path) => self.table(path, table, origin),
            other if keys::is_section(path) => {
                let fault = Fault::WrongType { expected: "table", found: other.type_str() };
                self.fault(origin(offset), path, fault);
            }
            _ => self.fault(origin(offset), path, keys::refusal(path)),
        }
    }

    /// One value of a known key, in any layer.
    pub(crate) fn write(&mut self, path: &str, place: Place, value: &DeValue<'_>, origin: Origin) {
        match self.standing(place, value) {
            Ok(standing) => {
                let written = Written { value: text::as_toml(value), origin };
                self.number += 1;
                self.entries.insert(path.to_owned(), Entry { written, standing, number: self.number });
            }
            Err(fault) => self.fault(origin, path, fault),
        }
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
            Some(apply) => apply(&mut self.config, value).map(|()| Standing::Effective),
            None if key.asks_for_nothing(value) => Ok(Standing::Noted(Remark::Idle)),
            None => Ok(Standing::Unmet(Fault::Planned { default: key.neutral() })),
        }
    }

    pub(crate) fn fault(&mut self, origin: Origin, key: &str, fault: Fault) {
        self.number += 1;
        self.errors.push((self.number, ConfigError { origin, key: key.to_owned(), fault }));
    }

    /// Checks the settings against each other.
    pub(crate) fn finish(mut self) -> Result<Reading, ConfigErrors> {
        self.contradictions();
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
                Standing::Unmet(fault) => unmet.push((entry.number, ConfigError { origin, key, fault })),
                Standing::Unread => {
                    let section = format!("hypervisor.{}", keys::driver_of(&key).unwrap_or_default());
                    unread.entry(section).or_default().push((entry.number, origin));
                }
            }
        }
        for (key, places) in unread {
            let remark = Remark::NoDriver { keys: places.len() };
            let first = places.into_iter().min_by_key(|(number, _)| *number);
            notes.extend(first.map(|(number, origin)| (number, Note { origin, key, remark })));
        }
        if self.errors.is_empty() {
            let (notes, unmet) = (in_order(notes), in_order(unmet));
            return Ok(Reading { config: self.config, written, notes, unmet });
        }
        self.errors.append(&mut unmet);
        Err(ConfigErrors(in_order(self.errors)))
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
        for (index, pattern) in self.config.hypervisor.qemu.enable_annotations.clone().iter().enumerate() {
            if let Err(error) = annotations::pattern(pattern) {
                let path = annotations::ENABLE;
                let origin =
                    self.entries.get(path).map_or(Origin::Override, |entry| entry.written.origin.clone());
                let fault = Fault::Invalid(format!("item {}: {pattern:?}: {error}", index + 1));
                self.fault(origin, path, fault);
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
