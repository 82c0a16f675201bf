//! Mounts of the guest: the option words shared with the container engine, and the storages that requests ask for.

mod group;
mod hugepages;
pub mod options;
mod places;
pub mod share;
#[cfg(test)]
mod silent;
mod storage;
mod watch;

pub use storage::{DRIVERS, StorageError, Storages};
