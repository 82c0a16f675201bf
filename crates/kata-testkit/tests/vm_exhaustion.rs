//! The host has no more of something: the error says of what, and nothing is left.
//!
//! Where it runs out decides who fails, so each test tries less and more of it, up to where a container runs.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use kata_testkit::containerd::{Containerd, IMAGE, Version};
use kata_testkit::host::{Host, stderr, stdout};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A container run by `client` with these words before it.
fn run_within(host: &Host, words: &[&str]) -> Output {
    let image = host.image();
    let mut command = Command::new(words[0]);
    host.enter(&mut command);
    command.args(&words[1..]).arg(host.program("kata-ctl"));
    command.args(["run", "--rm", "--set", "hypervisor.qemu.default_memory=128", &image, "echo", "ran"]);
    command.stdin(std::process::Stdio::null()).output().unwrap()
}

/// Tries each amount: it fails with one of `reasons` and leaves nothing, until there is enough.
#[track_caller]
fn fails_until_enough(
    host: &Host,
    amounts: &[u64],
    reasons: &[&str],
    mut attempt: impl FnMut(u64) -> Output,
) {
    for (failures, amount) in amounts.iter().enumerate() {
        let output = attempt(*amount);
        if output.status.success() {
            assert_eq!(stdout(&output), "ran\n");
            assert!(failures > 0, "{amount} was enough at once");
            return;
        }
        let text = stderr(&output);
        eprintln!("{amount}: {text}");
        assert!(reasons.iter().any(|reason| text.contains(reason)), "{amount}: {text}");
        assert!(!text.contains("panicked"), "{amount}: {text}");
        assert_eq!(host.leftovers(), Vec::<String>::new(), "with {amount}");
    }
    panic!("{amounts:?} were not enough");
}

#[test]
fn descriptors_that_run_out_are_named() {
    let Some(host) = Host::new() else { return };
    fails_until_enough(&host, &[10, 16, 20, 28, 4096], &["Too many open files", "os error 24"], |limit| {
        run_within(&host, &["prlimit", &format!("--nofile={limit}:{limit}")])
    });
}

/// A cgroup of this version 1 controller that goes when it is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(host: &Host, controller: &str) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup").join(controller);
        if !root.join("cgroup.procs").exists() {
            kata_testkit::skip(&format!("there is no version 1 controller {controller}"));
            return None;
        }
        let world = host.run_dir();
        let name = world.parent().and_then(Path::file_name).unwrap();
        let path = root.join(name);
        std::fs::create_dir(&path).unwrap();
        Some(Self(path))
    }

    fn run(&self, host: &Host) -> Output {
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", self.0.display());
        run_within(host, &["sh", "-c", &enter])
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn processes_that_run_out_are_named() {
    let Some(host) = Host::new() else { return };
    let Some(cgroup) = Cgroup::new(&host, "pids") else { return };
    let reasons = ["Resource temporarily unavailable", "os error 11"];
    fails_until_enough(&host, &[2, 8, 200], &reasons, |limit| {
        std::fs::write(cgroup.0.join("pids.max"), limit.to_string()).unwrap();
        cgroup.run(&host)
    });
}

#[test]
fn memory_that_the_host_does_not_have_is_named() {
    let Some(host) = Host::new() else { return };
    let Some(cgroup) = Cgroup::new(&host, "memory") else { return };
    std::fs::write(cgroup.0.join("memory.limit_in_bytes"), "48M").unwrap();
    // The kernel ends the machine.
    let output = cgroup.run(&host);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("killed by signal 9"), "{text}");
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn full_run_directory_is_named() {
    let Some(host) = Host::new() else { return };
    let dir = host.run_dir();
    std::fs::create_dir_all(&dir).unwrap();
    fails_until_enough(&host, &[4, 8, 16, 4096], &["No space left", "os error 28"], |kibibytes| {
        let options = std::ffi::CString::new(format!("size={kibibytes}k,mode=755")).unwrap();
        mount("tmpfs", &dir, "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
        if kibibytes < 4096 {
            // A page is left for the first of what is written.
            let page = vec![0; 4096];
            for n in 1..kibibytes / 4 {
                std::fs::write(dir.join(format!(".fill{n}")), &page).unwrap();
            }
        }
        let output = run_within(&host, &["env"]);
        for entry in std::fs::read_dir(&dir).unwrap().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            assert!(name == ".uids" || name.starts_with(".fill"), "left: {name}");
        }
        // The owner's last process may still be on its way out.
        host.wait_for("the directory to be let go", || unmount(&dir, UnmountFlags::empty()).ok());
        output
    });
}

#[test]
fn twenty_pods_started_at_once_all_start() {
    let Some(rig) = Containerd::new(Version::V1) else { return };
    rig.host().configure(
        // All boot at once, and come to their ends at once.
        "[hypervisor.qemu]\ndefault_memory = 96\n[agent.kata]\nreconnect_timeout_ms = 300000\ncreate_container_timeout = 300\n",
    );
    let clients: Vec<_> = (0..20)
        .map(|n| {
            let (id, script) = (format!("pod{n}"), format!("echo pod {n}"));
            let words = rig.run(&["--rm", IMAGE, &id, "sh", "-c", &script]);
            rig.ctr(words).stdout(std::process::Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (n, client) in clients.into_iter().enumerate() {
        assert_eq!(stdout(&client.wait_with_output().unwrap()), format!("pod {n}\n"));
    }
}
