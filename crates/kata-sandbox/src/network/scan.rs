//! What of a network namespace concerns the guest, in the words of the agent's protocol.
//!
//! | in the namespace | for the guest |
//! |---|---|
//! | Ethernet links that are up | endpoints |
//! | loopback, taps, links that are down or a part of another link (bridge, bond) | nothing |
//! | addresses | addresses; not IPv6 link-local ones, which it makes itself |
//! | unicast routes of the main table | routes; not the kernel's own, which come with the addresses |
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
#[derive(Debug)]
pub(super) struct Endpoint {
    /// Its link in the namespace.
    pub(super) link: u32,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    pub(super) interface: Interface,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<ARPNeighbor>,
}

impl Endpoint {
    /// The link's name, on both sides.
    pub(super) fn name(&self) -> &str {
        &self.interface.name
    }
}

/// All endpoints, by link, if there is one whose link is not among `known`; else none.
pub(super) async fn scan(netlink: &Netlink, known: &[u32]) -> Result<Vec<Endpoint>, NetworkError> {
    let links = netlink.links().await?;
    let found: Result<Vec<Endpoint>, _> = links.iter().filter_map(endpoint).collect();
    let mut endpoints = found?;
    if endpoints.iter().all(|endpoint| known.contains(&endpoint.link)) {
        return Ok(Vec::new());
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
    Ok(endpoints)
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

fn endpoint(link: &LinkMessage) -> Option<Result<Endpoint, NetworkError>> {
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
    if header.link_layer_type != LinkLayerType::Ether || kind == Some(InfoKind::Tun) {
        return None;
    }
    if !header.flags.contains(LinkFlags::Up) {
        tracing::debug!(link = name, "a link that is down is left where it is");
        return None;
    }
    let unsupported = |reason| Some(Err(NetworkError::Link { link: name.clone(), reason }));
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
    Some(Ok(Endpoint { link: header.index, mac, mtu, interface, routes: Vec::new(), neighbours: Vec::new() }))
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
        endpoint.routes.push(Route {
            dest: format!("{remote}/{length}"),
            device: endpoint.interface.name.clone(),
            scope: u8::from(RouteScope::Link).into(),
            family: family(remote).into(),
            ..Default::default()
        });
        length = if address.is_ipv4() { 32 } else { 128 };
    }
    endpoint.interface.ip_addresses.push(ip_address(address, length.to_string()));
}

fn add_route(endpoints: &mut [Endpoint], message: &RouteMessage) -> Result<(), NetworkError> {
    let header = &message.header;
    if header.kind != RouteType::Unicast
        || header.protocol == RouteProtocol::Kernel
        || header.table != RouteHeader::RT_TABLE_MAIN
    {
        return Ok(());
    }
    let mut route = Route {
        scope: u8::from(header.scope).into(),
        flags: (header.flags & RouteFlags::Onlink).bits(),
        ..Default::default()
    };
    let (mut link, mut unsupported, mut destination) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
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
    let Some(endpoint) = link.and_then(|link| of_link(endpoints, link)) else { return Ok(()) };
    // No destination is the default route.
    let dest = destination.map(|address| format!("{address}/{}", header.destination_prefix_length));
    route.dest = dest.unwrap_or_default();
    if let Some(reason) = unsupported {
        let route = if route.dest.is_empty() { "default".to_owned() } else { route.dest };
        return Err(NetworkError::Route { route, link: endpoint.name().to_owned(), reason });
    }
    let v6 = header.address_family == super::netlink::packet::AddressFamily::Inet6;
    route.family = (if v6 { IPFamily::v6 } else { IPFamily::v4 }).into();
    endpoint.interface.name.clone_into(&mut route.device);
    endpoint.routes.push(route);
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
