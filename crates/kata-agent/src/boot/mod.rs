//! From the kernel's first step into user space to an agent that serves.
//!
//! ```text
//!  helper, pause? ─▶ a main of its own, no runtime
//!  PID 1:   root made pivotable ─▶ mounts ─▶ modules ─▶ loopback, name ─┐
//!  service: children adopted ─▶ its cgroup ─────────────────────────────┴▶ serve ─▶ done: the VM ends
//! ```
//!
//! As a service the agent mounts nothing, and that its end is the machine's is for its unit to say (`SuccessAction=`,
//! `FailureAction=`), which may be at once: what is to be written is written before. As PID 1 nothing may fail silently: every fatal error goes to the console with its causes, and then the VM ends.

mod mounts;
mod service;
mod timeline;

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::set_child_subreaper;
use rustix::system::{RebootCommand, reboot};

use crate::cmdline::Settings;
use crate::modules::{self, ModuleError, ModuleList, Modules};
use crate::serve::{self, ServeError};
use crate::{container, entropy, log, pause};

pub use mounts::MountError;
pub use service::{CGROUPS, notify_ready};
pub use timeline::{Timeline, now_us};

/// Why the agent cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A mount that every guest needs.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The image's kernel modules.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// A file that every guest has.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: &'static str,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// A step of the set-up.
    #[error("{what}")]
    Step {
        /// Which.
        what: &'static str,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// Listening and serving.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> BootError {
    move |source| BootError::Step { what, source: source.into() }
}

/// The program. As PID 1 it does not return: the VM ends first.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next();
    if name.as_deref() == Some(OsStr::new(container::HELPER_NAME)) {
        container::helper_main();
    }
    if name.as_deref() == Some(OsStr::new(pause::PATH)) {
        return ExitCode::from(pause::main());
    }
    let is_init = rustix::process::getpid().is_init();
    // The kernel hands its own leftover words to PID 1 as arguments: they are not for the agent.
    if !is_init && arguments.next().as_deref() == Some(OsStr::new("--version")) {
        let _ = rustix::io::write(rustix::stdio::stdout(), version().as_bytes());
        return ExitCode::SUCCESS;
    }
    install_panic_hook(is_init);
    let result = if is_init { run_as_init() } else { run_as_service() };
    let code = match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("kata-agent: fatal: {}\n", crate::chain(&error)));
            ExitCode::FAILURE
        }
    };
    if is_init {
        end_vm();
    }
    code
}

fn version() -> String {
    format!("kata-agent {}\n", env!("CARGO_PKG_VERSION"))
}

/// The agent as PID 1 of an initramfs or of a root filesystem of its own.
fn run_as_init() -> Result<(), BootError> {
    let mut timeline = Timeline::begin();
    container::make_root_pivotable().map_err(step("making the root one that can be left"))?;
    timeline.stage("mounts", mounts::mount_all)?;
    // The descriptors of before belong to a console that the image may not even have had.
    reopen_console();
    let settings = read_settings()?;
    let logs = log::install(settings.log_level, true);
    let list = timeline.stage("load modules", load_modules)?;
    timeline.stage("set up", set_up)?;
    serve::run(settings, logs, Modules::new(list), PathBuf::new(), timeline)?;
    Ok(())
}

/// The agent as a service of an init system, which has set up the guest.
fn run_as_service() -> Result<(), BootError> {
    // Orphans of containers are the agent's to reap, whoever is PID 1.
    set_child_subreaper(Some(rustix::process::getpid())).map_err(step("adopting orphans"))?;
    let settings = read_settings()?;
    let logs = log::install(settings.log_level, false);
    let timeline = Timeline::after(service::stages());
    // Before anything is started: it all is born where the agent is.
    let cgroup = service::take_delegated_cgroup()
        .map_err(step("taking the cgroup that was delegated to the agent"))?;
    let list = read_module_list()?;
    serve::run(settings, logs, Modules::new(ModuleList { boot: Vec::new(), ..list }), cgroup, timeline)?;
    rustix::fs::sync();
    Ok(())
}

fn read_settings() -> Result<Settings, BootError> {
    let path = "/proc/cmdline";
    let cmdline = std::fs::read_to_string(path).map_err(|source| BootError::Read { path, source })?;
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    Ok(Settings::parse(&cmdline, environment))
}

fn read_module_list() -> Result<ModuleList, BootError> {
    match std::fs::read_to_string(modules::LIST) {
        Ok(text) => Ok(ModuleList::parse(&text)?),
        // A kernel with all that is needed built in.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ModuleList::default()),
        Err(source) => Err(BootError::Read { path: modules::LIST, source }),
    }
}

/// Loads what is for boot, and removes the files: in an initramfs they are memory.
fn load_modules() -> Result<ModuleList, BootError> {
    let list = read_module_list()?;
    let later = list.needed_later();
    for module in &list.boot {
        modules::load_file(module)?;
    }
    for module in list.boot.iter().filter(|module| !later.contains(&module.path)) {
        // A read-only root keeps its files, and they cost nothing there.
        let _ = std::fs::remove_file(&module.path);
    }
    Ok(list)
}

fn set_up() -> Result<(), BootError> {
    loopback_up().map_err(step("bringing the loopback interface up"))?;
    rustix::system::sethostname(b"localhost").map_err(step("setting the host name"))?;
    if let Err(error) = entropy::seed_at_boot() {
        tracing::warn!(%error, "seeding random numbers");
    }
    Ok(())
}

fn loopback_up() -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = libc::c_char::try_from(*byte).unwrap_or_default();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or_default();
    // SAFETY: the kernel reads one ifreq, which `request` is.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Points the standard descriptors at the console that is there now.
fn reopen_console() {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let Ok(console) =
        open("/dev/console", flags, Mode::empty()).or_else(|_| open("/dev/null", flags, Mode::empty()))
    else {
        return;
    };
    let _ = rustix::stdio::dup2_stdin(&console);
    let _ = rustix::stdio::dup2_stdout(&console);
    let _ = rustix::stdio::dup2_stderr(&console);
}

/// Writes to the kernel's log, which is on the console however the agent's own descriptors stand; else to stderr.
fn say(text: &str) {
    let kmsg: Result<OwnedFd, _> = open("/dev/kmsg", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    // Priority 2, critical: shown even on a quiet console.
    let written = kmsg.and_then(|kmsg| rustix::io::write(&kmsg, format!("<2>{text}").as_bytes()));
    if written.is_err() || !rustix::process::getpid().is_init() {
        let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
    }
}

fn install_panic_hook(is_init: bool) {
    std::panic::set_hook(Box::new(move |panic| {
        say(&format!("kata-agent: {panic}\n"));
        if is_init {
            end_vm();
        }
    }));
}

/// Ends the machine at once. The VMM is started so that a restart is its end, on every machine type.
fn end_vm() -> ! {
    rustix::fs::sync();
    let _ = reboot(RebootCommand::Restart);
    // Not reached as root. The end of PID 1 is a kernel panic, which ends the VM as well.
    std::process::exit(1)
}
