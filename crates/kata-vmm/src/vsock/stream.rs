//! One byte stream between a guest socket and a host unix socket: its state and its credit.
//!
//! ```text
//!             CONNECT line                    RESPONSE
//!   (client) ─────────────▶ Requesting ──────────────────────▶ Open ──────▶ gone
//!                                 guest's REQUEST, dialled ───▶  │           ▲
//!                                         guest closed, the host │           │ all written,
//!                                         is slower than it      └▶ Draining ┘ or the host closed
//! ```
//!
//! Nothing is buffered towards the guest: bytes go from the host's socket straight into a buffer of the guest. Towards
//! the host at most `window` bytes are buffered, which is the credit the guest has; a guest that sends more is reset.
//!
//! Sockets are watched edge-triggered, so `readable` must stay set until a read found the socket empty.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use vm_memory::bitmap::BitmapSlice;

use super::host::discard_unread;
use super::packet::{Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use crate::virtio::buffers::Buffers;

/// The two ports that name a stream; the context ids are always the guest's and the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// Port on the guest's side.
    pub guest: u32,
    /// Port on the host's side.
    pub host: u32,
}

/// What becomes of a stream after something happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Keep,
    /// It is over; the guest must be told by a reset.
    Reset,
    /// It is over and the guest knows.
    Forget,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Requesting { sent: bool },
    Open,
    Draining,
}

/// A stream.
pub struct Stream {
    /// Waits for its turn at the guest's buffers; kept by the device.
    pub queued: bool,
    ports: Ports,
    socket: UnixStream,
    phase: Phase,

    /// Bytes on their way to the host that its socket did not take yet.
    outgoing: VecDeque<u8>,
    /// Most bytes ever kept in `outgoing`; what the guest is told as `buf_alloc`.
    window: u32,
    /// Bytes received from the guest, modulo 2³².
    received: u32,
    /// Bytes of those that left for the host; what the guest is told as `fwd_cnt`.
    forwarded: u32,
    /// The last `forwarded` that the guest was told.
    told_forwarded: u32,

    /// The guest's `buf_alloc` and `fwd_cnt`, and the bytes sent to it, modulo 2³².
    guest_window: u32,
    guest_forwarded: u32,
    sent: u32,

    owes_response: bool,
    owes_credit: bool,
    asked_credit: bool,
    /// Shutdown flags: said by the guest, due to the guest, said to the guest.
    guest_shutdown: u32,
    due_shutdown: u32,
    told_shutdown: u32,

    readable: bool,
    /// The host will write no more; what it wrote may still be unread.
    host_finished: bool,
    /// Everything the host wrote has been read.
    host_eof: bool,
    /// The host reads no more.
    host_deaf: bool,
}

impl Stream {
    /// A stream that a host client asked for: the guest gets a request, the client its `OK` when the guest accepts.
    pub fn from_client(socket: UnixStream, ports: Ports, window: u32) -> Stream {
        Stream::new(socket, ports, window, Phase::Requesting { sent: false })
    }

    /// A stream that the guest asked for by `request` and that reached its host socket: the guest gets a response.
    pub fn from_guest(socket: UnixStream, ports: Ports, window: u32, request: &Header) -> Stream {
        let mut stream = Stream::new(socket, ports, window, Phase::Open);
        stream.owes_response = true;
        stream.take_credit(request);
        stream
    }

