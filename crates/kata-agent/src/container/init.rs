//! From the clone to the `execve`: what a container's process does to itself.
//!
//! The order is what security hangs on:
//!
//! ```text
//!  namespaces, root     everything that needs the guest's files
//!  terminal             in the container's devpts; its master goes to the agent
//!  streams, close all   no descriptor of the agent survives
//!  cwd, limits          as root
//!  bounding set, ids    capabilities kept, but not effective beyond the plan
//!  lookup               with the rights the command will have
//!  ── gate ──           a created container waits here
//!  startContainer       hooks of a created container, each under the two that follow
//!  seccomp              needs no_new_privs, or CAP_SYS_ADMIN that is regained for it
//!  capabilities         the final sets
//!  execve
//! ```

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Gid, Mode, OFlags, Uid, openat};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, ThreadNameSpaceType, UnshareFlags, capabilities, move_into_thread_name_spaces,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    unshare_unsafe,
};

use super::filesystem::last_errno;
use super::lookup;
use super::plan::{ContainerPlan, ProcessPlan, Rlimit, TerminalPlan, flag_of};
use super::restrictions::Restrictions;
use super::rootfs::{self, Prepared};
use super::seccomp::Filter;
use super::terminal::Terminal;
use super::tree::Tree;
use super::wire::{self, Answer, Failure};

/// Standard input, output and error of a process, unless it has a terminal.
pub(super) type Streams = [OwnedFd; 3];

/// Where the process comes to live.
pub(super) enum Place<'fd> {
    /// In namespaces that are new and have to be furnished; it waits at the gate.
    New { plan: Box<ContainerPlan>, prepared: Prepared, sysctls: Option<OwnedFd> },
    /// In those of a running container; the pidfd of the init whose cgroup namespace is still to be joined.
    Existing { cgroup_namespace: Option<BorrowedFd<'fd>> },
}

/// Becomes the container's process. Does not return; what fails is told to the agent.
pub(super) fn run(
    socket: &mut UnixStream,
    process: &ProcessPlan,
    filter: Option<&Filter>,
    streams: Streams,
    place: Place<'_>,
) -> ! {
    let Err(failure) = become_process(socket, process, filter, streams, place);
    // If the filter forbids this the agent sees the socket close and the process end.
    let _ = wire::answer(socket, &Answer::Failed(failure));
    // SAFETY: ends the process without running exit handlers that belong to the helper it was copied from.
    unsafe { libc::_exit(1) }
}

fn become_process(
    socket: &mut UnixStream,
    process: &ProcessPlan,
    filter: Option<&Filter>,
    streams: Streams,
    place: Place<'_>,
) -> Result<std::convert::Infallible, Failure> {
    rustix::process::setsid().map_err(|error| Failure::setup("make a session", error))?;
    leave_session_keyring()?;
    rustix::process::umask(Mode::empty());
    let hooks = match &place {
        Place::New { plan, .. } => Some(plan.hooks.clone()),
        Place::Existing { .. } => None,
    };
    let terminal = match place {
        Place::New { plan, prepared, sysctls } => furnish(&plan, prepared, sysctls, process.terminal)?,
        Place::Existing { cgroup_namespace } => settle(cgroup_namespace, process.terminal)?,
    };
    let slave = terminal.map(|terminal| hand_over(socket, terminal)).transpose()?;
    take_streams(socket, streams, slave, process.uid)?;
    let late_cwd = enter_cwd(&process.cwd)?;
    let env = environment(process);
    for limit in &process.rlimits {
        set_limit(*limit)?;
    }
    let permitted = change_identity(process)?;
    if late_cwd {
        rustix::process::chdir(&*process.cwd).map_err(|error| cwd_failure(&process.cwd, error))?;
        check_cwd(&process.cwd)?;
    }
    let command = process.args.first().map_or("", String::as_str);
    let program = lookup::find(command, &env)?;
    let call = Call::new(&program, &process.args, &env)?;
    let restrictions = Restrictions::new(process, filter, permitted);
    if let Some(hooks) = hooks {
        wait_at_gate(socket)?;
        hooks.run_before_command(&restrictions)?;
    }
    restrictions.put_on()?;
    let error = call.exec();
    Err(lookup::exec_failure(program, error))
}

