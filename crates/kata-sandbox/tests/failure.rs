//! What goes wrong, what is said about it, and that nothing is left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::time::Duration;

use kata_api::ports;
use kata_hypervisor::VmExit;
use kata_sandbox::{ErrorKind, Event, Sandbox, SandboxError, State, Stdio};
use oci_spec::runtime::MountBuilder;
use rig::{Rig, init, soon};
use tokio::io::AsyncWriteExt;
use ttrpc::Code;

async fn failed_boot(rig: &Rig, pod: &Sandbox) -> String {
    let error = soon(pod.ready()).await.unwrap_err();
    assert!(matches!(error, SandboxError::Boot(_)), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
    assert_eq!(State::load(&rig.run_dir()).unwrap().fault.as_deref(), Some(error.chain().as_str()));
    error.chain()
}

#[tokio::test]
async fn machine_that_dies_while_booting_is_the_cause() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.launch().await.unwrap();
    while rig.vm.with_spec(|_| ()).is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    rig.vm.write_console("[    0.1] booting\n[    0.2] no init found\n");
    tokio::time::sleep(Duration::from_millis(20)).await;
    rig.vm.end(VmExit::Signal(11));
    assert_eq!(
        failed_boot(&rig, &pod).await,
        "cannot start the pod: the virtual machine ended while it booted: the VMM was killed by signal 11; \
         the guest's console ends with:\n  | [    0.1] booting\n  | [    0.2] no init found"
    );
}

#[tokio::test]
async fn pod_with_a_directly_attached_network_is_refused() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.runtime.dan_conf = rig.dir.path().join("dans");
    std::fs::create_dir(&rig.config.runtime.dan_conf).unwrap();
    // Another pod's is none of this one's business.
    std::fs::write(rig.config.runtime.dan_conf.join("other.json"), "{}").unwrap();
    rig.pod().await.shutdown().await.unwrap();
    let file = rig.config.runtime.dan_conf.join("pod.json");
    std::fs::write(&file, "{}").unwrap();
    let refused = rig.launch().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unimplemented);
    let text = refused.chain();
    assert!(text.contains(file.to_str().unwrap()) && text.contains("runtime.dan_conf"), "{text}");
    rig.assert_clean().await;
}

#[tokio::test]
async fn machine_that_cannot_be_started_is_the_cause() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.vm = rig.vm.clone().boot_fails("no such machine type");
    let pod = rig.launch().await.unwrap();
    let text = failed_boot(&rig, &pod).await;
    assert!(text.contains("the virtual machine cannot be started"), "{text}");
    assert!(text.contains("no such machine type"), "{text}");
}

#[tokio::test]
async fn daemon_that_dies_is_the_cause() {
    let Some(rig) = Rig::new().await else { return };
    let rig = rig.daemon("echo 'no user namespaces here' >&2; exit 3");
    let pod = rig.launch().await.unwrap();
    assert_eq!(
        failed_boot(&rig, &pod).await,
        "cannot start the pod: the virtio-fs daemon exited with code 3; its output ends with:\n  | no user namespaces here"
    );
}

#[tokio::test]
async fn agent_that_never_reports_is_told_with_the_console() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.agent.kata.reconnect_timeout_ms = 200;
    let pod = rig.launch().await.unwrap();
    rig.vm.write_console("agent: cannot mount cgroup2\n");
    let text = failed_boot(&rig, &pod).await;
    assert!(
        text.contains("its agent did not report within 200ms (agent.kata.reconnect_timeout_ms"),
        "{text}"
    );
    assert!(text.ends_with("\n  | agent: cannot mount cgroup2"), "{text}");
}

#[tokio::test]
async fn agent_that_refuses_the_sandbox_is_quoted() {
    let Some(rig) = Rig::new().await else { return };
    rig.agent.refuse("CreateSandbox", Code::INTERNAL, "cannot mount kataShared: EINVAL");
    let pod = rig.launch().await.unwrap();
    rig.announce().await;
    assert_eq!(
        failed_boot(&rig, &pod).await,
        "cannot start the pod: the agent refused to set up the sandbox: cannot mount kataShared: EINVAL"
    );
}

