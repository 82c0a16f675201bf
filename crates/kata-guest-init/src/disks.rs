//! The images' disks, found by their serial numbers.
//!
//! A disk that says it is an image and has no parameters is as wrong as parameters without a disk: the host then gave the
//! guest something else than what was measured.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::cmdline::{Cmdline, Name};
use crate::verity::Params;

/// Where the kernel lists its disks.
pub const SYS_BLOCK: &str = "/sys/block";

const ROOT: &str = "root";
const EXTENSION: &str = "extension-";
/// The multicast group that the kernel itself speaks to; group 2 is udev's.
const KERNEL: u32 = 1;

/// Disks that are not those that the command line speaks of.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The kernel's list cannot be read.
    #[error("reading {path:?}")]
    Read {
        /// Which file.
        path: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// A file that has not what it always has.
    #[error("{path:?} says {text:?}")]
    Text {
        /// Which file.
        path: PathBuf,
        /// What it says.
        text: String,
    },
    /// The kernel's events cannot be listened to.
    #[error("listening to the kernel's device events")]
    Listen(#[source] io::Error),
    /// Two disks that say the same.
    #[error("disks {first} and {second} both have the serial number {serial:?}")]
    Twice {
        /// The serial number.
        serial: String,
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// A disk that nothing vouches for.
    #[error(
        "disk {disk} has the serial number {serial:?}, and the command line has no kata.extension.NAME.verity_params for it: \
         an extension that nothing vouches for is not used"
    )]
    Unvouched {
        /// The disk.
        disk: String,
        /// Its serial number.
        serial: String,
    },
    /// Disks that are not there.
    #[error(
        "no disk with the serial number {serials} after {waited:?}: the command line has parameters for it. \
         Is the disk attached, and are its drivers in the kernel or in the list of modules?"
    )]
    Missing {
        /// Their serial numbers.
        serials: String,
        /// How long.
        waited: Duration,
    },
}

/// A disk with a serial number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The kernel's name, `vda`.
    pub name: String,
    /// What the host says it is.
    pub serial: String,
    /// `MAJOR:MINOR`.
    pub number: String,
    /// Its size.
    pub bytes: u64,
}

/// A disk and what vouches for what is on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Where it is.
    pub disk: Disk,
    /// What it has to be.
    pub params: Params,
}

/// All images of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// The root's.
    pub root: Image,
    /// The extensions', by name.
    pub extensions: Vec<(Name, Image)>,
}

/// Waits until each image has its disk, at most `patience`.
///
/// # Errors
/// [`DiskError`]; at once for what waiting does not mend.
pub fn wait(sys_block: &Path, cmdline: &Cmdline, patience: Duration) -> Result<Images, DiskError> {
    let begin = Instant::now();
    // Before the first look, so that nothing is missed between the two.
    let events = listen().map_err(|error| DiskError::Listen(error.into()))?;
    loop {
        let missing = match match_up(scan(sys_block)?, cmdline)? {
            Ok(images) => return Ok(images),
            Err(missing) => missing,
        };
        let left = patience.saturating_sub(begin.elapsed());
        if left.is_zero() {
            return Err(DiskError::Missing { serials: missing.join(", "), waited: patience });
        }
        changed(&events, left).map_err(|error| DiskError::Listen(error.into()))?;
    }
}

/// Disks that have a serial number, by their names.
fn scan(sys_block: &Path) -> Result<Vec<Disk>, DiskError> {
    let failed = |source| DiskError::Read { path: sys_block.into(), source };
    let mut disks = Vec::new();
    for entry in std::fs::read_dir(sys_block).map_err(failed)? {
        let directory = entry.map_err(failed)?.path();
        // Most kinds of disks have no such file, and a disk may go while it is looked at.
        let Some(serial) = read(&directory.join("serial"))? else { continue };
        let (Some(number), Some(sectors)) = (read(&directory.join("dev"))?, read(&directory.join("size"))?)
        else {
            continue;
        };
        let sectors: u64 = sectors
            .parse()
            .map_err(|_| DiskError::Text { path: directory.join("size"), text: sectors.clone() })?;
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        disks.push(Disk { name, serial, number, bytes: sectors.saturating_mul(512) });
    }
    disks.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(disks)
}

fn read(path: &Path) -> Result<Option<String>, DiskError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\0']).to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DiskError::Read { path: path.into(), source }),
    }
}

/// Each image with its disk, or the serial numbers that are missing.
fn match_up(disks: Vec<Disk>, cmdline: &Cmdline) -> Result<Result<Images, Vec<String>>, DiskError> {
    let mut root: Option<Disk> = None;
    let mut extensions: Vec<(Name, Image)> = Vec::new();
    for disk in disks {
        let twice = |first: &Disk| DiskError::Twice {
            serial: disk.serial.clone(),
            first: first.name.clone(),
            second: disk.name.clone(),
        };
        if disk.serial == ROOT {
            if let Some(first) = &root {
                return Err(twice(first));
            }
            root = Some(disk);
        } else if let Some(name) = disk.serial.strip_prefix(EXTENSION) {
            let known = name.parse::<Name>().ok().and_then(|name| cmdline.extensions.get_key_value(&name));
            let Some((name, params)) = known else {
                return Err(DiskError::Unvouched { disk: disk.name, serial: disk.serial });
            };
            if let Some((_, first)) = extensions.iter().find(|(other, _)| other == name) {
                return Err(twice(&first.disk));
            }
            extensions.push((name.clone(), Image { disk, params: params.clone() }));
        }
    }
    let missing = root.is_none().then(|| ROOT.to_owned());
    let absent = cmdline.extensions.keys().filter(|name| !extensions.iter().any(|(other, _)| other == *name));
    let missing: Vec<String> =
        missing.into_iter().chain(absent.map(|name| format!("{EXTENSION}{name}"))).collect();
    extensions.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(match root.filter(|_| missing.is_empty()) {
        Some(disk) => Ok(Images { root: Image { disk, params: cmdline.root.clone() }, extensions }),
        None => Err(missing),
    })
}

