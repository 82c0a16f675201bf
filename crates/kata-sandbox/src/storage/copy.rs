//! Small files as copies, for pods that share none: what engines bind into every container (`/etc/resolv.conf`, …).
//!
//! A copy is made once, when the container is; neither side sees what the other writes later.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use kata_api::agent::CopyFileRequest;

use super::StorageError;
use crate::agent_client::Agent;
use crate::blocking::blocking;
use crate::guest_spec::Volume;

/// Largest file that is copied, in bytes. It is held in memory, and goes in one message.
pub(super) const SIZE_MAX: u64 = 1024 * 1024;
/// Of the directories above it in the guest.
const DIR_MODE: u32 = 0o755;

/// Copies `volume` to `target` in the guest.
pub(crate) async fn copy(agent: &Agent, volume: &Volume, target: &Path) -> Result<(), StorageError> {
    let (path, target) = (volume.source.clone(), target.display().to_string());
    let read = blocking(move || read(&path, target)).await;
    let request = read.unwrap_or(Err(StorageError::Interrupted))?;
    let copied = agent.copy_file(&request).await;
    copied.map_err(|source| StorageError::Copy { path: volume.source.clone(), source })
}

fn read(path: &Path, target: String) -> Result<CopyFileRequest, StorageError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => StorageError::Absent(path.to_owned()),
        _ => StorageError::file("read", path, error),
    };
    // A FIFO must not make the pod wait for its writer.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = opened.map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mut data = Vec::new();
    if metadata.is_file() {
        file.take(SIZE_MAX + 1).read_to_end(&mut data).map_err(failed)?;
    }
    let size = u64::try_from(data.len()).unwrap_or(u64::MAX);
    if !metadata.is_file() || size > SIZE_MAX {
        return Err(StorageError::NoShare(path.to_owned()));
    }
    Ok(CopyFileRequest {
        path: target,
        file_size: i64::try_from(size).unwrap_or(i64::MAX),
        file_mode: metadata.mode(),
        dir_mode: DIR_MODE,
        uid: i32::try_from(metadata.uid()).unwrap_or(-1),
        gid: i32::try_from(metadata.gid()).unwrap_or(-1),
        data,
        ..Default::default()
    })
}
