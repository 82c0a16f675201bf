//! Which way a volume takes into the guest.
//!
//! Kubernetes tells a runtime nothing of a volume but the host's path, so the path says what kind it is:
//!
//! ```text
//!   …/pods/<uid>/volumes/kubernetes.io~empty-dir/<name>             an emptyDir; a tmpfs or hugetlbfs by its file system
//!   …/pods/<uid>/volumes/kubernetes.io~{configmap,secret,projected,downward-api}/<name>     kept up to date by kubelet
//!   …/pods/<uid>/volume-subpaths/<name>/<container>/<n>             a part of the volume <name>
//! ```
//!
//! | kind | with a share | without one |
//! |---|---|---|
//! | direct volume, see [`super::direct`] | a disk | a disk |
//! | emptyDir in memory, and parts of it | a tmpfs of the guest, as large | the same |
//! | emptyDir of huge pages | pages of the guest, as many | the same |
//! | emptyDir on disk | shared, or a disk of its own | a directory of the guest, or a disk of its own |
//! | config map, secret, …, not writable, small | a copy that follows, see [`super::mirror`] | the same |
//! | anything else | shared | a file or small directory is copied once, others are refused |

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kata_api::agent::Storage;
use kata_api::guest;
use kata_config::{Config, EmptyDirMode, SharedFs};
use oci_spec::runtime::{LinuxHugepageLimit, Spec};
use rustix::fs::{FsWord, StatFs};

use super::direct::{self, DirectVolume};
use super::mount::{self, Row};
use super::{StorageError, disk, mirror};
use crate::guest_spec::Volume;

/// What statfs(2) calls a tmpfs.
const TMPFS_MAGIC: FsWord = 0x0102_1994;
/// What it calls a hugetlbfs.
const HUGETLBFS_MAGIC: FsWord = 0x9584_58f6;
/// kubelet's directory of a pod's emptyDirs.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// kubelet's directories of what it writes itself and keeps up to date.
const CONFIG: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// What pod and container offer to a volume.
#[derive(Clone, Debug)]
pub(crate) struct Ground {
    /// Whether files are shared.
    pub(crate) share: bool,
    /// What an emptyDir is made of.
    pub(crate) empty_dirs: EmptyDirMode,
    /// What the container may take of huge pages: the size of a page and the bound, both in bytes.
    pub(crate) huge_pages: Vec<(u64, u64)>,
}

impl Ground {
    /// For a container of `spec`.
    pub(crate) fn new(config: &Config, spec: &Spec) -> Self {
        let limits = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let limits = limits.and_then(|resources| resources.hugepage_limits().clone()).unwrap_or_default();
        let bound = |limit: &LinuxHugepageLimit| {
            Some((page_size(limit.page_size())?, u64::try_from(limit.limit()).ok().filter(|it| *it > 0)?))
        };
        Self {
            share: config.hypervisor.qemu.shared_fs != SharedFs::None,
            empty_dirs: config.runtime.emptydir_mode,
            huge_pages: limits.iter().filter_map(bound).collect(),
        }
    }
}

