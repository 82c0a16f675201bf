//! Debian's cloud kernel: the concrete package behind the `linux-image-cloud-amd64` name, downloaded by apt (which checks
//! its signature chain) and unpacked, never installed.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::Progress;
use super::super::tool::{ToolError, run};
use super::{KernelError, fill_from_file, rename_into, require_x86_64};

const META_PACKAGE: &str = "linux-image-cloud-amd64";
const APT_HINT: &str =
    "the debian and source kernel providers need a Debian system; give a kernel file instead";
const UPDATE_HINT: &str = "`apt-get update` fetches the package lists";

/// A package of a certain version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Package {
    pub name: String,
    pub version: String,
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.name, self.version)
    }
}

impl Package {
    /// The cloud kernel that apt would install.
    pub(super) fn cloud_kernel() -> Result<Self, KernelError> {
        require_x86_64("debian")?;
        let record = show(META_PACKAGE, UPDATE_HINT)?;
        let name = field(&record, "Depends").and_then(image_dependency).ok_or_else(|| {
            KernelError::Contents { package: META_PACKAGE.to_owned(), wanted: "dependency on a kernel image" }
        })?;
        Self::candidate(&name, UPDATE_HINT)
    }

    /// The version of package `name` that apt would install; `hint` says what to do if there is none.
    pub(super) fn candidate(name: &str, hint: &'static str) -> Result<Self, KernelError> {
        let record = show(name, hint)?;
        let version = field(&record, "Version")
            .ok_or_else(|| KernelError::Contents { package: name.to_owned(), wanted: "version" })?;
        Ok(Self { name: name.to_owned(), version: version.to_owned() })
    }

    /// Downloads the package into `dir`.
    pub(super) fn download(&self, dir: &Path) -> Result<PathBuf, KernelError> {
        // apt's own sandbox user cannot write into a private directory; saying so beforehand spares its warning.
        let mut apt = Command::new("apt-get");
        apt.args(["--quiet", "--quiet", "--option", "APT::Sandbox::User=root", "download"]);
        run(apt.arg(format!("{}={}", self.name, self.version)).current_dir(dir), APT_HINT)?;
        find(dir, &self.name, ".deb")
            .ok_or_else(|| KernelError::Contents { package: self.to_string(), wanted: "downloaded file" })
    }

    /// Makes the cached form of this kernel package in `dir`.
    pub(super) fn fill(&self, dir: &Path, progress: Progress<'_>) -> Result<(), KernelError> {
        progress(&format!("downloading {} {} from the Debian archive", self.name, self.version));
        let package = self.download(dir)?;
        progress("unpacking the kernel");
        let tree = dir.join("package");
        unpack(&package, &tree)?;
        let missing = |wanted| KernelError::Contents { package: self.to_string(), wanted };
        let boot = tree.join("boot");
        let image = find(&boot, "vmlinuz-", "").ok_or_else(|| missing("kernel image"))?;
        let config = find(&boot, "config-", "").ok_or_else(|| missing("kernel configuration"))?;
        // Since Debian 13 /lib is a link to /usr/lib, and packages use the latter.
        let modules = ["lib/modules", "usr/lib/modules"].iter().find_map(|lib| find(&tree.join(lib), "", ""));
        fill_from_file(&image, dir)?;
        rename_into(&config, &dir.join("config"))?;
        rename_into(&modules.ok_or_else(|| missing("kernel modules"))?, &dir.join("modules"))?;
        fs::remove_dir_all(&tree).map_err(|source| KernelError::File { path: tree.clone(), source })?;
        fs::remove_file(&package).map_err(|source| KernelError::File { path: package.clone(), source })
    }
}

/// Unpacks a package file to `dir`.
pub(super) fn unpack(package: &Path, dir: &Path) -> Result<(), KernelError> {
    run(Command::new("dpkg-deb").arg("--extract").args([package, dir]), APT_HINT)?;
    Ok(())
}

/// What apt tells about the candidate version of a package.
fn show(name: &str, hint: &'static str) -> Result<String, KernelError> {
    match run(Command::new("apt-cache").args(["--no-all-versions", "show", name]), APT_HINT) {
        Ok(record) if !record.trim().is_empty() => Ok(record),
        Err(ToolError::Failed { output, .. }) if output.contains("No packages found") => {
            Err(KernelError::NoPackage { package: name.to_owned(), hint })
        }
        Err(error) => Err(error.into()),
        Ok(_) => Err(KernelError::NoPackage { package: name.to_owned(), hint }),
    }
}

/// The value of a field in a package record.
fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// The kernel image among the dependencies of a meta package, without its version.
fn image_dependency(depends: &str) -> Option<String> {
    let names = depends.split(',').filter_map(|dependency| dependency.split_whitespace().next());
    names.filter(|name| name.starts_with("linux-image-")).map(str::to_owned).next()
}

/// The first file in `dir`, by name, that begins and ends so.
fn find(dir: &Path, begin: &str, end: &str) -> Option<PathBuf> {
    let names = fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with(begin) && name.ends_with(end)).min().map(|name| dir.join(name))
}

#[cfg(test)]
mod tests;
