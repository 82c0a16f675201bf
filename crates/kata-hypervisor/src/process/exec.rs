//! From a [`Spawn`] to a running program: fork, the steps in the child, exec.
//!
//! Everything that allocates happens before the fork. Between fork and exec the child makes system calls and nothing else,
//! because another thread of the parent may have held any lock at the moment of the fork.

use std::ffi::{CString, OsStr, c_char};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountPropagationFlags;
use rustix::net::SendFlags;
use rustix::process::{Gid, Pid, PidfdFlags, Resource, Rlimit, Uid, WaitOptions};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use thiserror::Error;

use super::identity;
use super::{Child, Record, RecordError, Spawn};

/// Why a child does not run.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// The program is not there.
    #[error("program {program:?} of process {name} cannot be opened", program = .program.display())]
    Program {
        /// The child.
        name: String,
        /// Its program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An argument or a variable holds a zero byte.
    #[error("process {name} cannot be given {text:?}: it holds a zero byte")]
    ZeroByte {
        /// The child.
        name: String,
        /// The argument.
        text: String,
    },
    /// A step of the preparation failed.
    #[error("process {name} could not be started: it failed to {step}")]
    Step {
        /// The child.
        name: String,
        /// What it failed to do.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program is there and does not run.
    #[error("process {name} could not be started: {program:?} cannot be executed", program = .program.display())]
    Exec {
        /// The child.
        name: String,
        /// Its program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The child could not be recorded, so it was not let run.
    #[error("process {name} was not started, because it could not be recorded")]
    Record {
        /// The child.
        name: String,
        /// Why.
        #[source]
        source: RecordError,
    },
    /// There is no tokio runtime to watch over it.
    #[error("process {name} was not started, because there is no runtime to watch over it")]
    NoRuntime {
        /// The child.
        name: String,
    },
}

/// The steps of the child, in their order. The number is what a failing child sends to its parent.
#[derive(Clone, Copy)]
enum Step {
    Session,
    Descriptors,
    Namespaces,
    Limits,
    Identity,
    Privileges,
    Exec,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Session,
        Self::Descriptors,
        Self::Namespaces,
        Self::Limits,
        Self::Identity,
        Self::Privileges,
        Self::Exec,
    ];

    fn describe(self) -> &'static str {
        match self {
            Self::Session => "leave the session",
            Self::Descriptors => "arrange its file descriptors",
            Self::Namespaces => "make its namespaces (needs CAP_SYS_ADMIN)",
            Self::Limits => "set its limits",
            Self::Identity => "change its user (needs CAP_SETUID and CAP_SETGID)",
            Self::Privileges => "give up privileges",
            Self::Exec => "execute its program",
        }
    }
}

/// Everything that the child needs, laid out so that it only makes system calls.
struct Plan {
    program: CString,
    program_fd: OwnedFd,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    /// What becomes descriptor 0, 1, 2, 3, …; every source is numbered above all targets.
    fds: Vec<OwnedFd>,
    parent: RawFd,
    sync: OwnedFd,
    unshare: UnshareFlags,
    /// The child is the first process of a new PID namespace, which can only be asked for when it is made.
    first: bool,
    identity: Option<Account>,
    open_files: u64,
}

