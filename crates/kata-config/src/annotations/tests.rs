use std::path::Path;

use crate::{Config, ConfigErrors, Reading, Sources};

use super::*;

struct Pod {
    etc: tempfile::TempDir,
}

impl Pod {
    fn under(qemu: &str) -> Self {
        let etc = tempfile::tempdir().unwrap();
        std::fs::write(etc.path().join("configuration.toml"), format!("[hypervisor.qemu]\n{qemu}\n"))
            .unwrap();
        Self { etc }
    }

    fn with(&self, annotations: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
        let pairs = annotations.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        let file = Some(self.etc.path().join("configuration.toml"));
        let sources = Sources { file, annotations: pairs.collect(), ..Sources::default() };
        Reading::of(&sources)?.into_config()
    }

    fn refusal(&self, name: &str, text: &str) -> String {
        self.with(&[(&format!("{PREFIX}{name}"), text)]).unwrap_err().to_string()
    }
}

#[test]
fn nothing_is_open_by_default() {
    let pod = Pod::under("");
    let mut refused = 0;
    for key in keys::all() {
        let Some(name) = key.annotation_name() else { continue };
        let error = pod.with(&[(&name, "1")]).unwrap_err();
        assert!(matches!(error.0[0].fault, Fault::Denied { .. }), "{error}");
        refused += 1;
    }
    assert!(refused > 50, "{refused}");
    assert_eq!(
        pod.refusal("hypervisor.default_memory", "512"),
        "annotation io.katacontainers.config.hypervisor.default_memory: hypervisor.qemu.default_memory: pods may not set it: \
         add \"default_memory\" to hypervisor.qemu.enable_annotations to let them"
    );
}

#[test]
fn what_the_administrator_opened_is_set_with_its_type() {
    let pod = Pod::under(
        "enable_annotations = [\"default_.*\", \"kernel_params\", \"runtime.create_container_timeout\", \"agent.kernel_modules\"]\n\
         default_memory = 100",
    );
    let config = pod
        .with(&[
            ("io.katacontainers.config.hypervisor.default_memory", "512"),
            ("io.katacontainers.config.hypervisor.default_vcpus", "1.5"),
            ("io.katacontainers.config.hypervisor.kernel_params", "a=b c"),
            ("io.katacontainers.config.runtime.create_container_timeout", "99"),
            ("io.katacontainers.config.agent.kernel_modules", "e1000e X=1; loop"),
            ("io.katacontainers.pkg.oci.container_type", "pod_sandbox"),
            ("io.kubernetes.cri.sandbox-id", "x"),
        ])
        .unwrap();
    assert_eq!(config.hypervisor.qemu.default_memory, 512);
    assert_eq!(config.hypervisor.qemu.vcpus(8), 2);
    assert_eq!(*config.hypervisor.qemu.kernel_params, ["a=b", "c"]);
    assert_eq!(config.agent.kata.create_container_timeout, 99);
    assert_eq!(config.agent.kata.kernel_modules, ["e1000e X=1", "loop"]);
    assert!(pod.refusal("hypervisor.default_memory", "much").contains("expected integer"));
    assert!(pod.refusal("hypervisor.default_memory", "1").contains("must be from 64"));
}

#[test]
fn a_pattern_has_to_match_the_whole_name() {
    let pod = Pod::under("enable_annotations = [\"memory\", \"vcpus$\"]");
    assert!(pod.refusal("hypervisor.default_memory", "512").contains("may not set it"));
    assert!(pod.refusal("hypervisor.default_vcpus", "1").contains("may not set it"));
    let pod = Pod::under("enable_annotations = [\"disable_guest_seccomp\"]");
    assert!(
        pod.refusal("runtime.disable_guest_seccomp", "true")
            .contains("add \"runtime.disable_guest_seccomp\"")
    );
}

#[test]
fn a_pattern_that_is_none_is_told_when_the_file_is_read() {
    let error = Pod::under("enable_annotations = [\"ok\", \"(\"]").with(&[]).unwrap_err().to_string();
    assert!(
        error.contains("configuration.toml:2: hypervisor.qemu.enable_annotations: item 2: \"(\": "),
        "{error}"
    );
}

#[test]
fn a_glob_that_is_none_is_told_when_the_file_is_read() {
    let error = Pod::under("valid_asset_paths = [\"/a[\"]").with(&[]).unwrap_err().to_string();
    assert!(
        error.contains("configuration.toml:2: hypervisor.qemu.valid_asset_paths: item 1: \"/a[\": "),
        "{error}"
    );
}

