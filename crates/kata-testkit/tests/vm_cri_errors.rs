//! What a kubelet is told when something fails: which layer, why, and what to do about it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use kata_testkit::containerd::Version;
use kata_testkit::cri::{Code, Cri, Status};
use kata_testkit::driver::Driver;
use rustix::process::Signal;

fn v2(test: fn(&mut Cri)) {
    kata_testkit::cri::with(Version::V2, test);
}

/// The text says all of `words`, and is not one that nobody can act on.
#[track_caller]
fn tells(status: &Status, words: &[&str]) {
    let text = status.message();
    println!("{:?}: {text}", status.code());
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
    assert_ne!(status.code(), Code::DeadlineExceeded, "{text}");
    for bare in ["ttrpc: closed", "context deadline exceeded", "transport is closing"] {
        assert!(!text.contains(bare), "{text}");
    }
    let last = text.rsplit(": ").next().unwrap_or_default();
    assert_ne!(last.to_lowercase(), "timeout", "{text}");
}

#[test]
fn pod_that_cannot_start_says_what_is_missing() {
    v2(|cri| {
        let failure = |config: &str| {
            cri.host().configure(config);
            cri.pod("fails").try_run().err().unwrap()
        };
        tells(&failure("[hypervisor.qemu]\nkernel = \"/no/such/kernel\"\n"), &["kernel", "/no/such/kernel"]);
        tells(&failure("[hypervisor.qemu]\npath = \"/no/such/qemu\"\n"), &["path", "/no/such/qemu"]);
        tells(
            &failure("[hypervisor.qemu]\ndefault_memroy = 512\n"),
            &["configuration.toml", "default_memroy", "default_memory"],
        );
        tells(
            &failure("[hypervisor.qemu]\nkernel_params = \"panic=1 rdinit=/nothing\"\n"),
            &["booted", "kernel panicked"],
        );
        tells(&failure("[hypervisor.qemu]\ndefault_memory = 8000000\n"), &["memory"]);
        cri.host().configure("");
        let refused = cri.pod("fails").annotation("io.katacontainers.config.hypervisor.default_vcpus", "2");
        tells(&refused.try_run().err().unwrap(), &["default_vcpus", "enable_annotations"]);
        assert!(cri.pods().is_empty());
    });
}

#[test]
fn container_that_cannot_start_says_what_is_wrong_with_it() {
    v2(|cri| {
        let pod = cri.pod("pod").run();
        let missing = pod.container("c").command(&["no-such-command"]).try_start();
        tells(&missing.err().unwrap(), &["no-such-command", "not found"]);
        cri.image("docker.io/library/nothing:latest", |config| {
            config.as_object_mut().unwrap().remove("Cmd");
        });
        let empty =
            pod.container("empty").image("docker.io/library/nothing:latest").try_create().err().unwrap();
        tells(&empty, &["no command"]);
        let plain = pod.container("plain").command(&["/etc/passwd"]).try_start();
        tells(&plain.err().unwrap(), &["/etc/passwd", "ermission denied"]);
        let nowhere = pod
            .container("nowhere")
            .idle()
            .with(|config| "/etc/passwd/x".clone_into(&mut config.working_dir));
        tells(&nowhere.try_start().err().unwrap(), &["working directory", "/etc/passwd/x"]);
        let sysctl = cri.pod("sysctl").sysctl("vm.swappiness", "1").try_run().err().unwrap();
        tells(&sysctl, &["vm.swappiness"]);
        // None of them has left anything in the pod.
        let main = pod.container("main").idle().start();
        assert_eq!(main.sh("echo fine").text(), "fine\n");
        assert_eq!(cri.containers(), [main.id()]);
        pod.remove();
    });
}

#[test]
fn dead_pod_says_why_it_died() {
    v2(|cri| {
        let pod = cri.pod("pod").run();
        let main = pod.container("main").idle().start();
        let vmm = cri.host().pids_of(Driver::under_test().program())[0];
        kata_testkit::containerd::send(vmm, Signal::KILL);
        assert_eq!(main.wait().exit_code, 255);
        cri.host().wait_for("the pod not to be ready", || (!pod.is_ready()).then_some(()));
        let late = pod.container("late").idle().try_start().err().unwrap();
        // containerd asks nobody, for the pod's first container has ended; what the owner said is in its log.
        let of_containerd = ["not running", "can't find shim"];
        assert!(of_containerd.iter().any(|words| late.message().contains(words)), "{late:?}");
        for word in ["the pod failed", "the VMM was killed by signal 9"] {
            let told = || cri.containerd().log().contains(word).then_some(());
            cri.host().wait_for(&format!("{word:?} in containerd's log"), told);
        }
        tells(&main.try_exec(&["true"], 0).unwrap_err(), &["EXITED"]);
        pod.remove();
    });
}