struct Account {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

pub(super) fn spawn(spec: Spawn, record: &Record) -> Result<Child, SpawnError> {
    let name = spec.name.clone();
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(SpawnError::NoRuntime { name });
    }
    let program = spec.program.clone();
    let limit = spec.output_limit;
    let failed = |step| {
        let name = name.clone();
        move |source: io::Error| SpawnError::Step { name, step, source }
    };
    let strings = Strings::new(&spec)?;
    let program_fd =
        rustix::fs::open(&program, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
            SpawnError::Program { name: name.clone(), program: program.clone(), source: errno.into() }
        })?;
    let (ours, theirs) = UnixStream::pair().map_err(failed("make a socket pair"))?;
    let (output, output_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(io::Error::from)
        .map_err(failed("make a pipe"))?;
    let plan = Plan::new(spec, &strings, program_fd, output_end, &ours, theirs)
        .map_err(failed("prepare its file descriptors"))?;

    let pid = fork(&plan).map_err(failed("fork"))?;
    drop(plan);
    // Nobody else waits for our children, so the pid is the child's until it is reaped.
    let started = watch_over(pid, &name, &program, &ours, record).and_then(|pidfd| {
        Child::watch(name.clone(), pid.as_raw_nonzero().get().unsigned_abs(), pidfd, output, limit)
            .map_err(failed("be watched"))
    });
    if started.is_err() {
        drop(ours);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
    }
    started
}

/// Records the child, lets it go on and waits until its program runs.
fn watch_over(
    pid: Pid,
    name: &str,
    program: &Path,
    mut sync: &UnixStream,
    record: &Record,
) -> Result<OwnedFd, SpawnError> {
    let failed = |step| move |source| SpawnError::Step { name: name.to_owned(), step, source };
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(io::Error::from)
        .map_err(failed("get its pidfd"))?;
    let raw = pid.as_raw_nonzero().get().unsigned_abs();
    let start_time = identity::start_time(raw).map_err(failed("read its start time"))?;
    record
        .process(name, raw, start_time)
        .map_err(|source| SpawnError::Record { name: name.to_owned(), source })?;
    // A child that failed has closed its end; what it says about that is read below.
    let _ = rustix::net::send(sync, &[1], SendFlags::NOSIGNAL);
    let mut fault = [0_u8; 5];
    let Err(end) = sync.read_exact(&mut fault) else { return Err(fault_of(fault, name, program)) };
    match end.kind() {
        io::ErrorKind::UnexpectedEof => Ok(pidfd),
        _ => Err(failed("report its start")(end)),
    }
}

fn fault_of([step, errno @ ..]: [u8; 5], name: &str, program: &Path) -> SpawnError {
    let source = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
    match Step::ALL.get(usize::from(step)) {
        Some(Step::Exec) | None => {
            SpawnError::Exec { name: name.to_owned(), program: program.to_owned(), source }
        }
        Some(step) => SpawnError::Step { name: name.to_owned(), step: step.describe(), source },
    }
}

