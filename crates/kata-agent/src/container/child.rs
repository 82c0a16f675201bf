//! The helper process: takes one request, makes the container's process as a child of the agent, and is gone.
//!
//! Helpers are forked from a template process that waits for work (see `template`). Both have one thread, so that a
//! child may allocate and call anything. Neither is dumpable, so that a container cannot reach the agent's executable
//! or memory through `/proc/<pid>` of a process that is about to be its own.

use std::io::Write;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::exit;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags, move_into_link_name_space,
    move_into_thread_name_spaces, unshare_unsafe,
};

use super::filesystem::{clone_mount, last_errno};
use super::init::{self, Place, Streams};
use super::plan::{ContainerPlan, MountSource, ProcessPlan, flag_of};
use super::rootfs::Prepared;
use super::seccomp::Filter;
use super::wire::{self, Answer, Attached, Failure, Request, Task};

const NEWCGROUP: u32 = flag_of(libc::CLONE_NEWCGROUP);
const NEWTIME: u32 = flag_of(libc::CLONE_NEWTIME);
const NEWUSER: u32 = flag_of(libc::CLONE_NEWUSER);

/// Runs the template process: its standard input is the socket that it gets others from, one for each helper. To be
/// called by `main` when `argv[0]` is [`HELPER_NAME`](super::HELPER_NAME), while the process has one thread only.
pub fn helper_main() -> ! {
    // Reported by exit status alone: without its socket the process has nobody to talk to.
    let Ok(requests) = requests() else { exit(1) };
    loop {
        match wire::receive_socket(requests.as_fd()) {
            Ok(Some(socket)) => fork_helper(socket),
            Ok(None) => exit(0),
            Err(_) => exit(1),
        }
    }
}

fn requests() -> rustix::io::Result<OwnedFd> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // Away from the numbers that will be a process's streams.
    rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
}

/// The helper is a child of the agent, too: only so can it make one.
fn fork_helper(mut socket: UnixStream) {
    match fork(0, None) {
        Ok(0) => {}
        Ok(_) => return,
        Err(failure) => {
            let _ = wire::answer(&socket, &Answer::Failed(failure));
            return;
        }
    }
    let told = match serve(&mut socket) {
        Ok(()) => Ok(()),
        Err(failure) => wire::answer(&socket, &Answer::Failed(failure)),
    };
    // SAFETY: ends the process without running exit handlers that belong to the one it was copied from.
    unsafe { libc::_exit(i32::from(told.is_err())) }
}

fn serve(socket: &mut UnixStream) -> Result<(), Failure> {
    let (request, filter, attached) =
        wire::receive_request(socket).map_err(|error| Failure::setup("read the request", error))?;
    if let Some(score) = request.process.oom_score_adj {
        // Before the process exists: it inherits the value, and may have no /proc of its own.
        let written = std::fs::OpenOptions::new()
            .write(true)
            .open("/proc/self/oom_score_adj")
            .and_then(|mut file| file.write_all(score.to_string().as_bytes()));
        written.map_err(|error| Failure::setup(format!("set oom_score_adj to {score}"), error))?;
    }
    let Request { process, task } = request;
    match task {
        Task::Create(plan) => create(socket, plan, &process, &attached),
        Task::Exec { namespaces } => {
            let filter = (!filter.is_empty()).then(|| Filter::from_bytes(filter));
            exec(socket, namespaces, &process, filter.as_ref(), &attached)
        }
    }
}

fn create(
    socket: &mut UnixStream,
    plan: Box<ContainerPlan>,
    process: &ProcessPlan,
    attached: &Attached<OwnedFd>,
) -> Result<(), Failure> {
    let filter = plan.seccomp.as_ref().map(Filter::compile).transpose()?;
    if let Some(filter) = &filter {
        let sent = wire::answer(socket, &Answer::Filter(filter.as_bytes().to_vec()));
        sent.map_err(|error| Failure::setup("hand the seccomp filter to the agent", error))?;
    }
    let prepared = prepare(&plan, attached)?;
    let sysctls = if plan.sysctls.is_empty() {
        None
    } else {
        let opened = openat(CWD, "/proc/sys", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        Some(opened.map_err(|error| Failure::setup("open /proc/sys", error))?)
    };
    for (kind, path) in &plan.join {
        join(*kind, path)?;
    }
    if plan.create & NEWTIME != 0 {
        // SAFETY: file descriptor tables are not unshared.
        let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWTIME) };
        unshared.map_err(|error| Failure::setup("make a time namespace", error))?;
    }
    let streams = streams(attached)?;
    // A cgroup namespace is rooted where its maker is, which is the right cgroup only after the clone.
    let flags = plan.create & !(NEWCGROUP | NEWTIME);
    let child = fork(flags, attached.cgroup.as_ref())?;
    if child == 0 {
        init::run(socket, process, filter.as_ref(), streams, Place::New { plan, prepared, sysctls });
    }
    wire::answer(socket, &Answer::Pid(child)).map_err(|error| Failure::setup("report the pid", error))
}

