//! For tests: a file system whose server takes requests and answers none, as a share does whose host is stuck.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Mounted until dropped.
pub(crate) struct SilentMount {
    server: Option<File>,
    point: PathBuf,
}

impl SilentMount {
    /// On the directory `point`, which is made. `None`, and a word, where this machine cannot.
    pub(crate) fn at(point: &Path) -> Option<Self> {
        std::fs::create_dir_all(point).unwrap();
        let Ok(server) = OpenOptions::new().read(true).write(true).open("/dev/fuse") else {
            eprintln!("skipped: this machine has no /dev/fuse, or lets nobody but root open it");
            return None;
        };
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let data = std::ffi::CString::new(data).unwrap();
        if let Err(error) = mount("silent", point, "fuse", MountFlags::empty(), Some(data.as_c_str())) {
            eprintln!("skipped: a FUSE file system cannot be mounted: {error}");
            return None;
        }
        Some(Self { server: Some(server), point: point.to_owned() })
    }

    /// The server goes, and the mount stays: who waits, or comes, gets an error.
    pub(crate) fn abandon(&mut self) {
        self.server = None;
    }
}

impl Drop for SilentMount {
    fn drop(&mut self) {
        self.abandon();
        let _ = unmount(&self.point, UnmountFlags::DETACH);
    }
}
