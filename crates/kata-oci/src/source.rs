//! Where an image is: the IMAGE argument.

use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A parsed IMAGE argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// `oci:DIR[:TAG]`, a directory in the OCI image layout.
    OciLayout {
        /// The directory.
        dir: PathBuf,
        /// Which image of it; not needed where it has one only.
        tag: Option<String>,
    },
    /// `docker-archive:FILE`, what `docker save` writes.
    DockerArchive {
        /// The tar file.
        file: PathBuf,
    },
    /// Anything else: a reference to an image in a registry.
    Registry {
        /// The reference as it was written.
        reference: String,
    },
}

/// An IMAGE argument that names nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// A transport without a path.
    #[error("{0:?} names no {1}")]
    Empty(String, &'static str),
    /// Another tool's transport.
    #[error(
        "image transport {0:?} is not supported; use oci:DIR[:TAG], docker-archive:FILE or a registry reference"
    )]
    Transport(String),
    /// Not a reference.
    #[error(
        "{0:?} is not an image: expected oci:DIR[:TAG], docker-archive:FILE or [REGISTRY/]NAME[:TAG|@DIGEST]"
    )]
    Reference(String),
}

/// Transports of skopeo and podman that this program does not speak: told apart from registry references.
const FOREIGN: [&str; 7] =
    ["containers-storage:", "dir:", "docker-daemon:", "oci-archive:", "ostree:", "sif:", "tarball:"];

impl FromStr for ImageSource {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        if let Some(place) = text.strip_prefix("oci:") {
            let (dir, tag) = split_tag(place);
            if dir.is_empty() {
                return Err(SourceError::Empty(text.to_owned(), "directory"));
            }
            return Ok(Self::OciLayout { dir: dir.into(), tag: tag.map(str::to_owned) });
        }
        if let Some(file) = text.strip_prefix("docker-archive:") {
            if file.is_empty() {
                return Err(SourceError::Empty(text.to_owned(), "file"));
            }
            return Ok(Self::DockerArchive { file: file.into() });
        }
        if let Some(transport) = FOREIGN.iter().find(|transport| text.starts_with(**transport)) {
            return Err(SourceError::Transport((*transport).to_owned()));
        }
        let reference = text.strip_prefix("docker://").unwrap_or(text);
        let plausible = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
        if !reference.starts_with(|c: char| c.is_ascii_alphanumeric()) || !reference.chars().all(plausible) {
            return Err(SourceError::Reference(text.to_owned()));
        }
        Ok(Self::Registry { reference: reference.to_owned() })
    }
}

/// A tag has no slash, so `oci:/a:b/c` is a directory; a directory of the whole name wins over a tag.
fn split_tag(place: &str) -> (&str, Option<&str>) {
    match place.rsplit_once(':') {
        Some((dir, tag)) if !tag.contains('/') && !Path::new(place).is_dir() => (dir, Some(tag)),
        _ => (place, None),
    }
}