/// The size of a page as cgroups call it: `2MB`, in bytes.
fn page_size(text: &str) -> Option<u64> {
    let (digits, shift) = match (text.strip_suffix("KB"), text.strip_suffix("MB"), text.strip_suffix("GB")) {
        (Some(digits), ..) => (digits, 10),
        (_, Some(digits), _) => (digits, 20),
        (.., Some(digits)) => (digits, 30),
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The way of one volume.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Way {
    /// Through the share. `own` is what belongs to the pod alone, which may write it anyway.
    Share { own: bool },
    /// The guest has it itself: what the agent has to make, and where it is then.
    Guest { storages: Vec<Storage>, path: PathBuf },
    /// Copied, and kept up to date.
    Mirror,
    /// Copied once.
    Copy,
    /// A disk of the host with a file system.
    Direct(DirectVolume),
    /// A new file system on a disk of its own, and what part of it. One that is encrypted is made in the guest.
    EmptyDisk { volume: PathBuf, part: PathBuf, encrypted: bool },
}

/// Looks at the host, and chooses.
pub(crate) fn choose(volume: &Volume, ground: &Ground) -> Result<Way, StorageError> {
    let source = &volume.source;
    if let Some(direct) = direct::find(source)? {
        return Ok(Way::Direct(direct));
    }
    if let Some((of, part)) = empty_dir(source) {
        let found = statfs(&of)?;
        let mounted = is_mount(&of);
        match found.f_type {
            TMPFS_MAGIC if mounted => return memory(&of, &part, &found),
            HUGETLBFS_MAGIC if mounted => return huge_pages(&of, &part, &found, ground),
            _ if ground.empty_dirs != EmptyDirMode::SharedFs => {
                let encrypted = ground.empty_dirs == EmptyDirMode::BlockEncrypted;
                return Ok(Way::EmptyDisk { volume: of, part, encrypted });
            }
            _ if !ground.share => return local(&of, &part),
            _ => return Ok(Way::Share { own: true }),
        }
    }
    if volume.readonly && is_config(source) && mirror::fits(source)? {
        return Ok(Way::Mirror);
    }
    Ok(if ground.share { Way::Share { own: false } } else { Way::Copy })
}

fn statfs(path: &Path) -> Result<StatFs, StorageError> {
    rustix::fs::statfs(path).map_err(|error| match error {
        rustix::io::Errno::NOENT => StorageError::Absent(path.to_owned()),
        error => StorageError::file("look at the file system of", path, error),
    })
}

/// Whether a file system is mounted there: its parent is on another.
fn is_mount(path: &Path) -> bool {
    let device = |path: &Path| std::fs::metadata(path).map(|found| found.dev()).ok();
    path.parent().is_some_and(|parent| device(path) != device(parent))
}

/// The directory two above a volume's name says what made it.
fn plugin(path: &Path) -> Option<&str> {
    let plugin = path.parent()?;
    (plugin.parent()?.file_name()? == "volumes").then(|| plugin.file_name()?.to_str()).flatten()
}

fn is_config(path: &Path) -> bool {
    plugin(path).is_some_and(|plugin| CONFIG.contains(&plugin))
}

/// The emptyDir that `path` is, or is a part of, and which part.
fn empty_dir(path: &Path) -> Option<(PathBuf, PathBuf)> {
    if plugin(path) == Some(EMPTY_DIR) {
        return Some((path.to_owned(), PathBuf::new()));
    }
    // <pod>/volume-subpaths/<volume>/<container>/<n>
    let name = path.parent()?.parent()?;
    let parts = name.parent().filter(|parts| parts.file_name().is_some_and(|it| it == "volume-subpaths"))?;
    let volume = parts.parent()?.join("volumes").join(EMPTY_DIR).join(name.file_name()?);
    let part = part(&mount::rows().collect::<Vec<_>>(), &volume, path)?;
    Some((volume, part))
}

/// What part of the volume at `whole` is mounted at `path`.
fn part(table: &[Row], whole: &Path, path: &Path) -> Option<PathBuf> {
    // The last one is on top.
    let at = |point: &Path| table.iter().rev().find(|row| row.point == point);
    let below = at(path)?;
    match at(whole) {
        Some(of) if of.device == below.device => below.root.strip_prefix(&of.root).ok().map(Path::to_owned),
        Some(_) => None,
        // Not a mount: a directory of the file system that kubelet's directory is on, by its last names.
        None => {
            let names: Vec<_> = whole.components().rev().take(5).collect();
            let name: PathBuf = names.iter().rev().collect();
            let mut after = below.root.components();
            while !after.as_path().starts_with(&name) {
                after.next()?;
            }
            after.as_path().strip_prefix(&name).ok().map(Path::to_owned)
        }
    }
}

/// Where the guest has an emptyDir.
fn in_guest(volume: &Path) -> PathBuf {
    Path::new(guest::SANDBOX_DIR).join("ephemeral").join(volume.file_name().unwrap_or_default())
}

/// An emptyDir in the guest, and the part of it that the container sees. Both stay as long as the pod.
fn ephemeral(volume: &Path, part: &Path, whole: Storage) -> Result<Way, StorageError> {
    let mut storages = vec![whole];
    let path = disk::below(&in_guest(volume), part);
    if !part.as_os_str().is_empty() {
        storages.push(disk::directory(&volume.join(part), &path)?);
    }
    Ok(Way::Guest { storages, path })
}

fn mode(path: &Path) -> Result<String, StorageError> {
    let found = std::fs::metadata(path).map_err(|error| StorageError::file("look at", path, error))?;
    Ok(format!("mode={:o}", found.mode() & 0o7777))
}

/// A tmpfs like the host's: kubelet has given it a size, a mode and a group.
fn memory(volume: &Path, part: &Path, found: &StatFs) -> Result<Way, StorageError> {
    let metadata = std::fs::metadata(volume).map_err(|error| StorageError::file("look at", volume, error))?;
    let mut options = vec![mode(volume)?];
    options.push(format!("uid={}", metadata.uid()));
    options.push(format!("gid={}", metadata.gid()));
    options.extend(size_of(found).map(|size| format!("size={size}")));
    let whole = Storage {
        driver: "ephemeral".to_owned(),
        source: "tmpfs".to_owned(),
        fstype: "tmpfs".to_owned(),
        options,
        mount_point: in_guest(volume).display().to_string(),
        shared: true,
        ..Default::default()
    };
    ephemeral(volume, part, whole)
}

/// As many pages as the mount allows or, where that has no bound of its own, the container.
fn huge_pages(volume: &Path, part: &Path, found: &StatFs, ground: &Ground) -> Result<Way, StorageError> {
    let page = u64::try_from(found.f_bsize).unwrap_or_default();
    let limit = ground.huge_pages.iter().find(|(size, _)| *size == page).map(|(_, limit)| *limit);
    let size = size_of(found).or(limit).ok_or_else(|| StorageError::HugePages(volume.to_owned()))?;
    let whole = Storage {
        driver: "ephemeral".to_owned(),
        source: "nodev".to_owned(),
        fstype: "hugetlbfs".to_owned(),
        options: vec![mode(volume)?, format!("pagesize={page}"), format!("size={size}")],
        mount_point: in_guest(volume).display().to_string(),
        shared: true,
        ..Default::default()
    };
    ephemeral(volume, part, whole)
}

/// A directory of the guest's own root.
fn local(volume: &Path, part: &Path) -> Result<Way, StorageError> {
    ephemeral(volume, part, disk::directory(volume, &in_guest(volume))?)
}

/// The bound of a file system in bytes; `None` where it has none.
fn size_of(found: &StatFs) -> Option<u64> {
    let block = u64::try_from(found.f_bsize).ok()?;
    found.f_blocks.checked_mul(block).filter(|size| *size > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "/var/lib/kubelet/pods/4711";

    #[test]
    fn volumes_are_told_by_their_paths() {
        let config = |plugin: &str| is_config(&Path::new(POD).join("volumes").join(plugin).join("name"));
        assert!(CONFIG.iter().all(|plugin| config(plugin)));
        assert!(!config(EMPTY_DIR));
        assert!(!is_config(Path::new("/srv/kubernetes.io~secret/name")));
        let whole = Path::new(POD).join("volumes").join(EMPTY_DIR).join("cache");
        assert_eq!(empty_dir(&whole), Some((whole, PathBuf::new())));
        assert_eq!(empty_dir(Path::new("/srv/data")), None);
    }

    #[test]
    fn a_part_of_an_empty_dir_is_found_by_the_mount_table() {
        let whole = Path::new(POD).join("volumes").join(EMPTY_DIR).join("cache");
        let part_at = Path::new(POD).join("volume-subpaths/cache/web/0");
        let table = |rows: &[String]| rows.iter().filter_map(|line| mount::row(line)).collect::<Vec<_>>();
        let in_memory = table(&[
            format!("40 1 0:50 / {} rw - tmpfs tmpfs rw", whole.display()),
            format!("41 1 0:50 /a/b {} rw - tmpfs tmpfs rw", part_at.display()),
        ]);
        assert_eq!(part(&in_memory, &whole, &part_at), Some("a/b".into()));
        // kubelet's directory lies on a file system that is mounted at /var.
        let root = whole.strip_prefix("/var").unwrap().join("a");
        let on_disk =
            table(&[format!("41 1 8:1 /{} {} rw - ext4 sda rw", root.display(), part_at.display())]);
        assert_eq!(part(&on_disk, &whole, &part_at), Some("a".into()));
        let elsewhere = table(&[format!("41 1 8:1 /other {} rw - ext4 sda rw", part_at.display())]);
        assert_eq!(part(&elsewhere, &whole, &part_at), None);
    }

    #[test]
    fn page_sizes_are_those_of_cgroups() {
        assert_eq!(page_size("2MB"), Some(2 << 20));
        assert_eq!(page_size("1GB"), Some(1 << 30));
        assert_eq!(page_size("64KB"), Some(64 << 10));
        assert!([page_size("2M"), page_size("MB"), page_size("")].iter().all(Option::is_none));
    }
}
