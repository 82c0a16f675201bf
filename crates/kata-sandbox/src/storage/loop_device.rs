//! Loop devices: regular files as block devices, for file systems that the host mounts.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// Answers the number of a loop device that nobody uses, and makes one where there is none.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
/// Gives a loop device its file and its flags in one step; Linux 5.8.
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const READ_ONLY: u32 = 1;
/// The device lets go of its file when its last user is gone.
const AUTOCLEAR: u32 = 4;
/// Others take loop devices too: so often the one just found may be gone.
const TRIES: usize = 64;

/// `struct loop_config` of the kernel, with its `struct loop_info64` spelt out as far as it is used.
#[repr(C)]
struct Config {
    file: u32,
    block_size: u32,
    /// `lo_device` to `lo_sizelimit`.
    device_to_size: [u64; 5],
    /// `lo_number` to `lo_encrypt_key_size`.
    number_to_key_size: [u32; 3],
    flags: u32,
    /// `lo_file_name` to the end of `loop_info64`.
    names_to_end: [u64; 22],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Config>() == 304);

/// A loop device. It is there as long as this, or a mount of it.
#[derive(Debug)]
pub(super) struct LoopDevice {
    pub(super) path: PathBuf,
    _open: OwnedFd,
}

/// Puts `file` behind a free loop device.
pub(super) fn attach(file: &Path, readonly: bool) -> io::Result<LoopDevice> {
    let access = if readonly { OFlags::RDONLY } else { OFlags::RDWR };
    let open = |path: &Path| rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty());
    let backing = open(file)?;
    let control = rustix::fs::open("/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    for _ in 0..TRIES {
        let path = PathBuf::from(format!("/dev/loop{}", free(&control)?));
        let device = open(&path)?;
        match configure(&device, &backing, readonly) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            done => return done.map(|()| LoopDevice { path, _open: device }),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

fn free(control: &OwnedFd) -> io::Result<libc::c_int> {
    // SAFETY: the request takes no argument, and the descriptor is open.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    if number >= 0 { Ok(number) } else { Err(io::Error::last_os_error()) }
}

fn configure(device: &OwnedFd, backing: &OwnedFd, readonly: bool) -> io::Result<()> {
    let config = Config {
        file: u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?,
        block_size: 0,
        device_to_size: [0; 5],
        number_to_key_size: [0; 3],
        flags: AUTOCLEAR | if readonly { READ_ONLY } else { 0 },
        names_to_end: [0; 22],
        reserved: [0; 8],
    };
    // SAFETY: the argument is a valid `struct loop_config` that outlives the call, which keeps no pointer.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
