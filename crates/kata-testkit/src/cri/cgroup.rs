//! The cgroup that all pods of a test have in common, in each hierarchy that the host has.

use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// Removes the cgroup `name` everywhere, and answers what pods have left below it.
pub(super) fn clear(name: &str) -> Vec<PathBuf> {
    let mut left = Vec::new();
    let hierarchies = std::fs::read_dir(ROOT).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([ROOT.into()]) {
        let cgroup = hierarchy.join(name.trim_start_matches('/'));
        if cgroup.is_dir() {
            remove_below(&cgroup, &mut left);
            let _ = std::fs::remove_dir(&cgroup);
        }
    }
    left
}

fn remove_below(cgroup: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_below(&entry.path(), into);
            let _ = std::fs::remove_dir(entry.path());
            into.push(entry.path());
        }
    }
}
