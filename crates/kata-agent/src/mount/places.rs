//! What there is at paths of the guest, each path with a lock of its own.
//!
//! Mounting, unmounting and looking may wait for a disk or for the host. Whoever does that keeps those waiting who come for the
//! same path, and nobody else: the table of all paths is locked for no longer than it takes to look something up in it.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

type Lock<T> = Arc<tokio::sync::Mutex<Option<T>>>;

/// A table of what is at which path. Clones share it.
#[derive(Debug)]
pub(super) struct Places<T>(Arc<Mutex<HashMap<PathBuf, Entry<T>>>>);

#[derive(Debug)]
struct Entry<T> {
    lock: Lock<T>,
    /// Who has it or waits for it.
    visitors: usize,
}

/// One path, for as long as this lives nobody else's. `None` is nothing.
#[derive(Debug)]
pub(super) struct Place<T> {
    // Released before the visit ends.
    what: OwnedMutexGuard<Option<T>>,
    _visit: Visit<T>,
}

/// Keeps the entry of a path in the table.
#[derive(Debug)]
struct Visit<T> {
    all: Places<T>,
    path: PathBuf,
    lock: Lock<T>,
}

impl<T> Places<T> {
    /// The place at `path`, once nobody else has it.
    pub(super) async fn lock(&self, path: &Path) -> Place<T> {
        let visit = self.visit(path);
        let what = visit.lock.clone().lock_owned().await;
        Place { what, _visit: visit }
    }

    /// As [`lock`](Self::lock), for threads that may wait.
    pub(super) fn lock_blocking(&self, path: &Path) -> Place<T> {
        let visit = self.visit(path);
        let what = visit.lock.clone().blocking_lock_owned();
        Place { what, _visit: visit }
    }

    /// The paths where something is, or is just coming or going.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.table().keys().cloned().collect()
    }

    /// Whether nobody is at the place at `path`.
    #[cfg(test)]
    pub(super) fn is_free(&self, path: &Path) -> bool {
        self.table().get(path).is_none_or(|entry| entry.lock.try_lock().is_ok())
    }

    fn visit(&self, path: &Path) -> Visit<T> {
        let mut table = self.table();
        let new = || Entry { lock: Arc::default(), visitors: 0 };
        let entry = table.entry(path.to_owned()).or_insert_with(new);
        entry.visitors += 1;
        Visit { all: self.clone(), path: path.to_owned(), lock: entry.lock.clone() }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<PathBuf, Entry<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Clone for Places<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Default for Places<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Deref for Place<T> {
    type Target = Option<T>;

    fn deref(&self) -> &Option<T> {
        &self.what
    }
}

impl<T> DerefMut for Place<T> {
    fn deref_mut(&mut self) -> &mut Option<T> {
        &mut self.what
    }
}

/// A path with nothing is forgotten by the last visitor.
impl<T> Drop for Visit<T> {
    fn drop(&mut self) {
        let mut table = self.all.table();
        let Some(entry) = table.get_mut(&self.path) else { return };
        entry.visitors -= 1;
        if entry.visitors == 0 && entry.lock.try_lock().is_ok_and(|what| what.is_none()) {
            table.remove(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_place_is_one_users_at_a_time_and_keeps_nobody_from_others() {
        let places = Places::<u32>::default();
        let (one, two) = (Path::new("/one"), Path::new("/two"));
        let mut held = places.lock(one).await;
        *held = Some(1);
        let waiting = {
            let places = places.clone();
            tokio::spawn(async move { (*places.lock(Path::new("/one")).await).take() })
        };
        *places.lock(two).await = Some(2);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(held);
        assert_eq!(waiting.await.unwrap(), Some(1));
        assert_eq!(places.paths(), [two], "what is empty is forgotten");
    }

    #[tokio::test]
    async fn a_place_that_somebody_waits_for_stays_the_same_one() {
        let places = Places::<u32>::default();
        let path = Path::new("/one");
        let held = places.lock(path).await;
        let second = places.clone();
        let waiting = tokio::spawn(async move { *second.lock(Path::new("/one")).await = Some(5) });
        tokio::task::yield_now().await;
        drop(held);
        waiting.await.unwrap();
        assert_eq!(places.lock(path).await.take(), Some(5));
        assert!(places.paths().is_empty());
    }

    #[tokio::test]
    async fn who_gives_up_waiting_leaves_no_trace() {
        let places = Places::<u32>::default();
        let path = Path::new("/one");
        let held = places.lock(path).await;
        let waits = tokio::time::timeout(std::time::Duration::from_millis(5), places.lock(path)).await;
        assert!(waits.is_err());
        drop(held);
        assert!(places.paths().is_empty());
    }
}
