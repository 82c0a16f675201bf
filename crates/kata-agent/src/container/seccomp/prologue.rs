//! Instructions in front of libseccomp's: for system calls that its tables do not have yet.
//!
//! Since Linux 5.1 new system calls have one number on all architectures that guests run on, so a table of numbers is
//! enough. A rule that restricts holds for every architecture; one that permits holds for the native one alone.

use libseccomp::ScmpAction;

/// System calls by name, from 450 on (Linux 5.17 to 6.17).
const NEWER: [(&str, u32); 20] = [
    ("set_mempolicy_home_node", 450),
    ("cachestat", 451),
    ("fchmodat2", 452),
    ("map_shadow_stack", 453),
    ("futex_wake", 454),
    ("futex_wait", 455),
    ("futex_requeue", 456),
    ("statmount", 457),
    ("listmount", 458),
    ("lsm_get_self_attr", 459),
    ("lsm_set_self_attr", 460),
    ("lsm_list_modules", 461),
    ("mseal", 462),
    ("setxattrat", 463),
    ("getxattrat", 464),
    ("listxattrat", 465),
    ("removexattrat", 466),
    ("open_tree_attr", 467),
    ("file_getattr", 468),
    ("file_setattr", 469),
];

/// `AUDIT_ARCH_*` of the architecture this is built for, where the prologue is used.
#[cfg(target_arch = "x86_64")]
const NATIVE: Option<u32> = Some(0xc000_003e);
#[cfg(target_arch = "aarch64")]
const NATIVE: Option<u32> = Some(0xc000_00b7);
#[cfg(target_arch = "riscv64")]
const NATIVE: Option<u32> = Some(0xc000_00f3);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
const NATIVE: Option<u32> = None;

/// Numbers from here on are x32's, on the architecture of x86-64.
const X32: u32 = 0x4000_0000;

/// `struct sock_filter`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Instruction {
    pub code: u16,
    pub yes: u8,
    pub no: u8,
    pub value: u32,
}

impl Instruction {
    fn bytes(self) -> [u8; super::INSTRUCTION] {
        let [code0, code1] = self.code.to_ne_bytes();
        let [value0, value1, value2, value3] = self.value.to_ne_bytes();
        [code0, code1, self.yes, self.no, value0, value1, value2, value3]
    }
}

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const EQUAL: u16 = 0x15;
const AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;

/// What is collected while the rules are added.
#[derive(Debug)]
pub(super) struct Prologue {
    /// The default action is an error that is not `ENOSYS` already.
    defaults_to_error: bool,
    rules: Vec<(u32, ScmpAction)>,
    highest: Option<u32>,
}

impl Prologue {
    pub(super) fn new(default: ScmpAction) -> Self {
        let defaults_to_error = matches!(default, ScmpAction::Errno(errno) if errno != libc::ENOSYS);
        Self { defaults_to_error, rules: Vec::new(), highest: None }
    }

    /// Takes note of a system call that the profile names. Negative numbers exist on other architectures only.
    pub(super) fn note(&mut self, number: i32) {
        if let Ok(number) = u32::try_from(number)
            && number < X32
        {
            self.highest = self.highest.max(Some(number));
        }
    }

    /// Adds a rule for a system call that libseccomp does not know. False if this table does not either.
    pub(super) fn add(&mut self, name: &str, action: ScmpAction) -> bool {
        let Some((_, number)) = NEWER.iter().find(|(known, _)| *known == name && NATIVE.is_some()) else {
            return false;
        };
        self.highest = self.highest.max(Some(*number));
        // As with libseccomp, the first rule for a system call stays.
        if !self.rules.iter().any(|(known, _)| known == number) {
            self.rules.push((*number, action));
        }
        true
    }

    /// The instructions, to be followed by libseccomp's: what is not decided here falls through to those.
    pub(super) fn assemble(&self) -> Vec<u8> {
        let (permit, restrict): (Vec<_>, Vec<_>) =
            self.rules.iter().partition(|(_, action)| super::permits(*action));
        let mut code = Vec::new();
        if !restrict.is_empty() {
            code.push(instruction(LOAD, 0, 0, NUMBER));
            code.push(instruction(AND, 0, 0, !X32));
            code.extend(restrict.into_iter().flat_map(decide));
        }
        let mut native = vec![instruction(LOAD, 0, 0, NUMBER)];
        native.extend(permit.into_iter().flat_map(decide));
        if let Some(highest) = self.highest.filter(|_| self.defaults_to_error) {
            native.push(instruction(AT_LEAST, 2, 0, X32));
            native.push(instruction(AT_LEAST, 0, 1, highest + 1));
            native.push(instruction(RETURN, 0, 0, value(ScmpAction::Errno(libc::ENOSYS))));
        }
        // A jump spans 255 instructions at most; the table is far shorter.
        if let Some(arch) = NATIVE
            && native.len() > 1
            && let Ok(over) = u8::try_from(native.len())
        {
            code.push(instruction(LOAD, 0, 0, ARCH));
            code.push(instruction(EQUAL, 0, over, arch));
            code.extend(native);
        }
        code.into_iter().flat_map(Instruction::bytes).collect()
    }
}

fn instruction(code: u16, yes: u8, no: u8, value: u32) -> Instruction {
    Instruction { code, yes, no, value }
}

fn decide((number, action): &(u32, ScmpAction)) -> [Instruction; 2] {
    [instruction(EQUAL, 0, 1, *number), instruction(RETURN, 0, 0, value(*action))]
}

/// `SECCOMP_RET_*` with its data.
fn value(action: ScmpAction) -> u32 {
    match action {
        ScmpAction::KillThread => 0,
        ScmpAction::Trap => 0x0003_0000,
        ScmpAction::Errno(errno) => 0x0005_0000 | (errno.cast_unsigned() & 0xffff),
        ScmpAction::Trace(message) => 0x7ff0_0000 | u32::from(message),
        ScmpAction::Log => 0x7ffc_0000,
        ScmpAction::Allow => 0x7fff_0000,
        // KillProcess; Notify is refused before it comes here, and what libseccomp may add later is not let through.
        _ => 0x8000_0000,
    }
}
