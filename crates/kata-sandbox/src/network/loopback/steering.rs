//! The steering program: BPF of type `SK_LOOKUP`, which the kernel asks for the socket of each new connection.
//!
//! ```text
//!  protocol is TCP?  ──no──▶ pass
//!  to 127.0.0.1?     ──▶ key 0 ─┐
//!  to ::1?           ──▶ key 1 ─┴─▶ sockets[key] there? ──▶ assign it ──▶ pass
//!  else              ──▶ pass
//! ```
//!
//! "Pass" lets the connection go to the socket that was assigned, or else to whom it would have gone to. The program lasts
//! as long as its link, which is a descriptor of the owner: it cannot be left behind.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Why the program is not in place.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} that leads connections to the guest")]
pub(super) struct SteeringError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one (little endian machines).
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
const STORE_WORD: u8 = 0x63; // *(u32 *)(dst + offset) = src
const LOAD_LONG: u8 = 0x18; // dst = the map whose descriptor is the immediate; takes two instructions
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const ADD: u8 = 0x07;
const IF_NOT_EQUAL: u8 = 0x56; // 32 bit
const IF_EQUAL: u8 = 0x15;
const JUMP: u8 = 0x05;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

const MAP_LOOKUP: i32 = 1;
const SOCKET_RELEASE: i32 = 86;
const SOCKET_ASSIGN: i32 = 124;

/// Registers: the result, arguments, what survives calls, and the stack.
const RESULT: u8 = 0;
const ARG1: u8 = 1;
const ARG2: u8 = 2;
const ARG3: u8 = 3;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const STACK: u8 = 10;

/// Places in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// The kernel's code for "go on".
const PASS: i32 = 1;
/// Sockets by key: IPv4's, IPv6's.
const SOCKETS: u32 = 2;

fn with(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    let registers =
        if cfg!(target_endian = "little") { destination | source << 4 } else { destination << 4 | source };
    Instruction { code, registers, offset, immediate }
}

/// The program over the sockets in the map `sockets`.
fn program(sockets: RawFd) -> Vec<Instruction> {
    // A jump to `pass` skips the rest, which is known once all is written.
    const TO_PASS: i16 = i16::MAX;
    let network = |value: u32| value.to_be().cast_signed();
    let only = |field, value| {
        [with(LOAD_WORD, ARG2, CONTEXT, field, 0), with(IF_NOT_EQUAL, ARG2, 0, TO_PASS, value)]
    };
    let mut code = vec![with(MOVE_REGISTER, CONTEXT, ARG1, 0, 0)];
    code.extend(only(PROTOCOL, libc::IPPROTO_TCP));
    code.push(with(LOAD_WORD, ARG2, CONTEXT, FAMILY, 0));
    // Over the four instructions of IPv4.
    code.push(with(IF_NOT_EQUAL, ARG2, 0, 4, libc::AF_INET));
    code.extend(only(LOCAL_IP4, network(0x7f00_0001)));
    code.push(with(MOVE, ARG3, 0, 0, 0));
    // Over the ten of IPv6.
    code.push(with(JUMP, 0, 0, 10, 0));
    code.push(with(IF_NOT_EQUAL, ARG2, 0, TO_PASS, libc::AF_INET6));
    for (word, value) in [(0, 0), (4, 0), (8, 0), (12, 1)] {
        code.extend(only(LOCAL_IP6 + word, network(value)));
    }
    code.push(with(MOVE, ARG3, 0, 0, 1));
    code.extend([
        with(STORE_WORD, STACK, ARG3, -4, 0),
        // The source says what the immediate is: 1 for a descriptor of a map.
        with(LOAD_LONG, ARG1, 1, 0, sockets),
        with(0, 0, 0, 0, 0),
        with(MOVE_REGISTER, ARG2, STACK, 0, 0),
        with(ADD, ARG2, 0, 0, -4),
        with(CALL, 0, 0, 0, MAP_LOOKUP),
        with(IF_EQUAL, RESULT, 0, TO_PASS, 0),
        with(MOVE_REGISTER, SOCKET, RESULT, 0, 0),
        with(MOVE_REGISTER, ARG1, CONTEXT, 0, 0),
        with(MOVE_REGISTER, ARG2, SOCKET, 0, 0),
        with(MOVE, ARG3, 0, 0, 0),
        with(CALL, 0, 0, 0, SOCKET_ASSIGN),
        with(MOVE_REGISTER, ARG1, SOCKET, 0, 0),
        with(CALL, 0, 0, 0, SOCKET_RELEASE),
    ]);
    let pass = code.len();
    for (at, instruction) in code.iter_mut().enumerate().filter(|(_, one)| one.offset == TO_PASS) {
        instruction.offset = i16::try_from(pass - at - 1).unwrap_or(i16::MAX);
    }
    code.extend([with(MOVE, RESULT, 0, 0, PASS), with(EXIT, 0, 0, 0, 0)]);
    code
}

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_OF_SOCKETS: u32 = 15;
const PROGRAM_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// Starts of `union bpf_attr`, one for each command. Whatever comes after is zero to the kernel.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

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
    name: [u8; 16],
    device: u32,
    attaches_as: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attaches_as: u32,
    flags: u32,
}

