//! Building a guest image: a kernel, a root file system around the agent, and the manifest that describes both.
//!
//! ```text
//!   lean:      initrd = the agent and its modules
//!   services:  initrd = the boot layer and its modules ── root.img = systemd, the agent, services; erofs with dm-verity
//! ```
//!
//! The same inputs give the same image, byte for byte, and a build whose inputs are those of the image that is there
//! already does nothing. The image appears at its place at once and whole: it is made in a directory beside it, which then
//! takes its name.

mod bzimage;
mod cpio;
mod disk;
mod elf;
mod extension;
mod initramfs;
mod kernel;
mod modules;
mod packages;
mod program;
mod root;
mod services;
mod tool;
mod verity;

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use sha2::{Digest, Sha256};

pub use bzimage::BzImageError;
pub use cpio::CpioError;
pub use disk::DiskError;
pub use elf::ElfError;
pub use extension::{ExtensionError, extension};
pub use kernel::{ConfigError, KernelError, KernelSource};
pub use modules::{LIST_PATH as MODULES_LIST_PATH, ModulesError};
pub use packages::PackagesError;
pub use program::ProgramError;
pub use root::RootError;
pub use services::Services;
pub use tool::ToolError;

use program::Program;

use crate::manifest::{Compression, Initrd, Kernel, Manifest, ManifestError, capability, hex, sha256_of};

/// Goes into the key of an image: to be raised when the same inputs are to give another image.
const RECIPE: u32 = 1;

const KERNEL_FILE: &str = "vmlinux";
const INITRD_FILE: &str = "initrd.cpio";

/// How the names of directories in the making begin.
const TEMPORARY_PREFIX: &str = ".build-";

/// Takes one line at a time on what a build is doing.
pub type Progress<'a> = &'a mut dyn FnMut(&str);

