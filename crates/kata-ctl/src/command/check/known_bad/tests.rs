use super::*;

fn test_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/command/check/known_bad/test").join(name)
}

#[test]
fn the_built_in_list_is_one_and_every_entry_names_its_source() {
    let list = KnownBad::built_in().unwrap();
    assert!(list.len() >= 5);
    for bad in &list.bad {
        assert!(bad.source.starts_with("https://"), "{}", bad.id);
        assert!(!bad.cost.is_empty() && !bad.mend.is_empty() && !bad.ranges.is_empty(), "{}", bad.id);
    }
}

#[test]
fn versions_are_compared_by_number() {
    let list = KnownBad::built_in().unwrap();
    let bad = |component, version: &str| !list.findings(component, version).is_empty();
    for version in ["5.8", "5.10.101", "5.15.24", "5.16.10-custom"] {
        assert!(bad(Component::Kernel, version), "{version}");
    }
    for version in ["5.7.19", "5.10.102", "5.15.25", "5.16.11", "6.1.0", "6.18.2", "odd"] {
        assert!(!bad(Component::Kernel, version), "{version}");
    }
    assert!(
        bad(Component::Qemu, "5.1.0") && !bad(Component::Qemu, "5.2.0") && !bad(Component::Qemu, "10.0.2")
    );
    assert!(bad(Component::CloudHypervisor, "51.1") && !bad(Component::CloudHypervisor, "52.0"));
}

#[test]
fn a_distributions_kernel_is_judged_by_the_stable_version_that_it_tells() {
    let told = |release, built, signature| kernel_version(release, built, signature);
    assert_eq!(
        told("6.1.0-56-cloud-amd64", "#1 SMP Debian 6.1.192-2 (2026-10-01)", None).as_deref(),
        Some("6.1.192")
    );
    let ubuntu = Some("Ubuntu 5.15.0-25.25-generic 5.15.30");
    assert_eq!(told("5.15.0-25-generic", "#25-Ubuntu SMP", ubuntu).as_deref(), Some("5.15.30"));
    assert_eq!(told("5.16.10", "#1 SMP", None).as_deref(), Some("5.16.10"));
    assert_eq!(told("5.16.10-200.fc35.x86_64", "#1 SMP", None).as_deref(), Some("5.16.10"));
    assert_eq!(told("5.14.0-70.el9.x86_64", "#1 SMP", None), None, "what it has fixed cannot be told");
}

#[test]
fn a_list_is_used_if_the_right_key_has_signed_it() {
    let list = KnownBad::signed(&test_file("list.toml"), Some(&test_file("key.pub"))).unwrap();
    assert_eq!((list.updated.as_str(), list.findings(Component::Qemu, "7.2").len()), ("2026-11-25", 1));
}

#[test]
fn a_list_that_was_changed_or_signed_by_another_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list.toml");
    let text = std::fs::read_to_string(test_file("list.toml")).unwrap();
    std::fs::write(&path, text.replace(">=0.0", "<0.1")).unwrap();
    assert!(matches!(KnownBad::signed(&path, Some(&test_file("key.pub"))), Err(KnownBadError::Read { .. })));
    std::fs::copy(test_file("list.toml.minisig"), dir.path().join("list.toml.minisig")).unwrap();
    assert!(matches!(
        KnownBad::signed(&path, Some(&test_file("key.pub"))),
        Err(KnownBadError::Signature { .. })
    ));
    std::fs::write(&path, &text).unwrap();
    assert!(KnownBad::signed(&path, Some(&test_file("key.pub"))).is_ok());

    // Somebody else's key, from the documentation of minisign-verify.
    let other = dir.path().join("other.pub");
    let key = "untrusted comment: other\nRWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3\n";
    std::fs::write(&other, key).unwrap();
    assert!(matches!(KnownBad::signed(&path, Some(&other)), Err(KnownBadError::Signature { .. })));
    assert!(matches!(KnownBad::signed(&path, Some(&path)), Err(KnownBadError::Key { .. })));
}

#[test]
fn a_list_of_another_shape_is_refused() {
    let parse = |text: &str| KnownBad::parse(Path::new("x"), text);
    assert!(matches!(parse("version = 2\nupdated = \"x\""), Err(KnownBadError::Version { version: 2, .. })));
    assert!(matches!(parse("version = 1"), Err(KnownBadError::Shape { .. })));
    let range = BUILT_IN.replace(">=5.8, ", "~5.8, ");
    assert!(matches!(parse(&range), Err(KnownBadError::Shape { .. })));
}
