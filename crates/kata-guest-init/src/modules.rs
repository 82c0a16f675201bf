//! Kernel modules of the initramfs, loaded before anything else can be found.
//!
//! The list has the form of the agent's, dependencies first: an absolute path a line, parameters behind it. Of a set
//! (`@name path path…`) all is loaded: what this program will need is known from the start. Only a driver for the reports of some
//! hardware is loaded on that hardware alone, and one that is refused there ends no boot: who wants a report is told.

use std::ffi::{CString, NulError};
use std::io;
use std::path::{Path, PathBuf};

use kata_evidence::Hardware;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::system::finit_module;

use crate::fault::{Level, chain, say};

/// Where the initramfs lists its modules.
pub const LIST: &str = "/etc/kata-guest-init/modules";

/// A module that could not be loaded, or a list that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The list cannot be read.
    #[error("reading {path:?}")]
    List {
        /// The file.
        path: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// A line that is no module.
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
    /// The kernel refused the module.
    #[error("loading module {path:?}")]
    Load {
        /// The file.
        path: PathBuf,
        #[source]
        /// Why.
        source: Errno,
    },
}

/// One module file and its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Module {
    path: PathBuf,
    parameters: String,
    /// The hardware whose reports it is for, or whose driver needs it.
    of: Option<Hardware>,
}

/// Loads the modules of `list` that this machine is for, which runs under `hardware`; without such a file the kernel has built in what
/// it needs.
///
/// # Errors
/// [`ModuleError`] of the first that fails.
pub fn load_all(list: &Path, hardware: Option<Hardware>) -> Result<usize, ModuleError> {
    let text = match std::fs::read_to_string(list) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(source) => return Err(ModuleError::List { path: list.into(), source }),
    };
    let mut modules = parse(&text)?;
    modules.retain(|module| module.of.is_none() || module.of == hardware);
    for module in &modules {
        match load(module) {
            Err(error) if module.of.is_some() => say(Level::Info, &chain(&error)),
            loaded => loaded?,
        }
    }
    Ok(modules.len())
}

fn parse(text: &str) -> Result<Vec<Module>, ModuleError> {
    let mut modules = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (first, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let set = first.strip_prefix('@');
        let of = Hardware::ALL.into_iter().find(|it| set == Some(it.provider()));
        let module = |path: &str, parameters: &str| Module {
            path: path.into(),
            parameters: parameters.to_owned(),
            of,
        };
        let these: Vec<Module> = match set {
            Some(_) => rest.split_whitespace().map(|path| module(path, "")).collect(),
            None => vec![module(first, rest.trim())],
        };
        if these.is_empty() || these.iter().any(|module| module.path.is_relative()) {
            return Err(ModuleError::Line { line: number + 1, text: line.to_owned() });
        }
        modules.extend(these);
    }
    Ok(modules)
}

/// Loads one; a module that is there already is fine.
fn load(Module { path, parameters, .. }: &Module) -> Result<(), ModuleError> {
    let path = path.clone();
    let words = match CString::new(parameters.as_str()) {
        Ok(words) => words,
        Err(source) => return Err(ModuleError::Parameters { path, parameters: parameters.clone(), source }),
    };
    let file = match open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => file,
        Err(source) => return Err(ModuleError::Open { path, source }),
    };
    match finit_module(&file, &words, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(source) => Err(ModuleError::Load { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_its_order_and_sets_are_loaded_where_they_stand() {
        let modules = parse("# disks\n/m/b.ko\n\n@erofs /m/c.ko /m/erofs.ko\n/m/a.ko x=1  y=2\n").unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.path.to_str().unwrap()).collect();
        assert_eq!(names, ["/m/b.ko", "/m/c.ko", "/m/erofs.ko", "/m/a.ko"]);
        assert_eq!(modules[3].parameters, "x=1  y=2");
    }

    #[test]
    fn a_relative_path_and_an_empty_set_are_refused_with_their_line() {
        for (text, line) in [("/a\nb.ko", "line 2"), ("@x", "line 1"), ("@x /b a.ko", "line 1")] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(line), "{text:?}: {error}");
        }
    }

    #[test]
    fn no_list_is_fine_and_a_missing_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("modules");
        assert_eq!(load_all(&list, None).unwrap(), 0);
        std::fs::write(&list, "/nowhere/x.ko\n").unwrap();
        let error = load_all(&list, None).unwrap_err();
        assert!(matches!(&error, ModuleError::Open { path, .. } if path == Path::new("/nowhere/x.ko")));
    }

    #[test]
    fn driver_for_reports_is_loaded_on_its_hardware_alone_and_ends_no_boot() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("modules");
        std::fs::write(
            &list,
            "@sev_guest /nowhere/tsm.ko /nowhere/sev-guest.ko\n@tdx_guest /nowhere/tdx.ko\n",
        )
        .unwrap();
        let tried = [None, Some(Hardware::Snp), Some(Hardware::Tdx)].map(|it| load_all(&list, it).unwrap());
        assert_eq!(tried, [0, 2, 1]);
    }
}
