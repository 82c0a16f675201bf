//! The namespaces that the server lives in.
//!
//! Everything that needs the host's privileges is done first (mounts, the pivot); the user namespace comes last,
//! so the mount namespace stays owned by the host's: the server could not mount or unmount anything even with all
//! of its own capabilities. The parent stays outside to write the identity map and to report the server's end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use thiserror::Error;

/// What serving files as any user needs, and no more.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// All ids but the last, which stands for "none".
const IDENTITY_MAP: &str = "0 0 4294967295\n";

/// Which step of making the sandbox failed.
#[derive(Debug, Error)]
pub enum SandboxError {
    #[error("{step}")]
    Step {
        step: &'static str,
        #[source]
        source: rustix::io::Errno,
    },
    #[error("{step} {}", path.display())]
    Path {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the half outside the sandbox went away")]
    Abandoned,
}

/// On which side of the sandbox's wall this process is.
pub enum Side {
    /// The parent: the server has ended with this status.
    Outside(ExitCode),
    /// The server.
    Inside(ProcFiles),
}

/// What the server needs of its own `/proc`, opened before that goes out of reach.
pub struct ProcFiles {
    /// `/proc/self/fd`, a directory that names only the server's descriptors.
    pub fds: File,
    /// `/proc/self/mountinfo`.
    pub mountinfo: File,
}

/// Splits the process in two and puts one half into the sandbox with `root` as its only files.
///
/// Must be called while the process has one thread.
pub fn enter(root: &Path) -> Result<Side, SandboxError> {
    let (inside, outside) = std::os::unix::net::UnixStream::pair().map_err(|source| SandboxError::Path {
        step: "make a socket pair for",
        path: root.to_owned(),
        source,
    })?;
    // SAFETY: the process has one thread, so no lock is held and no state is torn; namespaces are the new ones'.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }
        .map_err(step("unshare the pid namespace"))?;
    // SAFETY: single-threaded as above; the child goes on as an ordinary process.
    let forked = unsafe { libc::fork() };
    match Pid::from_raw(forked) {
        None if forked == 0 => {
            drop(outside);
            inside_half(root, inside).map(Side::Inside)
        }
        Some(child) => {
            drop(inside);
            outside_half(child, outside).map(Side::Outside)
        }
        None => Err(SandboxError::Step {
            step: "fork",
            source: rustix::io::Errno::from_io_error(&std::io::Error::last_os_error())
                .unwrap_or(rustix::io::Errno::AGAIN),
        }),
    }
}

fn step(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> SandboxError {
    move |source| SandboxError::Step { step, source }
}

fn outside_half(child: Pid, mut link: std::os::unix::net::UnixStream) -> Result<ExitCode, SandboxError> {
    let mut byte = [0];
    // An end of file here is a child that failed and has said why itself.
    if link.read_exact(&mut byte).is_ok() {
        for map in ["uid_map", "gid_map"] {
            let path = PathBuf::from(format!("/proc/{}/{map}", child.as_raw_nonzero()));
            std::fs::write(&path, IDENTITY_MAP).map_err(|source| SandboxError::Path {
                step: "write",
                path,
                source,
            })?;
        }
        let _ = link.write_all(&byte);
    }
    drop(link);
    set_capabilities(CapabilitySet::empty())?;
    let status = loop {
        match rustix::process::waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) => break status,
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(source) => return Err(SandboxError::Step { step: "wait for the server", source }),
        }
    };
    if let Some(signal) = status.terminating_signal() {
        tracing::error!(signal, "the server was killed");
    }
    Ok(if status.exit_status() == Some(0) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn inside_half(root: &Path, mut link: std::os::unix::net::UnixStream) -> Result<ProcFiles, SandboxError> {
    die_with_parent()?;
    // SAFETY: this process was just forked and has one thread.
    unsafe {
        rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC)
    }
    .map_err(step("unshare the mount, net and ipc namespaces"))?;
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)
        .map_err(step("make mounts follow the host's, one way"))?;
    let proc = mount_proc()?;
    pivot(root)?;

    // SAFETY: single-threaded as above.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
        .map_err(step("unshare the user namespace"))?;
    let mut byte = [1];
    link.write_all(&byte).map_err(|_| SandboxError::Abandoned)?;
    link.read_exact(&mut byte).map_err(|_| SandboxError::Abandoned)?;
    // Entering the namespace may have cleared it.
    die_with_parent()?;
    Ok(proc)
}

/// The server has no purpose once the process that its owner knows is gone.
fn die_with_parent() -> Result<(), SandboxError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("tie the two halves"))
}

/// A `/proc` of the new pid namespace, so that the descriptors kept of it lead to nobody else.
fn mount_proc() -> Result<ProcFiles, SandboxError> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("proc", "/proc", "proc", flags, None).map_err(step("mount /proc"))?;
    let open = |path: &str, flags: OFlags| {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
    };
    Ok(ProcFiles {
        fds: open("/proc/self/fd", OFlags::PATH).map_err(step("open /proc/self/fd"))?,
        mountinfo: open("/proc/self/mountinfo", OFlags::RDONLY).map_err(step("open /proc/self/mountinfo"))?,
    })
}

/// Makes `root` the file system root and drops the old one.
fn pivot(root: &Path) -> Result<(), SandboxError> {
    let at = |step: &'static str| {
        let path = root.to_owned();
        move |source: rustix::io::Errno| SandboxError::Path { step, path, source: source.into() }
    };
    let directory = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let old: OwnedFd = rustix::fs::open("/", directory, Mode::empty()).map_err(step("open the old root"))?;
    rustix::mount::mount_bind_recursive(root, root).map_err(at("bind"))?;
    let new: OwnedFd = rustix::fs::open(root, directory, Mode::empty()).map_err(at("open"))?;
    rustix::process::fchdir(new.as_fd()).map_err(at("enter"))?;
    rustix::process::pivot_root(".", ".").map_err(at("pivot to"))?;
    rustix::process::fchdir(old.as_fd()).map_err(step("return to the old root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(step("drop the old root"))?;
    rustix::process::chdir("/").map_err(step("enter the new root"))
}

/// Keeps [`CAPABILITIES`], forgets the rest for good.
pub fn drop_capabilities() -> Result<(), SandboxError> {
    for capability in CapabilitySet::all().difference(CAPABILITIES).iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // A capability newer than this kernel.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(source) => return Err(SandboxError::Step { step: "shrink the bounding set", source }),
        }
    }
    set_capabilities(CAPABILITIES)?;
    rustix::thread::set_no_new_privs(true).map_err(step("give up new privileges"))
}

fn set_capabilities(set: CapabilitySet) -> Result<(), SandboxError> {
    let sets = CapabilitySets { effective: set, permitted: set, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(step("drop capabilities"))
}