/// New namespaces: names, network, root, kernel parameters. Gives the terminal asked for.
fn furnish(
    plan: &ContainerPlan,
    prepared: Prepared,
    sysctls: Option<OwnedFd>,
    terminal: Option<TerminalPlan>,
) -> Result<Option<Terminal>, Failure> {
    if plan.create & flag_of(libc::CLONE_NEWCGROUP) != 0 {
        // SAFETY: file descriptor tables are not unshared.
        let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWCGROUP) };
        unshared.map_err(|error| Failure::setup("make a cgroup namespace", error))?;
    }
    if plan.create & flag_of(libc::CLONE_NEWNET) != 0 {
        raise_loopback().map_err(|error| Failure::setup("raise the loopback device", error))?;
    }
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name.as_bytes())
            .map_err(|error| Failure::setup("set the hostname", error))?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name.as_bytes())
            .map_err(|error| Failure::setup("set the domainname", error))?;
    }
    let terminal = rootfs::enter(plan, prepared, terminal)?;
    let Some(parameters) = sysctls else { return Ok(terminal) };
    for (path, value) in &plan.sysctls {
        let written = openat(&parameters, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::io::write(&file, value.as_bytes()));
        written.map_err(|error| {
            Failure::setup(format!("write {value:?} to /proc/sys/{}", path.display()), error)
        })?;
    }
    Ok(terminal)
}

/// Namespaces of others: the one that only the process itself can enter. Gives the terminal asked for.
fn settle(
    cgroup_namespace: Option<BorrowedFd<'_>>,
    terminal: Option<TerminalPlan>,
) -> Result<Option<Terminal>, Failure> {
    if let Some(init) = cgroup_namespace {
        move_into_thread_name_spaces(init, ThreadNameSpaceType::CONTROL_GROUP)
            .map_err(|error| Failure::setup("enter the cgroup namespace of the container", error))?;
    }
    let Some(terminal) = terminal else { return Ok(None) };
    let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Failure::setup("open the root of the container", error))?;
    Terminal::open(&Tree::new(root), terminal).map(Some)
}

/// The agent gets the master, and nobody in the container.
fn hand_over(socket: &UnixStream, terminal: Terminal) -> Result<OwnedFd, Failure> {
    let Terminal { master, slave } = terminal;
    let sent = wire::answer(socket, &Answer::Terminal(master));
    sent.map_err(|error| Failure::setup("hand the terminal to the agent", error))?;
    Ok(slave)
}

/// A network namespace starts with its loopback device down.
fn raise_loopback() -> Result<(), Errno> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: `ifreq` is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
        *to = libc::c_char::try_from(from).unwrap_or_default();
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    // SAFETY: SIOCSIFFLAGS reads an `ifreq`, which `request` is for the length of the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

/// The number the control socket moves to; it closes on `execve`.
const SOCKET: i32 = 3;

/// Puts the streams, or the terminal, on 0, 1 and 2, the control socket on 3, and closes everything else.
fn take_streams(
    socket: &mut UnixStream,
    streams: Streams,
    terminal: Option<OwnedFd>,
    uid: u32,
) -> Result<(), Failure> {
    let failed = |error| Failure::setup("set up the standard streams", error);
    let [stdin, stdout, stderr] = streams.each_ref().map(|stream| terminal.as_ref().unwrap_or(stream));
    rustix::stdio::dup2_stdin(stdin).map_err(failed)?;
    rustix::stdio::dup2_stdout(stdout).map_err(failed)?;
    rustix::stdio::dup2_stderr(stderr).map_err(failed)?;
    let controlled = terminal.is_some();
    // They are closed with all others below, while the socket's place may be one of theirs.
    for fd in streams.into_iter().chain(terminal) {
        std::mem::forget(fd);
    }
    move_socket(socket).map_err(failed)?;
    // SAFETY: no descriptor above the socket is used from here on: the process ends in execve or _exit.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, SOCKET + 1, u32::MAX, 0) };
    if closed != 0 {
        return Err(failed(last_errno()));
    }
    if controlled {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())
            .map_err(|error| Failure::setup("take the controlling terminal", error))?;
    }
    own_streams(uid);
    Ok(())
}