    fn new(socket: UnixStream, ports: Ports, window: u32, phase: Phase) -> Stream {
        Stream {
            queued: false,
            ports,
            socket,
            phase,
            outgoing: VecDeque::new(),
            window,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            guest_window: 0,
            guest_forwarded: 0,
            sent: 0,
            owes_response: false,
            owes_credit: false,
            asked_credit: false,
            guest_shutdown: 0,
            due_shutdown: 0,
            told_shutdown: 0,
            readable: true,
            host_finished: false,
            host_eof: false,
            host_deaf: false,
        }
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Its receive window in bytes.
    pub fn window(&self) -> u32 {
        self.window
    }

    /// Whether the guest was told of this stream or asked for it.
    pub fn known_to_guest(&self) -> bool {
        matches!(self.phase, Phase::Requesting { sent: true } | Phase::Open)
    }

    /// Whether the guest was told that both directions are closed, and only its answer is outstanding.
    pub fn awaits_reset(&self) -> bool {
        self.phase == Phase::Open && self.told_shutdown == SHUTDOWN_BOTH
    }

    /// Ends the guest's part. True if bytes that the guest sent in good order are still on their way to the host: then
    /// the stream stays until they are written.
    pub fn detach_guest(&mut self) -> bool {
        let in_order = self.guest_shutdown & SHUTDOWN_SEND != 0;
        if in_order && !self.outgoing.is_empty() && !self.host_deaf {
            self.phase = Phase::Draining;
            return true;
        }
        discard_unread(&self.socket);
        false
    }

    /// Takes a packet of this stream from the guest. `payload` is as long as the header says.
    pub fn receive<B: BitmapSlice>(&mut self, header: &Header, payload: &mut Buffers<'_, B>) -> Fate {
        self.take_credit(header);
        match (Op::from_raw(header.op), self.phase) {
            (Some(Op::Reset), _) => Fate::Forget,
            (Some(Op::Response), Phase::Requesting { sent: true }) => self.accept(),
            (Some(Op::ReadWrite), Phase::Open) if self.guest_shutdown & SHUTDOWN_SEND == 0 => {
                self.deliver(payload)
            }
            (Some(Op::Shutdown), Phase::Open) => self.guest_closes(header.flags & SHUTDOWN_BOTH),
            (Some(Op::CreditUpdate), Phase::Open) => Fate::Keep,
            (Some(Op::CreditRequest), Phase::Open) => {
                self.owes_credit = true;
                Fate::Keep
            }
            _ => {
                tracing::debug!(ports = ?self.ports, op = header.op, "the guest broke the protocol of a stream");
                self.abort()
            }
        }
    }

    /// Takes what epoll says about the host's socket.
    pub fn host_ready(&mut self, events: EventFlags) -> Fate {
        let hung_up = events.intersects(EventFlags::HUP | EventFlags::ERR);
        self.readable |= events.intersects(EventFlags::IN | EventFlags::RDHUP) || hung_up;
        self.host_finished |= hung_up || events.contains(EventFlags::RDHUP);
        match self.phase {
            Phase::Requesting { sent } if hung_up => return if sent { Fate::Reset } else { Fate::Forget },
            Phase::Requesting { .. } => return Fate::Keep,
            Phase::Open | Phase::Draining => {}
        }
        if hung_up {
            self.host_goes_deaf();
        } else if events.contains(EventFlags::OUT) {
            self.flush();
        }
        self.fate()
    }

    /// Whether [`Stream::next_packet`] would have something, or must look for it.
    pub fn wants_guest(&self) -> bool {
        match self.phase {
            Phase::Requesting { sent } => !sent,
            Phase::Open => {
                self.owes_response
                    || self.owes_credit
                    || self.due_shutdown & !self.told_shutdown != 0
                    || (self.can_read() && (self.credit() > 0 || !self.asked_credit))
            }
            Phase::Draining => false,
        }
    }

    /// The next packet for the guest, its payload already in `room`; the caller sets the context ids.
    pub fn next_packet<B: BitmapSlice>(&mut self, room: &Buffers<'_, B>) -> Option<Header> {
        match self.phase {
            Phase::Requesting { sent: false } => {
                self.phase = Phase::Requesting { sent: true };
                return Some(self.header(Op::Request));
            }
            Phase::Open => {}
            Phase::Requesting { sent: true } | Phase::Draining => return None,
        }
        if std::mem::take(&mut self.owes_response) {
            return Some(self.header(Op::Response));
        }
        if self.can_read()
            && let Some(header) = self.read(room)
        {
            return Some(header);
        }
        let due = self.due_shutdown & !self.told_shutdown;
        if due != 0 {
            self.told_shutdown |= due;
            return Some(Header { flags: self.told_shutdown, ..self.header(Op::Shutdown) });
        }
        self.owes_credit.then(|| self.header(Op::CreditUpdate))
    }

    /// What the present state means for the stream.
    pub fn fate(&self) -> Fate {
        let guest_done = self.guest_shutdown & SHUTDOWN_SEND != 0 && self.outgoing.is_empty();
        let host_done = self.host_eof || self.guest_shutdown & SHUTDOWN_RECEIVE != 0;
        match self.phase {
            Phase::Open if self.guest_shutdown == SHUTDOWN_BOTH || (guest_done && host_done) => Fate::Reset,
            Phase::Draining if self.outgoing.is_empty() => Fate::Forget,
            _ => Fate::Keep,
        }
    }

    /// Bytes the guest can take now.
    fn credit(&self) -> u32 {
        self.guest_window.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_window = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked_credit = false;
        }
    }

