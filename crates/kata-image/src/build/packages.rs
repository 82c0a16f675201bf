//! Packages of a Debian suite for a guest's root: resolved and downloaded by apt with lists of its own, which check the
//! archive's signature, and unpacked. The machine's own packages, lists and sources stay as they are, nothing is installed,
//! no script of a package runs, and it takes no privileges.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::tool::{ToolError, run};

/// Debian's keys, of the package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const MIRROR: &str = "http://deb.debian.org/debian";
const HINT: &str = "the services image is made of Debian's packages and needs apt and dpkg";

/// Why there are no packages.
#[derive(Debug, thiserror::Error)]
pub enum PackagesError {
    /// apt or dpkg failed, or is not there.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A file cannot be read or written.
    #[error("cannot access {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A word that apt would take for something else.
    #[error("{0:?} is no {1}")]
    Word(String, &'static str),
}

/// A suite of an archive, and apt's state for it in a directory of the cache.
#[derive(Debug)]
pub struct Archive {
    dir: PathBuf,
}

impl Archive {
    /// Opens `suite` of the archive at `mirror`, by default the one that this machine uses.
    pub fn open(cache: &Path, suite: &str, mirror: Option<&str>) -> Result<Self, PackagesError> {
        let own = mirror.is_none().then(|| own_mirror(Path::new("/etc/apt"))).flatten();
        let mirror = mirror.or(own.as_deref()).unwrap_or(MIRROR);
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        let word = |good: bool, word: &str, what| {
            if good { Ok(()) } else { Err(PackagesError::Word(word.to_owned(), what)) }
        };
        word(plain(suite) && !suite.contains(['/', '.']), suite, "name of a suite")?;
        word(plain(mirror) && mirror.contains("://"), mirror, "address of an archive")?;
        let dir = cache.join("debian").join(suite);
        for sub in ["lists/partial", "archives/partial", "none/partial"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(file(&path))?;
        }
        let archive = Self { dir };
        archive.write("status", "")?;
        archive.write("sources.list", &format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"))?;
        Ok(archive)
    }

    /// The package files that `names` and what they depend on are now, sorted: `<name>_<version>_<architecture>.deb`.
    pub fn resolve(&self, names: &[&str]) -> Result<Vec<String>, PackagesError> {
        run(self.apt("none").arg("update"), HINT)?;
        // Those that were downloaded before are not told.
        let text = run(self.apt("none").args(["install", "--print-uris"]).args(names), HINT)?;
        let mut files = files_of(&text);
        files.sort();
        Ok(files)
    }

    /// Unpacks the package files `files`, which `names` were resolved to, into `dir`.
    pub fn unpack(&self, names: &[&str], files: &[String], dir: &Path) -> Result<(), PackagesError> {
        run(self.apt("archives").args(["install", "--download-only", "--yes"]).args(names), HINT)?;
        for name in files {
            let package = self.dir.join("archives").join(name);
            run(Command::new("dpkg-deb").arg("--extract").args([&package, dir]), HINT)?;
        }
        Ok(())
    }

    /// apt with what it downloads in the directory `archives`.
    fn apt(&self, archives: &str) -> Command {
        let mut command = Command::new("apt-get");
        command.args([
            "-qq",
            "-oAPT::Install-Recommends=0",
            "-oDebug::NoLocking=1",
            "-oAPT::Sandbox::User=root",
        ]);
        command.arg("-oDir::Etc::sourceparts=/dev/null");
        for (key, name) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache::archives", archives),
            ("Dir::Cache::pkgcache", ""),
            ("Dir::Cache::srcpkgcache", ""),
        ] {
            let value = if name.is_empty() { PathBuf::new() } else { self.dir.join(name) };
            command.arg(format!("-o{key}={}", value.display()));
        }
        command
    }

    fn write(&self, name: &str, text: &str) -> Result<(), PackagesError> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(file(&path))
    }
}

/// The file names in lines of `'URL' file size digest`.
fn files_of(text: &str) -> Vec<String> {
    let name = |line: &str| {
        let mut words = line.split(' ');
        (words.next()?.starts_with('\'') && line.contains(".deb")).then(|| words.next().map(str::to_owned))?
    };
    text.lines().filter_map(name).collect()
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> PackagesError {
    let path = path.to_path_buf();
    move |source| PackagesError::File { path, source }
}

/// Where this machine gets its Debian packages.
fn own_mirror(etc: &Path) -> Option<String> {
    let mut files = vec![etc.join("sources.list")];
    let parts = fs::read_dir(etc.join("sources.list.d")).into_iter().flatten().flatten();
    files.extend(parts.map(|entry| entry.path()));
    files.sort();
    let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
    texts.flat_map(|text| text.lines().filter_map(mirror_of).collect::<Vec<_>>()).next()
}

/// The archive that a line of either format names, unless it is the security one.
fn mirror_of(line: &str) -> Option<String> {
    let url = match line.strip_prefix("URIs:") {
        Some(rest) => rest.split_whitespace().next()?,
        None if line.starts_with("deb ") => line.split_whitespace().find(|word| word.contains("://"))?,
        None => return None,
    };
    (url.contains("debian") && !url.contains("security")).then(|| url.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_is_found_in_both_formats_of_sources() {
        let found = Some("http://mirror.example/debian".to_owned());
        assert_eq!(mirror_of("URIs: http://mirror.example/debian"), found);
        assert_eq!(mirror_of("deb [arch=amd64] http://mirror.example/debian bookworm main"), found);
        assert_eq!(mirror_of("deb http://mirror.example/debian-security bookworm-security main"), None);
        assert_eq!(mirror_of("# deb http://mirror.example/debian bookworm main"), None);
    }

    #[test]
    fn names_of_package_files_are_read_from_what_apt_would_fetch() {
        let text = "'http://mirror.example/pool/libc6_2.41-12%2bdeb13u5_amd64.deb' libc6_2.41-12+deb13u5_amd64.deb 2850108 \
                    MD5Sum:3cf6\nReading package lists...\n";
        assert_eq!(files_of(text), ["libc6_2.41-12+deb13u5_amd64.deb"]);
    }

    #[test]
    fn suite_or_mirror_that_apt_would_take_for_more_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (suite, mirror) in [
            ("trixie main\ndeb http://x", None),
            ("../..", None),
            ("", None),
            ("trixie", Some("http://x sid")),
        ] {
            let error = Archive::open(dir.path(), suite, mirror).unwrap_err();
            assert!(matches!(error, PackagesError::Word(..)), "{error}");
        }
    }
}