fn move_socket(socket: &mut UnixStream) -> Result<(), Errno> {
    if socket.as_raw_fd() == SOCKET {
        return Ok(());
    }
    // SAFETY: whatever is at this number is not used any more (see `take_streams`).
    let moved = unsafe { libc::dup3(socket.as_raw_fd(), SOCKET, libc::O_CLOEXEC) };
    if moved != SOCKET {
        return Err(last_errno());
    }
    // SAFETY: dup3 has just made this descriptor, and nothing else owns it.
    let moved = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(SOCKET) };
    // The old number is closed by close_range; closing it here would be the same.
    *socket = UnixStream::from(moved);
    Ok(())
}

/// Lets a process that is not root open its own `/dev/stdout`. Best effort: some descriptors have no owner to change.
/// The group stays: a terminal has the one that devpts is mounted with.
fn own_streams(uid: u32) {
    if uid == 0 {
        return;
    }
    let streams: [BorrowedFd<'static>; 3] =
        [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    for stream in streams {
        let Ok(stat) = rustix::fs::fstat(stream) else { continue };
        let null = rustix::fs::makedev(1, 3);
        if stat.st_uid != uid && stat.st_rdev != null {
            let _ = rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), None);
        }
    }
}

/// Enters `cwd`, which is made if missing. True if only the process's own user may enter it.
fn enter_cwd(cwd: &str) -> Result<bool, Failure> {
    let failed = |error| cwd_failure(cwd, error);
    match rustix::process::chdir(cwd) {
        Ok(()) => {}
        Err(Errno::ACCESS) => return Ok(true),
        Err(Errno::NOENT) => {
            let made = std::fs::create_dir_all(cwd);
            made.map_err(|error| Failure::setup(format!("make the working directory {cwd}"), error))?;
            rustix::process::chdir(cwd).map_err(failed)?;
        }
        Err(error) => return Err(failed(error)),
    }
    check_cwd(cwd)?;
    Ok(false)
}

fn cwd_failure(cwd: &str, error: Errno) -> Failure {
    Failure::setup(format!("enter the working directory {cwd}"), error)
}

/// A directory outside of the root (through a leaked descriptor) has no path.
fn check_cwd(cwd: &str) -> Result<(), Failure> {
    let path = rustix::process::getcwd(Vec::new()).map_err(|error| cwd_failure(cwd, error))?;
    if path.as_bytes().starts_with(b"/") {
        return Ok(());
    }
    Err(Failure::Invalid {
        key: "process.cwd".to_owned(),
        reason: format!("{cwd:?} is outside of the container"),
    })
}

/// The environment, with HOME by the container's own user list where it is not set.
fn environment(process: &ProcessPlan) -> Vec<String> {
    let mut env = process.env.clone();
    if !env.iter().any(|variable| variable.starts_with("HOME=")) {
        let home = read_passwd().and_then(|passwd| lookup::home(&passwd, process.uid));
        env.push(format!("HOME={}", home.as_deref().unwrap_or("/")));
    }
    env
}

/// A file of the container: only a regular one, and not more than is sensible.
fn read_passwd() -> Option<Vec<u8>> {
    const LONGEST: u64 = 1 << 20;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::open("/etc/passwd", flags, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text).ok()?;
    Some(text)
}

