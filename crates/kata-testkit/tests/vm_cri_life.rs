//! How containers of a CRI pod end, are measured and are limited.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use kata_testkit::containerd::Version;
use kata_testkit::cri::{Code, Container, Cri, api};
use kata_testkit::with_each_cri;

with_each_cri!(container_ends_as_it_is_asked_to, figures_of_containers_pods_and_images_are_told);

fn v2(test: fn(&mut Cri)) {
    kata_testkit::cri::with(Version::V2, test);
}

fn container_ends_as_it_is_asked_to(cri: &mut Cri) {
    let pod = cri.pod("ends").run();
    let graceful = "trap 'echo leaving; exit 3' TERM; echo up; while :; do sleep 1; done";
    let graceful = pod.container("graceful").sh(graceful).start();
    let stubborn = pod.container("stubborn").sh("trap '' TERM; echo up; while :; do sleep 1; done").start();
    for container in [&graceful, &stubborn] {
        container.wait_for_log("up\n");
    }
    graceful.stop(30);
    graceful.wait_for_log("leaving\n");
    assert_eq!((graceful.status().exit_code, graceful.log()), (3, "up\nleaving\n".into()));
    let begin = Instant::now();
    stubborn.stop(2);
    assert!(begin.elapsed() >= Duration::from_secs(2), "it had its time");
    assert_eq!(stubborn.status().exit_code, 137);
    // A probe that takes too long is ended, and not only given up.
    let main = pod.container("main").idle().start();
    let late = main.try_exec(&["sleep", "777"], 1).unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late:?}");
    main.until("! ps | grep '[s]leep 777'");
    assert_eq!(main.try_exec(&["true"], 20).unwrap().code, 0);
    // A command that is not there is no fault of the runtime's, and named.
    let unknown = main.try_exec(&["no-such-command"], 0).unwrap_err();
    assert!(unknown.message().contains("no-such-command"), "{unknown:?}");
    pod.remove();
}

/// Waits for figures that are not the first: some are told only by comparison.
fn cpu_of(container: &Container<'_>) -> u64 {
    container.stats().cpu.usage_core_nano_seconds.value
}

fn figures_of_containers_pods_and_images_are_told(cri: &mut Cri) {
    let pod = cri.pod("figures").label("app", "figures").run();
    let busy = pod.container("busy").label("tier", "back");
    let busy = busy.sh("head -c 30000000 /dev/zero > /dev/shm/fill; while :; do :; done").start();
    let idle = pod.container("idle").idle().start();
    let begin = cpu_of(&busy);
    let used = |container: &Container<'_>| container.stats().memory.working_set_bytes.value;
    cri.host().wait_for("memory to be used", || (used(&busy) > 30_000_000).then_some(()));
    cri.host().wait_for("time to be used", || (cpu_of(&busy) > begin + 300_000_000).then_some(()));
    assert!(used(&idle) < 10_000_000 && cpu_of(&idle) < cpu_of(&busy));
    let stats = busy.stats();
    assert_eq!(stats.attributes.metadata.name, "busy");
    assert_eq!(stats.attributes.labels["tier"], "back");
    let listed = |filter: api::ContainerStatsFilter| -> Vec<String> {
        let mut request = api::ListContainerStatsRequest::new();
        request.filter = Some(filter).into();
        let answer: api::ListContainerStatsResponse =
            cri.client().runtime("ListContainerStats", request).unwrap();
        let mut names: Vec<String> =
            answer.stats.into_iter().map(|stats| stats.attributes.metadata.name.clone()).collect();
        names.sort();
        names
    };
    assert_eq!(listed(api::ContainerStatsFilter::new()), ["busy", "idle"]);
    let of_pod = api::ContainerStatsFilter { pod_sandbox_id: pod.id().to_owned(), ..Default::default() };
    assert_eq!(listed(of_pod), ["busy", "idle"]);
    let by_id = api::ContainerStatsFilter { id: idle.id().to_owned(), ..Default::default() };
    assert_eq!(listed(by_id), ["idle"]);
    // Of the whole pod: what the node's metrics are made of.
    let whole = pod.stats();
    match cri.containerd().version() {
        Version::V1 if whole.is_err() => {}
        _ => {
            let whole = whole.unwrap();
            assert_eq!(whole.linux.containers.len(), 2);
            assert_eq!(whole.attributes.labels["app"], "figures");
        }
    }
    let answer: api::ImageFsInfoResponse =
        cri.client().image("ImageFsInfo", api::ImageFsInfoRequest::new()).unwrap();
    assert!(!answer.image_filesystems[0].fs_id.mountpoint.is_empty());
    pod.remove();
}

#[test]
fn container_out_of_memory_is_told_as_such_and_the_pod_lives() {
    v2(|cri| {
        let pod = cri.pod("oom").run();
        let other = pod.container("other").idle().start();
        let greedy =
            pod.container("greedy").limits(48, 1000).command(&["tail", "-c", "200000000", "/dev/zero"]);
        let greedy = greedy.start();
        assert_eq!(greedy.wait().exit_code, 137);
        // The reason goes its own way, and may come after the end.
        let told = || (greedy.status().reason == "OOMKilled").then_some(());
        cri.host().wait_for("the reason", told);
        assert!(pod.is_ready());
        assert_eq!(other.sh("echo alive").text(), "alive\n");
        pod.remove();
    });
}

#[test]
fn limits_of_a_running_container_are_changed_and_act() {
    v2(|cri| {
        let pod = cri.pod("limits").run();
        let main = pod.container("main").limits(64, 500).idle().start();
        let group = |file: &str| main.sh(&format!("cat /sys/fs/cgroup/{file}")).text();
        assert_eq!((group("memory.max"), group("cpu.max")), ("67108864\n".into(), "50000 100000\n".into()));
        let updated = main.try_update(|resources| {
            resources.memory_limit_in_bytes = 96 << 20;
            resources.cpu_quota = 25_000;
            resources.cpu_period = 100_000;
        });
        updated.unwrap();
        assert_eq!((group("memory.max"), group("cpu.max")), ("100663296\n".into(), "25000 100000\n".into()));
        pod.remove();
    });
}

#[test]
fn log_is_written_on_in_a_new_file_when_it_was_moved_away() {
    v2(|cri| {
        let pod = cri.pod("logs").run();
        let script = "n=0; while :; do echo line $n; n=$((n+1)); sleep 0.1; done";
        let main = pod.container("main").sh(script).start();
        main.wait_for_log("line 3\n");
        let old = main.log_file().with_extension("old");
        std::fs::rename(main.log_file(), &old).unwrap();
        main.reopen_log();
        cri.host().wait_for("the new file", || main.log().lines().nth(3).map(drop));
        // No line is lost and none is told twice.
        main.stop(0);
        let text = |path: &std::path::Path| std::fs::read_to_string(path).unwrap();
        let whole = text(&old) + &text(main.log_file());
        for (n, line) in whole.lines().enumerate() {
            assert!(line.ends_with(&format!(" stdout F line {n}")), "{n}: {line}");
        }
        // A line that is longer than the log's lines may be comes in parts.
        let long = pod.container("long").sh("head -c 40000 /dev/zero | tr '\\0' x; echo; echo end").run();
        assert_eq!(long.stdout, "x".repeat(40_000) + "\nend\n");
        pod.remove();
    });
}
