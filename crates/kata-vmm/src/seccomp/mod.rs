//! The system calls that a process, and each thread of a VMM, is left with; anything else kills the process.
//!
//! ```text
//!   kata-vmm vsock   confine()                     one filter, one thread
//!   kata-vmm run     confine_threads() ─▶ api      makes threads, memory and the virtual machine
//!                       └─ each thread at its start: confine_thread(name)
//!                            vcpu…    runs the guest; a guest's write can start and stop a device's thread
//!                            others   an event loop over queues, and what the device of that name adds
//! ```
//!
//! A thread has the filter of the one that started it beside its own, so it can only ever have less.

mod tables;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as ArgLen, SeccompCmpOp as CmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, apply_filter,
};
use thiserror::Error;

use tables::{Table, VHOST_USER};

/// Why a process could not be confined.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// The filter cannot be built, for instance because the machine's architecture is unknown.
    #[error("the system call filter cannot be built")]
    Build(#[from] BackendError),
    /// The kernel refused the filter.
    #[error("the system call filter cannot be installed")]
    Install(#[source] seccompiler::Error),
}

/// Confines the calling thread, for good, to what serving a vhost-user device takes. The process must have
/// `no_new_privs` or CAP_SYS_ADMIN; this sets the former.
pub fn confine() -> Result<(), SeccompError> {
    apply_filter(&program(VHOST_USER)?).map_err(SeccompError::Install)
}

/// Whether threads confine themselves; off in tests and without a jail.
static THREADS: AtomicBool = AtomicBool::new(false);

/// Confines the calling thread to what the VMM's main thread does, and from now on each thread that calls [`confine_thread`].
pub fn confine_threads() -> Result<(), SeccompError> {
    THREADS.store(true, Ordering::Relaxed);
    apply(tables::API)
}

/// Confines the calling thread to what one of this name does, if [`confine_threads`] was called.
pub fn confine_thread(name: &str) -> Result<(), SeccompError> {
    match THREADS.load(Ordering::Relaxed) {
        true => apply(tables::of_thread(name)),
        false => Ok(()),
    }
}

/// The more severe of two filters' verdicts counts.
fn apply(table: Table) -> Result<(), SeccompError> {
    apply_filter(&absent()?).map_err(SeccompError::Install)?;
    apply_filter(&program(table)?).map_err(SeccompError::Install)
}

/// Calls that a C library tries and can do without: they are answered as by a kernel that has none. `clone3` hides its flags in
/// memory, where no filter can look; `clone` has them in a register.
fn absent() -> Result<BpfProgram, BackendError> {
    let rules = tables::ABSENT.iter().map(|call| (*call, Vec::new())).collect();
    let errno = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, errno, std::env::consts::ARCH.try_into()?)?.try_into()
}

