//! Who the process is, and what it may do.

use std::os::fd::OwnedFd;
use std::str::FromStr;

use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use super::{JailError, NO_USERNS, step};

/// Most threads and processes of its user: virtual processors, and one for each device.
const THREADS: u64 = 512;

/// A user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl FromStr for User {
    type Err = String;

    /// `1000:1000`
    fn from_str(text: &str) -> Result<Self, String> {
        let ids = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
        let (uid, gid) = ids.ok_or_else(|| format!("{text:?} is not UID:GID, two numbers"))?;
        // -1 means "as it is" to the kernel.
        match uid != u32::MAX && gid != u32::MAX {
            true => Ok(Self { uid, gid }),
            false => Err(format!("{text:?}: {} is nobody's number", u32::MAX)),
        }
    }
}

/// Becomes `user` with all its capabilities, which it needs for one more step.
pub(super) fn become_user(user: Option<User>) -> Result<(), JailError> {
    let Some(user) = user else { return Ok(()) };
    let fault = |errno| step("become its user", "; it needs CAP_SETUID and CAP_SETGID for that")(errno);
    rustix::thread::set_keep_capabilities(true).map_err(fault)?;
    rustix::thread::set_thread_groups(&[]).map_err(fault)?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(fault)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(fault)?;
    let kept = rustix::thread::capabilities(None).map_err(fault)?.permitted;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
    .map_err(fault)
}

/// [`user_namespace`] of a process that has its `/proc` still.
pub(super) fn own_user_namespace() -> Result<(), JailError> {
    let directory = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    let proc =
        rustix::fs::open("/proc/self", directory, Mode::empty()).map_err(step("open /proc/self", ""))?;
    user_namespace(&proc)
}

/// A user namespace that knows this user and this group and nobody else. `proc` is `/proc/self`.
pub(super) fn user_namespace(proc: &OwnedFd) -> Result<(), JailError> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    // SAFETY: nothing is shared with other threads by a user namespace.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
        .map_err(step("make a user namespace", NO_USERNS))?;
    // After a change of the user its own /proc belongs to root, until it can be looked into again.
    set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(step("open its own /proc to itself", ""))?;
    let write = |name: &str, text: &str| {
        let file = rustix::fs::openat(proc, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, text.as_bytes()).map(drop)
    };
    let maps = [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{uid} {uid} 1")),
        ("gid_map", format!("{gid} {gid} 1")),
    ];
    for (name, text) in &maps {
        write(name, text).map_err(step("say who is who in its user namespace", NO_USERNS))?;
    }
    Ok(())
}

/// Limits that a process without capabilities cannot raise again.
pub(super) fn limit() -> Result<(), JailError> {
    let exactly = |limit| Rlimit { current: Some(limit), maximum: Some(limit) };
    // Guest memory must not end up in a core file.
    setrlimit(Resource::Core, exactly(0)).map_err(step("do without core files", ""))?;
    setrlimit(Resource::Nproc, exactly(THREADS)).map_err(step("limit its threads", ""))?;
    let files = rustix::process::getrlimit(Resource::Nofile);
    let soft = Rlimit { maximum: files.current, ..files };
    setrlimit(Resource::Nofile, soft).map_err(step("limit its open files", ""))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("close its memory to others", ""))
}

/// Gives up all capabilities, and every way to get one.
pub(super) fn give_up() -> Result<(), JailError> {
    let fault = |errno| step("give up its capabilities", "")(errno);
    for number in 0..64_u32 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first that the kernel does not know.
            Err(rustix::io::Errno::INVAL) => break,
            Err(errno) => return Err(fault(errno)),
        }
    }
    rustix::thread::clear_ambient_capability_set().map_err(fault)?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )
    .map_err(fault)?;
    rustix::thread::set_no_new_privs(true).map_err(step("do without new privileges", ""))
}
