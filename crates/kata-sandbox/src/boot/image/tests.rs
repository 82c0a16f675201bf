use std::path::Path;

use kata_image::manifest::{Agent, Compression, Initrd, Kernel, VerityError, sha256_of};

use super::*;

#[test]
fn bound_of_a_disk_is_counted_in_bytes_and_never_becomes_none() {
    let limits = |bits, operations| {
        let config = kata_config::Qemu {
            disk_rate_limiter_bw_max_rate: bits,
            disk_rate_limiter_ops_max_rate: operations,
            ..kata_config::Qemu::default()
        };
        let DiskLimits { bytes_per_second, requests_per_second } = disk_limits(&config);
        (bytes_per_second.map_or(0, NonZeroU64::get), requests_per_second.map_or(0, NonZeroU64::get))
    };
    assert_eq!(limits(0, 0), (0, 0));
    assert_eq!(limits(80_000_000, 100), (10_000_000, 100));
    assert_eq!(limits(1, 1), (1, 1));
}

fn verity(digit: &str) -> Verity {
    Verity {
        root_hash: digit.repeat(64),
        salt: "00".into(),
        data_blocks: 10,
        data_block_size: 4096,
        hash_block_size: 4096,
    }
}

/// An image in `dir`: lean, or one whose root is on a disk.
fn image(dir: &Path, services: bool) {
    let digest = |name: &str| {
        std::fs::write(dir.join(name), name).unwrap();
        sha256_of(&dir.join(name)).unwrap()
    };
    let kernel = Kernel {
        path: "vmlinux".into(),
        sha256: digest("vmlinux"),
        release: String::new(),
        provider: String::new(),
    };
    let mut manifest = Manifest::new(kernel, Agent { version: String::new(), announces: true });
    manifest.initrd = Some(Initrd {
        path: "initrd.cpio".into(),
        sha256: digest("initrd.cpio"),
        compression: Compression::None,
    });
    if services {
        manifest.image = Some(DiskImage {
            path: "root.img".into(),
            sha256: digest("root.img"),
            fstype: "erofs".into(),
            verity: Some(verity("a")),
        });
        manifest.capabilities.insert(capability::EXTENSIONS.into());
    }
    manifest.store(dir).unwrap();
}

/// What a machine with the image in `dir` boots, its configuration changed by `change`.
fn found(dir: &Path, change: impl FnOnce(&mut kata_config::Qemu)) -> Result<(Guest, String), BootError> {
    let mut config = Config::default();
    config.hypervisor.qemu.image = Some(dir.into());
    change(&mut config.hypervisor.qemu);
    let artefacts = Artefacts {
        vmm: "/vmm".into(),
        kata_vmm: "/kata-vmm".into(),
        virtiofsd: None,
        guest_image: Some(dir.into()),
    };
    let guest = Guest::find(&config, &artefacts)?;
    let params = guest.kernel_params(&config).join(" ");
    Ok((guest, params))
}

fn extension(verity: &str) -> ExtensionImage {
    ExtensionImage { name: "tools".into(), path: "/tools.img".into(), verity_params: verity.into() }
}

#[test]
fn verified_root_is_a_disk_by_its_serial_and_the_kernel_mounts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), true);
    let (guest, params) = found(dir.path(), |_| {}).unwrap();
    let disk = Disk { id: "root".into(), path: dir.path().join("root.img"), readonly: true };
    assert_eq!((guest.disks, guest.image), (vec![disk], None));
    assert_eq!(guest.initrd, Some(dir.path().join("initrd.cpio")));
    assert!(params.contains(&format!(" kata.root.verity_params={}", verity("a"))), "{params}");
    assert!(!params.contains(" root=") && !params.contains("rootfstype="), "{params}");
}

#[test]
fn extensions_are_further_disks_with_parameters_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), true);
    let text = verity("b").to_string();
    let (guest, params) =
        found(dir.path(), |qemu| qemu.guest_extension_images = vec![extension(&text)]).unwrap();
    let ids: Vec<_> = guest.disks.iter().map(|disk| disk.id.as_str()).collect();
    assert_eq!(ids, ["root", "extension-tools"]);
    assert!(params.contains(&format!(" kata.extension.tools.verity_params={text}")), "{params}");
}

#[test]
fn lean_image_that_is_asked_for_extensions_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), false);
    let text = verity("b").to_string();
    let result = found(dir.path(), |qemu| qemu.guest_extension_images = vec![extension(&text)]);
    let Err(BootError::Image(error)) = result else { panic!("it was not refused") };
    let words = error.to_string();
    assert!(
        words.contains("extensions") && words.contains("hypervisor.qemu.guest_extension_images"),
        "{words}"
    );
}

#[test]
fn extension_without_what_it_is_verified_against_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), true);
    let result = found(dir.path(), |qemu| qemu.guest_extension_images = vec![extension("root_hash=00")]);
    let Err(BootError::Extension { name, source }) = result else { panic!("it was not refused") };
    assert_eq!((name.as_str(), source), ("tools", VerityError::Missing("salt")));
}

#[test]
fn disk_of_the_configurations_own_is_mounted_by_the_kernel() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), true);
    let (guest, params) = found(dir.path(), |qemu| qemu.image = Some("/my/disk".into())).unwrap();
    assert_eq!((guest.image, guest.disks.len()), (Some("/my/disk".into()), 0));
    assert!(params.contains("root=/dev/vda ro") && !params.contains("verity"), "{params}");
}

#[test]
fn image_that_was_changed_is_found_out() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), true);
    let (guest, _) = found(dir.path(), |_| {}).unwrap();
    guest.verify().unwrap();
    std::fs::write(dir.path().join("root.img"), "other").unwrap();
    let error = guest.verify().unwrap_err().to_string();
    assert!(error.contains("root.img"), "{error}");
}
