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

/// A tap of several files, one for each queue (`IFF_MULTI_QUEUE`).
const MULTI_QUEUE: u16 = 0x0100;

/// `struct ifreq`, as `TUNSETIFF` reads and writes it.
#[repr(C)]
struct LinkRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Whether a link of this name is a machine's, this owner's or another's.
pub(super) fn is_of_a_machine(link: &str) -> bool {
    let number =
        link.strip_suffix("_kata").map(|start| start.trim_end_matches(|digit: char| digit.is_ascii_digit()));
    matches!(number, Some("tap" | "mtap"))
}

/// The macvtap that is on the link of this index.
pub(super) fn macvtap_name(link: u32) -> String {
    format!("mtap{link}_kata")
}

/// An open tap. The link is there as long as somebody has one of the files open.
pub(super) struct Tap {
    /// What the kernel called its link.
    pub(super) name: String,
    /// The files, one for each queue: one frame a read or write.
    pub(super) queues: Vec<OwnedFd>,
}

/// Makes a tap in the network namespace of the calling thread.
pub(super) fn make(queues: u16) -> io::Result<Tap> {
    let flags = if queues > 1 { MULTI_QUEUE } else { 0 };
    let (first, name) = open(NAME, flags)?;
    let mut files = vec![first];
    for _ in 1..queues {
        files.push(open(name.as_bytes(), flags)?.0);
    }
    Ok(Tap { name, queues: files })
}

/// Takes a tap that is there and that nobody has open.
pub(super) fn take(name: &str) -> io::Result<Vec<OwnedFd>> {
    let taken = match open(name.as_bytes(), 0) {
        // It was made with several queues, of which one is enough.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => open(name.as_bytes(), MULTI_QUEUE),
        taken => taken,
    };
    Ok(vec![taken?.0])
}

/// Opens a queue of the tap called `name`, which is made if it is not there. The answer has its name as it is.
fn open(name: &[u8], flags: u16) -> io::Result<(OwnedFd, String)> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN)?;
    let mut request = LinkRequest { name: [0; 16], flags: FLAGS | flags, rest: [0; 22] };
    for (to, from) in request.name.iter_mut().zip(name) {
        *to = *from;
    }
    // SAFETY: TUNSETIFF takes a pointer to a `struct ifreq`, reads its name and flags, and writes nothing but these 40 bytes.
    let set_link = unsafe { Updater::<SET_LINK, LinkRequest>::new(&mut request) };
    // SAFETY: the request borrows memory that outlives the call, and `file` is what this call is for.
    unsafe { ioctl(&file, set_link) }?;
    let name = request.name.iter().take_while(|byte| **byte != 0).copied().collect();
    let name = String::from_utf8(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((file.into(), name))
}
