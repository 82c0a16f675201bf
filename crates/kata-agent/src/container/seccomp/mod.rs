//! Seccomp: an OCI profile becomes one classic BPF program, made by libseccomp and prefixed by us.
//!
//! ```text
//!  prologue   system calls too new for libseccomp's tables, by number   (prologue.rs)
//!             newer than anything the profile names → ENOSYS, so that libraries fall back
//!  libseccomp everything else
//! ```
//!
//! A profile is enforced as written or refused. The one thing left out is a permission for a system call that neither
//! libseccomp nor this module has heard of: leaving it out forbids more, never less.
//!
//! Compiling costs milliseconds and memory, so it is done once, in the helper that creates the container; the agent
//! keeps the program for later processes.

use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::str::FromStr;

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{self, Errno};

use super::filesystem::last_errno;
use super::wire::Failure;
use prologue::Prologue;

mod prologue;

/// A program and the flags to load it with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter(Vec<u8>);

/// The flags, as native-endian `u32`.
const FLAGS: usize = 4;
/// `struct sock_filter`.
const INSTRUCTION: usize = 8;

impl Filter {
    /// As [`as_bytes`](Self::as_bytes) gave them.
    pub(super) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Translates a profile.
    pub(super) fn compile(profile: &LinuxSeccomp) -> Result<Self, Failure> {
        if profile.listener_path().is_some() {
            return Err(unsupported("listenerPath", "system calls are not forwarded to a supervisor"));
        }
        let flags = flags(profile)?;
        let default = action(profile.default_action(), profile.default_errno_ret(), "defaultAction")?;
        let mut context =
            ScmpFilterContext::new(default).map_err(|error| refused("defaultAction", &error))?;
        for arch in profile.architectures().iter().flatten() {
            let arch = architecture(*arch)?;
            context.add_arch(arch).map_err(|error| refused("architectures", &error))?;
        }
        let mut prologue = Prologue::new(default);
        for rule in profile.syscalls().iter().flatten() {
            add(&mut context, &mut prologue, rule, default)?;
        }
        let mut bytes = flags.to_ne_bytes().to_vec();
        bytes.extend(prologue.assemble());
        bytes.extend(export(&context)?);
        Ok(Self(bytes))
    }

    /// Puts this process under the filter, for good. Allocates nothing.
    pub(super) fn install(&self) -> io::Result<()> {
        let (flags, program) = self.0.split_first_chunk::<FLAGS>().ok_or(Errno::INVAL)?;
        let length = u16::try_from(program.len() / INSTRUCTION).map_err(|_| Errno::TOOBIG)?;
        let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut().cast() };
        // SAFETY: `program` points to `len` instructions that `self` owns; the kernel copies them and, unlike an
        // access from here, has no demand on their alignment.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                u32::from_ne_bytes(*flags),
                &raw const program,
            )
        };
        if result == 0 { Ok(()) } else { Err(last_errno()) }
    }
}

fn key(of: &str) -> String {
    format!("linux.seccomp.{of}")
}

fn unsupported(of: &str, reason: &str) -> Failure {
    Failure::Unsupported { key: key(of), reason: reason.to_owned() }
}

fn refused(of: &str, error: &dyn std::error::Error) -> Failure {
    Failure::Invalid { key: key(of), reason: error.to_string() }
}

fn flags(profile: &LinuxSeccomp) -> Result<u32, Failure> {
    let mut all = 0;
    for flag in profile.flags().iter().flatten() {
        all |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(unsupported("flags", "there is no listener to wait for"));
            }
        };
    }
    u32::try_from(all).map_err(|_| unsupported("flags", "too many"))
}

/// Largest number that `SECCOMP_RET_ERRNO` passes on.
const MAX_ERRNO: u32 = 4095;

fn action(action: LinuxSeccompAction, value: Option<u32>, of: &str) -> Result<ScmpAction, Failure> {
    let invalid = |reason: String| Failure::Invalid { key: key(of), reason };
    let errno = value.unwrap_or(libc::EPERM.cast_unsigned());
    let takes_value = matches!(action, LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace);
    if !takes_value && value.is_some_and(|value| value != 0) {
        return Err(invalid(format!("{action} takes no errnoRet")));
    }
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(unsupported(of, "system calls are not forwarded to a supervisor"));
        }
        LinuxSeccompAction::ScmpActErrno if errno > MAX_ERRNO => {
            return Err(invalid(format!("errno {errno} is out of range")));
        }
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.cast_signed()),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(errno).map_err(|_| invalid(format!("{errno} is out of range")))?)
        }
    })
}

