//! The device: its streams, the host sockets it watches and the two queues it serves.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use thiserror::Error;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::{BS, BitmapSlice};
use vm_memory::{GuestMemory, Permissions};

use super::HOST_CID;
use super::host::{Host, Request, discard_unread, read_request};
use super::packet::{HEADER_LEN, Header, MAX_PAYLOAD, Op, TYPE_STREAM, read_header};
use super::stream::{Fate, Ports, Stream};
use crate::virtio::buffers::{Buffers, ChainError};
use crate::virtio::ring::{QueueFault, next_chain, wants_interrupt};

/// Most host sockets, whatever their state.
const MAX_PEERS: usize = 1024;
/// Most clients that have not said yet which port they want. More of them wait in the listen queue.
const MAX_HANDSHAKES: usize = 64;
/// Resets waiting for a receive buffer at which the guest's packets are left in the transmit queue.
const MAX_RESETS: usize = 256;

/// Receive window of a stream: what keeps a guest busy while the host is scheduled.
const MAX_WINDOW: usize = 256 * 1024;
const MIN_WINDOW: usize = 4 * 1024;
/// Sum of the windows that streams get in full; beyond it they get ever smaller ones, at last [`MIN_WINDOW`].
const WINDOW_BUDGET: usize = 32 * 1024 * 1024;

/// How long a client may take to say which port it wants.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// How long a guest may take to answer that both directions are closed; Linux waits as long for us.
const CLOSE_TIME: Duration = Duration::from_secs(8);

/// First port that host clients get: far from those that services listen on, and from Linux's guest-side choices.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Epoll tokens; peers count from [`FIRST_PEER`].
const LISTENER: PeerId = 0;
const TIMER: PeerId = 1;
const FIRST_PEER: PeerId = 2;

/// Host sockets whose events are taken at once.
const EVENT_BATCH: usize = 64;

/// Names a host socket. Never used twice, so an event of a closed socket finds nobody.
type PeerId = u64;

/// What a [`Vsock`] is made of.
#[derive(Debug)]
pub struct VsockConfig {
    /// Context id of the guest: at least 3.
    pub guest_cid: u64,
    /// A listening unix socket; clients connect here to reach the guest.
    pub listener: OwnedFd,
    /// Its path. The guest's connections go to sockets beside it.
    pub path: PathBuf,
}

