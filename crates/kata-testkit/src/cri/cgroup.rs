//! The cgroup that all pods of a test have in common, in each hierarchy that the host has.

use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// Makes the cgroup `name` in each hierarchy, as a kubelet does before it asks for a pod. Best effort: some hosts let nobody.
pub(super) fn make(name: &str) {
    for hierarchy in hierarchies() {
        let cgroup = hierarchy.join(name.trim_start_matches('/'));
        let _ = std::fs::create_dir(&cgroup);
        // Without, no process could join.
        for file in ["cpuset.mems", "cpuset.cpus"] {
            if let Ok(all) = std::fs::read(hierarchy.join(file)) {
                let _ = std::fs::write(cgroup.join(file), all);
            }
        }
    }
}

/// Roots of all hierarchies: of version 1 each controller's, of version 2 the one.
fn hierarchies() -> Vec<PathBuf> {
    let controllers = std::fs::read_dir(ROOT).into_iter().flatten().flatten().map(|entry| entry.path());
    let all = controllers.chain([ROOT.into()]);
    all.filter(|path| path.join("cgroup.procs").exists() && !path.is_symlink()).collect()
}

/// Cgroups below the cgroup `name`, in each hierarchy.
pub(super) fn below(name: &str) -> Vec<PathBuf> {
    let roots = hierarchies().into_iter().map(|hierarchy| hierarchy.join(name.trim_start_matches('/')));
    let children = roots.flat_map(|root| std::fs::read_dir(root).into_iter().flatten().flatten());
    children.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Removes the cgroup `name` everywhere, with what pods have left below it.
pub(super) fn clear(name: &str) {
    for hierarchy in hierarchies() {
        let cgroup = hierarchy.join(name.trim_start_matches('/'));
        if cgroup.is_dir() {
            remove_below(&cgroup);
            let _ = std::fs::remove_dir(&cgroup);
        }
    }
}

fn remove_below(cgroup: &Path) {
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_below(&entry.path());
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}
