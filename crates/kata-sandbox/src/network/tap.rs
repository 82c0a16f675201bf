//! Taps: network links whose other end is a file.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// Where the kernel makes them.
pub(super) const TUN: &str = "/dev/net/tun";
/// The kernel puts a number in for `%d`.
const NAME: &[u8] = b"tap%d_kata";

/// `TUNSETIFF`.
const SET_LINK: Opcode = opcode::write::<libc::c_int>(b'T', 202);
/// Ethernet frames (`IFF_TAP`), without four bytes of packet information before each (`IFF_NO_PI`), with the virtio header
/// by which checksums and segmentation are left to whoever can do them best (`IFF_VNET_HDR`).
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// `struct ifreq`, as `TUNSETIFF` reads and writes it.
#[repr(C)]
struct LinkRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Whether a link of this name is a machine's tap, this owner's or another's.
pub(super) fn is_of_a_machine(link: &str) -> bool {
    link.starts_with("tap") && link.ends_with("_kata")
}

/// An open tap. The link is there as long as somebody has the file open.
pub(super) struct Tap {
    /// What the kernel called its link.
    pub(super) name: String,
    /// The file: one frame a read or write.
    pub(super) file: OwnedFd,
}

/// Makes a tap in the network namespace of the calling thread.
pub(super) fn open() -> io::Result<Tap> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN)?;
    let mut request = LinkRequest { name: [0; 16], flags: FLAGS, rest: [0; 22] };
    for (to, from) in request.name.iter_mut().zip(NAME) {
        *to = *from;
    }
    // SAFETY: TUNSETIFF takes a pointer to a `struct ifreq`, reads its name and flags, and writes nothing but these 40 bytes.
    let set_link = unsafe { Updater::<SET_LINK, LinkRequest>::new(&mut request) };
    // SAFETY: the request borrows memory that outlives the call, and `file` is what this call is for.
    unsafe { ioctl(&file, set_link) }?;
    let name = request.name.iter().take_while(|byte| **byte != 0).copied().collect();
    let name = String::from_utf8(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Tap { name, file: file.into() })
}
