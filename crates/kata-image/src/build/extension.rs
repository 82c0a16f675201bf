//! Extension images: disks that bring further services into a guest of flavour services.

use std::path::{Path, PathBuf};

use super::disk::{self, DiskError};
use crate::manifest::Verity;

/// What makes a tree an extension: the list of its processes, see the guest's documentation.
const COMPONENTS: &str = "etc/kata-extensions/components.toml";
/// Longest name: `extension-` and it have to fit into the serial number of a virtio disk, 20 bytes.
const NAME_MAX: usize = 10;

/// Why an extension cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ExtensionError {
    /// The name is not one.
    #[error(
        "{0:?} is no name of an extension: it takes 1 to {NAME_MAX} lower-case letters, digits and dashes, a letter first"
    )]
    Name(String),
    /// The tree is not one of an extension.
    #[error("{} is not an extension: it has no {COMPONENTS}", tree.display())]
    Components {
        /// The tree.
        tree: PathBuf,
    },
    /// The disk cannot be made.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Makes the extension image `output` of the directory `tree`; the same tree and name give the same bytes. Hands back what
/// the configuration needs beside the file.
///
/// # Errors
/// A name that does not do, a tree without components, a disk that cannot be made.
pub fn extension(name: &str, tree: &Path, output: &Path) -> Result<Verity, ExtensionError> {
    let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    let fits = name.len() <= NAME_MAX && name.starts_with(|first: char| first.is_ascii_lowercase());
    if !fits || !name.bytes().all(plain) {
        return Err(ExtensionError::Name(name.to_owned()));
    }
    if !tree.join(COMPONENTS).is_file() {
        return Err(ExtensionError::Components { tree: tree.to_owned() });
    }
    Ok(disk::make(tree, output, &format!("extension {name}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extension_without_a_name_or_components_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("extension.img");
        for name in ["", "Upper", "a/b", "../x", "0day", "longer-than-it-can-be"] {
            let error = extension(name, dir.path(), &output).unwrap_err();
            assert!(matches!(error, ExtensionError::Name(..)), "{name}: {error}");
        }
        let error = extension("coco", dir.path(), &output).unwrap_err().to_string();
        assert!(error.contains("components.toml"), "{error}");
        assert!(!output.exists());
    }
}
