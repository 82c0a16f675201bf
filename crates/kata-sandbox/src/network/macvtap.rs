//! Files of a macvtap.
//!
//! Unlike a tap's, its link is a device with a number, and a node in `/dev` that has the link's index in its name. Indices are
//! the same in many network namespaces, so that node may be another pod's: the number is read in the `sysfs` of this
//! namespace, and the node made where nobody else is. Neither file system is mounted anywhere.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Mode, OFlags, makedev, mknodat, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// Opens the link `name`, whose index is `link`, once for each queue.
pub(super) fn open(name: &str, link: u32, queues: u16) -> Result<Vec<OwnedFd>, (&'static str, io::Error)> {
    let at = |step: &'static str| move |error: io::Error| (step, error);
    let device = device(name, link).map_err(at("finding its device in sysfs"))?;
    let place = instance(c"tmpfs").map_err(at("making a place for its node"))?;
    mknodat(&place, "tap", FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, device)
        .map_err(|error| ("making its node", error.into()))?;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let queue = |_| openat(&place, "tap", flags, Mode::empty());
    let opened: Result<Vec<OwnedFd>, _> = (0..queues).map(queue).collect();
    opened.map_err(|error| ("opening its node", error.into()))
}

/// Major and minor number.
fn device(name: &str, link: u32) -> io::Result<u64> {
    let sysfs = instance(c"sysfs")?;
    let path = format!("class/net/{name}/macvtap/tap{link}/dev");
    let file = openat(&sysfs, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let text = io::read_to_string(std::fs::File::from(file))?;
    let numbers = text
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some(makedev(major.parse().ok()?, minor.parse().ok()?)));
    numbers.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no device")))
}

/// An instance of a file system that has no mount point.
fn instance(kind: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}
