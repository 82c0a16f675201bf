//! The device filter: OCI rules as a BPF program of type `CGROUP_DEVICE`, attached to the container's cgroup.
//!
//! The last rule that matches decides, for each kind of access (read, write, mknod) by itself; what no rule matches is
//! denied. The program therefore walks the rules backwards and keeps the accesses that are not decided yet:
//!
//! ```text
//!  pending = requested
//!  for each rule, last first, whose type and numbers match:
//!      denies:  pending & rule ≠ 0  → denied
//!      allows:  pending &= !rule; pending = 0 → allowed
//!  denied
//! ```

use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use rustix::io::Errno;

use super::CgroupError;
use crate::container::EngineError;
use crate::container::filesystem::last_errno;

const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

/// Kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Block,
    Char,
}

impl Kind {
    /// `BPF_DEVCG_DEV_*`.
    fn number(self) -> u32 {
        match self {
            Self::Block => 1,
            Self::Char => 2,
        }
    }
}

/// One rule; `None` matches all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    allow: bool,
    kind: Option<Kind>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

/// What every container may do, whatever the rules before say: make nodes (which gives no access by itself), and use
/// the harmless character devices: null, zero, full, random, urandom, tty, console, ptmx, and all of devpts.
const ALWAYS: [Rule; 11] = [
    always(Kind::Char, None, None, MKNOD),
    always(Kind::Block, None, None, MKNOD),
    always(Kind::Char, Some(1), Some(3), ALL),
    always(Kind::Char, Some(1), Some(5), ALL),
    always(Kind::Char, Some(1), Some(7), ALL),
    always(Kind::Char, Some(1), Some(8), ALL),
    always(Kind::Char, Some(1), Some(9), ALL),
    always(Kind::Char, Some(5), Some(0), ALL),
    always(Kind::Char, Some(5), Some(1), ALL),
    always(Kind::Char, Some(5), Some(2), ALL),
    always(Kind::Char, Some(136), None, ALL),
];

const fn always(kind: Kind, major: Option<u32>, minor: Option<u32>, access: u8) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// The rules of a spec with what is always allowed after them. `nodes` stand in where a spec has no rules.
pub(super) fn rules(asked: &[LinuxDeviceCgroup], nodes: &[LinuxDevice]) -> Result<Vec<Rule>, EngineError> {
    let mut rules = asked.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
    if asked.is_empty() {
        for node in nodes {
            let kind = match node.typ() {
                LinuxDeviceType::B => Kind::Block,
                LinuxDeviceType::C | LinuxDeviceType::U => Kind::Char,
                LinuxDeviceType::A | LinuxDeviceType::P => continue,
            };
            let (major, minor) = (number(Some(node.major()))?, number(Some(node.minor()))?);
            rules.push(Rule { allow: true, kind: Some(kind), major, minor, access: ALL });
        }
    }
    rules.extend(ALWAYS);
    Ok(rules)
}

fn invalid(reason: String) -> EngineError {
    EngineError::invalid("linux.resources.devices", reason)
}

fn rule(asked: &LinuxDeviceCgroup) -> Result<Rule, EngineError> {
    let kind = match asked.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(Kind::Block),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(Kind::Char),
        LinuxDeviceType::P => return Err(invalid("a pipe is not a device".to_owned())),
    };
    let mut access = 0;
    for letter in asked.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => return Err(invalid(format!("{other:?} is not an access"))),
        };
    }
    Ok(Rule {
        allow: asked.allow(),
        kind,
        major: number(asked.major())?,
        minor: number(asked.minor())?,
        access,
    })
}

/// -1 and nothing are "all".
fn number(number: Option<i64>) -> Result<Option<u32>, EngineError> {
    match number {
        None | Some(-1) => Ok(None),
        Some(number) => {
            let number =
                u32::try_from(number).map_err(|_| invalid(format!("{number} is not a device number")))?;
            Ok(Some(number))
        }
    }
}

/// `struct bpf_insn` in the kernel's byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one (little endian machines).
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
const MOVE_REGISTER: u8 = 0xbc; // 32 bit
const MOVE: u8 = 0xb7;
const AND: u8 = 0x54; // 32 bit
const SHIFT_RIGHT: u8 = 0x74; // 32 bit
const IF_NOT_EQUAL: u8 = 0x56; // 32 bit
const IF_EQUAL: u8 = 0x16; // 32 bit
const EXIT: u8 = 0x95;

/// Registers: the result, the context given, and what is taken from it.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const PENDING: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

