//! What is in the namespace, what the machine has of it, and what the agent knows.

use kata_api::types::{ARPNeighbor, Interface, Route};
use kata_config::InternetworkingModel;
use kata_hypervisor::{HypervisorError, Nic, Vm};

use super::netlink::Netlink;
use super::scan::{Endpoint, Scan, foreign_tap, scan};
use super::vhost::Vhost;
use super::{NetworkError, Wiring, macvtap, tap};
use crate::agent_client::Agent;

/// The endpoints that the machine has or is about to get.
pub(super) struct Attachments {
    wiring: Wiring,
    vhost: Vhost,
    all: Vec<Attachment>,
    /// The routes that the agent has.
    told: Vec<Route>,
    /// The guest may have lost some of them since.
    stale: bool,
    released: bool,
}

struct Attachment {
    /// As it was when last looked at. Its hardware address and path are the device's, and stay.
    endpoint: Endpoint,
    /// What was made for it, as far as it was.
    join: Join,
    /// Its link is gone, and the machine cannot give the device back.
    orphan: bool,
    /// What the agent knows of it.
    told: Told,
}

/// What joins a link with the machine, and has to be removed again.
#[derive(Default)]
struct Join {
    /// The link that was made for the machine's end.
    made: Option<u32>,
    /// Redirections lead from the endpoint's link and from that one to the other.
    redirected: bool,
    /// The endpoint's link has a bound on what leaves by it.
    limited: bool,
}

#[derive(Default)]
struct Told {
    interface: Option<Interface>,
    neighbours: Vec<ARPNeighbor>,
}

impl Attachments {
    pub(super) fn new(wiring: Wiring) -> Self {
        let vhost = Vhost::new(wiring.vhost);
        Self { wiring, vhost, all: Vec::new(), told: Vec::new(), stale: false, released: false }
    }

    /// Attaches what is new. On an error nothing of it is left.
    pub(super) async fn attach(&mut self) -> Result<Vec<Nic>, NetworkError> {
        let (netlink, scan) = self.look().await?;
        self.connect(&netlink, scan.endpoints).await
    }

    async fn look(&self) -> Result<(Netlink, Scan), NetworkError> {
        if self.released {
            return Err(NetworkError::Released);
        }
        let netlink = Netlink::open()?;
        let known: Vec<u32> = self.all.iter().map(|attachment| attachment.endpoint.link).collect();
        let scan = scan(&netlink, &known).await?;
        Ok((netlink, scan))
    }

    async fn connect(
        &mut self,
        netlink: &Netlink,
        endpoints: Vec<Endpoint>,
    ) -> Result<Vec<Nic>, NetworkError> {
        let first = self.all.len();
        let mut nics = Vec::new();
        let mut fresh = Vec::new();
        for endpoint in endpoints {
            match self.all.iter_mut().find(|known| known.endpoint.link == endpoint.link) {
                Some(known) => known.endpoint.refresh(endpoint),
                None => fresh.push(endpoint),
            }
        }
        let own: Vec<u32> = self.all.iter().filter_map(|attachment| attachment.join.made).collect();
        // Before anything is redirected: it would be away from the other machine, for good.
        if !fresh.is_empty()
            && let Some(tap) = foreign_tap(netlink, &own).await?
        {
            return Err(NetworkError::InUse { tap });
        }
        for endpoint in fresh {
            if self.adopt(netlink, &endpoint).await? {
                continue;
            }
            // First of all in the list: whatever is made of it from here on, teardown takes.
            self.all.push(Attachment {
                endpoint,
                join: Join::default(),
                orphan: false,
                told: Told::default(),
            });
            let Some(attachment) = self.all.last_mut() else { continue };
            match attachment.connect(netlink, self.wiring).await {
                Ok(nic) => nics.push(Nic { vhost: self.vhost.files(nic.queues.len()), ..nic }),
                Err(error) => {
                    self.detach(first).await?;
                    return Err(error);
                }
            }
        }
        Ok(nics)
    }

    /// Joins a link with the device of one that has gone, if it is the same interface come back. The answer is whether it was.
    async fn adopt(&mut self, netlink: &Netlink, endpoint: &Endpoint) -> Result<bool, NetworkError> {
        let same = |known: &&mut Attachment| known.orphan && known.endpoint.mac == endpoint.mac;
        let Some(known) = self.all.iter_mut().find(same) else { return Ok(false) };
        let (Some(made), true) = (known.join.made, known.join.redirected) else { return Ok(false) };
        netlink.redirect(endpoint.link, made).await?;
        netlink.redirect(made, endpoint.link).await?;
        if known.join.limited {
            netlink.limit(endpoint.link, self.wiring.out_of_pod).await?;
        }
        known.endpoint.link = endpoint.link;
        known.endpoint.refresh(endpoint.clone());
        known.orphan = false;
        tracing::info!(link = endpoint.name(), "an interface came back");
        Ok(true)
    }

