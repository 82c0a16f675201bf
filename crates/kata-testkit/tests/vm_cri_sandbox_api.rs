//! Pods that containerd has the runtime make (`sandboxer = "shim"`): there before their first container and after the last.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use kata_testkit::containerd::{Containerd, Version, send};
use kata_testkit::cri::{Cri, Pod, PodPlan, api, handler};
use kata_testkit::driver::Driver;
use kata_testkit::host::patience;
use rustix::process::Signal;

/// How long the death of a machine may go unnoticed at most.
const NOTICED: Duration = Duration::from_secs(60);

fn with(test: fn(&mut Cri)) {
    let shim = |host: &kata_testkit::host::Host| {
        let runtime = host.program("containerd-shim-kata-v2");
        handler(Version::V2, "shim", runtime.to_str().unwrap(), "sandboxer = \"shim\"\n")
    };
    if let Some(mut cri) = Cri::with_handlers(Version::V2, shim) {
        test(&mut cri);
    }
}

fn pod<'a>(cri: &'a Cri, name: &str) -> PodPlan<'a> {
    cri.pod(name).handler("shim")
}

fn nothing_remains(cri: &Cri) {
    assert_eq!(cri.containerd().leftovers(), Vec::<String>::new());
}

/// The containers that the owner has.
fn containers(pod: &Pod<'_>) -> Vec<String> {
    let told = pod.cri().host().output(["inspect", pod.id()]);
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
    let containers = told["containers"].as_array().unwrap();
    containers.iter().map(|container| container["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn pod_has_no_container_of_its_own_and_outlives_those_it_gets() {
    with(|cri| {
        let pod = pod(cri, "bare").hostname("www").sysctl("net.core.somaxconn", "512").with(|config| {
            let dns = config.dns_config.mut_or_insert_default();
            dns.servers.push("192.0.2.53".into());
            dns.searches.push("a.example".into());
        });
        let pod = pod.run();
        assert!(pod.is_ready());
        assert_eq!(containers(&pod), [""; 0]);
        // The end of the only container is not the pod's.
        let first = pod.container("first").sh("exit 3").start();
        assert_eq!(first.wait().exit_code, 3);
        first.remove();
        assert!(pod.is_ready());
        assert_eq!(containers(&pod), [""; 0]);
        // What a pause container would have brought is there.
        let main = pod.container("main").idle().start();
        assert_eq!(containers(&pod), [main.id()]);
        let address = pod.address();
        assert!(main.sh("ip address show dev eth0").text().contains(&format!("inet {address}/")));
        main.until("ping -c 1 -W 10 10.89.0.1");
        assert_eq!(main.sh("hostname; cat /etc/hostname").text(), "www\nwww\n");
        assert_eq!(main.sh("cat /etc/resolv.conf").text(), "search a.example\nnameserver 192.0.2.53\n");
        assert_eq!(main.sh("cat /proc/sys/net/core/somaxconn").text(), "512\n");
        let side = pod.container("side").idle().start();
        main.sh("echo shared > /dev/shm/word");
        assert_eq!(side.sh("cat /dev/shm/word").text(), "shared\n");
        pod.stop();
        assert!(!pod.is_ready());
        pod.remove();
        nothing_remains(cri);
    });
}

#[test]
fn pod_outlives_containerd_and_a_dead_machine_is_told_with_the_reason() {
    with(|cri| {
        for down in [Containerd::kill, Containerd::stop] {
            let id = pod(cri, "lasting").run().id().to_owned();
            down(cri.containerd_mut());
            cri.containerd_mut().start();
            // It serves a moment before it knows its pods.
            let list = || {
                let request = api::ListPodSandboxRequest::new();
                cri.client().runtime::<_, api::ListPodSandboxResponse>("ListPodSandbox", request).ok()
            };
            let listed = cri.host().wait_for("the CRI to serve", list);
            assert!(listed.items.iter().any(|pod| pod.id == id));
            let ready = status(cri, &id, false);
            assert_eq!(ready.status.state, api::PodSandboxState::SANDBOX_READY.into());
            remove(cri, &id);
        }
        let pod = pod(cri, "dies").run();
        let main = pod.container("main").idle().start();
        let begin = Instant::now();
        let machines = cri.host().pids_of(Driver::under_test().program());
        machines.iter().for_each(|pid| send(*pid, Signal::KILL));
        assert_eq!(main.wait().exit_code, 255);
        cri.host().wait_for("the pod not to be ready", || (!pod.is_ready()).then_some(()));
        assert!(begin.elapsed() < patience(NOTICED), "{:?}", begin.elapsed());
        let told = status(cri, pod.id(), true);
        assert!(told.info["fault"].contains("killed by signal 9"), "{:?}", told.info);
        pod.remove();
        nothing_remains(cri);
    });
}

#[test]
fn what_a_pod_without_first_container_cannot_have_is_refused() {
    with(|cri| {
        let shared = pod(cri, "shared").shared_pids().try_run().err().unwrap();
        assert!(shared.message().contains("shareProcessNamespace"), "{shared:?}");
        nothing_remains(cri);
    });
}

fn status(cri: &Cri, id: &str, verbose: bool) -> api::PodSandboxStatusResponse {
    let request =
        api::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose, ..Default::default() };
    cri.client().runtime("PodSandboxStatus", request).unwrap()
}

fn remove(cri: &Cri, id: &str) {
    let stop = api::StopPodSandboxRequest { pod_sandbox_id: id.to_owned(), ..Default::default() };
    cri.client().runtime::<_, api::Nothing>("StopPodSandbox", stop).unwrap();
    let remove = api::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned(), ..Default::default() };
    cri.client().runtime::<_, api::Nothing>("RemovePodSandbox", remove).unwrap();
}
