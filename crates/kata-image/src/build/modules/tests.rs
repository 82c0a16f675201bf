use super::super::elf::tests::{Section, elf_with};
use super::*;

const RELEASE: &str = "6.1.0-test";

/// A module file with the given `.modinfo` entries.
fn module(info: &[&str]) -> Vec<u8> {
    let data = info.iter().flat_map(|entry| entry.bytes().chain([0])).collect();
    elf_with(&[], b"", &[Section { name: ".modinfo", data }])
}

fn put(root: &Path, path: &str, data: &[u8]) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, data).unwrap();
}

fn xz(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    io::Read::read_to_end(&mut xz2::read::XzEncoder::new(data, 0), &mut out).unwrap();
    out
}

/// The boot modules as separate files, with a little net of dependencies.
fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, "kernel/virtio/virtio.ko", &module(&["depends=virtio_ring"]));
    put(root, "kernel/virtio/virtio_ring.ko", &module(&["depends="]));
    put(root, "kernel/virtio/virtio_mmio.ko", &module(&["depends=virtio,virtio_ring"]));
    put(root, "kernel/virtio/virtio_pci.ko.xz", &xz(&module(&["license=GPL", "depends=virtio"])));
    let vsock = module(&["depends=virtio,vsock"]);
    put(root, "kernel/vsock/vmw_vsock_virtio_transport.ko.zst", &{
        ruzstd::encoding::compress_to_vec(vsock.as_slice(), ruzstd::encoding::CompressionLevel::Fastest)
    });
    put(root, "kernel/vsock/vsock.ko", &module(&["depends="]));
    put(root, "kernel/fs/virtiofs.ko", &module(&["depends=fuse,virtio"]));
    put(root, "kernel/fs/erofs.ko", &module(&["depends=libcrc32c"]));
    put(root, "kernel/lib/libcrc32c.ko", &module(&["depends=", "softdep=pre: crc32c my-crc post: other"]));
    put(root, "kernel/lib/my-crc.ko", &module(&["depends="]));
    put(root, "modules.builtin", b"kernel/fs/fuse/fuse.ko\nkernel/drivers/block/loop.ko\n");
    dir
}

fn names(modules: &[Module]) -> Vec<&str> {
    modules.iter().map(|module| module.name.as_str()).collect()
}

#[test]
fn dependencies_come_first_and_built_in_ones_not_at_all() {
    let tree = tree();
    let plan = Tree::open(tree.path(), RELEASE).unwrap().plan(IN_INITRD).unwrap();
    let wanted = [
        "virtio_ring",
        "virtio",
        "virtio_mmio",
        "virtio_pci",
        "vsock",
        "vmw_vsock_virtio_transport",
        "virtiofs",
    ];
    assert_eq!(names(&plan.boot), wanted);
    assert!(plan.provides("erofs") && !plan.provides("fuse") && !plan.provides("overlay"));
}

#[test]
fn compressed_modules_are_taken_unpacked() {
    let tree = tree();
    let plan = Tree::open(tree.path(), RELEASE).unwrap().plan(IN_INITRD).unwrap();
    for name in ["virtio_pci", "vmw_vsock_virtio_transport"] {
        let module = plan.modules().find(|module| module.name == name).unwrap();
        assert!(module.data.starts_with(b"\x7fELF") && module.path.ends_with(".ko"), "{}", module.path);
    }
}

#[test]
fn list_has_boot_lines_and_what_is_loaded_on_demand() {
    let tree = tree();
    let list = Tree::open(tree.path(), RELEASE).unwrap().plan(IN_INITRD).unwrap().list();
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!(lines[0], "/lib/modules/6.1.0-test/kernel/virtio/virtio_ring.ko");
    let erofs = "@erofs /lib/modules/6.1.0-test/kernel/lib/my-crc.ko /lib/modules/6.1.0-test/kernel/lib/libcrc32c.ko \
                 /lib/modules/6.1.0-test/kernel/fs/erofs.ko";
    assert_eq!(lines[7..], [erofs]);
}

#[test]
fn root_on_a_disk_has_what_leads_to_it_loaded_at_boot() {
    let tree = tree();
    for name in ["virtio_blk", "dm_verity", "overlay"] {
        put(tree.path(), &format!("kernel/disk/{name}.ko"), &module(&["depends="]));
    }
    let plan = |tree: &tempfile::TempDir| Tree::open(tree.path(), RELEASE).unwrap().plan(ON_DISK);
    let boot = plan(&tree).unwrap().boot;
    assert!(names(&boot).ends_with(&["vsock", "vmw_vsock_virtio_transport", "virtiofs"]), "{boot:?}");
    // What only saves a line of the log is taken where there is such a module.
    put(tree.path(), "kernel/fs/autofs4.ko", &module(&["depends="]));
    assert!(names(&plan(&tree).unwrap().boot).ends_with(&["virtiofs", "autofs4"]));
    fs::remove_file(tree.path().join("kernel/disk/dm_verity.ko")).unwrap();
    assert!(matches!(plan(&tree), Err(ModulesError::Missing { module, .. }) if module == "dm_verity"));
}

#[test]
fn driver_for_reports_is_a_set_by_the_name_of_who_makes_them() {
    let tree = tree();
    for name in ["virtio_blk", "dm_verity", "overlay"] {
        put(tree.path(), &format!("kernel/disk/{name}.ko"), &module(&["depends="]));
    }
    put(tree.path(), "kernel/virt/sev-guest.ko", &module(&["depends=tsm"]));
    put(tree.path(), "kernel/virt/tsm.ko", &module(&["depends="]));
    let plan = Tree::open(tree.path(), RELEASE).unwrap().plan(ON_DISK).unwrap();
    let (_, set) = plan.on_demand.iter().find(|(name, _)| FOR_REPORTS.contains(&name.as_str())).unwrap();
    assert_eq!(names(set), ["tsm", "sev_guest"]);
    assert!(!names(&plan.boot).contains(&"tsm"), "on other hardware it is refused");
}

#[test]
fn kernel_that_guests_cannot_be_reached_in_is_refused() {
    let tree = tree();
    fs::remove_file(tree.path().join("kernel/fs/virtiofs.ko")).unwrap();
    let error = Tree::open(tree.path(), RELEASE).unwrap().plan(IN_INITRD).unwrap_err();
    assert!(matches!(&error, ModulesError::Missing { module, .. } if module == "virtiofs"), "{error}");
}

#[test]
fn missing_dependency_is_named_with_who_needs_it() {
    let tree = tree();
    fs::remove_file(tree.path().join("kernel/vsock/vsock.ko")).unwrap();
    let error = Tree::open(tree.path(), RELEASE).unwrap().plan(IN_INITRD).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("vmw_vsock_virtio_transport") && text.contains("on vsock"), "{text}");
}

#[test]
fn circle_of_dependencies_ends_in_an_error() {
    let tree = tree();
    put(tree.path(), "kernel/virtio/virtio_ring.ko", &module(&["depends=virtio"]));
    assert!(matches!(
        Tree::open(tree.path(), RELEASE).unwrap().plan(IN_INITRD),
        Err(ModulesError::Circle { .. })
    ));
}

#[test]
fn module_that_is_no_elf_file_is_named() {
    let tree = tree();
    put(tree.path(), "kernel/virtio/virtio.ko", b"text");
    let error = Tree::open(tree.path(), RELEASE).unwrap().plan(IN_INITRD).unwrap_err();
    assert!(
        matches!(&error, ModulesError::Elf { path, .. } if path.ends_with("kernel/virtio/virtio.ko")),
        "{error}"
    );
}
