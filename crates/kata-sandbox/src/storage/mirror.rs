//! Small directories that change on the host, as copies in the guest that follow: config maps, secrets and the like.
//!
//! kubelet publishes a new version of such a volume by one rename, and programs wait for that (inotify). A share tells the
//! guest of nothing that the host does, so nobody there would ever wake. A copy changes in the guest itself. The host's
//! kernel tells when to look again; nobody looks at regular times.
//!
//! ```text
//!  kubelet ── ..2024_02/key, rename ..data ──▶ volume on the host
//!                                                │ inotify, one for the pod
//!                                                ▼ a moment of quiet, look again
//!   CopyFile ..2024_02/, ..2024_02/key   ─▶ new files first, seen by nobody
//!   CopyFile ..data (a link, one step)   ─▶ now every name leads to the new ones
//!   CopyFile key (a link)                ─▶ names that are new
//!   Remove ..2024_01                     ─▶ what is gone, last
//! ```
//!
//! Bounds: [`ENTRIES`] names and [`BYTES`] bytes. What holds more is not copied; what grows beyond stays as it was, and the
//! owner's log says so.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kata_api::agent::CopyFileRequest;
use rustix::fs::inotify;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::StorageError;
use crate::agent_client::{Agent, AgentError};
use crate::blocking::blocking;
use crate::error::ErrorKind;