/// The strings that a [`Plan`] points into.
struct Strings {
    program: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Strings {
    fn new(spec: &Spawn) -> Result<Self, SpawnError> {
        let string = |text: &OsStr| {
            CString::new(text.as_bytes()).map_err(|_| SpawnError::ZeroByte {
                name: spec.name.clone(),
                text: text.to_string_lossy().into_owned(),
            })
        };
        let args =
            std::iter::once(spec.program.as_os_str()).chain(spec.args.iter().map(|arg| arg.as_os_str()));
        let env = spec.env.iter().map(|(key, value)| {
            let mut variable = key.clone();
            variable.push("=");
            variable.push(value);
            string(&variable)
        });
        Ok(Self {
            program: string(spec.program.as_os_str())?,
            args: args.map(string).collect::<Result<_, _>>()?,
            env: env.collect::<Result<_, _>>()?,
        })
    }
}

impl Plan {
    fn new(
        spec: Spawn,
        strings: &Strings,
        program_fd: OwnedFd,
        output: OwnedFd,
        parent: &UnixStream,
        sync: UnixStream,
    ) -> io::Result<Self> {
        let above = spec.next_fd();
        let raise = |fd: OwnedFd| rustix::io::fcntl_dupfd_cloexec(&fd, above).map_err(io::Error::from);
        let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut fds = vec![raise(null)?, raise(output.try_clone()?)?, raise(output)?];
        for fd in spec.inherit {
            fds.push(raise(fd)?);
        }
        let mut unshare = UnshareFlags::empty();
        unshare.set(UnshareFlags::NEWNS, spec.namespaces.mount);
        unshare.set(UnshareFlags::NEWIPC, spec.namespaces.ipc);
        unshare.set(UnshareFlags::NEWNET, spec.namespaces.network);
        let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
        Ok(Self {
            program: strings.program.clone(),
            program_fd: raise(program_fd)?,
            argv: pointers(&strings.args),
            envp: pointers(&strings.env),
            fds,
            parent: parent.as_raw_fd(),
            sync: raise(sync.into())?,
            unshare,
            first: spec.namespaces.pid,
            identity: spec.identity.map(|identity| Account {
                uid: Uid::from_raw(identity.uid),
                gid: Gid::from_raw(identity.gid),
                groups: identity.groups.into_iter().map(Gid::from_raw).collect(),
            }),
            open_files: hard.map_or(spec.open_files, |hard| hard.min(spec.open_files)),
        })
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
}

/// Forks with all signals blocked, so that no handler of the parent's ever runs in the child.
fn fork(plan: &Plan) -> io::Result<Pid> {
    // SAFETY: an all-zero sigset_t is a valid value.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    let mut before = all;
    // SAFETY: `all` is a valid signal set.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: both sets are valid; only this thread's mask changes.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    let pid = match plan.first {
        false => {
            // SAFETY: the child makes system calls only, see `child`, and never returns.
            unsafe { libc::fork() }
        }
        true => fork_into_namespace(),
    };
    if pid == 0 {
        child(plan);
    }
    let error = io::Error::last_os_error();
    // SAFETY: as above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    Pid::from_raw(pid).filter(|_| pid > 0).ok_or(error)
}

/// fork with a flag that libc's function does not have. Without a stack, memory or places for ids the order of the system call's
/// arguments, which differs between architectures, makes no difference.
fn fork_into_namespace() -> libc::pid_t {
    let flags = libc::c_long::from(libc::CLONE_NEWPID | libc::SIGCHLD);
    let none: libc::c_long = 0;
    // SAFETY: without CLONE_VM the child has memory of its own; it makes system calls only, see `child`, and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    libc::pid_t::try_from(pid).unwrap_or(-1)
}

/// The child's whole life before its program.
fn child(plan: &Plan) -> ! {
    let (step, errno) = match prepare(plan) {
        Ok(()) => (Step::Exec, exec(plan)),
        Err(fault) => fault,
    };
    let [a, b, c, d] = errno.raw_os_error().to_ne_bytes();
    let _ = rustix::io::write(&plan.sync, &[u8::try_from(step as i32).unwrap_or(u8::MAX), a, b, c, d]);
    // SAFETY: ends the process at once, without handlers of the parent's.
    unsafe { libc::_exit(127) }
}

fn prepare(plan: &Plan) -> Result<(), (Step, Errno)> {
    let at = |step| move |errno| (step, errno);
    default_signals();
    // SAFETY: the descriptor is the parent's end, which nothing in the child uses. While it is open here, the death of the
    // parent could not be seen.
    unsafe { libc::close(plan.parent) };
    rustix::process::setsid().map_err(at(Step::Session))?;
    namespaces(plan.unshare).map_err(at(Step::Namespaces))?;
    limits(plan.open_files).map_err(at(Step::Limits))?;
    if let Some(account) = &plan.identity {
        become_account(account).map_err(at(Step::Identity))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(at(Step::Privileges))?;
    wait_for_parent(plan).map_err(at(Step::Session))?;
    descriptors(plan).map_err(at(Step::Descriptors))
}

/// Ignored and blocked signals would stay so in the program.
fn default_signals() {
    // The kernel's own structure, all zero: the default action, no flags, nothing blocked. The plain system call, because
    // libc keeps two of the real-time signals to itself.
    let default = [0_u64; 4];
    let nothing: *const u64 = std::ptr::null();
    for signal in 1..=64 {
        // SAFETY: the structure is at most four words long on every architecture. For SIGKILL and SIGSTOP the call fails,
        // which is fine.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), nothing, size_of::<u64>()) };
    }
    // SAFETY: an all-zero sigset_t is a valid, empty set.
    let none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) };
}

