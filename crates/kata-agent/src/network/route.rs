//! Routes of the main table.

use std::net::IpAddr;

use rustix::io::Errno;

use super::link::{self, Link};
use super::message::{CREATE, Request, append_attribute, attributes, ip, u32_at};
use super::netlink::Netlink;
use super::prefix::{IPV4, IPV6, Prefix};
use super::{NetworkError, open};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTAX_MTU: u16 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
const RTPROT_KERNEL: u8 = 2;
const RTPROT_STATIC: u8 = 4;
const RTPROT_RA: u8 = 9;
const RTM_F_CLONED: u32 = 0x200;
/// The gateway is on the link, though no other route says so. The one flag that is not the kernel's to set.
const RTNH_F_ONLINK: u32 = 0x4;
const SCOPE_UNIVERSE: u8 = 0;
/// The destinations are neighbours.
const SCOPE_LINK: u8 = 253;
/// The kernel's choice for an IPv6 route without a metric.
const IPV6_PRIORITY: u32 = 1024;
/// `family`, lengths of the destination and the source, `tos`, table, protocol, scope, type; flags.
const HEADER: usize = 12;

/// A way to a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The network; of length 0 for the default route.
    pub destination: Prefix,
    /// The router; none for a network that is on the link.
    pub gateway: Option<IpAddr>,
    /// Name of the link.
    pub device: String,
    /// The address that packets to there preferably come from.
    pub source: Option<IpAddr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTNH_F_*`.
    pub flags: u32,
    /// Bytes; zero for the link's.
    pub mtu: u32,
}

/// A route as the kernel has it.
#[derive(Debug)]
struct Entry {
    route: Route,
    /// Zero for a route over several links.
    link: u32,
    priority: u32,
    protocol: u8,
    /// Whether it is one of those that this module is about.
    is_plain: bool,
}

/// The routes of the main table, IPv4 first.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub fn list() -> Result<Vec<Route>, NetworkError> {
    let mut netlink = open()?;
    let entries = entries(&mut netlink)?;
    let links = link::list(&mut netlink)?;
    let named = |Entry { link, route, .. }| {
        let link = links.iter().find(|known| known.index == link)?;
        Some(Route { device: link.name.clone(), ..route })
    };
    Ok(entries.into_iter().filter_map(named).collect())
}

/// Gives the guest these routes in place of those that it has, so that none is left of a device which has lost its last. The
/// kernel's own stay: they come and go with addresses and with the words of routers.
///
/// # Errors
/// [`NetworkError::NoDevice`] before anything is changed; [`NetworkError::Netlink`] with the route.
pub fn replace(mut routes: Vec<Route>) -> Result<(), NetworkError> {
    let mut netlink = open()?;
    let links = link::list(&mut netlink)?;
    // A gateway is only taken where it can be reached already.
    routes.sort_by_key(|route| route.gateway.is_some());
    let wanted = to_entries(routes, &links)?;
    for old in entries(&mut netlink)? {
        if [RTPROT_KERNEL, RTPROT_RA].contains(&old.protocol) {
            continue;
        }
        match netlink.change(&old.request(RTM_DELROUTE, 0)) {
            Err(error) if error.is(Errno::SRCH) => {}
            removed => removed.map_err(NetworkError::netlink(format!("removing route {}", old.route)))?,
        }
    }
    for new in wanted {
        match netlink.change(&new.request(RTM_NEWROUTE, CREATE)) {
            // The very same.
            Err(error) if error.is(Errno::EXIST) => {}
            added => added.map_err(NetworkError::netlink(format!("adding route {}", new.route)))?,
        }
    }
    Ok(())
}

/// Routes do not carry their metrics here, but come in the order of these. Routes to one network would otherwise be
/// the same to the kernel, and refused or merged.
fn to_entries(routes: Vec<Route>, links: &[Link]) -> Result<Vec<Entry>, NetworkError> {
    let mut entries: Vec<Entry> = Vec::with_capacity(routes.len());
    for mut route in routes {
        let link = link::by_name(links, &route.device)?.index;
        let rivals = entries.iter().filter(|entry| entry.route.destination == route.destination).count();
        let rank = u32::try_from(rivals).unwrap_or(u32::MAX);
        let is_ipv6 = route.destination.family() == IPV6;
        let priority = if is_ipv6 { IPV6_PRIORITY.saturating_add(rank) } else { rank };
        // The kernel looks for gateways behind routes of narrower scope only. A route without a gateway and of the
        // widest scope, which is also what a field left out says, would be of no use to others.
        if !is_ipv6 && route.gateway.is_none() && route.scope == SCOPE_UNIVERSE {
            route.scope = SCOPE_LINK;
        }
        entries.push(Entry { route, link, priority, protocol: RTPROT_STATIC, is_plain: true });
    }
    Ok(entries)
}

fn entries(netlink: &mut Netlink) -> Result<Vec<Entry>, NetworkError> {
    let mut entries = Vec::new();
    for family in [IPV4, IPV6] {
        let mut header = [0; HEADER];
        header[0] = family;
        let dump = netlink.dump(&Request::dump(RTM_GETROUTE, &header), parse);
        entries.extend(dump.map_err(NetworkError::netlink("listing routes"))?);
    }
    entries.retain(|entry| entry.is_plain);
    Ok(entries)
}

impl Entry {
    fn request(&self, kind: u16, flags: u16) -> Request {
        let Route { destination, gateway, source, scope, flags: route_flags, mtu, .. } = &self.route;
        let family = destination.family();
        let header = [family, destination.length, 0, 0, RT_TABLE_MAIN, self.protocol, *scope, RTN_UNICAST];
        let route_flags = (route_flags & RTNH_F_ONLINK).to_ne_bytes();
        let mut request = Request::change(kind, flags, &[&header[..], &route_flags].concat())
            .with_u32(RTA_OIF, self.link)
            .with_u32(RTA_PRIORITY, self.priority);
        if destination.length > 0 {
            request = request.with_ip(RTA_DST, destination.address);
        }
        if let Some(gateway) = gateway {
            request = request.with_ip(RTA_GATEWAY, *gateway);
        }
        if let Some(source) = source {
            request = request.with_ip(RTA_PREFSRC, *source);
        }
        if *mtu > 0 {
            let mut metrics = Vec::new();
            append_attribute(&mut metrics, RTAX_MTU, &mtu.to_ne_bytes());
            request = request.with(RTA_METRICS, &metrics);
        }
        request
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.destination)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " of device {}", self.device)
    }
}

fn parse(body: &[u8]) -> Option<Entry> {
    let &[family, length, _, _, table, protocol, scope, kind] = body.first_chunk()?;
    let flags = u32_at(body, 8)?;
    let any = if family == IPV4 { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
    let mut entry = Entry {
        route: Route {
            destination: Prefix::new(any, length).ok()?,
            gateway: None,
            device: String::new(),
            source: None,
            scope,
            flags,
            mtu: 0,
        },
        link: 0,
        priority: 0,
        protocol,
        is_plain: table == RT_TABLE_MAIN && kind == RTN_UNICAST && flags & RTM_F_CLONED == 0,
    };
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            RTA_DST => entry.route.destination.address = ip(value)?,
            RTA_OIF => entry.link = u32_at(value, 0)?,
            RTA_GATEWAY => entry.route.gateway = ip(value),
            RTA_PREFSRC => entry.route.source = ip(value),
            RTA_PRIORITY => entry.priority = u32_at(value, 0)?,
            RTA_METRICS => {
                let mtu = attributes(value).find(|(metric, _)| *metric == RTAX_MTU);
                entry.route.mtu = mtu.and_then(|(_, value)| u32_at(value, 0)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(entry)
}
