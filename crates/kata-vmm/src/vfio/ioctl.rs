//! VFIO's requests to the kernel (Linux, include/uapi/linux/vfio.h), on descriptors that somebody else has opened.
//!
//! The crate `vfio-ioctls` opens containers, groups and `/sys` by their paths, of which a jailed process has none. So only the
//! bindings are taken, and the dozen requests that are needed are here.

use std::ffi::{CStr, c_int, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_TYPE,
    VFIO_TYPE1v2_IOMMU, vfio_device_info, vfio_group_status, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info, vfio_irq_info, vfio_region_info,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};

const fn request(number: u32) -> c_ulong {
    (VFIO_TYPE as c_ulong) << 8 | (VFIO_BASE + number) as c_ulong
}
const GET_API_VERSION: c_ulong = request(0);
const CHECK_EXTENSION: c_ulong = request(1);
const SET_IOMMU: c_ulong = request(2);
const GROUP_GET_STATUS: c_ulong = request(3);
const GROUP_SET_CONTAINER: c_ulong = request(4);
const GROUP_GET_DEVICE_FD: c_ulong = request(6);
const DEVICE_GET_INFO: c_ulong = request(7);
const DEVICE_GET_REGION_INFO: c_ulong = request(8);
const DEVICE_GET_IRQ_INFO: c_ulong = request(9);
const DEVICE_SET_IRQS: c_ulong = request(10);
const DEVICE_RESET: c_ulong = request(11);
const IOMMU_GET_INFO: c_ulong = request(12);
const IOMMU_MAP_DMA: c_ulong = request(13);
const IOMMU_UNMAP_DMA: c_ulong = request(14);

/// Longest answer about a region that is read, in bytes: some capabilities.
const LONGEST_REGION: usize = 64 * 1024;

fn done(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn size_of<T>() -> u32 {
    u32::try_from(std::mem::size_of::<T>()).unwrap_or(0)
}

/// Whether this is VFIO's container, of the version and with the IOMMU that are known here.
pub fn container_fits(container: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: the request has nothing to do with memory.
    let version = done(unsafe { ioctl(&container, GET_API_VERSION) })?;
    // SAFETY: nor has this one.
    let type1 = done(unsafe { ioctl_with_val(&container, CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU.into()) })?;
    Ok(u32::try_from(version) == Ok(VFIO_API_VERSION) && type1 > 0)
}

/// Whether all devices of a group are free to be lent.
pub fn group_is_viable(group: BorrowedFd<'_>) -> io::Result<bool> {
    let mut status = vfio_group_status { argsz: size_of::<vfio_group_status>(), flags: 0 };
    // SAFETY: the request writes to a structure of its own kind.
    done(unsafe { ioctl_with_mut_ref(&group, GROUP_GET_STATUS, &mut status) })?;
    Ok(status.flags & VFIO_GROUP_FLAGS_VIABLE != 0)
}

/// Puts a group into a container, which has an IOMMU from then on.
pub fn join(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let number = container.as_raw_fd();
    // SAFETY: the request reads one number.
    done(unsafe { ioctl_with_ref(&group, GROUP_SET_CONTAINER, &number) })?;
    // SAFETY: the request has nothing to do with memory.
    let set = done(unsafe { ioctl_with_val(&container, SET_IOMMU, VFIO_TYPE1v2_IOMMU.into()) });
    match set {
        // The groups before this one have chosen it.
        Err(_) if has_iommu(container) => Ok(()),
        set => set.map(drop),
    }
}

fn has_iommu(container: BorrowedFd<'_>) -> bool {
    let mut info = vfio_iommu_type1_info { argsz: size_of::<vfio_iommu_type1_info>(), ..Default::default() };
    // SAFETY: the request writes to a structure of its own kind, no more than it says it has.
    done(unsafe { ioctl_with_mut_ref(&container, IOMMU_GET_INFO, &mut info) }).is_ok()
}

/// Lets devices of a container reach memory of this process. The kernel pins it.
///
/// # Safety
/// The range from `host` on is memory that nobody in this process holds references into, and stays so until [`unmap`].
pub unsafe fn map(container: BorrowedFd<'_>, guest: u64, host: u64, bytes: u64) -> io::Result<()> {
    let map = vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio_iommu_type1_dma_map>(),
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: host,
        iova: guest,
        size: bytes,
    };
    // SAFETY: the request reads one structure of its own kind; for what it names the caller has promised.
    done(unsafe { ioctl_with_ref(&container, IOMMU_MAP_DMA, &map) }).map(drop)
}

