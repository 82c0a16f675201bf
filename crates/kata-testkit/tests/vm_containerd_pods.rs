//! Further containers of a pod, and the configuration that a runtime's options name, against both containerds.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::os::unix::net::UnixStream;

use kata_testkit::containerd::Containerd;
use kata_testkit::driver::Driver;
use kata_testkit::host::{stderr, stdout};
use kata_testkit::with_each_containerd;

with_each_containerd!(
    further_container_joins_the_pods_owner_and_machine,
    bundle_has_the_owners_address,
    pod_takes_its_containers_along,
    container_of_a_pod_that_is_not_there_is_refused_by_name,
    configuration_that_the_options_name_is_used,
    wrong_configuration_is_told_to_the_client_with_key_and_line,
);

const IDLE: &str = "exec sleep 1000";
const SANDBOX: &str = "io.kubernetes.cri.container-type=sandbox";
const CONTAINER: &str = "io.kubernetes.cri.container-type=container";

/// Starts a container of pod `pod`, as Kubernetes marks them; the pod's first has its name.
fn of_pod(rig: &Containerd, id: &str) {
    let kind = if id == "pod" { SANDBOX } else { CONTAINER };
    rig.detached(&["--annotation", kind, "--annotation", "io.kubernetes.cri.sandbox-id=pod"], id, IDLE);
}

fn further_container_joins_the_pods_owner_and_machine(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    of_pod(rig, "pod");
    of_pod(rig, "side");
    for part in [Driver::under_test().program(), "containerd-shim"] {
        assert_eq!(rig.host().pids_of(part).len(), 1, "one {part} for both");
    }
    // One kernel, the namespaces that a pod shares, and those that are a container's own.
    let look = |id: &str, what: &str| stdout(&rig.exec(id, "look", what));
    for shared in
        ["cat /proc/sys/kernel/random/boot_id", "readlink /proc/self/ns/ipc", "readlink /proc/self/ns/uts"]
    {
        assert_eq!(look("pod", shared), look("side", shared), "{shared}");
    }
    for own in ["readlink /proc/self/ns/mnt", "readlink /proc/self/ns/pid"] {
        assert_ne!(look("pod", own), look("side", own), "{own}");
    }
    // It goes without the pod, and may come back.
    rig.remove("side");
    assert!(!rig.bundle("side").exists());
    assert_eq!(rig.status("pod").as_deref(), Some("RUNNING"));
    of_pod(rig, "side");
    assert_eq!(look("side", "echo back"), "back\n");
    rig.remove("side");
    rig.remove("pod");
}

fn bundle_has_the_owners_address(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    of_pod(rig, "pod");
    of_pod(rig, "side");
    let address = |id: &str| std::fs::read_to_string(rig.bundle(id).join("address")).unwrap();
    assert_eq!(address("pod"), address("side"));
    let socket = address("pod");
    UnixStream::connect(socket.strip_prefix("unix://").unwrap()).unwrap();
    rig.remove("side");
    rig.remove("pod");
}

fn pod_takes_its_containers_along(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    of_pod(rig, "pod");
    of_pod(rig, "side");
    rig.ok(["task", "kill", "--signal", "KILL", "pod"]);
    for id in ["pod", "side"] {
        rig.host().wait_for("both to end", || (rig.status(id).as_deref() == Some("STOPPED")).then_some(()));
    }
    rig.remove("side");
    rig.remove("pod");
}

fn container_of_a_pod_that_is_not_there_is_refused_by_name(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    let options = ["--annotation", CONTAINER, "--annotation", "io.kubernetes.cri.sandbox-id=elsewhere"];
    let output = rig.sh(&options, "orphan", "true");
    assert!(!output.status.success());
    assert!(stderr(&output).contains("elsewhere"), "{}", stderr(&output));
    assert_eq!(rig.ok(["task", "ls", "-q"]), "");
}

fn configuration_that_the_options_name_is_used(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    let memory = |output: std::process::Output| -> u64 {
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output).split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let look = "grep MemTotal /proc/meminfo";
    let usual = memory(rig.sh(&[], "usual", look));
    let file = rig.host().scratch("other.toml");
    rig.host().configure_at(&file, "[hypervisor.qemu]\ndefault_memory = 333\n");
    let other = memory(rig.sh(&["--runtime-config-path", file.to_str().unwrap()], "other", look));
    assert!(other != usual && (250_000..333 * 1024).contains(&other), "{usual} kB, then {other} kB");
}

fn wrong_configuration_is_told_to_the_client_with_key_and_line(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    let file = rig.host().scratch("wrong.toml");
    rig.host().configure_at(&file, "[hypervisor.qemu]\ndefault_memroy = 512\n");
    let output = rig.sh(&["--runtime-config-path", file.to_str().unwrap()], "wrong", "true");
    assert!(!output.status.success());
    let text = stderr(&output);
    // Its line in the file: two of this world and a heading are above it.
    for word in ["wrong.toml", "default_memroy", "default_memory", "4"] {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
    assert_eq!(rig.ok(["task", "ls", "-q"]), "");
}
