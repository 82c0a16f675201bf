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
//! namespace's own protocol stack sees it (upstream calls this `tcfilter`). The machine gets the tap; the agent is told of
//! addresses, routes and neighbours. What is there is looked at once while the pod boots and once at the start of each
//! container, because some clients (`ctr run --cni`, Docker since 26) bring the interfaces between create and start. Nobody
//! waits for an interface: a namespace without any costs one listing.
//!
//! A tap lives as long as the files by which it is open, and a redirection as long as its link. So there is nothing to put
//! into the leak record: what a killed owner leaves on a link, the next one to use it replaces.

mod netlink;
mod scan;
mod tap;

use std::io;

use kata_api::types::Route;
use kata_hypervisor::{HypervisorError, Nic, Vm};
use tokio::sync::Mutex;

use self::netlink::Netlink;
use self::scan::{Endpoint, foreign_tap, scan};
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
            Self::Link { .. } | Self::Route { .. } | Self::InUse { .. } | Self::TooLate { .. } => {
                ErrorKind::Unimplemented
            }
            Self::Agent { source, .. } => source.kind(),
            Self::Released => ErrorKind::Unavailable,
            Self::Netlink { .. } | Self::Tap { .. } | Self::Plug { .. } => ErrorKind::Internal,
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
    pub(crate) fn new(spec: NetworkSpec) -> Self {
        Self { spec, attachments: Mutex::default() }
    }

    /// What the owner was told of it.
    pub(crate) fn spec(&self) -> &NetworkSpec {
        &self.spec
    }

    /// Connects every endpoint that is there with a tap. The taps are for the machine to boot with.
    pub(crate) async fn attach(&self) -> Result<Vec<Nic>, NetworkError> {
        self.attachments.lock().await.attach().await
    }

    /// Tells the agent what it was not told yet. The answer is whether there was anything.
    pub(crate) async fn tell(&self, agent: &Agent) -> Result<bool, NetworkError> {
        self.attachments.lock().await.tell(agent).await
    }

    /// Plugs into the running machine what has come into the namespace since the last look, and tells the agent. The answer
    /// is whether there was anything. After an error the next call tries again.
    pub(crate) async fn catch_up(&self, vm: &dyn Vm, agent: &Agent) -> Result<bool, NetworkError> {
        let mut attachments = self.attachments.lock().await;
        attachments.plug(vm).await?;
        attachments.tell(agent).await
    }

    /// Takes every tap and redirection away, for good.
    pub(crate) async fn release(&self) -> Result<(), NetworkError> {
        let mut attachments = self.attachments.lock().await;
        attachments.released = true;
        attachments.detach(0).await
    }
}

/// The endpoints that the machine has or is about to get.
#[derive(Default)]
struct Attachments {
    all: Vec<Attachment>,
    released: bool,
}

struct Attachment {
    endpoint: Endpoint,
    /// The tap's link, once there is one.
    tap: Option<u32>,
    /// Whether the agent knows.
    told: bool,
}

impl Attachments {
    /// Attaches what is new. On an error nothing of it is left.
    async fn attach(&mut self) -> Result<Vec<Nic>, NetworkError> {
        if self.released {
            return Err(NetworkError::Released);
        }
        let netlink = Netlink::open()?;
        let known: Vec<u32> = self.all.iter().map(|attachment| attachment.endpoint.link).collect();
        let first = self.all.len();
        let mut nics = Vec::new();
        let endpoints = scan(&netlink, &known).await?;
        let own: Vec<u32> = self.all.iter().filter_map(|attachment| attachment.tap).collect();
        // Before anything is redirected: it would be away from the other machine, for good.
        if !endpoints.is_empty()
            && let Some(tap) = foreign_tap(&netlink, &own).await?
        {
            return Err(NetworkError::InUse { tap });
        }
        for endpoint in endpoints {
            if let Some(attachment) = self.all.iter_mut().find(|known| known.endpoint.link == endpoint.link) {
                // A newcomer may have taken its default route.
                attachment.endpoint.routes = endpoint.routes;
                continue;
            }
            // First of all in the list: whatever is made of it from here on, teardown takes.
            self.all.push(Attachment { endpoint, tap: None, told: false });
            let Some(attachment) = self.all.last_mut() else { continue };
            match attachment.connect(&netlink).await {
                Ok(nic) => nics.push(nic),
                Err(error) => {
                    self.detach(first).await?;
                    return Err(error);
                }
            }
        }
        Ok(nics)
    }

