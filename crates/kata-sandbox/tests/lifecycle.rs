//! A pod's ordinary life, over a fake machine and a fake agent.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::time::Duration;

use kata_sandbox::{ErrorKind, Event, ProcessId, State, Status, Stdio};
use rig::{Rig, init, process, soon};
use ttrpc::Code;

#[tokio::test]
async fn container_goes_from_create_to_delete() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let mut events = pod.events();

    pod.create_container(rig.container("c", &["exit", "3"], Stdio::default())).await.unwrap();
    assert_eq!(std::fs::read_to_string(rig.run_dir().join("shared/c/rootfs/who")).unwrap(), "c");
    assert_eq!(pod.state(&init()).await.unwrap().status, Status::Created);
    assert_eq!(pod.start(&init()).await.unwrap(), std::process::id());
    let exit = soon(pod.wait(&init())).await.unwrap();
    assert_eq!(exit.code, 3);
    assert_eq!(pod.state(&init()).await.unwrap().exit, Some(exit));
    assert_eq!(soon(pod.delete(&init())).await.unwrap(), exit);
    assert_eq!(pod.state(&init()).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!rig.run_dir().join("shared/c").exists());

    let request = rig.agent.created().remove(0);
    assert_eq!(request.oci.root.path, "/run/kata-containers/shared/containers/c/rootfs");
    assert_eq!(request.oci.linux.cgroups_path, "/c");
    let sandbox = rig.agent.sandbox().unwrap();
    assert_eq!((sandbox.hostname.as_str(), sandbox.storages[0].source.as_str()), ("pod", "kataShared"));
    for expected in [
        Event::Created { process: init() },
        Event::Started { process: init() },
        Event::Exited { process: init(), exit },
        Event::Deleted { process: init(), exit },
    ] {
        assert_eq!(soon(events.recv()).await.unwrap(), expected);
    }

    pod.shutdown().await.unwrap();
    assert_eq!(soon(events.recv()).await.unwrap(), Event::Stopped { fault: None });
    rig.assert_clean().await;
}

