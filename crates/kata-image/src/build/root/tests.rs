use super::super::elf::tests::{Section, elf_with};
use super::super::modules::Module;
use super::*;

/// A dynamic program that needs the library `name`.
fn needs(name: &str) -> Vec<u8> {
    let names = [b"\0".as_slice(), name.as_bytes(), b"\0"].concat();
    let entry: Vec<u8> = [1u64, 1].iter().flat_map(|word| word.to_le_bytes()).collect();
    let sections = [Section { name: ".dynstr", data: names }, Section { name: ".dynamic", data: entry }];
    elf_with(&[], b"", &sections)
}

struct Scene(tempfile::TempDir);

impl Scene {
    /// Packages with everything that a root takes, systemd as a program with a library that is a link.
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        for path in PROGRAMS {
            scene.put(path, b"#!");
        }
        for name in LIBRARIES {
            scene.put(&format!("usr/lib/{ARCH}-linux-gnu/{name}"), b"library");
        }
        for unit in UNITS {
            scene.put(&format!("{UNIT_DIR}/{unit}"), b"[Unit]\n");
        }
        scene.put(&format!("{AUTHORITIES}/b.crt"), b"second\n");
        scene.put(&format!("{AUTHORITIES}/a.crt"), b"first\n");
        scene.put("usr/lib/systemd/systemd", &needs("libone.so.1"));
        scene.put(&format!("usr/lib/{ARCH}-linux-gnu/libone.so.1.2"), &needs("libtwo.so"));
        let link = scene.packages().join(format!("usr/lib/{ARCH}-linux-gnu/libone.so.1"));
        symlink("libone.so.1.2", link).unwrap();
        scene.put(&format!("usr/lib/{ARCH}-linux-gnu/systemd/libtwo.so"), b"library");
        scene.put("usr/bin/bash", b"not named, not taken");
        fs::create_dir(scene.root()).unwrap();
        scene
    }

    fn packages(&self) -> PathBuf {
        self.0.path().join("packages")
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("root")
    }

    fn put(&self, path: &str, bytes: &[u8]) {
        let path = self.packages().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn lay_out(&self) -> Result<(), RootError> {
        Root::lay_out(&self.root(), &self.packages()).map(drop)
    }
}

#[test]
fn named_programs_come_with_the_libraries_that_they_are_linked_with_and_nothing_else() {
    let scene = Scene::new();
    scene.lay_out().unwrap();
    let libraries = scene.root().join(format!("usr/lib/{ARCH}-linux-gnu"));
    assert_eq!(fs::read_link(libraries.join("libone.so.1")).unwrap(), Path::new("libone.so.1.2"));
    assert!(libraries.join("libone.so.1.2").is_file() && libraries.join("systemd/libtwo.so").is_file());
    assert!(!scene.root().join("usr/bin/bash").exists());
}

#[test]
fn library_that_is_not_there_is_named_with_who_needs_it() {
    let scene = Scene::new();
    fs::remove_file(scene.packages().join(format!("usr/lib/{ARCH}-linux-gnu/systemd/libtwo.so"))).unwrap();
    let error = scene.lay_out().unwrap_err().to_string();
    assert!(error.contains("libtwo.so") && error.contains("libone.so.1.2"), "{error}");
}

#[test]
fn unit_that_the_suite_does_not_have_is_named() {
    let scene = Scene::new();
    fs::remove_file(scene.packages().join(UNIT_DIR).join("basic.target")).unwrap();
    let error = scene.lay_out().unwrap_err().to_string();
    assert!(error.contains("basic.target"), "{error}");
}

#[test]
fn authorities_are_one_file_in_the_order_of_their_names() {
    let scene = Scene::new();
    scene.lay_out().unwrap();
    assert_eq!(fs::read_to_string(scene.root().join(AUTHORITIES_BUNDLE)).unwrap(), "first\nsecond\n");
}

#[test]
fn modes_do_not_depend_on_who_builds() {
    let scene = Scene::new();
    let packages = scene.packages();
    fs::set_permissions(packages.join("usr/bin/systemctl"), Permissions::from_mode(0o4755)).unwrap();
    scene.lay_out().unwrap();
    let mode =
        |path: &str| fs::symlink_metadata(scene.root().join(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(
        (mode("usr/bin/systemctl"), mode("tmp"), mode("root"), mode("etc/hosts")),
        (0o755, 0o1777, 0o700, 0o644)
    );
    assert_eq!(mode("usr/bin/systemctl") & 0o7000, 0, "no set-user-id program is of use in a guest");
}

#[test]
fn units_keep_their_drop_in_directories() {
    let scene = Scene::new();
    let units = scene.0.path().join("units");
    fs::create_dir_all(units.join("a.service.d")).unwrap();
    fs::write(units.join("a.service"), "[Service]\n").unwrap();
    fs::write(units.join("a.service.d/more.conf"), "[Unit]\n").unwrap();
    let (root, packages) = (scene.root(), scene.packages());
    Root::lay_out(&root, &packages).unwrap().units(&units).unwrap();
    let dir = root.join(UNIT_DIR);
    assert!(dir.join("a.service").is_file() && dir.join("a.service.d/more.conf").is_file());
}

#[test]
fn modules_of_the_boot_stay_in_the_initramfs() {
    let module = |name: &str| Module {
        name: name.into(),
        path: format!("/lib/modules/6.1/{name}.ko"),
        data: name.as_bytes().to_vec(),
    };
    let plan = Plan {
        boot: vec![module("virtio_blk")],
        on_demand: vec![("ext4".into(), vec![module("mbcache"), module("ext4")])],
    };
    let scene = Scene::new();
    let (root, packages) = (scene.root(), scene.packages());
    Root::lay_out(&root, &packages).unwrap().modules(&plan).unwrap();
    assert!(root.join("usr/lib/modules/6.1/mbcache.ko").is_file());
    assert!(!root.join("usr/lib/modules/6.1/virtio_blk.ko").exists());
    let list = fs::read_to_string(root.join("etc/kata-agent/modules")).unwrap();
    assert_eq!(list, "@ext4 /lib/modules/6.1/mbcache.ko /lib/modules/6.1/ext4.ko\n");
}

#[test]
fn links_are_followed_within_the_root() {
    for (path, target, wanted) in [
        ("usr/lib64/ld.so", "../lib/x/ld.so", "usr/lib/x/ld.so"),
        ("usr/lib/a", "b", "usr/lib/b"),
        ("usr/lib/a", "/usr/lib/b", "usr/lib/b"),
        ("a", "../../../etc/passwd", "etc/passwd"),
    ] {
        assert_eq!(beside(Path::new(path), Path::new(target)), Path::new(wanted));
    }
}
