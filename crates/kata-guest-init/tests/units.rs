//! The units of the image and those that an extension gets, before systemd's own eyes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use kata_guest_init::components::{Directory, install};
use kata_guest_init::variables::Table;

const HOSTS_UNITS: &str = "/usr/lib/systemd/system";

fn services() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/services")
}

/// A root with systemd's own units and the image's, and every program that they start.
fn root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let units = root.path().join("usr/lib/systemd/system");
    std::fs::create_dir_all(&units).unwrap();
    for directory in [Path::new(HOSTS_UNITS), &services()] {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, units.join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    for program in
        ["usr/bin/kata-agent", "usr/bin/kata-initdata", "usr/bin/kata-image-pull", "run/kata-guest-init/exec"]
    {
        program_at(root.path(), program);
    }
    root
}

fn program_at(root: &Path, path: &str) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "").unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// What systemd finds wrong with `units` in `root`; `None` where this host has no systemd.
fn complaints(root: &Path, units: &[String]) -> Option<String> {
    let verify = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(format!("--root={}", root.display()))
        .args(units)
        .output();
    let Ok(output) = verify else {
        println!("skipped: no systemd-analyze on this host");
        return None;
    };
    let code = if output.status.success() { String::new() } else { output.status.to_string() };
    Some(String::from_utf8_lossy(&output.stderr).into_owned() + &code)
}

#[test]
fn a_manifest_without_end_ends_the_service_that_pulls_and_not_the_guest() {
    let unit = std::fs::read_to_string(services().join("image-pull.service")).unwrap();
    assert!(unit.lines().any(|line| line == "MemoryMax=60%"), "{unit}");
}

fn has_systemd() -> bool {
    let there = Path::new(HOSTS_UNITS).join("sysinit.target").exists();
    if !there {
        println!("skipped: no units of systemd's own in {HOSTS_UNITS}");
    }
    there
}

#[test]
fn units_of_the_image_have_nothing_that_systemd_complains_of() {
    if !has_systemd() {
        return;
    }
    let root = root();
    let units: Vec<String> = std::fs::read_dir(services())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(units.len() >= 7, "{units:?}");
    if let Some(complaints) = complaints(root.path(), &units) {
        assert_eq!(complaints, "");
    }
}

#[test]
fn units_of_an_extension_have_nothing_that_systemd_complains_of() {
    if !has_systemd() {
        return;
    }
    let root = root();
    let extension = root.path().join("run/kata-extensions/coco");
    let manifest = r##"
        schema_version = 1
        [[process]]
        id = "first"
        level = 1
        path = "bin/a b;%n"
        args = ["", ";", "a b", "\"; ExecStart=x", "\\n\\", "%i %%", "$HOME ", "'", "|| @-+!", "#"]
        optional_args = [{ when = "initdata_toml_path", args = ["${initdata_toml_path}"] }]
        env = { A = "\" B=c %h $x \\", PATH = "${extension_root}/bin" }
        wait_socket = "/run/a b%/s.sock"
        guest_services = ["mine"]
        network_namespace = "/run/netns/pod"
        [[process]]
        id = "second"
        level = 2
        path = "bin/b"
        config = "${cdh_config_path}"
    "##;
    for program in ["bin/a b;%n", "bin/b"] {
        program_at(&extension, program);
    }
    let place = extension.join("components.toml");
    std::fs::write(&place, manifest).unwrap();
    let directory = Directory {
        owner: "extension-coco".to_owned(),
        here: extension,
        root: "/run/kata-extensions/coco".to_owned(),
        manifest: "components.toml",
    };
    let made = directory.services(&Table::built_in().unwrap(), &[]).unwrap();
    assert_eq!(install(&root.path().join("run"), &[made]).unwrap(), 2);
    // What is looked at offline is not in /run.
    let etc = root.path().join("etc/systemd");
    std::fs::create_dir_all(&etc).unwrap();
    symlink("../../run/systemd/system", etc.join("system")).unwrap();
    let units = ["first", "second"].map(|id| format!("extension-coco.{id}.service"));
    if let Some(complaints) = complaints(root.path(), &units) {
        assert_eq!(complaints, "");
    }
}
