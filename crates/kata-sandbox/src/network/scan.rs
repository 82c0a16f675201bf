//! What of a network namespace concerns the guest, in the words of the agent's protocol.
//!
//! | in the namespace | for the guest |
//! |---|---|
//! | Ethernet links that are up: veth, macvlan, ipvlan, VLAN, a bridge, a card that was moved here | endpoints |
//! | a tap that is up and that nobody has open | an endpoint; the machine gets the tap itself |
//! | other links that are up (tunnels without Ethernet) | refused |
//! | loopback, taps in use, links that are down or a part of another link (bridge, bond) | nothing |
//! | addresses | addresses; not IPv6 link-local ones, which it makes itself |
//! | unicast routes of the main table | routes; not the kernel's own, which come with the addresses |
//! | routes of several hops, through another family, that drop what they match | refused |
//! | routes of other tables, rules | nothing, and said so: the guest has one table |
//! | permanent neighbours | neighbours |

use std::net::IpAddr;

use kata_api::types::{ARPNeighbor, IPAddress, IPFamily, Interface, Route};

use super::NetworkError;
use super::netlink::Netlink;
use super::netlink::packet::address::{AddressAttribute, AddressMessage};
use super::netlink::packet::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use super::netlink::packet::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use super::netlink::packet::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};
use super::tap::is_of_a_machine;

/// An interface that the guest shall have, and all that belongs to it.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// Its link in the namespace.
    pub(super) link: u32,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    /// The link is itself a tap that the machine can have.
    pub(super) given_tap: bool,
    pub(super) interface: Interface,
    pub(super) routes: Vec<RankedRoute>,
    pub(super) neighbours: Vec<ARPNeighbor>,
}

/// A route, and how far it stands back behind others to the same network.
#[derive(Clone, Debug)]
pub(super) struct RankedRoute {
    pub(super) metric: u32,
    pub(super) route: Route,
}

/// What there is.
pub(super) struct Scan {
    /// Every link, whatever it is.
    pub(super) links: Vec<u32>,
    /// In the order of their links.
    pub(super) endpoints: Vec<Endpoint>,
}

impl Endpoint {
    /// The link's name, on both sides.
    pub(super) fn name(&self) -> &str {
        &self.interface.name
    }

    /// Its name among the machine's devices. By number: a link's name may hold what no device's name can.
    pub(super) fn device(&self) -> String {
        format!("net{}", self.link)
    }

    /// Takes over what can change in the life of a device: not its hardware address, and no larger packets than it came with.
    pub(super) fn refresh(&mut self, now: Self) {
        let Self { mtu, interface, routes, neighbours, .. } = now;
        self.interface = Interface {
            hw_addr: std::mem::take(&mut self.interface.hw_addr),
            device_path: std::mem::take(&mut self.interface.device_path),
            mtu: mtu.min(self.mtu).into(),
            ..interface
        };
        (self.routes, self.neighbours) = (routes, neighbours);
    }

    /// As a device without a link.
    pub(super) fn bare(&mut self) {
        self.interface.ip_addresses.clear();
        self.routes.clear();
        self.neighbours.clear();
    }
}

/// Looks at the namespace, of whose links `known` are the machine's already.
pub(super) async fn scan(netlink: &Netlink, known: &[u32]) -> Result<Scan, NetworkError> {
    let messages = netlink.links().await?;
    let links = messages.iter().map(|link| link.header.index).collect();
    let found: Result<Vec<Endpoint>, _> =
        messages.iter().filter_map(|link| endpoint(link, known.contains(&link.header.index))).collect();
    let mut endpoints = found?;
    if endpoints.is_empty() {
        return Ok(Scan { links, endpoints });
    }
    endpoints.sort_by_key(|endpoint| endpoint.link);
    for address in netlink.addresses().await? {
        if let Some(endpoint) = of_link(&mut endpoints, address.header.index) {
            add_address(endpoint, &address);
        }
    }
    for route in netlink.routes().await? {
        add_route(&mut endpoints, &route)?;
    }
    for neighbour in netlink.neighbours().await? {
        if let Some(endpoint) = of_link(&mut endpoints, neighbour.header.ifindex) {
            endpoint.neighbours.extend(permanent_neighbour(endpoint.name(), &neighbour));
        }
    }
    Ok(Scan { links, endpoints })
}

/// A tap that is there for another machine than the one whose taps are `own`. It lives as long as that machine.
pub(super) async fn foreign_tap(netlink: &Netlink, own: &[u32]) -> Result<Option<String>, NetworkError> {
    let links = netlink.links().await?;
    let foreign = links.iter().filter(|link| !own.contains(&link.header.index));
    Ok(foreign.filter_map(name).find(|name| is_of_a_machine(name)).map(str::to_owned))
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn of_link(endpoints: &mut [Endpoint], link: u32) -> Option<&mut Endpoint> {
    endpoints.iter_mut().find(|endpoint| endpoint.link == link)
}

fn endpoint(link: &LinkMessage, known: bool) -> Option<Result<Endpoint, NetworkError>> {
    let name = name(link).unwrap_or_default().to_owned();
    let (mut kind, mut mac, mut mtu) = (None, None, 0);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            LinkAttribute::Controller(_) => return None,
            _ => {}
        }
    }
    let header = &link.header;
    let given_tap = kind == Some(InfoKind::Tun);
    if header.link_layer_type == LinkLayerType::Loopback || kind == Some(InfoKind::MacVtap) {
        return None;
    }
    // Of a tap that somebody has open, the carrier is on.
    let in_use = header.flags.contains(LinkFlags::LowerUp) && !known;
    if given_tap && (in_use || is_of_a_machine(&name)) {
        return None;
    }
    if !header.flags.contains(LinkFlags::Up) {
        tracing::debug!(link = name, "a link that is down is left where it is");
        return None;
    }
    let unsupported = |reason| Some(Err(NetworkError::Link { link: name.clone(), reason }));
    if header.link_layer_type != LinkLayerType::Ether {
        return unsupported(
            "it carries no Ethernet frames, and a machine's interfaces do; take it down if the pod does not need it",
        );
    }
    let Some(mac) = mac else { return unsupported("it has no hardware address of 6 bytes") };
    let Ok(mtu) = u16::try_from(mtu) else { return unsupported("its MTU is more than 65535 bytes") };
    let interface = Interface {
        device: name.clone(),
        name,
        mtu: mtu.into(),
        hw_addr: hardware_address(&mac),
        type_: kind.map(|kind| kind.to_string()).unwrap_or_default(),
        raw_flags: (header.flags & LinkFlags::Noarp).bits(),
        ..Default::default()
    };
    let (routes, neighbours) = (Vec::new(), Vec::new());
    Some(Ok(Endpoint { link: header.index, mac, mtu, given_tap, interface, routes, neighbours }))
}

