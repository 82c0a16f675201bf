//! The JSON documents of an image, as far as running one needs them (OCI image specification 1.1; Docker's image
//! manifest version 2, schema 2 has the same fields). Docker writes `null` for what is empty, so everything is optional.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Digest, ImageError};

/// Longest manifest or index that is read; registries refuse larger ones too.
pub const MANIFEST_LIMIT: u64 = 4 << 20;
/// Longest image configuration that is read.
pub const CONFIG_LIMIT: u64 = 8 << 20;

/// The annotation that carries a tag in a layout's index.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// What is wrong with a document.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON of the right shape.
    #[error("not valid")]
    Json(#[from] serde_json::Error),
    /// Valid, and something this program cannot run.
    #[error("{0}")]
    Unsupported(String),
}

/// A pointer to a blob.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Kind of the blob.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Which machines it is for (in an index).
    pub platform: Option<Platform>,
    /// Free text, by key.
    pub annotations: Option<BTreeMap<String, String>>,
}

impl Descriptor {
    /// The tag in a layout's index.
    pub fn tag(&self) -> Option<&str> {
        self.annotations.as_ref()?.get(REF_NAME).map(String::as_str)
    }

    /// Whether it leads to an index of images rather than to one image.
    pub fn is_index(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            "application/vnd.oci.image.index.v1+json"
                | "application/vnd.docker.distribution.manifest.list.v2+json"
        )
    }
}

/// Kind of machine.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Platform {
    /// CPU architecture, by Go's names.
    pub architecture: String,
    /// Operating system, by Go's names.
    pub os: String,
}

impl Platform {
    /// What pods on this host run: Linux on the host's architecture.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { architecture: architecture.to_owned(), os: "linux".to_owned() }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

/// Several images under one name.
#[derive(Clone, Debug, Deserialize)]
pub struct Index {
    /// The images, or indices of more.
    pub manifests: Vec<Descriptor>,
}

impl Index {
    /// The entry for this host. An entry that does not tell its platform is taken where it is the only one.
    pub fn for_host(&self, image: &str) -> Result<&Descriptor, ImageError> {
        let host = Platform::host();
        let fits = |d: &&Descriptor| d.platform.as_ref() == Some(&host);
        let only = match self.manifests.as_slice() {
            [one] if one.platform.is_none() => Some(one),
            _ => None,
        };
        self.manifests.iter().find(fits).or(only).ok_or_else(|| {
            let present = self.manifests.iter().filter_map(|d| d.platform.as_ref().map(ToString::to_string));
            ImageError::NoSuchImage {
                image: image.to_owned(),
                wanted: format!("for {host}"),
                present: listed(present),
            }
        })
    }
}

/// `a, b, c`, or `none`.
pub fn listed(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// One image.
#[derive(Clone, Debug, Deserialize)]
pub struct Manifest {
    /// The image's configuration.
    pub config: Descriptor,
    /// Its layers, lowest first.
    pub layers: Vec<Descriptor>,
}

/// The image's configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// CPU architecture.
    #[serde(default)]
    pub architecture: String,
    /// Operating system.
    #[serde(default)]
    pub os: String,
    /// How to run it.
    pub config: Option<ProcessDefaults>,
    /// What it is made of.
    #[serde(default)]
    pub rootfs: RootFs,
}

/// What the image says about the process to run in it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ProcessDefaults {
    /// `user`, `uid`, either with `:group` or `:gid`.
    pub user: Option<String>,
    /// `NAME=value`.
    pub env: Option<Vec<String>>,
    /// The fixed part of the command.
    pub entrypoint: Option<Vec<String>>,
    /// The part of the command that users replace.
    pub cmd: Option<Vec<String>>,
    /// Working directory.
    pub working_dir: Option<String>,
    /// The signal that asks it to end.
    pub stop_signal: Option<String>,
}

/// The layers of an image, by content.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RootFs {
    /// Digests of the uncompressed layers, lowest first.
    #[serde(default)]
    pub diff_ids: Vec<Digest>,
}

/// Parses one document; `name` is for the error.
pub fn parse<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ImageError::Spec { document: name.to_owned(), source: error.into() })
}

/// The configuration, once it is known to fit this host and its manifest of `layers` layers.
pub fn parse_config(bytes: &[u8], layers: usize) -> Result<ImageConfig, ImageError> {
    let config: ImageConfig = parse("the configuration", bytes)?;
    let host = Platform::host();
    let found = Platform { architecture: config.architecture.clone(), os: config.os.clone() };
    if !config.architecture.is_empty() && found != host {
        return Err(ImageError::Platform { found: found.to_string(), wanted: host.to_string() });
    }
    if config.rootfs.diff_ids.len() != layers {
        let text =
            format!("the manifest has {layers} layers, the configuration {}", config.rootfs.diff_ids.len());
        return Err(ImageError::Spec {
            document: "the configuration".to_owned(),
            source: SpecError::Unsupported(text),
        });
    }
    Ok(config)
}
