//! Kernel modules that the image brings, and when they are loaded.
//!
//! `/etc/kata-agent/modules` is written by the image builder, dependencies first:
//!
//! ```text
//! /lib/modules/6.1.0/vsock.ko                     at boot, in this order
//! /lib/modules/6.1.0/foo.ko bar=1                 with parameters
//! @overlay /lib/modules/6.1.0/overlay.ko          a set for later, loaded when the name is first needed
//! ```

use std::collections::{HashMap, HashSet};
use std::ffi::{CString, NulError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::system::finit_module;

/// Where the image lists its modules.
pub const LIST: &str = "/etc/kata-agent/modules";

/// A module that could not be loaded, or a list that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// A line that is neither a module nor a set.
    #[error("line {line} of the module list: {text:?} is neither an absolute path nor a set @NAME PATH…")]
    Line {
        /// Number of the line, from 1.
        line: usize,
        /// The line.
        text: String,
    },
    /// The module's file cannot be opened.
    #[error("opening module {path:?}")]
    Open {
        /// The file.
        path: PathBuf,
        #[source]
        /// Why.
        source: Errno,
    },
    /// The kernel refused the module.
    #[error("loading module {path:?} with {parameters:?}")]
    Load {
        /// The file.
        path: PathBuf,
        /// Its parameters.
        parameters: String,
        #[source]
        /// Why.
        source: Errno,
    },
    /// Parameters that no kernel interface can carry.
    #[error("parameters {parameters:?} of module {path:?}")]
    Parameters {
        /// The file.
        path: PathBuf,
        /// Its parameters.
        parameters: String,
        #[source]
        /// Why.
        source: NulError,
    },
    /// The image has no such module.
    #[error(
        "kernel module {name}: the image carries no set of this name, and the kernel has it not built in"
    )]
    Unknown {
        /// The module's name.
        name: String,
    },
}

/// One module file and its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Absolute path inside the image.
    pub path: PathBuf,
    /// What follows it on the line; empty for none.
    pub parameters: String,
}

/// The module list, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleList {
    /// Loaded at boot, in order.
    pub boot: Vec<Module>,
    /// Sets for later, by name, each in load order.
    pub sets: HashMap<String, Vec<PathBuf>>,
}

impl ModuleList {
    /// Parses a list; blank lines and `#` comments are skipped.
    ///
    /// # Errors
    /// [`ModuleError::Line`] for the first line that makes no sense.
    pub fn parse(text: &str) -> Result<Self, ModuleError> {
        let mut list = Self::default();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = || ModuleError::Line { line: number + 1, text: line.to_owned() };
            let (first, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            if let Some(name) = first.strip_prefix('@') {
                let paths: Vec<PathBuf> = rest.split_whitespace().map(PathBuf::from).collect();
                if name.is_empty() || paths.is_empty() || paths.iter().any(|path| path.is_relative()) {
                    return Err(bad());
                }
                list.sets.insert(canonical(name), paths);
            } else if first.starts_with('/') {
                list.boot.push(Module { path: first.into(), parameters: rest.trim().to_owned() });
            } else {
                return Err(bad());
            }
        }
        Ok(list)
    }

    /// Every file that a set may still need.
    #[must_use]
    pub fn needed_later(&self) -> HashSet<PathBuf> {
        self.sets.values().flatten().cloned().collect()
    }
}

/// Loads modules of the image on demand.
#[derive(Debug, Default)]
pub struct Modules {
    sets: HashMap<String, Vec<PathBuf>>,
    loaded: Mutex<HashSet<String>>,
}

impl Modules {
    /// The sets of `list`.
    #[must_use]
    pub fn new(list: ModuleList) -> Self {
        Self { sets: list.sets, loaded: Mutex::default() }
    }

    /// Loads the set `name` if the image has one that was not loaded yet. No set of that name is fine here: what
    /// needs the module then says so itself, or has it built in.
    ///
    /// # Errors
    /// [`ModuleError`] of the first file that fails; the set is tried again the next time.
    pub fn want(&self, name: &str) -> Result<(), ModuleError> {
        self.load(name, "").map(|_| ())
    }

    /// Loads the set `name` with `parameters` for its last module, the one that the set is named for.
    ///
    /// # Errors
    /// [`ModuleError::Unknown`] if it is neither in the image nor in the kernel.
    pub fn require(&self, name: &str, parameters: &str) -> Result<(), ModuleError> {
        let known = Path::new("/sys/module").join(canonical(name)).exists() || self.load(name, parameters)?;
        if known { Ok(()) } else { Err(ModuleError::Unknown { name: name.to_owned() }) }
    }

    fn load(&self, name: &str, parameters: &str) -> Result<bool, ModuleError> {
        let name = canonical(name);
        let Some(paths) = self.sets.get(&name) else { return Ok(false) };
        let loaded = || self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded().contains(&name) {
            return Ok(true);
        }
        // Not locked meanwhile: one that the kernel waits for must not stop the others. Who loads the same one at the same time
        // is told by the kernel that it is there, once it is.
        for path in paths {
            let parameters = if Some(path) == paths.last() { parameters } else { "" };
            load_file(&Module { path: path.clone(), parameters: parameters.to_owned() })?;
        }
        tracing::debug!(set = name, files = paths.len(), "loaded kernel modules");
        loaded().insert(name);
        Ok(true)
    }
}

/// Module names do not tell `-` from `_`.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// Loads one file; a module that is there already is fine.
///
/// # Errors
/// [`ModuleError`] with the path.
pub fn load_file(module: &Module) -> Result<(), ModuleError> {
    let Module { path, parameters } = module;
    let file = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|source| ModuleError::Open { path: path.clone(), source })?;
    let words = CString::new(parameters.as_str()).map_err(|source| ModuleError::Parameters {
        path: path.clone(),
        parameters: parameters.clone(),
        source,
    })?;
    match finit_module(&file, &words, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(source) => Err(ModuleError::Load { path: path.clone(), parameters: parameters.clone(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_order_parameters_and_sets() {
        let list =
            ModuleList::parse("# for virtio\n/m/b.ko\n\n/m/a.ko x=1  y=2\n@over-lay /m/c.ko /m/overlay.ko\n")
                .unwrap();
        assert_eq!(list.boot[0].path, Path::new("/m/b.ko"));
        assert_eq!(list.boot[1], Module { path: "/m/a.ko".into(), parameters: "x=1  y=2".into() });
        assert_eq!(list.sets["over_lay"], [PathBuf::from("/m/c.ko"), "/m/overlay.ko".into()]);
        assert!(list.needed_later().contains(Path::new("/m/c.ko")));
    }

    #[test]
    fn a_relative_path_and_an_empty_set_are_refused_with_their_line() {
        for (text, line) in
            [("/a\nb.ko", "line 2"), ("@x", "line 1"), ("@ /a", "line 1"), ("@x a.ko", "line 1")]
        {
            let error = ModuleList::parse(text).unwrap_err().to_string();
            assert!(error.contains(line), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_module_that_nobody_has_is_unknown_and_wanting_it_is_fine() {
        let modules = Modules::new(ModuleList::default());
        modules.want("no_such_module").unwrap();
        assert!(matches!(modules.require("no_such_module", ""), Err(ModuleError::Unknown { .. })));
    }

    #[test]
    fn a_missing_file_is_named() {
        let list = ModuleList::parse("@x /nowhere/x.ko").unwrap();
        let error = Modules::new(list).want("x").unwrap_err();
        assert!(matches!(&error, ModuleError::Open { path, .. } if path == Path::new("/nowhere/x.ko")));
    }
}
