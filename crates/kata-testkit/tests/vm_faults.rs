//! What a user is told when something is missing, broken or killed, and that nothing is left of it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::io::Read;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use kata_testkit::driver::Driver;
use kata_testkit::host::{Host, patience, stderr, stdout};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn kill(pid: u32) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
}

#[track_caller]
fn says(output: &Output, words: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
}

#[test]
fn missing_kernel_is_named() {
    let Some(host) = Host::new() else { return };
    host.configure("[hypervisor.qemu]\nkernel = \"/no/such/vmlinux\"\n");
    says(&host.sh(&[], "true"), &["/no/such/vmlinux", "No such file"]);
}

#[test]
fn missing_machine_emulator_is_named() {
    let Some(host) = Host::new() else { return };
    host.configure("[hypervisor.qemu]\npath = \"/no/such/qemu\"\n[runtime]\nhypervisor_name = \"qemu\"\n");
    says(&host.sh(&[], "true"), &["/no/such/qemu"]);
}

#[test]
fn missing_image_is_named() {
    let Some(host) = Host::new() else { return };
    says(&host.output(["run", "--rm", "oci:/no/such/layout:latest", "true"]), &["/no/such/layout"]);
}

#[test]
fn every_error_of_a_configuration_is_told_at_once_with_its_key() {
    let Some(host) = Host::new() else { return };
    host.configure(
        "[hypervisor.qemu]\ndefault_memroy = 512\nmachine_type = \"pc-98\"\n\n[agent.kata]\ncreate_container_timeout = \"soon\"\n",
    );
    says(
        &host.sh(&[], "true"),
        &[
            "default_memroy",
            "default_memory",
            "machine_type",
            "create_container_timeout",
            "configuration.toml",
        ],
    );
}

#[test]
fn unreadable_root_directory_is_named() {
    let Some(host) = Host::new() else { return };
    says(&host.output(["run", "--rm", "--rootfs", "/no/such/root", "true"]), &["/no/such/root"]);
}

#[test]
fn guest_kernel_panic_shows_what_the_console_said() {
    let Some(host) = Host::new() else { return };
    // A kernel without an init gives up.
    let output = host.sh(&["--set", "hypervisor.qemu.kernel_params=rdinit=/nowhere init=/nowhere"], "true");
    says(&output, &["Kernel panic"]);
}

#[test]
fn machine_killed_while_booting_is_told() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let child = host.ctl(["run", "--rm", &image, "true"]).stderr(Stdio::piped()).spawn().unwrap();
    let machine =
        host.wait_for("the machine", || host.pids_of(Driver::under_test().program()).first().copied());
    kill(machine);
    let output = child.wait_with_output().unwrap();
    says(&output, &[Driver::under_test().process(), "killed"]);
}

