//! The IP addresses of a link.

use std::net::{IpAddr, Ipv4Addr};

use rustix::io::Errno;

use super::NetworkError;
use super::message::{CREATE, REPLACE, Request, attributes, ip, u32_at};
use super::netlink::Netlink;
use super::prefix::Prefix;

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_NODAD: u8 = 0x02;
/// `family`, `prefix length`, `flags`, `scope` and the link.
const HEADER: usize = 8;

/// An address and the link that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Index of the link.
    pub link: u32,
    /// The address in its network.
    pub prefix: Prefix,
}

/// Every address of every link.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub fn list(netlink: &mut Netlink) -> Result<Vec<Address>, NetworkError> {
    netlink
        .dump(&Request::dump(RTM_GETADDR, &[0; HEADER]), parse)
        .map_err(NetworkError::netlink("listing addresses"))
}

/// Gives the link the addresses that are `wanted`, and no others.
///
/// # Errors
/// [`NetworkError::Netlink`] with the address.
pub fn replace(netlink: &mut Netlink, link: u32, wanted: &[Prefix]) -> Result<(), NetworkError> {
    let present = list(netlink)?;
    for Address { prefix, .. } in present.iter().filter(|it| it.link == link && !is_kernels(it.prefix)) {
        let request = request(RTM_DELADDR, 0, link, *prefix);
        match netlink.change(&request) {
            // It went with the first of its network.
            Err(error) if error.is(Errno::ADDRNOTAVAIL) => {}
            removed => removed.map_err(NetworkError::netlink(format!("removing address {prefix}")))?,
        }
    }
    for prefix in wanted {
        let mut request =
            request(RTM_NEWADDR, CREATE | REPLACE, link, *prefix).with_ip(IFA_ADDRESS, prefix.address);
        if let Some(broadcast) = broadcast(*prefix) {
            request = request.with_ip(IFA_BROADCAST, broadcast.into());
        }
        netlink.change(&request).map_err(NetworkError::netlink(format!("adding address {prefix}")))?;
    }
    Ok(())
}

/// Neighbour discovery does not work without the link-local address that the kernel gives to a link.
fn is_kernels(prefix: Prefix) -> bool {
    matches!(prefix.address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn request(kind: u16, flags: u16, link: u32, prefix: Prefix) -> Request {
    // That nobody else has the address was found out where it was given, on the host. A search for duplicates in the
    // guest would keep it from use for a second, and routes from naming it.
    let [a, b, c, d] = link.to_ne_bytes();
    let header = [prefix.family(), prefix.length, IFA_F_NODAD, 0, a, b, c, d];
    Request::change(kind, flags, &header).with_ip(IFA_LOCAL, prefix.address)
}

/// The last address of an IPv4 network that has one to spare.
fn broadcast(prefix: Prefix) -> Option<Ipv4Addr> {
    let IpAddr::V4(address) = prefix.address else { return None };
    let hosts = u32::MAX.checked_shr(prefix.length.into()).filter(|_| prefix.length <= 30)?;
    Some(Ipv4Addr::from_bits(address.to_bits() | hosts))
}

fn parse(body: &[u8]) -> Option<Address> {
    let length = *body.get(1)?;
    let link = u32_at(body, 4)?;
    let (mut local, mut address) = (None, None);
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            IFA_LOCAL => local = ip(value),
            IFA_ADDRESS => address = ip(value),
            _ => {}
        }
    }
    // Where the two differ, the second is the other end's.
    Some(Address { link, prefix: Prefix::new(local.or(address)?, length).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_networks_with_room_have_a_broadcast_address() {
        let of = |text: &str| broadcast(text.parse().unwrap()).map(|address| address.to_string());
        assert_eq!(of("10.0.0.2/24").as_deref(), Some("10.0.0.255"));
        assert_eq!(of("10.0.0.1/0").as_deref(), Some("255.255.255.255"));
        assert_eq!((of("10.0.0.2/31"), of("10.0.0.2/32"), of("fd00::2/64")), (None, None, None));
    }
}