/// Most names in a copied directory.
pub(super) const ENTRIES: usize = 128;
/// Most bytes in its files: what Kubernetes lets one config map hold.
pub(super) const BYTES: u64 = 1024 * 1024;
/// How long a volume must not change before it is looked at.
const QUIET: Duration = Duration::from_millis(20);
/// Looks at a volume that changes all the while.
const LOOKS: usize = 50;
/// Between two looks, where the kernel does not tell, and after a failure.
const INTERVAL: Duration = Duration::from_secs(2);
/// Of the directories above it in the guest.
const DIR_MODE: u32 = 0o755;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    /// Changes when the file does: inode, size, time of change.
    File([i64; 4]),
    Link(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// A directory by the names in it; its own is empty.
type Tree = BTreeMap<PathBuf, Entry>;

/// Whether the directory is small enough to be copied.
pub(super) fn fits(root: &Path) -> Result<bool, StorageError> {
    match scan(root) {
        Ok(tree) => Ok(tree.is_some()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !root.exists() => {
            Err(StorageError::Absent(root.to_owned()))
        }
        // It is being published just now.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(StorageError::file("look through", root, error)),
    }
}

/// `None` if it is more than is copied.
fn scan(root: &Path) -> io::Result<Option<Tree>> {
    let mut tree = Tree::from([(PathBuf::new(), entry(root, &std::fs::metadata(root)?)?)]);
    let (mut left, mut size) = (vec![PathBuf::new()], 0_u64);
    while let Some(directory) = left.pop() {
        for found in std::fs::read_dir(root.join(&directory))? {
            let name = directory.join(found?.file_name());
            let path = root.join(&name);
            let metadata = std::fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                left.push(name.clone());
            } else if metadata.is_file() {
                size = size.saturating_add(metadata.len());
            } else if !metadata.is_symlink() {
                continue;
            }
            tree.insert(name, entry(&path, &metadata)?);
            if tree.len() > ENTRIES || size > BYTES {
                return Ok(None);
            }
        }
    }
    Ok(Some(tree))
}

fn entry(path: &Path, metadata: &Metadata) -> io::Result<Entry> {
    let kind = if metadata.is_dir() {
        Kind::Directory
    } else if metadata.is_symlink() {
        Kind::Link(std::fs::read_link(path)?.into_os_string().into_vec())
    } else {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        Kind::File([number(metadata.ino()), number(metadata.size()), metadata.ctime(), metadata.ctime_nsec()])
    };
    Ok(Entry { kind, mode: metadata.mode(), uid: metadata.uid(), gid: metadata.gid() })
}

/// What it takes to make one tree of another, in order.
#[derive(Debug, Default, PartialEq, Eq)]
struct Steps {
    /// In the way of something of another kind.
    clear: Vec<PathBuf>,
    put: Vec<PathBuf>,
    /// Gone.
    remove: Vec<PathBuf>,
}

fn steps(old: &Tree, new: &Tree) -> Steps {
    let same_kind = |a: &Kind, b: &Kind| std::mem::discriminant(a) == std::mem::discriminant(b);
    let mut put: Vec<(&PathBuf, &Entry)> =
        new.iter().filter(|(name, entry)| old.get(*name) != Some(*entry)).collect();
    // Stable: directories stay before what is in them.
    put.sort_by_key(|(name, entry)| match entry.kind {
        Kind::Directory => 0,
        Kind::File(_) => 1,
        // kubelet's own link, before the names that lead through it.
        Kind::Link(_) if name.as_os_str().as_bytes().starts_with(b"..") => 2,
        Kind::Link(_) => 3,
    });
    let gone = old.keys().filter(|name| !new.contains_key(*name));
    let mut remove: Vec<PathBuf> = gone.cloned().collect();
    // With a directory goes what is in it.
    let whole = remove.clone();
    remove.retain(|name| !whole.iter().any(|above| above != name && name.starts_with(above)));
    Steps {
        clear: put
            .iter()
            .filter(|(name, entry)| old.get(*name).is_some_and(|was| !same_kind(&was.kind, &entry.kind)))
            .map(|(name, _)| (*name).clone())
            .collect(),
        put: put.into_iter().map(|(name, _)| name.clone()).collect(),
        remove,
    }
}

/// The host kernel's word that something has changed in the directories that mirrors look at.
#[derive(Debug)]
pub(crate) struct Changes {
    inotify: Arc<AsyncFd<OwnedFd>>,
    count: watch::Receiver<u64>,
    /// It was told that the kernel does not tell of all directories.
    warned: AtomicBool,
    task: JoinHandle<()>,
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Changes {
    /// # Errors
    /// The host's limit of inotify instances.
    pub(crate) fn new() -> io::Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        // SAFETY: the descriptor is owned here and stays the same until it is deregistered with this value.
        let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        let inotify = Arc::new(registered?);
        let (tell, count) = watch::channel(0_u64);
        let events = inotify.clone();
        let task = tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(mut ready) = events.readable().await {
                // What has changed, a look tells better than the events.
                match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?)) {
                    Ok(Ok(_)) => tell.send_modify(|count| *count = count.wrapping_add(1)),
                    Ok(Err(_)) => return,
                    Err(_) => {}
                }
            }
        });
        Ok(Self { inotify, count, warned: AtomicBool::new(false), task })
    }

    /// Hears of changes in these directories, or in some only: whether in all is the answer. Those that are gone meanwhile are
    /// passed over.
    fn watch<'a>(&self, root: &Path, directories: impl Iterator<Item = &'a PathBuf>) -> Result<bool, Errno> {
        use inotify::WatchFlags as On;
        let changes = On::CREATE | On::DELETE | On::MOVE | On::CLOSE_WRITE | On::MODIFY | On::ATTRIB;
        for directory in directories {
            let path = root.join(directory);
            match inotify::add_watch(self.inotify.get_ref(), &path, changes | On::DELETE_SELF | On::ONLYDIR) {
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(error @ (Errno::NOSPC | Errno::NOMEM)) => {
                    if !self.warned.swap(true, Ordering::Relaxed) {
                        tracing::warn!(
                            path = %path.display(),
                            %error,
                            "the host has no inotify watches left, so this volume, and any other without, is looked at \
                             every {} s: raise fs.inotify.max_user_watches",
                            INTERVAL.as_secs()
                        );
                    }
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// A copy that follows its original until it is dropped.
#[derive(Debug)]
pub(crate) struct Mirror(JoinHandle<()>);

impl Drop for Mirror {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Mirror {
    /// Copies `source` to `target` in the guest, and has it follow.
    pub(crate) async fn start(
        agent: &Agent,
        changes: Option<Arc<Changes>>,
        source: &Path,
        target: &Path,
    ) -> Result<Self, StorageError> {
        let mut copy = Copy {
            agent: agent.clone(),
            count: changes.as_ref().map(|changes| changes.count.clone()),
            changes,
            source: source.to_owned(),
            target: target.display().to_string(),
            blind: false,
            there: Tree::new(),
        };
        copy.update().await?;
        Ok(Self(tokio::spawn(copy.follow())))
    }
}

struct Copy {
    agent: Agent,
    changes: Option<Arc<Changes>>,
    count: Option<watch::Receiver<u64>>,
    source: PathBuf,
    target: String,
    /// The kernel does not tell of all of its directories.
    blind: bool,
    there: Tree,
}

impl Copy {
    async fn follow(mut self) {
        loop {
            match &mut self.count {
                Some(count) => {
                    if self.blind {
                        if let Ok(Err(_)) = tokio::time::timeout(INTERVAL, count.changed()).await {
                            return;
                        }
                    } else if count.changed().await.is_err() {
                        return;
                    }
                    tokio::time::sleep(QUIET).await;
                    count.mark_unchanged();
                }
                None => tokio::time::sleep(INTERVAL).await,
            }
            while let Err(error) = self.update().await {
                let lost = matches!(&error, StorageError::Copy { source: AgentError::Lost { .. }, .. });
                // The volume goes before its container does.
                if lost || !self.source.exists() {
                    return;
                }
                let error = crate::error::chain(&error);
                tracing::warn!(source = %self.source.display(), %error, "a volume's changes have not reached the guest");
                tokio::time::sleep(INTERVAL).await;
            }
        }
    }

    /// Makes the copy what the original is now.
    async fn update(&mut self) -> Result<(), StorageError> {
        for _ in 0..LOOKS {
            let (source, changes) = (self.source.clone(), self.changes.clone());
            let look = move || stable(&source, changes.as_deref());
            match blocking(look).await.unwrap_or(Err(StorageError::Interrupted))? {
                Look::Moving => tokio::time::sleep(QUIET).await,
                Look::TooLarge if self.there.is_empty() => break,
                Look::TooLarge => {
                    tracing::warn!(
                        source = %self.source.display(),
                        "more than {ENTRIES} names or {BYTES} bytes: the guest's copy stays as it was"
                    );
                    return Ok(());
                }
                Look::Still(tree, told) => {
                    self.blind = !told;
                    match self.apply(&tree).await {
                        Err(StorageError::Absent(_)) => {}
                        Err(error) => return Err(error),
                        Ok(()) => return Ok(()),
                    }
                }
            }
        }
        Err(StorageError::Restless(self.source.clone()))
    }

    async fn apply(&mut self, tree: &Tree) -> Result<(), StorageError> {
        let steps = steps(&self.there, tree);
        for name in &steps.clear {
            self.remove(name).await?;
        }
        for name in &steps.put {
            let Some(entry) = tree.get(name) else { continue };
            let (path, target, found) = (self.source.join(name), self.in_guest(name), entry.clone());
            let read = blocking(move || request(&path, target, &found)).await;
            let request = read.unwrap_or(Err(StorageError::Interrupted))?;
            let copied = self.agent.copy_file(&request).await;
            copied.map_err(|source| StorageError::Copy { path: self.source.join(name), source })?;
            self.there.insert(name.clone(), entry.clone());
        }
        for name in &steps.remove {
            self.remove(name).await?;
        }
        Ok(())
    }

    async fn remove(&mut self, name: &Path) -> Result<(), StorageError> {
        match self.agent.remove_file(&self.in_guest(name)).await {
            Ok(()) => {}
            // Another agent. What stays, no link leads to.
            Err(error) if matches!(error.kind(), ErrorKind::Unimplemented | ErrorKind::NotFound) => {}
            Err(source) => return Err(StorageError::Copy { path: self.source.join(name), source }),
        }
        self.there.retain(|known, _| !known.starts_with(name));
        Ok(())
    }

    fn in_guest(&self, name: &Path) -> String {
        if name.as_os_str().is_empty() {
            self.target.clone()
        } else {
            format!("{}/{}", self.target, name.display())
        }
    }
}

enum Look {
    /// And whether every change of it will be told.
    Still(Tree, bool),
    Moving,
    TooLarge,
}

/// Looks twice: what is between two versions is neither of them.
fn stable(source: &Path, changes: Option<&Changes>) -> Result<Look, StorageError> {
    let failed = |error| StorageError::file("look through", source, error);
    let look = || match scan(source) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && source.exists() => Ok(Look::Moving),
        Err(error) => Err(failed(error)),
        Ok(None) => Ok(Look::TooLarge),
        Ok(Some(tree)) => Ok(Look::Still(tree, true)),
    };
    let (tree, mut told) = match look()? {
        Look::Still(tree, told) => (tree, told),
        other => return Ok(other),
    };
    if let Some(changes) = changes {
        let directories =
            tree.iter().filter(|(_, entry)| entry.kind == Kind::Directory).map(|(name, _)| name);
        told = changes.watch(source, directories).map_err(|error| failed(error.into()))?;
    }
    Ok(match look()? {
        Look::Still(again, _) if again == tree => Look::Still(tree, told),
        Look::Still(..) | Look::Moving => Look::Moving,
        Look::TooLarge => Look::TooLarge,
    })
}

fn request(path: &Path, target: String, entry: &Entry) -> Result<CopyFileRequest, StorageError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => StorageError::Absent(path.to_owned()),
        _ => StorageError::file("read", path, error),
    };
    let mut data = Vec::new();
    match &entry.kind {
        Kind::Directory => {}
        Kind::Link(to) => data.clone_from(to),
        Kind::File(_) => {
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
            file.take(BYTES).read_to_end(&mut data).map_err(failed)?;
        }
    }
    Ok(CopyFileRequest {
        path: target,
        file_size: i64::try_from(data.len()).unwrap_or(i64::MAX),
        file_mode: entry.mode,
        dir_mode: DIR_MODE,
        uid: i32::try_from(entry.uid).unwrap_or(-1),
        gid: i32::try_from(entry.gid).unwrap_or(-1),
        data,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    fn tree(root: &Path) -> Tree {
        scan(root).unwrap().unwrap()
    }

    #[test]
    fn a_new_version_is_there_before_its_name_and_the_old_one_goes_last() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let version = |name: &str, keys: &[&str]| {
            std::fs::create_dir(root.join(name)).unwrap();
            keys.iter().for_each(|key| std::fs::write(root.join(name).join(key), key).unwrap());
        };
        version("..1", &["a", "b"]);
        symlink("..1", root.join("..data")).unwrap();
        for key in ["a", "b"] {
            symlink(format!("..data/{key}"), root.join(key)).unwrap();
        }
        let old = tree(root);
        let all = steps(&Tree::new(), &old);
        assert_eq!(all.put, paths(&["", "..1", "..1/a", "..1/b", "..data", "a", "b"]));
        assert_eq!((all.clear.len(), all.remove.len()), (0, 0));

        version("..2", &["a", "c"]);
        std::fs::remove_file(root.join("..data")).unwrap();
        symlink("..2", root.join("..data")).unwrap();
        std::fs::remove_file(root.join("b")).unwrap();
        symlink("..data/c", root.join("c")).unwrap();
        std::fs::remove_dir_all(root.join("..1")).unwrap();
        let next = steps(&old, &tree(root));
        assert_eq!(next.put, paths(&["..2", "..2/a", "..2/c", "..data", "c"]));
        assert_eq!(next.remove, paths(&["..1", "b"]));
        assert_eq!(steps(&old, &old), Steps::default());
    }

    #[test]
    fn what_changes_its_kind_is_cleared_first() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("x"), "").unwrap();
        let old = tree(dir.path());
        std::fs::remove_file(dir.path().join("x")).unwrap();
        std::fs::create_dir(dir.path().join("x")).unwrap();
        assert_eq!(steps(&old, &tree(dir.path())).clear, paths(&["x"]));
    }

    #[test]
    fn bounds_are_of_names_and_of_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, vec![0; usize::try_from(BYTES).unwrap()]).unwrap();
        assert!(fits(dir.path()).unwrap());
        std::fs::write(&file, vec![0; usize::try_from(BYTES).unwrap() + 1]).unwrap();
        assert!(!fits(dir.path()).unwrap());
        std::fs::write(&file, "").unwrap();
        for name in 0..ENTRIES {
            std::fs::write(dir.path().join(name.to_string()), "").unwrap();
        }
        assert!(!fits(dir.path()).unwrap());
        assert!(!fits(&file).unwrap());
        assert!(matches!(fits(&dir.path().join("none")), Err(StorageError::Absent(_))));
    }
}
