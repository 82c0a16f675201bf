//! Real mounts. Each test undoes its own, and checks that.

use std::fs;

use super::disk::claim;
use super::rootfs::Rootfs;
use super::*;

struct World {
    dir: tempfile::TempDir,
    record: Record,
}

impl World {
    /// `None` where mounts cannot be made.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            kata_testkit::skip("mounts need root");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("ks-").tempdir_in("/run").unwrap();
        fs::create_dir(dir.path().join("pod")).unwrap();
        let record = Record::open(dir.path().join("resources.jsonl")).unwrap();
        Some(Self { dir, record })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn share(&self) -> Share {
        Share::prepare(&self.path("pod"), &self.record).unwrap()
    }

    fn made(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn mounts(&self) -> Vec<String> {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = text.lines().filter(|line| line.contains(self.dir.path().to_str().unwrap()));
        ours.map(str::to_owned).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let released = Record::release(&self.path("resources.jsonl"));
        if !std::thread::panicking() {
            released.unwrap();
            assert_eq!(self.mounts(), Vec::<String>::new());
        }
    }
}

fn volume(source: PathBuf, readonly: bool) -> SharedVolume {
    SharedVolume { source, readonly, follows_host: false }
}

/// Where the volumes are in the share.
fn places(share: &Share, files: &SharedFiles) -> Vec<PathBuf> {
    files.volumes().map(|name| share.dir().join(name)).collect()
}

/// A root that is there already.
fn ready(path: PathBuf) -> SharedRoot {
    SharedRoot { path, mounts: Vec::new() }
}

fn mount_tmpfs(at: &Path) {
    rustix::mount::mount("tmpfs", at, "tmpfs", rustix::mount::MountFlags::empty(), c"size=64k").unwrap();
}

#[test]
fn share_is_a_peer_group_of_its_own() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let mounts = world.mounts();
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    assert!(mounts[0].contains(" shared:") && !mounts[0].contains(" master:"), "{mounts:?}");
    let whole = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let group = mounts[0].split_whitespace().find(|word| word.starts_with("shared:")).unwrap();
    assert_eq!(whole.lines().filter(|line| line.split_whitespace().any(|word| word == group)).count(), 1);
    assert!(share.dir().ends_with("pod/shared"));
}

/// The daemon that serves the share is root in it, so only the mount itself keeps a guest from making links there.
#[test]
fn guest_cannot_write_beside_its_containers_files() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let mut files = share.add("c", Some(&ready(world.made("root"))), &[]).unwrap();
    let readonly = |result: io::Result<()>| result.unwrap_err().kind() == io::ErrorKind::ReadOnlyFilesystem;
    let link = |place: &str| std::os::unix::fs::symlink("/etc", share.dir().join(place));
    assert!(readonly(link("next")), "a link where the next container's files will be");
    assert!(readonly(link("c/mounts")) && readonly(link(".volumes")));
    assert!(readonly(fs::rename(share.dir().join("c"), share.dir().join("d"))));
    fs::write(share.dir().join("c/rootfs/file"), "x").unwrap();
    assert_eq!(fs::read_to_string(world.path("root/file")).unwrap(), "x");
    files.release();
}

#[test]
fn readonly_volume_cannot_be_written_and_a_writable_one_can() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let (data, root) = (world.made("data"), world.made("root"));
    fs::write(data.join("file"), "old").unwrap();
    let volumes = [volume(data.clone(), true), volume(data.join("file"), true), volume(data.clone(), false)];
    let mut files = share.add("c", Some(&ready(root)), &volumes).unwrap();
    let [unwritten, file, written] = places(&share, &files).try_into().unwrap();
    let readonly = |result: io::Result<()>| result.unwrap_err().kind() == io::ErrorKind::ReadOnlyFilesystem;
    assert!(readonly(fs::write(unwritten.join("new"), "x")));
    assert!(readonly(fs::write(&file, "x")));
    fs::write(written.join("file"), "new").unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "new");
    files.release();
    assert_eq!(world.mounts().len(), 1);
    assert!(!share.dir().join("c").exists());
    assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "new");
}

