use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use super::*;
use crate::mount::silent::SilentMount;
use crate::services::fake;

fn storages() -> Storages {
    served_by(Path::new("/no/services"))
}

/// With the services that listen in `dir`.
fn served_by(dir: &Path) -> Storages {
    let disks = Disks::new(Arc::default(), Duration::from_millis(20));
    Storages::new(Arc::default(), disks, fake::services(dir, Duration::from_secs(20)), true)
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
async fn a_driver_that_cannot_be_had_here_is_a_typed_unsupported_with_its_reason() {
    for (name, why) in UNSUPPORTED {
        let error = storages().add(vec![storage(name, Path::new("/run/x"))]).await.unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        assert!(matches!(error, StorageError::Unsupported { driver, .. } if driver == name));
    }
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
async fn a_shared_storage_outlives_its_containers_and_goes_with_the_sandbox() {
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("volume");
    let kept = |path: &Path| Storage { shared: true, ..storage("local", path) };
    let all = storages();
    let first = all.add(vec![kept(&point), kept(&point.join("sub"))]).await.unwrap();
    std::fs::write(point.join("sub/file"), "kept").unwrap();
    all.remove(first).await.unwrap();
    let again = all.add(vec![kept(&point)]).await.unwrap();
    assert_eq!(std::fs::read_to_string(point.join("sub/file")).unwrap(), "kept");
    all.remove(again).await.unwrap();
    all.remove_kept().await.unwrap();
    assert!(!point.exists());
    assert!(all.made.paths().is_empty());
}

/// What a second request for the same mount point is told.
async fn second(first: &Storage, second: Storage) -> Result<(), String> {
    let all = storages();
    let made = all.add(vec![first.clone()]).await.unwrap();
    let answer = all.add(vec![second]).await;
    let told = match answer {
        Ok(points) => all.remove(points).await.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    all.remove(made).await.unwrap();
    assert!(!Path::new(&first.mount_point).exists(), "a refusal counts no user");
    told
}

#[tokio::test]
async fn a_mount_point_is_shared_by_those_who_ask_for_the_very_same_storage() {
    let dir = tempfile::tempdir().unwrap();
    let first = Storage { options: options(&["mode=0777"]), ..storage("local", &dir.path().join("volume")) };
    second(&first, first.clone()).await.unwrap();
    let group = kata_api::agent::FSGroup { group_id: 7, ..Default::default() };
    for (other, what) in [
        (Storage { driver: "ephemeral".into(), ..first.clone() }, "driver"),
        (Storage { source: "other".into(), ..first.clone() }, "source"),
        (Storage { fstype: "ext4".into(), ..first.clone() }, "type of file system"),
        (Storage { options: options(&["mode=0700"]), ..first.clone() }, "options"),
        (
            Storage { driver_options: options(&["encryption_key=ephemeral"]), ..first.clone() },
            "driver options",
        ),
        (Storage { fs_group: Some(group).into(), ..first.clone() }, "group"),
        (Storage { shared: true, ..first.clone() }, "lifetime"),
    ] {
        let error = second(&first, other).await.unwrap_err();
        assert!(error.contains(&first.mount_point) && error.ends_with(&format!("another {what}")), "{error}");
    }
}

#[tokio::test]
async fn a_bound_is_no_difference_for_containers_that_share_memory() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let sized = |size: &str| Storage {
        options: options(&["mode=755", size]),
        ..storage("ephemeral", &dir.path().join("shm"))
    };
    second(&sized("size=64k"), sized("size=128k")).await.unwrap();
}

#[tokio::test]
async fn a_volume_in_the_clear_is_none_that_is_encrypted() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = LoopDisk::new(dir.path(), "layer") else { return };
    let mut plain = storage("blk", &dir.path().join("volume"));
    (plain.source, plain.fstype) = (disk.0.clone(), "ext4".into());
    let encrypted = Storage { driver_options: options(&[crate::mount::EPHEMERAL_KEY]), ..plain.clone() };
    let error = second(&plain, encrypted).await.unwrap_err();
    assert!(error.ends_with("another driver options"), "{error}");
}

#[tokio::test]
async fn nothing_is_mounted_over_what_others_have_mounted_or_above_another_storage() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (others, above) = (dir.path().join("others"), dir.path().join("c1"));
    std::fs::create_dir(&others).unwrap();
    mount("none", &others, "tmpfs", MountFlags::empty(), None).unwrap();
    let all = storages();
    let over = all.add(vec![storage("ephemeral", &others)]).await;
    unmount(&others, UnmountFlags::DETACH).unwrap();
    let error = over.unwrap_err().to_string();
    assert!(error.contains("something is mounted there already"), "{error}");
    let below = all.add(vec![storage("ephemeral", &above.join("rootfs"))]).await.unwrap();
    let error = all.add(vec![storage("ephemeral", &above)]).await.unwrap_err().to_string();
    assert!(error.contains("would cover") && error.contains("c1/rootfs"), "{error}");
    all.remove(below).await.unwrap();
}

