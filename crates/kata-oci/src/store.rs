//! The cache of unpacked layers, `<state_dir>/images/layers/<chain>/`.
//!
//! A layer's files depend only on it and the layers below, so its name is made of their chain id (OCI image specification,
//! "Layer ChainID"). A directory of that name is complete: layers are unpacked beside it under a lock and then renamed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::blob::{BlobError, Interrupt, Metered, decompress};
use super::unpack::{self, Budget, UnpackError};
use super::{Digest, ImageError, Layer};

/// What an image may need at most: what is beyond is a mistake or an attack. Layers that are in the store already count as
/// layers only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Layers: overlayfs stacks no more than 500.
    pub layers: usize,
    /// Bytes of all files together; no layer's blob or tar stream may be longer either.
    pub bytes: u64,
    /// Files, directories and all else that has a name.
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { layers: 500, bytes: 128 << 30, entries: 10_000_000 }
    }
}

/// What a tar stream may have beside the content of files, whatever the limit of that is.
const HEADERS: u64 = 16 << 20;

/// The cache.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    limits: Limits,
    interrupt: Interrupt,
}

/// Why a layer cannot be unpacked or kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The blob is intact, and its content cannot be unpacked.
    #[error("cannot unpack {layer}")]
    Unpack {
        /// Which layer.
        layer: String,
        /// Why.
        #[source]
        source: UnpackError,
    },
    /// More layers than an image may have.
    #[error("the image has {found} layers, and may have {limit}")]
    Layers {
        /// As the manifest says.
        found: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A layer that alone is more than what an image may have.
    #[error("{layer} has more than the {limit} bytes that are left for the image")]
    Size {
        /// Which layer.
        layer: String,
        /// What was left.
        limit: u64,
    },
    /// The blob cannot be read to its end.
    #[error("cannot read {layer}")]
    Read {
        /// Which layer.
        layer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

impl Store {
    /// The store below `state_dir`, made where it is not there. Only root may look into it: layers hold set-uid programs.
    ///
    /// # Errors
    /// The directories cannot be made.
    pub fn open(state_dir: &Path, interrupt: Interrupt) -> Result<Self, StoreError> {
        let root = state_dir.join("images");
        for dir in [root.join("layers"), root.join("locks")] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .map_err(StoreError::io("create", &dir))?;
        }
        Ok(Self { root, limits: Limits::default(), interrupt })
    }

    /// The same store, for images within `limits`.
    #[must_use]
    pub fn within(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// Refuses what the manifest alone tells to be too much.
    ///
    /// # Errors
    /// [`StoreError::Layers`], [`StoreError::Size`].
    pub(crate) fn admit(&self, layers: &[Layer]) -> Result<(), StoreError> {
        let Limits { layers: limit, bytes, .. } = self.limits;
        if layers.len() > limit {
            return Err(StoreError::Layers { found: layers.len(), limit });
        }
        match layers.iter().find(|layer| layer.blob.as_ref().is_some_and(|(_, size)| *size > bytes)) {
            Some(layer) => Err(StoreError::Size { layer: layer.name.clone(), limit: bytes }),
            None => Ok(()),
        }
    }

    /// Removes what processes left that were killed while they unpacked a layer. Layers that others are at stay.
    ///
    /// # Errors
    /// What cannot be listed or removed.
    pub fn sweep(&self) -> Result<(), StoreError> {
        let layers = self.root.join("layers");
        for entry in fs::read_dir(&layers).map_err(StoreError::io("list", &layers))? {
            let path = entry.map_err(StoreError::io("list", &layers))?.path();
            if path.extension().is_none_or(|extension| extension != "partial") {
                continue;
            }
            let name = path.file_stem().unwrap_or_default();
            if let Some(_lock) = lock(self.root.join("locks").join(name), Wait::No)? {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Where the store keeps its things.
    #[cfg(feature = "registry")]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What stops this store's work.
    #[cfg(feature = "registry")]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// An image without layers yet.
    pub fn stack(&self) -> Stack<'_> {
        let Limits { bytes, entries, .. } = self.limits;
        Stack { store: self, chain: None, layers: Vec::new(), budget: Budget { bytes, entries } }
    }

    /// Reads `blob` once, checks its digests, and keeps the layer only where both fit.
    fn unpack(
        &self,
        layer: &Layer,
        blob: impl Read,
        into: &Path,
        lowers: &[PathBuf],
        budget: &mut Budget,
    ) -> Result<(), ImageError> {
        let limit = layer.blob.as_ref().map_or(self.limits.bytes, |(_, size)| *size);
        let mut stored = Metered::new(blob, limit, self.interrupt.clone());
        let unpacked = self.unpack_stream(layer, &mut stored, into, lowers, budget);
        if self.interrupt.is_set() {
            return Err(ImageError::Interrupted);
        }
        // A broken download also breaks decompression: the digest is the better explanation, so it is asked first.
        let oversize = stored.over_limit();
        let read = stored.finish();
        if let Some((expected, size)) = &layer.blob {
            if oversize {
                let name = layer.name.clone();
                return Err(BlobError::Size { name, expected: *size, actual: size + 1 }.into());
            }
            let (actual, length) =
                read.map_err(|source| StoreError::Read { layer: layer.name.clone(), source })?;
            verify(layer, expected, actual)?;
            if length != *size {
                let name = layer.name.clone();
                return Err(BlobError::Size { name, expected: *size, actual: length }.into());
            }
        }
        verify(layer, &layer.diff_id, unpacked?)
    }

    /// Unpacks the tar stream in `stored`, and tells the stream's digest.
    fn unpack_stream(
        &self,
        layer: &Layer,
        stored: impl Read,
        into: &Path,
        lowers: &[PathBuf],
        budget: &mut Budget,
    ) -> Result<Digest, ImageError> {
        let read = |source| StoreError::Read { layer: layer.name.clone(), source };
        // Headers and padding are no content of files: half as much again, and a little for small limits.
        let limit = budget.bytes.saturating_add(budget.bytes / 2).saturating_add(HEADERS);
        let mut plain = Metered::new(decompress(stored).map_err(read)?, limit, self.interrupt.clone());
        let unpacked = unpack::unpack(&mut plain, into, lowers, budget);
        // The rest of a bomb is not worth the time that its digest takes.
        if plain.over_limit() {
            return Err(StoreError::Size { layer: layer.name.clone(), limit }.into());
        }
        if let Err(source @ (UnpackError::TooLarge | UnpackError::TooMany)) = unpacked {
            return Err(StoreError::Unpack { layer: layer.name.clone(), source }.into());
        }
        let digest = plain.finish();
        match (unpacked, digest) {
            // The tar reader fails on what another digest explains.
            (Err(_), Ok((actual, _))) if actual != layer.diff_id => Ok(actual),
            (Err(source), _) => Err(StoreError::Unpack { layer: layer.name.clone(), source }.into()),
            (Ok(()), Ok((digest, _))) => Ok(digest),
            (Ok(()), Err(source)) => Err(read(source).into()),
        }
    }
}

fn verify(layer: &Layer, expected: &Digest, actual: Digest) -> Result<(), ImageError> {
    if *expected == actual {
        return Ok(());
    }
    Err(BlobError::Mismatch { name: layer.name.clone(), expected: expected.clone(), actual }.into())
}

/// An image that is being put together, from its lowest layer up.
pub struct Stack<'a> {
    store: &'a Store,
    chain: Option<Digest>,
    /// Topmost first.
    layers: Vec<PathBuf>,
    budget: Budget,
}

impl Stack<'_> {
    /// Puts `layer` on top; its blob is read only where the store does not have it.
    pub fn push<R: Read>(
        &mut self,
        layer: &Layer,
        blob: impl FnOnce() -> Result<R, ImageError>,
    ) -> Result<(), ImageError> {
        let chain = self.next(layer);
        let place = self.place(&chain);
        if !place.is_dir() {
            let _lock = lock(self.store.root.join("locks").join(chain.hex()), Wait::Yes)?;
            // Another process may have been faster.
            if !place.is_dir() {
                self.unpack_at(&place, layer, blob()?)?;
            }
        }
        self.layers.insert(0, place);
        self.chain = Some(chain);
        Ok(())
    }

    /// Whether [`push`](Self::push) would not read the blob of `layer`. Counts as pushed where it would not.
    #[cfg(feature = "registry")]
    pub fn push_cached(&mut self, layer: &Layer) -> bool {
        let chain = self.next(layer);
        let place = self.place(&chain);
        let cached = place.is_dir();
        if cached {
            self.layers.insert(0, place);
        }
        // Without its lower layers, a layer above cannot be there either, but its chain id still follows.
        self.chain = Some(chain);
        cached
    }

    /// The directories, topmost first.
    pub fn into_layers(self) -> Vec<PathBuf> {
        self.layers
    }

    fn next(&self, layer: &Layer) -> Digest {
        match &self.chain {
            None => layer.diff_id.clone(),
            Some(chain) => Digest::of(format!("{chain} {}", layer.diff_id).as_bytes()),
        }
    }

    fn place(&self, chain: &Digest) -> PathBuf {
        self.store.root.join("layers").join(chain.hex())
    }

    fn unpack_at(&mut self, place: &Path, layer: &Layer, blob: impl Read) -> Result<(), ImageError> {
        let work = place.with_extension("partial");
        let _sweep = Sweep(&work);
        // What an earlier process left when it was killed.
        remove(&work)?;
        fs::create_dir(&work).map_err(StoreError::io("create", &work))?;
        fs::set_permissions(&work, fs::Permissions::from_mode(0o755))
            .map_err(StoreError::io("set the mode of", &work))?;
        self.store.unpack(layer, blob, &work, &self.layers, &mut self.budget)?;
        let dir = File::open(&work).map_err(StoreError::io("open", &work))?;
        // A name that survives a power failure has to have its content too.
        rustix::fs::syncfs(&dir).map_err(|error| StoreError::io("write out", &work)(error.into()))?;
        fs::rename(&work, place).map_err(StoreError::io("rename", &work))?;
        Ok(())
    }
}

fn remove(dir: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// Removes what was not renamed away.
struct Sweep<'a>(&'a Path);

impl Drop for Sweep<'_> {
    fn drop(&mut self) {
        if let Err(error) = remove(self.0) {
            tracing::warn!(%error, "a partly unpacked layer stays behind");
        }
    }
}

/// A lock on the file system that ends with the value.
struct Lock {
    path: PathBuf,
    _file: File,
}

/// Whether to wait for a lock that somebody else holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    Yes,
    No,
}

/// `None` only where it is not waited for, and somebody else holds it.
fn lock(path: PathBuf, wait: Wait) -> Result<Option<Lock>, StoreError> {
    let operation = match wait {
        Wait::Yes => FlockOperation::LockExclusive,
        Wait::No => FlockOperation::NonBlockingLockExclusive,
    };
    loop {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(StoreError::io("create", &path))?;
        match rustix::fs::flock(&file, operation) {
            Err(Errno::WOULDBLOCK) if wait == Wait::No => return Ok(None),
            locked => locked.map_err(|error| StoreError::io("lock", &path)(error.into()))?,
        }
        // The holder before may have removed the file while this one waited; then it locks nothing.
        let held = file.metadata().map_err(StoreError::io("look at", &path))?.ino();
        if fs::metadata(&path).is_ok_and(|there| there.ino() == held) {
            return Ok(Some(Lock { path, _file: file }));
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
