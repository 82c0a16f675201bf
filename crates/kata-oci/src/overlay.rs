//! What goes on top of an image's layers.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

/// Makes the directories of a writable layer over `top`, an image's topmost layer. The container's `/` shows owner and mode
/// of the writable layer, so that gets those of the image's. What is above it should be for root alone: a container may put
/// set-uid programs there.
///
/// # Errors
/// The directories cannot be made.
pub fn writable_layer(top: &Path, upper: &Path, work: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(upper)?;
    DirBuilder::new().recursive(true).mode(0o700).create(work)?;
    let root = fs::metadata(top)?;
    chown(upper, Some(root.uid()), Some(root.gid()))?;
    fs::set_permissions(upper, Permissions::from_mode(root.mode() & 0o7777))
}
