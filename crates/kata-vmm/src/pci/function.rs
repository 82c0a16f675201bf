//! What is in a slot, whatever is behind it.

use std::sync::Arc;

use super::Windows;
use super::virtio::FunctionState;
use crate::bus::Bus;
use crate::virtio::ActivateError;

/// A PCI function. Called from any virtual processor's thread and from the owner's.
pub trait Function: Send + Sync {
    /// A guest's read of the configuration space; `into` is all ones before.
    fn read_configuration(&self, offset: usize, into: &mut [u8]);

    /// A guest's write to the configuration space. [`Function::place`] has to follow.
    fn write_configuration(&self, offset: usize, data: &[u8]);

    /// Lets the BARs answer where the registers say, if that is in the windows and nobody else's. True if that changed anything.
    fn place(self: Arc<Self>, bus: &Bus, windows: Windows) -> bool;

    /// Takes the function away: the device stands still, and nothing leads to it any more.
    fn remove(&self, bus: &Bus);

    /// Stops the device; the guest's CPUs stand still already.
    fn pause(&self);

    /// Lets it go on where it was.
    fn resume(&self) -> Result<(), ActivateError>;

    /// For a snapshot; the device stands still. An error says what would be lost.
    fn save(&self) -> Result<FunctionState, &'static str>;

    /// From a snapshot, before the machine runs. [`Function::place`] and [`Function::resume`] have to follow. What does not fit is an
    /// error that says what it is; the function is of no use then.
    fn restore(&self, saved: &FunctionState) -> Result<(), &'static str>;

    /// What the device counts.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}
