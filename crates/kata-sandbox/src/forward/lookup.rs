//! Leads connections to any port of a network namespace's loopback to one listener.
//!
//! A program of the kernel's BPF machine decides for each new connection which socket it belongs to (`sk_lookup`, since
//! Linux 5.9; see Documentation/bpf/prog_sk_lookup.rst). This one takes TCP to 127.0.0.0/8 and leaves everything else
//! alone:
//!
//! ```text
//!   protocol TCP? ─no─▶ as usual
//!   family IPv4, local address 127.x? ─no─▶ as usual
//!   the socket in the map ─▶ assigned
//! ```
//!
//! It is in force as long as its [`Lookup`] lives, in the namespace of the thread that made it.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// One instruction: operation, registers (target low, source high), offset, constant.
type Instruction = u64;

const MAP_CREATE: u32 = 0;
const MAP_UPDATE: u32 = 2;
const PROG_LOAD: u32 = 5;
const LINK_CREATE: u32 = 28;
const TYPE_SOCKMAP: u32 = 15;
const TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// The program, in force.
#[derive(Debug)]
pub(super) struct Lookup {
    /// It goes with this.
    _link: OwnedFd,
}

impl Lookup {
    /// Leads connections to `listener`, which must be one of version 4.
    ///
    /// # Errors
    /// No privilege, or a kernel before 5.9.
    pub(super) fn attach(listener: &TcpListener) -> io::Result<Self> {
        let map = create_map()?;
        put(&map, listener)?;
        let program = load(&program(&map))?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        Ok(Self { _link: link(&program, &namespace)? })
    }
}

/// The start of `union bpf_attr` for `BPF_MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// The same for `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct MapUpdate {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The same for `BPF_PROG_LOAD`.
#[repr(C)]
struct ProgLoad {
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
    interface: u32,
    attach: u32,
}

/// The same for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
}

fn bpf<T>(command: u32, attributes: &T) -> io::Result<i32> {
    // SAFETY: `attributes` is a prefix of `union bpf_attr` of the size told; pointers in it outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

fn new_fd<T>(command: u32, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the call has just made this descriptor (close-on-exec), and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address<T>(pointer: *const T) -> u64 {
    u64::try_from(pointer.expose_provenance()).unwrap_or_default()
}

fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn create_map() -> io::Result<OwnedFd> {
    new_fd(MAP_CREATE, &MapCreate { kind: TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 1 })
}

fn put(map: &OwnedFd, listener: &TcpListener) -> io::Result<()> {
    let (key, value) = (0_u32, u64::from(number(listener)));
    let (key, value) = (address(&raw const key), address(&raw const value));
    bpf(MAP_UPDATE, &MapUpdate { map: number(map), pad: 0, key, value, flags: 0 }).map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = ProgLoad {
        kind: TYPE_SK_LOOKUP,
        instructions: u32::try_from(program.len()).map_err(io::Error::other)?,
        code: address(program.as_ptr()),
        // It calls no helper that asks for another one.
        license: address(c"Apache-2.0".as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        attach: ATTACH_SK_LOOKUP,
    };
    // The verifier gives up when a signal comes in.
    let mut tries = 0;
    loop {
        match new_fd(PROG_LOAD, &attributes) {
            Err(error) if tries < 64 && matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                tries += 1;
            }
            result => return result,
        }
    }
}

fn link(program: &OwnedFd, namespace: &File) -> io::Result<OwnedFd> {
    let (program, target) = (number(program), number(namespace));
    new_fd(LINK_CREATE, &LinkCreate { program, target, attach: ATTACH_SK_LOOKUP, flags: 0 })
}

/// As `struct bpf_insn` lies in memory on a little-endian machine.
fn instruction(operation: u8, target: u8, source: u8, offset: i16, constant: i32) -> Instruction {
    u64::from(operation)
        | u64::from(target) << 8
        | u64::from(source) << 12
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(constant.cast_unsigned()) << 32
}

/// Where `struct bpf_sk_lookup` has what is asked for.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;

fn program(map: &OwnedFd) -> Vec<Instruction> {
    const LOAD_WORD: u8 = 0x61;
    const STORE_WORD: u8 = 0x62;
    const LOAD_MAP: u8 = 0x18;
    const MAP: u8 = 1;
    const MOVE: u8 = 0xb7;
    const MOVE_REGISTER: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const AND: u8 = 0x57;
    const IF_EQUAL: u8 = 0x15;
    const IF_NOT_EQUAL: u8 = 0x55;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    const PASS: i32 = 1;
    let i = instruction;
    vec![
        i(MOVE_REGISTER, 6, 1, 0, 0),
        // To the last two, which let the kernel go on.
        i(LOAD_WORD, 0, 6, PROTOCOL, 0),
        i(IF_NOT_EQUAL, 0, 0, 19, libc::IPPROTO_TCP),
        i(LOAD_WORD, 0, 6, FAMILY, 0),
        i(IF_NOT_EQUAL, 0, 0, 17, libc::AF_INET),
        // In the network's order: the first byte is the lowest.
        i(LOAD_WORD, 0, 6, LOCAL_IP4, 0),
        i(AND, 0, 0, 0, 0xff),
        i(IF_NOT_EQUAL, 0, 0, 14, 127),
        i(STORE_WORD, 10, 0, -4, 0),
        i(LOAD_MAP, 1, MAP, 0, map.as_raw_fd()),
        i(0, 0, 0, 0, 0),
        i(MOVE_REGISTER, 2, 10, 0, 0),
        i(ADD, 2, 0, 0, -4),
        i(CALL, 0, 0, 0, MAP_LOOKUP),
        i(IF_EQUAL, 0, 0, 7, 0),
        i(MOVE_REGISTER, 7, 0, 0, 0),
        i(MOVE_REGISTER, 1, 6, 0, 0),
        i(MOVE_REGISTER, 2, 7, 0, 0),
        i(MOVE, 3, 0, 0, 0),
        i(CALL, 0, 0, 0, SK_ASSIGN),
        i(MOVE_REGISTER, 1, 7, 0, 0),
        i(CALL, 0, 0, 0, SK_RELEASE),
        i(MOVE, 0, 0, 0, PASS),
        i(EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpStream};

    use kata_testkit::netns::Netns;

    use super::*;

    #[test]
    fn every_port_of_the_loopback_leads_to_the_listener_while_it_is_in_force() {
        std::thread::spawn(|| {
            let Some(netns) = Netns::enter() else { return };
            netns.run("ip link set lo up");
            netns.run("ip addr add 192.0.2.1/32 dev lo");
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let lookup = Lookup::attach(&listener).unwrap();
            for port in [1, 80, 65_535] {
                let _client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
                assert_eq!(listener.accept().unwrap().0.local_addr().unwrap().port(), port);
            }
            TcpStream::connect(("192.0.2.1", 80)).expect_err("other addresses are left alone");
            drop(lookup);
            TcpStream::connect((Ipv4Addr::LOCALHOST, 80)).expect_err("it is no longer in force");
        })
        .join()
        .unwrap();
    }
}
