//! The kernel's word that something about its devices has changed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The multicast group that the kernel itself speaks to; group 2 is udev's.
const KERNEL: u32 = 1;

/// A subscription to the kernel's device events.
///
/// What an event says is not read: it is a reason to look at `/sys` again, and there stands the truth. So it does not
/// matter either that a privileged process of a container can send some, or that the kernel drops some in a flood.
#[derive(Debug)]
pub struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    /// Subscribes; events from now on are kept until asked for.
    ///
    /// # Errors
    /// A kernel without such events; too many open files.
    pub fn listen() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL))?;
        Self::of(socket)
    }

    /// Takes each datagram of a non-blocking socket for an event.
    pub(super) fn of(socket: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is owned here and stays the same until it is deregistered with this value.
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Returns once there were events that no former call has returned for; many at once count as one.
    ///
    /// # Errors
    /// The socket's.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let changed = drain(self.0.get_ref())?;
            ready.clear_ready();
            if changed {
                return Ok(());
            }
        }
    }
}

/// Takes all that waits; false if nothing did.
fn drain(socket: impl AsFd) -> io::Result<bool> {
    let mut changed = false;
    loop {
        // What does not fit is dropped with its datagram.
        match recv(&socket, &mut [0_u8; 1], RecvFlags::DONTWAIT) {
            // The kernel had more to say than the socket could keep.
            Ok(_) | Err(Errno::NOBUFS) => changed = true,
            Err(Errno::AGAIN) => return Ok(changed),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn many_events_wake_once_and_the_next_one_again() {
        let (kernel, socket) = UnixDatagram::pair().unwrap();
        let uevents = Uevents::of(socket.into()).unwrap();
        for _ in 0..3 {
            kernel.send(b"add@/devices/pci0000:00\0ACTION=add\0").unwrap();
        }
        uevents.changed().await.unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(20), uevents.changed()).await;
        assert!(quiet.is_err(), "all three were taken");
        kernel.send(b"remove@/devices\0").unwrap();
        uevents.changed().await.unwrap();
    }

    #[tokio::test]
    async fn the_kernel_can_be_listened_to() {
        if let Err(error) = Uevents::listen() {
            assert_eq!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT), "{error}");
            eprintln!("skipped: the kernel of this machine tells no device events");
        }
    }
}
