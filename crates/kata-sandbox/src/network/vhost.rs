//! The host kernel's mover of packets, `/dev/vhost-net`: between a tap and the queues in the guest's memory, on a thread of its own.
//!
//! It is opened here, once for each queue pair, so the machine monitor's user needs no access to it. Without it the machine
//! monitor moves the packets: slower, and otherwise the same.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A node that may be there without its module, which the kernel then loads if it can.
const DEVICE: &str = "/dev/vhost-net";

/// Whether the kernel moves packets for a pod.
pub(super) struct Vhost {
    /// `None` once it is known that it does not.
    device: Option<PathBuf>,
}

impl Vhost {
    /// `wanted` as far as the host has it.
    pub(super) fn new(wanted: bool) -> Self {
        Self::at(Path::new(DEVICE), wanted)
    }

    fn at(device: &Path, wanted: bool) -> Self {
        Self { device: wanted.then(|| device.to_owned()) }
    }

    /// For an interface of so many queue pairs: as many files, or none. What fails once is not tried again.
    pub(super) fn files(&mut self, queues: usize) -> Vec<OwnedFd> {
        let Some(device) = &self.device else { return Vec::new() };
        let open = |_| File::options().read(true).write(true).open(device).map(OwnedFd::from);
        match (0..queues).map(open).collect::<io::Result<Vec<_>>>() {
            Ok(files) => files,
            Err(error) => {
                let device = device.display();
                tracing::debug!(%device, %error, "the machine monitor moves the packets, the host's kernel does not");
                self.device = None;
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_queue_pair_has_a_file_of_its_own() {
        assert_eq!(Vhost::at(Path::new("/dev/null"), true).files(3).len(), 3);
    }

    #[test]
    fn machine_monitor_moves_the_packets_where_the_kernel_cannot_or_shall_not() {
        assert!(Vhost::at(Path::new("/dev/null"), false).files(1).is_empty());
        let mut absent = Vhost::at(Path::new("/dev/no-such-device"), true);
        assert!(absent.files(1).is_empty());
        assert!(absent.device.is_none(), "the next interface does not try again");
    }
}
