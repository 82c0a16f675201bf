//! Where the programs and the guest image are. One place decides for everybody.
//!
//! ```text
//!  configuration ─▶ directory of the running executable, if only its owner or root can write there ─▶ /opt/kata
//! ```

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::{Config, HypervisorChoice, SharedFs};

/// Where an installed release lives.
const PREFIX: &str = "/opt/kata";
/// The search path of a process without `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Name of the guest image's directory, and the file that makes a directory one.
const GUEST_IMAGE: &str = "guest-image";
const MANIFEST: &str = "manifest.json";

/// What a pod is started from. All paths are absolute and existed when they were found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artefacts {
    /// The program of the driver that is chosen: `qemu-system-<arch>`, `kata-vmm`, `cloud-hypervisor`, `firecracker`.
    pub vmm: PathBuf,
    /// `kata-vmm`.
    pub kata_vmm: PathBuf,
    /// The virtio-fs daemon; `None` where `shared_fs = "none"`.
    pub virtiofsd: Option<PathBuf>,
    /// Directory with the guest image's `manifest.json`: that of the configuration, else the one that is found; `None` where
    /// the configuration names both the kernel and an initrd or image itself.
    pub guest_image: Option<PathBuf>,
}

/// An artefact that is nowhere, with everywhere that was looked.
#[derive(Debug, Error)]
#[error("{what} not found; looked at{}", places(.looked))]
pub struct ArtefactError {
    /// The artefact, by name.
    pub what: String,
    /// Each place, with the reason for refusing it.
    pub looked: Vec<(PathBuf, String)>,
}

fn places(looked: &[(PathBuf, String)]) -> String {
    let places: Vec<String> =
        looked.iter().map(|(path, why)| format!(" {} ({why})", path.display())).collect();
    places.join(",")
}

impl Artefacts {
    /// Finds every artefact that a pod under `config` needs which this driver runs.
    ///
    /// # Errors
    /// The first artefact that is nowhere, with all the places looked at.
    pub fn locate(config: &Config, driver: HypervisorChoice) -> Result<Self, ArtefactError> {
        Search::from_process().artefacts(config, driver)
    }

    /// Finds the guest image alone; `None` where the configuration names both the kernel and an initrd or image itself.
    ///
    /// # Errors
    /// When it is nowhere, with all the places looked at.
    pub fn guest_image(config: &Config) -> Result<Option<PathBuf>, ArtefactError> {
        Search::from_process().guest_image(config)
    }

    /// Finds one of the project's own programs, e.g. `containerd-shim-kata-v2`.
    ///
    /// # Errors
    /// When it is nowhere, with all the places looked at.
    pub fn program(name: &str) -> Result<PathBuf, ArtefactError> {
        Search::from_process().program(name)
    }

    /// Finds QEMU for this machine's architecture: the configured one, else from `PATH`.
    ///
    /// # Errors
    /// When it is nowhere, with all the places looked at.
    pub fn qemu(config: &Config) -> Result<PathBuf, ArtefactError> {
        Search::from_process().qemu(config)
    }
}

/// The places to look at.
struct Search {
    /// Directory of the running executable.
    beside: Option<PathBuf>,
    /// Value of `PATH`.
    path: OsString,
    /// Root of an installed release.
    prefix: PathBuf,
}

/// Reason for refusing a place; `Ok` is a find.
type Look = Result<(), String>;

