//! Processors and memory: what a pod is promised, what its machine has, what it can use, and what becomes of it beyond.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use kata_testkit::containerd::{Containerd, Docker, Events, Version};
use kata_testkit::driver::Driver;
use kata_testkit::host::{stderr, stdout};

const IDLE: &str = "exec sleep 1000";
const MIB: u64 = 1 << 20;

/// Annotations of a pod's own container with limits that kubelet adds up.
fn pod(id: &str, quota: &str, memory: u64) -> Vec<String> {
    let annotations = [
        "container-type=sandbox".to_owned(),
        format!("sandbox-id={id}"),
        format!("sandbox-cpu-quota={quota}"),
        "sandbox-cpu-period=100000".to_owned(),
        format!("sandbox-memory={memory}"),
    ];
    annotated(&annotations)
}

fn container_of(pod: &str) -> Vec<String> {
    annotated(&["container-type=container".to_owned(), format!("sandbox-id={pod}")])
}

fn annotated(annotations: &[String]) -> Vec<String> {
    let option = |text: &String| ["--annotation".to_owned(), format!("io.kubernetes.cri.{text}")];
    annotations.iter().flat_map(option).collect()
}

fn strs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

fn rig(version: Version) -> Option<Containerd> {
    Containerd::new(version).filter(Containerd::has_machines)
}

/// Where a process is, by the first hierarchy's controller or the second.
fn cgroup_of(pid: u32, controller: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    place(&text, controller)
}

fn place(text: &str, controller: &str) -> String {
    let named =
        |line: &&str| line.split(':').nth(1).is_some_and(|it| it.split(',').any(|it| it == controller));
    let line = text.lines().find(named).or_else(|| text.lines().find(|line| line.starts_with("0::")));
    line.and_then(|line| line.splitn(3, ':').nth(2)).unwrap_or_default().to_owned()
}

/// A directory of the hierarchy that counts memory.
fn memory_cgroup(path: &str) -> PathBuf {
    let v1 = Path::new("/sys/fs/cgroup/memory");
    let root = if v1.is_dir() { v1 } else { Path::new("/sys/fs/cgroup") };
    root.join(path.trim_start_matches('/'))
}

fn vmm(rig: &Containerd) -> u32 {
    let found = rig.host().pids_of(Driver::under_test().program());
    assert_eq!(found.len(), 1, "{found:?}");
    found.first().copied().unwrap()
}