#[tokio::test]
async fn a_mount_point_that_a_symbolic_link_leads_to_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), dir.path().join("link")).unwrap();
    std::fs::create_dir(dir.path().join("elsewhere")).unwrap();
    for name in ["link", "link/a/b"] {
        let error = storages().add(vec![storage("local", &dir.path().join(name))]).await.unwrap_err();
        assert!(error.to_string().contains("symbolic link"), "{error}");
    }
    assert_eq!(std::fs::read_dir(dir.path().join("elsewhere")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_small_readonly_directory_is_copied_and_anything_else_bound() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("key"), "value").unwrap();
    let watched = |point: &Path, words: &[&str]| Storage {
        source: text(&source),
        options: options(words),
        ..storage("watchable-bind", point)
    };
    let device = |path: &Path| std::fs::metadata(path).unwrap().dev();
    let (copy, bound) = (dir.path().join("copy"), dir.path().join("bound"));
    let all = storages();
    let made = all.add(vec![watched(&copy, &["rbind", "ro"]), watched(&bound, &["rbind"])]).await.unwrap();
    assert_eq!(std::fs::read_to_string(copy.join("key")).unwrap(), "value");
    assert_ne!(device(&copy), device(&source));
    assert_eq!(device(&bound), device(&source));
    std::fs::write(source.join("new"), "later").unwrap();
    let begin = std::time::Instant::now();
    while !copy.join("new").exists() && begin.elapsed() < Duration::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(std::fs::read_to_string(copy.join("new")).unwrap(), "later");
    all.remove(made).await.unwrap();
    assert!(!copy.exists() && source.join("new").exists());
}

#[tokio::test]
async fn a_storage_that_waits_for_its_server_keeps_no_other_waiting() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(mut server) = SilentMount::at(&dir.path().join("silent")) else { return };
    let (slow, other) = (dir.path().join("slow"), dir.path().join("other"));
    let wanted = Storage { source: text(&dir.path().join("silent")), ..storage("bind", &slow) };
    let all = storages();
    let waits = tokio::spawn({
        let (all, wanted) = (all.clone(), wanted.clone());
        async move { all.add(vec![wanted]).await }
    });
    while all.made.is_free(&slow) {
        tokio::task::yield_now().await;
    }
    // Its caller goes, and the work goes on: who wants the same has to wait for the end of it.
    waits.abort();
    let again = all.add(vec![wanted]);
    tokio::pin!(again);
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut again).await.is_err());
    let others = async { all.remove(all.add(vec![storage("local", &other)]).await?).await };
    tokio::time::timeout(Duration::from_secs(20), others).await.expect("it waits for another's").unwrap();
    server.abandon();
    let error = crate::chain(&again.await.unwrap_err());
    assert!(error.contains("looking at") && error.contains("silent"), "{error}");
    // The thread of the first is on its way out.
    while !all.made.paths().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn one_failure_undoes_all_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("a");
    let all = storages();
    let wanted = vec![storage("local", &point), storage("blk-ccw", &dir.path().join("b"))];
    assert!(all.add(wanted).await.is_err());
    assert!(!point.exists());
    assert!(all.made.paths().is_empty());
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

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn options(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A disk of this machine with an ext4 on it that holds `file`, for as long as it is kept.
struct LoopDisk(String);

impl LoopDisk {
    fn new(dir: &Path, file: &str) -> Option<Self> {
        let (tree, image) = (dir.join(format!("{file}.tree")), dir.join(format!("{file}.img")));
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join(file), file).unwrap();
        let made =
            Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&tree, &image]).arg("2M").output();
        if !made.is_ok_and(|made| made.status.success()) {
            eprintln!("skipped: mke2fs is missing, or makes no ext4");
            return None;
        }
        let attached = Command::new("losetup").args(["--find", "--show"]).arg(&image).output();
        let name = attached.map(|attached| String::from_utf8(attached.stdout).unwrap());
        let disk = name.ok().map(|name| Self(name.trim().to_owned())).filter(|disk| !disk.0.is_empty());
        if disk.is_none() {
            eprintln!("skipped: this machine has no loop devices");
        }
        disk
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[tokio::test]
async fn a_disk_is_mounted_with_its_file_system_and_options() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = LoopDisk::new(dir.path(), "layer") else { return };
    let point = dir.path().join("c1/rootfs");
    let mut wanted = storage("blk", &point);
    (wanted.source, wanted.fstype) = (disk.0.clone(), "ext4".into());
    let all = storages();
    let made = all.add(vec![wanted.clone()]).await.unwrap();
    assert_eq!(std::fs::read_to_string(point.join("layer")).unwrap(), "layer");
    std::fs::write(point.join("layer"), "written").unwrap();
    all.remove(made).await.unwrap();
    assert!(!point.exists());
    wanted.options = options(&["ro", "noload"]);
    let made = all.add(vec![wanted]).await.unwrap();
    assert_eq!(std::fs::read_to_string(point.join("layer")).unwrap(), "written");
    let refused = std::fs::write(point.join("layer"), "lost").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    all.remove(made).await.unwrap();
}