/// Ends that.
pub fn unmap(container: BorrowedFd<'_>, guest: u64, bytes: u64) -> io::Result<()> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: size_of::<vfio_iommu_type1_dma_unmap>(),
        iova: guest,
        size: bytes,
        ..Default::default()
    };
    // SAFETY: the request reads and writes one structure of its own kind.
    done(unsafe { ioctl_with_mut_ref(&container, IOMMU_UNMAP_DMA, &mut unmap) })?;
    match unmap.size == bytes {
        true => Ok(()),
        false => Err(io::Error::other(format!("{:#x} of {bytes:#x} bytes were mapped", unmap.size))),
    }
}

/// A device of a group, by the name that it has on its bus.
pub fn device(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the request reads a string with an end.
    let number = done(unsafe { ioctl_with_ptr(&group, GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
    // SAFETY: a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Flags of a device.
pub fn device_flags(device: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = vfio_device_info { argsz: size_of::<vfio_device_info>(), ..Default::default() };
    // SAFETY: the request writes to a structure of its own kind, no more than it says it has.
    done(unsafe { ioctl_with_mut_ref(&device, DEVICE_GET_INFO, &mut info) })?;
    Ok(info.flags)
}

/// Resets a device.
pub fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request has nothing to do with memory.
    done(unsafe { ioctl(&device, DEVICE_RESET) }).map(drop)
}

/// How many interrupts of a kind a device has.
pub fn interrupts(device: BorrowedFd<'_>, index: u32) -> io::Result<u32> {
    let mut info = vfio_irq_info { argsz: size_of::<vfio_irq_info>(), flags: 0, index, count: 0 };
    // SAFETY: the request writes to a structure of its own kind.
    done(unsafe { ioctl_with_mut_ref(&device, DEVICE_GET_IRQ_INFO, &mut info) })?;
    Ok(info.count)
}

/// Which descriptors a device signals when it interrupts; none switches its interrupts of that kind off.
pub fn connect(device: BorrowedFd<'_>, index: u32, events: &[EventFd]) -> io::Result<()> {
    /// Words before the descriptors: length, flags, index, first, count.
    const HEADER: usize = 5;
    let number =
        |number: usize| u32::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let what = if events.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
    let length = number((HEADER + events.len()) * 4)?;
    let mut set = vec![length, what | VFIO_IRQ_SET_ACTION_TRIGGER, index, 0, number(events.len())?];
    set.extend(events.iter().map(|event| event.as_raw_fd().cast_unsigned()));
    // SAFETY: the request reads as many bytes as the first of them says.
    done(unsafe { ioctl_with_ptr(&device, DEVICE_SET_IRQS, set.as_ptr()) }).map(drop)
}

/// A region of a device: where it is in the device's file, and what of it can be mapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes.
    pub size: u64,
    /// In the file.
    pub offset: u64,
    /// Offset in the region, and bytes.
    pub direct: Vec<(u64, u64)>,
}

/// What a device says of a region.
pub fn region(device: BorrowedFd<'_>, index: u32) -> io::Result<RegionInfo> {
    let plain = std::mem::size_of::<vfio_region_info>();
    let mut length = plain;
    loop {
        let mut answer = vec![0_u64; length.div_ceil(8)];
        let words = [length.min(LONGEST_REGION), 0].map(|word| u32::try_from(word).unwrap_or(0));
        let index = u64::from(index);
        if let [first, second, ..] = answer.as_mut_slice() {
            (*first, *second) = (u64::from(words[0]), index);
        }
        // SAFETY: the request writes as many bytes as the first of them say, which are there.
        done(unsafe { ioctl_with_mut_ptr(&device, DEVICE_GET_REGION_INFO, answer.as_mut_ptr()) })?;
        let bytes: Vec<u8> = answer.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let needed = usize::try_from(word(&bytes, 0)).unwrap_or(usize::MAX);
        if needed <= length || length > plain || needed > LONGEST_REGION {
            return Ok(read_region(bytes.get(..length).unwrap_or_default()));
        }
        length = needed;
    }
}

/// Four bytes at an offset; zero behind the end.
fn word(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..).and_then(<[u8]>::first_chunk);
    four.map_or(0, |four| u32::from_ne_bytes(*four))
}

fn double(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..).and_then(<[u8]>::first_chunk);
    eight.map_or(0, |eight| u64::from_ne_bytes(*eight))
}

