//! Mounts of the guest: the option words shared with the container engine, and the storages that requests ask for.

mod error;
mod group;
mod hugepages;
mod occupied;
pub mod options;
mod places;
mod served;
pub mod share;
#[cfg(test)]
mod silent;
mod storage;
mod watch;

pub use error::StorageError;
pub use served::{EPHEMERAL_KEY, Image};
pub use storage::{DRIVERS, Storages};