fn with(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> Instruction {
    let registers =
        if cfg!(target_endian = "little") { destination | source << 4 } else { destination << 4 | source };
    Instruction { code, registers, offset, immediate: immediate.cast_signed() }
}

/// The program for `rules`.
pub(super) fn program(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx { access << 16 | kind, major, minor }
    let mut code = vec![
        with(LOAD_WORD, KIND, CONTEXT, 0, 0),
        with(MOVE_REGISTER, PENDING, KIND, 0, 0),
        with(AND, KIND, 0, 0, 0xffff),
        with(SHIFT_RIGHT, PENDING, 0, 0, 16),
        with(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        with(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        code.extend(block(rule));
    }
    code.extend(leave(false));
    code
}

fn leave(allow: bool) -> [Instruction; 2] {
    [with(MOVE, RESULT, 0, 0, u32::from(allow)), with(EXIT, 0, 0, 0, 0)]
}

fn block(rule: &Rule) -> Vec<Instruction> {
    let conditions = [(KIND, rule.kind.map(Kind::number)), (MAJOR, rule.major), (MINOR, rule.minor)];
    let mut decide = if rule.allow {
        vec![with(AND, PENDING, 0, 0, !u32::from(rule.access)), with(IF_NOT_EQUAL, PENDING, 0, 2, 0)]
    } else {
        vec![
            with(MOVE_REGISTER, SCRATCH, PENDING, 0, 0),
            with(AND, SCRATCH, 0, 0, u32::from(rule.access)),
            with(IF_EQUAL, SCRATCH, 0, 2, 0),
        ]
    };
    decide.extend(leave(rule.allow));
    let asked: Vec<(u8, u32)> = conditions.into_iter().filter_map(|(of, value)| Some((of, value?))).collect();
    let mut code = Vec::new();
    for (at, (register, value)) in asked.iter().enumerate() {
        // Over the conditions that are left and the decision; never more than a handful.
        let over = i16::try_from(asked.len() - at - 1 + decide.len()).unwrap_or(i16::MAX);
        code.push(with(IF_NOT_EQUAL, *register, 0, over, *value));
    }
    code.extend(decide);
    code
}

const PROG_LOAD: u32 = 5;
const PROG_ATTACH: u32 = 8;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;

/// The start of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel: u32,
    flags: u32,
}

/// The start of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replaced: u32,
}

fn bpf<T>(command: u32, attributes: &T) -> Result<i32, Errno> {
    // SAFETY: `attributes` is a prefix of `union bpf_attr` of the size told; pointers in it outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(last_errno()),
    }
}

/// Gives the program to the kernel.
pub(super) fn load(program: &[Instruction]) -> Result<OwnedFd, CgroupError> {
    let failed = |error: Errno| CgroupError::DeviceFilter { step: "load the program", source: error.into() };
    let attributes = Load {
        kind: TYPE_CGROUP_DEVICE,
        instructions: u32::try_from(program.len()).map_err(|_| failed(Errno::TOOBIG))?,
        code: address(program.as_ptr()),
        // The program calls no helper that asks for another one.
        license: address(c"Apache-2.0".as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel: 0,
        flags: 0,
    };
    // The verifier gives up with EAGAIN when a signal comes in, and SIGCHLD often does.
    let mut tries = 0;
    let fd = loop {
        match bpf(PROG_LOAD, &attributes) {
            Err(Errno::AGAIN | Errno::INTR) if tries < 64 => tries += 1,
            result => break result.map_err(failed)?,
        }
    };
    // SAFETY: the call has just made this descriptor (close-on-exec), and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address<T>(pointer: *const T) -> u64 {
    u64::try_from(pointer.expose_provenance()).unwrap_or_default()
}

/// Attaches the program to the cgroup, in the place of `replaced` where there is one.
pub(super) fn attach(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    replaced: Option<BorrowedFd<'_>>,
) -> Result<(), CgroupError> {
    let attributes = Attach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        kind: ATTACH_CGROUP_DEVICE,
        flags: if replaced.is_some() { ALLOW_MULTI | REPLACE } else { ALLOW_MULTI },
        replaced: replaced.map_or(0, |fd| fd.as_raw_fd().cast_unsigned()),
    };
    let failed =
        |error: Errno| CgroupError::DeviceFilter { step: "attach the program", source: error.into() };
    bpf(PROG_ATTACH, &attributes).map(drop).map_err(failed)
}

#[cfg(test)]
mod tests;