fn exec(
    socket: &mut UnixStream,
    namespaces: u32,
    process: &ProcessPlan,
    filter: Option<&Filter>,
    attached: &Attached<OwnedFd>,
) -> Result<(), Failure> {
    let init = attached.init.as_ref().ok_or_else(|| Failure::setup("exec", Errno::BADF))?;
    let streams = streams(attached)?;
    let now = ThreadNameSpaceType::from_bits_retain(namespaces & !(NEWCGROUP | NEWUSER));
    move_into_thread_name_spaces(init.as_fd(), now)
        .map_err(|error| Failure::setup(wire::ENTER_NAMESPACES, error))?;
    let child = fork(0, attached.cgroup.as_ref())?;
    if child == 0 {
        let cgroup_namespace = (namespaces & NEWCGROUP != 0).then_some(init.as_fd());
        init::run(socket, process, filter, streams, Place::Existing { cgroup_namespace });
    }
    wire::answer(socket, &Answer::Pid(child)).map_err(|error| Failure::setup("report the pid", error))
}

/// Copies mounts that only this mount namespace can copy.
fn prepare(plan: &ContainerPlan, attached: &Attached<OwnedFd>) -> Result<Prepared, Failure> {
    let mut prepared = Prepared::default();
    // Without a cgroup namespace a new mount would show the whole guest.
    if plan.create & NEWCGROUP == 0
        && let Some(cgroup) = &attached.cgroup
    {
        for _ in plan.mounts.iter().filter(|mount| mount.source == MountSource::Cgroup) {
            let copy = clone_mount(cgroup.as_fd(), "", false);
            prepared
                .cgroups
                .push(copy.map_err(|error| Failure::setup("copy the mount of the cgroup", error))?);
        }
    }
    Ok(prepared)
}

fn join(kind: u32, path: &std::path::Path) -> Result<(), Failure> {
    let failed = |error| Failure::setup(format!("join the namespace {}", path.display()), error);
    let namespace = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let kind = match kind.cast_signed() {
        libc::CLONE_NEWPID => LinkNameSpaceType::ProcessID,
        libc::CLONE_NEWNET => LinkNameSpaceType::Network,
        libc::CLONE_NEWIPC => LinkNameSpaceType::InterProcessCommunication,
        libc::CLONE_NEWUTS => LinkNameSpaceType::HostNameAndNISDomainName,
        _ => return Err(failed(Errno::INVAL)),
    };
    move_into_link_name_space(namespace.as_fd(), Some(kind)).map_err(failed)
}

/// The three streams of a process without a terminal; what was not given is the guest's null device, opened while its
/// `/dev` is at hand.
fn streams(attached: &Attached<OwnedFd>) -> Result<Streams, Failure> {
    let copy = |fd: &OwnedFd| fd.try_clone().map_err(|error| Failure::setup("copy a stream", error));
    let null = || {
        openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| Failure::setup("open /dev/null", error))
    };
    let one = |fd: &Option<OwnedFd>| fd.as_ref().map_or_else(null, copy);
    Ok([one(&attached.stdin)?, one(&attached.stdout)?, one(&attached.stderr)?])
}

/// Forks into new namespaces and the cgroup, as a sibling. Gives 0 in the child, else its pid here.
fn fork(namespaces: u32, cgroup: Option<&OwnedFd>) -> Result<i32, Failure> {
    // SAFETY: `clone_args` is plain data for which all zeroes is the default.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    // The exit signal stays zero: with CLONE_PARENT it is that of this process.
    arguments.flags = u64::from(namespaces | flag_of(libc::CLONE_PARENT));
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: `arguments` is valid for the size told. Without CLONE_VM the child has its own copy of memory, and this
    // process has one thread, so no lock is held by one that does not exist there.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    match i32::try_from(pid) {
        Ok(-1) | Err(_) => Err(match last_errno() {
            // Only a cgroup whose controllers are handed to children says this.
            Errno::BUSY if cgroup.is_some() => Failure::CgroupBusy,
            error => Failure::setup("make the process", error),
        }),
        Ok(pid) => Ok(pid),
    }
}

/// `linux/sched.h`; libc declares it too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