#[tokio::test]
async fn garbled_announcement_is_quoted() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.launch().await.unwrap();
    while rig.vm.with_spec(|_| ()).is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    rig.vm.dial(ports::READY).await.unwrap().write_all(b"hello\n").await.unwrap();
    let text = failed_boot(&rig, &pod).await;
    assert!(text.contains(r#""hello\n", which is no announcement"#), "{text}");
}

#[tokio::test]
async fn death_of_the_machine_ends_every_wait() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let mut events = pod.events();
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    let waiter = tokio::spawn({
        let pod = pod.clone();
        async move { pod.wait(&init()).await.unwrap() }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    rig.vm.end(VmExit::Signal(9));
    let exit = soon(waiter).await.unwrap();
    assert_eq!(exit.code, 255);

    let error = pod.create_container(rig.container("d", &["sleep"], Stdio::default())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().starts_with("the pod is dead: the VMM was killed by signal 9"), "{error}");
    loop {
        if let Event::Stopped { fault } = soon(events.recv()).await.unwrap() {
            assert!(fault.unwrap().starts_with("the VMM was killed by signal 9"));
            break;
        }
    }
    // Nobody asked for it, and still nothing is left.
    rig.assert_clean().await;
    assert_eq!(pod.delete(&init()).await.unwrap(), exit);
    soon(pod.shutdown()).await.unwrap();
}

#[tokio::test]
async fn agent_that_answers_no_more_is_dead_within_its_bound() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.agent.kata.health_timeout_ms = 3000;
    let rig = rig.daemon("exec /bin/sleep 600");
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(pod.inspect().await.state, "ready", "an agent that answers is left alone");
    rig.vm.write_console("rcu: stalled\n");
    rig.agent.hang_check();
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 255);
    assert_eq!(
        pod.inspect().await.fault.unwrap(),
        "the agent has not answered for 3s (agent.kata.health_timeout_ms); the guest's console ends with:\n  | rcu: stalled"
    );
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn daemon_that_is_stopped_is_named_within_its_bound() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.agent.kata.health_timeout_ms = 3000;
    // The idle daemon of these tests stops itself.
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 255);
    let fault = pod.inspect().await.fault.unwrap();
    assert!(fault.ends_with("(virtiofsd) has been stopped for 3s (agent.kata.health_timeout_ms)"), "{fault}");
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn death_of_the_agent_is_the_death_of_the_pod() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    rig.vm.write_console("agent: panicked\n");
    rig.agent.die();
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 255);
    let error = pod.stats("c").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the pod is dead: the guest's agent closed its connection while the machine runs on: it crashed; the guest's console ends with:\n  | agent: panicked"
    );
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn death_of_the_daemon_is_the_death_of_the_pod() {
    let Some(rig) = Rig::new().await else { return };
    let fire = rig.dir.path().join("fire");
    let script =
        format!("until [ -e {} ]; do sleep 0.02; done; echo 'disk on fire' >&2; exit 1", fire.display());
    let rig = rig.daemon(&script);
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    std::fs::write(fire, "").unwrap();
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 255);
    let fault = pod.inspect().await.fault.unwrap();
    assert_eq!(fault, "the virtio-fs daemon exited with code 1; its output ends with:\n  | disk on fire");
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn create_that_fails_half_way_leaves_no_mount() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let mut container = rig.container("c", &["sleep"], Stdio::default());
    let volume = |source: &str| {
        let mount = MountBuilder::default().destination("/data").typ("bind").source(source);
        mount.options(vec!["rbind".to_owned()]).build().unwrap()
    };
    container.spec.set_mounts(Some(vec![volume("/etc"), volume("/nowhere/at/all")]));
    let error = pod.create_container(container).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(
        error.chain(),
        "cannot prepare the files of container c: /nowhere/at/all does not exist on the host"
    );
    assert_eq!(rig.mounts(), [format!("mount {}", rig.run_dir().join("shared").display())]);
    assert!(!rig.run_dir().join("shared/c").exists());
    assert!(std::path::Path::new("/etc/passwd").exists());
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn create_that_takes_too_long_is_told_by_its_bound() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.agent.kata.create_container_timeout = 1;
    let pod = rig.pod().await;
    rig.agent.hang_create();
    let error =
        soon(pod.create_container(rig.container("c", &["sleep"], Stdio::default()))).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the guest's agent did not create container c within 1s: its files are large or slow, or the guest hangs; raise \
         agent.kata.create_container_timeout, or see the agent's log (agent.kata.enable_debug shows more)"
    );
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn shutdown_works_twice_at_once_and_again() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    let (first, second) = soon(async { tokio::join!(pod.shutdown(), pod.shutdown()) }).await;
    first.unwrap();
    second.unwrap();
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 137);
    let error = pod.start(&init()).await.unwrap_err();
    assert_eq!(error.to_string(), "the pod is dead: it was shut down");
}

#[tokio::test]
async fn shutdown_while_booting_and_creating_leaves_nothing() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.launch().await.unwrap();
    let create = tokio::spawn({
        let (pod, container) = (pod.clone(), rig.container("c", &["sleep"], Stdio::default()));
        async move { pod.create_container(container).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
    let error = soon(create).await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the pod is dead: it was shut down");
}

#[tokio::test]
async fn machine_that_will_not_stop_does_not_stop_the_teardown() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.vm = rig.vm.clone().stop_fails();
    let pod = rig.pod().await;
    soon(pod.shutdown()).await.unwrap();
    // The fake machine is no process that could be killed for it: end it by hand.
    rig.vm.end(VmExit::Stopped);
    rig.assert_clean().await;
}

#[test]
fn release_cleans_up_after_a_dead_owner() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (owner, after) = (runtime(), runtime());
    let Some(rig) = owner.block_on(Rig::new()) else { return };
    owner.block_on(async {
        let pod = rig.pod().await;
        pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    });
    // As if killed: no task of the owner runs on.
    owner.shutdown_background();
    assert!(rig.traces().iter().any(|trace| trace.starts_with("process ")), "{:?}", rig.traces());
    assert_eq!(rig.mounts().len(), 2);

    let error = after.block_on(rig.launch()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    let released = kata_sandbox::release(&rig.run_dir()).unwrap();
    assert_eq!((released.processes, released.mounts), (1, 2));
    // The fake machine's socket belongs to the machine, which is not a process here.
    let _ = std::fs::remove_file(rig.run_dir().join("kata.hvsock"));
    after.block_on(rig.assert_clean());
    assert_eq!(kata_sandbox::release(&rig.run_dir()).unwrap(), Default::default());
    assert_eq!(State::load(&rig.run_dir()).unwrap().state, "ready");
}
