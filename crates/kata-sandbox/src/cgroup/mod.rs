//! The pod's control groups on the host.
//!
//! ```text
//!   sandbox_cgroup_only = true          sandbox_cgroup_only = false
//!   …/<pod>/<sandbox>                   …/<pod>/<sandbox>            /kata_overhead/<sandbox>
//!     owner, VMM, vsock, virtiofsd        the VMM's virtual CPUs       owner, VMM, vsock, virtiofsd
//! ```
//!
//! The path is `linux.cgroupsPath` of the pod's first container; what is above it, and its limits, are those of whoever made it
//! (kubelet: the pod's limits and the RuntimeClass's overhead). No limit of a container is set here, since those act in the guest:
//! only the host's CPUs and memory nodes are, which mean nothing there.
//!
//! | host | what is used |
//! |---|---|
//! | version 1 | cpu, cpuacct, cpuset, memory, pids, blkio and hugetlb, as far as they are mounted |
//! | version 2 | one directory, with the controllers that the directories above it can give |
//! | version 2, `sandbox_cgroup_only = false` | threads of one process cannot be in different cgroups: the whole VMM is in the pod's |
//! | neither | nothing, with a warning |
//!
//! Directories go into the leak record before they are made. The owner enters first, so that all it starts is born inside, and
//! leaves at the end, for a cgroup with a process cannot be removed.

mod path;
mod tree;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kata_hypervisor::process::{Record, RecordError};

use self::path::resolve;
use self::tree::{Tree, Trees};

/// Where the processes of all pods are that are not in their own.
const OVERHEAD: &str = "/kata_overhead";
/// How often a directory is made anew that somebody else removes at the same time.
const TRIES: usize = 8;

/// Why a cgroup of the host cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path in the specification leads nowhere.
    #[error("linux.cgroupsPath {path:?} {reason}", path = .path.display())]
    Path {
        /// What it says.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file or directory.
    #[error("cannot {action} {path}; see whether /sys/fs/cgroup can be written to", path = .path.display())]
    File {
        /// `read`, `write 0-3 to`, `make`.
        action: String,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The leak record.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl CgroupError {
    fn file(action: impl Into<String>, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let (action, path) = (action.into(), path.into());
        move |source| Self::File { action, path, source }
    }
}

/// What kubelet's cgroup of a pod tells of the pod's containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OfKubelet {
    /// Each has a limit of memory.
    pub(crate) has_memory_limit: bool,
    /// Each has a limit of CPU time.
    pub(crate) has_cpu_limit: bool,
}

/// The kernel has killed processes for want of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OomKill {
    /// The tightest limit that holds for the pod, and its cgroup; `None` where there is none.
    pub(crate) limit: Option<(PathBuf, u64)>,
}

/// One pod's cgroups.
#[derive(Debug)]
pub(crate) struct Cgroup {
    trees: Trees,
    /// The pod's, below each tree's root.
    pod: PathBuf,
    /// Where the rest is, if not there.
    overhead: Option<PathBuf>,
    /// Where this process came from, in the order of the trees.
    home: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes the pod's cgroups; `None`, with a warning, on a host without any.
    pub(crate) fn make(
        path: &Path,
        id: &str,
        only: bool,
        record: &Record,
    ) -> Result<Option<Self>, CgroupError> {
        let Some(trees) = Trees::of_host()? else {
            tracing::warn!(
                pod = id,
                "no cgroups are mounted: nothing on this host bounds or counts what the pod takes"
            );
            return Ok(None);
        };
        Self::make_in(trees, path, id, only, record).map(Some)
    }

    fn make_in(
        trees: Trees,
        path: &Path,
        id: &str,
        only: bool,
        record: &Record,
    ) -> Result<Self, CgroupError> {
        let pod = resolve(path)?;
        let overhead = (!only).then(|| resolve(&Path::new(OVERHEAD).join(id))).transpose()?;
        let home = trees.all.iter().map(Tree::of_this_process).collect::<Result<_, _>>()?;
        let cgroup = Self { trees, pod, overhead, home };
        for tree in &cgroup.trees.all {
            for path in [Some(&cgroup.pod), cgroup.overhead.as_ref()].into_iter().flatten() {
                make_in_tree(tree, path, record)?;
            }
        }
        Ok(cgroup)
    }

    /// Takes this process, and all that it will start, into the cgroup of what is not a virtual CPU.
    pub(crate) fn enter(&self) -> Result<(), CgroupError> {
        let to = self.overhead.as_ref().unwrap_or(&self.pod);
        for tree in &self.trees.all {
            write(&tree.root.join(to).join("cgroup.procs"), &std::process::id().to_string())?;
        }
        Ok(())
    }

    /// Takes this process back to where it came from. Safe to repeat.
    pub(crate) fn leave(&self) {
        for (tree, home) in self.trees.all.iter().zip(&self.home) {
            let now = tree.of_this_process();
            let inside = |path: &Path| path == self.pod || Some(path) == self.overhead.as_deref();
            if !now.is_ok_and(|now| inside(&now)) {
                continue;
            }
            // Where that is gone, the root always takes a process.
            let places = [tree.root.join(home), tree.root.clone()];
            let pid = std::process::id().to_string();
            let left = places.iter().any(|place| write(&place.join("cgroup.procs"), &pid).is_ok());
            if !left {
                tracing::warn!(cgroup = %tree.root.join(&self.pod).display(), "the owner cannot leave the pod's cgroup");
            }
        }
    }

    /// Whether virtual CPUs have a cgroup of their own.
    pub(crate) fn takes_vcpus(&self) -> bool {
        self.overhead.is_some()
    }

