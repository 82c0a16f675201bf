use std::os::unix::fs::MetadataExt;

use super::*;

fn storages() -> Storages {
    Storages::new(Arc::new(Modules::default()))
}

fn storage(driver: &str, point: &Path) -> Storage {
    Storage { driver: driver.into(), mount_point: point.to_str().unwrap().into(), ..Default::default() }
}

/// Mounts need privileges; without them the test says so and ends.
fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        eprintln!("skipped: needs root to mount");
    }
    may
}

#[tokio::test]
async fn a_block_device_is_a_typed_unsupported() {
    let error = storages().add(vec![storage("blk", Path::new("/run/x"))]).await.unwrap_err();
    assert!(matches!(error, StorageError::Unsupported { driver } if driver == "blk"));
}

#[tokio::test]
async fn an_unknown_driver_and_a_crooked_mount_point_are_invalid() {
    for (driver, point) in [("floppy", "/run/x"), ("local", "run/x"), ("local", "/run/../x"), ("local", "/")]
    {
        let error = storages().add(vec![storage(driver, Path::new(point))]).await.unwrap_err();
        assert!(matches!(error, StorageError::Invalid { .. }), "{driver} {point}: {error}");
    }
}

#[tokio::test]
async fn a_local_directory_lives_until_its_last_user_gives_it_up() {
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("a/b");
    let mut wanted = storage("local", &point);
    wanted.options = vec!["mode=0777".into()];
    let all = storages();
    let first = all.add(vec![wanted.clone()]).await.unwrap();
    let second = all.add(vec![wanted]).await.unwrap();
    assert_eq!(std::fs::metadata(&point).unwrap().mode() & 0o7777, 0o777);
    all.remove(first).await.unwrap();
    assert!(point.exists());
    all.remove(second).await.unwrap();
    assert!(!point.exists());
}

#[tokio::test]
async fn one_failure_undoes_all_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("a");
    let all = storages();
    let wanted = vec![storage("local", &point), storage("nvdimm", &dir.path().join("b"))];
    assert!(all.add(wanted).await.is_err());
    assert!(!point.exists());
    assert!(all.made.lock().await.is_empty());
}

#[tokio::test]
async fn a_tmpfs_is_mounted_with_its_options_and_unmounted() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("shm");
    let mut wanted = storage("ephemeral", &point);
    wanted.options = ["mode=1777", "size=64k", "nosuid", "fsgid=77"].map(str::to_owned).into();
    let all = storages();
    let made = all.add(vec![wanted]).await.unwrap();
    let metadata = std::fs::metadata(&point).unwrap();
    assert_eq!((metadata.gid(), metadata.mode() & 0o7777), (77, 0o3777));
    std::fs::write(point.join("file"), "x").unwrap();
    all.remove(made).await.unwrap();
    assert!(!point.exists());
}

#[tokio::test]
async fn a_read_only_bind_refuses_writes_and_leaves_its_source() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::write(&source, "kept").unwrap();
    let point = dir.path().join("point");
    let mut wanted = storage("bind", &point);
    wanted.source = source.to_str().unwrap().into();
    wanted.options = vec!["bind".into(), "ro".into()];
    let all = storages();
    let made = all.add(vec![wanted]).await.unwrap();
    assert_eq!(std::fs::read_to_string(&point).unwrap(), "kept");
    assert!(std::fs::write(&point, "lost").is_err());
    all.remove(made).await.unwrap();
    assert!(!point.exists());
    assert_eq!(std::fs::read_to_string(&source).unwrap(), "kept");
}
