//! The virtio socket device (virtio 1.2, section 5.10): byte streams between a guest and unix sockets of the host.
//!
//! ```text
//!   guest driver                     Vsock                                  host
//!   ───────────  transmit queue  ┌────────────────────┐  <path>_<port>  ┌─────────────┐
//!   AF_VSOCK    ───────────────▶ │ streams, by ports  │ ──────────────▶ │ a server    │
//!   sockets      receive queue   │ ready list, resets │  <path>         ├─────────────┤
//!               ◀─────────────── │ one epoll instance │ ◀────────────── │ CONNECT <p> │
//!                                └────────────────────┘                 └─────────────┘
//! ```
//!
//! The device knows virtqueues and sockets, but no transport: whoever embeds it waits until its descriptor (`AsFd`) is
//! readable or the driver kicked a queue, and then calls [`Vsock::handle_host`], [`Vsock::transmit`] and
//! [`Vsock::fill`]. None of them blocks, and each does a bounded amount of work.
//!
//! What a guest or a client can make the device hold is bounded: streams, clients in the handshake, resets waiting for
//! a receive buffer, and the sum of all receive windows.

mod device;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod driver;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod host;
mod packet;
mod stream;
#[cfg(test)]
mod tests;

pub use device::{Serviced, Vsock, VsockConfig, VsockError};
pub use packet::{HEADER_LEN, Header, MAX_PAYLOAD, Op};

/// Context id of the host (virtio 1.2, section 5.10.4).
pub const HOST_CID: u64 = 2;

/// Number of the queue that carries packets to the guest.
pub const RECEIVE_QUEUE: usize = 0;
/// Number of the queue that carries packets from the guest.
pub const TRANSMIT_QUEUE: usize = 1;
/// Queues of the device; the last is for events, of which this device has none.
pub const QUEUES: usize = 3;
