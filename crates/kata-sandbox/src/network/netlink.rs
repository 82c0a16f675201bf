//! rtnetlink, as far as a pod's network needs it. Everything that names its packet types does so through this module: they
//! change with almost every release.

use std::io;

use futures_util::{Stream, StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::{Handle, LinkMacVtap, LinkUnspec};

use self::packet::RouteNetlinkMessage;
use self::packet::address::AddressMessage;
use self::packet::link::{LinkMessage, MacVtapMode};
use self::packet::neighbour::NeighbourMessage;
use self::packet::route::RouteMessage;
use self::packet::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use super::NetworkError;

pub(super) use rtnetlink::packet_route as packet;

/// What an ingress queueing discipline is called by, and the parent of its filters.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };
/// `ETH_P_ALL`, in network order: packets of every protocol.
const EVERY_PROTOCOL: u16 = 0x0003_u16.to_be();

/// What a bound of ours is called by.
const LIMIT: TcHandle = TcHandle { major: 0x4b41, minor: 0 };
/// Options of `tbf`: its parameters, a rate of more than 32 bits, and its burst in bytes.
const TBF_PARMS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
/// Least burst in bytes: a frame that a guest leaves to the host to cut.
const LEAST_BURST: u32 = 64 << 10;

/// A connection to the network namespace of the calling thread.
pub(super) struct Netlink(Handle);

impl Netlink {
    pub(super) fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| failed("open a netlink socket", source))?;
        // It ends when the last handle is dropped.
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    pub(super) async fn links(&self) -> Result<Vec<LinkMessage>, NetworkError> {
        all("list the links", self.0.link().get().execute()).await
    }

    pub(super) async fn addresses(&self) -> Result<Vec<AddressMessage>, NetworkError> {
        all("list the addresses", self.0.address().get().execute()).await
    }

    /// The routes of all address families.
    pub(super) async fn routes(&self) -> Result<Vec<RouteMessage>, NetworkError> {
        all("list the routes", self.0.route().get(RouteMessage::default()).execute()).await
    }

    pub(super) async fn neighbours(&self) -> Result<Vec<NeighbourMessage>, NetworkError> {
        all("list the neighbours", self.0.neighbours().get().execute()).await
    }

    /// The index of the link called `name`.
    pub(super) async fn index_of(&self, name: &str) -> Result<u32, NetworkError> {
        let action = || format!("find the link {name}");
        let found = all(action(), self.0.link().get().match_name(name).execute()).await?;
        let link = found.first().ok_or_else(|| failed(action(), io::ErrorKind::NotFound.into()))?;
        Ok(link.header.index)
    }

    /// Sets a link up with the largest packet of `mtu` bytes.
    pub(super) async fn set_up(&self, link: u32, mtu: u16) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(link).mtu(mtu.into()).up().build();
        let set = self.0.link().set(message).execute().await;
        set.map_err(|error| failed(format!("set up link {link} with an MTU of {mtu}"), errno(error)))
    }

    /// Has everything that comes in on one link leave by the other. A redirection that was left there gives way.
    pub(super) async fn redirect(&self, from: u32, to: u32) -> Result<(), NetworkError> {
        match self.add_ingress(from).await {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.remove_redirection(from).await?;
                self.add_ingress(from).await
            }
            added => added,
        }
        .map_err(|source| failed(format!("add an ingress qdisc to link {from}"), source))?;
        let filter =
            self.0.traffic_filter(signed(from)).add().parent(INGRESS.into()).protocol(EVERY_PROTOCOL);
        let added = async { filter.redirect(to)?.execute().await }.await;
        added.map_err(|error| failed(format!("redirect link {from} to link {to}"), errno(error)))
    }

    async fn add_ingress(&self, link: u32) -> io::Result<()> {
        self.0.qdisc().add(signed(link)).ingress().execute().await.map_err(errno)
    }

    /// Removes what [`Self::redirect`] made. It may be gone, and its link too.
    pub(super) async fn remove_redirection(&self, link: u32) -> Result<(), NetworkError> {
        let mut request = self.0.qdisc().del(signed(link));
        let message = request.message_mut();
        (message.header.parent, message.header.handle) = (TcHandle::INGRESS, INGRESS);
        // By its kind, so that nobody else's (clsact sits at the same place) is taken for it.
        message.attributes.push(TcAttribute::Kind("ingress".to_owned()));
        let removed = request.execute().await.map_err(errno);
        // Invalid is what is not there any more, and what is of another kind.
        unless(&[libc::ENODEV, libc::ENOENT, libc::EINVAL], removed)
            .map_err(|source| failed(format!("remove the ingress qdisc of link {link}"), source))
    }

    /// Holds what leaves by a link to so many bits a second. A bound that was left there gives way; another queueing discipline
    /// does not.
    pub(super) async fn limit(&self, link: u32, bits: u64) -> Result<(), NetworkError> {
        match self.add_limit(link, bits).await {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.remove_limit(link).await?;
                self.add_limit(link, bits).await
            }
            added => added,
        }
        .map_err(|source| failed(format!("hold link {link} to {bits} bit/s"), source))
    }

    async fn add_limit(&self, link: u32, bits: u64) -> io::Result<()> {
        let mut message = TcMessage::with_index(signed(link));
        (message.header.parent, message.header.handle) = (TcHandle::ROOT, LIMIT);
        message.attributes.push(TcAttribute::Kind("tbf".to_owned()));
        message.attributes.push(TcAttribute::Options(token_bucket(bits)));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let mut answers = self.0.clone().request(request).map_err(errno)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return if error.code.is_some() { Err(error.to_io()) } else { Ok(()) };
            }
        }
        Ok(())
    }

    /// Removes what [`Self::limit`] made. It may be gone, and its link too.
    pub(super) async fn remove_limit(&self, link: u32) -> Result<(), NetworkError> {
        let mut request = self.0.qdisc().del(signed(link));
        let message = request.message_mut();
        (message.header.parent, message.header.handle) = (TcHandle::ROOT, LIMIT);
        message.attributes.push(TcAttribute::Kind("tbf".to_owned()));
        let removed = request.execute().await.map_err(errno);
        unless(&[libc::ENODEV, libc::ENOENT, libc::EINVAL], removed)
            .map_err(|source| failed(format!("remove the bound of link {link}"), source))
    }

    /// Puts a macvtap on a link, which then has all that comes in by it.
    pub(super) async fn add_macvtap(&self, link: u32, name: &str) -> Result<(), NetworkError> {
        let message = LinkMacVtap::new(name, link, MacVtapMode::Passthrough).build();
        let added = self.0.link().add(message).execute().await;
        added.map_err(|error| failed(format!("put the macvtap {name} on link {link}"), errno(error)))
    }

    /// Removes a link, if it is there.
    pub(super) async fn remove_link(&self, link: u32) -> Result<(), NetworkError> {
        let removed = self.0.link().del(link).execute().await.map_err(errno);
        unless(&[libc::ENODEV], removed).map_err(|source| failed(format!("remove link {link}"), source))
    }
}

