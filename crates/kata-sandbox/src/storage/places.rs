//! The volumes in the share: each path of the host once, however many containers mount it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kata_hypervisor::process::Record;
use rustix::fs::{FileType, Stat};

use super::{SharedVolume, StorageError, make_dir, mount, remove, take_down};

/// Name of their directory in the share. No container is called so.
const DIRECTORY: &str = ".volumes";

/// The pod's volumes in the share. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Places(Arc<Inside>);

#[derive(Debug)]
struct Inside {
    dir: PathBuf,
    /// The same directory, where it can be written.
    places: PathBuf,
    record: Record,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u32,
    placed: Vec<Placed>,
}

#[derive(Debug)]
struct Placed {
    number: u32,
    what: What,
    users: usize,
}

/// Tells whether a place shows what is asked for: a path may mean something else later.
#[derive(Debug, PartialEq, Eq)]
struct What {
    volume: SharedVolume,
    file: (u64, u64),
    /// Numbers of the mounts at and below the path.
    mounts: Vec<String>,
}

/// A volume's name in the share.
pub(super) fn name(number: u32) -> PathBuf {
    Path::new(DIRECTORY).join(number.to_string())
}

impl Places {
    pub(super) fn new(share: &Path, places: &Path, record: &Record) -> Self {
        let (dir, places) = (share.to_owned(), places.to_owned());
        Self(Arc::new(Inside { dir, places, record: record.clone(), table: Mutex::default() }))
    }

    /// Has a volume in the share, and gives its number, for [`release`](Self::release).
    pub(super) fn add(&self, volume: &SharedVolume) -> Result<u32, StorageError> {
        let found = rustix::fs::stat(&volume.source).map_err(|error| match error {
            rustix::io::Errno::NOENT => StorageError::Absent(volume.source.clone()),
            error => StorageError::file("look at", &volume.source, error),
        })?;
        let what = What {
            volume: volume.clone(),
            file: (found.st_dev, found.st_ino),
            mounts: mount::rows()
                .filter(|row| row.point.starts_with(&volume.source))
                .map(|row| row.id)
                .collect(),
        };
        let mut table = self.0.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(placed) = table.placed.iter_mut().find(|placed| placed.what == what) {
            placed.users += 1;
            return Ok(placed.number);
        }
        let number = table.next;
        table.next += 1;
        self.place(number, volume, &found)?;
        table.placed.push(Placed { number, what, users: 1 });
        Ok(number)
    }

    fn place(&self, number: u32, volume: &SharedVolume, found: &Stat) -> Result<(), StorageError> {
        let (target, place) = (self.0.dir.join(name(number)), self.0.places.join(name(number)));
        let parent = self.0.places.join(DIRECTORY);
        self.0.record.dir(&parent)?;
        make_dir(&parent, 0o700)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => make_dir(&place, 0o700)?,
            FileType::CharacterDevice | FileType::BlockDevice => {
                return Err(StorageError::Device(volume.source.clone()));
            }
            kind => {
                if kind != FileType::RegularFile {
                    tracing::warn!(volume = %volume.source.display(), "a socket or FIFO of the host is seen in the guest, and cannot be spoken to");
                }
                std::fs::File::create(&place).map_err(|error| StorageError::file("create", &place, error))?;
            }
        }
        let mounted = self.0.record.mount(&target).map_err(StorageError::from);
        mounted
            .and_then(|()| mount::clone(&volume.source, &target, volume.readonly, volume.follows_host))
            .inspect_err(|_| remove(&place))
    }

    /// Gives up a volume; the last to do so takes it out of the share. What fails stays in the leak record for the teardown.
    pub(super) fn release(&self, number: u32) {
        let mut table = self.0.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = table.placed.iter().position(|placed| placed.number == number) else { return };
        let Some(placed) = table.placed.get_mut(at) else { return };
        placed.users = placed.users.saturating_sub(1);
        if placed.users == 0 {
            table.placed.swap_remove(at);
            if take_down(&self.0.dir.join(name(number))) {
                remove(&self.0.places.join(name(number)));
            }
        }
    }
}
