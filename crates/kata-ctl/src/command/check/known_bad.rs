//! Versions that are known to be bad: a list that is built in, or a newer one that somebody trusted has signed.

use std::path::{Path, PathBuf};

use minisign_verify::{PublicKey, Signature};
use serde::Deserialize;

use super::Finding;

/// The list of this release.
const BUILT_IN: &str = include_str!("known-bad.toml");
/// Whose signature is believed, unless another key is named.
const KEY: &str = "/etc/kata-containers/known-bad.pub";
/// The shape of the list.
const VERSION: u32 = 1;

/// A list that is of no use.
#[derive(Debug, thiserror::Error)]
pub enum KnownBadError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The key is none.
    #[error("{} is no minisign public key ({reason})", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The signature is none, or is another's.
    #[error("{} is not signed by the key in {} ({reason}): it is not used", list.display(), key.display())]
    Signature {
        /// The list.
        list: PathBuf,
        /// The key.
        key: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The list has another shape.
    #[error("{} is not a list of known-bad versions", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: toml::de::Error,
    },
    /// The list is of another version.
    #[error("{} has version {version}; this release reads version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// A list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownBad {
    version: u32,
    /// Day of the last change.
    pub updated: String,
    #[serde(default)]
    bad: Vec<Bad>,
}

/// Versions of one component, and what is wrong with them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bad {
    id: String,
    component: Component,
    ranges: Vec<Range>,
    cost: String,
    mend: String,
    source: String,
}

/// What has versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Component {
    /// The host's.
    Kernel,
    /// `qemu-system-*`.
    Qemu,
    /// `cloud-hypervisor`.
    CloudHypervisor,
    /// `firecracker`.
    Firecracker,
}

impl Component {
    fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Qemu => "QEMU",
            Self::CloudHypervisor => "Cloud Hypervisor",
            Self::Firecracker => "Firecracker",
        }
    }
}

impl KnownBad {
    /// The list of this release.
    ///
    /// # Errors
    /// A mistake in it, which a test would find first.
    pub fn built_in() -> Result<Self, KnownBadError> {
        Self::parse(Path::new("the built-in list"), BUILT_IN)
    }

    /// The list in `path`, if `<path>.minisig` is its signature by the key in `key`.
    ///
    /// # Errors
    /// It is not, or is no list.
    pub fn signed(path: &Path, key: Option<&Path>) -> Result<Self, KnownBadError> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|source| KnownBadError::Read { path: path.to_owned(), source })
        };
        let key = key.unwrap_or_else(|| Path::new(KEY));
        let text = read(path)?;
        let mut name = path.as_os_str().to_owned();
        name.push(".minisig");
        let signature = read(Path::new(&name))?;
        let public = PublicKey::decode(&String::from_utf8_lossy(&read(key)?))
            .map_err(|error| KnownBadError::Key { path: key.to_owned(), reason: error.to_string() })?;
        let refused = |error: minisign_verify::Error| KnownBadError::Signature {
            list: path.to_owned(),
            key: key.to_owned(),
            reason: error.to_string(),
        };
        let signature = Signature::decode(&String::from_utf8_lossy(&signature)).map_err(refused)?;
        public.verify(&text, &signature, false).map_err(refused)?;
        Self::parse(path, &String::from_utf8_lossy(&text))
    }

    fn parse(path: &Path, text: &str) -> Result<Self, KnownBadError> {
        let list: Self =
            toml::from_str(text).map_err(|source| KnownBadError::Shape { path: path.to_owned(), source })?;
        match list.version {
            VERSION => Ok(list),
            version => Err(KnownBadError::Version { path: path.to_owned(), version }),
        }
    }

    /// What the list says of a version of something.
    pub fn findings(&self, component: Component, version: &str) -> Vec<Finding> {
        let Some(parsed) = Version::parse(version) else { return Vec::new() };
        let bad = self.bad.iter().filter(|bad| {
            bad.component == component && bad.ranges.iter().any(|range| range.contains(&parsed))
        });
        bad.map(|bad| {
            let found = format!("{} {version}: {} ({})", component.as_str(), bad.id, bad.source);
            Finding::warning("known bad", found, &bad.cost, &bad.mend)
        })
        .collect()
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.bad.len()
    }
}

/// Numbers between points; what follows them is left out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(Vec<u32>);

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let numbers: Option<Vec<u32>> =
            text.get(..end)?.trim_end_matches('.').split('.').map(|number| number.parse().ok()).collect();
        let mut numbers = numbers?;
        // 5.2 and 5.2.0 are one.
        while numbers.last() == Some(&0) && numbers.len() > 1 {
            numbers.pop();
        }
        Some(Self(numbers))
    }
}

/// Bounds that all have to be met.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Range(Vec<(Bound, Version)>);

#[derive(Clone, Copy, Debug)]
enum Bound {
    Least,
    Above,
    Below,
    Most,
}

impl Range {
    fn contains(&self, version: &Version) -> bool {
        self.0.iter().all(|(bound, other)| match bound {
            Bound::Least => version >= other,
            Bound::Above => version > other,
            Bound::Below => version < other,
            Bound::Most => version <= other,
        })
    }
}

impl TryFrom<String> for Range {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let bound = |part: &str| {
            let part = part.trim();
            let signs = [(">=", Bound::Least), ("<=", Bound::Most), (">", Bound::Above), ("<", Bound::Below)];
            let (bound, rest) =
                signs.into_iter().find_map(|(sign, bound)| Some((bound, part.strip_prefix(sign)?)))?;
            Some((bound, Version::parse(rest.trim())?))
        };
        let bounds: Option<Vec<_>> = text.split(',').map(bound).collect();
        bounds.map(Self).ok_or_else(|| format!("{text:?} is no range: expected e.g. \">=5.8, <5.10.102\""))
    }
}

/// The version of the kernel that its stable series gives it, where it tells one: distributions' releases mostly end in the
/// number of their own interface (`5.10.0-13-amd64`), and what they have fixed shows in the longer text alone.
pub fn kernel_version(release: &str, built: &str, signature: Option<&str>) -> Option<String> {
    // Ubuntu: "Ubuntu 5.15.0-25.25-generic 5.15.30"
    if let Some(version) = signature.and_then(|text| text.split_whitespace().nth(2)) {
        return Some(version.to_owned());
    }
    // Debian: "#1 SMP Debian 5.10.106-1 (2022-03-17)"
    let debian = built.split_once("Debian ").and_then(|(_, rest)| rest.split(['-', ' ', '(']).next());
    if let Some(version) = debian.filter(|version| version.contains('.')) {
        return Some(version.to_owned());
    }
    let version = release.split(['-', '+']).next()?;
    let tells = version.split('.').nth(2).is_some_and(|patch| patch != "0") || !release.contains('-');
    tells.then(|| version.to_owned())
}

#[cfg(test)]
mod tests;