fn bpf<T>(step: &'static str, command: libc::c_int, attributes: &T) -> Result<RawFd, SteeringError> {
    let mut tries = 0;
    loop {
        // SAFETY: `attributes` is a prefix of `union bpf_attr` of the size told; what its pointers lead to outlives the call.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
        let error = match RawFd::try_from(result) {
            Ok(result) if result >= 0 => return Ok(result),
            _ => io::Error::last_os_error(),
        };
        // The verifier gives up when a signal comes in.
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) || tries == 64 {
            return Err(SteeringError { step, source: error });
        }
        tries += 1;
    }
}

/// As [`bpf`], of a command that makes a descriptor.
fn make<T>(step: &'static str, command: libc::c_int, attributes: &T) -> Result<OwnedFd, SteeringError> {
    let made = bpf(step, command, attributes)?;
    // SAFETY: the call has just made this descriptor (close-on-exec), and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

fn address<T>(pointer: *const T) -> u64 {
    u64::try_from(pointer.expose_provenance()).unwrap_or_default()
}

fn number(fd: RawFd) -> u32 {
    fd.cast_unsigned()
}

/// The program in place, until this is dropped.
pub(super) struct Steering {
    /// It holds the program, and the program the sockets.
    _link: OwnedFd,
}

impl Steering {
    /// Leads connections in the calling thread's network namespace to these listeners.
    pub(super) fn attach(v4: BorrowedFd<'_>, v6: Option<BorrowedFd<'_>>) -> Result<Self, SteeringError> {
        let map = MapCreate { kind: MAP_OF_SOCKETS, key_size: 4, value_size: 4, entries: SOCKETS };
        let sockets = make("make the map for the program", MAP_CREATE, &map)?;
        for (key, socket) in (0_u32..).zip([Some(v4), v6]) {
            let Some(socket) = socket else { continue };
            let value = number(socket.as_raw_fd());
            let entry = MapUpdate {
                map: number(sockets.as_raw_fd()),
                pad: 0,
                key: address(&raw const key),
                value: address(&raw const value),
                flags: 0,
            };
            bpf("put a listener into the map of the program", MAP_UPDATE, &entry)?;
        }
        let program = load(&program(sockets.as_raw_fd()))?;
        let failed = |source| SteeringError { step: "open the network namespace for the program", source };
        let namespace = File::open("/proc/thread-self/ns/net").map_err(failed)?;
        let link = LinkCreate {
            program: number(program.as_raw_fd()),
            target: number(namespace.as_raw_fd()),
            attaches_as: ATTACH_SK_LOOKUP,
            flags: 0,
        };
        Ok(Self { _link: make("attach the program", LINK_CREATE, &link)? })
    }
}

fn load(program: &[Instruction]) -> Result<OwnedFd, SteeringError> {
    let attributes = Load {
        kind: PROGRAM_SK_LOOKUP,
        instructions: u32::try_from(program.len()).unwrap_or(u32::MAX),
        code: address(program.as_ptr()),
        // It calls no helper that asks for another one.
        license: address(c"Apache-2.0".as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel: 0,
        flags: 0,
        name: *b"kata_loopback\0\0\0",
        device: 0,
        attaches_as: ATTACH_SK_LOOKUP,
    };
    make("load the program", PROG_LOAD, &attributes)
}
