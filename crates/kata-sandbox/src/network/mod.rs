//! The pod's network: the interfaces of its network namespace, in the guest.
//!
//! ```text
//!   host              the pod's namespace, in which the owner lives                  guest
//!        ║   ┌──────────────────────────────────────────────────────┐
//!  veth ═╬═══╪═ eth0 ── ingress ── all redirected ──▶ tap0_kata ════╪══ virtio ══▶ eth0: same name, hardware
//!        ║   │       ◀─ all redirected ── ingress ──                │              address, MTU, addresses
//!            └──────────────────────────────────────────────────────┘
//! ```
//!
//! Each Ethernet link gets a tap, and each of the two sends on by the other whatever comes in on it, before the
//! namespace's own protocol stack sees it. That is `tcfilter`; how else the two can be joined is `internetworking_model`:
//!
//! | model | between link and machine |
//! |---|---|
//! | `tcfilter` | a tap, and filters that redirect each to the other |
//! | `macvtap` | a macvtap on the link, in mode passthru: the kernel's own device for this |
//! | `none` | a tap that is joined with nothing: whoever set the namespace up joins it |
//! | a tap that was there | given to the machine as it is, in every model |
//!
//! The machine gets the tap, and with it `/dev/vhost-net` where the host has it: then packets go from the tap to the guest's memory
//! and back without the machine monitor (`vhost`). The agent is told of addresses, routes and neighbours. What is there is looked at while the pod
//! boots, at the start of each container (some clients, as `ctr run --cni` and Docker since 26, bring the interfaces between
//! create and start), and whenever the kernel tells of a change (`watch`). Nobody waits for an interface: a namespace without
//! any costs one listing.
//!
//! ```text
//!  scan ─▶ Attachments: what is there, what the machine has, what the agent knows ─▶ plug, unplug ─▶ tell the difference
//! ```
//!
//! A tap lives as long as the files by which it is open, and a redirection as long as its link. So there is nothing to put
//! into the leak record: what a killed owner leaves on a link, the next one to use it replaces.

mod attachments;
mod loopback;
mod macvtap;
mod netlink;
mod scan;
mod tap;
mod vhost;
mod watch;

use std::io;

use kata_config::{Config, InternetworkingModel};
use kata_hypervisor::{DriverKind, HypervisorError, Nic, Vm};
use tokio::sync::Mutex;

use self::attachments::Attachments;
pub(crate) use self::loopback::lead as lead_loopback;
pub(crate) use self::watch::follow;
use crate::agent_client::{Agent, AgentError};
use crate::error::ErrorKind;
use crate::pod::NetworkSpec;

/// Why the pod's network cannot be carried to the guest.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused.
    #[error("cannot {action} in the pod's network namespace")]
    Netlink {
        /// What was asked.
        action: String,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// No tap.
    #[error("cannot make a tap for {link} from {} (is the kernel's module tun loaded?)", tap::TUN)]
    Tap {
        /// The link that it was for.
        link: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No macvtap.
    #[error(
        "cannot make a macvtap on {link} (runtime.internetworking_model = \"macvtap\"): {step} failed; \
         \"tcfilter\" needs less of the kernel"
    )]
    MacVtap {
        /// The link that it was for.
        link: String,
        /// What was tried.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A tap of the namespace that cannot be taken.
    #[error("the tap {link} of the pod's network namespace cannot be opened")]
    GivenTap {
        /// Its name.
        link: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A bound that the way of joining cannot keep.
    #[error(
        "{link} cannot be held to {key}: {reason}; use runtime.internetworking_model = \"tcfilter\", or set no rate"
    )]
    Rate {
        /// The link.
        link: String,
        /// The setting.
        key: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// A link that no virtual machine can have.
    #[error("the link {link} cannot be given to the guest: {reason}")]
    Link {
        /// Its name.
        link: String,
        /// Why.
        reason: &'static str,
    },
    /// A route that the agent's protocol has no words for.
    #[error("the route {route} of {link} cannot be given to the guest: {reason}")]
    Route {
        /// Its destination.
        route: String,
        /// The link by which it leaves.
        link: String,
        /// Why.
        reason: &'static str,
    },
    /// The namespace is another machine's.
    #[error(
        "the network namespace is in use by another virtual machine, whose tap is {tap}, and an interface can be mirrored \
         onto one only; give the container a network of its own (Docker: not --network container:…), or run it in that pod"
    )]
    InUse {
        /// The other machine's tap.
        tap: String,
    },
    /// A link that came too late for this machine.
    #[error(
        "{link} came into the pod's network namespace when the machine ran already, and this machine takes no more \
         interfaces: set hypervisor.qemu.machine_type = \"q35\", or set the network up before the container is created"
    )]
    TooLate {
        /// Its name.
        link: String,
        /// The driver's answer.
        #[source]
        source: Box<HypervisorError>,
    },
    /// The machine did not take an interface.
    #[error("{link} cannot be plugged into the running machine")]
    Plug {
        /// The name of its link.
        link: String,
        /// Why.
        #[source]
        source: Box<HypervisorError>,
    },
    /// The agent refused.
    #[error("the agent cannot set up {what}")]
    Agent {
        /// What it was told of.
        what: String,
        /// Its answer.
        #[source]
        source: AgentError,
    },
    /// There is no network any more.
    #[error("the pod's network is being taken down")]
    Released,
}

