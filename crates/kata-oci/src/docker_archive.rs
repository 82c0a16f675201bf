//! Images in a tar file as `docker save` writes it (`docker-archive:FILE`): a `manifest.json` that names a configuration
//! and layers, all members of the same tar. Layers are uncompressed there, or compressed by other tools; only their diff
//! ids are known in advance.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::spec::{self, ImageConfig, listed};
use super::{BlobError, Contents, Digest, ImageError, Layer};

/// An archive with one image.
pub struct DockerArchive {
    path: PathBuf,
    members: Members,
    config: ImageConfig,
    layers: Vec<Layer>,
    files: Vec<String>,
}

/// An element of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl DockerArchive {
    /// Reads the documents of the only image in `path`.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let fault = |source| ImageError::Read { path: path.to_owned(), source };
        let members = Members::scan(path).map_err(fault)?;
        let read = |name: &str, limit| {
            let (file, size) = members.open(path, name)?;
            let mut bytes = Vec::new();
            if size > limit {
                return Err(fault(io::Error::other(format!("{name} is larger than {limit} bytes"))));
            }
            { file }.read_to_end(&mut bytes).map_err(fault)?;
            Ok(bytes)
        };
        let entries: Vec<Entry> =
            spec::parse("manifest.json", &read("manifest.json", spec::MANIFEST_LIMIT)?)?;
        let [entry] = <[Entry; 1]>::try_from(entries).map_err(|entries| ImageError::NoSuchImage {
            image: format!("docker-archive:{}", path.display()),
            wanted: "to run, as it has to hold exactly one".to_owned(),
            present: listed(entries.into_iter().flat_map(|entry| entry.repo_tags.unwrap_or_default())),
        })?;
        let config = read(&entry.config, spec::CONFIG_LIMIT)?;
        check_named_digest(&entry.config, &config)?;
        let config = spec::parse_config(&config, entry.layers.len())?;
        let layers = entry.layers.iter().zip(&config.rootfs.diff_ids).map(|(name, diff_id)| Layer {
            blob: None,
            diff_id: diff_id.clone(),
            name: format!("layer {name}"),
        });
        Ok(Self { path: path.to_owned(), layers: layers.collect(), members, config, files: entry.layers })
    }
}

/// The configuration's file is named by its digest: `<hex>.json` or `blobs/sha256/<hex>`.
fn check_named_digest(name: &str, bytes: &[u8]) -> Result<(), ImageError> {
    let stem = Path::new(name).file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let Ok(expected) = format!("sha256:{stem}").parse::<Digest>() else { return Ok(()) };
    let actual = Digest::of(bytes);
    if actual == expected {
        return Ok(());
    }
    Err(BlobError::Mismatch { name: "the image's configuration".to_owned(), expected, actual }.into())
}

/// Where the members of a tar file are.
struct Members {
    files: HashMap<PathBuf, (u64, u64)>,
    links: HashMap<PathBuf, PathBuf>,
}

impl Members {
    fn scan(path: &Path) -> io::Result<Self> {
        let mut members = Self { files: HashMap::new(), links: HashMap::new() };
        let mut archive = tar::Archive::new(BufReader::new(File::open(path)?));
        for entry in archive.entries_with_seek()? {
            let entry = entry?;
            let name = normal(Path::new("/"), &entry.path()?);
            let kind = entry.header().entry_type();
            if kind.is_file() {
                members.files.insert(name, (entry.raw_file_position(), entry.size()));
            } else if let Some(target) = entry.link_name()? {
                let base = if kind.is_hard_link() { Path::new("/") } else { name.parent().unwrap_or(&name) };
                members.links.insert(name.clone(), normal(base, &target));
            }
        }
        Ok(members)
    }

    /// The member called `name`, links followed, and its size.
    fn open(&self, archive: &Path, name: &str) -> Result<(impl Read + use<>, u64), ImageError> {
        let mut at = &normal(Path::new("/"), Path::new(name));
        // Old archives share layers by one link each; more than a few in a row are a loop.
        for _ in 0..8 {
            match self.links.get(at) {
                Some(target) => at = target,
                None => break,
            }
        }
        let Some(&(position, size)) = self.files.get(at) else {
            let archive = archive.display().to_string();
            return Err(ImageError::Missing { archive, member: name.to_owned() });
        };
        let open = || {
            let mut file = File::open(archive)?;
            file.seek(SeekFrom::Start(position))?;
            Ok(file)
        };
        let file = open().map_err(|source| ImageError::Read { path: archive.to_owned(), source })?;
        Ok((file.take(size), size))
    }
}

/// Absolute, without `.` and `..`.
fn normal(base: &Path, path: &Path) -> PathBuf {
    let mut whole = base.to_owned();
    for component in path.components() {
        match component {
            Component::Normal(name) => whole.push(name),
            Component::ParentDir => _ = whole.pop(),
            Component::RootDir => whole = PathBuf::from("/"),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    whole
}

impl Contents for DockerArchive {
    fn config(&self) -> &ImageConfig {
        &self.config
    }

    fn layers(&self) -> &[Layer] {
        &self.layers
    }

    fn open(&self, index: usize) -> Result<Box<dyn Read + '_>, ImageError> {
        let name = self.files.get(index).map(String::as_str).unwrap_or_default();
        let (file, _) = self.members.open(&self.path, name)?;
        Ok(Box::new(file))
    }
}