    async fn plug(&mut self, vm: &dyn Vm) -> Result<(), NetworkError> {
        let first = self.all.len();
        let nics = self.attach().await?;
        for (at, nic) in (first..).zip(nics) {
            let plugged = vm.add_nic(nic).await;
            let Some(attachment) = self.all.get_mut(at) else { continue };
            let interface = &mut attachment.endpoint.interface;
            match plugged {
                Ok(path) => interface.device_path = path.0,
                Err(source) => {
                    let link = interface.name.clone();
                    self.detach(at).await?;
                    return Err(match source {
                        HypervisorError::Unsupported { .. } => {
                            NetworkError::TooLate { link, source: source.into() }
                        }
                        source => NetworkError::Plug { link, source: source.into() },
                    });
                }
            }
        }
        Ok(())
    }

    /// Takes away the attachments from the one at `first` on.
    async fn detach(&mut self, first: usize) -> Result<(), NetworkError> {
        if self.all.len() <= first {
            return Ok(());
        }
        let netlink = Netlink::open()?;
        let mut result = Ok(());
        for Attachment { endpoint, tap, .. } in self.all.drain(first..) {
            result = result.and(netlink.remove_redirection(endpoint.link).await);
            if let Some(tap) = tap {
                result = result.and(netlink.remove_link(tap).await);
            }
        }
        result
    }

    async fn tell(&mut self, agent: &Agent) -> Result<bool, NetworkError> {
        let new = || self.all.iter().filter(|attachment| !attachment.told).map(|new| &new.endpoint);
        if new().next().is_none() {
            return Ok(false);
        }
        for endpoint in new() {
            let refused =
                |source| NetworkError::Agent { what: format!("interface {}", endpoint.name()), source };
            agent.update_interface(&endpoint.interface).await.map_err(refused)?;
        }
        let refused = |what: &str| {
            let what = what.to_owned();
            move |source| NetworkError::Agent { what, source }
        };
        // The agent replaces the routes it has, so it is told of all. What a gateway is reached by comes before it.
        let mut routes: Vec<Route> =
            self.all.iter().flat_map(|attachment| attachment.endpoint.routes.iter().cloned()).collect();
        routes.sort_by_key(|route| !route.gateway.is_empty());
        if !routes.is_empty() {
            agent.update_routes(routes).await.map_err(refused("the routes"))?;
        }
        let neighbours: Vec<_> = new().flat_map(|endpoint| endpoint.neighbours.iter().cloned()).collect();
        if !neighbours.is_empty() {
            agent.add_neighbours(neighbours).await.map_err(refused("the neighbours"))?;
        }
        self.all.iter_mut().for_each(|attachment| attachment.told = true);
        Ok(true)
    }
}

impl Attachment {
    /// Makes the tap and joins it with the link.
    async fn connect(&mut self, netlink: &Netlink) -> Result<Nic, NetworkError> {
        let Endpoint { link, mac, mtu, interface, .. } = &self.endpoint;
        let tap = tap::open().map_err(|source| NetworkError::Tap { link: interface.name.clone(), source })?;
        let index = netlink.index_of(&tap.name).await?;
        self.tap = Some(index);
        netlink.redirect(*link, index).await?;
        netlink.redirect(index, *link).await?;
        netlink.set_up(index, *mtu).await?;
        tracing::info!(link = interface.name, tap = tap.name, "joined");
        // By number: a link's name may hold what no device's name can.
        Ok(Nic { id: format!("net{link}"), mac: *mac, mtu: *mtu, queues: vec![tap.file] })
    }
}

#[cfg(test)]
mod tests;
