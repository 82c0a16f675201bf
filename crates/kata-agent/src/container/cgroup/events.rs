//! Waiting for what a cgroup does by itself, without asking again and again: the kernel reports a changed event file
//! as exceptional data to poll(2).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{CgroupError, flat_key, inhabitants};

/// An event file and its present text.
#[derive(Debug)]
struct EventFile {
    path: PathBuf,
    file: AsyncFd<File>,
}

impl EventFile {
    fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let failed = |error| CgroupError::file("watch", path.clone(), error);
        let file = File::open(&path).map_err(failed)?;
        // SAFETY: a `File` gives the same open descriptor for as long as it lives, and only `&File` is used from here.
        let registered = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) };
        let file = registered.map_err(|error| failed(error.into()))?;
        Ok(Self { path, file })
    }

    fn read(&self) -> io::Result<String> {
        let mut buffer = [0; 1024];
        let length = self.file.get_ref().read_at(&mut buffer, 0)?;
        Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned())
    }

    /// The text that `wanted` gives an answer for: now or after any number of changes.
    async fn until<T>(&self, mut wanted: impl FnMut(&str) -> Option<T>) -> io::Result<T> {
        loop {
            // Registered since it was opened, so a change between this read and the wait below is not missed.
            if let Some(found) = wanted(&self.read()?) {
                return Ok(found);
            }
            self.file.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}

/// Waits until `key` of the cgroup's `cgroup.events` is `value`.
pub(super) async fn wait(
    cgroup: &Path,
    key: &str,
    value: &str,
    patience: Duration,
    wanted: &'static str,
) -> Result<(), CgroupError> {
    let events = EventFile::open(cgroup.join("cgroup.events"))?;
    let reached = events.until(|text| (flat_key(text, key) == Some(value)).then_some(()));
    match tokio::time::timeout(patience, reached).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(CgroupError::file("read", events.path, error)),
        Err(_) => {
            let inhabitants = inhabitants(cgroup);
            Err(CgroupError::TimedOut { path: cgroup.to_owned(), wanted, after: patience, inhabitants })
        }
    }
}

/// A container's out-of-memory kills.
#[derive(Debug)]
pub struct OomEvents {
    events: EventFile,
    /// Tells when the container has no process left. Its removal is told by nobody.
    population: EventFile,
    kills: u64,
}

impl OomEvents {
    pub(super) fn watch(cgroup: &Path) -> Result<Self, CgroupError> {
        let path = cgroup.join("memory.events");
        if !path.exists() {
            let (key, file) = ("memory events".to_owned(), "memory.events".to_owned());
            return Err(CgroupError::NoController { key, file });
        }
        let events = EventFile::open(path)?;
        let population = EventFile::open(cgroup.join("cgroup.events"))?;
        let text = events.read().map_err(|error| CgroupError::file("read", &events.path, error))?;
        Ok(Self { kills: kills(&text), events, population })
    }

    /// How many processes were killed since the last call. `None` once the container has no process left.
    pub async fn next(&mut self) -> Option<u64> {
        let before = self.kills;
        let more = |text: &str| Some(kills(text)).filter(|now| *now > before);
        let empty = self.population.until(|text| (flat_key(text, "populated") == Some("0")).then_some(()));
        let now = tokio::select! {
            now = self.events.until(more) => now.ok(),
            // The kill that emptied it was counted before. Reading the file of a removed cgroup fails.
            _ = empty => self.events.read().ok().and_then(|text| more(&text)),
        };
        self.kills = now?;
        Some(self.kills - before)
    }
}

fn kills(text: &str) -> u64 {
    flat_key(text, "oom_kill").and_then(|value| value.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
