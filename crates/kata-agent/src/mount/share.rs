//! What the host mounts below the share, held in the agent's own mount namespace.
//!
//! To the guest each of these is a file system of its own, mounted when somebody first looks into it. Were that only the
//! container, its last process would take the file system down on its way out, with the answers to its closed files still
//! due. Linux does not wait for those (seen in 6.1: "Busy inodes after unmount", and a process that never ends). So the
//! agent looks first, and lets go when the container is gone and the daemon has answered everything.
//!
//! Containers that use the same volume share one mount of it, and with it one set of inodes: sockets, locks and mapped
//! pages are the same for all of them. The last one lets go.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, openat, statfs, statx};
use rustix::mount::{UnmountFlags, unmount};

use super::places::Places;

/// The mounts that are held, each with the number of its holders.
#[derive(Debug, Default)]
pub struct Held(Places<usize>);

impl Held {
    /// Mounts what a container of `spec` uses below `share`, and gives what is mounted there, for
    /// [`release`](Self::release). May wait for the host, but for no mount of other containers.
    pub fn hold(&self, spec: &Spec, share: &Path) -> Vec<PathBuf> {
        let root = spec.root().as_ref().map(|root| root.path().clone());
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().clone());
        let inside = |path: &PathBuf| path.starts_with(share) && path != share;
        root.into_iter().chain(sources).filter(inside).filter(|path| self.hold_one(path)).collect()
    }

    fn hold_one(&self, path: &Path) -> bool {
        // From before the look until after the count: the mount must not go between them.
        let mut holders = self.0.lock_blocking(path);
        let mounted = is_mounted(path);
        if mounted {
            *holders = Some(holders.unwrap_or_default() + 1);
        }
        mounted
    }

    /// Lets go of what [`hold`](Self::hold) gave, the last first. May wait for the host, as that does.
    pub fn release(&self, held: &[PathBuf]) {
        for path in held.iter().rev() {
            let mut holders = self.0.lock_blocking(path);
            match *holders {
                Some(others) if others > 1 => *holders = Some(others - 1),
                Some(_) => {
                    let_go(path);
                    *holders = None;
                }
                None => {}
            }
        }
    }
}

fn let_go(path: &Path) {
    // An answer to this comes after those to all that was asked before. A daemon that is gone answers none of them.
    let _ = statfs(path);
    if let Err(error) = unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
        tracing::debug!(path = %path.display(), %error, "a mount of the share is gone already");
    }
}

/// Whether a directory is the root of a mount, which is made by looking. What cannot be looked into, the container will be
/// told about.
fn is_mounted(path: &Path) -> bool {
    // Only what wants a directory, or the file itself, goes through to the mount.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(dir) = openat(CWD, path, flags, Mode::empty()) else { return false };
    let found = statx(&dir, "", AtFlags::EMPTY_PATH, StatxFlags::empty());
    found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{MountBuilder, RootBuilder, SpecBuilder};
    use rustix::mount::{MountFlags, mount};

    use super::*;
    use crate::mount::silent::SilentMount;

    #[test]
    fn mounts_below_the_share_are_held_until_released_and_nothing_else_is() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: mounts need root");
        }
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        let [root, volume, plain, outside] =
            ["share/c/rootfs", "share/c/mounts/0", "share/c/mounts/1", "outside"]
                .map(|name| dir.path().join(name));
        for place in [&root, &volume, &plain, &outside] {
            std::fs::create_dir_all(place).unwrap();
        }
        for place in [&root, &volume, &outside] {
            mount("none", place, "tmpfs", MountFlags::empty(), None).unwrap();
        }
        let bind = |source: &Path| {
            MountBuilder::default().destination("/x").typ("bind").source(source).build().unwrap()
        };
        let absent = share.join("c/mounts/2");
        let spec = SpecBuilder::default()
            .root(RootBuilder::default().path(root.clone()).build().unwrap())
            .mounts([&volume, &plain, &outside, &absent].map(|source| bind(source)).to_vec())
            .build()
            .unwrap();
        let all = Held::default();
        let held = all.hold(&spec, &share);
        assert_eq!(held, [root.clone(), volume.clone()]);
        // Another container of the pod has the same.
        assert_eq!(all.hold(&spec, &share), held);
        all.release(&held);
        assert!(is_mounted(&root) && is_mounted(&volume));
        all.release(&held);
        assert!(all.hold(&spec, &share).is_empty());
        // Once more does no harm.
        all.release(&held);
        assert!(is_mounted(&outside));
        let_go(&outside);
        assert!(all.0.paths().is_empty());
    }

    #[test]
    fn a_mount_that_does_not_answer_keeps_no_other_container_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        let [silent, volume] = ["a/rootfs", "b/rootfs"].map(|name| share.join(name));
        std::fs::create_dir_all(&volume).unwrap();
        let Some(server) = SilentMount::at(&share.join("a")) else { return };
        mount("none", &volume, "tmpfs", MountFlags::empty(), None).unwrap();
        let spec = |root: &Path| {
            let root = RootBuilder::default().path(root).build().unwrap();
            SpecBuilder::default().root(root).build().unwrap()
        };
        let all = std::sync::Arc::new(Held::default());
        let waits = {
            let (all, spec, share) = (std::sync::Arc::clone(&all), spec(&silent), share.clone());
            std::thread::spawn(move || all.hold(&spec, &share))
        };
        while all.0.is_free(&silent) {
            std::thread::yield_now();
        }
        let (done, ended) = std::sync::mpsc::channel();
        let others = {
            let spec = spec(&volume);
            std::thread::spawn(move || {
                let held = all.hold(&spec, &share);
                all.release(&held);
                let _ = done.send(held);
            })
        };
        let held = ended.recv_timeout(std::time::Duration::from_secs(20));
        // Its server goes: nobody waits for it any more.
        drop(server);
        assert!(waits.join().unwrap().is_empty());
        others.join().unwrap();
        assert_eq!(held, Ok(vec![volume]), "it waited for another's mount");
    }
}
