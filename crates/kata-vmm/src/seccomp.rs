//! The system calls a device process is left with; anything else kills it.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as ArgLen, SeccompCmpOp as CmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, apply_filter,
};
use thiserror::Error;

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

/// What an event loop over sockets and eventfds needs, whatever the arguments.
const ALWAYS: &[libc::c_long] = &[
    // The loop and its descriptors.
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_create1,
    libc::SYS_timerfd_settime,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_close,
    // Mapping guest memory asks for its file's size first.
    libc::SYS_fstat,
    libc::SYS_statx,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_newfstatat,
    libc::SYS_lseek,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // The runtime: locks, hash seeds, clocks without vDSO, the end.
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Confines the calling thread, for good, to what serving a vhost-user device takes. The process must have
/// `no_new_privs` or CAP_SYS_ADMIN; this sets the former.
pub fn confine() -> Result<(), SeccompError> {
    apply_filter(&program()?).map_err(SeccompError::Install)
}

fn program() -> Result<BpfProgram, BackendError> {
    let no_exec = SeccompCondition::new(
        2,
        ArgLen::Dword,
        CmpOp::MaskedEq(u64::from(libc::PROT_EXEC.cast_unsigned())),
        0,
    )?;
    let only = |arg, value: i32| {
        SeccompCondition::new(arg, ArgLen::Dword, CmpOp::Eq, u64::from(value.cast_unsigned()))
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALWAYS.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, vec![SeccompRule::new(vec![no_exec.clone()])?]);
    rules.insert(libc::SYS_mprotect, vec![SeccompRule::new(vec![no_exec])?]);
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(vec![only(0, libc::AF_UNIX)?])?]);
    rules.insert(
        libc::SYS_fcntl,
        vec![
            SeccompRule::new(vec![only(1, libc::F_DUPFD_CLOEXEC)?])?,
            SeccompRule::new(vec![only(1, libc::F_GETFD)?])?,
            SeccompRule::new(vec![only(1, libc::F_SETFD)?])?,
            SeccompRule::new(vec![only(1, libc::F_GETFL)?])?,
        ],
    );
    let architecture = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Set in the process that confines itself.
    const CONFINED: &str = "KATA_VMM_TEST_CONFINED";

    #[test]
    fn confined_process_dies_of_any_other_system_call() {
        if std::env::var_os(CONFINED).is_some() {
            super::confine().unwrap();
            let _ = std::fs::read_dir("/");
            unreachable!("opening a directory was let through");
        }
        let this = "seccomp::tests::confined_process_dies_of_any_other_system_call";
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", this, "--nocapture"])
            .env(CONFINED, "1")
            .output()
            .unwrap();
        assert_eq!(child.status.signal(), Some(libc::SIGSYS), "{child:?}");
    }
}
