//! The kernel's word that a pod's network has changed.
//!
//! A routing socket of the namespace is told of every change of links, addresses, routes and neighbours. What it was is not
//! read: whatever has been said by then is one reason to look. Under a storm there is one look in [`PAUSE`], and no message is
//! ever kept.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use kata_hypervisor::Vm;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::Network;
use crate::agent_client::Agent;

/// Least time between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// The same after a look that came to an error: nothing has changed by itself.
const PAUSE_AFTER_ERROR: Duration = Duration::from_secs(1);

/// Multicast groups of the routing socket, as bits.
const LINK: u32 = 1;
const NEIGHBOUR: u32 = 1 << 2;
const IPV4_ADDRESS: u32 = 1 << 4;
const IPV4_ROUTE: u32 = 1 << 6;
const IPV6_ADDRESS: u32 = 1 << 8;
const IPV6_ROUTE: u32 = 1 << 10;
const GROUPS: u32 = LINK | NEIGHBOUR | IPV4_ADDRESS | IPV4_ROUTE | IPV6_ADDRESS | IPV6_ROUTE;

/// Keeps the machine's network at what is in the namespace of the calling thread, as long as it runs. A machine that takes no
/// interfaces while it runs is told of what changes on those it has; a new one is then the next container's error.
pub(crate) async fn follow(network: &Network, vm: &dyn Vm, agent: &Agent, pod: &str) {
    let changes = match Changes::subscribe() {
        Ok(changes) => changes,
        Err(error) => {
            return tracing::warn!(pod, %error, "the pod's network is looked at only when a container starts");
        }
    };
    let mut said = String::new();
    // The first look is at what came since the boot, before anybody listened.
    loop {
        let begin = Instant::now();
        let pause = match network.keep_up(vm, agent).await {
            Ok(changed) => {
                if changed {
                    tracing::info!(pod, "the guest has the changes of the pod's network");
                }
                said.clear();
                PAUSE
            }
            Err(error) => {
                let error = crate::error::chain(&error);
                if error != said {
                    tracing::warn!(pod, error, "the guest does not have all of the pod's network");
                }
                said = error;
                // What was made and undone on the way was told, too, and is no reason to try again.
                changes.drain();
                PAUSE_AFTER_ERROR
            }
        };
        if let Err(error) = changes.next().await {
            return tracing::warn!(pod, %error, "the pod's network is no longer followed");
        }
        tokio::time::sleep_until(begin + pause).await;
    }
}

/// Changes of the calling thread's network namespace.
struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    fn subscribe() -> io::Result<Self> {
        // The routing protocol is number 0, which is also none.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        // SAFETY: the socket is owned here, and closed only after it was taken out of the set.
        Ok(Self(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?))
    }

    /// Waits for a change since the subscription or the last call.
    async fn next(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        self.drain();
        ready.clear_ready();
        Ok(())
    }

    /// Forgets what was told. Messages that did not fit are an error once, which is a change as well.
    fn drain(&self) {
        while recv(self.0.get_ref(), &mut [0_u8; 16], RecvFlags::empty()) != Err(Errno::AGAIN) {}
    }
}
