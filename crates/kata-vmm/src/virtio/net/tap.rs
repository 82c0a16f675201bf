//! A tap, as `/dev/net/tun` hands it out (Linux, `Documentation/networking/tuntap.rst`).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use thiserror::Error;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::HEADER_LEN;
use crate::virtio::buffers::Buffers;

const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

/// What the kernel may leave to the guest (`TUN_F_*`), with the feature that says that the guest takes it.
const OFFLOADS: [(u32, u32); 7] = [
    (0x01, VIRTIO_NET_F_GUEST_CSUM),
    (0x02, VIRTIO_NET_F_GUEST_TSO4),
    (0x04, VIRTIO_NET_F_GUEST_TSO6),
    (0x08, VIRTIO_NET_F_GUEST_ECN),
    (0x10, VIRTIO_NET_F_GUEST_UFO),
    (0x20, VIRTIO_NET_F_GUEST_USO4),
    (0x40, VIRTIO_NET_F_GUEST_USO6),
];
/// Both directions of UDP segmentation; the kernel has both or none.
const USO: u32 = 0x60;

/// Why a descriptor cannot be a queue of a tap.
#[derive(Debug, Error)]
pub enum TapError {
    /// It is something else.
    #[error("the descriptor is no queue of a tap: it must come from /dev/net/tun, after TUNSETIFF")]
    NoTap(#[source] io::Error),
    /// It carries IP packets, or something before the frames.
    #[error("the interface {0} is no tap with IFF_TAP, IFF_VNET_HDR and IFF_NO_PI (flags {1:#x})")]
    Flags(String, u16),
    /// Several queues of an interface that has one.
    #[error("the interface {0} has no IFF_MULTI_QUEUE, but {1} queues were given")]
    OneQueue(String, usize),
    /// The kernel refused something.
    #[error("the tap cannot {action}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    flags: u16,
    name: String,
}

impl Tap {
    /// Looks at what a descriptor is, and makes it what this device works with: not blocking, with headers of virtio 1.
    pub fn new(file: OwnedFd) -> Result<Tap, TapError> {
        let file = File::from(file);
        let mut request = Interface { name: [0; 16], flags: 0, rest: [0; 22] };
        // SAFETY: the kernel writes a `struct ifreq`, which `Interface` is, and nothing beyond.
        unsafe { ioctl(&file, TUNGETIFF, &raw mut request) }.map_err(TapError::NoTap)?;
        let end = request.name.iter().position(|byte| *byte == 0).unwrap_or(request.name.len());
        let name = String::from_utf8_lossy(request.name.get(..end).unwrap_or_default()).into_owned();
        let flags = request.flags.cast_unsigned();
        let wanted = libc::IFF_TAP | libc::IFF_VNET_HDR | libc::IFF_NO_PI;
        if libc::c_int::from(flags) & (wanted | libc::IFF_TUN) != wanted {
            return Err(TapError::Flags(name, flags));
        }
        let kernel = |action| move |source| TapError::Kernel { action, source };
        rustix::io::ioctl_fionbio(&file, true).map_err(|e| kernel("be made nonblocking")(e.into()))?;
        let mut size = libc::c_int::try_from(HEADER_LEN).unwrap_or(libc::c_int::MAX);
        // SAFETY: the kernel reads an int.
        unsafe { ioctl(&file, TUNSETVNETHDRSZ, &raw mut size) }.map_err(kernel("have virtio 1's headers"))?;
        Ok(Tap { file, flags, name })
    }

    /// A queue that is no tap's but carries datagrams likewise, where taps cannot be had.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn stand_in(file: OwnedFd) -> Tap {
        Tap { file: file.into(), flags: 0, name: "stand-in".to_owned() }
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the interface can have several queues.
    pub fn has_queues(&self) -> bool {
        libc::c_int::from(self.flags) & libc::IFF_MULTI_QUEUE != 0
    }

    /// Features of the guest that the kernel would make use of.
    pub fn guest_features(&self) -> u64 {
        let all = OFFLOADS.iter().fold(0, |all, (offload, _)| all | offload);
        let possible = [all, all & !USO, 0x0f, 0x01].into_iter().find(|mask| self.set(*mask).is_ok());
        if let Err(error) = self.set(0) {
            tracing::debug!(tap = self.name, %error, "a tap's offloads stay as they are");
        }
        features_of(possible.unwrap_or(0))
    }

    /// Has the kernel leave to the guest what it agreed to.
    pub fn offload(&self, features: u64) -> io::Result<()> {
        self.set(offloads_of(features))
    }

    fn set(&self, offloads: u32) -> io::Result<()> {
        #[cfg(any(test, feature = "fuzzing"))]
        if self.flags == 0 {
            return Ok(());
        }
        // SAFETY: the argument is a number.
        unsafe { ioctl(&self.file, TUNSETOFFLOAD, std::ptr::without_provenance_mut::<u8>(offloads as usize)) }
    }

    /// Has the kernel use this queue of several, or leave it out. One that is in that state already stays so.
    pub fn attach(&self, attached: bool) -> io::Result<()> {
        #[cfg(any(test, feature = "fuzzing"))]
        if self.flags == 0 {
            return Ok(());
        }
        let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let flags = libc::c_short::try_from(flags).unwrap_or(0);
        let mut request = Interface { name: [0; 16], flags, rest: [0; 22] };
        // SAFETY: the kernel reads a `struct ifreq`, which `Interface` is.
        match unsafe { ioctl(&self.file, TUNSETQUEUE, &raw mut request) } {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    /// Takes the next packet, with its header; what is longer than `into` is cut.
    pub fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.file).read(into) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Sends one packet, with its header.
    pub fn send(&self, packet: &Buffers<'_, ()>) -> io::Result<()> {
        packet.send(&self.file).map(drop)
    }

    /// The descriptor, for the kernel's own packet mover.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn features_of(offloads: u32) -> u64 {
    OFFLOADS.iter().filter(|(offload, _)| offloads & offload != 0).fold(0, |all, (_, bit)| all | 1 << bit)
}

fn offloads_of(features: u64) -> u32 {
    let offloads = OFFLOADS
        .iter()
        .filter(|(_, bit)| features >> bit & 1 == 1)
        .fold(0, |all, (offload, _)| all | offload);
    // One direction alone is refused; without checksums nothing else makes sense.
    match offloads {
        _ if offloads & 1 == 0 => 0,
        _ if offloads & USO != USO => offloads & !USO,
        _ => offloads,
    }
}

/// `struct ifreq`, as far as taps use it.
#[repr(C)]
struct Interface {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// # Safety
///
/// `argument` is what `request` takes.
unsafe fn ioctl<T>(file: &File, request: libc::c_ulong, argument: *mut T) -> io::Result<()> {
    // SAFETY: the caller's promise, and the descriptor is open.
    if unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
