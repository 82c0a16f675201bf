//! Requests about the guest's network: texts of the protocol become addresses, and back.

use std::net::IpAddr;

use kata_api::agent as wire;
use kata_api::types;

use super::agent::Agent;
use super::error::RpcError;
use crate::aside;
use crate::network::interface::{self, Interface};
use crate::network::neighbour::{self, Neighbour, PERMANENT};
use crate::network::route::{self, Route};
use crate::network::{HardwareAddress, NAME_MAX, Prefix};

/// Drives the devices that the host gives to a guest.
const DRIVER: &str = "virtio_net";

/// Makes the interface of the hardware address what the host wants it to be.
///
/// # Errors
/// Texts that mean nothing, an interface that does not come, or what the kernel says.
pub async fn update_interface(
    agent: &Agent,
    request: wire::UpdateInterfaceRequest,
) -> Result<types::Interface, RpcError> {
    let wanted = request.interface.into_option();
    let wanted = wanted.ok_or_else(|| RpcError::Invalid("no interface in the request".to_owned()))?;
    let wanted = to_interface(&wanted)?;
    let modules = agent.modules.clone();
    aside::within(aside::BOUND, "loading the driver of interfaces", move || modules.want(DRIVER)).await??;
    let now = interface::update(&wanted, agent.settings.hotplug_timeout).await?;
    tracing::info!(interface = now.name, address = %now.hardware, "interface updated");
    Ok(from_interface(now))
}

/// All interfaces.
///
/// # Errors
/// What the kernel says.
pub fn list_interfaces() -> Result<wire::Interfaces, RpcError> {
    let interfaces = interface::list()?.into_iter().map(from_interface).collect();
    Ok(wire::Interfaces { interfaces, ..Default::default() })
}

/// Replaces the routes of all devices, and answers all there are.
///
/// # Errors
/// Texts that mean nothing, a device that is not there, or what the kernel says.
pub fn update_routes(request: &wire::UpdateRoutesRequest) -> Result<wire::Routes, RpcError> {
    let routes = request.routes.routes.iter().map(to_route).collect::<Result<_, _>>()?;
    route::replace(routes)?;
    list_routes()
}

/// The routes of the main table.
///
/// # Errors
/// What the kernel says.
pub fn list_routes() -> Result<wire::Routes, RpcError> {
    let routes = route::list()?.into_iter().map(from_route).collect();
    Ok(wire::Routes { routes, ..Default::default() })
}

/// Adds neighbours; those whose state is left open stay for good.
///
/// # Errors
/// Texts that mean nothing, a device that is not there, or what the kernel says.
pub fn add_neighbours(request: &wire::AddARPNeighborsRequest) -> Result<(), RpcError> {
    let neighbours = &request.neighbors.arp_neighbors;
    let neighbours: Vec<Neighbour> = neighbours.iter().map(to_neighbour).collect::<Result<_, _>>()?;
    Ok(neighbour::add(&neighbours)?)
}

fn to_interface(wanted: &types::Interface) -> Result<Interface, RpcError> {
    if wanted.name.len() > NAME_MAX {
        return Err(RpcError::Invalid(format!(
            "interface name {:?} is longer than {NAME_MAX} bytes",
            wanted.name
        )));
    }
    let addresses = wanted.ip_addresses.iter().map(|address| {
        let text = format!("{}/{}", address.address, address.mask);
        prefix("an address of the interface", &text)
    });
    Ok(Interface {
        name: wanted.name.clone(),
        hardware: hardware("the interface", &wanted.hw_addr)?,
        addresses: addresses.collect::<Result<_, _>>()?,
        mtu: number("mtu", wanted.mtu)?,
        flags: wanted.raw_flags,
    })
}

fn from_interface(interface: Interface) -> types::Interface {
    types::Interface {
        device: interface.name.clone(),
        name: interface.name,
        ip_addresses: interface.addresses.into_iter().map(from_prefix).collect(),
        mtu: interface.mtu.into(),
        hw_addr: interface.hardware.to_string(),
        raw_flags: interface.flags,
        ..Default::default()
    }
}

fn from_prefix(prefix: Prefix) -> types::IPAddress {
    types::IPAddress {
        family: family_of(prefix.address).into(),
        address: prefix.address.to_string(),
        mask: prefix.length.to_string(),
        ..Default::default()
    }
}

fn to_route(wanted: &types::Route) -> Result<Route, RpcError> {
    let destination = match (wanted.dest.as_str(), wanted.family.enum_value_or_default()) {
        ("", types::IPFamily::v4) => prefix("the default route", "0.0.0.0/0")?,
        ("", types::IPFamily::v6) => prefix("the default route", "::/0")?,
        (network, _) => prefix("the destination of a route", network)?,
    };
    let address = |what, text: &str| {
        let prefix = prefix(what, text)?;
        match prefix.address {
            address if !prefix.is_whole() => Err(RpcError::Invalid(format!(
                "{what} is one address, not the network {address}/{}",
                prefix.length
            ))),
            address if family_of(address) != family_of(destination.address) => Err(RpcError::Invalid(
                format!("{what} is {address}, which is not of the family of {destination}"),
            )),
            address => Ok(address),
        }
    };
    let given = |what, text: &str| Some(text).filter(|text| !text.is_empty()).map(|text| address(what, text));
    Ok(Route {
        destination,
        gateway: given("the gateway of a route", &wanted.gateway).transpose()?,
        device: wanted.device.clone(),
        source: given("the source of a route", &wanted.source).transpose()?,
        scope: number("scope", wanted.scope)?,
        flags: wanted.flags,
        mtu: wanted.mtu,
    })
}

