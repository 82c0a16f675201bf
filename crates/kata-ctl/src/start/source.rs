//! Where starts are found.

use std::io;
use std::path::{Path, PathBuf};

use kata_config::paths;

use super::Start;
use crate::pod::{Client, PodDir};

/// Longest file that is read.
const FILE_MAX: u64 = 16 << 20;

/// Why there is no start to look at.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Nothing of that name.
    #[error(
        "there is no pod, kept start or file named {0}; see `kata-ctl list -a`, or take the last start with --last"
    )]
    Unknown(String),
    /// No pod was started yet.
    #[error("no start is kept in {}: start a pod first", .0.display())]
    None(PathBuf),
    /// A file that is of no use.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that holds something else.
    #[error("{} tells of no start", path.display())]
    Shape {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl SourceError {
    /// Whether there is no such thing, rather than something that cannot be read.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Unknown(_) | Self::None(_))
    }
}

/// The start of the pod named `name`: as its owner tells it, else as it left it, else as it was kept.
///
/// # Errors
/// [`SourceError`].
pub async fn find(name: &str) -> Result<Start, SourceError> {
    if let Ok(pod) = PodDir::existing(name) {
        if let Ok(client) = Client::connect(&pod).await
            && let Ok(told) = client.inspect().await
        {
            return Ok(told.into());
        }
        let state = pod.run_dir.join("state.json");
        if state.exists() {
            return read(&state);
        }
    }
    // Behind the time, which has no dash.
    let of_pod = |path: &PathBuf| {
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        stem.and_then(|stem| stem.split_once('-')).is_some_and(|(_, id)| id == name)
    };
    match kept().into_iter().rev().find(of_pod) {
        Some(path) => read(&path),
        None => Err(SourceError::Unknown(name.to_owned())),
    }
}

/// The last start of this host.
///
/// # Errors
/// [`SourceError`].
pub fn last() -> Result<Start, SourceError> {
    kept().last().map_or_else(|| Err(SourceError::None(dir())), |path| read(path))
}

/// A start from a file.
///
/// # Errors
/// [`SourceError`].
pub fn read(path: &Path) -> Result<Start, SourceError> {
    let failed = |source| SourceError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(failed)?.len() > FILE_MAX {
        return Err(failed(io::Error::from(io::ErrorKind::FileTooLarge)));
    }
    let text = std::fs::read(path).map_err(failed)?;
    let start = serde_json::from_slice::<Start>(&text).and_then(|start| match start.timeline.is_empty() {
        false => Ok(start),
        true => Err(serde::de::Error::custom("it has no `timeline` with stages")),
    });
    start.map_err(|source| SourceError::Shape { path: path.to_owned(), source })
}

/// The kept starts that can be read, the newest first.
pub fn recent() -> impl Iterator<Item = Start> {
    kept().into_iter().rev().filter_map(|path| read(&path).ok())
}

fn dir() -> PathBuf {
    paths::state_dir().join("starts")
}

/// Files of the kept starts, the oldest first.
fn kept() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir()).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn a_saved_start_reads_back_and_anything_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let start = samples::start("web");
        std::fs::write(&path, serde_json::to_vec(&start).unwrap()).unwrap();
        assert_eq!(read(&path).unwrap(), start);
        for text in ["{}", "[]", "x", "{\"timeline\": 3}"] {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(read(&path), Err(SourceError::Shape { .. })), "{text}");
        }
        assert!(matches!(read(&dir.path().join("b.json")), Err(SourceError::Read { .. })));
    }
}
