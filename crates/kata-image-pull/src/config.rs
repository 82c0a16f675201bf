//! The configuration file: TOML, in which an unknown key is an error.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kata_oci::{Credentials, Limits, PlainHttp, RegistryOptions};
use serde::Deserialize;
use tracing::Level;

use crate::policy::{Policy, PolicyError, SignatureSection};

/// Longest file that is read: configuration, certificates, keys.
const FILE_LIMIT: u64 = 4 << 20;
const USER_AGENT: &str = concat!("kata-image-pull/", env!("CARGO_PKG_VERSION"));

/// A configuration that the service does not start with.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that is named cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not TOML, an unknown key, a value of the wrong kind.
    #[error("{} is not a configuration of this service", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("{}: {key} {what}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it should be.
        what: &'static str,
    },
    /// Rules for signatures that cannot be followed.
    #[error("{}: the rules for signatures", path.display())]
    Policy {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<PolicyError>,
    },
}

/// What the service does, and within what.
#[derive(Debug)]
pub struct Config {
    /// Where layers and writable layers are kept.
    pub work_dir: PathBuf,
    /// Directory that all bundles are in.
    pub bundles: PathBuf,
    /// Pulls at a time.
    pub concurrency: usize,
    /// What one image may need.
    pub limits: Limits,
    /// How long one pull may take, mirrors and all.
    pub pull_timeout: Duration,
    /// Which images may be pulled.
    pub policy: Policy,
    /// How much is logged.
    pub log_level: Level,
    stall: Duration,
    downloads: usize,
    credentials: Credentials,
    authorities: Vec<Vec<u8>>,
    registries: BTreeMap<String, Registry>,
}

#[derive(Debug, Default)]
struct Registry {
    mirrors: Vec<String>,
    insecure: bool,
    authorities: Vec<Vec<u8>>,
}

/// As it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default = "default_work_dir")]
    work_dir: PathBuf,
    #[serde(default = "default_bundles")]
    bundles: PathBuf,
    #[serde(default = "two")]
    concurrency: usize,
    #[serde(default = "three")]
    downloads: usize,
    #[serde(default)]
    log_level: LogLevel,
    auth_file: Option<PathBuf>,
    #[serde(default)]
    ca_files: Vec<PathBuf>,
    #[serde(default)]
    limits: LimitsSection,
    #[serde(default)]
    registries: BTreeMap<String, RegistrySection>,
    signatures: SignatureSection,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LimitsSection {
    layers: usize,
    bytes: u64,
    entries: u64,
    pull_seconds: u64,
    stall_seconds: u64,
}