#[tokio::test]
async fn requests_wait_for_the_boot() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.launch().await.unwrap();
    let create = tokio::spawn({
        let (pod, container) = (pod.clone(), rig.container("c", &["exit", "0"], Stdio::default()));
        async move { pod.create_container(container).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!create.is_finished());
    assert_eq!(pod.inspect().await.state, "creating");
    rig.announce().await;
    soon(create).await.unwrap().unwrap();
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn agent_that_does_not_announce_is_dialled() {
    let Some(rig) = Rig::new().await else { return };
    let rig = rig.silent();
    let pod = rig.pod().await;
    assert_eq!(pod.inspect().await.agent_version, "0.0.0-fake");
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn kill_is_not_blocked_behind_a_hanging_create() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    rig.agent.hang_create();
    let create = tokio::spawn({
        let (pod, container) = (pod.clone(), rig.container("c", &["sleep"], Stdio::default()));
        async move { pod.create_container(container).await }
    });
    while !rig.agent.calls().contains(&"CreateContainer".to_owned()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let waiter = tokio::spawn({
        let pod = pod.clone();
        async move { pod.wait(&init()).await }
    });
    soon(pod.kill(&init(), 9, false)).await.unwrap();
    let error = soon(create).await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "container c was killed while it was being created");
    assert_eq!(soon(waiter).await.unwrap().unwrap().code, 137);
    assert_eq!(rig.mounts(), [format!("mount {}", rig.run_dir().join("shared").display())]);

    // The name is free again.
    rig.agent.relent();
    pod.create_container(rig.container("c", &["exit", "0"], Stdio::default())).await.unwrap();
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn delete_gives_up_a_hanging_create() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    rig.agent.hang_create();
    let create = tokio::spawn({
        let (pod, container) = (pod.clone(), rig.container("c", &["sleep"], Stdio::default()));
        async move { pod.create_container(container).await }
    });
    while rig.mounts().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(soon(pod.delete(&init())).await.unwrap().code, 137);
    soon(create).await.unwrap().unwrap_err();
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn two_waiters_get_the_same_exit() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    let waiters: Vec<_> = (0..2)
        .map(|_| {
            let pod = pod.clone();
            tokio::spawn(async move { pod.wait(&init()).await.unwrap() })
        })
        .collect();
    pod.start(&init()).await.unwrap();
    pod.kill(&init(), 15, false).await.unwrap();
    let mut exits = Vec::new();
    for waiter in waiters {
        exits.push(soon(waiter).await.unwrap());
    }
    assert_eq!(exits[0], exits[1]);
    assert_eq!(exits[0].code, 143);
    let error = pod.kill(&init(), 9, false).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::NotFound, "container c has ended already")
    );
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn delete_of_a_running_exec_is_refused() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    let exec = ProcessId::exec("c", "e");
    pod.exec("c", "e", process(&["sleep"]), Stdio::default()).await.unwrap();
    let again = pod.exec("c", "e", process(&["sleep"]), Stdio::default()).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists);
    pod.start(&exec).await.unwrap();
    assert_eq!(pod.pids("c").await.unwrap().len(), 2);

    assert_eq!(pod.delete(&exec).await.unwrap_err().kind(), ErrorKind::FailedPrecondition);
    pod.kill(&init(), 9, false).await.unwrap();
    soon(pod.wait(&init())).await.unwrap();
    let error = pod.delete(&init()).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot delete container c: exec e still runs");
    pod.kill(&exec, 9, false).await.unwrap();
    assert_eq!(soon(pod.wait(&exec)).await.unwrap().code, 137);
    pod.delete(&exec).await.unwrap();
    pod.delete(&init()).await.unwrap();
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn kill_all_reaches_execs_too() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    let exec = ProcessId::exec("c", "e");
    pod.exec("c", "e", process(&["sleep"]), Stdio::default()).await.unwrap();
    pod.start(&exec).await.unwrap();
    pod.kill(&init(), 9, true).await.unwrap();
    assert_eq!(soon(pod.wait(&exec)).await.unwrap().code, 137);
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 137);
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn unknown_command_is_not_found_and_leaves_nothing() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let error = pod.create_container(rig.container("c", &["nope"], Stdio::default())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        error.chain(),
        "the agent cannot create container c: command \"nope\" not found in PATH (/bin)"
    );
    assert_eq!(rig.mounts().len(), 1);

    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    let exec = ProcessId::exec("c", "e");
    pod.exec("c", "e", process(&["nope"]), Stdio::default()).await.unwrap();
    assert_eq!(pod.start(&exec).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(soon(pod.wait(&exec)).await.unwrap().code, 127);
    pod.delete(&exec).await.unwrap();
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn refused_start_keeps_its_class_and_the_container() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["exit", "0"], Stdio::default())).await.unwrap();
    rig.agent.refuse("StartContainer", Code::PERMISSION_DENIED, "/bin/x is not executable");
    let error = pod.start(&init()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert_eq!(pod.state(&init()).await.unwrap().status, Status::Created);
    rig.agent.relent();
    pod.start(&init()).await.unwrap();
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn pausing_follows_the_picture() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    assert_eq!(pod.pause("c").await.unwrap_err().to_string(), "cannot pause container c: it is created");
    pod.start(&init()).await.unwrap();
    pod.pause("c").await.unwrap();
    assert_eq!(pod.state(&init()).await.unwrap().status, Status::Paused);
    assert_eq!(pod.pause("c").await.unwrap_err().kind(), ErrorKind::FailedPrecondition);
    pod.resume("c").await.unwrap();
    assert_eq!(pod.state(&init()).await.unwrap().status, Status::Running);
    assert_eq!(pod.start(&init()).await.unwrap_err().to_string(), "cannot start container c: it is running");
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn state_file_tells_what_inspect_tells() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["exit", "5"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    soon(pod.wait(&init())).await.unwrap();
    let seen = pod.inspect().await;
    let kept = State::load(&rig.run_dir()).unwrap();
    assert_eq!((kept.state.as_str(), seen.state.as_str()), ("ready", "ready"));
    assert_eq!(kept.containers, seen.containers);
    assert_eq!(kept.containers[0].exit_code, Some(5));
    assert_eq!(kept.timeline, seen.timeline);
    assert_eq!((kept.hypervisor.as_str(), kept.accelerator.as_str()), ("qemu", "tcg"));
    assert_eq!((kept.agent_version.as_str(), kept.guest_kernel.as_str()), ("0.0.0-fake", "0.0.0-none"));
    let layers: Vec<_> = kept.timeline.iter().map(|stage| stage.layer.as_str()).collect();
    for layer in ["host", "vmm", "kernel", "agent", "container"] {
        assert!(layers.contains(&layer), "{layer} is missing in {:?}", kept.timeline);
    }
    pod.shutdown().await.unwrap();
    assert_eq!(State::load(&rig.run_dir()).unwrap().state, "stopped");
}

#[tokio::test]
async fn out_of_memory_is_told() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    let mut events = pod.events();
    // Events are kept for slow listeners: what a guest makes up must not fill them.
    rig.agent.oom("made up");
    rig.agent.oom("c");
    assert_eq!(soon(events.recv()).await.unwrap(), Event::Oom { container: "c".to_owned() });
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn evidence_is_for_who_asks_and_a_refusal_is_the_guests_own() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let found = pod.guest().unwrap().evidence(b"nonce".to_vec()).await.unwrap();
    assert_eq!((found.report.as_slice(), found.certificates.as_slice()), (&b"nonce"[..], &b"certs"[..]));
    assert_eq!(found.provider, "sev_guest", "without what a terminal would obey");
    rig.agent.refuse("GetEvidence", Code::UNIMPLEMENTED, "the guest has no hardware that reports");
    let error = pod.guest().unwrap().evidence(Vec::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unimplemented);
    assert!(error.chain().ends_with("the guest has no hardware that reports"), "{}", error.chain());
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn names_that_are_paths_are_refused() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let mut container = rig.container("c", &["sleep"], Stdio::default());
    container.id = "../c".to_owned();
    assert_eq!(pod.create_container(container).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn real_daemon_sees_containers_that_come_and_go_later() {
    let Some(rig) = Rig::new().await else { return };
    let Some(programs) = std::env::var_os("KATA_TEST_PROGRAMS") else {
        return kata_testkit::skip("KATA_TEST_PROGRAMS is not set: run `make test`");
    };
    let program = std::path::Path::new(&programs).join("kata-virtiofsd");
    let rig = rig.daemon(&format!("exec {} \"$@\"", program.display()));
    let pod = rig.pod().await;
    // The daemon's own view: its root is the share.
    let served = || {
        let processes = kata_testkit::leaks::processes(rig.dir.path(), &(0..0));
        processes.iter().any(|process| {
            let file = format!("/proc/{}/root/c/rootfs/who", process.pid);
            std::fs::read_to_string(file).is_ok_and(|text| text == "c")
        })
    };
    let until = async |wanted: bool| {
        while served() != wanted {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // So that the container really comes later.
    tokio::time::sleep(Duration::from_millis(200)).await;
    pod.create_container(rig.container("c", &["exit", "0"], Stdio::default())).await.unwrap();
    soon(until(true)).await;
    pod.start(&init()).await.unwrap();
    soon(pod.wait(&init())).await.unwrap();
    pod.delete(&init()).await.unwrap();
    soon(until(false)).await;
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}
