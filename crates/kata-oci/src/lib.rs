//! Container images: from a name to verified, unpacked layers on this host.
//!
//! ```text
//!   oci:DIR ───────────┐
//!   docker-archive:F ──┼─▶ Contents: config + layers ─▶ Store: layers/<chain>/ ─▶ Image
//!   registry reference ┘      every byte checked            unpacked once, shared
//!                             against its digest            by all pods
//! ```

mod blob;
mod digest;
mod docker_archive;
mod layout;
mod options;
mod overlay;
#[cfg(feature = "registry")]
pub mod registry;
mod source;
mod spec;
mod store;
mod unpack;
mod user;

use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub use blob::{BlobError, Interrupt};
pub use digest::{Digest, DigestError};
pub use options::{Advance, Credentials, Hints, PlainHttp, Progress, RegistryOptions};
pub use overlay::writable_layer;
pub use source::{ImageSource, SourceError};
pub use spec::{Descriptor, ImageConfig, Manifest, Platform, ProcessDefaults, RootFs, SpecError};
pub use store::{Limits, Stack, Store, StoreError};
pub use unpack::UnpackError;
pub use user::{RootStack, User, UserError};

/// An image whose layers lie unpacked on this host.
#[derive(Clone, Debug)]
pub struct Image {
    /// What the image says about how to run it.
    pub config: ImageConfig,
    /// Directories of the layers, topmost first: the order of overlay's `lowerdir`.
    pub layers: Vec<PathBuf>,
}

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file of the image cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// One of its JSON documents is not what the specification says.
    #[error("{document} of the image")]
    Spec {
        /// Which one.
        document: String,
        /// What is wrong.
        #[source]
        source: SpecError,
    },
    /// Nothing in the index fits.
    #[error("{image} has no image {wanted}; it has {present}")]
    NoSuchImage {
        /// Where was looked.
        image: String,
        /// What was asked for.
        wanted: String,
        /// What there is.
        present: String,
    },
    /// The image is for another kind of machine.
    #[error("the image is for {found}, and this host runs {wanted}")]
    Platform {
        /// Of the image.
        found: String,
        /// Of the host.
        wanted: String,
    },
    /// A file that the image names is not there.
    #[error("{archive} lacks {member}, which its manifest names")]
    Missing {
        /// The archive or directory.
        archive: String,
        /// What is missing.
        member: String,
    },
    /// A blob is not what its digest says.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The cache of layers.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The registry.
    #[cfg(feature = "registry")]
    #[error(transparent)]
    Registry(#[from] registry::RegistryError),
    /// This program was built without the `registry` feature.
    #[cfg(not(feature = "registry"))]
    #[error(
        "{0} names an image in a registry, and this program was built without registry support; \
         use oci:DIR or docker-archive:FILE, or build with the cargo feature `registry`"
    )]
    NoRegistrySupport(String),
    /// The host has no thread left for the work.
    #[error("cannot start a thread to prepare the image; see the limits of processes (ulimit -u, pids.max)")]
    Thread(#[source] io::Error),
    /// The user pressed Ctrl-C, or the like.
    #[error("interrupted while preparing the image")]
    Interrupted,
}

/// Makes the image at `source` available: whatever `store` does not have yet is read, verified and unpacked.
///
/// # Errors
/// [`ImageError`]; nothing of a layer that failed stays in the store.
pub async fn fetch(source: ImageSource, store: Store, options: RegistryOptions) -> Result<Image, ImageError> {
    match source {
        ImageSource::OciLayout { dir, tag } => {
            blocking(move || materialise(&layout::Layout::open(&dir, tag.as_deref())?, &store)).await
        }
        ImageSource::DockerArchive { file } => {
            blocking(move || materialise(&docker_archive::DockerArchive::open(&file)?, &store)).await
        }
        #[cfg(feature = "registry")]
        ImageSource::Registry { reference } => registry::fetch(&reference, store, options).await,
        #[cfg(not(feature = "registry"))]
        ImageSource::Registry { reference } => {
            let _ = options;
            Err(ImageError::NoRegistrySupport(reference))
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    // The runtime's own pool panics where the host has no thread left.
    let (answer, answered) = tokio::sync::oneshot::channel();
    let work = move || drop(answer.send(work()));
    std::thread::Builder::new().spawn(work).map_err(ImageError::Thread)?;
    answered.await.unwrap_or(Err(ImageError::Interrupted))
}

/// One layer, as a manifest describes it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Digest and size of the blob as it is stored, where the manifest tells.
    pub blob: Option<(Digest, u64)>,
    /// Digest of the tar stream inside.
    pub diff_id: Digest,
    /// What to call it in errors.
    pub name: String,
}

/// An image as some source has it.
trait Contents {
    fn config(&self) -> &ImageConfig;
    /// Lowest first.
    fn layers(&self) -> &[Layer];
    /// The bytes of the layer at `index`, as stored.
    fn open(&self, index: usize) -> Result<Box<dyn Read + '_>, ImageError>;
}

fn materialise(contents: &impl Contents, store: &Store) -> Result<Image, ImageError> {
    store.admit(contents.layers())?;
    let mut stack = store.stack();
    for (index, layer) in contents.layers().iter().enumerate() {
        stack.push(layer, || contents.open(index))?;
    }
    Ok(Image { config: contents.config().clone(), layers: stack.into_layers() })
}

/// Reads at most `limit` bytes: documents from outside are not trusted to be small.
fn read_document(path: &Path, limit: u64) -> Result<Vec<u8>, ImageError> {
    let fault = |source| ImageError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    std::fs::File::open(path).map_err(fault)?.take(limit + 1).read_to_end(&mut bytes).map_err(fault)?;
    if u64::try_from(bytes.len()).is_ok_and(|read| read > limit) {
        return Err(fault(std::io::Error::other(format!("larger than {limit} bytes"))));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