    /// Takes the threads that virtual CPUs run on to the pod's cgroup, as far as threads can be taken there.
    pub(crate) fn place_vcpus(&self, threads: &[u32]) -> Result<(), CgroupError> {
        for tree in &self.trees.all {
            let file = tree.root.join(&self.pod).join(tree.threads_file());
            for thread in threads.iter().filter(|_| tree.takes_threads()) {
                match write(&file, &thread.to_string()) {
                    // It has ended.
                    Err(CgroupError::File { source, .. }) if source.raw_os_error() == Some(libc::ESRCH) => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// The host's CPUs that the pod may run on.
    pub(crate) fn set_cpus(&self, cpus: &str) -> Result<(), CgroupError> {
        self.set("cpuset", "cpuset.cpus", cpus)
    }

    /// Has the pod run on whatever the cgroup above it may.
    pub(crate) fn inherit_cpus(&self) -> Result<(), CgroupError> {
        let Some(tree) = self.trees.of_controller("cpuset") else { return Ok(()) };
        for path in [Some(&self.pod), self.overhead.as_ref()].into_iter().flatten() {
            let cgroup = tree.root.join(path);
            let above = cgroup.parent().unwrap_or(&tree.root);
            write(&cgroup.join("cpuset.cpus"), &tree.inherited_cpus(above)?)?;
        }
        Ok(())
    }

    /// The host's memory nodes that the pod may have memory of.
    pub(crate) fn set_mems(&self, mems: &str) -> Result<(), CgroupError> {
        self.set("cpuset", "cpuset.mems", mems)
    }

    /// Writes to all of the pod's cgroups under a controller.
    fn set(&self, controller: &str, file: &str, value: &str) -> Result<(), CgroupError> {
        let Some(tree) = self.trees.of_controller(controller) else {
            tracing::warn!(controller, file, value, "the host has no such controller; not carried out");
            return Ok(());
        };
        for path in [Some(&self.pod), self.overhead.as_ref()].into_iter().flatten() {
            write(&tree.root.join(path).join(file), value)?;
        }
        Ok(())
    }

    /// The tightest limit of memory that holds for the pod, in bytes, and the cgroup that has it.
    pub(crate) fn memory_limit(&self) -> Option<(PathBuf, u64)> {
        let tree = self.trees.of_controller("memory")?;
        let limits = self.memory_home().ancestors().filter_map(|path| {
            let cgroup = tree.root.join(path);
            Some((tree.memory_limit(&cgroup)?, cgroup))
        });
        limits.min_by_key(|(bytes, _)| *bytes).map(|(bytes, cgroup)| (cgroup, bytes))
    }

    /// Where the pod's memory is counted.
    fn memory_home(&self) -> &Path {
        self.overhead.as_ref().unwrap_or(&self.pod)
    }

    /// Whether the kernel has killed something in the pod's cgroups for want of memory.
    pub(crate) fn oom(&self) -> Option<OomKill> {
        let tree = self.trees.of_controller("memory")?;
        let homes = [Some(&self.pod), self.overhead.as_ref()];
        let kills: u64 = homes.into_iter().flatten().map(|path| tree.oom_kills(&tree.root.join(path))).sum();
        (kills > 0).then(|| OomKill { limit: self.memory_limit() })
    }

    /// What kubelet's cgroup around the pod's tells; `None` where that is not kubelet's.
    pub(crate) fn of_kubelet(&self) -> Option<OfKubelet> {
        let parent = self.pod.parent()?;
        let name = parent.file_name()?.to_str()?;
        let root = self.pod.components().next()?.as_os_str().to_str()?;
        let pods = root.starts_with("kubepods") && (name.starts_with("pod") || name.contains("-pod"));
        if !pods {
            return None;
        }
        let memory = self.trees.of_controller("memory")?;
        let cpu = self.trees.of_controller("cpu")?;
        Some(OfKubelet {
            has_memory_limit: memory.memory_limit(&memory.root.join(parent)).is_some(),
            has_cpu_limit: cpu.has_cpu_limit(&cpu.root.join(parent)),
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Makes a cgroup and those above it that are not there. All of them go with the pod, unless somebody else is in them by then.
fn make_in_tree(tree: &Tree, path: &Path, record: &Record) -> Result<(), CgroupError> {
    let mut last = None;
    for _ in 0..TRIES {
        match try_make(tree, path, record) {
            // The last pod in one of those above has just gone, and took it along.
            Err(CgroupError::File { source, action, path }) if source.kind() == io::ErrorKind::NotFound => {
                last = Some(CgroupError::File { action, path, source });
            }
            other => return other,
        }
    }
    last.map_or(Ok(()), Err)
}

fn try_make(tree: &Tree, path: &Path, record: &Record) -> Result<(), CgroupError> {
    let mut all: Vec<&Path> = path.ancestors().filter(|path| !path.as_os_str().is_empty()).collect();
    all.reverse();
    for path in all {
        let cgroup = tree.root.join(path);
        let above = cgroup.parent().unwrap_or(&tree.root);
        tree.delegate(above);
        if !cgroup.is_dir() {
            record.cgroup(&cgroup)?;
            match fs::create_dir(&cgroup) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::file("make", &cgroup)(error));
                }
                _ => {}
            }
        }
        tree.inherit(above, &cgroup)?;
    }
    Ok(())
}

/// Without `O_CREAT`, which the file system answers with a misleading error.
fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    use std::io::Write;
    let written =
        fs::OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(value.as_bytes()));
    written.map_err(CgroupError::file(format!("write {value:?} to"), path))
}

#[cfg(test)]
mod tests;