#[test]
fn release_does_not_reach_back_to_the_host() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let (data, root) = (world.made("data"), world.made("root"));
    world.record.mount(&data).unwrap();
    mount_tmpfs(&data);
    rustix::mount::mount_change(&data, MountPropagationFlags::SHARED).unwrap();
    let below = world.made("data/below");
    world.record.mount(&below).unwrap();
    mount_tmpfs(&below);
    fs::write(below.join("file"), "kept").unwrap();

    let mut files = share.add("c", Some(&ready(root)), &[volume(data, false)]).unwrap();
    assert_eq!(fs::read_to_string(places(&share, &files)[0].join("below/file")).unwrap(), "kept");
    files.release();
    assert_eq!(fs::read_to_string(below.join("file")).unwrap(), "kept");
    assert_eq!(world.mounts().len(), 3);
}

#[test]
fn later_mounts_of_the_host_appear_only_where_asked() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let (data, root) = (world.made("data"), world.made("root"));
    world.record.mount(&data).unwrap();
    mount_tmpfs(&data);
    rustix::mount::mount_change(&data, MountPropagationFlags::SHARED).unwrap();
    let follower = SharedVolume { follows_host: true, ..volume(data.clone(), false) };
    let mut files = share.add("c", Some(&ready(root)), &[follower, volume(data, false)]).unwrap();
    let below = world.made("data/below");
    world.record.mount(&below).unwrap();
    mount_tmpfs(&below);
    fs::write(below.join("file"), "late").unwrap();
    let [follower, other] = places(&share, &files).try_into().unwrap();
    assert!(follower.join("below/file").exists());
    assert!(!other.join("below/file").exists());
    files.release();
}

#[test]
fn overlay_of_more_layers_than_a_page_holds_is_mounted() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let layers: Vec<String> = (0..100)
        .map(|n| {
            let layer = world.made(&format!("{}-layer-{n:03}", "long".repeat(10)));
            fs::write(layer.join(format!("file{n}")), "").unwrap();
            layer.display().to_string()
        })
        .collect();
    let option = |name: &str, dir: PathBuf| format!("{name}={}", dir.display());
    let part = RootfsMount {
        fs_type: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: vec![
            "index=off".to_owned(),
            option("workdir", world.made("work")),
            option("upperdir", world.made("upper")),
            format!("lowerdir={}", layers.join(":")),
        ],
        ..Default::default()
    };
    assert!(part.options.join(",").len() > 4096);
    let rootfs = world.path("bundle/rootfs");
    let mut files = share.add("c", Some(&SharedRoot { path: rootfs, mounts: vec![part] }), &[]).unwrap();
    let seen = share.dir().join("c/rootfs");
    assert_eq!(fs::read_dir(&seen).unwrap().count(), 100);
    fs::write(seen.join("new"), "x").unwrap();
    assert!(world.path("upper/new").exists());
    files.release();
    assert_eq!(world.mounts().len(), 1);
}

#[test]
fn failure_half_way_undoes_what_was_done() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let tmpfs = RootfsMount { fs_type: "tmpfs".to_owned(), source: "tmpfs".to_owned(), ..Default::default() };
    let bad = RootfsMount { fs_type: "nosuchfs".to_owned(), ..tmpfs.clone() };
    let error = share
        .add("c", Some(&SharedRoot { path: world.path("bundle/rootfs"), mounts: vec![tmpfs, bad] }), &[])
        .unwrap_err();
    assert!(matches!(&error, StorageError::Mount { fs_type, .. } if fs_type == "nosuchfs"), "{error}");
    assert_eq!(world.mounts().len(), 1);
}

/// `None` where the file system cannot be made.
fn image(
    world: &World,
    program: &str,
    make: impl FnOnce(&Path, &Path) -> std::process::Command,
) -> Option<PathBuf> {
    let (tree, image) = (world.made("tree"), world.path("image"));
    fs::write(tree.join("file"), "from the image").unwrap();
    match make(&tree, &image).stdout(std::process::Stdio::null()).output() {
        Ok(output) => {
            assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr))
        }
        Err(error) => {
            kata_testkit::skip(&format!("{program} cannot be run: {error}"));
            return None;
        }
    }
    Some(image)
}