/// The guest's memory, in MiB.
fn memory_total(text: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with("MemTotal")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn a_small_pod_can_use_all_it_was_promised_in_its_own_cgroup() {
    let Some(rig) = rig(Version::V1) else { return };
    let events = Events::of(&rig);
    // A group that no other test has: the kernel counts kills by it.
    let group = format!("/kt-{}/pod1/small", std::process::id());
    let options = pod("small", "150000", 64 * MIB);
    rig.detached(&[&strs(&options)[..], &["--cgroup", &group]].concat(), "small", IDLE);
    let shown = stdout(&rig.exec("small", "look", "nproc; grep MemTotal /proc/meminfo"));
    // One and a half processors are two, as far as the host has them.
    let host = std::thread::available_parallelism().unwrap().get();
    assert_eq!(shown.lines().next(), Some(host.min(2).to_string().as_str()), "{shown}");
    // Not the default, and more than the limit.
    let total = memory_total(&shown);
    assert!((100..184).contains(&total), "{total} MiB");

    // All of the pod is in its cgroup, and the owner too.
    for name in [Driver::under_test().program(), "containerd-shim", "kata-virtiofsd", "kata-vmm"] {
        for pid in rig.host().pids_of(name) {
            assert_eq!(cgroup_of(pid, "memory"), group, "{name}");
        }
    }

    // What was promised can be used; what is beyond is the container's end, and not the pod's.
    let marks = container_of("small");
    let limited = [strs(&marks), vec!["--memory-limit", "67108864"]].concat();
    let uses = |id: &str, size: &str| {
        rig.sh(&limited, id, &format!("dd if=/dev/zero of=/dev/null bs={size} count=3 2>&1"))
    };
    let within = uses("within", "60M");
    assert!(within.status.success(), "{}{}", stdout(&within), stderr(&within));
    assert_eq!(uses("beyond", "80M").status.code(), Some(137));
    events.wait("/tasks/oom", "beyond");
    assert_eq!(rig.status("small").as_deref(), Some("RUNNING"));

    rig.remove("small");
    rig.host().wait_for("the cgroup to go", || (!memory_cgroup(&group).exists()).then_some(()));
    let above = memory_cgroup(&group).parent().unwrap().parent().unwrap().to_owned();
    rig.host().wait_for("those above to go", || (!above.exists()).then_some(()));
}

#[test]
fn a_machine_that_the_host_killed_for_memory_says_whose_limit_it_was() {
    let Some(rig) = rig(Version::V2) else { return };
    let top = format!("kt-tight-{}", std::process::id());
    let dir = memory_cgroup(&top);
    let Ok(()) = std::fs::create_dir(&dir) else {
        kata_testkit::skip("cgroups cannot be made here");
        return;
    };
    let file =
        ["memory.limit_in_bytes", "memory.max"].map(|name| dir.join(name)).into_iter().find(|it| it.exists());
    let Some(file) = file else {
        std::fs::remove_dir(&dir).unwrap();
        kata_testkit::skip("the host does not count memory by cgroup");
        return;
    };
    std::fs::write(file, (48 * MIB).to_string()).unwrap();
    let output = rig.sh(&["--cgroup", &format!("/{top}/tight")], "tight", "echo up");
    let text = stderr(&output);
    assert!(!output.status.success(), "{text}");
    for word in ["out-of-memory killer", &top, "48 MiB", "RuntimeClass", "overhead_memory"] {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
    // Nobody is surprised who reads the log.
    assert!(rig.log().contains("less memory than its machine"), "{}", rig.log());
    rig.host().wait_for("the cgroup to go", || (!dir.join("tight").exists()).then_some(()));
    std::fs::remove_dir(&dir).unwrap();
}

#[test]
fn virtual_processors_are_pinned_and_apart_from_the_rest_where_that_is_asked_for() {
    let Some(rig) = rig(Version::V2) else { return };
    rig.host().configure("[hypervisor.qemu]\ndefault_memory = 256\n[runtime]\nsandbox_cgroup_only = false\nenable_vcpus_pinning = true\n");
    let group = format!("/kt-apart-{}/pinned", std::process::id());
    rig.detached(&["--cgroup", &group, "--cpuset-cpus", "0"], "pinned", IDLE);
    let machine = vmm(&rig);
    assert_eq!(
        cgroup_of(machine, "memory"),
        if Path::new("/sys/fs/cgroup/memory").is_dir() {
            "/kata_overhead/pinned".to_owned()
        } else {
            group.clone()
        }
    );
    for name in ["containerd-shim", "kata-virtiofsd", "kata-vmm"] {
        for pid in rig.host().pids_of(name).into_iter().filter(|pid| *pid != machine) {
            assert_eq!(cgroup_of(pid, "memory"), "/kata_overhead/pinned", "{name}");
        }
    }
    let apart: Vec<String> = std::fs::read_dir(format!("/proc/{machine}/task"))
        .unwrap()
        .flatten()
        .map(|task| task.path())
        // A thread may end while it is looked at; not a processor's.
        .filter_map(|task| {
            let [cgroup, status] = ["cgroup", "status"].map(|file| std::fs::read_to_string(task.join(file)));
            (place(&cgroup.ok()?, "cpuset") == group).then_some(status.ok()?)
        })
        .collect();
    assert!(!apart.is_empty(), "no virtual processor is in the pod's cgroup");
    for status in &apart {
        assert!(status.lines().any(|line| line == "Cpus_allowed_list:\t0"), "{status}");
    }
    rig.remove("pinned");
    assert!(!Path::new("/sys/fs/cgroup/cpuset/kata_overhead/pinned").exists());
}

#[test]
fn a_machine_grows_with_its_containers_and_with_their_updates() {
    let Some(docker) = Docker::new().filter(|docker| docker.containerd().has_machines()) else { return };
    let text = "[hypervisor.qemu]\ndefault_memory = 256\n[runtime]\nstatic_sandbox_resource_mgmt = false\n";
    docker.containerd().host().configure(text);
    docker.detached(&["--memory", "300m", "--cpus", "1"], "box", IDLE);
    let look = || docker.ok(["exec", "box", "sh", "-c", "nproc; grep MemTotal /proc/meminfo"]);
    let first = look();
    assert!(first.starts_with("1\n"), "{first}");
    let small = memory_total(&first);
    assert!(small > 330, "it has grown for the container's limit: {small} MiB");

    let host = std::thread::available_parallelism().unwrap().get();
    let cpus = host.min(2).to_string();
    docker.ok(["update", "--memory", "600m", "--memory-swap", "600m", "--cpus", &cpus, "box"]);
    let second = look();
    assert!(second.starts_with(&format!("{cpus}\n")), "{second}");
    assert!(memory_total(&second) > small + 200, "{first}{second}");
    // The new memory holds what is put there, and files still come through the file server, which had to hear of it.
    let used = docker.ok([
        "exec",
        "box",
        "sh",
        "-c",
        "dd if=/dev/zero of=/dev/null bs=550M count=1 2>&1; md5sum < /bin/busybox; md5sum /bin/busybox",
    ]);
    let sums: Vec<&str> = used
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|sum| sum.len() == 32)
        .collect();
    assert!(matches!(sums.as_slice(), [one, two] if one == two), "{used}");

    // Down again: processors go back to the host, as far as the guest lets go; memory stays.
    docker.ok(["update", "--cpus", "1", "box"]);
    assert!(look().starts_with("1\n"), "{}", look());
    docker.ok(["rm", "--force", "box"]);
}

#[test]
fn a_machine_of_fixed_size_refuses_what_it_cannot_give_and_says_which_key_does() {
    let Some(docker) = Docker::new().filter(|docker| docker.containerd().has_machines()) else { return };
    docker.detached(&["--memory", "64m"], "box", IDLE);
    let refused = docker.output(["update", "--memory", "2g", "--memory-swap", "2g", "box"]);
    assert!(!refused.status.success());
    assert!(stderr(&refused).contains("static_sandbox_resource_mgmt"), "{}", stderr(&refused));
    docker.ok(["update", "--memory", "48m", "--memory-swap", "48m", "box"]);
    docker.ok(["rm", "--force", "box"]);
    // Nor does it begin with more than there is.
    docker.containerd().host().configure("[hypervisor.qemu]\ndefault_maxmemory = 512\n");
    let large = docker.run(&["--rm", "--memory", "1g", "busybox", "true"]);
    assert!(!large.status.success());
    for word in ["default_maxmemory", "overhead_memory"] {
        assert!(stderr(&large).contains(word), "{}", stderr(&large));
    }
}
