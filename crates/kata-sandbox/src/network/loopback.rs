//! The loopback of the pod's namespace on the host, led to the guest's.
//!
//! ```text
//!  host, in the pod's namespace                                                             guest
//!   client ── 127.0.0.1:8080 ──▶ steering program ──▶ one listener ══ vsock 1029 ══ agent ──▶ 127.0.0.1:8080
//!             (or [::1]:8080)    (BPF, sk_lookup)     of the owner
//! ```
//!
//! For a container without a machine `kubectl port-forward` is a client in the pod's namespace that dials `localhost`, and so
//! are those of containerd and CRI-O. Here nothing of the pod listens there: it is in the guest. So every TCP connection to
//! `127.0.0.1` or `::1` of this namespace, whatever its port, comes to the owner, who carries it to the same port in the
//! guest. Unused, it costs two listening sockets and no traffic.
//!
//! A port that nobody listens on is only known once the guest was asked, when the client is connected already: it is told
//! by a reset. Other addresses of the loopback network (Docker's resolver has 127.0.0.11) are left alone.

mod steering;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kata_api::{Forward, Forwarded, ports};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use self::steering::{Steering, SteeringError};
use crate::hybrid::{self, HybridError};

/// Connections at a time; further ones wait in the listener's queue.
const MOST: usize = 64;
/// Connections that may wait.
const BACKLOG: i32 = 128;
/// For the guest to say whether somebody listens. The agent gives each of two addresses 10 s.
const ANSWER_WITHIN: Duration = Duration::from_secs(25);
/// After a connection could not be taken.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Why the loopback is not led to the guest.
#[derive(Debug, thiserror::Error)]
enum LoopbackError {
    /// No listener.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: IpAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel does not take the program.
    #[error(transparent)]
    Steering(#[from] SteeringError),
}

/// Why one connection did not get through.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    /// The client is gone.
    #[error("the client is gone")]
    Client(#[source] io::Error),
    /// The agent cannot be reached, or has no such service.
    #[error("the guest's agent does not take ways to its loopback")]
    Agent(#[from] HybridError),
    /// The agent went before it answered.
    #[error("the guest's agent closed the way to its loopback before it answered; its log says why")]
    Broken(#[source] io::Error),
    /// The agent is stuck.
    #[error(
        "the guest's agent did not open a way to its loopback within {ANSWER_WITHIN:?}: the guest hangs or is overloaded; \
         see its console"
    )]
    NoAnswer,
    /// Nobody listens.
    #[error("nobody in the guest listens on port {0}")]
    Refused(u16),
    /// The agent's connection failed otherwise.
    #[error("the guest's agent cannot connect to port {0}; its log says why")]
    Failed(u16),
}

/// Leads the loopback of the calling thread's network namespace to the guest's as long as it runs. Where the kernel cannot do
/// that, it says so once and nothing is led.
pub(crate) async fn lead(hybrid: PathBuf, pod: String) {
    let opened = Loopback::open();
    match opened {
        Ok(loopback) => loopback.serve(&hybrid, &pod).await,
        Err(error) => tracing::warn!(
            pod,
            error = crate::error::chain(&error),
            "port forwarding does not reach the guest: it needs Linux 5.9 with BPF"
        ),
    }
}

struct Loopback {
    v4: TcpListener,
    /// `None` on a host without IPv6.
    v6: Option<TcpListener>,
    /// Detached when it is dropped.
    _steering: Steering,
}

impl Loopback {
    fn open() -> Result<Self, LoopbackError> {
        let v4 = listener(Ipv4Addr::LOCALHOST.into())?;
        let v6 = match listener(Ipv6Addr::LOCALHOST.into()) {
            Ok(v6) => Some(v6),
            Err(error) => {
                tracing::debug!(error = crate::error::chain(&error), "no IPv6 on this host");
                None
            }
        };
        let steering = Steering::attach(v4.as_fd(), v6.as_ref().map(AsFd::as_fd))?;
        Ok(Self { v4, v6, _steering: steering })
    }

    async fn serve(self, hybrid: &Path, pod: &str) {
        let places = Arc::new(Semaphore::new(MOST));
        // Dropped with this, and every connection with it.
        let mut connections = tokio::task::JoinSet::new();
        // Nobody closes the semaphore.
        while let Ok(place) = places.clone().acquire_owned().await {
            while connections.try_join_next().is_some() {}
            match self.accept().await {
                Ok(client) => {
                    let (hybrid, pod) = (hybrid.to_owned(), pod.to_owned());
                    connections.spawn(async move {
                        if let Err(error) = forward(client, &hybrid).await {
                            tracing::info!(
                                pod,
                                error = crate::error::chain(&error),
                                "a forwarded connection failed"
                            );
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(pod, %error, "cannot take a connection to forward");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<TcpStream> {
        let v6 = async {
            match &self.v6 {
                Some(v6) => v6.accept().await,
                None => std::future::pending().await,
            }
        };
        let (client, _) = tokio::select! {
            accepted = self.v4.accept() => accepted?,
            accepted = v6 => accepted?,
        };
        Ok(client)
    }
}

/// Carries one connection to the port of the guest that it was made to.
async fn forward(mut client: TcpStream, hybrid: &Path) -> Result<(), ForwardError> {
    let to = client.local_addr().map_err(ForwardError::Client)?;
    let guest = tokio::time::timeout(ANSWER_WITHIN, dial(to, hybrid)).await;
    let mut guest = match guest.unwrap_or(Err(ForwardError::NoAnswer)) {
        Ok(guest) => guest,
        Err(error) => {
            // A reset: the client is not to take it for an answer of no bytes.
            let _ = client.set_zero_linger();
            return Err(error);
        }
    };
    let _ = client.set_nodelay(true);
    // However it ends, that is between the two of them.
    let _ = copy_bidirectional(&mut client, &mut guest).await;
    Ok(())
}

/// The guest's end of a connection that was made to the address `to`.
async fn dial(to: SocketAddr, hybrid: &Path) -> Result<tokio::net::UnixStream, ForwardError> {
    let mut guest = hybrid::connect(hybrid, ports::FORWARD).await?.stream;
    let request = Forward { v6: to.is_ipv6(), port: to.port() };
    guest.write_all(&request.encode()).await.map_err(ForwardError::Broken)?;
    match Forwarded::decode(guest.read_u8().await.map_err(ForwardError::Broken)?) {
        Forwarded::Connected => Ok(guest),
        Forwarded::Refused => Err(ForwardError::Refused(to.port())),
        Forwarded::Failed => Err(ForwardError::Failed(to.port())),
    }
}

/// A listener on some port of `address`, which need not be there yet: the namespace's loopback may still be down.
fn listener(address: IpAddr) -> Result<TcpListener, LoopbackError> {
    let make = || -> io::Result<TcpListener> {
        let (family, level, free) = match address {
            IpAddr::V4(_) => (AddressFamily::INET, libc::IPPROTO_IP, libc::IP_FREEBIND),
            IpAddr::V6(_) => (AddressFamily::INET6, libc::IPPROTO_IPV6, libc::IPV6_FREEBIND),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        switch_on(socket.as_fd(), level, free)?;
        bind(&socket, &SocketAddr::new(address, 0))?;
        listen(&socket, BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    make().map_err(|source| LoopbackError::Listen { address, source })
}

fn switch_on(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).unwrap_or_default();
    // SAFETY: the kernel reads one int, which `on` is.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), length) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
