//! From what is wanted to the devices of a machine.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use kata_vmm_api::{DiskSpec, EndReason, MachineSpec, NicSpec, SharedFsSpec, VsockSpec};
use thiserror::Error;

use super::{Descriptors, MachineError};
use crate::chain;
use crate::dma::Dma;
use crate::kvm::Ending;
use crate::memory::Backing;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, BlockConfig, DiskError};
use crate::virtio::mem::{Growth, Mem};
use crate::virtio::net::{Net, NetConfig, NetError};
use crate::virtio::rng::Rng;
use crate::virtio::shared_fs::{SharedFs, SharedFsConfig, SharedFsError};
use crate::virtio::vsock::Socket;
use crate::virtio::{ActivateError, Device};
use crate::vsock::{Vsock, VsockConfig, VsockError};

const RNG: &str = "rng";
const BALLOON: &str = "balloon";
const VSOCK: &str = "vsock";
const SHARED_FS: &str = "shared-fs";
pub(super) const GROWTH: &str = "memory";

/// Why there is no such device.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A device of the host.
    #[cfg(feature = "vfio")]
    #[error(transparent)]
    Host(#[from] crate::vfio::VfioError),
    /// The share.
    #[error(transparent)]
    SharedFs(#[from] SharedFsError),
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A thread.
    #[error(transparent)]
    Thread(#[from] ActivateError),
    /// There is nowhere to put the guest's connections.
    #[error("the monitor was started without a directory of sockets (--sockets)")]
    NoSockets,
    /// Not the name of a file.
    #[error("{0:?} is not the name of a socket in the directory of sockets")]
    SocketName(String),
}

/// A device and its name.
type Named = (String, Box<dyn Device>);

/// Whether this name is that of a device which every machine of its kind keeps.
pub(super) fn is_fixed(id: &str) -> bool {
    [RNG, BALLOON, VSOCK, SHARED_FS, GROWTH].contains(&id)
}

/// All devices that a machine starts with, in the order of their slots.
pub(super) fn all(
    spec: &MachineSpec,
    files: &mut Descriptors,
    sockets: Option<&Path>,
    ending: &Arc<Ending>,
    dma: &Dma,
) -> Result<Vec<Named>, MachineError> {
    let mut all: Vec<Named> = Vec::new();
    let mut add = |id: &str, device| all.push((id.to_owned(), device));
    add(RNG, Box::new(Rng::new().map_err(|e| failed(RNG, e))?));
    // What is given back of huge pages is not set aside for the guest any more, and may be gone when the guest touches it again.
    if spec.memory.reporting && !spec.memory.hugepages {
        add(BALLOON, Box::new(Balloon::new(dma.clone()).map_err(|e| failed(BALLOON, e))?));
    }
    if let Some(wanted) = &spec.vsock {
        add(VSOCK, vsock(wanted, files, sockets)?);
    }
    if let Some(wanted) = &spec.shared_fs {
        add(SHARED_FS, shared_fs(wanted, files, ending)?);
    }
    for wanted in &spec.disks {
        add(&wanted.id, disk(wanted, files)?);
    }
    for wanted in &spec.nics {
        add(&wanted.id, nic(wanted, files)?);
    }
    Ok(all)
}

/// Memory that comes later. What has to be there when the guest touches it is taken from the host when the guest plugs it.
pub(super) fn growth(
    base: u64,
    size: u64,
    backing: Backing,
    dma: Dma,
) -> Result<(Growth, Box<dyn Device>), MachineError> {
    let populate = backing.prealloc || backing.hugepages;
    let (device, growth) = Mem::new(base, size, populate, dma).map_err(|e| failed(GROWTH, e))?;
    Ok((growth, Box::new(device)))
}

fn failed(id: &str, source: impl Into<DeviceError>) -> MachineError {
    MachineError::Device { id: id.to_owned(), source: source.into() }
}

/// A disk.
pub(super) fn disk(spec: &DiskSpec, files: &mut Descriptors) -> Result<Box<dyn Device>, MachineError> {
    let config = BlockConfig {
        id: spec.id.clone(),
        file: files.take(spec.file)?,
        readonly: spec.readonly,
        bytes_per_second: spec.bytes_per_second,
        requests_per_second: spec.requests_per_second,
    };
    Ok(Box::new(Block::new(config).map_err(|e| failed(&spec.id, e))?))
}

/// A network interface.
pub(super) fn nic(spec: &NicSpec, files: &mut Descriptors) -> Result<Box<dyn Device>, MachineError> {
    let config = NetConfig {
        mac: spec.mac,
        mtu: spec.mtu,
        queues: files.take_all(&spec.queues)?,
        vhost: files.take_all(&spec.vhost)?,
    };
    Ok(Box::new(Net::new(config).map_err(|e| failed(&spec.id, e))?))
}

fn vsock(
    spec: &VsockSpec,
    files: &mut Descriptors,
    sockets: Option<&Path>,
) -> Result<Box<dyn Device>, MachineError> {
    let listener = files.take(spec.listener)?;
    let name = Path::new(&spec.name);
    if spec.name.is_empty() || name.file_name() != Some(name.as_os_str()) {
        return Err(failed(VSOCK, DeviceError::SocketName(spec.name.clone())));
    }
    let path = sockets.ok_or_else(|| failed(VSOCK, DeviceError::NoSockets))?.join(name);
    let device =
        Vsock::new(VsockConfig { guest_cid: spec.cid, listener, path }).map_err(|e| failed(VSOCK, e))?;
    Ok(Box::new(Socket::new(device).map_err(|e| failed(VSOCK, e))?))
}

/// The machine ends with the server: what a guest has open is lost with it.
fn shared_fs(
    spec: &SharedFsSpec,
    files: &mut Descriptors,
    ending: &Arc<Ending>,
) -> Result<Box<dyn Device>, MachineError> {
    let ending = Arc::clone(ending);
    let config = SharedFsConfig {
        tag: spec.tag.clone(),
        socket: UnixStream::from(files.take(spec.socket)?),
        on_lost: Box::new(move |lost| ending.end(EndReason::DeviceLost, chain(&lost))),
    };
    Ok(Box::new(SharedFs::new(config).map_err(|e| failed(SHARED_FS, e))?))
}