fn add_address(endpoint: &mut Endpoint, message: &AddressMessage) {
    let (mut local, mut remote) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => remote = Some(*address),
            _ => {}
        }
    }
    let Some(address) = local.or(remote) else { return };
    if matches!(address, IpAddr::V6(address) if address.is_unicast_link_local()) {
        return;
    }
    let mut length = message.header.prefix_len;
    // Of a point-to-point link the prefix is the other end's, and the guest is not told of that: a route has to say it.
    if let Some(remote) = remote.filter(|remote| *remote != address) {
        let route = Route {
            dest: format!("{remote}/{length}"),
            device: endpoint.interface.name.clone(),
            scope: u8::from(RouteScope::Link).into(),
            family: family(remote).into(),
            ..Default::default()
        };
        endpoint.routes.push(RankedRoute { metric: 0, route });
        length = if address.is_ipv4() { 32 } else { 128 };
    }
    endpoint.interface.ip_addresses.push(ip_address(address, length.to_string()));
}

fn add_route(endpoints: &mut [Endpoint], message: &RouteMessage) -> Result<(), NetworkError> {
    let header = &message.header;
    let drops = matches!(
        header.kind,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw
    );
    if header.protocol == RouteProtocol::Kernel || (header.kind != RouteType::Unicast && !drops) {
        return Ok(());
    }
    if header.table != RouteHeader::RT_TABLE_MAIN {
        tracing::debug!(
            table = header.table,
            "a route of another table than the main one is not the guest's"
        );
        return Ok(());
    }
    let mut route = Route {
        scope: u8::from(header.scope).into(),
        flags: (header.flags & RouteFlags::Onlink).bits(),
        ..Default::default()
    };
    let (mut link, mut unsupported, mut destination, mut metric) = (None, None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => {
                route.gateway = ip(address).map(|address| address.to_string()).unwrap_or_default();
            }
            RouteAttribute::PrefSource(address) => {
                route.source = ip(address).map(|address| address.to_string()).unwrap_or_default();
            }
            RouteAttribute::Metrics(metrics) => route.mtu = metrics.iter().find_map(mtu).unwrap_or_default(),
            RouteAttribute::Via(_) => unsupported = Some("its gateway is of another address family"),
            RouteAttribute::MultiPath(hops) => {
                link = hops.first().map(|hop| hop.interface_index);
                unsupported = Some("it has several next hops");
            }
            _ => {}
        }
    }
    // No destination is the default route.
    let dest = destination.map(|address| format!("{address}/{}", header.destination_prefix_length));
    route.dest = dest.unwrap_or_default();
    let refused = |route: Route, link: &str, reason| {
        let route = if route.dest.is_empty() { "default".to_owned() } else { route.dest };
        Err(NetworkError::Route { route, link: link.to_owned(), reason })
    };
    if drops {
        return refused(
            route,
            "the namespace",
            "it drops what it matches, and the agent's protocol has no word for that",
        );
    }
    let Some(endpoint) = link.and_then(|link| of_link(endpoints, link)) else { return Ok(()) };
    if let Some(reason) = unsupported {
        return refused(route, endpoint.name(), reason);
    }
    let v6 = header.address_family == super::netlink::packet::AddressFamily::Inet6;
    route.family = (if v6 { IPFamily::v6 } else { IPFamily::v4 }).into();
    endpoint.interface.name.clone_into(&mut route.device);
    endpoint.routes.push(RankedRoute { metric, route });
    Ok(())
}

fn mtu(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(bytes) => Some(*bytes),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn permanent_neighbour(device: &str, message: &NeighbourMessage) -> Option<ARPNeighbor> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::from(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::from(*v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(hardware_address(bytes)),
            _ => {}
        }
    }
    Some(ARPNeighbor {
        to_ip_address: Some(ip_address(address?, String::new())).into(),
        device: device.to_owned(),
        lladdr: mac?,
        state: u16::from(message.header.state).into(),
        flags: message.header.flags.bits().into(),
        ..Default::default()
    })
}

/// An address; `mask` is the length of its prefix in decimal.
fn ip_address(address: IpAddr, mask: String) -> IPAddress {
    IPAddress { family: family(address).into(), address: address.to_string(), mask, ..Default::default() }
}

fn family(address: IpAddr) -> IPFamily {
    if address.is_ipv4() { IPFamily::v4 } else { IPFamily::v6 }
}

fn hardware_address(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}