fn namespaces(flags: UnshareFlags) -> Result<(), Errno> {
    if flags.is_empty() {
        return Ok(());
    }
    // SAFETY: the flags never include CLONE_FILES, so no descriptor table changes hands.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    if flags.contains(UnshareFlags::NEWNS) {
        rustix::mount::mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)?;
    }
    Ok(())
}

fn limits(open_files: u64) -> Result<(), Errno> {
    let exactly = |limit| Rlimit { current: Some(limit), maximum: Some(limit) };
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    rustix::process::setrlimit(Resource::Nofile, exactly(open_files))?;
    // Guest memory must not end up in a core file.
    rustix::process::setrlimit(Resource::Core, exactly(0))
}

/// The bounding set goes first, while there is still the capability to change it. These are the plain system calls: libc's own
/// functions would try to reach the parent's other threads.
fn become_account(account: &Account) -> Result<(), Errno> {
    let root = account.uid.is_root();
    if !root && rustix::process::geteuid().is_root() {
        drop_bounding_set()?;
    }
    if rustix::process::geteuid().is_root() {
        rustix::thread::set_thread_groups(&account.groups)?;
    }
    rustix::thread::set_thread_res_gid(account.gid, account.gid, account.gid)?;
    rustix::thread::set_thread_res_uid(account.uid, account.uid, account.uid)?;
    if !root {
        let none = CapabilitySet::empty();
        rustix::thread::set_capabilities(
            None,
            CapabilitySets { effective: none, permitted: none, inheritable: none },
        )?;
    }
    Ok(())
}

fn drop_bounding_set() -> Result<(), Errno> {
    for capability in 0..64_u64 {
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0_u64, 0_u64, 0_u64) } != 0 {
            let errno = last_errno();
            // The first number that the kernel does not know.
            return if errno == Errno::INVAL { Ok(()) } else { Err(errno) };
        }
    }
    Ok(())
}

/// The parent lets the child go on once it has recorded it. A parent that died meanwhile never will.
fn wait_for_parent(plan: &Plan) -> Result<(), Errno> {
    let mut go = [0];
    match rustix::io::retry_on_intr(|| rustix::io::read(&plan.sync, &mut go))? {
        0 => Err(Errno::OWNERDEAD),
        _ => Ok(()),
    }
}

/// Everything from 0 up gets its place, everything else is closed by exec.
fn descriptors(plan: &Plan) -> Result<(), Errno> {
    let mut target: RawFd = 0;
    for fd in &plan.fds {
        // SAFETY: dup2 onto numbers below every descriptor that the plan still uses; the child owns its whole table.
        if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
            return Err(last_errno());
        }
        target += 1;
    }
    let first = u32::try_from(target).unwrap_or(0);
    // SAFETY: only marks descriptors of this process to be closed by exec.
    if unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } != 0 {
        return Err(last_errno());
    }
    Ok(())
}

/// Without allocating: the error is a number.
fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Returns only where it fails. The descriptor serves where the new identity may not walk the path to the program.
fn exec(plan: &Plan) -> Errno {
    // SAFETY: argv and envp are null-terminated arrays of C strings that outlive the call.
    unsafe { libc::execve(plan.program.as_ptr(), plan.argv.as_ptr(), plan.envp.as_ptr()) };
    let errno = last_errno();
    if errno != Errno::ACCESS {
        return errno;
    }
    // SAFETY: as above; the empty path with AT_EMPTY_PATH means the descriptor itself.
    unsafe {
        libc::execveat(
            plan.program_fd.as_raw_fd(),
            c"".as_ptr(),
            plan.argv.as_ptr().cast(),
            plan.envp.as_ptr().cast(),
            libc::AT_EMPTY_PATH,
        )
    };
    last_errno()
}