    /// Takes out of the machine what has gone from the namespace and plugs in what has come; the latter only if `newcomers`.
    pub(super) async fn plug(&mut self, vm: &dyn Vm, newcomers: bool) -> Result<(), NetworkError> {
        let (netlink, Scan { links, mut endpoints }) = self.look().await?;
        self.unplug(vm, &netlink, &links, &endpoints).await?;
        if !newcomers {
            endpoints.retain(|endpoint| self.all.iter().any(|known| known.endpoint.link == endpoint.link));
        }
        let first = self.all.len();
        let nics = self.connect(&netlink, endpoints).await?;
        self.insert(vm, first, nics).await
    }

    /// Plugs in the interfaces that were made for the attachments from the one at `first` on. Those that the machine does not take
    /// are taken away.
    pub(super) async fn insert(
        &mut self,
        vm: &dyn Vm,
        first: usize,
        nics: Vec<Nic>,
    ) -> Result<(), NetworkError> {
        for (at, nic) in (first..).zip(nics) {
            let plugged = vm.add_device(nic.into()).await;
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

    /// Takes devices out of the machine whose links are not among `links`, or have another hardware address by now: a device
    /// keeps the one it came with.
    async fn unplug(
        &mut self,
        vm: &dyn Vm,
        netlink: &Netlink,
        links: &[u32],
        endpoints: &[Endpoint],
    ) -> Result<(), NetworkError> {
        let mut at = 0;
        while let Some(attachment) = self.all.get_mut(at) {
            let Endpoint { link, mac, .. } = attachment.endpoint;
            let other = endpoints.iter().any(|now| now.link == link && now.mac != mac);
            if attachment.orphan || (links.contains(&link) && !other) {
                at += 1;
                continue;
            }
            let name = attachment.endpoint.name().to_owned();
            match vm.remove_device(&attachment.endpoint.device()).await {
                Ok(()) => {
                    tracing::warn!(
                        link = name,
                        "an interface has gone from the pod's network, and from its machine"
                    );
                    self.all.remove(at).disconnect(netlink).await?;
                }
                Err(error) => {
                    let error = crate::error::chain(&error);
                    tracing::warn!(
                        link = name,
                        error,
                        "an interface has gone from the pod's network; its machine keeps the device, without addresses"
                    );
                    attachment.leave(netlink).await?;
                    at += 1;
                }
            }
        }
        Ok(())
    }

    pub(super) async fn release(&mut self) -> Result<(), NetworkError> {
        self.released = true;
        self.detach(0).await
    }

    /// Takes away the attachments from the one at `first` on.
    async fn detach(&mut self, first: usize) -> Result<(), NetworkError> {
        if self.all.len() <= first {
            return Ok(());
        }
        let netlink = Netlink::open()?;
        let mut result = Ok(());
        for attachment in self.all.drain(first..) {
            result = result.and(attachment.disconnect(&netlink).await);
        }
        result
    }

    /// Tells the agent what is different from what it knows. The answer is whether anything was.
    pub(super) async fn tell(&mut self, agent: &Agent) -> Result<bool, NetworkError> {
        let mut any = false;
        for Attachment { endpoint, told, .. } in &mut self.all {
            if told.interface.as_ref() == Some(&endpoint.interface) {
                continue;
            }
            let refused =
                |source| NetworkError::Agent { what: format!("interface {}", endpoint.name()), source };
            agent.update_interface(&endpoint.interface).await.map_err(refused)?;
            told.interface = Some(endpoint.interface.clone());
            // Neighbours go with an interface that was set up anew, and routes with its addresses.
            told.neighbours.clear();
            self.stale |= self.told.iter().any(|route| route.device == endpoint.interface.name);
            any = true;
        }
        let refused = |what: &str| {
            let what = what.to_owned();
            move |source| NetworkError::Agent { what, source }
        };
        let routes = self.routes();
        if self.stale || routes != self.told {
            agent.update_routes(routes.clone()).await.map_err(refused("the routes"))?;
            self.told = routes;
            self.stale = false;
            any = true;
        }
        let new = |Attachment { endpoint, told, .. }: &Attachment| {
            let unknown = endpoint.neighbours.iter().filter(|one| !told.neighbours.contains(one));
            unknown.cloned().collect::<Vec<_>>()
        };
        let neighbours: Vec<_> = self.all.iter().flat_map(new).collect();
        if !neighbours.is_empty() {
            agent.add_neighbours(neighbours).await.map_err(refused("the neighbours"))?;
            for Attachment { endpoint, told, .. } in &mut self.all {
                told.neighbours.clone_from(&endpoint.neighbours);
            }
            any = true;
        }
        Ok(any)
    }

    /// All routes, for the agent replaces those it has. What a gateway is reached by comes before it; and among routes to
    /// one network, whose order is all that the agent's protocol has for a metric, the preferred one.
    fn routes(&self) -> Vec<Route> {
        let mut routes: Vec<_> =
            self.all.iter().flat_map(|attachment| attachment.endpoint.routes.iter()).collect();
        routes.sort_by_key(|ranked| (!ranked.route.gateway.is_empty(), ranked.metric));
        routes.into_iter().map(|ranked| ranked.route.clone()).collect()
    }
}

impl Attachment {
    /// Makes the machine's end and joins it with the link.
    async fn connect(&mut self, netlink: &Netlink, wiring: Wiring) -> Result<Nic, NetworkError> {
        let Endpoint { link, mac, mtu, given_tap, .. } = self.endpoint;
        let name = self.endpoint.name().to_owned();
        let queues = match wiring.model {
            _ if given_tap => self.take_tap(wiring)?,
            InternetworkingModel::MacVtap => self.macvtap(netlink, wiring).await?,
            InternetworkingModel::TcFilter | InternetworkingModel::None => {
                let tap = tap::make(wiring.queues)
                    .map_err(|source| NetworkError::Tap { link: name.clone(), source })?;
                let index = netlink.index_of(&tap.name).await?;
                self.join.made = Some(index);
                if wiring.model == InternetworkingModel::TcFilter {
                    self.join.redirected = true;
                    netlink.redirect(link, index).await?;
                    netlink.redirect(index, link).await?;
                }
                self.limit(netlink, wiring, index).await?;
                netlink.set_up(index, mtu).await?;
                tap.queues
            }
        };
        tracing::info!(link = name, model = wiring.model.as_str(), given_tap, "joined");
        Ok(Nic { id: self.endpoint.device(), mac, mtu, queues, vhost: Vec::new() })
    }

    fn take_tap(&self, wiring: Wiring) -> Result<Vec<std::os::fd::OwnedFd>, NetworkError> {
        let link = self.endpoint.name().to_owned();
        unlimited(&link, wiring, "it is a tap that was given, whose bounds are its giver's")?;
        tap::take(&link).map_err(|source| NetworkError::GivenTap { link, source })
    }

    async fn macvtap(
        &mut self,
        netlink: &Netlink,
        wiring: Wiring,
    ) -> Result<Vec<std::os::fd::OwnedFd>, NetworkError> {
        let Endpoint { link, mtu, .. } = self.endpoint;
        let of = self.endpoint.name().to_owned();
        unlimited(&of, wiring, "nothing queues on the way through a macvtap")?;
        let name = tap::macvtap_name(link);
        netlink.add_macvtap(link, &name).await?;
        let index = netlink.index_of(&name).await?;
        self.join.made = Some(index);
        netlink.set_up(index, mtu).await?;
        macvtap::open(&name, index, wiring.queues).map_err(|(step, source)| NetworkError::MacVtap {
            link: of,
            step,
            source,
        })
    }

    /// Holds both directions to their bounds.
    async fn limit(&mut self, netlink: &Netlink, wiring: Wiring, tap: u32) -> Result<(), NetworkError> {
        if wiring.into_pod > 0 {
            netlink.limit(tap, wiring.into_pod).await?;
        }
        if wiring.out_of_pod == 0 {
            return Ok(());
        }
        if !self.join.redirected {
            let only_into = Wiring { into_pod: 0, ..wiring };
            return unlimited(self.endpoint.name(), only_into, "its tap is joined with nothing here");
        }
        self.join.limited = true;
        netlink.limit(self.endpoint.link, wiring.out_of_pod).await
    }

    /// Parts the device, which stays in the machine, from its link.
    async fn leave(&mut self, netlink: &Netlink) -> Result<(), NetworkError> {
        self.orphan = true;
        self.endpoint.bare();
        // No link has this number.
        let link = std::mem::take(&mut self.endpoint.link);
        match self.join {
            Join { redirected: true, made: Some(made), .. } => {
                netlink.remove_redirection(made).await.and(netlink.remove_redirection(link).await)
            }
            _ => Ok(()),
        }
    }

    /// Undoes what was made. Links may be gone already.
    async fn disconnect(self, netlink: &Netlink) -> Result<(), NetworkError> {
        let mut result = Ok(());
        if self.join.redirected {
            result = netlink.remove_redirection(self.endpoint.link).await;
        }
        if self.join.limited {
            result = result.and(netlink.remove_limit(self.endpoint.link).await);
        }
        if let Some(made) = self.join.made {
            result = result.and(netlink.remove_link(made).await);
        }
        result
    }
}

/// Refuses bounds where they cannot be kept.
fn unlimited(link: &str, wiring: Wiring, reason: &'static str) -> Result<(), NetworkError> {
    let keys = [
        ("hypervisor.qemu.rx_rate_limiter_max_rate", wiring.into_pod),
        ("hypervisor.qemu.tx_rate_limiter_max_rate", wiring.out_of_pod),
    ];
    match keys.into_iter().find(|(_, rate)| *rate > 0) {
        Some((key, _)) => Err(NetworkError::Rate { link: link.to_owned(), key, reason }),
        None => Ok(()),
    }
}