/// Runs a container that says when it is up, kills one process of the pod, and answers what the client said then.
fn killed_while_running(host: &Host, program: &str) -> (Output, Duration) {
    let image = host.image();
    let mut child = host
        .ctl(["run", "--rm", &image, "sh", "-c", "echo up; exec sleep 1000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    let begin = Instant::now();
    let parts = host.pids_of(program);
    assert!(!parts.is_empty(), "no {program} runs");
    for pid in parts {
        let _ = kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL);
    }
    let output = child.wait_with_output().unwrap();
    (output, begin.elapsed())
}

#[test]
fn machine_killed_while_running_ends_the_pod_with_the_reason() {
    let Some(host) = Host::new() else { return };
    let (output, after) = killed_while_running(&host, Driver::under_test().program());
    says(&output, &["VMM", "killed"]);
    assert!(after < patience(Duration::from_secs(5)), "{after:?}");
}

#[test]
fn file_server_killed_while_running_ends_the_pod_with_the_reason() {
    let Some(host) = Host::new() else { return };
    let (output, after) = killed_while_running(&host, "kata-virtiofsd");
    says(&output, &["virtio-fs daemon", "killed"]);
    assert!(after < patience(Duration::from_secs(5)), "{after:?}");
}

#[test]
fn vsock_device_killed_while_running_ends_the_pod_with_the_reason() {
    let Some(host) = Host::new().filter(|_| Driver::under_test().has_vsock_process()) else { return };
    let (output, after) = killed_while_running(&host, "kata-vmm");
    says(&output, &["vsock"]);
    assert!(after < patience(Duration::from_secs(5)), "{after:?}");
}

#[test]
fn owner_killed_leaves_a_pod_that_can_be_removed_whole() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let output = host.output(["run", "-d", "--name", "orphan", &image, "sleep", "1000"]);
    assert!(output.status.success(), "{}", stderr(&output));
    for pid in host.pids_of("containerd-shim-kata-v2") {
        kill(pid);
    }
    host.wait_for("the owner's end", || {
        let listed = stdout(&host.output(["ps", "-a"]));
        (listed.contains("orphan") && listed.contains("dead")).then_some(())
    });
    let output = host.output(["rm", "-f", "orphan"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn client_that_vanishes_mid_stream_does_not_stop_the_container() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let mark = host.scratch("mark");
    std::fs::create_dir_all(&mark).unwrap();
    let volume = format!("{}:/mark", mark.display());
    let script = "i=0; while [ $i -lt 2000 ]; do echo line $i of many; i=$((i+1)); done; touch /mark/done";
    let mut child = host
        .ctl(["run", "--rm", "-v", &volume, &image, "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 10];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    kill(child.id());
    child.wait().unwrap();
    host.wait_for("the container's end", || mark.join("done").exists().then_some(()));
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn layer_that_does_not_match_its_digest_is_refused() {
    let Some(host) = Host::new() else { return };
    let copy = host.scratch("corrupt");
    let source = host.image();
    let source = source.trim_start_matches("oci:").trim_end_matches(":latest");
    assert!(std::process::Command::new("cp").args(["-r", source]).arg(&copy).status().unwrap().success());
    let blobs = copy.join("blobs/sha256");
    let layer = std::fs::read_dir(&blobs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| path.metadata().unwrap().len())
        .unwrap();
    let mut bytes = std::fs::read(&layer).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&layer, bytes).unwrap();
    let output = host.output(["run", "--rm", &format!("oci:{}:latest", copy.display()), "true"]);
    says(&output, &["sha256:", layer.file_name().unwrap().to_str().unwrap()]);
}

#[test]
fn kvm_where_there_is_none_is_refused_with_the_next_step() {
    let Some(host) = Host::new() else { return };
    let real = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    if real.contains(" vmx") || real.contains(" svm") {
        kata_testkit::skip("this host has hardware virtualisation");
        return;
    }
    says(&host.sh(&["--set", "runtime.accelerator=kvm"], "true"), &["kvm", "svm", "auto"]);
}

/// Has the agent of a pod end its machine, behind the owner's back.
async fn end_agent(host: &Host, pod: &str) {
    let mut stream =
        tokio::net::UnixStream::connect(host.run_dir().join(pod).join("kata.hvsock")).await.unwrap();
    stream.write_all(format!("CONNECT {}\n", kata_api::ports::AGENT).as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        answer.push(stream.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    let client = ttrpc::asynchronous::Client::new(ttrpc::asynchronous::transport::Socket::new(stream));
    let agent = kata_api::agent_ttrpc::AgentServiceClient::new(client);
    let request = kata_api::agent::DestroySandboxRequest::new();
    // The machine may be gone before the answer is out.
    let _ = agent.destroy_sandbox(ttrpc::context::with_timeout(5_000_000_000), &request).await;
}

#[test]
fn agent_that_ends_takes_the_pod_along_at_once() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let mut child = host
        .ctl(["run", "--rm", "--name", "headless", &image, "sh", "-c", "echo up; exec sleep 1000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    let begin = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(end_agent(&host, "headless"));
    let output = child.wait_with_output().unwrap();
    assert!(begin.elapsed() < patience(Duration::from_secs(5)));
    // Whether the agent could still report its container, which it killed, is a race that it may win.
    match output.status.code() {
        Some(137) => {}
        _ => says(&output, &["the pod has failed"]),
    }
}
