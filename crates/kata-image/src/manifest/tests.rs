use super::*;

fn image() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("vmlinux"), "kernel").unwrap();
    std::fs::write(dir.path().join("initrd.cpio"), "initrd").unwrap();
    let digest = |name: &str| sha256_of(&dir.path().join(name)).unwrap();
    let kernel = Kernel {
        path: "vmlinux".into(),
        sha256: digest("vmlinux"),
        release: "6.1.0".into(),
        provider: "file".into(),
    };
    let mut manifest = Manifest::new(kernel, Agent { version: "0.1.0".into(), announces: true });
    manifest.initrd = Some(Initrd {
        path: "initrd.cpio".into(),
        sha256: digest("initrd.cpio"),
        compression: Compression::None,
    });
    manifest.capabilities.insert(capability::VSOCK.into());
    manifest.store(dir.path()).unwrap();
    dir
}

/// Rewrites the manifest's text.
fn edit(dir: &Path, from: &str, to: &str) {
    let path = dir.join(FILE_NAME);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn stored_manifest_loads_and_verifies() {
    let dir = image();
    let manifest = Manifest::load(dir.path()).unwrap();
    assert_eq!(manifest.kernel_path(), dir.path().join("vmlinux"));
    assert_eq!(manifest.initrd_path(), Some(dir.path().join("initrd.cpio")));
    assert_eq!(manifest.image_path(), None);
    assert!(manifest.has(capability::VSOCK) && !manifest.has(capability::EROFS));
    assert!(manifest.agent.announces);
    manifest.verify().unwrap();
}

#[test]
fn agent_of_which_nothing_is_known_does_not_announce() {
    let dir = image();
    let text = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["agent"] = serde_json::json!({});
    std::fs::write(dir.path().join(FILE_NAME), value.to_string()).unwrap();
    assert!(!Manifest::load(dir.path()).unwrap().agent.announces);
}

#[test]
fn missing_manifest_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = Manifest::load(dir.path()).unwrap_err();
    assert!(matches!(error, ManifestError::Read { .. }));
    assert!(error.to_string().contains(dir.path().join(FILE_NAME).to_str().unwrap()), "{error}");
}

#[test]
fn missing_kernel_is_named() {
    let dir = image();
    std::fs::remove_file(dir.path().join("vmlinux")).unwrap();
    let error = Manifest::load(dir.path()).unwrap_err();
    assert!(error.to_string().contains("vmlinux"), "{error}");
}

