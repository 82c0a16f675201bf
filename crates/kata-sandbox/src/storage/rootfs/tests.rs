use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn mount(fs_type: &str, source: &str, options: &[&str]) -> RootfsMount {
    RootfsMount {
        fs_type: fs_type.to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

/// A host with blockfile, devmapper and erofs snapshots.
fn host(path: &Path) -> Found {
    let found = HashMap::from([
        ("/bf/snapshots/7", Found::Disk),
        ("/dev/mapper/pool-snap-3", Found::Disk),
        ("/er/1/layer.erofs", Found::Disk),
        ("/er/1/fs", Found::Erofs),
        ("/er/2/layer.erofs", Found::Disk),
        ("/er/2/fs", Found::Erofs),
        ("/er/3/fs", Found::EmptyDirectory),
        ("/er/4/fs", Found::Other),
        ("/dir", Found::Other),
    ]);
    found.get(path.to_str().unwrap()).copied().unwrap_or(Found::Absent)
}

fn classified(mount: RootfsMount, readonly: bool) -> Rootfs {
    Rootfs::classify(&[mount], readonly, host).unwrap()
}

fn image(path: &str, fs_type: &str, options: &[&str]) -> Image {
    Image { path: path.into(), ..mount_options(fs_type, options) }
}

fn mount_options(fs_type: &str, options: &[&str]) -> Image {
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    Image { path: PathBuf::new(), fs_type: fs_type.to_owned(), options }
}

fn block(images: Vec<Image>, readonly: bool) -> Rootfs {
    Rootfs::Block(Block { images, readonly })
}

#[test]
fn snapshots_that_are_one_image_or_device_are_attached() {
    let blockfile = "/bf/snapshots/7";
    assert_eq!(
        classified(mount("ext4", blockfile, &["loop", "rw"]), false),
        block(vec![image(blockfile, "ext4", &["rw"])], false)
    );
    // A view.
    assert_eq!(
        classified(mount("ext4", blockfile, &["loop", "ro"]), false),
        block(vec![image(blockfile, "ext4", &["ro"])], true)
    );
    let device = "/dev/mapper/pool-snap-3";
    assert_eq!(
        classified(mount("ext4", device, &["discard"]), true),
        block(vec![image(device, "ext4", &["discard"])], false)
    );
    assert_eq!(
        classified(mount("erofs", "/er/1/layer.erofs", &["loop"]), false),
        block(vec![image("/er/1/layer.erofs", "erofs", &["ro"])], true)
    );
}

#[test]
fn erofs_layers_are_attached_where_nothing_is_written_to_them() {
    let layers =
        vec![image("/er/2/layer.erofs", "erofs", &["ro"]), image("/er/1/layer.erofs", "erofs", &["ro"])];
    let lower = "lowerdir=/er/2/fs:/er/1/fs";
    let active = |upper: &str| {
        mount("overlay", "overlay", &["workdir=/er/3/work", &format!("upperdir={upper}"), lower])
    };
    let view = mount("overlay", "overlay", &[lower, "index=off"]);
    assert_eq!(classified(view, false), block(layers.clone(), true));
    assert_eq!(classified(active("/er/3/fs"), true), block(layers, true));
    // A writable root, and one that was written before.
    assert_eq!(classified(active("/er/3/fs"), false), Rootfs::Share);
    assert_eq!(classified(active("/er/4/fs"), true), Rootfs::Share);
}

#[test]
fn everything_else_is_shared() {
    let many = format!("lowerdir={}", ["/er/1/fs"; LAYERS_MAX + 1].join(":"));
    let cases = [
        mount("bind", "/dir", &["rbind", "rw"]),
        mount("overlay", "overlay", &["lowerdir=/er/1/fs:/dir"]),
        mount("overlay", "overlay", &["lowerdir=/er/4/fs"]),
        mount("overlay", "overlay", &[]),
        mount("overlay", "overlay", &[&many]),
        mount("xfs", "/dev/mapper/pool-snap-3", &["nouuid"]),
        mount("ext4", "/dir", &[]),
        mount("erofs", "/er/1/layer.erofs", &["ro", "device=/er/blob"]),
        RootfsMount { target: "data".to_owned(), ..mount("ext4", "/bf/snapshots/7", &["loop"]) },
    ];
    for case in cases {
        assert_eq!(classified(case.clone(), false), Rootfs::Share, "{case:?}");
    }
    assert_eq!(Rootfs::classify(&[], false, host).unwrap(), Rootfs::Share);
    let two = [mount("ext4", "/bf/snapshots/7", &[]), mount("bind", "/dir", &[])];
    assert_eq!(Rootfs::classify(&two, false, host).unwrap(), Rootfs::Share);
}

#[test]
fn absent_disk_is_told_by_its_path() {
    let error = Rootfs::classify(&[mount("ext4", "/bf/snapshots/8", &["loop"])], false, host).unwrap_err();
    assert_eq!(error.to_string(), "/bf/snapshots/8 does not exist on the host");
}

#[test]
fn written_image_is_mounted_as_the_root() {
    let Rootfs::Block(block) = classified(mount("ext4", "/bf/snapshots/7", &["loop", "rw"]), true) else {
        panic!("it is on a disk")
    };
    let storages = block.storages("web", &[PciPath("03/00".to_owned())]);
    let expected = Storage {
        driver: "blk".to_owned(),
        source: "03/00".to_owned(),
        fstype: "ext4".to_owned(),
        options: vec!["rw".to_owned()],
        mount_point: "/run/kata-containers/web/rootfs".to_owned(),
        ..Default::default()
    };
    assert_eq!(storages, [expected]);
}

#[test]
fn layers_are_mounted_before_what_stands_on_them() {
    let lower = "lowerdir=/er/2/fs:/er/1/fs";
    let Rootfs::Block(block) = classified(mount("overlay", "overlay", &[lower]), false) else {
        panic!("it is on disks")
    };
    let storages = block.storages("web", &["03/00", "04/00"].map(|path| PciPath(path.to_owned())));
    let shown: Vec<_> = storages
        .iter()
        .map(|storage| (storage.driver.as_str(), storage.source.as_str(), storage.mount_point.as_str()))
        .collect();
    assert_eq!(
        shown,
        [
            ("blk", "03/00", "/run/kata-containers/web/layers/0"),
            ("blk", "04/00", "/run/kata-containers/web/layers/1"),
            ("ephemeral", "tmpfs", "/run/kata-containers/web/scratch"),
            ("overlayfs", "overlay", "/run/kata-containers/web/rootfs"),
        ]
    );
    assert_eq!(
        storages[3].options[0],
        "lowerdir=/run/kata-containers/web/layers/0:/run/kata-containers/web/layers/1"
    );
    let made = |name| format!("{CREATE_DIRECTORY}=/run/kata-containers/web/scratch/{name}");
    assert_eq!(storages[3].driver_options, [made("upper"), made("work")]);
}

proptest! {
    /// Whatever a client sends, a root that the container writes is one disk, and what is attached read-only is
    /// mounted read-only.
    #[test]
    fn no_mount_makes_a_writable_stack(
        fs_type in "(ext4|erofs|overlay|bind)",
        options in prop::collection::vec("(ro|rw|loop|upperdir=/er/3/fs|lowerdir=(/er/[12]/fs:?){0,12})", 0..5),
        readonly: bool,
    ) {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let mount = mount(&fs_type, "/bf/snapshots/7", &options);
        if let Rootfs::Block(block) = Rootfs::classify(&[mount], readonly, host).unwrap() {
            prop_assert!(block.images.len() <= LAYERS_MAX);
            prop_assert!(block.readonly || block.images.len() == 1);
            if block.readonly {
                prop_assert!(block.images.iter().all(|image| image.options.contains(&"ro".to_owned())));
            }
        }
    }
}
