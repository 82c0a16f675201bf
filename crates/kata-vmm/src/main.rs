//! `kata-vmm`: a virtual machine monitor, and its devices as back ends for others.

use std::error::Error;
use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use clap::{Args, Parser, Subcommand};
use kata_vmm::chain;
use kata_vmm::jail::{Jail, SOCKETS, User};
use kata_vmm::kvm::{End, Hypervisor};
use kata_vmm::log::Bounded;
use kata_vmm::machine::{Descriptors, Machine, Place, Vmm};
use kata_vmm::seccomp;
use kata_vmm::server::{self, Served};
use kata_vmm::snapshot::{self, Shape};
use kata_vmm::vhost_user;
use kata_vmm::vsock::{Vsock, VsockConfig};
use kata_vmm_api::{Descriptor, EndReason, KernelSpec, MachineSpec, MemorySpec, Start};
use thiserror::Error;
use tracing::level_filters::LevelFilter;

/// Virtual machines on KVM, and virtual devices for other VMMs.
#[derive(Parser)]
#[command(name = "kata-vmm", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a socket device to one vhost-user front end, until it closes the connection
    Vsock(VsockArgs),
    /// Run one virtual machine, as the client at the other end of a socket says
    Run(RunArgs),
    /// Boot a guest here and now, its console on the standard output and nothing confined: to try a kernel, and to measure
    Boot(BootArgs),
    /// Say whether a machine could start from a snapshot here, and what it would be
    Inspect(InspectArgs),
    /// Try whether a virtual machine could be confined here, and say what is missing
    Check(CheckArgs),
}

#[derive(Args)]
struct RunArgs {
    /// Connected unix socket of the client; the end of the connection ends the machine
    #[arg(long, value_name = "FD")]
    api_fd: RawFd,
    /// /dev/kvm, open for reading and writing
    #[arg(long, value_name = "FD")]
    kvm_fd: Option<RawFd>,
    /// Directory of the sockets that the guest's connections go to; nothing else of the host can be reached
    #[arg(long, value_name = "DIR")]
    sockets: Option<PathBuf>,
    /// Become this user
    #[arg(long, value_name = "UID:GID")]
    user: Option<User>,
    /// Without any confinement: a guest that breaks the monitor has the rights on the host that the monitor was started with
    #[arg(long, conflicts_with = "user")]
    no_jail: bool,
    /// Least level of the messages on stderr: error, warn, info, debug, trace or off
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LevelFilter,
}

#[derive(Args)]
struct BootArgs {
    /// ELF file with a PVH note, or bzImage
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "LINE", default_value = "console=ttyS0 reboot=t panic=-1")]
    append: String,
    /// Virtual CPUs
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    cpus: u32,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    memory: u64,
    /// No serial port: what the guest says is lost, and it boots faster
    #[arg(long)]
    no_console: bool,
}

#[derive(Args)]
struct InspectArgs {
    /// File with the state of processors and devices
    #[arg(long, value_name = "FILE")]
    state: PathBuf,
    /// File with the memory
    #[arg(long, value_name = "FILE")]
    memory: PathBuf,
    /// Read all of the memory and compare its checksum
    #[arg(long)]
    verify: bool,
}

#[derive(Args)]
struct CheckArgs {
    /// Try it as this user
    #[arg(long, value_name = "UID:GID")]
    user: Option<User>,
}

#[derive(Args)]
struct VsockArgs {
    /// Listening unix socket on which the vhost-user front end connects
    #[arg(long, value_name = "FD")]
    listen_fd: RawFd,
    /// Listening unix socket, bound to the hybrid path, on which clients reach the guest
    #[arg(long, value_name = "FD")]
    hybrid_fd: RawFd,
    /// Path of that socket; the guest reaches host port N at <PATH>_N
    #[arg(long, value_name = "PATH")]
    hybrid_path: PathBuf,
    /// Context id of the guest
    #[arg(long, value_name = "CID", default_value_t = 3)]
    guest_cid: u64,
    /// Least level of the messages on stderr: error, warn, info, debug, trace or off
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LevelFilter,
}

