//! Neighbours whose hardware addresses are known beforehand.

use std::net::IpAddr;

use super::link::{self, HardwareAddress};
use super::message::{CREATE, REPLACE, Request};
use super::prefix::family;
use super::{NetworkError, open};

const RTM_NEWNEIGH: u16 = 28;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// The entry neither ages nor is asked for.
pub const PERMANENT: u16 = 0x80;

/// Who is behind an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The address.
    pub address: IpAddr,
    /// Name of the link.
    pub device: String,
    /// The address on the link.
    pub hardware: HardwareAddress,
    /// `NUD_*`.
    pub state: u16,
    /// `NTF_*`.
    pub flags: u8,
}

/// Adds the neighbours, in place of what is known about their addresses.
///
/// # Errors
/// [`NetworkError::NoDevice`]; [`NetworkError::Netlink`] with the address.
pub fn add(neighbours: &[Neighbour]) -> Result<(), NetworkError> {
    let mut netlink = open()?;
    let links = link::list(&mut netlink)?;
    for Neighbour { address, device, hardware, state, flags } in neighbours {
        let [a, b, c, d] = link::by_name(&links, device)?.index.to_ne_bytes();
        let [low, high] = state.to_ne_bytes();
        let header = [family(*address), 0, 0, 0, a, b, c, d, low, high, *flags, 0];
        let request = Request::change(RTM_NEWNEIGH, CREATE | REPLACE, &header)
            .with_ip(NDA_DST, *address)
            .with(NDA_LLADDR, hardware.bytes());
        netlink
            .change(&request)
            .map_err(NetworkError::netlink(format!("adding neighbour {address} of device {device}")))?;
    }
    Ok(())
}