#[tokio::test]
async fn a_file_system_that_is_not_on_the_disk_is_told_from_one_that_no_kernel_has() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = LoopDisk::new(dir.path(), "layer") else { return };
    let mut wanted = storage("blk", &dir.path().join("rootfs"));
    (wanted.source, wanted.fstype) = (disk.0.clone(), "nosuchfs".into());
    let error = storages().add(vec![wanted.clone()]).await.unwrap_err();
    assert!(matches!(&error, StorageError::NoFileSystem { kind, .. } if kind == "nosuchfs"), "{error}");
    std::fs::write(&disk.0, vec![0; 2 << 20]).unwrap();
    wanted.fstype = "ext4".into();
    let error = storages().add(vec![wanted]).await.unwrap_err().to_string();
    assert!(error.contains(&disk.0) && error.contains("ext4") && error.contains("rootfs"), "{error}");
    assert!(!dir.path().join("rootfs").exists());
}

#[tokio::test]
async fn a_disk_that_does_not_come_fails_its_storage_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("c1/rootfs");
    let mut wanted = storage("blk", &point);
    (wanted.source, wanted.fstype) = ("1e/1f".into(), "ext4".into());
    let error = storages().add(vec![wanted.clone()]).await.unwrap_err();
    let told = crate::chain(&error);
    assert!(told.contains("c1/rootfs") && told.contains("disk 1e/1f has not appeared"), "{told}");
    assert!(!dir.path().join("c1").exists());
    wanted.fstype.clear();
    let error = storages().add(vec![wanted]).await.unwrap_err();
    assert!(matches!(error, StorageError::Invalid { .. }), "{error}");
}

/// Storages of a root of two read-only layers below a writable one, in the directory of a container.
fn layered(container: &Path, layers: [&str; 2]) -> Vec<Storage> {
    let at = |name: &str| container.join(name);
    let mut wanted: Vec<Storage> = Vec::new();
    for (number, disk) in layers.into_iter().enumerate() {
        let mut layer = storage("blk", &at(&format!("layer{number}")));
        (layer.source, layer.fstype, layer.options) = (disk.into(), "ext4".into(), options(&["ro"]));
        wanted.push(layer);
    }
    wanted.push(storage("ephemeral", &at("rw")));
    let (upper, work) = (text(&at("rw/upper")), text(&at("rw/work")));
    let mut root = storage("overlayfs", &at("rootfs"));
    root.driver_options = [&upper, &work].map(|path| format!("{CREATE_DIRECTORY}={path}")).into();
    let lower = format!("lowerdir={}:{}", text(&at("layer1")), text(&at("layer0")));
    root.options = vec![lower, format!("upperdir={upper}"), format!("workdir={work}")];
    wanted.push(root);
    wanted
}

#[tokio::test]
async fn a_root_of_layers_is_made_in_order_and_undone_in_reverse() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disks = (LoopDisk::new(dir.path(), "base"), LoopDisk::new(dir.path(), "top"));
    let (Some(base), Some(top)) = disks else { return };
    let container = dir.path().join("c1");
    let all = storages();
    let made = all.add(layered(&container, [&base.0, &top.0])).await.unwrap();
    let root = container.join("rootfs");
    for file in ["base", "top"] {
        assert_eq!(std::fs::read_to_string(root.join(file)).unwrap(), file);
    }
    std::fs::write(root.join("base"), "changed").unwrap();
    assert_eq!(std::fs::read_to_string(container.join("rw/upper/base")).unwrap(), "changed");
    assert_eq!(std::fs::read_to_string(container.join("layer0/base")).unwrap(), "base");
    all.remove(made).await.unwrap();
    assert_eq!(std::fs::read_dir(&container).unwrap().count(), 0);

    // A lower directory that is not there: everything below the root is undone.
    let mut wanted = layered(&container, [&base.0, &top.0]);
    wanted[3].options[0] = "lowerdir=/no/such/layer".into();
    assert!(all.add(wanted).await.is_err());
    assert_eq!(std::fs::read_dir(&container).unwrap().count(), 0);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&text(&container)), "{mounts}");
}

#[tokio::test]
async fn options_that_the_kernel_would_cut_off_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut wanted = storage("overlayfs", &dir.path().join("rootfs"));
    wanted.options = vec![format!("lowerdir={}", "/layer:".repeat(600))];
    let error = storages().add(vec![wanted]).await.unwrap_err().to_string();
    assert!(error.contains("4209 bytes") && error.contains("4095"), "{error}");
}
