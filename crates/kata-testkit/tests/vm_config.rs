//! The configuration as its owners and its users meet it: `kata-ctl config`, and annotations of pods under containerd.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Output;

use kata_testkit::containerd::Containerd;
use kata_testkit::host::{Host, stderr, stdout};
use kata_testkit::with_each_containerd;
use serde_json::Value;

with_each_containerd!(
    annotation_that_nobody_opened_keeps_the_pod_from_being_made,
    opened_annotation_sets_the_machine,
    annotation_names_no_program_that_is_not_listed,
);

const MEMORY: &str = "io.katacontainers.config.hypervisor.default_memory";

fn annotated(rig: &Containerd, annotations: &[String], id: &str, script: &str) -> Output {
    let flags: Vec<&str> = annotations.iter().flat_map(|text| ["--annotation", text.as_str()]).collect();
    rig.sh(&flags, id, script)
}

fn annotation_that_nobody_opened_keeps_the_pod_from_being_made(rig: &mut Containerd) {
    let output = annotated(rig, &[format!("{MEMORY}=192")], "closed", "true");
    assert!(!output.status.success());
    let words = stderr(&output);
    for part in [
        MEMORY,
        "hypervisor.qemu.default_memory",
        "add \"default_memory\" to hypervisor.qemu.enable_annotations",
    ] {
        assert!(words.contains(part), "no {part:?} in {words}");
    }
}

fn opened_annotation_sets_the_machine(rig: &mut Containerd) {
    rig.host().configure("[hypervisor.qemu]\ndefault_memory = 256\nenable_annotations = [\"default_memory\", \"kernel_params\"]\n");
    let params = "io.katacontainers.config.hypervisor.kernel_params=pod.said=so";
    let script = "cat /proc/cmdline; sed -n 's/MemTotal: *//p' /proc/meminfo";
    let output = annotated(rig, &[format!("{MEMORY}=192"), params.to_owned()], "opened", script);
    let text = stdout(&output);
    assert!(text.contains("pod.said=so"), "{text}{}", stderr(&output));
    let total: u64 = text.lines().last().unwrap().split_whitespace().next().unwrap().parse().unwrap();
    assert!((100_000..192 * 1024).contains(&total), "{total} kB");
}

