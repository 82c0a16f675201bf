//! Guest kernels and where they come from.
//!
//! ```text
//!   KernelSource ── identify ──▶ key ──▶ cache/kernel/<key>/  there? ── yes ──▶ Kernel
//!    debian │ source │ file                    ▲                └── no ──▶ fill a temporary directory, rename it
//!                                              └──────────────────────────────┘
//! ```
//!
//! A cached kernel is a directory with `vmlinux` (ELF with a PVH entry), `release`, and, where the provider has them,
//! `config` and `modules/` (the package's `lib/modules/<release>`). One build fills the cache at a time; others wait for it.

mod config;
mod debian;
mod source;

use std::convert::Infallible;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{FlockOperation, flock};

pub use config::{ConfigError, KernelConfig};

use super::bzimage::{self, BzImageError};
use super::elf::{Elf, ElfError};
use super::modules::{ModulesError, Plan, Selection, Tree};
use super::tool::ToolError;
use super::{Progress, TEMPORARY_PREFIX, temporary_in};
use crate::manifest::{hex, sha256_of};

/// Where the kernel of an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSource {
    /// Debian's cloud kernel, from the package archive that this machine's apt knows. Nothing is installed.
    Debian,
    /// Our configuration (`guest/kernel/kata.config`) over the kernel source that Debian ships, compiled here.
    Source,
    /// A kernel of the user's own: an ELF `vmlinux` or a bzImage, with everything built in.
    File(PathBuf),
}

impl FromStr for KernelSource {
    type Err = Infallible;

    /// `debian`, `source`, or the path of a file.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "debian" => Self::Debian,
            "source" => Self::Source,
            path => Self::File(path.into()),
        })
    }
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The provider works on x86-64 only.
    #[error(
        "the {provider} kernel provider works on x86_64 only, this machine is {machine}; give a kernel file"
    )]
    Machine {
        /// The provider.
        provider: &'static str,
        /// What `std::env::consts::ARCH` says.
        machine: &'static str,
    },
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// apt knows no such package.
    #[error("apt knows no package {package}; {hint}")]
    NoPackage {
        /// The package.
        package: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// A package does not hold what we look for in it.
    #[error("package {package} has no {wanted}")]
    Contents {
        /// The package.
        package: String,
        /// What we look for.
        wanted: &'static str,
    },
    /// Programs or headers for compiling are missing.
    #[error("compiling a kernel needs {}, which this machine does not have; `apt-get install {packages}` brings them", missing.join(", "))]
    MissingTools {
        /// Programs and headers.
        missing: Vec<&'static str>,
        /// Packages that have them.
        packages: String,
    },
    /// The kernel's own configuration did not keep what we ask for.
    #[error("this kernel source does not take these lines of kata.config: {}", lines.join("; "))]
    ConfigLost {
        /// The lines, each with what became of it.
        lines: Vec<String>,
    },
    /// A file cannot be read or written.
    #[error("cannot access {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A bzImage does not unpack.
    #[error("cannot take the kernel out of {}", path.display())]
    BzImage {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: BzImageError,
    },
    /// The kernel is not an ELF file.
    #[error("{} is neither a bzImage nor an ELF kernel", path.display())]
    Elf {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ElfError,
    },
    /// The kernel cannot be entered directly.
    #[error("the kernel in {} has no PVH entry (CONFIG_PVH=y is needed)", path.display())]
    NoPvhEntry {
        /// Its path.
        path: PathBuf,
    },
    /// The kernel's configuration cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A kernel of which it is known what it will be, but which may not be there yet.
#[derive(Debug)]
pub(super) struct Identity {
    /// Names it and everything that it is made of; fit for a file name.
    pub key: String,
    /// For the manifest and for people.
    pub provider: String,
    origin: Origin,
}

#[derive(Debug)]
enum Origin {
    Debian(debian::Package),
    Source(source::Recipe),
    File(PathBuf),
}

/// A kernel in the cache.
#[derive(Debug)]
pub(super) struct Kernel {
    dir: PathBuf,
    /// As `uname -r` prints it; empty when unknown.
    pub release: String,
}

impl KernelSource {
    /// Finds out which kernel this is now, without fetching or compiling anything.
    pub(super) fn identify(&self) -> Result<Identity, KernelError> {
        match self {
            Self::Debian => debian::Package::cloud_kernel().map(|package| Identity {
                key: format!("debian-{package}"),
                provider: format!("debian {package}"),
                origin: Origin::Debian(package),
            }),
            Self::Source => source::Recipe::current().map(|recipe| Identity {
                key: format!("source-{recipe}"),
                provider: format!("source {recipe}"),
                origin: Origin::Source(recipe),
            }),
            Self::File(path) => {
                let digest =
                    sha256_of(path).map_err(|source| KernelError::File { path: path.clone(), source })?;
                Ok(Identity {
                    key: format!("file-{digest}"),
                    provider: format!("file {}", path.display()),
                    origin: Origin::File(path.clone()),
                })
            }
        }
    }
}

impl Identity {
    /// The kernel, from the cache, where it is put first if it is not there yet.
    pub(super) fn provide(&self, cache: &Path, progress: Progress<'_>) -> Result<Kernel, KernelError> {
        let kernels = cache.join("kernel");
        let dir = kernels.join(&self.key);
        if !dir.exists() {
            let file = |source| KernelError::File { path: kernels.clone(), source };
            fs::create_dir_all(&kernels).map_err(file)?;
            let _lock = lock(&kernels, progress).map_err(file)?;
            // The build that held the lock may have made it.
            if !dir.exists() {
                sweep(&kernels).map_err(file)?;
                let work = temporary_in(&kernels).map_err(file)?;
                self.fill(work.path(), cache, progress)?;
                rename_into(work.path(), &dir)?;
            }
        }
        let release = read_text(&dir.join("release"))?.trim().to_owned();
        Ok(Kernel { dir, release })
    }

    fn fill(&self, dir: &Path, cache: &Path, progress: Progress<'_>) -> Result<(), KernelError> {
        match &self.origin {
            Origin::Debian(package) => package.fill(dir, progress),
            Origin::Source(recipe) => recipe.fill(dir, cache, progress),
            Origin::File(path) => fill_from_file(path, dir),
        }
    }
}

/// Waits until no other build fills the cache; others wait until the value is dropped, or its process gone.
fn lock(kernels: &Path, progress: Progress<'_>) -> io::Result<File> {
    let file = File::create(kernels.join(".lock"))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        progress("waiting for another build that is making a kernel");
        flock(&file, FlockOperation::LockExclusive)?;
    }
    Ok(file)
}

