use super::*;

#[test]
fn the_first_directory_with_a_file_wins() {
    let dir = tempfile::tempdir().unwrap();
    let [etc, opt] = ["etc", "opt"].map(|name| dir.path().join(name));
    for place in [&etc, &opt] {
        std::fs::create_dir(place).unwrap();
    }
    assert_eq!(first_file(&[&etc, &opt]), None);
    std::fs::write(opt.join("configuration.toml"), "").unwrap();
    assert_eq!(first_file(&[&etc, &opt]), Some(opt.join("configuration.toml")));
    std::fs::write(etc.join("configuration.toml"), "").unwrap();
    assert_eq!(first_file(&[&etc, &opt]), Some(etc.join("configuration.toml")));
}

#[test]
fn a_quoted_key_with_dots_is_not_a_path() {
    let mut layers = Layers::new(Registered::PROGRAM);
    layers.text(Path::new("f.toml"), "[hypervisor]\n\"qemu.default_memory\" = 512\n");
    let errors = layers.finish().unwrap_err().to_string();
    assert!(errors.starts_with("f.toml:2: hypervisor.\"qemu.default_memory\": unknown key"), "{errors}");
}

proptest::proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "(?s).{0,300}") {
        let mut layers = Layers::new(Registered::PROGRAM);
        layers.text(Path::new("f.toml"), &text);
        layers.assign(&text);
        drop(layers.finish());
    }

    #[test]
    fn arbitrary_values_of_known_keys_never_panic(
        index in 0..crate::keys::all().count(),
        value in r#"(-?[0-9]{1,40}|-?[0-9]{1,3}\.[0-9]{1,3}(e[0-9]{1,3})?|0x[0-9a-f]{1,20}|-?inf|nan|true|"[^"\\\n]{0,20}"|\["[a-z ]{0,5}"(, 1)?\]|\{[a-z]=1\}|[^\n]{0,30})"#,
    ) {
        let key = crate::keys::all().nth(index).unwrap().own_path();
        let mut layers = Layers::new(Registered::PROGRAM);
        layers.text(Path::new("f.toml"), &format!("{key} = {value}\n"));
        layers.assign(&format!("{key}={value}"));
        if let Ok(Reading { config, .. }) = layers.finish() {
            proptest::prop_assert!(config.hypervisor.qemu.vcpus(8) >= 1);
            proptest::prop_assert!(config.hypervisor.qemu.vcpus(8) <= 8);
        }
    }
}

#[test]
fn upstreams_file_server_is_noted_and_the_own_one_is_used() {
    let text = "[hypervisor.qemu]\nvirtio_fs_daemon = \"/opt/kata/libexec/virtiofsd\"\n\
        virtio_fs_extra_args = [\"--thread-pool-size=1\", \"-o\", \"announce_submounts\"]\n";
    let reading = Reading::of_text(Path::new("upstream.toml"), text).unwrap();
    assert_eq!(reading.config, Config::default());
    assert_eq!(reading.notes.len(), 2);
    assert!(reading.notes[0].to_string().contains("kata-virtiofsd is used"), "{}", reading.notes[0]);
    let other = text.replace("/opt/kata/libexec/virtiofsd", "/srv/virtiofsd");
    let reading = Reading::of_text(Path::new("own.toml"), &other).unwrap();
    assert_eq!(reading.config.hypervisor.qemu.virtio_fs_daemon, Some("/srv/virtiofsd".into()));
}
