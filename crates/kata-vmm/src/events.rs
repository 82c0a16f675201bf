//! What devices ask of the hypervisor: descriptors that interrupt the guest, and descriptors that the guest's writes signal.
//!
//! KVM carries them out (irqfd, ioeventfd); tests have their own.

use std::io;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt as the guest set it up: what is to be written where (PCI 3.0, section 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Address of the write.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// An interrupt line into the guest that belongs to one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Line(pub u32);

/// Why the hypervisor would not.
#[derive(Debug, Error)]
pub enum EventError {
    /// All lines are taken.
    #[error("there is no interrupt line left: {most} are in use; remove a device first")]
    NoLine {
        /// How many there are.
        most: usize,
    },
    /// KVM refused.
    #[error("KVM cannot {action}")]
    Kvm {
        /// What it was asked for.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Interrupts and doorbells.
pub trait Events: Send + Sync {
    /// A new line, with the descriptor that raises it. Until it is routed, raising it does nothing.
    fn new_line(&self) -> Result<(Line, EventFd), EventError>;

    /// Where lines go from now on, all at once, for each change of KVM's table costs the same; `None` leads nowhere.
    fn route(&self, routes: &[(Line, Option<Msi>)]) -> Result<(), EventError>;

    /// Gives a line back, of which nothing is raised any more.
    fn drop_line(&self, line: Line, event: &EventFd);

    /// From now on a guest's write of any length to `address` signals `event` and leaves the guest running.
    fn watch(&self, address: u64, event: &EventFd) -> Result<(), EventError>;

    /// Ends that.
    fn unwatch(&self, address: u64, event: &EventFd);
}