impl Default for LimitsSection {
    fn default() -> Self {
        let Limits { layers, .. } = Limits::default();
        Self { layers, bytes: 32 << 30, entries: 2_000_000, pull_seconds: 1200, stall_seconds: 60 }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RegistrySection {
    mirrors: Vec<String>,
    insecure: bool,
    ca_files: Vec<PathBuf>,
}

fn default_work_dir() -> PathBuf {
    "/run/kata-containers/image".into()
}

fn default_bundles() -> PathBuf {
    kata_api::guest::CONTAINER_DIR.into()
}

fn two() -> usize {
    2
}

fn three() -> usize {
    3
}

impl Config {
    /// Reads the file at `path`, and the certificates and keys that it names.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = String::from_utf8(read(path)?)
            .map_err(|error| ConfigError::Read { path: path.to_owned(), source: io::Error::other(error) })?;
        let document: Document = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        document.check(path)?;
        let policy = |source| ConfigError::Policy { path: path.to_owned(), source: Box::new(source) };
        let registries = document.registries.into_iter().map(|(name, section)| {
            let RegistrySection { mirrors, insecure, ca_files } = section;
            Ok((name, Registry { mirrors, insecure, authorities: read_all(&ca_files)? }))
        });
        let limits = document.limits;
        Ok(Self {
            work_dir: document.work_dir,
            bundles: document.bundles,
            concurrency: document.concurrency,
            limits: Limits { layers: limits.layers, bytes: limits.bytes, entries: limits.entries },
            pull_timeout: Duration::from_secs(limits.pull_seconds),
            policy: Policy::new(document.signatures, read).map_err(policy)?,
            log_level: document.log_level.into(),
            stall: Duration::from_secs(limits.stall_seconds),
            downloads: document.downloads,
            credentials: document.auth_file.map_or(Credentials::Nowhere, Credentials::File),
            authorities: read_all(&document.ca_files)?,
            registries: registries.collect::<Result<_, ConfigError>>()?,
        })
    }

    /// Whom to ask for images of `registry`, in order: its mirrors, and then itself.
    pub fn endpoints(&self, registry: &str) -> Vec<RegistryOptions> {
        let mirrors = self.registries.get(registry).map(|found| found.mirrors.as_slice()).unwrap_or_default();
        let of = |host: &str, mirror: Option<String>| {
            let own = self.registries.get(host);
            let authorities = own.map(|own| own.authorities.as_slice()).unwrap_or_default();
            RegistryOptions {
                plain: match own.is_some_and(|own| own.insecure) {
                    true => PlainHttp::Always,
                    false => PlainHttp::Never,
                },
                credentials: self.credentials.clone(),
                authorities: self.authorities.iter().chain(authorities).cloned().collect(),
                mirror,
                stall: self.stall,
                downloads: self.downloads,
                ..RegistryOptions::new(USER_AGENT)
            }
        };
        let mirrors = mirrors.iter().map(|mirror| of(mirror, Some(mirror.clone())));
        mirrors.chain([of(registry, None)]).collect()
    }
}

impl Document {
    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let fault =
            |key: &str, what| Err(ConfigError::Value { path: path.to_owned(), key: key.to_owned(), what });
        for (key, dir) in [("work_dir", &self.work_dir), ("bundles", &self.bundles)] {
            if !dir.is_absolute() {
                return fault(key, "has to be an absolute path");
            }
        }
        let LimitsSection { layers, bytes, entries, pull_seconds, stall_seconds } = self.limits;
        let positive = [
            ("concurrency", self.concurrency as u64),
            ("downloads", self.downloads as u64),
            ("limits.layers", layers as u64),
            ("limits.bytes", bytes),
            ("limits.entries", entries),
            ("limits.pull_seconds", pull_seconds),
            ("limits.stall_seconds", stall_seconds),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return fault(key, "has to be at least 1");
        }
        if layers > Limits::default().layers {
            return fault("limits.layers", "cannot be more than overlayfs stacks, 500");
        }
        let is_host = |name: &String| !name.is_empty() && !name.contains(['/', '@', '?', ' ']);
        for (name, registry) in &self.registries {
            if !is_host(name) || !registry.mirrors.iter().all(is_host) {
                return fault(
                    &format!("registries.{name:?}"),
                    "has to be named, and mirrored, as HOST or HOST:PORT",
                );
            }
        }
        Ok(())
    }
}

impl From<LogLevel> for Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
        }
    }
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, ConfigError> {
    paths.iter().map(|path| read(path)).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let fault = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(fault)?.take(FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(fault)?;
    match bytes.len() as u64 > FILE_LIMIT {
        true => Err(fault(io::ErrorKind::FileTooLarge.into())),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path).map_err(|error| crate::sentence(&error))
    }

    const LEAST: &str = "[signatures]\ndefault = \"accept\"\n";

    #[test]
    fn the_least_configuration_says_what_unsigned_images_are() {
        let config = load(LEAST).unwrap();
        assert_eq!(config.work_dir, Path::new("/run/kata-containers/image"));
        assert_eq!(config.endpoints("r.test").len(), 1);
        assert!(load("").unwrap_err().contains("signatures"));
    }

    #[test]
    fn an_unknown_key_is_named() {
        for text in ["nonsense = 1\n", "[limits]\nnonsense = 1\n", "[registries.\"r\"]\nnonsense = 1\n"] {
            let error = load(&format!("{text}{LEAST}")).unwrap_err();
            assert!(error.contains("nonsense"), "{error}");
        }
    }

    #[test]
    fn values_that_cannot_be_are_named_with_their_key() {
        for (text, key) in [
            ("concurrency = 0\n", "concurrency"),
            ("work_dir = \"here\"\n", "work_dir"),
            ("[limits]\nlayers = 501\n", "limits.layers"),
            ("[limits]\nbytes = 0\n", "limits.bytes"),
            ("[registries.\"https://r\"]\n", "https://r"),
            ("[registries.\"r\"]\nmirrors = [\"m/path\"]\n", "registries"),
            ("ca_files = [\"/nonexistent.pem\"]\n", "/nonexistent.pem"),
        ] {
            let error = load(&format!("{text}{LEAST}")).unwrap_err();
            assert!(error.contains(key), "{text}: {error}");
        }
    }

    #[test]
    fn mirrors_come_first_each_with_its_own_trust() {
        let text = "[registries.\"r.test\"]\nmirrors = [\"m.test:5000\"]\n[registries.\"m.test:5000\"]\ninsecure = true\n";
        let endpoints = load(&format!("{text}{LEAST}")).unwrap().endpoints("r.test");
        let told: Vec<_> = endpoints.iter().map(|e| (e.mirror.as_deref(), e.plain)).collect();
        assert_eq!(told, [(Some("m.test:5000"), PlainHttp::Always), (None, PlainHttp::Never)]);
    }
}