fn set_limit(limit: Rlimit) -> Result<(), Failure> {
    let value = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
    let none = std::ptr::null_mut::<libc::rlimit64>();
    // SAFETY: `value` is valid for the length of the call, and a null pointer asks for no old value.
    let result = unsafe { libc::syscall(libc::SYS_prlimit64, 0, limit.resource, &raw const value, none) };
    if result == 0 {
        return Ok(());
    }
    let Rlimit { resource, soft, hard } = limit;
    Err(Failure::setup(format!("set resource limit {resource} to {soft}:{hard}"), last_errno()))
}

/// Keys are not in any namespace: without a keyring of its own, a container would share the agent's.
fn leave_session_keyring() -> Result<(), Failure> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: no name is passed, so no memory is read; the new keyring is this process's alone.
    let keyring = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0) };
    let error = std::io::Error::last_os_error();
    // A kernel without keyrings has none to share.
    if keyring < 0 && error.raw_os_error() != Some(libc::ENOSYS) {
        return Err(Failure::setup("join a session keyring", error));
    }
    Ok(())
}

/// Changes to the process's user and groups, and keeps the capabilities that are needed later in reserve.
fn change_identity(process: &ProcessPlan) -> Result<CapabilitySet, Failure> {
    let failed = |what: &'static str| move |error: Errno| Failure::setup(what, error);
    process.capabilities.limit().map_err(failed("limit the capabilities"))?;
    set_keep_capabilities(true).map_err(failed("keep the capabilities"))?;
    let groups: Vec<Gid> = process.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups).map_err(failed("set the supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(process.uid), Gid::from_raw(process.gid));
    set_thread_res_gid(gid, gid, gid).map_err(failed("set the group"))?;
    set_thread_res_uid(uid, uid, uid).map_err(failed("set the user"))?;
    set_keep_capabilities(false).map_err(failed("keep the capabilities"))?;
    if process.no_new_privileges {
        set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    }
    rustix::process::umask(Mode::from_raw_mode(process.umask.unwrap_or(0o022)));
    let permitted = capabilities(None).map_err(failed("read the capabilities"))?.permitted;
    process.capabilities.act_as(permitted).map_err(failed("reduce the capabilities"))?;
    Ok(permitted)
}

/// Waits for the agent to open the gate. The agent letting go of it is the end.
fn wait_at_gate(socket: &mut UnixStream) -> Result<(), Failure> {
    let failed = |error| Failure::setup("wait for the start", error);
    wire::answer(socket, &Answer::Ready).map_err(failed)?;
    socket.read_exact(&mut [0]).map_err(failed)
}

/// The arguments of an `execve`, ready before the filter.
struct Call {
    program: CString,
    _strings: Vec<CString>,
    args: Vec<*const libc::c_char>,
    env: Vec<*const libc::c_char>,
}

impl Call {
    fn new(program: &Path, args: &[String], env: &[String]) -> Result<Self, Failure> {
        let text =
            |bytes: &[u8]| CString::new(bytes).map_err(|error| Failure::setup("pass the arguments", error));
        let program = text(PathBuf::from(program).as_os_str().as_encoded_bytes())?;
        let mut strings = Vec::with_capacity(args.len() + env.len());
        let mut pointers = |list: &[String]| -> Result<Vec<*const libc::c_char>, Failure> {
            let mut pointers = Vec::with_capacity(list.len() + 1);
            for one in list {
                let one = text(one.as_bytes())?;
                pointers.push(one.as_ptr());
                strings.push(one);
            }
            pointers.push(std::ptr::null());
            Ok(pointers)
        };
        let (args, env) = (pointers(args)?, pointers(env)?);
        Ok(Self { program, _strings: strings, args, env })
    }

    /// Returns only with the error.
    fn exec(&self) -> Errno {
        // SAFETY: both lists end with a null pointer and point to strings that `self` owns.
        unsafe { libc::execve(self.program.as_ptr(), self.args.as_ptr(), self.env.as_ptr()) };
        last_errno()
    }
}