#[test]
fn newer_version_is_told_apart_from_garbage() {
    let dir = image();
    std::fs::write(dir.path().join(FILE_NAME), r#"{"version": 7, "kernels": []}"#).unwrap();
    assert!(matches!(Manifest::load(dir.path()), Err(ManifestError::Version { found: 7, .. })));
    std::fs::write(dir.path().join(FILE_NAME), "version 7").unwrap();
    assert!(matches!(Manifest::load(dir.path()), Err(ManifestError::Parse { .. })));
}

#[test]
fn misspelt_key_is_refused() {
    let dir = image();
    edit(dir.path(), "\"capabilities\"", "\"capabilites\"");
    assert!(matches!(Manifest::load(dir.path()), Err(ManifestError::Parse { .. })));
}

#[test]
fn path_out_of_the_image_is_refused() {
    for path in ["/etc/passwd", "../vmlinux", "a/../../b", ""] {
        let dir = image();
        edit(dir.path(), "\"vmlinux\"", &format!("{path:?}"));
        let error = Manifest::load(dir.path()).unwrap_err();
        assert!(matches!(error, ManifestError::Invalid { key: "kernel", .. }), "{path}: {error}");
    }
}

#[test]
fn symbolic_link_out_of_the_image_is_refused() {
    let dir = image();
    std::fs::remove_file(dir.path().join("vmlinux")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("vmlinux")).unwrap();
    assert!(matches!(Manifest::load(dir.path()), Err(ManifestError::Invalid { key: "kernel", .. })));
}

#[test]
fn image_without_a_root_is_refused() {
    let dir = image();
    let mut manifest = Manifest::load(dir.path()).unwrap();
    manifest.initrd = None;
    manifest.store(dir.path()).unwrap();
    assert!(matches!(Manifest::load(dir.path()), Err(ManifestError::Invalid { key: "initrd", .. })));
}

#[test]
fn changed_file_fails_verification_but_still_loads() {
    let dir = image();
    std::fs::write(dir.path().join("initrd.cpio"), "other").unwrap();
    let manifest = Manifest::load(dir.path()).unwrap();
    let error = manifest.verify().unwrap_err();
    assert!(matches!(&error, ManifestError::Digest { path, .. } if path.ends_with("initrd.cpio")), "{error}");
}

fn verity() -> Verity {
    Verity {
        root_hash: "ab".repeat(32),
        salt: "00ff".into(),
        data_blocks: 100,
        data_block_size: 4096,
        hash_block_size: 4096,
    }
}

/// The manifest of [`image`] with a root disk that is verified.
fn with_disk(dir: &Path) -> Manifest {
    std::fs::write(dir.join("root.img"), "disk").unwrap();
    let mut manifest = Manifest::load(dir).unwrap();
    manifest.image = Some(DiskImage {
        path: "root.img".into(),
        sha256: sha256_of(&dir.join("root.img")).unwrap(),
        fstype: "erofs".into(),
        verity: Some(verity()),
    });
    manifest.init = Init::Systemd;
    manifest
}

#[test]
fn verified_root_disk_and_init_are_kept() {
    let dir = image();
    let manifest = with_disk(dir.path());
    manifest.store(dir.path()).unwrap();
    assert_eq!(Manifest::load(dir.path()).unwrap(), manifest);
    assert_eq!(manifest.image.unwrap().verity.unwrap().data_size(), 409_600);
}

#[test]
fn manifest_without_init_is_one_whose_agent_is_process_1() {
    let dir = image();
    assert!(!std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap().contains("init\":"));
    assert_eq!(Manifest::load(dir.path()).unwrap().init, Init::Agent);
}

#[test]
fn verity_that_cannot_be_is_refused() {
    let bad: [fn(&mut Verity); 5] = [
        |verity| verity.root_hash.truncate(63),
        |verity| verity.salt = "0".into(),
        |verity| verity.data_blocks = 0,
        |verity| verity.data_block_size = 8192,
        |verity| verity.hash_block_size = 1000,
    ];
    for spoil in bad {
        let dir = image();
        let mut manifest = with_disk(dir.path());
        spoil(manifest.image.as_mut().unwrap().verity.as_mut().unwrap());
        manifest.store(dir.path()).unwrap();
        let error = Manifest::load(dir.path()).unwrap_err();
        assert!(matches!(error, ManifestError::Invalid { key: "image.verity", .. }), "{error}");
    }
}

#[test]
fn verity_parameters_are_read_as_they_are_written() {
    let text = verity().to_string();
    assert_eq!(
        text,
        format!(
            "root_hash={},salt=00ff,data_blocks=100,data_block_size=4096,hash_block_size=4096",
            "ab".repeat(32)
        )
    );
    assert_eq!(text.parse(), Ok(verity()));
    let unsalted = Verity { salt: String::new(), ..verity() };
    assert_eq!(unsalted.to_string().parse(), Ok(unsalted));
}

#[test]
fn verity_parameters_with_a_fault_are_refused_and_the_fault_is_named() {
    let text = verity().to_string();
    for (from, to, words) in [
        (",salt=00ff", "", "salt is missing"),
        ("salt=00ff", "salt", "\"salt\" is not of the form"),
        ("salt=00ff", "pepper=00ff", "\"pepper\" is no verity parameter"),
        ("salt=00ff", "salt=00ff,salt=00ff", "salt is given twice"),
        ("salt=00ff", "salt=00FF", "salt: \"00FF\" is not"),
        ("data_blocks=100", "data_blocks=many", "data_blocks: \"many\" is not a number"),
        ("data_block_size=4096", "data_block_size=3", "data_block_size: \"3\" is not a power of two"),
    ] {
        let error = text.replacen(from, to, 1).parse::<Verity>().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert!("".parse::<Verity>().is_err());
}

#[test]
fn need_that_an_image_has_not_is_told_with_who_asks_and_which_image_has_it() {
    let dir = image();
    let mut manifest = Manifest::load(dir.path()).unwrap();
    let need = Need::new(capability::INITDATA, "hypervisor.qemu.initdata");
    let error = manifest.require(need).unwrap_err().to_string();
    for word in
        [dir.path().to_str().unwrap(), "no initdata", "hypervisor.qemu.initdata", "--flavour services"]
    {
        assert!(error.contains(word), "{error}");
    }
    manifest.capabilities.insert(capability::INITDATA.into());
    manifest.require(need).unwrap();
}

#[test]
fn every_image_can_be_asked_for_what_its_kernel_brings() {
    let dir = image();
    let manifest = Manifest::load(dir.path()).unwrap();
    manifest.require(Need::new(capability::VSOCK, "any pod")).unwrap();
    let error = manifest.require(Need::new(capability::EROFS, "a volume")).unwrap_err().to_string();
    assert!(error.contains("another kernel"), "{error}");
}