impl Search {
    fn from_process() -> Self {
        let exe = std::env::current_exe().and_then(std::fs::canonicalize).ok();
        Self {
            beside: exe.as_deref().and_then(Path::parent).map(Path::to_owned),
            path: std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()),
            prefix: PREFIX.into(),
        }
    }

    fn artefacts(&self, config: &Config, driver: HypervisorChoice) -> Result<Artefacts, ArtefactError> {
        let qemu = &config.hypervisor.qemu;
        let virtiofsd = match (qemu.shared_fs, &qemu.virtio_fs_daemon) {
            (SharedFs::None, _) => None,
            (SharedFs::VirtioFs, Some(path)) => {
                Some(configured("virtio-fs daemon", "hypervisor.qemu.virtio_fs_daemon", path)?)
            }
            (SharedFs::VirtioFs, None) => Some(self.program("kata-virtiofsd")?),
        };
        Ok(Artefacts {
            vmm: self.vmm(config, driver)?,
            kata_vmm: self.program("kata-vmm")?,
            virtiofsd,
            guest_image: self.guest_image(config)?,
        })
    }

    fn vmm(&self, config: &Config, driver: HypervisorChoice) -> Result<PathBuf, ArtefactError> {
        let drivers = &config.hypervisor;
        let (name, key, path) = match driver {
            HypervisorChoice::Auto | HypervisorChoice::Qemu => return self.qemu(config),
            HypervisorChoice::Builtin => return self.program("kata-vmm"),
            HypervisorChoice::CloudHypervisor | HypervisorChoice::Clh => {
                ("cloud-hypervisor", "hypervisor.cloud-hypervisor.path", &drivers.cloud_hypervisor.path)
            }
            HypervisorChoice::Firecracker | HypervisorChoice::Fc => {
                ("firecracker", "hypervisor.firecracker.path", &drivers.firecracker.path)
            }
        };
        match path {
            Some(path) => configured(name, key, path),
            None => self.on_path(name),
        }
    }

    fn on_path(&self, name: &str) -> Result<PathBuf, ArtefactError> {
        let dirs = std::env::split_paths(&self.path).filter(|dir| dir.is_absolute());
        first(name, dirs.map(|dir| look(dir.join(name), executable)))
    }

    fn qemu(&self, config: &Config) -> Result<PathBuf, ArtefactError> {
        let name = format!("qemu-system-{}", std::env::consts::ARCH);
        if let Some(path) = &config.hypervisor.qemu.path {
            return configured(&name, "hypervisor.qemu.path", path);
        }
        self.on_path(&name)
    }

    fn program(&self, name: &str) -> Result<PathBuf, ArtefactError> {
        let beside =
            self.beside.iter().map(|dir| look(dir.join(name), |file| trusted(dir, file, executable)));
        let installed = ["bin", "libexec"].map(|dir| look(self.prefix.join(dir).join(name), executable));
        first(name, beside.chain(installed))
    }

    fn guest_image(&self, config: &Config) -> Result<Option<PathBuf>, ArtefactError> {
        let named = &config.hypervisor.qemu;
        if let Some(image) = named.image.as_ref().filter(|image| image.is_dir()) {
            let why = |why| format!("{why}; named by hypervisor.qemu.image");
            let (path, found) = look(image.clone(), has_manifest);
            return first("guest image", [(path, found.map_err(why))]).map(Some);
        }
        if named.kernel.is_some() && (named.initrd.is_some() || named.image.is_some()) {
            return Ok(None);
        }
        let beside = self
            .beside
            .iter()
            .map(|dir| look(dir.join(GUEST_IMAGE), |image| trusted(dir, image, has_manifest)));
        let installed = look(self.prefix.join("share/kata").join(GUEST_IMAGE), has_manifest);
        first("guest image", beside.chain([installed])).map(Some)
    }
}

fn look(path: PathBuf, check: impl Fn(&Path) -> Look) -> (PathBuf, Look) {
    let found = check(&path);
    (path, found)
}

fn first(what: &str, places: impl IntoIterator<Item = (PathBuf, Look)>) -> Result<PathBuf, ArtefactError> {
    let mut looked = Vec::new();
    for (path, found) in places {
        match found {
            Ok(()) => return Ok(path),
            Err(why) => looked.push((path, why)),
        }
    }
    Err(ArtefactError { what: what.to_owned(), looked })
}

/// A path that the user named: no other place is tried.
fn configured(what: &str, key: &str, path: &Path) -> Result<PathBuf, ArtefactError> {
    let (path, found) = look(path.to_owned(), executable);
    let why = |why| format!("{why}; named by {key}");
    first(what, [(path, found.map_err(why))])
}

fn executable(file: &Path) -> Look {
    let metadata = std::fs::metadata(file).map_err(|error| reason(&error))?;
    match (metadata.is_file(), metadata.mode() & 0o111) {
        (false, _) => Err("not a file".to_owned()),
        (true, 0) => Err("not executable".to_owned()),
        _ => Ok(()),
    }
}

fn has_manifest(dir: &Path) -> Look {
    let manifest = dir.join(MANIFEST);
    if manifest.is_file() { Ok(()) } else { Err(format!("no {MANIFEST} in it")) }
}

/// Takes what lies beside the executable only where nobody else could have put it.
fn trusted(dir: &Path, artefact: &Path, check: impl Fn(&Path) -> Look) -> Look {
    check(artefact)?;
    only_owner_writes(dir)?;
    only_owner_writes(artefact)
}

fn only_owner_writes(path: &Path) -> Look {
    let metadata = std::fs::metadata(path).map_err(|error| reason(&error))?;
    let name = path.file_name().unwrap_or_else(|| OsStr::new("/")).display();
    let user = rustix::process::geteuid().as_raw();
    if metadata.uid() != 0 && metadata.uid() != user {
        return Err(format!(
            "not trusted: {name} belongs to user {}, neither root nor the running user",
            metadata.uid()
        ));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(format!(
            "not trusted: {name} has mode {:o}, others can write to it",
            metadata.mode() & 0o7777
        ));
    }
    Ok(())
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "not there".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