fn program(table: Table) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in table.calls.iter().copied().flatten() {
        rules.insert(*call, Vec::new());
    }
    for (call, argument, test) in table.checked.iter().copied().flatten() {
        let test = match *test {
            tables::Test::Is(value) => SeccompCondition::new(*argument, ArgLen::Dword, CmpOp::Eq, value)?,
            tables::Test::Masked { mask, value } => {
                SeccompCondition::new(*argument, ArgLen::Dword, CmpOp::MaskedEq(mask), value)?
            }
        };
        // A call that is allowed anyway has no rules, and must not get any.
        match rules.entry(*call) {
            std::collections::btree_map::Entry::Occupied(entry) if entry.get().is_empty() => {}
            entry => entry.or_default().push(SeccompRule::new(vec![test])?),
        }
    }
    let architecture = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};

    /// Set in the process that confines itself, to what it then does.
    const CONFINED: &str = "KATA_VMM_TEST_CONFINED";

    /// Runs the test of this name in a process of its own, where it does `what`.
    fn confined(test: &str, what: &str) -> Output {
        let this = format!("seccomp::tests::{test}");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &this, "--nocapture"]).env(CONFINED, what).output().unwrap()
    }

    #[test]
    fn confined_process_dies_of_any_other_system_call() {
        if std::env::var_os(CONFINED).is_some() {
            super::confine().unwrap();
            let _ = std::fs::read_dir("/");
            unreachable!("opening a directory was let through");
        }
        let child = confined("confined_process_dies_of_any_other_system_call", "");
        assert_eq!(child.status.signal(), Some(libc::SIGSYS), "{child:?}");
    }

    /// A thread of this name, which confines itself and then does `what`.
    fn thread(name: &str, what: impl FnOnce() + Send + 'static) {
        let body = || {
            let thread = std::thread::current();
            super::confine_thread(thread.name().unwrap()).unwrap();
            what();
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(body).unwrap().join().unwrap();
    }

    /// A request to the standard input, which does not know it.
    #[cfg(feature = "vfio")]
    fn ask(request: libc::c_ulong) {
        // SAFETY: what does not know a request touches no memory for it.
        let result = unsafe { libc::ioctl(libc::STDIN_FILENO, request, 0) };
        assert_eq!(result, -1);
    }

    #[cfg(feature = "vfio")]
    #[test]
    fn devices_of_the_host_are_for_processors_and_their_memory_for_virtio_mem_as_well() {
        const SET_IRQS: libc::c_ulong = 0x3b6e;
        const MAP_DMA: libc::c_ulong = 0x3b71;
        if let Some(what) = std::env::var_os(CONFINED) {
            super::confine_threads().unwrap();
            match what.to_str().unwrap() {
                "vcpu" => thread("vcpu0", || [SET_IRQS, MAP_DMA].into_iter().for_each(ask)),
                "mem maps" => thread("virtio-mem", || ask(MAP_DMA)),
                "mem interrupts" => thread("virtio-mem", || ask(SET_IRQS)),
                "net maps" => thread("virtio-net", || ask(MAP_DMA)),
                what => unreachable!("{what}"),
            }
            std::process::exit(0);
        }
        let this = "devices_of_the_host_are_for_processors_and_their_memory_for_virtio_mem_as_well";
        for what in ["vcpu", "mem maps"] {
            let child = confined(this, what);
            assert_eq!(child.status.code(), Some(0), "{what}: {child:?}");
        }
        for what in ["mem interrupts", "net maps"] {
            let child = confined(this, what);
            assert_eq!(child.status.signal(), Some(libc::SIGSYS), "{what}: {child:?}");
        }
    }

    #[test]
    fn thread_of_a_device_starts_no_thread_and_no_process_and_makes_no_socket() {
        use std::os::unix::net::UnixStream;

        use vm_memory::MmapRegion;

        const CODE: i32 = libc::PROT_READ | libc::PROT_EXEC;
        const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        if let Some(what) = std::env::var_os(CONFINED) {
            super::confine_threads().unwrap();
            match what.to_str().unwrap() {
                "vcpu starts a device" => thread("vcpu0", || thread("virtio-net", || {})),
                "vsock dials" => {
                    thread("vcpu0", || thread("virtio-vsock", || drop(UnixStream::connect("/nowhere"))));
                }
                "vcpu makes memory" => thread("vcpu0", || {
                    drop(rustix::fs::memfd_create("more", rustix::fs::MemfdFlags::CLOEXEC));
                }),
                "code" => thread("vcpu0", || drop(MmapRegion::<()>::build(None, 4096, CODE, PRIVATE))),
                "code later" => {
                    let page = MmapRegion::<()>::build(None, 4096, libc::PROT_READ, PRIVATE).unwrap();
                    thread("virtio-rng", move || {
                        // SAFETY: the page is mapped for as long as `page` lives, and nothing is in it.
                        unsafe { libc::mprotect(page.as_ptr().cast(), 4096, CODE) };
                    });
                }
                "file" => thread("vcpu0", || assert!(std::fs::File::open("/etc/passwd").is_err())),
                "net starts a thread" => thread("virtio-net", || thread("virtio-net", || {})),
                "net dials" => thread("virtio-net", || drop(UnixStream::connect("/nowhere"))),
                "internet" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
                "process" => drop(Command::new("/bin/true").spawn()),
                "exec" => thread("virtio-rng", || {
                    // SAFETY: a call without effect on memory where it fails, and the end of the process where not.
                    unsafe { libc::execve(c"/bin/true".as_ptr(), std::ptr::null(), std::ptr::null()) };
                }),
                what => unreachable!("{what}"),
            }
            // Not through the harness, which does more than a VMM.
            std::process::exit(0);
        }
        let this = "thread_of_a_device_starts_no_thread_and_no_process_and_makes_no_socket";
        for what in ["vcpu starts a device", "vsock dials", "file"] {
            let child = confined(this, what);
            assert_eq!(child.status.code(), Some(0), "{what}: {child:?}");
        }
        let forbidden = [
            "net starts a thread",
            "net dials",
            "vcpu makes memory",
            "code",
            "code later",
            "internet",
            "process",
            "exec",
        ];
        for what in forbidden {
            let child = confined(this, what);
            assert_eq!(child.status.signal(), Some(libc::SIGSYS), "{what}: {child:?}");
        }
    }
}
