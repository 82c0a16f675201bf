//! What images were when they were last pulled: for the time that the registry is away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_client::Reference;

use super::Resolved;
use crate::spec::{self, Manifest};
use crate::{Digest, Store};

/// The documents of an image as they were when it was last pulled.
pub struct Remembered {
    dir: PathBuf,
    reference: PathBuf,
}

impl Remembered {
    pub fn of(store: &Store, reference: &Reference) -> Self {
        let name = Digest::of(reference.whole().as_bytes());
        Self {
            dir: store.root().join("documents"),
            reference: store.root().join("references").join(name.hex()),
        }
    }

    /// `None` where there is nothing, or nothing intact.
    pub fn recall(&self) -> Option<Resolved> {
        let digest: Digest = fs::read_to_string(&self.reference).ok()?.trim().parse().ok()?;
        let manifest: Manifest = serde_json::from_slice(&self.document(&digest)?).ok()?;
        let config =
            spec::parse_config(&self.document(&manifest.config.digest)?, manifest.layers.len()).ok()?;
        Some(Resolved { digest, index: None, config, manifest })
    }

    fn document(&self, digest: &Digest) -> Option<Vec<u8>> {
        let bytes = fs::read(self.dir.join(digest.hex())).ok()?;
        (Digest::of(&bytes) == *digest).then_some(bytes)
    }

    /// Best effort: an image that cannot be remembered can still be run.
    pub fn keep(&self, manifest: &[u8], config: &[u8]) {
        let write = || {
            fs::create_dir_all(&self.dir)?;
            fs::create_dir_all(self.reference.parent().unwrap_or(&self.dir))?;
            for bytes in [config, manifest] {
                replace(&self.dir.join(Digest::of(bytes).hex()), bytes)?;
            }
            replace(&self.reference, Digest::of(manifest).to_string().as_bytes())
        };
        if let Err(error) = write() {
            tracing::warn!(%error, "the image's documents cannot be kept for later");
        }
    }
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension(format!("{}.part", std::process::id()));
    fs::write(&part, bytes)?;
    fs::rename(&part, path)
}