/// `struct vfio_region_info` with its capabilities: `struct vfio_region_info_cap_sparse_mmap` says which parts can be mapped, where
/// not all can.
fn read_region(bytes: &[u8]) -> RegionInfo {
    let (flags, size, offset) = (word(bytes, 4), double(bytes, 16), double(bytes, 24));
    let mut info = RegionInfo { size, offset, direct: Vec::new() };
    if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
        return info;
    }
    info.direct.push((0, size));
    let mut at = if flags & VFIO_REGION_INFO_FLAG_CAPS == 0 { 0 } else { word(bytes, 12) };
    while at != 0 {
        let here = usize::try_from(at).unwrap_or(usize::MAX);
        let Some(header) = bytes.get(here..) else { break };
        if word(header, 0) & 0xffff == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let areas = header.get(16..).unwrap_or_default().chunks_exact(16);
            let count = usize::try_from(word(header, 8)).unwrap_or(0);
            info.direct = areas.take(count).map(|area| (double(area, 0), double(area, 8))).collect();
        }
        // They lie one behind the other.
        let next = word(header, 4);
        if next <= at {
            break;
        }
        at = next;
    }
    info
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(flags: u32, capabilities: &[u32]) -> Vec<u8> {
        let mut bytes: Vec<u8> = [0, flags, 0, if capabilities.is_empty() { 0 } else { 32 }]
            .iter()
            .flat_map(|word: &u32| word.to_ne_bytes())
            .collect();
        bytes.extend([0x4000_u64, 1 << 40].iter().flat_map(|word| word.to_ne_bytes()));
        bytes.extend(capabilities.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    #[test]
    fn parts_of_a_region_are_what_the_kernel_says_of_them() {
        let region = |flags, capabilities: &[u32]| read_region(&answer(flags, capabilities)).direct;
        assert_eq!(region(3, &[]), []);
        assert_eq!(region(7, &[]), [(0, 0x4000)]);
        // The table may be mapped, of which nothing is to be seen; two parts behind.
        let sparse = [3, 40, 1 | 1 << 16, 0, 2, 0, 0, 0, 0x1000, 0, 0x3000, 0, 0x1000, 0];
        assert_eq!(region(15, &sparse), [(0, 0x1000), (0x3000, 0x1000)]);
        assert_eq!(region(15, &sparse[..10]), [(0, 0x1000)], "one part is missing");
    }

    proptest! {
        #[test]
        fn any_answer_about_a_region_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            read_region(&bytes);
        }
    }

    #[test]
    fn requests_have_the_numbers_of_the_kernel() {
        assert_eq!([GET_API_VERSION, DEVICE_SET_IRQS, IOMMU_UNMAP_DMA], [0x3b64, 0x3b6e, 0x3b72]);
    }

    #[test]
    fn descriptor_of_something_else_is_refused_by_the_kernel() {
        use std::os::fd::AsFd;
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(container_fits(file.as_fd()).is_err());
        assert!(region(file.as_fd(), 0).is_err());
        assert!(connect(file.as_fd(), 1, &[]).is_err());
    }
}