    fn can_read(&self) -> bool {
        self.readable && !self.host_eof && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// A header with this stream's ports and credit; the guest thereby knows the credit.
    fn header(&mut self, op: Op) -> Header {
        self.owes_credit = false;
        self.told_forwarded = self.forwarded;
        Header {
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: self.window,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }

    /// Reads from the host's socket into `room`, within the guest's credit.
    fn read<B: BitmapSlice>(&mut self, room: &Buffers<'_, B>) -> Option<Header> {
        let credit = usize::try_from(self.credit()).unwrap_or(usize::MAX);
        if credit == 0 {
            let ask = !std::mem::replace(&mut self.asked_credit, true);
            return ask.then(|| self.header(Op::CreditRequest));
        }
        // The room may be given to another stream after this one, so it is not cut.
        let limit = credit.min(MAX_PAYLOAD).min(room.len());
        match room.read_from(&self.socket, limit) {
            Ok(0) => self.host_ends(),
            Ok(n) => {
                // A short read has emptied the socket, unless its end is still to be read.
                self.readable = n == limit || self.host_finished;
                let len = u32::try_from(n).unwrap_or(u32::MAX);
                self.sent = self.sent.wrapping_add(len);
                return Some(Header { len, ..self.header(Op::ReadWrite) });
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(e) => {
                tracing::debug!(ports = ?self.ports, error = %e, "reading from a host socket failed");
                self.host_ends();
                self.host_goes_deaf();
            }
        }
        None
    }

    fn host_ends(&mut self) {
        self.host_eof = true;
        self.due_shutdown |= SHUTDOWN_SEND;
    }

    /// The host reads no more: the guest is told, and what is on its way is dropped.
    fn host_goes_deaf(&mut self) {
        self.host_deaf = true;
        self.due_shutdown |= SHUTDOWN_RECEIVE;
        self.outgoing = VecDeque::new();
        self.forwarded = self.received;
    }

    /// The guest accepted the request: the client learns the port that the guest sees.
    fn accept(&mut self) -> Fate {
        self.phase = Phase::Open;
        let answer = format!("OK {}\n", self.ports.host);
        // The first bytes on a fresh socket always fit.
        match (&self.socket).write_all(answer.as_bytes()) {
            Ok(()) => Fate::Keep,
            Err(_) => self.abort(),
        }
    }

    fn guest_closes(&mut self, flags: u32) -> Fate {
        // Once each: a shutdown makes epoll report the socket, and a guest could keep that going.
        let news = flags & !self.guest_shutdown;
        self.guest_shutdown |= flags;
        if news & SHUTDOWN_RECEIVE != 0 {
            // Fails only if the host has closed, which epoll reports too.
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        if news & SHUTDOWN_SEND != 0 {
            self.end_host_writes_if_flushed();
        }
        self.fate()
    }

    /// Passes payload on to the host, or keeps what its socket does not take.
    fn deliver<B: BitmapSlice>(&mut self, payload: &mut Buffers<'_, B>) -> Fate {
        let Ok(len) = u32::try_from(payload.len()) else { return self.abort() };
        let pending = self.received.wrapping_sub(self.forwarded);
        if pending.saturating_add(len) > self.window {
            tracing::debug!(ports = ?self.ports, len, "the guest sent more than its credit");
            return self.abort();
        }
        self.received = self.received.wrapping_add(len);
        if self.host_deaf {
            self.forwarded = self.received;
            return Fate::Keep;
        }
        let mut written = 0;
        if self.outgoing.is_empty() {
            match payload.write_to(&self.socket) {
                Ok(n) => written = n,
                Err(_) => {
                    self.host_goes_deaf();
                    return Fate::Keep;
                }
            }
        }
        payload.copy_into(written, &mut self.outgoing);
        self.count_forwarded(written);
        Fate::Keep
    }

    /// Writes kept bytes to the host as far as its socket takes them.
    fn flush(&mut self) {
        if self.outgoing.is_empty() {
            return;
        }
        while !self.outgoing.is_empty() {
            match (&self.socket).write(self.outgoing.as_slices().0) {
                Ok(n) => {
                    self.outgoing.drain(..n);
                    self.count_forwarded(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.host_goes_deaf(),
            }
        }
        // An idle stream keeps no buffer.
        self.outgoing = VecDeque::new();
        self.end_host_writes_if_flushed();
    }

    /// Counts bytes as forwarded; the guest must hear of it before it runs out of credit.
    fn count_forwarded(&mut self, bytes: usize) {
        self.forwarded = self.forwarded.wrapping_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.forwarded.wrapping_sub(self.told_forwarded) >= self.window / 2 {
            self.owes_credit = true;
        }
    }

    fn end_host_writes_if_flushed(&self) {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.outgoing.is_empty() {
            // Fails only if the host has closed, which epoll reports too.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// Ends the stream with nothing left to drain.
    fn abort(&mut self) -> Fate {
        self.outgoing = VecDeque::new();
        Fate::Reset
    }
}

impl std::fmt::Display for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?}, from guest {} ({} forwarded), to guest {} ({} taken), guest closed {}, told {}, host eof {} deaf {}",
            self.phase,
            self.received,
            self.forwarded,
            self.sent,
            self.guest_forwarded,
            self.guest_shutdown,
            self.told_shutdown,
            self.host_eof,
            self.host_deaf
        )
    }
}
