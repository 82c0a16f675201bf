//! Devices of the host that it lends through VFIO (Linux, Documentation/driver-api/vfio.rst).
//!
//! ```text
//!   container ── guest memory, mapped by the IOMMU    one for all devices of a machine
//!      └── group ── what the IOMMU cannot tell apart  one or more devices; KVM is told
//!             └── device ── regions, interrupts, reset ──▶ pci::passed::Lent
//! ```
//!
//! Container and group come as open descriptors: nothing here opens a file. All of a machine's memory is pinned from the first device
//! on, which the process's limit of locked memory has to allow. A device cannot reach the registers of another: only memory is
//! mapped.

mod ioctl;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use thiserror::Error;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
};
use vmm_sys_util::eventfd::EventFd;

use self::ioctl::RegionInfo;
use crate::dma::{Dma, DmaError, Domain, Reach};
use crate::kvm::Lending;
use crate::pci::passed::{Lent, Messages, Place, Region};

/// BARs of a device.
const BARS: usize = 6;

/// Why a device of the host is not lent.
#[derive(Debug, Error)]
pub enum VfioError {
    /// Not the descriptor that it is to be.
    #[error("the descriptor of the container is none of /dev/vfio/vfio")]
    Container(#[source] io::Error),
    /// A host without what is needed.
    #[error("the host's VFIO has no IOMMU of type 1; load vfio_iommu_type1")]
    NoIommu,
    /// Some of its devices are the host's.
    #[error(
        "IOMMU group {group} is not free: bind each of its devices to vfio-pci, or to no driver (/sys/kernel/iommu_groups/{group}/devices)"
    )]
    NotViable {
        /// The group.
        group: u32,
    },
    /// Not the name of a device.
    #[error("{0:?} is no name of a PCI device")]
    Name(String),
    /// Not a PCI device.
    #[error("device {0} of the host is no PCI device")]
    NotPci(String),
    /// It would carry over what its last user left in it.
    #[error("device {0} of the host cannot be reset, so it is not given to a guest")]
    NoReset(String),
    /// The guest's memory.
    #[error(transparent)]
    Memory(#[from] DmaError),
    /// The kernel refused.
    #[error("the host does not {action}")]
    Refused {
        /// What it was asked for.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn refused(action: &'static str) -> impl FnOnce(io::Error) -> VfioError {
    move |source| VfioError::Refused { action, source }
}

/// A device to be lent, as its owner opened it.
pub struct Offer {
    /// `/dev/vfio/vfio`, new; of no use where the machine has one already.
    pub container: OwnedFd,
    /// `/dev/vfio/GROUP`.
    pub group: OwnedFd,
    /// The group's number.
    pub number: u32,
    /// What the device is called on its bus: `0000:01:00.0`.
    pub name: String,
}

/// What devices of one machine have in common.
pub struct Lender {
    dma: Dma,
    lending: Arc<Lending>,
    shared: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    container: Weak<Container>,
    groups: BTreeMap<u32, Weak<Group>>,
}

impl Lender {
    /// Of a machine with this memory.
    pub fn new(dma: Dma, lending: Arc<Lending>) -> Lender {
        Lender { dma, lending, shared: Mutex::default() }
    }

    /// Takes a device.
    pub fn take(&self, offer: Offer) -> Result<Box<dyn Lent>, VfioError> {
        let Offer { container, group, number, name } = offer;
        let Ok(c_name) = CString::new(name.as_str()) else { return Err(VfioError::Name(name)) };
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let container = match shared.container.upgrade() {
            Some(container) => container,
            None => Container::new(container)?,
        };
        let group = match shared.groups.get(&number).and_then(Weak::upgrade) {
            Some(group) => group,
            None => Group::new(group, number, Arc::clone(&container), Arc::clone(&self.lending))?,
        };
        let reach = self.dma.enter(container.clone())?;
        let file = ioctl::device(group.file.as_fd(), &c_name).map_err(refused("lend the device"))?;
        let device = Device::new(file.into(), name, reach, Arc::clone(&group), Arc::clone(&self.lending))?;
        shared.groups.retain(|_, group| group.strong_count() > 0);
        shared.groups.insert(number, Arc::downgrade(&group));
        shared.container = Arc::downgrade(&container);
        Ok(Box::new(device))
    }
}

/// Where the guest's memory is mapped for its devices.
struct Container(OwnedFd);

impl Container {
    fn new(file: OwnedFd) -> Result<Arc<Container>, VfioError> {
        match ioctl::container_fits(file.as_fd()).map_err(VfioError::Container)? {
            true => Ok(Arc::new(Container(file))),
            false => Err(VfioError::NoIommu),
        }
    }
}

impl Domain for Container {
    fn map(&self, guest: u64, host: u64, bytes: u64) -> io::Result<()> {
        // SAFETY: `Dma` maps guest memory alone, and unmaps it before the last handle on it goes: it has one itself. Nobody holds
        // references into guest memory.
        unsafe { ioctl::map(self.0.as_fd(), guest, host, bytes) }
    }

    fn unmap(&self, guest: u64, bytes: u64) -> io::Result<()> {
        ioctl::unmap(self.0.as_fd(), guest, bytes)
    }
}

/// A group in the container, of which KVM knows.
struct Group {
    file: OwnedFd,
    lending: Arc<Lending>,
    /// It outlives the group.
    _container: Arc<Container>,
}

impl Group {
    fn new(
        file: OwnedFd,
        number: u32,
        container: Arc<Container>,
        lending: Arc<Lending>,
    ) -> Result<Arc<Group>, VfioError> {
        if !ioctl::group_is_viable(file.as_fd()).map_err(refused("say whether the group is free"))? {
            return Err(VfioError::NotViable { group: number });
        }
        let action = "give the group an IOMMU; does it remap interrupts, and has nobody else the group?";
        ioctl::join(file.as_fd(), container.0.as_fd()).map_err(refused(action))?;
        lending.add_group(file.as_fd()).map_err(refused("tell KVM of the group"))?;
        Ok(Arc::new(Group { file, lending, _container: container }))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = self.lending.remove_group(self.file.as_fd()) {
            tracing::warn!(%error, "KVM keeps a group of a device of the host");
        }
    }
}

/// A device. In this order it goes: its file first, with which it ceases to work; then its memory and its group.
struct Device {
    mapped: Mutex<BTreeMap<u64, Mapping>>,
    file: File,
    bars: [RegionInfo; BARS],
    configuration: RegionInfo,
    messages: usize,
    vectors: usize,
    lending: Arc<Lending>,
    _reach: Reach,
    _group: Arc<Group>,
}

impl Device {
    fn new(
        file: File,
        name: String,
        reach: Reach,
        group: Arc<Group>,
        lending: Arc<Lending>,
    ) -> Result<Device, VfioError> {
        let flags = ioctl::device_flags(file.as_fd()).map_err(refused("say what the device is"))?;
        if flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(VfioError::NotPci(name));
        }
        if flags & VFIO_DEVICE_FLAGS_RESET == 0 {
            return Err(VfioError::NoReset(name));
        }
        let region =
            |index| ioctl::region(file.as_fd(), index).map_err(refused("say what BARs the device has"));
        let mut bars: [RegionInfo; BARS] = Default::default();
        for (index, bar) in (0..).zip(&mut bars) {
            *bar = region(index)?;
        }
        let configuration = region(VFIO_PCI_CONFIG_REGION_INDEX)?;
        let count = |index| {
            let count = ioctl::interrupts(file.as_fd(), index);
            count
                .map(|count| usize::try_from(count).unwrap_or(0))
                .map_err(refused("say how the device interrupts"))
        };
        let (messages, vectors) = (count(VFIO_PCI_MSI_IRQ_INDEX)?, count(VFIO_PCI_MSIX_IRQ_INDEX)?);
        let mapped = Mutex::default();
        Ok(Device {
            mapped,
            file,
            bars,
            configuration,
            messages,
            vectors,
            lending,
            _reach: reach,
            _group: group,
        })
    }

    fn bar(&self, register: usize) -> io::Result<&RegionInfo> {
        self.bars.get(register).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Where in the file an access is.
    fn at(&self, place: Place, offset: u64, length: usize) -> io::Result<u64> {
        let region = match place {
            Place::Configuration => &self.configuration,
            Place::Bar(register) => self.bar(register)?,
        };
        let end = u64::try_from(length).ok().and_then(|length| offset.checked_add(length));
        let within = end.filter(|end| *end <= region.size).and_then(|_| region.offset.checked_add(offset));
        within.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }
}

impl Lent for Device {
    fn region(&self, register: usize) -> Region {
        let info = self.bars.get(register).cloned().unwrap_or_default();
        Region { size: info.size, direct: info.direct }
    }

    fn messages(&self) -> usize {
        self.messages
    }

    fn vectors(&self) -> usize {
        self.vectors
    }

    fn read(&self, place: Place, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, self.at(place, offset, into.len())?)
    }

    fn write(&self, place: Place, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.at(place, offset, data.len())?)
    }

    fn connect(&self, messages: Messages, events: &[EventFd]) -> io::Result<()> {
        let index = match messages {
            Messages::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Messages::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
        };
        ioctl::connect(self.file.as_fd(), index, events)
    }

    fn map(&self, register: usize, offset: u64, bytes: u64, address: u64) -> io::Result<()> {
        let at = self.bar(register)?.offset.checked_add(offset);
        let at = at.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let mapping = Mapping::new(&self.file, at, bytes)?;
        // SAFETY: the range is one whole mapping of its own, which is kept until the slot is gone. It is a device's: nothing here
        // looks into it.
        unsafe { self.lending.map(address, mapping.host as u64, bytes) }?;
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner).insert(address, mapping);
        Ok(())
    }

    fn unmap(&self, address: u64) {
        self.lending.unmap(address);
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
    }

    fn reset(&self) -> io::Result<()> {
        ioctl::reset(self.file.as_fd())
    }
}