/// Removes what a killed build has left: a kernel's source tree is more than a gigabyte. To be called with the lock held.
fn sweep(kernels: &Path) -> io::Result<()> {
    for entry in fs::read_dir(kernels)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(TEMPORARY_PREFIX.as_bytes()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

impl Kernel {
    /// The ELF kernel.
    pub(super) fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// What the kernel was configured with; none if that is not known.
    pub(super) fn config(&self) -> Result<Option<KernelConfig>, KernelError> {
        let path = self.dir.join("config");
        if path.exists() {
            return Ok(Some(KernelConfig::parse(&read_text(&path)?)));
        }
        Ok(KernelConfig::embedded(&read(&self.vmlinux())?)?)
    }

    /// The modules that an image takes along; none for a kernel without a module tree.
    pub(super) fn plan(&self, selection: Selection) -> Result<Plan, ModulesError> {
        let root = self.dir.join("modules");
        if root.exists() { Tree::open(&root, &self.release)?.plan(selection) } else { Ok(Plan::default()) }
    }
}

/// Puts `vmlinux` and `release` into `dir`, from a bzImage or an ELF file.
fn fill_from_file(path: &Path, dir: &Path) -> Result<(), KernelError> {
    let bytes = read(path)?;
    let (release, vmlinux) = if bzimage::is_bzimage(&bytes) {
        let unpacked = bzimage::unpack(&bytes)
            .map_err(|source| KernelError::BzImage { path: path.to_path_buf(), source })?;
        (unpacked.release, unpacked.vmlinux)
    } else {
        (banner_release(&bytes), bytes)
    };
    let elf = Elf::parse(&vmlinux).map_err(|source| KernelError::Elf { path: path.to_path_buf(), source })?;
    if cfg!(target_arch = "x86_64") && !elf.has_pvh_entry() {
        return Err(KernelError::NoPvhEntry { path: path.to_path_buf() });
    }
    write(&dir.join("vmlinux"), &vmlinux)?;
    write(&dir.join("release"), release.as_bytes())
}

/// The release in the banner that every kernel holds ("Linux version 6.1.0 (…"); empty if there is none.
fn banner_release(vmlinux: &[u8]) -> String {
    const BANNER: &[u8] = b"Linux version ";
    let at = |start: usize| {
        let text = vmlinux.get(start + BANNER.len()..)?.split(|byte| !byte.is_ascii_graphic()).next()?;
        let digit = text.first().is_some_and(u8::is_ascii_digit);
        (digit && text.len() < 65).then(|| String::from_utf8_lossy(text).into_owned())
    };
    positions(vmlinux, BANNER).find_map(at).unwrap_or_default()
}

/// Where `needle` is in `haystack`.
fn positions<'a>(haystack: &'a [u8], needle: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    haystack
        .windows(needle.len())
        .enumerate()
        .filter_map(move |(at, window)| (window == needle).then_some(at))
}

fn read(path: &Path) -> Result<Vec<u8>, KernelError> {
    fs::read(path).map_err(|source| KernelError::File { path: path.to_path_buf(), source })
}

fn read_text(path: &Path) -> Result<String, KernelError> {
    fs::read_to_string(path).map_err(|source| KernelError::File { path: path.to_path_buf(), source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), KernelError> {
    fs::write(path, bytes).map_err(|source| KernelError::File { path: path.to_path_buf(), source })
}

fn rename_into(from: &Path, to: &Path) -> Result<(), KernelError> {
    fs::rename(from, to).map_err(|source| KernelError::File { path: from.to_path_buf(), source })
}

/// A short digest of `text`, for keys.
fn short_digest(text: &str) -> String {
    use sha2::{Digest, Sha256};
    hex(&Sha256::digest(text)).chars().take(12).collect()
}

/// Refuses a machine that a provider has no kernel for.
fn require_x86_64(provider: &'static str) -> Result<(), KernelError> {
    match std::env::consts::ARCH {
        "x86_64" => Ok(()),
        machine => Err(KernelError::Machine { provider, machine }),
    }
}

#[cfg(test)]
mod tests;
