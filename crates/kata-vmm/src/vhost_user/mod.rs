//! The socket device as a vhost-user back end: one front end (QEMU), one thread, one event loop.
//!
//! ```text
//!   front end ──requests──▶ ┌──────────────┐
//!   driver ──────kicks────▶ │ epoll        │ ──▶ Backend { rings, guest memory } ──▶ Vsock
//!   Vsock ───host sockets─▶ └──────────────┘
//! ```
//!
//! The protocol is QEMU's (`docs/interop/vhost-user.rst`). The `vhost` crate parses its messages; this module keeps the
//! state they build up. A single loop instead of the `vhost-user-backend` crate's worker thread spares a stack, locks
//! and a wake-up per request.

mod requests;
mod ring;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::mm::{Advice, madvise};
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as MessageError};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use self::requests::Mapping;
use self::ring::Ring;
use crate::virtio::ring::QueueFault;
use crate::vsock::{QUEUES, RECEIVE_QUEUE, Serviced, TRANSMIT_QUEUE, Vsock};

/// Epoll tokens; ring `n`'s kicks have [`KICKS`] + `n`.
const REQUESTS: u64 = 0;
const DEVICE: u64 = 1;
const KICKS: u64 = 2;

/// Packets after which guest memory is unmapped: rare enough to cost nothing, often enough to bound the resident set.
const TRIM_AFTER: u32 = 128;

/// Why a back end stopped serving.
#[derive(Debug, Error)]
pub enum VhostUserError {
    /// The front end sent something that cannot be obeyed.
    #[error("a vhost-user request failed")]
    Request(#[source] MessageError),
    /// The kernel refused to watch or wait.
    #[error("the event loop of the vhost-user back end failed")]
    Poll(#[source] io::Error),
}

/// Serves `device` to the front end at `socket`, until that closes its end.
pub fn serve(socket: UnixStream, device: Vsock) -> Result<(), VhostUserError> {
    let poll = |e: rustix::io::Errno| VhostUserError::Poll(e.into());
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(poll)?;
    let watch = |fd, token| epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN);
    watch(socket.as_fd(), REQUESTS).map_err(poll)?;
    watch(device.as_fd(), DEVICE).map_err(poll)?;
    let kicks = epoll.try_clone().map_err(VhostUserError::Poll)?;
    let backend = Arc::new(Mutex::new(Backend::new(device, kicks)));
    let mut requests = BackendReqHandler::from_stream(socket, Arc::clone(&backend));

    let mut events = Vec::with_capacity(8);
    let mut more = false;
    loop {
        let timeout = more.then(Timespec::default);
        match epoll::wait(&epoll, spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(poll(e)),
        }
        for event in events.drain(..) {
            match event.data.u64() {
                REQUESTS => match requests.handle_request() {
                    Ok(()) => {}
                    Err(e) if is_closed(&e) => return Ok(()),
                    Err(e) => return Err(VhostUserError::Request(e)),
                },
                DEVICE => lock(&backend).device.handle_host(),
                // Kicks are edge-triggered and need not be read; every turn looks at all queues.
                _ => {}
            }
        }
        more = lock(&backend).service();
    }
}

/// Whether the front end has gone.
fn is_closed(error: &MessageError) -> bool {
    matches!(error, MessageError::Disconnected | MessageError::SocketBroken(_) | MessageError::PartialMessage)
}

fn lock(backend: &Mutex<Backend>) -> MutexGuard<'_, Backend> {
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the front end has set up, and the device that works with it.
struct Backend {
    device: Vsock,
    /// The event loop's, to watch kicks with.
    epoll: OwnedFd,
    memory: GuestMemoryMmap,
    mappings: Vec<Mapping>,
    rings: [Ring; QUEUES],
    /// Packets carried since guest memory was last unmapped from this process.
    carried: u32,
}

impl Backend {
    fn new(device: Vsock, epoll: OwnedFd) -> Backend {
        Backend {
            device,
            epoll,
            memory: GuestMemoryMmap::new(),
            mappings: Vec::new(),
            rings: std::array::from_fn(|_| Ring::default()),
            carried: 0,
        }
    }

    /// Serves both queues once. True if there is more to do without waiting.
    fn service(&mut self) -> bool {
        let Backend { device, memory, rings, carried, .. } = self;
        let mut more = false;
        if let Some(ring) = rings.get_mut(TRANSMIT_QUEUE) {
            let done = serve_ring(ring, "transmit", |queue| device.transmit(memory, queue));
            more |= done.more;
            *carried += u32::from(done.packets);
        }
        if let Some(ring) = rings.get_mut(RECEIVE_QUEUE) {
            let done = serve_ring(ring, "receive", |queue| device.fill(memory, queue));
            more |= done.more;
            *carried += u32::from(done.packets);
        }
        if *carried >= TRIM_AFTER {
            *carried = 0;
            self.trim();
        }
        more
    }

    /// Takes guest memory out of this process's page tables; it comes back where it is touched again. Over time a guest
    /// uses most of its memory for socket buffers, and all that would count as this process's.
    fn trim(&self) {
        for region in self.memory.iter() {
            let len = usize::try_from(region.len()).unwrap_or(0);
            // SAFETY: the range is one whole mapping, alive as long as `memory`. It is a shared mapping of a file, so
            // its contents stay in that file, and nothing holds references into guest memory.
            let done = unsafe { madvise(region.as_ptr().cast(), len, Advice::LinuxDontNeed) };
            if let Err(e) = done {
                tracing::debug!(error = %e, "guest memory cannot be unmapped");
            }
        }
    }
}

/// Serves one ring, if it runs; interrupts the driver if it wants that.
fn serve_ring(
    ring: &mut Ring,
    name: &str,
    serve: impl FnOnce(&mut virtio_queue::Queue) -> Result<Serviced, QueueFault>,
) -> Serviced {
    if !ring.is_running() {
        return Serviced::default();
    }
    match serve(&mut ring.queue) {
        Ok(done) => {
            if done.interrupt {
                ring.interrupt();
            }
            done
        }
        Err(fault) => {
            let cause: &dyn std::error::Error = &fault;
            let reason = cause.source().map(ToString::to_string).unwrap_or_default();
            tracing::error!(
                queue = name,
                "{fault}: {reason}; the queue stops until the driver sets it up again"
            );
            ring.fail();
            Serviced::default()
        }
    }
}