/// Options of a `tbf` of so many bits a second: bursts of 10 ms, and a queue of 50 ms behind them.
fn token_bucket(bits: u64) -> Vec<TcOption> {
    let bytes = (bits / 8).max(1);
    let short = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let burst = short(bytes / 100).max(LEAST_BURST);
    let limit = burst.saturating_add(short(bytes / 20).max(LEAST_BURST));
    // struct tc_tbf_qopt: the rate, no peak rate, the limit, and two fields that the kernel takes from TBF_BURST.
    let mut parameters = Vec::with_capacity(36);
    // struct tc_ratespec: its last four bytes are the rate, its second says that links of Ethernet are meant.
    parameters.extend([0, 1, 0, 0, 0, 0, 0, 0]);
    parameters.extend(short(bytes).to_ne_bytes());
    parameters.extend([0; 12]);
    parameters.extend(limit.to_ne_bytes());
    parameters.extend([0; 8]);
    let option = |kind, value: Vec<u8>| TcOption::Other(DefaultNla::new(kind, value));
    let mut options = vec![option(TBF_PARMS, parameters), option(TBF_BURST, burst.to_ne_bytes().into())];
    if bytes >= u64::from(u32::MAX) {
        options.push(option(TBF_RATE64, bytes.to_ne_bytes().into()));
    }
    options
}

/// A whole listing.
async fn all<T>(
    action: impl Into<String>,
    listing: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>, NetworkError> {
    let listed: Result<Vec<T>, _> = std::pin::pin!(listing).try_collect().await;
    listed.map_err(|error| failed(action, errno(error)))
}

fn failed(action: impl Into<String>, source: io::Error) -> NetworkError {
    NetworkError::Netlink { action: action.into(), source }
}

/// The kernel's answer without the words around it.
fn errno(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// The result, but for these errors.
fn unless(expected: &[i32], result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error().is_some_and(|code| expected.contains(&code)) => Ok(()),
        other => other,
    }
}

/// Traffic control counts links with a sign.
fn signed(link: u32) -> i32 {
    i32::try_from(link).unwrap_or_default()
}