fn architecture(arch: Arch) -> Result<ScmpArch, Failure> {
    let name = arch.to_string();
    // strum cuts words before digits: "SCMP_ARCH_X86_64" and "SCMP_ARCH_X8664" are both possible spellings.
    let name =
        serde_json::to_value(arch).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or(name);
    ScmpArch::from_str(&name).map_err(|_| unsupported("architectures", &format!("{name} is not known")))
}

/// Whether `action` lets the system call happen.
fn permits(action: ScmpAction) -> bool {
    matches!(action, ScmpAction::Allow | ScmpAction::Log)
}

fn add(
    context: &mut ScmpFilterContext,
    prologue: &mut Prologue,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), Failure> {
    if rule.names().is_empty() {
        return Err(Failure::Invalid { key: key("syscalls"), reason: "a rule without names".to_owned() });
    }
    let action = action(rule.action(), rule.errno_ret(), "syscalls")?;
    let comparisons = comparisons(rule.args().as_deref().unwrap_or_default())?;
    for name in rule.names() {
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            add_unknown(prologue, name, action, !comparisons.is_empty(), default)?;
            continue;
        };
        prologue.note(syscall.as_raw_syscall());
        // libseccomp takes a rule that says what the default says for a mistake.
        if action == default {
            continue;
        }
        let failed =
            |error| Failure::Invalid { key: key(&format!("syscalls[{name:?}]")), reason: format!("{error}") };
        for set in sets(&comparisons) {
            context.add_rule_conditional(action, syscall, &set).map_err(failed)?;
        }
    }
    Ok(())
}

fn add_unknown(
    prologue: &mut Prologue,
    name: &str,
    action: ScmpAction,
    conditional: bool,
    default: ScmpAction,
) -> Result<(), Failure> {
    if !conditional && prologue.add(name, action) {
        return Ok(());
    }
    if permits(action) && !permits(default) || action == default {
        // In the helper, which has no log: that it is left out shows as ENOSYS or the default in the container.
        return Ok(());
    }
    Err(unsupported(&format!("syscalls[{name:?}]"), "the system call is not known and the rule restricts it"))
}

/// An argument of a system call and what it is compared with.
type Comparison = (u32, ScmpArgCompare);

fn comparisons(args: &[LinuxSeccompArg]) -> Result<Vec<Comparison>, Failure> {
    args.iter()
        .map(|arg| {
            let invalid = || Failure::Invalid {
                key: key("syscalls.args"),
                reason: format!("a system call has no argument {}", arg.index()),
            };
            let index = u32::try_from(arg.index()).ok().filter(|index| *index < 6).ok_or_else(invalid)?;
            let (value, second) = (arg.value(), arg.value_two().unwrap_or(0));
            let (operator, datum) = match arg.op() {
                LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
                LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
                LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
                LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
                LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
                LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
                LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), second),
            };
            Ok((index, ScmpArgCompare::new(index, operator, datum)))
        })
        .collect()
}

/// All conditions must hold, unless two are about the same argument: then, by the convention of the existing profiles,
/// any one of them is enough, and each is a rule of its own.
fn sets(comparisons: &[Comparison]) -> Vec<Vec<ScmpArgCompare>> {
    let mut indices: Vec<u32> = comparisons.iter().map(|(index, _)| *index).collect();
    indices.sort_unstable();
    let repeated = indices.windows(2).any(|pair| pair.first() == pair.last());
    if repeated {
        return comparisons.iter().map(|(_, one)| vec![*one]).collect();
    }
    vec![comparisons.iter().map(|(_, one)| *one).collect()]
}

fn export(context: &ScmpFilterContext) -> Result<Vec<u8>, Failure> {
    let failed = |error: std::io::Error| Failure::setup("export the seccomp filter", error);
    let file = memfd_create("seccomp", MemfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    context.export_bpf(file.as_fd()).map_err(|error| refused("syscalls", &error))?;
    let mut file = std::fs::File::from(file);
    file.rewind().map_err(failed)?;
    let mut program = Vec::new();
    file.read_to_end(&mut program).map_err(failed)?;
    Ok(program)
}

#[cfg(test)]
mod tests;
