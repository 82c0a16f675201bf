//! Images in a directory of the OCI image layout (`oci:DIR[:TAG]`).

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::spec::{self, Descriptor, ImageConfig, Index, Manifest, SpecError, listed};
use super::{BlobError, Contents, Digest, ImageError, Layer, read_document};

/// How deep indices may nest.
const MAX_DEPTH: usize = 4;

/// One image of a layout.
pub struct Layout {
    dir: PathBuf,
    config: ImageConfig,
    layers: Vec<Layer>,
}

impl Layout {
    /// Reads the documents of the image called `tag`, of the only image without one.
    pub fn open(dir: &Path, tag: Option<&str>) -> Result<Self, ImageError> {
        let name = format!("oci:{}", dir.display());
        let index: Index =
            spec::parse("index.json", &read_document(&dir.join("index.json"), spec::MANIFEST_LIMIT)?)?;
        let mut chosen = pick(&index, tag, &name)?.clone();
        for _ in 0..MAX_DEPTH {
            if !chosen.is_index() {
                return Self::read_image(dir, &chosen);
            }
            let index: Index =
                spec::parse("an index", &document(dir, &chosen, "index", spec::MANIFEST_LIMIT)?)?;
            chosen = index.for_host(&name)?.clone();
        }
        let source = SpecError::Unsupported(format!("nested more than {MAX_DEPTH} deep"));
        Err(ImageError::Spec { document: "the index".to_owned(), source })
    }

    fn read_image(dir: &Path, manifest: &Descriptor) -> Result<Self, ImageError> {
        let manifest: Manifest =
            spec::parse("the manifest", &document(dir, manifest, "manifest", spec::MANIFEST_LIMIT)?)?;
        let config = document(dir, &manifest.config, "configuration", spec::CONFIG_LIMIT)?;
        let config = spec::parse_config(&config, manifest.layers.len())?;
        let layers = layers(&manifest, &config);
        Ok(Self { dir: dir.to_owned(), config, layers })
    }
}

/// Pairs each layer's blob with its diff id; their numbers are equal by [`spec::parse_config`].
pub fn layers(manifest: &Manifest, config: &ImageConfig) -> Vec<Layer> {
    let pairs = manifest.layers.iter().zip(&config.rootfs.diff_ids);
    pairs
        .map(|(blob, diff_id)| Layer {
            blob: Some((blob.digest.clone(), blob.size)),
            diff_id: diff_id.clone(),
            name: format!("layer {}", blob.digest),
        })
        .collect()
}

/// A small blob, verified.
fn document(dir: &Path, at: &Descriptor, kind: &str, limit: u64) -> Result<Vec<u8>, ImageError> {
    let bytes = read_document(&blob_path(dir, &at.digest), limit.min(at.size))?;
    let actual = Digest::of(&bytes);
    if actual != at.digest {
        let name = format!("the image's {kind}");
        return Err(BlobError::Mismatch { name, expected: at.digest.clone(), actual }.into());
    }
    Ok(bytes)
}

fn blob_path(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join("blobs/sha256").join(digest.hex())
}

fn pick<'a>(index: &'a Index, tag: Option<&str>, name: &str) -> Result<&'a Descriptor, ImageError> {
    let tagged = |tag: &str| index.manifests.iter().find(|d| d.tag() == Some(tag));
    let found = match (tag, index.manifests.as_slice()) {
        (Some(tag), _) => tagged(tag),
        (None, [only]) => Some(only),
        (None, _) => tagged("latest").or_else(|| index.for_host(name).ok()),
    };
    found.ok_or_else(|| ImageError::NoSuchImage {
        image: name.to_owned(),
        wanted: tag.map_or_else(
            || "tagged latest, so one has to be named".to_owned(),
            |tag| format!("tagged {tag:?}"),
        ),
        present: listed(index.manifests.iter().filter_map(|d| d.tag().map(str::to_owned))),
    })
}

impl Contents for Layout {
    fn config(&self) -> &ImageConfig {
        &self.config
    }

    fn layers(&self) -> &[Layer] {
        &self.layers
    }

    fn open(&self, index: usize) -> Result<Box<dyn Read + '_>, ImageError> {
        let digest = self.layers.get(index).and_then(|layer| layer.blob.as_ref()).map(|(digest, _)| digest);
        let path = digest.map_or_else(PathBuf::new, |digest| blob_path(&self.dir, digest));
        let file = File::open(&path).map_err(|source| ImageError::Read { path, source })?;
        Ok(Box::new(file))
    }
}