fn from_route(route: Route) -> types::Route {
    let text = |address: Option<IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
    let Route { destination, gateway, device, source, scope, flags, mtu } = route;
    types::Route {
        // The default route has none.
        dest: if destination.length == 0 { String::new() } else { destination.to_string() },
        gateway: text(gateway),
        device,
        source: text(source),
        scope: scope.into(),
        family: family_of(destination.address).into(),
        flags,
        mtu,
        ..Default::default()
    }
}

fn to_neighbour(wanted: &types::ARPNeighbor) -> Result<Neighbour, RpcError> {
    let text = &wanted.to_ip_address.address;
    let address = prefix("the address of a neighbour", text)?.address;
    Ok(Neighbour {
        address,
        device: wanted.device.clone(),
        hardware: hardware("the neighbour", &wanted.lladdr)?,
        state: if wanted.state == 0 { PERMANENT } else { number("state of a neighbour", wanted.state)? },
        flags: number("flags of a neighbour", wanted.flags)?,
    })
}

fn family_of(address: IpAddr) -> types::IPFamily {
    if address.is_ipv4() { types::IPFamily::v4 } else { types::IPFamily::v6 }
}

fn prefix(what: &str, text: &str) -> Result<Prefix, RpcError> {
    text.parse().map_err(|error| RpcError::Invalid(format!("{what} is {text:?}: {error}")))
}

fn hardware(what: &str, text: &str) -> Result<HardwareAddress, RpcError> {
    text.parse().map_err(|error| RpcError::Invalid(format!("{what} has {text:?}: {error}")))
}

fn number<W: Copy + std::fmt::Display, N: TryFrom<W>>(what: &str, value: W) -> Result<N, RpcError> {
    N::try_from(value).map_err(|_| RpcError::Invalid(format!("{what} {value} is out of range")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire_route(dest: &str, gateway: &str, source: &str) -> types::Route {
        types::Route {
            dest: dest.into(),
            gateway: gateway.into(),
            source: source.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_route_without_a_destination_is_the_default_of_its_family() {
        let v4 = to_route(&wire_route("", "10.0.0.1", "")).unwrap();
        assert_eq!(v4.destination.to_string(), "0.0.0.0/0");
        let v6 = types::Route { family: types::IPFamily::v6.into(), ..wire_route("", "fd00::1", "") };
        let v6 = to_route(&v6).unwrap();
        assert_eq!(v6.destination.to_string(), "::/0");
        assert_eq!(from_route(v6).dest, "");
    }

    #[test]
    fn a_route_comes_back_as_it_was_said() {
        let route = types::Route {
            device: "eth0".into(),
            scope: 253,
            flags: 4,
            mtu: 1400,
            family: types::IPFamily::v6.into(),
            ..wire_route("fd01::/64", "fd00::1", "fd00::2")
        };
        assert_eq!(from_route(to_route(&route).unwrap()), route);
    }

    #[test]
    fn texts_that_mean_nothing_are_refused_with_what_they_were_for() {
        for (dest, gateway, source, part) in [
            ("10.0.0.0/99", "", "", "destination"),
            ("", "router", "", "gateway"),
            ("", "10.0.0.1/24", "", "gateway of a route is one address"),
            ("fd00::/64", "10.0.0.1", "", "not of the family of fd00::/64"),
            ("", "", "fd00::1", "source"),
        ] {
            let error = to_route(&wire_route(dest, gateway, source)).unwrap_err();
            assert!(matches!(&error, RpcError::Invalid(text) if text.contains(part)), "{part}: {error}");
        }
    }

    #[test]
    fn an_interface_is_checked_before_anything_is_done() {
        let good = types::Interface {
            name: "eth0".into(),
            hw_addr: "02:00:00:00:00:01".into(),
            ip_addresses: vec![from_prefix("fd00::2/64".parse().unwrap())],
            mtu: 1500,
            ..Default::default()
        };
        assert_eq!(to_interface(&good).unwrap().addresses[0].to_string(), "fd00::2/64");
        let long = types::Interface { name: "n".repeat(16), ..good.clone() };
        let nowhere = types::Interface { hw_addr: String::new(), ..good.clone() };
        let huge = types::Interface { mtu: 1 << 32, ..good.clone() };
        let address =
            types::IPAddress { address: "10.0.0.2".into(), mask: "255.0.0.0".into(), ..Default::default() };
        let masked = types::Interface { ip_addresses: vec![address], ..good };
        for bad in [long, nowhere, huge, masked] {
            assert!(matches!(to_interface(&bad), Err(RpcError::Invalid(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_neighbour_is_permanent_unless_it_says_otherwise() {
        let mut wanted = types::ARPNeighbor { lladdr: "02:00:00:00:00:01".into(), ..Default::default() };
        wanted.to_ip_address.mut_or_insert_default().address = "fd00::1".into();
        assert_eq!(to_neighbour(&wanted).unwrap().state, PERMANENT);
        wanted.state = 0x40;
        assert_eq!(to_neighbour(&wanted).unwrap().state, 0x40);
        wanted.flags = 256;
        assert!(matches!(to_neighbour(&wanted), Err(RpcError::Invalid(_))));
    }
}
