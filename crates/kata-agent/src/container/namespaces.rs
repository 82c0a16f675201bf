//! Namespaces that the containers of a pod share.
//!
//! They are the pod's and not the guest's own, so that what else runs in the guest keeps its host name and its IPC
//! objects to itself. The agent holds them open, and so they last until it lets go, with or without a container.
//!
//! | namespace | whose | joined by |
//! |---|---|---|
//! | UTS, IPC | made with the sandbox | every container that asks for one of its own |
//! | pid | that of the first container, which lasts as long as its init | those for which `sandbox_pidns` is said |

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use rustix::process::Pid;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::EngineError;

/// Host name, System V IPC with POSIX message queues, and processes.
#[derive(Debug)]
pub struct PodNamespaces {
    uts: OwnedFd,
    ipc: OwnedFd,
    pid: OnceLock<OwnedFd>,
}

impl PodNamespaces {
    /// New ones. The host name is that of the guest until a container with one of its own changes it.
    ///
    /// # Errors
    /// [`EngineError::Setup`]: no privilege, or no such namespaces in the kernel.
    pub fn new() -> Result<Self, EngineError> {
        // A thread is in the namespaces that it made, so this one is not used again.
        let made = std::thread::spawn(unshare).join();
        let failed = |error| EngineError::setup("make the namespaces of the pod", error);
        made.unwrap_or_else(|_| Err(std::io::Error::other("the thread that makes them ended")))
            .map_err(failed)
    }

    /// Lets the container of `spec` join: its own UTS and IPC namespaces, if it asks for such, become the pod's. Keep
    /// this value until the container is created.
    pub fn share_with(&self, spec: &mut Spec) {
        let namespaces = spec.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut());
        for namespace in namespaces.into_iter().flatten() {
            let held = match namespace.typ() {
                LinuxNamespaceType::Uts => &self.uts,
                LinuxNamespaceType::Ipc => &self.ipc,
                _ => continue,
            };
            namespace.set_path(Some(path(held).into()));
        }
    }

    /// Lets the container of `spec` join the pod's pid namespace. The first container to do so makes it.
    pub fn share_pids_with(&self, spec: &mut Spec) {
        let Some(linux) = spec.linux_mut() else { return };
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Pid);
        let mut pid = LinuxNamespace::default();
        pid.set_typ(LinuxNamespaceType::Pid).set_path(self.pid.get().map(|held| path(held).into()));
        namespaces.push(pid);
        linux.set_namespaces(Some(namespaces));
    }

    /// Makes the pid namespace of `init` the pod's, unless it has one. To be told of each container that was made.
    pub fn keep_pids_of(&self, init: Pid) {
        if self.pid.get().is_some() {
            return;
        }
        // An init that has ended has taken its namespace along.
        if let Ok(file) = File::open(format!("/proc/{}/ns/pid", init.as_raw_nonzero())) {
            let _ = self.pid.set(file.into());
        }
    }
}

fn path(held: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), held.as_raw_fd())
}

fn unshare() -> std::io::Result<PodNamespaces> {
    // SAFETY: file descriptor tables are not unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWUTS | UnshareFlags::NEWIPC) }?;
    let open = |name| File::open(format!("/proc/thread-self/ns/{name}")).map(OwnedFd::from);
    Ok(PodNamespaces { uts: open("uts")?, ipc: open("ipc")?, pid: OnceLock::new() })
}