fn annotation_names_no_program_that_is_not_listed(rig: &mut Containerd) {
    rig.host().configure("[hypervisor.qemu]\nenable_annotations = [\"path\"]\nvalid_hypervisor_paths = [\"/usr/bin/qemu-*\"]\n");
    let path = |program: &str| [format!("io.katacontainers.config.hypervisor.path={program}")];
    let output = annotated(rig, &path("/usr/bin/env"), "foreign", "true");
    assert!(stderr(&output).contains("hypervisor.qemu.valid_hypervisor_paths"), "{}", stderr(&output));
    let qemu = format!("/usr/bin/qemu-system-{}", std::env::consts::ARCH);
    assert!(Path::new(&qemu).exists());
    let output = annotated(rig, &path(&qemu), "listed", "echo up");
    assert_eq!(stdout(&output), "up\n", "{}", stderr(&output));
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn show_tells_what_a_pod_has_and_where_it_comes_from() {
    let Some(host) = Host::new() else { return };
    host.configure("[hypervisor.qemu]\ndefault_memory = 192\nmemory_slots = 3\n");
    let shown = json(&host.output(["config", "show", "--effective", "--origin", "--json"]));
    let setting = |key: &str| {
        let all = shown["settings"].as_array().unwrap();
        all.iter().find(|setting| setting["key"] == key).unwrap().clone()
    };
    let memory = setting("hypervisor.qemu.default_memory");
    assert_eq!((&memory["value"], &memory["origin"]["kind"]), (&Value::from(192), &Value::from("file")));
    assert_eq!(setting("runtime.accelerator")["origin"]["kind"], "default");
    let text = stdout(&host.output(["config", "show", "--origin"]));
    assert!(text.contains("hypervisor.qemu.memory_slots"), "{text}");
    assert!(text.contains(&format!("{}:", host.config().display())), "{text}");
    // The machine is as it says.
    let output = host.sh(&[], "sed -n 's/MemTotal: *//p' /proc/meminfo");
    let total: u64 = stdout(&output).split_whitespace().next().unwrap().parse().unwrap();
    assert!((100_000..192 * 1024).contains(&total), "{total} kB");
}

#[test]
fn validate_tells_all_faults_and_what_no_pod_is_made_with() {
    let Some(host) = Host::new() else { return };
    let good = host.output(["config", "validate"]);
    assert_eq!(good.status.code(), Some(0), "{}", stdout(&good));
    host.configure(
        "[hypervisor.qemu]\ndefault_memry = 192\nmachine_type = \"q36\"\nenable_iommu = true\nmsize_9p = 1\n",
    );
    let output = host.output(["config", "validate"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    for part in [
        "did you mean hypervisor.qemu.default_memory?",
        "did you mean \"q35\"?",
        "hypervisor.qemu.enable_iommu: not carried out",
        "removed [D0004",
        "not good: 2 errors, 2 refused",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let found = json(&host.output(["config", "validate", "--json"]));
    assert_eq!((found["errors"].as_array().unwrap().len(), found["usable"].as_bool()), (2, Some(false)));
    // What is refused there is refused to a pod, in the same words.
    host.configure("[hypervisor.qemu]\nenable_iommu = true\n");
    let pod = host.sh(&[], "true");
    assert!(stderr(&pod).contains("hypervisor.qemu.enable_iommu: not carried out"), "{}", stderr(&pod));
}

#[test]
fn explain_knows_keys_annotations_and_what_is_gone() {
    let Some(host) = Host::new() else { return };
    let text = |name: &str| stdout(&host.output(["config", "explain", name]));
    assert!(text("hypervisor.qemu.default_memory").contains("64 to 4194304"));
    assert!(text("default_memory").contains(MEMORY));
    assert!(text(MEMORY).contains("hypervisor.*.default_memory"));
    assert!(text("hypervisor.qemu.enable_iommu").contains("planned"));
    assert!(text("msize_9p").contains("D0004"));
    assert_eq!(
        json(&host.output(["config", "explain", "--json", "accelerator"]))[0]["known_to"],
        "this project"
    );
    let unknown = host.output(["config", "explain", "default_memry"]);
    assert_eq!(unknown.status.code(), Some(3));
    assert!(stderr(&unknown).contains("did you mean default_memory?"), "{}", stderr(&unknown));
}

#[test]
fn diff_tells_what_differs_in_effect_alone() {
    let Some(host) = Host::new() else { return };
    host.configure("[hypervisor.qemu]\ndefault_memory = 192\ndefault_vcpus = 1\ndefault_bridges = 1\n");
    let found = json(&host.output(["config", "diff", "--json"]));
    let keys: Vec<&str> =
        found["differences"].as_array().unwrap().iter().map(|entry| entry["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["hypervisor.qemu.default_memory", "runtime.uid_range"]);
    let config = host.config();
    let same = host.output([Path::new("config"), Path::new("diff"), &config, &config]);
    assert!(stdout(&same).contains("the same effect"), "{}", stdout(&same));
}

#[test]
fn a_migrated_file_of_upstreams_makes_a_pod() {
    let Some(host) = Host::new() else { return };
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kata-config/tests/corpus/rust");
    let old = corpus.join("configuration-qemu-runtime-rs.toml");
    let new = host.scratch("ours.toml");
    let migrate = host.output([Path::new("config"), Path::new("migrate"), Path::new("--output"), &new, &old]);
    assert!(migrate.status.success(), "{}", stderr(&migrate));
    for told in [
        "dropped  hypervisor.qemu.queue_size",
        "dropped  hypervisor.qemu.virtio_fs_daemon",
        "dropped  hypervisor.qemu.image",
        "kept     runtime.disable_guest_seccomp",
    ] {
        assert!(stderr(&migrate).contains(told), "{told}: {}", stderr(&migrate));
    }
    let validate = host.output([Path::new("config"), Path::new("validate"), &new]);
    assert!(!stdout(&validate).contains("note"), "{}", stdout(&validate));
    host.configure(&std::fs::read_to_string(&new).unwrap());
    assert_eq!(stdout(&host.sh(&[], "echo up")), "up\n");
    let lossy = host.output([
        Path::new("config"),
        Path::new("migrate"),
        &corpus.join("configuration-qemu-snp-runtime-rs.toml"),
    ]);
    assert_eq!(lossy.status.code(), Some(1));
    assert!(stderr(&lossy).contains("lost     hypervisor.qemu.kernel_verity_params"), "{}", stderr(&lossy));
}
