//! Whose processes a container sees: what the path of a pid namespace means.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod rig;

use kata_sandbox::{ContainerSpec, ErrorKind, ProcessId, Sandbox, Stdio};
use oci_spec::runtime::LinuxNamespaceType;
use rig::Rig;

/// A container that names the pid namespace of a process of the host, as the CRI does.
fn joins(rig: &Rig, id: &str) -> ContainerSpec {
    let mut container = rig.container(id, &["sleep"], Stdio::default());
    let linux = container.spec.linux_mut().as_mut().unwrap();
    let namespaces = linux.namespaces_mut().as_mut().unwrap().iter_mut();
    for namespace in namespaces.filter(|namespace| namespace.typ() == LinuxNamespaceType::Pid) {
        namespace.set_path(Some("/proc/4711/ns/pid".into()));
    }
    container
}

async fn run(pod: &Sandbox, container: ContainerSpec) {
    let id = ProcessId::init(&container.id);
    pod.create_container(container).await.unwrap();
    pod.start(&id).await.unwrap();
}

#[tokio::test]
async fn pods_first_further_container_says_whether_processes_are_shared() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    run(&pod, rig.container("pod", &["sleep"], Stdio::default())).await;
    run(&pod, joins(&rig, "one")).await;
    run(&pod, joins(&rig, "other")).await;
    run(&pod, rig.container("apart", &["sleep"], Stdio::default())).await;
    let created = rig.agent.created();
    let shared: Vec<bool> = created.iter().map(|request| request.sandbox_pidns).collect();
    assert_eq!(shared, [false, true, true, false]);
    let paths = created.iter().flat_map(|request| &request.oci.linux.namespaces);
    assert!(
        { paths }.all(|namespace| namespace.path.is_empty()),
        "the host's paths mean nothing in the guest"
    );
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn processes_that_cannot_be_told_apart_or_are_elsewhere_are_refused() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let refused = pod.create_container(joins(&rig, "pod")).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unimplemented);
    assert!(refused.chain().contains("another pod"), "{}", refused.chain());
    for id in ["pod", "one", "other"] {
        run(&pod, rig.container(id, &["sleep"], Stdio::default())).await;
    }
    let refused = pod.create_container(joins(&rig, "debugger")).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unimplemented);
    for word in ["/proc/4711/ns/pid", "2 containers", "shareProcessNamespace"] {
        assert!(refused.chain().contains(word), "no {word:?} in {}", refused.chain());
    }
    pod.shutdown().await.unwrap();
}
