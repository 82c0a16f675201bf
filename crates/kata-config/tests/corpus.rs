//! Every configuration file that upstream 4.1 ships can be read, and it is known what is made of each.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fmt::Write;
use std::path::{Path, PathBuf};

use kata_config::{Reading, Remark};

fn corpus(runtime: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(runtime);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn read(file: &Path) -> Reading {
    let name = Path::new(file.file_name().unwrap());
    let text = std::fs::read_to_string(file).unwrap();
    Reading::of_text(name, &text).unwrap_or_else(|errors| panic!("{errors}"))
}

/// What keeps a pod from being made, and the notes; of a key that is merely not acted on the name says it all.
fn summary(reading: &Reading) -> String {
    let mut text = String::new();
    for error in &reading.unmet {
        writeln!(text, "{error}").unwrap();
    }
    writeln!(text, "\n{} notes", reading.notes.len()).unwrap();
    for note in &reading.notes {
        match note.remark {
            Remark::Idle => writeln!(text, "{}", note.key).unwrap(),
            _ => writeln!(text, "{}: {}", note.key, note.remark).unwrap(),
        }
    }
    text
}

#[test]
fn every_file_of_upstreams_rust_runtime_loads() {
    let files = corpus("rust");
    assert_eq!(files.len(), 15);
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        insta::assert_snapshot!(format!("rust-{name}"), summary(&read(&file)));
    }
}

#[test]
fn every_file_of_upstreams_go_runtime_loads() {
    let files = corpus("go");
    assert_eq!(files.len(), 14);
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        insta::assert_snapshot!(format!("go-{name}"), summary(&read(&file)));
    }
}

#[test]
fn a_pod_can_be_made_with_the_default_file_of_either_runtime() {
    for name in [
        "rust/configuration-qemu-runtime-rs.toml",
        "rust/configuration-clh-runtime-rs.toml",
        "go/configuration-qemu.toml",
    ] {
        let reading = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name));
        let config = reading.into_config().unwrap_or_else(|errors| panic!("{name}:\n{errors}"));
        assert_eq!(config.hypervisor.qemu.default_memory, 2048);
        assert!(config.runtime.disable_guest_seccomp);
    }
}

#[test]
fn confidential_files_are_refused_for_what_is_around_the_machine_and_not_for_the_machine() {
    for file in corpus("rust").into_iter().chain(corpus("go")) {
        let name = file.to_str().unwrap();
        if !(name.contains("snp") || name.contains("tdx")) {
            continue;
        }
        let errors = read(&file).into_config().unwrap_err();
        let keys: Vec<&str> = errors.0.iter().map(|error| error.key.as_str()).collect();
        let of_machine = ["confidential_guest", "sev_snp_guest", "firmware", "snp_id_block", "initdata"];
        assert!(
            !keys.iter().any(|key| of_machine.iter().any(|name| key.ends_with(name))),
            "{name}: {keys:?}"
        );
    }
}

#[test]
fn no_pod_is_made_by_a_driver_that_is_not_there() {
    for name in ["dragonball", "openvmm-azure-runtime-rs", "remote"] {
        let path = format!("tests/corpus/rust/configuration-{name}.toml");
        let errors = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).into_config().unwrap_err();
        assert!(errors.0.iter().any(|error| error.key == "runtime.hypervisor_name"), "{name}: {errors}");
    }
}
