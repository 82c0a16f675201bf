//! Mounts of the guest: the option words shared with the container engine, and the storages that requests ask for.

pub mod options;
pub mod share;
mod storage;

pub use storage::{DRIVERS, StorageError, Storages};