impl NetworkError {
    /// The class that a client sees.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Link { .. }
            | Self::Route { .. }
            | Self::InUse { .. }
            | Self::TooLate { .. }
            | Self::Rate { .. } => ErrorKind::Unimplemented,
            Self::Agent { source, .. } => source.kind(),
            Self::Released => ErrorKind::Unavailable,
            Self::Netlink { .. }
            | Self::Tap { .. }
            | Self::MacVtap { .. }
            | Self::GivenTap { .. }
            | Self::Plug { .. } => ErrorKind::Internal,
        }
    }
}

/// How links and the machine's interfaces are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wiring {
    model: InternetworkingModel,
    /// Queue pairs of each interface, at least one.
    queues: u16,
    /// Bits a second into the pod; zero is without a bound.
    into_pod: u64,
    /// Bits a second out of the pod; zero is without a bound.
    out_of_pod: u64,
    /// The host's kernel moves the packets, if it can.
    vhost: bool,
}

impl Wiring {
    /// As it is configured, for a machine of this driver.
    pub(crate) fn of(config: &Config, driver: DriverKind) -> Self {
        let qemu = &config.hypervisor.qemu;
        Self {
            model: config.runtime.internetworking_model,
            queues: u16::try_from(qemu.network_queues).unwrap_or(u16::MAX).max(1),
            into_pod: qemu.rx_rate_limiter_max_rate,
            out_of_pod: qemu.tx_rate_limiter_max_rate,
            vhost: driver.takes_vhost() && !qemu.disable_vhost_net,
        }
    }
}

/// The network of one pod.
pub(crate) struct Network {
    spec: NetworkSpec,
    /// Held as long as the guest's network changes, so that no container starts on half of it.
    attachments: Mutex<Attachments>,
}

impl Network {
    /// Nothing is done yet.
    pub(crate) fn new(spec: NetworkSpec, wiring: Wiring) -> Self {
        Self { spec, attachments: Mutex::new(Attachments::new(wiring)) }
    }

    /// What the owner was told of it.
    pub(crate) fn spec(&self) -> &NetworkSpec {
        &self.spec
    }

    /// Connects every endpoint that is there with a tap. The taps are for the machine to boot with.
    pub(crate) async fn attach(&self) -> Result<Vec<Nic>, NetworkError> {
        self.attachments.lock().await.attach().await
    }

    /// Plugs what [`attach`](Self::attach) has connected into a machine that started without it.
    pub(crate) async fn insert(&self, vm: &dyn Vm, nics: Vec<Nic>) -> Result<(), NetworkError> {
        self.attachments.lock().await.insert(vm, 0, nics).await
    }

    /// Tells the agent what it was not told yet. The answer is whether there was anything.
    pub(crate) async fn tell(&self, agent: &Agent) -> Result<bool, NetworkError> {
        self.attachments.lock().await.tell(agent).await
    }

    /// Brings the running machine to what is in the namespace now: plugs in what has come, takes out what has gone, and tells
    /// the agent what is different. The answer is whether there was anything. After an error the next call tries again.
    pub(crate) async fn catch_up(&self, vm: &dyn Vm, agent: &Agent) -> Result<bool, NetworkError> {
        let mut attachments = self.attachments.lock().await;
        attachments.plug(vm, true).await?;
        attachments.tell(agent).await
    }

    /// The same for what the machine can take while it runs. What it cannot is the error of the next container's start.
    async fn keep_up(&self, vm: &dyn Vm, agent: &Agent) -> Result<bool, NetworkError> {
        let mut attachments = self.attachments.lock().await;
        attachments.plug(vm, vm.capabilities().hotplug_network).await?;
        attachments.tell(agent).await
    }

    /// Takes every tap and redirection away, for good.
    pub(crate) async fn release(&self) -> Result<(), NetworkError> {
        self.attachments.lock().await.release().await
    }
}

#[cfg(test)]
mod tests;
