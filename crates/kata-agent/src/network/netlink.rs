//! The kernel's routing socket: requests that are acknowledged, dumps, and word that a link has changed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, connect, recv, send, socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::message::{Reply, Request, attributes, replies, text, u32_at};

/// The objects changed while they were dumped.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Attributes follow an error.
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The kernel's own words about an error.
const NLMSGERR_ATTR_MSG: u16 = 1;
const RTMGRP_LINK: u32 = 1;
/// The kernel sends no more at once.
const DATAGRAM: usize = 32 << 10;
/// How often a dump that changes meanwhile is begun anew.
const DUMPS: usize = 8;

/// The kernel did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket.
    #[error("{what}")]
    Socket {
        /// What was tried.
        what: &'static str,
        #[source]
        /// Why it failed.
        source: io::Error,
    },
    /// The request was refused.
    #[error("the kernel refused{}{words}", if words.is_empty() { "" } else { ": " })]
    Refused {
        /// The kernel's words; empty if it had none.
        words: String,
        #[source]
        /// Its error number.
        source: Errno,
    },
    /// An answer that is not understood.
    #[error("the kernel's answer makes no sense")]
    Malformed,
    /// The objects change faster than they can be listed.
    #[error("the list changed while it was read, {DUMPS} times in a row")]
    Unsteady,
}

impl NetlinkError {
    /// Whether the kernel refused with this error number.
    #[must_use]
    pub fn is(&self, errno: Errno) -> bool {
        matches!(self, Self::Refused { source, .. } if *source == errno)
    }
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> NetlinkError {
    move |source| NetlinkError::Socket { what, source: source.into() }
}

/// A connection to the kernel. The kernel works on a request while it is sent, so nothing here waits.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens one to the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn open() -> Result<Self, NetlinkError> {
        let socket = open(SocketFlags::CLOEXEC, 0)?;
        // Words with an error, and no copy of the request. A kernel that has neither still answers.
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            switch_on(&socket, option);
        }
        Ok(Self { socket, sequence: 0, buffer: vec![0; DATAGRAM] })
    }

    /// Has the kernel change something.
    ///
    /// # Errors
    /// [`NetlinkError::Refused`], or the connection's failure.
    pub fn change(&mut self, request: &Request) -> Result<(), NetlinkError> {
        self.exchange(request, |_| ())
    }

    /// Lists objects. `parse` takes one from its message; `None` if that makes no sense.
    ///
    /// # Errors
    /// [`NetlinkError::Malformed`] and what else may go wrong.
    pub fn dump<T>(
        &mut self,
        request: &Request,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..DUMPS {
            let mut objects = Vec::new();
            let mut steady = true;
            self.exchange(request, |reply| {
                steady &= reply.flags & NLM_F_DUMP_INTR == 0;
                objects.push(parse(reply.body));
            })?;
            if steady {
                return objects.into_iter().collect::<Option<_>>().ok_or(NetlinkError::Malformed);
            }
        }
        Err(NetlinkError::Unsteady)
    }

    /// Sends the request and hands on what is answered, until the kernel says that this was all.
    fn exchange(&mut self, request: &Request, mut take: impl FnMut(Reply<'_>)) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = request.encode(self.sequence);
        retry_on_intr(|| send(&self.socket, &message, SendFlags::empty()))
            .map_err(failed("sending to the routing socket"))?;
        loop {
            let received = retry_on_intr(|| recv(&self.socket, &mut *self.buffer, RecvFlags::empty()));
            let (length, _) = received.map_err(failed("receiving from the routing socket"))?;
            let mut understood = false;
            for reply in replies(self.buffer.get(..length).unwrap_or_default()) {
                understood = true;
                match reply.kind {
                    _ if reply.sequence != self.sequence => {}
                    NLMSG_ERROR | NLMSG_DONE => return verdict(reply),
                    _ => take(reply),
                }
            }
            if !understood {
                return Err(NetlinkError::Malformed);
            }
        }
    }
}

/// What the last message of an answer says.
fn verdict(reply: Reply<'_>) -> Result<(), NetlinkError> {
    let code = match u32_at(reply.body, 0) {
        Some(code) => code.cast_signed(),
        None if reply.kind == NLMSG_DONE => 0,
        None => return Err(NetlinkError::Malformed),
    };
    if code == 0 {
        return Ok(());
    }
    // An error repeats the header of the request first.
    let skipped = if reply.kind == NLMSG_ERROR { 4 + 16 } else { 4 };
    let rest = reply.body.get(skipped..).filter(|_| reply.flags & NLM_F_ACK_TLVS != 0).unwrap_or_default();
    let words = attributes(rest).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG);
    let words = words.map(|(_, value)| text(value)).unwrap_or_default();
    Err(NetlinkError::Refused { words, source: Errno::from_raw_os_error(code.saturating_neg()) })
}

fn open(flags: SocketFlags, groups: u32) -> Result<OwnedFd, NetlinkError> {
    // The routing protocol is number 0, which is also none.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
        .map_err(failed("opening a routing socket"))?;
    bind(&socket, &SocketAddrNetlink::new(0, groups)).map_err(failed("binding a routing socket"))?;
    // To the kernel: a container with rights over the network cannot answer in its place.
    connect(&socket, &SocketAddrNetlink::new(0, 0)).map_err(failed("connecting a routing socket"))?;
    Ok(socket)
}

fn switch_on(socket: &OwnedFd, option: libc::c_int) {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).unwrap_or_default();
    // SAFETY: the kernel reads one int, which `on` is.
    unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_NETLINK, option, (&raw const on).cast(), length)
    };
}

/// Wakes when a link comes, goes or changes.
#[derive(Debug)]
pub struct LinkEvents(AsyncFd<OwnedFd>);

impl LinkEvents {
    /// From now on.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn subscribe() -> Result<Self, NetlinkError> {
        let socket = open(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, RTMGRP_LINK)?;
        // SAFETY: the socket is owned here, and closed only after it was taken out of the set.
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        registered.map(Self).map_err(failed("waiting for link events"))
    }

    /// Returns when something has happened since the subscription or the last call. What it was is to be looked up.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub async fn changed(&self) -> Result<(), NetlinkError> {
        let mut ready = self.0.readable().await.map_err(failed("waiting for link events"))?;
        // Events that did not fit are an error once; they, too, mean that something has happened.
        while recv(self.0.get_ref(), &mut [0_u8; 16], RecvFlags::empty()) != Err(Errno::AGAIN) {}
        ready.clear_ready();
        Ok(())
    }
}