#[derive(Debug, Error)]
enum CommandError {
    #[error("--{flag} {fd}: not a descriptor this process may take")]
    Descriptor {
        flag: &'static str,
        fd: RawFd,
        #[source]
        source: std::io::Error,
    },
    #[error("--listen-fd and --hybrid-fd are the same descriptor, {0}")]
    SameDescriptor(RawFd),
    #[error("a virtual processor did what cannot be emulated, so the machine ended: {0}")]
    CpuFault(String),
    #[error("a device of the machine cannot go on, so the machine ended: {0}")]
    DeviceLost(String),
    #[error("{} cannot be opened", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{0}")]
    Fault(String),
    #[error("--listen-fd: the front end cannot be accepted")]
    Accept(#[source] std::io::Error),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Vsock(args) => {
            log(args.log_level);
            serve_vsock(args)
        }
        Command::Run(args) => {
            log(args.log_level);
            run(&args)
        }
        Command::Boot(args) => {
            log(LevelFilter::WARN);
            boot(&args)
        }
        Command::Inspect(args) => inspect(&args),
        Command::Check(args) => check(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kata-vmm: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn log(level: LevelFilter) {
    let log = tracing_subscriber::fmt().with_max_level(level).with_ansi(std::io::stderr().is_terminal());
    if level > LevelFilter::INFO {
        // Who looks for something wants all of it.
        log.with_writer(std::io::stderr).init();
    } else {
        log.with_writer(Mutex::new(Bounded::new(std::io::stderr()))).init();
    }
}

fn run(args: &RunArgs) -> Result<(), Box<dyn Error>> {
    let api = UnixStream::from(inherited("api-fd", args.api_fd)?);
    let kvm = args.kvm_fd.map(|fd| inherited("kvm-fd", fd)).transpose()?;
    raise_descriptor_limit();
    spare_memory();
    let mut sockets = args.sockets.clone();
    if args.no_jail {
        tracing::warn!("nothing confines this virtual machine monitor, as asked by --no-jail");
    } else {
        Jail { user: args.user, sockets: sockets.clone() }.enter()?;
        seccomp::confine_threads()?;
        sockets = sockets.map(|_| SOCKETS.into());
    }
    let served = server::serve(&api, &mut Vmm::new(kvm, sockets, !args.no_jail))?;
    match served {
        Served::Ended(EndReason::CpuFault, detail) => Err(CommandError::CpuFault(detail).into()),
        Served::Ended(EndReason::DeviceLost, detail) => Err(CommandError::DeviceLost(detail).into()),
        Served::Closed | Served::Shutdown | Served::Ended(..) => Ok(()),
    }
}

/// A machine of nothing but a kernel, until it ends.
fn boot(args: &BootArgs) -> Result<(), Box<dyn Error>> {
    let open = |path: &PathBuf| open(path).map(OwnedFd::from);
    let mut files = vec![open(&args.kernel)?];
    let mut named = |file: Option<OwnedFd>| {
        file.map(|file| {
            files.push(file);
            Descriptor(files.len() - 1)
        })
    };
    let initrd = named(args.initrd.as_ref().map(open).transpose()?);
    let console = named((!args.no_console).then(standard_output).transpose()?);
    let (size_mib, max_mib) = (args.memory, args.memory);
    let spec = MachineSpec {
        cpus: args.cpus,
        max_cpus: args.cpus,
        memory: MemorySpec { size_mib, max_mib, prealloc: false, hugepages: false, reporting: false },
        start: Start::Kernel(KernelSpec { kernel: Descriptor(0), initrd, command_line: args.append.clone() }),
        console,
        vsock: None,
        shared_fs: None,
        disks: Vec::new(),
        nics: Vec::new(),
        host_devices: Vec::new(),
    };
    let machine = Machine::new(&spec, Descriptors::new(files), Place { kvm: None, sockets: None })?;
    machine.resume()?;
    match machine.ending().wait() {
        End { reason: EndReason::Shutdown | EndReason::Reset, .. } => Ok(()),
        End { detail, .. } => Err(CommandError::Fault(detail).into()),
    }
}

/// The standard output once more. The port makes its descriptor non-blocking, which whoever else has this one must not notice: so
/// it is opened anew, where it is something that can be opened.
fn standard_output() -> std::io::Result<OwnedFd> {
    match File::options().append(true).open("/proc/self/fd/1") {
        Ok(file) => Ok(file.into()),
        Err(_) => std::io::stdout().as_fd().try_clone_to_owned(),
    }
}

fn open(path: &Path) -> Result<File, CommandError> {
    File::open(path).map_err(|source| CommandError::Open { path: path.to_owned(), source })
}

/// The same looks at a snapshot as when a machine starts from it, but for what that machine is to be made of, and what only KVM tells
/// once it is made: whether its clock's rate and each register can be had.
fn inspect(args: &InspectArgs) -> Result<(), Box<dyn Error>> {
    let state = snapshot::inspect(&mut open(&args.state)?, &open(&args.memory)?, args.verify)?;
    state.fits(&Hypervisor::processor_of(Hypervisor::open()?)?)?;
    let Shape { cpus, size_mib, .. } = state.shape;
    println!(
        "{cpus} virtual CPUs, {size_mib} MiB of memory, {} MiB of it in the file",
        state.memory.bytes >> 20
    );
    Ok(())
}

/// The jail, entered by a process that does nothing else.
fn check(args: &CheckArgs) -> Result<(), Box<dyn Error>> {
    Jail { user: args.user, sockets: None }.confine()?;
    seccomp::confine_threads()?;
    println!("a virtual machine monitor can be confined here");
    Ok(())
}

fn serve_vsock(args: VsockArgs) -> Result<(), Box<dyn Error>> {
    if args.listen_fd == args.hybrid_fd {
        return Err(CommandError::SameDescriptor(args.listen_fd).into());
    }
    let front_ends = UnixListener::from(inherited("listen-fd", args.listen_fd)?);
    let listener = inherited("hybrid-fd", args.hybrid_fd)?;
    raise_descriptor_limit();
    return_large_buffers();
    let device = Vsock::new(VsockConfig { guest_cid: args.guest_cid, listener, path: args.hybrid_path })?;
    seccomp::confine()?;
    let (front_end, _) = front_ends.accept().map_err(CommandError::Accept)?;
    drop(front_ends);
    Ok(vhost_user::serve(front_end, device)?)
}

/// Takes over a descriptor that the parent process left open for this one.
fn inherited(flag: &'static str, fd: RawFd) -> Result<OwnedFd, CommandError> {
    let failed = |source| CommandError::Descriptor { flag, fd, source };
    if fd <= 2 {
        return Err(failed(std::io::Error::other("0, 1 and 2 are the standard streams")));
    }
    // SAFETY: borrowed only for the check that it is open, which harms no other owner.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    // SAFETY: it is open, and at this point nothing of this process has opened or taken descriptors but by its flags.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the process have a descriptor per stream; with fewer it serves fewer streams.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        tracing::info!(error = %e, "the limit of open files stays as it is");
    }
}

/// One heap for all threads: by itself the allocator gives each its own, and touches pages of all of them.
fn spare_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: changes a parameter of the allocator; there is one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Makes the allocator give buffers of slow streams back to the kernel; by itself it would keep the largest so far.
fn return_large_buffers() {
    #[cfg(target_env = "gnu")]
    // SAFETY: changes a parameter of the allocator; there is one thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
    }
}
