//! Entropy for the kernel's random numbers, from the host.

use std::io::{self, Read};
use std::os::fd::AsRawFd;

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)` of linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// The head of `struct rand_pool_info`, and the bytes that follow it.
#[repr(C)]
struct Pool {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; 256],
}

/// Mixes `data` in, credits it, and has the generator reseeded.
///
/// # Errors
/// What the system says; needs privileges.
pub fn add(data: &[u8]) -> io::Result<()> {
    let random = std::fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    for chunk in data.chunks(256) {
        let size = libc::c_int::try_from(chunk.len()).map_err(|_| Errno::INVAL)?;
        let mut pool = Pool { bits: size * 8, size, bytes: [0; 256] };
        for (place, byte) in pool.bytes.iter_mut().zip(chunk) {
            *place = *byte;
        }
        // SAFETY: the kernel reads the two numbers and `size` bytes after them; the structure holds that many.
        check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) })?;
    }
    // SAFETY: the call takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })
}

/// At boot: where the generator is not ready and the host offers a device for it, takes what it needs from there.
/// Otherwise it becomes ready on its own.
///
/// # Errors
/// A device that cannot be read.
pub fn seed_at_boot() -> io::Result<()> {
    if getrandom(&mut [0_u8; 1], GetRandomFlags::NONBLOCK) != Err(Errno::AGAIN) {
        return Ok(());
    }
    let mut seed = [0; 64];
    match std::fs::File::open("/dev/hwrng") {
        Ok(mut device) => device.read_exact(&mut seed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    add(&seed)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