#[test]
fn an_unknown_annotation_is_refused_with_the_nearest() {
    let pod = Pod::under("enable_annotations = [\".*\"]");
    assert_eq!(
        pod.refusal("hypervisor.default_memry", "1"),
        "annotation io.katacontainers.config.hypervisor.default_memry: unknown annotation; did you mean \
         io.katacontainers.config.hypervisor.default_memory?"
    );
    assert!(pod.refusal("hypervisor.kernel_hash", "ab").contains("not carried out"));
}

#[test]
fn an_annotation_cannot_open_another() {
    let pod = Pod::under("enable_annotations = [\".*\"]");
    assert!(pod.refusal("hypervisor.enable_annotations", "path").contains("unknown annotation"));
    assert!(pod.refusal("hypervisor.valid_hypervisor_paths", "/").contains("unknown annotation"));
}

#[test]
fn a_wildcard_opens_no_program_and_no_arguments() {
    let pod = Pod::under("enable_annotations = [\".*\"]\nvalid_hypervisor_paths = [\"/usr/bin/*\"]");
    for (name, text) in [
        ("hypervisor.path", "/usr/bin/env"),
        ("hypervisor.virtio_fs_daemon", "/usr/bin/env"),
        ("hypervisor.virtio_fs_extra_args", "[\"-x\"]"),
        ("hypervisor.machine_accelerators", "x"),
        ("hypervisor.cpu_features", "x"),
        ("hypervisor.jailer_path", "/usr/bin/env"),
    ] {
        let refusal = pod.refusal(name, text);
        assert!(refusal.contains("may not set it"), "{refusal}");
    }
    let pod = Pod::under("enable_annotations = [\"virtio_fs_extra_args\"]");
    let config =
        pod.with(&[(&format!("{PREFIX}hypervisor.virtio_fs_extra_args"), "[\"-o\", \"x\"]")]).unwrap();
    assert_eq!(config.hypervisor.qemu.virtio_fs_extra_args, ["-o", "x"]);
}

#[test]
fn a_path_has_to_match_a_pattern_and_be_there_behind_no_link() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let at = |name: &str| root.join(name).display().to_string();
    std::fs::create_dir_all(root.join("ok/deep")).unwrap();
    std::fs::write(root.join("ok/qemu"), "").unwrap();
    std::fs::write(root.join("outside"), "").unwrap();
    std::os::unix::fs::symlink("../outside", root.join("ok/link")).unwrap();
    std::os::unix::fs::symlink("..", root.join("ok/up")).unwrap();
    let pod = Pod::under(&format!(
        "enable_annotations = [\"path\"]\nvalid_hypervisor_paths = [\"{}\", \"{}\"]",
        at("ok/*"),
        at("ok/up/*")
    ));
    let annotation = format!("{PREFIX}hypervisor.path");
    let config = pod.with(&[(&annotation, &at("ok/qemu"))]).unwrap();
    assert_eq!(config.hypervisor.qemu.path.as_deref(), Some(Path::new(&at("ok/qemu"))));
    for (path, why) in [
        ("outside", "no pattern matches"),
        ("ok/deep/qemu", "no pattern matches"),
        ("ok/../outside", "holds \"..\""),
        ("ok/.hidden", "no pattern matches"),
        ("ok/none", "No such file"),
        ("ok/link", "symbolic links"),
    ] {
        let refusal = pod.refusal("hypervisor.path", &at(path));
        assert!(
            refusal.contains("hypervisor.qemu.valid_hypervisor_paths") && refusal.contains(why),
            "{refusal}"
        );
    }
    assert!(pod.refusal("hypervisor.path", "qemu").contains("not an absolute path"));
}

#[test]
fn a_list_of_nothing_allows_no_path() {
    let pod = Pod::under("enable_annotations = [\"kernel\"]");
    assert!(pod.refusal("hypervisor.kernel", "/etc/passwd").contains("hypervisor.qemu.valid_asset_paths"));
}

#[test]
fn the_root_of_a_pattern_is_what_comes_before_its_wildcards() {
    assert_eq!(root_of("/opt/kata/bin/qemu-*"), Path::new("/opt/kata/bin"));
    assert_eq!(root_of("/opt/*/bin/qemu"), Path::new("/opt"));
    assert_eq!(root_of("/opt/kata/bin/qemu"), Path::new("/opt/kata/bin"));
    assert_eq!(root_of("*"), Path::new(""));
}
