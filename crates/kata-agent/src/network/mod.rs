//! The guest's network: interfaces, routes and neighbours, as the host has them for the pod.
//!
//! ```text
//!  rpc ─▶ interface ─┬─▶ link        found by hardware address, also when it comes later
//!    │               └─▶ address
//!    ├──▶ route
//!    └──▶ neighbour              all ─▶ netlink ─▶ message    the kernel's routing socket
//! ```
//!
//! The containers of a pod share the guest's network, so everything is about the namespace of the agent itself.

mod address;
pub mod interface;
mod link;
mod message;
pub mod neighbour;
mod netlink;
mod prefix;
pub mod route;

use std::time::Duration;

pub use link::{HardwareAddress, NAME_MAX};
pub use netlink::NetlinkError;
pub use prefix::Prefix;

use netlink::Netlink;

/// A change of the guest's network that was not made.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host speaks of a device that the guest does not see.
    #[error(
        "no interface with hardware address {address} appeared within {within:?}; the guest has: {present}"
    )]
    NoLink {
        /// What it was to be found by.
        address: HardwareAddress,
        /// How long it was waited for.
        within: Duration,
        /// What there is.
        present: String,
    },
    /// A route or a neighbour of an interface that is not there.
    #[error("no interface {name:?}; the guest has: {present}")]
    NoDevice {
        /// The name.
        name: String,
        /// What there is.
        present: String,
    },
    /// A name that is taken for good.
    #[error("no interface can be called {0:?}: it is the name of the loopback")]
    LoopbackName(String),
    /// The kernel.
    #[error("{what}")]
    Netlink {
        /// What was tried.
        what: String,
        #[source]
        /// Why it failed.
        source: NetlinkError,
    },
}

impl NetworkError {
    fn netlink(what: impl Into<String>) -> impl FnOnce(NetlinkError) -> Self {
        move |source| Self::Netlink { what: what.into(), source }
    }
}

fn open() -> Result<Netlink, NetworkError> {
    Netlink::open().map_err(NetworkError::netlink("talking to the kernel about the network"))
}

#[cfg(test)]
mod tests;
