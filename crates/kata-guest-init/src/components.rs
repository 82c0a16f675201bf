//! A directory with a manifest and programs, become units.
//!
//! | directory | manifest | where from |
//! |---|---|---|
//! | `/run/kata-extensions/NAME` | `etc/kata-extensions/components.toml` | an extension's image |
//! | `/usr/lib/guest-services/NAME` | `components.toml` | the root's image |
//!
//! Both were verified, which makes them somebody's work and not harmless: files are opened beneath the directory, whatever
//! symbolic links in it say, and nothing that is written is ever written over.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};

use crate::manifest::{LENGTH_MAX, Manifest, ManifestError};
use crate::plan::{PlanError, Process, plan};
use crate::units::{TARGET, Unit, unit};
use crate::variables::Table;

/// Components that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ComponentsError {
    /// A file that is not there, or not beneath the directory.
    #[error("opening {file:?} beneath {directory:?}")]
    Open {
        /// The directory.
        directory: PathBuf,
        /// The file.
        file: String,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// A directory that says nothing of what is in it.
    #[error("{directory:?} has no manifest {file:?}: an image of an extension is built with one")]
    NoManifest {
        /// The directory.
        directory: PathBuf,
        /// The manifest.
        file: String,
    },
    /// Something else than a file.
    #[error("{file:?} beneath {directory:?} is no file")]
    NoFile {
        /// The directory.
        directory: PathBuf,
        /// What is none.
        file: String,
    },
    /// A program that cannot be run.
    #[error("{file:?} beneath {directory:?} cannot be executed: its mode is {mode:o}")]
    NoProgram {
        /// The directory.
        directory: PathBuf,
        /// The file.
        file: String,
        /// Its permissions.
        mode: u32,
    },
    /// A manifest that makes no sense.
    #[error("manifest {file:?} beneath {directory:?}")]
    Manifest {
        /// The directory.
        directory: PathBuf,
        /// The manifest.
        file: String,
        #[source]
        /// Why.
        source: Box<ManifestError>,
    },
    /// A manifest that means nothing that may be started.
    #[error("manifest {file:?} beneath {directory:?}")]
    Plan {
        /// The directory.
        directory: PathBuf,
        /// The manifest.
        file: String,
        #[source]
        /// Why.
        source: Box<PlanError>,
    },
    /// Two services for one job.
    #[error("{first} and {second} both serve {service:?}")]
    Twice {
        /// The job.
        service: String,
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// A file that cannot be written.
    #[error("writing {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
}

/// A directory of components.
#[derive(Clone, Debug)]
pub struct Directory {
    /// Who brings it, as units and messages name it: `extension-coco`.
    pub owner: String,
    /// Where it is now.
    pub here: PathBuf,
    /// Where it will be, once the root is the root.
    pub root: String,
    /// Its manifest, below.
    pub manifest: &'static str,
}

/// What a directory has started, and under which names the agent finds it.
#[derive(Debug, Default)]
pub struct Services {
    owner: String,
    units: Vec<Unit>,
    names: Vec<Name>,
}

/// What the agent knows a service by: its socket leads to another, and its unit is another's second name.
#[derive(Debug)]
struct Name {
    service: String,
    socket: String,
    unit: String,
}

impl Directory {
    /// Reads the manifest, looks at each program, and makes the units. Nothing is written.
    ///
    /// # Errors
    /// [`ComponentsError`]; a directory without a manifest is broken.
    pub fn services(&self, table: &Table, attached: &[String]) -> Result<Services, ComponentsError> {
        let (directory, file) = (self.here.clone(), self.manifest.to_owned());
        let manifest = match Manifest::parse(&self.read_manifest()?) {
            Ok(manifest) => manifest,
            Err(error) => return Err(ComponentsError::Manifest { directory, file, source: error.into() }),
        };
        let variables = table.variables(&self.root, &manifest.paths, attached);
        let processes = match plan(&manifest, &variables, table) {
            Ok(processes) => processes,
            Err(error) => return Err(ComponentsError::Plan { directory, file, source: error.into() }),
        };
        processes.iter().try_for_each(|process| self.check_program(process))?;
        let (mut units, mut names) = (Vec::new(), Vec::new());
        for process in &processes {
            let unit = unit(&self.owner, &self.root, process, &processes);
            names.extend(process.guest_services.iter().map(|service| Name {
                service: service.clone(),
                socket: process.socket.clone().unwrap_or_default(),
                unit: unit.name.clone(),
            }));
            units.push(unit);
        }
        Ok(Services { owner: self.owner.clone(), units, names })
    }

    fn read_manifest(&self) -> Result<Vec<u8>, ComponentsError> {
        let file = self.open(self.manifest).map_err(|error| match error {
            ComponentsError::Open { directory, file, source } if source.kind() == io::ErrorKind::NotFound => {
                ComponentsError::NoManifest { directory, file }
            }
            error => error,
        })?;
        let mut bytes = Vec::new();
        let limit = u64::try_from(LENGTH_MAX).unwrap_or_default().saturating_add(1);
        file.take(limit).read_to_end(&mut bytes).map_err(|source| self.open_error(self.manifest, source))?;
        Ok(bytes)
    }

    fn check_program(&self, process: &Process) -> Result<(), ComponentsError> {
        let file = self.open(&process.program)?;
        let mode =
            fstat(&file).map_err(|error| self.open_error(&process.program, error.into()))?.st_mode & 0o7777;
        if mode & 0o111 != 0 {
            return Ok(());
        }
        Err(ComponentsError::NoProgram { directory: self.here.clone(), file: process.program.clone(), mode })
    }

    /// Opens a regular file, wherever symbolic links lead, if that is beneath the directory.
    fn open(&self, file: &str) -> Result<File, ComponentsError> {
        let failed = |error: rustix::io::Errno| self.open_error(file, error.into());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(&self.here, flags, Mode::empty()).map_err(failed)?;
        // Not blocking: a pipe would keep us waiting before it can be seen what it is.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let opened = openat2(&directory, file, flags, Mode::empty(), beneath).map_err(failed)?;
        match FileType::from_raw_mode(fstat(&opened).map_err(failed)?.st_mode) {
            FileType::RegularFile => Ok(opened.into()),
            _ => Err(ComponentsError::NoFile { directory: self.here.clone(), file: file.to_owned() }),
        }
    }

    fn open_error(&self, file: &str, source: io::Error) -> ComponentsError {
        ComponentsError::Open { directory: self.here.clone(), file: file.to_owned(), source }
    }
}

/// Writes the units of `all` and what starts them below `run` (`/run`), the names that the agent knows them by, and if there are any
/// the `links` that they may look for. How many units that are.
///
/// # Errors
/// [`ComponentsError::Twice`] before anything was written; [`ComponentsError::Write`].
pub fn install(
    run: &Path,
    all: &[Services],
    links: &BTreeMap<String, String>,
) -> Result<usize, ComponentsError> {
    let mut servers: BTreeMap<&str, (&str, &Name)> = BTreeMap::new();
    for services in all {
        for name in &services.names {
            if let Some((first, _)) = servers.insert(&name.service, (services.owner.as_str(), name)) {
                let (first, second) = (first.to_owned(), services.owner.clone());
                return Err(ComponentsError::Twice { service: name.service.clone(), first, second });
            }
        }
    }
    let units = run.join("systemd/system");
    let wants = units.join(format!("{TARGET}.wants"));
    for Unit { name, text } in all.iter().flat_map(|services| &services.units) {
        make(&units.join(name), |path| {
            let mut options = std::fs::OpenOptions::new();
            let mut file = options.write(true).create_new(true).mode(0o644).open(path)?;
            io::Write::write_all(&mut file, text.as_bytes())
        })?;
        make(&wants.join(name), |path| symlink(Path::new("..").join(name), path))?;
    }
    for (service, (_, name)) in servers {
        make(&run.join(format!("guest-services/{service}.socket")), |path| symlink(&name.socket, path))?;
        make(&units.join(format!("{service}.service")), |path| symlink(&name.unit, path))?;
    }
    let count = all.iter().map(|services| services.units.len()).sum();
    for (link, to) in links.iter().filter(|_| count > 0) {
        let path = Path::new(link);
        make(&run.join(path.strip_prefix("/run").unwrap_or(path)), |path| symlink(to, path))?;
    }
    Ok(count)
}

fn make(path: &Path, work: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), ComponentsError> {
    let parent = path.parent().unwrap_or(path);
    let made = std::fs::create_dir_all(parent).and_then(|()| work(path));
    made.map_err(|source| ComponentsError::Write { path: path.into(), source })
}

#[cfg(test)]
mod tests;