/// What an image is made of, and where it goes.
#[derive(Clone, Debug)]
pub struct ImageBuilder {
    /// The agent: a static program.
    pub agent: PathBuf,
    /// The kernel.
    pub kernel: KernelSource,
    /// Where downloaded and compiled kernels are kept; made if missing. May be shared by builds that run at once.
    pub cache: PathBuf,
    /// The directory to make. One that is there must be an image (it is replaced) or empty.
    pub output: PathBuf,
    /// What is beside the agent in an image of flavour services; none for a lean one.
    pub services: Option<Services>,
}

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A program is not usable.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// Initdata that cannot be trusted is answered by a policy that denies everything, which this agent would not ask.
    #[error(
        "the agent {} asks no policy, so nothing would stop a guest whose initdata cannot be trusted: build it with the feature \
         `policy`",
        agent.display()
    )]
    NoPolicy {
        /// Its path.
        agent: PathBuf,
    },
    /// There is no kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// There are no modules for it.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The root file system cannot be packed.
    #[error("cannot make the initrd")]
    Initrd(#[source] CpioError),
    /// There are no packages for the root.
    #[error("there are no packages for the guest's root")]
    Packages(#[from] PackagesError),
    /// The root cannot be laid out.
    #[error("cannot lay out the guest's root")]
    Root(#[from] RootError),
    /// The root disk cannot be made.
    #[error("cannot make the root disk")]
    Disk(#[from] DiskError),
    /// The manifest cannot be written.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A file cannot be read or written.
    #[error("cannot access {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The output directory holds something else.
    #[error("{} holds something that is not part of a guest image: choose another output directory", path.display())]
    Occupied {
        /// Its path.
        path: PathBuf,
    },
}

impl ImageBuilder {
    /// Builds the image, or finds that it is there, and hands back its manifest as loaded from the output directory.
    pub fn build(&self, progress: Progress<'_>) -> Result<Manifest, BuildError> {
        let mut report = |line: &str| {
            tracing::info!("{line}");
            progress(line);
        };
        let agent = Program::read(&self.agent)?;
        if self.services.is_some() && agent.denies_policy() {
            return Err(BuildError::NoPolicy { agent: self.agent.clone() });
        }
        let services = self.services.as_ref().map(|services| services.gather(&self.cache)).transpose()?;
        let identity = self.kernel.identify()?;
        let beside = services.as_ref().map(services::Gathered::key).unwrap_or_default();
        let key = input_key(&agent.digest(), &identity.key, &beside);
        if let Some(manifest) = self.current(&key) {
            report(&format!("the image in {} is up to date", self.output.display()));
            return Ok(manifest);
        }
        self.check_output()?;
        let kernel = identity.provide(&self.cache, &mut report)?;
        report(&format!("packing the image with kernel {}", kernel.release));
        let (place, name) = self.place()?;
        fs::create_dir_all(place).map_err(file(place))?;
        let work = temporary_in(place).map_err(file(place))?;
        let image = work.path().join(name);
        fs::create_dir(&image).map_err(file(&image))?;
        let mut manifest = match &services {
            None => pack_lean(&agent, &kernel, &image, &mut report)?,
            Some(services) => services.pack(&agent, &kernel, &image, &key, &mut report)?,
        };
        manifest.kernel.provider = identity.provider;
        manifest.input_key = Some(key);
        manifest.store(&image)?;
        readable(&image).map_err(file(&image))?;
        put_in_place(&image, &self.output).map_err(file(&self.output))?;
        report(&format!("the image is in {}", self.output.display()));
        Ok(Manifest::load(&self.output)?)
    }

    /// The manifest of the image that is there, if that was made of the same inputs and is still whole.
    fn current(&self, key: &str) -> Option<Manifest> {
        let manifest = Manifest::load(&self.output).ok()?;
        (manifest.input_key.as_deref() == Some(key) && manifest.verify().is_ok()).then_some(manifest)
    }

    fn check_output(&self) -> Result<(), BuildError> {
        let path = &self.output;
        let entries = match fs::read_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result.map_err(file(path))?,
        };
        let image = image_files(path);
        for entry in entries {
            if !image.contains(&entry.map_err(file(path))?.file_name()) {
                return Err(BuildError::Occupied { path: path.clone() });
            }
        }
        Ok(())
    }

    /// The directory that the output is in, and its name there.
    fn place(&self) -> Result<(&Path, &std::ffi::OsStr), BuildError> {
        let invalid =
            || BuildError::File { path: self.output.clone(), source: io::ErrorKind::InvalidFilename.into() };
        let parent = self.output.parent().ok_or_else(invalid)?;
        let place = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        Ok((place, self.output.file_name().ok_or_else(invalid)?))
    }
}

/// Writes kernel and initrd into `dir` and describes them.
fn pack_lean(
    agent: &Program,
    kernel: &kernel::Kernel,
    dir: &Path,
    progress: Progress<'_>,
) -> Result<Manifest, BuildError> {
    let plan = kernel.plan(modules::IN_INITRD)?;
    let initrd = initramfs::Init { program: agent.bytes(), list: modules::LIST_PATH };
    describe(agent, kernel, &initrd, &plan, dir, progress)
}

/// Writes kernel and initrd into `dir`, and what the manifest says of them and of the agent.
fn describe(
    agent: &Program,
    kernel: &kernel::Kernel,
    init: &initramfs::Init<'_>,
    plan: &modules::Plan,
    dir: &Path,
    progress: Progress<'_>,
) -> Result<Manifest, BuildError> {
    let (vmlinux, initrd) = (dir.join(KERNEL_FILE), dir.join(INITRD_FILE));
    fs::copy(kernel.vmlinux(), &vmlinux).map_err(file(&vmlinux))?;
    let out = fs::File::create(&initrd).map_err(file(&initrd))?;
    let archive = init.archive(plan).map_err(BuildError::Initrd)?;
    archive.write(io::BufWriter::new(out)).map_err(BuildError::Initrd)?;

    let digest = |path: &Path| sha256_of(path).map_err(file(path));
    let described = Kernel {
        path: KERNEL_FILE.into(),
        sha256: digest(&vmlinux)?,
        release: kernel.release.clone(),
        provider: String::new(),
    };
    let mut manifest = Manifest::new(described, agent.agent(progress));
    manifest.initrd =
        Some(Initrd { path: INITRD_FILE.into(), sha256: digest(&initrd)?, compression: Compression::None });
    manifest.capabilities = match kernel.config()? {
        Some(config) => config.capabilities(plan),
        None => {
            progress(
                "the kernel does not tell its configuration: taking it that it has virtio-pci, virtio-fs and vsock",
            );
            [capability::VIRTIO_PCI, capability::VIRTIO_FS, capability::VSOCK].map(str::to_owned).into()
        }
    };
    if agent.has_policy() {
        manifest.capabilities.insert(capability::POLICY.to_owned());
    }
    manifest.modules = plan.boot.iter().map(|module| module.name.clone()).collect();
    Ok(manifest)
}

/// What the image in `dir` consists of; nothing if there is none. An image is known by the shape of its manifest, be that
/// of another version: many things have a file of that name, and all that is in the directory is going to be replaced.
fn image_files(dir: &Path) -> HashSet<OsString> {
    let manifest = fs::read(dir.join(crate::manifest::FILE_NAME)).unwrap_or_default();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap_or_default();
    let path = |key| Some(manifest.get(key)?.get("path")?.as_str()?.into());
    if !manifest.get("agent").is_some_and(serde_json::Value::is_object) || path("kernel").is_none() {
        return HashSet::new();
    }
    let files = ["kernel", "initrd", "image"].into_iter().filter_map(path);
    files.chain([crate::manifest::FILE_NAME.into()]).collect()
}

/// Names the file in an IO error.
fn file(path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_path_buf();
    move |source| BuildError::File { path, source }
}

/// `beside` are lines on what an image has beside agent and kernel.
fn input_key(agent: &str, kernel: &str, beside: &str) -> String {
    hex(&Sha256::digest(format!("recipe {RECIPE}\nagent {agent}\nkernel {kernel}\n{beside}")))
}

/// Lets everybody read the image: a virtual machine monitor runs as an unprivileged user.
fn readable(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        fs::set_permissions(entry?.path(), Permissions::from_mode(0o644))?;
    }
    fs::set_permissions(dir, Permissions::from_mode(0o755))
}

/// Gives the directory `made` the name `place`. What has that name now ends up where `made` was.
fn put_in_place(made: &Path, place: &Path) -> io::Result<()> {
    match renameat_with(CWD, made, CWD, place, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::NOENT) => fs::rename(made, place),
        // A file system that cannot exchange: there is a moment without an image.
        Err(rustix::io::Errno::INVAL) => {
            fs::rename(place, made.with_extension("old"))?;
            fs::rename(made, place)
        }
        Err(error) => Err(error.into()),
    }
}

/// A directory in `dir` that goes away with the value.
fn temporary_in(dir: &Path) -> io::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempdir_in(dir)
}

#[cfg(test)]
mod tests;