fn ext4_image(world: &World) -> Option<PathBuf> {
    image(world, "mkfs.ext4", |tree, image| {
        let mut mkfs = std::process::Command::new("mkfs.ext4");
        mkfs.arg("-q").arg("-d").arg(tree).arg(image).arg("4M");
        mkfs
    })
}

fn erofs_image(world: &World) -> Option<PathBuf> {
    image(world, "mkfs.erofs", |tree, image| {
        let mut mkfs = std::process::Command::new("mkfs.erofs");
        mkfs.arg(image).arg(tree);
        mkfs
    })
}

/// A snapshotter's mount of `image`.
fn loop_mount(image: &Path, fs_type: &str, options: &[&str]) -> RootfsMount {
    RootfsMount {
        fs_type: fs_type.to_owned(),
        source: image.display().to_string(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

/// So many loop devices of the host hold `image`; soon, for others look at new devices too, and hold them meanwhile.
fn assert_loops(image: &Path, expected: usize) {
    let backing = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("loop/backing_file")).ok();
    let count = || {
        let names = fs::read_dir("/sys/block").unwrap().filter_map(|entry| backing(entry.unwrap()));
        names.filter(|name| Path::new(name.trim_end()) == image).count()
    };
    let begin = std::time::Instant::now();
    while count() != expected && begin.elapsed() < std::time::Duration::from_secs(30) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(count(), expected);
}

#[test]
fn image_is_mounted_by_a_loop_device_that_goes_with_it() {
    let Some(world) = World::new() else { return };
    let Some(image) = ext4_image(&world) else { return };
    let share = world.share();
    let root = |options: &[&str]| SharedRoot {
        path: world.path("bundle/rootfs"),
        mounts: vec![loop_mount(&image, "ext4", options)],
    };
    let seen = share.dir().join("c/rootfs/file");
    let mut files = share.add("c", Some(&root(&["loop", "rw"])), &[]).unwrap();
    assert_eq!(fs::read_to_string(&seen).unwrap(), "from the image");
    fs::write(&seen, "written").unwrap();
    assert_loops(&image, 1);
    files.release();
    assert_loops(&image, 0);

    let mut files = share.add("c", Some(&root(&["loop", "ro"])), &[]).unwrap();
    assert_eq!(fs::read_to_string(&seen).unwrap(), "written");
    let refused = fs::write(&seen, "again").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    files.release();
    assert_loops(&image, 0);
}

#[test]
fn failed_mount_leaves_no_loop_device() {
    let Some(world) = World::new() else { return };
    let (share, image) = (world.share(), world.path("image"));
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let root = |image: &Path| SharedRoot {
        path: world.path("bundle/rootfs"),
        mounts: vec![loop_mount(image, "ext4", &["loop"])],
    };
    let error = share.add("c", Some(&root(&image)), &[]).unwrap_err();
    assert!(matches!(&error, StorageError::Mount { fs_type, .. } if fs_type == "ext4"), "{error}");
    assert_loops(&image, 0);
    let error = share.add("c", Some(&root(Path::new("/nonexistent/image"))), &[]).unwrap_err();
    assert_eq!(error.to_string(), "/nonexistent/image does not exist on the host");
}

#[test]
fn erofs_layers_are_told_by_their_mounts() {
    let Some(world) = World::new() else { return };
    let Some(image) = erofs_image(&world) else { return };
    let (layer, point) = (world.path("1/layer.erofs"), world.made("1/fs"));
    fs::rename(image, &layer).unwrap();
    let overlay = RootfsMount {
        fs_type: "overlay".to_owned(),
        options: vec![format!("lowerdir={}", point.display())],
        ..Default::default()
    };
    let classify = || Rootfs::classify(std::slice::from_ref(&overlay), false, rootfs::find).unwrap();
    assert_eq!(classify(), Rootfs::Share);

    world.record.mount(&point).unwrap();
    mount::mount(&loop_mount(&layer, "erofs", &["ro", "loop"]), &point).unwrap();
    let Rootfs::Block(block) = classify() else { panic!("it is on disks") };
    assert_eq!(block.images[0].path, layer);
}

#[test]
fn root_that_comes_another_way_leaves_room_for_volumes() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let mut files = share.add("c", None, &[volume(world.made("data"), true)]).unwrap();
    assert!(!share.dir().join("c").exists());
    files.release();
    assert_eq!(world.mounts().len(), 1);
}

#[test]
fn volume_of_several_containers_is_there_once_until_the_last_of_them_goes() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let data = world.made("data");
    let add = |id: &str, readonly| share.add(id, None, &[volume(data.clone(), readonly)]).unwrap();
    let (mut first, mut second, mut reader) = (add("a", false), add("b", false), add("c", true));
    let place = places(&share, &first);
    assert_eq!(places(&share, &second), place);
    assert_ne!(places(&share, &reader), place, "what cannot be written is another");
    first.release();
    fs::write(place[0].join("file"), "").unwrap();
    reader.release();
    second.release();
    assert!(!place[0].exists());

    // The same path, and another file system there.
    let mut before = add("a", false);
    world.record.mount(&data).unwrap();
    mount_tmpfs(&data);
    let mut after = add("b", false);
    assert_ne!(places(&share, &before), places(&share, &after));
    // And the same file system, with something mounted below.
    world.record.mount(world.made("data/below")).unwrap();
    mount_tmpfs(&world.path("data/below"));
    let mut later = add("c", false);
    assert_ne!(places(&share, &later), places(&share, &after));
    [&mut before, &mut after, &mut later].into_iter().for_each(SharedFiles::release);
    assert_eq!(world.mounts().len(), 3);
}

