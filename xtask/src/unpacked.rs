//! Debian packages of newer suites beside the installed ones, so that both are tested: unpacked, never installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::shell::{self, ChoreError, at};
use crate::{Chores, say};

/// Outside the tree, which may lie where only root gets: QEMU gives its privileges up and then reads its firmware.
pub const CACHE: &str = "/var/cache/kata";

/// A program of another suite than the machine's, with what it needs to run from a directory of its own.
pub struct Unpacked {
    /// Directory in the cache.
    name: &'static str,
    suite: &'static str,
    packages: &'static [&'static str],
    /// Relative to where the packages are unpacked.
    program: &'static str,
}

/// The QEMU of backports: two major versions above the installed one.
pub const NEWER_QEMU: Unpacked = Unpacked {
    name: "newer-qemu",
    suite: "bookworm-backports",
    packages: &["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"],
    program: "usr/bin/qemu-system-x86_64",
};

/// containerd 2, whose shims are started and spoken to in another way than 1.6's. `ctr` is beside it.
pub const NEWER_CONTAINERD: Unpacked = Unpacked {
    name: "newer-containerd",
    suite: "sid",
    packages: &["containerd"],
    program: "usr/bin/containerd",
};

/// Docker that takes shims by their name, which 20.10 does not. The client is in `usr/bin`.
pub const NEWER_DOCKER: Unpacked = Unpacked {
    name: "newer-docker",
    suite: "trixie",
    packages: &["docker.io", "docker-cli", "tini"],
    program: "usr/sbin/dockerd",
};

impl Unpacked {
    /// The program, downloaded and unpacked the first time.
    pub fn program(&self) -> Chores<PathBuf> {
        let root = Path::new(CACHE).join(self.name);
        let program = root.join(self.program);
        if !program.exists() {
            self.unpack(&root)?;
        }
        Ok(program)
    }

    fn unpack(&self, root: &Path) -> Chores {
        say(&format!("unpacking {} of {} beside the installed one", self.packages.join(", "), self.suite));
        let work = root.with_extension("new");
        if work.exists() {
            std::fs::remove_dir_all(&work).map_err(at("remove", &work))?;
        }
        let lists = work.join("lists/partial");
        std::fs::create_dir_all(&lists).map_err(at("create", &lists))?;
        let sources = work.join("sources.list");
        let line = format!(
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {} {} main\n",
            mirror(Path::new("/etc/apt"))?,
            self.suite
        );
        std::fs::write(&sources, line).map_err(at("write", &sources))?;
        shell::run(apt(&work).arg("update"))?;
        let names = self.packages.iter().map(|name| format!("{name}/{}", self.suite));
        shell::run(apt(&work).arg("download").args(names))?;
        for entry in std::fs::read_dir(&work).map_err(at("list", &work))?.flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "deb") {
                shell::run(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(work.join("root")))?;
            }
        }
        std::fs::rename(work.join("root"), root).map_err(at("rename", &work))?;
        std::fs::remove_dir_all(&work).map_err(at("remove", &work))
    }
}

/// apt with lists and sources of its own: the machine's stay as they are.
fn apt(work: &Path) -> Command {
    let mut command = Command::new("apt-get");
    let option = |key: &str, value: &Path| format!("-o{key}={}", value.display());
    command
        .current_dir(work)
        .arg("-qq")
        .arg(option("Dir::Etc::sourcelist", &work.join("sources.list")))
        .arg("-oDir::Etc::sourceparts=/dev/null")
        .arg(option("Dir::State::lists", &work.join("lists")))
        .arg(option("Dir::Cache", &work.join("cache")))
        .arg("-oAPT::Sandbox::User=root");
    command
}

/// Where this machine gets its Debian packages.
pub fn mirror(etc: &Path) -> Chores<String> {
    let mut files = vec![etc.join("sources.list")];
    files.extend(
        std::fs::read_dir(etc.join("sources.list.d")).into_iter().flatten().flatten().map(|e| e.path()),
    );
    files.sort();
    let texts = files.iter().filter_map(|file| std::fs::read_to_string(file).ok());
    texts
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|line| mirror_of(&line))
        .next()
        .ok_or_else(|| ChoreError::Found("no Debian mirror is configured in /etc/apt".to_owned()))
}

/// The archive that a line of either format names, unless it is the security one.
fn mirror_of(line: &str) -> Option<String> {
    let url = match line.strip_prefix("URIs:") {
        Some(rest) => rest.split_whitespace().next()?,
        None if line.starts_with("deb ") => line.split_whitespace().find(|word| word.contains("://"))?,
        None => return None,
    };
    (!url.contains("security")).then(|| url.to_owned())
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
}
