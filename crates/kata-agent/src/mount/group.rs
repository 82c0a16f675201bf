//! Volumes that belong to a group: Kubernetes' `fsGroup`.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kata_api::agent::FSGroup;
use kata_api::types::FSGroupChangePolicy;
use rustix::fs::{AtFlags, CWD, Gid, Mode, chmod, chownat};

use super::error::{StorageError, system};

/// Makes a directory the group's, with its new files inheriting that.
pub(super) fn give_directory(point: &Path, group: Option<u32>) -> Result<(), StorageError> {
    let Some(group) = group else { return Ok(()) };
    let metadata = std::fs::symlink_metadata(point).map_err(system("looking at", point))?;
    chownat(CWD, point, None, Some(Gid::from_raw(group)), AtFlags::empty())
        .map_err(system("giving to its group", point))?;
    set_mode(point, metadata.mode() | 0o2770)
}

/// Makes a whole file system the group's: files get what their owner may, directories pass the group on. With the policy
/// `OnRootMismatch` nothing is done where the root is the group's already.
pub(super) fn give_tree(root: &Path, wanted: &FSGroup) -> Result<(), StorageError> {
    let look = |path: &Path| std::fs::symlink_metadata(path).map_err(system("looking at", path));
    let metadata = look(root)?;
    let on_mismatch =
        wanted.group_change_policy.enum_value_or_default() == FSGroupChangePolicy::OnRootMismatch;
    let ours = metadata.gid() == wanted.group_id && metadata.mode() & bits(true) == bits(true);
    if on_mismatch && ours {
        return Ok(());
    }
    // The root last: what was interrupted is begun again.
    let mut directories = vec![root.to_owned()];
    let mut at = 0;
    while let Some(directory) = directories.get(at).cloned() {
        at += 1;
        for entry in std::fs::read_dir(&directory).map_err(system("listing", &directory))? {
            let path: PathBuf = entry.map_err(system("listing", &directory))?.path();
            let metadata = look(&path)?;
            if metadata.is_dir() {
                directories.push(path);
            } else {
                give(&path, &metadata, wanted.group_id)?;
            }
        }
    }
    for directory in directories.iter().rev() {
        give(directory, &look(directory)?, wanted.group_id)?;
    }
    Ok(())
}

fn give(path: &Path, metadata: &Metadata, group: u32) -> Result<(), StorageError> {
    chownat(CWD, path, None, Some(Gid::from_raw(group)), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(system("giving to its group", path))?;
    // A link has no mode of its own, and what it leads to is somebody else's.
    if metadata.is_symlink() {
        return Ok(());
    }
    set_mode(path, metadata.mode() | bits(metadata.is_dir()))
}

/// What a group's file must at least allow.
fn bits(directory: bool) -> u32 {
    if directory { 0o2770 } else { 0o660 }
}

fn set_mode(path: &Path, mode: u32) -> Result<(), StorageError> {
    chmod(path, Mode::from_raw_mode(mode & 0o7777)).map_err(system("setting the mode of", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_tree_is_given_and_nothing_behind_its_links() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: only root gives files away");
        }
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/b/file"), "").unwrap();
        std::fs::write(&outside, "").unwrap();
        for path in [&outside, &root.join("a/b/file")] {
            std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        }
        std::os::unix::fs::symlink(&outside, root.join("a/link")).unwrap();
        let wanted = FSGroup {
            group_id: 4711,
            group_change_policy: FSGroupChangePolicy::OnRootMismatch.into(),
            ..Default::default()
        };
        give_tree(&root, &wanted).unwrap();
        let look = |path: &Path| {
            let found = std::fs::symlink_metadata(path).unwrap();
            (found.gid(), found.mode() & 0o7777)
        };
        assert_eq!(look(&root.join("a/b/file")), (4711, 0o660));
        assert_eq!((look(&root.join("a/b")).0, look(&root).1 & 0o2070), (4711, 0o2070));
        assert_eq!(look(&root.join("a/link")).0, 4711);
        assert_eq!(look(&outside), (0, 0o600));

        // The root is right, so what lies in it is left alone.
        std::fs::write(root.join("new"), "").unwrap();
        std::os::unix::fs::chown(root.join("new"), None, Some(0)).unwrap();
        give_tree(&root, &wanted).unwrap();
        assert_eq!(look(&root.join("new")).0, 0);
        let always = FSGroup { group_change_policy: FSGroupChangePolicy::Always.into(), ..wanted };
        give_tree(&root, &always).unwrap();
        assert_eq!(look(&root.join("new")).0, 4711);
    }
}
