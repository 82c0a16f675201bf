//! Reads the layers over one another and keeps every fault.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::error::{ConfigError, ConfigErrors, Fault, Origin};
use crate::{Config, keys};

/// The file to read where none is given.
const FILE_VARIABLE: &str = "KATA_CONF_FILE";

/// Directories that may hold a `configuration.toml`, best first.
const SEARCH: [&str; 6] = [
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
}

impl Sources {
    /// The base file that is read, if there is one.
    pub fn base(&self) -> Option<PathBuf> {
        let named = self.file.clone().or_else(|| std::env::var_os(FILE_VARIABLE).map(PathBuf::from));
        named.or_else(|| first_file(&SEARCH.map(Path::new)))
    }
}

impl Config {
    /// Reads all layers (defaults, base file, `config.d/*.toml` beside it, overrides) and checks the result as a whole.
    ///
    /// # Errors
    /// Every fault of every layer at once, each with its file and line or `--set`, and its key.
    pub fn load(sources: &Sources) -> Result<Self, ConfigErrors> {
        let mut layers = Layers::default();
        match sources.base() {
            Some(file) => layers.base(&file),
            None => tracing::debug!(places = ?SEARCH, "no configuration file: defaults apply"),
        }
        for assignment in &sources.overrides {
            layers.assign(assignment);
        }
        layers.finish()
    }
}

fn first_file(dirs: &[&Path]) -> Option<PathBuf> {
    dirs.iter().map(|dir| dir.join("configuration.toml")).find(|file| file.exists())
}

/// The configuration as read so far.
#[derive(Default)]
struct Layers {
    config: Config,
    /// Who wrote each setting last.
    origins: BTreeMap<&'static str, Origin>,
    errors: Vec<ConfigError>,
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

    fn text(&mut self, path: &Path, text: &str) {
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

    fn assign(&mut self, assignment: &str) {
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
        if let Some(key) = keys::find(path) {
            return match (key.apply)(&mut self.config, value) {
                Ok(()) => drop(self.origins.insert(key.path, origin(offset))),
                Err(fault) => self.fault(origin(offset), path, fault),
            };
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

    fn fault(&mut self, origin: Origin, key: &str, fault: Fault) {
        self.errors.push(ConfigError { origin, key: key.to_owned(), fault });
    }

    /// Checks the settings against each other.
    fn finish(mut self) -> Result<Config, ConfigErrors> {
        const INITRD: &str = "hypervisor.qemu.initrd";
        const IMAGE: &str = "hypervisor.qemu.image";
        let qemu = &self.config.hypervisor.qemu;
        if let (Some(_), Some(_), Some(initrd), Some(image)) =
            (&qemu.initrd, &qemu.image, self.origins.get(INITRD), self.origins.get(IMAGE))
        {
            let fault =
                Fault::Contradiction(format!("excludes {IMAGE} (set by {image}); set one of them to \"\""));
            self.fault(initrd.clone(), INITRD, fault);
        }
        if self.errors.is_empty() { Ok(self.config) } else { Err(ConfigErrors(self.errors)) }
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
