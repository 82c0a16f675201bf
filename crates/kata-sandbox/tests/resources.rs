//! A pod's processors and memory, over a fake machine and a fake agent.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::time::Duration;

use kata_hypervisor::{Growth, Size};
use kata_sandbox::{ContainerSpec, ErrorKind, ProcessId, ResourceSpec, Stdio};
use oci_spec::runtime::{
    LinuxBuilder, LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResources, LinuxResourcesBuilder, Spec,
};
use rig::Rig;

fn memory(mib: i64) -> LinuxResources {
    let memory = LinuxMemoryBuilder::default().limit(mib << 20).build().unwrap();
    LinuxResourcesBuilder::default().memory(memory).build().unwrap()
}

/// A container with a limit of memory.
fn limited(rig: &Rig, id: &str, mib: i64) -> ContainerSpec {
    let mut container = rig.container(id, &["sleep"], Stdio::default());
    let linux = LinuxBuilder::default().resources(memory(mib)).build().unwrap();
    container.spec.set_linux(Some(linux));
    container
}

#[tokio::test]
async fn the_machine_boots_with_what_the_pod_was_promised_and_keeps_it() {
    let Some(mut rig) = Rig::new().await else { return };
    let text = r#"{"ociVersion":"1.1.0","annotations":{"io.kubernetes.cri.container-type":"sandbox",
        "io.kubernetes.cri.sandbox-memory":"67108864"}}"#;
    rig.resources = ResourceSpec::of(&serde_json::from_str::<Spec>(text).unwrap()).unwrap();
    let pod = rig.pod().await;
    assert_eq!(rig.vm.with_spec(|spec| (spec.vcpus, spec.memory_mib, spec.growth)), Some((1, 184, None)));
    pod.create_container(limited(&rig, "c", 64)).await.unwrap();
    // Within what it has an update is the guest's business, beyond it nobody's.
    pod.update("c", memory(96)).await.unwrap();
    let refused = pod.update("c", memory(1024)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);
    assert!(refused.chain().contains("static_sandbox_resource_mgmt"), "{}", refused.chain());
    assert_eq!(rig.agent.calls().iter().filter(|call| *call == "UpdateContainer").count(), 1);
    assert_eq!(rig.vm.size(), None);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_machine_that_grows_has_room_before_the_guest_is_asked_for_the_container() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.runtime.static_sandbox_resource_mgmt = false;
    rig.config.hypervisor.qemu.default_memory = 256;
    rig.config.hypervisor.qemu.default_maxmemory = 2048;
    let pod = rig.pod().await;
    let growth = rig.vm.with_spec(|spec| spec.growth).unwrap().unwrap();
    assert_eq!(growth, Growth { memory_mib: 2048, slots: 10, ..growth });
    // 64 MiB fit into what is there.
    pod.create_container(limited(&rig, "small", 64)).await.unwrap();
    assert_eq!(rig.vm.size(), None);
    // In blocks of the guest's: 64 and 512 take 717 MiB.
    pod.create_container(limited(&rig, "large", 512)).await.unwrap();
    assert_eq!(rig.vm.size(), Some(Size { vcpus: 1, memory_mib: 256 + 4 * 128 }));
    let calls = rig.agent.calls();
    let at = |name: &str| calls.iter().rposition(|call| call == name).unwrap();
    assert!(at("OnlineCPUMem") < at("CreateContainer"), "{calls:?}");
    // Beyond the bound nothing is made, and what was refused does not count.
    let refused = pod.create_container(limited(&rig, "huge", 4096)).await.unwrap_err();
    assert!(refused.chain().contains("default_maxmemory"), "{}", refused.chain());
    pod.create_container(limited(&rig, "tiny", 8)).await.unwrap();
    pod.update("large", memory(800)).await.unwrap();
    assert_eq!(rig.vm.size().unwrap().memory_mib, 256 + 7 * 128);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_container_that_is_killed_while_the_machine_grows_leaves_it_grown() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.runtime.static_sandbox_resource_mgmt = false;
    rig.config.hypervisor.qemu.default_memory = 256;
    rig.config.hypervisor.qemu.default_maxmemory = 2048;
    let pod = rig.pod().await;
    rig.vm.resize_takes(Duration::from_millis(300));
    let (making, container) = (pod.clone(), limited(&rig, "c", 512));
    let made = tokio::spawn(async move { making.create_container(container).await });
    while !rig.agent.calls().contains(&"GetGuestDetails".to_owned()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(rig.vm.size(), None);
    pod.kill(&ProcessId::init("c"), 9, false).await.unwrap();
    let error = made.await.unwrap().unwrap_err();
    assert!(error.chain().contains("killed"), "{}", error.chain());
    let grown = rig.vm.size();
    assert_ne!(grown, None);
    // It counts as grown: the next one needs no more.
    pod.create_container(limited(&rig, "d", 512)).await.unwrap();
    assert_eq!(rig.vm.size(), grown);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_change_that_the_guest_refuses_is_taken_back() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.hypervisor.qemu.default_memory = 256;
    let pod = rig.pod().await;
    pod.create_container(limited(&rig, "c", 64)).await.unwrap();
    rig.agent.refuse("UpdateContainer", ttrpc::Code::INTERNAL, "no");
    assert!(pod.update("c", memory(200)).await.is_err());
    rig.agent.relent();
    // Were the first still counted, this were no growth, and not refused.
    assert!(pod.update("c", memory(300)).await.is_err());
    pod.update("c", memory(100)).await.unwrap();
    pod.shutdown().await.unwrap();
}