fn listen() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
    bind(&socket, &SocketAddrNetlink::new(0, KERNEL))?;
    Ok(socket)
}

/// Waits for an event, at most `patience`. What it says is not read: `/sys` is looked at again.
fn changed(events: &OwnedFd, patience: Duration) -> Result<(), Errno> {
    let patience = Timespec::try_from(patience).map_err(|_| Errno::INVAL)?;
    match poll(&mut [PollFd::new(events, PollFlags::IN)], Some(&patience)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error),
    }
    loop {
        match recv(events, &mut [0_u8; 1], RecvFlags::DONTWAIT) {
            // The kernel had more to say than the socket could keep.
            Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: &str = "root_hash=00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff,salt=aa,data_blocks=9,\
                     data_block_size=4096,hash_block_size=4096";

    fn cmdline(extensions: &[&str]) -> Cmdline {
        let words = extensions.iter().map(|name| format!(" kata.extension.{name}.verity_params={P}"));
        Cmdline::parse(&format!("kata.root.verity_params={P}{}", words.collect::<String>())).unwrap()
    }

    /// A list of disks: names and serial numbers; none for a disk that has no such file.
    fn kernel(disks: &[(&str, Option<&str>)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (number, (name, serial)) in disks.iter().enumerate() {
            let disk = directory.path().join(name);
            std::fs::create_dir(&disk).unwrap();
            std::fs::write(disk.join("dev"), format!("254:{number}\n")).unwrap();
            std::fs::write(disk.join("size"), "16\n").unwrap();
            if let Some(serial) = serial {
                std::fs::write(disk.join("serial"), serial).unwrap();
            }
        }
        directory
    }

    fn find(disks: &[(&str, Option<&str>)], extensions: &[&str]) -> Result<Images, DiskError> {
        wait(kernel(disks).path(), &cmdline(extensions), Duration::from_millis(10))
    }

    #[test]
    fn each_image_gets_the_disk_with_its_serial_number() {
        let images = find(
            &[
                ("vdb", Some("root")),
                ("vda", Some("extension-gpu")),
                ("vdc", Some("initdata")),
                ("vdd", Some("extension-coco\n")),
                ("loop0", None),
                ("vde", Some("")),
            ],
            &["coco", "gpu"],
        )
        .unwrap();
        assert_eq!((images.root.disk.name.as_str(), images.root.disk.bytes), ("vdb", 8192));
        assert_eq!(images.root.disk.number, "254:0");
        let extensions: Vec<_> = images
            .extensions
            .iter()
            .map(|(name, image)| (name.to_string(), image.disk.name.as_str()))
            .collect();
        assert_eq!(extensions, [("coco".to_owned(), "vdd"), ("gpu".to_owned(), "vda")]);
    }

    #[test]
    fn parameters_without_a_disk_are_refused_with_the_serial_number() {
        let error = find(&[("vda", Some("root"))], &["coco", "gpu"]).unwrap_err();
        assert!(
            matches!(&error, DiskError::Missing { serials, .. } if serials == "extension-coco, extension-gpu")
        );
        let error = find(&[("vda", None)], &[]).unwrap_err();
        assert!(matches!(&error, DiskError::Missing { serials, .. } if serials == "root"));
    }

    #[test]
    fn a_disk_without_parameters_is_refused_also_where_its_name_cannot_be() {
        for serial in
            ["extension-coco", "extension-", "extension-../../etc", "extension-a\nb", "extension-%n"]
        {
            let error = find(&[("vda", Some("root")), ("vdb", Some(serial))], &["gpu"]).unwrap_err();
            assert!(matches!(&error, DiskError::Unvouched { disk, .. } if disk == "vdb"), "{error}");
        }
    }

    #[test]
    fn two_disks_of_one_serial_number_are_refused() {
        for serial in ["root", "extension-coco"] {
            let disks = [("vda", Some("root")), ("vdb", Some("extension-coco")), ("vdc", Some(serial))];
            let error = find(&disks, &["coco"]).unwrap_err();
            assert!(matches!(&error, DiskError::Twice { second, .. } if second == "vdc"), "{error}");
        }
    }

    #[test]
    fn a_disk_that_comes_late_is_found() {
        let kernel = kernel(&[]);
        let cmdline = cmdline(&[]);
        assert!(matches!(match_up(scan(kernel.path()).unwrap(), &cmdline), Ok(Err(_))));
        let disk = kernel.path().join("vda");
        std::fs::create_dir(&disk).unwrap();
        for (name, text) in [("dev", "254:0"), ("size", "8"), ("serial", "root")] {
            std::fs::write(disk.join(name), text).unwrap();
        }
        assert!(matches!(match_up(scan(kernel.path()).unwrap(), &cmdline), Ok(Ok(_))));
    }
}