#[test]
fn device_in_use_on_the_host_is_not_given_to_a_guest_that_writes() {
    let Some(world) = World::new() else { return };
    let Some(image) = ext4_image(&world) else { return };
    let device = loop_device::attach(&image, false).unwrap();
    claim(&device.path, false).unwrap();
    let point = world.made("point");
    world.record.mount(&point).unwrap();
    mount::mount(&loop_mount(&device.path, "ext4", &[]), &point).unwrap();
    let error = claim(&device.path, false).unwrap_err();
    assert!(matches!(error, StorageError::Busy(_)), "{error}");
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    claim(&device.path, true).unwrap();
    let held = claim(&image, false).unwrap();
    assert!(matches!(claim(&image, false), Err(StorageError::Busy(_))));
    drop(held);
    claim(&image, false).unwrap();
    assert!(matches!(claim(&world.path("none"), true), Err(StorageError::Absent(_))));
}

#[test]
fn devices_are_refused() {
    let Some(world) = World::new() else { return };
    let share = world.share();
    let null = volume("/dev/null".into(), false);
    let error = share.add("c", Some(&ready(world.made("root"))), &[null]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unimplemented);
}

#[test]
fn rootfs_targets_stay_inside() {
    let rootfs = Path::new("/b/rootfs");
    assert_eq!(inside(rootfs, "").unwrap(), None);
    assert_eq!(inside(rootfs, "/").unwrap(), None);
    assert_eq!(inside(rootfs, "/b/rootfs").unwrap(), None);
    assert_eq!(inside(rootfs, "/b/rootfs/data").unwrap().unwrap(), Path::new("data"));
    assert_eq!(inside(rootfs, "/data").unwrap().unwrap(), Path::new("data"));
    inside(rootfs, "a/../../etc").unwrap_err();

    let Some(world) = World::new() else { return };
    let root = world.made("root/etc");
    std::os::unix::fs::symlink("/etc", world.path("root/link")).unwrap();
    assert_eq!(resolve_inside(&world.path("root"), Path::new("link")).unwrap(), root);
}
