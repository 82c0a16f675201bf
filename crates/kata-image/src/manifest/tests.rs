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
