//! A kernel compiled for guests: our configuration over the source package of Debian's current long-term kernel.

use std::fmt;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::super::Progress;
use super::super::tool::run;
use super::debian::{Package, unpack};
use super::{
    KernelConfig, KernelError, fill_from_file, read_text, rename_into, require_x86_64, short_digest,
};

const PACKAGE: &str = "linux-source-6.12";
const PACKAGE_HINT: &str = "on Debian 12 it is in bookworm-security and bookworm-backports: add one of these suites of your \
     mirror to a file in /etc/apt/sources.list.d, then run `apt-get update`";
const TOOLS_HINT: &str = "`apt-get install build-essential flex bison bc libelf-dev xz-utils perl` brings what a kernel build needs";

/// The configuration, a fragment over "everything off".
const FRAGMENT: &str = include_str!("../../../../../guest/kernel/kata.config");

/// Programs that the kernel's build runs, and the packages that have them.
const PROGRAMS: &[(&str, &str)] = &[
    ("make", "build-essential"),
    ("gcc", "build-essential"),
    ("ld", "build-essential"),
    ("strip", "build-essential"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
];

/// Which source is compiled with which configuration.
#[derive(Debug)]
pub(super) struct Recipe {
    package: Package,
    fragment: String,
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.package, self.fragment)
    }
}

impl Recipe {
    /// The source package that apt would install, with the configuration of this program.
    pub(super) fn current() -> Result<Self, KernelError> {
        require_x86_64("source")?;
        let package = Package::candidate(PACKAGE, PACKAGE_HINT)?;
        Ok(Self { package, fragment: short_digest(FRAGMENT) })
    }

    /// Compiles the kernel and makes its cached form in `dir`. The source package stays in `cache` for the next build.
    pub(super) fn fill(&self, dir: &Path, cache: &Path, progress: Progress<'_>) -> Result<(), KernelError> {
        check_tools()?;
        let build = dir.join("build");
        let tree = self.unpack(&dir.join("source"), cache, progress)?;
        create_dir(&build)?;
        progress("configuring the kernel");
        configure(&tree, &build)?;
        let jobs = std::thread::available_parallelism().map_or(1, NonZero::get);
        progress(&format!("compiling the kernel with {jobs} jobs, which takes some minutes"));
        run(make(&tree, &build).arg(format!("--jobs={jobs}")).arg("vmlinux"), TOOLS_HINT)?;
        let vmlinux = build.join("vmlinux");
        run(Command::new("strip").arg("--strip-all").arg(&vmlinux), TOOLS_HINT)?;
        fill_from_file(&vmlinux, dir)?;
        rename_into(&build.join(".config"), &dir.join("config"))?;
        for scratch in [dir.join("source"), build] {
            fs::remove_dir_all(&scratch).map_err(|source| KernelError::File { path: scratch, source })?;
        }
        Ok(())
    }

    /// Fetches the source if the cache does not have it, and unpacks it below `dir`.
    fn unpack(&self, dir: &Path, cache: &Path, progress: Progress<'_>) -> Result<PathBuf, KernelError> {
        let missing = |wanted| KernelError::Contents { package: self.package.to_string(), wanted };
        create_dir(dir)?;
        let sources = cache.join("source");
        let kept = sources.join(format!("{}.deb", self.package));
        if !kept.exists() {
            create_dir(&sources)?;
            progress(&format!(
                "downloading {} {} from the Debian archive",
                self.package.name, self.package.version
            ));
            rename_into(&self.package.download(dir)?, &kept)?;
        }
        progress("unpacking the kernel source");
        unpack(&kept, dir)?;
        let archive = dir.join("usr/src").join(format!("{PACKAGE}.tar.xz"));
        if !archive.exists() {
            return Err(missing("source archive"));
        }
        run(Command::new("tar").arg("--extract").arg("--file").arg(&archive).current_dir(dir), TOOLS_HINT)?;
        let tree = dir.join(PACKAGE);
        if tree.join("Kconfig").exists() { Ok(tree) } else { Err(missing("kernel source tree")) }
    }
}

/// Makes `.config` in `build` of our fragment over "everything off", and makes sure that each line of ours is in it.
fn configure(tree: &Path, build: &Path) -> Result<(), KernelError> {
    let fragment = build.join("kata.config");
    super::write(&fragment, FRAGMENT.as_bytes())?;
    run(make(tree, build).env("KCONFIG_ALLCONFIG", &fragment).arg("allnoconfig"), TOOLS_HINT)?;
    let made = KernelConfig::parse(&read_text(&build.join(".config"))?);
    let lines = made.lost(&KernelConfig::parse(FRAGMENT));
    if lines.is_empty() { Ok(()) } else { Err(KernelError::ConfigLost { lines }) }
}

/// A `make` that leaves neither this machine's name nor the time in the kernel.
fn make(tree: &Path, build: &Path) -> Command {
    let mut make = Command::new("make");
    make.arg("--silent").arg("--directory").arg(tree).arg(format!("O={}", build.display()));
    make.args(["KBUILD_BUILD_USER=kata", "KBUILD_BUILD_HOST=kata", "KBUILD_BUILD_VERSION=1"]);
    make.arg("KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970");
    make.env_remove("MAKEFLAGS").env_remove("MFLAGS").env_remove("CFLAGS").env_remove("LOCALVERSION");
    make
}

fn check_tools() -> Result<(), KernelError> {
    let mut lacking: Vec<(&'static str, &str)> =
        PROGRAMS.iter().filter(|(program, _)| !in_path(program)).copied().collect();
    // libelf comes as a header: only the compiler knows where it looks for those.
    let compiler = |include: &str| {
        let mut gcc = Command::new("gcc");
        gcc.args(["-E", "-x", "c", "-include", include, "/dev/null"]).stdin(Stdio::null());
        gcc.stdout(Stdio::null()).stderr(Stdio::null()).status()
    };
    if compiler("gelf.h").is_ok_and(|status| !status.success()) {
        lacking.push(("gelf.h", "libelf-dev"));
    }
    if lacking.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = lacking.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    Err(KernelError::MissingTools {
        packages: packages.join(" "),
        missing: lacking.into_iter().map(|(name, _)| name).collect(),
    })
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn create_dir(path: &Path) -> Result<(), KernelError> {
    fs::create_dir_all(path).map_err(|source| KernelError::File { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests;
