//! Finds the disk.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::{GuestError, Places};
use crate::{ImageError, Initdata, SERIAL, read_image};

/// Why the disks cannot be looked through.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}", path = .path.display())]
pub struct DeviceError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The document of the disk with the serial number, or, where the host gave no disk one, of the first that has the magic.
/// `None` where there is none.
pub(super) fn read(places: &Places) -> Result<Option<Initdata>, GuestError> {
    let blocks = places.at("sys/block");
    let mut disks = names(&blocks)?;
    disks.retain(|name| ["vd", "sd"].iter().any(|prefix| name.starts_with(prefix)));
    disks.sort();
    // The kernel's own word: the links below /dev/disk are made by udev, which may come later or be missing.
    let serial =
        |name: &String| std::fs::read_to_string(blocks.join(name).join("serial")).unwrap_or_default();
    if let Some(named) = disks.iter().find(|name| serial(name).trim() == SERIAL) {
        // What is named so has to be it.
        return take(&places.at("dev").join(named)).map(Some);
    }
    for name in disks {
        match take(&places.at("dev").join(&name)) {
            Err(GuestError::Image(ImageError::Magic)) => {}
            // A drive without a medium, or a path that is not the active one, is no fault of the guest's. What follows for a guest whose
            // initdata was on it is for the verifiers: they are asked about its absence.
            Err(error @ (GuestError::Device(_) | GuestError::Image(ImageError::Head(_)))) => {
                tracing::warn!(disk = name, %error, "whether the disk holds initdata is not known");
            }
            // Who has the magic has to be it, too.
            outcome => return outcome.map(Some),
        }
    }
    Ok(None)
}

fn take(path: &Path) -> Result<Initdata, GuestError> {
    let file = File::open(path).map_err(|source| DeviceError { path: path.to_owned(), source })?;
    Ok(read_image(file)?)
}

fn names(dir: &Path) -> Result<Vec<String>, DeviceError> {
    let of = |source| DeviceError { path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(of)?,
    };
    entries.map(|entry| Ok(entry.map_err(of)?.file_name().to_string_lossy().into_owned())).collect()
}
