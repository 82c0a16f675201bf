//! rtnetlink, as far as a pod's network needs it. Everything that names its packet types does so through this module: they
//! change with almost every release.

use std::io;

use futures_util::{Stream, TryStreamExt};
use rtnetlink::{Handle, LinkUnspec};

use self::packet::address::AddressMessage;
use self::packet::link::LinkMessage;
use self::packet::neighbour::NeighbourMessage;
use self::packet::route::RouteMessage;
use self::packet::tc::{TcAttribute, TcHandle};
use super::NetworkError;

pub(super) use rtnetlink::packet_route as packet;

/// What an ingress queueing discipline is called by, and the parent of its filters.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };
/// `ETH_P_ALL`, in network order: packets of every protocol.
const EVERY_PROTOCOL: u16 = 0x0003_u16.to_be();

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

    /// Removes a link, if it is there.
    pub(super) async fn remove_link(&self, link: u32) -> Result<(), NetworkError> {
        let removed = self.0.link().del(link).execute().await.map_err(errno);
        unless(&[libc::ENODEV], removed).map_err(|source| failed(format!("remove link {link}"), source))
    }
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