/// A container that may run on these CPUs of the host alone.
fn bound_to(rig: &Rig, id: &str, cpus: &str) -> ContainerSpec {
    let mut container = rig.container(id, &["sleep"], Stdio::default());
    let linux = LinuxBuilder::default().resources(on_cpus(cpus)).build().unwrap();
    container.spec.set_linux(Some(linux));
    container
}

fn on_cpus(cpus: &str) -> LinuxResources {
    let cpu = LinuxCpuBuilder::default().cpus(cpus).build().unwrap();
    LinuxResourcesBuilder::default().cpu(cpu).build().unwrap()
}

/// What is in `cpuset.cpus` of the cgroup at `path`, under either version; `None` where this host has none.
fn cpus_of(path: &str) -> Option<String> {
    let roots = ["/sys/fs/cgroup/cpuset", "/sys/fs/cgroup"];
    let file = roots.map(|root| format!("{root}{path}/cpuset.cpus"));
    file.iter().find_map(|file| std::fs::read_to_string(file).ok()).map(|text| text.trim().to_owned())
}

#[tokio::test]
async fn a_pod_is_as_wide_as_before_once_a_container_bound_to_cpus_has_left() {
    let Some(mut rig) = Rig::new().await else { return };
    let path = format!("/kata-test-{}/pod", std::process::id());
    let text = format!(
        r#"{{"ociVersion":"1.1.0","linux":{{"cgroupsPath":"{path}"}},
        "annotations":{{"io.kubernetes.cri.container-type":"sandbox"}}}}"#
    );
    rig.resources = ResourceSpec::of(&serde_json::from_str::<Spec>(&text).unwrap()).unwrap();
    let pod = rig.pod().await;
    let Some(before) = cpus_of(&path) else {
        kata_testkit::skip("the host has no cgroup controller for CPUs");
        return pod.shutdown().await.unwrap();
    };
    pod.create_container(bound_to(&rig, "bound", "0")).await.unwrap();
    assert_eq!(cpus_of(&path).unwrap(), "0");
    // One that may run anywhere has the pod run anywhere.
    pod.create_container(rig.container("free", &["sleep"], Stdio::default())).await.unwrap();
    assert_eq!(cpus_of(&path).unwrap(), before);
    pod.delete(&ProcessId::init("free")).await.unwrap();
    assert_eq!(cpus_of(&path).unwrap(), "0");
    // What the guest refuses changes nothing.
    rig.agent.refuse("UpdateContainer", ttrpc::Code::INTERNAL, "no");
    pod.update("bound", on_cpus("0-1")).await.unwrap_err();
    rig.agent.relent();
    assert_eq!(cpus_of(&path).unwrap(), "0");
    pod.delete(&ProcessId::init("bound")).await.unwrap();
    assert_eq!(cpus_of(&path).unwrap(), before);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn limits_of_a_container_that_counts_for_nothing_are_not_found() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.runtime.static_sandbox_resource_mgmt = false;
    rig.config.hypervisor.qemu.default_maxmemory = 2048;
    let pod = rig.pod().await;
    let mut pause = rig.container("pause", &["sleep"], Stdio::default());
    let mark = ("io.kubernetes.cri.container-type".to_owned(), "sandbox".to_owned());
    pause.spec.set_annotations(Some([mark].into()));
    pod.create_container(pause).await.unwrap();
    let refused = pod.update("pause", memory(1024)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    assert!(refused.chain().contains("stands for its pod"), "{}", refused.chain());
    assert!(!rig.agent.calls().contains(&"UpdateContainer".to_owned()));
    assert_eq!(rig.vm.size(), None);
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn what_the_guest_did_not_bring_to_use_it_is_asked_for_again() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.runtime.static_sandbox_resource_mgmt = false;
    rig.config.hypervisor.qemu.default_memory = 256;
    rig.config.hypervisor.qemu.default_maxmemory = 2048;
    let pod = rig.pod().await;
    rig.agent.refuse("OnlineCPUMem", ttrpc::Code::INTERNAL, "no");
    assert!(pod.create_container(limited(&rig, "first", 512)).await.is_err());
    // The machine has room by now, and its guest still does not use it.
    assert!(pod.create_container(limited(&rig, "second", 512)).await.is_err());
    rig.agent.relent();
    pod.create_container(limited(&rig, "third", 512)).await.unwrap();
    pod.shutdown().await.unwrap();
}