/// Why there is no device.
#[derive(Debug, Error)]
pub enum VsockError {
    /// The context id belongs to somebody else (virtio 1.2, section 5.10.4).
    #[error("guest CID {0} is reserved: use one from 3 to 4294967294")]
    Cid(u64),
    /// The names of sockets beside the path do not fit a socket address.
    #[error("the socket path {} is too long: with a port appended it must stay below 108 bytes", .0.display())]
    PathTooLong(PathBuf),
    /// The kernel refused a descriptor.
    #[error("the vsock device cannot {action}")]
    Setup {
        /// What it refused.
        action: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What became of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Serviced {
    /// Packets it carried.
    pub packets: u16,
    /// The driver wants to be interrupted.
    pub interrupt: bool,
    /// There is more to do at once; the budget of one call is spent.
    pub more: bool,
}

/// Somebody at a host socket.
enum Peer {
    Handshake(UnixStream),
    Stream(Stream),
}

/// The device.
pub struct Vsock {
    guest_cid: u64,
    host: Host,
    epoll: OwnedFd,
    timer: OwnedFd,

    peers: HashMap<PeerId, Peer>,
    /// Streams the guest knows or is about to learn of.
    streams: HashMap<Ports, PeerId>,
    next_peer: PeerId,
    next_port: u32,
    handshakes: usize,
    /// Clients may wait in the listen queue.
    clients_wait: bool,
    /// Sum of the windows of all streams.
    windows: usize,

    /// Streams that have something for the guest, in the order of service; each is in it at most once.
    ready: VecDeque<PeerId>,
    /// Resets that belong to no stream.
    resets: VecDeque<Header>,
    /// The transmit queue is left alone until resets went out.
    blocked: bool,
    deadlines: BTreeSet<(Instant, PeerId)>,
    due: HashMap<PeerId, Instant>,
}

impl Vsock {
    /// Virtio features this device has, including those of its queues.
    pub const FEATURES: u64 =
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

    /// A device without a driver yet. Clients may connect; they wait until there is one.
    pub fn new(config: VsockConfig) -> Result<Vsock, VsockError> {
        if !(3..u64::from(u32::MAX)).contains(&config.guest_cid) {
            return Err(VsockError::Cid(config.guest_cid));
        }
        let host = Host::new(config.listener, &config.path).ok_or(VsockError::PathTooLong(config.path))?;
        let refused = |action| move |e: rustix::io::Errno| VsockError::Setup { action, source: e.into() };
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(refused("create an epoll instance"))?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)
            .map_err(refused("create a timer"))?;
        rustix::io::ioctl_fionbio(host.listener(), true).map_err(refused("make its listener nonblocking"))?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, host.listener(), epoll::EventData::new_u64(LISTENER), edge)
            .map_err(refused("watch its listener"))?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(TIMER), edge)
            .map_err(refused("watch its timer"))?;
        Ok(Vsock {
            guest_cid: config.guest_cid,
            host,
            epoll,
            timer,
            peers: HashMap::new(),
            streams: HashMap::new(),
            next_peer: FIRST_PEER,
            next_port: FIRST_HOST_PORT,
            handshakes: 0,
            clients_wait: true,
            windows: 0,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            blocked: false,
            deadlines: BTreeSet::new(),
            due: HashMap::new(),
        })
    }

    /// Configuration space: the guest's context id (virtio 1.2, section 5.10.4).
    pub fn config_space(&self) -> [u8; 8] {
        self.guest_cid.to_le_bytes()
    }

    /// Host sockets in use, whatever their state.
    #[cfg(test)]
    pub(super) fn peers(&self) -> usize {
        self.peers.len()
    }

    /// Drops all streams: the driver started anew and knows none. Clients it has not heard of yet keep waiting.
    pub fn forget_guest(&mut self) {
        let known = |peer: &Peer| matches!(peer, Peer::Stream(stream) if stream.known_to_guest());
        let gone: Vec<PeerId> =
            self.peers.iter().filter(|(_, peer)| known(peer)).map(|(id, _)| *id).collect();
        for id in gone {
            self.settle(id, Fate::Forget);
        }
        self.resets.clear();
        self.blocked = false;
    }

    /// Takes what happened at host sockets; to be called when [`Vsock::as_fd`] is readable.
    pub fn handle_host(&mut self) {
        let mut space = [const { MaybeUninit::uninit() }; EVENT_BATCH];
        let events = match epoll::wait(&self.epoll, &mut space, Some(&Timespec::default())) {
            Ok((events, _)) => events,
            // Interrupted: what is ready stays ready.
            Err(_) => return,
        };
        for event in events {
            match event.data.u64() {
                LISTENER => self.clients_wait = true,
                TIMER => self.expire(),
                id => self.peer_ready(id, event.flags),
            }
        }
        self.accept_clients();
    }

    /// Takes packets from the guest off the transmit queue.
    pub fn transmit<M: GuestMemory>(&mut self, mem: &M, queue: &mut Queue) -> Result<Serviced, QueueFault> {
        let mut packets = 0;
        let mut more = true;
        self.blocked = false;
        for _ in 0..queue.size() {
            if self.resets.len() >= MAX_RESETS {
                self.blocked = true;
                more = false;
                break;
            }
            let Some(chain) = next_chain(mem, queue)? else {
                if queue.enable_notification(mem).map_err(QueueFault::Ring)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head_index();
            let mut payload = Buffers::<BS<'_, M::Bitmap>>::from_chain(mem, chain, Permissions::Read)?;
            let header = read_header(&mut payload)?;
            self.receive(&header, payload);
            queue.add_used(mem, head, 0).map_err(QueueFault::Ring)?;
            packets += 1;
        }
        Ok(Serviced { packets, interrupt: wants_interrupt(mem, queue, packets)?, more })
    }

    /// Puts packets for the guest into the buffers of the receive queue, one per stream in turn.
    pub fn fill<M: GuestMemory>(&mut self, mem: &M, queue: &mut Queue) -> Result<Serviced, QueueFault> {
        let mut packets = 0;
        let mut more = true;
        for _ in 0..queue.size() {
            if self.resets.is_empty() && self.ready.is_empty() {
                more = false;
                break;
            }
            let Some(chain) = next_chain(mem, queue)? else {
                // Nothing to put packets into: the driver shall say when there is.
                if queue.enable_notification(mem).map_err(QueueFault::Ring)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head_index();
            let mut room = Buffers::<BS<'_, M::Bitmap>>::from_chain(mem, chain, Permissions::Write)?;
            if room.len() <= HEADER_LEN {
                // Without room for a byte, a read of nothing would look like the end of a stream.
                return Err(ChainError::TooShort(room.len()).into());
            }
            let mut front = room.split_to(HEADER_LEN);
            let Some(header) = self.next_packet(&room) else {
                queue.go_to_previous_position();
                continue;
            };
            front.put(&header.to_bytes());
            let len = header.len.saturating_add(HEADER_LEN.try_into().unwrap_or(u32::MAX));
            queue.add_used(mem, head, len).map_err(QueueFault::Ring)?;
            packets += 1;
        }
        more |= self.blocked && self.resets.len() < MAX_RESETS;
        Ok(Serviced { packets, interrupt: wants_interrupt(mem, queue, packets)?, more })
    }

    /// Takes one packet of the guest; `rest` is what follows its header in the chain.
    fn receive<B: BitmapSlice>(&mut self, header: &Header, mut rest: Buffers<'_, B>) {
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        let ports = Ports { guest: header.src_port, host: header.dst_port };
        let ours =
            header.src_cid == self.guest_cid && header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let known = self.streams.get(&ports).copied().filter(|_| ours);
        let well_formed = len <= MAX_PAYLOAD && len <= rest.len();
        match known {
            Some(id) if well_formed => {
                let mut payload = rest.split_to(len);
                if let Some(Peer::Stream(stream)) = self.peers.get_mut(&id) {
                    let fate = stream.receive(header, &mut payload);
                    self.settle(id, fate);
                }
            }
            Some(id) => self.settle(id, Fate::Reset),
            None if header.op == Op::Reset as u16 => {}
            None if header.op == Op::Request as u16 && ours && len == 0 => self.dial(header, ports),
            None => self.resets.push_back(header.reset()),
        }
    }

    /// The next packet for the guest, its payload in `room`; `None` if no stream has one after all.
    fn next_packet<B: BitmapSlice>(&mut self, room: &Buffers<'_, B>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(Peer::Stream(stream)) = self.peers.get_mut(&id) else { continue };
            stream.queued = false;
            let packet = stream.next_packet(room);
            let fate = stream.fate();
            self.settle(id, fate);
            if let Some(packet) = packet {
                return Some(Header { src_cid: HOST_CID, dst_cid: self.guest_cid, ..packet });
            }
        }
        None
    }

    /// Draws the consequences of what happened to a stream.
    fn settle(&mut self, id: PeerId, fate: Fate) {
        let Some(Peer::Stream(stream)) = self.peers.get_mut(&id) else { return };
        if fate == Fate::Keep {
            if stream.wants_guest() && !std::mem::replace(&mut stream.queued, true) {
                self.ready.push_back(id);
            }
            if stream.awaits_reset() && !self.due.contains_key(&id) {
                self.set_deadline(id, CLOSE_TIME);
            }
            return;
        }
        let ports = stream.ports();
        let drains = stream.detach_guest();
        tracing::debug!(?ports, ?fate, drains, %stream, "a stream ended");
        self.clear_deadline(id);
        if self.streams.get(&ports) == Some(&id) {
            self.streams.remove(&ports);
        }
        if fate == Fate::Reset {
            self.resets.push_back(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: ports.host,
                dst_port: ports.guest,
                kind: TYPE_STREAM,
                op: Op::Reset as u16,
                ..Header::default()
            });
        }
        if !drains {
            self.remove(id);
        }
    }

    fn peer_ready(&mut self, id: PeerId, flags: epoll::EventFlags) {
        match self.peers.get_mut(&id) {
            Some(Peer::Stream(stream)) => {
                let fate = stream.host_ready(flags);
                self.settle(id, fate);
            }
            Some(Peer::Handshake(client)) => match read_request(client) {
                Request::Port(port) => {
                    self.start_request(id, port);
                    // The same event may say that the client has closed; it will not be repeated.
                    self.peer_ready(id, flags);
                }
                Request::Incomplete if !flags.contains(epoll::EventFlags::RDHUP) => {}
                Request::Incomplete | Request::Invalid => self.remove(id),
            },
            None => {}
        }
    }

    /// Lets in clients that wait, as far as there is room.
    fn accept_clients(&mut self) {
        while self.clients_wait && self.handshakes < MAX_HANDSHAKES && self.peers.len() < MAX_PEERS {
            match self.host.accept() {
                Ok(Some(client)) => {
                    if let Some(id) = self.watch(&client) {
                        self.handshakes += 1;
                        self.peers.insert(id, Peer::Handshake(client));
                        self.set_deadline(id, HANDSHAKE_TIME);
                    }
                }
                Ok(None) => self.clients_wait = false,
                Err(e) => {
                    // Out of descriptors or memory: the next peer that leaves makes room.
                    tracing::warn!(error = %e, "a client cannot be accepted");
                    return;
                }
            }
        }
    }

    /// A client said which port it wants.
    fn start_request(&mut self, id: PeerId, port: u32) {
        let Some(Peer::Handshake(client)) = self.peers.remove(&id) else { return };
        self.handshakes -= 1;
        self.clear_deadline(id);
        let ports = self.free_ports(port);
        let window = self.reserve_window();
        self.streams.insert(ports, id);
        self.peers.insert(id, Peer::Stream(Stream::from_client(client, ports, window)));
        self.settle(id, Fate::Keep);
    }

    /// The guest wants a stream to a host port.
    fn dial(&mut self, request: &Header, ports: Ports) {
        let socket = if self.peers.len() < MAX_PEERS {
            self.host.dial(ports.host)
        } else {
            Err(std::io::Error::other("too many streams"))
        };
        let socket = match socket {
            Ok(socket) => socket,
            Err(e) => {
                tracing::debug!(port = ports.host, error = %e, "a connection of the guest is refused");
                return self.resets.push_back(request.reset());
            }
        };
        let Some(id) = self.watch(&socket) else { return self.resets.push_back(request.reset()) };
        let window = self.reserve_window();
        self.streams.insert(ports, id);
        self.peers.insert(id, Peer::Stream(Stream::from_guest(socket, ports, window, request)));
        self.settle(id, Fate::Keep);
    }

    fn watch(&mut self, socket: &UnixStream) -> Option<PeerId> {
        let id = self.next_peer;
        self.next_peer += 1;
        let flags =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        match epoll::add(&self.epoll, socket, epoll::EventData::new_u64(id), flags) {
            Ok(()) => Some(id),
            Err(e) => {
                tracing::warn!(error = %e, "a host socket cannot be watched");
                None
            }
        }
    }

    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports { guest, host: self.next_port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.streams.contains_key(&ports) {
                return ports;
            }
        }
    }

    fn reserve_window(&mut self) -> u32 {
        let left = WINDOW_BUDGET.saturating_sub(self.windows);
        let window = (left / 8).clamp(MIN_WINDOW, MAX_WINDOW);
        self.windows += window;
        u32::try_from(window).unwrap_or(u32::MAX)
    }

    /// Closes a peer's socket and forgets it.
    fn remove(&mut self, id: PeerId) {
        match self.peers.remove(&id) {
            Some(Peer::Handshake(client)) => {
                discard_unread(&client);
                self.handshakes -= 1;
            }
            Some(Peer::Stream(stream)) => {
                self.windows -= usize::try_from(stream.window()).unwrap_or(0);
                if stream.queued {
                    self.ready.retain(|ready| *ready != id);
                }
            }
            None => {}
        }
        self.clear_deadline(id);
        self.accept_clients();
    }

    fn set_deadline(&mut self, id: PeerId, after: Duration) {
        let at = Instant::now() + after;
        self.clear_deadline(id);
        self.due.insert(id, at);
        self.deadlines.insert((at, id));
        if self.deadlines.first() == Some(&(at, id)) {
            self.arm_timer();
        }
    }

    fn clear_deadline(&mut self, id: PeerId) {
        if let Some(at) = self.due.remove(&id) {
            self.deadlines.remove(&(at, id));
        }
    }

    /// Ends what took too long.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some((at, id)) = self.deadlines.first().copied()
            && at <= now
        {
            self.clear_deadline(id);
            match self.peers.get(&id) {
                Some(Peer::Stream(_)) => self.settle(id, Fate::Reset),
                _ => self.remove(id),
            }
        }
        self.arm_timer();
    }

    /// Sets the timer to the first deadline. A timer that is left armed without need only wakes the device once.
    fn arm_timer(&self) {
        let Some((at, _)) = self.deadlines.first() else { return };
        // Zero would disarm the timer.
        let wait = at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let Ok(wait) = Timespec::try_from(wait) else { return };
        let once = Itimerspec { it_interval: Timespec::default(), it_value: wait };
        if let Err(e) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::warn!(error = %e, "the timer of the vsock device cannot be set");
        }
    }
}

impl AsFd for Vsock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