/// Pages of a device in this process.
struct Mapping {
    host: usize,
    bytes: usize,
}

impl Mapping {
    fn new(file: &File, offset: u64, bytes: u64) -> io::Result<Mapping> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: a new mapping, at a place that nobody else has.
        let host = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                offset,
            )
        }?;
        Ok(Mapping { host: host as usize, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's alone, whole, and no slot leads to it any more.
        if let Err(error) = unsafe { munmap(self.host as *mut _, self.bytes) } {
            tracing::warn!(%error, "pages of a device stay mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddressSpace;

    use super::*;
    use crate::kvm::Hypervisor;
    use crate::memory::{Backing, allocate};

    #[test]
    fn offer_of_other_descriptors_is_refused_by_what_they_are_not() {
        let memory = allocate(64 << 20, 0, Backing::default()).unwrap();
        let made = Hypervisor::open().and_then(|kvm| Hypervisor::new(kvm, &memory.memory()));
        let hypervisor = match made {
            Ok(hypervisor) => hypervisor,
            Err(error) => return eprintln!("skipped: no machine of KVM's: {error}"),
        };
        let lender = Lender::new(Dma::new(memory), hypervisor.lending());
        let offer = |name: &str| {
            let null = || File::open("/dev/null").unwrap().into();
            Offer { container: null(), group: null(), number: 1, name: name.to_owned() }
        };
        let error = lender.take(offer("0000:01:00.0")).err().unwrap();
        assert!(matches!(error, VfioError::Container(_)), "{error}");
        let error = lender.take(offer("0000\0")).err().unwrap();
        assert!(matches!(error, VfioError::Name(_)), "{error}");
    }
}
